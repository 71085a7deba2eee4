"""evaluate.py - detection and scoring (paper §4): mean average precision (mAP) of TAL.

    python evaluate.py --checkpoint out                    # the test table of a trained model
    python evaluate.py --checkpoint out --video my.mp4 --plot     # the actions of one video, drawn
    python evaluate.py --checkpoint out --video DIR --csv out.csv     # of many videos, as a table
    python evaluate.py --ground-truth gt.json --predictions result.json --subset Test

The last line scores the result file of any model; docs/benchmarks.md describes the protocol. Times
are in seconds. Dimensions: T tIoU thresholds, C classes, M detections, N segments."""
import importlib
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import batch_loader, grid_to_seconds, load_test_data, make_dataset
from head import decode, soft_nms, temporal_iou, vote_segments
from model import ActionVLM, Config
from support import checkpoint, commands, figures, flags, results
from support.annotations import InputError, copies, expect, load_external_scores
from support.video import own_files, single_video

class Detections(NamedTuple):
    """What `detect` finds, by the name of the video; times in seconds."""
    predictions: dict       # {video: {"segments": (M, 2), "labels": [str], "scores": (M,)}}
    lambda_lang: dict       # {video: (steps,) weight of language}, empty without language
    advantage: dict         # {video: (steps,) predicted advantage}, empty without language

@torch.no_grad()
def detect(model, dataset, args):
    """Run the model over the sliding windows of a test set, then merge the windows of each video.
    args: flags of the training (batch size, workers, soft-NMS, external scores)."""
    model.eval()
    if model.language is not None:
        model.language.keep_prompt()
    classes = model.config.classes
    device = next(model.parameters()).device
    external = {}
    if args.external_scores:
        external = load_external_scores(args.external_scores, classes, dataset.videos)
    elif model.config.class_agnostic:
        classes = ["action"]
    found = {video.name: [] for video in dataset.videos}
    series = {}                                                     # {video: (2, steps)}
    loader = batch_loader(dataset, model.multiple, args.workers, batch_size=args.batch_size)
    for batch in tqdm(loader, "detect", leave=False, dynamic_ncols=True, disable=None):
        output = model(batch.to(device))
        for b, window in enumerate(batch.windows):
            name = window.video.name
            scores = external[name].to(device) if external else None
            segments, scores, labels = decode(output.clip(b), external_scores=scores)
            segments = segments + window.start
            found[name].append((segments.cpu(), scores.cpu(), labels.cpu()))
            if output.advantage is not None:
                here = slice(window.start, window.start + window.length)
                series.setdefault(name, torch.zeros(2, dataset.steps(window.video)))
                series[name][0, here] = output.lambda_lang[b, :window.length]
                series[name][1, here] = output.advantage[b, :window.length]
    model.eval()                                                    # forgets the prompt
    predictions = merge_windows(found, dataset, classes, args)
    lambda_lang = {name: values[0].numpy() for name, values in series.items()}
    advantage = {name: values[1].numpy() for name, values in series.items()}
    return Detections(predictions, lambda_lang, advantage)

def merge_windows(found, dataset, classes, args):
    """{video: [(segments, scores, labels) of a window]} -> predictions in seconds, after soft-NMS.
    Segments are in steps of the video; the predictions are cut at [0, duration]."""
    predictions = {}
    for video in dataset.videos:
        segments, scores, labels = nms_per_class(
            *map(torch.cat, zip(*found[video.name])),
            sigma=args.nms_sigma,
            voting=args.voting,
            max_per_class=args.max_per_class,
            max_per_video=args.max_per_video)
        segments = segments.double().numpy()
        seconds = grid_to_seconds(segments, video.fps, dataset.stride, dataset.num_frames)
        predictions[video.name] = {
            "segments": seconds.clip(0, video.duration),
            "labels": [classes[label] for label in labels.tolist()],
            "scores": scores.numpy(),
        }
    return predictions

