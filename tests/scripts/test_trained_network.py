"""Detection with a trained network, and the scripts one after the other on the command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import predict
from tests.conftest import ROOT, run
from utils.data.cache import build_cache
from utils.data.image_io import read_image, write_image
from utils.data.voc import load_samples
from utils.detection.nms import EVALUATION_THRESHOLDS, Thresholds
from utils.inference.backends import TorchNetwork
from utils.inference.detector import Detector
from utils.weights.checkpoint import load_checkpoint, save_checkpoint


def test_prediction_uses_the_thresholds_of_the_validation(trained_run, tmp_path):
    path = trained_run / "last.safetensors"
    checkpoint = load_checkpoint(path)
    torch.testing.assert_close(Detector.load(path).confidences, torch.tensor(checkpoint.info["thresholds"]))
    assert Detector.load(path, thresholds=Thresholds(0.4)).confidences.tolist() == pytest.approx([0.4] * 6)
    save_checkpoint(tmp_path / "unknown.safetensors", replace(checkpoint, info={}))
    assert Detector.load(tmp_path / "unknown.safetensors").confidences.tolist() == pytest.approx([0.3] * 6)


def test_single_batched_and_cached_images_give_the_same_detections(devkit, trained_run):
    detector = Detector.load(trained_run / "last.safetensors", thresholds=EVALUATION_THRESHOLDS)
    samples = load_samples(devkit, ["Demo/test"], detector.spec.class_names)
    cache = build_cache(samples, detector.spec, torch.device("cpu"))
    images = [read_image(sample.image) for sample in samples]
    single = [detector(image) for image in images]
    batched = detector.detect_batch(detector.prepare(images))
    cached = [
        found
        for part, heads in detector.run_cached(cache, 3)
        for found in detector.select(heads, cache.fits[part], cache.sizes[part])
    ]
    for one, other in [*zip(single, batched, strict=True), *zip(single, cached, strict=True)]:
        assert len(one) == len(other) > 0
        np.testing.assert_allclose(one.confidence, other.confidence, atol=1e-5)
        np.testing.assert_allclose(one.xyxy[:20], other.xyxy[:20], atol=0.05)
    heights_and_widths = np.array([image.shape[:2] for image in images])
    for found, (height, width) in zip(single, heights_and_widths, strict=True):
        assert found.xyxy.min() >= 0
        assert (found.xyxy <= [width, height, width, height]).all()


def test_folded_batch_norm_keeps_the_outputs(trained_run):
    checkpoint = load_checkpoint(trained_run / "last.safetensors")
    model = checkpoint.build_model("last").eval()
    network = TorchNetwork(model, checkpoint.spec, torch.device("cpu"))
    image = torch.randint(256, (2, 3, 96, 128), dtype=torch.uint8)
    with torch.no_grad():
        for ours, theirs in zip(network(image), model(image / 255), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_prediction_writes_pictures_lines_and_crops(devkit, trained_run, tmp_path, capsys):
    images = tmp_path / "in put" / "ä"
    images.mkdir(parents=True)
    sample = load_samples(devkit, ["Demo/test"], load_checkpoint(trained_run / "last.safetensors").spec.class_names)[0]
    picture = read_image(sample.image)
    write_image(images / "one.png", picture)
    write_image(images / "tiny.jpg", picture[:9, :7])
    (images / "no suffix").write_bytes((images / "one.png").read_bytes())
    (images / "more").mkdir()
    write_image(images / "more" / "one.png", picture)
    (images / "notes.txt").write_text("no image")
    (images / "broken.jpg").write_text("no image either")
    out = tmp_path / "out"
    settings = predict.Config(
        source=(str(images),),
        weights=str(trained_run / "last.safetensors"),
        out=str(out),
        confidence=0.01,
        save=("pictures", "jsonl", "crops", "counts"),
        device="cpu",
    )
    found = predict.main(settings)
    lines = [json.loads(line) for line in (out / "detections.jsonl").read_text().splitlines()]
    assert len(lines) == found > 0
    assert set(lines[0]) == {"image", "class", "score", "box"}
    assert all(line["score"] >= 0.01 and len(line["box"]) == 4 for line in lines)
    drawn = read_image(out / "one.png")
    assert drawn.shape == picture.shape
    assert (drawn != picture).any()
    assert read_image(out / "tiny.jpg").shape == (9, 7, 3)
    assert list((out / "crops").glob("*/one_*.png"))
    said = capsys.readouterr()
    assert "total: " in said.out
    assert said.err.startswith("warning: ") and "broken.jpg" in said.err
    assert "broken.jpg" in said.err
    single = predict.main(replace(settings, source=(str(images / "one.png"),), out=str(tmp_path / "b")))
    matched = predict.main(replace(settings, source=(str(images / "o*.png"),), out=str(tmp_path / "c")))
    assert single == matched > 0
    assert predict.main(replace(settings, source=(str(images / "no suffix"),), out=str(tmp_path / "d"))) == single
    assert (tmp_path / "d" / "no suffix.png").is_file()
    assert (
        predict.main(replace(settings, source=(str(images / "**" / "one.png"),), out=str(tmp_path / "e"))) == 2 * single
    )
    assert (tmp_path / "e" / "one_2.png").is_file()
    assert len(list((tmp_path / "e" / "crops").glob("*/*.png"))) == 2 * len(
        list((tmp_path / "b" / "crops").glob("*/*"))
    )


def test_prediction_explains_invalid_arguments(expect_failure, trained_run, devkit, tmp_path):
    weights = ["--weights", trained_run / "last.safetensors", "--device", "cpu"]
    classes = ["--classes", ROOT / "model_data" / "voc_classes.txt"]
    image = devkit / "Demo" / "JPEGImages" / "test_0000.jpg"
    (tmp_path / "bad.jpg").write_text("not an image")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    expect_failure(predict, [image, *weights, "--out", tmp_path / "bad.jpg"], "cannot write to", "bad.jpg")
    expect_failure(predict, [], "no source")
    expect_failure(predict, [image, "--weights", tmp_path / "a.pth"], "a.pth", "tools/convert_weights.py --weights")
    expect_failure(predict, [devkit / "Demo", *weights], "contains no images")
    expect_failure(predict, [image, *weights, *classes], "6 classes", "20")
    expect_failure(predict, [image, "--weights", ROOT / "README.md"], "README.md", "not a checkpoint")
    expect_failure(predict, ["no such.jpg", *weights], "no such.jpg")
    expect_failure(predict, [image, *weights, "--confidence", 2], "confidence is 2")
    expect_failure(predict, [image, *weights, "--out", image.parent], "overwrite the input")
    expect_failure(predict, [tmp_path / "bad.jpg", *weights, "--out", tmp_path / "out"], "bad.jpg")


def test_scripts_work_on_the_command_line(devkit, tmp_path):
    common = ["--device", "cpu", "--devkit", devkit]
    result = run(
        "train.py", *common, "--train-sets", "Demo/train", "Demo/test", "--val-sets", "Demo/val", "--classes",
        devkit / "Demo" / "classes.txt", "--phi", 1, "--input-size", 64, 64, "--epochs", 1, "--batch-size", 10,
        "--seed", 3, "--run-dir", tmp_path / "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "30 images" in result.stdout
    assert "phi 1" in result.stdout
    result = run("train.py", "--resume", "--run-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    weights = tmp_path / "run" / "last.safetensors"
    result = run("eval.py", *common, "--weights", weights, "--sets", "Demo/test", "--out", tmp_path / "eval")
    assert result.returncode == 0, result.stderr
    assert "mean" in result.stdout
    source = devkit / "Demo" / "JPEGImages"
    result = run("predict.py", source, "--weights", weights, "--out", tmp_path / "out", "--confidence", 0.5)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "detections.jsonl").is_file()
