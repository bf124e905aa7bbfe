"""Prediction on images, videos and streams: what goes in, what comes out, and what ends early."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

import predict
from nets.yolo import ModelSpec
from tests.conftest import ANCHORS, ROOT, run
from tools import benchmark_predict
from utils.ahead import ahead, map_ahead
from utils.annotations import read_annotation
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.detector import Detector
from utils.errors import UserError, run_script
from utils.images import encode_image, read_image, write_image
from utils.sinks import VideoWriter
from utils.sources import Camera, Stream, open_sources, public

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
    save_checkpoint(path, Checkpoint(spec, spec.build().state_dict(), {"epoch": 1}, {}))
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


def test_compiling_changes_nothing(weights):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    plain, compiled = (Detector.load(weights, compiled=compiled).network for compiled in (False, True))
    for part in (images, images[:1]):
        for one, other in zip(plain.decode(plain(part)), compiled.decode(compiled(part)), strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


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
        _, objects = read_annotation(out / "voc" / "Annotations" / f"{stem}.xml")
        np.testing.assert_allclose([box for _, box, _ in objects], boxes[stem], atol=1)  # whole pixels in VOC
        yolo = [line.split() for line in (out / "yolo" / "labels" / f"{stem}.txt").read_text().splitlines()]
        assert {names[int(row[0])] for row in yolo} <= {"disc", "square"}
        centre = [float(row[1]) * image["width"] for row in yolo]
        assert centre == pytest.approx([(box[0] + box[2]) / 2 for box in boxes[stem]], abs=0.1)
        ours = [item["bbox"] for item in coco.imgToAnns[image["id"]]]
        np.testing.assert_allclose(np.array(ours)[:, :2], np.array(boxes[stem])[:, :2])
    assert len((out / "detections.csv").read_text().splitlines()) == len(lines) + 1
    assert list(out.glob("heat_*.jpg"))


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


def test_tracks_last(config, video):
    config = replace(
        config, source=(str(video),), track=True, only=("disc",), nms_iou=0.01, write=("jsonl", "pictures")
    )
    predict.main(config)
    tracks = [line["track"] for line in lines_of(config) if "track" in line]
    assert len(tracks) > 3 * len(set(tracks))  # the network is untrained, and its boxes stand still


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


def test_classes_can_be_chosen(config, video, expect_mistake):
    config = replace(config, source=(str(video),), write=("jsonl",))
    predict.main(replace(config, only=("square",)))
    assert {line["class"] for line in lines_of(config)} == {"square"}
    predict.main(replace(config, class_confidence={"square": 1.0}))
    assert {line["class"] for line in lines_of(config)} == {"disc"}
    arguments = [video, "--weights", config.weights, "--out", config.out]
    expect_mistake(predict, [*arguments, "--only", "cat"], "'cat'", "disc, square")
    expect_mistake(predict, [*arguments, "--write", "pdf"], "pdf", "pictures")


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


def test_broken_videos(config, video, tmp_path, expect_mistake, capsys):
    content = bytearray(video.read_bytes())
    start = content.index(b"mdat") + len(content) // 3
    content[start : start + 400] = np.random.default_rng(0).bytes(400)
    (tmp_path / "damaged.mp4").write_bytes(content)
    predict.main(replace(config, source=(str(tmp_path / "damaged.mp4"),)))
    assert len(frames_of(Path(config.out) / "damaged.mp4")) > 2  # and no black ones in between
    assert all(image.mean() > 40 for _, image in frames_of(Path(config.out) / "damaged.mp4"))
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:100])
    arguments = ["--weights", config.weights, "--out", config.out]
    write_image(tmp_path / "good.png", drawn_frame(0))
    expect_mistake(predict, [tmp_path / "text.mp4", tmp_path / "good.png", *arguments], "text.mp4")
    assert (Path(config.out) / "good.png").exists()  # one source's failure takes nothing from the others
    expect_mistake(predict, [tmp_path / "cut.mp4", *arguments], "cut.mp4")
    expect_mistake(predict, ["7", *arguments], "camera 7")
    expect_mistake(predict, [video, "--weights", config.weights, "--out", video.parent], "replace their inputs")
    (tmp_path / "taken" / video.name).mkdir(parents=True)
    expect_mistake(predict, [video, "--weights", config.weights, "--out", tmp_path / "taken"], "cannot write the video")


def test_a_change_of_size_ends_the_video(config, tmp_path, expect_mistake):
    parts = [write_video(tmp_path / f"{side}.ts", 7, (64, side)).read_bytes() for side in (96, 128)]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    arguments = [tmp_path / "both.ts", "--weights", config.weights, "--out", config.out]
    expect_mistake(predict, arguments, "changes its size at frame 7, from 96x64 to 128x64")
    assert len(frames_of(Path(config.out) / "both.mp4")) == 7  # the last batch is not full


class Server(BaseHTTPRequestHandler):
    """A camera that sends a few JPEGs and hangs up; the third time it refuses."""

    visits = 0

    def do_GET(self) -> None:
        type(self).visits += 1
        if self.visits > 2:
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for number in range(5):
            picture = encode_image(drawn_frame(number), ".jpg")
            self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(picture))
            self.wfile.write(picture + b"\r\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    Server.visits = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/camera"
    server.shutdown()
    server.server_close()


def test_a_stream_that_goes_away_is_opened_again_and_then_given_up(config, address, expect_mistake):
    arguments = [address, "--weights", config.weights, "--out", config.out, "--patience", 2, "--confidence", 0.1]
    started = time.monotonic()
    expect_mistake(predict, arguments, "went away after", "did not come back in 2 s")
    assert Server.visits > 3
    assert 2 < time.monotonic() - started < 20
    frames = frames_of(Path(config.out) / "camera.mp4")
    assert 8 <= len(frames) <= 10  # of two visits; the last picture of each may hang in the connection
    assert all(image.mean() > 40 for _, image in frames)


def test_a_stream_that_was_never_there_is_a_mistake():
    with pytest.raises(UserError, match="cannot read the video"):
        next(Stream("http://127.0.0.1:9/none", patience=60).frames([], threading.Event()))
    with pytest.raises(UserError, match="there is no camera 9"):
        next(Camera(9, patience=60).frames([], threading.Event()))


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


def test_stopping_does_not_wait_for_a_stream(address):
    """Which is being opened again and again, and has its own times."""
    stop, started = threading.Event(), time.monotonic()
    threading.Timer(3, stop.set).start()
    frames = list(ahead(Stream(address, patience=1000).frames([], stop), 2))
    assert time.monotonic() - started < 20
    assert [frame.number for frame in frames] == list(range(len(frames)))
    assert len(frames) >= 8
    assert sorted(frame.time for frame in frames) == [frame.time for frame in frames]


def test_addresses_do_not_show_passwords():
    assert public("rtsp://admin:secret@10.0.0.1:554/live?token=a") == "rtsp://10.0.0.1:554/live"
    assert public("a:b@c.mp4") == "a:b@c.mp4"


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
    assert list(map_ahead(lambda n: n * n, range(20), 3)) == [n * n for n in range(20)]


def test_the_example_of_the_readme(weights, devkit):
    code = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 10
    code = code.replace("logs/demo/best.safetensors", weights.as_posix()).replace("confidence=0.4", "confidence=0.1")
    code = code.replace("VOCdevkit/", f"{devkit.as_posix()}/")
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] in ("disc", "square")
