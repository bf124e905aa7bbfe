"""The only writer of a run's folder: metrics, checkpoints, TensorBoard events, curves and pictures."""

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.data.image_io import write_image
from utils.reports.plots import draw_training
from utils.system.errors import UserError, make_folder
from utils.system.files import TEMPORARY, atomic_write, lock
from utils.weights.checkpoint import BEST, LAST, PREVIOUS, Checkpoint, save_checkpoint

METRICS, LOCK = "metrics.jsonl", "run.lock"


class RunFolder:
    """The locked folder of a run; with `read_only`, as in all processes but the first, nothing is written.

    Checkpoints are written in a thread while training continues. Raises UserError if metrics or checkpoints cannot be
    written; failures of TensorBoard and pictures are only reported, once.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path, self.read_only = path, read_only
        self.records: list[dict[str, Any]] = []
        self.board: SummaryWriter | None = None
        self.warned = False
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self.writing: Future[None] | None = None
        if not read_only:
            make_folder(path)
            self.lock = lock(path / LOCK)
            if self.lock is None:
                raise UserError(f"another process is training in {path}; wait for it, or choose another --run-dir")
            for file in path.glob(f"*{TEMPORARY}"):  # left by a process that was killed
                file.unlink(missing_ok=True)

    def start_logging(self, epoch: int) -> None:
        """Continue the metrics and TensorBoard events after `epoch`; later records are dropped."""
        if self.read_only:
            return
        path = self.path / METRICS
        self.records = [record for record in read_records(path) if record["epoch"] <= epoch]
        with atomic_write(path) as file:
            file.write("".join(json.dumps(record) + "\n" for record in self.records).encode())
        self.attempt(self.open_board, epoch)

    def open_board(self, epoch: int) -> None:
        self.board = SummaryWriter(str(self.path / "tensorboard"), purge_step=epoch + 1)

    def log_epoch(self, epoch: int, values: dict[str, float]) -> None:
        """Append a row of metrics, also to TensorBoard; after a validation, draw the curves."""
        if self.read_only:
            return
        record: dict[str, Any] = {"epoch": epoch, **values}
        self.records.append(record)
        append_line(self.path / METRICS, json.dumps(record))
        self.attempt(self.write_scalars, epoch, values)
        if any(name.startswith("val/") for name in values):  # not every epoch, since drawing is slow
            self.attempt(draw_training, self.records, self.path / "curves.png")

    def write_scalars(self, epoch: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, epoch)
        self.board.flush()

    def log_histograms(self, values: dict[str, np.ndarray], epoch: int) -> None:
        """Log distributions to TensorBoard."""
        self.attempt(self.write_histograms, values, epoch)

    def write_histograms(self, values: dict[str, np.ndarray], epoch: int) -> None:
        for name, numbers in values.items():
            self.board.add_histogram(name, numbers, epoch)

    def save_picture(self, name: str, draw: Callable[[], np.ndarray], epoch: int) -> None:
        """Save an RGB picture (H, W, 3) as a file and in TensorBoard."""
        self.attempt(self.write_picture, name, draw, epoch)

    def write_picture(self, name: str, draw: Callable[[], np.ndarray], epoch: int) -> None:
        image = draw()
        write_image(self.path / f"{name}.jpg", image)
        self.board.add_image(name, image, epoch, dataformats="HWC")

    def attempt(self, write: Callable[..., None], *arguments: Any) -> None:
        """Write something that training can do without; only the first failure is reported."""
        try:
            if not self.read_only:
                write(*arguments)
        except Exception as error:
            if not self.warned:
                text = f"warning: cannot write TensorBoard events, curves or pictures ({error!r}); training continues"
                tqdm.write(text, file=sys.stderr)
            self.warned = True

    def save_checkpoints(self, last: Checkpoint, best: Checkpoint | None = None) -> None:
        """Start to write checkpoints; raises the error of the previous call if that one failed."""
        self.finish_saving()
        if not self.read_only:
            copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
            self.writing = self.writer.submit(self.write_checkpoints, last, best, copied)

    def write_checkpoints(self, last: Checkpoint, best: Checkpoint | None, copied: torch.cuda.Event | None) -> None:
        """Run in the thread; on a GPU in a separate stream, after the copies made before the call."""
        with torch.cuda.stream(torch.cuda.Stream()) if copied else nullcontext():
            if copied:
                copied.wait()
            if best is not None:
                save_checkpoint(self.path / BEST, best)
            save_checkpoint(self.path / LAST, last, self.path / PREVIOUS)

    def finish_saving(self) -> None:
        """Wait until the checkpoints are written; raises UserError if that failed."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def close(self) -> None:
        """Finish writing, and release the folder, which is removed if nothing was written to it."""
        try:
            self.finish_saving()
        finally:
            self.writer.shutdown()
            if not self.read_only:
                if self.board is not None:
                    self.attempt(draw_training, self.records, self.path / "curves.png")
                    self.attempt(self.board.close)
                self.lock.close()
                with suppress(OSError):
                    if [path.name for path in self.path.iterdir()] == [LOCK]:
                        (self.path / LOCK).unlink()
                        self.path.rmdir()


def append_line(path: Path, line: str) -> None:
    """Append a line to a file and flush it to disk."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; the last checkpoint is intact") from None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, without an incomplete last line."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
