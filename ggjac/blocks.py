"""A transformer block at one prompt: its frozen quantities (a tape), and the linear operator that remains.

    attn  = norm_out @ Linear(attn_output) @ Mix(pattern) @ Linear(attn_v) @ norm_in
    ffn   = norm_out @ Linear(ffn_down) @ Scale(gate) @ Linear(ffn_up) @ norm_in
    block = (I + ffn) @ (I + attn)

A quantity is *frozen* if it is held at its value at the prompt, and *live* if it is not frozen: the operators are
linear in their live inputs, and apply live weights. Norms are frozen diagonals (LayerNorm's centring and bias stay
live), queries and keys act through the frozen attention pattern only, and in a mixture of experts the choice and the
weights are frozen. The freezing rule is that of Golden, arXiv 2505.24293, section 2.3 (*Large Language Models are
Locally Linear Mappings*; version 3, TMLR, October 2025: *Equivalent Linear Mappings of Large Language Models*). For
gated feed-forwards there are two conventions; see `record_hidden`. Differences between families come from
`ggjac.config` or from the presence of a tensor.

Each branch is recorded at its own input, and the forward pass is the recorded operator applied to that input. Tensors
keep GGUF's names, without the `blk.N.` prefix.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ggjac.config import ModelConfig, Rope
from ggjac.linop import (
    Center,
    Experts,
    Homogeneous,
    Identity,
    Linear,
    LinearOperator,
    Mix,
    Scale,
    Select,
    Sum,
    TiledMatrix,
)
from ggjac.rope import rotate
from ggjac.sizes import SLAB, MlpPath


@runtime_checkable
class WeightMatrix(TiledMatrix, Protocol):
    """A streamed matrix with access to some of its rows or columns."""

    def rows(self, start: int, stop: int) -> "WeightMatrix":
        """Return rows `start:stop`."""

    def columns(self, start: int, stop: int) -> "WeightMatrix":
        """Return columns `start:stop`; both must be boundaries of quantization blocks."""


@runtime_checkable
class BlockWeights(Protocol):
    """The tensors of one block by their short names, such as `attn_q.weight`."""

    def __contains__(self, name: str) -> bool:
        """Return whether the file has the tensor."""

    def matrix(self, name: str, expert: int | None = None) -> WeightMatrix:
        """Return a streamed matrix; from a stack of experts, that of one expert."""

    def vector(self, name: str, expert: int | None = None) -> Tensor:
        """Return a small dense tensor; from a stack of experts, the row of one expert."""

    def wide_vector(self, name: str) -> Tensor:
        """Return a small dense tensor in float32 at least, also where computation is in a narrower dtype."""


class NumericsError(ValueError):
    """The forward pass left the range of its dtype; results computed from it would be meaningless."""


def overflow(place: str, dtype: torch.dtype) -> NumericsError:
    """Return the error about numbers of a dtype that are not finite, at some place in the forward pass."""
    wider = "float32" if dtype.itemsize == 2 else "float64"
    advice = f"try --dtype {wider}. If it persists, the file may be damaged"
    name = str(dtype).removeprefix("torch.")
    return NumericsError(f"{place} overflowed {name}; {'the file may be damaged' if name == wider else advice}")


class Activation(NamedTuple):
    """A gate's nonlinearity, written `a(g) = g * share(g)`, so that either factor can be frozen.

    With a `limit`, `g` is clamped from above and `up` from both sides; `shift` is added to `up`.
    """

    share: Callable[[Tensor], Tensor]
    limit: float | None = None
    shift: float = 0.0


def gelu_share(g: Tensor) -> Tensor:
    """Return GELU's factor in its tanh form, `(1 + tanh(√(2/π) (g + 0.044715 g³))) / 2`, which all GGUF files use."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))


def gelu_table_share(g: Tensor) -> Tensor:
    """Return the factor of ggml's GELU on the CPU: a table of half-precision inputs and outputs (ggml-cpu/vec.h)."""
    rounded = g.half().to(g.dtype)
    value = (rounded * gelu_share(rounded)).half().to(g.dtype)
    value = torch.where(g <= -10, 0, torch.where(g >= 10, g, value))
    return torch.where(g == 0, 0.5, value / g)


