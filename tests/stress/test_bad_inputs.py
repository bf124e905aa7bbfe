"""Any mistake of a user gets one sentence and exit code 2, or is left out or repaired, counted and told."""

import hashlib
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import av
import numpy as np
import pytest
import torch
from torch import nn

import eval as evaluation
import predict
import train
from nets.spec import ModelSpec
from nets.yolo import YoloBody, build_model
from tests.bad_inputs import DATA, ERROR, JPEG, OK, REPAIR, SIZE, SKIP, Scene, gray_of_16_bits, picture, turned
from tests.conftest import ANCHORS, ROOT, small_run
from utils.data.image_io import decode_image, decode_stored, read_encoded, write_image
from utils.data.voc import load_classes
from utils.detection.anchors import load_anchors
from utils.system.cli import run_script
from utils.system.diagnostics import Diagnostics
from utils.system.distributed import ProcessGroup
from utils.weights.checkpoint import Checkpoint, save_checkpoint
from utils.weights.darknet import START, count_floats, standard_layers
from utils.weights.pretrained import read_weights, start_from

NOBODY = 65534  # a user without rights
SPEC = ModelSpec(("cat", "dog"), ANCHORS, input_size=(32, 32), scale_xy=1.05)


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
    diagnostics = Diagnostics(strict, skips=not measure)
    spec = ModelSpec(load_classes(scene.classes, diagnostics), load_anchors(scene.anchors), input_size=(32, 32))
    sets = {"train_sets": (), "val_sets": ("VOC/train",)} if measure else {}
    config = train.Config(devkit=str(scene.folder), **{"train_sets": ("VOC/train",), "val_sets": ("VOC/val",)} | sets)
    if measure:
        samples = evaluation.load_samples(config.devkit, config.val_sets, spec.class_names, diagnostics)
        found = evaluation.build_cache(samples, spec, torch.device("cpu"), diagnostics=diagnostics), None
        diagnostics.print_summary("measured", print)
        return found
    return train.load_data(config, spec, torch.device("cpu"), ProcessGroup(), diagnostics)


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


@pytest.mark.filterwarnings("ignore")  # Pillow has its own words for it
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


# images, looked at for more than the message


