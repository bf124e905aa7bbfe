"""Prediction on images, videos and streams: what goes in, what comes out, and what ends early."""

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import av
import numpy as np
import pytest
import supervision as sv
import torch
from PIL import Image
from pycocotools.coco import COCO

import predict
from nets.spec import ModelSpec
from nets.yolo import build_model
from tests.benchmarks import benchmark_inference as benchmark_predict
from tests.conftest import ANCHORS, ROOT, run
from utils.data.image_io import encode_image, read_image, write_image
from utils.data.voc_xml import read_voc_xml
from utils.inference.backends import TorchNetwork
from utils.inference.detector import Detector
from utils.inference.drawing import draw_detections
from utils.inference.pipeline import Look, Pipeline
from utils.inference.sources import inputs, open_sources
from utils.inference.streams import Camera, Stream
from utils.inference.video import Frame, Video, VideoWriter, open_video, public
from utils.system.cli import run_script
from utils.system.errors import UserError
from utils.system.prefetch import ahead, newest, prefetch_map
from utils.weights.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

RATE, FRAMES, SIZE = Fraction(25, 2), 23, (71, 110)  # of the video: odd sides and an odd rate


def drawn_frame(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A disc that moves to the right over noise."""
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    image = np.random.default_rng(0).integers(60, 90, (height, width, 3), dtype=np.uint8)
    image[(rows - height / 2) ** 2 + (columns - 20 - 2 * number) ** 2 < 150] = (240, 40, 40)
    return image


def write_video(path: Path, frames: int = FRAMES, size: tuple[int, int] = SIZE) -> Path:
    writer = VideoWriter(path, RATE, size)
    for number in range(frames):
        writer.write(drawn_frame(number, size), number / float(RATE))
    writer.close()
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "a disc.mp4")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network, which finds something everywhere at a low confidence."""
    torch.manual_seed(0)
    spec = ModelSpec(("disc", "square"), ANCHORS, input_size=(64, 96))
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    save_checkpoint(path, Checkpoint(spec, build_model(spec).state_dict(), {"epoch": 1}, {}))
    return path


@pytest.fixture
def config(weights: Path, tmp_path: Path) -> predict.Config:
    settings = {"confidence": 0.1, "device": "cpu", "precision": "fp32", "out": str(tmp_path / "out")}
    return predict.Config((), weights=str(weights), **settings)


def lines_of(config: predict.Config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.out) / "detections.jsonl").read_text().splitlines()]


