"""checkpoint.py - what a run leaves on the disk, and how it stops: checkpoints, the log, whole files, signals."""
import argparse
import json
import os
import signal
import threading
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from annotations import InputError
from data import process_rank
from model import ActionVLM, Config


def save_checkpoint(path: Path, run) -> None:
    """Write a train.Run as one safetensors file: what was trained, the buffers, the optimizer, the weight average,
    random state, the terms of the running epoch; and in its header the configuration, the flags and the position:
    epochs done, windows done of the next one (so that another --batch-size can go on), steps. Random state and terms
    are the first process's."""
    tensors = {f"model.{n}": t for n, t in model_state(run.model).items()}
    tensors |= {f"ema.{n}": t for n, t in run.ema.items()}
    for name, parameter in trained_parameters(run.model):
        tensors |= {f"optimizer.{key}.{name}": t for key, t in run.optimizer.state.get(parameter, {}).items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if run.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    if run.terms:
        tensors["progress.terms"] = torch.stack(run.terms)
    header = {"config": json.dumps(asdict(run.model.config)), "args": json.dumps(vars(run.args)),
              "epoch": str(run.epoch), "windows": str(run.batches_done * windows_at_once(run.args)),
              "step": str(run.global_step), "terms": json.dumps(run.term_names)}
    with written_whole(path) as beside:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, beside, header)


def windows_at_once(args) -> int:
    """Windows of one batch, over all processes."""
    return args.batch_size * process_rank()[1]


