"""What readers do about mistakes in the files of users: stop, skip the item, or repair it, and say so.

A reader raises `FileError` for what must stop, raises `SkippableError` for an image or object that training can do without, and
calls `Diagnostics.record_repair` for what it could repair. Around each image and object stands `with diagnostics.capture():`, behind
which the reader goes on with the next one where that is allowed.

>>> diagnostics = Diagnostics()
>>> with diagnostics.capture():
...     raise SkippableError("a.jpg", "is empty")
>>> diagnostics.found
[Diagnostic(kind='skip', file='a.jpg', place='', reason='is empty')]

`load_classes`, `load_samples` and `build_cache` take `diagnostics` as their last argument; without it nothing is skipped.
To check data without training: `Diagnostics(collect=True)` (of validation and test sets with `skips=False` too), the
samples of `load_samples` each through `utils.data.sample_checks.look_at(sample, diagnostics)`, then `check_overlap` and
`check_skip_limit`; training would start if no problem in `found` is of the kind error.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from utils.system.errors import UserError

FEW, SHARE = 3, 0.01  # training stops when more items are skipped than both
SHOWN = 3  # names of files that are told for each reason


class FileError(UserError):
    """What is wrong in a file, at a place such as "object 3 (cat)" or "line 2", and what to do.

    Without a place the reason goes on after the file's name: "is empty".
    """

    def __init__(self, file: str | Path, reason: str, place: str = "") -> None:
        self.file, self.reason, self.place = str(file), reason, place
        super().__init__(sentence(self.file, place, reason))


class SkippableError(FileError):
    """A mistake in an image, or where it has a place in an object, that training can do without."""


class Diagnostic(NamedTuple):
    """Something that was found in a file."""

    kind: str  # error, skip or repair
    file: str
    place: str  # object or line; empty: the whole file
    reason: str  # the same words wherever the same is wrong

    def __str__(self) -> str:
        return sentence(self.file, self.place, self.reason)


def sentence(file: str, place: str, reason: str) -> str:
    return f"{file}, {place}: {reason}" if place else f"{file} {reason}"


@dataclass
class Diagnostics:
    """What was found so far, and what stops: errors always, skips and repairs by these settings.

    With `collect` nothing is raised within `capture()`: errors are found like the others, for a check of all the data.
    """

    strict: bool = False  # skips and repairs are errors too
    skips: bool = True  # whether items may be left out; if not, as in an evaluation, skips are errors
    collect: bool = False
    found: list[Diagnostic] = field(default_factory=list)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Around the reading of one image or object: a `FileError` in it is added; what must stop is raised."""
        try:
            yield
        except FileError as mistake:
            kind = "skip" if isinstance(mistake, SkippableError) else "error"
            self.add(Diagnostic(kind, mistake.file, mistake.place, mistake.reason))

    def record_repair(self, file: str | Path, reason: str, place: str = "") -> None:
        """Count a repair; raises FileError where that must stop."""
        self.add(Diagnostic("repair", str(file), place, reason))

    def add(self, problem: Diagnostic) -> None:
        """Count a problem; raises FileError where it must stop."""
        reason = problem.reason
        if problem.kind == "skip" and not self.skips:
            problem = problem._replace(kind="error", reason=f"{reason}; an evaluation leaves nothing out, so mend it")
        elif problem.kind != "error" and self.strict:
            problem = problem._replace(kind="error", reason=f"{reason}; mend it, or leave out strict")
        if problem.kind == "error" and not self.collect:
            raise FileError(problem.file, problem.reason, problem.place) from None
        self.found.append(problem)

    def extend(self, diagnostics: Iterable[Diagnostic]) -> None:
        """Count what another collection has found."""
        for problem in diagnostics:
            self.add(problem)

    def check_skip_limit(self, images: int, objects: int) -> None:
        """Add the error of too many skips, which is worth a look at the data, among so many images and objects."""
        for name, total in (("images", images), ("objects", objects)):
            skipped = [item for item in self.found if item.kind == "skip" and bool(item.place) == (name == "objects")]
            if len(skipped) > max(FEW, SHARE * total):
                with self.capture():
                    reason = f"have {len(skipped)} of {total} that cannot be used; mend them. The first: {skipped[0]}"
                    raise FileError(f"the {name}", reason)

    def lines(self) -> list[str]:
        """A line for each thing that was skipped or repaired: how often, what, and the first few names."""
        counts, names = Counter(), defaultdict(dict)
        for kind, file, place, reason in self.found:
            counts[kind, reason] += 1
            names[kind, reason][f"{Path(file).name} {place}".strip()] = None
        lines = []
        for (kind, reason), count in counts.most_common():
            first = list(names[kind, reason])[:SHOWN]
            more = f" and {count - len(first)} more" if count > len(first) else ""
            lines.append(f"{kind}: {reason}: {', '.join(first)}{more}")
        return lines

    def print_summary(self, what: str, say: Callable[[str], None]) -> None:
        """Say once what was found in `what`, such as the training sets; nothing where nothing was."""
        counts = Counter(problem.kind for problem in self.found)
        if counts:
            words = {"error": "errors", "skip": "skipped", "repair": "repaired"}
            say(f"{what}: " + ", ".join(f"{counts[kind]} {word}" for kind, word in words.items() if counts[kind]))
            for line in self.lines():
                say(f"  {line}")
