"""The maps to, through and from every depth, decoded, and the logit lens (Golden, arXiv 2505.24293, section 3.4).

A map is one of

    cumulative  from the input embeddings to the tap
    blockwise   of the tap's block alone: from the residual stream before it to the tap
    to_end      from the residual stream at this depth to the output

and ends at a tap seen through the final norm frozen there, as a logit lens sees it (at the output: the final norm's own
value). All cumulative maps advance in the same sweeps, so do all maps to the end; blocks alone come one after another.
In each, every weight is dequantized once per sweep.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise, product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ggjac import units
from ggjac.checks import whole
from ggjac.config import Layer
from ggjac.decode import Head, Ranked, top_logits
from ggjac.frobenius import StableRank, exact_stable_rank, squared_norm, stable_ranks
from ggjac.jacobian import DetachedJacobian, Progress, SharedSweep, Span, Tap
from ggjac.results import NO_WORDS, Plotted, Points, Prompt, Table, Words
from ggjac.sizes import EXACT_ROWS, KINDS, MAPS, PROBES, Kind, MapName
from ggjac.svd import (
    CLOSE,
    SVD,
    Following,
    Method,
    Triplets,
    roughly_first,
    svd_of_triplets,
    svd_together,
    triplets_of_matrix,
)
from ggjac.ways import decomposition, take_matrices

# The most tokens that are followed through the depths by rank.
MAX_TOKENS = 4000


@dataclass(frozen=True)
class LayerMap:
    """One map, its leading singular triplets, and how many directions it uses.

    Attributes:
        map: which of the three.
        tap: the depth it is about: where it ends, or, for `to_end`, where it begins.
        span: from which depth to which tap.
        U: `[k, d]`, left singular vectors, signed to point along the map's own output: `⟨A x, u⟩ >= 0`, `x` being the
            stream at the start of the span.
        S: `[k]`, singular values.
        residual: `[k]`, as in `ggjac.svd.SVD`.
        method, sweeps, rough_sweeps, stopped_by: of its decomposition, as in `ggjac.svd.SVD`.
        following: the next singular value, as in `ggjac.svd.SVD`.
        first: the share of the first right vector's squared norm at position 0, of the `positions` that it reads.
        stable_rank: of the map.
        transported: `[k, d]`, each left vector carried on to the output, if that was asked for: the stream vector at
            the output position that the tap's norm turns into `u`, sent through the blocks that follow.
        left: tokens of highest logit for each left vector, `[k, top]`.
        arriving: tokens of highest logit for each transported vector, `[k, top]`.
    """

    map: MapName
    tap: Tap
    span: Span
    U: Float[Tensor, "k d"]
    S: Float[Tensor, " k"]
    residual: Float[Tensor, " k"]
    method: Method
    sweeps: int
    rough_sweeps: int
    stopped_by: str
    following: Following | None
    first: float
    positions: int
    stable_rank: StableRank
    transported: Float[Tensor, "k d"] | None
    left: Ranked
    arriving: Ranked | None

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return where the map ends, and its triplets with the tokens that their left vectors promote.

        `index` is a depth, in blocks applied; maps of one block, or to its attention or MLP, have its `block` too.
        """

        def tokens(ranked: Ranked, j: int) -> list[dict[str, Any]]:
            return words.ranked(*ranked.part(j))

        return {
            "map": self.map,
            "kind": self.tap.kind,
            "index": self.tap.index,
            **({} if self.tap.kind == "layer" and self.map != "blockwise" else {"block": self.tap.index - 1}),
            "method": self.method,
            "sweeps": self.sweeps,
            "rough_sweeps": self.rough_sweeps,
            "stopped_by": self.stopped_by,
            "next_singular_value": self.following and self.following._asdict(),
            "sink": words.sink(self.first, self.positions),
            "stable_rank": self.stable_rank.data(),
            "triplets": [
                {"singular_value": float(self.S[j]), "residual": float(self.residual[j]), "left": tokens(self.left, j)}
                | ({} if self.arriving is None else {"arriving": tokens(self.arriving, j)})
                for j in range(len(self.S))
            ],
        }


