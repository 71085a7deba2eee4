"""experiments/bias.py - how much a model depends on language (§4.3, Tables 3 and 5).

    python -m experiments.bias --checkpoint out
    python -m experiments.bias --checkpoint out --groups vision-only.json
    python -m experiments.bias --checkpoint out --incomplete

The first command prints the test table, LAP, and the mLA of each class. --groups adds Table 3.
--incomplete prints Table 5 instead.
"""
import argparse
import copy
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from advantage import frame_classes
from data import load_data, seconds_to_grid
from evaluate import detect, mean_average_precision, open_checkpoint, score
from support.annotations import InputError, is_number, read_field
from support.commands import checkpoint_flags, run_command
from support.flags import real
from support.results import to_ground_truth, write_figures

LEVELS = ("easy", "medium", "hard")
THUMOS14_LEVELS = {                              # A.8; all other classes are medium
    "ThrowDiscus": "easy", "LongJump": "easy", "HighJump": "easy", "HammerThrow": "easy",
    "Billiards": "hard", "FrisbeeCatch": "hard",
}


def main(argv=None) -> int:
    """Returns the exit code: 0, or 2 for a mistake in the flags or files."""
    args = get_args(argv)
    return run_command("bias.py", score_bias if args.incomplete is None else score_incomplete, args)


def score_bias(args) -> None:
    """Print the test table, LAP and mLA; with --groups also Table 3."""
    model, train_args, out = open_checkpoint(args)
    if model.language is None and not args.groups:
        raise InputError(f"--checkpoint {args.checkpoint}: expected a model with language, found "
                         f"one trained with --lambda-lang 0; give --groups, or another model")
    test = load_data(train_args, model.config.feature_dim)[1]
    reference = read_reference(args.groups)
    tiou = args.tiou or train_args.tiou
    found = detect(model, test, train_args)
    result = score(out / "result.json", test, found.predictions, tiou)
    if model.language is not None:
        model.language.set_descriptions(unmatched_descriptions(model.config.descriptions))
        unmatched = detect(model, test, train_args).predictions
        result["LAP"] = report_lap(result["average"], unmatched, test, tiou)
        names = ["all", *result["classes"]]
        result["mLA"] = {n: mean_language_advantage(found.advantage, test, [n]) for n in names}
        print("mLA: " + ", ".join(f"{name} {mLA:.4f}" for name, mLA in result["mLA"].items()))
    if args.groups:
        groups = group_by_difficulty(result["classes"], reference, args)
        result["groups"] = score_groups(groups, result, reference, found.advantage, test)
        print("\n" + format_groups(result["groups"]))
    write_figures(args.json, train_args.test_subset, tiou, result)


def score_incomplete(args) -> None:
    """Print the row of Table 5."""
    model, train_args, _ = open_checkpoint(args)
    clip_args = copy.copy(train_args)
    clip_args.train_subset = clip_args.test_subset = "incomplete"
    if args.incomplete:
        clip_args.dataset, clip_args.annotations = "custom", args.incomplete
    elif train_args.dataset == "demo":
        clip_args.annotations = str(Path(train_args.annotations).with_name("incomplete.json"))
    else:
        raise InputError(f"--incomplete: expected an annotation file with it, because "
                         f"{args.checkpoint} was not trained on the demo")
    test = load_data(clip_args, model.config.feature_dim)[1]
    clips = []
    for video in test.videos:
        for label, (start, end) in zip(video.labels, video.segments):
            clips.append((video.name, label, start, end))
    metrics = ambiguity_metrics(detect(model, test, train_args).predictions, clips)
    print(f"{len(clips)} incomplete actions in {len(test.videos)} videos, in percent\n")
    print("| " + " | ".join(metrics) + " |\n" + "|--:" * len(metrics) + "|")
    print("| " + " | ".join(f"{100 * value:.2f}" for value in metrics.values()) + " |")
    if args.json:
        Path(args.json).write_text(json.dumps(metrics, indent=1) + "\n")


