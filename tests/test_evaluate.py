"""The metric of evaluate.py: hand-computed cases, the peers' own figures, files and messages."""
import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from data import TALDataset
from evaluate import average_precision, mean_average_precision, temporal_iou
from support.annotations import Video
from support.commands import run_command
from support.results import format_table, load_ground_truth, load_predictions

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # the peers' outputs and real data: not part of the project, absent in CI
needs_shared = pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason=f"no peers' figures at {SHARED}")
THUMOS = [0.3, 0.4, 0.5, 0.6, 0.7]


def truth(**videos):
    """truth(v1=[(0, 10, "a")]) -> ground truth of mean_average_precision."""
    return {video: {"segments": np.array([row[:2] for row in rows], float).reshape(-1, 2),
                    "labels": [row[2] for row in rows]} for video, rows in videos.items()}


def found(**videos):
    """found(v1=[(0, 10, "a", 0.9)]) -> predictions of mean_average_precision."""
    return {video: {**truth(v=rows)["v"], "scores": np.array([row[3] for row in rows], float)}
            for video, rows in videos.items()}


def assert_close(actual, expected, tolerance=1e-12):
    difference = np.max(np.abs(np.asarray(actual) - np.asarray(expected)))
    assert difference <= tolerance, f"largest difference {difference}: {actual} against {expected}"


# --------------------------------------------------------------------------------------------------------- IoU
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_temporal_iou(kind):
    a, b = [[0.0, 10.0], [5.0, 5.0]], [[0.0, 10.0], [5.0, 15.0], [10.0, 20.0], [5.0, 5.0], [8.0, 3.0]]
    iou = temporal_iou(kind(a), kind(b))
    assert isinstance(iou, torch.Tensor) and iou.shape == (2, 5)
    assert_close(iou, [[1, 5 / 15, 0, 0, 0], [0, 0, 0, 0, 0]], 1e-7)
    assert temporal_iou(kind(a)[:0], kind(b)).shape == (0, 5)


@pytest.mark.filterwarnings("error")
def test_zero_length_segments_never_match():
    assert_close(temporal_iou(np.full((2, 2), 3.0), np.full((2, 2), 3.0)), np.zeros((2, 2)))
    result = mean_average_precision(truth(v=[(5, 5, "a"), (0, 4, "a")]),
                                    found(v=[(5, 5, "a", 0.9), (0, 4, "a", 0.8)]), [0.5])
    assert_close(result["AP"], [[0.25]])  # wrong, right; the empty segment still counts: 1/2 / 2


# ----------------------------------------------------------------------------------- average precision by hand
def test_average_precision_by_hand():
    # right, wrong, right, of 3: precision 1, 1/2, 2/3; recall rises at ranks 1 and 3: (1 + 2/3) / 3
    assert_close(average_precision(np.array([[True, False, True]]), 3), [5 / 9])
    # wrong, right, right, of 2: precision 0, 1/2, 2/3; interpolated 2/3 everywhere
    assert_close(average_precision(np.array([[False, True, True]]), 2), [2 / 3])
    assert_close(average_precision(np.array([[False, False], [True, True]]), 2), [0, 1])
    assert_close(average_precision(np.zeros((2, 0), bool), 2), [0, 0])


def test_iou_equal_to_the_threshold_is_right():
    result = mean_average_precision(truth(v=[(0, 10, "a")]), found(v=[(0, 5, "a", 0.9)]), [0.4, 0.5, 0.6])
    assert_close(result["mAP"], [1, 1, 0])
    assert result["average"] == pytest.approx(2 / 3) and result["classes"] == ["a"]
    assert result["AP"].shape == (3, 1)


