"""efficiency.py - time, memory and FLOPs of the paper's models with random weights (Table 6).

This file has no command of its own: `python -m experiments.benchmark` calls it.
"""
import os
import platform
import re
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import vlm
from data import Window, collate
from model import ActionVLM, Config
from support.annotations import Video, read_json
from support.language_models import make_tiny_lm
from train import TrainingState, get_args, vision_language_epoch, vision_only_epoch

VISION = {"S": (384, 12, 6, 1536), "B": (768, 12, 12, 3072)}    # width, layers, heads, MLP width
QWEN = {"1.5B": (1536, 28, 12, 8960), "3B": (2048, 36, 16, 11008)}
MODELS = [(f"ActionVLM-{vision}-{qwen}", vision, qwen) for vision in VISION for qwen in QWEN]
KEPT = "text-first, kept prompt"
LAYOUTS = {"frames-first": "frames-first", "text-first": "text-first", KEPT: "text-first"}
CAP = 24                        # GiB of GPU memory that the models may use
NOTE = ("\nRandom weights; one window of 768 frames of 160 x 160. Reduced models have 2 layers, an "
        "eighth of the width,\nand frames of 32 x 32; docs/benchmarks.md explains the columns.")


class Cost(NamedTuple):
    seconds: float
    memory: str                 # the peak: of the GPU, else of this process
    tflops: float


def full_size(args, models) -> int:
    """Print a row for each model: memory and time of training and inference."""
    print(machine(args.device))
    peak = 0
    if args.size == "full":
        peak = matmul_peak(args)
        print(f"{peak:.3g} TFLOPs a second in bfloat16 matrix products, the peak of MFU")
    if args.device != "cpu":
        total = torch.cuda.get_device_properties(args.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP * 2**30 / total))
    print_head("model", "parameters", "peak memory", "step, vision only", "step, vision-language",
               "ratio", "inference, vision only / full / kept prompt", "tokens/s in training",
               "FLOPs of a step, MFU")
    for name, vision, qwen in models:
        try:
            cells = full_size_row(vision, qwen, args, peak)
        except torch.OutOfMemoryError:
            cells = [f"does not fit in {CAP} GiB"] + ["-"] * 7
        print_row([name if args.size == "full" else f"{name}, reduced", *cells])
        if args.device != "cpu":
            torch.cuda.empty_cache()
    print(NOTE)
    return 0


def full_size_row(vision, qwen, args, peak) -> list:
    """The cells after the model's name. peak: TFLOPs a second, or 0."""
    state, batch = random_model(vision, qwen, args)
    alone, infer_alone = measure(state, batch, "vision only", args)
    full, infer_full = measure(state, batch, "frames-first", args)
    infer_kept = measure(state, batch, KEPT, args)[1]
    infer = [duration(cost.seconds) for cost in (infer_alone, infer_full, infer_kept)]
    parameters = sum(p.numel() for p in state.model.parameters())
    tokens = state.model.language.sequence_length(batch.mask.size(1))
    mfu = f"{full.tflops / full.seconds / peak:.0%}" if peak else "-"
    return [f"{parameters / 1e6:,.0f} M", full.memory, duration(alone.seconds),
            duration(full.seconds), f"{full.seconds / alone.seconds:.2f}", " / ".join(infer),
            f"{tokens / full.seconds:,.0f}", f"{full.tflops:.3g} TFLOPs, {mfu}"]


