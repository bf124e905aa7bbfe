"""Explanations: maps with known answers, and the files that `--explain` writes."""

from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import supervision as sv
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

import predict
from nets.spec import ModelSpec
from nets.yolo import YoloBody, build_model
from tests.conftest import ANCHORS, MASKS
from utils.data.image_io import fit_image, read_image, write_image
from utils.detection.anchors import decode_head, decode_heads, head_levels
from utils.detection.boxes import project_to_image
from utils.detection.letterbox import Fit
from utils.detection.nms import Thresholds
from utils.inference.backends import TorchNetwork
from utils.inference.detector import Detector
from utils.inference.video import VideoWriter
from utils.reports.explain import HEADS, AttentionMaps, Explainer, compute_attention, compute_cam
from utils.reports.explain_panels import MIN_RANGE, View, draw_panel, find_limits
from utils.system.errors import UserError
from utils.weights.checkpoint import Checkpoint, save_checkpoint


def test_projects_cells_onto_image_pixels():
    row = torch.tensor([[[0.0, 1.0]]])  # two cells of 2x4 pixels each
    whole = project_to_image(row, Fit(1, 1, 0, 0), (4, 4), (4, 4))
    np.testing.assert_allclose(whole, np.broadcast_to([0, 0.25, 0.75, 1], (1, 4, 4)), atol=1e-6)
    column = torch.tensor([[[0.0], [4.0], [8.0], [0.0]]])  # one cell per row; the image covers the middle two
    inner = project_to_image(column, Fit(1, 1, 0, 1), (4, 4), (2, 4))
    np.testing.assert_allclose(inner, np.broadcast_to([[4], [8]], (1, 2, 4)), atol=1e-5)
    twice = project_to_image(row, Fit(0.5, 0.5, 0, 0), (4, 4), (8, 8))[0, 0]
    np.testing.assert_allclose(twice, [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1], atol=1e-6)


def test_gain_scales_effect_of_gates():
    gates = torch.tensor([0.5, 1.0]).view(1, 2, 1, 1), torch.tensor([[[[0.5], [1.0]]]])
    features = torch.ones(1, 2, 2, 3)
    plain, mild = AttentionMaps(features, gates, None), AttentionMaps(features, gates, 0.2)
    torch.testing.assert_close(plain.factor[0, :, :, 0], torch.tensor([[0.25, 0.5], [0.5, 1.0]]))
    torch.testing.assert_close(mild.factor[0, :, :, 0], torch.tensor([[0.85, 0.9], [0.9, 1.0]]))
    assert plain.has_spatial
    assert plain.has_channel
    assert not AttentionMaps(features, gates[:1], None).has_spatial
    assert not AttentionMaps(features, gates[1:], None).has_channel


def test_color_scale_does_not_amplify_small_differences():
    assert find_limits(torch.tensor([0.25, 0.75])) == (0.25, 0.75)
    low, high = find_limits(torch.tensor([1.0021, 1.0023]))
    assert high - low == pytest.approx(MIN_RANGE)
    assert (low + high) / 2 == pytest.approx(1.0022)


def test_cam_weights_features_by_gradients():
    features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [0.0, 1.0]]]])
    cells = compute_cam(features, torch.tensor([2.0, -4.0]).view(1, 2, 1, 1))  # 2 - 4 = -2, 4, 6, 8 - 4 = 4
    torch.testing.assert_close(cells, torch.tensor([[0, 2 / 3], [1, 2 / 3]]))
    assert not compute_cam(features, torch.full((1, 2, 1, 1), -1.0)).any()


