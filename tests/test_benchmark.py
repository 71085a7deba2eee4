"""experiments/benchmark.py: the problems have the sizes they claim, the tables all their figures."""
import re
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import head
import train
from experiments import benchmark
from head import DetectionHead

ARGS = SimpleNamespace(device="cpu", size="reduced", repeats=1, compile=False)


def nothing():
    return [lambda: None]


def use(monkeypatch, *rows):
    compare, _, columns = benchmark.TABLES["detector"]
    monkeypatch.setitem(benchmark.TABLES, "detector", (compare, list(rows), columns))


def rows_of(out):
    """The cells of the table's rows."""
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]


def test_table_and_exit_code(monkeypatch, capsys):
    use(monkeypatch, ("quick thing", nothing, "1 s (theirs)", 60.0))
    assert benchmark.main(["detector"]) == 0
    out = capsys.readouterr().out
    assert "threads" in out.splitlines()[0] and rows_of(out) == [["quick thing", "0 ms", "1 s (theirs)", "60.00 s"]]
    use(monkeypatch, ("quick thing", nothing, "1 s (theirs)", 1e-9), ("free thing", nothing, "-", 60.0))
    assert benchmark.main(["detector"]) == 1 and capsys.readouterr().out.count("(missed)") == 1
    both = [lambda: None, lambda: time.sleep(0.05)]                         # far apart, whatever the machine does
    use(monkeypatch, ("two things", lambda: both, "2 s (theirs)", 0))
    assert benchmark.main(["detector"]) == 0 and re.search(r"2 s \(theirs\); here \d+ ms, ratio 0\.\d\d", capsys.readouterr().out)
    use(monkeypatch, ("two things", lambda: both[::-1], "2 s (theirs)", 0))
    assert benchmark.main(["detector"]) == 1 and "(missed)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        benchmark.main(["detector", "--only", "nothing"])
    assert end.value.code == 2 and "two things" in capsys.readouterr().err


def test_limits():
    assert [limit for *_, limit in benchmark.DETECTOR] == [10, 1, 10, 0.15, 0, 0]


def test_metric_problem_has_its_size():
    run, = benchmark.metric_problem(videos=6, classes=3, segments=20, thresholds=[0.3, 0.5], per_video=50)
    ground_truth, predictions, _ = run.args
    assert len(ground_truth) == 6 and sum(len(v["labels"]) for v in ground_truth.values()) == 20
    assert all(len(p["labels"]) == len(p["segments"]) == len(p["scores"]) == 50 for p in predictions.values())
    assert all((p["segments"][:, 1] >= p["segments"][:, 0]).all() for p in predictions.values())
    assert 0 < run()["average"] < 1


def test_nms_problem_has_its_size():
    run, = benchmark.nms_problem(classes=3, per_class=200)
    segments, scores, labels = run.args
    assert len(segments) == len(scores) == 600 and labels.bincount().tolist() == [200] * 3
    assert (segments[:, 1] > segments[:, 0]).all() and scores.min() >= 0.001 and scores.max() <= 1
    assert len(run()[0]) == 200


@pytest.mark.parametrize("training", [True, False])
def test_head_problems_run_and_are_of_the_size_of_actionformer(training, monkeypatch):
    seen = []

    def forward(own, f_cls, f_loc, mask):
        seen.append((own, f_cls.shape))
        return original(own, f_cls, f_loc, mask)
    original = DetectionHead.forward
    monkeypatch.setattr(DetectionHead, "forward", forward)
    ours, plain = benchmark.head_problem(training, length=128)
    results = [ours(), plain()]
    (own, shape), = seen                                                   # the plain head has arithmetic of its own
    assert sum(p.numel() for p in own.parameters()) == 29_251_612          # golden/model/thumos_i3d_params.json
    assert shape == (2 if training else 1, 128, 2048) and own.training == training
    assert training or [len(r[0]) for r in results] == [200, 200]


