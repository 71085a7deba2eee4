"""experiments/benchmark.py - what language costs: time, memory and operations (Table 6).
    python -m experiments.benchmark efficiency            # Table 6: ActionVLM-S-3B
    python -m experiments.benchmark full-size             # the paper's four models
The models have random weights. A time is the median of five runs after one that warms up; of one
run with `--size full` on a CPU, which takes 20 GB and an hour."""
import re
import sys
import timeit
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from copy import deepcopy
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop, sdpa_flop
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import train
from data import Window, collate
from model import ActionVLM, Config
from support import language_models
from support.annotations import Video, read_json
from support.flags import DEVICES, integer
from support.summary import peak_memory

VISION = {"S": (384, 12, 1536, 6), "B": (768, 12, 3072, 12)}    # width, layers, MLP width, heads
QWEN = {"1.5B": (1536, 28, 8960, 12), "3B": (2048, 36, 11008, 16)}
# Divisor of widths and lengths, most layers, side of the frames, LoRA rank, dtype.
SIZES = {"full": (1, 99, 160, 128, "bfloat16"), "reduced": (8, 2, 32, 8, "float32")}
MODELS = {"efficiency": ["S-3B"], "full-size": ["S-1.5B", "S-3B", "B-1.5B", "B-3B"]}
HEADING = """
| model | K | training step | ratio | memory | TFLOPs | inference | ratio | memory | TFLOPs |
|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|"""
ALONE, FULL, KEPT = "vision only", "full, frames-first", "full, text-first, kept prompt"
LAYOUTS = {ALONE: None, FULL: "frames-first", "full, text-first": "text-first", KEPT: "text-first"}

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("what", choices=MODELS, help="which models")
    flag("--only", choices=MODELS["full-size"], help="this model")
    flag("--device", choices=DEVICES, default=DEVICES[0], help="of the models")
    flag("--size", choices=SIZES, help="of the models (default: full on a GPU)")
    flag("--compile", action="store_true", help="compile the models' layers")
    flag("--inference", action="store_true", help="no training steps")
    flag("--language-stride", type=integer(1), nargs="+", default=[1], help="K, a row for each (1)")
    args = parser.parse_args(argv)
    args.size = args.size or ("reduced" if args.device == "cpu" else "full")
    args.repeats = 1 if args.device == "cpu" and args.size == "full" else 5
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    if args.device != "cpu":
        gpu = torch.cuda.get_device_properties(args.device)
        names = [gpu.name]
        share = min(1.0, 24 * 2**30 / gpu.total_memory)              # of a GPU of 24 GB
        torch.cuda.set_per_process_memory_fraction(share)
    print(*names[:1], f"{torch.get_num_threads()} threads", f"torch {torch.__version__}", sep=", ")
    print(HEADING)
    for name in [args.only] if args.only else MODELS[args.what]:
        for cells in cost_of_language(name, args):
            print(f"| {' | '.join(cells)} |", flush=True)

def cost_of_language(name, args):
    """Rows of the cost of a model, of a training step and of inference, in each way to run it."""
    first = {}
    for way in LAYOUTS:
        if way in (ALONE, FULL):
            state, batch = random_model(*name.split("-"), way, args)
        for K in [1] if way == ALONE else args.language_stride:
            if way != ALONE:
                state.model.language.stride = K
            cells = [f"ActionVLM-{name}, {way}", str(K)]
            for training in (True, False):
                if training and (way == KEPT or args.inference):
                    cells += ["-"] * 4
                    continue
                seconds, memory, tflops = measure(state, batch, way, training, args)
                alone = first.setdefault(training, seconds)
                mean = (alone + seconds) / 2 if training else seconds    # of both kinds of epoch
                cells += [duration(seconds), f"{mean / alone:.2f}", memory, f"{tflops:.3g}"]
            yield cells

def random_model(vision, qwen, way, args):
    """TrainingState of a model with random weights, and a batch of one window of random frames.
    vision, qwen, way: keys of VISION, QWEN and LAYOUTS."""
    torch.manual_seed(0)
    shrink, depth, side, rank, dtype = SIZES[args.size]
    def sizes(width, layers, mlp, heads):
        return dict(hidden_size=width // shrink, num_hidden_layers=min(layers, depth),
                    intermediate_size=mlp // shrink, num_attention_heads=heads)
    descriptions = read_json(Path(__file__).parents[1] / "descriptions/thumos14.json")
    encoder = dict(sizes(*VISION[vision]), image_size=side, pretrained_image_size=224)
    language = Qwen2Config(vocab_size=151936 // shrink, num_key_value_heads=2,
                           tie_word_embeddings=True, **sizes(*QWEN[qwen]))
    config = Config(descriptions, lm="" if way == ALONE else qwen, dim=language.hidden_size,
                    vision=encoder, dtype=dtype, lora_rank=rank, width=512 // shrink, head_window=0)
    def load(*_):
        """In place of support.language_models.load_language_model: random weights."""
        tokenizer = AutoTokenizer.from_pretrained(language_models.TINY_LM)
        return AutoModelForCausalLM.from_config(language, dtype=getattr(torch, dtype)), tokenizer
    with patch.object(language_models, "load_language_model", load):
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
    """Seconds, peak memory (of GPU or process) and TFLOPs of a training step or inference.
    FLOPs are of all matrix products, as if no mask hid anything, without checkpointing."""
    @torch.set_grad_enabled(training)
    def run(model, batch, backpropagate=lambda total, *_, **__: total.backward()):
        if not training:
            return model(batch, use_language=way != ALONE)
        epoch = train.vision_only_epoch if way == ALONE else train.vision_language_epoch
        epoch(model, [batch], backpropagate)
    model = state.model.train(training)
    if way != ALONE:
        model.language.layout = LAYOUTS[way]
    if way == KEPT:
        model.language.keep_prompt()
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")                # the peak starts anew
    seconds = median_time(lambda: run(state.model, batch, state.backpropagate), args)
    memory = f"{peak_memory(args.device):.2f} GiB"
    aten, fake = torch.ops.aten, FakeTensorMode()
    flop_registry[aten._scaled_dot_product_flash_attention_for_cpu] = sdpa_flop
    flop_registry[aten._scaled_dot_product_flash_attention_for_cpu_backward] = sdpa_backward_flop
    with FakeCopyMode(fake):                                         # tensors without content
        model, batch = deepcopy((model, batch))
    model.apply(lambda module: setattr(module, "gradient_checkpointing", False))
    with fake, FlopCounterMode(display=False) as counter:
        run(model, batch)
    return seconds, memory, counter.get_total_flops() / 1e12

def median_time(call, args):
    """Median seconds of a call, after one that warms up."""
    def finish():
        call()
        if args.device != "cpu":
            torch.cuda.synchronize()
    return median(timeit.repeat(finish, repeat=1 + args.repeats, number=1)[1:])

def duration(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"

if __name__ == "__main__":
    sys.exit(main())
