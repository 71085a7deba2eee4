"""support/annotations.py - text files from outside -> Video: annotations, descriptions, scores.

Every format is checked here, once. A mistake in a file is an InputError.
Segments that are dropped or cut are counted in `notes`.
"""
import csv
import gzip
import json
import reprlib
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
CSV_FILES = ("val_Annotation.csv", "test_Annotation.csv",
             "EPIC_100_train.csv", "EPIC_100_validation.csv")
AMBIGUOUS = "labelled Ambiguous, dropped"


class InputError(ValueError):
    """A mistake of the user in a file or a flag.

    The message says where it is, what was expected, what was found, and what to do.
    """

    def __str__(self):
        """The message alone: torch's DataLoader puts a worker's traceback in front of it."""
        return super().__str__().rpartition("InputError: ")[2].rstrip()


@dataclass
class Video:
    """One untrimmed video: where it is, how long it is, and its actions."""
    name: str
    duration: float            # seconds
    fps: float                 # 0 = not known
    subset: str = ""
    segments: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))   # (N, 2) seconds
    labels: list = field(default_factory=list)                              # N names
    path: Path | None = None                                                # video or feature file


def load_annotations(path, labels: str = "verb", notes: list | None = None) -> list:
    """Annotation files -> list of Video, in the order of the file.

    `path` is one of

    * an ActivityNet-format JSON file, plain or gzip: `{"database": {name: {"subset",
      "duration" (seconds), "fps" (optional: 0 = ask the file), "annotations": [{"label",
      "segment": [start, end] (seconds)}]}}}`;
    * THUMOS14's val_Annotation.csv or test_Annotation.csv, with *_video_info.csv beside it;
    * EPIC_100_train.csv or EPIC_100_validation.csv, with video_info, verb_classes and
      noun_classes beside it; `labels`, "verb" or "noun", chooses one of the two;
    * the folder of such csv files: all of them are read.

    `notes` receives sentences on the segments that were dropped or cut (see `tidy`).
    Raises InputError with the file, the video or line, and the field.
    """
    videos = []
    found = Counter()
    for file in annotation_files(path):
        if file.suffix != ".csv":
            read = read_activitynet(file)
        elif file.name.startswith("EPIC_100_"):
            read = read_epic(file, labels)
        else:
            read = read_thumos(file, found)
        videos += [tidy(video, file, found) for video in read]
    if notes is not None:
        notes += [f"{path}: {count} segments {what}" for what, count in found.items() if count]
    return videos


def class_names(path, videos: list, labels: str = "verb") -> list:
    """Label names in the order of the class index.

    EPIC-Kitchens: every name of its class file. Elsewhere: the names in use, sorted.
    """
    file = annotation_files(path)[0]
    if file.name.startswith("EPIC_100_"):
        return list(epic_classes(file, labels).values())
    return sorted({label for video in videos for label in video.labels})