def table6(args) -> int:
    """Print the time and memory that language costs ActionVLM-S-3B, in each way to run it."""
    print(machine(args.device))
    print_head("ActionVLM-S-3B", "step, vision-only epoch", "step, vision-language epoch", "ratio",
               "inference", "ratio", "memory, step / inference", "TFLOPs, step / inference")
    state, batch = random_model("S", "", args, steps=768)
    alone, base = measure(state, batch, "vision only", args)
    kernels = {"vision only": attention_kernels(inference(state.model, batch, "vision only"))}
    print_row(["vision only", duration(alone.seconds), "-", "1.00", *costs(alone, base, base)])
    state, batch = random_model("S", "3B", args, steps=768)
    without = measure(state, batch, "vision only", args)[0].seconds
    for way in LAYOUTS:
        step, infer = measure(state, batch, way, args)
        cells = ["-"] * 3
        if step is not None:
            ratio = (without + step.seconds) / 2 / alone.seconds    # of the mean of both epochs
            cells = [duration(without), duration(step.seconds), f"{ratio:.2f}"]
        print_row([f"full, {way}", *cells, *costs(step, infer, base)])
        kernels[f"full, {way}"] = attention_kernels(inference(state.model, batch, way))
    print("\nAttention ran as")
    for way, names in kernels.items():
        print(f"* {way}: {names}")
    print(f"{NOTE}\nThe paper's ratios of S-3B, on an L40, are 1.09 in training and 1.22 at "
          "inference.")
    return 0


def costs(step, infer, base) -> list:
    """The last cells of a row of Table 6. base: inference without language."""
    memory, tflops = "-", "-"
    if step is not None:
        memory, tflops = step.memory, f"{step.tflops:.3g}"
    return [duration(infer.seconds), f"{infer.seconds / base.seconds:.2f}",
            f"{memory} / {infer.memory}", f"{tflops} / {infer.tflops:.3g}"]


def random_model(vision, qwen, args, steps=32):
    """(TrainingState of a model with random weights, batch of one window of random frames).

    vision, qwen: names in VISION and QWEN; qwen "" = without language. steps: length of the window
    of a reduced model; 768 gives the prompt its share of the tokens.
    """
    torch.manual_seed(0)
    reduced = args.size == "reduced"
    steps, side = (steps, 32) if reduced else (768, 160)
    descriptions = read_json(Path(__file__).parents[1] / "descriptions/thumos14.json")
    encoder = sizes(*VISION[vision], reduced)
    encoder.update(image_size=side, pretrained_image_size=224)
    language = sizes(*QWEN[qwen or "3B"], reduced)
    config = Config(descriptions, lm=qwen, dim=language["hidden_size"], vision=encoder,
                    dtype="float32" if reduced else "bfloat16", lora_rank=8 if reduced else 128,
                    width=64 if reduced else 512, head_window=0)

    def random_language_model(folder, dtype):
        config = Qwen2Config(vocab_size=2000 if reduced else 151936, num_key_value_heads=2,
                             tie_word_embeddings=True, **language)
        with tempfile.TemporaryDirectory() as tiny:
            make_tiny_lm(f"{tiny}/lm", [vlm.instruction(descriptions)])
            tokenizer = AutoTokenizer.from_pretrained(f"{tiny}/lm")
        return AutoModelForCausalLM.from_config(config, dtype=dtype), tokenizer

    with patch.object(vlm, "load_language_model", random_language_model):
        model = ActionVLM(config).to(args.device)
    flags = ["--dataset=thumos14", "--videos=-", "--annotations=-", f"--device={args.device}"]
    state = TrainingState(model, get_args(flags), batches_per_epoch=1000)
    model.checkpointing()
    if args.compile:
        model.compile_layers()
    frames = torch.randint(0, 256, (steps, 3, side, side), dtype=torch.uint8)
    segments, labels = torch.tensor([[0.1, 0.3], [0.5, 0.6]]) * steps, torch.tensor([0, 5])
    window = Window(Video("random", steps / 7.5, 30.0), 0, steps, frames, segments, labels)
    return state, collate([window], model.multiple, config.classes).to(args.device)


def sizes(width, layers, heads, mlp, reduced) -> dict:
    """The sizes of a transformer by transformers' names."""
    if reduced:
        width, layers, mlp = width // 8, 2, mlp // 8
    return dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                intermediate_size=mlp)


def measure(state, batch, way, args):
    """Cost of a training step and of inference, in a way to run the model.

    way: "vision only", or one of LAYOUTS. The step is None with a kept prompt.
    """
    model, step = state.model, None
    if way != KEPT:
        tflops = count_tflops(training, model, batch, way, lambda total, *_, **__: total.backward())
        step = cost(training(model, batch, way, state.backpropagate), tflops, args)
    tflops = count_tflops(inference, model, batch, way)
    return step, cost(inference(model, batch, way), tflops, args)


