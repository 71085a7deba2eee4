"""Windows, the feature grid, annotations, video decoding, and the demo (§4.1)."""
import csv
import gzip
import json
import math
import struct
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import data
from data import (
    TALDataset,
    collate,
    grid_to_seconds,
    random_window,
    seconds_to_grid,
    truncate_segments,
    window_starts,
)
from model import Config
from support import annotations, demo
from support.annotations import InputError, Video, load_annotations, load_descriptions
from support.demo import write_video
from support.flags import PRESETS
from support.video import (
    check_rows,
    choose_sets,
    choose_videos,
    complete,
    moving_pictures,
    open_features,
    open_joined,
    probe,
    read_frames,
)
from train import get_args
from vlm import NO_ACTION

def annotation_file(tmp_path, entry, name="annotations.json"):
    path = tmp_path / name
    path.write_text(json.dumps({"database": {"v": entry}}))
    return path


GOOD = {"subset": "training", "duration": 10.0, "fps": 25.0, "annotations": [{"label": "Run", "segment": [1, 2.5]}]}


def test_seconds_to_grid_by_hand():
    # 30 fps, stride 4, features of 16 frames: step 0 is centred on frame 8
    assert seconds_to_grid(8 / 30, 30, 4, 16) == pytest.approx(0)
    assert seconds_to_grid(12 / 30, 30, 4, 16) == pytest.approx(1)


def test_grid_round_trip():
    seconds = np.random.default_rng(0).uniform(0, 5000, 1000)
    for fps, stride, num_frames in ((30, 4, 16), (29.97, 1, 0), (15, 8, 32)):
        back = grid_to_seconds(seconds_to_grid(seconds, fps, stride, num_frames), fps, stride, num_frames)
        assert np.abs(back - seconds).max() < 1e-6


@pytest.mark.parametrize("T, L, starts", [(5, 8, [0]), (8, 8, [0]), (9, 8, [0, 1]), (16, 8, [0, 4, 8]),
                                          (18, 8, [0, 4, 8, 10])])
def test_sliding_windows_by_hand(T, L, starts):
    assert window_starts(T, L, 0.5) == starts


def test_sliding_windows_cover_every_step():
    for T in range(1, 60):
        starts = window_starts(T, 16, 0.5)
        assert {t for s in starts for t in range(s, min(s + 16, T))} == set(range(T))
        assert all(s + 16 <= T for s in starts) or T < 16


def test_truncate_segments_by_hand():
    segments = np.array([[0.0, 10.0], [8.0, 14.0], [18.0, 30.0], [40.0, 50.0], [12.0, 12.0]])
    cut, kept = truncate_segments(segments, start=10, length=10, beyond=0.0, min_overlap=0.5)
    assert kept.tolist() == [1] and cut.tolist() == [[0.0, 4.0]]
    cut, kept = truncate_segments(segments, start=10, length=10, beyond=4.0, min_overlap=0.4)
    assert kept.tolist() == [0, 1, 2] and cut.tolist() == [[-4.0, 0.0], [-2.0, 4.0], [8.0, 14.0]]


def test_random_window_of_a_long_video_holds_an_action():
    segments = np.array([[500.0, 510.0]])
    for seed in range(30):
        start, length = random_window(2000, 100, segments, 0.5, 0.0, np.random.default_rng(seed))
        assert length == 100 and start <= 505 and start + 100 >= 505


def test_random_window_of_a_short_video_is_a_crop_of_90_to_100_percent():
    lengths = {random_window(50, 100, np.zeros((0, 2)), 0.5, 0.0, np.random.default_rng(s))[1] for s in range(200)}
    assert lengths == set(range(45, 51))


