"""A transformer block at one prompt: its frozen quantities (a tape), and the linear operator that remains.

    attn  = norm_out @ Linear(attn_output) @ Mix(pattern) @ Linear(attn_v) @ norm_in
    ffn   = norm_out @ Linear(ffn_down) @ Scale(gate) @ Linear(ffn_up) @ norm_in
    block = (I + ffn) @ (I + attn)

In one family what goes past a branch is not the stream, but its norm before the branch, scaled, in place of `I`.

A quantity is *frozen* if it is held at its value at the prompt, and *live* if it is not frozen: the operators are
linear in their live inputs, and apply live weights. Norms are frozen diagonals (LayerNorm's centring and bias stay
live), queries and keys act through the frozen attention pattern only, and in a mixture of experts the choice and the
weights are frozen. The freezing rule is that of Golden, arXiv 2505.24293, section 2.3 (*Large Language Models are
Locally Linear Mappings*; version 3, TMLR, October 2025: *Equivalent Linear Mappings of Large Language Models*).
`ggjac.blocks.mixers` has its counterpart for mixers other than attention. Differences between families come from
`ggjac.config` or from the presence of a tensor: a block may lack either branch, and a branch may be a sum.

Each branch is recorded at its own input, and the forward pass is the recorded operators applied to that input.
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.blocks.frame import BlockWeights, Frame, Positions, affine, linear, scaled
from ggjac.blocks.mixers import MixerTape, Past, extend_mixer, reading, record_mixer, valued, writing
from ggjac.blocks.networks import FFNTape, networks, record_hidden, record_mixture, record_shifted
from ggjac.blocks.norms import NormTape, frozen_norm, record_norm
from ggjac.blocks.streams import (
    OpeningTape,
    StreamsTape,
    TurnTape,
    around_inputs,
    collected,
    opening,
    record_correction,
    record_opening,
    record_streams,
    record_turn,
)
from ggjac.config import ModelConfig
from ggjac.linop import Homogeneous, Identity, LinearOperator, Scale, Select, Sum, Zero


class LaurelTape(NamedTuple):
    """The frozen quantities of what is added beside attention, `I + norm @ laurel_r @ laurel_l` of what both read."""

    norm: NormTape

    def at(self, queries: slice) -> "LaurelTape":
        """Return the tape of some positions."""
        return LaurelTape(self.norm.at(queries))


class AttentionTape(NamedTuple):
    """The frozen quantities of an attention branch, whatever its mixers; without any, the block has no such branch.

    Attributes:
        norm_in, norm_out: norms before and after the sum of the mixers, or None.
        mixers: their tapes.
        streams: how several residual streams take up what the branch adds; None for one.
        beside: what is added after the norm, from what the mixers read; or None.
    """

    norm_in: NormTape | None
    mixers: tuple[MixerTape, ...]
    norm_out: NormTape | None
    streams: StreamsTape | None = None
    beside: LaurelTape | None = None

    @property
    def kinds(self) -> list[str]:
        """The kinds of its mixers, and of what is beside them."""
        return [mixer.kind for mixer in self.mixers] + (["laurel"] if self.beside else [])

    def at(self, queries: slice) -> "AttentionTape":
        """Return the tape of some output positions, and of the input positions up to the last of them."""
        return AttentionTape(
            self.norm_in and self.norm_in.at(slice(queries.stop)),
            tuple(mixer.at(queries) for mixer in self.mixers),
            self.norm_out and self.norm_out.at(queries),
            self.streams and self.streams.at(queries),
            self.beside and self.beside.at(queries),
        )


class InputsTape(NamedTuple):
    """The frozen quantities of what a block adds by inputs of its own, `norm_out @ proj @ Scale(factor) @ inp_gate`.

    Attributes:
        factor: the block's inputs, times the share of the activation on the gate. The gate is live.
        norm_out: the norm after the projection.
    """

    factor: Float[Tensor, "n w"]
    norm_out: NormTape

    def at(self, queries: slice) -> "InputsTape":
        """Return the tape of some positions."""
        return InputsTape(self.factor[queries], self.norm_out.at(queries))


class BlockTape(NamedTuple):
    """All frozen quantities of one block, and the residual stream at its input, or streams.

    `entry` is a norm before all else, or how a pass begins, or how further streams are made.
    """

    x: Float[Tensor, "n i"]
    attn: AttentionTape
    ffn: FFNTape
    inputs: InputsTape | None = None
    entry: "Entry | None" = None
    factor: float = 1.0  # constant factor of the stream after the block


Tape = TypeVar("Tape", AttentionTape, FFNTape)
Entry = NormTape | TurnTape | OpeningTape


class Recorded(NamedTuple, Generic[Tape]):
    """A recorded branch.

    Attributes:
        tape: its frozen quantities.
        raw: its output before post-norm and scale (llama.cpp's `attn_out` and `ffn_out`).
        added: what it adds to the residual stream.
        past: of attention, keys and values that later blocks read, if any do; of a feed-forward, for later positions.
    """

    tape: Tape
    raw: Float[Tensor, "n d"]
    added: Float[Tensor, "n d"]
    past: tuple[Past, ...] = ()


class RecordedBlock(NamedTuple):
    """A recorded block: both branches, what it adds by inputs of its own, the stream after it, a norm at its entry."""

    attn: Recorded[AttentionTape]
    ffn: Recorded[FFNTape]
    inputs: InputsTape | None
    out: Float[Tensor, "n o"]
    entry: Entry | None


def record_block(
    w: BlockWeights, frame: Frame, layer: int, x: Float[Tensor, "n i"], source: Past | None = None
) -> RecordedBlock:
    """Freeze a block at its input `x`; `source` has another block's keys and values, if it reads those."""
    entry, x = entered(w, frame, layer, x)
    attn = record_attention(w, frame, layer, x, source)
    middle = taken_up(frame.config, attn.tape, x, attn.added)
    ffn, inputs, out = record_rest(w, frame, layer, x, middle)
    return RecordedBlock(attn, ffn, inputs, out, entry)


def entered(
    w: BlockWeights, frame: Frame, layer: int, x: Float[Tensor, "n i"]
) -> tuple[Entry | None, Float[Tensor, "n e"]]:
    """Freeze what all of a block reads the stream `x` through, or None, and return the stream after it."""
    config = frame.config
    entry: Entry | None = None
    if config.turns(layer):
        entry = record_turn(frame, layer, x)
    elif config.normed_entry(layer):
        entry = frozen_norm(config, frame.between, None, x)
    elif config.opens(layer):
        entry = record_opening(w.outside, x, config.streams.count - 1)
    return entry, x if entry is None else affine(entering(w, config, entry), x)


def entering(w: BlockWeights, config: ModelConfig, entry: Entry) -> LinearOperator:
    """Return what all of a block reads the stream through."""
    return opening(w.outside, entry, config.d) if isinstance(entry, OpeningTape) else entry.operator()


def extend_block(
    w: BlockWeights,
    frame: Frame,
    layer: int,
    x: Float[Tensor, "m i"],
    past: tuple[Past, ...] | None,
    source: Past | None = None,
) -> tuple[Float[Tensor, "m o"], tuple[Past, ...]]:
    """Return the residual stream after a block at `m` positions that follow `past`, and the longer past.

    `record_block` without tapes: the same operators, but nothing is computed again at positions of the past (None:
    there are none). A past is that of each mixer, or of the block whose keys it reads, extended already, and then the
    feed-forward's; `source` is the extended past of the block whose values it reads beside its own.
    """
    config, mixers, x = frame.config, frame.config.layers[layer].mixers, entered(w, frame, layer, x)[1]
    past = past or (Past(),) * (len(mixers) + 1)
    if not mixers:
        ffn, _, out = record_rest(w, frame, layer, x, x, past[-1])
        return out, ffn.past
    read, streams = record_streams(w, config, layer, "attn", x)
    norm_in, h = _normed_input(w, config, config.row.norms.attention_in, x, read)
    pairs = zip(mixers, past[:-1], strict=True)
    extended = [extend_mixer(w, frame, layer, kind, h, own, source) for kind, own in pairs]
    raw = _total([added for added, _ in extended])
    added = _normed_output(w, config, config.row.norms.attention_out, config.attention_factor, raw)[1]
    added = _record_laurel(w, config, h, added)[1]
    middle = taken_up(config, AttentionTape(norm_in, (), None, streams), x, added)
    ffn, _, out = record_rest(w, frame, layer, x, middle, past[-1])
    return out, (*(own for _, own in extended), *ffn.past)


def record_rest(
    w: BlockWeights,
    frame: Frame,
    layer: int,
    x: Float[Tensor, "n i"],
    middle: Float[Tensor, "n o"],
    past: Past | None = None,
) -> tuple[Recorded[FFNTape], InputsTape | None, Float[Tensor, "n o"]]:
    """Freeze the rest of a block that attention leaves with the stream `middle`; return it, and the stream after it.

    `past` is the feed-forward's, if it continues one.
    """
    ffn = record_ffn(w, frame, layer, x if frame.config.row.parallel else middle, x, past or Past())
    out, inputs = taken_up(frame.config, ffn.tape, middle, ffn.added), None
    if frame.inputs is not None:
        inputs, added = _record_inputs(w, frame, layer, out)
        out = out + added
    scale = stream_scale(w, frame.config, x, frame.config.layers[layer].factor)
    return ffn, inputs, out if scale is None else out * scale


def block_inputs(
    w: BlockWeights, config: ModelConfig, table: Float[Tensor, "n Lw"], x: Float[Tensor, "n d"]
) -> Float[Tensor, "n L w"]:
    """Return what each of `L` blocks reads of the tokens beside the stream (Gemma 4 E2B, E4B).

    Args:
        w: the tensors outside the blocks.
        config: the model's sizes.
        table: rows of `per_layer_token_embd`.
        x: the input of block 0.
    """
    projected = affine(linear(w, "per_layer_model_proj", len(x)), x) / config.d**0.5
    projected = projected.reshape(-1, config.inputs)  # [n L, w]
    norm = frozen_norm(config, w.vector("per_layer_proj_norm.weight"), None, projected)
    rows = table.reshape(-1, config.inputs) * config.inputs**0.5
    return ((norm.apply(projected) + rows) / 2**0.5).unflatten(0, (len(x), -1))


def _record_inputs(
    w: BlockWeights, frame: Frame, layer: int, x: Float[Tensor, "n i"]
) -> tuple[InputsTape, Float[Tensor, "n i"]]:
    """Freeze what a block adds by inputs of its own at the stream `x`; return that too."""
    assert frame.inputs is not None
    around = around_inputs(w, frame.config, len(x))
    gate = affine(linear(w, "inp_gate", len(x)), x if around is None else affine(around[0], x))
    factor = frame.activations[layer].share(gate) * frame.inputs[:, layer]
    made = affine(linear(w, "proj", len(x)), factor * gate)
    norm = record_norm(w, frame.config, ("post_norm",), made)
    assert norm is not None
    added = norm.apply(made)
    return InputsTape(factor, norm), added if around is None else affine(around[1], added)


def stream_scale(
    w: BlockWeights, config: ModelConfig, x: Float[Tensor, "n d"], factor: float
) -> Float[Tensor, " 1"] | None:
    """Return the factor on the residual stream at the end of a block, on the device of the stream `x`; or None.

    It is in the file (Gemma 4), or a constant `factor` (RWKV-6).
    """
    if factor != 1:
        return x.new_full((1,), factor)
    present = config.row.stream_scale and "layer_output_scale.weight" in w
    return w.vector("layer_output_scale.weight") if present else None


def record_attention(
    w: BlockWeights, frame: Frame, layer: int, x: Float[Tensor, "n i"], source: Past | None = None
) -> Recorded[AttentionTape]:
    """Freeze the attention branch at its input `x`; `source` has another block's keys and values, if it reads those."""
    config, norms = frame.config, frame.config.row.norms
    mixers = config.layers[layer].mixers
    if not mixers:
        return Recorded(AttentionTape(None, (), None), torch.zeros_like(x), torch.zeros_like(x))
    read, streams = record_streams(w, config, layer, "attn", x)
    norm_in, h = _normed_input(w, config, norms.attention_in, x, read)
    recorded = [record_mixer(w, frame, layer, kind, h, source) for kind in mixers]
    raw = _total([affine(writing(w, mixed.tape, len(x)), mixed.heads) for mixed in recorded])
    norm_out, added = _normed_output(w, config, norms.attention_out, config.attention_factor, raw)
    beside, added = _record_laurel(w, config, h, added)
    tape = AttentionTape(norm_in, tuple(mixed.tape for mixed in recorded), norm_out, streams, beside)
    pasts = tuple(mixed.past for mixed in recorded) if layer in config.writers else ()
    return Recorded(tape, raw, added, pasts)


def _record_laurel(
    w: BlockWeights, config: ModelConfig, h: Float[Tensor, "n d"], added: Float[Tensor, "n d"]
) -> tuple[LaurelTape | None, Float[Tensor, "n d"]]:
    """Freeze what is added beside attention at its input `h`, or None; return what both add, attention `added`."""
    if not config.row.laurel:
        return None, added
    made = affine(linear(w, "laurel_r", len(h)), affine(linear(w, "laurel_l", len(h)), h))
    norm = record_norm(w, config, ("laurel_post_norm",), made)
    assert norm is not None
    return LaurelTape(norm), added + h + norm.apply(made)


def _laurel(w: BlockWeights, tape: LaurelTape, m: int) -> LinearOperator:
    """Return what is added beside attention, `[m, d]` to `[m, d]`."""
    made = tape.norm.operator() @ linear(w, "laurel_r", m) @ linear(w, "laurel_l", m)
    return Sum(Identity(made.in_shape, dtype=made.dtype, device=made.device), made)


def record_ffn(
    w: BlockWeights, frame: Frame, layer: int, x: Float[Tensor, "n i"], entry: Float[Tensor, "n e"], past: Past
) -> Recorded[FFNTape]:
    """Freeze the feed-forward branch at its input `x`; `entry` is the block's, which some routers and mixtures read.

    Of a past it has the last row, where it reads the position before.
    """
    config, norms, own = frame.config, frame.config.row.norms, frame.config.layers[layer]
    if not own.routed and not own.hidden_units:
        return Recorded(FFNTape(None, (), None), torch.zeros_like(x), torch.zeros_like(x), (past,))
    weights, streams = record_streams(w, config, layer, "ffn", x)
    if "channel_mix_lerp_k.weight" in w:
        norm, h = _normed_input(w, config, norms.ffn_in, x, weights)
        tape, raw = record_shifted(w, frame, layer, h, past.rows)
        tape, past = tape._replace(norm_in=norm), Past(rows=h[-1:].clone())
    elif own.routed and own.hidden_units and norms.experts_in:
        # A dense network and a mixture, added, each between norms of its own.
        read = entry if config.row.experts_skip else x
        dense, added = _record_part(w, frame, layer, x, entry, norms.ffn_in, norms.dense_out, routed=False)
        mixture, raw = _record_part(w, frame, layer, read, entry, norms.experts_in, norms.experts_out, routed=True)
        tape, raw = FFNTape(None, (dense, mixture), None), added + raw
        if config.row.experts_skip:
            tape = FFNTape(None, (dense,), None, beside=mixture)
    else:
        tape, raw = _record_part(w, frame, layer, x, entry, norms.ffn_in, (), weights, routed=own.routed)
    norm_out, added = _normed_output(w, config, norms.ffn_out, config.residual_scale, raw)
    if "altup_correct_coef.weight" in w:
        streams = record_correction(w, config, x, added)
    return Recorded(tape._replace(norm_out=norm_out, streams=streams), raw, added, (past,))


def _record_part(
    w: BlockWeights,
    frame: Frame,
    layer: int,
    x: Float[Tensor, "n i"],
    entry: Float[Tensor, "n e"],
    norm_in: Sequence[str],
    norm_out: Sequence[str],
    read: Float[Tensor, "n 1 s"] | None = None,
    *,
    routed: bool,
) -> tuple[FFNTape, Float[Tensor, "n d"]]:
    """Freeze a dense network or a mixture, between the norms of the given names, at the stream `x`; add its output.

    `entry` is the stream before the block, and `read` has the weights with which the part reads several streams.
    """
    norm, h = _normed_input(w, frame.config, norm_in, x, read)
    if routed:
        tape, added = record_mixture(w, frame, layer, h, x, entry)
    else:
        tape = FFNTape(None, (record_hidden(w, frame, layer, h),), None)
        added = affine(networks(w, tape, len(x)), h)
    after = record_norm(w, frame.config, norm_out, added)
    return tape._replace(norm_in=norm, norm_out=after), added if after is None else after.apply(added)


def _total(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of some tensors of one shape."""
    return sum(parts[1:], start=parts[0])


def attention(w: BlockWeights, config: ModelConfig, tape: AttentionTape, n: int, m: int) -> LinearOperator:
    """Return the attention branch, `[n, d]` to `[m, d]`: the last `m` of `n` positions."""
    if len(tape.mixers) == 1:
        ((heads, output),) = attention_halves(w, config, tape, n, m)
        return output @ heads
    inner: LinearOperator = Sum(*(writing(w, mixer, m) @ reading(w, mixer, n, m) for mixer in tape.mixers))
    joined = inner if tape.norm_in is None else inner @ tape.norm_in.operator()
    return _after(config.attention_factor, tape.norm_out, joined)


def attention_halves(
    w: BlockWeights, config: ModelConfig, tape: AttentionTape, n: int, m: int
) -> list[tuple[LinearOperator, LinearOperator]]:
    """Return each mixer of the branch in two: `[n, d]` to the mixed values `[m, h v]`, and from there to `[m, d]`.

    A constant of the norm after them would be in each of several. The first reads another block's values, `[n, g v]`,
    where attention does.
    """
    norm_in = tape.norm_in and tape.norm_in.operator()
    halves = []
    for mixer in tape.mixers:
        heads = reading(w, mixer, n, m)
        joined = heads @ norm_in if norm_in and not mixer.shared else heads
        halves.append((joined, _after(config.attention_factor, tape.norm_out, writing(w, mixer, m))))
    return halves


def _inputs(w: BlockWeights, config: ModelConfig, tape: InputsTape, m: int) -> LinearOperator:
    """Return what a block adds by inputs of its own, `[m, i]` to `[m, i]`."""
    core = tape.norm_out.operator() @ linear(w, "proj", m) @ Scale(tape.factor) @ linear(w, "inp_gate", m)
    around = around_inputs(w, config, m)
    return core if around is None else around[1] @ core @ around[0]


def ffn(w: BlockWeights, config: ModelConfig, tape: FFNTape, n: int) -> LinearOperator:
    """Return the feed-forward branch, `[n, d]` to `[n, d]`."""
    return _after(config.residual_scale, tape.norm_out, networks(w, tape, n))


def beside(w: BlockWeights, config: ModelConfig, tape: FFNTape, n: int) -> LinearOperator | None:
    """Return the part of the feed-forward branch that reads the block's input, `[n, d]` to `[n, d]`; or None."""
    part = tape.beside
    return None if part is None else _after(config.residual_scale, part.norm_out, networks(w, part, n))


class FrozenBlock(NamedTuple):
    """A block's branches as operators: `(I + ffn) @ (I + attn)`, or `I + ffn + attn` where both read its input.

    With a part of the feed-forward that reads the block's input, it is `(I + ffn) @ (I + attn) + beside`.

    A product goes through the block in two steps, one for each branch: maps may end between them, so that vectors leave
    on the way up and join on the way down. Sums are taken in place, as stacks of vectors may be large.

    Attributes:
        attn: the attention branch, from the `n` positions that are read to the `m` that are written; and to the one
            before them, where the feed-forward reads that too.
        ffn: the feed-forward branch, at the written positions.
        residual: what goes past attention: all, a selection where fewer positions are written than read, or its norm.
        parallel: whether both branches read the block's input.
        scale: factor on the stream at the end, or None.
        inputs: what the block adds by inputs of its own, to the stream after both branches; or None.
        bank: number of the block whose values attention reads, if several blocks read them; or None.
        values: those values, from this block's input, if it is that block; or those to which they are added.
        share: factor of those values where they are added to the block's own.
        skip: what goes past the feed-forward; None for all of the stream.
        entry: a norm before all else, or how a pass begins or further streams are made, at the positions that are read;
            or None.
        beside: the part of the feed-forward that reads the block's input, or None.
        laurel: what is added beside attention, from the block's input; or None.
        spread: of several residual streams, how they take up what attention adds, and what the feed-forward adds, each
            `[m, d]` to `[m, o d]`; None for one stream.

    Values that several blocks read are held in a bank, by number of their block: going up, their block writes them
    there for each vector of the stack, and attention reads them there; going down, the cotangents of all that have
    read them are added up there, and join those of their block's input. Vectors that join the stack come after the
    others: going down, rows that are missing in the bank are zeros.
    """

    attn: LinearOperator
    ffn: LinearOperator
    residual: LinearOperator
    parallel: bool
    scale: Float[Tensor, " 1"] | None = None
    inputs: LinearOperator | None = None
    bank: int | None = None
    values: LinearOperator | None = None
    skip: LinearOperator | None = None
    entry: LinearOperator | None = None
    beside: LinearOperator | None = None
    share: LinearOperator | None = None
    laurel: LinearOperator | None = None
    spread: tuple[LinearOperator, LinearOperator] | None = None

    @property
    def reads_bank(self) -> bool:
        """Whether attention reads values of an earlier block."""
        return self.bank is not None and (self.values is None or self.share is not None)

    def mixed(self, H: Float[Tensor, "k n i"], t: Homogeneous, banks: dict[int, Tensor]) -> Float[Tensor, "k n _"]:
        """Return what attention mixes, where several blocks read values of one: values, in place of the stream."""
        if self.bank is None:
            return H
        if self.values is None:
            return banks[self.bank]
        own = self.values.matmat(H, t)  # [k, n, gv]
        if self.share is not None:
            return own.add_(self.share.matmat(banks[self.bank]))
        banks[self.bank] = own
        return own

    def matmat(
        self, H: Float[Tensor, "k n i"], t: Homogeneous = None, banks: dict[int, Tensor] | None = None
    ) -> Float[Tensor, "k m o"]:
        """Return the residual stream after the block for `k` stacked streams before it."""
        H, added = self.matmat_attn(H, t, banks)
        return self.matmat_out(*self.matmat_ffn(H, added, t), t)

    def matmat_attn(
        self, H: Float[Tensor, "k n i"], t: Homogeneous = None, banks: dict[int, Tensor] | None = None
    ) -> tuple[Float[Tensor, "k m o"], Float[Tensor, "k m d"]]:
        """Return, at the written positions, the stream `[k, m, d]` and what attention adds to it."""
        H = H if self.entry is None else self.entry.matmat(H, t)
        banks = {} if banks is None else banks
        added = self.attn.matmat(self.mixed(H, t, banks), t)
        if self.laurel is not None:
            added += self.laurel.matmat(H, t)
        return self.residual.matmat(H), added

    def matmat_ffn(
        self, H: Float[Tensor, "k p i"], attn: Float[Tensor, "k p d"], t: Homogeneous = None
    ) -> tuple[Float[Tensor, "k m o"], Float[Tensor, "k m d"]]:
        """Return what goes past the feed-forward `[k, m, d]`, in place of `attn`, and what that adds to it."""
        middle = (attn if self.spread is None else self.spread[0].matmat(attn)).add_(H)
        added = self.ffn.matmat(H if self.parallel else middle, t)
        added = added if self.beside is None else added.add_(self.beside.matmat(H, t))
        written = middle[:, middle.shape[1] - added.shape[1] :]
        return written if self.skip is None else self.skip.matmat(written), added

    def matmat_out(
        self, H: Float[Tensor, "k m i"], ffn: Float[Tensor, "k m d"], t: Homogeneous = None
    ) -> Float[Tensor, "k m o"]:
        """Return the stream after the block, in place of `ffn`, from the stream after attention and what `ffn` adds."""
        out = self.written(H, ffn)
        if self.inputs is not None:
            out += self.inputs.matmat(out, t)
        return out if self.scale is None else out.mul_(self.scale)

    def written(self, H: Float[Tensor, "k m i"], ffn: Float[Tensor, "k m d"]) -> Float[Tensor, "k m o"]:
        """Return the stream after both branches, in place of `ffn`, as `matmat_out` takes them."""
        return (ffn if self.spread is None else self.spread[1].matmat(ffn)).add_(H)

    def rmatmat(self, H: Float[Tensor, "k m o"], banks: dict[int, Tensor] | None = None) -> Float[Tensor, "k n i"]:
        """Return the cotangents of the stream before the block for `k` stacked ones of the stream after it."""
        return self.rmatmat_attn(*self.rmatmat_ffn(*self.rmatmat_out(H)), banks)

    def rmatmat_out(self, H: Float[Tensor, "k m o"]) -> tuple[Float[Tensor, "k m i"], Float[Tensor, "k m d"]]:
        """Return the cotangents of what goes past the feed-forward, and of what that adds: `matmat_out` transposed.

        They are one tensor if there is one stream.
        """
        H = H if self.scale is None else H * self.scale
        H = H if self.inputs is None else H + self.inputs.rmatmat(H)
        return H, H if self.spread is None else self.spread[1].rmatmat(H)

    def rmatmat_ffn(
        self, H: Float[Tensor, "k m i"], ffn: Float[Tensor, "kl m d"]
    ) -> tuple[Float[Tensor, "kl p e"], Float[Tensor, "_ _ d"]]:
        """Return the cotangents of the stream after attention, and of what attention adds: `matmat_ffn` transposed.

        Args:
            H: `[k, m, d]`, cotangents of what goes past the feed-forward.
            ffn: `[k + l, m, d]`, of what the feed-forward adds: `rmatmat_out`'s, and those of `l` maps that end there.

        Returns:
            Both `[k + l, m, d]`, or one position more (see `attn`). They are one tensor if there is one stream and the
            feed-forward reads nothing of the block's input.
        """
        middle = self.ffn.rmatmat(ffn)
        middle[: len(H), middle.shape[1] - H.shape[1] :] += H if self.skip is None else self.skip.rmatmat(H)
        if self.beside is not None:
            return middle + self.beside.rmatmat(ffn), middle
        if not self.parallel:
            return middle, middle if self.spread is None else self.spread[0].rmatmat(middle)
        ended = len(ffn) - len(H)
        return middle, torch.cat([H, H.new_zeros(ended, *H.shape[1:])]) if ended else H

    def rmatmat_attn(
        self, H: Float[Tensor, "kj m o"], attn: Float[Tensor, "kl m d"], banks: dict[int, Tensor] | None = None
    ) -> Float[Tensor, "kl n i"]:
        """Return the cotangents of the stream before the block, `[k + l, n, d]`: `matmat_attn` transposed.

        Args:
            H: `[k, m, d]`, cotangents of the stream after attention.
            attn: `[k + l, m, d]`, of what attention adds: those from above, and those of `l` maps that end there.
        """
        X = self.attn.rmatmat(attn)
        if self.bank is not None:
            banks = {} if banks is None else banks
            above = banks.get(self.bank)
            read = X if self.share is None else self.share.rmatmat(X)
            if above is not None:
                read[: len(above)] += above
            banks[self.bank] = read  # [k + l, n, gv]
            zeros = (len(X), *self.residual.in_shape)
            X = X.new_zeros(zeros) if self.values is None else self.values.rmatmat(X)
        if self.laurel is not None:
            X += self.laurel.rmatmat(attn)
        X[: len(H)] += self.residual.rmatmat(H)
        return X if self.entry is None else self.entry.rmatmat(X)

    @property
    def flop(self) -> int:
        """Floating-point operations of one product with one vector."""
        return sum(part.flop for part in self._parts)

    def read_ahead(self) -> None:
        """Prefetch the weights of both branches from the disk."""
        for part in self._parts:
            part.read_ahead()

    @property
    def _parts(self) -> list[LinearOperator]:
        """All that a product goes through."""
        parts = (self.entry, self.values, self.attn, self.laurel, self.ffn, self.beside, self.inputs)
        return [part for part in parts if part is not None]


def block(
    w: BlockWeights, config: ModelConfig, tape: BlockTape, positions: range, bank: int | None = None
) -> FrozenBlock:
    """Return a frozen block that reads all positions up to the last of `positions`, and writes `positions`.

    Later positions are left out, since attention is causal. Where `positions` are few (the last block needs only one),
    only keys and values are computed at the others. `bank` is as `FrozenBlock` has it.
    """
    n, m, d = positions.stop, len(positions), config.d
    queries = slice(positions.start, positions.stop)
    dtype, device = tape.x.dtype, tape.x.device
    p = min(n, m + tape.ffn.shifted)  # positions that the feed-forward reads
    written = slice(n - p, n)
    entry = tape.entry and entering(w, config, tape.entry.at(slice(n)))
    before = tape.x.shape[1] if entry is None else entry.out_shape[1]
    attn: LinearOperator = Zero((n, before), (p, d), dtype=dtype, device=device)
    values = share = None
    own = tape.attn.at(written)
    if bank is not None and not own.mixers[0].shared:
        values, attn = _with_bank(w, config, own, n, p)
    elif own.mixers:
        attn = attention(w, config, own, n, p)
        if (carried := own.mixers[0].carried) is not None:
            values, share = _values(w, own, n), carried.operator()
    feed_forward: LinearOperator = Zero((m, d), (m, d), dtype=dtype, device=device)
    skipping = None
    if not tape.ffn.empty:
        networks_tape = tape.ffn.at(queries)
        feed_forward, skipping = ffn(w, config, networks_tape, m), beside(w, config, networks_tape, m)
    residual: LinearOperator = Identity((p, before), dtype=dtype, device=device)
    if p < n:
        residual = Select(torch.arange(n - p, n), n, before, dtype=dtype, device=device)
    laurel = None
    if own.beside is not None and own.norm_in is not None:
        laurel = _laurel(w, own.beside, p) @ own.norm_in.at(written).operator() @ residual
    past_attn, past_ffn = skip(config, tape.attn, written), skip(config, tape.ffn, queries)
    residual = residual if past_attn is None else past_attn @ residual
    spread = None
    if tape.attn.streams is not None and tape.ffn.streams is not None:
        spread = (tape.attn.streams.at(written).spread(d), tape.ffn.streams.at(queries).spread(d))
    inputs = None if tape.inputs is None else _inputs(w, config, tape.inputs.at(queries), m)
    return FrozenBlock(
        attn,
        feed_forward,
        residual,
        config.row.parallel,
        stream_scale(w, config, tape.x, tape.factor),
        inputs,
        bank=bank,
        values=values,
        skip=past_ffn,
        entry=entry,
        beside=skipping,
        share=share,
        laurel=laurel,
        spread=spread,
    )


def skip(
    config: ModelConfig, tape: AttentionTape | FFNTape, positions: Positions = slice(None)
) -> LinearOperator | None:
    """Return what goes past a branch at some positions; None where that is all of the stream."""
    if tape.streams is not None:
        return tape.streams.at(positions).carry(config.d)
    if tape.norm_in is None or not config.row.normed_skip:
        return None
    return scaled(tape.norm_in.at(positions).operator(), config.skip_scale)


def taken_up(
    config: ModelConfig, tape: AttentionTape | FFNTape, x: Float[Tensor, "n i"], added: Float[Tensor, "n d"]
) -> Float[Tensor, "n o"]:
    """Return the stream after a branch that adds `added` to `x`."""
    past = skip(config, tape)
    x = x if past is None else affine(past, x)
    return x + (added if tape.streams is None else affine(tape.streams.spread(config.d), added))


def _with_bank(
    w: BlockWeights, config: ModelConfig, tape: AttentionTape, n: int, m: int
) -> tuple[LinearOperator, LinearOperator]:
    """Return attention in two at its values, which later blocks read too: `[n, d]` to `[n, g v]`, and to `[m, d]`."""
    (mixer,) = tape.mixers
    values = _values(w, tape, n)
    heads = reading(w, mixer._replace(shared=values.out_shape[1]), n, m)
    return values, _after(config.attention_factor, tape.norm_out, writing(w, mixer, m)) @ heads


def _values(w: BlockWeights, tape: AttentionTape, n: int) -> LinearOperator:
    """Return the values of attention's only mixer, from the block's input: `[n, d]` to `[n, g v]`."""
    values = valued(w, tape.mixers[0], n)
    return values if tape.norm_in is None else values @ tape.norm_in.operator()


def _normed_input(
    w: BlockWeights,
    config: ModelConfig,
    names: Sequence[str],
    x: Float[Tensor, "n i"],
    read: Float[Tensor, "n 1 s"] | None = None,
) -> tuple[NormTape | None, Float[Tensor, "n d"]]:
    """Freeze the norm before a branch, and return it with the normed stream, or what it collects of several streams."""
    norm = record_norm(w, config, names, collected(read, config, x))
    norm = norm and norm._replace(streams=read)
    return norm, x if norm is None else norm.apply(x)


def _normed_output(
    w: BlockWeights, config: ModelConfig, names: Sequence[str], factor: float, raw: Float[Tensor, "n d"]
) -> tuple[NormTape | None, Float[Tensor, "n d"]]:
    """Freeze the norm after a branch at the branch's output, and return it with what the branch adds to the stream."""
    norm = record_norm(w, config, names, raw, config.row.post_norm_epsilon)
    identity = Identity(raw.shape, dtype=raw.dtype, device=raw.device)
    return norm, affine(_after(factor, norm, identity), raw)


def _after(factor: float, norm_out: NormTape | None, inner: LinearOperator) -> LinearOperator:
    """Return an operator followed by a branch's post-norm and constant factor, where the model has them."""
    return scaled(inner if norm_out is None else norm_out.operator() @ inner, factor)
