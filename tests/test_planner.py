"""The plan compared with the operators: bytes they read, FLOP they compute, memory they keep; files of every family."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import DELTA, FAMILIES, SIZES
from helpers import held
from torch.utils.flop_counter import FlopCounterMode

from ggjac import blocks, planner, ways
from ggjac.blocks.patterns import Recurrence
from ggjac.config import ModelConfig, read_config
from ggjac.config.mixers import MIXERS
from ggjac.division import largest
from ggjac.gguf import GGUFFile, open_gguf
from ggjac.jacobian import SharedSweep, Span, Tap
from ggjac.linop import ChannelScan, Linear, LinearOperator, Mix, Scan
from ggjac.model import DTYPES, Model, Trace, open_model
from ggjac.planner import machine, memory, work
from ggjac.sizes import ITEM_BYTES, forms
from ggjac.svd import svd_of_matrix

TinyFile = Callable[..., Path]
# A file of each architecture, and variations that change the counts: fused, biased, tied, quantized, routed, clamped.
CASES = [
    *("plain", "gqa", "mqa", "head_dim_wide", "odd_sizes", "tied", "fused_qkv", "biases", "live_biases"),
    *("fused_biases", "fused_split_biases", "q4_k_mixed", "bf16", "qwen2_output_bias", "qwen3", "gemma", "gemma2"),
    *("gemma3", "phi3", "phi3_q4_0", "phi3_unfused", "olmo2", "mistral3", "granite", "granite_biases", "smollm3"),
    *("glm4", "cohere2", "gpt2", "phi2", "phi2_fused", "falcon_7b", "falcon_40b", "starcoder2", "qwen3vl"),
    *("exaone4", "seed_oss", "hunyuan", "internlm2", "ernie4_5", "exaone", "minicpm", "arcee", "apertus"),
    *("mixtral", "mixtral_one_expert", "mixtral_q4_k", "qwen3moe", "qwen3vlmoe", "qwen2moe", "olmoe", "granitemoe"),
    *("granitemoe_shared", "gpt_oss", "gpt_oss_mxfp4", "gpt_oss_fused"),
    *("gptneox", "stablelm_12b", "nemotron", "command_r", "olmo", "olmo_clamped"),
    *("glm4moe", "glm4moe_355b", "deepseek", "dots1", "ernie4_5_moe", "hunyuan_moe", "bailingmoe"),
    *("bailingmoe2_groups", "exaone_moe", "minimax_m2", "phimoe"),
    *("qwen35", "qwen35_sizes", "qwen35_predictor", "qwen35_q8_0", "qwen35moe", "qwen35moe_fused", "qwen3next"),
    *("qwen3next_old", "qwen3next_fused", "lfm2", "lfm2_window", "lfm2_taps", "lfm2_q8_0", "lfm2moe"),
    *("mamba2", "mamba2_groups", "granitehybrid", "granitehybrid_shared", "granitehybrid_biases", "falcon_h1"),
    *("falcon_h1_normed", "nemotron_h", "nemotron_h_biases", "nemotron_h_moe", "nemotron_h_moe_latent"),
    *("nemotron_h_moe_uneven", "nemotron_h_moe_q8_0", "gemma4", "gemma4_full_first", "gemma4_fused"),
    *("gemma4_experts", "gemma4_experts_apart", "gemma4_q8_0", "gemma4_small", "gemma4_shared", "gemma4_shared_keys"),
    *("gemma4_inputs", "gemma4_small_q8_0"),
    *("deepseek2", "deepseek2_unsplit", "deepseek2_dense", "mistral4", "minicpm3", "plm"),
    *("mellum", "maple", "granite_swa", "granite_swa_experts", "hy_v3", "cohere2moe", "cohere2moe_rms", "mimo2"),
    *(
        "xverse",
        "qwen",
        "qwen2vl",
        "paddleocr",
        "hunyuan_vl",
        "starcoder",
        "codeshell",
        "orion",
        "maincoder",
        "chatglm",
    ),
    *("pangu", "plamo", "plamo3", "cogvlm", "deepseek2_ocr", "baichuan", "mpt", "bloom", "refact", "jais", "jais2"),
    *("mimo2_fused", "smallthinker", "dbrx", "arctic", "grok", "grok_defaults", "openelm", "deci", "deci_linear"),
    *("deci_idle", "bitnet"),
    *("mamba", "mamba_sizes", "mamba_q8_0", "jamba", "jamba_experts", "plamo2"),
    *("rwkv6", "rwkv6_apart", "rwkv7", "rwkv7_one_layer", "rwkv7_q8_0"),
    *("rwkv6qwen2", "rwkv6qwen2_heads", "arwkv7", "arwkv7_no_gate", "arwkv7_not_normed", "arwkv7_q8_0"),
    *("afmoe", "laguna", "laguna_elements", "step35_clamped", "step35_factors", "spark2_5", "muse_glimmer"),
    *("llama4", "llama4_several", "minimax_01", "nanbeige", "nanbeige_thrice"),
    *("deepseek32", "glm_dsa", "minimax_m3", "kimi_linear", "kimi_linear_fused", "bailingmoe3", "bailingmoe3_clamped"),
    *("dots3note", "hy_v4", "hy_v4_indexer", "kimi_k3", "kimi_k3_sizes", "glm5_next", "glm5_next_bounded"),
    *("hrm_text", "hrm_text_stacks", "gemma3n", "deepseek4", "deepseek4_yarn"),
    *("grovemoe", "grovemoe_threes", "talkie"),
]
GATED = (
    "plain",
    "biases",
    "phi3",
    "gpt2",
    "gemma2",
    "mixtral",
    "qwen2moe",
    "gpt_oss",
    "glm4moe",
    "deepseek2",
    "bailingmoe3_clamped",
    "kimi_k3",
    "maple",
    "granite_swa_experts",
    "bitnet",
    "gemma3n",
)
BOTH_WAYS = pytest.mark.parametrize(
    ("case", "mlp_path"), [*((case, "up") for case in CASES), *((case, "gate") for case in GATED)]
)


def header(path: Path) -> tuple[GGUFFile, ModelConfig]:
    file = open_gguf(path)
    return file, read_config(file.metadata, {t.name: t.shape for t in file.tensors.values()})


MAKING = ("mlp_path", "device", "threads", "budget", "tapes_on_disk")


def planned(
    path: Path, n: int, command: str = "svd", rank: int = 2, dtype: str = "float32", **options: Any
) -> planner.Plan:
    file, config = header(path)
    making = {name: options.pop(name) for name in MAKING if name in options}
    return planner.make(file, config, work.command_work(command, config, n, dtype, rank=rank, **options), **making)


def matrices(reads: dict[str, float], model: Model) -> tuple[float, float]:
    """Return elements and stored bytes that were read of matrices."""
    infos = [(model.gguf.tensors[name], rows) for name, rows in reads.items()]
    infos = [(info, rows) for info, rows in infos if info.name.endswith(".weight") and len(info.shape) > 1]
    return sum(rows * i.shape[-1] for i, rows in infos), sum(rows * i.row_bytes for i, rows in infos)


def of_block(reads: dict[str, float], model: Model, layer: int) -> dict[str, float]:
    """Return the rows read of a block's tensors; blocks that share them have equal parts.

    What further streams are made by counts as the first block's.
    """
    config = model.config
    prefixes = (config.prefix(layer), *["altup_proj."] * config.opens(layer))
    uses = config.order.count(config.order[layer])
    return {name: rows / uses for name, rows in reads.items() if name.startswith(prefixes)}


def in_matrices(work: planner.Pass, read: planner.Pass) -> tuple[int, int]:
    return work.weights - read.weights, work.nbytes - read.nbytes


def vectors(path: Path, names: Callable[[str], bool]) -> int:
    """Return the elements of tensors of one axis."""
    file, _ = header(path)
    return sum(info.elements for name, info in file.tensors.items() if len(info.shape) == 1 and names(name))


def operators(operator: LinearOperator) -> Iterator[LinearOperator]:
    """Yield the leaves of an operator tree."""
    if isinstance(operator, Linear | Mix | ChannelScan):
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
        elif isinstance(leaf, ChannelScan):  # each number of a state decays, is written to, and is read
            (n, _), (m, _) = leaf.in_shape, leaf.out_shape
            total += 2 * (n + n + m) * leaf.rate.numel()
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
        config = run.model.config
        block = blocks.block(run.model.block(layer.index), config, tape, span, config.bank(layer.index))
        parts = (block.entry, block.attn, block.laurel, block.ffn, block.beside, block.inputs, block.values)
        assert layer.sweep.flop == sum(flop(part) for part in parts if part is not None)
        assert layer.tape_bytes == nbytes(tape)


# torch's own counter leaves out products that are added in place.
IN_PLACE = dict.fromkeys(
    (torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), lambda _, left, right, **more: 2 * math.prod(left) * right[-1]
)
SHORT_KEYS = {"sizes": DELTA | {"ssm.state_size": 4, "ssm.inner_size": 16}}
RECURRENT = ("qwen35", "qwen35moe", "qwen3next_old")


@pytest.mark.parametrize("n", [16, 17, 19, 20])
@pytest.mark.parametrize("case", RECURRENT)
def test_a_recurrence_over_a_long_prompt_is_in_chunks(case: str, n: int, tiny_file: TinyFile) -> None:
    """Beyond four keys of positions: chunks as long as a key, the last of them filled in part or whole."""
    path = tiny_file(case, **SHORT_KEYS)
    plan, run = planned(path, n), trace(path, n)
    for layer, tape in zip(plan.layers, run.tapes, strict=True):
        (mixer,) = tape.attn.mixers
        assert (mixer.scan is not None) == (n > 16 and mixer.kind == "delta")
        span = range(n - 1, n) if layer.index == len(plan.layers) - 1 else range(n)
        block = blocks.block(run.model.block(layer.index), run.model.config, tape, span)
        assert layer.sweep.flop == block.flop
        assert layer.tape_bytes == nbytes(tape)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            block.matmat(torch.ones(1, n, plan.d))
        assert counter.get_total_flops() == block.flop


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        "biases",
        "gpt2",
        "gpt_oss",
        "qwen2moe",
        "gemma2",
        "olmo2",
        "olmo_clamped",
        "qwen35",
        "lfm2",
        "deepseek2",
        "mamba",
    ],
)
def test_tapes_in_other_dtypes(case: str, dtype: str, tiny_file: TinyFile) -> None:
    path, n = tiny_file(case), 6
    plan = planned(path, n, dtype=dtype)
    assert [layer.tape_bytes for layer in plan.layers] == [nbytes(tape) for tape in trace(path, n, dtype=dtype).tapes]


def networks(run: Trace, layer: int) -> list[blocks.HiddenTape]:
    """Return the feed-forward networks that a sweep uses: in the last layer, at the last position only."""
    tape, n = run.tapes[layer].ffn, len(run.ids)
    return flat(tape.at(slice(n - 1, n)) if layer == len(run.tapes) - 1 else tape)


def flat(tape: blocks.FFNTape) -> list[blocks.HiddenTape]:
    """Return the networks of a branch, and of its parts."""
    inside = [*tape.networks, *(part for part in (tape.beside, tape.after) if part)]
    parts = [flat(part) if isinstance(part, blocks.FFNTape) else [part] for part in inside]
    return [network for part in parts for network in part]


def live_bias_elements(run: Trace, layer: int) -> int:
    """Count the elements of the biases that a sweep pushes through, and of the factor on the stream.

    Of several biases in one vector, a sweep reads all.
    """
    w, mixers = run.model.block(layer), [MIXERS[kind] for kind in run.model.config.layers[layer].mixers]
    names: list[tuple[str, int | None]] = []
    for mixer in mixers:
        names += [(f"{stem}.bias", None) for stem in (mixer.values, mixer.expansion, mixer.convolution, mixer.output)]
    for network in networks(run, layer):
        names += [(f"{stem}{network.kind}.bias", network.expert) for stem in (network.live, "ffn_down")]
    names += [("layer_output_scale.weight", None)] * run.model.config.row.stream_scale
    names += [("channel_mix_lerp_k.weight", None)]
    names += [("altup_correct_scale.weight", None)]

    def elements(name: str, expert: int | None) -> int:
        stem, _, suffix = name.rpartition(".")
        whole = f"{w.prefix}{w.slices[stem].stem}.{suffix}" if stem in w.slices else ""
        stored = run.model.gguf.tensors.get(whole)
        return w.vector(name, expert).numel() if stored is None else stored.elements

    return sum(elements(name, expert) for name, expert in names if name in w)


def expert_elements(model: Model, layer: int, kind: str, stems: tuple[str, ...]) -> int:
    """Return the elements of the tensors of one expert of a layer, biases included."""
    w, names = model.block(layer), [f"{stem}{kind}" for stem in stems]
    matrices = sum(math.prod(w.matrix(f"{name}.weight", 0).shape) for name in names if f"{name}.weight" in w)
    return matrices + sum(w.vector(f"{name}.bias", 0).numel() for name in names if f"{name}.bias" in w)


def surplus(run: Trace, layer: int, positions: int, used: list[blocks.HiddenTape], stems: tuple[str, ...]) -> int:
    """Return the elements of experts that the plan counts and the router did not choose, as if it were the plan's."""
    total = 0
    for experts in run.model.config.mixtures(run.model.config.layers[layer]):
        chosen = sum(network.kind == experts.kind for network in used)
        each = expert_elements(run.model, layer, experts.kind, stems)
        total += (planner.routed_experts(experts, positions) - chosen) * each
    return total


