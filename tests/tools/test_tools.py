"""The tools, as users run them."""

import json
import re
import shutil
import sys
import time
from collections import Counter

import pytest
import torch

from tests.benchmarks import benchmark_training as benchmark
from tests.conftest import ROOT, run
from tools import kmeans_anchors, make_demo_data, make_splits
from utils.data.statistics import anchor_fit
from utils.data.voc import load_classes, load_samples
from utils.detection.anchors import load_anchors
from utils.system.errors import UserError


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


def test_demo_data_spares_foreign_folders(expect_failure, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    expect_failure(make_demo_data, ["--folder", tmp_path], "was not made by this tool")
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


def test_splits_are_never_replaced(expect_failure, unsplit):
    result = run("tools/make_splits.py", "--folder", unsplit)
    assert result.returncode == 0, result.stderr
    assert "1 images without an annotation" in result.stdout
    expect_failure(make_splits, ["--folder", unsplit], "already has train.txt, val.txt, trainval.txt, test.txt")
    (unsplit / "ImageSets" / "Main" / "val.txt").write_bytes("北京\n".encode("gbk"))
    expect_failure(make_splits, ["--folder", unsplit], "val.txt is not UTF-8 text")
    expect_failure(make_splits, ["--folder", unsplit / "none"], "there is no data set")
    expect_failure(make_splits, ["--folder", unsplit, "--val", 0.6, "--test", 0.4], "none to train on")


def classes_of(names, counts):
    """How many objects of each class some images have."""
    return sum((counts[name] for name in names), Counter())


def test_splits_have_their_share_of_every_class():
    """200 images: one of ten has a rare class, and one of four a common one many times."""
    counts = {f"image {i}": Counter(rare=i % 10 == 0, common=5 * (i % 4 == 1), usual=1) for i in range(200)}
    splits = make_splits.split_names(list(counts), make_splits.Config(val=0.2, test=0.1), counts)
    assert [len(splits[name]) for name in ("train", "val", "trainval", "test")] == [140, 40, 180, 20]
    for name, share in (("train", 0.7), ("val", 0.2), ("test", 0.1)):
        found = classes_of(splits[name], counts)
        assert found["rare"] == round(20 * share)
        assert found["common"] == pytest.approx(250 * share, abs=5)
    plain = make_splits.split_names(list(counts), make_splits.Config(val=0.2, test=0.1))
    assert classes_of(plain["val"], counts)["rare"] != 4  # by luck alone


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together(seed):
    names = [f"video{video:02}_{frame}" for video in range(12) for frame in range(5)] + ["alone", "single"]
    settings = make_splits.Config(val=0.05, test=0.05, groups=r"^(video\d+)_", seed=seed)
    splits = make_splits.split_names(names, settings)
    videos = [{name.partition("_")[0] for name in splits[split]} for split in ("train", "val", "test")]
    assert all(videos)
    assert sum(map(len, videos)) == len(set().union(*videos)) == 14
    with pytest.raises(UserError, match="3 groups of images are too few to split"):
        make_splits.split_names(names[:15], make_splits.Config(folds=4, test=0, groups="^video.."))
    with pytest.raises(UserError, match="finds nothing in any name, such as 'video00_0'"):
        make_splits.split_names(names, make_splits.Config(groups="clip"))
    with pytest.raises(UserError, match="no regular expression"):
        make_splits.Config(groups="(")


def test_folds(unsplit):
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


def test_splits_of_drawn_data_are_stratified(devkit, tmp_path, capsys):
    folder = tmp_path / "Set"
    shutil.copytree(devkit / "Demo", folder)
    shutil.rmtree(folder / "ImageSets")
    (folder / "Annotations" / "val_0000.xml").write_text("broken")
    make_splits.main(make_splits.Config(str(folder), val=0.3, test=0.3))
    printed = capsys.readouterr().out
    assert "1 errors in the annotations, whose objects do not count; the first:" in printed
    assert "no object" not in printed  # all six classes are in all splits


def test_anchors_of_known_shapes():
    """Five groups of shapes, which the anchors must be the middles of."""
    middles = torch.tensor([[12.0, 20.0], [40.0, 30.0], [60.0, 90.0], [160.0, 120.0], [300.0, 350.0]])
    noise = torch.rand(5, 200, 2, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.9
    sides = (middles[:, None] * noise).flatten(0, 1)
    found = kmeans_anchors.find_anchors(sides, 5, starts=5, seed=0)
    torch.testing.assert_close(found, middles, rtol=0.02, atol=0)
    assert anchor_fit(sides, found).mean_iou > 0.88
    with pytest.raises(UserError, match="5 anchors need as many shapes of objects, and the sets have 1"):
        kmeans_anchors.find_anchors(torch.ones(9, 2), 5, starts=1, seed=0)


def test_anchor_fit_by_hand():
    sides, anchors = torch.tensor([[10.0, 10.0], [20.0, 10.0], [100.0, 1.0]]), torch.tensor([[10.0, 10.0]])
    fit = anchor_fit(sides, anchors)  # IoU 1, 1/2 and 10 / 190
    assert fit.mean_iou == pytest.approx((1 + 1 / 2 + 10 / 190) / 3)
    assert fit.recall == pytest.approx(2 / 3)
    assert anchor_fit(sides[:0], anchors) is None


def test_anchors_of_100_000_objects_are_quick():
    sides = (torch.randn(100_000, 2, generator=torch.Generator().manual_seed(0)) + 4).exp()
    started = time.process_time()
    kmeans_anchors.find_anchors(sides, 5, kmeans_anchors.Config.starts, seed=0)
    assert time.process_time() - started < 10


def test_anchors_are_written_for_training(devkit, expect_failure, tmp_path, capsys):
    out, classes = tmp_path / "anchors.txt", devkit / "Demo" / "classes.txt"
    flags = ["--devkit", devkit, "--sets", "Demo/train", "--classes", classes, "--out", out, "--input-size", 320, 320]
    result = run("tools/kmeans_anchors.py", *flags)
    assert result.returncode == 0, result.stderr
    before, after = re.findall(r"recall [\d.]+, mean IoU ([\d.]+)", result.stdout)
    assert float(after) > float(before) + 0.02
    anchors = load_anchors(out)
    assert anchors[0] == anchors[1]  # no head has the first one
    areas = [width * height for width, height in anchors]
    assert areas == sorted(areas)
    assert out.with_suffix(".png").stat().st_size > 10_000
    expect_failure(kmeans_anchors, flags, f"{out} exists", "--out")
    expect_failure(kmeans_anchors, ["--input-size", 100, 96], "must be multiples of 32")


def figures_of(tmp_path, *arguments):
    """What a benchmark writes."""
    result = run(ROOT / "tools" / "benchmark.py", *arguments, "--json", tmp_path / "figures", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures").read_text())
    assert json.loads(result.stdout) == figures
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]
    return figures


SMALL = ("--input-size", 64, 64, "--device", "cpu")


def test_benchmark_train(tmp_path):
    flags = ["--rounds", 1, "--steps", 2, "--batch-size", 2, "--mosaic", 1]
    figures = figures_of(tmp_path, "train", *SMALL, *flags)
    assert figures["ratio"] == pytest.approx(figures["images_per_second"] / figures["fixed_batch_images_per_second"])
    assert len(figures["epochs"]) == 3
    assert set(figures["shares"]) == {"augmentation", "forward", "backward", "optimizer"}
    assert sum(figures["shares"].values()) == pytest.approx(1)
    assert figures["step_memory_gb"] > 0.1


def test_benchmark_gpu_keeps_what_it_has(expect_failure, monkeypatch, tmp_path):
    """A run that fails takes nothing from the others; here the runs themselves are made up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expect_failure(benchmark, ["gpu"], "torch finds no CUDA GPU here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    shares = {"augmentation": 0.1, "forward": 0.3, "backward": 0.5, "optimizer": 0.1}
    good = {"images_per_second": 900, "fixed_batch_images_per_second": 1000, "ratio": 0.9, "shares": shares}

    def made_up(command):
        if command[command.index("--batch-size") + 1] == 128:
            raise RuntimeError("a long story\nout of memory")
        command[command.index("--json") + 1].write_text(json.dumps(good | {"step_memory_gb": 5.0}))

    monkeypatch.setattr(benchmark, "run_quietly", made_up)
    found = benchmark.benchmark_gpu(benchmark.Gpu(json=str(tmp_path / "g"), runs=((3, 128), (0, 64))))
    assert json.loads((tmp_path / "g").read_text()) == found
    lines = [line.split() for line in benchmark.gpu_table(found).splitlines()[1:]]
    assert lines[0] == ["3", "128", "failed:", "out", "of", "memory"]
    assert lines[1] == ["0", "64", "900", "1000", "0.900", "5.0", "0.100", "0.300", "0.500", "0.100"]


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
def test_benchmark_memory(tmp_path):
    config = benchmark.Memory(str(tmp_path / "m"), (4, 12), (64, 64), batch_size=2, steps=2, device="cpu")
    benchmark.main(config)
    figures = json.loads((tmp_path / "m").read_text())
    few, many = figures["peaks_gb"]["4"], figures["peaks_gb"]["12"]
    assert figures["ratio"] == pytest.approx(many["RssAnon"] / few["RssAnon"])
    assert all(0.1 < peaks["RssAnon"] < peaks["VmRSS"] for peaks in (few, many))


def test_benchmark_memory_needs_linux(expect_failure, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    expect_failure(benchmark, ["memory"], "darwin")
