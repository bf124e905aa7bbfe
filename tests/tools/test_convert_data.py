"""Labels survive conversion to other formats and back, and are read as labeling programs export them."""

import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from tests.conftest import SHARED, needs_shared
from tools import convert_data
from utils.data.image_io import write_image
from utils.data.label_readers import read_coco, read_voc, read_yolo
from utils.data.label_writers import format_voc
from utils.data.voc import load_classes, load_samples
from utils.system.diagnostics import Diagnostics

OBJECTS = {
    "photo 1.JPG": [("zebra", [0.0, 0.0, 30.0, 20.0], True), ("ant & bee", [3.25, 4.5, 9.123456, 12.0], False)],
    "bild-ü.png": [],
    "c.webp": [("zebra", [10.0, 5.0, 11.0, 6.0], False), ("ant & bee", [1 / 3, 0.5, 39.9, 29.75], False)],
    "lonely.bmp": [("zebra", [7.0, 3.0, 20.5, 29.0], False)],
}
SPLITS = {"train": ["photo 1", "bild-ü"], "val": ["c"], "trainval": ["photo 1", "bild-ü", "c"]}
CLASSES = ("zebra", "ant & bee", "unused")


@pytest.fixture
def voc(tmp_path):
    folder = tmp_path / "voc"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for name, objects in OBJECTS.items():
        write_image(folder / "JPEGImages" / name, np.full((30, 40, 3), 99, np.uint8))
        stem = name.rpartition(".")[0]
        (folder / "Annotations" / f"{stem}.xml").write_text(format_voc(name, (30, 40), objects), encoding="utf-8")
    for split, names in SPLITS.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names), encoding="utf-8")
    (folder / "ImageSets" / "Main" / "zebra_train.txt").write_text("photo 1  1\nbild-ü -1\n", encoding="utf-8")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    return folder


def convert(source, to, out, **settings):
    return convert_data.main(convert_data.Config(str(source), to, str(out), **settings))


def expect_same(labels, crowd=True):
    assert labels.class_names == CLASSES
    assert {split: sorted(names) for split, names in labels.splits.items()} == {
        split: sorted(names) for split, names in SPLITS.items()
    }
    assert {name: item.path.suffix for name, item in labels.images.items()} == {
        name.rpartition(".")[0]: "." + name.rpartition(".")[2] for name in OBJECTS
    }
    for name, objects in OBJECTS.items():
        item = labels.images[name.rpartition(".")[0]]
        assert item.size == (30, 40)
        assert [found[0] for found in item.objects] == [given[0] for given in objects]
        for (_, box, difficult), (_, expected, mark) in zip(item.objects, objects, strict=True):
            np.testing.assert_allclose(box, expected, atol=2e-8)
            assert difficult == (mark and crowd)


READERS = {
    "voc": lambda path: read_voc(path, None, None, Diagnostics(strict=True)),
    "coco": lambda path: read_coco(path, None, Diagnostics(strict=True)),
    "yolo": lambda path: read_yolo(path, None, None, Diagnostics(strict=True)),
}


@pytest.mark.parametrize("way", ["voc coco voc", "voc yolo voc", "voc coco yolo coco voc", "voc voc"])
def test_round_trip_keeps_labels(voc, tmp_path, way, capsys):
    source, steps = voc, way.split()
    for number, (_, to) in enumerate(pairwise(steps)):
        out = tmp_path / f"{number}"
        convert(source, to, out)
        expect_same(READERS[to](out), crowd="yolo" not in steps[: number + 2])
        source = out
    assert (source / "JPEGImages" / "photo 1.JPG").read_bytes() == (voc / "JPEGImages" / "photo 1.JPG").read_bytes()
    printed = capsys.readouterr().out
    assert ("cannot store it: the difficult flag of 1 objects" in printed) == ("yolo" in steps)


def test_output_can_be_loaded_for_training(voc, tmp_path):
    convert(voc, "coco", tmp_path / "coco")
    convert(tmp_path / "coco", "voc", tmp_path / "kit" / "Set")
    names = load_classes(tmp_path / "kit" / "Set" / "classes.txt")
    samples = load_samples(tmp_path / "kit", ["Set/train", "Set/val"], names, Diagnostics(strict=True))
    assert [sample.name for sample in samples] == ["photo 1", "bild-ü", "c"]
    assert samples[0].difficult.tolist() == [True, False]


