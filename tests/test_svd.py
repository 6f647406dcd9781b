"""The block Krylov SVD against dense `torch.linalg`, on matrices whose spectrum is known beforehand.

Then what is made of it: the spectrum decoded and the stable rank, against the oracle's Jacobian, and the command.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import oracle
import pytest
import tiny
import torch
from helpers import IDS, TOKENS, head_of, invoke, invoke_json, pair, reworded
from report_run import Page
from safetensors.torch import load_file
from torch import Tensor

from ggjac import session
from ggjac.analysis import svd as analysis
from ggjac.analysis.svd import spectrum, stable_rank
from ggjac.cli.result import failed
from ggjac.cli.svd import show_both
from ggjac.linop import LinearOperator
from ggjac.model import open_model
from ggjac.report import write_report
from ggjac.report.sections.common import Run
from ggjac.report.sections.svd import singular_values
from ggjac.sizes import forms
from ggjac.studies import measures
from ggjac.svd import SVD, roughly_first, svd, svd_together

TinyFile = Callable[..., Path]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Counted(LinearOperator):
    """A dense matrix, kept in `[*out, *in]` shape, that counts what is asked of it."""

    def __init__(self, matrix: Tensor, out_shape: Sequence[int] = (), in_shape: Sequence[int] = ()):
        self.matrix = matrix
        self.out_shape = tuple(out_shape) or (matrix.shape[0],)
        self.in_shape = tuple(in_shape) or (matrix.shape[1],)
        self.dtype, self.device, self.widths = matrix.dtype, matrix.device, []

    def matmat(self, X: Tensor, t: Tensor | None = None) -> Tensor:
        assert X.dtype == self.dtype
        self.widths.append(len(X))
        return (X.flatten(1) @ self.matrix.T).reshape(-1, *self.out_shape)

    def rmatmat(self, Y: Tensor) -> Tensor:
        assert Y.dtype == self.dtype
        self.widths.append(len(Y))
        return (Y.flatten(1) @ self.matrix).reshape(-1, *self.in_shape)


def prescribed(out: int, into: int, values: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a random matrix with these singular values (and zeros)."""
    generator = torch.Generator().manual_seed(7)
    U, V = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64))[0]
        for size in (out, into)
    )
    return ((U * torch.tensor(values, dtype=torch.float64)) @ V.T).to(dtype)


def ones_at(out: int, into: int, entries: dict[tuple[int, int], float]) -> Tensor:
    """Return a sparse matrix: products with it are exact, so that nothing hides a rank deficiency."""
    matrix = torch.zeros(out, into, dtype=torch.float64)
    for place, value in entries.items():
        matrix[place] = value
    return matrix


def measured(matrix: Tensor, result: SVD) -> Tensor:
    """Return the residuals by plain float64 arithmetic: absolute, the larger of both sides."""
    A, S = matrix.double(), result.S.double()
    U, V = result.U.double().flatten(1), result.Vh.double().flatten(1)
    forward, backward = V @ A.T - S[:, None] * U, U @ A - S[:, None] * V
    return torch.maximum(*(torch.linalg.vector_norm(side, dim=1) for side in (forward, backward)))


def check(matrix: Tensor, result: SVD, rank: int) -> None:
    """Hold a result to everything that is promised of any result, converged or not."""
    eps = max(torch.finfo(matrix.dtype).eps, torch.finfo(result.S.dtype).eps)
    exact = torch.linalg.svdvals(matrix.double())[:rank]
    largest = exact[0]
    assert len(result.U) == len(result.S) == len(result.Vh) == len(result.residual) == rank
    for vectors in (result.U, result.Vh):
        flat = vectors.double().flatten(1)
        tolerance = 50 * torch.finfo(result.S.dtype).eps
        assert (flat @ flat.T - torch.eye(rank, dtype=torch.float64)).abs().max() < tolerance
    assert (result.S >= 0).all()
    assert (result.S.diff() <= 0).all()
    assert result.converged == bool((result.residual <= TOL).all())
    # Each value lies within its residual of some singular value (Weyl), whatever went wrong elsewhere.
    absolute = measured(matrix, result)
    nearest = (result.S.double()[:, None] - torch.linalg.svdvals(matrix.double())).abs().min(1).values
    assert (nearest <= absolute + 20 * eps * largest).all()
    # The reported residual is the true one, up to rounding; relative to the largest value where s is zero.
    scale = torch.where(result.S.double() > 10 * eps * largest, result.S.double(), largest).clamp_min(1e-300)
    assert ((absolute / scale - result.residual.double()).abs() <= 30 * eps * largest / scale + 1e-300).all()
    if result.converged:
        error = (result.S.double() - exact).abs()
        # Whole sets of values: each error is bounded by all residuals together (Parlett, "The symmetric eigenvalue
        # problem", 11.5); where values do not crowd it is of the order of their squares.
        assert (error <= 2 * absolute.norm() + 20 * eps * largest).all()


TOL = 1e-3

