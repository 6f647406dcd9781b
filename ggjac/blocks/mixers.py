"""Token mixers at one prompt: what is frozen, the operator that remains, and the extension by further positions.

    mixer = Linear(output) @ Scale(read) @ Mix(pattern) @ Scale(written) @ Conv @ Scale(entering) @ Linear(values)

A mixer has the factors that its tensors call for: attention has `Linear(attn_output) @ Mix(pattern) @ Linear(attn_v)`,
and latent attention `Linear(attn_output) @ Mix(pattern) @ Linear(attn_v_b) @ norm @ Linear(attn_kv_a_mqa[:l])`.
DeepSeek-V4's has keys that are the values too: `Linear(attn_output_b) @ Beside(Linear(attn_output_a), ...) @ Turn⁻¹ @
(Mix(pattern) @ Turn @ norm @ Linear(attn_kv) + memory)`, see `ggjac.blocks.memory`.
Live is the path of the values: their projection, their convolution and the output projection. Frozen is everything else
that decides how they are mixed: queries and keys, decays and write strengths, the sigmoid-like share of an activation
on the values, gates on the output, and the scales of norms.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from ggjac.blocks.frame import BlockWeights, Frame, Made, Positions, affine, before, linear, made_by
from ggjac.blocks.memory import MemoryTape, record_memory
from ggjac.blocks.norms import (
    HeadNorm,
    NormTape,
    frozen_norm,
    inverse_rms,
    record_head_norm,
    record_norm,
    widened,
)
from ggjac.blocks.patterns import (
    ChannelTape,
    Recurrence,
    ScanTape,
    attention_pattern,
    recurrent_pattern,
    recurrent_scan,
)
from ggjac.config import ModelConfig
from ggjac.config.mixers import MIXERS
from ggjac.linop import (
    Beside,
    Center,
    Concat,
    Conv,
    Identity,
    LinearOperator,
    Mix,
    Repeat,
    Scale,
    Scan,
    Select,
    Shift,
    Take,
)
from ggjac.rope import Rotate, Turn
from ggjac.sizes import scan_chunk


class Factor(NamedTuple):
    """A frozen diagonal, and a constant that is added where the factor came with one (a clamp)."""

    diagonal: Float[Tensor, "n e"]
    constant: Float[Tensor, "n e"] | None = None

    def at(self, positions: slice) -> "Factor":
        """Return the factor at some positions."""
        return Factor(self.diagonal[positions], None if self.constant is None else self.constant[positions])

    def operator(self) -> LinearOperator:
        """Return the factor as an operator."""
        return Scale(self.diagonal, self.constant)


class MixerTape(NamedTuple):
    """The frozen quantities of a token mixer. What its kind does not have is None.

    Attributes:
        kind: of `ggjac.config.mixers.MIXERS`.
        pattern: weights from `n` value to `m` output positions.
        scan: in place of a pattern, a recurrence over a long prompt.
        channels: in place of a pattern, a recurrence in each channel.
        entering: factor of the projected values before the convolution.
        latent: norm of the latent, or of the values.
        turn: cos and sin of the rotation of values that are keys too, undone at each position after they are mixed.
        memory: of groups of tokens, which is added to what is mixed.
        written: factor of the values before they are mixed.
        carried: factor of another block's values, which are then added to the mixer's own.
        normed: factor of what is mixed, after each head is centred: a LayerNorm of each head.
        beside: factor of a position's own values that are added to that, not mixed.
        read: factor of what is mixed, before the output projection.
        shift: share of the position before in what values are made of.
        shared: width of the values if they are, or contain, those of another block; 0 if the mixer makes its own.
    """

    kind: str
    pattern: Float[Tensor, "h m n"] | None = None
    scan: ScanTape | None = None
    channels: ChannelTape | None = None
    entering: Factor | None = None
    latent: NormTape | None = None
    turn: Float[Tensor, "2 n p"] | None = None
    memory: MemoryTape | None = None
    written: Factor | None = None
    carried: Factor | None = None
    normed: Factor | None = None
    beside: Factor | None = None
    read: Factor | None = None
    shift: Float[Tensor, "n d"] | None = None
    shared: int = 0

    @property
    def heads(self) -> int:
        """Number of heads: parts of the mixed values with a pattern of their own."""
        pattern = self.pattern if self.scan is None else self.scan.within
        return 1 if pattern is None else len(pattern)

    def at(self, queries: slice) -> "MixerTape":
        """Return the tape of some output positions, and of the value positions up to the last of them."""
        values = slice(queries.stop)
        return self._replace(
            pattern=None if self.pattern is None else self.pattern[:, queries, values],
            scan=self.scan and self.scan.at(queries.stop),
            channels=self.channels and self.channels.at(queries.stop),
            entering=self.entering and self.entering.at(values),
            latent=self.latent and self.latent.at(values),
            turn=None if self.turn is None else self.turn[:, values],
            memory=self.memory and self.memory.at(queries),
            written=self.written and self.written.at(values),
            carried=self.carried and self.carried.at(values),
            normed=self.normed and self.normed.at(queries),
            beside=self.beside and self.beside.at(queries),
            read=self.read and self.read.at(queries),
            shift=None if self.shift is None else self.shift[values],
        )


class Past(NamedTuple):
    """What a mixer at later positions needs of the positions before them; nothing at the first one.

    Attributes:
        k, v: of attention: keys, rotated, and values of all `p` positions.
        rows: of a convolution with `K` taps, its last `K - 1` inputs; of what reads the position before, the last one;
            of a compressed memory, what its keys and their shares are made from at all positions.
        state: of a recurrence, keys by values (of one in each channel, channels by rows of its state).
    """

    k: Float[Tensor, "p g s"] | None = None
    v: Float[Tensor, "p gv"] | None = None
    rows: Float[Tensor, "_ c"] | None = None
    state: Float[Tensor, "h s v"] | None = None

    @property
    def length(self) -> int:
        """Number of positions whose keys are cached."""
        return 0 if self.k is None else len(self.k)


class Mixed(NamedTuple):
    """A recorded mixer.

    Attributes:
        tape: its frozen quantities.
        heads: `[m, h v]`, the mixed values, before the factor on them and the output projection.
        past: for positions that follow.
        recurrence: what its pattern is made from, or None.
    """

    tape: MixerTape
    heads: Float[Tensor, "m hv"]
    past: Past
    recurrence: Recurrence | None = None


# Freezes a mixer of a layer at its (normed) input `[m, d]`, which continues a past; None where a prompt begins and its
# pattern is wanted. The tape of a recurrence with a past has no pattern: the state is carried on instead. Attention to
# another block's keys has that block's past, which includes the new positions.
Record = Callable[[BlockWeights, Frame, int, Tensor, Past | None], Mixed]


def record_mixer(
    w: BlockWeights, frame: Frame, layer: int, kind: str, h: Float[Tensor, "n d"], source: Past | None = None
) -> Mixed:
    """Freeze a mixer at its (normed) input `h`; `source` has another block's keys and values, if it reads those."""
    if MIXERS[kind].values:
        return RECORD[kind](w, frame._replace(values=source and source.v), layer, h, None)
    return RECORD[kind](w, frame, layer, h, source)


