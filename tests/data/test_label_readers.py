"""Lines of YOLO label files: boxes, confidences, polygons, and what is wrong with invalid ones."""

import pytest

from utils.data.label_readers import read_yolo_label
from utils.system.diagnostics import Diagnostics
from utils.system.errors import UserError

TRIANGLE = "0 0.1 0.2 0.3 0.2 0.3 0.6"


def read(path, line: str, names: tuple[str, ...] = ("cat",)) -> list[list[float]]:
    path.write_text(line)
    return [item.box for item in read_yolo_label(path, (50, 100), names, Diagnostics(skips=False))]


def test_box_of_a_polygon_encloses_its_points(tmp_path):
    assert read(tmp_path / "a.txt", TRIANGLE) == [[10, 10, 30, 30]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{TRIANGLE} 0.9", "line 1: must have an even number of polygon coordinates, but has 7"),
        ("5 0.5 0.5 0.2 0.2", "line 1: class 5 does not exist: there is 1 class, numbered from 0"),
        ("0 0.5 0.5 0.2", "line 1: must be a class index and four fractions of the image, but has 4 numbers"),
        ("0 0.5 0.5 0 0.2", "line 1: has zero width or height"),
        ("0 0.5 x 0.2 0.2", "line 1: .*'x' is not a number"),
    ],
)
def test_rejects_invalid_line(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.txt", line)


def test_names_all_classes_of_an_unknown_index(tmp_path):
    with pytest.raises(UserError, match="class 2 does not exist: there are 2 classes"):
        read(tmp_path / "a.txt", "2 0.5 0.5 0.2 0.2", ("cat", "dog"))
