"""support/checkpoint.py - what a run leaves on the disk, and how signals stop it."""
import argparse
import json
import os
import signal
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.annotations import InputError, expect, first_ten
from support.processes import rank, world_size

FILES = ("checkpoint.safetensors", "log.jsonl", "result.json", "report.png")   # of a run, in --out
BEST = "best.safetensors"                                                      # of --eval-every
OF_CLASSES = ("head.cls_head.out.", "class_means.")         # tensors with a row for each class

def save_checkpoint(path: Path, state) -> None:
    """Write a train.TrainingState. It counts windows, not batches: --batch-size may change."""
    tensors = {f"model.{name}": tensor for name, tensor in model_state(state.model).items()}
    tensors.update({f"ema.{name}": tensor for name, tensor in state.ema.items()})
    for name, parameter in trained_parameters(state.model):
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if state.args.device != "cpu":
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    windows = state.batches_done * state.args.batch_size * world_size()
    rates = [group["lr"] for group in state.optimizer.param_groups]
    progress = dict(epoch=state.epoch, windows=windows, step=state.step, sums=state.sums, lr=rates)
    header = dict(config=asdict(state.model.config), args=vars(state.args), progress=progress)
    with written_whole(path) as beside:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                  beside, {name: json.dumps(fields) for name, fields in header.items()})

def resume(path: Path, state) -> None:
    """Restore a train.TrainingState, as if it had never stopped. InputError for another model."""
    saved, args = read_checkpoint(path), state.args
    ours, theirs = asdict(state.model.config), dict(saved.config)
    for run, flags in ((ours, args), (theirs, saved.args)):
        run["lm"] = Path(run["lm"]).name                            # its folder may have moved
        run.update(ablation=flags.ablation, lambda_lang=flags.lambda_lang)
    differ = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    expect(not differ, path, "the configuration of this run", f"another in {', '.join(differ)}",
           "use the flags of the first run, or another --out")
    restore(state.model, path, part(saved.tensors, "model."))
    average = averaged(saved)
    for name, tensor in state.ema.items():
        tensor.copy_(average[name])
    parameters = dict(trained_parameters(state.model))
    for name, tensor in part(saved.tensors, "optimizer.").items():
        key, name = name.split(".", 1)                              # step, exp_avg, exp_avg_sq
        state.optimizer.state[parameters[name]][key] = tensor.to(args.device)
    state.epoch, state.step = saved.progress["epoch"], saved.progress["step"]
    state.batches_done = saved.progress["windows"] // (args.batch_size * world_size())
    state.sums = saved.progress["sums"]
    for group, rate in zip(state.optimizer.param_groups, saved.progress["lr"]):
        group["lr"] = rate
    torch.set_rng_state(saved.tensors["random.cpu"])
    if "random.cuda" in saved.tensors and args.device != "cpu":
        torch.cuda.set_rng_state(saved.tensors["random.cuda"])
    if rank() == 0:                                # later epochs are trained and logged again
        log = path.with_name("log.jsonl")
        write_log(log, [row for row in read_log(log) if row["epoch"] <= state.epoch])

