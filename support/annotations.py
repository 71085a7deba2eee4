"""support/annotations.py - annotations, descriptions, scores of others, each checked once."""
import csv
import gzip
import json
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as shorten  # a value for a message; a long or deep one in part

import numpy as np
import torch

CSV_FILES = ("val_Annotation.csv", "test_Annotation.csv",
             "EPIC_100_train.csv", "EPIC_100_validation.csv")
SUBSETS = {"train": "training", "training": "training", "val": "validation",
           "validation": "validation", "test": "test"}       # by the last word of a file's name
AMBIGUOUS = "labelled Ambiguous, dropped"

class InputError(ValueError):
    """A mistake in a file or flag: where it is, what was expected and found, what to do."""
    def __str__(self):
        """The message alone: torch's DataLoader puts a worker's traceback in front of it."""
        return super().__str__().rpartition("InputError: ")[2].rstrip()

def expect(good, where, expected: str, found, advice: str = "correct or remove it") -> None:
    """Raises InputError unless `good`. found: a text, or the value itself."""
    if not good:
        found = found[:500] if isinstance(found, str) else shorten(found)
        raise InputError(f"{where}: expected {expected}, found {found}; {advice}")

@dataclass
class Video:
    """One untrimmed video: where it is, how long it is, and its actions."""
    name: str
    duration: float            # seconds; 0 = not known
    fps: float                 # 0 = not known
    subset: str = ""
    segments: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))   # (N, 2) seconds
    labels: list = field(default_factory=list)                              # N names
    path: Path | None = None                                                # video or feature file
    files: list = field(default_factory=list)       # one of each folder of --features; first: path

def load_annotations(path, labels: str = "verb", notes: list | None = None, leave_out=()) -> list:
    """Annotation files (docs/data.md) -> list of Video, without those named leave_out. InputError.
    labels: verb or noun, of EPIC-Kitchens-100. notes: gets a sentence on each kind of change."""
    videos, found = [], Counter()
    for file in annotation_files(path):
        if file.suffix != ".csv":
            read = read_activitynet(file)
        elif file.name.startswith("EPIC_100_"):
            read = read_epic(file, labels)
        else:
            read = read_thumos(file, found)
        videos += [tidy(video, f"{file}: video '{video.name}'", found) for video in read
                   if video.name not in leave_out]
    ends = [end for video in videos for end in video.segments[:, 1]]
    typical = np.median([0, *(video.duration for video in videos)])
    expect(len(ends) < 5 or max(ends) > 1 or typical <= 5, path, "segments in seconds",
           f"all {len(ends)} before second 1 of videos of {typical:.0f} s (median)",
           "they look like shares of the duration: multiply each by that of its video")
    if notes is not None:
        notes += [f"{path}: {count} segments {what}" for what, count in found.items() if count]
    return videos

def class_names(path, videos: list, labels: str = "verb") -> list:
    """Label names in class order: EPIC-Kitchens' class file, elsewhere the names in use, sorted."""
    file = annotation_files(path)[0]
    if file.name.startswith("EPIC_100_"):
        return list(epic_classes(file, labels).values())
    return sorted({label for video in videos for label in video.labels})

def of_subset(videos: list, subset: str, path) -> list:
    """The videos of one subset, named in any case, or InputError."""
    chosen = [video for video in videos if video.subset.lower() == subset.lower()]
    there = Counter(video.subset for video in videos).items()
    expect(chosen, path, f"videos of subset '{subset}'",
           first_ten(f"{name} ({count} videos)" for name, count in there), "give one of these")
    return chosen

def annotation_files(path) -> list:
    """The file itself, or those of a folder: of THUMOS14, EPIC-Kitchens-100, or one a subset."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    files = [path / name for name in CSV_FILES if (path / name).exists()]
    files = files or [file for word in SUBSETS for file in sorted(path.glob(f"*{word}.json"))]
    expect(files, path, f"a folder with {' or '.join(CSV_FILES)} or NAME_train.json and the like",
           "none", "give their folder, or a JSON file in ActivityNet's format")
    return files

def tidy(video: Video, where: str, found: Counter) -> Video:
    """The video without segments that cannot be learned; `found` counts every change. One that
    begins after the end stays: no window shows it, and the metric, as THUMOS14's, has it missed."""
    segments, labels = video.segments, np.array(video.labels, object)
    expect(0 <= video.duration <= 1e6, where, "a duration of 0 to 1e6 s", video.duration)
    expect(0 <= video.fps <= 1000, where, "an fps of 0 (not known) to 1000", video.fps)
    for label, (start, end) in zip(labels, segments):
        expect(0 <= start <= end < np.inf, where, "segments with 0 <= start <= end in seconds",
               f"[{start}, {end}] labelled {label}")
    ambiguous = np.array([label.lower() == "ambiguous" for label in labels], bool)
    classes = np.unique([str(label) for label in labels], return_inverse=True)[1]
    keep = np.ones(len(segments), bool)
    for reason, drop in ((AMBIGUOUS, ambiguous),
                         ("of length zero, dropped", segments[:, 0] == segments[:, 1]),
                         ("that repeat another, dropped", copies(np.c_[segments, classes]))):
        found[reason] += int((keep & drop).sum())
        keep &= ~drop
    segments, duration = segments[keep], video.duration or np.inf
    outside = segments[:, 0] >= duration
    over = (segments[:, 1] > duration) & ~outside
    segments[over, 1] = duration
    found["past the end of their video, cut"] += int(over.sum())
    found["that begin after the end of their video, kept but out of reach"] += int(outside.sum())
    return replace(video, segments=segments, labels=labels[keep].tolist())

