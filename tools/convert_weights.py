"""Make a checkpoint of published weights: python tools/convert_weights.py --weights model_data/yolov4-tiny.weights

Takes a `.pth` with the names of bubbliiiing/yolov4-tiny-pytorch, of any attention, and Darknet's `.weights`, of
AlexeyAB/darknet's yolov4-tiny.cfg. eval.py and predict.py take the checkpoint, and train.py --weights too. Published
before February 2021 a `.pth` has its heads' inputs in another order: it is loaded by name, and finds nothing.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nets.attention import ATTENTION
from nets.spec import ModelSpec, check_input_size
from nets.yolo import YoloBody, build_model
from utils.data.voc import load_classes
from utils.detection.anchors import load_anchors
from utils.system.cli import run_script
from utils.system.errors import UserError, as_user_error, make_folder, refuse_overwrite
from utils.weights.checkpoint import Checkpoint, save_checkpoint
from utils.weights.pretrained import DARKNET, GAIN, fill, read_weights

HEAD = "yolo_headP5.1.weight"  # whose rows tell how many classes there are
SCALE_XY = {"darknet": 1.05, "pth": 1.0}  # of the decoding that they were trained with: scale_x_y, and none
CLASS_FILES = {20: "model_data/voc_classes.txt", 80: "model_data/coco_classes.txt"}  # of published weights


@dataclass(frozen=True)
class Config:
    """Make a checkpoint of published weights."""

    weights: str  # a .pth, or Darknet's .weights
    out: str = ""  # the checkpoint; empty: beside the weights, with the suffix .safetensors
    classes: str = ""  # file with the class names of the training; empty: VOC's for 20 classes, COCO's for 80
    anchors: str = "model_data/yolo_anchors.txt"  # file with the anchors of the training
    masks: tuple[int, int, int, int, int, int] = (3, 4, 5, 1, 2, 3)  # of P5 and P4; yolov4-tiny-custom.cfg: 3 4 5 0 1 2
    input_size: tuple[int, int] = (416, 416)  # height and width of the network's input

    def __post_init__(self) -> None:
        """Raise UserError for a value that cannot work."""
        if not all(0 <= index < 6 for index in self.masks):
            raise UserError(f"masks are {self.masks}, but there are six anchors, 0 to 5")
        with as_user_error():
            check_input_size(self.input_size)


def main(config: Config) -> Path:
    """Write the checkpoint; returns its path."""
    path = Path(config.weights)
    if path.suffix == ".safetensors":
        raise UserError(f"{path} is no foreign file; eval.py and predict.py take checkpoints as they are")
    out = Path(config.out) if config.out else path.with_suffix(".safetensors")
    refuse_overwrite(out)
    weights = read_weights(path)
    spec = find_spec(config, path, weights)
    model = build_model(spec)
    print("\n".join(fill(model, weights, path)))
    make_folder(out.parent)
    save_checkpoint(out, Checkpoint(spec, model.state_dict(), {"source": path.name}, {}))
    print(f"{out}: {spec.num_classes} classes, phi {spec.phi}, scale_xy {spec.scale_xy}, {spec.class_names[0]} first")
    return out


def find_spec(config: Config, path: Path, weights: Mapping[str, Tensor]) -> ModelSpec:
    """What the weights are of, by the names and shapes in them; raises UserError when they are no whole network."""
    if not weights.keys() & parameter_names(0):
        raise UserError(f"{path}: no parameter has a name of this network; is it YOLOv4-tiny?")
    if any(name.startswith(GAIN) for name in weights):
        raise UserError(
            f"{path} has the gains of train.py's attention, so that it is no published file; take the checkpoint that "
            "it comes from"
        )
    if HEAD not in weights:
        raise UserError(
            f"{path} has no heads: it is a start to train from, with train.py --weights, and no network to predict with"
        )
    rows = weights[HEAD].shape[0] if weights[HEAD].ndim else 1
    num_classes, rest = divmod(rows - 15, 3)
    if rest or num_classes < 1:
        raise UserError(f"{path} has {rows} rows in {HEAD}, but three anchors need 3 * (5 + classes)")
    classes = config.classes or CLASS_FILES.get(num_classes)
    if classes is None:
        raise UserError(f"{path} has {num_classes} classes; name a file with their names, in their order, as --classes")
    class_names = load_classes(classes)
    if len(class_names) != num_classes:
        raise UserError(f"{path} has {num_classes} classes, but {classes} has {len(class_names)}; give the training's")
    return ModelSpec(
        class_names=class_names,
        anchors=load_anchors(config.anchors),
        anchors_mask=(config.masks[:3], config.masks[3:]),
        phi=find_phi(path, weights),
        identity_start=False,
        input_size=config.input_size,
        scale_xy=SCALE_XY["darknet" if DARKNET.search(path.name) else "pth"],
        letterbox=False,
    )


def find_phi(path: Path, weights: Mapping[str, Tensor]) -> int:
    """The attention whose parameters the weights have."""
    attention = {name for name in weights if "_att." in name}
    for phi in ATTENTION:
        if {name for name in parameter_names(phi) if "_att." in name} == attention:
            return phi
    raise UserError(f"{path} has attention that no phi stands for, such as {min(attention)}")


def parameter_names(phi: int) -> set[str]:
    with torch.device("meta"):
        return set(YoloBody(ModelSpec.anchors_mask, 1, phi).state_dict())


if __name__ == "__main__":
    run_script(main, Config)
