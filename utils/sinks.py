"""Where detections go: annotated pictures, JSON lines, crops, counts. Each sink takes every frame in turn."""

import json
from collections import Counter
from pathlib import Path
from typing import Protocol

import supervision as sv

from utils.images import draw_detections, write_image
from utils.sources import Frame
from utils.voc import IMAGE_SUFFIXES


class Sink(Protocol):
    """Takes the detections of one frame after the other."""

    def write(self, frame: Frame, detections: sv.Detections) -> None: ...

    def close(self) -> None: ...


class Pictures:
    """An annotated copy of each image, under its own name, or with a number where two have the same."""

    def __init__(self, folder: Path, class_names: tuple[str, ...]) -> None:
        self.folder = folder
        self.class_names = class_names
        self.written: Counter[str] = Counter()
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        known = frame.path.suffix.lower() in IMAGE_SUFFIXES
        name = numbered(frame.path.name if known else f"{frame.path.name}.png", self.written)
        write_image(self.folder / name, draw_detections(frame.image, detections, self.class_names))

    def close(self) -> None:
        pass


class JsonLines:
    """One line per detection: image, class, score, box (xyxy pixels)."""

    def __init__(self, path: Path, class_names: tuple[str, ...]) -> None:
        self.class_names = class_names
        self.file = path.open("w", encoding="utf-8")

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        for box, score, label in zip(detections.xyxy, detections.confidence, detections.class_id, strict=True):
            line = {
                "image": str(frame.path),
                "class": self.class_names[label],
                "score": round(float(score), 5),
                "box": [round(float(edge), 2) for edge in box],
            }
            self.file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self.file.close()


class Crops:
    """Each detection cut out, in a folder per class."""

    def __init__(self, folder: Path, class_names: tuple[str, ...]) -> None:
        self.folder = folder
        self.class_names = class_names
        self.written: Counter[str] = Counter()

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        for i, (box, label) in enumerate(zip(detections.xyxy, detections.class_id, strict=True)):
            crop = sv.crop_image(frame.image, box)
            if crop.size:
                folder = "".join(
                    letter if letter.isalnum() or letter in " -" else "_" for letter in self.class_names[label]
                )
                target = self.folder / numbered(f"{folder}/{frame.path.stem}_{i}.png", self.written)
                target.parent.mkdir(parents=True, exist_ok=True)
                write_image(target, crop)

    def close(self) -> None:
        pass


class Counts:
    """How many objects of each class there were, printed per image and in all."""

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self.class_names = class_names
        self.total: Counter[str] = Counter()

    def write(self, frame: Frame, detections: sv.Detections) -> None:
        counts = Counter(self.class_names[label] for label in detections.class_id)
        self.total += counts
        print(f"{frame.path}: {describe(counts)}")

    def close(self) -> None:
        print(f"in all: {describe(self.total)}")


def numbered(name: str, written: Counter[str]) -> str:
    """The name, with a number before its suffix where it was written before."""
    written[name] += 1
    path = Path(name)
    return name if written[name] == 1 else str(path.with_name(f"{path.stem}_{written[name]}{path.suffix}"))


def describe(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "nothing"
