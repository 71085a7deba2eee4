"""data.py - videos or features, annotations and descriptions -> batches of windows (paper §4.1).

A video is cut into windows of at most L steps. One step ("frame" in the paper) is one decoded frame
of every `stride` (end to end), or one row of a feature file. Segments have two units: seconds (in
`Video`, in files) and grid units (in `Window`, `Batch`, the head). Unit l is step l of a window:

    grid = seconds * fps / stride - 0.5 * num_frames / stride

`num_frames` is the length of the snippet that one feature sees (16 for I3D); 0 end to end. A video
that is resized to R steps (ActivityNet) has fps = R / duration, stride 1 and num_frames 1."""
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from advantage import frame_classes
from support import annotations
from support.annotations import Video, expect, first_ten
from support.checkpoint import leave_group
from support.demo import make_demo
from support.video import check_rows, check_training, choose_sets, open_joined, read_frames
from vlm import proposal_text

RESIZE = 182 / 160      # short side of a training frame before the random crop, in crop sides

@dataclass
class Window:
    """L' <= L consecutive steps of a video, from step `start`."""
    video: Video
    start: int
    length: int         # L'
    inputs: Tensor      # (k L', 3, H, W) uint8, k frames a step, or (L', V) features
    segments: Tensor    # (N, 2) grid units, relative to `start`
    labels: Tensor      # (N,) class indices

@dataclass
class Batch:
    """B windows padded to one length L. Padding is zeros and counts nowhere."""
    inputs: Tensor      # (B, k L, 3, H, W) uint8, or (B, L, V) float
    mask: Tensor        # (B, L) bool, False on padding
    segments: list      # B tensors (N, 2), grid units
    labels: list        # B tensors (N,), class indices
    frame_class: Tensor   # (B, L) class of each frame, C = background
    answers: list       # B texts T_pred, the ground truth of Eq. 8
    names: list         # B names of videos
    windows: list       # the B windows, without their inputs

    def to(self, device):
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            inputs=self.inputs.to(device),
            mask=self.mask.to(device),
            segments=[segments.to(device) for segments in self.segments],
            labels=[labels.to(device) for labels in self.labels],
            frame_class=self.frame_class.to(device),
        )

