"""Exports compute what the checkpoint computes, or are discarded; the programs in the documentation run."""

import json
import os
import re
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import eval as eval_script
from nets.spec import ModelSpec
from nets.yolo import build_model
from tests.benchmarks import benchmark_inference
from tests.conftest import ANCHORS, ROOT, run
from tools import export
from utils.data.cache import build_cache
from utils.data.image_io import read_image
from utils.data.voc import load_classes, load_samples
from utils.detection.nms import EVALUATION_THRESHOLDS, Thresholds, select_detections
from utils.evaluation.metrics import evaluate
from utils.inference import exporters
from utils.inference.backends import EXPORT_KEY, REQUIREMENTS, import_runtime
from utils.inference.detector import Detector
from utils.system.errors import UserError
from utils.weights.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.weights.darknet import read_darknet

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf") if find_spec(name) is None]
FORMATS = ("onnx", "onnx-nms", "openvino", "int8", "torch")


def make_checkpoint(path: Path, devkit: Path, **changes) -> Path:
    """An untrained network for the generated set, with statistics, gains and scores that vary like trained ones."""
    torch.manual_seed(0)
    names = load_classes(devkit / "Demo" / "classes.txt")
    spec = ModelSpec(names, ANCHORS, **{"input_size": (64, 96), "scale_xy": 1.5} | changes)
    model = build_model(spec)
    images = export.load_images(sorted((devkit / "Demo" / "JPEGImages").iterdir()), spec, spec.input_size) / 255
    with torch.no_grad():
        for gain in model.attention_gain.values():
            gain.fill_(0.4)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1  # the statistics of one batch
        model.train()(images)
        for raw, head in zip(model.eval()(images), (model.yolo_headP5, model.yolo_headP4), strict=True):
            scale = torch.tensor([0.7, 0.7, 0.3, 0.3, *[1.5] * (1 + len(names))]).repeat(3) / raw.std(dim=(0, 2, 3))
            head[1].bias[:] = scale * (head[1].bias - raw.mean(dim=(0, 2, 3)))
            head[1].weight *= scale[:, None, None, None]
    save_checkpoint(path, Checkpoint(spec, model.state_dict(), {"thresholds": [0.3, 0.35, 0.4, 0.3, 0.5, 0.3]}, {}))
    return path


@pytest.fixture(scope="module")
def pictures(devkit):
    """A glob for 15 images."""
    return str(devkit / "Demo" / "JPEGImages" / "*_000[0-4].jpg")


@pytest.fixture(scope="module")
def exported(devkit, pictures, tmp_path_factory):
    """A checkpoint with attention in all formats that support it: its path, the folder and the differences."""
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}; pip install -r {REQUIREMENTS}")
    folder = tmp_path_factory.mktemp("export")
    path = make_checkpoint(folder / "best.safetensors", devkit, phi=4)
    differences = export.main(
        export.Config(str(path), FORMATS, images=(pictures,), devkit=str(devkit), sets=("Demo/test",))
    )
    return path, folder / "export", differences


@pytest.fixture(scope="module")
def letterboxed(devkit, pictures, tmp_path_factory):
    """A checkpoint with letterboxing and without attention, exported for the programs in the documentation."""
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}; pip install -r {REQUIREMENTS}")
    path = make_checkpoint(tmp_path_factory.mktemp("letterboxed") / "best.safetensors", devkit, letterbox=True)
    differences = export.main(export.Config(str(path), ("onnx", "openvino"), images=(pictures,)))
    return path, path.parent / "export", differences


@pytest.fixture(scope="module")
def plain(devkit, tmp_path_factory):
    """A checkpoint without attention."""
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "last.safetensors", devkit)


def test_exports_equal_the_checkpoint(exported):
    _, folder, differences = exported
    assert {path.name for path in folder.iterdir()} == {
        *("best.onnx", "best-nms.onnx", "best.xml", "best.bin", "best-int8.xml", "best-int8.bin", "best.pt2"),
    }
    assert differences.keys() == set(FORMATS)
    for name in set(FORMATS) - {"int8"}:
        assert differences[name].is_tolerable, name
    assert 1e-3 < differences["int8"].scores < 1
    assert (folder / "best-int8.bin").stat().st_size < (folder / "best.bin").stat().st_size / 3


