"""Any bytes into the readers: `python tests/stress/fuzz.py [TARGET ...] [--seconds 600]`, with all targets if none is named.

From each reader only UserError may come, within 5 s of computing and 1 GB of memory. A target runs in a process of its
own, so that a crash is one finding; the file that led to a finding stays. tests/stress/test_fuzz.py does the same in short.
"""

import faulthandler
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import torch
import tyro
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nets.spec import ModelSpec
from tests.bad_inputs import ANCHORS_FILE, GBK, JPEG, PNG, UTF_16, box, encoded, gray_of_16_bits, picture, thing, xml
from tests.conftest import ANCHORS
from utils.data.coco_json import read_truth
from utils.data.image_io import read_image
from utils.data.label_readers import read_label
from utils.data.voc import load_classes, read_split, split_file
from utils.data.voc_xml import read_voc_xml
from utils.detection.anchors import load_anchors
from utils.system.diagnostics import Diagnostics
from utils.system.errors import UserError
from utils.weights.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.weights.darknet import count, layers_for, read_darknet
from utils.weights.pretrained import read_weights

MAX_SECONDS, MAX_MEMORY = 5, 1_000_000_000  # of computing and of RAM, for one file
HANGS = 60  # seconds of waiting after which a reader that does not compute either is said to hang
EXAMPLES = 1000  # between two fresh starts of the search
FASTEST = Path("/dev/shm")  # a file system in memory, where there is one
SPEC = ModelSpec(("cat", "dog"), ANCHORS, input_size=(32, 32))
TRUTH = (
    '{"images": [{"id": %s, "file_name": %s, "height": %s, "width": %s}], "categories": [{"id": %s, "name": %s}], '
    '"annotations": [{"image_id": %s, "category_id": %s, "bbox": [%s, 2, 3, 4], "iscrowd": %s}]}'
)
Files = st.SearchStrategy[bytes]


@dataclass(frozen=True)
class Target:
    """A reader, the name of what it reads, and what to give it."""

    file: str
    read: Callable[[Path], object]
    contents: Callable[[], Files]


# what to give


@st.composite
def changed(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """A good file after a few changes: bytes set, cut out, put in or repeated, and numbers that are extreme."""
    content = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 64)))
        middle = draw(
            st.one_of(
                st.just(b""),
                st.binary(max_size=8),
                st.sampled_from([content[start:end] * 2, content[start:end] * 500]),
                st.sampled_from([number.to_bytes(size, order) for number in (0, 1, 2**15, 2**31 - 1, 2**32 - 1)
                                 for size in (4, 8) for order in ("little", "big")]),
            )
        )  # fmt: skip
        content = content[:start] + middle + content[end:]
    return content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content


def files(*seeds: bytes) -> Files:
    return st.one_of(changed(seeds), st.binary(max_size=200))


def words(*tokens: str) -> Files:
    """Pieces of text in any order, and any text."""
    mixed = st.lists(st.one_of(st.sampled_from(tokens), st.text(max_size=5)), max_size=40)
    return st.one_of(mixed.map("".join), mixed.map("\n".join)).map(lambda text: text.encode("utf-8", "replace"))


def annotations() -> Files:
    tags = [f"<{slash}{tag}>" for tag in ("annotation", "object", "name", "bndbox", "size") for slash in ("", "/")]
    odd = ["<?xml version='1.0' encoding='idna'?>", "&#0;", "&a;", "<!DOCTYPE a>", "<![CDATA[", "]]>", "<!--", "\0"]
    numbers = ["nan", "1e308", "-1e308", "9" * 400, "1_0", "\u0661", "1", "-1", "", " ", "0x10"]
    sides = st.sampled_from(numbers)
    objects = st.lists(st.tuples(sides, sides, sides, sides).map(lambda edges: thing(box(*edges))), max_size=5)
    seeds = xml(thing(), thing(), declaration="<?xml version='1.0' encoding='utf-8'?>").encode(), GBK
    grown = st.one_of(objects.map(lambda found: xml(*found).encode()), words(xml(thing()), *tags, *odd, *numbers))
    return st.one_of(grown, files(*seeds, UTF_16.encode("utf-16"), UTF_16.encode("utf-16-be")))


