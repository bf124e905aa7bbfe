"""A generated video, an untrained checkpoint and settings for predict.py, for the tests of inference and scripts."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import predict
from nets.spec import ModelSpec
from nets.yolo import build_model
from tests.conftest import ANCHORS
from utils.inference.video import VideoWriter
from utils.weights.checkpoint import Checkpoint, save_checkpoint

RATE, FRAMES, SIZE = Fraction(25, 2), 23, (71, 110)  # of the video: odd sides and an odd rate


def draw_frame(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A disc that moves to the right over noise."""
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    image = np.random.default_rng(0).integers(60, 90, (height, width, 3), dtype=np.uint8)
    image[(rows - height / 2) ** 2 + (columns - 20 - 2 * number) ** 2 < 150] = (240, 40, 40)
    return image


def write_video(path: Path, frames: int = FRAMES, size: tuple[int, int] = SIZE) -> Path:
    writer = VideoWriter(path, RATE, size)
    for number in range(frames):
        writer.write(draw_frame(number, size), number / float(RATE))
    writer.close()
    return path


def read_video(path: Path) -> list[tuple[float, np.ndarray]]:
    """The times and images of all frames."""
    with av.open(str(path)) as container:
        return [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def read_jsonl(config: predict.Config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.out) / "detections.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "a disc.mp4")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network, which detects something everywhere at a low confidence."""
    torch.manual_seed(0)
    spec = ModelSpec(("disc", "square"), ANCHORS, input_size=(64, 96))
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    save_checkpoint(path, Checkpoint(spec, build_model(spec).state_dict(), {"epoch": 1}, {}))
    return path


@pytest.fixture
def config(weights: Path, tmp_path: Path) -> predict.Config:
    settings = {"confidence": 0.1, "device": "cpu", "precision": "fp32", "out": str(tmp_path / "out")}
    return predict.Config((), weights=str(weights), **settings)
