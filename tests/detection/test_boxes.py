"""Transforms of boxes, and IoU worked out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.data.image_io import fit_image
from utils.detection.boxes import batched_iou, ciou
from utils.detection.letterbox import clip_boxes, fit_to_input

sides = st.integers(1, 3000)


@given(sides, sides, st.booleans(), st.integers(1, 20), st.integers(1, 20))
def test_to_original_inverts_to_input(height, width, letterbox, rows, columns):
    fit, inner = fit_to_input((height, width), (32 * rows, 32 * columns), letterbox)
    boxes = np.array([[0, 0, width, height], [width / 4, height / 3, width / 2, height]], np.float32)
    placed = fit.to_input(boxes)
    np.testing.assert_allclose(fit.to_original(placed), boxes, atol=1e-2, rtol=1e-5)
    assert placed.min() >= -1e-3
    assert placed[0, 2] <= 32 * columns + 1e-2
    assert placed[0, 3] <= 32 * rows + 1e-2
    np.testing.assert_allclose([placed[0, 3] - placed[0, 1], placed[0, 2] - placed[0, 0]], inner, rtol=1e-4)


def test_letterbox_keeps_the_aspect_ratio_and_centers():
    fit, inner = fit_to_input((200, 400), (416, 416), letterbox=True)
    assert inner == (208, 416)
    assert fit == pytest.approx((1.04, 1.04, 0, 104))
    picture, _ = fit_image(np.full((200, 400, 3), 7, np.uint8), (416, 416), letterbox=True)
    assert (picture[104:312] == 7).all()
    assert (picture[:104] == 114).all()
    assert (picture[312:] == 114).all()


def test_without_letterbox_each_axis_is_stretched():
    fit, inner = fit_to_input((200, 400), (416, 416), letterbox=False)
    assert inner == (416, 416)
    assert fit == pytest.approx((1.04, 2.08, 0, 0))


def test_iou_by_hand():
    boxes = torch.tensor([[[0.0, 0, 2, 2], [0, 0, 0, 0]]])
    others = torch.tensor([[[1.0, 0, 3, 2], [5, 5, 6, 6], [0, 0, 2, 2]]])
    expected = torch.tensor([[[2 / 6, 0, 1], [0, 0, 0]]])
    torch.testing.assert_close(batched_iou(boxes, others), expected)


def test_ciou_by_hand():
    # same shape, shifted by one: IoU 1/3, center distance 1, enclosing diagonal squared 9 + 4
    shifted = ciou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]]))
    torch.testing.assert_close(shifted, torch.tensor([1 / 3 - 1 / 13]))
    same = torch.tensor([[3.0, 4, 9, 20]])
    torch.testing.assert_close(ciou(same, same), torch.ones(1))


def test_boxes_are_clipped_to_the_image():
    clipped = clip_boxes(np.array([[-5, 2, 50, 70]], np.float32), (60, 40))
    np.testing.assert_array_equal(clipped, [[0, 2, 40, 60]])
