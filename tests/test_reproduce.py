"""The report of the paper's ablations: its tables, its order of runs, and two runs for real."""
import json
from types import SimpleNamespace

import pytest

import evaluate
import train
from experiments import bias, question_answering, reproduce
from support.annotations import InputError
from support.demo import make_demo

FULL = "lambda-lang=learned"


def write_figures(folder, average, AP=None, name="figures.json"):
    folder.mkdir(parents=True)
    (folder / name).write_text(json.dumps({"average": average, "AP": AP or {"a": [average]}}))


def test_every_row_names_a_run_and_has_a_figure_of_the_paper_for_every_column():
    assert {int(line.split()[0]) for line in reproduce.ROWS} == set(reproduce.TABLES)
    for number, (_, columns) in reproduce.TABLES.items():
        for line in (line for line in reproduce.ROWS if line.startswith(f"{number} ")):
            _, run, file, *paper, label = line.split(maxsplit=3 + len(columns))
            args = train.get_args([f"--{run}"])
            assert f"{args.ablation or args.lambda_lang}".removesuffix(".0") == run.split("=")[1].removesuffix(".0")
            assert file in reproduce.COMMANDS and len(paper) == len(columns) and label[0].isalpha(), line
            assert all(figure == "-" or float(figure) < 100 for figure in paper), line


def test_a_report_from_figures_that_are_there_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "command", lambda *a: pytest.fail("there was nothing to run"))
    monkeypatch.setattr(reproduce, "make_demo", lambda folder: None)
    for i, run in enumerate(("ablation=labels-only", "ablation=vision-tokens", "ablation=shared-token", "ablation=without-tg",
                             FULL)):
        for seed in (0, 1):
            write_figures(tmp_path / f"{run}-seed{seed}", 0.9 + 0.01 * i + 0.02 * seed,
                          name="bias.json" if run == FULL else "figures.json")
    assert reproduce.main(["--out", str(tmp_path), "--only", "9", "--seeds", "0", "1"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| without descriptions | 91.0 ± 1.4 (70.7) |" in text and "| full | 95.0 ± 1.4 (72.0) |" in text
    assert reproduce.main(["--out", str(tmp_path), "--only", "9", "--epochs", "3"]) == 2
    assert "expected a folder of runs with" in capsys.readouterr().err


def test_needed_runs_are_those_of_the_tables_once_each():
    files = reproduce.needed([2, 3])
    assert list(files) == [FULL, "ablation=only-language", "lambda-lang=0", "ablation=without-adv"]
    assert files[FULL] == ["bias.json", "groups.json", "qa.json"] and "figures.json" in files["lambda-lang=0"]
    assert "figures.json" in reproduce.needed([4])["lambda-lang=0"] and "lambda-lang=0" not in reproduce.needed([9])


def test_a_cell_is_the_mean_over_the_seeds_without_missing_figures(tmp_path):
    for seed, hard in enumerate(({"mAP": 0.4}, {"mAP": 0.6}, {"mAP": None})):
        write_figures(tmp_path / f"{FULL}-seed{seed}", 0)
        (tmp_path / f"{FULL}-seed{seed}/groups.json").write_text(json.dumps({"groups": {"hard": hard}}))
    args = SimpleNamespace(out=tmp_path, seeds=[0, 1, 2])
    assert reproduce.cell(args, FULL, "groups.json", "groups hard mAP", "40.1") == "50.0 ± 14.1 (40.1)"
    assert reproduce.cell(args, FULL, "groups.json", "groups easy mLA", "-") == "-"


def test_thirds_of_the_classes_are_easy_and_hard(tmp_path, monkeypatch):
    def command(args, folder, program, *flags):
        assert flags[flags.index("--hard") + 1] == .5 and flags[flags.index("--easy") + 1] == .8     # below .5: .1, .3; from .8 on: .8, .9
        flags[-1].write_text("{}")
    write_figures(tmp_path / "lambda-lang=0-seed0", 0, {name: [value] for name, value in zip("abcdef", (.9, .1, .5, .6, .8, .3))})
    (tmp_path / f"{FULL}-seed0").mkdir()
    (tmp_path / f"{FULL}-seed0" / "report.png").touch()
    monkeypatch.setattr(reproduce, "command", command)
    reproduce.run(SimpleNamespace(out=tmp_path), {FULL: ["groups.json"]}, FULL, 0)
    assert [p.name for p in (tmp_path / f"{FULL}-seed0").glob("*.json*")] == ["groups.json"]


class InThisThread:
    """In place of ThreadPoolExecutor: train.main sets signal handlers, which only the main thread can."""
    map = staticmethod(map)

    def __init__(self, jobs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_two_runs_are_resumed_and_not_repeated(tmp_path, monkeypatch, capsys):
    """The commands in this process, which saves loading torch ten times."""
    make_demo(tmp_path / "data", train=2, test=1, incomplete=1)
    ran = []

    def here(args, folder, script, *flags):
        ran.append((folder.name, script, *flags))
        main = {"train.py": train, "evaluate.py": evaluate, "experiments/bias.py": bias,
                "experiments/question_answering.py": question_answering}[script].main
        assert main([*map(str, flags)]) == 0
    monkeypatch.setattr(reproduce, "command", here)
    monkeypatch.setattr(reproduce, "ThreadPoolExecutor", InThisThread)
    monkeypatch.setattr(reproduce, "ROWS", [row for row in reproduce.ROWS if row.split()[1] in ("lambda-lang=0", FULL)])
    flags = ["--out", str(tmp_path / "out"), "--seeds", "0", "--epochs", "1", "--only", "3", "5", "--jobs", "1", "--",
             "--videos", str(tmp_path / "data/videos"), "--annotations", str(tmp_path / "data/annotations.json"),
             "--descriptions", str(tmp_path / "data/descriptions.json")]
    assert reproduce.main(flags) == 0, capsys.readouterr().err
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| full |" in text and "## Table 5: incomplete actions" in text
    assert [script for _, script, *_ in ran].count("train.py") == 2
    ran.clear()
    (tmp_path / "out" / f"{FULL}-seed0" / "report.png").unlink()            # as if it had been stopped at the end
    (tmp_path / "out" / f"{FULL}-seed0" / "incomplete.json").unlink()
    assert reproduce.main(flags) == 0
    assert [(name, script) for name, script, *_ in ran] == [(f"{FULL}-seed0", "train.py"), (f"{FULL}-seed0", "experiments/bias.py")]
    assert "--resume" in ran[0] and "--incomplete" in ran[1]


def test_commands_run_in_the_folder_of_the_caller(tmp_path, monkeypatch):
    """Paths after -- are relative to that folder, and modules of the project are found from there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    args = SimpleNamespace(jobs=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint.safetensors").write_text("x")
    with pytest.raises(InputError, match=r"(?s)experiments/bias.py ended with code 2 in r;.*bias.py: error: run/checkpoint.safetensors: "):
        reproduce.command(args, reproduce.Path("r"), "experiments/bias.py", "--checkpoint", "run")
    assert (tmp_path / "r/commands.log").read_text().startswith(f"$ {reproduce.ROOT}/experiments/bias.py --checkpoint run")
