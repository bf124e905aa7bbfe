"""Files from the network: resumed where they broke off, checked, and whole or not there; and archives, unpacked safely.

What has arrived of a file stands beside its place, with PARTIAL before its name.
"""

import hashlib
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from utils.system.errors import UserError, make_folder

PARTIAL = "partial-"
CHUNK = 1 << 18  # bytes read at a time
PATIENCE = 30.0  # seconds to wait for an answer, or for more of it
TRIES = 4  # more in a row that bring nothing more
PAUSE = 1.0  # seconds between them


@dataclass(frozen=True)
class Remote:
    """A file in the network."""

    url: str
    size: int | None = None  # bytes
    checksum: str = ""  # algorithm and hexadecimal digits, such as md5:0123...

    @property
    def name(self) -> str:
        return PurePosixPath(urlsplit(self.url).path).name

    def at(self, mirror: str) -> "Remote":
        """The same in another folder of the network; empty: where it is."""
        return Remote(f"{mirror.rstrip('/')}/{self.name}", self.size, self.checksum) if mirror else self


class BrokenOff(Exception):
    """The connection ended before the file did; another try may bring the rest."""


def fetch(remote: Remote, folder: Path, verify: Callable[[Path], object] | None = None) -> Path:
    """Download into `folder`, or check what is there; returns the file's path.

    Goes on where an earlier download broke off if a checksum can tell whether the parts belong together. `verify` is
    called with what came, and raises UserError if it is not what it should be. Raises UserError when the network, the
    server or the disk fails for good, and when what came is not the file.
    """
    path, partial = folder / remote.name, folder / (PARTIAL + remote.name)
    if path.exists():
        try:
            check(path, remote, verify)
        except UserError as error:
            raise UserError(f"{error}. Remove it, and try again") from None
        return path
    make_folder(folder)
    if not remote.checksum:
        partial.unlink(missing_ok=True)
    receive_all(remote, partial)
    try:
        check(partial, remote, verify)
    except UserError as error:
        partial.unlink()
        raise UserError(f"what {remote.url} sent is not the file, and was removed: {error}") from None
    os.replace(partial, path)
    return path


def receive_all(remote: Remote, partial: Path) -> None:
    """Receive until everything has come, or TRIES in a row have brought nothing."""
    tries, before = 0, size_of(partial)
    while True:
        try:
            return receive(remote, partial)
        except BrokenOff as stop:
            done = size_of(partial)
            tries, before = 0 if done > before else tries + 1, done
            if tries == TRIES:
                raise UserError(
                    f"{remote.url} broke off after {done:,} bytes, and {TRIES} more times there ({stop}); the same "
                    "command goes on"
                ) from None
            time.sleep(PAUSE)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def receive(remote: Remote, partial: Path) -> None:
    """Append to `partial` what is missing; raises BrokenOff when some of it still is."""
    done = size_of(partial)
    answer = ask(remote, partial, done)
    if answer is None:
        return
    with answer:
        if answer.status != HTTPStatus.PARTIAL_CONTENT:
            done = 0  # the server begins anew
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            partial.unlink()
            raise BrokenOff("the server sends another part than the one asked for")
        length = announced(answer, remote, done)
        with tqdm(total=done + length, initial=done, desc=remote.name, unit="B", unit_scale=True, disable=None) as bar:
            try:
                with open(partial, "ab" if done else "wb") as file:
                    for content in pieces(answer, length):
                        file.write(content)
                        bar.update(len(content))
            except OSError as error:
                raise UserError(f"cannot write {partial}: {error.strerror}; the same command goes on there") from None


def ask(remote: Remote, partial: Path, done: int) -> HTTPResponse | None:
    """The server's answer to a request for all from `done` on; None when there is nothing behind that."""
    headers = {"User-Agent": "python", "Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    try:
        return urlopen(Request(remote.url, headers=headers), timeout=PATIENCE)
    except HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return None
        if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise BrokenOff(f"the server answers {error.code}") from None
        raise UserError(f"{remote.url} cannot be had: the server answers {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:  # URLError too
        reason = getattr(error, "reason", error)
        if done:  # it could be reached before
            raise BrokenOff(str(reason)) from None
        raise UserError(
            f"{urlsplit(remote.url).hostname} cannot be reached ({reason}); is there a network? Without one, bring "
            f"{remote.url} here by other means, as {partial.with_name(remote.name)}"
        ) from None


def announced(answer: HTTPResponse, remote: Remote, done: int) -> int:
    """How many bytes the server will send, which must be those that are missing."""
    text = answer.headers.get("Content-Length", "")
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{remote.url}: the server does not say how long the file is, so that a part would pass for it")
    if remote.size is not None and done + int(text) != remote.size:
        raise UserError(
            f"{remote.url} is not the file that it was: the server offers {done + int(text):,} bytes, but it has "
            f"{remote.size:,}"
        )
    return int(text)


def pieces(answer: HTTPResponse, length: int) -> Iterator[bytes]:
    """The `length` bytes of an answer; raises BrokenOff when there are fewer."""
    while length:
        try:
            content = answer.read(min(CHUNK, length))
        except (OSError, HTTPException) as error:
            raise BrokenOff(str(error) or type(error).__name__) from None
        if not content:
            raise BrokenOff(f"{length:,} bytes before its end")
        length -= len(content)
        yield content


def check(path: Path, remote: Remote, verify: Callable[[Path], object] | None) -> None:
    """Raise UserError unless a file has the size and the checksum that it should, as far as they are known."""
    size = path.stat().st_size
    if remote.size is not None and size != remote.size:
        raise UserError(f"{path} has {size:,} bytes instead of {remote.size:,}")
    algorithm, _, expected = remote.checksum.partition(":")
    if expected:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, algorithm).hexdigest()
        if found != expected:
            raise UserError(f"the {algorithm} of {path} is {found} instead of {expected}")
    if verify is not None:
        verify(path)


def unpack(archive: Path, folder: Path, inner: str, last: str) -> None:
    """Put what stands under `inner` in a plain tar archive into `folder`, the files under `last` at the end.

    So when those are there, everything is. Raises UserError, before anything is written, for an archive with absolute
    paths, with `..`, or with links, devices and other things that are no files.
    """
    make_folder(folder)
    try:
        with tarfile.open(archive, "r:") as tar, TemporaryDirectory(dir=folder, prefix=".unpacking-") as temporary:
            members = tar.getmembers()
            check_members(archive, members)
            for member in tqdm(members, f"unpacking {archive.name}", disable=None):
                tar.extract(member, temporary, filter="data")
            if not (Path(temporary) / inner).is_dir():
                raise UserError(f"{archive} has no folder {inner}; it is another archive")
            move(Path(temporary) / inner, folder, last)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}); remove it, and fetch it again") from None
    except OSError as error:
        raise UserError(f"cannot unpack {archive} into {folder}: {error.strerror or error}") from None


def check_members(archive: Path, members: Sequence[tarfile.TarInfo]) -> None:
    for member in members:
        path = PurePosixPath(member.name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in member.name:
            raise UserError(f"{archive} would write outside its folder, to {member.name!r}; nothing was unpacked")
        if not (member.isdir() or member.isreg()) or member.issparse():
            raise UserError(f"{archive} has {member.name!r}, which is no plain file; nothing was unpacked")


def move(source: Path, target: Path, last: str) -> None:
    """Move all files below `source` to the same places below `target`."""
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.is_relative_to(last), path)):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source / path, target / path)
