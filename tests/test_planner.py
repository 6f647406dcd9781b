"""The plan against the operators themselves: what they read, compute and keep, on tiny files of every family."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES

from ggjac import blocks, jacobian, planner, weights
from ggjac.analysis import stable_rank
from ggjac.config import ModelConfig
from ggjac.gguf import GGUFFile, open_gguf
from ggjac.linop import Linear, LinearOperator, Mix
from ggjac.model import DTYPES, Model, Trace, open_model

TinyFile = Callable[..., Path]
# One file of each architecture, and what changes the counts: fused, biased, tied, quantized, routed and clamped.
CASES = [
    *("plain", "gqa", "mqa", "head_dim_wide", "odd_sizes", "tied", "fused_qkv", "biases", "live_biases"),
    *("fused_biases", "fused_split_biases", "q4_k_mixed", "bf16", "qwen2_output_bias", "qwen3", "gemma", "gemma2"),
    *("gemma3", "phi3", "phi3_q4_0", "phi3_unfused", "olmo2", "mistral3", "granite", "granite_biases", "smollm3"),
    *("glm4", "cohere2", "gpt2", "phi2", "phi2_fused", "falcon_7b", "falcon_40b", "starcoder2", "qwen3vl"),
    *("mixtral", "mixtral_one_expert", "mixtral_q4_k", "qwen3moe", "qwen2moe", "olmoe", "granitemoe"),
    *("granitemoe_shared", "gpt_oss", "gpt_oss_mxfp4", "gpt_oss_fused"),
]
GATED = ("plain", "biases", "phi3", "gpt2", "gemma2", "mixtral", "qwen2moe", "gpt_oss")
BOTH_WAYS = pytest.mark.parametrize(
    ("case", "mlp_path"), [*((case, "up") for case in CASES), *((case, "gate") for case in GATED)]
)


def header(path: Path) -> tuple[GGUFFile, ModelConfig]:
    file = open_gguf(path)
    return file, ModelConfig.from_metadata(file.metadata, {t.name: t.shape for t in file.tensors.values()})


def planned(path: Path, n: int, command: str = "svd", rank: int = 2, **options: Any) -> planner.Plan:
    file, config = header(path)
    dtype = options.get("dtype", "float32")
    what = planner.job(command, config, n, dtype, rank=rank, sweeps=options.pop("sweeps", planner.EXPECTED_SWEEPS))
    return planner.make(file, config, n, what, **options)


def matrices(reads: dict[str, float], model: Model) -> tuple[float, float]:
    """Return elements and stored bytes that were read of matrices."""
    infos = [(model.gguf.tensors[name], rows) for name, rows in reads.items()]
    infos = [(info, rows) for info, rows in infos if info.name.endswith(".weight") and len(info.shape) > 1]
    return sum(rows * i.shape[-1] for i, rows in infos), sum(rows * i.row_bytes for i, rows in infos)


def in_matrices(work: planner.Pass, read: planner.Pass) -> tuple[int, int]:
    return work.weights - read.weights, work.nbytes - read.nbytes


def vectors(path: Path, names: Callable[[str], bool]) -> int:
    """Return the elements of tensors of one axis."""
    file, _ = header(path)
    return sum(info.elements for name, info in file.tensors.items() if len(info.shape) == 1 and names(name))


def operators(operator: LinearOperator) -> Iterator[LinearOperator]:
    """Yield the leaves of an operator tree."""
    if isinstance(operator, Linear | Mix):
        yield operator
    for part in operator.parts:
        yield from operators(part)


def flop(operator: LinearOperator) -> int:
    """Count the multiplications and additions of every leaf for one vector."""
    total = 0
    for leaf in operators(operator):
        if isinstance(leaf, Linear):
            (n, into), (_, out) = leaf.in_shape, leaf.out_shape
            total += 2 * n * into * out
        else:
            assert isinstance(leaf, Mix)
            groups, per_group, m, n = leaf.pattern.shape
            total += 2 * groups * per_group * leaf.head_size * m * n
    return total


def nbytes(tape: Any) -> int:
    """Count the bytes of all tensors in nested named tuples."""
    if isinstance(tape, torch.Tensor):
        return tape.numel() * tape.element_size()
    return sum(map(nbytes, tape)) if isinstance(tape, tuple) else 0


def trace(path: Path, n: int, mlp_path: Any = "up", dtype: str = "float32") -> Trace:
    model = open_model(path, dtype=dtype)
    return model.trace([i % model.config.vocabulary for i in range(3, n + 3)], mlp_path=mlp_path)


# ---- one layer


@BOTH_WAYS
def test_flop_and_tapes_are_those_of_the_operators(case: str, mlp_path: Any, tiny_file: TinyFile) -> None:
    path, n = tiny_file(case), 5
    plan, run = planned(path, n, mlp_path=mlp_path), trace(path, n, mlp_path)
    for layer, tape in zip(plan.layers, run.tapes, strict=True):
        last = layer.index == len(plan.layers) - 1
        span = range(n - 1, n) if last else range(n)
        block = blocks.block(run.model.block(layer.index), run.model.config, tape, span)
        assert layer.sweep.flop == flop(block.attn) + flop(block.ffn)
        assert layer.tape_bytes == nbytes(tape)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("case", ["biases", "gpt2", "gpt_oss", "qwen2moe", "gemma2", "olmo2"])
def test_tapes_in_other_dtypes(case: str, dtype: str, tiny_file: TinyFile) -> None:
    path, n = tiny_file(case), 6
    plan = planned(path, n, dtype=dtype)
    assert [layer.tape_bytes for layer in plan.layers] == [nbytes(tape) for tape in trace(path, n, dtype=dtype).tapes]


def networks(run: Trace, layer: int) -> list[blocks.HiddenTape]:
    """Return the feed-forward networks that a sweep uses: in the last layer, at the last position only."""
    tape, n = run.tapes[layer].ffn, len(run.ids)
    return list((tape.at(slice(n - 1, n)) if layer == len(run.tapes) - 1 else tape).networks)


def live_bias_elements(run: Trace, layer: int) -> int:
    """Count the elements of the biases that a sweep pushes through."""
    w = run.model.block(layer)
    names = [(f"{stem}.bias", None) for stem in ("attn_v", "attn_output")]
    for network in networks(run, layer):
        names += [(f"{stem}{network.kind}.bias", network.expert) for stem in (network.live, "ffn_down")]
    return sum(w.vector(name, expert).numel() for name, expert in names if name in w)


def expert_elements(model: Model, stems: tuple[str, ...]) -> int:
    """Return the elements of one expert's tensors, biases included."""
    infos = model.gguf.tensors
    names = [f"blk.0.{stem}_exps.{suffix}" for stem in stems for suffix in ("weight", "bias")]
    return sum(math.prod(infos[name].shape[1:]) for name in names if name in infos)


