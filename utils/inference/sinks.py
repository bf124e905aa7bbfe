"""Where detections go: pictures and videos, a window, tables, label files, crops, counts, heat maps.

Each sink takes every frame in turn, with what was found on it; `new` is False where that was only carried on from an
earlier frame of the video.
"""

import json
import os
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import supervision as sv

from utils.data.image_io import write_image
from utils.data.label_writers import CocoFile, format_voc, format_yolo, spans_a_pixel, write_lines
from utils.data.voc import IMAGE_SUFFIXES
from utils.data.voc_xml import LabeledObject
from utils.inference.drawing import draw_detections
from utils.inference.video import Frame, Video, VideoWriter

VIDEO_SUFFIX = ".mp4"
WINDOW = "detections; q or Esc closes"
CLOSING_KEYS, NO_KEY = (ord("q"), 27), 255
HEAT_SIDE = 640  # pixels of a heat map's longer side, at most
SHOWN_SIDE = 1280  # pixels of the window's longer side, at most


class WindowClosed(Exception):
    """The user has closed the window, and wants no more."""


class Sink(ABC):
    """Takes the detections of one frame after the other, and finishes its files in `close`."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        self.folder = folder
        self.class_names = tuple(class_names)
        self.given: set[str] = set()  # names of files, in small letters

    @abstractmethod
    def write(self, frame: Frame, detections: sv.Detections, new: bool = True) -> None: ...

    def close(self) -> None:  # noqa: B027, most have nothing to finish
        pass

    def unique(self, name: str) -> str:
        """The name, with a number before its suffix where it was given before; capitals make no difference."""
        path, number, free = Path(name), 1, name
        while free.casefold() in self.given:
            number += 1
            free = str(path.with_name(f"{path.stem}_{number}{path.suffix}"))
        self.given.add(free.casefold())
        return free

    def place(self, name: str) -> Path:
        """Where a file of this name goes, whose folder is made."""
        path = self.folder / self.unique(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def draw(self, frame: Frame, detections: sv.Detections) -> np.ndarray:
        return draw_detections(frame.image, detections, self.class_names)


class Pictures(Sink):
    """An annotated copy of each image under its own name; of a video an MP4 of the same length and frame rate."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder, class_names)
        self.video: VideoWriter | None = None
        self.source: object = None

    def write(self, frame: Frame, detections: sv.Detections, new: bool = True) -> None:
        drawn = self.draw(frame, detections)
        if frame.video is None:
            known = frame.path.suffix.lower() in IMAGE_SUFFIXES
            write_image(self.place(frame.path.name if known else f"{frame.path.name}.png"), drawn)
            return
        if frame.video is not self.source:
            self.close()
            path = self.place(frame.video.stem + VIDEO_SUFFIX)
            self.video, self.source = VideoWriter(path, frame.video.rate, drawn.shape[:2]), frame.video
        self.video.write(drawn, frame.time)

    def close(self) -> None:
        if self.video is not None:
            self.video.close()
            self.video = None


class Window(Sink):
    """Every frame on the screen, as it comes; raises WindowClosed when the user has enough."""

    @staticmethod
    def is_possible() -> bool:
        """Whether OpenCV was built with windows, and there is a display."""
        headless = sys.platform.startswith("linux") and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
        gui = [line for line in cv2.getBuildInformation().splitlines() if line.strip().startswith("GUI:")]
        return not headless and bool(gui) and "NONE" not in gui[0]

    def write(self, frame: Frame, detections: sv.Detections, new: bool = True) -> None:
        drawn = self.draw(frame, detections)
        scale = min(1.0, SHOWN_SIDE / max(drawn.shape[:2]))
        sides = max(1, round(drawn.shape[1] * scale)), max(1, round(drawn.shape[0] * scale))
        cv2.imshow(WINDOW, cv2.cvtColor(cv2.resize(drawn, sides), cv2.COLOR_RGB2BGR))
        key = cv2.waitKey(1) & 0xFF
        while frame.video is None and key == NO_KEY and cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) > 0:
            key = cv2.waitKey(50) & 0xFF
        if key in CLOSING_KEYS or cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) < 1:
            raise WindowClosed

    def close(self) -> None:
        with suppress(cv2.error):  # when it never opened
            cv2.destroyAllWindows()