def test_collate_pads_to_the_multiple_and_masks():
    video = Video("v", 10.0, 10.0)
    windows = [data.Window(video, 0, n, torch.ones(n, 2), torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
               for n in (3, 9)]
    batch = collate(windows, multiple=4, classes=["a"])
    assert batch.inputs.shape == (2, 12, 2) and batch.mask.sum(1).tolist() == [3, 9]
    assert batch.inputs[0, 3:].abs().sum() == 0 and batch.windows[1].length == 9 and batch.windows[1].inputs is None
    assert batch.names == ["v", "v"] and batch.answers == [NO_ACTION] * 2 and (batch.frame_class == torch.ones(2, 12)).all()
    full = [bool(collate(windows[i:], m, ["a"]).mask.all()) for i, m in ((0, 4), (1, 4), (0, 3), (1, 3))]
    assert full == [False, False, False, True]


def feature_dataset(tmp_path, T=40, training=True, **kwargs):
    np.save(tmp_path / "v.npy", np.arange(T * 2, dtype=np.float32).reshape(T, 2))
    video = Video("v", T * 4 / 30, 30.0, "training", np.array([[1.0, 2.0], [3.0, 4.0]]), ["b", "a"], tmp_path / "v.npy")
    return TALDataset([video], ["a", "b"], window=16, stride=4, training=training, **kwargs)


def test_dataset_windows_are_rows_of_the_file_with_their_segments(tmp_path):
    dataset = feature_dataset(tmp_path)
    for dataset.epoch in range(20):
        w = dataset[0]
        assert w.inputs[:, 0].tolist() == [2.0 * (w.start + i) for i in range(16)]
        for segment, label in zip(w.segments, w.labels):
            whole = [[3 * 7.5, 4 * 7.5], [7.5, 15.0]][int(label)]
            assert segment.tolist() == pytest.approx(np.clip(np.array(whole), w.start, w.start + 16) - w.start)


def test_dataset_depends_on_seed_epoch_and_index_alone(tmp_path):
    a, b = feature_dataset(tmp_path, seed=3), feature_dataset(tmp_path, seed=3)
    a.epoch = b.epoch = 5
    a[0]
    assert a[0].start == b[0].start
    starts = set()
    for b.epoch in range(20):
        starts.add(b[0].start)
    assert len(starts) > 3


def test_test_windows_cover_the_video_with_all_segments(tmp_path):
    dataset = feature_dataset(tmp_path, training=False)
    assert [dataset[i].start for i in range(len(dataset))] == [0, 8, 16, 24]


# ---------------------------------------------------------------- resized to one length, several frames a step
def resized_dataset(tmp_path, T=10, **kwargs):
    """Features of a ramp over 5 s, resized to 4 steps; one segment over the second quarter, one over everything."""
    np.save(tmp_path / "v.npy", np.stack([np.arange(T), 3 * np.arange(T)], 1).astype(np.float32))
    video = Video("v", 5.0, 25.0, "training", np.array([[1.25, 2.5], [0.0, 5.0]]), ["a", "b"], tmp_path / "v.npy")
    return TALDataset([video], ["a", "b"], window=768, stride=16, num_frames=16, resize_to=4, **kwargs)


@pytest.mark.parametrize("training", [True, False])
def test_resized_features_are_one_window_of_the_whole_video(tmp_path, training):
    dataset = resized_dataset(tmp_path, training=training)
    assert len(dataset) == 1
    window = dataset[0]
    assert (window.start, window.length, window.inputs.shape) == (0, 4, (4, 2))
    # The video is rows -0.5 to 9.5; the middles of its quarters lie at 0.75, 3.25, 5.75, 8.25.
    assert window.inputs[:, 0].tolist() == pytest.approx([0.75, 3.25, 5.75, 8.25])
    assert window.segments.tolist() == [[0.5, 1.5], [-0.5, 3.5]]      # quarter 2: half a step around step 1


def test_resized_grid_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    videos = [Video(str(i), duration, 30.0, path=tmp_path) for i, duration in enumerate(rng.uniform(1, 900, 50))]
    dataset = TALDataset(videos, [], 0, resize_to=192)
    for video, seconds in zip(dataset.videos, rng.uniform(0, 900, (50, 20))):
        grid = seconds_to_grid(seconds, video.fps, dataset.stride, dataset.num_frames)
        np.testing.assert_allclose(grid, seconds * 192 / video.duration - 0.5)
        assert np.abs(grid_to_seconds(grid, video.fps, dataset.stride, dataset.num_frames) - seconds).max() < 1e-6


@pytest.mark.parametrize("kwargs, wanted", [
    (dict(window=0, resize_to=5, frames_per_step=4), [5 * i + 2 for i in range(20)]),   # 10 s in 20 parts: middles
    (dict(window=100, resize_to=25), [4 * i + 2 for i in range(25)]),
    (dict(window=4, stride=8, num_frames=8, frames_per_step=4), [2 * i + 1 for i in range(16)]),
    (dict(window=4, stride=8), [0, 8, 16, 24]),
])
def test_frames_of_a_step_lie_evenly_over_it(counting_video, kwargs, wanted):
    dataset = TALDataset([Video("v", 10.0, 10.0, path=counting_video)], [], image_size=48, **kwargs)
    window = dataset[0]
    seen = frame_numbers(read_frames(counting_video, np.array(wanted) / 10, 48)[:, :, 8:56])
    assert frame_numbers(window.inputs.permute(0, 2, 3, 1).numpy()) == seen
    batch = collate([window], multiple=8, classes=[])
    k = kwargs.get("frames_per_step", 1)
    assert batch.inputs.shape[1] == k * batch.mask.shape[1] and batch.mask.sum() == window.length == len(wanted) / k


def test_features_with_nan_name_the_file(tmp_path):
    dataset = feature_dataset(tmp_path)
    np.save(tmp_path / "v.npy", np.full((40, 2), np.nan, dtype=np.float32))
    with pytest.raises(InputError, match=r"v\.npy: expected finite"):
        dataset[0]


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((0, 4)), np.array([{}], dtype=object)])
def test_feature_files_of_another_kind_name_the_file(tmp_path, array):
    np.save(tmp_path / "v.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=r"v\.npy: expected"):
        open_features(tmp_path / "v.npy")


# ---------------------------------------------------------------- annotations
def test_load_annotations(tmp_path):
    path = annotation_file(tmp_path, GOOD)
    (video,) = load_annotations(path)
    assert (video.name, video.duration, video.fps, video.subset, video.labels) == ("v", 10.0, 25.0, "training", ["Run"])
    assert video.segments.tolist() == [[1.0, 2.5]]
    zipped = tmp_path / "zipped"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert load_annotations(zipped)[0].labels == ["Run"]


@pytest.mark.parametrize("change, message", [
    ({"duration": -1}, "a duration of 0 to 1e6 s"), ({"duration": math.inf}, "a number of seconds, found inf"),
    ({"annotations": [{"segment": [1, 2]}]}, "label"), ({"annotations": [{"label": "a", "segment": [2, 1]}]}, "start <= end"),
    ({"annotations": [{"label": "a", "segment": [-1, 1]}]}, "start <= end"), ({"annotations": [{"label": "a"}]}, "segment"),
    ({"annotations": [{"label": "a", "segment": [1, math.nan]}]}, "two finite"),
    ({"annotations": [{"label": "a", "segment": [1, 2, 3]}]}, "segment"), ({"annotations": "x"}, "annotations"),
])
def test_bad_annotations_name_file_and_video(tmp_path, change, message):
    path = annotation_file(tmp_path, GOOD | change)
    with pytest.raises(InputError, match=message) as error:
        load_annotations(path)
    assert str(path) in str(error.value) and "'v'" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"database": []}'])