# name -> (matrix, rank). Ranks beyond the numerical rank ask for null vectors as well.
SPECTRA: dict[str, tuple[Callable[[], Tensor], int]] = {
    "geometric": (lambda: prescribed(60, 90, [0.7**i for i in range(60)]), 5),
    "geometric, tall": (lambda: prescribed(90, 60, [0.7**i for i in range(60)]), 5),
    "1 / j": (lambda: prescribed(200, 150, [1 / j for j in range(1, 151)]), 8),
    "slow": (lambda: prescribed(120, 150, [1 - 1e-3 * i for i in range(120)]), 4),
    "flat": (lambda: prescribed(60, 90, [2.0] * 60), 5),
    "identity": (lambda: torch.eye(50, dtype=torch.float64), 5),
    "repeated": (lambda: prescribed(60, 90, [3.0] * 4 + [1.0] * 3 + [0.5] * 40), 6),
    "cut through a repeated value": (lambda: prescribed(60, 90, [3.0] * 4 + [1.0] * 20 + [0.1] * 20), 9),
    "tiny gaps": (lambda: prescribed(100, 150, [1 + 1e-9 * i for i in range(20, 0, -1)] + [0.5] * 60), 5),
    "twelve decades": (lambda: prescribed(60, 90, [10 ** (-12 * i / 59) for i in range(60)]), 20),
    "twelve decades, full": (lambda: prescribed(60, 90, [10 ** (-12 * i / 59) for i in range(60)]), 60),
    "two scales": (lambda: prescribed(100, 120, [1.0] + [1e-5 * 0.8**i for i in range(80)]), 5),
    "rank 1": (lambda: prescribed(60, 90, [3.0]), 1),
    "rank 1, 5 wanted": (lambda: prescribed(60, 90, [3.0]), 5),
    "rank 2, 5 wanted": (lambda: prescribed(60, 90, [3.0, 1.0]), 5),
    "rank 2 exactly": (lambda: ones_at(60, 90, {(3, 4): 2, (5, 6): 1}), 2),
    "rank 2 exactly, 5 wanted": (lambda: ones_at(60, 90, {(3, 4): 2, (5, 6): 1}), 5),
    "rank 2 exactly, tall, full": (lambda: ones_at(50, 20, {(3, 4): 2, (5, 6): 2}), 20),
    "rank 2 exactly, wide, full": (lambda: ones_at(20, 50, {(3, 4): 2, (5, 6): 1}), 20),
    "rank 12 of 13, full": (lambda: prescribed(13, 40, [1 / j for j in range(1, 13)]), 13),
    "zero": (lambda: torch.zeros(30, 20, dtype=torch.float64), 4),
    "zero, full": (lambda: torch.zeros(20, 30, dtype=torch.float64), 20),
    "full, wide": (lambda: prescribed(30, 90, [1 / j for j in range(1, 31)]), 30),
    "full, tall": (lambda: prescribed(90, 30, [1 / j for j in range(1, 31)]), 30),
    "full, square": (lambda: prescribed(30, 30, [0.9**j for j in range(30)]), 30),
    "d below k + 8": (lambda: prescribed(9, 90, [1 / j for j in range(1, 10)]), 5),
    "input below k + 8": (lambda: prescribed(90, 9, [1 / j for j in range(1, 10)]), 5),
    "one by one": (lambda: torch.full((1, 1), -2.0, dtype=torch.float64), 1),
    "one row": (lambda: prescribed(1, 7, [2.0]), 1),
    "one column": (lambda: prescribed(7, 1, [2.0]), 1),
    "tiny numbers": (lambda: prescribed(60, 90, [1e-28 * 0.7**i for i in range(30)]), 5),
    "huge numbers": (lambda: prescribed(60, 90, [1e28 * 0.7**i for i in range(30)]), 5),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_triplets_are_those_of_the_dense_svd(name: str, dtype: torch.dtype) -> None:
    make, rank = SPECTRA[name]
    matrix = make().to(dtype)
    A = Counted(matrix)
    result = svd(A, rank, tol=TOL)
    check(matrix, result, rank)
    assert result.sweeps == len(A.widths)
    if dtype == torch.float64:
        assert result.converged
        assert result.reason in ("tolerance", "complete")


@pytest.mark.parametrize("name", SPECTRA)
def test_the_next_value_is_at_most_the_true_one(name: str) -> None:
    make, rank = SPECTRA[name]
    matrix = make()
    exact = torch.linalg.svdvals(matrix)
    following = svd(Counted(matrix), rank, tol=TOL).following
    if following is None:
        assert rank == len(exact) or exact[rank] <= 1e-12 * exact[0]
        return
    assert following.value <= exact[rank] + 1e-13 * exact[0]
    off = (exact - following.value).abs().min()
    assert off <= following.residual * max(following.value, float(exact[0]) * 1e-12) + 1e-13 * exact[0]
    if following.converged:
        assert following.value == pytest.approx(float(exact[rank]), rel=TOL, abs=1e-13 * float(exact[0]))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([8.0, 4.0, 2.0, 1.0], "σ3 = 2, 50.0% below σ2"),
        (
            [8.0, 4.0, 3.9, 1.0],
            "σ3 = 3.9, 2.5% below σ2: the cut goes through a cluster, "
            "of which the last vectors are a basis of a part only",
        ),
        ([8.0, 4.0], None),
    ],
)
def test_a_cut_through_a_cluster_is_said(values: list[float], line: str | None) -> None:
    result = svd(Counted(prescribed(len(values), 9, values)), 2, tol=TOL)
    notes = result.table().notes[1:]
    assert notes == (() if line is None else (line,))