def annotation_files(path) -> list:
    """The file itself, or the annotation files of THUMOS14 or EPIC-Kitchens-100 in a folder."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    files = [path / name for name in CSV_FILES if (path / name).exists()]
    if not files:
        raise InputError(f"{path}: expected a folder with {' or '.join(CSV_FILES)}, found none; "
                         f"give their folder, or a JSON file in ActivityNet's format")
    return files


# -------------------------------------------------------------------- what is dropped or cut
def tidy(video: Video, path, found: Counter) -> Video:
    """The video without segments that cannot be learned; `found` counts every change.

    Dropped are: the label "Ambiguous" (any case), length zero, and a copy of an earlier
    segment (same label, start and end within 1e-3 s).
    A segment past the end of the video is cut to it. A segment that begins after the end
    stays: no window shows it, and the metric counts it as missed, as THUMOS14's own does.
    Raises InputError for a duration, fps or segment out of range.
    """
    check_times(video, f"{path}: video '{video.name}'")
    keep = kept_segments(video, found)
    segments = video.segments[keep]
    labels = [label for label, kept in zip(video.labels, keep) if kept]
    outside = segments[:, 0] >= video.duration
    over = (segments[:, 1] > video.duration) & ~outside
    segments[over, 1] = video.duration
    found["past the end of their video, cut"] += int(over.sum())
    found["that begin after the end of their video, kept but out of reach"] += int(outside.sum())
    return replace(video, segments=segments, labels=labels)


def check_times(video: Video, where: str) -> None:
    """Raises InputError for a duration, fps or segment out of range."""
    duration, fps = video.duration, video.fps
    if not 0 < duration <= 1e6:
        raise InputError(f"{where}: expected a duration above 0 s (to 1e6 s), found {duration:g}")
    if not 0 <= fps <= 1000:
        raise InputError(f"{where}: expected an fps of 0 (not known) to 1000, found {fps:g}")
    start, end = video.segments.T
    good = np.isfinite(video.segments).all(1) & (start >= 0) & (start <= end)
    if not good.all():
        first = int(np.argmin(good))
        raise InputError(f"{where}: expected segments with 0 <= start <= end in seconds, found "
                         f"{video.segments[first].tolist()} labelled {video.labels[first]}; "
                         f"correct or remove it")


def kept_segments(video: Video, found: Counter) -> np.ndarray:
    """(N,) bool: the segments that `tidy` does not drop. `found` counts the dropped ones."""
    segments = video.segments
    labels = np.array(video.labels, dtype=object)
    ambiguous = np.array([label.lower() == "ambiguous" for label in video.labels], dtype=bool)
    empty = segments[:, 0] == segments[:, 1]
    close = (np.abs(segments[:, None] - segments[None]) <= 1e-3).all(-1)        # (N, N)
    same = close & (labels[:, None] == labels[None])
    repeated = np.tril(same, -1).any(1)
    reasons = {AMBIGUOUS: ambiguous, "of length zero, dropped": empty,
               "that repeat another, dropped": repeated}
    keep = np.ones(len(segments), dtype=bool)
    for reason, drop in reasons.items():
        found[reason] += int((keep & drop).sum())
        keep &= ~drop
    return keep


# -------------------------------------------------------------------- ActivityNet's format
def read_activitynet(path) -> list:
    """The videos of an ActivityNet-format JSON file."""
    database = read_field(path, "database")
    return [parse_video(f"{path}: video '{name}'", name, entry)
            for name, entry in database.items()]


def parse_video(where: str, name: str, entry: dict) -> Video:
    """One entry of an ActivityNet-format file; `where` leads the error messages."""
    check_fields(where, entry, {
        "subset": (lambda value: isinstance(value, str), "a text"),
        "duration": (is_number, "a number of seconds"),
        "fps": (lambda value: is_number(value or 0), "frames a second, or 0 to ask the file")})
    read = read_segments(f"{where}: annotations", entry.get("annotations"), scored=False)
    return Video(name, float(entry["duration"]), float(entry.get("fps") or 0), entry["subset"],
                 read["segments"], read["labels"])


def read_segments(where: str, entries, scored: bool) -> dict:
    """The list [{"label", "segment", "score" (if scored)}] of one video as arrays.

    Returns {"segments": (N, 2) float64 seconds, "labels": [str], "scores": (N,) if scored}.
    `where` leads the error messages.
    """
    if not isinstance(entries, list):
        raise InputError(f"{where}: expected a list of segments, found {shorten(entries)}. "
                         "Write [] for a video without any.")
    checks = {"label": (is_text, "a text"),
              "segment": (is_pair, "two finite numbers [start, end] in seconds")}
    if scored:
        checks["score"] = is_number, "a finite number"
    for i, entry in enumerate(entries):
        check_fields(f"{where}[{i}]", entry, checks)
    segments = np.array([entry["segment"] for entry in entries], dtype=np.float64)
    read = {"segments": segments.reshape(-1, 2), "labels": [entry["label"] for entry in entries]}
    if scored:
        read["scores"] = np.array([entry["score"] for entry in entries], dtype=np.float64)
    return read


def check_fields(where: str, entry, checks: dict) -> None:
    """Raises InputError unless `entry` is an object whose fields are as expected.

    checks: {field: (test of its value, words for the value that is expected)}.
    """
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected an object with {', '.join(checks)}, found "
                         f"{shorten(entry)}")
    for name, (good, expected) in checks.items():
        if good(entry.get(name)):
            continue
        if name in entry:
            found = reprlib.repr(entry[name])
        else:
            found = f"no such field but {shorten(', '.join(entry) or 'none')}"
        raise InputError(f"{where}/{name}: expected {expected}, found {found}; "
                         f"correct or remove it")


# -------------------------------------------------------------------- csv files
def read_thumos(path: Path, found: Counter) -> list:
    """The videos of val_Annotation.csv (subset Validation) or test_Annotation.csv (Test)."""
    rows = read_table(path, video=str, type=str, start=float, end=float)
    # The info file lacks videos that have only ambiguous rows, so these rows go first.
    clear = [row for row in rows if row[1].lower() != "ambiguous"]
    found[AMBIGUOUS] += len(rows) - len(clear)
    info = path.with_name(path.name.replace("Annotation", "video_info"))
    lengths = {}
    for name, fps, count in read_table(info, video=str, fps=float, count=float):
        lengths[name] = (count / fps if fps else 0, fps)
    # The video video_test_0000004 is of subset Test.
    return group_rows(clear, lengths, info,
                      lambda name: name.removeprefix("video_").split("_")[0].capitalize())


def read_epic(path: Path, labels: str) -> list:
    """The videos of EPIC_100_train.csv (subset training) or EPIC_100_validation.csv."""
    classes = epic_classes(path, labels)
    column = f"{labels}_class"
    rows = read_table(path, video_id=str, **{column: int},
                      start_timestamp=clock, stop_timestamp=clock)
    unknown = {row[1] for row in rows} - set(classes)
    if unknown:
        raise InputError(f"{path}: column '{column}': expected ids of EPIC_100_{labels}_classes"
                         f".csv, found {min(unknown)}; take both files from one release")
    named = [(video, classes[index], start, end) for video, index, start, end in rows]
    info = path.with_name("EPIC_100_video_info.csv")
    table = read_table(info, video_id=str, duration=float, fps=float)
    lengths = {name: (duration, fps) for name, duration, fps in table}
    subset = "training" if path.stem == "EPIC_100_train" else "validation"
    return group_rows(named, lengths, info, lambda name: subset)


def epic_classes(path: Path, labels: str) -> dict:
    """{id: name} of the class file beside an annotation file of EPIC-Kitchens-100, in order."""
    if labels not in ("verb", "noun"):
        raise InputError(f"labels: expected verb or noun, found {labels!r}")
    return dict(read_table(path.with_name(f"EPIC_100_{labels}_classes.csv"), id=int, key=str))


def group_rows(rows: list, lengths: dict, info: Path, subset_of_name) -> list:
    """Rows (video, label, start, end) -> list of Video.

    lengths: {video: (duration, fps)}, read from the file `info`.
    """
    by_video = {}
    for name, *action in rows:
        by_video.setdefault(name, []).append(action)
    missing = [name for name in by_video if name not in lengths]
    if missing:
        raise InputError(f"{info}: expected a row for every annotated video, found none for "
                         f"{first_ten(missing)}")
    videos = []
    for name, actions in by_video.items():
        duration, fps = lengths[name]
        segments = np.array([[start, end] for _, start, end in actions])
        labels = [label for label, _, _ in actions]
        videos.append(Video(name, duration, fps, subset_of_name(name), segments, labels))
    return videos


def clock(text: str) -> float:
    """HH:MM:SS.ff -> seconds."""
    hours, minutes, seconds = text.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


CELLS = {str: "a name", int: "a whole number", float: "a number", clock: "HH:MM:SS.ff"}


def read_table(path: Path, **columns) -> list:
    """The named columns of a csv file with a header: one tuple per row.

    columns: {name: type}, a key of CELLS that turns the text of a cell into its value.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            table = [(reader.line_num, row) for row in reader]
            header = reader.fieldnames or []
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a csv file, found: {error}") from error
    for name in columns:
        if name not in header:
            found = ", ".join(header)[:200] or "nothing"
            raise InputError(f"{path}: line 1: expected a column '{name}', found {found}; check "
                             f"that this is the right file")
    return [read_row(f"{path}: line {line}", row, columns) for line, row in table]