def copies(rows: np.ndarray) -> np.ndarray:
    """Which rows (N, n) repeat an earlier one within 1e-3 (seconds), as segments of THUMOS14 do."""
    return np.tril((np.abs(rows[:, None] - rows) <= 1e-3).all(-1), -1).any(1)

def read_thumos(path: Path, found: Counter) -> list:
    """The videos of val_Annotation.csv (subset Validation) or test_Annotation.csv (Test)."""
    rows = read_table(path, video=NAME, type=NAME, start=NUMBER, end=NUMBER)
    # The info file lacks videos that have only ambiguous rows, so these rows go first.
    clear = [row for row in rows if row[1].lower() != "ambiguous"]
    found[AMBIGUOUS] += len(rows) - len(clear)
    info, lengths = path.with_name(path.name.replace("Annotation", "video_info")), {}
    for name, fps, count in read_table(info, video=NAME, fps=NUMBER, count=NUMBER):
        subset = name.removeprefix("video_").split("_")[0].capitalize()   # of video_test_0000004
        lengths[name] = count / fps if fps else 0, fps, subset
    return group_rows(clear, lengths, info)

def read_epic(path: Path, labels: str) -> list:
    """The videos of EPIC_100_train.csv (subset training) or EPIC_100_validation.csv."""
    classes = epic_classes(path, labels)
    label = lambda cell: classes[int(cell)], f"an id of EPIC_100_{labels}_classes.csv"
    rows = read_table(path, video_id=NAME, **{f"{labels}_class": label},
                      start_timestamp=CLOCK, stop_timestamp=CLOCK)
    subset = "training" if path.stem == "EPIC_100_train" else "validation"
    info = path.with_name("EPIC_100_video_info.csv")
    lengths = read_table(info, video_id=NAME, duration=NUMBER, fps=NUMBER)
    return group_rows(rows, {name: (*length, subset) for name, *length in lengths}, info)

def epic_classes(path: Path, labels: str) -> dict:
    """{id: name} of the class file beside an annotation file of EPIC-Kitchens-100, in order."""
    return dict(read_table(path.with_name(f"EPIC_100_{labels}_classes.csv"), id=WHOLE, key=NAME))

def group_rows(rows: list, lengths: dict, info: Path) -> list:
    """Rows (video, label, start, end) and {video: (duration, fps, subset)} -> list of Video."""
    videos = {}
    for name, label, start, end in rows:
        expect(name in lengths, info, "a row for every annotated video", f"none for {name}")
        video = videos.setdefault(name, Video(name, *lengths[name], segments=[]))
        video.labels.append(label)
        video.segments.append([start, end])
    return [replace(video, segments=np.array(video.segments)) for video in videos.values()]

# Kinds of columns: (type that turns the text of a cell into its value, the kind in words).
NAME, WHOLE, NUMBER = (str, "a name"), (int, "a whole number"), (float, "a number")
CLOCK = lambda cell: np.dot((3600, 60, 1), [*map(float, cell.split(":"))]), "HH:MM:SS.ff"

def read_table(path: Path, **columns) -> list:
    """The columns {name: kind} of a csv file with a header: one list per row."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            lines = [(reader.line_num, line) for line in reader]
            header = reader.fieldnames or []
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a csv file, found: {error}") from error
    for name in columns:
        expect(name in header, f"{path}: line 1", f"a column '{name}'", first_ten(header),
               "check that this is the right file")
    rows = []
    for n, line in lines:
        rows.append([])
        for name, (read, expected) in columns.items():
            cell, value = line[name] or "", None
            with suppress(ValueError, OverflowError, KeyError):
                value = read(cell) if cell.strip() else None
            expect(value is not None, f"{path}: line {n}: column '{name}'", expected, repr(cell))
            rows[-1].append(value)
    return rows

def read_activitynet(path) -> list:
    """The videos of a JSON file in ActivityNet's format, or flat as BSN's and mmaction2's."""
    entries, videos = read_json(path), []
    if not any(OBJECT[0](entry) and "duration_second" in entry for entry in entries.values()):
        check_fields(path, entries, "database")
        entries = entries["database"]
    subset = SUBSETS.get(path.stem.lower().split("_")[-1])
    for name, entry in entries.items():
        where = f"{path}: video '{name}'"
        check_fields(where, entry)
        entry = {"subset": subset, "duration": entry.get("duration_second"), **entry}
        check_fields(where, entry, "subset", "duration", "fps")
        duration, fps = (float(entry.get(key) or 0) for key in ("duration", "fps"))
        rows = entry.get("annotations")                     # None: hidden labels of a test set
        read = read_segments(f"{where}: annotations", [] if rows is None else rows)
        videos.append(Video(name, duration, fps, entry["subset"], **read))
    return videos

