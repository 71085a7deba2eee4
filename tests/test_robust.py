"""A run loses no work: killed, interrupted, out of disk, or with a reader that dies."""
import json
import multiprocessing.forkserver
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import peft  # noqa: F401, once for all processes that `start` forks
import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM  # noqa: F401, the same

import data
import train
from support import checkpoint
from support.annotations import InputError

EPOCHS, VIDEOS = 8, 5


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a run with language on random features: 40 steps in 8 epochs."""
    folder, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    database = {}
    for i in range(VIDEOS + 1):
        np.save(folder / f"v{i}.npy", rng.normal(size=(30 + i, 6)).astype(np.float32))
        database[f"v{i}"] = {"subset": "test" if i == VIDEOS else "training", "duration": 5.0, "fps": 30,
                             "annotations": [{"label": "Run", "segment": [1, 3]},
                                             {"label": "Jump", "segment": [3, 4.5]}]}
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    (folder / "descriptions.json").write_text(json.dumps({"Run": "Legs move.", "Jump": "Both feet leave the ground."}))
    return [*map(str, ["--dataset", "custom", "--features", folder, "--annotations", folder / "annotations.json",
                       "--descriptions", folder / "descriptions.json", "--test-subset", "test", "--window", 32,
                       "--levels", 3, "--width", 16, "--lora-rank", 4, "--device", "cpu", "--epochs", EPOCHS,
                       "--warmup-epochs", 1, "--lr", 1e-3, "--lr-lm", 1e-3, "--ema", 0.9])]


@pytest.fixture(autouse=True)
def as_in_child(monkeypatch):
    """Runs in this process: no picture, which takes longer than they do, and sums in the order of one thread."""
    monkeypatch.setattr(train.figures, "report", lambda path, *_: path.touch())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell's background job ignores it
    yield
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of a run that nothing has stopped, made where the others are: in a process of its own."""
    out = tmp_path_factory.mktemp("whole")
    assert finish(start([*flags, "--out", str(out)], out / "printed")) == 0
    return out


