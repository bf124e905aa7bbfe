"""Paths and small data sets that the tests share."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
REFERENCE = SHARED / "reference"
ANCHORS = ((10.0, 14.0), (23.0, 27.0), (37.0, 58.0), (81.0, 82.0), (135.0, 169.0), (344.0, 319.0))

needs_shared = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"the reference values are not at {REFERENCE}")
