"""Generate a synthetic detection dataset in VOC layout: python tools/make_demo_data.py

Overlapping colored shapes of six classes and a wide range of sizes on textured backgrounds, written to
VOCdevkit/Demo. The same seed generates the same dataset.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.data.image_io import write_image
from utils.data.label_writers import format_voc, write_lines
from utils.data.voc_xml import LabeledObject
from utils.system.cli import run_script
from utils.system.errors import UserError, check_range
from utils.system.files import make_folder

CLASSES = ("circle", "square", "triangle", "star", "cross", "ring")
MARKER = "drawn_by_make_demo_data.txt"  # marks folders that this tool may overwrite
MAX_OBJECTS = 9
SIDES = (20, 180)  # minimum and maximum size of a shape in pixels
MIN_VISIBLE = 0.5  # fraction of a shape that must stay uncovered to be annotated
CURVE_POINTS = 64


@dataclass(frozen=True)
class Config:
    """Generate a synthetic detection dataset in VOC layout."""

    folder: str = "VOCdevkit/Demo"  # output folder
    train: int = 520  # number of training images
    val: int = 60  # number of validation images
    test: int = 100  # number of test images
    seed: int = 0  # random seed

    def __post_init__(self) -> None:
        check_range(self, 1, 1e6, "train", "val", "test")


def outline(name: str, rng: np.random.Generator) -> np.ndarray:
    """The outline (N, 2) of a shape within the unit circle."""
    if name in ("circle", "ring"):
        angles = np.linspace(0, 2 * np.pi, CURVE_POINTS, endpoint=False)
        return np.stack([np.cos(angles), np.sin(angles) * rng.uniform(0.8, 1)], axis=1)
    if name == "square":
        half = np.array([1, rng.uniform(0.7, 1)]) / np.sqrt(2)
        return half * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    if name == "cross":
        arm = rng.uniform(0.25, 0.4)
        corner = [(arm, arm), (1, arm), (1, -arm)]
        turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, -1), (-1, 0), (0, 1))]
        return np.concatenate([np.array(corner) @ turn.T for turn in turns]) / np.hypot(1, arm)
    points = 3 if name == "triangle" else 10
    angles = np.arange(points) * 2 * np.pi / points
    radius = np.where(np.arange(points) % 2, rng.uniform(0.4, 0.5), 1.0) if name == "star" else 1.0
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.reshape(radius, (-1, 1))


def background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A texture of smooth noise at several scales, stripes and grain, uint8 (H, W, 3)."""
    picture = np.full((height, width, 3), rng.uniform(60, 190, 3), np.float32)
    for cells in (3, 9, 27):
        noise = rng.normal(0, 45 / np.sqrt(cells), (cells, cells, 3)).astype(np.float32)
        picture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[:height, :width]
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 60)
    wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period)
    picture += rng.uniform(0, 22) * wave[..., None]
    picture += rng.normal(0, rng.uniform(2, 10), (height, width, 1))
    return picture.clip(0, 255).astype(np.uint8)


def draw_image(rng: np.random.Generator) -> tuple[np.ndarray, list[LabeledObject]]:
    """An image (H, W, 3) and its objects."""
    height, width = int(rng.integers(260, 400)), int(rng.integers(300, 480))
    picture = background(rng, height, width)
    owner = np.zeros((height, width), np.uint8)  # number of the visible object at each pixel
    drawn = []
    for number in range(1, 1 + int(rng.integers(1, MAX_OBJECTS + 1))):
        name = str(rng.choice(CLASSES))
        radius = np.exp(rng.uniform(*np.log(SIDES))) / 2
        angle = rng.uniform(0, 2 * np.pi)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        center = rng.uniform([0.3 * radius, 0.3 * radius], [width - 0.3 * radius, height - 0.3 * radius])
        points = center + radius * outline(name, rng) @ turn.T
        mask = np.zeros((height, width), np.uint8)
        cv2.fillPoly(mask, [points.round().astype(np.int32)], 1)
        if name == "ring":
            cv2.fillPoly(mask, [(center + (points - center) * 0.55).round().astype(np.int32)], 0)
        if not mask.any():
            continue
        color = rng.uniform(0, 255, 3)
        shade = np.linspace(rng.uniform(0.7, 1), rng.uniform(1, 1.25), width)[None, :, None]
        inside = mask.astype(bool)
        picture[inside] = (color * np.broadcast_to(shade, picture.shape)).clip(0, 255)[inside]
        owner[inside] = number
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
        drawn.append((number, LabeledObject(name, box, False), int(mask.sum())))
    visible = np.bincount(owner.ravel(), minlength=MAX_OBJECTS + 1)
    objects = [item for number, item, area in drawn if visible[number] >= MIN_VISIBLE * area]
    return cv2.GaussianBlur(picture, (3, 3), rng.uniform(0.3, 0.9)), objects


def write_sample(folder: Path, seed: int, item: tuple[int, str]) -> None:
    """Draw and write one image, seeded by its number, with its annotation."""
    number, name = item
    picture, objects = draw_image(np.random.default_rng([seed, number]))
    write_image(folder / "JPEGImages" / f"{name}.jpg", picture)
    text = format_voc(f"{name}.jpg", picture.shape[:2], objects)
    (folder / "Annotations" / f"{name}.xml").write_text(text, encoding="utf-8")


def main(config: Config) -> None:
    folder = Path(config.folder)
    if folder.exists() and not (folder / MARKER).is_file() and any(folder.iterdir()):
        raise UserError(f"{folder} already exists and was not created by this tool; choose another --folder")
    for part in ("JPEGImages", "Annotations"):
        make_folder(folder / part)
    write_lines(folder / MARKER, ["This folder is written by tools/make_demo_data.py, which may overwrite it."])
    splits = {"train": config.train, "val": config.val, "test": config.test}
    names = {split: [f"{split}_{i:04d}" for i in range(count)] for split, count in splits.items()}
    items = list(enumerate(name for split in names.values() for name in split))
    with ProcessPoolExecutor() as pool:
        results = pool.map(partial(write_sample, folder, config.seed), items, chunksize=8)
        list(tqdm(results, f"drawing {folder}", len(items), disable=None))
    for split, ids in names.items():
        write_lines(folder / "ImageSets" / "Main" / f"{split}.txt", ids)
    write_lines(folder / "classes.txt", CLASSES)
    print(f"wrote {len(items)} images of {len(CLASSES)} classes to {folder}; train on them with")
    sets = f"--train-sets {folder.name}/train --val-sets {folder.name}/val"
    print(f"python train.py --devkit {folder.parent} {sets} --classes {folder / 'classes.txt'}")


if __name__ == "__main__":
    run_script(main, Config)