def extend_mixer(
    w: BlockWeights, frame: Frame, layer: int, kind: str, h: Float[Tensor, "m d"], past: Past, source: Past | None
) -> tuple[Float[Tensor, "m d"], Past]:
    """Return what a mixer adds at `m` positions that follow `past`, and the longer past."""
    mixed = RECORD[kind](w, frame._replace(values=source and source.v), layer, h, past)
    return affine(writing(w, mixed.tape, len(h)), mixed.heads), mixed.past


def reading(w: BlockWeights, tape: MixerTape, n: int, m: int) -> LinearOperator:
    """Return a mixer from its (normed) input to the mixed values, `[n, d]` to `[m, h v]`: the last `m` positions.

    With another block's values it reads these, `[n, g v]`.
    """
    if tape.shared:
        return mixing(w, tape, n, m, tape.shared)
    values = _own_values(w, tape, n)
    heads = mixing(w, tape, n, m, values.out_shape[1]) @ values
    if tape.memory is not None:
        heads = heads + tape.memory.operator(w, MIXERS[tape.kind].memory, n)
    return _of_all(w, tape, heads)


def mixing(w: BlockWeights, tape: MixerTape, n: int, m: int, width: int) -> LinearOperator:
    """Return what a mixer does to its values, `[n, g v]` to `[m, h v]`."""
    output = w.matrix(f"{MIXERS[tape.kind].output}.weight")
    dtype, device = output.dtype, output.device

    def unmixed() -> LinearOperator:
        if m == n:
            return Identity((n, width), dtype=dtype, device=device)
        return Select(torch.arange(n - m, n), n, width, dtype=dtype, device=device)

    mixed: LinearOperator
    if tape.scan is not None:
        mixed = _scan(tape.scan, n, m, width)
    elif tape.channels is not None:
        mixed = tape.channels.operator(m)
    else:
        mixed = unmixed() if tape.pattern is None else _mix(w, tape, width)
    if tape.normed is not None:
        mixed = tape.normed.operator() @ Center(mixed.out_shape, tape.heads, dtype=dtype, device=device) @ mixed
    return mixed if tape.beside is None else mixed + tape.beside.operator() @ unmixed()


def valued(w: BlockWeights, tape: MixerTape, n: int) -> LinearOperator:
    """Return a mixer from its (normed) input to the values that it mixes, `[n, d]` to `[n, g v]`."""
    return _of_all(w, tape, _own_values(w, tape, n))


def _of_all(w: BlockWeights, tape: MixerTape, part: LinearOperator) -> LinearOperator:
    """Return an operator on the input, which all who have parts of the mixer read."""
    return w.joined(part, outputs=False) if w.shares(MIXERS[tape.kind].output) else part


def _own_values(w: BlockWeights, tape: MixerTape, n: int) -> LinearOperator:
    """Return `valued` of these weights alone."""
    path = MIXERS[tape.kind]
    if not path.values:
        matrix = w.matrix(f"{path.output}.weight")
        return Identity((n, matrix.shape[1]), dtype=matrix.dtype, device=matrix.device)
    values: LinearOperator = linear(w, path.values, n)
    if tape.shift is not None:
        values = values @ Shift(tape.shift, n)
    if path.recurrent:
        values = _repeated(w, tape, values)
    if tape.latent is not None:
        norm = tape.latent.operator()  # with the expansion, it lets go of what the expansion was given
        values = (linear(w, path.expansion, n) @ norm if path.expansion else norm) @ values
    if tape.entering is not None:
        values = tape.entering.operator() @ values
    if path.convolution:
        values = _conv(w, path.convolution, n) @ values
    if tape.written is not None:
        values = tape.written.operator() @ values
    return values if tape.turn is None else Turn(tape.turn, values.out_shape[1]) @ values