def test_files_that_are_no_annotations(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match="a.json: .*expected"):
        load_annotations(tmp_path / "a.json")


def test_descriptions_come_in_class_order_and_a_lack_is_named(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"b": "two", "a": "one", "unused": "x"}))
    assert list(load_descriptions(path, ["a", "b"], []).items()) == [("a", "one"), ("b", "two")]
    with pytest.raises(InputError, match="found none for Swim"):
        load_descriptions(path, ["a", "Swim"], [])


def choose(annotated, subset="training", notes=None, **flags):
    """choose_videos with these flags of train.py."""
    args = dict(annotations="f", videos=None, features=None, leave_out=[], skip_missing=False, dry_run=False, fps=0.0,
                resize_to=0)
    return choose_videos(annotated, subset, SimpleNamespace(**(args | flags)), notes)


def test_subset_names_in_any_case_and_unknown_ones_listed(tmp_path):
    videos = load_annotations(annotation_file(tmp_path, GOOD))
    (tmp_path / "v.npy").touch()
    assert [v.name for v in choose(videos, "TRAINING", features=tmp_path)] == ["v"]
    with pytest.raises(InputError, match=r"subset 'test', found training \(1 videos\); give one of these"):
        choose(videos, "test", features=tmp_path)


def test_missing_files_are_named_or_left_out_with_a_note(tmp_path):
    videos, notes = [Video(f"x{i}", 1.0, 1.0, "training") for i in range(14)], []
    for name in ("x0.npy", "v_x13.NPY", "x1.mp4"):
        (tmp_path / name).touch()
    lack = "found none for 12 of 14: x1, x2, x3, x4, x5, x6, x7, x8, x9, x10 and 2 more"
    with pytest.raises(InputError, match=lack):
        choose(videos, features=tmp_path)
    found = choose(videos, notes=notes, features=tmp_path, skip_missing=True)
    assert [v.path.name for v in found] == ["x0.npy", "v_x13.NPY"] and len(notes) == 1 and lack in notes[0]
    with pytest.raises(InputError, match="12 of 12"):                    # nothing at all is an error in any case
        choose(videos[1:13], notes=notes, features=tmp_path, skip_missing=True)


