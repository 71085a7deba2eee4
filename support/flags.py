"""support/flags.py - train.py's flags, their types, and checks between them."""
import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from contextlib import suppress
from pathlib import Path

import torch

from support.video import read_manifests

ROOT = Path(__file__).parents[1]
# Plain values of flags for each data set, end to end; FEATURE_PRESETS change them for features.
BASE, PRESETS, FEATURE_PRESETS = json.loads((ROOT / "support/presets.json").read_text()).values()
for preset in PRESETS.values():
    if preset.get("descriptions", "").startswith("descriptions/"):
        preset["descriptions"] = str(ROOT / preset["descriptions"])
TIOU = [0.3, 0.4, 0.5, 0.6, 0.7]
ABLATIONS = ("only-language", "labels-only", "shuffled-descriptions", "vision-tokens",
             "shared-token", "without-tg", "without-adv")
ABOVE_0, BELOW_1 = 1e-9, 0.999999
GPUS = torch.cuda.device_count()
DEVICES = ["cuda", *(f"cuda:{number}" for number in range(GPUS)), "cpu"] if GPUS else ["cpu"]

def train_args(description: str, argv=None) -> Namespace:
    """train.py's flags. The preset of --dataset gives defaults, and the command line wins."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    data_and_model_flags(parser.add_argument_group)
    training_and_run_flags(parser.add_argument_group)
    known = parser.parse_known_args(argv)[0]
    manifest = read_manifests(known.features or [])[0]
    change = FEATURE_PRESETS.get(known.dataset, {}) if known.features else {}
    parser.set_defaults(**{**BASE, **PRESETS[known.dataset], **change, **manifest})
    args = parser.parse_args(argv)
    if args.features and args.dataset == "demo":
        parser.error("--features: the demo reads videos; say --dataset custom")
    if bool(args.videos) == bool(args.features):
        parser.error("expected either --videos DIR (end to end) or --features DIR")
    if args.features and args.vision != "tiny":
        parser.error("--vision: with --features there is no vision encoder; leave one of them out")
    if not (args.annotations and args.descriptions):
        parser.error("expected both --annotations FILE and --descriptions FILE")
    if args.ablation and args.lambda_lang != "learned":
        parser.error("--ablation and --lambda-lang change one thing each: leave out one of them")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run and --overwrite starts over: leave out one")
    steps, top = args.resize_to or args.window, 2 ** (args.levels - 1)
    if steps < top:
        parser.error(f"--levels {args.levels}: expected windows of at least {top} steps, found "
                     f"{steps}; lower --levels, or raise --window or --resize-to")
    if args.ranges and len(args.ranges) != args.levels:
        parser.error(f"--levels: expected {len(args.ranges)} as the preset, found {args.levels}")
    if args.width % 4:
        parser.error(f"--width: expected a multiple of 4, the heads, found {args.width}")
    return args

def data_and_model_flags(group) -> None:
    flag = group("data").add_argument
    flag("--dataset", choices=sorted(PRESETS), default="demo", help="preset: support/presets.json")
    flag("--videos", help="folder of video files named as in the annotations: end to end")
    flag("--features", nargs="+", help="folders of NAME.npy, .npz or .pt (T, V), joined")
    flag("--annotations", help="ActivityNet-format JSON, or csv of THUMOS14 or EPIC-Kitchens")
    flag("--descriptions", help="JSON {label: sentence from start pose to end pose}")
    flag("--train-subset", default="training", help="subset name to train on, in any case")
    flag("--test-subset", default="validation", help="subset name to evaluate on")
    flag("--leave-out", nargs="+", default=[], metavar="VIDEO", help="videos to leave out")
    flag("--skip-missing", action="store_true", help="go on without videos that have no file")
    flag("--window", type=integer(1), default=768, help="L, steps of a window")
    flag("--stride", type=integer(1), default=4, help="video frames per step")
    flag("--num-frames", type=integer(), default=0, help="video frames that one feature sees")
    flag("--resize-to", type=integer(), default=0, help="steps of a whole video (0 = windows)")
    flag("--fps", type=real(0, 1000), default=0.0, help="frames a second (0 = as the data say)")
    flag("--min-overlap", type=real(0, 1), default=0.5, help="share of a segment inside a window")
    flag("--image-size", type=integer(1), default=160, help="side of the crop, pixels")
    flag("--workers", type=integer(0, 1024), default=0, help="processes that read (0 = this one)")
    flag = group("model").add_argument
    flag("--vision", default="tiny", help="file or folder: VideoMAE, InternViT, InternVideo2")
    flag("--lm", default="tiny", help="folder or name of a causal language model or InternVL3")
    flag("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if GPUS else "float32",
         help="of frozen weights and of encoder's and language model's arithmetic")
    flag("--lora-rank", type=integer(1), default=128, help="rank of the LoRA matrices")
    flag("--lora-alpha", type=real(), default=256, help="LoRA scale times rank")
    flag("--layout", choices=["frames-first", "text-first"], default="frames-first", help="vlm.py")
    flag("--language-stride", type=integer(1), default=1, help="K frames share one v_l (paper: 1)")
    flag("--lambda-lang", type=lambda_lang, default="learned", metavar="{learned,generated,0..1}",
         help="weight of language: Eq. 4, or a row of Table 4 (0 = vision only)")
    flag("--ablation", choices=ABLATIONS, help="a row of Tables 2, 4, 9: experiments/ablations.py")
    flag("--levels", type=integer(1, 30), default=6, help="levels of the pyramid")
    flag("--width", type=integer(1), default=512, help="width of the head")
    flag("--head-window", type=integer(), default=19, help="attention window in steps (0 = global)")
    flag("--prior", type=real(ABOVE_0, BELOW_1), default=0.01, help="probability classes start at")

def training_and_run_flags(group) -> None:
    flag = group("training").add_argument
    flag("--epochs", type=integer(), default=120, help="of both kinds in turn (0 = only evaluate)")
    flag("--warmup-epochs", type=real(), default=5, help="epochs of linear warm-up")
    flag("--batch-size", type=integer(1), default=1, help="windows at a time, in every process")
    flag("--accumulate", type=integer(1), default=1, help="batches whose gradients make one step")
    flag("--lr", type=real(), default=1e-4, help="learning rate of head, projection, tokens, FC")
    flag("--lr-vision", type=real(), default=5e-6, help="learning rate of the vision encoder")
    flag("--lr-lm", type=real(), default=5e-6, help="learning rate of LoRA")
    flag("--weight-decay", type=real(), default=0.05, help="on weights of linear layers and convs")
    flag("--clip", type=real(ABOVE_0), default=1.0, help="largest norm of the gradient")
    flag("--ema", type=real(0, BELOW_1), default=0.999, help="decay of weight average (0 = off)")
    flag("--lambda-loc", type=real(), default=1.0, help="weight of the DIoU loss (Eq. 6)")
    flag("--lambda-tg", type=real(), default=0.1, help="weight of L_tg (Eq. 9)")
    flag("--lambda-adv", type=real(), default=0.1, help="weight of L_adv (Eq. 9)")
    flag = group("run").add_argument
    flag("--out", default="out", help="folder for everything the run writes")
    flag("--resume", action="store_true", help="go on from OUT/checkpoint.safetensors")
    flag("--overwrite", action="store_true", help="start over in a folder that holds a run")
    flag("--init", metavar="DIR", help="start from another run: all weights that fit")
    flag("--eval-every", type=integer(), default=0, help="epochs between evaluations (0 = end)")
    flag("--save-every", type=integer(), default=200, help="steps between checkpoints (0 = epochs)")
    flag("--tiou", type=real(ABOVE_0, 1), nargs="+", default=TIOU, help="thresholds of the score")
    flag("--nms-sigma", type=real(ABOVE_0), default=0.5, help="sigma of soft-NMS")
    flag("--voting", type=real(0, 1), default=0.0, help="tIoU of segment voting (0 = off)")
    flag("--max-per-video", type=integer(), default=200, help="most detections (0 = no limit)")
    flag("--external-scores", help="JSON of video-level class scores for a class-agnostic head")
    flag("--seed", type=integer(), default=0, help="seed of weights, order and augmentation")
    flag("--device", choices=DEVICES, default=DEVICES[0], help="GPU or CPU")
    flag("--grad-checkpoint", choices=["on", "off"], default="on" if GPUS else "off",
         help="compute activations of encoder and language model again: less memory, more time")
    flag("--compile", action="store_true", help="compile their layers; needs a C compiler")
    flag("--dry-run", action="store_true", help="load everything, say what was found, run 2 steps")

def integer(low: int = 0, high: int = 10 ** 9, kind=int, what="a whole number"):
    """argparse type: a whole number from low to high."""
    def parse(text: str):
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise ArgumentTypeError(f"expected {what} from {low:g} to {high:g}, found {text}")
    return parse

def real(low: float = 0, high: float = 1e9, what="a number"):
    return integer(low, high, float, what)

def lambda_lang(text: str):
    number = real(0, 1, "'learned', 'generated' or a number")
    return text if text in ("learned", "generated") else number(text)
