"""benchmark.py - how long the parts take, beside the figures of other implementations.

    python benchmark.py detector                  # metric, soft-NMS, detection head: one Markdown table
    python benchmark.py detector --only mAP       # the rows that have "mAP" in their name
    python benchmark.py data                      # reading one window, from a video and from features
    python benchmark.py full-size                 # training and inference of the paper's models, random weights
    python benchmark.py efficiency                # Table 6: what language costs, in both layouts, and a cached prompt
    python benchmark.py efficiency --size full    # on a CPU, too: 20 GB of memory, and an hour
    python benchmark.py full-size --compile       # with compiled layers of encoder and language model

Inputs are random but seeded, and built here. A figure is the median of at least five runs after one that does not
count; at full size on a CPU of one such run. The exit code is 1 if a row missed its limit.
"""
import argparse
import ctypes
import platform
import re
import sys
import tempfile
import time
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import vlm
from annotations import Video, read_json
from data import Batch, TALDataset, Window
from demo import write_video
from evaluate import device, mean_average_precision
from head import (DetectionHead, HeadOutput, decode, detection_loss, nms_per_class, pyramid_points,
                  window_attention)
from model import ActionVLM, Config
from train import Run, vision_language_epoch, vision_only_epoch
from train import get_args as get_train_args


class Row(NamedTuple):
    """One line of a table."""
    what: str
    problem: Callable       # builds the inputs; returns the function whose time counts, and with a reference
                            # measured here, its function, too
    reference: str          # what others take, measured elsewhere
    limit: float = 0        # seconds; infinite where there is none, 0 = what the reference takes here
                            # and 5 % more, by which equal computations differ from call to call


def main(argv=None) -> int:
    args = get_args(argv)
    if args.what == "efficiency":
        return efficiency(args)
    rows, notes = BENCHMARKS.get(args.what, (MODELS, ""))
    chosen = [row for row in rows if args.only.lower() in row[0].lower()]
    if not chosen:
        print(f"benchmark.py: error: --only {args.only}: expected a part of a row's name, found none of "
              + "; ".join(row[0] for row in rows), file=sys.stderr)
        return 2
    if args.what == "full-size":
        return full_size(args, chosen)
    print(f"{machine()}\n\n| what | ours (median) | reference | limit |\n|:--|--:|--:|--:|")
    missed = 0
    for row in chosen:
        runs = row.problem()
        seconds, *beside = median_times(runs if isinstance(runs, tuple) else (runs,))
        limit = row.limit or 1.05 * beside[0]
        verdict = "" if seconds <= limit else " (missed)"
        missed += bool(verdict)
        reference = f"{row.reference}; here {duration(beside[0])}, ratio {seconds / beside[0]:.2f}" if beside \
            else row.reference
        print(f"| {row.what} | {duration(seconds)} | {reference} | "
              f"{duration(limit) if np.isfinite(limit) else '-'}{verdict} |", flush=True)
    print(f"\n{notes}")
    return int(missed > 0)


def get_args(argv=None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    args.size = args.size or ("full" if args.device.startswith("cuda") else "reduced")
    return args


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*sorted(BENCHMARKS), "efficiency", "full-size"], help="which table")
    parser.add_argument("--only", default="", metavar="NAME", help="only the rows with NAME in them, in any case")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu",
                        help="of full-size and efficiency")
    parser.add_argument("--size", choices=["full", "reduced"], help="of the models there (default: full on a GPU)")
    parser.add_argument("--compile", action="store_true", help="their layers as compiled code, as train.py --compile")
    return parser


def median_times(runs: tuple[Callable, ...], device: str = "cpu", seconds: float = 20, repeats: int = 0) -> list[float]:
    """Median seconds of each function, called in turn, so that a busy machine favours none: once to warm up, then
    `repeats` times (0: REPEATS), or while `seconds` last up to 5 times as often."""
    def clock() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()
    for run in runs:
        run()
    times, started, repeats = [], clock(), repeats or REPEATS
    while len(times) < repeats or len(times) < 5 * repeats and clock() - started < seconds:
        ticks = [clock()]
        for run in runs:
            run()
            ticks.append(clock())
        times.append(np.diff(ticks))
    return np.median(times, 0).tolist()


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def peak_memory(call: Callable, device: str) -> str:
    """GiB in use at most during a call: of the GPU, or of this whole process (Linux); "-" where that is not told."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        call()
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    try:
        ctypes.CDLL(None).malloc_trim(0)                                 # what was freed before goes back to the system
        Path("/proc/self/clear_refs").write_text("5")                    # the peak is what is in use now
        told = True
    except (OSError, AttributeError):
        told = False
    call()
    if not told:
        return "-"
    kilobytes = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    return f"{int(kilobytes) / 2**20:.2f} GiB"


def machine() -> str:
    """CPU model, cores, versions and threads: what a time means nothing without."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    cpu = f"{models[0]}, {len(models)} cores" if models else f"{platform.processor() or platform.machine()}"
    return (f"{cpu}; torch {torch.__version__}, {torch.get_num_threads()} threads; numpy {np.__version__}; "
            f"Python {platform.python_version()}")


