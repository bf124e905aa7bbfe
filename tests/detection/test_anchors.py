"""Decoding of heads, by hand and against Darknet's yolo layer, and anchor files."""

import numpy as np
import pytest
import torch

from nets.spec import ModelSpec
from tests.conftest import ANCHORS, REFERENCE, ROOT, needs_shared
from utils.detection.anchors import decode_heads, head_levels, load_anchors
from utils.system.errors import UserError


@pytest.mark.parametrize(("scale_xy", "left"), [(1.0, 0.731059), (1.05, 0.731059 * 1.05 - 0.025), (2.0, 0.962117)])
def test_decode_by_hand(scale_xy, left):
    spec = ModelSpec(("a", "b"), ANCHORS)
    heads = [torch.full((1, 21, size, size), -20.0) for size in (2, 4)]
    # second P5 anchor (135x169), cell x 1, y 0: tx 1, ty 0, tw log 2, th 0, objectness 0.5, class b 1.0
    heads[0].view(1, 3, 7, 2, 2)[0, 1, :, 0, 1] = torch.tensor([1.0, 0.0, np.log(2), 0.0, 0.0, -20.0, 20.0])
    boxes, scores = decode_heads(heads, head_levels(spec), scale_xy)
    assert boxes.shape == (1, 3 * (4 + 16), 4)
    best = scores[0, :, 1].argmax()
    assert best == 1 * 4 + 0 * 2 + 1  # anchor, row, column
    x, y = 32 * (1 + left), 32 * 0.5
    torch.testing.assert_close(boxes[0, best], torch.tensor([x - 135, y - 84.5, x + 135, y + 84.5]).float())
    torch.testing.assert_close(scores[0, best], torch.tensor([0.0, 0.5]), atol=1e-6, rtol=0)


@needs_shared
def test_decode_matches_darknet():
    arrays = np.load(REFERENCE / "darknet_voc20.npz")
    spec = ModelSpec(tuple(map(str, range(20))), ANCHORS, scale_xy=1.05)
    heads = [torch.from_numpy(arrays[f"head_{name}"]) for name in ("p5", "p4")]
    boxes, scores = decode_heads(heads, head_levels(spec), spec.scale_xy)
    # in Darknet's rows the anchor index varies fastest, in ours it varies slowest
    rows = [arrays[f"yolo_{name}"].reshape(size * size, 3, 25) for name, size in (("p5", 5), ("p4", 10))]
    theirs = torch.from_numpy(np.concatenate([row.transpose(1, 0, 2).reshape(-1, 25) for row in rows]))
    center, side = theirs[:, :2] * 160, theirs[:, 2:4] * 160
    torch.testing.assert_close(boxes[0], torch.cat([center - side / 2, center + side / 2], dim=1), atol=1e-2, rtol=1e-4)
    seen = theirs[:, 5:] > 0  # the layer sets scores below its threshold to 0
    assert seen.any()
    torch.testing.assert_close(scores[0][seen], theirs[:, 5:][seen], atol=1e-4, rtol=0)


def test_extreme_sizes_stay_finite():
    heads = [torch.full((1, 18, size, size), value) for size, value in ((1, 1e4), (2, -1e4))]
    boxes, _ = decode_heads(heads, head_levels(ModelSpec(("a",), ANCHORS)), 2.0)
    assert boxes.isfinite().all()
    assert (boxes[..., 2:] > boxes[..., :2]).all()


def test_load_anchors_reads_the_shipped_file():
    assert load_anchors(ROOT / "model_data" / "yolo_anchors.txt") == ANCHORS


@pytest.mark.parametrize("text", ["1,2,3", "a,b", "nan," + "1," * 11, "0," + "1," * 11, ""])
def test_load_anchors_rejects_an_invalid_file(tmp_path, text):
    path = tmp_path / "anchors.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=r"anchors\.txt"):
        load_anchors(path)
