"""Hypothesis strategies for files: changed valid files, random combinations of their parts, and any bytes."""

import io
import json
import tempfile
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import torch
from hypothesis import strategies as st
from PIL import Image

from nets.spec import ModelSpec
from tests.bad_inputs import ANCHORS_FILE, GBK, JPEG, PNG, UTF_16, box, encoded, gray_of_16_bits, picture, thing, xml
from tests.conftest import ANCHORS
from utils.weights.checkpoint import Checkpoint, save_checkpoint
from utils.weights.darknet import count_floats, standard_layers

SPEC = ModelSpec(("cat", "dog"), ANCHORS, input_size=(32, 32))
COCO = (
    '{"images": [{"id": %s, "file_name": %s, "height": %s, "width": %s}], "categories": [{"id": %s, "name": %s}], '
    '"annotations": [{"image_id": %s, "category_id": %s, "bbox": [%s, 2, 3, 4], "iscrowd": %s}]}'
)
INTEGERS = [
    number.to_bytes(size, order)
    for number in (0, 1, 2**15, 2**31 - 1, 2**32 - 1) for size in (4, 8) for order in ("little", "big")
]  # fmt: skip
Files = st.SearchStrategy[bytes]


@st.composite
def changed(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """A valid file in which a few pieces are replaced, removed or repeated, and which may be truncated."""
    content = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 64)))
        repeated = st.sampled_from([content[start:end] * 2, content[start:end] * 500])
        piece = draw(st.one_of(st.just(b""), st.binary(max_size=8), repeated, st.sampled_from(INTEGERS)))
        content = content[:start] + piece + content[end:]
    return content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content


def changed_or_any(*seeds: bytes) -> Files:
    return st.one_of(changed(seeds), st.binary(max_size=200))


def texts(*tokens: str) -> Files:
    """Tokens and any text in any order."""
    parts = st.lists(st.one_of(st.sampled_from(tokens), st.text(max_size=5)), max_size=40)
    return st.one_of(parts.map("".join), parts.map("\n".join)).map(lambda text: text.encode("utf-8", "replace"))


def annotation_files() -> Files:
    tags = [f"<{slash}{tag}>" for tag in ("annotation", "object", "name", "bndbox", "size") for slash in ("", "/")]
    odd = ["<?xml version='1.0' encoding='idna'?>", "&#0;", "&a;", "<!DOCTYPE a>", "<![CDATA[", "]]>", "<!--", "\0"]
    numbers = ["nan", "1e308", "-1e308", "9" * 400, "1_0", "\u0661", "1", "-1", "", " ", "0x10"]
    edges = st.tuples(*[st.sampled_from(numbers)] * 4)
    objects = st.lists(edges.map(lambda values: thing(box(*values))), max_size=5)
    seeds = xml(thing(), thing(), declaration="<?xml version='1.0' encoding='utf-8'?>").encode(), GBK
    well_formed = objects.map(lambda items: xml(*items).encode())
    encodings = UTF_16.encode("utf-16"), UTF_16.encode("utf-16-be")
    return st.one_of(well_formed, texts(xml(thing()), *tags, *odd, *numbers), changed_or_any(*seeds, *encodings))


def split_files() -> Files:
    return texts("a", "../", "/", "\\", "\ufeff", "\r", " ", "\0", "a\nb", "..")


def class_files() -> Files:
    return texts("cat", "\ufeff", "\r", " ")


def anchor_files() -> Files:
    return st.one_of(texts("1", ",", "nan", "1e9", "-"), changed_or_any(ANCHORS_FILE.read_bytes()))


@cache
def valid_images() -> list[bytes]:
    small = picture((17, 23))
    palette = small.quantize(8)

    def two_frames(kind: str) -> bytes:
        return encoded(small, kind, save_all=True, append_images=[small.rotate(180)])

    exif = Image.Exif()
    exif[0x0112] = 6
    jpegs = [encoded(small, exif=exif), encoded(small, progressive=True), encoded(small.convert("L"))]
    jpegs += [encoded(small.convert("CMYK")), two_frames("MPO")]
    pngs = [encoded(small, "PNG", exif=exif), encoded(palette, "PNG", transparency=1), two_frames("PNG")]
    pngs += [encoded(small.convert("1"), "PNG"), encoded(small.convert("LA"), "PNG"), gray_of_16_bits()]
    tiffs = [encoded(small, "TIFF", compression=kind) for kind in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg")]
    tiffs += [encoded(small.convert("1"), "TIFF", compression="group4"), two_frames("TIFF")]
    others = [encoded(small, "BMP"), encoded(palette, "BMP"), encoded(small, "GIF"), two_frames("GIF")]
    webps = [encoded(small, "WEBP"), encoded(small, "WEBP", lossless=True), two_frames("WEBP")]
    return [JPEG, PNG, *jpegs, *pngs, *tiffs, *others, *webps]


def with_valid_checksums(content: bytes) -> bytes:
    """A PNG file with correct checksums, so that its chunks are read; other files as they are."""
    if not content.startswith(PNG[:8]):
        return content
    fixed, start = content[:8], 8
    while start + 12 <= len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4])
        if end > len(content):
            break
        fixed += content[start : end - 4] + crc32(content[start + 4 : end - 4]).to_bytes(4)
        start = end
    return fixed + content[start:]


