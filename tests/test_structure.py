"""Imports point down only: scripts and tools -> utils -> nets; nothing imports a script; no circles."""

import ast
from graphlib import TopologicalSorter

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
