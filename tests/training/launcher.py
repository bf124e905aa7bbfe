"""Run a task of worker.py in two processes: python tests/training/launcher.py MAX_RESTARTS TASK ARGUMENTS

It uses torchrun's agent, but forks the processes from one that has imported everything, since importing takes long.
"""

import os
import sys
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

ROOT = str(Path(__file__).resolve().parents[2])
WORKER = "tests.training.worker"


def run_task(task: str, *arguments: str) -> None:
    """Run a task in one of the processes."""
    import_module(WORKER).run_task(task, *arguments)


if __name__ == "__main__":
    sys.path.insert(0, ROOT)
    os.environ |= {"PYTHONPATH": ROOT, "AGENT_PID": str(os.getpid())}
    get_context("forkserver").set_forkserver_preload([WORKER])
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=int(sys.argv[1]), monitor_interval=0.1,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="forkserver",
    )  # fmt: skip
    launched = import_module("tests.training.launcher").run_task  # not of __main__, which the processes do not import
    elastic_launch(config, launched)(*sys.argv[2:])
