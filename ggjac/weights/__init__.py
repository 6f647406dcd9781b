"""From bytes to tiles of dense weights, on the CPU or on a device."""

from ggjac.weights.cache import Key
from ggjac.weights.store import (
    Block,
    Weight,
    WeightError,
    WeightStore,
)

__all__ = [
    "Block",
    "Key",
    "Weight",
    "WeightError",
    "WeightStore",
]
