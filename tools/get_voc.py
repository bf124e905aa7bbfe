"""Download VOC2007 and VOC2012 into VOCdevkit/: python tools/get_voc.py

About 2.8 GB. Interrupted downloads resume, existing sets are skipped, and the archives are deleted after extraction.
Then train with --train-sets VOC2007/trainval VOC2012/trainval and evaluate on VOC2007/test.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchvision.datasets.voc import DATASET_YEAR_DICT

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.data.voc import split_file
from utils.system.cli import run_script
from utils.system.download import RemoteFile, download, extract_tar

Part = Literal["2007", "2007-test", "2012"]
LAST = "ImageSets/Main"  # extracted last, so that a split file proves that its images are complete
SPLITS: dict[Part, str] = {"2007": "VOC2007/trainval", "2007-test": "VOC2007/test", "2012": "VOC2012/trainval"}


@dataclass(frozen=True)
class Config:
    """Download VOC2007 and VOC2012 into VOCdevkit/."""

    parts: tuple[Part, ...] = ("2007", "2007-test", "2012")  # what to download
    devkit: str = "VOCdevkit"  # folder to download to
    mirror: str = ""  # URL of another folder that contains the archives; empty: the official server


def main(config: Config) -> None:
    """Download and extract the parts that are not complete yet."""
    devkit = Path(config.devkit)
    for part in config.parts:
        split = SPLITS[part]
        if split_file(devkit, split).is_file():
            print(f"{split} already exists")
            continue
        about = DATASET_YEAR_DICT[part]
        archive = download(RemoteFile(about["url"], f"md5:{about['md5']}").at_mirror(config.mirror), devkit)
        extract_tar(archive, devkit / split.partition("/")[0], about["base_dir"], LAST)
        archive.unlink()
        print(f"{split} is complete")


if __name__ == "__main__":
    run_script(main, Config)
