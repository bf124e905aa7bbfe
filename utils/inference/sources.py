"""What to predict on: images, videos, cameras and streams, each an iterator of frames."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from os import cpu_count
from pathlib import Path
from threading import Event
from typing import Protocol

import numpy as np

from utils.data.image_io import decode_image, read_image
from utils.data.voc import IMAGE_SUFFIXES
from utils.inference.streams import Camera, Stream
from utils.inference.video import Frame, VideoFile
from utils.system.errors import UserError
from utils.system.prefetch import prefetch_map
from utils.system.text import read_lines

VIDEO_SUFFIXES = frozenset(
    (".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv")
)
STDIN = "-"
CAMERA_DIGITS = 4  # of a number that can be a camera's
MAX_READERS = 8  # threads that read images; each has up to two waiting


class Source(Protocol):
    """Some frames. What cannot be read is skipped and said in `problems`; UserError ends the source.

    `stop` ends the waiting for one that went away.
    """

    @property
    def total(self) -> int | None:
        """Frames, about; None: unknown."""

    def frames(self, diagnostics: list[str], stop: Event) -> Iterator[Frame]: ...


@dataclass(frozen=True)
class Images:
    """Image files, read by several threads."""

    paths: Sequence[Path]

    @property
    def total(self) -> int:
        return len(self.paths)

    def frames(self, diagnostics: list[str], stop: Event) -> Iterator[Frame]:
        for path, image in prefetch_map(try_to_read, self.paths, min(MAX_READERS, cpu_count() or 1)):
            if isinstance(image, UserError):
                diagnostics.append(str(image))
            else:
                yield Frame(path, image)


def try_to_read(path: Path) -> tuple[Path, np.ndarray | UserError]:
    try:
        return path, read_image(path)
    except UserError as error:
        return path, error


@dataclass(frozen=True)
class Encoded:
    """One image in memory."""

    content: bytes
    total = 1

    def frames(self, diagnostics: list[str], stop: Event) -> Iterator[Frame]:
        yield Frame(Path("stdin.png"), decode_image(self.content, "stdin"))


def open_sources(name: str, patience: float) -> list[Source]:
    """What a path, glob, list, number or address stands for; raises UserError when there is nothing.

    Cameras and streams are given up `patience` seconds after they went away.
    """
    name = name.removeprefix("file://")
    path = Path(name)
    if name == STDIN:
        return read_stdin(patience)
    if "://" in name:
        return [Stream(name, patience)]
    try:
        if name.isdecimal() and len(name) <= CAMERA_DIGITS and not path.exists():
            return [Camera(int(name), patience)]
        if path.suffix.lower() == ".txt" and path.is_file():
            return read_list(read_lines(path), str(path), patience)
        return open_files([path] if path.is_file() else find_files(name))
    except OSError as error:  # such as a folder that others may not look into
        raise UserError(f"cannot read {name}: {error.strerror}") from None


def find_files(name: str) -> list[Path]:
    """The images and videos of a folder, or those that a glob matches."""
    path = Path(name)
    if name and path.is_dir():
        candidates = sorted(path.iterdir())
    elif name and path.exists():
        raise UserError(f"{name} is a pipe or a device, which may have no end; give a file, or - to read from stdin")
    else:
        candidates = sorted(Path(match) for match in glob(name, recursive=True))
        if not candidates:
            raise UserError(f"there is no image, video, folder or match {name!r}; correct the path")
    known = [path for path in candidates if path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
    known = [path for path in known if path.is_file() or not path.exists()]  # which is said when it is read
    if not known:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
        raise UserError(f"{name} has no image and no video ({suffixes})")
    return known


def open_files(paths: Sequence[Path]) -> list[Source]:
    """The images together, which come first, then each video."""
    videos = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
    images = [path for path in paths if path.suffix.lower() not in VIDEO_SUFFIXES]
    return [*([Images(images)] if images else []), *(VideoFile(str(path)) for path in videos)]


def read_list(lines: Sequence[str], source: str, patience: float) -> list[Source]:
    """A path, address or glob on each line, seen from the current folder."""
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UserError(f"{source} names nothing; it should have a path on each line")
    files = [Path(name) for name in names if Path(name).is_file() and Path(name).suffix.lower() != ".txt"]
    others = [name for name in names if not Path(name).is_file()]
    if len(files) + len(others) < len(names) or STDIN in others:
        raise UserError(f"{source} names another list; give both to predict.py instead")
    try:
        return open_files(files) + [found for name in others for found in open_sources(name, patience)]
    except UserError as error:
        raise UserError(f"{source}: {error}; paths in a list are seen from {Path.cwd()}") from None


def read_stdin(patience: float) -> list[Source]:
    """An image's bytes, or a list as in a text file."""
    content = sys.stdin.buffer.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return [Encoded(content)]
    return read_list(text.splitlines(), "stdin", patience)


def inputs(sources: Sequence[Source]) -> list[Path]:
    """The files among the sources."""
    images = [path for source in sources if isinstance(source, Images) for path in source.paths]
    return images + [Path(source.path) for source in sources if isinstance(source, VideoFile)]
