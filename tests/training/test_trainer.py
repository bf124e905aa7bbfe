"""Training steps wait for no values on the host, stay on their device, and launch few kernels; checked without a GPU.

Meta tensors have no values to read. Imitated CUDA tensors have none either, and cannot be combined with CPU tensors.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd.profiler_util import FunctionEvent
from torch.optim import optimizer
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import train
from nets.attention import ATTENTION, build_attention
from nets.spec import ModelSpec
from nets.yolo import YoloBody, build_model
from tests.conftest import ANCHORS
from tests.data.test_augment import GEOMETRY, in_memory
from tests.narrow_network import use_narrow_network
from utils.data.augment import BatchPlan, render_pixels
from utils.data.loader import EpochBatches
from utils.detection.anchors import decode_heads
from utils.system.device import side_stream
from utils.system.distributed import ProcessGroup
from utils.training.optim import build_optimizer
from utils.training.run_folder import RunFolder
from utils.training.trainer import Batching, Trainer, build_trainer
from utils.training.training_state import Progress

CPU, META, GPU = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)
SIZE, BATCH = (64, 64), 2
HOST_READS = {f"aten::{name}" for name in ("_local_scalar_dense", "_unique2", "bincount", "masked_select", "nonzero")}
READS_ON_CPU_ONLY = {"aten::_fused_adamw_"}
MAX_OPTIMIZER_OPERATIONS, MAX_RENDER_OPERATIONS = 115, 175  # a loop over the weights or images exceeds them
ignore_copies = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # by copy.deepcopy


class Operations(TorchDispatchMode):
    """Counts the operations that would launch kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "aten" and not func.is_view
        return func(*args, **(kwargs or {}))


def make_trainer(phi: int, device: torch.device, precision: str) -> Trainer:
    """A trainer that takes a step every two batches."""
    spec = ModelSpec(("a", "b", "c"), ANCHORS, phi=phi, input_size=SIZE)
    settings, batching = train.Config(precision=precision, compile="off"), Batching.plan(2 * BATCH, BATCH, 2 * BATCH)
    trainer = build_trainer(settings, spec, batching, Progress(end=2), device, ProcessGroup())
    trainer.set_mode(frozen=False)
    return trainer


def make_batches() -> EpochBatches:
    """Mosaics of images with two objects each."""
    boxes = torch.tensor([[10.0, 10, 50, 40], [40, 20, 90, 60]]).expand(2 * BATCH, -1, -1)
    images, labels = torch.zeros(len(boxes), 3, *SIZE, dtype=torch.uint8), torch.ones(boxes.shape[:2], dtype=torch.long)
    return EpochBatches(in_memory(images, boxes, labels), BATCH, 0, 0, GEOMETRY, ProcessGroup())


def take_step(trainer: Trainer, images: Tensor, boxes: Tensor, labels: Tensor) -> None:
    """Accumulate a batch twice, take a step, and save and restore the state after it."""
    for number in range(trainer.batching.accumulate):
        trainer.state.losses[number] = trainer.backward(images, boxes, labels)
    trainer.state.step()
    trainer.take_snapshot()
    trainer.roll_back()


@pytest.mark.parametrize("phi", ATTENTION)
def test_step_needs_no_values(phi, monkeypatch):
    monkeypatch.setattr("utils.training.trainer.autocast", lambda *_: nullcontext())  # has no mode for meta tensors
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    trainer = make_trainer(phi, META, "fp32")
    plan = make_batches().plan(0)
    take_step(trainer, torch.empty(BATCH, 3, *SIZE, device=META), plan.boxes.to(META), plan.labels.to(META))
    saved = trainer.snapshot.weights | trainer.snapshot.training
    assert {value.device for value in saved.values()} == {META}
    assert trainer.batching.accumulate == 2
    assert trainer.snapshot.info["averaged"] == trainer.state.ema.updates == 1


