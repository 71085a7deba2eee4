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

import evaluate
import train
from support import weights
from support.demo import DEMO_DESCRIPTIONS, make_demo

ROOT = Path(__file__).parents[1]


def command(*words, **kwargs):
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of few videos, and the flags that train on it for two epochs."""
    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder / "data", train=4, test=2, incomplete=2)
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
    assert {"checkpoint.safetensors", "log.jsonl", "result.json", "report.png"} == {p.name for p in out.iterdir()}
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


def test_evaluate_one_video_prints_and_draws(trained, demo, tmp_path, capsys):
    video = demo[0] / "data/videos/test_001.mp4"
    flags = ["--checkpoint", trained[0], "--video", video, "--min-score", 0, "--plot", "--out", tmp_path, "--device", "cpu"]
    assert evaluate.main([str(flag) for flag in flags]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if " s  " in line]
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
    scores = {"results": {f"v_{name}": [0.9, 0.5] for name in "abc"}, "class": ["Jump", "Run"]}
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
    tensors = {weights.rename(name, weights.ORIGINAL_VIDEOMAE): tensor for name, tensor in ours.items()
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
        kept = file.get_tensor("model.vision.backbone.encoder.layer.1.attention.attention.value.bias")
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
    assert {name.split(".")[0] for name in names} == {
        "vision", "project", "language", "standardise_cls", "standardise_loc", "standardise_adv", "predict_advantage", "head",
        "class_means"}


def test_dry_run_says_what_it_found_and_trains_nothing(demo, tmp_path, capsys):
    assert train.main([*map(str, demo[1]), "--out", str(tmp_path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "training: 4 videos" in printed and "test: 2 videos" in printed and "6 classes" in printed
    for part in ("head", "vision", "lm"):
        assert f"{part} " in printed and "(lr " in printed
    assert re.search(r"tokens of a window: 512 for 128 frames \+ \d+ for the prompt = \d+", printed)
    assert "peak memory of this process: " in printed and "one step: loss" in printed and "loss_adv" in printed
    assert {p.name for p in tmp_path.iterdir()} == set()


SPY = """
import os, sys, torch, train, head, advantage
folder, noted = sys.argv[1], {"names": [], "positives": [], "frames": [], "losses": []}
original = dict(train=train.train, positives=head.DetectionHead.update_normalizer, add=advantage.ClassMeans.add,
                backpropagate=train.TrainingState.backpropagate)

def positives(self, count):
    noted["positives"].append(int(count))
    original["positives"](self, count)

def add(self, *frames):
    noted["frames"].append([x.detach().clone() for x in frames])
    original["add"](self, *frames)

def backpropagate(self, total, batch, **terms):
    noted["names"].append((self.epoch, batch.names))
    noted["losses"].append((self.epoch, total.item()))
    original["backpropagate"](self, total, batch, **terms)

def spied(model, *rest):
    state = original["train"](model, *rest)
    torch.save(dict(noted, model=model.state_dict(), ema=state.ema, mean=model.class_means.mean(), random=torch.rand(1)),
               f"{folder}/rank{os.environ['RANK']}.pt")
    return state

head.DetectionHead.update_normalizer, advantage.ClassMeans.add = positives, add
train.TrainingState.backpropagate, train.train = backpropagate, spied
sys.exit(train.main(sys.argv[2:]))
"""


def test_two_processes_share_weights_normaliser_and_class_means(features, tmp_path):
    """torchrun: each has its windows; M, class means, gradients and the log are means over both; the first one writes."""
    (tmp_path / "spy.py").write_text(SPY)
    content = json.loads((features[0] / "annotations.json").read_text())
    for name, source in zip("abcdef", "abcaba"):
        content["database"][name] = content["database"][source]
        np.save(tmp_path / f"{name}.npy", np.load(features[0] / f"{source}.npy")[::-1 if name > "c" else 1])
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    flags = [*features[1], "--features", tmp_path, "--annotations", tmp_path / "annotations.json", "--epochs", 3,
             "--warmup-epochs", 1, "--lr", 1e-3, "--lr-lm", 1e-3, "--out", tmp_path / "out"]
    done = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, tmp_path / "spy.py", tmp_path,
                   *flags, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for part in ("model", "ema"):
        assert ranks[0][part].keys() == ranks[1][part].keys() and len(ranks[0][part]) > 20
        for name, tensor in ranks[0][part].items():
            assert torch.equal(tensor, ranks[1][part][name]), name
    assert not torch.equal(ranks[0]["random"], ranks[1]["random"])                  # drop path is not the same in both

    M = 100.0                                                                       # Eq. 6, by hand
    for counts in zip(ranks[0]["positives"], ranks[1]["positives"], strict=True):
        M = np.mean([0.9 * M + 0.1 * max(1, count) for count in counts])
    assert float(ranks[0]["model"]["head.loss_normalizer"]) == pytest.approx(M, rel=1e-5)

    for epoch in range(3):                                                          # 5 windows, the first one twice
        names = [[name for e, batch in rank["names"] if e == epoch for name in batch] for rank in ranks]
        assert len(names[0]) == len(names[1]) == 3 and set(names[0] + names[1]) == set("abdef")
    frames = [batch for rank in ranks for batch in rank["frames"][-3:]]             # of the last epoch, a vision-only one
    losses, classes, masks = (torch.cat([batch[i].flatten() for batch in frames]) for i in range(3))
    for c, mean in enumerate(ranks[0]["mean"].tolist()):
        assert mean == pytest.approx(float(losses[masks & (classes == c)].mean()), rel=1e-4)

    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in log] == ["vision-only", "vision-language", "vision-only"]
    for epoch, row in enumerate(log):
        means = [np.mean([loss for e, loss in rank["losses"] if e == epoch]) for rank in ranks]
        assert row["loss"] == pytest.approx(np.mean(means), rel=1e-5) and means[0] != means[1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "checkpoint.safetensors", "log.jsonl", "result.json", "report.png"}
    assert done.stdout.count("training: ") == done.stdout.count("| mAP") == 1
    assert list(json.loads((tmp_path / "out/result.json").read_text())["results"]) == ["c"]


def test_accumulated_batches_make_one_step(features, tmp_path):
    assert train.main([*map(str, features[1]), "--out", str(tmp_path), "--accumulate", "2", "--epochs", "3"]) == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("change, message", [
    (["--annotations", "nowhere.json"], "nowhere.json: expected a JSON file"), (["--train-subset", "x"], "Train (2 videos)"),
    (["--features", "."], "found none for 2 of 2: a, b"), (["--lm", "nowhere"], "--lm nowhere: expected"),
    (["--resume"], "expected checkpoint.safetensors, found none; start without --resume"),
])
def test_mistakes_end_with_a_message_and_exit_code_2(features, tmp_path, capsys, change, message):
    assert train.main([*map(str, features[1]), "--out", str(tmp_path), *change]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
