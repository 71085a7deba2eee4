"""data.py - videos or features, annotations and descriptions -> batches of windows (paper §4.1 and "Limitation").

A video is cut into windows of at most L steps. One step ("frame" in the paper) is one decoded frame of every
`stride` (end to end), or one row of a feature file. Segments are kept in two units only: seconds (in `Video`, in
files) and grid units (in `Window`, `Batch`, in the head), where grid unit l is step l of the window:

    grid = seconds * fps / stride - 0.5 * num_frames / stride

`num_frames` is the length of the snippet that one feature sees (16 for I3D); 0 end to end. A video that is resized to
R steps (ActivityNet) has the same formula with fps = R / duration, stride 1 and num_frames 1.
"""
import math
import os
import re
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, get_worker_info

from annotations import InputError, Video, load_annotations, load_descriptions       # noqa: F401, part of data
from demo import make_demo                                                           # noqa: F401

HERE = Path(__file__).parent
EPIC = dict(
    train_subset="training", test_subset="validation", window=768, stride=16, num_frames=16, frames_per_step=8, fps=30,
    image_size=160, resize=182, min_overlap=0.3, batch_size=2, width=512, levels=6, head_window=0, epochs=120,
    ranges=[[0, 4], [2, 8], [4, 16], [8, 32], [16, 64], [32, 1e4]], tiou=[0.1, 0.2, 0.3, 0.4, 0.5], nms_sigma=0.4,
    voting=0.75, max_per_video=2000, workers=4)
# One plain dict of train.py's flags per data set, end to end; a flag on the command line wins.
PRESETS = {
    "custom": {},
    "demo": dict(
        videos="data/demo/videos", annotations="data/demo/annotations.json",
        descriptions="data/demo/descriptions.json", train_subset="training", test_subset="test",
        stride=1, window=128, image_size=32, resize=36, min_overlap=0.75, levels=5, width=128, head_window=0, prior=0.1,
        epochs=16, warmup_epochs=2, batch_size=2, lr=3e-4, lr_vision=7e-4, lr_lm=1e-3, lora_rank=8, lora_alpha=16,
        ema=0.98),
    "thumos14": dict(
        descriptions=str(HERE / "descriptions/thumos14.json"), train_subset="validation", test_subset="test",
        leave_out=["video_test_0000270", "video_test_0001292"],       # their annotations are known to be wrong
        window=768, stride=4, num_frames=0, image_size=160, resize=182, min_overlap=0.75, batch_size=1, width=512,
        levels=6, head_window=0, epochs=120, tiou=[0.3, 0.4, 0.5, 0.6, 0.7], nms_sigma=0.7, voting=0.7,
        max_per_class=200, max_per_video=2000, workers=4),
    "activitynet": dict(
        descriptions=str(HERE / "descriptions/activitynet.json"), train_subset="training", test_subset="validation",
        resize_to=192, frames_per_step=4, window=192, image_size=160, resize=182, batch_size=4, width=256, levels=6,
        head_window=0, epochs=120, tiou=[0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95], nms_sigma=0.7,
        voting=0.9, max_per_video=100, workers=4),
    "epic-verb": dict(EPIC, descriptions=str(HERE / "descriptions/epic_verb.json"), labels="verb"),
    "epic-noun": dict(EPIC, descriptions=str(HERE / "descriptions/epic_noun.json"), labels="noun"),
}
# What is different with --features: the lengths that the features were extracted with.
EPIC_FEATURES = dict(window=2304, num_frames=32, frames_per_step=1, head_window=19)
FEATURE_PRESETS = {
    "thumos14": dict(window=2304, num_frames=16, fps=30, min_overlap=0.5, head_window=19, nms_sigma=0.5,
                     max_per_class=0, max_per_video=200),
    "activitynet": dict(frames_per_step=1, label_smoothing=0.1),
    "epic-verb": EPIC_FEATURES,
    "epic-noun": EPIC_FEATURES,
}


@dataclass
class Window:
    """L' <= L consecutive steps of a video, from step `start`; segments in grid units relative to `start`."""
    video: Video
    start: int
    length: int             # L'
    inputs: torch.Tensor    # (L' k, 3, H, W) uint8, k frames a step, or (L', V) features
    segments: torch.Tensor  # (N, 2) grid units
    labels: torch.Tensor    # (N,) class indices


