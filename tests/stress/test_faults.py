"""Training survives what can happen to it; `make faults` does the same at length."""

import sys
from collections.abc import Iterator

import pytest

from tests.stress.faults import ROWS, NotHere, Work, workshop

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults are made with what Linux offers")


@pytest.fixture(scope="module")
def work() -> Iterator[Work]:
    with workshop() as found:
        yield found


@pytest.mark.parametrize("name", ROWS)
def test_fault(work, name):
    try:
        assert ROWS[name](work, True) > 0
    except NotHere as reason:
        pytest.skip(str(reason))
