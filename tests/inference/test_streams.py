"""Cameras and streams: they reconnect, show the newest frame and never reveal passwords."""

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

import predict
from tests.inference.fixtures import RATE, draw_frame, read_video
from utils.data.image_io import encode_image
from utils.inference import streams
from utils.inference.detector import Detector
from utils.inference.pipeline import FrameOptions, Pipeline
from utils.inference.streams import Camera, Stream
from utils.inference.video import Frame, Video, hide_credentials, open_video
from utils.system.cli import run_script
from utils.system.errors import UserError
from utils.system.prefetch import prefetch

INTERVAL = 0.05  # seconds between the frames of the server


class Server(BaseHTTPRequestHandler):
    """A camera that sends five JPEGs and closes the connection; from the third request on it refuses."""

    requests: ClassVar[list[float]] = []  # their times
    refused: ClassVar[threading.Event] = threading.Event()

    def do_GET(self) -> None:
        self.requests.append(time.monotonic())
        if len(self.requests) > 2:
            self.refused.set()
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for number in range(5):
            picture = encode_image(draw_frame(number), ".jpg")
            self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(picture))
            self.wfile.write(picture + b"\r\n")
            time.sleep(INTERVAL)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(streams, "FIRST_WAIT", 0.2)
    Server.requests.clear()
    Server.refused.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/camera"
    server.shutdown()
    server.server_close()


def test_reconnects_then_gives_up_without_revealing_the_password(config, address, monkeypatch, capfd):
    secret = address.replace("://", "://admin:geh%23im@") + "?token=geheim"
    arguments = ["--weights", config.weights, "--out", config.out, "--reconnect-timeout", "1", "--confidence", "0.1"]
    monkeypatch.setattr(sys, "argv", ["predict.py", secret, *arguments, "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        run_script(predict.main, predict.Config)
    assert stop.value.code == 2
    output, errors = capfd.readouterr()
    assert re.search(r"error: \S+ was lost after \d+ frames and did not come back within 1 s", errors), errors
    assert len(Server.requests) > 3
    assert 0.5 < Server.requests[-1] - Server.requests[0] < 20
    frames = read_video(Path(config.out) / "camera.mp4")
    dropped = sum(map(int, re.findall(r"(\d+) frames of \S+ were dropped", errors)))
    assert 8 <= len(frames) + dropped <= 10  # of two connections; the last frame of each may be lost
    assert frames[-1][0] - frames[0][0] > 0.2 + 5 * INTERVAL  # frames of both connections
    assert all(image.mean() > 40 for _, image in frames)
    written = [path.read_bytes() for path in Path(config.out).iterdir()]
    assert address.encode() in written[0] + written[1]
    for content in (*written, errors, output, *os.listdir(config.out)):
        assert not [word for word in ("geh", "token") if word in str(content)]


def test_missing_stream_or_camera_fails_at_once(capfd):
    with pytest.raises(UserError, match="cannot read the video"):
        next(Stream("http://127.0.0.1:9/none", reconnect_timeout=60).frames([], threading.Event()))
    with pytest.raises(UserError, match="camera 9 does not exist"):
        next(Camera(9, reconnect_timeout=60).frames([], threading.Event()))
    assert not capfd.readouterr().err  # without OpenCV's own messages


def test_stopping_interrupts_reconnecting(address):
    started = time.monotonic()
    frames = list(prefetch(Stream(address, reconnect_timeout=1000).frames([], Server.refused), 2))
    assert time.monotonic() - started < 20
    assert [frame.number for frame in frames] == list(range(len(frames)))
    assert len(frames) >= 8
    assert sorted(frame.time for frame in frames) == [frame.time for frame in frames]


@pytest.mark.parametrize("stride", [1, 3])
def test_slow_network_gets_the_newest_frame(weights, monkeypatch, stride):
    delay, count, interval = 0.15, 50, 0.02

    class FakeCamera(Camera):
        def read(self) -> Iterator[Frame]:
            for number in range(count):
                time.sleep(interval)
                yield Frame(Path("x.jpg"), draw_frame(number), Video("camera 0", RATE), number, time.monotonic())

    detector = Detector.load(weights)
    detect_batch = detector.detect_batch
    monkeypatch.setattr(detector, "detect_batch", lambda batch: time.sleep(delay) or detect_batch(batch))
    pipeline = Pipeline(detector, [FakeCamera(0, 0)], FrameOptions(frame_stride=stride))
    seen = [(frame.number, frame.time, time.monotonic() - frame.time) for frame, _, _ in pipeline]
    numbers, times, delays = zip(*seen, strict=True)
    assert list(numbers) == list(range(len(seen)))
    assert list(times) == sorted(times) and times[-1] - times[0] > 0.7 * count * interval
    assert max(delays[2:]) < 4 * delay  # the network warms up in the first frames
    dropped = f"{count - len(seen)} frames of camera 0 were dropped because the network was busy"
    assert pipeline.read_errors == [dropped]


@pytest.mark.parametrize("password", ["secret", "sec/ret", "sec?ret", "sec#ret", "sec@ret", "[sec:ret"])
def test_messages_do_not_show_passwords(password, capfd):
    assert hide_credentials(f"rtsp://admin:{password}@10.0.0.1:554/live?token=a") == "rtsp://10.0.0.1:554/live"
    for scheme in ("rtsp", "http", "gopher"):
        with pytest.raises(UserError, match=f"{scheme}://127.0.0.1:9/live") as error:
            open_video(f"{scheme}://admin:{password}@127.0.0.1:9/live")
        for text in (str(error.value), *capfd.readouterr()):
            assert "sec" not in text and "ret" not in text


@pytest.mark.parametrize("name", ["a:b@c.mp4", "http://[::1]:80/a/b.jpg"])
def test_names_without_credentials_stay_unchanged(name):
    assert hide_credentials(name) == name
