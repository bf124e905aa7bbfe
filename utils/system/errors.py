"""The one error type for a user's mistake, and how a script shows it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path


class UserError(Exception):
    """A mistake that one sentence explains: what is wrong, in which file or setting, and what to do."""


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turn a ValueError raised in the block into a UserError with the same message."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def check_range(settings: object, low: float, high: float, *names: str) -> None:
    """Raise UserError unless the named fields lie between `low` and `high`, both included; NaN does not."""
    for name in names:
        value = getattr(settings, name)
        if not low <= value <= high:
            limits = f"at least {low:g}" if high == inf else f"between {low:g} and {high:g}"
            raise UserError(f"{name} is {value}, but must be {limits}")


def make_folder(path: Path) -> None:
    """Make a folder for results; raises UserError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another folder") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to {path}: no permission; choose another folder")


def refuse_overwrite(path: Path) -> None:
    """Raise UserError where a file is that writing would lose."""
    if path.exists():
        raise UserError(f"{path} exists; remove it, or choose another --out")


def check_choice(settings: object, name: str, choices: Sequence[str]) -> None:
    """Raise UserError unless the named field is one of `choices`."""
    if getattr(settings, name) not in choices:
        raise UserError(f"{name} is {getattr(settings, name)!r}, but must be one of {', '.join(choices)}")
