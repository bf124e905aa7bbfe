"""Import directions between packages, cycles, torch-free modules, and calls that could run code from a file."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = (  # from the bottom; each may import itself and those before it
    "utils.system", "utils.detection", "utils.data", "utils.weights", "utils.inference", "utils.evaluation",
    "utils.reports", "utils.training",
)  # fmt: skip
TORCH_FREE = (
    "nets.spec", "utils.data.voc", "utils.data.voc_xml", "utils.data.label_readers", "utils.data.label_writers",
)  # fmt: skip
MAX_CHAIN = 12  # modules that import each other in a row

Graph = Mapping[str, set[str]]  # module -> imported modules


def imported_names(code: str) -> set[str]:
    """All imported modules, and `module.name` for each name imported from one, within functions too."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def product_modules() -> dict[str, Path]:
    paths = [*ROOT.glob("*.py"), *(path for name in ("nets", "utils", "tools") for path in (ROOT / name).rglob("*.py"))]
    return {module_name(path): path for path in paths}


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """The imports between modules, given their code."""
    return {name: imported_names(code) & sources.keys() - {name} for name, code in sources.items()}


def level(module: str) -> int:
    """0 for nets, 1 to 8 for the packages of utils, 9 for scripts and tools."""
    if module.partition(".")[0] == "nets":
        return 0
    packages = [name for name in PACKAGES if f"{module}.".startswith(f"{name}.")]
    return PACKAGES.index(packages[0]) + 1 if packages else len(PACKAGES) + 1


def wrong_directions(graph: Graph) -> list[str]:
    """Imports that point up, or at a script or tool."""
    return [
        f"{name} imports {other}"
        for name, imports in graph.items()
        for other in imports
        if level(other) > level(name) or level(other) > len(PACKAGES) or (level(name) == 0 and level(other) != 0)
    ]


def longest_chain(graph: Graph) -> list[str]:
    """The longest sequence of modules of which each imports the next; raises CycleError."""
    chains: dict[str, list[str]] = {}
    for name in TopologicalSorter(graph).static_order():
        chains[name] = [name, *max((chains[other] for other in graph[name]), key=len, default=[])]
    return max(chains.values(), key=len)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return import_graph({name: path.read_text(encoding="utf-8") for name, path in product_modules().items()})


def test_every_module_belongs_to_a_known_package(graph):
    """So that no check below skips a module."""
    folders = {path.name for path in (ROOT / "utils").iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert {f"utils.{name}" for name in folders} == set(PACKAGES)
    outside = {name for name in graph if level(name) > len(PACKAGES) and "." in name}
    assert outside == {name for name in graph if name.startswith("tools.")}


def test_imports_point_down(graph):
    assert wrong_directions(graph) == []


def test_there_are_no_cycles_and_only_short_chains(graph):
    chain = longest_chain(graph)
    assert len(chain) <= MAX_CHAIN, " > ".join(chain)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("utils.system.text", "from utils.detection.boxes import ciou"),
        ("utils.data.cache", "def build():\n    from utils import training\n    import utils.training.trainer"),
        ("utils.weights.darknet", "from utils.inference import detector"),
        ("nets.spec", "import utils.system.errors"),
        ("utils.training.trainer", "from train import Config"),
        ("tools.export", "import predict"),
        ("predict", "from tools import export"),
    ],
)
def test_an_import_that_points_up_is_found(name, code):
    targets = ("utils.system.errors", "utils.detection.boxes", "utils.inference.detector", "utils.training.trainer")
    sources = dict.fromkeys((*targets, "train", "predict", "tools.export"), "") | {name: code}
    assert len(wrong_directions(import_graph(sources))) == 1


def test_a_cycle_and_a_chain_are_found():
    sources = {"a": "import b", "b": "def run():\n    from c import d", "c": "", "d": "import a"}
    assert longest_chain(import_graph(sources)) == ["d", "a", "b", "c"]
    with pytest.raises(CycleError):
        longest_chain(import_graph(sources | {"c": "import d"}))


def loads_torch(modules: Iterable[str]) -> bool:
    """Whether importing the modules imports torch, in a new process."""
    imports = [f"import {name}" for name in ("sys", *modules)]
    code = "; ".join([*imports, "raise SystemExit(3 if 'torch' in sys.modules else 0)"])
    exit_code = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode
    assert exit_code in (0, 3), "the modules cannot be imported"
    return exit_code == 3


def test_data_reading_does_not_load_torch():
    assert not loads_torch(TORCH_FREE), [name for name in TORCH_FREE if loads_torch([name])]


def test_loading_torch_is_found():
    assert loads_torch(["nets.attention"])


FORBIDDEN_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "ruamel", "pty"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip


def dangerous_code(code: str) -> list[str]:
    """Imports and calls that could run the content of a file: unpickling, unsafe YAML, code from text, a shell."""
    found = [f"imports {name}" for name in imported_names(code) if name.partition(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            wrong = called in FORBIDDEN_CALLS or settings.get("shell", "False") != "False"
            wrong |= called == "torch.load" and settings.get("weights_only") != "True"
            wrong |= settings.get("allow_pickle", "False") != "False"
            found += [f"line {node.lineno} calls {called}"] * wrong
    return found


def test_no_module_can_run_code_from_a_file():
    paths = [*product_modules().values(), *(ROOT / "tests").rglob("*.py")]
    code = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}
    assert {name: found for name in code if (found := dangerous_code(code[name]))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from yaml import load", "import torch\ntorch.load('a')",
        "torch.load('a', weights_only=False)",
        "import os\nos.system('a')", "subprocess.run('a', shell=True)", "np.load('a', allow_pickle=True)", "eval('a')",
    ],
)  # fmt: skip
def test_dangerous_code_is_found(code):
    assert dangerous_code(code)
