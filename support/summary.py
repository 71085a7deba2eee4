"""support/summary.py - what a run prints: data, parameters, memory, a line for each epoch."""
import time

import torch

from support.checkpoint import read_log, trained_parameters, write_log

def describe(model, groups: list, training, test) -> None:
    """Print videos, segments and classes; trained parameters by train.parameter_groups."""
    for name, data in (("training", training), ("test", test)):
        segments = sum(len(v.labels) for v in data.videos)
        hours = sum(v.duration for v in data.videos) / 3600
        print(f"{name}: {len(data.videos)} videos, {segments} segments, {hours:.2f} h, "
              f"{len(data)} windows")
    counts, rates = {}, {}
    for group in groups:
        name, size = group["name"], sum(p.numel() for p in group["params"])
        counts[name] = counts.get(name, 0) + size
        rates[name] = group["base_lr"]
    parts = [f"{name} {count:,} (lr {rates[name]:g})" for name, count in counts.items()]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    print(f"{len(model.config.classes)} classes; trained parameters: {', '.join(parts)}; "
          f"frozen: {frozen:,}")

def describe_size(model, args) -> None:
    """Print the length of the sequence of tokens, and about the memory of a training step.

    Trained weights have gradient, AdamW's two moments and average. A layer keeps about 10 D + 3 F
    numbers a token (F: of the MLP); with activation checkpointing D, and one layer all.
    """
    language, L = model.language, args.resize_to or args.window
    parts = []                                             # (transformers' config, tokens, bytes)
    if model.vision is not None:
        side = model.config.vision["image_size"] // model.config.vision["patch_size"]
        tokens = L // model.vision.tubelet * side ** 2
        parts.append((model.vision.backbone.config, tokens, 4))
    if language is not None:
        tokens = language.sequence_length(L)
        parts.append((language.lm.config, tokens, language.lm.dtype.itemsize))
        print(f"tokens of a window: {4 * L} for {L} frames + {len(language.prompt_ids)} for the "
              f"prompt = {tokens}, then the answer")
    passed = 0
    for config, tokens, size in parts:
        D, layers = config.hidden_size, config.num_hidden_layers
        full = 10 * D + 3 * config.intermediate_size
        per_token = D * layers + full if args.grad_checkpoint == "on" else full * layers
        passed += args.batch_size * tokens * size * per_token
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() * p.element_size() for _, p in trained_parameters(model))
    trained *= 5 if args.ema else 4
    print(f"memory, about: frozen weights {frozen / 2**30:.2f} GiB, trained weights with optimizer "
          f"{trained / 2**30:.2f} GiB, activations of encoder and language model "
          f"{passed / 2**30:.2f} GiB; the head's come on top")

def log_epoch(path, state, kind: str, terms: dict) -> None:
    """Print a train.TrainingState after an epoch, and log it. terms: {name: mean of the epoch}."""
    epochs, now, (began, first) = state.args.epochs, time.time(), state.began
    left = (now - began) / (state.epoch - first) * (epochs - state.epoch)
    lr, seconds = state.optimizer.param_groups[0]["lr"], now - state.started
    shown = "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
    print(f"epoch {state.epoch:3d}/{epochs} {kind:15s} {shown}  lr {lr:.1e}  {seconds:.0f} s, "
          f"{left / 60:.1f} min left")
    row = {"epoch": state.epoch, "step": state.step, "kind": kind, **terms, "lr": lr,
           "seconds": round(seconds, 2)}
    if kind == "vision-only":
        names = [*state.model.config.classes, "background"]
        means = [round(mean, 4) for mean in state.model.class_means.mean().tolist()]
        row["class_mean"] = dict(zip(names, means))
        print("          class means: " + ", ".join(f"{n} {m:.3f}" for n, m in zip(names, means)))
    write_log(path, [*read_log(path), row])
    if torch.cuda.is_available():
        print(f"          peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
