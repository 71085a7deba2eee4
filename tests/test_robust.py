"""A run loses no work: killed, interrupted, out of disk, fed with infinities, or with a reader that dies."""
import json
import math
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
from types import SimpleNamespace

import numpy as np
import peft                                                     # noqa: F401, once for all processes that `start` forks
import pytest
import torch
from conftest import feature_batch
from test_train import flags as run_flags
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM             # noqa: F401, the same

import annotations
import checkpoint
import data
import train
from benchmark import Batches
from train import vision_language_epoch, vision_only_epoch

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
    """All that a run leaves: tensors, position, and the log without its seconds."""
    header, tensors = checkpoint.read_checkpoint(out / "checkpoint.safetensors")
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in checkpoint.read_log(out / "log.jsonl")]
    return tensors, {k: header[k] for k in ("epoch", "windows", "step", "terms")}, rows


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
        steps.append(int(checkpoint.read_checkpoint(file)[0]["step"]) if file.exists() else -1)
    assert len(set(steps)) > 5 and any(step % VIDEOS for step in steps[1:]), steps
    assert finish(start([*flags, "--out", out, "--resume"], printed)) == 0, printed.read_text()
    assert_same(out, whole)
    assert not list(out.glob("partial-*"))


def test_signals_end_after_the_step_and_nothing_is_read_twice(flags, whole, tmp_path, monkeypatch, capsys):
    stops, reads = {7: signal.SIGTERM, 21: signal.SIGINT}, []
    update, read = train.Run.update, data.TALDataset.__getitem__

    def stopped(run):
        if run.global_step in stops:
            os.kill(os.getpid(), stops.pop(run.global_step))
        update(run)

    def recorded(dataset, index):
        if dataset.training and dataset.epoch:                   # in epoch 0 the calibration reads, too
            reads.append((dataset.epoch, index))
        return read(dataset, index)
    monkeypatch.setattr(train.Run, "update", stopped)
    monkeypatch.setattr(data.TALDataset, "__getitem__", recorded)
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    flags = [*flags, "--out", str(tmp_path)]
    assert train.main(flags) == 143
    said = "train.py: stopped by SIGTERM in epoch 2/8 after 3 of its batches, 8 steps in all; --resume goes on from"
    assert capsys.readouterr().err.splitlines()[-1].startswith(said)
    assert train.main([*flags, "--resume"]) == 130
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert train.main([*flags, "--resume"]) == 0
    assert_same(tmp_path, whole)
    assert sorted(reads) == [(epoch, index) for epoch in range(1, EPOCHS) for index in range(VIDEOS)]


@pytest.mark.parametrize("function, number", [("load_data", signal.SIGTERM), ("score_test_set", signal.SIGINT)])
def test_a_signal_outside_of_training_ends_at_once(flags, whole, tmp_path, monkeypatch, capsys, function, number):
    shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(train, function, lambda *_: (os.kill(os.getpid(), number), time.sleep(60)))
    assert train.main([*flags, "--out", str(tmp_path / "out"), "--resume"]) == 128 + number
    error = capsys.readouterr().err
    assert f"stopped by {number.name}\n" in error and "Traceback" not in error
    assert_same(tmp_path / "out", whole)


def test_a_second_signal_is_not_caught():
    before = signal.getsignal(signal.SIGTERM)
    with checkpoint.StopSignals() as signals:
        with pytest.raises(checkpoint.Stopped, match="SIGTERM"):
            with signals.deferred():
                os.kill(os.getpid(), signal.SIGTERM)
                assert signals.received == signal.SIGTERM                        # and the block is finished
                assert {signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)} == {signal.SIG_DFL}
    assert signal.getsignal(signal.SIGTERM) == before


# ------------------------------------------------------------------------------------------------ files
def fill_disk_at_step(step: int) -> None:
    """From this step on no file of more than 50 kB can be written."""
    update = train.Run.update

    def limited(run):
        if run.global_step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        update(run)
    train.Run.update = limited


