"""experiments/extract.py - features of videos by a vision encoder, to train without it.

    python -m experiments.extract --videos DIR --vision FILE --out DIR

Row l of NAME.npy (T, V) is what the encoder gives end to end for step l, or the mean where windows
overlap. train.py reads manifest.json: stride, and fps of the videos. A stopped command goes on."""
import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch

from data import TALDataset, batch_loader
from model import VisionEncoder
from support.annotations import Video, expect, read_json
from support.checkpoint import written_whole
from support.commands import for_each, run_command
from support.flags import BELOW_1, DEVICES, GPUS, integer, real
from support.video import VIDEO_SUFFIXES, probe
from support.weights import vision_config

SETTINGS = ("vision", "stride", "window", "overlap", "image_size", "dtype")

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--videos", required=True, type=Path, metavar="DIR", help="folder of video files")
    flag("--vision", default="tiny", help="file or folder, as of train.py (tiny: random weights)")
    flag("--out", required=True, type=Path, metavar="DIR", help="folder for the features")
    flag("--stride", type=integer(1), default=4, help="video frames per row (%(default)s)")
    flag("--window", type=integer(1), default=768, help="rows at a time (%(default)s)")
    flag("--overlap", type=real(0, BELOW_1), default=0.0, help="share of a window in the next (0)")
    flag("--image-size", type=integer(1), default=160, help="side of the crop (%(default)s)")
    flag("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if GPUS else "float32")
    flag("--device", choices=DEVICES, default=DEVICES[0])
    flag("--workers", type=integer(0, 1024), default=0, help="processes that read videos")
    return run_command("extract.py", extract, parser.parse_args(argv))

def extract(args) -> None:
    """Write the features that are not there yet. InputError names the videos that failed."""
    paths = sorted(p for p in args.videos.glob("*") if p.suffix.lower() in VIDEO_SUFFIXES)
    expect(paths, args.videos, f"a folder of video files ({'/'.join(VIDEO_SUFFIXES)})", "none")
    args.out.mkdir(parents=True, exist_ok=True)
    file, settings = args.out / "manifest.json", {name: getattr(args, name) for name in SETTINGS}
    settings["num_frames"] = 0                                 # row l stands for one frame
    manifest = read_json(file) if file.exists() else {**settings, "videos": {}}
    before = {name: manifest.get(name) for name in settings}
    expect(before == settings, file, f"{settings}", f"{before}", "give the same flags or folder")
    torch.manual_seed(0)                       # random weights are those of train.py --seed 0
    encoder = VisionEncoder(vision_config(args.vision, args.image_size))
    if args.vision != "tiny":
        encoder.load(args.vision)
    encoder.to(args.device).eval()

    def extract_one(path):
        target, video = args.out / f"{path.stem}.npy", Video(path.stem, *probe(path), path=path)
        if video.name in manifest["videos"] and target.exists():
            return
        rows = encode(encoder, video, args)
        with written_whole(target) as beside:
            np.save(beside, rows)
        manifest["videos"][video.name] = video.fps
        with written_whole(file) as beside:
            beside.write_text(json.dumps(manifest, indent=1) + "\n")
    failed = for_each(paths, "extract.py", extract_one)
    expect(not failed, args.videos, "videos that can be read", failed, "then start again")
    print(f"{len(paths)} videos, features of width {encoder.dim} in {args.out}")

@torch.no_grad()
def encode(encoder, video: Video, args) -> np.ndarray:
    """One video -> (T, V) float32; where windows overlap, the mean of their rows."""
    dataset = TALDataset([video], [], args.window, args.stride, image_size=args.image_size,
                         overlap=args.overlap)
    T, half = dataset.steps(video), args.dtype == "bfloat16"
    total, count = np.zeros((T, encoder.dim), np.float32), np.zeros((T, 1), np.float32)
    for batch in batch_loader(dataset, encoder.clip, args.workers, batch_size=1):
        batch = batch.to(args.device)
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=half):
            rows = encoder(batch.inputs, batch.mask)[batch.mask]
        start = batch.windows[0].start
        total[start:start + len(rows)] += rows.float().cpu().numpy()
        count[start:start + len(rows)] += 1
    return total / count

if __name__ == "__main__":
    sys.exit(main())
