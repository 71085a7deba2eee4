"""How long metric, soft-NMS and detection head take, with limits, beside other implementations.

    python -m tests.speed
    python -m tests.speed --only mAP           # the rows with "mAP" in their name

A figure is the median of five runs after one that warms up. Exit code 1: a row missed its limit.
"""
import argparse
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import head as our_head
from evaluate import mean_average_precision, nms_per_class

def duration(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", default="", metavar="NAME", help="only the rows with NAME in them, in any case")
    args = parser.parse_args(argv)
    rows = [row for row in DETECTOR if args.only.lower() in row[0].lower()]
    if not rows:
        parser.error(f"--only {args.only}: expected a part of {[row[0] for row in DETECTOR]}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("\n| what | ours (median) | reference | limit |\n|:--|--:|--:|--:|")
    missed = 0
    for cells in compare(rows):
        print(f"| {' | '.join(cells)} |", flush=True)
        missed |= "(missed)" in cells[-1]
    print('\n"Here" is ActionFormer\'s arithmetic on this machine, in turn with ours.')
    return missed


def compare(rows):
    """Rows of our times beside those of others."""
    for name, problem, reference, limit in rows:
        ours, *here = median_times(problem())
        if here:
            reference += f"; here {duration(here[0])}, ratio {ours / here[0]:.2f}"
            limit = 1.05 * here[0]
        verdict = " (missed)" if ours > limit else ""
        yield name, duration(ours), reference, duration(limit) + verdict


def median_times(calls, repeats=5):
    """Median seconds of each call. They take turns, so that a busy machine favours none."""
    rounds = []
    for _ in range(1 + repeats):
        ticks = [time.perf_counter()]
        for call in calls:
            call()
            ticks.append(time.perf_counter())
        rounds.append(np.diff(ticks))
    return np.median(rounds[1:], 0).tolist()                         # the first round warms up


def metric_problem(videos, classes, segments, thresholds, per_video):
    """mAP of detections: half lie near a true segment of their video, half anywhere."""
    def anywhere(count):
        start = rng.uniform(0, 190, count)
        return np.stack([start, start + rng.uniform(1, 10, count)], 1)

    rng = np.random.default_rng(0)
    ground_truth, predictions = {}, {}
    for video in range(videos):
        count, half = len(range(video, segments, videos)), per_video // 2
        truth, found = anywhere(count), anywhere(per_video)
        label = rng.choice(rng.integers(0, classes, 2), count)    # a video shows up to two classes
        guess, near = rng.integers(0, classes, per_video), rng.integers(0, count, half)
        found[:half] = truth[near] + rng.normal(0, 1, (half, 2))
        guess[:half] = label[near]
        ground_truth[video] = {"segments": truth, "labels": label.astype(str).tolist()}
        predictions[video] = {"segments": np.sort(found, 1), "labels": guess.astype(str).tolist(),
                              "scores": rng.random(per_video)}
    return [partial(mean_average_precision, ground_truth, predictions, thresholds)]


def nms_problem(classes=20, per_class=2000):
    """Soft-NMS of one video's detections, around 15 actions; scores log-uniform from .001 to 1."""
    rng = np.random.default_rng(0)
    n = classes * per_class
    action = rng.integers(0, 15, n)
    centre = rng.uniform(0, 2304, 15)[action] + rng.normal(0, 4, n)
    length = np.exp(rng.uniform(np.log(4), np.log(256), 15))[action] * rng.lognormal(0, 0.3, n)
    segments = torch.tensor(np.stack([centre - length / 2, centre + length / 2], 1))
    scores = torch.tensor(0.001 ** rng.random(n))
    return [partial(nms_per_class, segments.float(), scores.float(), torch.arange(n) % classes)]


def head_problem(training, length=2304, dim=2048, classes=20):
    """A head of ActionFormer's size for THUMOS14: a step on two videos, or inference on one."""
    torch.manual_seed(0)
    head = our_head.DetectionHead(dim, classes, width=512, levels=6, window=19).train(training)
    B = 2 if training else 1
    f, mask = torch.randn(B, length, dim), torch.ones(B, length, dtype=torch.bool)
    start = torch.rand(B, 15) * (length - 100)
    segments = torch.stack([start, start + 4 + 60 * torch.rand(B, 15)], 2)
    truth = SimpleNamespace(segments=segments, labels=torch.randint(classes, (B, 15)))
    optimizer = torch.optim.AdamW(head.parameters(), 1e-4, fused=True)

    def step(forward):
        optimizer.zero_grad()
        our_head.detection_loss(forward(head, f, f, mask), truth, head).total.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()

    @torch.no_grad()
    def infer(forward):
        return nms_per_class(*our_head.decode(forward(head, f, f, mask).clip(0)))
    call = step if training else infer
    return [partial(call, our_head.DetectionHead.forward), partial(call, plain_forward)]


def plain_forward(head, f, _, mask):
    """`DetectionHead.forward` in the arithmetic of ActionFormer's code: tensors (B, W, L), conv1d
    for every layer, LayerNorm from elementary operations. Attention is ours."""
    def norm(x, layer):
        x = x - x.mean(1, keepdim=True)
        x = x / torch.sqrt((x ** 2).mean(1, keepdim=True) + layer.eps)
        return x * layer.weight[:, None] + layer.bias[:, None]

    def conv(x, m, layer):
        stride = layer.stride[0]
        return F.conv1d(x, layer.weight, layer.bias, stride, 1, 1, layer.groups) * m[..., ::stride]

    def point(x, layer):
        return F.conv1d(x, layer.weight[..., None], layer.bias)

    def block(x, m, own):
        y, m_out, part = norm(x, own.norm_attention), m[..., ::own.stride], own.attention
        qkv = [point(norm(conv(y, m, c), n), w).mT.contiguous()
               for c, n, w in zip(part.conv, part.norm, part.linear)]
        y = our_head.attend(*qkv, m_out[:, 0] > 0, part.num_heads, part.window).mT.contiguous()
        skip = x if own.stride == 1 else F.max_pool1d(x, 3, 2, 1)
        x = skip * m_out + own.scale_attention[:, None] * (point(y, part.out) * m_out)
        y = point(F.gelu(point(norm(x, own.norm_mlp), own.mlp[0])), own.mlp[2]) * m_out
        return x + own.scale_mlp[:, None] * y

    def convs(x, m, layers, norms):
        for layer, n in zip(layers, norms):
            x = F.relu(norm(conv(x, m, layer), n))
        return x

    pyramid, ms = head.pyramid, [mask[:, None].float()]
    xs = [convs(f.mT.contiguous(), ms[0], pyramid.embed, pyramid.embed_norm)]
    for own in (*pyramid.stem, *pyramid.branch):
        xs = (xs if own.stride == 2 else []) + [block(xs[-1], ms[-1], own)]
        ms = ms + [ms[-1][..., ::2]] if own.stride == 2 else ms
    logits, offsets = [], []
    for x, m, n, scale in zip(xs, ms, pyramid.level_norm, head.scales):
        x, cls, loc = norm(x, n), head.cls_head, head.loc_head
        logits.append(conv(convs(x, m, cls.hidden, cls.norm), m, cls.out).mT)
        offsets.append(F.relu(scale * conv(convs(x, m, loc.hidden, loc.norm), m, loc.out)).mT)
    points = our_head.pyramid_points(f.size(1), head.strides, head.ranges)
    return our_head.Output(logits, offsets, points, [m[:, 0] > 0 for m in ms])


THUMOS = (213, 20, 3300, np.linspace(0.3, 0.7, 5))           # videos, classes, segments, thresholds
ACTIVITYNET = (4728, 200, 7600, np.linspace(0.5, 0.95, 10))
# Name; problem, ours and perhaps a reference; times of others; limit, 0 = 1.05 x the reference.
DETECTOR = [
    ("mAP, THUMOS14 size, 2,000 detections a video", partial(metric_problem, *THUMOS, 2000),
     "145 s (official), 88 s (OpenTAD)", 10.0),
    ("mAP, THUMOS14 size, 200 detections a video", partial(metric_problem, *THUMOS, 200),
     "15 s (official), 9 s (OpenTAD)", 1.0),
    ("mAP, ActivityNet size, 100 detections a video", partial(metric_problem, *ACTIVITYNET, 100),
     "127 s (official), 65 s (OpenTAD)", 10.0),
    ("soft-NMS of 40,000 detections", nms_problem, "72 ms (ActionFormer, C++)", 0.15),
    ("training step, 2,304 steps, batch 2", partial(head_problem, True), "3.0 s (ActionFormer)", 0),
    ("inference, 2,304 steps, batch 1", partial(head_problem, False), "0.47 s (ActionFormer)", 0)]

if __name__ == "__main__":
    sys.exit(main())
