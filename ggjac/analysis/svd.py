"""The leading singular vectors of a detached Jacobian, decoded to tokens (Golden, arXiv 2505.24293, section 3.2).

Left vectors live where the LM head reads, and decode to the tokens they promote. Right vectors live in the input
embeddings, one slice per position, and decode to the nearest tokens there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac import units
from ggjac.calibration import Calibration, expected_maximum
from ggjac.checks import input_positions, whole
from ggjac.decode import Ranked, nearest, top_logits
from ggjac.frobenius import StableRank, exact_stable_rank, squared_norm, stable_ranks
from ggjac.jacobian import DetachedJacobian, Progress
from ggjac.results import NO_WORDS, Plotted, Points, Prompt, Table, Words
from ggjac.sizes import EXACT_ROWS, EXPECTED_SWEEPS, PROBES
from ggjac.svd import SVD, check_options
from ggjac.ways import Task


@dataclass(frozen=True)
class Spectrum(Plotted):
    """Singular triplets with their tokens.

    Attributes:
        svd: the triplets, signed so that each left vector points along the output: `⟨J x, u⟩ >= 0`.
        left: tokens of highest logit for each left vector, `[k, top]`.
        right: tokens of nearest embedding (cosine) for each right vector at each position, `[k * n, top]`.
        weight: `[k, n]`, the share of each right vector's squared norm at each position; rows sum to 1.
        position: of the output; later positions have no influence.
        exclude: input positions that the map does not read.
        tol: relative residual that was asked of every triplet.
        seed: of the random start.
        hide_special: whether decoding left out control, unused and byte tokens.
        tokens: number of tokens that decoding compares for each left vector.
        calibration: what the tokens of left vectors are compared with; None for random directions alone (`left.z`).
        z_prompts: `[k, top]`, see `ggjac.calibration`; None without a calibration.
        whole: the same of the map that reads all positions, where some are excluded; else None.
    """

    svd: SVD
    left: Ranked
    right: Ranked
    weight: Float[Tensor, "k n"]
    position: int
    tol: float
    seed: int
    hide_special: bool = False
    exclude: tuple[int, ...] = ()
    tokens: int = 0
    calibration: Calibration | None = None
    z_prompts: Float[Tensor, "k top"] | None = None
    whole: "Spectrum | None" = None

    @property
    def heaviest(self) -> Float[Tensor, "k d"]:
        """Each right vector at the position with most of its weight."""
        return self.svd.Vh[torch.arange(len(self.svd.Vh)), self.weight.argmax(1)]

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the triplets, the largest first, with the tokens of both ends; right vectors where the map reads.

        Where positions are excluded, `whole` has the triplets of the map that reads all of them, each with the part of
        its right vector's weight at these positions.
        """
        found = self._data(words)
        settings = {key: getattr(self, key) for key in ("seed", "tol", "hide_special")}
        compared = {"tokens": self.tokens, "expected_maximum": expected_maximum(self.tokens)}
        compared |= {} if self.calibration is None else self.calibration.data()
        found |= {"rank": len(self.svd.S), **settings, "calibration": compared}
        if self.whole is None:
            return found
        whole, excluded = self.whole._data(words), self.excluded_weight.tolist()
        for triplet, weight in zip(whole["triplets"], excluded, strict=True):
            triplet["excluded_weight"] = weight
        return found | {"whole": whole}

    @property
    def excluded_weight(self) -> Float[Tensor, " k"]:
        """The share of each right vector of `whole` at the excluded positions.

        Raises:
            ValueError: none are excluded.
        """
        if self.whole is None:
            raise ValueError("no positions are excluded; trace.jacobian(exclude=[0]) excludes the first one")
        return self.whole.weight[:, list(self.exclude)].sum(1)

    def _data(self, words: Words) -> dict[str, Any]:
        """Return what is found of one map."""
        found = self.svd.data()
        count = self.weight.shape[1]

        def at(j: int, i: int) -> dict[str, Any]:
            nearest = words.ranked(*self.right.part(j * count + i))
            return words.here(i) | {"weight": float(self.weight[j, i]), "nearest": nearest}

        found["triplets"] = [
            triplet
            | {
                "left": words.ranked(*self.left.part(j), *([] if self.z_prompts is None else [self.z_prompts[j]])),
                "right": [at(j, i) for i in self._read],
            }
            for j, triplet in enumerate(found["triplets"])
        ]
        return found | {"sink": words.sink(float(self.weight[0, 0]), self.position + 1)}

    @property
    def _read(self) -> list[int]:
        """Input positions that the map reads."""
        return input_positions(None, self.position + 1, self.exclude)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: U `[k, d]`, S `[k]`, Vh `[k, n, d]`, residual `[k]`; of `whole`, whole_U and so on."""
        found = {name: getattr(self.svd, name) for name in ("U", "S", "Vh", "residual")}
        whole = {} if self.whole is None else self.whole.tensors()
        return found | {f"whole_{name}": tensor for name, tensor in whole.items()}

    def exhibits(self, trace: Prompt | None = None) -> list[Table]:
        """Return the table, and that of the map that reads all positions, if there is one."""
        if self.whole is None:
            return [self.table(trace)]
        whole = self.whole.table(trace)
        columns = {**whole.columns, "excluded weight": self.excluded_weight.tolist()}
        note = "excluded weight: of the right vector, at the positions that are excluded from the other map"
        title = f"{whole.title} of the map that reads all positions"
        return [self.table(trace), replace(whole, title=title, columns=columns, notes=(*whole.notes, note))]

    def _table(self, words: Words) -> Table:
        found = self.svd._table(words)
        k, n = self.weight.shape
        positions = self.weight.argmax(1).tolist()
        left, right = self.left.ids.tolist(), self.right.ids.tolist()
        columns = {
            **words.column("left", left),
            **self._z(),
            **words.at(positions),
            "weight": self.weight.amax(1).tolist(),
            **words.column("right", [right[i * n + positions[i]] for i in range(k)]),
        }
        note = "left: tokens the vector promotes; right: nearest tokens at the position with most of its weight"
        about = f"z: scores of left tokens in standard deviations of a random direction's; the largest of {self.tokens}"
        about += f" by chance is at most about {expected_maximum(self.tokens):.1f}"
        return Table(found.title, {**found.columns, **columns}, (*found.notes, note, about), found.common)

    def _z(self) -> dict[str, list[list[float]]]:
        """Return the columns of the left tokens' z."""
        found = {"z": self.left.z, "z prompts": self.z_prompts}
        return {name: each.tolist() for name, each in found.items() if each is not None}

    def _sheet(self, words: Words) -> Table:
        """Return a row for each vector and position."""
        found, n = self._table(words), self.weight.shape[1]
        rows = [(j, i) for j in range(len(self.weight)) for i in self._read]
        columns = {name: [column[j] for j, _ in rows] for name, column in found.columns.items()}
        right = words.column("right", [self.right.ids[j * n + i].tolist() for j, i in rows])
        here = {"weight": [float(self.weight[j, i]) for j, i in rows]} | right
        return replace(found, columns=columns | words.at([i for _, i in rows]) | here)

    def _plot(self, words: Words) -> Points:
        return self.svd._plot(words)


