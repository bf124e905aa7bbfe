"""What `--explain` shows: maps where the right answer is known, and the files that a user gets."""

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
from utils.reports.explain import HEADS, Attended, Explainer, attend, weigh
from utils.reports.panels import MIN_RANGE, View, draw_panel, scale_of
from utils.system.errors import UserError
from utils.weights.checkpoint import Checkpoint, save_checkpoint


def test_cells_are_spread_over_the_pixels_of_the_image():
    row = torch.tensor([[[0.0, 1.0]]])  # two cells of 2x4 pixels each
    whole = project_to_image(row, Fit(1, 1, 0, 0), (4, 4), (4, 4))
    np.testing.assert_allclose(whole, np.broadcast_to([0, 0.25, 0.75, 1], (1, 4, 4)), atol=1e-6)
    column = torch.tensor([[[0.0], [4.0], [8.0], [0.0]]])  # a cell for each row, of which the middle two are the image
    inner = project_to_image(column, Fit(1, 1, 0, 1), (4, 4), (2, 4))
    np.testing.assert_allclose(inner, np.broadcast_to([[4], [8]], (1, 2, 4)), atol=1e-5)
    twice = project_to_image(row, Fit(0.5, 0.5, 0, 0), (4, 4), (8, 8))[0, 0]
    np.testing.assert_allclose(twice, [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1], atol=1e-6)


def test_the_gain_scales_what_the_gates_do():
    gates = torch.tensor([0.5, 1.0]).view(1, 2, 1, 1), torch.tensor([[[[0.5], [1.0]]]])
    features = torch.ones(1, 2, 2, 3)
    plain, mild = Attended(features, gates, None), Attended(features, gates, 0.2)
    torch.testing.assert_close(plain.factor[0, :, :, 0], torch.tensor([[0.25, 0.5], [0.5, 1.0]]))
    torch.testing.assert_close(mild.factor[0, :, :, 0], torch.tensor([[0.85, 0.9], [0.9, 1.0]]))
    assert plain.has_spatial
    assert plain.has_channel
    assert not Attended(features, gates[:1], None).has_spatial
    assert not Attended(features, gates[1:], None).has_channel


def test_a_scale_does_not_blow_up_small_differences():
    assert scale_of(torch.tensor([0.25, 0.75])) == (0.25, 0.75)
    low, high = scale_of(torch.tensor([1.0021, 1.0023]))
    assert high - low == pytest.approx(MIN_RANGE)
    assert (low + high) / 2 == pytest.approx(1.0022)


def test_features_are_weighed_by_gradients():
    features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [0.0, 1.0]]]])
    cells = weigh(features, torch.tensor([2.0, -4.0]).view(1, 2, 1, 1))  # 2 - 4 = -2, 4, 6, 8 - 4 = 4
    torch.testing.assert_close(cells, torch.tensor([[0, 2 / 3], [1, 2 / 3]]))
    assert not weigh(features, torch.full((1, 2, 1, 1), -1.0)).any()


