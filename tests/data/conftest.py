"""The generated dataset, decoded for a small network input."""

import pytest
import torch

from nets.spec import ModelSpec
from tests.conftest import ANCHORS
from utils.data.cache import ImageCache, build_cache
from utils.data.voc import load_classes, load_samples


@pytest.fixture(scope="module")
def spec(devkit) -> ModelSpec:
    return ModelSpec(load_classes(devkit / "Demo" / "classes.txt"), ANCHORS, input_size=(64, 96))


@pytest.fixture(scope="module")
def cache(devkit, spec) -> ImageCache:
    return build_cache(load_samples(devkit, ["Demo/train"], spec.class_names), spec, torch.device("cpu"))