def test_files_are_found_by_names_with_and_without_v_and_ending(tmp_path):
    for name in ("a.npy", "v_b.NPY", "c.mp4.npz", "d.pt", "v_d.npy"):
        (tmp_path / name).touch()
    videos = [Video(name, 1.0, 1.0, "training") for name in ("a.mp4", "b", "v_c", "d")]
    assert [v.path.name for v in choose(videos, features=tmp_path)] == ["a.npy", "v_b.NPY", "c.mp4.npz", "d.pt"]
    (tmp_path / "x.h5").touch()
    with pytest.raises(InputError, match=r"found none for 1 of 1: x \(files there end in .*, .h5, .*\); add them"):
        choose([Video("x", 1.0, 1.0, "training")], features=tmp_path)


def test_feature_files_of_other_formats(tmp_path):
    rows = np.arange(6.0).reshape(3, 2)
    np.save(tmp_path / "a.NPY.npy", rows[None])                                     # (1, T, V)
    np.savez(tmp_path / "b.npz", feats=rows, times=np.zeros(3))
    np.savez(tmp_path / "c.npz", rows)
    torch.save(torch.from_numpy(rows), tmp_path / "d.pt")
    for name in ("a.NPY.npy", "b.npz", "c.npz", "d.pt"):
        assert open_features(tmp_path / name).tolist() == rows.tolist(), name
    torch.save({"rows": Path("x")}, tmp_path / "e.pt")                              # would run code
    np.savez(tmp_path / "f.npz", rows=rows, times=rows)
    for name in ("e.pt", "f.npz"):
        with pytest.raises(InputError, match=f"{name}: expected a .npy file"):
            open_features(tmp_path / name)