def test_reports_what_voc_cannot_store(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    write_image(tmp_path / "images" / "a.png", np.zeros((30, 40, 3), np.uint8))
    segmentation = [[1, 2, 3, 4, 5, 6]]
    boxes = [[1, 2, 0.5, 9], [0, 0, 10, 10], [5, 5, 0, 3]]
    annotations = [
        {"id": i, "image_id": 7, "category_id": 90, "bbox": box, "segmentation": segmentation}
        for i, box in enumerate(boxes)
    ]
    images = [{"id": 7, "file_name": "a.png", "height": 30, "width": 40}]
    categories = [{"id": 90, "name": "late"}, {"id": 3, "name": "early"}]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    labels = convert(tmp_path / "truth.json", "voc", tmp_path / "out")
    assert labels.class_names == ("early", "late")
    assert [item[1] for item in labels.images["a"].objects] == [[0, 0, 10, 10]]
    printed = capsys.readouterr().out
    assert "skip: has zero width or height: truth.json" in printed
    for words in ("segmentation", "category ids", "1 objects less than a pixel"):
        assert words in printed


@pytest.mark.parametrize("program", ["LabelImg", "CVAT", "Label Studio"])
def test_reads_exports_of_labeling_programs(tmp_path, program, capsys):
    """LabelImg writes XML beside the images; CVAT has folders, floats and a label map; Label Studio has images/."""
    folder = tmp_path / "export"
    images, xml = {
        "LabelImg": (folder, folder),
        "CVAT": (folder / "JPEGImages" / "day one", folder / "Annotations" / "day one"),
        "Label Studio": (folder / "images", folder / "Annotations"),
    }[program]
    for part in (images, xml):
        part.mkdir(parents=True, exist_ok=True)
    write_image(images / "1a2b-cat.png", np.zeros((30, 40, 3), np.uint8))
    more = {
        "LabelImg": "<folder>x</folder><path>C:\\Users\\me\\x.png</path>",
        "CVAT": "<occluded>1</occluded><attributes><attribute><name>a</name><value>1</value></attribute></attributes>",
        "Label Studio": "<pose>Unspecified</pose><truncated>0</truncated>",
    }[program]
    text = format_voc("other name", (30, 40), [("cat", [1.5, 2.25, 10.0, 20.0], False)])
    place = "<object>" if program != "LabelImg" else "<annotation>"
    (xml / "1a2b-cat.xml").write_text(text.replace(place, place + more))
    if program == "CVAT":
        (folder / "labelmap.txt").write_text(
            "# label:color_rgb:parts:actions\nbackground:0,0,0::\ndog:1,2,3::\ncat:0,1,2::"
        )
        main = folder / "ImageSets" / "Main"
        main.mkdir(parents=True)
        (main / "default.txt").write_text('"day one/1a2b-cat"\n')
        (main / "cat_default.txt").write_text('"day one/1a2b-cat"  1\n')
    labels = convert(folder, "voc", tmp_path / "out")
    name = "day one_1a2b-cat" if program == "CVAT" else "1a2b-cat"
    assert labels.images[name].objects == [("cat", [1.5, 2.25, 10.0, 20.0], False)]
    assert labels.class_names == (("dog", "cat") if program == "CVAT" else ("cat",))
    assert labels.splits == ({"default": [name]} if program == "CVAT" else {})
    assert ("VOC's attribute, occluded of objects" in capsys.readouterr().out) == (program == "CVAT")


def test_reads_yolo_boxes_confidences_and_polygons(tmp_path, capsys):
    for split, name in (("train", "a"), ("val", "b"), ("val", "empty")):
        for part in ("images", "labels"):
            (tmp_path / part / split).mkdir(parents=True, exist_ok=True)
        write_image(tmp_path / "images" / split / f"{name}.png", np.zeros((50, 100, 3), np.uint8))
    (tmp_path / "obj.names").write_text("cat\ndog\n")
    (tmp_path / "labels" / "train" / "a.txt").write_text("1 0.5 0.5 0.2 0.4\n1 0.5 0.5 0.2 0.4 0.93\n")
    (tmp_path / "labels" / "val" / "b.txt").write_text("0 0.1 0.2 0.3 0.2 0.3 0.6\n\n")
    labels = convert(tmp_path, "voc", tmp_path / "out")
    assert labels.class_names == ("cat", "dog")
    assert labels.images["train_a"].objects == [("dog", [40, 15, 60, 35], False)] * 2
    assert labels.images["val_b"].objects == [("cat", [10, 10, 30, 30], False)]
    assert labels.images["val_empty"].objects == []
    assert labels.splits == {"train": ["train_a"], "val": ["val_b", "val_empty"]}
    assert "is a polygon; its bounding box is used: b.txt line 1" in capsys.readouterr().out


def test_wrong_size_and_exif_do_not_move_boxes(voc, tmp_path, expect_failure, capsys):
    """A wrong <size> is ignored; an image that EXIF turns is rejected if its labels refer to the stored pixels."""
    xml, image = voc / "Annotations" / "lonely.xml", voc / "JPEGImages" / "lonely.bmp"
    xml.write_text(xml.read_text().replace("<width>40</width>", "<width>80</width>"))
    labels = convert(voc, "yolo", tmp_path / "yolo")
    assert "does not state the <size> of its image; the image's own size is used: lonely.xml" in capsys.readouterr().out
    assert labels.images["lonely"].size == (30, 40)
    np.testing.assert_allclose(READERS["yolo"](tmp_path / "yolo").images["lonely"].objects[0][1], [7, 3, 20.5, 29])
    xml.write_text(xml.read_text().replace("<width>80</width>", "<width>40</width>"))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.unlink()
    turned = image.with_suffix(".jpg")
    for size, fits in (((40, 30), False), ((30, 40), True)):
        Image.new("RGB", size).save(turned, exif=exif)
        if fits:
            convert(voc, "yolo", tmp_path / "out")
        else:
            flags = ["--source", voc, "--to", "yolo", "--out", tmp_path / "out"]
            expect_failure(convert_data, flags, str(turned), "is 30x40 when turned by EXIF", "its labels are for 40x30")


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_hidden_exif_orientation_is_accepted_for_coco_and_rejected_for_yolo(voc, tmp_path, orientation, expect_failure):
    image, exif = tmp_path / "yolo" / "images" / "lonely.jpg", Image.Exif()
    exif[0x0112] = orientation
    (voc / "JPEGImages" / "lonely.bmp").unlink()
    Image.new("RGB", (40, 30)).save(voc / "JPEGImages" / "lonely.jpg")
    convert(voc, "yolo", tmp_path / "yolo")
    Image.new("RGB", (40, 30)).save(image, exif=exif)
    expect_failure(
        convert_data, ["--source", tmp_path / "yolo", "--to", "voc", "--out", tmp_path / "a"], str(image), "EXIF"
    )
    turned = voc / "JPEGImages" / "lonely.jpg"
    turned.write_bytes(image.read_bytes())
    expect_failure(convert_data, ["--source", voc, "--to", "yolo", "--out", tmp_path / "b"], str(turned), "EXIF")
    assert convert(voc, "coco", tmp_path / "coco").images["lonely"].size == (30, 40)


def test_names_fault_of_source(voc, expect_failure, tmp_path):
    def expect(source, *words, to="voc", out=tmp_path / "out"):
        expect_failure(convert_data, ["--source", source, "--to", to, "--out", out], *words)

    expect(tmp_path / "none", "does not exist")
    (tmp_path / "nothing").mkdir()
    expect(tmp_path / "nothing", "neither VOC's Annotations/, nor a COCO .json file, nor YOLO's labels/")
    expect(voc, "is not empty", out=voc)
    convert(voc, "yolo", tmp_path / "yolo")
    label = tmp_path / "yolo" / "labels" / "c.txt"
    for text, words in (
        ("7 0.5 0.5 0.1 0.1", "class 7 does not exist: there are 3 classes"),
        ("0 0.5 x 0.1 0.1", "'x' is not a number"),
        ("0 1", "but has 2 numbers"),
    ):
        label.write_text(f"0 0.5 0.5 0.1 0.1\n{text}\n")
        expect(tmp_path / "yolo", f"{label}, line 2", words)
    (voc / "classes.txt").write_text("zebra\n")
    expect(voc, "does not list the classes ant & bee, which the labels use")
    (voc / "JPEGImages" / "c.webp").unlink()
    expect(voc, "c.xml needs exactly one image named 'c', but found none")
    assert not (tmp_path / "out").exists()


def test_json_beside_yolo_labels_is_not_taken_for_coco(voc, tmp_path):
    convert(voc, "yolo", tmp_path / "yolo")
    (tmp_path / "yolo" / "notes.json").write_text('{"categories": [], "info": {}}')
    assert convert(tmp_path / "yolo", "voc", tmp_path / "out").class_names == CLASSES


@pytest.mark.parametrize("name", ["a\nb", " a", "", "\ud800", "\0"])
def test_rejects_class_name_that_class_file_cannot_store(tmp_path, name, expect_failure):
    """A line break would make two classes, and blanks would be lost."""
    write_image(tmp_path / "a.png", np.zeros((30, 40, 3), np.uint8))
    images = [{"id": 1, "file_name": "a.png", "height": 30, "width": 40}]
    truth = {"images": images, "annotations": [], "categories": [{"id": 1, "name": name}]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    for to in ("voc", "yolo", "coco"):
        flags = ["--source", tmp_path / "truth.json", "--to", to, "--out", tmp_path / "out"]
        expect_failure(convert_data, flags, "truth.json has a class", "rename it")
    assert not (tmp_path / "out").exists()


def test_rejects_image_name_that_split_file_cannot_store(voc, tmp_path, expect_failure):
    convert(voc, "yolo", tmp_path / "yolo")
    write_image(tmp_path / "yolo" / "images" / "a\nb.png", np.zeros((30, 40, 3), np.uint8))
    flags = ["--source", tmp_path / "yolo", "--to", "voc", "--out", tmp_path / "out"]
    expect_failure(convert_data, flags, "images has an image named 'a", "rename it")


@needs_shared
def test_keeps_labels_of_real_datasets(tmp_path):
    """All boxes of COCO128, from YOLO to COCO and back."""
    source = SHARED / "data" / "coco128"
    before = read_yolo(source, None, None, Diagnostics())
    convert(source, "coco", tmp_path / "coco")
    after = convert(tmp_path / "coco", "yolo", tmp_path / "yolo")
    assert after.class_names == before.class_names
    assert len(after.images) == 128
    for name, item in before.images.items():
        assert [found[0] for found in after.images[name].objects] == [found[0] for found in item.objects]
        for found, given in zip(after.images[name].objects, item.objects, strict=True):
            np.testing.assert_allclose(found[1], given[1], atol=1e-6)
