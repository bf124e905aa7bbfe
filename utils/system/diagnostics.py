"""Errors, skipped items and repairs found while reading a user's files.

A reader raises `FileError` for an error that must stop the program, `SkippableError` for an image or object that
training can do without, and calls `Diagnostics.record_repair` for what it corrected. Each image and object is read
within `diagnostics.capture()`, after which the reader continues with the next one if the settings allow that.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from utils.system.errors import FileError, SkippableError, format_error

MAX_SKIPPED, MAX_SKIPPED_SHARE = 3, 0.01  # training stops if the number of skipped items exceeds both
NUM_EXAMPLES = 3  # file names printed for each reason


class Diagnostic(NamedTuple):
    kind: str  # error, skip or repair
    file: str
    place: str  # object or line; empty: the whole file
    reason: str  # identical for the same cause, so that it can be counted

    def __str__(self) -> str:
        return format_error(self.file, self.place, self.reason)


@dataclass
class Diagnostics:
    """Everything found so far, and the settings that decide what stops the program."""

    strict: bool = False  # treat skips and repairs as errors
    skips: bool = True  # allow skipping; otherwise, as in an evaluation, skips are errors
    collect: bool = False  # record errors instead of raising them, to check all files at once
    found: list[Diagnostic] = field(default_factory=list)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Record a FileError raised in the block, or raise it if it must stop the program."""
        try:
            yield
        except FileError as error:
            kind = "skip" if isinstance(error, SkippableError) else "error"
            self.add(Diagnostic(kind, error.file, error.place, error.reason))

    def record_repair(self, file: str | Path, reason: str, place: str = "") -> None:
        """Record a repair; raises FileError if repairs are not allowed."""
        self.add(Diagnostic("repair", str(file), place, reason))

    def add(self, diagnostic: Diagnostic) -> None:
        """Record a diagnostic, or raise it as a FileError if it must stop the program."""
        kind, reason = diagnostic.kind, diagnostic.reason
        if kind == "skip" and not self.skips:
            kind, reason = "error", f"{reason}; fix it, since an evaluation cannot skip it"
        elif kind != "error" and self.strict:
            kind, reason = "error", f"{reason}; fix it, or run without strict"
        if kind == "error" and not self.collect:
            raise FileError(diagnostic.file, reason, diagnostic.place) from None
        self.found.append(diagnostic._replace(kind=kind, reason=reason))

    def extend(self, diagnostics: Iterable[Diagnostic]) -> None:
        for diagnostic in diagnostics:
            self.add(diagnostic)

    def check_skip_limit(self, images: int, objects: int) -> None:
        """Add an error if too many of the given numbers of images and objects were skipped."""
        for name, total in (("images", images), ("objects", objects)):
            skipped = [item for item in self.found if item.kind == "skip" and bool(item.place) == (name == "objects")]
            if len(skipped) > max(MAX_SKIPPED, MAX_SKIPPED_SHARE * total):
                reason = f"contains {len(skipped)} unusable {name} out of {total}; fix them. The first: {skipped[0]}"
                self.add(Diagnostic("error", "the data", "", reason))

    def summarize(self) -> list[str]:
        """One line per kind and reason: how often it was found, and in which files."""
        counts, names = Counter(), defaultdict(dict)
        for kind, file, place, reason in self.found:
            counts[kind, reason] += 1
            names[kind, reason][f"{Path(file).name} {place}".strip()] = None
        lines = []
        for (kind, reason), count in counts.most_common():
            examples = list(names[kind, reason])[:NUM_EXAMPLES]
            more = f" and {count - len(examples)} more" if count > len(examples) else ""
            lines.append(f"{kind}: {reason}: {', '.join(examples)}{more}")
        return lines

    def print_summary(self, title: str, write: Callable[[str], None]) -> None:
        """Write what was found under a title such as "training"; nothing if nothing was found."""
        counts = Counter(diagnostic.kind for diagnostic in self.found)
        if counts:
            words = {"error": "errors", "skip": "skipped", "repair": "repaired"}
            write(f"{title}: " + ", ".join(f"{counts[kind]} {word}" for kind, word in words.items() if counts[kind]))
            for line in self.summarize():
                write(f"  {line}")
