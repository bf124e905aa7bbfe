"""What a few seeds say: how sure a mean is, whether a difference is more than chance, and how many would show it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95  # that an interval holds the true mean
RESOLUTION = 0.005  # of AP: smaller differences are not worth the seeds that would show them
MOST_SEEDS = 1000


class Mean(NamedTuple):
    """A mean, and how far the true one may lie from it on either side; None where a single value does not say."""

    value: float
    margin: float | None


def mean_of(values: Sequence[float], confidence: float = CONFIDENCE) -> Mean:
    """The mean of values that scatter normally, with its interval by Student's t."""
    count, value = len(values), float(np.mean(values))
    if count < 2:
        return Mean(value, None)
    return Mean(value, float(margins(np.std(values, ddof=1), np.array(count), confidence)))


def margins(deviation: float, counts: np.ndarray, confidence: float = CONFIDENCE) -> np.ndarray:
    """Half the interval's width of a mean of so many values with this standard deviation."""
    return stdtrit(counts - 1, (1 + confidence) / 2) * deviation / np.sqrt(counts)


def judge(differences: Sequence[float], comparisons: int = 1) -> str:
    """What paired differences, one a seed, say: "better", "worse", "perhaps ..." or "not distinguishable".

    Of 20 comparisons of equals one comes out at 95 % by chance. Among `comparisons` a difference therefore counts only
    where it would at a confidence that much stricter (Bonferroni); where it would alone, it is perhaps one.
    """
    if len(differences) < 2:
        return "unknown"
    value, margin = mean_of(differences)
    word = "better" if value > 0 else "worse"
    if abs(value) > mean_of(differences, among(comparisons)).margin:
        return word
    return f"perhaps {word}" if abs(value) > margin else "not distinguishable"


def among(comparisons: int) -> float:
    """The confidence that each of so many comparisons needs, so that all together have CONFIDENCE."""
    return 1 - (1 - CONFIDENCE) / comparisons


def seeds_needed(differences: Sequence[float], comparisons: int = 1) -> int:
    """How many seeds would tell a difference of this mean, at least RESOLUTION, from chance at this scatter."""
    counts = np.arange(2, MOST_SEEDS + 1)
    wanted = max(abs(float(np.mean(differences))), RESOLUTION)
    enough = margins(np.std(differences, ddof=1), counts, among(comparisons)) < wanted
    return int(counts[enough.argmax()]) if enough.any() else MOST_SEEDS
