"""Plots of many classes and of unusual class names."""

import warnings

import numpy as np
import pytest
from matplotlib import font_manager

from utils.data.image_io import read_image
from utils.evaluation.metrics import Curve
from utils.reports.plots import CJK_FONTS, draw_confidence, draw_confusion, draw_precision_recall


def test_draws_many_classes_and_unusual_names(tmp_path):
    names = ["_hidden", "$cost", *(f"class {i}" for i in range(78))]
    curve = Curve(np.array([1.0, 0.5]), np.array([0.5, 0.5]), np.array([0.9, 0.4]), 2)
    for count in (1, 80):
        draw_precision_recall([curve] * count, names[:count], tmp_path / "a.png")
        draw_confidence([curve] * count, names[:count], tmp_path / "b.png")
        draw_confusion(np.eye(count + 1, dtype=int), names[:count], tmp_path / "c.png")
        sizes = [read_image(tmp_path / name).shape for name in ("a.png", "b.png")]
        assert sizes == [(605, 880, 3), (440, 1320, 3)]


@pytest.mark.skipif(not {*CJK_FONTS} & {*font_manager.get_font_names()}, reason="no CJK font is installed")
def test_draws_chinese_names_without_font_warnings(tmp_path):
    with warnings.catch_warnings(action="error"):  # such as for a missing glyph
        draw_confusion(np.eye(2, dtype=int), ["安全帽"], tmp_path / "a.png")
