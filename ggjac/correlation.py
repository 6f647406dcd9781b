"""Correlation of two vectors, and of their ranks."""

from jaxtyping import Float
from torch import Tensor


def correlation(a: Float[Tensor, " d"], b: Float[Tensor, " d"]) -> float:
    """Return Pearson's correlation; NaN where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / (a.norm() * b.norm()))


def spearman(a: Float[Tensor, " d"], b: Float[Tensor, " d"]) -> float:
    """Return the correlation of the ranks of two vectors; NaN where one of them is constant."""
    return correlation(ranks(a), ranks(b))


def ranks(values: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Return ranks from 1, in float64; equal values share their mean rank."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts.double() - 1) / 2)[which]
