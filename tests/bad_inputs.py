"""The mistakes of users' data, each made on purpose: a table of what is wrong and what comes of it.

A `Scene` is a small VOC set in which nothing is wrong, until the maker of a row has spoiled it.
"""

import codecs
import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
from PIL import Image

from tests.conftest import ROOT
from utils.data.image_io import MAX_PIXELS

SIZE = (30, 40)  # height, width of the images
ERROR, SKIP, REPAIR, OK = "error", "skip", "repair", "ok"
ANCHORS_FILE = ROOT / "model_data" / "yolo_anchors.txt"
HUGE = 100_000_000  # bytes


@cache
def picture(size: tuple[int, int] = SIZE) -> Image.Image:
    """Noise, so that pixels that are missing are missed."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.copy().save(file, kind, **settings)  # saving leaves settings in an image
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

    def instead(self, name: str, content: bytes) -> None:
        """Another image of a than a.jpg."""
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
        """Image and annotation a under another name."""
        self.image_path().rename(self.image_path(f"{name}.jpg"))
        folder = self.folder / "VOC" / "Annotations"
        (folder / "a.xml").rename(folder / f"{name}.xml")


class Row(NamedTuple):
    """A case of the list."""

    number: int
    name: str
    make: Callable[[Scene], object]  # spoils a scene
    outcome: str
    words: tuple[str, ...] = ()  # of the message: the file, and what is wrong


# images


def bad_checksum(scene: Scene) -> None:
    at = PNG.index(b"IDAT")
    length = int.from_bytes(PNG[at - 4 : at])
    checksum = at + 4 + length
    scene.instead("a.png", PNG[:checksum] + bytes([PNG[checksum] ^ 1]) + PNG[checksum + 1 :])


def all_suffixes(scene: Scene) -> None:
    kinds = {"d.JPG": "JPEG", "e.jpeg": "JPEG", "f.png": "PNG", "g.bmp": "BMP", "h.webp": "WEBP"}
    for name, kind in kinds.items():
        scene.image(encoded(picture(), kind), name)
        scene.xml(xml(thing()), name[0])
    scene.split("\n".join("abcdefgh"))


def instead_of_the_file(scene: Scene, put: Callable[[Path], object]) -> None:
    scene.image_path().unlink()
    put(scene.image_path())


def ycck() -> bytes:
    """A CMYK JPEG whose Adobe marker says that it is YCCK."""
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


def over_the_cap(scene: Scene) -> None:
    scene.instead("a.png", encoded(Image.new("1", (MAX_PIXELS // 10_000 + 1, 10_000)), "PNG"))


def promised_bitmap(width: int, height: int) -> bytes:
    header = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54)
    return header + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(100)


IMAGES = [
    Row(1, "empty file", lambda scene: scene.image(b""), SKIP, ("a.jpg", "is empty")),
    Row(2, "text named .jpg", lambda scene: scene.image(b"hello " * 99), SKIP, ("a.jpg", "not an image")),
    Row(3, "truncated header", lambda scene: scene.image(JPEG[:60]), SKIP, ("a.jpg", "not an image")),
    Row(4, "truncated body", lambda scene: scene.image(JPEG[: len(JPEG) * 2 // 3]), SKIP, ("a.jpg", "cut off")),
    Row(4, "last bytes missing", lambda scene: scene.image(JPEG[:-12]), SKIP, ("a.jpg", "cut off")),
    Row(4, "truncated PNG", lambda scene: scene.instead("a.png", PNG[:-40]), SKIP, ("a.png", "cut off")),
    Row(5, "missing end marker", lambda scene: scene.image(JPEG[:-2]), REPAIR, ("a.jpg", "no end marker")),
    Row(5, "PNG without its end", lambda scene: scene.instead("a.png", PNG[:-12]), REPAIR, ("a.png", "no end marker")),
    Row(6, "PNG with a bad CRC", bad_checksum, SKIP, ("a.png", "checksum")),
    Row(7, "PNG named .jpg", lambda scene: scene.image(PNG), OK),
    Row(8, "all suffixes", all_suffixes, OK),
    Row(9, "two images", lambda scene: scene.image(PNG, "a.png"), ERROR, ("'a'", "a.jpg, a.png", "keep one")),
    Row(10, "missing", lambda scene: scene.image_path().unlink(), ERROR, ("train.txt", "'a'", "no image")),
    Row(11, "folder", partial(instead_of_the_file, put=Path.mkdir), ERROR, ("a.jpg", "is a folder")),
    Row(
        13,
        "dangling link",
        partial(instead_of_the_file, put=lambda path: path.symlink_to("nothing")),
        ERROR,
        ("a.jpg", "a link to what does not exist"),
    ),
    Row(14, "FIFO", partial(instead_of_the_file, put=os.mkfifo), ERROR, ("a.jpg", "pipe or device")),
    Row(
        14,
        "device",
        partial(instead_of_the_file, put=lambda path: path.symlink_to("/dev/zero")),
        ERROR,
        ("a.jpg", "pipe or device"),
    ),
    Row(15, "CMYK", lambda scene: scene.image(encoded(picture().convert("CMYK"))), REPAIR, ("a.jpg", "CMYK")),
    Row(16, "YCCK", lambda scene: scene.image(ycck()), REPAIR, ("a.jpg", "CMYK")),
    Row(
        17,
        "palette with transparency",
        lambda scene: scene.instead("a.png", encoded(picture().quantize(16), "PNG", transparency=3)),
        REPAIR,
        ("a.png", "transparency"),
    ),
    Row(18, "1 bit", lambda scene: scene.instead("a.png", encoded(picture().convert("1"), "PNG")), OK),
    Row(
        19,
        "gray and alpha",
        lambda scene: scene.instead("a.png", encoded(picture().convert("LA"), "PNG")),
        REPAIR,
        ("a.png", "transparency"),
    ),
    Row(20, "16-bit gray", lambda scene: scene.instead("a.png", gray_of_16_bits()), REPAIR, ("a.png", "16 bits")),
    Row(
        21,
        "float TIFF",
        lambda scene: scene.instead("a.tif", encoded(picture().convert("F"), "TIFF")),
        ERROR,
        ("a.tif", "kind F", "8 bits"),
    ),
    Row(21, "LAB TIFF", lambda scene: scene.instead("a.tif", encoded(lab(), "TIFF")), ERROR, ("a.tif", "kind LAB")),
    Row(22, "EXIF 6, size as stored", partial(exif_picture, orientation=6, stated=SIZE), OK),
    Row(22, "EXIF 8, size as turned", partial(exif_picture, orientation=8, stated=SIZE[::-1]), OK),
    Row(
        22,
        "EXIF 5, another size",
        partial(exif_picture, orientation=5, stated=(9, 9)),
        ERROR,
        ("a.xml", "a.jpg", "EXIF"),
    ),
    Row(22, "EXIF 3", partial(exif_picture, orientation=3, stated=SIZE), REPAIR, ("a.jpg", "EXIF", "stored")),
    Row(23, "corrupt EXIF", lambda scene: scene.image(encoded(picture(), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")), OK),
    Row(
        24,
        "animated",
        lambda scene: scene.instead(
            "a.webp", encoded(picture(), "WEBP", save_all=True, append_images=[picture().rotate(180)])
        ),
        REPAIR,
        ("a.webp", "several frames"),
    ),
    Row(25, "1x1", partial(of_size, size=(1, 1)), OK),
    Row(26, "1x10000", partial(of_size, size=(10_000, 1)), OK),
    Row(27, "over the pixel cap", over_the_cap, SKIP, ("a.png", "more than 120 million pixels")),
    Row(
        28,
        "huge bitmap promised",
        lambda scene: scene.instead("a.bmp", promised_bitmap(60_000, 60_000)),
        SKIP,
        ("a.bmp", "more than 120 million pixels"),
    ),
    Row(
        28,
        "large bitmap promised",
        lambda scene: scene.instead("a.bmp", promised_bitmap(10_000, 10_000)),
        SKIP,
        ("a.bmp", "cut off"),
    ),
]

# annotations

BOMB = "<!DOCTYPE a [<!ENTITY a 'ha'>" + "".join(
    f"<!ENTITY {new} '{f'&{old};' * 10}'>" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
BOMB += "]><annotation>&i;</annotation>"
OUTSIDE_ENTITY = "<!DOCTYPE a [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><annotation>&a;</annotation>"


def wrongly_declared(encoding: str) -> bytes:
    text = xml(thing(), rest="<folder>köln</folder>", declaration=f'<?xml version="1.0" encoding="{encoding}"?>')
    return text.encode("latin-1")


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
    Row(29, "not well-formed", lambda scene: scene.xml("<annotation><object>"), ERROR, ("a.xml", "not well-formed")),
    Row(30, "empty", lambda scene: scene.xml(""), ERROR, ("a.xml", "not well-formed", "no element")),
    Row(31, "BOM", lambda scene: scene.xml(codecs.BOM_UTF8 + xml(thing()).encode()), OK),
    Row(32, "UTF-16", lambda scene: scene.xml(UTF_16.encode("utf-16")), OK),
    Row(32, "UTF-16 without BOM", lambda scene: scene.xml(UTF_16.encode("utf-16-be")), OK),
    Row(32, "GBK", lambda scene: scene.xml(GBK), OK),
    Row(33, "not the UTF-8 declared", lambda scene: scene.xml(wrongly_declared("UTF-8")), ERROR, ("a.xml", "encoding")),
    Row(33, "not the UTF-16 declared", lambda scene: scene.xml(wrongly_declared("utf-16")), ERROR, ("a.xml", "utf-16")),
    Row(33, "no encoding", lambda scene: scene.xml(wrongly_declared("zlib")), ERROR, ("a.xml", "zlib", "not known")),
    Row(34, "entity bomb", lambda scene: scene.xml(BOMB), ERROR, ("a.xml", "DOCTYPE")),
    Row(35, "external entity", lambda scene: scene.xml(OUTSIDE_ENTITY), ERROR, ("a.xml", "DOCTYPE")),
    Row(
        36,
        "depth 100,000",
        annotated("<a>" * 100_000 + "</a>" * 100_000),
        ERROR,
        ("a.xml", "more than 100 deep"),
    ),
    Row(37, "100 MB", large_annotation, ERROR, ("a.xml", "too large")),
    Row(38, "wrong root", lambda scene: scene.xml("<html/>"), ERROR, ("a.xml", "<html>", "<annotation>")),
    Row(39, "no objects", annotated(), OK),
    Row(40, "no size", annotated(thing(), size=None), REPAIR, ("a.xml", "no <size>")),
    Row(41, "size 0", annotated(thing(), size=(0, 0)), REPAIR, ("a.xml", "<size> that no image has")),
    Row(42, "another size", annotated(thing(), size=(31, 41)), REPAIR, ("a.xml", "another size")),
    Row(
        42,
        "another size and boxes outside",
        annotated(thing(box(3, 4, 41, 31)), size=(31, 41)),
        ERROR,
        ("a.xml", "41x31", "40x30"),
    ),
    Row(43, "no name", annotated(thing(), thing(name="")), ERROR, ("a.xml, object 2", "no <name>")),
    Row(44, "padded name", annotated(thing(name="<name> cat\n</name>")), REPAIR, ("a.xml object 1 (cat)", "blanks")),
    Row(45, "unknown classes", annotated(*(thing(name=f"<name>{name}</name>") for name in ("cow", "owl"))), ERROR,
        ("'cow' (1)", "'owl' (1)", "cat, dog")),
    Row(46, "another case", annotated(thing(name="<name>CAT</name>")), ERROR, ("'CAT' (1) instead of 'cat'",)),
    Row(47, "no bndbox", annotated("<object><name>cat</name></object>"), ERROR, ("a.xml, object 1", "no <bndbox>")),
    Row(48, "missing xmin", boxed(None), ERROR, ("a.xml, object 2 (cat)", "no <xmin>")),
    Row(49, "float coordinates", boxed(3.25, 4.5, 20.75, 1e1), OK),
    Row(50, "12,5", boxed("12,5"), ERROR, ("a.xml, object 2 (cat)", "<xmin> is '12,5'")),
    Row(51, "NaN", boxed("NaN"), ERROR, ("a.xml, object 2 (cat)", "<xmin> is 'NaN'")),
    Row(51, "Inf", boxed(3, 4, "Inf"), ERROR, ("a.xml, object 2 (cat)", "<xmax> is 'Inf'")),
    Row(51, "1e400", boxed(3, 4, 20, "1e400"), ERROR, ("a.xml, object 2 (cat)", "<ymax> is '1e400'")),
    Row(51, "digits of another script", boxed("\uff11\uff12"), ERROR, ("a.xml, object 2 (cat)", "must be a number")),
    Row(52, "xmin > xmax", boxed(21), SKIP, ("a.xml object 2 (cat)", "ends before it begins")),
    Row(53, "xmin = xmax", boxed(20), OK),
    Row(53, "less than a pixel", boxed(20.5), SKIP, ("a.xml object 2 (cat)", "ends before it begins")),
    Row(54, "partly outside", boxed(3, 4, 44), REPAIR, ("a.xml object 2", "beyond the image")),
    Row(55, "wholly outside", boxed(41, 4, 44), SKIP, ("a.xml object 2", "outside the image")),
    Row(56, "0-based corner", boxed(0, 0), REPAIR, ("a.xml object 2", "begins at 0")),
    Row(57, "negative", boxed(-5), REPAIR, ("a.xml object 2", "beyond the image")),
    Row(58, "difficult missing", annotated(thing(rest="")), OK),
    Row(58, "difficult empty", annotated(thing(rest="<difficult> </difficult>")), OK),
    Row(58, "difficult yes", annotated(thing(rest="<difficult>yes</difficult>")), ERROR,
        ("a.xml, object 1 (cat)", "<difficult> is 'yes'", "0 or 1")),
    Row(59, "duplicate boxes", annotated(thing(), thing()), REPAIR, ("a.xml object 2", "again")),
    Row(60, "10,000 boxes, parts, paths", many_boxes, OK),
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
    Row(61, "CRLF", lambda scene: scene.split("a\r\nb\r\nc\r\n"), OK),
    Row(62, "BOM", lambda scene: scene.split("\ufeffa\nb\nc\n"), OK),
    Row(63, "trailing blanks", lambda scene: scene.split("a \t\nb  \nc\n\n"), OK),
    Row(64, "no final newline", lambda scene: scene.split("a\nb\nc"), OK),
    Row(65, "spaces in a name", partial(named, name="a picture of it"), OK),
    Row(66, "CJK and emoji", partial(named, name="北京 🚗"), OK),
    Row(67, "NFC and NFD", decomposed, REPAIR, ("train.txt", "accent")),
    Row(68, "duplicate id", lambda scene: scene.split("a\nb\na\nc"), REPAIR, ("train.txt line 3", "again")),
    Row(69, "../", lambda scene: scene.split("a\n../a"), ERROR, ("train.txt, line 2", "'../a'", "name alone")),
    Row(69, "absolute", lambda scene: scene.split("/etc/passwd"), ERROR, ("train.txt, line 1", "'/etc/passwd'")),
    Row(69, "backslash", lambda scene: scene.split(r"..\a"), ERROR, ("train.txt, line 1", "name alone")),
    Row(70, "missing id", lambda scene: scene.split("a\nb\nd"), ERROR, ("train.txt", "'d'", "no image")),
    Row(71, "overlap", lambda scene: scene.split("v\nb", "val"), ERROR, ("b.jpg", "in the training and in the val")),
    Row(72, "empty", lambda scene: scene.split("\n \n"), ERROR, ("train.txt", "is empty")),
    Row(72, "one image", one_image, OK),
    Row(72, "100 MB", large_split, ERROR, ("train.txt", "too large")),
]

CLASSES = [
    Row(73, "BOM", lambda scene: scene.classes.write_bytes(b"\xef\xbb\xbfcat\ndog"), REPAIR, ("classes.txt", "mark")),
    Row(74, "blank line at the end", lambda scene: scene.classes.write_text("cat\ndog\n\n \n"), OK),
    Row(74, "blank line inside", lambda scene: scene.classes.write_text("cat\n\ndog"), ERROR, ("classes.txt, line 2",)),
    Row(
        75,
        "duplicate",
        lambda scene: scene.classes.write_text("cat\ndog\ncat"),
        ERROR,
        ("classes.txt", "'cat' 2 times"),
    ),
    Row(
        75,
        "too many",
        lambda scene: scene.classes.write_text("\n".join(map(str, range(300_000)))),
        ERROR,
        ("classes.txt", "300,000 classes", "at most 10,000"),
    ),
    Row(76, "empty", lambda scene: scene.classes.write_text("\ufeff\n"), ERROR, ("classes.txt", "is empty")),
    Row(77, "odd count", lambda scene: scene.anchors.write_text("1,2, " * 5 + "3"), ERROR, ("anchors.txt", "contains 11 numbers")),
    Row(
        78, "no number", lambda scene: scene.anchors.write_text("1,x, " * 6), ERROR, ("anchors.txt", "'x' is not a number")
    ),
    Row(78, "NaN", lambda scene: scene.anchors.write_text("1,nan, " * 6), ERROR, ("anchors.txt", "'nan' is not a number")),
    Row(79, "zero", lambda scene: scene.anchors.write_text("1,0, " * 6), ERROR, ("anchors.txt", "sides")),
    Row(79, "negative", lambda scene: scene.anchors.write_text("1,-2, " * 6), ERROR, ("anchors.txt", "sides")),
]

DATA = [*IMAGES, *ANNOTATIONS, *SPLITS, *CLASSES]  # what training reads before it begins
