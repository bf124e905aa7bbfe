"""Attention blocks: reference values, the formulas of their papers in plain NumPy, arguments and documentation."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from math import ceil, exp, floor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.export import Dim
from torchvision.ops import SqueezeExcitation

import train
from nets.attention import (
    ATTENTION,
    ELA,
    MLCA,
    AttentionBlock,
    AttentionOption,
    CA_Block,
    EMAAttention,
    SimAM,
    TripletAttention,
    cbam_block,
    eca_block,
    parse_phi,
    se_block,
)
from nets.darknet53_tiny import LEAKY_SLOPE
from nets.spec import ATTENTION_PLACES, ModelSpec
from nets.yolo import YoloBody, build_model, count_cost
from tests.conftest import ANCHORS, MASKS, REFERENCE, ROOT, needs_shared, reference_value, small_run
from utils.data.image_io import read_image
from utils.inference.detector import Detector
from utils.reports.explain import Explainer

BLOCKS = {option.name: option.block for option in ATTENTION.values() if option.block}
PARAMETERS = dict(
    zip(BLOCKS, (43_008, 86_310, 15, 64_624, 0, 3_472, 8_064, 30, 900), strict=True)
)  # at the three places together
EVERY_BLOCK = pytest.mark.parametrize("phi", [phi for phi in ATTENTION if phi])


@needs_shared
@pytest.mark.parametrize("name", BLOCKS)
def test_block_matches_reference(name):
    entries, arrays = json.loads((REFERENCE / "nets_keys.json").read_text())[name], np.load(REFERENCE / "nets.npz")
    block = BLOCKS[name](128)
    own = [(key, list(value.shape)) for key, value in block.state_dict().items()]
    assert [shape for _, shape in own] == [shape for _, shape in entries]
    pairs = enumerate(zip(own, entries, strict=True))
    filled = {key: reference_value(entry, shape, i) for i, ((key, _), (entry, shape)) in pairs}
    block.load_state_dict(filled)
    with torch.no_grad():
        output = block.eval()(torch.from_numpy(arrays["feature"]))
    np.testing.assert_allclose(output.numpy(), arrays[name], atol=1e-5, rtol=0)


def test_number_of_parameters_at_the_three_places():
    for name, block in BLOCKS.items():
        counts = [
            sum(value.numel() for value in block(channels).parameters()) for channels in ATTENTION_PLACES.values()
        ]
        assert sum(counts) == PARAMETERS[name], name


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def convolve(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """1-D convolution (cross-correlation) with zero padding."""
    reach = len(kernel) // 2
    padded = np.pad(values, reach)
    return np.array([padded[i : i + len(kernel)] @ kernel for i in range(len(values))])


def convolve_plane(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Channels (C, H, W) and a kernel (C, K, K) -> (H, W)."""
    reach = kernel.shape[1] // 2
    padded = np.pad(values, ((0, 0), (reach, reach), (reach, reach)))
    side, (_, height, width) = kernel.shape[1], values.shape
    return np.array(
        [[(padded[:, y : y + side, x : x + side] * kernel).sum() for x in range(width)] for y in range(height)]
    )


