"""The one error type for a user's mistake, and how a script shows it."""

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path
from typing import TypeVar

import tyro

from utils.interrupt import Stopped

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # characters that a terminal obeys
CLOSED_PIPE = 141  # 128 and the number of SIGPIPE, which Windows does not have
Config = TypeVar("Config")


class UserError(Exception):
    """A mistake that one sentence explains: what is wrong, in which file or setting, and what to do."""


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


def check_new(path: Path) -> None:
    """Raise UserError where a file is that writing would lose."""
    if path.exists():
        raise UserError(f"{path} exists; remove it, or choose another --out")


def check_choice(settings: object, name: str, choices: Sequence[str]) -> None:
    """Raise UserError unless the named field is one of `choices`."""
    if getattr(settings, name) not in choices:
        raise UserError(f"{name} is {getattr(settings, name)!r}, but must be one of {', '.join(choices)}")


def run_script(main: Callable[[Config], object], config_type: type[Config]) -> None:
    """Read the command line into `config_type` and call `main` with it.

    A `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130, SIGTERM 143, a pipe that its reader
    closed 141; a bug keeps its traceback.
    """
    try:
        main(tyro.cli(config_type))
        sys.stdout.flush()  # here a closed pipe still gets its line
    except UserError as error:
        line = CONTROL.sub(lambda found: repr(found[0])[1:-1], str(error))
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
        print(f"stopped by {signum.name}", file=sys.stderr)
        raise SystemExit(128 + signum) from None
    except BrokenPipeError:  # such as of `| head`
        print("stopped, since what reads the output has closed it", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still has to write
        raise SystemExit(CLOSED_PIPE) from None
