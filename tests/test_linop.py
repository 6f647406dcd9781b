"""One contract over all operators, hand-made operators with their answers written out, and the algebra."""

import itertools
import math
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ggjac import linop
from ggjac.linop import (
    Beside,
    Center,
    Chain,
    ChannelScan,
    Concat,
    Conv,
    Experts,
    Identity,
    Linear,
    LinearOperator,
    Matrix,
    Mix,
    Network,
    Pool,
    Scale,
    Scan,
    Select,
    StreamMix,
    Sum,
    Take,
    TiledMatrix,
    Zero,
    dot_test,
)
from ggjac.sizes import forms

CPU = torch.device("cpu")


class Tiles(Matrix):
    """A matrix that comes two rows at a time, in one buffer that the next tile overwrites, as a file's does."""

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        buffer = self.values.new_empty(2, self.values.shape[1])
        for start in range(0, len(self.values), 2):
            stop = min(start + 2, len(self.values))
            buffer[: stop - start] = self.values[start:stop]
            yield start, stop, buffer[: stop - start]
        buffer.fill_(math.nan)


class Random:
    """Random tensors and operators of one dtype."""

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def identity(self, n: int = 3, d: int = 4) -> Identity:
        return Identity((n, d), dtype=self.dtype, device=CPU)

    def linear(
        self, n: int = 3, into: int = 4, out: int = 5, *, bias: bool = True, tiled: bool = True, gain: float = 1.0
    ) -> Linear:
        weight = (Tiles if tiled else Matrix)(self(out, into))
        return Linear(weight, n, self(out) if bias else None, gain)

    def select(self, *positions: int, n: int = 3, d: int = 4) -> Select:
        return Select(torch.tensor(positions), n, d, dtype=self.dtype, device=CPU)

    def scan(self, n: int, m: int | None = None, *, heads: int = 2, size: int = 3, s: int = 2, c: int = 2) -> Scan:
        """Return a recurrence with one chunk more than its positions need."""
        b = -(-n // size) + 1
        shapes = (size, size), (size, s), (s, size), (s, s)
        return Scan(*(self(heads, b, *shape) for shape in shapes), n, m, value_size=c)

    def channels(self, n: int, m: int | None = None, *, c: int = 3, s: int = 2) -> ChannelScan:
        return ChannelScan(self(n, c).abs(), -self(c, s).abs(), self(n, s), self(n, s), self(c), m)

    def network(self, *slabs: int, n: int = 3, d: int = 4, out: int = 5, tiled: bool = True) -> Network:
        """Return a network with slabs of so many hidden units; factors have a constant, and matrices a gain."""
        parts = []
        for units in slabs:
            down, up = (
                self.linear(n, units, out, tiled=tiled, gain=-0.5),
                self.linear(n, d, units, tiled=tiled, gain=3.0),
            )
            parts.append((down, Scale(self(n, units), self(n, units)), up))
        return Network(parts)


def attention(r: Random, m: int = 3) -> LinearOperator:
    """Return a branch [3, 4] -> [m, 4] of the shape that a transformer has: 4 heads of 2 share 2 value heads."""
    mix = Mix(r(4, m, 3).softmax(-1), 2, 2)
    return r.linear(m, 8, 4) @ mix @ r.linear(3, 4, 4) @ Scale(r(3, 4))


def block(r: Random) -> LinearOperator:
    """Return a whole block that ends in the last position, as the last block of a Jacobian does."""
    feed_forward = r.linear(1, 6, 4) @ Scale(r(1, 6)) @ r.linear(1, 4, 6) @ Scale(r(1, 4))
    return (r.identity(1) + feed_forward) @ (r.select(2) + attention(r, m=1))


OPERATORS: dict[str, Callable[[Random], LinearOperator]] = {
    "identity": lambda r: r.identity(),
    "zero": lambda r: Zero((3, 4), (2, 5), dtype=r.dtype, device=CPU),
    "scale": lambda r: Scale(r(3, 4)),
    "scale by zero": lambda r: Scale(r(3, 4) * 0),
    "scale and shift": lambda r: Scale(r(3, 4), r(3, 4)),
    "scale and shift alike everywhere": lambda r: Scale(r(3, 4), r(4)),
    "center": lambda r: Center((3, 4), dtype=r.dtype, device=CPU),
    "linear": lambda r: r.linear(bias=False, tiled=False),
    "linear, tiled": lambda r: r.linear(bias=False),
    "linear, bias": lambda r: r.linear(),
    "linear, gain": lambda r: r.linear(gain=-0.375),
    "linear to one": lambda r: r.linear(out=1),
    "select": lambda r: r.select(0, 2),
    "select out of order": lambda r: r.select(2, 0, 1),
    "select twice": lambda r: r.select(1, 1),
    "mix": lambda r: Mix(r(4, 3, 3), 4, 2),
    "mix, grouped": lambda r: Mix(r(6, 3, 3), 2, 2),
    "mix, one group": lambda r: Mix(r(4, 3, 3), 1, 2),
    "mix to fewer positions": lambda r: Mix(r(4, 2, 3), 2, 2),
    "streams mixed": lambda r: StreamMix(r(4, 3, 2), 5),
    "streams mixed, constant": lambda r: StreamMix(r(4, 2, 1), 3, r(6)),
    "streams collected": lambda r: StreamMix(r(4, 1, 3), 5),
    "groups": lambda r: Pool(r(2, 1, 3, 4), 6),
    "groups, positions left over": lambda r: Pool(r(2, 1, 3, 4), 8),
    "groups that overlap": lambda r: Pool(r(3, 2, 2, 4), 7),
    "one group that would overlap": lambda r: Pool(r(1, 2, 2, 4), 3),
    "side by side": lambda r: Beside(r.linear(), r.linear(into=2, out=3, bias=False), r.linear(out=1)),
    "outputs side by side": lambda r: Concat(r.linear(), r.linear(out=2, bias=False), r.linear(out=1)),
    "outputs side by side in heads": lambda r: Concat(r.linear(out=4), r.linear(out=6), heads=2),
    "some channels": lambda r: Take(torch.tensor([2, 0]), 3, 4, dtype=r.dtype, device=CPU),
    "convolution": lambda r: Conv(r(4, 3), 5),
    "convolution, bias": lambda r: Conv(r(4, 3), 5, r(4)),
    "convolution of fewer positions than taps": lambda r: Conv(r(2, 4), 2, r(2)),
    "convolution with one tap": lambda r: Conv(r(4, 1), 3),
    "channels": lambda r: r.channels(5),
    "channels to fewer positions": lambda r: r.channels(5, 2),
    "channels at one position": lambda r: r.channels(1),
    "scan": lambda r: r.scan(6),
    "scan, last chunk in part": lambda r: r.scan(7),
    "scan inside a chunk": lambda r: r.scan(2),
    "scan, one chunk": lambda r: r.scan(3),
    "scan to fewer positions": lambda r: r.scan(8, 4),
    "scan to one position": lambda r: r.scan(7, 1),
    "scan to the last chunk": lambda r: r.scan(9, 3),
    "chain": lambda r: r.linear(3, 5, 2) @ r.linear(3, 4, 5),
    "chain of one": lambda r: Chain(r.linear()),
    "sum": lambda r: r.linear() + r.linear(),
    "experts": lambda r: Experts(
        [(torch.tensor([2, 0]), r.linear(2, out=4)), (torch.tensor([2]), r.linear(1, out=4))], 3
    ),
    "experts after one another": lambda r: Experts([(torch.tensor([1]), r.linear(1, out=4))], 3) @ r.linear(out=4),
    "network": lambda r: r.network(7),
    "network in slabs": lambda r: r.network(6, 6, 3, d=6, tiled=False),
    "network with few hidden units": lambda r: r.network(1),
    "networks at some positions": lambda r: Experts([(torch.tensor([2, 0]), r.network(7, n=2, out=4))], 3),
    "sum of one": lambda r: Sum(r.linear()),
    "residual": lambda r: r.identity() + r.linear(out=4),
    "attention": attention,
    "block": block,
    "two blocks": lambda r: block(r) @ (r.identity() + attention(r)),
    "transpose": lambda r: r.linear().T,
    "transposed block": lambda r: block(r).T,
    "chain of transposes": lambda r: r.linear().T @ r.linear(),
    "sum of transposes": lambda r: r.linear(out=4).T + r.identity(),
}

every_operator = pytest.mark.parametrize("name", OPERATORS)


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> LinearOperator:
    return OPERATORS[name](Random(dtype, seed))


def columns(A: LinearOperator) -> Tensor:
    """Return the dense matrix [*out, *in] by applying A to one basis vector at a time."""
    size = math.prod(A.in_shape)
    basis = torch.eye(size, dtype=A.dtype).reshape(size, 1, *A.in_shape)
    images = [A.matmat(e)[0] for e in basis]
    return torch.stack(images, -1).reshape(*A.out_shape, *A.in_shape)


def flat(A: LinearOperator) -> Tensor:
    """Return `columns` as a matrix."""
    return columns(A).reshape(math.prod(A.out_shape), math.prod(A.in_shape))


# ---- the contract


@every_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_transpose_is_adjoint(name: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        A = make(name, dtype, seed)
        for operator in (A, A.T):
            assert dot_test(operator, torch.Generator().manual_seed(seed)) < 50 * torch.finfo(dtype).eps


@every_operator
def test_dense_is_what_products_with_a_basis_give(name: str) -> None:
    A = make(name)
    dense = A.to_dense()
    assert dense.shape == (*A.out_shape, *A.in_shape)
    assert torch.allclose(dense, columns(A), rtol=1e-12, atol=1e-12)
    assert torch.allclose(A.T.to_dense().reshape(-1, math.prod(A.out_shape)), flat(A).T, rtol=1e-12, atol=1e-12)


@every_operator
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000, None])
def test_rows_come_in_order_whatever_the_chunk(name: str, chunk: int | None) -> None:
    A, seen = make(name), 0
    for start, stop, rows in A.rows(chunk):
        assert start == seen < stop
        assert stop - start <= (chunk or 1000)
        assert torch.allclose(rows.flatten(1), flat(A)[start:stop], rtol=1e-12, atol=1e-12)
        seen = stop
    assert seen == math.prod(A.out_shape)
    if seen:
        assert torch.allclose(A.to_dense(chunk), columns(A), rtol=1e-12, atol=1e-12)


