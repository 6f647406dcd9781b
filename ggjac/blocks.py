"""A transformer block at one prompt: what is frozen (a tape) and the linear operator it leaves.

    attn  = norm_out @ Linear(attn_output) @ Mix(pattern) @ Linear(attn_v) @ norm_in
    ffn   = norm_out @ Linear(ffn_down) @ Scale(gate) @ Linear(ffn_up) @ norm_in
    block = (I + ffn) @ (I + attn)

Norms are frozen diagonals (LayerNorm's centring and bias stay live), queries and keys act through the frozen attention
pattern only, and of a mixture of experts the choice and the weights are frozen. The freezing rule is that of Golden,
arXiv 2505.24293, section 2.3; for gated feed-forwards there are two conventions, see `record_hidden`. What differs
between families comes from `ggjac.config` or from the presence of a tensor.

Each sublayer is recorded at its own input, and the forward pass is the recorded operator applied to that input. Tensors
keep GGUF's names, without the `blk.N.` prefix.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ggjac.config import ModelConfig, Rope
from ggjac.linop import Center, Experts, Identity, Linear, LinearOperator, Mix, Scale, Select, Sum, TiledMatrix
from ggjac.rope import rotate
from ggjac.sizes import SLAB, MlpPath


@runtime_checkable
class WeightMatrix(TiledMatrix, Protocol):
    """A matrix to be streamed, of which parts can be had."""

    def rows(self, start: int, stop: int) -> "WeightMatrix":
        """Return rows `start:stop`."""

    def columns(self, start: int, stop: int) -> "WeightMatrix":
        """Return columns `start:stop`, on the boundaries of stored blocks."""


@runtime_checkable
class BlockWeights(Protocol):
    """The tensors of one block by their short names, such as `attn_q.weight`."""

    def __contains__(self, name: str) -> bool:
        """Say whether the file has the tensor."""

    def matrix(self, name: str, expert: int | None = None) -> WeightMatrix:
        """Return a matrix to be streamed; of a stack of experts, one."""

    def vector(self, name: str, expert: int | None = None) -> Tensor:
        """Return a small tensor, dense; of a stack of experts, one row."""

    def wide_vector(self, name: str) -> Tensor:
        """Return a small tensor in float32 at least, whatever the dtype of the others."""


class NumericsError(ValueError):
    """The forward pass left the range of its dtype: nothing computed from it would mean anything."""


class Activation(NamedTuple):
    """A gate's nonlinearity, written `a(g) = g * share(g)`, so that either factor can be frozen.

    With a `limit`, `g` is clamped from above and `up` to both sides; `shift` is added to `up`.
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
        z = z.clamp(max=-torch.finfo(z.dtype).tiny)  # at 0 it is 1
        return torch.expm1(z) / z

    return torch.add(alpha_n * growth(z) + (beta - alpha_n), z.clamp(min=0), alpha=alpha_p)


def activation(config: ModelConfig, layer: int, *, table: bool = False) -> Activation:
    """Return the activation of a block's feed-forward; with `table`, GELU is ggml's on the CPU."""
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


# Expert scores of router logits `[n, e]`; where the softmax is over the chosen ones, it follows the choice.
ROUTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "softmax_selected": lambda logits: logits,
    "sigmoid": torch.sigmoid,
}


class Frame(NamedTuple):
    """What every block shares at one prompt.

    Attributes:
        config: sizes and constants.
        rotations: cos and sin of every position, for each rotary embedding in use.
        mlp_path: the freezing rule of gated feed-forwards.
        activations: of each block's feed-forward.
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
        """Restrict to some positions."""
        return self._replace(scale=self.scale[positions])

    def apply(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return the norm of `x`."""
        return _apply(self.operator(), x)

    def operator(self) -> LinearOperator:
        """Return the frozen norm, `[n, d]` to `[n, d]`."""
        scale = Scale((self.scale * self.weight.to(self.scale)).to(self.weight), self.bias)
        if not self.centred:
            return scale
        return scale @ Center(scale.in_shape, dtype=scale.dtype, device=scale.device)


