"""The scripts as users run them, on a small drawn set: train, resume, evaluate, predict, and mistakes."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as eval_script
import predict
import train
from tests.conftest import ROOT, run, small_run
from utils.data.cache import build_cache
from utils.data.image_io import read_image, write_image
from utils.data.voc import load_samples
from utils.detection.nms import EVALUATION_THRESHOLDS, Thresholds
from utils.evaluation.coco import dataset_of
from utils.inference.backends import TorchNetwork
from utils.inference.detector import Detector
from utils.inference.drawing import draw_detections
from utils.weights.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def config(devkit) -> train.Config:
    """A run of a minute's fraction."""
    return small_run(
        devkit,
        input_size=(96, 128),
        epochs=4,
        batch_size=8,
        nominal_batch=16,
        freeze_epochs=1,
        eval_every=2,
        phi=4,
    )


@pytest.fixture(scope="module")
def run_dir(config, tmp_path_factory):
    """A finished run."""
    return train.main(replace(config, run_dir=str(tmp_path_factory.mktemp("runs") / "whole")))


def test_a_run_leaves_its_files(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert ["val/AP" in record for record in records] == [False, True, False, True]
    assert all(np.isfinite(record["train/loss"]) for record in records)
    for name in ("batch_0.jpg", "batch_1.jpg", "val_examples.jpg", "curves.png"):
        assert read_image(run_dir / name).std() > 5, name
    board = EventAccumulator(str(run_dir / "tensorboard"), {"histograms": 0}).Reload()  # 0: keep all
    assert {"train/loss", "train/lr", "val/AP", "val/AP50"} <= set(board.Tags()["scalars"])
    assert {"batch_0", "val_examples"} <= set(board.Tags()["images"])
    for place in ("feat1", "feat2", "upsample"):
        gates = board.Histograms(f"gate/{place}")
        assert [event.step for event in gates] == [2, 4]
        assert all(0 < event.histogram_value.min <= event.histogram_value.max < 1 for event in gates)
        gains = [event.value for event in board.Scalars(f"gain/{place}")]
        assert len(gains) == 4
        assert gains[-1] != 0
    best = load_checkpoint(run_dir / "best.safetensors")
    assert best.info["best"] == max(record.get("val/AP", 0) for record in records)
    assert not best.training
    assert (run_dir / "val" / "report.html").is_file()
    measured = json.loads((run_dir / "val" / "metrics.json").read_text())
    assert measured["coco"]["AP"] == pytest.approx(best.info["best"], abs=1e-6)
    assert best.info["thresholds"] == [values["threshold"] for values in measured["best"].values()]


def test_a_resumed_run_equals_one_that_never_stopped(config, run_dir, tmp_path, monkeypatch, expect_failure):
    folder = tmp_path / "stopped"
    real = train.run_epoch

    def stop_before_the_third(trainer, *arguments):
        if trainer.state.progress.epoch == 2:
            raise KeyboardInterrupt
        real(trainer, *arguments)

    monkeypatch.setattr(train, "run_epoch", stop_before_the_third)
    with pytest.raises(KeyboardInterrupt):
        train.main(replace(config, run_dir=str(folder)))
    monkeypatch.undo()
    (folder / "metrics.jsonl").open("a").write('{"epoch": 3, "train/loss": 9}\n{"epo')  # from a step that was lost
    expect_failure(train, ["--resume", "--run-dir", folder, "--epochs", 9], "keeps its settings", "epochs is 4")
    train.main(train.Config(run_dir=str(folder), resume=True))
    whole, resumed = (load_checkpoint(path / "last.safetensors") for path in (run_dir, folder))
    assert whole.weights.keys() == resumed.weights.keys()
    for part in ("weights", "training"):
        for name, value in getattr(whole, part).items():
            assert torch.equal(value, getattr(resumed, part)[name]), (part, name)
    timeless = [
        [
            {name: value for name, value in json.loads(line).items() if "second" not in name}
            for line in (path / "metrics.jsonl").read_text().splitlines()
        ]
        for path in (run_dir, folder)
    ]
    assert timeless[0] == timeless[1]


def test_logged_map_is_what_eval_says(config, run_dir, tmp_path):
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    for batch_size in (1, 32):
        metrics = eval_script.main(
            eval_script.Config(
                weights=(str(run_dir / "last.safetensors"),),
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


def test_cocos_ground_truth_gives_what_the_annotations_give(config, run_dir, tmp_path, expect_failure):
    settings = eval_script.Config(
        weights=(str(run_dir / "last.safetensors"),), devkit=config.devkit, sets=("Demo/val",), device="cpu"
    )
    names = load_checkpoint(run_dir / "last.safetensors").spec.class_names
    samples = load_samples(config.devkit, ["Demo/val"], names)
    truth = dataset_of(samples, [sample.size for sample in samples], names).truth
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
    expect_failure(eval_script, ["--coco", "truth.json"], "coco and images go together")


def test_checkpoints_are_compared(config, run_dir, tmp_path, capsys):
    last = run_dir / "last.safetensors"
    shutil.copy(last, tmp_path / "same.safetensors")
    settings = eval_script.Config(
        weights=(str(last), str(run_dir / "best.safetensors"), str(tmp_path / "same.safetensors")),
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


def test_prediction_uses_the_thresholds_of_the_validation(run_dir, tmp_path):
    path = run_dir / "last.safetensors"
    checkpoint = load_checkpoint(path)
    torch.testing.assert_close(Detector.load(path).confidences, torch.tensor(checkpoint.info["thresholds"]))
    assert Detector.load(path, thresholds=Thresholds(0.4)).confidences.tolist() == pytest.approx([0.4] * 6)
    save_checkpoint(tmp_path / "unknown.safetensors", replace(checkpoint, info={}))
    assert Detector.load(tmp_path / "unknown.safetensors").confidences.tolist() == pytest.approx([0.3] * 6)


def test_detector_is_one_path(config, run_dir):
    """Single images, batches and the cache give the same detections."""
    detector = Detector.load(run_dir / "last.safetensors", thresholds=EVALUATION_THRESHOLDS)
    samples = load_samples(config.devkit, ["Demo/test"], detector.spec.class_names)
    cache = build_cache(samples, detector.spec, torch.device("cpu"))
    images = [read_image(sample.image) for sample in samples]
    single = [detector(image) for image in images]
    batched = list(detector.detect(images, batch_size=4))
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


def test_folding_changes_nothing(run_dir):
    checkpoint = load_checkpoint(run_dir / "last.safetensors")
    model = checkpoint.build_model("last").eval()
    network = TorchNetwork(model, checkpoint.spec, torch.device("cpu"))
    image = torch.randint(256, (2, 3, 96, 128), dtype=torch.uint8)
    with torch.no_grad():
        for ours, theirs in zip(network(image), model(image / 255), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_predict_writes_pictures_lines_and_crops(config, run_dir, tmp_path, capsys):
    images = tmp_path / "in put" / "ä"
    images.mkdir(parents=True)
    sample = load_samples(config.devkit, ["Demo/test"], load_checkpoint(run_dir / "last.safetensors").spec.class_names)[
        0
    ]
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
        weights=str(run_dir / "last.safetensors"),
        out=str(out),
        confidence=0.01,
        write=("pictures", "jsonl", "crops", "counts"),
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
    assert "in all: " in said.out
    assert said.err.startswith("1 problem: ") and "broken.jpg" in said.err
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


def test_weights_start_a_new_run(config, run_dir, tmp_path, capsys):
    checkpoint = load_checkpoint(run_dir / "last.safetensors")
    short = replace(config, epochs=1, freeze_epochs=0, val_sets=(), run_dir=str(tmp_path / "a"))
    train.main(replace(short, weights=str(run_dir / "last.safetensors")))
    assert "tensors taken" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "a" / "best.safetensors").spec.identity_start
    plain = {name: value for name, value in checkpoint.weights.items() if not name.startswith("attention_gain")}
    torch.save(plain, tmp_path / "published.pth")
    train.main(replace(short, weights=str(tmp_path / "published.pth"), run_dir=str(tmp_path / "b")))
    assert not load_checkpoint(tmp_path / "b" / "best.safetensors").spec.identity_start


def test_the_newest_run_is_meant_without_a_name(run_dir, tmp_path, monkeypatch, expect_failure):
    monkeypatch.chdir(tmp_path)
    expect_failure(train, ["--resume"], "no run under logs/")
    for name, parts in (("old", ["last", "best"]), ("new", ["last"])):
        (tmp_path / "logs" / name).mkdir(parents=True)
        for part in parts:
            shutil.copy(run_dir / f"{part}.safetensors", tmp_path / "logs" / name)
        (tmp_path / "logs" / name / "metrics.jsonl").touch()
        os.utime(tmp_path / "logs" / name / "metrics.jsonl", (len(name), 10.0 * len(parts)))
    assert find_checkpoint() == Path("logs/old/best.safetensors")
    assert find_checkpoint("logs/new") == Path("logs/new/last.safetensors")
    os.utime(tmp_path / "logs" / "new" / "metrics.jsonl")
    assert find_checkpoint() == Path("logs/new/last.safetensors")
    (tmp_path / "logs" / "new" / "last.safetensors").unlink()
    expect_failure(train, ["--resume"], "logs/new", "before its first checkpoint")


def test_a_set_smaller_than_a_batch_trains(config, tmp_path):
    small = replace(config, batch_size=64, nominal_batch=256, epochs=2, freeze_epochs=0, run_dir=str(tmp_path / "a"))
    folder = train.main(small)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_weights_that_are_not_finite_are_refused(config, run_dir, tmp_path):
    checkpoint = load_checkpoint(run_dir / "last.safetensors")
    broken = {
        name: value * float("nan") if value.is_floating_point() else value for name, value in checkpoint.weights.items()
    }
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(train.UserError, match=r"broken\.pth holds numbers that are not finite, in "):
        train.main(replace(config, weights=str(tmp_path / "broken.pth"), run_dir=str(tmp_path / "a")))


def test_flags_work_as_a_user_gives_them(devkit, tmp_path):
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


@pytest.mark.parametrize("script", ["train.py", "eval.py", "predict.py"])
def test_help_explains_every_flag(script):
    result = run(script, "--help")
    assert result.returncode == 0
    config = {"train.py": train.Config, "eval.py": eval_script.Config, "predict.py": predict.Config}[script]
    for name in config.__annotations__:
        assert name.replace("_", "-") in result.stdout.lower(), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--devkit", "/nowhere"], ["VOC2007/train", "/nowhere", "make demo"]),
        (["--phi", "99"], ["phi is 99", "0 (none), 1 (se)"]),
        (["--input-size", "416", "400"], ["multiples of 32"]),
        (["--lr", "nan"], ["lr is nan"]),
        (["--batch-size", "-1"], ["batch_size is -1"]),
        (["--classes", "nothing.txt"], ["nothing.txt"]),
        (["--phi", "2", "--attention-args", "kernel_size", "5"], ["3 or 7"]),
        (["--weights", "nothing.pth"], ["nothing.pth"]),
        (["--weights", "README.md"], ["README.md"]),
        (["--resume", "--run-dir", "/nowhere"], ["/nowhere"]),
        (["--device", "tpu"], ["auto, cpu or cuda"]),
        (["--train-sets", "MySet"], ["folder/split", "MySet/train"]),
        (["--phi", "2", "--attention-args", "ratoi", "8"], ["takes the arguments ratio, kernel_size", "'ratoi'"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--phi", "3", "--attention-args", "gamma", "0"], ["gamma is 0"]),
    ],
)
def test_mistakes_in_training(expect_failure, arguments, words):
    expect_failure(train, ["--device", "cpu", *arguments], *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(("script", "source"), [(train, []), (eval_script, []), (predict, ["README.md"])])
def test_cuda_asked_for_and_absent(expect_failure, script, source):
    expect_failure(script, [*source, "--device", "cuda"], "CUDA", "--device cpu")


def test_classes_that_match_nothing(expect_failure, devkit):
    arguments = ["--device", "cpu", "--devkit", devkit, "--train-sets", "Demo/train", "--val-sets", "Demo/val"]
    expect_failure(train, arguments, "'circle'", "'ring'", "aeroplane")


def test_mistakes_with_a_checkpoint(expect_failure, run_dir, devkit, tmp_path):
    weights = ["--weights", run_dir / "last.safetensors", "--device", "cpu"]
    classes = ["--classes", ROOT / "model_data" / "voc_classes.txt"]
    image = devkit / "Demo" / "JPEGImages" / "test_0000.jpg"
    (tmp_path / "bad.jpg").write_text("no picture")
    expect_failure(train, ["--run-dir", run_dir], "already holds a run", "--resume")
    expect_failure(eval_script, [*weights, *classes], "6 classes", "20")
    split = ["--devkit", devkit, "--sets", "Demo/val"]
    expect_failure(eval_script, [*weights, *split, "--out", tmp_path / "bad.jpg"], "cannot write to", "bad.jpg")
    expect_failure(eval_script, [*weights, "--sets", "Demo/none"], "no data set Demo/none")
    expect_failure(eval_script, [*weights, *split, "Demo//val"], "Demo/val, Demo//val name 6 images twice")
    expect_failure(eval_script, [*weights, *split, "--confidence", 0.5], "confidence is 0.5, but must be between 0 and")
    overlapping = ["--devkit", devkit, "--train-sets", "Demo/train", "--val-sets", "Demo/val", "Demo//val"]
    overlapping += ["--classes", devkit / "Demo" / "classes.txt", "--device", "cpu", "--run-dir", tmp_path / "run"]
    expect_failure(train, overlapping, "Demo/val, Demo//val name 6 images twice")
    assert not (run_dir / "eval").exists()  # which a mistake leaves nothing in
    expect_failure(predict, [image, *weights, "--out", tmp_path / "bad.jpg"], "cannot write to", "bad.jpg")
    expect_failure(predict, [], "no source")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    expect_failure(predict, [image, "--weights", tmp_path / "a.pth"], "a.pth", "tools/convert_weights.py --weights")
    expect_failure(eval_script, [*weights, "--sets", "VOC2007/test", "--devkit", tmp_path], "VOC2007/test", "make demo")
    expect_failure(predict, [devkit / "Demo", *weights], "has no image")
    expect_failure(predict, [image, *weights, *classes], "6 classes", "20")
    expect_failure(predict, [image, "--weights", ROOT / "README.md"], "README.md", "no checkpoint")
    expect_failure(predict, ["no such.jpg", *weights], "no such.jpg")
    expect_failure(predict, [image, *weights, "--confidence", 2], "confidence is 2")
    expect_failure(predict, [image, *weights, "--out", image.parent], "replace their inputs")
    expect_failure(predict, [tmp_path / "bad.jpg", *weights, "--out", tmp_path / "out"], "bad.jpg")


def test_unknown_flags_suggest():
    result = run("train.py", "--epoch", "3")
    assert result.returncode == 2
    assert "--epochs" in result.stderr + result.stdout


def test_labels_are_readable_at_any_size():
    for height, width in ((40, 60), (480, 640), (3000, 4000)):
        box = sv.Detections(np.array([[2.0, height / 2, width / 2, height - 2]]), class_id=np.array([0]))
        picture = draw_detections(np.zeros((height, width, 3), np.uint8), box, ["cat"])
        rows = np.flatnonzero(picture[: height // 2 - 3].any(axis=(1, 2)))
        assert len(rows) >= min(10, 0.02 * height)


def test_labels_leave_small_objects_to_be_seen():
    corners = np.stack(np.meshgrid(np.arange(10, 2500, 180.0), np.arange(40, 1400, 180.0)), axis=-1).reshape(-1, 2)
    shares = []
    for side in (100, 1000):
        boxes = np.hstack([corners, corners + side])
        found = sv.Detections(boxes, class_id=np.zeros(len(boxes), int), confidence=np.full(len(boxes), 0.5))
        picture = draw_detections(np.zeros((1440, 2560, 3), np.uint8), found, ["cell"])
        shares.append(picture.any(axis=-1).mean())
    assert shares[0] < shares[1] / 2
