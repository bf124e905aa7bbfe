"""Any mistake of a user gets one sentence and exit code 2, or is left out or repaired, counted and told."""

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
import torch
from torch import nn

import eval as evaluation
import predict
import train
from nets.yolo import ModelSpec
from tests.bad_inputs import DATA, ERROR, OK, REPAIR, SIZE, SKIP, Row, Scene, picture, turned
from tests.conftest import ROOT, small_run
from utils.anchors import load_anchors
from utils.decode import decode_image, read_encoded
from utils.distributed import Ranks
from utils.errors import run_script
from utils.problems import Problems
from utils.voc import load_classes

NOBODY = 65534  # a user without rights


@dataclass(frozen=True)
class Nothing:
    """No settings."""


@dataclass
class Outcome:
    """How a script ended."""

    code: int
    errors: list[str]
    output: str


@pytest.fixture
def script(monkeypatch, capsys) -> Callable[..., Outcome]:
    """Call a script's main as its command line does."""

    def call(main: Callable[..., object], config_type: type = Nothing, *arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            run_script(main, config_type)
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return Outcome(code, [line for line in said.err.splitlines() if line.startswith("error: ")], said.out)

    return call


def read_data(scene: Scene, strict: bool = False, measure: bool = False) -> tuple:
    """What train.py reads before it begins, or with `measure` the same images as eval.py reads them."""
    problems = Problems(strict, skips=not measure)
    spec = ModelSpec(load_classes(scene.classes, problems), load_anchors(scene.anchors), input_size=(32, 32))
    sets = {"train_sets": (), "val_sets": ("VOC/train",)} if measure else {}
    config = train.Config(devkit=str(scene.folder), **{"train_sets": ("VOC/train",), "val_sets": ("VOC/val",)} | sets)
    if measure:
        samples = evaluation.load_samples(config.devkit, config.val_sets, spec.class_names, problems)
        found = evaluation.build_cache(samples, spec, torch.device("cpu"), problems=problems), None
        problems.tell("measured", print)
        return found
    return train.load_data(config, spec, torch.device("cpu"), Ranks(), problems)


def contents(folder: Path) -> dict[Path, str]:
    """What the regular files are, small ones by their bytes."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.stat().st_size < 1_000_000}


def expect(outcome: Outcome, expected: str, words: tuple[str, ...]) -> None:
    """One sentence with all the words and exit code 2, or a line that counts, or silence."""
    if expected == ERROR:
        assert outcome.code == 2, outcome.output
        (line,) = outcome.errors
    else:
        assert (outcome.code, outcome.errors) == (0, [])
        lines = [line for line in outcome.output.splitlines() if line.startswith(f"  {expected}: ")]
        if expected == OK:
            assert not lines and "skipped" not in outcome.output and "repaired" not in outcome.output
            return
        (line,) = lines
    for word in words:
        assert word in line, line


@pytest.mark.parametrize("row", DATA, ids=lambda row: f"{row.number} {row.name}")
def test_data(row, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    scene = Scene(tmp_path / "devkit")
    row.make(scene)
    before = contents(scene.folder)
    expect(script(lambda _: read_data(scene)), row.outcome, row.words)
    if row.outcome in (SKIP, REPAIR):
        names = tuple(word.replace(" object", ", object").replace(" line", ", line") for word in row.words)
        expect(script(lambda _: read_data(scene, strict=True)), ERROR, (*names, "strict"))
        measured = script(lambda _: read_data(scene, measure=True))
        expect(measured, ERROR if row.outcome == SKIP else REPAIR, names if row.outcome == SKIP else row.words)
    assert contents(scene.folder) == before
    assert set(tmp_path.rglob("*")) - {scene.folder, *scene.folder.rglob("*")} == set()  # nothing was written
