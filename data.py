"""data.py - videos or features, annotations and descriptions -> batches of windows (paper §4.1 and "Limitation").

A video is cut into windows of at most L steps. One step ("frame" in the paper) is one decoded frame of every
`stride` (end to end), or one row of a feature file. Segments are kept in two units only: seconds (in `Video`, in
files) and grid units (in `Window`, `Batch`, in the head), where grid unit l is step l of the window:

    grid = seconds * fps / stride - 0.5 * num_frames / stride

`num_frames` is the length of the snippet that one feature sees (16 for I3D); 0 end to end. A video that is resized to
R steps (ActivityNet) has the same formula with fps = R / duration, stride 1 and num_frames 1.
"""
import csv
import gzip
import json
import math
from collections import Counter
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import Dataset

from demo import make_demo                  # noqa: F401, one of the data sets

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")

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


class InputError(ValueError):
    """A mistake in a file or flag of the user's; the message says where, what was expected, found, and what to do."""

    def __str__(self):
        """The message alone: from a worker process, torch's DataLoader brings it at the end of a traceback."""
        return super().__str__().rpartition("data.InputError: ")[2].rstrip()


@dataclass
class Video:
    """One untrimmed video: where it is, how long it is (seconds), and its actions (seconds, label names)."""
    name: str
    duration: float
    fps: float
    subset: str = ""
    segments: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))   # (N, 2) seconds
    labels: list = field(default_factory=list)                              # N names
    path: Path | None = None                                                # video or feature file


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
    windows: list           # the B windows, without their inputs
    padded: bool = True     # False: `mask` is True everywhere
    truth: list | None = None    # [(segments, labels)] on the CPU, which `to` leaves there

    def to(self, device) -> "Batch":
        """The same batch with its tensors on `device`."""
        return Batch(send(self.inputs, device), send(self.mask, device), [send(s, device) for s in self.segments],
                     [send(l, device) for l in self.labels], self.windows, self.padded,
                     self.truth or list(zip(self.segments, self.labels)))


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
    """

    def __init__(self, videos, classes, window, stride=1, num_frames=0, training=False, min_overlap=0.5,
                 image_size=0, resize=0, seed=0, overlap=0.5, frames_per_step=1, resize_to=0):
        if resize_to:                                            # step l is centred on (l + 0.5) / R of the duration
            window, stride, num_frames = resize_to, 1, 1
            videos = [replace(v, fps=resize_to / v.duration) for v in videos]
        self.frames_per_step, self.resize_to = frames_per_step, resize_to
        self.videos, self.classes, self.L = videos, {c: i for i, c in enumerate(classes)}, window
        self.stride, self.num_frames, self.training = stride, num_frames, training
        self.min_overlap, self.image_size, self.resize, self.seed = min_overlap, image_size, resize, seed
        self.epoch = 0
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
        rows = np.array(open_features(video.path)[chosen], dtype=np.float32)
        if not np.isfinite(rows).all():
            raise InputError(f"{video.path}: expected finite features, found NaN or infinity in rows "
                             f"{start}-{start + len(rows) - 1}; extract this video again or leave it out")
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


def process_rank() -> tuple:
    """(number of this process, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


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
    frame get the last frame (durations in annotation files are rounded), unless the file says that it is longer.
    Returns (N, h, w, 3) uint8 RGB. Raises InputError naming the file if it cannot be decoded.
    """
    import av
    out, last, shown = [], None, -math.inf
    scaler = av.video.reformatter.VideoReformatter()                 # one for all frames: making one costs most
    try:
        with av.open(str(path)) as container:
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
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            fps = float(stream.average_rate)
            seconds = float(stream.duration * stream.time_base) if stream.duration else container.duration / 1e6
            return seconds, fps
    except (av.error.FFmpegError, IndexError, OSError, TypeError) as error:
        raise unreadable(path, error) from error


def unreadable(path, error) -> InputError:
    """What is wrong with a video file, by what PyAV or our reading of it raised."""
    known = {IndexError: "no video stream", TypeError: "frames without times, or not in order of time"}
    found = known.get(type(error), error)
    return InputError(f"{path}: expected a video that PyAV can decode, found: {found}; "
                      f"re-encode it (ffmpeg -i in -c:v libx264 out.mp4) or leave it out")


def open_features(path) -> np.ndarray:
    """A feature file (T, V) as a memory map; never unpickles."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: expected a .npy file with an array (T, V), found: {error}") from error
    if rows.ndim != 2 or 0 in rows.shape:
        raise InputError(f"{path}: expected an array (T, V) with at least one row, found shape {rows.shape}")
    return rows