def test_a_next_value_that_did_not_converge_is_a_bound() -> None:
    result = svd(Counted(slow()), 3, tol=1e-6, max_sweeps=4)
    assert result.following is not None
    assert not result.following.converged
    value = f"{result.following.value:.4g}"
    assert result.table().notes[1].startswith(f"σ4 ≥ {value} (not converged), at most ")


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("name", [name for name in SPECTRA if "numbers" not in name])
def test_low_precision_operators_give_honest_triplets(name: str, dtype: torch.dtype) -> None:
    """Products round each vector, so residuals rest on the dtype's level: not converged, or converged truly."""
    make, rank = SPECTRA[name]
    matrix = make().to(dtype)
    result = svd(Counted(matrix), rank, tol=TOL)
    eps = torch.finfo(dtype).eps
    exact = torch.linalg.svdvals(matrix.double())[:rank]
    assert result.S.dtype == torch.float32
    assert len(result.S) == rank
    assert result.reason in ("tolerance", "complete", "precision")
    assert ((result.S.double() - exact).abs() <= 4 * eps * exact[0] + 1e-300).all()
    for vectors in (result.U.double(), result.Vh.double()):
        assert (vectors @ vectors.T - torch.eye(rank, dtype=torch.float64)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["geometric", "1 / j", "repeated", "tiny gaps", "twelve decades", "two scales"])
def test_leading_subspaces_are_those_of_the_dense_svd(name: str) -> None:
    """A cluster's vectors are arbitrary within it: compare spans, cut where there is a gap."""
    make, rank = SPECTRA[name]
    matrix, cut = make(), {"repeated": 4, "tiny gaps": 20, "two scales": 1}.get(name, rank)
    result = svd(Counted(matrix), max(rank, cut), tol=1e-9)
    assert result.converged
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    for ours, theirs in ((result.U, U.T), (result.Vh, Vh)):
        cosines = torch.linalg.svdvals(ours[:cut] @ theirs[:cut].T)
        assert (1 - cosines).abs().max() < 1e-8


def test_vectors_take_the_operators_shapes() -> None:
    matrix = prescribed(12, 24, [0.5**i for i in range(12)])
    result = svd(Counted(matrix, (3, 4), (2, 3, 4)), 2, tol=TOL)
    assert result.U.shape == (2, 3, 4)
    assert result.Vh.shape == (2, 2, 3, 4)
    check(matrix, result, 2)


# ---- when it stops


def slow(dtype: torch.dtype = torch.float64) -> Tensor:
    return prescribed(120, 150, [1 - 1e-3 * i for i in range(120)], dtype)


def test_stops_on_the_tolerance_and_no_earlier_than_it_holds() -> None:
    worst: list[tuple[int, float]] = []
    result = svd(Counted(slow()), 4, tol=TOL, progress=lambda *seen: worst.append(seen))
    assert (result.reason, result.converged) == ("tolerance", True)
    assert result.residual.max() <= TOL
    assert all(residual > TOL for _, residual in worst[:-1])
    assert [sweep for sweep, _ in worst] == list(range(1, result.sweeps + 1))
    assert worst[0][1] == math.inf, "the first one measures nothing"
    assert worst[-1][1] == float(result.residual.max())


def test_a_tighter_tolerance_takes_more_sweeps() -> None:
    matrix = prescribed(200, 300, [0.95**j for j in range(200)])
    counts = [svd(Counted(matrix), 4, tol=tol).sweeps for tol in (1e-1, 1e-3, 1e-6)]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize("max_sweeps", [2, 3, 5])
def test_stops_at_the_sweep_limit_and_says_so(max_sweeps: int) -> None:
    A = Counted(slow())
    result = svd(A, 4, tol=TOL, max_sweeps=max_sweeps)
    assert (result.reason, result.converged, result.sweeps) == ("sweeps", False, max_sweeps)
    assert len(A.widths) == max_sweeps
    check(A.matrix, result, 4)


def test_a_sweep_limit_reached_together_with_the_tolerance_counts_as_converged() -> None:
    needed = svd(Counted(slow()), 4, tol=TOL).sweeps
    assert svd(Counted(slow()), 4, tol=TOL, max_sweeps=needed).converged


def test_a_closed_subspace_is_complete() -> None:
    result = svd(Counted(prescribed(20, 30, [0.9**i for i in range(20)])), 3, tol=1e-30, max_sweeps=100)
    assert (result.reason, result.converged) == ("complete", False)
    assert result.residual.max() < 1e-13


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_stops_at_the_floor_of_the_dtype(dtype: torch.dtype) -> None:
    result = svd(
        Counted(prescribed(200, 300, [0.9**j for j in range(200)], dtype)), 5, tol=1e-30, max_sweeps=60, block=15
    )
    assert (result.reason, result.converged) == ("precision", False)
    assert result.residual.max() < 32 * torch.finfo(dtype).eps
    assert result.sweeps < 25


def test_slow_convergence_is_not_mistaken_for_the_floor() -> None:
    """One huge value raises the floor of the others; they still have far to go when they fall slowly."""
    values = [1e4] + [1 - 1e-3 * i for i in range(399)]
    result = svd(Counted(prescribed(400, 500, values, torch.float32)), 4, tol=TOL, max_sweeps=60)
    assert result.reason in ("precision", "sweeps")
    # What float32 allows here: eps * 1e4 = 1.2e-3, times a modest constant.
    assert result.residual.max() < 0.03


def test_every_sweep_counts_once_and_widths_stay_within_the_block() -> None:
    A = Counted(slow())
    result = svd(A, 4, tol=TOL, block=6)
    assert result.sweeps == len(A.widths)
    assert max(A.widths) == 6


@pytest.mark.parametrize("block", [4, 5, 40, 1000])
def test_any_block_size_finds_the_triplets(block: int) -> None:
    matrix = prescribed(60, 90, [0.8**i for i in range(60)])
    result = svd(Counted(matrix), 4, tol=TOL, block=block)
    assert result.converged
    check(matrix, result, 4)


