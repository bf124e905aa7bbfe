"""Open, decode and write videos."""

import re
from collections import Counter
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

MAX_STEM = 100  # maximum number of characters in a file name
DEFAULT_RATE = Fraction(30)  # frames per second, if the video does not state a rate
CLOCK = 90_000  # time base of written videos, in ticks per second
CODEC, ENCODER_OPTIONS = "libx264", {"crf": "23", "preset": "veryfast"}
MAX_MISSING = 1.0  # maximum seconds without frames at the end of a file that is not reported as truncated


@dataclass(frozen=True)
class Video:
    """The file, camera or stream that a frame comes from."""

    name: str  # path, URL, or "camera 0"
    rate: Fraction  # frames per second

    @property
    def stem(self) -> str:
        return re.sub(r"[^\w .-]", "_", Path(self.name).stem[:MAX_STEM])

    def frame_path(self, number: int) -> Path:
        return Path(f"{self.stem}_{number:06d}.jpg")


@dataclass(frozen=True)
class Frame:
    """An image to run the detector on."""

    path: Path  # the image file, or a name for the frame of a video
    image: np.ndarray  # (H, W, 3) uint8 RGB
    video: Video | None = None
    number: int = 0  # index in the video
    time: float = 0.0  # seconds from the start of the video


@dataclass(frozen=True)
class VideoFile:
    """A video file; frames that cannot be decoded are skipped."""

    path: str

    @property
    def total(self) -> int | None:
        with suppress(UserError), open_video(self.path) as container:
            stream = container.streams.video[0]
            if not stream.frames and container.duration and stream.average_rate:
                return round(container.duration / av.time_base * stream.average_rate)
            return stream.frames or None
        return None

    def frames(self, errors: list[str], stop: Event) -> Iterator[Frame]:
        with open_video(self.path) as container:
            yield from decode_video(self.path, container, errors)


class SizeChanged(UserError):
    def __init__(self, name: str, number: int, before: np.ndarray, after: np.ndarray) -> None:
        old, new = (f"{image.shape[1]}x{image.shape[0]}" for image in (before, after))
        super().__init__(f"the size of {name} changes from {old} to {new} at frame {number}; the output ends there")


def hide_credentials(url: str) -> str:
    """A URL without user, password and query, for messages and file names; paths are returned unchanged."""
    scheme, separator, rest = url.partition("://")
    # passwords may contain any character, so everything up to the last @ is removed
    return scheme + separator + re.split("[?#]", rest.rpartition("@")[2])[0] if separator else url


def reason(error: OSError) -> str:
    """Why reading or writing failed, without the URL, which may contain a password."""
    return error.strerror or type(error).__name__


def open_video(path: str, timeout: tuple[float, float] | None = None) -> av.container.InputContainer:
    """Open a file or URL with a video stream; raises UserError."""
    try:
        options = {"rtsp_transport": "tcp"} if path.startswith("rtsp") else {}  # many routers drop UDP
        container = av.open(path, timeout=timeout, options=options)
    except (av.FFmpegError, OSError) as error:
        hint = "; it may be truncated, or not a video" if isinstance(error, av.InvalidDataError) else ""
        raise UserError(f"cannot read the video {hide_credentials(path)}: {reason(error)}{hint}") from None
    if not container.streams.video:
        container.close()
        raise UserError(f"{hide_credentials(path)} contains no video stream")
    return container


def decode_video(name: str, container: av.container.InputContainer, errors: list[str]) -> Iterator[Frame]:
    """Yield the upright frames of a container; raises UserError if there are none or their size changes."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    video = Video(name, stream.average_rate or stream.guessed_rate or DEFAULT_RATE)
    faults: Counter[str] = Counter()
    number, first, previous, end = 0, None, None, 0.0
    try:
        for picture in decode_pictures(container, faults):
            image = picture.to_ndarray(format="rgb24")
            image = np.ascontiguousarray(np.rot90(image, picture.rotation // 90)) if picture.rotation else image
            if previous is not None and image.shape != previous.shape:
                raise SizeChanged(name, number, previous, image)
            previous = image
            time = number / float(video.rate) if picture.time is None else picture.time
            first = time if first is None else first
            end = time - first + float((picture.duration or 0) * picture.time_base)
            yield Frame(video.frame_path(number), image, video, number, time - first)
            number += 1
    except (av.FFmpegError, OSError) as error:  # a truncated file, or a lost connection
        errors.append(f"reading {name} failed after {number} frames: {reason(error)}")
    length = (container.duration or 0) / av.time_base
    if number and end < length - MAX_MISSING:
        errors.append(f"{name} has no frames after {end:.1f} of {length:.1f} s; it may be truncated")
    if faults["packets"]:
        errors.append(f"{faults['packets']} corrupt packets of {name} were skipped")
    if faults["frames"]:
        errors.append(f"{faults['frames']} frames of {name} are damaged and were only partly decoded")
    if not number:
        raise UserError(f"no frame of {name} could be decoded")


def decode_pictures(container: av.container.InputContainer, faults: Counter[str]) -> Iterator[av.VideoFrame]:
    """Yield decoded pictures, counting skipped "packets" and damaged "frames" in `faults`."""
    for packet in container.demux(container.streams.video[0]):
        try:
            pictures = packet.decode()
        except av.InvalidDataError:
            faults["packets"] += 1
            continue
        for picture in pictures:
            faults["frames"] += picture.is_corrupt
            yield picture


class VideoWriter:
    """Writes frames of `size` (height, width) as an H.264 MP4, which browsers can play."""

    def __init__(self, path: Path, rate: Fraction, size: tuple[int, int]) -> None:
        self.path, self.last_tick = path, -1
        self.failure: UserError | None = None  # nothing is written after an error, since FFmpeg may crash
        self.padding = [side % 2 for side in size]  # H.264 needs even sides
        try:
            self.container = av.open(str(path), "w", options={"movflags": "+faststart"})
            self.stream = self.container.add_stream(CODEC, rate=rate, options=ENCODER_OPTIONS)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise UserError(f"cannot write the video {path}: {error}") from None
        self.stream.height, self.stream.width = (side + pad for side, pad in zip(size, self.padding, strict=True))
        self.stream.pix_fmt = "yuv420p"
        self.stream.codec_context.time_base = Fraction(1, CLOCK)

    def write(self, image: np.ndarray, seconds: float) -> None:
        """Append an RGB image at its time, or one tick after the previous image if that is later."""
        if any(self.padding):
            image = cv2.copyMakeBorder(image, 0, self.padding[0], 0, self.padding[1], cv2.BORDER_REPLICATE)
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        self.last_tick = picture.pts = max(self.last_tick + 1, round(seconds * CLOCK))
        picture.time_base = Fraction(1, CLOCK)
        self.mux(picture)

    def mux(self, picture: av.VideoFrame | None) -> None:
        """Encode and write a picture; None flushes the encoder."""
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
