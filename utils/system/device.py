"""Device, precision and memory."""

import ctypes
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache
from importlib.util import find_spec
from math import inf
from pathlib import Path
from shutil import which
from textwrap import shorten

import torch
from torch import Tensor

from utils.system.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of glibc's mallopt(3)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OUT_OF_MEMORY = (
    "out of memory",  # CUDA's runtime and driver, NVRTC and torch's allocator
    "can't allocate memory",  # torch's allocator on the CPU
    "not enough memory",  # the same on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine",  # cuDNN, if no algorithm's workspace fits
)
INSTALL = "pytorch.org/get-started/locally"
MACS = "Mac GPUs are not supported; use a machine with an NVIDIA GPU"
MIN_TRITON = 7, 0  # compute capability
CURES = {  # by a part of torch's message
    "no NVIDIA driver": "install the NVIDIA driver",
    "too old": f"update the driver, or install PyTorch for an older CUDA version from {INSTALL}",
    "": "check that nvidia-smi lists the GPU and that CUDA_VISIBLE_DEVICES does not hide it",
}
MAX_REASON = 160  # characters, since a reason may contain a whole compiler command
MIN_SHOWN = 1e9  # bytes; CUDA itself needs up to about half of that in each process


def choose_device(name: str) -> torch.device:
    """The device for "auto", "cpu", "cuda" or "cuda:N"; a GPU also becomes the current one. Raises UserError.

    "auto" and "cuda" select the first GPU or, in a process started by torchrun, the GPU with its local rank. "auto"
    falls back to the CPU, with a notice if there is a GPU that torch cannot use.
    """
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", name)
    if name == "mps":
        raise UserError(f"device is mps, but {MACS}, or use --device cpu")
    if not match:
        raise UserError(f"device is {name!r}, but must be auto, cpu, cuda or cuda:N (the GPU with index N)")
    if name == "cpu":
        return torch.device("cpu")
    if match[1] and "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"device is {name}, but each torchrun process uses its own GPU; use --device cuda")
    device = torch.device("cuda", int(match[1] or os.environ.get("LOCAL_RANK", "0")))
    problem = find_gpu_problem(device.index)
    if not problem:
        torch.cuda.set_device(device)
        return device
    if name != "auto":
        raise UserError(f"device is {name}, but {problem}, or use --device cpu")
    if has_gpu():
        print_notice(f"using the CPU, because {problem}")
    return torch.device("cpu")


def find_gpu_problem(index: int) -> str:
    """Why torch cannot use this GPU and what to do, or "" if it can; raises UserError if only other GPUs exist."""
    if sys.platform == "darwin":
        return MACS
    if not torch.backends.cuda.is_built():
        return f"this PyTorch was built without CUDA; install the CUDA build from {INSTALL}"
    try:
        with warnings.catch_warnings(action="ignore"):  # several lines about a driver or GPU that is too old
            torch.cuda.is_available()  # warns in its first call only
            torch.cuda.init()
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        cure = next(cure for text, cure in CURES.items() if text in str(error))
        return f"torch finds no usable CUDA GPU: {shorten_error(error)}; {cure}"
    count = torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"there is no GPU {index}, since torch finds only {count}, numbered from 0; choose one with --device "
            "cuda:N, or set torchrun's --nproc-per-node to the number of GPUs"
        )
    capability, architectures = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    if has_kernels(capability, architectures):
        return ""
    version = ".".join(map(str, capability))
    return (
        f"GPU {index} has compute capability {version}, which this PyTorch does not support "
        f"(only {', '.join(architectures)}); install a build for this GPU from {INSTALL} (old GPUs need an older CUDA "
        "version)"
    )


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether code for `architectures`, such as sm_86 or compute_90, runs on a GPU of (major, minor) `capability`.

    Binary code (sm) runs on its own version and later minor versions of the same major version; PTX (compute) runs on
    its own and all later versions (CUDA Programming Guide, "Binary Compatibility" and "PTX Compatibility"). A list with
    neither is accepted.
    """
    built = re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(architectures))
    versions = [(kind, (int(major), int(minor))) for kind, major, minor in built]
    return not versions or any(
        version <= capability and (kind == "compute" or version[0] == capability[0]) for kind, version in versions
    )


def has_gpu() -> bool:
    """Whether there seems to be a GPU, even if torch cannot use it."""
    if sys.platform == "darwin" or torch.cuda.is_initialized():
        return True
    return which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()


@cache
def print_notice(text: str) -> None:
    """Print a notice on stderr, once per process and only in the main process of a distributed run."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


