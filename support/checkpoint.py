"""support/checkpoint.py - what a run leaves on the disk, and how it stops.

Checkpoints, the log, files that are written as a whole, signals.
"""
import argparse
import json
import os
import shutil
import signal
import threading
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.annotations import InputError
from support.processes import rank, world_size

FILES = ("checkpoint.safetensors", "log.jsonl", "result.json", "report.png")   # of a run, in --out


class Checkpoint(NamedTuple):
    """The content of checkpoint.safetensors."""
    config: dict            # fields of model.Config
    args: argparse.Namespace   # flags of the training
    progress: dict          # epochs done; windows, step and log sums of the next one
    tensors: dict           # {name: tensor}: model.*, ema.*, optimizer.*, random.*


def save_checkpoint(path: Path, state) -> None:
    """Write a train.TrainingState as one safetensors file.

    It counts windows, not batches, so that a run can go on with another --batch-size. Random state
    and sums are those of the first process.
    """
    tensors = {f"model.{name}": t for name, t in model_state(state.model).items()}
    tensors.update({f"ema.{name}": t for name, t in state.ema.items()})
    for name, parameter in trained_parameters(state.model):
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.device(state.args.device).type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    progress = {"epoch": state.epoch, "windows": state.batches_done * windows_at_once(state.args),
                "step": state.step, "sums": state.sums}
    header = {"config": json.dumps(asdict(state.model.config)),
              "args": json.dumps(vars(state.args)), "progress": json.dumps(progress)}
    with written_whole(path) as beside:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, beside, header)


def resume(path: Path, state) -> None:
    """Restore all of a train.TrainingState, so that it goes on as if it had never stopped.

    In several processes, all but the first draw other random numbers from here on.
    """
    saved = read_checkpoint(path)
    check_same_run(path, saved, state)
    restore(state.model, path, part(saved.tensors, "model"))
    device, average = state.args.device, part(saved.tensors, "ema")
    state.ema = {name: average[name].to(device) for name in state.ema if name in average}
    for name, parameter in trained_parameters(state.model):
        moments = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"optimizer.{key}.{name}" in saved.tensors:
                moments[key] = saved.tensors[f"optimizer.{key}.{name}"].to(device)
        state.optimizer.state[parameter] = moments
    state.epoch, state.step = saved.progress["epoch"], saved.progress["step"]
    state.batches_done = saved.progress["windows"] // windows_at_once(state.args)
    state.sums = saved.progress["sums"]
    if rank() == 0:
        trim_log(path.with_name("log.jsonl"), state.epoch)
    torch.set_rng_state(saved.tensors["random.cpu"])
    if "random.cuda" in saved.tensors and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(saved.tensors["random.cuda"])


def check_same_run(path, saved: Checkpoint, state) -> None:
    """Raises InputError where the flags build another model than that of the checkpoint."""
    ours, theirs = asdict(state.model.config), dict(saved.config)
    for key in ("ablation", "lambda_lang"):
        ours[key], theirs[key] = getattr(state.args, key), getattr(saved.args, key)
    for config in (ours, theirs):
        config["lm"] = Path(config["lm"]).name                      # its folder may have moved
    differ = [key for key in ours if ours[key] != theirs.get(key)]
    if differ:
        raise InputError(f"{path}: expected the configuration of this run, found another in "
                         f"{', '.join(differ)}; use the flags of the first run, or another --out")