def _repeated(w: BlockWeights, tape: MixerTape, values: LinearOperator) -> LinearOperator:
    """Return values given to all heads that share them; recurrences have as many values as heads."""
    (n, width), whole = values.out_shape, w.matrix(f"{MIXERS[tape.kind].output}.weight").shape[1]
    if width == whole:
        return values
    size = whole // tape.heads
    return Repeat(n, size, width // size, whole // width, dtype=values.dtype, device=values.device) @ values


def writing(w: BlockWeights, tape: MixerTape, m: int) -> LinearOperator:
    """Return a mixer from the mixed values to what it adds, `[m, h v]` to `[m, d]`."""
    stem, grouped = MIXERS[tape.kind].output, MIXERS[tape.kind].grouped
    output: LinearOperator = linear(w, stem, m)
    if grouped:
        output = output @ _grouped(w, tape, m)
    if tape.turn is not None:
        size = output.in_shape[1] // tape.heads
        output = output @ Turn(tape.turn[:, tape.turn.shape[1] - m :], size, tape.heads, back=True)
    if tape.read is not None:
        output = output @ tape.read.operator()
    return w.joined(output, inputs=False) if w.shares(stem) else output


def _grouped(w: BlockWeights, tape: MixerTape, m: int) -> LinearOperator:
    """Return the projections of groups of heads, each of its own, `[m, h v]` to `[m, groups rank]`."""
    path = MIXERS[tape.kind]
    rows, columns = w.matrix(f"{path.grouped}.weight").shape
    groups = tape.heads * w.matrix(f"{path.values}.weight").shape[0] // columns
    rank = rows // groups
    return Beside(*(linear(w, path.grouped, m, rows=slice(i * rank, (i + 1) * rank)) for i in range(groups)))


def _mix(w: BlockWeights, tape: MixerTape, width: int) -> Mix:
    """Return the application of a pattern to values of some width; the output projection gives a head's width."""
    assert tape.pattern is not None
    path = MIXERS[tape.kind]
    # Projected in groups, all heads have the same values.
    size = width if path.grouped else w.matrix(f"{path.output}.weight").shape[1] // len(tape.pattern)
    return Mix(tape.pattern, width // size, size)


# ----------------------------------------------------------------------------------------------------------------------
# Attention

# The step after which queries and keys are normed, by the row's `qk_norm`: over the whole projection, over each head,
# or over each head after the rotary embedding.
QK_NORM_AFTER = {
    "": "",
    "full": "projection",
    "head": "split",
    "heads": "split",
    "rotated": "rotation",
    "bare": "rotation",
    "gained": "rotation",
}


def _attention(w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], past: Past | None) -> Mixed:
    """Freeze softmax attention: its pattern, and the factors on values and heads."""
    config, past = frame.config, past or Past()
    q, gate = _heads_of(w, frame, layer, "q", h, _following(past.length, h))
    k, _ = _heads_of(w, frame, layer, "k", h, _following(past.length, h))
    v = affine(linear(w, "attn_v", len(h)), h)  # [m, g v]
    written = _value_factor(config, layer, v)
    if written is not None:
        v = affine(written.operator(), v)
    if past.k is not None and past.v is not None:
        k, v = torch.cat((past.k, k)), torch.cat((past.v, v))  # [p + m, g, s], [p + m, g v]
    read = _head_gate(w, config, h) if gate is None else gate
    tape = MixerTape("attention", _pattern(w, config, layer, q, k), written=written, read=read)
    heads = affine(_mix(w, tape, v.shape[1]), v)
    if "attn_sub_norm.weight" in w:
        tape = tape._replace(read=Factor((inverse_rms(heads, config) * w.vector("attn_sub_norm.weight")).to(h)))
    return Mixed(tape, heads, Past(k, v))


def _shared_attention(w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], past: Past | None) -> Mixed:
    """Freeze softmax attention to keys and values of an earlier block, at all positions up to the last of `h`."""
    assert past is not None
    assert past.k is not None
    assert past.v is not None
    q, gate = _heads_of(w, frame, layer, "q", h, slice(past.length - len(h), past.length))
    width = past.v.shape[1]
    tape = MixerTape("shared attention", _pattern(w, frame.config, layer, q, past.k), read=gate, shared=width)
    return Mixed(tape, affine(_mix(w, tape, width), past.v), past)


def _heads_of(
    w: BlockWeights, frame: Frame, layer: int, part: str, h: Float[Tensor, "m d"], at: Positions
) -> tuple[Float[Tensor, "m _ s"], Factor | None]:
    """Return the queries or keys of each head, and the heads' gate, as `_queries_or_keys` takes them."""
    made, gate = _queries_or_keys(w, frame, layer, part, h, at)
    own = frame.config.layers[layer]
    return made.value.unflatten(1, (own.heads if part == "q" else own.kv_heads, -1)), gate


def _queries_or_keys(
    w: BlockWeights, frame: Frame, layer: int, part: str, h: Float[Tensor, "m d"], at: Positions
) -> tuple[Made, Factor | None]:
    """Return queries ("q"), with the heads' gate if there is one, or keys ("k") of the normed input `h`."""
    config, own = frame.config, frame.config.layers[layer]
    heads = own.heads if part == "q" else own.kv_heads

    def normed_after(step: str, made: Made, parts: int) -> Made:
        kind = config.row.qk_norm
        if QK_NORM_AFTER[kind] != step or (kind == "bare" and own.rope is None):
            return made
        return made.then(record_head_norm(w, f"attn_{part}_norm", config, made.value, parts))

    made = made_by(linear(w, f"attn_{part}", len(h)), h)  # [m, hs]
    made = made.then(_passed(config, made.value))
    gate = None
    if part == "q" and config.row.gated_queries:  # of each head, first the query and then its gate
        halves = made.value.unflatten(1, (heads, 2, -1))
        gate = Factor(halves[:, :, 1].flatten(1).sigmoid())
        channels = torch.arange(made.value.shape[1]).unflatten(0, halves.shape[1:])[:, 0].flatten()
        made = made.then(Take(channels, *made.value.shape, dtype=h.dtype, device=h.device))
    made = normed_after("split", normed_after("projection", made, 1), heads)
    made = normed_after("rotation", made.then(_rotation(frame, layer, made.value, heads, at)), heads)
    return made.then(_warmth(config, made.value, at) if part == "q" else None), gate


def _warmth(config: ModelConfig, q: Float[Tensor, "m hs"], at: Positions) -> Scale | None:
    """Return the factors of queries by their positions, where the model has them.

    In Llama 4 and Ministral 3, they grow with the logarithm of their position in original contexts.
    """
    if not config.temperature_scale:
        return None
    positions = (torch.arange(at.start, at.stop) if isinstance(at, slice) else at).double()
    periods = positions.div(config.temperature_length, rounding_mode="floor")
    return Scale((1 + config.temperature_scale * torch.log1p(periods)).to(q)[:, None].expand_as(q))


