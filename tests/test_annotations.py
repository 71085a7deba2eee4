"""Annotation files of the data sets: their formats, what is dropped or cut, class names, external scores, presets.

Counts of the real files need ../shared/data and skip without it.
"""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from support import annotations
from support.annotations import (
    InputError,
    Video,
    class_names,
    load_annotations,
    load_external_scores,
)
from support.flags import FEATURE_PRESETS, PRESETS

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is absent")


def write(folder, **files):
    """Write `name=text` to folder/name.csv."""
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text)
    return folder


def json_file(folder, *rows, duration=10.0):
    path = folder / "a.json"
    path.write_text(json.dumps({"database": {"v": {"subset": "test", "duration": duration, "annotations": [
        {"label": label, "segment": segment} for label, *segment in rows]}}}))
    return path


@pytest.fixture
def thumos(tmp_path):
    """THUMOS14's csv: two test videos with info, and one without, all of whose rows are ambiguous."""
    return write(
        tmp_path,
        test_Annotation="video,type,type_idx,start,end,startFrame,endFrame\n"
                        "video_test_0000004,CliffDiving,22,0.2,1.1,6,33\n"
                        "video_test_0000006,Ambiguous,0,1.0,2.0,30,60\nvideo_test_0000004,Diving,26,0.2,1.1,6,33\n"
                        "video_test_0000006,Diving,26,3.0,4.5,90,135\nvideo_test_0001292,Ambiguous,0,1,2,30,60\n",
        test_video_info="video,fps,sample_fps,count,sample_count\nvideo_test_0000004,30.0,10.0,1012.0,337\n"
                        "video_test_0000006,25.0,10.0,200.0,670\n")


@pytest.fixture
def epic(tmp_path):
    return write(
        tmp_path,
        EPIC_100_validation="narration_id,video_id,start_timestamp,stop_timestamp,narration,verb_class,noun_class\n"
                            'P01_11_0,P01_11,00:00:00.50,00:00:01.89,"take, lift plate",0,2\n'
                            "P02_01_0,P02_01,01:02:03.25,01:02:04.00,put plate,1,2\n",
        EPIC_100_train="video_id,start_timestamp,stop_timestamp,verb_class,noun_class\n"
                       "P01_01,00:00:01.00,00:01:01.5,0,0\n",
        EPIC_100_video_info="video_id,duration,fps,resolution\n"
                            "P01_01,100.0,59.94,a\nP01_11,50.5,50.0,a\nP02_01,4000,50,a\n",
        EPIC_100_verb_classes="id,key,instances,category\n0,take,\"['get', 'grab']\",x\n1,put,[],x\n2,wash,[],x\n",
        EPIC_100_noun_classes="id,key,instances,category\n0,tap,[],x\n2,plate,[],x\n")


# ---------------------------------------------------------------- formats
def test_thumos_csv(thumos):
    notes = []
    one, two = load_annotations(thumos, notes=notes)
    assert (one.name, one.subset, one.fps, one.duration) == ("video_test_0000004", "Test", 30.0, 1012 / 30)
    assert one.labels == ["CliffDiving", "Diving"] and one.segments.tolist() == [[0.2, 1.1]] * 2      # both are kept
    assert (two.fps, two.duration, two.labels, two.segments.tolist()) == (25.0, 8.0, ["Diving"], [[3.0, 4.5]])
    assert notes == [f"{thumos}: 2 segments labelled Ambiguous, dropped"]
    assert [v.name for v in load_annotations(thumos / "test_Annotation.csv")] == [one.name, two.name]
    assert class_names(thumos, [one, two]) == ["CliffDiving", "Diving"]


def test_thumos_folder_reads_both_subsets(thumos):
    for name in ("Annotation", "video_info"):
        text = (thumos / f"test_{name}.csv").read_text()
        (thumos / f"val_{name}.csv").write_text(text.replace("video_test", "video_validation"))
    assert [v.subset for v in load_annotations(thumos)] == ["Validation"] * 2 + ["Test"] * 2


