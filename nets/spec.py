"""The specification that, with its weights, describes a network completely. Does not import torch."""

from dataclasses import asdict, dataclass, field
from typing import Any

STRIDES = (32, 16)  # of the heads, P5 first
MAX_CLASSES, MAX_SIDE = 10_000, 8192  # of a network; more would only be a mistake
PLACES = {"feat1": 256, "feat2": 512, "upsample": 128}  # where attention can stand, with its channels


@dataclass(frozen=True)
class ModelSpec:
    """Everything that turns weights into a detector again; stored in each checkpoint."""

    class_names: tuple[str, ...]
    anchors: tuple[tuple[float, float], ...]  # (6, 2) width, height in pixels of the network's input
    anchors_mask: tuple[tuple[int, ...], ...] = ((3, 4, 5), (1, 2, 3))  # per head, P5 first
    phi: int = 0
    attention_args: dict[str, Any] = field(default_factory=dict)
    places: tuple[str, ...] = tuple(PLACES)
    identity_start: bool = True
    input_size: tuple[int, int] = (416, 416)  # height, width
    scale_xy: float = 2.0  # centre = sigmoid(t) * scale_xy - (scale_xy - 1) / 2 + cell
    letterbox: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def check(self) -> None:
        """Raise ValueError for what no network can have; TypeError where a value is of another kind."""
        names, sides = self.class_names, [side for anchor in self.anchors for side in anchor]
        if not 0 < len(names) <= MAX_CLASSES or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"class_names must be 1 to {MAX_CLASSES:,} names")
        if (
            not sides
            or {len(anchor) for anchor in self.anchors} != {2}
            or not all(0.1 <= side <= 1e5 for side in sides)
        ):
            raise ValueError("anchors must be pairs of width and height, of 0.1 to 100,000 pixels")
        indices = [index for mask in self.anchors_mask for index in mask]
        if len(self.anchors_mask) != len(STRIDES) or not all(map(len, self.anchors_mask)):
            raise ValueError(f"anchors_mask must have {len(STRIDES)} lists of anchors, one for each head")
        if not all(isinstance(index, int) and 0 <= index < len(self.anchors) for index in indices):
            raise ValueError(f"anchors_mask is {self.anchors_mask}, but there are anchors 0 to {len(self.anchors) - 1}")
        if len(self.input_size) != 2 or not all(side in range(32, MAX_SIDE + 1, 32) for side in self.input_size):
            raise ValueError(
                f"input_size is {self.input_size}, but both sides must be multiples of 32, at most {MAX_SIDE}"
            )
        if not 1 <= self.scale_xy <= 10:
            raise ValueError(f"scale_xy is {self.scale_xy}, but must be between 1 and 10")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelSpec":
        """The inverse of `to_dict`, also after a trip through JSON, checked; raises ValueError or TypeError."""

        def freeze(value: Any) -> Any:
            return tuple(freeze(item) for item in value) if isinstance(value, list) else value

        spec = cls(**{name: freeze(value) for name, value in values.items()})
        spec.check()
        return spec