# ------------------------------------------------------------------------------------------------ detector
def metric_problem(videos: int, classes: int, segments: int, per_video: int, thresholds) -> Callable:
    """mAP of detections of which half lie near a true segment of their video, and half anywhere, in any class."""
    rng = np.random.default_rng(0)
    ground_truth, predictions = {}, {}
    names = [f"class {c}" for c in range(classes)]
    for v, n in enumerate(rng.multinomial(segments, np.full(videos, 1 / videos))):
        start = rng.uniform(0, 190, n)
        truth = np.stack([start, start + rng.uniform(1, 10, n)], 1)
        label = rng.choice(rng.integers(0, classes, 2), n)                       # a video shows one or two classes
        start = rng.uniform(0, 190, per_video)
        found = np.stack([start, start + rng.uniform(1, 10, per_video)], 1)
        guess = rng.integers(0, classes, per_video)
        if n:
            which = rng.integers(0, n, per_video // 2)
            found[:len(which)], guess[:len(which)] = truth[which] + rng.normal(0, 1, (len(which), 2)), label[which]
        ground_truth[f"video {v}"] = {"segments": truth, "labels": [names[c] for c in label]}
        predictions[f"video {v}"] = {"segments": np.sort(found, 1), "labels": [names[c] for c in guess],
                                     "scores": rng.random(per_video)}
    return partial(mean_average_precision, ground_truth, predictions, thresholds)


def nms_problem(uniform: bool, classes: int = 20, per_class: int = 2000, max_per_video: int = 200) -> Callable:
    """Soft-NMS of one video, gaussian, over a window of 2,304 steps.

    Realistic: segments around 15 actions a class, scores log-uniform from .001 to 1 (most detections are poor), the
    best 200 asked for. Hard (`uniform`): segments anywhere, scores uniform in [0, 1], every survivor asked for.
    """
    rng = np.random.default_rng(0)
    n = classes * per_class
    centre, length = rng.uniform(0, 2304, n), np.exp(rng.uniform(np.log(4), np.log(256), n))
    scores = rng.random(n)
    if not uniform:
        action = rng.integers(0, 15, n)
        centre = rng.uniform(0, 2304, 15)[action] + rng.normal(0, 4, n)
        length = np.exp(rng.uniform(np.log(4), np.log(256), 15))[action] * rng.lognormal(0, 0.3, n)
        scores = 0.001 ** scores
    segments = np.stack([centre - length / 2, centre + length / 2], 1)
    as_tensor = partial(torch.tensor, dtype=torch.float32)
    return partial(nms_per_class, as_tensor(segments), as_tensor(scores), torch.arange(n) % classes,
                   max_per_video=0 if uniform else max_per_video)


def head_inputs(batch: int, length: int = 2304, dim: int = 2048, classes: int = 20):
    """ActionFormer's THUMOS size: head of 29 M parameters, features (B, L, D), mask, segments, labels."""
    torch.manual_seed(0)
    head = DetectionHead(dim, classes, width=512, levels=6, window=19)
    starts = [torch.rand(15) * (length - 100) for _ in range(batch)]
    segments = [torch.stack([s, s + 4 + 60 * torch.rand(15)], 1) for s in starts]
    labels = [torch.randint(classes, (15,)) for _ in range(batch)]
    return head, torch.randn(batch, length, dim), torch.ones(batch, length, dtype=torch.bool), segments, labels


def training_problem() -> tuple[Callable, Callable]:
    """One step on two videos: forward, Eq. 6, backward, clipped gradient, AdamW."""
    def step_of(forward, optimizer_options):
        head, features, mask, segments, labels = head_inputs(batch=2)
        optimizer = torch.optim.AdamW(head.parameters(), 1e-4, **optimizer_options)

        def step():
            optimizer.zero_grad(set_to_none=True)
            output = forward(head, features, mask)
            detection_loss(output, segments, labels, head.loss_normalizer).loss_dh.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
        return step
    return step_of(our_forward, {"fused": True}), step_of(plain_forward, {})


def inference_problem() -> tuple[Callable, Callable]:
    """One video: forward, decoding, soft-NMS. At its start the head scores every class about .01, so that decoding
    finds its most, 2,000 detections at each of the finer levels."""
    head, features, mask, _, _ = head_inputs(batch=1)
    head.eval()

    @torch.no_grad()
    def infer(forward):
        output = forward(head, features, mask)
        first = [[level[0] for level in part] for part in (output.cls_logits, output.offsets, output.mask)]
        return nms_per_class(*decode(first[0], first[1], output.points, first[2]))
    return partial(infer, our_forward), partial(infer, plain_forward)


def our_forward(head: DetectionHead, f: Tensor, mask: Tensor) -> HeadOutput:
    return head(f, f, mask)


def plain_forward(head: DetectionHead, f: Tensor, mask: Tensor) -> HeadOutput:
    """The same head in the plain arithmetic of ActionFormer's code: tensors (B, W, L), LayerNorm over channels from
    elementary operations, 1x1 and depthwise `conv1d`, a mask after each. Without drop-path; attention is ours."""
    def norm(x, layer):
        x = x - x.mean(1, keepdim=True)
        x = x / torch.sqrt((x ** 2).mean(1, keepdim=True) + layer.eps)
        return x * layer.weight[:, None] + layer.bias[:, None]

    def conv(x, m, layer, stride=1):
        return F.conv1d(x, layer.weight, layer.bias, stride, 1, groups=layer.groups) * m[..., ::stride]

    def point(x, layer):
        return F.conv1d(x, layer.weight[..., None], layer.bias)

    def block(x, m, own):
        y, m_out, attention = norm(x, own.norm_attention), m[..., ::own.stride], own.attention
        q, k, v = (point(norm(conv(y, m, c, own.stride), n), w).mT.contiguous()
                   for c, n, w in zip(attention.conv, attention.norm, attention.linear))
        y = window_attention(q, k, v, m_out[:, 0] > 0, attention.num_heads, attention.window).mT.contiguous()
        skip = x if own.stride == 1 else F.max_pool1d(x, 3, 2, 1)
        x = skip * m_out + own.scale_attention[:, None] * (point(y, attention.out) * m_out)
        y = point(F.gelu(point(norm(x, own.norm_mlp), own.mlp[0])), own.mlp[2]) * m_out
        return x + own.scale_mlp[:, None] * y

    def conv_head(x, m, own):
        for layer, n in zip(own.hidden, own.norm):
            x = F.relu(norm(conv(x, m, layer), n))
        return conv(x, m, own.out).mT

    pyramid, m, x = head.pyramid, mask[:, None].float(), f.mT.contiguous()
    for layer, n in zip(pyramid.embed, pyramid.embed_norm):
        x = F.relu(norm(conv(x, m, layer), n))
    for own in pyramid.stem:
        x = block(x, m, own)
    xs, ms = [x], [m]
    for own in pyramid.branch:
        xs, ms = xs + [block(xs[-1], ms[-1], own)], ms + [ms[-1][..., ::2]]
    xs = [norm(x, n) for x, n in zip(xs, pyramid.level_norm)]
    return HeadOutput([conv_head(x, m, head.cls_head) for x, m in zip(xs, ms)],
                      [F.relu(scale * conv_head(x, m, head.loc_head)) for scale, x, m in zip(head.scales, xs, ms)],
                      pyramid_points(f.shape[1], head.strides(), head.ranges), [m[:, 0] > 0 for m in ms])


# ------------------------------------------------------------------------------------------------ data
def video_problem(training: bool, seconds: int = 110, window: int = 768) -> Callable:
    """One window of frames at stride 4, 160x160, from a video of 320x180 at 30 fps that pans over a picture."""
    rng, T = np.random.default_rng(0), 30 * seconds
    scene = F.interpolate(torch.from_numpy(rng.uniform(0, 255, (1, 3, 24, 40)).astype(np.float32)), (380, 640),
                          mode="bilinear")[0].permute(1, 2, 0).numpy()
    grain = rng.normal(0, 3, (180, 320, 1)).astype(np.float32)
    x, y = (160 + 150 * np.sin(np.arange(T) / 90)).astype(int), (100 + 95 * np.cos(np.arange(T) / 70)).astype(int)
    frames = np.empty((T, 180, 320, 3), np.uint8)
    for frame, a, b in zip(frames, x, y):
        frame[:] = np.clip(scene[b:b + 180, a:a + 320] + grain, 0, 255)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "video.mp4"
    write_video(path, frames, 30)
    dataset = TALDataset([Video("video", seconds, 30.0, path=path)], [], window, stride=4, training=training,
                         image_size=160, resize=182)
    return partial(read_window, dataset, folder)


def feature_problem(steps: int = 2304, width: int = 2048) -> Callable:
    """One window of a feature file that is somewhat longer."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "video.npy"
    np.save(path, np.random.default_rng(0).standard_normal((steps + 100, width), np.float32))
    dataset = TALDataset([Video("video", 320.0, 30.0, path=path)], [], steps, stride=4, num_frames=16, training=True)
    return partial(read_window, dataset, folder)


def read_window(dataset: TALDataset, folder):
    """The first window, on one thread, as in a worker process. `folder` lives as long as the function that holds it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    window = dataset[0]
    torch.set_num_threads(threads)
    return window


# ------------------------------------------------------------------------------------------------ full size
VISION = {"S": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536),
          "B": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)}