def normalize(values: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1 over all values, as in batch, group and layer norm."""
    return (values - values.mean()) / np.sqrt(values.var() + 1e-5)


each = np.vectorize(sigmoid)


def plain_se(x: np.ndarray, block: se_block) -> np.ndarray:
    squeeze, excite = (block.fc[i].weight.numpy() for i in (0, 2))
    means = np.array([channel.mean() for channel in x])
    gate = each(excite @ np.maximum(squeeze @ means, 0))
    return np.stack([channel * g for channel, g in zip(x, gate, strict=True)])


def plain_cbam(x: np.ndarray, block: cbam_block) -> np.ndarray:
    first = block.channelattention.fc1.weight.numpy()[:, :, 0, 0]
    second = block.channelattention.fc2.weight.numpy()[:, :, 0, 0]
    means, peaks = x.mean(axis=(1, 2)), x.max(axis=(1, 2))
    gate = each(second @ np.maximum(first @ means, 0) + second @ np.maximum(first @ peaks, 0))
    x = x * gate[:, None, None]
    kernel = block.spatialattention.conv1.weight.numpy()[0]
    return x * each(convolve_plane(np.stack([x.mean(axis=0), x.max(axis=0)]), kernel))


def plain_eca(x: np.ndarray, block: eca_block) -> np.ndarray:
    gate = each(convolve(x.mean(axis=(1, 2)), block.conv.weight.numpy()[0, 0]))
    return x * gate[:, None, None]


def plain_ca(x: np.ndarray, block: CA_Block) -> np.ndarray:
    shared = block.conv_1x1.weight.numpy()[:, :, 0, 0]
    scale = 1 / np.sqrt(1 + block.bn.eps)  # fresh running statistics: mean 0, variance 1
    to_rows, to_columns = block.F_h.weight.numpy()[:, :, 0, 0], block.F_w.weight.numpy()[:, :, 0, 0]
    rows = each(to_rows @ np.maximum(shared @ x.mean(axis=2) * scale, 0))  # (C, H)
    columns = each(to_columns @ np.maximum(shared @ x.mean(axis=1) * scale, 0))  # (C, W)
    return x * rows[:, :, None] * columns[:, None]


def plain_simam(x: np.ndarray, block: SimAM) -> np.ndarray:
    output = np.empty_like(x)
    for c, channel in enumerate(x):
        distance = (channel - channel.mean()) ** 2
        variance = distance.sum() / max(channel.size - 1, 1)
        for place in np.ndindex(channel.shape):
            output[c][place] = channel[place] * sigmoid(distance[place] / (4 * (variance + 1e-4)) + 0.5)
    return output


def plain_ema(x: np.ndarray, block: EMAAttention) -> np.ndarray:
    mix, bias = block.conv1x1.weight.numpy()[:, :, 0, 0], block.conv1x1.bias.numpy()[:, None]
    near, near_bias = block.conv3x3.weight.numpy(), block.conv3x3.bias.numpy()
    output = []
    for g in np.split(x, block.factor):  # (C/G, H, W)
        rows, columns = each(mix @ g.mean(axis=2) + bias), each(mix @ g.mean(axis=1) + bias)
        along = np.stack([normalize(channel) for channel in g * rows[:, :, None] * columns[:, None]])
        around = np.stack([convolve_plane(g, kernel) + b for kernel, b in zip(near, near_bias, strict=True)])
        total = np.zeros(g.shape[1:])
        for feature, other in ((along, around), (around, along)):
            weights = np.exp(other.mean(axis=(1, 2)))
            total += np.tensordot(weights / weights.sum(), feature, axes=1)
        output.append(g * each(total))
    return np.concatenate(output)


def plain_ela(x: np.ndarray, block: ELA) -> np.ndarray:
    def gate(means: np.ndarray) -> np.ndarray:
        """(C, L) -> (C, L)."""
        convolved = [convolve(line, kernel[0]) for line, kernel in zip(means, block.conv.weight.numpy(), strict=True)]
        groups = np.split(np.stack(convolved), block.gn.num_groups)
        return each(np.concatenate([normalize(group) for group in groups]))

    return x * gate(x.mean(axis=2))[:, :, None] * gate(x.mean(axis=1))[:, None]


def plain_pool(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Adaptive average pooling: each cell extends from the floor of its start to the ceiling of its end."""
    (height, width), (rows, columns) = x.shape[1:], size
    output = np.empty((len(x), rows, columns))
    for i, j in np.ndindex(rows, columns):
        vertical = slice(floor(i * height / rows), ceil((i + 1) * height / rows))
        horizontal = slice(floor(j * width / columns), ceil((j + 1) * width / columns))
        output[:, i, j] = x[:, vertical, horizontal].mean(axis=(1, 2))
    return output


def plain_mlca(x: np.ndarray, block: MLCA) -> np.ndarray:
    local = plain_pool(x, (5, 5))
    by_position = local.reshape(len(x), 25).T.reshape(-1)  # all channels of a position, then the next position
    mixed = each(convolve(by_position, block.conv_local.weight.numpy()[0, 0])).reshape(25, len(x)).T
    whole = each(convolve(local.mean(axis=(1, 2)), block.conv.weight.numpy()[0, 0]))
    return x * plain_pool((mixed.reshape(local.shape) + whole[:, None, None]) / 2, x.shape[1:])


def plain_triplet(x: np.ndarray, block: TripletAttention) -> np.ndarray:
    outputs = []
    for gate, axis in zip(block.along, (1, 2, 0), strict=True):  # height, width, channels
        turned = np.swapaxes(x, 0, axis)
        maps = np.stack([turned.max(axis=0), turned.mean(axis=0)])
        plane = convolve_plane(maps, gate.conv.weight.numpy()[0]) / np.sqrt(1 + gate.bn.eps)
        outputs.append(np.swapaxes(turned * each(plane), 0, axis))
    return np.mean(outputs, axis=0)


PLAIN: dict[type[AttentionBlock], Callable] = {
    se_block: plain_se,
    cbam_block: plain_cbam,
    eca_block: plain_eca,
    CA_Block: plain_ca,
    SimAM: plain_simam,
    EMAAttention: plain_ema,
    ELA: plain_ela,
    MLCA: plain_mlca,
    TripletAttention: plain_triplet,
}


@EVERY_BLOCK
@pytest.mark.parametrize("size", [(6, 7), (1, 1), (3, 11)])
def test_block_follows_the_formula_of_its_paper(phi, size):
    block = ATTENTION[phi].block(32).double().eval().requires_grad_(False)
    x = torch.randn(2, 32, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(phi))
    expected = np.stack([PLAIN[type(block)](image, block) for image in x.numpy()])
    np.testing.assert_allclose(block(x).numpy(), expected, atol=1e-9)


@EVERY_BLOCK
def test_gradients_match_finite_differences(phi):
    torch.manual_seed(phi)
    block = ATTENTION[phi].block(8, **{6: {"factor": 4}, 1: {"ratio": 2}, 4: {"ratio": 2}}.get(phi, {})).double()
    names, values = zip(*block.named_parameters(), strict=True) if phi != 5 else ((), ())

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), x)

    x = torch.randn(2, 8, 3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(run, (x, *values))


@EVERY_BLOCK
def test_gates_multiply_and_lie_between_0_and_1(phi):
    block, x = ATTENTION[phi].block(64).eval(), torch.randn(2, 64, 5, 9)
    gates = block.gates(x)
    assert all(gate.min() >= 0 and gate.max() <= 1 for gate in gates)
    product = x
    for gate in gates:
        assert all(side in (1, whole) for side, whole in zip(gate.shape, x.shape, strict=True))
        product = product * gate
    torch.testing.assert_close(block(x), product)


@EVERY_BLOCK
@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_any_input_size_trains(phi, size):
    model = YoloBody(MASKS, 2, phi)
    heads = model(torch.rand(2, 3, *size))
    sum(head.square().mean() for head in heads).backward()
    gradients = [value.grad for name, value in model.named_parameters() if "_att" in name]
    assert all(grad is not None and grad.isfinite().all() for grad in gradients)


HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
CONVERTED_OR_AUTOCAST = pytest.mark.parametrize("autocast", [False, True])
SIDES = (1, 2, 40, 80)  # of the features, at input sizes of 32 and 1,280


def make_feature(side: int) -> Tensor:
    """(1, 64, S, S) with statistics like those after a trained batch norm, and outliers up to 300."""
    generator = torch.Generator().manual_seed(side)
    scale, shift = (torch.randn(1, 64, 1, 1, generator=generator) for _ in range(2))
    x = torch.randn(1, 64, side, side, generator=generator) * (scale.abs() + 0.2) + shift
    x = (x * torch.randn(x.shape, generator=generator).exp() * 10).clamp(-300, 300)
    return F.leaky_relu(x, LEAKY_SLOPE)


def run_in_half(block: AttentionBlock, x: Tensor, autocast: bool) -> tuple[Tensor, ...]:
    """The gates for x (B, C, H, W), the output and all gradients; the block is converted to x's dtype, or autocast."""
    block = copy.deepcopy(block) if autocast else copy.deepcopy(block).to(x.dtype)
    x = x.clone().requires_grad_(True)
    with torch.autocast("cpu", x.dtype, enabled=autocast):
        gates, output = block.gates(x), block(x)
    output.backward(torch.full_like(output, 1 / x.shape[2:].numel()))
    return *gates, output, x.grad, *(value.grad for value in block.parameters())


@EVERY_BLOCK
@HALF
@CONVERTED_OR_AUTOCAST
def test_outliers_do_not_overflow_in_half_precision(phi, dtype, autocast):
    torch.manual_seed(phi)
    block = ATTENTION[phi].block(64).eval()
    for side in SIDES:
        values = run_in_half(block, make_feature(side).to(dtype), autocast)
        assert all(value.isfinite().all() for value in values), side


def test_simam_separates_small_values_on_a_large_mean_in_half_precision():
    """As in a channel whose batch norm has a small scale."""
    x = (20 + 0.05 * torch.randn(1, 4, 40, 40, generator=torch.Generator().manual_seed(0))).half()
    (gate,), (expected,) = SimAM(4).gates(x), SimAM(4).gates(x.double())
    torch.testing.assert_close(gate.double(), expected, atol=1e-5, rtol=0)


def test_all_blocks_export_to_onnx(tmp_path):
    """All blocks in sequence, at sizes other than the exported one, down to a single cell."""
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    blocks = nn.Sequential(*(block(32) for block in BLOCKS.values())).eval()
    axes = {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}
    program = torch.export.export(blocks, (torch.randn(2, 32, 6, 7),), dynamic_shapes=(axes,))
    torch.onnx.export(program, (), tmp_path / "blocks.onnx", opset_version=18, dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "blocks.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 32, 1, 1), (3, 32, 13, 4)):
        x = torch.randn(shape)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, blocks(x).numpy(), atol=1e-5)


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
        (EMAAttention, {"factor": 8}, "conv1x1.weight", (16, 16, 1, 1)),
        (ELA, {"kernel_size": 5}, "conv.weight", (128, 1, 5)),
        (MLCA, {"gamma": 1}, "conv_local.weight", (1, 1, 9)),
        (TripletAttention, {"kernel_size": 3}, "along.0.conv.weight", (1, 2, 3, 3)),
    ],
)
def test_block_arguments_shape_the_block(block, arguments, name, shape):
    model = block(128, **arguments)
    assert tuple(model.state_dict()[name].shape) == shape
    assert model(torch.randn(2, 128, 3, 5)).shape == (2, 128, 3, 5)


