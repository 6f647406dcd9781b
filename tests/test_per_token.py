"""Singular vectors of each position's own map against dense `torch.linalg` on the oracle's Jacobian."""

from pathlib import Path

import oracle
import pytest
import tiny
import torch
from helpers import IDS

from ggjac.analysis.per_token import per_token, tensors
from ggjac.analysis.svd import spectrum
from ggjac.linop import dot_test
from ggjac.model import open_model


@pytest.mark.parametrize("case", ["gqa", "biases", "tied", "gemma2", "gpt2", "hy_v4", "hrm_text"])
@pytest.mark.parametrize("position", [-1, 2])
@pytest.mark.parametrize("chunk_bytes", [1 << 30, 60_000])
def test_every_position_is_decomposed_as_dense_arithmetic_does(
    case: str, position: int, chunk_bytes: int, tiny_files: dict[str, Path]
) -> None:
    ids, known = tiny.prompt(case, 5), oracle.load(tiny_files[case])
    expected = oracle.jacobian(known, ids, mlp_path="up", position=position)
    model = open_model(tiny_files[case], dtype="float64")
    J = model.trace(ids).jacobian(position)
    J.chunk_bytes = chunk_bytes
    found = per_token(J, 2, top=4, tol=1e-9, max_sweeps=300)
    assert [each.position for each in found] == list(range(J.position + 1))
    embeddings = known.weights["token_embd.weight"]
    head = known.weights.get("output.weight", embeddings)
    for each in found:
        dense = expected.J[:, each.position]
        U, S, Vh = torch.linalg.svd(dense)
        sign = torch.sign(U.T[:2] @ (dense @ expected.x[each.position]))[:, None]
        U, V = U.T[:2] * sign, Vh[:2] * sign
        assert each.svd.converged
        assert torch.allclose(each.svd.S, S[:2], rtol=1e-10)
        assert torch.allclose(each.svd.U, U, rtol=0, atol=1e-6)
        assert torch.allclose(each.svd.Vh, V, rtol=0, atol=1e-6)
        logits, cosine = (
            U @ head.T,
            torch.nn.functional.normalize(V, dim=1) @ torch.nn.functional.normalize(embeddings).T,
        )
        assert torch.allclose(each.left.scores, logits.topk(4).values, atol=1e-5)
        assert torch.allclose(each.right.scores, cosine.topk(4).values, atol=1e-5)
        assert each.left.ids[:, 0].tolist() == logits.argmax(1).tolist()
        assert each.right.ids[:, 0].tolist() == cosine.argmax(1).tolist()


@pytest.mark.parametrize("case", ["gqa", "biases", "gemma2", "gpt2", "lfm2"])
def test_some_positions_are_decomposed_as_all_are(case: str, tiny_files: dict[str, Path]) -> None:
    """With their share of the vectors in each sweep; one that is asked for twice, and from the end, is there once."""
    model = open_model(tiny_files[case], dtype="float64")
    J, exact = model.trace(tiny.prompt(case, 6)).jacobian(4), {"tol": 1e-9, "max_sweeps": 300}
    seen: list[int] = []
    pull = J.rmatmat
    J.rmatmat = lambda Y: seen.append(len(Y)) or pull(Y)  # type: ignore[method-assign]
    every, first = per_token(J, 2, **exact), seen[0]
    seen.clear()
    some = per_token(J, 2, positions="3,0,-1,-2", **exact)
    assert [each.position for each in some] == [0, 3, 4]
    assert seen[0] * 5 == first * 3
    for each in some:
        expected = every[each.position].svd
        assert torch.allclose(each.svd.S, expected.S, rtol=1e-10)
        assert torch.allclose(each.svd.U, expected.U, rtol=0, atol=1e-6)
        assert torch.allclose(each.svd.Vh, expected.Vh, rtol=0, atol=1e-6)
        assert each.left.ids[:, 0].tolist() == every[each.position].left.ids[:, 0].tolist()
    assert tensors(some)["token_position"].tolist() == [0, 3, 4]


def test_excluded_positions_have_no_map(tiny_files: dict[str, Path]) -> None:
    trace = open_model(tiny_files["gqa"], dtype="float64").trace(tiny.prompt("gqa", 6))
    J, exact = trace.jacobian(4, exclude="1,3"), {"tol": 1e-9, "max_sweeps": 300}
    found, every = per_token(J, 2, **exact), per_token(trace.jacobian(4), 2, **exact)
    assert [each.position for each in found] == [0, 2, 4]
    for each in found:
        assert torch.allclose(each.svd.S, every[each.position].svd.S, rtol=1e-10)
    assert [row["position"] for row in spectrum(J, 1).data()["triplets"][0]["right"]] == [0, 2, 4]
    assert set(spectrum(J, 1).sheet().columns["position"]) == {0, 2, 4}
    with pytest.raises(ValueError, match="input_position=3 is excluded: the map does not read it"):
        per_token(J, 2, positions=[3, 4])


@pytest.mark.parametrize("case", ["gqa", "biases"])
def test_a_rough_search_leaves_no_trace(case: str, tiny_files: dict[str, Path]) -> None:
    ids = tiny.prompt(case, 5)
    dense = oracle.jacobian(tiny_files[case], ids, mlp_path="up").J
    for each in per_token(open_model(tiny_files[case]).trace(ids).jacobian(), 3, tol=1e-4, search_dtype=torch.bfloat16):
        own, svd = dense[:, each.position], each.svd
        assert svd.converged
        assert 0 < svd.rough_sweeps < svd.sweeps
        assert torch.allclose(svd.S.double(), torch.linalg.svdvals(own)[:3], rtol=1e-5)
        away = svd.Vh.double() @ own.T - svd.S[:, None] * svd.U, svd.U.double() @ own - svd.S[:, None] * svd.Vh
        worst = torch.stack([part.norm(dim=1) for part in away]).amax(0) / svd.S
        assert (worst <= 1.01 * svd.residual + 1e-6).all()


def test_the_maps_are_parts_of_the_joint_one(tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files["gqa"], dtype="float64")
    J = model.trace(tiny.prompt("gqa", 4)).jacobian()
    parts = [J.at_position(i) for i in range(4)]
    assert torch.allclose(torch.cat([part.to_dense() for part in parts], 1), J.to_dense(), rtol=0, atol=1e-12)
    assert all(dot_test(part, torch.Generator().manual_seed(0)) < 1e-13 for part in parts)


def test_all_positions_share_their_sweeps(tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files["gqa"])
    J, reads = model.trace(tiny.prompt("gqa", 5)).jacobian(), model.weights.reads
    reads.clear()
    found = per_token(J, 2)
    sweeps = max(each.svd.sweeps for each in found)
    assert reads["blk.0.ffn_up.weight"] == (sweeps + 1) * tiny.options("gqa").ff  # one more for the signs


def test_progress_counts_the_sweeps_of_the_result(tiny_files: dict[str, Path]) -> None:
    """And nothing after them: the product that decides the signs has a name of its own."""
    J = open_model(tiny_files["gqa"]).trace(IDS).jacobian()
    for analysis in (spectrum, per_token):
        seen: list[str] = []
        found = analysis(J, 2, progress=lambda what, *_, seen=seen: seen.append(what))
        sweeps = found.svd.sweeps if analysis is spectrum else max(one.svd.sweeps for one in found)
        numbers = [int(what.split(",")[0].split()[1]) for what in seen if what.startswith("sweep ")]
        assert sorted(set(numbers)) == list(range(1, sweeps + 1))
        assert any(what.startswith("signs, ") for what in seen)
