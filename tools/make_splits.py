"""Write the split files of a VOC data set that has none: python tools/make_splits.py --folder VOCdevkit/VOC2007

Every image that has an annotation goes into test, val or train by the shares given; trainval is train and val. The
same seed makes the same split. A split file with names in it is never replaced.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import UserError, check_range, run_script
from utils.voc import index_images


@dataclass(frozen=True)
class Config:
    """Write the split files of a VOC data set that has none."""

    folder: str = "VOCdevkit/VOC2007"  # the data set, with JPEGImages/ and Annotations/
    val: float = 0.1  # share of the images to validate on
    test: float = 0.1  # share of the images held out
    seed: int = 0  # the same seed makes the same split


def main(config: Config) -> dict[str, list[str]]:
    """Write the splits; returns the image names of each."""
    check_range(config, 0, 1, "val", "test")
    if config.val + config.test >= 1:
        raise UserError(f"val and test take {config.val + config.test:g} of the images, which leaves none to train on")
    folder = Path(config.folder)
    if not folder.is_dir():
        raise UserError(f"there is no data set {folder}")
    images = index_images(folder / "JPEGImages")
    names = sorted(name for name in images if (folder / "Annotations" / f"{name}.xml").is_file())
    if not names:
        raise UserError(f"{folder} has no image in JPEGImages/ with an annotation of its name in Annotations/")
    target = folder / "ImageSets" / "Main"
    splits = split_names(names, config)
    files = [target / f"{split}.txt" for split in splits]
    existing = [file.name for file in files if file.exists() and file.read_text(encoding="utf-8").strip()]
    if existing:
        raise UserError(f"{target} already has {', '.join(existing)}; to split anew, remove them")
    target.mkdir(parents=True, exist_ok=True)
    for split, members in splits.items():
        (target / f"{split}.txt").write_text("".join(f"{name}\n" for name in members), encoding="utf-8")
    print(f"{target}: " + ", ".join(f"{split} {len(members)}" for split, members in splits.items()))
    left = len(images) - len(names)
    if left:
        print(f"{left} images without an annotation were left out")
    return splits


def split_names(names: list[str], config: Config) -> dict[str, list[str]]:
    """Names by split, each in sorted order; a share above 0 gets at least one name if there are enough."""
    shuffled = list(names)
    random.Random(config.seed).shuffle(shuffled)
    counts = [max(1, round(share * len(names))) if share else 0 for share in (config.test, config.val)]
    if sum(counts) >= len(names):
        raise UserError(f"{len(names)} images are too few to split; set --val 0 --test 0 or add images")
    test, val, train = shuffled[: counts[0]], shuffled[counts[0] : sum(counts)], shuffled[sum(counts) :]
    splits = {"train": train, "val": val, "trainval": train + val, "test": test}
    return {split: sorted(members) for split, members in splits.items() if members}


if __name__ == "__main__":
    run_script(main, Config)
