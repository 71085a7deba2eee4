"""experiments/benchmark.py - how long the parts take, beside other implementations.

    python -m experiments.benchmark detector              # metric, soft-NMS, detection head
    python -m experiments.benchmark full-size             # the paper's models, random weights
    python -m experiments.benchmark efficiency            # Table 6: the cost of language

A figure is the median of five runs after one that warms up; of one run with `--size full` on a
CPU, which takes 20 GB and an hour. Exit code 1: a row missed its limit.
"""
import argparse
import re
import sys
import tempfile
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop, sdpa_flop
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import head as our_head
import train
import vlm
from data import Window, collate
from evaluate import mean_average_precision, nms_per_class
from model import ActionVLM, Config
from support import language_models
from support.annotations import Video, read_json
from support.flags import device

VISION = {"S": (384, 12, 1536, 6), "B": (768, 12, 3072, 12)}    # width, layers, MLP width, heads
QWEN = {"1.5B": (1536, 28, 8960, 12), "3B": (2048, 36, 11008, 16)}
MODELS = [(f"ActionVLM-{vision}-{qwen}", vision, qwen) for vision in VISION for qwen in QWEN]
ALONE, FULL, KEPT = "vision only", "full, frames-first", "full, text-first, kept prompt"
LAYOUTS = {ALONE: None, FULL: "frames-first", "full, text-first": "text-first", KEPT: "text-first"}

def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag, gpu = parser.add_argument, torch.cuda.is_available()
    flag("what", choices=TABLES, help="which table")
    flag("--only", default="", metavar="NAME", help="only the rows with NAME in them, in any case")
    flag("--device", type=device, default="cuda" if gpu else "cpu", help="of the models")
    flag("--size", choices=["full", "reduced"], help="of the models (default: full on a GPU)")
    flag("--compile", action="store_true", help="compile the models' layers")
    args = parser.parse_args(argv)
    table, rows, head = TABLES[args.what]
    args.device = "cpu" if args.what == "detector" else args.device
    args.size = args.size or ("reduced" if args.device == "cpu" else "full")
    args.repeats = 1 if args.device == "cpu" and args.size == "full" else 5
    args.rows = [row for row in rows if args.only.lower() in row[0].lower()]
    if not args.rows:
        parser.error(f"--only {args.only}: expected a part of {[row[0] for row in rows]}")
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    if args.device != "cpu":
        names = [torch.cuda.get_device_name()]
    print(*names[:1], f"{torch.get_num_threads()} threads", f"torch {torch.__version__}", sep=", ")
    print(f"\n| {head} |\n|:--{'|--:' * head.count(' | ')}|")
    missed = 0
    for cells in table(args):
        print(f"| {' | '.join(cells)} |", flush=True)
        missed |= "(missed)" in cells[-1]
    print("\ndocs/benchmarks.md explains the columns.")
    return missed

def compare(args):
    """Rows of our times beside those of others."""
    for name, problem, reference, limit in args.rows:
        ours, *here = median_times(problem(), args)
        if here:
            reference += f"; here {duration(here[0])}, ratio {ours / here[0]:.2f}"
            limit = 1.05 * here[0]
        verdict = " (missed)" if ours > limit else ""
        yield name, duration(ours), reference, duration(limit) + verdict
    print('\n"Here" is ActionFormer\'s arithmetic on this machine, in turn with ours.')

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

def full_size(args):
    """Rows of memory and time of models, in training and inference."""
    peak = 0                                                      # TFLOPs a second
    if args.size == "full":
        a = torch.randn(8192, 8192, device=args.device, dtype=torch.bfloat16)
        peak = 2 * 8192**3 / 1e12 / median_times([lambda: a @ a], args)[0]
    if args.device != "cpu":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 24 * 2**30 / total))
    for name, vision, qwen in args.rows:
        try:
            cells = full_size_cells(*random_model(vision, qwen, args), peak, args)
        except torch.OutOfMemoryError:
            cells = ["does not fit"] + ["-"] * 7
        yield [f"{name}, {args.size}", *cells]
        torch.cuda.empty_cache()
    if peak:
        print(f"\nMFU is of {peak:.3g} TFLOPs a second, the speed of bfloat16 matrix products.")

