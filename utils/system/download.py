"""Verified downloads that resume after a broken connection, which torchvision's do not, and safe extraction."""

import hashlib
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from utils.system.errors import UserError
from utils.system.files import make_folder

PARTIAL = "partial-"  # prefix of incomplete files
CHUNK = 1 << 18  # bytes read at a time
TIMEOUT = 30.0  # seconds to wait for the server
MAX_RETRIES, RETRY_DELAY = 4, 1.0  # consecutive retries without new data; seconds between them


@dataclass(frozen=True)
class RemoteFile:
    url: str
    checksum: str = ""  # algorithm and hexadecimal digest, such as md5:0123...

    @property
    def name(self) -> str:
        return PurePosixPath(urlsplit(self.url).path).name

    def at_mirror(self, mirror: str) -> "RemoteFile":
        """The same file in the folder with the URL `mirror`, or this one if that is empty."""
        return RemoteFile(f"{mirror.rstrip('/')}/{self.name}", self.checksum) if mirror else self

    def check(self, path: Path, verify: Callable[[Path], object] | None) -> None:
        """Raise UserError unless the file at `path` has the checksum, if that is known, and `verify` accepts it."""
        algorithm, _, expected = self.checksum.partition(":")
        if expected:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, algorithm).hexdigest()
            if digest != expected:
                raise UserError(f"{path} has the {algorithm} checksum {digest} instead of {expected}")
        if verify is not None:
            verify(path)


def download(remote: RemoteFile, folder: Path, verify: Callable[[Path], object] | None = None) -> Path:
    """Download a file into `folder`, or check the one that is there; `verify` raises UserError for invalid content."""
    path, partial = folder / remote.name, folder / (PARTIAL + remote.name)
    if path.exists():
        try:
            remote.check(path, verify)
        except UserError as error:
            raise UserError(f"{error}; delete it and try again") from None
        return path
    make_folder(folder)
    if not remote.checksum:  # the parts of two versions could be mixed
        partial.unlink(missing_ok=True)
    receive_all(remote, partial)
    try:
        remote.check(partial, verify)
    except UserError as error:
        partial.unlink()
        raise UserError(f"{remote.url} returned an unexpected file, which was deleted: {error}") from None
    os.replace(partial, path)
    return path


def receive_all(remote: RemoteFile, partial: Path) -> None:
    """Complete `partial`, retrying as long as data arrives; raises UserError if it does not."""
    retries, size = 0, size_of(partial)
    while True:
        try:
            return receive(remote, partial)
        except (OSError, HTTPException) as error:  # raised by the network or the disk
            status = error.code if isinstance(error, HTTPError) else 0
            if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return None  # there are no more bytes
            retries, size = 0 if size_of(partial) > size else retries + 1, size_of(partial)
            if retries == MAX_RETRIES or 400 <= status < 500:
                reason = error.reason if type(error) is URLError else error
                message = f"cannot download {remote.url}: {reason} (after {size:,} bytes)"
                hint = f"run the same command again to resume, or copy the file to {partial.parent} yourself"
                raise UserError(f"{message}; {hint}") from None
            time.sleep(RETRY_DELAY)


def receive(remote: RemoteFile, partial: Path) -> None:
    """Append the missing bytes to `partial`; raises OSError or HTTPException if some are still missing afterwards."""
    done = size_of(partial)
    headers = {"User-Agent": "python", "Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with urlopen(Request(remote.url, headers=headers), timeout=TIMEOUT) as response:
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            done = 0  # the server starts from the beginning
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
            partial.unlink()
            raise HTTPException("the server returned a range that was not requested")
        if response.length is None:
            raise UserError(f"{remote.url} has no Content-Length, so a truncated file could not be detected")
        total = done + response.length
        bar = tqdm.wrapattr(response, "read", total, initial=done, desc=remote.name, disable=None)
        with bar as content, open(partial, "ab" if done else "wb") as file:
            shutil.copyfileobj(content, file, CHUNK)
    if size_of(partial) < total:
        raise HTTPException(f"the connection was closed {total - size_of(partial):,} bytes before the end")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def extract_tar(archive: Path, folder: Path, inner: str, last: str) -> None:
    """Extract the files under `inner` in an uncompressed tar archive into `folder`, those under `last` at the end.

    Raises UserError, before anything is written, for links, devices, sparse files and paths that lead outside.
    """
    make_folder(folder)
    try:
        with tarfile.open(archive, "r:") as tar, TemporaryDirectory(dir=folder, prefix=".extracting-") as temporary:
            for member in tqdm(tar.getmembers(), f"extracting {archive.name}", disable=None):
                if not (member.isdir() or member.isreg()) or member.issparse():
                    raise UserError(f"{archive} contains {member.name!r}, which is not a regular file")
                tar.extract(member, temporary, filter="data")
            source = Path(temporary) / inner
            if not source.is_dir():
                raise UserError(f"{archive} does not contain the folder {inner}")
            for path in sorted(source.rglob("*"), key=lambda path: path.is_relative_to(source / last)):
                if path.is_file():
                    target = folder / path.relative_to(source)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(target)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive} cannot be extracted ({error}); delete it and download it again") from None
    except OSError as error:
        raise UserError(f"cannot extract {archive} into {folder}: {error.strerror or error}") from None
