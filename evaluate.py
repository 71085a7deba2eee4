"""evaluate.py - detection and scoring (paper §4): mean average precision (mAP) of TAL.

    python evaluate.py --checkpoint out                    # the test table of a trained model
    python evaluate.py --checkpoint out --video my.mp4     # the actions of one video, and a picture
    python evaluate.py --ground-truth gt.json --predictions result.json --subset Test

The last line scores the result file of any model. Both files are in ActivityNet's format, and so is
the protocol, as docs/benchmarks.md describes it in detail. Times are in seconds.

Dimensions: T tIoU thresholds, C classes, M detections, N segments.
"""
import importlib
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import TALDataset, batch_loader, grid_to_seconds, load_data
from head import decode, soft_nms, vote_segments
from model import ActionVLM, Config
from support import checkpoint, commands, figures, results
from support.annotations import InputError, load_external_scores
from support.sources import single_video

SAME_SEGMENT = 1e-3         # seconds; THUMOS14 and ActivityNet hold copies of segments


class Detections(NamedTuple):
    """What `detect` finds, by the name of the video; times in seconds."""
    predictions: dict       # {video: {"segments": (M, 2), "labels": [str], "scores": (M,)}}
    lambda_lang: dict       # {video: (steps,) weight of language}, empty without language
    advantage: dict         # {video: (steps,) predicted advantage}, empty without language


@torch.no_grad()
def detect(model: ActionVLM, dataset: TALDataset, args) -> Detections:
    """Run the model over the sliding windows of a test set, then merge the windows of each video.

    args: flags of the training (batch size, workers, soft-NMS, external scores).
    """
    model.eval()
    if model.language is not None:
        model.language.keep_prompt()
    classes, external, device = model.config.classes, {}, next(model.parameters()).device
    if args.external_scores:
        external = load_external_scores(args.external_scores, classes, dataset.videos)
    found, lambda_lang, advantage = {v.name: [] for v in dataset.videos}, {}, {}
    for video in dataset.videos if model.language is not None else ():
        lambda_lang[video.name] = np.zeros(dataset.steps(video), np.float32)
        advantage[video.name] = np.zeros(dataset.steps(video), np.float32)
    loader = batch_loader(dataset, model.multiple, args.workers, batch_size=args.batch_size)
    for batch in tqdm(loader, "detect", leave=False, dynamic_ncols=True, disable=None):
        output = model(batch.to(device))
        for b, window in enumerate(batch.windows):
            name = window.video.name
            scores = external[name].to(device) if external else None
            segments, scores, labels = decode(output.clip(b), external_scores=scores)
            found[name].append((segments.cpu() + window.start, scores.cpu(), labels.cpu()))
            if output.advantage is not None:
                steps = slice(window.start, window.start + window.length)
                lambda_lang[name][steps] = output.lambda_lang[b, :window.length].cpu()
                advantage[name][steps] = output.advantage[b, :window.length].cpu()
    model.eval()                                                    # forgets the prompt
    return Detections(merge_windows(found, dataset, classes, args), lambda_lang, advantage)


def merge_windows(found: dict, dataset: TALDataset, classes: list, args) -> dict:
    """{video: [(segments, scores, labels) of a window]} -> predictions in seconds, after soft-NMS.

    Segments are in steps of the video; the predictions are cut at [0, duration].
    """
    predictions = {}
    for video in dataset.videos:
        parts = (torch.cat(part) for part in zip(*found[video.name]))
        segments, scores, labels = nms_per_class(*parts, args.nms_sigma, args.voting,
                                                 args.max_per_class, args.max_per_video)
        seconds = grid_to_seconds(segments.double().numpy(), video.fps, dataset.stride,
                                  dataset.num_frames)
        predictions[video.name] = {
            "segments": seconds.clip(0, video.duration), "scores": scores.numpy(),
            "labels": [classes[label] for label in labels.tolist()]}
    return predictions


def nms_per_class(segments: Tensor, scores: Tensor, labels: Tensor, sigma: float = 0.5,
                  voting: float = 0.0, max_per_class: int = 0, max_per_video: int = 200, **options):
    """Soft-NMS within each class -> segments (M, 2), scores (M,), labels (M,), best score first.

    segments (N, 2), scores (N,), labels (N,) int. voting: tIoU of `vote_segments` (0 = off).
    max_per_class, max_per_video: 0 = no limit. options: of `soft_nms`.
    """
    found = [(segments[:0], scores[:0], labels[:0])]
    for label in labels.unique():
        own = (labels == label).nonzero().squeeze(1)
        kept, decayed, picks = soft_nms(segments[own], scores[own], sigma=sigma,
                                        limit=max_per_class or max_per_video, **options)
        if voting > 0:
            kept = vote_segments(kept, segments[own], scores[own], voting)
        found.append((kept, decayed, labels[own[picks]]))
    segments, scores, labels = (torch.cat(part) for part in zip(*found))
    best = scores.argsort(descending=True, stable=True)[:max_per_video or None]
    return segments[best], scores[best], labels[best]


