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
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.blocks.frame import BlockWeights, Frame, affine, linear
from ggjac.blocks.norms import inverse_rms, widened
from ggjac.config import ModelConfig
from ggjac.linop import LinearOperator, StreamMix


class StreamsTape(NamedTuple):
    """The frozen weights with which `o` streams follow from `i` streams and a branch.

    Attributes:
        written: of the branch's output in each stream.
        kept: of the streams before it; None if each stays as it is.
    """

    written: Float[Tensor, "n o 1"]
    kept: Float[Tensor, "n o i"] | None

    def at(self, positions: slice) -> "StreamsTape":
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

    def at(self, positions: slice) -> "TurnTape":
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

    The weights of reading are `[n, 1, s]`.
    """
    own = config.streams
    if own.period:
        anew = branch == "attn" and layer % own.period == 0
        return _over_depth(w, config, f"{branch}_res_score", x), _taken_up_by_first(config, x, anew=anew)
    if not own.count:
        return None, None
    if config.one_runs:
        first = _first(config, x)
        return first[:, :, : x.shape[1] // config.d], StreamsTape(first.mT, _with_input(w, config, branch, x))
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
        return _first(config, x)
    if "output_hc_fn.weight" not in w:
        return x.new_full((len(x), 1, config.streams.count), 1 / config.streams.count)
    (read,) = _weights(w, config, "output_hc", x, [config.streams.count])
    return (read.sigmoid() + config.streams.epsilon)[:, None].to(x.dtype)


def _over_depth(w: BlockWeights, config: ModelConfig, stem: str, x: Float[Tensor, "n i"]) -> Float[Tensor, "n 1 s"]:
    """Return the shares of the streams in what is read of them: the softmax of the scores of their norms."""
    streams = widened(x).unflatten(1, (-1, config.d))  # [n, s, d]
    scores = (streams * inverse_rms(streams, config)) @ w.wide_vector(f"{stem}.weight")
    return scores.softmax(-1)[:, None].to(x.dtype)


def _taken_up_by_first(config: ModelConfig, x: Float[Tensor, "n i"], *, anew: bool) -> StreamsTape:
    """Return how the first stream takes up a branch, or one more that begins `anew` before those of `x`."""
    n, before = len(x), x.shape[1] // config.d
    kept, written = x.new_ones(before + anew).diag()[:, int(anew) :], x.new_zeros(before + anew, 1)
    written[0] = 1
    return StreamsTape(written.repeat(n, 1, 1), kept.repeat(n, 1, 1) if anew else None)


def _first(config: ModelConfig, x: Float[Tensor, "n i"]) -> Float[Tensor, "n 1 s"]:
    """Return the weights by which the first of several streams is read alone."""
    return torch.eye(1, config.streams.count, dtype=x.dtype, device=x.device).repeat(len(x), 1, 1)


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
