"""Nothing from outside is executed: what the source may not call, and with which flags."""
import ast
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
FILES = sorted(path for folder in (TOP, TOP / "support", TOP / "experiments") for path in folder.glob("*.py"))
FORBIDDEN = ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "pickle.load", "pickle.loads",
             "marshal.loads", "torch.hub.load")
REQUIRED = {"torch.load": ("weights_only", True),
            "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False),
            "transformers.AutoModelForCausalLM.from_pretrained": ("trust_remote_code", False),
            "transformers.AutoTokenizer.from_pretrained": ("trust_remote_code", False)}


def problems(source: str) -> list:
    """Calls in the source that could run code of a file, or of a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [f"{node.lineno}: import {name}" for name in names
                      if name.split(".")[0] in ("pickle", "marshal", "yaml")]
        if not isinstance(node, ast.Call):
            continue
        name, flags = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        wrong = name in FORBIDDEN or any(flags.get(flag, "False") != "False" for flag in ("shell", "trust_remote_code"))
        if name in REQUIRED:
            flag, value = REQUIRED[name]
            wrong |= flags.get(flag) != str(value)
        if wrong:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TOP)))
def test_the_source_runs_nothing_from_outside(path):
    assert problems(path.read_text(encoding="utf-8")) == []


def test_files_of_pickles_are_opened_somewhere_and_found():
    """The rules above speak of calls that exist."""
    calls = {ast.unparse(node.func) for path in FILES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call)}
    assert {"torch.load", "transformers.AutoTokenizer.from_pretrained", "np.load"} <= calls


@pytest.mark.parametrize("line", [
    "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path)", "np.load(path, allow_pickle=True)",
    "eval(x)", "pickle.load(file)", "import pickle", "from yaml import load", "os.system(x)",
    "subprocess.run(x, shell=True)", "AutoModel.from_pretrained(x, trust_remote_code=True)", "transformers.AutoTokenizer.from_pretrained(x)"])
def test_the_rule_finds_it(line):
    assert len(problems(line)) == 1
