"""Outputs for detections: annotated pictures, tables, label files, crops, counts, heat maps and a window."""

import json
import os
import re
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import supervision as sv

from utils.data.image_io import IMAGE_SUFFIXES, write_image
from utils.data.label_writers import CocoFile, format_voc, format_yolo, spans_a_pixel
from utils.data.voc_xml import LabeledObject
from utils.inference.drawing import draw_detections
from utils.inference.video import Frame, Video, VideoWriter

VIDEO_SUFFIX = ".mp4"
WINDOW = "Detections (q or Esc to close)"
CLOSING_KEYS, NO_KEY = (ord("q"), 27), 255
MAX_HEAT_SIDE, MAX_WINDOW_SIDE = 640, 1280  # longer side, in pixels
PIXEL_DECIMALS, SCORE_DECIMALS = 2, 5  # in tables and label files


class WindowClosed(Exception):
    """The user has closed the window."""


class Sink(ABC):
    """Receives frames with their detections one by one, and completes its files in `close`."""

    every_frame = False  # whether it also receives frames with detections carried over from an earlier frame

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        self.folder = folder
        self.class_names = tuple(class_names)
        self.used_names: set[str] = set()  # file names in lower case

    @abstractmethod
    def write(self, frame: Frame, detections: sv.Detections) -> None: ...

    def close(self) -> None:  # noqa: B027, most sinks have nothing to complete
        pass

    def unique_name(self, name: str) -> str:
        """The name, numbered if it was used before (ignoring case)."""
        path, number, unique = Path(name), 1, name
        while unique.casefold() in self.used_names:
            number += 1
            unique = str(path.with_name(f"{path.stem}_{number}{path.suffix}"))
        self.used_names.add(unique.casefold())
        return unique

    def new_path(self, name: str) -> Path:
        """A path for a file with this name, in an existing folder."""
        path = self.folder / self.unique_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class Pictures(Sink):
    """Annotated copies of images, and of videos as MP4 with the same length and frame rate."""

    every_frame = True

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder, class_names)
        self.writer: VideoWriter | None = None
        self.video: Video | None = None

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        drawn = draw_detections(frame.image, detections, self.class_names)
        if frame.video is None:
            is_known = frame.path.suffix.lower() in IMAGE_SUFFIXES
            write_image(self.new_path(frame.path.name if is_known else f"{frame.path.name}.png"), drawn)
            return
        if frame.video is not self.video:
            self.close()
            path = self.new_path(frame.video.stem + VIDEO_SUFFIX)
            self.writer, self.video = VideoWriter(path, frame.video.rate, drawn.shape[:2]), frame.video
        self.writer.write(drawn, frame.time)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class Window(Sink):
    """A window that shows the frames as they are processed."""

    every_frame = True

    @staticmethod
    def is_available() -> bool:
        """Whether OpenCV supports windows and there is a display."""
        headless = sys.platform.startswith("linux") and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
        gui = [line for line in cv2.getBuildInformation().splitlines() if line.strip().startswith("GUI:")]
        return not headless and bool(gui) and "NONE" not in gui[0]

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        """Show a frame, and wait for a key after an image; raises WindowClosed."""
        drawn = draw_detections(frame.image, detections, self.class_names)
        scale = min(1.0, MAX_WINDOW_SIDE / max(drawn.shape[:2]))
        size = max(1, round(drawn.shape[1] * scale)), max(1, round(drawn.shape[0] * scale))
        cv2.imshow(WINDOW, cv2.cvtColor(cv2.resize(drawn, size), cv2.COLOR_RGB2BGR))
        key = cv2.waitKey(1) & 0xFF
        while frame.video is None and key == NO_KEY and cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) > 0:
            key = cv2.waitKey(50) & 0xFF
        if key in CLOSING_KEYS or cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) < 1:
            raise WindowClosed

    def close(self) -> None:
        with suppress(cv2.error):  # the window may never have been opened
            cv2.destroyAllWindows()


class JsonLines(Sink):
    """detections.jsonl: one detection per line, with image, class, score and box (x1, y1, x2, y2 in pixels)."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder, class_names)
        self.file = (folder / "detections.jsonl").open("w", encoding="utf-8")

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        columns = zip(detections.xyxy, detections.confidence, detections.class_id, track_ids(detections), strict=True)
        for box, score, label, track in columns:
            edges = [round(float(edge), PIXEL_DECIMALS) for edge in box]
            item = {"class": self.class_names[label], "score": round(float(score), SCORE_DECIMALS), "box": edges}
            item |= {} if track is None else {"track": track}
            self.file.write(json.dumps(describe_frame(frame) | item, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self.file.close()


class Csv(Sink):
    """detections.csv: a row per detection."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder, class_names)
        self.sink = sv.CSVSink(str(folder / "detections.csv"))
        self.sink.open()

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        common = {"frame": frame.number, "time": round(frame.time, 3)} | describe_frame(frame)
        self.sink.append(detections, custom_data=common)

    def close(self) -> None:
        self.sink.close()


