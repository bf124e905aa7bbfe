"""A network with an eighth of the channels, for tests of training that do not depend on its size."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn


def use_narrow_network(patch: pytest.MonkeyPatch) -> None:
    """Build all networks with an eighth of the channels, until the patch is undone."""
    for layer in (nn.Conv2d, nn.BatchNorm2d):
        patch.setattr(layer, "__init__", divide_channels(layer.__init__))


def divide_channels(initialize: Callable[..., None]) -> Callable[..., None]:
    """Divide the numbers of channels by 8: among the positional arguments of a layer, the multiples of 32."""

    def narrow(module: nn.Module, *arguments: int, **keywords: Any) -> None:
        initialize(module, *(number if number % 32 else number // 8 for number in arguments), **keywords)

    return narrow