@BOTH_WAYS
def test_a_sweep_reads_what_the_plan_says(case: str, mlp_path: Any, tiny_file: TinyFile) -> None:
    path, n = tiny_file(case), 5
    run, plan = trace(path, n, mlp_path), planned(path, n, mlp_path=mlp_path)
    model, J = run.model, run.jacobian()
    model.weights.reads.clear()
    J.rmatmat(torch.ones(1, model.config.d))
    reads = dict(model.weights.reads)
    for layer in plan.layers:
        of_layer = of_block(reads, model, layer.index)
        found = matrices(of_layer, model)
        last = layer.index == len(plan.layers) - 1
        expected = found[0] + live_bias_elements(run, layer.index)
        used = networks(run, layer.index)
        live = {network.live for network in used}
        expected += surplus(run, layer.index, 1 if last else n, used, (*live, "ffn_down"))
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
        of_layer = of_block(reads, model, layer.index)
        elements, _ = matrices(of_layer, model)
        stems = ("ffn_gate", "ffn_up", "ffn_down")
        twice = ("ffn_up",) if mlp_path == "up" else ("ffn_gate",)
        alone = model.config.row.activation == "silu_oai" or model.config.row.ffn == "plain"
        alone = alone or model.config.layers[layer.index].clamp("_exps") > 0 or model.config.situ[1] > 0
        stems += twice if alone or mlp_path == "gate" else ()
        if f"{model.config.prefix(layer.index)}ffn_routed_norm.weight" in model.gguf.tensors:
            stems += (*twice, "ffn_down")  # of experts once more, for the norm of their sum
        elements += surplus(run, layer.index, n, flat(run.tapes[layer.index].ffn), stems)
        # Vectors are a trifle, and read where they are needed: norms once, biases once or twice. Where three parts of a
        # convolution, or queries, keys and values, have their biases in one, it is read for each.
        prefix = model.config.prefix(layer.index)
        infos = [info for info in model.gguf.tensors.values() if info.name.startswith(prefix)]
        trifle = 2 * sum(info.elements for info in infos if len(info.shape) == 1 or not info.name.endswith(".weight"))
        trifle += sum(info.elements for info in infos if info.name.endswith(("ssm_conv1d.bias", "attn_qkv.bias")))
        assert elements <= layer.trace.weights + 1e-6 <= elements + trifle + 1e-3
        assert layer.stored_bytes == sum(info.nbytes for info in infos)
    assert model.weights.reads["token_embd.weight"] * model.config.d <= plan.embedding.weights