def shorten_error(error: Exception) -> str:
    """The first sentence of an error from torch, or the error code at its end."""
    code = re.search(r"Error \d+: .+", str(error))
    return code[0] if code else re.split(r"\.\s+(?=[A-Z])|\n", str(error))[0].rstrip(".")


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
    """Whether to use torch.compile, for "auto" (on a GPU), "on" or "off".

    If a requirement is missing, "auto" prints a notice and "on" raises UserError.
    """
    if name == "off" or (name == "auto" and device.type == "cpu"):
        return False
    if name not in ("auto", "on"):
        raise UserError(f"compile is {name!r}, but must be auto, on or off")
    missing = find_compile_problem(device)
    if missing and name == "on":
        raise UserError(f"compile is on, but {missing}, or use --compile off")
    if missing:
        print_notice(f"not using torch.compile, because {missing}")
    return not missing


def find_compile_problem(device: torch.device) -> str:
    """What torch.compile lacks on this device and what to do about it, or ""."""
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.get_device_capability(device) < MIN_TRITON:
        return f"it needs a GPU with compute capability {MIN_TRITON[0]}.{MIN_TRITON[1]} or higher; use another GPU"
    if on_gpu and find_spec("triton") is None:
        package = "triton-windows" if sys.platform == "win32" else "triton"
        return f"Triton is missing; install the package {package}"
    if on_gpu and sys.platform == "win32":
        return ""  # triton-windows contains a C compiler and the headers
    if on_gpu:  # Triton compiles a module in C
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    else:  # torch compiles modules in C++
        compilers = [os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))]
    if not any(which(command) for name in compilers for command in (name, name.partition(" ")[0])):  # "ccache gcc"
        return f"the compiler {' or '.join(compilers)} is missing; install it"
    folders = (sysconfig.get_path("include"), sysconfig.get_path("platinclude"))
    folders += (sysconfig.get_path("include", "posix_prefix"),)  # the system's Python on Debian
    if not any(Path(folder, "Python.h").is_file() for folder in folders):
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return f"Python.h is missing; install {version}-dev (Debian, Ubuntu) or python3-devel (Fedora)"
    return ""


def explain_failed_compile(error: Exception, required: bool) -> None:
    """After torch.compile failed with `error`: raise UserError if it is `required`, otherwise print a notice."""
    inner = getattr(error, "inner_exception", None)  # of the compiler
    reason = shorten(f"{type(inner).__name__}: {shorten_error(inner)}" if inner else shorten_error(error), MAX_REASON)
    if required:
        raise UserError(f"compile is on, but torch.compile failed: {reason}; use --compile off") from error
    print_notice(f"not using torch.compile, because it failed: {reason}")


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


def is_out_of_memory(error: Exception) -> bool:
    """Whether a library reports that memory is exhausted; only torch's own allocators raise a specific class."""
    return any(text in str(error) for text in OUT_OF_MEMORY)


def describe_memory(error: Exception) -> str:
    """The GPU memory used by other processes, and `error` if it does not mention memory, as " (...)"; may be "".

    An error that does not mention memory, such as cuDNN finding no engine, may also have other causes.
    """
    details = [] if "memory" in str(error) else [shorten_error(error)]
    with suppress(RuntimeError):  # not even CUDA's own memory could be allocated
        if torch.cuda.is_initialized():
            free, total = torch.cuda.mem_get_info()
            others = total - free - torch.cuda.memory_reserved()
            if others > MIN_SHOWN:
                details.insert(0, f"other processes use {others / 1e9:.1f} of {total / 1e9:.1f} GB")
    return f" ({', '.join(details)})" if details else ""


def describe_out_of_memory(error: Exception) -> str:
    """A one-sentence message for the user about an out-of-memory error, wherever it was raised."""
    if any(text in str(error) for text in ("can't allocate memory", "not enough memory")):
        return "there is not enough memory (RAM); close other programs, or lower --batch-size or --input-size"
    return (
        f"the GPU is out of memory{describe_memory(error)}; wait until other processes have finished, choose another "
        "GPU with --device cuda:N, use --device cpu, or lower --batch-size"
    )


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for copies of batches and checkpoints; each additional stream would hold its own memory."""
    return torch.cuda.Stream(device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device if it is not already there; to a GPU asynchronously, through pinned memory."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return (values if values.is_pinned() else values.pin_memory()).to(device, non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish its work; needed before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