def test_greedy_matching_takes_the_best_free_segment():
    ground_truth = truth(v=[(0, 10, "a"), (2, 12, "a")])
    # The first takes [0, 10] (IoU 1). The second, best with [0, 10] (9/10), falls back on [2, 12] (7/12).
    predictions = found(v=[(0, 10, "a", 0.9), (0, 9, "a", 0.8)])
    assert_close(mean_average_precision(ground_truth, predictions, [0.5, 0.6])["mAP"], [1, 0.5])
    # A third one finds nothing free. Order of score decides, not order of the file.
    predictions = found(v=[(0, 9, "a", 0.1), (2, 12, "a", 0.2), (0, 10, "a", 0.3)])
    assert_close(mean_average_precision(ground_truth, predictions, [0.5])["mAP"], [1])
    # The first takes the better of its two, although that is the only one the second could have: 1 right of 2
    predictions = found(v=[(1.2, 11.2, "a", 0.9), (4, 12, "a", 0.8)])
    assert_close(mean_average_precision(ground_truth, predictions, [0.7])["mAP"], [0.5])


def test_second_detection_of_a_segment_is_wrong():
    ground_truth = truth(v=[(0, 10, "a"), (20, 30, "a")])
    predictions = found(v=[(0, 10, "a", 0.9), (0, 10, "a", 0.8), (20, 30, "a", 0.7)])
    assert_close(mean_average_precision(ground_truth, predictions, [0.5])["mAP"], [5 / 6])  # (1 + 2/3) / 2


def test_duplicates_in_the_ground_truth_are_one_segment():
    ground_truth = truth(v=[(0, 10, "a"), (0.0005, 9.9995, "a"), (0, 10, "b"), (0, 10.01, "a")], w=[(0, 10, "a")])
    predictions = found(v=[(0, 10, "a", 0.9), (0, 10, "b", 0.9)])
    result = mean_average_precision(ground_truth, predictions, [0.5])
    assert_close(result["AP"], [[1 / 3, 1]])  # of "a" remain two in v and one in w
    assert len(ground_truth["v"]["labels"]) == 4  # the input is not changed


def test_detections_without_ground_truth_are_wrong():
    ground_truth = truth(v=[(0, 10, "a")], empty=[])
    right = (0, 10, "a", 0.5)
    for other in ("empty", "unknown"):
        result = mean_average_precision(ground_truth, found(**{other: [(0, 10, "a", 0.9)], "v": [right]}), [0.5])
        assert_close(result["mAP"], [0.5])
    result = mean_average_precision(ground_truth, found(v=[(0, 10, "A", 0.9), right]), [0.5])
    assert_close(result["mAP"], [1])  # a label of no ground truth is no class, and "A" is not "a"
    assert result["classes"] == ["a"]


def test_class_without_detections_has_ap_zero():
    ground_truth = truth(v=[(0, 10, "b"), (0, 10, "a")])
    result = mean_average_precision(ground_truth, found(v=[(0, 10, "b", 0.9)]), [0.3, 0.5])
    assert result["classes"] == ["a", "b"]
    assert_close(result["AP"], [[0, 1], [0, 1]])
    assert_close(result["mAP"], [0.5, 0.5])


@pytest.mark.filterwarnings("error")
def test_empty_inputs():
    for predictions in ({}, found(v=[])):
        result = mean_average_precision(truth(v=[(0, 10, "a")]), predictions, THUMOS)
        assert_close(result["AP"], np.zeros((5, 1)))
    result = mean_average_precision({}, found(v=[(0, 10, "a", 0.9)]), THUMOS)
    assert result["average"] == 0 and result["mAP"].shape == (5,) and result["AP"].shape == (5, 0)


def test_ties():
    # Equal scores go in the order of numpy's sort, which may depend on the CPU: both orders are legal.
    result = mean_average_precision(truth(v=[(0, 10, "a")]), found(v=[(0, 10, "a", 0.5), (20, 30, "a", 0.5)]), [0.5])
    assert result["average"] in (0.5, 1)
    # Equal IoU (1/3): the first detection takes the segment listed last, and leaves [0, 10] to the second.
    ground_truth = truth(v=[(0, 10, "a"), (10, 20, "a")])
    predictions = found(v=[(5, 15, "a", 0.9), (0, 10, "a", 0.8)])
    assert_close(mean_average_precision(ground_truth, predictions, [0.3])["mAP"], [1])


