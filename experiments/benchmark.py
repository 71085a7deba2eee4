"""benchmark.py - how long the parts take, beside the figures of other implementations.

    python -m experiments.benchmark detector              # metric, soft-NMS, detection head
    python -m experiments.benchmark detector --only mAP   # the rows that have "mAP" in their name
    python -m experiments.benchmark data                  # reading one window
    python -m experiments.benchmark full-size             # the paper's models, random weights
    python -m experiments.benchmark efficiency            # Table 6: the cost of language

Inputs are random but seeded. A figure is the median of five runs after one that warms up, or of
one run with `--size full` on a CPU, which takes 20 GB of memory and an hour. The exit code is 1 if
a row missed its limit.
"""
import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import TALDataset
from evaluate import mean_average_precision, nms_per_class
from experiments import efficiency
from experiments.efficiency import duration, machine, median_times, print_head, print_row
from head import DetectionHead, Output, attend, decode, detection_loss, pyramid_points
from support.annotations import Video
from support.demo import write_video
from support.flags import device

REPEATS = 5


class Row(NamedTuple):
    """One line of a table. A problem builds its inputs and returns the function to time."""
    name: str
    problems: list                  # [ours], or [ours, reference]
    reference: str                  # time of others, measured elsewhere
    limit: float = float("inf")     # seconds; with a reference here, 1.05 times its time instead


def main(argv=None) -> int:
    args = get_args(argv)
    if args.what == "efficiency":
        return efficiency.table6(args)
    rows, notes = TABLES[args.what]
    chosen = [row for row in rows if args.only.lower() in row[0].lower()]
    if not chosen:
        names = "; ".join(row[0] for row in rows)
        print(f"benchmark.py: error: --only {args.only}: expected a part of a row's name, found "
              f"none of {names}", file=sys.stderr)
        return 2
    if args.what == "full-size":
        return efficiency.full_size(args, chosen)
    return compare(chosen, notes)


def get_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("what", choices=["detector", "data", "full-size", "efficiency"], help="which table")
    flag("--only", default="", metavar="NAME", help="only the rows with NAME in them, in any case")
    flag("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu",
         help="of full-size and efficiency")
    flag("--size", choices=["full", "reduced"], help="of the models (default: full on a GPU)")
    flag("--compile", action="store_true", help="compile the models' layers")
    args = parser.parse_args(argv)
    args.size = args.size or ("reduced" if args.device == "cpu" else "full")
    args.repeats = 1 if args.device == "cpu" and args.size == "full" else REPEATS
    return args


def compare(rows: list, notes: str) -> int:
    """Print our times beside those of others. Returns 1 if a row missed its limit, else 0."""
    print(machine())
    print_head("what", "ours (median)", "reference", "limit")
    missed = 0
    for name, problems, reference, limit in rows:
        ours, *here = median_times([problem() for problem in problems], REPEATS)
        if here:
            reference += f"; here {duration(here[0])}, ratio {ours / here[0]:.2f}"
            limit = 1.05 * here[0]
        cell = duration(limit) if np.isfinite(limit) else "-"
        if ours > limit:
            cell += " (missed)"
            missed = 1
        print_row([name, duration(ours), reference, cell])
    print(f"\n{notes}")
    return missed


