"""Parsing and safe display of text."""

import re
from collections.abc import Sequence

BOM = "\ufeff"  # the byte-order mark, which Windows editors write at the start of a file; str.strip() keeps it
MAX_PRINTED = 60  # maximum length of a text in a message
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def strip(text: str) -> str:
    """Remove whitespace and byte-order marks from both ends."""
    return text.strip().strip(BOM).strip()


def parse_number(text: str) -> float:
    """A finite number in ASCII digits; unlike float(), raises ValueError for text such as 1_0 or nan."""
    value = float(text) if NUMBER.fullmatch(text) else float("nan")
    if not abs(value) < float("inf"):
        raise ValueError(f"{printable(text)!r} is not a number")
    return value


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align the columns of a table, the first one to the left and the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([f"{row[0]:{first}}", *map(str.rjust, row[1:], others)]).rstrip() for row in rows)


def printable(text: object, max_length: int = MAX_PRINTED) -> str:
    """The beginning of a text, with control characters escaped, for use in messages."""
    text = str(text)
    text = text if len(text) <= max_length else f"{text[:max_length]}..."
    return text if text.isprintable() else repr(text)
