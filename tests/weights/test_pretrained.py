"""Reading published weights: nothing is executed, names are translated, and what does not fit is reported."""

import os
import time
from zipfile import ZipFile

import pytest
import torch

from nets.spec import ModelSpec
from nets.yolo import YoloBody
from utils.system.errors import UserError
from utils.weights.pretrained import fits_plain_attention, load_all_weights, read_weights, start_from

MASKS = ModelSpec.anchors_mask


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_rejects_files_too_large_for_memory(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    header = b'{"a":{"dtype":"U8","shape":[100000000000],"data_offsets":[0,100000000000]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 10**11)  # a sparse file
    with pytest.raises(UserError, match=f"a{suffix} is too large"):
        read_weights(path)


class Payload:
    executed = False

    def __reduce__(self):
        return (setattr, (Payload, "executed", True))


@pytest.mark.parametrize("content", ["payload", "text", "list", "empty"])
def test_rejects_pth_files_with_more_than_weights_without_executing_them(tmp_path, content):
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


def test_loads_published_names_and_reports_new_parameters(tmp_path):
    source = YoloBody(MASKS, 20, 2)
    theirs = {}
    for name, value in source.state_dict().items():
        old = name.replace("channelattention.fc1", "channelattention.fc.0").replace(
            "channelattention.fc2", "channelattention.fc.2"
        )
        theirs["module." + old.replace("spatialattention.conv1", "spatialattention.conv")] = value
    torch.save(theirs, tmp_path / "published.pth")
    weights = read_weights(tmp_path / "published.pth")
    same = YoloBody(MASKS, 20, 2)
    assert fits_plain_attention(same, weights)
    assert not fits_plain_attention(YoloBody(MASKS, 20, 1), weights)  # another block
    assert not fits_plain_attention(YoloBody(MASKS, 20, 0), weights)
    assert "newly initialized" not in start_from(same, weights, "published.pth")
    for name, value in source.state_dict().items():
        assert torch.equal(same.state_dict()[name], value)
    other_classes = YoloBody(MASKS, 3, 2)
    line = start_from(other_classes, weights, "published.pth")
    assert (
        "newly initialized: yolo_headP4.1.bias, yolo_headP4.1.weight, yolo_headP5.1.bias, yolo_headP5.1.weight" in line
    )


def test_copies_a_gain_only_with_its_block():
    trained = YoloBody(MASKS, 2, 2, identity_start=True)
    with torch.no_grad():
        for gain in trained.attention_gain.values():
            gain.fill_(0.4)
    other = YoloBody(MASKS, 2, 4, identity_start=True)
    line = start_from(other, trained.state_dict(), "a")
    assert "attention_gain.feat1" in line
    assert all(gain == 0 for gain in other.attention_gain.values())
    same = YoloBody(MASKS, 2, 2, identity_start=True)
    start_from(same, trained.state_dict(), "a")
    assert all(gain.item() == pytest.approx(0.4) for gain in same.attention_gain.values())


def test_rejects_weights_of_another_network():
    with pytest.raises(UserError, match="no parameter matches"):
        start_from(YoloBody(MASKS, 2), {"layer.weight": torch.zeros(3)}, "a.pth")


def test_load_all_weights_requires_every_parameter():
    model, source = (YoloBody(MASKS, 2, 1) for _ in range(2))
    weights = source.state_dict() | {"total_ops": torch.zeros(1)}
    lines = load_all_weights(model, weights, "a.pth")
    assert lines == ["loaded 105 of 105 tensors", "not loaded because the network has no such parameter: total_ops"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    del weights["upsample.upsample.0.conv.weight"]
    weights["feat1_att.fc.0.weight"] = torch.zeros(8, 256)
    with pytest.raises(UserError, match=r"a\.pth does not contain all parameters .* loaded 103 of 105") as error:
        load_all_weights(model, weights, "a.pth")
    assert "missing in the file: upsample.upsample.0.conv.weight" in str(error.value)
    assert "wrong shape: feat1_att.fc.0.weight (8, 256) instead of (16, 256)" in str(error.value)


@pytest.mark.parametrize("zipped", [False, True])
def test_rejects_a_pickle_with_a_long_text_quickly(tmp_path, zipped):
    """torch.load would quote the text in its message and search that in quadratic time."""
    path, long = tmp_path / "long.pth", b"c" + b"a" * 100_000 + b"\n"
    torch.save({"weight": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes().replace(b"ctorch._utils\n", long)
    assert long in content
    if zipped:
        with ZipFile(path, "w") as archive:
            archive.writestr("long/data.pkl", long + b"b\n.")
    else:
        path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(UserError, match="more than weights"):
        read_weights(path)
    assert time.process_time() - started < 5


def test_reads_files_of_old_torch_versions(tmp_path):
    weights = {"a": torch.rand(3), "b": torch.arange(4)}
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(read_weights(tmp_path / "old.pth"), weights)
