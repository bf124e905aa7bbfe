"""The images that a run trains and validates on, and whether they changed before it is resumed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from utils.data.cache import ImageCache
from utils.system.errors import UserError
from utils.system.files import atomic_write
from utils.weights.checkpoint import LAST

DATA = "data.json"  # in the run folder
MAX_SHOWN_CHANGES = 5  # in a message


class RunData(NamedTuple):
    """The decoded images of a run."""

    train: ImageCache
    val: ImageCache | None  # None without validation sets


def check_fingerprints(folder: Path, data: RunData, resumed: bool) -> None:
    """Store name, image and objects of every sample in the run folder, or compare them if the run is `resumed`.

    Raises UserError that lists the changes if a resumed run would continue on other data.
    """
    path = folder / DATA
    current = {split: cache.fingerprints() for split, cache in data._asdict().items() if cache}
    if not (resumed and path.exists()):
        with atomic_write(path) as file:
            file.write(json.dumps(current).encode())
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
    """The differences between two lists of (name, image, objects), in words."""
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