def load_checkpoint(path, run=None, lm: str | None = None):
    """Read a checkpoint. With a run: restore all of its state, so that it goes on as if it had never stopped (of
    several processes, all but the first draw other random numbers then). Without one: build the model and return
    (model with the averaged weights, flags of its training). The frozen language model is read from where it was, from
    beside the checkpoint, or from `lm`."""
    header, tensors = read_checkpoint(path)
    config, args = Config(**json.loads(header["config"])), argparse.Namespace(**json.loads(header["args"]))
    if run is None:
        config.lm = lm or config.lm
        if not Path(config.lm).exists() and (Path(path).parent / Path(config.lm).name).exists():
            config.lm = str(Path(path).parent / Path(config.lm).name)            # the run's folder was moved
        try:
            model = ActionVLM(config)
        except InputError as error:
            raise InputError(f"{path}: needs the language model of its training: {error}; say where it is by "
                             f"evaluate.py --lm") from error
        restore(model, path, part(tensors, "model") | part(tensors, "ema"))
        return model, args
    ours, theirs = ({**asdict(c), "lm": Path(c.lm).name} for c in (run.model.config, config))     # it may have moved
    differ = [key for key in ours if ours[key] != theirs[key]]
    if differ:
        raise InputError(f"{path}: expected the configuration of this run, found another in {', '.join(differ)}; "
                         f"use the flags of the first run, or another --out")
    restore(run.model, path, part(tensors, "model"))
    average = part(tensors, "ema")
    run.ema = {n: average[n].to(run.device) for n, _ in trained_parameters(run.model) if n in average}
    for name, parameter in trained_parameters(run.model):
        state = {key: tensors[f"optimizer.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                 if f"optimizer.{key}.{name}" in tensors}
        run.optimizer.state[parameter] = {k: t.to(run.device) for k, t in state.items()}
    run.epoch, run.global_step = int(header["epoch"]), int(header["step"])
    run.batches_done = int(header.get("windows", 0)) // windows_at_once(run.args)
    run.terms, run.term_names = list(tensors.get("progress.terms", [])), json.loads(header.get("terms", "[]"))
    run.terms = [terms.to(run.device) for terms in run.terms]
    run.set_learning_rates(max(0, run.global_step - 1))
    if process_rank()[0]:
        torch.manual_seed(run.args.seed + 1000 * process_rank()[0] + run.global_step)
        return
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and run.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"])


def read_checkpoint(path):
    """(header, {name: tensor}) of a safetensors file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        Config(**json.loads(header["config"])), json.loads(header["args"]), int(header["epoch"]), int(header["step"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        what = f"no field {error} in its header" if isinstance(error, KeyError) else error
        raise InputError(f"{path}: expected a checkpoint that train.py wrote, found: {what}") from error
    return header, tensors


def model_state(model: ActionVLM) -> dict:
    """What a checkpoint keeps of the model: trained parameters and buffers; the frozen language model stays away."""
    return {n: t for n, t in model.state_dict().items() if not n.startswith("language.lm.") or "lora_" in n}


def restore(model: ActionVLM, path, state: dict) -> None:
    """Copy a checkpoint's tensors into the model; every one has to be there, and none may be left over."""
    expected, found = ({(n, *t.shape) for n, t in tensors.items()} for tensors in (model_state(model), state))
    if expected != found:
        raise InputError(f"{path}: expected the tensors of this model (name and shape), missing are "
                         f"{sorted(expected - found)[:3]} and unknown are {sorted(found - expected)[:3]}")
    model.load_state_dict(state, strict=False)


def part(tensors: dict, name: str) -> dict:
    """The tensors under `name.`, without it."""
    return {n.removeprefix(name + "."): t for n, t in tensors.items() if n.startswith(name + ".")}


def use_average(run) -> None:
    """Put the averaged weights into the model, for evaluation."""
    if run.ema:
        run.model.load_state_dict(run.ema, strict=False)


def trained_parameters(model) -> list:
    """[(name, parameter)] with gradients."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


# ------------------------------------------------------------------------------------------------ log
def read_log(path) -> list:
    """The rows of log.jsonl; none before the first epoch. A last line that a crash has cut does not count."""
    lines = Path(path).read_text().splitlines(keepends=True) if Path(path).exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_row(path, row: dict) -> None:
    """Returns when the row is on the disk. What a full disk cuts is dropped by `read_log`."""
    try:
        with open(path, "ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise not_written(path, error) from error


def trim_log(path: Path, epoch: int) -> None:
    """Drop the rows of epochs that are trained again, after number `epoch`, and a line that a crash has cut."""
    if path.exists():
        with written_whole(path) as beside:
            beside.write_text("".join(json.dumps(row) + "\n" for row in read_log(path) if row["epoch"] <= epoch))


# ------------------------------------------------------------------------------------------------ whole files
@contextmanager
def written_whole(path):
    """Yields a name beside `path` to write to. Renamed to `path` once all of it is on the disk: there is never
    half a file, whatever happens. Where it cannot be written (full disk, no permission) it is removed: InputError.
    """
    path = Path(path)
    beside = path.with_name(f"partial-{path.name}")                             # keeps the suffix: savefig goes by it
    try:
        yield beside
        to_disk(beside)
        os.replace(beside, path)
        to_disk(path.parent)                                                     # a name is the content of its folder
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
    return InputError(f"{path}: could not be written: {error}; what was there before is whole. Make room, or look at "
                      f"the permissions of {Path(path).parent}; then --resume goes on")


# ------------------------------------------------------------------------------------------------ signals
class Stopped(BaseException):
    """SIGINT or SIGTERM ended the run; `code` is what the process exits with."""

    def __init__(self, number: int, where: str = ""):
        super().__init__(f"stopped by {signal.Signals(number).name}{where}")
        self.code = 128 + number


class StopSignals:
    """SIGINT and SIGTERM, while this is entered. The first one raises Stopped: at once, or while it is `deferred` when
    `Run.pause` finds it in `received`. The second one ends the process at once."""

    def __init__(self):
        self.received, self.defers, self.before = 0, False, {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():                # only there can handlers be set
            self.before = {n: signal.signal(n, self.receive) for n in (signal.SIGINT, signal.SIGTERM)
                           if signal.getsignal(n) != signal.SIG_IGN}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def receive(self, number: int, _) -> None:
        self.received = number
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        if not self.defers:
            raise Stopped(number)

    @contextmanager
    def deferred(self):
        """Several processes do not wait: they are never at the same step, and their last checkpoint holds."""
        self.defers = not dist.is_initialized()
        yield
        self.defers = False
        if self.received:
            raise Stopped(self.received)
