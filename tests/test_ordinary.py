"""The ordinary Jacobian against autograd over an independent forward, finite differences, and Euler's theorem."""

from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from helpers import EPS, compute_in, distance

from ggjac.jacobian import ordinary
from ggjac.jacobian.ordinary import OrdinaryJacobian
from ggjac.model import DTYPES, open_model
from ggjac.sizes import SMALL_PIECES


def at_prompt(path: Path, ids: list[int], position: int = -1, dtype: str = "float64") -> OrdinaryJacobian:
    trace = open_model(path, dtype=dtype).trace(ids)
    return OrdinaryJacobian(trace.network, trace.index(position))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("case", tiny.CASES)
def test_equals_autograd_of_an_independent_forward(case: str, tiny_files: dict[str, Path]) -> None:
    """Reverse mode gives the dense matrix; forward mode is held to the same one, and both are adjoint to rounding."""
    ids = tiny.prompt(case, 6)
    expected = oracle.jacobian(tiny_files[case], ids, mlp_path=None)
    J = at_prompt(tiny_files[case], ids)
    dense, X = J.to_dense(), random(3, *J.in_shape)
    pushed = J.matmat(X)
    assert distance(dense, expected.J) < 1e-10
    assert distance(pushed, torch.einsum("end,knd->ke", expected.J, X)) < 1e-10
    assert distance(pushed, torch.einsum("end,knd->ke", dense, X)) < 1e-12


@pytest.mark.parametrize(
    "case", ["gqa", "gemma2", "gpt_oss", "mistral3_temperature", "olmo_clamped", "glm4moe_groups", "deepseek4"]
)
@pytest.mark.parametrize("position", [0, 2, -2])
def test_any_position_and_nothing_after_it(case: str, position: int, tiny_files: dict[str, Path]) -> None:
    ids = tiny.prompt(case, 6)
    expected = oracle.jacobian(tiny_files[case], ids, mlp_path=None, position=position)
    J = at_prompt(tiny_files[case], ids, position)
    dense = J.to_dense()
    assert distance(dense, expected.J) < 1e-10
    assert not dense[:, J.position + 1 :].any()
    X = random(2, *J.in_shape)
    assert distance(J.matmat(X), torch.einsum("end,knd->ke", expected.J, X)) < 1e-10


@pytest.mark.parametrize("case", ["gqa", "gemma4_small", "gemma4_inputs", "gemma3n", "hy_v4", "deepseek4", "rwkv7"])
def test_from_the_stream_at_a_depth(case: str, tiny_files: dict[str, Path]) -> None:
    """Earlier blocks' keys and values, and blocks' own inputs, are constant: only the stream is moved."""
    known, ids = oracle.load(tiny_files[case]), tiny.prompt(case, 6)
    trace, states = open_model(tiny_files[case], dtype="float64").trace(ids), oracle.forward(known, ids)
    blocks = len(trace.network.tapes)
    for layer in {1, blocks - 1}:
        J, steps = OrdinaryJacobian(trace.network, 4, layer), []
        J.progress = lambda *step, steps=steps: steps.append(step)
        expected = oracle.inner(known, states, layer, "layer", blocks, position=4, mlp_path=None)
        X = random(2, *J.in_shape)
        assert distance(J.matmat(X), torch.einsum("end,knd->ke", expected.J, X)) < 1e-10
        assert steps == [(i + 1, blocks - layer) for i in range(blocks - layer)]
        assert distance(J.to_dense(), expected.J) < 1e-10


@pytest.mark.parametrize("case", ["gqa", "phi2", "gpt_oss"])
def test_finite_differences_agree(case: str, tiny_files: dict[str, Path]) -> None:
    """The second witness differentiates nothing: a central difference, with an error of step² and eps / step."""
    model, ids, step = oracle.load(tiny_files[case]), tiny.prompt(case, 6), 1e-5
    J = at_prompt(tiny_files[case], ids)
    x, v = oracle.forward(model, ids)["x"], random(*J.in_shape)
    ahead, behind = (oracle.forward(model, ids, x=x + side * step * v)["result_norm"][-1] for side in (1, -1))
    assert distance(J @ v, (ahead - behind) / (2 * step)) < 1e-7


@pytest.mark.parametrize("epsilon", [1e-9, 0.5])
def test_a_norm_annihilates_its_own_input(epsilon: float, tiny_file: Callable[..., Path]) -> None:
    """Euler's theorem on blocks that add nothing, so that `y = norm(x)`: what is left of `J x` is due to epsilon."""
    ids = tiny.prompt("gemma2", 5)
    trace = open_model(tiny_file("gemma2", post_gain=0.0, eps=epsilon), dtype="float64").trace(ids)
    J, square = OrdinaryJacobian(trace.network, 4), trace.x[4].square().mean()
    assert torch.allclose(J @ trace.x, trace.output * epsilon / (square + epsilon), rtol=0, atol=1e-12)
    assert distance(trace.jacobian() @ trace.x, trace.output) < 1e-13  # while the detached one returns the output


