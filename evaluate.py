"""evaluate.py - detection and scoring (paper §4): mean average precision (mAP) of temporal action detections.

    python evaluate.py --checkpoint out                    # the test table of a trained model
    python evaluate.py --checkpoint out --video my.mp4     # the actions in one video, printed and drawn
    python evaluate.py --checkpoint out --bias             # LAP and mLA: how much it listens to language (§4.3)
    python evaluate.py --checkpoint out --formulation qa   # the actions that the language model writes (Table 2)
    python evaluate.py --checkpoint out --bias --groups vision-only.json     # easy, medium, hard actions (Table 3)
    python evaluate.py --checkpoint out --incomplete       # actions that are begun and not completed (Table 5)
    python evaluate.py --ground-truth gt.json --predictions result.json --subset Test --tiou 0.3 0.4 0.5 0.6 0.7

scores the result file of any model. Both files are in ActivityNet format, plain or gzip:

    ground truth  {"database": {video: {"subset": name, "annotations": [{"label": str, "segment": [start, end]}]}}}
    predictions   {"results": {video: [{"label": str, "segment": [start, end], "score": number}]}}

The protocol is ActivityNet's; all times are in seconds. Details that matter:

1. A detection is right if its IoU with a ground-truth segment of its class and video is >= the threshold (tIoU).
2. Detections are served in order of score. Each takes its best *free* segment (of equal IoUs the one listed last);
   a second detection of the same segment is wrong. Equal scores of one class go in the order that numpy's
   `argsort()[::-1]` leaves. This is the call of the official toolkit and of OpenTAD, so the figures equal theirs, but
   the sort is not stable and its order of ties depends on the CPU: the rounded scores of S-CNN's published result
   file give an mAP@.3 of 36.06, 36.05 or 36.29 with AVX-512, AVX2 or neither. Write scores with all digits.
3. Detections on videos without ground truth are wrong. A label that no ground-truth segment has is no class and is
   not scored. Labels are compared exactly.
4. A class without detections has AP 0 and counts in the mean.
5. Segments of one class and video whose starts and ends both differ by at most 1e-3 s are one segment. This is the
   rule of ActionFormer and OpenTAD; the official toolkit counts the copies, which nothing can then find.
6. A segment of zero length matches nothing. One in the ground truth still counts, as in the official toolkit
   (there 0 / 0 would even match; OpenTAD removes it).
"""
import argparse
import copy
import json
import math
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import figures
from advantage import frame_classes
from annotations import InputError, Video, is_number, load_external_scores, read_field, read_segments, shorten
from checkpoint import load_checkpoint, written_whole
from data import (TALDataset, batch_loader, dead_workers_named, grid_to_seconds, open_features, probe, process_rank,
                  seconds_to_grid)
from head import decode, nms_per_class
from vlm import CUT, parse_proposals

DUPLICATE_TOLERANCE = 1e-3  # seconds
LEVELS = ("easy", "medium", "hard")
THUMOS14_LEVELS = {"easy": ["ThrowDiscus", "LongJump", "HighJump", "HammerThrow"],          # A.8; medium: the rest
                   "hard": ["Billiards", "FrisbeeCatch"]}