TRACED: list[tuple[str, dict[str, Any], int]] = [
    *((case, {}, 5) for case in ("gqa", "fused_qkv", "phi3", "gpt2", "mixtral", "qwen2moe", "cohere2", "olmo2")),
    *((case, {}, 5) for case in ("olmo_clamped", "glm4moe", "lfm2", "lfm2moe", *RECURRENT)),
    *((case, {}, 5) for case in ("mamba2", "granitehybrid_experts", "falcon_h1", "nemotron_h_moe", "gemma4")),
    *((case, {}, 5) for case in ("nemotron_h_moe_latent", "gemma4_experts", "grovemoe")),
    *((case, SHORT_KEYS, n) for case in RECURRENT for n in (16, 17, 20)),
]


@pytest.mark.parametrize(("case", "sizes", "n"), TRACED)
def test_flop_of_a_trace(
    case: str, sizes: dict[str, Any], n: int, monkeypatch: pytest.MonkeyPatch, tiny_file: TinyFile
) -> None:
    """Every projection that the trace applies passes through `Linear`; scores cost as much as their use."""
    counted = 0

    def count(kind: type[LinearOperator], cost: Callable[[Any], int]) -> None:
        multiply = kind.matmat

        def counting(self: LinearOperator, X: torch.Tensor, t: Any = None) -> torch.Tensor:
            nonlocal counted
            counted += cost(self) * len(X)
            return multiply(self, X, t)

        monkeypatch.setattr(kind, "matmat", counting)

    run = Recurrence.run

    def running(self: Recurrence, v: torch.Tensor, state: torch.Tensor) -> Any:
        """Count what is removed, written and read; the pattern that comes of it is used once, without scores."""
        nonlocal counted
        counted += 6 * len(v) * state.numel()
        if state.shape[2] == len(v):
            counted -= 2 * v.shape[1] * len(v) ** 2 * own.value_size
        return run(self, v, state)

    count(Linear, flop)
    count(Mix, lambda mix: 2 * flop(mix))
    count(Scan, lambda scan: scan.flop)
    monkeypatch.setattr(Recurrence, "run", running)
    path = tiny_file(case, **sizes)
    own = open_model(path).config.recurrence
    for mlp_path in ("up", "gate"):
        counted = 0
        trace(path, n, mlp_path)
        assert planned(path, n, mlp_path=mlp_path).trace.flop == counted


def test_a_recurrence_is_continued_from_its_state(tiny_file: TinyFile) -> None:
    """However long the text: a token costs a step of the recurrence, where attention looks back at all of it."""

    def token(case: str, text: int, **changes: Any) -> int:
        plan = planned(tiny_file(case, **changes), 5, "steer", text=text)
        return plan.sweep_of(next(step.region for step in plan.work.sweeps if step.what == "tokens")).flop

    listed = ALONE["qwen35_listed"]
    (delta, longer), (attention, more) = (
        (token(case, 5, **changes), token(case, 50, **changes)) for case, changes in (("qwen35", listed), ("gqa", {}))
    )
    assert delta == longer
    assert attention < more
    run = trace(tiny_file("qwen35", **listed), 1)
    own = run.model.config.recurrence
    projections = planned(tiny_file("qwen35", **listed), 1).trace.flop - sum(
        6 * own.heads * own.key_size + 2 * own.heads * own.value_size for _ in run.tapes
    )
    assert delta == projections + 6 * own.heads * own.key_size * own.value_size * len(run.tapes)


# ---- the whole


def test_every_architecture_is_among_the_cases() -> None:
    assert {tiny.options(case).architecture for case in CASES} == set(FAMILIES)


def test_the_sizes_of_dtypes_are_torchs() -> None:
    assert ITEM_BYTES == {name: dtype.itemsize for name, dtype in DTYPES.items()}


# ---- memory and the verdict

AMPLE = planner.Budget(1 << 40, 1 << 40)


def test_parts_add_up_and_what_does_not_fit_is_refused(tiny_file: TinyFile) -> None:
    path = tiny_file("gqa")
    plan = planned(path, 5, budget=AMPLE)
    assert plan.ram_needed == sum(plan.ram.values()) <= plan.ram_peak
    assert plan.vram == {}
    assert plan.fits
    planner.check(plan)
    enough = planned(path, 5, budget=planner.Budget(plan.ram_needed))
    assert enough.fits
    assert enough.ram_peak == enough.ram_needed
    short = planned(path, 5, budget=planner.Budget(plan.ram_needed - 1))
    assert not short.fits
    with pytest.raises(planner.NoFitError, match=r"^svd needs .* of memory \(process .*, but --ram-budget allows") as e:
        planner.check(short)
    assert e.value.will_not_fit
    assert "\n" not in str(e.value)


