"""Decoded images go where they fit, and a complete cache file is reused."""

from dataclasses import replace

import pytest
import torch

from utils.data import cache as cache_module
from utils.data.cache import build_cache, choose_place
from utils.data.voc import load_samples
from utils.system.errors import UserError

CPU = torch.device("cpu")


def test_chooses_place_with_room_for_images(devkit, spec, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache_module, "available_memory", lambda: 1000.0)
    assert choose_place("auto", 499, CPU) == "ram"
    assert choose_place("auto", 501, CPU) == "disk"
    assert choose_place("ram", 501, CPU) == "ram"
    with pytest.raises(UserError, match="cache is device, but training runs on the CPU"):
        choose_place("device", 1, CPU)
    usage = cache_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    samples = load_samples(devkit, ["Demo/val"], spec.class_names)
    with pytest.raises(UserError, match=r"the 6 decoded images take 0\.0 GB, but logs/cache has"):
        build_cache(samples, spec, CPU)
    assert not list(tmp_path.glob("logs/cache/*.images*"))


def test_disk_cache_equals_memory_cache_and_is_reused(devkit, spec, cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    on_disk = build_cache(cache.samples, spec, CPU, "disk")
    monkeypatch.setattr(cache_module, "load_sample", None)  # so that decoding again would fail
    for again in (on_disk, build_cache(cache.samples, spec, CPU, "disk")):
        assert again.place == "disk"
        assert torch.equal(again.images, cache.images)
        assert again.sizes == cache.sizes
        assert again.fingerprints() == cache.fingerprints()
    with pytest.raises(TypeError):  # another size needs another file
        build_cache(cache.samples, replace(spec, input_size=(32, 32)), CPU, "disk")
    assert [path.suffix for path in tmp_path.glob("logs/cache/*") if path.name != "lock"] == [".images"]


@pytest.mark.parametrize("change", [lambda content: content[:-9], lambda content: content[100:], lambda content: b""])
def test_incomplete_cache_file_is_written_again(spec, cache, monkeypatch, tmp_path, change):
    monkeypatch.chdir(tmp_path)
    build_cache(cache.samples, spec, CPU, "disk")
    (path,) = tmp_path.glob("logs/cache/*.images")
    content = path.read_bytes()
    path.write_bytes(change(content))
    assert torch.equal(build_cache(cache.samples, spec, CPU, "disk").images, cache.images)
    assert path.read_bytes() == content