def frames_of(path: Path) -> list[tuple[float, np.ndarray]]:
    with av.open(str(path)) as container:
        return [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def test_a_video_keeps_its_length_and_rate(config, video):
    found = predict.main(replace(config, source=(str(video),), batch_size=4))
    written = frames_of(Path(config.out) / "a disc.mp4")
    assert [when for when, _ in written] == pytest.approx([n / float(RATE) for n in range(FRAMES)], abs=1e-3)
    with av.open(str(Path(config.out) / "a disc.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", RATE)
        assert float(stream.duration * stream.time_base) == pytest.approx(FRAMES / RATE, abs=0.01)
    for (_, drawn), (_, original) in zip(written, frames_of(video), strict=True):
        assert drawn.shape == original.shape
        assert (np.abs(drawn.astype(int) - original) > 60).any()  # boxes
    lines = lines_of(config)
    assert len(lines) == found
    assert {line["frame"] for line in lines} == set(range(FRAMES))
    assert lines[-1]["time"] == pytest.approx((FRAMES - 1) / float(RATE), abs=1e-3)


@pytest.mark.parametrize("every", [3, 20])
def test_every_nth_frame_is_looked_at_and_all_are_written(config, video, every):
    predict.main(replace(config, source=(str(video),), every=every, batch_size=2))
    assert {line["frame"] for line in lines_of(config)} == set(range(0, FRAMES, every))
    assert len(frames_of(Path(config.out) / "a disc.mp4")) == FRAMES


def test_batches_change_nothing(config, video):
    found = []
    for batch_size in (1, 5):
        predict.main(replace(config, source=(str(video),), write=("jsonl",), batch_size=batch_size))
        found.append(sorted((line["frame"], line["class"], *line["box"]) for line in lines_of(config)))
    for one, other in zip(*found, strict=True):
        assert one[:2] == other[:2]
        assert one[2:] == pytest.approx(other[2:], abs=0.05)


class Counting(TorchNetwork):
    """Remembers how many images it was given at once."""

    def __call__(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        self.counts = [*getattr(self, "counts", ()), len(images)]
        return super().__call__(images)


def test_batches_are_as_large_as_asked_for(weights, video, tmp_path):
    checkpoint = load_checkpoint(weights)
    write_image(tmp_path / "large.png", drawn_frame(0, (90, 160)))
    for source, look, counts in (
        (video, Look(4), [4] * 5 + [3]),
        (video, Look(4, every=3), [4, 4]),
        (video, Look(16, every=4), [6]),
        (video, Look(every=3), [4, 4]),
        (video, Look(every=20), [1, 1]),
        (tmp_path / "large.png", Look(5, tile=50), [5, 3]),  # 2 rows of 4
        (tmp_path / "large.png", Look(tile=50), [4, 4]),
        (tmp_path / "large.png", Look(tile=1000), [1]),
    ):
        network = Counting(checkpoint.build_model(weights), checkpoint.spec, torch.device("cpu"))
        pipeline = Pipeline(Detector(network, checkpoint.spec), open_sources(str(source), 0), look)
        assert [frame.number for frame, _, _ in pipeline] == list(range(FRAMES if source == video else 1))
        assert network.counts == counts, look
    with pytest.raises(UserError, match="batch_size is 16, but must be at most 6 with every 10"):
        Look(16, every=10)


def test_compiling_changes_nothing(weights):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    plain, compiled = (Detector.load(weights, compiled=compiled).network for compiled in (False, True))
    for part in (images, images[:1]):
        for one, other in zip(plain.to_boxes(plain(part)), compiled.to_boxes(compiled(part)), strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    if torch.backends.mkldnn.is_available():
        assert (
            counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] == 21
        )  # all convolutions' weights are constants


def test_label_files_are_read_back(config, devkit, tmp_path):
    source = str(devkit / "Demo" / "JPEGImages" / "test_000*.jpg")
    predict.main(replace(config, source=(source,), write=("voc", "yolo", "coco", "csv", "jsonl", "heatmap", "counts")))
    out, lines = Path(config.out), lines_of(config)
    boxes: dict[str, list[list[float]]] = {}
    for line in lines:
        boxes.setdefault(Path(line["image"]).stem, []).append(line["box"])
    coco = COCO(str(out / "coco" / "annotations.json"))
    assert len(coco.anns) == len(lines)
    names = (out / "yolo" / "classes.txt").read_text().split()
    for image in coco.imgs.values():
        stem = Path(image["file_name"]).stem
        _, objects = read_voc_xml(out / "voc" / "Annotations" / f"{stem}.xml")
        pairs = [(item.box, boxes[stem][number - 1]) for number, item in objects.items()]
        np.testing.assert_allclose(*zip(*pairs, strict=True), atol=0.01)
        yolo = [line.split() for line in (out / "yolo" / "labels" / f"{stem}.txt").read_text().splitlines()]
        assert {names[int(row[0])] for row in yolo} <= {"disc", "square"}
        centre = [float(row[1]) * image["width"] for row in yolo]
        assert centre == pytest.approx([(box[0] + box[2]) / 2 for box in boxes[stem]], abs=0.1)
        ours = [item["bbox"] for item in coco.imgToAnns[image["id"]]]
        np.testing.assert_allclose(np.array(ours)[:, :2], np.array(boxes[stem])[:, :2])
    assert len((out / "detections.csv").read_text().splitlines()) == len(lines) + 1
    assert list(out.glob("heat_*.jpg"))
    assert "roboflow" not in (out / "voc" / "Annotations" / "test_0000.xml").read_text()  # who has no part in it


def test_files_of_one_name_keep_their_labels(config, tmp_path):
    names = ["1/a.jpg", "1/a.png", "2/A.jpg", "2/a_2.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_image(tmp_path / name, drawn_frame(0))
    source = tuple(str(tmp_path / name) for name in names)
    predict.main(replace(config, source=source, write=("voc", "yolo", "coco", "pictures", "crops")))
    out = Path(config.out)
    for folder, suffix in (("voc/Annotations", "xml"), ("yolo/labels", "txt")):
        assert {path.name for path in (out / folder).iterdir()} == {
            f"{s}.{suffix}" for s in ("a", "a_2", "A_3", "a_2_2")
        }
    assert {path.name for path in (out / "voc" / "JPEGImages").iterdir()} == {"a_2.png", "A_3.jpg", "a_2_2.jpg"}
    assert len([path for path in out.iterdir() if path.is_file()]) == 4


def test_labels_of_a_video_have_their_frames(config, video):
    predict.main(replace(config, source=(str(video),), write=("voc",), every=10))
    folder = Path(config.out) / "voc"
    assert [path.name for path in sorted((folder / "JPEGImages").iterdir())] == [
        f"a disc_{number:06d}.jpg" for number in range(0, FRAMES, 10)
    ]
    assert len(list((folder / "Annotations").iterdir())) == 3


def test_frames_that_were_not_looked_at_are_said(config, video, capsys):
    predict.main(replace(config, source=(str(video),), write=("jsonl",), every=10))
    assert f"objects in {FRAMES} image(s), of which 3 were looked at;" in capsys.readouterr().out
    predict.main(replace(config, source=(str(video),), write=("jsonl",)))
    assert f"objects in {FRAMES} image(s); the results" in capsys.readouterr().out


def test_tracks_last(config, video):
    config = replace(
        config, source=(str(video),), track=True, only=("disc",), nms_iou=0.01, write=("jsonl", "pictures")
    )
    predict.main(config)
    tracks = [line["track"] for line in lines_of(config) if "track" in line]
    assert len(tracks) > 3 * len(set(tracks))  # the network is untrained, and its boxes stand still


def test_pictures_show_tracks():
    image, box = drawn_frame(0, (200, 200)), np.array([[20.0, 60, 180, 180]])
    pictures = []
    for track in (None, -1, 7, 8):
        tracker_id = None if track is None else np.array([track])
        found = sv.Detections(box, confidence=np.array([0.5]), class_id=np.array([0]), tracker_id=tracker_id)
        pictures.append(draw_detections(image, found, ("disc",)))
    assert (pictures[0] == pictures[1]).all()  # -1: not followed yet
    assert (pictures[1] != pictures[2]).any() and (pictures[2] != pictures[3]).any()


def test_tiles_and_mirror_images_are_candidates(config, tmp_path):
    image = tmp_path / "large.png"
    write_image(image, np.hstack([drawn_frame(n, (300, 400)) for n in range(3)]))
    for changes in ({"tile": 200}, {"flip": True}, {"agnostic": True}):
        assert predict.main(replace(config, source=(str(image),), write=("jsonl",), **changes)) > 0
    mirrored = tmp_path / "mirrored.png"
    write_image(mirrored, read_image(image)[:, ::-1])
    found = []
    for path in (image, mirrored):
        predict.main(replace(config, source=(str(path),), write=("jsonl",), flip=True))
        found.append([line["box"] for line in lines_of(config)])
    turned = sorted([1200 - right, top, 1200 - left, bottom] for left, top, right, bottom in found[0])
    np.testing.assert_allclose(turned, sorted(found[1]), atol=0.1)


def test_classes_can_be_chosen(config, video, expect_failure):
    config = replace(config, source=(str(video),), write=("jsonl",))
    predict.main(replace(config, only=("square",)))
    assert {line["class"] for line in lines_of(config)} == {"square"}
    predict.main(replace(config, class_confidence={"square": 1.0}))
    assert {line["class"] for line in lines_of(config)} == {"disc"}
    arguments = [video, "--weights", config.weights, "--out", config.out]
    expect_failure(predict, [*arguments, "--only", "cat"], "'cat'", "disc, square")
    expect_failure(predict, [*arguments, "--write", "pdf"], "pdf", "pictures")


def test_lists_and_stdin(config, video, tmp_path, monkeypatch):
    write_image(tmp_path / "ä b.png", drawn_frame(0))
    (tmp_path / "list.txt").write_text(f"\ufeff{tmp_path / 'ä b.png'}\r\n\r\n{video}\r\n", encoding="utf-8")
    config = replace(config, write=("jsonl",))
    for source, content in (
        (str(tmp_path / "list.txt"), b""),
        ("-", f"{tmp_path / 'ä b.png'}\n{video}".encode()),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        predict.main(replace(config, source=(source,)))
        assert {line["image"] for line in lines_of(config)} == {str(tmp_path / "ä b.png"), str(video)}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(encode_image(drawn_frame(0), ".png"))))
    predict.main(replace(config, source=("-",), write=("jsonl", "pictures")))
    assert {line["image"] for line in lines_of(config)} == {"stdin.png"}
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="names nothing"):
        open_sources(str(tmp_path / "empty.txt"), 0)
    (tmp_path / "wrong.txt").write_text("no.jpg\n")
    with pytest.raises(UserError, match=r"wrong\.txt: there is no .*'no\.jpg'.*seen from /"):
        open_sources(str(tmp_path / "wrong.txt"), 0)


def test_broken_videos(config, video, tmp_path, expect_failure, capsys):
    start = video.read_bytes().index(b"mdat") + video.stat().st_size // 3
    for length, words in ((400, r"1 frames of \S+damaged.mp4 are damaged"), (1500, r"broken parts of \S+damaged.mp4")):
        content = bytearray(video.read_bytes())
        content[start : start + length] = np.random.default_rng(0).bytes(length)
        (tmp_path / "damaged.mp4").write_bytes(content)
        predict.main(replace(config, source=(str(tmp_path / "damaged.mp4"),)))
        assert re.search(words, capsys.readouterr().err)
        frames = frames_of(Path(config.out) / "damaged.mp4")
        assert len(frames) > 2  # and no black ones in between
        assert all(image.mean() > 40 for _, image in frames)
    long = write_video(tmp_path / "long.mkv", 100).read_bytes()
    (tmp_path / "half.mkv").write_bytes(long[: len(long) // 2])  # which FFmpeg reads without a word
    predict.main(replace(config, source=(str(tmp_path / "half.mkv"), str(tmp_path / "long.mkv")), write=("jsonl",)))
    errors = capsys.readouterr().err
    assert re.search(r"1 problem: the pictures of \S+half.mkv end after \d\.\d of 8\.0 s; it may be cut off", errors)
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:100])
    arguments = ["--weights", config.weights, "--out", config.out]
    write_image(tmp_path / "good.png", drawn_frame(0))
    expect_failure(predict, [tmp_path / "text.mp4", tmp_path / "good.png", *arguments], "text.mp4: Invalid data")
    assert (Path(config.out) / "good.png").exists()  # one source's failure takes nothing from the others
    expect_failure(predict, [tmp_path / "cut.mp4", *arguments], "cut.mp4 has no video in it")
    expect_failure(predict, ["7", *arguments], "camera 7")
    expect_failure(predict, [video, "--weights", config.weights, "--out", video.parent], "replace their inputs")
    (tmp_path / "taken" / video.name).mkdir(parents=True)
    expect_failure(predict, [video, "--weights", config.weights, "--out", tmp_path / "taken"], "cannot write the video")


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_a_rotated_video_comes_out_upright(config, video, tmp_path, matrix, turns):
    """As telephones write them: QuickTime's matrix in the track header says how to turn the pictures."""
    content = bytearray(video.read_bytes())
    start = content.index(b"tkhd") + 44
    a, b, c, d = (number << 16 for number in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "phone.mov").write_bytes(content)
    predict.main(replace(config, source=(str(tmp_path / "phone.mov"),), confidence=1.0))
    written, stored = frames_of(Path(config.out) / "phone.mp4"), frames_of(video)
    assert len(written) == FRAMES
    upright = np.rot90(stored[0][1], turns).astype(int)
    assert np.abs(written[0][1] - upright).mean() < 5


def test_an_animated_gif_is_a_video(config, tmp_path):
    pictures = [Image.fromarray(drawn_frame(number)) for number in range(7)]
    pictures[0].save(tmp_path / "disc.gif", save_all=True, append_images=pictures[1:], duration=80)
    predict.main(replace(config, source=(str(tmp_path / "disc.gif"),)))
    assert {line["frame"] for line in lines_of(config)} == set(range(7))
    times = [when for when, _ in frames_of(Path(config.out) / "disc.mp4")]
    assert times == pytest.approx([number * 0.08 for number in range(7)], abs=1e-3)


def test_the_progress_bar_shows_rate_and_time_left(config, video):
    termios = pytest.importorskip("termios", reason="terminals of POSIX")
    long = write_video(Path(config.weights).parent / "long.mp4", 400)
    arguments = [long, "--weights", config.weights, "--out", config.out, "--device", "cpu"]
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (25, 120))
    process = subprocess.Popen(
        [sys.executable, "predict.py", *map(str, arguments)], cwd=ROOT, stderr=theirs, stdout=subprocess.DEVNULL
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # of a terminal whose other side is closed
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait() == 0, shown
    assert re.search(rb"predicting: +\d+%.* [1-9]\d*/400 \[\d+:\d+<\d+:\d+, +\d+\.\d+ images/s\]", shown), shown


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(("write", "name"), [("pictures", "a disc.mp4"), ("jsonl", "detections.jsonl")])
def test_a_full_disk_is_said(config, video, expect_failure, write, name):
    Path(config.out).mkdir()
    (Path(config.out) / name).symlink_to("/dev/full")
    arguments = [video, "--weights", config.weights, "--out", config.out, "--confidence", 0.1, "--write", write]
    expect_failure(predict, arguments, "cannot write", config.out, "No space left on device")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["good.png", "--weights", "a.onnx", "--compile", "on"], ["a.onnx", "leave out --compile on"]),
        (["missing.jpg"], ["no image, video, folder or match 'missing.jpg'"]),
        ([""], ["no image, video, folder or match ''"]),
        (["a" * 300], ["cannot read aaa", "File name too long"]),
        (["99999999999"], ["match '99999999999'"]),
        (["empty"], ["empty has no image and no video"]),
        (["broken"], ["broken/a.jpg is not an image", "(and 1 more like this)"]),
        (["good.png", "--write"], ["write is empty"]),
        (["good.png", "--confidence", "2"], ["confidence is 2"]),
        (["good.png", "--class-confidence", "cat", "0.5"], ["no class 'cat'"]),
        (["good.png", "--out", "good.png"], ["cannot write to good.png"]),
        (["good.png", "--weights", "weights.pth"], ["weights.pth is no checkpoint"]),
        (["good.png", "--weights", "empty"], ["empty is a folder without a checkpoint"]),
        (["good.png", "--weights", "none.onnx"], ["there is no network none.onnx"]),
    ],
)
def test_mistakes(weights, tmp_path, monkeypatch, expect_failure, arguments, words):
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    for name in ("broken/a.jpg", "broken/b.png", "weights.pth"):
        (tmp_path / name).write_text("hello")
    write_image(tmp_path / "good.png", drawn_frame(0))
    monkeypatch.chdir(tmp_path)
    given = [*arguments, *([] if "--weights" in arguments else ["--weights", weights]), "--device", "cpu"]
    expect_failure(predict, given, *words)


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_images_of_odd_shapes(config, tmp_path, size):
    write_image(tmp_path / "写真 #1?.png", np.zeros((*size, 3), np.uint8))
    written = ("pictures", "jsonl", "csv", "voc", "yolo", "coco", "crops", "counts", "heatmap")
    assert predict.main(replace(config, source=(str(tmp_path / "写真 #1?.png"),), write=written)) > 0
    assert read_image(Path(config.out) / "写真 #1?.png").shape == (*size, 3)
    for line in lines_of(config):
        assert 0 <= line["box"][0] <= line["box"][2] <= size[1] and 0 <= line["box"][1] <= line["box"][3] <= size[0]


