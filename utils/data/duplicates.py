"""Near-duplicate images, found by a perceptual hash: the signs of horizontal gradients in a tiny grayscale copy."""

from typing import NamedTuple

import cv2
import numpy as np

SIDE = 8  # side of the hash, which has SIDE * SIDE bits
MAX_BITS = 6  # maximum number of differing bits, of 64, between near-duplicates; unrelated images differ in about 32
MAX_LEVELS = 12.0  # maximum mean difference of their copies, in gray levels; distinguishes plain images
ROWS = 1024  # number of images compared at a time


class ImageHash(NamedTuple):
    bits: int  # 64 bits
    gray: np.ndarray  # (SIDE, SIDE + 1) uint8


class Pair(NamedTuple):
    first: int  # index in the first list
    second: int  # index in the second list
    bits: int  # number of bits in which their hashes differ


def hash_image(image: np.ndarray) -> ImageHash:
    """The hash of a uint8 RGB image (H, W, 3)."""
    gray = cv2.cvtColor(cv2.resize(image, (SIDE + 1, SIDE), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    bits = np.packbits(gray[:, 1:] > gray[:, :-1]).view(">u8")
    return ImageHash(int(bits[0]), gray)


def near_duplicates(hashes: list[ImageHash], others: list[ImageHash]) -> list[Pair]:
    """For each image in `hashes` with near-duplicates in `others`, the most similar pair; most similar pairs first."""
    codes, other_codes = (np.array([item.bits for item in part], np.uint64) for part in (hashes, others))
    grays, other_grays = (np.array([item.gray for item in part], np.int16) for part in (hashes, others))
    found = []
    for start in range(0, len(codes), ROWS):
        bits = np.bitwise_count(codes[start : start + ROWS, None] ^ other_codes)  # (R, N)
        for row in np.flatnonzero((bits <= MAX_BITS).any(axis=1)).tolist():
            near = np.flatnonzero(bits[row] <= MAX_BITS)
            levels = np.abs(other_grays[near] - grays[start + row]).mean(axis=(1, 2))
            similar = near[levels <= MAX_LEVELS]
            if len(similar):
                column = int(similar[bits[row, similar].argmin()])
                found.append(Pair(start + row, column, int(bits[row, column])))
    return sorted(found, key=lambda pair: pair.bits)
