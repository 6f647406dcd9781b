"""Reconstruction with and without freezing: the output from the detached and from the ordinary Jacobian.

    detached:  J x + offset      ordinary:  (∂y/∂x) x

(Golden, arXiv 2505.24293, section 3.1.) The first is the output itself, up to rounding. The second is not, and need not
be: a derivative describes the next small change, not the composition of the value. The derivative of a norm, for
example, annihilates the norm's own input, since scaling the input does not change the output (Euler's theorem, up to
the epsilon).
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.checks import whole
from ggjac.correlation import correlation, spearman
from ggjac.decode import divergence
from ggjac.jacobian import DetachedJacobian, Progress
from ggjac.jacobian.ordinary import OrdinaryJacobian
from ggjac.results import NO_WORDS, Plotted, Points, Result, Table, Words


@dataclass(frozen=True)
class Agreement(Result):
    """How well a reconstruction `r` agrees with the output `y`, by all measures in use.

    A measure whose denominator is zero is NaN, or infinite.

    Attributes:
        relative_l2: `‖r - y‖ / ‖y‖`.
        std_ratio: `std(r - y) / std(r)`, over the reconstruction, as in the paper's figures.
        std_ratio_output: `std(r - y) / std(y)`, over the output, as in its notebooks for large models.
        max_abs: `max |r - y|`.
        pearson: correlation over the `d` components.
        spearman: correlation of their ranks; equal components share their mean rank.
        top1: after the head, the most likely token is the same.
        top_k: share of the output's `k` most likely tokens that are among the reconstruction's.
        k: how many those are.
        kl: `KL(softmax(head(y)) ‖ softmax(head(r)))`, in nats.
    """

    relative_l2: float
    std_ratio: float
    std_ratio_output: float
    max_abs: float
    pearson: float
    spearman: float
    top1: bool
    top_k: float
    k: int
    kl: float

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return all measures by their names in JSON."""
        return {
            "error": self.relative_l2,
            "std_ratio": self.std_ratio,
            "std_ratio_output": self.std_ratio_output,
            "max_abs": self.max_abs,
            "pearson": self.pearson,
            "spearman": self.spearman,
            "top1": self.top1,
            "top": self.k,
            "top_agreement": self.top_k,
            "kl": self.kl,
        }


@dataclass(frozen=True)
class Contrast(Plotted):
    """An output and its two reconstructions.

    Attributes:
        y: `[d]`, float64: the forward pass's output.
        detached: `[d]`, float64: `J x + offset` of the detached Jacobian.
        ordinary: `[d]`, float64: `(∂y/∂x) x` of the ordinary one.
        detached_agreement: of `detached` with `y`: rounding.
        ordinary_agreement: of `ordinary` with `y`.
    """

    y: Float[Tensor, " d"]
    detached: Float[Tensor, " d"]
    ordinary: Float[Tensor, " d"]
    detached_agreement: Agreement
    ordinary_agreement: Agreement

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return both agreements."""
        return {"detached": self.detached_agreement.data(), "ordinary": self.ordinary_agreement.data()}

    def _table(self, words: Words) -> Table:
        found = {"detached": asdict(self.detached_agreement), "ordinary": asdict(self.ordinary_agreement)}
        measures = {name: [row[name] for row in found.values()] for name in found["detached"]}
        return Table("The output rebuilt by both Jacobians", {"jacobian": list(found), **measures})

    def _plot(self, words: Words) -> Points:
        rebuilt = {"detached": self.detached, "ordinary": self.ordinary}
        series = {name: (self.y.tolist(), r.tolist(), ()) for name, r in rebuilt.items()}
        return Points("The output rebuilt by both Jacobians", "y", "reconstruction", series, scatter=True)


def contrast(jacobian: DetachedJacobian, *, top: int = 10, progress: Progress | None = None) -> Contrast:
    """Rebuild the output by both Jacobians; a sweep of the weights for each, and no dense matrix.

    `top` is the `k` of the agreement of likely tokens; `progress` is called as `progress("block", done, total)`.

    Raises:
        ValueError: `top` is out of range, or the Jacobian begins or ends inside the network, where the ordinary one has
            no counterpart.
    """
    top = whole("top", top)
    ordinary = ordinary_jacobian(jacobian)
    with jacobian.reporting(progress):
        ordinary.progress = jacobian.progress
        y = jacobian.output
        rebuilt = jacobian.linear_output + jacobian.offset
        pushed = ordinary.matmat(jacobian.x[None])[0]
    logits = (
        jacobian.network.head.logits(torch.stack([part.to(y.dtype) for part in (y, rebuilt, pushed)])).cpu().double()
    )
    y, rebuilt, pushed = (part.cpu().double() for part in (y, rebuilt, pushed))
    return Contrast(
        y=y,
        detached=rebuilt,
        ordinary=pushed,
        detached_agreement=agreement(y, rebuilt, logits[0], logits[1], top),
        ordinary_agreement=agreement(y, pushed, logits[0], logits[2], top),
    )


def ordinary_jacobian(jacobian: DetachedJacobian) -> OrdinaryJacobian:
    """Return the ordinary Jacobian of the same network, prompt and position.

    Raises:
        ValueError: the given one begins or ends inside the network.
    """
    start, tap = jacobian.span
    if start or tap != jacobian.end or jacobian.sweep.raw:
        raise ValueError(
            f"the ordinary Jacobian leads from the embeddings to the output, this map from block {start} to "
            f"{tap.kind} {tap.index}; ask for trace.jacobian(position)"
        )
    return OrdinaryJacobian(jacobian.network, jacobian.position)


def agreement(
    y: Float[Tensor, " d"], r: Float[Tensor, " d"], logits: Float[Tensor, " v"], other: Float[Tensor, " v"], top: int
) -> Agreement:
    """Measure how well `r` agrees with `y`, and the logits of `r`, `other`, with those of `y`; all float64."""
    error, k = r - y, min(top, len(logits))
    best = logits.topk(k).indices
    return Agreement(
        relative_l2=float(error.norm() / y.norm()),
        std_ratio=float(error.std() / r.std()),
        std_ratio_output=float(error.std() / y.std()),
        max_abs=float(error.abs().max()),
        pearson=correlation(y, r),
        spearman=spearman(y, r),
        top1=int(logits.argmax()) == int(other.argmax()),
        top_k=float(torch.isin(best, other.topk(k).indices).double().mean()),
        k=k,
        kl=divergence(logits, other),
    )
