"""Which way triplets are found: the decision as a function of sizes, and both ways against dense arithmetic."""

import math
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from helpers import invoke_json

from ggjac import ways
from ggjac.analysis.per_token import per_token
from ggjac.analysis.svd import spectrum, stable_rank
from ggjac.config import ModelConfig, read_config
from ggjac.gguf import open_gguf
from ggjac.jacobian import DetachedJacobian, detached
from ggjac.model import open_model
from ggjac.svd import CLOSE, svd_of_matrix
from ggjac.ways import Task, take_matrices, takes_matrix


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the matrix wherever there is room."""
    monkeypatch.setattr(ways, "WORTH", -math.inf)


@pytest.fixture
def config(tiny_files: dict[str, Path]) -> ModelConfig:
    with open_gguf(tiny_files["gqa"]) as file:
        return read_config(file.metadata, {t.name: t.shape for t in file.tensors.values()})


def sized(config: ModelConfig, blocks: int, d: int, kv: int, hidden: int) -> ModelConfig:
    """Return a model with heads of 64, `kv` of them for values."""
    own = replace(config.layers[0], heads=d // 64, kv_heads=kv, key_size=64, value_size=64, hidden_units=hidden)
    return replace(config, block_count=blocks, layers=(own,) * blocks, d=d)


SMALL, LARGE = (30, 576, 3, 1536), (32, 4096, 8, 14336)  # the shapes of SmolLM2-135M and of Llama 3 8B
TOKENS = Task(8, joint=0, tokens=8)


@pytest.mark.parametrize(
    ("shape", "task", "n", "matrix"),
    [
        (SMALL, Task(8), 8, False),  # 256 vectors
        (SMALL, Task(64), 8, True),  # 576
        (SMALL, TOKENS, 8, True),  # 2048
        (SMALL, Task(8, joint=0, tokens=1), 8, False),
        (SMALL, Task(8, joint=0, tokens=809), 809, True),  # of 4 bytes, a GiB holds so many maps
        (SMALL, Task(8, joint=0, tokens=810), 810, False),
        (LARGE, Task(8), 8, False),
        (LARGE, TOKENS, 8, False),
        (LARGE, Task(8, joint=0, tokens=16), 16, True),  # 4096, and rows are cheaper than other vectors
        (LARGE, Task(8, joint=0, tokens=32), 32, False),  # no room
    ],
    ids=str,
)
def test_sizes_decide(shape: tuple[int, int, int, int], task: Task, n: int, matrix: bool, config: ModelConfig) -> None:
    assert takes_matrix(sized(config, *shape), task, n, item=4) is matrix


def test_nothing_is_saved_on_tiny_models_and_in_16_bits(config: ModelConfig) -> None:
    assert not takes_matrix(config, TOKENS, 8, item=4)
    assert not takes_matrix(sized(config, *SMALL), TOKENS, 8, item=2)


@pytest.mark.parametrize(
    ("shape", "n", "spans", "matrices"),
    [
        (SMALL, 7, [(i, 30) for i in range(30)], True),  # 576 rows
        (SMALL, 7, [(0, i) for i in range(1, 31) for _ in range(3)], True),  # 4032 columns
        (SMALL, 7, [(0, 7), (0, 15), (0, 30)], False),
        (SMALL, 40, [(0, i) for i in range(1, 31) for _ in range(3)], False),  # no room, and columns of every position
        (LARGE, 8, [(i, 32) for i in range(32)], False),  # LAPACK takes longer
    ],
    ids=str,
)
def test_sizes_decide_for_maps_inside_the_network(
    shape: tuple[int, int, int, int], n: int, spans: list[tuple[int, int]], matrices: bool, config: ModelConfig
) -> None:
    assert take_matrices(sized(config, *shape), 8, n, 4, spans) is matrices
    assert not take_matrices(sized(config, *shape), 8, n, 2, spans)


@pytest.mark.usefixtures("always")
def test_memory_does_not_decide(tiny_files: dict[str, Path]) -> None:
    """Processes that share it give the same bits, however many they are; a plan says where there is too little."""
    trace = open_model(tiny_files["gqa"]).trace(tiny.prompt("gqa", 5))
    ample, tight = trace.jacobian(), trace.jacobian()
    tight.chunk_bytes = 1
    a, b = (spectrum(J, 2).svd for J in (ample, tight))
    assert (a.method, a.sweeps) == (b.method, b.sweeps) == ("matrix", 1)
    assert torch.equal(a.Vh, b.Vh)
    assert torch.equal(ample.matrix(Task(2)), tight.matrix(Task(2)))
    command = ["svd", "-m", tiny_files["gqa"], "--tokens", "3,5,7", "--dry-run", "--no-bench"]
    ample, tight = (invoke_json(*command, "--ram-budget", size, code=None) for size in ("1GiB", "1"))
    assert ample["ram"]["matrix"] == tight["ram"]["matrix"] == 3 * 64 * 64 * 4
    assert not tight["fits"]


def test_flop_are_those_of_the_operators(tiny_files: dict[str, Path]) -> None:
    """A vector's, but for the mixing of positions; a map inside the network has those of its blocks alone."""
    model = open_model(tiny_files["gqa"], dtype="float64")
    trace = model.trace(tiny.prompt("gqa", 5))
    J = trace.jacobian(raw=True)
    J.matmat(J.x[None])
    mixing = sum(2 * 5 * own.heads * own.value_size * 5 for own in model.config.layers)
    whole = 5 * sum(ways._vector_flop(model.config, i) for i in range(model.config.block_count))
    # The last block writes one position, which the decision leaves out.
    assert J.sweep.flop < whole + mixing < J.sweep.flop * 2
    halves = [ways.ways(model.config, Task(2), 5, start, start + 1) for start in range(model.config.block_count)]
    assert sum(half.sweeps for half in halves) == pytest.approx(ways.ways(model.config, Task(2), 5).sweeps)


