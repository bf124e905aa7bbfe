"""Text files, numbers, and safe display of text."""

import re
from pathlib import Path

from utils.system.errors import FileError
from utils.system.files import read_file

BOM = "\ufeff"  # the byte-order mark, which Windows editors write at the start of a file; str.strip() keeps it
MAX_BYTES = 20_000_000  # upper limit for text files, enough for a million names of 20 letters
MAX_PRINTED = 60  # characters of a text in a message
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file, including a byte-order mark; raises FileError."""
    content = read_file(path, MAX_BYTES)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise FileError(path, "is not UTF-8 text; save it as UTF-8") from None
    if "\0" in text:
        raise FileError(path, "contains zero bytes, so it is not text; save it as UTF-8")
    return text


def read_lines(path: Path) -> list[str]:
    """The stripped lines of a text file without blank lines at its end; raises FileError."""
    lines = [strip(line) for line in re.split("\r\n|\r|\n", read_text(path))]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def strip(text: str) -> str:
    """Remove white space and byte-order marks at both ends."""
    return text.strip().strip(BOM).strip()


def parse_number(text: str) -> float:
    """A finite number in ASCII digits; raises ValueError for anything else that float() accepts, such as 1_0 or nan."""
    value = float(text) if NUMBER.fullmatch(text) else float("nan")
    if not abs(value) < float("inf"):
        raise ValueError(f"{printable(text)!r} is not a number")
    return value


def printable(text: object, max_length: int = MAX_PRINTED) -> str:
    """The beginning of a text, with control characters escaped, for use in messages."""
    text = str(text)
    text = text if len(text) <= max_length else f"{text[:max_length]}..."
    return text if text.isprintable() else repr(text)
