"""Devices and compilation are chosen, or rejected in one sentence, based on what torch and the system report."""

import sys
import sysconfig
import warnings
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from tests.conftest import NoSettings
from utils.system import device as device_module
from utils.system.device import choose_compile, choose_device, describe_memory, has_kernels, print_notice, shorten_error
from utils.system.distributed import join_process_group
from utils.system.errors import UserError

WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # torch 2.15 with CUDA 13
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"
OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: ..."
)
BAD_SETUP = (
    "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that "
    "might have already set an error? Error 802: system not yet initialized"
)
HIDDEN = "CUDA unknown error - this may be due to an incorrect environment, e.g. changing env variable. Setting"
GB = 10**9


@dataclass
class FakeGpus:
    """What torch.cuda reports."""

    capabilities: tuple[tuple[int, int], ...] = ((8, 6),)
    error: str = ""  # raised when CUDA is initialized
    built: bool = True
    driver: bool = True
    current: int = 0

    def init(self) -> None:
        warnings.warn("a long warning of torch", stacklevel=1)
        if self.error:
            raise RuntimeError(self.error)

    def is_available(self) -> bool:
        warnings.warn("CUDA initialization: a long warning of torch", stacklevel=1)
        return not self.error

    def set_device(self, device: torch.device) -> None:
        self.current = device.index


@pytest.fixture
def gpus(monkeypatch) -> FakeGpus:
    fake = FakeGpus()
    answers = {
        "init": fake.init,
        "is_available": fake.is_available,
        "is_initialized": lambda: False,
        "device_count": lambda: len(fake.capabilities),
        "get_device_capability": lambda device: fake.capabilities[
            device if isinstance(device, int) else device.index or 0
        ],
        "get_arch_list": lambda: WHEEL,
        "set_device": fake.set_device,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: fake.built)
    monkeypatch.setattr(device_module, "which", lambda name: "/bin/nvidia-smi" if fake.driver else None)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    print_notice.cache_clear()
    return fake


@pytest.mark.parametrize(
    ("capability", "in_wheel", "in_old_wheel"),
    [
        ((7, 0), False, True), ((7, 5), True, True), ((8, 6), True, True), ((8, 9), True, True), ((9, 0), True, True),
        ((10, 3), True, True), ((12, 0), True, True), ((6, 1), False, False),
    ],
)  # fmt: skip
def test_finds_kernels_for_gpu(capability, in_wheel, in_old_wheel):
    assert has_kernels(capability, WHEEL) == in_wheel
    assert has_kernels(capability, ["sm_70", "sm_80", "sm_90a", "compute_90"]) == in_old_wheel


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((9, 0), ["sm_90a"], True), ((12, 1), ["sm_120f"], True), ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False), ((9, 0), ["compute_80"], True), ((7, 5), ["compute_80"], False),
        ((9, 0), ["gfx90a"], True), ((9, 0), [], True),
    ],
)  # fmt: skip
def test_reads_names_of_architectures(capability, architectures, expected):
    assert has_kernels(capability, architectures) == expected


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch was built without CUDA")
def test_installed_torch_has_kernels_for_current_gpus():
    architectures = torch._C._cuda_getArchFlags().split()
    assert all(has_kernels(capability, architectures) for capability in ((8, 0), (8, 6), (8, 9), (9, 0)))