def full_size_cells(state, batch, peak, args):
    """The cells of a row after the name."""
    alone, step = (measure(state, batch, way, True, args) for way in (ALONE, FULL))
    infer = [measure(state, batch, way, False, args) for way in (ALONE, FULL, KEPT)]
    parameters = sum(p.numel() for p in state.model.parameters())
    tokens = state.model.language.sequence_length(batch.mask.size(1))
    mfu = f"{step.tflops / step.seconds / peak:.0%}" if peak else "-"
    return [f"{parameters / 1e6:,.0f} M", step.memory, duration(alone.seconds),
            duration(step.seconds), f"{step.seconds / alone.seconds:.2f}",
            " / ".join(duration(cost.seconds) for cost in infer),
            f"{tokens / step.seconds:,.0f}", f"{step.tflops:.3g} TFLOPs, {mfu}"]

def table6(args):
    """Rows of the time and memory of ActionVLM-S-3B, in each way to run it."""
    kernels, steps, infers = [], [], []
    for way in LAYOUTS:
        if way in (ALONE, FULL):
            state, batch = random_model("S", "" if way == ALONE else "3B", args)
        cells, memory, tflops = ["-"] * 3, "-", "-"
        if way != KEPT:
            step = measure(state, batch, way, True, args)
            steps.append(step.seconds)
            ratio = (steps[0] + steps[-1]) / 2 / steps[0]             # of both kinds of epoch
            language = "-" if way == ALONE else duration(step.seconds)
            cells = [duration(steps[0]), language, f"{ratio:.2f}"]
            memory, tflops = step.memory, f"{step.tflops:.3g}"
        infer = measure(state, batch, way, False, args)
        infers.append(infer.seconds)
        yield [way, *cells, duration(infers[-1]), f"{infers[-1] / infers[0]:.2f}",
               f"{memory} / {infer.memory}", f"{tflops} / {infer.tflops:.3g}"]
        kernels.append(f"* {way}: {attention_kernels(partial(state.model, batch, way != ALONE))}")
    print("\nAttention ran as", *kernels, sep="\n")
    print("\nThe paper's ratios, on an L40, are 1.09 in training and 1.22 at inference.")

