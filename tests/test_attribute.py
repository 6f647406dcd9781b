"""Shares of logits by token, branch and head against autograd over the independent float64 oracle; the command."""

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import scipy.stats
import tiny
import torch
from helpers import IDS, TOKENS, head_of, invoke, invoke_json, pair
from readings import Expected, N, close
from safetensors.torch import load_file
from torch import Tensor

from ggjac import session
from ggjac.analysis.attribute import attribute, attribute_positions, both_rules
from ggjac.analysis.branches import attribute_branches
from ggjac.blocks import FrozenBlock
from ggjac.model import PromptError, open_model

TinyFile = Callable[..., Path]

# Sequential and parallel blocks, post-norms, residual scales, LayerNorm with biases, learned positions, biases of every
# projection and of the head, grouped and single key heads, fused tensors, mixtures with shared experts, after blocks
# that are none, sinks, clamps, soft caps, windows, scaled logits and embeddings, recurrences and convolutions.
CASES = (
    *("gqa", "mqa", "biases", "one_layer", "head_dim_wide", "fused_biases"),
    *("gemma2", "olmo2", "granite", "phi2", "falcon_7b", "cohere2", "gpt2", "starcoder2", "glm4", "gemma3"),
    *("arctic", "mimo2"),
    *("gptneox", "stablelm_12b", "nemotron", "command_r", "olmo_clamped", "qwen2moe", "granitemoe", "gpt_oss"),
    *("glm4moe", "qwen35", "lfm2", "mamba", "jamba", "plamo2", "arwkv7_heads", "rwkv6", "mamba2"),
    *("granitehybrid", "falcon_h1"),
    *("nemotron_h_moe", "gemma4"),
    *("gemma4_experts", "gemma4_full_first", "gemma4_small", "gemma4_shared"),
    *("deepseek2", "deepseek2_unsplit", "minicpm3", "minimax_m3"),
    *("kimi_linear", "bailingmoe3_clamped", "minimax_01", "laguna", "llama4_several", "nanbeige", "hy_v4"),
    *("glm5_next", "kimi_k3", "hrm_text", "gemma3n", "deepseek4_yarn", "talkie"),
)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("versus", [None, 17])
def test_branches_and_heads_are_those_of_the_oracle(case: str, versus: int | None, tiny_files: dict[str, Path]) -> None:
    model, expected = open_model(tiny_files[case], dtype="float64"), Expected(tiny_files[case], case)
    jacobian = model.trace(expected.ids).jacobian()
    found = attribute_branches(jacobian, versus=versus, positions=range(N), by_head=True)
    alone = attribute_branches(model.trace(expected.ids).jacobian(2), 5, versus, by_head=True)
    assert (found.positions, alone.positions) == ([*range(N)], [2])
    assert found.heads.shape[:2] == (N, expected.layers)
    best = expected.uncapped(expected.states["result_norm"]).argmax(1)
    assert found.targets.tolist() == best.tolist()
    assert alone.targets.tolist() == [5]
    for shares, row, position in [(found, p, p) for p in range(N)] + [(alone, 0, 2)]:
        c, logit, constant = expected.direction(position, int(shares.targets[row]), versus)
        close(shares.logits[row], logit)
        close(shares.embedding[row], expected.reaching(c, "x", 0, position) @ expected.states["x"][position])
        close(shares.bias[row], constant + expected.held(c, position))
        for layer in range(expected.layers):
            attn, mlp = (expected.states[f"{kind}_out-{layer}"][position] for kind in ("attn", "ffn"))
            more = expected.states.get(f"per_layer_out-{layer}", 0 * expected.states["x"])[position]
            more = expected.reaching(c, "per_layer" if more.any() else "ffn", layer, position) @ more
            read = expected.reaching(c, "attn", layer, position)
            heads = expected.heads(layer, position, read)
            close(shares.attn[row, layer], float(read @ attn))
            close(shares.mlp[row, layer], float(expected.reaching(c, "ffn", layer, position) @ mlp + more))
            close(shares.heads[row, layer, : len(heads)], heads)
            assert not shares.heads[row, layer, len(heads) :].any()
            assert sum(count for _, count in shares.mixers[layer]) == len(heads)
            close(shares.attn_bias[row, layer], float(read @ attn - heads.sum()))
    for shares in (found, alone):
        # They make up the logit, and the heads the branch.
        close(shares.embedding + shares.attn.sum(1) + shares.mlp.sum(1) + shares.bias, shares.logits, 1e-12)
        close(shares.heads.sum(2) + shares.attn_bias, shares.attn, 1e-12)
        assert shares.unexplained.abs().max() < 1e-11


