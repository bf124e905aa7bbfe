"""Evaluation of a trained network: its metrics, comparisons and messages."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import eval as eval_script
import train
from tests.conftest import ROOT, trained_config
from utils.data.image_io import read_image
from utils.data.voc import load_samples
from utils.evaluation.coco import build_dataset
from utils.weights.checkpoint import load_checkpoint


@pytest.fixture
def config(devkit) -> train.Config:
    return trained_config(devkit)


def test_evaluation_equals_the_logged_validation(config, trained_run, tmp_path):
    last = json.loads((trained_run / "metrics.jsonl").read_text().splitlines()[-1])
    for batch_size in (1, 32):
        metrics = eval_script.main(
            eval_script.Config(
                weights=(str(trained_run / "last.safetensors"),),
                devkit=config.devkit,
                sets=("Demo/val",),
                out=str(tmp_path / "eval"),
                batch_size=batch_size,
                device="cpu",
            )
        )
        assert metrics["coco"]["AP"] == pytest.approx(last["val/AP"], abs=1e-6)
        assert metrics["voc"]["mAP_area"] == pytest.approx(last["val/mAP_area"], abs=1e-6)
        assert metrics["coco"]["AP50"] == pytest.approx(last["val/AP50"], abs=1e-6)
    written = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert written["coco"] == metrics["coco"]
    assert set(written["voc"]["per_class"]) == {"circle", "square", "triangle", "star", "cross", "ring"}
    assert read_image(tmp_path / "eval" / "precision_recall.png").std() > 5


def test_coco_annotations_give_the_metrics_of_voc_annotations(config, trained_run, tmp_path, expect_failure):
    settings = eval_script.Config(
        weights=(str(trained_run / "last.safetensors"),), devkit=config.devkit, sets=("Demo/val",), device="cpu"
    )
    names = load_checkpoint(trained_run / "last.safetensors").spec.class_names
    samples = load_samples(config.devkit, ["Demo/val"], names)
    truth = build_dataset(samples, [sample.size for sample in samples], names).truth
    for image, sample in zip(truth["images"], samples, strict=True):
        image["file_name"] = sample.image.name
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    images = str(Path(config.devkit) / "Demo" / "JPEGImages")
    coco = {"coco": str(tmp_path / "truth.json"), "images": images, "out": str(tmp_path / "coco")}
    ours = eval_script.main(replace(settings, out=str(tmp_path / "voc")))
    assert eval_script.main(replace(settings, **coco)) == ours
    results = json.loads((tmp_path / "coco" / "coco_results.json").read_text())
    assert {item["image_id"] for item in results} == {image["id"] for image in truth["images"]}
    eval_script.main(replace(settings, out=str(tmp_path / "coco")))
    assert not (tmp_path / "coco" / "coco_results.json").exists()
    expect_failure(eval_script, ["--coco", "truth.json"], "coco and images must be given together")


def test_compares_checkpoints(config, trained_run, tmp_path, capsys):
    last = trained_run / "last.safetensors"
    shutil.copy(last, tmp_path / "same.safetensors")
    settings = eval_script.Config(
        weights=(str(last), str(trained_run / "best.safetensors"), str(tmp_path / "same.safetensors")),
        devkit=config.devkit,
        sets=("Demo/val",),
        out=str(tmp_path / "eval"),
        device="cpu",
    )
    first = eval_script.main(settings)
    rows = json.loads((tmp_path / "eval" / "comparison.json").read_text())
    assert [row["weights"] for row in rows] == list(settings.weights)
    assert rows[0]["AP"] == first["coco"]["AP"]
    assert rows[2]["difference"] == 0
    assert rows[2]["difference_interval"] == [0, 0]
    assert len(list((tmp_path / "eval").glob("*/report.html"))) == 3
    said = capsys.readouterr().out
    assert "paired bootstrap over 6 images" in said
    assert (tmp_path / "eval" / "comparison.txt").read_text().strip() in said


def test_evaluation_explains_invalid_arguments(expect_failure, trained_run, devkit, tmp_path):
    weights = ["--weights", trained_run / "last.safetensors", "--device", "cpu"]
    classes = ["--classes", ROOT / "model_data" / "voc_classes.txt"]
    split = ["--devkit", devkit, "--sets", "Demo/val"]
    (tmp_path / "bad.jpg").write_text("not an image")
    expect_failure(eval_script, [*weights, *classes], "6 classes", "20")
    expect_failure(eval_script, [*weights, *split, "--out", tmp_path / "bad.jpg"], "cannot write to", "bad.jpg")
    expect_failure(eval_script, [*weights, "--sets", "Demo/none"], "the set Demo/none does not exist")
    expect_failure(eval_script, [*weights, *split, "Demo//val"], "Demo/val, Demo//val list 6 images more than once")
    expect_failure(eval_script, [*weights, *split, "--confidence", 0.5], "confidence is 0.5, but must be between 0 and")
    expect_failure(eval_script, [*weights, "--sets", "VOC2007/test", "--devkit", tmp_path], "VOC2007/test", "make demo")
    assert not (trained_run / "eval").exists()