def test_a_full_disk_leaves_the_last_checkpoint(flags, whole, tmp_path):
    out, printed = tmp_path / "out", tmp_path / "printed"
    assert finish(start([*flags, "--out", out, "--save-every", 2], printed, fill_disk_at_step, 7)) == 2
    said = printed.read_text()
    assert re.search(r"train.py: error: .*checkpoint.safetensors: could not be written: .*File too large", said)
    assert "Traceback" not in said and not list(out.glob("partial-*"))
    assert checkpoint.read_checkpoint(out / "checkpoint.safetensors")[0]["step"] == "6"
    assert finish(start([*flags, "--out", out, "--resume"], printed)) == 0, printed.read_text()
    assert_same(out, whole)


def test_what_cannot_be_written_whole_is_not_there(tmp_path):
    (tmp_path / "result.json").write_text("old")
    with pytest.raises(annotations.InputError, match="result.json: could not be written: .*No space"):
        with checkpoint.written_whole(tmp_path / "result.json") as beside:
            beside.write_text("half")
            raise OSError(28, "No space left on device")
    assert (tmp_path / "result.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(annotations.InputError, match="/dev/full: could not be written: .*No space"):
        checkpoint.append_row("/dev/full", {"epoch": 1})


def test_a_cut_line_of_the_log_and_rows_to_come_again_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    for epoch in (1, 2, 3):
        checkpoint.append_row(path, {"epoch": epoch})
    with open(path, "a") as file:
        file.write('{"epoch": 4, "lo')
    assert [row["epoch"] for row in checkpoint.read_log(path)] == [1, 2, 3]
    checkpoint.trim_log(path, 2)
    assert path.read_text() == '{"epoch": 1}\n{"epoch": 2}\n'


def test_a_run_killed_in_its_first_epoch_is_not_overwritten(flags, whole, tmp_path, capsys):
    shutil.copy(whole / "checkpoint.safetensors", tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    flags = [*flags, "--out", str(tmp_path), "--epochs", "0"]
    assert train.main(flags) == 2
    said = "found checkpoint.safetensors; go on with --resume, start over with --overwrite, or name another folder"
    assert said in capsys.readouterr().err
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    assert train.main([*flags, "--overwrite"]) == 0
    assert checkpoint.read_checkpoint(tmp_path / "checkpoint.safetensors")[0]["step"] == "0"


# ------------------------------------------------------------------------------------------------ non-finite steps
def batches(*bad, value=math.nan):
    """Six batches of named videos; those of the numbers `bad` have a row of `value`."""
    made = [feature_batch([12, 8], seed=i) for i in range(6)]
    for i, batch in enumerate(made):
        batch.windows = [SimpleNamespace(video=SimpleNamespace(name=f"v{i}{x}"), segments=segments, labels=labels)
                         for x, segments, labels in zip("ab", batch.segments, batch.labels)]
    for i in bad:
        made[i].inputs[1, 3] = value
    return Batches(made)


def everything(run) -> dict:
    moments = run.optimizer.state
    return checkpoint.model_state(run.model) | {f"ema.{n}": t for n, t in run.ema.items()} | {
        f"{n}.{k}": t for n, p in run.model.named_parameters() for k, t in moments.get(p, {}).items()}


@pytest.mark.parametrize("accumulate, bad, step", [(1, 2, 2), (2, 3, 1)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_as_if_it_had_been_left_out(make_model, capsys, accumulate, bad, step, value):
    args = run_flags("--skip-non-finite", "--accumulate", str(accumulate))
    runs = [train.Run(make_model(), args, 6) for _ in range(2)]
    update = runs[1].update

    def left_out():
        if runs[1].global_step % (6 // accumulate) != step:
            return update()
        for mean, before in zip(runs[1].running_means(), runs[1].before):
            mean.copy_(before)
        runs[1].optimizer.zero_grad()
        runs[1].global_step, runs[1].pending = runs[1].global_step + 1, []
    runs[1].update = left_out
    for epoch in (vision_only_epoch, vision_language_epoch):
        rows = []
        for run, loader in zip(runs, (batches(bad, value=value), batches())):
            torch.manual_seed(3)
            rows.append(epoch(run, loader))
        assert {**rows[0], "seconds": 0} == {**rows[1], "seconds": 0}            # nor does its loss count in the log
    first, second = map(everything, runs)
    assert set(first) == set(second) and runs[0].global_step == runs[1].global_step
    for name in first:
        assert torch.equal(first[name], second[name]) and first[name].isfinite().all(), name
    assert re.findall(r"skipped step \d+: .*; videos: (.*)", capsys.readouterr().out) == [f"v{bad}a, v{bad}b"] * 2


def test_without_the_flag_it_stops_and_the_checkpoint_is_clean(make_model, tmp_path):
    run = train.Run(make_model(), run_flags(), 6)
    run.out = tmp_path
    with pytest.raises(train.InputError, match="step 3: .*found loss nan, loss_cls nan.*; videos: v2a, v2b; .*--res"):
        vision_only_epoch(run, batches(2))
    header, tensors = checkpoint.read_checkpoint(tmp_path / "checkpoint.safetensors")
    assert all(t.isfinite().all() for t in tensors.values()) and tensors["progress.terms"].shape == (2, 3)
    assert (header["epoch"], header["windows"], header["step"]) == ("0", "3", "3")
    again = train.Run(make_model(), run_flags(), 6)
    train.load_checkpoint(tmp_path / "checkpoint.safetensors", again)
    assert again.batches_done == 3 and math.isfinite(vision_only_epoch(again, Batches(batches()[3:]))["loss"])


def test_a_gradient_that_is_not_finite_counts_too(make_model, capsys):
    run = train.Run(make_model(), run_flags("--skip-non-finite"), 6)
    run.model.project.weight.register_hook(lambda grad: grad * (math.inf if run.global_step == 1 else 1))
    assert math.isfinite(vision_only_epoch(run, batches())["loss"]) and run.global_step == 6
    assert all(t.isfinite().all() for t in everything(run).values())
    said = r"skipped step 2: .*found loss \d.*norm of the gradient (inf|nan); videos: v1a"
    assert re.search(said, capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------ memory, workers, bits
def print_memory(epochs: list) -> None:
    """Print the resident bytes after these epochs. Nothing waits for the disk: other tests are about that."""
    os.fsync, log_epoch = lambda _: None, train.log_epoch

    def logged(out, run, *rest):
        if run.epoch in epochs:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print("resident", pages * resource.getpagesize())
        log_epoch(out, run, *rest)
    train.log_epoch = logged


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="/proc says how much memory a process has")
@pytest.mark.parametrize("epochs, more", [(300, ["--lambda-lang", "0", "--levels", "1"]), (40, [])])
def test_memory_stays_flat(flags, tmp_path, epochs, more):
    flags = [*flags, "--out", tmp_path / "out", "--epochs", epochs, "--leave-out", "v0", "v1", "v2", "v3", *more]
    process = start(flags, tmp_path / "printed", print_memory, [epochs // 5, epochs])
    assert finish(process) == 0
    early, late = map(int, re.findall(r"resident (\d+)", (tmp_path / "printed").read_text()))
    assert late - early < (2 ** 22 if epochs == 300 else 2 ** 24), f"{(late - early) / 2 ** 20:.1f} MiB more"


def test_workers_see_the_epoch_and_the_position_and_give_the_same(flags, make_model):
    training, read = train.load_data(train.get_args(flags))[0], []
    for workers in ("0", "2"):
        run = train.Run(make_model(), run_flags("--workers", workers, "--batch-size", "2"), 3)
        loader = train.make_loader(run, training)
        for run.epoch, run.batches_done in ((0, 0), (1, 1)):
            read.append([(w.start, w.length) for batch in run.batches(loader, "") for w in batch.windows])
    assert read[:2] == read[2:] and [len(windows) for windows in read[:2]] == [VIDEOS, VIDEOS - 2]
    assert set(read[0]) != set(read[1])


@pytest.mark.parametrize("video, resumed", [("v3", False), (f"v{VIDEOS}", True)])
def test_a_worker_that_dies_is_reported_with_its_video(flags, whole, tmp_path, monkeypatch, capsys, video, resumed):
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
    assert re.search(rf"train.py: error: --workers: a process .*reading video {video}: look", error)
    assert "Traceback" not in error


def test_deterministic_runs_are_equal(flags, tmp_path):
    try:
        for out in ("a", "b"):
            assert train.main([*flags, "--deterministic", "--epochs", "2", "--out", str(tmp_path / out)]) == 0
            assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        train.be_deterministic(False)
    assert_same(tmp_path / "a", tmp_path / "b")
