"""The prediction pipeline: from sources through the detector to sinks."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from math import inf
from threading import Event
from typing import Any, NamedTuple

import supervision as sv

from utils.inference.detector import Detector, NetworkInput
from utils.inference.sinks import Sink, Window
from utils.inference.sources import Source
from utils.inference.streams import LiveSource
from utils.inference.video import Frame, Video
from utils.system.errors import UserError, check_range
from utils.system.prefetch import prefetch

BATCH_SIZES = {"cpu": 4, "cuda": 16}
BATCHES_AHEAD, FRAMES_BEHIND = 2, 4  # batches that wait for the network, frames that wait to be written
FRAMES_PER_BATCH = 16  # video frames read for a batch, including those skipped by the stride
MAX_WAITING_FRAMES = 64  # upper limit of batch size times stride, since skipped frames also wait in memory
MIN_TILE = 32  # minimum side of a tile, in pixels
TILE_OVERLAP = 5  # neighboring tiles share 1/5 of their width and height


@dataclass(frozen=True)
class FrameOptions:
    """How frames are passed to the detector."""

    batch_size: int = 0  # images or tiles per batch; 0: chosen by device and source
    frame_stride: int = 1  # detect in every Nth frame of a video; the others keep its detections
    tile: int = 0  # side of the tiles that images are divided into, in pixels; 0: no tiles
    track: bool = False  # assign track IDs to the objects in videos

    def __post_init__(self) -> None:
        check_range(self, 0, inf, "batch_size")
        check_range(self, 1, inf, "frame_stride")
        if self.tile and self.tile < MIN_TILE:
            raise UserError(f"tile is {self.tile}, but must be 0 or at least {MIN_TILE} pixels")
        max_batch = max(1, MAX_WAITING_FRAMES // self.frame_stride)
        if self.batch_size > max_batch and self.frame_stride > 1 and not self.tile:
            raise UserError(
                f"batch_size is {self.batch_size}, but must be at most {max_batch} with frame_stride "
                f"{self.frame_stride}, since the frames in between wait in memory"
            )

    def choose_batch_size(self, is_live: bool, device: str) -> int:
        if self.batch_size:
            return self.batch_size
        if self.tile:
            return BATCH_SIZES[device]
        return 1 if is_live else max(1, min(BATCH_SIZES[device], FRAMES_PER_BATCH // self.frame_stride))


class Result(NamedTuple):
    """A frame with its detections."""

    frame: Frame
    detections: sv.Detections
    is_new: bool  # False if the detections are carried over from an earlier frame


class Pipeline:
    """Iterates over the frames of all sources with their detections.

    A thread reads and preprocesses a few batches ahead. The network runs in the iterating thread, since each thread
    that uses torch starts its own workers, which would compete for the cores.
    """

    def __init__(self, detector: Detector, sources: Sequence[Source], options: FrameOptions) -> None:
        self.detector, self.sources, self.options = detector, sources, options
        is_live = any(isinstance(source, LiveSource) for source in sources)
        batch_size = options.choose_batch_size(is_live, detector.network.device.type)
        self.batch_frames = 1 if options.tile else batch_size  # frames per batch that go through the network
        self.max_frames = 1 if is_live else FRAMES_PER_BATCH  # frames per batch, including skipped ones
        if self.batch_frames > 1:
            self.max_frames = max(self.max_frames, self.batch_frames * options.frame_stride)
        self.batches_ahead = 1 if is_live else BATCHES_AHEAD
        self.stop = Event()  # stops reconnecting
        self.read_errors: list[str] = []
        self.tracked: Video | None = None
        self.tracker: Any = None
        self.slicer = self.make_slicer(options.tile, batch_size) if options.tile else None

    def __iter__(self) -> Iterator[Result]:
        with closing(prefetch(self.prepare(), self.batches_ahead)) as batches:
            try:
                yield from self.detect(batches)
            finally:
                self.stop.set()

    def frames(self) -> Iterator[Frame]:
        """Yield the frames of all sources; the first UserError is raised after the last source."""
        failure: UserError | None = None
        for source in self.sources:
            try:
                yield from source.frames(self.read_errors, self.stop)
            except UserError as error:
                if failure is not None:
                    self.read_errors.append(str(error))
                failure = failure or error
        if failure is not None:
            raise failure

    def is_selected(self, frame: Frame) -> bool:
        return frame.number % self.options.frame_stride == 0

    def prepare(self) -> Iterator[tuple[list[Frame], NetworkInput | None]]:
        """Yield the frames up to each full batch, or `max_frames`, with their network input."""
        frames: list[Frame] = []
        failure: UserError | None = None
        try:
            for frame in self.frames():
                frames.append(frame)
                if sum(map(self.is_selected, frames)) == self.batch_frames or len(frames) == self.max_frames:
                    yield frames, self.prepare_batch(frames)
                    frames = []
        except UserError as error:
            failure = error  # raised after the frames before it
        if frames:
            yield frames, self.prepare_batch(frames)
        if failure is not None:
            raise failure

    def prepare_batch(self, frames: Sequence[Frame]) -> NetworkInput | None:
        images = [frame.image for frame in frames if self.is_selected(frame)]
        return self.detector.prepare(images) if images and not self.slicer else None

    def detect(self, batches: Iterable[tuple[list[Frame], NetworkInput | None]]) -> Iterator[Result]:
        """Run the network, and carry its detections over to skipped frames."""
        detections = sv.Detections.empty()
        for frames, batch in batches:
            found = iter(self.detector.detect_batch(batch) if batch else ())
            for frame in frames:
                is_new = self.is_selected(frame)
                if is_new:
                    detections = self.detect_in_tiles(frame) if self.slicer else next(found)
                    detections = self.track(frame, detections) if self.options.track else detections
                yield Result(frame, detections, is_new)

    def make_slicer(self, tile: int, batch_size: int) -> sv.InferenceSlicer:
        def detect_tiles(tiles: Any) -> Any:
            return self.detector.detect_batch(self.detector.prepare(tiles))

        callback = self.detector if batch_size == 1 else detect_tiles  # InferenceSlicer passes a single image as it is
        return sv.InferenceSlicer(callback, tile, tile // TILE_OVERLAP, sv.OverlapFilter.NONE, batch_size=batch_size)

    def detect_in_tiles(self, frame: Frame) -> sv.Detections:
        limits = self.detector.thresholds
        return self.slicer(frame.image).with_nms(limits.nms_iou, class_agnostic=limits.class_agnostic)

    def track(self, frame: Frame, detections: sv.Detections) -> sv.Detections:
        if frame.video is None:
            return detections
        if frame.video is not self.tracked:
            from trackers import ByteTrackTracker  # slow to import

            threshold = min(self.detector.min_confidences())
            self.tracker = ByteTrackTracker(
                frame_rate=float(frame.video.rate) / self.options.frame_stride,
                track_activation_threshold=threshold,
                high_conf_det_threshold=threshold,
            )
            self.tracked = frame.video
        return self.tracker.update(detections)


def write_behind(results: Iterable[Result], sinks: Sequence[Sink]) -> Iterator[Result]:
    """Yield the results while a thread (this one, if there is a `Window`) writes them, even if `results` raises."""

    def write(result: Result) -> None:
        for sink in sinks:
            if result.is_new or sink.every_frame:
                with convert_write_errors(sink):
                    sink.write(result.frame, result.detections)

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
def closing_sink(sink: Sink) -> Iterator[Sink]:
    """Close the sink on exit; raises UserError if that fails."""
    try:
        yield sink
    finally:
        with convert_write_errors(sink):
            sink.close()


@contextmanager
def convert_write_errors(sink: Sink) -> Iterator[None]:
    """Turn an OSError of a sink into a UserError."""
    try:
        yield
    except BrokenPipeError:  # of stdout
        raise
    except OSError as error:
        raise UserError(f"cannot write {error.filename or sink.folder}: {error.strerror}") from None
