"""The only inference path: images in, detections in image pixels out."""

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

MAX_LISTED = 8  # classes whose thresholds are listed one by one


class NetworkInput(NamedTuple):
    """A batch of images at the network's input size."""

    images: Tensor  # (B, 3, H, W) uint8 RGB, channels-last
    fits: Sequence[Fit]  # how each image was fitted into the input
    sizes: Sequence[tuple[int, int]]  # original (height, width)


class Detector:
    """A network with its preprocessing, decoding and NMS.

    If `thresholds` set no confidence, each class uses the one `suggested` by the validation (C,), or
    FALLBACK_CONFIDENCE if there are none.
    """

    def __init__(
        self, network: Network, spec: ModelSpec, thresholds: Thresholds | None = None, suggested: Sequence[float] = ()
    ) -> None:
        self.network = network
        self.spec = spec
        self.thresholds = thresholds or Thresholds()
        self.suggested = suggested
        self.confidences = torch.tensor(self.min_confidences(), device=network.device)  # (C,)

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
        """Load a checkpoint, or an exported network (.onnx, .xml); raises UserError if the file is neither.

        `dtype` is the precision of the network; everything else is float32. `compiled` (checkpoints only) uses
        torch.compile, `flip` also runs the network on the mirrored images.
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

    def min_confidences(self) -> list[float]:
        """The minimum confidence of each class (C,), inf for excluded ones; raises UserError for an unknown class."""
        limits, names = self.thresholds, self.spec.class_names
        for name in (*limits.per_class, *limits.class_filter):
            if name not in names:
                raise UserError(f"there is no class {name!r}; the classes are {', '.join(names)}")
        values = list(self.suggested) or [FALLBACK_CONFIDENCE] * len(names)
        if limits.confidence is not None:
            values = [limits.confidence] * len(names)
        values = [limits.per_class.get(name, value) for name, value in zip(names, values, strict=True)]
        chosen = limits.class_filter or names
        return [value if name in chosen else inf for name, value in zip(names, values, strict=True)]

    def describe_confidences(self) -> str:
        """The minimum confidences and where they come from, such as "0.3, as given"."""
        limits, values = self.thresholds, self.min_confidences()
        shown = {name: value for name, value in zip(self.spec.class_names, values, strict=True) if value <= 1}
        text = f"{min(shown.values()):.2f} to {max(shown.values()):.2f}"
        if len(set(shown.values())) == 1:
            text = f"{min(shown.values()):g}"
        elif len(shown) <= MAX_LISTED:
            text = ", ".join(f"{name} {value:.2f}" for name, value in shown.items())
        if limits.confidence is not None or shown.keys() <= limits.per_class.keys():
            return f"{text}, as given"
        source = "suggested by the validation" if self.suggested else "the default without a validation"
        if limits.per_class:
            source = f"{', '.join(limits.per_class)} as given, the others {source}"
        return f"{text} ({source})"

    def expect_classes(self, class_names: Sequence[str], source: str | Path) -> None:
        """Raise UserError unless the class file `source` has the classes of the training."""
        own = self.spec.class_names
        if tuple(class_names) != own:
            raise UserError(
                f"the network was trained on {len(own)} classes ({', '.join(own)}), but {source} has "
                f"{len(class_names)} ({', '.join(class_names)}); leave out the class file, or correct it"
            )

    def __call__(self, image: np.ndarray) -> sv.Detections:
        """uint8 RGB (H, W, 3) -> detections in its pixels, highest score first."""
        return next(self.detect([image]))

    def detect(self, images: Iterable[np.ndarray], batch_size: int = 1) -> Iterator[sv.Detections]:
        """Detections of each image, in order; `batch_size` images go through the network at once."""
        remaining = iter(images)
        while batch := list(islice(remaining, batch_size)):
            yield from self.detect_batch(self.prepare(batch))

    def prepare(self, images: Sequence[np.ndarray]) -> NetworkInput:
        """Fit uint8 RGB images (H, W, 3) to the input size and stack them."""
        fitted, fits = zip(*(fit_image(im, self.spec.input_size, self.spec.letterbox) for im in images), strict=True)
        stacked = torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2)  # this order is channels-last
        return NetworkInput(stacked, fits, [image.shape[:2] for image in images])

    def detect_batch(self, batch: NetworkInput) -> list[sv.Detections]:
        """Detections of each image of a batch."""
        return self.select(self.network(batch.images), batch.fits, batch.sizes)

    def run_cached(
        self, cache: ImageCache, batch_size: int, group: ProcessGroup | None = None
    ) -> Iterator[tuple[slice, Sequence[Tensor]]]:
        """Yield slices of a cached data set with the network's outputs (raw heads, if it is a `TorchNetwork`).

        The processes of a group take turns, so that the batches are the same for any number of processes.
        """
        group = group or ProcessGroup()
        for start in range(group.rank * batch_size, len(cache), group.size * batch_size):
            part = slice(start, min(start + batch_size, len(cache)))
            yield part, self.network(cache.images[part])

    def detect_cached(
        self, cache: ImageCache, batch_size: int, group: ProcessGroup | None = None
    ) -> list[sv.Detections]:
        """The detections of a cached data set in its order; in a group, only the first process has all of them."""
        group = group or ProcessGroup()
        found: dict[int, list[sv.Detections]] = {}
        disable = None if group.is_main else True
        with tqdm(total=len(cache), desc="evaluating", leave=False, disable=disable) as progress:
            for part, outputs in self.run_cached(cache, batch_size, group):
                found[part.start] = self.select(outputs, cache.fits[part], cache.sizes[part])
                progress.update(group.size * (part.stop - part.start))
        return [item for batch in group.gather(found).values() for item in batch]

    @torch.inference_mode()
    def select(
        self, outputs: Sequence[Tensor], fits: Sequence[Fit], sizes: Sequence[tuple[int, int]]
    ) -> list[sv.Detections]:
        """The network's outputs -> detections in the pixels of the originals, whose `sizes` are (height, width)."""
        boxes, scores = self.network.to_boxes(outputs)
        selected = select_detections(boxes, scores, self.confidences, self.thresholds)
        return [
            to_detections([values.cpu().numpy() for values in item], fit, size, self.spec.class_names)
            for fit, size, item in zip(fits, sizes, selected, strict=True)
        ]


def to_detections(
    selected: Sequence[np.ndarray], fit: Fit, size: tuple[int, int], class_names: Sequence[str]
) -> sv.Detections:
    """Boxes (D, 4) in input pixels, scores (D,) and labels (D,) -> detections in an image of (height, width)."""
    boxes, scores, labels = selected
    return sv.Detections(
        xyxy=clip_boxes(fit.to_original(boxes.astype(np.float32)), size),
        confidence=scores,
        class_id=labels.astype(np.int64),
        data={"class_name": np.array(class_names)[labels]},
    )
