"""Dataset reports: statistics, diagnostics, near-duplicates and examples, as text, JSON and self-contained HTML."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import supervision as sv
from torch import Tensor

from utils.data.image_checks import read_sample
from utils.data.image_io import encode_image
from utils.data.statistics import AnchorFit, InspectedSample, anchor_fit, summarize
from utils.data.voc import Sample
from utils.inference.drawing import draw_view
from utils.reports.html import data_uri, write_page
from utils.reports.plots import draw_counts, draw_shapes
from utils.system.diagnostics import Diagnostic, Diagnostics
from utils.system.files import write_text
from utils.system.text import format_table

TEXT, JSON, PAGE = "check.txt", "check.json", "check.html"
TEMPLATE = "dataset_report.html"
PLOTS = {"classes.png": "Objects per class", "shapes.png": "Training objects and anchors"}
NUM_EXAMPLES = 6  # images of each part on the page
MAX_PAIRS = 12  # maximum number of near-duplicates on the page; the JSON contains all
MAX_LISTED = 300  # maximum number of diagnostics on the page; the JSON contains all
MAX_SIZES = 1  # image sizes in the table, the most frequent ones
STATISTICS = ("images", "unusable", "without_objects", "difficult", "truncated")
STATISTICS += ("image_sizes", "image_aspect", "object_side", "object_aspect", "objects")  # rows of the table


@dataclass(frozen=True)
class Part:
    """The sets for training, validation or testing, and the findings in them."""

    sets: Sequence[str]
    found: Sequence[InspectedSample]
    diagnostics: Diagnostics
    stops: bool  # whether errors in this part stop training

    @property
    def usable(self) -> list[InspectedSample]:
        return [item for item in self.found if item.sample]

    @property
    def samples(self) -> list[Sample]:
        return [item.sample for item in self.usable]


class Duplicate(NamedTuple):
    """Two nearly identical images in different parts."""

    parts: tuple[str, str]
    samples: tuple[Sample, Sample]
    bits: int  # Hamming distance of their 64-bit hashes


@dataclass(frozen=True)
class DatasetReport:
    """The findings in a dataset."""

    class_names: Sequence[str]
    parts: Mapping[str, Part]  # train, val, test
    settings: Diagnostics  # of the class file and the anchors
    duplicates: Sequence[Duplicate]
    sides: Tensor  # (N, 2) width and height of the training objects, in input pixels
    anchors: Tensor  # (A, 2), empty if they could not be read

    @property
    def diagnostics(self) -> dict[str, list[Diagnostic]]:
        """All diagnostics by part, without parts that have none."""
        by_part = {"settings": self.settings, **{name: part.diagnostics for name, part in self.parts.items()}}
        return {name: diagnostics.found for name, diagnostics in by_part.items() if diagnostics.found}

    @property
    def stops(self) -> int:
        """The number of errors that would stop a training run."""
        read = [self.settings, *(part.diagnostics for part in self.parts.values() if part.stops)]
        return sum(item.kind == "error" for diagnostics in read for item in diagnostics.found)

    @cached_property
    def anchor_fit(self) -> AnchorFit | None:
        return anchor_fit(self.sides, self.anchors) if len(self.anchors) else None

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of the JSON file."""
        parts = {
            name: {"sets": list(part.sets)} | summarize(part.found, self.class_names)
            for name, part in self.parts.items()
        }
        fit = self.anchor_fit
        return {
            "would_start": not self.stops,
            "parts": parts,
            "unused_classes": [
                name for name in self.class_names if not any(part["classes"][name] for part in parts.values())
            ],
            "anchors": fit and {"best_possible_recall": fit.recall, "mean_iou": fit.mean_iou},
            "near_duplicates": [
                {"parts": list(item.parts), "images": [str(one.image) for one in item.samples], "bits": item.bits}
                for item in self.duplicates
            ],
            "problems": {name: [item._asdict() for item in found] for name, found in self.diagnostics.items()},
        }

    def write(self, folder: Path) -> None:
        """Write the text, the JSON, the plots and the page."""
        write_text(folder / JSON, json.dumps(self.summary, indent=2, ensure_ascii=False) + "\n")
        write_text(folder / TEXT, self.format_text() + "\n")
        for name in PLOTS:
            (folder / name).unlink(missing_ok=True)
        draw_counts({name: part["classes"] for name, part in self.summary["parts"].items()}, folder / "classes.png")
        if self.anchor_fit:
            draw_shapes(self.sides.numpy(), self.anchors.numpy(), self.anchor_fit.recall, folder / "shapes.png")
        self.write_page(folder)

    def format_text(self) -> str:
        lines = [format_table(self.list_statistics())]
        if unused := self.summary["unused_classes"]:
            lines.append(f"classes without objects: {', '.join(unused)}")
        if self.anchor_fit:
            lines.append(f"anchors: {self.anchor_fit}")
        lines.append(f"near-duplicates across train, val and test: {len(self.duplicates) or 'none'}")
        for (first, second), (one, other), _ in self.duplicates[:MAX_PAIRS]:
            lines.append(f"  {first}: {one.image} and {second}: {other.image}")
        self.settings.print_summary("settings", lines.append)
        for name, part in self.parts.items():
            part.diagnostics.print_summary(name, lines.append)
        return "\n".join([*lines, f"training would {'not ' if self.stops else ''}start"])

    def list_statistics(self) -> list[list[str]]:
        parts = self.summary["parts"].values()
        rows = [[key.replace("_", " "), *(format_statistic(part[key]) for part in parts)] for key in STATISTICS]
        rows += [[name, *(str(part["classes"][name]) for part in parts)] for name in self.class_names]
        return [["", *self.parts], *rows]

    def write_page(self, folder: Path) -> None:
        """Write the self-contained HTML page."""
        draw = self.draw_sample
        items = [(name, item) for name, found in self.diagnostics.items() for item in found]
        items.sort(key=lambda entry: entry[1].kind)  # errors first
        plots = [(title, folder / name) for name, title in PLOTS.items() if (folder / name).exists()]
        write_page(
            folder / PAGE,
            TEMPLATE,
            summary=self.summary,
            statistics=self.list_statistics(),
            listed=items[:MAX_LISTED],
            counts=Counter(item.kind for _, item in items),
            plots=[(title, data_uri(path.read_bytes(), "png")) for title, path in plots],
            examples={name: [*map(draw, pick_examples(part.samples))] for name, part in self.parts.items()},
            pairs=[[*zip(parts, map(draw, two), strict=True)] for parts, two, _ in self.duplicates[:MAX_PAIRS]],
        )

    def draw_sample(self, sample: Sample) -> tuple[str, str]:
        """The name of an image, and a data URI of it with its labels."""
        image, _ = read_sample(sample)
        known = sample.labels >= 0
        objects = sv.Detections(sample.boxes[known], class_id=sample.labels[known])
        view = draw_view(image, objects, self.class_names, np.zeros((0, 4)))
        return sample.name, data_uri(encode_image(view, ".jpg"), "jpeg")


def format_statistic(value: int | list[float] | dict[str, int] | None) -> str:
    """Format a number; a range, given as minimum, median and maximum; or the counts of image sizes."""
    if isinstance(value, list):
        return "{0:g} to {2:g}, median {1:g}".format(*value)
    if isinstance(value, dict):
        more = [f"{len(value) - MAX_SIZES} more"] if len(value) > MAX_SIZES else []
        return ", ".join([f"{size} ({count})" for size, count in value.items()][:MAX_SIZES] + more)
    return "" if value is None else str(value)


def pick_examples(samples: Sequence[Sample]) -> Sequence[Sample]:
    labeled = [sample for sample in samples if len(sample.labels)]
    return labeled[:: -(-len(labeled) // NUM_EXAMPLES) or 1]
