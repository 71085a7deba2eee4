"""support/results.py - result files in ActivityNet's format, and the ground truth for them.

Ground truth and predictions are dicts of one shape:
{video: {"segments": (N, 2) float64 seconds, "labels": [str], "scores": (N,) if predicted}}.
"""
import json
from collections import Counter
from pathlib import Path

import numpy as np

from support.annotations import check_fields, expect, first_ten, read_field, read_segments
from support.checkpoint import written_whole

def load_ground_truth(path, subset: str) -> dict:
    """The videos of one subset, named in any case, of an ActivityNet-format file, plain or gzip.
    Raises InputError for a file of another format, and for a subset without segments."""
    ground_truth, subsets = {}, Counter()
    for video, entry in read_field(path, "database").items():
        where = f"{path}: database/{video}"
        check_fields(where, entry, "subset")
        subsets[entry["subset"]] += 1
        if entry["subset"].lower() == subset.lower():
            ground_truth[video] = read_segments(f"{where}/annotations", entry.get("annotations"))
    found = first_ten(f"{name} ({count} videos)" for name, count in subsets.items())
    expect(ground_truth, path, f"videos of subset '{subset}'", found, "give one by --subset")
    expect(any(entry["labels"] for entry in ground_truth.values()), path,
           f"segments in subset '{subset}'", f"none in {len(ground_truth)} videos",
           "choose an annotated subset by --subset")
    return ground_truth

def load_predictions(path) -> dict:
    """The detections of an ActivityNet-format result file, plain or gzip, or InputError."""
    predictions = {}
    for video, entries in read_field(path, "results").items():
        predictions[video] = read_segments(f"{path}: results/{video}", entries, "score")
        predictions[video]["scores"] = np.array([entry["score"] for entry in entries], np.float64)
    return predictions

def doubts(ground_truth: dict, predictions: dict):
    """Yields sentences on possible mistakes: unknown labels or videos, and many equal scores."""
    classes = {label for entry in ground_truth.values() for label in entry["labels"]}
    rows = []                                                        # (label, score)
    for entry in predictions.values():
        rows += zip(entry["labels"], entry["scores"].tolist())
    unknown = Counter(label for label, _ in rows if label not in classes)
    if unknown:
        yield (f"{unknown.total()} detections have a label that the ground truth has not, and are "
               f"not scored: {first_ten(sorted(unknown))} (labels are compared exactly)")
    outside = sorted(set(predictions) - set(ground_truth))
    if outside:
        yield (f"{len(outside)} of {len(predictions)} videos with predictions are not in the "
               f"subset; detections there are wrong: {first_ten(outside)}")
    repeats = len(rows) - len(set(rows))
    if repeats > 0.01 * len(rows):
        yield (f"{repeats} of {len(rows)} detections repeat a score of their class; the order of "
               f"ties depends on the CPU and can move the mAP by some tenths of a percent (write "
               f"scores with more digits)")

def write_result(path, predictions: dict) -> None:
    """{"results": {video: [{"label", "score", "segment": [start, end] (seconds)}]}} as a file."""
    results = {}
    for video, found in predictions.items():
        rows = zip(found["labels"], found["scores"].tolist(), found["segments"].tolist())
        results[video] = [dict(label=label, score=score, segment=times)
                          for label, score, times in rows]
    content = {"version": "ActionVLM", "results": results, "external_data": {}}
    with written_whole(path) as beside:
        beside.write_text(json.dumps(content) + "\n")

def to_ground_truth(videos) -> dict:
    """list of Video -> the ground truth of these videos."""
    return {v.name: {"segments": v.segments, "labels": v.labels} for v in videos}

def format_table(result: dict, thresholds) -> str:
    """Markdown table of evaluate.mean_average_precision, in percent: mAP, then the classes."""
    rows = [("mAP", result["mAP"]), *zip(result["classes"], result["AP"].T)]
    width = max(5, *(len(name) for name, _ in rows))
    columns = [*(f"{threshold:g}" for threshold in thresholds), "average"]
    lines = [f"| {'tIoU':<{width}} | " + " | ".join(f"{column:>7}" for column in columns) + " |",
             f"|:{'-' * width}-|" + "--------:|" * len(columns)]
    for name, values in rows:
        cells = [f"{100 * value:7.2f}" for value in (*values, values.mean())]
        lines.append(f"| {name:<{width}} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

def write_figures(path, subset: str, tiou: list, result: dict) -> None:
    """Write all figures of a result as JSON, fractions with all digits, if a path is given."""
    content = {"subset": subset, "tiou": tiou, **result, "mAP": result["mAP"].tolist()}
    content["AP"] = dict(zip(content.pop("classes"), result["AP"].T.tolist()))
    if path:
        Path(path).write_text(json.dumps(content, indent=1) + "\n")

def by_class(entries: dict) -> dict:
    """Ground truth or predictions -> {label: {video: rows [start, end, score]}}; no score is 0."""
    rows = {}
    for video, entry in entries.items():
        segments = np.asarray(entry["segments"], np.float64).reshape(-1, 2)
        labels = entry["labels"]
        scores = np.asarray(entry.get("scores", np.zeros(len(labels))), dtype=np.float64)
        expect(len(segments) == len(scores) == len(labels), f"video {video}",
               f"as many segments and scores as labels ({len(labels)})",
               f"{len(segments)} segments and {len(scores)} scores")
        expect(not np.isnan(scores).any(), f"predictions of video {video}", "numbers as scores",
               "NaN", "did training diverge?")
        for label, (start, end), score in zip(labels, segments.tolist(), scores.tolist()):
            rows.setdefault(label, {}).setdefault(video, []).append((start, end, score))
    return rows

def count(entries: dict) -> int:
    """Number of segments."""
    return sum(len(entry["labels"]) for entry in entries.values())
