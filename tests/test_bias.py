"""Modality bias: LAP, mLA, Table 3 and Table 5, by hand and by the command."""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import train
from experiments import bias
from support.annotations import InputError
from support.demo import make_demo

# ---------------------------------------------------------------- LAP and mLA
@pytest.mark.parametrize("n", [2, 3, 6, 7])
def test_lap_is_the_relative_drop_with_the_descriptions_of_other_labels(n, monkeypatch, capsys):
    descriptions, unmatched = {f"label {i}": f"sentence {i}" for i in range(n)}, {}
    model = SimpleNamespace(config=SimpleNamespace(descriptions=descriptions), language=SimpleNamespace(set_descriptions=unmatched.update))
    result = {"average": 0.72}
    monkeypatch.setattr(bias, "mean_average_precision", lambda truth, predictions, tiou: {"average": predictions["mAP"]})
    bias.add_lap(result, model, lambda: ({"mAP": 0.7}, None), SimpleNamespace(videos=[]), [0.5])
    assert result["LAP"] == pytest.approx(0.02 / 0.72) and "mAP 70.00 %, LAP 2.78 %" in capsys.readouterr().out
    assert list(unmatched) == list(descriptions) and sorted(unmatched.values()) == sorted(descriptions.values())
    assert all(unmatched[label] != descriptions[label] for label in descriptions)
    result["average"] = 0
    bias.add_lap(result, model, lambda: ({"mAP": 0}, None), SimpleNamespace(videos=[]), [0.5])
    assert result["LAP"] == 0


FRAMES = torch.arange(10.0), torch.tensor([2, 0, 1, 1, 0, 0, 0, 3, 3, 3])
ABC = SimpleNamespace(classes={"a": 0, "b": 1, "c": 2, "d": 4})


def test_mla_by_hand():
    assert bias.mLA(*FRAMES, ABC, ["a"]) == np.mean([1, 4, 5, 6]) and bias.mLA(*FRAMES, ABC, ["b"]) == 2.5
    assert bias.mLA(*FRAMES, ABC, ABC.classes) == 3 and np.isnan(bias.mLA(*FRAMES, ABC, ["d"]))


class GivenLosses:
    """A model that predicts `advantage`, and whose language lowers the loss of frame l from 10 to 10 - benefit[l]."""
    multiple, config, head = 1, SimpleNamespace(classes=["a"]), None
    class_means = SimpleNamespace(mean=lambda: torch.tensor([7.0, 0.0]))

    def __init__(self, advantage, benefit):
        self.advantage, self.benefit = torch.tensor([advantage]), torch.tensor([benefit])

    def eval(self):
        return self

    def __call__(self, batch, use_language=True):
        return SimpleNamespace(advantage=self.advantage if use_language else None,
                               loss=batch.hard - self.benefit if use_language else batch.hard)


def test_benefit_of_language_by_hand(monkeypatch):
    batch = SimpleNamespace(mask=torch.tensor([[True] * 5 + [False]]), frame_class=torch.tensor([[0, 0, 0, 1, 1, 1]]),
                            hard=torch.tensor([[10.0, 20.0, 10.0, 1.0, 1.0, 1.0]]))
    batch.to = lambda device: batch
    monkeypatch.setattr(bias, "batch_loader", lambda *args, **kwargs: [batch, batch])
    monkeypatch.setattr(bias, "detection_loss", lambda output, batch, head: SimpleNamespace(per_frame=output.loss))
    model = GivenLosses([1.0, 2.0, 3.0, 9.0, 9.0, 9.0], [0.0, 1.0, 5.0, -1.0, -2.0, 99.0])
    found, advantage, classes = bias.language_benefit(model, None, SimpleNamespace(workers=0, batch_size=1))
    assert advantage.tolist() == [1, 2, 3, 9, 9] * 2 and classes.tolist() == [0, 0, 0, 1, 1] * 2
    predicted, benefit, target = [1, 2, 3], [0, 1, 5], [7 - 10, 7 - 19, 7 - 5]
    assert found == pytest.approx({"action": 2.0, "background": -1.5, "correlation": np.corrcoef(predicted, benefit)[0, 1],
                                   "with target": np.corrcoef(predicted, target)[0, 1],
                                   "target with benefit": np.corrcoef(benefit, target)[0, 1]})


# ---------------------------------------------------------------- Table 3
def score_groups(result, reference, *words, frames=None):
    return bias.score_groups(result, reference, SimpleNamespace(groups=list(words), easy=0.85, hard=0.5), frames, ABC)


