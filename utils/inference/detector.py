"""The only inference path: images in, detections in their own pixels out."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import supervision as sv
import torch
from torch import Tensor
from tqdm import tqdm

from nets.spec import ModelSpec
from utils.data.cache import ImageCache
from utils.data.image_io import fit_image
from utils.detection.letterbox import Fit, clip_boxes
from utils.detection.nms import FALLBACK_CONFIDENCE, Thresholds, select_detections
from utils.inference.backends import EXPORTED, CompiledNetwork, FlippedNetwork, Network, TorchNetwork, open_exported
from utils.system.distributed import ProcessGroup
from utils.system.errors import UserError
from utils.weights.checkpoint import load_checkpoint

NAMED = 8  # classes up to which their thresholds are said one by one


class Prepared(NamedTuple):
    """Images at the network's input size."""

    images: Tensor  # (B, 3, H, W) uint8 RGB, channels-last
    fits: Sequence[Fit]  # how each lies there
    sizes: Sequence[tuple[int, int]]  # height and width of each before


class Detector:
    """A network with everything around it.

    Where `thresholds` leave the confidence open, it is that which a validation `suggested` for each class (C,), or
    FALLBACK_CONFIDENCE.
    """

    def __init__(
        self,
        network: Network,
        spec: ModelSpec,
        thresholds: Thresholds | None = None,
        suggested: Sequence[float] = (),
    ) -> None:
        self.network = network
        self.spec = spec
        self.thresholds = thresholds or Thresholds()
        self.suggested = suggested
        self.confidences = torch.tensor(self.least_confidences(), device=network.device)  # (C,)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        thresholds: Thresholds | None = None,
        compiled: bool = False,
        flip: bool = False,
    ) -> "Detector":
        """From a checkpoint of train.py or what tools/export.py made of one; raises UserError when the file is none.

        `dtype` is the precision of the network; the rest is float32. `compiled` is for checkpoints. With
        `flip` the mirrored image is looked at as well.
        """
        path, device = Path(path), torch.device(device)
        if path.suffix in EXPORTED:
            network, spec, suggested = open_exported(path, device, dtype)
        else:
            checkpoint = load_checkpoint(path)
            spec, suggested = checkpoint.spec, checkpoint.info.get("thresholds", ())
            kind = CompiledNetwork if compiled else TorchNetwork
            network = kind(checkpoint.build_model(path), spec, device, dtype)
        return cls(FlippedNetwork(network) if flip else network, spec, thresholds, suggested)

    def least_confidences(self) -> list[float]:
        """Of each class (C,); more than 1 for those not wanted. Raises UserError for a class that there is not."""
        limits, names = self.thresholds, self.spec.class_names
        for name in (*limits.per_class, *limits.only):
            if name not in names:
                raise UserError(f"there is no class {name!r}; the weights know {', '.join(names)}")
        least = list(self.suggested) or [FALLBACK_CONFIDENCE] * len(names)
        if limits.confidence is not None:
            least = [limits.confidence] * len(names)
        least = [limits.per_class.get(name, value) for name, value in zip(names, least, strict=True)]
        return [value if name in (limits.only or names) else inf for name, value in zip(names, least, strict=True)]

    def describe_confidences(self) -> str:
        """The least confidence of a detection, and where it comes from, in words."""
        limits, given = self.thresholds, self.least_confidences()
        shown = {name: value for name, value in zip(self.spec.class_names, given, strict=True) if value <= 1}
        words = f"{min(shown.values()):.2f} to {max(shown.values()):.2f}"
        if len(set(shown.values())) == 1:
            words = f"{min(shown.values()):g}"
        elif len(shown) <= NAMED:
            words = ", ".join(f"{name} {value:.2f}" for name, value in shown.items())
        if limits.confidence is not None or shown.keys() <= limits.per_class.keys():
            return f"{words}, as given"
        if limits.per_class:
            words += f", of which {', '.join(limits.per_class)} as given, the others"
        if not self.suggested:
            return f"{words}, since the training had no validation that would suggest another"
        return f"{words}, as the training's validation suggests"

    def expect_classes(self, class_names: Sequence[str], source: str | Path) -> None:
        """Raise UserError when a class file that the user named is not the one of the training."""
        own = self.spec.class_names
        if tuple(class_names) != own:
            raise UserError(
                f"the weights were trained on {len(own)} classes ({', '.join(own)}), but {source} has "
                f"{len(class_names)} ({', '.join(class_names)}); leave the class file out, or correct it"
            )

    def __call__(self, image: np.ndarray) -> sv.Detections:
        """uint8 RGB (H, W, 3) -> detections in its pixels, best first."""
        return next(self.detect([image]))

    def detect(self, images: Iterable[np.ndarray], batch_size: int = 1) -> Iterator[sv.Detections]:
        """Detections of each image, in order; `batch_size` images go through the network at once."""
        remaining = iter(images)
        while batch := list(islice(remaining, batch_size)):
            yield from self.find(self.prepare(batch))

    def prepare(self, images: Sequence[np.ndarray]) -> Prepared:
        """uint8 RGB images (H, W, 3) -> a batch for the network."""
        fitted, fits = zip(*(fit_image(im, self.spec.input_size, self.spec.letterbox) for im in images), strict=True)
        stacked = torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2)  # channels-last already
        return Prepared(stacked, fits, [image.shape[:2] for image in images])

    def find(self, batch: Prepared) -> list[sv.Detections]:
        """Detections of each image of a batch."""
        return self.select(self.network(batch.images), batch.fits, batch.sizes)

    def run_cached(
        self, cache: ImageCache, batch_size: int, group: ProcessGroup | None = None
    ) -> Iterator[tuple[slice, Sequence[Tensor]]]:
        """The network's outputs for a cached data set (of torch the raw heads), and the part of it that they belong to.

        Several `group` take the same batches in turns, so that together they find exactly what one would.
        """
        group = group or ProcessGroup()
        for start in range(group.rank * batch_size, len(cache), group.size * batch_size):
            part = slice(start, min(start + batch_size, len(cache)))
            yield part, self.network(cache.images[part])

    def detect_cached(
        self, cache: ImageCache, batch_size: int, group: ProcessGroup | None = None
    ) -> list[sv.Detections]:
        """The detections of a cached data set, in its order; of several `group` the first has them all."""
        group = group or ProcessGroup()
        found: dict[int, list[sv.Detections]] = {}
        with tqdm(
            total=len(cache), desc="evaluating", leave=False, disable=None if group.is_main else True
        ) as progress:
            for part, outputs in self.run_cached(cache, batch_size, group):
                found[part.start] = self.select(outputs, cache.fits[part], cache.sizes[part])
                progress.update(group.size * (part.stop - part.start))
        return [item for batch in group.gather(found).values() for item in batch]

    @torch.inference_mode()
    def select(
        self, outputs: Sequence[Tensor], fits: Sequence[Fit], sizes: Sequence[tuple[int, int]]
    ) -> list[sv.Detections]:
        """The network's outputs -> detections in the pixels of the originals, which are of (height, width)."""
        boxes, scores = self.network.decode(outputs)
        limits = self.thresholds
        found = select_detections(boxes, scores, self.confidences, limits)
        return [
            to_detections([values.cpu().numpy() for values in item], fit, size, self.spec.class_names)
            for fit, size, item in zip(fits, sizes, found, strict=True)
        ]


def to_detections(
    found: Sequence[np.ndarray], fit: Fit, size: tuple[int, int], class_names: Sequence[str]
) -> sv.Detections:
    """Boxes (D, 4) in the network's input, scores (D,), labels (D,) -> detections in an image of (height, width)."""
    boxes, scores, labels = found
    return sv.Detections(
        xyxy=clip_boxes(fit.to_original(boxes.astype(np.float32)), size),
        confidence=scores,
        class_id=labels.astype(np.int64),
        data={"class_name": np.array(class_names)[labels]},
    )
