"""Pictures: a class keeps its colour, lambda its axis, Figure 4 its rows."""
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest

import train
from evaluate import Detections
from experiments import figures
from support.annotations import Video
from support.demo import make_demo
from support.figures import timeline

DESCRIPTIONS = {"a": "first", "b": "second", "c": "third"}


def found(labels, weight=None):
    rows = dict(segments=np.array([[i, i + 1.0] for i in range(len(labels))]).reshape(-1, 2), labels=labels,
                scores=np.full(len(labels), 0.9))
    series = {} if weight is None else {"v": np.array(weight)}
    return Detections({"v": rows}, series, {"v": -np.array(weight or [0.0])})


def drawn(detections, labels=("b",), tmp=None):
    np.save(tmp / "v.npy", np.eye(4, dtype=np.float32))
    video = Video("v", 4.0, 1.0, segments=np.array([[0.0, 1.0]] * len(labels)), labels=list(labels), path=tmp / "v.npy")
    figure = matplotlib.figure.Figure()
    timeline(figure, video, detections, DESCRIPTIONS, 0.3)
    return figure.axes


def test_a_class_has_one_colour_in_all_pictures(tmp_path):
    one, other = drawn({"x": found(["a", "b"])}, tmp=tmp_path), drawn({"x": found(["c", "b"])}, ["b", "c"], tmp=tmp_path)
    assert one[2].patches[1].get_facecolor() == other[2].patches[1].get_facecolor() == one[1].patches[0].get_facecolor()
    assert one[2].patches[0].get_facecolor() != other[2].patches[0].get_facecolor()


def test_the_axis_of_lambda_ends_at_its_highest_value_beside_the_advantage(tmp_path):
    axes = drawn({"x": found(["a"], [0.0, 0.002, 0.01, 0.0])}, tmp=tmp_path)
    assert axes[3].get_ylim() == pytest.approx((0, 0.0105)) and axes[3].get_ylabel() == r"$\lambda_{lang}$"
    assert axes[4].get_ylabel() == "predicted advantage"
    np.testing.assert_array_equal(axes[4].lines[0].get_ydata(), [0, -0.002, -0.01, 0])
    silent = drawn({"x": found(["a"], [0.0] * 4)}, tmp=tmp_path)
    assert silent[3].get_ylim()[1] > 0
    alone = drawn({"x": found(["a"])}, tmp=tmp_path)
    assert len(alone) == 4 and alone[3].texts[0].get_text() == "vision only"


def test_a_row_for_every_model(tmp_path):
    axes = drawn({"one": found(["a"]), "two": found([], [0.5] * 4)}, tmp=tmp_path)
    assert [axis.get_ylabel() for axis in axes[:5]] == ["frames", "truth", "one", "two", r"$\lambda_{lang}$"]
    assert len(axes[2].patches) == 1 and not axes[3].patches


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of an untrained full and vision-only model of a small demo."""
    folder = tmp_path_factory.mktemp("figures")
    make_demo(folder / "data", train=1, test=1, incomplete=1)
    flags = ["--videos", folder / "data/videos", "--annotations", folder / "data/annotations.json",
             "--descriptions", folder / "data/descriptions.json", "--epochs", 0, "--device", "cpu", "--max-per-video", 5]
    for name, more in (("full", []), ("vision-only", ["--lambda-lang", 0])):
        assert train.main([*map(str, [*flags, *more, "--out", folder / name])]) == 0
    return folder


def test_figure4_draws_the_answers_vision_only_and_full_under_each_other(runs, tmp_path, monkeypatch, capsys):
    rows = {}
    monkeypatch.setattr(figures, "one_video", lambda path, video, found, *_: rows.update(found) or Path(path).touch())
    monkeypatch.setattr(figures, "answer", lambda model, dataset, args: ("answers", []))
    flags = ["--checkpoint", str(runs / "full"), str(runs / "vision-only"), "--out", str(tmp_path), "--device", "cpu"]
    assert figures.main([*flags, "--video", "test_000", "--qa"]) == 0
    assert list(rows) == ["question answering", "vision only", "full"] and rows["question answering"].predictions == "answers"
    assert (tmp_path / "figure4-test_000.png").exists() and "wrote" in capsys.readouterr().out


def test_figure4_of_a_file_and_of_nothing(runs, tmp_path, capsys):
    flags = ["--checkpoint", str(runs / "vision-only"), "--out", str(tmp_path), "--device", "cpu", "--video"]
    assert figures.main([*flags, str(runs / "data/videos/test_000.mp4")]) == 0
    assert (tmp_path / "figure4-test_000.png").read_bytes()[:4] == b"\x89PNG"
    assert figures.main([*flags, "nowhere"]) == 2
    assert "--video nowhere: expected a file, or a video of the test set, found neither" in capsys.readouterr().err
    assert figures.main([*flags, "test_000", "--qa"]) == 2
    assert "--qa: expected a checkpoint with language" in capsys.readouterr().err