@dataclass
class Batch:
    """B windows padded to one length L. `mask` is True on real steps; padding is zeros and counts nowhere."""
    inputs: torch.Tensor    # (B, L k, 3, H, W) uint8, k frames a step, or (B, L, V) float
    mask: torch.Tensor      # (B, L) bool
    segments: list          # B tensors (N_b, 2), grid units
    labels: list            # B tensors (N_b,), class indices
    windows: list           # the B windows, without their inputs; they stay on the CPU
    padded: bool = True     # False: `mask` is True everywhere

    def to(self, device) -> "Batch":
        """The same batch with its tensors on `device`."""
        return self.map(partial(send, device=device))

    def pin_memory(self) -> "Batch":
        """The same batch in memory that a GPU copies from without waiting; DataLoader calls it."""
        return self.map(torch.Tensor.pin_memory)

    def map(self, change) -> "Batch":
        """The same batch with `change` done to each tensor."""
        return Batch(change(self.inputs), change(self.mask), [change(s) for s in self.segments],
                     [change(l) for l in self.labels], self.windows, self.padded)


def send(tensor: torch.Tensor, device) -> torch.Tensor:
    """The tensor on `device`; from pinned memory, or the copy would wait for all that the GPU has still to do."""
    pinned = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)


def collate(windows: list, multiple: int) -> Batch:
    """Pad windows to the longest of them, rounded up to `multiple` (what the pyramid and the encoder divide by)."""
    lengths = torch.tensor([w.length for w in windows])
    L = -(-int(lengths.max()) // multiple) * multiple
    k = len(windows[0].inputs) // windows[0].length                              # frames a step
    inputs = torch.stack([torch.cat([w.inputs, w.inputs.new_zeros(k * (L - w.length), *w.inputs.shape[1:])])
                          for w in windows])
    return Batch(inputs, torch.arange(L)[None] < lengths[:, None], [w.segments for w in windows],
                 [w.labels for w in windows], [replace(w, inputs=None) for w in windows], int(lengths.min()) < L)


class TALDataset(Dataset):
    """Windows of videos. Training: one random window per video and epoch. Test: sliding windows over every step.

    Randomness depends on (seed, epoch, index) alone, so that a resumed run sees the same windows.

    videos: list of Video with `path` set. classes: label names in the order of the class index.
    window: L, in steps. stride: frames per step. num_frames: frames that one feature sees.
    min_overlap: a segment stays in a training window if at least this share of it is inside.
    image_size: 0 reads features (.npy, (T, V)); otherwise frames are read and cropped to image_size².
    resize: short side before the crop in training (random resized crop, flip, colour jitter).
    frames_per_step: frames read per step, at even distances over it.
    resize_to: steps that every whole video is resized to, as its one window; takes the place of window, stride,
        num_frames and of the videos' fps. 0 = off.
    feature_dim: V that feature files have to have; 0 = any.
    """

    def __init__(self, videos, classes, window, stride=1, num_frames=0, training=False, min_overlap=0.5,
                 image_size=0, resize=0, seed=0, overlap=0.5, frames_per_step=1, resize_to=0, feature_dim=0):
        if resize_to:                                            # step l is centred on (l + 0.5) / R of the duration
            window, stride, num_frames = resize_to, 1, 1
            videos = [replace(v, fps=resize_to / v.duration) for v in videos]
        self.frames_per_step, self.resize_to, self.feature_dim = frames_per_step, resize_to, feature_dim
        self.videos, self.classes, self.L = videos, {c: i for i, c in enumerate(classes)}, window
        self.stride, self.num_frames, self.training = stride, num_frames, training
        self.min_overlap, self.image_size, self.resize, self.seed = min_overlap, image_size, resize, seed
        self.epoch = 0
        self.reading = torch.zeros(256, 2, dtype=torch.long).share_memory_()     # (pid, index) of each worker process
        self.items = [(v, 0) for v in videos] if training else [
            (v, start) for v in videos for start in window_starts(self.steps(v), window, overlap)]

    def __len__(self):
        return len(self.items)

    def share(self, rank: int, processes: int) -> "TALDataset":
        """The part of one of several processes: every so many-th video, with all of its windows."""
        part = copy(self)
        part.videos = self.videos[rank::processes]
        names = {v.name for v in part.videos}
        part.items = [item for item in self.items if item[0].name in names]
        return part

    def steps(self, video: Video) -> int:
        """Number of steps T of a video: rows of its feature file, or frames at `stride` within its duration."""
        if self.resize_to:
            return self.resize_to
        if self.image_size == 0:
            return open_features(video.path).shape[0]
        return max(1, int(video.duration * video.fps / self.stride + 1e-6))

    def __getitem__(self, index: int) -> Window:
        worker = get_worker_info()
        if worker:
            self.reading[worker.id % 256] = torch.tensor([os.getpid(), index])
        video, start = self.items[index]
        rng = np.random.default_rng([self.seed, self.epoch, index])
        T, offset = self.steps(video), 0.5 * self.num_frames / self.stride
        grid = seconds_to_grid(video.segments, video.fps, self.stride, self.num_frames)
        length = min(self.L, T - start)
        if self.training and not self.resize_to:
            start, length = random_window(T, self.L, grid, self.min_overlap, offset, rng)
        segments, kept = truncate_segments(grid, start, length, offset, self.min_overlap if self.training else 0.0)
        labels = [self.classes[video.labels[i]] for i in kept]
        inputs = self.read_clip(video, start, length, rng) if self.image_size else self.read_rows(video, start, length)
        return Window(video, start, length, inputs, torch.tensor(segments, dtype=torch.float32).reshape(-1, 2),
                      torch.tensor(labels, dtype=torch.long))

    def read_rows(self, video, start, length):
        """(length, V) float32 rows of the feature file; all of them interpolated to `length` with resize_to."""
        chosen = slice(None) if self.resize_to else slice(start, start + length)
        with np.errstate(over="ignore"):                         # what is too large for float32 is reported below
            rows = np.array(open_features(video.path, self.feature_dim)[chosen], dtype=np.float32)
        bad = ~np.isfinite(rows).all(1)
        if bad.any():
            first = bad.argmax() + (0 if self.resize_to else start)
            raise InputError(f"{video.path}: expected finite features, found NaN or infinity in {bad.sum()} rows, the "
                             f"first is row {first}; extract this video again or leave it out")
        rows = torch.from_numpy(rows)
        return F.interpolate(rows.T[None], length, mode="linear")[0].T if self.resize_to else rows

    def read_clip(self, video, start, length, rng):
        """(length * frames_per_step, 3, image_size, image_size) uint8: augmented in training, else centre-cropped."""
        within = (np.arange(self.frames_per_step) + 0.5) / self.frames_per_step - 0.5            # around the step
        grid = (start + np.arange(length)[:, None] + within).ravel()
        times = grid_to_seconds(grid, video.fps, self.stride, self.num_frames)
        frames = read_frames(video.path, times, self.resize if self.training else self.image_size)
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)                                   # (L', 3, h, w)
        return augment(frames, self.image_size, rng) if self.training else centre_crop(frames, self.image_size)


