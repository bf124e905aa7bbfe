"""Errors that a user can fix, reported in one sentence, and checks that raise them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path


class UserError(Exception):
    """One sentence for the user: what is wrong, in which file or setting, and what to do about it."""


class FileError(UserError):
    """An error in a file, such as "is empty", or at a place in it, such as "line 2"."""

    def __init__(self, file: str | Path, reason: str, place: str = "") -> None:
        self.file, self.reason, self.place = str(file), reason, place
        super().__init__(format_error(self.file, place, reason))


class SkippableError(FileError):
    """An error in an image or, if it has a place, in an object that training can do without."""


def format_error(file: str, place: str, reason: str) -> str:
    return f"{file}, {place}: {reason}" if place else f"{file} {reason}"


@contextmanager
def as_user_error() -> Iterator[None]:
    """Turn a ValueError raised in the block into a UserError with the same message."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def check_range(settings: object, low: float, high: float, *names: str) -> None:
    """Raise UserError unless the named fields are between `low` and `high` inclusive; NaN is not."""
    for name in names:
        value = getattr(settings, name)
        if not low <= value <= high:
            limits = f"at least {low:g}" if high == inf else f"between {low:g} and {high:g}"
            raise UserError(f"{name} is {value}, but must be {limits}")


def check_choice(settings: object, name: str, choices: Sequence[str]) -> None:
    if getattr(settings, name) not in choices:
        raise UserError(f"{name} is {getattr(settings, name)!r}, but must be one of {', '.join(choices)}")


def refuse_overwrite(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} already exists; remove it, or choose another --out")
