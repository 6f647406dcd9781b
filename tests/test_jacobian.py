"""The detached Jacobian against autograd over an independent forward, and against the paper's own code."""

import math
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from helpers import EPS, compute_in, distance, edited
from safetensors.torch import load_file

from ggjac import ways
from ggjac.analysis.svd import spectrum
from ggjac.blocks import mixers
from ggjac.decode import top_logits
from ggjac.jacobian import SharedSweep, Span, Tap
from ggjac.jacobian.reconstruction import reconstruction
from ggjac.linop import dot_test
from ggjac.model import DTYPES, open_model
from ggjac.runs.journal import Journal
from ggjac.sizes import SMALL_PIECES

MLP_PATHS = ("up", "gate")
# Biases, windows, norms after branches, recurrences, inputs of blocks, shared values, streams, groups, cycles.
EXCLUDING = (
    *("gqa", "biases", "gpt2", "gemma2", "gemma3n", "gemma4", "qwen35", "lfm2", "nemotron_h", "arwkv7", "rwkv6"),
    *("mixtral", "deepseek2", "hy_v4", "deepseek4", "hrm_text", "talkie"),
)


@pytest.mark.parametrize("mlp_path", MLP_PATHS)
@pytest.mark.parametrize("case", tiny.CASES)
def test_equals_autograd_of_an_independent_forward(tiny_files: dict[str, Path], case: str, mlp_path: str) -> None:
    ids = tiny.prompt(case, 6)
    expected = oracle.jacobian(tiny_files[case], ids, mlp_path=mlp_path)
    J = open_model(tiny_files[case], dtype="float64").trace(ids, mlp_path=mlp_path).jacobian()
    assert distance(J.to_dense(), expected.J) < 1e-10
    assert distance(J.output, expected.y) < 1e-10
    # Relative to y: the offset of a model without biases is zero.
    assert float((J.offset - expected.offset).norm() / expected.y.norm()) < 1e-10


def test_blocks_may_differ_in_heads_and_hidden_units(tiny_file: Callable[..., Path]) -> None:
    """As in pruned models. llama.cpp reads the keys too, but most of its graphs use the sizes of the first block."""
    row = {"layers": 3, "ffs": (96, 128, 64), "kv_by_layer": True, "kv_heads": 2}
    row |= {"mixers": ("attention", "window"), "sizes": {"window": {"kv_heads": 1}}}
    path, ids = tiny_file("plain", **row), tiny.prompt(row, 6)
    model = open_model(path, dtype="float64")
    assert [(own.kv_heads, own.hidden_units) for own in model.config.layers] == [(2, 96), (1, 128), (2, 64)]
    J, expected = model.trace(ids).jacobian(), oracle.jacobian(path, ids, mlp_path="up")
    assert distance(J.to_dense(), expected.J) < 1e-10
    assert distance(J.output, expected.y) < 1e-10


@pytest.mark.parametrize(("ratio", "n", "position"), [(4, 13, -1), (4, 13, 6), (128, 129, -1)])
def test_tokens_beyond_the_window_count_through_their_groups(
    ratio: int, n: int, position: int, tiny_file: Callable[..., Path]
) -> None:
    path = tiny_file("deepseek4_yarn", mixers=(f"compressed {ratio}",), d=32, heads=3)
    ids = [i * i % 128 for i in range(n)]
    J = open_model(path, dtype="float64").trace(ids).jacobian(position)
    expected = oracle.jacobian(path, ids, mlp_path="up", position=position)
    assert distance(J.to_dense(), expected.J) < 1e-10
    assert distance(J.output, expected.y) < 1e-10
    assert float(J.to_dense()[:, 0].norm()) > 1e-4  # two windows of 5 reach back 8 tokens


# ---- every dtype, every prompt, every way to ask


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["plain", "biases", "yarn"])
def test_narrower_dtypes_come_as_close_as_they_can(case: str, dtype: str, tiny_files: dict[str, Path]) -> None:
    ids = tiny.prompt(case, 6)
    expected = oracle.jacobian(tiny_files[case], ids, mlp_path="up")
    J = open_model(tiny_files[case], dtype=dtype).trace(ids).jacobian()
    assert J.to_dense().dtype == J.output.dtype == J.offset.dtype == DTYPES[dtype]
    # Two blocks of random weights amplify rounding some tens of times (6e-7 in float32).
    assert distance(J.to_dense(), expected.J) < 60 * EPS[dtype]
    assert distance(J.output, expected.y) < 60 * EPS[dtype]
    assert float((J.offset.double() - expected.offset).norm() / expected.y.norm()) < 60 * EPS[dtype]


