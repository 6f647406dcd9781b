"""The maps of every depth against dense float64 arithmetic on autograd's Jacobians, and their identities."""

import json
import math
from collections.abc import Sequence
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import oracle
import pytest
import tiny
import torch
from helpers import TOKENS, invoke
from safetensors.torch import load_file
from torch import Tensor

from ggjac import ways
from ggjac.analysis import layers as module
from ggjac.analysis.layers import LayerMap, Layers, layers
from ggjac.analysis.svd import stable_rank
from ggjac.cli.layers import spark
from ggjac.cli.options import Listed, depths_of
from ggjac.frobenius import StableRank, stable_ranks
from ggjac.jacobian import SharedSweep, Span, Tap
from ggjac.linop import LinearOperator
from ggjac.model import Trace, open_model
from ggjac.report.load import checked
from ggjac.report.sections.layers import remarks
from ggjac.runs.journal import Journal
from ggjac.sizes import KINDS, MAPS
from ggjac.svd import svd

EXACT: dict[str, Any] = {"tol": 1e-9, "max_sweeps": 200}


def traced(files: dict[str, Path], case: str, dtype: str = "float64") -> tuple[Trace, oracle.Oracle, dict[str, Tensor]]:
    """Return ggjac's trace, the oracle, and its states of the same prompt."""
    ids, theirs = tiny.prompt(case, 5), oracle.load(files[case])
    return open_model(files[case], dtype=dtype).trace(ids), theirs, oracle.forward(theirs, ids, freeze="up")


def analysed(trace: Trace, position: int = -1, rank: int = 3, *, exclude: Sequence[int] = (), **options: Any) -> Layers:
    return layers(trace.jacobian(position, exclude=exclude), rank, **EXACT | options)


def head_of(theirs: oracle.Oracle) -> Tensor:
    return theirs.weights.get("output.weight", theirs.weights["token_embd.weight"])


def places(result: Layers) -> list[tuple[str, str, int]]:
    return [(m.map, m.tap.kind, m.tap.index) for m in result.maps]


def has(theirs: oracle.Oracle, kind: str, block: int) -> bool:
    """Return whether a block has a branch: whether it has an output projection."""
    outputs = {"layer": ("",), "attn": ("attn_output", "ssm_out"), "mlp": ("ffn_down",)}[kind]
    return any(name.startswith(f"blk.{block}.{output}") for name in theirs.weights for output in outputs)


def by_place(result: Layers) -> dict[tuple[str, str, int], LayerMap]:
    return dict(zip(places(result), result.maps, strict=True))


# ---- every map against the dense one


AUTOGRADS = [
    *((case, "sweeps") for case in ("three_layers", "biases", "gemma2", "gpt2", "qwen2moe", "nemotron_h", "gemma4")),
    *((case, "matrix") for case in ("biases", "gemma2", "gpt2", "nemotron_h")),
    *(
        (case, method)
        for case in ("minimax_01", "nanbeige", "hy_v4", "glm5_next", "hrm_text", "gemma3n", "talkie")
        for method in ("sweeps", "matrix")
    ),
    ("kimi_k3", "matrix"),
]


