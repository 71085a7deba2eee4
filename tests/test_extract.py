"""Features from videos: the same losses as end to end, a manifest that train.py reads, stopping and going on."""
import json

import numpy as np
import pytest
import torch

import train
from data import batch_loader, load_data, make_dataset
from experiments import extract
from head import detection_loss
from model import ActionVLM
from support.demo import make_demo
from support.video import single_video

@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extract")
    make_demo(folder, train=3, test=2, incomplete=0)
    return folder


def flags(demo, out, *more):
    return [str(x) for x in ("--videos", demo / "videos", "--out", out, "--image-size", 32, "--stride", 1, *more)]


def train_flags(demo, out, *more):
    return [str(x) for x in ("--annotations", demo / "annotations.json", "--descriptions", demo / "descriptions.json",
                             "--test-subset", "test", "--levels", 3, "--width", 16, "--lora-rank", 8, "--prior", 0.1, "--out", out, "--device", "cpu", *more)]


@pytest.fixture(scope="module")
def extracted(demo):
    out = demo / "features"
    assert extract.main(flags(demo, out, "--window", 128)) == 0
    return out


def test_training_on_features_has_the_losses_of_end_to_end(demo, extracted, tmp_path):
    """Both read whole windows without augmentation; the model on features takes over all weights but the encoder's."""
    losses, weights = [], None
    common = ["--window", 128, "--stride", 1]
    for source in (["--dataset", "demo", "--videos", demo / "videos"], ["--dataset", "custom", "--features", extracted]):
        args = train.get_args(train_flags(demo, tmp_path, *common, *source))
        training, _, descriptions = load_data(args)
        torch.manual_seed(0)
        config = train.build_config(args, training, descriptions)
        model = ActionVLM(config)
        if weights is not None:
            model.load_state_dict(weights, strict=False)
        weights = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("vision.")}
        whole = make_dataset(training.videos, list(training.classes), args, training.feature_dim)
        for batch in batch_loader(whole, model.multiple, 0, batch_size=2):
            model.eval()
            loss = detection_loss(model(batch), batch, model.head)
            losses.append((loss.cls.item(), loss.loc.item()))
    half = len(losses) // 2
    assert half > 1 and np.abs(np.array(losses[:half]) - losses[half:]).max() < 1e-4 and np.ptp(losses[:half]) > 0.01


def test_overlapping_windows_give_the_mean(demo, extracted, tmp_path):
    """Windows that begin at a multiple of the encoder's clip see the same clips; at their edges a row has no neighbour."""
    assert extract.main(flags(demo, tmp_path, "--window", 32, "--overlap", 0.5)) == 0
    for path in sorted(extracted.glob("*.npy")):
        rows, ours = np.load(path), np.load(tmp_path / path.name)
        inside = [i for i in range(len(rows) // 16 * 16 - 32) if i % 16 not in (0, 15)]
        np.testing.assert_allclose(ours[inside], rows[inside], atol=1e-4)
        assert np.abs(ours[16] - rows[16]).max() > 0.01
        assert ours.shape == rows.shape and rows.dtype == np.float32


def test_a_stopped_command_goes_on(demo, extracted, monkeypatch, capsys):
    """It reads the one video whose file is gone, and gives the same rows."""
    victim = extracted / "test_000.npy"
    before = np.load(victim)
    victim.unlink()
    names, encode = [], extract.encode
    monkeypatch.setattr(extract, "encode", lambda encoder, video, args: names.append(video.name) or encode(encoder, video, args))
    assert extract.main(flags(demo, extracted, "--window", 128)) == 0
    assert names == ["test_000"] and np.array_equal(np.load(victim), before)
    assert extract.main(flags(demo, extracted, "--window", 64)) == 2
    assert "manifest.json" in (said := capsys.readouterr().err) and "'window': 128" in said and "same flags" in said


def test_broken_videos_are_named_and_the_others_written(demo, tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "whole.mp4").write_bytes((demo / "videos/test_000.mp4").read_bytes())
    code = extract.main(["--videos", str(folder), "--out", str(tmp_path / "out"), "--image-size", "32"])
    assert code == 2 and "1 of 2 that cannot: broken.mp4" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["manifest.json", "whole.npy"]


@pytest.mark.parametrize("change, message", [
    (["--image-size", "33"], "--image-size: expected a multiple of 16, found 33"), (["--videos", "nowhere"], "nowhere: expected a folder of video files"),
    (["--vision", "nowhere.pth"], "nowhere.pth")])
def test_mistakes(demo, tmp_path, capsys, change, message):
    assert extract.main([*flags(demo, tmp_path), *change]) == 2
    assert message in capsys.readouterr().err


def test_train_reads_the_manifest(demo, extracted, tmp_path):
    source = ["--dataset", "custom", "--features", extracted]
    args = train.get_args(train_flags(demo, tmp_path, *source))
    assert (args.stride, args.num_frames) == (1, 0)
    assert train.get_args(train_flags(demo, tmp_path, *source, "--stride", 2)).stride == 2          # the command line wins
    annotations = json.loads((demo / "annotations.json").read_text())
    for entry in annotations["database"].values():
        del entry["fps"]
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    args.annotations = tmp_path / "annotations.json"
    assert {video.fps for video in load_data(args)[0].videos} == {10.0}
    video = single_video(extracted / "test_000.npy", 96, args, fps=0)
    assert video.fps == 10 and video.duration == len(np.load(video.path)) / 10
    args = train.get_args(train_flags(demo, tmp_path, "--dataset", "thumos14", "--features", extracted))
    assert (args.stride, args.num_frames, args.fps) == (1, 0, 0)                    # they win over the preset's 4, 16 and 30


@pytest.mark.parametrize("content, message", [
    ("{", "manifest.json: expected a JSON file"), ('{"videos": {"a": "x"}}', "manifest.json: 'videos': expected an object {video: "),
    ('{"stride": 0, "num_frames": 0, "videos": {}}', "--stride: expected a whole number from 1"),
    ('{"stride": 2, "num_frames": 0, "videos": {}}', "manifest.json: expected {'stride': '1', 'num_frames': '0', 'fps': '0'} as in the folder before")])
def test_a_damaged_manifest_and_one_that_differs(extracted, demo, tmp_path, capsys, content, message):
    (tmp_path / "manifest.json").write_text(content)
    folders = [extracted, tmp_path] if "'1'" in message else [tmp_path]
    try:
        code = train.main(train_flags(demo, tmp_path, "--dataset", "custom", "--features", *folders))
    except SystemExit as end:                                                        # of argparse: the flag is named
        code = end.code
    assert code == 2 and message in capsys.readouterr().err
