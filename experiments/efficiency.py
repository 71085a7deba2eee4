"""efficiency.py - time, memory and FLOPs of the paper's models with random weights (Table 6).

This file has no command of its own: `python -m experiments.benchmark` calls it.
"""
import os
import platform
import re
import tempfile
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
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
CAP = 24    # GiB of GPU memory that the models may use
NOTES = """
Random weights; one window of 768 frames of 160 x 160; 20 classes; LoRA of rank 128; activation
checkpointing; AdamW and weight average in a step. Reduced models have 2 layers and an eighth of the
width, LoRA of rank 8, frames of 32 x 32. Full: frames first; a cached prompt comes first. Ratios
are to vision only. Memory is the peak, on a CPU of the whole process. FLOPs and MFU are without
recomputation."""


class Cost(NamedTuple):
    seconds: float
    memory: str
    flops: int


def full_size(args, models: list) -> int:
    """Print a row for each model: memory and time of training and inference."""
    print(machine(args.device))
    peak = 0
    if args.size == "full":
        peak = matmul_peak(args)
        print(f"{peak / 1e12:.3g} TFLOPs a second in bfloat16 matrix products, the peak of MFU")
    if args.device != "cpu":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP * 2**30 / total))
    print_head("model", "parameters", "peak memory", "step, vision only", "step, vision-language",
               "ratio", "inference, vision only / full / cached prompt", "ratio",
               "tokens/s in training", "FLOPs of a step, MFU")
    for name, vision, qwen in models:
        try:
            cells = full_size_row(vision, qwen, args, peak)
        except torch.cuda.OutOfMemoryError:
            cells = [f"does not fit in {CAP} GiB"] + ["-"] * 8
        print_row([name if peak else f"{name}, reduced", *cells])
        if args.device != "cpu":
            torch.cuda.empty_cache()
    print(NOTES)
    return 0


def full_size_row(vision: str, qwen: str, args, peak: float) -> list[str]:
    """The cells after the model's name. peak: FLOPs a second, or 0."""
    state, batch = random_model(vision, qwen, args)
    alone = training(state, batch, "vision only", args)
    full = training(state, batch, "frames-first", args)
    infer = []
    for way in ("vision only", "frames-first", "cached prompt"):
        infer.append(inference(state.model, batch, way, args).seconds)
    parameters = sum(p.numel() for p in state.model.parameters())
    tokens = state.model.language.sequence_length(batch.mask.size(1))
    mfu = f"{full.flops / full.seconds / peak:.0%}" if peak else "-"
    return [
        f"{parameters / 1e6:,.0f} M", full.memory,
        duration(alone.seconds), duration(full.seconds), f"{full.seconds / alone.seconds:.2f}",
        " / ".join(map(duration, infer)), f"{infer[1] / infer[0]:.2f}",
        f"{tokens / full.seconds:,.0f}", f"{full.flops / 1e12:.3g} TFLOPs, {mfu}",
    ]


def table6(args) -> int:
    """Print what language costs ActionVLM-S-3B in time and memory, a row for each way to run it."""
    print(machine(args.device))
    print_head("ActionVLM-S-3B", "step, vision-only epoch", "step, vision-language epoch", "ratio",
               "inference", "ratio", "memory, step / inference", "TFLOPs, step / inference")
    state, batch = random_model("S", "", args, steps=768)
    base = inference(state.model, batch, "vision only", args)
    alone = training(state, batch, "vision only", args)
    print_costs("vision only", [duration(alone.seconds), "-", "1.00"], alone, base, base)
    state, batch = random_model("S", "3B", args, steps=768)
    ways = ("cached prompt", "text-first", "frames-first")
    infer = {way: inference(state.model, batch, way, args) for way in ways}
    without = training(state, batch, "vision only", args).seconds
    for way in ("frames-first", "text-first"):
        step = training(state, batch, way, args)
        ratio = (without + step.seconds) / 2 / alone.seconds
        cells = [duration(without), duration(step.seconds), f"{ratio:.2f}"]
        print_costs(f"full, {way}", cells, step, infer[way], base)
    print_costs("full, cached prompt", ["-"] * 3, None, infer["cached prompt"], base)
    language = state.model.language
    print(f"{NOTES}\nThe window has {language.sequence_length(batch.mask.size(1))} tokens, "
          f"{len(language.prompt_ids)} of them the prompt. The ratio of training is of the mean of "
          "both kinds of epoch.\nThe paper's ratios of S-3B, on an L40, are 1.09 in training and "
          "1.22 at inference.")
    return 0


def print_costs(name: str, cells: list, step: Cost | None, infer: Cost, base: Cost) -> None:
    """A row of Table 6. cells: times of training. base: inference without language."""
    memory, flops = "-", "-"
    if step is not None:
        memory, flops = step.memory, f"{step.flops / 1e12:.3g}"
    print_row([name, *cells, duration(infer.seconds), f"{infer.seconds / base.seconds:.2f}",
               f"{memory} / {infer.memory}", f"{flops} / {infer.flops / 1e12:.3g}"])


