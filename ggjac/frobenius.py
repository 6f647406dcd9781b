"""Frobenius norms and stable ranks of linear operators whose leading singular triplets are known.

They take several operators at once, since their transposed products may be cheaper together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ggjac import checks
from ggjac.linop import LinearOperator
from ggjac.results import Result
from ggjac.sizes import PROBES, SLICE
from ggjac.svd import SVD


@dataclass(frozen=True)
class StableRank(Result):
    """Stable rank of a map, with its standard error.

    Attributes:
        value: `Σ σ² / σ₁²`, from 1 (one direction) to the full rank; 0 for a map that is zero.
        error: one standard error of `value`; 0 where the norm is exact.
        frobenius: the Frobenius norm.
    """

    value: float
    error: float
    frobenius: float


def stable_ranks(
    operators: Sequence[LinearOperator],
    triplets: Sequence[SVD],
    *,
    down: Callable[[list[Tensor]], list[Tensor]],
    chunk: int | None,
    probes: int = PROBES,
    seed: int = 0,
) -> list[StableRank]:
    """Compute the stable rank of each operator from its leading triplets and the rest of its Frobenius norm.

    Args:
        operators: `[*in_shape]` to `[d]`, the same `d` for all; only shapes, dtypes and devices are used.
        triplets: leading singular triplets of each operator, the largest first. They enter an estimate exactly.
        down: applies the transposed operators to one stack of vectors `[k, d]` each.
        chunk: rows of each operator at a time, for the exact norm. None: estimate `‖Aᵀ (I - U Uᵀ)‖²_F` over seeded
            Gaussian probes, the same for all operators (Hutchinson's estimator, deflated as in Meyer et al., "Hutch++",
            arXiv 2010.09649); one downward sweep.
        probes: number of random vectors of the estimate; at least 2, since the error comes from their spread.
        seed: seed of the probes.

    Raises:
        ValueError: `probes` or `seed` is out of range.
    """
    checks.whole("probes", probes, 2)
    checks.seed(seed)
    if not operators:
        return []
    if chunk is None:
        return _estimated(operators, triplets, down, probes, seed)
    (d,) = operators[0].out_shape
    squared = [0.0] * len(operators)
    for start in range(0, d, chunk):
        rows = torch.arange(start, min(start + chunk, d))
        basis = torch.zeros(len(rows), d, dtype=operators[0].dtype, device=operators[0].device)
        basis[torch.arange(len(rows)), rows] = 1
        for i, product in enumerate(down([basis] * len(operators))):
            squared[i] += float(product.cpu().double().square().sum())
        del product  # before the next rows are computed
    return [_ratio(found, total, 0.0) for found, total in zip(triplets, squared, strict=True)]


def squared_norm(matrix: Tensor) -> float:
    """Return the squared Frobenius norm of a matrix `[d, ...]`, summed in float64."""
    return sum(float(rows.cpu().double().square().sum()) for rows in matrix.split(SLICE))


def exact_stable_rank(triplets: SVD, squared: float) -> StableRank:
    """Return the stable rank of a matrix whose leading triplets are known, and its squared Frobenius norm."""
    return _ratio(triplets, squared, 0.0)


def _estimated(
    operators: Sequence[LinearOperator],
    triplets: Sequence[SVD],
    down: Callable[[list[Tensor]], list[Tensor]],
    probes: int,
    seed: int,
) -> list[StableRank]:
    (d,) = operators[0].out_shape
    # Drawn on the CPU in float64, so that every device and dtype starts from the same directions.
    z = torch.randn(probes, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    deflated = []
    for A, found in zip(operators, triplets, strict=True):
        U = found.U.cpu().double()
        deflated.append((z - (z @ U.T) @ U).to(A.device, A.dtype))
    results = []
    for found, product in zip(triplets, down(deflated), strict=True):
        rest = product.cpu().double().square().flatten(1).sum(1)
        squared = float(found.S.cpu().double().square().sum() + rest.mean())
        results.append(_ratio(found, squared, float(rest.std()) / math.sqrt(probes)))
    return results


def _ratio(found: SVD, squared: float, error: float) -> StableRank:
    """Return a squared Frobenius norm, and its error, in units of the largest squared singular value."""
    top = float(found.S[0]) ** 2
    return StableRank(squared / top, error / top, math.sqrt(squared)) if top else StableRank(0.0, 0.0, 0.0)