def test_branches_of_some_positions_are_those_of_all(case: str, tiny_files: dict[str, Path]) -> None:
    """Whose logits are not asked for, these positions are not read, and of the vocabulary's rows only the others'."""
    model = open_model(tiny_files[case], dtype="float64")
    jacobian = model.trace(tiny.prompt(case, N)).jacobian()
    for by_head in (False, True):
        whole, some = (attribute_branches(jacobian, positions=at, by_head=by_head) for at in ("all", [3, 1]))
        assert some.positions == [1, 3]
        for name in ("targets", "logits", "embedding", "attn", "mlp", "bias", "heads", "attn_bias"):
            if (expected := getattr(whole, name)) is not None:
                close(getattr(some, name), expected[[1, 3]], 1e-12)


def test_blocks_without_attention_are_named(tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files["nemotron_h"])
    (data,) = attribute_branches(model.trace(tiny.prompt("nemotron_h", N)).jacobian(), by_head=True).data()
    expected = [" and ".join(layer.mixers) or "none" for layer in model.config.layers]
    assert {"attention", "state space", "none"} == set(expected)
    assert [block.get("mixer", "attention") for block in data["blocks"]] == expected
    for block, layer in zip(data["blocks"], model.config.layers, strict=True):
        names = [f"{kind} head {i}" for kind in layer.mixers for i in range(len(block["heads"]))]
        assert block.get("head_names", names) == names


def test_without_heads_the_same(case: str, tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files[case], dtype="float64")
    jacobian = model.trace(tiny.prompt(case, N)).jacobian()
    whole, split = (attribute_branches(jacobian, positions=range(N), by_head=by_head) for by_head in (False, True))
    assert whole.heads is whole.attn_bias is None
    for name in ("logits", "embedding", "attn", "mlp", "bias"):
        close(getattr(whole, name), getattr(split, name), 1e-13)
    assert whole.unexplained.abs().max() < 1e-11


@pytest.mark.parametrize("versus", [None, 17])
def test_every_position_at_once_is_each_alone(case: str, versus: int | None, tiny_files: dict[str, Path]) -> None:
    model, expected = open_model(tiny_files[case], dtype="float64"), Expected(tiny_files[case], case)
    trace = model.trace(expected.ids)
    found = attribute_positions(trace.jacobian(), versus=versus)
    best = expected.uncapped(expected.states["result_norm"]).argmax(1)
    assert found.positions == [*range(N)]
    assert found.targets.tolist() == best.tolist()
    close(found.shares.sum(1) + found.offsets, found.logits, 1e-12)
    assert found.unexplained.abs().max() < 1e-11
    assert not found.shares.triu(1).any()
    some = attribute_positions(trace.jacobian(), versus=versus, positions=[3, -1, 0, 3])
    assert some.positions == [0, 3, N - 1]
    for name in ("targets", "logits", "shares", "offsets"):
        close(getattr(some, name), getattr(found, name)[some.positions])
    assert [entry["position"] for entry in some.data()] == some.positions
    for position in range(N):
        close(found.logits[position], expected.direction(position, int(best[position]), versus)[1])
        if best[position] == versus:  # of its own accord: nothing is asked for
            assert not found.shares[position].any()
            continue
        one = attribute(trace.jacobian(position), int(best[position]), versus)
        close(found.shares[position], one.shares)
        close(found.offsets[position], one.offset)


