"""The contrast of detached and ordinary Jacobian against dense float64 arithmetic, NumPy and SciPy."""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import oracle
import pytest
import tiny
import torch
from helpers import distance

from ggjac.analysis.contrast import Agreement, agreement, contrast, ordinary_jacobian
from ggjac.correlation import correlation, ranks
from ggjac.jacobian import Span, Tap
from ggjac.model import open_model

stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
# Biases on the live path, a soft cap on the logits, a scale of them, and none of it.
CASES = ("gqa", "biases", "gemma2", "granite", "gpt_oss", "cohere2")


def expected_agreement(y: np.ndarray, r: np.ndarray, p: np.ndarray, q: np.ndarray, k: int) -> Agreement:
    """Measure by NumPy and SciPy; `p` and `q` are logits."""
    softmax = [np.exp(z - z.max()) / np.exp(z - z.max()).sum() for z in (p, q)]
    best = [set(np.argsort(-z)[:k].tolist()) for z in (p, q)]
    return Agreement(
        relative_l2=np.linalg.norm(r - y) / np.linalg.norm(y),
        std_ratio=np.std(r - y) / np.std(r),
        std_ratio_output=np.std(r - y) / np.std(y),
        max_abs=np.abs(r - y).max(),
        pearson=stats.pearsonr(y, r).statistic,
        spearman=stats.spearmanr(y, r).statistic,
        top1=bool(p.argmax() == q.argmax()),
        top_k=len(best[0] & best[1]) / k,
        k=k,
        kl=stats.entropy(softmax[0], softmax[1]),
    )


def same(found: Agreement, expected: Agreement, tolerance: float = 1e-9) -> None:
    for name, value in asdict(expected).items():
        assert math.isclose(getattr(found, name), value, rel_tol=tolerance, abs_tol=tolerance), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("position", [-1, 2])
def test_both_reconstructions_are_those_of_the_dense_matrices(
    case: str, position: int, tiny_files: dict[str, Path]
) -> None:
    ids, known = tiny.prompt(case, 6), oracle.load(tiny_files[case])
    frozen = oracle.jacobian(known, ids, mlp_path="up", position=position)
    ordinary = oracle.jacobian(known, ids, mlp_path=None, position=position)
    rebuilt = torch.einsum("end,nd->e", frozen.J, frozen.x) + frozen.offset
    pushed = torch.einsum("end,nd->e", ordinary.J, ordinary.x)
    model = open_model(tiny_files[case], dtype="float64")
    found = contrast(model.trace(ids).jacobian(position), top=5)
    for actual, expected in ((found.y, frozen.y), (found.detached, rebuilt), (found.ordinary, pushed)):
        assert actual.dtype == torch.float64
        assert distance(actual, expected) < 1e-10
    p = oracle.forward(known, ids)["logits"][position].numpy()
    q = oracle.head(known, pushed).numpy()
    same(found.ordinary_agreement, expected_agreement(frozen.y.numpy(), pushed.numpy(), p, q, 5))
    assert found.detached_agreement.relative_l2 < 1e-13
    assert found.detached_agreement.std_ratio < 1e-13
    assert found.detached_agreement.pearson > 1 - 1e-13
    assert (found.detached_agreement.top1, found.detached_agreement.top_k) == (True, 1.0)
    assert abs(found.detached_agreement.kl) < 1e-13
    assert found.ordinary_agreement.relative_l2 > 0.1  # the paper's point


@pytest.mark.parametrize("seed", range(3))
def test_measures_are_scipys(seed: int) -> None:
    generator = np.random.default_rng(seed)
    y, p = generator.normal(size=40), generator.normal(size=100)
    r, q = y + generator.normal(size=40), p + generator.normal(size=100)
    found = agreement(*(torch.from_numpy(part) for part in (y, r, p, q)), 10)
    same(found, expected_agreement(y, r, p, q, 10), 1e-13)
    ties = np.round(r)  # many equal values
    assert len(np.unique(ties)) < 12
    found = agreement(*(torch.from_numpy(part) for part in (y, ties, p, p)), 7)
    same(found, expected_agreement(y, ties, p, p, 7), 1e-13)
    assert found.kl == 0
    assert ranks(torch.from_numpy(ties)).tolist() == stats.rankdata(ties).tolist()


def test_measures_where_nothing_is_left() -> None:
    y, flat, z = torch.arange(4.0).double(), torch.zeros(4).double(), torch.zeros(3).double()
    found = agreement(y, flat, z, z, 10)
    assert found.relative_l2 == 1
    assert found.std_ratio == math.inf
    assert math.isnan(found.pearson)
    assert math.isnan(found.spearman)
    assert found.k == 3  # no more tokens than there are
    assert math.isclose(correlation(y, -y), -1, abs_tol=1e-15)


def test_in_single_precision_only_the_detached_one_is_rounded(tiny_files: dict[str, Path]) -> None:
    ids = tiny.prompt("gqa", 6)
    wide, narrow = (open_model(tiny_files["gqa"], dtype=dtype) for dtype in ("float64", "float32"))
    exact, found = (contrast(model.trace(ids).jacobian()) for model in (wide, narrow))
    assert 0 < found.detached_agreement.relative_l2 < 1e-5
    same(found.ordinary_agreement, exact.ordinary_agreement, 1e-3)


def test_one_sweep_for_each_and_one_for_the_head(tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files["gqa"])
    J, reads = model.trace(tiny.prompt("gqa", 6)).jacobian(), model.weights.reads
    reads.clear()
    contrast(J)
    rows = model.gguf.tensors["output.weight"].shape[0]
    assert reads["output.weight"] == rows
    assert reads["blk.0.attn_q.weight"] == 64  # frozen for the detached one
    assert reads["blk.0.ffn_down.weight"] == 2 * 64


def test_a_map_inside_the_network_has_no_counterpart(tiny_files: dict[str, Path]) -> None:
    trace = open_model(tiny_files["three_layers"]).trace([1, 2, 3])
    for route, raw in ((Span(1, Tap("layer", 3)), False), (Span(0, Tap("layer", 2)), False), (None, True)):
        with pytest.raises(ValueError, match="ordinary Jacobian leads from the embeddings to the output"):
            ordinary_jacobian(trace.jacobian(span=route, raw=raw))
    assert ordinary_jacobian(trace.jacobian(1)).position == 1