def test_pixels_are_right():
    """20: scaled and not clipped. 22: a picture to predict on is upright."""
    gray, _ = decode_stored(gray_of_16_bits(), "a.png", Diagnostics())
    assert gray.shape == (*SIZE, 3)
    assert (gray == 0x40).all()
    assert decode_image(turned(6), "a.jpg").shape == (*SIZE[::-1], 3)
    upright = np.rot90(decode_image(JPEG, "a.jpg"), -1)
    assert np.abs(decode_image(turned(6), "a.jpg").astype(int) - upright).max() <= 1


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="permissions of POSIX")
def test_no_permission(script):
    """12, as an ordinary user, since root may read everything."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        Path(folder).chmod(0o755)
        path = Path(folder) / "a.jpg"
        path.write_bytes(JPEG)
        path.chmod(0)
        if (child := os.fork()) == 0:
            if os.getuid() == 0:
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            said.write("\n".join(script(lambda _: read_encoded(path)).errors))
            said.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        said.seek(0)
        assert said.read() == f"error: {path} cannot be read: Permission denied"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory was taken")
def test_a_huge_bitmap_takes_no_memory(tmp_path):
    """28, in a process that has not taken memory for other things."""
    scene = Scene(tmp_path)
    next(row for row in DATA if row.name == "large bitmap promised").make(scene)
    code = (
        "import sys\nfrom utils.data.image_io import FileError, decode_image, read_encoded\n"
        "try:\n    decode_image(read_encoded(sys.argv[1]), sys.argv[1])\n"
        "except FileError:\n    print(open('/proc/self/status').read())"
    )
    command = [sys.executable, "-c", code, str(scene.image_path("a.bmp"))]
    status = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    (kilobytes,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert 0 < kilobytes < 1_000_000


def test_training_stops_when_too_much_is_skipped(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    scene = Scene(tmp_path / "devkit")
    names = [f"{number:03}" for number in range(402)]
    for name in names:
        scene.image(JPEG, f"{name}.jpg")
        scene.xml("<annotation><size><width>40</width><height>30</height></size></annotation>", name)
    scene.split("\n".join(names))
    for broken in range(6):
        code = 2 if broken == 5 else 0  # 4 are more than 3, but not more than 1 % of 402
        outcome = script(lambda _: read_data(scene))
        assert outcome.code == code
        assert code or (f"training: {broken} skipped" in outcome.output) == (broken > 0)
        scene.image(b"", f"{broken:03}.jpg")
    assert "the data contains 5 unusable images of 402" in outcome.errors[0]
    assert "000.jpg is empty" in outcome.errors[0]


def test_what_was_wrong_with_images_is_told_again_from_the_cache(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.data.cache.choose_place", lambda *_: "disk")
    scene = Scene(tmp_path / "devkit")
    scene.image(b"")
    scene.image(JPEG[:-2], "b.jpg")
    first, again = (script(lambda _: read_data(scene)) for _ in range(2))
    assert first == again
    assert "training: 1 skipped, 1 repaired" in first.output
    for strict, measure in ((True, False), (False, True)):
        expect(script(lambda _, s=strict, m=measure: read_data(scene, s, m)), ERROR, ("a.jpg", "is empty"))


def test_one_image_is_enough_to_train(tmp_path, monkeypatch, script):
    """72: fewer than a batch or a mosaic needs."""
    monkeypatch.chdir(tmp_path)
    scene = Scene(tmp_path / "devkit")
    scene.split("a")
    changes = {"train_sets": ("VOC/train",), "val_sets": (), "classes": str(scene.classes), "epochs": 1}
    config = replace(small_run(scene.folder), **changes, run_dir=str(tmp_path / "run"))
    assert script(lambda _: train.main(config)).code == 0
    assert (tmp_path / "run" / "best.safetensors").exists()


# weights


class Payload:
    executed = False

    def __reduce__(self):
        return (setattr, (Payload, "executed", True))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_model(SPEC).state_dict()


def begin(path: Path, num_classes: int = 2) -> None:
    """What train.py does with --weights."""
    diagnostics = Diagnostics()
    found = read_weights(path, diagnostics)
    print(start_from(YoloBody(SPEC.anchors_mask, num_classes), found, path))
    diagnostics.print_summary("weights", print)


def save(path: Path, spec: ModelSpec, tensors: dict[str, torch.Tensor], **info: object) -> Path:
    save_checkpoint(path, Checkpoint(spec, tensors, {"epoch": 1, **info}, {}))
    return path


def with_name(weights: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> dict:
    """The weights with the largest tensor changed."""
    name = max(weights, key=lambda key: weights[key].numel())
    return weights | {name: change(weights[name])}


def quantized() -> torch.Tensor:
    return torch._empty_affine_quantized([3], scale=1.0, zero_point=0, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore")  # torch says that it will do without quantized tensors
@pytest.mark.parametrize("number", [81, 82, 83, 84, 85, 87, 88])
def test_published_weights(number, weights, tmp_path, script):
    path = tmp_path / "a.pth"
    cases: dict[int, list[tuple[object, str, tuple[str, ...]]]] = {
        81: [({**weights, "a": Payload()}, ERROR, ("could run code",))],
        82: [
            (with_name(weights, torch.Tensor.to_sparse), ERROR, ("sparse",)),
            (
                {**weights, "a": torch._empty_affine_quantized([3], scale=1.0, zero_point=0, dtype=torch.qint8)},
                ERROR,
                ("quantized",),
            ),
            ({**weights, "a": torch.ones(1).expand(10**9)}, ERROR, ("sparse",)),
            ({**weights, "a": torch.empty(10**9, device="meta")}, ERROR, ("sparse",)),
        ],
        83: [(None, ERROR, ("would unpack to 50 MB",))],
        84: [(nn.Linear(2, 2), ERROR, ("could run code",))],
        85: [({f"module.{name}": value for name, value in weights.items()}, REPAIR, ("DataParallel",))],
        87: [({"layer.weight": torch.ones(3)}, ERROR, ("no parameter fits",))],
        88: [(with_name(weights, lambda value: value * float("nan")), ERROR, ("not finite",))],
    }
    for content, outcome, words in cases[number]:
        if content is None:
            with ZipFile(path, "w", ZIP_DEFLATED) as archive:
                archive.writestr("a/data/0", bytes(50_000_000))
        else:
            torch.save(content, path)
        expect(script(lambda _: begin(path)), outcome, ("a.pth", *words))
    assert not Payload.executed


@pytest.mark.parametrize("number", [80, 86, 87, 88])
def test_checkpoints(number, weights, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("cat\n")
    write_image("a.jpg", np.asarray(picture()))
    spec, tensors, words = SPEC, weights, ()
    if number == 80:
        spec, words = replace(SPEC, anchors_mask=((3, 4, 6), (1, 2, 3))), ("anchors_mask", "anchors 0 to 5")
    if number == 86:
        spec, words = replace(SPEC, class_names=("cat",)), ("does not hold the network", "yolo_headP")
    if number == 87:
        tensors, words = {"layer.weight": torch.ones(3)}, ("does not hold the network",)
    if number == 88:
        tensors, words = with_name(weights, lambda value: value * float("nan")), ("not finite",)
    path = save(tmp_path / "a.safetensors", spec, tensors)
    for main, arguments in ((predict, ["a.jpg"]), (evaluation, ["--sets", "VOC/val", "--devkit", tmp_path / "devkit"])):
        call = partial(script, main.main, main.Config, *arguments, "--device", "cpu")
        expect(call("--weights", path), ERROR, ("a.safetensors", *words))
        if number == 86:
            good = save(tmp_path / "good.safetensors", SPEC, weights)
            expect(
                call("--weights", good, "--classes", "one.txt"), ERROR, ("2 classes (cat, dog)", "one.txt has 1 (cat)")
            )
    if number == 86:  # training takes what fits
        outcome = script(lambda _: begin(good, num_classes=3))
        assert outcome.code == 0
        assert "newly initialised: yolo_headP4.1.bias, yolo_headP4.1.weight, yolo_headP5.1.bias" in outcome.output
    assert not (tmp_path / "predictions").exists()


@pytest.mark.parametrize("number", [89, 90, 91, 92])
def test_darknet_files(number, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.weights"
    header, old = struct.pack("<3iq", 0, 2, 5, 32_013_312), struct.pack("<3ii", 0, 1, 0, 32_013_312)
    layers = standard_layers(2)

    def write(content: bytes, size: int) -> None:
        path.write_bytes(content)
        os.truncate(path, size)

    if number == 89:
        for kept in range(len(layers)):
            write(header, 20 + 4 * count_floats(layers[:kept]) + 4 * (kept == START))
            expect(script(lambda _: begin(path)), ERROR, ("a.weights", "cut off"))
        write(header, 19_789_716)
        outcome = script(lambda _: begin(path.rename("yolov4-tiny.conv.29")))
        assert (outcome.code, "newly initialised: upsample" in outcome.output) == (0, True)
        write_image("a.jpg", np.asarray(picture()))
        arguments = "a.jpg", "--weights", "yolov4-tiny.conv.29", "--device", "cpu"
        expect(script(predict.main, predict.Config, *arguments), ERROR, ("conv.29", "start a training"))
    if number == 90:
        write(header, 20 + 4 * count_floats(layers) + 4)
        expect(script(lambda _: begin(path)), ERROR, ("a.weights", "something behind its end"))
    if number == 91:
        for lie in (struct.pack("<3iq", 0, 2, 5, 2**62), struct.pack("<3iq", 0, -2, 5, 0), b"\xff" * 20):
            write(lie, 20 + 4 * count_floats(layers))
            expect(script(lambda _: begin(path)), ERROR, ("a.weights", "header says"))
    if number == 92:
        for start in (header, old):
            write(start, len(start) + 4 * count_floats(layers))
            expect(script(lambda _: begin(path)), OK, ())


# settings


@pytest.mark.parametrize(
    ("number", "arguments", "words"),
    [
        (93, ["--batch-size", "-1"], ("batch_size is -1",)),
        (93, ["--lr", "-1"], ("lr is -1",)),
        (93, ["--lr", "nan"], ("lr is nan",)),
        (93, ["--input-size", "416", "400"], ("input_size is (416, 400)", "multiples of 32")),
        (95, ["--device", "cuda"], ("device is cuda", "--device cpu")),
    ],
)
def test_settings(number, arguments, words, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expect(script(train.main, train.Config, *arguments), ERROR, words)
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_is_answered_with_one_that_is_meant(monkeypatch, capsys):
    """94"""
    monkeypatch.setattr(sys, "argv", ["train.py", "--epohcs", "3"])
    with pytest.raises(SystemExit) as stop:
        run_script(train.main, train.Config)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--epohcs" in said
    assert "--epochs INT" in said.partition("Perhaps you meant")[2]


def test_results_do_not_replace_their_inputs(weights, tmp_path, script):
    """96"""
    (tmp_path / "a.jpg").write_bytes(JPEG)
    path = save(tmp_path / "a.safetensors", SPEC, weights)
    outcome = script(predict.main, predict.Config, tmp_path / "a.jpg", "--weights", path, "--out", tmp_path)
    expect(outcome, ERROR, (f"out is {tmp_path}", "replace their inputs"))
    assert (tmp_path / "a.jpg").read_bytes() == JPEG


# videos


def write_video(path: Path, frames: int = 12, size: tuple[int, int] = (48, 64), spoil: int = -1) -> Path:
    """A video of single pictures, of which the one with the number `spoil` is broken."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", Fraction(10))
        stream.height, stream.width, stream.pix_fmt = *size, "yuvj420p"
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        pictures = [av.VideoFrame.from_ndarray(np.roll(noise, i, 1)) for i in range(frames)]
        packets = [packet for item in [*pictures, None] for packet in stream.encode(item)]
        if spoil >= 0:
            broken = av.Packet(b"no picture" * 9)
            broken.stream, broken.pts, broken.dts = stream, packets[spoil].pts, packets[spoil].dts
            broken.time_base, broken.duration = packets[spoil].time_base, packets[spoil].duration
            packets[spoil] = broken
        container.mux(packets)
    return path


