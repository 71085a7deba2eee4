"""demo.py - the demo data set: real mp4 files of a stick figure, drawn from random numbers.

Six actions. SitDown / StandUp and Throw / Catch show the same poses in opposite order: one frame cannot tell them
apart. Wave and JumpingJack can be told from a single frame. No part of the method.
"""
import json
from pathlib import Path

import numpy as np

DEMO_DESCRIPTIONS = {
    "SitDown": "The person starts standing upright, bends both knees while lowering the hips, and ends sitting low.",
    "StandUp": "The person starts sitting low with bent knees, pushes the hips upwards, and ends standing upright.",
    "Throw": "The person starts with the ball in the hand, swings the arm forward, and ends as the ball flies away.",
    "Catch": "The person starts as a ball comes flying, reaches out the arm, and ends with the ball in the hand.",
    "Wave": "The person starts by raising one arm above the head, swings it from side to side, and ends lowering it.",
    "JumpingJack": "The person starts with arms and legs together, spreads all of them wide repeatedly, and ends "
                   "with arms and legs together.",
}


def make_demo(folder, train=96, test=24, seed=0, fps=10, size=64, incomplete=12) -> None:
    """Write the demo data set once: videos/*.mp4, annotations.json (ActivityNet format), descriptions.json, and
    incomplete.json (Table 5): clips of the subset "incomplete", in which every action turns back halfway.

    Each clip of about 10 s holds three or four actions and background. Deterministic in `seed`; the subsets are drawn
    from different seeds. Annotations are written after their videos, so an interrupted run starts over.
    """
    folder = Path(folder)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for file, subsets in (("annotations.json", (("training", train, 1), ("test", test, 2))),
                          ("incomplete.json", (("incomplete", incomplete, 3),))):
        if (folder / file).exists():
            continue
        database = {}
        for subset, count, stream in subsets:
            for i in range(count):
                name, rng = f"{subset}_{i:03d}", np.random.default_rng([seed, stream, i])
                poses, balls, annotations = demo_script(rng, fps, complete=subset != "incomplete")
                write_video(folder / "videos" / f"{name}.mp4", render(poses, balls, size, rng), fps)
                database[name] = dict(subset=subset, duration=len(poses) / fps, fps=fps, annotations=annotations)
        (folder / "descriptions.json").write_text(json.dumps(DEMO_DESCRIPTIONS, indent=1))
        (folder / file).write_text(json.dumps(dict(version="demo", database=database), indent=1))


def demo_script(rng, fps, complete=True):
    """Draw a clip: poses (T, 4), ball positions (T, 3) relative to the body (x, y, visible), annotations.

    complete: False lets every action turn back after 30 to 50 % of it.
    """
    poses, balls, annotations = [], [], []
    for label in rng.permutation(list(DEMO_DESCRIPTIONS))[:rng.integers(3, 5)]:
        phase = np.linspace(0, 1, int(rng.integers(10, 25)))
        if not complete:
            phase = rng.uniform(0.3, 0.5) * (1 - np.abs(2 * phase - 1))              # up to there, and back
        pose, ball = demo_action(label, phase)
        gap = int(rng.integers(4, 13))
        if poses:                                       # hold the last pose, cut, hold the next first pose
            hold = gap // 2
            poses += [poses[-1]] * hold + [pose[0]] * (gap - hold)
            balls += [balls[-1]] * hold + [ball[0]] * (gap - hold)
        else:
            poses, balls = [pose[0]] * gap, [ball[0]] * gap
        annotations.append(dict(label=str(label), segment=[len(poses) / fps, (len(poses) + len(phase)) / fps]))
        poses, balls = poses + list(pose), balls + list(ball)
    gap = int(rng.integers(4, 13))
    return np.array(poses + [poses[-1]] * gap), np.array(balls + [balls[-1]] * gap), annotations


def demo_action(label: str, u: np.ndarray):
    """Poses (T, 4): [knee bend, left arm, right arm (radians from hanging down), leg spread]; ball (T, 3)."""
    zero = np.zeros_like(u)
    smooth = u * u * (3 - 2 * u)
    if label in ("StandUp", "Catch"):                   # the same poses as SitDown and Throw, backwards
        pose, ball = demo_action({"StandUp": "SitDown", "Catch": "Throw"}[label], 1 - u)
        return pose, ball
    if label == "SitDown":
        return np.stack([smooth, 0.3 + zero, 0.3 + 0.6 * smooth, 0.15 + zero], 1), np.stack([zero, zero, zero], 1)
    if label == "Throw":                                # the arm swings until u = .5, then the ball flies on
        arm = 0.4 + 1.8 * np.clip(u / 0.5, 0, 1)
        fly = np.clip((u - 0.5) / 0.5, 0, 1)
        return (np.stack([zero, 0.3 + zero, arm, 0.15 + zero], 1),
                np.stack([fly, 0.3 * np.sin(np.pi * fly), 1 + zero], 1))
    if label == "Wave":
        arm = np.clip(np.minimum(u, 1 - u) * 6, 0, 1) * (2.7 + 0.4 * np.sin(u * 6 * np.pi))
        return np.stack([zero, 0.3 + zero, 0.3 + arm, 0.15 + zero], 1), np.stack([zero, zero, zero], 1)
    spread = np.abs(np.sin(u * 3 * np.pi))              # JumpingJack
    return np.stack([zero, 0.3 + 2 * spread, 0.3 + 2 * spread, 0.15 + 0.5 * spread], 1), np.stack([zero] * 3, 1)