@pytest.mark.parametrize("position", [-1, 2])
@pytest.mark.parametrize(("case", "method"), AUTOGRADS)
def test_every_map_is_that_of_autograd(
    case: str, method: str, position: int, tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spectrum, left vectors with their signs, tokens and stable rank, from the dense SVD of each Jacobian."""
    if method == "matrix":
        monkeypatch.setattr(ways, "WORTH", -math.inf)
    trace, theirs, found = traced(tiny_files, case)
    result, blocks = analysed(trace, position, top=5), len(trace.tapes)
    assert {m.method for m in result.maps if m.span.tap.index > m.span.start + 1} == {method}
    inner = [(k, i) for k in KINDS for i in range(1, blocks + 1) if has(theirs, k, i - 1)]
    ends = {"cumulative": inner, "blockwise": inner}
    ends["to_end"] = [("layer", i) for i in range(blocks)]
    assert places(result) == [(name, *end) for name in MAPS for end in ends[name]]
    for m in result.maps:
        kind, index = m.tap.kind, m.tap.index
        expected_path = {
            "cumulative": (0, kind, index),
            "blockwise": (index - 1, kind, index),
            "to_end": (index, "layer", blocks),
        }[m.map]
        assert (m.span.start, *astuple(m.span.tap)) == expected_path
        assert m.data()["method"] == m.method
        dense = oracle.inner(theirs, found, *expected_path, position=position)
        U, S, Vh = torch.linalg.svd(dense.J.flatten(1), full_matrices=False)
        assert m.first == pytest.approx(float(Vh[0].view(dense.J.shape[1:])[0].square().sum()), abs=1e-8)
        assert m.positions == range(len(trace.ids))[position] + 1
        assert m.following is None or m.following.value <= float(S[3]) * (1 + 1e-9)
        if m.following is not None and m.following.converged:
            assert m.following.value == pytest.approx(float(S[3]))
        assert torch.allclose(m.S, S[:3], rtol=1e-10, atol=0), m.span
        U = U.T[:3]
        U = U * torch.sign(U @ torch.einsum("end,nd->e", dense.J, dense.x))[:, None]
        assert torch.allclose(m.U, U, rtol=0, atol=1e-6), m.span
        assert float(m.residual.max()) <= EXACT["tol"]
        assert m.stopped_by in ("tolerance", "complete")
        assert m.left.ids.tolist() == (U @ head_of(theirs).T).argsort(descending=True)[:, :5].tolist()
        assert math.isclose(m.stable_rank.value, float((S / S[0]).square().sum()), rel_tol=1e-10)
        assert math.isclose(m.stable_rank.frobenius, float(dense.J.norm()), rel_tol=1e-10)
        assert m.stable_rank.error == 0
        assert m.transported is m.arriving is None


@pytest.mark.parametrize("exclude", [[0], [1, 3]])
@pytest.mark.parametrize("method", ["sweeps", "matrix"])
@pytest.mark.parametrize("case", ["three_layers", "gemma4", "hy_v4"])
def test_no_map_reads_an_excluded_position(
    case: str, method: str, exclude: list[int], tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it starts at the embeddings or at a stream."""
    if method == "matrix":
        monkeypatch.setattr(ways, "WORTH", -math.inf)
    trace, theirs, found = traced(tiny_files, case)
    result = analysed(trace, 3, 2, exclude=exclude)
    for m in result.maps:
        dense = oracle.inner(theirs, found, m.span.start, m.tap.kind, m.span.tap.index, position=3)
        rest = dense.J.index_fill(1, torch.tensor(exclude), 0.0)
        U, S, _ = torch.linalg.svd(rest.flatten(1), full_matrices=False)
        assert torch.allclose(m.S, S[:2], rtol=1e-10, atol=0), m.span
        signs = torch.sign(U.T[:2] @ torch.einsum("end,nd->e", rest, dense.x))[:, None]
        assert torch.allclose(m.U, U.T[:2] * signs, rtol=0, atol=1e-6), m.span
        assert m.first < 1e-20 or 0 not in exclude
        assert math.isclose(m.stable_rank.value, float((S / S[0]).square().sum()), rel_tol=1e-10)


@pytest.mark.parametrize("case", ["biases", "gemma4"])
def test_a_rough_search_of_every_map_leaves_no_trace(case: str, tiny_files: dict[str, Path]) -> None:
    """Values, residuals and stable ranks are those of float32, by the dense SVD of autograd's Jacobians."""
    trace, theirs, found = traced(tiny_files, case, "float32")
    result = analysed(trace, top=2, tol=1e-4, search_dtype=torch.bfloat16)
    for m in result.maps:
        path = m.span.start, m.span.tap.kind, m.span.tap.index
        dense = oracle.inner(theirs, found, *path).J.flatten(1)
        U, S, _ = torch.linalg.svd(dense, full_matrices=False)
        assert m.data()["rough_sweeps"] == m.rough_sweeps > 0
        assert float(m.residual.max()) <= 1e-4
        assert torch.allclose(m.S.double(), S[:3], rtol=1e-5)
        overlap = (m.U.double() * U.T[:3]).sum(1).abs()
        gaps = (S[:3] - S[1:4]).abs().minimum((S[:3] - torch.cat([S[:1] * 2, S[:2]])).abs())
        assert (1 - overlap <= (1e-3 * S[:3] / gaps) ** 2).all()
        assert m.stable_rank.value == pytest.approx(float((S / S[0]).square().sum()), rel=1e-4)


@pytest.mark.parametrize("position", [-1, 2])
@pytest.mark.parametrize("case", ["gemma4_small", "falcon_h1"])
def test_one_pass_has_the_matrices_of_all_maps(case: str, position: int, tiny_files: dict[str, Path]) -> None:
    """Where blocks share values, too: of a map that starts after them they are a constant."""
    J = open_model(tiny_files[case], dtype="float64").trace(tiny.prompt(case, 5)).jacobian(position)
    d, end = J.out_shape[0], J.end.index
    to_end = [Span(i, J.end) for i in range(end)]
    cumulative = [Span(0, Tap(kind, i)) for i in range(1, end + 1) for kind in KINDS]
    for spans in (to_end, cumulative):
        sweep = SharedSweep(J.network, spans, J.position)
        found = [matrix for (matrix,) in sweep.of_matrices(lambda _, matrix: [matrix.clone()])]
        expected = sweep.down([torch.eye(d, dtype=torch.float64)] * len(spans))
        for matrix, rows in zip(found, expected, strict=True):
            assert torch.allclose(matrix, rows, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("exclude", [[], [0, 3]])
@pytest.mark.parametrize("case", ["three_layers", "gemma2", "gpt2"])
def test_left_vectors_arrive_at_the_output_as_autograd_says(
    case: str, exclude: list[int], tiny_files: dict[str, Path]
) -> None:
    """The stream vector behind `u`, at the one position, times the dense map from there to the output.

    That map is no part of an analysis without the position: it carries on what is there.
    """
    trace, theirs, found = traced(tiny_files, case)
    blocks, position = len(trace.tapes), 3
    result = analysed(trace, position, maps=["cumulative"], transport=True, top=4, exclude=exclude)

    def read(*path: Any, **how: Any) -> Tensor:
        J = oracle.inner(theirs, found, *path, position=position, **how).J
        return J.index_fill(1, torch.tensor(exclude, dtype=torch.long), 0.0).flatten(1)

    for m in result.maps:
        if m.tap.kind != "layer":
            assert m.transported is m.arriving is None
            continue
        seen, raw = read(0, "layer", m.tap.index), read(0, "layer", m.tap.index, raw=True)
        stream = m.U @ torch.linalg.pinv(seen).T @ raw.T  # v = J⁺ u s, and u's stream vector is A v / s
        expected = m.U
        if m.tap.index < blocks:
            onward = oracle.inner(theirs, found, m.tap.index, "layer", blocks, position=position).J[:, position]
            expected = stream @ onward.T
        assert m.transported is not None
        assert m.arriving is not None
        assert torch.allclose(m.transported, expected, rtol=0, atol=1e-6)
        logits = m.transported @ head_of(theirs).T
        assert m.arriving.ids.tolist() == logits.argsort(descending=True)[:, :4].tolist()


@pytest.mark.parametrize("position", [-1, 1])
@pytest.mark.parametrize("case", ["three_layers", "tied"])
def test_the_readout_is_the_stream_through_norm_and_head(case: str, position: int, tiny_files: dict[str, Path]) -> None:
    trace, theirs, found = traced(tiny_files, case)
    result, blocks = analysed(trace, position, maps=["to_end"], top=6), len(trace.tapes)
    streams = [found["x"], *(found[f"l_out-{i}"] for i in range(blocks))]
    readout = result.readout
    assert readout.depths == list(range(blocks + 1))
    named = [*readout.top.ids.flatten(), *(id for m in result.maps for id in m.left.ids.flatten())]
    assert sorted(readout.tokens.tolist()) == sorted({int(id) for id in named})
    assert readout.tokens[:6].tolist() == readout.top.ids[-1].tolist()
    for i, h in enumerate(streams):
        logits = (oracle.norm(theirs, "output_norm", h, frozen=True) @ head_of(theirs).T)[position]
        order = logits.argsort(descending=True)
        assert readout.top.ids[i].tolist() == order[:6].tolist()
        assert torch.allclose(readout.top.scores[i], logits.softmax(0)[order[:6]], rtol=1e-9)
        assert readout.ranks[i].tolist() == [1 + order.tolist().index(int(id)) for id in readout.tokens]


def test_equal_logits_share_the_best_rank() -> None:
    logits = torch.tensor([2.0, 5.0, 2.0, 1.0, 5.0])
    assert module._ranks(logits, torch.tensor([1, 4, 0, 2, 3])).tolist() == [1, 1, 3, 3, 5]


def test_followed_tokens_are_limited_to_the_most_important(
    tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, *_ = traced(tiny_files, "gqa")
    options: dict[str, Any] = {"maps": ["to_end"], "tol": 1e-2, "top": 4}
    whole = analysed(trace, **options).readout
    monkeypatch.setattr(module, "MAX_TOKENS", 9)
    fewer = analysed(trace, **options).readout
    assert fewer.tokens.tolist() == whole.tokens[:9].tolist()
    assert fewer.ranks.tolist() == whole.ranks[:, :9].tolist()


# ---- identities


@pytest.mark.parametrize(
    ("case", "dtype"), [("three_layers", "float64"), ("three_layers", "float32"), ("phi2", "float64")]
)
def test_maps_that_are_the_same_map(case: str, dtype: str, tiny_files: dict[str, Path]) -> None:
    trace, *_ = traced(tiny_files, case, dtype)
    blocks, tol = len(trace.tapes), 1e-7 if dtype == "float64" else 1e-5
    found = by_place(analysed(trace, tol=tol))
    whole, close = trace.jacobian().svd(3, tol=tol, max_sweeps=200), 1e-12 if dtype == "float64" else 1e-5
    last = found["cumulative", "layer", blocks]
    for other in (found["to_end", "layer", 0], whole):
        assert torch.allclose(last.S, other.S, rtol=close, atol=0)
    for kind in KINDS:
        first, alone = found["cumulative", kind, 1], found["blockwise", kind, 1]
        assert torch.allclose(first.S, alone.S, rtol=close, atol=0)
        assert first.stable_rank.value == pytest.approx(alone.stable_rank.value, rel=100 * close)
    top, alone = found["to_end", "layer", blocks - 1], found["blockwise", "layer", blocks]
    assert torch.allclose(top.S, alone.S, rtol=close, atol=0)
    assert torch.equal(top.left.ids, alone.left.ids)


def test_the_way_is_the_papers_and_ends_at_one(tiny_files: dict[str, Path]) -> None:
    """p_k(l) = s_k(L) s_k(l) ⟨u_k(l), u_k(L)⟩, in units of its end."""
    trace, theirs, found = traced(tiny_files, "three_layers")
    path = analysed(trace, maps=["cumulative"], kinds=["layer"]).path
    assert path is not None
    dense = [oracle.inner(theirs, found, 0, "layer", i) for i in (1, 2, 3)]
    parts = [torch.linalg.svd(part.J.flatten(1), full_matrices=False)[:2] for part in dense]
    (last, top) = parts[-1]
    steps = []
    for part, (U, S) in zip(dense, parts, strict=True):
        signs = [torch.sign(A.T @ torch.einsum("end,nd->e", p.J, p.x)) for A, p in ((U, part), (last, dense[-1]))]
        steps.append((top * S * (U * last).sum(0) * signs[0] * signs[1])[:3])
    assert path.depths == [1, 2, 3]
    assert torch.allclose(path.values, torch.stack(steps) / steps[-1], rtol=0, atol=1e-7)
    assert torch.allclose(path.values[-1], torch.ones(3).double(), rtol=0, atol=1e-12)
    assert float(path.values[:-1].abs().max()) < 2
    assert analysed(trace, maps=["cumulative"], kinds=["layer"], depths=[1, 2]).path is None
    assert analysed(trace, maps=["cumulative"], kinds=["attn"]).path is None


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_same_seed_gives_the_same_bits(dtype: str, tiny_files: dict[str, Path]) -> None:
    trace, *_ = traced(tiny_files, "gqa", dtype)
    first, again, other = (analysed(trace, tol=1e-2, max_sweeps=30, seed=seed, transport=True) for seed in (3, 3, 4))

    def bits(result: Layers) -> list[list[Any]]:
        return [[m.U.tolist(), m.S.tolist(), m.left.ids.tolist(), astuple(m.stable_rank)] for m in result.maps]

    assert bits(first) == bits(again)
    assert bits(first) != bits(other)


def test_maps_alone_and_together_are_the_same(tiny_files: dict[str, Path]) -> None:
    """What is asked for beside a map does not change it."""
    trace, *_ = traced(tiny_files, "three_layers")
    whole = by_place(analysed(trace))
    for choice in ({"depths": [2]}, {"maps": ["blockwise"], "kinds": ["mlp", "attn"], "depths": [3, 1, 3]}):
        part = analysed(trace, **choice)
        depths, kinds = sorted(set(choice["depths"])), choice.get("kinds", KINDS)
        assert places(part) == [
            (name, kind, i)
            for name in choice.get("maps", MAPS)
            for kind in KINDS
            for i in depths
            if (kind == "layer" if name == "to_end" else kind in kinds and i > 0) and (name != "to_end" or i < 3)
        ]
        for place, m in by_place(part).items():
            assert torch.allclose(m.S, whole[place].S, rtol=1e-12, atol=0)
            assert m.stable_rank.value == pytest.approx(whole[place].stable_rank.value, rel=1e-12)
        assert part.readout.depths == [0, 1, 2, 3]
    nothing = analysed(trace, maps=["cumulative"], depths=[0])
    assert nothing.maps == []
    assert nothing.path is None
    assert len(nothing.readout.tokens) >= 8


def test_more_triplets_than_a_branch_has(tiny_files: dict[str, Path]) -> None:
    """An attention branch writes what its values span: the rest is zero, and said to be."""
    trace, theirs, found = traced(tiny_files, "gqa")
    result = by_place(analysed(trace, rank=40, maps=["blockwise"], depths=[2]))
    for kind in KINDS:
        S = torch.linalg.svdvals(oracle.inner(theirs, found, 1, kind, 2).J.flatten(1))
        assert torch.allclose(result["blockwise", kind, 2].S, S[:40], rtol=0, atol=1e-10 * float(S[0]))


# ---- stable ranks of many maps


def test_estimated_stable_ranks_are_those_of_each_map_alone(
    tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXACT_ROWS", 0)
    monkeypatch.setattr("ggjac.analysis.svd.EXACT_ROWS", 0)
    trace, theirs, found = traced(tiny_files, "three_layers")
    result = analysed(trace, seed=5, probes=12, tol=1e-6, depths=[1, 3])
    for m in result.maps:
        J = trace.jacobian(-1, m.span)
        alone = stable_rank(J, J.svd(3, tol=1e-6, max_sweeps=200), probes=12, seed=5)
        assert astuple(m.stable_rank) == pytest.approx(astuple(alone), rel=1e-4)
        exact = oracle.inner(theirs, found, m.span.start, *astuple(m.span.tap)).J
        top = float(torch.linalg.matrix_norm(exact.flatten(1), 2)) ** 2
        assert 0 < m.stable_rank.error < 1.0 * m.stable_rank.value
        assert abs(m.stable_rank.value - float(exact.square().sum()) / top) < 6 * m.stable_rank.error


class Matrix(LinearOperator):
    def __init__(self, matrix: Tensor):
        self.matrix, self.dtype, self.device = matrix, matrix.dtype, matrix.device
        self.out_shape, self.in_shape = matrix.shape[:1], matrix.shape[1:]

    def matmat(self, X: Tensor, t: Tensor | None = None) -> Tensor:
        return X @ self.matrix.T

    def rmatmat(self, Y: Tensor) -> Tensor:
        return Y @ self.matrix


def test_stable_ranks_of_known_matrices() -> None:
    """One downward product for all; rows in chunks; a zero map has none."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.diag(torch.tensor([3.0, 4.0, 0.0, 0.0])).double(), torch.zeros(4, 4).double()]
    matrices.append(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    operators = [Matrix(matrix) for matrix in matrices]
    asked: list[list[tuple[int, ...]]] = []

    def down(Y: list[Tensor]) -> list[Tensor]:
        asked.append([tuple(part.shape) for part in Y])
        return [A.rmatmat(part) for A, part in zip(operators, Y, strict=True)]

    triplets = [svd(A, 1, tol=1e-12) for A in operators]
    for chunk, calls in ((4, [4]), (3, [3, 1]), (100, [4])):
        asked.clear()
        found = stable_ranks(operators, triplets, down=down, chunk=chunk)
        assert astuple(found[0]) == pytest.approx((25 / 16, 0.0, 5.0), rel=1e-12)
        assert found[1] == StableRank(0.0, 0.0, 0.0)
        S = torch.linalg.svdvals(matrices[2])
        assert found[2].value == pytest.approx(float((S / S[0]).square().sum()), rel=1e-12)
        assert asked == [[(rows, 4)] * 3 for rows in calls]
    asked.clear()
    estimates = stable_ranks(operators, triplets, down=down, chunk=None, probes=5000, seed=1)
    assert asked == [[(5000, 4)] * 3]
    assert estimates[0].value == pytest.approx(25 / 16, abs=5 * estimates[0].error)
    assert 0 < estimates[0].error < 0.03
    assert estimates[1] == StableRank(0.0, 0.0, 0.0)
    assert stable_ranks([], [], down=down, chunk=None) == []


# ---- what it costs


def test_all_depths_read_each_weight_once_per_sweep(tiny_files: dict[str, Path]) -> None:
    """The cumulative maps of three blocks and three taps each, in as many passes as the slowest of them needs."""
    model = open_model(tiny_files["three_layers"], dtype="float64")
    trace = model.trace(tiny.prompt("three_layers", 5))
    for maps, passes in (("cumulative", 3), ("to_end", 2)):  # signs, stable rank; and what branches add, for norms
        model.weights.reads.clear()
        result = layers(trace.jacobian(), 3, maps=[maps], tol=1e-4)
        sweeps = max(m.sweeps for m in result.maps)
        assert len(result.maps) == {"cumulative": 9, "to_end": 3}[maps]
        for block in range(3):
            for stem in ("attn_v", "attn_output", "ffn_up", "ffn_down"):
                name = f"blk.{block}.{stem}.weight"
                assert model.weights.reads[name] == (sweeps + passes) * model.gguf.tensors[name].rows, name
    model.weights.reads.clear()
    result = layers(trace.jacobian(), 3, maps=["blockwise"], tol=1e-4)
    for block in range(3):
        sweeps = max(m.sweeps for m in result.maps if m.tap.index == block + 1)
        name = f"blk.{block}.ffn_down.weight"
        assert model.weights.reads[name] == (sweeps + 3) * model.gguf.tensors[name].rows
    head = "output.weight"
    assert model.weights.reads[head] == 2 * model.gguf.tensors[head].rows  # left vectors, and the readout


def test_progress_says_what_it_is_at(tiny_files: dict[str, Path]) -> None:
    trace, *_ = traced(tiny_files, "three_layers")
    seen: list[tuple[str, int, int]] = []
    analysed(trace, transport=True, progress=lambda *step: seen.append(step))
    said = list(dict.fromkeys(what.split(",")[0] for what, *_ in seen))
    assert said == ["cumulative", "blockwise 1", "blockwise 2", "blockwise 3", "to end"]
    for word in ("sweep 1,", "sweep 3, worst residual", "signs", "stable rank", "transport"):
        assert any(word in what for what, *_ in seen), word
    assert {total for what, _, total in seen if what.startswith("blockwise")} == {1}
    for (before, done, total), (what, now, _) in pairwise(seen):
        assert now == (1 if done == total else done + 1), (before, what)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    ("case", "method", "shares"),
    [
        ("three_layers", "sweeps", (0.1, 0.5, 0.8, 0.99)),
        ("three_layers", "matrix", (0.05, 0.3, 0.6, 0.9)),
        ("gemma4_small", "matrix", (0.05, 0.3, 0.9)),  # later blocks read values of earlier ones
    ],
)
def test_an_interrupted_run_ends_with_the_same_bits(
    case: str,
    method: str,
    shares: tuple[float, ...],
    tiny_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped within the passes for each map, then gone on with from the journal, from the last block that was done."""
    if method == "matrix":
        monkeypatch.setattr(ways, "WORTH", -math.inf)
    trace, *_ = traced(tiny_files, case, "float32")
    options: dict[str, Any] = {"tol": 1e-2, "transport": True}
    steps = iter(range(10**6))
    expected = analysed(trace, progress=lambda *_: next(steps), **options)
    blocks = next(steps)
    assert method in {m.method for m in expected.maps}
    for share in shares:

        def stopping(stop: int = round(share * blocks)) -> Any:
            left = iter(range(stop))

            def step(*_: Any) -> None:
                if next(left, None) is None:
                    raise Interrupted

            return step

        seen: list[tuple[Any, ...]] = []
        with pytest.raises(Interrupted), Journal.open(tmp_path / str(share), {}, resume=False, every=0.0) as journal:
            resumed(trace, journal, progress=stopping(), **options)
        with Journal.open(tmp_path / str(share), {}, resume=True, every=0.0) as journal:
            found = resumed(trace, journal, progress=lambda *step, seen=seen: seen.append(step), **options)
        assert len(seen) == blocks - round(share * blocks) - 1  # the block at which it stopped was behind
        for ours, theirs in zip(found.maps, expected.maps, strict=True):
            assert torch.equal(ours.U, theirs.U)
            assert torch.equal(ours.S, theirs.S)
            assert torch.equal(ours.residual, theirs.residual)
            assert (ours.stable_rank, ours.following) == (theirs.stable_rank, theirs.following)
            assert ours.transported is theirs.transported is None or torch.equal(ours.transported, theirs.transported)


def resumed(trace: Trace, journal: Journal, **options: Any) -> Layers:
    return layers(trace.jacobian(journal=journal), 3, **EXACT | options)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": [4]}, "depth 4 is out of range; this model has depths 0 to 3"),
        ({"depths": [1, -1]}, "depth -1 is out of range"),
        ({"rank": 33}, "rank 33 is out of range"),
        ({"tol": 0.0}, "tol 0.0 is out of range"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, tiny_files: dict[str, Path]) -> None:
    trace, *_ = traced(tiny_files, "three_layers")
    with pytest.raises(ValueError, match=message):
        analysed(trace, **options)


# ---- the command


@pytest.mark.parametrize(
    ("given", "blocks", "depths"),
    [
        ("all", 3, [0, 1, 2, 3]),
        ("0,10-12,-1", 20, [0, 10, 11, 12, 20]),
        ("-3--1,0", 4, [0, 2, 3, 4]),
        ("2-2, 1", 2, [1, 2]),
        ("-5", 4, [0]),
        ("1--1", 3, [1, 2, 3]),
    ],
)
def test_depths_are_numbers_and_ranges(given: str, blocks: int, depths: list[int]) -> None:
    assert depths_of(Listed("layers").convert(given, None, None), blocks) == depths


@pytest.mark.parametrize("given", ["", "x", "1,,2", "1-2-3", "1.5", "all,1", "٣", "1" * 41])
def test_what_is_no_list_of_depths_is_refused(given: str) -> None:
    with pytest.raises(click.UsageError, match="is not a list of layers"):
        Listed("layers").convert(given, None, None)


@pytest.mark.parametrize(("given", "message"), [("4", "depths 0 to 3"), ("-5", "depths 0 to 3"), ("3-1", "3 comes")])
def test_depths_that_a_model_lacks_are_refused(given: str, message: str, tiny_files: dict[str, Path]) -> None:
    err = invoke("layers", "-m", tiny_files["three_layers"], *TOKENS, "--layers", given, code=2).stderr
    assert message in err
    assert err.count("\n") == 1


def test_what_cannot_fit_is_refused(tiny_files: dict[str, Path]) -> None:
    """Many maps take more than one: a budget that holds few of them refuses all, and says what to ask for."""
    model = ["-m", tiny_files["gemma2"], "-t", 1, "--tokens", ",".join(["5"] * 60), "-k", 64]
    assert (
        "Fits."
        in invoke(
            "layers", *model, "--layers", "-1", "--maps", "to_end", "--dry-run", "--no-bench", "--ram-budget", "200MiB"
        ).stdout
    )
    few = invoke("layers", *model[:-2], "-k", 2, "--layers", "-1", "--maps", "to_end", "--ram-budget", "200MiB").stdout
    assert "no map was requested" in few  # none begins at the last depth: nothing that could be too much
    for command in (["--dry-run", "--no-bench"], []):
        err = invoke("layers", *model, *command, "--ram-budget", "200MiB", code=4).stderr
        assert "ask for fewer --layers" in err
        assert "layers needs" in err


def test_names_of_maps_and_taps(tiny_files: dict[str, Path]) -> None:
    model = ["-m", tiny_files["three_layers"], *TOKENS, "-k", 2]
    out = invoke("layers", *model, "--maps", "to_end,cumulative", "--kinds", "mlp", "--format", "json").stdout
    taps = json.loads(out)["layers"]["taps"]
    assert {(tap["map"], tap["kind"]) for tap in taps} == {("cumulative", "mlp"), ("to_end", "layer")}
    assert "unknown; known: cumulative, blockwise, to_end" in invoke("layers", *model, "--maps", "all", code=2).stderr
    assert "unknown; known: layer, attn, mlp" in invoke("layers", *model, "--kinds", "layer,", code=2).stderr


def test_the_report_takes_what_the_command_gives(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    saved = tmp_path / "maps.safetensors"
    given = ["-m", tiny_files["three_layers"], *TOKENS, "-k", 3, "--transport", "-o", saved]
    content = json.loads(invoke("layers", *given, "--format", "json").stdout)
    trace = open_model(tiny_files["three_layers"]).trace([5, 17, 3, 99, 42])
    found = layers(trace.jacobian(), 3, transport=True)
    part = content["layers"]
    read = checked(content)["layers"]
    assert len(read["taps"]) == len(part["taps"]) == len(found.maps) == 21
    for m, tap in zip(found.maps, read["taps"], strict=True):
        assert (tap["map"], tap["kind"], tap["index"]) == (m.map, m.tap.kind, m.tap.index)
        assert [t["singular_value"] for t in tap["triplets"]] == pytest.approx(m.S.tolist(), rel=1e-4)
        assert tap["stable_rank"]["value"] == pytest.approx(m.stable_rank.value, rel=1e-4)
        assert [t["left"][0]["id"] for t in tap["triplets"]] == m.left.ids[:, 0].tolist()
    assert [row["index"] for row in read["readout"]] == [0, 1, 2, 3]
    assert read["ranks"]["depths"][-1]["ranks"] == found.readout.ranks[-1].tolist()
    assert read["path"][-1]["values"] == pytest.approx([1, 1, 1], abs=1e-5)
    assert "arriving" in part["taps"][0]["triplets"][0]
    assert part["stopped_by"] == "tolerance"
    assert part["converged"]
    tensors = load_file(saved)
    assert tensors["cumulative.attn.U"].shape == (3, 3, 32)
    assert tensors["to_end.layer.index"].tolist() == [0, 1, 2]
    assert tensors["blockwise.mlp.S"].shape == tensors["blockwise.mlp.residual"].shape == (3, 3)
    assert tensors["cumulative.layer.transported"].shape == (3, 3, 32)
    assert tensors["cumulative.mlp.stable_rank"].shape == (3, 2)
    assert "cumulative.attn.transported" not in tensors
    assert tensors["ranks"].shape == (4, len(tensors["ranked_ids"]))


def test_the_tables(tiny_files: dict[str, Path]) -> None:
    out = invoke("layers", "-m", tiny_files["three_layers"], *TOKENS, "-k", 2, "--transport").stdout
    for words in (
        "From the input to this depth: attention",
        "Each block alone: MLP",
        "From this depth to the output: layer",
        "vector 1 at the output",
        "Path to the output's directions",
        "Logit lens: the residual stream read through the final norm and the LM head",
        "all maps converged",
    ):
        assert words in out
    single = invoke(
        "layers", "-m", tiny_files["three_layers"], *TOKENS, "-k", 1, "--layers", -1, "--maps", "cumulative"
    ).stdout
    assert "Path to the output's directions" not in single  # two dimensions are the least
    assert "vector 1 at the" not in single


def test_a_sink_and_a_cut_through_a_cluster_are_named(tmp_path: Path) -> None:
    """In the table, and below the grid of the page."""
    given = "layers", "-q", "-t", 1, "-p", "The bridge out of Marin is the Golden", "-k", 4
    result = json.loads(invoke(*given, "--format", "json").stdout)
    shown, page = invoke(*given).stdout, tmp_path / "layers.json"
    for tap in result["layers"]["taps"]:
        following = tap["next_singular_value"]
        assert f" next   {'' if following['converged'] else '≥ '}" in shown
        assert f"{following['value']:.4g}" in shown
    own = [tap for tap in result["layers"]["taps"] if (tap["map"], tap["kind"]) == ("cumulative", "layer")]
    sinks = [tap["sink"]["fraction"] for tap in own if tap["sink"]]
    assert sinks, "the demo has one"
    assert f"Position 0 takes {min(sinks):.0%}" in shown
    close = "σ5 is close to σ4 at "
    assert close in shown
    for tap, fraction in zip(own, (0.6123, 0.9, *[None] * 4), strict=True):
        tap["sink"] = fraction and {"position": 0, "id": 0, "text": "x", "fraction": fraction}
    said = "Position 0 takes 61% to 90% of the weight of right vector 1 at depth 1, 2, as an attention sink does."
    assert remarks(own)[0] == said
    page.write_text(json.dumps(result), encoding="utf-8")
    invoke("report", page)
    source = page.with_suffix(".html").read_text(encoding="utf-8")
    assert f'<p class="note">{said}</p>' in source
    assert f'<p class="note">{close}' in source
    for tap in own:
        tap["next_singular_value"] = {"value": 0.9 * tap["triplets"][-1]["singular_value"], "converged": True}
    assert remarks(own) == [said]
    for tap in own:
        tap["next_singular_value"]["value"] = tap["triplets"][-1]["singular_value"]
    assert remarks(own)[1].startswith(f"{close}depth 1, 2, 3, 4, 5, 6: ")


def test_a_map_that_did_not_converge_is_exit_code_3(tiny_files: dict[str, Path]) -> None:
    result = invoke(
        "layers", "-m", tiny_files["three_layers"], *TOKENS, "--tol", 1e-6, "--max-sweeps", 2, "-k", 4, code=3
    )
    assert "NOT all maps converged to 1e-06" in result.stdout
    some = [*TOKENS, "--tol", 0.1, "--max-sweeps", 3, "-k", 4, "--format", "json"]
    part = json.loads(invoke("layers", "-m", tiny_files["three_layers"], *some, code=3).stdout)["layers"]
    ended = [tap["stopped_by"] for tap in part["taps"]]
    assert {"sweeps", "tolerance"} <= set(ended)
    assert (part["converged"], part["stopped_by"]) == (False, "sweeps")


def test_sparks() -> None:
    assert spark([8.0, 4.0, 1.0, 1e-9, 0.0]) == "█▄▁▁"
    assert spark([0.0, 0.0]) == spark([]) == ""


def test_analyze_takes_it_into_the_run_and_the_report(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    model, run = ["-m", tiny_files["three_layers"], *TOKENS, "-k", 3], tmp_path / "run"
    given = ["analyze", *model, "--no-verify", "--layers", "0,2-3", "-o", run]
    invoke(*given)
    content = json.loads((run / "run.json").read_text())
    alone = json.loads(invoke("layers", *model, "--layers", "0,2-3", "--format", "json").stdout)
    assert content["layers"] == alone["layers"]
    assert {tap["index"] for tap in content["layers"]["taps"]} == {0, 2, 3}
    assert "Layer by layer" in (run / "report.html").read_text()
    assert load_file(run / "tensors.safetensors")["cumulative.mlp.U"].shape == (2, 3, 32)
    invoke(*given[:-1], tmp_path / "other", "--layers", 4, code=2)
    assert not (tmp_path / "other").exists()