QWEN = {"1.5B": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, intermediate_size=8960),
        "3B": dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, intermediate_size=11008)}
MODELS = [(f"ActionVLM-{vision}-{qwen}", vision, qwen) for vision in VISION for qwen in QWEN]
REPEATS = 5
CAP = 24                                        # GiB of the GPU that the models may use
REDUCED = "2 layers and an eighth of the width, LoRA of rank 8"


def full_size(args: argparse.Namespace, models: list) -> int:
    """Prints a row for each model: memory and time of a training step and of inference, with and without language."""
    reduced, on_gpu = args.size == "reduced", args.device.startswith("cuda")
    print(where(args))
    peak = 0.0 if reduced else matmul_peak(args.device, 8192 if on_gpu else 4096)
    if peak:
        print(f"{peak / 1e12:.3g} TFLOPs a second measured in bfloat16 matrix products")
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP * 2**30 / total))
        print(f"at most {CAP} GiB of its memory")
    print("\n| model | parameters | peak memory | step, vision only | step, vision-language | ratio | inference, "
          "vision only / full / cached prompt | tokens/s in training | FLOPs of a step, MFU |\n|:--|" + "--:|" * 8)
    for name, vision, qwen in models:
        try:
            row = full_size_row(vision, qwen, args, peak)
        except torch.cuda.OutOfMemoryError:
            row = f"does not fit in {CAP} GiB |" + " - |" * 7
        print(f"| {name}{', reduced' * reduced} | {row}", flush=True)
        if on_gpu:
            torch.cuda.empty_cache()
    window = f"32 frames of 32 x 32, {REDUCED}" if reduced else "768 frames of 160 x 160, LoRA of rank 128"
    print(f"\nRandom weights; one window of {window}; the 20 classes of THUMOS14; activation checkpointing; AdamW and "
          "weight average in the step. The cached prompt comes first, else the frames do; beside it full over vision "
          "only. MFU: FLOPs without recomputation over the peak.")
    return 0