def random_model(vision, qwen, args):
    """TrainingState of a model with random weights, and a batch of one window of random frames.
    vision, qwen: keys of VISION and QWEN; qwen "" = without language."""
    torch.manual_seed(0)
    shrink, depth, side, rank, dtype = 8, 2, 32, 8, "float32"
    if args.size == "full":
        shrink, depth, side, rank, dtype = 1, 99, 160, 128, "bfloat16"

    def sizes(width, layers, mlp, heads):
        return dict(hidden_size=width // shrink, num_hidden_layers=min(layers, depth),
                    intermediate_size=mlp // shrink, num_attention_heads=heads)

    descriptions = read_json(Path(__file__).parents[1] / "descriptions/thumos14.json")
    encoder = dict(sizes(*VISION[vision]), image_size=side, pretrained_image_size=224)
    language = Qwen2Config(vocab_size=151936 // shrink, num_key_value_heads=2,
                           tie_word_embeddings=True, **sizes(*QWEN[qwen or "3B"]))
    config = Config(descriptions, lm=qwen, dim=language.hidden_size, vision=encoder, dtype=dtype,
                    lora_rank=rank, width=512 // shrink, head_window=0)
    with tempfile.TemporaryDirectory() as folder:
        language_models.make_tiny_lm(folder, [vlm.instruction(descriptions)])
        tokenizer = AutoTokenizer.from_pretrained(folder)
    make = partial(AutoModelForCausalLM.from_config, language, dtype=getattr(torch, dtype))
    with patch.object(language_models, "load_language_model", lambda *_: (make(), tokenizer)):
        model = ActionVLM(config).to(args.device)
    flags = ["--dataset=thumos14", "--videos=-", "--annotations=-", f"--device={args.device}"]
    state = train.TrainingState(model, train.get_args(flags), batches_per_epoch=1000)
    model.checkpointing()
    if args.compile:
        model.compile_layers()
    L = 768 // shrink
    frames = torch.randint(0, 256, (L, 3, side, side), dtype=torch.uint8)
    segments, labels = torch.tensor([[0.1, 0.3], [0.5, 0.6]]) * L, torch.tensor([0, 5])
    window = Window(Video("random", L / 7.5, 30.0), 0, L, frames, segments, labels)
    return state, collate([window], model.multiple, config.classes).to(args.device)

def measure(state, batch, way, training, args):
    """Seconds, peak memory (GPU, or on Linux process) and TFLOPs of a training step or inference.
    FLOPs are of all matrix products, as if no mask hid anything, without checkpointing."""
    @torch.set_grad_enabled(training)
    def run(model, batch, backpropagate=lambda total, *_, **__: total.backward()):
        if not training:
            return model(batch, use_language=way != ALONE)
        epoch = train.vision_only_epoch if way == ALONE else train.vision_language_epoch
        epoch(model, [batch], backpropagate)

    model, memory, process = state.model.train(training), "-", Path("/proc/self")
    if way != ALONE:
        model.language.layout = LAYOUTS[way]
    if way == KEPT:
        model.language.keep_prompt()
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif process.exists():
        (process / "clear_refs").write_text("5")                     # the peak starts anew
    seconds, = median_times([partial(run, model, batch, state.backpropagate)], args)
    if args.device != "cpu":
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    elif process.exists():
        peak = re.search(r"VmHWM:\s+(\d+)", (process / "status").read_text())
        memory = f"{int(peak[1]) / 2**20:.2f} GiB"
    aten, fake = torch.ops.aten, FakeTensorMode()
    flop_registry[aten._scaled_dot_product_flash_attention_for_cpu] = sdpa_flop
    flop_registry[aten._scaled_dot_product_flash_attention_for_cpu_backward] = sdpa_backward_flop
    with FakeCopyMode(fake):                                         # tensors without content
        model, batch = deepcopy((model, batch))
    model.apply(lambda module: setattr(module, "gradient_checkpointing", False))
    with fake, FlopCounterMode(display=False) as counter:
        run(model, batch)
    return SimpleNamespace(seconds=seconds, memory=memory, tflops=counter.get_total_flops() / 1e12)

def median_times(calls, args):
    """Median seconds of each call. They take turns, so that a busy machine favours none."""
    rounds = []
    for _ in range(1 + args.repeats):
        ticks = [time.perf_counter()]
        for call in calls:
            call()
            if args.device != "cpu":
                torch.cuda.synchronize()
            ticks.append(time.perf_counter())
        rounds.append(np.diff(ticks))
    return np.median(rounds[1:], 0).tolist()                         # the first round warms up

def attention_kernels(call):
    """The operations that a call ran for attention, and on a GPU its kernels."""
    with torch.profiler.profile() as profile, torch.no_grad():
        call()
    names = {re.split(r"[<(]", e.key.removeprefix("void "))[0] for e in profile.key_averages()}
    attention = re.compile(r"dot_product_\w+_attention|attention_math|fmha|flash_fwd")
    return ", ".join(sorted(filter(attention.search, names)))

def duration(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"

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
TABLES = {
    "detector": (compare, DETECTOR, "what | ours (median) | reference | limit"),
    "full-size": (full_size, MODELS, "model | parameters | peak memory | step, vision only | step, "
                  "vision-language | ratio | inference, vision only / full / kept prompt | "
                  "tokens/s in training | FLOPs of a step, MFU"),
    "efficiency": (table6, MODELS[1:2], "ActionVLM-S-3B | step, vision-only epoch | step, "
                   "vision-language epoch | ratio | inference | ratio | memory, step / inference | "
                   "TFLOPs, step / inference")}

if __name__ == "__main__":
    sys.exit(main())