def routed(run: Trace, layer: int) -> int:
    return sum(network.kind == "_exps" for network in networks(run, layer))


@BOTH_WAYS
def test_a_sweep_reads_what_the_plan_says(case: str, mlp_path: Any, tiny_file: TinyFile) -> None:
    path, n = tiny_file(case), 5
    run, plan = trace(path, n, mlp_path), planned(path, n, mlp_path=mlp_path)
    model, J = run.model, run.jacobian()
    model.weights.reads.clear()
    J.rmatmat(torch.ones(1, model.config.d))
    reads = dict(model.weights.reads)
    for layer in plan.layers:
        of_layer = {name: rows for name, rows in reads.items() if name.startswith(f"blk.{layer.index}.")}
        found = matrices(of_layer, model)
        last = layer.index == len(plan.layers) - 1
        # Which experts are used is the router's choice: compare as if it were the plan's.
        surplus = planner.routed_experts(model.config, 1 if last else n) - routed(run, layer.index)
        expected = found[0] + live_bias_elements(run, layer.index)
        expected += surplus * expert_elements(model, (networks(run, layer.index)[0].live, "ffn_down"))
        assert layer.sweep.weights == pytest.approx(expected, rel=1e-12)
        assert layer.dense_bytes == 4 * layer.sweep.weights
        if not model.config.expert_count:
            in_biases = 4 * live_bias_elements(run, layer.index)  # stored as F32 in these files
            assert layer.sweep.nbytes == pytest.approx(found[1] + in_biases, rel=1e-12)