@pytest.mark.parametrize("name", ["best.onnx", "best.xml"])
def test_detector_runs_exported_network(exported, pictures, name):
    path, folder, _ = exported
    ours, theirs = Detector.load(path), Detector.load(folder / name)
    assert theirs.spec == ours.spec
    assert theirs.confidences.tolist() == ours.confidences.tolist()
    images = [read_image(file) for file in export.find_images([pictures], 7)]
    found = 0
    for pair in zip(*(model.detect_batch(model.prepare(images)) for model in (ours, theirs)), strict=True):
        own, other = (item[np.lexsort((item.xyxy[:, 0], item.class_id))] for item in pair)  # scores may tie
        assert own.class_id.tolist() == other.class_id.tolist()
        np.testing.assert_allclose(own.xyxy, other.xyxy, atol=0.05)
        np.testing.assert_allclose(own.confidence, other.confidence, atol=1e-4)
        found += len(own)
    assert found > 20


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_benchmarks_run_exported_networks(exported, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_inference, "SMALL_FRAMES", 20)
    path, folder, _ = exported
    onnx, xml = str(folder / "best.onnx"), str(folder / "best.xml")
    network = {"exported": (onnx, xml), "rounds": 1, "compile": False}
    for benchmark, weights, settings, keys in (
        ("network", str(path), network, ("best.onnx", "best.xml")),
        ("memory", onnx, {"frames": 20}, ("frames",)),
        ("video", xml, {"frames": 3}, ("frames",)),
    ):
        benchmark_inference.main(benchmark_inference.Config(benchmark, weights, device="cpu", **settings))
        figures = json.loads(capsys.readouterr().out)
        assert all(figures[key] > 0 for key in keys)


def test_evaluation_accepts_exported_network(exported, devkit, tmp_path):
    path, folder, _ = exported
    settings = {"devkit": str(devkit), "sets": ("Demo/val",), "out": str(tmp_path), "device": "cpu"}
    metrics = eval_script.main(eval_script.Config((str(folder / "best.onnx"),), **settings))
    detector = Detector.load(path, thresholds=EVALUATION_THRESHOLDS)
    samples = load_samples(devkit, settings["sets"], detector.spec.class_names)
    cache = build_cache(samples, detector.spec, torch.device("cpu"))
    expected = evaluate(samples, detector.detect_cached(cache, 8), cache.sizes, detector.spec.class_names).metrics
    assert metrics["coco"]["AP"] == pytest.approx(expected["coco"]["AP"], abs=1e-4)