@cache
def pictures() -> list[bytes]:
    small = picture((17, 23))
    palette = small.quantize(8)

    def two(kind: str) -> bytes:
        return encoded(small, kind, save_all=True, append_images=[small.rotate(180)])

    exif = Image.Exif()
    exif[0x0112] = 6
    jpegs = [encoded(small, exif=exif), encoded(small, progressive=True), encoded(small.convert("L"))]
    jpegs += [encoded(small.convert("CMYK")), two("MPO")]
    pngs = [encoded(small, "PNG", exif=exif), encoded(palette, "PNG", transparency=1), two("PNG")]
    pngs += [encoded(small.convert("1"), "PNG"), encoded(small.convert("LA"), "PNG"), gray_of_16_bits()]
    tiffs = [encoded(small, "TIFF", compression=kind) for kind in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg")]
    tiffs += [encoded(small.convert("1"), "TIFF", compression="group4"), two("TIFF")]
    others = [encoded(small, "BMP"), encoded(palette, "BMP"), encoded(small, "GIF"), two("GIF")]
    webps = [encoded(small, "WEBP"), encoded(small, "WEBP", lossless=True), two("WEBP")]
    return [JPEG, PNG, *jpegs, *pngs, *tiffs, *others, *webps]


def mended(content: bytes) -> bytes:
    """A PNG file with the checksums that its chunks should have, so that its readers look further."""
    if not content.startswith(PNG[:8]):
        return content
    found, start = content[:8], 8
    while start + 12 <= len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4])
        if end > len(content):
            break
        found += content[start : end - 4] + crc32(content[start + 4 : end - 4]).to_bytes(4)
        start = end
    return found + content[start:]


def images() -> Files:
    return st.one_of(files(*pictures()), changed(pictures()).map(mended))


def darknet_files() -> st.SearchStrategy[tuple[bytes, int]]:
    """A header, and the size of the file."""
    header = (0).to_bytes(4, "little") + (2).to_bytes(4, "little") + (5).to_bytes(4, "little") + bytes(8)
    ends = [20 + 4 * floats for floats in accumulate(count([layer]) for layer in layers_for(1))]
    near = st.tuples(st.sampled_from(ends), st.integers(-9, 9)).map(sum)
    return st.tuples(changed([header]), st.one_of(near, st.integers(0, 10**8)))


def checkpoints() -> Files:
    """Whole files whose description may say anything, and damaged ones."""
    anything = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
        max_leaves=8,
    )
    spec = json.loads(json.dumps(SPEC.to_dict()))
    one_other = st.tuples(st.sampled_from([*spec, "more"]), anything).map(lambda item: spec | {item[0]: item[1]})
    sizes = st.sampled_from([[2**40, 32], [10**8] * 2, [0, 32], [-32, 32]]).map(
        lambda size: spec | {"input_size": size}
    )
    masks = st.sampled_from([[[0] * 10**5] * 2, [[], []], [[9], [0]]]).map(lambda masks: spec | {"anchors_mask": masks})
    arguments = st.dictionaries(st.sampled_from(["ratio", "kernel_size", "b", "gamma"]), anything, max_size=2)
    attention = st.tuples(st.integers(0, 5), arguments).map(
        lambda item: spec | {"phi": item[0], "attention_args": item[1]}
    )
    specs, infos = st.one_of(one_other, anything, sizes, masks, attention), st.one_of(st.just({}), anything)
    described = st.builds(checkpoint_file, specs, infos)
    return st.one_of(described, files(checkpoint_file(spec, {})))


def checkpoint_file(spec: object, info: object) -> bytes:
    with tempfile.TemporaryDirectory(dir=FASTEST if FASTEST.exists() else None) as folder:
        said = SimpleNamespace(to_dict=lambda: spec)
        save_checkpoint(Path(folder) / "a", Checkpoint(said, {"a": torch.ones(3)}, info, {}))
        return (Path(folder) / "a").read_bytes()


def state_dicts() -> Files:
    contents = []
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save({"a.weight": torch.ones(2, 3), "b": torch.ones(1)}, file, _use_new_zipfile_serialization=zipped)
        contents.append(file.getvalue())
    return files(*contents)


def truths() -> Files:
    """COCO's JSON in which any value may be another."""
    odd = ["null", "true", "-1", "0.5", "1e999", "NaN", "9" * 400, '"a"', '"\\ud800"', "[]", "{}", "[1, 2]", "1, 2"]
    numbers = st.one_of(st.sampled_from(["1", "2", *odd]), st.integers().map(str))
    parts = st.tuples(*[numbers] * 10).map(lambda values: TRUTH % values)
    tokens = ['{"images": ', '"categories": ', '"annotations": ', '{"id": ', '"bbox": ', "[", "]", "{", "}", ",", *odd]
    return st.one_of(parts.map(str.encode), words(*tokens), files((TRUTH % ((1,) * 10)).encode()))


