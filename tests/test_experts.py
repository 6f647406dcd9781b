"""Shares of experts against autograd over the independent float64 oracle, by a factor on what each expert adds."""

import json
import re
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from helpers import IDS, TOKENS, invoke, invoke_json
from readings import Expected, N, close, random, stream
from safetensors.torch import save_file
from torch import Tensor

from ggjac.analysis.branches import attribute_branches
from ggjac.analysis.experts import ExpertShares, attribute_experts
from ggjac.cli.components import NAMED, show_experts
from ggjac.jacobian import Span, Tap
from ggjac.model import open_model
from ggjac.report import write_report

# Shared experts with a gate and without, dense networks beside mixtures and before them, experts chosen by token ids,
# in groups, of a latent width, with biases, weighted before and after, and those that read the sum of others; norms
# after the mixture, after its parts and centred ones; several residual streams, parallel blocks.
CASES = (
    *("mixtral_top3", "qwen3moe", "qwen2moe", "olmoe", "granitemoe_shared", "gpt_oss", "glm4moe", "glm4moe_groups"),
    *("llama4", "llama4_several", "grovemoe", "grovemoe_threes", "arctic", "gemma4_experts", "cohere2moe", "phimoe"),
    *("deepseek4", "hy_v4", "glm5_next", "kimi_k3", "nemotron_h_moe", "minimax_01", "afmoe", "grok", "dbrx"),
    *("deepseek2", "bailingmoe2", "smallthinker", "lfm2moe"),
)


@pytest.mark.parametrize("case", CASES)
def test_experts_are_those_of_the_oracle(case: str, tiny_files: dict[str, Path]) -> None:
    model, expected = open_model(tiny_files[case], dtype="float64"), Expected(tiny_files[case], case)
    jacobian = model.trace(expected.ids).jacobian()
    found, alone = attribute_experts(jacobian, positions=range(N)), attribute_experts(jacobian, 5, 17, positions=[2])
    assert (found.positions, alone.positions, found.mlp.shape) == ([*range(N)], [2], (N, expected.layers))
    assert {mixture.block for mixture in found.mixtures} == {
        i for i in range(expected.layers) if f"blk.{i}.ffn_gate_inp.weight" in expected.known.weights
    }
    for shares, row, position in [(found, p, p) for p in range(N)] + [(alone, 0, 2)]:
        c, logit, _ = expected.direction(position, int(shares.targets[row]), shares.versus)
        close(shares.logits[row], logit)
        for layer in range(expected.layers):
            read = expected.reaching(c, "ffn", layer, position)
            check_block(shares, row, layer, expected.networks(layer, position, read))
    for shares in (found, alone):
        assert shares.unexplained.abs().max() < 1e-10


def check_block(shares: ExpertShares, row: int, layer: int, networks: dict[str, Tensor]) -> None:
    """Compare the shares of a block's networks at an output with known ones, of all experts."""
    of_kind = {"": shares.dense, "_shexp": shares.shared}
    for kind, own in of_kind.items():
        close(own[row, layer], float(networks.get(kind, torch.zeros(1)).sum()))
    for mixture in (mixture for mixture in shares.mixtures if mixture.block == layer):
        kind = {"expert": "_exps", "adjugate expert": "_chexps"}[mixture.kind]
        every = torch.zeros_like(networks[kind]).index_copy_(0, mixture.experts, mixture.shares[row])
        close(every, networks[kind])
        used = mixture.shares[row] != 0
        assert not (used & ~mixture.chosen[shares.positions[row]]).any()


@pytest.mark.parametrize("case", CASES)
def test_experts_along_a_direction_are_those_of_the_oracle(case: str, tiny_files: dict[str, Path]) -> None:
    """In the stream at the end and in the middle, and in what one mixture adds."""
    expected = Expected(tiny_files[case], case)
    trace = open_model(tiny_files[case], dtype="float64").trace(expected.ids)
    routed = [i for i in range(expected.layers) if f"blk.{i}.ffn_gate_inp.weight" in expected.known.weights]
    for kind, depth, position in (
        ("layer", expected.layers, 5),
        ("layer", routed[0] + 1, 2),
        ("mlp", routed[-1] + 1, 5),
    ):
        names = [name for i in range(depth) if (name := f"ffn_out-{i}") in expected.states]
        made = {name: expected.states[name].detach().clone().requires_grad_() for name in names}
        end = stream(expected.known, expected.states | made, depth) if kind == "layer" else made[f"ffn_out-{depth - 1}"]
        normed = kind == "layer" and depth == expected.layers and "output_norm.bias" in expected.known.weights
        end = oracle.final_norm(expected.known, end, frozen=True) if normed else end
        w = random(end.shape[1], depth)
        gradients = torch.autograd.grad(w @ end[position], [*made.values()], allow_unused=True)
        read = {name: g[position] for name, g in zip(names, gradients, strict=True) if g is not None}
        jacobian = trace.jacobian(position, Span(0, Tap(kind, depth)), raw=not normed)
        found = attribute_experts(jacobian, direction=w)
        close(found.logits, (w @ end[position])[None].detach())
        assert (found.targets, found.along.at, found.along.layer) == (None, "output" if normed else kind, depth)
        assert found.unexplained.abs().max() < 1e-10 * (1 + found.logits.abs().max())
        for i in range(depth):
            c = read.get(f"ffn_out-{i}", torch.zeros(trace.model.config.d, dtype=torch.float64))
            check_block(found, 0, i, expected.networks(i, position, c))
        if kind == "layer":
            branches = attribute_branches(jacobian, direction=w)
            for name in ("embedding", "attn", "mlp", "bias"):
                close(getattr(found, name), getattr(branches, name), 1e-12)
            assert bool(found.bias) == normed  # that of the norm
        else:
            assert not torch.cat([found.embedding, found.attn.flatten(), found.mlp[0, :-1], found.bias]).any()