@every_operator
@pytest.mark.parametrize("k", [0, 1, 5])
def test_stacked_vectors_do_not_meet(name: str, k: int) -> None:
    A, r = make(name), Random(torch.float64, 1)
    X, Y = r(k, *A.in_shape), r(k, *A.out_shape)
    AX, AtY = A.matmat(X), A.rmatmat(Y)
    assert AX.shape == (k, *A.out_shape)
    assert AtY.shape == (k, *A.in_shape)
    for one in range(k):
        assert torch.allclose(AX[one].flatten(), flat(A) @ X[one].flatten(), rtol=1e-12, atol=1e-12)
        assert torch.allclose(AtY[one].flatten(), flat(A).T @ Y[one].flatten(), rtol=1e-12, atol=1e-12)
        assert torch.allclose(A @ X[one], AX[one], rtol=1e-12, atol=1e-12)


@every_operator
def test_inputs_are_left_as_they_were(name: str) -> None:
    A, r = make(name), Random(torch.float64, 1)
    X, Y, t = r(2, *A.in_shape), r(2, *A.out_shape), r(2)
    copies = X.clone(), Y.clone(), t.clone()
    A.matmat(X, t), A.rmatmat(Y)
    assert all(torch.equal(a, b) for a, b in zip((X, Y, t), copies, strict=True))


