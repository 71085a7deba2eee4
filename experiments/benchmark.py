"""benchmark.py - how long the parts take, beside the figures of other implementations.

    python -m experiments.benchmark detector              # metric, soft-NMS, detection head
    python -m experiments.benchmark detector --only mAP   # the rows that have "mAP" in their name
    python -m experiments.benchmark full-size             # the paper's models, random weights
    python -m experiments.benchmark efficiency            # Table 6: the cost of language

Inputs are random but seeded. A figure is the median of five runs after one that warms up, or of
one run with `--size full` on a CPU, which takes 20 GB of memory and an hour. The exit code is 1 if
a row missed its limit.
"""
import argparse
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from evaluate import mean_average_precision, nms_per_class
from experiments import efficiency
from experiments.efficiency import duration, machine, median_times, print_head, print_row
from head import DetectionHead, Output, attend, decode, detection_loss, pyramid_points
from support.flags import device

REPEATS = 5


def main(argv=None) -> int:
    args = get_args(argv)
    if args.what == "efficiency":
        return efficiency.table6(args)
    rows = DETECTOR if args.what == "detector" else efficiency.MODELS
    chosen = [row for row in rows if args.only.lower() in row[0].lower()]
    if not chosen:
        names = "; ".join(row[0] for row in rows)
        print(f"benchmark.py: error: --only {args.only}: expected a part of a row's name, found "
              f"none of {names}", file=sys.stderr)
        return 2
    return compare(chosen) if rows is DETECTOR else efficiency.full_size(args, chosen)


