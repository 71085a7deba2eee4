"""support/figures.py - the report of a training run, the timeline of one video (Fig. 4, 5)."""
from textwrap import shorten

import matplotlib.figure
import numpy as np

from support.annotations import Video
from support.video import FEATURE_SUFFIXES, open_joined, read_frames

LOSSES = {"loss_cls": "classification (focal)", "loss_loc": "localization (DIoU)",
          "loss_tg": "$L_{tg}$ / 10", "loss_adv": "$L_{adv}$", "lambda_lang": r"mean $\lambda$"}

def report(path, log: list, videos: list, detections, descriptions: dict) -> None:
    """Loss curves, means over each epoch of a kind, and timelines of the first two test videos.
    log: rows of log.jsonl. detections: evaluate.Detections. descriptions: {label: sentence}."""
    figure = matplotlib.figure.Figure(figsize=(13, 13.6), layout="constrained")
    top, *timelines = figure.subfigures(3, 1, height_ratios=[3.6, 5, 5])
    for panel, kind in zip(top.subplots(1, 2), ("vision-only", "vision-language")):
        panel.grid(alpha=0.3)
        rows = [row for row in log if row["kind"] == kind]
        for term, label in LOSSES.items():
            if rows and term in rows[0]:
                scale = 0.1 if term == "loss_tg" else 1.0
                values = [scale * row[term] for row in rows]
                panel.plot([row["epoch"] for row in rows], values, marker=".", label=label)
                panel.legend(fontsize=8)
        panel.set(title=f"{kind} epochs", xlabel="epoch", ylim=(0, None))
    for row, video in zip(timelines, videos):
        timeline(row, video, {"detected": detections}, descriptions, min_score=0.3)
    figure.savefig(path, dpi=90)

def one_video(path, video: Video, found: dict, descriptions: dict, min_score: float) -> None:
    """The timeline of one video as a picture of its own. found: see `timeline`."""
    figure = matplotlib.figure.Figure(figsize=(13, 3.6 + 1.4 * len(found)), layout="constrained")
    timeline(figure, video, found, descriptions, min_score)
    figure.savefig(path, dpi=90)

def timeline(figure, video: Video, found: dict, descriptions: dict, min_score: float) -> None:
    """Fig. 4, 5: frames or features, truth, a row per model, lambda of the last, descriptions.
    found: {title: evaluate.Detections}. A class has one colour in all pictures of a run."""
    names = [*descriptions, "action"]                # the latter of a class-agnostic head
    colours = {name: matplotlib.colormaps["tab20"](i % 20) for i, name in enumerate(names)}
    figure.suptitle(f"{video.name}: detections with a score of at least {min_score}", fontsize=10)
    heights = [1.3, 0.7, *[1.4] * len(found), 1]
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for axis, label in zip(axes, ("frames", "truth", *found, r"$\lambda_{lang}$")):
        axis.set_ylabel(label, fontsize=9)
    if video.path.suffix.lower() in FEATURE_SUFFIXES:
        rows = open_joined(video)
        image = ((rows - rows.mean(0)) / (rows.std(0) + 1e-6)).T
    else:
        times = (np.arange(16) + 0.5) * video.duration / 16
        image = np.concatenate(read_frames(video.path, times, short_side=96), 1)
    size = dict(aspect="auto", extent=(0, video.duration, 0, 1))
    axes[0].imshow(image, "RdBu", vmin=-3, vmax=3, **size)
    axes[0].set(yticks=[])
    draw_bars(axes[1], video.segments, video.labels, video.labels, colours, video.fps)
    names = set(video.labels)
    for axis, detections in zip(axes[2:], found.values()):
        rows = detections.predictions[video.name]
        shown = [i for i, score in enumerate(rows["scores"]) if score >= min_score][:20]
        labels = [rows["labels"][i] for i in shown]
        names.update(labels)
        texts = [f"{label} {rows['scores'][i]:.2f}" for label, i in zip(labels, shown)]
        draw_bars(axis, rows["segments"][shown], labels, texts, colours, video.fps)
    told = [shorten(f"{name}: {descriptions.get(name)}", 170) for name in sorted(names)]
    axis = axes[-1]
    axis.set(xlim=(0, video.duration))
    axis.set_xlabel("\n".join(["seconds", *told[:6]]), fontsize=8)
    weight = detections.lambda_lang.get(video.name)
    if weight is None:
        axis.text(0.5, 0.5, "vision only", transform=axis.transAxes, ha="center", va="center")
        return
    seconds = (np.arange(len(weight)) + 0.5) * video.duration / len(weight)
    axis.plot(seconds, weight, color="black", lw=1)
    axis.set_ylim(0, 1.05 * max(weight.max(), 1e-6))         # it ends at the highest lambda
    beside = axis.twinx()
    beside.plot(seconds, detections.advantage[video.name], color="tab:blue", lw=0.7)
    beside.set_ylabel("predicted advantage", fontsize=7, color="tab:blue")

def draw_bars(axis, segments, labels: list, texts: list, colours: dict, fps: float) -> None:
    """A bar per segment on the first free row, with its text, first and last frame."""
    ends = []                                     # of the last bar on each row, seconds
    for i in np.argsort(segments[:, 0]):
        start, end = segments[i]
        row = next((r for r, last in enumerate(ends) if last <= start), len(ends))
        ends[row:row + 1] = [end]
        axis.barh(row, end - start, 0.9, start, color=colours[labels[i]], ec="black", lw=0.4)
        text = f" {texts[i]}  {start * fps:.0f}-{end * fps:.0f}"
        axis.text(start, row, text, va="center", fontsize=7, clip_on=True)
    axis.set(yticks=[], ylim=(-0.6, max(1, len(ends)) - 0.4))
