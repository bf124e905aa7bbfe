"""VOC data as users write it, and the one sentence that each mistake gets."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nets.spec import ModelSpec
from tests.conftest import ANCHORS, SHARED, needs_shared
from utils.data.cache import build_cache
from utils.data.image_io import write_image
from utils.data.voc import Sample, load_classes, load_samples
from utils.data.voc_xml import read_annotation
from utils.system.diagnostics import Diagnostics
from utils.system.errors import UserError

OBJECT = (
    "<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>"
    "<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
)


def make_set(folder: Path, annotations: dict[str, str], split: str | None = None, suffix: str = ".jpg") -> Path:
    """A set VOC/train of 40x30 images with these annotations, under `folder`."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / "VOC" / part).mkdir(parents=True)
    for name, text in annotations.items():
        write_image(folder / "VOC" / "JPEGImages" / f"{name}{suffix}", np.full((30, 40, 3), 99, np.uint8))
        (folder / "VOC" / "Annotations" / f"{name}.xml").write_text(text, encoding="utf-8")
    lines = "\n".join(annotations) if split is None else split
    (folder / "VOC" / "ImageSets" / "Main" / "train.txt").write_text(lines, encoding="utf-8")
    return folder


def annotation(*objects: tuple, root: str = "annotation") -> str:
    body = "".join(OBJECT.format(name=name, box=box, difficult=difficult) for name, box, difficult in objects)
    return f"<{root}>{body}</{root}>"


def test_boxes_are_one_based_and_inclusive(tmp_path):
    text = annotation(("cat", (1, 1, 40, 30), 0), ("dog", (5, 6, 5, 6), 1), ("cat", (2.5, 1, 3, 3), ""))
    (sample,) = load_samples(make_set(tmp_path, {"a": text}), ["VOC/train"], ("dog", "cat"))
    np.testing.assert_array_equal(sample.boxes, np.float32([[0, 0, 40, 30], [4, 5, 5, 6], [1.5, 0, 3, 3]]))
    assert sample.labels.tolist() == [1, 0, 1]
    assert sample.difficult.tolist() == [False, True, False]


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".png", ".bmp", ".webp", ".jpeg"])
@pytest.mark.parametrize("name", ["plain", "with space", "köln 北京 🚗", "dots.in.name"])
def test_names_and_suffixes(tmp_path, suffix, name):
    devkit = make_set(tmp_path, {name: annotation()}, f"\ufeff{name}  \r\n\r\n", suffix)
    (sample,) = load_samples(devkit, ["VOC/train"], ("cat",))
    assert sample.name == name
    assert sample.image.name == name + suffix
    assert sample.boxes.shape == (0, 4)  # an image without objects is background


def test_several_sets_follow_each_other(tmp_path):
    devkit = make_set(tmp_path, {"b": annotation(), "a": annotation()})
    (devkit / "VOC" / "ImageSets" / "Main" / "val.txt").write_text("a\n")
    samples = load_samples(devkit, ["VOC/train", "VOC/val"], ("cat",))
    assert [sample.name for sample in samples] == ["b", "a", "a"]


BOX = (1, 1, 5, 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["a.xml", "not well-formed", "split file"]),
        ("<annotation><object>", ["a.xml", "not well-formed"]),
        ("<html></html>", ["a.xml", "<html>", "<annotation>"]),
        ('<!DOCTYPE x [<!ENTITY e "1">]><annotation>&e;</annotation>', ["a.xml", "DOCTYPE"]),
        ('<!DOCTYPE x SYSTEM "file:///etc/passwd"><annotation/>', ["a.xml", "DOCTYPE"]),
        ('<?xml version="1.0" encoding="rot13"?><annotation/>', ["a.xml", "encoding", "UTF-8"]),
        (annotation(("", BOX, 0)), ["a.xml", "object 1", "no <name>"]),
        (annotation(("cat", BOX, 0), ("cat", ("12,5", 1, 2, 3), 0)), ["object 2", "xmin", "12,5"]),
        (annotation(("cat", (1, 1, "NaN", 5), 0)), ["xmax", "NaN"]),
        (annotation(("cat", (1, 1, "1e400", 5), 0)), ["xmax", "1e400"]),
        (annotation(("cat", (1, "", 5, 5), 0)), ["ymin"]),
        (annotation(("cat", (9, 1, 5, 5), 0)), ["ends before it begins"]),
        (annotation(("cat", BOX, "yes")), ["difficult", "yes"]),
        (
            annotation(("Cat", BOX, 0), ("bird", BOX, 0), ("bird", (2, 1, 5, 5), 0)),
            ["'Cat' (1)", "'bird' (2)", "cat, dog"],
        ),
    ],
)
def test_malformed_annotations(tmp_path, text, words):
    devkit = make_set(tmp_path, {"a": text})
    with pytest.raises(UserError) as mistake:
        load_samples(devkit, ["VOC/train"], ("cat", "dog"))
    for word in words:
        assert word in str(mistake.value)


