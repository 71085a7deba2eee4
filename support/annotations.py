"""annotations.py - what comes from outside as text: annotations, descriptions, video-level scores -> Video.

Validation stands here, once per format. What is dropped or cut is counted in `notes`, and what is wrong is an
InputError.
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


class InputError(ValueError):
    """A mistake in a file or flag of the user's; the message says where, what was expected, found, and what to do."""

    def __str__(self):
        """The message alone: from a worker process, torch's DataLoader brings it at the end of a traceback."""
        return super().__str__().rpartition("annotations.InputError: ")[2].rstrip()


@dataclass
class Video:
    """One untrimmed video: where it is, how long it is (seconds), and its actions (seconds, label names)."""
    name: str
    duration: float
    fps: float
    subset: str = ""
    segments: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))   # (N, 2) seconds
    labels: list = field(default_factory=list)                              # N names
    path: Path | None = None                                                # video or feature file


def load_annotations(path, labels: str = "verb", notes: list | None = None) -> list:
    """Annotation files -> list of Video, in the order of the file. `path` is one of

    * an ActivityNet-format JSON file, plain or gzip: `{"database": {name: {"subset", "duration" (seconds), "fps"
      (optional: 0 = ask the file), "annotations": [{"label", "segment": [start, end] (seconds)}]}}}`;
    * THUMOS14's val_Annotation.csv or test_Annotation.csv, with *_video_info.csv beside it;
    * EPIC_100_train.csv or EPIC_100_validation.csv, with video_info, verb_classes and noun_classes beside it; `labels`
      says which of them are the labels, "verb" or "noun";
    * the folder of such csv files: all of them.

    Sentences on what was dropped or cut (see `tidy`) are added to `notes`. Raises InputError naming file, video or
    line, and field.
    """
    videos, found = [], Counter()
    for file in annotation_files(path):
        read = read_activitynet(file) if file.suffix != ".csv" else \
            read_epic(file, labels) if file.name.startswith("EPIC_100_") else read_thumos(file, found)
        videos += [tidy(video, file, found) for video in read]
    if notes is not None:
        notes += [f"{path}: {count} segments {what}" for what, count in found.items() if count]
    return videos


def class_names(path, videos: list, labels: str = "verb") -> list:
    """Label names in the order of the class index: all of EPIC-Kitchens' class file; elsewhere those in use, sorted."""
    file = annotation_files(path)[0]
    if file.name.startswith("EPIC_100_"):
        return list(epic_classes(file, labels).values())
    return sorted({label for v in videos for label in v.labels})


def annotation_files(path) -> list:
    """The file itself, or the annotation files of THUMOS14 or EPIC-Kitchens-100 in a folder."""
    names = ("val_Annotation.csv", "test_Annotation.csv", "EPIC_100_train.csv", "EPIC_100_validation.csv")
    path = Path(path)
    files = [path / name for name in names if (path / name).exists()] if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: expected a folder with {' or '.join(names)}, found none of them; give the folder "
                         f"that has them, or a JSON file in ActivityNet's format")
    return files


AMBIGUOUS = "labelled Ambiguous, dropped"


def tidy(video: Video, path, found: Counter) -> Video:
    """The video less the segments that are no actions to learn; `found` counts what was done with how many.

    Dropped: label "Ambiguous" (any case), length zero, a copy of an earlier one (label, start and end within 1e-3 s).
    Segments past the end of the video are cut to it. Those that begin after it stay: no window shows them, and the
    metric counts them as missed, as THUMOS14's own does. Raises InputError for a duration or segment out of order.
    """
    where, segments, labels = f"{path}: video '{video.name}'", video.segments, np.array(video.labels, dtype=object)
    if not 0 < video.duration <= 1e6:
        raise InputError(f"{where}: expected a duration above 0 seconds (and up to 1e6), found {video.duration:g}")
    if not 0 <= video.fps <= 1000:
        raise InputError(f"{where}: expected an fps of 0 (not known) to 1000, found {video.fps:g}")
    good = np.isfinite(segments).all(1) & (segments[:, 0] >= 0) & (segments[:, 0] <= segments[:, 1])
    if not good.all():
        raise InputError(f"{where}: expected segments with 0 <= start <= end in seconds, found "
                         f"{segments[~good][0].tolist()} labelled {labels[~good][0]}; correct or remove it")
    near = (np.abs(segments[:, None] - segments[None]) <= 1e-3).all(-1) & (labels[:, None] == labels[None])
    keep = np.ones(len(segments), dtype=bool)
    for what, drop in ((AMBIGUOUS, np.array([label.lower() == "ambiguous" for label in labels], dtype=bool)),
                       ("of length zero, dropped", segments[:, 0] == segments[:, 1]),
                       ("that repeat another, dropped", np.tril(near, -1).any(1))):
        found[what] += int((keep & drop).sum())
        keep &= ~drop
    segments, labels = segments[keep], labels[keep].tolist()
    over, outside = segments[:, 1] > video.duration, segments[:, 0] >= video.duration
    found["past the end of their video, cut"] += int((over & ~outside).sum())
    found["that begin after the end of their video, kept but out of reach"] += int(outside.sum())
    return replace(video, labels=labels, segments=np.where((over & ~outside)[:, None],
                                                           segments.clip(max=video.duration), segments))


