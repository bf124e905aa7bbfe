"""VOC data as users write it, and the error messages for invalid data."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nets.spec import ModelSpec
from tests.conftest import ANCHORS, SHARED, needs_shared
from utils.data.cache import build_cache
from utils.data.image_checks import clip_objects
from utils.data.image_io import write_image
from utils.data.voc import check_overlap, check_unique, load_classes, load_samples
from utils.data.voc_xml import count_truncated
from utils.system.diagnostics import Diagnostics
from utils.system.errors import UserError

OBJECT = (
    "<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>"
    "<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
)


def make_set(folder: Path, annotations: dict[str, str], split: str | None = None, suffix: str = ".jpg") -> Path:
    """Make a set VOC/train of 40x30 images with these annotations in `folder`."""
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
def test_reads_image_names_and_suffixes(tmp_path, suffix, name):
    devkit = make_set(tmp_path, {name: annotation()}, f"\ufeff{name}  \r\n\r\n", suffix)
    (sample,) = load_samples(devkit, ["VOC/train"], ("cat",))
    assert sample.name == name
    assert sample.image.name == name + suffix
    assert sample.boxes.shape == (0, 4)  # an image without objects is background


def test_reads_several_sets_in_order(tmp_path):
    devkit = make_set(tmp_path, {"b": annotation(), "a": annotation()})
    (devkit / "VOC" / "ImageSets" / "Main" / "val.txt").write_text("a\n")
    samples = load_samples(devkit, ["VOC/train", "VOC/val"], ("cat",))
    assert [sample.name for sample in samples] == ["b", "a", "a"]


@pytest.mark.parametrize("linked", [1, 2, 3])
def test_finds_images_that_are_listed_twice_through_links(tmp_path, linked):
    names = "abc"[:linked]
    devkit = make_set(tmp_path, {name: annotation() for name in names})
    for name in names:
        folder = devkit / "VOC"
        (folder / "JPEGImages" / f"link_{name}.jpg").symlink_to(f"{name}.jpg")
        (folder / "Annotations" / f"link_{name}.xml").write_text(annotation())
    (devkit / "VOC" / "ImageSets" / "Main" / "val.txt").write_text("\n".join(f"link_{name}" for name in names))
    train, val = (load_samples(devkit, [f"VOC/{split}"], ("cat",)) for split in ("train", "val"))
    others = ("", ", and so is 1 other", ", and so are 2 others")[linked - 1]
    with pytest.raises(UserError, match=rf"link_a\.jpg is in both the training and the validation sets{others}; "):
        check_overlap(train, val, Diagnostics())
    images = ("1 image", "2 images", "3 images")[linked - 1]
    with pytest.raises(UserError, match=f"^VOC/train, VOC/val list {images} more than once, such as .*a.jpg; "):
        check_unique(train + val, ("VOC/train", "VOC/val"), Diagnostics())
    with pytest.raises(UserError, match=f"^VOC/all lists {images} more than once"):
        check_unique(train + val, ("VOC/all",), Diagnostics())
    check_overlap(train, [], Diagnostics())
    check_unique(val, ("VOC/val",), Diagnostics())


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
            ["'Cat' (1; did you mean 'cat'?)", "'bird' (2)", "cat, dog"],
        ),
    ],
)
def test_names_fault_of_malformed_annotation(tmp_path, text, words):
    devkit = make_set(tmp_path, {"a": text})
    with pytest.raises(UserError) as error:
        load_samples(devkit, ["VOC/train"], ("cat", "dog"))
    for word in words:
        assert word in str(error.value)


def test_names_missing_part(tmp_path):
    devkit = make_set(tmp_path, {"a": annotation()}, "a\nb\n")
    with pytest.raises(UserError, match="image named 'b', but found none"):
        load_samples(devkit, ["VOC/train"], ("cat",))
    write_image(devkit / "VOC" / "JPEGImages" / "b.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"b\.xml does not exist; an image without objects"):
        load_samples(devkit, ["VOC/train"], ("cat",))
    write_image(devkit / "VOC" / "JPEGImages" / "a.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match=r"a\.jpg, a\.png; keep one"):
        load_samples(devkit, ["VOC/train"], ("cat",))
    with pytest.raises(UserError, match=r"looked for .*test\.txt.*make demo"):
        load_samples(devkit, ["VOC/test"], ("cat",))
    (devkit / "VOC" / "ImageSets" / "Main" / "train.txt").write_text("\n\n")
    with pytest.raises(UserError, match=r"train\.txt is empty"):
        load_samples(devkit, ["VOC/train"], ("cat",))


@pytest.mark.parametrize("stated", ["stored", "upright"])
def test_exif_orientation_follows_the_annotation(tmp_path, stated):
    """An image stored as 40x20 and shown as 20x40: the stated size tells which one the boxes refer to."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    devkit = make_set(tmp_path, {})
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn to the right
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


def test_objects_keep_their_position_in_the_file(tmp_path):
    """Messages number objects as the file does, also after repeated ones and ones outside the image were left out."""
    text = annotation(("cat", (1, 1, 9, 9), 0), ("cat", (1, 1, 9, 9), 0), ("cat", (90, 1, 95, 9), 0), ("dog", BOX, 1))
    (sample,) = load_samples(make_set(tmp_path, {"a": text}), ["VOC/train"], ("cat", "dog"), Diagnostics())
    assert [sample.place(i) for i in range(3)] == ["object 1", "object 3", "object 4"]
    clipped = clip_objects(sample, (30, 40), Diagnostics())
    assert clipped.labels.tolist() == [0, 1]
    assert [clipped.place(i) for i in range(2)] == ["object 1", "object 4"]
    with pytest.raises(UserError, match=r"a\.xml, object 3: the box lies outside the image"):
        clip_objects(sample, (30, 40), Diagnostics(skips=False))


def test_counts_truncated_objects(tmp_path):
    text = annotation(*[("cat", (1, 1, 5, 5 + i), 0) for i in range(3)])
    (tmp_path / "a.xml").write_text(text.replace("<difficult>", "<truncated> 1 </truncated><difficult>", 2))
    assert count_truncated(tmp_path / "a.xml") == 2


def test_reads_class_file_with_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes(b"\xef\xbb\xbfred blood cell \r\nWBC\r\n\r\n")
    assert load_classes(path) == ("red blood cell", "WBC")


@pytest.mark.parametrize(("text", "word"), [("", "empty"), ("a\n\nb", "line 2"), ("a\nb\na", "'a' 2 times")])
def test_names_fault_of_class_file(tmp_path, text, word):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=word):
        load_classes(path)
    with pytest.raises(UserError, match="does not exist"):
        load_classes(tmp_path / "none.txt")


@needs_shared
@pytest.mark.parametrize(
    ("name", "images", "objects"), [("bccd", (205, 87, 72), 4888), ("helmet", (700, 150, 250), None)]
)
def test_reads_real_datasets(tmp_path, monkeypatch, name, images, objects):
    monkeypatch.chdir(tmp_path)
    folder = SHARED / "data" / name
    classes = load_classes(folder / "classes.txt")
    splits = [load_samples(folder, [f"VOC2007/{split}"], classes) for split in ("train", "val", "test")]
    assert tuple(map(len, splits)) == images
    counted = sum(len(sample.labels) for split in splits for sample in split)
    assert counted == objects or objects is None
    assert all((sample.boxes[:, 2:] > sample.boxes[:, :2]).all() for split in splits for sample in split)
