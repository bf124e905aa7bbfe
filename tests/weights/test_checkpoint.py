"""Checkpoints and foreign weights: whole, checked, and nothing executed."""

import os

import pytest
import torch
from safetensors.torch import save_file

from nets.spec import ModelSpec
from nets.yolo import YoloBody, build_model
from tests.conftest import ANCHORS
from utils.system.errors import UserError
from utils.weights.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.weights.pretrained import fill, fits_plain_attention, read_weights, start_from

SPEC = ModelSpec(("cat", "dög"), ANCHORS, phi=2, attention_args={"ratio": 4}, input_size=(64, 96), letterbox=True)


@pytest.fixture
def saved(tmp_path):
    model = build_model(SPEC)
    path = tmp_path / "a.safetensors"
    training = {"model/x": torch.arange(3), "optimizer/0/step": torch.tensor(4.0)}
    save_checkpoint(path, Checkpoint(SPEC, model.state_dict(), {"epoch": 3}, training))
    return path, model


def test_round_trip(saved):
    path, model = saved
    checkpoint = load_checkpoint(path)
    assert checkpoint.spec == SPEC
    assert checkpoint.info == {"epoch": 3}
    assert checkpoint.training["model/x"].tolist() == [0, 1, 2]
    loaded = checkpoint.build_model(path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_what_would_fill_the_memory_is_not_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    header = b'{"a":{"dtype":"U8","shape":[100000000000],"data_offsets":[0,100000000000]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 10**11)  # of zeros, which take no room
    with pytest.raises(UserError, match=f"a{suffix} is too large"):
        read_weights(path)


@pytest.mark.parametrize("at", [0.3, 0.6, 0.99])
def test_damage_is_found(saved, at):
    path, _ = saved
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)
    path.write_bytes(content[: int(len(content) * at)])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)


def test_other_files_are_no_checkpoints(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="no checkpoint of train"):
        load_checkpoint(tmp_path / "foreign.safetensors")


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    path, _ = saved
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match="No space left on device"):
        save_checkpoint(path, Checkpoint(SPEC, {}, {}, {}))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


class Payload:
    executed = False

    def __reduce__(self):
        return (setattr, (Payload, "executed", True))


@pytest.mark.parametrize("content", ["payload", "text", "list", "empty"])
def test_pth_files_that_hold_more_than_weights(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content == "payload":
        torch.save({"a": Payload()}, path)
    elif content == "text":
        path.write_text("hello")
    elif content == "list":
        torch.save([torch.zeros(1)], path)
    else:
        path.touch()
    with pytest.raises(UserError, match=r"weights\.pth"):
        read_weights(path)
    assert not Payload.executed


def test_published_names_load(tmp_path):
    source = YoloBody(SPEC.anchors_mask, 20, 2)
    theirs = {}
    for name, value in source.state_dict().items():
        old = name.replace("channelattention.fc1", "channelattention.fc.0").replace(
            "channelattention.fc2", "channelattention.fc.2"
        )
        theirs["module." + old.replace("spatialattention.conv1", "spatialattention.conv")] = value
    torch.save(theirs, tmp_path / "published.pth")
    weights = read_weights(tmp_path / "published.pth")
    same = YoloBody(SPEC.anchors_mask, 20, 2)
    assert fits_plain_attention(same, weights)
    assert not fits_plain_attention(YoloBody(SPEC.anchors_mask, 20, 1), weights)  # another block
    assert not fits_plain_attention(YoloBody(SPEC.anchors_mask, 20, 0), weights)
    assert "fresh" not in start_from(same, weights, "published.pth")
    for name, value in source.state_dict().items():
        assert torch.equal(same.state_dict()[name], value)
    other_classes = YoloBody(SPEC.anchors_mask, 3, 2)
    line = start_from(other_classes, weights, "published.pth")
    assert "fresh: yolo_headP4.1.bias, yolo_headP4.1.weight, yolo_headP5.1.bias, yolo_headP5.1.weight" in line


def test_a_gain_comes_only_with_its_block():
    trained = YoloBody(SPEC.anchors_mask, 2, 2, identity_start=True)
    with torch.no_grad():
        for gain in trained.attention_gain.values():
            gain.fill_(0.4)
    other = YoloBody(SPEC.anchors_mask, 2, 4, identity_start=True)
    line = start_from(other, trained.state_dict(), "a")
    assert "attention_gain.feat1" in line
    assert all(gain == 0 for gain in other.attention_gain.values())
    same = YoloBody(SPEC.anchors_mask, 2, 2, identity_start=True)
    start_from(same, trained.state_dict(), "a")
    assert all(gain.item() == pytest.approx(0.4) for gain in same.attention_gain.values())


def test_nothing_that_fits():
    with pytest.raises(UserError, match="no parameter fits"):
        start_from(YoloBody(SPEC.anchors_mask, 2), {"layer.weight": torch.zeros(3)}, "a.pth")


def test_a_network_is_filled_or_refused():
    model, source = (YoloBody(SPEC.anchors_mask, 2, 1) for _ in range(2))
    weights = source.state_dict() | {"total_ops": torch.zeros(1)}
    lines = fill(model, weights, "a.pth")
    assert lines == ["105 of 105 tensors loaded", "not loaded, since this network has none of that name: total_ops"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    del weights["upsample.upsample.0.conv.weight"]
    weights["feat1_att.fc.0.weight"] = torch.zeros(8, 256)
    with pytest.raises(UserError, match=r"a\.pth does not fill the network: 103 of 105") as error:
        fill(model, weights, "a.pth")
    assert "missing in the file: upsample.upsample.0.conv.weight" in str(error.value)
    assert "of another shape: feat1_att.fc.0.weight (8, 256) instead of (16, 256)" in str(error.value)