def _pattern(
    w: BlockWeights,
    config: ModelConfig,
    layer: int,
    q: Float[Tensor, "m h s"],
    k: Float[Tensor, "n g s"],
    memory: Float[Tensor, "c g s"] | None = None,
) -> Float[Tensor, "h m nc"]:
    """Return the attention probabilities of a layer's queries and keys, and of those of groups of tokens."""
    own = config.layers[layer]
    return attention_pattern(
        q,
        k,
        own.attention_scale,
        softcap=config.attention_softcap,
        window=own.window,
        alibi=own.alibi,
        sinks=w.vector("attn_sinks.weight") if "attn_sinks.weight" in w else None,
        memory=memory,
        ratio=own.compressed.ratio,
    )


def _value_factor(config: ModelConfig, layer: int, v: Float[Tensor, "m gv"]) -> Factor | None:
    """Return the factor on values that a clamp or a norm of each head amounts to; None where the model has neither."""
    if config.attention_clamp:
        clamp = _passed(config, v)
        return None if clamp is None else Factor(clamp.diagonal, clamp.constant)
    if config.row.value_norm:
        heads = v.unflatten(1, (config.layers[layer].kv_heads, -1))  # [m, g, v]
        return Factor(inverse_rms(heads, config).expand_as(heads).flatten(1).to(v))
    return None


def _head_gate(w: BlockWeights, config: ModelConfig, h: Float[Tensor, "m d"]) -> Factor | None:
    """Return the gate on what the heads read, which has one number for each head or for each of its elements."""
    if "attn_gate.weight" not in w:
        return None
    gate = affine(linear(w, "attn_gate", len(h)), h)
    gate = softplus(gate) if config.row.softplus_gate else gate.sigmoid()
    width = w.matrix("attn_output.weight").shape[1]
    return Factor(gate.repeat_interleave(width // gate.shape[1], 1))  # [m, h v]


def _passed(config: ModelConfig, x: Float[Tensor, "n e"]) -> Scale | None:
    """Return what passes the limit on the entries of queries, keys or values, and the limit for the rest, or None."""
    limit = config.attention_clamp
    if not limit:
        return None
    clamped = x.clamp(-limit, limit)
    passed = x == clamped
    return Scale(passed.to(x), torch.where(passed, 0, clamped))


def _latent(w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], past: Past | None) -> Mixed:
    """Freeze multi-head latent attention (MLA): its pattern, the norm of the latent, and a gate on each head."""
    config, past = frame.config, past or Past()
    latent, norm = _latent_of(w, config, h)
    v = affine(linear(w, "attn_v_b", len(h)), latent.value)  # [m, h v]
    heads = config.layers[layer].heads
    at = _following(past.length, h)
    q = _latent_queries(w, frame, layer, h, at).value.unflatten(1, (heads, -1))
    k = _latent_keys(w, frame, layer, h, latent, at).value.unflatten(1, (heads, -1))
    if past.k is not None and past.v is not None:
        k, v = torch.cat((past.k, k)), torch.cat((past.v, v))  # [p + m, h, s], [p + m, h v]
    tape = MixerTape("latent", _pattern(w, config, layer, q, k), latent=norm, read=_head_gate(w, config, h))
    return Mixed(tape, affine(_mix(w, tape, v.shape[1]), v), Past(k, v))


def _latent_of(
    w: BlockWeights, config: ModelConfig, h: Float[Tensor, "m d"], stem: str = "attn_kv_latent"
) -> tuple[Made, NormTape]:
    """Return the latent vectors from which keys and values are expanded, and their norm."""
    latent = made_by(linear(w, stem, len(h)), h)
    norm = record_norm(w, config, ("attn_kv_a_norm",), latent.value)
    assert norm is not None
    return latent.then(norm.operator()), norm


def _latent_queries(w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], at: Positions) -> Made:
    """Return queries of some positions, in most models expanded from a latent vector too."""
    config, own = frame.config, frame.config.layers[layer]
    expansion = linear(w, "attn_q_b" if "attn_q_b.weight" in w else "attn_q", len(h))
    if "attn_q_a.weight" in w:
        q = made_by(linear(w, "attn_q_a", len(h)), h)
        q = q.then(record_head_norm(w, "attn_q_a_norm", config, q.value)).then(expansion)
    else:
        q = made_by(expansion, h)
    if own.compressed.groups:
        wide = widened(q.value).unflatten(1, (own.heads, -1))
        q = q.then(HeadNorm(inverse_rms(wide, config), None, q.value))
    first = own.key_size - own.latent.rotary
    q = q.then(_rotation(frame, layer, q.value, own.heads, at, first))
    return q.then(_warmth(config, q.value, at))


def _latent_keys(
    w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], latent: Made, at: Positions
) -> Made:
    """Return keys of some positions: expanded from the latent, and a part common to all heads."""
    own, m = frame.config.layers[layer], len(h)
    if "attn_k_nope.weight" in w:
        nope = latent.then(linear(w, "attn_k_nope", m))
    else:  # a stack of transposed matrices, one for each head
        nope = latent.then(Concat(*(linear(w, "attn_k_b", m, expert=i).T for i in range(own.heads))))
    if not own.latent.rotary:
        return nope
    shared = made_by(linear(w, "attn_kv_rope", m), h)  # [m, r]
    if "attn_k_norm.weight" in w:
        shared = shared.then(record_head_norm(w, "attn_k_norm", frame.config, shared.value))
    shared = shared.then(_rotation(frame, layer, shared.value, 1, at))
    shared = shared.then(Repeat(m, own.latent.rotary, 1, own.heads, dtype=h.dtype, device=h.device))
    sides = [part.value.unflatten(1, (own.heads, -1)) for part in (nope, shared)]
    return Made(torch.cat(sides, -1).flatten(1), Concat(nope.operator, shared.operator, heads=own.heads))