# ---- seeds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_seed_decides_every_bit(dtype: torch.dtype) -> None:
    matrix = prescribed(60, 90, [0.8**i for i in range(60)], dtype)
    a, b, other = (svd(Counted(matrix), 4, tol=0.03, seed=seed) for seed in (3, 3, 4))
    for part in ("U", "S", "Vh", "residual"):
        assert torch.equal(getattr(a, part), getattr(b, part))
    assert not torch.equal(a.U, other.U)
    assert torch.allclose(a.S, other.S, rtol=0.03)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    svd(Counted(slow()), 2, tol=0.1)
    assert torch.equal(torch.rand(1), expected)


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank 0 is out of range: this operator has 20 singular values"),
        ({"rank": -1}, "rank -1 is out of range"),
        ({"rank": 21}, "rank 21 is out of range: this operator has 20 singular values"),
        ({"rank": 2, "tol": 0.0}, "tol 0.0 is out of range"),
        ({"rank": 2, "tol": -1.0}, "tol -1.0 is out of range"),
        ({"rank": 2, "tol": math.nan}, "tol nan is out of range"),
        ({"rank": 2, "max_sweeps": 1}, "max_sweeps 1 is out of range"),
        ({"rank": 5, "block": 4}, "block 4 is out of range: it must be at least the rank, 5"),
        ({"rank": 5, "block": 0}, "block 0 is out of range"),
    ],
)
def test_arguments_out_of_range_are_refused_before_any_product(options: dict, message: str) -> None:
    A = Counted(torch.eye(20, 30, dtype=torch.float64))
    with pytest.raises(ValueError, match=message):
        svd(A, **options)
    assert A.widths == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_an_operator_that_overflows_is_refused(poison: float, dtype: torch.dtype) -> None:
    matrix = prescribed(60, 90, [0.5**i for i in range(60)], dtype)
    matrix[3, 3] = poison
    A = Counted(matrix)
    with pytest.raises(ValueError, match=r"sweep 1 gave .* not finite.* wider dtype"):
        svd(A, 3)
    assert len(A.widths) == 1


# ---- wide operators, and several at once


@pytest.mark.parametrize("name", ["geometric", "repeated", "rank 2, 5 wanted", "twelve decades", "zero"])
def test_panels_of_columns_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, rank = SPECTRA[name][0](), SPECTRA[name][1]
    monkeypatch.setattr("ggjac.svd.PANEL", 7)
    check(matrix, svd(Counted(matrix), rank, tol=TOL), rank)


def test_several_operators_advance_together() -> None:
    matrices = [SPECTRA[name][0]() for name in ("geometric", "1 / j", "rank 2 exactly", "flat")]
    operators = [Counted(matrix) for matrix in matrices]
    calls: list[list[int]] = []

    def together(product: str) -> Callable[[list[Tensor]], list[Tensor]]:
        def run(stacks: list[Tensor]) -> list[Tensor]:
            calls.append([len(stack) for stack in stacks])
            return [getattr(A, product)(stack) for A, stack in zip(operators, stacks, strict=True)]

        return run

    seen: list[tuple[int, float]] = []
    found = svd_together(
        operators, 3, up=together("matmat"), down=together("rmatmat"), tol=TOL, progress=lambda *step: seen.append(step)
    )
    alone = [svd(Counted(matrix), 3, tol=TOL) for matrix in matrices]
    for matrix, result, expected in zip(matrices, found, alone, strict=True):
        check(matrix, result, 3)
        assert torch.equal(result.S, expected.S)
        assert torch.equal(result.Vh, expected.Vh)
        assert result.sweeps == expected.sweeps
    assert len({result.sweeps for result in alone}) > 1  # some finish early: their stacks are empty from then on
    assert len(calls) == max(result.sweeps for result in alone)
    assert [sum(bool(call[i]) for call in calls) for i in range(4)] == [result.sweeps for result in alone]
    assert [step for step, _ in seen] == list(range(1, len(calls) + 1))
    assert seen[-1][1] <= TOL


# ---- signs


# ---- a rough search first


class Rounding(Counted):
    """A dense matrix whose products can be rounded, and which counts those."""

    def __init__(self, matrix: Tensor):
        super().__init__(matrix)
        self.rough: list[bool] = []
        self._bits = 0

    @contextmanager
    def rounded(self, dtype: torch.dtype) -> Iterator[None]:
        self._bits = 8
        yield
        self._bits = 0

    def _seen(self, Y: Tensor) -> Tensor:
        self.rough.append(bool(self._bits))
        return Y.bfloat16().to(Y.dtype) if self._bits else Y

    def matmat(self, X: Tensor, t: Tensor | None = None) -> Tensor:
        return self._seen(super().matmat(X))

    def rmatmat(self, Y: Tensor) -> Tensor:
        return self._seen(super().rmatmat(Y))


def roughly(A: Rounding, rank: int, *, max_sweeps: int = 40, tol: float = 1e-3, **given: Any) -> SVD:
    def solve(starts: list[Tensor] | None = None, **options: Any) -> list[SVD]:
        return [svd(A, rank, start=starts and starts[0], **options)]

    return roughly_first(solve, A.rounded, torch.bfloat16, tol=tol, max_sweeps=max_sweeps, **given)[0]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_a_rough_search_leaves_no_trace_in_the_values(name: str, dtype: torch.dtype) -> None:
    make, rank = SPECTRA[name]
    A = Rounding(make().to(dtype))
    found = roughly(A, rank)
    check(A.matrix, found, rank)
    # In float32 the smallest values of these are near the rounding error of the largest, with or without a search.
    if dtype == torch.float64 or name not in ("twelve decades", "twelve decades, full", "two scales"):
        assert found.converged
    # Rough products first, and then none: each of them once.
    assert A.rough == sorted(A.rough, reverse=True)
    assert (A.rough.count(True), len(A.rough)) == (found.rough_sweeps, found.sweeps)
    assert found.rough_sweeps > 0


