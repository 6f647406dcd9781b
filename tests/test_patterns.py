"""Patterns of recurrences: against the recurrence itself, its closed form, and the operator that carries a state."""

import math

import pytest
import torch
from helpers import distance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ggjac.blocks.norms import HeadNorm
from ggjac.blocks.patterns import Recurrence, recurrent_pattern, recurrent_scan
from ggjac.config import Alibi
from ggjac.linop import Mix, Scan, dot_test
from ggjac.rope import Rotate, rotate
from ggjac.sizes import scan_chunk

H, S, V = 3, 4, 5  # heads, elements of a key and of a value


def drawn(
    n: int,
    *,
    channels: bool = False,
    removes: bool = True,
    skip: bool = False,
    before: bool = False,
    takes: bool = False,
    seed: int = 0,
) -> Recurrence:
    """Return a random recurrence, with decays near 0 and near 1 and write strengths near 0 and 1 among others."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    unit = torch.nn.functional.normalize(normal(n, H, S), dim=-1)
    decay = -torch.exp(3 * normal(n, H, S if channels else 1))
    found = Recurrence(
        normal(n, H, S), unit, decay, torch.sigmoid(4 * normal(n, H)), removes, normal(n, H) if skip else None, before
    )
    return found._replace(take=unit, put=0.5 * unit) if takes else found


def step_by_step(recurrence: Recurrence, v: Tensor) -> Tensor:
    """Return the outputs `[n, h, c]` from the definition: full transition matrices, one head at a time."""
    n, heads, s = recurrence.k.shape
    found = torch.zeros_like(v)
    for h in range(heads):
        state = torch.zeros(s, v.shape[2], dtype=v.dtype)
        for t in range(n):
            k, beta = recurrence.k[t, h], recurrence.write[t, h]
            transition = torch.diag(recurrence.log_decay[t, h].exp().expand(s))
            if recurrence.removes:
                transition = (torch.eye(s, dtype=v.dtype) - beta * torch.outer(k, k)) @ transition
            if recurrence.take is not None and recurrence.put is not None:
                transition = transition - torch.outer(recurrence.put[t, h], recurrence.take[t, h])
            earlier, state = state, transition @ state + beta * torch.outer(k, v[t, h])
            found[t, h] = recurrence.q[t, h] @ (earlier if recurrence.before else state)
            if recurrence.skip is not None:
                found[t, h] += recurrence.skip[t, h] * v[t, h]
    return found


KINDS = {
    "delta": {},
    "delta with a decay for each channel": {"channels": True},
    "state space": {"removes": False, "skip": True},
    "RWKV-6": {"channels": True, "removes": False, "skip": True, "before": True},
    "RWKV-7": {"channels": True, "removes": False, "takes": True},
}


def values(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, H, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_pattern_is_the_recurrence_on_the_identity(kind: str, n: int) -> None:
    recurrence, v = drawn(n, **KINDS[kind]), values(n)
    truth = step_by_step(recurrence, v)
    assert distance(recurrence.run(v, v.new_zeros(H, S, V))[0], truth) < 1e-13
    pattern = recurrent_pattern(recurrence)
    assert pattern.shape == (H, n, n)
    assert distance(torch.einsum("hmn,nhv->mhv", pattern, v), truth) < 1e-13
    assert not pattern.triu(1).any()


def test_a_delta_pattern_has_its_closed_form() -> None:
    """`P = M (I + A)⁻¹ diag(β)`, A strictly lower and M lower triangular: the form of the papers, not of the code."""
    recurrence = drawn(6)
    q, k, log_decay, beta = recurrence[:4]
    G = log_decay[..., 0].cumsum(0).T  # [h, n]
    decay = (G[:, :, None] - G[:, None]).tril().exp()  # of what position j wrote, at position i
    A = torch.einsum("ihs,jhs->hij", k, k) * decay * beta.T[:, :, None]
    M = (torch.einsum("ihs,jhs->hij", q, k) * decay).tril()
    inverse = torch.linalg.inv(torch.eye(6, dtype=A.dtype) + A.tril(-1))
    assert distance(recurrent_pattern(recurrence), M @ inverse @ torch.diag_embed(beta.T)) < 1e-12


def test_limits_of_writing() -> None:
    """Nothing written: no output. Everything overwritten, with one key and no decay: only the last value is left."""
    silent = drawn(5)._replace(write=torch.zeros(5, H, dtype=torch.float64))
    assert not recurrent_pattern(silent).any()
    key = torch.zeros(5, H, S, dtype=torch.float64)
    key[..., 0] = 1
    ones, zeros = torch.ones(5, H, dtype=torch.float64), torch.zeros(5, H, 1, dtype=torch.float64)
    assert torch.equal(
        recurrent_pattern(Recurrence(key, key, zeros, ones, removes=True)), torch.eye(5).double().expand(H, 5, 5)
    )
    kept = recurrent_pattern(Recurrence(key, key, zeros, ones, removes=False))
    assert torch.equal(kept, torch.ones(5, 5).tril().double().expand(H, 5, 5))
    forgotten = recurrent_pattern(Recurrence(key, key, zeros - math.inf, ones, removes=False))
    assert torch.equal(forgotten, torch.eye(5).double().expand(H, 5, 5))


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(list(KINDS)), n=st.integers(1, 14), chunk=st.integers(1, 6), m=st.integers(1, 14))
def test_a_scan_is_the_pattern(kind: str, n: int, chunk: int, m: int) -> None:
    """For the last `m` positions, forwards and backwards; whether or not the chunks are whole."""
    m, recurrence = min(m, n), drawn(n, **KINDS[kind])
    tape = recurrent_scan(recurrence, chunk)
    scan = Scan(*tape, n, m, value_size=V)
    mix = Mix(recurrent_pattern(recurrence)[:, n - m :], H, V)
    x, y = values(n).flatten(1)[None], values(m, 2).flatten(1)[None]
    assert distance(scan.matmat(x), mix.matmat(x)) < 1e-12
    assert distance(scan.rmatmat(y), mix.rmatmat(y)) < 1e-12
    assert dot_test(scan, torch.Generator().manual_seed(0)) < 1e-13
    shorter = Scan(*tape.at(m), m, value_size=V)  # of a longer tape
    assert (
        distance(shorter.matmat(x[:, :m]), Mix(recurrent_pattern(recurrence)[:, :m, :m], H, V).matmat(x[:, :m])) < 1e-12
    )


def test_a_state_carries_on() -> None:
    """In pieces, as in generation."""
    recurrence, v = drawn(9, channels=True, skip=True), values(9)
    state, found = v.new_zeros(H, S, V), []
    for a, b in ((0, 4), (4, 5), (5, 9)):
        piece = Recurrence(*(part[a:b] for part in recurrence[:4]), recurrence.removes, recurrence.skip[a:b])
        o, state = piece.run(v[a:b], state)
        found.append(o)
    assert distance(torch.cat(found), step_by_step(recurrence, v)) < 1e-13


def test_long_prompts_are_scanned() -> None:
    assert scan_chunk(4 * S, S) is None
    assert scan_chunk(4 * S + 1, S) == S


@pytest.mark.parametrize(("heads", "bias"), [(1, 8.0), (8, 8.0), (12, 8.0), (5, 16.0)])
def test_slopes_of_alibi_are_the_papers(heads: int, bias: float) -> None:
    """By the code of its authors, generalized to another bias: of heads beyond a power of two, those of twice as many.

    A range of heads has the slopes that they have among all.
    """

    def power_of_two(n: int) -> list[float]:
        start = 2 ** -(2 ** -(math.log2(n) - math.log2(bias)))
        return [start * start**i for i in range(n)]

    closest = 2 ** math.floor(math.log2(heads))
    expected = power_of_two(closest) + power_of_two(2 * closest)[::2][: heads - closest]
    assert Alibi(bias, heads, range(heads)).slopes == pytest.approx(expected, rel=1e-14)
    part = range(heads // 2, heads)
    assert Alibi(bias, heads, part).slopes == Alibi(bias, heads, range(heads)).slopes[heads // 2 :]


@pytest.mark.parametrize("pairs", ["adjacent", "halves"])
@pytest.mark.parametrize("first", [0, 3])
def test_a_rotation_of_heads_is_that_of_each(pairs: str, first: int) -> None:
    """As an operator, and its transpose; dims before the first and after the last pair stay."""
    generator = torch.Generator().manual_seed(0)
    x, angles = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 3, 9), (5, 2)))
    cos, sin = 1.3 * angles.cos(), 1.3 * angles.sin()
    operator = Rotate(pairs, cos, sin, 9, 3, first=first)
    expected = torch.cat([x[..., :first], rotate(x[..., first:], pairs, cos, sin)], -1)
    assert distance(operator.matmat(x.flatten(2)), expected.flatten(2)) < 1e-14
    assert dot_test(operator, torch.Generator().manual_seed(1)) < 1e-14


@pytest.mark.parametrize("weights", [None, (4,), (3, 4)])
@pytest.mark.parametrize("centred", [False, True])
def test_a_norm_of_heads_is_a_frozen_one(centred: bool, weights: tuple[int, ...] | None) -> None:
    """Linear with the scale held: exact at its own input, and its transpose is the adjoint."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    weight = None if weights is None else torch.randn(*weights, generator=generator, dtype=torch.float64)
    heads = x.unflatten(1, (3, 4))
    heads = heads - heads.mean(-1, keepdim=True) if centred else heads
    scale = heads.square().mean(-1, keepdim=True).rsqrt()
    operator = HeadNorm(scale, weight, x, centred=centred)
    expected = heads * scale * (1 if weight is None else weight)
    assert distance(operator.matmat(torch.stack([x, 2 * x]))[1], 2 * expected.flatten(1)) < 1e-14
    assert dot_test(operator, torch.Generator().manual_seed(1)) < 1e-14
