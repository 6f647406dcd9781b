"""How many directions a detached Jacobian really uses: the stable rank `R = ‖J‖²_F / σ₁²` (paper, section 3.4)."""

from ggjac.frobenius import StableRank, stable_ranks
from ggjac.jacobian import DetachedJacobian
from ggjac.sizes import EXACT_ROWS, PROBES
from ggjac.svd import SVD


def stable_rank(jacobian: DetachedJacobian, triplets: SVD, *, probes: int = PROBES, seed: int = 0) -> StableRank:
    """Compute the stable rank of the joint `[d, n d]` map from its leading `triplets` and the rest of `‖J‖_F`.

    The known triplets count exactly. The rest is averaged over seeded Gaussian probes in one downward sweep, or summed
    over all rows where there are at most `EXACT_ROWS`, as many at a time as fit into the Jacobian's `chunk_bytes`.
    """
    chunk = jacobian.rows_at_once() if jacobian.out_shape[0] <= EXACT_ROWS else None
    (found,) = stable_ranks(
        [jacobian], [triplets], down=lambda Y: [jacobian.rmatmat(Y[0])], chunk=chunk, probes=probes, seed=seed
    )
    return found