def get_args(argv=None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag = parser.add_argument
    flag("what", choices=["detector", "full-size", "efficiency"], help="which table")
    flag("--only", default="", metavar="NAME", help="only the rows with NAME in them, in any case")
    flag("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu",
         help="of full-size and efficiency")
    flag("--size", choices=["full", "reduced"], help="of the models (default: full on a GPU)")
    flag("--compile", action="store_true", help="compile the models' layers")
    args = parser.parse_args(argv)
    args.size = args.size or ("reduced" if args.device == "cpu" else "full")
    args.repeats = 1 if args.device == "cpu" and args.size == "full" else REPEATS
    return args


def compare(rows) -> int:
    """Print our times beside those of others. Returns 1 if a row missed its limit, else 0."""
    print(machine())
    print_head("what", "ours (median)", "reference", "limit")
    missed = 0
    for name, problems, reference, limit in rows:
        ours, *here = median_times([problem() for problem in problems], REPEATS)
        if here:
            reference += f"; here {duration(here[0])}, ratio {ours / here[0]:.2f}"
            limit = 1.05 * here[0]
        cell = duration(limit)
        if ours > limit:
            cell += " (missed)"
            missed = 1
        print_row([name, duration(ours), reference, cell])
    print('\nOthers measured the reference figures on another machine with 2 CPU cores. "Here" is '
          "ActionFormer's arithmetic\non this machine, in turn with ours; docs/benchmarks.md has "
          "the sizes of all problems.")
    return missed


def metric_problem(videos, classes, segments, thresholds, per_video):
    """mAP of detections: half lie near a true segment of their video, half anywhere."""
    def anywhere(count):
        start = rng.uniform(0, 190, count)
        return np.stack([start, start + rng.uniform(1, 10, count)], 1)

    rng = np.random.default_rng(0)
    names = np.array([f"class {c}" for c in range(classes)])
    ground_truth, predictions = {}, {}
    for video in range(videos):
        count = len(range(video, segments, videos))
        truth, found = anywhere(count), anywhere(per_video)
        label = rng.choice(rng.integers(0, classes, 2), count)    # a video shows up to two classes
        guess = rng.integers(0, classes, per_video)
        near = rng.integers(0, count, per_video // 2)
        found[:len(near)] = truth[near] + rng.normal(0, 1, (len(near), 2))
        guess[:len(near)] = label[near]
        ground_truth[video] = {"segments": truth, "labels": names[label].tolist()}
        predictions[video] = {"segments": np.sort(found, 1), "labels": names[guess].tolist(),
                              "scores": rng.random(per_video)}
    return partial(mean_average_precision, ground_truth, predictions, thresholds)


def nms_problem(classes=20, per_class=2000, max_per_video=200):
    """Soft-NMS of one video's detections, around 15 actions; scores log-uniform from .001 to 1."""
    rng = np.random.default_rng(0)
    n = classes * per_class
    action = rng.integers(0, 15, n)
    centre = rng.uniform(0, 2304, 15)[action] + rng.normal(0, 4, n)
    length = np.exp(rng.uniform(np.log(4), np.log(256), 15))[action] * rng.lognormal(0, 0.3, n)
    segments = torch.tensor(np.stack([centre - length / 2, centre + length / 2], 1))
    scores = torch.tensor(0.001 ** rng.random(n))
    return partial(nms_per_class, segments.float(), scores.float(), torch.arange(n) % classes,
                   max_per_video=max_per_video)


def head_inputs(batch, length=2304, dim=2048, classes=20):
    """ActionFormer's size for THUMOS14: head, features (B, L, D), mask, segments and labels."""
    torch.manual_seed(0)
    head = DetectionHead(dim, classes, width=512, levels=6, window=19)
    start = torch.rand(batch, 15) * (length - 100)
    segments = torch.stack([start, start + 4 + 60 * torch.rand(batch, 15)], 2)
    truth = SimpleNamespace(segments=segments, labels=torch.randint(classes, (batch, 15)))
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
    """One video: forward, decoding, soft-NMS.

    The untrained head scores every class about .01, so decoding finds its most: 2,000 detections
    at each of the finer levels.
    """
    head, f, mask, _ = head_inputs(batch=1)
    head.eval()

    @torch.no_grad()
    def infer():
        return nms_per_class(*decode(forward(head, f, f, mask).clip(0)))
    return infer


def plain_forward(head, f, _, mask):
    """`DetectionHead.forward` in the arithmetic of ActionFormer's code, without drop-path.

    Tensors are (B, W, L), and every F.conv1d masks its output. Attention is ours.
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
        m_out, parts, qkv = m[..., ::own.stride], own.attention, []
        y = norm(x, own.norm_attention)
        for c, n, project in zip(parts.conv, parts.norm, parts.linear):
            qkv.append(linear(norm(conv(y, m, c, own.stride), n), project).mT.contiguous())
        y = attend(*qkv, m_out[:, 0] > 0, parts.num_heads, parts.window).mT.contiguous()
        skip = x if own.stride == 1 else F.max_pool1d(x, 3, 2, 1)
        x = skip * m_out + own.scale_attention[:, None] * (linear(y, parts.out) * m_out)
        y = F.gelu(linear(norm(x, own.norm_mlp), own.mlp[0]))
        return x + own.scale_mlp[:, None] * (linear(y, own.mlp[2]) * m_out)

    def hidden(x, m, convs, norms):
        for c, n in zip(convs, norms):
            x = F.relu(norm(conv(x, m, c), n))
        return x

    def conv_head(x, m, own):
        return conv(hidden(x, m, own.hidden, own.norm), m, own.out).mT

    pyramid, m = head.pyramid, mask[:, None].float()
    output = Output([], [], pyramid_points(f.size(1), head.strides, head.ranges), [])
    x = hidden(f.mT.contiguous(), m, pyramid.embed, pyramid.embed_norm)
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


THUMOS = (213, 20, 3300, np.linspace(0.3, 0.7, 5))    # videos, classes, segments, thresholds
ACTIVITYNET = (4728, 200, 7600, np.linspace(0.5, 0.95, 10))
FORWARDS = (DetectionHead.forward, plain_forward)
# Name; functions that build inputs and return the function to time, ours and perhaps a reference;
# time of others, measured elsewhere; limit in seconds, or None: 1.05 times the reference.
DETECTOR = [
    ("mAP, THUMOS14 size, 2,000 detections a video",
     [partial(metric_problem, *THUMOS, 2000)], "145 s (official), 88 s (OpenTAD)", 10.0),
    ("mAP, THUMOS14 size, 200 detections a video",
     [partial(metric_problem, *THUMOS, 200)], "15 s (official), 9 s (OpenTAD)", 1.0),
    ("mAP, ActivityNet-1.3 size, 100 detections a video",
     [partial(metric_problem, *ACTIVITYNET, 100)], "127 s (official), 65 s (OpenTAD)", 10.0),
    ("soft-NMS of 40,000 detections", [nms_problem], "72 ms (ActionFormer, C++)", 0.15),
    ("training step, 2,304 steps, batch 2",
     [partial(training_problem, forward) for forward in FORWARDS], "3.0 s (ActionFormer)", None),
    ("inference, 2,304 steps, batch 1",
     [partial(inference_problem, forward) for forward in FORWARDS], "0.47 s (ActionFormer)", None),
]

if __name__ == "__main__":
    sys.exit(main())
