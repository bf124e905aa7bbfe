"""Darknet's files: read as an independent forward of Darknet saw them, written back bit by bit, mistakes named."""

import os
import struct
import time
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch.nn import functional

import eval as eval_script
import predict
from nets.spec import ModelSpec
from nets.yolo import build_model
from tests.conftest import ANCHORS, REFERENCE, ROOT, needs_shared
from tools import convert_weights
from utils.data.voc import load_classes
from utils.detection.anchors import decode_heads, head_levels
from utils.inference.detector import Detector
from utils.system.errors import UserError
from utils.weights.checkpoint import load_checkpoint
from utils.weights.darknet import (
    START,
    count_floats,
    list_layers,
    make_cfg,
    read_darknet,
    standard_layers,
    write_darknet,
)
from utils.weights.pretrained import read_weights, start_from

VOC = ModelSpec(tuple(f"class {i}" for i in range(20)), ANCHORS, input_size=(160, 160), scale_xy=1.05)
PAIR = ModelSpec(("cat", "dog"), ANCHORS, anchors_mask=((3, 4, 5), (0, 1, 2)), input_size=(64, 96), scale_xy=1.5)
VOC_CLASSES = ROOT / "model_data" / "voc_classes.txt"
ONE_CLASS = 4 * 3 * (513 + 257)  # bytes that a class more takes
HEADER = struct.pack("<3iq", 0, 2, 5, 0)


@pytest.fixture(scope="module")
def voc_file(tmp_path_factory):
    """The reference's network, written by the rule of its README."""
    generator = np.random.default_rng(0)
    content = []
    for layer in standard_layers(20):
        filters, channels, side, _ = list(layer.values())[-1]
        content.append(generator.normal(0, 0.05, filters))
        if len(layer) == 5:
            content.append(generator.uniform(0.5, 1.5, filters))
            content.append(generator.normal(0, 0.1, filters))
            content.append(generator.uniform(0.5, 1.5, filters))
        content.append(generator.normal(0, np.sqrt(1 / (channels * side**2)), filters * channels * side**2))
    path = tmp_path_factory.mktemp("darknet") / "voc.weights"
    path.write_bytes(HEADER + b"".join(values.astype("<f4").tobytes() for values in content))
    return path


@pytest.fixture(scope="module")
def pair_file(tmp_path_factory):
    """A network of two classes with its own statistics."""
    torch.manual_seed(0)
    model = build_model(PAIR).train()
    with torch.no_grad():
        model(torch.rand(2, 3, 64, 96))
    path = tmp_path_factory.mktemp("darknet") / "pair.weights"
    write_darknet(path, model)
    return path, model.eval()


@needs_shared
def test_heads_and_boxes_are_darknets(voc_file):
    reference = np.load(REFERENCE / "darknet_voc20.npz")
    model = build_model(VOC).eval()
    model.load_state_dict(read_darknet(voc_file, model), strict=False)
    with torch.no_grad():
        heads = model(torch.from_numpy(reference["x"]))
    for head, level, name in zip(heads, head_levels(VOC), ("p5", "p4"), strict=True):
        np.testing.assert_allclose(head.numpy(), reference[f"head_{name}"], atol=1e-4)
        boxes, scores = (values[0] for values in decode_heads([head], [level], VOC.scale_xy))
        cells = head.shape[2] * head.shape[3]
        boxes, scores = (values.view(3, cells, -1).transpose(0, 1).flatten(0, 1).numpy() for values in (boxes, scores))
        expected = reference[f"yolo_{name}"]
        centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2 / 160, (boxes[:, 2:] - boxes[:, :2]) / 160
        np.testing.assert_allclose(np.hstack([centres, sides]), expected[:, :4], atol=1e-4)
        above = expected[:, 5:] > 0  # Darknet zeroes what is below its threshold
        assert above.mean() > 0.9
        np.testing.assert_allclose(scores[above], expected[:, 5:][above], atol=1e-4)


