"""Every architecture against llama.cpp and the paper's own code: strictly, quantized, and reading no more than it must.

(Against autograd every row of `tiny.CASES` is held in test_jacobian.py.)
"""

from collections.abc import Callable
from pathlib import Path

import families
import oracle
import pytest
import tiny
import torch
from helpers import FIRST, distance, lacking
from safetensors.torch import load_file

import ggjac
from ggjac.architectures import ARCHITECTURES
from ggjac.config import ConfigError
from ggjac.gguf import open_gguf
from ggjac.model import Model, open_model
from ggjac.parity import verify

pytestmark = pytest.mark.usefixtures("one_llama_cpp")
REFERENCES = {"llama3": "up", "mistral": "up", "qwen3": "up", "gemma3": "up", "phi3": "gate", "olmo2": "up"}
EXPERTS = [case for case in tiny.CASES if (o := tiny.options(case)).experts and o.dense_lead < o.blocks]


def test_every_architecture_has_its_rows() -> None:
    tables = {
        "ARCHITECTURES of ggjac/architectures.py": ARCHITECTURES,
        "FAMILIES of tests/families.py": families.FAMILIES,
        "FAMILY_CASES of tests/families.py": FIRST,
        "FACTS of tests/oracle.py": oracle.FACTS,
    }
    assert not lacking({where: set(table) for where, table in tables.items()})


