"""The processes of a distributed run, started by `torchrun` and connected by torch.distributed.

Objects and flags are exchanged through gloo, so that they never wait for a GPU, and gradients through NCCL, or through
gloo on Windows, where there is no NCCL.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.system.device import choose_device

TIMEOUT = timedelta(hours=2)  # maximum wait for another process, which may be decoding a large dataset
T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """This process and the others of the run; by default a single process."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # rank among the processes of this machine
    local_size: int = 1
    restarted: bool = False  # whether torchrun restarted the processes after a failure

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def print_once(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all processes must call this."""
        return bool(self.all_reduce(torch.tensor(int(flag)))) if self.size > 1 else flag

    def gather(self, values: dict[int, T]) -> dict[int, T]:
        """Merge the entries of all processes, sorted by key, in the main process; the others get an empty dict."""
        parts: list[dict[int, T] | None] = [values]
        if self.size > 1:
            parts = [None] * self.size
            dist.gather_object(values, parts if self.is_main else None)
        merged = {key: value for part in parts if part for key, value in part.items()}
        return dict(sorted(merged.items()))

    def broadcast_module(self, module: nn.Module) -> None:
        """Copy the parameters and buffers of the main process's module to the other processes."""
        if self.size > 1:
            for values in module.state_dict().values():
                dist.broadcast(values, 0)

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        return self.broadcast(list(self.gather({self.rank: value}).values()))

    def broadcast(self, value: T) -> T:
        """The value of the main process."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]


@contextmanager
def join_process_group(device_name: str) -> Iterator[ProcessGroup]:
    """Connect the processes started by torchrun, if any; `device_name` is an argument of `choose_device`."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" not in environment and int(environment.get("WORLD_SIZE", 1)) == 1:
        yield ProcessGroup()
        return
    restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    ranks_and_sizes = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    group = ProcessGroup(*ranks_and_sizes, restarted=restarts > 0)
    device = choose_device(device_name)
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    if group.local_size == group.size:  # one machine: after a restart torchrun's store still has the old addresses
        store = dist.PrefixStore(f"attempt {restarts}", store)
    use_nccl = device.type == "cuda" and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if use_nccl else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=group.rank, world_size=group.size)
    try:
        yield group
    finally:
        dist.destroy_process_group()