class AttentionTape(NamedTuple):
    """Frozen in an attention branch: how positions attend to each other, the norms before and after, and a clamp.

    Of values that are clamped, `passed` is 1 where one is let through and 0 elsewhere, and `limits` what stands there.
    """

    norm_in: NormTape | None
    pattern: Float[Tensor, "h m n"]
    norm_out: NormTape | None
    passed: Float[Tensor, "n gs"] | None = None
    limits: Float[Tensor, "n gs"] | None = None

    def at(self, queries: slice) -> "AttentionTape":
        """Restrict to query positions, and to the positions up to the last of them."""
        return AttentionTape(
            self.norm_in and self.norm_in.at(slice(queries.stop)),
            self.pattern[:, queries, : queries.stop],
            self.norm_out and self.norm_out.at(queries),
            None if self.passed is None else self.passed[: queries.stop],
            None if self.limits is None else self.limits[: queries.stop],
        )


class HiddenTape(NamedTuple):
    """Frozen in one feed-forward network: the factor on each hidden unit, and where the network is used.

    Attributes:
        kind: suffix of its tensors' names: none, `_exps` for a routed expert, `_shexp` for the shared one.
        expert: which of the stacked experts.
        live: stem of the projection that stays live, `ffn_up` or `ffn_gate`.
        factor: `[m, f]`, on the live projection.
        constant: `[m, f]`, what a clamp or shift adds to it, or None.
        positions: `[m]`, where a routed expert is used; None for everywhere.
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
        """Restrict to some positions, counted from the first of them."""
        kept: slice | Tensor = queries
        positions = self.positions
        if positions is not None:
            inside = (positions >= queries.start) & (positions < queries.stop)
            if queries.start == 0 and inside.all():
                return self  # nothing is cut: no copy
            kept, positions = inside, positions[inside] - queries.start
        return self._replace(
            factor=self.factor[kept],
            constant=None if self.constant is None else self.constant[kept],
            positions=positions,
            weight=None if self.weight is None else self.weight[kept],
        )


class FFNTape(NamedTuple):
    """Frozen in a feed-forward branch: its networks (several for a mixture of experts), and the norms around them."""

    norm_in: NormTape | None
    networks: tuple[HiddenTape, ...]
    norm_out: NormTape | None

    def at(self, queries: slice) -> "FFNTape":
        """Restrict to some positions; experts that none of them uses are left out."""
        networks = (network.at(queries) for network in self.networks)
        return FFNTape(
            self.norm_in and self.norm_in.at(queries),
            tuple(network for network in networks if len(network.factor)),
            self.norm_out and self.norm_out.at(queries),
        )


class BlockTape(NamedTuple):
    """Everything frozen in one block, and the stream it was recorded at."""

    x: Float[Tensor, "n d"]
    attn: AttentionTape
    ffn: FFNTape


Tape = TypeVar("Tape", AttentionTape, FFNTape)


class Recorded(NamedTuple, Generic[Tape]):
    """A recorded branch: its tape, its output before norm and scale (llama.cpp's `attn_out`), and what it adds."""

    tape: Tape
    raw: Float[Tensor, "n d"]
    added: Float[Tensor, "n d"]


def record_attention(w: BlockWeights, frame: Frame, layer: int, x: Float[Tensor, "n d"]) -> Recorded[AttentionTape]:
    """Freeze the attention branch at its input `x`."""
    config = frame.config
    norm_in = record_norm(w, config, config.row.norms.attention_in, x)
    h = x if norm_in is None else norm_in.apply(x)
    q, k = _queries_keys(w, frame, layer, h)
    pattern = _pattern(w, config, layer, q, k)
    tape = AttentionTape(norm_in, pattern, None)
    if limit := config.attention_clamp:
        v = _apply(_linear(w, "attn_v", len(x)), h)
        clamped = v.clamp(-limit, limit)
        passed = v == clamped
        tape = tape._replace(passed=passed.to(v), limits=torch.where(passed, 0, clamped))
    raw = _apply(_attention_inner(w, config, tape), x)
    tape = tape._replace(norm_out=record_norm(w, config, config.row.norms.attention_out, raw))
    return Recorded(tape, raw, _apply(_added(config, tape.norm_out, _same(raw)), raw))


class Past(NamedTuple):
    """What attention at later positions needs of the `p` positions before them: rotated keys, and values."""

    k: Float[Tensor, "p g s"]
    v: Float[Tensor, "p gs"]


def extend_attention(
    w: BlockWeights, frame: Frame, layer: int, x: Float[Tensor, "m d"], past: Past | None
) -> tuple[Float[Tensor, "m d"], Past]:
    """Return what attention adds at `m` positions that follow `past` (None: nothing), and the longer past.

    `record_attention` without a tape: the same operators, but for the positions of the past nothing is computed again.
    """
    config = frame.config
    norm_in = record_norm(w, config, config.row.norms.attention_in, x)
    h = x if norm_in is None else norm_in.apply(x)
    q, k = _queries_keys(w, frame, layer, h, 0 if past is None else len(past.k))
    v = _clamped(config, _apply(_linear(w, "attn_v", len(x)), h))
    if past is not None:
        k, v = torch.cat((past.k, k)), torch.cat((past.v, v))
    mix = Mix(_pattern(w, config, layer, q, k), config.head_count_kv, config.head_size)
    raw = _apply(_linear(w, "attn_output", len(x)), _apply(mix, v))
    norm_out = record_norm(w, config, config.row.norms.attention_out, raw)
    return _apply(_added(config, norm_out, _same(raw)), raw), Past(k, v)


def record_ffn(w: BlockWeights, frame: Frame, layer: int, x: Float[Tensor, "n d"]) -> Recorded[FFNTape]:
    """Freeze the feed-forward branch at its input `x`."""
    config = frame.config
    norm_in = record_norm(w, config, config.row.norms.ffn_in, x)
    h = x if norm_in is None else norm_in.apply(x)
    routed = "ffn_gate_inp.weight" in w
    networks = record_experts(w, frame, layer, h) if routed else [record_hidden(w, frame, layer, h)]
    tape = FFNTape(norm_in, tuple(networks), None)
    raw = _apply(_ffn_inner(w, tape, *x.shape), x)
    tape = tape._replace(norm_out=record_norm(w, config, config.row.norms.ffn_out, raw))
    return Recorded(tape, raw, _apply(_added(config, tape.norm_out, _same(raw)), raw))


def record_hidden(
    w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], kind: str = "", expert: int | None = None
) -> HiddenTape:
    """Freeze one feed-forward network at its (normed) input `h`.

    A gated network is `down(a(gate) * up)`, and either factor can be the live one. With `mlp_path="up"` the whole
    activated gate is frozen and `up` stays live (the paper's code for five families). With `"gate"`, `up` and the
    sigmoid-like share inside `a` are frozen and `gate` stays live (its Phi code). Both reproduce the output; their
    operators differ. A network without a gate, `down(a(up))`, has only one way: the share of `a` is frozen.
    """

    def projected(stem: str) -> Tensor:
        return _apply(_linear(w, stem, len(h), kind, expert), h)

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
        factor, live, clamped, shift = gate_clamped * share(gate_clamped), up, up_clamped, shift
    else:
        factor, live, clamped, shift = share(gate_clamped) * (up_clamped + shift), gate, gate_clamped, 0.0
    free = live == clamped
    constant = None if limit is None else factor * (torch.where(free, 0, clamped) + shift)
    return HiddenTape(kind, expert, f"ffn_{frame.mlp_path}", factor * free, constant, None, None)