def xielu_share(z: Tensor, alpha_n: float, alpha_p: float, beta: float) -> Tensor:
    """Return xIELU's factor, which is β at 0; see `ggjac.config.Layer`."""

    def growth(z: Tensor) -> Tensor:
        z = z.clamp(max=-torch.finfo(z.dtype).tiny)  # the limit at 0 is 1, but 0 / 0 is NaN
        return torch.expm1(z) / z

    return torch.add(alpha_n * growth(z) + (beta - alpha_n), z.clamp(min=0), alpha=alpha_p)


def activation(config: ModelConfig, layer: int, *, table: bool = False) -> Activation:
    """Return the activation of a block's feed-forward; with `table`, GELU is that of ggml on the CPU."""
    name, constants = config.row.activation, config.layers[layer].xielu
    if constants:
        return Activation(lambda z: xielu_share(z, *constants))
    return ACTIVATIONS["gelu table" if table and name == "gelu" else name]


ACTIVATIONS = {
    "silu": Activation(torch.sigmoid),
    "gelu": Activation(gelu_share),
    "relu2": Activation(torch.relu),
    "gelu table": Activation(gelu_table_share),
    "silu_oai": Activation(lambda g: torch.sigmoid(1.702 * g), limit=7.0, shift=1.0),
}


# Expert scores of router logits `[n, e]`. With `softmax_selected`, the softmax is over the chosen experts and is taken
# after the choice.
ROUTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "softmax_selected": lambda logits: logits,
    "sigmoid": torch.sigmoid,
}


class Frame(NamedTuple):
    """Settings and tables shared by all blocks at one prompt.

    Attributes:
        config: sizes and constants.
        rotations: cos and sin at every position, for each rotary embedding in use.
        mlp_path: the freezing rule of gated feed-forwards.
        activations: the activation of each block's feed-forward.
    """

    config: ModelConfig
    rotations: Mapping[Rope, tuple[Tensor, Tensor]]
    mlp_path: MlpPath
    activations: Sequence[Activation]