def test_tensors_and_bad_input():
    ground_truth, predictions = truth(v=[(0, 10, "a")]), found(v=[(0, 10, "a", 0.9)])
    tensors = {"v": {**predictions["v"], "segments": torch.tensor([[0.0, 10.0]]), "scores": torch.tensor([0.9])}}
    assert mean_average_precision(ground_truth, tensors, [0.5])["average"] == 1
    for thresholds in ([], [0], [50]):
        with pytest.raises(ValueError, match="tIoU"):
            mean_average_precision(ground_truth, predictions, thresholds)
    with pytest.raises(ValueError, match="NaN"):
        mean_average_precision(ground_truth, found(v=[(0, 10, "a", np.nan)]), [0.5])
    for broken in (ground_truth, predictions):
        with pytest.raises(ValueError, match="video v: expected as many"):
            broken = {"v": {**broken["v"], "labels": ["a", "a"]}}
            mean_average_precision(broken, broken, [0.5])


# ---------------------------------------------------------------------------------- against other computations
def plain_average_precision(ground_truth, predictions, label, threshold):
    """The protocol in plain loops, as a reader of the ActivityNet description would write it."""
    free = [[video, *segment] for video, entry in ground_truth.items()
            for segment, name in zip(entry["segments"], entry["labels"]) if name == label]
    num_gt, right = len(free), []
    rows = [(score, video, *segment) for video, entry in predictions.items()
            for segment, name, score in zip(entry["segments"], entry["labels"], entry["scores"]) if name == label]
    for _, video, start, end in sorted(rows, reverse=True):
        best, best_iou = None, threshold
        for candidate in free:
            shared = min(end, candidate[2]) - max(start, candidate[1])
            iou = max(shared, 0) / (end - start + candidate[2] - candidate[1] - max(shared, 0))
            if candidate[0] == video and iou >= best_iou:
                best, best_iou = candidate, iou
        right.append(best is not None)
        if best is not None:
            free.remove(best)
    precision = [sum(right[:n + 1]) / (n + 1) for n in range(len(right))]
    return sum(max(precision[n:]) for n in range(len(right)) if right[n]) / num_gt


@pytest.mark.parametrize("seed", range(5))
def test_against_plain_loops(seed):
    rng = np.random.default_rng(seed)

    def rows(count):
        start, length = rng.uniform(0, 20, count), rng.uniform(1, 8, count)
        return list(zip(start, start + length, rng.choice(["a", "b", "c"], count), rng.random(count)))

    ground_truth = truth(**{f"v{i}": rows(rng.integers(0, 8)) for i in range(6)})
    predictions = found(**{f"v{i}": rows(rng.integers(0, 40)) for i in range(1, 8)})
    result = mean_average_precision(ground_truth, predictions, THUMOS)
    assert_close(result["AP"], [[plain_average_precision(ground_truth, predictions, label, threshold)
                                 for label in result["classes"]] for threshold in THUMOS])


def test_figures_of_the_peers():
    """Cases `tiny`, `edge_clean` and `ties_first`, scored by the official toolkit, OpenTAD and ActionFormer."""
    ground_truth = truth(v1=[(0, 10, "a"), (12, 20, "a"), (5, 9, "b")], v2=[(3, 6, "b")])
    predictions = found(v1=[(0, 9, "a", .9), (0, 10, "a", .8), (13, 20, "a", .7), (5, 8, "b", .95), (4, 10, "b", .2)],
                        v2=[(2.5, 6.5, "b", .6), (3, 6, "a", .75)])
    assert_close(mean_average_precision(ground_truth, predictions, THUMOS)["AP"], [[0.75, 1.0]] * 5)

    ground_truth = truth(v1=[(0, 10, "a"), (20, 30, "b"), (31, 33, "nopred")], v2=[], v3=[(1, 4, "a")])
    predictions = found(v1=[(0, 10, "a", .5), (19, 31, "b", .9), (40, 45, "b", .95)], v2=[(1, 4, "a", .8)],
                        zz=[(1, 4, "a", .7)], t1=[(1, 4, "a", .6)])
    assert_close(mean_average_precision(ground_truth, predictions, THUMOS)["AP"], [[0.125, 0.5, 0]] * 5)

    ground_truth = truth(v1=[(0, 10, "a"), (20, 30, "a"), (40, 45, "a")])
    segments = [(0, 10), (20, 29), (20, 30), (12, 15), (33, 36), (46, 48), (40, 45), (16, 18)]
    predictions = found(v1=[(*segment, "a", 0.5 - 1e-9 * i) for i, segment in enumerate(segments)])
    assert_close(mean_average_precision(ground_truth, predictions, THUMOS)["mAP"], [0.8095238095238095] * 5)