def test_features_of_two_folders_are_joined(tmp_path):
    """Files of one video side by side, cut to the shorter one; more than three rows apart are an error."""
    for name, shape in (("rgb/v", (10, 2)), ("flow/v_v", (7, 3)), ("short/v", (6, 1))):
        (tmp_path / name).parent.mkdir()
        np.save(tmp_path / f"{name}.npy", np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    rgb, flow, short = (tmp_path / name for name in ("rgb", "flow", "short"))
    videos = [Video("v", 1.0, 1.0, "training")]
    video, = choose(videos, features=[rgb, flow])
    assert open_joined(video, 5)[6].tolist() == [12, 13, 18, 19, 20] and len(open_joined(video)) == 7
    assert TALDataset([video], [], window=4).read_rows(video, 5, 2)[1].tolist() == [12, 13, 18, 19, 20]
    with pytest.raises(InputError, match=r"rgb/v.npy and .*flow/v_v.npy: expected 4 columns, as in the training videos, found 5; "):
        open_joined(video, 4)
    video, = choose(videos, features=[rgb, short])
    with pytest.raises(InputError, match=r"rgb/v.npy and .*short/v.npy: expected as many rows in each, give or take 3, found 10 and 6; "):
        open_joined(video)
    np.save(rgb / "x.npy", np.zeros((9, 2)))
    with pytest.raises(InputError, match="flow: expected .* found none for 1 of 2: x "):
        choose([*videos, Video("x", 1.0, 1.0, "training")], features=[rgb, flow])


def test_the_test_set_alone_has_the_classes_of_the_model(tmp_path, capsys):
    """Only the files of the test videos are there; the classes stay in the order of the model."""
    database = {"a": GOOD, "b": GOOD | {"subset": "test"}}
    (tmp_path / "a.json").write_text(json.dumps({"database": database}))
    np.save(tmp_path / "b.npy", np.ones((60, 2)))
    args = get_args(["--dataset", "custom", "--features", str(tmp_path), "--annotations", str(tmp_path / "a.json"),
                     "--descriptions", "moved", "--test-subset", "test", "--leave-out", "c", "--device", "cpu"])
    known = {"Walk": "x", "Run": "y"}
    config = Config(descriptions=known, feature_dim=2, lm="")
    test = data.load_test_data(args, config)
    assert list(test.classes) == ["Walk", "Run"] and [v.name for v in test.videos] == ["b"] and not test.training
    assert test[0].labels.tolist() == [1] and test.feature_dim == 2 and capsys.readouterr().err == ""
    with pytest.raises(InputError, match="a.json: expected labels that the model knows, found Run, which it was not trained on; correct or drop them"):
        data.load_test_data(args, replace(config, descriptions={"Walk": "x"}))
    database["c"] = GOOD | {"subset": "test", "annotations": [{"label": "Fly", "segment": [2, 1]}]}      # of --leave-out
    (tmp_path / "a.json").write_text(json.dumps({"database": database}))
    assert len(data.load_test_data(args, config).videos) == 1


def test_the_preset_knows_both_names_of_the_subsets(tmp_path):
    args = SimpleNamespace(dataset="thumos14", train_subset="validation", test_subset="test", annotations="f", videos=None,
                           features=tmp_path, leave_out=[], skip_missing=False, dry_run=False, fps=30, resize_to=0,
                           opentad_subsets=PRESETS["thumos14"]["opentad_subsets"])
    (tmp_path / "a.npy").touch(), (tmp_path / "b.npy").touch()
    for names, said in ((("Validation", "Test"), 0), (("training", "validation"), 1)):
        videos = [Video(name, 1.0, 0, subset, np.array([[0, 1.0]]), [label])
                  for name, subset, label in zip("ab", names, ("Run", "Jump"))]
        notes = []
        one, two = choose_sets(videos, args, notes)
        assert [one[0].name, two[0].name] == ["a", "b"] and len(notes) == said + 1
        assert "1 classes of the test subset have no segment to train on: Jump" in notes[-1]
    assert notes[0] == "f: subsets training and validation are read in place of validation and test, as OpenTAD names them"
    for part in (videos, videos[1:]):                                               # the test subset alone, if need be in a file of its own
        notes = []
        assert [v.name for v in choose_sets(part, args, notes, ["test_subset"])[0]] == ["b"]
        assert notes == ["f: subsets validation are read in place of test, as OpenTAD names them"]
    args.opentad_subsets = {}
    with pytest.raises(InputError, match="expected videos of subset 'test'"):
        choose_sets(videos, args, [])


def rows_of(tmp_path, shapes, durations, **flags):
    """check_rows of feature files of these shapes: 30 fps, stride 4, 16 frames a feature."""
    videos = [Video(f"v{i}", seconds, 30.0, path=tmp_path / f"v{i}.npy") for i, seconds in enumerate(durations)]
    for video, shape in zip(videos, shapes):
        np.save(video.path, np.zeros(shape))
    sets = [TALDataset(part, [], 16, 4, 16, **flags) for part in (videos[:-1], videos[-1:])]
    return check_rows(*sets)


@pytest.mark.parametrize("shapes, durations", [
    ([(3, 9)] * 3, [1] * 3),                                                        # (30 - 16) / 4 = 3.5
    ([(71, 9), (72, 9), (75, 9), (77, 9)], [10] * 4),                               # floor, + 1, padded, two more
    ([(1, 9), (1, 9)], [0.2, 0.4])])                                                # shorter than one feature
def test_right_numbers_of_rows_are_no_note(tmp_path, shapes, durations):
    assert rows_of(tmp_path, shapes, durations) == []


def test_feature_files_that_stand_out_are_named(tmp_path):
    (note,) = rows_of(tmp_path, [(72, 9), (36, 9), (72, 9), (150, 9)], [10] * 4)    # the last one is of the test set
    assert note.startswith("2 of 4 feature files have not (duration * fps - num_frames) / stride + 1 rows, but 1.29 times")
    assert "v1.npy 36 (expected 72), v3.npy 150 (expected 72); check --stride" in note
    assert rows_of(tmp_path, [(100, 9), (100, 9)], [10, 90], resize_to=100) == []


@pytest.mark.parametrize("shapes, durations", [([(4, 72)] * 3, [10] * 3),                          # far from 72 rows
                                               ([(300, 220), (300, 260), (300, 355)], [30, 35, 48])])   # V near T
def test_transposed_features_are_an_error(tmp_path, shapes, durations):
    with pytest.raises(InputError, match=rf"rows, found {shapes[0][0]} in all 3; they look transposed, \(V, T\)"):
        rows_of(tmp_path, shapes, durations)


# ---------------------------------------------------------------- videos
@pytest.fixture(scope="module")
def counting_video(tmp_path_factory):
    """A video whose frame i shows the number i as eight bars, white for 1: 100 frames at 10 fps."""
    path = tmp_path_factory.mktemp("video") / "count.mp4"
    bits = (np.arange(100)[:, None] >> np.arange(8)) & 1                               # (100, 8)
    write_video(path, np.tile(np.repeat(255 * bits, 8, 1)[:, None, :, None], (1, 48, 1, 3)).astype(np.uint8), 10)
    return path


def frame_numbers(frames):
    bars = frames.mean((1, 3)).reshape(len(frames), 8, -1).mean(2) > 127
    return (bars * 2 ** np.arange(8)).sum(1).tolist()


def test_read_frames_gives_the_frame_shown_at_each_time(counting_video):
    for start, step in ((0, 1), (3, 7), (57, 4), (90, 1)):
        wanted = list(range(start, 100, step))
        frames = read_frames(counting_video, np.array(wanted) / 10, 48)
        assert frames.shape[1:] == (48, 64, 3) and frame_numbers(frames) == wanted


def test_read_frames_repeats_the_last_frame_past_the_end(counting_video):
    assert frame_numbers(read_frames(counting_video, np.array([9.8, 9.9, 10.5, 30.0]), 48)) == [98, 99, 99, 99]


def test_read_frames_can_show_a_frame_twice(counting_video):
    assert frame_numbers(read_frames(counting_video, np.array([1.0, 1.0, 1.02, 1.1]), 24)) == [10, 10, 10, 11]


def write_frames(path, pts, codec="libx264", rotation=None, images=None, sound=0, options=None):
    """A video with the given times of its frames in milliseconds; frame i shows the number i. sound: seconds."""
    import av
    bits = (np.arange(len(pts))[:, None] >> np.arange(8)) & 1
    if images is None:
        images = np.tile(np.repeat(255 * bits, 8, 1)[:, None, :, None], (1, 48, 1, 3)).astype(np.uint8)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=25, options={"g": "30", "bf": "3"})
        stream.height, stream.width, stream.pix_fmt = images.shape[1], images.shape[2], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if sound:
            silence = container.add_stream("aac", rate=8000, layout="mono")
        for image, time in zip(images, pts):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = int(time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000 * sound), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux([*silence.encode(frame), *silence.encode()])