@pytest.mark.parametrize(
    ("phi", "arguments", "message"),
    [
        (10, {}, r"phi is 10, but must be one of 0 \(none\), 1 \(se\)"),
        (2, {"kernel_size": 5}, "3 or 7"),
        (1, {"kernel_size": 3}, "phi 1"),
        (1, {"ratio": 0}, "ratio is 0"),
        (1, {"ratio": 2.5}, r"ratio of phi 1 \(se\) is 2.5, but must be an integer"),
        (0, {"ratio": 4}, "phi 0 has no attention"),
        (6, {"factor": 3}, "factor of EMA is 3"),
        (7, {"kernel_size": 4}, "must be odd"),
        (8, {"parts": 0}, "parts of MLCA is 0"),
    ],
)
def test_invalid_settings_are_rejected_with_a_reason(phi, arguments, message):
    with pytest.raises(ValueError, match=message):
        YoloBody(MASKS, 20, phi, attention_args=arguments)


def test_parse_phi_accepts_numbers_and_names():
    assert [parse_phi(str(phi)) for phi in ATTENTION] == list(ATTENTION)
    names = ["none", "se", "cbam", "eca", "ca", "simam", "ema", "ela", "mlca", "triplet"]
    assert [parse_phi(name) for name in names] == list(range(10))
    assert parse_phi("SimAM") == 5
    for text in ("10", "-1", "2.0", "", "se_block"):
        with pytest.raises(ValueError, match=rf"phi is {text}, but must be one of 0 \(none\), 1 \(se\)"):
            parse_phi(text)


