"""Checkpoints are written atomically and verified when they are read."""

import pytest
import torch
from safetensors.torch import save_file

from nets.spec import ModelSpec
from nets.yolo import build_model
from tests.conftest import ANCHORS
from utils.system.errors import UserError
from utils.weights.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

SPEC = ModelSpec(("cat", "dög"), ANCHORS, phi=2, attention_args={"ratio": 4}, input_size=(64, 96), letterbox=True)


@pytest.fixture
def saved(tmp_path):
    model = build_model(SPEC)
    path = tmp_path / "a.safetensors"
    training = {"model/x": torch.arange(3), "optimizer/0/step": torch.tensor(4.0)}
    save_checkpoint(path, Checkpoint(SPEC, model.state_dict(), {"epoch": 3}, training))
    return path, model


def test_saved_checkpoint_loads_unchanged(saved):
    path, model = saved
    checkpoint = load_checkpoint(path)
    assert checkpoint.spec == SPEC
    assert checkpoint.info == {"epoch": 3}
    assert checkpoint.training["model/x"].tolist() == [0, 1, 2]
    loaded = checkpoint.build_model(path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("at", [0.3, 0.6, 0.99])
def test_detects_changed_and_truncated_files(saved, at):
    path, _ = saved
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)
    path.write_bytes(content[: int(len(content) * at)])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)


def test_rejects_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match="is not a checkpoint"):
        load_checkpoint(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="not a checkpoint of train"):
        load_checkpoint(tmp_path / "foreign.safetensors")


def test_failed_save_keeps_the_old_file(saved, monkeypatch):
    path, _ = saved
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match="No space left on device"):
        save_checkpoint(path, Checkpoint(SPEC, {}, {}, {}))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["a.safetensors"]