def read_json(path):
    """Parse a JSON file, plain or gzip (told by its content)."""
    try:
        raw = Path(path).read_bytes()
        return json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: expected a JSON file (plain or gzip), found: {error}") from error


def load_annotations(path, labels: str = "verb", notes: list | None = None) -> list:
    """Annotation files -> list of Video, in the order of the file. `path` is one of

    * an ActivityNet-format JSON file, plain or gzip: `{"database": {name: {"subset", "duration" (seconds), "fps"
      (optional: 0 = ask the file), "annotations": [{"label", "segment": [start, end] (seconds)}]}}}`;
    * THUMOS14's val_Annotation.csv or test_Annotation.csv, with *_video_info.csv beside it;
    * EPIC_100_train.csv or EPIC_100_validation.csv, with video_info, verb_classes and noun_classes beside it; `labels`
      says which of them are the labels, "verb" or "noun";
    * the folder of such csv files: all of them.

    Sentences on what was dropped or cut (see `tidy`) are added to `notes`. Raises InputError naming file, video or
    line, and field.
    """
    videos, found = [], Counter()
    for file in annotation_files(path):
        read = read_activitynet(file) if file.suffix != ".csv" else \
            read_epic(file, labels) if file.name.startswith("EPIC_100_") else read_thumos(file, found)
        videos += [tidy(video, file, found) for video in read]
    if notes is not None:
        notes += [f"{path}: {count} segments {what}" for what, count in found.items() if count]
    return videos


def class_names(path, videos: list, labels: str = "verb") -> list:
    """Label names in the order of the class index: all of EPIC-Kitchens' class file; elsewhere those in use, sorted."""
    file = annotation_files(path)[0]
    if file.name.startswith("EPIC_100_"):
        return list(epic_classes(file, labels).values())
    return sorted({label for v in videos for label in v.labels})


def annotation_files(path) -> list:
    """The file itself, or the annotation files of THUMOS14 or EPIC-Kitchens-100 in a folder."""
    names = ("val_Annotation.csv", "test_Annotation.csv", "EPIC_100_train.csv", "EPIC_100_validation.csv")
    path = Path(path)
    files = [path / name for name in names if (path / name).exists()] if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: expected a folder with {' or '.join(names)}, found none of them; give the folder "
                         f"that has them, or a JSON file in ActivityNet's format")
    return files


AMBIGUOUS = "labelled Ambiguous, dropped"


def tidy(video: Video, path, found: Counter) -> Video:
    """The video less the segments that are no actions to learn; `found` counts what was done with how many.

    Dropped: label "Ambiguous" (any case), length zero, a copy of an earlier one (label, start and end within 1e-3 s).
    Segments past the end of the video are cut to it. Those that begin after it stay: no window shows them, and the
    metric counts them as missed, as THUMOS14's own does. Raises InputError for a duration or segment out of order.
    """
    where, segments, labels = f"{path}: video '{video.name}'", video.segments, np.array(video.labels, dtype=object)
    if not (np.isfinite(video.duration) and video.duration > 0):
        raise InputError(f"{where}: expected a duration above 0 seconds, found {video.duration}")
    good = np.isfinite(segments).all(1) & (segments[:, 0] >= 0) & (segments[:, 0] <= segments[:, 1])
    if not good.all():
        raise InputError(f"{where}: expected segments with 0 <= start <= end in seconds, found "
                         f"{segments[~good][0].tolist()} labelled {labels[~good][0]}; correct or remove it")
    near = (np.abs(segments[:, None] - segments[None]) <= 1e-3).all(-1) & (labels[:, None] == labels[None])
    keep = np.ones(len(segments), dtype=bool)
    for what, drop in ((AMBIGUOUS, np.array([label.lower() == "ambiguous" for label in labels], dtype=bool)),
                       ("of length zero, dropped", segments[:, 0] == segments[:, 1]),
                       ("that repeat another, dropped", np.tril(near, -1).any(1))):
        found[what] += int((keep & drop).sum())
        keep &= ~drop
    segments, labels = segments[keep], labels[keep].tolist()
    over, outside = segments[:, 1] > video.duration, segments[:, 0] >= video.duration
    found["past the end of their video, cut"] += int((over & ~outside).sum())
    found["that begin after the end of their video, kept but out of reach"] += int(outside.sum())
    return replace(video, labels=labels, segments=np.where((over & ~outside)[:, None],
                                                           segments.clip(max=video.duration), segments))