def collate(windows, multiple, classes):
    """Pad windows to the longest, rounded up to `multiple`. classes: C names in class order."""
    lengths = torch.tensor([w.length for w in windows])
    L = -(-int(lengths.max()) // multiple) * multiple
    frames, *shape = windows[0].inputs.shape
    frames_per_step = frames // windows[0].length
    inputs = windows[0].inputs.new_zeros(len(windows), frames_per_step * L, *shape)
    answers = []
    for w, row in zip(windows, inputs):
        row[:len(w.inputs)] = w.inputs
        names = [classes[label] for label in w.labels.tolist()]
        answers.append(proposal_text(w.segments.tolist(), names))
    segments = [w.segments for w in windows]
    labels = [w.labels for w in windows]
    return Batch(
        inputs=inputs,
        mask=torch.arange(L) < lengths[:, None],
        segments=segments,
        labels=labels,
        frame_class=frame_classes(segments, labels, L, len(classes)),
        answers=answers,
        names=[w.video.name for w in windows],
        windows=[replace(w, inputs=None) for w in windows],
    )

@dataclass(eq=False)
class TALDataset(Dataset):
    """Windows of videos: a random one per video and epoch in training, all of them at test.
    Randomness depends on (seed, epoch, index) alone: a resumed run sees the same windows."""
    videos: list                # of Video, with `path` set
    classes: list               # C names in class order
    window: int                 # L, in steps
    stride: int = 1             # video frames a step
    num_frames: int = 0         # video frames that one feature sees
    training: bool = False
    min_overlap: float = 0.5    # share of a segment that has to be inside of a training window
    image_size: int = 0         # side of the crop in pixels; 0 reads features (.npy, (T, V))
    seed: int = 0
    overlap: float = 0.5        # share of a test window that the next one shows again
    frames_per_step: int = 1    # frames read for a step, at even distances over it
    resize_to: int = 0          # R, steps of every whole video as its one window (0 = off)
    feature_dim: int = 0        # V that feature files have to have (0 = any)
    epoch: int = 0

    def __post_init__(self):
        if self.resize_to:      # step l is centred on (l + 0.5) / R of the video
            self.window, self.stride, self.num_frames = self.resize_to, 1, 1
            self.videos = [replace(v, fps=self.resize_to / v.duration) for v in self.videos]
        self.classes = {label: i for i, label in enumerate(self.classes)}
        self.items = []         # (video, first step of the window)
        for video in self.videos:
            starts = [0]
            if not self.training:
                starts = window_starts(self.steps(video), self.window, self.overlap)
            self.items += [(video, start) for start in starts]

    def __len__(self):
        return len(self.items)

    def steps(self, video):
        """Number of steps T of a video: rows of its feature file, or frames at `stride`."""
        if self.resize_to:
            return self.resize_to
        if self.image_size == 0:
            return len(open_joined(video))
        return max(1, int(video.duration * video.fps / self.stride + 1e-6))

    def __getitem__(self, index):
        video, start = self.items[index]
        rng = np.random.default_rng([self.seed, self.epoch, index])
        T = self.steps(video)
        beyond = 0.5 * self.num_frames / self.stride                 # steps that a feature sees
        grid = seconds_to_grid(video.segments, video.fps, self.stride, self.num_frames)
        length = min(self.window, T - start)
        if self.training and not self.resize_to:
            start, length = random_window(T, self.window, grid, self.min_overlap, beyond, rng)
        min_overlap = self.min_overlap if self.training else 0.0
        segments, kept = truncate_segments(grid, start, length, beyond, min_overlap)
        labels = [self.classes[video.labels[i]] for i in kept]
        if self.image_size:
            inputs = self.read_clip(video, start, length, rng)
        else:
            inputs = self.read_rows(video, start, length)
        segments = torch.tensor(segments, dtype=torch.float32).reshape(-1, 2)
        labels = torch.tensor(labels).long()
        return Window(video, start, length, inputs, segments, labels)

    def read_rows(self, video, start, length):
        """(length, V) float32 rows of the feature files; all, interpolated, with resize_to."""
        rows = open_joined(video, self.feature_dim)
        rows = rows if self.resize_to else rows[start:start + length]
        with np.errstate(over="ignore"):           # infinity is an error below
            rows = np.array(rows, dtype=np.float32)
        bad = start + np.flatnonzero(~np.isfinite(rows).all(1))
        expect(not len(bad), video.path, "finite features",
               f"NaN or infinity in {len(bad)} rows: {first_ten(map(str, bad))}",
               "extract this video again or leave it out")
        rows = torch.from_numpy(rows)
        if self.resize_to:
            rows = F.interpolate(rows.T[None], length, mode="linear")[0].T
        return rows

    def read_clip(self, video, start, length, rng):
        """(k length, 3, image_size, image_size) uint8, k frames a step."""
        k, size = self.frames_per_step, self.image_size
        steps = start + np.arange(length)
        within = (np.arange(k) + 0.5) / k - 0.5                      # offsets around a step
        grid = (steps[:, None] + within).ravel()
        times = grid_to_seconds(grid, video.fps, self.stride, self.num_frames)
        short_side = round(size * RESIZE) if self.training else size
        frames = read_frames(video.path, times, short_side)          # (k length, h, w, 3)
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
        return augment(frames, size, rng) if self.training else centre_crop(frames, size)

def seconds_to_grid(seconds, fps, stride, num_frames):
    """Seconds -> grid units, any shape."""
    return seconds * fps / stride - 0.5 * num_frames / stride

def grid_to_seconds(grid, fps, stride, num_frames):
    """Grid units -> seconds, the inverse of `seconds_to_grid`."""
    return (grid * stride + 0.5 * num_frames) / fps

def window_starts(T, L, overlap):
    """First steps of the sliding windows over T steps; the last window ends at the last step."""
    if T <= L:
        return [0]
    hop = max(1, round(L * (1 - overlap)))
    return [*range(0, T - L, hop), T - L]

def truncate_segments(segments, start, length, beyond, min_overlap):
    """Segments (N, 2) of the video -> those of the window [start, start + length).
    A segment is cut at `beyond` outside of the window, for a feature sees that far. It stays if at
    least `min_overlap` of its length is left. All in grid units.
    Returns (segments (M, 2) relative to start, indices (M,) of the kept ones)."""
    cut = np.clip(segments, start - beyond, start + length + beyond)
    inside = cut[:, 1] - cut[:, 0]
    enough = inside >= min_overlap * (segments[:, 1] - segments[:, 0])
    kept = np.flatnonzero((inside > 0) & enough)
    return cut[kept] - start, kept

def random_window(T, L, segments, min_overlap, beyond, rng):
    """(start, length) of a training window: L steps of a long video, 90-100 % of a short one.
    It is drawn again until it holds an action, if the video has any."""
    shortest = max(1, round(0.9 * T))
    length = L if T > L else int(rng.integers(shortest, T + 1))
    for _ in range(200):
        start = int(rng.integers(0, T - length + 1))
        kept = truncate_segments(segments, start, length, beyond, min_overlap)[1]
        if len(kept) or not len(segments):
            break
    return start, length

def augment(frames, size, rng):
    """Random resized crop, flip, brightness, contrast and colour; one draw for the whole window.
    frames: (T, 3, h, w) uint8 -> (T, 3, size, size) uint8."""
    h, w = frames.shape[-2:]
    short = min(h, w)
    side = int(rng.integers(min(size, short), short + 1))            # never enlarged
    y = rng.integers(0, h - side + 1)
    x = rng.integers(0, w - side + 1)
    frames = frames[..., y:y + side, x:x + side]
    frames = F.interpolate(frames, (size, size), mode="bilinear", antialias=True)
    if rng.random() < 0.5:
        frames = frames.flip(-1)
    gain = rng.uniform(0.8, 1.2) * rng.uniform(0.9, 1.1, 3)          # contrast * colour
    grey = 128 + rng.uniform(-25, 25)                                # brightness
    value = (np.arange(256) - 128) * gain[:, None] + grey
    table = value.clip(0, 255).astype(np.uint8)                      # (3, 256), new value of each
    channels = [table[c].take(frames[:, c].numpy()) for c in range(3)]
    return torch.from_numpy(np.stack(channels, 1))

def centre_crop(frames, size):
    """(T, 3, h, w) with short side `size` -> (T, 3, size, size)."""
    h, w = frames.shape[-2:]
    y = (h - size) // 2
    x = (w - size) // 2
    return frames[..., y:y + size, x:x + size].contiguous()

def batch_loader(dataset, multiple, workers, **order):
    """Batches read by `workers` processes (0: by this one). order: batch_size or batch_sampler.
    Workers start anew with every pass, so they see the dataset's epoch. The loader's own generator
    keeps it from drawing one of torch's random numbers."""
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=partial(collate, multiple=multiple, classes=list(dataset.classes)),
        worker_init_fn=leave_group,
        generator=torch.Generator(),
        **order,
    )

