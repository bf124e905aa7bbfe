"""Confidence intervals over seeds (Student's t) and over images (bootstrap)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit
from tqdm import tqdm

from utils.evaluation.coco import ClassMatches, average_precision

CONFIDENCE = 0.95  # level of all confidence intervals
RESOLUTION = 0.005  # smallest difference in AP that is worth training more seeds for
MAX_SEEDS = 1000
NUM_RESAMPLES = 1000  # number of bootstrap resamples


class MeanEstimate(NamedTuple):
    """A mean and half the width of its confidence interval, which is None for a single value."""

    value: float
    margin: float | None


def estimate_mean(values: Sequence[float], comparisons: int = 1) -> MeanEstimate:
    """The mean of normally distributed values, with its confidence interval by Student's t."""
    value, count = float(np.mean(values)), len(values)
    margin = None if count < 2 else float(margin_of_error(np.std(values, ddof=1), np.array(count), comparisons))
    return MeanEstimate(value, margin)


def margin_of_error(deviation: float, counts: np.ndarray, comparisons: int) -> np.ndarray:
    """Half the width of the confidence interval, with the Bonferroni correction, for each sample size in `counts`."""
    confidence = 1 - (1 - CONFIDENCE) / comparisons
    return stdtrit(counts - 1, (1 + confidence) / 2) * deviation / np.sqrt(counts)


def judge_differences(differences: Sequence[float], comparisons: int = 1) -> str:
    """Classify paired differences, one per seed, as "better", "worse", "perhaps ..." or "not distinguishable".

    "Perhaps" marks a difference that is significant only without correction for the number of `comparisons`; a single
    seed gives "unknown".
    """
    if len(differences) < 2:
        return "unknown"
    value, margin = estimate_mean(differences)
    word = "better" if value > 0 else "worse"
    if abs(value) > estimate_mean(differences, comparisons).margin:
        return word
    return f"perhaps {word}" if abs(value) > margin else "not distinguishable"


def estimate_seeds_needed(differences: Sequence[float], comparisons: int = 1) -> int:
    """The number of seeds for which this mean difference, or RESOLUTION if larger, would be significant."""
    counts = np.arange(2, MAX_SEEDS + 1)
    wanted = max(abs(float(np.mean(differences))), RESOLUTION)
    enough = margin_of_error(np.std(differences, ddof=1), counts, comparisons) < wanted
    return int(counts[enough.argmax()]) if enough.any() else MAX_SEEDS


def bootstrap_ap(detectors: Sequence[Sequence[ClassMatches]], seed: int = 0) -> np.ndarray:
    """AP (K, NUM_RESAMPLES) of K detectors on the same resamples of the images (paired bootstrap)."""
    num_images = len(detectors[0][0].num_objects)
    counts = np.random.default_rng(seed).multinomial(num_images, np.full(num_images, 1 / num_images), NUM_RESAMPLES)
    weights = torch.from_numpy(counts).double()
    parts = tqdm(weights.split(NUM_RESAMPLES // 20), desc="bootstrap", leave=False, disable=None)
    scores = [torch.stack([average_precision(matches, part) for matches in detectors]) for part in parts]
    return torch.cat(scores, dim=1).numpy()


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """The central interval that contains the fraction CONFIDENCE of the values."""
    low, high = np.nanquantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