# ------------------------------------------------------------------------------------------------ processes
def start(argv, output, prepare=None, *given):
    """train.main(argv) in a process of its own, forked from one that has imported all; it prints into `output`.
    prepare(*given) is called in it before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_robust"])
    with pytest.MonkeyPatch.context() as patch:                 # for the first call, which starts the one to fork from
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()
    process = context.Process(target=child, args=(list(map(str, argv)), str(output), prepare, *given))
    process.start()
    return process


def child(argv, output, prepare, *given):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2)
    train.figures.report = lambda path, *_: path.touch()
    train.tqdm.set_lock(threading.RLock())                      # its own is a semaphore, which a kill leaves behind
    if prepare:
        prepare(*given)
    code = train.main(argv)
    sys.stdout.flush()
    os._exit(code)


def finish(process) -> int:
    process.join(120)
    return process.exitcode


def state(out):
    """All that a run leaves: tensors, place in the run, and the log without its seconds."""
    saved = checkpoint.read_checkpoint(out / "checkpoint.safetensors")
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in checkpoint.read_log(out / "log.jsonl")]
    return saved.tensors, saved.progress, rows


def assert_same(out, other):
    (a, position_a, rows_a), (b, position_b, rows_b) = state(out), state(other)
    assert position_a == position_b and rows_a == rows_b and set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def wait_for_change(path, process, changes: int):
    """Return when the file has been renamed so many times more, or the process has ended."""
    def number():
        return path.stat().st_ino, path.stat().st_mtime_ns
    seen, last = 0, number() if path.exists() else None
    while seen < changes and process.is_alive():
        time.sleep(0.0005)
        if path.exists() and number() != last:
            seen, last = seen + 1, number()


# ------------------------------------------------------------------------------------------------ kills and signals
def test_ten_kills_change_nothing(flags, whole, tmp_path):
    """SIGKILL at random points: before the first checkpoint, in steps, in the writing of checkpoint and log."""
    rng, out, printed, steps = random.Random(0), tmp_path / "out", tmp_path / "printed", []
    file = out / "checkpoint.safetensors"
    for attempt in range(10):
        more = ["--resume"] if file.exists() else []
        process = start([*flags, "--out", out, "--save-every", 1, *more], printed)
        wait_for_change(file, process, rng.randint(1, 3) if attempt else 0)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        assert finish(process) == -signal.SIGKILL, printed.read_text()
        steps.append(checkpoint.read_checkpoint(file).progress["step"] if file.exists() else -1)
    assert len(set(steps)) > 5 and any(step % VIDEOS for step in steps[1:]), steps
    assert finish(start([*flags, "--out", out, "--resume"], printed)) == 0, printed.read_text()
    assert_same(out, whole)
    assert not list(out.glob("partial-*"))


def test_signals_end_after_the_step_and_nothing_is_read_twice(flags, whole, tmp_path, monkeypatch, capsys):
    stops, reads = {7: signal.SIGTERM, 21: signal.SIGINT}, []
    update, read = train.TrainingState.update, data.TALDataset.__getitem__

    def stopped(state):
        if state.step in stops:
            os.kill(os.getpid(), stops.pop(state.step))
        update(state)

    def recorded(dataset, index):
        if dataset.training and dataset.epoch:                   # in epoch 0 the calibration reads, too
            reads.append((dataset.epoch, index))
        return read(dataset, index)
    monkeypatch.setattr(train.TrainingState, "update", stopped)
    monkeypatch.setattr(data.TALDataset, "__getitem__", recorded)
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    flags = [*flags, "--out", str(tmp_path)]
    assert train.main(flags) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "train.py: stopped by SIGTERM; --resume goes on from here"
    assert checkpoint.read_checkpoint(tmp_path / "checkpoint.safetensors").progress["step"] == 8       # the step was ended
    assert train.main([*flags, "--resume"]) == 130
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert train.main([*flags, "--resume"]) == 0
    assert_same(tmp_path, whole)
    assert sorted(reads) == [(epoch, index) for epoch in range(1, EPOCHS) for index in range(VIDEOS)]


@pytest.mark.parametrize("function", ["load_data", "detect"])
def test_ctrl_c_outside_of_training_ends_at_once(flags, whole, tmp_path, monkeypatch, capsys, function):
    shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(train, function, lambda *_: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60)))
    assert train.main([*flags, "--out", str(tmp_path / "out"), "--resume"]) == 130
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == "train.py: stopped by SIGINT" and "Traceback" not in error
    assert_same(tmp_path / "out", whole)


def test_a_second_signal_is_not_caught():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(checkpoint.Stopped, match="SIGTERM") as stopped:
        with checkpoint.stop_signals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.received == signal.SIGTERM                            # and the block is finished
            assert {signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)} == {signal.SIG_DFL}
    assert signal.getsignal(signal.SIGTERM) == before and stopped.value.code == 143


def test_a_signal_that_is_ignored_stays_ignored():
    """A shell starts its background jobs without SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with checkpoint.stop_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert not signals.received and signal.getsignal(signal.SIGINT) == signal.SIG_IGN


# ------------------------------------------------------------------------------------------------ files
def fill_disk_at_step(step: int) -> None:
    """From this step on no file of more than 50 kB can be written."""
    update = train.TrainingState.update

    def limited(state):
        if state.step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        update(state)
    train.TrainingState.update = limited


def test_a_full_disk_leaves_the_last_checkpoint(flags, whole, tmp_path):
    out, printed = tmp_path / "out", tmp_path / "printed"
    assert finish(start([*flags, "--out", out, "--save-every", 2], printed, fill_disk_at_step, 7)) == 2
    said = printed.read_text()
    assert re.search(r"train.py: error: .*checkpoint.safetensors: could not be written: .*File too large", said)
    assert "Traceback" not in said and not list(out.glob("partial-*"))
    assert checkpoint.read_checkpoint(out / "checkpoint.safetensors").progress["step"] == 6
    assert finish(start([*flags, "--out", out, "--resume"], printed)) == 0, printed.read_text()
    assert_same(out, whole)


