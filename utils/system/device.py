"""Device, precision and memory."""

import ctypes
import os
import sys
from contextlib import AbstractContextManager, suppress
from importlib.util import find_spec
from math import inf
from pathlib import Path
from shutil import which

import torch

from utils.system.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of glibc's mallopt(3)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OUT_OF_MEMORY = (
    "out of memory",  # CUDA's runtime and driver, NVRTC and torch's allocator
    "can't allocate memory",  # torch's allocator on the CPU
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "nable to find an engine",  # cuDNN, if the workspace of no algorithm fits
)


def choose_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; raises UserError if it is not available."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {name!r}, but must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no CUDA GPU; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # set by torchrun


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype for mixed precision: "bf16", "fp16", "fp32" or "auto", the fastest that the hardware supports."""
    if name != "auto":
        if name not in DTYPES:
            raise UserError(f"precision is {name!r}, but must be one of auto, {', '.join(DTYPES)}")
        if name == "fp16" and device.type == "cpu":
            raise UserError("precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def choose_compile(name: str, device: torch.device) -> bool:
    """Whether to use torch.compile, for "auto", "on" or "off"; raises UserError for "on" without a C compiler."""
    compilers = (os.environ.get("CC", "cc"), os.environ.get("CXX", "c++"), "gcc", "g++", "clang", "clang++", "cl")
    has_compiler = any(map(which, compilers))
    if name == "on" and not has_compiler:
        raise UserError("compile is on, but there is no C compiler; install gcc or clang, or use --compile off")
    if name != "auto" or device.type != "cuda":
        return name == "on"
    return has_compiler and find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


def cpu_has_bf16() -> bool:
    """Whether the CPU has bf16 instructions; without them bf16 is slower than fp32."""
    checks = "_is_avx512_bf16_supported", "_is_amx_tile_supported"  # private, so a version of torch may lack them
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision in `dtype`; disabled for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next training step; mapping it again takes a tenth of a step on the CPU."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # missing in other C libraries
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)


def available_memory() -> float:
    """Bytes of RAM available to this process, subject to a container's limit; infinity if unknown."""
    free = [inf]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    with suppress(OSError, ValueError):  # "max" if there is no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        free.append(limit - int((group / "memory.current").read_text(encoding="ascii")))
    return min(free)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a library reports that memory is exhausted; only torch's own allocators raise a specific class."""
    return any(text in str(error) for text in OUT_OF_MEMORY)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish its work; needed before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
