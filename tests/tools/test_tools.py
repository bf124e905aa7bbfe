"""The benchmarks, at reduced size."""

import json
import sys

import pytest
import torch

from tests.benchmarks import benchmark_training as benchmark
from tests.conftest import ROOT, run


def figures_of(tmp_path, *arguments):
    """What a benchmark writes."""
    result = run(ROOT / "tools" / "benchmark.py", *arguments, "--json", tmp_path / "figures", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures").read_text())
    assert json.loads(result.stdout) == figures
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]
    return figures


SMALL = ("--input-size", 64, 64, "--device", "cpu")


def test_benchmark_train(tmp_path):
    flags = ["--rounds", 1, "--steps", 2, "--batch-size", 2, "--mosaic", 1]
    figures = figures_of(tmp_path, "train", *SMALL, *flags)
    assert figures["ratio"] == pytest.approx(figures["images_per_second"] / figures["fixed_batch_images_per_second"])
    assert len(figures["epochs"]) == 3
    assert set(figures["shares"]) == {"augmentation", "forward", "backward", "optimizer"}
    assert sum(figures["shares"].values()) == pytest.approx(1)
    assert figures["step_memory_gb"] > 0.1


def test_benchmark_gpu_keeps_what_it_has(expect_failure, monkeypatch, tmp_path):
    """A run that fails takes nothing from the others; here the runs themselves are made up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expect_failure(benchmark, ["gpu"], "torch finds no CUDA GPU here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    shares = {"augmentation": 0.1, "forward": 0.3, "backward": 0.5, "optimizer": 0.1}
    good = {"images_per_second": 900, "fixed_batch_images_per_second": 1000, "ratio": 0.9, "shares": shares}

    def made_up(command):
        if command[command.index("--batch-size") + 1] == 128:
            raise RuntimeError("a long story\nout of memory")
        command[command.index("--json") + 1].write_text(json.dumps(good | {"step_memory_gb": 5.0}))

    monkeypatch.setattr(benchmark, "run_quietly", made_up)
    found = benchmark.benchmark_gpu(benchmark.Gpu(json=str(tmp_path / "g"), runs=((3, 128), (0, 64))))
    assert json.loads((tmp_path / "g").read_text()) == found
    lines = [line.split() for line in benchmark.gpu_table(found).splitlines()[1:]]
    assert lines[0] == ["3", "128", "failed:", "out", "of", "memory"]
    assert lines[1] == ["0", "64", "900", "1000", "0.900", "5.0", "0.100", "0.300", "0.500", "0.100"]


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
def test_benchmark_memory(tmp_path):
    config = benchmark.Memory(str(tmp_path / "m"), (4, 12), (64, 64), batch_size=2, steps=2, device="cpu")
    benchmark.main(config)
    figures = json.loads((tmp_path / "m").read_text())
    few, many = figures["peaks_gb"]["4"], figures["peaks_gb"]["12"]
    assert figures["ratio"] == pytest.approx(many["RssAnon"] / few["RssAnon"])
    assert all(0.1 < peaks["RssAnon"] < peaks["VmRSS"] for peaks in (few, many))


def test_benchmark_memory_needs_linux(expect_failure, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    expect_failure(benchmark, ["memory"], "darwin")
