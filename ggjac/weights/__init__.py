"""Weights as dense tiles, dequantized from the file's bytes on the CPU or a device."""

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