@needs_shared
@pytest.mark.parametrize("name", ["tiny", "edge_clean", "ties_first", "rand_medium"])
def test_golden_map(name):
    folder = SHARED / "golden" / "map"
    expected = json.loads((folder / f"{name}_expected.json").read_text())
    result = mean_average_precision(load_ground_truth(folder / f"{name}_gt.json", expected["subset"]),
                                    load_predictions(folder / f"{name}_pred.json"), expected["tiou"])
    # rand_medium holds duplicates, which the official toolkit counts: our rule is that of the other two
    for peer in ["opentad", "actionformer"] + ["official"] * (name != "rand_medium"):
        order = [expected[peer]["classes"].index(label) for label in result["classes"]]
        assert_close(result["AP"], np.array(expected[peer]["ap"])[:, order], 1e-6)
        assert_close(result["mAP"], expected[peer]["mAP"], 1e-6)
        assert_close(result["average"], expected[peer]["avg"], 1e-6)


# ----------------------------------------------------------------------------------------- files and the command
GROUND_TRUTH = {"database": {
    "v1": {"subset": "Test", "annotations": [{"label": "a", "segment": [0, 10]}, {"label": "b", "segment": [5, 9.5]}]},
    "v2": {"subset": "training", "annotations": [{"label": "c", "segment": [0, 1]}]},
    "v3": {"subset": "test", "annotations": []}, "v4": {"subset": "blind", "annotations": []}}}
RESULTS = {"results": {"v1": [{"label": "a", "segment": [0, 9], "score": 0.9}], "v3": []}}


def write(path, data, compress=False):
    text = (data if isinstance(data, str) else json.dumps(data)).encode()
    path.write_bytes(gzip.compress(text) if compress else text)
    return path


@pytest.mark.parametrize("compress", [False, True])
def test_load_files(tmp_path, compress):
    path = write(tmp_path / "gt.json", GROUND_TRUTH, compress)  # gzip is told by content, not by name
    for subset in ("test", "TEST", "Test"):
        ground_truth = load_ground_truth(path, subset)
        assert list(ground_truth) == ["v1", "v3"]
        assert_close(ground_truth["v1"]["segments"], [[0, 10], [5, 9.5]])
        assert ground_truth["v1"]["labels"] == ["a", "b"] and ground_truth["v3"]["segments"].shape == (0, 2)
    predictions = load_predictions(write(tmp_path / "result.json.gz", RESULTS, compress))
    assert predictions["v1"]["scores"].tolist() == [0.9] and predictions["v3"]["segments"].shape == (0, 2)


BROKEN_RESULTS = [
    ("{", "expected a JSON file"),
    ([1], r"expected an object with 'results', found \[1\]"),
    (GROUND_TRUTH, "'results': expected an object .annotations have 'database', .*swapped.*, found no such field but database"),
    ({"results": {"v1": {}}}, r"results/v1: expected a list .*, found {}"),
    ({"results": {"v1": [3]}}, r"results/v1\[0\]: expected an object"),
    ({"results": {"v1": [{"label": 1, "segment": [0, 1], "score": 1}]}}, r"results/v1\[0\]: 'label': expected a text, found 1"),
    ({"results": {"v1": [{"label": "a", "segment": [0], "score": 1}]}}, r"results/v1\[0\]: 'segment': .* seconds, found \[0\]"),
    ({"results": {"v1": [{"label": "a", "segment": [0, float("nan")], "score": 1}]}}, "two finite numbers"),
    ({"results": {"v1": [{"label": "a", "segment": [0, 1]}]}}, r"results/v1\[0\]: 'score': .*no such field but label, segment"),
]