def test_attention_is_applied_at_the_given_places():
    model = YoloBody(MASKS, 20, 3, places=("feat2",))
    assert [place for place in ATTENTION_PLACES if hasattr(model, f"{place}_att")] == ["feat2"]
    with pytest.raises(ValueError, match="places is empty, but must be one or more of feat1, feat2, upsample"):
        YoloBody(MASKS, 20, 3, places=())


@EVERY_BLOCK
def test_identity_start_equals_phi_0(phi):
    spec = ModelSpec(("a", "b"), ANCHORS, phi=phi)
    plain, attentive = build_model(replace(spec, phi=0)).eval(), build_model(spec).eval()
    missing, unexpected = attentive.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all("_att" in name or "gain" in name for name in missing)
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(attentive(x), plain(x), strict=True):
            torch.testing.assert_close(ours, theirs)
    gated = build_model(replace(spec, identity_start=False)).eval()
    gated.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert not torch.allclose(gated(x)[0], plain(x)[0])


def code_blocks_of_the_docs() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "attention.md").read_text(encoding="utf-8"), re.DOTALL)


def test_documented_block_needs_a_class_and_a_line(devkit, tmp_path, monkeypatch):
    """The example in docs/attention.md is added as a user would, trained and explained."""
    code, line = code_blocks_of_the_docs()
    phi, option, name = re.fullmatch(r'\s*(\d+): AttentionOption\("(\w+)", (\w+)\),\s*', line).groups()
    header = "from torch import Tensor, nn\nfrom nets.attention import AttentionBlock, check_odd\n\n"
    (tmp_path / "block_of_the_docs.py").write_text(header + code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    block = getattr(import_module("block_of_the_docs"), name)
    monkeypatch.setitem(ATTENTION, int(phi), AttentionOption(option, block))
    assert parse_phi(option) == int(phi)
    settings = {"phi": int(phi), "attention_args": {"kernel_size": 5}, "epochs": 1, "val_sets": (), "batch_size": 24}
    folder = train.main(small_run(devkit, run_dir=str(tmp_path / "run"), **settings))
    detector = Detector.load(folder / "last.safetensors")
    assert detector.network.model.feat2_att.conv.kernel_size == (5, 5)
    image = np.zeros((64, 64, 3), np.uint8)
    explanation = Explainer(detector).explain(image, detector(image))
    assert explanation.attention["feat1"].has_spatial
    assert explanation.attention["feat1"].gain is not None


def test_docs_show_diagram_and_cost_of_every_block():
    text = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    for phi, (name, block) in list(ATTENTION.items())[1:]:
        section = " ".join(text.split(f"### phi {phi}: ")[1].split("###")[0].split())
        picture = f"attention_{block.__name__}.png"
        assert f"(images/{picture})" in section
        assert (read_image(ROOT / "docs" / "images" / picture) < 128).mean() > 0.005
        _, gflop = count_cost(YoloBody(MASKS, 20, phi), (416, 416))
        assert f"{PARAMETERS[name]:,} parameters" in section
        assert f"{gflop:.3f} GFLOP" in section
