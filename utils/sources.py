"""What to predict on: images, videos, cameras and streams, each an iterator of frames."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from glob import glob
from itertools import count
from math import isfinite
from os import cpu_count
from pathlib import Path
from threading import Event
from typing import Protocol
from urllib.parse import urlsplit

import av
import cv2
import numpy as np

from utils.ahead import map_ahead
from utils.decode import decode_image
from utils.errors import UserError
from utils.images import read_image
from utils.text import read_lines
from utils.voc import IMAGE_SUFFIXES

VIDEO_SUFFIXES = frozenset(
    (".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv")
)
STDIN = "-"
MOST_READERS = 8  # threads that read images; each has up to two waiting
LONGEST_STEM = 100  # letters of a name for results
DEFAULT_RATE = Fraction(30)  # frames a second, of a camera or stream that does not say
LIVE_TIMEOUT = 10.0  # seconds that opening a stream, or waiting for its next packet, may take
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds before the first and between later attempts to open it again


@dataclass(frozen=True)
class Video:
    """What the frames of a file, camera or stream have in common."""

    name: str  # path, address, or "camera 0"
    rate: Fraction  # frames a second

    @property
    def stem(self) -> str:
        """For the names of results."""
        stem = Path(self.name).stem[:LONGEST_STEM]
        return "".join(letter if letter.isalnum() or letter in "-_ ." else "_" for letter in stem)


@dataclass(frozen=True)
class Frame:
    """One image to predict on."""

    path: Path  # its file, or of a video a name for the frame
    image: np.ndarray  # (H, W, 3) uint8 RGB
    video: Video | None = None
    number: int = 0  # within the video
    time: float = 0.0  # seconds from the video's start


class Source(Protocol):
    """Some frames. What cannot be read is skipped and said in `problems`; UserError ends the source.

    `stop` ends the waiting for one that went away.
    """

    @property
    def total(self) -> int | None:
        """Frames, about; None: unknown."""

    def frames(self, problems: list[str], stop: Event) -> Iterator[Frame]: ...


@dataclass(frozen=True)
class Images:
    """Image files, read by several threads."""

    paths: Sequence[Path]

    @property
    def total(self) -> int:
        return len(self.paths)

    def frames(self, problems: list[str], stop: Event) -> Iterator[Frame]:
        for path, image in map_ahead(try_to_read, self.paths, min(MOST_READERS, cpu_count() or 1)):
            if isinstance(image, UserError):
                problems.append(str(image))
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

    def frames(self, problems: list[str], stop: Event) -> Iterator[Frame]:
        yield Frame(Path("stdin.png"), decode_image(self.content, "stdin"))


@dataclass(frozen=True)
class VideoFile:
    """A video file. Frames that cannot be decoded are left out, and the others keep their times."""

    path: str

    @property
    def total(self) -> int | None:
        with suppress(UserError), open_video(self.path) as container:
            stream = container.streams.video[0]
            if not stream.frames and container.duration and stream.average_rate:
                return round(container.duration / av.time_base * stream.average_rate)
            return stream.frames or None
        return None

    def frames(self, problems: list[str], stop: Event) -> Iterator[Frame]:
        with open_video(self.path) as container:
            yield from decode_video(self.path, container, problems)


class Stream:
    """A camera's or server's address. One that goes away is opened again; after `patience` seconds in vain it ends."""

    total = None

    def __init__(self, address: str, patience: float) -> None:
        self.address, self.patience = address, patience

    def frames(self, problems: list[str], stop: Event) -> Iterator[Frame]:
        yield from keep_open(public(self.address), partial(self.read, problems), self.patience, stop)

    def read(self, problems: list[str]) -> Iterator[Frame]:
        """Until it ends; returns normally only where an image, or a video of known length, came to its end."""
        with open_video(self.address, timeout=(LIVE_TIMEOUT, LIVE_TIMEOUT)) as container:
            length, last = container.duration, 0.0
            is_image = container.format.name.endswith("_pipe")
            timeless, started = container.format.name == "mpjpeg", time.monotonic()
            for frame in decode_video(public(self.address), container, problems):
                last = frame.time + 1 / float(frame.video.rate)
                yield replace(frame, time=time.monotonic() - started) if timeless else frame
            if not is_image and (not length or last < length / av.time_base - 1):
                raise UserError(f"{public(self.address)} ended")


class Camera:
    """A camera of this machine, by number; treated as a stream is."""

    total = None

    def __init__(self, number: int, patience: float) -> None:
        self.number, self.patience = number, patience

    def frames(self, problems: list[str], stop: Event) -> Iterator[Frame]:
        yield from keep_open(f"camera {self.number}", self.read, self.patience, stop)

    def read(self) -> Iterator[Frame]:
        capture = cv2.VideoCapture(self.number)
        try:
            if not capture.isOpened():
                raise UserError(f"there is no camera {self.number}, or another program has it")
            rate = capture.get(cv2.CAP_PROP_FPS)
            known = isfinite(rate) and rate > 0
            video = Video(f"camera {self.number}", Fraction(rate).limit_denominator(1000) if known else DEFAULT_RATE)
            started = time.monotonic()
            for number in count():
                found, image = capture.read()
                if not found:
                    raise UserError(f"{video.name} gives no more frames")
                path = Path(f"{video.stem}_{number:06d}.jpg")
                yield Frame(path, cv2.cvtColor(image, cv2.COLOR_BGR2RGB), video, number, time.monotonic() - started)
        finally:
            capture.release()


def keep_open(name: str, read: Callable[[], Iterator[Frame]], patience: float, stop: Event) -> Iterator[Frame]:
    """The frames of a live source as one video, opened again with growing pauses where it breaks off.

    What it missed meanwhile is missing in the times too. Raises UserError after `patience` seconds without a frame, at
    once where it never gave one, and where its pictures change their size.
    """
    last: Frame | None = None
    wait, seen, number = FIRST_WAIT, 0.0, 0
    while not stop.is_set():
        missed: float | None = None if last else 0.0  # seconds of the video before this visit
        try:
            for frame in read():
                if missed is None:
                    missed = last.time + time.monotonic() - seen
                if last and frame.image.shape != last.image.shape:
                    raise SizeChanged(name, number, last.image, frame.image)
                video = last.video if last else frame.video
                path = Path(f"{video.stem}_{number:06d}.jpg")
                last = Frame(path, frame.image, video, number, missed + frame.time)
                wait, seen, number = FIRST_WAIT, time.monotonic(), number + 1
                yield last
            return
        except SizeChanged:
            raise
        except UserError as error:
            if last is None:
                raise
            if time.monotonic() - seen + wait > patience:
                raise UserError(
                    f"{name} went away after {number} frames and did not come back in {patience:g} s ({error}); what "
                    "came before is in the results"
                ) from None
            stop.wait(wait)
            wait = min(2 * wait, LONGEST_WAIT)


class SizeChanged(UserError):
    """A video's pictures become larger or smaller."""

    def __init__(self, name: str, number: int, before: np.ndarray, after: np.ndarray) -> None:
        sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (before, after)]
        super().__init__(
            f"{name} changes its size at frame {number}, from {sizes[0]} to {sizes[1]}; the results end there"
        )


