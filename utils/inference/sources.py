"""Sources of frames: images, videos, cameras and streams, opened by path, glob, list, camera number or URL."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from os import cpu_count
from pathlib import Path
from threading import Event
from typing import Protocol

import numpy as np

from utils.data.image_io import IMAGE_SUFFIXES, decode_image, read_image
from utils.inference.streams import Camera, Stream
from utils.inference.video import Frame, VideoFile
from utils.system.errors import UserError
from utils.system.files import read_lines
from utils.system.prefetch import prefetch_map

VIDEO_SUFFIXES = frozenset(
    (".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv")
)
STDIN = "-"
MAX_CAMERA_DIGITS = 4
MAX_READERS = 8  # threads that read images; each holds up to two images


class Source(Protocol):
    """A source of frames."""

    @property
    def total(self) -> int | None:
        """The approximate number of frames, or None if unknown."""

    def frames(self, errors: list[str], stop: Event) -> Iterator[Frame]:
        """Yield frames, append the reasons for unreadable ones to `errors`, and stop reconnecting if `stop` is set."""


@dataclass(frozen=True)
class Images:
    """Image files, read in several threads."""

    paths: Sequence[Path]

    @property
    def total(self) -> int:
        return len(self.paths)

    def frames(self, errors: list[str], stop: Event) -> Iterator[Frame]:
        for path, image in prefetch_map(try_to_read, self.paths, min(MAX_READERS, cpu_count() or 1)):
            if isinstance(image, UserError):
                errors.append(str(image))
            else:
                yield Frame(path, image)


def try_to_read(path: Path) -> tuple[Path, np.ndarray | UserError]:
    try:
        return path, read_image(path)
    except UserError as error:
        return path, error


@dataclass(frozen=True)
class EncodedImage:
    content: bytes
    total = 1

    def frames(self, errors: list[str], stop: Event) -> Iterator[Frame]:
        yield Frame(Path("stdin.png"), decode_image(self.content, "stdin"))


def open_sources(name: str, reconnect_timeout: float) -> list[Source]:
    """Open a path, folder, glob, list, camera number or URL; raises UserError if nothing is found."""
    name = name.removeprefix("file://")
    path = Path(name)
    if name == STDIN:
        return read_stdin(reconnect_timeout)
    if "://" in name:
        return [Stream(name, reconnect_timeout)]
    try:
        if name.isdecimal() and len(name) <= MAX_CAMERA_DIGITS and not path.exists():
            return [Camera(int(name), reconnect_timeout)]
        if path.suffix.lower() == ".txt" and path.is_file():
            return open_list(read_lines(path), str(path), reconnect_timeout)
        return open_files([path] if path.is_file() else find_files(name))
    except OSError as error:  # such as a folder without read permission
        raise UserError(f"cannot read {name}: {error.strerror}") from None


def find_files(name: str) -> list[Path]:
    """The images and videos in a folder, or those that match a glob."""
    path = Path(name)
    if name and path.is_dir():
        candidates = sorted(path.iterdir())
    elif name and path.exists():
        raise UserError(f"{name} is a pipe or device, but must be a file; give - to read from stdin")
    else:
        candidates = sorted(map(Path, glob(name, recursive=True)))
        if not candidates:
            raise UserError(f"there is no image, video, folder or match for {name!r}; correct the path")
    suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    known = [path for path in candidates if path.suffix.lower() in suffixes]
    known = [path for path in known if path.is_file() or not path.exists()]  # broken links fail when they are read
    if not known:
        raise UserError(f"{name} contains no images or videos ({', '.join(sorted(suffixes))})")
    return known


def open_files(paths: Sequence[Path]) -> list[Source]:
    """One source for all images, followed by one for each video."""
    videos = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
    images = [path for path in paths if path.suffix.lower() not in VIDEO_SUFFIXES]
    return [*([Images(images)] if images else []), *(VideoFile(str(path)) for path in videos)]


def open_list(lines: Sequence[str], list_name: str, reconnect_timeout: float) -> list[Source]:
    """Open the path, URL or glob on each line; paths are relative to the current directory."""
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UserError(f"{list_name} is empty, but must have a path on each line")
    files = [Path(name) for name in names if Path(name).is_file() and Path(name).suffix.lower() != ".txt"]
    others = [name for name in names if not Path(name).is_file()]
    if len(files) + len(others) < len(names) or STDIN in others:
        raise UserError(f"{list_name} contains another list; give both lists to predict.py instead")
    try:
        return open_files(files) + [found for name in others for found in open_sources(name, reconnect_timeout)]
    except UserError as error:
        raise UserError(f"{list_name}: {error}; paths in a list are relative to {Path.cwd()}") from None


def read_stdin(reconnect_timeout: float) -> list[Source]:
    """Read an image file, or a list as in a .txt file, from stdin."""
    content = sys.stdin.buffer.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return [EncodedImage(content)]
    return open_list(text.splitlines(), "stdin", reconnect_timeout)


def input_files(sources: Sequence[Source]) -> list[Path]:
    images = [path for source in sources if isinstance(source, Images) for path in source.paths]
    return images + [Path(source.path) for source in sources if isinstance(source, VideoFile)]
