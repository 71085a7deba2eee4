"""Modality bias: LAP, mLA, Table 3 and Table 5, by hand and by the command."""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
import train
from experiments import bias
from support.annotations import InputError, Video
from support.demo import make_demo


# ---------------------------------------------------------------- LAP and mLA
def test_lap_is_the_relative_drop():
    assert bias.language_advantage_on_performance(0.72, 0.7) == pytest.approx(0.02 / 0.72)
    assert bias.language_advantage_on_performance(0.5, 0.5) == bias.language_advantage_on_performance(0, 0) == 0


@pytest.mark.parametrize("n", [2, 3, 6, 7])
def test_unmatched_descriptions_are_a_derangement(n):
    descriptions = {f"label {i}": f"sentence {i}" for i in range(n)}
    unmatched = bias.unmatched_descriptions(descriptions)
    assert list(unmatched) == list(descriptions) and sorted(unmatched.values()) == sorted(descriptions.values())
    assert all(unmatched[label] != descriptions[label] for label in descriptions)


def test_mla_by_hand():
    video = Video("v", 10.0, 1.0, segments=np.array([[1.0, 6.0], [2.0, 3.0]]), labels=["a", "b"])
    dataset = SimpleNamespace(videos=[video], stride=1, num_frames=0, classes={"a": 0, "b": 1, "c": 2})
    series = {"v": np.arange(10.0)}
    assert bias.mean_language_advantage(series, dataset, ["a"]) == np.mean([1, 4, 5, 6])
    assert bias.mean_language_advantage(series, dataset, ["b"]) == 2.5
    assert bias.mean_language_advantage(series, dataset, ["all"]) == 3.5
    assert np.isnan(bias.mean_language_advantage(series, dataset, ["c"]))


# ---------------------------------------------------------------- Table 3
def groups_flags(*words, easy=0.85, hard=0.5):
    return SimpleNamespace(groups=list(words), easy=easy, hard=hard)


def test_table3_groups_by_the_reference_and_by_the_paper():
    reference = {"a": 0.9, "b": 0.85, "c": 0.5, "d": 0.49}
    assert bias.group_by_difficulty(list("abcd"), reference, groups_flags("f")) == {
        "easy": ["a", "b"], "medium": ["c"], "hard": ["d"]}
    names = ["Billiards", "Diving", "LongJump", "FrisbeeCatch"]
    assert bias.group_by_difficulty(names, None, groups_flags("thumos14")) == {
        "easy": ["LongJump"], "medium": ["Diving"], "hard": ["Billiards", "FrisbeeCatch"]}
    with pytest.raises(InputError, match="--groups: .* none for e"):
        bias.group_by_difficulty(["a", "e"], reference, groups_flags("f"))


def test_table3_rows_by_hand():
    result = {"classes": ["a", "b", "c"], "AP": np.array([[0.8, 0.4, 0.2], [0.6, 0.2, 0.0]])}
    video = Video("v", 4.0, 1.0, segments=np.array([[0.0, 2.0], [2.0, 4.0]]), labels=["a", "c"])
    dataset = SimpleNamespace(videos=[video], stride=1, num_frames=0, classes={"a": 0, "b": 1, "c": 2})
    groups = {"easy": ["a", "b"], "medium": [], "hard": ["c"]}
    advantage = {"v": np.array([.1, .3, .5, .7])}
    rows = bias.score_groups(groups, result, {"a": 0.5, "b": 0.3, "c": 0.3}, advantage, dataset)
    np.testing.assert_allclose([rows[level][key] for level in ("easy", "hard") for key in ("mAP", "gain")], [.5, .1, .1, -.2])
    # Step 2 is at the end of the one and at the start of the other action: frame_classes gives it to the first.
    assert rows["hard"]["mLA"] > rows["easy"]["mLA"] > 0
    assert rows["medium"] == {"classes": [], "mAP": None, "gain": None, "mLA": None}
    lines = bias.format_groups(rows).splitlines()
    assert lines[2].startswith("| easy | 50.00 | +10.00 |") and lines[3] == "| medium | - | - | - |  |"
    assert bias.score_groups(groups, result, None, {}, dataset)["hard"]["gain"] is None


@pytest.mark.parametrize("content, message", [('{"AP": {"a": 1}}', "list of numbers"), ("{}", "AP"), ("[", "JSON")])
def test_table3_reference_that_is_none(tmp_path, content, message):
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(InputError, match=message):
        bias.read_reference([str(tmp_path / "f.json")])
    with pytest.raises(InputError, match="found a b"):
        bias.read_reference(["a", "b"])
    assert bias.read_reference(["thumos14"]) is None and bias.read_reference([]) is None


