"""The network against the reference values, and what `phi` promises."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.ops import SqueezeExcitation

from nets.attention import ATTENTION, CA_Block, cbam_block, eca_block, se_block
from nets.yolo import PLACES, ModelSpec, YoloBody, summary
from tests.conftest import ANCHORS, REFERENCE, needs_shared
from tools import convert_weights
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.detector import Detector
from utils.weights import read_weights, start_from

MASKS = [[3, 4, 5], [1, 2, 3]]


def reference_value(name: str, shape: list[int], index: int) -> torch.Tensor:
    """The filling rule of the reference's README."""
    r = np.random.default_rng(index)
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if name.endswith("running_var"):
        values = r.uniform(0.5, 1.5, shape)
    elif name.endswith("running_mean"):
        values = r.normal(0, 0.1, shape)
    elif name.endswith("bias"):
        values = r.normal(0, 0.05, shape)
    elif len(shape) == 1:
        values = r.uniform(0.5, 1.5, shape)
    else:
        values = r.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


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


@needs_shared
@pytest.mark.parametrize(("phi", "renamed"), [*((phi, False) for phi in range(5)), (2, True)])
def test_converted_weights_match_reference(reference, phi, renamed, tmp_path):
    """A published file, of either naming, through tools/convert_weights.py and the detector."""
    keys, arrays = reference
    state = {name: reference_value(name, shape, i) for i, (name, shape) in enumerate(keys[f"phi{phi}"])}
    if renamed:
        naming = {".fc1.": ".fc.0.", ".fc2.": ".fc.2.", "spatialattention.conv1.": "spatialattention.conv."}
        for ours, theirs in naming.items():
            state = {name.replace(ours, theirs): value for name, value in state.items()}
        state = {f"module.{name}": value for name, value in state.items()}
        assert "module.feat1_att.channelattention.fc.0.weight" in state
    torch.save(state, tmp_path / "published.pth")
    path = convert_weights.main(convert_weights.Config(str(tmp_path / "published.pth"), input_size=(64, 96)))
    detector = Detector.load(path)
    assert (detector.spec.phi, detector.spec.scale_xy, detector.spec.letterbox) == (phi, 1.0, False)
    with torch.no_grad():
        heads = detector.network.model(torch.from_numpy(arrays["x"]))
    for head, name in zip(heads, ("p5", "p4"), strict=True):
        np.testing.assert_allclose(head.numpy(), arrays[f"phi{phi}_{name}"], atol=1e-4, rtol=0)


@needs_shared
@pytest.mark.parametrize(
    ("name", "block"), [("se", se_block), ("cbam", cbam_block), ("eca", eca_block), ("ca", CA_Block)]
)
def test_block_matches_reference(reference, name, block):
    keys, arrays = reference
    model = fill(block(128), keys[name])
    with torch.no_grad():
        output = model(torch.from_numpy(arrays["feature"]))
    np.testing.assert_allclose(output.numpy(), arrays[name], atol=1e-5, rtol=0)


def test_se_is_torchvision_squeeze_excitation_with_zero_biases():
    ours, theirs = se_block(64, ratio=8), SqueezeExcitation(64, 8, scale_activation=torch.nn.Sigmoid)
    with torch.no_grad():
        theirs.fc1.weight.copy_(ours.fc[0].weight[:, :, None, None])
        theirs.fc2.weight.copy_(ours.fc[2].weight[:, :, None, None])
        theirs.fc1.bias.zero_()
        theirs.fc2.bias.zero_()
        x = torch.randn(2, 64, 5, 7)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("block", "arguments", "name", "shape"),
    [
        (se_block, {"ratio": 4}, "fc.0.weight", (32, 128)),
        (cbam_block, {"ratio": 16, "kernel_size": 3}, "spatialattention.conv1.weight", (1, 2, 3, 3)),
        (eca_block, {"b": 1, "gamma": 1}, "conv.weight", (1, 1, 9)),  # log2(128) + 1 = 8, the next odd is 9
        (CA_Block, {"ratio": 32}, "conv_1x1.weight", (4, 128, 1, 1)),
    ],
)
def test_block_arguments_shape_the_block(block, arguments, name, shape):
    model = block(128, **arguments)
    assert tuple(model.state_dict()[name].shape) == shape
    assert model(torch.randn(2, 128, 3, 5)).shape == (2, 128, 3, 5)


@pytest.mark.parametrize(
    ("phi", "arguments", "message"),
    [
        (9, {}, r"phi is 9, but must be one of 0 \(none\), 1 \(se_block\)"),
        (2, {"kernel_size": 5}, "3 or 7"),
        (1, {"kernel_size": 3}, "phi 1"),
        (1, {"ratio": 0}, "ratio is 0"),
        (0, {"ratio": 4}, "phi 0 has no attention"),
    ],
)
def test_wrong_attention_settings_are_explained(phi, arguments, message):
    with pytest.raises(ValueError, match=message):
        YoloBody(MASKS, 20, phi, attention_args=arguments)


@pytest.mark.parametrize("phi", [phi for phi in ATTENTION if phi])
def test_identity_start_equals_phi_0(phi):
    spec = ModelSpec(("a", "b"), ANCHORS, phi=phi)
    plain, attentive = replace(spec, phi=0).build().eval(), spec.build().eval()
    missing, unexpected = attentive.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all("_att" in name or "gain" in name for name in missing)
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(attentive(x), plain(x), strict=True):
            torch.testing.assert_close(ours, theirs)
    gated = replace(spec, identity_start=False).build().eval()
    gated.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert not torch.allclose(gated(x)[0], plain(x)[0])


@pytest.mark.parametrize("phi", [phi for phi in ATTENTION if phi])
def test_a_phi_0_checkpoint_starts_every_phi(phi, tmp_path):
    """By its file, and for another class count too: nothing but heads and attention is fresh."""
    spec = ModelSpec(("a", "b"), ANCHORS)
    plain = spec.build().eval()
    save_checkpoint(tmp_path / "a.safetensors", Checkpoint(spec, plain.state_dict(), {}, {}))
    weights = read_weights(tmp_path / "a.safetensors")
    same, x = replace(spec, phi=phi).build().eval(), torch.rand(1, 3, 64, 96)
    line = start_from(same, weights, "a.safetensors")
    assert "yolo_head" not in line
    other = replace(spec, phi=phi, class_names=("a", "b", "c")).build().eval()
    line = start_from(other, weights, "a.safetensors")
    fresh = line.partition("fresh: ")[2].split(", ")
    assert {name for name in fresh if not name.startswith(("attention_gain.", *PLACES))} == {
        f"yolo_head{head}.1.{name}" for head in ("P5", "P4") for name in ("weight", "bias")
    }
    with torch.no_grad():
        for ours, theirs in zip(same(x), plain(x), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        for ours, theirs in zip(other.backbone(x), plain.backbone(x), strict=True):
            assert torch.equal(ours, theirs)


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


def test_summary_counts_parameters_and_flop():
    text = summary(YoloBody(MASKS, 80), (416, 416))
    assert text.startswith("6,056,606 parameters")
    assert 6.7 < float(text.split(", ")[1].split()[0]) < 7.1  # 6.9 GFLOP with the COCO head
