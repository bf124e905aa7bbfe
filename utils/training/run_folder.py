"""The only writer of a run's folder: settings, metrics, checkpoints, TensorBoard events, curves and pictures."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.data.image_io import write_image
from utils.reports.plots import draw_training
from utils.system.errors import UserError, make_folder
from utils.system.files import TEMPORARY, atomic_write, lock
from utils.weights.checkpoint import BEST, LAST, PREVIOUS, Checkpoint, save_checkpoint

CONFIG, METRICS, DATA, LOCK = "config.json", "metrics.jsonl", "data.json", "run.lock"  # of a run
SHOWN_CHANGES = 5  # of the data, in a message

Settings = TypeVar("Settings")  # a dataclass whose fields all have defaults


class RunLog:
    """Writes into a run's folder, which it locks; `quiet` ones, of further processes, write nothing.

    Checkpoints are written by a thread, so that training goes on meanwhile. Metrics and checkpoints that cannot be
    written raise UserError; TensorBoard and pictures then only warn, once.
    """

    def __init__(self, folder: Path, quiet: bool = False) -> None:
        self.folder, self.quiet = folder, quiet
        self.records: list[dict[str, Any]] = []
        self.board: SummaryWriter | None = None
        self.warned = False
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self.writing: Future[None] | None = None
        if not quiet:
            make_folder(folder)
            self.lock = lock(folder / LOCK)
            if self.lock is None:
                raise UserError(f"another process is training in {folder}; wait for it, or choose another --run-dir")
            for path in folder.glob(f"*{TEMPORARY}"):  # of a process that was killed
                path.unlink(missing_ok=True)

    def read_owner(self) -> str:
        """Who began or resumed the run last, as `write_owner` was told."""
        if self.quiet:
            return ""
        self.lock.seek(0)
        return self.lock.read().decode()  # not through another file: closing that one would give up the lock

    def write_owner(self, owner: str) -> None:
        if not self.quiet:
            self.lock.truncate(0)
            self.lock.write(owner.encode())
            self.lock.flush()

    def open(self, epoch: int) -> None:
        """Go on after `epoch`: what was logged beyond it is dropped."""
        if self.quiet:
            return
        path = self.folder / METRICS
        self.records = [record for record in read_records(path) if record["epoch"] <= epoch]
        with atomic_write(path) as file:
            file.write("".join(json.dumps(record) + "\n" for record in self.records).encode())
        self.attempt(self.open_board, epoch)

    def open_board(self, epoch: int) -> None:
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=epoch + 1)

    def epoch(self, epoch: int, values: dict[str, float]) -> None:
        """One line of metrics, its TensorBoard scalars, and after a validation the curve anew."""
        if self.quiet:
            return
        record: dict[str, Any] = {"epoch": epoch, **values}
        self.records.append(record)
        append_line(self.folder / METRICS, json.dumps(record))
        self.attempt(self.scalars, epoch, values)
        if any(name.startswith("val/") for name in values):  # drawing takes longer than writing
            self.attempt(draw_training, self.records, self.folder / "curves.png")

    def scalars(self, epoch: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, epoch)
        self.board.flush()

    def histograms(self, values: dict[str, np.ndarray], epoch: int) -> None:
        """Distributions for TensorBoard."""
        if not self.quiet:
            self.attempt(self.write_histograms, values, epoch)

    def write_histograms(self, values: dict[str, np.ndarray], epoch: int) -> None:
        for name, numbers in values.items():
            self.board.add_histogram(name, numbers, epoch)

    def picture(self, name: str, draw: Callable[[], np.ndarray], epoch: int) -> None:
        """An RGB picture (H, W, 3), as a file and in TensorBoard."""
        if not self.quiet:
            self.attempt(self.write_picture, name, draw, epoch)

    def write_picture(self, name: str, draw: Callable[[], np.ndarray], epoch: int) -> None:
        image = draw()
        write_image(self.folder / f"{name}.jpg", image)
        self.board.add_image(name, image, epoch, dataformats="HWC")

    def attempt(self, write: Callable[..., None], *arguments: Any) -> None:
        """Write what training can do without: a failure is said once and stops nothing."""
        try:
            write(*arguments)
        except Exception as error:
            if not self.warned:
                text = f"warning: TensorBoard, curves or pictures cannot be written ({error!r}); training goes on"
                tqdm.write(text, file=sys.stderr)
            self.warned = True

    def save(self, last: Checkpoint, best: Checkpoint | None = None) -> None:
        """Write checkpoints while training goes on, the one before first; raises what went wrong with that one."""
        self.finish_saving()
        if not self.quiet:
            copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
            self.writing = self.writer.submit(self.write, last, best, copied)

    def write(self, last: Checkpoint, best: Checkpoint | None, copied: torch.cuda.Event | None) -> None:
        """The thread's part; on a GPU in a stream of its own, behind what was given to it before the call."""
        with torch.cuda.stream(torch.cuda.Stream()) if copied else nullcontext():
            if copied:
                copied.wait()
            if best is not None:
                save_checkpoint(self.folder / BEST, best)
            save_checkpoint(self.folder / LAST, last, self.folder / PREVIOUS)

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def close(self) -> None:
        """Finish what is being written, and release the folder."""
        try:
            self.finish_saving()
        finally:
            self.writer.shutdown()
            if not self.quiet:
                if self.board is not None:
                    self.attempt(draw_training, self.records, self.folder / "curves.png")
                    self.attempt(self.board.close)
                self.lock.close()
                with suppress(OSError):  # it is not empty, as a run's folder is unless a mistake ended it at once
                    if [path.name for path in self.folder.iterdir()] == [LOCK]:
                        (self.folder / LOCK).unlink()
                        self.folder.rmdir()


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, through to the disk."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; the last checkpoint is whole") from None


