"""The only inference path: images in, detections in their own pixels out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from pathlib import Path

import numpy as np
import supervision as sv
import torch
from torch import Tensor
from tqdm import tqdm

from nets.yolo import ModelSpec
from utils.boxes import Fit, clip_boxes
from utils.cache import ImageCache
from utils.checkpoint import load_checkpoint
from utils.distributed import Ranks
from utils.errors import UserError, check_range
from utils.images import fit_image
from utils.nms import FALLBACK_CONFIDENCE, select_detections
from utils.runtimes import EXPORTED, Network, TorchNetwork, open_exported

NAMED = 8  # classes up to which their thresholds are said one by one


@dataclass(frozen=True)
class Thresholds:
    """What of the network's output becomes a detection."""

    confidence: float | None = None  # least score; None: of each class what the checkpoint suggests
    nms_iou: float = 0.5  # two boxes of a class that overlap more are one object
    top_k: int = 3000  # candidates of an image that enter NMS
    max_detections: int = 300  # of an image

    def __post_init__(self) -> None:
        if self.confidence is not None:
            check_range(self, 0, 1, "confidence")
        check_range(self, 0, 1, "nms_iou")
        check_range(self, 1, inf, "top_k", "max_detections")


EVALUATION_THRESHOLDS = Thresholds(confidence=0.001)  # low, so that the whole curve is seen


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
        confidences = suggested or [FALLBACK_CONFIDENCE] * spec.num_classes
        if self.thresholds.confidence is not None:
            confidences = [self.thresholds.confidence] * spec.num_classes
        self.confidences = torch.tensor(confidences, device=network.device)  # (C,)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        thresholds: Thresholds | None = None,
        compiled: bool = False,
    ) -> "Detector":
        """From a checkpoint of train.py or what tools/export.py made of one; raises UserError when the file is none.

        `dtype` is the precision of the network; the rest is float32. `compiled` is for checkpoints.
        """
        path, device = Path(path), torch.device(device)
        if path.suffix in EXPORTED:
            network, spec, suggested = open_exported(path, device, dtype)
            return cls(network, spec, thresholds, suggested)
        checkpoint = load_checkpoint(path)
        network = TorchNetwork(checkpoint.build_model(path), checkpoint.spec, device, dtype, compiled)
        return cls(network, checkpoint.spec, thresholds, checkpoint.info.get("thresholds", ()))

    def describe_confidences(self) -> str:
        """The least confidence of a detection, and where it comes from, in words."""
        if self.thresholds.confidence is not None:
            return f"{self.thresholds.confidence:g}, as given"
        if not self.suggested:
            return f"{FALLBACK_CONFIDENCE}, since the training had no validation that would suggest another"
        words = f"{min(self.suggested):.2f} to {max(self.suggested):.2f}"
        if len(self.suggested) <= NAMED:
            named = zip(self.spec.class_names, self.suggested, strict=True)
            words = ", ".join(f"{name} {value:.2f}" for name, value in named)
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
            fitted, fits = zip(*(fit_image(im, self.spec.input_size, self.spec.letterbox) for im in batch), strict=True)
            stacked = torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2)  # (B, 3, H, W), channels-last already
            yield from self.select(self.network(stacked), fits, [image.shape[:2] for image in batch])

    def run_cached(
        self, cache: ImageCache, batch_size: int, ranks: Ranks | None = None
    ) -> Iterator[tuple[slice, Sequence[Tensor]]]:
        """The network's outputs for a cached data set (of torch the raw heads), and the part of it that they belong to.

        Several `ranks` take the same batches in turns, so that together they find exactly what one would.
        """
        ranks = ranks or Ranks()
        for start in range(ranks.rank * batch_size, len(cache), ranks.size * batch_size):
            part = slice(start, min(start + batch_size, len(cache)))
            yield part, self.network(cache.images[part])

    def detect_cached(self, cache: ImageCache, batch_size: int, ranks: Ranks | None = None) -> list[sv.Detections]:
        """The detections of a cached data set, in its order; of several `ranks` the first has them all."""
        ranks = ranks or Ranks()
        found: dict[int, list[sv.Detections]] = {}
        with tqdm(total=len(cache), desc="evaluating", leave=False, disable=None if ranks.first else True) as progress:
            for part, outputs in self.run_cached(cache, batch_size, ranks):
                found[part.start] = self.select(outputs, cache.fits[part], cache.sizes[part])
                progress.update(ranks.size * (part.stop - part.start))
        return [item for batch in ranks.gather(found).values() for item in batch]

    @torch.inference_mode()
    def select(
        self, outputs: Sequence[Tensor], fits: Sequence[Fit], sizes: Sequence[tuple[int, int]]
    ) -> list[sv.Detections]:
        """The network's outputs -> detections in the pixels of the originals, which are of (height, width)."""
        boxes, scores = self.network.decode(outputs)
        limits = self.thresholds
        found = select_detections(boxes, scores, self.confidences, limits.nms_iou, limits.top_k, limits.max_detections)
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