def read_activitynet(path) -> list:
    """The videos of an ActivityNet-format JSON file."""
    return [parse_video(f"{path}: video '{name}'", name, entry) for name, entry in read_field(path, "database").items()]


def parse_video(where: str, name: str, entry: dict) -> Video:
    """One entry of an ActivityNet-format file; `where` leads the error messages."""
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected an object with subset, duration and annotations, found {shorten(entry)}")
    fps = entry.get("fps") or 0
    for good, *problem in ((isinstance(entry.get("subset"), str), "subset", "a text"),
                           (is_number(entry.get("duration")), "duration", "a number of seconds"),
                           (is_number(fps), "fps", "a number of frames a second, or 0 to ask the file")):
        if not good:
            raise InputError(f"{where}: {wrong(entry, *problem)}; correct it")
    read = read_segments(f"{where}: annotations", entry.get("annotations"), scored=False)
    return Video(name, float(entry["duration"]), float(fps), entry["subset"], read["segments"], read["labels"])


def read_segments(where: str, entries, scored: bool) -> dict:
    """[{"label", "segment", and "score" if scored}] of one video as arrays. `where` leads the error messages."""
    if not isinstance(entries, list):
        raise InputError(f"{where}: expected a list of segments, found {shorten(entries)}. "
                         "Write [] for a video without any.")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InputError(f"{where}[{i}]: expected an object with label and segment, found {shorten(entry)}.")
        segment = entry.get("segment")
        if not is_text(entry.get("label")):
            problem = "label", "a text"
        elif not (isinstance(segment, list) and len(segment) == 2 and all(map(is_number, segment))):
            problem = "segment", "two finite numbers [start, end] in seconds"
        elif scored and not is_number(entry.get("score")):
            problem = "score", "a finite number"
        else:
            continue
        raise InputError(f"{where}[{i}]/{wrong(entry, *problem)}. Correct or remove this entry.")
    read = {"segments": np.array([entry["segment"] for entry in entries], dtype=np.float64).reshape(-1, 2),
            "labels": [entry["label"] for entry in entries]}
    if scored:
        read["scores"] = np.array([entry["score"] for entry in entries], dtype=np.float64)
    return read


def read_thumos(path: Path, found: Counter) -> list:
    """The videos of val_Annotation.csv or test_Annotation.csv; "video_test_0000004" is of subset Test."""
    rows = read_table(path, video=str, type=str, start=float, end=float)
    clear = [row for row in rows if row[1].lower() != "ambiguous"]     # the info lacks a video that has no other rows
    found[AMBIGUOUS] += len(rows) - len(clear)
    info = path.with_name(path.name.replace("Annotation", "video_info"))
    lengths = {name: (count / fps if fps else 0, fps)
               for name, fps, count in read_table(info, video=str, fps=float, count=float)}
    return group_rows(clear, lengths, info, lambda name: name.removeprefix("video_").split("_")[0].capitalize())


