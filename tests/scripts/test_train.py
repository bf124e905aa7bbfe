"""Training as users run it: its files, resuming, initial weights and messages."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as eval_script
import predict
import train
from tests.conftest import trained_config
from tests.narrow_network import use_narrow_network
from utils.data.image_io import read_image
from utils.system.cli import run_script
from utils.training import engine
from utils.weights.checkpoint import find_checkpoint, load_checkpoint


@pytest.fixture
def config(devkit) -> train.Config:
    return trained_config(devkit)


def test_run_writes_its_files(trained_run):
    records = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert ["val/AP" in record for record in records] == [False, True, False, True]
    assert all(np.isfinite(record["train/loss"]) for record in records)
    for name in ("batch_0.jpg", "batch_1.jpg", "val_examples.jpg", "curves.png"):
        assert read_image(trained_run / name).std() > 5, name
    board = EventAccumulator(str(trained_run / "tensorboard"), {"histograms": 0}).Reload()  # 0: keep all
    assert {"train/loss", "train/lr", "val/AP", "val/AP50"} <= set(board.Tags()["scalars"])
    assert {"batch_0", "val_examples"} <= set(board.Tags()["images"])
    for place in ("feat1", "feat2", "upsample"):
        gates = board.Histograms(f"gate/{place}")
        assert [event.step for event in gates] == [2, 4]
        assert all(0 < event.histogram_value.min <= event.histogram_value.max < 1 for event in gates)
        gains = [event.value for event in board.Scalars(f"gain/{place}")]
        assert len(gains) == 4
        assert gains[-1] != 0
    best = load_checkpoint(trained_run / "best.safetensors")
    assert best.info["best"] == max(record.get("val/AP", 0) for record in records)
    assert not best.training
    assert (trained_run / "val" / "report.html").is_file()
    measured = json.loads((trained_run / "val" / "metrics.json").read_text())
    assert measured["coco"]["AP"] == pytest.approx(best.info["best"], abs=1e-6)
    assert best.info["thresholds"] == [values["threshold"] for values in measured["best"].values()]


def test_resumed_run_equals_an_uninterrupted_one(config, trained_run, tmp_path, monkeypatch, expect_failure):
    folder = tmp_path / "stopped"
    run_epoch = engine.run_epoch

    def stop_before_the_third(trainer, *arguments):
        if trainer.state.progress.epoch == 2:
            raise KeyboardInterrupt
        run_epoch(trainer, *arguments)

    monkeypatch.setattr(engine, "run_epoch", stop_before_the_third)
    with pytest.raises(KeyboardInterrupt):
        train.main(replace(config, run_dir=str(folder)))
    monkeypatch.undo()
    (folder / "metrics.jsonl").open("a").write('{"epoch": 3, "train/loss": 9}\n{"epo')  # from an epoch that was lost
    expect_failure(
        train, ["--resume", "--run-dir", folder, "--epochs", 9], "epochs is 4 in ", "cannot be changed to 9", "--extend"
    )
    train.main(train.Config(run_dir=str(folder), resume=True))
    whole, resumed = (load_checkpoint(path / "last.safetensors") for path in (trained_run, folder))
    assert whole.weights.keys() == resumed.weights.keys()
    for part in ("weights", "training"):
        for name, value in getattr(whole, part).items():
            assert torch.equal(value, getattr(resumed, part)[name]), (part, name)
    timeless = [
        [
            {name: value for name, value in json.loads(line).items() if "second" not in name}
            for line in (path / "metrics.jsonl").read_text().splitlines()
        ]
        for path in (trained_run, folder)
    ]
    assert timeless[0] == timeless[1]


def test_starts_from_a_checkpoint_or_published_weights(config, trained_run, tmp_path, capsys):
    checkpoint = load_checkpoint(trained_run / "last.safetensors")
    short = replace(config, epochs=1, freeze_epochs=0, val_sets=(), run_dir=str(tmp_path / "a"))
    train.main(replace(short, weights=str(trained_run / "last.safetensors")))
    assert "last.safetensors: loaded " in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "a" / "best.safetensors").spec.identity_start
    plain = {name: value for name, value in checkpoint.weights.items() if not name.startswith("attention_gain")}
    torch.save(plain, tmp_path / "published.pth")
    train.main(replace(short, weights=str(tmp_path / "published.pth"), run_dir=str(tmp_path / "b")))
    assert not load_checkpoint(tmp_path / "b" / "best.safetensors").spec.identity_start


def test_uses_the_newest_run_by_default(trained_run, tmp_path, monkeypatch, expect_failure):
    monkeypatch.chdir(tmp_path)
    expect_failure(train, ["--resume"], "no run under logs/")
    for name, parts in (("old", ["last", "best"]), ("new", ["last"])):
        (tmp_path / "logs" / name).mkdir(parents=True)
        for part in parts:
            shutil.copy(trained_run / f"{part}.safetensors", tmp_path / "logs" / name)
        (tmp_path / "logs" / name / "metrics.jsonl").touch()
        os.utime(tmp_path / "logs" / name / "metrics.jsonl", (len(name), 10.0 * len(parts)))
    assert find_checkpoint() == Path("logs/old/best.safetensors")
    assert find_checkpoint("logs/new") == Path("logs/new/last.safetensors")
    os.utime(tmp_path / "logs" / "new" / "metrics.jsonl")
    assert find_checkpoint() == Path("logs/new/last.safetensors")
    (tmp_path / "logs" / "new" / "last.safetensors").unlink()
    expect_failure(train, ["--resume"], "logs/new", "before its first checkpoint")


def test_trains_on_fewer_images_than_a_batch(config, tmp_path, monkeypatch):
    use_narrow_network(monkeypatch)
    small = replace(config, batch_size=64, nominal_batch=256, epochs=2, freeze_epochs=0, run_dir=str(tmp_path / "a"))
    folder = train.main(small)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_rejects_initial_weights_that_are_not_finite(config, trained_run, tmp_path):
    checkpoint = load_checkpoint(trained_run / "last.safetensors")
    broken = {
        name: value * float("nan") if value.is_floating_point() else value for name, value in checkpoint.weights.items()
    }
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(train.UserError, match=r"broken\.pth contains non-finite weights, in "):
        train.main(replace(config, weights=str(tmp_path / "broken.pth"), run_dir=str(tmp_path / "a")))


@pytest.mark.parametrize("script", [train, eval_script, predict], ids=lambda script: script.__name__)
def test_help_lists_every_flag(script, call_script):
    outcome = call_script(script.main, script.Config, "--help")
    assert outcome.code == 0
    for name in script.Config.__annotations__:
        assert name.replace("_", "-") in outcome.output.lower(), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--devkit", "/nowhere"], ["VOC2007/train", "/nowhere", "make demo"]),
        (["--input-size", "416", "400"], ["multiples of 32"]),
        (["--lr", "nan"], ["lr is nan"]),
        (["--batch-size", "-1"], ["batch_size is -1"]),
        (["--classes", "nothing.txt"], ["nothing.txt"]),
        (["--phi", "2", "--attention-args", "kernel_size", "5"], ["3 or 7"]),
        (["--weights", "nothing.pth"], ["nothing.pth"]),
        (["--weights", "README.md"], ["README.md"]),
        (["--resume", "--run-dir", "/nowhere"], ["/nowhere"]),
        (["--device", "tpu"], ["auto, cpu, cuda or cuda:N"]),
        (["--train-sets", "MySet"], ["folder/split", "MySet/train"]),
        (["--phi", "2", "--attention-args", "ratoi", "8"], ["takes the arguments ratio, kernel_size", "'ratoi'"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--phi", "3", "--attention-args", "gamma", "0"], ["gamma of ECA is 0"]),
    ],
)
def test_training_explains_invalid_arguments(expect_failure, arguments, words):
    expect_failure(train, ["--device", "cpu", *arguments], *words)


def test_explains_that_no_object_has_a_known_class(expect_failure, devkit):
    arguments = ["--device", "cpu", "--devkit", devkit, "--train-sets", "Demo/train", "--val-sets", "Demo/val"]
    expect_failure(train, arguments, "'circle'", "'ring'", "aeroplane")


@pytest.mark.parametrize(("given", "phi", "size"), [(("cbam", "64"), 2, (64, 64)), (("2", "64", "96"), 2, (64, 96))])
def test_accepts_names_of_attention_blocks_and_square_sizes(call_script, given, phi, size):
    found = []
    flags = ["--phi", given[0], "--input-size", *given[1:]]
    assert call_script(found.append, train.Config, *flags).code == 0
    assert (found[0].phi, found[0].input_size) == (phi, size)


def test_explains_unknown_attention_block(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--phi", "99"])
    with pytest.raises(SystemExit) as stop:
        run_script(train.main, train.Config)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "phi is 99" in printed
    assert "0 (none), 1 (se)" in printed


def test_rejects_run_folder_and_sets_that_cannot_be_used(expect_failure, trained_run, devkit, tmp_path):
    expect_failure(train, ["--run-dir", trained_run], "already contains a run", "--resume")
    overlapping = ["--devkit", devkit, "--train-sets", "Demo/train", "--val-sets", "Demo/val", "Demo//val"]
    overlapping += ["--classes", devkit / "Demo" / "classes.txt", "--device", "cpu", "--run-dir", tmp_path / "run"]
    expect_failure(train, overlapping, "Demo/val, Demo//val")
