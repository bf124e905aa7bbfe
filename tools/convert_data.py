"""Convert labels between VOC, COCO and YOLO: python tools/convert_data.py --source DATA --to voc --out VOCdevkit/MySet

Which layout the source has is seen: VOC (Annotations/, or XML files beside the images, as LabelImg, CVAT and Label
Studio write them), COCO (a .json, or a folder with some) or YOLO (images/ and labels/). VOC's `difficult` is COCO's
`iscrowd`. Images are copied as they are, the source stays as it was, and what the new layout cannot hold is said.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.data.label_readers import LabelSet, is_line, read_coco, read_voc, read_yolo
from utils.data.label_writers import drop_thin_objects, write_coco, write_voc, write_yolo
from utils.system.cli import run_script
from utils.system.diagnostics import Diagnostics
from utils.system.errors import UserError

WRITERS = {"voc": write_voc, "coco": write_coco, "yolo": write_yolo}


@dataclass(frozen=True)
class Config:
    """Convert labels between VOC, COCO and YOLO."""

    source: str  # folder of the data set, or COCO's JSON
    to: Literal["voc", "coco", "yolo"]  # the layout to write
    out: str  # a new folder for it
    images: str = ""  # folder of the images; empty: where the layout has them
    classes: str = ""  # class names in their order; empty: what the source says, of VOC else the alphabet

    def paths(self) -> tuple[Path, Path | None, Path | None]:
        """Of the source, the images and the class file."""
        return Path(self.source), *(Path(name) if name else None for name in (self.images, self.classes))


def main(config: Config) -> LabelSet:
    """Convert; returns what was written."""
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; choose a new folder as --out")
    diagnostics = Diagnostics()
    labels, layout = read(config, diagnostics)
    if not labels.items:
        raise UserError(f"{config.source} has no labels in the layout of {layout}")
    odd = [name for name in labels.class_names if not is_line(name)]
    if odd:
        raise UserError(f"{config.source} has a class {odd[0]!r}, which is no line of a class file; rename it")
    lost = list(labels.notes)
    if config.to == "voc":
        labels, thin = drop_thin_objects(labels)
        lost += [f"{thin} objects narrower or lower than a pixel"] if thin else []
    objects = [item for labelled in labels.items.values() for item in labelled.objects]
    difficult = sum(item[2] for item in objects)
    if config.to == "yolo" and difficult:
        lost.append(f"the mark of {difficult} difficult objects")
    diagnostics.check_skip_limit(len(labels.items), len(objects))
    WRITERS[config.to](out, labels)
    diagnostics.print_summary(config.source, print)
    for what in lost:
        print(f"not carried over, since this {config.to.upper()} has no place for it: {what}")
    print(f"{out}: {len(labels.items)} images, {len(objects)} objects of {len(labels.class_names)} classes")
    print("splits: " + (", ".join(f"{name} {len(names)}" for name, names in labels.splits.items()) or "none"))
    return labels


def read(config: Config, diagnostics: Diagnostics) -> tuple[LabelSet, str]:
    """The data set, and the layout that it has."""
    source, images, classes = config.paths()
    if not source.exists():
        raise UserError(f"there is no data set {source}")
    if source.suffix == ".json" or any(source.glob("annotations/*.json")):
        return read_coco(source, images, diagnostics), "COCO"
    if (source / "labels").is_dir():  # where Label Studio also leaves a notes.json
        return read_yolo(source, images, classes, diagnostics), "YOLO"
    if any(source.glob("*.json")):
        return read_coco(source, images, diagnostics), "COCO"
    if source.is_dir() and next(source.rglob("*.xml"), None):
        return read_voc(source, images, classes, diagnostics), "VOC"
    raise UserError(f"{source} has no Annotations/ of VOC, no .json of COCO and no labels/ of YOLO")


if __name__ == "__main__":
    run_script(main, Config)
