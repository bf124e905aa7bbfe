"""Prediction as a pipeline: frames from sources, through the network, to whoever draws and writes."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import inf
from threading import Event
from typing import Any

import numpy as np
import supervision as sv

from utils.inference.detector import Detector, Prepared
from utils.inference.sinks import Sink, Window
from utils.inference.sources import Source
from utils.inference.streams import Live
from utils.inference.video import Frame, Video
from utils.system.errors import UserError, check_range
from utils.system.prefetch import ahead

BATCH_SIZES = {"cpu": 4, "cuda": 16}
BATCHES_AHEAD, FRAMES_BEHIND = 2, 4  # that wait for the network, and to be written
FRAMES = 16  # of a video in a batch, with those that are not looked at
MAX_FRAMES = 64  # where a larger batch is asked for
OVERLAP = 5  # tiles share the fifth part of their sides

Result = tuple[Frame, sv.Detections, bool]  # whether the detections are the frame's own, or an earlier one's


@dataclass(frozen=True)
class Look:
    """How to look at frames."""

    batch_size: int = 0  # images, or tiles of one, that go through the network at once; 0: what fits the source
    every: int = 1  # of videos, look only at every Nth frame; the boxes stay until the next
    tile: int = 0  # pixels of the side of tiles that large images are looked at in; 0: the whole image at once
    track: bool = False  # give objects in videos a number that stays

    def __post_init__(self) -> None:
        """Raise UserError for a value that cannot work."""
        check_range(self, 0, inf, "batch_size")
        check_range(self, 1, inf, "every")
        if self.tile and self.tile < 32:
            raise UserError(f"tile is {self.tile}, but must be 0, or at least 32 pixels")
        most = max(1, MAX_FRAMES // self.every)
        if self.batch_size > most and self.every > 1 and not self.tile:
            raise UserError(
                f"batch_size is {self.batch_size}, but must be at most {most} with every {self.every}, since all "
                "frames between wait in memory"
            )

    def at_once(self, live: bool, device: str) -> int:
        """Images that go through the network at once, unless that is given."""
        if self.tile:
            return BATCH_SIZES[device]
        return 1 if live else max(1, min(BATCH_SIZES[device], FRAMES // self.every))


class Pipeline:
    """The frames of all sources, with what was found on each.

    Reading and fitting go on in a thread that is a few batches ahead. The network runs in the thread that asks: each
    thread that uses torch gets workers of its own, and with more of them than cores all would often go to sleep.
    """

    def __init__(self, detector: Detector, sources: Sequence[Source], look: Look) -> None:
        self.detector, self.sources, self.look = detector, sources, look
        live = any(isinstance(source, Live) for source in sources)
        self.batch_size = look.batch_size or look.at_once(live, detector.network.device.type)
        self.most_looked_at = 1 if look.tile else self.batch_size  # frames of a batch, at most
        self.most_frames = 1 if live else FRAMES
        if self.most_looked_at > 1:
            self.most_frames = max(self.most_frames, self.most_looked_at * look.every)
        self.batches_ahead = 1 if live else BATCHES_AHEAD
        self.stop = Event()  # waiting for sources that went away
        self.problems: list[str] = []  # what could not be read
        self.tracked: Video | None = None
        self.tracker: Any = None
        self.slicer: sv.InferenceSlicer | None = None
        if look.tile:
            one_by_one = self.batch_size == 1  # which the slicer then gives by itself, not in a list
            find = detector if one_by_one else lambda tiles: detector.find(detector.prepare(tiles))
            overlap = look.tile // OVERLAP
            no_filter = sv.OverlapFilter.NONE
            self.slicer = sv.InferenceSlicer(find, look.tile, overlap, no_filter, batch_size=self.batch_size)

    def __iter__(self) -> Iterator[Result]:
        with closing(ahead(self.prepare(), self.batches_ahead)) as batches:
            try:
                yield from self.find(batches)
            finally:
                self.stop.set()

    def frames(self) -> Iterator[Frame]:
        """Of all sources; a UserError of one is raised when the others are done, those of further ones are problems."""
        failure: UserError | None = None
        for source in self.sources:
            try:
                yield from source.frames(self.problems, self.stop)
            except UserError as error:
                if failure is not None:
                    self.problems.append(str(error))
                failure = failure or error
        if failure is not None:
            raise failure

    def looks_at(self, frame: Frame) -> bool:
        return frame.number % self.look.every == 0

    def prepare(self) -> Iterator[tuple[list[Frame], Prepared | None]]:
        """Frames up to the next full batch, or as many as may wait, and that batch."""
        frames: list[Frame] = []
        failure: UserError | None = None
        try:
            for frame in self.frames():
                frames.append(frame)
                if sum(map(self.looks_at, frames)) == self.most_looked_at or len(frames) == self.most_frames:
                    yield frames, self.fit(frames)
                    frames = []
        except UserError as error:
            failure = error  # what came before it counts
        if frames:
            yield frames, self.fit(frames)
        if failure is not None:
            raise failure

    def fit(self, frames: Sequence[Frame]) -> Prepared | None:
        chosen = [frame.image for frame in frames if self.looks_at(frame)]
        return self.detector.prepare(chosen) if chosen and not self.look.tile else None

    def find(self, batches: Iterable[tuple[list[Frame], Prepared | None]]) -> Iterator[Result]:
        """The network's part."""
        detections = sv.Detections.empty()
        for frames, prepared in batches:
            found = iter(self.detector.find(prepared) if prepared else ())
            for frame in frames:
                new = self.looks_at(frame)
                if new:
                    detections = self.in_tiles(frame.image) if self.look.tile else next(found)
                    detections = self.follow(frame, detections) if self.look.track else detections
                yield frame, detections, new

    def in_tiles(self, image: np.ndarray) -> sv.Detections:
        """The detections of all tiles, of which those of one object become one."""
        limits = self.detector.thresholds
        return self.slicer(image).with_nms(limits.nms_iou, class_agnostic=limits.agnostic)

    def follow(self, frame: Frame, detections: sv.Detections) -> sv.Detections:
        """The detections of a video's frame with the ids of their tracks."""
        if frame.video is None:
            return detections
        if frame.video is not self.tracked:
            from trackers import ByteTrackTracker  # takes a second, which only those who want it wait for

            least = min(self.detector.least_confidences())
            rate = float(frame.video.rate) / self.look.every
            self.tracker = ByteTrackTracker(
                frame_rate=rate, track_activation_threshold=least, high_conf_det_threshold=least
            )
            self.tracked = frame.video
        return self.tracker.update(detections)


def write_behind(results: Iterable[Result], sinks: Sequence[Sink]) -> Iterator[Result]:
    """The results, each handed to the sinks by a thread that is a few frames behind; a window needs this one.

    What came is written to the end, also when `results` raises. What a sink raises is raised a few frames later.
    """

    def write(result: Result) -> None:
        for sink in sinks:
            with refusals_of(sink):
                sink.write(*result)

    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for result in results:
            if any(isinstance(sink, Window) for sink in sinks):
                write(result)
            else:
                waiting.append(pool.submit(write, result))
            yield result
            if len(waiting) > FRAMES_BEHIND:
                waiting.popleft().result()
        for future in waiting:
            future.result()


@contextmanager
def finishing(sink: Sink) -> Iterator[Sink]:
    """A sink that is closed at the end; raises UserError where its last part cannot be written."""
    try:
        yield sink
    finally:
        with refusals_of(sink):
            sink.close()


@contextmanager
def refusals_of(sink: Sink) -> Iterator[None]:
    """What the system refuses to write as a UserError."""
    try:
        yield
    except BrokenPipeError:  # of stdout, not of a file
        raise
    except OSError as error:
        raise UserError(f"cannot write {error.filename or sink.folder}: {error.strerror}") from None
