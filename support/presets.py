"""support/presets.py - the recipe of each data set: presets.json, plain values of train.py's flags.
Flags on the command line win. Presets are end to end; FEATURE_PRESETS change them for features."""
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTENT = json.loads((ROOT / "support/presets.json").read_text())   # docs/data.md explains it
BASE, PRESETS, FEATURE_PRESETS, OPENTAD_SUBSETS = CONTENT.values()
for preset in PRESETS.values():
    if preset.get("descriptions", "").startswith("descriptions/"):
        preset["descriptions"] = str(ROOT / preset["descriptions"])

def get_preset(dataset: str, features: bool) -> dict:
    """{name: value} of a data set, end to end or from features."""
    change = FEATURE_PRESETS.get(dataset, {}) if features else {}
    return {**BASE, **PRESETS[dataset], **change}
