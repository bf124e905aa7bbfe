"""Weights that are damaged, hostile or made for another network end in one error message and exit code 2."""

import os
import struct
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import eval as evaluation
import predict
from nets.yolo import YoloBody
from tests.bad_inputs import ERROR, OK, REPAIR, SPEC, expect, picture, random_weights, save_weights
from utils.data.image_io import write_image
from utils.system.diagnostics import Diagnostics
from utils.weights.darknet import START, count_floats, standard_layers
from utils.weights.pretrained import read_weights, start_from

HEADER, OLD_HEADER = struct.pack("<3iq", 0, 2, 5, 32_013_312), struct.pack("<3ii", 0, 1, 0, 32_013_312)
LAYERS = standard_layers(2)


class Payload:
    executed = False

    def __reduce__(self):
        return (setattr, (Payload, "executed", True))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights()


def start_training(path: Path, num_classes: int = 2) -> None:
    """Do what train.py does with --weights."""
    diagnostics = Diagnostics()
    found = read_weights(path, diagnostics)
    print(start_from(YoloBody(SPEC.anchors_mask, num_classes), found, path))
    diagnostics.print_summary("weights", print)


def change_largest(weights: dict[str, Tensor], change) -> dict[str, Tensor]:
    name = max(weights, key=lambda key: weights[key].numel())
    return weights | {name: change(weights[name])}


