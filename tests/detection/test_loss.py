"""The loss against its definition written with loops, and its limits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

from nets.spec import STRIDES, ModelSpec
from tests.conftest import ANCHORS
from utils.detection.anchors import head_levels
from utils.detection.assignment import assign_targets
from utils.detection.boxes import batched_iou, ciou
from utils.detection.loss import HEAD_BALANCE, LossSettings, YoloLoss

SPEC = ModelSpec(("a", "b", "c"), ANCHORS, input_size=(96, 128))
SETTINGS = LossSettings()
BOXES = torch.tensor(
    [
        [[20.0, 20, 50, 60], [100, 70, 126, 95], [0, 0, 0, 0]],
        [[0, 0, 120, 90], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    ]
)
LABELS = torch.tensor([[0, 2, -1], [1, -1, -1], [-1, -1, -1]])


def random_heads(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 24, 96 // stride, 128 // stride, generator=generator) for stride in STRIDES]


def slow_boxes(head, level) -> dict[tuple[int, ...], torch.Tensor]:
    """Image, anchor, row, column -> the decoded box (1, 4)."""
    batch, _, height, width = head.shape
    raw, boxes = head.view(batch, 3, 8, height, width), {}
    for key in torch.cartesian_prod(*map(torch.arange, (batch, 3, height, width))).tolist():
        b, a, y, x = key
        tx, ty, tw, th = raw[b, a, :4, y, x].tolist()
        cx, cy = ((2 / (1 + math.exp(-t)) - 0.5 + c) * level.stride for t, c in ((tx, x), (ty, y)))
        w, h = (s * math.exp(t) for t, s in zip((tw, th), level.anchors[a].tolist(), strict=True))
        boxes[tuple(key)] = torch.tensor([[cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]])
    return boxes


def slow_assignment(level, boxes, labels, grid) -> list[tuple[tuple[int, ...], int, int]]:
    """Pairs of prediction (image, anchor, row, column) and object (image, index)."""
    pairs = []
    for b, k in (labels >= 0).nonzero().tolist():
        x, y = ((boxes[b, k, :2] + boxes[b, k, 2:]) / 2 / level.stride).tolist()
        cells = [(int(x), int(y))]
        cells.append((int(x) + (-1 if x % 1 < 0.5 else 1), int(y)))
        cells.append((int(x), int(y) + (-1 if y % 1 < 0.5 else 1)))
        w, h = (boxes[b, k, 2:] - boxes[b, k, :2]).tolist()

        def overlap(anchor, w=w, h=h):
            inner = min(w, anchor[0]) * min(h, anchor[1])
            return inner / (w * h + anchor[0] * anchor[1] - inner)

        best = max(map(overlap, ANCHORS[1:]))  # no head uses the first anchor
        overlaps = map(overlap, level.anchors.tolist())
        fitting = [a for a, value in enumerate(overlaps) if value > SETTINGS.anchor_iou or value >= best - 1e-9]
        inside = [(cx, cy) for cx, cy in cells if 0 <= cx < grid[1] and 0 <= cy < grid[0]]
        pairs += [((b, a, cy, cx), b, k) for a in fitting for cx, cy in inside]
    return pairs


def slow_loss(heads, boxes, labels) -> dict[str, float]:
    """The definition, with loops over images, objects, anchors and cells."""
    sums = {"box": 0.0, "objectness": 0.0, "class": 0.0}
    for head, level, balance in zip(heads, head_levels(SPEC), HEAD_BALANCE, strict=True):
        raw = head.view(len(head), 3, 8, *head.shape[2:])
        predicted = slow_boxes(head, level)
        pairs = slow_assignment(level, boxes, labels, head.shape[2:])
        targets: dict[tuple[int, ...], float] = {}
        for key, b, k in pairs:
            quality = ciou(predicted[key], boxes[b, k][None]).item()
            targets[key] = max(targets.get(key, 0.0), quality)
            wanted = torch.zeros(3)
            wanted[labels[b, k]] = 1
            said = raw[key[0], key[1], 5:, key[2], key[3]]
            sums["box"] += (1 - quality) / len(pairs)
            sums["class"] += F.binary_cross_entropy_with_logits(said, wanted, reduction="sum").item() / len(pairs)
        costs = []
        for key, box in predicted.items():
            truth = boxes[key[0]][labels[key[0]] >= 0]
            near = len(truth) and batched_iou(box[None], truth[None]).max() > SETTINGS.ignore_iou
            if key in targets or not near:
                said = raw[key[0], key[1], 4, key[2], key[3]]
                costs.append(F.binary_cross_entropy_with_logits(said, torch.tensor(targets.get(key, 0.0))).item())
        sums["objectness"] += balance * sum(costs) / len(costs)
    return sums


@pytest.mark.parametrize("seed", [0, 1])
def test_loss_matches_its_definition(seed):
    heads = random_heads(seed)
    terms = YoloLoss(SPEC, SETTINGS, torch.device("cpu"))(heads, BOXES, LABELS)
    expected = slow_loss(heads, BOXES, LABELS)
    weights = {"box": SETTINGS.box, "objectness": SETTINGS.objectness, "class": SETTINGS.classes}
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(weights[name] * value, rel=1e-4), name
    assert terms["loss"].item() == pytest.approx(sum(terms[name].item() for name in weights), rel=1e-6)


def test_ignored_predictions_have_no_gradient():
    """A prediction that overlaps an object without being assigned to it is not trained."""
    boxes, labels = torch.tensor([[[32.0, 32, 64, 64]]]), torch.tensor([[0]])
    heads = [torch.full((1, 24, 3, 4), -4.0), torch.full((1, 24, 6, 8), -4.0)]
    raw = heads[1].view(1, 3, 8, 6, 8)
    # P4's third anchor (81x82), one cell right of the object's center, moved and shrunk onto the object
    raw[0, 2, :4, 3, 4] = torch.tensor([-8.0, math.log(1 / 3), math.log(32 / 81), math.log(32 / 82)])
    heads[1].requires_grad_(True)
    settings = LossSettings(ignore_iou=0.4)
    YoloLoss(SPEC, settings, torch.device("cpu"))(heads, boxes, labels)["loss"].backward()
    gradient = heads[1].grad.view(1, 3, 8, 6, 8)[0, 2, 4]
    assert gradient[3, 4] == 0
    assert (gradient != 0).sum() == gradient.numel() - 1


def test_padding_changes_nothing():
    heads = random_heads()
    loss = YoloLoss(SPEC, SETTINGS, torch.device("cpu"))
    padded = F.pad(BOXES, (0, 0, 0, 7)), F.pad(LABELS, (0, 7), value=-1)
    torch.testing.assert_close(loss(heads, *padded), loss(heads, BOXES, LABELS))


def test_gradients_are_finite_without_objects_and_for_extreme_heads():
    loss = YoloLoss(SPEC, SETTINGS, torch.device("cpu"))
    for labels, scale in ((torch.full_like(LABELS, -1), 1.0), (LABELS, 100.0)):
        heads = [(head * scale).requires_grad_(True) for head in random_heads()]
        loss(heads, BOXES, labels)["loss"].backward()
        assert all(head.grad.isfinite().all() for head in heads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", [32, 1280])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_half_precision_heads_give_the_same_loss_as_float32_heads(dtype, side, scale):
    """Sums over the cells, coordinates and counts exceed what float16 can represent."""
    generator = torch.Generator().manual_seed(side)
    shapes = [(3, 24, side // stride, side // stride) for stride in STRIDES]
    heads = [(scale * torch.randn(shape, generator=generator)).to(dtype).requires_grad_(True) for shape in shapes]
    expected = [head.detach().float().requires_grad_(True) for head in heads]
    boxes, loss = BOXES * side / 128, YoloLoss(SPEC, SETTINGS, torch.device("cpu"))
    terms, wanted = loss(heads, boxes, LABELS), loss(expected, boxes, LABELS)
    assert all(term.isfinite() for term in wanted.values())
    torch.testing.assert_close(terms, wanted, atol=0, rtol=0)
    for total in (terms["loss"], wanted["loss"]):
        (total * 1024).backward()  # as a gradient scaler does
    for head, other in zip(heads, expected, strict=True):
        assert head.grad.dtype == dtype
        assert head.grad.isfinite().all()
        torch.testing.assert_close(head.grad, other.grad.to(dtype), atol=0, rtol=0)


def test_loss_reads_no_values_on_the_host():
    """Each of these operations would make the host wait for a GPU."""
    heads = [head.requires_grad_(True) for head in random_heads()]
    with profile() as recorded:
        YoloLoss(SPEC, SETTINGS, torch.device("cpu"))(heads, BOXES, LABELS)["loss"].backward()
    called = {event.key for event in recorded.key_averages()}
    assert "aten::binary_cross_entropy_with_logits" in called
    assert not called & {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}


def test_a_perfect_prediction_costs_nothing():
    boxes, labels = torch.tensor([[[32.0, 32, 64, 64]]]), torch.tensor([[1]])
    heads = [torch.full((1, 24, size, size), -30.0) for size in (3, 6)]
    for head, level in zip(heads, head_levels(SPEC), strict=True):
        found = assign_targets(boxes, labels, torch.ones(1, 1, 3, dtype=torch.bool), level, tuple(head.shape[2:]))
        raw = head.view(1, 3, 8, -1)
        for slot in found.mask[0].nonzero().flatten().tolist():
            anchor, cell = divmod(found.index[0, slot].item(), head.shape[2] * head.shape[3])
            offset = (48 / level.stride - found.cells[0, slot] + 0.5) / 2
            raw[0, anchor, :2, cell] = torch.logit(offset)
            raw[0, anchor, 2:4, cell] = torch.log(32 / found.anchors[slot])
            raw[0, anchor, 4, cell] = 30
            raw[0, anchor, 5:, cell] = torch.tensor([-30.0, 30, -30])
    terms = YoloLoss(SPEC, LossSettings(), torch.device("cpu"))(heads, boxes, labels)
    assert terms["loss"] < 1e-4