class NormTape(NamedTuple):
    """A norm at one input: the scale of each position, the norm's weight, and LayerNorm's centring and bias.

    `scale` is `1 / rms`, in float32 at least.
    """

    scale: Float[Tensor, "n 1"]
    weight: Float[Tensor, " d"]
    centred: bool
    bias: Float[Tensor, " d"] | None

    def at(self, positions: slice) -> "NormTape":
        """Return the tape of some positions."""
        return self._replace(scale=self.scale[positions])

    def apply(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return the norm of `x`."""
        return _affine(self.operator(), x)

    def operator(self) -> LinearOperator:
        """Return the frozen norm, `[n, d]` to `[n, d]`."""
        scale = Scale((self.scale * self.weight.to(self.scale)).to(self.weight), self.bias)  # [n, 1] * [d] -> [n, d]
        if not self.centred:
            return scale
        return scale @ Center(scale.in_shape, dtype=scale.dtype, device=scale.device)


class AttentionTape(NamedTuple):
    """The frozen quantities of an attention branch.

    Attributes:
        norm_in: the norm before it, or None.
        pattern: attention probabilities, from `n` key to `m` query positions.
        norm_out: the norm after it, or None.
        passed: where values are clamped, 1 for each value within the limits and 0 for the others.
        limits: the limit in place of each value beyond the limits, 0 for the others.
    """

    norm_in: NormTape | None
    pattern: Float[Tensor, "h m n"]
    norm_out: NormTape | None
    passed: Float[Tensor, "n gs"] | None = None
    limits: Float[Tensor, "n gs"] | None = None

    def at(self, queries: slice) -> "AttentionTape":
        """Return the tape of some query positions, and of the key positions up to the last of them."""
        return AttentionTape(
            self.norm_in and self.norm_in.at(slice(queries.stop)),
            self.pattern[:, queries, : queries.stop],
            self.norm_out and self.norm_out.at(queries),
            None if self.passed is None else self.passed[: queries.stop],
            None if self.limits is None else self.limits[: queries.stop],
        )


class HiddenTape(NamedTuple):
    """The frozen quantities of one feed-forward network: the factor on each hidden unit, and where the network is used.

    Attributes:
        kind: suffix of its tensors' names: none, `_exps` for a routed expert, `_shexp` for the shared one.
        expert: index in the stack of experts, or None.
        live: stem of the live projection, `ffn_up` or `ffn_gate`.
        factor: `[m, f]`, multiplies the live projection.
        constant: `[m, f]`, added to the product by a clamp or shift, or None.
        positions: `[m]`, the positions that use a routed expert; None for all.
        weight: `[m]`, the router's weight of its output, or None for 1.
    """

    kind: str
    expert: int | None
    live: str
    factor: Float[Tensor, "m f"]
    constant: Float[Tensor, "m f"] | None
    positions: Int[Tensor, " m"] | None
    weight: Float[Tensor, " m"] | None

    def at(self, queries: slice) -> "HiddenTape":
        """Return the tape of some positions, which are counted from the first of them."""
        rows: slice | Tensor = queries
        positions = self.positions
        if positions is not None:
            inside = (positions >= queries.start) & (positions < queries.stop)
            if queries.start == 0 and inside.all():
                return self  # all of them: no copy
            rows, positions = inside, positions[inside] - queries.start
        return self._replace(
            factor=self.factor[rows],
            constant=None if self.constant is None else self.constant[rows],
            positions=positions,
            weight=None if self.weight is None else self.weight[rows],
        )


class FFNTape(NamedTuple):
    """The frozen quantities of a feed-forward branch: its networks (several in a mixture of experts), and its norms."""

    norm_in: NormTape | None
    networks: tuple[HiddenTape, ...]
    norm_out: NormTape | None

    def at(self, queries: slice) -> "FFNTape":
        """Return the tape of some positions, without the experts that none of them uses."""
        networks = (network.at(queries) for network in self.networks)
        return FFNTape(
            self.norm_in and self.norm_in.at(queries),
            tuple(network for network in networks if len(network.factor)),
            self.norm_out and self.norm_out.at(queries),
        )


class BlockTape(NamedTuple):
    """All frozen quantities of one block, and the residual stream at its input."""

    x: Float[Tensor, "n d"]
    attn: AttentionTape
    ffn: FFNTape


Tape = TypeVar("Tape", AttentionTape, FFNTape)


class Recorded(NamedTuple, Generic[Tape]):
    """A recorded branch.

    Attributes:
        tape: its frozen quantities.
        raw: its output before post-norm and scale (llama.cpp's `attn_out` and `ffn_out`).
        added: what it adds to the residual stream.
    """

    tape: Tape
    raw: Float[Tensor, "n d"]
    added: Float[Tensor, "n d"]


class RecordedBlock(NamedTuple):
    """A recorded block: both branches, and the residual stream after it."""

    attn: Recorded[AttentionTape]
    ffn: Recorded[FFNTape]
    out: Float[Tensor, "n d"]


class Past(NamedTuple):
    """What attention at later positions needs of the `p` positions before them: rotated keys, and values."""

    k: Float[Tensor, "p g s"]
    v: Float[Tensor, "p gs"]


def record_block(w: BlockWeights, frame: Frame, layer: int, x: Float[Tensor, "n d"]) -> RecordedBlock:
    """Freeze a block at its input `x`."""
    attn = record_attention(w, frame, layer, x)
    ffn, out = record_rest(w, frame, layer, x, attn.added)
    return RecordedBlock(attn, ffn, out)


def extend_block(
    w: BlockWeights, frame: Frame, layer: int, x: Float[Tensor, "m d"], past: Past | None
) -> tuple[Float[Tensor, "m d"], Past]:
    """Return the residual stream after a block at `m` positions that follow `past`, and the longer past.

    `record_block` without tapes: the same operators, but nothing is computed again at positions of the past (None:
    there are none).
    """
    added, past = _extend_attention(w, frame, layer, x, past)
    return record_rest(w, frame, layer, x, added)[1], past


def record_rest(
    w: BlockWeights, frame: Frame, layer: int, x: Float[Tensor, "n d"], attn: Float[Tensor, "n d"]
) -> tuple[Recorded[FFNTape], Float[Tensor, "n d"]]:
    """Freeze the feed-forward of a block whose attention adds `attn`; return it, and the stream after the block."""
    middle = x + attn
    ffn = record_ffn(w, frame, layer, x if frame.config.row.parallel else middle)
    return ffn, middle + ffn.added


def record_attention(w: BlockWeights, frame: Frame, layer: int, x: Float[Tensor, "n d"]) -> Recorded[AttentionTape]:
    """Freeze the attention branch at its input `x`."""
    config, norms = frame.config, frame.config.row.norms
    norm_in, h = _normed_input(w, config, norms.attention_in, x)
    q, k = _queries_keys(w, frame, layer, h)  # [n, h, s], [n, g, s]
    tape = AttentionTape(norm_in, _pattern(w, config, layer, q, k), None)
    if limit := config.attention_clamp:
        v = _affine(_linear(w, "attn_v", len(x)), h)
        clamped = v.clamp(-limit, limit)
        passed = v == clamped
        tape = tape._replace(passed=passed.to(v), limits=torch.where(passed, 0, clamped))
    raw = _affine(_attention_inner(w, config, tape), x)
    norm_out, added = _normed_output(w, config, norms.attention_out, raw)
    return Recorded(tape._replace(norm_out=norm_out), raw, added)


def _extend_attention(
    w: BlockWeights, frame: Frame, layer: int, x: Float[Tensor, "m d"], past: Past | None
) -> tuple[Float[Tensor, "m d"], Past]:
    """Return what attention adds at `m` positions that follow `past` (None: there are none), and the longer past."""
    config, norms = frame.config, frame.config.row.norms
    _, h = _normed_input(w, config, norms.attention_in, x)
    q, k = _queries_keys(w, frame, layer, h, 0 if past is None else len(past.k))
    v = _clamped(config, _affine(_linear(w, "attn_v", len(x)), h))
    if past is not None:
        k, v = torch.cat((past.k, k)), torch.cat((past.v, v))  # [p + m, g, s], [p + m, gs]
    mix = Mix(_pattern(w, config, layer, q, k), config.head_count_kv, config.head_size)
    raw = _affine(_linear(w, "attn_output", len(x)), _affine(mix, v))
    return _normed_output(w, config, norms.attention_out, raw)[1], Past(k, v)


def record_ffn(w: BlockWeights, frame: Frame, layer: int, x: Float[Tensor, "n d"]) -> Recorded[FFNTape]:
    """Freeze the feed-forward branch at its input `x`."""
    config, norms = frame.config, frame.config.row.norms
    norm_in, h = _normed_input(w, config, norms.ffn_in, x)
    routed = "ffn_gate_inp.weight" in w
    networks = record_experts(w, frame, layer, h) if routed else [record_hidden(w, frame, layer, h)]
    tape = FFNTape(norm_in, tuple(networks), None)
    raw = _affine(_ffn_inner(w, tape, *x.shape), x)
    norm_out, added = _normed_output(w, config, norms.ffn_out, raw)
    return Recorded(tape._replace(norm_out=norm_out), raw, added)


def record_hidden(
    w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], kind: str = "", expert: int | None = None
) -> HiddenTape:
    """Freeze one feed-forward network at its (normed) input `h`.

    A gated network is `down(a(gate) * up)`, and either factor can be live. With `mlp_path="up"` the whole activated
    gate is frozen and `up` is live (the paper's code for five families). With `"gate"`, `up` and the sigmoid-like share
    inside `a` are frozen and `gate` is live (the paper's code for Phi). Both reproduce the output; their operators
    differ. For a network without a gate, `down(a(up))`, there is one rule: the share of `a` is frozen.
    """

    def projected(stem: str) -> Tensor:
        return _affine(_linear(w, stem, len(h), kind, expert), h)

    share, limit, shift = frame.activations[layer]
    if f"ffn_gate{kind}.weight" not in w:
        return HiddenTape(kind, expert, "ffn_up", share(projected("ffn_up")), None, None, None)
    if frame.mlp_path == "up" and limit is None:
        gate = projected("ffn_gate")
        return HiddenTape(kind, expert, "ffn_up", gate * share(gate), None, None, None)

    gate, up = projected("ffn_gate"), projected("ffn_up")
    # A clamp is linear too once frozen: 1 or 0 on its input, plus the limit where it acts.
    gate_clamped = gate if limit is None else gate.clamp(max=limit)
    up_clamped = up if limit is None else up.clamp(-limit, limit)
    if frame.mlp_path == "up":
        factor, live, clamped = gate_clamped * share(gate_clamped), up, up_clamped
    else:
        factor, live, clamped = share(gate_clamped) * (up_clamped + shift), gate, gate_clamped
        shift = 0.0  # it is part of the factor
    free = live == clamped  # [m, f]
    constant = None if limit is None else factor * (torch.where(free, 0, clamped) + shift)
    return HiddenTape(kind, expert, f"ffn_{frame.mlp_path}", factor * free, constant, None, None)


def record_experts(w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "n d"]) -> list[HiddenTape]:
    """Freeze a mixture of experts: the experts that each position uses, their weights, and the tape of each expert.

    Only experts that some position uses are read, here and in every product.
    """
    config = frame.config
    logits = _affine(_linear(w, "ffn_gate_inp", len(h)), h)
    scores = ROUTERS[config.row.router](logits.to(torch.promote_types(h.dtype, torch.float32)))  # [n, e]
    chosen = _chosen(w, config, scores.detach())
    weights = scores.gather(-1, chosen)  # [n, used]
    if config.row.router == "softmax_selected":
        weights = weights.softmax(-1)
    if config.row.renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(2.0**-14)  # llama.cpp's floor: F16's smallest
    weights = weights * config.expert_weights_scale

    networks = []
    for expert in chosen.unique().tolist():
        positions, slot = (chosen == expert).nonzero(as_tuple=True)  # [m] each
        tape = record_hidden(w, frame, layer, h[positions], "_exps", expert)
        networks.append(tape._replace(positions=positions, weight=weights[positions, slot].to(h.dtype)))
    if "ffn_up_shexp.weight" in w:
        shared = record_hidden(w, frame, layer, h, "_shexp")
        if "ffn_gate_inp_shexp.weight" in w:
            shared = shared._replace(weight=(h @ w.vector("ffn_gate_inp_shexp.weight")).sigmoid())  # [n]
        networks.append(shared)
    return networks


def _chosen(w: BlockWeights, config: ModelConfig, scores: Float[Tensor, "n e"]) -> Int[Tensor, "n used"]:
    """Return the experts of each position: those of highest score plus bias, within the best groups if there are any.

    A group is as good as the sum of its two best members. The bias is not rounded to a narrower dtype, since the part
    of it that is common to all experts may exceed the differences between them.
    """
    if "exp_probs_b.bias" in w:
        scores = scores + w.wide_vector("exp_probs_b.bias")
    if config.expert_groups > 1:
        grouped = scores.unflatten(-1, (config.expert_groups, -1))  # [n, groups, e / groups]
        best = grouped.topk(2).values.sum(-1).topk(config.expert_groups_used).indices
        left_out = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter(-1, best, False)
        scores = grouped.masked_fill(left_out[..., None], -torch.inf).flatten(1)
    return scores.topk(config.expert_used_count).indices


def attention(w: BlockWeights, config: ModelConfig, tape: AttentionTape) -> LinearOperator:
    """Return the attention branch, `[n, d]` to `[m, d]` for a pattern with `m` query and `n` key positions."""
    heads, output = attention_halves(w, config, tape)
    return output @ heads


def attention_halves(
    w: BlockWeights, config: ModelConfig, tape: AttentionTape
) -> tuple[LinearOperator, LinearOperator]:
    """Return the attention branch in two: `[n, d]` to the heads' outputs `[m, h s]`, and from there to `[m, d]`."""
    return _heads(w, config, tape), _after(config, tape.norm_out, _linear(w, "attn_output", tape.pattern.shape[1]))


def ffn(w: BlockWeights, config: ModelConfig, tape: FFNTape, n: int) -> LinearOperator:
    """Return the feed-forward branch, `[n, d]` to `[n, d]`."""
    return _after(config, tape.norm_out, _ffn_inner(w, tape, n, config.d))


class FrozenBlock(NamedTuple):
    """A block's branches as operators: `(I + ffn) @ (I + attn)`, or `I + ffn + attn` where both read its input.

    A product goes through the block in two steps, one for each branch: maps may end between them, so that vectors leave
    on the way up and join on the way down. Sums are taken in place, as stacks of vectors may be large.

    Attributes:
        attn: the attention branch, from the `n` positions that are read to the `m` that are written.
        ffn: the feed-forward branch, at the written positions.
        residual: the residual connection: identity, or a selection where fewer positions are written than read.
        parallel: whether both branches read the block's input.
    """

    attn: LinearOperator
    ffn: LinearOperator
    residual: LinearOperator
    parallel: bool

    def matmat(self, H: Float[Tensor, "k n d"], t: Homogeneous = None) -> Float[Tensor, "k m d"]:
        """Return the residual stream after the block for `k` stacked streams before it."""
        H, added = self.matmat_attn(H, t)
        H, added = self.matmat_ffn(H, added, t)
        return added.add_(H)

    def matmat_attn(
        self, H: Float[Tensor, "k n d"], t: Homogeneous = None
    ) -> tuple[Float[Tensor, "k m d"], Float[Tensor, "k m d"]]:
        """Return, at the written positions, the stream `[k, m, d]` and what attention adds to it."""
        added = self.attn.matmat(H, t)
        return self.residual.matmat(H), added

    def matmat_ffn(
        self, H: Float[Tensor, "k m d"], attn: Float[Tensor, "k m d"], t: Homogeneous = None
    ) -> tuple[Float[Tensor, "k m d"], Float[Tensor, "k m d"]]:
        """Return the stream after attention `[k, m, d]`, in place of `attn`, and what the feed-forward adds to it."""
        middle = attn.add_(H)
        return middle, self.ffn.matmat(H if self.parallel else middle, t)

    def rmatmat_ffn(
        self, H: Float[Tensor, "k m d"], ffn: Float[Tensor, "kl m d"]
    ) -> tuple[Float[Tensor, "kl m d"], Float[Tensor, "kl m d"]]:
        """Return the cotangents of the stream after attention, and of what attention adds: `matmat_ffn` transposed.

        Args:
            H: `[k, m, d]`, cotangents of the stream after the block.
            ffn: `[k + l, m, d]`, of what the feed-forward adds: `H`, and those of `l` maps that end there.

        Returns:
            Both `[k + l, m, d]`. They are one tensor unless the branches are parallel.
        """
        middle = self.ffn.rmatmat(ffn)
        middle[: len(H)] += H
        if not self.parallel:
            return middle, middle
        ended = len(ffn) - len(H)
        return middle, torch.cat([H, H.new_zeros(ended, *H.shape[1:])]) if ended else H

    def rmatmat_attn(self, H: Float[Tensor, "k m d"], attn: Float[Tensor, "kl m d"]) -> Float[Tensor, "kl n d"]:
        """Return the cotangents of the stream before the block, `[k + l, n, d]`: `matmat_attn` transposed.

        Args:
            H: `[k, m, d]`, cotangents of the stream after attention.
            attn: `[k + l, m, d]`, of what attention adds: those from above, and those of `l` maps that end there.
        """
        X = self.attn.rmatmat(attn)
        X[: len(H)] += self.residual.rmatmat(H)
        return X

    @property
    def flop(self) -> int:
        """Floating-point operations of one product with one vector."""
        return self.attn.flop + self.ffn.flop

    def read_ahead(self) -> None:
        """Prefetch the weights of both branches from the disk."""
        self.attn.read_ahead()
        self.ffn.read_ahead()


def block(w: BlockWeights, config: ModelConfig, tape: BlockTape, positions: range) -> FrozenBlock:
    """Return a frozen block that reads all positions up to the last of `positions`, and writes `positions`.

    Later positions are left out, since attention is causal. Where `positions` are few (the last block needs only one),
    only keys and values are computed at the others.
    """
    n, m, d = positions.stop, len(positions), config.d
    queries = slice(positions.start, positions.stop)
    attn = attention(w, config, tape.attn.at(queries))
    feed_forward = ffn(w, config, tape.ffn.at(queries), m)
    residual: LinearOperator = Identity((m, d), dtype=attn.dtype, device=attn.device)
    if m < n:
        residual = Select(torch.tensor(positions), n, d, dtype=attn.dtype, device=attn.device)
    return FrozenBlock(attn, feed_forward, residual, config.row.parallel)


def record_norm(w: BlockWeights, config: ModelConfig, names: Sequence[str], x: Float[Tensor, "n d"]) -> NormTape | None:
    """Freeze a norm at its input, or return None where the block has no such norm; see `frozen_norm`."""
    if config.row.norm == "bare":
        return frozen_norm(config, None, None, x) if names else None
    name = next((name for name in names if f"{name}.weight" in w), None)
    if name is None:
        return None
    bias = w.vector(f"{name}.bias") if f"{name}.bias" in w else None
    return frozen_norm(config, w.vector(f"{name}.weight"), bias, x)


def frozen_norm(
    config: ModelConfig, weight: Float[Tensor, " d"] | None, bias: Float[Tensor, " d"] | None, x: Float[Tensor, "n d"]
) -> NormTape:
    """Freeze the scale `1 / sqrt(mean(x²) + epsilon)` of RMSNorm or LayerNorm at `x`; LayerNorm's centring stays live.

    A missing weight counts as ones. Squares are summed in float32 at least.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = config.row.norm != "rms"
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    return NormTape(_inverse_rms(wide, config), x.new_ones(config.d) if weight is None else weight, centred, bias)


def attention_pattern(
    q: Float[Tensor, "m h s"],
    k: Float[Tensor, "n g s"],
    scale: float,
    *,
    softcap: float = 0.0,
    window: int | None = None,
    sinks: Float[Tensor, " h"] | None = None,
) -> Float[Tensor, "h m n"]:
    """Return causal attention probabilities of the last `m` of `n` positions; softmax in float32 at least.

    `h` query heads share `g` key heads. A window includes the position itself. A sink is a logit that takes part in the
    softmax but has no value, so that the probabilities of positions sum to less than one.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (k.shape[1], -1))  # [m, g, h / g, s]
    # Widened before the product: 16-bit scores would be rounded again, and can overflow float16.
    scores = torch.einsum("mghs,ngs->ghmn", grouped.to(wide) * scale, k.to(wide)).flatten(0, 1)  # [h, m, n]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    first = len(k) - len(q)
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(first + 1)  # [m, n]
    if window is not None:
        hidden = hidden | torch.ones_like(hidden).tril(first - window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(wide)[:, None, None].expand(-1, len(q), 1)), -1)  # [h, m, n + 1]
    return scores.softmax(-1)[..., : len(k)].to(q.dtype)


# The step after which queries and keys are normed, by the row's `qk_norm`: over the whole projection, over each head,
# or over each head after the rotary embedding.
QK_NORM_AFTER = {"": "", "full": "projection", "head": "split", "heads": "split", "rotated": "rotation"}


def _queries_keys(
    w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], start: int = 0
) -> tuple[Float[Tensor, "m h s"], Float[Tensor, "m g s"]]:
    """Return the queries and keys of positions `start`, `start + 1`, ... from their normed input `h`."""
    config, own = frame.config, frame.config.layers[layer]

    def normed_after(step: str, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if QK_NORM_AFTER[config.row.qk_norm] != step:
            return q, k
        return _normed(w, "attn_q_norm", config, q), _normed(w, "attn_k_norm", config, k)

    q, k = (_clamped(config, _affine(_linear(w, stem, len(h)), h)) for stem in ("attn_q", "attn_k"))  # [m, hs], [m, gs]
    q, k = normed_after("projection", q, k)
    q, k = q.unflatten(1, (config.head_count, -1)), k.unflatten(1, (config.head_count_kv, -1))  # [m, h, s], [m, g, s]
    q, k = normed_after("split", q, k)
    if own.rope:
        cos, sin = (part[start : start + len(h)] for part in frame.rotations[own.rope])
        q, k = (rotate(part, own.rope, cos, sin) for part in (q, k))
    q, k = normed_after("rotation", q, k)
    if config.temperature_scale:
        # In Llama 4 and Ministral 3, queries grow with the logarithm of their position in original contexts.
        positions = torch.arange(start, start + len(h), dtype=torch.float64)
        periods = positions.div(config.original_context, rounding_mode="floor")
        q = q * (1 + config.temperature_scale * torch.log1p(periods)).to(q)[:, None, None]
    return q, k


def _pattern(
    w: BlockWeights, config: ModelConfig, layer: int, q: Float[Tensor, "m h s"], k: Float[Tensor, "n g s"]
) -> Float[Tensor, "h m n"]:
    """Return the attention probabilities of a layer's queries and keys."""
    return attention_pattern(
        q,
        k,
        config.attention_scale,
        softcap=config.attention_softcap,
        window=config.layers[layer].window,
        sinks=w.vector("attn_sinks.weight") if "attn_sinks.weight" in w else None,
    )


def _attention_inner(w: BlockWeights, config: ModelConfig, tape: AttentionTape) -> LinearOperator:
    """Return the attention branch up to its output projection, before any post-norm and scale."""
    return _linear(w, "attn_output", tape.pattern.shape[1]) @ _heads(w, config, tape)


def _heads(w: BlockWeights, config: ModelConfig, tape: AttentionTape) -> LinearOperator:
    """Return the attention branch up to the concatenated outputs of its heads, `[n, d]` to `[m, h s]`."""
    values: LinearOperator = _linear(w, "attn_v", tape.pattern.shape[2])
    if tape.passed is not None:
        values = Scale(tape.passed, tape.limits) @ values
    core = Mix(tape.pattern, config.head_count_kv, config.head_size) @ values
    return core if tape.norm_in is None else core @ tape.norm_in.operator()


def _ffn_inner(w: BlockWeights, tape: FFNTape, n: int, d: int) -> LinearOperator:
    """Return the feed-forward branch up to the sum of its networks, before any post-norm and scale."""
    everywhere = [_network(w, network, d) for network in tape.networks if network.positions is None]
    routed = [
        (network.positions, _network(w, network, d)) for network in tape.networks if network.positions is not None
    ]
    core = Sum(*everywhere, *([Experts(routed, n)] if routed else []))
    return core if tape.norm_in is None else core @ tape.norm_in.operator()


def _network(w: BlockWeights, tape: HiddenTape, d: int) -> LinearOperator:
    """Return one feed-forward network at the positions that use it, `[m, d]` to `[m, d]`: a sum over slabs."""
    m, f = tape.factor.shape
    slabs: list[LinearOperator] = []
    for units in (slice(a, min(a + SLAB, f)) for a in range(0, f, SLAB)):
        live = _linear(w, tape.live, m, tape.kind, tape.expert, rows=units)
        scale = Scale(tape.factor[:, units], None if tape.constant is None else tape.constant[:, units])
        down = _linear(w, "ffn_down", m, tape.kind, tape.expert, columns=units)
        slabs.append(down @ scale @ live)
    network = Sum(*slabs)
    return network if tape.weight is None else Scale(tape.weight[:, None].expand(m, d)) @ network


def _normed_input(
    w: BlockWeights, config: ModelConfig, names: Sequence[str], x: Float[Tensor, "n d"]
) -> tuple[NormTape | None, Float[Tensor, "n d"]]:
    """Freeze the norm before a branch, and return it with the normed stream."""
    norm = record_norm(w, config, names, x)
    return norm, x if norm is None else norm.apply(x)


def _normed_output(
    w: BlockWeights, config: ModelConfig, names: Sequence[str], raw: Float[Tensor, "n d"]
) -> tuple[NormTape | None, Float[Tensor, "n d"]]:
    """Freeze the norm after a branch at the branch's output, and return it with what the branch adds to the stream."""
    norm = record_norm(w, config, names, raw)
    identity = Identity(raw.shape, dtype=raw.dtype, device=raw.device)
    return norm, _affine(_after(config, norm, identity), raw)


def _after(config: ModelConfig, norm_out: NormTape | None, inner: LinearOperator) -> LinearOperator:
    """Return an operator followed by a branch's post-norm and residual scale, where the model has them."""
    added = inner if norm_out is None else norm_out.operator() @ inner
    if config.residual_scale == 1:
        return added
    scale = torch.full(inner.out_shape, config.residual_scale, dtype=inner.dtype, device=inner.device)
    return Scale(scale) @ added


def _linear(
    w: BlockWeights,
    stem: str,
    n: int,
    kind: str = "",
    expert: int | None = None,
    *,
    rows: slice | None = None,
    columns: slice | None = None,
) -> Linear:
    """Return a projection with its bias, if the file has one; of several parts by columns, the first has the bias."""
    name = f"{stem}{kind}"
    matrix = w.matrix(f"{name}.weight", expert)
    bias = w.vector(f"{name}.bias", expert) if f"{name}.bias" in w else None
    if rows:
        matrix, bias = matrix.rows(rows.start, rows.stop), None if bias is None else bias[rows]
    if columns:
        matrix, bias = matrix.columns(columns.start, columns.stop), None if columns.start else bias
    return Linear(matrix, n, bias)


def _affine(operator: LinearOperator, x: Float[Tensor, "n d"]) -> Float[Tensor, "m e"]:
    """Return `A x + b` for one input."""
    return operator.matmat(x[None], x.new_ones(1))[0]


def _normed(w: BlockWeights, name: str, config: ModelConfig, x: Float[Tensor, "*n s"]) -> Float[Tensor, "*n s"]:
    """Return queries or keys normed over the last axis; they act through the frozen pattern, so there is no tape."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if config.row.norm == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide * _inverse_rms(wide, config) * w.vector(f"{name}.weight").to(wide)).to(x.dtype)


def _clamped(config: ModelConfig, x: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
    """Return queries, keys or values with no entry beyond the model's limit."""
    limit = config.attention_clamp
    return x.clamp(-limit, limit) if limit else x


def _inverse_rms(x: Float[Tensor, "*n s"], config: ModelConfig) -> Float[Tensor, "*n 1"]:
    """Return `1 / sqrt(mean(x²) + epsilon)` over the last axis."""
    mean = x.square().mean(-1, keepdim=True)
    if not mean.isfinite().all():
        raise overflow("activations in a norm", x.dtype)
    return torch.rsqrt(mean + config.norm_epsilon)