@BOTH_WAYS
def test_a_trace_reads_what_the_plan_says(case: str, mlp_path: Any, tiny_file: TinyFile) -> None:
    path, n = tiny_file(case), 5
    run, plan = trace(path, n, mlp_path), planned(path, n, mlp_path=mlp_path)
    model, reads = run.model, dict(run.model.weights.reads)
    for layer in plan.layers:
        of_layer = {name: rows for name, rows in reads.items() if name.startswith(f"blk.{layer.index}.")}
        elements, _ = matrices(of_layer, model)
        used = sum(network.kind == "_exps" for network in run.tapes[layer.index].ffn.networks)
        surplus = planner.routed_experts(model.config, n) - used
        stems = ("ffn_gate", "ffn_up", "ffn_down")
        twice = ("ffn_up",) if mlp_path == "up" else ("ffn_gate",)
        clamped = model.config.row.activation == "silu_oai"
        elements += surplus * expert_elements(model, stems + (twice if clamped or mlp_path == "gate" else ()))
        # Vectors are a trifle, and read where they are needed: norms once, biases once or twice.
        infos = [info for info in model.gguf.tensors.values() if info.name.startswith(f"blk.{layer.index}.")]
        trifle = 2 * sum(info.elements for info in infos if len(info.shape) == 1 or info.name.endswith(".bias"))
        assert elements <= layer.trace.weights + 1e-6 <= elements + trifle + 1e-3
        assert layer.stored_bytes == sum(info.nbytes for info in infos)
    assert model.weights.reads["token_embd.weight"] * model.config.d <= plan.embedding.weights


@pytest.mark.parametrize("case", ["gqa", "fused_qkv", "phi3", "gpt2", "mixtral", "qwen2moe", "cohere2", "olmo2"])
def test_flop_of_a_trace(case: str, monkeypatch: pytest.MonkeyPatch, tiny_file: TinyFile) -> None:
    """Every projection that the trace applies passes through `Linear`; scores cost as much as their use."""
    counted = 0
    multiply, mix = Linear.matmat, Mix.matmat

    def linear(self: Linear, X: torch.Tensor, t: Any = None) -> torch.Tensor:
        nonlocal counted
        counted += flop(self) * len(X)
        return multiply(self, X, t)

    def mixed(self: Mix, X: torch.Tensor, t: Any = None) -> torch.Tensor:
        nonlocal counted
        counted += 2 * flop(self) * len(X)
        return mix(self, X, t)

    monkeypatch.setattr(Linear, "matmat", linear)
    monkeypatch.setattr(Mix, "matmat", mixed)
    for mlp_path in ("up", "gate"):
        counted = 0
        trace(tiny_file(case), 5, mlp_path)
        assert planned(tiny_file(case), 5, mlp_path=mlp_path).trace.flop == counted


# ---- the whole


def test_every_architecture_is_among_the_cases() -> None:
    assert {tiny.options(case).architecture for case in CASES} == set(FAMILIES)


def test_the_constants_are_those_of_the_modules_that_import_torch() -> None:
    assert planner.TILE_ELEMENTS == weights.TILE_ELEMENTS
    assert planner.SLAB == blocks.SLAB
    assert planner.CHUNK_BYTES == jacobian.CHUNK_BYTES
    assert (planner.EXACT_ROWS, planner.PROBES) == (stable_rank.EXACT_ROWS, 16)
    assert planner.ITEM_BYTES == {name: dtype.itemsize for name, dtype in DTYPES.items()}