def training(model, batch, way, backpropagate):
    """A function that runs one step of a vision-only or a vision-language epoch."""
    def step():
        if way == "vision only":
            vision_only_epoch(model, [batch], backpropagate)
        else:
            model.language.layout = LAYOUTS[way]
            vision_language_epoch(model, [batch], backpropagate)
    return step


def inference(model, batch, way):
    """A function that runs the model on one window."""
    model.eval()
    if way != "vision only":
        model.language.layout = LAYOUTS[way]
    if way == KEPT:
        model.language.keep_prompt()
    return torch.no_grad()(lambda: model(batch, way != "vision only"))


def cost(call, tflops, args) -> Cost:
    """Time and memory of a call. The memory of a process is known on Linux alone."""
    on_gpu, peak = args.device != "cpu", Path("/proc/self/clear_refs")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    elif peak.exists():
        peak.write_text("5")    # the peak starts anew
    seconds, = median_times([call], args.repeats, args.device)
    memory = "-"
    if on_gpu:
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    elif peak.exists():
        kilobytes = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
        memory = f"{int(kilobytes) / 2**20:.2f} GiB"
    return Cost(seconds, memory, tflops)


def median_times(calls, repeats, device="cpu") -> list:
    """Median seconds of each call. They take turns, so that a busy machine favours none."""
    rounds = []
    for _ in range(1 + repeats):
        ticks = [time.perf_counter()]
        for call in calls:
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            ticks.append(time.perf_counter())
        rounds.append(np.diff(ticks))
    return np.median(rounds[1:], 0).tolist()    # the first round warms up


def count_tflops(prepare, model, batch, *rest) -> float:
    """TFLOPs of the matrix products in prepare(model, batch, *rest)(), without checkpointing.

    It runs on copies whose tensors have sizes and no content. Attention counts as if no mask hid
    anything.
    """
    aten = torch.ops.aten
    cpu = {    # torch's counter knows the attention of GPUs alone
        aten._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward:
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}
    without_content = FakeTensorMode()
    with FakeCopyMode(without_content):
        model, batch = deepcopy((model, batch))
    for module in model.modules():
        module.gradient_checkpointing = False
    with without_content:
        call = prepare(model, batch, *rest)
        with FlopCounterMode(display=False, custom_mapping=cpu) as counter:
            call()
    return counter.get_total_flops() / 1e12


def matmul_peak(args) -> float:
    """TFLOPs a second of bfloat16 matrix products of n x n."""
    n = 4096 if args.device == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=args.device, dtype=torch.bfloat16)
    return 2 * n ** 3 / 1e12 / median_times([lambda: a @ b], args.repeats, args.device)[0]


def attention_kernels(call) -> str:
    """The operations that a call ran for attention, and on a GPU its kernels."""
    with torch.profiler.profile() as profile:
        call()
    names = set()
    for event in profile.key_averages():
        name = re.split(r"[<(]", event.key.removeprefix("void "))[0]
        if re.search(r"dot_product_\w+_attention|attention_math|fmha|flash_fwd", name):
            names.add(name)
    return ", ".join(sorted(names))


def machine(device="cpu") -> str:
    """GPU or CPU, threads and versions: no time means anything without."""
    name, info = platform.machine(), Path("/proc/cpuinfo")
    if device != "cpu":
        name = torch.cuda.get_device_name()
    elif info.exists():
        models = re.findall(r"model name\s*: (.*)", info.read_text())
        name = f"{''.join(models[:1]) or name}, {os.cpu_count()} cores"
    return f"{name}; torch {torch.__version__}, {torch.get_num_threads()} threads"


def duration(seconds) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def print_head(*names) -> None:
    print()
    print_row(names)
    print_row([":--"] + ["--:"] * (len(names) - 1))


def print_row(cells) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)
