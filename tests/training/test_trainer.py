"""What surrounds the steps: the rehearsal, memory, compilation, several sizes, early stopping, signals."""

import json
import logging
import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from torch._dynamo.utils import counters

import train
from tests.conftest import small_run
from utils.system.diagnostics import Diagnostics
from utils.system.distributed import ProcessGroup
from utils.system.errors import UserError
from utils.system.signals import Stopped, StopSignals
from utils.training import batch_size as capacity
from utils.training.trainer import Progress, pack_training
from utils.weights.checkpoint import digest, load_checkpoint


@pytest.fixture(scope="module")
def config(devkit) -> train.Config:
    """A run of a few seconds."""
    return small_run(devkit, epochs=2, batch_size=8, eval_every=1, precision="fp32")


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_rehearsal_leaves_no_trace(config, capsys):
    spec = train.new_spec(config, {}, Diagnostics())
    trainer = train.build_trainer(config, spec, 24, torch.device("cpu"), ProcessGroup(), Progress(end=2))
    caches = train.load_data(config, spec, trainer.device, ProcessGroup(), Diagnostics())
    before = digest(trainer.kept.weights), digest(trainer.kept.training)
    train.rehearse(trainer, config, caches)
    after = pack_training(trainer.state, spec)
    assert before == (digest(after.weights), digest(after.training))
    assert after.info == trainer.kept.info
    said = capsys.readouterr().out
    assert "a step of 8 images at 64x64 takes" in said
    assert " GB; 2 epochs about 0:00" in said


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_out_of_memory_says_what_to_try(config, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(capacity, "try_steps", fail)
    with pytest.raises(UserError, match="a batch of 8 images at 64x64 does not fit into memory; try --batch-size 4"):
        train.main(replace(config, run_dir=str(tmp_path / "a")))
    monkeypatch.undo()
    monkeypatch.setattr(train, "train_one_epoch", fail)
    with pytest.raises(UserError, match="try --batch-size 4"):
        train.main(replace(config, run_dir=str(tmp_path / "b")))


def test_the_largest_batch_is_found():
    for most, limit, wanted in ((1000, 300, 296), (1000, 6, 4), (1000, 1, 1), (50, 300, 48), (7, 300, 4), (64, 64, 64)):
        tried = []

        def fits(size, limit=limit, tried=tried):
            tried.append(size)
            return size <= limit

        assert capacity.search_largest(fits, most) == wanted
        assert max(tried) <= most
    with pytest.raises(UserError, match="not even one image fits"):
        capacity.search_largest(lambda _: False, 10)


def test_batch_size_0_needs_a_gpu(config, tmp_path):
    with pytest.raises(UserError, match="on the CPU give a number"):
        train.main(replace(config, batch_size=0, run_dir=str(tmp_path)))


def test_a_compiled_run_compiles_once(config, tmp_path, monkeypatch):
    """With a compiler that does nothing: what is counted is how often it is asked."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])  # pytest would keep all of it
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", partial_method(torch.nn.Module.compile, backend="eager"))
    real, asked = train.rehearse, []

    def count(*arguments):
        counters.clear()
        real(*arguments)
        asked.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(train, "rehearse", count)
    settings = replace(config, compile="on", batch_size=2)
    folder = train.main(replace(settings, run_dir=str(tmp_path / "a")))
    assert asked == [2]  # the network and the loss
    assert counters["stats"]["unique_graphs"] == asked[0]
    eager = train.main(replace(settings, compile="off", run_dir=str(tmp_path / "b")))
    for ours, theirs in zip(records(folder), records(eager), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)


def partial_method(method, **options):
    return lambda self, **given: method(self, **given, **options)


def test_early_stopping(config, tmp_path, monkeypatch, capsys):
    real, found = train.validate, iter([0.1, 0.3, 0.2, 0.3, 0.2, 0.5])

    def pretend(*arguments):
        values, metrics = real(*arguments)
        return values | {"val/AP": next(found)}, metrics

    monkeypatch.setattr(train, "validate", pretend)
    folder = train.main(replace(config, epochs=6, patience=2, run_dir=str(tmp_path / "a")))
    assert [record["val/AP"] for record in records(folder)] == [0.1, 0.3, 0.2, 0.3]
    assert "stopped early, since 2 validations in a row brought nothing better" in capsys.readouterr().out
    train.main(train.Config(run_dir=str(folder), resume=True))
    assert "the run is finished after 4 epochs" in capsys.readouterr().out
    train.main(train.Config(run_dir=str(folder), resume=True, extend=1))
    assert len(records(folder)) == 5
    assert load_checkpoint(folder / "last.safetensors").info["start"] == 4


def test_signals_wait_where_they_are_put_off():
    """In a process of its own, since signals reach whatever libraries other tests have loaded."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(send_signals).result(timeout=120)


def send_signals() -> None:
    def send(signum):
        os.kill(os.getpid(), signum)
        time.sleep(0.01)  # the handler runs between two instructions of this thread

    with StopSignals() as stop:
        with stop.defer():
            send(signal.SIGTERM)
            send(signal.SIGINT)
            assert stop.requested
        send(signal.SIGINT)  # a later one does nothing
        with pytest.raises(Stopped) as error:
            stop.raise_stopped()
        assert error.value.signum == signal.SIGTERM
    with StopSignals() as stop:
        with pytest.raises(Stopped):
            send(signal.SIGINT)
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_settings_of_a_run_that_cannot_work(config, tmp_path):
    for change, words in (
        ({"extend": 3}, "needs --resume"),
        ({"cache": "tape"}, "cache is 'tape'"),
        ({"compile": "maybe"}, "compile is 'maybe'"),
        ({"patience": -1}, "patience is -1"),
    ):
        with pytest.raises(UserError, match=words):
            replace(config, **change)
    folder = train.main(replace(config, run_dir=str(tmp_path / "a"), epochs=1, val_sets=()))
    with pytest.raises(UserError, match="already holds a run"):
        train.main(replace(config, run_dir=str(folder)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("place", ["device", "ram"])
def test_a_step_on_a_gpu_waits_for_nothing(config, place):
    config = replace(config, device="cuda", compile="off", precision="bf16", mosaic=0.5, cache=place)
    device = torch.device("cuda", 0)
    spec = train.new_spec(config, {}, Diagnostics())
    trainer = train.build_trainer(config, spec, 24, device, ProcessGroup(), Progress(end=2))
    cache, _ = train.load_data(config, spec, device, ProcessGroup(), Diagnostics())
    batches = train.epoch_batches(config, cache, trainer.state.progress, ProcessGroup())
    trainer.set_mode(frozen=False)
    try:
        for number, data in enumerate(batches.load([0, 1, 2, 0, 1, 2], device)):
            trainer.state.losses[number % 3] = trainer.backward(*data)
            trainer.state.step()
            torch.cuda.set_sync_debug_mode("error" if number >= 2 else "default")  # the first ones allocate
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.goes_well(batches, 3)