@every_operator
def test_homogeneous_coordinate_scales_the_constant(name: str) -> None:
    A, r = make(name), Random(torch.float64, 1)
    X, t = r(3, *A.in_shape), torch.tensor([0.0, 1.0, -2.5], dtype=torch.float64)
    constant = A.matmat(torch.zeros(1, *A.in_shape, dtype=torch.float64), torch.ones(1, dtype=torch.float64))[0]
    expected = A.matmat(X) + t.reshape(-1, *[1] * len(A.out_shape)) * constant
    assert torch.allclose(A.matmat(X, t), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(A.matmat(X, torch.zeros(3, dtype=torch.float64)), A.matmat(X))


@every_operator
def test_scipy_sees_the_same_matrix(name: str) -> None:
    A = make(name)
    M, S = flat(A).numpy(), A.to_scipy()
    assert S.shape == M.shape
    assert S.dtype == M.dtype
    random = np.random.default_rng(0)
    x, y = random.standard_normal(M.shape[1]), random.standard_normal(M.shape[0])
    X, Y = random.standard_normal((M.shape[1], 3)), random.standard_normal((M.shape[0], 3))
    close = lambda a, b: a.shape == b.shape and np.allclose(a, b, rtol=1e-12, atol=1e-12)  # noqa: E731
    assert close(S.matvec(x), M @ x)
    assert close(S.matvec(x[:, None]), M @ x[:, None])
    assert close(S.rmatvec(y), M.T @ y)
    assert close(S.matmat(X), M @ X)
    assert close(S.rmatmat(Y), M.T @ Y)
    assert close(S.T @ y, M.T @ y)
    assert close(S.matmat(X[:, :0]), M @ X[:, :0])
    x.setflags(write=False)  # torch warns of read-only arrays, and refuses negative strides
    assert close(S.matvec(x), M @ x)
    assert close(S.matvec(x[::-1]), M @ x[::-1])


@pytest.mark.parametrize("name", ["linear", "mix, grouped", "block", "two blocks", "transposed block"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_scipys_solvers_run_on_it(name: str, dtype: torch.dtype) -> None:
    A = make(name, dtype)
    expected = np.linalg.svd(flat(A).double().numpy(), compute_uv=False)[:2]
    start = np.ones(min(A.to_scipy().shape), dtype=A.to_scipy().dtype)
    found = scipy.sparse.linalg.svds(A.to_scipy(), k=2, v0=start, return_singular_vectors=False)
    assert np.allclose(sorted(found, reverse=True), expected, rtol=1e-4 if dtype == torch.float32 else 1e-10)


def test_scipy_gets_single_precision_from_bfloat16() -> None:
    A = make("linear", torch.bfloat16)
    S = A.to_scipy()
    assert S.dtype == np.float32
    x = np.ones(S.shape[1], np.float32)
    assert np.allclose(S @ x, A.matmat(torch.ones(1, *A.in_shape, dtype=torch.bfloat16)).float().flatten())


# ---- operators by hand


@pytest.mark.parametrize("gain", [1.0, 0.25])
def test_a_narrower_matrix_rounds_the_vectors_and_not_the_sum(gain: float) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(24, 16, generator=generator).bfloat16()
    A = Linear(Tiles(W), 3, gain=gain)
    for apply, matrix, size in ((A.matmat, W.T, 16), (A.rmatmat, W, 24)):
        X = torch.randn(5, 3, size, generator=generator)
        Y = apply(X)
        assert Y.dtype == torch.float32
        expected = gain * (X.bfloat16().double() @ matrix.double())
        # Each tile's product is rounded to 8 bits; vectors that were not rounded would differ by as much again.
        error = float((Y - expected).norm() / expected.norm())
        assert error < 2**-8


def test_linear_by_hand() -> None:
    """x W' + b with W = [[1, 2], [0, -1], [3, 0]], b = [10, 20, 30] at two positions."""
    A = Linear(Tiles(torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.0]])), 2, torch.tensor([10.0, 20.0, 30.0]))
    x = torch.tensor([[1.0, 1.0], [2.0, -1.0]])
    assert (A @ x).tolist() == [[3, -1, 3], [0, 1, 6]]
    assert A.matmat(x[None], torch.tensor([2.0]))[0].tolist() == [[23, 39, 63], [20, 41, 66]]
    assert (A.T @ torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 0.0]])).tolist() == [[4, 1], [0, -2]]


