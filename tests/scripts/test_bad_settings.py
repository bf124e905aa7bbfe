"""Settings that cannot work end in one error message and exit code 2, before anything is written."""

import sys
from dataclasses import replace

import pytest
import torch

import predict
import train
from tests.bad_inputs import ERROR, JPEG, Scene, expect, random_weights, save_weights
from tests.conftest import small_run
from utils.system.cli import run_script


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-size", "-1"], ("batch_size is -1",)),
        (["--lr", "-1"], ("lr is -1",)),
        (["--lr", "nan"], ("lr is nan",)),
        (["--input-size", "416", "400"], ("input_size is (416, 400)", "multiples of 32")),
        (["--device", "cuda"], ("device is cuda", "--device cpu")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_training_rejects_setting(arguments, words, tmp_path, monkeypatch, call_script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expect(call_script(train.main, train.Config, *arguments), ERROR, words)
    assert not list(tmp_path.iterdir())


def test_suggests_flag_for_misspelt_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--epohcs", "3"])
    with pytest.raises(SystemExit) as stop:
        run_script(train.main, train.Config)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "--epohcs" in printed
    assert "--epochs INT" in printed.partition("Perhaps you meant")[2]


def test_prediction_refuses_to_overwrite_its_input(tmp_path, call_script):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    path = save_weights(tmp_path / "a.safetensors", random_weights())
    outcome = call_script(predict.main, predict.Config, tmp_path / "a.jpg", "--weights", path, "--out", tmp_path)
    expect(outcome, ERROR, (f"out is {tmp_path}", "overwrite the input"))
    assert (tmp_path / "a.jpg").read_bytes() == JPEG


def test_trains_on_single_image(tmp_path, monkeypatch, call_script):
    """Fewer images than in a batch or a mosaic."""
    monkeypatch.chdir(tmp_path)
    scene = Scene(tmp_path / "devkit")
    scene.split("a")
    changes = {"train_sets": ("VOC/train",), "val_sets": (), "classes": str(scene.classes), "epochs": 1}
    config = replace(small_run(scene.folder), **changes, run_dir=str(tmp_path / "run"))
    assert call_script(lambda _: train.main(config)).code == 0
    assert (tmp_path / "run" / "best.safetensors").exists()
