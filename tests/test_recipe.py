"""The data and training recipe (§4.1) against ActionFormer's own code, and merging windows before NMS.

The goldens in ../shared/golden/misc were made by running ActionFormer; tests that read them skip where they are
absent. Some of their cases stand here as figures, so that every check also runs without them.
"""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_head import GOLDEN, official_name
from torch import nn

from data import TALDataset, truncate_segments
from evaluate import detect
from head import DetectionHead, Output, pyramid_points
from support.annotations import Video
from train import lr_factor, parameter_groups

def golden(name):
    if not (GOLDEN / "misc" / name).exists():
        pytest.skip("../shared/golden is absent")
    return json.loads((GOLDEN / "misc" / name).read_text())


# ---------------------------------------------------------------- random truncation
# From truncate.json: (segments, start, length, offset, least share inside) -> (segments of the window, kept)
TRUNCATION = [
    # a crop of a short video; of segment 0 less than 75% is inside
    ([[89.20194244384766, 114.75033569335938], [45.31892395019531, 92.27853393554688]], 7, 93, 0.5, 0.75,
     [[38.31892395019531, 85.27853393554688]], [1]),
    # a long video; segment 1 begins before the window, with less than a quarter of its length
    ([[344.9938659667969, 366.8179626464844], [117.20046997070312, 147.30628967285156],
      [161.756591796875, 185.79437255859375]], 121, 192, 0.0, 0.75,
     [[0.0, 26.306289672851562], [40.756591796875, 64.79437255859375]], [1, 2]),
    # of the three segments over an edge of the window (110 to 302) 24%, 68% and 14% are inside: 30% is needed
    ([[293.08038330078125, 330.24267578125], [273.4822692871094, 315.15350341796875], [52.363773345947266,
     119.42535400390625]], 110, 192, 0.0, 0.3, [[163.48226928710938, 192.0]], [1]),
    # a feature sees 2 steps beyond its window: segments are cut at -2
    ([[-1.3504949808120728, 2.4786465167999268], [20.559431076049805, 45.736610412597656]], 25, 192, 2.0, 0.5,
     [[-2.0, 20.736610412597656]], [1]),
]


def check_truncation(segments, start, length, offset, min_overlap, expected, kept):
    cut, rows = truncate_segments(np.array(segments).reshape(-1, 2), start, length, offset, min_overlap)
    assert rows.tolist() == kept
    np.testing.assert_allclose(cut, np.array(expected).reshape(-1, 2), atol=1e-5)   # theirs are float32


@pytest.mark.parametrize("case", TRUNCATION)
def test_truncation_figures(case):
    check_truncation(*case)


def test_truncation_golden():
    whole = 0
    for case in golden("truncate.json"):
        expected = case["out_segments"], case["out_labels"]      # the label of a segment is its index
        if case["length"] == case["feat_len"]:
            # Departure: where the crop is the whole video, the reference leaves segments as they are even beyond its
            # end. Here the window always cuts them at what its features see.
            whole += 1
            assert case["out_segments"] == case["segments"]
            end = case["length"] + case["offset"]
            cut = np.clip(case["segments"], -case["offset"], end)
            share = (cut[:, 1] - cut[:, 0]) / np.diff(case["segments"])[:, 0]
            rows = np.flatnonzero(share >= case["trunc_thresh"])
            expected = cut[rows], rows.tolist()
            assert np.max(case["segments"]) > end                # there is something to cut
        check_truncation(case["segments"], case["start"], case["length"], case["offset"], case["trunc_thresh"],
                         *expected)
    assert whole == 1


# ---------------------------------------------------------------- learning rate and weight decay
# Steps of lr_schedule.json: base rate 1e-4, 50 warm-up steps of 350, lowest rate 1e-8.
RATES = {0: 0.0, 1: 2.0408163265306125e-06, 48: 9.795918367346935e-05, 49: 1e-4, 50: 1e-4, 51: 9.999725874242878e-05,
         54: 9.995614589079242e-05, 349: 1.2741257571220405e-08}
