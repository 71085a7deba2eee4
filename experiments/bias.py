"""experiments/bias.py - how much a model depends on language (§4.3, Tables 3 and 5).

    python -m experiments.bias --checkpoint out                      # LAP, mLA, benefit of language
    python -m experiments.bias --checkpoint out --groups vision-only.json   # Table 3, mLA
    python -m experiments.bias --checkpoint out --incomplete                # Table 5"""
import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch

from advantage import frame_classes, language_advantage
from data import batch_loader, load_data, seconds_to_grid
from evaluate import detect, mean_average_precision, open_checkpoint, score
from experiments.ablations import rotated
from head import detection_loss
from support.annotations import expect, first_ten, is_number, read_field
from support.commands import checkpoint_flags, run_command
from support.flags import real
from support.results import count, to_ground_truth, write_figures

LEVELS = ("easy", "medium", "hard")
THUMOS14 = dict(ThrowDiscus="easy", LongJump="easy", HighJump="easy", HammerThrow="easy",
                Billiards="hard", FrisbeeCatch="hard")         # A.8; other classes are medium

def main(argv=None) -> int:
    """Returns the exit code: 0, or 2 for a mistake in the flags or files."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    flag = parser.add_argument
    checkpoint_flags(flag, required=True)
    flag("--easy", type=real(0, 1), default=0.85, help="lowest AP of an easy action (%(default)s)")
    flag("--hard", type=real(0, 1), default=0.5, help="AP below it: a hard action (%(default)s)")
    flag = parser.add_mutually_exclusive_group().add_argument
    flag("--groups", nargs="+", default=[], metavar="FILE",
         help="Table 3: groups by the AP in FILE, which evaluate.py --json wrote for a vision-only "
              "run; 'thumos14' or 'thumos14 FILE': the groups of A.8")
    flag("--incomplete", nargs="?", const="", metavar="FILE",
         help="Table 5: begun actions, the subset 'incomplete' of FILE (default: of the demo)")
    args = parser.parse_args(argv)
    if args.hard > args.easy:
        parser.error(f"--hard {args.hard}: expected at most --easy, found {args.easy}")
    return run_command("bias.py", score_bias if args.incomplete is None else score_incomplete, args)

def score_bias(args) -> None:
    """Print the test table, mLA, and LAP; with --groups Table 3 instead of LAP."""
    model, train_args, out = open_checkpoint(args)
    expect(model.language is not None or args.groups, f"--checkpoint {args.checkpoint}",
           "a model with language", "one trained with --lambda-lang 0",
           "give --groups, or another model")
    test = load_data(train_args, model.config.feature_dim)[1]
    reference = read_reference(args.groups)
    tiou = args.tiou or train_args.tiou
    found = detect(model, test, train_args)
    result = score(out / "result.json", test, found.predictions, tiou)
    if model.language is not None:
        names = ["all", *result["classes"]]
        result["mLA"] = {n: mean_language_advantage(found.advantage, test, [n]) for n in names}
        result["benefit"] = language_benefit(model, test, train_args)
        for title, key in (("mLA", "mLA"), ("true benefit of language", "benefit")):
            figures = [f"{name} {value:.4f}" for name, value in result[key].items()]
            print(f"{title}: {', '.join(figures)}")
    if args.groups:
        result["groups"] = score_groups(result, reference, args, found.advantage, test)
    else:
        add_lap(result, model, lambda: detect(model, test, train_args), test, tiou)
    write_figures(args.json, train_args.test_subset, tiou, result)

def add_lap(result: dict, model, predict, test, tiou: list) -> None:
    """LAP (§4.3): the relative drop of the average mAP with unmatched descriptions. Each label
    gets the one of the label half the list away. predict() -> (predictions, ...)."""
    descriptions = model.config.descriptions
    model.language.set_descriptions(rotated(descriptions, len(descriptions) // 2))
    after = mean_average_precision(to_ground_truth(test.videos), predict()[0], tiou)["average"]
    before = result["average"]
    result["LAP"] = (before - after) / before if before else 0.0
    print(f"with unmatched descriptions: mAP {100 * after:.2f} %, LAP {100 * result['LAP']:.2f} %")

@torch.no_grad()
def language_benefit(model, dataset, args) -> dict:
    """Mean true benefit of frames: the head's loss on F_vis alone minus that with language.
    Correlations are Pearson's over action frames, of advantage, benefit and target (Eq. 1)."""
    model.eval()
    rows, actions = [], []
    class_mean = model.class_means.mean()
    for batch in batch_loader(dataset, model.multiple, args.workers, batch_size=args.batch_size):
        batch = batch.to(class_mean.device)
        output = model(batch)
        loss = detection_loss(output, batch, model.head).per_frame
        alone = detection_loss(model(batch, use_language=False), batch, model.head).per_frame
        target = language_advantage(class_mean, loss, batch.frame_class)
        rows.append(torch.stack([output.advantage, alone - loss, target])[:, batch.mask])
        actions.append((batch.frame_class < len(model.config.classes))[batch.mask])
    rows, action = torch.cat(rows, 1).double(), torch.cat(actions)             # (3, n), (n,)
    correlation = torch.corrcoef(rows[:, action]).tolist()
    return {"action": rows[1, action].mean().item(), "background": rows[1, ~action].mean().item(),
            "correlation": correlation[0][1], "with target": correlation[0][2],
            "target with benefit": correlation[1][2]}