def read_records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a torn last line is dropped


def save_settings(folder: Path, config: Settings) -> None:
    """Write a run's `config.json`."""
    with atomic_write(folder / CONFIG) as file:
        file.write((json.dumps(asdict(config), indent=2) + "\n").encode())


def load_settings(folder: Path, config: Settings, free: Sequence[str]) -> Settings:
    """The settings of the run in `folder`, with those `free` to change that `config`, what the user gave now, has.

    Raises UserError when another one was given and differs.
    """
    path, defaults = folder / CONFIG, type(config)()
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
        settings = type(config)(**saved | lists)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read the settings of the run in {path} ({error})") from None
    given = {name: value for name, value in vars(config).items() if value != getattr(defaults, name)}
    for name, value in given.items():
        own = getattr(settings, name)
        if name not in free and value != own:
            raise UserError(
                f"what goes on keeps its settings, which are in {path}: {name} is {own} there, not {value}; leave it "
                "out, or choose another folder"
            )
    return replace(settings, **{name: value for name, value in given.items() if name in free})


def keep_fingerprints(folder: Path, found: dict[str, list[tuple[str, int, int]]], resumed: bool) -> None:
    """Remember what a run trains on: per split the name, image and objects of each sample, as `ImageCache` tells.

    Raises UserError when a `resumed` run had something else, and says what changed.
    """
    path = folder / DATA
    if resumed and path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path} is damaged; delete it to go on without knowing whether the data changed") from None
        changes = [change for split in found for change in changed_samples(before.get(split, []), found[split])]
        if changes:
            some = ", ".join(changes[:SHOWN_CHANGES]) + (", ..." if len(changes) > SHOWN_CHANGES else "")
            raise UserError(
                f"the data of this run changed since it began, so that it cannot go on: {some}. Put it back, or start "
                f"a new run with --weights {folder / LAST}"
            )
        return
    with atomic_write(path) as file:
        file.write(json.dumps(found).encode())


def changed_samples(before: Sequence[Sequence], now: Sequence[Sequence]) -> list[str]:
    """What differs between two lists of name, image and objects, in words."""
    old, new = ({name: (image, objects) for name, image, objects in samples} for samples in (before, now))
    changes = [f"{name} is gone" for name in old if name not in new]
    changes += [f"{name} is new" for name in new if name not in old]
    for name in new:
        if name in old and old[name] != new[name]:
            parts = [part for part, a, b in zip(("image", "annotation"), old[name], new[name], strict=True) if a != b]
            changes.append(f"{' and '.join(parts)} of {name} changed")
    if not changes and list(map(tuple, before)) != list(map(tuple, now)):
        changes.append("the order in the split files changed, or how often a name is there")
    return changes
