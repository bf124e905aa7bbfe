"""Videos and cameras with broken parts, wrong headers and sudden ends."""

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

import predict
from tests.bad_inputs import ERROR, expect, random_weights, save_weights
from tests.conftest import Outcome


def write_video(path: Path, frames: int = 12, size: tuple[int, int] = (48, 64), broken: int = -1) -> Path:
    """An MJPEG video in which the frame number `broken` cannot be decoded."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", Fraction(10))
        stream.height, stream.width, stream.pix_fmt = *size, "yuvj420p"
        noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        pictures = [av.VideoFrame.from_ndarray(np.roll(noise, i, 1)) for i in range(frames)]
        packets = [packet for item in [*pictures, None] for packet in stream.encode(item)]
        if broken >= 0:
            packet = av.Packet(b"no picture" * 9)
            packet.stream, packet.pts, packet.dts = stream, packets[broken].pts, packets[broken].dts
            packet.time_base, packet.duration = packets[broken].time_base, packets[broken].duration
            packets[broken] = packet
        container.mux(packets)
    return path


def count_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.fixture
def predict_video(tmp_path, call_script) -> Callable[..., Outcome]:
    checkpoint = save_weights(tmp_path / "a.safetensors", random_weights())
    flags = ["--weights", checkpoint, "--out", tmp_path / "out", "--device", "cpu", "--reconnect-timeout", 0]
    return lambda *arguments: call_script(predict.main, predict.Config, *arguments, *flags)


def test_skips_broken_frames(tmp_path, capsys):
    weights = save_weights(tmp_path / "a.safetensors", random_weights())
    path = write_video(tmp_path / "a.avi", broken=5)
    predict.main(predict.Config((str(path),), weights=str(weights), out=str(tmp_path / "out"), device="cpu"))
    assert "1 corrupt packets of" in capsys.readouterr().err
    assert count_frames(tmp_path / "out" / "a.mp4") == 11


@pytest.mark.parametrize("frames", [0, 3, 2**32 - 1])
def test_ignores_wrong_frame_count_in_header(predict_video, tmp_path, frames):
    content = write_video(tmp_path / "a.avi").read_bytes()
    for place in (content.index(b"avih") + 24, content.index(b"strh") + 40):
        content = content[:place] + struct.pack("<I", frames) + content[place + 4 :]
    (tmp_path / "a.avi").write_bytes(content)
    assert predict_video(tmp_path / "a.avi").code == 0
    assert count_frames(tmp_path / "out" / "a.mp4") == 12


def test_stops_where_frame_size_changes(predict_video, tmp_path):
    parts = [write_video(tmp_path / f"{side}.mjpeg", 6, (48, side)).read_bytes() for side in (64, 96)]
    (tmp_path / "both.avi").write_bytes(b"".join(parts))
    expect(predict_video(tmp_path / "both.avi"), ERROR, ("both.avi changes from 64x48 to 96x48 at frame 6",))
    assert count_frames(tmp_path / "out" / "both.mp4") == 6


class UnpluggedCamera:
    """A camera that is unplugged after four frames."""

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


def test_reports_camera_that_does_not_come_back(predict_video, tmp_path, monkeypatch):
    monkeypatch.setattr("cv2.VideoCapture", UnpluggedCamera)
    expect(predict_video(7), ERROR, ("camera 7 ", " did not come back"))
    assert 1 <= count_frames(tmp_path / "out" / "camera 7.mp4") <= 4  # frames are dropped while the network is busy


def test_reports_video_that_cannot_be_written(predict_video, tmp_path):
    (tmp_path / "out" / "a.mp4").mkdir(parents=True)
    expect(predict_video(write_video(tmp_path / "a.avi")), ERROR, ("a.mp4", "cannot write"))