class JsonLines(Sink):
    """detections.jsonl: a line per detection with image, class, score, box (xyxy pixels); of videos frame and time."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder, class_names)
        self.file = (folder / "detections.jsonl").open("w", encoding="utf-8")

    def write(self, frame: Frame, detections: sv.Detections, new: bool = True) -> None:
        if new:
            about = describe_frame(frame)
            for item in describe_detections(detections, self.class_names):
                self.file.write(json.dumps(about | item, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self.file.close()


class Csv(Sink):
    """detections.csv: a row per detection, as supervision writes it."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder, class_names)
        self.sink = sv.CSVSink(str(folder / "detections.csv"))
        self.sink.open()

    def write(self, frame: Frame, detections: sv.Detections, new: bool = True) -> None:
        if new:
            about = {"frame": frame.number, "time": round(frame.time, 3)} | describe_frame(frame)
            self.sink.append(detections, custom_data=about)

    def close(self) -> None:
        self.sink.close()


class Labels(Sink):
    """Label files for new data, each with the name of its image.

    Frames of videos are written beside them, and images that share their name with another under a new one.
    """

    images = "images"  # folder of these

    def write(self, frame: Frame, detections: sv.Detections, new: bool = True) -> None:
        if new:
            stem = frame.path.stem if frame.path.suffix.lower() in IMAGE_SUFFIXES else frame.path.name
            name = self.unique(f"{stem}.xml").removesuffix(".xml") + (frame.path.suffix.lower() or ".png")
            if frame.video is not None or Path(name).stem != frame.path.stem:
                target = self.folder / self.images / name
                target.parent.mkdir(parents=True, exist_ok=True)
                write_image(target, frame.image)
            self.label(name, frame, detections)

    @abstractmethod
    def label(self, name: str, frame: Frame, detections: sv.Detections) -> None:
        """The labels of one image, which has this name."""


class Voc(Labels):
    """voc/Annotations: an XML for each image."""

    images = "JPEGImages"

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder / "voc", class_names)
        (self.folder / "Annotations").mkdir(parents=True, exist_ok=True)

    def label(self, name: str, frame: Frame, detections: sv.Detections) -> None:
        objects = [item for item in to_objects(detections, self.class_names) if spans_a_pixel(item.box)]
        text = format_voc(name, frame.image.shape[:2], objects)
        (self.folder / "Annotations" / name).with_suffix(".xml").write_text(text, encoding="utf-8")


class Yolo(Labels):
    """yolo/labels: a text file for each image, with class number, centre and sides in shares of the image."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder / "yolo", class_names)
        (self.folder / "labels").mkdir(parents=True, exist_ok=True)
        write_lines(self.folder / "classes.txt", class_names)

    def label(self, name: str, frame: Frame, detections: sv.Detections) -> None:
        lines = format_yolo(frame.image.shape[:2], to_objects(detections, self.class_names), self.class_names)
        text = "".join(line + "\n" for line in lines)
        (self.folder / "labels" / name).with_suffix(".txt").write_text(text, encoding="utf-8")


class Coco(Labels):
    """coco/annotations.json: one file for all images."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder / "coco", class_names)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = CocoFile(class_names)

    def label(self, name: str, frame: Frame, detections: sv.Detections) -> None:
        image_id = len(self.file.images) + 1
        self.file.add_image(image_id, name, frame.image.shape[:2])
        objects = to_objects(detections, self.class_names)
        for item, score in zip(objects, detections.confidence, strict=True):
            self.file.add_object(image_id, item, score=round(float(score), 5))

    def close(self) -> None:
        self.file.write(self.folder / "annotations.json")


class Crops(Sink):
    """crops: each detection cut out, in a folder per class."""

    def write(self, frame: Frame, detections: sv.Detections, new: bool = True) -> None:
        for i, (box, label) in enumerate(zip(detections.xyxy, detections.class_id, strict=True)):
            crop = sv.crop_image(frame.image, box)
            if crop.size and new:
                folder = "".join(
                    letter if letter.isalnum() or letter in " -" else "_" for letter in self.class_names[label]
                )
                write_image(self.place(f"crops/{folder}/{frame.path.stem}_{i}.png"), crop)


