"""The tools, as users run them."""

import json

import pytest

from tests.conftest import ROOT, run
from tools import make_demo_data, make_splits
from utils.voc import load_classes, load_samples


def test_demo_data_is_seeded_and_valid(devkit, tmp_path):
    same = tmp_path / "Demo"
    make_demo_data.main(make_demo_data.Config(str(same), train=24, val=6, test=6))
    ours = {path.relative_to(devkit / "Demo"): path.read_bytes() for path in (devkit / "Demo").rglob("*.*")}
    theirs = {path.relative_to(same): path.read_bytes() for path in same.rglob("*.*")}
    assert ours == theirs
    samples = load_samples(devkit, ["Demo/train", "Demo/val", "Demo/test"], load_classes(same / "classes.txt"))
    assert len(samples) == 36
    sides = [side for sample in samples for box in sample.boxes for side in (box[2:] - box[:2])]
    assert min(sides) < 20
    assert max(sides) > 100


def test_demo_data_spares_foreign_folders(expect_mistake, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    expect_mistake(make_demo_data, ["--folder", tmp_path], "was not drawn by this tool")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.fixture
def unsplit(tmp_path):
    """A set of 20 empty images, 19 of them with an annotation."""
    for part in ("JPEGImages", "Annotations"):
        (tmp_path / part).mkdir()
    for i in range(20):
        (tmp_path / "JPEGImages" / f"image {i}.png").touch()
        if i:
            (tmp_path / "Annotations" / f"image {i}.xml").touch()
    return tmp_path


def test_splits(unsplit):
    splits = make_splits.main(make_splits.Config(str(unsplit), val=0.2, test=0.1))
    assert {name: len(names) for name, names in splits.items()} == {"train": 13, "val": 4, "trainval": 17, "test": 2}
    assert set(splits["train"]) | set(splits["val"]) == set(splits["trainval"])
    assert not set(splits["trainval"]) & set(splits["test"])
    assert not set(splits["train"]) & set(splits["val"])
    written = (unsplit / "ImageSets" / "Main" / "val.txt").read_text().splitlines()
    assert written == splits["val"]
    again = make_splits.split_names([f"image {i}" for i in range(20)], make_splits.Config(seed=0))
    assert again == make_splits.split_names([f"image {i}" for i in range(20)], make_splits.Config(seed=0))
    assert again != make_splits.split_names([f"image {i}" for i in range(20)], make_splits.Config(seed=1))


def test_splits_are_never_replaced(expect_mistake, unsplit):
    result = run("tools/make_splits.py", "--folder", unsplit)
    assert result.returncode == 0, result.stderr
    assert "1 images without an annotation" in result.stdout
    expect_mistake(make_splits, ["--folder", unsplit], "already has train.txt, val.txt, trainval.txt, test.txt")
    expect_mistake(make_splits, ["--folder", unsplit / "none"], "there is no data set")
    expect_mistake(make_splits, ["--folder", unsplit, "--val", 0.6, "--test", 0.4], "none to train on")


def test_benchmarks_write_their_figures(tmp_path):
    small = ["--input-size", 64, 64, "--rounds", 1, "--device", "cpu"]
    result = run(
        ROOT / "tools" / "benchmark.py", "train", *small, "--steps", 2, "--batch-size", 2, "--json", tmp_path / "t"
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "t").read_text())
    assert figures["ratio"] == pytest.approx(figures["images_per_second"] / figures["fixed_batch_images_per_second"])
    result = run(ROOT / "tools" / "benchmark.py", "infer", *small, "--json", tmp_path / "i")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "i").read_text())
    assert "eager_fp32_channels_first" in figures["network_ms"]
    assert all(value > 0 for group in figures.values() for value in group.values())
