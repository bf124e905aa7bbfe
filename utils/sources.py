"""What to predict on: an image, a folder or a glob becomes a list of image files."""

from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.voc import IMAGE_SUFFIXES


@dataclass(frozen=True)
class Frame:
    """One image to predict on."""

    path: Path
    image: np.ndarray  # (H, W, 3) uint8 RGB


def find_images(source: str) -> list[Path]:
    """The image files that a path or a glob stands for; raises UserError when there are none."""
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        candidates = sorted(path.iterdir())
    else:
        candidates = sorted(Path(name) for name in glob(source, recursive=True))
        if not candidates:
            raise UserError(f"there is no image, folder or match {source}")
    images = [candidate for candidate in candidates if candidate.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise UserError(f"{source} has no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return images