def nms_per_class(segments, scores, labels, sigma=0.5, voting=0.0, max_per_class=0,
                  max_per_video=200, **options):
    """Soft-NMS within each class -> segments (M, 2), scores (M,), labels (M,), best score first.
    segments (N, 2), scores (N,), labels (N,) int. voting: tIoU of `vote_segments` (0 = off).
    max_per_class, max_per_video: 0 = no limit. options: of `soft_nms`."""
    found = []
    for label in labels.unique():
        own = (labels == label).nonzero().squeeze(1)
        kept, decayed, picks = soft_nms(segments[own], scores[own], sigma=sigma,
                                        limit=max_per_class or max_per_video, **options)
        if voting > 0:
            kept = vote_segments(kept, segments[own], scores[own], voting)
        found.append((kept, decayed, labels[own[picks]]))
    if found:
        segments, scores, labels = (torch.cat(part) for part in zip(*found))
    best = scores.argsort(descending=True, stable=True)[:max_per_video or None]
    return segments[best], scores[best], labels[best]

# ------------------------------------------------------------------------------------ the metric
def mean_average_precision(ground_truth, predictions, thresholds):
    """Mean over the classes of the interpolated average precision, at each of T thresholds.
    ground_truth: {video: {"segments": (N, 2) seconds, "labels": [str]}}
    predictions:  {video: {"segments": (M, 2), "labels": [str], "scores": (M,)}}, in any order
    thresholds:   T temporal IoUs, each > 0 and <= 1
    Returns {"mAP": (T,) mean of AP over classes, "average": mean of mAP, "AP": (T, C), "classes":
    C labels in alphabetical order}, all in [0, 1]. Raises InputError for a threshold out of range,
    scores that are NaN, and lists of a video that differ in length."""
    thresholds = np.array(thresholds, dtype=float).reshape(-1)
    expect(len(thresholds) and thresholds.min() > 0 and thresholds.max() <= 1, "tIoU thresholds",
           "one or more numbers > 0 and <= 1", thresholds.tolist(), "give fractions, not percent")
    truth = results.by_class(ground_truth)
    found = results.by_class(predictions)
    classes = sorted(truth)
    AP = np.zeros((len(thresholds), len(classes)))
    for c, label in enumerate(classes):
        segments = {video: rows[~copies(rows)] for video, rows in truth[label].items()}
        num_gt = sum(len(rows) for rows in segments.values())
        correct = match(found.get(label, {}), segments, thresholds)              # (T, M)
        AP[:, c] = average_precision(correct, num_gt)
    mAP = AP.mean(axis=1) if classes else np.zeros(len(thresholds))
    return {"mAP": mAP, "average": float(mAP.mean()), "AP": AP, "classes": classes}

def match(detections, truth, thresholds):
    """Which detections of one class are right, in order of score: (T, M) bool.
    detections, truth: {video: (N, 3) start, end, score}."""
    scores = np.vstack([np.zeros((0, 3)), *detections.values()])[:, 2]
    rank = np.empty(len(scores), int)
    order = scores.argsort()[::-1]                 # of ties as in the official toolkit
    rank[order] = np.arange(len(scores))
    correct = np.zeros((len(thresholds), len(scores)), bool)
    end = 0
    for video, rows in detections.items():
        start, end = end, end + len(rows)
        if video not in truth:
            continue
        segments = truth[video][::-1].copy()       # of equal IoUs the one listed last comes first
        iou = temporal_iou(rows, segments).numpy()                               # (M', N)
        best = np.argsort(-iou, axis=1, kind="stable").tolist()
        free = np.ones((len(thresholds), len(segments)), bool)
        for m in rank[start:end].argsort():
            for t in range(len(thresholds)):
                for n in best[m]:
                    if iou[m, n] < thresholds[t]:
                        break
                    if free[t, n]:
                        free[t, n] = False
                        correct[t, rank[start + m]] = True
                        break
    return correct

def average_precision(correct, num_gt):
    """Interpolated average precision of one class, (T,) in [0, 1].
    correct: (T, M) bool, is each detection right, best score first. num_gt: number of segments. It
    is the area under the precision-recall curve; precision is the highest at that or a greater
    recall (Pascal VOC 2010). Recall rises at right detections, so the area is a sum over these."""
    served = np.arange(1, correct.shape[1] + 1)
    precision = correct.cumsum(axis=1) / served                                  # (T, M)
    highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    area = (highest * correct).sum(axis=1)
    return area / num_gt