def test_plain_forward_is_our_head_without_padding(monkeypatch):
    """On padding they differ: ActionFormer masks the outputs of its convolutions, and ours the inputs."""
    torch.manual_seed(0)
    own = DetectionHead(48, 20).eval()
    f, mask = torch.randn(2, 64, 48), torch.ones(2, 64, dtype=torch.bool)
    with torch.no_grad():
        ours = own(f, f, mask)
        monkeypatch.setattr(head, "channels_last_conv", None)              # the plain head does without
        plain = benchmark.plain_forward(own, f, f, mask)
    for part in ("cls_logits", "offsets", "points", "mask"):
        for a, b in zip(getattr(ours, part), getattr(plain, part), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.fixture
def once(monkeypatch):
    """Every call runs once and is said to take a second."""
    def run(calls, args):
        for call in calls:
            call()
        return [1.0] * len(calls)
    monkeypatch.setattr(benchmark, "median_times", run)


def test_full_size_prints_a_row_with_all_its_figures(once, capsys):
    assert benchmark.main(["full-size", "--device", "cpu", "--only", "S-1.5B"]) == 0
    row, = rows_of(capsys.readouterr().out)
    assert row[0] == "ActionVLM-S-1.5B, reduced" and len(row) == 9 and all(row) and row[6].count(" / ") == 2


def test_full_size_takes_the_rows_asked_for_and_says_what_does_not_fit(capsys, monkeypatch):
    def random_model(vision, qwen, args):
        if qwen == "3B":
            raise torch.OutOfMemoryError("no memory")
        return None, None
    monkeypatch.setattr(benchmark, "random_model", random_model)
    monkeypatch.setattr(benchmark, "full_size_cells", lambda *_: ["fits"])
    assert benchmark.main(["full-size", "--device", "cpu"]) == 0
    assert len(rows_of(capsys.readouterr().out)) == 4
    assert benchmark.main(["full-size", "--device", "cpu", "--only", "s-"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows == [["ActionVLM-S-1.5B, reduced", "fits"], ["ActionVLM-S-3B, reduced", "does not fit"] + ["-"] * 7]


def test_table6_has_a_row_for_every_way_and_tells_its_attention(once, capsys):
    assert benchmark.main(["efficiency", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert [row[0] for row in rows] == list(benchmark.LAYOUTS)
    assert all(len(row) == 8 and all(row) for row in rows) and rows[0][3] == rows[0][5] == "1.00"
    assert rows[3][1:4] == ["-"] * 3 and rows[3][6][0] == rows[3][7][0] == "-"
    flops = [float(row[7].split(" / ")[-1]) for row in rows]
    assert flops[0] < flops[3] < 0.5 * flops[1] and flops[1] == flops[2]         # here the prompt is most of the sequence
    for way in benchmark.LAYOUTS:
        assert re.search(rf"\* {way}: .*attention", out)


def test_full_size_on_a_cpu_runs_once(monkeypatch):
    seen = []
    monkeypatch.setitem(benchmark.TABLES, "full-size", (lambda args: seen.append(args.repeats) or [], benchmark.MODELS, "model"))
    benchmark.main(["full-size", "--device", "cpu", "--size", "full"])
    benchmark.main(["full-size", "--device", "cpu"])
    assert seen == [1, 5]


@pytest.fixture(scope="module")
def model():
    return benchmark.random_model("S", "1.5B", ARGS)


def test_memory_is_the_peak_of_the_call(model, monkeypatch):
    state, batch = model
    small = benchmark.measure(state, batch, benchmark.ALONE, False, ARGS).memory
    with monkeypatch.context() as patched:
        patched.setattr(benchmark, "median_times", lambda *_: [torch.ones(2**26).sum().item()])        # 256 MiB
        large = benchmark.measure(state, batch, benchmark.ALONE, False, ARGS).memory
    assert small == large == "-" or float(large.split()[0]) > float(small.split()[0]) + 0.1


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
        counted = benchmark.measure(state, batch, way, True, ARGS).tflops
        epoch = train.vision_only_epoch if way == benchmark.ALONE else train.vision_language_epoch
        step = (epoch, net, [batch], lambda total, *_, **__: total.backward())
        assert counted < real_tflops(*step)                                     # which computes activations again
        recomputing = [m for m in net.modules() if getattr(m, "gradient_checkpointing", False)]
        for module in recomputing:
            module.gradient_checkpointing = False
        assert counted == pytest.approx(real_tflops(*step), rel=1e-4)
        for module in recomputing:
            module.gradient_checkpointing = True
    counted = benchmark.measure(state, batch, way, False, ARGS).tflops
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
