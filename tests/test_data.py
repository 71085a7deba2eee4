"""Windows, the feature grid, annotations, video decoding, and the demo (§4.1)."""
import csv
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import (InputError, TALDataset, Video, collate, grid_to_seconds, load_annotations, load_descriptions,
                  random_window, read_frames, seconds_to_grid, truncate_segments, window_starts, write_video)


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
    cut, kept = truncate_segments(segments, start=10, length=10, offset=0.0, min_overlap=0.5)
    assert kept.tolist() == [1] and cut.tolist() == [[0.0, 4.0]]
    cut, kept = truncate_segments(segments, start=10, length=10, offset=4.0, min_overlap=0.4)
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
    batch = collate(windows, multiple=4)
    assert batch.inputs.shape == (2, 12, 2) and batch.mask.sum(1).tolist() == [3, 9]
    assert batch.inputs[0, 3:].abs().sum() == 0 and batch.windows[1].length == 9 and batch.windows[1].inputs is None


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


def test_features_with_nan_name_the_file(tmp_path):
    dataset = feature_dataset(tmp_path)
    np.save(tmp_path / "v.npy", np.full((40, 2), np.nan, dtype=np.float32))
    with pytest.raises(InputError, match=r"v\.npy: expected finite"):
        dataset[0]


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((0, 4)), np.array([{}], dtype=object)])
def test_feature_files_of_another_kind_name_the_file(tmp_path, array):
    np.save(tmp_path / "v.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=r"v\.npy: expected"):
        data.open_features(tmp_path / "v.npy")


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
    ({"duration": 0}, "duration above 0"), ({"duration": math.inf}, "duration above 0"), ({"duration": None}, "duration"),
    ({"annotations": [{"segment": [1, 2]}]}, "label"), ({"annotations": [{"label": "a", "segment": [2, 1]}]}, "start <= end"),
    ({"annotations": [{"label": "a", "segment": [-1, 1]}]}, "start <= end"), ({"annotations": [{"label": "a"}]}, "segment"),
    ({"annotations": [{"label": "a", "segment": [1, math.nan]}]}, "start <= end"),
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
    with pytest.raises(InputError, match="a.json: expected"):
        load_annotations(tmp_path / "a.json")


def test_descriptions_come_in_class_order_and_a_lack_is_named(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"b": "two", "a": "one", "unused": "x"}))
    assert list(load_descriptions(path, ["a", "b"]).items()) == [("a", "one"), ("b", "two")]
    with pytest.raises(InputError, match="found none for Swim"):
        load_descriptions(path, ["a", "Swim"])


def test_subset_names_in_any_case_and_unknown_ones_listed(tmp_path):
    videos = load_annotations(annotation_file(tmp_path, GOOD))
    assert data.subset_of(videos, "TRAINING", "f") == videos
    with pytest.raises(InputError, match=r"found none; subsets there: \['training'\]"):
        data.subset_of(videos, "test", "f")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match="found none for 1 of 1: v"):
        data.find_files([Video("v", 1.0, 1.0)], tmp_path)


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


def test_probe(counting_video):
    assert data.probe(counting_video) == (10.0, 10.0)


def test_a_file_that_is_no_video_is_named(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"not a video")
    for read in (data.probe, lambda p: read_frames(p, np.zeros(1), 32)):
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
        data.make_demo(tmp_path / name, train=2, test=1)
    for file in ("annotations.json", "descriptions.json", "videos/test_000.mp4", "videos/training_001.mp4"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    videos = data.find_files(load_annotations(tmp_path / "a" / "annotations.json"), tmp_path / "a" / "videos")
    for video in videos:
        assert data.probe(video.path) == (pytest.approx(video.duration), 10.0)
        assert (video.segments[1:, 0] > video.segments[:-1, 1]).all() and video.segments.max() < video.duration


def test_demo_training_and_test_clips_differ(tmp_path):
    data.make_demo(tmp_path, train=1, test=1)
    one, two = load_annotations(tmp_path / "annotations.json")
    assert one.segments.tolist() != two.segments.tolist()


@pytest.mark.parametrize("one, other", [("SitDown", "StandUp"), ("Throw", "Catch")])
def test_demo_pairs_show_the_same_poses_in_opposite_order(one, other):
    u = np.linspace(0, 1, 11)
    for a, b in zip(data.demo_action(one, u), data.demo_action(other, u)):
        np.testing.assert_allclose(a, b[::-1], atol=1e-9)


def test_demo_is_not_written_twice(tmp_path):
    data.make_demo(tmp_path, train=1, test=1)
    (tmp_path / "videos" / "test_000.mp4").unlink()
    data.make_demo(tmp_path, train=1, test=1)
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
                                            ("epic_noun", 300), ("utkinect", 10)])
def test_descriptions_are_one_line_each_and_all_different(dataset, count):
    content = data.read_json(Path(data.__file__).parent / "descriptions" / f"{dataset}.json")
    assert len(content) == count == len(set(content.values()))
    assert all(text.strip() == text and text and "\n" not in text for text in content.values())


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is absent")
@pytest.mark.parametrize("dataset", ["thumos14", "activitynet", "epic_verb", "epic_noun", "utkinect"])
def test_descriptions_have_the_labels_of_the_annotations(dataset):
    content = data.read_json(Path(data.__file__).parent / "descriptions" / f"{dataset}.json")
    assert set(content) == labels_of(dataset)