def test_step_does_not_read_values(monkeypatch):
    """Not even within an operation or its backward pass, which only a profile shows."""
    blocks = [build_attention(phi, 32, {}) for phi in ATTENTION if phi]
    use_narrow_network(monkeypatch)
    trainer, plan = make_trainer(0, CPU, "fp32"), make_batches().plan(0)
    with profile() as profiled:
        images = torch.stack(render_pixels(plan), dim=1) / 255
        take_step(trainer, images.contiguous(memory_format=torch.channels_last), plan.boxes, plan.labels)
        sum(block(torch.rand(2, 32, 8, 8)).sum() for block in blocks).backward()
    events = profiled.events()
    assert {"aten::index", "aten::convolution_backward", *READS_ON_CPU_ONLY} <= {event.name for event in events}
    reads = [[event.name, *callers(event)] for event in events if event.name in HOST_READS]
    assert [names for names in reads if READS_ON_CPU_ONLY.isdisjoint(names)] == []


def callers(event: FunctionEvent) -> Iterator[str]:
    """The names of what an event of a profile happened in, innermost first."""
    while event := event.cpu_parent:
        yield event.name


@ignore_copies
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_step_stays_on_the_gpu(dtype, monkeypatch):
    trainer, reads = None, []

    def backward(loss: Tensor) -> None:  # torch's needs a GPU
        assert loss.requires_grad
        for parameter in trainer.state.model.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: dtype == torch.bfloat16)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(FakeTensor, "backward", backward, raising=False)
    monkeypatch.setattr(FakeTensor, "item", lambda _: reads.append(1) or 0.0)
    model, plan = build_model(ModelSpec(("a", "b", "c"), ANCHORS)), make_batches().plan(0)
    blocks = [build_attention(phi, 32, {}) for phi in ATTENTION if phi]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to(GPU, memory_format=torch.channels_last)
        monkeypatch.setattr("utils.training.trainer.build_model", lambda _: model)
        monkeypatch.setattr(YoloBody, "to", lambda self, *_, **__: self)  # torch converts imitated tensors only once
        trainer, plan = make_trainer(0, GPU, "auto"), BatchPlan(*(value.to(GPU) for value in plan))
        with Operations() as operations:
            images = trainer.render(plan)
        assert operations.count <= MAX_RENDER_OPERATIONS
        take_step(trainer, images, plan.boxes, plan.labels)
        with torch.autocast("cuda", trainer.dtype):
            heads = trainer.state.ema.module.eval()(images)
            outputs = [block.to(GPU)(torch.empty(2, 32, 8, 8, device=GPU)) for block in blocks]
        boxes, scores = decode_heads(heads, trainer.loss.levels, trainer.spec.scale_xy)
    assert {value.device for value in (boxes, scores, *outputs, *trainer.snapshot.training.values())} == {GPU}
    assert {head.dtype for head in heads} == {dtype}
    # GradScaler reads one value in a step, and two for a snapshot
    assert len(reads) == (3 if dtype == torch.float16 else 0)


def test_optimizer_launches_few_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    model = build_model(ModelSpec(("a", "b", "c"), ANCHORS))
    with FakeTensorMode(allow_non_fake_inputs=True):
        muon = build_optimizer(model.to(GPU, memory_format=torch.channels_last), 0.1, 0.1)
        for _ in range(2):  # the first step also creates the state
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            with Operations() as operations:
                muon.step()
    assert operations.count <= MAX_OPTIMIZER_OPERATIONS


def test_epochs_and_checkpoints_share_a_stream(monkeypatch, tmp_path):
    """Each stream keeps the memory that was allocated in it."""
    for name in ("Stream", "stream", "set_device", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    torch.cuda.current_stream.return_value.record_event.return_value.device = GPU
    monkeypatch.setattr("utils.data.loader.to_device", MagicMock())
    monkeypatch.setattr("utils.training.run_folder.save_checkpoint", MagicMock())
    side_stream.cache_clear()
    run, snapshot = RunFolder(tmp_path), SimpleNamespace(weights={"": SimpleNamespace(device=GPU)})
    for _ in range(2):
        list(make_batches().load(range(2), GPU, render=MagicMock()))
        run.save_checkpoints(snapshot)
    run.close()
    side_stream.cache_clear()
    assert torch.cuda.stream.call_count == 6
    assert torch.cuda.set_device.call_args_list == [call(GPU)] * 6  # each thread starts with GPU 0
    torch.cuda.Stream.assert_called_once_with(GPU)