def read_segments(where: str, entries, *more: str) -> dict:
    """[{"label", "segment", *more}], checked -> {"segments": (N, 2) float64 s, "labels": [str]}."""
    expect(isinstance(entries, list), where, "a list of segments, or []", entries)
    for i, entry in enumerate(entries):
        check_fields(f"{where}[{i}]", entry, "label", "segment", *more)
    segments = np.array([list(map(float, entry["segment"])) for entry in entries], np.float64)
    return {"segments": segments.reshape(-1, 2), "labels": [entry["label"] for entry in entries]}

def load_external_scores(path, classes: list, videos: list) -> dict:
    """Another model's scores of whole videos (CUHK's of ActivityNet) -> {video: (C,) float32}.
    The file is JSON: `{"results": {video, or "v_" + video: [K scores]}, "class": [K names]}`."""
    content = read_json(path, "results", "class")
    names = content["class"]
    scores = {name.removeprefix("v_"): row for name, row in content["results"].items()}
    rows = {v.name: scores.get(v.name.removeprefix("v_")) for v in videos}
    missing = [name for name, row in rows.items() if row is None]
    missing += [name for name in classes if name not in names]
    expect(not missing, path, "scores for every video and class", f"none for {first_ten(missing)}")
    for name, row in rows.items():
        expect(is_numbers(row, len(names)), f"{path}: video '{name}'",
               f"a finite score for each of the {len(names)} names of 'class'", row)
    columns = [names.index(name) for name in classes]
    return {name: torch.tensor([float(row[i]) for i in columns]) for name, row in rows.items()}

def load_descriptions(path, classes: list, notes: list) -> dict:
    """JSON {label: description} (T_desc) -> those of `classes`, in order; `notes` names others."""
    content = read_json(path)
    for label, text in content.items():
        expect(is_text(text), f"{path}: '{label}'", "a text that describes it", shorten(text))
    missing = [name for name in classes if name not in content]
    unused = [label for label in content if label not in classes]
    others = f"not used: {first_ten(unused)}"
    expect(not missing, path, "a description for every class",
           f"none for {first_ten(missing)} ({others})", "add a sentence for each, spelled as there")
    if unused:
        notes.append(f"{path}: {len(unused)} descriptions of classes that the annotations have "
                     f"not, {others}")
    return {name: content[name] for name in classes}

def read_json(path, *fields: str) -> dict:
    """The object with these fields in a JSON file, plain or gzip (the first two bytes tell)."""
    try:
        raw = Path(path).read_bytes()
        content = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON file (plain or gzip), found: {error}") from error
    check_fields(path, content, *fields)
    return content

def is_number(value) -> bool:
    """A finite number that fits in a float, or the text of one; True and False are none."""
    try:
        return type(value) in (int, float, str) and abs(float(value)) < np.inf
    except (ValueError, OverflowError):
        return False

def is_numbers(value, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(map(is_number, value))

def is_text(value) -> bool:
    """A text that is not blank and can be printed: JSON may hold half a character (a surrogate)."""
    printed = value.encode(errors="ignore").decode() if isinstance(value, str) else ""
    return printed.strip() != "" and printed == value

OBJECT = (lambda value: isinstance(value, dict),
          "an object (annotations have 'database', result files 'results': are they swapped?)")
FIELDS = {                                  # {field: (test of its value, its value in words)}
    "database": OBJECT, "results": OBJECT, "AP": (OBJECT[0], "an object {class: [AP per tIoU]}"),
    "class": (lambda value: isinstance(value, list), "a list of names"),
    "subset": (lambda value: isinstance(value, str), "a text, or a file named like x_train.json"),
    "duration": (lambda value: is_number(value or 0), "a number of seconds"),
    "fps": (lambda value: is_number(value or 0), "frames a second, or 0 to ask the file"),
    "label": (is_text, "a text"),
    "segment": (lambda value: is_numbers(value, 2), "two finite numbers [start, end] in seconds"),
    "score": (is_number, "a finite number"),
    "videos": (lambda value: OBJECT[0](value) and all(map(is_number, value.values())),
               "an object {video: frames a second}")}

def check_fields(where, entry, *fields: str) -> None:
    """Raises InputError unless `entry` is an object whose fields are as in FIELDS."""
    expect(isinstance(entry, dict), where, " with ".join(["an object", *map(repr, fields)]), entry)
    for key in fields:
        good, expected = FIELDS[key]
        if not good(entry.get(key)):
            found = shorten(entry[key]) if key in entry else f"no such field but {first_ten(entry)}"
            expect(False, f"{where}: '{key}'", expected, found)

def first_ten(names) -> str:
    """Names for a message."""
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(names[:10]) or "none") + more
