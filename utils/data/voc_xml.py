"""Annotation files in VOC's XML format.

The files count pixels from 1 and include a box's last pixel; here the same box is (xmin - 1, ymin - 1, xmax, ymax).
"""

import codecs
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from utils.system.diagnostics import Diagnostics
from utils.system.errors import FileError, SkippableError
from utils.system.files import read_file
from utils.system.text import parse_number, printable, strip

MAX_BYTES = 8_000_000  # size limit of an annotation file; 10,000 objects take about 3 MB
MAX_DEPTH = 100  # maximum depth of nested elements; VOC's own files have five levels
ENCODING = re.compile(rb"""<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["']""")
# Python's text codecs; the others do not return text, or do not terminate on malicious input
TEXT_CODECS = re.compile(r"ascii|big5|cp\d|euc|gb|hz|iso|johab|koi8|latin|mac|ptcp|shift|tis|utf")
# First bytes that identify an encoding without a declaration
SIGNATURES = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    b"<\0": "utf-16-le",
    b"\0<": "utf-16-be",
}
EDGES = ("xmin", "ymin", "xmax", "ymax")
TRUNCATED = re.compile(rb"<truncated>\s*1\s*</truncated>")


class LabeledObject(NamedTuple):
    class_name: str
    box: Sequence[float]  # xyxy in pixels of the image
    difficult: bool


class Annotation(NamedTuple):
    size: tuple[int, int] | None  # height, width as stated; (0, 0) if invalid, None if missing
    objects: dict[int, LabeledObject]  # the usable objects by their position in the file, counted from 1


def read_voc_xml(path: Path, diagnostics: Diagnostics | None = None) -> Annotation:
    """Read an annotation file; raises FileError for invalid content that `diagnostics` does not accept."""
    diagnostics = diagnostics or Diagnostics(skips=False)
    if not os.path.lexists(path):
        raise FileError(path, "does not exist; an image without objects needs an annotation without <object> elements")
    root = parse_xml(path, decode_text(path, read_file(path, MAX_BYTES)))
    objects, seen = {}, set()
    for number, element in enumerate(root.findall("object"), start=1):
        with diagnostics.capture():
            item = parse_object(element, path, number, diagnostics)
            key = item.class_name, *item.box
            if key in seen:
                diagnostics.record_repair(path, "repeats an earlier object and is ignored", f"object {number}")
            else:
                seen.add(key)
                objects[number] = item
    return Annotation(parse_size(root), objects)


def count_truncated(path: Path) -> int:
    """The number of objects in an annotation file that are marked as truncated."""
    return len(TRUNCATED.findall(read_file(path, MAX_BYTES)))


def decode_text(path: Path, content: bytes) -> str:
    """Decode an XML file by its byte-order mark or declared encoding; the XML parser supports only a few."""
    declared = ENCODING.match(content[:200])
    detected = next((encoding for start, encoding in SIGNATURES.items() if content.startswith(start)), None)
    encoding = detected or (declared[1].decode("ascii") if declared else "utf-8")
    try:
        name = codecs.lookup(encoding).name
        if not TEXT_CODECS.match(name):
            raise LookupError
        if not detected and name.startswith(("utf-16", "utf-32")):  # the declaration itself was readable as ASCII
            raise ValueError
        return content.decode(encoding)
    except LookupError:
        raise FileError(path, f"declares the unknown encoding {encoding}; save it as UTF-8") from None
    except ValueError:
        raise FileError(path, f"is not valid {encoding} text; save it as UTF-8") from None


def parse_xml(path: Path, text: str) -> Element:
    try:
        root = fromstring(text, forbid_dtd=True)
    except ParseError as error:
        raise FileError(
            path, f"is not well-formed XML ({error}); fix it, or remove the image from its split file"
        ) from None
    except DefusedXmlException:
        raise FileError(path, "has a DOCTYPE or entities, which are not allowed in annotations; remove them") from None
    except (ValueError, LookupError) as error:
        raise FileError(path, f"cannot be read as XML ({error}); save it as UTF-8") from None
    if root.tag != "annotation":
        raise FileError(path, f"starts with <{printable(root.tag)}>, but a VOC annotation starts with <annotation>")
    level = [root]
    for _ in range(MAX_DEPTH):
        level = [child for element in level for child in element]
    if level:
        raise FileError(path, f"nests elements more than {MAX_DEPTH} deep; it is not a VOC annotation")
    return root


def parse_size(root: Element) -> tuple[int, int] | None:
    """The stated height and width; (0, 0) if they are invalid, None if there is no <size>."""
    if root.find("size") is None:
        return None
    sides = []
    for name in ("height", "width"):
        try:
            sides.append(parse_number(strip(root.findtext(f"size/{name}") or "")))
        except ValueError:
            sides.append(0)
    valid = all(0 < side < 2**31 and side == int(side) for side in sides)
    return (int(sides[0]), int(sides[1])) if valid else (0, 0)


def parse_object(element: Element, path: Path, number: int, diagnostics: Diagnostics) -> LabeledObject:
    """Parse an <object> element; raises SkippableError if its box is inverted, FileError if it is otherwise invalid."""
    written = element.findtext("name") or ""
    name, place = strip(written), f"object {number}"
    if not name:
        raise FileError(path, "has no <name>", place)
    place = f"{place} ({printable(name)})"
    if written != name:
        diagnostics.record_repair(path, "has spaces around its <name>, which are ignored", place)
    if element.find("bndbox") is None:
        raise FileError(path, "has no <bndbox>", place)
    xmin, ymin, xmax, ymax = (parse_edge(element, edge, path, place) for edge in EDGES)
    difficult = strip(element.findtext("difficult") or "") or "0"
    if difficult not in ("0", "1"):
        raise FileError(path, f"<difficult> is {printable(difficult)!r}, but must be 0 or 1", place)
    if xmin > xmax or ymin > ymax:
        raise SkippableError(path, "the box ends before it begins", place)
    return LabeledObject(name, [xmin - 1, ymin - 1, xmax, ymax], difficult == "1")


def parse_edge(element: Element, edge: str, path: Path, place: str) -> float:
    text = element.findtext(f"bndbox/{edge}")
    if text is None:
        raise FileError(path, f"has no <{edge}>", place)
    try:
        return parse_number(strip(text))
    except ValueError:
        raise FileError(path, f"<{edge}> is {printable(strip(text))!r}, but must be a number", place) from None