def where(args: argparse.Namespace) -> str:
    """What the models run on."""
    name = f"{torch.cuda.get_device_name()}; torch {torch.__version__}" if args.device.startswith("cuda") else machine()
    return name + "; compiled layers" * args.compile


def full_size_row(vision: str, qwen: str, args: argparse.Namespace, peak: float) -> str:
    """The cells of a Markdown row after the name."""
    run, batch = random_run(vision, qwen, args)
    steps, times = tuple(partial(train_step, run, batch, use_language) for use_language in (False, True)), []
    memory = peak_memory(lambda: times.extend(model_times(steps, args)), args.device)
    (without, full), flops = times, model_flops(run, batch, training=True)
    infer, prompt = partial(inference, run, batch), []
    infers = partial(infer, False), infer, partial(infer, layout="text-first", cached=prompt)
    alone, whole, cached = model_times(infers, args)                     # the first call with a prompt keeps it
    tokens = run.model.language.sequence_length(batch.mask.size(1))
    parameters = sum(p.numel() for p in run.model.parameters())
    mfu = f"{flops / 1e12:.3g} TFLOPs, " + (f"{flops / full / peak:.0%}" if peak else "-")
    return (f"{parameters / 1e6:,.0f} M | {memory} | {duration(without)} | {duration(full)} | {full / without:.2f} | "
            f"{duration(alone)} / {duration(whole)} / {duration(cached)}, {whole / alone:.2f} | {tokens / full:,.0f} | "
            f"{mfu} |")


