"""Live sources: cameras and network streams, which reconnect after an interruption and drop frames to stay current."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import count
from math import isfinite
from threading import Event

import av
import cv2

from utils.inference.video import DEFAULT_RATE, Frame, SizeChanged, Video, decode_video, hide_credentials, open_video
from utils.system.errors import UserError
from utils.system.prefetch import latest

TIMEOUT = 10.0  # seconds to wait for a connection and for each packet
FIRST_WAIT, MAX_WAIT = 0.5, 8.0  # seconds before reconnecting; doubled after each failure


class LiveSource(ABC):
    """Reconnects after an interruption, and gives up after `reconnect_timeout` seconds without a frame."""

    total = None

    def __init__(self, name: str, reconnect_timeout: float) -> None:
        self.name, self.reconnect_timeout, self.dropped = name, reconnect_timeout, 0

    @abstractmethod
    def connect(self, errors: list[str]) -> Iterator[Frame]:
        """Connect and yield frames until the source ends; raises UserError if the connection is lost."""

    def frames(self, errors: list[str], stop: Event) -> Iterator[Frame]:
        try:
            yield from self.reconnect(errors, stop)
        finally:
            if self.dropped:
                errors.append(f"{self.dropped} frames of {self.name} were dropped because the network was busy")

    def reconnect(self, errors: list[str], stop: Event) -> Iterator[Frame]:
        """Yield the frames of all connections as one video, whose times include the interruptions."""
        last: Frame | None = None
        wait, seen, number = FIRST_WAIT, 0.0, 0
        while not stop.is_set():
            offset: float | None = None if last else 0.0  # start of this connection, in seconds of the video
            try:
                for frame in self.connect(errors):
                    if offset is None:
                        offset = last.time + time.monotonic() - seen
                    if last and frame.image.shape != last.image.shape:
                        raise SizeChanged(self.name, number, last.image, frame.image)
                    video = last.video if last else frame.video
                    last = Frame(video.frame_path(number), frame.image, video, number, offset + frame.time)
                    wait, seen, number = FIRST_WAIT, time.monotonic(), number + 1
                    yield last
                return
            except SizeChanged:
                raise
            except UserError as error:
                if last is None:
                    raise
                if time.monotonic() - seen + wait > self.reconnect_timeout:
                    raise UserError(
                        f"{self.name} was lost after {number} frames and did not come back within "
                        f"{self.reconnect_timeout:g} s ({error}); the frames before that were processed"
                    ) from None
                stop.wait(wait)
                wait = min(2 * wait, MAX_WAIT)

    def count_dropped(self) -> None:
        self.dropped += 1


class Stream(LiveSource):
    def __init__(self, url: str, reconnect_timeout: float) -> None:
        super().__init__(hide_credentials(url), reconnect_timeout)
        self.url = url

    def connect(self, errors: list[str]) -> Iterator[Frame]:
        """Yield all frames of an image or a video of known length, otherwise only the latest frames."""
        with open_video(self.url, timeout=(TIMEOUT, TIMEOUT)) as container:
            is_finite = container.duration or is_image(container)
            frames = self.decode(container, errors)
            yield from frames if is_finite else latest(frames, self.count_dropped)

    def decode(self, container: av.container.InputContainer, errors: list[str]) -> Iterator[Frame]:
        length, end = container.duration, 0.0
        has_no_times, started = container.format.name == "mpjpeg", time.monotonic()
        for frame in decode_video(self.name, container, errors):
            end = frame.time + 1 / float(frame.video.rate)
            yield replace(frame, time=time.monotonic() - started) if has_no_times else frame
        if not is_image(container) and (not length or end < length / av.time_base - 1):
            raise UserError(f"{self.name} ended")


def is_image(container: av.container.InputContainer) -> bool:
    return container.format.name.endswith("_pipe")  # FFmpeg's demuxers for single images


class Camera(LiveSource):
    def __init__(self, number: int, reconnect_timeout: float) -> None:
        super().__init__(f"camera {number}", reconnect_timeout)
        self.number = number

    def connect(self, errors: list[str]) -> Iterator[Frame]:
        return latest(self.read(), self.count_dropped)

    def read(self) -> Iterator[Frame]:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # OpenCV warns repeatedly without a camera
        capture = cv2.VideoCapture(self.number)
        try:
            if not capture.isOpened():
                raise UserError(f"{self.name} does not exist, or is in use by another program")
            rate = capture.get(cv2.CAP_PROP_FPS)
            is_known = isfinite(rate) and rate > 0
            video = Video(self.name, Fraction(rate).limit_denominator(1000) if is_known else DEFAULT_RATE)
            started = time.monotonic()
            for number in count():
                found, image = capture.read()
                if not found:
                    raise UserError(f"{self.name} has stopped delivering frames")
                rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
                yield Frame(video.frame_path(number), rgb, video, number, time.monotonic() - started)
        finally:
            capture.release()