class Brightness(nn.Module):
    """A backbone whose features all are how bright a cell is, from -1 to 1."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        gray = 2 * pixels.mean(dim=1, keepdim=True) - 1
        return avg_pool2d(gray, 16).expand(-1, 256, -1, -1), avg_pool2d(gray, 32).expand(-1, 512, -1, -1)


def test_a_planted_gate_lights_the_planted_place():
    """A bright square on black, letterboxed: 320x200 at half size, 30 rows of padding above it."""
    model = YoloBody(MASKS, 2, phi=2).eval()
    model.backbone = Brightness()
    for place in ("feat1", "feat2"):
        block = getattr(model, f"{place}_att")
        nn.init.zeros_(block.channelattention.fc2.weight)  # so that each channel's gate is a half
        nn.init.zeros_(block.spatialattention.conv1.weight)
        block.spatialattention.conv1.weight.data[0, 1, 3, 3] = 40  # of the maximum over the channels, right here
    image = np.zeros((200, 320, 3), np.uint8)
    square = np.s_[68:132, 128:192]  # in the input rows 64 to 96 and columns 64 to 96
    image[square] = 255
    fitted, fit = fit_image(image, (160, 160), letterbox=True)
    attention = attend(model, torch.from_numpy(fitted).permute(2, 0, 1)[None] / 255)
    for place in ("feat1", "feat2"):
        (lit,) = project_to_image(attention[place].factor.mean(dim=1), fit, (160, 160), (200, 320))
        outside = np.ones((200, 320), bool)
        outside[square] = False
        assert (lit[outside] < 0.25).all()
        np.testing.assert_array_equal(np.flatnonzero(lit[100] > 0.25), range(128, 192))
        np.testing.assert_array_equal(np.flatnonzero(lit[:, 160] > 0.25), range(68, 132))
        np.testing.assert_allclose([lit.min(), lit.max()], [0, 0.5], atol=1e-2)


def test_maps_shift_with_the_object():
    """An untrained network on gray: nothing but the object can tell places apart, far from the edges."""
    torch.manual_seed(0)
    spec = ModelSpec(("a", "b"), ANCHORS, phi=4, identity_start=False, input_size=(576, 576))
    model = build_model(spec)
    for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
        norm.momentum = 1.0  # what it sees next, so that features neither fade nor grow
    model.train()(torch.rand(2, 3, 96, 96))
    explainer = Explainer(Detector(TorchNetwork(model, spec, torch.device("cpu")), spec))
    patch = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    found, middle = [], np.s_[208:336, 208:304]
    for left in (232, 296):
        image = np.full((576, 576, 3), 128, np.uint8)
        image[268:308, left : left + 40] = patch
        box = np.float32([[left, 268, left + 40, 308]])
        detections = sv.Detections(box, confidence=np.ones(1, np.float32), class_id=np.zeros(1, int))
        explanation = explainer(image, detections)
        (cause,) = explanation.causes
        maps = [*explanation.objectness.values(), cause.grad_cam, cause.evidence]
        found.append([project_to_image(cells[None], explanation.fit, (576, 576), (576, 576))[0] for cells in maps])
    for before, after in zip(*found, strict=True):
        assert np.ptp(before[middle]) > 1e-4
        np.testing.assert_allclose(after[208:336, 272:368], before[middle], atol=1e-3)  # CA's gates see the whole row
    evidence = found[0][3]
    row, column = np.unravel_index(evidence.argmax(), evidence.shape)
    assert 220 <= row < 356
    assert 184 <= column < 320


def test_a_detection_is_traced_to_the_prediction_it_came_from():
    torch.manual_seed(0)
    spec = ModelSpec(("a", "b"), ANCHORS, input_size=(64, 96))
    explainer = Explainer(Detector(TorchNetwork(build_model(spec), spec, torch.device("cpu")), spec))
    with torch.no_grad():
        outputs = explainer.model(torch.rand(1, 3, 64, 96))
    levels = dict(zip(HEADS, head_levels(spec), strict=True))
    everything, scores = decode_heads(outputs, tuple(levels.values()), spec.scale_xy)
    for number in (0, 17, 20, 60):  # of the 18 of P5 and 72 of P4
        head, index = explainer.find_cell(outputs, everything[0, number], 1)
        boxes, logits = decode_head(outputs[HEADS.index(head)], levels[head], spec.scale_xy)
        torch.testing.assert_close(boxes[0, index], everything[0, number])
        score = logits[0, index, 0].sigmoid() * logits[0, index, 2].sigmoid()
        torch.testing.assert_close(score, scores[0, number, 1])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """An untrained CBAM network, which finds something everywhere, and a picture."""
    folder = tmp_path_factory.mktemp("explain")
    torch.manual_seed(0)
    spec = ModelSpec(("$disc", "_square"), ANCHORS, phi=2, input_size=(64, 96))
    save_checkpoint(folder / "best.safetensors", Checkpoint(spec, build_model(spec).state_dict(), {"epoch": 1}, {}))
    write_image(folder / "a photo.png", np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8))
    return predict.Config(
        (str(folder / "a photo.png"),), str(folder / "best.safetensors"), str(folder / "out"), explain=True,
        confidence=0.05, device="cpu", precision="fp32",
    )  # fmt: skip


def test_a_panel_and_its_arrays_are_written(config, tmp_path):
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
def test_networks_without_some_maps_have_a_panel_too(phi, tmp_path):
    spec = ModelSpec(("a",), ANCHORS, phi=phi, input_size=(32, 32))
    detector = Detector(TorchNetwork(build_model(spec), spec, torch.device("cpu")), spec, Thresholds(1.0))
    image = np.zeros((40, 20, 3), np.uint8)
    explanation = Explainer(detector)(image, detector(image))
    draw_panel(View(image, explanation), detector(image), explanation, ("a",), tmp_path / "panel.png")
    assert read_image(tmp_path / "panel.png").std() > 20


def test_what_cannot_be_explained_is_refused(config, expect_failure, tmp_path):
    flags = [*config.source, "--weights", config.weights, "--out", tmp_path / "out", "--device", "cpu", "--explain"]
    expect_failure(predict, [*flags, "--tile", 64], "leave out --tile")
    expect_failure(predict, [*flags, "--flip"], "explain looks into the layers of a checkpoint", "leave out --compile")
    expect_failure(predict, [*flags, "--compile", "on"], "explain looks into the layers of a checkpoint")
    exported = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"give a \.safetensors"):
        Explainer(Detector(exported, ModelSpec(("a",), ANCHORS)))
    film = VideoWriter(tmp_path / "film.mp4", Fraction(25), (64, 64))
    film.write(np.zeros((64, 64, 3), np.uint8), 0)
    film.close()
    expect_failure(predict, [tmp_path / "film.mp4", *flags[1:]], "explain draws images", "film.mp4 is a video")