def _rotation(
    frame: Frame, layer: int, x: Float[Tensor, "m hs"], heads: int, at: Positions, first: int = 0
) -> Rotate | None:
    """Return the rotation of queries or keys of some positions, if the layer rotates them.

    Dims of each head before the `first` pass through.
    """
    rope = frame.config.layers[layer].rope
    if rope is None:
        return None
    cos, sin = (part[at] for part in frame.rotations[rope])
    return Rotate(rope.pairs, cos, sin, x.shape[1] // heads, heads, first=first)


def _compressed(w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], past: Past | None) -> Mixed:
    """Freeze DeepSeek-V4's attention: its pattern, the norm and rotation of the values, and those of its memory."""
    config, own, past = frame.config, frame.config.layers[layer], past or Past()
    assert own.rope is not None
    angles, start = torch.stack(frame.rotations[own.rope]), past.length  # [2, n, p]
    turn = angles[:, start : start + len(h)]
    keys, norm = _latent_of(w, config, h, "attn_kv")
    v = keys.then(Turn(turn, own.key_size)).value
    v = v if past.v is None else torch.cat((past.v, v))  # [p + m, s]
    rows, memory, remembered = None, None, v[:0]
    if own.compressed.ratio:
        rows = torch.cat([affine(linear(w, f"attn_compressor_{part}", len(h)), h) for part in ("kv", "gate")], 1)
        rows = rows if past.rows is None else torch.cat((past.rows, rows))
        made, gates = rows.chunk(2, 1)
        memory, remembered = record_memory(w, config, layer, made, gates, angles)
    q = _latent_queries(w, frame, layer, h, _following(start, h)).value.unflatten(1, (own.heads, -1))
    pattern = _pattern(w, config, layer, q, v[:, None], remembered[:, None])
    heads = affine(Mix(pattern, 1, own.key_size), torch.cat((v, remembered)))
    pattern, of_groups = pattern.tensor_split([len(v)], 2)
    memory = memory and memory._replace(pattern=of_groups)
    tape = MixerTape("compressed", pattern, latent=norm, turn=turn, memory=memory)
    return Mixed(tape, heads, Past(v[:, None], v, rows))


def _following(start: int, h: Float[Tensor, "m d"]) -> slice:
    """Return the positions of `h`, the first of which is `start`."""
    return slice(start, start + len(h))


def queries(w: BlockWeights, frame: Frame, layer: int, kind: str, h: Float[Tensor, "m d"], at: Positions) -> Made:
    """Return the queries `[m, h s]` of softmax attention at its (normed) input `h` of some positions."""
    return _QUERIES[kind](w, frame, layer, h, at)


def keys(w: BlockWeights, frame: Frame, layer: int, kind: str, h: Float[Tensor, "m d"], at: Positions) -> Made:
    """Return the keys `[m, g s]` that softmax attention makes of its (normed) input `h` of some positions."""
    return _KEYS[kind](w, frame, layer, h, at)


def _expanded_keys(w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], at: Positions) -> Made:
    """Return the keys of latent attention from its input."""
    return _latent_keys(w, frame, layer, h, _latent_of(w, frame.config, h)[0], at)


def _compressed_keys(w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], at: Positions) -> Made:
    """Return the keys of single tokens of DeepSeek-V4's attention, which are their values too."""
    rope = frame.config.layers[layer].rope
    assert rope is not None
    turn = torch.stack(frame.rotations[rope])[:, at]
    made, _ = _latent_of(w, frame.config, h, "attn_kv")
    return made.then(Turn(turn, made.value.shape[1]))


_Scored = Callable[[BlockWeights, Frame, int, Tensor, Positions], Made]
_QUERIES: dict[str, _Scored] = {
    "attention": lambda w, frame, layer, h, at: _queries_or_keys(w, frame, layer, "q", h, at)[0],
    "shared attention": lambda w, frame, layer, h, at: _queries_or_keys(w, frame, layer, "q", h, at)[0],
    "latent": _latent_queries,
    "compressed": _latent_queries,
}
_KEYS: dict[str, _Scored] = {
    "attention": lambda w, frame, layer, h, at: _queries_or_keys(w, frame, layer, "k", h, at)[0],
    "latent": _expanded_keys,
    "compressed": _compressed_keys,
}


# ----------------------------------------------------------------------------------------------------------------------
# Convolutions and recurrences


def _taps(w: BlockWeights, stem: str) -> tuple[Float[Tensor, "c K"], Float[Tensor, " c"] | None]:
    """Return a convolution's taps, the last of which is the current position's, and its bias."""
    taps = w.vector(f"{stem}.weight")  # some files have further axes of length 1
    return taps.reshape(-1, taps.shape[-1]), w.vector(f"{stem}.bias") if f"{stem}.bias" in w else None


def _conv(w: BlockWeights, stem: str, n: int) -> Conv:
    """Return a convolution as an operator."""
    taps, bias = _taps(w, stem)
    return Conv(taps, n, bias)


def _convolved(
    w: BlockWeights, stems: Mapping[str, str], h: Float[Tensor, "m d"], past: Past | None
) -> tuple[list[Float[Tensor, "m _"]], Float[Tensor, "_ all"]]:
    """Return projections of `h` after their convolutions, by projection, and the last inputs of the convolutions."""
    x = torch.cat([affine(linear(w, stem, len(h)), h) for stem in stems], 1)
    return _in_time([_taps(w, stem) for stem in stems.values()], x, past)


def _in_time(
    taps: Sequence[tuple[Tensor, Tensor | None]], x: Float[Tensor, "m all"], past: Past | None
) -> tuple[list[Float[Tensor, "m _"]], Float[Tensor, "_ all"]]:
    """Return the convolutions of several sections of `x`, which continue the past, and the last inputs of them all."""
    weight = torch.cat([weight for weight, _ in taps])  # [c, K]
    bias = torch.cat([weight.new_zeros(len(weight)) if own is None else own for weight, own in taps])
    before = weight.shape[1] - 1
    rows = x.new_zeros(before, x.shape[1]) if past is None or past.rows is None else past.rows
    rows = torch.cat([rows, x])
    found = affine(Conv(weight, len(rows), bias), rows)[before:]
    return list(found.split([len(weight) for weight, _ in taps], 1)), rows[len(rows) - before :].clone()


