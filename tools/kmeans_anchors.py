"""Find anchors for a data set: python tools/kmeans_anchors.py --sets MySet/train --classes model_data/my_classes.txt

K-means over the shapes of the objects in pixels of the network's input, with the distance 1 - IoU (arXiv 1612.08242),
so anchors belong to an input size. Writes the anchors for train.py --anchors, and a picture of objects and anchors.
"""

import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nets.spec import ModelSpec, check_input_size
from utils.data.statistics import anchor_fit, input_sides
from utils.data.voc import load_classes, load_samples
from utils.detection.anchors import load_anchors
from utils.detection.boxes import shape_iou
from utils.reports.plots import draw_shapes
from utils.system.cli import run_script
from utils.system.diagnostics import Diagnostics
from utils.system.errors import UserError, as_user_error, check_range, make_folder, refuse_overwrite
from utils.system.files import atomic_write

ROUNDS = 100  # of k-means at most
SAMPLE = 20_000  # objects at most that are clustered, drawn by the seed; more change nothing in the first digits
SETTLED = 1e-3  # share of the objects that change their anchor in its last round
USED = sorted(set(chain(*ModelSpec.anchors_mask)))  # anchors that a head has; Darknet's masks leave out the first


@dataclass(frozen=True)
class Config:
    """Find anchors for a data set."""

    devkit: str = "VOCdevkit"  # folder of the data sets
    sets: tuple[str, ...] = ("VOC2007/train",)  # sets to train on, folder/split, any number
    classes: str = "model_data/voc_classes.txt"  # file with a class name on each line
    anchors: str = "model_data/yolo_anchors.txt"  # anchors to compare with
    out: str = "model_data/my_anchors.txt"  # file for the new ones, with a picture beside it
    input_size: tuple[int, int] = (416, 416)  # height and width of the network's input in the training
    letterbox: bool = False  # whether the training keeps the aspect ratio of images
    starts: int = 5  # the best of so many runs from random objects is taken
    seed: int = 0  # the same seed finds the same anchors

    def __post_init__(self) -> None:
        """Raise UserError for a value that cannot work."""
        check_range(self, 1, 1000, "starts")
        with as_user_error():
            check_input_size(self.input_size)


def main(config: Config) -> Tensor:
    """Find and write the anchors (6, 2); returns them."""
    out, old = Path(config.out), torch.tensor(load_anchors(config.anchors))
    refuse_overwrite(out)
    diagnostics = Diagnostics()
    samples = load_samples(config.devkit, config.sets, load_classes(config.classes, diagnostics), diagnostics)
    diagnostics.print_summary(", ".join(config.sets), print)
    sides = input_sides(samples, config.input_size, config.letterbox)
    print(f"{len(sides)} objects on {len(samples)} images, in an input of {'x'.join(map(str, config.input_size))}")
    new = find_anchors(sides, len(USED), config.starts, config.seed)
    unused = len(old) - len(USED)
    new = torch.cat([new[:1].expand(unused, 2), new])
    fit = anchor_fit(sides, new[USED])
    make_folder(out.parent)
    draw_shapes(sides.numpy(), new[USED].numpy(), fit.recall, out.with_suffix(".png"))
    with atomic_write(out) as file:
        file.write((",  ".join(f"{width:g},{height:g}" for width, height in new.tolist()) + "\n").encode())
    print(f"{config.anchors}: {anchor_fit(sides, old[USED])}")
    print(f"{out}: {fit}; the picture is {out.with_suffix('.png')}")
    if unused:
        print("no head uses the first anchor, so it repeats the second")
    print(f"train with --anchors {out}, the same sets, and this input_size and letterbox")
    return new


def find_anchors(sides: Tensor, count: int, starts: int, seed: int) -> Tensor:
    """Anchors (count, 2) of the greatest mean IoU in several starts, rounded to 0.1 pixel, the smallest area first."""
    shapes = len(sides.unique(dim=0))
    if shapes < count:
        raise UserError(f"{count} anchors need as many shapes of objects, and the sets have {shapes}; add annotations")
    generator = torch.Generator().manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of tensors this small, several would mostly wait for each other
    some = sides[torch.randperm(len(sides), generator=generator)[:SAMPLE]]
    found = [cluster(some, choose_start(some, count, generator)) for _ in range(starts)]
    best = max(found, key=lambda anchors: anchor_fit(some, anchors).mean_iou)
    torch.set_num_threads(threads)
    return best[best.prod(dim=1).argsort()].mul(10).round().clamp(min=1) / 10


def choose_start(sides: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Objects (count, 2) that are unlike each other: k-means++, which draws by the squared distance to those it has."""
    chosen = sides[torch.randint(len(sides), (1,), generator=generator)]
    while len(chosen) < count:
        distance = 1 - shape_iou(sides, chosen).amax(dim=1).double()
        level = distance.clamp(min=0).square().cumsum(dim=0)
        drawn = torch.searchsorted(level, torch.rand(1, generator=generator, dtype=torch.float64) * level[-1])
        chosen = torch.cat([chosen, sides[drawn.clamp(max=len(sides) - 1)]])
    return chosen


def cluster(sides: Tensor, anchors: Tensor) -> Tensor:
    """K-means from `anchors` (A, 2): each becomes the median shape of the objects that it overlaps most."""
    before = None
    for _ in range(ROUNDS):
        nearest = shape_iou(sides, anchors).argmax(dim=1)
        if before is not None and (nearest != before).double().mean() < SETTLED:
            break
        groups = [sides[nearest == i] for i in range(len(anchors))]
        pairs = zip(groups, anchors, strict=True)
        anchors = torch.stack([group.median(dim=0).values if len(group) else own for group, own in pairs])
        before = nearest
    return anchors


if __name__ == "__main__":
    run_script(main, Config)
