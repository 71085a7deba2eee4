"""experiments/bias.py - how much a model depends on language (§4.3, Tables 3 and 5).

    python -m experiments.bias --checkpoint out                             # LAP and mLA
    python -m experiments.bias --checkpoint out --groups vision-only.json   # Table 3, mLA
    python -m experiments.bias --checkpoint out --incomplete                # Table 5
"""
import argparse
import json
import math
import sys
from copy import copy
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
THUMOS14_LEVELS = {                                     # A.8; all other classes are medium
    "ThrowDiscus": "easy", "LongJump": "easy", "HighJump": "easy", "HammerThrow": "easy",
    "Billiards": "hard", "FrisbeeCatch": "hard"}


def main(argv=None) -> int:
    """Returns the exit code: 0, or 2 for a mistake in the flags or files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    return run_command("bias.py", score_bias if args.incomplete is None else score_incomplete, args)


def score_bias(args) -> None:
    """Print the test table, mLA, and LAP; with --groups Table 3 instead of LAP."""
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
        names = {"all": result["classes"], **{name: [name] for name in result["classes"]}}
        result["mLA"] = {}
        for name, labels in names.items():
            result["mLA"][name] = mean_language_advantage(found.advantage, test, labels)
        print("mLA: " + ", ".join(f"{name} {mLA:.4f}" for name, mLA in result["mLA"].items()))
    if args.groups:
        groups = group_by_difficulty(result["classes"], reference, args)
        result["groups"] = score_groups(groups, result, reference, found.advantage, test)
    else:
        model.language.set_descriptions(unmatched_descriptions(model.config.descriptions))
        unmatched = detect(model, test, train_args).predictions
        result["LAP"] = report_lap(result["average"], unmatched, test, tiou)
    write_figures(args.json, train_args.test_subset, tiou, result)


def unmatched_descriptions(descriptions: dict) -> dict:
    """Give every label the description of another one, always the same: half the list away."""
    labels, texts = list(descriptions), list(descriptions.values())
    shift = len(labels) // 2
    return dict(zip(labels, texts[shift:] + texts[:shift]))


def report_lap(matched: float, unmatched: dict, test, tiou: list) -> float:
    """Print and return LAP (§4.3): relative drop of the average mAP with unmatched descriptions.

    matched: average mAP. unmatched: predictions. A small LAP says that vision is in charge. LAP
    is 0 where the matched mAP is 0.
    """
    average = mean_average_precision(to_ground_truth(test.videos), unmatched, tiou)["average"]
    lap = (matched - average) / matched if matched else 0.0
    print(f"\naverage mAP {100 * matched:.2f} %, with unmatched descriptions "
          f"{100 * average:.2f} %: LAP {100 * lap:.2f} %")
    return lap


def mean_language_advantage(advantage: dict, dataset, labels: list) -> float:
    """mLA (Table 3): mean predicted language advantage of the steps of some classes.

    advantage: {video: (T,)} from `detect` on `dataset`. The class of a step is that of the
    shortest action that contains it, as in Eq. 1. Returns NaN if no step has such a class.
    """
    chosen, values = [dataset.classes[name] for name in labels], []
    for video in dataset.videos:
        series = advantage[video.name]                                              # (T,)
        grid = seconds_to_grid(video.segments, video.fps, dataset.stride, dataset.num_frames)
        segments = torch.tensor(grid).reshape(-1, 2)
        index = torch.tensor([dataset.classes[name] for name in video.labels], dtype=torch.long)
        step_class = frame_classes([segments], [index], len(series), len(dataset.classes))[0]
        values.extend(series[np.isin(step_class.numpy(), chosen)])
    return float(np.mean(values, dtype=np.float64)) if values else math.nan


def read_reference(words: list) -> dict | None:
    """Words of --groups -> {class: mean AP of a vision-only run}, None if no word is a file."""
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
    """{"easy", "medium", "hard": [class]}: by the reference's AP, or as in A.8."""
    unknown = [] if reference is None else sorted(set(classes) - set(reference))
    if unknown:
        raise InputError(f"--groups: expected an AP for every class, found none for "
                         f"{', '.join(unknown[:5])}; score the reference on the same test set")
    groups = {level: [] for level in LEVELS}
    for name in classes:
        level = THUMOS14_LEVELS.get(name, "medium")
        if "thumos14" not in args.groups:
            level = LEVELS[(reference[name] < args.easy) + (reference[name] < args.hard)]
        groups[level].append(name)
    return groups


