"""support/sources.py - the videos and files that a run reads, and doubts about them."""
from dataclasses import replace
from pathlib import Path

import numpy as np

from support.annotations import VIDEO_SUFFIXES, InputError, Video, find_files, subset_of
from support.video import open_features, probe


def choose_videos(videos: list, subset: str, args, notes: list) -> list:
    """The videos of a subset with path and fps, by train.py's flags.

    Videos of --leave-out are left out; with --skip-missing those without a file are, too. `notes`
    gets a sentence on the missing ones. Raises InputError where nothing is left.
    """
    chosen = subset_of(videos, subset, args.annotations)
    chosen = [v for v in chosen if v.name not in args.leave_out]
    if not chosen:
        raise InputError(f"--leave-out: expected to keep some videos of subset '{subset}', "
                         f"found all of them named")
    folder, suffixes = args.features, (".npy",)
    if args.videos:
        folder, suffixes = args.videos, VIDEO_SUFFIXES
    skip_missing = args.skip_missing or args.dry_run
    chosen = find_files(chosen, folder, suffixes, skip_missing, notes)
    return [with_fps(v, args) for v in chosen]


def with_fps(video: Video, args) -> Video:
    """The video with its frame rate: --fps, else from the annotations, else from the file."""
    fps = args.fps or video.fps
    if not fps and args.videos:
        fps = probe(video.path)[1]
    if not fps and not args.resize_to:
        raise InputError(f"{args.annotations}: video '{video.name}': expected fps, found none; add "
                         f"it or give --fps")
    return replace(video, fps=fps)


def single_video(path: Path, feature_dim: int, train_args, fps: float) -> Video:
    """A video or feature file on its own, by the flags of a training; feature_dim 0 = a video."""
    if feature_dim == 0:
        duration, fps = probe(path)
        return Video(path.stem, duration, fps, path=path)
    fps = fps or train_args.fps
    if not fps:
        raise InputError(f"--video {path}: this model reads features; say --fps, frames per second "
                         f"behind them")
    steps = len(open_features(path, feature_dim))
    duration = (steps * train_args.stride + 0.5 * train_args.num_frames) / fps
    return Video(path.stem, duration, fps, path=path)


def doubt_steps(dataset) -> list:
    """A sentence, if feature files have not as many rows as duration * fps / stride says."""
    if dataset.image_size or dataset.resize_to:
        return []
    ratios = []
    for v in dataset.videos:
        ratios.append(dataset.steps(v) * dataset.stride / (v.duration * v.fps))
    ratio = float(np.median(ratios))
    if 0.8 < ratio < 1.25:
        return []
    return [f"feature files have {ratio:.2f} times the rows of duration * fps / stride (median of "
            f"the test set); segments are then in the wrong place: check --stride, and fps in the "
            f"annotations or --fps"]
