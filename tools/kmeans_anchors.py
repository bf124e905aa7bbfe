"""Find anchors for a dataset: python tools/kmeans_anchors.py --sets MySet/train --classes model_data/my_classes.txt

K-means over the widths and heights of the objects in input pixels, with the distance 1 - IoU (arXiv 1612.08242); the
anchors are valid for one input size. Writes a file for train.py --anchors, and a plot of objects and anchors.
"""

import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nets.spec import ModelSpec, check_input_size
from utils.data.statistics import anchor_fit, input_sides
from utils.data.voc import load_classes, load_samples
from utils.detection.anchors import load_anchors
from utils.detection.boxes import shape_iou
from utils.reports.plots import draw_shapes
from utils.system.cli import INPUT_SIZE, run_script
from utils.system.diagnostics import Diagnostics
from utils.system.errors import UserError, as_user_error, check_range, refuse_overwrite
from utils.system.files import make_folder, write_text

MAX_ROUNDS = 100  # of k-means
MAX_SAMPLE = 20_000  # objects to cluster, drawn at random; more objects do not change the leading digits
SETTLED = 1e-3  # stop once a smaller fraction of the objects changes its anchor
USED = sorted(set(chain(*ModelSpec.anchors_mask)))  # anchors that the heads use; Darknet's masks omit the first


@dataclass(frozen=True)
class Config:
    """Find anchors for a dataset."""

    devkit: str = "VOCdevkit"  # folder with the datasets
    sets: tuple[str, ...] = ("VOC2007/train",)  # one or more training sets, as folder/split
    classes: str = "model_data/voc_classes.txt"  # file with one class name per line
    anchors: str = "model_data/yolo_anchors.txt"  # anchors to compare with
    out: str = "model_data/my_anchors.txt"  # output file; a plot is written beside it
    input_size: Annotated[tuple[int, int], INPUT_SIZE] = (416, 416)  # input height and width, multiples of 32
    letterbox: bool = False  # keep the aspect ratio of images, as in training with --letterbox
    starts: int = 5  # number of random starts, of which the best is used
    seed: int = 0  # random seed

    def __post_init__(self) -> None:
        check_range(self, 1, 1000, "starts")
        with as_user_error():
            check_input_size(self.input_size)


def main(config: Config) -> Tensor:
    """Find and write the anchors (6, 2)."""
    out, old = Path(config.out), torch.tensor(load_anchors(config.anchors))
    refuse_overwrite(out)
    diagnostics = Diagnostics()
    samples = load_samples(config.devkit, config.sets, load_classes(config.classes, diagnostics), diagnostics)
    diagnostics.print_summary(", ".join(config.sets), print)
    sides = input_sides(samples, config.input_size, config.letterbox)
    print(f"{len(sides)} objects in {len(samples)} images, for an input of {'x'.join(map(str, config.input_size))}")
    new = find_anchors(sides, len(USED), config.starts, config.seed)
    new = torch.cat([new[:1].expand(len(old) - len(USED), 2), new])
    fit = anchor_fit(sides, new[USED])
    make_folder(out.parent)
    draw_shapes(sides.numpy(), new[USED].numpy(), fit.recall, out.with_suffix(".png"))
    write_text(out, ",  ".join(f"{width:g},{height:g}" for width, height in new.tolist()) + "\n")
    print(f"{config.anchors}: {anchor_fit(sides, old[USED])}")
    print(f"{out}: {fit}; plotted in {out.with_suffix('.png')}")
    if len(old) > len(USED):
        print("the heads do not use the first anchor, which is a copy of the second")
    print(f"train with --anchors {out} and the same sets, input_size and letterbox")
    return new


def find_anchors(sides: Tensor, count: int, starts: int, seed: int) -> Tensor:
    """The anchors (count, 2) with the highest mean IoU of several starts, rounded to 0.1 pixel and sorted by area."""
    shapes = len(sides.unique(dim=0))
    if shapes < count:
        raise UserError(f"{count} anchors need {count} different object sizes, but found {shapes}; add annotations")
    generator = torch.Generator().manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for tensors this small
    some = sides[torch.randperm(len(sides), generator=generator)[:MAX_SAMPLE]]
    found = [cluster(some, choose_start(some, count, generator)) for _ in range(starts)]
    best = max(found, key=lambda anchors: anchor_fit(some, anchors).mean_iou)
    torch.set_num_threads(threads)
    return best[best.prod(dim=1).argsort()].mul(10).round().clamp(min=1) / 10


def choose_start(sides: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """K-means++: draw objects (count, 2) in proportion to their squared distance from those already drawn."""
    chosen = sides[torch.randint(len(sides), (1,), generator=generator)]
    while len(chosen) < count:
        distance = 1 - shape_iou(sides, chosen).amax(dim=1).double()
        level = distance.clamp(min=0).square().cumsum(dim=0)
        drawn = torch.searchsorted(level, torch.rand(1, generator=generator, dtype=torch.float64) * level[-1])
        chosen = torch.cat([chosen, sides[drawn.clamp(max=len(sides) - 1)]])
    return chosen


def cluster(sides: Tensor, anchors: Tensor) -> Tensor:
    """K-means starting at `anchors` (A, 2); a center is the median of the objects that overlap it most."""
    before = None
    for _ in range(MAX_ROUNDS):
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