def spectrum(
    jacobian: DetachedJacobian,
    rank: int = 8,
    *,
    top: int = 8,
    hide_special: bool = False,
    tol: float = 1e-3,
    seed: int = 0,
    max_sweeps: int = 40,
    search_dtype: torch.dtype | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
) -> Spectrum:
    """Compute `rank` singular triplets of the joint `[d, n d]` map and decode both ends to `top` tokens each.

    `hide_special` leaves control, unused and byte tokens out of the ranking. Tokens of right vectors at positions after
    the Jacobian's own are meaningless, since the map is zero there; their `weight` is 0. `progress` is called after
    each block, with the sweep and its worst residual, and the number of sweeps that are expected to follow.
    `search_dtype` is that of `DetachedJacobian.svd`, by default none: the command's `auto` measures the machine, for
    which it takes a `Session`. With a `calibration` (see `ggjac.calibrate`), tokens of left vectors are also compared
    with the vectors of unrelated prompts.

    Where the Jacobian excludes positions, the triplets of the map that reads all of them are computed as well, in the
    same sweeps of twice the vectors, or from one matrix.

    Raises:
        ValueError: `top` is out of range, or rank, `tol`, `max_sweeps` or `seed`, as `ggjac.svd.svd` has them.
    """
    top = whole("top", top)
    check_options(jacobian, rank, tol=tol, max_sweeps=max_sweeps, seed=seed)
    head, embedding, n = jacobian.network.head, jacobian.network.embedding, jacobian.in_shape[0]
    sweep = 1
    history: list[float] = []  # the worst residual after each sweep that measured it

    def report(what: str, done: int, total: int, rounds: int = 0) -> None:
        if progress:
            residual = units.worst(history[-1]) if history else ""
            progress(f"sweep {sweep}{residual}, {what}", done, total, sweeps_left(history, sweep, tol))

    def swept(sweeps: int, worst: float) -> None:
        nonlocal sweep
        sweep = sweeps + 1  # also of a resumed run, whose first sweeps report nothing
        if math.isfinite(worst):
            history.append(worst)

    def rows(what: str, done: int, total: int, rounds: int = 0) -> None:
        if progress:
            progress(f"all rows, {what}", done, total)

    def signs(what: str, done: int, total: int, rounds: int = 0) -> None:
        if progress:
            progress(f"signs, {what}", done, total)

    with jacobian.reporting(signs):
        _ = jacobian.linear_output, jacobian.whole.linear_output  # along which the vectors will point
    with jacobian.reporting(rows):
        jacobian.whole.matrix(Task(rank, joint=1 + bool(jacobian.exclude)))  # if that is the cheaper way
    with jacobian.reporting(report):
        views = jacobian.both_views(
            rank, tol=tol, seed=seed, max_sweeps=max_sweeps, search_dtype=search_dtype, progress=swept
        )
    hidden = jacobian.hidden_ids(hide_special)
    U, Vh = (torch.cat([getattr(one, side) for one in views]) for side in ("U", "Vh"))
    left = top_logits(head.matrix, U.to(head.matrix.dtype), top, hidden=hidden)
    right = nearest(embedding, Vh.to(embedding.dtype).flatten(0, 1), top, hidden=hidden)
    del U, Vh
    how: dict[str, Any] = {"tol": tol, "seed": seed, "hide_special": hide_special, "position": jacobian.position}
    how["tokens"] = head.matrix.shape[0] - len(hidden)
    found, *others = [
        Spectrum(
            svd=one,
            left=left.part(slice(i * rank, (i + 1) * rank)),
            right=right.part(slice(i * rank * n, (i + 1) * rank * n)),
            weight=one.Vh.square().sum(2),
            **how,
        )
        for i, one in enumerate(views)
    ]
    return replace(
        found,
        exclude=tuple(jacobian.exclude),
        calibration=calibration,
        z_prompts=None if calibration is None else calibration.z(head.matrix, found.left),
        whole=next(iter(others), None),
    )


