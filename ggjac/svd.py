"""The leading singular triplets of any `LinearOperator`, or of many at once, by seeded block Krylov iteration.

Golub-Kahan block bidiagonalisation with full reorthogonalisation (Golub, Luk & Overton, "A block Lanczos method for
computing the singular values and corresponding singular vectors of a matrix", ACM TOMS 1981; the block Krylov subspace
keeps every block, as in Musco & Musco, NeurIPS 2015). Sweeps alternate: `Aᵀ` on the newest output-space block, `A` on
the newest input-space block. Each sweep extracts triplets from all products so far (Rayleigh-Ritz), and the *next*
sweep happens to measure their residual exactly, so that checking convergence costs nothing.

Products are stored as coefficients in the basis of the other side, which they extend: only the two bases take memory.
"""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac import checks
from ggjac.linop import Homogeneous, LinearOperator
from ggjac.results import NO_WORDS, Plotted, Points, Table, Words
from ggjac.sizes import SPARE, block_width
from ggjac.units import cut_after, ending

Method = Literal["sweeps", "matrix"]


class Following(NamedTuple):
    """The singular value after the last one that was asked for, as the iteration has it.

    Attributes:
        value: of the subspace searched, and so at most the true one.
        residual: of its triplet, as in `SVD`.
        converged: whether that is at most `tol`.
    """

    value: float
    residual: float
    converged: bool