def test_the_default_budget_is_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch, tiny_file: TinyFile) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 10 << 30)
    monkeypatch.setattr(machine, "anonymous_memory", lambda: 2 << 30)
    assert planned(tiny_file("gqa"), 5).budget == planner.Budget(6 << 30, None)


def needs(path: Path, n: int, **options: Any) -> planner.Plan:
    return planned(path, n, budget=planner.Budget(1), **options)


def test_the_advice_names_what_weighs_most(tiny_file: TinyFile) -> None:
    path = tiny_file("gqa", context=4096, layers=9)
    long = needs(path, 4000, rank=1)
    assert max(long.ram, key=lambda part: long.ram[part]) == "tapes"
    assert "; keep tapes on disk with --trace FOLDER; " in str(long.misfit)
    assert "--trace" not in str(needs(path, 4000, rank=1, tapes_on_disk=True).misfit)
    assert "; lower --rank, or use fewer tokens; " in str(needs(path, 400, rank=60).misfit)


def parts(path: Path) -> dict[str, set[str]]:
    """Return the parts that some plan of a command shows, by command: on the CPU and a device, of every step."""
    everything = {
        "analyze": {"layers": [1, 2], "transport": True, "contrast": True, "per_token": True},
        "svd": {"per_token": True, "saved": True},
        "layers": {"transport": True, "saved": True},
        "attribute": {"by": "edge"},
        "predict": {"everywhere": True},
        "jacobian": {"mean": True},
    }
    found: dict[str, set[str]] = {}
    for command in work.JOBS:
        for options in ({}, everything.get(command, {})):
            for n, device in itertools.product((2, 100), ("cpu", "cuda")):
                plan = planned(path, n, command, device=device, budget=AMPLE, **options)
                found.setdefault(command, set()).update(plan.ram, plan.vram)
                # Only the largest step is in the plan: each of them alone.
                for step in plan.work.steps:
                    alone = dataclasses.replace(plan.work, steps=(step,), reused="live")
                    found[command].update(planner.make(*header(path), alone, device=device, budget=AMPLE).ram)
    return found