def make_dataset(videos, classes, args, feature_dim, training=False):
    """A TALDataset by train.py's flags, of video files (feature_dim 0) or of features."""
    same = ("window", "stride", "num_frames", "min_overlap", "seed", "frames_per_step", "resize_to")
    options = {name: getattr(args, name) for name in same}
    return TALDataset(videos, classes, training=training, feature_dim=feature_dim,
                      image_size=args.image_size if args.videos else 0, **options)

def load_data(args):
    """(training set, test set, descriptions) from train.py's flags."""
    (training, test), descriptions = load_sets(args, ["train_subset", "test_subset"])
    check_training(training, test, args)
    return training, test, descriptions

def load_test_data(args, config):
    """The test set alone, with the classes of a trained model, or InputError for other labels.
    args: flags of its training, perhaps with other files. config: its model.Config."""
    return load_sets(args, ["test_subset"], config.descriptions, config.feature_dim)[0][0]

def load_sets(args, flags, descriptions=None, V=0):
    """(datasets of the subsets that flags name, descriptions). V: width of features (0: theirs)."""
    if args.dataset == "demo":
        make_demo(Path(args.annotations).parent)
    notes = []
    videos = annotations.load_annotations(args.annotations, args.labels, notes, args.leave_out)
    if descriptions is None:
        classes = annotations.class_names(args.annotations, videos, args.labels)
        descriptions = annotations.load_descriptions(args.descriptions, classes, notes)
    sets = choose_sets(videos, args, notes, flags)
    labels = annotations.class_names(args.annotations, sets[-1], args.labels)
    unknown = sorted(set(labels) - set(descriptions))
    expect(not unknown, args.annotations, "labels that the model knows",
           f"{first_ten(unknown)}, which it was not trained on", "correct or drop them")
    if args.features and not V:
        V = open_joined(sets[0][0]).shape[1]
    data = []
    for flag, part in zip(flags, sets):
        training = flag == "train_subset"
        data.append(make_dataset(part, descriptions, args, V, training))
    for note in notes + check_rows(*data):
        print(f"note: {note}", file=sys.stderr)
    return data, descriptions
