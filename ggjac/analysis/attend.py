"""Why a head attends: the score of a key, split over pairs of what the query and the key were made of.

Before the softmax, with norms, rotations and clamps frozen at the prompt, a score of softmax attention is bilinear in
the residual stream at the query's position `T` and at the key's `s`:

    score = scale · Q(x_T) · K(x_s),    x_T = Σ_i u_i,    x_s = Σ_j v_j,    score = Σ_ij scale · Q(u_i) · K(v_j)

The parts `u`, `v` are what each block's branches wrote at those positions, or (by token) what each input embedding
became there along the live paths. Biases are a part of their own on either side, so that nothing remains but rounding.
What else decides the weight of a key is constant in the parts: soft cap, distance, and what all keys have in common,
the logarithm of the sum that the softmax divides by.

A linear recurrence has no softmax. The entry of its pattern is a product, exactly

    entry = write_s · Σ_c q_c k_c decay_c + removed + own

with the decays of all positions between, `own` the skip of a position's own value, and `removed` what a delta rule has
taken away or put elsewhere since.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ggjac.blocks import (
    AttentionTape,
    FFNTape,
    Made,
    Positions,
    Recurrence,
    affine,
    attention_logits,
    attention_scores,
    entering,
    keys,
    queries,
    record_mixer,
    skip,
)
from ggjac.checks import key_positions, whole
from ggjac.config import Head, ModelConfig, find_head, heads_of
from ggjac.config.mixers import MIXERS, name_of_mixers
from ggjac.jacobian import DetachedJacobian, FrozenNetwork, Progress
from ggjac.linop import Chain, Identity, LinearOperator
from ggjac.results import NO_WORDS, Bars, Plotted, Table, Words
from ggjac.sizes import KEYS, TOKENS_AT_ONCE, MlpPath, chunk_floats

PAIRS = 10  # of each key in tables and JSON: the largest

By = Literal["block", "token"]


class Part(NamedTuple):
    """A part of the residual stream: an input position, what a block's branch wrote, or what has neither."""

    name: str
    block: int | None = None
    position: int | None = None
    mixer: str | None = None  # what mixes positions there, if that is not attention alone

    def data(self, words: Words) -> dict[str, Any]:
        """Return it as plain data."""
        if self.position is not None:
            return words.here(self.position)
        found = {"part": self.name, "block": self.block, "mixer": self.mixer}
        return {name: value for name, value in found.items() if value is not None}

    def label(self, words: Words) -> str:
        """Return it as text."""
        if self.position is not None:
            return f"{self.position} {words.labels([self.position])[0]}"
        return self.name if self.block is None else f"L{self.block} {self.mixer or self.name}"


