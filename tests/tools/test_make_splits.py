"""Splits are complete, disjoint, stratified and reproducible."""

import shutil
from collections import Counter

import pytest

from tools import make_splits
from utils.system.errors import UserError


@pytest.fixture
def unsplit(tmp_path):
    """A dataset of 20 empty images, 19 of them with an annotation."""
    for part in ("JPEGImages", "Annotations"):
        (tmp_path / part).mkdir()
    for i in range(20):
        (tmp_path / "JPEGImages" / f"image {i}.png").touch()
        if i:
            (tmp_path / "Annotations" / f"image {i}.xml").touch()
    return tmp_path


def test_splits_are_disjoint_complete_and_reproducible(unsplit):
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


def test_never_replaces_splits(call_script, expect_failure, unsplit):
    outcome = call_script(make_splits.main, make_splits.Config, "--folder", unsplit)
    assert outcome.code == 0, outcome.errors
    assert "left out 1 images without an annotation" in outcome.output
    expect_failure(make_splits, ["--folder", unsplit], "already has train.txt, val.txt, trainval.txt, test.txt")
    (unsplit / "ImageSets" / "Main" / "val.txt").write_bytes("北京\n".encode("gbk"))
    expect_failure(make_splits, ["--folder", unsplit], "val.txt is not UTF-8 text")
    expect_failure(make_splits, ["--folder", unsplit / "none"], "does not exist")
    expect_failure(make_splits, ["--folder", unsplit, "--val", 0.6, "--test", 0.4], "none to train on")


def classes_of(names, counts):
    """The objects per class of some images."""
    return sum((counts[name] for name in names), Counter())


def test_every_split_has_its_share_of_every_class():
    """200 images; one in ten has an object of a rare class, one in four has several of a common one."""
    counts = {f"image {i}": Counter(rare=i % 10 == 0, common=5 * (i % 4 == 1), usual=1) for i in range(200)}
    splits = make_splits.split_names(list(counts), make_splits.Config(val=0.2, test=0.1), counts)
    assert [len(splits[name]) for name in ("train", "val", "trainval", "test")] == [140, 40, 180, 20]
    for name, share in (("train", 0.7), ("val", 0.2), ("test", 0.1)):
        found = classes_of(splits[name], counts)
        assert found["rare"] == round(20 * share)
        assert found["common"] == pytest.approx(250 * share, abs=5)
    plain = make_splits.split_names(list(counts), make_splits.Config(val=0.2, test=0.1))
    assert classes_of(plain["val"], counts)["rare"] != 4  # without counts, only chance could give it


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together(seed):
    names = [f"video{video:02}_{frame}" for video in range(12) for frame in range(5)] + ["alone", "single"]
    settings = make_splits.Config(val=0.05, test=0.05, groups=r"^(video\d+)_", seed=seed)
    splits = make_splits.split_names(names, settings)
    videos = [{name.partition("_")[0] for name in splits[split]} for split in ("train", "val", "test")]
    assert all(videos)
    assert sum(map(len, videos)) == len(set().union(*videos)) == 14
    with pytest.raises(UserError, match="3 groups of images are too few for these splits"):
        make_splits.split_names(names[:15], make_splits.Config(folds=4, test=0, groups="^video.."))
    with pytest.raises(UserError, match="does not match any image name, such as 'video00_0'"):
        make_splits.split_names(names, make_splits.Config(groups="clip"))
    with pytest.raises(UserError, match="not a regular expression"):
        make_splits.Config(groups="(")


def test_folds_validate_every_image_once(unsplit):
    splits = make_splits.main(make_splits.Config(str(unsplit), folds=4, test=0.15))
    assert len(splits["test"]) == 3
    validated = [splits[f"val_{number}"] for number in range(1, 5)]
    assert sorted(map(len, validated)) == [4, 4, 4, 4]
    assert sorted(name for fold in validated for name in fold) == splits["trainval"]
    for number, fold in enumerate(validated, start=1):
        assert sorted([*splits[f"train_{number}"], *fold]) == splits["trainval"]
    assert not {*splits["trainval"]} & {*splits["test"]}
    with pytest.raises(UserError, match="folds is 1"):
        make_splits.Config(folds=1)


def test_annotated_classes_are_in_every_split(devkit, tmp_path, capsys):
    folder = tmp_path / "Set"
    shutil.copytree(devkit / "Demo", folder)
    shutil.rmtree(folder / "ImageSets")
    (folder / "Annotations" / "val_0000.xml").write_text("broken")
    make_splits.main(make_splits.Config(str(folder), val=0.3, test=0.3))
    printed = capsys.readouterr().out
    assert "1 errors in the annotations; the affected objects are not counted. The first:" in printed
    assert "no objects of" not in printed  # all six classes are in all splits
