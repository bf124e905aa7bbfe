"""Near-duplicates are told from other images, and found quickly."""

import time

import cv2
import numpy as np

from utils.data.duplicates import ImageHash, hash_image, near_duplicates


def test_finds_rescaled_and_brightened_copies_only():
    rng = np.random.default_rng(0)
    images = [cv2.resize(rng.integers(0, 255, (6, 7, 3), dtype=np.uint8), (320, 240)) for _ in range(40)]
    plain = [np.full((100, 100, 3), level, np.uint8) for level in (0, 90, 180)]
    hashes = [hash_image(image) for image in [*images, *plain]]
    changed = cv2.resize(images[7], (200, 160)).astype(int) + rng.integers(-4, 5, (160, 200, 3)) + 5
    others = [hash_image(changed.clip(0, 255).astype(np.uint8)), hash_image(plain[1] + 1)]
    assert [pair[:2] for pair in near_duplicates(hashes, others)] == [(7, 0), (41, 1)]
    assert near_duplicates(hashes, []) == []


def test_compares_10_000_images_within_10_seconds():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**63, 10_000, dtype=np.uint64).tolist()
    hashes = [ImageHash(code, np.zeros((8, 9), np.uint8)) for code in codes]
    started = time.process_time()
    assert len(near_duplicates(hashes, hashes)) == 10_000
    assert time.process_time() - started < 10