@dataclass(frozen=True)
class ScoreShares(Plotted):
    """The scores of some keys for one query of one head, split over pairs of parts; made by `attend`.

    Attributes:
        head: the head.
        query: position of the query.
        by: `"block"`, or `"token"`: parts along the live paths, which depend on the freezing rule.
        query_parts: `P` parts of the stream at the query; the last are the biases.
        key_parts: `R` parts of the stream at the keys, likewise.
        keys: positions of the `K` keys.
        versus: position of a key whose score is subtracted everywhere, or None.
        pairs: `[K, P, R]`, float64: their sum is the score.
        scores: `[K]`, float64: from queries and keys of the forward pass.
        softcap: `[K]`, float64: what the soft cap adds to the score.
        distance: `[K]`, float64: what the distance adds (ALiBi).
        weights: `[n]`, float64: the head's pattern, of all positions up to the query.
        normalizer: logarithm of the sum over all keys that the softmax divides by: a weight is
            `exp(score + softcap + distance - normalizer)`.
        sink: weight of the head's sink, which has no value; 0 for none.
        groups: sum of the weights of groups of tokens in a compressed memory, whose scores are not split.
        mlp_path: the freezing rule.
    """

    head: Head
    query: int
    by: By
    query_parts: list[Part]
    key_parts: list[Part]
    keys: list[int]
    versus: int | None
    pairs: Float[Tensor, "K P R"]
    scores: Float[Tensor, " K"]
    softcap: Float[Tensor, " K"]
    distance: Float[Tensor, " K"]
    weights: Float[Tensor, " n"]
    normalizer: float
    sink: float
    groups: float
    mlp_path: MlpPath

    @property
    def unexplained(self) -> Float[Tensor, " K"]:
        """The rest of each score: rounding."""
        return self.scores - self.pairs.sum((1, 2))

    def largest(self, k: int, most: int = PAIRS) -> list[tuple[int, int, float]]:
        """Return the largest pairs of a key, by number of their parts, and their shares."""
        flat = self.pairs[k].flatten()
        found = flat.abs().argsort(descending=True, stable=True)[:most].tolist()
        width = self.pairs.shape[2]
        return [(i // width, i % width, float(flat[i])) for i in found if flat[i] != 0]

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the head's pattern at the query, and of every key its score, its parts and their largest pairs."""
        return _whose(self.head, self.query, words) | {
            "by": self.by,
            "mlp_path": self.mlp_path,
            "weights": [words.here(i) | {"weight": float(weight)} for i, weight in enumerate(self.weights)],
            "sink": self.sink,
            "groups": self.groups,
            "normalizer": self.normalizer,
            "query_parts": [part.data(words) for part in self.query_parts],
            "key_parts": [part.data(words) for part in self.key_parts],
            "versus": None if self.versus is None else words.here(self.versus),
            "keys": [self._key(k, words) for k in range(len(self.keys))],
        }

    def _key(self, k: int, words: Words) -> dict[str, Any]:
        pairs = self.largest(k)
        return words.here(self.keys[k]) | {
            "weight": float(self.weights[self.keys[k]]),
            "score": float(self.scores[k]),
            "softcap": float(self.softcap[k]),
            "distance": float(self.distance[k]),
            "unexplained": float(self.unexplained[k]),
            "query_shares": self.pairs[k].sum(1).tolist(),
            "key_shares": self.pairs[k].sum(0).tolist(),
            "pairs": [{"query": i, "key": j, "share": share} for i, j, share in pairs],
            "others": float(self.pairs[k].sum()) - sum(share for *_, share in pairs),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: `pairs` `[K, P, R]`, `keys`, `scores`, `softcap`, `distance` `[K]`, `weights` `[n]`."""
        names = ("pairs", "scores", "softcap", "distance", "weights")
        return {name: getattr(self, name) for name in names} | {"keys": torch.tensor(self.keys)}

    def _table(self, words: Words) -> Table:
        columns: dict[str, list[Any]] = {name: [] for name in ("key", "weight", "query part", "key part", "share")}
        for k, key in enumerate(self.keys):
            rows: list[tuple[str, str, float]] = [
                (self.query_parts[i].label(words), self.key_parts[j].label(words), share)
                for i, j, share in self.largest(k)
            ]
            rows.append(("others", "", float(self.pairs[k].sum()) - sum(share for *_, share in rows)))
            rows += [(name, "", float(value[k])) for name, value in self._constants if value[k]]
            for row in rows:
                for name, cell in zip(columns, (key, float(self.weights[key]), *row), strict=True):
                    columns[name].append(cell)
        named = words.at(columns.pop("key"))
        named = {f"key {name}" if name == "token" else name.replace("position", "key"): c for name, c in named.items()}
        note = f"pairs of {self.keys[0]} sum to {float(self.pairs[0].sum()):.4f}; score {float(self.scores[0]):.4f}"
        return Table(self._title(words), named | columns, (note,), {"head": self.head.name, "query": self.query})

    @property
    def _constants(self) -> list[tuple[str, Float[Tensor, " K"]]]:
        return [("soft cap", self.softcap), ("distance", self.distance)]

    def _title(self, words: Words) -> str:
        minus = "" if self.versus is None else f", minus that of {words.labels([self.versus])[0]}"
        return f"Scores of {self.head.name} at {words.labels([self.query])[0]}{minus}, by {self.by}"

    def _plot(self, words: Words) -> Bars:
        pairs = self.largest(0)
        names = [f"{self.query_parts[i].label(words)} · {self.key_parts[j].label(words)}" for i, j, _ in pairs]
        key = words.labels([self.keys[0]])[0]
        label = f"share; all pairs sum to {float(self.scores[0]):.4f}"
        return Bars(f"{self._title(words)}: key {key}", label, names, [share for *_, share in pairs])


@dataclass(frozen=True)
class PatternFactors(Plotted):
    """The entries of a recurrence's pattern for one query of one head, as products; made by `attend`.

    Attributes:
        head: the head, or channel where each channel has a state of its own.
        query: position of the query.
        entries: `[n]`, float64: how much of each position's value the query reads.
        write: `[n]`, float64: the strength with which the position writes.
        product: `[n]`, float64: of the query and the position's key.
        kept: `[n]`, float64: that product, each channel of it times what decays have left of it.
        removed: `[n]`, float64: what the delta rule has changed of the entry since.
        own: factor of the position's own value.
    """

    head: Head
    query: int
    entries: Float[Tensor, " n"]
    write: Float[Tensor, " n"]
    product: Float[Tensor, " n"]
    kept: Float[Tensor, " n"]
    removed: Float[Tensor, " n"]
    own: float

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the factors of every position's entry; `decay` is `kept / product`, None where that is 0."""
        return _whose(self.head, self.query, words) | {
            "by": "factors",
            "own": self.own,
            "entries": [
                words.here(i) | {name: float(value[i]) for name, value in self.tensors().items()} | {"decay": decay}
                for i, decay in enumerate(self.decay)
            ],
        }

    @property
    def decay(self) -> list[float | None]:
        """What decays have left of each product; None where there is none."""
        pairs = zip(self.kept.tolist(), self.product.tolist(), strict=True)
        return [kept / product if product else None for kept, product in pairs]

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: `entries`, `write`, `product`, `kept` and `removed`, each `[n]`."""
        return {name: getattr(self, name) for name in ("entries", "write", "product", "kept", "removed")}

    def _table(self, words: Words) -> Table:
        columns = {
            "entry": self.entries.tolist(),
            "write": self.write.tolist(),
            "decay": self.decay,
            "key · query": self.product.tolist(),
            "removed": self.removed.tolist(),
        }
        note = f"entry = write × decay × (key · query) + removed; the position's own has {self.own:.4g} more"
        return Table(
            self._title(words), words.at(range(len(self.entries))) | columns, (note,), {"head": self.head.name}
        )

    def _title(self, words: Words) -> str:
        return f"Pattern of {self.head.name} ({self.head.kind}) at {words.labels([self.query])[0]}"

    def _plot(self, words: Words) -> Bars:
        return Bars(self._title(words), "entry", words.labels(range(len(self.entries))), self.entries.tolist())


def _whose(head: Head, query: int, words: Words) -> dict[str, Any]:
    """Return the data of a head at a query."""
    return {"layer": head.layer, "head": head.number, "mixer": head.kind, "query": words.here(query)}


class HeadShares(Protocol):
    """Logits that are split by head, such as `ggjac.analysis.branches.BranchShares`."""

    @property
    def heads(self) -> Float[Tensor, "m L h"] | None:
        """The share of each head of each block."""


def loudest(
    config: ModelConfig, shares: HeadShares, layer: int | None = None, head: int | None = None
) -> tuple[int, int]:
    """Return the block and number of the head with the largest share of those that can be asked about.

    Args:
        config: of the model.
        shares: of the heads of each block in logits, of which the first one counts.
        layer, head: the block or number that it must have.

    Raises:
        ValueError: there is none.
    """
    assert shares.heads is not None
    layers = range(config.block_count) if layer is None else [whole("layer", layer, 0, config.block_count - 1)]
    heads = [one for i in layers for one in heads_of(config, i) if not MIXERS[one.kind].channels]
    heads = [one for one in heads if head in (None, one.number)]  # of channels there are no shares
    if not heads:
        where = "this model" if layer is None else f"block {layer}"
        raise ValueError(f"{where} has no head{'' if head is None else f' {head}'} to choose; name a layer and a head")
    sizes = shares.heads[0].abs()
    return max(heads, key=lambda one: float(sizes[one.layer, one.number]))[:2]


def attend(
    jacobian: DetachedJacobian,
    layer: int,
    head: int,
    *,
    by: By = "block",
    keys: str | Sequence[int] | None = None,
    versus: int | None = None,
    progress: Progress | None = None,
) -> ScoreShares | PatternFactors:
    """Split the scores of a head's keys, for the query at the Jacobian's position, over pairs of parts.

    By block it takes a pass over the weights below the head's block; by token, an upward sweep there with a vector for
    each position and one for the biases, `TOKENS_AT_ONCE` at a time.

    Args:
        jacobian: of the prompt; its position is the query's.
        layer: the head's block.
        head: its number, counted through all mixers of the block; of Mamba-1, a channel.
        by: what the parts are; recurrences have factors instead, whatever it is.
        keys: positions of keys, named as `ggjac.checks.key_positions` takes them; default the `KEYS` of the largest
            weights.
        versus: position of a key whose score is subtracted from those of the others.
        progress: called as `progress("block", done, total)` after each block.

    Raises:
        ValueError: there is no such block, head or position, what mixes positions there has no heads, or has no scores
            and some are asked for, or several ranks share the model.
    """
    network, query = jacobian.network, jacobian.position
    if by not in ("block", "token"):
        raise ValueError(f"by={by!r} is unknown; known: block, token")
    if network.frame.config != network.config:
        raise ValueError("scores are not split where several ranks share a model; run it in one process")
    found = find_head(network.config, layer, head, channels=True)
    if MIXERS[found.kind].recurrent:
        if keys is not None or versus is not None:
            raise ValueError(
                f"L{layer}H{head} is of a recurrence, which has no scores and shows all entries of its pattern; leave "
                "key and versus out, or name a head of attention"
            )
        return _factors(network, found, query)
    scored = _scored(network, found, query)
    versus = None if versus is None else key_positions([versus], query, "versus")[0]
    chosen = _chosen(scored.weights, keys, versus)
    places = [*chosen, *([] if versus is None else [versus])]
    (asks, of_query), (answers, of_key) = scored.sides
    at = [(asks.layer, [query]), (answers.layer, places)]
    (query_parts, u), (key_parts, v) = _split(jacobian, at, by, progress)
    Q = asks.split(u, slice(query, query + 1), of_query)  # [P, 1, s]
    K = answers.split(v, torch.tensor(places), of_key)  # [R, K, s]
    pairs = scored.scale * torch.einsum("ps,rks->kpr", Q[:, 0], K)
    capped, logits, scores = (part[places] for part in (scored.capped, scored.logits, scored.scores))
    softcap, distance = capped - scores, torch.where(logits.isfinite(), logits - capped, 0)
    if versus is not None:
        pairs, scores, softcap, distance = (part[:-1] - part[-1] for part in (pairs, scores, softcap, distance))
    return ScoreShares(
        head=found,
        query=query,
        by=by,
        query_parts=query_parts,
        key_parts=key_parts,
        keys=chosen,
        versus=versus,
        pairs=pairs,
        scores=scores,
        softcap=softcap,
        distance=distance,
        weights=scored.weights,
        normalizer=scored.normalizer,
        sink=scored.sink,
        groups=scored.groups,
        mlp_path=jacobian.mlp_path,
    )


def _chosen(weights: Float[Tensor, " n"], asked: str | Sequence[int] | None, versus: int | None) -> list[int]:
    """Return the positions of the keys to split: those asked for, or the largest; without `versus`."""
    if asked is None:
        order = weights.argsort(descending=True, stable=True).tolist()
        given = [key for key in order if weights[key] > 0]
    else:
        given = key_positions(asked, len(weights) - 1)
    chosen = [key for key in given if key != versus]
    if not chosen:
        raise ValueError(f"no key is left beside position {versus}, whose score is subtracted; name another one")
    return chosen[:KEYS] if asked is None else chosen


# ----------------------------------------------------------------------------------------------------------------------
# Queries and keys


class _Side(NamedTuple):
    """The queries or the keys of a head, as functions of the stream at the input of a block.

    Attributes:
        network: the frozen network.
        layer: the block.
        kind: of the mixer.
        make: `ggjac.blocks.queries` or `keys`.
    """

    network: FrozenNetwork
    layer: int
    kind: str
    make: Callable[..., Made]

    def at(self, positions: Positions) -> tuple[LinearOperator, Made]:
        """Return how the mixer reads the stream at some positions, and the queries or keys that it makes there."""
        network = self.network
        read = _reading(network, self.layer, positions)
        h = affine(read, network.tapes[self.layer].x[positions])
        weights = network.weights(self.layer, live=False)  # a sweep does not need them
        return read, self.make(weights, network.frame, self.layer, self.kind, h, positions)

    def value(self, positions: Positions, size: int) -> Float[Tensor, "m h s"]:
        """Return queries or keys as the forward pass made them, in heads of some size."""
        return self.at(positions)[1].value.cpu().double().unflatten(1, (-1, size))

    def split(self, parts: Float[Tensor, "P m w"], places: Positions, part: slice) -> Float[Tensor, "P m s"]:
        """Return what a head's queries or keys have of each part of the stream; the last part gets the constant."""
        read, made = self.at(places)
        last = parts.new_zeros(len(parts))
        last[-1] = 1
        return (made.operator @ read).matmat(parts, last)[:, :, part].cpu().double()


def _reading(network: FrozenNetwork, layer: int, positions: Positions) -> LinearOperator:
    """Return what a block's mixers read of the stream at some positions, `[m, i]` to `[m, d]`."""
    tape = network.tapes[layer]
    parts: list[LinearOperator] = []
    if tape.attn.norm_in is not None:
        parts.append(tape.attn.norm_in.at(positions).operator())
    if tape.entry is not None:
        parts.append(entering(network.weights(layer), network.frame.config, tape.entry.at(positions)))
    x = tape.x[positions]
    return Chain(*parts) if parts else Identity(x.shape, dtype=x.dtype, device=x.device)


class _Scores(NamedTuple):
    """A head's scores at a query, of all `n` keys up to it, in float64.

    Attributes:
        sides: of the queries and of the keys, and the channels of this head there.
        scale: of the products.
        scores: before the soft cap.
        capped: after it.
        logits: with what the distance adds; -inf for keys outside the window.
        weights: of the recorded pattern.
        normalizer, sink, groups: as `ScoreShares` has them.
    """

    sides: tuple[tuple[_Side, slice], tuple[_Side, slice]]
    scale: float
    scores: Float[Tensor, " n"]
    capped: Float[Tensor, " n"]
    logits: Float[Tensor, " n"]
    weights: Float[Tensor, " n"]
    normalizer: float
    sink: float
    groups: float


def _scored(network: FrozenNetwork, head: Head, query: int) -> _Scores:
    """Score all keys of a head for a query."""
    config, layer = network.frame.config, head.layer
    own, tape = config.layers[layer], network.tapes[layer]
    mixer = next(mixer for mixer in tape.attn.mixers if mixer.kind == head.kind)
    source, kind = (layer, head.kind) if MIXERS[head.kind].values else (own.source or 0, "attention")
    asks, answers = _Side(network, layer, head.kind, queries), _Side(network, source, kind, keys)
    q = asks.value(slice(query, query + 1), own.key_size)
    k = answers.value(slice(0, query + 1), own.key_size)
    group = head.own // (q.shape[1] // k.shape[1])
    of_query, of_key = (slice(i * own.key_size, (i + 1) * own.key_size) for i in (head.own, group))
    scores = attention_scores(q, k, own.attention_scale)
    capped = attention_logits(scores, softcap=config.attention_softcap)
    logits = attention_logits(scores, softcap=config.attention_softcap, window=own.window, alibi=own.alibi)
    scores, capped, logits = (part[head.own, 0] for part in (scores, capped, logits))
    assert mixer.pattern is not None
    weights = mixer.pattern[head.own, query, : query + 1].cpu().double()
    groups = 0.0
    if mixer.memory is not None and mixer.memory.pattern is not None:
        groups = float(mixer.memory.pattern[head.own, query].cpu().double().sum())
    w, all_logits = network.weights(layer, live=False), logits
    if "attn_sinks.weight" in w:
        all_logits = torch.cat([logits, w.vector("attn_sinks.weight")[head.own, None].cpu().double()])
    normalizer = float(all_logits.logsumexp(0)) - math.log1p(-min(groups, 1 - 2.0**-53))  # rounding may leave nothing
    return _Scores(
        sides=((asks, of_query), (answers, of_key)),
        scale=own.attention_scale,
        scores=scores,
        capped=capped,
        logits=logits,
        weights=weights,
        normalizer=normalizer,
        sink=math.exp(float(all_logits[-1]) - normalizer) if len(all_logits) > len(logits) else 0.0,
        groups=groups,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Parts of the stream

# A block, and positions at its input.
_Place = tuple[int, list[int]]
_Split = tuple[list[Part], Float[Tensor, "P m w"]]


def _split(jacobian: DetachedJacobian, asked: Sequence[_Place], by: By, progress: Progress | None) -> list[_Split]:
    """Return the parts of the stream at the input of each block, at its positions; the last are the biases."""
    network, (n, d) = jacobian.network, jacobian.network.x.shape
    floats = chunk_floats(n, d, network.frame.config.hidden_units)
    at_once = max(1, min(TOKENS_AT_ONCE, jacobian.chunk_bytes // (floats * network.x.itemsize)))
    last = max(block for block, _ in asked)
    most = max(place for _, each in asked for place in each) + 1
    total, steps = last * (1 if by == "block" else math.ceil((most + 1) / at_once)), count(1)

    def report() -> None:
        if progress:
            progress("block", next(steps), total)

    if by == "block":
        return _by_block(network, asked, report)
    return _by_token(network, asked, at_once, report)


def _by_block(network: FrozenNetwork, asked: Sequence[_Place], report: Callable[[], None]) -> list[_Split]:
    """Return what earlier blocks' branches wrote of the stream at each block and its positions; the biases last.

    A branch is applied to the stream that the trace recorded; what it adds goes past all later branches.
    """
    config, x = network.frame.config, network.x
    places = sorted({place for _, each in asked for place in each})
    at = torch.tensor(places)
    rows = at - places[0]
    parts, names = torch.stack([torch.zeros_like(x[at]), x[at]]), [Part("biases"), Part("embedding")]
    constant = x.new_tensor([1.0, 0.0])  # of the parts: the first one gets what is constant on the way
    span, one, banks = range(places[0], places[-1] + 1), x.new_ones(1), dict[int, Tensor]()
    found: dict[int, _Split] = {}
    last = max(block for block, _ in asked)
    for i, tape, frozen in network.walk(span):
        if any(block == i for block, _ in asked):
            found[i] = [*names[1:], names[0]], parts.roll(-1, 0)
        if i == last:
            break
        if tape.entry is not None:
            parts = entering(network.weights(i), config, tape.entry.at(at)).matmat(parts, constant)
        stream, attn = frozen.matmat_attn(tape.x[None, : places[-1] + 1], one, banks)
        written = attn[:, -len(span) :][:, rows]  # a copy
        if tape.attn.mixers:
            parts, constant = _taken_up(config, tape.attn, at, parts, constant, written)
            names.append(Part("attn", i, mixer=name_of_mixers(tape.attn.kinds)))
        middle, mlp = frozen.matmat_ffn(stream, attn, one)
        written = mlp[:, rows]
        if not tape.ffn.empty:
            parts, constant = _taken_up(config, tape.ffn, at, parts, constant, written)
            names.append(Part("mlp", i))
        if frozen.inputs is not None:
            parts[-1] += frozen.inputs.matmat(frozen.written(middle, mlp), one)[0, rows]
        if frozen.scale is not None:
            parts = parts * frozen.scale
        report()
    return [
        (found[block][0], found[block][1][:, torch.tensor([places.index(p) for p in each])]) for block, each in asked
    ]


def _taken_up(
    config: ModelConfig,
    tape: AttentionTape | FFNTape,
    places: Int[Tensor, " m"],
    parts: Float[Tensor, "P m i"],
    constant: Float[Tensor, " P"],
    written: Float[Tensor, "1 m d"],
) -> tuple[Float[Tensor, "O m o"], Float[Tensor, " O"]]:
    """Return the parts of the stream after a branch, with what it has written as a further one."""
    past = skip(config, tape, places)
    parts = parts if past is None else past.matmat(parts, constant)
    spread = written if tape.streams is None else tape.streams.at(places).spread(config.d).matmat(written)
    return torch.cat([parts, spread]), torch.cat([constant, constant.new_zeros(1)])


def _by_token(
    network: FrozenNetwork, asked: Sequence[_Place], at_once: int, report: Callable[[], None]
) -> list[_Split]:
    """Return what each input embedding became of the stream at each block and its positions; the biases last."""
    x, m = network.x, max(place for _, each in asked for place in each) + 1
    last = max(block for block, _ in asked)
    names = [*(Part("token", None, i) for i in range(m)), Part("biases")]
    found: list[list[Tensor]] = [[] for _ in asked]
    for part in torch.arange(m + 1).split(at_once):
        X, t = x.new_zeros(len(part), m, x.shape[1]), (part == m).to(x)
        tokens = part[part < m]
        X[torch.arange(len(tokens)), tokens] = x[tokens]
        banks: dict[int, Tensor] = {}
        for i, _, frozen in network.walk(range(m)):
            for (block, places), kept in zip(asked, found, strict=True):
                if block == i:
                    kept.append(X[:, torch.tensor(places)])
            if i == last:
                break
            X = frozen.matmat(X, t, banks)
            report()
    return [(names, torch.cat(kept)) for kept in found]


# ----------------------------------------------------------------------------------------------------------------------
# Recurrences


def _factors(network: FrozenNetwork, head: Head, query: int) -> PatternFactors:
    """Split a row of a recurrence's pattern into factors."""
    found = _recurrence(network, head, query + 1)
    n, one = len(found.k), found.k.new_ones(1)
    basis = torch.eye(n, dtype=one.dtype)[:, None]  # [n, 1, n]
    row = found.run(basis, one.new_zeros(1, found.k.shape[2], n))[0][query, 0]
    q, k, write = found.q[query, 0], found.k[:, 0], found.write[:, 0]
    logs = found.log_decay[:, 0].expand_as(k)
    sums = logs.cumsum(0)
    # Since position s wrote: decays of s + 1 to the query, or to the one before it where queries read first.
    since = (sums[query] - (logs[query] if found.before else 0)) - sums
    decay = since.exp()
    if found.before:
        decay[query] = 0  # not read
    products = q * k
    kept = (products * decay).sum(1)
    own = 0.0 if found.skip is None else float(found.skip[query, 0])
    entries = row.clone()
    removed = entries - write * kept
    removed[query] -= own
    return PatternFactors(head, query, entries, write, products.sum(1), kept, removed, own)


def _recurrence(network: FrozenNetwork, head: Head, n: int) -> Recurrence:
    """Return the recurrence of one head, or channel, at the first `n` positions, on the host in float64."""
    mixer = next(mixer for mixer in network.tapes[head.layer].attn.mixers if mixer.kind == head.kind)
    if (channels := mixer.channels) is not None:
        step = channels.step[:n, head.own, None]
        found = Recurrence(
            q=channels.query[:n, None],
            k=channels.key[:n, None],
            log_decay=(step * channels.rate[head.own])[:, None],
            write=step,
            removes=False,
            skip=channels.skip[head.own].expand(n, 1),
        )
    else:
        h = affine(_reading(network, head.layer, slice(n)), network.tapes[head.layer].x[:n])
        recorded = record_mixer(network.weights(head.layer, live=False), network.frame, head.layer, head.kind, h)
        assert recorded.recurrence is not None
        one = slice(head.own, head.own + 1)
        parts = {name: part[:, one] for name, part in recorded.recurrence._asdict().items() if isinstance(part, Tensor)}
        found = recorded.recurrence._replace(**parts)  # type: ignore[arg-type]
    wide = {name: part.cpu().double() for name, part in found._asdict().items() if isinstance(part, Tensor)}
    return found._replace(**wide)  # type: ignore[arg-type]