def record_experts(w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "n d"]) -> list[HiddenTape]:
    """Freeze a mixture of experts: which experts each position uses, with which weight, and each one's own tape.

    Only the experts that some position uses are read, here and in every product.
    """
    config = frame.config
    logits = _apply(_linear(w, "ffn_gate_inp", len(h)), h)
    scores = ROUTERS[config.row.router](logits.to(torch.promote_types(h.dtype, torch.float32)))
    chosen = _chosen(w, config, scores.detach())
    weights = scores.gather(-1, chosen)
    if config.row.router == "softmax_selected":
        weights = weights.softmax(-1)
    if config.row.renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(2.0**-14)  # llama.cpp's floor: F16's smallest
    weights = weights * config.expert_weights_scale

    networks = []
    for expert in chosen.unique().tolist():
        positions, slot = (chosen == expert).nonzero(as_tuple=True)
        tape = record_hidden(w, frame, layer, h[positions], "_exps", expert)
        networks.append(tape._replace(positions=positions, weight=weights[positions, slot].to(h.dtype)))
    if "ffn_up_shexp.weight" in w:
        shared = record_hidden(w, frame, layer, h, "_shexp")
        if "ffn_gate_inp_shexp.weight" in w:
            shared = shared._replace(weight=(h @ w.vector("ffn_gate_inp_shexp.weight")).sigmoid())
        networks.append(shared)
    return networks


