"""Decode each image once: a data set as one uint8 array at the network's input size, with its padded targets.

The array lives on the GPU where it fits, else in RAM, else in a file under `logs/cache` that is mapped into memory; the
processes of one machine share such a file too. The file is named by a fingerprint of the images, so that the next run
starts at once, and one whose images changed makes another.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from math import prod
from os import cpu_count
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nets.yolo import ModelSpec
from utils.boxes import Fit, clip_boxes, fit_to_input
from utils.device import available_memory
from utils.distributed import Ranks
from utils.errors import UserError, make_folder
from utils.files import CACHE_FOLDER, TEMPORARY, lock, replacing
from utils.images import decode_image, fit_image, read_encoded
from utils.voc import Sample

PLACES = ("auto", "device", "ram", "disk")
DEVICE_MEMORY_SHARE = 0.4  # of a GPU's free memory that cached images may take
RAM_SHARE = 0.5  # of the free RAM
CHUNK = 128  # images decoded before they are stored
UNUSED_DAYS = 7  # after which another run removes a file of the cache
FORMAT = "images/1"  # of the file; another one gets another name


@dataclass(frozen=True)
class ImageCache:
    """A data set in memory. Padding in `labels` is -1; `boxes` are xyxy in pixels of the input."""

    samples: Sequence[Sample]
    images: Tensor  # (N, 3, H, W) uint8, RGB
    boxes: Tensor  # (N, M, 4) float32
    labels: Tensor  # (N, M) int64
    fits: list[Fit]  # how each image lies in the input
    sizes: list[tuple[int, int]]  # height, width of each image file
    checksums: list[int]  # CRC-32 of each image file
    place: str  # where the images are: device, ram or disk

    def __len__(self) -> int:
        return len(self.images)

    def fingerprints(self) -> list[tuple[str, int, int]]:
        """Of each sample its name, and checksums of its image and of its objects, difficult ones included."""
        contents = [(item.boxes, item.labels, item.difficult) for item in self.samples]
        objects = [crc32(b"".join(values.tobytes() for values in arrays)) for arrays in contents]
        return [(item.name, image, own) for item, image, own in zip(self.samples, self.checksums, objects, strict=True)]


@dataclass(frozen=True)
class Decoded:
    """What decoding gives: images (N, 3, H, W) uint8, height and width of each file, and its CRC-32."""

    images: Tensor
    sizes: np.ndarray  # (N, 2) int32
    checksums: np.ndarray  # (N,) uint32


def build_cache(
    samples: Sequence[Sample],
    spec: ModelSpec,
    device: torch.device,
    place: str = "auto",
    keep_difficult: bool = False,
    ranks: Ranks | None = None,
) -> ImageCache:
    """Decode every image, in threads, and put the array where `place` (auto, device, ram or disk) says.

    Objects marked difficult are left out unless `keep_difficult`. With several `ranks` on a machine one of them
    decodes. Raises UserError for an image that cannot be read, and where there is no room.
    """
    ranks = ranks or Ranks()
    place = choose_place(place, len(samples) * prod((3, *spec.input_size)), device)
    if ranks.any(place == "disk" or ranks.local_size > 1):  # all of them wait for each other there
        decoded = decode_to_disk(samples, spec, ranks)
        place = "disk" if place == "ram" else place
    else:
        decoded = decode_to_memory(samples, spec)
    images = decoded.images.to(device) if place == "device" else decoded.images
    sizes = [(int(height), int(width)) for height, width in decoded.sizes]
    fits = [fit_to_input(size, spec.input_size, spec.letterbox)[0] for size in sizes]
    boxes, labels = padded_targets(samples, fits, sizes, keep_difficult)
    return ImageCache(samples, images, boxes, labels, fits, sizes, decoded.checksums.tolist(), place)


def choose_place(place: str, size: int, device: torch.device) -> str:
    """Where an array of `size` bytes goes, when `place` leaves it open."""
    if place == "device" and device.type == "cpu":
        raise UserError("cache is device, but training runs on the CPU; use auto, ram or disk")
    if place != "auto":
        return place
    if device.type == "cuda" and size < DEVICE_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "ram" if size < RAM_SHARE * available_memory() else "disk"


def decode(samples: Sequence[Sample], spec: ModelSpec) -> Iterator[Decoded]:
    """All images in their order, CHUNK at a time."""
    pool = ThreadPoolExecutor(cpu_count())
    try:
        with tqdm(total=len(samples), desc="reading images", disable=None) as progress:
            for start in range(0, len(samples), CHUNK):
                chunk = samples[start : start + CHUNK]
                loaded = list(pool.map(partial(load_sample, spec=spec), chunk))
                images, sizes, checksums = zip(*loaded, strict=True)
                yield Decoded(torch.from_numpy(np.stack(images)), np.int32(sizes), np.uint32(checksums))
                progress.update(len(chunk))
    finally:
        pool.shutdown(cancel_futures=True)


def load_sample(sample: Sample, spec: ModelSpec) -> tuple[np.ndarray, tuple[int, int], int]:
    """The image (3, H, W) at the input size, its own height and width, and the CRC-32 of its file."""
    image, checksum = read_sample(sample)
    fitted, _ = fit_image(image, spec.input_size, spec.letterbox)
    return np.ascontiguousarray(fitted.transpose(2, 0, 1)), image.shape[:2], checksum


def read_sample(sample: Sample) -> tuple[np.ndarray, int]:
    """The image (H, W, 3) that the annotation saw, and the CRC-32 of its file."""
    encoded = read_encoded(sample.image)
    image = decode_image(encoded, sample.image, upright=False)
    if sample.size is not None and image.shape[:2] != sample.size:
        upright = decode_image(encoded, sample.image)  # turned by EXIF
        image = upright if upright.shape[:2] == sample.size else image
    return image, crc32(encoded)


def decode_to_memory(samples: Sequence[Sample], spec: ModelSpec) -> Decoded:
    images = torch.empty(len(samples), 3, *spec.input_size, dtype=torch.uint8)
    sizes, checksums, done = np.empty((len(samples), 2), np.int32), np.empty(len(samples), np.uint32), 0
    for part in decode(samples, spec):
        rows = slice(done, done + len(part.images))
        images[rows], sizes[rows], checksums[rows], done = part.images, part.sizes, part.checksums, rows.stop
    return Decoded(images, sizes, checksums)


def decode_to_disk(samples: Sequence[Sample], spec: ModelSpec, ranks: Ranks) -> Decoded:
    """Write the file unless it is there, and map it; a process that another one writes for waits."""
    path = CACHE_FOLDER / f"{fingerprint(samples, spec)}.images"
    needed = len(samples) * (prod((3, *spec.input_size)) + 12)  # 12 bytes for size and checksum
    if ranks.local_rank == 0 and not is_whole(path, needed):
        make_folder(CACHE_FOLDER)
        with lock(CACHE_FOLDER / "lock", wait=True):
            if not is_whole(path, needed):  # another run may have written it meanwhile
                write_images(path, samples, spec, needed)
    ranks.any(False)  # wait for the one that writes
    with suppress(OSError):  # another user's
        os.utime(path)  # so that it is not taken for unused
    return map_images(path, len(samples), spec)


def is_whole(path: Path, needed: int) -> bool:
    return path.is_file() and path.stat().st_size == needed


def write_images(path: Path, samples: Sequence[Sample], spec: ModelSpec, needed: int) -> None:
    """The images one after the other, then all sizes, then all checksums; for one process at a time."""
    for old in CACHE_FOLDER.glob("*.images*"):
        with suppress(OSError):  # in use, another user's, or gone already
            if old.suffix == TEMPORARY or time.time() - old.stat().st_mtime > UNUSED_DAYS * 24 * 3600:
                old.unlink()
    free = shutil.disk_usage(CACHE_FOLDER).free
    if free < needed:
        raise UserError(
            f"the {len(samples)} decoded images take {needed / 1e9:.1f} GB, but {CACHE_FOLDER} has {free / 1e9:.1f} GB "
            "free; make room there, or train with a smaller input_size"
        )
    sizes, checksums = [], []
    with replacing(path) as file:
        for part in decode(samples, spec):
            file.write(part.images.numpy())
            sizes.append(part.sizes)
            checksums.append(part.checksums)
        file.write(np.concatenate(sizes))
        file.write(np.concatenate(checksums))


def map_images(path: Path, count: int, spec: ModelSpec) -> Decoded:
    """The file as arrays; pages come into memory when used, and the system may drop them again."""
    images = np.memmap(path, np.uint8, "c", shape=(count, 3, *spec.input_size))
    sizes = np.fromfile(path, np.int32, count * 2, offset=images.nbytes).reshape(count, 2)
    checksums = np.fromfile(path, np.uint32, count, offset=images.nbytes + sizes.nbytes)
    return Decoded(torch.from_numpy(images), sizes, checksums)


def fingerprint(samples: Sequence[Sample], spec: ModelSpec) -> str:
    """Of everything that decides what is decoded: the files with their times, and how they are fitted."""
    digest = sha256(f"{FORMAT} {spec.input_size} {spec.letterbox}".encode())
    for sample in samples:
        try:
            state = os.stat(sample.image)
        except OSError as error:
            raise UserError(f"cannot read the image {sample.image}: {error.strerror}") from None
        digest.update(f"\n{sample.image.absolute()} {state.st_size} {state.st_mtime_ns} {sample.size}".encode())
    return digest.hexdigest()[:24]


def padded_targets(
    samples: Sequence[Sample], fits: Sequence[Fit], sizes: Sequence[tuple[int, int]], keep_difficult: bool
) -> tuple[Tensor, Tensor]:
    """Boxes (N, M, 4) in input pixels and labels (N, M), with -1 beyond an image's objects."""
    kept = [np.ones_like(sample.difficult) if keep_difficult else ~sample.difficult for sample in samples]
    most = max([1, *(int(keep.sum()) for keep in kept)])
    boxes = np.zeros((len(samples), most, 4), dtype=np.float32)
    labels = np.full((len(samples), most), -1, dtype=np.int64)
    for i, (sample, keep, fit, size) in enumerate(zip(samples, kept, fits, sizes, strict=True)):
        inside = clip_boxes(sample.boxes, size)
        if ((inside[:, 2:] - inside[:, :2]) <= 0).any():
            raise UserError(
                f"{sample.image}: a box of its annotation lies outside the image, which is {size[1]}x{size[0]} pixels; "
                "the annotation may belong to another image"
            )
        boxes[i, : keep.sum()] = fit.to_input(inside[keep])
        labels[i, : keep.sum()] = sample.labels[keep]
    return torch.from_numpy(boxes), torch.from_numpy(labels)
