"""support/summary.py - what a run prints: data, parameters, memory, a line for each epoch."""
import time

import torch

from support.checkpoint import append_row, trained_parameters


def describe(model, groups: list, training, test) -> None:
    """Print what was found: videos, segments, classes; trained and frozen parameters.

    groups: train.parameter_groups. training, test: data.TALDataset.
    """
    for name, data in (("training", training), ("test", test)):
        segments = sum(len(v.labels) for v in data.videos)
        hours = sum(v.duration for v in data.videos) / 3600
        print(f"{name}: {len(data.videos)} videos, {segments} segments, {hours:.2f} h, "
              f"{len(data)} windows")
    counts, rates = {"head": 0, "vision": 0, "lm": 0}, {}
    for group in groups:
        counts[group["name"]] += sum(p.numel() for p in group["params"])
        rates[group["name"]] = group["base_lr"]
    parts = [f"{part} {counts[part]:,} (lr {rates[part]:g})" for part in counts if counts[part]]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    print(f"{len(model.config.classes)} classes; trained parameters: {', '.join(parts)}; "
          f"frozen: {frozen:,}")


def describe_size(model, args) -> None:
    """Print the length of the sequence of tokens, and what a training step takes of memory."""
    language, L = model.language, args.resize_to or args.window
    if language is not None:
        print(f"tokens of a window: {4 * L} for {L} frames + {len(language.prompt_ids)} for the "
              f"prompt = {language.sequence_length(L)}, then the answer")
    print(f"memory, about: {estimate_memory(model, args)}")


def estimate_memory(model, args) -> str:
    """A sentence on the memory of a training step.

    Frozen weights; trained ones with gradient, AdamW's two moments and average; activations, about
    10 D + 3 F numbers a token and layer (F: width of the MLP). With activation checkpointing, D
    numbers a token and layer, and one layer in full.
    """
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() * p.element_size() for _, p in trained_parameters(model))
    trained *= 5 if args.ema else 4

    def activations(config, tokens, size):
        D, layers = config.hidden_size, config.num_hidden_layers
        full = 10 * D + 3 * config.intermediate_size
        per_token = D * layers + full if args.grad_checkpoint == "on" else full * layers
        return args.batch_size * tokens * size * per_token

    passed, GiB = 0, 2 ** 30
    if model.vision is not None:
        side = model.config.vision["image_size"] // model.config.vision["patch_size"]
        patches = args.window // model.vision.tubelet * side ** 2
        passed += activations(model.vision.backbone.config, patches, 4)
    if model.language is not None:
        lm = model.language.lm
        tokens = model.language.sequence_length(args.window)
        passed += activations(lm.config, tokens, lm.dtype.itemsize)
    return (f"frozen weights {frozen / GiB:.2f} GiB, trained weights with optimizer "
            f"{trained / GiB:.2f} GiB, activations of encoder and language model "
            f"{passed / GiB:.2f} GiB; the head's come on top")


def log_epoch(path, state, kind: str, terms: dict) -> None:
    """One line on the screen, one in log.jsonl.

    state: train.TrainingState after the epoch. kind: of the epoch. terms: {name: mean of it}.
    """
    args, now = state.args, time.time()
    began, first = state.began
    left = (now - began) / (state.epoch - first) * (args.epochs - state.epoch)
    lr, seconds = state.optimizer.param_groups[0]["lr"], now - state.started
    shown = "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
    print(f"epoch {state.epoch:3d}/{args.epochs} {kind:15s} {shown}  lr {lr:.1e}  "
          f"{seconds:.0f} s, {left / 60:.1f} min left")
    row = {"epoch": state.epoch, "step": state.step, "kind": kind, **terms, "lr": lr,
           "seconds": round(seconds, 2)}
    if kind == "vision-only":
        names = [*state.model.config.classes, "background"]
        means = [round(mean, 4) for mean in state.model.class_means.mean().tolist()]
        row["class_mean"] = dict(zip(names, means))
        print("          class means: " + ", ".join(f"{n} {m:.3f}" for n, m in zip(names, means)))
    append_row(path, row)
    if torch.cuda.is_available():
        print(f"          peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
