"""What is asked of a network: logits, differences of two, or projections on a direction, as vectors that read a place.

The place is the output, or, of a projection, where the Jacobian ends.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ggjac.decode import Head
from ggjac.directions import Direction, DirectionError
from ggjac.jacobian.detached import DetachedJacobian
from ggjac.jacobian.distribution import entropy, fisher_directions
from ggjac.shares import Projection


class Asked(NamedTuple):
    """The logits asked for, as vectors: `logits = w · y + bias`, in float64; `w` is of the network's dtype."""

    targets: Int[Tensor, " m"]
    w: Float[Tensor, "m d"]
    bias: Float[Tensor, " m"]
    logits: Float[Tensor, " m"]


class Projected(NamedTuple):
    """A projection asked for, in the same form: `logits = w · y`, with `y` what is projected, at one position.

    `along` says what that is, and on what; there is no `bias`: it is zero.
    """

    along: Projection
    w: Float[Tensor, "1 d"]
    bias: Float[Tensor, " 1"]
    logits: Float[Tensor, " 1"]


def ask(outputs: Float[Tensor, "m d"], head: Head, target: int | list[int] | None, versus: int | None) -> Asked:
    """Choose a target for each output, the most likely one for None, and read the head's rows of it.

    Of a list, each output has its own target, which may be `versus`: that difference is 0.

    Raises:
        ValueError: the only target is `versus`, or a list is not as long as there are outputs.
    """
    if isinstance(target, list):
        if len(target) != len(outputs):
            raise ValueError(f"there are {len(target)} targets for {len(outputs)} outputs; give one for each")
        targets = torch.tensor(target)
    elif target is None:
        targets = head.logits(outputs).argmax(1).cpu()
    elif target == versus:
        raise ValueError(f"target and versus are both token id {target}: the difference is 0; give two tokens")
    else:
        targets = torch.full((len(outputs),), target)
    distinct, which = targets.unique(return_inverse=True)

    def row(ids: list[int]) -> tuple[Tensor, Tensor]:
        biases = torch.zeros(len(ids)) if head.bias is None else head.bias[ids]
        return head.scale * head.matrix.take(ids), biases.cpu().double()

    w, bias = row(distinct.tolist())
    if versus is not None:
        other, other_bias = row([versus])
        w, bias = w - other, bias - other_bias
    w, bias = w[which.to(w.device)], bias[which]
    return Asked(targets, w, bias, (w.cpu().double() * outputs.cpu().double()).sum(1) + bias)


def asked_at(
    jacobian: DetachedJacobian,
    target: int | list[int] | None,
    versus: int | None,
    direction: Direction | Float[Tensor, " _"] | None,
) -> Asked | Projected:
    """Ask for a logit at the end of a Jacobian, as `ask` does, or for a projection, as `project`.

    Raises:
        ValueError: as theirs; or for both.
    """
    if direction is None:
        return ask(jacobian.output[None], jacobian.network.head, target, versus)
    if target is not None or versus is not None:
        raise ValueError("a direction is given, and a token too: only one of a projection and a logit can be split")
    return project(jacobian, direction)


def project(jacobian: DetachedJacobian, direction: Direction | Float[Tensor, " _"]) -> Projected:
    """Ask for the projection of the output of a Jacobian, or of what is at its tap inside the network, on a direction.

    Of several residual streams, `raw`, a direction of one stream's width is of what the head would collect of them.

    Raises:
        DirectionError: it has another length, is zero, or leaves the range of the network's dtype.
    """
    tap, raw, y = jacobian.span.tap, jacobian.sweep.raw, jacobian.output
    one = direction if isinstance(direction, Direction) else Direction(direction)
    d, sizes = jacobian.network.config.d, {len(y), jacobian.network.config.d}
    w = one.checked(sizes, y.dtype).to(y)[None]
    along = Projection(one._replace(vector=w[0]), "output" if tap == jacobian.end and not raw else tap.kind, tap.index)
    if len(y) > d and len(w[0]) == d:
        collecting = jacobian.network.freeze_norm(y[None]).collecting()
        w = w if collecting is None else collecting.rmatmat(w[None])[0]
    value = (w.cpu().double() * y.cpu().double()).sum(1)
    return Projected(along, w, torch.zeros_like(value), value)


def entropy_direction(jacobian: DetachedJacobian) -> Direction:
    """Return the gradient of the next token's entropy by the output before the head, at the prompt; two head passes.

    The projection of the output on it is not the entropy, whose value in nats is among its facts: it is what the
    entropy follows, to first order, as the output changes.

    Raises:
        DirectionError: the next token is certain, so that the gradient is zero.
        ValueError: the Jacobian does not end at the output.
    """
    found = entropy(jacobian.network.head, _output(jacobian)[None])
    if not found.gradient.any():
        raise DirectionError("the gradient of the entropy is zero: the next token is certain; take another position")
    facts = {"entropy": float(found.value[0])}
    return Direction(jacobian.agreed(found.gradient[0]), "entropy", facts=facts)


def fisher_direction(jacobian: DetachedJacobian, index: int = 1, *, seed: int = 0) -> Direction:
    """Return an eigenvector of the next token's Fisher information by the output before the head, at the prompt.

    Along the first one, `index` 1, the distribution of the next token changes most: see `ggjac.jacobian.distribution`.
    Its sign is that along which the most likely token gains. A pass over the head for each step of the iteration. Among
    its facts is the `residual` at which the iteration ended: the largest one, relative to the eigenvalue.

    Raises:
        ValueError: there is no such direction, or it changes nothing; or the Jacobian does not end at the output.
    """
    found = fisher_directions(jacobian.network.head, _output(jacobian), index, seed=seed)
    facts = {"index": index, "eigenvalue": float(found.values[-1]), "all_eigenvalues": found.total}
    facts["residual"] = found.residual
    return Direction(jacobian.agreed(found.vectors[-1]), "fisher", facts=facts)


def _output(jacobian: DetachedJacobian) -> Float[Tensor, " d"]:
    if jacobian.span.tap != jacobian.end or jacobian.sweep.raw:
        raise ValueError("the next token's distribution is that of the output; take a Jacobian that ends there")
    return jacobian.output
