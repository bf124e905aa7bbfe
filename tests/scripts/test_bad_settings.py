"""Settings that cannot work end in one error message and exit code 2, before anything is written."""

import sys
from dataclasses import replace

import pytest
import torch

import eval as eval_script
import predict
import train
from tests.bad_inputs import ERROR, JPEG, Scene, expect, random_weights, save_weights
from tests.conftest import ROOT, small_run
from utils.system.cli import run_script


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-size", "-1"], ("batch_size is -1",)),
        (["--lr", "-1"], ("lr is -1",)),
        (["--lr", "nan"], ("lr is nan",)),
        (["--input-size", "416", "400"], ("input_size is (416, 400)", "multiples of 32")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_training_rejects_setting(arguments, words, tmp_path, monkeypatch, call_script):
    monkeypatch.chdir(tmp_path)
    expect(call_script(train.main, train.Config, *arguments), ERROR, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", ("device is cuda, but ", "or use --device cpu")),
        ("cuda:3", ("device is cuda:3, but ", "or use --device cpu")),
        ("mps", ("device is mps", "Mac GPUs", "or use --device cpu")),
        ("cuda:first", ("device is 'cuda:first'", "auto, cpu, cuda or cuda:N")),
    ],
)
@pytest.mark.parametrize(("script", "source"), [(train, []), (eval_script, []), (predict, [ROOT / "README.md"])])
def test_scripts_reject_device(script, source, device, words, tmp_path, monkeypatch, call_script):
    def fail():
        raise RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "init", fail)
    expect(call_script(script.main, script.Config, *source, "--device", device), ERROR, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "name"),
    [(train, "choose_device"), (train, "build_cache"), (train, "build_trainer"), (eval_script, "load_detectors"),
     (predict, "load_detector")],
)  # fmt: skip
def test_scripts_explain_full_gpu(script, name, devkit, trained_run, tmp_path, monkeypatch, call_script):
    def fail(*_):
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(script, name, fail)
    data = [
        "--devkit",
        devkit,
        "--train-sets",
        "Demo/train",
        "--val-sets",
        "--classes",
        devkit / "Demo" / "classes.txt",
    ]
    source = {
        train: [*data, "--run-dir", tmp_path / "run", "--input-size", 64],
        eval_script: ["--weights", trained_run / "last.safetensors"],
        predict: [devkit / "Demo" / "JPEGImages", "--out", tmp_path / "out"],
    }[script]
    expect(call_script(script.main, script.Config, *source, "--device", "cpu"), ERROR, ("the GPU is out of memory",))


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