@dataclass(frozen=True)
class SVD(Plotted):
    """Singular triplets `A v = s u` in descending order, and their residuals.

    Attributes:
        U: `[k, *out_shape]`, left singular vectors, orthonormal.
        S: `[k]`, singular values.
        Vh: `[k, *in_shape]`, right singular vectors, orthonormal.
        residual: `[k]`, the larger of `‖A v - s u‖` and `‖Aᵀ u - s v‖`, divided by `s` (by the largest singular value
            where `s` is zero to working precision). Measured from products with A, not estimated.
        sweeps: number of products of A or its transpose with a block of vectors.
        converged: whether every residual is at most `tol`.
        reason: why the iteration stopped: `"tolerance"`, `"complete"` (the subspace is the whole space: exact to
            precision), `"precision"` (the residual stalls at the rounding error of the operator's dtype) or `"sweeps"`
            (the limit is reached).
        following: the next singular value; None where the subspace holds no more than these.
        method: `"sweeps"`: block Krylov iteration; `"matrix"`: from the whole matrix, by LAPACK, exact to rounding, or,
            of a large one, by iteration on it to residuals of `CLOSE`; then the reason is `"tolerance"`.
        rough_sweeps: those of `sweeps` whose products were rounded; no other number comes from them.
        spare: `[m, *out_shape]`, the left vectors that follow, as far as the subspace has them; None if not asked for.
    """

    U: Tensor
    S: Float[Tensor, " k"]
    Vh: Tensor
    residual: Float[Tensor, " k"]
    sweeps: int
    converged: bool
    reason: str
    following: Following | None = None
    method: Method = "sweeps"
    rough_sweeps: int = 0
    spare: Tensor | None = None

    def pointing_along(self, output: Tensor) -> "SVD":
        """Flip pairs of vectors so that each left one points along an output `[*out_shape]`: `⟨output, u⟩ >= 0`.

        The sign of a pair of singular vectors is arbitrary.
        """
        along = self.U.flatten(1) @ output.to(self.U).flatten()
        sign = torch.where(along < 0, -1.0, 1.0).to(self.U)
        U, Vh = (vectors * sign.view(-1, *[1] * (vectors.dim() - 1)) for vectors in (self.U, self.Vh))
        return replace(self, U=U, Vh=Vh)

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the singular values with their residuals, the largest first, the next one, and how it all ended."""
        return {
            "method": self.method,
            "sweeps": self.sweeps,
            "rough_sweeps": self.rough_sweeps,
            "converged": self.converged,
            "stopped_by": self.reason,
            "next_singular_value": self.following and self.following._asdict(),
            "triplets": [
                {"singular_value": s, "residual": r}
                for s, r in zip(self.S.tolist(), self.residual.tolist(), strict=True)
            ],
        }

    def _table(self, words: Words) -> Table:
        S = self.S.tolist()
        cut = cut_after(S[-1], len(S), self.following and self.following._asdict())
        notes = (ending(self.data()), *([cut] if cut else []))
        columns = {"vector": [*range(1, len(S) + 1)], "sigma": S, "residual": self.residual.tolist()}
        after = {"next sigma": self.following and self.following.value, "stopped by": self.reason}
        return Table("Singular triplets", columns, notes, after)

    def _plot(self, words: Words) -> Points:
        S = self.S.tolist()
        return Points("Singular values", "index", "σ", {"σ": (range(1, len(S) + 1), S, ())})


# A rough search ends at this residual: in bfloat16 it rests between a third and two thirds of it (docs/benchmarks.md).
ROUGH_TOL = 1e-2

# Residual to which triplets of a float32 matrix are iterated: their values are those of LAPACK, to rounding.
CLOSE = 1e-5

# Columns of a stack of vectors that are factored at a time: few enough for the cache, since QR passes over them often.
PANEL = 1 << 14

# A product that an iteration requests: a side (0: with the transpose, 1: with the operator) and vectors `[k, size]`.
Request = tuple[int, Tensor]
Iteration = Generator[Request, Tensor, SVD]


def svd(A: LinearOperator, rank: int, **options: Any) -> SVD:
    """Compute the `rank` largest singular triplets of `A`; for the options and errors see `iteration`."""
    steps = iteration(A, rank, **options)
    try:
        side, vectors = next(steps)
        while True:
            shape, product = ((A.out_shape, A.rmatmat), (A.in_shape, A.matmat))[side]
            side, vectors = steps.send(product(vectors.to(A.dtype).reshape(-1, *shape)).flatten(1).to(vectors.dtype))
    except StopIteration as stop:
        return stop.value


def roughly_first(
    solve: Callable[..., list[SVD]],
    rounded: Callable[[torch.dtype], AbstractContextManager[Any]],
    dtype: torch.dtype | None,
    *,
    tol: float,
    max_sweeps: int,
    progress: Callable[[int, float], None] | None = None,
) -> list[SVD]:
    """Search with products rounded to a dtype, which are faster, and start from what they find; without one, search.

    The second search has its own basis and images, all of unrounded products: values and residuals are as exact as
    without the first. A bad start costs sweeps, and nothing else. (Mixed precision, as in Higham & Mary, "Mixed
    precision algorithms in numerical linear algebra", Acta Numerica 2022.)

    Args:
        solve: decomposes operators, given `tol`, `max_sweeps`, `progress`, and `spare` and `noise`, or `starts`.
        rounded: returns a context in which products are rounded to a dtype.
        dtype: the narrower one; None for no such search.
        tol, max_sweeps, progress: as `iteration` takes them; at most half of the sweeps are rough. Fewer than four are
            not divided.
    """
    if dtype is None or max_sweeps < 4:  # two for each search
        return solve(tol=tol, max_sweeps=max_sweeps, progress=progress)
    noise = torch.finfo(dtype).eps  # the relative error of a rounded product
    with rounded(dtype):
        rough = solve(tol=max(tol, ROUGH_TOL), max_sweeps=max_sweeps // 2, spare=SPARE, noise=noise, progress=progress)
    done = max(one.sweeps for one in rough)
    worst = max(float(one.residual.max()) for one in rough)  # until one is measured without rounding
    starts = [one.U if one.spare is None else torch.cat([one.U, one.spare]) for one in rough]
    found = solve(
        tol=tol,
        max_sweeps=max_sweeps - done,
        starts=starts,
        progress=progress and (lambda sweeps, found: progress(done + sweeps, min(worst, found))),
    )
    return [replace(one, sweeps=done + one.sweeps, rough_sweeps=done) for one in found]


class Triplets(NamedTuple):
    """Singular triplets and their measured residuals: `[k, out]`, `[k]`, `[k, in]`, `[k]`, as in `SVD`.

    Of an iteration, the last value and residual are those of a triplet whose vectors are not kept.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    residual: Tensor


class OfMatrix(LinearOperator):
    """A dense matrix as an operator: `[in]` to `[out]`."""

    def __init__(self, matrix: Float[Tensor, "out in"]):
        self.matrix = matrix
        self.out_shape, self.in_shape = tuple(matrix.shape[:1]), tuple(matrix.shape[1:])
        self.dtype, self.device = matrix.dtype, matrix.device

    def matmat(self, X: Float[Tensor, "k in"], t: Homogeneous = None) -> Float[Tensor, "k out"]:
        """Multiply by the matrix."""
        return X @ self.matrix.T

    def rmatmat(self, Y: Float[Tensor, "k out"]) -> Float[Tensor, "k in"]:
        """Multiply by its transpose."""
        return Y @ self.matrix


def svd_of_matrix(
    matrix: Float[Tensor, "out in"], rank: int, *, tol: float, sweeps: int, iterated: bool = False
) -> SVD:
    """Return the `rank` largest triplets of a matrix, in float32 at least, with their measured residuals.

    By LAPACK all triplets are known, so that no larger one can be missing, and the next value is exact, too.

    Args:
        matrix: any, with at least `rank` rows and columns.
        rank: number of triplets.
        tol: residual at which a triplet counts as converged.
        sweeps: that gave the matrix.
        iterated: whether to find them by iteration, as `triplets_of_matrix` does, unless `tol` is below `CLOSE`.

    Raises:
        ValueError: the matrix is not finite.
    """
    found = triplets_of_matrix(matrix, rank, iterated=iterated and tol >= CLOSE)
    return svd_of_triplets(found, rank, tol=tol, sweeps=sweeps)


def triplets_of_matrix(matrix: Float[Tensor, "out in"], rank: int, *, iterated: bool = False) -> Triplets:
    """Return the `rank` largest triplets of a matrix and what follows, or all, as `svd_of_matrix` finds them.

    If `iterated`, by block Krylov iteration on the matrix to residuals of `CLOSE`, if it gets there.
    """
    A = matrix.cpu().to(torch.promote_types(matrix.dtype, torch.float32))
    if not torch.linalg.vector_norm(A, math.inf).isfinite():  # without a copy
        raise ValueError(f"the matrix is not finite: it overflows {matrix.dtype} or contains NaN; try a wider dtype")
    found = svd(OfMatrix(A), rank, tol=CLOSE, block=rank + 8, max_sweeps=30) if iterated else None
    if found and found.converged and found.following:
        last = (A.new_tensor([x]) for x in found.following[:2])
        S, residual = (torch.cat(pair) for pair in zip((found.S, found.residual), last, strict=True))
        triplets = found.U, S, found.Vh, residual
    else:
        triplets = _by_lapack(A, rank + 1)
    return Triplets(*(part.contiguous().to(matrix.device) for part in triplets))


def _by_lapack(A: Float[Tensor, "out in"], count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the `count` largest triplets of a matrix, or all, and their residuals."""
    # Of a wide matrix, that of its triangular factor: a third of the time, since most right vectors are not needed.
    Q, R = torch.linalg.qr(A.T) if A.shape[1] > A.shape[0] else (None, A.T)
    U, S, Vh = torch.linalg.svd(R.T, full_matrices=False)
    U, S, Vh = U.T[:count], S[:count], Vh[:count]  # [k, out], [k], [k, in]
    Vh = Vh if Q is None else Vh @ Q.T
    forward, backward = _lengths(Vh @ A.T - S[:, None] * U), _lengths(U @ A - S[:, None] * Vh)
    return U, S, Vh, _relative(torch.maximum(forward, backward).to(S), S, torch.finfo(A.dtype).eps)


def svd_of_triplets(found: Triplets, rank: int, *, tol: float, sweeps: int) -> SVD:
    """Return the first `rank` of the leading triplets of a matrix; the next one, if it is there, is what follows."""
    values, residuals = found.S[rank:].tolist(), found.residual[rank:].tolist()
    U, S, Vh, residual = (part[:rank] for part in found)
    return SVD(
        U,
        S,
        Vh,
        residual,
        sweeps=sweeps,
        converged=bool((residual <= tol).all()),
        reason="tolerance" if len(found.S) > len(found.U) else "complete",
        following=Following(values[0], residuals[0], residuals[0] <= tol) if values else None,
        method="matrix",
    )


def svd_together(
    operators: Sequence[LinearOperator],
    rank: int,
    *,
    up: Callable[[list[Tensor]], list[Tensor]],
    down: Callable[[list[Tensor]], list[Tensor]],
    progress: Callable[[int, float], None] | None = None,
    starts: Sequence[Tensor | None] | None = None,
    **options: Any,
) -> list[SVD]:
    """Compute the leading triplets of several operators whose products are cheaper together.

    Args:
        operators: only their shapes, dtypes and devices are used.
        rank: number of triplets of each.
        up, down: apply the operators, or their transposes, to one stack of vectors each; a stack may be empty.
        progress: called after each sweep with the sweep count and the worst relative residual of all operators.
        starts: `start` of each operator, as `iteration` takes it.
        options: as `iteration` takes them.

    Returns:
        The results of `svd` for each operator alone (up to rounding). The operator that converges last decides the
        number of sweeps.
    """
    worst = [math.inf] * len(operators)

    def record(i: int, _: int, residual: float) -> None:
        worst[i] = residual

    steps = [
        iteration(A, rank, progress=partial(record, i), start=start, **options)
        for i, (A, start) in enumerate(zip(operators, starts or [None] * len(operators), strict=True))
    ]
    requests: dict[int, Request] = {i: next(run) for i, run in enumerate(steps)}
    found: dict[int, SVD] = {}
    sweeps = 0
    while requests:
        # All started on the same side, and alternate.
        side = next(iter(requests.values()))[0]
        stacks = []
        for i, A in enumerate(operators):
            shape = (A.out_shape, A.in_shape)[side]
            vectors = requests[i][1] if i in requests else torch.zeros(0, math.prod(shape), device=A.device)
            stacks.append(vectors.to(A.dtype).reshape(-1, *shape))
        products = dict(enumerate((down, up)[side](stacks)))
        sweeps += 1
        for i in list(requests):
            try:
                # Popped, so that it is freed before the next sweep.
                requests[i] = steps[i].send(products.pop(i).flatten(1).to(requests[i][1].dtype))
            except StopIteration as stop:
                del requests[i]
                found[i] = stop.value
        if progress:
            progress(sweeps, max(worst))
    return [found[i] for i in range(len(operators))]


def iteration(
    A: LinearOperator,
    rank: int,
    *,
    tol: float = 1e-3,
    max_sweeps: int = 40,
    block: int | None = None,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
    start: Tensor | None = None,
    spare: int = 0,
    noise: float | None = None,
) -> Iteration:
    """Request products with `A`, which is not applied here, and return an `SVD`.

    Args:
        A: any operator; processes that share it stop together, as it lets them agree.
        rank: number of triplets, at most the smaller dimension of A. If A's numerical rank is smaller, the surplus
            triplets have zero singular values and orthonormal vectors.
        tol: relative residual to reach in every triplet.
        max_sweeps: limit on the number of products with A or its transpose.
        block: stacked vectors per sweep; default `ggjac.sizes.block_width(rank, size of an input)`.
        seed: seed of the random start vectors; the same seed gives the same digits on the same machine.
        progress: called after each sweep with the sweep count and the worst relative residual known so far; that is
            infinite after the first sweep, which measures none.
        start: `[m, *out_shape]`, vectors to start from, of which the first `block` are used; default random ones.
        spare: number of left vectors to return beyond those of the triplets, converged or not.
        noise: relative error of a product, at whose level residuals rest; default the epsilon of A's dtype.

    Yields:
        A side and vectors to multiply: 0 and `[k, *out_shape]` flattened, for a product with the transpose; 1 and
        `[k, *in_shape]` flattened, for a product with A. The product is sent back flattened, in the dtype of the
        vectors.

    Returns:
        An `SVD`. Two bases are kept in float32 (float64 for a float64 operator): `[m, *in_shape]` and `[m, *out_shape]`
        with `m` at most `block * (max_sweeps + 1) / 2`.

    Raises:
        ValueError: `rank`, `tol`, `max_sweeps`, `block` or `seed` is out of range, or a product with A is not finite.
    """
    check_options(A, rank, tol=tol, max_sweeps=max_sweeps, block=block, seed=seed)
    sizes = math.prod(A.out_shape), math.prod(A.in_shape)
    width = min(block or block_width(rank, sizes[1]), sizes[0])
    work = torch.promote_types(A.dtype, torch.float32)
    eps = torch.finfo(A.dtype).eps
    noise = noise or eps
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, side: int) -> Tensor:
        # Drawn on the CPU in float64, so that every device and dtype starts from the same directions.
        return torch.randn(count, sizes[side], generator=generator, dtype=torch.float64).to(A.device, work)

    # Side 0 is the output space, side 1 the input space. Each has an orthonormal basis, [m, size], and the images of
    # its vectors as coefficients in the basis of the other side, [m, m'].
    basis = [Basis(size, work, A.device) for size in sizes]
    image = [Image(), Image()]
    first = draw(width, 0) if start is None else start[:width].flatten(1).to(A.device, work)
    new = _expanded(first, basis[0], 0.0).directions  # [width, size]
    basis[0].append(new)
    triplets: tuple[Tensor, Tensor] | None = None  # those last extracted: coefficients of U, [rank, m], and of V
    extracted: tuple[Tensor, Tensor]  # the same, the next one and the spare ones, as far as there are any
    history: list[float] = []  # the worst residual after each sweep that measured it

    for sweeps in range(1, max_sweeps + 1):
        side, other = (0, 1) if sweeps % 2 else (1, 0)

        # Multiply the newest block, and split the product into a part in the other basis and new directions.
        product = yield side, new
        longest = float(_lengths(product).max())
        if not math.isfinite(longest):
            raise ValueError(
                f"sweep {sweeps} gave products that are not finite: the operator overflows {A.dtype} or contains NaN; "
                "try a wider dtype"
            )
        scale = max(image[side].scale, longest)
        expanded = _expanded(product, basis[other], eps * scale)
        del product  # as large as a block of the basis, and not needed during the next sweep
        image[side].append(expanded, scale)

        # Measure the triplets last extracted: the images of both their vectors are known now.
        if triplets:
            S, residual = A.agreed(torch.stack(_measured(triplets, image, eps)))
            history.append(float(residual.max()))
            if progress:
                progress(sweeps, history[-1])
            if reason := _reason_to_stop(history, S, noise, tol, last=sweeps == max_sweeps):
                break
        elif progress:
            progress(sweeps, math.inf)

        # Extend the other basis. If A's numerical rank is smaller than `rank`, random directions fill the gap.
        new = expanded.directions
        basis[other].append(new)
        missing = rank - basis[other].count
        if missing > 0:
            more = _expanded(draw(missing, other), basis[other], 0.0).directions
            basis[other].append(more)
            new = torch.cat([new, more])

        # Extract triplets. Without a new direction the subspace is closed, and all images are known.
        extracted = _extracted(image[side].core(basis[other].count), side, rank + max(1, spare))
        triplets = extracted[0][:rank], extracted[1][:rank]
        if not len(new):
            S, residual = _measured(triplets, image, eps)
            reason = "complete"
            break

    assert triplets is not None
    order = S.argsort(descending=True, stable=True)  # rounding may swap equal values
    U, V = (side.combined(coefficients)[order] for side, coefficients in zip(basis, triplets, strict=True))
    values, residuals = (part[rank:].tolist() for part in _measured(extracted, image, eps))
    further = basis[0].combined(extracted[0][rank:]).reshape(-1, *A.out_shape) if spare else None
    return SVD(
        U.reshape(-1, *A.out_shape),
        S[order],
        V.reshape(-1, *A.in_shape),
        residual[order],
        sweeps=sweeps,
        converged=bool((residual <= tol).all()),
        reason=reason,
        following=Following(values[0], residuals[0], residuals[0] <= tol) if values else None,
        spare=further,
    )


def check_options(
    A: LinearOperator, rank: int, *, tol: float, max_sweeps: int, block: int | None = None, seed: int = 0
) -> None:
    """Check the arguments of `iteration`.

    Raises:
        ValueError: one is out of range.
    """
    values = min(math.prod(A.out_shape), math.prod(A.in_shape))
    if not 1 <= checks.whole("rank", rank, None) <= values:
        raise ValueError(f"rank {rank} is out of range: this operator has {values} singular values")
    if not tol > 0:
        raise ValueError(f"tol {tol} is out of range: the relative residual to reach must be positive")
    if checks.whole("max_sweeps", max_sweeps, None) < 2:
        raise ValueError(f"max_sweeps {max_sweeps} is out of range: triplets and their residuals take at least 2")
    if block is not None and checks.whole("block", block, None) < rank:
        raise ValueError(f"block {block} is out of range: it must be at least the rank, {rank}")
    checks.seed(seed)


def _extracted(core: Float[Tensor, "m m2"], side: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading triplets in the subspace (Rayleigh-Ritz), `rank` or all: coefficients of U and of V.

    `image = core @ basis` with orthonormal rows on both sides, so that the SVD of the small `core` gives the triplets.
    """
    P, _, Qh = _small_svd(core)
    own, other = P.T[:rank], Qh[:rank]  # [rank, m] on the side whose images these are, [rank, m2] on the other
    return (own, other) if side == 0 else (other, own)


def _reason_to_stop(history: list[float], S: Tensor, eps: float, tol: float, *, last: bool) -> str:
    """Return why the iteration stops after a sweep, or an empty string."""
    if history[-1] <= tol:
        return "tolerance"
    if _at_floor(history, S, eps):
        return "precision"
    return "sweeps" if last else ""


class Basis:
    """Orthonormal rows `[m, size]` that grow by blocks, and are never copied."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device):
        self.blocks: list[Tensor] = []
        self.count = 0
        self._empty = torch.empty(0, size, dtype=dtype, device=device)

    def append(self, block: Float[Tensor, "k size"]) -> None:
        """Add rows that are orthonormal, also to all others."""
        self.blocks.append(block)
        self.count += len(block)

    def coefficients(self, rows: Float[Tensor, "k size"]) -> Float[Tensor, "k m"]:
        """Return the inner products of rows with the basis."""
        return torch.cat([rows @ block.T for block in (self._empty, *self.blocks)], 1)

    def combined(self, coefficients: Float[Tensor, "k m"]) -> Float[Tensor, "k size"]:
        """Return combinations of the basis; coefficients beyond its last row are ignored."""
        result = self._empty.new_zeros(len(coefficients), self._empty.shape[1])
        start = 0
        for block in self.blocks:
            part = coefficients[:, start : start + len(block)]
            result.addmm_(part, block[: part.shape[1]])
            start += len(block)
        return result

    def take_out(self, rows: Float[Tensor, "k size"]) -> Float[Tensor, "k m"]:
        """Remove from rows, in place, their part in the span of the basis; return the coefficients of that part."""
        inside = self.coefficients(rows)
        start = 0
        for block in self.blocks:
            rows.addmm_(inside[:, start : start + len(block)], block, alpha=-1)
            start += len(block)
        return inside


class Expanded(NamedTuple):
    """Rows as `inside @ basis + outside @ directions`, plus a rest that was dropped as noise.

    Attributes:
        inside: `[k, m]`, coefficients in the basis.
        outside: `[k, p]`, coefficients in new directions.
        directions: `[p, size]`, orthonormal, also to the basis.
        lost: `[k, l]`, coefficients in directions that were dropped; only their lengths matter.
    """

    inside: Tensor
    outside: Tensor
    directions: Tensor
    lost: Tensor


class Image:
    """The images of one basis, as coefficients in the other: `[m, m']`, growing by blocks of rows and of columns."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._lost: list[Tensor] = []
        self.scale = 0.0

    def append(self, expanded: Expanded, scale: float) -> None:
        """Add the images of the newest block; `scale` is the length of the longest image so far."""
        self._rows.append(torch.cat([expanded.inside, expanded.outside], 1))
        self._lost.append(expanded.lost)
        self.scale = scale

    @property
    def count(self) -> int:
        """Number of basis vectors whose images are known."""
        return sum(len(row) for row in self._rows)

    @property
    def columns(self) -> int:
        """Dimension of the space that contains the images."""
        return max((row.shape[1] for row in self._rows), default=0)

    def core(self, columns: int) -> Float[Tensor, "m columns"]:
        """Return all coefficients; those of earlier images in directions found later are zero."""
        return torch.cat([_widened(row, columns) for row in self._rows])

    def of(self, coefficients: Float[Tensor, "k m"], columns: int) -> tuple[Tensor, Tensor]:
        """Return the images of combinations: coefficients `[k, columns]`, and the lengths `[k]` of their lost parts.

        Directions lost in different sweeps count as orthogonal.
        """
        return coefficients @ self.core(columns), _lengths(coefficients @ torch.block_diag(*self._lost))


def _measured(
    triplets: tuple[Tensor, Tensor], image: Sequence[Image], eps: float
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Return singular values and relative residuals of triplets, from their coefficients in the orthonormal bases."""
    U, V = triplets  # [k, m0], [k, m1]
    columns = max(U.shape[1], image[1].columns), max(V.shape[1], image[0].columns)
    AtU, U_lost = image[0].of(_widened(U, image[0].count), columns[1])  # [k, m1], [k]
    AV, V_lost = image[1].of(_widened(V, image[1].count), columns[0])  # [k, m0], [k]
    U, V = _widened(U, columns[0]), _widened(V, columns[1])
    S = (AV * U).sum(1).abs()
    forward, backward = _lengths(AV - S[:, None] * U), _lengths(AtU - S[:, None] * V)
    absolute = torch.maximum(torch.hypot(forward, V_lost), torch.hypot(backward, U_lost)).to(S)
    return S, _relative(absolute, S, eps)


def _relative(absolute: Float[Tensor, " k"], S: Float[Tensor, " k"], eps: float) -> Float[Tensor, " k"]:
    """Return residuals relative to their singular values; to the largest one, where they are zero to rounding."""
    return absolute / torch.where(S > 10 * eps * S.max(), S, S.max()).clamp_min(torch.finfo(S.dtype).tiny)


def _at_floor(history: list[float], S: Tensor, eps: float) -> bool:
    """Return whether the worst residual has stopped falling (by a fifth in four checks) at the level of rounding."""
    if len(history) < 5:
        return False
    floor = 16 * eps * float(S.max() / S.min().clamp_min(torch.finfo(S.dtype).tiny))
    return min(history[-4:]) > 0.8 * min(history[:-4]) and history[-1] <= floor


def _lengths(rows: Tensor) -> Float[Tensor, " k"]:
    """Return the norm of each row, on the CPU, in float64: squares of float32 numbers below 1e-19 vanish in float32.

    They are computed where the rows are, which may be as large as a product, unless that device has no float64.
    """
    try:
        torch.empty(0, dtype=torch.float64, device=rows.device)
    except (TypeError, RuntimeError):
        rows = rows.cpu()
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu()


def _small_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD of a small matrix, computed on the CPU: other devices are not faster, and some cannot."""
    P, S, Qh = torch.linalg.svd(matrix.cpu(), full_matrices=False)
    return P.to(matrix.device), S.to(matrix.device), Qh.to(matrix.device)


def _widened(rows: Tensor, columns: int) -> Tensor:
    """Append zero columns."""
    return torch.nn.functional.pad(rows, (0, columns - rows.shape[1]))


def _expanded(rows: Float[Tensor, "k size"], basis: Basis, threshold: float) -> Expanded:
    """Split rows into their part in a basis and new directions, dropping singular values up to `threshold`.

    Projected twice: once is not enough when the rest is small ("twice is enough", Kahan and Parlett).
    """
    rest = rows.clone()
    inside = basis.take_out(rest)  # [k, m]
    outside, S, directions = _factored(rest)  # [k, r], [r], [r, size]
    count = int((S > threshold).sum())  # S descends
    lost, outside, rest = outside[:, count:], outside[:, :count], directions[:count]
    inside = inside + outside @ basis.take_out(rest)  # directions have unit length: only rounding errors are removed
    again, S, directions = _factored(rest)
    count = int((S > 0.5).sum())
    outside = outside @ again
    return Expanded(inside, outside[:, :count], directions[:count], torch.cat([lost, outside[:, count:]], 1))


def _factored(
    rows: Float[Tensor, "k size"],
) -> tuple[Float[Tensor, "k r"], Float[Tensor, " r"], Float[Tensor, "r size"]]:
    """Return `C`, `S`, `Q` with `rows = C @ Q`: Q's rows orthonormal, C's columns orthogonal and of lengths S.

    By QR of one panel of columns after another (TSQR: Demmel et al., SIAM J. Sci. Comput. 34, 2012), since the rows may
    fill much of the memory. They are overwritten.
    """
    panels = [torch.linalg.qr(panel.T) for panel in rows.split(PANEL, 1)]
    P, S, Wh = _small_svd(torch.cat([R for _, R in panels]))  # from [panels * k, k]
    parts = P.split([len(R) for _, R in panels])
    for panel, part in zip(rows.split(PANEL, 1), parts, strict=True):
        Q, _ = panels.pop(0)
        panel[: len(S)] = part.T @ Q.T
    return Wh.T * S, S, rows[: len(S)]