def model_times(runs: tuple[Callable, ...], args: argparse.Namespace) -> list[float]:
    """`median_times`, but at full size on a CPU, where a step takes minutes, of one time each after the warm-up."""
    slow = args.size == "full" and not args.device.startswith("cuda")
    return median_times(runs, args.device, 0, repeats=1 if slow else REPEATS)


class Way(NamedTuple):
    """A row of Table 6: one way to run the model, with what can be said of it alone."""
    name: str
    step: Callable          # of the epoch with language, where there is any
    infer: Callable
    memory: str
    flops: str


def efficiency(args: argparse.Namespace) -> int:
    """Table 6: prints what language costs ActionVLM-S-3B in time and memory, a row for each way to run it."""
    reduced, device = args.size == "reduced", args.device
    print(where(args))
    model = partial(random_run, "S", "3B", args, L=768)                   # gives the prompt its share of the tokens
    ways = [way_to_run("vision only", *model(lambda_lang=0.0), args)]
    run, batch = model()                                                 # not before: it would add to the memory above
    ways += [way_to_run(f"full, {name}", run, batch, args, *how) for name, *how in (
        ("frames-first",), ("text-first", "text-first"), ("text-first, cached prompt", "text-first", []))]
    *steps, without = model_times((*(way.step for way in ways[:3]), partial(train_step, run, batch, False)), args)
    infer = model_times(tuple(way.infer for way in ways), args)
    ratios = [(without + step) / 2 / steps[0] for step in steps[1:]]
    training = [f"{duration(steps[0])} | - | 1.00", *(f"{duration(without)} | {duration(step)} | {ratio:.2f}"
                                                      for step, ratio in zip(steps[1:], ratios)), "- | - | -"]
    print("\n| ActionVLM-S-3B | step, vision-only epoch | step, vision-language epoch | ratio | inference | ratio | "
          "memory, step / inference | TFLOPs, step / inference |\n|:--|" + "--:|" * 7)
    for way, cells, seconds in zip(ways, training, infer):
        print(f"| {way.name} | {cells} | {duration(seconds)} | {seconds / infer[0]:.2f} | {way.memory} | {way.flops} |")
    print("\nAttention ran as")
    for way in ways:
        print(f"* {way.name}: {attention_kernels(way.infer, device)}")
    (_, L, _, side, _), whose = batch.inputs.size(), "" if device.startswith("cuda") else " of this process"
    print(f"\nRandom weights; one window of {L} frames of {side} x {side}, {run.model.language.sequence_length(L)} "
          f"tokens, {len(run.model.language.prompt_ids)} of them the prompt; "
          f"{REDUCED if reduced else 'LoRA of rank 128'}; activation checkpointing. Times are of one window, medians, "
          "all rows in turn; ratios are to vision only, that of training of the mean of both kinds of epoch. Memory is "
          f"the peak{whose}. FLOPs without recomputation. The paper's ratios of S-3B, on an L40, are 1.09 in training "
          "and 1.22 at inference.")
    return 0


def way_to_run(name: str, run: Run, batch: Batch, args, layout="frames-first", cached=None) -> Way:
    """The row of a run; cached: [] to keep the prompt from window to window."""
    language = run.model.language is not None
    step = partial(train_step, run, batch, language, layout)
    infer = partial(inference, run, batch, language, layout, cached)
    if cached is not None:
        infer()                                                          # from now on the prompt is there
    flops = [model_flops(run, batch, language, layout, cached)]
    memory = [peak_memory(infer, args.device)]
    if cached is None:                                                   # in training there is no other way
        step()                                                           # from now on the optimizer's moments are there
        flops.insert(0, model_flops(run, batch, language, layout, training=True))
        memory.insert(0, peak_memory(step, args.device))
    return Way(name, step, infer, " / ".join(memory), " / ".join(f"{f / 1e12:.3g}" for f in flops))


