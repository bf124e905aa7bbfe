"""Download published weights into model_data/: python tools/get_weights.py yolov4-tiny.weights

Without a name, lists the available files. tools/convert_weights.py turns them into checkpoints, except for .conv.29,
which is a backbone to start from with train.py --weights.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.system.cli import run_script
from utils.system.download import RemoteFile, download
from utils.system.errors import UserError
from utils.weights.pretrained import read_weights

DARKNET = "https://github.com/AlexeyAB/darknet/releases/download/darknet_yolo_v4_pre"
PYTORCH = "https://github.com/bubbliiiing/yolov4-tiny-pytorch/releases/download/v1.0"
SHA256 = "sha256:cf9fbfd0f6d4869b35762f56100f50ed05268084078805f0e7989efe5bb8ca87"
FILES = (  # a checksum has been published only for the first
    RemoteFile(f"{DARKNET}/yolov4-tiny.weights", SHA256),
    RemoteFile(f"{DARKNET}/yolov4-tiny.conv.29"),
    *(
        RemoteFile(f"{PYTORCH}/yolov4_tiny_weights_{data}.pth")
        for data in ("voc", "voc_SE", "voc_CBAM", "voc_ECA", "coco")
    ),
)


@dataclass(frozen=True)
class Config:
    """Download published weights into model_data/, or list the available files."""

    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME")] = ()  # empty: list them
    folder: str = "model_data"  # folder to download to
    mirror: str = ""  # URL of another folder that contains the files; empty: where they were published


def main(config: Config) -> None:
    """Download the named files and check that they contain weights, or list all files."""
    files = {file.name: file for file in FILES}
    unknown = [name for name in config.names if name not in files]
    if unknown:
        raise UserError(f"there are no published weights named {', '.join(unknown)}; choose from {', '.join(files)}")
    if not config.names:
        print("\n".join(f"{name:32} {file.url}" for name, file in files.items()))
    for name in config.names:
        path = download(files[name].at_mirror(config.mirror), Path(config.folder), read_weights)
        print(f"{path}: {'checksum verified' if files[name].checksum else 'readable; no checksum has been published'}")


if __name__ == "__main__":
    run_script(main, Config)
