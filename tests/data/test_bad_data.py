"""Bad data ends in one error message and exit code 2, or is skipped or repaired, counted and reported."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from nets.spec import ModelSpec
from tests.bad_inputs import (
    DATA,
    ERROR,
    JPEG,
    REPAIR,
    SIZE,
    SKIP,
    Scene,
    annotated,
    box,
    expect,
    gray_of_16_bits,
    thing,
    turned,
)  # fmt: skip
from tests.conftest import ROOT
from utils.data.image_io import decode_image, decode_stored, read_encoded
from utils.data.voc import load_classes
from utils.detection.anchors import load_anchors
from utils.system.diagnostics import Diagnostic, Diagnostics
from utils.system.distributed import ProcessGroup

UNPRIVILEGED = 65534  # the user id of nobody
CPU = torch.device("cpu")


def load_spec(scene: Scene, diagnostics: Diagnostics) -> ModelSpec:
    return ModelSpec(load_classes(scene.classes, diagnostics), load_anchors(scene.anchors), input_size=(32, 32))


def read_for_training(scene: Scene, diagnostics: Diagnostics) -> None:
    """Read the data as train.py does."""
    config = train.Config(devkit=str(scene.folder), train_sets=("VOC/train",), val_sets=("VOC/val",))
    train.load_data(config, load_spec(scene, diagnostics), CPU, ProcessGroup(), diagnostics)


def read_for_evaluation(scene: Scene, diagnostics: Diagnostics) -> None:
    """Read the training set as eval.py does."""
    spec = load_spec(scene, diagnostics)
    samples = evaluation.load_samples(str(scene.folder), ["VOC/train"], spec.class_names, diagnostics)
    evaluation.build_cache(samples, spec, CPU, diagnostics=diagnostics)
    diagnostics.print_summary("evaluation", print)


def judge(found: list[Diagnostic], policy: Diagnostics) -> None:
    """Report what was found as a reader with another policy would."""
    policy.extend(found)
    policy.print_summary("data", print)


def in_error(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a summary line as they are in an error message."""
    return tuple(word.replace(" object", ", object").replace(" line", ", line") for word in words)


