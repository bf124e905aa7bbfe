"""Dataset reports: statistics, diagnostics, near-duplicates and examples, as text, JSON and a self-contained page."""

import json
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
from utils.data.statistics import InspectedSample, anchor_fit, describe_samples, summarize
from utils.data.voc import Sample
from utils.inference.drawing import draw_view
from utils.reports.html import data_uri, write_page
from utils.reports.plots import draw_counts, draw_shapes
from utils.system.diagnostics import Diagnostic, Diagnostics
from utils.system.files import write_text

TEXT, JSON, PAGE = "check.txt", "check.json", "check.html"
TEMPLATE = "dataset_report.html"
PLOTS = {"classes.png": "Objects per class", "shapes.png": "Training objects and anchors"}
NUM_EXAMPLES = 6  # images of each part on the page
MAX_PAIRS = 12  # near-duplicates on the page; the JSON contains all
MAX_LISTED = 300  # diagnostics on the page; the JSON contains all
KINDS = ("error", "skip", "repair")


@dataclass(frozen=True)
class Part:
    """The sets for training, validation or testing, and what was found in them."""

    sets: Sequence[str]
    found: Sequence[InspectedSample]
    diagnostics: Diagnostics
    stops: bool  # whether training reads this part and so stops at its errors

    @property
    def usable(self) -> list[InspectedSample]:
        return [item for item in self.found if item.sample]

    @property
    def samples(self) -> list[Sample]:
        """The usable samples, with the true sizes of their images."""
        return [item.sample for item in self.usable]


class Duplicate(NamedTuple):
    """Two nearly identical images in different parts."""

    parts: tuple[str, str]
    samples: tuple[Sample, Sample]
    bits: int  # number of different bits of their 64-bit hashes


@dataclass(frozen=True)
class DatasetReport:
    """A dataset and everything that was found in it."""

    class_names: Sequence[str]
    parts: Mapping[str, Part]  # train, val, test
    settings: Diagnostics  # of the class file and the anchors
    duplicates: Sequence[Duplicate]
    sides: Tensor  # (N, 2) width and height of the training objects, in input pixels
    anchors: Tensor  # (A, 2), empty if they could not be read

    @property
    def diagnostics(self) -> dict[str, list[Diagnostic]]:
        """All diagnostics by part; parts without any are left out."""
        by_part = {"settings": self.settings, **{name: part.diagnostics for name, part in self.parts.items()}}
        return {name: diagnostics.found for name, diagnostics in by_part.items() if diagnostics.found}

    @property
    def stops(self) -> int:
        """The number of errors that would stop a training run."""
        read = [self.settings, *(part.diagnostics for part in self.parts.values() if part.stops)]
        return sum(item.kind == "error" for diagnostics in read for item in diagnostics.found)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of the JSON file."""
        parts = {
            name: {"sets": list(part.sets)} | summarize(part.found, self.class_names)
            for name, part in self.parts.items()
        }
        fit = anchor_fit(self.sides, self.anchors) if len(self.anchors) else None
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
        if fit := self.summary["anchors"]:
            draw_shapes(self.sides.numpy(), self.anchors.numpy(), fit["best_possible_recall"], folder / "shapes.png")
        self.write_page(folder)

    def format_text(self) -> str:
        """The report as plain text."""
        lines = [line for name in self.parts for line in self.describe_part(name)]
        summary = self.summary
        if summary["unused_classes"]:
            lines.append(f"classes without objects: {', '.join(summary['unused_classes'])}")
        if fit := summary["anchors"]:
            lines.append(
                f"anchors: best possible recall {fit['best_possible_recall']:.4f}, mean IoU {fit['mean_iou']:.4f}"
            )
        lines.append(f"near-duplicates across train, val and test: {len(self.duplicates) or 'none'}")
        for (first, second), (one, other), _ in self.duplicates[:MAX_PAIRS]:
            lines.append(f"  {first}: {one.image} and {second}: {other.image}")
        self.settings.print_summary("settings", lines.append)
        for name, part in self.parts.items():
            part.diagnostics.print_summary(name, lines.append)
        return "\n".join([*lines, f"training would {'start' if summary['would_start'] else 'not start'}"])

    def describe_part(self, name: str) -> list[str]:
        """The statistics of a part, one per line."""
        about = self.summary["parts"][name]
        sizes = [f"{size} ({count})" for size, count in list(about["image_sizes"].items())[:3]]
        others = len(about["image_sizes"]) - len(sizes)
        lines = [
            f"{name}: {describe_samples(self.parts[name].samples, self.class_names)}",
            f"  {about['unusable']} unusable images; of {about['objects']} objects, {about['difficult']} are difficult "
            f"and {about['truncated']} truncated",
            f"  image sizes: {', '.join(sizes)}" + (f" and {others} more" if others else ""),
        ]
        for title, key in (
            ("image aspect ratio (width / height)", "image_aspect"),
            ("object size (square root of the area)", "object_side"),
            ("object aspect ratio (width / height)", "object_aspect"),
        ):
            if about[key]:
                low, median, high = about[key]
                lines.append(f"  {title}: {low:g} to {high:g}, median {median:g}")
        return lines

    def write_page(self, folder: Path) -> None:
        """Write PAGE with all its pictures inside."""
        items = [(name, item) for name, found in self.diagnostics.items() for item in found]
        items.sort(key=lambda entry: KINDS.index(entry[1].kind))
        plots = [(title, folder / name) for name, title in PLOTS.items() if (folder / name).exists()]
        write_page(
            folder / PAGE,
            TEMPLATE,
            summary=self.summary,
            class_names=self.class_names,
            listed=items[:MAX_LISTED],
            counts={kind: sum(item.kind == kind for _, item in items) for kind in KINDS},
            plots=[(title, data_uri(path.read_bytes(), "png")) for title, path in plots],
            examples={name: list(map(self.show, pick_examples(part))) for name, part in self.parts.items()},
            pairs=[
                list(zip(item.parts, map(self.show, item.samples), strict=True)) for item in self.duplicates[:MAX_PAIRS]
            ],
        )

    def show(self, sample: Sample) -> tuple[str, str]:
        """The name of an image, and the data: URI of the image with its labels."""
        image, _ = read_sample(sample)
        known = sample.labels >= 0
        objects = sv.Detections(sample.boxes[known], class_id=sample.labels[known])
        view = draw_view(image, objects, self.class_names, np.zeros((0, 4)))
        return sample.name, data_uri(encode_image(view, ".jpg"), "jpeg")


def pick_examples(part: Part) -> list[Sample]:
    """At most NUM_EXAMPLES images with objects, evenly spaced over the part."""
    labelled = [sample for sample in part.samples if len(sample.labels)]
    return labelled[:: -(-len(labelled) // NUM_EXAMPLES)] if labelled else []