def _chosen(w: BlockWeights, config: ModelConfig, scores: Float[Tensor, "n e"]) -> Int[Tensor, "n used"]:
    """Return the experts of each position: the best by score and bias, of the best groups, of which two members count.

    The bias is never rounded: what all experts share of it may be large beside what sets them apart.
    """
    if "exp_probs_b.bias" in w:
        scores = scores + w.wide_vector("exp_probs_b.bias")
    if config.expert_groups > 1:
        grouped = scores.unflatten(-1, (config.expert_groups, -1))
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
    """Return the attention branch in two: `[n, d]` to what the heads read `[m, h hd]`, and from there to `[m, d]`."""
    return _heads(w, config, tape), _added(config, tape.norm_out, _linear(w, "attn_output", tape.pattern.shape[1]))


def ffn(w: BlockWeights, config: ModelConfig, tape: FFNTape, n: int) -> LinearOperator:
    """Return the feed-forward branch, `[n, d]` to `[n, d]`."""
    return _added(config, tape.norm_out, _ffn_inner(w, tape, n, config.d))


class FrozenBlock(NamedTuple):
    """A block's branches as operators: `(I + ffn) @ (I + attn)`, or `I + ffn + attn` where both read its input.

    Attributes:
        attn: what attention adds to the stream, from the positions that are read to those that are written.
        ffn: what the feed-forward adds, at the written positions.
        kept: the residual connection: identity, or a selection where fewer positions are written than read.
        parallel: both branches read the block's input.
    """

    attn: LinearOperator
    ffn: LinearOperator
    kept: LinearOperator
    parallel: bool

    @property
    def flop(self) -> int:
        """Floating-point operations of one product with one vector."""
        return self.attn.flop + self.ffn.flop

    def read_ahead(self) -> None:
        """Ask for the weights of both branches to be read from the disk."""
        self.attn.read_ahead()
        self.ffn.read_ahead()


def block(w: BlockWeights, config: ModelConfig, tape: BlockTape, positions: range) -> FrozenBlock:
    """Return a frozen block from the positions up to the last one of `positions` to `positions`.

    Positions after the last one are left out, since attention is causal; a narrower `positions` (the last block needs
    only one) restricts everything but keys and values to them.
    """
    n, m, d = positions.stop, len(positions), config.d
    queries = slice(positions.start, positions.stop)
    attn = attention(w, config, tape.attn.at(queries))
    feed_forward = ffn(w, config, tape.ffn.at(queries), m)
    identity = Identity((m, d), dtype=attn.dtype, device=attn.device)
    kept = Select(torch.tensor(positions), n, d, dtype=attn.dtype, device=attn.device) if m < n else identity
    return FrozenBlock(attn, feed_forward, kept, config.row.parallel)


def record_norm(w: BlockWeights, config: ModelConfig, names: Sequence[str], x: Float[Tensor, "n d"]) -> NormTape | None:
    """Freeze a norm at its input, or return None where the block has none; see `frozen_norm`."""
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
    """Freeze RMSNorm or LayerNorm at `x`: its scale `1 / sqrt(mean(x²) + epsilon)`, centring live for the latter.

    Without a weight, that is ones.

    Squares are summed in float32 at least.
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

    `h` query heads share `g` key heads.

    A window counts the position itself. A sink is a logit that takes part in the softmax and has no value, so that the
    probabilities of real positions sum to less than one.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (k.shape[1], -1))
    # Widened before the product: 16-bit scores would be rounded again, and can overflow float16.
    scores = torch.einsum("mghs,ngs->ghmn", grouped.to(wide) * scale, k.to(wide)).flatten(0, 1)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    first = len(k) - len(q)
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(first + 1)
    if window is not None:
        hidden = hidden | torch.ones_like(hidden).tril(first - window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(wide)[:, None, None].expand(-1, len(q), 1)), -1)
    return scores.softmax(-1)[..., : len(k)].to(q.dtype)


def _queries_keys(
    w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], start: int = 0
) -> tuple[Float[Tensor, "m h s"], Float[Tensor, "m g s"]]:
    """Return the queries and keys of positions `start` and on, from their normed input `h`."""
    config, own = frame.config, frame.config.layers[layer]
    q, k = (_clamped(config, _apply(_linear(w, stem, len(h)), h)) for stem in ("attn_q", "attn_k"))
    if config.row.qk_norm == "full":
        q, k = _normed(w, "attn_q_norm", config, q), _normed(w, "attn_k_norm", config, k)
    q, k = q.unflatten(1, (config.head_count, -1)), k.unflatten(1, (config.head_count_kv, -1))
    if config.row.qk_norm in ("head", "heads"):
        q, k = _normed(w, "attn_q_norm", config, q), _normed(w, "attn_k_norm", config, k)
    if own.rope:
        cos, sin = (part[start : start + len(h)] for part in frame.rotations[own.rope])
        q, k = (rotate(part, own.rope, cos, sin) for part in (q, k))
    if config.row.qk_norm == "rotated":
        q, k = _normed(w, "attn_q_norm", config, q), _normed(w, "attn_k_norm", config, k)
    if config.temperature_scale:
        # Llama 4's and Ministral 3's: queries grow with the logarithm of their position, in original contexts.
        positions = torch.arange(start, start + len(h), dtype=torch.float64)
        periods = positions.div(config.original_context, rounding_mode="floor")
        q = q * (1 + config.temperature_scale * torch.log1p(periods)).to(q)[:, None, None]
    return q, k


def _pattern(
    w: BlockWeights, config: ModelConfig, layer: int, q: Float[Tensor, "m h s"], k: Float[Tensor, "n g s"]
) -> Float[Tensor, "h m n"]:
    """Return how a layer's queries attend to its keys."""
    return attention_pattern(
        q,
        k,
        config.attention_scale,
        softcap=config.attention_softcap,
        window=config.layers[layer].window,
        sinks=w.vector("attn_sinks.weight") if "attn_sinks.weight" in w else None,
    )


