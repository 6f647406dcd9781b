"""The leading singular triplets of any `LinearOperator`, by seeded block Krylov iteration, with residuals.

Golub-Kahan block bidiagonalisation with full reorthogonalisation (Golub, Luk & Overton, "A block Lanczos method for
computing the singular values and corresponding singular vectors of a matrix", ACM TOMS 1981; the block Krylov subspace
keeps every block, as in Musco & Musco, NeurIPS 2015). Sweeps alternate: `Aᵀ` on the newest output-space block, `A` on
the newest input-space block. Each sweep extracts triplets from all products so far (Rayleigh-Ritz), and the *next*
sweep happens to measure their residual exactly, so that checking convergence costs nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.linop import LinearOperator


@dataclass(frozen=True)
class SVD:
    """Singular triplets `A v = s u` in descending order, and how well they are known.

    Attributes:
        U: `[k, *out_shape]`, left singular vectors, orthonormal.
        S: `[k]`, singular values.
        Vh: `[k, *in_shape]`, right singular vectors, orthonormal.
        residual: `[k]`, the larger of `‖A v - s u‖` and `‖Aᵀ u - s v‖`, divided by `s` (by the largest singular value
            where `s` is zero to working precision). Measured from products with A, not estimated.
        sweeps: how often A or its transpose was applied to a block (up and down counted singly).
        converged: whether every residual is at most `tol`.
        reason: why the iteration stopped: `"tolerance"`, `"complete"` (the subspace is the whole space: exact to
            precision), `"precision"` (the residual rests on the floor of the operator's dtype) or `"sweeps"` (limit).
    """

    U: Tensor
    S: Float[Tensor, " k"]
    Vh: Tensor
    residual: Float[Tensor, " k"]
    sweeps: int
    converged: bool
    reason: str


def svd(
    A: LinearOperator,
    rank: int,
    *,
    tol: float = 1e-3,
    max_sweeps: int = 40,
    block: int | None = None,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> SVD:
    """Compute the `rank` largest singular triplets of `A`.

    Args:
        A: any operator; only `matmat` and `rmatmat` are used, on `block` stacked vectors at a time.
        rank: triplets wanted, at most the smaller dimension of A. Where A's numerical rank is smaller, the surplus
            triplets have zero singular values and orthonormal vectors.
        tol: relative residual asked of every triplet.
        max_sweeps: stop after so many products with A or its transpose.
        block: stacked vectors per sweep; default `rank` plus 8, and three times `rank` up to 24.
        seed: of the random start; the same seed gives the same digits on the same machine.
        progress: called after each sweep with the sweep count and the worst relative residual known so far.

    Returns:
        An `SVD`. Bases are kept in float32 (float64 for a float64 operator): `[m, *in_shape]` and `[m, *out_shape]`
        with `m` at most `block * (max_sweeps + 1) / 2`.

    Raises:
        ValueError: `rank`, `tol`, `max_sweeps` or `block` out of range, or a product with A that is not finite.
    """
    sizes = math.prod(A.out_shape), math.prod(A.in_shape)
    if not 1 <= rank <= min(sizes):
        raise ValueError(f"rank {rank} is out of range: this operator has {min(sizes)} singular values")
    if not tol > 0:
        raise ValueError(f"tol {tol} is out of range: the relative residual to reach must be positive")
    if max_sweeps < 2:
        raise ValueError(f"max_sweeps {max_sweeps} is out of range: triplets and their residuals take at least 2")
    if block is not None and block < rank:
        raise ValueError(f"block {block} is out of range: it must hold the {rank} triplets asked for")
    width = min(block or max(rank + 8, min(3 * rank, 24)), sizes[0])

    work = torch.promote_types(A.dtype, torch.float32)
    eps = torch.finfo(A.dtype).eps
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, side: int) -> Tensor:
        # Drawn on the CPU in float64, so that every device and dtype starts from the same directions.
        return torch.randn(count, sizes[side], generator=generator, dtype=torch.float64).to(A.device, work)

    def sweep(side: int, vectors: Tensor) -> Tensor:
        shape, product = ((A.out_shape, A.rmatmat), (A.in_shape, A.matmat))[side]
        result = product(vectors.to(A.dtype).reshape(-1, *shape)).flatten(1).to(work)
        if not result.isfinite().all():
            raise ValueError(
                f"sweep {sweeps} gave products that are not finite: the operator overflows {A.dtype} or holds NaN; "
                "try a wider dtype"
            )
        return result

    # Side 0 is the output space, side 1 the input space: an orthonormal basis of each, and its image on the other.
    basis = [torch.empty(0, sizes[side], dtype=work, device=A.device) for side in (0, 1)]
    image = [torch.empty(0, sizes[1 - side], dtype=work, device=A.device) for side in (0, 1)]
    new = basis[0] = _orthonormal(draw(width, 0), basis[0], 0.0)
    coefficients: list[Tensor] = []
    history: list[float] = []

    for sweeps in range(1, max_sweeps + 1):
        side, other = (0, 1) if sweeps % 2 else (1, 0)
        image[side] = torch.cat([image[side], sweep(side, new)])
        reason = "sweeps" if sweeps == max_sweeps else ""
        if coefficients:  # both ends of the last extraction have images by now, so its residual is known
            U, S, Vh, residual = _triplets(coefficients, basis, image, eps)
            history.append(float(residual.max()))
            if progress:
                progress(sweeps, history[-1])
            if history[-1] <= tol:
                reason = "tolerance"
            elif _at_floor(history, S, eps):
                reason = "precision"
        if reason and coefficients:
            break

        scale = float(_lengths(image[side]).max())
        new = _orthonormal(image[side][len(image[side]) - len(new) :], basis[other], eps * scale)
        missing = rank - len(basis[other]) - len(new)
        if missing > 0:  # A's numerical rank is smaller than `rank`: random directions stand in, to find what is left
            new = torch.cat([new, _orthonormal(draw(missing, other), torch.cat([basis[other], new]), 0.0)])
        basis[other] = torch.cat([basis[other], new])

        # Rayleigh-Ritz: image = core @ basis with orthonormal rows on both ends, so the small SVD gives the triplets.
        P, _, Qh = torch.linalg.svd(image[side] @ basis[other].T, full_matrices=False)
        near, far = P.T[:rank], Qh[:rank]
        coefficients = [near, far] if side == 0 else [far, near]
        if not len(new):  # closed: nothing is left to learn, and every image is known
            U, S, Vh, residual = _triplets(coefficients, basis, image, eps)
            reason = "complete"
            break

    return SVD(
        U.reshape(-1, *A.out_shape),
        S,
        Vh.reshape(-1, *A.in_shape),
        residual,
        sweeps=sweeps,
        converged=bool((residual <= tol).all()),
        reason=reason,
    )


def _triplets(
    coefficients: list[Tensor], basis: list[Tensor], image: list[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assemble U, S, Vh from their coefficients in the two bases, and measure both residuals of each triplet."""
    U, V = coefficients[0] @ basis[0], coefficients[1] @ basis[1]
    AtU, AV = coefficients[0] @ image[0], coefficients[1] @ image[1]
    S = (AV * U).sum(1).abs()
    absolute = torch.maximum(_lengths(AV - S[:, None] * U), _lengths(AtU - S[:, None] * V))
    relative = absolute / torch.where(S > 10 * eps * S.max(), S, S.max()).clamp_min(torch.finfo(S.dtype).tiny)
    order = S.argsort(descending=True, stable=True)  # rounding may swap equals
    return U[order], S[order], V[order], relative.to(S.dtype)[order]


def _at_floor(history: list[float], S: Tensor, eps: float) -> bool:
    """Say whether the worst residual has stopped falling (by a fifth in four checks) at the level of rounding."""
    if len(history) < 5:
        return False
    floor = 16 * eps * float(S.max() / S.min().clamp_min(torch.finfo(S.dtype).tiny))
    return min(history[-4:]) > 0.8 * min(history[:-4]) and history[-1] <= floor


def _lengths(rows: Tensor) -> Float[Tensor, " k"]:
    """Return the norm of each row, in float64: squares of float32 numbers below 1e-19 vanish in float32."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def _orthonormal(block: Tensor, basis: Tensor, threshold: float) -> Tensor:
    """Return an orthonormal basis of what `block` adds to `basis`, dropping singular values up to `threshold`.

    Projected twice: once is not enough when little is left ("twice is enough", Kahan and Parlett).
    """
    for limit in (threshold, 0.5):  # what survives the first pass has unit length; the second only removes roundoff
        if not len(block):
            break
        _, S, Vh = torch.linalg.svd(block - (block @ basis.T) @ basis, full_matrices=False)
        block = Vh[limit < S]
    return block