def read_activitynet(path) -> list:
    """The videos of an ActivityNet-format JSON file."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("database"), dict):
        raise InputError(f'{path}: expected {{"database": {{video: {{...}}}}}} (ActivityNet format), '
                         f"found {type(content).__name__} without it")
    return [parse_video(path, name, entry) for name, entry in content["database"].items()]


def parse_video(path, name: str, entry: dict) -> Video:
    """One entry of an ActivityNet-format file."""
    try:
        duration, fps = float(entry["duration"]), float(entry.get("fps") or 0)
        rows = entry.get("annotations", [])
        labels = [str(a["label"]) for a in rows]
        segments = np.array([[float(t) for t in a["segment"]] for a in rows], dtype=np.float64).reshape(len(rows), 2)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: video '{name}': expected duration, subset and annotations with label and segment "
                         f"[start, end] in seconds, found a problem with {error}") from error
    return Video(name, duration, fps, str(entry.get("subset", "")), segments, labels)


def read_thumos(path: Path, found: Counter) -> list:
    """The videos of val_Annotation.csv or test_Annotation.csv; "video_test_0000004" is of subset Test."""
    rows = read_table(path, video=str, type=str, start=float, end=float)
    clear = [row for row in rows if row[1].lower() != "ambiguous"]     # the info lacks a video that has no other rows
    found[AMBIGUOUS] += len(rows) - len(clear)
    info = path.with_name(path.name.replace("Annotation", "video_info"))
    lengths = {name: (count / fps if fps else 0, fps)
               for name, fps, count in read_table(info, video=str, fps=float, count=float)}
    return group_rows(clear, lengths, info, lambda name: name.removeprefix("video_").split("_")[0].capitalize())


def read_epic(path: Path, labels: str) -> list:
    """The videos of EPIC_100_train.csv (subset training) or EPIC_100_validation.csv."""
    classes, column = epic_classes(path, labels), f"{labels}_class"
    rows = read_table(path, video_id=str, **{column: int}, start_timestamp=clock, stop_timestamp=clock)
    unknown = {row[1] for row in rows} - set(classes)
    if unknown:
        raise InputError(f"{path}: column '{column}': expected ids of EPIC_100_{labels}_classes.csv, found "
                         f"{min(unknown)}; take both files from one release")
    info = path.with_name("EPIC_100_video_info.csv")
    lengths = {name: length for name, *length in read_table(info, video_id=str, duration=float, fps=float)}
    subset = "training" if path.stem == "EPIC_100_train" else "validation"
    return group_rows([(name, classes[c], *times) for name, c, *times in rows], lengths, info, lambda name: subset)


def epic_classes(path: Path, labels: str) -> dict:
    """{id: name} of the class file beside an annotation file of EPIC-Kitchens-100, in its order."""
    if labels not in ("verb", "noun"):
        raise InputError(f"--labels: expected verb or noun, found {labels!r}")
    return dict(read_table(path.with_name(f"EPIC_100_{labels}_classes.csv"), id=int, key=str))


def group_rows(rows: list, lengths: dict, info: Path, subset_of_name) -> list:
    """Rows (video, label, start, end) -> list of Video; `lengths`: {video: (duration, fps)} from the file `info`."""
    by_video = {}
    for name, label, *segment in rows:
        by_video.setdefault(name, []).append((label, segment))
    missing = [name for name in by_video if name not in lengths]
    if missing:
        raise InputError(f"{info}: expected a row for every annotated video, found none for {first_ten(missing)}")
    return [Video(name, *lengths[name], subset_of_name(name), np.array([segment for _, segment in own]),
                  [label for label, _ in own]) for name, own in by_video.items()]


def read_table(path: Path, **columns) -> list:
    """The named columns of a csv file with a header: a tuple for each row, each value made by its column's type."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            table = [(reader.line_num, row) for row in reader]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a csv file, found: {error}") from error
    for name in columns:
        if name not in (reader.fieldnames or []):
            raise InputError(f"{path}: line 1: expected a column '{name}', found "
                             f"{', '.join(reader.fieldnames or ['nothing'])[:200]}; check that this is the right file")
    kinds, rows = {str: "a name", int: "a whole number", float: "a number", clock: "HH:MM:SS.ff"}, []
    for line, row in table:
        try:
            for name, kind in columns.items():
                row[name] = kind(row[name] or "?")                      # "?" for an empty cell: no number
        except ValueError:
            raise InputError(f"{path}: line {line}: column '{name}': expected {kinds[kind]}, found {row[name]!r}; "
                             f"correct the line") from None
        rows.append(tuple(row[name] for name in columns))
    return rows