def read_checkpoint(path, lm: str | None = None) -> Checkpoint:
    """Read a checkpoint of train.py. The language model is expected where it was, or beside the
    checkpoint, or in the folder `lm`. Raises InputError for any other file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        config, args, progress = (json.loads(header[key]) for key in ("config", "args", "progress"))
        saved = Checkpoint(config, argparse.Namespace(**args), progress, tensors)
        int(progress["epoch"]), int(progress["step"]), int(progress["windows"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        found = f"no field {error} in its header" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: expected a checkpoint that train.py wrote, "
                         f"found: {found}") from error
    if lm and config["lm"]:
        config["lm"] = lm
    beside = Path(path).parent / Path(config["lm"]).name
    if config["lm"] and not Path(config["lm"]).exists() and beside.exists():
        config["lm"] = str(beside)
    return saved


def restore_average(model, path, saved: Checkpoint) -> None:
    """Put the averaged weights of a checkpoint into a model, for evaluation."""
    restore(model, path, part(saved.tensors, "model") | part(saved.tensors, "ema"))


def restore(model, path, tensors: dict) -> None:
    """Copy tensors into the model; every one has to be there, and none may be left over."""
    expected = {(name, *t.shape) for name, t in model_state(model).items()}
    found = {(name, *t.shape) for name, t in tensors.items()}
    if expected != found:
        raise InputError(f"{path}: expected the tensors of this model (name and shape), missing "
                         f"are {sorted(expected - found)[:3]} and unknown are "
                         f"{sorted(found - expected)[:3]}")
    model.load_state_dict(tensors, strict=False)


def model_state(model) -> dict:
    """Trained parameters and buffers; the frozen language model stays where it is."""
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("language.lm.") or "lora_" in name:
            state[name] = tensor
    return state


def trained_parameters(model) -> list:
    """[(name, parameter)] with gradients."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def part(tensors: dict, prefix: str) -> dict:
    """The tensors under `prefix.`, without it."""
    start = prefix + "."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def windows_at_once(args) -> int:
    """Windows of one batch, over all processes."""
    return args.batch_size * world_size()


# ------------------------------------------------------------------------------------ the folder
def open_folder(out: Path, args) -> None:
    """Make --out ready: a new run needs a folder without another run's files, or --overwrite."""
    if rank():
        return
    found = [name for name in FILES if (out / name).exists()]
    if args.resume and "checkpoint.safetensors" not in found:
        raise InputError(f"--resume: expected checkpoint.safetensors of an earlier run in --out "
                         f"{out}, found none; start without --resume, or name another folder")
    if not args.resume and not args.dry_run:
        if found and not args.overwrite:
            raise InputError(f"--out {out}: expected a folder without a run, found "
                             f"{', '.join(found)}; go on with --resume, start over with "
                             f"--overwrite, or name another folder")
        for name in found:
            (out / name).unlink()
        if args.lm == "tiny":       # an earlier run's tokenizer has read other descriptions
            shutil.rmtree(out / "tiny-lm", ignore_errors=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: expected a folder that can be written to, found: "
                         f"{error.strerror}; name another one") from error


# ------------------------------------------------------------------------------------ the log
def read_log(path) -> list:
    """The rows of log.jsonl; a last line that a crash has cut does not count."""
    if not Path(path).exists():
        return []
    lines = Path(path).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_row(path, row: dict) -> None:
    """Returns when the row is on the disk."""
    try:
        with open(path, "ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise not_written(path, error) from error


def trim_log(path: Path, epoch: int) -> None:
    """Drop the rows of epochs after number `epoch`, which are trained again, and a cut line."""
    if path.exists():
        rows = [row for row in read_log(path) if row["epoch"] <= epoch]
        with written_whole(path) as beside:
            beside.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------------ whole files
@contextmanager
def written_whole(path):
    """Yields a name beside `path` to write to, and renames it to `path` once it is on the disk.

    There is never half a file. Where it cannot be written (full disk, no permission), it is
    removed, and InputError says so.
    """
    path = Path(path)
    beside = path.with_name(f"partial-{path.name}")         # keeps the suffix, which savefig reads
    try:
        yield beside
        to_disk(beside)
        os.replace(beside, path)
        to_disk(path.parent)                                # holds the new name
    except (OSError, SafetensorError) as error:
        raise not_written(path, error) from error
    finally:
        beside.unlink(missing_ok=True)


def to_disk(path) -> None:
    """Returns when the content of a file or folder is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def not_written(path, error) -> InputError:
    return InputError(f"{path}: could not be written: {error}; its earlier content is whole. Make "
                      f"room, or look at the permissions of {Path(path).parent}; then --resume "
                      f"goes on")


# ------------------------------------------------------------------------------------ signals
class Stopped(BaseException):
    """SIGINT or SIGTERM ended the run; `code` is the exit code."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


class StopSignals:
    """SIGINT and SIGTERM while this is entered: the first one is noted, for a step to end first.

    The second one ends the process at once. Several processes would wait for each other after the
    first one; there, signals keep their usual effect.
    """

    def __init__(self):
        self.received, self.before = 0, {}

    def __enter__(self) -> "StopSignals":
        if world_size() > 1 or threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number: int, _) -> None:
        self.received = number
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.received:
            raise Stopped(self.received)


def leave_group(worker: int) -> None:
    """Take a worker of a DataLoader out of its group of processes, which Ctrl-C ends as a whole."""
    os.setpgrp()