def test_groups_by_hand() -> None:
    """Groups of 2 of 5 positions, one channel of two parts: the second for the own group, the first for the next."""
    shares = torch.tensor([[[7.0, 7.0], [1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]]])[..., None]
    x = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0], [5.0, 50.0]])
    A = Pool(shares, 5)
    assert (A @ x).tolist() == [[10 + 2 * 20], [3 * 1 + 4 * 2 + 5 * 30 + 6 * 40]]
    assert (A.T @ torch.tensor([[1.0], [10.0]])).tolist() == [[30, 1], [40, 2], [0, 50], [0, 60], [0, 0]]


def test_side_by_side_by_hand() -> None:
    A = Beside(Linear(Matrix(torch.tensor([[1.0, 2.0]])), 1), Linear(Matrix(torch.tensor([[3.0], [4.0]])), 1))
    assert (A @ torch.tensor([[1.0, 1.0, 2.0]])).tolist() == [[3, 6, 8]]
    assert (A.T @ torch.tensor([[1.0, 1.0, 1.0]])).tolist() == [[1, 2, 7]]


def test_a_gain_multiplies_the_matrix_but_not_the_bias() -> None:
    """2 x W' + b with W = [[1, 2], [0, -1], [3, 0]], b = [10, 20, 30] at one position."""
    A = Linear(Tiles(torch.tensor([[1.0, 2.0], [0.0, -1.0], [3.0, 0.0]])), 1, torch.tensor([10.0, 20.0, 30.0]), 2.0)
    x = torch.tensor([[1.0, 1.0]])
    assert (A @ x).tolist() == [[6, -2, 6]]
    assert A.matmat(x[None], torch.tensor([1.0]))[0].tolist() == [[16, 18, 36]]
    assert (A.T @ torch.tensor([[1.0, 1.0, 1.0]])).tolist() == [[8, 2]]


