"""support/results.py - ground truth and predictions, dicts of one shape, and their files.
{video: {"segments": (N, 2) float64 seconds, "labels": [str], "scores": (N,) if predicted}}."""
import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np

from support import annotations
from support.annotations import expect, first_ten, read_json, read_segments
from support.checkpoint import written_whole

def load_ground_truth(path, subset: str, notes: list | None = None) -> dict:
    """The videos of one subset of an annotation file, as training reads them, or InputError."""
    videos = annotations.of_subset(annotations.load_annotations(path, notes=notes), subset, path)
    expect(any(video.labels for video in videos), path, f"segments in subset '{subset}'",
           f"none in {len(videos)} videos", "choose an annotated subset by --subset")
    return to_ground_truth(videos)

def load_predictions(path) -> dict:
    """The detections of an ActivityNet-format result file, plain or gzip, or InputError."""
    predictions = {}
    for video, entries in read_json(path, "results")["results"].items():
        predictions[video] = read_segments(f"{path}: results/{video}", entries, "score")
        predictions[video]["scores"] = np.array([float(entry["score"]) for entry in entries])
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
               f"ties depends on the CPU and moves the mAP: write scores with more digits")

def write_result(path, predictions: dict) -> None:
    """{"results": {video: [{"label", "score", "segment": [start, end] (seconds)}]}} as a file."""
    results = {}
    for video, found in predictions.items():
        rows = zip(found["labels"], found["scores"].tolist(), found["segments"].tolist())
        results[video] = [dict(zip(("label", "score", "segment"), row)) for row in rows]
    content = {"version": "ActionVLM", "results": results, "external_data": {}}
    with written_whole(path) as beside:
        beside.write_text(json.dumps(content) + "\n")

def write_csv(path, predictions: dict) -> None:
    """A table: video, start and end in seconds, label, score."""
    with written_whole(path) as beside, open(beside, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "start", "end", "label", "score"])
        for video, found in predictions.items():
            for (start, end), label, score in zip(*found.values()):
                writer.writerow([video, f"{start:.3f}", f"{end:.3f}", label, f"{score:.6f}"])

def to_ground_truth(videos) -> dict:
    """list of Video -> the ground truth of these videos."""
    return {v.name: {"segments": v.segments, "labels": v.labels} for v in videos}

def format_table(result: dict, thresholds) -> str:
    """Markdown table of evaluate.mean_average_precision, in percent: mAP, then the classes."""
    if not result["classes"]:
        return "nothing to score: the test videos have no segments"
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
    """Ground truth or predictions -> {label: {video: (N, 3) start, end, score}}; no score is 0."""
    found = {}
    for video, entry in entries.items():
        segments = np.asarray(entry["segments"], np.float64).reshape(-1, 2)
        scores = np.asarray(entry.get("scores", np.zeros(len(segments))), np.float64)
        expect(len(segments) == len(entry["labels"]) == len(scores), f"video {video}",
               f"as many labels and scores as segments ({len(segments)})", f"{len(scores)} scores")
        expect(not np.isnan(scores).any(), f"video {video}", "scores", "NaN", "train again")
        labels, index = np.unique(entry["labels"], return_inverse=True)
        for c, label in enumerate(labels.tolist()):
            found.setdefault(label, {})[video] = np.c_[segments, scores][index == c]
    return found

def count(entries: dict) -> int:
    """Number of segments."""
    return sum(len(entry["labels"]) for entry in entries.values())