def frames_of(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.fixture
def predict_video(weights, tmp_path, script) -> Callable[..., Outcome]:
    checkpoint = save(tmp_path / "a.safetensors", SPEC, weights)
    common = ["--weights", checkpoint, "--out", tmp_path / "out", "--device", "cpu", "--patience", 0]
    return lambda *arguments: script(predict.main, predict.Config, *arguments, *common)


def test_broken_frames_are_left_out(predict_video, tmp_path, capsys):
    """97"""
    path = write_video(tmp_path / "a.avi", spoil=5)
    config = predict.Config(
        (str(path),), weights=str(tmp_path / "a.safetensors"), out=str(tmp_path / "out"), device="cpu"
    )
    predict.main(config)
    assert "1 broken parts of" in capsys.readouterr().err
    assert frames_of(tmp_path / "out" / "a.mp4") == 11


@pytest.mark.parametrize("frames", [0, 3, 2**32 - 1])
def test_a_wrong_number_of_frames_does_not_matter(predict_video, tmp_path, frames):
    """98"""
    content = write_video(tmp_path / "a.avi").read_bytes()
    for place in (content.index(b"avih") + 24, content.index(b"strh") + 40):
        content = content[:place] + struct.pack("<I", frames) + content[place + 4 :]
    (tmp_path / "a.avi").write_bytes(content)
    assert predict_video(tmp_path / "a.avi").code == 0
    assert frames_of(tmp_path / "out" / "a.mp4") == 12


def test_a_change_of_size_ends_the_video(predict_video, tmp_path):
    """99"""
    parts = [write_video(tmp_path / f"{side}.mjpeg", 6, (48, side)).read_bytes() for side in (64, 96)]
    (tmp_path / "both.mjpeg").write_bytes(b"".join(parts))
    (tmp_path / "both.mjpeg").rename(tmp_path / "both.avi")
    expect(predict_video(tmp_path / "both.avi"), ERROR, ("both.avi changes its size at frame 6", "64x48 to 96x48"))
    assert frames_of(tmp_path / "out" / "both.mp4") == 6


class Capture:
    """A camera that is unplugged after four pictures."""

    def __init__(self, _: int) -> None:
        self.left = 4

    def isOpened(self) -> bool:
        return True

    def get(self, _: int) -> float:
        return 10.0

    def grab(self) -> bool:
        self.left -= 1
        return self.left >= 0

    def retrieve(self) -> tuple[bool, np.ndarray]:
        return True, np.full((48, 64, 3), 99, np.uint8)

    def read(self) -> tuple[bool, np.ndarray | None]:
        return (True, self.retrieve()[1]) if self.grab() else (False, None)

    def release(self) -> None:
        pass


def test_a_camera_that_goes_away(predict_video, tmp_path, monkeypatch):
    """99"""
    monkeypatch.setattr("cv2.VideoCapture", Capture)
    expect(predict_video(7), ERROR, ("camera 7 went away after ", " did not come back"))
    assert 1 <= frames_of(tmp_path / "out" / "camera 7.mp4") <= 4  # those that came while the network was busy are not


def test_a_writer_that_cannot_open(predict_video, tmp_path):
    """100"""
    (tmp_path / "out" / "a.mp4").mkdir(parents=True)
    expect(predict_video(write_video(tmp_path / "a.avi")), ERROR, ("a.mp4", "cannot write"))


BESIDE_DATA = {12, *range(80, 101)}  # the numbers of the tests that are not in the table


def test_all_hundred_are_here():
    assert {row.number for row in DATA} | BESIDE_DATA == set(range(1, 101))
