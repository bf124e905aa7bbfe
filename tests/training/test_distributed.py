"""Training and evaluation in two processes, which torchrun starts, against one: the same steps, numbers and files."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eval as eval_script
import train
from tests.conftest import ROOT, small_run
from tests.training import worker
from utils.detection.loss import TERMS
from utils.system.diagnostics import Diagnostics
from utils.system.distributed import ProcessGroup
from utils.system.errors import UserError
from utils.system.files import lock
from utils.training.trainer import COLUMNS, Progress, pack_training
from utils.weights.checkpoint import BEST, LAST, PREVIOUS, digest, load_checkpoint

WORKER = ROOT / "tests" / "training" / "worker.py"
TIMEOUT = 240  # seconds for a command


@contextmanager
def torchrun(*arguments: object, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A command of two processes; none of them stays."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # it ends its processes
            process.communicate()


def run(*arguments: object, cwd: Path, fails: bool = False) -> tuple[str, str]:
    """What it says on stdout and on stderr."""
    with torchrun(*arguments, cwd=cwd) as process:
        out, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode != 0) == fails, errors
    return out, errors


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As many as each process of torchrun has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the commands run, with their cache."""
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def config(devkit, folder) -> train.Config:
    """Two epochs of six batches and three steps; three batches to validate, partly images of the training once more."""
    (devkit / "Same").symlink_to(devkit / "Demo")
    return small_run(
        devkit,
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
    """A configuration as a user gives it."""
    words = []
    for name, value in vars(config).items():
        if value != getattr(train.Config, name, {}):
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def contents(path: Path) -> tuple[str, dict[str, Any]]:
    """A checkpoint's tensors, as their digest, and what it says of the run."""
    checkpoint = load_checkpoint(path)
    training = {f"training/{name}": value for name, value in checkpoint.training.items()}
    return digest(checkpoint.weights | training), checkpoint.info


def records(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def compared(config, folder) -> dict[str, Any]:
    """What two processes found: a whole run, runs without batch statistics, and how other runs of theirs ended."""
    plain = replace(
        config,
        val_sets=(),
        weights=str(folder / "whole" / LAST),  # with batch statistics that let signals through
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
    mistakes = [
        replace(bad, batch_size=15),
        replace(bad, devkit=str(folder), train_sets=("VOC/one",)),
        replace(bad, train_sets=("VOC/none",)),
    ]
    stopped = replace(config, run_dir=str(folder / "stopped"), checkpoint_every=0, batch_size=8)
    plan = {
        "whole": vars(config),
        "runs": {name: vars(own) for name, own in runs.items()},
        "mistakes": [vars(own) for own in mistakes],
        "stopped": vars(stopped),
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    run(WORKER, "compare", folder / "plan.json", folder / "found.pt", cwd=folder)
    return {"configs": runs, **torch.load(folder / "found.pt", weights_only=True)}


@pytest.fixture(scope="module")
def whole(config, compared) -> Path:
    """A run of two processes that nothing disturbs."""
    return Path(config.run_dir)


@pytest.mark.parametrize("name", ["every batch a step", "two a step, thawing"])
def test_two_processes_take_the_steps_of_one(compared, folder, monkeypatch, name):
    """In float32 and without batch statistics, which each process has of its own images."""
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
    begin = load_checkpoint(config.weights).weights
    torch.testing.assert_close(weights, begin, atol=0.2, rtol=0)  # where it came from
    assert max(float((weights[key] - begin[key]).abs().max()) for key in weights) > 1e-3


def test_one_process_of_a_machine_decodes(compared, folder):
    assert [found["decoded"] for found in compared["found"]] == [96 + 36, 0]  # to train on and to validate on
    assert len(list((folder / "logs" / "cache").glob("*.images"))) == 3  # those, and of one image


def test_mistakes_end_every_process(compared, folder):
    for found in compared["found"]:
        shared, few, none = found["mistakes"]
        assert "96 images in batches of 15 cannot be shared by 2 processes; give a multiple of 2" in shared
        assert "1 images in batches of 16 cannot be shared by 2 processes" in few
        assert "there is no data set VOC/none" in none


def test_a_signal_to_one_process_stops_the_validation_of_all(compared, folder):
    assert [found["stopped"] for found in compared["found"]] == [True, True]
    _, info = contents(folder / "stopped" / LAST)
    assert (info["epoch"], info["batch"]) == (0, 12)


def test_the_first_process_alone_writes(whole):
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


def test_accuracy_is_that_of_one_process(config, whole, folder, monkeypatch):
    """Three batches are shared by two processes."""
    settings = eval_script.Config(
        weights=(str(whole / LAST),), devkit=config.devkit, sets=config.val_sets, out=str(folder / "eval"), device="cpu"
    )
    words = ["--weights", *settings.weights, "--devkit", settings.devkit, "--sets", *settings.sets, "--device", "cpu"]
    out, _ = run(ROOT / "eval.py", *words, "--out", folder / "eval_two", cwd=folder)
    assert out.count("on Same/train, Demo/val, Demo/test, 36 images") == 1
    two = json.loads((folder / "eval_two" / "metrics.json").read_text())
    monkeypatch.chdir(folder)
    eval_script.main(settings)
    one = json.loads((folder / "eval" / "metrics.json").read_text())
    assert two == one
    last = records(whole)[-1]
    assert last["val/AP"] == two["coco"]["AP"] > 0
    assert last["val/mAP_area"] == two["voc"]["mAP_area"] > 0


def test_a_lost_process_is_started_again(config, whole, folder):
    """One is killed before the first checkpoint, then one after it: the third start goes on from there."""
    again = replace(config, run_dir=str(folder / "killed"))
    out, errors = run("--max-restarts", "2", WORKER, "die", *flags(again), cwd=folder)
    assert out.count("a step of 16 images") == 3, errors
    resumed = re.findall(r"resuming after epoch 0, batch (\d+)", out)
    assert len(resumed) == 1, out
    assert resumed[0] in ("2", "4")
    assert [record["epoch"] for record in records(folder / "killed")] == [1, 2]
    assert contents(folder / "killed" / LAST) == contents(whole / LAST)


def test_a_signal_to_torchrun_stops_all_with_a_checkpoint(config, whole, folder, monkeypatch):
    stopped = replace(config, run_dir=str(folder / "signalled"))
    last = folder / "signalled" / LAST
    with torchrun(WORKER, "dawdle", *flags(stopped), cwd=folder) as process:
        end = time.monotonic() + TIMEOUT
        while not last.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        out, errors = process.communicate(timeout=TIMEOUT)
        assert time.monotonic() - sent < 10
    assert process.returncode != 0
    assert out.count("stopped; --resume --run-dir") == 1, errors
    assert errors.count("stopped by SIGTERM") == 2
    _, info = contents(last)
    assert info["epoch"] == 0
    assert info["batch"] in (4, 6)
    shutil.copytree(last.parent, folder / "alone")
    out, errors = run(ROOT / "train.py", "--resume", "--run-dir", last.parent, cwd=folder)
    lines = out.splitlines()
    begins = [
        "resuming after epoch 0, batch",
        "training: 96 images",
        "YOLOv4-tiny",
        "96 images in logs/cache",
        "a step",
        "epoch 1",
        "epoch 2",
        "done",
        "what the best",
    ]
    assert all(line.startswith(begin) for line, begin in zip(lines, begins, strict=True)), out
    assert f" batch {info['batch']} " in lines[0]
    assert "warning" not in (out + errors).lower()
    assert contents(last) == contents(whole / LAST)
    monkeypatch.chdir(folder)
    train.main(train.Config(run_dir=str(folder / "alone"), resume=True))
    assert [record["epoch"] for record in records(folder / "alone")] == [1, 2]
    assert contents(folder / "alone" / LAST)[1]["batch"] == 0


def test_what_one_process_meets_ends_the_others(config, folder):
    """The first one finds the folder in use, while the others wait for it."""
    busy = replace(config, run_dir=str(folder / "busy"))
    (folder / "busy").mkdir()
    started = time.monotonic()
    with lock(folder / "busy" / "run.lock"):
        _, errors = run(ROOT / "train.py", *flags(busy), cwd=folder, fails=True)
    assert time.monotonic() - started < 40
    assert len(re.findall(r"^error: another process is training in ", errors, re.MULTILINE)) == 1, errors


def test_restarts_need_a_folder(monkeypatch, expect_failure):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    expect_failure(train, ["--device", "cpu"], "--max-restarts", "--run-dir")


def test_a_restarted_process_takes_the_batch_size_of_the_run(config, whole):
    """The command may have asked for what fits, or for more than there is. Another torchrun's run is not its own."""
    began = (Path(config.run_dir) / "run.lock").read_text()
    with pytest.raises(UserError, match="already holds a run"):
        train.open_run(config, ProcessGroup(restarted=True, agent="another"))
    for size in (0, 200):
        own, checkpoint, log = train.open_run(
            replace(config, batch_size=size), ProcessGroup(restarted=True, agent=began)
        )
        log.close()
        assert own.batch_size == 16
        assert checkpoint is not None


def test_batch_norm_over_all_processes(config):
    """It is there before the average and the optimizer are made, and changes no name in a checkpoint."""
    spec = train.new_spec(config, {}, Diagnostics())
    own, plain = (
        train.build_trainer(
            replace(config, sync_bn=sync), spec, 96, torch.device("cpu"), ProcessGroup(size=2), Progress(end=2)
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
    packed = [pack_training(trainer.state, spec) for trainer in (own, plain)]
    assert packed[0].weights.keys() == packed[1].weights.keys()
    assert packed[0].training.keys() == packed[1].training.keys()
    own.detector()(torch.zeros(64, 64, 3, dtype=torch.uint8).numpy())