def dense(
    case: str, position: int, tiny_files: dict[str, Path], dtype: str
) -> tuple[DetachedJacobian, oracle.Jacobian]:
    ids = tiny.prompt(case, 5)
    expected = oracle.jacobian(oracle.load(tiny_files[case]), ids, mlp_path="up", position=position)
    return open_model(tiny_files[case], dtype=dtype).trace(ids).jacobian(position), expected


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("position", [-1, 2])
@pytest.mark.parametrize("case", ["biases", "gemma2"])
def test_the_matrix_gives_autograds_triplets(case: str, position: int, dtype: str, tiny_files: dict[str, Path]) -> None:
    J, expected = dense(case, position, tiny_files, dtype)
    close = 1e-10 if dtype == "float64" else 2e-4
    each, joint = per_token(J, 3), spectrum(J, 3).svd
    assert [one.position for one in each] == list(range(J.position + 1))
    maps = [(one.svd, expected.J[:, one.position], expected.x[one.position]) for one in each]
    for found, matrix, x in [*maps, (joint, expected.J.flatten(1), expected.x.flatten())]:
        assert (found.method, found.reason, found.sweeps, found.converged) == ("matrix", "complete", 1, True)
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        sign = torch.sign(U.T[:3] @ (matrix @ x))[:, None]
        assert torch.allclose(found.S.double(), S[:3], rtol=close)
        assert torch.allclose(found.U.double(), U.T[:3] * sign, rtol=0, atol=100 * close)
        assert torch.allclose(found.Vh.flatten(1).double(), Vh[:3] * sign, rtol=0, atol=100 * close)
        assert found.following is not None
        assert found.following.value == pytest.approx(float(S[3]), rel=close)
        assert float(found.residual.max()) < (1e-12 if dtype == "float64" else 1e-5)
    S = torch.linalg.svdvals(expected.J.flatten(1))
    rank = stable_rank(J, joint)
    assert rank.error == 0
    assert rank.value == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=close)


@pytest.mark.usefixtures("always")
def test_the_matrix_is_computed_once(tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files["gqa"])
    J = model.trace(tiny.prompt("gqa", 5)).jacobian()
    _ = J.linear_output
    model.weights.reads.clear()
    found = per_token(J, 2), spectrum(J, 2)
    stable_rank(J, found[1].svd)
    assert model.weights.reads["blk.0.attn_v.weight"] == model.gguf.tensors["blk.0.attn_v.weight"].rows


