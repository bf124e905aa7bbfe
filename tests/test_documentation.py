"""The documentation: links and settings exist, quoted messages are real, and every command and example runs."""

import ast
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cache
from importlib import import_module
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import train
from nets.attention import ATTENTION
from nets.spec import ModelSpec
from nets.yolo import build_model
from tests.conftest import ANCHORS, ROOT, small_run
from tools import convert_data, make_demo_data
from utils.data.image_io import read_image
from utils.data.voc import load_classes
from utils.inference.video import VideoWriter

FOLDERS = (".", "docs", "VOCdevkit", "logs")
PAGES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md")) if path.name != "results.md"]
MAX_README_LINES = 130

# What is replaced in a command, in this order, so that it takes about a second
SUBSTITUTIONS = (
    (r"^torchrun .*?(?=\S+\.py)", "python "),  # tests/training/test_distributed.py starts several processes
    (r" --(epochs|batch-size|input-size|checkpoint-every) [\d ]*\d", ""),
    (r"^(python train\.py(?!.*--(?:resume|help)).*)", r"\1 --input-size 32 --epochs 1 --batch-size 4"),
    (r"--extend \d+", "--extend 1"),
    (r"--freeze-epochs \d+", "--freeze-epochs 0"),
    (r"--compile on", "--compile off"),
    (r"--benchmark [\d ]+", "--benchmark 1"),
    (r"\bhelmet\b", "circle"),
    (r"(convert_data\.py .*--out )\S+", r"\1VOCdevkit/New"),
    (r"(make_splits\.py .*--folder )\S+", r"\1VOCdevkit/Unsplit"),
    (r"^(python tools/make_demo_data\.py.*)", r"\1 --train 2 --val 1 --test 1"),
    (r"^(python tools/convert_weights\.py.*)", r"\1 --out model_data/new.safetensors"),
    (r"^(python tools/export\.py.*?)( --formats [a-z\d -]+(?= --)|$)", r"\1 --formats darknet"),
)

NOT_TESTED = re.compile(r"<!-- not tested: (.*?) -->")
REASONS = {
    "needs a camera", "needs a GPU", "needs a fresh environment", "needs the network", "needs other software",
    "runs until it is stopped", "see tests/tools/test_compare_attention.py",
    "part of a file", "see tests/inference/test_exporters.py", "see tests/nets/test_attention.py",
}  # fmt: skip
FENCE = re.compile(r"^```(\w*)$")
ACTIVATE = "source .venv/bin/activate"
SHELLS, NO_COMMANDS = ("", "bash", "sh"), ("text", "json", "cpp")
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FLAG = re.compile(r"--([a-z][\w-]*)")
OTHER_FLAGS = {"help", "nproc-per-node", "max-restarts", "nnodes", "logdir"}  # of torchrun, TensorBoard and tyro
OTHER_MESSAGES = {"ImportError: libGL.so.1"}
PAGE_SCRIPT = {"training.md": "train.py", "evaluation.md": "eval.py", "prediction.md": "predict.py"}


@dataclass(frozen=True)
class Command:
    """A command of a page, as it is written and as it runs here; `reason` says why it does not."""

    page: str
    line: int
    text: str
    reason: str = ""

    @property
    def reduced(self) -> str:
        text = self.text
        for pattern, replacement in SUBSTITUTIONS:
            text = re.sub(pattern, replacement, text)
        return text


def split_page(text: str) -> Iterator[tuple[int, str | None, str, str]]:
    """The code blocks and the other lines of a page.

    Each with its line number, the language of a block or None, its text, and why it is not tested.
    """
    lines, reason = iter(enumerate(text.splitlines(), start=1)), ""
    for number, line in lines:
        mark, fence = NOT_TESTED.search(line), FENCE.match(line)
        reason = mark[1] if mark else reason
        if fence:
            block = [inner for _, inner in takewhile(lambda item: item[1] != "```", lines)]
            yield number, fence[1], "\n".join(block), reason
        else:
            yield number, None, line, reason
        if line.strip() and not line.startswith("<!--"):
            reason = ""


