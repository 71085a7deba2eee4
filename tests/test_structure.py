"""The house: names at the root, budgets of its files, order of imports, Algorithm 1 on the first screen."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {"model.py", "vlm.py", "advantage.py", "head.py", "data.py", "train.py", "evaluate.py", "README.md", "LICENSE",
         "requirements.txt", "pyproject.toml", ".gitignore"}
FOLDERS = {"tests", "support", "experiments", "docs", "descriptions", ".ci", ".git"}
BUDGETS = {"model": 260, "vlm": 280, "advantage": 95, "head": 405, "data": 305, "train": 295, "evaluate": 290}
# A file of the root may import these files of the root.
MAY_IMPORT = {"advantage": set(), "head": set(), "vlm": {"advantage"}, "data": {"advantage", "vlm"},
              "model": {"advantage", "head", "vlm"}, "evaluate": {"data", "head", "model"},
              "train": {"advantage", "data", "evaluate", "head", "model", "vlm"}}


def imported(path):
    """Names of the modules that a file imports, inside of functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_the_root_holds_the_seven_files():
    found = {p.name for p in ROOT.iterdir() if not re.match(r"(\.venv|venv|data|out.*|__pycache__|\..*_cache|\.hypothesis)$", p.name)}
    assert found <= FILES | FOLDERS and FILES <= found


@pytest.mark.parametrize("name", BUDGETS)
def test_a_file_keeps_its_budget(name):
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    assert len(lines) <= BUDGETS[name] and max(map(len, lines)) <= 100
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_run_one_way(name):
    ours = set(MAY_IMPORT) | {"experiments"}
    allowed = MAY_IMPORT[name] | ({"experiments"} if name == "train" else set())
    assert ours & set(imported(ROOT / f"{name}.py")) <= allowed


def test_support_imports_nothing_above_it():
    for path in (ROOT / "support").glob("*.py"):
        if path.name == "tiny_lm.py":                       # a command, which takes the prompt from vlm
            continue
        assert not (set(MAY_IMPORT) | {"experiments"}) & set(imported(path)), path.name


def test_algorithm1_has_every_line_number():
    source = (ROOT / "train.py").read_text()
    head = source[:source.index("def train(")]
    numbers = set()
    for first, last in re.findall(r"# lines? (\d+)(?:-(\d+))?", head):
        numbers.update(range(int(first), int(last or first) + 1))
    assert numbers == {2, 3, 4, 5, 6, 10, 11, 12, 13, 14, 15, 16}                # 1 and 9 are titles, 7, 8, 17, 18 ends
    assert head.count("\n") < 75