def read_checkpoint(path, lm: str | None = None) -> argparse.Namespace:
    """Read a checkpoint: config, args, progress, tensors. InputError for any other file. The
    language model is expected in the folder `lm`, else beside the checkpoint or where it was.
    path: of the file, or of the folder of a run."""
    path = Path(path) / FILES[0] if Path(path).is_dir() else Path(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        config, args, progress = (json.loads(header[key]) for key in ("config", "args", "progress"))
        int(progress["epoch"]), int(progress["step"]), int(progress["windows"])
        if config["lm"]:
            beside = path.with_name(Path(config["lm"]).name)
            config["lm"] = lm or str(beside if beside.exists() else config["lm"])
        return argparse.Namespace(path=path, config=config, args=argparse.Namespace(**args),
                                  progress=progress, tensors=tensors)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        found = f"no field {error} in its header" if isinstance(error, KeyError) else f"{error}"
        expect(False, path, "a checkpoint that train.py wrote", found, "give another")

def averaged(saved) -> dict:
    """The tensors of a checkpoint's model, with averaged weights where there are any."""
    return {**part(saved.tensors, "model."), **part(saved.tensors, "ema.")}

def restore(model, path, tensors: dict) -> None:
    """Copy tensors into the model; every one has to be there, and none may be left over."""
    expected = {(name, *tensor.shape) for name, tensor in model_state(model).items()}
    found = {(name, *tensor.shape) for name, tensor in tensors.items()}
    lack, more = sorted(expected - found)[:3], sorted(found - expected)[:3]
    expect(expected == found, path, "the tensors of this model (name and shape)",
           f"none of {lack} but {more}", "the files are of another run")
    model.load_state_dict(tensors, strict=False)

def initialise(model, path) -> None:
    """Take the weights of another run that fit by name, shape and classes; print the new ones."""
    saved = read_checkpoint(path)
    own, weights = model_state(model), averaged(saved)
    fits = {name: t for name, t in weights.items() if name in own and own[name].shape == t.shape}
    if list(saved.config["descriptions"]) != model.config.classes:
        fits = {name: t for name, t in fits.items() if not name.startswith(OF_CLASSES)}
    model.load_state_dict(fits, strict=False)
    new = [name for name in own if name not in fits]
    print(f"--init {path}: {len(fits)} tensors taken; start anew: {first_ten(new)}")

def model_state(model) -> dict:
    """Trained parameters and buffers; the frozen language model stays where it is."""
    return {name: tensor for name, tensor in model.state_dict().items()
            if "lora_" in name or not name.startswith("language.lm.")}

def trained_parameters(model) -> list:
    """[(name, parameter)] with gradients."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]

def part(tensors: dict, prefix: str) -> dict:
    """The tensors under a prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

def open_folder(out: Path, args) -> None:
    """Make --out ready: a new run needs a folder without another run's files, or --overwrite."""
    found = [name for name in (*FILES, BEST) if (out / name).exists()]
    expect(not args.resume or FILES[0] in found, f"--resume: --out {out}", FILES[0], "none",
           "start without --resume, or name another folder")
    if not args.resume and not args.dry_run:
        expect(args.overwrite or not found, f"--out {out}", "a folder without a run",
               ", ".join(found), "--resume goes on, --overwrite starts over; or name another")
        for name in found:
            (out / name).unlink()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        expect(False, f"--out {out}", "a folder to write to", error.strerror, "name another one")

def read_log(path: Path) -> list:
    """The rows of log.jsonl."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]

def write_log(path: Path, rows: list) -> None:
    with written_whole(path) as beside:
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows))

@contextmanager
def written_whole(path):
    """Yields a name beside `path` to write to, and renames it once it is on the disk: there is
    never half a file. InputError where it cannot be written (full disk, no permission)."""
    path = Path(path)
    beside = path.with_name(f"partial-{path.name}")         # keeps the suffix, which savefig reads
    try:
        yield beside
        with open(beside) as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: could not be written: {error}; make room, or look at the "
                         f"permissions of its folder; --resume goes on") from error
    finally:
        beside.unlink(missing_ok=True)

class Stopped(BaseException):
    """SIGINT or SIGTERM ended the training; `code` is the exit code."""
    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}; --resume goes on from here")
        self.code = 128 + number

@contextmanager
def stop_signals():
    """Yields an object whose `received` becomes the first SIGINT or SIGTERM, for a step to end
    first. A second one, or any among several processes, ends it at once. Raises Stopped."""
    signals, before = argparse.Namespace(received=0), {}
    def receive(number: int, _) -> None:
        signals.received = number
        for each in before:
            signal.signal(each, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        if world_size() == 1 and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, receive)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signals.received:
        raise Stopped(signals.received)

def leave_group(worker: int) -> None:
    """Take a worker of a DataLoader out of its group of processes, which Ctrl-C ends as a whole."""
    os.setpgrp()
