"""experiments/reproduce.py - the paper's ablations (Tables 2, 3, 4, 5, 9) as one report.

    python -m experiments.reproduce --out out-tables                     # the demo, seeds 0 1 2
    python -m experiments.reproduce --out out-tables --only 4 --seeds 0  # one table, one seed
    python -m experiments.reproduce --out out-tables --only 2 4 -- --dataset custom ...

Every run trains and scores a model in OUT/NAME-seedS. A run whose figures are there is not
repeated, and a run that was stopped goes on. The report is OUT/report.md.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

from experiments.bias import LEVELS, read_reference
from experiments.tables import TABLES
from support.annotations import InputError, is_number, read_json
from support.commands import run_command
from support.demo import make_demo
from support.flags import integer
from support.presets import PRESETS

ROOT = Path(__file__).parents[1]
RUNS = {                                                     # name -> flags of train.py
    "vision-only": ["--lambda-lang", "0"],                   # first: Table 3 measures against it
    "full": [],
    "language-only": ["--ablation", "only-language"],
    "without-adv": ["--ablation", "without-adv"],
    "generated": ["--lambda-lang", "generated"],
    **{f"fixed-{x}": ["--lambda-lang", x] for x in ("1.0", "0.8", "0.6", "0.4", "0.2")},
    "labels": ["--ablation", "labels-only"],
    "vision-tokens": ["--ablation", "vision-tokens"],
    "shared-token": ["--ablation", "shared-token"],
    "without-tg": ["--ablation", "without-tg"],
}
COMMANDS = {                                                 # file of figures -> what writes it
    "figures.json": ["evaluate.py"],
    "bias.json": ["experiments.bias"],
    "qa.json": ["experiments.question_answering"],
    "groups.json": ["experiments.bias"],                     # and group_flags
    "incomplete.json": ["experiments.bias", "--incomplete"],
}


def main(argv=None) -> int:
    """Returns the exit code: 0, or 2 for a mistake in the flags or a run that failed."""
    return run_command("reproduce.py", reproduce, get_args(argv))


def reproduce(args) -> None:
    """Do the runs that are not there yet, then print the report and write report.md."""
    keep_settings(args)
    if "--annotations" not in args.train_flags:               # here, so that no two runs render it
        make_demo(Path(PRESETS["demo"]["annotations"]).parent)
    with ThreadPoolExecutor(args.jobs) as pool:
        for groups in (False, True):                          # groups.json needs all figures.json
            list(pool.map(partial(run, args, groups), needed(args)))
    text = report(args)
    (args.out / "report.md").write_text(text)
    print(f"{text}\nwrote {args.out / 'report.md'}")


def get_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    flag, tables = parser.add_argument, sorted(TABLES)
    flag("--out", required=True, type=Path, metavar="DIR", help="folder of runs and report.md")
    flag("--only", type=int, nargs="+", choices=tables, default=tables, help="tables (all)")
    flag("--seeds", type=integer(), nargs="+", default=[0, 1, 2], help="of every run (0 1 2)")
    flag("--epochs", type=integer(), help="epochs of every run (default: those of the preset)")
    flag("--jobs", type=integer(1, 1024), default=2, help="runs at a time (%(default)s)")
    flag("train_flags", nargs="*", help="after --: flags for train.py, for other data")
    return parser.parse_args(argv)


def keep_settings(args) -> None:
    """All runs in a folder have the same epochs and data; InputError if an earlier call differs."""
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "settings.json"
    ours = {"epochs": args.epochs, "train_flags": args.train_flags}
    if file.exists() and read_json(file) != ours:
        raise InputError(f"--out {args.out}: expected a folder of runs with {ours}, found "
                         f"{read_json(file)}; give the same flags or another folder")
    file.write_text(json.dumps(ours))


def needed(args) -> list:
    """[(run, seed, files of figures)] of the chosen tables, each run once, vision-only first."""
    files = {}
    for number in args.only:
        for _, name, file, _ in TABLES[number].rows:
            files.setdefault(name, set()).add(file)
    if "vision-only" in files:
        files["vision-only"].add("figures.json")              # which classes are easy and hard
    names = [name for name in RUNS if name in files]
    return [(name, seed, sorted(files[name])) for name in names for seed in args.seeds]


def run(args, groups: bool, task: tuple) -> None:
    """Train one run of `needed` if it is not trained, then write its figures that are not there.

    groups: write groups.json alone, or everything but groups.json.
    """
    name, seed, files = task
    folder = args.out / f"{name}-seed{seed}"
    chosen = [file for file in files if (file == "groups.json") == groups]
    missing = [file for file in chosen if not (folder / file).exists()]
    if missing and not (folder / "report.png").exists():      # the last file that train.py writes
        resume = (folder / "checkpoint.safetensors").exists()
        flags = [*RUNS[name], *args.train_flags, "--resume" if resume else "--overwrite"]
        if args.epochs is not None:
            flags += ["--epochs", args.epochs]
        command(args, folder, "train.py", "--out", folder, "--seed", seed, *flags)
    for file in missing:
        program, *flags = COMMANDS[file]
        if file == "groups.json":
            flags = group_flags(args.out / f"vision-only-seed{seed}" / "figures.json")
        unfinished = folder / f"{file}.partial"               # never half a file
        command(args, folder, program, "--checkpoint", folder, *flags, "--json", unfinished)
        os.replace(unfinished, folder / file)


def group_flags(reference: Path) -> list:
    """Make a third of the classes easy and a third hard for the vision-only run."""
    AP = sorted(read_reference([str(reference)]).values())
    third = len(AP) // 3
    return ["--groups", reference, "--hard", AP[third], "--easy", AP[-max(1, third)]]


def hard_mAP(figures: dict, reference: Path) -> float:
    """Mean AP of the third of the classes in which the vision-only run is worst."""
    AP = read_reference([str(reference)])
    hard = sorted(AP, key=AP.get)[:max(1, len(AP) // 3)]
    return mean(mean(figures["AP"][name]) for name in hard)


def command(args, folder: Path, program: str, *flags) -> None:
    """Run a file or module of the project, which prints into FOLDER/commands.log.

    It runs in the caller's working directory, for the paths in `flags`. InputError if it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
    words, started = [*place, *map(str, flags)], time.time()
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": path}
    with open(folder / "commands.log", "a") as log:
        print("$", *words, file=log, flush=True)
        done = subprocess.run([sys.executable, *words], env=environment,
                              stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        last = "\n".join((folder / "commands.log").read_text().splitlines()[-5:])
        raise InputError(f"{program} ended with code {done.returncode} in {folder}; "
                         f"its last lines:\n{last}")
    print(f"{folder.name}: {program} {time.time() - started:.0f} s", flush=True)


def report(args) -> str:
    """The tables in Markdown."""
    line, seeds = " ".join(["python train.py", *args.train_flags]), ", ".join(map(str, args.seeds))
    if args.epochs is not None:
        line += f" --epochs {args.epochs}"
    lines = ["# The paper's ablations", "",
             f"`{line}`, seeds {seeds}. Figures in percent, but mLA: mean ± standard deviation "
             f"over the seeds (in brackets: the paper's, on THUMOS14)."]
    if "--lm" not in args.train_flags:
        lines += ["", "The language model here is small and has random weights. It knows nothing "
                  "of actions, so these figures cannot say whether a real one would help."]
    for number in args.only:
        lines += report_table(args, number)
    return "\n".join(lines) + "\n"


def report_table(args, number: int) -> list:
    """Lines of one table, and of how its order compares with the paper's."""
    title, columns, rows, main = TABLES[number]
    values = []
    for _, run, file, _ in rows:
        values.append([collect(args, run, file, keys, factor) for _, keys, factor in columns])
    headings = [heading for heading, _, _ in columns]
    digits = [1 if factor == 100 else 3 for _, _, factor in columns]
    lines = ["", f"## {title}", "", "| | " + " | ".join(headings) + " |",
             "|:--|" + "--:|" * len(columns)]
    for (label, _, _, paper), ours in zip(rows, values):
        lines.append(f"| {label} | " + " | ".join(map(cell, ours, paper, digits)) + " |")
    labels, papers = [row[0] for row in rows], [row[3] for row in rows]
    order = compare(labels, [row[main] for row in papers], [row[main] for row in values])
    lines += ["", f"{headings[main]}: {order}"]
    if number == 3:
        order = compare(LEVELS, papers[-1][2::3], values[-1][2::3])
        lines += ["", f"mLA of the full model: {order}"]
    return lines


def collect(args, name: str, file: str, keys, factor: float) -> list:
    """One figure of a run for each seed; [] if the run has no such figure, such as a LAP."""
    found = []
    for seed in args.seeds:
        value = read_json(args.out / f"{name}-seed{seed}" / file)
        if keys == "hard":
            value = hard_mAP(value, args.out / f"vision-only-seed{seed}" / "figures.json")
        else:
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
        if is_number(value):
            found.append(factor * value)
    return found


def spread(values: list) -> float:
    """Standard deviation over the seeds (n - 1 below); 0 for a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def cell(values: list, paper: float | None, digits: int) -> str:
    """One cell: "94.1 ± 0.8 (72.0)"; "-" without figures."""
    text = f"{mean(values):.{digits}f}" if values else "-"
    if len(values) > 1:
        text += f" ± {spread(values):.{digits}f}"
    if paper is not None:
        text += f" ({paper:.{digits}f})"
    return text


def compare(labels, paper, ours: list) -> str:
    """A sentence on the pairs that stand in another order than in the paper.

    labels: n names. paper: n figures or None. ours: n lists of figures, one for each seed.
    """
    rows = [row for row in zip(labels, paper, ours) if row[1] is not None and row[2]]
    pairs, other, clear = 0, 0, []
    for (a, paper_a, ours_a), (b, paper_b, ours_b) in combinations(rows, 2):
        if paper_a == paper_b:
            continue
        pairs += 1
        difference = mean(ours_a) - mean(ours_b)
        if (paper_a - paper_b) * difference <= 0:
            other += 1
            if abs(difference) > spread(ours_a) + spread(ours_b):
                clear.append(f"{a} / {b}")
    if not other:
        return f"all {pairs} pairs stand in the paper's order."
    said = f"{other} of {pairs} pairs do not stand in the paper's order"
    if any(len(row[2]) < 2 for row in rows):
        return said + "; one seed cannot say whether by chance."
    named = f" ({', '.join(clear)})" if clear else ""
    return (f"{said}; {len(clear)} of these lie further apart than their two standard deviations "
            f"together{named}.")


if __name__ == "__main__":
    sys.exit(main())