# ------------------------------------------------------------------------------------------------ command line
def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("a trained model").add_argument
    model("--checkpoint", metavar="DIR", help="folder (or checkpoint.safetensors) that train.py wrote: its test table")
    model("--video", metavar="FILE", help="find the actions in this video or .npy feature file instead")
    model("--bias", action="store_true", help="score with unmatched descriptions, too: LAP, and mLA of each class")
    model("--formulation", choices=["fa", "qa"], default="fa",
          help="feature aggregation, or question answering: what the language model writes (Table 2) (%(default)s)")
    model("--max-new-tokens", type=int, default=256, help="longest answer of --formulation qa (%(default)s)")
    model("--groups", nargs="+", metavar="FILE",
          help="Table 3: easy, medium and hard actions by the AP in FILE, which --json wrote for a vision-only run; "
               "'thumos14' or 'thumos14 FILE': in the paper's own groups (A.8)")
    model("--easy", type=float, default=0.85, help="lowest AP, mean over tIoU, of an easy action (%(default)s)")
    model("--hard", type=float, default=0.5, help="AP below which an action is hard (%(default)s)")
    model("--incomplete", nargs="?", const="", metavar="FILE",
          help="Table 5: confidence and length on actions begun and not completed, those of the subset 'incomplete' of "
               "this annotation file (default: of the demo)")
    model("--lm", metavar="DIR", help="where the language model of the training is now, if it was moved")
    model("--fps", type=float, default=0.0, help="frames per second behind a feature file given as --video")
    model("--min-score", type=float, default=0.3, help="lowest score that --video prints and draws (%(default)s)")
    model("--out", metavar="DIR", help="where result.json and pictures go (default: the checkpoint's folder)")
    model("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    files = parser.add_argument_group("a result file").add_argument
    files("--ground-truth", metavar="FILE", help="ActivityNet-format json, plain or gzip")
    files("--predictions", metavar="FILE", help="result file of any model, plain or gzip")
    files("--subset", default="test", help="subset of the ground truth to score, in any case (%(default)s)")
    metric = parser.add_argument_group("metric").add_argument
    metric("--tiou", type=float, nargs="+", metavar="IOU",
           help="temporal IoU thresholds, each > 0 and <= 1 (default: those of the training, else .3 to .7)")
    metric("--json", metavar="FILE", help="also write the figures to FILE, as fractions with all digits")
    return parser


def get_args(argv=None):
    """Flags, checked against each other."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if bool(args.checkpoint) == bool(args.ground_truth and args.predictions):
        parser.error("expected --checkpoint DIR, or both --ground-truth FILE and --predictions FILE")
    args.qa = args.formulation == "qa"
    for flag in ("video", "bias", "lm", "groups", "qa", "incomplete"):
        if getattr(args, flag) not in (None, False) and not args.checkpoint:
            parser.error(f"--{'formulation qa' if flag == 'qa' else flag}: expected --checkpoint DIR with it")
    if args.video and (args.bias or args.groups or args.qa or args.incomplete is not None):
        parser.error("--bias, --groups, --incomplete and --formulation qa score data sets: leave out --video")
    if args.incomplete is not None and (args.bias or args.groups or args.qa):
        parser.error("--incomplete scores clips of its own: leave out --bias, --groups and --formulation qa")
    check_ranges(parser, args, {"max_new_tokens": (1, 1e6), "tiou": (1e-9, 1), "easy": (0, 1), "hard": (0, 1),
                                "fps": (0, 1000), "min_score": (-math.inf, math.inf)})
    if not args.hard <= args.easy:
        parser.error(f"--hard, --easy: expected thresholds in this order, found {args.hard} and {args.easy}")
    return args


def check_ranges(parser, args, ranges: dict) -> None:
    """parser.error for a flag of {flag: (lowest, highest)} that is out of its range, or NaN."""
    for flag, (low, high) in ranges.items():
        value = getattr(args, flag)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not low <= number <= high:
                parser.error(f"--{flag.replace('_', '-')}: expected {low:g} to {high:g}, found {number:g}")


def device(text: str) -> str:
    """argparse type of --device: one that is there."""
    try:
        kind, index = torch.device(text).type, torch.device(text).index or 0
    except RuntimeError:
        kind, index = None, 0
    if kind != "cpu" and not (kind == "cuda" and index < torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(f"expected cpu or a GPU that is there (cuda, cuda:0, ...; found "
                                         f"{torch.cuda.device_count()} of them), not {text}")
    return text


def main(argv=None) -> int:
    """Returns the exit code: 0, or 2 for a mistake in the flags or files."""
    args = get_args(argv)
    try:
        (score_files if args.predictions else find_in_video if args.video
         else score_checkpoint if args.incomplete is None else score_incomplete)(args)
    except (InputError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def open_checkpoint(args):
    """(model on the device, flags of its training, folder for what this command writes)."""
    path = Path(args.checkpoint)
    path = path / "checkpoint.safetensors" if path.is_dir() else path
    model, trained = load_checkpoint(path, lm=args.lm)
    out = Path(args.out or path.parent)
    out.mkdir(parents=True, exist_ok=True)
    return model.to(args.device), trained, out


def score_checkpoint(args) -> None:
    """Prints the table of a checkpoint on the test set of its training; with --formulation qa, of what its language
    model writes there; with --bias how much it depends on language, with --groups Table 3."""
    from train import load_data
    model, trained, out = open_checkpoint(args)
    if (args.bias or args.qa) and model.language is None:
        raise InputError(f"{'--bias' if args.bias else '--formulation qa'}: expected a model with language, found "
                         f"{args.checkpoint}, trained with --lambda-lang 0")
    test, tiou = load_data(trained, model.config.feature_dim)[1], args.tiou or trained.tiou
    reference = read_reference(args.groups) if args.groups else None
    run = partial(answer, max_new_tokens=args.max_new_tokens) if args.qa else detect_as_trained
    results = run(model, test, trained)
    result = score(out / ("result-qa.json" if args.qa else "result.json"), test, results, tiou)
    if args.qa:
        result["hallucination"] = report_answers(out, results, test)
    if args.bias or args.qa:
        model.language.set_descriptions(unmatched_descriptions(model.config.descriptions))
        exchanged = run(model, test, trained)
        result |= report_bias(result, exchanged, test, tiou)
    if args.bias and not args.qa:
        result["mLA"] = {name: mean_language_advantage(results.advantage, test, [name])
                         for name in ("all", *result["classes"])}
        print("mLA: " + ", ".join(f"{name} {value:.4f}" for name, value in result["mLA"].items()))
    if args.groups:
        groups = group_by_difficulty(result["classes"], reference, args)
        result["groups"] = score_groups(groups, result, reference, results.advantage, test)
        print("\n" + format_groups(result["groups"]))
    write_figures(args.json, trained.test_subset, tiou, result)


def report_bias(result: dict, unmatched: "Detections", test, tiou: list) -> dict:
    """Print the average mAP with matched and with unmatched descriptions -> {"LAP": float}."""
    average = mean_average_precision(to_ground_truth(test.videos), unmatched.predictions, tiou)["average"]
    lap = language_advantage_on_performance(result["average"], average)
    print(f"\naverage mAP {100 * result['average']:.2f} %, with unmatched descriptions {100 * average:.2f} %: "
          f"LAP {100 * lap:.2f} %")
    return {"LAP": lap}


def report_answers(out: Path, results: "Answers", test) -> dict:
    """Print the hallucination rates, write answers.json and the histogram of boundaries (Fig. 6) -> the rates."""
    beyond = 0.5 * test.num_frames / test.stride         # a feature sees this far, and so does the ground truth
    rates = hallucination_rates([a["text"] for a in results.answers], [a["proposals"] for a in results.answers],
                                [round(a["length"] + beyond) for a in results.answers])
    print(f"\nhallucinations in {len(results.answers)} windows: fixed {100 * rates['fixed']:.2f} %, infinite "
          f"{100 * rates['infinite']:.2f} %; wrote answers.json, boundaries.png to {out}")
    (out / "answers.json").write_text(json.dumps(results.answers, indent=1) + "\n")
    proposals = [row for a in results.answers for row in a["proposals"]]
    figures.boundaries(out / "boundaries.png", [t for _, *pair in proposals for t in pair])
    return rates


def score_incomplete(args) -> None:
    """Prints the row of Table 5: how sure a checkpoint is of actions that are begun and not completed."""
    from train import load_data
    model, trained, _ = open_checkpoint(args)
    if not args.incomplete and trained.dataset != "demo":
        raise InputError(f"--incomplete: expected an annotation file with it, because {args.checkpoint} was not "
                         f"trained on the demo")
    clips = copy.copy(trained)
    clips.train_subset = clips.test_subset = "incomplete"
    clips.annotations = args.incomplete or str(Path(trained.annotations).with_name("incomplete.json"))
    clips.dataset = "custom" if args.incomplete else "demo"
    test = load_data(clips, model.config.feature_dim)[1]
    segments = [(v.name, label, start, end) for v in test.videos for label, (start, end) in zip(v.labels, v.segments)]
    metrics = ambiguity_metrics(detect_as_trained(model, test, trained).predictions, segments)
    print(f"{len(segments)} incomplete actions in {len(test.videos)} videos, in percent\n")
    print("| " + " | ".join(metrics) + " |\n" + "|--:" * len(metrics) + "|")
    print("| " + " | ".join(f"{100 * value:.2f}" for value in metrics.values()) + " |")
    if args.json:
        Path(args.json).write_text(json.dumps(metrics, indent=1) + "\n")


def find_in_video(args) -> None:
    """Prints the actions found in one video, best first, and draws them to NAME.png."""
    model, trained, out = open_checkpoint(args)
    path = Path(args.video)
    if model.vision is None:
        fps = args.fps or trained.fps
        if not fps:
            raise InputError(f"--video {path}: this model reads features; say --fps, frames per second behind them")
        duration = grid_to_seconds(len(open_features(path, model.config.feature_dim)), fps, trained.stride,
                                   trained.num_frames)
    else:
        duration, fps = probe(path)
    video = Video(path.stem, duration, fps, path=path)
    test = TALDataset([video], model.config.classes, trained.window, trained.stride, trained.num_frames,
                      image_size=trained.image_size if model.vision else 0, resize_to=trained.resize_to,
                      frames_per_step=trained.frames_per_step, feature_dim=model.config.feature_dim)
    results = detect_as_trained(model, test, trained)
    found = results.predictions[video.name]
    print(f"{path}: {duration:.1f} s; actions with a score of at least {args.min_score}:")
    for (start, end), label, score in zip(found["segments"], found["labels"], found["scores"]):
        if score >= args.min_score:
            print(f"{start:8.2f} - {end:7.2f} s  {label}  {score:.3f}")
    figures.one_video(out / f"{video.name}.png", video, results, model.config.descriptions, args.min_score)
    print(f"wrote {out / f'{video.name}.png'}")


def score_files(args):
    """Prints the table of one result file, and writes it to `args.json` if given."""
    ground_truth = load_ground_truth(args.ground_truth, args.subset)
    predictions = load_predictions(args.predictions)
    for note in doubts(ground_truth, predictions):
        print(f"note: {note}", file=sys.stderr)
    tiou = args.tiou or [0.3, 0.4, 0.5, 0.6, 0.7]
    result = mean_average_precision(ground_truth, predictions, tiou)
    segments, detections = (sum(len(entry["labels"]) for entry in part.values())
                            for part in (ground_truth, predictions))
    print(f"{len(ground_truth)} videos of subset {args.subset}, {len(result['classes'])} classes, "
          f"{segments} segments, {detections} detections; AP in percent at each tIoU\n")
    print(format_table(result, tiou))
    write_figures(args.json, args.subset, tiou, result)


def write_figures(path, subset: str, tiou: list, result: dict) -> None:
    """Write what `mean_average_precision` returned as JSON, if a path is given."""
    if path:
        content = {"subset": subset, "tiou": tiou, "mAP": result["mAP"].tolist(), "average": result["average"],
                   "AP": dict(zip(result["classes"], result["AP"].T.tolist()))}
        content |= {name: value for name, value in result.items() if name not in (*content, "classes")}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------ detection
def score_test_set(model, test, trained, tiou: list, out: Path):
    """Detect on a test set by the flags `trained`, write out/result.json, print the table.

    Returns (Detections, what `mean_average_precision` returns).
    """
    results = detect_as_trained(model, test, trained)
    return results, score(out / "result.json", test, results, tiou)


def score(path: Path, test, results, tiou: list) -> dict:
    """Write detections as a result file, print their table -> what `mean_average_precision` returns."""
    result = mean_average_precision(to_ground_truth(test.videos), results.predictions, tiou)
    if process_rank()[0] == 0:
        write_result(path, results.predictions)
    print(format_table(result, tiou))
    return result


class Detections(NamedTuple):
    """What `detect` returns, per video name; times in seconds."""
    predictions: dict   # {video: {"segments": (M, 2), "labels": [str], "scores": (M,)}}, best first
    lambda_lang: dict   # {video: (T,) weight of language at each step of the grid}, empty without language
    advantage: dict     # {video: (T,) predicted advantage}


class Answers(NamedTuple):
    """What `answer` returns: predictions as in Detections, and one row per window, with what was written there."""
    predictions: dict   # {video: {"segments": (M, 2) seconds, "labels": [str], "scores": (M,)}}, best first
    answers: list       # [{"video", "start" (step), "length" (steps), "text", "proposals": [(label, start, end)]}]
    advantage: dict     # {}: nothing is weighed here


def nms_flags(trained) -> dict:
    """What `nms_per_class` takes, from the flags of the training."""
    return dict(sigma=trained.nms_sigma, voting_threshold=trained.voting, max_per_class=trained.max_per_class,
                max_per_video=trained.max_per_video)


def detect_as_trained(model, test, trained) -> Detections:
    """`detect` by the flags of the training. Of several processes each takes its share of the videos; all get all."""
    rank, processes = process_rank()
    share = test.share(rank, processes)
    file = trained.external_scores
    scores = file and load_external_scores(file, model.config.classes, test.videos)
    with dead_workers_named(share):
        own = detect(model, share, trained.batch_size, scores, trained.workers, **nms_flags(trained))
    if processes == 1:
        return own
    parts = [None] * processes
    dist.all_gather_object(parts, own)
    return Detections(*({v.name: column[v.name] for v in test.videos if v.name in column}
                        for column in ({k: x for part in parts for k, x in part[i].items()} for i in range(3))))


@torch.no_grad()
def detect(model, dataset, batch_size: int = 1, external_scores: dict | None = None, workers: int = 0,
           **nms) -> Detections:
    """Run the model over the sliding windows of a test set: merge the windows of each video, then soft-NMS.

    model: ActionVLM. dataset: TALDataset with training=False. external_scores: {video: (K,)}, see `decode`. workers:
    processes that read. nms: of `nms_per_class`. Segments are clamped to [0, duration].
    """
    model.eval()
    device, classes = next(model.parameters()).device, model.config.classes
    found, steps = {v.name: [] for v in dataset.videos}, {"lambda_lang": {}, "advantage": {}}
    loader = batch_loader(dataset, model.multiple, workers, batch_size=batch_size)
    language = getattr(model, "language", None)
    with language.cached_prompt() if language is not None else nullcontext():
        for batch in tqdm(loader, desc="detect", leave=False, dynamic_ncols=True, disable=None):
            output = model(batch.to(device))
            for b, window in enumerate(batch.windows):
                external = external_scores and external_scores[window.video.name].to(device)
                segments, scores, labels = decode(*([level[b] for level in part] for part in output[:2]), output.points,
                                                  [m[b] for m in output.mask], external_scores=external)
                found[window.video.name].append((segments.cpu() + window.start, scores.cpu(), labels.cpu()))
                for name in steps if output.advantage is not None else ():
                    put_steps(steps[name], window, getattr(output, name)[b, :window.length].cpu().numpy())
    return Detections(merge_windows(found, dataset, classes, **nms), **steps)


def merge_windows(found: dict, dataset, classes: list, **nms) -> dict:
    """{video: [(segments, scores, labels) of a window]}, in steps of the video -> predictions in seconds, after NMS."""
    predictions = {}
    for video in dataset.videos:
        segments, scores, labels = nms_per_class(*(torch.cat(part) for part in zip(*found[video.name])), **nms)
        seconds = grid_to_seconds(segments.numpy().astype(np.float64), video.fps, dataset.stride, dataset.num_frames)
        predictions[video.name] = {"segments": seconds.clip(0, video.duration), "scores": scores.numpy(),
                                   "labels": [classes[i] for i in labels]}
    return predictions


@torch.no_grad()
def answer(model, test, trained, max_new_tokens: int = 256) -> Answers:
    """Localization as question answering (Table 2): what the language model writes about every window.

    The score of a proposal is 1 / (1 + its place in the answer); windows are merged as in `detect`.
    """
    model.eval()
    device, classes = next(model.parameters()).device, model.config.classes
    found, answers = {v.name: [] for v in test.videos}, []
    loader = batch_loader(test, model.multiple, trained.workers, batch_size=trained.batch_size)
    with dead_workers_named(test):
        for batch in tqdm(loader, desc="answer", leave=False, dynamic_ncols=True, disable=None):
            batch = batch.to(device)
            f_vis = model.normalise(model.project(model.features(batch)))
            for window, text in zip(batch.windows, model.language.generate(f_vis, batch.mask, max_new_tokens)):
                proposals = parse_proposals(text, classes)
                segments = torch.tensor([pair for _, *pair in proposals], dtype=torch.float32).reshape(-1, 2)
                labels = torch.tensor([classes.index(label) for label, *_ in proposals], dtype=torch.long)
                scores = 1 / (1 + torch.arange(len(proposals)))
                found[window.video.name].append((segments + window.start, scores, labels))
                answers.append(dict(video=window.video.name, start=window.start, length=window.length, text=text,
                                    proposals=proposals))
    return Answers(merge_windows(found, test, classes, **nms_flags(trained)), answers, {})


def put_steps(series: dict, window, values: np.ndarray) -> None:
    """Write a window's per-step values into its video's series; overlapping windows: the later one counts."""
    old = series.get(window.video.name, np.zeros(0, np.float32))
    new = np.zeros(max(len(old), window.start + len(values)), np.float32)
    new[:len(old)] = old
    new[window.start:window.start + len(values)] = values
    series[window.video.name] = new


def write_result(path, predictions: dict) -> None:
    """Write predictions as an ActivityNet result file: {"results": {video: [{label, score, segment (seconds)}]}}."""
    results = {name: [{"label": label, "score": float(score), "segment": [float(t) for t in segment]}
                      for label, score, segment in zip(p["labels"], p["scores"], p["segments"])]
               for name, p in predictions.items()}
    content = {"version": "ActionVLM", "results": results, "external_data": {}}
    with written_whole(path) as beside:
        beside.write_text(json.dumps(content) + "\n")


def to_ground_truth(videos) -> dict:
    """data.Video list -> what `mean_average_precision` takes."""
    return {v.name: {"segments": v.segments, "labels": v.labels} for v in videos}


# ------------------------------------------------------------------------------------------------ modality bias
def unmatched_descriptions(descriptions: dict) -> dict:
    """Every label with the description of another one: shifted by half of the list, always the same derangement."""
    labels, texts = list(descriptions), list(descriptions.values())
    shift = len(labels) // 2
    return dict(zip(labels, texts[shift:] + texts[:shift]))


def language_advantage_on_performance(matched: float, unmatched: float) -> float:
    """LAP (§4.3): the relative drop of the average mAP with unmatched descriptions; 0 where there is nothing to lose.

    matched, unmatched: average mAP with the right and with exchanged descriptions. Small: vision is in charge.
    """
    return (matched - unmatched) / matched if matched else 0.0


def mean_language_advantage(advantage: dict, dataset, labels: list) -> float:
    """mLA (Table 3): mean of the predicted language advantage over the steps whose class is one of `labels`.

    advantage: {video: (T,)} of `detect`; dataset: the TALDataset it ran on; labels: class names, or ["all"].
    The class of a step is that of the shortest action that contains it (as in Eq. 1); NaN without such a step.
    """
    values = [np.zeros(0)]
    for video in dataset.videos:
        series = advantage[video.name]
        grid = seconds_to_grid(video.segments, video.fps, dataset.stride, dataset.num_frames)
        index = torch.tensor([dataset.classes[label] for label in video.labels], dtype=torch.long)
        here = frame_classes([torch.tensor(grid).reshape(-1, 2)], [index], len(series), len(dataset.classes))[0].numpy()
        chosen = [i for name, i in dataset.classes.items() if name in labels or labels == ["all"]]
        values.append(series[np.isin(here, chosen)])
    values = np.concatenate(values)
    return float(values.mean()) if len(values) else math.nan


def hallucination_rates(texts: list, proposals: list, lengths: list) -> dict:
    """The two hallucinations of Table 2, each as a share of the W windows, in [0, 1].

    texts: W answers as `LanguageModel.generate` gives them. proposals: what `parse_proposals` reads in each of them,
    [(label, start, end)] in steps of the window. lengths: W numbers of steps, the last possible end of each window.

    The paper names them without a formula; here a window counts as
    "fixed"     "fixed outputs with obviously fake boundaries regardless of input": its answer names at least one
                proposal, and either the very same list answers another window, too, or one of its proposals is
                impossible: it ends before it starts, or after the window;
    "infinite"  "infinite listing or repeating segments": the answer did not end by itself (it closes with CUT), or
                names the same proposal three times or more.
    """
    lists = [tuple(map(tuple, rows)) for rows in proposals]
    same = Counter(lists)
    fixed = [bool(rows) and (same[rows] > 1 or any(end < start or end > length for _, start, end in rows))
             for rows, length in zip(lists, lengths)]
    infinite = [text.endswith(CUT) or max(Counter(rows).values(), default=0) >= 3 for text, rows in zip(texts, lists)]
    return {"fixed": sum(fixed) / max(1, len(lists)), "infinite": sum(infinite) / max(1, len(lists))}


# ------------------------------------------------------------------------------------------------ visual ambiguity
def read_reference(words: list) -> dict | None:
    """--groups -> {class: AP, mean over tIoU} from the figures of a vision-only run; None without a file."""
    files = [word for word in words if word != "thumos14"]
    if len(files) > 1 or len(words) > 2:
        raise InputError(f"--groups: expected FILE, thumos14, or thumos14 FILE, found {' '.join(words)}")
    if not files:
        return None
    AP = read_field(files[0], "AP")
    if not all(isinstance(row, list) and row and all(map(is_number, row)) for row in AP.values()):
        raise InputError(f"--groups {files[0]}: expected the file that --json writes, with a list of numbers for every "
                         f"class in AP; write it again by evaluate.py --checkpoint DIR --json FILE")
    return {name: float(np.mean(row)) for name, row in AP.items()}


def group_by_difficulty(classes: list, reference: dict | None, args) -> dict:
    """{"easy": [class], "medium": [class], "hard": [class]} by the AP of the reference, or as in A.8 for THUMOS14."""
    unknown = sorted(set(classes) - set(reference)) if reference is not None else []
    if unknown:
        raise InputError(f"--groups: expected an AP for every class, found none for {', '.join(unknown[:5])}; "
                         f"score the reference on the same test set")
    if "thumos14" in args.groups:
        level = {name: level for level, names in THUMOS14_LEVELS.items() for name in names}
    else:
        level = {name: "easy" if reference[name] >= args.easy else "hard" if reference[name] < args.hard else "medium"
                 for name in classes}
    return {key: [name for name in classes if level.get(name, "medium") == key] for key in LEVELS}


def score_groups(groups: dict, result: dict, reference: dict | None, advantage: dict, dataset) -> dict:
    """Table 3: {level: {"classes", "mAP", "gain" over the reference, "mLA"}}, fractions; None where there is none.

    result: of `mean_average_precision`. advantage: of `detect`, {} without language.
    """
    AP = dict(zip(result["classes"], result["AP"].mean(0)))
    rows = {}
    for level, names in groups.items():
        mAP = float(np.mean([AP[n] for n in names])) if names else None
        gain = mAP - float(np.mean([reference[n] for n in names])) if names and reference is not None else None
        mLA = mean_language_advantage(advantage, dataset, names) if names and advantage else None
        rows[level] = {"classes": names, "mAP": mAP, "gain": gain, "mLA": mLA}
    return rows


def format_groups(rows: dict) -> str:
    """Markdown table of what `score_groups` returns: mAP and gain in percent, mLA as it is."""
    lines = ["| actions | mAP | gain | mLA | which |", "|:--|--:|--:|--:|:--|"]
    for level, row in rows.items():
        mAP, gain, mLA = ("-" if row[key] is None else text.format(scale * row[key]) for key, text, scale in
                          (("mAP", "{:.2f}", 100), ("gain", "{:+.2f}", 100), ("mLA", "{:.4f}", 1)))
        lines.append(f"| {level} | {mAP} | {gain} | {mLA} | {', '.join(row['classes'])} |")
    return "\n".join(lines)


def ambiguity_metrics(predictions: dict, clips: list) -> dict:
    """Table 5 (A.1): how cautious a model is on actions that are begun and not completed; all in [0, 1].

    predictions: {video: {"segments": (M, 2) seconds, "labels": [str], "scores": (M,)}} of the full videos.
    clips: [(video, label of the begun action, start, end)], seconds.

    "Each full video is processed by the model, while evaluation is restricted to these ambiguous segments. As multiple
    temporal proposals are generated per video, we retain only the highest-confidence one." So a clip's prediction is
    the detection of the begun action with the highest score that overlaps the clip. Then
    "mConf"    "the mean predicted confidence": its score;
    "mLen"     "the mean normalized span length": the part of it inside the clip, divided by the clip's length;
    "acc@0.3", "acc@0.5", "acc@0.7"   "the proportion of predictions with span lengths below the threshold".
    A clip in which the action is not detected has confidence 0 and length 0. NaN without clips.
    """
    confidence, length = [], []
    for video, label, start, end in clips:
        found = predictions.get(video, {"segments": np.zeros((0, 2)), "labels": [], "scores": np.zeros(0)})
        segments = np.asarray(found["segments"], dtype=np.float64).reshape(-1, 2)
        inside = np.minimum(segments[:, 1], end) - np.maximum(segments[:, 0], start)
        rows = np.flatnonzero((inside > 0) & (np.array(found["labels"], dtype=object) == label))
        best = rows[np.argmax(np.asarray(found["scores"])[rows])] if len(rows) else None
        confidence.append(0.0 if best is None else float(found["scores"][best]))
        length.append(0.0 if best is None else float(inside[best] / (end - start)))
    below = {f"acc@{t}": float(np.mean(np.array(length) < t)) if clips else math.nan for t in (0.3, 0.5, 0.7)}
    mean = [float(np.mean(values)) if clips else math.nan for values in (confidence, length)]
    return {"mConf": mean[0], "mLen": mean[1]} | below


# ------------------------------------------------------------------------------------------------ metric
def mean_average_precision(ground_truth: dict, predictions: dict, thresholds) -> dict:
    """Mean over the classes of the interpolated average precision, at each of T thresholds.

    ground_truth: {video: {"segments": (N, 2), "labels": [str]}}, segments as start and end in seconds
    predictions:  {video: {"segments": (M, 2), "labels": [str], "scores": (M,)}}, in any order
    thresholds:   T temporal IoUs, each > 0 and <= 1

    Returns a dict:
      "mAP"      (T,) in [0, 1], mean of AP over classes (0 if the ground truth is empty)
      "average"  float, mean of mAP over thresholds
      "AP"       (T, C) in [0, 1]
      "classes"  C labels in alphabetical order, all those in the ground truth
    Raises InputError for a threshold out of range, or for lists of different lengths in one video.
    """
    thresholds = np.asarray(thresholds, dtype=np.float64).reshape(-1)
    if not (len(thresholds) and np.all((thresholds > 0) & (thresholds <= 1))):
        raise InputError(f"tIoU thresholds: expected one or more numbers > 0 and <= 1, found {thresholds.tolist()}. "
                         "Give fractions such as 0.3 0.5 0.7, not percent.")
    classes = sorted({label for entry in ground_truth.values() for label in entry["labels"]})
    unique = {video: without_duplicates(entry) for video, entry in ground_truth.items()}

    # One row per segment, over all videos. Detections by class, then in order of score.
    gt_segments, gt_video, gt_class, _ = flatten(unique, ground_truth, classes)
    segments, video, label, scores = flatten(predictions, ground_truth, classes)
    if np.isnan(scores).any():
        raise InputError(f"predictions: expected numbers as scores, found {np.isnan(scores).sum()} NaN. "
                         "Did training diverge?")
    order = np.concatenate([np.zeros(0, int)] + [rows[scores[rows].argsort()[::-1]]  # ties: see detail 2
                                                 for rows in rows_by_value(label).values()])
    segments, video, label = segments[order], video[order], label[order]

    # Only segments of one video and class can match: give each such group one number. -1: no group, never matches.
    gt_group = gt_video * len(classes) + gt_class
    group = np.where((video >= 0) & (label >= 0), video * len(classes) + label, -1)
    correct = match(segments, group, gt_segments, gt_group, thresholds)  # (T, M)

    AP = np.zeros((len(thresholds), len(classes)))
    num_gt = np.bincount(gt_class, minlength=len(classes))
    for c, rows in rows_by_value(label).items():
        if c >= 0:
            AP[:, c] = average_precision(correct[:, rows], num_gt[c])
    mAP = AP.mean(axis=1) if classes else np.zeros(len(thresholds))
    return {"mAP": mAP, "average": float(mAP.mean()), "AP": AP, "classes": classes}


def average_precision(correct: np.ndarray, num_gt: int) -> np.ndarray:
    """Interpolated average precision of one class, at T thresholds together.

    correct: (T, M) bool, whether each detection is right, in descending order of score
    num_gt:  number of ground-truth segments of the class, > 0
    Returns (T,) in [0, 1]: the area under the precision-recall curve, after precision at each recall is
    replaced by the highest precision at that or any greater recall (Pascal VOC 2010). Recall rises by
    1 / num_gt at each right detection and nowhere else, so the area is a sum over the right detections.
    """
    T, M = correct.shape
    precision = np.cumsum(correct, axis=1) / np.arange(1, M + 1)                        # (T, M)
    interpolated = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]          # (T, M)
    return (interpolated * correct).sum(axis=1) / num_gt


def match(segments, group, gt_segments, gt_group, thresholds) -> np.ndarray:
    """Which detections are right, at each threshold.

    segments (M, 2) and group (M,): detections, each class in descending order of score; group -1 has no ground truth
    gt_segments (N, 2) and gt_group (N,): ground truth
    Returns (T, M) bool.

    All pairs of a detection and a ground-truth segment that overlap enough are sorted by row of the detection, then
    by IoU from high to low. Going down this list once, a pair matches if both of its sides are still free.
    """
    detection, truth, iou = overlapping_pairs(segments, group, gt_segments, gt_group, thresholds.min())
    order = np.lexsort((-truth, -iou, detection))                                      # last key first
    detection, truth, iou = detection[order], truth[order], iou[order]

    correct = np.zeros((len(thresholds), len(segments)), dtype=bool)
    for t, threshold in enumerate(thresholds):
        enough = iou >= threshold
        matched, taken = set(), set()
        for d, g in zip(detection[enough].tolist(), truth[enough].tolist()):
            if g not in taken and d not in matched:
                matched.add(d)
                taken.add(g)
        correct[t, list(matched)] = True
    return correct


def overlapping_pairs(segments, group, gt_segments, gt_group, min_iou: float):
    """All pairs of one group with an IoU >= min_iou: (row of detection, row of ground truth, IoU), each (P,)."""
    comparable = np.flatnonzero(np.isin(group, gt_group))  # most detections of a poor model have no counterpart
    gt_rows = rows_by_value(gt_group)
    pairs = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
    for value, rows in rows_by_value(group[comparable]).items():
        detection, truth = comparable[rows], gt_rows[value]
        iou = temporal_iou(segments[detection], gt_segments[truth])
        i, j = np.nonzero(iou >= min_iou)
        pairs.append((detection[i], truth[j], iou[i, j]))
    return [np.concatenate(column) for column in zip(*pairs)]


def temporal_iou(a, b):
    """Intersection over union of every segment of a with every segment of b.

    a: (N, 2), b: (M, 2), rows [start, end] in any one unit; numpy arrays or torch tensors.
    Returns (N, M) in [0, 1], of the same kind. A segment of zero (or negative) length has IoU 0 with all,
    itself included.
    """
    if isinstance(a, torch.Tensor):
        xp, b = torch, torch.as_tensor(b, device=a.device)
    else:
        xp, a, b = np, np.asarray(a), np.asarray(b)
    (a_start, a_end), (b_start, b_end) = (a[:, None, 0], a[:, None, 1]), (b[None, :, 0], b[None, :, 1])
    intersection = xp.minimum(a_end, b_end) - xp.maximum(a_start, b_start)             # (N, M), < 0 when apart
    union = (a_end - a_start) + (b_end - b_start) - intersection
    overlap = intersection > 0                                                         # then union > 0 as well
    return xp.where(overlap, intersection, 0) / xp.where(overlap, union, 1)


def without_duplicates(entry: dict) -> dict:
    """{"segments": (N, 2), "labels": [str]} of one video, less those that repeat an earlier one of their class:
    start and end both within DUPLICATE_TOLERANCE. THUMOS14 and ActivityNet hold such copies."""
    labels = np.asarray(entry["labels"], dtype=object)
    segments = np.asarray(entry["segments"], dtype=np.float64).reshape(-1, 2)
    if len(labels) != len(segments):
        return entry  # flatten reports it
    near = (np.abs(segments[:, None] - segments[None]) <= DUPLICATE_TOLERANCE).all(axis=-1)
    same = near & (labels[:, None] == labels[None])                                    # (N, N)
    keep = []
    for i in range(len(labels)):
        if not same[i, keep].any():
            keep.append(i)
    return {"segments": segments[keep], "labels": labels[keep].tolist()}


def flatten(entries: dict, videos, classes: list):
    """All videos in one: segments (N, 2), index of the video in `videos` (N,), of the label in `classes` (N,),
    scores (N,). An unknown video or label has index -1; ground truth has scores 0."""
    video_index = {video: i for i, video in enumerate(videos)}
    class_index = {label: i for i, label in enumerate(classes)}
    segments, video_of, class_of, scores = [np.zeros((0, 2))], [], [], [np.zeros(0)]
    for video, entry in entries.items():
        N = len(entry["labels"])
        segments.append(np.asarray(entry["segments"], dtype=np.float64).reshape(-1, 2))
        scores.append(np.asarray(entry.get("scores", np.zeros(N)), dtype=np.float64).reshape(-1))
        if not len(segments[-1]) == len(scores[-1]) == N:
            raise InputError(f"video {video}: expected as many segments and scores as labels, found "
                             f"{len(segments[-1])} segments, {len(scores[-1])} scores, {N} labels.")
        video_of += [video_index.get(video, -1)] * N
        class_of += [class_index.get(label, -1) for label in entry["labels"]]
    return np.concatenate(segments), np.array(video_of, int), np.array(class_of, int), np.concatenate(scores)


def rows_by_value(values: np.ndarray) -> dict:
    """{value: rows where `values` (N,) has it, ascending}."""
    order = np.argsort(values, kind="stable")
    distinct, first = np.unique(values[order], return_index=True)
    return dict(zip(distinct.tolist(), np.split(order, first[1:])))


def format_table(result: dict, thresholds, per_class: bool = True) -> str:
    """Markdown table of what mean_average_precision returns, in percent: mAP, then one row per class."""
    rows = [("mAP", result["mAP"])]
    if per_class:
        rows += list(zip(result["classes"], result["AP"].T))
    width = max(5, *(len(name) for name, _ in rows))
    columns = [f"{threshold:g}" for threshold in thresholds] + ["average"]
    lines = [f"| {'tIoU':<{width}} | " + " | ".join(f"{column:>7}" for column in columns) + " |",
             f"|:{'-' * width}-|-" + "|-".join("-" * 7 + ":" for _ in columns) + "|"]
    for name, values in rows:
        cells = [*values, np.mean(values)]
        lines.append(f"| {name:<{width}} | " + " | ".join(f"{100 * value:7.2f}" for value in cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- files
def load_ground_truth(path, subset: str) -> dict:
    """Reads the videos of one subset, named in any case, from an ActivityNet-format file, plain or gzip.

    Returns {video: {"segments": (N, 2) float64 seconds, "labels": [str]}}; videos without segments are kept.
    Raises InputError for a file that cannot be read or is not of this format, and for a subset without segments.
    """
    database = read_field(path, "database")
    ground_truth, found = {}, Counter()
    for video, entry in database.items():
        if not (isinstance(entry, dict) and isinstance(entry.get("subset"), str)):
            raise InputError(f"{path}: database/{video}: expected an object with a text field 'subset', found "
                             f"{shorten(entry)}. Add the subset of this video.")
        found[entry["subset"]] += 1
        if entry["subset"].lower() == subset.lower():
            where = f"{path}: database/{video}/annotations"
            ground_truth[video] = read_segments(where, entry.get("annotations"), scored=False)
    if not ground_truth:
        names = ", ".join(f"{name} ({count} videos)" for name, count in found.items()) or "no videos at all"
        raise InputError(f"{path}: no video has the subset '{subset}'; found {names}. Give one of these by --subset.")
    if not any(entry["labels"] for entry in ground_truth.values()):
        raise InputError(f"{path}: expected segments in the subset '{subset}', found {len(ground_truth)} videos "
                         "without a single one. Choose an annotated subset by --subset.")
    return ground_truth


def load_predictions(path) -> dict:
    """Reads an ActivityNet-format result file, plain or gzip.

    Returns {video: {"segments": (M, 2) float64 seconds, "labels": [str], "scores": (M,) float64}}.
    Raises InputError for a file that cannot be read or is not of this format.
    """
    results = read_field(path, "results")
    return {video: read_segments(f"{path}: results/{video}", entries, scored=True)
            for video, entries in results.items()}


def doubts(ground_truth: dict, predictions: dict):
    """Sentences on what may be a mistake: unknown labels, videos outside the subset, many equal scores."""
    classes = {label for entry in ground_truth.values() for label in entry["labels"]}
    count = Counter(label for entry in predictions.values() for label in entry["labels"])
    unknown = sorted(set(count) - classes)
    if unknown:
        yield (f"{sum(count[label] for label in unknown)} detections have a label that the ground truth has not, and "
               f"are not scored: {shorten(', '.join(unknown))} (labels are compared exactly)")
    outside = sorted(set(predictions) - set(ground_truth))
    if outside:
        yield (f"{len(outside)} of {len(predictions)} videos with predictions are not in the subset; detections there "
               f"are wrong: {shorten(', '.join(outside))}")
    total = sum(count.values())
    distinct = len({(label, score) for entry in predictions.values()
                    for label, score in zip(entry["labels"], entry["scores"].tolist())})
    if total - distinct > 0.01 * total:
        yield (f"{total - distinct} of {total} detections repeat a score of their class; the order of ties depends on "
               "the CPU and can move the mAP by some tenths of a percent (write scores with more digits)")


if __name__ == "__main__":
    sys.exit(main())