@pytest.mark.parametrize("case", tiny.CASES)
def test_every_layer_agrees_with_llamacpp(case: str, tiny_file: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = open_model(tiny_file(case))
    result = verify(model, tiny.prompt(case, min(40, model.config.context_length)), strict=True, threads=1)
    assert result.verdict, result.reason
    gelu = model.config.row.activation == "gelu"
    assert result.tolerance == (1e-3 if gelu else 1e-5)
    assert ("half-precision" in (result.cause or "")) == gelu
    assert sum(layer.name.startswith("l_out-") for layer in result.layers) == tiny.options(case).working


@pytest.mark.parametrize("case", [*FIRST.values(), "mixtral", "mistral3_experts"])
def test_matrices_have_constant_factors_where_llamacpp_applies_them(case: str, tiny_file: Callable[..., Path]) -> None:
    """Attention's everywhere, others' where the row says so; elsewhere, it computes what no model meant.

    Of latent attention, and of some families', it applies the output projection's only, and nowhere that of a gate on
    the heads.
    """
    mixers, feed_forward = families.SCALED
    row = ARCHITECTURES[tiny.options(case).architecture]
    if row.mixer == "latent" or not row.qkv_scales:
        mixers = ("attn_output", "ssm_in", "ssm_out")
    if row.gated_heads or row.recurrent == "lightning":
        mixers = tuple(name for name in mixers if name != "attn_gate")
    plain = {"type": "F32", "types": {}, "layers": tiny.options(case).blocks, "predictors": 0}
    applied = row.output_scales and not (row.looped or row.streams == "held")
    applied = applied and (row.recurrent_scales or row.recurrent in ("", "convolution", "linear", "rwkv6", "rwkv7"))
    if row.mixer != "compressed":  # llama.cpp knows no factors of these matrices
        assert agrees(tiny_file(case, **plain, scales=mixers)) == applied
    assert agrees(tiny_file(case, **plain, scales=feed_forward)) == (row.ffn_scales or row.ffn.startswith("shifted"))


@pytest.mark.parametrize(
    ("case", "name"), [("plm", "attn_q"), ("deepseek2_lite", "attn_q"), ("mimo2", "attn_q"), ("qwen3next", "ssm_out")]
)
def test_some_matrices_of_some_families_have_no_factor(case: str, name: str, tiny_file: Callable[..., Path]) -> None:
    path = tiny_file(case, scales=(name,))
    assert not agrees(path)
    with pytest.raises(ConfigError, match=rf"tensor 'blk.0.{name}.scale' is not part of a \w+ model"):
        open_model(path)


@pytest.mark.parametrize("bias", ["attn_q", "attn_v", "attn_output", "ffn_up", "ffn_down"])
def test_a_factor_does_not_multiply_the_bias(bias: str, tiny_file: Callable[..., Path]) -> None:
    """In llama.cpp it does if the network is dense, which the model did not mean: such a file is refused."""
    path = tiny_file("mistral3_biases", biases=(bias,), scales=(bias,))
    if agrees(path):
        assert verify(open_model(path), tiny.prompt("mistral3"), strict=True, threads=1).verdict
    else:
        assert bias.startswith("ffn_")
        with pytest.raises(ConfigError, match=f"tensor 'blk.0.{bias}.scale' is not part of a mistral3 model"):
            open_model(path)


@pytest.mark.parametrize(
    ("case", "key", "value", "message"),
    [
        ("grok_betas", "rope.scaling.yarn_ext_factor", 0.5, r"yarn_ext_factor 0.5 is not supported, only 1"),
        ("mimo2", "attention.sliding_window_pattern", [0, 2, 1, 0], "must have one true or false for each of 4 blocks"),
        ("granite_swa", "attention.rope_pattern", [True, False], "must have one true or false for each of 4 blocks"),
        ("maple", "swiglu_clamp_exp", [-1.0] * 4, "contains -1.0; limits are not negative"),
        ("deci", "attention.head_count_kv", [3, 0, 1, 2], "4 heads cannot share 3 key/value heads evenly"),
        ("openelm", "attention.head_count_kv", [2, 0, 2], "head_count_kv.1. is 0; expected a whole number from 1"),
    ],
)
def test_options_that_do_not_make_sense_are_refused(
    case: str, key: str, value: object, message: str, tiny_file: Callable[..., Path]
) -> None:
    path = tiny_file(case, extra=dict(tiny.options(case).extra) | {key: value})
    with pytest.raises(ConfigError, match=message):
        open_model(path)


def test_the_head_may_have_a_factor(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp knows it only beside a quantized head, where it rounds; its own logits show that it is one of them."""
    llamacpp = pytest.importorskip("llamacpp", reason="llama-cpp-python is not installed")
    row = {"type": "NVFP4", "ff": 128}
    plain, path = tiny_file("qwen3", **row), tiny_file("qwen3", **row, scales=("output",))
    with open_gguf(path) as file:
        factor = float(file.rows("output.scale").view("<f4")[0, 0])
    ids, model = tiny.prompt("qwen3"), open_model(path, dtype="float64")
    theirs = llamacpp.run(path, ids)["logits"]
    assert distance(theirs, factor * llamacpp.run(plain, ids)["logits"]) < 1e-6
    exact = llamacpp.run(tiny.quantize(plain, tmp_path / "f32.gguf", "F32"), ids)["logits"]
    trace = model.trace(ids)
    assert distance(trace.all_logits(), factor * exact) < 5e-6
    assert abs(factor - 1) > 0.1
    assert verify(model, ids, strict=False, threads=1).verdict
    shares = ggjac.attribute(trace.jacobian(), target=7)
    assert abs(shares.shares.sum() + shares.offset - trace.logits[7]) < 1e-8


@pytest.mark.parametrize("case", [case for case in FIRST.values() if not tiny.options(case).tied])
def test_the_head_has_its_factor_where_llamacpp_applies_it(case: str, tiny_file: Callable[..., Path]) -> None:
    llamacpp = pytest.importorskip("llamacpp", reason="llama-cpp-python is not installed")
    row = ARCHITECTURES[tiny.options(case).architecture]
    scaled = tiny_file(case, types={"output.weight": "NVFP4"}, scales=("output",))
    plain = tiny_file(case, types={"output.weight": "NVFP4"}, scales=())
    theirs = [llamacpp.run(path, tiny.prompt(case, 3))["logits"] for path in (scaled, plain)]
    assert torch.equal(*theirs) != row.head_scale
    if row.head_scale:
        open_model(scaled)
    else:
        with pytest.raises(ConfigError, match=r"'output\.scale' is not part of a"):
            open_model(scaled)


def agrees(path: Path) -> bool:
    """Return whether llama.cpp's logits are the oracle's."""
    llamacpp = pytest.importorskip("llamacpp", reason="llama-cpp-python is not installed")
    ids = tiny.prompt({})
    ours = oracle.forward(oracle.load(path), ids, context=256, gelu="f16_table")["logits"]
    return distance(llamacpp.run(path, ids)["logits"], ours) < 3e-4


@pytest.mark.parametrize("length", [3, 4, 200])
def test_a_memory_agrees_with_llamacpp(length: int, tiny_file: Callable[..., Path]) -> None:
    """Before its first group is complete, from then on, and with a group of 128 tokens, which no other prompt has."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = open_model(tiny_file("deepseek4"))
    result = verify(model, [i * i % 128 for i in range(length)], strict=True, threads=1)
    assert result.verdict, result.reason


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_factors": True},
        {"scaling": {"type": "linear", "factor": 3.0}},
        {"scaling": tiny.YARN | {"factor": 3.0}, "rope_base": 8.0},
    ],
    ids=["plain", "factors", "linear", "yarn"],
)
def test_far_positions_agree_with_llamacpp(changes: dict, tiny_file: Callable[..., Path]) -> None:
    """Its float32 angles of these fast pairs are off by up to 1e-3 there; strictly, ours are the same."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    sizes = {"layers": 1, "heads": 1, "head_dim": 64, "rope_base": 2.0, "context": 1024}
    model = open_model(tiny_file("plain", **sizes | changes))
    result = verify(model, [i * i % 128 for i in range(700)], strict=True, threads=1)
    assert result.verdict, result.reason


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_papers_own_code_agrees(name: str, dtype: str, shared: Path) -> None:
    expected = load_file(shared / "reference" / f"{name}.reference.safetensors")
    model = open_model(shared / "reference" / f"{name}-q4_k_m.gguf", dtype=dtype)
    trace = model.trace(expected["ids"].tolist(), mlp_path=REFERENCES[name])
    assert distance(trace.x, expected["x"]) < 2e-6
    assert distance(trace.output, expected["y"]) < 2e-6
    assert distance(trace.all_logits(), expected["logits"]) < 2e-6
    assert distance(trace.jacobian().to_dense(), expected["jacobian"]) < 2e-6
    other = model.trace(expected["ids"].tolist(), mlp_path="gate" if REFERENCES[name] == "up" else "up")
    assert distance(other.jacobian().to_dense(), expected["jacobian"]) > 0.05  # the other rule, the same output
    assert distance(other.output, expected["y"]) < 2e-6


@pytest.mark.parametrize("architecture", FIRST)
def test_quantized_files(architecture: str, tiny_file: Callable[..., Path]) -> None:
    """Strictly they agree; as they are, they pass the margin rule or are reported as outside it, with the cause."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    case = FIRST[architecture]
    model = open_model(tiny_file(case, ftype="Q4_K_M"))
    assert len({info.type.name for info in model.gguf.tensors.values()}) > 1
    ids = tiny.prompt(case, 24)
    strict = verify(model, ids, strict=True, threads=1)
    assert strict.verdict, strict.reason
    as_is = verify(model, ids, threads=1)
    assert as_is.tolerance is None
    assert "8 bit" in (as_is.cause or "")
    if not as_is.verdict:
        assert as_is.rank > 2 or as_is.gap > 0.25
        assert "llama.cpp's top token has rank" in as_is.reason


