"""Convert labels between VOC, COCO and YOLO: python tools/convert_data.py --source DATA --to voc --out VOCdevkit/MySet

The source format is detected: VOC (Annotations/, or XML files next to the images, as exported by LabelImg, CVAT and
Label Studio), COCO (a .json file, or a folder with one) or YOLO (images/ and labels/). VOC's `difficult` becomes
COCO's `iscrowd`. Images are copied unchanged. Fields that the target format cannot store are reported.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.data.label_readers import LabelSet, fits_on_line, read_coco, read_voc, read_yolo
from utils.data.label_writers import drop_thin_objects, write_coco, write_voc, write_yolo
from utils.system.cli import run_script
from utils.system.diagnostics import Diagnostics
from utils.system.errors import UserError

WRITERS = {"voc": write_voc, "coco": write_coco, "yolo": write_yolo}


@dataclass(frozen=True)
class Config:
    """Convert labels between VOC, COCO and YOLO."""

    source: str  # folder of the dataset, or a COCO JSON file
    to: Literal["voc", "coco", "yolo"]  # target format
    out: str  # new folder for the result
    images: str = ""  # folder of the images; empty: detected from the folder layout
    classes: str = ""  # class file for VOC or YOLO; empty: found in the source, or alphabetical for VOC


def main(config: Config) -> LabelSet:
    """Convert the labels; returns what was written."""
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; choose a new folder with --out")
    diagnostics = Diagnostics()
    labels, source_format = read_labels(config, diagnostics)
    if not labels.images:
        raise UserError(f"{config.source} has no {source_format} labels")
    invalid = [name for name in labels.class_names if not fits_on_line(name)]
    if invalid:
        raise UserError(f"{config.source} has a class {invalid[0]!r}, which a class file cannot store; rename it")
    lost, count = list(labels.notes), len(labels.objects)
    if config.to == "voc":
        labels = drop_thin_objects(labels)
        if thin := count - len(labels.objects):
            lost.append(f"{thin} objects less than a pixel wide or high")
    difficult = sum(item.difficult for item in labels.objects)
    if config.to == "yolo" and difficult:
        lost.append(f"the difficult flag of {difficult} objects")
    diagnostics.check_skip_limit(len(labels.images), len(labels.objects))
    WRITERS[config.to](out, labels)
    diagnostics.print_summary(config.source, print)
    for what in lost:
        print(f"not converted, because the {config.to.upper()} format cannot store it: {what}")
    print(f"{out}: {len(labels.images)} images, {len(labels.objects)} objects of {len(labels.class_names)} classes")
    print("splits: " + (", ".join(f"{name} {len(names)}" for name, names in labels.splits.items()) or "none"))
    return labels


def read_labels(config: Config, diagnostics: Diagnostics) -> tuple[LabelSet, str]:
    """The labels, and the name of their format."""
    source = Path(config.source)
    images, classes = (Path(name) if name else None for name in (config.images, config.classes))
    if not source.exists():
        raise UserError(f"the dataset {source} does not exist")
    if source.suffix == ".json" or any(source.glob("annotations/*.json")):
        return read_coco(source, images, diagnostics), "COCO"
    if (source / "labels").is_dir():  # checked before *.json, since Label Studio adds a notes.json
        return read_yolo(source, images, classes, diagnostics), "YOLO"
    if any(source.glob("*.json")):
        return read_coco(source, images, diagnostics), "COCO"
    if source.is_dir() and next(source.rglob("*.xml"), None):
        return read_voc(source, images, classes, diagnostics), "VOC"
    raise UserError(f"{source} has neither VOC's Annotations/, nor a COCO .json file, nor YOLO's labels/")


if __name__ == "__main__":
    run_script(main, Config)
