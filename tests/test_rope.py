"""Rotation angles and the rotation itself, against numbers worked out otherwise; llama.cpp judges in test_model."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ggjac.config import Rope
from ggjac.linop import dot_test
from ggjac.rope import Turn, rotate, rotation


def plain(dimensions: int = 8, base: float = 100.0, **options: object) -> Rope:
    return Rope(dimensions=dimensions, base=base, pairs="adjacent", **options)


def angles(rope: Rope, n: int, factors: torch.Tensor | None = None) -> torch.Tensor:
    """Return the angles [n, p] of small positions, and check that both tables have one magnitude."""
    cos, sin = rotation(rope, n, factors)
    assert cos.dtype == sin.dtype == torch.float64
    magnitude = torch.hypot(cos, sin)
    assert torch.allclose(magnitude, magnitude[0, 0], rtol=1e-14)
    return torch.atan2(sin, cos)


def test_angles_are_geometric() -> None:
    """Base 100 and 8 dims: pair i turns by 100^(-i/4) = 1, 10^-0.5, 0.1, 10^-1.5 a token."""
    expected = torch.tensor([[0.0] * 4, [1, 10**-0.5, 0.1, 10**-1.5], [2, 2 * 10**-0.5, 0.2, 2 * 10**-1.5]])
    assert torch.allclose(angles(plain(), 3), expected.double(), rtol=1e-6)


def test_linear_scaling_slows_every_pair() -> None:
    assert torch.allclose(angles(plain(factor=4.0), 4), angles(plain(), 4) / 4, rtol=1e-14)


def test_factors_divide_frequencies() -> None:
    factors = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert torch.allclose(angles(plain(), 4, factors), angles(plain(), 4) / factors, rtol=1e-14)
    assert torch.allclose(angles(plain(factor=2.0), 4, factors), angles(plain(), 4) / factors / 2, rtol=1e-14)


def test_attention_factor_is_a_magnitude() -> None:
    (cos, sin), (c, s) = rotation(plain(magnitude=1.5), 3), rotation(plain(), 3)
    assert torch.allclose(cos, 1.5 * c)
    assert torch.allclose(sin, 1.5 * s)


def test_yarn_by_hand() -> None:
    """64 dims, base 10000, 4096 tokens: the pair that turns 32 times in them is 64 ln(4096 / 64 pi) / (2 ln 10000) =
    10.47, the one that turns once 22.51. So pairs to 10 keep their frequency, from 23 on they slow down by F = 8; pair
    15 is 5/13 of the way."""
    rope = plain(64, 10000.0, factor=8.0, yarn=True, original_context=4096)
    kept, turned = angles(plain(64, 10000.0), 2)[1], angles(rope, 2)[1]
    assert torch.allclose(turned[:11], kept[:11], rtol=1e-12)
    assert torch.allclose(turned[23:], kept[23:] / 8, rtol=1e-12)
    assert math.isclose(float(turned[15]), float(kept[15]) * (8 / 13 + 5 / 13 / 8), rel_tol=1e-12)


def test_yarn_without_extension_changes_nothing() -> None:
    rope = plain(64, 10000.0, factor=1.0, yarn=True, original_context=4096)
    for ours, theirs in zip(rotation(rope, 9), rotation(plain(64, 10000.0), 9), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.integers(1, 6), st.integers(0, 99))
def test_adjacent_pairs_are_complex_numbers(pairs: int, heads: int, rest: int, n: int, seed: int) -> None:
    x = torch.randn(n, heads, 2 * pairs + rest, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rope = plain(2 * pairs, magnitude=1.2)
    y = rotate(x, rope.pairs, *rotation(rope, n))
    for position in range(n):
        for head in range(heads):
            a, b = x[position, head].tolist(), y[position, head].tolist()
            for i in range(pairs):
                turn = cmath.rect(1.2, position * 100.0 ** (-i / pairs))
                assert cmath.isclose(
                    complex(*b[2 * i : 2 * i + 2]), turn * complex(*a[2 * i : 2 * i + 2]), abs_tol=1e-12
                )
            assert a[2 * pairs :] == b[2 * pairs :]


def test_halves_pair_a_dimension_with_the_one_half_way_on() -> None:
    x = torch.randn(5, 2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rope = Rope(dimensions=6, base=100.0, pairs="halves")
    y = rotate(x, rope.pairs, *rotation(rope, 5))
    order = [0, 3, 1, 4, 2, 5, 6]
    adjacent = rotate(x[..., order], "adjacent", *rotation(plain(6), 5))
    assert torch.allclose(y[..., order], adjacent, rtol=0, atol=1e-14)


@pytest.mark.parametrize("pairs", ["adjacent", "halves"])
def test_scores_depend_on_the_distance_only(pairs: str) -> None:
    """What the rotation is for: <R_i q, R_j k> is a function of i - j."""
    rope = Rope(dimensions=8, base=50.0, pairs=pairs)
    q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tables = rotation(rope, 9)
    q, k = (rotate(x.expand(9, 1, 8), pairs, *tables)[:, 0] for x in (q, k))
    scores = q @ k.T
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), rtol=0, atol=1e-13)


def test_the_last_dims_of_heads_turn_and_turn_back() -> None:
    """As an operator, against the rotation of the leading dims; a rotation's transpose is its inverse."""
    generator = torch.Generator().manual_seed(0)
    x, tables = torch.randn(3, 5, 2, 7, generator=generator, dtype=torch.float64), rotation(plain(4), 5)
    turn, back = (Turn(torch.stack(tables), 7, 2, back=back) for back in (False, True))
    y = turn.matmat(x.flatten(2)).unflatten(2, (2, 7))
    assert torch.equal(y[..., :3], x[..., :3])
    assert torch.equal(y[..., 3:], rotate(x[..., 3:], "adjacent", *tables))
    assert torch.allclose(back.matmat(y.flatten(2)), x.flatten(2), rtol=0, atol=1e-14)
    assert dot_test(turn, generator) < 1e-14
    assert dot_test(back, generator) < 1e-14


def test_position_zero_is_left_alone() -> None:
    x = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate(x, "adjacent", *rotation(plain(), 1)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_vectors_dtype_is_kept(dtype: torch.dtype) -> None:
    """Angles of far positions are computed in float64, so that the error is that of the result's rounding."""
    x = torch.randn(3000, 1, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = rotate(x.double(), "adjacent", *rotation(plain(), 3000))
    y = rotate(x, "adjacent", *rotation(plain(), 3000))
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() < 4 * torch.finfo(dtype).eps * exact.abs().max()
