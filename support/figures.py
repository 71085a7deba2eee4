"""figures.py - pictures: the report of a training run, and the timeline of one video (after Fig. 4 and 5)."""
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from annotations import Video
from data import open_features, read_frames

LOSSES = {"loss_cls": "classification (focal)", "loss_loc": "localization (DIoU)", "loss_tg": "text $L_{tg}$ / 10",
          "loss_adv": "advantage $L_{adv}$", "lambda_lang": r"mean $\lambda$"}


def report(path, log: list, videos: list, detections, descriptions: dict, clips: int = 2) -> None:
    """Loss curves of the run and the timelines of the first test videos.

    log: rows of log.jsonl. videos: the test set's data.Video. detections: evaluate.Detections. descriptions: {label:
    sentence}.
    """
    figure = plt.figure(figsize=(13, 3.6 + 5 * clips), layout="constrained")
    top, *rows = figure.subfigures(1 + clips, 1, height_ratios=[3.6] + [5] * clips, squeeze=False)[:, 0]
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


def boundaries(path, steps: list) -> None:
    """Fig. 6: how often each step of a window is start or end of a proposal in an answer; arrows at the eight highest.
    """
    figure, axis = plt.subplots(figsize=(9, 3), layout="constrained")
    values, counts = np.unique(np.array(steps, dtype=np.int64), return_counts=True)
    axis.bar(values, counts, width=0.9, color="tab:blue")
    for i in np.argsort(-counts, kind="stable")[:8]:
        axis.annotate(str(values[i]), (values[i], counts[i]), (0, 14), textcoords="offset points", ha="center",
                      fontsize=8, arrowprops=dict(arrowstyle="->"))
    axis.margins(y=0.25)
    axis.set(xlabel="step of the window", ylabel="boundaries", title=f"{len(steps)} boundaries in the answers")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def loss_curves(figure, log: list) -> None:
    """One panel per kind of epoch: every term, mean over the epoch."""
    panels = figure.subplots(1, 2)
    for panel, kind in zip(panels, ("vision-only", "vision-language")):
        rows = [r for r in log if r["kind"] == kind]
        for term, label in LOSSES.items():
            if rows and term in rows[0]:
                scale = 0.1 if term == "loss_tg" else 1.0
                panel.plot([r["epoch"] for r in rows], [scale * r[term] for r in rows], marker=".", label=label)
        panel.set(title=f"{kind} epochs", xlabel="epoch", ylim=(0, None))
        panel.grid(alpha=0.3)
        if rows:
            panel.legend(fontsize=8)


def timeline(figure, video: Video, detections, descriptions: dict, min_score: float = 0.3) -> None:
    """Fig. 4, 5: frames, ground truth, detections with a score of at least `min_score`, and lambda over time (seconds);
    below, what the language model was told about the actions seen."""
    found = detections.predictions[video.name]
    shown = [i for i, score in enumerate(found["scores"]) if score >= min_score][:20]
    names = sorted({*video.labels, *(found["labels"][i] for i in shown)})
    colours = {name: plt.cm.tab20(i % 20) for i, name in enumerate(names)}
    axes = figure.subplots(4, 1, sharex=True, height_ratios=[1.3, 0.7, 1.4, 1])
    told = [f"{name}: {descriptions[name]}" for name in names if descriptions.get(name)][:6]
    figure.suptitle(f"{video.name}: detections with a score of at least {min_score}", fontsize=10)
    draw_input(axes[0], video)
    draw_bars(axes[1], video.segments, video.labels, None, colours, video.fps)
    draw_bars(axes[2], found["segments"][shown], [found["labels"][i] for i in shown], found["scores"][shown], colours,
              video.fps)
    weight = detections.lambda_lang.get(video.name)
    if weight is None:
        axes[3].text(0.5, 0.5, "vision only", transform=axes[3].transAxes, ha="center", va="center")
    else:
        axes[3].plot((np.arange(len(weight)) + 0.5) * video.duration / len(weight), weight, color="black", lw=1)
    axes[3].set(ylim=(0, 1), xlim=(0, video.duration))
    axes[3].set_xlabel("\n".join(["seconds", *(line if len(line) < 170 else line[:170] + "..." for line in told)]),
                       fontsize=8)
    for axis, label in zip(axes, ("frames", "truth", "detected", r"$\lambda_{lang}$")):
        axis.set_ylabel(label, fontsize=9)


def draw_input(axis, video: Video, count: int = 16) -> None:
    """Frames of the video side by side, or the features as an image."""
    if video.path.suffix == ".npy":
        image = np.array(open_features(video.path)).T
        image = (image - image.mean(1, keepdims=True)) / (image.std(1, keepdims=True) + 1e-6)
        axis.imshow(image, aspect="auto", extent=(0, video.duration, 0, 1), cmap="RdBu", vmin=-3, vmax=3)
    else:
        frames = read_frames(video.path, (np.arange(count) + 0.5) * video.duration / count, 96)
        axis.imshow(np.concatenate(list(frames), 1), aspect="auto", extent=(0, video.duration, 0, 1))
    axis.set(yticks=[])


def draw_bars(axis, segments, labels, scores, colours, fps: float) -> None:
    """A bar per segment, each on the first row where it overlaps nothing: label, score, first and last frame."""
    ends = []
    for i in np.argsort([s[0] for s in segments]) if len(segments) else []:
        start, end = segments[i]
        row = next((r for r, last in enumerate(ends) if last <= start), len(ends))
        ends[row:row + 1] = [end]
        axis.barh(row, end - start, left=start, height=0.9, color=colours[labels[i]], edgecolor="black", lw=0.4)
        text = labels[i] if scores is None else f"{labels[i]} {scores[i]:.2f}"
        axis.text(start, row, f" {text}  {start * fps:.0f}-{end * fps:.0f}", va="center", fontsize=7, clip_on=True)
    axis.set(yticks=[], ylim=(-0.6, max(1, len(ends)) - 0.4))
