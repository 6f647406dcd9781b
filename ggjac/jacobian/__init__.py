"""The Jacobians of one prompt as linear operators over streamed blocks."""

from ggjac.jacobian.detached import (
    HEALTHY,
    DetachedJacobian,
    Progress,
)
from ggjac.jacobian.sweep import (
    FrozenNetwork,
    SharedSweep,
    Span,
    Tap,
)

__all__ = [
    "HEALTHY",
    "DetachedJacobian",
    "FrozenNetwork",
    "Progress",
    "SharedSweep",
    "Span",
    "Tap",
]
