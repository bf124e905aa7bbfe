"""Annotation files in VOC's XML, and the index that spares their parsing.

Coordinates in the files are 1-based and inclusive; inside, a box is (xmin - 1, ymin - 1, xmax, ymax).
"""

import codecs
import json
import os
import re
import sys
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from utils.system.diagnostics import Diagnostics, FileError, SkippableError
from utils.system.errors import UserError
from utils.system.files import CACHE_FOLDER, atomic_write, lock, read_file
from utils.system.text import parse_number, show, strip

INDEX_VERSION = 2  # of the index of annotations; raise it when read_annotation returns something else
INDEX_FROM = 1000  # annotations in a folder that are worth an index
RACY_NS = 2_000_000_000  # a file this young may change again within one tick of its file system's clock
MAX_BYTES = 8_000_000  # of an annotation; 10,000 objects take about 3 million
MAX_DEPTH = 100  # of elements within each other; VOC has five
ENCODING = re.compile(rb"""<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["']""")
# Of the codecs that Python has, those of text; some others take forever, or are none
ENCODINGS = re.compile(r"ascii|big5|cp\d|euc|gb|hz|iso|johab|koi8|latin|mac|ptcp|shift|tis|utf")
# How a file may begin that no declaration is needed for
STARTS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    b"<\0": "utf-16-le",
    b"\0<": "utf-16-be",
}
EDGES = ("xmin", "ymin", "xmax", "ymax")

Object = tuple[str, list[float], bool]  # class name, xyxy box in pixels counted from 0, and difficult
# (height, width), 0 of a stated size that cannot be, or None; then the objects in their order, None of unusable ones
Annotation = tuple[tuple[int, int] | None, list[Object | None]]


class AnnotationIndex:
    """The annotations of a folder; of a large one, what was read of each file is kept in CACHE_FOLDER for the next run.

    What was kept counts as long as its file has the modification time and size that it had then. A file with problems
    is not kept, so that they are told each time.
    """

    def __init__(self, folder: Path) -> None:
        digest = sha256(os.fsencode(os.path.realpath(folder))).hexdigest()
        self.folder = folder
        self.path = CACHE_FOLDER / f"annotations-{digest[:16]}.json"
        self.settled_ns = time.time_ns() - RACY_NS
        self.states = file_states(folder)
        self.large = len(self.states) >= INDEX_FROM
        self.entries = load_entries(self.path) if self.large else {}
        self.changed = False

    def read(self, name: str, diagnostics: Diagnostics) -> Annotation:
        """The annotation in the file of this name; raises FileError like read_annotation."""
        state = self.states.get(name)
        match self.entries.get(name):
            case [int(mtime), int(size), annotation] if (mtime, size) == state and is_annotation(annotation):
                stated, objects = annotation
                return stated and tuple(stated), objects
        before = len(diagnostics.found)
        annotation = read_annotation(self.folder / name, diagnostics)
        if state and state[0] < self.settled_ns and len(diagnostics.found) == before:
            self.entries[name] = [*state, annotation]
            self.changed = True
        return annotation

    def save(self) -> None:
        """Write the index where it is worth one and has changed, unless another process is at it.

        Where it cannot be written, a line on stderr says so.
        """
        if not (self.large and self.changed):
            return
        kept = {name: entry for name, entry in self.entries.items() if name in self.states}
        try:
            CACHE_FOLDER.mkdir(parents=True, exist_ok=True)
            held = lock(self.path.with_suffix(".lock"))
            if held is None:
                return
            with held, atomic_write(self.path) as file:
                file.write(json.dumps({"version": INDEX_VERSION, "annotations": kept}).encode())
        except (OSError, UserError) as error:
            print(f"the index of {self.folder} could not be written, which costs only time: {error}", file=sys.stderr)


def file_states(folder: Path) -> dict[str, tuple[int, int]]:
    """Modification time in ns and size in bytes of a folder's XML files by name, as far as they can be listed."""
    states = {}
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".xml") and entry.is_file():
                state = entry.stat()
                states[entry.name] = state.st_mtime_ns, state.st_size
    return states


def load_entries(path: Path) -> dict:
    """What an index file holds by annotation file; nothing if it is missing, damaged or of another version."""
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    match index:
        case {"version": version, "annotations": dict(entries)} if version == INDEX_VERSION:
            return entries
    return {}


def is_annotation(value: object) -> bool:
    """Whether a value from JSON has the form of an Annotation."""
    match value:
        case [None | [int(), int()], list(objects)]:
            return all(map(is_object, objects))
    return False


def is_object(value: object) -> bool:
    match value:
        case [str(), [float(), float(), float(), float()], bool()]:
            return True
    return False