def experts_used(case: str, model: Model) -> dict[int, int]:
    """Return how many experts a token uses in each block that has a router."""
    o, tensors = tiny.options(case), model.gguf.tensors
    blocks = [i for i in range(o.blocks) if f"blk.{i}.ffn_gate_inp.weight" in tensors]
    stated = o.extra.get("expert_used_count", [o.experts_used] * o.layers)
    return {i: stated[i] for i in blocks}


@pytest.mark.parametrize("case", EXPERTS)
def test_only_routed_experts_are_read(case: str, tiny_files: dict[str, Path]) -> None:
    """One token uses `experts_used` of the experts, and so many rows are read: in the trace and in every sweep."""
    o = tiny.options(case)
    model = open_model(tiny_files[case])
    reads, shapes = model.weights.reads, {name: info.shape for name, info in model.gguf.tensors.items()}
    used = experts_used(case, model)
    stacks = [name for name in shapes if name.endswith("_exps.weight") and len(shapes[name]) == 3]
    stacks = [name for name in stacks if int(name.split(".")[1]) in used]
    assert len(stacks) == (3 - o.fused_experts - (o.ffn == "plain")) * len(used)

    def share(name: str) -> int:
        return used[int(name.split(".")[1])] * shapes[name][1]

    J = model.trace(tiny.prompt(case, 1)).jacobian()
    # Where `up` is clamped, or its activation frozen, is recorded from `up` itself.
    always = model.config.row.activation == "silu_oai" or model.config.situ[1] > 0 or o.ffn == "plain"
    # What a norm of the experts' sum freezes is recorded from that.
    normed = {name.split(".")[1] for name in shapes if name.endswith("ffn_routed_norm.weight")}
    for name in stacks:
        layer = name.split(".")[1]
        twice = always or model.config.layers[int(layer)].clamp("_exps") > 0
        more = (twice and "ffn_up" in name) + (layer in normed and "ffn_gate" not in name)
        assert reads[name] == share(name) * (1 + more)
    for sweep in (lambda: J.matmat(J.x[None]), lambda: J.rmatmat(J.output[None].expand(5, -1))):
        reads.clear()
        sweep()
        for name in stacks:
            halves = {"ffn_gate_exps": 0, "ffn_gate_up_exps": 0.5}  # of a fused stack, the gates are not read
            assert reads[name] == halves.get(name.split(".")[2], 1) * share(name)


@pytest.mark.parametrize("case", EXPERTS)
def test_an_expert_is_read_once_for_all_its_tokens(case: str, tiny_files: dict[str, Path]) -> None:
    o = tiny.options(case)
    model = open_model(tiny_files[case])
    J = model.trace(tiny.prompt(case, 12)).jacobian()
    model.weights.reads.clear()
    J.matmat(J.x[None])
    used = experts_used(case, model)
    block = next(iter(used))
    first = f"blk.{block}.ffn_{'gate_' * o.fused_experts}up_exps.weight"
    experts, width, _ = model.gguf.tensors[first].shape
    width //= 1 + o.fused_experts
    # In the last block only the last token counts.
    least = used[block] * width
    assert least <= model.weights.reads[first] <= experts * width