def batch_loader(dataset, multiple: int, workers: int, **order) -> DataLoader:
    """Batches for a model that needs lengths of a `multiple`, read by `workers` processes (0: by this one).

    order: DataLoader's batch_size or batch_sampler, and generator. The workers start anew with every pass over it, and
    so see the dataset's epoch.
    """
    return DataLoader(dataset, num_workers=workers, collate_fn=partial(collate, multiple=multiple),
                      pin_memory=torch.cuda.is_available(), worker_init_fn=leave_group, **order)


def leave_group(worker: int) -> None:
    """Ctrl-C goes to a whole group of processes: a worker outside of it goes on, so that the step can be finished."""
    os.setpgrp()


@contextmanager
def dead_workers_named(dataset: TALDataset):
    """A worker process that dies (out of memory, a crash in a decoder) is an InputError with the video it was reading.

    torch raises a RuntimeError then, wherever this process is: the block has to hold all that is done with the batches.
    """
    try:
        yield
    except RuntimeError as error:
        died = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", str(error))
        if not died:
            raise
        pids = {int(pid) for pid in died[1].split(",")}
        names = sorted({dataset.items[index][0].name for pid, index in dataset.reading.tolist() if pid in pids})
        raise InputError(f"--workers: a process that reads data {died[2].split('. ')[0]}; it was reading video "
                         f"{' and '.join(names) or '(none yet)'}: look whether the file is broken, or the memory is "
                         f"full (then fewer --workers)") from error


def doubt_steps(dataset: TALDataset) -> list:
    """A sentence, if feature files do not have the number of rows that duration, fps and stride make one expect."""
    if dataset.image_size or dataset.resize_to:
        return []
    ratio = float(np.median([dataset.steps(v) * dataset.stride / (v.duration * v.fps) for v in dataset.videos]))
    return [] if 0.8 < ratio < 1.25 else [
        f"feature files have {ratio:.2f} times the rows of duration * fps / stride (median of the test set); segments "
        f"are then in the wrong place: check --stride, and fps in the annotations or --fps"]


