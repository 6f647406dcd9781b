"""Several residual streams: what a branch collects from them, and how they take up what it adds.

    block = (StreamMix(kept) + StreamMix(written) @ ffn) @ (StreamMix(kept) + StreamMix(written) @ attn)

With hyper-connections (arXiv 2409.19606) the residual stream is a state of `s` streams, side by side in `[n, s d]`. A
branch reads a weighted sum of them, which its norm collects (`NormTape.streams`); each stream takes up the branch's
output by a weight of its own, and keeps a mixture of what the streams had. The weights are functions of the state, and
are frozen as queries and keys are. The state before the first block is one stream, of which all are copies.

With attention over depth (attention residuals, as in Kimi K3) the first stream is the residual stream, and the others
are what it was before some earlier blocks: before every few blocks the stream is put away as it is, and begins anew
with what attention adds. A branch, and the norm before the head, read the average of all by a softmax of their scores;
the residual stream alone takes up what a branch adds. The state before the first block is one stream, the only one.

Where two stacks of blocks run in cycles (arXiv 2506.21734), there are two streams. Branches read and write the first;
the second is held for the passes that follow, which begin with a new mixture of both (`TurnTape`). Likewise where the
second stays the input of the first block: each block adds a share of it to the first.

With AltUp (arXiv 2301.13310) branches read and write the first of several streams only. At the beginning of a block all
are predicted from all; attention leaves its own stream beside these predictions, `[n, (1 + s) d]`; and at the end of
the block each prediction is corrected by how far the first was wrong. The other streams are made from the embeddings by
matrices, and merged with the first by matrices before the norm that precedes the head (`OpeningTape`, `ClosingNorm`).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.blocks.frame import BlockWeights, Frame, Positions, affine, linear
from ggjac.blocks.norms import NormTape, inverse_rms, widened
from ggjac.config import ModelConfig
from ggjac.linop import LinearOperator, Scale, StreamMix, Sum


class StreamsTape(NamedTuple):
    """The frozen weights with which `o` streams follow from `i` streams and a branch.

    Attributes:
        written: of the branch's output in each stream.
        kept: of the streams before it; None if each stays as it is.
    """

    written: Float[Tensor, "n o 1"]
    kept: Float[Tensor, "n o i"] | None

    def at(self, positions: Positions) -> "StreamsTape":
        """Return the tape of some positions."""
        return StreamsTape(self.written[positions], None if self.kept is None else self.kept[positions])

    def spread(self, d: int) -> LinearOperator:
        """Return how a branch's output, `[n, d]`, is written to the streams, `[n, o d]`."""
        return StreamMix(self.written, d)

    def carry(self, d: int) -> LinearOperator | None:
        """Return what is kept of the streams, `[n, i d]` to `[n, o d]`; None for all of them as they are."""
        return None if self.kept is None else StreamMix(self.kept, d)


class TurnTape(NamedTuple):
    """The frozen weights with which the `o` streams of a pass follow from the `i` streams of the pass before.

    Attributes:
        mixed: of these streams.
        constant: added at every position; or None.
        d: width of a stream.
    """

    mixed: Float[Tensor, "n o i"]
    constant: Float[Tensor, " b"] | None
    d: int

    def at(self, positions: Positions) -> "TurnTape":
        """Return the tape of some positions."""
        return self._replace(mixed=self.mixed[positions])

    def apply(self, x: Float[Tensor, "n a"]) -> Float[Tensor, "n b"]:
        """Return the streams with which the pass begins."""
        return affine(self.operator(), x)

    def operator(self) -> LinearOperator:
        """Return the mixture, `[n, i d]` to `[n, o d]`."""
        return StreamMix(self.mixed, self.d, self.constant)


def record_turn(frame: Frame, layer: int, x: Float[Tensor, "n a"]) -> TurnTape:
    """Freeze how a pass begins with a block, at the state `x` that the pass before has left, or at the embeddings.

    What a pass makes is its first stream, normed. The next one reads the sum of that and of what is held. This is held
    in its place where the other stack is next, whose own it replaces.
    """
    config, one = frame.config, x.new_ones(len(x), 1)
    if layer == 0:
        assert frame.held is not None
        return TurnTape(one[:, None].repeat(1, 2, 1), torch.cat([frame.held, torch.zeros_like(frame.held)]), config.d)
    made = inverse_rms(x[:, : config.d], config).to(x.dtype)
    again = config.order[layer] == config.order[layer - config.turn]
    held = [0 * one, one] if again else [made, 0 * one]
    return TurnTape(torch.stack([torch.cat(row, 1) for row in ([made, one], held)], 1), None, config.d)