def test_every_part_of_a_plan_has_advice(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that some command shows, and no other."""
    monkeypatch.setattr(work, "EXACT_ROWS", 0)
    found: dict[str, set[str]] = {}
    for worth in (-math.inf, math.inf):  # from matrices, and by sweeps
        monkeypatch.setattr(ways, "WORTH", worth)
        for command, names in parts(tiny_file("gqa")).items():
            found.setdefault(command, set()).update(names)
    for command, names in found.items():
        assert names <= memory.PARTS.keys(), f"{command}: give advice in memory.PARTS"
    assert set.union(*found.values()) == memory.PARTS.keys() - {"rounded vectors"}  # of larger models


def test_a_large_map_has_advice(tiny_file: TinyFile) -> None:
    """There a rough search may come first, of rounded vectors."""
    path = tiny_file("plain", layers=1, d=2048, heads=4, head_dim=16, kv_heads=2, ff=16, vocab=32)
    plan = planned(path, 64, budget=planner.Budget(ram=1))
    assert "rounded vectors" in plan.ram
    assert "but --ram-budget allows" in str(plan.misfit)


def test_the_advice_names_options_that_the_command_has(tiny_file: TinyFile) -> None:
    for command in work.JOBS:
        params = getattr(import_module(f"ggjac.cli.{command}"), command).params
        has = {option for param in params for option in param.opts}
        for options in ({}, {"layers": [1, 2]} if command == "analyze" else {}):
            plan = planned(tiny_file("gqa"), 5, command, **options)
            for part, folder in itertools.product(memory.PARTS, (False, True)):
                if part in plan.ram or (part == "decoding" and plan.work.lookups):
                    line = memory.advice(plan.work, {part: 1}, "--ram-budget", tapes_on_disk=folder)
                    assert set(re.findall(r"--[a-z-]+", line)) <= has, (command, part)


def test_advice_on_what_weighs_most_by_hand(tiny_file: TinyFile) -> None:
    def lines(command: str, *parts: str, **options: Any) -> list[str]:
        needed = planned(tiny_file("gqa"), 5, command, **options).work
        text = memory.advice(needed, dict.fromkeys(parts, 1 << 26), "--ram-budget", tapes_on_disk=False)
        return text.split("; ")

    assert lines("svd", "process", "tile") == ["give --ram-budget 128MiB"]
    triplets = "lower --rank, or use fewer tokens"
    assert lines("analyze", "decoding") == [triplets, "or give --ram-budget 64MiB"]
    assert lines("svd", "bases", "vectors", "checkpoint") == [triplets, "or give --ram-budget 192MiB"]  # once
    assert lines("layers", "bases", "tapes")[:2] == ["ask for fewer --layers", "keep tapes on disk with --trace FOLDER"]
    for command in ("compare", "steer"):
        assert lines(command, "tapes")[0] == "use fewer tokens"
    assert lines("ranks", "tapes", prompts=2)[0] == lines("ranks", "norms")[0] == "use fewer tokens"
    assert lines("ranks", "bases")[0] == "use fewer tokens"  # it has no --rank
    # Parts below an eighth of the whole get no advice.
    needed = planned(tiny_file("gqa"), 5).work
    assert memory.advice(needed, {"tapes": 1, "process": 8}, "-x", tapes_on_disk=False) == "give -x 64MiB"


def test_tapes_on_disk_leave_two_in_memory(tiny_file: TinyFile) -> None:
    path = tiny_file("plain", layers=6)
    kept, on_disk = (planned(path, 50, tapes_on_disk=choice, budget=AMPLE) for choice in (False, True))
    assert kept.ram["tapes"] == kept.tape_bytes == 3 * on_disk.ram["tapes"]


def test_memory_grows_with_the_prompt_the_rank_and_the_dtype(tiny_file: TinyFile) -> None:
    path = tiny_file("gqa")

    def needed(n: int = 50, rank: int = 8, **options: Any) -> int:
        return planned(path, n, rank=rank, budget=AMPLE, **options).ram_needed

    base = needed()
    assert base < needed(n=60)
    assert base < needed(rank=32)
    assert needed(dtype="bfloat16") < base < needed(dtype="float64")
    assert base < needed(sweeps=20)
    assert planned(path, 50, "predict", budget=AMPLE).ram["tapes"] == 0
    assert planned(path, 50, position=9, budget=AMPLE).ram["vectors"] < planned(path, 50, budget=AMPLE).ram["vectors"]


def recurrent(size: int, heads: int) -> dict[str, Any]:
    """Return three blocks' delta rule with heads of some size, two of them for each key head."""
    sizes = {"state_size": size, "group_count": heads // 2, "time_step_rank": heads, "inner_size": size * heads}
    return {"sizes": DELTA | {f"ssm.{name}": value for name, value in sizes.items()}}


DELTA_ALONE = {"mixers": ("k3 kda",)}
CONVOLUTIONS = {"mixers": ("convolution",) * 3, "extra": {"attention.head_count_kv": [0] * 3}}
NARROW = {"heads": 4, "head_dim": 8, "kv_heads": 2}
WIDE = {"heads": 8, "head_dim": 32}
# Each thing that can dominate: heads, hidden units, the stream; and an expert that many positions use.
HOLDING: list[tuple[str, dict[str, Any]]] = [
    *((case, {}) for case in ("gqa", "mqa", "head_dim_wide", "gpt2", "gemma2", "falcon_7b", "falcon_40b", "phi2")),
    *((case, {}) for case in ("cohere2", "smollm3", "granite", "mixtral", "qwen2moe", "qwen3moe", "olmoe", "olmo2")),
    *((case, {}) for case in ("granitemoe", "gpt_oss", "olmo_clamped", "olmo_clamped_fused", "starcoder2")),
    *(("gqa", WIDE | {"kv_heads": groups, "ff": 32}) for groups in (8, 4, 1)),
    *((case, WIDE | {"ff": 32}) for case in ("gemma2", "granite", "phi2", "cohere2", "gpt2")),
    ("mixtral", WIDE | {"kv_heads": 4}),
    *((case, NARROW | {"ff": 512}) for case in ("gqa", "granite", "cohere2", "gemma2")),
    *((case, NARROW | {"d": 256, "ff": 32}) for case in ("gqa", "granite")),
    ("gqa", NARROW | {"d": 128, "ff": 3000}),
    *((case, NARROW | {"experts": 8, "experts_used": 2, "expert_ff": 512}) for case in ("mixtral", "granitemoe")),
    ("mixtral", NARROW | {"experts": 8, "experts_used": 8, "expert_ff": 256}),
    ("mixtral", NARROW | {"d": 256, "experts": 8, "experts_used": 2, "expert_ff": 3000}),
    ("mixtral", NARROW | {"d": 256, "experts": 32, "experts_used": 2, "expert_ff": 512}),
    *(("glm4moe", NARROW | {"n_rot": None, "ff": ff, "expert_ff": 64}) for ff in (32, 512)),
    *(("deepseek", {"ff": ff, "dense_lead": lead}) for ff, lead in ((96, 1), (400, 2), (400, 0), (96, 3))),
    *(("lfm2", CONVOLUTIONS | {"ff": ff}) for ff in (32, 512)),
    ("lfm2", CONVOLUTIONS | {"ff": 32, "d": 256}),
    *(("qwen35_listed", recurrent(size, heads) | {"ff": 32}) for size, heads in ((4, 64), (16, 16), (32, 8))),
    ("qwen35_listed", recurrent(16, 16) | {"ff": 512}),
    *((case, {}) for case in ("mamba2", "falcon_h1", "gemma4", "gemma4_experts")),
    ("gemma4", {"ff": 32}),  # the widest heads are in the last block, which writes only the last position
    *((case, {}) for case in ("arctic", "cohere2moe", "mimo2_fused", "smallthinker", "grok", "grovemoe")),
    ("grovemoe", NARROW | {"experts": 12, "experts_used": 2, "expert_ff": 32, "chunk_ff": 512}),
    ("bitnet", {}),
    ("qwen35_listed", recurrent(16, 16) | {"d": 32, "ff": 32}),
    *(("deepseek2_dense", {"ff": 32, "heads": heads}) for heads in (4, 16)),
    ("plm", {"ff": 32, "heads": 16}),
    *(("hy_v4", more) for more in ({}, {"streams": 4}, {"ff": 512, "dense_lead": 2}, {"d": 256, "ff": 32})),
    *(("kimi_k3", DELTA_ALONE | more) for more in ({}, {"ff": 512, "dense_lead": 3}, {"d": 256, "ff": 32})),
    *(("hrm_text", {"layers": 2} | more) for more in ({}, {"d": 256, "ff": 32})),
    *(("gemma3n", more) for more in ({}, {"ff": 2048}, {"d": 256, "ff": 32})),
    *(("deepseek4", more) for more in ({}, {"heads": 8}, {"d": 256})),
    *(("talkie", more) for more in ({}, {"ff": 512}, {"d": 256, "ff": 32})),
]


@pytest.mark.parametrize(("case", "sizes"), HOLDING)
def test_a_sweep_holds_what_is_counted(case: str, sizes: dict[str, Any], tiny_file: TinyFile) -> None:
    n, k = 24, 30  # too few vectors for networks to make their matrices
    run = trace(tiny_file(case, **{"layers": 3} | sizes), n)
    J, config = run.jacobian(), run.model.config
    Y, X = torch.ones(k, config.d), torch.ones(k, n, config.d)
    J.rmatmat(Y)  # the tile is there from now on
    # The plan cannot foresee how uneven a router is; and the shape checks of the test run keep the inputs of experts.
    least, most = (0.7, 1.1) if config.expert_count else (0.86, 1.05)
    for up, product in ((False, lambda: J.rmatmat(Y)), (True, lambda: J.matmat(X))):
        counted = 4 * k * planner.sweep_floats(config, n, up=up)
        assert least < held(product) / counted < most, up


@pytest.mark.parametrize("case", ["gqa", "cohere2", "mixtral"])
def test_matrices_of_networks_take_no_more(case: str, tiny_file: TinyFile) -> None:
    n, k = 24, 64
    J = trace(tiny_file(case, layers=3, **NARROW | {"ff": 512}), n).jacobian()
    Y = torch.ones(k, J.out_shape[0])
    J.rmatmat(Y)  # the tile is there from now on
    config = J.network.frame.config
    assert forms(k, config.d, config.d, config.hidden_units, config.hidden_units)
    assert 0.2 < held(lambda: J.rmatmat(Y)) / (4 * k * planner.sweep_floats(config, n, up=False)) < 1.05


@pytest.mark.parametrize(("case", "sizes"), HOLDING)
@pytest.mark.parametrize("kinds", [("layer",), ("layer", "attn", "mlp")])
def test_maps_of_one_block_hold_what_is_counted(
    case: str, sizes: dict[str, Any], kinds: tuple[Any, ...], tiny_file: TinyFile
) -> None:
    n, k = 100, 10  # enough of them to outweigh everything that exists once
    run = trace(tiny_file(case, **{"layers": 3} | sizes), n)
    J, config = run.jacobian(), run.model.config
    maps = SharedSweep(J.network, [Span(1, Tap(kind, 2)) for kind in kinds], n - 1, raw=True)
    alone = work.Region(spans=((1, 2),))
    Y = [torch.ones(k, maps.width(span.tap)) for span in maps.spans]
    X = [torch.ones(k, n, config.width(1))] * len(kinds)
    maps.down(Y)  # the tile is there from now on
    for up, product in ((False, lambda: maps.down(Y)), (True, lambda: maps.up(X))):
        counted = 4 * k * len(kinds) * planner.sweep_floats(config, n, up=up, region=alone)
        if up and len(kinds) == 1:  # a stack of one part is the caller's own
            counted -= 4 * k * n * config.width(1)
        assert 0.84 < held(product) / counted < 1.12, up


# Blocks of one kind.
ALONE: dict[str, dict[str, Any]] = {
    "qwen35_listed": {"layers": 3, "mixers": ("delta",) * 3, "extra": {"attention.recurrent_layers": [True] * 3}},
    "lfm2": CONVOLUTIONS | {"layers": 3},
}


@pytest.mark.parametrize("n", [24, 200])
@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        *(("qwen35_listed", recurrent(size, heads) | {"ff": 32}) for size, heads in ((8, 16), (16, 16), (32, 8))),
        ("qwen35_listed", recurrent(16, 16) | {"d": 128}),
        ("lfm2", {"ff": 32}),
        *(("deepseek2_dense", {"ff": 32, "sizes": SIZES | more}) for more in ({}, {"nope": 64}, {"query": 200})),
        *(("hy_v4", {"d": d, "ff": 32, "dense_lead": 3}) for d in (64, 256)),
        ("kimi_k3", {"ff": 32, "dense_lead": 3}),
        ("deepseek4", {"heads": 16}),  # so many that its experts do not count
        ("kimi_k3", {"ff": 512, "dense_lead": 3}),
        *(("gemma3n", more) for more in ({}, {"ff": 2048}, {"d": 256, "ff": 32})),
    ],
)
def test_a_trace_holds_what_is_counted(case: str, sizes: dict[str, Any], n: int, tiny_file: TinyFile) -> None:
    """Of a convolution, of latent attention, and of a recurrence: of the longer prompt, in chunks."""
    model = open_model(tiny_file(case, **ALONE.get(case, {}), **sizes))
    ids = [i % model.config.vocabulary for i in range(n)]
    model.trace(ids, tapes=False)  # the tile is there from now on
    counted = 4 * planner.trace_floats(model.config, n)
    assert 0.7 < held(lambda: model.trace(ids, tapes=False)) / counted < 1.1