@pytest.mark.parametrize("case", ["gqa", "biases", "gpt2", "cohere2"])
@pytest.mark.parametrize("position", [-1, 2])
def test_the_difference_of_two_logits(case: str, position: int, tiny_files: dict[str, Path]) -> None:
    known, ids = oracle.load(tiny_files[case]), tiny.prompt(case, N)
    J = oracle.jacobian(known, ids, mlp_path="up", position=position)
    expected = Expected(tiny_files[case], case)
    model = open_model(tiny_files[case], dtype="float64")
    jacobian = model.trace(ids).jacobian(position)
    for target, versus in ((3, 17), (None, 4)):
        found = attribute(jacobian, target, versus)
        assert found.versus == versus
        z = expected.uncapped(J.y)
        assert found.target == (int(z.argmax()) if target is None else target)
        close(found.logit, float(z[found.target] - z[versus]))
        # The head without its bias is linear.
        nothing = expected.uncapped(torch.zeros_like(J.y))
        parts = expected.uncapped(torch.einsum("end,nd->ne", J.J, J.x)) - nothing
        close(found.shares, parts[:, found.target] - parts[:, versus])
        offset = expected.uncapped(J.offset)
        close(found.offset, float(offset[found.target] - offset[versus]))
        assert abs(found.unexplained) < 1e-11


@pytest.mark.parametrize("chunk_bytes", [1, 60_000])
def test_in_several_passes_the_same(chunk_bytes: int, tiny_files: dict[str, Path]) -> None:
    for case in ("gqa", "gpt2"):
        model = open_model(tiny_files[case], dtype="float64")
        jacobian = model.trace(tiny.prompt(case, N)).jacobian()
        whole = attribute_positions(jacobian)
        model.weights.reads.clear()
        jacobian.chunk_bytes = chunk_bytes
        found = attribute_positions(jacobian)
        assert model.weights.reads["blk.0.ffn_down.weight"] > model.config.d
        close(found.shares, whole.shares, 1e-13)
        close(found.offsets, whole.offsets, 1e-13)


