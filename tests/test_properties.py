"""Properties of the readers, for anything that hypothesis makes up: a result, or InputError and nothing else.

Seeded by the tests themselves (derandomize), so that a run is like any other.
"""
import gzip
import json
import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import data
import evaluate
import train
from experiments.bias import read_reference
from experiments.question_answering import parse_proposals
from support import annotations, checkpoint, results
from support.annotations import InputError, Video
from support.flags import BASE
from support.video import open_features
from vlm import proposal_text

few = settings(derandomize=True, deadline=None, database=None, max_examples=50)
many = settings(few, max_examples=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all examples: every example writes its own files anew."""
    return tmp_path_factory.mktemp("properties")


def read(reader, *args):
    """What a reader returns, None for InputError with a message; anything else that is raised fails the test."""
    try:
        return reader(*args)
    except InputError as error:
        assert str(error)


# ---------------------------------------------------------------- near the formats
numbers = st.integers() | st.floats() | st.integers(0, 20) | st.floats(0, 20)
words = st.sampled_from(["Run", "test", "training", "Ambiguous", "", "\ud800", "v_c"]) | st.text(max_size=5)
fields = st.sampled_from(["database", "results", "class", "subset", "duration", "fps", "annotations", "label",
                          "segment", "score", "c"]) | st.text(max_size=3)
anything = st.recursive(st.none() | st.booleans() | numbers | words, lambda inner: st.lists(inner, max_size=4)
                        | st.dictionaries(fields, inner, max_size=4), max_leaves=8)


def near(value):
    """A value as it should be, seven times of eight."""
    return st.integers(0, 7).flatmap(lambda n: anything if n == 0 else value)


times = st.lists(st.integers(0, 12) | st.floats(0, 12), min_size=2, max_size=2).map(sorted)
action = near(st.fixed_dictionaries(
    {"label": near(st.sampled_from(["Run", "Jump", "ambiguous"])), "segment": near(times)},
    optional={"score": near(st.floats(0, 1))}))
video = near(st.fixed_dictionaries(
    {"subset": near(st.sampled_from(["test", "Test"])), "duration": near(st.floats(1, 10)),
     "annotations": near(st.lists(action, max_size=4))}, optional={"fps": near(numbers)}))
databases = near(st.fixed_dictionaries({"database": near(st.dictionaries(st.sampled_from("abc"), video))}))
predictions = near(st.fixed_dictionaries({"results": near(st.dictionaries(
    st.sampled_from("abc"), near(st.lists(action, max_size=4))))}))
scores = near(st.fixed_dictionaries({"results": near(st.dictionaries(st.sampled_from(["a", "v_a"]), near(
    st.lists(near(numbers), min_size=2, max_size=2)))), "class": near(st.just(["Run", "Jump"]))}))
bytes_near_json = st.binary(max_size=60) | anything.map(lambda x: json.dumps(x).encode()) | \
    st.binary(max_size=60).map(gzip.compress) | st.binary(max_size=40).map(lambda b: b"\x1f\x8b\x08\0" + b) | \
    st.integers(1, 40).map(lambda n: gzip.compress(b'{"database": {}}')[:n])


def read_all(path):
    """Every reader of a JSON file on one file."""
    check_annotations(read(annotations.load_annotations, path))
    read(annotations.load_descriptions, path, ["Run"], [])
    score_whatever_it_is(read(results.load_ground_truth, path, "test"), read(results.load_predictions, path))
    check_scores(read(annotations.load_external_scores, path, ["Jump"], [Video("a", 1.0, 1.0)]))
    read(read_reference, [str(path)])


def check_annotations(videos):
    for v in videos or []:
        assert 0 <= v.duration < math.inf and 0 <= v.fps < math.inf and isinstance(v.subset, str)
        assert v.segments.shape == (len(v.labels), 2) and v.segments.dtype == np.float64
        assert all(isinstance(label, str) and label for label in v.labels)
        for start, end in v.segments:
            assert 0 <= start < end < math.inf and (end <= v.duration or start >= v.duration)


def score_whatever_it_is(truth, found):
    if truth is not None and found is not None:
        list(results.doubts(truth, found))
        with np.errstate(all="ignore"):
            result = evaluate.mean_average_precision(truth, found, [0.3, 0.7])
        assert 0 <= result["average"] <= 1 and np.isfinite(result["AP"]).all()


def check_scores(found):
    for row in (found or {}).values():
        assert row.shape == (1,) and not row.isnan().any()


# ---------------------------------------------------------------- readers
@many
@given(bytes_near_json)
@example(b"[" * 100000)
@example(b'{"database": ' * 900 + b"1" + b"}" * 900)
def test_any_bytes_as_json(folder, content):
    (folder / "any.json").write_bytes(content)
    read_all(folder / "any.json")


@many
@given(databases | predictions | scores | st.dictionaries(words, words | anything, max_size=3))
def test_any_json(folder, content):
    (folder / "near.json").write_text(json.dumps(content))
    read_all(folder / "near.json")


@many
@given(databases, predictions)
def test_whatever_is_read_can_be_scored(folder, truth, found):
    for name, content in (("truth", truth), ("found", found)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    check_annotations(read(annotations.load_annotations, folder / "truth.json"))
    score_whatever_it_is(read(results.load_ground_truth, folder / "truth.json", "test"),
                         read(results.load_predictions, folder / "found.json"))


cells = st.sampled_from(["a", "0", "1.5", "3", "00:00:01.5", "9:9:9", "nan", "inf", "-1", "", "1e400", "9" * 400,
                         "0:0:" + "9" * 400, "9" * 400 + ":0:0", '"', "\0", "é"]) | st.text(max_size=4)
TABLES = {"test_Annotation": "video,type,start,end", "test_video_info": "video,fps,count",
          "EPIC_100_validation": "video_id,verb_class,start_timestamp,stop_timestamp",
          "EPIC_100_video_info": "video_id,duration,fps", "EPIC_100_verb_classes": "id,key"}
GOOD = {"test_Annotation": "a,Run,1,2", "test_video_info": "a,30,300", "EPIC_100_validation": "a,0,0:0:1,0:0:2",
        "EPIC_100_video_info": "a,10,30", "EPIC_100_verb_classes": "0,Run"}


@many
@given(st.sampled_from(sorted(TABLES)), st.binary(max_size=80) | st.lists(st.lists(cells, max_size=5), max_size=4))
def test_any_table(folder, broken, rows):
    """One of the csv files has any rows below its header, or any bytes; the others are right."""
    for name, header in TABLES.items():
        (folder / f"{name}.csv").write_text(f"{header}\n{GOOD[name]}\n")
    if isinstance(rows, bytes):
        (folder / f"{broken}.csv").write_bytes(rows)
    else:
        text = "\n".join([TABLES[broken], GOOD[broken], *map(",".join, rows)])
        (folder / f"{broken}.csv").write_bytes(text.encode(errors="surrogatepass"))
    for name in ("test_Annotation", "EPIC_100_validation"):
        check_annotations(read(annotations.load_annotations, folder / f"{name}.csv"))


def feature_file(folder):
    np.save(folder / "good.npy", np.ones((3, 2), np.float32))
    return (folder / "good.npy").read_bytes()


@many
@given(st.binary(max_size=150), st.integers(0, 152), st.integers(0, 20))
@example(b"", 151, 0)
def test_any_bytes_in_a_feature_file(folder, junk, at, length):
    """Some bytes of a good file exchanged for others; all of them where `at` is 0."""
    good = feature_file(folder)
    (folder / "v.npy").write_bytes(good[:at] + junk + good[at + length:] if at else junk)
    rows = read(open_features, folder / "v.npy")
    if rows is not None:
        assert rows.ndim == 2 and rows.size > 0 and np.asarray(rows[:1], np.float32).shape == (1, rows.shape[1])


@few
@given(st.sampled_from(["|O", "<f4", ">i8", "|S3", "<U0", "|V0", "<c8", "<M8[s]", "[('a', '<f4')]", "f4,f4", "|b1"]),
       st.lists(st.integers(-3, 10 ** 18) | st.just(3), max_size=3), st.booleans())
def test_any_header_of_a_feature_file(folder, dtype, shape, fortran):
    text = f"{{'descr': '{dtype}', 'fortran_order': {fortran}, 'shape': {tuple(shape)}}}\n".encode()
    (folder / "v.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(36))
    rows = read(open_features, folder / "v.npy")
    assert rows is None or rows.dtype.kind in "fiu" and rows.nbytes <= 36


@few
@given(st.binary(max_size=100),
       st.dictionaries(st.sampled_from(["config", "args", "epoch", "step"]), st.text(max_size=5)))
def test_any_bytes_as_a_checkpoint(folder, junk, header):
    text = json.dumps({"__metadata__": header}).encode()
    for content in (junk, len(text).to_bytes(8, "little") + text, len(text).to_bytes(8, "little") + text + junk):
        (folder / "checkpoint.safetensors").write_bytes(content)
        assert read(checkpoint.read_checkpoint, folder / "checkpoint.safetensors") is None


COMMAND = ["--dataset", "custom", "--features", "f", "--annotations", "a", "--descriptions", "d", "--device", "cpu"]
NUMBERS = sorted(name for name, value in vars(train.get_args(COMMAND)).items()
                 if type(value) in (int, float) and name not in BASE)
SHARES = ("min_overlap", "prior", "ema", "voting", "tiou")


@few
@given(st.sampled_from([*NUMBERS, "tiou"]), numbers.map(str) | st.text(max_size=5))
def test_any_number_in_a_flag(flag, text):
    try:
        args = train.get_args([*COMMAND, f"--{flag.replace('_', '-')}={text}"])
    except SystemExit as end:
        assert end.code == 2
    else:
        value = getattr(args, flag)
        highest = 1 if flag in SHARES else 1e9
        assert all(0 <= x <= highest for x in (value if isinstance(value, list) else [value]))


# ---------------------------------------------------------------- the answer, and the grid
LABELS = ["Run", "Long Jump", "open door", "É", "x-1"]
pieces = st.lists(st.sampled_from([*LABELS, ": ", " - ", "-", ", ", ".", "12", "9" * 30, "٣", "No action.", "\n",
                                   "run"]) | st.text(max_size=3), max_size=12).map("".join)


@many
@given(pieces | st.text(max_size=50))
@example("Run: " + " " * 50000 + "1-2")
@example("Run:1-2" * 2000)
def test_parse_proposals_of_any_text(text):
    for label, start, end in parse_proposals(text, LABELS):
        assert label in LABELS and type(start) is int and type(end) is int


label_text = st.text(st.characters(exclude_characters=",.;:\n", exclude_categories=["Cs"]), min_size=1, max_size=8).map(
    str.strip).filter(bool)


@many
@given(st.lists(st.tuples(label_text, st.integers(0, 10 ** 6), st.integers(0, 10 ** 6)), max_size=6))
def test_the_answer_can_be_read_back(rows):
    classes = [label for label, _, _ in rows]
    assume(len({c.lower() for c in classes}) == len(set(classes)))
    rows = sorted((min(a, b), max(a, b), label) for label, a, b in rows)
    text = proposal_text([(start, end) for start, end, _ in rows], [label for *_, label in rows])
    assert parse_proposals(text, classes) == [(label, start, end) for start, end, label in rows]


@many
@given(st.lists(st.floats(0, 1e5), max_size=5), st.floats(1, 240), st.integers(1, 64), st.integers(0, 64))
def test_seconds_to_grid_and_back(seconds, fps, stride, num_frames):
    seconds = np.array(seconds)
    grid = data.seconds_to_grid(seconds, fps, stride, num_frames)
    np.testing.assert_allclose(data.grid_to_seconds(grid, fps, stride, num_frames), seconds, rtol=1e-9, atol=1e-7)
    assert (np.diff(grid)[np.diff(seconds) >= 0] >= 0).all()                 # in the same order


@many
@given(st.lists(times, max_size=5), st.integers(0, 10), st.integers(1, 10), st.sampled_from([0.0, 0.5, 2.0]),
       st.floats(0, 1))
def test_segments_of_a_window_lie_in_it(segments, start, length, offset, min_overlap):
    segments = np.array(segments, dtype=np.float64).reshape(-1, 2)
    cut, kept = data.truncate_segments(segments, start, length, offset, min_overlap)
    assert (cut[:, 0] <= cut[:, 1]).all() and (cut >= -offset).all() and (cut <= length + offset).all()
    whole = (segments[kept, 0] >= start - offset) & (segments[kept, 1] <= start + length + offset)
    np.testing.assert_allclose((cut + start)[whole], segments[kept][whole], atol=1e-9)      # what lies inside stays