def attention_kernels(call: Callable, device: str) -> str:
    """What a call ran for scaled_dot_product_attention: the operations, and on a GPU its kernels."""
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU, activity.CUDA] if device.startswith("cuda") else [activity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        call()
    names = {re.split(r"[<(]", event.key.removeprefix("void "))[0] for event in profile.key_averages()}
    attention = re.compile("dot_product_\\w+_attention|attention_math|fmha|flash_fwd")
    return ", ".join(sorted(filter(attention.search, names)))


@torch.no_grad()
def inference(run: Run, batch: Batch, use_language: bool = True, layout="frames-first", cached: list | None = None):
    """One window in eval mode. cached: a list that keeps the prompt from call to call, as `cached_prompt` does."""
    if use_language:
        run.model.language.layout, run.model.language.cached = layout, cached
    run.model.eval()(batch, use_language)


def random_run(vision: str, qwen: str, args: argparse.Namespace, L: int = 32, lambda_lang=None):
    """(Run of a model with random weights and activation checkpointing, batch of one window of random frames).
    L: steps of the window of a reduced model."""
    torch.manual_seed(0)
    device, reduced = args.device, args.size == "reduced"
    L, side = (L, 32) if reduced else (768, 160)
    flags = get_train_args(["--dataset", "thumos14", "--videos", "-", "--annotations", "-", "--device", device,
                            "--window", str(L), *(["--lora-rank", "8"] if reduced else ["--dtype", "bfloat16"])])
    encoder = dict(sizes(VISION[vision], reduced), image_size=side, pretrained_image_size=224)
    config = Config(descriptions(), "random", sizes(QWEN[qwen], reduced)["hidden_size"], dtype=flags.dtype,
                    vision=encoder, lora_rank=flags.lora_rank, lora_alpha=flags.lora_alpha, head_window=0,
                    lambda_lang=lambda_lang, width=64 if reduced else 512)
    with random_language_model(qwen, reduced):
        run = Run(ActionVLM(config).to(device), flags, steps_per_epoch=1000)
    run.model.checkpointing()
    if args.compile:
        run.model.compile_layers()
    frames = torch.randint(0, 256, (1, L, 3, side, side), dtype=torch.uint8)
    segments = torch.tensor([[0.1, 0.3], [0.5, 0.6]]) * L
    mask, labels = torch.ones(1, L, dtype=torch.bool), torch.tensor([0, 5])
    window = Window(Video("random", L / 7.5, 30.0), 0, L, None, segments, labels)
    return run, Batch(frames, mask, [segments], [labels], [window], padded=False).to(device)


@contextmanager
def random_language_model(qwen: str, reduced: bool):
    """Within: a language model is not read from a folder, but made with Qwen2.5's sizes and random weights."""
    def make(folder, dtype):
        config = Qwen2Config(vocab_size=2000 if reduced else 151936, num_key_value_heads=2, tie_word_embeddings=True,
                             **sizes(QWEN[qwen], reduced))
        with tempfile.TemporaryDirectory() as folder:
            vlm.make_tiny_lm(Path(folder) / "lm", [vlm.instruction(descriptions())])
            tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "lm")
        return AutoModelForCausalLM.from_config(config, dtype=dtype), tokenizer
    original, vlm.load_language_model = vlm.load_language_model, make
    try:
        yield
    finally:
        vlm.load_language_model = original


def sizes(full: dict, reduced: bool) -> dict:
    """The sizes of a transformer; reduced: an eighth of its widths, 2 layers."""
    return {k: v // 8 if reduced and k.endswith("_size") else 2 if reduced and k.endswith("layers") else v
            for k, v in full.items()}


def descriptions() -> dict:
    """{label: sentence} of THUMOS14."""
    return read_json(Path(__file__).parent / "descriptions/thumos14.json")


class Batches(list):
    """Batches in place of a DataLoader."""
    def __init__(self, batches: list):
        super().__init__(batches)
        self.dataset = self.batch_sampler = SimpleNamespace()
        self.generator = torch.Generator()


def train_step(run: Run, batch: Batch, use_language: bool, layout: str = "frames-first") -> None:
    """One step of Algorithm 1's epoch of this kind, as train.py does it."""
    if use_language:
        run.model.language.layout = layout
    (vision_language_epoch if use_language else vision_only_epoch)(run, Batches([batch]))


