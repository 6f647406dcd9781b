"""How many directions a detached Jacobian really uses: the stable rank `R = ‖J‖²_F / σ₁²` (paper, section 3.4)."""

import math
from dataclasses import dataclass

import torch

from ggjac.jacobian import DetachedJacobian
from ggjac.svd import SVD

# Up to this output size the Frobenius norm comes from all rows, in one sweep (or a few); beyond, it is estimated.
EXACT_ROWS = 512


@dataclass(frozen=True)
class StableRank:
    """Stable rank of the joint `[d, n d]` map, with its standard error.

    Attributes:
        value: `Σ σ² / σ₁²`, from 1 (one direction) to the full rank.
        error: one standard error of `value`; 0 where the norm is exact.
        frobenius: `‖J‖_F`.
    """

    value: float
    error: float
    frobenius: float


def stable_rank(jacobian: DetachedJacobian, triplets: SVD, *, probes: int = 16, seed: int = 0) -> StableRank:
    """Compute the stable rank from the leading `triplets` and what remains of the Frobenius norm.

    The known triplets count exactly. The rest, `‖Jᵀ (I - U Uᵀ)‖²_F`, is averaged over seeded Gaussian probes
    (Hutchinson's estimator, deflated as in Meyer et al., "Hutch++", arXiv 2010.09649), or summed over all rows where
    there are at most `EXACT_ROWS`. One downward sweep.
    """
    top = float(triplets.S[0].double().square())
    if top == 0:
        return StableRank(value=0.0, error=0.0, frobenius=0.0)
    d = jacobian.out_shape[0]
    if d <= EXACT_ROWS:
        squared = sum(float(rows.double().square().sum()) for *_, rows in jacobian.rows())
        return StableRank(squared / top, 0.0, math.sqrt(squared))
    U = triplets.U.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(probes, d, generator=generator, dtype=torch.float64)
    rest = jacobian.rmatmat((z - (z @ U.T) @ U).to(jacobian.device, jacobian.dtype)).double().square().sum((1, 2)).cpu()
    squared = float(triplets.S.double().square().sum() + rest.mean())
    return StableRank(squared / top, float(rest.std()) / math.sqrt(probes) / top, math.sqrt(squared))
