"""experiments/benchmark.py - what language costs: time, memory and operations (Table 6).

    python -m experiments.benchmark efficiency            # Table 6: ActionVLM-S-3B
    python -m experiments.benchmark full-size             # the paper's four models
The models have random weights. A time is the median of five runs after one that warms up; of one
run with `--size full` on a CPU, which takes 20 GB and an hour."""
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
from model import Config
from support import language_models
from support.annotations import Video, read_json
from support.flags import DEVICES, ROOT, integer
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
    name = torch.cpu.get_capabilities().get("cpu_name", "a CPU")
    if args.device != "cpu":
        gpu = torch.cuda.get_device_properties(args.device)
        name = gpu.name                                              # with at most 24 GB of it:
        torch.cuda.set_per_process_memory_fraction(min(1.0, 24 * 2**30 / gpu.total_memory))
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
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
            cells = [f"ActionVLM-{name}, {way}", str(K)]
            for training in (True, False):
                if training and (way == KEPT or args.inference):
                    cells += ["-"] * 4
                    continue
                seconds, memory, tflops = measure(state, batch, way, training, args, K)
                alone = first.setdefault(training, seconds)
                mean = (alone + seconds) / 2 if training else seconds    # of both kinds of epoch
                cells += [f"{seconds:.3f} s", f"{mean / alone:.2f}", memory, f"{tflops:.3g}"]
            yield cells

def random_model(vision, qwen, way, args):
    """TrainingState of a model (keys of VISION, QWEN, LAYOUTS), a batch of one window; random."""
    torch.manual_seed(0)
    shrink, depth, side, rank, dtype = SIZES[args.size]
    def sizes(width, layers, mlp, heads):
        return dict(hidden_size=width // shrink, num_hidden_layers=min(layers, depth),
                    intermediate_size=mlp // shrink, num_attention_heads=heads)
    descriptions = read_json(ROOT / "descriptions/thumos14.json")
    encoder = dict(sizes(*VISION[vision]), image_size=side, pretrained_image_size=224)
    language = Qwen2Config(vocab_size=151936 // shrink, num_key_value_heads=2,
                           tie_word_embeddings=True, **sizes(*QWEN[qwen]))
    config = Config(descriptions, lm="" if way == ALONE else qwen, dim=language.hidden_size,
                    vision=encoder, dtype=dtype, lora_rank=rank, width=512 // shrink, head_window=0)
    flags = ["--dataset=thumos14", "--videos=-", "--annotations=-", f"--device={args.device}",
             "--grad-checkpoint=on", *["--compile"] * args.compile]
    train_args = train.get_args(flags)
    tokenizer, kind = AutoTokenizer.from_pretrained(language_models.TINY_LM), getattr(torch, dtype)
    with patch.object(language_models, "load_language_model", lambda *_: (      # random weights
            AutoModelForCausalLM.from_config(language, dtype=kind), tokenizer)):
        model = train.build_model(train_args, config)
    state = train.TrainingState(model, train_args, batches_per_epoch=1000)
    L = 768 // shrink
    frames = torch.randint(0, 256, (L, 3, side, side), dtype=torch.uint8)
    segments, labels = torch.tensor([[0.1, 0.3], [0.5, 0.6]]) * L, torch.tensor([0, 5])
    window = Window(Video("random", L / 7.5, 30.0), 0, L, frames, segments, labels)
    return state, collate([window], model.multiple, config.classes).to(args.device)

def measure(state, batch, way, training, args, K=1):
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
        model.language.layout, model.language.stride = LAYOUTS[way], K
    if way == KEPT:
        model.language.keep_prompt()
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")                # the peak starts anew
    def finish():
        run(model, batch, state.backpropagate)
        if args.device != "cpu":
            torch.cuda.synchronize()
    seconds = median(timeit.repeat(finish, repeat=1 + args.repeats, number=1)[1:])
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

if __name__ == "__main__":
    raise SystemExit(main())
