"""Bad input through the real commands: exit code 2 and a message that names file or flag, what was expected and found.

Every case starts from a project that works, and breaks one thing in it.
"""
import gzip
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import evaluate
import train
from experiments import benchmark, bias, question_answering, reproduce
from support.demo import write_video

PREDICTIONS = {"results": {"c": [{"label": "Run", "segment": [1, 3], "score": 0.5}]}}


def write(path, content):
    """Bytes and texts as they are, anything else as JSON."""
    path.write_bytes(content if isinstance(content, bytes) else
                     (content if isinstance(content, str) else json.dumps(content)).encode())
    return path


@pytest.fixture
def project(tmp_path, lm_folder):
    """(folder, flags of train.py): features of three videos, two to train on, without language for speed."""
    database, rng = {}, np.random.default_rng(0)
    (tmp_path / "features").mkdir()
    for name, subset in (("a", "Train"), ("b", "Train"), ("c", "Val")):
        np.save(tmp_path / f"features/{name}.npy", rng.normal(size=(80, 6)).astype(np.float32))
        database[name] = {"subset": subset, "duration": 10.7, "fps": 30, "annotations": [
            {"label": "Run", "segment": [1, 3]}, {"label": "Jump", "segment": [5, 6.5]}]}
    write(tmp_path / "annotations.json", {"database": database})
    write(tmp_path / "descriptions.json", {"Run": "Legs alternate.", "Jump": "Both feet leave the ground."})
    write(tmp_path / "predictions.json", PREDICTIONS)
    return tmp_path, [
        "--dataset", "custom", "--features", tmp_path / "features", "--annotations", tmp_path / "annotations.json",
        "--descriptions", tmp_path / "descriptions.json", "--train-subset", "train", "--test-subset", "val",
        "--window", "32", "--levels", "3", "--width", "16", "--epochs", "1", "--batch-size", "2", "--lora-rank", "4",
        "--lambda-lang", "0", "--lm", lm_folder, "--device", "cpu", "--out", tmp_path / "out"]


@pytest.fixture
def video_project(project, clip):
    """The same of videos: 2 s of 10 frames a second, every frame read."""
    folder, flags = project
    content = json.loads((folder / "annotations.json").read_text())
    (folder / "videos").mkdir()
    for name, entry in content["database"].items():
        shutil.copy(clip, folder / f"videos/{name}.mp4")
        entry.update(duration=2.0, fps=10, annotations=[{"label": "Run", "segment": [0.2, 1]},
                                                        {"label": "Jump", "segment": [1, 1.5]}])
    write(folder / "annotations.json", content)
    at = flags.index("--features")
    return folder, flags[:at] + ["--videos", folder / "videos"] + flags[at + 2:] + [
        "--stride", "1", "--image-size", "32"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 255, (20, 48, 48, 3), dtype=np.uint8), 10)
    return path


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def trained(project, trained_once, capsys):
    """(folder, flags, run): the project and a copy of a run of it with language, without an epoch."""
    folder, flags = project
    if not (trained_once / "out").exists():
        at = flags.index("--lambda-lang")
        language = flags[:at] + flags[at + 2:]
        language += ["--epochs", "0", "--out", trained_once / "out", "--lm", "tiny"]
        assert train.main(list(map(str, language))) == 0
    shutil.copytree(trained_once / "out", folder / "out")
    capsys.readouterr()
    return folder, flags, folder / "out"


@pytest.fixture
def fails(capsys):
    """Run a command that has to end with code 2 and a message with all of `parts`; -> the message."""
    def run(main, argv, *parts):
        try:
            code = main(list(map(str, argv)))
        except SystemExit as end:                                            # of argparse
            code = end.code
        printed = capsys.readouterr().err
        message = printed.partition(": error: ")[2]                          # argparse prints all flags before it
        assert code == 2 and "Traceback" not in printed and message, printed
        for part in parts:
            assert part in message, message
        return message
    return run


# ---------------------------------------------------------------- annotations
def entry(**changes):
    """Change fields of video a; None takes one away."""
    def change(content):
        video = content["database"]["a"]
        video.update(changes)
        for name in [name for name, value in changes.items() if value is None]:
            del video[name]
        return content
    return change


def segment(*times):
    return entry(annotations=[{"label": "Run", "segment": list(times)}])


def label(*names):
    return entry(annotations=[{"segment": [1, 2]} | ({"label": names[0]} if names else {})])


def long_actions(content):
    """No window of 32 steps holds half of 80 steps."""
    for video in content["database"].values():
        video["annotations"] = [{"label": "Run", "segment": [0, 10.7]}]
    return content


def without_segments(content):
    for video in content["database"].values():
        if video["subset"] == "Train":
            video["annotations"] = []
    return content