def test_table3_groups_by_the_reference_and_by_the_paper():
    def classes(names, reference, *words):
        rows = score_groups({"classes": names, "AP": np.zeros((1, len(names)))}, reference, *words)
        return {level: row["classes"] for level, row in rows.items()}
    reference = {"a": 0.9, "b": 0.85, "c": 0.5, "d": 0.49}
    assert classes(list("abcd"), reference, "f") == {"easy": ["a", "b"], "medium": ["c"], "hard": ["d"]}
    names = ["Billiards", "Diving", "LongJump", "FrisbeeCatch"]
    assert classes(names, {}, "thumos14") == {"easy": ["LongJump"], "medium": ["Diving"], "hard": ["Billiards", "FrisbeeCatch"]}
    for words in (["f"], ["thumos14", "f"]):
        with pytest.raises(InputError, match="--groups: .* none for e"):
            classes(["a", "e"], reference, *words)


def test_table3_rows_by_hand(capsys):
    result = {"classes": ["a", "b", "c"], "AP": np.array([[0.8, 0.4, 0.2], [0.6, 0.2, 0.0]])}
    rows = score_groups(result, {"a": 0.9, "b": 0.9, "c": 0.3}, "f", frames=FRAMES)
    np.testing.assert_allclose([rows[level][key] for level in ("easy", "hard") for key in ("mAP", "gain")], [.5, -.4, .1, -.2])
    assert rows["hard"]["mLA"] == 0 and rows["easy"]["mLA"] == np.mean([1, 2, 3, 4, 5, 6])
    assert rows["medium"] == {"classes": [], "mAP": None, "gain": None, "mLA": None}
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("| easy | 50.00% | -40.00% |") and lines[4] == "| medium | - | - | - |  |"
    assert score_groups(result, {}, "thumos14")["medium"]["gain"] is None


@pytest.mark.parametrize("content, message", [('{"AP": {"a": 1}}', "list of numbers"), ("{}", "AP"), ("[", "JSON")])
def test_table3_reference_that_is_none(tmp_path, content, message):
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(InputError, match=message):
        bias.read_reference([str(tmp_path / "f.json")])
    with pytest.raises(InputError, match="found a b"):
        bias.read_reference(["a", "b"])
    assert bias.read_reference(["thumos14"]) == bias.read_reference([]) == {}


# ---------------------------------------------------------------- Table 5
def test_table5_ambiguity_metrics_by_hand():
    predictions = {
        "v": {"segments": np.array([[0, 2], [1, 5], [2, 4.0]]), "labels": ["a", "a", "b"], "scores": np.array([0.2, 0.6, 0.9])},
        "w": {"segments": np.array([[0, 4.0]]), "labels": ["a"], "scores": np.array([0.4])}}
    predictions["u"] = {"segments": np.zeros((0, 2)), "labels": [], "scores": np.zeros(0)}
    actions = {"v": {"segments": np.array([[0, 4.0], [3, 5]]), "labels": ["a", "b"]},       # 1-5, three quarters; 2-4, half
               "w": {"segments": np.array([[4, 8.0]]), "labels": ["a"]},                    # touches only: not detected
               "u": {"segments": np.array([[0, 1.0]]), "labels": ["a"]}}
    metrics = bias.ambiguity_metrics(predictions, actions)
    assert list(metrics) == ["mConf", "mLen", "acc@0.3", "acc@0.5", "acc@0.7"]
    np.testing.assert_allclose(list(metrics.values()), [1.5 / 4, 1.25 / 4, 0.5, 0.5, 0.75])        # below 0.5, not at it


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
    assert "| mAP" in printed and re.search(r"with unmatched descriptions: .* LAP -?\d", printed) and "mLA: all " in printed
    figures = json.loads((tmp_path / "f.json").read_text())
    assert set(figures["mLA"]) == {"all", *figures["AP"]} and isinstance(figures["LAP"], float)
    assert "true benefit of language: action 0.0000, background 0.0000, correlation nan" in printed
    assert figures["benefit"]["action"] == figures["benefit"]["background"] == 0          # untrained: language is silent
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
    assert {"mLA", "groups"} <= set(figures) and "LAP" not in figures and any(row["mLA"] is not None for row in figures["groups"].values())
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
        bias.main(flags)
    assert part in capsys.readouterr().err
