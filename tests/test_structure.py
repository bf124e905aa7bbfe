"""Imports point down only: scripts and tools -> utils -> nets; no circles; and nothing runs what a file says."""

import ast
from graphlib import TopologicalSorter

import pytest

from tests.conftest import ROOT

LAYERS = {"nets": {"nets"}, "utils": {"utils", "nets"}, "tools": {"utils", "nets"}}


def imported_modules(path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def test_imports_point_down():
    own = {"nets", "utils", "tools", "tests"} | {path.stem for path in ROOT.glob("*.py")}
    for path in [*ROOT.glob("*.py"), *(path for folder in LAYERS for path in (ROOT / folder).glob("*.py"))]:
        allowed = LAYERS.get(path.parent.name, {"utils", "nets"})
        roots = {name.partition(".")[0] for name in imported_modules(path)}
        wrong = (roots & own) - allowed
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_there_are_no_circles():
    modules = {f"{path.parent.name}.{path.stem}": path for folder in LAYERS for path in (ROOT / folder).glob("*.py")}
    graph = {name: imported_modules(path) & modules.keys() for name, path in modules.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(modules)


FORBIDDEN_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "ruamel", "pty"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip


def dangers(path) -> list[str]:
    """What in a module could run what a file says: unpickling, unsafe YAML, code made of text, a shell."""
    found = [f"imports {name}" for name in imported_modules(path) if name.partition(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            wrong = called in FORBIDDEN_CALLS or settings.get("shell", "False") != "False"
            wrong |= called == "torch.load" and settings.get("weights_only") != "True"
            wrong |= settings.get("allow_pickle", "False") != "False"
            found += [f"line {node.lineno} calls {called}"] * wrong
    return found


def own_modules() -> list:
    return [
        *ROOT.glob("*.py"),
        *(path for folder in ("nets", "utils", "tools", "tests") for path in (ROOT / folder).rglob("*.py")),
    ]


def test_nothing_runs_what_a_file_says():
    found = {str(path.relative_to(ROOT)): wrong for path in own_modules() if (wrong := dangers(path))}
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from yaml import load", "import torch\ntorch.load('a')",
        "torch.load('a', weights_only=False)",
        "import os\nos.system('a')", "subprocess.run('a', shell=True)", "np.load('a', allow_pickle=True)", "eval('a')",
    ],
)  # fmt: skip
def test_the_search_finds_it(code, tmp_path):
    (tmp_path / "a.py").write_text(code)
    assert dangers(tmp_path / "a.py")