def model_flops(run: Run, batch: Batch, use_language: bool = True, layout="frames-first", cached=None,
                training: bool = False) -> int:
    """FLOPs of the matrix products in a training step (without what activation checkpointing computes again) or an
    inference. Counted in a copy of the model whose tensors have sizes and no content, with all of its activations."""
    without_content = FakeTensorMode()
    with FakeCopyMode(without_content):
        model, batch = deepcopy(run.model).train(training), batch.map(without_content.from_tensor)
    with without_content:
        for module in model.modules():
            module.gradient_checkpointing = False
        if use_language:
            model.language.layout, model.language.cached = layout, None if cached is None else []

        def call():
            with torch.set_grad_enabled(training):
                output = model(batch, use_language)
            if training:                                                # any loss has the matrix products of this one
                outputs = [*output.cls_logits, *output.offsets, output.advantage, output.text_loss]
                sum(x.sum() for x in outputs if x is not None).backward()
        if cached is not None:
            call()                                                      # from now on the prompt is there
        return count_flops(call)


def count_flops(call: Callable) -> int:
    """FLOPs of the matrix products in a call; attention counts as if nothing was hidden. torch's counter knows the
    kernels of GPUs alone."""
    aten = torch.ops.aten
    cpu = {aten._scaled_dot_product_flash_attention_for_cpu: lambda *qkv, **_: sdpa_flop_count(*qkv[:3]),
           aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *g, **_: sdpa_backward_flop_count(*g[:4])}
    with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
        call()
    return counter.get_total_flops()


def matmul_peak(device: str, n: int = 8192) -> float:
    """FLOPs a second of bfloat16 matrix products of n x n."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n ** 3 / median_times((lambda: a @ b,), device)[0]


THUMOS = dict(videos=213, classes=20, segments=3300, thresholds=np.linspace(0.3, 0.7, 5))
ACTIVITYNET = dict(videos=4728, classes=200, segments=7600, thresholds=np.linspace(0.5, 0.95, 10))
DETECTOR = [
    Row("mAP, THUMOS14 size, 2,000 detections a video", partial(metric_problem, per_video=2000, **THUMOS),
        "145 s (official), 88 s (OpenTAD)", 3.0),
    Row("mAP, THUMOS14 size, 200 detections a video", partial(metric_problem, per_video=200, **THUMOS),
        "15 s (official), 9 s (OpenTAD)", 0.6),
    Row("mAP, ActivityNet-1.3 size, 100 detections a video", partial(metric_problem, per_video=100, **ACTIVITYNET),
        "127 s (official), 65 s (OpenTAD)", 3.0),
    Row("soft-NMS of 40,000 detections", partial(nms_problem, uniform=False), "72 ms (ActionFormer, C++)", 0.15),
    Row("soft-NMS of 40,000 detections, hard case", partial(nms_problem, uniform=True), "-", float("inf")),
    Row("training step, 2,304 steps, batch 2", training_problem, "3.0 s (ActionFormer)"),
    Row("inference, 2,304 steps, batch 1", inference_problem, "0.47 s (ActionFormer)"),
]
DETECTOR_NOTES = """The reference figures were measured by others, on another machine with 2 CPU cores: the official
ActivityNet toolkit in one process, OpenTAD's metric in two, ActionFormer with its C++ soft-NMS. Ours is one process.
"Here" is ActionFormer's arithmetic on this machine, the same weights and sizes, in turn with ours;
its time and 5 % is the limit.
Soft-NMS: 2,000 detections for each of 20 classes, around 15 actions a class, scores log-uniform from .001 to 1, the
best 200 kept; hard case: segments anywhere, scores uniform from 0 to 1, all survivors kept. Training and inference:
features of 2,048 channels, vision only, width 512, attention window 19, 20 classes, 29 M parameters."""
DATA = [
    Row("training window of a video, 768 frames", partial(video_problem, training=True), "-", float("inf")),
    Row("test window of a video, 768 frames", partial(video_problem, training=False), "-", float("inf")),
    Row("window of features, 2,304 x 2,048", feature_problem, "-", float("inf")),
]
DATA_NOTES = """Each figure is one window in one process: a worker (--workers) gives 1 / figure windows per second.
The video is H.264, 320x180, 30 fps; every fourth frame is taken, all have to be decoded. Training: short side 182,
random resized crop to 160x160, flip, colour jitter. Test: short side 160, centre crop."""
BENCHMARKS = {"detector": (DETECTOR, DETECTOR_NOTES), "data": (DATA, DATA_NOTES)}

if __name__ == "__main__":
    sys.exit(main())