def _recurrent(
    kind: str, recurrence: Recurrence, v: Float[Tensor, "m hv"], past: Past | None
) -> tuple[MixerTape, Float[Tensor, "m hv"], Float[Tensor, "h s v"] | None]:
    """Return a tape with the pattern of a recurrence, or its scan; the mixed values; and the state after a past."""
    n, heads, s = recurrence.k.shape
    if past is not None:
        values = v.to(recurrence.k).unflatten(1, (heads, -1))
        state = values.new_zeros(heads, s, values.shape[2]) if past.state is None else past.state
        o, state = recurrence.run(values, state)
        return MixerTape(kind), o.flatten(1).to(v), state
    if chunk := scan_chunk(n, s):
        scan = ScanTape(*(part.to(v.dtype) for part in recurrent_scan(recurrence, chunk)))
        return MixerTape(kind, scan=scan), affine(_scan(scan, n, n, v.shape[1]), v), None
    pattern = recurrent_pattern(recurrence).to(v.dtype)
    return MixerTape(kind, pattern), affine(Mix(pattern, heads, v.shape[1] // heads), v), None


def _scan(tape: ScanTape, n: int, m: int, width: int) -> Scan:
    """Return the recurrence of a tape on values of some width."""
    return Scan(tape.within, tape.reading, tape.writing, tape.moving, n, m, value_size=width // len(tape.within))


def _delta(
    w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], past: Past | None, kind: str = "delta"
) -> Mixed:
    """Freeze a gated delta rule, with a decay for each head, or for each key channel as in Kimi's (KDA)."""
    config, own = frame.config, frame.config.recurrence
    stems = {f"attn_{part}": f"ssm_conv1d_{part}" for part in "qkv"}
    (q, k, c), rows = _convolved(w, stems, h, past)

    def keyed(part: Float[Tensor, "m gs"]) -> Float[Tensor, "m h s"]:
        """Return unit queries or keys of every value head."""
        part = widened(part * part.sigmoid()).unflatten(1, (own.key_heads, -1))
        part = part * torch.rsqrt(part.square().sum(-1, keepdim=True) + (config.row.key_epsilon or config.norm_epsilon))
        shared = own.heads // own.key_heads
        return part.repeat(1, shared, 1) if config.row.key_heads_tiled else part.repeat_interleave(shared, 1)

    write = widened(affine(linear(w, "ssm_beta", len(h)), h)).sigmoid()  # [m, h]
    recurrence = Recurrence(keyed(q) * own.key_size**-0.5, keyed(k), _log_decay(w, config, h), write, removes=True)
    share = c.sigmoid()
    tape, o, state = _recurrent(kind, recurrence, c * share, past)
    heads = o.unflatten(1, (own.heads, -1))  # [m, h, v]
    gate = _projected(w, ("attn_gate", "ssm_g", "ssm_g_a", "ssm_g_b"), h).unflatten(1, (own.heads, -1))
    gate = gate.sigmoid() if config.row.sigmoid_gate else gate * gate.sigmoid()
    read = inverse_rms(heads, config) * w.vector("ssm_norm.weight") * gate
    tape = tape._replace(written=Factor(share), read=Factor(read.flatten(1).to(h.dtype)))
    return Mixed(tape, o, Past(rows=rows, state=state), recurrence)


def _log_decay(w: BlockWeights, config: ModelConfig, h: Float[Tensor, "m d"]) -> Float[Tensor, "m h _"]:
    """Return the logarithm of the decay of each head, or of each of its key channels, in float32 at least.

    It is `a softplus(x)` with a negative `a`, or with a lower bound `L` it is `L sigmoid(a x)` with a positive one, or
    `L sigmoid(-a x)`.
    """
    x = widened(_projected(w, ("ssm_alpha", "ssm_f_a", "ssm_f_b"), h))
    x = (x + _bare(w, "ssm_dt.bias", "ssm_dt")).unflatten(1, (config.recurrence.heads, -1))  # [m, h, s] or [m, h, 1]
    a = _bare(w, "ssm_a").reshape(-1, 1)  # [h, 1]
    if bound := config.decay_bound:
        return bound * torch.sigmoid((a if config.row.bounded_decay == "required" else -a) * x)
    return a * softplus(x)


def _lightning(w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], past: Past | None) -> Mixed:
    """Freeze lightning attention: linear attention that fades in each head and block at a rate of its own."""
    config, own = frame.config, frame.config.recurrence
    q, k, c = (affine(linear(w, f"attn_{part}", len(h)), h) for part in "qkv")

    def keyed(part: Float[Tensor, "m hs"]) -> Float[Tensor, "m h s"]:
        return widened(part * part.sigmoid()).unflatten(1, (own.heads, -1))

    share = c.sigmoid()
    log_decay = -_slopes(own.heads, layer, config.block_count).to(keyed(q)).expand(len(h), -1)  # [m, h]
    recurrence = Recurrence(keyed(q), keyed(k), log_decay[..., None], torch.ones_like(log_decay), removes=False)
    tape, o, state = _recurrent("lightning", recurrence, c * share, past)
    gate = affine(linear(w, "attn_gate", len(h)), h).sigmoid()
    read = (inverse_rms(o, config) * w.vector("attn_norm_2.weight") * gate).to(h.dtype)  # normed over all heads
    return Mixed(tape._replace(written=Factor(share), read=Factor(read)), o, Past(state=state), recurrence)


def _slopes(heads: int, layer: int, blocks: int) -> Float[Tensor, " h"]:
    """Return the rates at which lightning attention fades, those of ALiBi (arXiv 2108.12409), less in later blocks."""
    slopes = 2.0 ** (-8 / heads * torch.arange(1, heads + 1, dtype=torch.float64))
    return slopes * (1 - layer / max(1, blocks - 1) + 1e-5)


def _state_space(w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], past: Past | None) -> Mixed:
    """Freeze the selective state space of Mamba-2, or of PLaMo 2, where it has what Mamba-1 makes from the values."""
    config, own = frame.config, frame.config.recurrence
    parts = "x" if own.rank else "xbc"
    (c, *others), rows = _convolved(w, {f"ssm_in_{part}": f"ssm_conv1d_{part}" for part in parts}, h, past)
    share = c.sigmoid()
    if own.rank:
        step, key, query = _from_values(w, config, c * share)
    else:
        step = widened(affine(linear(w, "ssm_in_dt", len(h)), h)) + _bare(w, "ssm_dt.bias")
        key, query = (widened(part * part.sigmoid()) for part in others)

    def keyed(part: Float[Tensor, "m gs"]) -> Float[Tensor, "m h s"]:
        return part.unflatten(1, (own.key_heads, -1)).repeat_interleave(own.heads // own.key_heads, 1)

    step = softplus(step)  # [m, h]
    log_decay = (step * _bare(w, "ssm_a").flatten())[..., None]
    skip = _bare(w, "ssm_d").flatten().expand_as(step)
    recurrence = Recurrence(keyed(query), keyed(key), log_decay, step, removes=False, skip=skip)
    tape, o, state = _recurrent("state space", recurrence, c * share, past)
    gate = affine(linear(w, "ssm_in_z", len(h)), h)
    read = gate * gate.sigmoid()
    if "ssm_norm.weight" in w:  # over each group, after the gate
        groups = (widened(o) * read).unflatten(1, (own.key_heads, -1))
        norm = inverse_rms(groups, config) * w.vector("ssm_norm.weight").reshape(own.key_heads, -1)
        read = (read * norm.flatten(1)).to(o.dtype)
    tape = tape._replace(written=Factor(share), read=Factor(read))
    return Mixed(tape, o, Past(rows=rows, state=state), recurrence)


def _channel_state_space(
    w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], past: Past | None
) -> Mixed:
    """Freeze the selective state space of Mamba-1, with steps for each channel that are made from the values."""
    (c,), rows = _convolved(w, {"ssm_in_x": "ssm_conv1d_x"}, h, past)
    share = c.sigmoid()
    v = c * share
    step, key, query = _from_values(w, frame.config, v)
    tape = ChannelTape(softplus(step), _bare(w, "ssm_a"), key, query, _bare(w, "ssm_d"))
    scan = tape.operator(len(h))
    before = None if past is None else past.state
    o, state = scan.run(v[None], scan.step.new_zeros(1, *scan.rate.shape) if before is None else before[None])
    gate = affine(linear(w, "ssm_in_z", len(h)), h)
    mixer = MixerTape("channel state space", channels=tape, written=Factor(share), read=Factor(gate * gate.sigmoid()))
    return Mixed(mixer, o[0], Past(rows=rows, state=state[0]))


