"""The settings of a run in `config.json`, and which of them may change when it is resumed."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from utils.system.errors import UserError
from utils.system.files import atomic_write

CONFIG = "config.json"
Settings = TypeVar("Settings")  # a dataclass whose fields all have defaults


def save_settings(folder: Path, settings: Any) -> None:
    """Write a dataclass as the run's `config.json`."""
    with atomic_write(folder / CONFIG) as file:
        file.write((json.dumps(asdict(settings), indent=2) + "\n").encode())


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
    """The settings of the run in `folder`, updated with the `changeable` ones among those `given` now.

    `given` names the fields of `settings` that the user set; by default those that differ from their defaults.
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
