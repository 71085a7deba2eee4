"""support/demo.py - the demo data set: real mp4 files of a stick figure, drawn at random.

It has six actions. SitDown and StandUp show the same poses in opposite order, and so do Throw
and Catch: one frame cannot tell them apart. Wave and JumpingJack show in a single frame.
The demo is no part of the method.
"""
import json
from pathlib import Path

import numpy as np

DEMO_DESCRIPTIONS = {
    "SitDown": "The person starts standing upright, bends both knees while lowering the hips, "
               "and ends sitting low.",
    "StandUp": "The person starts sitting low with bent knees, pushes the hips upwards, "
               "and ends standing upright.",
    "Throw": "The person starts with the ball in the hand, swings the arm forward, "
             "and ends as the ball flies away.",
    "Catch": "The person starts as a ball comes flying, reaches out the arm, "
             "and ends with the ball in the hand.",
    "Wave": "The person starts by raising one arm above the head, swings it from side to side, "
            "and ends lowering it.",
    "JumpingJack": "The person starts with arms and legs together, spreads all of them wide "
                   "repeatedly, and ends with arms and legs together.",
}


def make_demo(folder, train=96, test=24, seed=0, fps=10, size=64, incomplete=12) -> None:
    """Write the demo data set, unless it is there already.

    The folder receives videos/*.mp4, annotations.json (ActivityNet format), descriptions.json,
    and incomplete.json (Table 5): clips of the subset "incomplete", in which every action turns
    back halfway. train, test, incomplete: numbers of clips. fps: frames per second. size: pixels.

    Each clip of about 10 s holds three or four actions and background. The same `seed` gives the
    same files; every subset has random numbers of its own. Annotations are written after their
    videos, so an interrupted run starts over.
    """
    folder = Path(folder)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    files = {"annotations.json": (("training", train, 1), ("test", test, 2)),
             "incomplete.json": (("incomplete", incomplete, 3),)}
    for file, subsets in files.items():
        if (folder / file).exists():
            continue
        database = {}
        for subset, count, stream in subsets:
            for i in range(count):
                name = f"{subset}_{i:03d}"
                rng = np.random.default_rng([seed, stream, i])
                complete = subset != "incomplete"
                poses, balls, annotations = demo_script(rng, fps, complete)
                frames = render(poses, balls, size, rng)
                write_video(folder / "videos" / f"{name}.mp4", frames, fps)
                database[name] = dict(subset=subset, duration=len(poses) / fps, fps=fps,
                                      annotations=annotations)
        (folder / "descriptions.json").write_text(json.dumps(DEMO_DESCRIPTIONS, indent=1))
        content = dict(version="demo", database=database)
        (folder / file).write_text(json.dumps(content, indent=1))