def read_row(where: str, row: dict, columns: dict) -> tuple:
    """The values of one row; `where` leads the error message."""
    values = []
    for name, kind in columns.items():
        text = row[name]
        try:
            if not (text or "").strip():
                raise ValueError
            values.append(kind(text))
        except (ValueError, OverflowError):
            raise InputError(f"{where}: column '{name}': expected {CELLS[kind]}, found {text!r}; "
                             f"correct the line") from None
    return tuple(values)


# -------------------------------------------------------------------- scores and descriptions
def load_external_scores(path, classes: list, videos: list) -> dict:
    """Video-level class scores of another model (the CUHK scores of ActivityNet).

    The file is JSON: `{"results": {video: [K scores]}, "class": [K names]}`, names of videos
    with or without "v_". Returns {video: (K,) float32 tensor} for every one of `videos`, with
    the scores in the order of `classes`. Raises InputError if a video or a class is missing.
    """
    content = read_json(path)
    results, names = None, None
    if isinstance(content, dict):
        results, names = content.get("results"), content.get("class")
    if not (isinstance(results, dict) and isinstance(names, list)):
        raise InputError(f'{path}: expected {{"results": {{video: [a score per class]}}, '
                         f'"class": [names]}}, found {shorten(content)}')
    rows, missing = {}, []
    for video in videos:
        spellings = (video.name, f"v_{video.name}", video.name.removeprefix("v_"))
        row = next((results[name] for name in spellings if name in results), None)
        if row is None:
            missing.append(video.name)
            continue
        rows[video.name] = row
        if not (is_numbers(row) and len(row) == len(names)):
            raise InputError(f"{path}: video '{video.name}': expected a finite score for each "
                             f"of the {len(names)} names of 'class', found {shorten(row)}")
    missing += [name for name in classes if name not in names]
    if missing:
        raise InputError(f"{path}: expected scores for every video and class, found none for "
                         f"{first_ten(missing)}")
    columns = [names.index(name) for name in classes]
    return {name: torch.tensor(row, dtype=torch.float32)[columns] for name, row in rows.items()}