def test_convolution_by_hand() -> None:
    """Two channels, three taps, the last one at the position itself, at four positions."""
    A = Conv(torch.tensor([[100.0, 10.0, 1.0], [0.0, 1.0, 2.0]]), 4, torch.tensor([0.5, 0.0]))
    x = torch.tensor([[1.0, 1.0], [2.0, 0.0], [3.0, -1.0], [4.0, 0.0]])
    assert (A @ x).tolist() == [[1, 2], [12, 1], [123, -2], [234, -1]]
    assert A.matmat(x[None], torch.tensor([2.0]))[0, 0].tolist() == [2, 2]
    # Position 3 is read by itself alone, position 0 by the first three.
    assert (A.T @ x).tolist() == [[321, 2], [432, -1], [43, -2], [4, 0]]


def test_scan_by_hand() -> None:
    """A state that halves at each position, to which the value is added, and that is written out: chunks of two."""
    within, reading = torch.tensor([[1.0, 0.0], [0.5, 1.0]]), torch.tensor([[0.5], [0.25]])
    writing, moving = torch.tensor([[0.5, 1.0]]), torch.tensor([[0.25]])
    chunks = [part.expand(1, 3, -1, -1) for part in (within, reading, writing, moving)]
    values = torch.tensor([[16.0], [0.0], [32.0], [0.0], [64.0]])
    assert (Scan(*chunks, 5, value_size=1) @ values).flatten().tolist() == [16, 8, 36, 18, 73]
    assert (Scan(*chunks, 5, 2, value_size=1) @ values).flatten().tolist() == [18, 73]
    cotangent = torch.tensor([[0.0], [64.0]])
    assert (Scan(*chunks, 5, 2, value_size=1).T @ cotangent).flatten().tolist() == [4, 8, 16, 32, 64]


def test_grouped_query_mix_by_hand() -> None:
    """Four query heads, two value heads of one element, two positions: heads 0 and 1 read value 0, 2 and 3 value 1."""
    pattern = torch.tensor(
        [[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [1.0, -1.0]], [[0.0, 0.0], [3.0, 1.0]]]
    )
    A = Mix(pattern, 2, 1)
    assert (A.in_shape, A.out_shape) == ((2, 2), (2, 4))
    values = torch.tensor([[1.0, 10.0], [3.0, 30.0]])  # [position, value head]
    assert (A @ values).tolist() == [[1, 1, 20, 0], [2, 3, -20, 60]]
    # Position 1's cotangents of heads 0..3 go back by each head's second row.
    cotangent = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 5.0, 7.0, 1.0]])
    assert (A.T @ cotangent).tolist() == [[1, 10], [6, -6]]


def test_mix_moves_whole_heads() -> None:
    """Two heads of two elements with patterns that swap and keep the positions."""
    A = Mix(torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]), 2, 2)
    assert (A @ torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])).tolist() == [[5, 6, 3, 4], [1, 2, 7, 8]]


