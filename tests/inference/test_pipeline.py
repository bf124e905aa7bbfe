"""The pipeline: batches, frame stride, tiles, tracks and class filters."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import predict
from tests.inference.fixtures import FRAMES, draw_frame, read_jsonl, read_video
from utils.data.image_io import write_image
from utils.inference.backends import TorchNetwork
from utils.inference.detector import Detector
from utils.inference.pipeline import FrameOptions, Pipeline
from utils.inference.sources import open_sources
from utils.system.errors import UserError
from utils.weights.checkpoint import load_checkpoint


@pytest.mark.parametrize("stride", [3, 20])
def test_stride_skips_frames_but_pictures_have_all(config, video, stride):
    predict.main(replace(config, source=(str(video),), frame_stride=stride, batch_size=2))
    assert {line["frame"] for line in read_jsonl(config)} == set(range(0, FRAMES, stride))
    assert len(read_video(Path(config.out) / "a disc.mp4")) == FRAMES


def test_detections_do_not_depend_on_batch_size(config, video):
    found = []
    for batch_size in (1, 5):
        predict.main(replace(config, source=(str(video),), save=("jsonl",), batch_size=batch_size))
        found.append(sorted((line["frame"], line["class"], *line["box"]) for line in read_jsonl(config)))
    for one, other in zip(*found, strict=True):
        assert one[:2] == other[:2]
        assert one[2:] == pytest.approx(other[2:], abs=0.05)


class CountingNetwork(TorchNetwork):
    """Records the batch sizes."""

    def __call__(self, images: torch.Tensor) -> Sequence[torch.Tensor]:
        self.counts = [*getattr(self, "counts", ()), len(images)]
        return super().__call__(images)


def test_batches_have_the_requested_size(weights, video, tmp_path):
    checkpoint = load_checkpoint(weights)
    write_image(tmp_path / "large.png", draw_frame(0, (90, 160)))
    for source, options, counts in (
        (video, FrameOptions(4), [4] * 5 + [3]),
        (video, FrameOptions(4, frame_stride=3), [4, 4]),
        (video, FrameOptions(16, frame_stride=4), [6]),
        (video, FrameOptions(frame_stride=3), [4, 4]),
        (video, FrameOptions(frame_stride=20), [1, 1]),
        (tmp_path / "large.png", FrameOptions(5, tile=50), [5, 3]),  # 2 rows of 4
        (tmp_path / "large.png", FrameOptions(tile=50), [4, 4]),
        (tmp_path / "large.png", FrameOptions(tile=1000), [1]),
    ):
        network = CountingNetwork(checkpoint.build_model(weights), checkpoint.spec, torch.device("cpu"))
        pipeline = Pipeline(Detector(network, checkpoint.spec), open_sources(str(source), 0), options)
        assert [frame.number for frame, _, _ in pipeline] == list(range(FRAMES if source == video else 1))
        assert network.counts == counts, options
    with pytest.raises(UserError, match="batch_size is 16, but must be at most 6 with frame_stride 10"):
        FrameOptions(16, frame_stride=10)


def test_track_ids_persist(config, video):
    options = {"track": True, "class_filter": ("disc",), "nms_iou": 0.01, "save": ("jsonl", "pictures")}
    predict.main(replace(config, source=(str(video),), **options))
    tracks = [line["track"] for line in read_jsonl(config) if "track" in line]
    assert len(tracks) > 3 * len(set(tracks))  # the boxes of the untrained network hardly move


@pytest.mark.parametrize("changes", [{"tile": 200}, {"tta": True}, {"agnostic_nms": True}])
def test_options_keep_detecting(config, tmp_path, changes):
    image = tmp_path / "large.png"
    write_image(image, np.hstack([draw_frame(n, (300, 400)) for n in range(3)]))
    assert predict.main(replace(config, source=(str(image),), save=("jsonl",), **changes)) > 0


def test_tta_is_symmetric(config, tmp_path):
    image = np.hstack([draw_frame(n, (300, 400)) for n in range(3)])
    found = []
    for name, pixels in (("original.png", image), ("mirrored.png", image[:, ::-1])):
        write_image(tmp_path / name, pixels)
        predict.main(replace(config, source=(str(tmp_path / name),), save=("jsonl",), tta=True))
        found.append([line["box"] for line in read_jsonl(config)])
    turned = sorted([1200 - right, top, 1200 - left, bottom] for left, top, right, bottom in found[0])
    assert turned
    np.testing.assert_allclose(turned, sorted(found[1]), atol=0.1)


def test_selects_classes(config, video):
    config = replace(config, source=(str(video),), save=("jsonl",))
    predict.main(replace(config, class_filter=("square",)))
    assert {line["class"] for line in read_jsonl(config)} == {"square"}
    predict.main(replace(config, class_confidence={"square": 1.0}))
    assert {line["class"] for line in read_jsonl(config)} == {"disc"}
