"""Selection and averaging of detections, checked by hand and against processing one image and one box at a time."""

from math import exp, inf

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torchvision.ops import box_iou

from utils.detection import nms
from utils.detection.nms import MIN_CONFIDENCE, VOTING_SIGMA, Thresholds, select_detections

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


@pytest.mark.parametrize("limit", [1, 45, 10**6])
def test_result_does_not_depend_on_the_number_of_boxes_in_one_nms(limit, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(5, 10, 4, generator=generator) * torch.tensor([200, 200, 80, 80])
    boxes = torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:]], dim=-1)
    scores = torch.rand(5, 10, 2, generator=generator)
    expected = select_detections(boxes, scores, 0.2, Thresholds())
    calls, suppress = [], nms.suppress_overlaps
    monkeypatch.setattr(nms, "suppress_overlaps", lambda *given: calls.append(len(given[0])) or suppress(*given))
    monkeypatch.setattr(nms, "MAX_CANDIDATES", limit)
    torch.testing.assert_close(select_detections(boxes, scores, 0.2, Thresholds()), expected, atol=1e-4, rtol=0)
    assert len(calls) == {1: 5, 45: 3, 10**6: 1}[limit]  # 20 candidates per image at most
    assert max(calls) <= max(limit, 20)


def test_class_agnostic_suppression_keeps_one_class_per_object():
    first, _ = select(BOXES, SCORES, 0.15, Thresholds(class_agnostic=True))
    torch.testing.assert_close(first[1], torch.tensor([0.9, 0.8]))
    assert first[2].tolist() == [0, 1]


def test_each_class_has_its_own_threshold():
    first, _ = select(BOXES, SCORES, torch.tensor([float("inf"), 0.15]))
    assert first[2].tolist() == [1, 1]


def select_one_by_one(boxes: Tensor, scores: Tensor, confidence: Tensor, limits: Thresholds) -> list[list[float]]:
    """The detections in one image with boxes (N, 4) and scores (N, C), as rows of xyxy, score and label."""
    ious = box_iou(boxes.double(), boxes.double())
    order = scores.flatten().argsort(descending=True, stable=True)[: limits.top_k]
    order = [divmod(index, scores.shape[1]) for index in order.tolist()]
    voters = [(box, label) for box, label in order if scores[box, label] > MIN_CONFIDENCE]
    kept: list[tuple[int, int]] = []
    for box, label in order:
        rivals = [other for other, own in kept if own == label or limits.class_agnostic]
        if scores[box, label] > confidence[label] and not (ious[box, rivals] > limits.nms_iou).any():
            kept.append((box, label))
    rows = []
    for box, label in kept[: limits.max_detections]:
        near = [other for other, own in voters if own == label]
        weights = scores[near, label].double() * (-((1 - ious[box, near]) ** 2) / VOTING_SIGMA).exp()
        is_averaged = scores[box, label] > MIN_CONFIDENCE
        mean = weights @ boxes[near].double() / weights.sum() if is_averaged else boxes[box]
        rows.append([*mean.tolist(), scores[box, label].item(), label])
    return rows


@pytest.mark.parametrize("at_once", [0, 10**9], ids=["NMS per group", "one NMS"])
@pytest.mark.parametrize(
    ("offset", "growth", "limits"),
    [
        (0, 1, Thresholds()),
        (-250, 1, Thresholds(nms_iou=0.2, max_detections=7)),
        (-250, 1, Thresholds(class_agnostic=True, nms_iou=0.2)),
        (0, 1e6, Thresholds(top_k=40)),
    ],
    ids=["plain", "negative coordinates", "class-agnostic", "huge boxes"],
)
def test_batch_equals_one_by_one(at_once, offset, growth, limits, monkeypatch):
    """With NMS of all groups at once, as on a GPU, and group by group; includes few votes and equal scores."""
    monkeypatch.setattr(nms, "MAX_SINGLE_NMS", at_once)
    monkeypatch.setattr(nms, "MAX_PAIRS", 5000)  # averages a few images at a time
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(5, 60, 2, generator=generator) * 200 + offset
    sides = 20 + 80 * torch.rand(5, 60, 2, generator=generator)
    sides[:, ::7] *= growth
    boxes = torch.cat([corners, corners + sides], dim=-1)
    scores = torch.rand(5, 60, 3, generator=generator) ** 2
    scores[3] = 0
    scores[4] = (scores[4] * 10).round() / 10 * (torch.arange(60) < 5)[:, None]  # equal scores, few of them positive
    confidence = torch.tensor([0.05, 0.3, inf])
    for i, (own, own_scores, labels) in enumerate(select(boxes, scores, confidence, limits)):
        expected = torch.tensor(select_one_by_one(boxes[i], scores[i], confidence, limits)).view(-1, 6)
        assert torch.equal(own_scores, expected[:, 4])
        assert torch.equal(labels, expected[:, 5].long())
        torch.testing.assert_close(own, expected[:, :4], atol=1e-4, rtol=1e-6)


def test_boxes_of_different_classes_and_images_never_overlap():
    """Not even if they lie beyond opposite corners of the image, where torchvision's batched_nms lets them overlap."""
    boxes = torch.tensor([[[-99.0, -99, 1, 1], [0, 0, 100, 100]], [[-99, -99, 1, 1], [0, 0, 100, 100]]])
    scores = torch.tensor([[[0.9, 0.0], [0.0, 0.8]], [[0.9, 0.0], [0.0, 0.8]]])
    for found, _, _ in select(boxes, scores, 0.5):
        assert torch.equal(found, boxes[0])


def test_selection_waits_for_the_gpu_twice(monkeypatch):
    """On fake CUDA tensors, which raise if anything else needs their values on the host."""
    waits = []
    monkeypatch.setattr(FakeTensor, "tolist", lambda _: waits.append("counts") or [500, 40])
    monkeypatch.setattr(nms, "nms", lambda boxes, *_: waits.append("NMS") or torch.arange(70, device=boxes.device))
    with FakeTensorMode():
        boxes, scores = torch.empty(16, 300, 4, device="cuda"), torch.empty(16, 300, 20, device="cuda")
        for confidence in (0.001, torch.empty(20, device="cuda")):
            waits.clear()
            found = select_detections(boxes, scores, confidence, Thresholds())
            assert found.shape == (16, 300, 6)
            assert found.device.type == "cuda"
            assert waits == ["counts", "NMS"]
        with pytest.raises(DynamicOutputShapeException):
            scores.nonzero()
