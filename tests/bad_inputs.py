"""Invalid and unusual data, each case with the expected outcome and message.

A `Scene` is a small valid VOC dataset, which a case then changes.
"""

import codecs
import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
import torch
from PIL import Image

from nets.spec import ModelSpec
from nets.yolo import build_model
from tests.conftest import ANCHORS as ANCHOR_SIDES
from tests.conftest import ROOT, Outcome
from utils.data.image_io import MAX_PIXELS
from utils.weights.checkpoint import Checkpoint, save_checkpoint

SIZE = (30, 40)  # height, width of the images
ERROR, SKIP, REPAIR, OK = "error", "skip", "repair", "ok"
ANCHORS_FILE = ROOT / "model_data" / "yolo_anchors.txt"
HUGE = 100_000_000  # bytes


@cache
def picture(size: tuple[int, int] = SIZE) -> Image.Image:
    """Noise, so that missing pixels make a difference."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.copy().save(file, kind, **settings)  # a copy, since saving leaves settings in an image
    return file.getvalue()


JPEG, PNG = encoded(picture()), encoded(picture(), "PNG")


def box(xmin: object = 3, ymin: object = 4, xmax: object = 20, ymax: object = 25) -> str:
    edges = zip(("xmin", "ymin", "xmax", "ymax"), (xmin, ymin, xmax, ymax), strict=True)
    return "<bndbox>" + "".join(f"<{name}>{value}</{name}>" for name, value in edges if value is not None) + "</bndbox>"


def thing(bndbox: str = "", name: str = "<name>cat</name>", rest: str = "<difficult>0</difficult>") -> str:
    return f"<object>{name}{rest}{bndbox or box()}</object>"


def xml(*objects: str, size: tuple[int, int] | None = SIZE, rest: str = "", declaration: str = "") -> str:
    stated = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>" if size else ""
    return f"{declaration}<annotation>{rest}{stated}{''.join(objects)}</annotation>"


@dataclass(frozen=True)
class Scene:
    """A devkit with the sets VOC/train (a, b, c) and VOC/val (v), a class file and an anchors file."""

    folder: Path

    def __post_init__(self) -> None:
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (self.folder / "VOC" / part).mkdir(parents=True)
        for name in "abcv":
            self.image(JPEG, f"{name}.jpg")
            self.xml(xml(thing()), name)
        self.split("a\nb\nc\n")
        self.split("v\n", "val")
        self.classes.write_text("cat\ndog\n")
        self.anchors.write_bytes(ANCHORS_FILE.read_bytes())

    @property
    def classes(self) -> Path:
        return self.folder / "classes.txt"

    @property
    def anchors(self) -> Path:
        return self.folder / "anchors.txt"

    def image(self, content: bytes, name: str = "a.jpg") -> None:
        (self.folder / "VOC" / "JPEGImages" / name).write_bytes(content)

    def replace_image(self, name: str, content: bytes) -> None:
        """Replace a.jpg by another file."""
        self.image_path().unlink()
        self.image(content, name)

    def image_path(self, name: str = "a.jpg") -> Path:
        return self.folder / "VOC" / "JPEGImages" / name

    def xml(self, content: str | bytes, name: str = "a") -> None:
        path = self.folder / "VOC" / "Annotations" / f"{name}.xml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def split(self, content: str | bytes, name: str = "train") -> None:
        path = self.folder / "VOC" / "ImageSets" / "Main" / f"{name}.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def rename(self, name: str) -> None:
        """Rename image and annotation a."""
        self.image_path().rename(self.image_path(f"{name}.jpg"))
        folder = self.folder / "VOC" / "Annotations"
        (folder / "a.xml").rename(folder / f"{name}.xml")


class Case(NamedTuple):
    """One thing that can be wrong with a dataset, or unusual but valid."""

    name: str
    make: Callable[[Scene], object]  # changes a valid scene
    outcome: str  # of training: an error, a skipped or repaired item, or nothing
    words: tuple[str, ...] = ()  # in the message, the file first


# images


def bad_checksum(scene: Scene) -> None:
    at = PNG.index(b"IDAT")
    length = int.from_bytes(PNG[at - 4 : at])
    checksum = at + 4 + length
    scene.replace_image("a.png", PNG[:checksum] + bytes([PNG[checksum] ^ 1]) + PNG[checksum + 1 :])


def all_suffixes(scene: Scene) -> None:
    kinds = {"d.JPG": "JPEG", "e.jpeg": "JPEG", "f.png": "PNG", "g.bmp": "BMP", "h.webp": "WEBP"}
    for name, kind in kinds.items():
        scene.image(encoded(picture(), kind), name)
        scene.xml(xml(thing()), name[0])
    scene.split("\n".join("abcdefgh"))


def replace_path(scene: Scene, put: Callable[[Path], object]) -> None:
    scene.image_path().unlink()
    put(scene.image_path())


def ycck() -> bytes:
    """A CMYK JPEG whose Adobe marker declares YCCK."""
    content = encoded(picture().convert("CMYK"))
    at = content.index(b"Adobe") + 11
    return content[:at] + b"\2" + content[at + 1 :]


def gray_of_16_bits() -> bytes:
    return encoded(Image.fromarray(np.full(SIZE, 0x4000, np.uint16)), "PNG")


def lab() -> Image.Image:
    return Image.frombytes("LAB", SIZE[::-1], bytes(3 * SIZE[0] * SIZE[1]))


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), exif=exif)


def exif_picture(scene: Scene, orientation: int, stated: tuple[int, int]) -> None:
    scene.image(turned(orientation))
    scene.xml(xml(thing(box(1, 1, 20, 20)), size=stated))


def of_size(scene: Scene, size: tuple[int, int]) -> None:
    scene.image(encoded(picture(size)))
    scene.xml(xml(thing(box(1, 1, 1, size[0])), size=size))


def too_many_pixels(scene: Scene) -> None:
    scene.replace_image("a.png", encoded(Image.new("1", (MAX_PIXELS // 10_000 + 1, 10_000)), "PNG"))


def bitmap_header(width: int, height: int) -> bytes:
    header = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54)
    return header + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(100)


IMAGES = [
    Case("empty file", lambda scene: scene.image(b""), SKIP, ("a.jpg", "is empty")),
    Case("text file named .jpg", lambda scene: scene.image(b"hello " * 99), SKIP, ("a.jpg", "not a readable image")),
    Case("truncated header", lambda scene: scene.image(JPEG[:60]), SKIP, ("a.jpg", "not a readable image")),
    Case("truncated body", lambda scene: scene.image(JPEG[: len(JPEG) * 2 // 3]), SKIP, ("a.jpg", "truncated")),
    Case("missing last bytes", lambda scene: scene.image(JPEG[:-12]), SKIP, ("a.jpg", "truncated")),
    Case("truncated PNG", lambda scene: scene.replace_image("a.png", PNG[:-40]), SKIP, ("a.png", "truncated")),
    Case("missing end marker", lambda scene: scene.image(JPEG[:-2]), REPAIR, ("a.jpg", "no end marker")),
    Case(
        "PNG without end chunk",
        lambda scene: scene.replace_image("a.png", PNG[:-12]),
        REPAIR,
        ("a.png", "no end marker"),
    ),
    Case("PNG with a bad CRC", bad_checksum, SKIP, ("a.png", "checksum")),
    Case("PNG named .jpg", lambda scene: scene.image(PNG), OK),
    Case("all supported suffixes", all_suffixes, OK),
    Case(
        "two images with the same name",
        lambda scene: scene.image(PNG, "a.png"),
        ERROR,
        ("'a'", "a.jpg, a.png", "keep one"),
    ),
    Case("missing file", lambda scene: scene.image_path().unlink(), ERROR, ("train.txt", "'a'", "found none")),
    Case("folder", partial(replace_path, put=Path.mkdir), ERROR, ("a.jpg", "is a folder")),
    Case(
        "broken link",
        partial(replace_path, put=lambda path: path.symlink_to("nothing")),
        ERROR,
        ("a.jpg", "a broken link"),
    ),
    Case("FIFO", partial(replace_path, put=os.mkfifo), ERROR, ("a.jpg", "pipe or device")),
    Case(
        "device",
        partial(replace_path, put=lambda path: path.symlink_to("/dev/zero")),
        ERROR,
        ("a.jpg", "pipe or device"),
    ),
    Case("CMYK", lambda scene: scene.image(encoded(picture().convert("CMYK"))), REPAIR, ("a.jpg", "CMYK")),
    Case("YCCK", lambda scene: scene.image(ycck()), REPAIR, ("a.jpg", "CMYK")),
    Case(
        "palette with transparency",
        lambda scene: scene.replace_image("a.png", encoded(picture().quantize(16), "PNG", transparency=3)),
        REPAIR,
        ("a.png", "transparency"),
    ),
    Case("1-bit image", lambda scene: scene.replace_image("a.png", encoded(picture().convert("1"), "PNG")), OK),
    Case(
        "grayscale with alpha",
        lambda scene: scene.replace_image("a.png", encoded(picture().convert("LA"), "PNG")),
        REPAIR,
        ("a.png", "transparency"),
    ),
    Case("16-bit gray", lambda scene: scene.replace_image("a.png", gray_of_16_bits()), REPAIR, ("a.png", "16 bits")),
    Case(
        "float TIFF",
        lambda scene: scene.replace_image("a.tif", encoded(picture().convert("F"), "TIFF")),
        ERROR,
        ("a.tif", "type F", "8-bit"),
    ),
    Case("LAB TIFF", lambda scene: scene.replace_image("a.tif", encoded(lab(), "TIFF")), ERROR, ("a.tif", "type LAB")),
    Case("EXIF 6 and the stored size", partial(exif_picture, orientation=6, stated=SIZE), OK),
    Case("EXIF 8 and the turned size", partial(exif_picture, orientation=8, stated=SIZE[::-1]), OK),
    Case(
        "EXIF 5 and a third size",
        partial(exif_picture, orientation=5, stated=(9, 9)),
        ERROR,
        ("a.xml", "a.jpg", "EXIF"),
    ),
    Case(
        "EXIF 3, which keeps the size",
        partial(exif_picture, orientation=3, stated=SIZE),
        REPAIR,
        ("a.jpg", "EXIF", "ignored"),
    ),
    Case("corrupt EXIF", lambda scene: scene.image(encoded(picture(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")), OK),
    Case(
        "animated",
        lambda scene: scene.replace_image(
            "a.webp", encoded(picture(), "WEBP", save_all=True, append_images=[picture().rotate(180)])
        ),
        REPAIR,
        ("a.webp", "several frames"),
    ),
    Case("1x1 pixels", partial(of_size, size=(1, 1)), OK),
    Case("1x10000 pixels", partial(of_size, size=(10_000, 1)), OK),
    Case("too many pixels", too_many_pixels, SKIP, ("a.png", "more than 120 million pixels")),
    Case(
        "header of a huge bitmap",
        lambda scene: scene.replace_image("a.bmp", bitmap_header(60_000, 60_000)),
        SKIP,
        ("a.bmp", "more than 120 million pixels"),
    ),
    Case(
        "header of a large bitmap",
        lambda scene: scene.replace_image("a.bmp", bitmap_header(10_000, 10_000)),
        SKIP,
        ("a.bmp", "truncated"),
    ),
]

# annotations

BOMB = "<!DOCTYPE a [<!ENTITY a 'ha'>" + "".join(
    f"<!ENTITY {new} '{f'&{old};' * 10}'>" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
BOMB += "]><annotation>&i;</annotation>"
OUTSIDE_ENTITY = "<!DOCTYPE a [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><annotation>&a;</annotation>"


def declared(encoding: str) -> Callable[[Scene], None]:
    """Latin-1 with a wrong declaration."""
    text = xml(thing(), rest="<folder>köln</folder>", declaration=f'<?xml version="1.0" encoding="{encoding}"?>')
    return lambda scene: scene.xml(text.encode("latin-1"))


def large_annotation(scene: Scene) -> None:
    scene.xml(xml(thing()))
    os.truncate(scene.folder / "VOC" / "Annotations" / "a.xml", HUGE)


def many_boxes(scene: Scene) -> None:
    corners = product(range(1, 20), range(1, 15), range(20, 41), range(15, 31))
    part = f"<part><name>head</name>{box('x', 'x', 'x', 'x')}</part>"
    boxes = [thing(part + box(*edges)) for edges in islice(((x, y, *end) for x, y, *end in corners), 10_000)]
    paths = "<filename>../../../etc/passwd</filename><path>/etc/shadow</path>"
    scene.xml(xml(*boxes, rest=paths))


def annotated(*objects: str, **settings: object) -> Callable[[Scene], None]:
    return lambda scene: scene.xml(xml(*objects, **settings))


def boxed(*edges: object) -> Callable[[Scene], None]:
    return annotated(thing(), thing(box(*edges)))


GBK = xml(thing(), rest="<folder>北京</folder>", declaration='<?xml version="1.0" encoding="GBK"?>').encode("gbk")
UTF_16 = xml(thing(), declaration='<?xml version="1.0" encoding="UTF-16"?>')

ANNOTATIONS = [
    Case("not well-formed", lambda scene: scene.xml("<annotation><object>"), ERROR, ("a.xml", "not well-formed")),
    Case("empty", lambda scene: scene.xml(""), ERROR, ("a.xml", "not well-formed", "no element")),
    Case("BOM", lambda scene: scene.xml(codecs.BOM_UTF8 + xml(thing()).encode()), OK),
    Case("UTF-16", lambda scene: scene.xml(UTF_16.encode("utf-16")), OK),
    Case("UTF-16 without BOM", lambda scene: scene.xml(UTF_16.encode("utf-16-be")), OK),
    Case("GBK", lambda scene: scene.xml(GBK), OK),
    Case("invalid UTF-8", declared("UTF-8"), ERROR, ("a.xml", "not valid UTF-8")),
    Case("wrongly declared UTF-16", declared("utf-16"), ERROR, ("a.xml", "not valid utf-16")),
    Case("unknown encoding", declared("zlib"), ERROR, ("a.xml", "unknown encoding zlib")),
    Case("entity bomb", lambda scene: scene.xml(BOMB), ERROR, ("a.xml", "DOCTYPE")),
    Case("external entity", lambda scene: scene.xml(OUTSIDE_ENTITY), ERROR, ("a.xml", "DOCTYPE")),
    Case("100,000 nested elements",
        annotated("<a>" * 100_000 + "</a>" * 100_000),
        ERROR,
        ("a.xml", "more than 100 deep"),
    ),
    Case("100 MB file", large_annotation, ERROR, ("a.xml", "too large")),
    Case("wrong root element", lambda scene: scene.xml("<html/>"), ERROR, ("a.xml", "<html>", "<annotation>")),
    Case("no objects", annotated(), OK),
    Case("missing size", annotated(thing(), size=None), REPAIR, ("a.xml", "no <size>")),
    Case("size of 0", annotated(thing(), size=(0, 0)), REPAIR, ("a.xml", "invalid <size>")),
    Case("wrong size", annotated(thing(), size=(31, 41)), REPAIR, ("a.xml", "wrong <size>")),
    Case("wrong size and box outside",
        annotated(thing(box(3, 4, 41, 31)), size=(31, 41)),
        ERROR,
        ("a.xml", "41x31", "40x30"),
    ),
    Case("missing name", annotated(thing(), thing(name="")), ERROR, ("a.xml, object 2", "no <name>")),
    Case("spaces around a name", annotated(thing(name="<name> cat\n</name>")), REPAIR,
        ("a.xml object 1 (cat)", "spaces")),
    Case("unknown classes", annotated(*(thing(name=f"<name>{name}</name>") for name in ("cow", "owl"))), ERROR,
        ("'cow' (1)", "'owl' (1)", "cat, dog")),
    Case("class in another case", annotated(thing(name="<name>CAT</name>")), ERROR,
        ("'CAT' (1; did you mean 'cat'?)",)),
    Case("missing bndbox", annotated("<object><name>cat</name></object>"), ERROR, ("a.xml, object 1", "no <bndbox>")),
    Case("missing xmin", boxed(None), ERROR, ("a.xml, object 2 (cat)", "no <xmin>")),
    Case("float coordinates", boxed(3.25, 4.5, 20.75, 1e1), OK),
    Case("decimal comma", boxed("12,5"), ERROR, ("a.xml, object 2 (cat)", "<xmin> is '12,5'")),
    Case("NaN", boxed("NaN"), ERROR, ("a.xml, object 2 (cat)", "<xmin> is 'NaN'")),
    Case("Inf", boxed(3, 4, "Inf"), ERROR, ("a.xml, object 2 (cat)", "<xmax> is 'Inf'")),
    Case("overflow", boxed(3, 4, 20, "1e400"), ERROR, ("a.xml, object 2 (cat)", "<ymax> is '1e400'")),
    Case("full-width digits", boxed("\uff11\uff12"), ERROR, ("a.xml, object 2 (cat)", "must be a number")),
    Case("xmin above xmax", boxed(21), SKIP, ("a.xml object 2 (cat)", "ends before it begins")),
    Case("xmin equal to xmax", boxed(20), OK),
    Case("box thinner than a pixel", boxed(20.5), SKIP, ("a.xml object 2 (cat)", "ends before it begins")),
    Case("partly outside", boxed(3, 4, 44), REPAIR, ("a.xml object 2", "beyond the image")),
    Case("wholly outside", boxed(41, 4, 44), SKIP, ("a.xml object 2", "outside the image")),
    Case("box starting at 0", boxed(0, 0), REPAIR, ("a.xml object 2", "starts at 0")),
    Case("negative coordinate", boxed(-5), REPAIR, ("a.xml object 2", "beyond the image")),
    Case("missing difficult", annotated(thing(rest="")), OK),
    Case("empty difficult", annotated(thing(rest="<difficult> </difficult>")), OK),
    Case("invalid difficult", annotated(thing(rest="<difficult>yes</difficult>")), ERROR,
        ("a.xml, object 1 (cat)", "<difficult> is 'yes'", "0 or 1")),
    Case("repeated object", annotated(thing(), thing()), REPAIR, ("a.xml object 2", "repeats")),
    Case("10,000 boxes with parts and paths", many_boxes, OK),
]  # fmt: skip

# split files, classes and anchors


def decomposed(scene: Scene) -> None:
    scene.rename(normalize("NFD", "café"))
    scene.split(normalize("NFC", "café\nb\nc"))


def named(scene: Scene, name: str) -> None:
    scene.rename(name)
    scene.split(f"{name}\nb\nc\n")


def one_image(scene: Scene) -> None:
    scene.split("a")


def large_split(scene: Scene) -> None:
    os.truncate(scene.folder / "VOC" / "ImageSets" / "Main" / "train.txt", HUGE)


SPLITS = [
    Case("CRLF", lambda scene: scene.split("a\r\nb\r\nc\r\n"), OK),
    Case("BOM", lambda scene: scene.split("\ufeffa\nb\nc\n"), OK),
    Case("trailing blanks", lambda scene: scene.split("a \t\nb  \nc\n\n"), OK),
    Case("no final newline", lambda scene: scene.split("a\nb\nc"), OK),
    Case("spaces in a name", partial(named, name="a picture of it"), OK),
    Case("CJK and emoji", partial(named, name="北京 🚗"), OK),
    Case("NFD file name", decomposed, REPAIR, ("train.txt", "accent")),
    Case("repeated id", lambda scene: scene.split("a\nb\na\nc"), REPAIR, ("train.txt line 3", "repeats")),
    Case(
        "path to the parent folder",
        lambda scene: scene.split("a\n../a"),
        ERROR,
        ("train.txt, line 2", "'../a'", "name of an image"),
    ),
    Case("absolute path", lambda scene: scene.split("/etc/passwd"), ERROR, ("train.txt, line 1", "'/etc/passwd'")),
    Case("backslash path", lambda scene: scene.split(r"..\a"), ERROR, ("train.txt, line 1", "name of an image")),
    Case("id without an image", lambda scene: scene.split("a\nb\nd"), ERROR, ("train.txt", "'d'", "found none")),
    Case(
        "overlap of training and validation",
        lambda scene: scene.split("v\nb", "val"),
        ERROR,
        ("b.jpg", "both the training and the validation sets"),
    ),
    Case("empty", lambda scene: scene.split("\n \n"), ERROR, ("train.txt", "is empty")),
    Case("one image", one_image, OK),
    Case("100 MB file", large_split, ERROR, ("train.txt", "too large")),
]

CLASSES = [
    Case("BOM", lambda scene: scene.classes.write_bytes(b"\xef\xbb\xbfcat\ndog"), REPAIR, ("classes.txt", "mark")),
    Case("blank line at the end", lambda scene: scene.classes.write_text("cat\ndog\n\n \n"), OK),
    Case("blank line inside", lambda scene: scene.classes.write_text("cat\n\ndog"), ERROR, ("classes.txt, line 2",)),
    Case(
        "repeated class",
        lambda scene: scene.classes.write_text("cat\ndog\ncat"),
        ERROR,
        ("classes.txt", "'cat' 2 times"),
    ),
    Case(
        "too many classes",
        lambda scene: scene.classes.write_text("\n".join(map(str, range(300_000)))),
        ERROR,
        ("classes.txt", "300,000 classes", "at most 10,000"),
    ),
    Case("empty", lambda scene: scene.classes.write_text("\ufeff\n"), ERROR, ("classes.txt", "is empty")),
]

ANCHORS = [
    Case(
        "odd count",
        lambda scene: scene.anchors.write_text("1,2, " * 5 + "3"),
        ERROR,
        ("anchors.txt", "contains 11 numbers"),
    ),
    Case(
        "not a number",
        lambda scene: scene.anchors.write_text("1,x, " * 6),
        ERROR,
        ("anchors.txt", "'x' is not a number"),
    ),
    Case("NaN", lambda scene: scene.anchors.write_text("1,nan, " * 6), ERROR, ("anchors.txt", "'nan' is not a number")),
    Case("zero side", lambda scene: scene.anchors.write_text("1,0, " * 6), ERROR, ("anchors.txt", "sides")),
    Case("negative side", lambda scene: scene.anchors.write_text("1,-2, " * 6), ERROR, ("anchors.txt", "sides")),
]

GROUPS = {"image": IMAGES, "annotation": ANNOTATIONS, "split file": SPLITS, "class file": CLASSES, "anchors": ANCHORS}
DATA = [case._replace(name=f"{group}: {case.name}") for group, cases in GROUPS.items() for case in cases]


def expect(outcome: Outcome, expected: str, words: tuple[str, ...] = ()) -> None:
    """Expect one error with all words and exit code 2, one summary line with all words, or no findings."""
    if expected == ERROR:
        assert outcome.code == 2, outcome.output
        (line,) = outcome.errors
    else:
        assert (outcome.code, outcome.errors) == (0, [])
        lines = [line for line in outcome.output.splitlines() if line.startswith(f"  {expected}: ")]
        if expected == OK:
            assert not lines and "skipped" not in outcome.output and "repaired" not in outcome.output
            return
        (line,) = lines
    for word in words:
        assert word in line, line


# networks

SPEC = ModelSpec(("cat", "dog"), ANCHOR_SIDES, input_size=(32, 32), scale_xy=1.05)


def random_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_model(SPEC).state_dict()


def save_weights(path: Path, weights: dict[str, torch.Tensor], **changes: object) -> Path:
    """Write a checkpoint whose specification is SPEC with `changes`."""
    save_checkpoint(path, Checkpoint(replace(SPEC, **changes), weights, {"epoch": 1}, {}))
    return path