def test_one_pass_over_the_live_weights(tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files["gqa"])
    jacobian, reads, steps = model.trace(tiny.prompt("gqa", N)).jacobian(), model.weights.reads, []
    d, ff = model.config.d, tiny.options("gqa").ff

    def seen(what: str, done: int, total: int) -> None:
        assert what == "block"
        steps.append((done, total))

    for by_head in (False, True):
        reads.clear()
        attribute_branches(jacobian, 3, positions=range(N), by_head=by_head, progress=seen)
        assert reads["blk.0.ffn_up.weight"] == ff
        assert reads["blk.1.ffn_down.weight"] == d
        assert reads["blk.0.attn_v.weight"] == d // 2
        assert reads["blk.0.attn_output.weight"] == (2 * d if by_head else d)
        assert not reads["blk.0.attn_q.weight"]
        assert reads["output.weight"] == 1  # one target, one row
    assert steps == [(1, 2), (2, 2)] * 2
    reads.clear()
    steps.clear()
    attribute_positions(jacobian, 3, 4, progress=seen)
    assert reads["blk.0.ffn_up.weight"] == 2 * ff  # shares and biases
    assert reads["output.weight"] == 2
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_outputs_of_a_long_prompt_take_no_later_positions(
    tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many outputs at a time as are worth another pass over the weights; each in its own place among them."""
    jacobian = open_model(tiny_files["gqa"], dtype="float64").trace(tiny.prompt("gqa", 40)).jacobian()
    shapes: list[list[int]] = []
    pulled = FrozenBlock.rmatmat

    def pull(self: FrozenBlock, H: Tensor, *rest: Any) -> Tensor:
        shapes.append([*H.shape[:2]])
        return pulled(self, H, *rest)

    monkeypatch.setattr(FrozenBlock, "rmatmat", pull)
    found = attribute_positions(jacobian, 3)
    assert shapes == [[16, 16]] * 2 + [[16, 32]] * 2 + [[8, 40]] * 2
    close(found.unexplained, torch.zeros(40), 1e-11)
    monkeypatch.setattr("ggjac.analysis.attribute.TOKENS_AT_ONCE", 40)
    close(found.shares, attribute_positions(jacobian, 3).shares, 1e-13)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"position=\[\]: give at least one; the prompt has positions 0 to 3"),
        ([0, 4], r"position=\[0, 4\]: 4 is out of range; the prompt has positions 0 to 3"),
        ([-5], r"position=\[-5\]: -5 is out of range"),
        (range(3, 10**12), "4 is out of range"),
        ("0,4", "position=0,4: 4 is out of range"),
        ("4", "position=4 is out of range; the prompt has positions 0 to 3"),
        ("-1-1", "position=-1-1: -1 comes after 1; write 1--1"),
        ("-1--3", "position=-1--3: -1 comes after -3; write -3--1"),
        ("2-1", "position=2-1: 2 comes after 1; write 1-2"),
        ("0-999999999999", "position=0-999999999999: 999999999999 is out of range; the prompt has positions 0 to 3"),
        ("0;1", "position=0;1: write numbers and ranges as 0,10-20,-1, or all"),
    ],
)
def test_positions_out_of_range(given: Any, message: str, tiny_files: dict[str, Path]) -> None:
    jacobian = open_model(tiny_files["gqa"]).trace(tiny.prompt("gqa", 4)).jacobian()
    with pytest.raises(ValueError, match=message):
        attribute_positions(jacobian, positions=given)
    with pytest.raises(ValueError, match=message):
        attribute_branches(jacobian, positions=given)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes(dtype: str, tiny_files: dict[str, Path]) -> None:
    ids = tiny.prompt("biases", N)
    exact, rounded = (open_model(tiny_files["biases"], dtype=dtype) for dtype in ("float64", dtype))
    wide = attribute_branches(exact.trace(ids).jacobian(), 3, positions=range(N), by_head=True)
    narrow = attribute_branches(rounded.trace(ids).jacobian(), 3, positions=range(N), by_head=True)
    eps = torch.finfo(getattr(torch, dtype)).eps
    for name in ("logits", "embedding", "attn", "mlp", "bias", "heads", "attn_bias"):
        assert getattr(narrow, name).dtype == torch.float64
        close(getattr(narrow, name), getattr(wide, name), 40 * eps)
    assert 0 < float(narrow.unexplained.abs().max()) < 40 * eps * float(wide.logits.abs().max() + 1)
    tokens = attribute_positions(rounded.trace(ids).jacobian(), 3)
    assert tokens.shares.dtype == tokens.offsets.dtype == torch.float64
    assert float(tokens.unexplained.abs().max()) < 40 * eps * float(wide.logits.abs().max() + 1)


def test_the_gate_rule_moves_shares_of_tokens_and_none_of_branches(tiny_files: dict[str, Path]) -> None:
    """What a branch adds is what it adds; where its own input came from is a matter of the rule."""
    model, ids = open_model(tiny_files["gqa"], dtype="float64"), tiny.prompt("gqa", N)
    up, gate = (model.trace(ids, mlp_path=rule).jacobian() for rule in ("up", "gate"))
    a, b = (attribute_branches(jacobian, positions=range(N), by_head=True) for jacobian in (up, gate))
    close(a.mlp, b.mlp, 1e-12)
    close(a.heads, b.heads, 1e-12)
    a, b = (attribute_positions(jacobian) for jacobian in (up, gate))
    assert not torch.allclose(a.shares, b.shares, atol=1e-3)
    assert math.isclose(float(a.shares[-1].sum()), float(b.shares[-1].sum()), rel_tol=1e-10)


# ---- shares of tokens against the dense Jacobian


@pytest.mark.parametrize("exclude", [[0], [0, 2]])
@pytest.mark.parametrize("case", ["gqa", "biases", "gemma4", "hy_v4"])
def test_excluded_positions_are_in_the_offset(case: str, exclude: list[int], tiny_files: dict[str, Path]) -> None:
    """At one position, and at all of them, of which the first may depend on nothing else."""
    model, expected = open_model(tiny_files[case], dtype="float64"), Expected(tiny_files[case], case)
    trace = model.trace(expected.ids)
    one, every = trace.jacobian(4, exclude=exclude), trace.jacobian(exclude=exclude)
    dense = oracle.jacobian(tiny_files[case], expected.ids, mlp_path="up", position=4)
    found, whole = attribute(one, 9), attribute(trace.jacobian(4), 9)
    w = head_of(expected.known.weights)[9] * model.head.scale
    shares = torch.einsum("e,end,nd->n", w, dense.J, dense.x)
    close(found.shares, shares.index_fill(0, torch.tensor(exclude), 0.0))
    close(torch.tensor([*found.excluded.values()], dtype=torch.float64), shares[exclude])
    close(found.offset, whole.offset + float(shares[exclude].sum()))
    assert abs(found.unexplained) < 1e-10
    assert [*found.excluded] == [row["position"] for row in found.data()["excluded"]] == exclude
    assert [row["position"] for row in found.data()["shares"]] == [i for i in range(N) if i not in exclude]
    assert "excluded" not in whole.data()
    rows, all_of_them = attribute_positions(every, 9), attribute_positions(trace.jacobian(), 9)
    assert not rows.shares[:, exclude].any()
    close(rows.offsets, all_of_them.offsets + all_of_them.shares[:, exclude].sum(1))
    close(rows.shares[4], found.shares)
    assert float(rows.unexplained.abs().max()) < 1e-10
    assert [row["position"] for row in rows.data()[3]["shares"]] == [i for i in range(4) if i not in exclude]
    assert rows.data()[0]["shares"] == []
    table = rows.table().columns
    assert [i for i, m in zip(table["position"], table["output"], strict=True) if m == 1] == [1, None]


@pytest.mark.parametrize("case", ["gqa", "biases", "tied"])
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
    with pytest.raises(ValueError, match=rf"^token id {target} is out of range; the vocabulary has ids 0 to 127$"):
        attribute(J, target)


# ---- the command


@pytest.mark.parametrize("by", ["layer", "head"])
@pytest.mark.parametrize("case", ["biases", "gemma2", "phi2", "gpt_oss"])
def test_the_command_prints_parts_that_sum_to_the_logit(
    by: str, case: str, tiny_file: TinyFile, tmp_path: Path
) -> None:
    model, known = tiny_file(case), oracle.load(tiny_file(case))
    options = ["--dtype", "float64", "--by", by, "--target", 7, "--versus", 9, "-o", tmp_path / "f"]
    data = invoke_json("attribute", "-m", model, *TOKENS, *options)["attribution"]
    logits = oracle.forward(known._replace(facts=known.facts._replace(final_cap=None)), IDS)["logits"][-1]
    assert (data["by"], data["target"]["id"], data["versus"]["id"]) == (by, 7, 9)
    assert abs(data["logit"] - float(logits[7] - logits[9])) < 1e-10
    parts = [data["embedding"], data["bias"], *(block["mlp"] for block in data["blocks"])]
    for block in data["blocks"]:
        if by == "head":
            assert abs(sum(block["heads"]) + block["attn_bias"] - block["attn"]) < 1e-10
            parts += [*block["heads"], block["attn_bias"]]
        else:
            assert "heads" not in block
            parts.append(block["attn"])
    assert abs(sum(parts) - data["logit"]) < 1e-10
    assert abs(data["unexplained"]) < 1e-10
    saved = load_file(tmp_path / "f")
    assert saved["mlp"].flatten().tolist() == [block["mlp"] for block in data["blocks"]]
    assert ("heads" in saved) == (by == "head")
    assert saved["ids"].tolist() == IDS

    out = invoke("attribute", "-m", model, *TOKENS, *options).stdout
    cap = " before the soft cap" if case == "gemma2" else ""
    assert f"in the logit of [7] minus that of [9]{cap}" in " ".join(out.split())
    line = next(line for line in out.split("\n") if line.startswith("sum "))
    assert line.split()[1:] == [f"{data['logit']:+.4f}", "logit", f"{data['logit']:.4f}"]


@pytest.mark.parametrize("by", ["token", "layer", "head"])
def test_the_command_at_every_position(by: str, tiny_file: TinyFile, tmp_path: Path) -> None:
    model, known = tiny_file("biases"), oracle.load(tiny_file("biases"))
    options = ["--position", "all", "--by", by, "--dtype", "float64", "-o", tmp_path / "f"]
    result = invoke_json("attribute", "-m", model, *TOKENS, *options)
    logits = oracle.forward(known, IDS)["logits"]
    assert result["position"] == "all"
    entries = result["attribution"]["positions"]
    assert [entry["target"]["id"] for entry in entries] == logits.argmax(1).tolist()
    assert all(abs(e["logit"] - float(z.max())) < 1e-10 for e, z in zip(entries, logits, strict=True))
    assert load_file(tmp_path / "f")["logits"].tolist() == [entry["logit"] for entry in entries]
    for position, entry in enumerate(entries):
        one = ["--position", position, "--by", by, "--dtype", "float64"]
        alone = invoke_json("attribute", "-m", model, *TOKENS, *one)["attribution"]
        assert alone["target"] == entry["target"]
        for key in ("embedding", "bias", "offset"):
            assert abs(alone.get(key, 0) - entry.get(key, 0)) < 1e-10
        if by == "token":
            found, expected = ([s["share"] for s in e["shares"]] for e in (entry, alone))
            assert len(found) == position + 1
            assert all(abs(a - b) < 1e-10 for a, b in zip(found, expected[: position + 1], strict=True))
    out = invoke("attribute", "-m", model, *TOKENS, *options).stdout
    assert "in a logit at each position" in out
    assert out.count(f"{entries[3]['logit']:.4f}") == 2  # itself, and the sum of the shares


@pytest.mark.parametrize("by", ["token", "layer", "head"])
def test_the_command_at_some_positions(by: str, tiny_file: TinyFile, tmp_path: Path) -> None:
    """Their entries are those of all positions; one in a list has the form of several, a number that of one."""
    command = ["attribute", "-m", tiny_file("biases"), *TOKENS, "--by", by, "--dtype", "float64"]
    every = invoke_json(*command, "--position", "all")["attribution"]["positions"]
    result = invoke_json(*command, "--position", "3,0-1", "-o", tmp_path / "f")
    assert result["position"] == [0, 1, 3]
    entries = result["attribution"]["positions"]
    same(entries, [every[i] for i in (0, 1, 3)])
    saved = load_file(tmp_path / "f")
    assert saved["positions"].tolist() == [0, 1, 3]
    assert saved["logits"].tolist() == [entry["logit"] for entry in entries]
    alone = invoke_json(*command, "--position", "-1,4")
    assert alone["position"] == [4]
    same(alone["attribution"]["positions"], every[4:])
    assert invoke_json(*command, "--position", "-1")["position"] == 4
    rows = list(csv.DictReader(invoke(*command, "--position", "3,0-1", "--format", "csv").stdout.splitlines()))
    assert [*dict.fromkeys(row["output"] for row in rows)] == ["0", "1", "3"]
    assert "in a logit at each position" in invoke(*command, "--position", "3,0-1").stdout


def same(found: Any, expected: Any) -> None:
    """Compare plain data, its numbers but for rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = [*found.values()], [*expected.values()]
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found == (pytest.approx(expected, abs=1e-10) if isinstance(expected, float) else expected)


def test_the_command_saves_one_position_too(tiny_file: TinyFile, tmp_path: Path) -> None:
    data = invoke_json("attribute", "-m", tiny_file("gqa"), *TOKENS, "-o", tmp_path / "f")["attribution"]
    saved = load_file(tmp_path / "f")
    assert saved["shares"].shape == (1, len(IDS))
    assert saved["shares"][0].tolist() == [share["share"] for share in data["shares"]]
    assert saved["targets"].tolist() == [data["target"]["id"]]
    assert saved["positions"].tolist() == [len(IDS) - 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--position", "every"], "'every' is not a list of positions; write numbers and ranges as 0,10-20,-1, or all"),
        (["--position", "9"], "--position 9 is out of range; the prompt has positions 0 to 4"),
        (["--position", "0,2-9"], "--position 0,2-9: 9 is out of range; the prompt has positions 0 to 4"),
        (["--position", "0,2-9", "--dry-run"], "--position 0,2-9: 9 is out of range; the prompt has positions 0 to 4"),
        (["--position", "-1-1"], "--position -1-1: -1 comes after 1; write 1--1"),
        (["--position", "0-999999999999"], "--position 0-999999999999: 999999999999 is out of range; the prompt has"),
        (["--position", f"0,{10**25}"], f"--position 0,{10**25}: {10**25} is out of range; the prompt has positions 0"),
        (["--position", f"-{2**63 + 1}"], f"--position -{2**63 + 1} is out of range; the prompt has positions 0 to 4"),
        (["--versus", "128"], "--versus: token id 128 is out of range"),
        (["--by", "neuron"], "neuron"),
        (["--exclude", "5"], "--exclude 5 is out of range; the output depends on positions 0 to 4"),
        (["--exclude", "0-4"], "--exclude 0-4 leaves the map no input: the output depends on positions 0 to 4 alone"),
        (["--exclude", "0-4", "--dry-run"], "--exclude 0-4 leaves the map no input"),
        (["--position", "0", "--exclude", "0"], "the output depends on position 0 alone; exclude fewer"),
        (["--exclude", "first"], "'first' is not a list of positions"),
    ],
)
def test_the_command_refuses(options: list[str], words: str, tiny_file: TinyFile) -> None:
    assert words in invoke("attribute", "-m", tiny_file("gqa"), *TOKENS, *options, code=2).stderr


