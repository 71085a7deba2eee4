"""support/video.py - video and feature files: which a run reads, frames at given times, rows."""
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from support.annotations import InputError, Video, expect, first_ten, of_subset, read_json, tidy

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
FEATURE_SUFFIXES = (".npy", ".npz", ".pt")

def read_frames(path, times: np.ndarray, short_side: int) -> np.ndarray:
    """The frames (N, h, w, 3), uint8 RGB, that a video shows at `times`; min(h, w) = short_side.
    times: (N,) ascending seconds; the first frame is second 0. Times after the last frame get that
    one: durations are rounded. InputError: a broken file, or half of the times after its end."""
    with opened(path) as container:
        frames, last, end = decode_frames(container, times, short_side)
        seconds, missing = (container.duration or 0) / 1e6, len(times) - len(frames)
        slack = max(1, 0.1 * seconds)
        whole = not missing or end + slack >= min(times[-1], seconds)
        if last is not None and not whole:           # sound may go on after the last frame
            container.seek(int(1e6 * max(0, end)))
            whole = span(container)[1] + slack >= seconds
    found = "none" if last is None else f"frames up to {end:.1f} s"
    expect(whole, path, f"{seconds:.1f} s, as the file says", found,
           "it is cut off or broken: get it again or leave it out")
    expect(times[len(times) // 2] <= max(end, seconds) + 1, path, f"{times[-1]:.1f} s", found,
           "correct its duration in the annotations, or leave it out with --leave-out")
    return np.stack(frames + [last] * missing)

def decode_frames(container, times: np.ndarray, short_side: int) -> tuple:
    """Decode until every time has its frame -> (frames of the first of the times, the last decoded
    frame or None, its second). Raises TypeError for frames out of order."""
    from av.video.reformatter import VideoReformatter
    scaler = VideoReformatter()                      # one for all frames: making one costs most
    stream = moving_pictures(container)
    tick = float(stream.time_base)                   # seconds
    start = stream.start_time or 0                   # ticks
    half = 0.5 / float(stream.average_rate or 30)    # half the time of a frame, seconds
    if times[0] > 1:
        # Decoding begins at the key frame before. Seeking goes by decoding times: a second early.
        container.seek(int(start + (times[0] - 1) / tick), stream=stream)
    frames, last, shown = [], None, -math.inf
    for frame in container.decode(stream):
        before, shown = shown, (frame.pts - start) * tick
        if shown < before:                           # AVI with B-frames
            raise TypeError
        # `last` is shown until `frame` comes. Times are rounded, so the nearer frame counts.
        until = shown - min(half, (shown - before) / 2)
        while last is not None and len(frames) < len(times) and times[len(frames)] <= until:
            last = to_rgb(last, short_side, scaler)
            frames.append(last)
        if len(frames) == len(times):
            break
        last = frame
    return frames, to_rgb(last, short_side, scaler), shown

def to_rgb(frame, short_side: int, scaler) -> np.ndarray:
    """A decoded PyAV frame -> (h, w, 3) uint8, upright, with the short side `short_side`."""
    if frame is None or isinstance(frame, np.ndarray):         # none, or it has been here
        return frame
    scale = short_side / min(frame.width, frame.height)
    w, h = (max(short_side, round(side * scale)) for side in (frame.width, frame.height))
    kind = "AREA" if scale < 1 else "BILINEAR"
    image = scaler.reformat(frame, w, h, "rgb24", interpolation=kind, threads=1).to_ndarray()
    return np.rot90(image, round(frame.rotation / 90))

def moving_pictures(container):
    """The first stream of moving pictures: a cover is a stream of one picture."""
    return [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic][0]

def span(container, *streams) -> tuple:
    """(first, last) second of what streams (none: all) hold, from where reading stands."""
    packets = [p for p in container.demux(*streams) if p.pts is not None]
    starts = sorted(p.pts * p.time_base for p in packets)
    ends = sorted((p.pts + (p.duration or 0)) * p.time_base for p in packets)
    return starts[0], ends[-1]

def probe(path, known: float = 0) -> tuple:
    """(duration in seconds, if it is not `known`, frames per second) of a video file's pictures."""
    with opened(path) as container:
        stream = moving_pictures(container)
        known = known or (stream.duration or 0) * stream.time_base
        first, last = (0, known) if known else span(container, stream)      # reads all of it
        return float(last - first), float(stream.average_rate)

@contextmanager
def opened(path):
    """Yields an open video file. An error of PyAV or of the reading becomes an InputError."""
    import av
    try:
        with av.open(str(path), metadata_errors="replace") as container:   # titles in any encoding
            yield container
    except (av.error.FFmpegError, IndexError, OSError, TypeError) as error:
        known = {IndexError: "no video stream", TypeError: "frames without times or order"}
        expect(False, path, "a video that PyAV can decode", f"{known.get(type(error), error)}",
               "re-encode it (ffmpeg -i in -c:v libx264 out.mp4) or leave it out")

def open_joined(video: Video, width: int = 0) -> np.ndarray:
    """The features (T, V) of a video, those of several folders side by side. Tools round
    differently, so up to 3 rows of the longer ones are cut. width: V (0 = any)."""
    parts = [open_features(path) for path in video.files or [video.path]]
    rows, columns = np.array([part.shape for part in parts]).T
    where = " and ".join(map(str, video.files or [video.path]))
    expect(max(rows) - min(rows) <= 3, where, "as many rows in each, give or take 3",
           " and ".join(map(str, rows)), "extract all with the same stride, as (T, V)")
    expect(width in (0, sum(columns)), where, f"{width} columns, as in the training videos",
           f"{sum(columns)}", "extract all videos by the same encoder; join folders as there")
    return np.concatenate([part[:min(rows)] for part in parts], 1) if parts[1:] else parts[0]

def open_features(path) -> np.ndarray:
    """The real numbers (T, V) of a feature file, without pickle."""
    try:
        if str(path).lower().endswith(".pt"):
            rows = torch.load(path, map_location="cpu", weights_only=True).float().numpy()
        else:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(rows, np.lib.npyio.NpzFile):
            rows = rows[rows.files[0] if len(rows.files) == 1 else "feats"]
    except Exception as error:                       # a damaged header can fail in any way
        raise InputError(f"{path}: expected a .npy file (or .npz, .pt) with an array (T, V), found:"
                         f" {error}; extract this video again or leave it out") from error
    rows = rows[0] if rows.ndim == 3 and len(rows) == 1 else rows
    expect(rows.ndim == 2 and rows.size and rows.dtype.kind in "fiu", path,
           "an array (T, V) of real numbers, at least one row", f"{rows.dtype} {rows.shape}")
    return rows

def read_manifests(folders) -> tuple:
    """({flag: text}, {video: fps}) of manifest.json, if experiments.extract made the folders."""
    settings, rates = {}, {}
    for path in filter(Path.exists, [Path(folder, "manifest.json") for folder in folders]):
        content = read_json(path, "videos")
        found = {name: str(content.get(name)) for name in ("stride", "num_frames")} | {"fps": "0"}
        expect(settings in ({}, found), path, f"{settings} as in the folder before", found,
               "extract all folders with the same flags")
        settings, rates = found, rates | content["videos"]
    return settings, rates

def choose_sets(videos: list, args, notes: list, flags=("train_subset", "test_subset")) -> list:
    """The videos of the subsets that `flags` name. `notes` gets a sentence on what may surprise."""
    names = [getattr(args, flag) for flag in flags]
    others = [(vars(args).get("opentad_subsets") or vars(args))[flag] for flag in flags]
    there = {video.subset.lower() for video in videos}
    if there.issuperset(others) and not there.issuperset(map(str.lower, names)):
        notes.append(f"{args.annotations}: subsets {' and '.join(others)} are read in place of "
                     f"{' and '.join(names)}, as OpenTAD names them")
        names = others
    sets = [choose_videos(videos, name, args, notes) for name in names]
    labels = [{label for v in part for label in v.labels} for part in sets]
    untrained = sorted(labels[-1] - labels[0])
    if untrained:
        notes.append(f"{args.annotations}: {len(untrained)} classes of the test subset have no "
                     f"segment to train on: {first_ten(untrained)}")
    return sets

def choose_videos(videos: list, subset: str, args, notes: list) -> list:
    """The videos of a subset with files, fps and duration; `notes` names those left out."""
    chosen = of_subset(videos, subset, f"{args.annotations}: apart from --leave-out")
    features = args.features if isinstance(args.features, list) else [args.features]
    suffixes = VIDEO_SUFFIXES if args.videos else FEATURE_SUFFIXES
    for folder in map(Path, [args.videos] if args.videos else features):
        expect(folder.is_dir(), folder, f"a folder of {'/'.join(suffixes)} files", "none")
        entries = sorted(folder.iterdir(), reverse=True)
        files = {p.stem: p for p in entries if p.suffix.lower() in suffixes}
        alike = {plain(stem): path for stem, path in files.items()}
        paths = [files.get(v.name) or alike.get(plain(v.name)) for v in chosen]
        missing = [v.name for v, path in zip(chosen, paths) if not path]
        lack = (f"none for {len(missing)} of {len(chosen)}: {first_ten(missing)} (files there end "
                f"in {first_ten(sorted({p.suffix for p in entries}))})")
        skip = (args.skip_missing or args.dry_run) and len(missing) < len(chosen)
        expect(skip or not missing, folder, f"a {'/'.join(suffixes)} file per annotated video",
               lack, "add them, or leave these videos out with --skip-missing")
        if missing:
            notes.append(f"{folder}: found {lack}; left out")
        chosen = [replace(v, path=v.path or path, files=[*v.files, path])
                  for v, path in zip(chosen, paths) if path]
    rates = {} if args.videos else read_manifests(features)[1]
    return [complete(replace(v, fps=float(rates.get(v.path.stem, v.fps))), args) for v in chosen]

def plain(name: str) -> str:
    """The name of a video without `v_` before it and the ending of a video file behind it."""
    name = Path(name).stem if Path(name).suffix.lower() in VIDEO_SUFFIXES else name
    return name.removeprefix("v_")

def complete(video: Video, args) -> Video:
    """The video with fps and duration, by --fps, what is known of it, or the video file."""
    fps, duration = args.fps or video.fps, video.duration
    if args.videos and not (fps and duration):
        duration, rate = probe(video.path, duration)
        fps = fps or rate
    where = f"{args.annotations}: video '{video.name}'"
    expect(fps or args.resize_to, where, "fps", "none", "add it or give --fps")
    if fps and not duration:
        duration = length_of_rows(video, args, fps)
    expect(duration, where, "a duration", "none", "add it, or give --fps")
    return tidy(replace(video, fps=fps, duration=duration), where, Counter())

def own_files(paths: list, feature_dim: int) -> list:
    """Files as they are, folders as their files of videos (feature_dim 0) or features."""
    suffixes, files = FEATURE_SUFFIXES if feature_dim else VIDEO_SUFFIXES, []
    for path in paths:
        inside = [file for file in sorted(path.glob("*")) if file.suffix.lower() in suffixes]
        expect(inside or not path.is_dir(), f"--video {path}", " or ".join(suffixes), "none there")
        files += inside or [path]
    twice = [name for name, count in Counter(file.stem for file in files).items() if count > 1]
    expect(not twice, "--video", "one file for each name", f"several for {first_ten(twice)}")
    return files

def single_video(path: Path, feature_dim: int, train_args, fps: float) -> Video:
    """A video or feature file on its own, by the flags of a training; feature_dim 0 = a video."""
    if feature_dim == 0:
        return Video(path.stem, *probe(path), path=path)
    fps = fps or train_args.fps or float(read_manifests([path.parent])[1].get(path.stem, 0))
    expect(fps, f"--video {path}", "frames a second of the features", "none", "give --fps")
    video = Video(path.stem, 0, fps, path=path)
    return replace(video, duration=length_of_rows(video, train_args, fps, feature_dim))

def length_of_rows(video: Video, args, fps: float, width: int = 0) -> float:
    """Seconds of a video by the rows of its features. width: see open_joined."""
    return (len(open_joined(video, width)) * args.stride + 0.5 * args.num_frames) / fps

def check_training(training, test, args) -> None:
    """InputError unless training and test set are apart, and a training window holds an action."""
    both = sorted({v.path.stem for v in training.videos} & {v.path.stem for v in test.videos})
    expect(not both, args.annotations, "other videos to test on than to train on",
           f"{len(both)} in both: {first_ten(both)}", "correct --train-subset and --test-subset")
    some = [i for i, video in enumerate(training.videos) if video.labels]
    expect(any(len(training[i].labels) for i in some), args.annotations,
           f"actions in windows of {args.train_subset}", f"none in {len(some)} annotated videos",
           "choose another --train-subset, or check --window, --min-overlap, --stride and --fps")

def check_rows(data, *more) -> list:
    """A sentence on feature files of datasets whose rows do not fit the duration. InputError where
    all are transposed. Tools round and pad differently, so 3 rows and 10 % are free."""
    if data.image_size or data.resize_to:
        return []
    videos = sum((dataset.videos for dataset in more), data.videos)
    T, V = np.array([open_joined(video).shape for video in videos]).T
    most = np.array([video.duration * video.fps for video in videos]) / data.stride
    rows = np.maximum(most - data.num_frames / data.stride, 0) + 1
    fits, turned = [(count > rows / 1.1 - 3) & (count < most * 1.1 + 3) for count in (T, V)]
    expect(len(set(T)) > 1 or fits.mean() >= turned.mean(), videos[0].path.parent,
           f"feature files of {rows.min():.0f} to {rows.max():.0f} rows", f"{T[0]} in all {len(T)}",
           "they look transposed, (V, T) for (T, V): save array.T")
    odd = np.flatnonzero(~fits)
    named = first_ten(f"{videos[i].path.name} {T[i]} (expected {rows[i]:.0f})" for i in odd)
    note = (f"{len(odd)} of {len(T)} feature files have not (duration * fps - num_frames) / stride "
            f"+ 1 rows, but {np.median(T[odd] / rows[odd] if len(odd) else 1):.2f} times as many "
            f"(median): {named}; check --stride, --fps, --num-frames and these files")
    return [note] if len(odd) else []
