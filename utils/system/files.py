"""Files that are whole or not there, reading that never waits, and locks that die with their process."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from utils.system.diagnostics import FileError
from utils.system.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

CACHE_FOLDER = Path("logs/cache")  # decoded images, which can be made again
LOCKED_BYTE = 1 << 30  # on Windows, where nobody can read what is locked
TEMPORARY = ".tmp"  # suffix of a file that is being written


def read_file(path: str | Path, most: int) -> bytes:
    """The content of a regular file of up to `most` bytes; raises FileError for any other, as `check_regular_file` does."""
    check_regular_file(path, most)
    try:
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    if len(content) > most:  # files of /proc have no size of their own
        raise too_large(path, most)
    return content


def check_regular_file(path: str | Path, most: int) -> None:
    """Raise FileError for all but a regular file of up to `most` bytes, before it is opened.

    Reading a pipe or device could wait or go on forever.
    """
    try:
        state = os.stat(path)
    except FileNotFoundError:
        missing = "is a link to what does not exist" if os.path.islink(path) else "does not exist"
        raise FileError(path, missing) from None
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from None
    except ValueError:  # a zero byte in the path
        raise FileError(path, "is no name that a file can have") from None
    if stat.S_ISDIR(state.st_mode):
        raise FileError(path, "is a folder, but must be a file")
    if not stat.S_ISREG(state.st_mode):
        raise FileError(path, "is a pipe or device, but must be a regular file")
    if state.st_size > most:
        raise too_large(path, most)


def too_large(path: str | Path, most: int) -> FileError:
    return FileError(path, f"is too large: it must not have more than {most / 1e6:.0f} MB")


@contextmanager
def atomic_write(path: str | Path, previous: str | Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write into that becomes `path` when the block ends well, and else is removed.

    It is flushed to the disk and renamed, so that `path` is whole at any moment, whenever the process or the machine
    stops. With `previous`, what was at `path` is kept under that name. Raises UserError when it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; what was written before is whole") from None
    finally:
        with suppress(OSError):  # of the folder, which is said already
            temporary.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path, wait: bool = False) -> IO[bytes] | None:
    """Open and lock a file: the lock lasts until the file is closed or the process dies, however it dies.

    Where another process has it, waits for that one to finish, or returns None. Raises UserError when it cannot be
    made.
    """
    file = None
    try:
        file = open(path, "a+b")  # noqa: SIM115, the caller keeps it
        if fcntl is None:
            file.seek(LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if file is None or error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise UserError(f"cannot lock {path}: {error.strerror}; choose another folder") from None
        file.close()
        return lock(path, wait) if wait else None  # Windows waits for 10 s at a time
    return file


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # a name of a file may be no Unicode
