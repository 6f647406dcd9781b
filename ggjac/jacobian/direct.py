"""How the residual stream of a position is read directly: what each addition to it meets on its way to the end.

With the norm there frozen at the prompt, the head reads each addition past all later branches, and not through them:
direct logit attribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ggjac.blocks import entering, skip
from ggjac.checks import has_parts, output_positions
from ggjac.directions import Direction
from ggjac.jacobian.detached import DetachedJacobian
from ggjac.jacobian.sweep import FrozenNetwork, Tap
from ggjac.jacobian.targets import Asked, Projected, ask, asked_at
from ggjac.linop import LinearOperator


class Question(NamedTuple):
    """Logits at `m` output positions, or a projection, to be split over what was added to the stream.

    Attributes:
        asked: as vectors, and their values.
        end: where these vectors are.
        norm: of what is there, frozen at the prompt.
        positions: the `m` output positions, ascending.
    """

    asked: Asked | Projected
    end: Tap
    norm: LinearOperator
    positions: list[int]


def ask_for_parts(
    jacobian: DetachedJacobian,
    target: int | str | list[int] | None,
    versus: int | None,
    direction: Direction | Float[Tensor, " _"] | None,
    positions: str | Sequence[int] | None,
    by: str,
) -> Question:
    """Ask for logits at positions, by default the Jacobian's own, or for the projection of its end on a direction.

    Raises:
        PromptError: the target is not in the vocabulary, or a text that is not one token.
        DirectionError: the direction does not fit.
        ValueError: a token is neither a text nor a whole number, both are the same, or a list of targets is not as long
            as that of positions; a position is out of range; or a projection has no such parts: it is of several
            positions, of a map that starts inside, or of a branch, which is one part.
    """
    network = jacobian.network
    places = output_positions([jacobian.position] if positions is None else positions, len(network.x))
    target = [network.token(one) for one in target] if isinstance(target, list) else jacobian.token_id(target)
    if direction is None:
        asked = ask(network.outputs[torch.tensor(places)], network.head, target, versus)
        return Question(asked, jacobian.end, network.norm.at(slice(places[0], places[-1] + 1)).operator(), places)
    start, tap = jacobian.span
    if places != [jacobian.position]:
        raise ValueError(
            f"a direction is split at the Jacobian's own position, {jacobian.position}; leave positions out"
        )
    if start:
        raise ValueError(f"this Jacobian starts at depth {start}; its parts have shares from the embeddings on")
    has_parts(tap.kind, by)
    return Question(asked_at(jacobian, target, versus, direction), tap, jacobian.sweep.norms[0], places)


@dataclass(frozen=True)
class DirectReading:
    """What vectors at `m` output positions read of the additions to the stream; made by `read_directly`.

    All are of the `s` positions from the first output to the last, and zero between the outputs. Factors on the stream
    at the end of blocks are not in them.

    Attributes:
        end: where the vectors are: the stream, or what one branch adds.
        positions: the `m` output positions, ascending.
        embedding: `[s, d]`, of the input of block 0.
        attn, mlp: `[s, d]` of each block up to the end, of what the branch adds.
        ends: `[s, i]` of the end of each block; only where blocks have inputs of their own, which they add there.
        constant: `[m]`, float64: what is read of constants, of the norm at the end and of the entry of blocks.
    """

    end: Tap
    positions: list[int]
    embedding: Float[Tensor, "s d"]
    attn: list[Float[Tensor, "s d"]]
    mlp: list[Float[Tensor, "s d"]]
    ends: list[Float[Tensor, "s _"]]
    constant: Float[Tensor, " m"]

    @property
    def span(self) -> range:
        """The positions from the first output to the last."""
        return range(self.positions[0], self.positions[-1] + 1)

    @property
    def rows(self) -> Int[Tensor, " m"]:
        """The outputs, counted from the first of them."""
        return torch.tensor(self.positions) - self.positions[0]

    def share(self, added: Float[Tensor, "_ d"], read: Float[Tensor, "s d"]) -> Float[Tensor, " m"]:
        """Return what is read of an addition at the outputs, float64; it may have further positions before them."""
        return (added[len(added) - len(read) :].cpu().double() * read.cpu().double()).sum(1)[self.rows]


def read_directly(
    network: FrozenNetwork, end: Tap, norm: LinearOperator, w: Float[Tensor, "m d"], positions: Sequence[int]
) -> DirectReading:
    """Return what vectors `w` at outputs, after a norm of what is at `end`, read of all that was added before."""
    config, span = network.frame.config, slice(positions[0], positions[-1] + 1)
    rows = torch.tensor(positions) - span.start
    spread_out = w.new_zeros(span.stop - span.start, w.shape[1])  # nothing is read between the positions
    spread_out[rows] = w
    read, constant = norm.rmatmat(spread_out[None])[0], _constant(norm, spread_out)
    if end.kind != "layer":  # only one branch is read
        nothing = network.x.new_zeros(len(read), config.width(0))
        wide = [read.new_zeros(len(read), config.width(i + 1)) for i in range(end.index)]
        attn, mlp = ([nothing] * (end.index - 1) + [read if kind == end.kind else nothing] for kind in ("attn", "mlp"))
        return DirectReading(end, [*positions], nothing, attn, mlp, wide, constant[rows])
    if config.reads == 1:
        every = [read] * end.index
        return DirectReading(end, [*positions], read, every, every, every, constant[rows])
    attn, mlp, ends = list[Tensor](), list[Tensor](), list[Tensor]()
    for i in reversed(range(end.index)):
        tape = network.tapes[i]
        if config.inputs:
            ends.append(read)
        for branch, found in ((tape.ffn, mlp), (tape.attn, attn)):
            spread = branch.streams and branch.streams.at(span).spread(config.d)
            found.append(read if spread is None else spread.rmatmat(read[None])[0])
            past = skip(config, branch, span)
            read = read if past is None else past.rmatmat(read[None])[0]
        if tape.entry is not None:
            entry = entering(network.weights(i), config, tape.entry.at(span))
            constant = constant + _constant(entry, read)
            read = entry.rmatmat(read[None])[0]
    return DirectReading(end, [*positions], read, attn[::-1], mlp[::-1], ends[::-1], constant[rows])


def later(scales: Sequence[float]) -> Float[Tensor, " L"]:
    """Return what multiplies each block's additions on their way to the end, from the factor after each, float64."""
    return torch.tensor(scales, dtype=torch.float64).flip(0).cumprod(0).flip(0)


def _constant(operator: LinearOperator, w: Float[Tensor, "m o"]) -> Float[Tensor, " m"]:
    """Return what the constant of an operator, such as a norm's bias, adds to logits that read `w` of its output."""
    y = operator.matmat(w.new_zeros(1, *operator.in_shape), w.new_ones(1))[0]
    return (y.cpu().double() * w.cpu().double()).sum(1)
