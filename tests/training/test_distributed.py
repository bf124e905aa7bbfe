"""Training and evaluation in two processes started by torchrun give the results of one process."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eval as eval_script
import train
from tests.conftest import ROOT, small_run
from tests.narrow_network import use_narrow_network
from tests.training import worker
from utils.detection.loss import TERMS
from utils.system.diagnostics import Diagnostics
from utils.system.distributed import ProcessGroup
from utils.system.errors import UserError
from utils.system.files import lock
from utils.training.trainer import COLUMNS, Batching, build_trainer
from utils.training.training_state import Progress
from utils.weights.checkpoint import BEST, LAST, PREVIOUS, digest, load_checkpoint

LAUNCHER = ROOT / "tests" / "training" / "launcher.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TIMEOUT = 240  # seconds per command


def run(*arguments: object, cwd: Path, fails: bool = False) -> tuple[str, str]:
    """Run a Python command; returns stdout and stderr."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module", autouse=True)
def narrow_network() -> Iterator[None]:
    """The small network that the worker processes use."""
    with pytest.MonkeyPatch.context() as patch:
        use_narrow_network(patch)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The working directory of the commands."""
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def config(devkit, folder) -> train.Config:
    """Two epochs of six batches and three steps, and three validation batches."""
    for name in ("Demo", "Same"):
        shutil.copytree(devkit / "Demo", folder / "devkit" / name)
    return small_run(
        folder / "devkit",
        train_sets=("Demo/train",) * 4,
        val_sets=("Same/train", "Demo/val", "Demo/test"),
        run_dir=str(folder / "whole"),
        epochs=2,
        batch_size=16,
        nominal_batch=32,
        eval_every=1,
        checkpoint_every=1,
        mosaic_until=1.0,
        mosaic=0.5,
        precision="fp32",
    )


def flags(config: train.Config) -> list[str]:
    """The settings as command-line flags."""
    words = []
    for name, value in vars(config).items():
        if value != getattr(train.Config, name, {}):
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def contents(path: Path) -> tuple[str, dict[str, Any]]:
    """The digest of a checkpoint's tensors, and its metadata about the run."""
    checkpoint = load_checkpoint(path)
    training = {f"training/{name}": value for name, value in checkpoint.training.items()}
    return digest(checkpoint.weights | training), checkpoint.info