def test_epic_csv(epic):
    training, one, two = load_annotations(epic)
    assert [v.subset for v in (training, one, two)] == ["training", "validation", "validation"]
    assert (training.labels, training.segments.tolist()) == (["take"], [[1.0, 61.5]])
    assert (one.name, one.duration, one.fps, one.labels) == ("P01_11", 50.5, 50.0, ["take"])
    assert two.labels == ["put"] and two.segments.tolist() == [[3723.25, 3724.0]]
    nouns = load_annotations(epic / "EPIC_100_validation.csv", labels="noun")
    assert [v.labels for v in nouns] == [["plate"], ["plate"]]
    # Classes are those of the class file in its order, in use or not.
    assert class_names(epic, nouns) == ["take", "put", "wash"] and class_names(epic, nouns, "noun") == ["tap", "plate"]
    with pytest.raises(InputError, match="EPIC_100_action_classes.csv: expected a csv file"):
        load_annotations(epic, labels="action")


@pytest.mark.parametrize("file, old, new, message", [
    ("EPIC_100_video_info", "P02_01", "P09_01", r"video_info.csv: expected a row for every .* for P02_01;"),
    ("EPIC_100_validation", "stop_timestamp", "end", r"tion.csv: line 1: expected a column 'stop_timestamp', found na"),
    ("EPIC_100_validation", "01:02:04.00", "3724", r"tion.csv: line 3: column 'stop_timestamp': expected HH:MM:SS.ff"),
    ("EPIC_100_validation", "plate,1,2", "plate,,2", r"line 3: column 'verb_class': expected an id of EPIC_100_verb_classes.csv, found ''"),
    ("EPIC_100_validation", "plate,1,2", "plate,7,2", r"line 3: column 'verb_class': expected an id of EPIC_100_verb_classes.csv, found '7'"),
    ("EPIC_100_validation", "01:02:04", "01:02:03", r"video 'P02_01': expected segments with 0 <= start <= end"),
    ("EPIC_100_video_info", "4000", "long", r"info.csv: line 4: column 'duration': expected a number, found 'long'"),
    ("EPIC_100_train", "video_id", "\x00", r"train.csv: "),
])
def test_csv_of_another_kind_names_file_line_and_column(epic, file, old, new, message):
    text = (epic / f"{file}.csv").read_text()
    assert old in text
    (epic / f"{file}.csv").write_text(text.replace(old, new))
    with pytest.raises(InputError, match=message):
        load_annotations(epic)


@pytest.mark.parametrize("lacking", ["EPIC_100_video_info", "EPIC_100_verb_classes"])
def test_a_csv_file_that_lacks_is_named(epic, lacking):
    (epic / f"{lacking}.csv").unlink()
    with pytest.raises(InputError, match=f"{lacking}.csv: expected a csv file"):
        load_annotations(epic)


def test_folders_and_files_without_annotations(tmp_path):
    with pytest.raises(InputError, match="expected a folder with val_Annotation.csv or "):
        load_annotations(tmp_path)
    with pytest.raises(InputError, match="x.csv: line 1: expected a column 'video', found name, text"):
        load_annotations(write(tmp_path, x="name,text\n1,2\n") / "x.csv")


# ---------------------------------------------------------------- what is dropped or cut
def test_segments_that_are_dropped_or_cut(tmp_path):
    path, notes = json_file(tmp_path, ("a", 1, 2), ("AMBIGUOUS", 3, 4), ("a", 1.0005, 2.0005), ("b", 1, 2), ("a", 5, 5),
                            ("a", 9, 10.5), ("b", 11, 12), ("a", 1.002, 2), ("a", 5, 5)), []
    (video,) = load_annotations(path, notes=notes)
    assert video.labels == ["a", "b", "a", "b", "a"]
    assert video.segments.tolist() == [[1, 2], [1, 2], [9, 10], [11, 12], [1.002, 2]]
    assert notes == [f"{path}: {text}" for text in (
        "1 segments labelled Ambiguous, dropped", "2 segments of length zero, dropped",
        "1 segments that repeat another, dropped", "1 segments past the end of their video, cut",
        "1 segments that begin after the end of their video, kept but out of reach")]