def test_both_ways_agree_within_their_residuals(tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    J, _ = dense("gqa", -1, tiny_files, "float64")
    sweeps, tokens = spectrum(J, 3), per_token(J, 3)
    monkeypatch.setattr(ways, "WORTH", -math.inf)
    for a, b in zip([sweeps, *tokens], [spectrum(J, 3), *per_token(J, 3)], strict=True):
        assert (a.svd.method, b.svd.method) == ("sweeps", "matrix")
        assert a.data().keys() == b.data().keys()
        # By Weyl, a value is within its residual of one of the matrix.
        assert ((a.svd.S - b.svd.S).abs() <= a.svd.residual * a.svd.S + 1e-12).all()


@pytest.mark.parametrize("rank", [2, 4])
def test_residuals_are_measured_and_zero_values_harmless(rank: int) -> None:
    U, _ = torch.linalg.qr(torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    A = U @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]).double()) @ V.T
    found = svd_of_matrix(A, rank, tol=1e-9, sweeps=1)
    assert found.converged
    assert found.S.tolist() == pytest.approx([3.0, 2.0, 1.0, 0.0][:rank], abs=1e-12)
    assert not svd_of_matrix(A, rank, tol=1e-30, sweeps=1).converged
    with pytest.raises(ValueError, match="not finite"):
        svd_of_matrix(A * math.nan, rank, tol=1e-9, sweeps=1)


@pytest.mark.parametrize("columns", [64, 200])
def test_few_triplets_of_a_large_matrix_are_iterated(columns: int) -> None:
    """To LAPACK's values; LAPACK has them where all are asked for, or a residual that is out of reach."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, 64, generator=generator))[0] for size in (64, columns))
    A = U * 0.9 ** torch.arange(64) @ V.T
    exact, found = (svd_of_matrix(A, 3, tol=1e-3, sweeps=2, iterated=way) for way in (False, True))
    assert (exact.reason, found.reason, found.method, found.sweeps) == ("complete", "tolerance", "matrix", 2)
    S = torch.linalg.svdvals(A.double())
    assert torch.allclose(found.S.double(), S[:3], rtol=1e-6)
    assert found.following is not None
    assert found.following.value == pytest.approx(float(S[3]), rel=1e-4)
    assert found.converged
    assert float(found.residual.max()) <= CLOSE
    for part, other in zip(found.U, exact.U, strict=True):
        assert abs(float(part @ other)) > 1 - 1e-6
    assert svd_of_matrix(A, 3, tol=1e-6, sweeps=2, iterated=True).reason == "complete"
    assert svd_of_matrix(A, 64, tol=1e-3, sweeps=2, iterated=True).reason == "complete"


def test_lapack_has_small_matrices_many_triplets_and_float64() -> None:
    assert ways.decomposition(8, 640, 640).iterated
    assert ways.decomposition(8, 640, 5120).seconds < ways.decomposition(8, 640, 5120, item=8).seconds
    assert not ways.decomposition(8, 256, 256).iterated
    assert not ways.decomposition(200, 640, 640).iterated
    assert not ways.decomposition(8, 640, 640, item=8).iterated


@pytest.mark.usefixtures("always")
def test_the_command_says_its_way(tiny_files: dict[str, Path]) -> None:
    command = ["svd", "-m", tiny_files["gqa"], "--tokens", "3,5,7", "--per-token", "-k", 2]
    found = invoke_json(*command)["svd"]
    assert found["method"] == "matrix"
    assert {one["method"] for one in found["per_token"]} == {"matrix"}


@pytest.mark.parametrize(
    ("shape", "rank", "n", "width", "sweeps"),
    [
        (SMALL, 8, 8, 16, 10),
        (SMALL, 8, 1, 32, 8),  # too little is saved
        (SMALL, 1, 8, 9, 8),  # the same width
        (LARGE, 8, 8, 32, 8),  # sweeps may read the disk
    ],
    ids=str,
)
def test_blocks_are_narrow_where_arithmetic_decides(
    shape: tuple[int, int, int, int], rank: int, n: int, width: int, sweeps: int, config: ModelConfig
) -> None:
    assert ways.block(sized(config, *shape), rank, n, n * shape[1]) == (width, sweeps)


def test_tiny_models_have_wide_blocks(config: ModelConfig) -> None:
    assert ways.block(config, 8, 8, 8 * config.d) == (32, ways.EXPECTED_SWEEPS)


def test_processes_that_share_a_model_take_the_same_way(
    tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has other heads, and must not decide by its own."""
    network = open_model(tiny_files["gqa"]).trace([1, 2, 3]).jacobian().network
    config = network.config
    own = replace(config, layers=tuple(replace(layer, heads=1, kv_heads=1) for layer in config.layers))
    part = DetachedJacobian(network._replace(frame=network.frame._replace(config=own)), 2)
    decided: list[object] = []
    monkeypatch.setattr(detached, "takes_matrix", lambda config, *_, **__: decided.append(config))
    assert part.matrix(Task(1)) is None
    monkeypatch.setattr(ways, "block", lambda config, *_: decided.append(config) or ways.Block(1, 1))
    assert part.block(1, 3) == 1
    assert decided == [config, config] != [own, own]