@needs_shared
def test_converted_darknet_weights_find_the_same(voc_file, tmp_path, capsys):
    reference = np.load(REFERENCE / "darknet_voc20.npz")
    config = convert_weights.Config(str(voc_file), str(tmp_path / "a.safetensors"), input_size=(160, 160))
    detector = Detector.load(convert_weights.main(config))
    assert "99 of 99 tensors loaded" in capsys.readouterr().out
    assert detector.spec == replace(VOC, class_names=load_classes(VOC_CLASSES), identity_start=False)
    with torch.no_grad():
        heads = detector.network.model(torch.from_numpy(reference["x"]))
    for head, name in zip(heads, ("p5", "p4"), strict=True):
        np.testing.assert_allclose(head.numpy(), reference[f"head_{name}"], atol=1e-4)
    boxes, scores = (values[0].numpy() for values in detector.network.to_boxes(heads))
    expected = np.concatenate([
        reference[f"yolo_{name}"].reshape(-1, 3, 25).swapaxes(0, 1).reshape(-1, 25) for name in ("p5", "p4")
    ])  # the cell fastest, as ours  # fmt: skip
    np.testing.assert_allclose((boxes[:, :2] + boxes[:, 2:]) / 2 / 160, expected[:, :2], atol=1e-4)
    above = expected[:, 5:] > 0
    np.testing.assert_allclose(scores[above], expected[:, 5:][above], atol=1e-4)


def test_what_cannot_be_converted(voc_file, pair_file, expect_failure, tmp_path):
    start = tmp_path / "yolov4-tiny.conv.29"
    start.write_bytes(voc_file.read_bytes()[:19_789_716])
    expect_failure(convert_weights, ["--weights", start], "has no heads", "a start to train from", "train.py --weights")
    pair, _ = pair_file
    expect_failure(convert_weights, ["--weights", pair], f"{pair} has 2 classes; name a file with their names")
    classes = ["--classes", ROOT / "model_data" / "coco_classes.txt"]
    expect_failure(convert_weights, ["--weights", voc_file, *classes], "has 20 classes, but", "has 80")
    expect_failure(convert_weights, ["--weights", pair, "--masks", 3, 4, 5, 0, 1, 6], "there are six anchors, 0 to 5")
    expect_failure(convert_weights, ["--weights", voc_file, "--out", start], f"{start} exists; remove it, or choose")
    other = tmp_path / "other.pth"
    torch.save({"layer.weight": torch.zeros(3)}, other)
    expect_failure(convert_weights, ["--weights", other], "no parameter has a name of this network")
    torch.save({"yolo_headP5.1.weight": torch.tensor(1.0)}, other)
    expect_failure(convert_weights, ["--weights", other], "other.pth has 1 rows in yolo_headP5.1.weight")
    torch.save(build_model(replace(VOC, phi=3)).state_dict(), other)
    expect_failure(convert_weights, ["--weights", other], "other.pth has the gains of train.py's attention")
    for script, flags in ((predict, [ROOT / "docs" / "images" / "demo_batch.jpg"]), (eval_script, [])):
        expect_failure(script, [*flags, "--weights", pair], f"make one with tools/convert_weights.py --weights {pair}")
    assert [path.name for path in tmp_path.iterdir()] == ["yolov4-tiny.conv.29", "other.pth"]


def test_a_converted_pair_of_masks(pair_file, tmp_path):
    pair, model = pair_file
    (tmp_path / "pair.txt").write_text("cat\ndog\n")
    masks, size = (3, 4, 5, 0, 1, 2), (64, 96)
    config = convert_weights.Config(str(pair), str(tmp_path / "a.safetensors"), str(tmp_path / "pair.txt"), masks=masks)
    checkpoint = load_checkpoint(convert_weights.main(replace(config, input_size=size)))
    assert checkpoint.spec == replace(PAIR, scale_xy=1.05, identity_start=False)
    for name, value in model.state_dict().items():
        assert torch.equal(checkpoint.weights[name], value) or name.endswith("num_batches_tracked")


def test_written_is_what_was_read(voc_file, tmp_path):
    model = build_model(VOC)
    weights = read_weights(voc_file)
    assert "fresh" not in start_from(model, weights, voc_file)
    write_darknet(tmp_path / "again.weights", model)
    assert (tmp_path / "again.weights").read_bytes() == voc_file.read_bytes()


