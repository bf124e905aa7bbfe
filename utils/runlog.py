"""The only writer of a run's settings, TensorBoard events, `metrics.jsonl`, curves and pictures."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from torch.utils.tensorboard import SummaryWriter

from utils.errors import UserError, make_folder
from utils.images import write_image

Settings = TypeVar("Settings")  # a dataclass whose fields all have defaults


class RunLog:
    """Writes into a run's folder. When a run resumes after `epoch`, what was logged beyond it is dropped."""

    def __init__(self, folder: Path, epoch: int = 0) -> None:
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.records = [record for record in read_records(self.path) if record["epoch"] <= epoch]
        self.path.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch + 1)

    def epoch(self, epoch: int, values: dict[str, float]) -> None:
        """One line of metrics, its TensorBoard scalars, and after a validation the curve anew."""
        record: dict[str, Any] = {"epoch": epoch, **values}
        self.records.append(record)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, epoch)
        self.board.flush()
        if any(name.startswith("val/") for name in values):  # drawing takes longer than writing
            draw_curves(self.records, self.folder / "curves.png")

    def picture(self, name: str, image: np.ndarray, epoch: int) -> None:
        """An RGB picture (H, W, 3), as a file and in TensorBoard."""
        write_image(self.folder / f"{name}.jpg", image)
        self.board.add_image(name, image, epoch, dataformats="HWC")

    def close(self) -> None:
        draw_curves(self.records, self.folder / "curves.png")
        self.board.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a torn last line is dropped


def draw_curves(records: list[dict[str, Any]], path: Path) -> None:
    """Losses, and accuracy where it was measured, against the epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharex=True, layout="constrained")
    for axes, names, title in (
        (left, ("train/loss", "val/loss"), "loss"),
        (right, ("val/AP", "val/AP50"), "accuracy on the validation split"),
    ):
        for name in names:
            points = [(record["epoch"], record[name]) for record in records if name in record]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
                axes.legend()
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    right.set_ylim(0, 1)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_settings(folder: Path, config: Settings) -> None:
    """Begin a run: make its folder and write its `config.json`."""
    make_folder(folder)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")


def load_settings(folder: Path, config: Settings, free: Sequence[str]) -> Settings:
    """The settings of the run in `folder`; `config` holds those that the user gave on resuming it.

    Raises UserError when one that is not `free` was given and differs.
    """
    path, defaults = folder / "config.json", type(config)()
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        lists = {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
        settings = type(config)(**saved | lists)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read the settings of the run in {path} ({error})") from None
    for name in saved:
        given, own = getattr(config, name), getattr(settings, name)
        if name not in free and given not in (own, getattr(defaults, name)):
            raise UserError(f"a resumed run keeps its settings: {name} is {own} there, not {given}; leave it out")
    return settings
