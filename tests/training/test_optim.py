"""Parameter groups, Muon, the schedule, the weight average and freezing."""

import pytest
import torch

from nets.darknet53_tiny import BasicConv
from nets.spec import ModelSpec
from nets.yolo import build_model
from tests.conftest import ANCHORS
from utils.training.optim import (
    build_ema,
    build_optimizer,
    freeze_backbone,
    lr_factor,
    orthogonalize,
    orthogonalize_stack,
    parameter_groups,
)
from utils.training.trainer import Batching


def test_muon_trains_hidden_convolutions_and_norms_biases_and_gains_do_not_decay():
    model = build_model(ModelSpec(("a",), ANCHORS, phi=2))
    hidden, others, plain = parameter_groups(model, 1.0, 0.1)
    assert (hidden["weight_decay"], others["weight_decay"], plain["weight_decay"]) == (0.1, 0.05, 0.0)
    assert (hidden["orthogonal"], others["orthogonal"], plain["orthogonal"]) == (True, False, False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden, others, plain = ({names[id(value)] for value in group["params"]} for group in (hidden, others, plain))
    assert len(hidden) + len(others) + len(plain) == len(names)
    assert all(name.endswith("conv.weight") for name in hidden)
    assert {"backbone.conv2.conv.weight", "yolo_headP5.0.conv.weight", "conv_for_P5.conv.weight"} <= hidden
    assert {"backbone.conv1.conv.weight", "yolo_headP4.1.weight", "feat1_att.spatialattention.conv1.weight"} <= others
    assert {"backbone.conv1.bn.weight", "yolo_headP5.1.bias", "attention_gain.feat1"} <= plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(32, 200), (200, 32), (40, 40)])
def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values(monkeypatch, shape, dtype):
    monkeypatch.setattr("utils.training.optim.choose_precision", lambda *_: dtype)
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, 32))[0] for side in shape)
    for smallest in (-2, -1, 0):
        sizes = torch.logspace(0, smallest, 32)
        (leveled,) = orthogonalize([left * sizes @ right.T])
        found = left.T @ leveled @ right  # in the basis of its singular vectors
        assert 0.85 < found.diagonal().min() < found.diagonal().max() < 1.15
        assert (found - torch.diag(found.diagonal())).abs().max() < 0.15  # nothing goes into other directions


def test_orthogonalize_accepts_rank_one_and_zero():
    matrix = torch.outer(torch.linspace(-1, 1, 64), torch.linspace(0, 1, 90))
    assert 0.9 < torch.linalg.matrix_norm(orthogonalize([matrix])[0], 2) < 1.1
    assert not orthogonalize([torch.zeros(8, 20)])[0].any()


def test_padding_does_not_change_orthogonalized_matrices():
    """On a GPU, matrices of similar heights are stacked, padded with zeros."""
    torch.manual_seed(0)
    matrices = torch.randn(24, 90), torch.randn(24, 30), torch.randn(16, 40)
    padded = [torch.nn.functional.pad(m, (0, 90 - m.shape[1], 0, 24 - m.shape[0])) for m in matrices]
    for found, matrix in zip(orthogonalize_stack(torch.stack(padded)), orthogonalize(matrices), strict=True):
        rows, columns = matrix.shape
        torch.testing.assert_close(found[:rows, :columns], matrix, atol=2e-2, rtol=0)
        assert not found[rows:].any()
        assert not found[:, columns:].any()


def test_muon_step_equals_that_of_torch(monkeypatch):
    """On 1x1 convolutions, which are matrices, with the same polynomials."""
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", lambda matrix, *_: orthogonalize([matrix])[0])
    torch.manual_seed(0)
    conv = BasicConv(24, 16, 1)
    matrix = torch.nn.Parameter(conv.conv.weight.detach().flatten(1).clone())
    ours = build_optimizer(conv, lr=0.1, weight_decay=0.5)
    theirs = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.5)
    for _ in range(5):
        gradient = torch.randn_like(matrix)
        before = matrix.detach().clone()
        conv.conv.weight.grad, matrix.grad = gradient[..., None, None].clone(), gradient
        ours.step()
        theirs.step()
        ours.zero_grad()
        moved = (matrix - before).norm()
        assert (conv.conv.weight.flatten(1) - matrix).norm() < 1e-5 * moved
        conv.conv.weight.data.copy_(matrix.data[..., None, None])


def test_cosine_with_warmup():
    factor = lr_factor(100, 10)
    assert [factor(0), factor(4)] == pytest.approx([0.1, 0.5], abs=0.01)
    assert factor(10) > 0.97
    assert factor(50) == pytest.approx(0.505)
    assert factor(100) == factor(140) == pytest.approx(0.01)


def test_frozen_backbone_stays():
    model = build_model(ModelSpec(("a",), ANCHORS))
    optimizer = build_optimizer(model, 0.1, 0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for frozen in (True, False):
        model.train()
        freeze_backbone(model, frozen)
        sum(head.square().mean() for head in model(torch.rand(2, 3, 32, 32))).backward()
        optimizer.step()
        optimizer.zero_grad()
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert any(key.startswith("yolo_headP5") for key in changed)
        assert any(key.startswith("backbone") for key in changed) is not frozen


def test_ema_horizon_follows_the_run():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = build_ema(model, 200, 0.05)  # horizon 10 steps: decay 0.9
    with torch.no_grad():
        for value in (1.0, 2.0):
            model.weight.fill_(value)
            ema.update()
    assert ema.module.weight.item() == pytest.approx(0.9 * 1 + 0.1 * 2)


@pytest.mark.parametrize(
    ("batch", "nominal", "steps"), [(16, 16, 1), (4, 16, 4), (32, 16, 1), (5, 16, 3), (8, 999, 12)]
)
def test_batches_are_accumulated_to_the_nominal_size(batch, nominal, steps):
    assert Batching.plan(100, batch, nominal) == (batch, 100 // batch, steps)
