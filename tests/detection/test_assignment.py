"""Target assignment against hand-worked examples."""

import torch

from utils.detection.anchors import Level
from utils.detection.assignment import assign_targets, match_anchors


def test_anchors_match_by_shape():
    levels = (Level(32, torch.tensor([[40.0, 40], [200, 200]])), Level(16, torch.tensor([[20.0, 40], [40, 40]])))
    boxes = torch.tensor([[[0.0, 0, 40, 40], [0, 0, 30, 40], [0, 0, 2, 2]]])
    coarse, fine = match_anchors(boxes, levels, 0.6)
    # 40x40 is in both heads; 30x40 has IoU 0.75 with 40x40 and 0.67 with 20x40; 2x2 matches the best, 4 / 800
    assert coarse[0].tolist() == [[True, False], [True, False], [False, False]]
    assert fine[0].tolist() == [[False, True], [True, True], [True, False]]


def test_object_is_assigned_to_its_cell_and_the_nearest_neighbors():
    level = Level(32, torch.tensor([[40.0, 40], [200, 200]]))
    boxes = torch.tensor([[[20.0, 68, 60, 108], [0, 0, 1, 1]]])  # center 40, 88: cell (1, 2), at (1.25, 2.75)
    labels, matches = torch.tensor([[0, -1]]), torch.tensor([[[True, False], [True, True]]])
    found = assign_targets(boxes, labels, matches, level, (4, 4))
    slots = found.mask[0].nonzero().flatten().tolist()
    assert slots == [0, 1, 2]
    assert found.cells[0, slots].tolist() == [[1, 2], [0, 2], [1, 3]]  # own cell, left, below
    assert found.index[0, slots].tolist() == [9, 8, 13]
    assert found.target[0, slots].tolist() == [0, 0, 0]
    both = assign_targets(boxes, labels, torch.ones_like(matches), level, (4, 4))
    assert both.mask.sum() == 6
    assert both.index[0, 3:6].tolist() == [25, 24, 29]
    assert both.anchors[3].tolist() == [200, 200]


def test_neighbors_outside_the_grid_are_unused():
    level = Level(32, torch.tensor([[40.0, 40]]))
    boxes = torch.tensor([[[0.0, 0, 30, 30], [98, 98, 128, 128]]])  # centers (0.47, 0.47) and (3.53, 3.53)
    found = assign_targets(boxes, torch.tensor([[0, 0]]), torch.ones(1, 2, 1, dtype=torch.bool), level, (4, 4))
    assert found.mask[0].tolist() == [True, False, False, True, False, False]
