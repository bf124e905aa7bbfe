"""Dry runs leave no trace, and batches that do not fit into memory are reported."""

import logging
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import train
from tests.conftest import small_run
from tests.narrow_network import use_narrow_network
from utils.system.device import print_notice
from utils.system.diagnostics import Diagnostics
from utils.system.distributed import ProcessGroup
from utils.system.errors import UserError
from utils.training import batch_size, engine
from utils.training.batch_size import dry_run, explain_out_of_memory, format_duration, search_largest
from utils.training.engine import epoch_batches
from utils.training.trainer import Batching, build_trainer
from utils.training.training_state import Progress
from utils.weights.checkpoint import digest


@pytest.fixture(scope="module")
def config(devkit) -> train.Config:
    return small_run(devkit, epochs=2, batch_size=8, eval_every=1, precision="fp32")


def test_dry_run_restores_the_state(config, capsys):
    spec, device = train.new_spec(config, {}, Diagnostics()), torch.device("cpu")
    trainer = build_trainer(config, spec, Batching.plan(24, 8, 8), Progress(end=2), device, ProcessGroup())
    data = train.load_data(config, spec, device, ProcessGroup(), Diagnostics())
    before = trainer.snapshot
    dry_run(trainer, config, data, epoch_batches(trainer, config, data))
    after = trainer.state.take_snapshot(spec)
    assert (digest(before.weights), digest(before.training)) == (digest(after.weights), digest(after.training))
    assert before.info == after.info
    printed = capsys.readouterr().out
    assert "a step of 8 images at 64x64 takes" in printed
    assert " GB; estimated training time " in printed


@pytest.fixture
def broken_compiler(monkeypatch):
    """torch.compile fails as it does without the Python headers."""

    def fail(*_):
        raise OSError("Python.h: No such file or directory")

    use_narrow_network(monkeypatch)
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **named: compile_module(*args, **named, backend=fail))
    monkeypatch.setattr("utils.training.trainer.choose_compile", lambda *_: True)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])  # pytest would keep all of its output
    print_notice.cache_clear()
    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("broken_compiler")
def test_trains_without_compilation_if_it_fails(config, tmp_path, capsys):
    folder = train.main(replace(config, epochs=1, run_dir=str(tmp_path / "run")))
    assert (folder / "last.safetensors").is_file()
    assert capsys.readouterr().err.count("not using torch.compile, because it failed") == 1


@pytest.mark.usefixtures("broken_compiler")
def test_reports_that_required_compilation_fails(config, tmp_path):
    with pytest.raises(UserError, match=r"compile is on, but torch.compile failed: .*Python.h"):
        train.main(replace(config, compile="on", run_dir=str(tmp_path / "run")))


@pytest.mark.usefixtures("broken_compiler")
def test_does_not_blame_compilation_for_other_errors(config, tmp_path, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(batch_size, "take_step", fail)
    with pytest.raises(ZeroDivisionError):
        train.main(replace(config, compile="on", run_dir=str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (29.4, "29 s"), (59.6, "1 min 0 s"), (150, "2 min 30 s"), (4321, "1 h 12 min")]
)
def test_formats_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
@pytest.mark.parametrize(("module", "name"), [(batch_size, "try_steps"), (engine, "train_one_epoch")])
def test_out_of_memory_error_suggests_a_batch_size(config, tmp_path, monkeypatch, error, module, name):
    def fail(*_):
        raise error

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(UserError, match="a batch of 8 images at 64x64 does not fit into memory; try --batch-size 4"):
        train.main(replace(config, run_dir=str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("max_size", "limit", "expected"),
    [(1000, 300, 296), (1000, 6, 4), (1000, 1, 1), (50, 300, 48), (7, 300, 4), (64, 64, 64)],
)
def test_finds_the_largest_batch(max_size, limit, expected):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    assert search_largest(fits, max_size) == expected
    assert max(tried) <= max_size


def test_reports_that_not_even_one_image_fits():
    with pytest.raises(UserError, match="not even one image fits"):
        search_largest(lambda _: False, 10)


def test_search_keeps_the_error_of_a_single_image(config, monkeypatch):
    """Its cause may be something other than memory."""
    text = "GET was unable to find an engine to execute this computation"
    trainer = SimpleNamespace(device=torch.device("cpu"), group=ProcessGroup(), set_mode=lambda **_: None)

    def fail(*_):
        raise RuntimeError(text)

    monkeypatch.setattr(batch_size, "try_steps", fail)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1, 1))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    with pytest.raises(RuntimeError, match=text):
        batch_size.find_largest_batch(trainer, config, range(8), 8)
    with (
        pytest.raises(UserError, match=rf"does not fit into memory \({text}\); try"),
        explain_out_of_memory(8, (64, 64)),
    ):
        fail()


def test_batch_size_0_needs_a_gpu(config, tmp_path):
    with pytest.raises(UserError, match="on the CPU give a number"):
        train.main(replace(config, batch_size=0, run_dir=str(tmp_path)))
