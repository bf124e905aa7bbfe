"""The processes of a training: `torchrun` starts them, torch.distributed joins them. One process is a group of one.

Objects and flags travel between CPUs (gloo), so that asking never waits for a GPU; gradients between GPUs (NCCL).
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

from utils.system.errors import UserError

TIMEOUT = timedelta(hours=2)  # of a wait for another process, which may be decoding a large data set
T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine
    local_size: int = 1
    restarted: bool = False  # torchrun started it again after a failure
    agent: str = ""  # the torchrun that started it

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def all_reduce(self, values: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def print_once(self, text: str) -> None:
        """Print it once."""
        if self.is_main:
            print(text, flush=True)

    def any_rank(self, flag: bool) -> bool:
        """Whether it holds in any process; all of them wait here for each other."""
        return bool(self.all_reduce(torch.tensor(int(flag)))) if self.size > 1 else flag

    def gather(self, values: dict[int, T]) -> dict[int, T]:
        """The first process gets everyone's entries, sorted by key; the others an empty dict."""
        everyone: list[dict[int, T] | None] = [values]
        if self.size > 1:
            everyone = [None] * self.size
            dist.gather_object(values, everyone if self.is_main else None)
        together = {key: value for part in everyone if part for key, value in part.items()}
        return dict(sorted(together.items()))

    def broadcast_module(self, module: nn.Module) -> None:
        """Give every process the parameters and buffers of the first one's module."""
        if self.size > 1:
            for values in module.state_dict().values():
                dist.broadcast(values, 0)

    def all_gather(self, value: T) -> list[T]:
        """What each process has, for all."""
        return self.broadcast(list(self.gather({self.rank: value}).values()))

    def broadcast(self, value: T) -> T:
        """What the first process has, for all."""
        holder = [value]
        if self.size > 1:
            dist.broadcast_object_list(holder)
        return holder[0]


@contextmanager
def join_process_group(device: torch.device) -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started, if it did; each uses the GPU of its number on its machine."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" not in environment and int(environment.get("WORLD_SIZE", 1)) == 1:
        yield ProcessGroup()
        return
    run_id = environment.get("TORCHELASTIC_RUN_ID", "none")
    group = ProcessGroup(
        int(environment["RANK"]),
        int(environment["WORLD_SIZE"]),
        int(environment["LOCAL_RANK"]),
        int(environment["LOCAL_WORLD_SIZE"]),
        int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0,
        run_id if run_id != "none" else f"process {os.getppid()}",
    )
    if device.type == "cuda":
        if group.local_size > torch.cuda.device_count():
            raise UserError(
                f"torchrun started {group.local_size} processes, but this machine has {torch.cuda.device_count()} "
                "GPUs; set --nproc-per-node to their number"
            )
        torch.cuda.set_device(group.local_rank)
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    if group.local_size == group.size:  # on one machine torchrun keeps its store, with addresses of dead processes
        store = dist.PrefixStore(f"attempt {environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=group.rank, world_size=group.size)
    try:
        yield group
    finally:
        dist.destroy_process_group()