# ------------------------------------------------------------------------------------ the metric
def mean_average_precision(ground_truth: dict, predictions: dict, thresholds) -> dict:
    """Mean over the classes of the interpolated average precision, at each of T thresholds.

    ground_truth: {video: {"segments": (N, 2) seconds, "labels": [str]}}
    predictions:  {video: {"segments": (M, 2), "labels": [str], "scores": (M,)}}, in any order
    thresholds:   T temporal IoUs, each > 0 and <= 1

    Returns {"mAP": (T,) mean of AP over classes, "average": float, mean of mAP over thresholds,
    "AP": (T, C), "classes": C labels in alphabetical order}, all in [0, 1]. Raises InputError for
    a threshold out of range, scores that are NaN, and lists of a video that differ in length.
    """
    thresholds = np.asarray(thresholds, dtype=np.float64).reshape(-1)
    if not len(thresholds) or not np.all((thresholds > 0) & (thresholds <= 1)):
        raise InputError(f"tIoU thresholds: expected one or more numbers > 0 and <= 1, found "
                         f"{thresholds.tolist()}. Give fractions such as 0.3 0.5, not percent.")
    truth, found = by_class(ground_truth), by_class(predictions)
    classes = sorted(truth)
    AP = np.zeros((len(thresholds), len(classes)))
    for c, label in enumerate(classes):
        segments = {video: without_copies(rows) for video, rows in truth[label].items()}
        correct = match(found.get(label, {}), segments, thresholds)              # (T, M)
        AP[:, c] = average_precision(correct, sum(map(len, segments.values())))
    mAP = AP.mean(axis=1) if classes else np.zeros(len(thresholds))
    return {"mAP": mAP, "average": float(mAP.mean()), "AP": AP, "classes": classes}


def match(detections: dict, truth: dict, thresholds: np.ndarray) -> np.ndarray:
    """Which detections of one class are right, in order of score: (T, M) bool.

    detections: {video: rows [start, end, score]}. truth: {video: (N, 2)}.
    """
    scores = np.array([row[2] for rows in detections.values() for row in rows])
    rank = np.empty(len(scores), int)
    rank[scores.argsort()[::-1]] = np.arange(len(scores))     # the official toolkit's order of ties
    correct, first = np.zeros((len(thresholds), len(scores)), bool), 0
    for video, rows in detections.items():
        ranks, first = rank[first:first + len(rows)], first + len(rows)
        if video not in truth:
            continue
        segments = truth[video][::-1].copy()       # of equal IoUs the one listed last comes first
        iou = temporal_iou(np.array(rows)[:, :2], segments).numpy()              # (M', N)
        best = np.argsort(-iou, axis=1, kind="stable").tolist()
        free = np.ones((len(thresholds), len(segments)), bool)
        for m in ranks.argsort().tolist():
            for t in np.flatnonzero(thresholds <= iou[m].max()).tolist():
                for n in best[m]:
                    if iou[m, n] < thresholds[t]:
                        break
                    if free[t, n]:
                        free[t, n], correct[t, ranks[m]] = False, True
                        break
    return correct


def average_precision(correct: np.ndarray, num_gt: int) -> np.ndarray:
    """Interpolated average precision of one class, (T,) in [0, 1].

    correct: (T, M) bool, whether each detection is right, in descending order of score. num_gt:
    number of ground-truth segments, > 0. It is the area under the precision-recall curve, where the
    precision at each recall is the highest at that or a greater recall (Pascal VOC 2010). Recall
    rises by 1 / num_gt at each right detection, so the area is a sum over these.
    """
    precision = np.cumsum(correct, axis=1) / np.arange(1, correct.shape[1] + 1)  # (T, M)
    interpolated = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    return (interpolated * correct).sum(axis=1) / num_gt


def temporal_iou(a, b) -> Tensor:
    """Intersection over union of every segment of a with every segment of b: (N, M) in [0, 1].

    a: (N, 2), b: (M, 2), rows [start, end] in one unit, tensors or arrays. A segment of zero (or
    negative) length has IoU 0 with all.
    """
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    start = torch.maximum(a[:, None, 0], b[None, :, 0])
    end = torch.minimum(a[:, None, 1], b[None, :, 1])
    inter = (end - start).clamp(min=0)                                           # (N, M)
    union = (a[:, 1] - a[:, 0])[:, None] + (b[:, 1] - b[:, 0])[None] - inter
    return torch.where(inter > 0, inter / union, 0)


