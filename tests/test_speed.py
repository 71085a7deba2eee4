"""tests/speed.py: the problems have the sizes they claim, and a row that is too slow is one."""
import re
import time

import pytest
import speed
import torch

import head
from head import DetectionHead

def nothing():
    return [lambda: None]


def use(monkeypatch, *rows):
    monkeypatch.setattr(speed, "DETECTOR", list(rows))


def rows_of(out):
    """The cells of the table's rows."""
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:]]


def test_table_and_exit_code(monkeypatch, capsys):
    use(monkeypatch, ("quick thing", nothing, "1 s (theirs)", 60.0))
    assert speed.main([]) == 0
    out = capsys.readouterr().out
    assert "threads" in out.splitlines()[0] and rows_of(out) == [["quick thing", "0 ms", "1 s (theirs)", "60.00 s"]]
    use(monkeypatch, ("quick thing", nothing, "1 s (theirs)", 1e-9), ("free thing", nothing, "-", 60.0))
    assert speed.main([]) == 1 and capsys.readouterr().out.count("(missed)") == 1
    both = [lambda: None, lambda: time.sleep(0.05)]                         # far apart, whatever the machine does
    use(monkeypatch, ("two things", lambda: both, "2 s (theirs)", 0))
    assert speed.main([]) == 0 and re.search(r"2 s \(theirs\); here \d+ ms, ratio 0\.\d\d", capsys.readouterr().out)
    use(monkeypatch, ("two things", lambda: both[::-1], "2 s (theirs)", 0))
    assert speed.main([]) == 1 and "(missed)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        speed.main(["--only", "nothing"])
    assert end.value.code == 2 and "two things" in capsys.readouterr().err


def test_limits():
    assert [limit for *_, limit in speed.DETECTOR] == [10, 1, 10, 0.15, 0, 0]


def test_metric_problem_has_its_size():
    run, = speed.metric_problem(videos=6, classes=3, segments=20, thresholds=[0.3, 0.5], per_video=50)
    ground_truth, predictions, _ = run.args
    assert len(ground_truth) == 6 and sum(len(v["labels"]) for v in ground_truth.values()) == 20
    assert all(len(p["labels"]) == len(p["segments"]) == len(p["scores"]) == 50 for p in predictions.values())
    assert all((p["segments"][:, 1] >= p["segments"][:, 0]).all() for p in predictions.values())
    assert 0 < run()["average"] < 1


def test_nms_problem_has_its_size():
    run, = speed.nms_problem(classes=3, per_class=200)
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
    ours, plain = speed.head_problem(training, length=128)
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
        plain = speed.plain_forward(own, f, f, mask)
    for part in ("cls_logits", "offsets", "points", "mask"):
        for a, b in zip(getattr(ours, part), getattr(plain, part), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