@pytest.mark.parametrize(
    ("name", "environment", "expected"),
    [
        ("auto", {}, 0), ("cuda", {}, 0), ("cuda:0", {}, 0), ("cuda:1", {}, 1),
        ("auto", {"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1), ("cuda", {"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1),
        ("cuda:1", {"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, 1),
    ],
)  # fmt: skip
def test_chooses_gpu_and_makes_it_the_current_one(gpus, monkeypatch, capsys, name, environment, expected):
    gpus.capabilities = (8, 6), (9, 0)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert choose_device(name) == torch.device("cuda", expected)
    assert gpus.current == expected
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:-1", "cuda:a", "cuda:0:1", "CUDA", "gpu", ""])
def test_rejects_unknown_device(gpus, name):
    with pytest.raises(UserError, match=f"device is '{name}', but must be auto, cpu, cuda or cuda:N"):
        choose_device(name)


PROBLEMS = {
    "no driver": ({"error": NO_DRIVER}, "Found no NVIDIA driver on your system; install the NVIDIA driver"),
    "old driver": (
        {"error": OLD_DRIVER},
        r"is too old \(found version 11040\); update the driver, or install PyTorch for an older CUDA version",
    ),
    "bad setup": ({"error": BAD_SETUP}, "GPU: Error 802: system not yet initialized; check that nvidia-smi lists"),
    "no GPU": ({"error": "No CUDA GPUs are available"}, "No CUDA GPUs are available; .* CUDA_VISIBLE_DEVICES"),
    "CPU build": ({"built": False}, "built without CUDA; install the CUDA build from pytorch.org/get-started/locally"),
    "old GPU": (
        {"capabilities": ((6, 1),)},
        "GPU 0 has compute capability 6.1, which this PyTorch does not support .only sm_75, .*older CUDA version",
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("state", "words"), PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "auto"])
def test_unusable_gpu_is_an_error_or_a_notice(gpus, capsys, name, state, words):
    vars(gpus).update(state)
    if name == "auto":
        assert choose_device(name) == choose_device(name) == torch.device("cpu")
    else:
        with pytest.raises(UserError, match=f"^device is {name}, but .*{words}.*, or use --device cpu$"):
            choose_device(name)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (name == "auto")  # once, although the device was chosen twice
    for line in lines:
        assert line.startswith("note: using the CPU, because ")


def test_silently_uses_the_cpu_without_a_gpu(gpus, monkeypatch, capsys):
    gpus.driver, gpus.error = False, NO_DRIVER
    monkeypatch.setattr(device_module, "Path", lambda _: type("NoFolder", (), {"exists": lambda _: False})())
    assert choose_device("auto") == torch.device("cpu")
    assert capsys.readouterr().err == ""


def test_the_cpu_is_used_without_asking_for_gpus(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", lambda: pytest.fail("CUDA was initialized"))
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:2"])
def test_reports_how_many_gpus_there_are(gpus, monkeypatch, name):
    gpus.capabilities = (8, 6), (9, 0)
    if name != "cuda:2":  # the third process of torchrun
        monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="there is no GPU 2, since torch finds only 2, numbered from 0"):
        choose_device(name)


def test_a_gpu_cannot_be_selected_for_all_processes(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device is cuda:0, but each torchrun process uses its own GPU"):
        choose_device("cuda:0")


def test_only_the_main_process_prints_notices(gpus, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    gpus.built = False
    choose_device("auto")
    assert capsys.readouterr().err == ""


def test_macs_use_the_cpu(gpus, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    gpus.driver = False
    assert choose_device("auto") == torch.device("cpu")
    assert "using the CPU, because Mac GPUs are not supported" in capsys.readouterr().err
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"device is {name}, but Mac GPUs are not supported"):
            choose_device(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HIDDEN, HIDDEN.removesuffix(". Setting")),
        ("first line\n\nsecond line", "first line"),
        ("CUDA driver initialization failed, you might not have a CUDA gpu.", None),
    ],
)
def test_shortens_errors(text, expected):
    assert shorten_error(RuntimeError(text)) == (expected or text.rstrip("."))


@pytest.fixture
def tools(gpus, monkeypatch, tmp_path) -> set[str]:
    """The names of what is installed."""
    installed = {"gcc", "g++", "triton", "Python.h"}
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(device_module, "which", lambda name: name if name in installed else None)
    monkeypatch.setattr(device_module, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(
        sysconfig, "get_path", lambda *_: str(tmp_path if "Python.h" in installed else tmp_path / "missing")
    )
    return installed


@pytest.mark.parametrize(
    ("kind", "missing", "words"),
    [
        ("cuda", "gcc", "the compiler gcc or clang is missing; install it"),
        ("cuda", "triton", "Triton is missing; install the package triton"),
        ("cuda", "Python.h", r"Python.h is missing; install python3\.\d+-dev .*or python3-devel"),
        ("cuda", "a new GPU", "needs a GPU with compute capability 7.0 or higher"),
        ("cpu", "g++", r"the compiler g\+\+ is missing; install it"),
        ("cpu", "Python.h", "Python.h is missing"),
    ],
)
def test_compilation_needs_tools(gpus, tools, capsys, kind, missing, words):
    device = torch.device(kind)
    assert choose_compile("on", device)
    assert choose_compile("auto", device) == (kind == "cuda")
    tools.discard(missing)
    if missing == "a new GPU":
        gpus.capabilities = ((6, 1),)
    with pytest.raises(UserError, match=f"compile is on, but .*{words}.*, or use --compile off"):
        choose_compile("on", device)
    assert capsys.readouterr().err == ""
    assert not choose_compile("auto", device)
    assert not choose_compile("off", device)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (kind == "cuda")  # nothing is compiled on the CPU by default
    assert all(line.startswith("note: not using torch.compile, because ") for line in lines)


@pytest.mark.parametrize(("variable", "kind"), [("CC", "cuda"), ("CXX", "cpu")])
@pytest.mark.parametrize(("command", "exists"), [("mycc", True), ("mycc -m64", True), ("ccache mycc", False)])
def test_compiler_can_be_set_in_environment(tools, monkeypatch, variable, kind, command, exists):
    monkeypatch.setenv(variable, command)
    tools.add("mycc")
    with nullcontext() if exists else pytest.raises(UserError, match=f"the compiler {command} is missing"):
        assert choose_compile("on", torch.device(kind))


MEMORY_ERRORS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "GET was unable to find an engine to execute this computation",
)


@pytest.mark.parametrize("text", MEMORY_ERRORS)
def test_full_gpu_is_reported_with_the_memory_of_other_processes(call_script, monkeypatch, text):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2 * GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 * GB)

    def main(_):
        raise RuntimeError(text)

    outcome = call_script(main, NoSettings)
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "the GPU is out of memory (other processes use 19.0 of 24.0 GB" in outcome.errors[0]
    assert "--device cuda:N, use --device cpu" in outcome.errors[0]
    assert ("memory" in text) or text in outcome.errors[0]  # the cause may be different


def test_full_ram_is_reported(call_script):
    def main(_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1000 bytes")

    outcome = call_script(main, NoSettings)
    assert outcome.code == 2
    assert "there is not enough memory (RAM)" in outcome.errors[0]


def test_other_errors_keep_their_traceback(call_script):
    def main(_):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        call_script(main, NoSettings)


def test_memory_is_not_described_if_it_is_unknown(monkeypatch):
    def fail():
        raise RuntimeError("CUDA error: out of memory")

    error = RuntimeError(MEMORY_ERRORS[0])
    assert describe_memory(error) == ""  # CUDA is not initialized
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert describe_memory(error) == ""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (23 * GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: GB // 2)
    assert describe_memory(error) == ""  # what CUDA itself needs


@pytest.mark.parametrize(
    ("kind", "has_nccl", "backend"),
    [("cuda", True, "cpu:gloo,cuda:nccl"), ("cuda", False, "gloo"), ("cpu", True, "gloo")],
)
def test_processes_communicate_through_gloo_where_there_is_no_nccl(monkeypatch, kind, has_nccl, backend):
    used = []
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda name, **_: used.append(name))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr("utils.system.distributed.choose_device", torch.device)
    with join_process_group(kind):
        assert used == [backend]