def by_class(entries: dict) -> dict:
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


def without_copies(rows: list) -> np.ndarray:
    """Rows [start, end, ...] of one class and video -> (N, 2), less copies of earlier ones."""
    kept = np.zeros((0, 2))
    for row in np.array(rows)[:, :2]:
        if not (np.abs(kept - row) <= SAME_SEGMENT).all(1).any():
            kept = np.vstack([kept, row])
    return kept


# ------------------------------------------------------------------------------------ commands
def main(argv=None) -> int:
    """Returns the exit code: 0, or 2 for a mistake in the flags or files."""
    args = get_args(argv)
    command = score_checkpoint
    if args.predictions:
        command = score_files
    elif args.video:
        command = find_in_video
    return commands.run_command("evaluate.py", command, args)


def get_args(argv=None):
    """The flags, see --help."""
    return commands.evaluate_args(__doc__, argv)


def open_checkpoint(args) -> tuple:
    """(model on the device, flags of its training, folder for the output of this command)."""
    path = Path(args.checkpoint)
    path = path / "checkpoint.safetensors" if path.is_dir() else path
    saved = checkpoint.read_checkpoint(path, args.lm)
    try:
        model = ActionVLM(Config(**saved.config))
    except InputError as error:
        raise InputError(f"{path}: needs the language model of its training: {error}; say where it "
                         f"is by --lm") from error
    if saved.args.ablation or saved.args.lambda_lang not in ("learned", 0.0):
        importlib.import_module("experiments.ablations").ablate(model, saved.args)
    checkpoint.restore_average(model, path, saved)
    out = Path(args.out or path.parent)
    out.mkdir(parents=True, exist_ok=True)
    return model.to(args.device), saved.args, out


def score_checkpoint(args) -> None:
    """Prints the table of a checkpoint on the test set of its training."""
    model, train_args, out = open_checkpoint(args)
    test_set = load_data(train_args, model.config.feature_dim)[1]
    predictions = detect(model, test_set, train_args).predictions
    tiou = args.tiou or train_args.tiou
    result = score(out / "result.json", test_set, predictions, tiou)
    results.write_figures(args.json, train_args.test_subset, tiou, result)


def score(path, test_set: TALDataset, predictions: dict, tiou: list) -> dict:
    """Write predictions as a result file, print their table -> `mean_average_precision`."""
    ground_truth = results.to_ground_truth(test_set.videos)
    result = mean_average_precision(ground_truth, predictions, tiou)
    results.write_result(path, predictions)
    print(results.format_table(result, tiou))
    return result


def score_files(args) -> None:
    """Prints the table of one result file."""
    ground_truth = results.load_ground_truth(args.ground_truth, args.subset)
    predictions, tiou = results.load_predictions(args.predictions), args.tiou or results.TIOU
    for note in results.doubts(ground_truth, predictions):
        print(f"note: {note}", file=sys.stderr)
    result = mean_average_precision(ground_truth, predictions, tiou)
    segments = sum(len(entry["labels"]) for entry in ground_truth.values())
    detections = sum(len(entry["labels"]) for entry in predictions.values())
    print(f"{len(ground_truth)} videos of subset {args.subset}, {len(result['classes'])} classes, "
          f"{segments} segments, {detections} detections; AP in percent at each tIoU\n")
    print(results.format_table(result, tiou))
    results.write_figures(args.json, args.subset, tiou, result)


def find_in_video(args) -> None:
    """Prints the actions found in one video, best first, and draws them to NAME.png."""
    model, train_args, out = open_checkpoint(args)
    path = Path(args.video)
    video = single_video(path, model.config.feature_dim, train_args, args.fps)
    dataset = TALDataset(
        [video], model.config.classes, train_args.window, train_args.stride, train_args.num_frames,
        image_size=train_args.image_size if model.vision else 0, resize_to=train_args.resize_to,
        frames_per_step=train_args.frames_per_step, feature_dim=model.config.feature_dim)
    detections = detect(model, dataset, train_args)
    found = detections.predictions[video.name]
    print(f"{path}: {video.duration:.1f} s; actions with a score of at least {args.min_score}:")
    for (start, end), label, confidence in zip(found["segments"], found["labels"], found["scores"]):
        if confidence >= args.min_score:
            print(f"{start:8.2f} - {end:7.2f} s  {label}  {confidence:.3f}")
    picture = out / f"{video.name}.png"
    figures.one_video(picture, video, detections, model.config.descriptions, args.min_score)
    print(f"wrote {picture}")


if __name__ == "__main__":
    sys.exit(main())
