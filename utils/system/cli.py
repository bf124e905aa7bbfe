"""The command line of a script: its settings, its exit code, and what it prints when it fails."""

import os
import re
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from utils.system.errors import UserError
from utils.system.signals import Stopped

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # characters that a terminal obeys
CLOSED_PIPE = 141  # 128 and the number of SIGPIPE, which Windows does not have
Config = TypeVar("Config")


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
