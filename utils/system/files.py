"""Output folders, atomic writes, reads that cannot block, and file locks that end with their process."""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from utils.system.errors import FileError, UserError
from utils.system.text import strip

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

CACHE_FOLDER = Path("logs/cache")  # decoded images and other data that can be recomputed
MAX_TEXT_BYTES = 20_000_000  # size limit of a text file, enough for a million names of 20 letters
LOCKED_BYTE = 1 << 30  # Windows makes locked bytes unreadable, so the locked byte is far beyond the content
TEMPORARY = ".tmp"  # suffix of files that are being written


def read_file(path: str | Path, max_bytes: int) -> bytes:
    """The content of a regular file; raises FileError for anything that `check_regular_file` rejects."""
    check_regular_file(path, max_bytes)
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    if len(content) > max_bytes:  # files in /proc report a size of 0
        raise too_large(path, max_bytes)
    return content


def read_text(path: str | Path) -> str:
    """The content of a UTF-8 text file, including a byte-order mark; raises FileError."""
    content = read_file(path, MAX_TEXT_BYTES)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise FileError(path, "is not UTF-8 text; save it as UTF-8") from None
    if "\0" in text:
        raise FileError(path, "contains null bytes, so it is not text; save it as UTF-8")
    return text


def read_lines(path: str | Path) -> list[str]:
    """The stripped lines of a text file without blank lines at its end; raises FileError."""
    lines = [strip(line) for line in re.split("\r\n|\r|\n", read_text(path))]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def check_regular_file(path: str | Path, max_bytes: int) -> None:
    """Raise FileError unless the path is a regular file of up to `max_bytes`; opens nothing, as a pipe could block."""
    try:
        state = os.stat(path)
    except FileNotFoundError:
        raise FileError(path, "is a broken link" if os.path.islink(path) else "does not exist") from None
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    except ValueError:  # a null character in the path
        raise FileError(path, "is not a valid file name") from None
    if stat.S_ISDIR(state.st_mode):
        raise FileError(path, "is a folder, but must be a file")
    if not stat.S_ISREG(state.st_mode):
        raise FileError(path, "is a pipe or device, but must be a regular file")
    if state.st_size > max_bytes:
        raise too_large(path, max_bytes)


def too_large(path: str | Path, max_bytes: int) -> FileError:
    return FileError(path, f"is too large: the limit is {max_bytes / 1e6:.0f} MB")


@contextmanager
def atomic_write(path: str | Path, previous: str | Path | None = None) -> Iterator[IO[bytes]]:
    """Yield a file that replaces `path` once it is complete and on disk; raises UserError if writing fails.

    The replaced file is kept as `previous` if that is given.
    """
    path = Path(path)
    temporary, outcome = path.with_name(path.name + TEMPORARY), "any earlier version is unchanged"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
            outcome = f"the earlier version is now {previous}"
        os.replace(temporary, path)
        outcome = "the file is replaced, but may not be on disk yet"
        fsync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {outcome}") from None
    finally:
        with suppress(OSError):  # the cause has been reported already
            temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create an output folder and its parents; raises UserError if that fails or the folder is not writable."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another folder") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write to {path}: permission denied; choose another folder")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; raises UserError."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # file names in the text may not be valid Unicode


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the operating system supports that."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path, wait: bool = False) -> IO[bytes] | None:
    """Lock a file until it is closed or the process ends; if another process holds the lock, wait or return None."""
    while True:
        file = None
        try:
            file = open(path, "a+b")  # noqa: SIM115, closed by the caller
            if fcntl is None:
                file.seek(LOCKED_BYTE)
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            else:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return file
        except OSError as error:
            if file is None or error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise UserError(f"cannot lock {path}: {error.strerror}; choose another folder") from None
            file.close()
            if not wait:  # otherwise try again, as Windows stops waiting after 10 s
                return None