def test_sizes_are_the_published_ones(voc_file):
    assert voc_file.stat().st_size == 23_696_876
    assert 20 + 4 * count_floats(standard_layers(80)) == 24_251_276
    assert 20 + 4 * count_floats(standard_layers(80)[:START]) == 19_789_716


def test_a_size_of_more_classes_than_a_network_has(tmp_path):
    path = tmp_path / "a.weights"
    path.write_bytes(HEADER)
    os.truncate(path, len(HEADER) + 4 * count_floats(standard_layers(10_001)))  # of zeros, which take no room
    with pytest.raises(UserError, match="is another network"):
        read_weights(path)


def test_a_start_of_17_convolutions_is_for_training_alone(voc_file, tmp_path):
    path = tmp_path / "yolov4-tiny.conv.29"
    path.write_bytes(voc_file.read_bytes()[:19_789_716])
    weights = read_weights(path)
    model = build_model(PAIR)
    line = start_from(model, weights, path)
    assert torch.equal(model.yolo_headP5[0].conv.weight, read_weights(voc_file)["yolo_headP5.0.conv.weight"])
    assert "fresh: upsample.upsample.0.bn.bias" in line
    with pytest.raises(UserError, match="a start to train from"):
        read_darknet(path, model)
    as_weights = path.rename(tmp_path / "start.weights")
    assert read_weights(as_weights).keys() == weights.keys()


def test_other_classes_start_a_training_alone(voc_file):
    model = build_model(PAIR)
    line = start_from(model, read_weights(voc_file), voc_file)
    assert line.endswith("fresh: yolo_headP4.1.bias, yolo_headP4.1.weight, yolo_headP5.1.bias, yolo_headP5.1.weight")
    with pytest.raises(UserError, match="made for more classes"):
        read_darknet(voc_file, model)


def test_cut_off_within_and_after_each_convolution(pair_file, tmp_path):
    whole, model = pair_file
    content = whole.read_bytes()
    layers = list_layers(model)
    ends = [20 + 4 * floats for floats in accumulate(count_floats([layer]) for layer in layers)]
    assert ends[-1] == len(content)
    path = tmp_path / "cut.weights"
    for number, (begin, end) in enumerate(zip([20, *ends], ends, strict=False), start=1):
        for size in (begin, begin + 1, end - 4):
            path.write_bytes(content[:size])
            start = size == ends[START - 1]
            words = "a start to train from" if start else f"ends within convolution {number} of 21"
            with pytest.raises(UserError, match=words):
                read_darknet(path, model)
            if not start:
                with pytest.raises(UserError, match="cut off"):
                    read_weights(path)


def test_something_behind_the_end(pair_file, tmp_path):
    whole, model = pair_file
    path = tmp_path / "long.weights"
    for extra, words in ((1, "something behind its end"), (4, "something behind its end"), (ONE_CLASS, "variances")):
        path.write_bytes(whole.read_bytes() + b"\1" * extra)
        with pytest.raises(UserError, match=f"has {extra:,} bytes more"):
            read_darknet(path, model)
        with pytest.raises(UserError, match=words):
            read_weights(path)
    path.write_bytes(whole.read_bytes()[:-ONE_CLASS])
    with pytest.raises(UserError, match="variances"):
        read_weights(path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (struct.pack("<3iq", 0, 2, 5, -1), "-1 images"),
        (struct.pack("<3iq", 0, 2, 5, 2**62), f"{2**62} images"),
        (struct.pack("<3iq", -1, 2, 5, 0), "version -1.2.5"),
        (struct.pack("<3iq", 0, 1, 0, 0), "bytes"),  # says that `seen` has 32 bits, and it has 64
        (struct.pack("<3ii", 0, 2, 5, 0), "images|bytes"),  # the other way round
        (struct.pack("<3iq", 1000, 2, 5, 0), "bytes"),
        (b"", "images|bytes"),
    ],
)
def test_a_header_that_lies(pair_file, tmp_path, header, words):
    whole, model = pair_file
    path = tmp_path / "lie.weights"
    path.write_bytes(header + whole.read_bytes()[20:])
    for read in (lambda: read_darknet(path, model), lambda: read_weights(path)):
        with pytest.raises(UserError, match=words):
            read()