def find_commands(page: str, text: str) -> tuple[list[Command], list[Command]]:
    """The shell commands and the Python examples of a page; raises ValueError for an unknown language or reason."""
    commands, examples = [], []
    for number, language, code, reason in split_page(text):
        if reason and reason not in REASONS:
            raise ValueError(f"{page}, line {number}: {reason!r} is not among the reasons")
        found: list[str] = []
        if language is None:
            found = [item for item in INLINE.findall(code) if re.match(r"(python|torchrun) ", item)]
        elif language in SHELLS:
            found = code.replace("\\\n", " ").split("\n")
        elif language == "python":
            examples.append(Command(page, number, code, reason))
        elif language not in NO_COMMANDS:
            raise ValueError(f"{page}, line {number}: {language!r} is not among the languages of code blocks")
        commands += [Command(page, number, item, reason) for item in filter(None, map(clean, found))]
    return commands, examples


def clean(command: str) -> str:
    """A command without its comment and repeated blanks."""
    return re.sub(r"\s+", " ", re.sub(r"(^|\s)#.*", "", command)).strip()


def all_commands() -> Iterator[Command]:
    for path in PAGES:
        yield from find_commands(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))[0]


def all_examples() -> Iterator[Command]:
    for path in PAGES:
        yield from find_commands(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))[1]


def runnable() -> dict[str, Command]:
    """The first of the commands that run alike, by how they run."""
    found: dict[str, Command] = {}
    for command in all_commands():
        if not command.reason and command.text.startswith(("python ", "torchrun ")) and " -m " not in command.text:
            found.setdefault(command.reduced, command)
    return found


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the pages speak of, small: datasets, photos, a video, weights and runs."""
    folder = tmp_path_factory.mktemp("workspace")
    devkit = folder / "VOCdevkit"
    make_demo_data.main(make_demo_data.Config(str(devkit / "Demo"), train=4, val=1, test=4))
    pictures = sorted((devkit / "Demo" / "JPEGImages").glob("*.jpg"))
    main = devkit / "Demo" / "ImageSets" / "Main"
    (main / "trainval.txt").write_text((main / "train.txt").read_text() + (main / "val.txt").read_text())
    for name in ("MySet", "VOC2007", "VOC2012", "Unsplit"):
        shutil.copytree(devkit / "Demo", devkit / name)
    shutil.rmtree(devkit / "Unsplit" / "ImageSets")
    shutil.copytree(ROOT / "model_data", folder / "model_data")
    for name in ("voc_classes.txt", "my_classes.txt"):
        shutil.copy(devkit / "Demo" / "classes.txt", folder / "model_data" / name)
    (folder / "photos").mkdir()
    for picture in pictures[:2]:
        shutil.copy(picture, folder / "photos")
    shutil.copy(pictures[0], folder / "photo.jpg")
    write_video(folder / "street.mp4", pictures[0])
    shutil.copytree(devkit / "Unsplit", folder / "DATA")
    convert_data.main(convert_data.Config(str(devkit / "Demo"), "coco", str(folder / "coco")))
    shutil.copytree(folder / "coco" / "images", folder / "val2017")
    shutil.copy(folder / "coco" / "annotations" / "instances_val.json", folder / "instances_val2017.json")
    write_weights(folder / "model_data")
    settings = {"train_sets": ("Demo/train",), "val_sets": ("Demo/val",), "input_size": (32, 32), "batch_size": 4}
    train.main(small_run(devkit, **settings, epochs=1, run_dir=str(folder / "logs" / "demo")))
    for name in ("RUN", "a", "b"):
        shutil.copytree(folder / "logs" / "demo", folder / "logs" / name)
    shutil.copy(folder / "logs" / "demo" / "best.safetensors", folder / "model_data" / "best_epoch_weights.safetensors")
    return folder


def write_video(path: Path, picture: Path) -> None:
    image = read_image(picture)
    writer = VideoWriter(path, Fraction(10), image.shape[:2])
    for number in range(3):
        writer.write(image, number / 10)
    writer.close()


def write_weights(folder: Path) -> None:
    """Untrained weights under the names of published ones and of another project's."""
    class_names = load_classes(folder / "my_classes.txt")
    torch.save(build_model(ModelSpec(class_names, ANCHORS)).state_dict(), folder / "best_epoch_weights.pth")