def test_a_change_of_size_ends_the_video(config, tmp_path, expect_failure):
    parts = [write_video(tmp_path / f"{side}.ts", 7, (64, side)).read_bytes() for side in (96, 128)]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    arguments = [tmp_path / "both.ts", "--weights", config.weights, "--out", config.out]
    expect_failure(predict, arguments, "changes its size at frame 7, from 96x64 to 128x64")
    assert len(frames_of(Path(config.out) / "both.mp4")) == 7  # the last batch is not full


class Server(BaseHTTPRequestHandler):
    """A camera that sends a few JPEGs and hangs up; the third time it refuses."""

    visits: ClassVar[list[float]] = []  # their times

    def do_GET(self) -> None:
        self.visits.append(time.monotonic())
        if len(self.visits) > 2:
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for number in range(5):
            picture = encode_image(drawn_frame(number), ".jpg")
            self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(picture))
            self.wfile.write(picture + b"\r\n")
            time.sleep(0.1)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    Server.visits.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/camera"
    server.shutdown()
    server.server_close()


def test_a_stream_that_goes_away_is_opened_again_and_then_given_up(config, address):
    """And its password is nowhere."""
    secret = address.replace("://", "://admin:geh%23im@") + "?token=geheim"
    arguments = [secret, "--weights", config.weights, "--out", config.out, "--patience", 2, "--confidence", 0.1]
    result = run("predict.py", *arguments, "--device", "cpu")
    assert result.returncode == 2
    assert re.search(r"error: \S+ went away after \d+ frames and did not come back in 2 s", result.stderr), (
        result.stderr
    )
    assert len(Server.visits) > 3
    assert 1 < Server.visits[-1] - Server.visits[0] < 20
    frames = frames_of(Path(config.out) / "camera.mp4")
    dropped = sum(map(int, re.findall(r"(\d+) frames of \S+ were dropped", result.stderr)))
    assert 8 <= len(frames) + dropped <= 10  # of two visits; the last picture of each may hang in the connection
    assert frames[-1][0] - frames[0][0] > 0.5  # of both
    assert all(image.mean() > 40 for _, image in frames)
    written = [path.read_bytes() for path in Path(config.out).iterdir()]
    assert address.encode() in written[0] + written[1]
    for content in (*written, result.stderr.encode(), result.stdout.encode(), *os.listdir(config.out)):
        assert not [word for word in ("geh", "token") if word in str(content)]


