"""The network against the reference values, and what `phi` promises."""

import json

import numpy as np
import pytest
import torch

from nets.attention import ATTENTION
from nets.yolo import ModelSpec, YoloBody, summary
from tests.conftest import ANCHORS, MASKS, REFERENCE, needs_shared, reference_value


def fill(model: torch.nn.Module, keys: list) -> torch.nn.Module:
    state = {name: reference_value(name, shape, i) for i, (name, shape) in enumerate(keys)}
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def reference():
    with open(REFERENCE / "nets_keys.json") as file:
        return json.load(file), np.load(REFERENCE / "nets.npz")


@needs_shared
@pytest.mark.parametrize("phi", range(5))
def test_network_matches_reference(reference, phi):
    keys, arrays = reference
    model = YoloBody(MASKS, 20, phi)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == dict(keys[f"phi{phi}"])
    assert sum(p.numel() for p in model.parameters()) == keys[f"phi{phi}_params"]
    fill(model, keys[f"phi{phi}"])
    with torch.no_grad():
        p5, p4 = model(torch.from_numpy(arrays["x"]))
    np.testing.assert_allclose(p5.numpy(), arrays[f"phi{phi}_p5"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(p4.numpy(), arrays[f"phi{phi}_p4"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (320, 416)])
@pytest.mark.parametrize("num_classes", [1, 7])
def test_any_class_count_and_size(size, num_classes):
    with torch.no_grad():
        p5, p4 = YoloBody(MASKS, num_classes, 4)(torch.rand(2, 3, *size))
    assert p5.shape == (2, 3 * (5 + num_classes), size[0] // 32, size[1] // 32)
    assert p4.shape == (2, 3 * (5 + num_classes), size[0] // 16, size[1] // 16)


def test_spec_survives_json_and_rebuilds_the_network():
    spec = ModelSpec(("a", "b"), ANCHORS, phi=2, attention_args={"ratio": 4, "kernel_size": 3}, places=("feat1",))
    again = ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    names = {name: value.shape for name, value in spec.build().state_dict().items()}
    assert names == {name: value.shape for name, value in again.build().state_dict().items()}
    assert "feat1_att.spatialattention.conv1.weight" in names
    assert not any(name.startswith("feat2_att") for name in names)


@pytest.mark.parametrize("changes", [{}, {"identity_start": False}, {"places": ("feat2",)}])
def test_one_seed_gives_every_phi_the_same_shared_weights(changes):
    def weights(phi: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        return ModelSpec(("a", "b"), ANCHORS, phi=phi, **changes).build().state_dict()

    plain = weights(0)
    for phi in ATTENTION:
        own = weights(phi)
        assert all("_att." in name or name.startswith("attention_gain.") for name in own.keys() - plain.keys())
        assert [name for name, value in plain.items() if not torch.equal(value, own[name])] == [], phi


def test_summary_counts_parameters_and_flop():
    text = summary(YoloBody(MASKS, 80), (416, 416))
    assert text.startswith("6,056,606 parameters")
    assert 6.7 < float(text.split(", ")[1].split()[0]) < 7.1  # 6.9 GFLOP with the COCO head
