"""The stable rank of each token's own map, to be compared over many prompts (Golden, arXiv 2505.24293, figure 3).

`y = Σ_i J_i x_i + offset`: how many directions of its embedding does the network use at each position `i`?
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ggjac.frobenius import StableRank, stable_ranks
from ggjac.jacobian import DetachedJacobian
from ggjac.notebook import Bars, Plotted, Table, Words
from ggjac.sizes import EXACT_ROWS, PROBES
from ggjac.svd import svd_together


@dataclass(frozen=True)
class TokenRanks(Plotted):
    """Stable ranks at one prompt.

    Attributes:
        joint: of the joint `[d, n d]` map.
        tokens: of each position's `J_i`, up to the Jacobian's own position; later maps are zero.
        residual: the worst of the leading triplets' residuals, as in `ggjac.svd.SVD`.
        sweeps: passes over the weights that these took.
        stopped_by: what ended the slowest of them.
    """

    joint: StableRank
    tokens: list[StableRank]
    residual: float
    sweeps: int
    stopped_by: str

    def _table(self, words: Words) -> Table:
        columns = {name: [getattr(rank, name) for rank in self.tokens] for name in StableRank.__annotations__}
        note = f"joint map: {self.joint.value:.4g}"
        return Table("Stable rank of each position's map", words.at(range(len(self.tokens))) | columns, (note,))

    def _plot(self, words: Words) -> Bars:
        values = [rank.value for rank in self.tokens]
        return Bars("Stable rank of each position's map", "stable rank", words.labels(range(len(values))), values)


def token_ranks(
    jacobian: DetachedJacobian,
    *,
    at_once: int | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    max_sweeps: int = 40,
    probes: int = PROBES,
) -> TokenRanks:
    """Compute the stable rank of the joint map and of every position's own, all in shared sweeps.

    Args:
        jacobian: from the embeddings.
        at_once: stacked vectors in one sweep; beyond, it is repeated. By default as many as dense rows would be.
        tol, seed, max_sweeps: of the iterations for the largest singular values, as `ggjac.svd.svd` takes them.
        probes: of the estimated norms, where there are more than `EXACT_ROWS` outputs.
    """
    n, d = jacobian.in_shape
    places = [None, *range(jacobian.position + 1)]
    operators = [jacobian if i is None else jacobian.at_position(i) for i in places]
    limit = at_once or jacobian.rows_at_once()

    def up(stacks: list[Tensor]) -> list[Tensor]:
        wide = []
        for i, stack in zip(places, stacks, strict=True):
            wide.append(stack if i is None else stack.new_zeros(len(stack), n, d))
            if i is not None:
                wide[-1][:, i] = stack[:, 0]
        return _apart(_in_portions(jacobian.matmat, torch.cat(wide), limit), stacks)

    def down(stacks: list[Tensor]) -> list[Tensor]:
        if all(stack is stacks[0] for stack in stacks):  # dense rows: one product has them all
            pulled = [_in_portions(jacobian.rmatmat, stacks[0], limit)] * len(stacks)
        else:
            pulled = _apart(_in_portions(jacobian.rmatmat, torch.cat(stacks), limit), stacks)
        return [part if i is None else part[:, i : i + 1] for i, part in zip(places, pulled, strict=True)]

    found = svd_together(operators, 1, up=up, down=down, tol=tol, seed=seed, max_sweeps=max_sweeps)
    chunk = jacobian.rows_at_once() if d <= EXACT_ROWS else None
    joint, *tokens = stable_ranks(operators, found, down=down, chunk=chunk, probes=probes, seed=seed)
    slowest = max(found, key=lambda triplet: (triplet.reason == "sweeps", triplet.sweeps))
    residual = max(float(triplet.residual.max()) for triplet in found)
    return TokenRanks(joint, tokens, residual, max(triplet.sweeps for triplet in found), slowest.reason)


def _in_portions(product: Callable[[Tensor], Tensor], stack: Tensor, limit: int) -> Tensor:
    return torch.cat([product(part) for part in stack.split(limit)])


def _apart(stack: Tensor, like: list[Tensor]) -> list[Tensor]:
    return list(stack.split([len(part) for part in like]))
