"""Attention blocks side by side: what each adds to phi 0 over several seeds, and what it costs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from nets.attention import ATTENTION
from utils.evaluation.significance import CONFIDENCE, RESOLUTION, Mean, judge, mean_of, seeds_needed
from utils.reports.html import data_uri, write_page
from utils.reports.plots import draw_means
from utils.system.files import write_text

PAGE, TEMPLATE = "comparison.html", "attention_report.html"
FEW = 3  # seeds, with fewer of which an interval is very wide
TITLES = ("phi", "block", "AP", "AP50", "AP more than phi 0", "verdict", "parameters", "GFLOP", "ms", "training, s")


@dataclass(frozen=True)
class Result:
    """One training, measured on the test sets."""

    AP: float
    AP50: float
    seconds: float  # of training


@dataclass(frozen=True)
class Cost:
    """What a network costs; milliseconds for one image, where they were measured."""

    parameters: int
    gflop: float
    ms: float | None = None


@dataclass(frozen=True)
class Row:
    """One phi over its seeds."""

    phi: int
    seeds: tuple[int, ...]
    AP_by_seed: tuple[float, ...]
    AP: Mean
    AP50: Mean
    seconds: float  # of a training, the median
    cost: Cost
    differences: tuple[float, ...]  # AP minus that of phi 0, of the seeds that both have
    difference: Mean | None  # None of phi 0, and without such a seed
    verdict: str

    @property
    def name(self) -> str:
        block = ATTENTION[self.phi].block
        return block.__name__ if block else "none"

    def cells(self) -> list[str]:
        """As TITLES has them."""
        ms = "" if self.cost.ms is None else f"{self.cost.ms:.1f}"
        more = show(self.difference, "+") if self.difference else ""
        return [
            str(self.phi),
            self.name,
            show(self.AP),
            show(self.AP50),
            more,
            self.verdict,
            f"{self.cost.parameters:,}",
            f"{self.cost.gflop:.2f}",
            ms,
            f"{self.seconds:.0f}",
        ]


def show(mean: Mean, sign: str = "") -> str:
    return f"{mean.value:{sign}.4f}" + ("" if mean.margin is None else f" ± {mean.margin:.4f}")


def compare_phis(results: Mapping[int, Mapping[int, Result]], costs: Mapping[int, Cost]) -> list[Row]:
    """A row for each phi, from its results by seed."""
    plain = results.get(0, {})
    comparisons = max(1, len(results.keys() - {0}))
    rows = []
    for phi, by_seed in sorted(results.items()):
        values = tuple(result.AP for result in by_seed.values())
        paired = tuple(by_seed[seed].AP - plain[seed].AP for seed in by_seed if phi and seed in plain)
        rows.append(
            Row(
                phi=phi,
                seeds=tuple(by_seed),
                AP_by_seed=values,
                AP=mean_of(values),
                AP50=mean_of([result.AP50 for result in by_seed.values()]),
                seconds=median(result.seconds for result in by_seed.values()),
                cost=costs[phi],
                differences=paired,
                difference=mean_of(paired) if paired else None,
                verdict=judge(paired, comparisons) if phi else "",
            )
        )
    return rows


def conclude(rows: Sequence[Row]) -> list[str]:
    """What follows from the rows, in sentences."""
    others = [row for row in rows if row.phi]
    fewest = min((len(row.differences) for row in others), default=0)
    said = []
    if fewest < 2:
        said.append("A single seed cannot tell attention from chance: more seeds are needed, five are a good start.")
    elif fewest < FEW:
        said.append(f"{fewest} seeds give very wide intervals: more seeds are needed, five are a good start.")
    for row in others:
        who = f"phi {row.phi} ({row.name})"
        if row.verdict in ("better", "worse"):
            said.append(f"{who} is {row.verdict} than phi 0: {show(row.difference, '+')} AP.")
        elif row.verdict != "unknown" and not any(row.differences):
            said.append(f"{who} gives exactly what phi 0 gives: these trainings were too short for its gain to grow.")
        elif row.verdict != "unknown":
            chance = ", but one of so many comparisons may come out so by chance" if "perhaps" in row.verdict else ""
            enough, wanted = seeds_needed(row.differences, len(others)), max(abs(row.difference.value), RESOLUTION)
            more = f"More seeds are needed: about {enough} in all would show a difference of {wanted:.4f}."
            if enough <= len(row.differences):
                more = f"A difference of {wanted:.4f} would have shown."
            word = "from" if "not" in row.verdict else "than"
            said.append(f"{who} is {row.verdict} {word} phi 0{chance}: {show(row.difference, '+')} AP. {more}")
    return said


def write_comparison(folder: Path, rows: Sequence[Row], about: Sequence[str]) -> str:
    """`comparison.txt`, `.json`, `.png` and `.html` in `folder`; returns the text.

    `about` says in sentences how the figures came about.
    """
    said = conclude(rows)
    cells = [TITLES, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    text = "\n".join([*lines, "", *said, "", *about])
    names = {row.phi: f"{row.phi} {row.name}" for row in rows}
    panels = {
        "AP": [(names[row.phi], row.AP_by_seed, row.AP) for row in rows],
        "AP more than phi 0": [(names[row.phi], row.differences, row.difference) for row in rows if row.difference],
    }
    draw_means(panels, folder / "comparison.png")
    figures = {"rows": [asdict(row) | {"name": row.name} for row in rows], "conclusions": said, "about": list(about)}
    write_text(folder / "comparison.txt", text + "\n")
    write_text(folder / "comparison.json", json.dumps(figures, indent=2) + "\n")
    write_page(
        folder / PAGE,
        TEMPLATE,
        titles=TITLES,
        rows=cells[1:],
        said=said,
        about=about,
        plot=data_uri((folder / "comparison.png").read_bytes(), "png"),
        confidence=CONFIDENCE,
    )
    return text