def test_the_freezing_rule_does_not_matter(tiny_files: dict[str, Path]) -> None:
    model, ids = open_model(tiny_files["gqa"], dtype="float64"), tiny.prompt("gqa", 6)
    up, gate = (OrdinaryJacobian(model.trace(ids, mlp_path=path).network, 5) for path in ("up", "gate"))
    assert distance(up.to_dense(), gate.to_dense()) < 1e-13


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["plain", "biases", "mixtral"])
def test_narrower_dtypes_come_as_close_as_they_can(case: str, dtype: str, tiny_files: dict[str, Path]) -> None:
    ids = tiny.prompt(case, 6)
    expected = oracle.jacobian(tiny_files[case], ids, mlp_path=None)
    J = at_prompt(tiny_files[case], ids, dtype=dtype)
    dense, X = J.to_dense(), random(2, *J.in_shape)
    assert dense.dtype == J.matmat(X).dtype == DTYPES[dtype]
    assert distance(dense, expected.J) < 60 * EPS[dtype]
    assert distance(J.matmat(X), torch.einsum("end,knd->ke", expected.J, X)) < 60 * EPS[dtype]


def test_none_one_and_many_vectors(tiny_files: dict[str, Path]) -> None:
    J = at_prompt(tiny_files["gqa"], tiny.prompt("gqa", 6))
    X, Y = random(5, *J.in_shape), random(5, *J.out_shape)
    assert J.matmat(X[:0]).shape == (0, 64)
    assert J.rmatmat(Y[:0]).shape == (0, 6, 64)
    assert torch.allclose(torch.cat([J.matmat(x[None]) for x in X]), J.matmat(X), rtol=0, atol=1e-12)
    assert torch.allclose(torch.cat([J.rmatmat(y[None]) for y in Y]), J.rmatmat(Y), rtol=0, atol=1e-12)
    assert torch.equal(J.matmat(X, torch.ones(5)), J.matmat(X))  # a derivative has no constant term


def test_rows_in_chunks_give_the_same_matrix(tiny_files: dict[str, Path]) -> None:
    J = at_prompt(tiny_files["gqa"], tiny.prompt("gqa", 5))
    whole = J.to_dense()
    assert next(J.rows())[1] == 64
    J.chunk_bytes = 1
    assert next(J.rows())[1] == 1
    assert torch.allclose(J.to_dense(23), whole, rtol=0, atol=1e-13)


def test_progress_counts_the_blocks(tiny_files: dict[str, Path]) -> None:
    J = at_prompt(tiny_files["three_layers"], [1, 2])
    seen: list[tuple[int, int]] = []
    J.progress = lambda done, total: seen.append((done, total))
    for sweep in (lambda: J.rmatmat(torch.ones(1, 32)), lambda: J.matmat(torch.ones(1, 2, 32))):
        seen.clear()
        sweep()
        assert seen == [(1, 3), (2, 3), (3, 3)]


# ---- streaming


@pytest.mark.parametrize("k", [1, 7])
def test_weights_are_read_once_upwards_and_twice_downwards(k: int, tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files["gqa"])
    trace, reads, out = model.trace([1, 2, 3]), model.weights.reads, model.gguf.tensors["blk.0.attn_q.weight"].shape[0]
    J = OrdinaryJacobian(trace.network, 2)
    _ = J._last_stream  # the last block once more, kept
    for sweep, times in ((lambda: J.matmat(random(k, 3, 64)), 1), (lambda: J.rmatmat(random(k, 64)), 2)):
        reads.clear()
        sweep()
        matrices = {name: rows for name, rows in reads.items() if "norm" not in name}
        assert len(matrices) == 2 * 7
        for name, rows in matrices.items():
            assert rows == times * model.gguf.tensors[name].shape[0], name
        assert reads["blk.0.attn_q.weight"] == times * out


@pytest.mark.parametrize("case", ["gqa", "fused_qkv", "mixtral", "q8_0"])
def test_no_graph_keeps_a_weight(case: str, tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles share a scratch buffer: a kept one would be wrong, or a copy. What is kept are activations."""
    kept: list[torch.Tensor | ordinary._Tile] = []
    pack = ordinary._Forgetful._pack

    def noting(self: ordinary._Forgetful, saved: torch.Tensor) -> torch.Tensor | ordinary._Tile:
        kept.append(pack(self, saved))
        return kept[-1]

    monkeypatch.setattr(ordinary._Forgetful, "_pack", noting)
    compute_in(monkeypatch, SMALL_PIECES._replace(tile=700))
    ids = tiny.prompt(case, 2)
    expected = oracle.jacobian(tiny_files[case], ids, mlp_path=None)
    model = open_model(tiny_files[case], dtype="float64")
    J = OrdinaryJacobian(model.trace(ids).network, 1)
    assert distance(J.to_dense(), expected.J) < 1e-10
    tiles = [entry for entry in kept if isinstance(entry, ordinary._Tile)]
    assert len(tiles) > 7 * model.config.block_count  # several of each matrix
    own = model.config.layers[0]
    widest = max(model.config.d, own.hidden_units, 4 * own.key_size * 4)
    assert max(entry.untyped_storage().nbytes() for entry in kept if isinstance(entry, torch.Tensor)) <= 2 * widest * 8
