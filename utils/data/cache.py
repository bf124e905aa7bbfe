"""Decode each image once: a dataset as one uint8 array at the network's input size, with its padded targets.

The array is kept on the GPU if it fits, otherwise in RAM, otherwise in a memory-mapped file under `logs/cache`, which
the processes of one machine share. Later runs reuse the file as long as the images do not change.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
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
from utils.system.errors import UserError
from utils.system.files import CACHE_FOLDER, TEMPORARY, atomic_write, lock, make_folder
from utils.system.prefetch import prefetch_map

PLACES = ("auto", "device", "ram", "disk")
DEVICE_MEMORY_SHARE = 0.4  # maximum share of the GPU's free memory
RAM_SHARE = 0.5  # maximum share of the free RAM
UNUSED_DAYS = 7  # cache files unused for longer are deleted
FORMAT = "images/3"  # version of the cache file's format, part of the fingerprint


@dataclass(frozen=True)
class ImageCache:
    """A decoded dataset of N images with at most M objects each."""

    samples: Sequence[Sample]
    images: Tensor  # (N, 3, H, W) uint8, RGB
    boxes: Tensor  # (N, M, 4) float32 xyxy in pixels of the input
    labels: Tensor  # (N, M) int64, padded with -1
    fits: list[Fit]  # placement of each image in the input
    sizes: list[tuple[int, int]]  # height, width of each image file
    checksums: list[int]  # CRC-32 of each image file
    place: str  # where the images are: device, ram or disk

    def __len__(self) -> int:
        return len(self.images)

    def fingerprints(self) -> list[tuple[str, int, int]]:
        """The name of each sample, and checksums of its image file and its objects, difficult ones included."""
        contents = [(item.boxes, item.labels, item.difficult) for item in self.samples]
        objects = [crc32(b"".join(values.tobytes() for values in arrays)) for arrays in contents]
        return [(item.name, image, own) for item, image, own in zip(self.samples, self.checksums, objects, strict=True)]


class ImageRecord(NamedTuple):
    usable: bool  # only usable images are in the array
    size: tuple[int, int]  # height, width
    checksum: int  # CRC-32 of the file
    findings: list[Diagnostic]


def build_cache(
    samples: Sequence[Sample],
    spec: ModelSpec,
    device: torch.device,
    place: str = "auto",
    group: ProcessGroup | None = None,
    diagnostics: Diagnostics | None = None,
) -> ImageCache:
    """Decode all images, once per machine, and store them in `place` (auto, device, ram or disk).

    Raises UserError if space runs out, or for an unusable image or object that `diagnostics` does not skip.
    """
    group, diagnostics = group or ProcessGroup(), diagnostics or Diagnostics(skips=False)
    place = choose_place(place, len(samples) * prod((3, *spec.input_size)), device)
    if group.any_rank(place == "disk" or group.local_size > 1):  # decode_to_disk synchronizes the processes
        images, records = decode_to_disk(samples, spec, group, diagnostics)
        place = "disk" if place == "ram" else place
    else:
        images, records = decode_to_memory(samples, spec, diagnostics)
    findings = [finding for record in records for finding in record.findings]
    diagnostics.extend(findings)
    if not len(images):
        raise UserError(f"none of the {len(samples)} images is usable; the first: {findings[0]}")
    images = images.to(device) if place == "device" else images
    usable = [(sample, record) for sample, record in zip(samples, records, strict=True) if record.usable]
    samples = [clip_objects(sample, record.size, diagnostics) for sample, record in usable]
    sizes, checksums = [record.size for _, record in usable], [record.checksum for _, record in usable]
    fits = [fit_to_input(size, spec.input_size, spec.letterbox)[0] for size in sizes]
    boxes, labels = pad_targets(samples, fits)
    return ImageCache(samples, images, boxes, labels, fits, sizes, checksums, place)


def choose_place(place: str, size: int, device: torch.device) -> str:
    """Resolve the place "auto" for an array of `size` bytes; raises UserError for "device" on the CPU."""
    if place == "device" and device.type == "cpu":
        raise UserError("cache is device, but training runs on the CPU; use auto, ram or disk")
    if place != "auto":
        return place
    if device.type == "cuda" and size < DEVICE_MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "ram" if size < RAM_SHARE * available_memory() else "disk"


def decode_images(
    samples: Sequence[Sample], spec: ModelSpec, diagnostics: Diagnostics
) -> Iterator[tuple[np.ndarray | None, ImageRecord]]:
    """Decode the images in order; raises for the first that `diagnostics` does not accept, but adds nothing to it."""
    policy = replace(diagnostics, found=[])
    with closing(prefetch_map(partial(load_sample, spec=spec), samples, cpu_count())) as decoded:
        for image, record in tqdm(decoded, "decoding images", len(samples), disable=None):
            policy.extend(record.findings)
            yield image, record


def load_sample(sample: Sample, spec: ModelSpec) -> tuple[np.ndarray | None, ImageRecord]:
    """An image (3, H, W) at the input size, or None if it is unusable, and its record."""
    diagnostics = Diagnostics(collect=True)
    with diagnostics.capture():
        image, checksum = read_sample(sample, diagnostics)
        fitted, _ = fit_image(image, spec.input_size, spec.letterbox)
        record = ImageRecord(True, image.shape[:2], checksum, diagnostics.found)
        return np.ascontiguousarray(fitted.transpose(2, 0, 1)), record
    return None, ImageRecord(False, (0, 0), 0, diagnostics.found)


def decode_to_memory(
    samples: Sequence[Sample], spec: ModelSpec, diagnostics: Diagnostics
) -> tuple[Tensor, list[ImageRecord]]:
    """The usable images (N, 3, H, W), and the records of all images."""
    images = torch.empty(len(samples), 3, *spec.input_size, dtype=torch.uint8)
    records, done = [], 0
    for image, record in decode_images(samples, spec, diagnostics):
        if image is not None:
            images[done] = torch.from_numpy(image)
            done += 1
        records.append(record)
    return images[:done], records


def decode_to_disk(
    samples: Sequence[Sample], spec: ModelSpec, group: ProcessGroup, diagnostics: Diagnostics
) -> tuple[Tensor, list[ImageRecord]]:
    """Like `decode_to_memory`, but with a cache file, reused if it exists; one process writes it, the others wait."""
    path = CACHE_FOLDER / f"{fingerprint(samples, spec)}.images"
    if group.local_rank == 0 and map_images(path, len(samples), spec) is None:
        make_folder(CACHE_FOLDER)
        with lock(CACHE_FOLDER / "lock", wait=True):
            if map_images(path, len(samples), spec) is None:  # another run may have written it meanwhile
                write_images(path, samples, spec, diagnostics)
    group.any_rank(False)  # wait for the process that writes
    with suppress(OSError):  # the file may belong to another user
        os.utime(path)  # marks it as used
    return map_images(path, len(samples), spec)


def write_images(path: Path, samples: Sequence[Sample], spec: ModelSpec, diagnostics: Diagnostics) -> None:
    """Write the usable images, the records of all as JSON, and its length in 8 bytes; delete unused cache files."""
    for old in CACHE_FOLDER.glob("*.images*"):
        with suppress(OSError):  # in use, owned by another user, or already deleted
            if old.suffix == TEMPORARY or time.time() - old.stat().st_mtime > UNUSED_DAYS * 24 * 3600:
                old.unlink()
    needed, free = len(samples) * prod((3, *spec.input_size)), shutil.disk_usage(CACHE_FOLDER).free
    if free < needed:
        raise UserError(
            f"the {len(samples)} decoded images take {needed / 1e9:.1f} GB, but {CACHE_FOLDER} has {free / 1e9:.1f} GB "
            "free; make room there, or use a smaller input_size"
        )
    records = []
    with atomic_write(path) as file:
        for image, record in decode_images(samples, spec, diagnostics):
            if image is not None:
                file.write(image)
            records.append(record)
        content = json.dumps(records).encode()
        file.write(content + len(content).to_bytes(8, "little"))


def map_images(path: Path, count: int, spec: ModelSpec) -> tuple[Tensor, list[ImageRecord]] | None:
    """Map the cache file of `count` images into memory; None if it is missing or incomplete."""
    with suppress(OSError, ValueError, TypeError), open(path, "rb") as file:
        end = file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(), "little")
        file.seek(end - length)
        records = [
            ImageRecord(usable, tuple(size), checksum, [Diagnostic(*item) for item in findings])
            for usable, size, checksum, findings in json.loads(file.read(length))
        ]
        usable = sum(record.usable for record in records)
        if len(records) != count or usable * prod((3, *spec.input_size)) + length != end:
            return None
        if not usable:  # an empty file cannot be mapped
            return torch.empty(0, 3, *spec.input_size, dtype=torch.uint8), records
        # copy-on-write, so the system may drop unmodified pages from memory at any time
        images = np.memmap(path, np.uint8, "c", shape=(usable, 3, *spec.input_size))
        return torch.from_numpy(images), records
    return None


def fingerprint(samples: Sequence[Sample], spec: ModelSpec) -> str:
    """A hash of everything that determines the decoded images: files, modification times and input settings."""
    digest = sha256(f"{FORMAT} {spec.input_size} {spec.letterbox}".encode())
    for sample in samples:
        try:
            state = os.stat(sample.image)
        except OSError as error:
            raise UserError(f"cannot read the image {sample.image}: {error.strerror}") from None
        digest.update(f"\n{sample.image.absolute()} {state.st_size} {state.st_mtime_ns} {sample.size}".encode())
    return digest.hexdigest()[:24]


def pad_targets(samples: Sequence[Sample], fits: Sequence[Fit]) -> tuple[Tensor, Tensor]:
    """Boxes (N, M, 4) in input pixels and labels (N, M), padded with -1; difficult objects are left out."""
    max_objects = max([1, *(int((~sample.difficult).sum()) for sample in samples)])
    boxes = np.zeros((len(samples), max_objects, 4), dtype=np.float32)
    labels = np.full((len(samples), max_objects), -1, dtype=np.int64)
    for i, (sample, fit) in enumerate(zip(samples, fits, strict=True)):
        kept = ~sample.difficult
        boxes[i, : kept.sum()] = fit.to_input(sample.boxes[kept])
        labels[i, : kept.sum()] = sample.labels[kept]
    return torch.from_numpy(boxes), torch.from_numpy(labels)