# ---- where weights wait


@pytest.mark.parametrize(("case", "hidden"), [("gpt2", 3), ("arcee", 3), ("apertus", 4)])
def test_an_activation_holds_what_is_counted(case: str, hidden: int, tiny_file: TinyFile) -> None:
    config = open_model(tiny_file(case)).config
    z = torch.linspace(-3, 3, 10_000)
    share = blocks.activation(config, 0).share
    assert held(lambda: share(z)) + z.nbytes < (hidden + 0.01) * z.nbytes
    wide, narrow = (
        dataclasses.replace(config, layers=(dataclasses.replace(config.layers[0], hidden_units=units),))
        for units in (10_000, 9_000)
    )
    more = planner.trace_floats(wide, 1) - planner.trace_floats(narrow, 1)
    assert more == hidden * 1000


@pytest.mark.parametrize("n", [1, 2, 8])
def test_lapack_holds_what_is_counted(n: int) -> None:
    """Beside four square matrices of its own work, which torch does not count; a process holds them, too."""
    d = 256
    matrix = torch.randn(d, n * d, generator=torch.Generator().manual_seed(0))
    found = held(lambda: svd_of_matrix(matrix, 8, tol=1e-3, sweeps=1)) / 4
    assert found == pytest.approx(work.Decomposition("", 1, 8, d, n * d, 4).floats - 4 * d**2, rel=0.03)