class Brightness(nn.Module):
    """A backbone whose features are all the mean brightness of the cell, from -1 to 1."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        gray = 2 * pixels.mean(dim=1, keepdim=True) - 1
        return avg_pool2d(gray, 16).expand(-1, 256, -1, -1), avg_pool2d(gray, 32).expand(-1, 512, -1, -1)


def test_attention_map_shows_planted_gate():
    """A bright square on a black 320x200 image, letterboxed at half size with 30 rows of padding above."""
    model = YoloBody(MASKS, 2, phi=2).eval()
    model.backbone = Brightness()
    for place in ("feat1", "feat2"):
        block = getattr(model, f"{place}_att")
        nn.init.zeros_(block.channelattention.fc2.weight)  # makes all channel gates 1/2
        nn.init.zeros_(block.spatialattention.conv1.weight)
        block.spatialattention.conv1.weight.data[0, 1, 3, 3] = 40  # weight of the center of the channel maximum
    image = np.zeros((200, 320, 3), np.uint8)
    square = np.s_[68:132, 128:192]  # rows and columns 64 to 96 of the input
    image[square] = 255
    fitted, fit = fit_image(image, (160, 160), letterbox=True)
    attention = compute_attention(model, torch.from_numpy(fitted).permute(2, 0, 1)[None] / 255)
    for place in ("feat1", "feat2"):
        (lit,) = project_to_image(attention[place].factor.mean(dim=1), fit, (160, 160), (200, 320))
        outside = np.ones((200, 320), bool)
        outside[square] = False
        assert (lit[outside] < 0.25).all()
        np.testing.assert_array_equal(np.flatnonzero(lit[100] > 0.25), range(128, 192))
        np.testing.assert_array_equal(np.flatnonzero(lit[:, 160] > 0.25), range(68, 132))
        np.testing.assert_allclose([lit.min(), lit.max()], [0, 0.5], atol=1e-2)


def test_maps_move_with_the_object():
    """On a gray image, far from the edges, the output of an untrained network depends on the object only."""
    torch.manual_seed(0)
    spec = ModelSpec(("a", "b"), ANCHORS, phi=4, identity_start=False, input_size=(576, 576))
    model = build_model(spec)
    for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
        norm.momentum = 1.0  # use the statistics of the next batch, so that features neither vanish nor explode
    model.train()(torch.rand(2, 3, 96, 96))
    explainer = Explainer(Detector(TorchNetwork(model, spec, torch.device("cpu")), spec))
    patch = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    found, middle = [], np.s_[208:336, 208:304]
    for left in (232, 296):
        image = np.full((576, 576, 3), 128, np.uint8)
        image[268:308, left : left + 40] = patch
        box = np.float32([[left, 268, left + 40, 308]])
        detections = sv.Detections(box, confidence=np.ones(1, np.float32), class_id=np.zeros(1, int))
        explanation = explainer.explain(image, detections)
        (maps,) = explanation.detections
        cells = [*explanation.objectness.values(), maps.grad_cam, maps.evidence]
        found.append([project_to_image(each[None], explanation.fit, (576, 576), (576, 576))[0] for each in cells])
    for before, after in zip(*found, strict=True):
        assert np.ptp(before[middle]) > 1e-4
        np.testing.assert_allclose(after[208:336, 272:368], before[middle], atol=1e-3)  # CA averages whole rows
    evidence = found[0][3]
    row, column = np.unravel_index(evidence.argmax(), evidence.shape)
    assert 220 <= row < 356
    assert 184 <= column < 320


def test_finds_prediction_behind_a_detection():
    torch.manual_seed(0)
    spec = ModelSpec(("a", "b"), ANCHORS, input_size=(64, 96))
    explainer = Explainer(Detector(TorchNetwork(build_model(spec), spec, torch.device("cpu")), spec))
    with torch.no_grad():
        outputs = explainer.model(torch.rand(1, 3, 64, 96))
    levels = dict(zip(HEADS, head_levels(spec), strict=True))
    everything, scores = decode_heads(outputs, tuple(levels.values()), spec.scale_xy)
    for number in (0, 17, 20, 60):  # P5 has 18 predictions, P4 has 72
        head, index = explainer.find_prediction(outputs, everything[0, number], 1)
        boxes, logits = decode_head(outputs[HEADS.index(head)], levels[head], spec.scale_xy)
        torch.testing.assert_close(boxes[0, index], everything[0, number])
        score = logits[0, index, 0].sigmoid() * logits[0, index, 2].sigmoid()
        torch.testing.assert_close(score, scores[0, number, 1])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Settings for an untrained CBAM network, which detects something everywhere, and an image."""
    folder = tmp_path_factory.mktemp("explain")
    torch.manual_seed(0)
    spec = ModelSpec(("$disc", "_square"), ANCHORS, phi=2, input_size=(64, 96))
    save_checkpoint(folder / "best.safetensors", Checkpoint(spec, build_model(spec).state_dict(), {"epoch": 1}, {}))
    write_image(folder / "a photo.png", np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8))
    return predict.Config(
        (str(folder / "a photo.png"),), str(folder / "best.safetensors"), str(folder / "out"), explain=True,
        confidence=0.05, device="cpu", precision="fp32",
    )  # fmt: skip


def test_writes_panel_and_arrays(config, tmp_path):
    predict.main(replace(config, out=str(tmp_path)))
    panel = read_image(tmp_path / "a photo_explained.png")
    assert panel.shape[1] == 1320
    assert panel.std() > 20
    arrays = np.load(tmp_path / "a photo_explained.npz")
    shapes = {name: arrays[name].shape for name in arrays.files}
    assert shapes["gate/feat1/0"] == (256, 1, 1)
    assert shapes["gate/feat2/1"] == (1, 2, 3)
    assert shapes["features/upsample"] == (128, 4, 6)
    assert shapes["objectness/P5"] == (2, 3)
    assert arrays["gain/feat2"] == 0
    assert {name for name in shapes if name.startswith("evidence")} == {f"evidence/{i}" for i in range(4)}
    np.testing.assert_allclose(arrays["fit"], [96 / 150, 64 / 90, 0, 0])


@pytest.mark.parametrize("phi", [0, 1, 6])
def test_draws_panels_of_networks_without_some_maps(phi, tmp_path):
    spec = ModelSpec(("a",), ANCHORS, phi=phi, input_size=(32, 32))
    detector = Detector(TorchNetwork(build_model(spec), spec, torch.device("cpu")), spec, Thresholds(1.0))
    image = np.zeros((40, 20, 3), np.uint8)
    explanation = Explainer(detector).explain(image, detector(image))
    draw_panel(View(image, explanation), detector(image), explanation, ("a",), tmp_path / "panel.png")
    assert read_image(tmp_path / "panel.png").std() > 20


def test_refuses_sources_and_networks_that_cannot_be_explained(config, expect_failure, tmp_path):
    flags = [*config.source, "--weights", config.weights, "--out", tmp_path / "out", "--device", "cpu", "--explain"]
    expect_failure(predict, [*flags, "--tile", 64], "leave out --tile")
    expect_failure(predict, [*flags, "--tta"], "--explain reads the layers of a checkpoint", "leave out --compile")
    expect_failure(predict, [*flags, "--compile", "on"], "--explain reads the layers of a checkpoint")
    exported = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"pass a \.safetensors"):
        Explainer(Detector(exported, ModelSpec(("a",), ANCHORS)))
    film = VideoWriter(tmp_path / "film.mp4", Fraction(25), (64, 64))
    film.write(np.zeros((64, 64, 3), np.uint8), 0)
    film.close()
    expect_failure(
        predict, [tmp_path / "film.mp4", *flags[1:]], "--explain supports images only", "film.mp4 is a video"
    )
