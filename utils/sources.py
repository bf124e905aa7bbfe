"""What to predict on: images, videos, cameras and streams, each an iterator of frames."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from glob import glob
from itertools import count
from os import cpu_count
from pathlib import Path
from typing import Protocol

import av
import cv2
import numpy as np

from utils.ahead import map_ahead
from utils.errors import UserError
from utils.images import decode_image, read_image
from utils.voc import IMAGE_SUFFIXES

VIDEO_SUFFIXES = frozenset(
    (".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv")
)
STDIN = "-"
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
        return "".join(letter if letter.isalnum() or letter in "-_ ." else "_" for letter in Path(self.name).stem)


@dataclass(frozen=True)
class Frame:
    """One image to predict on."""

    path: Path  # its file, or of a video a name for the frame
    image: np.ndarray  # (H, W, 3) uint8 RGB
    video: Video | None = None
    number: int = 0  # within the video
    time: float = 0.0  # seconds from the video's start


class Source(Protocol):
    """Some frames. What cannot be read is skipped and said in `problems`; UserError ends the source."""

    total: int | None  # frames, about; None: unknown

    def frames(self, problems: list[str]) -> Iterator[Frame]: ...


@dataclass(frozen=True)
class Images:
    """Image files, read by several threads."""

    paths: Sequence[Path]

    @property
    def total(self) -> int:
        return len(self.paths)

    def frames(self, problems: list[str]) -> Iterator[Frame]:
        for path, image in map_ahead(try_to_read, self.paths, cpu_count() or 1):
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

    def frames(self, problems: list[str]) -> Iterator[Frame]:
        yield Frame(Path("stdin.png"), decode_image(np.frombuffer(self.content, np.uint8), "stdin"))


class VideoFile:
    """A video file. Frames that cannot be decoded are left out, and the others keep their times."""

    def __init__(self, path: str) -> None:
        self.path = path
        with open_video(path) as container:
            stream = container.streams.video[0]
            self.total = stream.frames or None
            if not self.total and container.duration and stream.average_rate:
                self.total = round(container.duration / av.time_base * stream.average_rate)

    def frames(self, problems: list[str]) -> Iterator[Frame]:
        with open_video(self.path) as container:
            yield from decode_video(self.path, container, problems)


class Stream:
    """A camera's or server's address. One that goes away is opened again; after `patience` seconds in vain it ends."""

    total = None

    def __init__(self, address: str, patience: float) -> None:
        self.address, self.patience = address, patience

    def frames(self, problems: list[str]) -> Iterator[Frame]:
        yield from keep_open(self.address, partial(self.read, problems), self.patience)

    def read(self, problems: list[str]) -> Iterator[Frame]:
        """Until it ends; returns normally only where an image, or a video of known length, came to its end."""
        with open_video(self.address, timeout=(LIVE_TIMEOUT, LIVE_TIMEOUT)) as container:
            length, last = container.duration, 0.0
            is_image = container.format.name.endswith("_pipe")
            for frame in decode_video(self.address, container, problems):
                last = frame.time + 1 / float(frame.video.rate)
                yield frame
            if not is_image and (not length or last < length / av.time_base - 1):
                raise UserError(f"{self.address} ended")


class Camera:
    """A camera of this machine, by number; treated as a stream is."""

    total = None

    def __init__(self, number: int, patience: float) -> None:
        self.number, self.patience = number, patience

    def frames(self, problems: list[str]) -> Iterator[Frame]:
        yield from keep_open(f"camera {self.number}", self.read, self.patience)

    def read(self) -> Iterator[Frame]:
        capture = cv2.VideoCapture(self.number)
        try:
            if not capture.isOpened():
                raise UserError(f"there is no camera {self.number}, or another program has it")
            rate = Fraction(capture.get(cv2.CAP_PROP_FPS) or 0).limit_denominator(1000) or DEFAULT_RATE
            video = Video(f"camera {self.number}", rate)
            started = time.monotonic()
            for number in count():
                found, image = capture.read()
                if not found:
                    raise UserError(f"{video.name} gives no more frames")
                path = Path(f"{video.stem}_{number:06d}.jpg")
                yield Frame(path, cv2.cvtColor(image, cv2.COLOR_BGR2RGB), video, number, time.monotonic() - started)
        finally:
            capture.release()


def keep_open(name: str, read: Callable[[], Iterator[Frame]], patience: float) -> Iterator[Frame]:
    """The frames of a live source as one video, opened again with growing pauses where it breaks off.

    Raises UserError after `patience` seconds without a frame, and at once where it never gave one.
    """
    number, wait, lost_at = 0, FIRST_WAIT, None
    started = time.monotonic()
    video: Video | None = None
    while True:
        try:
            for frame in read():
                video = video or frame.video
                wait, lost_at = FIRST_WAIT, None
                path = Path(f"{video.stem}_{number:06d}.jpg")
                yield Frame(path, frame.image, video, number, time.monotonic() - started)
                number += 1
            return
        except UserError as error:
            if video is None:
                raise
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at + wait > patience:
                raise UserError(
                    f"{name} went away after {number} frames and did not come back in {patience:g} s ({error}); what "
                    "came before is in the results"
                ) from None
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)


def open_video(path: str, timeout: tuple[float, float] | None = None) -> av.container.InputContainer:
    """A file or address with a video stream; raises UserError."""
    try:
        container = av.open(path, timeout=timeout)
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"cannot read the video {path}: {error.strerror or error}") from None
    if not container.streams.video:
        container.close()
        raise UserError(f"{path} has no video in it")
    return container


def decode_video(name: str, container: av.container.InputContainer, problems: list[str]) -> Iterator[Frame]:
    """The frames of a container, turned upright; raises UserError where their size changes."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    video = Video(name, stream.average_rate or stream.guessed_rate or DEFAULT_RATE)
    number, broken, first, shape = 0, 0, None, None
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
                shape = shape or image.shape
                if image.shape != shape:
                    raise UserError(
                        f"{name} changes its size at frame {number}, from {shape[1]}x{shape[0]} to {image.shape[1]}x"
                        f"{image.shape[0]}; the results end there"
                    )
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
        return read_list(path.read_text(encoding="utf-8-sig"), str(path), patience)
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


def read_list(text: str, source: str, patience: float) -> list[Source]:
    """A path, address or glob on each line, seen from the current folder."""
    names = [line.strip() for line in text.splitlines() if line.strip()]
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
    return read_list(text, "stdin", patience)


def inputs(sources: Sequence[Source]) -> list[Path]:
    """The files among the sources."""
    images = [path for source in sources if isinstance(source, Images) for path in source.paths]
    return images + [Path(source.path) for source in sources if isinstance(source, VideoFile)]
