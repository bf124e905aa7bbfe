"""The network: reference values, shapes, initialization and cost."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from nets.attention import ATTENTION
from nets.spec import ATTENTION_PLACES, ModelSpec
from nets.yolo import YoloBody, build_model, count_cost
from tests.conftest import ANCHORS, MASKS, REFERENCE, needs_shared, reference_value
from tools import convert_weights
from utils.inference.detector import Detector
from utils.weights.checkpoint import Checkpoint, save_checkpoint
from utils.weights.pretrained import read_weights, start_from


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
    """A published file with either naming scheme, converted by tools/convert_weights.py and loaded by the detector."""
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


@pytest.mark.parametrize("phi", [phi for phi in ATTENTION if phi])
def test_phi_0_checkpoint_initializes_every_phi(phi, tmp_path):
    """With another number of classes too, only heads and attention are newly initialized."""
    spec = ModelSpec(("a", "b"), ANCHORS)
    plain = build_model(spec).eval()
    save_checkpoint(tmp_path / "a.safetensors", Checkpoint(spec, plain.state_dict(), {}, {}))
    weights = read_weights(tmp_path / "a.safetensors")
    same, x = build_model(replace(spec, phi=phi)).eval(), torch.rand(1, 3, 64, 96)
    line = start_from(same, weights, "a.safetensors")
    assert "yolo_head" not in line
    other = build_model(replace(spec, phi=phi, class_names=("a", "b", "c"))).eval()
    line = start_from(other, weights, "a.safetensors")
    fresh = line.partition("newly initialized: ")[2].split(", ")
    assert {name for name in fresh if not name.startswith(("attention_gain.", *ATTENTION_PLACES))} == {
        f"yolo_head{head}.1.{name}" for head in ("P5", "P4") for name in ("weight", "bias")
    }
    with torch.no_grad():
        for ours, theirs in zip(same(x), plain(x), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        for ours, theirs in zip(other.backbone(x), plain.backbone(x), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [(32, 32), (96, 64), (320, 416)])
@pytest.mark.parametrize("num_classes", [1, 7])
def test_head_shapes_follow_class_count_and_input_size(size, num_classes):
    with torch.no_grad():
        p5, p4 = YoloBody(MASKS, num_classes, 4)(torch.rand(2, 3, *size))
    assert p5.shape == (2, 3 * (5 + num_classes), size[0] // 32, size[1] // 32)
    assert p4.shape == (2, 3 * (5 + num_classes), size[0] // 16, size[1] // 16)


def test_spec_survives_json_and_rebuilds_the_network():
    spec = ModelSpec(("a", "b"), ANCHORS, phi=2, attention_args={"ratio": 4, "kernel_size": 3}, places=("feat1",))
    again = ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    names = {name: value.shape for name, value in build_model(spec).state_dict().items()}
    assert names == {name: value.shape for name, value in build_model(again).state_dict().items()}
    assert "feat1_att.spatialattention.conv1.weight" in names
    assert not any(name.startswith("feat2_att") for name in names)


@pytest.mark.parametrize("changes", [{}, {"identity_start": False}, {"places": ("feat2",)}])
def test_one_seed_gives_every_phi_the_same_shared_weights(changes):
    def weights(phi: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        return build_model(ModelSpec(("a", "b"), ANCHORS, phi=phi, **changes)).state_dict()

    plain = weights(0)
    for phi in ATTENTION:
        own = weights(phi)
        assert all("_att." in name or name.startswith("attention_gain.") for name in own.keys() - plain.keys())
        assert [name for name, value in plain.items() if not torch.equal(value, own[name])] == [], phi


@contextmanager
def autocast_cuda(dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast("cuda"), which disables itself on a machine without a GPU."""
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


@pytest.mark.parametrize("phi", ATTENTION)
def test_features_keep_their_dtype_under_cuda_autocast(phi):
    """Autocast runs upsampling, softmax, sums and group norms in float32; what follows must not."""
    names = ["upsample", "yolo_headP5", "yolo_headP4", *(f"{place}_att" for place in ATTENTION_PLACES if phi)]
    dtypes = {}

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        dtypes[f"input of {name}"], dtypes[name] = inputs[0].dtype, output.dtype

    with FakeTensorMode(), torch.device("cuda"), autocast_cuda(torch.float16):
        model = YoloBody(MASKS, 2, phi, identity_start=phi > 0)
        for name in names:
            model.get_submodule(name).register_forward_hook(partial(record, name))
        model(torch.rand(1, 3, 32, 64))
    assert len(dtypes) == 2 * len(names)
    assert dtypes == dict.fromkeys(dtypes, torch.float16)


def test_counts_parameters_and_flop():
    parameters, gflop = count_cost(YoloBody(MASKS, 80), (416, 416))
    assert parameters == 6_056_606
    assert 6.7 < gflop < 7.1  # 6.9 GFLOP with the COCO head