class Labels(Sink):
    """Writes label files for new datasets, and copies video frames and images with duplicate names beside them."""

    root: str
    image_folder, label_folder = "images", "labels"

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder / self.root, class_names)
        (self.folder / self.label_folder).mkdir(parents=True, exist_ok=True)

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        suffix = frame.path.suffix.lower()
        stem = frame.path.stem if suffix in IMAGE_SUFFIXES else frame.path.name
        name = self.unique_name(f"{stem}.xml").removesuffix(".xml") + (suffix or ".png")
        if frame.video is not None or Path(name).stem != frame.path.stem:
            target = self.folder / self.image_folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_image(target, frame.image)
        self.write_labels(name, frame.image.shape[:2], detections)

    @abstractmethod
    def write_labels(self, name: str, size: tuple[int, int], detections: sv.Detections) -> None:
        """Write the labels of the image file `name`, whose size is (height, width)."""

    def to_objects(self, detections: sv.Detections, decimals: int = PIXEL_DECIMALS) -> list[LabeledObject]:
        boxes = detections.xyxy.astype(float).round(decimals).tolist()
        names = (self.class_names[label] for label in detections.class_id)
        return [LabeledObject(name, tuple(box), False) for name, box in zip(names, boxes, strict=True)]


class Voc(Labels):
    """Labels in Pascal VOC format, in voc/."""

    root, image_folder, label_folder = "voc", "JPEGImages", "Annotations"

    def write_labels(self, name: str, size: tuple[int, int], detections: sv.Detections) -> None:
        text = format_voc(name, size, [item for item in self.to_objects(detections) if spans_a_pixel(item.box)])
        (self.folder / self.label_folder / name).with_suffix(".xml").write_text(text, encoding="utf-8")


class Yolo(Labels):
    """Labels in YOLO format, in yolo/."""

    root = "yolo"

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder, class_names)
        (self.folder / "classes.txt").write_text("\n".join(class_names) + "\n", encoding="utf-8")

    def write_labels(self, name: str, size: tuple[int, int], detections: sv.Detections) -> None:
        lines = format_yolo(size, self.to_objects(detections, decimals=8), self.class_names)
        text = "".join(f"{line}\n" for line in lines)
        (self.folder / self.label_folder / name).with_suffix(".txt").write_text(text, encoding="utf-8")


class Coco(Labels):
    """Labels in COCO format, with scores, in coco/annotations.json."""

    root, label_folder = "coco", ""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder, class_names)
        self.file = CocoFile(class_names)

    def write_labels(self, name: str, size: tuple[int, int], detections: sv.Detections) -> None:
        image_id = len(self.file.images) + 1
        self.file.add_image(image_id, name, size)
        for item, score in zip(self.to_objects(detections), detections.confidence, strict=True):
            self.file.add_object(image_id, item, score=round(float(score), SCORE_DECIMALS))

    def close(self) -> None:
        self.file.write(self.folder / "annotations.json")


class Crops(Sink):
    """crops/: the cut-out detections, in a folder per class."""

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        for i, (box, label) in enumerate(zip(detections.xyxy, detections.class_id, strict=True)):
            crop = sv.crop_image(frame.image, box)
            if crop.size:
                folder = re.sub(r"[^\w -]", "_", self.class_names[label])
                write_image(self.new_path(f"crops/{folder}/{frame.path.stem}_{i}.png"), crop)


class Counts(Sink):
    """Prints the number of detections per class, for each image and in total."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder, class_names)
        self.total: Counter[str] = Counter()
        self.tracks: dict[str, set[tuple[str, int]]] = {}

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        names = [self.class_names[label] for label in detections.class_id]
        self.total += Counter(names)
        if frame.video is None:
            print(f"{frame.path}: {describe_counts(Counter(names))}")
        for name, track in zip(names, track_ids(detections), strict=True):
            if track is not None:
                self.tracks.setdefault(name, set()).add((frame.video.name if frame.video else "", track))

    def close(self) -> None:
        print(f"total: {describe_counts(self.total)}")
        if self.tracks:
            print(f"tracks: {describe_counts(Counter({name: len(ids) for name, ids in self.tracks.items()}))}")


class HeatMap(Sink):
    """heat_NAME.jpg: a heat map of the positions of objects, for each video and each image size."""

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__(folder, class_names)
        self.maps: dict[Any, tuple[sv.HeatMapAnnotator, np.ndarray]] = {}  # by video or size; with its latest picture

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        height, width = frame.image.shape[:2]
        key = frame.video or (width, height)
        scale = min(1.0, MAX_HEAT_SIDE / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = cv2.resize(frame.image, size, interpolation=cv2.INTER_AREA)
        radius = max(3, min(small.shape[:2]) // 20)
        annotator, _ = self.maps.get(key, (sv.HeatMapAnnotator(sv.Position.CENTER, 0.5, radius), None))
        scaled = replace(detections, xyxy=detections.xyxy * scale)
        self.maps[key] = annotator, annotator.annotate(np.ascontiguousarray(small[..., ::-1]), scaled)

    def close(self) -> None:
        for key, (_, picture) in self.maps.items():
            name = key.stem if isinstance(key, Video) else f"{key[0]}x{key[1]}"
            write_image(self.new_path(f"heat_{name}.jpg"), picture[..., ::-1])


SINKS: dict[str, type[Sink]] = {
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
    if frame.video is None:
        return {"image": str(frame.path)}
    return {"image": frame.video.name, "frame": frame.number, "time": round(frame.time, 3)}


def track_ids(detections: sv.Detections) -> list[int | None]:
    """The track ID of each detection, or None."""
    if detections.tracker_id is None:
        return [None] * len(detections)
    return [int(track) if track >= 0 else None for track in detections.tracker_id]


def describe_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "no detections"
