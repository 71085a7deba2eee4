"""support/commands.py - the flags of commands that open a trained model, and how a command ends."""
import argparse
import sys

import torch
from safetensors import SafetensorError

from support.annotations import InputError
from support.checkpoint import Stopped
from support.flags import ABOVE_0, device, real


def evaluate_args(description: str, argv=None) -> argparse.Namespace:
    """evaluate.py's flags."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    checkpoint_flags(flag)
    flag("--video", metavar="FILE", help="find the actions in this video or .npy file instead")
    flag("--fps", type=real(0, 1000), default=0.0, help="frames a second of a .npy --video")
    flag("--min-score", type=real(-1e9), default=0.3, help="lowest score that --video shows")
    flag("--ground-truth", metavar="FILE", help="ActivityNet-format json, plain or gzip")
    flag("--predictions", metavar="FILE", help="result file of any model, plain or gzip")
    flag("--subset", default="test", help="subset of the ground truth to score, in any case")
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.ground_truth and args.predictions):
        parser.error("expected --checkpoint DIR, or both --ground-truth FILE and --predictions "
                     "FILE")
    for name in ("video", "lm"):
        if getattr(args, name) and not args.checkpoint:
            parser.error(f"--{name}: expected --checkpoint DIR with it")
    return args


def checkpoint_flags(flag):
    """Of the commands that open a trained model."""
    gpu = torch.cuda.is_available()
    flag("--checkpoint", metavar="DIR", help="folder that train.py wrote")
    flag("--lm", metavar="DIR", help="where the language model of the training is now, if moved")
    flag("--out", metavar="DIR", help="folder for results and pictures (default: the checkpoint's)")
    flag("--device", type=device, default="cuda" if gpu else "cpu", help="cuda or cpu")
    flag("--tiou", type=real(ABOVE_0, 1), nargs="+", metavar="IOU",
         help="thresholds of tIoU (default: those of the training, else .3 to .7)")
    flag("--json", metavar="FILE", help="write the figures to FILE, as fractions with all digits")


def run_command(program: str, command, *args) -> int:
    """Call command(*args) -> exit code: 0, 2 for a mistake of the user's, 128 + n for a signal.

    A mistake is one line on stderr. Any other error is ours and keeps its traceback.
    """
    try:
        command(*args)
        return 0
    except Stopped as stopped:
        print(f"{program}: {stopped}", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print(f"{program}: stopped by SIGINT", file=sys.stderr)
        return 130
    except (InputError, OSError, SafetensorError) as error:
        message = error
    except torch.OutOfMemoryError as error:
        message = (f"the memory of the GPU is full; lower --batch-size (raise --accumulate by as "
                   f"much), or --window, with --grad-checkpoint on and --dtype bfloat16: {error}")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        message = (f"--workers: {error}; look whether a video is broken, or whether the memory is "
                   f"full (then take fewer --workers)")
    print(f"{program}: error: {message}", file=sys.stderr)
    return 2
