"""support/summary.py - what a run prints: data, parameters, memory, a line for each epoch."""
import time
from collections import Counter

import torch

from support.checkpoint import read_log, write_log

def describe(model, groups: list, training, test) -> None:
    """Print videos, segments and classes; trained parameters by train.parameter_groups."""
    for name, data in (("training", training), ("test", test)):
        segments = sum(len(v.labels) for v in data.videos)
        hours = sum(v.duration for v in data.videos) / 3600
        print(f"{name}: {len(data.videos)} videos, {segments} segments, {hours:.2f} h, "
              f"{len(data)} windows")
    counts = Counter()                                  # {(name, learning rate): parameters}
    for group in groups:
        counts[group["name"], group["base_lr"]] += sum(p.numel() for p in group["params"])
    parts = [f"{name} {count:,} (lr {rate:g})" for (name, rate), count in counts.items()]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    print(f"{len(model.config.classes)} classes; trained parameters: {', '.join(parts)}; "
          f"frozen: {frozen:,}")

def describe_step(model, args, terms: dict) -> None:
    """Print the length of the sequence of tokens, the losses of a step, and the peak of memory."""
    language, L = model.language, args.resize_to or args.window
    if language is not None:
        prompt, total = len(language.prompt_ids), language.sequence_length(L)
        print(f"tokens of a window: {total - prompt} for {L} frames + {prompt} for the prompt = "
              f"{total}, then the answer")
    print("one step: " + "  ".join(f"{name} {value:.4f}" for name, value in terms.items()))
    where = "this process" if args.device == "cpu" else "the GPU"
    print(f"peak memory of {where}: {peak_memory(args.device):.2f} GiB")

def peak_memory(device: str) -> float:
    """The peak of the memory of the GPU or, on a CPU, of this process, in GiB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not everywhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20        # of Linux, in KiB

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
