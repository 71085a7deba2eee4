"""experiments/benchmark.py: the tables have all their figures; memory and FLOPs are those of the call."""
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from experiments import benchmark

ARGS = SimpleNamespace(device="cpu", size="reduced", repeats=1, compile=False, inference=False, language_stride=[1])


def rows_of(out):
    """The cells of the table's rows."""
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]


@pytest.fixture
def once(monkeypatch):
    """Every call runs once and is said to take a second."""
    monkeypatch.setattr(benchmark.timeit, "repeat", lambda call, repeat, number: [9.0, 1.0 + 0 * bool(call())])


def test_efficiency_has_a_row_for_every_way(once, capsys):
    """Inference alone; the other tests look at training steps."""
    benchmark.main(["efficiency", "--device", "cpu", "--inference", "--language-stride", "1", "16"])
    out = capsys.readouterr().out
    rows, (alone, *ways) = rows_of(out), benchmark.LAYOUTS
    names = [[f"ActionVLM-S-3B, {alone}", "1"], *([f"ActionVLM-S-3B, {way}", K] for way in ways for K in ("1", "16"))]
    assert "threads" in out.splitlines()[0] and [row[:2] for row in rows] == names
    assert all(len(row) == 10 and row[2:6] == ["-"] * 4 and row[6:8] == ["1.000 s", "1.00"] for row in rows)
    flops = [float(row[9]) for row in rows]
    assert flops[0] < flops[5] < 0.5 * flops[1] and flops[1] == flops[3]         # here the prompt is most of the sequence
    assert flops[6] - flops[0] < (flops[5] - flops[0]) / 8                       # K = 16


def test_ratio_of_training_is_that_of_both_kinds_of_epoch(monkeypatch):
    seconds = {benchmark.ALONE: 2.0, benchmark.FULL: 6.0, "full, text-first": 4.0, benchmark.KEPT: 3.0}
    state = SimpleNamespace(model=SimpleNamespace(language=SimpleNamespace()))
    monkeypatch.setattr(benchmark, "random_model", lambda *_: (state, None))
    monkeypatch.setattr(benchmark, "measure", lambda state, batch, way, *_: (seconds[way], "1 GiB", 2))
    rows = list(benchmark.cost_of_language("S-3B", ARGS))
    assert [row[3] for row in rows] == ["1.00", "2.00", "1.50", "-"] and [row[7] for row in rows] == ["1.00", "3.00", "2.00", "1.50"]


def test_full_size_has_the_models_of_the_paper_or_one(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "cost_of_language", lambda name, args: [[name, str(args.repeats)]])
    for flags, rows in (([], [[name, "5"] for name in ("S-1.5B", "S-3B", "B-1.5B", "B-3B")]),
                        (["--only", "B-3B", "--size", "full"], [["B-3B", "1"]])):
        benchmark.main(["full-size", "--device", "cpu", *flags])
        assert rows_of(capsys.readouterr().out) == rows


@pytest.fixture(scope="module")
def model():
    return benchmark.random_model("S", "1.5B", benchmark.FULL, ARGS)


def test_a_time_is_the_median_of_the_calls_after_the_first(model, monkeypatch):
    asked = []
    monkeypatch.setattr(benchmark.timeit, "repeat", lambda call, repeat, number: asked.append((repeat, number)) or [99, 3, 1, 2])
    assert benchmark.measure(*model, benchmark.ALONE, False, ARGS)[0] == 2 and asked == [(2, 1)]


def test_memory_is_the_peak_of_the_call(model, monkeypatch):
    state, batch = model
    small = benchmark.measure(state, batch, benchmark.ALONE, False, ARGS)[1]
    with monkeypatch.context() as patched:
        patched.setattr(benchmark.timeit, "repeat", lambda *_, **__: [0, torch.ones(2**26).sum().item()])        # 256 MiB
        large = benchmark.measure(state, batch, benchmark.ALONE, False, ARGS)[1]
    assert float(large.split()[0]) > float(small.split()[0]) + 0.1 or not Path("/proc/self/clear_refs").exists()


def real_tflops(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops() / 1e12


@pytest.mark.parametrize("way", [benchmark.ALONE, "full, text-first", benchmark.KEPT])
def test_flops_are_those_of_a_real_call_without_recomputation(model, way):
    """Twice: of a training step, and of inference."""
    state, batch = model
    net = state.model
    if way != benchmark.KEPT:
        counted = benchmark.measure(state, batch, way, True, ARGS)[2]
        epoch = train.vision_only_epoch if way == benchmark.ALONE else train.vision_language_epoch
        step = (epoch, net, [batch], lambda total, *_, **__: total.backward())
        assert counted < real_tflops(*step)                                     # which computes activations again
        recomputing = [m for m in net.modules() if getattr(m, "gradient_checkpointing", False)]
        for module in recomputing:
            module.gradient_checkpointing = False
        assert counted == pytest.approx(real_tflops(*step), rel=1e-4)
        for module in recomputing:
            module.gradient_checkpointing = True
    counted = benchmark.measure(state, batch, way, False, ARGS)[2]
    with torch.no_grad():
        assert counted == real_tflops(net, batch, way != benchmark.ALONE) > 0


def test_flops_count_the_attention_of_a_cpu_once(model):
    """Two products of 2 B H N N d forward; five backward, one of which computes the scores again."""
    benchmark.measure(*model, benchmark.ALONE, False, ARGS)                     # tells torch's counter
    q, k, v = torch.randn(3, 2, 4, 32, 8, requires_grad=True)
    product = 2 * 2 * 4 * 32 * 32 * 8 / 1e12

    def forward():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert real_tflops(forward) == pytest.approx(2 * product)
    assert real_tflops(lambda: forward().sum().backward()) == pytest.approx(7 * product)