def public(address: str) -> str:
    """An address without password and query, for messages and names of files; a path as it is."""
    if "://" not in address:
        return address
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def open_video(path: str, timeout: tuple[float, float] | None = None) -> av.container.InputContainer:
    """A file or address with a video stream; raises UserError."""
    try:
        options = {"rtsp_transport": "tcp"} if path.startswith("rtsp") else {}  # UDP is lost behind many routers
        container = av.open(path, timeout=timeout, options=options)
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"cannot read the video {public(path)}: {error.strerror or error}") from None
    if not container.streams.video:
        container.close()
        raise UserError(f"{public(path)} has no video in it")
    return container


def decode_video(name: str, container: av.container.InputContainer, problems: list[str]) -> Iterator[Frame]:
    """The frames of a container, turned upright; raises UserError where their size changes."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    video = Video(name, stream.average_rate or stream.guessed_rate or DEFAULT_RATE)
    number, broken, first, previous = 0, 0, None, None
    try:
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.InvalidDataError:
                broken += 1
                continue
            for picture in decoded:
                image = picture.to_ndarray(format="rgb24")
                image = np.ascontiguousarray(np.rot90(image, picture.rotation // 90)) if picture.rotation else image
                if previous is not None and image.shape != previous.shape:
                    raise SizeChanged(name, number, previous, image)
                previous = image
                when = number / float(video.rate) if picture.time is None else picture.time
                first = when if first is None else first
                yield Frame(Path(f"{video.stem}_{number:06d}.jpg"), image, video, number, when - first)
                number += 1
    except (av.FFmpegError, OSError) as error:  # of the file's end, or of a connection
        problems.append(f"{name} breaks off after {number} frames: {error.strerror or error}")
    if broken:
        problems.append(f"{broken} broken parts of {name} were left out")
    if not number:
        raise UserError(f"{name} has no frame that can be decoded")


def open_sources(name: str, patience: float) -> list[Source]:
    """What a path, glob, list, number or address stands for; raises UserError when there is nothing.

    Cameras and streams are given up `patience` seconds after they went away.
    """
    path = Path(name)
    if name == STDIN:
        return read_stdin(patience)
    if name.isdecimal() and not path.exists():
        return [Camera(int(name), patience)]
    if "://" in name:
        return [Stream(name, patience)]
    if path.suffix.lower() == ".txt" and path.is_file():
        return read_list(read_lines(path), str(path), patience)
    if path.is_file():
        return open_files([path])
    if path.is_dir():
        candidates = sorted(path.iterdir())
    else:
        candidates = sorted(Path(match) for match in glob(name, recursive=True))
        if not candidates:
            raise UserError(f"there is no image, video, folder or match {name}")
    known = [path for path in candidates if path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
    if not known:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
        raise UserError(f"{name} has no image and no video ({suffixes})")
    return open_files(known)


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
    return open_files(files) + [found for name in others for found in open_sources(name, patience)]


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