@pytest.mark.parametrize("split", [attribute_positions, attribute_branches])
def test_each_target_of_a_list_is_checked(split: Callable[..., object], tiny_files: dict[str, Path]) -> None:
    J = open_model(tiny_files["gqa"]).trace(IDS).jacobian()
    with pytest.raises(PromptError, match="-1"):
        split(J, [3, -1], positions=[0, 1])


def test_both_rules_agree_as_scipy_says(tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files["gqa"], dtype="float64")
    up, gate = (attribute(model.trace(IDS, mlp_path=rule).jacobian(-2), 3) for rule in ("up", "gate"))
    found = both_rules(up, gate)
    a, b = (one.shares[:-1].numpy() for one in (up, gate))
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert found.difference == pytest.approx(abs(a - b).sum())
    assert found.size == pytest.approx((abs(a).sum() + abs(b).sum()) / 2)
    assert found.table().columns["gate"] == [*gate.shares.tolist(), gate.offset]
    rules = [model.trace(IDS, mlp_path=rule).jacobian(-2, exclude="0,2") for rule in ("up", "gate")]
    without = both_rules(*(attribute(J, 3) for J in rules))
    assert without.spearman == pytest.approx(scipy.stats.spearmanr(a[[1, 3]], b[[1, 3]]).statistic)
    assert without.table().columns["position"] == [1, 3, 4, None]
    # Shares that are equal have the same rank.
    tied = both_rules(replace(up, shares=up.shares.new_tensor([2, 1, 1, 1, 0])), gate)
    assert tied.spearman == pytest.approx(scipy.stats.spearmanr([2, 1, 1, 1], b).statistic)
    for wrong in ((gate, up), (up, up), (up, attribute(model.trace(IDS, mlp_path="gate").jacobian(), 3))):
        with pytest.raises(ValueError, match="give those of one logit under up and gate"):
            both_rules(*wrong)


