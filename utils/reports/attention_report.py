"""Comparison of attention blocks: their AP gain over phi 0 for several seeds, and their cost."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from nets.attention import ATTENTION
from utils.evaluation.significance import (
    CONFIDENCE,
    RESOLUTION,
    MeanEstimate,
    estimate_mean,
    estimate_seeds_needed,
    judge_differences,
)
from utils.reports.html import data_uri, write_page
from utils.reports.plots import draw_means
from utils.system.files import write_text
from utils.system.text import format_table

PAGE, TEMPLATE = "comparison.html", "attention_report.html"
MIN_SEEDS = 3  # with fewer, confidence intervals are very wide
GAIN = "AP gain over phi 0"
COLUMNS = ("phi", "block", "AP", "AP50", GAIN, "verdict", "parameters", "GFLOP", "latency (ms)", "training (s)")


@dataclass(frozen=True)
class Result:
    """The test result of one training run."""

    AP: float
    AP50: float
    seconds: float  # training time


@dataclass(frozen=True)
class Cost:
    """The cost of a network."""

    parameters: int
    gflop: float
    ms: float | None = None  # latency for one image, if measured


@dataclass(frozen=True)
class Row:
    """The results of one phi for all seeds."""

    phi: int
    seeds: tuple[int, ...]
    AP_by_seed: tuple[float, ...]
    AP: MeanEstimate
    AP50: MeanEstimate
    seconds: float  # median training time
    cost: Cost
    differences: tuple[float, ...]  # AP minus the AP of phi 0 with the same seed
    difference: MeanEstimate | None  # None for phi 0, or if no seed is shared with it
    verdict: str

    @property
    def name(self) -> str:
        block = ATTENTION[self.phi].block
        return block.__name__ if block else "none"

    def format_cells(self) -> list[str]:
        """The cells of the row, in the order of COLUMNS."""
        gain = format_mean(self.difference, "+") if self.difference else ""
        latency = "" if self.cost.ms is None else f"{self.cost.ms:.1f}"
        accuracy = [format_mean(self.AP), format_mean(self.AP50), gain, self.verdict]
        cost = [f"{self.cost.parameters:,}", f"{self.cost.gflop:.2f}", latency, f"{self.seconds:.0f}"]
        return [str(self.phi), self.name, *accuracy, *cost]


def format_mean(mean: MeanEstimate, sign: str = "") -> str:
    return f"{mean.value:{sign}.4f}" + ("" if mean.margin is None else f" ± {mean.margin:.4f}")


def compare_phis(results: Mapping[int, Mapping[int, Result]], costs: Mapping[int, Cost]) -> list[Row]:
    """One row for each phi; `results` are by phi and seed."""
    baseline = results.get(0, {})
    comparisons = max(1, len(results.keys() - {0}))
    rows = []
    for phi, by_seed in sorted(results.items()):
        values = tuple(result.AP for result in by_seed.values())
        differences = tuple(by_seed[seed].AP - baseline[seed].AP for seed in by_seed if phi and seed in baseline)
        rows.append(
            Row(
                phi=phi,
                seeds=tuple(by_seed),
                AP_by_seed=values,
                AP=estimate_mean(values),
                AP50=estimate_mean([result.AP50 for result in by_seed.values()]),
                seconds=median(result.seconds for result in by_seed.values()),
                cost=costs[phi],
                differences=differences,
                difference=estimate_mean(differences) if differences else None,
                verdict=judge_differences(differences, comparisons) if phi else "",
            )
        )
    return rows


def conclude(rows: Sequence[Row]) -> list[str]:
    """The conclusions from the rows, as sentences."""
    compared = [row for row in rows if row.phi]
    num_seeds = min((len(row.differences) for row in compared), default=0)
    sentences = []
    if num_seeds < 2:
        sentences.append("One seed cannot show whether a difference is due to chance; train at least five.")
    elif num_seeds < MIN_SEEDS:
        sentences.append(f"{num_seeds} seeds give very wide confidence intervals; train at least five.")
    return sentences + [describe_row(row, len(compared)) for row in compared if row.verdict != "unknown"]


def describe_row(row: Row, comparisons: int) -> str:
    """The verdict on a phi, and how many seeds would be needed to show a difference."""
    name = f"phi {row.phi} ({row.name})"
    if row.verdict in ("better", "worse"):
        return f"{name} is {row.verdict} than phi 0: {format_mean(row.difference, '+')} AP."
    if not any(row.differences):
        return f"{name} has exactly the AP of phi 0: the training runs were too short for its gain to grow."
    needed, wanted = estimate_seeds_needed(row.differences, comparisons), max(abs(row.difference.value), RESOLUTION)
    advice = f"About {needed} seeds in total would be needed to show a difference of {wanted:.4f}."
    if needed <= len(row.differences):
        advice = f"A difference of {wanted:.4f} would have been significant."
    verdict = f"{row.verdict} {'from' if 'not' in row.verdict else 'than'} phi 0"
    if "perhaps" in row.verdict:
        verdict += " (not significant after correction for the number of comparisons)"
    return f"{name} is {verdict}: {format_mean(row.difference, '+')} AP. {advice}"


def write_attention_report(folder: Path, rows: Sequence[Row], about: Sequence[str]) -> str:
    """Write comparison.txt, .json, .png and .html, and return the text; `about` describes the methods."""
    conclusions = conclude(rows)
    cells = [COLUMNS, *(row.format_cells() for row in rows)]
    text = "\n".join([format_table(cells), "", *conclusions, "", *about])
    names = {row.phi: f"{row.phi} {row.name}" for row in rows}
    panels = {
        "AP": [(names[row.phi], row.AP_by_seed, row.AP) for row in rows],
        GAIN: [(names[row.phi], row.differences, row.difference) for row in rows if row.difference],
    }
    draw_means(panels, folder / "comparison.png")
    content = {"rows": [asdict(row) | {"name": row.name} for row in rows], "conclusions": conclusions}
    write_text(folder / "comparison.txt", text + "\n")
    write_text(folder / "comparison.json", json.dumps(content | {"about": list(about)}, indent=2) + "\n")
    plot = data_uri((folder / "comparison.png").read_bytes(), "png")
    values = {"columns": COLUMNS, "rows": cells[1:], "conclusions": conclusions, "about": about, "plot": plot}
    write_page(folder / PAGE, TEMPLATE, **values, gain=GAIN, confidence=CONFIDENCE)
    return text
