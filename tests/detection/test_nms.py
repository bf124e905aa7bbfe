"""Selection and averaging of detections, by hand."""

from math import exp

import torch

from utils.detection.nms import VOTING_SIGMA, Thresholds, select_detections

BOXES = torch.tensor(
    [[[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]], [[0.0, 0, 10, 10], [1, 1, 5, 5], [0, 0, 9, 9]]]
)
SCORES = torch.tensor([[[0.6, 0.1], [0.9, 0.2], [0.3, 0.8]], [[0.0, 0.0], [0.0, 0.5], [0.0, 0.05]]])


def select(boxes, scores, confidence, limits=None):
    """The boxes (D, 4), scores (D,) and labels (D,) of each image, without padding."""
    padded = select_detections(boxes, scores, confidence, limits or Thresholds())
    found = [rows[rows[:, 5] >= 0] for rows in padded]
    for rows, own in zip(padded, found, strict=True):
        assert torch.equal(rows[: len(own)], own)
        assert (rows[len(own) :] == -1).all()
    return [(rows[:, :4], rows[:, 4], rows[:, 5].long()) for rows in found]


def test_classes_and_images_are_suppressed_separately():
    first, second = select(BOXES, SCORES, 0.15)
    kept = BOXES[0][[1, 2, 2, 1]].clone()  # the first box of class 0 overlaps the second
    share = 0.6 * exp(-((1 - 0.9) ** 2) / VOTING_SIGMA)  # its weight at an IoU of 0.9
    kept[0, 3] = (0.9 * 9 + share * 10) / (0.9 + share)
    torch.testing.assert_close(first[0], kept)
    torch.testing.assert_close(first[1], torch.tensor([0.9, 0.8, 0.3, 0.2]))
    assert first[2].tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(second[0], BOXES[1][[1]])
    assert second[2].tolist() == [1]


def test_averaged_box_does_not_depend_on_the_confidence():
    """Boxes scoring above 0.1 take part in the average whatever the threshold is; others stay unchanged."""
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 8, 10], [50, 50, 60, 60], [50, 50, 60, 58]]])
    scores = torch.tensor([[[0.8], [0.3], [0.09], [0.08], [0.07]]])
    for confidence in (0.001, 0.2, 0.5):
        ((found, *_),) = select(boxes, scores, confidence)
        share = 0.3 * exp(-((1 - 0.9) ** 2) / VOTING_SIGMA)
        torch.testing.assert_close(found[0], torch.tensor([0, 0, 10, (0.8 * 10 + share * 9) / (0.8 + share)]))
    ((found, *_),) = select(boxes, scores, 0.001)
    assert torch.equal(found[1:], boxes[0, 3:4])


def test_box_without_area_does_not_affect_others():
    boxes = torch.tensor([[[5.0, 5, 5, 5], [0, 0, 10, 10], [0, 0, 10, 9], [5, 5, 5, 5]]])
    ((found, *_),) = select(boxes, torch.tensor([[[0.9], [0.8], [0.3], [0.2]]]), 0.5)
    assert torch.equal(found[0], boxes[0, 0])
    torch.testing.assert_close(found[1, :3], boxes[0, 1, :3], atol=1e-3, rtol=0)
    assert 9 < found[1, 3] < 10


def test_top_k_and_max_detections_limit_the_result():
    first, second = select(BOXES, SCORES, 0.15, Thresholds(nms_iou=0.5, top_k=2, max_detections=1))
    assert first[1].tolist() == [SCORES[0, 1, 0].item()]
    assert len(second[1]) == 1
    first, _ = select(BOXES, SCORES, 0.0, Thresholds(nms_iou=1.0, top_k=2, max_detections=10))
    assert len(first[1]) == 2


def test_no_detection_gives_empty_results():
    for boxes, scores, labels in select(BOXES, SCORES, 0.95):
        assert boxes.shape == (0, 4)
        assert len(scores) == len(labels) == 0


def test_batch_equals_its_single_images():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(8, 300, 2, generator=generator) * 400
    boxes = torch.cat([corners, corners + 5 + 40 * torch.rand(8, 300, 2, generator=generator)], dim=-1)
    scores = torch.rand(8, 300, 20, generator=generator)
    together = select(boxes, scores, 0.3)
    for i, found in enumerate(together):
        (alone,) = select(boxes[i : i + 1], scores[i : i + 1], 0.3)
        for ours, theirs in zip(found, alone, strict=True):
            assert torch.equal(ours, theirs)


def test_class_agnostic_suppression_keeps_one_class_per_object():
    first, _ = select(BOXES, SCORES, 0.15, Thresholds(class_agnostic=True))
    torch.testing.assert_close(first[1], torch.tensor([0.9, 0.8]))
    assert first[2].tolist() == [0, 1]


def test_each_class_has_its_own_threshold():
    first, _ = select(BOXES, SCORES, torch.tensor([float("inf"), 0.15]))
    assert first[2].tolist() == [1, 1]