@pytest.mark.parametrize("data, message", BROKEN_RESULTS)
def test_broken_result_files(tmp_path, data, message):
    with pytest.raises(ValueError, match=message) as error:
        load_predictions(write(tmp_path / "result.json", data))
    assert str(tmp_path / "result.json") in str(error.value)


def test_broken_ground_truth_and_unreadable_files(tmp_path):
    path = write(tmp_path / "gt.json", GROUND_TRUTH)
    with pytest.raises(ValueError, match=r"expected videos of subset 'validation', found Test \(1 videos\), training"):
        load_ground_truth(path, "validation")
    with pytest.raises(ValueError, match="expected segments in subset 'blind', found none in 1 videos"):
        load_ground_truth(path, "blind")
    with pytest.raises(ValueError, match="video 'v': 'subset': expected a text, .* found None"):
        load_ground_truth(write(path, {"database": {"v": {"annotations": []}}}), "test")
    with pytest.raises(ValueError, match="nowhere.json: expected a JSON file .*No such file"):
        load_predictions(tmp_path / "nowhere.json")
    path.write_bytes(gzip.compress(b"{}" * 100)[:-9])
    with pytest.raises(ValueError, match="expected a JSON file .*end-of-stream"):
        load_predictions(path)


def test_a_file_is_scored_as_training_scores_it(tmp_path):
    """Ambiguous is no class; no length and a copy do not count; the end of the video cuts. Perfect detections get 1."""
    rows = [("run", 1, 3), ("Ambiguous", 5, 8), ("run", 4, 4), ("run", 1.0004, 3), ("jump", 10, 25)]
    path = write(tmp_path / "gt.json", {"database": {"v": {"subset": "test", "duration": 20, "annotations": [
        {"label": label, "segment": segment} for label, *segment in rows]}}})
    notes = []
    truth = load_ground_truth(path, "test", notes)
    assert truth["v"]["labels"] == ["run", "jump"] and len(notes) == 4
    predictions = found(v=[(1, 3, "run", .9), (10, 20, "jump", .8)])
    assert_close(mean_average_precision(truth, predictions, [0.99])["AP"], [[1, 1]])


def test_nothing_to_score_is_said():
    result = mean_average_precision(truth(v=[]), found(v=[(0, 10, "a", .5)]), [0.5])
    assert format_table(result, [0.5]) == "nothing to score: the test videos have no segments"


def test_a_closed_pipe_ends_quietly(monkeypatch, capsys):
    def closed():
        raise BrokenPipeError(32, "Broken pipe")
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(flush=closed))
    assert run_command("evaluate.py", lambda: None) == 141 and sys.stdout is None
    assert capsys.readouterr().err == ""


def test_format_table():
    result = mean_average_precision(truth(v=[(0, 10, "Dive"), (0, 5, "LongJump")]), found(v=[(0, 6, "Dive", 1)]),
                                    [0.5, 0.75])
    assert format_table(result, [0.5, 0.75]).splitlines() == [
        "| tIoU     |     0.5 |    0.75 | average |",
        "|:---------|--------:|--------:|--------:|",
        "| mAP      |   50.00 |    0.00 |   25.00 |",
        "| Dive     |  100.00 |    0.00 |   50.00 |",
        "| LongJump |    0.00 |    0.00 |    0.00 |"]