# ---------------------------------------------------------------- Table 5
def test_table5_ambiguity_metrics_by_hand():
    predictions = {
        "v": {"segments": np.array([[0, 2], [1, 5], [2, 4.0]]), "labels": ["a", "a", "b"], "scores": np.array([0.2, 0.6, 0.9])},
        "w": {"segments": np.array([[0, 4.0]]), "labels": ["a"], "scores": np.array([0.4])}}
    clips = [("v", "a", 0, 4),          # best of a: 1-5, three quarters of the clip
             ("v", "b", 3, 5),          # 2-4, half
             ("w", "a", 4, 8),          # touches only: not detected
             ("u", "a", 0, 1)]          # a video without detections
    metrics = bias.ambiguity_metrics(predictions, clips)
    assert list(metrics) == ["mConf", "mLen", "acc@0.3", "acc@0.5", "acc@0.7"]
    np.testing.assert_allclose(list(metrics.values()), [1.5 / 4, 1.25 / 4, 0.5, 0.5, 0.75])        # below 0.5, not at it
    none = bias.ambiguity_metrics(predictions, [])
    assert list(none) == list(metrics) and all(np.isnan(value) for value in none.values())


# ---------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{"full", "vision-only": folder of an untrained model} of a small demo."""
    folder = tmp_path_factory.mktemp("bias")
    make_demo(folder / "data", train=2, test=2, incomplete=2)
    flags = ["--videos", folder / "data/videos", "--annotations", folder / "data/annotations.json",
             "--descriptions", folder / "data/descriptions.json", "--epochs", 0, "--device", "cpu"]
    for name, more in (("full", []), ("vision-only", ["--lambda-lang", 0])):
        assert train.main([*map(str, [*flags, *more, "--out", folder / name])]) == 0
    return {name: folder / name for name in ("full", "vision-only")}


def command(run, *flags):
    return bias.main(["--checkpoint", str(run), "--device", "cpu", *map(str, flags)])


def test_bias_gives_lap_and_mla(runs, tmp_path, capsys):
    assert command(runs["full"], "--out", tmp_path, "--json", tmp_path / "f.json", "--tiou", "0.1") == 0
    printed = capsys.readouterr().out
    assert "| mAP" in printed and re.search(r"with unmatched descriptions .* LAP -?\d", printed) and "mLA: all " in printed
    figures = json.loads((tmp_path / "f.json").read_text())
    assert set(figures["mLA"]) == {"all", *figures["AP"]} and isinstance(figures["LAP"], float)
    assert figures["tiou"] == [0.1] and {p.name for p in tmp_path.iterdir()} == {"f.json", "result.json"}
    assert (tmp_path / "result.json").read_bytes() == (runs["full"] / "result.json").read_bytes()     # of the matched ones


def test_table3_needs_no_language(runs, tmp_path, capsys):
    reference = tmp_path / "reference.json"
    assert evaluate.main(["--checkpoint", str(runs["vision-only"]), "--device", "cpu", "--json", str(reference)]) == 0
    groups = ["--groups", reference, "--easy", 0.1, "--hard", 0.1]
    assert command(runs["vision-only"], *groups, "--json", tmp_path / "v.json") == 0
    figures = json.loads((tmp_path / "v.json").read_text())
    assert list(figures["groups"]) == ["easy", "medium", "hard"] and "LAP" not in figures and "mLA" not in figures
    assert {row["gain"] for row in figures["groups"].values()} <= {0.0, None}
    assert command(runs["full"], *groups, "--json", tmp_path / "f.json") == 0
    assert "| actions | mAP | gain | mLA | which |" in capsys.readouterr().out
    figures = json.loads((tmp_path / "f.json").read_text())
    assert {"LAP", "mLA", "groups"} <= set(figures) and any(row["mLA"] is not None for row in figures["groups"].values())
    assert command(runs["vision-only"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bias.py: error: ") and "expected a model with language" in error


def test_incomplete_actions(runs, tmp_path, capsys):
    figures = tmp_path / "f.json"
    assert command(runs["full"], "--incomplete", "--json", figures) == 0
    assert set(json.loads(figures.read_text())) == {"mConf", "mLen", "acc@0.3", "acc@0.5", "acc@0.7"}
    printed = capsys.readouterr().out
    assert re.search(r"\d+ incomplete actions in 2 videos", printed)
    (tmp_path / "mine.json").write_bytes((runs["full"].parent / "data/incomplete.json").read_bytes())
    assert command(runs["full"], "--incomplete", tmp_path / "mine.json", "--json", figures) == 0
    assert capsys.readouterr().out == printed
    assert {p.name for p in tmp_path.iterdir()} == {"f.json", "mine.json"}            # no demo is rendered beside it
    assert command(runs["full"], "--incomplete", tmp_path / "nowhere.json") == 2


@pytest.mark.parametrize("flags, part", [
    ([], "--checkpoint"), (["--checkpoint", "a", "--incomplete", "--groups", "thumos14"], "--groups"),
    (["--checkpoint", "a", "--easy", "0.3"], "--easy"), (["--checkpoint", "a", "--tiou", "50"], "--tiou")])
def test_flags_that_contradict(flags, part, capsys):
    with pytest.raises(SystemExit):
        bias.get_args(flags)
    assert part in capsys.readouterr().err