def test_nothing_to_report_and_no_segments(tmp_path):
    notes = []
    assert load_annotations(json_file(tmp_path, ("a", 1, 2)), notes=notes)[0].labels == ["a"] and notes == []
    assert load_annotations(json_file(tmp_path))[0].segments.shape == (0, 2)
    assert load_annotations(json_file(tmp_path, ("Ambiguous", 1, 2)))[0].segments.shape == (0, 2)


def test_shares_of_the_duration_are_an_error(tmp_path):
    shares = [("a", i / 10, i / 10 + 0.1) for i in range(6)]
    with pytest.raises(InputError, match=r"a.json: expected segments in seconds, found all 6 before second 1 of videos of 10 s"):
        load_annotations(json_file(tmp_path, *shares, duration=20.0))               # 10: the median of 0 and 20
    load_annotations(json_file(tmp_path, *shares, ("a", 8, 9), duration=20.0))
    load_annotations(json_file(tmp_path, *shares, duration=2.0))                    # a short video is full of actions
    load_annotations(json_file(tmp_path, *shares[:2], duration=20.0))               # too few to tell


def test_numbers_as_text_hidden_labels_and_no_duration(tmp_path):
    path = json_file(tmp_path, ("a", "1.5", "12"), duration="10.5")
    content = json.loads(path.read_text())
    content["database"] |= {"hidden": {"subset": "test", "fps": "25", "annotations": None}, "none": {"subset": "test"}}
    path.write_text(json.dumps(content))
    one, hidden, none = load_annotations(path)
    assert (one.duration, one.segments.tolist()) == (10.5, [[1.5, 10.5]])
    assert (hidden.duration, hidden.fps, hidden.segments.shape, none.labels) == (0, 25, (0, 2), [])
    assert load_annotations(json_file(tmp_path, ("a", 1, 99), duration=None))[0].segments.tolist() == [[1, 99]]


def test_a_reversed_segment_names_video_and_segment(tmp_path):
    path = json_file(tmp_path, ("a", 1, 2), ("b", 4, 3))
    with pytest.raises(InputError, match=r"a.json: video 'v': expected .*, found \[4.0, 3.0\] labelled b"):
        load_annotations(path)
    assert load_annotations(path, leave_out=["v"]) == []