def test_a_stream_that_was_never_there_is_a_mistake(capfd):
    with pytest.raises(UserError, match="cannot read the video"):
        next(Stream("http://127.0.0.1:9/none", patience=60).frames([], threading.Event()))
    with pytest.raises(UserError, match="there is no camera 9"):
        next(Camera(9, patience=60).frames([], threading.Event()))
    assert not capfd.readouterr().err  # OpenCV's own lines about it


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_leaves_a_whole_video(config, tmp_path):
    long = write_video(tmp_path / "long.mp4", 3000)
    arguments = [long, "--weights", config.weights, "--out", config.out, "--confidence", "0.1", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "predict.py", *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    lines = Path(config.out) / "detections.jsonl"
    while not (lines.exists() and lines.stat().st_size > 20_000):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "stopped by SIGINT" in errors and "Traceback" not in errors
    assert 5 < len(frames_of(Path(config.out) / "long.mp4")) < 3000


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_is_no_bug(config, video, unbuffered):
    arguments = ["--weights", config.weights, "--out", config.out, "--device", "cpu", "--write", "counts", "jsonl"]
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "predict.py", video, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, "stopped, since what reads the output has closed it\n")


def test_stopping_does_not_wait_for_a_stream(address):
    """Which is being opened again and again, and has its own times."""
    stop, started = threading.Event(), time.monotonic()
    threading.Timer(3, stop.set).start()
    frames = list(ahead(Stream(address, patience=1000).frames([], stop), 2))
    assert time.monotonic() - started < 20
    assert [frame.number for frame in frames] == list(range(len(frames)))
    assert len(frames) >= 8
    assert sorted(frame.time for frame in frames) == [frame.time for frame in frames]


