"""How well a map reproduces the forward pass: a health check of the arithmetic, not evidence (see `detached`)."""

from dataclasses import dataclass
from typing import Any

import torch

from ggjac.jacobian.detached import DetachedJacobian, Progress
from ggjac.results import NO_WORDS, Result, Words

# A sum is rounded by a part of what is summed: where the stream was much longer before, by more of what is left.
# Measured: up to 0.8 eps of the longest stream. No cancellation explains more than MOST: beyond it too few digits are
# left.
MUCH, STREAM_EPS, MOST = 10, 4, 1e-2


@dataclass(frozen=True)
class Reconstruction(Result):
    """The reconstruction error of a map, and its healthy limit.

    Attributes:
        error: `‖J x + offset - y‖ / ‖y‖`.
        limit: the largest healthy error in this dtype, and where the error is beyond it, after this cancellation.
        cancellation: as `DetachedJacobian.cancellation`; None where the error does not ask for it.
        offset_norm: `‖offset‖`, 0 where no bias is on the live paths.
        output_norm: `‖y‖`.
    """

    error: float
    limit: float
    offset_norm: float
    output_norm: float
    cancellation: float | None = None

    @property
    def healthy(self) -> bool:
        """Whether the error is within its limit; NaN is not."""
        return self.error <= self.limit

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the fields and the verdict."""
        return {
            "error": self.error,
            "limit": self.limit,
            "healthy": self.healthy,
            "offset_norm": self.offset_norm,
            "output_norm": self.output_norm,
            "cancellation": self.cancellation,
        }


def reconstruction(
    jacobian: DetachedJacobian, *, error: float | None = None, progress: Progress | None = None
) -> Reconstruction:
    """Push the prompt's own embeddings through the frozen map and compare with the forward pass; one upward sweep.

    Args:
        jacobian: the map.
        error: the reconstruction error, if it is already known, as from the dense matrix.
        progress: called as `progress("block", done, total)`.
    """
    with jacobian.reporting(progress):
        error = jacobian.reconstruction_error if error is None else error
        limit, cancellation = jacobian.reconstruction_limit, None
        if error > limit and (cancelled := jacobian.cancellation) > MUCH:
            cancellation = cancelled
            limit = max(limit, min(STREAM_EPS * torch.finfo(jacobian.dtype).eps * cancellation, MOST))
        return Reconstruction(
            error=error,
            limit=limit,
            cancellation=cancellation,
            offset_norm=float(jacobian.offset.cpu().double().norm()),
            output_norm=float(jacobian.output.cpu().double().norm()),
        )
