"""support/presets.py - the recipe of each data set: presets.json, plain values of train.py's flags.
A flag on the command line wins. Presets are end to end; FEATURE_PRESETS change them for features.
"""
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE = dict(                  # values of a recipe without a flag
    labels="verb",            # what is to be found in EPIC-Kitchens-100: verb or noun
    ranges=None,              # [low, high] per level: boundary distances it finds (None: doubling)
    frames_per_step=1,        # frames read for a step, at even distances (end to end)
    drop_path=0.1,            # probability that training skips a branch of the head
    label_smoothing=0.0,      # share of the class targets spread over all classes
    max_per_class=0,          # most detections of a class in a video (0 = no limit)
)
PRESETS, FEATURE_PRESETS = json.loads((ROOT / "support/presets.json").read_text()).values()
for preset in PRESETS.values():
    if preset.get("descriptions", "").startswith("descriptions/"):
        preset["descriptions"] = str(ROOT / preset["descriptions"])

def get_preset(dataset: str, features: bool) -> dict:
    """{name: value} of a data set, end to end or from features."""
    change = FEATURE_PRESETS.get(dataset, {}) if features else {}
    return {**BASE, **PRESETS[dataset], **change}
