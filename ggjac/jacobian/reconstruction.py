"""How well a map reproduces the forward pass: a health check of the arithmetic, not evidence (see `detached`)."""

from dataclasses import dataclass
from typing import Any

from ggjac.jacobian.detached import DetachedJacobian, Progress
from ggjac.results import NO_WORDS, Result, Words


@dataclass(frozen=True)
class Reconstruction(Result):
    """The reconstruction error of a map, and its healthy limit.

    Attributes:
        error: `‖J x + offset - y‖ / ‖y‖`.
        limit: the largest healthy error in this dtype.
        offset_norm: `‖offset‖`, 0 where no bias is on the live paths.
        output_norm: `‖y‖`.
    """

    error: float
    limit: float
    offset_norm: float
    output_norm: float

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
        return Reconstruction(
            error=jacobian.reconstruction_error if error is None else error,
            limit=jacobian.reconstruction_limit,
            offset_norm=float(jacobian.offset.cpu().double().norm()),
            output_norm=float(jacobian.output.cpu().double().norm()),
        )