def test_a_live_view_shows_the_newest_frame(weights, monkeypatch):
    """However slow the network is; the times stay those of the camera."""
    delay, frames = 0.15, 60

    class Endless(Camera):
        def read(self) -> Iterator[Frame]:
            for number in range(frames):
                time.sleep(0.02)
                yield Frame(Path("x.jpg"), drawn_frame(number), Video("camera 0", RATE), number, time.monotonic())

    detector = Detector.load(weights)
    detect_batch = detector.detect_batch
    monkeypatch.setattr(detector, "detect_batch", lambda batch: time.sleep(delay) or detect_batch(batch))
    for every in (1, 3):
        pipeline = Pipeline(detector, [Endless(0, 0)], Look(every=every))
        seen = [(frame.number, frame.time, time.monotonic() - frame.time) for frame, _, _ in pipeline]
        numbers, times, late = zip(*seen, strict=True)
        assert list(numbers) == list(range(len(seen)))
        assert list(times) == sorted(times) and times[-1] - times[0] > 0.7 * frames * 0.02
        assert max(late[2:]) < 4 * delay  # the first ones meet a network that warms up
        assert pipeline.problems == [
            f"{frames - len(seen)} frames of camera 0 were dropped, since the network was busy"
        ]


def test_newest_raises_behind_the_last_and_closes():
    closed, dropped = [], []

    def items(error: bool) -> Iterator[int]:
        try:
            yield from range(100)
            if error:
                raise ValueError("behind the last")
        finally:
            closed.append(True)

    taken = []
    with pytest.raises(ValueError, match="behind the last"):
        for item in newest(items(True), lambda: dropped.append(True)):
            taken.append(item)
            time.sleep(0.01)
    assert taken[-1] == 99 and len(taken) + len(dropped) == 100 and dropped
    iterator = newest(items(False), lambda: None)
    next(iterator)
    iterator.close()
    assert closed == [True, True]


