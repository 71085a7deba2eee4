"""experiments/bias.py - how much a model depends on language (§4.3, Tables 3 and 5).

    python -m experiments.bias --checkpoint out                      # LAP, mLA, benefit of language
    python -m experiments.bias --checkpoint out --groups vision-only.json   # Table 3, mLA
    python -m experiments.bias --checkpoint out --incomplete                # Table 5"""
import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch

from advantage import language_advantage
from data import batch_loader, load_test_data
from evaluate import detect, mean_average_precision, open_checkpoint, score
from experiments.ablations import rotated
from head import detection_loss
from support.annotations import expect, first_ten, is_number, read_json
from support.commands import checkpoint_flags, run_command
from support.flags import real
from support.results import count, to_ground_truth, write_figures

LEVELS = ("easy", "medium", "hard")
CELLS = {"mAP": "{:.2%}", "gain": "{:+.2%}", "mLA": "{:.4f}"}
THUMOS14 = dict(ThrowDiscus="easy", LongJump="easy", HighJump="easy", HammerThrow="easy",
                Billiards="hard", FrisbeeCatch="hard")         # A.8; other classes are medium

def main(argv=None):
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

def open_run(args, language: bool = True) -> tuple:
    """(model, flags of its training with our --tiou, output folder, test set), or InputError."""
    model, train_args, out = open_checkpoint(args)
    expect(model.language is not None or not language, f"--checkpoint {args.checkpoint}",
           "a model with language", "one trained with --lambda-lang 0",
           "give another model; only --groups and --incomplete of experiments.bias need none")
    train_args.tiou = args.tiou or train_args.tiou
    return model, train_args, out, load_test_data(train_args, model.config)

def score_bias(args) -> None:
    """Print the test table, mLA, and LAP; with --groups Table 3 instead of LAP."""
    reference = read_reference(args.groups)
    model, train_args, out, test = open_run(args, language=not args.groups)
    predictions, frames = detect(model, test, train_args).predictions, None
    result = score(out / "result.json", test, predictions, train_args.tiou)
    if model.language is not None:
        result["benefit"], *frames = language_benefit(model, test, train_args)
        groups = {"all": test.classes} | {name: [name] for name in result["classes"]}
        result["mLA"] = {name: mLA(*frames, test, group) for name, group in groups.items()}
        for title, key in (("mLA", "mLA"), ("true benefit of language", "benefit")):
            figures = [f"{name} {value:.4f}" for name, value in result[key].items()]
            print(f"{title}: {', '.join(figures)}")
    if args.groups:
        result["groups"] = score_groups(result, reference, args, frames, test)
    else:
        add_lap(result, model, lambda: detect(model, test, train_args), test, train_args.tiou)
    write_figures(args.json, train_args.test_subset, train_args.tiou, result)

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
def language_benefit(model, dataset, args) -> tuple:
    """Mean true benefit of frames: the head's loss on F_vis alone minus that with language.
    Correlations are Pearson's over action frames, of advantage, benefit and target (Eq. 1).
    Beside these figures, returns predicted advantage and class of all n real frames: (n,), (n,)."""
    model.eval()
    rows, classes = [], []
    class_mean = model.class_means.mean()
    for batch in batch_loader(dataset, model.multiple, args.workers, batch_size=args.batch_size):
        batch = batch.to(class_mean.device)
        output = model(batch)
        loss = detection_loss(output, batch, model.head).per_frame
        alone = detection_loss(model(batch, use_language=False), batch, model.head).per_frame
        target = language_advantage(class_mean, loss, batch.frame_class)
        rows.append(torch.stack([output.advantage, alone - loss, target])[:, batch.mask])
        classes.append(batch.frame_class[batch.mask])
    rows, classes = torch.cat(rows, 1).double(), torch.cat(classes)            # (3, n), (n,)
    action = classes < len(model.config.classes)
    correlation = torch.corrcoef(rows[:, action]).tolist()
    return {"action": rows[1, action].mean().item(), "background": rows[1, ~action].mean().item(),
            "correlation": correlation[0][1], "with target": correlation[0][2],
            "target with benefit": correlation[1][2]}, rows[0], classes

