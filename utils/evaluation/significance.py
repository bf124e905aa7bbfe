"""What a few seeds say: how sure a mean is, whether a difference is more than chance, and how many would show it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor
from tqdm import tqdm

CONFIDENCE = 0.95  # that an interval holds the true mean
RESOLUTION = 0.005  # of AP: smaller differences are not worth the seeds that would show them
MAX_SEEDS = 1000


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
    counts = np.arange(2, MAX_SEEDS + 1)
    wanted = max(abs(float(np.mean(differences))), RESOLUTION)
    enough = margins(np.std(differences, ddof=1), counts, among(comparisons)) < wanted
    return int(counts[enough.argmax()]) if enough.any() else MAX_SEEDS


RECALLS = torch.from_numpy(np.linspace(0, 1, 101))  # where COCO reads the precision; torch.linspace rounds otherwise
AT_A_TIME = 2_000_000  # weighted detections, which a core's cache and memory bear
DRAWS = 1000  # of the bootstrap
INTERVAL = 0.95  # share of the draws that the interval holds


@dataclass(frozen=True)
class ClassMatches:
    """The detections of one class over a split of N images by falling score, as matched at T IoU thresholds."""

    images: Tensor  # (D,) position of the detection's image
    right: Tensor  # (T, D) bool, that it hit an object
    wrong: Tensor  # (T, D) bool, that it did not; neither where it hit one that does not count
    positives: Tensor  # (N,) float64, objects of the class in each image

    def curves(self, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each IoU, recall and the envelope of precision (S, D), of the split weighted by S rows (S, N).

        An image of weight 2 counts as if it were there twice.
        """
        positives = (weights * self.positives).sum(dim=1, keepdim=True)  # (S, 1)
        each = weights[:, self.images]  # (S, D)
        for right, wrong in zip(self.right, self.wrong, strict=True):
            hits = (each * right).cumsum(dim=1)
            precision = hits / (hits + (each * wrong).cumsum(dim=1)).clamp(min=1e-12)
            yield hits / positives, precision.flip(1).cummax(dim=1).values.flip(1)

    def average_precision(self, weights: Tensor) -> Tensor:
        """AP (S,): the mean over IoUs and recalls of the best precision at that recall or beyond.

        NaN where a weighting leaves no object.
        """
        total, count = weights.new_zeros(len(weights)), len(weights)
        for recall, envelope in self.curves(weights):
            index = torch.searchsorted(recall, RECALLS.repeat(count, 1))  # the first that reaches it
            total += torch.cat([envelope, envelope.new_zeros(count, 1)], dim=1).gather(1, index).mean(dim=1)
        absent = (weights * self.positives).sum(dim=1) == 0
        return (total / len(self.right)).masked_fill(absent, torch.nan)


def average_precision(matches: Sequence[ClassMatches], weights: Tensor) -> Tensor:
    """COCO's AP (S,) of the split weighted by S rows of weights (S, N), float64; with weights of 1 pycocotools' own.

    It is the mean over the classes of which a weighting leaves objects; NaN where it leaves none.
    """
    scores = []
    for of_class in matches:
        rows = max(1, AT_A_TIME // max(1, len(of_class.images)))
        scores.append(torch.cat([of_class.average_precision(part) for part in weights.split(rows)]))
    return torch.stack(scores, dim=1).nanmean(dim=1) if scores else weights.new_full((len(weights),), torch.nan)


def influence(matches: Sequence[ClassMatches], num_images: int) -> np.ndarray:
    """By how much AP would rise without each image (N,), to first order.

    It is minus the derivative of the mean area under the curves by the image's weight, which is the infinitesimal
    jackknife.
    """
    weights = torch.ones(1, num_images, dtype=torch.float64, requires_grad=True)
    for of_class in matches:
        areas = [
            (recall.diff(dim=1, prepend=recall.new_zeros(1, 1)) * envelope).sum()
            for recall, envelope in of_class.curves(weights)
        ]
        (torch.stack(areas).mean() / len(matches)).backward()  # a class at a time, for the memory
    return np.zeros(num_images) if weights.grad is None else -weights.grad[0].numpy()


def bootstrap(detectors: Sequence[Sequence[ClassMatches]], seed: int = 0) -> np.ndarray:
    """AP of several detectors (K) on DRAWS samples of the same images with replacement: (K, DRAWS).

    All see the same samples, so the difference of two rows is the paired bootstrap's.
    """
    num_images = len(detectors[0][0].positives)
    generator = np.random.default_rng(seed)
    draws = torch.from_numpy(generator.multinomial(num_images, np.full(num_images, 1 / num_images), DRAWS)).double()
    parts = tqdm(draws.split(DRAWS // 20), desc="bootstrap", leave=False, disable=None)
    scores = [torch.stack([average_precision(matches, part) for matches in detectors]) for part in parts]
    return torch.cat(scores, dim=1).numpy()


def interval(values: np.ndarray) -> tuple[float, float]:
    """Between which quantiles INTERVAL of the values lie."""
    low, high = np.nanquantile(values, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
    return float(low), float(high)
