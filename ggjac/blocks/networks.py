"""Feed-forward networks and mixtures of experts, frozen at one prompt.

For gated networks there are two conventions; see `record_hidden`.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from ggjac.blocks.frame import BlockWeights, Frame, affine, before, linear, scaled
from ggjac.blocks.norms import NormTape, inverse_rms, record_norm, widened
from ggjac.blocks.streams import StreamsTape
from ggjac.config import ModelConfig
from ggjac.linop import Experts, Identity, LinearOperator, Network, Scale, Select, Shift, Sum, Zero, indices_on

# Expert scores of router logits `[n, e]`, and weights of the chosen ones' scores where these are not them.
ROUTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "softmax_selected": lambda logits: logits,
    "sigmoid": torch.sigmoid,
    "sigmoid_selected": lambda logits: logits,
    "sqrt_softplus": lambda logits: softplus(logits).sqrt(),
}
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax_selected": lambda logits: logits.softmax(-1),
    "sigmoid_selected": torch.sigmoid,
}


class HiddenTape(NamedTuple):
    """The frozen quantities of one feed-forward network: the factor on each hidden unit, and where the network is used.

    Attributes:
        kind: suffix of its tensors' names: none, `_exps` for a routed expert, `_shexp` for the shared one.
        expert: index in the stack of experts, or None.
        live: stem of the live projection, `ffn_up` or `ffn_gate`.
        factor: `[m, f]`, multiplies the live projection.
        constant: `[m, f]`, added to the product by a clamp or shift, or None.
        positions: `[m]`, the positions that use a routed expert, ascending, on the host; None for all.
        weight: `[m]`, the router's weight of its output, or None for 1.
        before: whether that weight is of its input.
    """

    kind: str
    expert: int | None
    live: str
    factor: Float[Tensor, "m f"]
    constant: Float[Tensor, "m f"] | None
    positions: Int[Tensor, " m"] | None
    weight: Float[Tensor, " m"] | None
    before: bool = False

    def at(self, queries: slice) -> "HiddenTape":
        """Return the tape of some positions, which are counted from the first of them."""
        rows, positions = queries, self.positions
        if positions is not None:
            rows = slice(*torch.searchsorted(positions, torch.tensor([queries.start, queries.stop])).tolist())
            positions = positions[rows] - queries.start
        return self._replace(
            factor=self.factor[rows],
            constant=None if self.constant is None else self.constant[rows],
            positions=positions,
            weight=None if self.weight is None else self.weight[rows],
        )


class FFNTape(NamedTuple):
    """The frozen quantities of a feed-forward branch: its networks (several in a mixture of experts), and its norms.

    A part of a branch that has norms of its own, or a latent width, is a branch in the place of a network. A branch
    without networks adds nothing: the block has none.

    Attributes:
        norm_in, norm_out: norms before and after the sum of the networks, or None.
        networks: their tapes.
        latent: whether they read and write a narrower stream, through `ffn_latent_down` and `ffn_latent_up`.
        routed: whether experts are among them; the weights may hold none of those that are used.
        scale: constant factor of the sum of the networks.
        beside: a mixture that reads the block's input, and is added to the sum; or None.
        after: a mixture that reads the sum, and is added to it; or None.
        shifted: whether the networks read a mix of each position with the one before it; the norm before them then has
            that position, too.
        gate: `[n, d]`, factor of the sum of the networks, or None.
        streams: how several residual streams take up what the branch adds; None for one.
    """

    norm_in: NormTape | None
    networks: "tuple[HiddenTape | FFNTape, ...]"
    norm_out: NormTape | None
    latent: bool = False
    routed: bool = False
    scale: float = 1.0
    beside: "FFNTape | None" = None
    after: "FFNTape | None" = None
    shifted: bool = False
    gate: Float[Tensor, "n d"] | None = None
    streams: StreamsTape | None = None

    @property
    def empty(self) -> bool:
        """Whether the branch adds nothing."""
        return not self.networks and not self.routed

    def at(self, queries: slice) -> "FFNTape":
        """Return the tape of some positions, without the experts that none of them uses."""
        networks = (network.at(queries) for network in self.networks)
        return self._replace(
            norm_in=self.norm_in and self.norm_in.at(slice(max(0, queries.start - self.shifted), queries.stop)),
            gate=None if self.gate is None else self.gate[queries],
            networks=tuple(part for part in networks if isinstance(part, FFNTape) or len(part.factor)),
            norm_out=self.norm_out and self.norm_out.at(queries),
            beside=self.beside and self.beside.at(queries),
            after=self.after and self.after.at(queries),
            streams=self.streams and self.streams.at(queries),
        )


def record_hidden(
    w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], kind: str = "", expert: int | None = None
) -> HiddenTape:
    """Freeze one feed-forward network at its (normed) input `h`, and the norm of its hidden units if it has one."""
    tape = _record_hidden(w, frame, layer, h, kind, expert)
    if f"ffn_sub_norm{kind}.weight" not in w:
        return tape
    hidden = affine(Scale(tape.factor, tape.constant), affine(linear(w, tape.live, len(h), kind, expert), h))
    norm = (inverse_rms(hidden, frame.config) * w.vector(f"ffn_sub_norm{kind}.weight")).to(hidden)
    constant = None if tape.constant is None else tape.constant * norm
    return tape._replace(factor=tape.factor * norm, constant=constant)


def _record_hidden(
    w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "m d"], kind: str, expert: int | None
) -> HiddenTape:
    """Freeze one feed-forward network at its (normed) input `h`, up to its hidden units.

    A gated network is `down(a(gate) * up)`, and either factor can be live. With `mlp_path="up"` the whole activated
    gate is frozen and `up` is live (the paper's code for five families). With `"gate"`, `up` and the sigmoid-like share
    inside `a` are frozen and `gate` is live (the paper's code for Phi). Both reproduce the output; their operators
    differ. For a network without a gate, `down(a(up))`, there is one rule: the share of `a` is frozen.
    A factor that some activations have on `up` is frozen by either rule.
    """

    def projected(stem: str) -> Tensor:
        return affine(linear(w, stem, len(h), kind, expert), h)

    share, limit, shift, up_share = frame.activations[layer]
    bound = frame.config.layers[layer].clamp(kind)
    if f"ffn_gate{kind}.weight" not in w:
        factor = share(projected("ffn_up"))
        if f"ffn.act{kind}.scales" in w:
            factor = factor / w.vector(f"ffn.act{kind}.scales")
        return HiddenTape(kind, expert, "ffn_up", factor, None, None, None)
    gate = projected("ffn_gate")
    if sparsity := frame.config.layers[layer].sparsity:
        # The bound that gates exceed is frozen, and is a constant: it is subtracted from those that do.
        least = _above(gate, sparsity)
        positive, kept = (gate - least).relu(), gate > least
        if frame.mlp_path == "up":
            return HiddenTape(kind, expert, "ffn_up", positive * share(positive), None, None, None)
        factor = kept * share(positive) * projected("ffn_up")
        return HiddenTape(kind, expert, "ffn_gate", factor, -least * factor, None, None)
    if limit is None and not bound:
        frozen = gate if frame.mlp_path == "up" else projected("ffn_up")
        factor = frozen * share(gate)
        if up_share is not None:
            factor = factor * up_share(frozen if frame.mlp_path == "gate" else projected("ffn_up"))
        return HiddenTape(kind, expert, f"ffn_{frame.mlp_path}", factor, None, None, None)

    # A clamp, before the activation or after it, is linear too once frozen: 1 or 0 on its input, plus the limit where
    # it acts.
    limit, bound = limit or math.inf, bound or math.inf
    if frame.config.row.hidden_clamps.startswith("before"):
        limit, bound = bound, limit
    gate_clamped, up = gate.clamp(max=limit), projected("ffn_up")
    activated = gate_clamped * share(gate_clamped)
    activated_clamped, up_clamped = activated.clamp(max=bound), up.clamp(-min(limit, bound), min(limit, bound))
    if frame.mlp_path == "up":
        factor, free = activated_clamped, up == up_clamped  # [m, f]
        constant = factor * (torch.where(free, 0, up_clamped) + shift)
    else:
        factor, free = share(gate) * (up_clamped + shift), (gate == gate_clamped) & (activated == activated_clamped)
        constant = torch.where(free, 0, activated_clamped) * (up_clamped + shift)
    return HiddenTape(kind, expert, f"ffn_{frame.mlp_path}", factor * free, constant, None, None)


def _above(gate: Float[Tensor, "m f"], deviations: float) -> Float[Tensor, "m 1"]:
    """Return the mean of gates plus so many of their standard deviations, as estimated from a sample."""
    wide = widened(gate)
    return (wide.mean(1, keepdim=True) + deviations * wide.std(1, keepdim=True)).to(gate)


def record_mixture(
    w: BlockWeights,
    frame: Frame,
    layer: int,
    h: Float[Tensor, "n d"],
    x: Float[Tensor, "n i"],
    entry: Float[Tensor, "n e"],
) -> tuple[FFNTape, Float[Tensor, "n d"]]:
    """Freeze a mixture of experts at its normed input `h`, and return it with what it adds.

    Some routers read the stream `x`, or the block's `entry`.
    """
    row, shared = frame.config.row, record_shared(w, frame, layer, h)
    if frame.config.layers[layer].hidden_units and not row.norms.experts_in:
        shared.append(record_hidden(w, frame, layer, h))
    router = {"input": h, "stream": x, "block": entry}[row.router_reads]
    if row.router_reads == "stream":
        router = _router_input(w, frame.config, x)
    chosen, scores = _choice(w, frame, layer, router)
    latent = "ffn_latent_down.weight" in w
    read = affine(linear(w, "ffn_latent_down", len(h)), h) if latent else h
    experts = record_experts(w, frame, layer, read, "_exps", chosen, scores)
    if latent:
        routed = FFNTape(None, experts, None, routed=True)
        if "ffn_routed_norm.weight" in w:
            norm = record_norm(w, frame.config, ("ffn_routed_norm",), affine(networks(w, routed, len(h)), read))
            routed = routed._replace(norm_out=norm)
        tape = FFNTape(None, (FFNTape(None, (routed,), None, latent=True), *shared), None)
    else:
        scale = row.joint_scale if shared else 1.0
        tape = FFNTape(None, (*experts, *shared), None, routed=True, scale=scale)
    added = affine(networks(w, tape, len(h)), h)
    if own := frame.config.adjugates.group:
        experts = record_experts(w, frame, layer, added, "_chexps", chosen // own, scores)
        after = FFNTape(None, experts, None, routed=True, scale=frame.config.adjugates.scale)
        tape, added = tape._replace(after=after), added + affine(networks(w, after, len(h)), added)
    return tape, added


def _router_input(w: BlockWeights, config: ModelConfig, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return what Gemma 4's router reads: the stream, normed without weight, divided by √d, times a vector."""
    wide = widened(x)
    scale = w.vector("ffn_gate_inp.scale").to(wide) / config.d**0.5
    return (wide * inverse_rms(wide, config) * scale).to(x.dtype)


def _choice(
    w: BlockWeights, frame: Frame, layer: int, router: Float[Tensor, "n d"]
) -> tuple[Int[Tensor, "n used"], Float[Tensor, "n e"]]:
    """Return the experts that each position uses, and the scores of all; `router` is what is read."""
    config, own = frame.config, frame.config.layers[layer]
    logits = affine(linear(w, "ffn_gate_inp", len(router)), router)
    scores = ROUTERS[config.row.router](widened(logits))
    if own.token_experts:
        return indices_on(router.device, frame.choices[layer][: len(router)]), scores
    return w.agreed(_chosen(w, config, scores.detach(), own.experts_used)), scores


def record_experts(
    w: BlockWeights,
    frame: Frame,
    layer: int,
    h: Float[Tensor, "n _"],
    kind: str,
    chosen: Int[Tensor, "n used"],
    scores: Float[Tensor, "n e"],
) -> tuple[HiddenTape, ...]:
    """Freeze the routed experts of a mixture: those that each position uses, their weights, and the tape of each.

    Only experts that some position uses, and that the weights hold, are read, here and in every product.

    Args:
        w, frame, layer: of the block.
        h: what the experts read.
        kind: suffix of their tensors' names.
        chosen: those of each position; one that is chosen twice is used twice.
        scores: the router's.
    """
    config = frame.config
    weights = scores.gather(-1, chosen)  # [n, used]
    if config.row.router in WEIGHTS:
        weights = WEIGHTS[config.row.router](weights)
    if config.row.renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(2.0**-14)  # llama.cpp's floor: F16's smallest
    weights = weights * config.expert_weights_scale

    # Sorted by expert on the host, for which a device waits once, and not for each expert.
    by_expert, order = chosen.cpu().flatten().sort(stable=True)  # [n used]
    experts, counts = (part.tolist() for part in by_expert.unique_consecutive(return_counts=True))
    places = indices_on(h.device, order)
    parts = (order // chosen.shape[1], places // chosen.shape[1], weights.flatten()[places].to(h.dtype))
    found = []
    for expert, positions, rows, weight in zip(experts, *(part.split(counts) for part in parts), strict=True):
        if w.holds(expert):
            before = config.row.weighted_inputs
            tape = record_hidden(w, frame, layer, h[rows] * weight[:, None] if before else h[rows], kind, expert)
            found.append(tape._replace(positions=positions, weight=weight, before=before))
    return tuple(found)


def record_shared(w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "n d"]) -> list[HiddenTape]:
    """Freeze the expert of a mixture that every position uses; none if the block has none."""
    if "ffn_up_shexp.weight" not in w:
        return []
    shared = record_hidden(w, frame, layer, h, "_shexp")
    if "ffn_gate_inp_shexp.weight" in w:
        shared = shared._replace(weight=(h @ w.vector("ffn_gate_inp_shexp.weight")).sigmoid())  # [n]
    return [shared]


def _chosen(w: BlockWeights, config: ModelConfig, scores: Float[Tensor, "n e"], used: int) -> Int[Tensor, "n used"]:
    """Return the experts of each position: those of highest score plus bias, within the best groups if there are any.

    A group is as good as the sum of its two best members. The bias is not rounded to a narrower dtype, since the part
    of it that is common to all experts may exceed the differences between them.
    """
    for name in ("exp_probs_b.bias", "exp_probs_b"):
        if name in w:
            scores = scores + w.wide_vector(name)
    if config.expert_groups > 1:
        grouped = scores.unflatten(-1, (config.expert_groups, -1))  # [n, groups, e / groups]
        best = grouped.topk(2).values.sum(-1).topk(config.expert_groups_used).indices
        left_out = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter(-1, best, False)
        scores = grouped.masked_fill(left_out[..., None], -torch.inf).flatten(1)
    return scores.topk(used).indices


def networks(w: BlockWeights, tape: FFNTape, n: int) -> LinearOperator:
    """Return a feed-forward branch up to the sum of its networks, `[n, d]` to `[n, d]`, before any norm after them."""
    parts: list[LinearOperator] = []
    shared: list[LinearOperator] = []  # of which the weights have only some terms
    routed: list[tuple[Tensor, LinearOperator]] = []
    for part in tape.networks:
        if isinstance(part, FFNTape):
            inner = networks(w, part, n)
            parts.append(inner if part.norm_out is None else part.norm_out.operator() @ inner)
        elif part.positions is None:
            (shared if w.shares(f"ffn_down{part.kind}") else parts).append(_network(w, part))
        else:
            routed.append((part.positions, _network(w, part)))
    if tape.routed:
        (shared if w.shares("ffn_down_exps") else parts).append(Experts(routed, n) if routed else _nothing(w, n))
    if shared:
        parts.append(w.joined(Sum(*shared)))
    core: LinearOperator = Sum(*parts)
    if tape.latent:
        core = linear(w, "ffn_latent_up", n) @ core @ linear(w, "ffn_latent_down", n)
    core = scaled(core, tape.scale)
    if tape.after is not None:
        core = Sum(Identity(core.out_shape, dtype=core.dtype, device=core.device), networks(w, tape.after, n)) @ core
    if tape.gate is not None:
        core = Scale(tape.gate) @ core
    if tape.shifted and tape.norm_in is not None:
        core = core @ _shifted(w, len(tape.norm_in.scale), n)
    return core if tape.norm_in is None else core @ tape.norm_in.operator()


def every_network(tape: FFNTape) -> Iterator[HiddenTape]:
    """Yield the networks of a branch, and of all its parts."""
    for part in (*tape.networks, tape.beside, tape.after):
        if isinstance(part, FFNTape):
            yield from every_network(part)
        elif part is not None:
            yield part


class Term(NamedTuple):
    """A network's output where a branch is read along some vectors.

    Attributes:
        network: its tape; None for the constant of a norm or a projection after the networks.
        added: `[m, d]`, the output at the positions that use it.
        read: `[m, d]`, what is read of it there.
    """

    network: HiddenTape | None
    added: Float[Tensor, "m _"]
    read: Float[Tensor, "m _"]


def terms(
    w: BlockWeights, tape: FFNTape, x: Float[Tensor, "_ _"], read: Float[Tensor, "_ _"], scale: float = 1.0
) -> Iterator[Term]:
    """Yield the output of each network of a branch at its input `x`, with what is read of it where the branch is.

    A mixture that reads the sum of other experts is beside them here, and none of what it adds is theirs. The sum of
    `added · read` is that of the branch; of weights shared with others, these terms are a part.

    Args:
        w: of the block.
        tape: of the branch, or of a part of it.
        x: the stream, or what a part of a branch reads.
        read: vectors that read the branch, after the norm that follows the networks.
        scale: constant factor after that norm.
    """
    n, read = len(read), scale * read
    if tape.norm_out is not None:
        yield _constant(tape.norm_out.operator(), read)
        read = tape.norm_out.operator().T @ read
    h = x if tape.norm_in is None else tape.norm_in.apply(x)
    if tape.shifted:
        h = affine(_shifted(w, len(x), n), h)
    read = read if tape.gate is None else read * tape.gate
    if tape.after is not None:
        core = networks(w, tape._replace(norm_in=None, after=None, gate=None), n)
        yield from terms(w, tape.after, affine(core, h), read)
    read = tape.scale * read
    if tape.latent:
        up = linear(w, "ffn_latent_up", n)
        yield _constant(up, read)
        h, read = affine(linear(w, "ffn_latent_down", n), h), up.T @ read
    for part in tape.networks:
        if isinstance(part, FFNTape):
            yield from terms(w, part, h, read)
        else:
            rows = slice(None) if part.positions is None else indices_on(h.device, part.positions)
            yield Term(part, affine(_network(w, part), h[rows]), read[rows])


def _constant(operator: LinearOperator, read: Float[Tensor, "m d"]) -> Term:
    """Return the constant of an operator as a term."""
    zero = torch.zeros(operator.in_shape, dtype=operator.dtype, device=operator.device)
    return Term(None, affine(operator, zero), read)


def _shifted(w: BlockWeights, n: int, m: int) -> LinearOperator:
    """Return the mix of the last `m` of `n` positions with those before them, `[n, d]` to `[m, d]`."""
    shift = Shift(w.vector("channel_mix_lerp_k.weight"), n)
    if m == n:
        return shift
    return Select(torch.arange(n - m, n), *shift.in_shape, dtype=shift.dtype, device=shift.device) @ shift


def record_shifted(
    w: BlockWeights, frame: Frame, layer: int, h: Float[Tensor, "n d"], past: Float[Tensor, "1 d"] | None
) -> tuple[FFNTape, Float[Tensor, "n d"]]:
    """Freeze RWKV's channel mixing at its (normed) input `h`, which follows a past input; return what it adds, too."""
    away = before(h, past) - h
    read = h + away * w.vector("channel_mix_lerp_k.weight")
    gate = None
    if "channel_mix_receptance.weight" in w:
        mixed = h + away * w.vector("channel_mix_lerp_r.weight")
        gate = affine(linear(w, "channel_mix_receptance", len(h)), mixed).sigmoid()
    tape = FFNTape(None, (record_hidden(w, frame, layer, read),), None, shifted=True, gate=gate)
    return tape, affine(networks(w, tape, len(h)), read)


def _nothing(w: BlockWeights, n: int) -> LinearOperator:
    """Return the sum of no experts."""
    down = w.matrix("ffn_down_exps.weight", 0)
    shape = (n, down.shape[0])
    return Zero(shape, shape, dtype=down.dtype, device=down.device)


def _network(w: BlockWeights, tape: HiddenTape) -> LinearOperator:
    """Return one feed-forward network at the positions that use it, `[m, d]` to `[m, d]`: a sum over slabs."""
    m, f = tape.factor.shape
    slabs = []
    for units in (slice(a, min(a + w.slab, f)) for a in range(0, f, w.slab)):
        live = linear(w, tape.live, m, tape.kind, tape.expert, rows=units)
        scale = Scale(tape.factor[:, units], None if tape.constant is None else tape.constant[:, units])
        down = linear(w, "ffn_down", m, tape.kind, tape.expert, columns=units)
        slabs.append((down, scale, live))
    network = Network(slabs)
    if tape.weight is None:
        return network
    weight = Scale(tape.weight[:, None].expand(network.out_shape))
    return network @ weight if tape.before else weight @ network