HERE = "annotations.json: "
VIDEO_A = "video 'a'"
ANNOTATIONS = {
    "empty": (b"", HERE, "expected a JSON file"),
    "broken json": (b'{"database": {', HERE, "expected a JSON file"),
    "cut gzip": (gzip.compress(b'{"database": {}}' * 99)[:-9], HERE, "expected a JSON file", "end-of-stream"),
    "flipped gzip": (gzip.compress(b"abc" * 99)[:10] + b"\xff" * 50, HERE, "expected a JSON file"),
    "not utf-8": (b'{"database": {"\xff\xfe\xff": {}}}', HERE, "expected a JSON file", "decode"),
    "deeply nested": ("[" * 200000, HERE, "expected a JSON file"),
    "number of many digits": ('{"database": ' + "9" * 5000 + "}", HERE, "expected a JSON file"),
    "list at the top": ([], HERE, "an object", "found []"),
    "no database": ({"results": {}}, HERE, "'database'", "results"),
    "database a list": ({"database": []}, HERE, "'database'", "found []"),
    "no videos": ({"database": {}}, HERE, "subset 'train'", "found none"),
    "entry a list": (lambda c: c["database"].update(a=[1]) or c, HERE, VIDEO_A, "found [1]"),
    "annotations an object": (entry(annotations={}), HERE, VIDEO_A, "annotations", "a list"),
    "annotation a number": (entry(annotations=[3]), HERE, VIDEO_A, "annotations[0]", "found 3"),
    "segment of one number": (segment(1), HERE, VIDEO_A, "segment", "[start, end]", "found [1]"),
    "segment of texts": (segment("1", "two"), HERE, VIDEO_A, "segment", "two finite numbers"),
    "segment with nan": (segment(math.nan, 2), HERE, VIDEO_A, "segment", "two finite numbers", "nan"),
    "segment with infinity": (segment(1, math.inf), HERE, VIDEO_A, "segment", "two finite numbers"),
    "segment with null": (segment(None, 2), HERE, VIDEO_A, "segment", "two finite numbers"),
    "segment with a huge number": (segment(1, 10 ** 400), HERE, VIDEO_A, "segment", "two finite numbers"),
    "segment reversed": (segment(3, 1), HERE, VIDEO_A, "start <= end", "[3.0, 1.0]", "Run"),
    "segment negative": (segment(-1, 1), HERE, VIDEO_A, "0 <= start", "[-1.0, 1.0]"),
    "label missing": (label(), HERE, VIDEO_A, "label", "no such field"),
    "label a number": (label(7), HERE, VIDEO_A, "label", "a text", "found 7"),
    "label empty": (label(" "), HERE, VIDEO_A, "label", "a text"),
    "label of half a character": (label("\ud800"), HERE, VIDEO_A, "label", "a text"),
    "duration negative": (entry(duration=-3), HERE, VIDEO_A, "a duration of 0 to 1e6 s", "found -3"),
    "duration nan": (entry(duration=math.nan), HERE, VIDEO_A, "duration", "nan"),
    "duration a text": (entry(duration="long"), HERE, VIDEO_A, "duration", "found 'long'"),
    "duration of a century": (entry(duration=1e300), HERE, VIDEO_A, "duration", "found 1e+300"),
    "fps negative": (entry(fps=-30), HERE, VIDEO_A, "fps", "found -30"),
    "fps nan": (entry(fps=math.nan), HERE, VIDEO_A, "fps", "nan"),
    "fps a list": (entry(fps=[30]), HERE, VIDEO_A, "fps", "found [30]"),
    "fps zero, of features": (entry(fps=0), HERE, VIDEO_A, "expected fps", "--fps"),
    "subset missing": (entry(subset=None), HERE, VIDEO_A, "subset", "like x_train.json, found None"),
    "subset a number": (entry(subset=3), HERE, VIDEO_A, "subset", "a text", "found 3"),
    "nothing to train on": (without_segments, HERE, "actions in windows of train", "none in 0 annotated videos"),
    "nothing in a window": (long_actions, HERE, "none in 2 annotated videos", "--window, --min-overlap"),
}


@pytest.mark.parametrize("case", ANNOTATIONS)
def test_annotations(project, fails, case):
    (folder, flags), (content, *parts) = project, ANNOTATIONS[case]
    path = folder / "annotations.json"
    write(path, content(json.loads(path.read_text())) if callable(content) else content)
    fails(train.main, flags, *parts)


@pytest.mark.parametrize("flags, parts", {
    "absent": (["--annotations", "nowhere.json"], ["nowhere.json", "expected a JSON file", "No such file"]),
    "folder without csv": (["--annotations", "."], ["expected a folder with val_Annotation.csv", "JSON"]),
    "unknown training subset": (["--train-subset", "x"], ["subset 'x'", "Train (2 videos), Val (1 videos)"]),
    "unknown test subset": (["--test-subset", "x"], ["subset 'x'", "Train (2 videos), Val (1 videos)"]),
    "the same videos": (["--test-subset", "train"], ["other videos to test on", "found 2 in both: a, b", "--test-subset"]),
    "all left out": (["--leave-out", "a", "b"], ["--leave-out", "subset 'train'"]),
}.values(), ids=lambda value: " ".join(value)[:30])
def test_annotation_flags(project, fails, flags, parts):
    fails(train.main, [*project[1], *flags], *parts)