@pytest.mark.parametrize("name", ["late.mp4", "varying.mp4", "varying.mkv"])
def test_read_frames_follows_the_times_in_the_file(tmp_path, name):
    # Start at 3 s; or gaps of 20 to 400 ms. A key frame every 30, B-frames between: seeking has to find them all.
    gaps = np.full(100, 40) if name == "late.mp4" else np.random.default_rng(0).choice([20, 40, 40, 400], 100)
    pts = np.cumsum(gaps) + 3000 * (name == "late.mp4")
    write_frames(tmp_path / name, pts)
    times = (pts - pts[0]) / 1000
    for first in range(0, 100, 3):
        assert frame_numbers(read_frames(tmp_path / name, times[first::7], 48)) == list(range(100))[first::7]
    if name != "late.mp4":                                       # 200 ms into a gap the frame before it still shows
        i = int(np.flatnonzero(np.diff(pts) == 400)[0])
        assert frame_numbers(read_frames(tmp_path / name, times[i:i + 1] + 0.2, 48)) == [i]


@pytest.mark.parametrize("name, start, more", [
    ("late.mkv", 3000, {}), ("recorded.mkv", 0, dict(options={"live": "1"})),               # no duration in the file
    ("recorded.webm", 60000, dict(options={"live": "1"}, codec="libvpx")),
    ("sound.mkv", 0, dict(sound=9)), ("sound.mp4", 0, dict(sound=9))])
def test_a_video_has_the_times_of_its_pictures(tmp_path, name, start, more):
    write_frames(tmp_path / name, start + 40 * np.arange(50), **more)
    assert probe(tmp_path / name) == (2.0, 25.0)
    frames = frame_numbers(read_frames(tmp_path / name, np.array([0, 1, 1.96, 5, 8]), 48))      # 8 s in the annotations
    assert frames == [0, 25, 49, 49, 49]
    video = Video("v", 0.0, 0, "training", np.array([[1, 3.0]]), ["Run"])
    (tmp_path / name).rename(tmp_path / f"v{(tmp_path / name).suffix}")
    (found,) = choose([video], videos=tmp_path)
    assert (found.duration, found.fps, found.segments.tolist()) == (2.0, 25.0, [[1, 2]])


def test_a_cover_is_no_video():
    from av.stream import Disposition
    cover, clip = (SimpleNamespace(disposition=kind) for kind in (Disposition.attached_pic, Disposition.default))
    assert moving_pictures(SimpleNamespace(streams=SimpleNamespace(video=[cover, clip]))) is clip


