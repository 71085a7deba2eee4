"""support/video.py - video and feature files: which a run reads, frames at given times, rows."""
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from support.annotations import InputError, Video, expect, first_ten

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")

def read_frames(path, times: np.ndarray, short_side: int) -> np.ndarray:
    """The frames (N, h, w, 3), uint8 RGB, that a video shows at `times`; min(h, w) = short_side.
    times: (N,) ascending seconds; the first frame is second 0. Times after the last frame get the
    last frame: durations in annotation files are rounded. Raises InputError for a file that cannot
    be decoded or ends before the end that it states, or if half of the times lie past the end."""
    with opened(path) as container:
        frames, last, end = decode_frames(container, times, short_side)
        seconds = (container.duration or 0) / 1e6
    missing = len(times) - len(frames)
    whole = end + max(1, 0.1 * seconds) >= min(times[-1], seconds)
    found = "none" if last is None else f"frames up to {end:.1f} s"
    expect(whole or not missing, path, f"{seconds:.1f} s, as the file says", found,
           "it is cut off or broken: get it again or leave it out")
    expect(times[len(times) // 2] <= max(end, seconds) + 1, path, f"{times[-1]:.1f} s", found,
           "correct its duration in the annotations, or leave it out with --leave-out")
    return np.stack(frames + [last] * missing)

def decode_frames(container, times: np.ndarray, short_side: int) -> tuple:
    """Decode until every time has its frame -> (frames of the first of the times, the last decoded
    frame or None, its second). Raises TypeError for frames out of order."""
    from av.video.reformatter import VideoReformatter
    scaler = VideoReformatter()                      # one for all frames: making one costs most
    stream = container.streams.video[0]
    tick = float(stream.time_base)                   # seconds
    start = stream.start_time or 0                   # ticks
    half = 0.5 / float(stream.average_rate or 30)    # half the time of a frame, seconds
    if times[0] > 1:
        # Decoding begins at the key frame before, so a late window costs as much as an early one.
        # B-frames have decoding times before their own; seeking goes by these: a second early.
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
    if last is not None:
        last = to_rgb(last, short_side, scaler)
    return frames, last, shown

def to_rgb(frame, short_side: int, scaler) -> np.ndarray:
    """A decoded PyAV frame -> (h, w, 3) uint8, upright, with the short side `short_side`."""
    if isinstance(frame, np.ndarray):                # it has been here
        return frame
    scale = short_side / min(frame.width, frame.height)
    w = max(short_side, round(frame.width * scale))
    h = max(short_side, round(frame.height * scale))
    kind = "AREA" if scale < 1 else "BILINEAR"
    image = scaler.reformat(frame, w, h, "rgb24", interpolation=kind, threads=1).to_ndarray()
    return np.rot90(image, round(frame.rotation / 90))

def probe(path) -> tuple:
    """(duration in seconds, frames per second) of a video file."""
    with opened(path) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate)
        ticks = stream.duration
        seconds = float(ticks * stream.time_base) if ticks else container.duration / 1e6
    return seconds, fps

@contextmanager
def opened(path):
    """Yields an open video file. An error of PyAV or of the reading becomes an InputError."""
    import av
    try:
        with av.open(str(path), metadata_errors="replace") as container:   # titles in any encoding
            yield container
    except (av.error.FFmpegError, IndexError, OSError, TypeError) as error:
        known = {IndexError: "no video stream", TypeError: "frames without times or order"}
        raise InputError(f"{path}: expected a video that PyAV can decode, found "
                         f"{known.get(type(error), error)}; re-encode it (ffmpeg -i in -c:v "
                         f"libx264 out.mp4) or leave it out") from error

def open_features(path, width: int = 0) -> np.ndarray:
    """A feature file (T, V) of real numbers as a memory map, without pickle. width: V (0 = any)."""
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:                       # a damaged header can fail in any way
        raise InputError(f"{path}: expected a .npy file with an array (T, V), found: {error}; "
                         f"extract this video again or leave it out") from error
    expect(rows.ndim == 2 and rows.size and rows.dtype.kind in "fiu", path,
           "an array (T, V) of real numbers, at least one row", f"{rows.dtype} {rows.shape}")
    expect(width in (0, rows.shape[1]), path, f"{width} columns, as in the training videos",
           rows.shape[1], "extract all videos by the same encoder")
    return rows

def choose_videos(videos: list, subset: str, args, notes: list) -> list:
    """The videos of a subset, in any case, with path and fps; `notes` names those left out."""
    chosen = [v for v in videos if v.subset.lower() == subset.lower()]
    chosen = [v for v in chosen if v.name not in args.leave_out]
    expect(chosen, args.annotations, f"videos of subset '{subset}' beside those of --leave-out",
           "none", f"subsets there: {sorted({v.subset for v in videos})}")
    folder = Path(args.videos or args.features)
    suffixes = VIDEO_SUFFIXES if args.videos else (".npy",)
    kind = "/".join(suffixes)
    expect(folder.is_dir(), folder, f"a folder of {kind} files", "none")
    files = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in suffixes}
    paths = {v.name: files.get(v.name) or files.get(f"v_{v.name}") for v in chosen}
    missing = [name for name, path in paths.items() if not path]
    lack = f"none for {len(missing)} of {len(chosen)}: {first_ten(missing)}"
    skip = (args.skip_missing or args.dry_run) and len(missing) < len(chosen)
    expect(skip or not missing, folder, f"a {kind} file per annotated video", lack,
           "add them, or leave these videos out with --skip-missing")
    if missing:
        notes.append(f"{folder}: found {lack}; left out")
    chosen = [replace(v, path=paths[v.name]) for v in chosen if paths[v.name]]
    for video in chosen:
        video.fps = args.fps or video.fps
        if not video.fps and args.videos:
            video.fps = probe(video.path)[1]
        where = f"{args.annotations}: video '{video.name}'"
        expect(video.fps or args.resize_to, where, "fps", "none", "add it or give --fps")
    return chosen

def single_video(path: Path, feature_dim: int, train_args, fps: float) -> Video:
    """A video or feature file on its own, by the flags of a training; feature_dim 0 = a video."""
    if feature_dim == 0:
        duration, fps = probe(path)
        return Video(path.stem, duration, fps, path=path)
    fps = fps or train_args.fps
    expect(fps, f"--video {path}", "frames a second of the features", "none", "give --fps")
    steps = len(open_features(path, feature_dim))
    duration = (steps * train_args.stride + 0.5 * train_args.num_frames) / fps
    return Video(path.stem, duration, fps, path=path)

def doubt_steps(dataset) -> list:
    """A sentence, if feature files have not as many rows as duration * fps / stride says."""
    if dataset.image_size or dataset.resize_to:
        return []
    steps = np.array([dataset.steps(v) for v in dataset.videos])
    frames = np.array([v.duration * v.fps for v in dataset.videos])
    ratio = np.median(steps * dataset.stride / frames)
    if 0.8 < ratio < 1.25:
        return []
    return [f"feature files have {ratio:.2f} times the rows of duration * fps / stride (median): "
            f"segments lie in wrong places; check --stride, and fps in the annotations or --fps"]