def load_descriptions(path, classes: list, notes: list | None = None) -> dict:
    """JSON {label: description} (T_desc) -> the entries of `classes`, in that order.

    A class without a description is an error; `notes` names descriptions without a class.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected {{label: description}}, found {shorten(content)}")
    for label, text in content.items():
        if not is_text(text):
            raise InputError(f"{path}: '{label}': expected {{label: description}}, a text, found "
                             f"{reprlib.repr(text)}")
    missing = [name + alike(name, content) for name in classes if name not in content]
    if missing:
        raise InputError(f"{path}: expected a description for every class, found none for "
                         f"{', '.join(missing)}; add a sentence for each, from start pose to end")
    unused = [label for label in content if label not in classes]
    if unused and notes is not None:
        notes.append(f"{path}: {len(unused)} descriptions of classes that the annotations have "
                     f"not, not used: {first_ten(unused)}")
    return {name: content[name] for name in classes}


def alike(name: str, names) -> str:
    """A hint, if one of the names differs from `name` only in case or by a letter or two."""
    lower = {other.lower(): other for other in names}
    near = get_close_matches(name.lower(), lower, 1, 0.8)
    if not near:
        return ""
    return f" (there is '{lower[near[0]]}': spell them alike)"


# -------------------------------------------------------------------- videos
def find_files(videos: list, folder, suffixes=VIDEO_SUFFIXES, skip_missing: bool = False,
               notes: list | None = None) -> list:
    """Videos with `path` set to `folder/NAME + suffix`, or `v_NAME` as in ActivityNet's files.

    Raises InputError with the names of missing files. With `skip_missing` their videos are
    left out instead, and `notes` receives a sentence on them.
    """
    folder = Path(folder)
    kind = "/".join(suffixes)
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of {kind} files, found no folder there")
    files = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in suffixes}
    found, missing = [], []
    for video in videos:
        path = files.get(video.name) or files.get(f"v_{video.name}")
        if path:
            found.append(replace(video, path=path))
        else:
            missing.append(video.name)
    lack = f"found none for {len(missing)} of {len(videos)}: {first_ten(missing)}"
    if missing and not (skip_missing and found):
        raise InputError(f"{folder}: expected a {kind} file per annotated video, {lack}; add "
                         f"them, or leave these videos out with --skip-missing")
    if missing and notes is not None:
        notes.append(f"{folder}: {lack}; left out")
    return found


def subset_of(videos: list, subset: str, path) -> list:
    """The videos of one subset, named in any case.

    Raises InputError for an unknown name, with the names that there are.
    """
    chosen = [video for video in videos if video.subset.lower() == subset.lower()]
    if not chosen:
        names = sorted({video.subset for video in videos})
        raise InputError(f"{path}: expected videos of subset '{subset}', found none; subsets "
                         f"there: {names}")
    return chosen


# -------------------------------------------------------------------- JSON and messages
def read_json(path):
    """Parse a JSON file, plain or gzip (the first two bytes tell)."""
    try:
        raw = Path(path).read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        return json.loads(raw)
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON file (plain or gzip), found: {error}") from error


def read_field(path, field: str) -> dict:
    """The object `field` of a JSON file, plain or gzip."""
    content = read_json(path)
    if not isinstance(content, dict):
        found = shorten(content)
    elif field not in content:
        found = f"an object with fields {shorten(', '.join(content) or '(none)')}"
    elif not isinstance(content[field], dict):
        found = shorten(content[field])
    else:
        return content[field]
    raise InputError(f"{path}: expected an object '{field}' at the top, found {found}. Annotations "
                     f"have 'database', a result file 'results': are the two files swapped?")


def is_number(value) -> bool:
    """A finite number that fits in a float; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max


def is_numbers(value) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def is_pair(value) -> bool:
    return is_numbers(value) and len(value) == 2


def is_text(value) -> bool:
    """A text that is not blank and can be printed: JSON may hold half a character (a surrogate)."""
    if not isinstance(value, str) or not value.strip():
        return False
    return value.encode(errors="ignore").decode() == value


def shorten(value) -> str:
    """A value for a message; a deep or long one in part."""
    if not isinstance(value, str):
        return reprlib.repr(value)
    return value if len(value) <= 80 else value[:80] + "..."


def first_ten(names: list) -> str:
    """Names for a message."""
    text = ", ".join(names[:10])
    if len(names) > 10:
        text += f" and {len(names) - 10} more"
    return text