@dataclass(frozen=True)
class Readout(Plotted):
    """The residual stream itself at every depth, through final norm and head.

    Attributes:
        depths: `m` numbers of blocks applied, from 0.
        top: the most likely tokens at each depth, `[m, top]`; scores are probabilities.
        tokens: `[t]`, ids of the tokens that are followed, the most important first.
        ranks: `[m, t]`, the rank of each of them at each depth, from 1; equal logits share the best rank.
    """

    depths: list[int]
    top: Ranked
    tokens: Int[Tensor, " t"]
    ranks: Int[Tensor, "m t"]

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the likely tokens of each depth (`readout`), and the ranks of the tokens that are followed."""
        return {
            "readout": [
                {
                    "index": depth,
                    "top": [
                        words.token(id) | {"probability": float(chance)}
                        for id, chance in zip(self.top.ids[i], self.top.scores[i], strict=True)
                    ],
                }
                for i, depth in enumerate(self.depths)
            ],
            "ranks": {
                "tokens": [words.token(id) for id in self.tokens],
                "depths": [
                    {"index": depth, "ranks": ranks.tolist()}
                    for depth, ranks in zip(self.depths, self.ranks, strict=True)
                ],
            },
        }

    def _table(self, words: Words) -> Table:
        columns = {
            "depth": self.depths,
            "probability": self.top.scores[:, 0].tolist(),
            **words.column("tokens", self.top.ids.tolist()),
            "rank": self.ranks[:, 0].tolist(),
        }
        note = f"probability: of the first token; rank: of {words.name(int(self.tokens[0]))}"
        return Table("The stream at every depth, through final norm and head", columns, (note,))

    def _plot(self, words: Words) -> Points:
        name = words.name(int(self.tokens[0]))
        series = {name: (self.depths, self.ranks[:, 0].tolist(), ())}
        return Points(f"Rank of {name} by depth", "depth", "rank", series, log=True, flipped=True)


class DirectionPath(NamedTuple):
    """The path to the output's directions, depth by depth (paper, analysis A14).

    Attributes:
        depths: `m` numbers of blocks applied; the last is the output.
        values: `[m, k]`, `s_k(l) ⟨u_k(l), u_k(L)⟩ / s_k(L)` of the cumulative `layer` maps: 1 at the end.
    """

    depths: list[int]
    values: Float[Tensor, "m k"]


@dataclass(frozen=True)
class Layers(Plotted):
    """The maps in the order of `MAPS`, of `KINDS` and of depth, and the readout.

    Attributes:
        maps: those that were asked for.
        readout: of the residual stream at every depth.
        path: to the output's directions; None where the map to the output was not asked for.
        tol: relative residual that was asked of every triplet.
        seed: of the random starts and probes.
        hide_special: whether the decoding of vectors left out control, unused and byte tokens; the readout has all.
    """

    maps: list[LayerMap]
    readout: Readout
    path: DirectionPath | None
    tol: float
    seed: int
    hide_special: bool = False

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return maps (`taps`), readout, ranks and path."""
        path = self.path
        return {
            "seed": self.seed,
            "tol": self.tol,
            "hide_special": self.hide_special,
            "converged": all(bool((m.residual <= self.tol).all()) for m in self.maps),
            "stopped_by": "sweeps" if any(m.stopped_by == "sweeps" for m in self.maps) else "tolerance",
            "taps": [m.data(words) for m in self.maps],
            **self.readout.data(words),
            # A path is drawn in two dimensions.
            "path": None
            if path is None or path.values.shape[1] < 2
            else [
                {"index": depth, "values": values.tolist()}
                for depth, values in zip(path.depths, path.values, strict=True)
            ],
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved, named as `cumulative.attn.U`.

        For each map and kind: `index` [m] (blocks applied), `U` [m, k, d], `S` and `residual` [m, k], `stable_rank`
        [m, 2] (value, standard error) and, if they were transported, `transported` [m, k, d]; for all depths `ranks`
        [depths, t] of the tokens `ranked_ids` [t].
        """
        found = {"ranks": self.readout.ranks, "ranked_ids": self.readout.tokens}
        for name, kind in product(MAPS, KINDS):
            own = [m for m in self.maps if (m.map, m.tap.kind) == (name, kind)]
            if not own:
                continue
            ranks = [(m.stable_rank.value, m.stable_rank.error) for m in own]
            parts = {
                "index": torch.tensor([m.tap.index for m in own]),
                "U": torch.stack([m.U for m in own]),
                "S": torch.stack([m.S for m in own]),
                "residual": torch.stack([m.residual for m in own]),
                "stable_rank": torch.tensor(ranks, dtype=torch.float64),
            }
            carried = [m.transported for m in own if m.transported is not None]
            if carried:
                parts["transported"] = torch.stack(carried)
            found |= {f"{name}.{kind}.{part}": values for part, values in parts.items()}
        return found

    def _table(self, words: Words) -> Table:
        rows = [(m, j) for m in self.maps for j in range(len(m.S))]
        columns: dict[str, Sequence[Any]] = {
            "map": [m.map for m, _ in rows],
            "kind": [m.tap.kind for m, _ in rows],
            "depth": [m.tap.index for m, _ in rows],
            "stable rank": [m.stable_rank.value for m, _ in rows],
            "next sigma": [m.following and m.following.value for m, _ in rows],
            "vector": [j + 1 for _, j in rows],
            "sigma": [float(m.S[j]) for m, j in rows],
            "residual": [float(m.residual[j]) for m, j in rows],
            **words.column("left", [m.left.ids[j].tolist() for m, j in rows]),
        }
        return Table("Singular triplets of every map", columns, ("left: tokens the vector promotes",))

    def exhibits(self, trace: Prompt | None = None) -> list[Table]:
        """Return the layer grid of every map: a row for each depth, a column with the tokens of each left vector."""
        words = Words(trace)
        return [
            _grid(name, kind, own, words)
            for name, kind in product(MAPS, KINDS)
            if (own := [m for m in self.maps if (m.map, m.tap.kind) == (name, kind)])
        ]

    def _plot(self, words: Words) -> Points:
        first = self.maps[0].map if self.maps else None
        found = {kind: [m for m in self.maps if (m.map, m.tap.kind) == (first, kind)] for kind in KINDS}
        series: dict[str, tuple[list[int], list[float], list[float]]] = {
            kind: (
                [m.tap.index for m in own],
                [m.stable_rank.value for m in own],
                [m.stable_rank.error for m in own],
            )
            for kind, own in found.items()
        }
        title = f"Stable rank by depth, {first.replace('_', ' ')} maps" if first else "Stable rank by depth"
        return Points(title, "depth", "stable rank", series, parts=tuple(series))


def _grid(name: MapName, kind: Kind, maps: Sequence[LayerMap], words: Words) -> Table:
    """Return the maps to one kind of tap as a grid."""
    of_block = kind != "layer" or name == "blockwise"
    places = [f"L{m.tap.index - 1}" if of_block else m.tap.index for m in maps]
    columns: dict[str, Sequence[Any]] = {"block" if of_block else "depth": places}
    columns |= {"σ1": [float(m.S[0]) for m in maps], "stable rank": [m.stable_rank.value for m in maps]}
    for j in range(min(len(m.S) for m in maps)):
        columns |= words.column(f"u{j + 1}", [m.left.ids[j].tolist() for m in maps])
    place = "block: counted from 0" if of_block else "depth: number of blocks applied"
    note = f"{place}; u: tokens that each left singular vector promotes"
    return Table(f"{name.replace('_', ' ')} maps, {kind}", columns, (note,))


class _Found(NamedTuple):
    """A `LayerMap` before its vectors are decoded."""

    map: MapName
    tap: Tap
    span: Span
    U: Tensor
    S: Tensor
    residual: Tensor
    method: Method
    sweeps: int
    rough_sweeps: int
    stopped_by: str
    following: Following | None
    first: float
    positions: int
    stable_rank: StableRank
    transported: Tensor | None


def layers(
    jacobian: DetachedJacobian,
    rank: int = 8,
    *,
    maps: Sequence[MapName] = MAPS,
    kinds: Sequence[Kind] = KINDS,
    depths: Sequence[int] | None = None,
    top: int = 8,
    hide_special: bool = False,
    transport: bool = False,
    tol: float = 1e-3,
    seed: int = 0,
    max_sweeps: int = 40,
    search_dtype: torch.dtype | None = None,
    probes: int = PROBES,
    progress: Progress | None = None,
) -> Layers:
    """Decompose the maps of every depth, and read the residual stream there with a logit lens.

    Positions that the Jacobian excludes are no input of any of these maps: of those that start inside the network, it
    is the stream at these positions that is held at the prompt's own. Through later blocks it may carry what others
    have written there before; that part is left out of maps to the end.

    Args:
        jacobian: of the prompt and position, with the journal that is to remember sweeps, if any; its span does not
            matter.
        rank: triplets of each map.
        maps: which of `MAPS`.
        kinds: taps of cumulative and blockwise maps; maps to the end begin at the stream.
        depths: numbers of blocks applied, 0 to all; default all. No map ends at 0, none to the end begins at the last.
        top: tokens for each vector and depth.
        hide_special: leave control, unused and byte tokens out of the decoding of vectors.
        transport: carry the left vectors of cumulative `layer` maps to the output; two more upward sweeps.
        tol, seed, max_sweeps: of each iteration, as `ggjac.svd.svd` takes them.
        search_dtype: as `DetachedJacobian.svd` takes it.
        probes: of stable ranks, where they are estimated (beyond `EXACT_ROWS` outputs).
        progress: called as `progress(what, blocks done, blocks in all)`.

    Raises:
        ValueError: a map or a kind is unknown, or a depth, rank, `top`, `tol`, `max_sweeps` or `seed` is out of range.
    """
    top = whole("top", top)
    for name, given, known in (("map", maps, MAPS), ("kind", kinds, KINDS)):
        if isinstance(given, str) or not set(given) <= {*known}:
            raise ValueError(f"{name}s {given!r}: give some of {', '.join(known)}, in a list")
    head, L = jacobian.network.head, jacobian.end.index
    chosen = sorted({whole("depth", depth, None) for depth in (range(L + 1) if depths is None else depths)})
    if chosen and not 0 <= chosen[0] <= chosen[-1] <= L:
        wrong = chosen[0] if chosen[0] < 0 else chosen[-1]
        raise ValueError(f"depth {wrong} is out of range; this model has depths 0 to {L}, counted in blocks applied")
    found: list[_Found] = []
    for name in MAPS:
        for part in shared(name, kinds, chosen, jacobian.network.frame.config.layers) if name in maps else ():
            run = _Group(jacobian, name, [span for _, span in part], progress)
            if run.takes_matrices(rank):
                triplets, ranks = run.by_matrices(rank, tol)
            else:
                triplets = run.svd(rank, search_dtype, seed, tol=tol, max_sweeps=max_sweeps)
                ranks = run.stable_ranks(triplets, probes, seed)
            carried = _transported(run, triplets) if transport and name == "cumulative" else [None] * len(part)
            found += [
                _Found(
                    *(name, tap, span, t.U, t.S, t.residual, t.method, t.sweeps, t.rough_sweeps, t.reason),
                    *(t.following, float(t.Vh[0, 0].square().sum()), jacobian.position + 1, stable, arrived),
                )
                for (tap, span), t, stable, arrived in zip(part, triplets, ranks, carried, strict=True)
            ]
    found.sort(key=lambda f: (MAPS.index(f.map), KINDS.index(f.tap.kind), f.tap.index))

    hidden = jacobian.hidden_ids(hide_special)
    left = _decoded(head, [f.U for f in found], top, hidden)
    arriving = _decoded(head, [f.transported for f in found], top, hidden)
    results = [
        LayerMap(**f._asdict(), left=words, arriving=others)
        for f, words, others in zip(found, left, arriving, strict=True)
    ]
    readout = _readout(jacobian, head, [m.left.ids for m in results], top)
    return Layers(results, readout, direction_path(results, jacobian.end), tol, seed, hide_special)


def shared(
    name: MapName, kinds: Sequence[Kind], depths: Sequence[int], blocks: Sequence[Layer]
) -> Iterator[list[tuple[Tap, Span]]]:
    """Yield the maps that advance together, to taps that the blocks have: each with its depth, and its span."""
    end = Tap("layer", len(blocks))
    taps = [Tap(kind, i) for kind in KINDS if kind in kinds for i in depths if i > 0 and kind in blocks[i - 1].taps]
    if name == "to_end":
        together = [[(Tap("layer", i), Span(i, end)) for i in depths if i < end.index]]
    elif name == "cumulative":
        together = [[(tap, Span(0, tap)) for tap in taps]]
    else:  # they share no weight, and less memory is taken one after another
        together = [[(tap, Span(i - 1, tap)) for tap in taps if tap.index == i] for i in depths]
    yield from filter(None, together)


class _Group:
    """Maps that advance in shared sweeps."""

    def __init__(
        self,
        jacobian: DetachedJacobian,
        name: str,
        spans: list[Span],
        progress: Progress | None,
    ):
        network, position, raw = jacobian.network, jacobian.position, jacobian.sweep.raw
        self.jacobian, self.spans, self.progress = jacobian, spans, progress
        ends = {span.tap.index for span in spans}
        self.name = name.replace("_", " ") + (f" {ends.pop()}" if name == "blockwise" else "")
        self.operators = [DetachedJacobian(network, position, span, raw=raw) for span in spans]  # for their shapes
        self.sweep = self.sweeping(spans, raw=raw, exclude=jacobian.exclude)
        self.report_as(self.name)

    def sweeping(self, spans: list[Span], *, raw: bool, exclude: Sequence[int] = ()) -> SharedSweep:
        """Return sweeps along some spans."""
        jacobian = self.jacobian
        how: dict[str, Any] = {"raw": raw, "exclude": exclude, "journal": jacobian.sweep.journal}
        return SharedSweep(jacobian.network, spans, jacobian.position, **how)

    def report_as(self, what: str, sweep: SharedSweep | None = None) -> None:
        """Report the next sweeps under a name."""
        sweep = sweep or self.sweep
        if self.progress:
            report = self.progress
            sweep.progress = lambda done, total: report(f"{what}, block", done, total)

    def takes_matrices(self, rank: int) -> bool:
        """Return whether the matrices of all maps are the cheaper way, as `ggjac.ways` decides."""
        network, (n, _) = self.jacobian.network, self.jacobian.in_shape
        spans = [(span.start, span.tap.index) for span in self.spans]
        return take_matrices(network.config, rank, n, self.jacobian.dtype.itemsize, spans)

    def by_matrices(self, rank: int, tol: float) -> tuple[list[SVD], list[StableRank]]:
        """Return what `svd` and `stable_ranks` return, from the matrices of the maps, one after another."""
        self.report_as(f"{self.name}, matrices")
        tapes = self.jacobian.network.tapes

        def kept(j: int, matrix: Tensor) -> list[Tensor]:
            wide = matrix.flatten(1)
            output = wide @ tapes[self.spans[j].start].x.flatten()
            squared = torch.tensor(squared_norm(matrix), dtype=torch.float64)
            iterated = tol >= CLOSE and decomposition(rank, len(wide), wide.shape[1], wide.itemsize).iterated
            return [output, squared, *triplets_of_matrix(wide, rank, iterated=iterated)]

        triplets, ranks = [], []
        for A, (output, squared, *parts) in zip(self.operators, self.sweep.of_matrices(kept), strict=True):
            found = svd_of_triplets(Triplets(*parts), rank, tol=tol, sweeps=1)
            found = replace(found, Vh=found.Vh.unflatten(1, A.in_shape))
            triplets.append(found.pointing_along(output))
            ranks.append(exact_stable_rank(found, float(squared)))
        return triplets, ranks

    def svd(self, rank: int, search_dtype: torch.dtype | None, seed: int, **options: Any) -> list[SVD]:
        """Return the triplets of each map, left vectors signed to point along the image of its stream."""
        self.report_as(f"{self.name}, sweep 1")

        def swept(sweeps: int, worst: float) -> None:
            self.report_as(f"{self.name}, sweep {sweeps + 1}{units.worst(worst)}")

        up, down = self.sweep.up, self.sweep.down
        block = self.jacobian.block(rank, math.prod(self.jacobian.in_shape))
        solve = partial(svd_together, self.operators, rank, up=up, down=down, block=block, seed=seed)
        found = roughly_first(solve, self.sweep.rounded, search_dtype, progress=swept, **options)
        self.report_as(f"{self.name}, signs")
        tapes = self.jacobian.network.tapes
        outputs = self.sweep.up([tapes[span.start].x[None] for span in self.spans])
        return [triplets.pointing_along(output[0]) for triplets, output in zip(found, outputs, strict=True)]

    def stable_ranks(self, triplets: list[SVD], probes: int, seed: int) -> list[StableRank]:
        """Return the stable rank of each map."""
        self.report_as(f"{self.name}, stable rank")
        exact = self.operators[0].out_shape[0] <= EXACT_ROWS
        chunk = self.jacobian.rows_at_once(len(self.spans)) if exact else None
        down = self.sweep.down
        return stable_ranks(self.operators, triplets, down=down, chunk=chunk, probes=probes, seed=seed)


def _transported(run: _Group, triplets: list[SVD]) -> list[Tensor | None]:
    """Carry the left vectors of cumulative `layer` maps to the output; None for other taps.

    A left vector is the norm's image of the stream vector `A v / s`, where `A` is the map without the norm. That stream
    vector, at the position read and nowhere else, goes through the blocks that follow.
    """
    end, position = run.jacobian.end, run.jacobian.position
    n = run.jacobian.in_shape[0]
    carried: list[Tensor | None] = [
        t.U if span.tap == end else None for span, t in zip(run.spans, triplets, strict=True)
    ]
    inner = [j for j, span in enumerate(run.spans) if span.tap.kind == "layer" and span.tap != end]
    if not inner:
        return carried
    below = run.sweeping([run.spans[j] for j in inner], raw=True)
    above = run.sweeping([Span(run.spans[j].tap.index, end) for j in inner], raw=run.sweep.raw)
    for sweep in (below, above):
        run.report_as(f"{run.name}, transport", sweep)
    streams = below.up([triplets[j].Vh.to(run.jacobian.dtype) for j in inner])
    placed = []
    for j, stream in zip(inner, streams, strict=True):
        S = triplets[j].S.to(stream)
        X = stream.new_zeros(len(stream), n, stream.shape[1])
        X[:, position] = stream / torch.where(S > 0, S, 1)[:, None]
        placed.append(X)
    for j, arrived in zip(inner, above.up(placed), strict=True):
        carried[j] = arrived.to(triplets[j].U)
    return carried


def _decoded(head: Head, stacks: Sequence[Tensor | None], top: int, hidden: Sequence[int]) -> list[Any]:
    """Decode several stacks of directions in one pass over the head, each to a `Ranked`; None stays None."""
    present = [stack for stack in stacks if stack is not None]
    if not present:
        return [None] * len(stacks)
    every = top_logits(head.matrix, torch.cat(present).to(head.matrix.dtype), top, hidden=hidden)
    ends = accumulate(map(len, present), initial=0)
    parts = (every.part(slice(*ends_of)) for ends_of in pairwise(ends))
    return [None if stack is None else next(parts) for stack in stacks]


def direction_path(maps: Sequence[LayerMap], end: Tap) -> DirectionPath | None:
    """Return how far each direction of the output has come at each depth; None where the last depth is missing."""
    steps = [m for m in maps if m.map == "cumulative" and m.tap.kind == "layer"]
    if not steps or steps[-1].tap != end:
        return None
    last = steps[-1]
    lengths = last.S * last.U.square().sum(1)
    values = [m.S * (m.U * last.U).sum(1) / torch.where(lengths > 0, lengths, 1) for m in steps]
    return DirectionPath([m.tap.index for m in steps], torch.stack(values))


def _readout(jacobian: DetachedJacobian, head: Head, words: Sequence[Tensor], top: int) -> Readout:
    """Read the stream at every depth through norm and head, and rank there all tokens that are named anywhere."""
    network, position, L = jacobian.network, jacobian.position, jacobian.end.index
    streams = [network.tapes[i].x[position][None] for i in range(L)]
    normed = [network.freeze_norm(h).apply(h)[0] for h in streams]
    logits = head.logits(torch.stack([*normed, network.outputs[position]]))
    ids, chances = zip(*map(_likely, logits, [top] * (L + 1)), strict=True)
    best = Ranked(torch.stack(ids), torch.stack(chances))
    # The output's own first, then other depths from the last, then what vectors promote, first words first.
    others = torch.stack([*words]).permute(2, 1, 0).flatten() if words else best.ids.new_empty(0)
    named = torch.cat([best.ids.flip(0).flatten(), others.to(best.ids)]).tolist()
    tokens = torch.tensor(list(dict.fromkeys(named))[:MAX_TOKENS]).to(logits.device)
    return Readout(list(range(L + 1)), best, tokens, torch.stack([_ranks(row, tokens) for row in logits]))


def _likely(logits: Float[Tensor, " v"], top: int) -> tuple[Tensor, Tensor]:
    """Return the most likely tokens and their probabilities, in float64."""
    best = logits.topk(min(top, len(logits))).indices
    return best, logits.cpu().double().softmax(0)[best.cpu()]


def _ranks(logits: Float[Tensor, " v"], tokens: Int[Tensor, " t"]) -> Int[Tensor, " t"]:
    """Return one more than the number of tokens with a higher logit."""
    ascending = logits.sort().values
    return len(logits) - torch.searchsorted(ascending, logits[tokens].contiguous(), right=True) + 1