def test_the_command_under_both_rules_is_each_alone(tiny_file: TinyFile, tmp_path: Path) -> None:
    given = "attribute", "-m", tiny_file("gqa"), *TOKENS, "--versus", 7
    up, gate = (invoke_json(*given, "--mlp-path", rule)["attribution"] for rule in ("up", "gate"))
    result = invoke_json(*given, "--mlp-path", "both", "-o", tmp_path / "both.safetensors")
    page = tmp_path / "both.json"
    page.write_text(json.dumps(result), encoding="utf-8")
    found = result["attribution"]
    assert result["mlp_path"] == "both"
    assert found.pop("agreement")["difference"] == pytest.approx(
        sum(abs(a["share"] - b["share"]) for a, b in zip(up["shares"], gate["shares"], strict=True))
    )
    assert found.pop("other_rule") == {name: value for name, value in gate.items() if name != "by"}
    assert found == up
    assert up["mlp_path"] == "up"
    assert up["shares"] != gate["shares"]
    saved = load_file(tmp_path / "both.safetensors")
    assert saved["gate_shares"][0].tolist() == [s["share"] for s in gate["shares"]]
    shown = invoke(*given, "--mlp-path", "both").stdout
    assert "mlp-path up" in shown
    assert "mlp-path gate" in shown
    assert "A share is not importance." in shown
    invoke("report", page, "--figures")
    source = page.with_suffix(".html").read_text(encoding="utf-8")
    for rule, one in (("up", up), ("gate", gate)):
        assert f">mlp-path {rule}</th>" in source
        assert f"mlp-path {rule}: sum of shares and offset" in source
        for share in one["shares"]:
            assert f'<td class="n">{share["share"]:+.4f}</td>'.replace("-", "−") in source
    assert {path.name for path in (tmp_path / "both-figures").glob("*.svg")} == {
        "attribute.svg",
        "attribute-other-rule.svg",
    }
    assert ", under --mlp-path up, the largest share" in source