def report_lap(matched: float, unmatched: dict, test, tiou: list) -> float:
    """Print and return LAP. matched: average mAP. unmatched: predictions."""
    average = mean_average_precision(to_ground_truth(test.videos), unmatched, tiou)["average"]
    lap = language_advantage_on_performance(matched, average)
    print(f"\naverage mAP {100 * matched:.2f} %, with unmatched descriptions "
          f"{100 * average:.2f} %: LAP {100 * lap:.2f} %")
    return lap


def unmatched_descriptions(descriptions: dict) -> dict:
    """Give every label the description of another one, always the same: half the list away."""
    labels, texts = list(descriptions), list(descriptions.values())
    shift = len(labels) // 2
    return dict(zip(labels, texts[shift:] + texts[:shift]))


def language_advantage_on_performance(matched: float, unmatched: float) -> float:
    """LAP (§4.3): the relative drop of the average mAP with unmatched descriptions.

    A small LAP says that vision is in charge. LAP is 0 where the matched mAP is 0.
    """
    return (matched - unmatched) / matched if matched else 0.0


def mean_language_advantage(advantage: dict, dataset, labels: list) -> float:
    """mLA (Table 3): mean predicted language advantage of the steps of some classes.

    advantage: {video: (T,)} from `detect`. dataset: the TALDataset that `detect` ran on.
    labels: class names, or ["all"]. The class of a step is that of the shortest action that
    contains it, as in Eq. 1. Returns NaN if no step has such a class.
    """
    chosen = [i for name, i in dataset.classes.items() if name in labels or labels == ["all"]]
    values = []
    for video in dataset.videos:
        series = advantage[video.name]                                              # (T,)
        grid = seconds_to_grid(video.segments, video.fps, dataset.stride, dataset.num_frames)
        segments = torch.tensor(grid).reshape(-1, 2)
        index = torch.tensor([dataset.classes[name] for name in video.labels], dtype=torch.long)
        step_class = frame_classes([segments], [index], len(series), len(dataset.classes))[0]
        values.extend(series[np.isin(step_class.numpy(), chosen)])
    return float(np.mean(values, dtype=np.float64)) if values else math.nan


def read_reference(words: list) -> dict | None:
    """The words after --groups -> {class: AP of a vision-only run, mean over tIoU}.

    Returns None if no word names a file. Raises InputError for other words and other files.
    """
    files = [word for word in words if word != "thumos14"]
    if len(files) > 1 or len(words) > 2:
        raise InputError(f"--groups: expected FILE, thumos14, or thumos14 FILE, "
                         f"found {' '.join(words)}")
    if not files:
        return None
    AP = read_field(files[0], "AP")
    for row in AP.values():
        if not (isinstance(row, list) and row and all(map(is_number, row))):
            raise InputError(f"--groups {files[0]}: expected a list of numbers for every class in "
                             f"AP; write the file by evaluate.py --checkpoint DIR --json FILE")
    return {name: float(np.mean(row)) for name, row in AP.items()}


def group_by_difficulty(classes: list, reference: dict | None, args) -> dict:
    """{"easy": [class], "medium": [class], "hard": [class]}: by the AP of the reference against
    args.easy and args.hard, or as in A.8 if args.groups holds "thumos14"."""
    unknown = sorted(set(classes) - set(reference)) if reference is not None else []
    if unknown:
        raise InputError(f"--groups: expected an AP for every class, found none for "
                         f"{', '.join(unknown[:5])}; score the reference on the same test set")
    groups = {level: [] for level in LEVELS}
    for name in classes:
        level = "medium"
        if "thumos14" in args.groups:
            level = THUMOS14_LEVELS.get(name, "medium")
        elif reference[name] >= args.easy:
            level = "easy"
        elif reference[name] < args.hard:
            level = "hard"
        groups[level].append(name)
    return groups


