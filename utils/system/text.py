"""Parsing and safe display of text."""

import re

BOM = "\ufeff"  # the byte-order mark, which Windows editors write at the start of a file; str.strip() keeps it
MAX_PRINTED = 60  # characters of a text in a message
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def strip(text: str) -> str:
    """Remove white space and byte-order marks at both ends."""
    return text.strip().strip(BOM).strip()


def parse_number(text: str) -> float:
    """A finite number in ASCII digits; unlike float(), raises ValueError for text such as 1_0 or nan."""
    value = float(text) if NUMBER.fullmatch(text) else float("nan")
    if not abs(value) < float("inf"):
        raise ValueError(f"{printable(text)!r} is not a number")
    return value


def printable(text: object, max_length: int = MAX_PRINTED) -> str:
    """The beginning of a text, with control characters escaped, for use in messages."""
    text = str(text)
    text = text if len(text) <= max_length else f"{text[:max_length]}..."
    return text if text.isprintable() else repr(text)
