"""The README and docs/ cannot drift: their table of equations, their flags, commands and files."""
import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name != "CHANGELOG.md")]
ROWS = re.findall(r"^\| ((?:Eq\. \d|Alg\. 1)[^|]*)\|[^|]*\| `(\w+)\.py:([\w.]+)` \|", README, re.M)
OTHERS = {"--nproc_per_node", "--fix"}                       # of torchrun, of ruff


def test_every_equation_is_where_the_table_says():
    for paper, file, name in ROWS:
        target = importlib.import_module(file)
        for part in name.split("."):
            target = getattr(target, part)
        assert paper.strip().replace("Alg. 1", "Algorithm 1") in inspect.getsource(target), (paper, file, name)


def test_the_table_has_all_nine_equations_and_the_algorithm():
    assert {paper.strip() for paper, *_ in ROWS} == {f"Eq. {i}" for i in range(1, 10)} | {"Alg. 1"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_of_a_page_exists(page):
    known = set(OTHERS)
    for path in [*(ROOT / "support").glob("*.py"), *(ROOT / "experiments").glob("*.py")]:
        known |= set(re.findall(r'"(--[a-z][a-z-]*)"', path.read_text()))
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", page.read_text())):
        assert flag in known, flag


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_command_of_a_page_exists(page):
    text = page.read_text()
    for name in set(re.findall(r"`((?:tests|support|experiments|descriptions|docs)/[\w/-]+\.(?:py|json|png|md))", text)):
        assert (ROOT / name).exists(), name
    for name in set(re.findall(r"python -m (experiments|support)\.(\w+)", text)):
        assert (ROOT / name[0] / f"{name[1]}.py").exists(), name
    for name in set(re.findall(r"\]\((?!http)([^)#]+)", text)):
        assert (page.parent / name).exists(), name


def test_the_readme_is_short():
    assert README.count("\n") <= 190 and len(README.split()) <= 2000
    assert sum(line.startswith("|") for line in README.splitlines()) <= 50