def score_groups(groups: dict, result: dict, reference, advantage: dict, dataset) -> dict:
    """Table 3: {level: {"classes", "mAP", "gain" over the reference, "mLA"}}, as fractions.

    result: from `mean_average_precision`. advantage: from `detect`, {} without language.
    A value is None where a group is empty, or where reference or language are missing.
    """
    AP = dict(zip(result["classes"], result["AP"].mean(0)))
    rows = {}
    for level, names in groups.items():
        row = rows[level] = {"classes": names, "mAP": None, "gain": None, "mLA": None}
        if names:
            row["mAP"] = float(np.mean([AP[name] for name in names]))
        if names and reference is not None:
            row["gain"] = row["mAP"] - float(np.mean([reference[name] for name in names]))
        if names and advantage:
            row["mLA"] = mean_language_advantage(advantage, dataset, names)
    return rows


def format_groups(rows: dict) -> str:
    """Markdown table of the result of `score_groups`: mAP and gain in percent, mLA as it is."""
    lines = ["| actions | mAP | gain | mLA | which |", "|:--|--:|--:|--:|:--|"]
    for level, row in rows.items():
        mAP = "-" if row["mAP"] is None else f"{100 * row['mAP']:.2f}"
        gain = "-" if row["gain"] is None else f"{100 * row['gain']:+.2f}"
        mLA = "-" if row["mLA"] is None else f"{row['mLA']:.4f}"
        lines.append(f"| {level} | {mAP} | {gain} | {mLA} | {', '.join(row['classes'])} |")
    return "\n".join(lines)


def ambiguity_metrics(predictions: dict, clips: list) -> dict:
    """Table 5 (A.1): how cautious a model is on actions that are begun and not completed.

    predictions: {video: {"segments": (M, 2) seconds, "labels": [str], "scores": (M,)}} of the
    full videos. clips: [(video, label of the begun action, start, end)], in seconds.

    "Each full video is processed by the model, while evaluation is restricted to these ambiguous
    segments. As multiple temporal proposals are generated per video, we retain only the
    highest-confidence one": the best detection of the begun action that overlaps the clip.
      "mConf": "the mean predicted confidence", its score
      "mLen": "the mean normalized span length", its part inside the clip / the clip's length
      "acc@0.3", "acc@0.5", "acc@0.7": "the proportion of predictions with span lengths below
      the threshold"
    All are in [0, 1]. A clip without a detection counts as 0, 0. Without clips all are NaN.
    """
    best = []
    for video, label, start, end in clips:
        found = predictions.get(video, {"segments": [], "labels": [], "scores": []})
        candidates = []
        for (left, right), name, sure in zip(found["segments"], found["labels"], found["scores"]):
            inside = min(right, end) - max(left, start)
            if name == label and inside > 0:
                candidates.append((sure, inside / (end - start)))
        best.append(max(candidates, key=lambda pair: pair[0], default=(0, 0)))
    confidence, length = np.array(best or [(math.nan, math.nan)], dtype=np.float64).T
    metrics = {"mConf": float(confidence.mean()), "mLen": float(length.mean())}
    for threshold in (0.3, 0.5, 0.7):
        metrics[f"acc@{threshold}"] = float(np.mean(length < threshold)) if clips else math.nan
    return metrics


def get_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag = parser.add_argument
    checkpoint_flags(flag)
    flag("--groups", nargs="+", default=[], metavar="FILE",
         help="Table 3: easy, medium and hard actions by the AP in FILE, which evaluate.py --json "
              "wrote for a vision-only run; 'thumos14' or 'thumos14 FILE': the groups of A.8")
    flag("--easy", type=real(0, 1), default=0.85, help="lowest AP of an easy action (%(default)s)")
    flag("--hard", type=real(0, 1), default=0.5, help="AP below it: a hard action (%(default)s)")
    flag("--incomplete", nargs="?", const="", metavar="FILE",
         help="Table 5: actions begun and not completed, those of the subset 'incomplete' of this "
              "annotation file (default: of the demo)")
    args = parser.parse_args(argv)
    if not args.checkpoint:
        parser.error("expected --checkpoint DIR")
    if args.incomplete is not None and args.groups:
        parser.error("--incomplete scores clips of its own: leave out --groups")
    if args.hard > args.easy:
        parser.error(f"--hard {args.hard}: expected at most --easy, found {args.easy}")
    return args


if __name__ == "__main__":
    sys.exit(main())