def test_segments_beyond_the_video_are_cut_and_counted(project, capsys):
    folder, flags = project
    path = folder / "annotations.json"
    write(path, segment(9, 11)(json.loads(path.read_text())))
    assert train.main([*map(str, flags), "--dry-run"]) == 0
    assert "1 segments past the end of their video, cut" in capsys.readouterr().err


ROWS = "video,type,start,end\nvideo_validation_1,Run,1.0,2.0\n"
INFO = "video,fps,count\nvideo_validation_1,30,300\n"
CSV = {
    "column missing": (ROWS.replace("start", "begin"), INFO, "val_Annotation.csv: line 1", "column 'start'", "begin"),
    "word for a number": (ROWS.replace("2.0", "soon"), INFO, "val_Annotation.csv: line 2", "column 'end'", "'soon'"),
    "nan": (ROWS.replace("2.0", "nan"), INFO, "val_Annotation.csv", "video_validation_1", "start <= end"),
    "label empty": (ROWS.replace("Run", ""), INFO, "val_Annotation.csv: line 2", "column 'type'", "''"),
    "row cut": (ROWS + "video_valid", INFO, "val_Annotation.csv: line 3", "column 'type'"),
    "reversed": (ROWS.replace("1.0", "3.0"), INFO, "val_Annotation.csv", "video_validation_1", "[3.0, 2.0]", "Run"),
    "empty": ("", INFO, "val_Annotation.csv: line 1", "column 'video'", "found none"),
    "not utf-8": (b"video,type\xff\n", INFO, "val_Annotation.csv", "expected a csv file"),
    "binary": (b"\0\1\2", INFO, "val_Annotation.csv", "expected a c"),
    "info missing": (ROWS, None, "val_video_info.csv", "expected a csv file"),
    "info without the video": (ROWS, INFO.replace("_1", "_2"), "val_video_info.csv", "video_validation_1"),
    "info with negative fps": (ROWS, INFO.replace(",30,", ",-30,"), "video_validation_1", "found -"),
}


@pytest.mark.parametrize("case", CSV)
def test_csv(project, fails, case):
    (folder, flags), (rows, info, *parts) = project, CSV[case]
    write(folder / "val_Annotation.csv", rows)
    if info is not None:
        write(folder / "val_video_info.csv", info)
    fails(train.main, [*flags, "--annotations", folder], *parts)


# ---------------------------------------------------------------- descriptions
THERE = "descriptions.json: "
DESCRIPTIONS = {
    "absent": (None, THERE, "No such file"),
    "a list": (["Run"], THERE, "expected an object", "found ['Run']"),
    "value a number": ({"Run": 1, "Jump": "x"}, THERE, "'Run'", "a text that describes it", "found 1"),
    "class missing": ({"Run": "Legs alternate."}, THERE, "found none for Jump", "add a sentence"),
    "empty": ({}, THERE, "Run", "Jump", "add a sentence"),
    "label in another case": ({"run": "Legs alternate.", "Jump": "Up."}, THERE, "Run (not used: run)", "spell"),
    "label spelled otherwise": ({"Runs": "Legs alternate.", "Jump": "Up."}, THERE, "Run (not used: Runs)"),
    "broken json": ("{", THERE, "expected a JSON file"),
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_descriptions(project, fails, case):
    (folder, flags), (content, *parts) = project, DESCRIPTIONS[case]
    (folder / "descriptions.json").unlink()
    if content is not None:
        write(folder / "descriptions.json", content)
    fails(train.main, flags, *parts)


def test_descriptions_of_more_classes_are_a_note(project, capsys):
    folder, flags = project
    write(folder / "descriptions.json", {"Run": "x", "Jump": "y", "Swim": "z"})
    assert train.main([*map(str, flags), "--dry-run"]) == 0
    assert "1 descriptions of classes that the annotations have not, not used: Swim" in capsys.readouterr().err


# ---------------------------------------------------------------- features
def array(shape=(80, 6), dtype=np.float32, **at):
    rows = np.zeros(shape, dtype)
    for row, value in at.items():
        rows[int(row[1:])] = value
    return lambda path: np.save(path, rows, allow_pickle=True)


def cut(path):
    np.save(path, np.zeros((80, 6), np.float32))
    path.write_bytes(path.read_bytes()[:-100])


def header(text):
    """A .npy file with this header and no rows."""
    return lambda path: path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode())


def archive(path):
    with open(path, "wb") as file:
        np.savez(file, rows=np.zeros((80, 6)), times=np.zeros(80))