# In the file a white quarter at the top left. The matrix of a phone held upright turns the picture clockwise by 90
# degrees for display, which FFmpeg calls -90: then the quarter is at the top right, and the picture is upright.
@pytest.mark.parametrize("rotation, quarter", [(0, (0, 0)), (-90, (0, 1)), (180, (1, 1)), (90, (1, 0))])
def test_read_frames_turns_rotated_videos_upright(tmp_path, rotation, quarter):
    images = np.zeros((2, 48, 96, 3), np.uint8)
    images[:, :24, :48] = 255
    write_frames(tmp_path / "v.mp4", [0, 40], rotation=rotation, images=images)
    raw = (tmp_path / "v.mp4").read_bytes()
    matrix = raw.index(b"tkhd") + 44                                                    # x' = a x + c y, y' = b x + d y
    a, b, _, c, d = struct.unpack(">5i", raw[matrix:matrix + 20])
    centre = np.array([a * -1 + c * -1, b * -1 + d * -1]) > 0                            # of the quarter, (x, y)
    assert (centre[1], centre[0]) == quarter                                             # what players do
    (frame,) = read_frames(tmp_path / "v.mp4", np.zeros(1), 48)
    assert frame.shape == ((96, 48, 3) if rotation in (90, -90) else (48, 96, 3))
    h, w = frame.shape[0] // 2, frame.shape[1] // 2
    means = frame.reshape(2, h, 2, w, 3).mean((1, 3, 4))
    assert np.unravel_index(means.argmax(), (2, 2)) == quarter and np.sort(means.ravel())[-2:].round() @ [1, 0] < 10


def audio_only(path):
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])


def no_frames(path):
    import av
    with av.open(str(path), "w", options={"movflags": "empty_moov"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()


def cut_off(path):
    write_frames(path, 40 * np.arange(200))
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])


def b_frames_in_avi(path):
    write_video(path, np.repeat(np.arange(0, 240, 3, dtype=np.uint8), 48 * 64 * 3).reshape(80, 48, 64, 3), 25)


@pytest.mark.parametrize("make, name, message", [
    (audio_only, "v.mp4", "no video stream"), (no_frames, "v.mp4", "found none"), (cut_off, "v.mp4", "can decode"),
    (cut_off, "v.mkv", r"8.0 s, as the file says, found frames up to [45]\.\d s"),
    (b_frames_in_avi, "v.avi", "without times or order"), (lambda path: path.write_bytes(b""), "v.mp4", "can decode"),
    (lambda path: None, "v.mp4", "No such file"),
])
def test_broken_videos_are_named(tmp_path, make, name, message):
    make(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}: expected .*{message}"):
        read_frames(tmp_path / name, np.array([0.0, 0.4, 7.9]), 48)


def test_an_error_in_a_worker_process_reads_the_same(tmp_path):
    (tmp_path / "v.npy").write_bytes(b"nothing")
    dataset = feature_dataset(tmp_path)
    (tmp_path / "v.npy").write_bytes(b"nothing")
    messages = []
    for workers in (0, 1):
        with pytest.raises(InputError, match="v.npy: expected a .npy file") as error:
            next(iter(DataLoader(dataset, num_workers=workers)))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_probe(counting_video):
    assert probe(counting_video) == (10.0, 10.0)


def test_a_file_that_is_no_video_is_named(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"not a video")
    for read in (probe, lambda p: read_frames(p, np.zeros(1), 32)):
        with pytest.raises(InputError, match=r"x\.mp4: expected a video"):
            read(tmp_path / "x.mp4")


def test_augment_is_one_draw_for_the_whole_window():
    frames = torch.randint(0, 256, (1, 3, 36, 48), dtype=torch.uint8).expand(5, -1, -1, -1)
    out = data.augment(frames, 32, np.random.default_rng(0))
    assert out.shape == (5, 3, 32, 32) and out.dtype == torch.uint8 and all(torch.equal(out[0], x) for x in out)


def test_centre_crop():
    frames = torch.arange(4 * 8).reshape(1, 1, 4, 8).expand(1, 3, -1, -1)
    assert data.centre_crop(frames, 4)[0, 0, 0].tolist() == [2, 3, 4, 5]


