"""experiments/benchmark.py and efficiency.py: the problems have the sizes they claim, the tables all their figures."""
import re
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments import benchmark, efficiency
from experiments.benchmark import Row


def nothing():
    return lambda: None


def test_table_and_exit_code(monkeypatch, capsys):
    rows = [Row("quick thing", [nothing], "1 s (theirs)", 60.0), Row("free thing", [nothing], "-")]
    monkeypatch.setitem(benchmark.TABLES, "detector", (rows, "Notes."))
    assert benchmark.main(["detector"]) == 0
    out = capsys.readouterr().out
    assert "| quick thing | 0 ms | 1 s (theirs) | 60.00 s |" in out and "| free thing | 0 ms | - | - |" in out
    assert "threads" in out.splitlines()[0] and out.endswith("Notes.\n")
    monkeypatch.setitem(benchmark.TABLES, "detector", ([rows[0]._replace(limit=1e-9)], ""))
    assert benchmark.main(["detector"]) == 1 and "(missed)" in capsys.readouterr().out
    both = Row("two things", [nothing, lambda: lambda: time.sleep(0.05)], "2 s (theirs)")    # far apart, whatever the machine does
    monkeypatch.setitem(benchmark.TABLES, "detector", ([both], ""))
    assert benchmark.main(["detector"]) == 0 and re.search(r"2 s \(theirs\); here \d+ ms, ratio 0\.\d\d", capsys.readouterr().out)
    both = both._replace(problems=both.problems[::-1])
    monkeypatch.setitem(benchmark.TABLES, "detector", ([both], ""))
    assert benchmark.main(["detector"]) == 1 and "(missed)" in capsys.readouterr().out
    assert benchmark.main(["detector", "--only", "nothing"]) == 2 and "two things" in capsys.readouterr().err


def test_limits():
    limits = {row.name: row.limit for row in benchmark.DETECTOR}
    assert list(limits.values()) == [10, 1, 10, 0.15] + 3 * [float("inf")]
    assert [len(row.problems) for row in benchmark.DETECTOR] == 5 * [1] + 2 * [2]


def test_metric_problem_has_its_size():
    run = benchmark.metric_problem(videos=6, classes=3, segments=20, thresholds=[0.3, 0.5], per_video=50)
    ground_truth, predictions, _ = run.args
    assert len(ground_truth) == 6 and sum(len(v["labels"]) for v in ground_truth.values()) == 20
    assert all(len(p["labels"]) == len(p["segments"]) == len(p["scores"]) == 50 for p in predictions.values())
    assert all((p["segments"][:, 1] >= p["segments"][:, 0]).all() for p in predictions.values())
    assert 0 < run()["average"] < 1


@pytest.mark.parametrize("hard", [False, True])
def test_nms_problem_has_its_size(hard):
    run = benchmark.nms_problem(hard, classes=3, per_class=100, max_per_video=20)
    segments, scores, labels = run.args
    assert len(segments) == len(scores) == 300 and labels.bincount().tolist() == [100] * 3
    assert (segments[:, 1] > segments[:, 0]).all() and scores.min() >= 0.0 and scores.max() <= 1
    kept = len(run()[0])
    assert 20 < kept < 300 if hard else kept == 20


def test_head_inputs_are_of_the_size_of_actionformer():
    head, features, mask, truth = benchmark.head_inputs(batch=2, length=128, dim=2048)
    assert sum(p.numel() for p in head.parameters()) == 29_251_612      # golden/model/thumos_i3d_params.json
    assert features.shape == (2, 128, 2048) and mask.all() and len(truth.segments) == len(truth.labels) == 2