def image_files() -> Files:
    return st.one_of(changed_or_any(*valid_images()), changed(valid_images()).map(with_valid_checksums))


def darknet_files() -> st.SearchStrategy[tuple[bytes, int]]:
    """A header and the size of the file, often near the end of a layer."""
    header = (0).to_bytes(4, "little") + (2).to_bytes(4, "little") + (5).to_bytes(4, "little") + bytes(8)
    ends = [20 + 4 * floats for floats in accumulate(count_floats([layer]) for layer in standard_layers(1))]
    near_end = st.tuples(st.sampled_from(ends), st.integers(-9, 9)).map(sum)
    return st.tuples(changed([header]), st.one_of(near_end, st.integers(0, 10**8)))


def checkpoint_files() -> Files:
    """Checkpoints with any metadata, and damaged ones."""
    anything = st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
        max_leaves=8,
    )
    spec = json.loads(json.dumps(SPEC.to_dict()))
    sizes = st.sampled_from([[2**40, 32], [10**8] * 2, [0, 32], [-32, 32]])
    masks = st.sampled_from([[[0] * 10**5] * 2, [[], []], [[9], [0]]])
    arguments = st.dictionaries(st.sampled_from(["ratio", "kernel_size", "b", "gamma"]), anything, max_size=2)
    specs = st.one_of(
        anything,
        st.tuples(st.sampled_from([*spec, "more"]), anything).map(lambda item: spec | {item[0]: item[1]}),
        sizes.map(lambda size: spec | {"input_size": size}),
        masks.map(lambda mask: spec | {"anchors_mask": mask}),
        st.builds(lambda phi, args: spec | {"phi": phi, "attention_args": args}, st.integers(0, 5), arguments),
    )
    infos = st.one_of(st.just({}), anything)
    return st.one_of(st.builds(checkpoint_file, specs, infos), changed_or_any(checkpoint_file(spec, {})))


def checkpoint_file(spec: object, info: object) -> bytes:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.exists() else None) as folder:
        path = Path(folder) / "a"
        save_checkpoint(path, Checkpoint(SimpleNamespace(to_dict=lambda: spec), {"a": torch.ones(3)}, info, {}))
        return path.read_bytes()


def pth_files() -> Files:
    contents = []
    for as_zip in (True, False):
        file = io.BytesIO()
        torch.save({"a.weight": torch.ones(2, 3), "b": torch.ones(1)}, file, _use_new_zipfile_serialization=as_zip)
        contents.append(file.getvalue())
    return changed_or_any(*contents)


def coco_files() -> Files:
    """COCO's JSON with any values."""
    odd = ["null", "true", "-1", "0.5", "1e999", "NaN", "9" * 400, '"a"', '"\\ud800"', "[]", "{}", "[1, 2]", "1, 2"]
    values = st.one_of(st.sampled_from(["1", "2", *odd]), st.integers().map(str))
    filled = st.tuples(*[values] * 10).map(lambda items: (COCO % items).encode())
    tokens = ['{"images": ', '"categories": ', '"annotations": ', '{"id": ', '"bbox": ', "[", "]", "{", "}", ",", *odd]
    return st.one_of(filled, texts(*tokens), changed_or_any((COCO % ((1,) * 10)).encode()))


def yolo_files() -> Files:
    numbers = ["0", "1", "2", "0.5", "-0.5", "1e308", "9" * 400, "nan", "1_0", "\u0661", "0x1"]
    rows = texts(*(f"{number} " for number in numbers), "0 0.5 0.5 0.1 0.1", "\n", "\ufeff", "\0")
    return st.one_of(rows, changed_or_any(b"1 1 1 1 1\n"))