def sweeps_left(history: Sequence[float], sweep: int, tol: float) -> int:
    """Return how many sweeps follow this one, if the worst residual keeps falling at its mean rate so far.

    Before a rate is known, the number that spectra of models usually take.
    """
    if len(history) < 2 or not 0 < history[-1] < history[0]:
        return max(0, EXPECTED_SWEEPS - sweep)
    per_sweep = math.log(history[0] / history[-1]) / (len(history) - 1)
    return max(0, math.ceil(math.log(history[-1] / tol) / per_sweep) - 1)


def stable_rank(
    jacobian: DetachedJacobian,
    triplets: SVD,
    *,
    probes: int = PROBES,
    seed: int = 0,
    progress: Progress | None = None,
) -> StableRank:
    """Compute the stable rank `‖J‖²_F / σ₁²` of the joint `[d, n d]` map, the number of directions that it really uses.

    The known triplets count exactly. The rest is averaged over seeded Gaussian probes in one downward sweep, or summed
    over all rows where there are at most `EXACT_ROWS`, as many at a time as fit into the Jacobian's `chunk_bytes`. If
    the triplets come from the matrix, all rows are there.

    Raises:
        ValueError: `probes` or `seed` is out of range.
    """
    probes = whole("probes", probes, 2)
    if triplets.method == "matrix" and (matrix := jacobian.matrix(Task(len(triplets.S)))) is not None:
        return exact_stable_rank(triplets, squared_norm(matrix))
    chunk = jacobian.rows_at_once() if jacobian.out_shape[0] <= EXACT_ROWS else None
    with jacobian.reporting(progress):
        (found,) = stable_ranks(
            [jacobian], [triplets], down=lambda Y: [jacobian.rmatmat(Y[0])], chunk=chunk, probes=probes, seed=seed
        )
    return found