def records(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def compared(config, folder) -> dict[str, Any]:
    """Results of two processes: a whole run, its evaluation, runs without batch statistics, and runs that fail."""
    plain = replace(
        config,
        val_sets=(),
        weights=str(folder / "whole" / LAST),  # with batch statistics of trained weights
        lr=0.01,
        epochs=4,
        nominal_batch=16,
        checkpoint_every=0,
    )
    runs = {
        "every batch a step": plain,
        "two a step, thawing": replace(plain, epochs=3, freeze_epochs=1, nominal_batch=32),
    }
    runs = {name: replace(own, run_dir=str(folder / "two" / name)) for name, own in runs.items()}
    (folder / "VOC" / "ImageSets" / "Main").mkdir(parents=True)
    for part in ("Annotations", "JPEGImages"):
        (folder / "VOC" / part).symlink_to(Path(config.devkit) / "Demo" / part)
    (folder / "VOC" / "ImageSets" / "Main" / "one.txt").write_text("train_0000\n")
    bad = replace(plain, run_dir=str(folder / "bad"))
    invalid = [
        replace(bad, batch_size=15),
        replace(bad, devkit=str(folder), train_sets=("VOC/one",)),
        replace(bad, train_sets=("VOC/none",)),
    ]
    stopped = replace(config, run_dir=str(folder / "stopped"), checkpoint_every=0, batch_size=8)
    plan = {
        "whole": vars(config),
        "runs": {name: vars(own) for name, own in runs.items()},
        "invalid": [vars(own) for own in invalid],
        "evaluation": vars(evaluation(config, folder, "two")),
        "stopped": vars(stopped),
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    out, _ = run(LAUNCHER, 0, "compare", folder / "plan.json", folder / "found.pt", cwd=folder)
    return {"configs": runs, "out": out, **torch.load(folder / "found.pt", weights_only=True)}


@pytest.fixture(scope="module")
def whole(config, compared) -> Path:
    """An uninterrupted run of two processes."""
    return Path(config.run_dir)


@pytest.mark.parametrize("name", ["every batch a step", "two a step, thawing"])
def test_two_processes_take_the_steps_of_one(compared, folder, monkeypatch, name):
    """In float32 and without batch statistics, which each process computes over its own images."""
    monkeypatch.chdir(folder)
    config = compared["configs"][name]
    alone = replace(config, run_dir=str(folder / "one" / name))
    two, one = compared["losses"][name], worker.train_recorded(alone, ProcessGroup())
    assert two.shape == one.shape == (config.epochs, 6, len(COLUMNS))
    torch.testing.assert_close(two[..., : len(TERMS)], one[..., : len(TERMS)], atol=1e-4, rtol=0)
    every = config.nominal_batch // config.batch_size
    ends = slice(every - 1, None, every)  # the batches that end a step, with all gradients
    torch.testing.assert_close(two[:, ends, len(TERMS) :], one[:, ends, len(TERMS) :], atol=1e-3, rtol=1e-3)
    weights, others = (load_checkpoint(Path(own.run_dir) / LAST).weights for own in (config, alone))
    torch.testing.assert_close(weights, others, atol=1e-4, rtol=1e-3)
    initial = load_checkpoint(config.weights).weights
    torch.testing.assert_close(weights, initial, atol=0.2, rtol=0)
    assert max(float((weights[key] - initial[key]).abs().max()) for key in weights) > 1e-3


def test_one_process_decodes_for_all(compared, folder):
    assert [found["decoded"] for found in compared["found"]] == [96 + 36, 0]  # training and validation images
    assert len(list((folder / "logs" / "cache").glob("*.images"))) == 3  # and one of a single image


def test_user_errors_end_every_process(compared, folder):
    for found in compared["found"]:
        uneven, few, missing = found["errors"]
        assert "2 processes cannot share 96 images in batches of 15; --batch-size must be a multiple of 2" in uneven
        assert "2 processes cannot share 1 images in batches of 16" in few
        assert "VOC/none" in missing


def test_signal_to_one_process_stops_validation_in_all(compared, folder):
    assert [found["stopped"] for found in compared["found"]] == [True, True]
    _, info = contents(folder / "stopped" / LAST)
    assert (info["epoch"], info["batch"]) == (0, 12)


def test_only_the_first_process_writes(whole):
    names = {"batch_0.jpg", "batch_1.jpg", "config.json", "curves.png", "data.json", "metrics.jsonl", "run.lock"}
    assert {item.name for item in whole.iterdir()} == names | {
        BEST,
        LAST,
        PREVIOUS,
        "tensorboard",
        "val",
        "val_examples.jpg",
    }
    assert len(list((whole / "tensorboard").iterdir())) == 1
    assert [record["epoch"] for record in records(whole)] == [1, 2]


def evaluation(config: train.Config, folder: Path, name: str) -> eval_script.Config:
    """The evaluation of the whole run, in three batches."""
    weights, out = (str(Path(config.run_dir) / LAST),), str(folder / "eval" / name)
    return eval_script.Config(weights=weights, devkit=config.devkit, sets=config.val_sets, out=out, device="cpu")


def test_accuracy_equals_that_of_one_process(config, compared, whole, folder, monkeypatch):
    two = json.loads((folder / "eval" / "two" / "metrics.json").read_text())
    assert compared["out"].count("on Same/train, Demo/val, Demo/test, 36 images") == 1
    monkeypatch.chdir(folder)
    eval_script.main(evaluation(config, folder, "one"))
    assert two == json.loads((folder / "eval" / "one" / "metrics.json").read_text())
    last = records(whole)[-1]
    assert last["val/AP"] == two["coco"]["AP"] > 0
    assert last["val/mAP_area"] == two["voc"]["mAP_area"] > 0


def test_restarted_processes_resume_the_run(config, whole, folder):
    """One process is killed before the first checkpoint, then one after it."""
    again = replace(config, run_dir=str(folder / "killed"))
    out, errors = run(LAUNCHER, 2, "die", *flags(again), cwd=folder)
    assert out.count("a step of 16 images") == 3, errors
    assert re.findall(r"resuming after epoch 0, batch (\d+)", out) == ["2"], out
    assert [record["epoch"] for record in records(folder / "killed")] == [1, 2]
    assert contents(folder / "killed" / LAST) == contents(whole / LAST)


def test_signal_to_torchrun_stops_all_processes_with_a_checkpoint(config, whole, folder, monkeypatch):
    stopped = replace(config, run_dir=str(folder / "signalled"))
    last = folder / "signalled" / LAST
    out, errors = run(LAUNCHER, 0, "terminate", *flags(stopped), cwd=folder, fails=True)
    assert time.monotonic() - float(last.with_name("signalled").read_text()) < 10
    assert out.count("stopped; resume from here with --resume --run-dir") == 1, errors
    assert errors.count("stopped by SIGTERM") == 2
    _, info = contents(last)
    assert (info["epoch"], info["batch"]) == (0, 4)
    shutil.copytree(last.parent, folder / "alone")
    out, errors = run(LAUNCHER, 0, "train", "--resume", "--run-dir", last.parent, cwd=folder)
    starts = [
        "resuming after epoch 0, batch 4 of the next",
        "training: 96 images",
        "YOLOv4-tiny",
        "96 images in logs/cache",
        "a step",
        "epoch 1",
        "epoch 2",
        "done",
        "report",
    ]
    assert all(line.startswith(start) for line, start in zip(out.splitlines(), starts, strict=True)), out
    assert "warning" not in (out + errors).lower()
    assert contents(last) == contents(whole / LAST)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, "write_report", lambda run, *_: run.path)
    train.main(train.Config(run_dir=str(folder / "alone"), resume=True))
    assert [record["epoch"] for record in records(folder / "alone")] == [1, 2]
    assert contents(folder / "alone" / LAST)[1]["batch"] == 0


def test_error_in_the_first_process_ends_the_others(config, folder):
    """The first process finds the run folder in use, while the others wait for it."""
    busy = replace(config, run_dir=str(folder / "busy"))
    (folder / "busy").mkdir()
    started = time.monotonic()
    with lock(folder / "busy" / "run.lock"):
        _, errors = run(*TORCHRUN, ROOT / "train.py", *flags(busy), cwd=folder, fails=True)
    assert time.monotonic() - started < 40
    assert len(re.findall(r"^error: another process is training in ", errors, re.MULTILINE)) == 1, errors


def test_restarts_need_a_run_folder(monkeypatch, expect_failure):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    expect_failure(train, ["--device", "cpu"], "--max-restarts", "--run-dir")


def test_restarted_process_resumes_its_run_if_the_settings_agree(config, whole):
    """Except for the batch size, which may have been 0 or larger than the dataset."""
    restarted = ProcessGroup(restarted=True)
    for change, error in (({"batch_size": 0}, ""), ({"batch_size": 200}, ""), ({"epochs": 3}, "epochs is 2 in ")):
        own = replace(config, **change)
        expected = pytest.raises(UserError, match=error) if error else nullcontext()
        with closing(train.open_run(own, restarted)) as run_folder, expected:
            settings, checkpoint = train.resume_settings(own, train.changed_settings(own), run_folder, restarted)
            assert settings.batch_size == 16
            assert checkpoint is not None
    with pytest.raises(UserError, match="already contains a run"):
        train.open_run(config, ProcessGroup())


def test_synchronized_batch_norm_keeps_all_names_in_a_checkpoint(config):
    """The layers are converted before the average and the optimizer are created."""
    spec, batching = train.new_spec(config, {}, Diagnostics()), Batching.plan(96, 16, 32)
    own, plain = (
        build_trainer(
            replace(config, sync_bn=sync), spec, batching, Progress(end=2), torch.device("cpu"), ProcessGroup(size=2)
        )
        for sync in (True, False)
    )
    for model in (own.state.model, own.state.ema.module):
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        assert norms
        assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert own.state.model.state_dict().keys() == plain.state.model.state_dict().keys()
    learning = {id(parameter) for group in own.state.optimizer.param_groups for parameter in group["params"]}
    assert learning == {id(parameter) for parameter in own.state.model.parameters()}
    assert own.snapshot.weights.keys() == plain.snapshot.weights.keys()
    assert own.snapshot.training.keys() == plain.snapshot.training.keys()
    own.build_detector()(torch.zeros(64, 64, 3, dtype=torch.uint8).numpy())