LOWEST = 1e-8


def check_rates(rates):
    """Departure: our cosine ends at 0, the reference's at 1e-8, a ten-thousandth of the base rate."""
    for step, rate in rates:
        factor = lr_factor(step, steps_per_epoch=10, epochs=35, warmup_epochs=5)
        ours = 1e-4 * factor if step < 50 else LOWEST + (1e-4 - LOWEST) * factor
        assert ours == pytest.approx(rate, abs=1e-12) and abs(1e-4 * factor - rate) <= LOWEST * 1.001


def test_learning_rate_figures():
    check_rates(RATES.items())
    assert lr_factor(350, 10, 35, 5) == 0 and lr_factor(0, 10, 35, 0) == 1   # past the end; without warm-up


def test_learning_rate_golden():
    expected = golden("lr_schedule.json")
    settings = [expected[key] for key in ("base_lr", "warmup_steps", "max_steps", "eta_min")]
    assert settings == [1e-4, 50, 350, LOWEST]
    check_rates(enumerate(expected["lr"]))


def decayed_names():
    """{name: decayed?} of a head's parameters by train.parameter_groups."""
    model = DetectionHead(8, 2, 8, drop_path=0.0)
    args = SimpleNamespace(lr=1e-4, lr_vision=1e-5, lr_lm=1e-5, weight_decay=0.05)
    decay = {id(p): group["weight_decay"] for group in parameter_groups(model, args) for p in group["params"]}
    assert set(decay.values()) == {0.0, 0.05} and len(decay) == len(list(model.parameters()))
    return {name: decay[id(p)] > 0 for name, p in model.named_parameters()}


def test_weight_decay_figures():
    decayed = decayed_names()
    for name in ("pyramid.embed.0.weight", "pyramid.stem.1.attention.conv.0.weight", "pyramid.branch.0.mlp.2.weight",
                 "pyramid.branch.4.attention.linear.2.weight", "cls_head.out.weight", "loc_head.hidden.1.weight"):
        assert decayed[name], name
    for name in ("scales", "pyramid.embed_norm.0.weight", "pyramid.stem.0.scale_mlp", "pyramid.stem.0.norm_mlp.weight",
                 "pyramid.branch.1.attention.linear.0.bias", "pyramid.level_norm.5.bias", "cls_head.out.bias"):
        assert not decayed[name], name
    assert sum(decayed.values()) == 71


def test_weight_decay_golden():
    expected = golden("optim_groups.json")
    decay, no_decay = set(), set()
    for name, decayed in decayed_names().items():
        theirs = official_name(name)
        names = {f"{theirs}.{i}.scale" for i in range(6)} if name == "scales" else {theirs}   # one parameter a level
        (decay if decayed else no_decay).update(names)
    assert decay == set(expected["decay"]) and no_decay == set(expected["no_decay"])


# ---------------------------------------------------------------- windows -> one video
class FixedModel(nn.Module):
    """Stands in for ActionVLM: finds what it is told.

    found: {(video, first step of a window): [(step in the window, steps to its left, to its right, class, score)]}.
    """
    multiple, language = 4, None
    config = SimpleNamespace(classes=["a", "b"], class_agnostic=False)

    def __init__(self, found):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))               # says which device
        self.found = found

    def forward(self, batch, use_language=True):
        B, L = batch.mask.shape
        logits, offsets = torch.full((B, L, 2), -20.0), torch.zeros(B, L, 2)
        for b, window in enumerate(batch.windows):
            for step, left, right, label, score in self.found.get((window.video.name, window.start), []):
                logits[b, step, label] = math.log(score / (1 - score))
                offsets[b, step] = torch.tensor([left, right])
        return Output([logits], [offsets], pyramid_points(L, [1], [[0, 1e4]]), [batch.mask])


