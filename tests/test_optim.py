"""What the optimizer sees: groups, schedule, average, frozen parts."""

import pytest
import torch

from nets.yolo import ModelSpec
from tests.conftest import ANCHORS
from utils.errors import UserError
from utils.optim import (
    accumulation_steps,
    build_ema,
    build_optimizer,
    freeze_backbone,
    lr_factor,
    parameter_groups,
)


def test_norms_biases_and_gains_do_not_decay():
    model = ModelSpec(("a",), ANCHORS, phi=2).build()
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].rsplit(".")[-1] for p in decayed["params"]} == {"weight"}
    kept = {names[id(p)] for p in plain["params"]}
    assert "backbone.conv1.bn.weight" in kept
    assert "yolo_headP5.1.bias" in kept
    assert "attention_gain.feat1" in kept
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_cosine_with_warmup():
    factor = lr_factor("cosine", 100, 10)
    assert [factor(0), factor(4)] == pytest.approx([0.1, 0.5], abs=0.01)
    assert factor(10) > 0.97
    assert factor(50) == pytest.approx(0.505)
    assert factor(100) == factor(140) == pytest.approx(0.01)


def test_steps():
    factor = lr_factor("step", 100, 0)
    assert [factor(s) for s in (0, 79, 80, 89, 90)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_unknown_names():
    with pytest.raises(UserError, match="adamw, sgd"):
        build_optimizer(torch.nn.Linear(1, 1), "adam", 0.1, 0.9, 0)
    with pytest.raises(UserError, match="cosine, step"):
        lr_factor("linear", 10, 1)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_frozen_backbone_stays(name):
    model = ModelSpec(("a",), ANCHORS).build()
    optimizer = build_optimizer(model, name, 0.1, 0.9, 0.1)
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
            ema.update(model)
    assert ema.module.weight.item() == pytest.approx(0.9 * 1 + 0.1 * 2)


@pytest.mark.parametrize(("batch", "nominal", "steps"), [(16, 16, 1), (4, 16, 4), (32, 16, 1), (5, 16, 3)])
def test_accumulation(batch, nominal, steps):
    assert accumulation_steps(batch, nominal) == steps
