"""The Jacobians of one prompt as linear operators over streamed blocks."""

from ggjac.jacobian.detached import (
    HEALTHY,
    DetachedJacobian,
)
from ggjac.jacobian.sweep import (
    FrozenNetwork,
    Path,
    SharedSweep,
    Tap,
)

__all__ = [
    "HEALTHY",
    "DetachedJacobian",
    "FrozenNetwork",
    "Path",
    "SharedSweep",
    "Tap",
]