# -------------------------------------------------------------------- actions
def demo_script(rng, fps, complete=True):
    """Draw a clip of T frames -> poses (T, 4), balls (T, 3), annotations.

    See `demo_action` for poses and balls. Without `complete`, every action turns back after
    30 to 50 % of it.
    """
    poses, balls, annotations = [], [], []
    labels = rng.permutation(list(DEMO_DESCRIPTIONS))[:rng.integers(3, 5)]
    for label in labels:
        phase = np.linspace(0, 1, int(rng.integers(10, 25)))
        if not complete:
            phase = rng.uniform(0.3, 0.5) * (1 - np.abs(2 * phase - 1))      # up to there, and back
        pose, ball = demo_action(label, phase)
        gap = int(rng.integers(4, 13))
        if poses:                                # hold the last pose for half of the gap, cut
            poses += [poses[-1]] * (gap // 2)
            balls += [balls[-1]] * (gap // 2)
            gap -= gap // 2
        poses += [pose[0]] * gap                 # hold the first pose of the action
        balls += [ball[0]] * gap
        segment = [len(poses) / fps, (len(poses) + len(phase)) / fps]
        annotations.append(dict(label=str(label), segment=segment))
        poses += list(pose)
        balls += list(ball)
    gap = int(rng.integers(4, 13))
    poses += [poses[-1]] * gap
    balls += [balls[-1]] * gap
    return np.array(poses), np.array(balls), annotations


def demo_action(label: str, u: np.ndarray):
    """An action at its phases u (T,), from 0 (begins) to 1 (ends) -> pose (T, 4), ball (T, 3).

    pose: knee bend, left arm, right arm (radians from hanging down), leg spread.
    ball: x and y relative to the right hand, and 1 where it is visible.
    """
    zero = np.zeros_like(u)
    still_arm, still_legs = 0.3 + zero, 0.15 + zero
    smooth = u * u * (3 - 2 * u)
    no_ball = np.stack([zero, zero, zero], 1)
    if label == "StandUp":                       # SitDown backwards
        return demo_action("SitDown", 1 - u)
    if label == "Catch":                         # Throw backwards
        return demo_action("Throw", 1 - u)
    if label == "SitDown":
        return np.stack([smooth, still_arm, 0.3 + 0.6 * smooth, still_legs], 1), no_ball
    if label == "Throw":                         # the arm swings until u = .5, then the ball flies
        arm = 0.4 + 1.8 * np.clip(u / 0.5, 0, 1)
        fly = np.clip((u - 0.5) / 0.5, 0, 1)
        pose = np.stack([zero, still_arm, arm, still_legs], 1)
        return pose, np.stack([fly, 0.3 * np.sin(np.pi * fly), 1 + zero], 1)
    if label == "Wave":
        raised = np.clip(np.minimum(u, 1 - u) * 6, 0, 1)
        arm = raised * (2.7 + 0.4 * np.sin(u * 6 * np.pi))
        return np.stack([zero, still_arm, 0.3 + arm, still_legs], 1), no_ball
    spread = np.abs(np.sin(u * 3 * np.pi))       # JumpingJack
    arm = 0.3 + 2 * spread
    return np.stack([zero, arm, arm, 0.15 + 0.5 * spread], 1), no_ball


# -------------------------------------------------------------------- pictures
def render(poses, balls, size, rng) -> np.ndarray:
    """Draw the figure -> frames (T, size, size, 3) uint8.

    Place, scale, colours, background, sway and noise are random.
    """
    T = len(poses)
    bend, left, right, spread = poses.T
    unit = size * rng.uniform(0.26, 0.3)                              # length of the torso, pixels
    side = rng.choice([-1, 1])                                        # which way the figure looks
    x = size * rng.uniform(0.42, 0.58) + np.cumsum(rng.normal(0, 0.15, T))
    ground = size * rng.uniform(0.9, 0.96)
    hip = np.stack([x, ground - unit * (1.15 - 0.75 * bend)], 1)      # (T, 2): x, y
    neck = hip - [0, unit]
    head = neck - [0, 0.42 * unit]
    left_hand = neck + limb(-side, left, 0.95 * unit)
    right_hand = neck + limb(side, right, 0.95 * unit)
    strokes = [(neck, hip, 0.16)]                                     # from, to, thickness
    for sign in (-1, 1):
        foot = np.stack([x + sign * unit * np.sin(spread), np.full(T, ground)], 1)
        knee = (hip + foot) / 2 + np.stack([side * 0.45 * unit * bend, 0 * x], 1)
        strokes += [(hip, knee, 0.12), (knee, foot, 0.12)]
    strokes += [(neck, left_hand, 0.1), (neck, right_hand, 0.1), (head, head, 0.3)]
    base = random_colour(rng, 30, 70)                                 # a dark room, a light figure
    skin = random_colour(rng, 180, 230)
    paint = random_colour(rng, 180, 230)
    slope = rng.normal(0, 8, (2, 3))
    ramp = np.linspace(-1, 1, size)
    background = base + ramp[:, None, None] * slope[0] + ramp[None, :, None] * slope[1]
    frames = np.broadcast_to(background, (T, size, size, 3)).astype(np.float32)
    body = [capsule(a, b, thickness * unit, size) for a, b, thickness in strokes]
    frames = blend(frames, np.maximum.reduce(body), skin)
    ball = right_hand + balls[:, :2] * np.array([side * 1.6, -1.0]) * unit
    visible = balls[:, 2, None, None].astype(np.float32)
    frames = blend(frames, capsule(ball, ball, 0.2 * unit, size) * visible, paint)
    noise = rng.uniform(2, 6) * rng.standard_normal(frames.shape, np.float32)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def random_colour(rng, low, high) -> np.ndarray:
    """A random colour (3,) whose brightness lies between `low` and `high`."""
    return rng.uniform(low, high) + rng.uniform(-20, 20, 3)


def limb(sign, angle, length) -> np.ndarray:
    """From one end of a limb to the other, (T, 2) in pixels; angle: radians from hanging down."""
    return length * np.stack([sign * np.sin(angle), np.cos(angle)], 1)


def capsule(a, b, radius, size) -> np.ndarray:
    """Coverage (T, size, size) in [0, 1] of thick lines from a to b, (T, 2) in pixels (x, y)."""
    pixel = np.arange(size, dtype=np.float32)
    a, d = a.astype(np.float32), (b - a).astype(np.float32)
    x = (pixel - a[:, :1])[:, None, :]                                # (T, 1, W)
    y = (pixel - a[:, 1:])[:, :, None]                                # (T, H, 1)
    dx, dy = d[:, 0, None, None], d[:, 1, None, None]
    along = np.clip((x * dx + y * dy) / np.maximum(dx * dx + dy * dy, 1e-6), 0, 1)
    return np.clip(radius + 0.5 - np.hypot(x - along * dx, y - along * dy), 0, 1)


def blend(frames, coverage, colour):
    """Paint `colour` over frames where `coverage` is 1."""
    return frames + coverage[..., None] * (colour.astype(np.float32) - frames)


def write_video(path, frames: np.ndarray, fps: int) -> None:
    """Write (T, H, W, 3) uint8 RGB frames as H.264 in mp4."""
    import av
    # Without look-ahead: with it, x264 does not write the same file every time.
    options = {"crf": "18", "preset": "veryfast", "threads": "1",
               "x264-params": "rc-lookahead=0:mbtree=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        scaler = av.video.reformatter.VideoReformatter()
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = scaler.reformat(frame, format="yuv420p", threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
