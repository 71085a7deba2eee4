"""experiments/reproduce.py - the paper's ablations (Tables 2, 3, 4, 5, 9) as one report.

    python -m experiments.reproduce --out out-tables                      # the demo, seeds 0 1 2
    python -m experiments.reproduce --out out-tables --only 2 4 --seeds 0 -- --dataset custom ...
A run whose figures are there is not repeated, and one that was stopped goes on."""
import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from experiments.bias import read_reference
from support.annotations import InputError, expect, is_number, read_json
from support.checkpoint import written_whole
from support.commands import run_command
from support.demo import make_demo
from support.flags import PRESETS, ROOT, integer

ALONE = "lambda-lang=0"          # the vision-only run, which tells easy and hard classes
COMMANDS = {"figures.json": "evaluate.py", "qa.json": "experiments/question_answering.py",
            "bias.json": "experiments/bias.py", "groups.json": "experiments/bias.py --groups",
            "incomplete.json": "experiments/bias.py --incomplete"}
HEADS, ROWS = (part.splitlines()[1:] for part in
               (ROOT / "experiments/tables.txt").read_text().split("\n\n"))
TABLES = {}                      # {number: (title, figures of its columns by keys in a file)}
for head in HEADS:
    number, title, columns = head.split(" | ")
    TABLES[int(number)] = title, columns.split(", ")

def main(argv=None):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    flag, tables = parser.add_argument, list(TABLES)
    flag("--out", required=True, type=Path, metavar="DIR", help="folder of runs and report.md")
    flag("--only", type=int, nargs="+", choices=tables, default=tables, help="tables (all)")
    flag("--seeds", type=integer(), nargs="+", default=[0, 1, 2], help="of every run (0 1 2)")
    flag("--epochs", type=integer(), help="epochs of every run (default: those of the preset)")
    flag("--jobs", type=integer(1, 1024), default=2, help="runs at a time (%(default)s)")
    flag("train_flags", nargs="*", help="after --: flags for train.py, for other data")
    return run_command("reproduce.py", reproduce, parser.parse_args(argv))

def reproduce(args) -> None:
    """Do the runs that are not there yet, then print the report and write report.md."""
    args.out.mkdir(parents=True, exist_ok=True)
    file, ours = args.out / "settings.json", dict(epochs=args.epochs, train_flags=args.train_flags)
    theirs = read_json(file) if file.exists() else ours
    expect(theirs == ours, f"--out {args.out}", f"a folder of runs with {ours}", f"{theirs}",
           "give the same flags or another folder")
    file.write_text(json.dumps(ours))
    if args.epochs is not None:
        args.train_flags += ["--epochs", str(args.epochs)]
    if "--annotations" not in args.train_flags:               # here, so that no two runs render it
        make_demo(Path(PRESETS["demo"]["annotations"]).parent)
    files = needed(args.only)
    with ThreadPoolExecutor(args.jobs) as pool:
        for names in ([ALONE], files):                        # groups.json measures against it
            list(pool.map(lambda task: run(args, files, *task), product(names, args.seeds)))
    text = report(args)
    (args.out / "report.md").write_text(text)
    print(f"{text}\nwrote {args.out / 'report.md'}")

def needed(tables: list) -> dict:
    """{run: files of figures} of these tables, in the order of their names."""
    files = {}
    for number, name, file, *_ in map(str.split, ROWS):
        if int(number) in tables:
            files.setdefault(name, set()).add(file)
            if file == "groups.json":
                files.setdefault(ALONE, set()).add("figures.json")
    return {name: sorted(found) for name, found in files.items()}

def run(args, files: dict, name: str, seed: int) -> None:
    """Train a run if it is not trained, then write its files of figures that are not there."""
    folder = args.out / f"{name}-seed{seed}"
    missing = [file for file in files.get(name, []) if not (folder / file).exists()]
    for file in missing:
        if not (folder / "report.png").exists():              # the last file that train.py writes
            resume = (folder / "checkpoint.safetensors").exists()
            flags = ["--resume" if resume else "--overwrite", "--out", folder, "--seed", seed]
            command(args, folder, "train.py", *flags, f"--{name}", *args.train_flags)
        program, *flags = COMMANDS[file].split()
        if file == "groups.json":                             # a third is easy, a third is hard
            reference = args.out / f"{ALONE}-seed{seed}/figures.json"
            AP = sorted(read_reference([reference]).values())
            third = len(AP) // 3
            flags += [reference, "--hard", AP[third], "--easy", AP[-max(1, third)]]
        with written_whole(folder / file) as beside:
            command(args, folder, program, "--checkpoint", folder, *flags, "--json", beside)

def command(args, folder: Path, program: str, *flags) -> None:
    """Run a file of the project, which prints to commands.log. InputError if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [str(word) for word in (ROOT / program, *flags)]
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": path}
    started, file = time.time(), folder / "commands.log"
    with open(file, "a") as log:
        print("$", *words, file=log, flush=True)
        code = subprocess.call([sys.executable, *words], env=environment, stdout=log, stderr=log)
    if code:
        last = "\n".join(file.read_text().splitlines()[-5:])
        raise InputError(f"{program} ended with code {code} in {folder}; its last lines:\n{last}")
    print(f"{folder.name}: {program} {time.time() - started:.0f} s", flush=True)

def report(args) -> str:
    """The tables in Markdown."""
    line = " ".join(["python train.py", *args.train_flags])
    lines = ["# The paper's ablations", "", f"`{line}`, seeds {args.seeds}. In percent, but mLA: "
             "mean ± standard deviation over the seeds (in brackets: the paper's, on THUMOS14)."]
    if "--lm" not in args.train_flags:
        lines += ["", "The language model here has read the texts of this repository alone, so "
                  "these figures cannot say whether a real one would help."]
    for number in args.only:
        title, columns = TABLES[number]
        headings = " | ".join(columns).replace("groups ", "").replace("average", "average mAP")
        lines += ["", f"## Table {number}: {title}", "", f"| | {headings} |",
                  "|:--|" + "--:|" * len(columns)]
        for row in [row for row in ROWS if row.startswith(f"{number} ")]:
            _, name, file, *paper, label = row.split(maxsplit=3 + len(columns))
            cells = [cell(args, name, file, *pair) for pair in zip(columns, paper)]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

def cell(args, name: str, file: str, keys: str, paper: str) -> str:
    """One cell: "94.1 ± 0.8 (72.0)"; "-" without figures."""
    scale, digits = (1, 3) if "mLA" in keys else (100, 1)
    values = []
    for seed in args.seeds:
        value = read_json(args.out / f"{name}-seed{seed}" / file)
        for key in keys.split():
            value = (value or {}).get(key)
        if is_number(value):
            values.append(scale * value)
    text = f"{mean(values):.{digits}f}" if values else "-"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    return text if paper == "-" else f"{text} ({paper})"

if __name__ == "__main__":
    sys.exit(main())