def _from_values(
    w: BlockWeights, config: ModelConfig, v: Float[Tensor, "m c"]
) -> tuple[Float[Tensor, "m h"], Float[Tensor, "m s"], Float[Tensor, "m s"]]:
    """Return what Mamba-1 makes from the values, in float32 at least: steps before their softplus, keys and queries.

    Each of the three may have a norm, with or without weights.
    """
    own, made = config.recurrence, {}
    rows = {"dt": own.rank, "b": own.key_size, "c": own.key_size}
    parts = affine(linear(w, "ssm_x", len(v)), v).split([rows[name] for name in config.row.made_from_values], 1)
    for name, part in zip(config.row.made_from_values, parts, strict=True):
        norm = record_norm(w, config, (f"ssm_{name}_norm",), part)
        if norm is None and own.normed:
            norm = frozen_norm(config, None, None, part)
        made[name] = part if norm is None else norm.apply(part)
    return widened(affine(linear(w, "ssm_dt", len(v)), made["dt"])), widened(made["b"]), widened(made["c"])


# Added inside the root of the norm of each head of RWKV.
_WKV_EPSILON = 64e-5


def _rwkv6(w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], past: Past | None) -> Mixed:
    """Freeze the time mixing of RWKV-6; without `time_mix_first` it is gated linear attention, as in QRWKV-6.

    How much of the position before each of five projections reads depends on the position: decays (w), keys, values,
    receptances (queries), and gates.
    """
    own, m = frame.config.recurrence, len(h)
    away = before(h, past and past.rows) - h
    lerp = [w.vector(f"time_mix_lerp_{name}.weight").flatten() for name in "wkvrg"]
    parts = affine(linear(w, "time_mix_w1", m), h + away * w.vector("time_mix_lerp_x.weight")).tanh().chunk(5, 1)
    shares = [affine(linear(w, "time_mix_w2", m, expert=i), part) + lerp[i] for i, part in enumerate(parts)]
    x = {name: h + away * share for name, share in zip("wkvrg", shares, strict=True)}

    def projected(stem: str, name: str) -> Float[Tensor, "m h s"]:
        part = affine(linear(w, f"time_mix_{stem}", m), x[name]).unflatten(1, (-1, own.key_size))
        return part.repeat_interleave(own.heads // part.shape[1], 1)

    r, k = widened(projected("receptance", "r")), widened(projected("key", "k"))
    v = projected("value", "v").flatten(1)
    decay = affine(linear(w, "time_mix_decay_w2", m), affine(linear(w, "time_mix_decay_w1", m), x["w"]).tanh())
    log_decay = -torch.exp(widened(decay) + _bare(w, "time_mix_decay.weight")).unflatten(1, (own.heads, -1))
    gate, write = affine(linear(w, "time_mix_gate", m), x["g"]), r.new_ones(r.shape[:2])
    if "time_mix_first.weight" in w:
        skip = (r * k * _bare(w, "time_mix_first.weight")).sum(-1)
        recurrence = Recurrence(r, k, log_decay, write, removes=False, skip=skip, before=True)
        read = gate * gate.sigmoid()
    else:
        k = k * -torch.expm1(log_decay)
        recurrence = Recurrence(r * own.key_size**-0.5, k, log_decay, write, removes=False)
        read = gate.sigmoid()
    tape, o, state = _recurrent("rwkv6", recurrence, v, past)
    normed, o = _normed_heads(w, frame.config, o)
    tape = tape._replace(shift=shares[2], normed=normed, read=Factor(read))
    return Mixed(tape, o, Past(rows=h[-1:].clone(), state=state), recurrence)


def _rwkv7(w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], past: Past | None) -> Mixed:
    """Freeze the time mixing of RWKV-7. Blocks after the first add a share of its values to a share of their own."""
    own, m = frame.config.recurrence, len(h)
    lerp = w.vector("time_mix_lerp_fused.weight")
    shares = lerp.reshape(-1, lerp.shape[-1])
    away = before(h, past and past.rows) - h
    x = {name: h + away * share for name, share in zip("rwkvag", shares, strict=False)}

    def made(name: str, inner: Callable[[Tensor], Tensor] = lambda part: part) -> Float[Tensor, "m d"]:
        """Return a vector in two steps, in float32 at least."""
        return widened(
            affine(linear(w, f"time_mix_{name}2", m), inner(affine(linear(w, f"time_mix_{name}1", m), x[name])))
        )

    def by_head(part: Float[Tensor, "m d"]) -> Float[Tensor, "m h s"]:
        return part.unflatten(1, (own.heads, -1))

    r, k = (widened(affine(linear(w, f"time_mix_{stem}", m), x[stem[0]])) for stem in ("receptance", "key"))
    v = first = affine(linear(w, "time_mix_value", m), x["v"])
    rate = torch.sigmoid(made("a") + _bare(w, "time_mix_a0.weight"))
    log_decay = -0.606531 * torch.sigmoid(made("w", torch.tanh) + _bare(w, "time_mix_w0.weight"))
    take = torch.nn.functional.normalize(by_head(k * _bare(w, "time_mix_k_k.weight")), dim=-1)
    k = k * (1 + (rate - 1) * _bare(w, "time_mix_k_a.weight"))
    beside = by_head(r * k * _bare(w, "time_mix_r_k.weight")).sum(-1, keepdim=True).expand(-1, -1, own.value_size)
    written = carried = None
    if frame.values is not None:
        share = torch.sigmoid(made("v") + _bare(w, "time_mix_v0.weight")).to(v.dtype)
        written, carried = Factor(1 - share), Factor(share)
        v = (1 - share) * v + share * frame.values
    recurrence = Recurrence(
        by_head(r), by_head(k), by_head(log_decay), r.new_ones(m, own.heads), removes=False, take=take,
        put=take * by_head(rate),
    )  # fmt: skip
    tape, o, state = _recurrent("rwkv7", recurrence, v, past)
    normed, o = _normed_heads(w, frame.config, o)
    bonus = Factor(beside.flatten(1).to(v.dtype))
    o = o + bonus.diagonal * v
    gate = Factor(made("g", torch.sigmoid).to(v.dtype)) if "time_mix_g2.weight" in w else None
    tape = tape._replace(
        shift=shares[3].expand_as(h), written=written, carried=carried, normed=normed, beside=bonus, read=gate,
        shared=0 if carried is None else v.shape[1],
    )  # fmt: skip
    values = first if layer in frame.config.writers else None
    return Mixed(tape, o, Past(v=values, rows=h[-1:].clone(), state=state), recurrence)


