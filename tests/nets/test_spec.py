"""Checks of the model specification."""

from dataclasses import replace

import pytest

from nets.spec import MAX_CLASSES, MAX_INPUT_SIDE, ModelSpec, check_input_size
from tests.conftest import ANCHORS

SPEC = ModelSpec(("a", "b"), ANCHORS)


@pytest.mark.parametrize("size", [(32, 32), (416, 416), (64, 96), (MAX_INPUT_SIDE, 32)])
def test_multiples_of_32_are_accepted(size):
    check_input_size(size)
    replace(SPEC, input_size=size).check()


@pytest.mark.parametrize(
    "size", [(0, 32), (416, 400), (32, -32), (32,), (32, 32, 32), (32, MAX_INPUT_SIDE + 32), (64.5, 64)]
)
def test_other_input_sizes_are_rejected(size):
    for check in (check_input_size, lambda size: replace(SPEC, input_size=size).check()):
        with pytest.raises(ValueError, match=r"input_size is \(.*but both sides must be multiples of 32, up to 8192"):
            check(size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ()}, "class_names must contain 1 to 10,000 names"),
        ({"class_names": ("a", "")}, "class_names must"),
        ({"class_names": ("a",) * (MAX_CLASSES + 1)}, "class_names must"),
        ({"anchors": ()}, "anchors must be pairs"),
        ({"anchors": ((1.0, 2.0, 3.0),)}, "anchors must be pairs"),
        ({"anchors": ((0.0, 2.0),) * 6}, "between 0.1 and 100,000 pixels"),
        ({"anchors": ((float("nan"), 2.0),) * 6}, "between 0.1 and 100,000 pixels"),
        ({"anchors_mask": ((0, 1, 2),)}, "2 lists of anchor indices"),
        ({"anchors_mask": ((3, 4, 6), (1, 2, 3))}, "valid indices are 0 to 5"),
        ({"scale_xy": 0.5}, "scale_xy is 0.5"),
    ],
)
def test_invalid_values_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **changes).check()