def collected(
    read: Float[Tensor, "n 1 s"] | None, config: ModelConfig, x: Float[Tensor, "n i"]
) -> Float[Tensor, "n d"]:
    """Return what is read of the state `x` by some weights; all of it where there are none."""
    return x if read is None else affine(StreamMix(read, config.d), x)


def renewed(config: ModelConfig, x: Float[Tensor, "n i"]) -> Float[Tensor, "n _"]:
    """Return of the state `x` the streams that branches write: all, or the first alone, which llama.cpp names then."""
    return x[:, : config.d] if config.one_runs else x


def record_streams(
    w: BlockWeights, config: ModelConfig, layer: int, branch: str, x: Float[Tensor, "n i"]
) -> tuple[Float[Tensor, "n 1 s"] | None, StreamsTape | None]:
    """Freeze how the branch `"attn"` or `"ffn"` of a block reads the state `x`, and writes to it; None for one stream.

    The weights of reading are `[n, 1, s]`. How the feed-forward corrects predictions depends on what it adds; see
    `record_correction`.
    """
    own = config.streams
    if own.period:
        anew = branch == "attn" and layer % own.period == 0
        return _over_depth(w, config, f"{branch}_res_score", x), _taken_up_by_first(config, x, anew=anew)
    if not own.count:
        return None, None
    if config.one_runs:
        first = unit(x, 0, own.count)
        return first[:, :, : x.shape[1] // config.d], StreamsTape(first.mT, _with_input(w, config, branch, x))
    if "altup_router.weight" in w:
        return _predicted(w, config, x) if branch == "attn" else (unit(x, 0, 1 + own.count), None)
    parts = [own.count, own.count] + ([own.count**2] if own.rounds else [])
    read, written, *mixed = _weights(w, config, f"hc_{branch}", x, parts)
    read, written, kept = read.sigmoid() + own.epsilon, own.magnitude * written.sigmoid(), None
    if own.rounds:
        kept = _doubly_stochastic(mixed[0].unflatten(1, (own.count, -1)), own.epsilon, own.rounds).mT
    else:
        written = written + own.epsilon
    if x.shape[1] == config.d:  # copies of one stream
        read, copies = read.sum(1, keepdim=True), torch.ones_like(written)[..., None]
        kept = copies if kept is None else kept @ copies
    return read[:, None].to(x.dtype), StreamsTape(written[..., None].to(x.dtype), None if kept is None else kept.to(x))


def final_streams(w: BlockWeights, config: ModelConfig, x: Float[Tensor, "n i"]) -> Float[Tensor, "n 1 s"] | None:
    """Freeze how the norm before the head reads the state `x`; None for one stream.

    `w` are the tensors outside the blocks.
    """
    if x.shape[1] == config.d:
        return None
    if config.streams.period:
        return _over_depth(w, config, "output_res_score", x)
    if config.one_runs:
        return unit(x, 0, config.streams.count)
    if "output_hc_fn.weight" not in w:
        return x.new_full((len(x), 1, config.streams.count), 1 / config.streams.count)
    (read,) = _weights(w, config, "output_hc", x, [config.streams.count])
    return (read.sigmoid() + config.streams.epsilon)[:, None].to(x.dtype)


def _over_depth(w: BlockWeights, config: ModelConfig, stem: str, x: Float[Tensor, "n i"]) -> Float[Tensor, "n 1 s"]:
    """Return the shares of the streams in what is read of them: the softmax of the scores of their norms."""
    streams = widened(x).unflatten(1, (-1, config.d))  # [n, s, d]
    scores = (streams @ w.wide_vector(f"{stem}.weight")) * inverse_rms(streams, config)[..., 0]
    return scores.softmax(-1)[:, None].to(x.dtype)


def _taken_up_by_first(config: ModelConfig, x: Float[Tensor, "n i"], *, anew: bool) -> StreamsTape:
    """Return how the first stream takes up a branch, or one more that begins `anew` before those of `x`."""
    count = x.shape[1] // config.d + anew
    kept = x.new_ones(count).diag()[:, 1:].repeat(len(x), 1, 1) if anew else None
    return StreamsTape(unit(x, 0, count).mT, kept)


def unit(x: Float[Tensor, "n _"], index: int, count: int) -> Float[Tensor, "n 1 s"]:
    """Return weights by which one of `count` streams is read alone, at as many positions as `x` has."""
    found = x.new_zeros(len(x), 1, count)
    found[:, :, index] = 1
    return found


def _with_input(
    w: BlockWeights, config: ModelConfig, branch: str, x: Float[Tensor, "n i"]
) -> Float[Tensor, "n 2 s"] | None:
    """Return the weights by which two streams are kept at a branch, if the second is the input of the first block.

    The state before that block, one stream, is both; and after each block the first stream takes up a share of the
    second. None if each stays as it is.
    """
    if x.shape[1] == config.d:
        return x.new_ones(len(x), 2, 1)
    if branch == "attn" or config.row.streams != "input":
        return None
    share = w.vector("layer_output_scale.weight")  # [1]
    one, zero = torch.ones_like(share), torch.zeros_like(share)
    return torch.stack([torch.cat([one, share]), torch.cat([zero, one])]).repeat(len(x), 1, 1)


def _weights(
    w: BlockWeights, config: ModelConfig, stem: str, x: Float[Tensor, "n i"], parts: list[int]
) -> list[Float[Tensor, "n _"]]:
    """Return the raw weights of some uses of the state, in float32 at least; each use has a scale and a bias."""
    copies = x.repeat(1, config.streams.count) if x.shape[1] == config.d else x
    normed = (widened(copies) * inverse_rms(copies, config)).to(x.dtype)
    made = widened(affine(linear(w, f"{stem}_fn", len(x)), normed)).split(parts, 1)
    scales, biases = w.wide_vector(f"{stem}_scale.weight"), w.wide_vector(f"{stem}_base.weight").split(parts)
    return [part * scale + bias for part, scale, bias in zip(made, scales, biases, strict=True)]


def _doubly_stochastic(logits: Float[Tensor, "n i o"], epsilon: float, rounds: int) -> Float[Tensor, "n i o"]:
    """Return positive weights whose rows and columns sum to one, about: Sinkhorn's iteration, columns last.

    As in llama.cpp's deepseek4.cpp (`build_hc_sinkhorn`), after arXiv 2512.24880.
    """
    weights = logits.softmax(-1) + epsilon
    for step in range(rounds):
        if step:
            weights = weights / (weights.sum(2, keepdim=True) + epsilon)
        weights = weights / (weights.sum(1, keepdim=True) + epsilon)
    return weights


# ----------------------------------------------------------------------------------------------------------------------
# Streams that are predicted and corrected


class OpeningTape(NamedTuple):
    """The frozen factors with which further streams are made from the first: each gets its length.

    Attributes:
        factors: on the products with a matrix for each stream.
    """

    factors: Float[Tensor, "n s"]

    def at(self, positions: Positions) -> "OpeningTape":
        """Return the tape of some positions."""
        return OpeningTape(self.factors[positions])


class ClosingNorm(NamedTuple):
    """The norm before the head, frozen, and how all streams are merged before it.

    Attributes:
        norm: of the merged streams.
        factors: on the products of all streams but the first with a matrix each, frozen.
        w: the tensors outside the blocks.
    """

    norm: NormTape
    factors: Float[Tensor, "n s"]
    w: BlockWeights

    @property
    def scale(self) -> Float[Tensor, "n 1"]:
        """The frozen scale of the norm."""
        return self.norm.scale

    def at(self, positions: slice) -> "ClosingNorm":
        """Return the norm of some positions."""
        return ClosingNorm(self.norm.at(positions), self.factors[positions], self.w)

    def apply(self, x: Float[Tensor, "n i"]) -> Float[Tensor, "n d"]:
        """Return the norm of the merged streams."""
        return affine(self.operator(), x)

    def operator(self) -> LinearOperator:
        """Return the frozen norm of the merged streams, `[n, s d]` to `[n, d]`."""
        return self.norm.operator() @ self.collecting()

    def collecting(self) -> LinearOperator:
        """Return how the streams are merged, `[n, s d]` to `[n, d]`."""
        return _closing(self.w, len(self.norm.weight), self.factors)


FinalNorm = NormTape | ClosingNorm


def record_opening(w: BlockWeights, x: Float[Tensor, "n d"], others: int) -> OpeningTape:
    """Freeze the lengths with which `others` more streams are made from the embeddings; `w` are outside the blocks."""
    made = (affine(linear(w, "altup_proj", len(x), expert=i), x) for i in range(others))
    return OpeningTape(torch.cat([_to_length(part, x) for part in made], 1))


def opening(w: BlockWeights, tape: OpeningTape, d: int) -> LinearOperator:
    """Return how all streams are made from the embeddings, `[n, d]` to `[n, s d]`; `w` are outside the blocks."""
    factors, (n, others) = tape.factors, tape.factors.shape
    parts: list[LinearOperator] = [StreamMix(unit(factors, 0, 1 + others).mT, d)]
    for i in range(others):
        spread = unit(factors, 1 + i, 1 + others).mT * factors[:, i, None, None]
        parts.append(StreamMix(spread, d) @ linear(w, "altup_proj", n, expert=i))
    return Sum(*parts)


def record_closing(
    w: BlockWeights, config: ModelConfig, x: Float[Tensor, "n i"]
) -> tuple[Float[Tensor, "n s"], Float[Tensor, "n d"]]:
    """Freeze how the streams of the state `x` are merged before the head, and return them merged."""
    first, *others = x.split(config.d, 1)
    made = (affine(linear(w, "altup_unembd_proj", len(x), expert=i), part) for i, part in enumerate(others))
    factors = torch.cat([_to_length(part, first) for part in made], 1)
    return factors, affine(_closing(w, config.d, factors), x)


def _closing(w: BlockWeights, d: int, factors: Float[Tensor, "n s"]) -> LinearOperator:
    n, others = factors.shape
    parts: list[LinearOperator] = [StreamMix(unit(factors, 0, 1 + others) / (1 + others), d)]
    for i in range(others):
        read = unit(factors, 1 + i, 1 + others) * factors[:, i, None, None] / (1 + others)
        parts.append(linear(w, "altup_unembd_proj", n, expert=i) @ StreamMix(read, d))
    return Sum(*parts)


def _to_length(made: Float[Tensor, "n d"], x: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
    """Return the factors that give vectors the length of others."""
    lengths = (widened(part).norm(dim=1, keepdim=True) for part in (x, made))
    return torch.div(*lengths).to(x.dtype)


def _modalities(w: BlockWeights, config: ModelConfig, x: Float[Tensor, "n d"]) -> Float[Tensor, "n s"]:
    """Return what the router makes of a stream: numbers from -1 to 1, from which weights are made."""
    normed = widened(x) * inverse_rms(x, config) * w.vector("altup_router_norm.weight").to(widened(x)) / config.d
    return affine(linear(w, "altup_router", len(x)), normed.to(x.dtype)).tanh()


def _predicted(
    w: BlockWeights, config: ModelConfig, x: Float[Tensor, "n i"]
) -> tuple[Float[Tensor, "n 1 s"], StreamsTape]:
    """Freeze how attention reads the prediction of the first stream, and how it leaves a stream beside predictions."""
    count, half = config.streams.count, 2**-0.5
    mixtures = affine(linear(w, "altup_predict_coef", len(x)), _modalities(w, config, x[:, : config.d]))
    kept = mixtures.unflatten(1, (count, count)) + torch.eye(count, dtype=x.dtype, device=x.device)
    written = half * unit(x, 0, 1 + count).mT
    return kept[:, :1], StreamsTape(written, torch.cat([half * kept[:, :1], kept], 1))


def record_correction(
    w: BlockWeights, config: ModelConfig, x: Float[Tensor, "n i"], added: Float[Tensor, "n d"]
) -> StreamsTape:
    """Freeze how predictions are corrected after a feed-forward that adds `added` to the first of the streams `x`."""
    count = config.streams.count
    made = affine(linear(w, "altup_correct_coef", len(x)), _modalities(w, config, x[:, : config.d] + added))
    written = (made + 1)[:, :, None]  # [n, s, 1]
    wrong = unit(x, 0, 1 + count) - unit(x, 1, 1 + count)  # what the first stream is, less its prediction
    kept = torch.eye(1 + count, dtype=x.dtype, device=x.device)[1:] + written * wrong
    return StreamsTape(written, kept)


def around_inputs(w: BlockWeights, config: ModelConfig, n: int) -> tuple[LinearOperator, LinearOperator] | None:
    """Return how inputs of a block's own read several streams, and how what they add is written; None for one stream.

    They read the first, scaled, and write to all others.
    """
    if "altup_correct_scale.weight" not in w:
        return None
    scale, count = w.vector("altup_correct_scale.weight"), config.streams.count
    scales = scale.expand(n, -1)
    first = unit(scales, 0, count)
    return Scale(scales) @ StreamMix(first, config.d), StreamMix(1 - first.mT, config.d)