FEATURES = {
    "missing": (None, "features: ", "per annotated video", "1 of 2: a", "--skip-missing"),
    "another width": (array((80, 7)), ".npy", "columns", "the same encoder"),
    "no rows": (array((0, 6)), "a.npy", "at least one row", "(0, 6)"),
    "no columns": (array((80, 0)), "a.npy", "(80, 0)"),
    "one dimension": (array(80), "a.npy", "(T, V)", "(80,)"),
    "three dimensions": (array((80, 6, 1)), "a.npy", "(T, V)", "(80, 6, 1)"),
    "nan": (array(_70=math.nan), "a.npy", "expected finite features", "1 rows: 70"),
    "infinity": (array(_70=-math.inf), "a.npy", "expected finite features", "1 rows: 70"),
    "too large for float32": (array(dtype=np.float64, _3=1e300), "a.npy", "expected finite features", "1 rows: 3"),
    "pickled objects": (array(dtype=object), "a.npy", "object"),
    "texts": (array(dtype="U3"), "a.npy", "numbers", "<U3"),
    "complex numbers": (array(dtype=complex), "a.npy", "numbers", "complex128"),
    "cut short": (cut, "a.npy", "expected a .npy file"),
    "a text file": (lambda path: path.write_text("1 2 3\n"), "a.npy", "expected a .npy file"),
    "an archive": (archive, "a.npy", "expected a .npy file", "feats is not a file in the archive"),
    "a directory": (lambda path: path.mkdir(), "a.npy", "expected a .npy file", "directory"),
    "zero length": (lambda path: path.write_bytes(b""), "a.npy", "expected a .npy file"),
    "10^15 rows": (header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000, 6)}\n"), "a.npy"),
    "10^30 rows": (header("{'descr': '<f4', 'fortran_order': False, 'shape': (1" + "0" * 30 + ", 6)}\n"), "a.npy"),
    "no header": (header("{'descr': "), "a.npy", "expected a .npy file"),
    "nested header": (header("(" * 5000), "a.npy", "expected a .npy file"),
}


@pytest.mark.parametrize("case", FEATURES)
def test_features(project, fails, case):
    (folder, flags), (make, *parts) = project, FEATURES[case]
    path = folder / "features/a.npy"
    path.unlink()
    if make:
        make(path)
    fails(train.main, [*flags, "--window", "128", "--min-overlap", "0"], *parts)


@pytest.mark.parametrize("case", ["another width", "nan", "cut short"])
def test_features_of_the_test_set(project, fails, case):
    (folder, flags), (make, *parts) = project, FEATURES[case]
    make(folder / "features/c.npy")
    fails(train.main, [*flags, "--epochs", "0"], *(part.replace("a.npy", "c.npy") for part in parts))


@pytest.mark.parametrize("what", ["absent", "a file"])
def test_feature_folder(project, fails, what):
    folder, flags = project
    path = folder / "nothing" if what == "absent" else folder / "features/a.npy"
    fails(train.main, [*flags, "--features", path], f"{path}: expected a folder")


def test_a_worker_process_reports_the_same(project, fails):
    FEATURES["nan"][0](project[0] / "features/a.npy")
    message = fails(train.main, [*project[1], "--window", "128", "--epochs", "1", "--workers", "1"], "a.npy", "1 rows: 70")
    assert len(message.strip().splitlines()) == 1


@pytest.mark.parametrize("flags, ratio", [([], None), (["--stride", "8"], "1.95"), (["--fps", "15"], "1.95"),
                                          (["--stride", "1"], "0.25"), (["--stride", "1", "--resize-to", "32"], None)])
def test_features_of_another_stride_or_fps_are_a_note(project, capsys, flags, ratio):
    assert train.main([*map(str, project[1]), *flags, "--dry-run"]) == 0
    printed = capsys.readouterr().err
    assert f"3 of 3 feature files have not (duration * fps - num_frames) / stride + 1 rows, but {ratio} times" in printed \
        if ratio else "feature files" not in printed


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float16, np.float64, ">f4"])
def test_features_of_other_numbers_are_read(project, dtype):
    np.save(project[0] / "features/a.npy", np.ones((80, 6), dtype))
    assert train.main([*map(str, project[1]), "--dry-run"]) == 0


# ---------------------------------------------------------------- videos
def sound(path, clip):
    import av
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def no_frames(path, clip):
    import av
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()