def test_plain_forward_is_our_head():
    head, features, mask, _ = benchmark.head_inputs(batch=2, length=64, dim=48)
    head.eval()
    with torch.no_grad():
        ours, plain = head(features, features, mask), benchmark.plain_forward(head, features, features, mask)
    for part in ("cls_logits", "offsets", "points", "mask"):
        for a, b in zip(getattr(ours, part), getattr(plain, part), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("forward", benchmark.FORWARDS)
def test_head_problems_run(forward, monkeypatch):
    inputs = benchmark.head_inputs
    monkeypatch.setattr(benchmark, "head_inputs", lambda batch: inputs(batch, length=128, dim=8))
    benchmark.training_problem(forward)()
    assert len(benchmark.inference_problem(forward)()[0]) == 200


@pytest.mark.parametrize("training", [True, False])
def test_video_problem_reads_its_window(training):
    window = benchmark.video_problem(training, seconds=3, window=20)()
    assert window.inputs.shape == (20, 3, 160, 160) and window.inputs.float().std() > 5
    assert (window.inputs[0] != window.inputs[1]).any()                     # the picture moves


def test_feature_problem_reads_its_window():
    threads = torch.get_num_threads()
    assert benchmark.feature_problem(steps=32, width=8)().inputs.shape == (32, 8)
    assert torch.get_num_threads() == threads


def test_full_size_prints_a_row_with_all_its_figures(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    assert benchmark.main(["full-size", "--device", "cpu", "--only", "S-1.5B"]) == 0
    row, = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ActionVLM-S")]
    assert row[0].strip() == "ActionVLM-S-1.5B, reduced" and len(row) == 10 and all(cell.strip() for cell in row)


def test_full_size_takes_the_rows_asked_for_and_says_what_does_not_fit(capsys, monkeypatch):
    def row(vision, qwen, *rest):
        if qwen == "3B":
            raise torch.cuda.OutOfMemoryError("no memory")
        return ["fits"]
    monkeypatch.setattr(efficiency, "full_size_row", row)
    assert benchmark.main(["full-size", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("| ActionVLM-") == 4
    assert benchmark.main(["full-size", "--device", "cpu", "--only", "s-"]) == 0
    out = capsys.readouterr().out
    assert "| ActionVLM-S-1.5B, reduced | fits |" in out and "| ActionVLM-S-3B, reduced | does not fit in 24 GiB |" in out
    assert "ActionVLM-B" not in out and benchmark.main(["full-size", "--only", "nothing"]) == 2


def test_table6_has_a_row_for_every_way(capsys, monkeypatch):
    original = efficiency.random_model
    monkeypatch.setattr(efficiency, "random_model", lambda *args, steps: original(*args, steps=32))
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    assert benchmark.main(["efficiency", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()
            if re.match(r"\| (full|vision)", line)]
    assert [row[0] for row in rows] == ["vision only", "full, frames-first", "full, text-first", "full, cached prompt"]
    assert all(len(row) == 8 and all(row) for row in rows) and rows[0][3] == rows[0][5] == "1.00"
    flops = [float(row[7].split(" / ")[-1]) for row in rows]
    assert flops[0] < flops[3] < 0.5 * flops[1] and flops[1] == flops[2]         # here the prompt is most of the sequence
    assert "1.22 at inference" in out


def test_full_size_on_a_cpu_runs_once():
    assert benchmark.get_args(["full-size", "--device", "cpu", "--size", "full"]).repeats == 1
    assert benchmark.get_args(["full-size", "--device", "cpu"]).repeats == benchmark.REPEATS


def test_memory_is_the_peak_of_the_call():
    args = benchmark.get_args(["full-size", "--device", "cpu"])
    small, large = (efficiency.cost(lambda: torch.ones(n), 0, args).memory for n in (1, 2**26))           # 256 MiB
    assert small == large == "-" or float(large.split()[0]) > float(small.split()[0]) + 0.2


@pytest.fixture(scope="module")
def model():
    return efficiency.random_model("S", "1.5B", benchmark.get_args(["full-size", "--device", "cpu"]))


def real_flops(function, *args):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("way", ["vision only", "frames-first", "text-first"])
def test_flops_are_those_of_a_step_without_recomputation(model, way):
    state, batch = model
    step = (efficiency.train_step, state.model, batch, way, lambda total, *_, **__: total.backward())
    counted = efficiency.count_flops(*step)
    assert counted < real_flops(*step)                                      # which computes activations again
    recomputing = [m for m in state.model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in recomputing:
        module.gradient_checkpointing = False
    assert counted == pytest.approx(real_flops(*step), rel=1e-4)
    for module in recomputing:
        module.gradient_checkpointing = True


def test_flops_of_inference_are_those_of_a_call(model):
    state, batch = model
    args = benchmark.get_args(["full-size", "--device", "cpu"])
    flops = {}
    for way in ("vision only", "frames-first", "text-first", "cached prompt"):
        flops[way] = efficiency.inference(state.model, batch, way, args).flops
        with torch.no_grad():
            assert flops[way] == real_flops(state.model, batch, way != "vision only")
    assert flops["vision only"] < flops["cached prompt"] < flops["text-first"] == flops["frames-first"]
