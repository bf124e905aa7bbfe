"""File readers survive any bytes: they return the content or raise UserError, in little time and memory.

`make stress` reads random files for SECONDS per reader.
"""

import faulthandler
import time
from collections.abc import Callable
from math import inf
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

from tests.stress import random_files
from utils.data.coco_json import read_truth
from utils.data.image_io import read_image
from utils.data.label_readers import read_yolo_label
from utils.data.voc import load_classes, read_split, split_file
from utils.data.voc_xml import read_voc_xml
from utils.detection.anchors import load_anchors
from utils.system.diagnostics import Diagnostics
from utils.system.errors import UserError
from utils.weights.checkpoint import load_checkpoint
from utils.weights.darknet import read_darknet
from utils.weights.pretrained import read_weights

MAX_CPU_SECONDS, MAX_MEMORY = 5, 1_000_000_000  # for one file; memory in bytes
MAX_WAIT = 60  # seconds after which a reader hangs
EXAMPLES, LONG_EXAMPLES = 60, 1000  # files per seed of the search

pytestmark = pytest.mark.filterwarnings("ignore")  # of decoders, about the files


def read_split_file(path: Path) -> None:
    """Read a file as the split of a devkit in its folder."""
    split = split_file(path.parent, "VOC/train")
    split.parent.mkdir(parents=True, exist_ok=True)
    path.rename(split)
    read_split(path.parent, "VOC/train", Diagnostics())


READERS: dict[str, tuple[str, Callable[[Path], object], Callable[[], SearchStrategy]]] = {
    "annotations": ("a.xml", lambda path: read_voc_xml(path, Diagnostics()), random_files.annotation_files),
    "splits": ("a.txt", read_split_file, random_files.split_files),
    "classes": ("a.txt", lambda path: load_classes(path, Diagnostics()), random_files.class_files),
    "anchors": ("a.txt", load_anchors, random_files.anchor_files),
    "Darknet": ("a.weights", read_darknet, random_files.darknet_files),
    "checkpoints": ("a.safetensors", lambda p: load_checkpoint(p).build_model(p), random_files.checkpoint_files),
    "pth": ("a.pth", read_weights, random_files.pth_files),
    "images": ("a.jpg", read_image, random_files.image_files),
    "COCO": ("a.json", read_truth, random_files.coco_files),
    "YOLO": (
        "a.txt",
        lambda path: read_yolo_label(path, (30, 40), ["cat", "dog"], Diagnostics()),
        random_files.yolo_files,
    ),
}


def read_within_limits(read: Callable[[Path], object], path: Path) -> None:
    """Call a reader; raises AssertionError if it takes too long or too much memory, or for an unprintable message."""
    reset_peak_memory()
    memory, started = peak_memory(), time.process_time()
    faulthandler.dump_traceback_later(MAX_WAIT, exit=True)
    try:
        read(path)
    except UserError as error:
        assert str(error).isprintable(), repr(str(error))
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert time.process_time() - started <= MAX_CPU_SECONDS
    assert peak_memory() - memory <= MAX_MEMORY


def reset_peak_memory() -> None:
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak memory of this process in bytes; 0 where the system does not report it."""
    if not Path("/proc/self/status").exists():
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.parametrize("name", READERS)
def test_reader_returns_or_raises_a_user_error(name, tmp_path, pytestconfig):
    file, read, contents = READERS[name]
    seconds = pytestconfig.getoption("seconds_per_reader")
    end, count, start = time.monotonic() + (seconds or inf), 0, 0

    @settings(
        max_examples=LONG_EXAMPLES if seconds else EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(contents())
    def read_examples(content: bytes | tuple[bytes, int]) -> None:
        nonlocal count
        if time.monotonic() >= end:
            return
        count += 1
        head, size = content if isinstance(content, tuple) else (content, len(content))
        with open(tmp_path / file, "wb") as output:
            output.write(head)
            output.truncate(size)
        read_within_limits(read, tmp_path / file)

    while start == 0 or (seconds and time.monotonic() < end):
        seed(start)(read_examples)()
        start += 1
    print(f"{name}: {count} files")
    assert count > 20