# ---------------------------------------------------------------- the demo
def test_demo_is_deterministic_and_complete(tmp_path):
    for name in "ab":
        demo.make_demo(tmp_path / name, train=1, test=1, incomplete=0)
    for file in ("annotations.json", "descriptions.json", "videos/test_000.mp4", "videos/training_000.mp4"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    videos = load_annotations(tmp_path / "a" / "annotations.json")
    for video in choose(videos, videos=tmp_path / "a/videos") + choose(videos, "test", videos=tmp_path / "a/videos"):
        assert probe(video.path) == (pytest.approx(video.duration), 10.0)
        assert (video.segments[1:, 0] > video.segments[:-1, 1]).all() and video.segments.max() < video.duration


def test_demo_training_and_test_clips_differ(tmp_path):
    demo.make_demo(tmp_path, train=1, test=1, incomplete=1)
    one, two = load_annotations(tmp_path / "annotations.json")
    assert one.segments.tolist() != two.segments.tolist()


def test_demo_incomplete_actions_begin_like_the_action_and_go_back():
    for whole, halfway in ((True, False), (False, True)):
        states, actions = demo.demo_script(np.random.default_rng([0, 3, 0]), whole)
        for a in actions:
            first, last = (round(10 * t) for t in a["segment"])
            begin = demo.demo_action(a["label"], np.zeros(1))[0]
            goes_back = np.allclose(states[last - 1], begin)
            assert np.allclose(states[first], begin)
            assert goes_back == (halfway or a["label"] in ("Wave", "JumpingJack"))     # these two end as they began


def test_demo_incomplete_clips_are_added_to_a_demo_that_has_none(tmp_path):
    demo.make_demo(tmp_path, train=1, test=1, incomplete=1)
    before = (tmp_path / "annotations.json").read_bytes()
    (tmp_path / "incomplete.json").unlink()
    demo.make_demo(tmp_path, train=1, test=1, incomplete=1)
    video, = choose(load_annotations(tmp_path / "incomplete.json"), "incomplete", videos=tmp_path / "videos")
    assert (video.name, video.subset) == ("incomplete_000", "incomplete") and len(video.labels) in (3, 4)
    assert (tmp_path / "annotations.json").read_bytes() == before


@pytest.mark.parametrize("one, other", [("SitDown", "StandUp"), ("Throw", "Catch")])
def test_demo_pairs_show_the_same_poses_in_opposite_order(one, other):
    u = np.linspace(0, 1, 11)
    np.testing.assert_allclose(demo.demo_action(one, u), demo.demo_action(other, u)[::-1], atol=1e-9)


def test_demo_is_not_written_twice(tmp_path):
    demo.make_demo(tmp_path, train=1, test=1, incomplete=1)
    (tmp_path / "videos" / "test_000.mp4").unlink()
    demo.make_demo(tmp_path, train=1, test=1, incomplete=1)
    assert not (tmp_path / "videos" / "test_000.mp4").exists()


# ---------------------------------------------------------------- descriptions
SHARED = Path(__file__).parents[2] / "shared" / "data"


def labels_of(dataset):
    """The label names of an annotation file in ../shared."""
    if dataset.startswith("epic"):
        path = SHARED / "epic100" / f"EPIC_100_{dataset.split('_')[1]}_classes.csv"
        return {row["key"] for row in csv.DictReader(path.open())}
    file = {"thumos14": "thumos14.json.gz", "activitynet": "anet13_trainval_bsn_subset.json.gz",
            "utkinect": "utkinect/annotations.json"}[dataset]
    return {label for video in load_annotations(SHARED / file) for label in video.labels}


@pytest.mark.parametrize("dataset, count", [("thumos14", 20), ("activitynet", 200), ("epic_verb", 97),
                                            ("epic_noun", 300), ("utkinect", 10), ("demo", 6)])
def test_descriptions_are_one_line_each_and_all_different(dataset, count):
    content = annotations.read_json(Path(data.__file__).parent / "descriptions" / f"{dataset}.json")
    assert len(content) == count == len(set(content.values()))
    assert all(text.strip() == text and text and "\n" not in text for text in content.values())


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is absent")
@pytest.mark.parametrize("dataset", ["thumos14", "activitynet", "epic_verb", "epic_noun", "utkinect"])
def test_descriptions_have_the_labels_of_the_annotations(dataset):
    content = annotations.read_json(Path(data.__file__).parent / "descriptions" / f"{dataset}.json")
    assert set(content) == labels_of(dataset)


def test_rows_of_features_tell_a_missing_duration(tmp_path):
    """80 rows at stride 4 of 25 fps, and half of the 16 frames that a row sees: (320 + 8) / 25 s. Without fps nothing tells it."""
    np.save(tmp_path / "a.npy", np.zeros((80, 6), np.float32))
    video = Video("a", 0, 25, path=tmp_path / "a.npy")
    args = SimpleNamespace(annotations="f", videos=None, fps=0, stride=4, num_frames=16, resize_to=0)
    assert complete(video, args).duration == 328 / 25
    args.resize_to = 32
    with pytest.raises(InputError, match="video 'a': expected a duration, found none; add it, or give --fps"):
        complete(replace(video, fps=0), args)
