"""The tool that trains and compares attention blocks."""

import json

import pytest
import torch
import tyro

import eval as eval_script
import train
from tests.narrow_network import use_narrow_network
from tools import compare_attention
from utils.weights.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def flags(devkit):
    """Flags of a comparison of four tiny runs."""
    settings = ["--devkit", devkit, "--train-sets", "Demo/val", "--test-sets", "Demo/test", "--epochs", 1]
    settings += ["--classes", devkit / "Demo" / "classes.txt", "--phis", 0, 3, "--seeds", 0, 1, "--device", "cpu"]
    return [*map(str, settings)]


TINY = ["--", "--input-size", "64", "64", "--batch-size", "6", "--precision", "fp32"]


@pytest.fixture
def trained(monkeypatch):
    """Run the scripts in this process; lists the phi and seed of each training, of which the third is interrupted."""
    started = []

    def call(self: compare_attention.Run, script: str, *words: object) -> None:
        if script == "train.py":
            started.append((self.phi, self.seed))
            if len(started) == 3:
                raise KeyboardInterrupt
        module = {"train.py": train, "eval.py": eval_script}[script]
        module.main(tyro.cli(module.Config, args=[*map(str, words)]))

    use_narrow_network(monkeypatch)
    monkeypatch.setattr(compare_attention.Run, "call", call)
    monkeypatch.setattr(compare_attention, "TIMED_CALLS", 2)
    return started


def test_continues_an_interrupted_comparison(flags, tmp_path, trained, capsys, expect_failure):
    out = tmp_path / "c"
    config = tyro.cli(compare_attention.Config, args=[*flags, "--out", str(out), *TINY])
    with pytest.raises(KeyboardInterrupt):
        compare_attention.main(config)
    assert "2 of 4 runs are finished" in (out / "comparison.txt").read_text()
    compare_attention.main(config)
    assert trained == [(0, 0), (3, 0), (0, 1), (0, 1), (3, 1)]
    printed = capsys.readouterr().out
    assert "4 of 4 runs are finished" in printed
    assert "2 seeds give very wide confidence intervals" in printed
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert [row["phi"] for row in rows] == [0, 3]
    for row in rows:
        assert row["seeds"] == [0, 1]
        assert row["cost"]["ms"] > 0
        assert row["seconds"] > 0
    assert rows[1]["cost"]["parameters"] - rows[0]["cost"]["parameters"] == 15 + 3  # the kernels and the gains
    first, second = (load_checkpoint(out / f"phi0_seed{seed}" / "last.safetensors") for seed in (0, 1))
    assert not torch.equal(first.weights["conv_for_P5.conv.weight"], second.weights["conv_for_P5.conv.weight"])
    compare_attention.main(compare_attention.Config(out=str(out)))
    assert len(trained) == 5  # nothing was left to train
    expect_failure(
        compare_attention,
        [*flags, "--out", out, "--epochs", 2, *TINY],
        "epochs is 1 in",
        "cannot be changed to 2 on resume",
    )


def test_rejects_invalid_settings(flags, expect_failure, tmp_path):
    out = ["--out", tmp_path / "c"]
    expect_failure(compare_attention, ["--phis", 1, 2], "phis must contain 0")
    expect_failure(compare_attention, ["--phis", 0, 77], "phis contains 77", "1 (se)")
    expect_failure(compare_attention, ["--seeds"], "seeds is empty")
    words = ("train.py failed for phi 0 and seed 0", "phi0_seed0.log", "lr is 0.0, but must be")
    expect_failure(compare_attention, [*flags, *out, "--", "--lr", 0], *words)
    expect_failure(
        compare_attention, [*flags, *out, "--", "--lr", -1], "lr is -1.0, but must be"
    )  # accepted, as no run has started
    expect_failure(compare_attention, [*flags, *out, "--test-sets", "Demo/tset"], "the set Demo/tset does not exist")
    expect_failure(
        compare_attention,
        [*flags, *out, "--test-sets", "Demo/val"],
        "6 images are in both the training and the test sets",
    )