def labels() -> Files:
    numbers = ["0", "1", "2", "0.5", "-0.5", "1e308", "9" * 400, "nan", "1_0", "\u0661", "0x1"]
    return st.one_of(
        words(*(f"{number} " for number in numbers), "0 0.5 0.5 0.1 0.1", "\n", "\ufeff", "\0"), files(b"1 1 1 1 1\n")
    )


# who reads it


def read_set(path: Path) -> None:
    """A split file, which lies where the layout wants it."""
    split = split_file(path.parent, "VOC/train")
    split.parent.mkdir(parents=True, exist_ok=True)
    path.rename(split)
    read_split(path.parent, "VOC/train", Diagnostics())


TARGETS = {
    "xml": Target("a.xml", lambda path: read_voc_xml(path, Diagnostics()), annotations),
    "split": Target("a.txt", read_set, partial(words, "a", "../", "/", "\\", "\ufeff", "\r", " ", "\0", "a\nb", "..")),
    "classes": Target(
        "a.txt", lambda path: load_classes(path, Diagnostics()), partial(words, "cat", "\ufeff", "\r", " ")
    ),
    "anchors": Target(
        "a.txt", load_anchors, lambda: st.one_of(words("1", ",", "nan", "1e9", "-"), files(ANCHORS_FILE.read_bytes()))
    ),
    "darknet": Target("a.weights", read_darknet, darknet_files),
    "checkpoint": Target("a.safetensors", lambda path: load_checkpoint(path).build_model(path), checkpoints),
    "weights": Target("a.pth", read_weights, state_dicts),
    "image": Target("a.jpg", read_image, images),
    "coco": Target("a.json", read_truth, truths),
    "yolo": Target("a.txt", lambda path: read_label(path, (30, 40), ["cat", "dog"], Diagnostics()), labels),
}


class Finding(AssertionError):
    """A reader that took too long or too much."""


def give(target: Target, content: bytes | tuple[bytes, int], folder: Path) -> None:
    """Let the reader have a file; what it may not do is raised."""
    path = folder / target.file
    with open(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else content[0])
        if not isinstance(content, bytes):
            file.truncate(content[1])
    forget_peak()
    before, started = peak(), time.process_time()
    faulthandler.dump_traceback_later(HANGS, exit=True)
    try:
        target.read(path)
    except UserError as mistake:
        if not str(mistake).isprintable():
            raise Finding(f"a message that is not a line of text: {str(mistake)!r}") from None
    finally:
        faulthandler.cancel_dump_traceback_later()
    if time.process_time() - started > MAX_SECONDS:
        raise Finding(f"{time.process_time() - started:.1f} s")
    if (taken := peak() - before) > MAX_MEMORY:
        raise Finding(f"{taken / 1e6:.0f} MB")


def forget_peak() -> None:
    """Let Linux count the memory's peak from here."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most memory that this process had, in bytes; 0 where the system does not say."""
    if not Path("/proc/self/status").exists():
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def fuzz(target: Target, seconds: float, examples: int, folder: Path, start: int = 0) -> int:
    """Give the reader files for so long; returns how many."""
    contents, end, given_files = target.contents(), time.monotonic() + seconds, 0

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(contents)
    def one(content: bytes) -> None:
        nonlocal given_files
        if time.monotonic() < end:
            given_files += 1
            give(target, content, folder)

    while time.monotonic() < end:
        seed(start)(one)()
        start += 1
        if seconds == float("inf"):
            break
    return given_files


def main(targets: tyro.conf.Positional[tuple[str, ...]] = (), seconds: float = 600) -> None:
    """Fuzz the readers, each for so many seconds."""
    if len(targets) == 1:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=FASTEST if FASTEST.exists() else None))
        print(f"{targets[0]}: the last file is in {folder}", flush=True)
        print(
            f"{targets[0]}: {fuzz(TARGETS[targets[0]], seconds, EXAMPLES, folder, int(time.time()))} files", flush=True
        )
        return
    failed = []
    for name in targets or TARGETS:
        command = [sys.executable, __file__, name, "--seconds", str(seconds)]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        raise SystemExit(f"findings in {', '.join(failed)}")


if __name__ == "__main__":
    tyro.cli(main)