# ------------------------------------------------------------------------------------ one model
def random_model(vision: str, qwen: str, args, steps=32):
    """(TrainingState of a model with random weights, batch of one window of random frames).

    vision, qwen: names in VISION and QWEN; qwen "" = without language. steps: length of the window
    of a reduced model; 768 gives the prompt its share of the tokens.
    """
    torch.manual_seed(0)
    reduced = args.size == "reduced"
    steps, side = (steps, 32) if reduced else (768, 160)
    descriptions = read_json(Path(__file__).parents[1] / "descriptions/thumos14.json")
    encoder = dict(sizes(*VISION[vision], reduced), image_size=side, pretrained_image_size=224)
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
    flags = "--dataset thumos14 --videos - --annotations - --device"
    state = TrainingState(model, get_args([*flags.split(), args.device]), batches_per_epoch=1000)
    model.checkpointing()
    if args.compile:
        model.compile_layers()
    frames = torch.randint(0, 256, (steps, 3, side, side), dtype=torch.uint8)
    segments, labels = torch.tensor([[0.1, 0.3], [0.5, 0.6]]) * steps, torch.tensor([0, 5])
    window = Window(Video("random", steps / 7.5, 30.0), 0, steps, frames, segments, labels)
    return state, collate([window], model.multiple, config.classes).to(args.device)


def sizes(width: int, layers: int, heads: int, mlp: int, reduced: bool) -> dict:
    """The sizes of a transformer by transformers' names."""
    if reduced:
        width, layers, mlp = width // 8, 2, mlp // 8
    return dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                intermediate_size=mlp)


def training(state: TrainingState, batch, way: str, args) -> Cost:
    """A step of a vision-only epoch ("vision only"), or with language in the layout `way`."""
    def backward(total, batch, **terms):
        total.backward()

    flops = count_flops(train_step, state.model, batch, way, backward)
    return cost(partial(train_step, state.model, batch, way, state.backpropagate), flops, args)


def train_step(model: ActionVLM, batch, way: str, backpropagate) -> None:
    if way == "vision only":
        vision_only_epoch(model, [batch], backpropagate)
    else:
        model.language.layout = way
        vision_language_epoch(model, [batch], backpropagate, lambda_tg=0.1, lambda_adv=0.1)


@torch.no_grad()
def inference(model: ActionVLM, batch, way: str, args) -> Cost:
    """One window: "vision only", "frames-first", "text-first", or text-first, "cached prompt"."""
    model.eval()
    use_language = way != "vision only"
    if use_language:
        model.language.layout = "text-first" if way == "cached prompt" else way
    if way == "cached prompt":
        model.language.keep_prompt()
    flops = count_flops(ActionVLM.forward, model, batch, use_language)
    return cost(partial(model, batch, use_language), flops, args)


# ------------------------------------------------------------------------------------ measuring
def cost(call, flops: int, args) -> Cost:
    """Time of a call and the memory in use at most: of the GPU, or on Linux of this process."""
    gpu, process = args.device != "cpu", Path("/proc/self")
    memory = "-"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    elif process.exists():
        (process / "clear_refs").write_text("5")    # the peak starts anew
    seconds, = median_times([call], args.repeats, args.device)
    if gpu:
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    elif process.exists():
        kilobytes = re.search(r"VmHWM:\s+(\d+)", (process / "status").read_text())[1]
        memory = f"{int(kilobytes) / 2**20:.2f} GiB"
    return Cost(seconds, memory, flops)


def median_times(calls: list, repeats=5, device="cpu") -> list[float]:
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


def count_flops(function, model: ActionVLM, batch, *rest) -> int:
    """FLOPs of the matrix products in function(model, batch, *rest), without recomputation.

    The function gets copies whose tensors have sizes and no content. Attention counts as if no
    mask hid anything.
    """
    without_content = FakeTensorMode()
    with FakeCopyMode(without_content):
        model, batch = deepcopy((model, batch))
    for module in model.modules():
        module.gradient_checkpointing = False
    counter = FlopCounterMode(display=False)
    with without_content, sdpa_kernel(SDPBackend.MATH), counter:
        function(model, batch, *rest)
    return counter.get_total_flops()


def matmul_peak(args) -> float:
    """FLOPs a second of bfloat16 matrix products of n x n."""
    n = 4096 if args.device == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=args.device, dtype=torch.bfloat16)
    return 2 * n ** 3 / median_times([lambda: a @ b], args.repeats, args.device)[0]


def machine(device="cpu") -> str:
    """GPU or CPU, threads and versions: no time means anything without."""
    name, info = platform.machine(), Path("/proc/cpuinfo")
    if device != "cpu":
        name = torch.cuda.get_device_name()
    elif info.exists():
        models = re.findall(r"model name\s*: (.*)", info.read_text())
        name = f"{''.join(models[:1]) or name}, {os.cpu_count()} cores"
    return f"{name}; torch {torch.__version__}, {torch.get_num_threads()} threads"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def print_head(*names) -> None:
    print()
    print_row(names)
    print_row([":--"] + ["--:"] * (len(names) - 1))


def print_row(cells) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)
