"""The README cannot drift: its table of equations, its flags, its files."""
import ast
import re
from pathlib import Path

import benchmark
import evaluate
import reproduce
import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"^\| ((?:Eq\. \d|Alg\. 1)[^|]*)\|[^|]*\| `(\w+\.py):([\w.]+)` \|", README, re.M)


def source_of(file: str, dotted: str) -> str:
    """Source of a function or class; `Class.method` works too."""
    text = (ROOT / file).read_text()
    node = ast.parse(text)
    for name in dotted.split("."):
        node = next(n for n in node.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name)
    return ast.get_source_segment(text, node)


def test_every_equation_is_where_the_table_says():
    for equations, file, name in ROWS:
        source = source_of(file, name)
        for number in re.findall(r"\d", equations) if equations.startswith("Eq") else ():
            assert f"Eq. {number}" in source, f"{file}:{name} does not name Eq. {number}"
        if equations.startswith("Alg"):
            assert "Algorithm 1" in source


def test_the_table_has_all_nine_equations_and_the_algorithm():
    found = {e for equations, _, _ in ROWS for e in re.findall(r"Eq\. \d|Alg\. 1", equations)}
    assert found == {f"Eq. {i}" for i in range(1, 10)} | {"Alg. 1"}


def test_every_flag_in_the_readme_exists():
    known = " ".join(" ".join(module.build_parser().format_help().split()) for module in (train, evaluate, reproduce, benchmark))
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)):
        assert flag in known, flag


def test_every_file_in_the_readme_exists():
    for name in set(re.findall(r"`((?:tests/|descriptions/|docs/)?[\w-]+\.(?:py|json|png|txt))`", README)):
        written_by_a_run = name in ("log.jsonl", "result.json", "report.png", "annotations.json", "descriptions.json",
                                    "answers.json", "boundaries.png")
        assert written_by_a_run or (ROOT / name).exists(), name