def _normed_heads(
    w: BlockWeights, config: ModelConfig, o: Float[Tensor, "m hv"]
) -> tuple[Factor | None, Float[Tensor, "m hv"]]:
    """Return the factor of the LayerNorm of each head of RWKV, and what is normed; the model may have none."""
    if "time_mix_ln.weight" not in w or "time_mix_ln.bias" not in w:
        return None, o
    heads = widened(o).unflatten(1, (config.recurrence.heads, -1))
    heads = heads - heads.mean(-1, keepdim=True)
    scale = inverse_rms(heads, config, _WKV_EPSILON).expand_as(heads).flatten(1)
    weight, bias = (w.vector(f"time_mix_ln.{part}") for part in ("weight", "bias"))
    factor = Factor((scale * weight.to(scale)).to(o.dtype), bias.expand_as(o))
    return factor, factor.diagonal * heads.flatten(1).to(o.dtype) + bias


def _convolution(w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], past: Past | None) -> Mixed:
    """Freeze a short convolution between two gates; of its three factors the input stays live."""
    b, c, x = (affine(linear(w, f"shortconv.in_proj_{part}", len(h)), h) for part in "bcx")
    (heads,), rows = _in_time([_taps(w, "shortconv.conv")], b * x, past)
    return Mixed(MixerTape("convolution", entering=Factor(b), read=Factor(c)), heads, Past(rows=rows))


def _linear(w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], past: Past | None) -> Mixed:
    """Freeze nothing: what stands in place of attention is its output projection of the normed input."""
    return Mixed(MixerTape("linear"), h, Past())


def _projected(w: BlockWeights, stems: Sequence[str], h: Float[Tensor, "m d"]) -> Float[Tensor, "m e"]:
    """Return `h` through those of the projections that the file has, one after the other."""
    for stem in stems:
        if f"{stem}.weight" in w:
            h = affine(linear(w, stem, len(h)), h)
    return h


def _bare(w: BlockWeights, *names: str) -> Tensor:
    """Return the first of some small tensors that the file has, in float32 at least."""
    return w.wide_vector(next(name for name in names if name in w))


RECORD: dict[str, Record] = {
    "attention": _attention,
    "latent": _latent,
    "compressed": _compressed,
    "shared attention": _shared_attention,
    "delta": _delta,
    "kimi delta": partial(_delta, kind="kimi delta"),
    "state space": _state_space,
    "channel state space": _channel_state_space,
    "rwkv6": _rwkv6,
    "rwkv7": _rwkv7,
    "lightning": _lightning,
    "convolution": _convolution,
    "linear": _linear,
}
