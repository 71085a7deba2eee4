"""support/results.py - result files in ActivityNet's format, and the ground truth for them.

Ground truth and predictions are dicts of one shape:
{video: {"segments": (N, 2) float64 seconds, "labels": [str], "scores": (N,) if predicted}}.
"""
import json
from collections import Counter
from pathlib import Path

import numpy as np

from support.annotations import InputError, read_field, read_segments, shorten
from support.checkpoint import written_whole

TIOU = [0.3, 0.4, 0.5, 0.6, 0.7]


def load_ground_truth(path, subset: str) -> dict:
    """The videos of one subset, named in any case, of an ActivityNet-format file, plain or gzip.

    Returns {video: {"segments": (N, 2) float64 seconds, "labels": [str]}}; videos without
    segments are kept. Raises InputError for a file that cannot be read or has another format,
    and for a subset without segments.
    """
    database = read_field(path, "database")
    ground_truth = {}
    found = Counter()
    for video, entry in database.items():
        if not (isinstance(entry, dict) and isinstance(entry.get("subset"), str)):
            raise InputError(f"{path}: database/{video}: expected an object with a text field "
                             f"'subset', found {shorten(entry)}. Add the subset of this video.")
        found[entry["subset"]] += 1
        if entry["subset"].lower() == subset.lower():
            where = f"{path}: database/{video}/annotations"
            ground_truth[video] = read_segments(where, entry.get("annotations"), scored=False)
    if not ground_truth:
        names = ", ".join(f"{name} ({count} videos)" for name, count in found.items())
        raise InputError(f"{path}: no video has the subset '{subset}'; found "
                         f"{names or 'no videos at all'}. Give one of these by --subset.")
    if not any(entry["labels"] for entry in ground_truth.values()):
        raise InputError(f"{path}: expected segments in the subset '{subset}', found "
                         f"{len(ground_truth)} videos without a single one. Choose an annotated "
                         f"subset by --subset.")
    return ground_truth


def load_predictions(path) -> dict:
    """The detections of an ActivityNet-format result file, plain or gzip.

    Returns {video: {"segments": (M, 2) float64 seconds, "labels": [str], "scores": (M,)
    float64}}. Raises InputError for a file that cannot be read or has another format.
    """
    predictions = {}
    for video, entries in read_field(path, "results").items():
        predictions[video] = read_segments(f"{path}: results/{video}", entries, scored=True)
    return predictions


def doubts(ground_truth: dict, predictions: dict):
    """Yields sentences on possible mistakes in predictions.

    Possible mistakes are unknown labels, videos outside the subset, and many equal scores.
    """
    classes = {label for entry in ground_truth.values() for label in entry["labels"]}
    count = Counter(label for entry in predictions.values() for label in entry["labels"])
    unknown = sorted(set(count) - classes)
    if unknown:
        detections = sum(count[label] for label in unknown)
        yield (f"{detections} detections have a label that the ground truth has not, and are not "
               f"scored: {shorten(', '.join(unknown))} (labels are compared exactly)")
    outside = sorted(set(predictions) - set(ground_truth))
    if outside:
        yield (f"{len(outside)} of {len(predictions)} videos with predictions are not in the "
               f"subset; detections there are wrong: {shorten(', '.join(outside))}")
    distinct = set()
    for entry in predictions.values():
        distinct.update(zip(entry["labels"], entry["scores"].tolist()))
    total = sum(count.values())
    repeats = total - len(distinct)
    if repeats > 0.01 * total:
        yield (f"{repeats} of {total} detections repeat a score of their class; the order of ties "
               f"depends on the CPU and can move the mAP by some tenths of a percent (write scores "
               f"with more digits)")


def write_result(path, predictions: dict) -> None:
    """Write predictions as an ActivityNet result file.

    The file is {"results": {video: [{"label", "score", "segment": [start, end] (seconds)}]}}.
    """
    results = {}
    for video, found in predictions.items():
        rows = []
        for label, score, segment in zip(found["labels"], found["scores"], found["segments"]):
            start, end = segment
            rows.append({"label": label, "score": float(score),
                         "segment": [float(start), float(end)]})
        results[video] = rows
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
    if not path:
        return
    content = {"subset": subset, "tiou": tiou}
    for name, value in result.items():
        content[name] = value.tolist() if name == "mAP" else value
    content["AP"] = dict(zip(content.pop("classes"), result["AP"].T.tolist()))
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def by_class(entries):
    """Ground truth or predictions -> {label: {video: rows [start, end, score]}}; no score is 0."""
    rows = {}
    for video, entry in entries.items():
        segments = np.asarray(entry["segments"], dtype=np.float64).reshape(-1, 2)
        labels = list(entry["labels"])
        scores = np.asarray(entry.get("scores", np.zeros(len(labels))), dtype=np.float64)
        if not len(segments) == len(labels) == len(scores):
            raise InputError(f"video {video}: expected as many segments and scores as labels, "
                             f"found {len(segments)} segments, {len(scores)} scores, "
                             f"{len(labels)} labels.")
        if np.isnan(scores).any():
            raise InputError(f"predictions of video {video}: expected numbers as scores, found "
                             f"NaN. Did training diverge?")
        for label, (start, end), score in zip(labels, segments.tolist(), scores.tolist()):
            rows.setdefault(label, {}).setdefault(video, []).append((start, end, score))
    return rows


def count(entries: dict) -> int:
    """Number of segments in ground truth or predictions."""
    return sum(len(entry["labels"]) for entry in entries.values())
