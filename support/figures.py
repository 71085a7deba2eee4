"""support/figures.py - the report of a training run, the timeline of one video (Fig. 4, 5)."""
import matplotlib.pyplot as plt
import numpy as np

from support.annotations import Video
from support.video import open_features, read_frames

plt.switch_backend("Agg")          # pictures go to files: no window, no screen
LOSSES = {"loss_cls": "classification (focal)", "loss_loc": "localization (DIoU)",
          "loss_tg": "text $L_{tg}$ / 10", "loss_adv": "advantage $L_{adv}$",
          "lambda_lang": r"mean $\lambda$"}


def report(path, log: list, videos: list, detections, descriptions: dict, clips: int = 2) -> None:
    """Loss curves of the run and the timelines of the first test videos.

    log: rows of log.jsonl. videos: the Video list of the test set. detections:
    evaluate.Detections. descriptions: {label: sentence}. clips: number of timelines.
    """
    figure = plt.figure(figsize=(13, 3.6 + 5 * clips), layout="constrained")
    heights = [3.6] + [5] * clips
    top, *rows = figure.subfigures(1 + clips, 1, height_ratios=heights, squeeze=False)[:, 0]
    loss_curves(top, log)
    for row, video in zip(rows, videos):
        timeline(row, video, detections, descriptions)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def one_video(path, video: Video, detections, descriptions: dict, min_score: float) -> None:
    """The timeline of one video as a picture of its own."""
    figure = plt.figure(figsize=(13, 5), layout="constrained")
    timeline(figure, video, detections, descriptions, min_score)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def loss_curves(figure, log: list) -> None:
    """One panel per kind of epoch: every term, mean over the epoch."""
    panels = figure.subplots(1, 2)
    for panel, kind in zip(panels, ("vision-only", "vision-language")):
        rows = [row for row in log if row["kind"] == kind]
        epochs = [row["epoch"] for row in rows]
        for term, label in LOSSES.items():
            if rows and term in rows[0]:
                scale = 0.1 if term == "loss_tg" else 1.0
                values = [scale * row[term] for row in rows]
                panel.plot(epochs, values, marker=".", label=label)
        panel.set(title=f"{kind} epochs", xlabel="epoch", ylim=(0, None))
        panel.grid(alpha=0.3)
        if rows:
            panel.legend(fontsize=8)


def timeline(figure, video: Video, detections, descriptions: dict, min_score: float = 0.3) -> None:
    """Fig. 4, 5: frames, ground truth, detections and lambda over time (seconds).

    Only detections with a score of at least `min_score` are drawn. Below stand the descriptions
    that the language model was given for the actions in the picture.
    """
    found = detections.predictions[video.name]
    shown = [i for i, score in enumerate(found["scores"]) if score >= min_score][:20]
    labels = [found["labels"][i] for i in shown]
    names = sorted({*video.labels, *labels})
    colours = {name: plt.cm.tab20(i % 20) for i, name in enumerate(names)}
    axes = figure.subplots(4, 1, sharex=True, height_ratios=[1.3, 0.7, 1.4, 1])
    figure.suptitle(f"{video.name}: detections with a score of at least {min_score}", fontsize=10)
    draw_input(axes[0], video)
    draw_bars(axes[1], video.segments, video.labels, None, colours, video.fps)
    draw_bars(axes[2], found["segments"][shown], labels, found["scores"][shown], colours,
              video.fps)
    weight = detections.lambda_lang.get(video.name)
    if weight is None:
        axes[3].text(0.5, 0.5, "vision only", transform=axes[3].transAxes, ha="center",
                     va="center")
    else:
        seconds = (np.arange(len(weight)) + 0.5) * video.duration / len(weight)
        axes[3].plot(seconds, weight, color="black", lw=1)
    axes[3].set(ylim=(0, 1), xlim=(0, video.duration))
    lines = ["seconds"]
    told = [f"{name}: {descriptions[name]}" for name in names if descriptions.get(name)]
    for line in told[:6]:
        lines.append(line if len(line) < 170 else line[:170] + "...")
    axes[3].set_xlabel("\n".join(lines), fontsize=8)
    for axis, label in zip(axes, ("frames", "truth", "detected", r"$\lambda_{lang}$")):
        axis.set_ylabel(label, fontsize=9)


def draw_input(axis, video: Video, count: int = 16) -> None:
    """`count` frames of the video side by side, or the features as an image."""
    extent = (0, video.duration, 0, 1)
    if video.path.suffix == ".npy":
        image = np.array(open_features(video.path)).T
        mean, deviation = image.mean(1, keepdims=True), image.std(1, keepdims=True)
        image = (image - mean) / (deviation + 1e-6)
        axis.imshow(image, aspect="auto", extent=extent, cmap="RdBu", vmin=-3, vmax=3)
    else:
        times = (np.arange(count) + 0.5) * video.duration / count
        frames = read_frames(video.path, times, 96)
        axis.imshow(np.concatenate(list(frames), 1), aspect="auto", extent=extent)
    axis.set(yticks=[])


def draw_bars(axis, segments, labels, scores, colours, fps: float) -> None:
    """A bar for each segment, on the first row where it overlaps nothing.

    A bar shows label, score (if there are scores), first and last frame.
    """
    ends = []                                     # of the last bar on each row, seconds
    order = np.argsort([start for start, _ in segments]) if len(segments) else []
    for i in order:
        start, end = segments[i]
        row = next((r for r, last in enumerate(ends) if last <= start), len(ends))
        ends[row:row + 1] = [end]
        axis.barh(row, end - start, left=start, height=0.9, color=colours[labels[i]],
                  edgecolor="black", lw=0.4)
        text = labels[i]
        if scores is not None:
            text += f" {scores[i]:.2f}"
        text = f" {text}  {start * fps:.0f}-{end * fps:.0f}"
        axis.text(start, row, text, va="center", fontsize=7, clip_on=True)
    axis.set(yticks=[], ylim=(-0.6, max(1, len(ends)) - 0.4))