class Counts(Sink):
    """How many objects of each class there were, printed per image, and in all; of videos only in all frames."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder, class_names)
        self.total: Counter[str] = Counter()
        self.tracked: dict[str, set[tuple[str, int]]] = {}

    def write(self, frame: Frame, detections: sv.Detections, new: bool = True) -> None:
        if not new:
            return
        names = [self.class_names[label] for label in detections.class_id]
        self.total += Counter(names)
        if frame.video is None:
            print(f"{frame.path}: {describe(Counter(names))}")
        for name, track in zip(names, track_ids(detections), strict=True):
            if track is not None:
                self.tracked.setdefault(name, set()).add((frame.video.name if frame.video else "", track))

    def close(self) -> None:
        print(f"in all: {describe(self.total)}")
        if self.tracked:
            print(f"tracks: {describe(Counter({name: len(ids) for name, ids in self.tracked.items()}))}")


class HeatMap(Sink):
    """heat_NAME.jpg: how often objects were where, over the last frame of a video, or the last image of a size."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder, class_names)
        self.maps: dict[Any, tuple[sv.HeatMapAnnotator, np.ndarray]] = {}  # by video, or size, with the picture so far

    def write(self, frame: Frame, detections: sv.Detections, new: bool = True) -> None:
        if not new:
            return
        height, width = frame.image.shape[:2]
        key = frame.video or (width, height)
        scale = min(1.0, HEAT_SIDE / max(height, width))
        sides = max(1, round(width * scale)), max(1, round(height * scale))
        small = cv2.resize(frame.image, sides, interpolation=cv2.INTER_AREA)
        radius = max(3, min(small.shape[:2]) // 20)
        annotator, _ = self.maps.get(key, (sv.HeatMapAnnotator(sv.Position.CENTER, 0.5, radius), None))
        centres = replace(detections, xyxy=detections.xyxy * scale)
        self.maps[key] = annotator, annotator.annotate(np.ascontiguousarray(small[..., ::-1]), centres)

    def close(self) -> None:
        for key, (_, picture) in self.maps.items():
            name = key.stem if isinstance(key, Video) else f"{key[0]}x{key[1]}"
            write_image(self.place(f"heat_{name}.jpg"), picture[..., ::-1])


SINKS: dict[str, Callable[[Path, Sequence[str]], Sink]] = {
    "pictures": Pictures,
    "jsonl": JsonLines,
    "csv": Csv,
    "voc": Voc,
    "yolo": Yolo,
    "coco": Coco,
    "crops": Crops,
    "counts": Counts,
    "heatmap": HeatMap,
    "window": Window,
}


def describe_frame(frame: Frame) -> dict[str, Any]:
    """Which image it is, or which frame of which video."""
    if frame.video is None:
        return {"image": str(frame.path)}
    return {"image": frame.video.name, "frame": frame.number, "time": round(frame.time, 3)}


def describe_detections(detections: sv.Detections, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Class, score and box (xyxy pixels) of each, and its track where it has one."""
    columns = zip(detections.xyxy, detections.confidence, detections.class_id, track_ids(detections), strict=True)
    return [
        {
            "class": class_names[label],
            "score": round(float(score), 5),
            "box": [round(float(edge), 2) for edge in box],
        }
        | ({} if track is None else {"track": track})
        for box, score, label, track in columns
    ]


def to_objects(detections: sv.Detections, class_names: Sequence[str]) -> list[LabeledObject]:
    """The detections as objects of an annotation, rounded like those in `describe_detections`."""
    items = describe_detections(detections, class_names)
    return [LabeledObject(item["class"], item["box"], False) for item in items]


def track_ids(detections: sv.Detections) -> list[int | None]:
    """The track of each detection; None where there is none, or not yet."""
    if detections.tracker_id is None:
        return [None] * len(detections)
    return [int(track) if track >= 0 else None for track in detections.tracker_id]


def describe(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "nothing"