@pytest.mark.parametrize("rule", ["up", "both"])
def test_the_difference_of_a_logit_and_itself_is_refused(rule: str) -> None:
    options = ["attribute", "-q", *TOKENS, "--mlp-path", rule]
    best = invoke_json("predict", "-q", *TOKENS)["predictions"][0]["id"]
    same = invoke(*options, "--target", "id:7", "--versus", "id:7", code=2).output
    assert "is the token of --target: the difference is 0; name another token" in same
    default = invoke(*options, "--versus", f"id:{best}", code=2).output
    assert "is the most likely token, whose logit is split: the difference is 0" in default
    assert "sum" in invoke(*options, "--target", "id:7", "--versus", "id:9").output


def test_the_ranks_of_one_token_have_no_correlation() -> None:
    options = ["attribute", "-q", "-t", 1, "--tokens", "5", "--mlp-path", "both"]
    assert invoke_json(*options)["attribution"]["agreement"]["spearman"] is None
    assert "Rank correlation of the rules of one token is not defined; their" in " ".join(
        invoke(*options).stdout.split()
    )


def test_the_seconds_of_both_rules_are_those_of_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0.0)
    monkeypatch.setattr(session, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    one, both = (invoke_json("attribute", "-q", *TOKENS, "--mlp-path", rule)["seconds"] for rule in ("up", "both"))
    assert both == {stage: 2 * seconds for stage, seconds in one.items()}


def test_the_number_of_parts_is_that_of_every_format(tiny_file: TinyFile) -> None:
    model = tiny_file("gqa")
    for by in ("token", "layer", "head"):
        given = "attribute", "-m", model, *TOKENS, "--by", by, "--count", 2
        data = invoke_json(*given)["attribution"]
        rows = list(csv.DictReader(io.StringIO(invoke(*given, "--format", "csv").stdout)))
        assert [row["part"] for row in rows[2:]] == ["others", "offset"][: len(rows) - 2]
        assert sum(float(row["share"]) for row in rows) == pytest.approx(data["logit"], abs=1e-4)
        if by == "token":
            shares = sorted((each["share"] for each in data["shares"]), key=abs, reverse=True)
            assert [float(row["share"]) for row in rows[:2]] == pytest.approx(shares[:2])
        assert {row["target id"] for row in rows} == {str(data["target"]["id"])}
        assert {float(row["logit"]) for row in rows} == {data["logit"]}
        assert "others & " in invoke(*given, "--format", "latex").stdout
        shown = invoke(*given).stdout.split("Share of every")[1]
        assert re.search(r"\d more: (--count N or )?--all", shown)


def test_warnings_are_not_lost_in_other_formats(tiny_file: TinyFile) -> None:
    given = "attribute", "-m", tiny_file("tokenizer"), "--tokens", "7,6,5"
    (warning,) = [line for line in invoke(*given).stdout.splitlines() if line.startswith("Warning: ")]
    result = invoke(*given, "--format", "csv")
    assert warning in result.stderr.splitlines()
    assert "Warning" not in result.stdout
    assert invoke(*given, "--format", "latex").stdout.splitlines()[0] == f"% {warning}"
