"""The workspace of the stress tests."""

import sys
from collections.abc import Iterator

import pytest

from tests.stress.workspace import Workspace, open_workspace


@pytest.fixture(scope="session")
def workspace() -> Iterator[Workspace]:
    if sys.platform != "linux":
        pytest.skip("faults are injected with features of Linux")
    with open_workspace() as opened:
        yield opened