def test_flat_files_of_one_subset_each(tmp_path):
    """BSN's and mmaction2's layout: the name of a file is that of its subset; a folder gives all of them."""
    flat = {"duration_second": 9.5, "duration_frame": 285, "feature_frame": 272, "annotations": [{"label": "a", "segment": [1, 12]}]}
    for name, fields in (("anet_anno_train", {}), ("anet_anno_val", {"fps": 30.0}), ("test", {"subset": "hidden"}), ("anet_full", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps({f"v_{name}": flat | fields}))
    videos = load_annotations(tmp_path)
    assert [(v.name, v.subset, v.duration, v.fps) for v in videos] == [
        ("v_anet_anno_train", "training", 9.5, 0), ("v_anet_anno_val", "validation", 9.5, 30), ("v_test", "hidden", 9.5, 0)]
    assert videos[0].segments.tolist() == [[1, 9.5]] and class_names(tmp_path, videos) == ["a"]
    with pytest.raises(InputError, match="video 'v_anet_full': 'subset': expected a text, or a file named like x_train.json, found None"):
        load_annotations(tmp_path / "anet_full.json")


# ---------------------------------------------------------------- the real files
def counts(name, labels="verb"):
    """{subset: (videos, segments)}, number of classes, {what was done: how many}."""
    notes, table = [], {}
    videos = load_annotations(SHARED / name, labels, notes)
    for video in videos:
        n, m = table.get(video.subset.lower(), (0, 0))
        table[video.subset.lower()] = n + 1, m + len(video.labels)
    done = {text.split(" segments ")[1]: int(text.split(": ")[1].split()[0]) for text in notes}
    return table, len(class_names(SHARED / name, videos, labels)), done


OUT_OF_REACH = "that begin after the end of their video, kept but out of reach"


@needs_shared
@pytest.mark.parametrize("name, ambiguous", [("thumos14.json.gz", {}), ("", {annotations.AMBIGUOUS: 89 + 99})])
def test_counts_of_thumos14(name, ambiguous):
    table = {"validation": (200, 3007), "test": (212, 3358)}
    assert counts(name) == (table, 20, ambiguous | {OUT_OF_REACH: 30})
    assert 3096 - 89 == 3007 and 3457 - 99 == 3358                       # rows of the csv files, less the ambiguous


@needs_shared
def test_thumos_json_and_csv_say_the_same():
    ours = {v.name: v for v in load_annotations(SHARED)}
    for v in load_annotations(SHARED / "thumos14.json.gz"):
        rows = [sorted(zip(w.labels, w.segments.round(1).tolist())) for w in (v, ours.pop(v.name))]
        assert rows[0] == rows[1]
    assert not ours


@needs_shared
def test_counts_of_activitynet():
    table, classes, done = counts("anet13_trainval_bsn_subset.json.gz")
    assert table == {"training": (9649, 14819), "validation": (4728, 7271), "testing": (4851, 0)} and classes == 200
    assert done == {"of length zero, dropped": 12, "that repeat another, dropped": 50,
                    "past the end of their video, cut": 215}
    assert 14819 + 7271 + 12 + 50 == 14859 + 7293                        # rows of the file


@needs_shared
@pytest.mark.parametrize("labels, classes", [("verb", 97), ("noun", 300)])
def test_counts_of_epic_kitchens(labels, classes):
    table = {"validation": (138, 9668)}
    assert counts("epic100", labels) == (table, classes, {"past the end of their video, cut": 1})


# ---------------------------------------------------------------- external scores
def test_external_scores_come_in_class_order_for_names_with_or_without_v(tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"results": {"x": [0.1, 0.9], "v_y": [0.7, 0.3], "z": [1, 0]}, "class": ["b", "a"]}))
    videos = [Video(name, 1.0, 1.0) for name in ("x", "y", "v_z")]
    scores = load_external_scores(path, ["a", "b"], videos)
    assert {name: row.tolist() for name, row in scores.items()} == {
        name: torch.tensor(row).tolist() for name, row in {"x": [0.9, 0.1], "y": [0.3, 0.7], "v_z": [0.0, 1.0]}.items()}
    for classes, named in ((["a"], [*videos, Video("lost", 1.0, 1.0)]), (["a", "lost"], videos)):
        with pytest.raises(InputError, match="s.json: expected scores for every video and class, found none for lost;"):
            load_external_scores(path, classes, named)


@pytest.mark.parametrize("content", [[], {"results": {}}, {"results": {"x": [0.1]}, "class": ["a", "b"]},
                                     {"results": {"x": ["?", 1]}, "class": ["a", "b"]}])
def test_external_scores_of_another_kind(tmp_path, content):
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="s.json: expected an object with 'results' with 'class'|s.json: 'class': expected a list|s.json: video 'x': expected a finite score"):
        load_external_scores(tmp_path / "s.json", ["a", "b"], [Video("x", 1.0, 1.0)])


# ---------------------------------------------------------------- presets
@pytest.mark.parametrize("name, classes", [("thumos14", 20), ("activitynet", 200), ("epic-verb", 97),
                                           ("epic-noun", 300)])
def test_presets_agree_with_themselves(name, classes):
    for preset in (PRESETS[name], PRESETS[name] | FEATURE_PRESETS[name]):
        assert len(annotations.read_json(preset["descriptions"])) == classes
        steps = preset.get("resize_to") or preset["window"]
        assert preset["window"] == steps and steps % 2 ** (preset["levels"] - 1) == 0
        assert len(preset.get("ranges", range(6))) == preset["levels"]
        assert np.allclose(np.diff(preset["tiou"]), preset["tiou"][1] - preset["tiou"][0])
    frames = PRESETS[name].get("frames_per_step", 1) * PRESETS[name]["window"]
    assert frames % 16 == 0                                              # VideoMAE reads clips of 16 frames


def test_presets_set_existing_flags_only():
    known = set(vars(train.get_args(["--dataset", "custom", "--features", "f", "--annotations", "a", "--descriptions", "d"])))
    assert all(set(preset) <= known for preset in [*PRESETS.values(), *FEATURE_PRESETS.values()])
