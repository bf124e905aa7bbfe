"""Convert published weights to a checkpoint: python tools/convert_weights.py --weights model_data/yolov4-tiny.weights

Reads `.pth` files with the parameter names of bubbliiiing/yolov4-tiny-pytorch, with or without attention, and
`.weights` files of AlexeyAB/darknet's yolov4-tiny.cfg. A `.pth` file from before February 2021 also loads, but
detects nothing, because the inputs of its heads are in a different order.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nets.attention import ATTENTION
from nets.spec import ModelSpec, check_input_size
from nets.yolo import YoloBody, build_model
from utils.data.voc import load_classes
from utils.detection.anchors import load_anchors
from utils.system.cli import INPUT_SIZE, run_script
from utils.system.errors import UserError, as_user_error, refuse_overwrite
from utils.system.files import make_folder
from utils.weights.checkpoint import Checkpoint, save_checkpoint
from utils.weights.pretrained import DARKNET, GAIN, load_all_weights, read_weights

HEAD = "yolo_headP5.1.weight"  # its rows give the number of classes
DARKNET_SCALE_XY = 1.05  # scale_x_y in Darknet's cfg; published .pth files were trained without it
CLASS_FILES = {20: "model_data/voc_classes.txt", 80: "model_data/coco_classes.txt"}  # of published weights


@dataclass(frozen=True)
class Config:
    """Convert published weights to a checkpoint."""

    weights: str  # a .pth or Darknet .weights file
    out: str = ""  # output checkpoint; empty: next to the weights, with the suffix .safetensors
    classes: str = ""  # file with the class names; empty: VOC for 20 classes, COCO for 80
    anchors: str = "model_data/yolo_anchors.txt"  # file with the anchors that the network was trained with
    masks: tuple[int, int, int, int, int, int] = (3, 4, 5, 1, 2, 3)  # P5, P4 anchors; yolov4-tiny-custom: 3 4 5 0 1 2
    input_size: Annotated[tuple[int, int], INPUT_SIZE] = (416, 416)  # input height and width, multiples of 32

    def __post_init__(self) -> None:
        if not all(0 <= index < 6 for index in self.masks):
            raise UserError(f"masks are {self.masks}, but the six anchors are numbered 0 to 5")
        with as_user_error():
            check_input_size(self.input_size)


def main(config: Config) -> Path:
    """Write the checkpoint, and return its path."""
    path = Path(config.weights)
    if path.suffix == ".safetensors":
        raise UserError(f"{path} needs no conversion; train.py, eval.py and predict.py read .safetensors files")
    out = Path(config.out) if config.out else path.with_suffix(".safetensors")
    refuse_overwrite(out)
    weights = read_weights(path)
    spec = infer_spec(config, path, weights)
    model = build_model(spec)
    print("\n".join(load_all_weights(model, weights, path)))
    make_folder(out.parent)
    save_checkpoint(out, Checkpoint(spec, model.state_dict(), {"source": path.name}, {}))
    print(f"{out}: {spec.num_classes} classes, phi {spec.phi}, scale_xy {spec.scale_xy}, {spec.class_names[0]} first")
    return out


def infer_spec(config: Config, path: Path, weights: Mapping[str, Tensor]) -> ModelSpec:
    """The specification that fits the names and shapes of the weights; raises UserError for an incomplete network."""
    if not weights.keys() & parameter_names(0):
        raise UserError(f"{path}: no parameter matches this network; is it YOLOv4-tiny?")
    if any(name.startswith(GAIN) for name in weights):
        raise UserError(f"{path} was made from a checkpoint of train.py; use that checkpoint instead")
    if HEAD not in weights:
        raise UserError(f"{path} has no heads and cannot be used for prediction; use it with train.py --weights")
    rows = weights[HEAD].shape[0] if weights[HEAD].ndim else 1
    num_classes, rest = divmod(rows - 15, 3)
    if rest or num_classes < 1:
        raise UserError(f"{path} has {rows} rows in {HEAD}, but three anchors need 3 * (5 + classes)")
    classes = config.classes or CLASS_FILES.get(num_classes)
    if classes is None:
        raise UserError(f"{path} has {num_classes} classes; pass a file with their names, in order, as --classes")
    class_names = load_classes(classes)
    if len(class_names) != num_classes:
        raise UserError(f"{path} has {num_classes} classes, but {classes} has {len(class_names)}")
    return ModelSpec(
        class_names=class_names,
        anchors=load_anchors(config.anchors),
        anchors_mask=(config.masks[:3], config.masks[3:]),
        phi=find_phi(path, weights),
        identity_start=False,
        input_size=config.input_size,
        scale_xy=DARKNET_SCALE_XY if DARKNET.search(path.name) else 1.0,
    )


def find_phi(path: Path, weights: Mapping[str, Tensor]) -> int:
    """The attention block with the parameter names of the weights."""
    given = {name for name in weights if "_att." in name}
    for phi in ATTENTION:
        if {name for name in parameter_names(phi) if "_att." in name} == given:
            return phi
    raise UserError(f"{path} has attention parameters that match no phi, such as {min(given)}")


def parameter_names(phi: int) -> set[str]:
    with torch.device("meta"):
        return set(YoloBody(ModelSpec.anchors_mask, 1, phi).state_dict())


if __name__ == "__main__":
    run_script(main, Config)
