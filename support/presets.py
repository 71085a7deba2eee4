"""support/presets.py - the recipe of each data set: train.py's flags where no default suits it.

A flag on the command line wins. Presets are end to end; FEATURE_PRESETS change them for features.
"""
from pathlib import Path

DESCRIPTIONS = Path(__file__).parents[1] / "descriptions"

BASE = dict(                  # values of a recipe without a flag
    labels="verb",            # what is to be found in EPIC-Kitchens-100: verb or noun
    ranges=None,              # [low, high] per level: boundary distances it finds (None: doubling)
    frames_per_step=1,        # frames read for a step, at even distances (end to end)
    drop_path=0.1,            # probability that training skips a branch of the head
    label_smoothing=0.0,      # share of the class targets spread over all classes
    max_per_class=0,          # most detections of a class in a video (0 = no limit)
)
EPIC = dict(
    window=768, stride=16, num_frames=16, frames_per_step=8, fps=30, min_overlap=0.3, batch_size=2,
    levels=6, head_window=0, tiou=[0.1, 0.2, 0.3, 0.4, 0.5], nms_sigma=0.4, voting=0.75,
    ranges=[[0, 4], [2, 8], [4, 16], [8, 32], [16, 64], [32, 1e4]], max_per_video=2000, workers=4)
PRESETS = {
    "custom": {},
    "demo": dict(
        videos="data/demo/videos", annotations="data/demo/annotations.json",
        descriptions="data/demo/descriptions.json", train_subset="training", test_subset="test",
        stride=1, window=128, image_size=32, min_overlap=0.75, levels=5, width=128, head_window=0,
        prior=0.1, epochs=16, warmup_epochs=2, batch_size=2, lr=3e-4, lr_vision=7e-4, lr_lm=1e-3,
        lora_rank=8, lora_alpha=16, ema=0.98),
    "thumos14": dict(
        descriptions=str(DESCRIPTIONS / "thumos14.json"),
        train_subset="validation", test_subset="test",
        leave_out=["video_test_0000270", "video_test_0001292"],     # known to be annotated wrongly
        window=768, stride=4, min_overlap=0.75, batch_size=1, levels=6, head_window=0,
        tiou=[0.3, 0.4, 0.5, 0.6, 0.7], nms_sigma=0.7, voting=0.7, max_per_class=200,
        max_per_video=2000, workers=4),
    "activitynet": dict(
        descriptions=str(DESCRIPTIONS / "activitynet.json"),
        resize_to=192, frames_per_step=4, window=192, batch_size=4, width=256, levels=6,
        head_window=0, tiou=[0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95],
        nms_sigma=0.7, voting=0.9, max_per_video=100, workers=4),
    "epic-verb": dict(EPIC, descriptions=str(DESCRIPTIONS / "epic_verb.json"), labels="verb"),
    "epic-noun": dict(EPIC, descriptions=str(DESCRIPTIONS / "epic_noun.json"), labels="noun"),
}
# With --features: the lengths that the features were extracted with.
EPIC_FEATURES = dict(window=2304, num_frames=32, frames_per_step=1, head_window=19)
FEATURE_PRESETS = {
    "thumos14": dict(window=2304, num_frames=16, fps=30, min_overlap=0.5, head_window=19,
                     nms_sigma=0.5, max_per_class=0, max_per_video=200),
    "activitynet": dict(frames_per_step=1, label_smoothing=0.1),
    "epic-verb": EPIC_FEATURES,
    "epic-noun": EPIC_FEATURES,
}

def get_preset(dataset: str, features: bool) -> dict:
    """{flag: value} of a data set."""
    preset = BASE | PRESETS[dataset]
    if features:
        preset |= FEATURE_PRESETS.get(dataset, {})
    return preset