def read_epic(path: Path, labels: str) -> list:
    """The videos of EPIC_100_train.csv (subset training) or EPIC_100_validation.csv."""
    classes, column = epic_classes(path, labels), f"{labels}_class"
    rows = read_table(path, video_id=str, **{column: int}, start_timestamp=clock, stop_timestamp=clock)
    unknown = {row[1] for row in rows} - set(classes)
    if unknown:
        raise InputError(f"{path}: column '{column}': expected ids of EPIC_100_{labels}_classes.csv, found "
                         f"{min(unknown)}; take both files from one release")
    info = path.with_name("EPIC_100_video_info.csv")
    lengths = {name: length for name, *length in read_table(info, video_id=str, duration=float, fps=float)}
    subset = "training" if path.stem == "EPIC_100_train" else "validation"
    return group_rows([(name, classes[c], *times) for name, c, *times in rows], lengths, info, lambda name: subset)


def epic_classes(path: Path, labels: str) -> dict:
    """{id: name} of the class file beside an annotation file of EPIC-Kitchens-100, in its order."""
    if labels not in ("verb", "noun"):
        raise InputError(f"--labels: expected verb or noun, found {labels!r}")
    return dict(read_table(path.with_name(f"EPIC_100_{labels}_classes.csv"), id=int, key=str))


def group_rows(rows: list, lengths: dict, info: Path, subset_of_name) -> list:
    """Rows (video, label, start, end) -> list of Video; `lengths`: {video: (duration, fps)} from the file `info`."""
    by_video = {}
    for name, label, *segment in rows:
        by_video.setdefault(name, []).append((label, segment))
    missing = [name for name in by_video if name not in lengths]
    if missing:
        raise InputError(f"{info}: expected a row for every annotated video, found none for {first_ten(missing)}")
    return [Video(name, *lengths[name], subset_of_name(name), np.array([segment for _, segment in own]),
                  [label for label, _ in own]) for name, own in by_video.items()]


def read_table(path: Path, **columns) -> list:
    """The named columns of a csv file with a header: a tuple for each row, each value made by its column's type."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            table, header = [(reader.line_num, row) for row in reader], reader.fieldnames or []
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a csv file, found: {error}") from error
    for name in columns:
        if name not in header:
            raise InputError(f"{path}: line 1: expected a column '{name}', found "
                             f"{', '.join(header)[:200] or 'nothing'}; check that this is the right file")
    kinds, rows = {str: "a name", int: "a whole number", float: "a number", clock: "HH:MM:SS.ff"}, []
    for line, row in table:
        try:
            for name, kind in columns.items():
                if not (row[name] or "").strip():
                    raise ValueError
                row[name] = kind(row[name])
        except (ValueError, OverflowError):
            raise InputError(f"{path}: line {line}: column '{name}': expected {kinds[kind]}, found {row[name]!r}; "
                             f"correct the line") from None
        rows.append(tuple(row[name] for name in columns))
    return rows


def clock(text: str) -> float:
    """HH:MM:SS.ff -> seconds."""
    hours, minutes, seconds = text.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def load_external_scores(path, classes: list, videos: list) -> dict:
    """Video-level class scores of another model (the CUHK scores of ActivityNet) -> {video: (K,) float32 tensor}.

    JSON `{"results": {video: [K scores]}, "class": [K names]}`; names of videos with or without "v_". The scores come
    in the order of `classes`, for every one of `videos`.
    """
    content = read_json(path)
    results, names = map(content.get, ("results", "class")) if isinstance(content, dict) else (None, None)
    if not (isinstance(results, dict) and isinstance(names, list)):
        raise InputError(f'{path}: expected {{"results": {{video: [a score per class]}}, "class": [names]}}, found '
                         f"{shorten(content)}")
    found = {v.name: next((results[n] for n in (v.name, f"v_{v.name}", v.name.removeprefix("v_")) if n in results),
                          None) for v in videos}
    scores = {name: row for name, row in found.items() if row is not None}
    for name, row in scores.items():
        if not (isinstance(row, list) and len(row) == len(names) and all(map(is_number, row))):
            raise InputError(f"{path}: video '{name}': expected a finite score for each of the {len(names)} names of "
                             f"'class', found {shorten(row)}")
    columns = [names.index(c) for c in classes if c in names]
    missing = [name for name in found if name not in scores] + [c for c in classes if c not in names]
    if missing:
        raise InputError(f"{path}: expected scores for every video and class, found none for {first_ten(missing)}")
    return {name: torch.tensor(row, dtype=torch.float32)[columns] for name, row in scores.items()}


def load_descriptions(path, classes: list, notes: list | None = None) -> dict:
    """JSON {label: description} (T_desc) -> the entries of `classes`, in that order; one that lacks is an error, and
    `notes` says which are of no class."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected {{label: description}}, found {shorten(content)}")
    for label, text in content.items():
        if not is_text(text):
            raise InputError(f"{path}: '{label}': expected {{label: description}}, a text, found {reprlib.repr(text)}")
    missing = [c + alike(c, content) for c in classes if c not in content]
    if missing:
        raise InputError(f"{path}: expected a description for every class, found none for {', '.join(missing)}; "
                         f"add a sentence for each, from start pose to end pose")
    unused = [label for label in content if label not in classes]
    if unused and notes is not None:
        notes.append(f"{path}: {len(unused)} descriptions of classes that the annotations have not, not used: "
                     f"{first_ten(unused)}")
    return {c: content[c] for c in classes}