# ------------------------------------------------------------------------------------- detector
def metric_problem(videos: int, classes: int, segments: int, thresholds, per_video: int):
    """mAP of detections: half lie near a true segment of their video, half anywhere."""
    def anywhere(count):
        start = rng.uniform(0, 190, count)
        return np.stack([start, start + rng.uniform(1, 10, count)], 1)

    rng = np.random.default_rng(0)
    names = np.array([f"class {c}" for c in range(classes)])
    ground_truth, predictions = {}, {}
    for video in range(videos):
        count = len(range(video, segments, videos))
        truth = anywhere(count)
        label = rng.choice(rng.integers(0, classes, 2), count)    # a video shows up to two classes
        found = anywhere(per_video)
        guess = rng.integers(0, classes, per_video)
        near = rng.integers(0, count, per_video // 2)
        found[:len(near)] = truth[near] + rng.normal(0, 1, (len(near), 2))
        guess[:len(near)] = label[near]
        ground_truth[str(video)] = {"segments": truth, "labels": names[label].tolist()}
        predictions[str(video)] = {"segments": np.sort(found, 1), "labels": names[guess].tolist(),
                                   "scores": rng.random(per_video)}
    return partial(mean_average_precision, ground_truth, predictions, thresholds)


def nms_problem(hard: bool, classes=20, per_class=2000, max_per_video=200):
    """Soft-NMS of one video, whose detections lie around 15 actions. Hard: they lie anywhere."""
    rng = np.random.default_rng(0)
    n = classes * per_class
    centre = rng.uniform(0, 2304, n)
    length = np.exp(rng.uniform(np.log(4), np.log(256), n))
    score = rng.random(n)
    if not hard:
        action = rng.integers(0, 15, n)
        centre = centre[action] + rng.normal(0, 4, n)
        length = length[action] * rng.lognormal(0, 0.3, n)
        score = 0.001 ** score
    segments = torch.tensor(np.stack([centre - length / 2, centre + length / 2], 1))
    return partial(nms_per_class, segments.float(), torch.tensor(score).float(),
                   torch.arange(n) % classes, max_per_video=0 if hard else max_per_video)


def head_inputs(batch: int, length=2304, dim=2048, classes=20) -> tuple:
    """ActionFormer's size for THUMOS14: head, features (B, L, D), mask, segments and labels."""
    torch.manual_seed(0)
    head = DetectionHead(dim, classes, width=512, levels=6, window=19)
    truth = SimpleNamespace(segments=[], labels=torch.randint(classes, (batch, 15)))
    for _ in range(batch):
        start = torch.rand(15) * (length - 100)
        truth.segments.append(torch.stack([start, start + 4 + 60 * torch.rand(15)], 1))
    mask = torch.ones(batch, length, dtype=torch.bool)
    return head, torch.randn(batch, length, dim), mask, truth


def training_problem(forward):
    """One step on two videos: forward, Eq. 6, backward, clipped gradient, AdamW."""
    head, f, mask, truth = head_inputs(batch=2)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        detection_loss(forward(head, f, f, mask), truth, head).total.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    return step


def inference_problem(forward):
    """One video: forward, decoding, soft-NMS. The untrained head scores every class about .01, so
    decoding finds its most, 2,000 detections at each of the finer levels."""
    head, f, mask, _ = head_inputs(batch=1)
    head.eval()

    @torch.no_grad()
    def infer():
        return nms_per_class(*decode(forward(head, f, f, mask).clip(0)))
    return infer


def plain_forward(head, f, _, mask) -> Output:
    """`DetectionHead.forward` in the arithmetic of ActionFormer's code, without drop-path.

    Tensors are (B, W, L), and every convolution masks its output. Attention is ours.
    """
    def norm(x, layer):
        x = x - x.mean(1, keepdim=True)
        x = x / torch.sqrt((x ** 2).mean(1, keepdim=True) + layer.eps)
        return x * layer.weight[:, None] + layer.bias[:, None]

    def conv(x, m, layer, stride=1):
        x = F.conv1d(x, layer.weight, layer.bias, stride, padding=1, groups=layer.groups)
        return x * m[..., ::stride]

    def linear(x, layer):
        return F.conv1d(x, layer.weight[..., None], layer.bias)

    def block(x, m, own):
        m_out, parts = m[..., ::own.stride], own.attention
        y, qkv = norm(x, own.norm_attention), []
        for c, n, project in zip(parts.conv, parts.norm, parts.linear):
            qkv.append(linear(norm(conv(y, m, c, own.stride), n), project).mT.contiguous())
        y = attend(*qkv, m_out[:, 0] > 0, parts.num_heads, parts.window).mT.contiguous()
        skip = x if own.stride == 1 else F.max_pool1d(x, 3, 2, 1)
        x = skip * m_out + own.scale_attention[:, None] * (linear(y, parts.out) * m_out)
        y = F.gelu(linear(norm(x, own.norm_mlp), own.mlp[0]))
        return x + own.scale_mlp[:, None] * (linear(y, own.mlp[2]) * m_out)

    def conv_head(x, m, own):
        for c, n in zip(own.hidden, own.norm):
            x = F.relu(norm(conv(x, m, c), n))
        return conv(x, m, own.out).mT

    pyramid, m, x = head.pyramid, mask[:, None].float(), f.mT.contiguous()
    output = Output([], [], pyramid_points(f.size(1), head.strides, head.ranges), [])
    for c, n in zip(pyramid.embed, pyramid.embed_norm):
        x = F.relu(norm(conv(x, m, c), n))
    for own in pyramid.stem:
        x = block(x, m, own)
    for level, n in enumerate(pyramid.level_norm):
        if level > 0:
            x, m = block(x, m, pyramid.branch[level - 1]), m[..., ::2]
        y = norm(x, n)
        output.cls_logits.append(conv_head(y, m, head.cls_head))
        output.offsets.append(F.relu(head.scales[level] * conv_head(y, m, head.loc_head)))
        output.mask.append(m[:, 0] > 0)
    return output


# ------------------------------------------------------------------------------------- data
def video_problem(training: bool, seconds=110, window=768):
    """One window at stride 4, 160x160, of a picture that moves: 320x180, 30 frames a second."""
    torch.manual_seed(0)
    picture = F.interpolate(255 * torch.rand(1, 3, 24, 40), (180, 320), mode="bilinear")[0]
    picture = (picture + 3 * torch.randn(180, 320)).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    frames = [np.roll(picture, (t // 2, t), (0, 1)) for t in range(30 * seconds)]
    return window_problem("video.mp4", lambda path: write_video(path, np.stack(frames), 30),
                          seconds, window=window, training=training, image_size=160)


def feature_problem(steps=2304, width=2048):
    """One window of a feature file that is somewhat longer."""
    rows = np.random.default_rng(0).random((steps + 100, width), np.float32)
    return window_problem("video.npy", lambda path: np.save(path, rows),
                          320.0, window=steps, training=True, num_frames=16)


def window_problem(name: str, write: Callable, seconds: float, **options):
    """Read the first window of a file, on one thread as in a worker process."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / name
    write(path)
    dataset = TALDataset([Video("video", seconds, 30.0, path=path)], [], stride=4, **options)

    def read(folder=folder):    # the folder lasts as long as this function
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        window = dataset[0]
        torch.set_num_threads(threads)
        return window
    return read


THUMOS = (213, 20, 3300, np.linspace(0.3, 0.7, 5))    # videos, classes, segments, thresholds
ACTIVITYNET = (4728, 200, 7600, np.linspace(0.5, 0.95, 10))
FORWARDS = (DetectionHead.forward, plain_forward)
DETECTOR = [
    Row("mAP, THUMOS14 size, 2,000 detections a video",
        [partial(metric_problem, *THUMOS, 2000)], "145 s (official), 88 s (OpenTAD)", 10.0),
    Row("mAP, THUMOS14 size, 200 detections a video",
        [partial(metric_problem, *THUMOS, 200)], "15 s (official), 9 s (OpenTAD)", 1.0),
    Row("mAP, ActivityNet-1.3 size, 100 detections a video",
        [partial(metric_problem, *ACTIVITYNET, 100)], "127 s (official), 65 s (OpenTAD)", 10.0),
    Row("soft-NMS of 40,000 detections",
        [partial(nms_problem, hard=False)], "72 ms (ActionFormer, C++)", 0.15),
    Row("soft-NMS of 40,000 detections, hard case", [partial(nms_problem, hard=True)], "-"),
    Row("training step, 2,304 steps, batch 2",
        [partial(training_problem, forward) for forward in FORWARDS], "3.0 s (ActionFormer)"),
    Row("inference, 2,304 steps, batch 1",
        [partial(inference_problem, forward) for forward in FORWARDS], "0.47 s (ActionFormer)"),
]
DETECTOR_NOTES = """\
Others measured the reference figures on another machine with 2 CPU cores: the official toolkit in
one process, OpenTAD in two. "Here" is ActionFormer's arithmetic on this machine, in turn with ours.
Soft-NMS: 20 classes, 2,000 detections each, scores log-uniform from .001 to 1, the best 200 kept.
Hard case: scores uniform from 0 to 1, segments anywhere, all survivors kept.
Training and inference: vision only, features of 2,048 channels, 20 classes, 29 M parameters."""
DATA = [
    Row("training window of a video, 768 frames", [partial(video_problem, training=True)], "-"),
    Row("test window of a video, 768 frames", [partial(video_problem, training=False)], "-"),
    Row("window of features, 2,304 x 2,048", [feature_problem], "-"),
]
DATA_NOTES = """\
Each figure is one window in one process; a worker (--workers) gives 1 / figure windows per second.
The video is H.264, 320x180, 30 fps. All frames are decoded, every fourth is cropped to 160x160."""
TABLES = {"detector": (DETECTOR, DETECTOR_NOTES), "data": (DATA, DATA_NOTES),
          "full-size": (efficiency.MODELS, "")}

if __name__ == "__main__":
    sys.exit(main())