def test_what_is_no_darknet_file(pair_file, tmp_path):
    path = tmp_path / "text.weights"
    with pytest.raises(UserError, match="there is no weights file"):
        read_weights(path)
    for content in (b"", b"hello", HEADER[:19]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cut off within its header"):
            read_weights(path)
    whole, _ = pair_file
    values = np.frombuffer(whole.read_bytes()[20:], "<f4").copy()
    for index, value, words in ((32 * 3, -1.0, "variances"), (0, np.nan, "not finite")):
        broken = values.copy()
        broken[index] = value
        path.write_bytes(HEADER + broken.tobytes())
        with pytest.raises(UserError, match=words):
            read_weights(path)


def test_seen_in_32_bits(pair_file, tmp_path):
    whole, model = pair_file
    path = tmp_path / "old.weights"
    path.write_bytes(struct.pack("<3ii", 0, 1, 0, 32013312) + whole.read_bytes()[20:])
    for name, value in read_darknet(path, model).items():
        assert torch.equal(value, model.state_dict()[name])


def test_attention_has_no_place(tmp_path):
    path = tmp_path / "attention.weights"
    with pytest.raises(UserError, match="no place for attention"):
        write_darknet(path, build_model(ModelSpec(("cat",), ANCHORS, phi=1)))
    assert not path.exists()


def run_cfg(text: str, model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """What enters each [yolo] layer when the layers of a cfg run one after the other with the model's parameters."""
    sections = [part.split("\n") for part in ("\n" + text.strip()).split("\n[")[1:]]
    parameters = [[model.state_dict()[name] for name in layer] for layer in list_layers(model)]
    outputs, raw, x = [], [], images
    for kind, *lines in sections[1:]:
        settings = {name: value for name, _, value in (line.partition("=") for line in lines if line)}
        number = {name: int(value) for name, value in settings.items() if value.lstrip("-").isdigit()}
        if kind == "convolutional]":
            *norm, weight = parameters.pop(0)
            assert weight.shape[0] == number["filters"]
            x = functional.conv2d(x, weight, stride=number["stride"], padding=number["size"] // 2 * number["pad"])
            if number.get("batch_normalize"):
                beta, gamma, mean, variance = (value[:, None, None] for value in norm)
                x = (x - mean) / (variance + 1e-5).sqrt() * gamma + beta
            else:
                x = x + norm[0][:, None, None]
            x = functional.leaky_relu(x, 0.1) if settings["activation"] == "leaky" else x
        elif kind == "route]":
            places = [int(place) for place in settings["layers"].split(",")]
            x = torch.cat([outputs[place] for place in places], dim=1)  # -1 is the layer before
            x = x.chunk(number.get("groups", 1), dim=1)[number.get("group_id", 0)]
        elif kind == "maxpool]":
            x = functional.max_pool2d(x, number["size"], number["stride"])
        elif kind == "upsample]":
            x = x.repeat_interleave(number["stride"], 2).repeat_interleave(number["stride"], 3)
        else:
            assert kind == "yolo]"
            raw.append(x)
        outputs.append(x)
    assert not parameters
    return raw


def test_the_cfg_describes_the_network(pair_file):
    _, model = pair_file
    images = torch.rand(2, 3, 64, 96)
    text = make_cfg(PAIR)
    with torch.no_grad():
        for found, expected in zip(run_cfg(text, model, images), model(images), strict=True):
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert "width=96\nheight=64\n" in text
    assert text.count("anchors=10,14, 23,27, 37,58, 81,82, 135,169, 344,319\nclasses=2\nnum=6\nscale_x_y=1.5\n") == 2
    assert text.index("mask=3,4,5") < text.index("mask=0,1,2")


def test_a_long_name_of_a_class_takes_no_time(tmp_path):
    """Of which torch.load makes its message."""
    path = tmp_path / "long.pth"
    torch.save({"weight": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"ctorch._utils\n", b"c" + b"a" * 100_000 + b"\n"))
    started = time.process_time()
    with pytest.raises(UserError, match="more than weights"):
        read_weights(path)
    assert time.process_time() - started < 5