@pytest.fixture
def own_copy(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workspace as the current directory, without plots, which would take half of the time.

    Weights, which no command changes in place, are links.
    """

    def link_or_copy(source: str, target: str) -> None:
        if Path(source).suffix in (".safetensors", ".pth"):
            Path(target).hardlink_to(source)
        else:
            shutil.copy(source, target)

    copied = shutil.copytree(workspace, tmp_path / "work", copy_function=link_or_copy)
    monkeypatch.chdir(copied)
    monkeypatch.setattr(Figure, "savefig", lambda _, target, **__: Image.new("RGB", (8, 8)).save(target, "PNG"))
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    return copied


def run_here(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a script of the project with its arguments in this process; returns the exit code."""
    path = ROOT / arguments[0]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *arguments[1:]])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


@pytest.mark.parametrize("command", list(runnable().values()), ids=lambda item: f"{item.page}: {item.text}")
def test_command_runs(command, own_copy, monkeypatch, capsys):
    code = run_here(shlex.split(command.reduced)[1:], monkeypatch)
    assert code == 0, f"{command.page}, line {command.line}: {command.text}\n{capsys.readouterr().err}"


def test_checker_finds_a_command_that_fails(own_copy, monkeypatch, capsys):
    (command,), _ = find_commands("a.md", "```\npython predict.py photos/ --write pictures --nonsense 3\n```")
    assert run_here(shlex.split(command.reduced)[1:], monkeypatch) == 2
    (command,), _ = find_commands("a.md", "`python predict.py no-such-folder/`")
    assert run_here(shlex.split(command.reduced)[1:], monkeypatch) == 2
    capsys.readouterr()


@pytest.mark.parametrize("example", list(all_examples()), ids=lambda item: f"{item.page}-{item.line}")
def test_python_example_runs(example, own_copy, capsys):
    if example.reason:
        pytest.skip(example.reason)
    path = own_copy / "example.py"
    path.write_text(example.text, encoding="utf-8")
    runpy.run_path(str(path), run_name="__main__")


@cache
def settings_of(script: str) -> frozenset[str]:
    """The flags of a script without their dashes."""
    module = import_module(script.removesuffix(".py").replace("/", "."))
    names = {field.name.replace("_", "-") for field in fields(module.Config)}
    return frozenset(names | {f"no-{name}" for name in names})


def check_command(command: Command) -> list[str]:
    """What is wrong with a command that can be told without running it."""
    where = f"{command.page}, line {command.line}: "
    words = command.text.split()
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return [f"{where}the Makefile has no {word}" for word in words[1:] if "=" not in word and word not in targets]
    if command.text == ACTIVATE:
        return []
    if words[0] not in ("python", "torchrun"):
        return [] if command.reason else [f"{where}{words[0]} is not known; say why it is not tested"]
    if words[1] == "-m":
        files = [word for word in words if word.endswith(".py") and not (ROOT / word).is_file()]
        return [f"{where}there is no {name}" for name in files]
    script = next((word for word in words if word.endswith(".py")), "")
    if not (ROOT / script).is_file() or not script:
        return [f"{where}there is no script {script}"]
    own, _, passed = command.text.partition(script)[2].partition(" -- ")
    wrong = set(FLAG.findall(own)) - settings_of(script) | set(FLAG.findall(passed)) - settings_of("train.py")
    return [f"{where}{script} has no --{name}" for name in sorted(wrong - OTHER_FLAGS)]


def test_commands_are_known_and_flags_exist():
    assert not [error for command in all_commands() for error in check_command(command)]