@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-13), ("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("case", ["three_layers", "gqa", "biases", "q4_0_tied"])
def test_reconstruction_is_as_promised(case: str, dtype: str, limit: float, tiny_files: dict[str, Path]) -> None:
    J = open_model(tiny_files[case], dtype=dtype).trace(tiny.prompt(case, 6)).jacobian()
    assert 0 <= J.reconstruction_error < limit
    rebuilt = J.matmat(J.x[None])[0] + J.offset
    assert distance(rebuilt, J.output) < limit


def test_the_ordinary_jacobian_does_not_reconstruct(tiny_files: dict[str, Path]) -> None:
    """The negative control: nothing frozen, autograd's own J misses the output by far."""
    ids = tiny.prompt("plain", 6)
    ordinary = oracle.jacobian(tiny_files["plain"], ids, mlp_path=None)
    J = open_model(tiny_files["plain"], dtype="float64").trace(ids).jacobian()
    assert distance(torch.einsum("end,nd->e", ordinary.J, J.x), J.output) > 0.1
    assert distance(J.to_dense(), ordinary.J) > 0.1


PROMPTS = {"one token": [5], "two tokens": [5, 9], "one token over and over": [7] * 6, "repeats": [3, 9, 3, 9, 3, 9, 9]}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("case", ["gqa", "biases"])
def test_short_and_repeated_prompts(case: str, prompt: str, tiny_files: dict[str, Path]) -> None:
    expected = oracle.jacobian(tiny_files[case], PROMPTS[prompt], mlp_path="up")
    J = open_model(tiny_files[case], dtype="float64").trace(PROMPTS[prompt]).jacobian()
    assert J.in_shape == (len(PROMPTS[prompt]), 64)
    assert distance(J.to_dense(), expected.J) < 1e-10
    assert distance(J.x, expected.x) < 1e-15


@pytest.mark.parametrize("position", [-1, 25])
@pytest.mark.parametrize("case", ["qwen35_sizes", "qwen3next", "rwkv6", "rwkv6qwen2_heads", "rwkv7", "arwkv7"])
def test_recurrences_over_long_prompts(
    case: str, position: int, tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond four times the key size they are kept in chunks with a state, and not as a pattern."""
    model, ids = open_model(tiny_files[case], dtype="float64"), tiny.prompt(case, 70)
    if 4 * model.config.recurrence.key_size >= len(ids):  # as if keys were shorter
        monkeypatch.setattr(mixers, "scan_chunk", lambda n, key_size: 16)
    trace = model.trace(ids)
    scans = [mixer.scan is not None for tape in trace.tapes for mixer in tape.attn.mixers]
    assert scans == ["attention" not in layer.mixers for layer in model.config.layers]
    expected = oracle.jacobian(tiny_files[case], ids, mlp_path="up", position=position)
    J = trace.jacobian(position)
    assert distance(J.to_dense(), expected.J) < 1e-10
    assert distance(J.output, expected.y) < 1e-10
    assert dot_test(J, torch.Generator().manual_seed(0)) < 1e-13


# ---- positions that are no input


@pytest.mark.parametrize("mlp_path", MLP_PATHS)
@pytest.mark.parametrize("case", [*EXCLUDING])
def test_excluded_positions_are_folded_into_the_offset(case: str, mlp_path: str, tiny_files: dict[str, Path]) -> None:
    """Against autograd's Jacobian: its columns there are zero, and the offset has what they add at the prompt."""
    ids, exclude = tiny.prompt(case, 6), [0, 2, 4]
    expected = oracle.jacobian(tiny_files[case], ids, mlp_path=mlp_path, position=4)
    J = open_model(tiny_files[case], dtype="float64").trace(ids, mlp_path=mlp_path).jacobian(4, exclude="0,2,-1")
    assert J.exclude == exclude
    rest, folded = expected.J.clone(), torch.einsum("end,nd->e", expected.J[:, exclude], expected.x[exclude])
    rest[:, exclude] = 0
    assert not J.to_dense()[:, exclude].any()
    assert distance(J.to_dense(), rest) < 1e-10
    assert distance(J.output, expected.y) < 1e-10
    assert distance(J.offset, expected.offset + folded) < 1e-10
    assert distance(J.linear_output, torch.einsum("end,nd->e", rest, expected.x)) < 1e-10
    assert J.reconstruction_error < 1e-13
    generator = torch.Generator().manual_seed(0)
    X, t = torch.randn(2, *J.in_shape, generator=generator, dtype=J.dtype), torch.tensor([0.5, -2.0], dtype=J.dtype)
    before = X.clone()
    offset = expected.offset + folded
    assert distance(J.matmat(X, t), torch.einsum("end,knd->ke", rest, X) + t[:, None] * offset) < 1e-10
    assert torch.equal(X, before)
    assert dot_test(J, generator) < 1e-13


@pytest.mark.parametrize("method", ["sweeps", "matrix"])
@pytest.mark.parametrize("case", ["gqa", "biases", "hy_v4"])
def test_svd_without_some_positions(
    case: str, method: str, tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "WORTH", -math.inf if method == "matrix" else math.inf)
    ids, out = tiny.prompt(case, 6), [2, 5]  # without these some vectors of the map of all would point the other way
    expected = oracle.jacobian(tiny_files[case], ids, mlp_path="up")
    J = open_model(tiny_files[case], dtype="float64").trace(ids).jacobian(exclude=out)
    views = J.both_views(4, tol=1e-9, max_sweeps=200, seed=0)
    rest = expected.J.clone()
    rest[:, out] = 0
    for found, dense in ((J.svd(4, tol=1e-9, max_sweeps=200), rest), *zip(views, (rest, expected.J), strict=True)):
        U, S, Vh = torch.linalg.svd(dense.flatten(1), full_matrices=False)
        assert found.method == method
        assert torch.allclose(found.S, S[:4], rtol=1e-10)
        signs = torch.sign(U.T[:4] @ torch.einsum("end,nd->e", dense, expected.x))[:, None]
        assert torch.allclose(found.U, U.T[:4] * signs, rtol=0, atol=1e-6)
        assert torch.allclose(found.Vh.flatten(1), Vh[:4] * signs, rtol=0, atol=1e-6)
        assert (found.Vh[:, out].abs().max() < 1e-15) == (dense is rest)
        if dense is expected.J:
            shares = Vh[:4].unflatten(1, J.in_shape).square().sum(2)
    assert J.whole.both_views(4, tol=1e-9, max_sweeps=200, seed=0)[0].S.shape == (4,)
    both = spectrum(J, 4, tol=1e-9, max_sweeps=200)
    data = both.data()["whole"]["triplets"]
    assert np.allclose([[each["weight"] for each in triplet["right"]] for triplet in data], shares, rtol=0, atol=1e-6)
    assert np.allclose([triplet["excluded_weight"] for triplet in data], shares[:, out].sum(1), rtol=0, atol=1e-6)
    assert both.whole is not None
    decoded = top_logits(J.network.head.matrix, both.whole.svd.U, 8)
    assert torch.equal(both.whole.left.ids, decoded.ids)
    E = torch.nn.functional.normalize(oracle.load(tiny_files[case]).weights["token_embd.weight"], dim=1)
    near = both.whole.svd.Vh.flatten(0, 1) @ E.T
    assert torch.equal(both.whole.right.ids[:, 0], near.argmax(1))
    assert [len(table.columns["vector"]) for table in both.exhibits()] == [4, 4]


@pytest.mark.parametrize("exclude", [[0], "1-3", [0, 3]])
@pytest.mark.parametrize("case", ["three_layers", "hy_v4", "gemma4"])
def test_maps_inside_the_network_hold_the_stream_of_excluded_positions(
    case: str, exclude: list[int] | str, tiny_files: dict[str, Path]
) -> None:
    ids = tiny.prompt(case, 5)
    trace = open_model(tiny_files[case], dtype="float64").trace(ids)
    for span in (Span(0, Tap("mlp", 1)), Span(1, Tap("layer", 2))):
        whole, part = trace.jacobian(span=span), trace.jacobian(span=span, exclude=exclude)
        dense, x = whole.to_dense(), whole.x
        out = part.exclude
        kept = dense.clone()
        kept[:, out] = 0
        assert distance(part.to_dense(), kept) < 1e-13
        offset = whole.offset + torch.einsum("end,nd->e", dense[:, out], x[out])
        assert float((part.offset - offset).norm() / whole.output.norm()) < 1e-12
        assert distance(part.output, whole.output) < 1e-12


@pytest.mark.parametrize(
    ("position", "exclude", "words"),
    [
        (0, [0], "exclude=0 leaves the map no input: the output depends on position 0 alone; exclude fewer"),
        (2, "all", "exclude=all leaves the map no input: the output depends on positions 0 to 2 alone"),
        (2, [2, 0, 1], "exclude=0-2 leaves the map no input"),
        (2, [3], r"exclude=\[3\]: 3 is out of range; the output depends on positions 0 to 2"),
        (2, "-4", "exclude=-4 is out of range"),
        (2, "0,x", "exclude=0,x: write numbers and ranges"),
    ],
)
def test_what_cannot_be_excluded_is_refused(
    position: int, exclude: Any, words: str, tiny_files: dict[str, Path]
) -> None:
    trace = open_model(tiny_files["gqa"]).trace([5, 9, 7, 2])
    with pytest.raises(ValueError, match=words):
        trace.jacobian(position, exclude=exclude)
    assert trace.jacobian(position, exclude=[]).exclude == []


@pytest.mark.parametrize("case", ["one_layer", "fused_biases", "qwen35", "lfm2"])
@pytest.mark.parametrize("position", [0, 3, -1, -2, -6])
def test_any_position_and_nothing_after_it(case: str, position: int, tiny_files: dict[str, Path]) -> None:
    ids = tiny.prompt(case, 6)
    expected = oracle.jacobian(tiny_files[case], ids, mlp_path="up", position=position)
    J = open_model(tiny_files[case], dtype="float64").trace(ids).jacobian(position)
    assert J.position == position % 6
    assert J.in_shape == (6, J.x.shape[1])
    dense = J.to_dense()
    assert distance(dense, expected.J) < 1e-10
    assert distance(J.output, expected.y) < 1e-10
    assert float((J.offset - expected.offset).norm() / expected.y.norm()) < 1e-10
    assert not dense[:, J.position + 1 :].any()
    assert J.reconstruction_error < 1e-13


@pytest.mark.parametrize("case", ["gqa", "biases"])
@pytest.mark.parametrize("position", [2, -1])
def test_products_are_those_of_the_dense_matrix(case: str, position: int, tiny_files: dict[str, Path]) -> None:
    ids = tiny.prompt(case, 6)
    expected = oracle.jacobian(tiny_files[case], ids, mlp_path="up", position=position)
    J = open_model(tiny_files[case], dtype="float64").trace(ids).jacobian(position)
    generator = torch.Generator().manual_seed(0)
    for k in (0, 1, 5):
        X, Y = (torch.randn(k, *shape, generator=generator, dtype=torch.float64) for shape in (J.in_shape, J.out_shape))
        t = torch.randn(k, generator=generator, dtype=torch.float64)
        AX = torch.einsum("end,knd->ke", expected.J, X)
        assert torch.allclose(J.matmat(X), AX, rtol=0, atol=1e-9)
        assert torch.allclose(J.matmat(X, t), AX + t[:, None] * expected.offset, rtol=0, atol=1e-9)
        assert torch.allclose(J.rmatmat(Y), torch.einsum("end,ke->knd", expected.J, Y), rtol=0, atol=1e-9)
        assert torch.allclose(J.T.matmat(Y), J.rmatmat(Y), rtol=0, atol=0)
    assert dot_test(J, generator) < 1e-13
    x = torch.randn(J.in_shape, generator=generator, dtype=torch.float64)
    assert torch.equal(J @ x, J.matmat(x[None])[0])
    flat = expected.J.flatten(1).numpy()
    assert np.allclose(J.to_scipy() @ x.flatten().numpy(), flat @ x.flatten().numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("mlp_path", MLP_PATHS)
@pytest.mark.parametrize("case", ["tied", "fused_qkv", *(case for case in tiny.CASES if "biases" in case)])
def test_offset_is_exactly_zero_without_live_biases(case: str, mlp_path: str, tiny_files: dict[str, Path]) -> None:
    ids = tiny.prompt(case, 4)
    expected = oracle.jacobian(tiny_files[case], ids, mlp_path=mlp_path)
    J = open_model(tiny_files[case]).trace(ids, mlp_path=mlp_path).jacobian()
    assert bool(J.offset.any()) == (float(expected.offset.norm()) > 1e-9 * float(expected.y.norm()))
    assert J.mlp_path == mlp_path


def test_rows_in_chunks_give_the_same_matrix(tiny_files: dict[str, Path]) -> None:
    J = open_model(tiny_files["gqa"], dtype="float64").trace(tiny.prompt("gqa", 5)).jacobian()
    whole = J.to_dense(chunk=64)
    for chunk in (23, 1000, None):
        assert torch.allclose(J.to_dense(chunk), whole, rtol=0, atol=1e-13)
    # The default follows a memory limit: at 8 bytes a float, never fewer than one row.
    for limit, rows in ((1, 1), (8 * 5 * 3 * 64 * 7, 7), (1 << 30, 64)):
        J.chunk_bytes = limit
        assert next(J.rows())[1] == rows


def test_progress_counts_the_blocks(tiny_files: dict[str, Path]) -> None:
    J = open_model(tiny_files["three_layers"]).trace([1, 2]).jacobian()
    seen: list[tuple[int, int]] = []
    J.progress = lambda done, total: seen.append((done, total))
    for sweep in (lambda: J.rmatmat(torch.ones(1, 32)), lambda: J.matmat(J.x[None])):
        seen.clear()
        sweep()
        assert seen == [(1, 3), (2, 3), (3, 3)]


def test_threads_do_not_matter(tiny_files: dict[str, Path]) -> None:
    ids, before = tiny.prompt("q8_0", 6), torch.get_num_threads()
    try:
        dense = [open_model(tiny_files["q8_0"], threads=count).trace(ids).jacobian().to_dense() for count in (1, 2)]
    finally:
        torch.set_num_threads(before)
    assert distance(dense[1], dense[0]) < 1e-6


# ---- singular values


@pytest.mark.parametrize("case", ["gqa", "biases", "odd_sizes"])
def test_svd_is_that_of_the_dense_matrix(case: str, tiny_files: dict[str, Path]) -> None:
    ids = tiny.prompt(case, 6)
    flat = oracle.jacobian(tiny_files[case], ids, mlp_path="up").J.flatten(1)
    U, S, Vh = torch.linalg.svd(flat, full_matrices=False)
    found = open_model(tiny_files[case], dtype="float64").trace(ids).jacobian().svd(4, tol=1e-8, max_sweeps=100)
    assert found.converged
    assert torch.allclose(found.S, S[:4], rtol=1e-12)
    assert found.Vh.shape == (4, 6, flat.shape[0])
    for ours, theirs in ((found.U, U.T[:4]), (found.Vh.flatten(1), Vh[:4])):
        assert torch.allclose((ours * theirs).sum(1).abs(), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-10)


def test_full_svd_of_an_early_position(tiny_files: dict[str, Path]) -> None:
    ids = tiny.prompt("plain", 6)
    flat = oracle.jacobian(tiny_files["plain"], ids, mlp_path="up", position=1).J.flatten(1)
    found = open_model(tiny_files["plain"], dtype="float64").trace(ids).jacobian(1).svd(64)
    assert torch.allclose(found.S, torch.linalg.svdvals(flat), rtol=0, atol=1e-12 * float(found.S[0]))
    assert not found.Vh[:, 2:].any()


# ---- what is read


LIVE = ("attn_v", "attn_output", "ffn_down")


@pytest.mark.parametrize("mlp_path", MLP_PATHS)
@pytest.mark.parametrize("case", ["q8_0", "three_layers", "biases", "fused_biases"])
@pytest.mark.parametrize("k", [1, 17])
def test_a_sweep_reads_each_live_tensor_once_and_no_other(
    case: str, k: int, mlp_path: str, tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_in(monkeypatch, SMALL_PIECES._replace(tile=2000))  # several tiles each
    model = open_model(tiny_files[case])
    J = model.trace(tiny.prompt(case, 5), mlp_path=mlp_path).jacobian()
    o = tiny.options(case)
    rows = {"attn_v": o.hk * o.hd, "attn_output": o.d, "ffn_down": o.d, f"ffn_{mlp_path}": o.ff}
    expected = {
        f"blk.{i}.{'attn_qkv' if o.fused_qkv and stem == 'attn_v' else stem}.weight": count
        for i in range(o.layers)
        for stem, count in rows.items()
    }
    for sweep in (
        lambda: J.rmatmat(torch.ones(k, *J.out_shape)),
        lambda: J.matmat(torch.ones(k, *J.in_shape)),
        lambda: J.matmat(torch.ones(k, *J.in_shape), torch.ones(k)),
    ):
        model.weights.reads.clear()
        sweep()
        matrices = {name: rows for name, rows in model.weights.reads.items() if name.endswith("weight")}
        assert matrices == expected  # biases are small: read whenever a block is built


def test_a_trace_reads_each_tensor_once(tiny_files: dict[str, Path]) -> None:
    """The embeddings by the row, the blocks whole, the head not at all before logits are asked for."""
    model = open_model(tiny_files["gqa"])
    trace = model.trace(tiny.prompt("gqa", 5))
    counts = dict(model.weights.reads)
    assert counts.pop("token_embd.weight") == 5
    o = tiny.options("gqa")
    assert counts.pop("output_norm.weight") == 1
    read = {"attn_q": 64, "attn_k": 32, "ffn_gate": o.ff, **dict.fromkeys(LIVE, 64), "attn_v": 32, "ffn_up": o.ff}
    norms = {"attn_norm": 1, "ffn_norm": 1}
    assert counts == {f"blk.{i}.{stem}.weight": rows for i in range(2) for stem, rows in (read | norms).items()}
    _ = trace.logits, trace.logits
    assert model.weights.reads["output.weight"] == o.vocab


# ---- the paper's own code on the same file


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_agrees_with_the_papers_code(name: str, dtype: str, shared: Path) -> None:
    path = shared / "reference" / f"{name}-q4_k_m.gguf"
    theirs = load_file(path.with_name(f"{name}.reference.safetensors"))
    trace = open_model(path, dtype=dtype).trace(theirs["ids"].tolist())
    J = trace.jacobian()
    assert distance(J.x, theirs["x"]) < 1e-7
    assert distance(J.output, theirs["y"]) < 2e-6
    assert distance(trace.all_logits(), theirs["logits"].reshape(len(J.ids), -1)) < 2e-6
    assert distance(J.to_dense(), theirs["jacobian"]) < 2e-6
    assert not J.offset.any()
    found = J.svd(6, tol=1e-4)
    assert found.converged
    assert distance(found.S, theirs["s"][:6]) < 2e-6
    other = open_model(path, dtype=dtype).trace(theirs["ids"].tolist(), mlp_path="gate").jacobian()
    assert distance(other.to_dense(), theirs["jacobian"]) > 0.05


@pytest.mark.parametrize("case", ["biases", "q8_0", "gpt2", "phi3", "gpt_oss", "qwen2moe"])
def test_slabs_of_hidden_units_change_nothing(
    case: str, tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Feed-forwards in slabs of 32 hidden units: the same map, and still every weight read once per sweep."""
    ids = tiny.prompt(case, 5)
    whole = open_model(tiny_files[case], dtype="float64").trace(ids).jacobian()
    compute_in(monkeypatch, SMALL_PIECES._replace(slab=32))
    model = open_model(tiny_files[case], dtype="float64")
    trace = model.trace(ids)
    J = trace.jacobian()
    assert trace.tapes[0].ffn.networks[0].factor.shape[1] > 32  # two slabs and more
    assert distance(J.to_dense(), whole.to_dense()) < 1e-13
    assert torch.allclose(J.offset, whole.offset, rtol=0, atol=1e-12)
    live = [name for name in model.gguf.tensors if "ffn_down" in name and name.endswith("weight")]
    model.weights.reads.clear()
    J.matmat(J.x[None])
    for name in live:
        if "_exps" not in name:
            assert model.weights.reads[name] == pytest.approx(model.gguf.tensors[name].rows)


# ---- maps inside the network, many in one pass


def all_spans(blocks: int) -> list[Span]:
    """Return every span there is: any start, any tap above it."""
    return [
        Span(start, Tap(kind, index))
        for start in range(blocks)
        for index in range(start + 1, blocks + 1)
        for kind in ("attn", "mlp", "layer")
    ]


# One file for each structure of a block: what is inside a branch, the whole Jacobian tests in every family.
# fmt: off
STRUCTURES = [
    "three_layers", "gqa", "q8_0", "biases", "fused_biases", "gemma2", "gemma3", "phi3", "olmo2", "granite_biases",
    "cohere2", "gpt2", "phi2", "falcon_40b", "mixtral_biases", "gpt_oss", "qwen2moe", "granitemoe_shared",
    "glm4moe", "falcon_h1", "nemotron_h", "gemma4_experts", "gemma4_small", "gemma4_shared",
    "deepseek2", "deepseek2_unsplit", "minimax_m3", "kimi_linear", "bailingmoe3_clamped", "hy_v4", "kimi_k3",
    "glm5_next", "hrm_text", "gemma3n",
    "rwkv6qwen2", "arwkv7", "rwkv6", "rwkv7", "deepseek4_yarn", "grovemoe", "talkie",
]
# fmt: on


@pytest.mark.parametrize("position", [-1, 2])
@pytest.mark.parametrize("case", STRUCTURES)
def test_every_map_inside_the_network(case: str, position: int, tiny_files: dict[str, Path]) -> None:
    """All of them advance together, each with vectors of its own, and each is what autograd says."""
    ids = tiny.prompt(case, 5)
    theirs = oracle.load(tiny_files[case])
    found = oracle.forward(theirs, ids, freeze="up")
    trace = open_model(tiny_files[case], dtype="float64").trace(ids)
    spans = all_spans(len(trace.tapes))
    expected = [oracle.inner(theirs, found, span.start, *astuple(span.tap), position=position) for span in spans]
    sweep = SharedSweep(trace.network, spans, trace.index(position))
    generator = torch.Generator().manual_seed(0)
    d, counts = trace.x.shape[1], [j % 4 for j in range(len(spans))]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    X = [draw(k, *trace.tapes[span.start].x.shape) for k, span in zip(counts, spans, strict=True)]
    t, Y = ([draw(k, *shape) for k in counts] for shape in ((), (d,)))
    for span, part, s, result, image in zip(spans, X, t, expected, sweep.up(X, t), strict=True):
        exact = torch.einsum("end,knd->ke", result.J, part) + s[:, None] * result.offset
        assert torch.allclose(
            image, exact, rtol=0, atol=1e-10 * (1 + float(exact.abs().amax() if len(exact) else 0))
        ), span
    for span, part, result, image in zip(spans, Y, expected, sweep.down(Y), strict=True):
        exact = torch.einsum("end,ke->knd", result.J, part)
        assert torch.allclose(
            image, exact, rtol=0, atol=1e-10 * (1 + float(exact.abs().amax() if len(exact) else 0))
        ), span


@pytest.mark.parametrize("case", ["three_layers", "biases", "gemma2", "hy_v4", "hrm_text", "gemma3n", "kimi_k3"])
def test_a_map_inside_the_network_is_an_operator_like_the_whole(case: str, tiny_files: dict[str, Path]) -> None:
    ids = tiny.prompt(case, 5)
    trace = open_model(tiny_files[case], dtype="float64").trace(ids)
    last = len(trace.tapes)
    for span in (Span(0, Tap("mlp", 1)), Span(last - 1, Tap("attn", last)), Span(1, Tap("layer", last))):
        J = trace.jacobian(2, span)
        assert J.reconstruction_error < 1e-13
        assert distance(torch.einsum("end,nd->e", J.to_dense(), J.x) + J.offset, J.output) < 1e-13
        raw = trace.jacobian(2, span, raw=True)
        assert distance(J.output, trace.model.freeze_final_norm(raw.output[None]).apply(raw.output[None])[0]) < 1e-13


@pytest.mark.parametrize(
    "case", ["three_layers", "phi2", "qwen3moe", "arctic", "hy_v4", "hrm_text", "gemma3n", "kimi_k3", "glm5_next"]
)
def test_maps_compose(case: str, tiny_files: dict[str, Path]) -> None:
    """J[0:L] = J[b:L] J[0:b], with the inner map taken at every position."""
    trace = open_model(tiny_files[case], dtype="float64").trace(tiny.prompt(case, 4))
    last = Tap("layer", len(trace.tapes))
    below = torch.stack([trace.jacobian(p, Span(0, Tap("layer", 1)), raw=True).to_dense() for p in range(4)])
    above = trace.jacobian(3, Span(1, last)).to_dense()
    assert distance(torch.einsum("end,ndmc->emc", above, below), trace.jacobian(3).to_dense()) < 1e-13


def test_many_maps_read_each_weight_once(tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files["three_layers"])
    trace = model.trace(tiny.prompt("three_layers", 4))
    sweep = SharedSweep(trace.network, all_spans(3), 3)
    assert len(sweep.norms) == len(sweep.spans)  # computed here: it takes a pass of its own, for the branches
    rows = {stem: model.gguf.tensors[f"blk.0.{stem}.weight"].rows for stem in (*LIVE, "ffn_up")}
    expected = {f"blk.{i}.{stem}.weight": count for i in range(3) for stem, count in rows.items()}
    for run in (
        lambda: sweep.up([trace.x[None]] * len(sweep.spans)),
        lambda: sweep.down([trace.output[None]] * len(sweep.spans)),
    ):
        model.weights.reads.clear()
        seen: list[tuple[int, int]] = []
        sweep.progress = lambda done, total, seen=seen: seen.append((done, total))
        run()
        assert model.weights.reads == expected
        assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    "span", [Span(0, Tap("layer", 0)), Span(2, Tap("attn", 2)), Span(0, Tap("mlp", 4)), Span(-1, Tap("layer", 1))]
)
def test_a_map_that_does_not_exist_is_refused(span: Span, tiny_files: dict[str, Path]) -> None:
    trace = open_model(tiny_files["three_layers"]).trace([1, 2])
    with pytest.raises(ValueError, match="no map leads from block"):
        trace.jacobian(span=span)


# ---- long runs: interrupted, and with weights kept between sweeps


class Interrupted(Exception):
    pass


def interrupting(after: int) -> Callable[[int, int], None]:
    """Return a progress callback that raises at the `after`-th block."""
    blocks = iter(range(1, 10**6))

    def seen(done: int, total: int) -> None:
        if next(blocks) == after:
            raise Interrupted

    return seen


@pytest.mark.parametrize(
    "case", ["three_layers", "phi2", "qwen2moe", "gemma4_shared", "arctic", "hy_v4", "hrm_text", "gemma3n", "kimi_k3"]
)
def test_an_interrupted_run_ends_with_the_same_bits(case: str, tiny_files: dict[str, Path], tmp_path: Path) -> None:
    """Many maps at once, up and down, stopped after every single block in turn; only what is left is computed."""
    trace = open_model(tiny_files[case]).trace(tiny.prompt(case, 5))
    blocks, spans = len(trace.tapes), all_spans(len(trace.tapes))
    generator = torch.Generator().manual_seed(0)
    inputs = [trace.tapes[span.start].x for span in spans]
    X = [torch.randn(1 + j % 3, *x.shape, generator=generator) for j, x in enumerate(inputs)]
    Y = [torch.randn(j % 3, len(trace.output), generator=generator) for j in range(len(spans))]
    t = [torch.randn(len(part), generator=generator) for part in X]

    def run(journal: Journal | None, stop: int | None) -> tuple[list[torch.Tensor], int]:
        sweep = SharedSweep(trace.network, spans, 4, journal=journal)
        _ = sweep.norms
        sweep.progress = None if stop is None else interrupting(stop)
        result = [*sweep.up(X, t), *sweep.down(Y), *sweep.up(X)]
        return result, sweep.flop

    expected, whole = run(None, None)
    for stop in range(1, 3 * blocks + 1):
        folder = tmp_path / str(stop)
        with pytest.raises(Interrupted), Journal.open(folder, {}, resume=False, every=0.0) as journal:
            run(journal, stop)
        with Journal.open(folder, {}, resume=True, every=0.0) as journal:
            found, flop = run(journal, None)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert flop < whole  # the block at which it stopped was behind
        if stop == 3 * blocks:
            assert flop == 0


@pytest.mark.parametrize("case", ["three_layers", "fused_biases", "q8_0", "qwen3moe_q8_0"])
def test_kept_weights_change_no_bit_of_a_rounded_product(case: str, tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files[case])
    J = model.trace(tiny.prompt(case, 5)).jacobian()
    Y = torch.randn(3, *J.out_shape, generator=torch.Generator().manual_seed(0))
    exact = J.rmatmat(Y)
    with J.sweep.rounded(torch.bfloat16):
        rounded = J.rmatmat(Y)
    assert rounded.dtype == torch.float32
    assert 1e-4 < distance(rounded, exact) < 2e-2  # the rounding of bfloat16 is 4e-3
    model.weights.place(["dense"] * len(J.network.tapes), {"dense": 1 << 30})
    for _ in range(2):  # while they are cached, and from the cache
        with J.sweep.rounded(torch.bfloat16):
            assert torch.equal(J.rmatmat(Y), rounded)
    assert torch.equal(J.rmatmat(Y), exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["three_layers", "fused_biases", "q8_0", "qwen3moe_q8_0"])
def test_kept_weights_change_no_bit_and_are_not_read_again(
    case: str, dtype: str, tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_in(monkeypatch, SMALL_PIECES._replace(tile=2000))
    model = open_model(tiny_files[case], dtype=dtype)
    trace = model.trace(tiny.prompt(case, 5))
    J, blocks = trace.jacobian(), len(trace.tapes)
    Y = torch.randn(3, len(trace.output), generator=torch.Generator().manual_seed(0))
    expected = J.rmatmat(Y)
    places = ["file"] * (blocks - 1) + ["dense"]
    model.weights.place(places, {"dense": 1 << 30})
    assert torch.equal(J.rmatmat(Y), expected)
    model.weights.reads.clear()
    assert torch.equal(J.rmatmat(Y), expected)
    read = {name.split(".")[1] for name in model.weights.reads if name.endswith("weight") and "norm" not in name}
    assert read == {str(i) for i in range(blocks - 1)}
    # With room for a tile only, the rest is read again.
    model.weights.place(places, {"dense": 2000 * J.dtype.itemsize})
    for _ in range(2):
        model.weights.reads.clear()
        assert torch.equal(J.rmatmat(Y), expected)
    again = {name.split(".")[1] for name in model.weights.reads if name.endswith("weight")}
    assert again == {str(i) for i in range(blocks)}


# ---- health


def cancelling(path: Path, length: float) -> Path:
    """Let a bias write a long vector into the stream after the first block, and another erase it before the last."""
    edited(path, "blk.0.ffn_down.bias", length)
    return edited(path, "blk.2.ffn_down.bias", -length)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("length", [1e3, 1e5])
def test_cancellation_is_healthy(length: float, dtype: str, tmp_path: Path) -> None:
    """The map is as good as sums that cancel can be, and is so in every dtype."""
    path = cancelling(tiny.write(tmp_path / "model.gguf", **tiny.resized("live_biases", layers=4)), length)
    J = open_model(path, dtype=dtype).trace([5, 17, 3, 99]).jacobian()
    streams: dict[str, torch.Tensor] = {}
    open_model(path, dtype="float64").trace([5, 17, 3, 99], observe=streams.__setitem__)
    lengths = [float(streams[f"l_out-{i}"][-1].norm()) for i in range(4)]
    expected = max(lengths[:3]) / min(lengths[2:])
    assert J.cancellation == pytest.approx(expected, rel=1e-3)
    found = reconstruction(J)
    assert found.healthy
    if length == 1e5:
        assert found.error > J.reconstruction_limit
        assert found.data()["cancellation"] == J.cancellation
        assert found.limit <= max(4 * torch.finfo(J.dtype).eps * expected * 1.01, J.reconstruction_limit)
    assert found.limit <= 1e-2


@pytest.mark.parametrize("length", [None, 1e3, 1e5])
def test_cancellation_excuses_no_mistake(length: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias that the map forgets, and a map that is off by 2 %."""
    path = tiny.write(tmp_path / "model.gguf", **tiny.resized("live_biases", layers=4))
    if length:
        cancelling(path, length)
    J = open_model(path).trace([5, 17, 3, 99]).jacobian()
    pushed = J._pushed.clone()
    for mistake in (pushed * 1.02, torch.stack([pushed[0], pushed[1], 0 * pushed[2]])):
        J.__dict__["_pushed"] = mistake
        assert not reconstruction(J).healthy
    J.__dict__["_pushed"] = pushed * torch.nan
    assert not reconstruction(J).healthy


@pytest.mark.parametrize("case", ["gqa", "live_biases", "gpt2", "gemma3"])
def test_ordinary_models_have_the_ordinary_limit(case: str, tiny_files: dict[str, Path]) -> None:
    J = open_model(tiny_files[case]).trace(tiny.prompt(case, 6)).jacobian()
    found = reconstruction(J)
    assert (found.limit, found.cancellation) == (1e-5, None)
    assert 1 <= J.cancellation < 10
