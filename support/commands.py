"""support/commands.py - the flags of commands that open a trained model, and how a command ends."""
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from support.annotations import InputError, expect, first_ten
from support.checkpoint import Stopped
from support.flags import ABOVE_0, DEVICES, real

DATA = ("annotations", "features", "videos", "test_subset", "external_scores")

def evaluate_args(description: str, argv=None) -> Namespace:
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    flag = parser.add_argument
    checkpoint_flags(flag)
    flag("--video", nargs="+", type=Path, help="find actions in these files or folders instead")
    flag("--plot", action="store_true", help="draw every --video to OUT/NAME.png")
    flag("--csv", metavar="FILE", help="write what is found in --video as a table")
    flag("--fps", type=real(0, 1000), default=0.0, help="frames a second of a feature file")
    flag("--min-score", type=real(-1e9), default=0.3, help="lowest score that --video shows")
    flag("--ground-truth", metavar="FILE", help="annotation file, as of train.py")
    flag("--predictions", metavar="FILE", help="result file of any model, plain or gzip")
    flag("--subset", default="test", help="subset of the ground truth to score, in any case")
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.ground_truth and args.predictions):
        parser.error("expected --checkpoint DIR, or --ground-truth FILE and --predictions FILE")
    if (args.video or args.lm) and not args.checkpoint:
        parser.error("--video, --lm: expected --checkpoint DIR with them")
    return args

def checkpoint_flags(flag, **options):
    """Of the commands that open a trained model. options: of --checkpoint, for argparse."""
    flag("--checkpoint", metavar="DIR", help="folder that train.py wrote", **options)
    flag("--lm", metavar="DIR", help="where the language model of the training is now, if moved")
    flag("--out", metavar="DIR", help="folder for results and pictures (default: the checkpoint's)")
    flag("--device", choices=DEVICES, default=DEVICES[0])
    flag("--tiou", type=real(ABOVE_0, 1), nargs="+", help="default: of training, else .3 to .7")
    flag("--json", metavar="FILE", help="write all figures (with --video: what is found) to FILE")
    for name in DATA:
        flag(f"--{name.replace('_', '-')}", nargs="+" if name == "features" else None,
             help="other data than that of the training; see train.py")

def replace_data(train_args, args) -> None:
    """Take flags on data anew, where they are given: files have moved, or are others."""
    given = {name: vars(args)[name] for name in DATA if vars(args).get(name)}
    for name, other in (("videos", "features"), ("features", "videos")):
        expect(name not in given or getattr(train_args, name), "--checkpoint",
               f"a model of {name}", f"one of {other}", f"give --{other}")
    vars(train_args).update(given)

def for_each(files: list, program: str, work) -> str:
    """work(file) for each; one that cannot be read is named, and the others go on -> text on them,
    "" without any. One file alone is an InputError at once."""
    failed = []
    for file in tqdm(files, program, dynamic_ncols=True, disable=None):
        try:
            work(file)
        except InputError as error:
            if len(files) == 1:
                raise
            tqdm.write(f"{program}: {error}", file=sys.stderr)
            failed.append(file.name)
    return f"{len(failed)} of {len(files)} that cannot: {first_ten(failed)}" if failed else ""

def run_command(program: str, command, *args) -> int:
    """Call command(*args) -> exit code: 0, 2 after a mistake (one line), 128 + n after a signal."""
    try:
        command(*args)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:             # of `| head`, which has read enough
        sys.stdout = None               # Python would write the rest to it
        return 141
    except Stopped as stopped:
        code, message = stopped.code, stopped
    except KeyboardInterrupt:
        code, message = 130, "stopped by SIGINT"
    except (InputError, OSError, SafetensorError) as error:
        code, message = 2, f"error: {error}"
    except torch.OutOfMemoryError as error:
        code, message = 2, (f"error: the GPU is full; lower --batch-size (raise --accumulate) or "
                            f"--window, with --grad-checkpoint on and --dtype bfloat16: {error}")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        code, message = 2, f"error: --workers: {error}; is a video broken, or the memory full?"
    print(f"{program}: {message}", file=sys.stderr)
    return code