def process_rank() -> tuple:
    """(number of this process, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_all(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """total (any shape) / count (), of what this process has; 0 if none. With several processes, whose gradients are
    averaged: so that the average over processes is the mean over what all of them have, however unevenly."""
    processes = process_rank()[1]
    if processes > 1:
        count = count.clone()
        dist.all_reduce(count)
    return total / count.clamp(min=1) * processes


def seconds_to_grid(seconds, fps: float, stride: int, num_frames: int):
    """Seconds -> grid units: s·fps/stride - 0.5·num_frames/stride (any shape)."""
    return seconds * fps / stride - 0.5 * num_frames / stride


def grid_to_seconds(grid, fps: float, stride: int, num_frames: int):
    """Grid units -> seconds, the inverse of `seconds_to_grid`."""
    return (grid * stride + 0.5 * num_frames) / fps


def window_starts(T: int, L: int, overlap: float) -> list:
    """First steps of the sliding windows that cover steps 0..T-1; the last one ends at the last step."""
    if T <= L:
        return [0]
    hop = max(1, round(L * (1 - overlap)))
    return [*range(0, T - L, hop), T - L]


def truncate_segments(segments: np.ndarray, start: int, length: int, offset: float, min_overlap: float):
    """Segments (N, 2) of the whole video -> those of the window [start, start + length), shifted by -start.

    They are cut at `offset` beyond the window (a feature sees that far) and stay if at least `min_overlap` of their
    length is left. Returns (segments (M, 2), indices of the kept ones (M,)). Grid units throughout.
    """
    lo, hi = start - offset, start + length + offset
    cut = np.clip(segments, lo, hi)
    inside = cut[:, 1] - cut[:, 0]
    kept = np.flatnonzero((inside > 0) & (inside >= min_overlap * (segments[:, 1] - segments[:, 0])))
    return cut[kept] - start, kept


def random_window(T, L, segments, min_overlap, offset, rng, crop=(0.9, 1.0), tries=200):
    """A training window (start, length): L random steps of a long video, a crop of 90-100% of a short one.

    Drawn again until it holds an action, if the video has any.
    """
    length = L if T > L else int(rng.integers(max(1, round(crop[0] * T)), max(1, round(crop[1] * T)) + 1))
    for _ in range(tries):
        start = int(rng.integers(0, T - length + 1))
        if not len(segments) or len(truncate_segments(segments, start, length, offset, min_overlap)[1]):
            break
    return start, length


def augment(frames: torch.Tensor, size: int, rng) -> torch.Tensor:
    """Random resized crop, horizontal flip, brightness, contrast and colour gains: one draw for the whole window.

    frames: (T, 3, h, w) uint8 -> (T, 3, size, size) uint8.
    """
    h, w = frames.shape[-2:]
    side = int(rng.integers(min(size, h, w), min(h, w) + 1))                    # never enlarged
    y, x = rng.integers(0, h - side + 1), rng.integers(0, w - side + 1)
    frames = resize(frames[..., y:y + side, x:x + side], size)
    if rng.random() < 0.5:
        frames = frames.flip(-1)
    gain = rng.uniform(0.8, 1.2) * rng.uniform(0.9, 1.1, 3)                      # contrast · colour
    table = np.clip((np.arange(256) - 128) * gain[:, None] + 128 + rng.uniform(-25, 25), 0, 255).astype(np.uint8)
    return torch.from_numpy(np.stack([table[c].take(frames[:, c].numpy()) for c in range(3)], 1))  # jitter: a look-up


def centre_crop(frames: torch.Tensor, size: int) -> torch.Tensor:
    """(T, 3, h, w) with short side `size` -> (T, 3, size, size)."""
    h, w = frames.shape[-2:]
    y, x = (h - size) // 2, (w - size) // 2
    return frames[..., y:y + size, x:x + size].contiguous()


def resize(frames: torch.Tensor, size: int) -> torch.Tensor:
    """(T, 3, h, w) uint8 -> (T, 3, size, size) uint8, antialiased."""
    return F.interpolate(frames, (size, size), mode="bilinear", antialias=True)


# ------------------------------------------------------------------------------------------------ files
def read_frames(path, times: np.ndarray, short_side: int) -> np.ndarray:
    """The frames shown at `times` (ascending seconds from the start of the video), short side scaled to `short_side`.

    Frame times are those of the file: the frame rate may vary, and the first frame is second 0. Seeks to the key frame
    before the first time, so a window deep inside a long video costs as much as one at the start. Times after the last
    frame get the last frame (durations in annotation files are rounded), unless the file says that it is longer,
    or more than half of the times lie past its end.
    Returns (N, h, w, 3) uint8 RGB. Raises InputError naming the file if it cannot be decoded.
    """
    import av
    out, last, shown = [], None, -math.inf
    scaler = av.video.reformatter.VideoReformatter()                 # one for all frames: making one costs most
    try:
        with av.open(str(path), metadata_errors="replace") as container:       # titles in any encoding
            stream = container.streams.video[0]
            tick, start = float(stream.time_base), stream.start_time or 0
            half = 0.5 / float(stream.average_rate or 30)
            if times[0] > 1:             # a second early: seeking goes by decoding times, which B-frames put before pts
                container.seek(int(start + (times[0] - 1) / tick), stream=stream)
            for frame in container.decode(stream):
                shown, before = (frame.pts - start) * tick, shown
                if shown < before:                                       # AVI with B-frames
                    raise TypeError
                until = shown - min(half, (shown - before) / 2)          # times are rounded: the nearer frame counts
                while last is not None and len(out) < len(times) and times[len(out)] <= until:
                    last = to_rgb(last, short_side, scaler)              # shown until `frame` comes
                    out.append(last)
                if len(out) == len(times):
                    break
                last = frame
            if last is not None:
                last = to_rgb(last, short_side, scaler)
            seconds = (container.duration or 0) / 1e6
    except (av.error.FFmpegError, IndexError, OSError, TypeError) as error:
        raise unreadable(path, error) from error
    if last is None:
        raise InputError(f"{path}: expected frames from second {times[0]:.2f} on, found none; "
                         f"check the file, and duration and fps in the annotations")
    if len(out) < len(times) and shown + max(1, 0.1 * seconds) < min(times[-1], seconds):
        raise InputError(f"{path}: expected {seconds:.1f} s, as the file says, found frames up to {shown:.1f} s; "
                         f"it is cut off or broken: get it again or leave it out")
    if times[len(times) // 2] > max(shown, seconds) + 1:
        raise InputError(f"{path}: expected frames up to second {times[-1]:.1f}, found the last at second {shown:.1f}; "
                         f"correct its duration in the annotations, or leave it out with --leave-out")
    return np.stack(out + [last] * (len(times) - len(out)))


def to_rgb(frame, short_side: int, scaler) -> np.ndarray:
    """A decoded PyAV frame -> (h, w, 3) uint8, upright, short side scaled to `short_side`. An array stays as it is."""
    if isinstance(frame, np.ndarray):
        return frame
    scale = short_side / min(frame.width, frame.height)
    w, h = max(short_side, round(frame.width * scale)), max(short_side, round(frame.height * scale))
    kind = "AREA" if scale < 1 else "BILINEAR"
    image = scaler.reformat(frame, w, h, "rgb24", interpolation=kind, threads=1).to_ndarray()
    return np.rot90(image, round(frame.rotation / 90))


def probe(path) -> tuple:
    """(duration in seconds, frames per second) of a video file."""
    import av
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate)
            seconds = float(stream.duration * stream.time_base) if stream.duration else container.duration / 1e6
            if not (0 < seconds <= 1e6 and 0 < fps <= 1000):
                raise ValueError(f"{seconds:g} s of {fps:g} frames a second")
            return seconds, fps
    except (av.error.FFmpegError, IndexError, OSError, TypeError, ValueError) as error:
        raise unreadable(path, error) from error


def unreadable(path, error) -> InputError:
    """What is wrong with a video file, by what PyAV or our reading of it raised."""
    known = {IndexError: "no video stream", TypeError: "frames without rate or times, or not in order of time"}
    found = known.get(type(error), error)
    return InputError(f"{path}: expected a video that PyAV can decode, found: {found}; "
                      f"re-encode it (ffmpeg -i in -c:v libx264 out.mp4) or leave it out")


def open_features(path, width: int = 0) -> np.ndarray:
    """A feature file (T, V) of real numbers as a memory map, V = width unless that is 0; never unpickles."""
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:                             # a damaged header can fail in any way
        raise InputError(f"{path}: expected a .npy file with an array (T, V), found: {error}; "
                         f"extract this video again or leave it out") from error
    if rows.ndim != 2 or 0 in rows.shape:
        raise InputError(f"{path}: expected an array (T, V) with at least one row, found shape {rows.shape}")
    if rows.dtype.kind not in "fiu":
        raise InputError(f"{path}: expected real numbers, found an array of {rows.dtype}")
    if width and rows.shape[1] != width:
        raise InputError(f"{path}: expected {width} columns as in the first training video (or in the run's), found "
                         f"{rows.shape[1]}; extract all videos by the same encoder")
    return rows