def test_checker_finds_unknown_commands_and_flags():
    text = "```\nls\n```\n`python eval.py --tta`\n`python tools/none.py`\n```\nmake nothing\n```"
    commands, _ = find_commands("a.md", text)
    errors = [error for command in commands for error in check_command(command)]
    assert [error.partition(": ")[2] for error in errors] == [
        "ls is not known; say why it is not tested",
        "eval.py has no --tta",
        "there is no script tools/none.py",
        "the Makefile has no nothing",
    ]
    with pytest.raises(ValueError, match="'is hard' is not among the reasons"):
        find_commands("a.md", "<!-- not tested: is hard -->\n```\nls\n```")
    assert check_command(find_commands("a.md", "<!-- not tested: needs other software -->\n```\nls\n```")[0][0]) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_flags_in_the_text_exist(path):
    """Flags in backticks; on a page about one script they are that script's."""
    scripts = ["train.py", "eval.py", "predict.py"]
    scripts += [f"tools/{item.name}" for item in (ROOT / "tools").glob("*.py") if item.name != "__init__.py"]
    if path.name in PAGE_SCRIPT:
        scripts = [PAGE_SCRIPT[path.name]]
    known = OTHER_FLAGS.union(*map(settings_of, scripts))
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for code in INLINE.findall(text):
        if code.startswith("--"):
            assert set(FLAG.findall(code)) <= known, code


@pytest.mark.parametrize("page", PAGE_SCRIPT)
def test_tables_of_settings_have_their_defaults(page):
    """In tables whose columns begin with setting and default."""
    config = import_module(PAGE_SCRIPT[page].removesuffix(".py")).Config
    defaults = {field.name: field.default for field in fields(config)}
    table = re.findall(r"^\| setting \| default \|.*\n\|[-|]+\n((?:\|.*\n)+)", (ROOT / "docs" / page).read_text(), re.M)
    rows = [[cell.strip(" `") for cell in row.split("|")[1:3]] for part in table for row in part.splitlines()]
    for name, default in rows:
        value = defaults[name]
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert default == shown, name


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def broken_links(path: Path) -> list[str]:
    """Relative links and images of a page that lead nowhere."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    broken = []
    for link in LINK.findall(text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists():
            broken.append(link)
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            if anchor not in map(slug, headings):
                broken.append(link)
    return broken


@pytest.mark.parametrize("path", [*PAGES, *(ROOT / "docs").rglob("*.md")], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    assert not broken_links(path)


def test_checker_finds_broken_links(tmp_path):
    (tmp_path / "b.md").write_text("# A heading, with commas\n")
    text = "[1](b.md) ![2](none.png) [3](b.md#a-heading-with-commas) [4](b.md#none) [5](#here) [6](https://x.y/none)"
    (tmp_path / "a.md").write_text(f"## Here\n{text}\n")
    assert broken_links(tmp_path / "a.md") == ["none.png", "b.md#none"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_modules_and_files_in_the_text_exist(path):
    for code in INLINE.findall(path.read_text(encoding="utf-8")):
        if re.fullmatch(r"(utils|nets|tools|tests|docs)/[\w./-]+\.(py|md|png|jpg)", code):
            assert (ROOT / code).is_file(), code
        if re.fullmatch(r"(utils|nets)(\.\w+)+", code):
            assert is_importable(code), code


def is_importable(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return hasattr(import_module(module), attribute)
    return True


def test_quoted_messages_are_in_the_code():
    """The messages in docs/troubleshooting.md, whose dots stand for names and numbers."""
    texts = "\n".join(message_texts())
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 10
    for message in set(rows) - OTHER_MESSAGES:
        for part in filter(None, (part.strip() for part in message.split("..."))):
            assert part in texts, message


def message_texts() -> Iterator[str]:
    """The strings of the program, with placeholders for what is formatted into them."""
    for folder in (".", "nets", "utils", "tools"):
        for path in (ROOT / folder).glob("*.py") if folder == "." else (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def test_readme_has_every_attention_block_with_its_parameters():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    class_names = load_classes(ROOT / "model_data" / "voc_classes.txt")
    for phi, option in ATTENTION.items():
        model = build_model(ModelSpec(class_names, ANCHORS, phi=phi, identity_start=False))
        count = sum(value.numel() for value in model.parameters())
        assert re.search(rf"^\| {phi} \| `{option.name}` \| .* \| {count:,} \|", text, re.MULTILINE), option.name
