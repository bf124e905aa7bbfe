"""The only inference path: from images to detections in image pixels."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from utils.system.device import choose_compile
from utils.system.distributed import ProcessGroup
from utils.system.errors import UserError
from utils.weights.checkpoint import load_checkpoint

MAX_LISTED = 8  # maximum number of classes whose thresholds are listed


class NetworkInput(NamedTuple):
    """A batch of images at the input size of the network."""

    images: Tensor  # (B, 3, H, W) uint8 RGB, channels-last
    fits: Sequence[Fit]  # transform of each image to the input
    sizes: Sequence[tuple[int, int]]  # original (height, width)


class Detector:
    """A network with its preprocessing, decoding and NMS; `suggested` are confidences from validation (C,), if any."""

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
        compile: str = "off",
        flip: bool = False,
    ) -> "Detector":
        """Load a checkpoint or an exported network; raises UserError.

        `compile` ("auto", "on" or "off") applies only to checkpoints.
        """
        path, device = Path(path), torch.device(device)
        if path.suffix in EXPORTED:
            network, spec, suggested = open_exported(path, device, dtype)
        else:
            checkpoint = load_checkpoint(path)
            spec, suggested = checkpoint.spec, checkpoint.info.get("thresholds", ())
            network = TorchNetwork(checkpoint.build_model(path), spec, device, dtype)
            if choose_compile(compile, device):
                network = CompiledNetwork(network, required=compile == "on")
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
        """Raise UserError if the `class_names` of the file `source` differ from those of the network."""
        own = self.spec.class_names
        if tuple(class_names) != own:
            raise UserError(
                f"the network was trained on {len(own)} classes ({', '.join(own)}), but {source} has "
                f"{len(class_names)} ({', '.join(class_names)}); leave out the class file, or correct it"
            )

    def __call__(self, image: np.ndarray) -> sv.Detections:
        """Detections in a uint8 RGB image (H, W, 3), in descending order of score."""
        return self.detect_batch(self.prepare([image]))[0]

    def prepare(self, images: Sequence[np.ndarray]) -> NetworkInput:
        """Fit uint8 RGB images (H, W, 3) to the input size and stack them."""
        fitted, fits = zip(*(fit_image(im, self.spec.input_size, self.spec.letterbox) for im in images), strict=True)
        stacked = torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2)  # channels-last
        return NetworkInput(stacked, fits, [image.shape[:2] for image in images])

    def detect_batch(self, batch: NetworkInput) -> list[sv.Detections]:
        return self.select(self.network(batch.images), batch.fits, batch.sizes)

    def run_cached(
        self, cache: ImageCache, batch_size: int, group: ProcessGroup | None = None
    ) -> Iterator[tuple[slice, Sequence[Tensor]]]:
        """Yield slices of a cached dataset with their raw outputs; the processes of a group take turns."""
        group = group or ProcessGroup()
        for start in range(group.rank * batch_size, len(cache), group.size * batch_size):
            part = slice(start, min(start + batch_size, len(cache)))
            yield part, self.network(cache.images[part])

    def detect_cached(
        self, cache: ImageCache, batch_size: int, group: ProcessGroup | None = None
    ) -> list[sv.Detections]:
        """The detections in each image of a cached dataset; in a group, only the main process returns all of them."""
        group = group or ProcessGroup()
        found: dict[int, Tensor] = {}
        disable = None if group.is_main else True
        with tqdm(total=len(cache), desc="evaluating", leave=False, disable=disable) as progress:
            for part, outputs in self.run_cached(cache, batch_size, group):
                found[part.start] = self.select_rows(outputs)
                progress.update(group.size * (part.stop - part.start))
        return self.gather_detections(found, cache, group)

    def gather_detections(
        self, found: Mapping[int, Tensor], cache: ImageCache, group: ProcessGroup
    ) -> list[sv.Detections]:
        """Rows from `select_rows`, keyed by the first image of their batch -> detections; all only in the main process.

        The rows of all batches are copied to the host at once, since each copy waits for the GPU.
        """
        blank = torch.empty(0, device=self.network.device)  # for a process without batches
        batches = torch.cat([blank, *found.values()]).cpu().split([len(rows) for rows in found.values()])
        gathered = group.gather({start: rows.numpy() for start, rows in zip(found, batches, strict=True)})
        rows = [own for batch in gathered.values() for own in batch]
        return self.to_detections(rows, cache.fits[: len(rows)], cache.sizes[: len(rows)])

    @torch.inference_mode()
    def select_rows(self, outputs: Sequence[Tensor]) -> Tensor:
        """Outputs of the network -> detections (B, D, 6) as from `select_detections`, on the device."""
        return select_detections(*self.network.to_boxes(outputs), self.confidences, self.thresholds)

    def select(
        self, outputs: Sequence[Tensor], fits: Sequence[Fit], sizes: Sequence[tuple[int, int]]
    ) -> list[sv.Detections]:
        """Outputs of the network -> detections in pixels of the original images, whose `sizes` are (height, width)."""
        return self.to_detections(self.select_rows(outputs).cpu().numpy(), fits, sizes)

    def to_detections(
        self, rows: Iterable[np.ndarray], fits: Sequence[Fit], sizes: Sequence[tuple[int, int]]
    ) -> list[sv.Detections]:
        """Rows (D, 6) of each image, as from `select_rows` -> detections in pixels of the original images."""
        detections, class_names = [], np.array(self.spec.class_names)
        for fit, size, padded in zip(fits, sizes, rows, strict=True):
            found = padded[padded[:, 5] >= 0]
            boxes, scores, labels = found[:, :4], found[:, 4], found[:, 5].astype(np.int64)
            boxes = clip_boxes(fit.to_original(boxes), size)
            detections.append(sv.Detections(boxes, None, scores, labels, data={"class_name": class_names[labels]}))
        return detections