def score_groups(groups: dict, result: dict, reference, advantage: dict, dataset) -> dict:
    """Print Table 3 -> {level: {"classes", "mAP", "gain" over the reference, "mLA"}}, fractions.

    A value is None where a group is empty, or where reference or language are missing.
    """
    AP = dict(zip(result["classes"], result["AP"].mean(0)))
    rows = {}
    print("\n| actions | mAP | gain | mLA | which |\n|:--|--:|--:|--:|:--|")
    for level, names in groups.items():
        row = rows[level] = {"classes": names, "mAP": None, "gain": None, "mLA": None}
        mAP = gain = mLA = "-"
        if names:
            row["mAP"] = float(np.mean([AP[name] for name in names]))
            mAP = f"{100 * row['mAP']:.2f}"
        if names and reference is not None:
            row["gain"] = row["mAP"] - float(np.mean([reference[name] for name in names]))
            gain = f"{100 * row['gain']:+.2f}"
        if names and advantage:
            row["mLA"] = mean_language_advantage(advantage, dataset, names)
            mLA = f"{row['mLA']:.4f}"
        print(f"| {level} | {mAP} | {gain} | {mLA} | {', '.join(names)} |")
    return rows


def score_incomplete(args) -> None:
    """Print the row of Table 5."""
    model, train_args, _ = open_checkpoint(args)
    clip_args = copy(train_args)
    clip_args.train_subset = clip_args.test_subset = "incomplete"
    if args.incomplete:
        clip_args.dataset, clip_args.annotations = "custom", args.incomplete
    elif train_args.dataset == "demo":
        clip_args.annotations = str(Path(train_args.annotations).with_name("incomplete.json"))
    else:
        raise InputError(f"--incomplete: expected an annotation file with it, because "
                         f"{args.checkpoint} was not trained on the demo")
    test = load_data(clip_args, model.config.feature_dim)[1]
    metrics = ambiguity_metrics(detect(model, test, train_args).predictions, test.videos)
    clips = sum(len(video.labels) for video in test.videos)
    print(f"{clips} incomplete actions in {len(test.videos)} videos, in percent\n")
    print("| " + " | ".join(metrics) + " |\n" + "|--:" * len(metrics) + "|")
    print("| " + " | ".join(f"{100 * value:.2f}" for value in metrics.values()) + " |")
    if args.json:
        Path(args.json).write_text(json.dumps(metrics, indent=1) + "\n")


def ambiguity_metrics(predictions: dict, videos: list) -> dict:
    """Table 5 (A.1): how cautious a model is on actions that are begun and not completed.

    predictions: from `detect`. videos: list of Video, whose segments are the begun actions.
    "Each full video is processed by the model, while evaluation is restricted to these ambiguous
    segments. As multiple temporal proposals are generated per video, we retain only the
    highest-confidence one": the best detection of the begun action that overlaps the segment.
      "mConf": "the mean predicted confidence", its score
      "mLen": "the mean normalized span length", its part inside / the length of the segment
      "acc@0.3", "acc@0.5", "acc@0.7": "the proportion of predictions with span lengths below
      the threshold"
    All are in [0, 1]. A segment without a detection counts as 0, 0.
    """
    best = []
    for video in videos:
        for label, (start, end) in zip(video.labels, video.segments):
            confidence = length = 0
            for (left, right), name, sure in zip(*predictions[video.name].values()):
                inside = min(right, end) - max(left, start)
                if name == label and inside > 0 and sure > confidence:
                    confidence, length = sure, inside / (end - start)
            best.append((confidence, length))
    confidence, length = np.array(best, dtype=np.float64).T
    metrics = {"mConf": float(confidence.mean()), "mLen": float(length.mean())}
    for threshold in (0.3, 0.5, 0.7):
        metrics[f"acc@{threshold}"] = float(np.mean(length < threshold))
    return metrics


if __name__ == "__main__":
    sys.exit(main())
