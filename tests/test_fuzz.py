"""The readers take any bytes; `make fuzz` gives them more."""

import pytest

from tests.fuzz import TARGETS, fuzz

EXAMPLES = 60


@pytest.mark.parametrize("name", TARGETS)
def test_only_our_error_comes_from_any_bytes(name, tmp_path):
    assert fuzz(TARGETS[name], float("inf"), EXAMPLES, tmp_path) > 20
