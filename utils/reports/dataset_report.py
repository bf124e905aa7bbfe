"""What a check of a data set leaves in its folder: text, JSON, plots, and one page that needs nothing else."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import supervision as sv
from torch import Tensor

from utils.data.image_io import encode_image
from utils.data.image_checks import read_sample
from utils.data.statistics import Inspected, anchor_fit, describe_samples, summarize
from utils.data.voc import Sample
from utils.inference.drawing import draw_view
from utils.reports.html import data_uri, write_page
from utils.reports.plots import draw_counts, draw_shapes
from utils.system.diagnostics import Diagnostic, Diagnostics
from utils.system.files import write_text

TEXT, JSON, PAGE = "check.txt", "check.json", "check.html"
TEMPLATE = "dataset_report.html"
PLOTS = {"classes.png": "objects of each class", "shapes.png": "objects to train on, and anchors"}
EXAMPLES = 6  # pictures of each part
PAIRS = 12  # near-duplicates shown; the JSON has all
LISTED = 300  # diagnostics on the page
KINDS = ("error", "skip", "repair")


@dataclass(frozen=True)
class Part:
    """The sets to train on, to validate on or to test on, and what was found in them."""

    sets: Sequence[str]
    found: Sequence[Inspected]
    diagnostics: Diagnostics
    stops: bool  # whether a training reads it, and stops at its errors

    @property
    def usable(self) -> list[Inspected]:
        return [item for item in self.found if item.sample]

    @property
    def samples(self) -> list[Sample]:
        """Those that can be used, with the true sizes of their images."""
        return [item.sample for item in self.usable]


class Duplicate(NamedTuple):
    """Two images that are nearly the same, in two parts."""

    parts: tuple[str, str]
    samples: tuple[Sample, Sample]
    bits: int  # of 64 in which their hashes differ


@dataclass(frozen=True)
class DataReport:
    """A data set, and everything that was found in it."""

    class_names: Sequence[str]
    parts: Mapping[str, Part]  # train, val, test
    settings: Diagnostics  # in class file and anchors
    duplicates: Sequence[Duplicate]
    sides: Tensor  # (N, 2) width and height of the objects to train on, in input pixels
    anchors: Tensor  # (A, 2) those that the heads use; none if they cannot be read

    @property
    def diagnostics(self) -> dict[str, list[Diagnostic]]:
        """By part, where there are some."""
        every = {"settings": self.settings, **{name: part.diagnostics for name, part in self.parts.items()}}
        return {name: diagnostics.found for name, diagnostics in every.items() if diagnostics.found}

    @property
    def stops(self) -> int:
        """Errors that a training would stop at."""
        read = [self.settings, *(part.diagnostics for part in self.parts.values() if part.stops)]
        return sum(problem.kind == "error" for diagnostics in read for problem in diagnostics.found)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the JSON has."""
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
            "problems": {name: [problem._asdict() for problem in found] for name, found in self.diagnostics.items()},
        }

    def write(self, folder: Path) -> None:
        """All files."""
        write_text(folder / JSON, json.dumps(self.summary, indent=2, ensure_ascii=False) + "\n")
        write_text(folder / TEXT, self.text() + "\n")
        for name in PLOTS:
            (folder / name).unlink(missing_ok=True)
        draw_counts({name: part["classes"] for name, part in self.summary["parts"].items()}, folder / "classes.png")
        if fit := self.summary["anchors"]:
            draw_shapes(self.sides.numpy(), self.anchors.numpy(), fit["best_possible_recall"], folder / "shapes.png")
        self.write_page(folder)

    def text(self) -> str:
        lines = [line for name in self.parts for line in self.describe_part(name)]
        summary = self.summary
        if summary["unused_classes"]:
            lines.append(f"classes without any object: {', '.join(summary['unused_classes'])}")
        if fit := summary["anchors"]:
            lines.append(
                f"anchors: best possible recall {fit['best_possible_recall']:.4f}, mean IoU {fit['mean_iou']:.4f}"
            )
        lines.append(f"near-duplicates across train, val and test: {len(self.duplicates) or 'none'}")
        for (first, second), (one, other), _ in self.duplicates[:PAIRS]:
            lines.append(f"  {first}: {one.image} and {second}: {other.image}")
        self.settings.print_summary("settings", lines.append)
        for name, part in self.parts.items():
            part.diagnostics.print_summary(name, lines.append)
        return "\n".join([*lines, f"a training would {'start' if summary['would_start'] else 'not start'}"])

    def describe_part(self, name: str) -> list[str]:
        about = self.summary["parts"][name]
        sizes = [f"{size} ({count})" for size, count in list(about["image_sizes"].items())[:3]]
        several = len(about["image_sizes"]) - len(sizes)
        lines = [
            f"{name}: {describe_samples(self.parts[name].samples, self.class_names)}",
            f"  {about['unusable']} images unusable; of {about['objects']} objects {about['difficult']} difficult, "
            f"{about['truncated']} truncated",
            f"  image sizes {', '.join(sizes)}" + (f" and {several} more" if several else ""),
        ]
        for title, key in (
            ("width / height of images", "image_aspect"),
            ("root of the area of objects", "object_side"),
            ("width / height of objects", "object_aspect"),
        ):
            if about[key]:
                least, median, most = about[key]
                lines.append(f"  {title}: {least:g} to {most:g}, median {median:g}")
        return lines

    def write_page(self, folder: Path) -> None:
        """The page, with all its pictures inside."""
        every = [(name, item) for name, found in self.diagnostics.items() for item in found]
        listed = [(name, item) for kind in KINDS for name, item in every if item.kind == kind]
        write_page(
            folder / PAGE,
            TEMPLATE,
            summary=self.summary,
            class_names=self.class_names,
            listed=listed[:LISTED],
            counts={kind: sum(item.kind == kind for _, item in listed) for kind in KINDS},
            plots=[
                (title, data_uri((folder / name).read_bytes(), "png"))
                for name, title in PLOTS.items()
                if (folder / name).exists()
            ],
            examples={name: [self.picture(sample) for sample in examples(part)] for name, part in self.parts.items()},
            pairs=[
                list(zip(item.parts, map(self.picture, item.samples), strict=True)) for item in self.duplicates[:PAIRS]
            ],
        )

    def picture(self, sample: Sample) -> tuple[str, str]:
        """An image's name, and the image with its labels as an address that holds it."""
        image, _ = read_sample(sample)
        known = sample.labels >= 0
        objects = sv.Detections(sample.boxes[known], class_id=sample.labels[known])
        view = draw_view(image, objects, self.class_names, np.zeros((0, 4)))
        return sample.name, data_uri(encode_image(view, ".jpg"), "jpeg")


def examples(part: Part) -> list[Sample]:
    """Some images with objects, from all over the part."""
    full = [sample for sample in part.samples if len(sample.labels)]
    return full[:: -(-len(full) // EXAMPLES)] if full else []