VIDEOS = {
    "missing": (lambda path, clip: None, "videos: ", "1 of 2: a", "--skip-missing"),
    "moov missing": (lambda path, clip: path.write_bytes(clip[:len(clip) // 2]), "a.mp4", "expected a video"),
    "garbage": (lambda path, clip: path.write_bytes(b"\xff\x00garbage" * 500), "a.mp4", "expected a video"),
    "zero length": (lambda path, clip: path.write_bytes(b""), "a.mp4", "expected a video"),
    "no frames": (no_frames, "a.mp4", "expected"),
    "sound alone": (sound, "a.mp4", "no video stream"),
    "a text": (lambda path, clip: path.write_text("not a video\n" * 50), "a.mp4", "expected a video"),
    "a directory": (lambda path, clip: path.mkdir(), "a.mp4", "expected a video", "irectory"),
    "data damaged": (lambda path, clip: path.write_bytes(clip[:200] + bytes(2000) + clip[2200:]), "a.mp4", "expected"),
}


@pytest.mark.parametrize("fps", [10, 0], ids=["with fps", "without fps"])
@pytest.mark.parametrize("case", VIDEOS)
def test_videos(video_project, fails, clip, case, fps):
    (folder, flags), (make, *parts) = video_project, VIDEOS[case]
    write(folder / "annotations.json", entry(fps=fps)(json.loads((folder / "annotations.json").read_text())))
    (folder / "videos/a.mp4").unlink()
    make(folder / "videos/a.mp4", clip.read_bytes())
    fails(train.main, flags, *parts)


def test_a_title_in_another_encoding_does_not_matter(video_project):
    import av
    folder, flags = video_project
    with av.open(str(folder / "videos/a.mp4")) as source, av.open(str(folder / "x.mp4"), "w") as container:
        container.metadata["title"] = "a title"
        container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = container.streams.video[0]
                container.mux(packet)
    content = (folder / "x.mp4").read_bytes()
    assert b"a title" in content
    write(folder / "videos/a.mp4", content.replace(b"a title", b"a t\xeft\xe9e"))
    assert train.main([*map(str, flags), "--dry-run"]) == 0


def test_a_duration_that_is_far_from_the_file(video_project, fails):
    folder, flags = video_project
    write(folder / "annotations.json", entry(duration=200)(json.loads((folder / "annotations.json").read_text())))
    fails(train.main, [*flags, "--resize-to", "32"], "a.mp4", "expected 19", "duration", "annotations", "--leave-out")


def test_a_video_shorter_than_a_clip_works(video_project, capsys):
    folder, flags = video_project
    write_video(folder / "videos/a.mp4", np.zeros((3, 48, 48, 3), np.uint8), 10)
    write(folder / "annotations.json", entry(duration=0.3, annotations=[{"label": "Run", "segment": [0, 0.2]}])(
        json.loads((folder / "annotations.json").read_text())))
    assert train.main([*map(str, flags), "--train-subset", "val", "--test-subset", "train"]) == 0
    assert set(json.loads((folder / "out/result.json").read_text())["results"]) == {"a", "b"}


# ---------------------------------------------------------------- checkpoints
def rewrite(**changes):
    """The checkpoint with other fields in its header."""
    def change(path):
        header, tensors = read_raw(path)
        save_file(tensors, path, {name: text for name, text in (header | changes).items() if text is not None})
    return change


def rewrite_config(**changes):
    """The checkpoint with other fields in its configuration."""
    def change(path):
        rewrite(config=json.dumps(json.loads(read_raw(path)[0]["config"]) | changes))(path)
    return change


def read_raw(path):
    """(header, tensors) of a checkpoint."""
    with safe_open(str(path), framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}


CHECKPOINTS = {
    "absent": (lambda path: path.unlink(), "checkpoint.safetensors", "expected"),
    "garbage": (lambda path: path.write_bytes(b"\xff" * 999), "checkpoint.safetensors", "expected a checkpoint"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-99]), "checkpoint.safetensors", "a checkpoint"),
    "of something else": (lambda path: save_file({"x": torch.zeros(3)}, path), "checkpoint.safetensors", "'config'"),
    "with another header": (lambda path: save_file({"x": torch.zeros(3)}, path, {"format": "pt"}), "'config'"),
    "without progress": (rewrite(progress=None), "checkpoint.safetensors", "expected a checkpoint", "'progress'"),
    "without an epoch": (rewrite(progress='{"step": 1}'), "checkpoint.safetensors", "expected a checkpoint", "'epoch'"),
    "with broken flags": (rewrite(args="{"), "checkpoint.safetensors", "expected a checkpoint"),
    "of a model that lacks fields": (rewrite(config='{"colour": 1}'), "checkpoint.safetensors", "a checkpoint", "'lm'"),
    "of another revision": (rewrite_config(colour=1), "checkpoint.safetensors", "colour"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(trained, fails, case):
    (_, flags, run), (change, *parts) = trained, CHECKPOINTS[case]
    change(run / "checkpoint.safetensors")
    fails(evaluate.main, ["--checkpoint", run, "--device", "cpu"], *parts)
    fails(train.main, [*flags, "--resume"], *parts)


@pytest.mark.parametrize("change, part", [(["--width", "32"], "width"), (["--prior", "0.2"], "prior"),
                                          (["--levels", "4"], "levels")], ids=lambda value: value[0])
def test_resumed_with_another_model(trained, fails, change, part):
    _, flags, run = trained
    fails(train.main, [*flags, *change, "--resume"], "checkpoint.safetensors", "another in", part, "--out")


def test_the_language_model_of_a_checkpoint_is_gone(trained, fails, lm_folder):
    _, _, run = trained
    rewrite_config(lm="/nowhere/lm")(run / "checkpoint.safetensors")
    fails(evaluate.main, ["--checkpoint", run, "--device", "cpu"], "checkpoint.safetensors", "/nowhere/lm", "--lm")
    fails(evaluate.main, ["--checkpoint", run, "--device", "cpu", "--lm", lm_folder], "checkpoint.safetensors", "shape")


def test_features_of_another_width_than_the_checkpoint(trained, fails):
    folder, _, run = trained
    for name in "abc":
        np.save(folder / f"features/{name}.npy", np.zeros((80, 7), np.float32))
    fields = json.loads(read_raw(run / "checkpoint.safetensors")[0]["args"])
    fields["features"], = fields["features"]                                 # a text, as in checkpoints of older versions
    moved = {name: str(folder / Path(fields[name]).name) for name in ("features", "annotations", "descriptions")}
    rewrite(args=json.dumps(fields | moved))(run / "checkpoint.safetensors")
    command = ["--checkpoint", run, "--device", "cpu"]
    fails(evaluate.main, command, ".npy", "expected 6 columns", "found 7")
    fails(evaluate.main, [*command, "--video", folder / "features/a.npy", "--fps", "30"], "a.npy", "expected 6")
    fails(evaluate.main, [*command, "--video", folder / "features/a.npy"], "a.npy", "--fps")
    fails(evaluate.main, [*command, "--video", folder / "x.npy", "--fps", "30"], "x.npy", "expected a .npy file")


# ---------------------------------------------------------------- language models and vision encoders
def lm_file(name, content):
    return lambda folder: write(folder / name, content)


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def no_tokenizer(folder):
    for path in folder.glob("token*"):
        path.unlink()


LANGUAGE_MODELS = {
    "no such folder": (shutil.rmtree, "--lm", "no such folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "--lm", "config.json"),
    "broken config": (lm_file("config.json", "{"), "--lm", "expected"),
    "config a list": (lm_file("config.json", []), "--lm", "expected"),
    "config empty": (lm_file("config.json", {}), "--lm", "expected"),
    "unknown kind": (lm_file("config.json", {"model_type": "abacus"}), "--lm", "expected"),
    "a field of words": (lm_file("config.json", {"model_type": "qwen2", "hidden_size": "wide"}), "--lm", "expected"),
    "a vision model": (lm_file("config.json", {"model_type": "vit", "hidden_size": 32}), "--lm", "expected"),
    "weights cut short": (cut_weights, "--lm", "expected weights"),
    "weights missing": (lambda folder: (folder / "model.safetensors").unlink(), "--lm", "expected weights"),
    "tokenizer missing": (no_tokenizer, "--lm", "tokenizer"),
    "tokenizer broken": (lm_file("tokenizer.json", "{"), "--lm", "tokenizer"),
}


@pytest.mark.parametrize("case", LANGUAGE_MODELS)
def test_language_models(project, fails, lm_folder, case):
    (folder, flags), (change, *parts) = project, LANGUAGE_MODELS[case]
    shutil.copytree(lm_folder, folder / "lm")
    change(folder / "lm")
    fails(train.main, [*flags, "--lm", folder / "lm", "--lambda-lang", "learned"], *parts, str(folder / "lm"))


class Malicious:
    """Unpickled, it makes a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def encoder(**tensors):
    return lambda path: torch.save({"module": tensors}, path)


VISION = {
    "absent": (lambda path: None, "vision.pth", "expected weights", "No such file"),
    "garbage": (lambda path: path.write_bytes(b"\xff" * 99), "vision.pth", "expected weights"),
    "malicious": (lambda path: torch.save({"module": Malicious(path.parent / "made")}, path), "vision.pth", "weights"),
    "malicious, plain": (lambda path: path.write_bytes(pickle.dumps(Malicious(path.parent / "made"))), "vision.pth"),
    "no tensors": (lambda path: torch.save({"module": {"x": 1}}, path), "vision.pth", "expected named tensors"),
    "of another model": (encoder(conv1=torch.zeros(3)), "vision.pth", "patch_embed.proj.weight", "conv1"),
    "of images": (encoder(**{"patch_embed.proj.weight": torch.zeros(48, 3, 16, 16)}), "vision.pth", "5 dimensions"),
    "layers missing": (encoder(**{"patch_embed.proj.weight": torch.zeros(48, 3, 2, 16, 16),
                                  "patch_embed.proj.bias": torch.zeros(7)}), "vision.pth", "proj.bias", "(7,)"),
    "folder without config": (lambda path: path.mkdir(), "vision.pth/config.json", "No such file"),
    "config a list": (lambda path: path.mkdir() or write(path / "config.json", []), "config.json", "found []"),
    "config with words": (lambda path: path.mkdir() or write(path / "config.json", {
        "model_type": "videomae", "patch_size": "small"}), "config.json", "patch_size", "small"),
}


@pytest.mark.parametrize("case", VISION)
def test_vision_encoders(video_project, fails, case):
    (folder, flags), (make, *parts) = video_project, VISION[case]
    make(folder / "vision.pth")
    fails(train.main, [*flags, "--vision", folder / "vision.pth"], *parts)
    assert not (folder / "made").exists()


# ---------------------------------------------------------------- files of evaluate.py, and external scores
def detection(**changes):
    row = {name: value for name, value in (PREDICTIONS["results"]["c"][0] | changes).items() if value is not None}
    return {"results": {"c": [row]}}


RESULT_FILES = {
    "absent": (None, "No such file"),
    "broken json": ("{", "expected a JSON file"),
    "list at the top": ([], "'results'", "found []"),
    "swapped": ({"database": {}}, "'results'", "database", "swapped"),
    "detections an object": ({"results": {"c": {}}}, "results/c", "a list"),
    "score nan": (detection(score=math.nan), "results/c[0]: 'score'", "a finite number", "nan"),
    "score missing": (detection(score=None), "results/c[0]: 'score'", "no such field"),
    "score huge": (detection(score=10 ** 400), "results/c[0]: 'score'", "a finite number"),
    "label a list": (detection(label=["Run"]), "results/c[0]: 'label'", "a text"),
    "segment null": (detection(segment=[1, None]), "results/c[0]: 'segment'", "[start, end]"),
    "deeply nested": ("[" * 200000, "expected a JSON file"),
}


@pytest.mark.parametrize("case", RESULT_FILES)
def test_prediction_files(project, fails, case):
    (folder, _), (content, *parts) = project, RESULT_FILES[case]
    (folder / "predictions.json").unlink()
    if content is not None:
        write(folder / "predictions.json", content)
    fails(evaluate.main, ["--ground-truth", folder / "annotations.json", "--predictions", folder / "predictions.json",
                          "--subset", "val"], "predictions.json", *parts)


TRUTH = {
    "absent": (None, "No such file"),
    "swapped": (PREDICTIONS, "'database'", "results", "swapped"),
    "subset missing": ({"database": {"c": {}}}, "video 'c'", "'subset'"),
    "another subset": ({"database": {"c": {"subset": "Train", "annotations": []}}}, "'val'", "Train (1 videos)"),
    "no segments": ({"database": {"c": {"subset": "Val", "annotations": []}}}, "expected segments"),
    "annotations missing": ({"database": {"c": {"subset": "Val"}}}, "expected segments", "none in 1 videos"),
    "segment nan": ({"database": {"c": {"subset": "Val", "annotations": [{"label": "a", "segment": [1, math.nan]}]}}},
                    "annotations[0]: 'segment'", "nan"),
}


@pytest.mark.parametrize("case", TRUTH)
def test_ground_truth_files(project, fails, case):
    (folder, _), (content, *parts) = project, TRUTH[case]
    path = folder / "truth.json"
    if content is not None:
        write(path, content)
    fails(evaluate.main, ["--ground-truth", path, "--predictions", folder / "predictions.json", "--subset", "val"],
          "truth.json", *parts)


def test_predictions_of_unknown_labels_are_a_note(project, capsys):
    folder = project[0]
    write(folder / "predictions.json", detection(label="run"))
    assert evaluate.main(["--ground-truth", str(folder / "annotations.json"), "--predictions",
                          str(folder / "predictions.json"), "--subset", "val"]) == 0
    assert "1 detections have a label that the ground truth has not, and are not scored: run" in capsys.readouterr().err


SCORES = {
    "absent": (None, "No such file"),
    "a list": ([], "'results'", "scores.json"),
    "class a text": ({"results": {"c": [1, 0]}, "class": "RunJump"}, "'class'"),
    "video missing": ({"results": {}, "class": ["Run", "Jump"]}, "found none for c"),
    "class missing": ({"results": {"c": [1]}, "class": ["Run"]}, "found none for Jump"),
    "too few scores": ({"results": {"c": [1]}, "class": ["Run", "Jump"]}, "video 'c'", "2 names"),
    "score nan": ({"results": {"c": [1, math.nan]}, "class": ["Run", "Jump"]}, "video 'c'", "a finite score"),
    "score a text": ({"results": {"c": ["x", 1]}, "class": ["Run", "Jump"]}, "video 'c'"),
    "score huge": ({"results": {"c": [10 ** 400, 1]}, "class": ["Run", "Jump"]}, "video 'c'"),
}


@pytest.mark.parametrize("case", SCORES)
def test_external_scores(project, fails, case):
    (folder, flags), (content, *parts) = project, SCORES[case]
    if content is not None:
        write(folder / "scores.json", content)
    fails(train.main, [*flags, "--epochs", "0", "--external-scores", folder / "scores.json"], "scores.json", *parts)


@pytest.mark.parametrize("content, parts", [(None, ["No such file"]), ({"AP": []}, ["'AP'"]), ([], ["'AP'"]),
                                            ({"AP": {"Run": [0.5]}}, ["none for Jump"]),
                                            ({"AP": {"Run": [], "Jump": "x"}}, ["a list of numbers"])],
                         ids=["absent", "AP a list", "a list", "class missing", "no numbers"])
def test_groups(trained, fails, content, parts):
    folder, _, run = trained
    if content is not None:
        write(folder / "figures.json", content)
    fails(bias.main, ["--checkpoint", run, "--device", "cpu", "--groups", folder / "figures.json"], *parts)


def test_incomplete(trained, fails):
    folder, _, run = trained
    command = ["--checkpoint", run, "--device", "cpu", "--incomplete"]
    fails(bias.main, command, "--incomplete", "an annotation file")
    fails(bias.main, [*command, folder / "nowhere.json"], "nowhere.json", "No such file")
    fails(bias.main, [*command, folder / "annotations.json"], "subset 'incomplete'", "Train (2 videos)")
    fails(bias.main, [*command, write(folder / "x.json", {})], "x.json", "'database'")


# ---------------------------------------------------------------- flags
TRAIN_FLAGS = """
    --videos x; --window 0; --stride -1; --stride 2.5; --batch-size 0; --accumulate 0; --epochs -1; --lambda-lang 2
    --lambda-lang nan; --lambda-lang x; --tiou 1.5; --tiou 0; --tiou nan; --tiou; --ema 1; --ema -0.1; --lr nan; --lr -1
    --lr-lm inf; --lr-vision -1e-3; --weight-decay -1; --lora-rank 0; --lora-alpha -2; --levels 0; --levels 7
    --levels 400; --width 18; --width 0; --prior 0; --prior 1; --workers -1; --clip 0; --clip nan
    --device nonsense; --device cuda:99; --device meta; --min-overlap 2; --num-frames -16; --resize-to -1
    --resize-to 3; --fps -30; --fps nan; --nms-sigma 0; --voting 2; --seed -1; --max-per-video -1; --warmup-epochs -1
    --lambda-adv nan; --head-window -1; --dataset mine; --levels 5 --dataset epic-verb; --layout sideways
    --no-such-flag; --vision x; --ablation everything; --ablation without-tg --lambda-lang 0.5; --out README.md
    --out README.md/below; --out /proc/nowhere"""
TRAIN_FLAGS = [change.split() for change in TRAIN_FLAGS.replace("\n", ";").split(";") if change.strip()]


@pytest.mark.parametrize("change", TRAIN_FLAGS, ids=" ".join)
def test_flags_of_train(project, fails, monkeypatch, change):
    monkeypatch.chdir(Path(train.__file__).parent)
    message = fails(train.main, [*project[1], *change], change[0])
    assert "invalid" in message or "expected" in message or "unrecognized" in message or "leave" in message


@pytest.mark.parametrize("change, parts", [(["--image-size", "40"], ["--image-size", "16", "40"]),
                                           (["--features", "x"], ["--videos", "--features"])], ids=" ".join)
def test_flags_of_videos(video_project, fails, change, parts):
    fails(train.main, [*video_project[1], *change], *parts)


def test_flags_that_lack_or_contradict(project, fails):
    fails(train.main, ["--dataset", "custom"], "--videos", "--features")
    fails(train.main, ["--dataset", "custom", "--features", "x"], "--annotations")
    fails(train.main, ["--dataset", "custom", "--features", "x", "--annotations", "y"], "--descriptions")
    fails(train.main, [*project[1], "--resume", "--overwrite"], "--resume", "--overwrite")


@pytest.mark.parametrize("flags, part", [
    ("", "--checkpoint"), ("--checkpoint x --predictions p --ground-truth g", "--checkpoint"),
    ("--ground-truth g", "--predictions"), ("--ground-truth g --predictions p --video v", "--video"),
    ("--checkpoint x --tiou 50", "--tiou"), ("--checkpoint x --tiou nan", "--tiou"),
    ("--checkpoint x --fps -1", "--fps"), ("--checkpoint x --device tpu", "--device"),
    ("--checkpoint x --min-score nan", "--min-score"), ("--checkpoint no/where", "no/where: expected a checkpoint")])
def test_flags_of_evaluate(fails, flags, part):
    fails(evaluate.main, flags.split(), part)


@pytest.mark.parametrize("main, flags, part", [
    (bias.main, "", "--checkpoint"), (bias.main, "--checkpoint x --easy nan", "--easy"),
    (bias.main, "--checkpoint x --easy 0.3", "--hard"), (bias.main, "--checkpoint x --incomplete --groups f", "--incomplete"),
    (bias.main, "--checkpoint no/where", "no/where: expected a checkpoint"),
    (question_answering.main, "", "--checkpoint"),
    (question_answering.main, "--checkpoint x --max-new-tokens 0", "--max-new-tokens"),
    (question_answering.main, "--checkpoint no/where", "no/where: expected a checkpoint")])
def test_flags_of_bias_and_question_answering(fails, main, flags, part):
    fails(main, flags.split(), part)


def test_flags_of_reproduce_and_benchmark(fails, tmp_path):
    fails(reproduce.main, [], "--out")
    fails(reproduce.main, ["--out", tmp_path, "--jobs", "0"], "--jobs")
    fails(reproduce.main, ["--out", tmp_path, "--only", "7"], "--only")
    fails(reproduce.main, ["--out", write(tmp_path / "file", "x")], "file")
    write(tmp_path / "settings.json", "{")
    fails(reproduce.main, ["--out", tmp_path], "settings.json", "expected a JSON file")
    fails(benchmark.main, [], "what")
    fails(benchmark.main, ["full-size", "--device", "abacus"], "--device")
    fails(benchmark.main, ["full-size", "--only", "abacus"], "--only", "abacus", "S-1.5B")


def test_a_gpu_without_room_says_what_to_lower(fails, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(train, "run", full)
    fails(train.main, [], "--batch-size", "--grad-checkpoint on", "2.00 GiB")
