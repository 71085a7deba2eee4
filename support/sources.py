"""support/sources.py - the videos and files that a run reads, and doubts about them."""
from dataclasses import replace
from pathlib import Path

import numpy as np

from support.annotations import Video, expect, first_ten
from support.video import open_features, probe

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")

def choose_videos(videos: list, subset: str, args, notes: list) -> list:
    """The videos of a subset, named in any case, with path and fps, by train.py's flags.
    --skip-missing leaves out those without a file NAME or v_NAME; `notes` names them."""
    chosen = [v for v in videos if v.subset.lower() == subset.lower()]
    chosen = [v for v in chosen if v.name not in args.leave_out]
    expect(chosen, args.annotations, f"videos of subset '{subset}' beside those of --leave-out",
           "none", f"subsets there: {sorted({v.subset for v in videos})}")
    folder = Path(args.videos or args.features)
    suffixes = VIDEO_SUFFIXES if args.videos else (".npy",)
    kind = "/".join(suffixes)
    expect(folder.is_dir(), folder, f"a folder of {kind} files", "no folder there")
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
        expect(video.fps or args.resize_to, f"{args.annotations}: video '{video.name}'", "fps",
               "none", "add it or give --fps")
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