def test_a_rough_search_takes_at_most_half_of_the_sweeps() -> None:
    A = Rounding(prescribed(300, 400, [1 + 0.001 * i for i in range(300)]))
    found = roughly(A, 4, max_sweeps=8)
    assert (found.sweeps, found.rough_sweeps, found.reason, found.converged) == (8, 4, "sweeps", False)
    seen: list[int] = []
    roughly(A, 4, max_sweeps=8, progress=lambda sweeps, worst: seen.append(sweeps))
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_rough_search_hands_on_no_more_vectors_than_a_block_has(
    tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    J = open_model(tiny_files["plain"]).trace(tiny.prompt("plain", 6)).jacobian()
    _ = J.linear_output
    widths: list[int] = []
    for side in ("up", "down"):
        true = getattr(J.sweep, side)

        def product(stacks: list[Tensor], *rest: Any, true: Any = true) -> list[Tensor]:
            widths.append(len(stacks[0]))
            return true(stacks, *rest)

        monkeypatch.setattr(J.sweep, side, product)
    found = J.svd(3, block=5, search_dtype=torch.bfloat16)
    assert found.rough_sweeps
    assert max(widths) == 5


def test_a_rough_search_of_a_map_as_wide_as_those_for_which_it_is_meant(
    tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2048 dimensions, chosen by the command itself; in float64, by autograd, the triplets are what they say."""
    path = tiny_file("plain", layers=1, d=2048, heads=4, head_dim=16, kv_heads=2, ff=16, vocab=32)
    monkeypatch.setattr(session.bench, "rounding_gain", lambda *_, **__: 2.0)
    ids = [3, 5]
    found = invoke_json("svd", "-m", path, "--tokens", "3,5", "-k", 4)["svd"]
    dense = oracle.jacobian(path, ids, mlp_path="up").J.flatten(1)
    J = open_model(path).trace(ids).jacobian()
    rough, plain = (J.svd(4, search_dtype=dtype) for dtype in (torch.bfloat16, None))
    assert found["rough_sweeps"] == rough.rough_sweeps > 0 == plain.rough_sweeps
    assert [one["singular_value"] for one in found["triplets"]] == pytest.approx(rough.S.tolist(), rel=1e-6)
    assert torch.allclose(rough.S, plain.S, rtol=1e-5)
    U, V = rough.U.double(), rough.Vh.flatten(1).double()
    away = (V @ dense.T - rough.S[:, None] * U).norm(dim=1), (U @ dense - rough.S[:, None] * V).norm(dim=1)
    assert (torch.maximum(*away) / rough.S <= rough.residual * 1.01 + 1e-6).all()
    assert float(rough.residual.max()) < 1e-3


def test_few_sweeps_leave_no_room_for_a_rough_search(tiny_files: dict[str, Path]) -> None:
    J = open_model(tiny_files["plain"]).trace(tiny.prompt("plain", 6)).jacobian()
    for most, rough in ((2, 0), (3, 0), (4, 2)):
        found = J.svd(2, max_sweeps=most, tol=1e-12, search_dtype=torch.bfloat16)
        assert (found.sweeps, found.rough_sweeps) == (most, rough)


@pytest.mark.parametrize("command", ["svd", "analyze"])
def test_the_command_with_a_rough_search(command: str, tmp_path: Path) -> None:
    options = ["-q", *TOKENS, "-k", 3, *(["-o", tmp_path / "run", "--no-verify"] if command == "analyze" else [])]
    found = invoke_json(command, *options, "--search-dtype", "bfloat16")["svd"]
    exact = invoke_json("svd", "-q", *TOKENS, "-k", 3)["svd"]
    assert found["converged"]
    assert found["sweeps"] > found["rough_sweeps"] > 0 == exact["rough_sweeps"]
    values = [[triplet["singular_value"] for triplet in one["triplets"]] for one in (found, exact)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    shown = " ".join(invoke("svd", "-q", *TOKENS, "-k", 3, "--search-dtype", "bfloat16").stdout.split())
    assert f"after {found['sweeps']} sweeps, {found['rough_sweeps']} of them rough (stopped by: tolerance)" in shown


@pytest.mark.parametrize("command", ["svd --per-token", "layers --layers 1", "ranks"])
def test_other_commands_with_a_rough_search(command: str) -> None:
    """Each map says how it was found, and has the values of the other way."""
    asked = [*command.split(), *TOKENS, *([] if command == "ranks" else ["-k", 3])]
    rough, exact = (invoke_json(*asked, "--search-dtype", dtype) for dtype in ("bfloat16", "same"))

    def maps(found: dict[str, Any]) -> list[dict[str, Any]]:
        parts = {"svd": lambda: found["svd"]["per_token"], "layers": lambda: found["layers"]["taps"]}
        return parts.get(command.split()[0], lambda: found["ranks"]["prompts"])()

    def values(found: dict[str, Any]) -> list[float]:
        if command == "ranks":
            return [token["stable_rank"]["value"] for one in maps(found) for token in one["tokens"]]
        return [triplet["singular_value"] for one in maps(found) for triplet in one["triplets"]]

    assert all(one["sweeps"] > one["rough_sweeps"] > 0 for one in maps(rough))
    assert not any(one["rough_sweeps"] for one in maps(exact))
    assert values(rough) == pytest.approx(values(exact), rel=1e-5)


def test_many_rough_products_are_those_of_few(tiny_file: TinyFile) -> None:
    """Where networks make their matrices, as they do for so many vectors."""
    J = open_model(tiny_file("plain", ff=512)).trace(tiny.prompt("plain", 4)).jacobian()
    Y = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    X = torch.randn(100, 4, 64, generator=torch.Generator().manual_seed(1))
    assert forms(100, 64, 64, 512, 512)
    with J.sweep.rounded(torch.bfloat16):
        for product, given in ((J.rmatmat, Y), (J.matmat, X)):
            few = torch.cat([product(part) for part in given.split(1)])
            assert 1e-4 < float((product(given) - few).norm() / few.norm()) < 2e-2


@pytest.mark.parametrize("case", ["plain", "biases", "qwen3moe_q8_0", "mamba2"])
def test_a_rough_search_of_a_jacobian(case: str, tiny_files: dict[str, Path]) -> None:
    ids = tiny.prompt(case, 6)
    dense = oracle.jacobian(tiny_files[case], ids, mlp_path="up").J.flatten(1)
    found = open_model(tiny_files[case]).trace(ids).jacobian().svd(4, search_dtype=torch.bfloat16, tol=1e-4)
    assert found.rough_sweeps
    assert torch.allclose(found.S.double(), torch.linalg.svdvals(dense)[:4], rtol=1e-5)
    residual = found.Vh.flatten(1).double() @ dense.T - found.S[:, None].double() * found.U.double()
    assert float((residual.norm(dim=1) / found.S).max()) < 1.1e-4  # 4e-3 after the rough search


def test_pointing_along_flips_both_ends() -> None:
    """An output (1, -1, 0) against left vectors e1, e2, e3: the second pair turns, the third has no direction."""
    eye = torch.eye(3)
    triplets = SVD(eye, torch.ones(3), eye.reshape(3, 1, 3), torch.zeros(3), 2, True, "tolerance")
    turned = triplets.pointing_along(torch.tensor([1.0, -1.0, 0.0]))
    expected = torch.diag(torch.tensor([1.0, -1.0, 1.0]))
    assert torch.equal(turned.U, expected)
    assert torch.equal(turned.Vh[:, 0], expected)
    assert torch.equal(turned.S, triplets.S)


# ---- decoded, and stable rank

FILES = ("gqa", "biases", "tied")


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("position", [-1, 2])
def test_spectrum_decodes_as_brute_force_does(case: str, position: int, tiny_files: dict[str, Path]) -> None:
    _model, J, expected, weights = pair(tiny_files, case, position)
    found = spectrum(J, 3, top=5, tol=1e-8, max_sweeps=100)
    assert found.svd.converged
    U, S, Vh = torch.linalg.svd(expected.J.flatten(1), full_matrices=False)
    sign = torch.sign(U.T[:3] @ (expected.y - expected.offset))[:, None]
    U, V = U.T[:3] * sign, Vh[:3] * sign
    assert torch.allclose(found.svd.S, S[:3], rtol=1e-12)
    assert torch.allclose(found.svd.U, U, rtol=0, atol=1e-9)
    assert torch.allclose(found.svd.Vh.flatten(1), V, rtol=0, atol=1e-9)

    logits = U @ head_of(weights).T
    assert found.left.ids.tolist() == logits.argsort(descending=True)[:, :5].tolist()
    assert torch.allclose(found.left.scores, logits.sort(descending=True).values[:, :5], rtol=0, atol=1e-8)

    reached = J.position + 1
    V = V.reshape(3, 6, -1)
    cosine = torch.nn.functional.cosine_similarity(V[:, :, None], weights["token_embd.weight"][None, None], dim=3)
    ids, scores = (part.reshape(3, 6, 5)[:, :reached] for part in found.right[:2])
    assert ids.tolist() == cosine.argsort(descending=True)[:, :reached, :5].tolist()
    assert torch.allclose(scores, cosine.sort(descending=True).values[:, :reached, :5], rtol=0, atol=1e-7)

    assert found.weight.shape == (3, 6)
    assert torch.allclose(found.weight, V.square().sum(2), rtol=0, atol=1e-9)
    assert torch.allclose(found.weight.sum(1), torch.ones(3).double(), rtol=0, atol=1e-12)
    assert not found.weight[:, reached:].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_spectrum_in_other_dtypes(dtype: str, tiny_files: dict[str, Path]) -> None:
    _model, J, expected, _ = pair(tiny_files, "gqa", dtype=dtype)
    found = spectrum(J, 3, tol=0.05)
    exact = torch.linalg.svdvals(expected.J.flatten(1))[:3]
    assert torch.allclose(found.svd.S.double(), exact, rtol=1e-3 if dtype == "float32" else 0.05)
    assert (found.svd.U.double() @ (expected.y - expected.offset) > 0).all()
    assert torch.allclose(found.weight.sum(1).double(), torch.ones(3).double(), rtol=0, atol=1e-5)


def test_the_jacobians_own_vectors_point_along_its_output(tiny_files: dict[str, Path]) -> None:
    J = open_model(tiny_files["biases"], dtype="float64").trace(IDS).jacobian()
    expected = oracle.jacobian(tiny_files["biases"], IDS, mlp_path="up")
    for seed in range(4):  # the sign of an iteration depends on its start
        assert (J.svd(6, seed=seed).U @ (expected.y - expected.offset) > 0).all()


def test_signs_do_not_depend_on_the_seed(tiny_files: dict[str, Path]) -> None:
    _model, J, *_ = pair(tiny_files, "gqa")
    a, b = (spectrum(J, 3, tol=1e-9, seed=seed, max_sweeps=100) for seed in (0, 1))
    assert torch.allclose(a.svd.U, b.svd.U, rtol=0, atol=1e-7)
    assert a.left.ids.tolist() == b.left.ids.tolist()


@pytest.mark.parametrize("case", FILES)
def test_stable_rank_is_exact_where_all_rows_are_cheap(case: str, tiny_files: dict[str, Path]) -> None:
    _, J, expected, _ = pair(tiny_files, case)
    S = torch.linalg.svdvals(expected.J.flatten(1))
    found = stable_rank(J, J.svd(3, tol=1e-9, max_sweeps=100))
    assert math.isclose(found.value, float(S.square().sum() / S[0].square()), rel_tol=1e-12)
    assert math.isclose(found.frobenius, float(S.norm()), rel_tol=1e-12)
    assert found.error == 0


def test_stable_rank_in_chunks(tiny_files: dict[str, Path]) -> None:
    _, J, expected, _ = pair(tiny_files, "gqa")
    J.chunk_bytes = 8 * 6 * 3 * 64 * 25
    found = stable_rank(J, J.svd(1, tol=1e-6, max_sweeps=100))
    assert math.isclose(found.frobenius, float(expected.J.norm()), rel_tol=1e-12)


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., analysis.StableRank]:
    """Return `stable_rank` with all sizes estimated."""
    monkeypatch.setattr(analysis, "EXACT_ROWS", 0)
    return analysis.stable_rank


@pytest.mark.parametrize("rank", [1, 5])
def test_the_estimates_error_bar_is_honest(
    rank: int, tiny_files: dict[str, Path], estimated: Callable[..., analysis.StableRank]
) -> None:
    _, J, expected, _ = pair(tiny_files, "gqa")
    exact = float(expected.J.square().sum()) / float(torch.linalg.matrix_norm(expected.J.flatten(1), 2)) ** 2
    triplets = svd(J, rank, tol=1e-6, max_sweeps=100)
    results = [estimated(J, triplets, seed=seed) for seed in range(60)]
    deviations = [(result.value - exact) / result.error for result in results]
    # Nearly a Student variable of 15 degrees; sums of squares are skewed, so a low draw also looks too sure of itself.
    # Over 20,000 draws the means had mean -0.14, spread 1.12, 34 % beyond 1, 7.5 % beyond 2 and 1.5 % beyond 3. The
    # limits below are three binomial standard deviations from that for 60 draws.
    assert abs(statistics.fmean(deviations) + 0.14) < 3 * 1.12 / math.sqrt(60)
    assert 9 <= sum(abs(deviation) > 1 for deviation in deviations) <= 32
    assert sum(abs(deviation) > 2 for deviation in deviations) <= 10
    assert sum(abs(deviation) > 3 for deviation in deviations) <= 4
    for result in results[:3]:
        assert math.isclose(result.frobenius**2 / float(triplets.S[0]) ** 2, result.value, rel_tol=1e-12)


def test_known_triplets_narrow_the_error(
    tiny_files: dict[str, Path], estimated: Callable[..., analysis.StableRank]
) -> None:
    _, J, *_ = pair(tiny_files, "gqa")
    errors = [estimated(J, svd(J, rank, tol=1e-6, max_sweeps=100)).error for rank in (1, 16, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


def test_the_estimate_is_seeded(tiny_files: dict[str, Path], estimated: Callable[..., analysis.StableRank]) -> None:
    _, J, *_ = pair(tiny_files, "gqa")
    triplets = svd(J, 2)
    assert estimated(J, triplets, seed=1) == estimated(J, triplets, seed=1) != estimated(J, triplets, seed=2)


# ---- the command


def test_the_command_per_token(tiny_file: TinyFile, tmp_path: Path) -> None:
    model = tiny_file("biases")
    options = ["--per-token", "-k", 2, "--dtype", "float64", "--tol", "1e-8", "--max-sweeps", 300]
    data = invoke_json("svd", "-m", model, *TOKENS, *options, "-o", tmp_path / "f")["svd"]["per_token"]
    saved, J = load_file(tmp_path / "f"), oracle.jacobian(model, IDS, mlp_path="up").J
    for i, entry in enumerate(data):
        S = torch.linalg.svdvals(J[:, i])[:2]
        assert torch.allclose(torch.tensor([t["singular_value"] for t in entry["triplets"]]).double(), S, rtol=1e-6)
        assert torch.allclose(saved["token_S"][i], S, rtol=1e-9)
        rebuilt = torch.einsum("ke,ef,kf->k", saved["token_U"][i], J[:, i], saved["token_Vh"][i])
        assert torch.allclose(rebuilt, S, rtol=1e-9)
    assert [entry["text"] for entry in data] == [f"[{id}]" for id in IDS]
    assert "each position's own map" in invoke("svd", "-m", model, *TOKENS, *options).stdout
    invoke("svd", "-m", model, *TOKENS, "--per-token", "--max-sweeps", 2, "--tol", "1e-6", code=3)
    assert "per_token" not in invoke_json("svd", "-m", model, *TOKENS)["svd"]


def lists(data: object) -> list[list[int]]:
    """Return the ids of all lists of ranked tokens inside a command's JSON."""
    if isinstance(data, dict):
        return [ids for part in data.values() for ids in lists(part)]
    if not isinstance(data, list):
        return []
    if data and all(isinstance(one, dict) and "score" in one for one in data):
        return [[one["id"] for one in data]]
    return [ids for part in data for ids in lists(part)]


def test_both_views_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all positions on the left, without some on the right: in the terminal, on the page, and in what is saved."""
    asked = ["svd", "-p", "The cat sat", "-k", 2, "--exclude", 0, "-o", tmp_path / "it"]
    content, saved = invoke_json(*asked), load_file(tmp_path / "it")
    found, whole = content["svd"], content["svd"]["whole"]
    for name, part in (("S", found), ("whole_S", whole)):
        assert saved[name].tolist() == pytest.approx([triplet["singular_value"] for triplet in part["triplets"]])
    assert [one["position"] for one in found["triplets"][0]["right"]] == [1, 2, 3, 4]
    assert [one["position"] for one in whole["triplets"][0]["right"]] == [0, 1, 2, 3, 4]
    weights = saved["whole_Vh"].square().sum(2)[:, 0].tolist()
    assert [triplet["excluded_weight"] for triplet in whole["triplets"]] == pytest.approx(weights)
    for part, values, words in ((whole, (8.0, 7.0), ("A", "B")), (found, (6.0, 5.0), ("C", "D"))):
        for triplet, value, word in zip(part["triplets"], values, words, strict=True):
            triplet |= {"singular_value": value, "left": [triplet["left"][0] | {"token": word, "text": word}]}
    for triplet, weight in zip(whole["triplets"], (0.91, 0.92), strict=True):
        triplet["excluded_weight"] = weight
    for converged in (True, False):
        whole["converged"] = converged
        show_both(found)
        shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        (tmp_path / "it.json").write_text(json.dumps(content), encoding="utf-8")
        page = Page(write_report(tmp_path / "it.json").read_text(encoding="utf-8"))
        for row in ("1 8.000 91% A 6.000 C", "2 7.000 92% B 5.000 D"):
            assert row in shown
            assert row in [line.replace(" %", "%") for line in page.find("tr")]
        assert any("σ of all weight at 0" in line and "σ without 0" in line for line in shown)
        assert ("NOT converged: the map of all positions" in " ".join(shown)) != converged
        assert ("That of all positions is not converged." in page.text) != converged
    run = Run({"svd": found, "exclude": [0]}, {})
    lines = {series.name: [y for _, y in series.points] for series in singular_values(run)[0].series}
    assert lines == {"without 0": [6.0, 5.0], "all positions": [8.0, 7.0]}
    assert singular_values(run)[0].y.high >= 8
    assert whole in measures.sweeps_of(content)
    assert not failed(content)
    whole["stopped_by"] = "sweeps"
    assert failed(content)


@pytest.mark.parametrize(
    "command", [["svd", "-k", 2, "--per-token"], ["norms", "--count", 2], ["layers", "-k", 2, "--layers", "2,-1"]]
)
def test_special_tokens_are_hidden_and_the_next_ones_shown(command: list, tmp_path: Path) -> None:
    """Of a vocabulary in which every third token is a control, unused or byte token."""
    kinds = [(1, 3, 1, 1, 5, 1, 1, 6, 1)[id % 9] for id in range(2544)]
    model = reworded(tmp_path / "kinds.gguf", {"tokenizer.ggml.token_type": kinds})
    ask = [*command, "-q", "-m", model, "--tokens", "0,465,506", "--format", "json"]
    every = invoke_json(*ask, "--top", 60)[command[0]]
    found = invoke_json(*ask, "--top", 6, "--hide-special")[command[0]]
    assert not every["hide_special"]
    assert found["hide_special"]
    wanted = [[id for id in ids if kinds[id] == 1] for ids in lists(every)]
    assert len(wanted) == len(lists(found)) > 4
    assert any(kinds[id] != 1 for ids in lists(every) for id in ids[:3])
    for best, ids in zip(wanted, lists(found), strict=True):
        assert len(ids) in (3, 6)
        assert ids == best[: len(ids)]


@pytest.mark.parametrize(
    ("command", "places"),
    [
        (["svd", "-k", 1, "--per-token"], ("left", "nearest", "right")),
        (["norms", "--count", 1], ("tokens",)),
        (["layers", "-k", 1, "--layers", -1], ("left",)),
    ],
)
def test_scores_stand_beside_decoded_tokens(command: list, places: tuple[str, ...], tiny_file: TinyFile) -> None:
    ask = [*command, "-q", "-m", tiny_file("gqa"), *TOKENS, "--top", 2]
    shown = invoke(*ask, "--scores").stdout
    assert "](" not in invoke(*ask).stdout

    def best(data: object, key: str = "") -> list[dict]:
        if isinstance(data, dict):
            return [token for name, part in data.items() for token in best(part, name)]
        if key in places and isinstance(data, list) and data and "score" in data[0]:
            return data[:1]
        return [token for part in data for token in best(part, key)] if isinstance(data, list) else []

    tokens = best(invoke_json(*ask, "--scores")[command[0]])
    assert tokens
    missing = [token for token in tokens if f"[{token['id']}]({token['score']:.2f})" not in shown]
    assert len(missing) < len(tokens) / 2, "those of positions with little weight are not shown"


def test_what_csv_leaves_out_is_said_before_the_work(tiny_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    echo, answer = click.echo, measures.answer_svd
    monkeypatch.setattr(click, "echo", lambda text, **how: (steps.append(str(text)), echo(text, **how)))
    monkeypatch.setattr(measures, "answer_svd", lambda *given, **how: (steps.append("work"), answer(*given, **how))[1])
    given = ["svd", "-q", "-m", tiny_file("gqa"), "--tokens", "1,2,3", "-k", 1, "--format", "csv"]
    assert "joint map" not in invoke(*given).stderr
    steps.clear()
    said = "csv has the joint map alone"
    assert invoke(*given, "--per-token").stderr.count(said) == 1
    assert next(i for i, step in enumerate(steps) if said in step) < steps.index("work")