@pytest.mark.parametrize("password", ["secret", "sec/ret", "sec?ret", "sec#ret", "sec@ret", "[sec:ret"])
def test_addresses_do_not_show_passwords(password, capfd):
    assert public(f"rtsp://admin:{password}@10.0.0.1:554/live?token=a") == "rtsp://10.0.0.1:554/live"
    for scheme in ("rtsp", "http", "gopher"):
        with pytest.raises(UserError, match=f"{scheme}://127.0.0.1:9/live") as error:
            open_video(f"{scheme}://admin:{password}@127.0.0.1:9/live")
        for words in (str(error.value), *capfd.readouterr()):
            assert "sec" not in words and "ret" not in words


def test_paths_and_addresses_without_passwords_stay():
    assert public("a:b@c.mp4") == "a:b@c.mp4"
    assert public("http://[::1]:80/a/b.jpg") == "http://[::1]:80/a/b.jpg"


@pytest.mark.skipif(os.name == "nt", reason="named pipes of POSIX")
def test_what_may_have_no_end_is_refused(config, tmp_path):
    write_image(tmp_path / "good.png", drawn_frame(0))
    for name in ("pipe.mp4", "pipe.png", "pipe.txt", "pipe"):
        os.mkfifo(tmp_path / name)
        for source in (str(tmp_path / name), f"file://{tmp_path / name}"):
            with pytest.raises(UserError, match="is a pipe or a device"):
                open_sources(source, 0)
    with pytest.raises(UserError, match="is a pipe or a device"):
        open_sources("/dev/zero", 0)
    (tmp_path / "list.txt").write_text(str(tmp_path / "pipe.png"))
    with pytest.raises(UserError, match="is a pipe or a device"):
        open_sources(str(tmp_path / "list.txt"), 0)
    assert inputs(open_sources(str(tmp_path), 0)) == [tmp_path / "good.png"]