def alike(name: str, names) -> str:
    """A hint, where one of the names differs from `name` only in case or by a letter or two."""
    lower = {other.lower(): other for other in names}
    near = get_close_matches(name.lower(), lower, 1, 0.8)
    return f" (there is '{lower[near[0]]}': spell them alike)" if near else ""


def find_files(videos: list, folder, suffixes=VIDEO_SUFFIXES, skip_missing: bool = False,
               notes: list | None = None) -> list:
    """Videos with `path` set to `folder/NAME + suffix`, or `v_NAME` as ActivityNet's files are called.

    Missing files are an error that names them; with `skip_missing` their videos are left out, and `notes` says so.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of {'/'.join(suffixes)} files, found no folder there")
    files = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in suffixes}
    paths = {v.name: files.get(v.name) or files.get(f"v_{v.name}") for v in videos}
    missing = [name for name, path in paths.items() if path is None]
    lack = f"found none for {len(missing)} of {len(videos)}: {first_ten(missing)}"
    if missing and (not skip_missing or len(missing) == len(videos)):
        raise InputError(f"{folder}: expected a {'/'.join(suffixes)} file per annotated video, {lack}; add them, or "
                         f"leave these videos out with --skip-missing")
    if missing and notes is not None:
        notes.append(f"{folder}: {lack}; left out")
    return [replace(v, path=paths[v.name]) for v in videos if paths[v.name]]


def first_ten(names: list) -> str:
    """Names for a message."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")


def subset_of(videos: list, subset: str, path) -> list:
    """The videos of one subset (its name in any case); an unknown name is an error that lists those there are."""
    chosen = [v for v in videos if v.subset.lower() == subset.lower()]
    if not chosen:
        names = sorted({v.subset for v in videos})
        raise InputError(f"{path}: expected videos of subset '{subset}', found none; subsets there: {names}")
    return chosen


# ------------------------------------------------------------------------------------------------ JSON
def read_json(path):
    """Parse a JSON file, plain or gzip (told by its content)."""
    try:
        raw = Path(path).read_bytes()
        return json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON file (plain or gzip), found: {error}") from error


def read_field(path, field: str) -> dict:
    """The object `field` of a JSON file, plain or gzip."""
    data = read_json(path)
    if not (isinstance(data, dict) and isinstance(data.get(field), dict)):
        found = shorten(data) if not isinstance(data, dict) else shorten(data[field]) if field in data \
            else f"an object with fields {shorten(', '.join(data) or '(none)')}"
        raise InputError(f"{path}: expected an object '{field}' at the top, found {found}. "
                         "Annotations have 'database' and a result file 'results': are the two files swapped?")
    return data[field]


def wrong(entry: dict, field: str, expected: str) -> str:
    """What a message says of one field of an object."""
    found = reprlib.repr(entry[field]) if field in entry else f"no such field but {shorten(', '.join(entry) or 'none')}"
    return f"{field}: expected {expected}, found {found}"


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_text(value) -> bool:
    """Neither blank nor with half a character (a lone surrogate, which JSON may hold and nothing can print)."""
    return isinstance(value, str) and value.strip() != "" and value.encode(errors="ignore").decode() == value


def shorten(value) -> str:
    """A value for a message; deep or long ones in part."""
    return (value if len(value) <= 80 else value[:80] + "...") if isinstance(value, str) else reprlib.repr(value)
