"""Command-line parsing, error messages and exit codes of scripts."""

import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from utils.system.errors import UserError
from utils.system.signals import Stopped

CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
CLOSED_PIPE = 141  # 128 + SIGPIPE; Windows has no signal.SIGPIPE
Config = TypeVar("Config")
T = TypeVar("T")


def run_script(
    main: Callable[[Config], object], config_type: type[Config], renamed: Mapping[str, str] | None = None
) -> None:
    """Parse the command line into `config_type` and call `main` with it; `renamed` maps old flags to new ones.

    A `UserError` is printed as one line on stderr and ends the script with exit code 2. Ctrl-C exits with 130, SIGTERM
    with 143, and a closed output pipe with 141. Any other exception is a bug and keeps its traceback.
    """
    try:
        call_main(main, tyro.cli(config_type, args=replace_old_flags(sys.argv[1:], renamed or {})))
        sys.stdout.flush()  # raises BrokenPipeError here rather than at interpreter exit
    except UserError as error:
        line = CONTROL_CHARACTERS.sub(lambda match: repr(match[0])[1:-1], str(error))
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
        print(f"stopped by {signum.name}", file=sys.stderr)
        raise SystemExit(128 + signum) from None
    except BrokenPipeError:  # for example `| head`
        print("stopped: the output pipe was closed", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes stdout at exit
        raise SystemExit(CLOSED_PIPE) from None


def call_main(main: Callable[[Config], object], config: Config) -> None:
    """Call `main`; an out-of-memory error that nothing has explained yet becomes a UserError."""
    try:
        main(config)
    except RuntimeError as error:
        from utils.system.device import describe_out_of_memory, is_out_of_memory  # slow to import

        if not is_out_of_memory(error):
            raise
        raise UserError(describe_out_of_memory(error)) from error


def replace_old_flags(arguments: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """Replace old flags with their new names, with a notice on stderr for each."""
    replaced = []
    for argument in arguments:
        match = re.match(r"--(no-)?([\w-]+)", argument)
        new = renamed.get(match[2].replace("_", "-")) if match else None
        if new is None:
            replaced.append(argument)
        else:
            print(f"note: --{match[2]} is now called --{new}", file=sys.stderr)
            replaced.append(f"--{match[1] or ''}{new}{argument[match.end() :]}")
    return replaced


def given_settings(config_type: type, arguments: Sequence[str] | None = None) -> frozenset[str]:
    """The names of the settings given on the command line, even if they equal the defaults."""
    names = {field.name for field in fields(config_type)}
    given = set()
    for argument in sys.argv[1:] if arguments is None else arguments:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].replace("-", "_")
            given.add(name if name in names else name.removeprefix("no_"))
    return frozenset(given & names)


def flag_parser(parse: Callable[[list[str]], T], metavar: str, nargs: Any = 1) -> PrimitiveConstructorSpec[T]:
    """For `Annotated` fields whose command-line words `parse` converts, raising ValueError if they are invalid."""

    def to_words(value: object) -> list[str]:
        return [str(item) for item in value] if isinstance(value, tuple) else [str(value)]

    return PrimitiveConstructorSpec(nargs, metavar, parse, lambda _: True, to_words)


def parse_input_size(words: list[str]) -> tuple[int, int]:
    """One number for a square, or height and width."""
    if len(words) not in (1, 2):
        raise ValueError("give one number for a square, or height and width")
    return int(words[0]), int(words[-1])


INPUT_SIZE = flag_parser(parse_input_size, "HEIGHT [WIDTH]", "*")