def test_main(tmp_path, capsys):
    flags = ["--ground-truth", str(write(tmp_path / "gt.json", GROUND_TRUTH)),
             "--predictions", str(write(tmp_path / "result.json", RESULTS)), "--json", str(tmp_path / "scores.json")]
    assert evaluate.main(flags + ["--tiou", "0.5", "0.95"]) == 0
    assert "| mAP   |   50.00 |    0.00 |   25.00 |" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores == {"subset": "test", "tiou": [0.5, 0.95], "mAP": [0.5, 0.0], "average": 0.25,
                      "AP": {"a": [1.0, 0.0], "b": [0.0, 0.0]}}
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(flags + ["--tiou", "50"])
    assert "error: argument --tiou: expected a number from 1e-09 to 1, found 50" in capsys.readouterr().err
    for mistake in (["--subset", "nosuch"], ["--json", str(tmp_path / "no" / "such.json")]):
        assert evaluate.main(flags + mistake) == 2
        assert capsys.readouterr().err.startswith("evaluate.py: error: ")


def test_main_notes_what_may_be_a_mistake(tmp_path, capsys):
    entry = {"label": "A", "segment": [0, 9], "score": 0.9}
    evaluate.main(["--ground-truth", str(write(tmp_path / "gt.json", GROUND_TRUTH)),
                   "--predictions", str(write(tmp_path / "result.json", {"results": {"v2": [entry, entry]}}))])
    notes = capsys.readouterr().err
    assert "2 detections have a label that the ground truth has not, and are not scored: A" in notes
    assert "1 of 1 videos with predictions are not in the subset; detections there are wrong: v2" in notes
    assert "1 of 2 detections repeat a score of their class" in notes


@needs_shared
@pytest.mark.parametrize("name, expected", [("c3d", [.360622, .298834, .212299, .112658, .040823]),
                                            ("res3d", [.418848, .348579, .257235, .140408, .052766])])
def test_command_on_published_detections(tmp_path, name, expected):
    """S-CNN on THUMOS14. Its rounded scores hold thousands of ties, so the figures are those of one kind of CPU."""
    flags = ["--ground-truth", SHARED / "data" / "thumos14.json.gz", "--subset", "Test", "--tiou", *THUMOS,
             "--predictions", SHARED / "data" / f"scnn_{name}_thumos14_nms0.4.json.gz", "--json", tmp_path / "scores.json"]
    assert evaluate.main(list(map(str, flags))) == 0
    avx512 = {"X86_V4", "AVX512_SKX"} & set(np.show_config(mode="dicts")["SIMD Extensions"].get("found", []))
    assert_close(json.loads((tmp_path / "scores.json").read_text())["mAP"], expected, 1e-6 if avx512 else 5e-3)


# ------------------------------------------------------------------------------------- detection
def test_detect_reads_a_prompt_that_comes_first_once(tmp_path, make_model, monkeypatch):
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32))
    test = TALDataset([Video("v", 20.0, 1.0, path=tmp_path / "v.npy")], ["Jump", "Run", "Throw"], window=8)
    model = make_model(layout="text-first")
    model.language_weight = lambda advantage: torch.full_like(advantage, 0.5)      # at first it would be 0
    args = SimpleNamespace(batch_size=3, workers=0, external_scores=None, nms_sigma=0.5, voting=0.0, max_per_class=0,
                           max_per_video=200)
    original, read = model.language.hidden_states, []
    monkeypatch.setattr(model.language, "hidden_states",
                        lambda tokens, *more: read.append(tokens.shape[:2]) or original(tokens, *more))
    once = evaluate.detect(model, test, args).predictions["v"]
    T = len(model.language.prompt_ids)
    assert len(test) == 4 and read == [(1, T), (3, 32), (1, 32)] and model.language.kept_prompt is None
    monkeypatch.setattr(model.language, "keep_prompt", lambda: None)
    again = evaluate.detect(model, test, args).predictions["v"]
    assert read[3:] == [(3, T + 32), (1, T + 32)] and once["labels"] == again["labels"]
    assert_close(once["segments"], again["segments"], 1e-4)
    assert_close(once["scores"], again["scores"], 1e-5)


@pytest.mark.parametrize("flags", [["--video", "v.mp4"], ["--lm", "folder"]])
def test_flags_of_a_model_want_a_checkpoint(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--ground-truth", "a", "--predictions", "b", *flags])
    message = capsys.readouterr().err
    assert flags[0] in message.splitlines()[-1] and "expected --checkpoint DIR with" in message
