"""Where to compute and in which precision."""

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from importlib.util import find_spec
from math import inf
from pathlib import Path
from shutil import which

import torch

from utils.system.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str) -> torch.device:
    """ "auto", "cpu" or "cuda" -> the device; raises UserError when it is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {name!r}, but must be auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no CUDA GPU here; use --device cpu, or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # which torchrun sets


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """ "auto", "bf16", "fp16" or "fp32" -> the dtype of mixed precision; auto asks the hardware."""
    if name != "auto":
        if name not in DTYPES:
            raise UserError(f"precision is {name!r}, but must be auto, {', '.join(DTYPES)}")
        if name == "fp16" and device.type == "cpu":
            raise UserError("precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def choose_compile(name: str, device: torch.device) -> bool:
    """ "auto", "on" or "off" -> whether to compile; auto does on a GPU where what that needs is there.

    That is a C compiler, and Triton, which knows GPUs since Volta. Raises UserError where "on" lacks the compiler.
    """
    compilers = (os.environ.get("CC", "cc"), os.environ.get("CXX", "c++"), "gcc", "g++", "clang", "clang++", "cl")
    ready = any(map(which, compilers))
    if name == "on" and not ready:
        raise UserError("compile is on, but there is no C compiler; install one (gcc, clang), or use --compile off")
    if name != "auto" or device.type != "cuda":
        return name == "on"
    return ready and find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 itself; without that bf16 is slower than fp32."""
    checks: list[Callable[[], bool] | None] = [
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ]
    return any(check is not None and check() for check in checks)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Mixed precision in `dtype`; does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step, instead of returning it to the system.

    A training step on the CPU frees and takes gigabytes; mapping them anew each time costs a tenth of the step.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; other C libraries have none
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)


def available_memory() -> float:
    """Bytes of RAM that this process may still take: the system's, or less where a container limits it.

    Infinity where the system does not say.
    """
    free = [inf]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        free.append(limit - int((group / "memory.current").read_text(encoding="ascii")))
    return min(free)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; times taken before are not its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