def clock(text: str) -> float:
    """HH:MM:SS.ff -> seconds."""
    hours, minutes, seconds = text.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def load_external_scores(path, classes: list, videos: list) -> dict:
    """Video-level class scores of another model (the CUHK scores of ActivityNet) -> {video: (K,) float32 tensor}.

    JSON `{"results": {video: [K scores]}, "class": [K names]}`; names of videos with or without "v_". The scores come
    in the order of `classes`, for every one of `videos`.
    """
    content = read_json(path)
    try:
        results, names = content["results"], content["class"]
        found = {v.name: next((results[n] for n in (v.name, f"v_{v.name}", v.name.removeprefix("v_")) if n in results),
                              None) for v in videos}
        scores = {name: torch.tensor(row, dtype=torch.float32).reshape(len(names))
                  for name, row in found.items() if row is not None}
        columns = [names.index(c) for c in classes if c in names]
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise InputError(f'{path}: expected {{"results": {{video: [a score per class]}}, "class": [names]}}, found a '
                         f"problem with {error}") from error
    missing = [name for name in found if name not in scores] + [c for c in classes if c not in names]
    if missing:
        raise InputError(f"{path}: expected scores for every video and class, found none for {first_ten(missing)}")
    return {name: row[columns] for name, row in scores.items()}


def load_descriptions(path, classes: list) -> dict:
    """JSON {label: description} (T_desc) -> the entries of `classes`, in that order; one that lacks is an error."""
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
        raise InputError(f"{path}: expected {{label: description}}, found something else")
    missing = [c for c in classes if c not in content]
    if missing:
        raise InputError(f"{path}: expected a description for every class, found none for {', '.join(missing)}; "
                         f"add a sentence for each, from start pose to end pose")
    return {c: content[c] for c in classes}


def find_files(videos: list, folder, suffixes=VIDEO_SUFFIXES, skip_missing: bool = False,
               notes: list | None = None) -> list:
    """Videos with `path` set to `folder/NAME + suffix`, or `v_NAME` as ActivityNet's files are called.

    Missing files are an error that names them; with `skip_missing` their videos are left out, and `notes` says so.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of {'/'.join(suffixes)} files, found none there")
    files = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in suffixes}
    paths = {v.name: files.get(v.name) or files.get(f"v_{v.name}") for v in videos}
    missing = [name for name, path in paths.items() if path is None]
    lack = f"found none for {len(missing)} of {len(videos)}: {first_ten(missing)}"
    if missing and (not skip_missing or len(missing) == len(videos)):
        raise InputError(f"{folder}: expected a {'/'.join(suffixes)} file per annotated video, {lack}; add them, or "
                         f"leave these videos out with --skip-missing")
    if missing and notes is not None:
        notes.append(f"{folder}: {lack}; left out")
    return [replace(v, path=paths[v.name]) for v in videos if paths[v.name]]


def first_ten(names: list) -> str:
    """Names for a message."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")


def subset_of(videos: list, subset: str, path) -> list:
    """The videos of one subset (its name in any case); an unknown name is an error that lists those there are."""
    chosen = [v for v in videos if v.subset.lower() == subset.lower()]
    if not chosen:
        names = sorted({v.subset for v in videos})
        raise InputError(f"{path}: expected videos of subset '{subset}', found none; subsets there: {names}")
    return chosen