@pytest.mark.parametrize("case", CASES)
def test_experts_sum_to_the_branch(case: str, tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files[case], dtype="float64")
    jacobian = model.trace(tiny.prompt(case, N)).jacobian()
    experts, branches = (split(jacobian, positions=[1, 3]) for split in (attribute_experts, attribute_branches))
    for name in ("targets", "logits", "embedding", "attn", "mlp", "bias"):
        close(getattr(experts, name), getattr(branches, name), 1e-12)


def test_the_command_names_the_tokens_that_chose(
    tiny_files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["attribute", "-m", tiny_files["qwen2moe"], *TOKENS, "--by", "expert"]
    data = invoke_json(*asked)["experts"]
    (entry,) = data["positions"]
    blocks = [
        sum(part["share"] for part in b["experts"]) + b["shared"] + b["dense"] + b["rest"] for b in entry["blocks"]
    ]
    assert blocks == pytest.approx([block["mlp"] for block in entry["blocks"]])
    total = entry["embedding"] + entry["bias"] + sum(block["attn"] + block["mlp"] for block in entry["blocks"])
    assert total == pytest.approx(entry["logit"])
    used = {(block["block"], part["expert"]) for block in entry["blocks"] for part in block["experts"]}
    assert {(one["block"], one["expert"]) for one in data["chosen_by"]} == used
    known, ids = oracle.load(tiny_files["qwen2moe"]), IDS
    states = oracle.forward(known, ids)
    for block in entry["blocks"]:
        b = f"blk.{block['block']}"
        h = oracle.branch_norm(known, b, "ffn_norm", states[f"ffn_inp-{block['block']}"], frozen=True)
        chosen, weights = oracle.routes(known, b, h)
        for one in (one for one in data["chosen_by"] if one["block"] == block["block"]):
            users = {
                p: float(weights[p, row.tolist().index(one["expert"])])
                for p, row in enumerate(chosen)
                if one["expert"] in row
            }
            assert {token["position"]: token["weight"] for token in one["tokens"]} == pytest.approx(users, rel=1e-4)
    several = attribute_experts(open_model(tiny_files["qwen2moe"]).trace(ids).jacobian(), positions=[1, 3]).data()
    for one in (*several["positions"], entry):  # each with the experts of its own position
        for block in one["blocks"]:
            b, at = f"blk.{block['block']}", one["position"]
            h = oracle.branch_norm(known, b, "ffn_norm", states[f"ffn_inp-{block['block']}"], frozen=True)
            chosen, weights = (part[at].tolist() for part in oracle.routes(known, b, h))
            found = {part["expert"]: part["weight"] for part in block["experts"]}
            assert found == pytest.approx(dict(zip(chosen, weights, strict=True)), rel=1e-4)
    shown = invoke(*asked, "--count", 30).stdout
    assert "shared expert" in shown
    assert "sum " in shown
    assert "Direct logit attribution" in shown
    few = next(one for one in data["chosen_by"] if len(one["tokens"]) > NAMED)
    first = sorted(few["tokens"], key=lambda token: token["weight"], reverse=True)[:NAMED]
    named = ", ".join(token["text"] for token in first)
    (row,) = [row for row in shown.splitlines() if f"L{few['block']} expert {few['expert']} " in row]
    assert row.endswith(f"{named} and {len(few['tokens']) - NAMED} more")
    shares = [entry["embedding"], entry["bias"]]
    for block in entry["blocks"]:
        shares += [block[name] for name in ("attn", "shared", "dense", "rest")]
        shares += [part["share"] for part in block["experts"]]
    capsys.readouterr()
    show_experts(data, 2)
    rest = sum(sorted(shares, key=abs)[:-2])
    assert re.search(rf"more: --count N or --all +{re.escape(f'{rest:+.4f}')}", capsys.readouterr().out)


@pytest.mark.parametrize(("case", "mixer"), [("lfm2moe", "convolution"), ("nemotron_h_moe", "state space")])
def test_what_mixes_positions_has_its_name(case: str, mixer: str, tiny_files: dict[str, Path], tmp_path: Path) -> None:
    asked = ["attribute", "-m", tiny_files[case], *TOKENS]
    experts = invoke_json(*asked, "--by", "expert")
    layers = invoke_json(*asked, "--by", "layer")["attribution"]["blocks"]
    found = [block.get("mixer") for block in experts["experts"]["positions"][0]["blocks"]]
    assert found == [block.get("mixer") for block in layers]
    i = found.index(mixer)
    assert f"L{i} {mixer} " in invoke(*asked, "--by", "expert", "--all").stdout
    assert f",{mixer}," in invoke(*asked, "--by", "expert", "--all", "--format", "csv").stdout
    (tmp_path / "it.json").write_text(json.dumps(experts), encoding="utf-8")
    assert f"L{i} {mixer}" in write_report(tmp_path / "it.json").read_text(encoding="utf-8")


def test_a_model_without_experts_is_refused(tiny_files: dict[str, Path]) -> None:
    for more in ([], ["--dry-run", "--no-bench"]):
        result = invoke("attribute", "-m", tiny_files["gqa"], *TOKENS, "--by", "expert", *more, code=2)
        assert "by=expert: this model has no experts; split its logits by layer or head" in result.stderr
    with pytest.raises(ValueError, match="this model has no experts"):
        attribute_experts(open_model(tiny_files["gqa"]).trace(tiny.prompt("gqa", N)).jacobian())


def test_the_command_splits_a_projection(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    path, w = tiny_files["deepseek2"], random(64)
    save_file({"w": w}, tmp_path / "probe.safetensors")
    asked = ["attribute", "-m", path, *TOKENS, "--direction", tmp_path / "probe.safetensors", "--by", "expert"]
    trace = open_model(path).trace(IDS)
    for at, layer in (("layer", 2), ("mlp", 2)):
        known = attribute_experts(trace.jacobian(span=Span(0, Tap(at, layer)), raw=True), direction=w)
        (entry,) = invoke_json(*asked, "--layer", layer, "--at", at)["experts"]["positions"]
        assert entry["projection"]["value"] == pytest.approx(float(known.logits[0]), rel=1e-5)
        shares = [one["share"] for block in entry["blocks"] for one in block["experts"]]
        assert shares == pytest.approx([float(s) for m in known.mixtures for s in m.shares[0]], rel=1e-4, abs=1e-6)
        assert known.tensors()["projections"].tolist() == known.logits.tolist()
        shown = invoke(*asked, "--layer", layer, "--at", at).stdout
        assert f"projection {entry['projection']['value']:.4f}" in shown
        assert "What a part adds" in shown
        assert "Direct logit attribution" not in shown
        table, place = known.table(), {"layer": "the stream after block 1", "mlp": "what the MLP of block 1 adds"}[at]
        assert f"the projection of {place} on" in table.title
        assert f"the projection of {place} on" in table.common["of"]
    for more, words in (
        (["--layer", 1], "no block up to there has experts; split the stream by layer"),
        (["--layer", 1, "--at", "mlp"], "that block has no experts; split what its MLP adds by token"),
        (["--layer", 2, "--at", "attn"], "what attn adds is one part by expert; split it by token, or by head"),
        (["--layer", 2, "--position", "0,1"], "does not go with several positions"),
    ):
        for plan in ([], ["--dry-run", "--no-bench"]):
            assert words in " ".join(invoke(*asked, *more, *plan, code=2).stderr.split())
    with pytest.raises(ValueError, match="no block up to there has experts"):
        attribute_experts(trace.jacobian(span=Span(0, Tap("layer", 1)), raw=True), direction=w)


def test_the_page_lists_experts(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    several, entropy = ["--position", "0,2"], ["--direction", "entropy"]
    for more, word in ([], "Chosen by"), (several, "Largest shares"), (entropy, "= projection"):
        asked = ["attribute", "-m", tiny_files["qwen3moe"], *TOKENS, "--by", "expert", *more]
        (tmp_path / "it.json").write_text(invoke(*asked, "--format", "json").stdout, encoding="utf-8")
        page = write_report(tmp_path / "it.json").read_text(encoding="utf-8")
        assert 'id="attribute-experts"' in page
        assert word in page


@pytest.mark.parametrize("position", [-1, "0,2"])
def test_the_plan_counts_what_is_read(position: object, tiny_files: dict[str, Path]) -> None:
    """As by layer: each network of an output is read once."""
    reads = []
    for split in (attribute_branches, attribute_experts):
        model = open_model(tiny_files["qwen3moe"])
        jacobian = model.trace(tiny.prompt("qwen3moe", N)).jacobian()
        model.weights.reads.clear()
        split(jacobian, 3, positions=position if isinstance(position, str) else [position])
        reads.append(dict(model.weights.reads))
    assert reads[0] == reads[1]