def contents(folder: Path) -> dict[Path, str]:
    """The hashes of the regular files, except large ones."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.stat().st_size < 1_000_000}


@pytest.mark.filterwarnings("ignore")  # from Pillow
@pytest.mark.parametrize("case", DATA, ids=lambda case: case.name)
def test_reports_bad_data_by_policy(case, tmp_path, monkeypatch, call_script):
    """Reads each case once, for training; strict training and evaluation judge the same findings differently."""
    monkeypatch.chdir(tmp_path)
    scene = Scene(tmp_path / "devkit")
    case.make(scene)
    before = contents(scene.folder)
    diagnostics = Diagnostics()
    expect(call_script(lambda _: read_for_training(scene, diagnostics)), case.outcome, case.words)
    if case.outcome in (SKIP, REPAIR):
        found, words = diagnostics.found, in_error(case.words)
        assert {item.kind for item in found} == {case.outcome}
        expect(call_script(lambda _: judge(found, Diagnostics(strict=True))), ERROR, (*words, "strict"))
        evaluated = call_script(lambda _: judge(found, Diagnostics(skips=False)))
        expect(evaluated, *((ERROR, words) if case.outcome == SKIP else (REPAIR, case.words)))
    assert contents(scene.folder) == before
    assert set(tmp_path.rglob("*")) == {scene.folder, *scene.folder.rglob("*")}  # nothing else was written


def test_strict_reading_stops_at_repairs_and_evaluation_at_skips(tmp_path, call_script):
    """The readers themselves, with one object to repair and one to skip."""
    scene = Scene(tmp_path)
    annotated(thing(name="<name> cat</name>"))(scene)
    expect(
        call_script(lambda _: read_for_training(scene, Diagnostics(strict=True))), ERROR, ("a.xml, object 1", "strict")
    )
    expect(call_script(lambda _: read_for_evaluation(scene, Diagnostics(skips=False))), REPAIR, ("a.xml object 1",))
    annotated(thing(box(41, 4, 44)))(scene)
    expect(call_script(lambda _: read_for_evaluation(scene, Diagnostics(skips=False))), ERROR, ("a.xml, object 1",))


def test_training_stops_if_too_many_images_are_skipped(tmp_path, monkeypatch, call_script):
    """More than 3 and more than 1 % of them: 4 of 402 are accepted, 5 are not."""
    monkeypatch.chdir(tmp_path)
    scene = Scene(tmp_path / "devkit")
    names = [f"{number:03}" for number in range(402)]
    for name in names:
        scene.image(JPEG, f"{name}.jpg")
        scene.xml("<annotation><size><width>40</width><height>30</height></size></annotation>", name)
    scene.split("\n".join(names))
    for broken in (4, 5):
        for name in names[:broken]:
            scene.image(b"", f"{name}.jpg")
        outcome = call_script(lambda _: read_for_training(scene, Diagnostics()))
        assert outcome.code == (2 if broken == 5 else 0)
        assert ("training: 4 skipped" in outcome.output) == (broken == 4)
    assert "5 unusable images out of 402" in outcome.errors[0]
    assert "000.jpg is empty" in outcome.errors[0]


def test_findings_are_reported_again_from_the_disk_cache(tmp_path, monkeypatch, call_script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.data.cache.choose_place", lambda *_: "disk")
    scene = Scene(tmp_path / "devkit")
    scene.image(b"")
    scene.image(JPEG[:-2], "b.jpg")
    first, again = (call_script(lambda _: read_for_training(scene, Diagnostics())) for _ in range(2))
    assert first == again
    assert "training: 1 skipped, 1 repaired" in first.output
    for read, policy in ((read_for_training, {"strict": True}), (read_for_evaluation, {"skips": False})):
        outcome = call_script(lambda _, read=read, policy=policy: read(scene, Diagnostics(**policy)))
        expect(outcome, ERROR, ("a.jpg", "is empty"))


def test_16_bit_pixels_are_scaled_to_8_bits():
    gray, _ = decode_stored(gray_of_16_bits(), "a.png", Diagnostics())
    assert gray.shape == (*SIZE, 3)
    assert (gray == 0x40).all()


def test_images_are_turned_upright_by_exif():
    image = decode_image(turned(6), "a.jpg")
    assert image.shape == (*SIZE[::-1], 3)
    assert np.abs(image.astype(int) - np.rot90(decode_image(JPEG, "a.jpg"), -1)).max() <= 1


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs POSIX permissions")
def test_names_file_that_may_not_be_read(call_script):
    """Tested as an unprivileged user, since root may read everything."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as printed:
        Path(folder).chmod(0o755)
        path = Path(folder) / "a.jpg"
        path.write_bytes(JPEG)
        path.chmod(0)
        if (child := os.fork()) == 0:
            if os.getuid() == 0:
                os.setgid(UNPRIVILEGED)
                os.setuid(UNPRIVILEGED)
            printed.write("\n".join(call_script(lambda _: read_encoded(path)).errors))
            printed.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        printed.seek(0)
        assert printed.read() == f"error: {path} cannot be read: Permission denied"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_rejects_header_of_large_bitmap_without_allocating_it(tmp_path):
    scene = Scene(tmp_path)
    next(case for case in DATA if case.name == "image: header of a large bitmap").make(scene)
    code = (
        "import sys\nfrom utils.data.image_io import FileError, decode_image, read_encoded\n"
        "try:\n    decode_image(read_encoded(sys.argv[1]), sys.argv[1])\n"
        "except FileError:\n    print(open('/proc/self/status').read())"
    )
    command = [sys.executable, "-c", code, str(scene.image_path("a.bmp"))]
    status = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    (kilobytes,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert 0 < kilobytes < 1_000_000
