"""The commands of the README, run small: train on videos and on features, resume, evaluate, look at one video."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import data
import evaluate
import train
import weights
from demo import DEMO_DESCRIPTIONS

ROOT = Path(__file__).parents[1]


def command(*words, **kwargs):
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of few videos, and the flags that train on it for two epochs."""
    folder = tmp_path_factory.mktemp("demo")
    data.make_demo(folder / "data", train=4, test=2, incomplete=2)
    return folder, ["--videos", folder / "data/videos", "--annotations", folder / "data/annotations.json",
                    "--descriptions", folder / "data/descriptions.json", "--epochs", 2, "--warmup-epochs", 1,
                    "--device", "cpu", "--out", folder / "out"]


@pytest.fixture(scope="module")
def trained(demo):
    folder, flags = demo
    done = command("train.py", *flags)
    assert done.returncode == 0, done.stderr
    return folder / "out", done.stdout, flags


def table(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_train_py_writes_everything_and_prints_what_it_does(trained):
    out, printed, _ = trained
    assert {"checkpoint.safetensors", "log.jsonl", "result.json", "report.png", "tiny-lm"} == {p.name for p in out.iterdir()}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in log] == ["vision-only", "vision-language"]
    assert set(log[0]["class_mean"]) == {*DEMO_DESCRIPTIONS, "background"} and log[0]["class_mean"]["background"] > 0
    assert {"loss_cls", "loss_loc", "loss_tg", "loss_adv", "lambda_lang", "lr"} <= set(log[1])
    assert "vision-only" in printed and "vision-language" in printed and "class means: Catch" in printed
    assert table(printed)[2].startswith("| mAP") and (out / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_evaluate_checkpoint_repeats_the_table(trained, capsys):
    out, printed, _ = trained
    before = (out / "result.json").read_bytes()
    assert evaluate.main(["--checkpoint", str(out), "--device", "cpu"]) == 0
    assert table(capsys.readouterr().out) == table(printed)
    assert (out / "result.json").read_bytes() == before


def test_evaluate_result_file_gives_the_same_table(trained, demo, capsys):
    out, printed, _ = trained
    assert evaluate.main(["--ground-truth", str(demo[0] / "data/annotations.json"), "--predictions",
                          str(out / "result.json"), "--subset", "Test"]) == 0
    assert table(capsys.readouterr().out) == table(printed)


def test_evaluate_one_video_prints_and_draws(trained, demo, tmp_path):
    video = demo[0] / "data/videos/test_001.mp4"
    done = command("evaluate.py", "--checkpoint", trained[0], "--video", video, "--min-score", 0, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if " s  " in line]
    assert len(rows) > 10 and any(name in rows[0] for name in DEMO_DESCRIPTIONS)
    assert (tmp_path / "test_001.png").read_bytes()[:4] == b"\x89PNG"


def test_a_moved_run_is_still_evaluated(trained, tmp_path, capsys):
    (tmp_path / "moved").mkdir()
    for source in trained[0].rglob("*"):
        target = tmp_path / "moved" / source.relative_to(trained[0])
        target.mkdir(exist_ok=True) if source.is_dir() else target.write_bytes(source.read_bytes())
    trained[0].rename(trained[0].with_name("away"))
    try:
        assert evaluate.main(["--checkpoint", str(tmp_path / "moved"), "--device", "cpu"]) == 0
    finally:
        trained[0].with_name("away").rename(trained[0])
    assert table(capsys.readouterr().out) == table(trained[1])


def test_resume_goes_on_and_a_second_run_does_not_overwrite(demo, tmp_path, capsys):
    flags = [str(f) for f in demo[1]] + ["--out", str(tmp_path), "--lambda-lang", "0"]
    assert train.main([*flags, "--epochs", "1"]) == 0
    assert train.main([*flags, "--epochs", "1"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert train.main([*flags, "--epochs", "3", "--resume"]) == 0
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in log] == [(1, 2), (2, 4), (3, 6)]
    assert train.main([*flags, "--epochs", "1", "--overwrite"]) == 0
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_an_untrained_model_scores_near_zero(demo, tmp_path, capsys):
    """Otherwise the demo would be too easy to mean anything."""
    flags = [str(f) for f in demo[1]] + ["--epochs", "0", "--out", str(tmp_path)]
    assert train.main(flags) == 0
    assert float(table(capsys.readouterr().out)[2].split("|")[-2]) < 5
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:              # the average starts where the model does
        for name in ("project.weight", "project.bias", "head.scales"):
            assert torch.equal(file.get_tensor(f"model.{name}"), file.get_tensor(f"ema.{name}"))


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Random features of width 6, 80 steps a video at stride 4 of 30 fps, with annotations and descriptions."""
    folder, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    database = {}
    for name, subset in (("a", "Train"), ("b", "Train"), ("c", "Val")):
        np.save(folder / f"{name}.npy", rng.normal(size=(80, 6)).astype(np.float32))
        database[name] = {"subset": subset, "duration": 10.7, "fps": 30, "annotations": [
            {"label": "Run", "segment": [1, 3]}, {"label": "Jump", "segment": [5, 6.5]}]}
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    (folder / "descriptions.json").write_text(json.dumps({"Run": "Legs alternate.", "Jump": "Both feet leave the ground."}))
    return folder, ["--dataset", "custom", "--features", folder, "--annotations", folder / "annotations.json",
                    "--descriptions", folder / "descriptions.json", "--train-subset", "TRAIN", "--test-subset", "val",
                    "--window", 32, "--levels", 3, "--width", 16, "--epochs", 2, "--lora-rank", 4, "--device", "cpu"]


@pytest.mark.parametrize("layout", ["frames-first", "text-first"])
def test_custom_features_with_sliding_windows(features, tmp_path, capsys, layout):
    folder, flags = features
    assert train.main([*map(str, flags), "--layout", layout, "--out", str(tmp_path)]) == 0
    assert table(capsys.readouterr().out)[2].startswith("| mAP")
    found = json.loads((tmp_path / "result.json").read_text())["results"]
    assert list(found) == ["c"] and all(0 <= t <= 10.7 for d in found["c"] for t in d["segment"])
    assert evaluate.main(["--checkpoint", str(tmp_path), "--video", str(folder / "b.npy"), "--device", "cpu"]) == 2
    assert "--fps" in capsys.readouterr().err
    assert evaluate.main(["--checkpoint", str(tmp_path), "--video", str(folder / "b.npy"), "--fps", "30", "--device", "cpu"]) == 0


def test_class_agnostic_head_with_external_scores(features, tmp_path, capsys):
    scores = {"results": {f"v_{name}": [0.9, 0.05] for name in "abc"}, "class": ["Jump", "Run"]}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    flags = [*map(str, features[1]), "--out", str(tmp_path / "out"), "--external-scores", str(tmp_path / "scores.json")]
    assert train.main([*flags, "--resize-to", "32"]) == 0
    with safe_open(tmp_path / "out/checkpoint.safetensors", "pt") as file:
        assert file.get_tensor("model.head.cls_head.out.weight").shape[0] == 1
    found = json.loads((tmp_path / "out/result.json").read_text())["results"]["c"]
    assert {d["label"] for d in found} == {"Jump", "Run"} and found[0]["label"] == "Jump"    # the scores say which
    del scores["results"]["v_c"]
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    assert evaluate.main(["--checkpoint", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "scores.json: expected scores for every video and class, found none for c" in capsys.readouterr().err


@pytest.fixture(scope="module")
def videomae_file(tmp_path_factory):
    """A VideoMAE of width 48 as its authors save it: the names of the original file, and what it also holds."""
    from transformers import VideoMAEConfig, VideoMAEModel
    torch.manual_seed(1)
    ours = VideoMAEModel(VideoMAEConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96,
                                        patch_size=16, image_size=32)).state_dict()
    tensors = {weights.original_videomae(name): tensor for name, tensor in ours.items()
               if "query" not in name and "key" not in name and "value" not in name and "layernorm." not in name[:10]}
    for n in range(2):
        stem = f"encoder.layer.{n}.attention.attention."
        tensors[f"blocks.{n}.attn.qkv.weight"] = torch.cat([ours[f"{stem}{x}.weight"] for x in ("query", "key", "value")])
        tensors |= {f"blocks.{n}.attn.{x}_bias": torch.randn(48) for x in "qv"}
    path = tmp_path_factory.mktemp("vision") / "vit_s_k710_dl_from_giant.pth"
    torch.save({"module": tensors | {"head.weight": torch.zeros(710, 48), "fc_norm.weight": torch.ones(48)}}, path)
    return path


def test_published_vision_weights_are_trained_and_evaluated_without_the_file(demo, videomae_file, tmp_path, capsys):
    flags = [str(f) for f in demo[1]] + ["--vision", str(videomae_file), "--out", str(tmp_path), "--lambda-lang", "0",
                                         "--grad-checkpoint", "on"]
    assert train.main([*flags, "--epochs", "0"]) == 0
    assert "2 layers of width 48; not used: head.weight, fc_norm.weight" in capsys.readouterr().out
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        kept = file.get_tensor("model.vision.videomae.encoder.layer.1.attention.attention.value.bias")
    assert torch.equal(kept, torch.load(videomae_file)["module"]["blocks.1.attn.v_bias"])
    assert train.main([*flags, "--epochs", "1", "--resume"]) == 0
    printed = capsys.readouterr().out
    videomae_file.rename(videomae_file.with_suffix(".away"))
    assert evaluate.main(["--checkpoint", str(tmp_path), "--device", "cpu"]) == 0
    assert table(capsys.readouterr().out) == table(printed)


def test_a_checkpoint_holds_what_was_trained_and_no_frozen_weight(trained):
    with safe_open(trained[0] / "checkpoint.safetensors", "pt") as file:
        names = {name.removeprefix("model.") for name in file.keys() if name.startswith("model.")}
    language = {name for name in names if name.startswith("language.")}
    assert all("lora_" in name or name == "language.special_tokens" for name in language) and len(language) > 10
    assert {name.split(".")[0] for name in names} == {"vision", "project", "language", "predict_advantage", "head", "class_mean"}


def test_dry_run_says_what_it_found_and_trains_nothing(demo, tmp_path, capsys):
    assert train.main([*map(str, demo[1]), "--out", str(tmp_path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "training: 4 videos" in printed and "test: 2 videos" in printed and "6 classes" in printed
    for part in ("head", "vision", "lm"):
        assert f"{part} " in printed and "(lr " in printed
    assert re.search(r"tokens of a window: 512 for 128 frames \+ \d+ for the prompt = \d+", printed)
    assert "memory, about: frozen weights" in printed and "one step: loss" in printed and "loss_adv" in printed
    assert {p.name for p in tmp_path.iterdir()} == {"tiny-lm"}


def test_bias_gives_lap_and_mla(trained, tmp_path, capsys):
    assert evaluate.main(["--checkpoint", str(trained[0]), "--bias", "--json", str(tmp_path / "f.json"), "--device", "cpu"]) == 0
    assert re.search(r"with unmatched descriptions .* LAP -?\d", capsys.readouterr().out)
    figures = json.loads((tmp_path / "f.json").read_text())
    assert set(figures["mLA"]) == {"all", *figures["AP"]} and isinstance(figures["LAP"], float)


def test_question_answering_writes_answers_rates_and_histogram(trained, tmp_path, capsys):
    assert evaluate.main(["--checkpoint", str(trained[0]), "--formulation", "qa", "--max-new-tokens", "8", "--out",
                          str(tmp_path), "--json", str(tmp_path / "f.json"), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert table(printed)[2].startswith("| mAP") and "LAP" in printed and "hallucinations in 2 windows" in printed
    assert {p.name for p in tmp_path.iterdir()} == {"answers.json", "boundaries.png", "f.json", "result-qa.json"}
    assert set(json.loads((tmp_path / "f.json").read_text())["hallucination"]) == {"fixed", "infinite"}
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert [a["video"] for a in answers] == ["test_000", "test_001"] and all(a["text"] is not None for a in answers)


def test_groups_and_incomplete_actions(trained, tmp_path, capsys):
    figures = tmp_path / "f.json"
    common = ["--checkpoint", str(trained[0]), "--device", "cpu", "--json", str(figures)]
    assert evaluate.main(common) == 0
    assert evaluate.main([*common, "--groups", str(figures), "--easy", "0.1", "--hard", "0.1"]) == 0
    groups = json.loads(figures.read_text())["groups"]
    assert list(groups) == ["easy", "medium", "hard"] and {row["gain"] for row in groups.values()} <= {0.0, None}
    assert evaluate.main([*common, "--incomplete"]) == 0
    assert set(json.loads(figures.read_text())) == {"mConf", "mLen", "acc@0.3", "acc@0.5", "acc@0.7"}
    assert re.search(r"\d+ incomplete actions in 2 videos", capsys.readouterr().out)
    (tmp_path / "mine.json").write_bytes((trained[0].parent / "data/incomplete.json").read_bytes())
    assert evaluate.main([*common, "--incomplete", str(tmp_path / "mine.json")]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"f.json", "mine.json"}            # no demo is rendered beside it
    assert evaluate.main([*common, "--incomplete", str(tmp_path / "nowhere.json")]) == 2


@pytest.mark.parametrize("flags", [["--lambda-lang", "generated"], ["--features-used", "language"],
                                   ["--lang-tokens", "vision"], ["--prompt", "labels"], ["--lambda-adv", "0"]])
def test_every_ablation_runs_and_can_be_evaluated(features, tmp_path, capsys, flags):
    assert train.main([*map(str, features[1]), "--out", str(tmp_path), *flags]) == 0
    printed = capsys.readouterr().out
    assert evaluate.main(["--checkpoint", str(tmp_path), "--device", "cpu"]) == 0
    assert table(capsys.readouterr().out) == table(printed)


SPY = """
import os, sys, torch, train
original = train.train
def spied(run, *rest):
    original(run, *rest)
    torch.save({n: p.detach() for n, p in run.model.state_dict().items()}, f"{sys.argv[1]}/rank{os.environ.get('RANK', 0)}.pt")
train.train = spied
sys.exit(train.main(sys.argv[2:]))
"""


def test_two_processes_equal_one_with_the_doubled_batch(features, tmp_path):
    """One window is short and has a short answer: means over frames and tokens are not means of the processes'."""
    (tmp_path / "spy.py").write_text(SPY)
    content = json.loads((features[0] / "annotations.json").read_text())
    content["database"]["a"] |= {"duration": 1.7, "annotations": [{"label": "Run", "segment": [0.5, 1.2]}]}
    content["database"]["d"] = content["database"]["c"]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    rows = {name: np.load(features[0] / f"{name}.npy") for name in "abc"}
    for name, array in (rows | {"a": rows["a"][:13], "d": rows["c"][::-1]}).items():
        np.save(tmp_path / f"{name}.npy", array)
    flags = [*features[1], "--features", tmp_path, "--annotations", tmp_path / "annotations.json", "--drop-path", 0,
             "--epochs", 6, "--warmup-epochs", 1, "--lr", 1e-3, "--lr-lm", 1e-3, "--lambda-tg", 1, "--lambda-adv", 1]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    for words in ([*torchrun, tmp_path / "spy.py", tmp_path, *flags, "--batch-size", 1, "--out", tmp_path / "two"],
                  [tmp_path / "spy.py", tmp_path / "one", *flags, "--batch-size", 2, "--out", tmp_path / "one"]):
        done = command(*words, env=env)
        assert done.returncode == 0, done.stderr
    rows = [[json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()] for out in ("two", "one")]
    assert len(rows[0]) == 6
    for a, b in zip(*rows):
        assert a.get("class_mean") == pytest.approx(b.get("class_mean"), abs=2e-4)
        a, b = ({name: x for name, x in row.items() if isinstance(x, float) and name != "seconds"} for row in (a, b))
        assert a == pytest.approx(b, abs=1e-4)
    first, second, alone = (torch.load(tmp_path / name) for name in ("rank0.pt", "rank1.pt", "one/rank0.pt"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in first:
        torch.testing.assert_close(first[name], alone[name], atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}: {m}")
    found = [json.loads((tmp_path / out / "result.json").read_text())["results"] for out in ("two", "one")]
    assert list(found[0]) == list(found[1]) == ["c", "d"]                        # each process has looked at one
    for name in "cd":
        scores = [torch.tensor([row["score"] for row in results[name]]) for results in found]
        torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


def test_accumulated_batches_make_one_step(features, tmp_path):
    assert train.main([*map(str, features[1]), "--out", str(tmp_path), "--accumulate", "2", "--epochs", "3"]) == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("change, message", [
    (["--annotations", "nowhere.json"], "nowhere.json: expected a JSON file"), (["--train-subset", "x"], "subsets there"),
    (["--features", "."], "found none for 2 of 2: a, b"), (["--lm", "nowhere"], "--lm nowhere: expected"),
    (["--resume"], "--resume: expected checkpoint.safetensors of an earlier run"),
])
def test_mistakes_end_with_a_message_and_exit_code_2(features, tmp_path, capsys, change, message):
    assert train.main([*map(str, features[1]), "--out", str(tmp_path), *change]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
