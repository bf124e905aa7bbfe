"""Download VOC2007 and VOC2012 into VOCdevkit/: python tools/get_voc.py

About 2.8 GB. A download that broke off goes on, what is there is left alone, and the archives are removed when they
are unpacked. Then train with --train-sets VOC2007/trainval VOC2012/trainval and measure on VOC2007/test.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchvision.datasets.voc import DATASET_YEAR_DICT

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.data.voc import split_file
from utils.system.cli import run_script
from utils.system.download import Remote, fetch, unpack
from utils.system.errors import make_folder

Part = Literal["2007", "2007-test", "2012"]
LAST = "ImageSets/Main"  # comes last, so that a split file says that everything is there
SPLITS: dict[Part, str] = {"2007": "VOC2007/trainval", "2007-test": "VOC2007/test", "2012": "VOC2012/trainval"}


@dataclass(frozen=True)
class Config:
    """Download VOC2007 and VOC2012 into VOCdevkit/."""

    parts: tuple[Part, ...] = ("2007", "2007-test", "2012")  # what to download
    devkit: str = "VOCdevkit"  # where it goes
    mirror: str = ""  # address of another folder that has the archives; empty: where VOC publishes them


def main(config: Config) -> None:
    devkit = Path(config.devkit)
    make_folder(devkit)
    for part in config.parts:
        split = SPLITS[part]
        if split_file(devkit, split).is_file():
            print(f"{split} is there already")
            continue
        about = DATASET_YEAR_DICT[part]
        archive = fetch(Remote(about["url"], checksum=f"md5:{about['md5']}").at(config.mirror), devkit)
        folder = split.partition("/")[0]
        unpack(archive, devkit / folder, about["base_dir"], LAST)
        archive.unlink()
        print(f"{split} is there")


if __name__ == "__main__":
    run_script(main, Config)
