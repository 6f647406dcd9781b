"""The analyses against dense float64 arithmetic on the oracle's Jacobian."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from torch import Tensor

from ggjac.analysis import svd as stable_rank_module
from ggjac.analysis.attribute import attribute
from ggjac.analysis.svd import spectrum, stable_rank
from ggjac.gguf import GGUFError
from ggjac.model import open_model
from ggjac.svd import svd

CASES = ("gqa", "biases", "tied")


def pair(tiny_files: dict[str, Path], case: str, position: int = -1, dtype: str = "float64"):
    """Return ggjac's model and Jacobian, and the oracle's Jacobian and weights."""
    ids, model = tiny.prompt(case, 6), open_model(tiny_files[case], dtype=dtype)
    known = oracle.load(tiny_files[case])
    expected = oracle.jacobian(known, ids, mlp_path="up", position=position)
    return model, model.trace(ids).jacobian(position), expected, known.weights


def head_of(weights: dict[str, Tensor]) -> Tensor:
    return weights.get("output.weight", weights["token_embd.weight"])


# ---- attribution


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("position", [-1, 2])
def test_shares_are_those_of_the_dense_jacobian(case: str, position: int, tiny_files: dict[str, Path]) -> None:
    _model, J, expected, weights = pair(tiny_files, case, position)
    logits = head_of(weights) @ expected.y
    for target in (None, 0, 17):
        found = attribute(J, target)
        w = head_of(weights)[found.target]
        assert found.target == (int(logits.argmax()) if target is None else target)
        assert math.isclose(found.logit, float(logits[found.target]), rel_tol=1e-10)
        shares = torch.einsum("e,end,nd->n", w, expected.J, expected.x)
        assert torch.allclose(found.shares, shares, rtol=0, atol=1e-10)
        assert math.isclose(found.offset, float(w @ expected.offset), abs_tol=1e-10)
        assert not found.shares[J.position + 1 :].any()
        # They make up the logit, with nothing left over.
        assert math.isclose(float(found.shares.sum()) + found.offset, float(logits[found.target]), rel_tol=1e-10)
        assert abs(found.unexplained) < 1e-11


def test_shares_in_single_precision(tiny_files: dict[str, Path]) -> None:
    _model, J, expected, weights = pair(tiny_files, "biases", dtype="float32")
    found = attribute(J, 5)
    assert found.shares.dtype == torch.float64
    assert math.isclose(found.logit, float(head_of(weights)[5] @ expected.y), rel_tol=1e-5)
    assert abs(found.unexplained) < 1e-4


def test_one_sweep_pays_for_all_shares(tiny_files: dict[str, Path]) -> None:
    model, J, *_ = pair(tiny_files, "gqa")
    _ = J.offset
    model.weights.reads.clear()
    attribute(J, 3)
    assert model.weights.reads["blk.0.ffn_up.weight"] == tiny.options("gqa").ff
    assert model.weights.reads["output.weight"] == 1


@pytest.mark.parametrize("target", [-1, 128])
def test_a_target_outside_the_vocabulary_is_refused(target: int, tiny_files: dict[str, Path]) -> None:
    _model, J, *_ = pair(tiny_files, "gqa")
    with pytest.raises((GGUFError, ValueError), match="128"):
        attribute(J, target)


# ---- spectrum


@pytest.mark.parametrize("case", CASES)
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
    ids, scores = (part.reshape(3, 6, 5)[:, :reached] for part in found.right)
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


def test_signs_do_not_depend_on_the_seed(tiny_files: dict[str, Path]) -> None:
    _model, J, *_ = pair(tiny_files, "gqa")
    a, b = (spectrum(J, 3, tol=1e-9, seed=seed, max_sweeps=100) for seed in (0, 1))
    assert torch.allclose(a.svd.U, b.svd.U, rtol=0, atol=1e-7)
    assert a.left.ids.tolist() == b.left.ids.tolist()


# ---- stable rank


@pytest.mark.parametrize("case", CASES)
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
def estimated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., stable_rank_module.StableRank]:
    """Return `stable_rank` with all sizes estimated."""
    monkeypatch.setattr(stable_rank_module, "EXACT_ROWS", 0)
    return stable_rank_module.stable_rank


@pytest.mark.parametrize("rank", [1, 5])
def test_the_estimates_error_bar_is_honest(
    rank: int, tiny_files: dict[str, Path], estimated: Callable[..., stable_rank_module.StableRank]
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
    tiny_files: dict[str, Path], estimated: Callable[..., stable_rank_module.StableRank]
) -> None:
    _, J, *_ = pair(tiny_files, "gqa")
    errors = [estimated(J, svd(J, rank, tol=1e-6, max_sweeps=100)).error for rank in (1, 16, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


def test_the_estimate_is_seeded(
    tiny_files: dict[str, Path], estimated: Callable[..., stable_rank_module.StableRank]
) -> None:
    _, J, *_ = pair(tiny_files, "gqa")
    triplets = svd(J, 2)
    assert estimated(J, triplets, seed=1) == estimated(J, triplets, seed=1) != estimated(J, triplets, seed=2)
