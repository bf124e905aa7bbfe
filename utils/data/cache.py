"""Decode each image once: a data set as one uint8 array at the network's input size, with its padded targets.

The array lives on the GPU where it fits, else in RAM, else in a file under `logs/cache` that is mapped into memory; the
processes of one machine share such a file too. The file is named by a fingerprint of the images, so that the next run
starts at once, and one whose images changed makes another. It also says what was wrong with the images.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from math import prod
from os import cpu_count
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nets.spec import ModelSpec
from utils.data.image_checks import clip_objects, read_sample
from utils.data.image_io import fit_image
from utils.data.voc import Sample
from utils.detection.letterbox import Fit, fit_to_input
from utils.system.device import available_memory
from utils.system.diagnostics import Diagnostic, Diagnostics
from utils.system.distributed import ProcessGroup
from utils.system.errors import UserError, make_folder
from utils.system.files import CACHE_FOLDER, TEMPORARY, atomic_write, lock

PLACES = ("auto", "device", "ram", "disk")
DEVICE_MEMORY_SHARE = 0.4  # of a GPU's free memory that cached images may take
RAM_SHARE = 0.5  # of the free RAM
CHUNK = 128  # images decoded before they are stored
UNUSED_DAYS = 7  # after which another run removes a file of the cache
FORMAT = "images/2"  # of the file; another one gets another name


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
    skipped: list[int]  # places of the samples whose images cannot be used; N are the others
    diagnostics: list[Diagnostic]  # of the images


def build_cache(
    samples: Sequence[Sample],
    spec: ModelSpec,
    device: torch.device,
    place: str = "auto",
    group: ProcessGroup | None = None,
    diagnostics: Diagnostics | None = None,
) -> ImageCache:
    """Decode every image, in threads, and put the array where `place` (auto, device, ram or disk) says.

    Objects marked difficult are no targets. With several `group` on a machine one of them decodes. Raises UserError for
    an image or object that cannot be used, unless `diagnostics` lets it be left out, and where there is no room.
    """
    group, diagnostics = group or ProcessGroup(), diagnostics or Diagnostics(skips=False)
    place = choose_place(place, len(samples) * prod((3, *spec.input_size)), device)
    if group.any_rank(place == "disk" or group.local_size > 1):  # all of them wait for each other there
        decoded = decode_to_disk(samples, spec, group, replace(diagnostics, found=[]))
        place = "disk" if place == "ram" else place
    else:
        decoded = decode_to_memory(samples, spec, replace(diagnostics, found=[]))
    diagnostics.extend(decoded.diagnostics)
    if not len(decoded.images):
        raise UserError(f"none of the {len(samples)} images can be used; the first: {decoded.diagnostics[0]}")
    images = decoded.images.to(device) if place == "device" else decoded.images
    sizes = [(int(height), int(width)) for height, width in decoded.sizes]
    skipped = set(decoded.skipped)
    usable = [sample for i, sample in enumerate(samples) if i not in skipped]
    samples = [clip_objects(sample, size, diagnostics) for sample, size in zip(usable, sizes, strict=True)]
    fits = [fit_to_input(size, spec.input_size, spec.letterbox)[0] for size in sizes]
    boxes, labels = padded_targets(samples, fits)
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


def decode(samples: Sequence[Sample], spec: ModelSpec, diagnostics: Diagnostics) -> Iterator[Decoded]:
    """All images in their order, CHUNK at a time, but those that cannot be used."""
    pool = ThreadPoolExecutor(cpu_count())
    try:
        with tqdm(total=len(samples), desc="reading images", disable=None) as progress:
            for start in range(0, len(samples), CHUNK):
                chunk = samples[start : start + CHUNK]
                loaded = list(pool.map(partial(load_sample, spec=spec), chunk))
                found = [problem for item in loaded for problem in item.diagnostics]
                diagnostics.extend(found)
                usable = [item for item in loaded if item.image is not None]
                images = np.array([item.image for item in usable], np.uint8).reshape(-1, 3, *spec.input_size)
                sizes = np.array([item.size for item in usable], np.int32).reshape(-1, 2)
                checksums = np.array([item.checksum for item in usable], np.uint32)
                skipped = [start + i for i, item in enumerate(loaded) if item.image is None]
                yield Decoded(torch.from_numpy(images), sizes, checksums, skipped, found)
                progress.update(len(chunk))
    finally:
        pool.shutdown(cancel_futures=True)


class Loaded(NamedTuple):
    """An image (3, H, W) at the input size, or None; its own height and width, the CRC-32 of its file, its diagnostics."""

    image: np.ndarray | None
    size: tuple[int, int]
    checksum: int
    diagnostics: list[Diagnostic]


def load_sample(sample: Sample, spec: ModelSpec) -> Loaded:
    """Read and fit an image; whoever asked decides about the diagnostics."""
    diagnostics = Diagnostics(collect=True)
    with diagnostics.capture():
        image, checksum = read_sample(sample, diagnostics)
        fitted, _ = fit_image(image, spec.input_size, spec.letterbox)
        return Loaded(np.ascontiguousarray(fitted.transpose(2, 0, 1)), image.shape[:2], checksum, diagnostics.found)
    return Loaded(None, (0, 0), 0, diagnostics.found)


def decode_to_memory(samples: Sequence[Sample], spec: ModelSpec, diagnostics: Diagnostics) -> Decoded:
    images = torch.empty(len(samples), 3, *spec.input_size, dtype=torch.uint8)
    parts, done = [], 0
    for part in decode(samples, spec, diagnostics):
        images[done : done + len(part.images)] = part.images
        done += len(part.images)
        parts.append(replace(part, images=images[:0]))
    return join(parts, images[:done])


def join(parts: Sequence[Decoded], images: Tensor) -> Decoded:
    """The parts as one, around their images."""
    arrays = (np.concatenate([getattr(part, name) for part in parts]) for name in ("sizes", "checksums"))
    lists = ([item for part in parts for item in getattr(part, name)] for name in ("skipped", "diagnostics"))
    return Decoded(images, *arrays, *lists)


def decode_to_disk(
    samples: Sequence[Sample], spec: ModelSpec, group: ProcessGroup, diagnostics: Diagnostics
) -> Decoded:
    """Write the file unless it is there, and map it; a process that another one writes for waits."""
    path = CACHE_FOLDER / f"{fingerprint(samples, spec)}.images"
    if group.local_rank == 0 and map_images(path, len(samples), spec) is None:
        make_folder(CACHE_FOLDER)
        with lock(CACHE_FOLDER / "lock", wait=True):
            if map_images(path, len(samples), spec) is None:  # another run may have written it meanwhile
                write_images(path, samples, spec, diagnostics)
    group.any_rank(False)  # wait for the one that writes
    with suppress(OSError):  # another user's
        os.utime(path)  # so that it is not taken for unused
    return map_images(path, len(samples), spec)


def write_images(path: Path, samples: Sequence[Sample], spec: ModelSpec, diagnostics: Diagnostics) -> None:
    """The images one after the other, then all sizes, all checksums, and JSON; for one process at a time."""
    for old in CACHE_FOLDER.glob("*.images*"):
        with suppress(OSError):  # in use, another user's, or gone already
            if old.suffix == TEMPORARY or time.time() - old.stat().st_mtime > UNUSED_DAYS * 24 * 3600:
                old.unlink()
    needed, free = len(samples) * prod((3, *spec.input_size)), shutil.disk_usage(CACHE_FOLDER).free
    if free < needed:
        raise UserError(
            f"the {len(samples)} decoded images take {needed / 1e9:.1f} GB, but {CACHE_FOLDER} has {free / 1e9:.1f} GB "
            "free; make room there, or train with a smaller input_size"
        )
    parts = []
    with atomic_write(path) as file:
        for part in decode(samples, spec, diagnostics):
            file.write(part.images.numpy())
            parts.append(replace(part, images=part.images[:0]))
        whole = join(parts, parts[0].images)
        about = json.dumps({"skipped": whole.skipped, "problems": whole.diagnostics}).encode()
        for piece in (whole.sizes, whole.checksums, about, len(about).to_bytes(8, "little")):
            file.write(piece)


def map_images(path: Path, samples: int, spec: ModelSpec) -> Decoded | None:
    """The file as arrays, None where it is not there or not whole; pages come into memory when used."""
    with suppress(OSError, ValueError, KeyError, TypeError), open(path, "rb") as file:
        end = file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(), "little")
        file.seek(end - length)
        about = json.loads(file.read(length))
        count, bytes_each = samples - len(about["skipped"]), prod((3, *spec.input_size))
        if count * (bytes_each + 12) + length != end:  # 12 bytes for size and checksum
            return None
        images = torch.empty(0, 3, *spec.input_size, dtype=torch.uint8)
        if count:  # the system may drop pages again, and maps nothing of no size
            images = torch.from_numpy(np.memmap(path, np.uint8, "c", shape=(count, 3, *spec.input_size)))
        file.seek(count * bytes_each)
        sizes, checksums = np.fromfile(file, np.int32, count * 2), np.fromfile(file, np.uint32, count)
        diagnostics = [Diagnostic(*item) for item in about["problems"]]
        return Decoded(images, sizes.reshape(count, 2), checksums, about["skipped"], diagnostics)
    return None


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


def padded_targets(samples: Sequence[Sample], fits: Sequence[Fit]) -> tuple[Tensor, Tensor]:
    """Boxes (N, M, 4) in input pixels and labels (N, M), with -1 beyond an image's objects; none of difficult ones."""
    most = max([1, *(int((~sample.difficult).sum()) for sample in samples)])
    boxes = np.zeros((len(samples), most, 4), dtype=np.float32)
    labels = np.full((len(samples), most), -1, dtype=np.int64)
    for i, (sample, fit) in enumerate(zip(samples, fits, strict=True)):
        kept = ~sample.difficult
        boxes[i, : kept.sum()] = fit.to_input(sample.boxes[kept])
        labels[i, : kept.sum()] = sample.labels[kept]
    return torch.from_numpy(boxes), torch.from_numpy(labels)
