"""Nothing in the library runs what it reads: no eval, no pickle, no load that trusts its file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "src").glob("**/*.py"))
BUILTINS = {"eval", "exec", "compile", "__import__"}
MODULES = {"cloudpickle", "dill", "jsonpickle", "joblib", "marshal", "pickle", "shelve", "yaml"}
# The argument that makes a reader safe, where there is one.
LOADS = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
SAFE_BY_DEFAULT = {"np.load", "numpy.load"}


def findings(code: str) -> list[str]:
    """What in a module may run something that was read.

    >>> findings("import json, pickle")
    ['line 1: pickle']
    """
    found = []
    for node in ast.walk(ast.parse(code)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        bad = [name for name in names if name.split(".")[0] in MODULES or name in LOADS]
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function in BUILTINS:
                bad.append(function)
            elif function in LOADS:
                argument, safe = LOADS[function]
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if given.get(argument, str(safe) if function in SAFE_BY_DEFAULT else None) != str(safe):
                    bad.append(function)
        found += [f"line {getattr(node, 'lineno', 0)}: {name}" for name in bad]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(SOURCES[0].parent).as_posix())
def test_no_module_runs_what_it_reads(path: Path) -> None:
    assert not findings(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "exec(text)",
        "import pickle as p",
        "from pickle import loads",
        "import dill.source",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trust)",
        "torch.load(path, **options)",
        "np.load(path, allow_pickle=True)",
        "import yaml",
    ],
)
def test_what_would_be_found(code: str) -> None:
    assert findings(code)


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()",
        "torch.load(path, map_location='cpu', weights_only=True)",
        "np.load(path)",
        "import json",
        "re.compile(x)",
    ],
)
def test_what_is_allowed(code: str) -> None:
    assert not findings(code)
