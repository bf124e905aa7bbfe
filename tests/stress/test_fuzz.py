"""The readers take any bytes; `make fuzz` gives them more."""

import pytest

from tests.stress.fuzz import TARGETS, fuzz

EXAMPLES = 60
pytestmark = pytest.mark.filterwarnings("ignore")  # of decoders, about what they are given


@pytest.mark.parametrize("name", TARGETS)
def test_only_our_error_comes_from_any_bytes(name, tmp_path):
    assert fuzz(TARGETS[name], float("inf"), EXAMPLES, tmp_path) > 20
