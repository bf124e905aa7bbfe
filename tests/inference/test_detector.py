"""Detections in a cached dataset: the same as image by image, whatever the batches and processes."""

import numpy as np
import pytest
import torch

from tests.inference.fixtures import draw_frame
from utils.data.cache import ImageCache
from utils.detection.nms import EVALUATION_THRESHOLDS
from utils.inference.detector import Detector
from utils.system.distributed import ProcessGroup


@pytest.fixture
def detector(weights) -> Detector:
    return Detector.load(weights, thresholds=EVALUATION_THRESHOLDS)


def test_cached_detections_equal_those_of_single_images(detector):
    frames = [draw_frame(number, (71 + number, 110)) for number in range(5)]
    batch = detector.prepare(frames)
    blank = torch.empty(0)
    cache = ImageCache([], batch.images, blank, blank, list(batch.fits), list(batch.sizes), [], "ram")
    cached = detector.detect_cached(cache, batch_size=2)  # the last batch is smaller
    assert len(cached) == len(frames)
    for frame, found in zip(frames, cached, strict=True):
        alone = detector(frame)
        assert len(found) == len(alone) > 20
        assert found.confidence.min() > EVALUATION_THRESHOLDS.confidence  # no padding
        np.testing.assert_allclose(found.xyxy, alone.xyxy, atol=1e-2)
        np.testing.assert_allclose(found.confidence, alone.confidence, atol=1e-5)
        assert found.data["class_name"].tolist() == [detector.spec.class_names[label] for label in found.class_id]
        assert found.xyxy.max() <= 110
    idle = ProcessGroup(rank=3)  # no batch is left for it
    assert detector.detect_cached(cache, 2, idle) == []