def read_annotation(path: Path, diagnostics: Diagnostics | None = None) -> Annotation:
    """Parse an annotation file; raises FileError naming what is wrong in it."""
    diagnostics = diagnostics or Diagnostics(skips=False)
    if not os.path.lexists(path):
        raise FileError(path, "does not exist; an image without objects needs an annotation too, without <object>")
    root = parse(path, decode(path, read_file(path, MAX_BYTES)))
    objects: list[Object | None] = []
    seen = set()
    for number, element in enumerate(root.findall("object"), start=1):
        found = None
        with diagnostics.capture():
            found = read_object(element, path, number, diagnostics)
            if (key := (found[0], *found[1])) in seen:
                found = None
                diagnostics.record_repair(path, "the same class and box again; it counts once", f"object {number}")
            seen.add(key)
        objects.append(found)
    return read_size(root), objects


def decode(path: Path, content: bytes) -> str:
    """An XML file's text, by its byte-order mark or the encoding that it declares; the parser knows too few itself."""
    declared = ENCODING.match(content[:200])
    seen = next((encoding for start, encoding in STARTS.items() if content.startswith(start)), None)
    encoding = seen or (declared[1].decode("ascii") if declared else "utf-8")
    try:
        name = codecs.lookup(encoding).name
        if not ENCODINGS.match(name):
            raise LookupError
        if not seen and name.startswith(("utf-16", "utf-32")):  # its declaration was read as ASCII
            raise ValueError
        return content.decode(encoding)
    except LookupError:
        raise FileError(path, f"declares the encoding {encoding}, which is not known; save it as UTF-8") from None
    except ValueError:
        raise FileError(path, f"is not in the encoding {encoding}, which it should be in; save it as UTF-8") from None


def parse(path: Path, text: str) -> Element:
    """The root of an annotation."""
    try:
        root = fromstring(text, forbid_dtd=True)
    except ParseError as error:
        raise FileError(
            path, f"is not well-formed XML ({error}); mend it, or take the image out of its split file"
        ) from None
    except DefusedXmlException:
        raise FileError(path, "has a DOCTYPE or entities, which annotations must not have; remove them") from None
    except (ValueError, LookupError) as error:
        raise FileError(path, f"cannot be read as XML ({error}); save it as UTF-8") from None
    if root.tag != "annotation":
        raise FileError(path, f"starts with <{show(root.tag)}>, but a VOC annotation starts with <annotation>")
    level = [root]
    for _ in range(MAX_DEPTH):
        level = [child for element in level for child in element]
    if level:
        raise FileError(path, f"has elements more than {MAX_DEPTH} deep in each other; it is no VOC annotation")
    return root


def read_size(root: Element) -> tuple[int, int] | None:
    """Height and width as stated, (0, 0) where that cannot be; None: not stated."""
    if root.find("size") is None:
        return None
    sides = []
    for name in ("height", "width"):
        try:
            sides.append(parse_number(strip(root.findtext(f"size/{name}") or "")))
        except ValueError:
            sides.append(0)
    possible = all(0 < side < 2**31 and side == int(side) for side in sides)
    return (int(sides[0]), int(sides[1])) if possible else (0, 0)


def read_object(element: Element, path: Path, number: int, diagnostics: Diagnostics) -> Object:
    """One <object>; raises SkippableError where its box ends before it begins, and FileError for what else is wrong."""
    written = element.findtext("name") or ""
    name, place = strip(written), f"object {number}"
    if not name:
        raise FileError(path, "has no <name>", place)
    place = f"{place} ({show(name)})"
    if written != name:
        diagnostics.record_repair(path, "blanks around the <name>; it counts without", place)
    if element.find("bndbox") is None:
        raise FileError(path, "has no <bndbox>", place)
    xmin, ymin, xmax, ymax = (read_edge(element, edge, path, place) for edge in EDGES)
    difficult = strip(element.findtext("difficult") or "") or "0"
    if difficult not in ("0", "1"):
        raise FileError(path, f"<difficult> is {show(difficult)!r}, but must be 0 or 1", place)
    if xmin > xmax or ymin > ymax:
        raise SkippableError(path, "the box ends before it begins", place)
    return name, [xmin - 1, ymin - 1, xmax, ymax], difficult == "1"


def read_edge(element: Element, edge: str, path: Path, place: str) -> float:
    text = element.findtext(f"bndbox/{edge}")
    if text is None:
        raise FileError(path, f"has no <{edge}>", place)
    try:
        return parse_number(strip(text))
    except ValueError:
        raise FileError(path, f"<{edge}> is {show(strip(text))!r}, but must be a number", place) from None
