"""Jobs on a trained model: many videos, other data, going on with other classes, evaluating while training."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import evaluate
import train
from support import checkpoint

def project(folder, classes=("Jump", "Run"), names="abcd"):
    """Random features of width 6, 80 steps a video at stride 4 of 30 fps; the last two videos are for the test."""
    rng = np.random.default_rng(0)
    (folder / "features").mkdir()
    database = {}
    for i, name in enumerate(names):
        np.save(folder / f"features/{name}.npy", rng.normal(size=(80, 6)).astype(np.float32))
        database[name] = {"subset": "training" if i < 2 else "test", "duration": 10.7, "fps": 30, "annotations": [
            {"label": classes[0], "segment": [1, 3]}, {"label": classes[-1], "segment": [5, 6.5]}]}
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    (folder / "descriptions.json").write_text(json.dumps({name: f"It is a {name}." for name in classes}))
    return [str(x) for x in (
        "--dataset", "custom", "--features", folder / "features", "--annotations", folder / "annotations.json",
        "--descriptions", folder / "descriptions.json", "--test-subset", "test", "--window", 32, "--levels", 3, "--width", 16,
        "--epochs", 2, "--lora-rank", 4, "--lambda-lang", 0, "--prior", 0.3, "--device", "cpu")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    flags = project(folder)
    assert train.main([*flags, "--out", str(folder / "out")]) == 0
    return folder, flags, folder / "out"


def on_videos(out, *words):
    words = [str(word) for word in ("--checkpoint", out, "--device", "cpu", "--fps", 30, "--min-score", 0.9, "--video", *words)]
    return evaluate.main(words)


def test_many_videos_give_what_each_gives_alone(run, tmp_path, capsys):
    folder, _, out = run
    one = folder / "features/a.npy"
    rest = tmp_path / "rest"
    rest.mkdir()
    for name in "bc":
        shutil.copy(folder / f"features/{name}.npy", rest / f"{name}.NPY")
    assert on_videos(out, one, rest, "--json", tmp_path / "all.json", "--csv", tmp_path / "all.csv", "--plot", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "all.json").read_text())["results"]
    assert list(results) == ["a", "b", "c"] and all(len(rows) > 10 for rows in results.values())
    for name, path in (("a", one), ("b", rest / "b.NPY"), ("c", rest / "c.NPY")):
        assert f"{path}: 10.7 s" in printed and (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert on_videos(out, path, "--json", tmp_path / "alone.json") == 0
        assert json.loads((tmp_path / "alone.json").read_text())["results"] == {name: results[name]}
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert len(rows) == sum(map(len, results.values())) and rows[0]["video"] == "a"
    first = results["a"][0]
    assert float(rows[0]["start"]) == pytest.approx(first["segment"][0], abs=6e-4) and rows[0]["label"] == first["label"]


def test_a_broken_file_is_named_and_the_others_are_done(run, tmp_path, capsys):
    folder, _, out = run
    (tmp_path / "broken.npy").write_bytes(b"no array")
    assert on_videos(out, tmp_path / "broken.npy", folder / "features/a.npy", "--csv", tmp_path / "x.csv") == 2
    said = capsys.readouterr().err
    assert "broken.npy: expected a .npy file" in said and "1 of 2 that cannot: broken.npy" in said
    assert {row["video"] for row in csv.DictReader((tmp_path / "x.csv").open())} == {"a"}
    assert on_videos(out, folder / "features/a.npy", folder / "features") == 2
    assert "expected one file for each name, found several for a" in capsys.readouterr().err
    assert on_videos(out, folder / "out") == 2
    assert "found none" in capsys.readouterr().err


def test_class_agnostic_model_with_scores_and_without(run, tmp_path, capsys):
    folder, flags, _ = run
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"results": {name: [0.9, 0.5] for name in "abcd"}, "class": ["Jump", "Run"]}))
    out = tmp_path / "out"
    assert train.main([*flags, "--out", str(out), "--external-scores", str(scores)]) == 0
    shutil.copy(folder / "features/a.npy", tmp_path / "mine.npy")
    found = tmp_path / "found.json"
    assert on_videos(out, tmp_path / "mine.npy", "--json", found, "--plot", "--min-score", 0) == 0
    assert {row["label"] for row in json.loads(found.read_text())["results"]["mine"]} == {"action"}
    scores.write_text(json.dumps({"results": {"mine": [0.2, 0.8]}, "class": ["Jump", "Run"]}))
    assert on_videos(out, tmp_path / "mine.npy", "--json", found, "--external-scores", scores) == 0
    assert {row["label"] for row in json.loads(found.read_text())["results"]["mine"]} == {"Jump", "Run"}
    capsys.readouterr()


def test_a_checkpoint_on_moved_and_on_other_data(run, tmp_path, capsys):
    """The same numbers from files elsewhere; other labels of the test videos give another table."""
    folder, _, out = run
    flags = ["--checkpoint", str(out), "--out", str(tmp_path), "--device", "cpu"]
    assert evaluate.main(flags) == 0
    table = capsys.readouterr().out
    shutil.copytree(folder / "features", tmp_path / "moved")
    assert evaluate.main([*flags, "--features", str(tmp_path / "moved")]) == 0 and capsys.readouterr().out == table
    other = json.loads((folder / "annotations.json").read_text())
    for name in "ab":
        del other["database"][name]
    other["database"]["c"].update(subset="mine", annotations=[{"label": "Run", "segment": [2, 9]}])
    del other["database"]["c"]["duration"]                                                      # the rows tell it
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert evaluate.main([*flags, "--annotations", str(tmp_path / "other.json"), "--test-subset", "mine"]) == 0
    said = capsys.readouterr().out
    assert said != table and "| Run " in said and "| Jump" not in said
    assert evaluate.main([*flags, "--videos", "x"]) == 2
    assert "--checkpoint: expected a model of videos, found one of features" in capsys.readouterr().err


def test_init_takes_what_fits_and_says_what_starts_anew(run, tmp_path, capsys):
    """With other classes only the output layer of the classes starts anew; with the same classes nothing does."""
    _, flags, out = run
    (tmp_path / "new").mkdir()
    others = project(tmp_path / "new", classes=("Dive", "Swim"))
    before = checkpoint.averaged(checkpoint.read_checkpoint(out / "checkpoint.safetensors"))
    for words, anew in ((flags, set()), (others, {"head.cls_head.out.weight", "head.cls_head.out.bias"})):
        target = tmp_path / f"out{len(anew)}"
        assert train.main([*words, "--init", str(out), "--out", str(target), "--epochs", "0"]) == 0
        printed = capsys.readouterr().out
        assert f"--init {out}" in printed and all(name in printed for name in anew)
        after = load_file(target / "checkpoint.safetensors")
        differ = {name for name, tensor in before.items() if not torch.equal(tensor, after[f"model.{name}"])}
        assert anew <= differ <= anew | {"class_means.total", "class_means.count", "class_means.previous"}
    assert train.main([*others, "--init", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_evaluating_while_training_changes_no_bit_of_it(run, lm_folder, tmp_path, capsys):
    """Rows hold the mAP, best.safetensors is the best of them, and it is evaluated like any checkpoint."""
    _, flags, _ = run
    words = [*flags, "--epochs", "2", "--lr", "1e-3", "--lambda-lang", "learned", "--layout", "text-first", "--lm", lm_folder]
    for name, more in (("plain", []), ("meanwhile", ["--eval-every", "1"])):
        assert train.main([*words, "--out", str(tmp_path / name), *more]) == 0
    plain, ours = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("plain", "meanwhile"))
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    rows = checkpoint.read_log(tmp_path / "meanwhile/log.jsonl")
    assert ["mAP" in row for row in rows] == [True] * 2 and "mAP 0." in capsys.readouterr().out
    best = max((1, 2), key=lambda epoch: rows[epoch - 1]["mAP"])
    saved = checkpoint.read_checkpoint(tmp_path / "meanwhile/best.safetensors")
    assert saved.progress["epoch"] == best
    figures = tmp_path / "figures.json"
    assert evaluate.main(["--checkpoint", str(tmp_path / "meanwhile/best.safetensors"), "--device", "cpu", "--json", str(figures)]) == 0
    assert np.mean(json.loads(figures.read_text())["mAP"]) == pytest.approx(rows[best - 1]["mAP"], abs=1e-9)
    assert train.main([*words, "--out", str(tmp_path / "meanwhile"), "--overwrite", "--epochs", "0"]) == 0
    assert not (tmp_path / "meanwhile/best.safetensors").exists()
