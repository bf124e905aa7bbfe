"""The generated dataset is reproducible and valid."""

from tools import make_demo_data
from utils.data.voc import load_classes, load_samples


def test_same_seed_makes_same_valid_dataset(devkit, tmp_path):
    same = tmp_path / "Demo"
    make_demo_data.main(make_demo_data.Config(str(same), train=24, val=6, test=6))
    first = {path.relative_to(devkit / "Demo"): path.read_bytes() for path in (devkit / "Demo").rglob("*.*")}
    second = {path.relative_to(same): path.read_bytes() for path in same.rglob("*.*")}
    assert first == second
    samples = load_samples(devkit, ["Demo/train", "Demo/val", "Demo/test"], load_classes(same / "classes.txt"))
    assert len(samples) == 36
    sides = [side for sample in samples for box in sample.boxes for side in (box[2:] - box[:2])]
    assert min(sides) < 20
    assert max(sides) > 100


def test_does_not_write_to_other_folders(expect_failure, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    expect_failure(make_demo_data, ["--folder", tmp_path], "was not created by this tool")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
