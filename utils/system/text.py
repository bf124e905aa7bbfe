"""Text as users write it: files of lines, and numbers."""

import re
from pathlib import Path

from utils.system.diagnostics import FileError
from utils.system.files import read_file

BOM = "\ufeff"  # which Windows puts before a file's first word, and str.strip() keeps
MAX_BYTES = 20_000_000  # of a text file; a million names of 20 letters
SHOWN = 60  # letters of a text in a message
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def read_text(path: Path) -> str:
    """The content of a text file in UTF-8; a byte-order mark stays in it."""
    content = read_file(path, MAX_BYTES)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise FileError(path, "is not UTF-8 text; save it as UTF-8") from None
    if "\0" in text:
        raise FileError(path, "is not text, for it has zero bytes; save it as UTF-8")
    return text


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without byte-order marks, blanks at their ends and blank lines at the end."""
    lines = [strip(line) for line in re.split("\r\n|\r|\n", read_text(path))]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def strip(text: str) -> str:
    """Without blanks and byte-order marks at its ends."""
    return text.strip().strip(BOM).strip()


def parse_number(text: str) -> float:
    """A finite number in the digits 0 to 9; raises ValueError for what else float() takes, such as 1_0 or NaN."""
    value = float(text) if NUMBER.fullmatch(text) else float("nan")
    if not abs(value) < float("inf"):
        raise ValueError(f"{show(text)!r} is no number")
    return value


def show(text: object, most: int = SHOWN) -> str:
    """What a message shows of a text: its beginning, and nothing that a terminal would obey."""
    text = str(text)
    text = text if len(text) <= most else f"{text[:most]}..."
    return text if text.isprintable() else repr(text)
