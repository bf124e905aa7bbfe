"""Images that are nearly the same, by a perceptual hash: which gray neighbours of a tiny copy are the lighter ones."""

from typing import NamedTuple

import cv2
import numpy as np

SIDE = 8  # of the hash, which has a bit for each pixel
MAX_BITS = 6  # of 64 in which near-duplicates differ; images chosen at random differ in about 32
MAX_LEVELS = 12.0  # mean difference of their gray copies, which tells apart what is too plain for the hash
ROWS = 1024  # images compared with all others at a time


class Look(NamedTuple):
    """An image in few bytes."""

    bits: int  # 64 of them
    gray: np.ndarray  # (SIDE, SIDE + 1) uint8


class Pair(NamedTuple):
    """Two images that are nearly the same, by their places in two lists."""

    first: int
    second: int
    bits: int  # in which their hashes differ


def look_of(image: np.ndarray) -> Look:
    """Of a uint8 RGB image (H, W, 3)."""
    gray = cv2.cvtColor(cv2.resize(image, (SIDE + 1, SIDE), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    bits = np.packbits(gray[:, 1:] > gray[:, :-1]).view(">u8")
    return Look(int(bits[0]), gray)


def near_duplicates(looks: list[Look], others: list[Look]) -> list[Pair]:
    """Of each image of the first list that is nearly the same as some of the second, the pair that is most alike.

    The most alike pairs come first.
    """
    codes, other_codes = (np.array([look.bits for look in part], np.uint64) for part in (looks, others))
    grays, other_grays = (np.array([look.gray for look in part], np.int16) for part in (looks, others))
    found = []
    for start in range(0, len(codes), ROWS):
        bits = np.bitwise_count(codes[start : start + ROWS, None] ^ other_codes)  # (R, N)
        for row in np.flatnonzero((bits <= MAX_BITS).any(axis=1)).tolist():
            near = np.flatnonzero(bits[row] <= MAX_BITS)
            levels = np.abs(other_grays[near] - grays[start + row]).mean(axis=(1, 2))
            alike = near[levels <= MAX_LEVELS]
            if len(alike):
                column = int(alike[bits[row, alike].argmin()])
                found.append(Pair(start + row, column, int(bits[row, column])))
    return sorted(found, key=lambda pair: pair.bits)
