"""Download published weights into model_data/: python tools/get_weights.py yolov4-tiny.weights

Without a name it lists what there is. tools/convert_weights.py makes checkpoints of them, except of the .conv.29,
which is a start for train.py --weights.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.system.cli import run_script
from utils.system.download import Remote, fetch
from utils.system.errors import UserError
from utils.weights.pretrained import read_weights

DARKNET = "https://github.com/AlexeyAB/darknet/releases/download/darknet_yolo_v4_pre"
PYTORCH = "https://github.com/bubbliiiing/yolov4-tiny-pytorch/releases/download/v1.0"
SHA256 = "sha256:cf9fbfd0f6d4869b35762f56100f50ed05268084078805f0e7989efe5bb8ca87"
REMOTES = (  # no checksum of the others has been published
    Remote(f"{DARKNET}/yolov4-tiny.weights", 24_251_276, SHA256),
    Remote(f"{DARKNET}/yolov4-tiny.conv.29", 19_789_716),
    *(Remote(f"{PYTORCH}/yolov4_tiny_weights_{data}.pth") for data in ("voc", "voc_SE", "voc_CBAM", "voc_ECA", "coco")),
)


@dataclass(frozen=True)
class Config:
    """Download published weights into model_data/; without a name, list what there is."""

    names: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="NAME")] = ()  # which; empty: list
    folder: str = "model_data"  # where they go
    mirror: str = ""  # address of another folder that has the files; empty: where they were published


def main(config: Config) -> list[Path]:
    """Download the weights of these names; returns their paths."""
    remotes = {remote.name: remote for remote in REMOTES}
    unknown = [name for name in config.names if name not in remotes]
    if unknown:
        raise UserError(f"there are no published weights {', '.join(unknown)}; there are {', '.join(remotes)}")
    if not config.names:
        for remote in REMOTES:
            print(f"{remote.name:32} {remote.url}")
    return [get(remotes[name].at(config.mirror), Path(config.folder)) for name in config.names]


def get(remote: Remote, folder: Path) -> Path:
    """A file that is there, was checked, and holds weights."""
    path = fetch(remote, folder, read_weights)
    known = "size and checksum are right" if remote.checksum else "it can be read; no checksum of it is known"
    print(f"{path}: {path.stat().st_size:,} bytes, {known}")
    return path


if __name__ == "__main__":
    run_script(main, Config)
