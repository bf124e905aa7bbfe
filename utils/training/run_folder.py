"""The folder of a run: its settings, data fingerprints, metrics, checkpoints, TensorBoard events and pictures.

Also loads the settings of a resumed run, and verifies that its data have not changed.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.data.cache import ImageCache
from utils.data.image_io import write_image
from utils.reports.plots import draw_training
from utils.system.device import side_stream
from utils.system.errors import UserError
from utils.system.files import TEMPORARY, lock, make_folder, write_text
from utils.weights.checkpoint import BEST, LAST, PREVIOUS, Checkpoint, save_checkpoint

CONFIG, DATA, METRICS, LOCK = "config.json", "data.json", "metrics.jsonl", "run.lock"
MAX_SHOWN_CHANGES = 5  # maximum number of data changes listed in a message
Settings = TypeVar("Settings")  # a dataclass whose fields all have defaults


class RunFolder:
    """The locked folder of a run; with `read_only`, as in all processes but the first, nothing is written.

    Checkpoints are written in a background thread. Raises UserError if metrics or checkpoints cannot be written.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path, self.read_only = path, read_only
        self.records: list[dict[str, Any]] = []
        self.board: SummaryWriter | None = None
        self.failed: set[str] = set()  # kinds of optional output that could not be written
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self.writing: Future[None] | None = None
        self.saved = -inf  # time of the last checkpoint
        self.lock_file: IO[bytes] | None = None
        if not read_only:
            make_folder(path)
            self.lock_file = lock(path / LOCK)
            if self.lock_file is None:
                raise UserError(f"another process is training in {path}; wait for it, or choose another --run-dir")
            for file in path.glob(f"*{TEMPORARY}"):  # left by a process that was killed
                file.unlink(missing_ok=True)

    def start_logging(self, epoch: int) -> None:
        """Continue the metrics and TensorBoard events after `epoch`; later records are dropped."""
        if self.read_only:
            return
        path = self.path / METRICS
        self.records = [record for record in read_records(path) if record["epoch"] <= epoch]
        write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self.attempt("TensorBoard events", self.open_board, epoch)

    def open_board(self, epoch: int) -> None:
        self.board = SummaryWriter(str(self.path / "tensorboard"), purge_step=epoch + 1)

    def log_epoch(self, epoch: int, values: dict[str, float]) -> None:
        """Append a row of metrics, also to TensorBoard; after a validation, draw the curves."""
        if self.read_only:
            return
        record: dict[str, Any] = {"epoch": epoch, **values}
        self.records.append(record)
        append_line(self.path / METRICS, json.dumps(record))
        self.attempt("TensorBoard events", self.write_scalars, epoch, values)
        if any(name.startswith("val/") for name in values):  # drawing is too slow for every epoch
            self.attempt("curves", draw_training, self.records, self.path / "curves.png")

    def write_scalars(self, epoch: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, epoch)
        self.board.flush()

    def write_histograms(self, values: dict[str, np.ndarray], epoch: int) -> None:
        for name, numbers in values.items():
            self.board.add_histogram(name, numbers, epoch)

    def write_picture(self, name: str, draw: Callable[[], np.ndarray], epoch: int) -> None:
        """Draw an RGB picture (H, W, 3), and save it as a file and in TensorBoard."""
        image = draw()
        write_image(self.path / f"{name}.jpg", image)
        if self.board is not None:
            self.board.add_image(name, image, epoch, dataformats="HWC")

    def attempt(self, kind: str, write: Callable[..., None], *arguments: Any) -> None:
        """Call a method that writes optional output; the first failure of each kind of output is reported."""
        try:
            if not self.read_only:
                write(*arguments)
        except Exception as error:
            if kind not in self.failed:
                tqdm.write(f"warning: cannot write {kind} ({error!r}); training continues", file=sys.stderr)
            self.failed.add(kind)

    def save_checkpoints(self, last: Checkpoint, best: Checkpoint | None = None) -> None:
        """Start writing checkpoints; raises the error of the previous call if it failed."""
        self.finish_saving()
        self.saved = time.perf_counter()
        if not self.read_only:
            device = next(iter(last.weights.values())).device
            copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            self.writing = self.writer.submit(self.write_checkpoints, last, best, copied)

    def seconds_since_save(self) -> float:
        return time.perf_counter() - self.saved

    def write_checkpoints(self, last: Checkpoint, best: Checkpoint | None, copied: torch.cuda.Event | None) -> None:
        """Runs in the writer thread; with a GPU, in a separate stream that waits for the copies of the snapshot."""
        if copied:
            torch.cuda.set_device(copied.device)  # the current device is set per thread
        with torch.cuda.stream(side_stream(copied.device)) if copied else nullcontext():
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
            if self.board is not None:
                self.attempt("curves", draw_training, self.records, self.path / "curves.png")
                self.attempt("TensorBoard events", self.board.close)
            if self.lock_file is not None:
                self.lock_file.close()
                with suppress(OSError):
                    if [path.name for path in self.path.iterdir()] == [LOCK]:
                        (self.path / LOCK).unlink()
                        self.path.rmdir()


