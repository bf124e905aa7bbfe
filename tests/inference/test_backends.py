"""Backends: compiling and flipping compute what they should."""

import pytest
import torch

from utils.inference.backends import CompiledNetwork, FlippedNetwork
from utils.inference.detector import Detector
from utils.system.device import print_notice
from utils.system.errors import UserError


def test_compiled_network_equals_eager_network(weights):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    eager, compiled = (Detector.load(weights, compile=compile).network for compile in ("off", "on"))
    for part in (images, images[:1]):
        for one, other in zip(eager.to_boxes(eager(part)), compiled.to_boxes(compiled(part)), strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    if torch.backends.mkldnn.is_available():  # the weights of all convolutions are constants
        assert counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] == 21


def test_flipped_network_adds_mirrored_boxes_of_each_batch(weights):
    network = Detector.load(weights).network
    flipped = FlippedNetwork(network)
    wide, narrow = (torch.randint(256, (2, 3, 64, width), dtype=torch.uint8) for width in (96, 64))
    outputs = [flipped(wide), flipped(narrow)]  # the width belongs to the outputs, not to the last call
    for images, output in zip((wide, narrow), outputs, strict=True):
        boxes, scores = flipped.to_boxes(output)
        plain, plain_scores = network.to_boxes(network(images))
        mirrored, mirrored_scores = network.to_boxes(network(images.flip(-1)))
        x1, y1, x2, y2 = mirrored.unbind(-1)
        width = images.shape[-1]
        unmirrored = torch.stack([width - x2, y1, width - x1, y2], dim=-1)
        torch.testing.assert_close(boxes, torch.cat([plain, unmirrored], dim=1), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(scores, torch.cat([plain_scores, mirrored_scores], dim=1))


@pytest.fixture
def eager(weights, monkeypatch):
    """A network on which torch.compile fails."""

    def fail(_):
        raise torch._dynamo.exc.TorchDynamoException("CalledProcessError: gcc failed\n\nmore")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    print_notice.cache_clear()
    return Detector.load(weights).network


def test_failed_compilation_falls_back_to_eager_network(eager, capsys):
    images, network = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8), CompiledNetwork(eager)
    for _ in range(2):
        for one, other in zip(eager.to_boxes(eager(images)), network(images), strict=True):
            assert torch.equal(one, other)
    notice = "note: not using torch.compile, because it failed: CalledProcessError: gcc failed\n"
    assert capsys.readouterr().err == notice


def test_failed_compilation_is_an_error_if_it_is_required(eager):
    with pytest.raises(UserError, match=r"compile is on, but torch.compile failed: .*gcc failed; use --compile off"):
        CompiledNetwork(eager, required=True)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_out_of_memory_is_not_a_failed_compilation(eager):
    def fail(_):
        raise torch._dynamo.exc.TorchDynamoException("CUDA out of memory")

    network = CompiledNetwork(eager, required=True)
    network.compiled = fail
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory"):
        network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