def mean_language_advantage(advantage: dict, dataset, names: list) -> float:
    """mLA (Table 3): mean predicted advantage {video: (T,)} of the steps of some classes, or of
    ["all"]; NaN if there are none. The class of a step is that of the shortest action there."""
    chosen = [i for name, i in dataset.classes.items() if name in names or names == ["all"]]
    values = []
    for video in dataset.videos:
        series = advantage[video.name]                                              # (T,)
        grid = seconds_to_grid(video.segments, video.fps, dataset.stride, dataset.num_frames)
        index = torch.tensor([dataset.classes[name] for name in video.labels]).long()
        classes = frame_classes([torch.tensor(grid)], [index], len(series), len(dataset.classes))
        values.extend(series[np.isin(classes[0], chosen)])
    return float(np.mean(values, dtype=np.float64)) if values else np.nan

def read_reference(words: list) -> dict:
    """Words of --groups -> {class: mean AP of a vision-only run}, {} if no word is a file."""
    files = [word for word in words if word != "thumos14"]
    expect(len(files) < 2, "--groups", "thumos14, FILE or both", " ".join(words), "leave one out")
    AP = read_field(files[0], "AP") if files else {}
    for name, row in AP.items():
        good = isinstance(row, list) and row and all(map(is_number, row))
        expect(good, f"--groups {files[0]}: AP of '{name}'", "a list of numbers", row,
               "write the file by evaluate.py --checkpoint DIR --json FILE")
    return {name: float(np.mean(row)) for name, row in AP.items()}

def score_groups(result: dict, reference: dict, args, advantage: dict, dataset) -> dict:
    """Print Table 3 -> {level: {"classes", "mAP", "gain", "mLA"}}, None where one is missing."""
    unknown = sorted(set(result["classes"]) - set(reference))
    expect(not unknown or args.groups == ["thumos14"], "--groups", "an AP for every class",
           f"none for {first_ten(unknown)}", "score the reference on the same test set")
    AP = dict(zip(result["classes"], result["AP"].mean(0)))
    rows = {level: dict(classes=[], mAP=None, gain=None, mLA=None) for level in LEVELS}
    for name in AP:
        level = THUMOS14.get(name, "medium")
        if "thumos14" not in args.groups:
            level = LEVELS[(reference[name] < args.easy) + (reference[name] < args.hard)]
        rows[level]["classes"].append(name)
    print("\n| actions | mAP | gain | mLA | which |\n|:--|--:|--:|--:|:--|")
    for level, row in rows.items():
        names, mAP, gain, mLA = row["classes"], "-", "-", "-"
        if names:
            row["mAP"] = float(np.mean([AP[name] for name in names]))
            mAP = f"{100 * row['mAP']:.2f}"
        if names and reference:
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
    expect(args.incomplete or train_args.dataset == "demo", "--incomplete", "an annotation file",
           f"none: {args.checkpoint} is not of the demo", "give FILE")
    clips = Namespace(**vars(train_args))
    clips.train_subset = clips.test_subset = "incomplete"
    clips.dataset = "custom" if args.incomplete else "demo"
    clips.annotations = args.incomplete or f"{Path(clips.annotations).parent}/incomplete.json"
    test = load_data(clips, model.config.feature_dim)[1]
    actions = to_ground_truth(test.videos)
    metrics = ambiguity_metrics(detect(model, test, train_args).predictions, actions)
    print(f"{count(actions)} incomplete actions in {len(actions)} videos, in percent: "
          + ", ".join(f"{name} {100 * value:.2f}" for name, value in metrics.items()))
    if args.json:
        Path(args.json).write_text(json.dumps(metrics, indent=1) + "\n")

def ambiguity_metrics(predictions: dict, actions: dict) -> dict:
    """Table 5 (A.1): how cautious a model is on actions that are begun and not completed.
    Of the detections of an action that overlap it, the one with the highest score counts, else 0.
    "mConf": "the mean predicted confidence", its score
    "mLen": "the mean normalized span length", its part inside the action / the action's length
    "acc@0.3", ...: "the proportion of predictions with span lengths below the threshold" """
    best = []
    for video, begun in actions.items():
        for (start, end), label in zip(*begun.values()):
            confidence = length = 0
            for (left, right), name, sure in zip(*predictions[video].values()):
                inside = min(right, end) - max(left, start)
                if name == label and inside > 0 and sure > confidence:
                    confidence, length = sure, inside / (end - start)
            best.append((confidence, length))
    confidence, length = np.array(best, dtype=np.float64).T
    below = {f"acc@{limit}": np.mean(length < limit) for limit in (0.3, 0.5, 0.7)}
    return {"mConf": confidence.mean(), "mLen": length.mean(), **below}

if __name__ == "__main__":
    sys.exit(main())