def _attention_inner(w: BlockWeights, config: ModelConfig, tape: AttentionTape) -> LinearOperator:
    """Return the attention branch without what follows its output projection."""
    return _linear(w, "attn_output", tape.pattern.shape[1]) @ _heads(w, config, tape)


def _heads(w: BlockWeights, config: ModelConfig, tape: AttentionTape) -> LinearOperator:
    """Return what the heads read, concatenated, `[n, d]` to `[m, h hd]`."""
    values: LinearOperator = _linear(w, "attn_v", tape.pattern.shape[2])
    if tape.passed is not None:
        values = Scale(tape.passed, tape.limits) @ values
    core = Mix(tape.pattern, config.head_count_kv, config.head_size) @ values
    return core if tape.norm_in is None else core @ tape.norm_in.operator()


def _ffn_inner(w: BlockWeights, tape: FFNTape, n: int, d: int) -> LinearOperator:
    """Return the feed-forward branch without what follows its networks."""
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
        up = _linear(w, tape.live, m, tape.kind, tape.expert, rows=units)
        scale = Scale(tape.factor[:, units], None if tape.constant is None else tape.constant[:, units])
        down = _linear(w, "ffn_down", m, tape.kind, tape.expert, columns=units)
        slabs.append(down @ scale @ up)
    network = Sum(*slabs)
    return network if tape.weight is None else Scale(tape.weight[:, None].expand(m, d)) @ network


def _added(config: ModelConfig, norm_out: NormTape | None, inner: LinearOperator) -> LinearOperator:
    """Return what a branch adds to the stream: its output, normed and scaled where the model does so."""
    added = inner if norm_out is None else norm_out.operator() @ inner
    if config.residual_scale == 1:
        return added
    scale = torch.full(inner.out_shape, config.residual_scale, dtype=inner.dtype, device=inner.device)
    return Scale(scale) @ added


def _same(x: Float[Tensor, "n d"]) -> Identity:
    """Return the identity on tensors like `x`."""
    return Identity(x.shape, dtype=x.dtype, device=x.device)


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
    """Return a projection with its bias, where the file has one; of parts by columns, the first carries the bias."""
    name = f"{stem}{kind}"
    matrix = w.matrix(f"{name}.weight", expert)
    bias = w.vector(f"{name}.bias", expert) if f"{name}.bias" in w else None
    if rows:
        matrix, bias = matrix.rows(rows.start, rows.stop), None if bias is None else bias[rows]
    if columns:
        matrix, bias = matrix.columns(columns.start, columns.stop), None if columns.start else bias
    return Linear(matrix, n, bias)


def _apply(operator: LinearOperator, x: Float[Tensor, "n d"]) -> Float[Tensor, "m e"]:
    """Apply an operator, constants included, to one input."""
    return operator.matmat(x[None], x.new_ones(1))[0]


def _normed(w: BlockWeights, name: str, config: ModelConfig, x: Float[Tensor, "*n s"]) -> Float[Tensor, "*n s"]:
    """Return queries or keys normed over the last axis; all of it is frozen, so no tape is kept."""
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
        raise NumericsError(f"activations overflow {x.dtype} in a norm; try a wider --dtype, or is the file damaged?")
    return torch.rsqrt(mean + config.norm_epsilon)
