"""The training loop stops early, compiles once, and never waits for the GPU within a step."""

import json
import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from math import inf
from unittest.mock import MagicMock

import pytest
import torch
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

import train
from tests.conftest import small_run
from tests.narrow_network import use_narrow_network
from utils.detection import nms
from utils.system.diagnostics import Diagnostics
from utils.system.distributed import ProcessGroup
from utils.training import engine
from utils.training.trainer import Batching, build_trainer
from utils.training.training_state import Progress
from utils.weights.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def config(devkit) -> train.Config:
    return small_run(devkit, epochs=2, batch_size=8, eval_every=1, precision="fp32")


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_stops_early_and_can_be_extended(config, tmp_path, monkeypatch, capsys):
    use_narrow_network(monkeypatch)
    found = iter([0.1, 0.3, 0.2, 0.3, 0.2, 0.5])
    monkeypatch.setattr(engine, "validate", lambda *_: ({"val/AP": next(found)}, {"best": {}}))
    folder = train.main(replace(config, epochs=6, patience=2, run_dir=str(tmp_path / "a")))
    assert [record["val/AP"] for record in records(folder)] == [0.1, 0.3, 0.2, 0.3]
    assert "stopped early after 2 validations without improvement" in capsys.readouterr().out
    train.main(train.Config(run_dir=str(folder), resume=True))
    assert "the run has finished after 4 epochs" in capsys.readouterr().out
    train.main(train.Config(run_dir=str(folder), resume=True, extend=1))
    assert len(records(folder)) == 5
    assert load_checkpoint(folder / "last.safetensors").info["start"] == 4


@pytest.mark.parametrize(("interval", "expected"), [(0, [1, 2, 3, 4]), (1e9, [1, 2, 4])])
def test_saves_first_best_and_last_epochs_and_others_at_intervals(config, tmp_path, monkeypatch, interval, expected):
    use_narrow_network(monkeypatch)
    found = iter([0.1, 0.3, 0.2, 0.2])
    monkeypatch.setattr(engine, "validate", lambda *_: ({"val/AP": next(found)}, {"best": {}}))
    monkeypatch.setattr(engine, "SAVE_INTERVAL", interval)
    save_checkpoints, saved = engine.RunFolder.save_checkpoints, []

    def record(run, last, best=None):
        saved.append(last.info["epoch"])
        save_checkpoints(run, last, best)

    monkeypatch.setattr(engine.RunFolder, "save_checkpoints", record)
    train.main(replace(config, epochs=4, run_dir=str(tmp_path / "a")))
    assert saved == expected


def test_compiles_once_and_trains_like_eager(config, tmp_path, monkeypatch):
    """With a compiler backend that does nothing, to count how often it is called."""
    use_narrow_network(monkeypatch)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])  # pytest would keep all of its output
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda *args, **named: compile_module(*args, **named, backend="eager")
    )
    dry_run, counts = train.dry_run, []

    def count_graphs(*arguments):
        counters.clear()
        dry_run(*arguments)
        counts.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(train, "dry_run", count_graphs)
    settings = replace(config, compile="on", batch_size=2)
    folder = train.main(replace(settings, run_dir=str(tmp_path / "a")))
    assert counts == [2]  # the network and the loss
    assert counters["stats"]["unique_graphs"] == counts[0]
    eager = train.main(replace(settings, compile="off", run_dir=str(tmp_path / "b")))
    for ours, theirs in zip(records(folder), records(eager), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)


class HostReads(TorchFunctionMode):
    """Counts the calls that wait for a GPU because the host needs values."""

    NAMES = ("cpu", "tolist", "item", "nonzero", "masked_select", "bincount", "__bool__", "__int__", "__float__")

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        indexes = args[1] if name in ("__getitem__", "__setitem__") else ()
        for index in indexes if isinstance(indexes, tuple) else (indexes,):
            self.counts["mask"] += isinstance(index, torch.Tensor) and index.dtype == torch.bool
        self.counts[name] += name in self.NAMES
        return func(*args, **(kwargs or {}))


def test_validation_reads_once_per_batch(config, monkeypatch):
    """Two counts in the selection of detections; the losses and detections are read after the last batch."""
    use_narrow_network(monkeypatch)
    monkeypatch.setattr(nms, "MAX_SINGLE_NMS", inf)  # all groups at once, as on a GPU
    device, group = torch.device("cpu"), ProcessGroup()
    spec = train.new_spec(config, {}, Diagnostics())
    trainer = build_trainer(config, spec, Batching.plan(16, 8, 8), Progress(end=2), device, group)
    cache = train.load_data(config, spec, device, group, Diagnostics()).val
    reads, values = [], []
    for batch_size in (len(cache), len(cache) // 2):
        monkeypatch.setattr(engine, "VALIDATION_BATCH", batch_size)
        with HostReads() as counter:
            values.append(engine.validate(trainer, cache, MagicMock(read_only=True), MagicMock(requested=False))[0])
        reads.append(counter.counts)
    batches = -(-len(cache) // (len(cache) // 2))
    assert reads[0]["tolist"]
    assert reads[1] - reads[0] == {"tolist": batches - 1}
    assert values[1] == pytest.approx(values[0], abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("place", ["device", "ram"])
def test_step_does_not_wait_for_the_gpu(config, place):
    config = replace(config, device="cuda", compile="off", precision="bf16", mosaic=0.5, cache=place)
    device, group = torch.device("cuda", 0), ProcessGroup()
    spec = train.new_spec(config, {}, Diagnostics())
    trainer = build_trainer(config, spec, Batching.plan(24, 8, 8), Progress(end=2), device, group)
    batches = engine.epoch_batches(trainer, config, train.load_data(config, spec, device, group, Diagnostics()))
    trainer.set_mode(frozen=False)
    try:
        for number, data in enumerate(batches.load([0, 1, 2, 0, 1, 2], device)):
            trainer.state.losses[number % 3] = trainer.backward(*data)
            trainer.state.step()
            torch.cuda.set_sync_debug_mode("error" if number >= 2 else "default")  # the first steps allocate
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.commit_or_roll_back(batches, 3)
