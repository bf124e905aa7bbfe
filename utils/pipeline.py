"""Prediction as a pipeline: frames from sources, through the network, to whoever draws and writes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import supervision as sv

from utils.ahead import ahead
from utils.detector import Detector, Prepared
from utils.errors import UserError, check_range
from utils.sources import Frame, Source, Video

WAITING = 4  # batches between two stages


@dataclass(frozen=True)
class Look:
    """How to look at frames."""

    batch_size: int = 1  # images that go through the network at once
    every: int = 1  # of videos, look only at every Nth frame; the boxes stay until the next
    tile: int = 0  # pixels of the side of tiles that large images are looked at in; 0: the whole image at once
    track: bool = False  # give objects in videos a number that stays

    def __post_init__(self) -> None:
        """Raise UserError for a value that cannot work."""
        check_range(self, 1, inf, "batch_size", "every")
        if self.tile and self.tile < 32:
            raise UserError(f"tile is {self.tile}, but must be 0, or at least 32 pixels")


class Pipeline:
    """The frames of all sources, with what was found on each.

    Reading and fitting, the network, and the caller's drawing and writing overlap; what waits between them is bounded.
    """

    def __init__(self, detector: Detector, sources: Sequence[Source], look: Look) -> None:
        self.detector, self.sources, self.look = detector, sources, look
        self.problems: list[str] = []  # what could not be read
        self.tracked: Video | None = None
        self.tracker: Any = None
        self.slicer: sv.InferenceSlicer | None = None
        if look.tile:
            overlap = detector.thresholds.nms_iou
            self.slicer = sv.InferenceSlicer(detector, look.tile, look.tile // 5, iou_threshold=overlap)

    def __iter__(self) -> Iterator[tuple[Frame, sv.Detections, bool]]:
        """Frame, detections, and whether these are its own or an earlier frame's."""
        return ahead(self.find(ahead(self.prepare(), WAITING)), WAITING * self.look.batch_size)

    def frames(self) -> Iterator[Frame]:
        for source in self.sources:
            yield from source.frames(self.problems)

    def looks_at(self, frame: Frame) -> bool:
        return frame.number % self.look.every == 0

    def prepare(self) -> Iterator[tuple[list[Frame], Prepared | None]]:
        """Frames up to the next full batch, and that batch."""
        frames: list[Frame] = []
        for frame in self.frames():
            frames.append(frame)
            if sum(map(self.looks_at, frames)) == self.look.batch_size:
                yield frames, self.fit(frames)
                frames = []
        if frames:
            yield frames, self.fit(frames)

    def fit(self, frames: Sequence[Frame]) -> Prepared | None:
        chosen = [frame.image for frame in frames if self.looks_at(frame)]
        return self.detector.prepare(chosen) if chosen and not self.slicer else None

    def find(
        self, batches: Iterable[tuple[list[Frame], Prepared | None]]
    ) -> Iterator[tuple[Frame, sv.Detections, bool]]:
        """The network's part."""
        detections = sv.Detections.empty()
        for frames, prepared in batches:
            found = iter(self.detector.find(prepared) if prepared else ())
            for frame in frames:
                new = self.looks_at(frame)
                if new:
                    detections = self.slicer(frame.image) if self.slicer else next(found)
                    detections = self.follow(frame, detections) if self.look.track else detections
                yield frame, detections, new

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