def mLA(advantage, classes, dataset, names) -> float:
    """Table 3: mean predicted advantage (n,) of the frames of some classes; NaN without any."""
    chosen = [dataset.classes[name] for name in names]
    return advantage[torch.isin(classes, classes.new_tensor(chosen))].mean().item()

def read_reference(words: list) -> dict:
    """Words of --groups -> {class: mean AP of a vision-only run}, {} if no word is a file."""
    files = [str(word) for word in words if word != "thumos14"]
    expect(len(files) < 2, "--groups", "thumos14, FILE or both", " ".join(files), "leave one out")
    AP = read_json(files[0], "AP")["AP"] if files else {}
    for name, row in AP.items():
        good = isinstance(row, list) and row and all(map(is_number, row))
        expect(good, f"--groups {files[0]}: AP of '{name}'", "a list of numbers", row,
               "write the file by evaluate.py --checkpoint DIR --json FILE")
    return {name: float(np.mean(np.array(row, float))) for name, row in AP.items()}

def score_groups(result: dict, reference: dict, args, frames, dataset) -> dict:
    """Print Table 3 -> {level: {"classes", "mAP", "gain", "mLA"}}, None where one is missing."""
    unknown = sorted(set(result["classes"]) - set(reference))
    expect(not unknown or args.groups == ["thumos14"], "--groups", "an AP for every class",
           f"none for {first_ten(unknown)}", "score the reference on the same test set")
    AP, rows = dict(zip(result["classes"], result["AP"].mean(0))), {}
    levels = {name: THUMOS14.get(name, "medium") for name in AP}
    if "thumos14" not in args.groups:
        levels = {n: LEVELS[(ap < args.easy) + (ap < args.hard)] for n, ap in reference.items()}
    print("\n| actions | mAP | gain | mLA | which |\n|:--|--:|--:|--:|:--|")
    for level in LEVELS:
        names = [name for name in AP if levels[name] == level]
        row = rows[level] = dict(classes=names, mAP=None, gain=None, mLA=None)
        if names:
            row["mAP"] = float(np.mean([AP[name] for name in names]))
        if names and reference:
            row["gain"] = row["mAP"] - float(np.mean([reference[name] for name in names]))
        if names and frames:
            row["mLA"] = mLA(*frames, dataset, names)
        cells = ["-" if row[key] is None else form.format(row[key]) for key, form in CELLS.items()]
        print(f"| {level} | {' | '.join(cells)} | {', '.join(names)} |")
    return rows

def score_incomplete(args) -> None:
    """Print the row of Table 5."""
    model, flags, _ = open_checkpoint(args)
    expect(args.incomplete or flags.dataset == "demo", "--incomplete", "an annotation file",
           f"none: {args.checkpoint} is not of the demo", "give FILE")
    flags.train_subset = flags.test_subset = "incomplete"
    flags.dataset = "custom" if args.incomplete else "demo"
    flags.annotations = args.incomplete or f"{Path(flags.annotations).parent}/incomplete.json"
    test = load_test_data(flags, model.config)
    actions = to_ground_truth(test.videos)
    metrics = ambiguity_metrics(detect(model, test, flags).predictions, actions)
    print(f"{count(actions)} incomplete actions in {len(actions)} videos, in percent: "
          + ", ".join(f"{name} {100 * value:.2f}" for name, value in metrics.items()))
    if args.json:
        Path(args.json).write_text(json.dumps(metrics, indent=1) + "\n")

def ambiguity_metrics(predictions: dict, actions: dict) -> dict:
    """Table 5 (A.1): how cautious a model is on actions that are begun and not completed.
    Of the detections of an action that overlap it, the one with the highest score counts, else 0.
    mConf: mean score. mLen: mean of (part inside the action / the action's length). acc@0.3, ...:
    share of actions whose length is below the threshold."""
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
    raise SystemExit(main())