def test_missing_parts(tmp_path):
    devkit = make_set(tmp_path, {"a": annotation()}, "a\nb\n")
    with pytest.raises(UserError, match="names 'b'"):
        load_samples(devkit, ["VOC/train"], ("cat",))
    write_image(devkit / "VOC" / "JPEGImages" / "b.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"b\.xml does not exist; an image without objects"):
        load_samples(devkit, ["VOC/train"], ("cat",))
    write_image(devkit / "VOC" / "JPEGImages" / "a.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match="several images"):
        load_samples(devkit, ["VOC/train"], ("cat",))
    with pytest.raises(UserError, match=r"looked for .*test\.txt.*make demo"):
        load_samples(devkit, ["VOC/test"], ("cat",))
    (devkit / "VOC" / "ImageSets" / "Main" / "train.txt").write_text("\n\n")
    with pytest.raises(UserError, match=r"train\.txt is empty"):
        load_samples(devkit, ["VOC/train"], ("cat",))


@pytest.mark.parametrize("stated", ["stored", "upright"])
def test_exif_orientation_follows_the_annotation(tmp_path, stated):
    """A picture stored 40x20 and shown 20x40: the stated size says which of the two the boxes lie on."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    devkit = make_set(tmp_path, {})
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned a quarter to the right
    Image.fromarray(pixels).save(devkit / "VOC" / "JPEGImages" / "a.jpg", exif=exif)
    (devkit / "VOC" / "ImageSets" / "Main" / "train.txt").write_text("a")
    height, width = (20, 40) if stated == "stored" else (40, 20)
    box = (1, 1, 20, 20)  # the white half in both
    text = annotation(("cat", box, 0)).replace(
        "<object>", f"<size><width>{width}</width><height>{height}</height></size><object>", 1
    )
    (devkit / "VOC" / "Annotations" / "a.xml").write_text(text)
    spec = ModelSpec(("cat",), ANCHORS, input_size=(64, 64))
    cache = build_cache(load_samples(devkit, ["VOC/train"], ("cat",)), spec, torch.device("cpu"))
    assert cache.sizes == [(height, width)]
    x1, y1, x2, y2 = cache.boxes[0, 0].int().tolist()
    white = cache.images[0, :, y1 + 2 : y2 - 2, x1 + 2 : x2 - 2]
    assert white.min() > 200
    assert cache.images[0].float().mean() < 140


WRITTEN = 1_000_000_000  # when the annotations of `large` were written, in seconds


def write_annotation(devkit: Path, name: str, text: str, seconds: int = WRITTEN) -> None:
    path = devkit / "VOC" / "Annotations" / f"{name}.xml"
    path.write_text(text, encoding="utf-8")
    os.utime(path, (seconds, seconds))


def load(devkit: Path) -> list[Sample]:
    return load_samples(devkit, ["VOC/train"], ("cat", "dog"))


def assert_same(first: list[Sample], second: list[Sample]) -> None:
    for one, other in zip(first, second, strict=True):
        assert (one.name, one.image, one.size) == (other.name, other.image, other.size)
        for field in ("boxes", "labels", "difficult"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field), strict=True)


@pytest.fixture
def large(tmp_path, monkeypatch) -> Path:
    """A devkit with three annotations, in a working directory where that is enough for an index."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.data.voc_xml.INDEX_FROM", 3)
    sized = annotation(("cat", (1.25, 2, 30, 20), 0), ("dog", (3, 4, 5, 6), 1))
    sized = sized.replace("<object>", "<size><width>40</width><height>30</height></size><object>", 1)
    texts = {"a": sized, "b": annotation(), "c": annotation(("cat", (1, 1, 5, 5), 0))}
    devkit = make_set(tmp_path, texts)
    for name, text in texts.items():
        write_annotation(devkit, name, text)
    return devkit


@pytest.fixture
def parsed(monkeypatch) -> list[str]:
    """The names of the files that are parsed from here on."""
    names = []

    def spy(path: Path, diagnostics: Diagnostics):
        names.append(path.name)
        return read_annotation(path, diagnostics)

    monkeypatch.setattr("utils.data.voc_xml.read_annotation", spy)
    return names


def test_index_spares_the_parsing(large, parsed):
    first = load(large)
    assert parsed == ["a.xml", "b.xml", "c.xml"]
    second = load(large)
    assert len(parsed) == 3
    assert_same(first, second)
    assert [sample.size for sample in second] == [(30, 40), None, None]


@pytest.mark.parametrize(
    ("box", "seconds"), [((1, 1, 5, 15), WRITTEN), ((1, 1, 5, 6), WRITTEN + 1), ((1, 1, 5, 6), WRITTEN - 1)]
)
def test_changed_and_added_annotations_are_read_anew(large, parsed, box, seconds):
    load(large)
    write_annotation(large, "c", annotation(("cat", box, 0)), seconds)
    write_annotation(large, "d", annotation(("dog", box, 0)))
    write_image(large / "VOC" / "JPEGImages" / "d.jpg", np.zeros((4, 4, 3), np.uint8))
    (large / "VOC" / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nc\nd\n")
    parsed.clear()
    for _ in range(2):
        samples = load(large)
        assert parsed == ["c.xml", "d.xml"]
        assert samples[2].boxes.tolist() == samples[3].boxes.tolist() == [[0, 0, *box[2:]]]


def test_removed_annotation_is_missed_in_spite_of_the_index(large, monkeypatch):
    load(large)
    monkeypatch.setattr("utils.data.voc_xml.INDEX_FROM", 2)
    (large / "VOC" / "Annotations" / "b.xml").unlink()
    with pytest.raises(UserError, match=r"b\.xml does not exist; an image without objects"):
        load(large)
    (large / "VOC" / "ImageSets" / "Main" / "train.txt").write_text("a\nc\n")
    write_annotation(large, "c", annotation(), WRITTEN + 1)
    load(large)
    (index,) = Path("logs/cache").glob("*.json")
    assert list(json.loads(index.read_text())["annotations"]) == ["a.xml", "c.xml"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"version": 2', '"version": 1'),
        ('{"version"', '["version"'),
        ("}}", ""),
        ('"cat"', "7"),
        ("[0.25, 1.0, 30.0, 20.0]", "[0.25, 1.0, 30.0]"),
        ("[30, 40]", "30"),
        ("[30, 40], [", "["),
        (str(WRITTEN), "x"),
    ],
)
def test_damaged_index_is_ignored_and_rewritten(large, old, new):
    first = load(large)
    (index,) = Path("logs/cache").glob("*.json")
    text = index.read_text()
    assert old in text
    index.write_text(text.replace(old, new))
    assert_same(first, load(large))
    assert json.loads(index.read_text()) == json.loads(text)


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[" * 100_000, b"null"])
def test_foreign_index_is_ignored(large, content):
    first = load(large)
    (index,) = Path("logs/cache").glob("*.json")
    index.write_bytes(content)
    assert_same(first, load(large))


@pytest.mark.parametrize(("age_ns", "names"), [(1_900_000_000, []), (2_100_000_000, ["a.xml", "b.xml", "c.xml"])])
def test_what_was_just_written_is_not_indexed(large, parsed, monkeypatch, age_ns, names):
    monkeypatch.setattr("time.time_ns", lambda: WRITTEN * 10**9 + age_ns)
    load(large)
    indexed = [name for path in Path("logs").rglob("*.json") for name in json.loads(path.read_text())["annotations"]]
    assert indexed == names


def test_small_folder_has_no_index(large, monkeypatch):
    monkeypatch.setattr("utils.data.voc_xml.INDEX_FROM", 4)
    load(large)
    assert not Path("logs").exists()


def test_unwritable_index_only_warns(large, parsed, capsys):
    Path("logs").write_text("a file where the folder should be")
    assert_same(load(large), load(large))
    assert len(parsed) == 6
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert all("could not be written" in line and "logs" in line for line in warnings)


def test_index_that_another_process_writes_is_left_to_it(large, parsed, monkeypatch, capsys):
    monkeypatch.setattr("utils.data.voc_xml.lock", lambda path: None)
    assert_same(load(large), load(large))
    assert len(parsed) == 6
    assert not list(Path("logs/cache").iterdir())
    assert not capsys.readouterr().err


def test_unknown_class_is_told_from_the_index_too(large, parsed):
    messages = []
    for _ in range(2):
        with pytest.raises(UserError, match=r"'dog' \(1\); those that are: cat\.") as mistake:
            load_samples(large, ["VOC/train"], ("cat",))
        messages.append(str(mistake.value))
    assert messages[0] == messages[1]
    assert len(parsed) == 3


def test_class_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes(b"\xef\xbb\xbfred blood cell \r\nWBC\r\n\r\n")
    assert load_classes(path) == ("red blood cell", "WBC")


@pytest.mark.parametrize(("text", "word"), [("", "empty"), ("a\n\nb", "line 2"), ("a\nb\na", "'a' 2 times")])
def test_bad_class_file(tmp_path, text, word):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=word):
        load_classes(path)
    with pytest.raises(UserError, match="no class file"):
        load_classes(tmp_path / "none.txt")


@needs_shared
@pytest.mark.parametrize(
    ("name", "images", "objects"), [("bccd", (205, 87, 72), 4888), ("helmet", (700, 150, 250), None)]
)
def test_real_sets_load(tmp_path, monkeypatch, name, images, objects):
    monkeypatch.chdir(tmp_path)
    folder = SHARED / "data" / name
    classes = load_classes(folder / "classes.txt")
    splits = [load_samples(folder, [f"VOC2007/{split}"], classes) for split in ("train", "val", "test")]
    assert tuple(map(len, splits)) == images
    counted = sum(len(sample.labels) for split in splits for sample in split)
    assert counted == objects or objects is None
    assert all((sample.boxes[:, 2:] > sample.boxes[:, :2]).all() for split in splits for sample in split)
