"""Video files: frames with their times, opening, decoding, which cameras and streams share, and writing."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from threading import Event

import av
import cv2
import numpy as np

from utils.system.errors import UserError

LONGEST_STEM = 100  # letters of a name for results
DEFAULT_RATE = Fraction(30)  # frames a second, of a video that does not say
CLOCK = 90_000  # ticks a second, in which a video's times are written
ENCODER = {"crf": "23", "preset": "veryfast"}  # of x264
MISSING = 1.0  # seconds before the end that a video says where its pictures may end


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

    def frames(self, diagnostics: list[str], stop: Event) -> Iterator[Frame]:
        with open_video(self.path) as container:
            yield from decode_video(self.path, container, diagnostics)


class SizeChanged(UserError):
    """A video's pictures become larger or smaller."""

    def __init__(self, name: str, number: int, before: np.ndarray, after: np.ndarray) -> None:
        sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (before, after)]
        super().__init__(
            f"{name} changes its size at frame {number}, from {sizes[0]} to {sizes[1]}; the results end there"
        )


def public(address: str) -> str:
    """An address without password and query, for messages and names of files; a path as it is.

    Passwords may have any letters, so all up to the last @ goes.
    """
    scheme, separator, rest = address.partition("://")
    return scheme + separator + re.split("[?#]", rest.rpartition("@")[2])[0] if separator else address


def reason(error: OSError) -> str:
    """Why a video cannot be read or written, without its address, which may have a password."""
    return error.strerror or type(error).__name__


def open_video(path: str, timeout: tuple[float, float] | None = None) -> av.container.InputContainer:
    """A file or address with a video stream; raises UserError."""
    try:
        options = {"rtsp_transport": "tcp"} if path.startswith("rtsp") else {}  # UDP is lost behind many routers
        container = av.open(path, timeout=timeout, options=options)
    except (av.FFmpegError, OSError) as error:
        hint = "; it may be cut off, or no video" if isinstance(error, av.InvalidDataError) else ""
        raise UserError(f"cannot read the video {public(path)}: {reason(error)}{hint}") from None
    if not container.streams.video:
        container.close()
        raise UserError(f"{public(path)} has no video in it")
    return container


def decode_video(name: str, container: av.container.InputContainer, diagnostics: list[str]) -> Iterator[Frame]:
    """The frames of a container, turned upright; raises UserError where their size changes."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    video = Video(name, stream.average_rate or stream.guessed_rate or DEFAULT_RATE)
    number, broken, damaged, first, previous, end = 0, 0, 0, None, None, 0.0
    try:
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.InvalidDataError:
                broken += 1
                continue
            for picture in decoded:
                damaged += picture.is_corrupt
                image = picture.to_ndarray(format="rgb24")
                image = np.ascontiguousarray(np.rot90(image, picture.rotation // 90)) if picture.rotation else image
                if previous is not None and image.shape != previous.shape:
                    raise SizeChanged(name, number, previous, image)
                previous = image
                when = number / float(video.rate) if picture.time is None else picture.time
                first = when if first is None else first
                end = when - first + float((picture.duration or 0) * picture.time_base)
                yield Frame(Path(f"{video.stem}_{number:06d}.jpg"), image, video, number, when - first)
                number += 1
    except (av.FFmpegError, OSError) as error:  # of the file's end, or of a connection
        diagnostics.append(f"{name} breaks off after {number} frames: {reason(error)}")
    length = (container.duration or 0) / av.time_base
    if number and end < length - MISSING:
        diagnostics.append(f"the pictures of {name} end after {end:.1f} of {length:.1f} s; it may be cut off")
    if broken:
        diagnostics.append(f"{broken} broken parts of {name} were left out")
    if damaged:
        diagnostics.append(f"{damaged} frames of {name} are damaged, and shown as far as they could be decoded")
    if not number:
        raise UserError(f"{name} has no frame that can be decoded")


class VideoWriter:
    """An H.264 MP4, which browsers play, of frames (height, width)."""

    def __init__(self, path: Path, rate: Fraction, size: tuple[int, int]) -> None:
        self.path, self.last = path, -1
        self.failure: UserError | None = None  # after which FFmpeg may not write on, since that can end the process
        self.padding = [side % 2 for side in size]  # H.264 wants even sides
        try:
            self.container = av.open(str(path), "w", options={"movflags": "+faststart"})
            self.stream = self.container.add_stream("libx264", rate=rate, options=ENCODER)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise UserError(f"cannot write the video {path}: {error}") from None
        self.stream.height, self.stream.width = (side + more for side, more in zip(size, self.padding, strict=True))
        self.stream.pix_fmt = "yuv420p"
        self.stream.codec_context.time_base = Fraction(1, CLOCK)

    def write(self, image: np.ndarray, seconds: float) -> None:
        """An RGB image at its time, or just behind the one before."""
        if any(self.padding):
            image = cv2.copyMakeBorder(image, 0, self.padding[0], 0, self.padding[1], cv2.BORDER_REPLICATE)
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        self.last = picture.pts = max(self.last + 1, round(seconds * CLOCK))
        picture.time_base = Fraction(1, CLOCK)
        self.mux(picture)

    def mux(self, picture: av.VideoFrame | None) -> None:
        if self.failure is not None:
            raise self.failure
        try:
            self.container.mux(self.stream.encode(picture))
        except (av.FFmpegError, OSError) as error:
            self.failure = UserError(f"cannot write the video {self.path}: {reason(error)}")
            raise self.failure from None

    def close(self) -> None:
        try:
            self.mux(None)
        finally:
            self.container.close()
