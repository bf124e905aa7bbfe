"""Sinks: label files, file names, and errors while writing."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

import predict
from tests.inference.fixtures import FRAMES, draw_frame, read_jsonl
from utils.data.image_io import read_image, write_image
from utils.data.voc_xml import read_voc_xml


def test_label_files_and_printed_counts_match_the_detections(config, devkit, capsys):
    source = str(devkit / "Demo" / "JPEGImages" / "test_000*.jpg")
    predict.main(replace(config, source=(source,), save=("voc", "yolo", "coco", "csv", "jsonl", "heatmap", "counts")))
    out, lines = Path(config.out), read_jsonl(config)
    counts = Counter(line["class"] for line in lines)
    printed = capsys.readouterr().out
    assert f"total: {counts['disc']} disc, {counts['square']} square\n" in printed
    assert f"{len(lines)} detections in 6 images; the results" in printed
    boxes: dict[str, list[list[float]]] = {}
    for line in lines:
        boxes.setdefault(Path(line["image"]).stem, []).append(line["box"])
    coco = COCO(str(out / "coco" / "annotations.json"))
    assert [annotation["score"] for annotation in coco.anns.values()] == [line["score"] for line in lines]
    names = (out / "yolo" / "classes.txt").read_text().split()
    for image in coco.imgs.values():
        stem = Path(image["file_name"]).stem
        xml = out / "voc" / "Annotations" / f"{stem}.xml"
        assert xml.read_text(encoding="utf-8").count("<object>") == len(boxes[stem])
        pairs = [(item.box, boxes[stem][number - 1]) for number, item in read_voc_xml(xml).objects.items()]
        np.testing.assert_allclose(*zip(*pairs, strict=True), atol=0.01)
        yolo = [line.split() for line in (out / "yolo" / "labels" / f"{stem}.txt").read_text().splitlines()]
        assert {names[int(row[0])] for row in yolo} <= {"disc", "square"}
        center = [float(row[1]) * image["width"] for row in yolo]
        assert center == pytest.approx([(box[0] + box[2]) / 2 for box in boxes[stem]], abs=0.01)
        ours = [item["bbox"] for item in coco.imgToAnns[image["id"]]]
        np.testing.assert_allclose(np.array(ours)[:, :2], np.array(boxes[stem])[:, :2])
    assert len((out / "detections.csv").read_text().splitlines()) == len(lines) + 1
    assert list(out.glob("heat_*.jpg"))


def test_images_of_the_same_name_keep_separate_files(config, tmp_path):
    names = ["1/a.jpg", "1/a.png", "2/A.jpg", "2/a_2.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_image(tmp_path / name, draw_frame(0))
    source = tuple(str(tmp_path / name) for name in names)
    predict.main(replace(config, source=source, save=("voc", "yolo", "coco", "pictures", "crops")))
    out = Path(config.out)
    for folder, suffix in (("voc/Annotations", "xml"), ("yolo/labels", "txt")):
        expected = {f"{stem}.{suffix}" for stem in ("a", "a_2", "A_3", "a_2_2")}
        assert {path.name for path in (out / folder).iterdir()} == expected
    assert {path.name for path in (out / "voc" / "JPEGImages").iterdir()} == {"a_2.png", "A_3.jpg", "a_2_2.jpg"}
    assert len([path for path in out.iterdir() if path.is_file()]) == 4


def test_labels_of_a_video_come_with_its_frames(config, video):
    predict.main(replace(config, source=(str(video),), save=("voc",), frame_stride=10))
    folder = Path(config.out) / "voc"
    expected = [f"a disc_{number:06d}.jpg" for number in range(0, FRAMES, 10)]
    assert [path.name for path in sorted((folder / "JPEGImages").iterdir())] == expected
    assert len(list((folder / "Annotations").iterdir())) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(("save", "name"), [("pictures", "a disc.mp4"), ("jsonl", "detections.jsonl")])
def test_reports_full_disk(config, video, expect_failure, save, name):
    Path(config.out).mkdir()
    (Path(config.out) / name).symlink_to("/dev/full")
    arguments = [video, "--weights", config.weights, "--out", config.out, "--confidence", 0.1, "--save", save]
    expect_failure(predict, arguments, "cannot write", config.out, "No space left on device")


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_all_sinks_accept_images_of_extreme_shapes(config, tmp_path, size):
    image = tmp_path / "写真 #1?.png"
    write_image(image, np.zeros((*size, 3), np.uint8))
    save = ("pictures", "jsonl", "csv", "voc", "yolo", "coco", "crops", "counts", "heatmap")
    assert predict.main(replace(config, source=(str(image),), save=save)) > 0
    assert read_image(Path(config.out) / image.name).shape == (*size, 3)
    for line in read_jsonl(config):
        assert 0 <= line["box"][0] <= line["box"][2] <= size[1] and 0 <= line["box"][1] <= line["box"][3] <= size[0]