def quantized(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return weights | {"a": torch._empty_affine_quantized([3], scale=1.0, zero_point=0, dtype=torch.qint8)}


PUBLISHED = {
    "pickled code": (lambda weights: weights | {"a": Payload()}, ERROR, "could run code"),
    "pickled module": (lambda weights: nn.Linear(2, 2), ERROR, "could run code"),
    "sparse tensor": (lambda weights: change_largest(weights, Tensor.to_sparse), ERROR, "sparse"),
    "quantized tensor": (quantized, ERROR, "quantized"),
    "expanded tensor": (lambda weights: weights | {"a": torch.ones(1).expand(10**9)}, ERROR, "sparse"),
    "meta tensor": (lambda weights: weights | {"a": torch.empty(10**9, device="meta")}, ERROR, "sparse"),
    "DataParallel": (lambda weights: {f"module.{name}": value for name, value in weights.items()}, REPAIR, "Parallel"),
    "no matching names": (lambda weights: {"layer.weight": torch.ones(3)}, ERROR, "no parameter matches"),
    "NaN": (lambda weights: change_largest(weights, lambda value: value * float("nan")), ERROR, "non-finite"),
}


@pytest.mark.filterwarnings("ignore")  # torch warns that it will remove quantized tensors
@pytest.mark.parametrize("name", PUBLISHED)
def test_reports_bad_published_weights(name, weights, tmp_path, call_script):
    make, outcome, words = PUBLISHED[name]
    path = tmp_path / "a.pth"
    torch.save(make(weights), path)
    expect(call_script(lambda _: start_training(path)), outcome, ("a.pth", words))
    assert not Payload.executed


def test_rejects_published_weights_that_are_compressed(tmp_path, call_script):
    path = tmp_path / "a.pth"
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        archive.writestr("a/data/0", bytes(50_000_000))
    expect(call_script(lambda _: start_training(path)), ERROR, ("a.pth", "would unpack to 50 MB"))


CHECKPOINTS = {
    "anchors_mask beyond the anchors": ({"anchors_mask": ((3, 4, 6), (1, 2, 3))}, None, ("anchors_mask", "0 to 5")),
    "fewer classes than outputs": ({"class_names": ("cat",)}, None, ("does not match", "yolo_headP")),
    "other parameters": ({}, lambda weights: {"layer.weight": torch.ones(3)}, ("does not match",)),
    "NaN": ({}, lambda weights: change_largest(weights, lambda value: value * float("nan")), ("non-finite",)),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_prediction_and_evaluation_reject_bad_checkpoints(name, weights, tmp_path, monkeypatch, call_script):
    monkeypatch.chdir(tmp_path)
    write_image("a.jpg", np.asarray(picture()))
    changes, change, words = CHECKPOINTS[name]
    path = save_weights(tmp_path / "a.safetensors", change(weights) if change else weights, **changes)
    for script, arguments in ((predict, ["a.jpg"]), (evaluation, ["--sets", "VOC/val", "--devkit", "devkit"])):
        outcome = call_script(script.main, script.Config, *arguments, "--device", "cpu", "--weights", path)
        expect(outcome, ERROR, ("a.safetensors", *words))
    assert not Path("predictions").exists()


def test_class_file_must_match_checkpoint_except_in_training(weights, tmp_path, monkeypatch, call_script):
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("cat\n")
    write_image("a.jpg", np.asarray(picture()))
    path = save_weights(tmp_path / "a.safetensors", weights)
    flags = "--device", "cpu", "--weights", path, "--classes", "one.txt"
    for script, arguments in ((predict, ["a.jpg"]), (evaluation, ["--sets", "VOC/val", "--devkit", "devkit"])):
        outcome = call_script(script.main, script.Config, *arguments, *flags)
        expect(outcome, ERROR, ("2 classes (cat, dog)", "one.txt has 1 (cat)"))
    outcome = call_script(lambda _: start_training(path, num_classes=3))
    assert outcome.code == 0
    assert "yolo_headP4.1.bias, yolo_headP4.1.weight, yolo_headP5.1.bias" in outcome.output


def write_darknet(path: Path, header: bytes, size: int) -> Path:
    """A Darknet file of `size` bytes whose weights are zero."""
    path.write_bytes(header)
    os.truncate(path, size)
    return path


@pytest.mark.parametrize("layers", range(len(LAYERS)))
def test_rejects_darknet_file_that_ends_early(layers, tmp_path, call_script):
    size = 20 + 4 * count_floats(LAYERS[:layers]) + 4 * (layers == START)
    path = write_darknet(tmp_path / "a.weights", HEADER, size)
    expect(call_script(lambda _: start_training(path)), ERROR, ("a.weights", "truncated"))


def test_accepts_darknet_backbone_for_training_only(tmp_path, monkeypatch, call_script):
    monkeypatch.chdir(tmp_path)
    path = write_darknet(tmp_path / "yolov4-tiny.conv.29", HEADER, 19_789_716)
    outcome = call_script(lambda _: start_training(path))
    assert outcome.code == 0
    assert "upsample" in outcome.output
    write_image("a.jpg", np.asarray(picture()))
    outcome = call_script(predict.main, predict.Config, "a.jpg", "--weights", path, "--device", "cpu")
    expect(outcome, ERROR, ("conv.29", "initial weights"))


def test_rejects_darknet_file_that_is_too_long(tmp_path, call_script):
    path = write_darknet(tmp_path / "a.weights", HEADER, 20 + 4 * count_floats(LAYERS) + 4)
    expect(call_script(lambda _: start_training(path)), ERROR, ("a.weights", "has extra bytes"))


@pytest.mark.parametrize(
    "header", [struct.pack("<3iq", 0, 2, 5, 2**62), struct.pack("<3iq", 0, -2, 5, 0), b"\xff" * 20]
)
def test_rejects_darknet_file_with_impossible_header(header, tmp_path, call_script):
    path = write_darknet(tmp_path / "a.weights", header, 20 + 4 * count_floats(LAYERS))
    expect(call_script(lambda _: start_training(path)), ERROR, ("a.weights", "header gives"))


@pytest.mark.parametrize("header", [HEADER, OLD_HEADER], ids=["new header", "old header"])
def test_reads_darknet_file_of_matching_size(header, tmp_path, call_script):
    path = write_darknet(tmp_path / "a.weights", header, len(header) + 4 * count_floats(LAYERS))
    expect(call_script(lambda _: start_training(path)), OK)