def append_line(path: Path, line: str) -> None:
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


def save_settings(folder: Path, settings: Any) -> None:
    write_text(folder / CONFIG, json.dumps(asdict(settings), indent=2) + "\n")


def changed_settings(settings: Any) -> frozenset[str]:
    """The names of the settings that differ from their defaults."""
    defaults = type(settings)()
    return frozenset(name for name, value in vars(settings).items() if value != getattr(defaults, name))


def load_settings(
    folder: Path,
    settings: Settings,
    changeable: Collection[str],
    given: Collection[str] | None = None,
    hints: Mapping[str, str] | None = None,
) -> Settings:
    """The settings of the run in `folder`, updated with those `given` (default: all changed) that are `changeable`.

    Raises UserError if another given setting differs from the run's, with the hint for it from `hints`.
    """
    path = folder / CONFIG
    given = changed_settings(settings) if given is None else given
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
        run_settings = type(settings)(**saved | lists)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read the settings of the run in {path} ({error})") from None
    for name in sorted(set(given) - set(changeable)):
        value, run_value = getattr(settings, name), getattr(run_settings, name)
        if value != run_value:
            hint = (hints or {}).get(name, "leave it out, or choose another folder")
            raise UserError(f"{name} is {run_value} in {path} and cannot be changed to {value} on resume; {hint}")
    return replace(run_settings, **{name: getattr(settings, name) for name in given if name in changeable})


class RunData(NamedTuple):
    train: ImageCache
    val: ImageCache | None  # None without validation sets


def verify_data(folder: Path, data: RunData, resumed: bool) -> None:
    """Store fingerprints of the data in the run folder; if the run is `resumed`, raise UserError if they changed."""
    path = folder / DATA
    current = {split: cache.fingerprints() for split, cache in data._asdict().items() if cache}
    if not (resumed and path.exists()):
        write_text(path, json.dumps(current))
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is damaged; delete it to resume without checking whether the data changed") from None
    changes = [change for split in current for change in list_changes(stored.get(split, []), current[split])]
    if changes:
        shown = ", ".join(changes[:MAX_SHOWN_CHANGES]) + (", ..." if len(changes) > MAX_SHOWN_CHANGES else "")
        raise UserError(
            f"the run cannot be resumed because its data changed: {shown}. Restore the data, or start a new run with "
            f"--weights {folder / LAST}"
        )


def list_changes(before: Sequence[Sequence], now: Sequence[Sequence]) -> list[str]:
    """Describe the differences between two results of `ImageCache.fingerprints`."""
    old, new = ({name: (image, objects) for name, image, objects in samples} for samples in (before, now))
    changes = [f"{name} was removed" for name in old if name not in new]
    changes += [f"{name} is new" for name in new if name not in old]
    for name in new:
        if name in old and old[name] != new[name]:
            parts = [part for part, a, b in zip(("image", "annotation"), old[name], new[name], strict=True) if a != b]
            changes.append(f"{' and '.join(parts)} of {name} changed")
    if not changes and list(map(tuple, before)) != list(map(tuple, now)):
        changes.append("the order in the split files changed, or how often an image is listed")
    return changes