def test_the_benchmark_prints_a_row_per_batch_size(config, video, capsys):
    predict.main(replace(config, source=(str(video),), benchmark=(1, 3)))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["1", "3"]
    for size, median, slow, whole, slow_whole, rate in (map(float, row) for row in rows):
        assert 0 < median <= slow and 0 < whole <= slow_whole
        assert rate == pytest.approx(1000 * size / whole, rel=0.01)
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["network", "--rounds", 1, "--no-compile"], {"torch fp32"}),
        (["folder", "--rounds", 1], {"ratio", "decoding", "network", "whole", "images"}),
        (["video", "--frames", 3], {"share", "frames", "seconds"}),
        (["memory", "--frames", 700], {"mb_per_10000_frames", "mb"}),
    ],
)
def test_benchmarks_of_prediction(arguments, expected, weights, devkit, tmp_path, monkeypatch, capsys):
    if arguments[0] == "folder":
        arguments = [*arguments, "--source", devkit / "Demo" / "JPEGImages" / "test_*.jpg"]
    if arguments[0] == "memory" and sys.platform != "linux":
        pytest.skip("memory is read from /proc")
    arguments = [*arguments, "--weights", weights, "--device", "cpu", "--json", tmp_path / "figures"]
    monkeypatch.setattr(sys, "argv", ["benchmark_predict.py", *map(str, arguments)])
    run_script(benchmark_predict.main, benchmark_predict.Config)
    figures = json.loads((tmp_path / "figures").read_text())
    assert json.loads(capsys.readouterr().out) == figures
    assert expected <= figures.keys()
    if arguments[0] == "video":
        assert figures["frames"] == 3 and 0 < figures["share"] < 1
    if arguments[0] == "folder":
        assert figures["images"] == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["network", "--rounds", 0], ["rounds is 0"]),
        (["network", "--batch-size", 0], ["batch_size is 0"]),
        (["network", "--no-compile", "--exported", "a.safetensors"], ["a.safetensors is not among", "--weights"]),
        (["network", "--no-compile", "--exported", "none.onnx"], ["there is no network none.onnx"]),
        (["network", "--weights", "none.onnx"], ["none.onnx is no checkpoint", "--exported"]),
        (["memory", "--frames", 0], ["frames is 0"]),
        (["video", "--precision", "fp16", "--device", "cpu"], ["fp16 needs a GPU"]),
    ],
)
def test_mistakes_in_benchmarks_of_prediction(arguments, words, weights, expect_failure):
    given = [] if "--weights" in arguments else ["--weights", weights]
    expect_failure(benchmark_predict, [*arguments, *given], *words)


def test_ahead_keeps_order_and_raises_in_turn():
    closed = []

    def items() -> Iterator[int]:
        try:
            yield from range(5)
            raise ValueError("behind the fifth")
        finally:
            closed.append(True)

    taken = []
    with pytest.raises(ValueError, match="behind the fifth"):
        taken.extend(ahead(items(), 3))
    assert taken == list(range(5)) and closed == [True]
    started = []
    iterator = ahead((started.append(n) or n for n in range(100)), 3)
    assert next(iterator) == 0
    iterator.close()
    assert len(started) <= 5  # and no more than it may be ahead
    assert list(prefetch_map(lambda n: n * n, range(20), 3)) == [n * n for n in range(20)]


def test_the_example_of_the_readme(weights, devkit):
    code = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 10
    code = code.replace("logs/demo/best.safetensors", weights.as_posix()).replace("confidence=0.4", "confidence=0.1")
    code = code.replace("VOCdevkit/", f"{devkit.as_posix()}/")
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] in ("disc", "square")