@pytest.mark.parametrize("checkpoint", ["exported", "letterboxed"])
@pytest.mark.parametrize(("program", "weights"), [("detect_onnx.py", "best.onnx"), ("detect_openvino.py", "best.xml")])
def test_programs_in_the_documentation_run(request, pictures, tmp_path, program, weights, checkpoint):
    path, folder, _ = request.getfixturevalue(checkpoint)
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (code,) = re.findall(rf"<!-- {program} -->\n```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / program).write_text(code, encoding="utf-8")
    picture = export.find_images([pictures], 1)[0]
    result = run(tmp_path / program, folder / weights, picture, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    expected = Detector.load(path)(read_image(picture))
    found = sorted(
        (name, float(score), *map(float, box)) for name, score, *box in map(str.split, result.stdout.splitlines())
    )
    scores = [float(f"{score:.4f}") for score in expected.confidence]  # as printed
    wanted = sorted(zip(expected.data["class_name"], scores, *expected.xyxy.T, strict=True))
    assert len(found) > 2
    assert [row[0] for row in found] == [row[0] for row in wanted]
    np.testing.assert_allclose([row[1:] for row in found], [row[1:] for row in wanted], atol=0.06)


@pytest.mark.skipif(int(cv2.__version__.partition(".")[0]) < 5, reason="OpenCV 4 does not support dynamic sizes")
def test_opencv_runs_onnx(exported):
    path, folder, _ = exported
    network = cv2.dnn.readNetFromONNX(str(folder / "best.onnx"))
    images = torch.randint(0, 256, (2, 3, 96, 64), dtype=torch.uint8)
    network.setInput(images.float().numpy() / 255, "images")
    boxes, scores = network.forward(["boxes", "scores"])
    own = Detector.load(path).network
    expected_boxes, expected_scores = own.to_boxes(own(images))
    np.testing.assert_allclose(boxes, expected_boxes, atol=0.05, rtol=1e-5)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-4)


def test_axes_are_named_and_no_local_path_is_stored(exported):
    _, folder, _ = exported
    onnx = import_runtime("onnx")
    graph = onnx.load(folder / "best.onnx").graph
    axes = [axis.dim_param or axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 3, "height", "width"]
    with zipfile.ZipFile(folder / "best.pt2") as parts:
        contents = [(folder / "best.onnx").read_bytes(), *(parts.read(name) for name in parts.namelist())]
    for content in contents:
        assert str(ROOT).encode() not in content


def test_torch_program_stores_the_spec(exported):
    path, folder, _ = exported
    about = {EXPORT_KEY: ""}
    torch.export.load(folder / "best.pt2", extra_files=about)
    assert ModelSpec.from_dict(json.loads(about[EXPORT_KEY])["spec"]) == load_checkpoint(path).spec


def test_telemetry_is_off(exported):
    openvino, nncf = import_runtime("openvino.tools.ovc"), import_runtime("nncf.telemetry.wrapper")
    assert type(openvino.telemetry).__module__ == "openvino.tools.ovc.telemetry_stub"
    assert nncf.telemetry is nncf.NNCFTelemetryStub or isinstance(nncf.telemetry, nncf.NNCFTelemetryStub)
    assert sys.modules["openvino_telemetry"] is None


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_signals_work_after_openvino_networks_are_deleted(exported):
    """Each openvino.Core installs a signal stack, which would be missing after deletion in the order of creation."""
    _, folder, _ = exported
    program = f"""
import os, signal, torch
from utils.inference.detector import Detector
from utils.system.signals import Stopped, StopSignals

networks = [Detector.load({str(folder / "best.xml")!r}).network for _ in range(2)]
for network in networks:
    network(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
del network
networks.pop(0)
networks.pop(0)
try:
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
except Stopped as stop:
    print(stop)
"""
    result = run("-c", program)
    assert (result.returncode, result.stdout) == (0, "SIGTERM\n"), result.stderr


@pytest.mark.parametrize("factor", [1.01, float("nan")])
@pytest.mark.parametrize("name", ["onnx", "onnx-nms"])
def test_discards_network_that_differs(exported, pictures, tmp_path, monkeypatch, name, factor):
    path, folder, _ = exported
    onnx = import_runtime("onnx")
    suffix = export.FORMATS[name].suffix

    def spoil(job, target):
        proto = onnx.load(folder / f"best{suffix}")
        weight = next(
            item for item in proto.graph.initializer if item.name.endswith("resblock_body2.conv2.conv.weight")
        )
        values = onnx.numpy_helper.to_array(weight) * np.float32(factor)
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        onnx.save(proto, target)

    monkeypatch.setitem(export.FORMATS, name, export.FORMATS[name]._replace(write=spoil))
    (tmp_path / f"best{suffix}").write_text("an older file")
    with pytest.raises(UserError, match="was discarded: boxes differ"):
        export.main(export.Config(str(path), (name,), str(tmp_path), (pictures,)))
    assert (tmp_path / f"best{suffix}").read_text() == "an older file"
    assert len(list(tmp_path.iterdir())) == 1


def test_darknet_weights_equal_the_checkpoint(plain, pictures, tmp_path):
    differences = export.main(export.Config(str(plain), ("darknet",), str(tmp_path), (pictures,)))
    assert differences["darknet"].is_tolerable
    assert {path.name for path in tmp_path.iterdir()} == {"last.weights", "last.cfg", "last.names"}
    checkpoint = load_checkpoint(plain)
    assert load_classes(tmp_path / "last.names") == checkpoint.spec.class_names
    for name, value in read_darknet(tmp_path / "last.weights", build_model(checkpoint.spec)).items():
        assert torch.equal(value, checkpoint.weights[name])


def test_discards_darknet_weights_that_differ(plain, pictures, tmp_path, monkeypatch):
    real = exporters.write_darknet

    def spoil(path, model):
        with torch.no_grad():
            other = load_checkpoint(plain).build_model(plain)
            other.conv_for_P5.conv.weight *= 1.01
        real(path, other)

    monkeypatch.setattr(exporters, "write_darknet", spoil)
    with pytest.raises(UserError, match="was discarded: boxes differ"):
        export.main(export.Config(str(plain), ("darknet",), str(tmp_path / "out"), (pictures,)))
    assert not list((tmp_path / "out").iterdir())


def test_explains_errors(plain, devkit, pictures, tmp_path, monkeypatch, expect_failure):
    with_attention = make_checkpoint(tmp_path / "a.safetensors", devkit, phi=1)
    formats = ["--formats", "darknet"]
    expect_failure(
        export, ["--weights", with_attention, "--images", pictures, *formats], "phi 1", "Darknet does not support"
    )
    expect_failure(export, ["--weights", plain, *formats], "images is empty")
    expect_failure(export, ["--weights", plain, "--images", tmp_path / "none", *formats], "there is no image", "none")
    (tmp_path / "bad.jpg").write_text("hello")
    expect_failure(
        export, ["--weights", plain, "--images", tmp_path / "bad.jpg", *formats], "bad.jpg is not a readable image"
    )
    expect_failure(export, ["--weights", plain, "--images", pictures, "--nms-iou", 2, *formats], "nms_iou is 2")
    (tmp_path / "x.weights").write_text("hello")
    expect_failure(export, ["--weights", tmp_path / "x.weights", "--images", pictures, *formats], "not a checkpoint")
    (tmp_path / "x.onnx").write_text("hello")
    expect_failure(export, ["--weights", tmp_path / "x.onnx", "--images", pictures, *formats], "checkpoint that it was")
    (tmp_path / "file").touch()
    expect_failure(
        export, ["--weights", plain, "--images", pictures, "--out", tmp_path / "file", *formats], "cannot write"
    )
    monkeypatch.setitem(sys.modules, "openvino", None)
    arguments = ["--weights", plain, "--images", pictures, "--formats", "openvino"]
    expect_failure(export, arguments, "openvino is not available", "requirements-export.txt")


def test_refuses_checkpoint_that_detects_nothing(plain, pictures, tmp_path):
    checkpoint = load_checkpoint(plain)
    for head in ("yolo_headP5", "yolo_headP4"):
        checkpoint.weights[f"{head}.1.bias"].fill_(-20)
        checkpoint.weights[f"{head}.1.weight"].zero_()
    save_checkpoint(tmp_path / "blind.safetensors", checkpoint)
    with pytest.raises(UserError, match="detects nothing in these 15 images"):
        export.main(export.Config(str(tmp_path / "blind.safetensors"), ("darknet",), images=(pictures,)))


def test_refuses_files_that_are_not_exports(exported, tmp_path):
    _, folder, _ = exported
    onnx = import_runtime("onnx")
    for name in ("garbage.onnx", "garbage.xml"):
        (tmp_path / name).write_text("hello")
        with pytest.raises(UserError, match=r"is not an? (ONNX file|network)"):
            Detector.load(tmp_path / name)
        with pytest.raises(UserError, match="does not exist"):
            Detector.load(tmp_path / f"no {name}")
    proto = onnx.load(folder / "best.onnx")
    for metadata in ({}, {EXPORT_KEY: "hello"}, {EXPORT_KEY: '{"format": "yolov4-tiny/0"}'}, {EXPORT_KEY: "[]"}):
        onnx.helper.set_model_props(proto, metadata)
        onnx.save(proto, tmp_path / "foreign.onnx")
        with pytest.raises(UserError, match="was not written by this version"):
            Detector.load(tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="contains NMS"):
        Detector.load(folder / "best-nms.onnx")
    (tmp_path / "cut.onnx").write_bytes((folder / "best.onnx").read_bytes()[:100_000])
    (tmp_path / "alone.xml").write_bytes((folder / "best.xml").read_bytes())
    (tmp_path / "cut.xml").write_bytes((folder / "best.xml").read_bytes())
    (tmp_path / "cut.bin").write_bytes((folder / "best.bin").read_bytes()[:100_000])
    for name in ("cut.onnx", "alone.xml", "cut.xml"):
        with pytest.raises(UserError, match=r"is not an? (ONNX file|network)"):
            Detector.load(tmp_path / name)


def test_generated_nms_equals_select_detections():
    """Boxes, averaging included, for random boxes that overlap, with one threshold per class."""
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}; pip install -r {REQUIREMENTS}")
    from utils.inference.onnx_nms import build_nms

    generator = torch.Generator().manual_seed(0)
    corners = 100 * torch.rand(2, 40, 2, generator=generator)
    boxes = torch.cat([corners, corners + 20 + 60 * torch.rand(2, 40, 2, generator=generator)], dim=2)
    boxes[:, 0, 2:] = boxes[:, 0, :2]  # without area
    scores = torch.rand(2, 40, 3, generator=generator)
    confidences = [0.3, 0.5, 0.2]
    session = import_runtime("onnxruntime").InferenceSession(build_nms(confidences, 0.5).SerializeToString())
    (rows,) = session.run(["detections"], {"boxes": boxes.numpy(), "scores": scores.numpy()})
    expected = select_detections(boxes, scores, torch.tensor(confidences), Thresholds(nms_iou=0.5))
    assert len(rows) > 40
    for image, padded in enumerate(expected):
        own, own_scores, labels = padded[padded[:, 5] >= 0].split([4, 1, 1], dim=1)
        found = rows[rows[:, 0] == image]
        found = found[np.lexsort((found[:, 6], -found[:, 5]))]
        np.testing.assert_array_equal(found[:, 6:], labels)
        np.testing.assert_array_equal(found[:, 5:6], own_scores)
        np.testing.assert_allclose(found[:, 1:5], own, atol=1e-3)
        kept = torch.isin(own, boxes[image]).all(dim=1)
        assert kept.any() and not kept.all()  # averaging changes most boxes, but not the one without area