def test_select_by_hand() -> None:
    A = Random(torch.float32).select(2, 2, 0, n=3, d=1)
    assert (A @ torch.tensor([[1.0], [2.0], [3.0]])).tolist() == [[3], [3], [1]]
    assert (A.T @ torch.tensor([[1.0], [10.0], [100.0]])).tolist() == [[100], [0], [11]]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.booleans(), st.integers(1, 9), st.integers(0, 2**31))
def test_a_tiled_weight_equals_the_dense_one(out: int, into: int, n: int, bias: bool, at_once: int, seed: int) -> None:
    r = Random(torch.float64, seed)
    W, b = r(out, into), r(out) if bias else None
    tiled, dense = Linear(Tiles(W), n, b), Linear(Matrix(W), n, b)
    X, Y, t = r(2, n, into), r(2, n, out), r(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linop, "ROWS", at_once)
        assert torch.allclose(tiled.matmat(X, t), dense.matmat(X, t), rtol=1e-12, atol=1e-12)
        assert torch.allclose(tiled.rmatmat(Y), dense.rmatmat(Y), rtol=1e-12, atol=1e-12)
        expected = X @ W.T + (0 if b is None else t[:, None, None] * b)
        assert torch.allclose(tiled.matmat(X, t), expected, rtol=1e-12, atol=1e-12)
        assert torch.allclose(tiled.rmatmat(Y), Y @ W, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99)
)
def test_any_mix_is_a_sum_over_heads(groups: int, shared: int, m: int, n: int, size: int, seed: int) -> None:
    r = Random(torch.float64, seed)
    pattern, X = r(groups * shared, m, n), r(2, n, groups * size)
    A = Mix(pattern, groups, size)
    expected = torch.zeros(2, m, groups * shared * size, dtype=torch.float64)
    for head in range(groups * shared):
        value = X[:, :, head // shared * size :][:, :, :size]
        expected[:, :, head * size : (head + 1) * size] = pattern[head] @ value
    assert torch.allclose(A.matmat(X), expected, rtol=1e-12, atol=1e-12)
    assert dot_test(A, torch.Generator().manual_seed(seed)) < 1e-14


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.data())
def test_any_scan_is_the_recurrence_position_by_position(heads: int, n: int, size: int, data: st.DataObject) -> None:
    """`S = A S + w vᵀ`, `o = rᵀ S` with an own transition A at each position, chunked by products of those."""
    m, s, c = data.draw(st.integers(1, n)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    r, b = Random(torch.float64, data.draw(st.integers(0, 99))), -(-n // size)
    A, w, read = r(heads, b * size, s, s), r(heads, b * size, s), r(heads, b * size, s)

    def through(head: int, start: int, stop: int) -> Tensor:
        """Return the product of the transitions at `start:stop`."""
        product = torch.eye(s, dtype=torch.float64)
        for t in range(start, stop):
            product = A[head, t] @ product
        return product

    within, reading = torch.zeros(heads, b, size, size).double(), torch.zeros(heads, b, size, s).double()
    writing, moving = torch.zeros(heads, b, s, size).double(), torch.zeros(heads, b, s, s).double()
    for head, chunk, i in itertools.product(range(heads), range(b), range(size)):
        start, t, stop = chunk * size, chunk * size + i, (chunk + 1) * size
        for j in range(i + 1):
            within[head, chunk, i, j] = read[head, t] @ through(head, start + j + 1, t + 1) @ w[head, start + j]
        reading[head, chunk, i] = read[head, t] @ through(head, start, t + 1)
        writing[head, chunk, :, i] = through(head, t + 1, stop) @ w[head, t]
        moving[head, chunk] = through(head, start, stop)

    X, expected = r(2, n, heads * c), torch.zeros(2, n, heads * c, dtype=torch.float64)
    for one, head in itertools.product(range(2), range(heads)):
        state, of_head = torch.zeros(s, c, dtype=torch.float64), slice(head * c, (head + 1) * c)
        for t in range(n):
            state = A[head, t] @ state + torch.outer(w[head, t], X[one, t, of_head])
            expected[one, t, of_head] = read[head, t] @ state
    scan = Scan(within, reading, writing, moving, n, m, value_size=c)
    assert torch.allclose(scan.matmat(X), expected[:, n - m :], rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert dot_test(scan, torch.Generator().manual_seed(0)) < 1e-13


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_any_recurrence_in_channels_is_its_pattern(n: int, m: int, c: int, s: int, seed: int) -> None:
    """Of each channel: what is written decays by exp(rate Σ step) until it is read."""
    r, m = Random(torch.float64, seed), min(n, m)
    scan = r.channels(n, m, c=c, s=s)
    since = scan.step.cumsum(0)[:, None] - scan.step.cumsum(0)[None]  # [t, τ, c]
    decay = torch.exp(since[..., None] * scan.rate)
    weights = torch.einsum("ts,us,tucs,uc->tuc", scan.query, scan.key, decay, scan.step)
    pattern = weights.permute(2, 0, 1).tril() + torch.diag_embed(scan.skip[:, None].expand(c, n))
    X = r(2, n, c)
    expected = torch.einsum("ctu,kuc->ktc", pattern, X)[:, n - m :]
    assert torch.allclose(scan.matmat(X), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert dot_test(scan, torch.Generator().manual_seed(0)) < 1e-13


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_any_convolution_is_torchs(n: int, taps: int, channels: int, seed: int) -> None:
    r = Random(torch.float64, seed)
    X, weight, bias = r(2, n, channels), r(channels, taps), r(channels)
    padded = torch.nn.functional.pad(X.mT, (taps - 1, 0))
    expected = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=channels).mT
    found = Conv(weight, n, bias).matmat(X, torch.ones(2, dtype=torch.float64))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_matrices_are_tiled_matrices() -> None:
    assert isinstance(Matrix(torch.eye(2)), TiledMatrix)


# ---- the algebra


def trio(seed: int = 0) -> tuple[LinearOperator, LinearOperator, LinearOperator]:
    r = Random(torch.float64, seed)
    return r.linear(3, 6, 2), Mix(r(6, 3, 3), 2, 1) @ r.linear(3, 5, 2), r.linear(3, 4, 5)


def same(A: LinearOperator, B: LinearOperator) -> bool:
    """Compare linear parts, constants and shapes."""
    assert (A.in_shape, A.out_shape, A.dtype, A.device) == (B.in_shape, B.out_shape, B.dtype, B.device)
    zero, one = torch.zeros(1, *A.in_shape, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    pairs = ((columns(A), columns(B)), (A.matmat(zero, one), B.matmat(zero, one)))
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in pairs)


def test_product_is_the_matrix_product() -> None:
    A, B, C = trio()
    assert torch.allclose(flat(A @ B @ C), flat(A) @ flat(B) @ flat(C), rtol=1e-12, atol=1e-12)


def test_product_is_associative() -> None:
    A, B, C = trio()
    assert same((A @ B) @ C, A @ (B @ C))
    assert same(Chain(A, B, C), A @ B @ C)


def test_transpose_of_a_product_reverses_it() -> None:
    A, B, C = trio()
    assert same((A @ B).T, B.T @ A.T)
    assert same((A @ B @ C).T, C.T @ B.T @ A.T)


def test_sum_is_the_matrix_sum_and_distributes() -> None:
    (A, B, _), (D, *_) = trio(), trio(1)
    assert torch.allclose(flat(A + D), flat(A) + flat(D), rtol=1e-12, atol=1e-12)
    assert same(A + D, D + A)
    assert same((A + D) @ B, A @ B + D @ B)
    assert same((A + D).T, A.T + D.T)
    assert same(Sum(A, D, A), A + D + A)


def test_constants_pass_through_what_comes_after() -> None:
    """(A x + a) after (B x + b) is A B x + A b + a."""
    A, B, _ = trio()
    zero, one = torch.zeros(1, *B.in_shape, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    b = B.matmat(zero, one)
    assert torch.allclose((A @ B).matmat(zero, one), A.matmat(b, one), rtol=1e-12, atol=1e-12)
    assert (b != 0).all()


def test_transposing_twice_is_the_operator_itself() -> None:
    A, *_ = trio()
    assert A.T.T is A


def test_a_transpose_has_no_constant() -> None:
    A, *_ = trio()
    zero, one = torch.zeros(1, *A.out_shape, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert not A.T.matmat(zero, one).any()


def addmm_flop(total: Tensor, a: tuple[int, int], b: tuple[int, int], **_: object) -> int:
    return 2 * a[0] * a[1] * b[1]


def baddbmm_flop(total: Tensor, a: tuple[int, int, int], b: tuple[int, int, int], **_: object) -> int:
    return 2 * a[0] * a[1] * a[2] * b[2]


COUNTED = ["linear, tiled", "linear, gain", "mix, grouped", "mix to fewer positions", "experts", "two blocks"]


@pytest.mark.parametrize("name", [*COUNTED, *(name for name in OPERATORS if name.startswith("scan"))])
def test_flop_is_what_torch_counts(name: str) -> None:
    A = make(name)
    for product, shape in ((A.matmat, A.in_shape), (A.rmatmat, A.out_shape)):
        # The counter knows these only by their pure forms.
        in_place = {torch.ops.aten.addmm_: addmm_flop, torch.ops.aten.baddbmm_: baddbmm_flop}
        with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
            product(torch.ones(5, *shape, dtype=A.dtype))
        assert counted.get_total_flops() == 5 * A.flop > 0


@pytest.mark.parametrize("vectors", [1, 3, 8, 60])
@pytest.mark.parametrize("slabs", [(30,), (16, 16), (2,)], ids=str)
def test_a_network_takes_the_way_with_fewer_flop(slabs: tuple[int, ...], vectors: int) -> None:
    A, hidden = Random(torch.float64).network(*slabs, n=2, d=6, out=5, tiled=False), sum(slabs)
    through, made = 2 * vectors * hidden * (6 + 5), 2 * 6 * 5 * (hidden + vectors)
    for product, shape, formula in (
        (A.rmatmat, A.out_shape, "kne,nemd->kmd"),
        (A.matmat, A.in_shape, "kmd,nemd->kne"),
    ):
        given = Random(torch.float64, 1)(vectors, *shape)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop}) as counted:
            found = product(given)
        assert counted.get_total_flops() == 2 * min(through, made)  # at two positions
        torch.testing.assert_close(found, torch.einsum(formula, given, columns(A)), rtol=1e-12, atol=1e-12)


def test_matrices_of_a_network_take_no_more_memory_than_hidden_units() -> None:
    # 4096 dimensions: all rows of a Jacobian at once, or hidden units; 8192: hidden units.
    assert forms(4096, 4096, 4096, 14336, 2048)
    assert not forms(4000, 4096, 4096, 14336, 2048)
    assert not forms(8192, 8192, 8192, 28672, 2048)


def test_dot_test_finds_a_wrong_transpose() -> None:
    class Wrong(Scale):
        def rmatmat(self, Y: Tensor) -> Tensor:
            return super().rmatmat(Y) * 1.001

    assert dot_test(Wrong(Random(torch.float64)(3, 4)), torch.Generator().manual_seed(0)) > 1e-5


# ---- refusals


def test_shapes_that_do_not_fit_are_named() -> None:
    r = Random(torch.float64)
    A, B = r.linear(3, 4, 5), r.linear(3, 6, 2)
    with pytest.raises(ValueError, match=r"cannot chain Linear of input \(3, 4\) after Linear of output \(3, 2\)"):
        A @ B
    with pytest.raises(ValueError, match=r"cannot add operators \(3, 4\) -> \(3, 5\) and \(3, 6\) -> \(3, 2\)"):
        A + B
    with pytest.raises(ValueError, match=r"takes a vector of shape \(3, 4\), got \(4,\)"):
        A @ r(4)
    with pytest.raises(ValueError, match=r"takes a vector of shape \(3, 4\), got \(1, 3, 4\)"):
        A @ r(1, 3, 4)


def test_a_missing_method_is_not_silent() -> None:
    with pytest.raises(NotImplementedError):
        LinearOperator().matmat(torch.zeros(1))
    with pytest.raises(NotImplementedError):
        LinearOperator().rmatmat(torch.zeros(1))


def test_to_scipy_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ModuleNotFoundError, match="needs SciPy, which is not installed; pip install scipy"):
        Random(torch.float64).linear().to_scipy()
