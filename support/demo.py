"""support/demo.py - the demo data set: real mp4 files of a stick figure, drawn at random.
SitDown and StandUp show the same poses in opposite order, and so do Throw and Catch: one frame
cannot tell them apart. Wave and JumpingJack show in a single frame. No part of the method."""
import json
from pathlib import Path

import numpy as np

DEMO_DESCRIPTIONS = json.loads((Path(__file__).parents[1] / "descriptions/demo.json").read_text())
BACKWARDS = {"StandUp": "SitDown", "Catch": "Throw"}
FPS, SIZE = 10, 64                                       # frames a second, pixels

def make_demo(folder: Path, train: int = 96, test: int = 24, incomplete: int = 12) -> None:
    """Write the demo data set, the same every time, unless it is there already.
    train, test, incomplete: numbers of clips of about 10 s; an interrupted run starts over."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    files = {"annotations.json": [("training", train, 1), ("test", test, 2)],
             "incomplete.json": [("incomplete", incomplete, 3)]}
    for file, subsets in files.items():
        if (folder / file).exists():
            continue
        database = {}
        for subset, count, stream in subsets:
            for i in range(count):
                name = f"{subset}_{i:03d}"
                rng = np.random.default_rng([0, stream, i])
                states, annotations = demo_script(rng, complete=subset != "incomplete")
                write_video(folder / "videos" / f"{name}.mp4", render(states, rng), FPS)
                database[name] = dict(subset=subset, duration=len(states) / FPS, fps=FPS,
                                      annotations=annotations)
        (folder / "descriptions.json").write_text(json.dumps(DEMO_DESCRIPTIONS, indent=1))
        (folder / file).write_text(json.dumps(dict(version="demo", database=database), indent=1))

def demo_script(rng, complete: bool = True) -> tuple:
    """Draw a clip -> states (T, 7), annotations. Without `complete`, actions turn back halfway."""
    states, annotations = [], []
    for label in rng.permutation(list(DEMO_DESCRIPTIONS))[:rng.integers(3, 5)]:
        phase = np.linspace(0, 1, rng.integers(10, 25))
        if not complete:
            phase = rng.uniform(0.3, 0.5) * (1 - np.abs(2 * phase - 1))    # to 30-50 % and back
        action = demo_action(label, phase)
        gap = rng.integers(4, 13)
        held = gap // 2 if states else 0         # frames that hold the last state, then a cut
        states += states[-1:] * held + [action[0]] * (gap - held)
        start = len(states) / FPS
        states += list(action)
        annotations.append(dict(label=str(label), segment=[start, len(states) / FPS]))
    states += states[-1:] * rng.integers(4, 13)
    return np.array(states), annotations

def demo_action(label: str, u: np.ndarray) -> np.ndarray:
    """An action at its phases u (T,), from 0 (begins) to 1 (ends) -> states (T, 7): knee bend, left
    arm, right arm (radians from hanging down), leg spread; x and y of the ball relative to the
    right hand, and 1 where the ball is visible."""
    if label in BACKWARDS:
        return demo_action(BACKWARDS[label], 1 - u)
    states = np.tile([0, 0.3, 0.3, 0.15, 0, 0, 0], (len(u), 1))
    bend, left, right, spread, ball_x, ball_y, visible = states.T            # views: to be set
    if label == "SitDown":
        bend[:] = u * u * (3 - 2 * u)
        right += 0.6 * bend
    elif label == "Throw":                       # the arm swings until u = .5, then the ball flies
        right[:] = 0.4 + 1.8 * np.clip(u / 0.5, 0, 1)
        ball_x[:] = np.clip((u - 0.5) / 0.5, 0, 1)
        ball_y[:] = 0.3 * np.sin(np.pi * ball_x)
        visible[:] = 1
    elif label == "Wave":
        raised = np.clip(np.minimum(u, 1 - u) * 6, 0, 1)
        right += raised * (2.7 + 0.4 * np.sin(u * 6 * np.pi))
    else:                                        # JumpingJack
        wide = np.abs(np.sin(u * 3 * np.pi))
        states += wide[:, None] * [0, 2, 2, 0.5, 0, 0, 0]
    return states

def render(states: np.ndarray, rng) -> np.ndarray:
    """Draw the figure at random place, scale and colours -> frames (T, SIZE, SIZE, 3) uint8.
    Points are complex numbers (T,): x + 1j * y in pixels."""
    bend, left, right, spread, ball_x, ball_y, visible = states.T
    unit = SIZE * rng.uniform(0.26, 0.3)                              # length of the torso, pixels
    side = rng.choice([-1, 1])                                        # which way the figure looks
    x = SIZE * rng.uniform(0.42, 0.58) + np.cumsum(rng.normal(0, 0.15, len(states)))
    ground = SIZE * rng.uniform(0.9, 0.96)
    hip = x + 1j * (ground - unit * (1.15 - 0.75 * bend))
    neck = hip - 1j * unit
    head = neck - 0.42j * unit
    strokes = [(neck, hip, 0.16), (head, head, 0.3)]                  # from, to, thickness
    for sign, arm in ((-1, left), (1, right)):
        hand = neck + 0.95 * unit * (1j * np.cos(arm) + sign * side * np.sin(arm))
        foot = x + sign * unit * np.sin(spread) + 1j * ground
        knee = (hip + foot) / 2 + side * 0.45 * unit * bend
        strokes += [(neck, hand, 0.1), (hip, knee, 0.12), (knee, foot, 0.12)]
    ball = hand + (side * 1.6 * ball_x - 1j * ball_y) * unit          # hand: the right one
    room, skin, paint = [rng.uniform(dark, light) + rng.uniform(-20, 20, 3)
                         for dark, light in ((30, 70), (180, 230), (180, 230))]
    ramp = np.linspace(-1, 1, SIZE)[:, None]
    slope = rng.normal(0, 8, (2, 3))
    background = room + ramp[:, None] * slope[0] + ramp * slope[1]
    body = np.maximum.reduce([capsule(a, b, thick * unit) for a, b, thick in strokes])
    ball = capsule(ball, ball, 0.2 * unit) * visible[:, None, None].astype(np.float32)
    frames = background.astype(np.float32)
    for coverage, colour in ((body, skin), (ball, paint)):
        frames = frames + coverage[..., None] * (colour.astype(np.float32) - frames)
    noise = rng.uniform(2, 6) * rng.standard_normal(frames.shape, np.float32)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)

def capsule(a, b, radius: float) -> np.ndarray:
    """Coverage (T, SIZE, SIZE) in [0, 1] of thick lines from points a to points b."""
    pixel = np.arange(SIZE, dtype=np.float32)
    a, d = np.array([a, b - a], np.complex64)[..., None, None]
    x, y = pixel - a.real, pixel[:, None] - a.imag                    # (T, 1, W), (T, H, 1)
    length = np.maximum(d.real * d.real + d.imag * d.imag, 1e-6)      # squared
    along = np.clip((x * d.real + y * d.imag) / length, 0, 1)
    return np.clip(radius + 0.5 - np.hypot(x - along * d.real, y - along * d.imag), 0, 1)

def write_video(path, frames: np.ndarray, fps: int) -> None:
    """Write (T, H, W, 3) uint8 RGB frames as H.264 in mp4."""
    import av
    # Without look-ahead: with it, x264 does not write the same file every time.
    options = {"crf": "18", "preset": "veryfast", "threads": "1",
               "x264-params": "rc-lookahead=0:mbtree=0"}
    with av.open(str(path), "w") as container:
        height, width = frames.shape[1:3]
        stream = container.add_stream("libx264", fps, options, height=height, width=width)
        for image in frames:
            frame = av.VideoFrame.from_ndarray(image).reformat(format="yuv420p", threads=1)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