def test_what_cannot_be_written_whole_is_not_there(tmp_path):
    (tmp_path / "result.json").write_text("old")
    with pytest.raises(InputError, match="result.json: could not be written: .*No space"):
        with checkpoint.written_whole(tmp_path / "result.json") as beside:
            beside.write_text("half")
            raise OSError(28, "No space left on device")
    assert (tmp_path / "result.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    checkpoint.write_log(tmp_path / "log.jsonl", [{"epoch": 1}, {"epoch": 2}])
    assert (tmp_path / "log.jsonl").read_text() == '{"epoch": 1}\n{"epoch": 2}\n'
    with pytest.raises(InputError, match="log.jsonl: could not be written: .*No such file"):
        checkpoint.write_log(tmp_path / "nowhere/log.jsonl", [])


def test_rows_of_epochs_that_come_again_are_dropped(flags, whole, tmp_path):
    """A run killed after the row of an epoch and before its checkpoint."""
    shutil.copytree(whole, tmp_path / "out")
    log = tmp_path / "out/log.jsonl"
    checkpoint.write_log(log, [*checkpoint.read_log(log), {"epoch": EPOCHS + 1}])
    assert train.main([*flags, "--out", str(tmp_path / "out"), "--resume"]) == 0
    assert_same(tmp_path / "out", whole)


def test_a_run_killed_in_its_first_epoch_is_not_overwritten(flags, whole, tmp_path, capsys):
    shutil.copy(whole / "checkpoint.safetensors", tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    flags = [*flags, "--out", str(tmp_path), "--epochs", "0"]
    assert train.main(flags) == 2
    said = "found checkpoint.safetensors; --resume goes on, --overwrite starts over; or name another"
    assert said in capsys.readouterr().err
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert train.main([*flags, "--overwrite"]) == 0
    assert checkpoint.read_checkpoint(tmp_path / "checkpoint.safetensors").progress["step"] == 0


# ------------------------------------------------------------------------------------------------ memory, workers, bits
def print_memory(epochs: list) -> None:
    """Print the resident bytes after these epochs. Nothing waits for the disk: other tests are about that."""
    os.fsync, log_epoch = lambda _: None, train.summary.log_epoch

    def logged(path, state, *rest):
        if state.epoch in epochs:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print("resident", pages * resource.getpagesize())
        log_epoch(path, state, *rest)
    train.summary.log_epoch = logged


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc says how much memory a process has")
@pytest.mark.parametrize("epochs, more", [(200, ["--lambda-lang", "0", "--levels", "1"]), (40, [])])
def test_memory_stays_flat(flags, tmp_path, epochs, more):
    flags = [*flags, "--out", tmp_path / "out", "--epochs", epochs, "--leave-out", "v0", "v1", "v2", "v3", *more]
    process = start(flags, tmp_path / "printed", print_memory, [epochs // 5, epochs])
    assert finish(process) == 0
    early, late = map(int, re.findall(r"resident (\d+)", (tmp_path / "printed").read_text()))
    assert late - early < (2 ** 22 if epochs == 200 else 2 ** 24), f"{(late - early) / 2 ** 20:.1f} MiB more"


def test_workers_see_the_epoch_and_the_position_and_give_the_same(flags, make_model):
    read, model = [], make_model()
    for workers in ("0", "2"):
        args = train.get_args([*flags, "--workers", workers, "--batch-size", "2"])
        training, state = train.load_data(args)[0], train.TrainingState(model, args, 3)
        for state.epoch, state.batches_done in ((0, 0), (1, 1)):
            read.append([(w.video.name, w.start, w.length) for batch in state.batches(training) for w in batch.windows])
    assert read[:2] == read[2:] and [len(windows) for windows in read[:2]] == [VIDEOS, VIDEOS - 2]
    assert set(read[0]) != set(read[1])


@pytest.mark.parametrize("video, resumed", [("v3", False), (f"v{VIDEOS}", True)])
def test_a_worker_that_dies_is_reported(flags, whole, tmp_path, monkeypatch, capsys, video, resumed):
    read = data.TALDataset.read_rows

    def deadly(dataset, of, *rest):
        if of.name == video and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return read(dataset, of, *rest)
    monkeypatch.setattr(data.TALDataset, "read_rows", deadly)
    if resumed:                                                                  # then it reads for the evaluation
        shutil.copytree(whole, tmp_path / "out")
    assert train.main([*flags, "--out", str(tmp_path / "out"), "--workers", "2", *["--resume"] * resumed]) == 2
    error = capsys.readouterr().err
    assert re.search(r"train.py: error: --workers: DataLoader worker .*memory", error)
    assert "Traceback" not in error