# ------------------------------------------------------------------------------------ commands
def main(argv=None):
    """Returns the exit code: 0, or 2 for a mistake in the flags or files."""
    args = commands.evaluate_args(__doc__, argv)
    command = score_checkpoint
    if args.predictions:
        command = score_files
    elif args.video:
        command = find_in_videos
    return commands.run_command("evaluate.py", command, args)

def open_checkpoint(args):
    """(model on the device, flags of its training, folder for the output of this command)."""
    saved = checkpoint.read_checkpoint(args.checkpoint, args.lm)
    path = saved.path
    commands.replace_data(saved.args, args)
    try:
        model = ActionVLM(Config(**saved.config))
    except (InputError, TypeError) as error:
        raise InputError(f"{path}: expected a checkpoint of this version, and the language model "
                         f"of its training where --lm says; found: {error}") from error
    if saved.args.ablation or saved.args.lambda_lang not in ("learned", 0.0):
        importlib.import_module("experiments.ablations").ablate(model, saved.args)
    checkpoint.restore(model, path, checkpoint.averaged(saved))
    out = Path(args.out or path.parent)
    out.mkdir(parents=True, exist_ok=True)
    return model.to(args.device), saved.args, out

def score_checkpoint(args):
    """Prints the table of a checkpoint on the test set of its training."""
    model, train_args, out = open_checkpoint(args)
    test_set = load_test_data(train_args, model.config)
    predictions = detect(model, test_set, train_args).predictions
    tiou = args.tiou or train_args.tiou
    result = score(out / "result.json", test_set, predictions, tiou)
    results.write_figures(args.json, train_args.test_subset, tiou, result)

def score(path, test_set, predictions, tiou):
    """Write predictions as a result file, print their table -> `mean_average_precision`."""
    ground_truth = results.to_ground_truth(test_set.videos)
    result = mean_average_precision(ground_truth, predictions, tiou)
    results.write_result(path, predictions)
    print(results.format_table(result, tiou))
    return result

def score_files(args):
    """Prints the table of one result file."""
    notes = []
    tiou = args.tiou or flags.TIOU
    ground_truth = results.load_ground_truth(args.ground_truth, args.subset, notes)
    predictions = results.load_predictions(args.predictions)
    for note in [*notes, *results.doubts(ground_truth, predictions)]:
        print(f"note: {note}", file=sys.stderr)
    result = mean_average_precision(ground_truth, predictions, tiou)
    print(f"{len(ground_truth)} videos of subset {args.subset}, {len(result['classes'])} classes, "
          f"{results.count(ground_truth)} segments, {results.count(predictions)} detections; "
          f"AP in percent at each tIoU\n")
    print(results.format_table(result, tiou))
    results.write_figures(args.json, args.subset, tiou, result)

def find_in_videos(args):
    """Prints the actions found in videos, best first; --json, --csv and --plot write them, too."""
    model, train_args, out = open_checkpoint(args)
    train_args.external_scores = args.external_scores
    V, classes = model.config.feature_dim, model.config.classes
    predictions = {}
    def find(path):
        video = single_video(path, V, train_args, args.fps)
        dataset = make_dataset([video], classes, train_args, V)
        detections = detect(model, dataset, train_args)
        predictions.update(detections.predictions)
        tqdm.write(f"{path}: {video.duration:.1f} s; score of at least {args.min_score}:")
        for segment, label, confidence in zip(*detections.predictions[video.name].values()):
            if confidence >= args.min_score:
                times = f"{segment[0]:8.2f} - {segment[1]:7.2f} s"
                tqdm.write(f"{times}  {label}  {confidence:.3f}")
        if args.plot:
            picture, rows = out / f"{video.name}.png", {"detected": detections}
            figures.one_video(picture, video, rows, model.config.descriptions, args.min_score)
            tqdm.write(f"wrote {picture}")
    files = own_files(args.video, V)
    failed = commands.for_each(files, "evaluate.py", find)
    if args.json:
        results.write_result(args.json, predictions)
    if args.csv:
        results.write_csv(args.csv, predictions)
    expect(not failed, "--video", "files that can be read", failed, "the others are done")

if __name__ == "__main__":
    sys.exit(main())