def detections(tmp_path, found, lengths, duration=9.4, sigma=0.5):
    """detect() on videos of `lengths` steps in windows of 8 (overlap .5). Two steps a second: grid unit g is at
    second (5 g + 0.5 * 10) / 10 = g / 2 + 0.5. Returns {video: [(start, end, label, score)]}, rounded."""
    videos = []
    for name, length in lengths.items():
        np.save(tmp_path / f"{name}.npy", np.zeros((length, 1), np.float32))
        videos.append(Video(name, duration, 10.0, path=tmp_path / f"{name}.npy"))
    dataset = TALDataset(videos, ["a", "b"], window=8, stride=5, num_frames=10)
    args = SimpleNamespace(batch_size=3, workers=0, external_scores=None, nms_sigma=sigma, voting=0.0, max_per_class=0,
                           max_per_video=200)
    result = detect(FixedModel(found), dataset, args).predictions
    return {name: [(*np.round(s, 4).tolist(), label, round(float(score), 4))
                   for s, label, score in zip(p["segments"], p["labels"], p["scores"])] for name, p in result.items()}


# One action at steps 4-6 of video v, seen by the windows that start at 0 and at 4.
TWICE = {("v", 0): [(5, 1.0, 1.0, 0, 0.9)], ("v", 4): [(1, 1.0, 1.0, 0, 0.5)]}


def test_merge_shifts_windows_and_decays_the_duplicate(tmp_path):
    # Equal segments, tIoU 1: the second score is decayed by exp(-1 / sigma).
    assert detections(tmp_path, TWICE, {"v": 18}, sigma=0.5) == {
        "v": [(2.5, 3.5, "a", 0.9), (2.5, 3.5, "a", round(0.5 * math.exp(-2), 4))]}
    assert detections(tmp_path, TWICE, {"v": 18}, sigma=0.1) == {"v": [(2.5, 3.5, "a", 0.9)]}   # below .001: gone


def test_merge_keeps_other_classes_places_and_videos(tmp_path):
    found = {("v", 0): [(5, 1.0, 1.0, 0, 0.9)], ("v", 4): [(1, 1.0, 1.0, 1, 0.5), (5, 1.0, 1.0, 0, 0.4)],
             ("w", 0): [(5, 1.0, 1.0, 0, 0.3)]}
    assert detections(tmp_path, found, {"v": 18, "w": 6}, sigma=0.1) == {
        "v": [(2.5, 3.5, "a", 0.9), (2.5, 3.5, "b", 0.5), (4.5, 5.5, "a", 0.4)], "w": [(2.5, 3.5, "a", 0.3)]}


def test_merge_detection_in_the_tail_window(tmp_path):
    # 18 steps: windows at 0, 4, 8 and the tail at 10, the only one that holds steps 16 and 17.
    found = {("v", 10): [(6, 1.0, 0.5, 1, 0.8)], ("v", 8): [(7, 0.5, 0.5, 1, 0.7)]}
    assert detections(tmp_path, found, {"v": 18}) == {"v": [(8.0, 8.75, "b", 0.8), (7.75, 8.25, "b", pytest.approx(
        0.7 * math.exp(-(0.25 / 1.0) ** 2 / 0.5), abs=1e-4))]}   # 8.00-8.25 of 7.75-8.75 is shared


def test_merge_clamps_to_the_video(tmp_path):
    found = {("v", 0): [(1, 5.0, 1.0, 0, 0.9)], ("v", 10): [(7, 1.0, 9.0, 1, 0.8)]}
    assert detections(tmp_path, found, {"v": 18}) == {"v": [(0.0, 1.5, "a", 0.9), (8.5, 9.4, "b", 0.8)]}


def test_merge_without_detections(tmp_path):
    assert detections(tmp_path, {}, {"v": 18, "w": 3}) == {"v": [], "w": []}


def test_merge_ignores_padding(tmp_path):
    # Three steps padded to four: what the model says about the fourth is not there.
    assert detections(tmp_path, {("v", 0): [(3, 1.0, 1.0, 0, 0.9), (2, 1.0, 1.0, 0, 0.6)]}, {"v": 3}) == {
        "v": [(1.0, 2.0, "a", 0.6)]}
