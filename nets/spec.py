"""The specification that, together with the weights, fully describes a network. Does not import torch."""

from dataclasses import asdict, dataclass, field
from typing import Any

STRIDES = (32, 16)  # P5, P4
ATTENTION_PLACES = {"feat1": 256, "feat2": 512, "upsample": 128}  # where a block can be inserted -> channels there
MAX_CLASSES, MAX_INPUT_SIDE = 10_000, 8192  # upper limits that catch damaged files and typos
MIN_ANCHOR_SIDE, MAX_ANCHOR_SIDE = 0.1, 100_000  # pixels


def check_input_size(size: tuple[int, int]) -> None:
    """Raise ValueError unless the network accepts inputs of this (height, width)."""
    if len(size) != 2 or not all(side in range(STRIDES[0], MAX_INPUT_SIDE + 1, STRIDES[0]) for side in size):
        raise ValueError(f"input_size is {size}, but both sides must be multiples of 32, up to {MAX_INPUT_SIDE}")


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to turn weights into a detector; stored in each checkpoint."""

    class_names: tuple[str, ...]
    anchors: tuple[tuple[float, float], ...]  # (6, 2) width, height in input pixels
    anchors_mask: tuple[tuple[int, ...], ...] = ((3, 4, 5), (1, 2, 3))  # anchor indices per head, P5 first
    phi: int = 0
    attention_args: dict[str, Any] = field(default_factory=dict)
    places: tuple[str, ...] = tuple(ATTENTION_PLACES)
    identity_start: bool = True
    input_size: tuple[int, int] = (416, 416)  # height, width
    scale_xy: float = 2.0  # center = sigmoid(t) * scale_xy - (scale_xy - 1) / 2 + cell
    letterbox: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def check(self) -> None:
        """Raise ValueError for an invalid value, or TypeError for a value of the wrong type."""
        names, sides = self.class_names, [side for anchor in self.anchors for side in anchor]
        if not 0 < len(names) <= MAX_CLASSES or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"class_names must contain 1 to {MAX_CLASSES:,} names")
        low, high = MIN_ANCHOR_SIDE, MAX_ANCHOR_SIDE
        if {len(anchor) for anchor in self.anchors} != {2} or not all(low <= side <= high for side in sides):
            raise ValueError(f"anchors must be pairs of width and height between {low} and {high:,} pixels")
        indices = [index for mask in self.anchors_mask for index in mask]
        if len(self.anchors_mask) != len(STRIDES) or not all(map(len, self.anchors_mask)):
            raise ValueError(f"anchors_mask must contain {len(STRIDES)} lists of anchor indices, one for each head")
        if not all(isinstance(index, int) and 0 <= index < len(self.anchors) for index in indices):
            raise ValueError(f"anchors_mask is {self.anchors_mask}, but valid indices are 0 to {len(self.anchors) - 1}")
        check_input_size(self.input_size)
        if not 1 <= self.scale_xy <= 10:
            raise ValueError(f"scale_xy is {self.scale_xy}, but must be between 1 and 10")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelSpec":
        """The inverse of `to_dict`, also after JSON has turned tuples into lists; raises as `check` does."""

        def freeze(value: Any) -> Any:
            return tuple(freeze(item) for item in value) if isinstance(value, list) else value

        spec = cls(**{name: freeze(value) for name, value in values.items()})
        spec.check()
        return spec
