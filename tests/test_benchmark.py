"""benchmark.py: the problems have the sizes they claim, and the table says what was missed."""
import re
import time

import pytest
import torch

import benchmark
from benchmark import Row


def test_table_and_exit_code(monkeypatch, capsys):
    rows = [Row("quick thing", lambda: lambda: None, "1 s (theirs)", 60.0),
            Row("free thing", lambda: lambda: None, "-", float("inf"))]
    monkeypatch.setitem(benchmark.BENCHMARKS, "detector", (rows, "Notes."))
    assert benchmark.main(["detector"]) == 0
    out = capsys.readouterr().out
    assert "| quick thing | 0 ms | 1 s (theirs) | 60.00 s |" in out and "| free thing | 0 ms | - | - |" in out
    assert "threads" in out.splitlines()[0]
    monkeypatch.setitem(benchmark.BENCHMARKS, "detector", ([rows[0]._replace(limit=1e-9)], ""))
    assert benchmark.main(["detector"]) == 1 and "(missed)" in capsys.readouterr().out
    both = Row("two things", lambda: (lambda: None, lambda: time.sleep(0.05)), "2 s (theirs)")    # far apart, whatever the machine does
    monkeypatch.setitem(benchmark.BENCHMARKS, "detector", ([both], ""))
    assert benchmark.main(["detector"]) == 0 and re.search(r"2 s \(theirs\); here \d+ ms, ratio 0\.\d\d", capsys.readouterr().out)
    assert benchmark.main(["detector", "--only", "nothing"]) == 2 and "two things" in capsys.readouterr().err


def test_metric_problem_has_its_size():
    run = benchmark.metric_problem(videos=6, classes=3, segments=20, per_video=50, thresholds=[0.3, 0.5])
    ground_truth, predictions, _ = run.args
    assert len(ground_truth) == 6 and sum(len(v["labels"]) for v in ground_truth.values()) == 20
    assert all(len(p["labels"]) == len(p["segments"]) == len(p["scores"]) == 50 for p in predictions.values())
    assert all((p["segments"][:, 1] >= p["segments"][:, 0]).all() for p in predictions.values())
    assert 0 < run()["average"] < 1


@pytest.mark.parametrize("uniform", [False, True])
def test_nms_problem_has_its_size(uniform):
    run = benchmark.nms_problem(uniform, classes=3, per_class=100, max_per_video=20)
    segments, scores, labels = run.args
    assert len(segments) == len(scores) == 300 and labels.bincount().tolist() == [100] * 3
    assert (segments[:, 1] > segments[:, 0]).all() and scores.min() >= 0.0 and scores.max() <= 1
    kept = len(run()[0])
    assert kept == 20 if not uniform else 20 < kept < 300


def test_head_inputs_are_of_the_size_of_actionformer():
    head, features, mask, segments, labels = benchmark.head_inputs(batch=2, length=128, dim=2048)
    assert sum(p.numel() for p in head.parameters()) == 29_251_612      # golden/model/thumos_i3d_params.json
    assert features.shape == (2, 128, 2048) and mask.all() and len(segments) == len(labels) == 2


def test_plain_forward_is_our_head():
    head, features, mask, _, _ = benchmark.head_inputs(batch=2, length=64, dim=48)
    head.eval()
    with torch.no_grad():
        ours, plain = benchmark.our_forward(head, features, mask), benchmark.plain_forward(head, features, mask)
    for part in ("cls_logits", "offsets", "points", "mask"):
        for a, b in zip(getattr(ours, part), getattr(plain, part), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


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
    row, = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ActionVLM")]
    assert row[0].strip() == "ActionVLM-S-1.5B, reduced" and len(row) == 9 and all(cell.strip() for cell in row)


def test_full_size_takes_the_rows_asked_for_and_says_what_does_not_fit(capsys, monkeypatch):
    def row(vision, qwen, *rest):
        if qwen == "3B":
            raise torch.cuda.OutOfMemoryError("no memory")
        return "fits |"
    monkeypatch.setattr(benchmark, "full_size_row", row)
    assert benchmark.main(["full-size", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("| ActionVLM-") == 4
    assert benchmark.main(["full-size", "--device", "cpu", "--only", "s-"]) == 0
    out = capsys.readouterr().out
    assert "| ActionVLM-S-1.5B, reduced | fits |" in out and "| ActionVLM-S-3B, reduced | does not fit in 24 GiB |" in out
    assert "ActionVLM-B" not in out and benchmark.main(["full-size", "--only", "nothing"]) == 2


def test_table6_has_a_row_for_every_way_and_names_the_kernels(capsys, monkeypatch):
    original = benchmark.random_run
    monkeypatch.setattr(benchmark, "random_run", lambda *args, **kwargs: original(*args, **(kwargs | {"L": 32})))
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    assert benchmark.main(["efficiency", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()
            if re.match(r"\| (full|vision)", line)]
    assert [row[0] for row in rows] == ["vision only", "full, frames-first", "full, text-first",
                                        "full, text-first, cached prompt"]
    assert all(len(row) == 8 and all(row) for row in rows) and rows[0][3] == rows[0][5] == "1.00"
    flops = [float(row[7].split(" / ")[-1]) for row in rows]
    assert flops[0] < flops[3] < 0.5 * flops[1] and flops[1] == flops[2]         # here the prompt is most of the sequence
    assert out.count(": aten::_scaled_dot_product_flash_attention_for_cpu") == 4 and "1.22 at inference" in out


def test_peak_memory_sees_what_a_call_takes():
    small, large = (benchmark.peak_memory(lambda: torch.ones(n), "cpu") for n in (1, 2**26))           # 256 MiB
    assert small == large == "-" or float(large.split()[0]) > float(small.split()[0]) + 0.2


def test_peak_memory_makes_the_call_where_nothing_tells_the_memory(monkeypatch):
    called = []
    monkeypatch.setattr(benchmark.ctypes, "CDLL", lambda name: object())            # another C library than glibc
    assert benchmark.peak_memory(lambda: called.append(1), "cpu") == "-" and called == [1]


def test_model_flops_are_those_of_a_step_without_recomputation():
    run, batch = benchmark.random_run("S", "1.5B", benchmark.get_args(["full-size", "--device", "cpu"]))
    for use_language in (True, False):
        counted = benchmark.model_flops(run, batch, use_language, training=True)
        assert counted < benchmark.count_flops(lambda: benchmark.train_step(run, batch, use_language))
        for module in run.model.modules():
            module.gradient_checkpointing = False
        assert counted == pytest.approx(benchmark.count_flops(lambda: benchmark.train_step(run, batch, use_language)), rel=1e-4)
        run.model.checkpointing()


def test_model_flops_of_inference_are_those_of_a_call():
    run, batch = benchmark.random_run("S", "1.5B", benchmark.get_args(["full-size", "--device", "cpu"]))
    prompt = []
    benchmark.inference(run, batch, layout="text-first", cached=prompt)
    for how in ({"use_language": False}, {}, {"layout": "text-first", "cached": prompt}):
        counted = benchmark.count_flops(lambda: benchmark.inference(run, batch, **how))
        assert counted > 0 and benchmark.model_flops(run, batch, **how) == counted