def render(poses, balls, size, rng) -> np.ndarray:
    """Draw the figure: (T, size, size, 3) uint8, with random place, scale, colours, background, sway and noise."""
    T = len(poses)
    bend, left, right, spread = poses.T
    unit, side = size * rng.uniform(0.26, 0.3), rng.choice([-1, 1])               # torso length; facing
    x = size * rng.uniform(0.42, 0.58) + np.cumsum(rng.normal(0, 0.15, T))
    ground = size * rng.uniform(0.9, 0.96)
    hip = np.stack([x, ground - unit * (1.15 - 0.75 * bend)], 1)
    neck = hip - [0, unit]

    def limb(origin, angle, length, sign):
        return origin + length * np.stack([sign * side * np.sin(angle), np.cos(angle)], 1)

    hand_l, hand_r = limb(neck, left, 0.95 * unit, -1), limb(neck, right, 0.95 * unit, 1)
    strokes = [(neck, hip, 0.16)]
    for sign in (-1, 1):
        foot = np.stack([x + sign * unit * np.sin(spread), np.full(T, ground)], 1)
        knee = (hip + foot) / 2 + np.stack([side * 0.45 * unit * bend, 0 * x], 1)
        strokes += [(hip, knee, 0.12), (knee, foot, 0.12)]
    strokes += [(neck, hand_l, 0.1), (neck, hand_r, 0.1), (neck - [0, 0.42 * unit],) * 2 + (0.3,)]
    ramp = np.linspace(-1, 1, size)
    base, skin, paint = (rng.uniform(low, high) + rng.uniform(-20, 20, 3)                # dark room, light figure
                         for low, high in ((30, 70), (180, 230), (180, 230)))
    slope = rng.normal(0, 8, (2, 3))
    background = base + ramp[:, None, None] * slope[0] + ramp[None, :, None] * slope[1]
    frames = np.broadcast_to(background, (T, size, size, 3)).astype(np.float32)
    body = np.maximum.reduce([capsule(a, b, thickness * unit, size) for a, b, thickness in strokes])
    frames = blend(frames, body, skin)
    ball = hand_r + balls[:, :2] * np.array([side * 1.6, -1.0]) * unit
    frames = blend(frames, capsule(ball, ball, 0.2 * unit, size) * balls[:, 2, None, None].astype(np.float32), paint)
    return np.clip(frames + rng.uniform(2, 6) * rng.standard_normal(frames.shape, np.float32), 0, 255).astype(np.uint8)


def capsule(a, b, radius, size) -> np.ndarray:
    """Coverage (T, size, size) in [0, 1] of thick lines from a to b, (T, 2) in pixels (x, y)."""
    pixel = np.arange(size, dtype=np.float32)
    a, d = a.astype(np.float32), (b - a).astype(np.float32)
    x, y = (pixel - a[:, :1])[:, None, :], (pixel - a[:, 1:])[:, :, None]         # (T, 1, W), (T, H, 1)
    dx, dy = d[:, 0, None, None], d[:, 1, None, None]
    along = np.clip((x * dx + y * dy) / np.maximum(dx * dx + dy * dy, 1e-6), 0, 1)
    return np.clip(radius + 0.5 - np.hypot(x - along * dx, y - along * dy), 0, 1)


def blend(frames, coverage, colour):
    """Paint `colour` over frames where `coverage` is 1."""
    return frames + coverage[..., None] * (colour.astype(np.float32) - frames)


def write_video(path, frames: np.ndarray, fps: int) -> None:
    """Write (T, H, W, 3) uint8 RGB frames as H.264 in mp4."""
    import av
    with av.open(str(path), "w") as container:
        # Without look-ahead: with it, x264 does not write the same file every time.
        stream = container.add_stream("libx264", rate=fps, options={
            "crf": "18", "preset": "veryfast", "threads": "1", "x264-params": "rc-lookahead=0:mbtree=0"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        scaler = av.video.reformatter.VideoReformatter()
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(scaler.reformat(frame, format="yuv420p", threads=1)))
        container.mux(stream.encode())