def test_layers_nearest_the_output_are_kept_dense(tiny_file: TinyFile) -> None:
    path = tiny_file("plain", layers=5)
    plan = planned(path, 5, budget=AMPLE)
    assert plan.places == ["dense"] * 5
    size = plan.layers[0].dense_bytes
    tight = planned(path, 5, budget=planner.Budget(plan.ram_needed + 2 * size + size // 2))
    assert tight.places == ["file"] * 3 + ["dense"] * 2
    assert tight.room == {"dense": 2 * size, "device": 0, "pinned": 0}
    assert tight.ram_peak == plan.ram_needed + 2 * size
    assert planned(path, 5, "predict", budget=AMPLE).places == ["file"] * 5  # nothing is used again


@pytest.mark.parametrize("case", ["nanbeige", "nanbeige_thrice", "hrm_text"])
def test_blocks_that_are_applied_several_times_are_kept_once(case: str, tiny_file: TinyFile) -> None:
    """As the cache does, which sweeps fill to the byte; and they are made ready once."""
    path = tiny_file(case, layers=2, type="Q8_0")
    run, ample = trace(path, 5), planned(path, 5, budget=AMPLE)
    order, size = run.model.config.order, ample.layers[0].dense_bytes
    assert len(order) > 2
    assert ample.places == ["dense"] * len(order)
    assert ample.ram_peak == ample.ram_needed + 2 * size
    tight = planned(path, 5, budget=planner.Budget(ample.ram_needed + 2 * size - 1))
    assert tight.places == [("file", "dense")[i] for i in order]
    for plan, kept in ((ample, 2), (tight, 1)):
        run.model.weights.place(plan.places, plan.room)
        for _ in range(2):
            run.jacobian().rmatmat(torch.ones(1, plan.d))
        assert run.model.weights.cache.nbytes["dense"] == plan.room["dense"] == kept * size
    making = {part.what: part for part in planner.seconds(ample, Rates(), free=1 << 40).parts}["making layers ready"]
    assert making.dequantize == pytest.approx(2 * size / 4 / 5e5 + 2 * size / 8e6)
    device = planned(path, 5, device="cuda", budget=planner.Budget(ample.ram_needed, 1 << 40))
    stored = device.layers[0].kept.nbytes
    tight = planned(path, 5, device="cuda", budget=planner.Budget(1 << 40, device.vram_needed + stored))
    assert tight.places == [("pinned", "device")[i] for i in order]


def test_a_device_takes_quantized_layers_first(tiny_file: TinyFile) -> None:
    path = tiny_file("plain", layers=5, type="Q8_0")

    def made(ram: int, vram: int) -> planner.Plan:
        return planned(path, 5, device="cuda", budget=planner.Budget(ram, vram))

    free = made(1 << 40, 1 << 40)
    assert free.places == ["dense"] * 5
    assert set(free.ram) == {"process", "on the way"}
    stored, dense = free.layers[0].sweep.nbytes, free.layers[0].dense_bytes
    assert stored < dense / 3
    ram, vram = free.ram_needed, free.vram_needed
    assert made(ram, vram).places == ["file"] * 5
    assert made(ram + stored, vram + 3 * stored).places == ["file", "pinned", "device", "device", "device"]
    plan = made(ram, vram + 5 * stored + dense - stored)
    assert plan.places == ["device"] * 4 + ["dense"]
    assert plan.vram_peak == vram + 4 * stored + dense
    short = made(ram, vram - 1)
    assert "of device memory" in str(short.misfit)
    assert "give --vram-budget " in str(short.misfit)


# ---- time


class Rates:
    """Round numbers."""

    disk, bus, call, touch, copy, rounding, host = 1e6, math.inf, 0.25, 8e6, 4e6, 4.0, 2e6

    def dequantize(self, type: str) -> float:
        return {"F32": 1e6, "Q8_0": 5e5}[type]

    def gemm(self, columns: int) -> float:
        return 1e8 if columns >= 100 else 1e7


def test_times_by_hand(tiny_file: TinyFile) -> None:
    path = tiny_file("plain", type="Q8_0")
    plan = planned(path, 5, budget=planner.Budget(ram=1 << 28))
    plan = dataclasses.replace(plan, layers=tuple(dataclasses.replace(e, place="file") for e in plan.layers))
    cold = planner.seconds(plan, Rates(), cached=0, free=0)
    parts = {part.what: part for part in cold.parts}
    assert list(parts) == ["trace", "svd", "decoding", "reconstruction"]
    svd, sweep = parts["svd"], plan.sweep
    assert svd.count == ways.EXPECTED_SWEEPS
    assert svd.disk == pytest.approx(sweep.nbytes / 1e6)
    assert svd.dequantize == pytest.approx(sweep.types["Q8_0"] / 5e5 + sweep.types.get("F32", 0) / 1e6)
    columns = plan.work.width * sweep.flop / 2 / sweep.weights
    orthonormal = planner.krylov_flop(5 * 64, plan.work.width, svd.count) / Rates().gemm(plan.work.width)
    assert svd.gemm == pytest.approx(plan.work.width * sweep.flop / Rates().gemm(round(columns)) + orthonormal)
    assert svd.calls == pytest.approx(0.25 * 8)  # four matrices in each of two layers
    # Products of width stacked vectors, at 5 positions in the first layer and at 1 in the last, but for values; each
    # written twice, 4 bytes a float. The feed-forward network is one slab.
    tensors = header(path)[0].tensors
    widths = [tensors[f"blk.0.{name}.weight"].rows for name in ("attn_v", "attn_output", "ffn_up", "ffn_down")]
    floats = 5 * sum(widths) + 5 * widths[0] + sum(widths[1:])
    assert svd.writes == pytest.approx(2 * 4 * plan.work.width * floats / 8e6)
    assert svd.each == pytest.approx(max(svd.disk, svd.dequantize + svd.gemm + svd.writes) + svd.calls)
    assert parts["trace"].disk == pytest.approx(plan.trace.nbytes / 1e6)
    assert cold.total == pytest.approx(sum(part.count * part.each for part in cold.parts))
    # Bytes that fit into the page cache are not read again; those that are in it already, not at all.
    warm = {p.what: p for p in planner.seconds(plan, Rates(), cached=1 << 30, free=plan.ram_peak + (1 << 30)).parts}
    assert (warm["trace"].disk, warm["svd"].disk, warm["decoding"].disk) == (0, 0, 0)
    half = {p.what: p for p in planner.seconds(plan, Rates(), cached=0, free=plan.ram_peak + sweep.nbytes // 2).parts}
    assert half["svd"].disk == pytest.approx(svd.disk / 2, rel=1e-3)


def test_times_of_a_rough_search_and_of_lapack_by_hand(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    path, budget = tiny_file("plain", type="Q8_0"), planner.Budget(ram=1)  # nothing is kept dense
    plan, whole = (planned(path, 5, budget=budget, search_dtype=dtype) for dtype in ("bfloat16", "same"))
    parts, usual = ({p.what: p for p in planner.seconds(one, Rates(), free=0).parts} for one in (plan, whole))
    assert [(what, parts[what].count) for what in ("svd, rough", "svd")] == [("svd, rough", 7), ("svd", 3)]
    rough, svd = parts["svd, rough"], usual["svd"]
    assert rough.dequantize == pytest.approx(svd.dequantize / 4)
    width = whole.work.width
    seven, eight = (planner.krylov_flop(5 * 64, width, sweeps) / Rates().gemm(width) for sweeps in (7, 8))
    assert rough.gemm - seven == pytest.approx((svd.gemm - eight) / 4)
    assert parts["svd"].dequantize == pytest.approx(svd.dequantize)
    assert plan.ram["rounded vectors"] == 2 * width * 5 * 2048
    assert "rounded vectors" not in whole.ram
    monkeypatch.setattr(ways, "WORTH", -math.inf)
    lapack = {p.what: p for p in planner.seconds(planned(path, 5, budget=budget), Rates(), free=0).parts}
    each = ways.decomposition(1, 64, 5 * 64).seconds * ways.PRODUCTS / 1e7
    assert lapack["svd by matrix"].total == pytest.approx(each)


def test_lapack_works_on_the_host(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a copy of a device's matrix, which stays there; and at the rate of the host."""
    monkeypatch.setattr(ways, "WORTH", -math.inf)
    here, device = (planned(tiny_file("plain"), 5, device=device, budget=AMPLE) for device in ("cpu", "cuda"))
    assert device.ram["LAPACK"] == here.work.decompositions[0].floats * 4 + 5 * 64 * 64 * 4
    assert "LAPACK" not in device.vram
    assert device.vram["matrix"] == 5 * 64 * 64 * 4
    times = [{p.what: p for p in planner.seconds(plan, Rates(), free=0).parts} for plan in (here, device)]
    assert times[1]["svd by matrix"].gemm == pytest.approx(times[0]["svd by matrix"].gemm * 1e7 / 2e6)


def test_what_is_not_on_the_device_is_copied_in_every_sweep(tiny_file: TinyFile) -> None:
    path = tiny_file("plain", layers=4, type="Q8_0")
    free = planned(path, 5, device="cuda", budget=AMPLE)
    stored = free.layers[0].sweep.nbytes
    budget = planner.Budget(free.ram_needed + stored, free.vram_needed + 2 * stored)
    plan = planned(path, 5, device="cuda", budget=budget)
    assert plan.places == ["file", "pinned", "device", "device"]

    class Bus(Rates):
        bus = 1e3

    parts = {part.what: part for part in planner.seconds(plan, Bus(), cached=1 << 30, free=1 << 40).parts}
    assert parts["svd"].bus == pytest.approx(2 * stored / 1e3)
    assert parts["trace"].bus == pytest.approx(plan.trace.nbytes / 1e3)
    assert parts["svd"].each == pytest.approx(parts["svd"].bus + parts["svd"].calls)  # slower than all else here
    assert all(part.bus == 0 for part in planner.seconds(plan, Rates(), cached=1 << 30, free=1 << 40).parts)


def test_orthonormalization_by_hand() -> None:
    # Width 3, 4 sweeps: two blocks in the end, so half of the time 3 vectors are there. Two passes of two products.
    assert planner.krylov_flop(1000, 3, 4) == (2 * 2 * (2 * 3 * 3) + 8 * 9) * 1000 // 2


def test_layers_kept_dense_are_dequantized_once(tiny_file: TinyFile) -> None:
    plan = planned(tiny_file("plain"), 5, budget=AMPLE)
    parts = {part.what: part for part in planner.seconds(plan, Rates(), cached=0, free=1 << 40).parts}
    assert parts["svd"].dequantize == 0
    streaming = dataclasses.replace(plan, layers=tuple(dataclasses.replace(e, place="file") for e in plan.layers))
    streamed = {part.what: part for part in planner.seconds(streaming, Rates(), cached=0, free=1 << 40).parts}["svd"]
    assert parts["svd"].gemm == pytest.approx(streamed.gemm + plan.sweep.weights * 4 / 4e6)  # read from memory
    # Dequantized, and written to memory that is fresh from the system, 4 bytes each.
    assert parts["making layers ready"].total == pytest.approx(plan.sweep.weights * (1 / 1e6 + 4 / 8e6))


def test_layers_are_made_ready_once_for_all_prompts(tiny_file: TinyFile) -> None:
    """In a mixture, for each prompt, since each may use other experts."""
    for case, expected in (("gqa", 1), ("mixtral", 3)):
        plan = planned(tiny_file(case), 5, "ranks", rank=1, prompts=3, budget=AMPLE)
        counts = {part.what: part.count for part in planner.seconds(plan, Rates(), cached=0, free=1 << 40).parts}
        assert counts["making layers ready"] == expected
        assert (counts["trace"], counts["svd"]) == (3, 3 * ways.EXPECTED_SWEEPS)


def test_prompts_side_by_side_share_what_is_read_and_nothing_else(tiny_file: TinyFile) -> None:
    """Of a mixture they read the experts of all."""
    for case in ("gqa", "qwen3moe"):
        how: dict[str, Any] = {"rank": 1, "prompts": 6, "budget": planner.Budget(0)}
        one, three = (planned(tiny_file(case), 2, "ranks", **how, at_once=k) for k in (1, 3))
        times = [{part.what: part for part in planner.seconds(plan, Rates(), free=0).parts} for plan in (one, three)]
        for what, part in times[1].items():
            alone = times[0][what]
            assert (3 * part.count, part.gemm, part.writes) == (
                alone.count,
                pytest.approx(3 * alone.gemm),
                pytest.approx(3 * alone.writes),
            )
            assert (part.dequantize, part.disk) == (alone.dequantize, alone.disk) or case == "qwen3moe"
        weights = {"process", "tile"}
        assert three.ram == {part: size * (1 if part in weights else 3) for part, size in one.ram.items()}
        more = three.sweep.nbytes / one.sweep.nbytes
        assert more == 1 if case == "gqa" else 1 < more < 3


@pytest.mark.parametrize(("prompts", "expected", "fewer"), [(1, 1, 1), (6, 6, 4), (40, 16, 8)])
def test_as_many_prompts_are_side_by_side_as_are_useful_and_fit(
    prompts: int, expected: int, fewer: int, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not where several processes share the model, nor beside llama.cpp."""
    file, config = header(tiny_file("gqa"))
    few = {"prompts": prompts}
    assert planner.fitting(file, config, "predict", 5, "float32", few).work.at_once == 1, "nothing takes long"
    monkeypatch.setattr("ggjac.planner.plan.WORTH", 0.0)

    def made(command: str = "predict", ram: int = 1 << 40, **options: Any) -> planner.Plan:
        budget = planner.Budget(ram)
        return planner.fitting(file, config, command, 5, "float32", {"prompts": prompts}, budget=budget, **options)

    assert made().work.at_once == expected
    assert made("verify").work.at_once == made("jacobian").work.at_once == 1
    assert made(division=largest(config, file.tensors, 2)).work.at_once == 1
    room = planner.fitting(file, config, "predict", 5, "float32", few | {"at_once": fewer}).ram_needed
    assert made(ram=room).work.at_once == fewer
    assert not made(ram=1).fits
    monkeypatch.setattr("ggjac.planner.plan.READING", 1e3)
    assert made().work.at_once == 1, "products take longer"


def test_maps_of_single_blocks_take_turns(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory does not grow with the number of blocks; their time does."""
    monkeypatch.setattr(work, "EXACT_ROWS", 0)
    few, many = (planned(tiny_file("gqa", layers=n), 5, "layers", rank=16, maps=["blockwise"]) for n in (2, 6))
    assert few.ram["bases"] == many.ram["bases"] > 0
    assert few.work.width == many.work.width
    assert few.work.vectors == many.work.vectors
    spent = [{part.what: part for part in planner.seconds(plan, Rates(), free=0).parts} for plan in (few, many)]
    for what in ("layers: blockwise, svd", "layers: blockwise, stable rank"):
        assert spent[1][what].gemm == pytest.approx(3 * spent[0][what].gemm)


@pytest.mark.parametrize("case", ["gqa", "qwen3moe"])  # in a mixture, the width of a dense network is irrelevant
def test_dense_rows_come_in_chunks_as_the_jacobian_makes_them(
    case: str, monkeypatch: pytest.MonkeyPatch, tiny_file: TinyFile
) -> None:
    path, n = tiny_file(case), 5
    J = trace(path, n).jacobian()
    for nbytes in (1 << 30, 100_000):
        monkeypatch.setattr(work, "CHUNK_BYTES", nbytes)
        J.chunk_bytes = nbytes
        chunks = [stop - start for start, stop, _ in J.rows()]
        *rows, _ = planned(path, n, "jacobian").work.sweeps
        assert [step.vectors for step in rows for _ in range(step.count)] == chunks


# ---- refusals


def test_what_cannot_be_planned(tiny_file: TinyFile) -> None:
    path = tiny_file("gqa")
    for n in (0, 257):
        with pytest.raises(planner.PlanError, match=rf"a prompt of {n} tokens cannot run; .* from 1 to 256"):
            planned(path, n)
    with pytest.raises(planner.PlanError, match="rank=65 is out of range"):
        planned(path, 5, rank=65)
    with pytest.raises(planner.PlanError, match="'sing' is not planned; planned: analyze, svd"):
        planned(path, 5, "sing")
    with pytest.raises(planner.PlanError, match="position=-6 is out of range"):
        planned(path, 5, position=-6)
    with pytest.raises(planner.PlanError, match="dtype 'float8' is unknown"):
        planned(path, 5, dtype="float8")


def test_a_plan_is_a_table_in_a_notebook() -> None:
    model = open_model()
    plan = model.plan("The opposite of hot is", "svd", rank=4, ram_budget="2GiB")
    table = plan.table()
    assert table.columns["part"][0] == max(plan.ram, key=lambda part: plan.ram[part])
    assert set(table.columns["part"]) == {part for part, needed in plan.ram.items() if needed}
    assert table.notes[1:] == ("allowed: 2.0 GiB of memory", "it fits")
    assert str(table.columns["size"][0]) in plan._repr_html_()
    small = model.plan("The opposite of hot is", "svd", rank=4, ram_budget="1MiB")
    assert small.table().notes[-1] == small.misfit
