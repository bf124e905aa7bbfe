"""Cameras and streams: opened again where they go away, and looked at as they are now."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import count
from math import isfinite
from pathlib import Path
from threading import Event

import av
import cv2

from utils.inference.video import DEFAULT_RATE, Frame, SizeChanged, Video, decode_video, open_video, public
from utils.system.errors import UserError
from utils.system.prefetch import newest

TIMEOUT = 10.0  # seconds that opening a stream, or waiting for its next packet, may take
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds before the first and between later attempts to open it again


class Live(ABC):
    """One that goes away is opened again; after `patience` seconds in vain it ends.

    Frames that come while the one before still waits for the network take its place, so that none is old.
    """

    total = None

    def __init__(self, name: str, patience: float) -> None:
        self.name, self.patience, self.dropped = name, patience, 0

    @abstractmethod
    def visit(self, diagnostics: list[str]) -> Iterator[Frame]:
        """Open it and give its frames until it breaks off, which raises UserError, or comes to its end."""

    def frames(self, diagnostics: list[str], stop: Event) -> Iterator[Frame]:
        try:
            yield from self.keep_open(diagnostics, stop)
        finally:
            if self.dropped:
                diagnostics.append(f"{self.dropped} frames of {self.name} were dropped, since the network was busy")

    def keep_open(self, diagnostics: list[str], stop: Event) -> Iterator[Frame]:
        """The frames of all visits as one video, with growing pauses between visits.

        What it missed meanwhile is missing in the times too. Raises UserError after `patience` seconds without a frame,
        at once where it never gave one, and where its pictures change their size.
        """
        last: Frame | None = None
        wait, seen, number = FIRST_WAIT, 0.0, 0
        while not stop.is_set():
            missed: float | None = None if last else 0.0  # seconds of the video before this visit
            try:
                for frame in self.visit(diagnostics):
                    if missed is None:
                        missed = last.time + time.monotonic() - seen
                    if last and frame.image.shape != last.image.shape:
                        raise SizeChanged(self.name, number, last.image, frame.image)
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
                if time.monotonic() - seen + wait > self.patience:
                    raise UserError(
                        f"{self.name} went away after {number} frames and did not come back in {self.patience:g} s "
                        f"({error}); what came before is in the results"
                    ) from None
                stop.wait(wait)
                wait = min(2 * wait, LONGEST_WAIT)

    def newest(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """Those that somebody asks for, each the newest then."""
        return newest(frames, self.drop)

    def drop(self) -> None:
        self.dropped += 1


class Stream(Live):
    """A server's address."""

    def __init__(self, address: str, patience: float) -> None:
        super().__init__(public(address), patience)
        self.address = address

    def visit(self, diagnostics: list[str]) -> Iterator[Frame]:
        """Comes to an end only where an image, or a video of known length, does; of these nothing is left out."""
        with open_video(self.address, timeout=(TIMEOUT, TIMEOUT)) as container:
            whole = container.duration or container.format.name.endswith("_pipe")  # which is an image
            frames = self.decode(container, diagnostics)
            yield from frames if whole else self.newest(frames)

    def decode(self, container: av.container.InputContainer, diagnostics: list[str]) -> Iterator[Frame]:
        length, last = container.duration, 0.0
        timeless, started = container.format.name == "mpjpeg", time.monotonic()
        for frame in decode_video(self.name, container, diagnostics):
            last = frame.time + 1 / float(frame.video.rate)
            yield replace(frame, time=time.monotonic() - started) if timeless else frame
        if not container.format.name.endswith("_pipe") and (not length or last < length / av.time_base - 1):
            raise UserError(f"{self.name} ended")


class Camera(Live):
    """A camera of this machine, by number."""

    def __init__(self, number: int, patience: float) -> None:
        super().__init__(f"camera {number}", patience)
        self.number = number

    def visit(self, diagnostics: list[str]) -> Iterator[Frame]:
        return self.newest(self.read())

    def read(self) -> Iterator[Frame]:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # or ten lines say that there is none
        capture = cv2.VideoCapture(self.number)
        try:
            if not capture.isOpened():
                raise UserError(f"there is no {self.name}, or another program has it")
            rate = capture.get(cv2.CAP_PROP_FPS)
            known = isfinite(rate) and rate > 0
            video = Video(self.name, Fraction(rate).limit_denominator(1000) if known else DEFAULT_RATE)
            started = time.monotonic()
            for number in count():
                found, image = capture.read()
                if not found:
                    raise UserError(f"{self.name} gives no more frames")
                path = Path(f"{video.stem}_{number:06d}.jpg")
                yield Frame(path, cv2.cvtColor(image, cv2.COLOR_BGR2RGB), video, number, time.monotonic() - started)
        finally:
            capture.release()
