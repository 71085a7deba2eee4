"""support/video.py - video and feature files: frames at given times, length and rate, rows."""
import math

import numpy as np

from support.annotations import InputError


def read_frames(path, times: np.ndarray, short_side: int) -> np.ndarray:
    """The frames that a video shows at `times`, scaled so that the short side is `short_side`.

    times: (N,) ascending seconds from the start of the video. Returns (N, h, w, 3) uint8 RGB.

    Frame times are those of the file: the frame rate may vary, and the first frame is second 0.
    Times after the last frame get the last frame, because durations in annotation files are
    rounded. Raises InputError with the file's name if it cannot be decoded, if it ends before
    the end that it states, or if more than half of the times lie past its end.
    """
    import av
    try:
        # Titles may be in any encoding.
        with av.open(str(path), metadata_errors="replace") as container:
            frames, last, end = decode_frames(container, times, short_side)
            seconds = (container.duration or 0) / 1e6
    except (av.error.FFmpegError, IndexError, OSError, TypeError) as error:
        raise unreadable(path, error) from error
    if last is None:
        raise InputError(f"{path}: expected frames from second {times[0]:.2f} on, found none; "
                         f"check the file, and duration and fps in the annotations")
    missing = len(times) - len(frames)
    if missing and end + max(1, 0.1 * seconds) < min(times[-1], seconds):
        raise InputError(f"{path}: expected {seconds:.1f} s, as the file says, found frames up to "
                         f"{end:.1f} s; it is cut off or broken: get it again or leave it out")
    if times[len(times) // 2] > max(end, seconds) + 1:
        raise InputError(f"{path}: expected frames up to second {times[-1]:.1f}, found the last "
                         f"at second {end:.1f}; correct its duration in the annotations, or "
                         f"leave it out with --leave-out")
    return np.stack(frames + [last] * missing)


def decode_frames(container, times: np.ndarray, short_side: int) -> tuple:
    """Decode an open file until every time has its frame.

    Returns (frames found for the first of the times, the last decoded frame or None, its time
    in seconds). Frames are (h, w, 3) uint8. Raises TypeError for frames out of order.
    """
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
        before = shown
        shown = (frame.pts - start) * tick
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
    """A decoded PyAV frame -> (h, w, 3) uint8, upright, with the short side `short_side`.

    A frame that is an array already stays as it is.
    """
    if isinstance(frame, np.ndarray):
        return frame
    scale = short_side / min(frame.width, frame.height)
    w = max(short_side, round(frame.width * scale))
    h = max(short_side, round(frame.height * scale))
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
            if stream.duration:
                seconds = float(stream.duration * stream.time_base)
            else:
                seconds = container.duration / 1e6
            if not (0 < seconds <= 1e6 and 0 < fps <= 1000):
                raise ValueError(f"{seconds:g} s of {fps:g} frames a second")
            return seconds, fps
    except (av.error.FFmpegError, IndexError, OSError, TypeError, ValueError) as error:
        raise unreadable(path, error) from error


def unreadable(path, error) -> InputError:
    """The message on a video file, from the error that PyAV or the reading raised."""
    found = error
    if type(error) is IndexError:
        found = "no video stream"
    elif type(error) is TypeError:
        found = "frames without rate or times, or not in order of time"
    return InputError(f"{path}: expected a video that PyAV can decode, found: {found}; "
                      f"re-encode it (ffmpeg -i in -c:v libx264 out.mp4) or leave it out")


def open_features(path, width: int = 0) -> np.ndarray:
    """A feature file (T, V) of real numbers as a memory map; nothing is unpickled.

    width: the V that the file must have; 0 = any. Raises InputError for any other file.
    """
    try:
        rows = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:                       # a damaged header can fail in any way
        raise InputError(f"{path}: expected a .npy file with an array (T, V), found: {error}; "
                         f"extract this video again or leave it out") from error
    if rows.ndim != 2 or 0 in rows.shape:
        raise InputError(f"{path}: expected an array (T, V) with at least one row, found shape "
                         f"{rows.shape}")
    if rows.dtype.kind not in "fiu":
        raise InputError(f"{path}: expected real numbers, found an array of {rows.dtype}")
    if width and rows.shape[1] != width:
        raise InputError(f"{path}: expected {width} columns as in the first training video (or "
                         f"in the run's), found {rows.shape[1]}; extract all videos by the same "
                         f"encoder")
    return rows
