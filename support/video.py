"""support/video.py - video and feature files: frames at given times, length and rate, rows."""
import math
from contextlib import contextmanager

import numpy as np

from support.annotations import InputError, expect

def read_frames(path, times: np.ndarray, short_side: int) -> np.ndarray:
    """The frames (N, h, w, 3), uint8 RGB, that a video shows at `times`; min(h, w) = short_side.

    times: (N,) ascending seconds. The file's first frame is second 0, and its rate may vary.
    Times after the last frame get the last frame: durations in annotation files are rounded.
    Raises InputError for a file that cannot be decoded, that ends before the end that it states,
    or where more than half of the times lie past the end.
    """
    with opened(path) as container:
        frames, last, end = decode_frames(container, times, short_side)
        seconds = (container.duration or 0) / 1e6
    expect(last is not None, path, f"frames from second {times[0]:.2f} on", "none",
           "check the file, and duration and fps in the annotations")
    missing = len(times) - len(frames)
    expect(not missing or end + max(1, 0.1 * seconds) >= min(times[-1], seconds), path,
           f"{seconds:.1f} s, as the file says", f"frames up to {end:.1f} s",
           "it is cut off or broken: get it again or leave it out")
    expect(times[len(times) // 2] <= max(end, seconds) + 1, path,
           f"frames up to second {times[-1]:.1f}", f"the last at second {end:.1f}",
           "correct its duration in the annotations, or leave it out with --leave-out")
    return np.stack(frames + [last] * missing)

def decode_frames(container, times: np.ndarray, short_side: int) -> tuple:
    """Decode an open file until every time has its frame -> (frames of the first of the times, the
    last decoded frame or None, its second). Raises TypeError for frames out of order."""
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
    expect(0 < seconds <= 1e6 and 0 < fps <= 1000, path, "a video of up to 1e6 s and 1000 fps",
           f"{seconds:g} s of {fps:g} frames a second", "re-encode it or leave it out")
    return seconds, fps

@contextmanager
def opened(path):
    """Yields an open video file. An error of PyAV or of the reading becomes an InputError."""
    import av
    try:
        with av.open(str(path), metadata_errors="replace") as container:   # titles in any encoding
            yield container
    except (av.error.FFmpegError, IndexError, OSError, TypeError) as error:
        known = {IndexError: "no video stream",
                 TypeError: "frames without rate or times, or not in order of time"}
        raise InputError(f"{path}: expected a video that PyAV can decode, found: "
                         f"{known.get(type(error), error)}; re-encode it (ffmpeg -i in -c:v "
                         f"libx264 out.mp4) or leave it out") from error

def open_features(path, width: int = 0) -> np.ndarray:
    """A feature file (T, V) of real numbers as a memory map, without pickle. width: V (0 = any)."""
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:                       # a damaged header can fail in any way
        raise InputError(f"{path}: expected a .npy file with an array (T, V), found: {error}; "
                         f"extract this video again or leave it out") from error
    expect(rows.ndim == 2 and rows.size, path, "an array (T, V) of at least one row", rows.shape)
    expect(rows.dtype.kind in "fiu", path, "real numbers", f"an array of {rows.dtype}")
    expect(width in (0, rows.shape[1]), path, f"{width} columns, as in the training videos",
           rows.shape[1], "extract all videos by the same encoder")
    return rows
