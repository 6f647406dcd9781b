"""What heads read: the sum is the head's share, which other code computes, and the parts are autograd's."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from helpers import FIRST, distance, invoke, invoke_json

from ggjac.analysis.branches import attribute_branches
from ggjac.analysis.reads import attribute_reads, largest_heads
from ggjac.blocks import mixers
from ggjac.config import heads_of
from ggjac.jacobian import DetachedJacobian
from ggjac.model import open_model

TinyFile = Callable[..., Path]


def check(J: DetachedJacobian) -> None:
    """Compare every head's parts with its share and its pattern."""
    shares = attribute_branches(J, by_head=True)
    assert shares.heads is not None
    config = J.network.config
    heads = [head[:2] for layer in range(config.block_count) for head in heads_of(config, layer)]
    if not heads:
        return
    found = attribute_reads(J, heads)
    expected = torch.stack([shares.heads[0, layer, head] for layer, head in heads])
    size = found.shares.abs().sum(1).max()
    assert (found.totals - expected).abs().max() < 1e-11 * size
    assert found.unexplained.abs().max() < 1e-11 * size
    for k, (layer, head) in enumerate(heads):
        first = 0
        for mixer in J.network.tapes[layer].attn.mixers:
            if first <= head < first + mixer.heads and mixer.pattern is not None:
                row = mixer.pattern[head - first, J.position, : J.position + 1]
                assert (row - found.weights[k]).abs().max() < 1e-12
            first += mixer.heads


@pytest.mark.parametrize("case", [*FIRST.values(), "biases"])
def test_parts_sum_to_the_shares_of_heads(case: str, tiny_file: TinyFile) -> None:
    """Every family: values of an earlier block, several streams, recurrences, a compressed memory, norms of heads."""
    trace = open_model(tiny_file(case), dtype="float64").trace(tiny.prompt(case, 6))
    check(trace.jacobian(4))


@pytest.mark.parametrize("case", ["qwen3next", "rwkv6", "mamba2"])
def test_patterns_of_long_prompts_are_rebuilt(case: str, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks with a state there is no pattern on the tape; its row is the same."""
    model, ids = open_model(tiny_file(case), dtype="float64"), tiny.prompt(case, 30)
    heads = [head[:2] for layer in range(model.config.block_count) for head in heads_of(model.config, layer)]
    rows = []
    for chunk in (None, 8):
        monkeypatch.setattr(mixers, "scan_chunk", lambda n, key_size, chunk=chunk: chunk)
        J = model.trace(ids).jacobian()
        check(J)
        rows.append(attribute_reads(J, heads))
    assert distance(rows[0].weights, rows[1].weights) < 1e-12
    assert distance(rows[0].shares, rows[1].shares) < 1e-11


@pytest.mark.parametrize("case", ["gqa", "gemma2", "biases"])
def test_parts_are_those_of_an_independent_forward(case: str, tiny_file: TinyFile) -> None:
    """Pattern x value x output, from the oracle's own tensors: the last block, whose output the head reads last."""
    path, ids = tiny_file(case), tiny.prompt(case, 6)
    theirs, token = oracle.load(path), 7
    model = open_model(path, dtype="float64")
    layer = model.config.block_count - 1
    own = model.config.layers[layer]
    states = oracle.forward(theirs, ids)
    h = oracle.branch_norm(theirs, f"blk.{layer}", theirs.facts.attn_norm, states[f"l_out-{layer - 1}"], frozen=True)
    values = oracle.values(theirs, layer, h, frozen=True)  # [n, g, v]
    q, k = (oracle.turned(theirs, layer, part, h, len(ids)) for part in "qk")
    cap = model.config.attention_softcap
    found = attribute_reads(model.trace(ids).jacobian(), [(layer, i) for i in range(own.heads)], token)
    output = theirs.weights[f"blk.{layer}.attn_output.weight"]
    for i in range(own.heads):
        group = i // (own.heads // own.kv_heads)
        scores = own.attention_scale * k[:, group] @ q[-1, i]
        scores = cap * torch.tanh(scores / cap) if cap else scores
        distances = torch.arange(len(ids)).flip(0)
        p = scores.masked_fill(distances >= (own.window or len(ids)), -torch.inf).softmax(0)
        assert distance(found.weights[i], p) < 1e-12
        columns = output[:, i * own.value_size : (i + 1) * own.value_size]
        added = p[:, None] * values[:, group] @ columns.T  # [n, d]
        # What the last norm and the head make of it, along the residual stream: by autograd, every scale held.
        stream = states[f"l_out-{layer}"].detach()
        x = stream.clone().requires_grad_()
        logit = oracle.head(theirs, oracle.final_norm(theirs, x, frozen=True), capped=False)[-1, token]
        (read,) = torch.autograd.grad(logit, x)
        if theirs.facts.attn_post:
            attn = oracle.attention(theirs, layer, h, frozen=True, context=len(ids)).detach()
            after = oracle.branch_norm(theirs, f"blk.{layer}", theirs.facts.attn_post, attn, frozen=True)
            added = added * (after[-1] / attn[-1])  # a norm without bias is a diagonal
        assert distance(found.shares[i], added @ read[-1]) < 1e-10


def test_largest_heads_and_their_order(tiny_file: TinyFile) -> None:
    model = open_model(tiny_file("falcon_h1"), dtype="float64")
    J = model.trace(tiny.prompt("falcon_h1", 5)).jacobian()
    shares = attribute_branches(J, by_head=True)
    assert shares.heads is not None
    heads = largest_heads(model.config, shares.heads[0])
    assert len(heads) == 5
    assert largest_heads(model.config, -shares.heads[0]) == heads
    sizes = [float(shares.heads[0, layer, head].abs()) for layer, head in heads]
    assert sizes == sorted(sizes, reverse=True) == shares.heads[0].abs().flatten().topk(5).values.tolist()
    found = attribute_reads(J, [heads[3], heads[0], heads[3]])
    assert found.heads == [heads[3], heads[0]]
    assert found.totals.abs().tolist() == pytest.approx([sizes[3], sizes[0]])


@pytest.mark.parametrize(
    ("case", "heads", "message"),
    [
        ("gqa", [(2, 0)], "layer 2 is out of range: it must be at most 1"),
        ("gqa", [(0, 4)], r"head 4 is out of range: block 0 \(attention\) has heads 0 to 3"),
        ("lfm2", [(0, 0)], "block 0 has a convolution, and no heads; choose another layer"),
        ("gqa", [], "no head is named"),
    ],
)
def test_heads_that_there_are_not_are_refused(
    case: str, heads: list[tuple[int, int]], message: str, tiny_file: TinyFile
) -> None:
    J = open_model(tiny_file(case)).trace(tiny.prompt(case, 4)).jacobian()
    with pytest.raises(ValueError, match=message):
        attribute_reads(J, heads)


def test_differences_and_first_positions(tiny_file: TinyFile) -> None:
    model = open_model(tiny_file("biases"), dtype="float64")
    trace, heads = model.trace([5, 9, 3]), [(1, 0), (0, 2)]
    one, other, both = (attribute_reads(trace.jacobian(), heads, *given) for given in ((4, None), (8, None), (4, 8)))
    assert distance(both.shares, one.shares - other.shares) < 1e-12
    first = attribute_reads(trace.jacobian(0), heads)
    assert (first.shares.shape, first.weights.tolist()) == ((2, 1), [[1.0], [1.0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reads", "L1H1"], "--reads goes with --by head; give that too"),
        (["--by", "head", "--reads", "5"], "'5' are not heads; give some as L5H3,L7H1, or largest"),
        (["--by", "head", "--position", "all", "--reads", "largest"], "at one position of one prompt"),
        (["--by", "head", "--reads", "L1H9"], "head 9 is out of range"),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(options: list, message: str, tiny_file: TinyFile) -> None:
    result = invoke("attribute", "-m", tiny_file("gqa"), "--tokens", "3,4,5,6", *options, code=2)
    assert message in result.stderr


def test_the_command_names_the_same_heads(tiny_file: TinyFile) -> None:
    options = ["--tokens", "3,4,5,6", "--by", "head", "--reads", "L1H2,L0H1", "--target", "id:7", "--format", "json"]
    data = json.loads(invoke("attribute", "-m", tiny_file("gqa"), *options).stdout)
    reads = data["reads"]
    assert [(head["layer"], head["head"]) for head in reads["heads"]] == [(1, 2), (0, 1)]
    for head in reads["heads"]:
        assert head["share"] == pytest.approx(data["attribution"]["blocks"][head["layer"]]["heads"][head["head"]])
    assert reads["target"]["id"] == data["attribution"]["target"]["id"] == 7
    tables = invoke("attribute", "-m", tiny_file("gqa"), *options[:-1], "latex").stdout
    assert tables.count("begin{tabular}") == 2


def test_a_logit_before_its_soft_cap_is_called_one(tiny_file: TinyFile, tmp_path: Path) -> None:
    asked = ["attribute", "-m", tiny_file("gemma2"), "--tokens", "3,4,5", "--by", "head", "--reads", "L1H0"]
    data, source = invoke_json(*asked), tmp_path / "run.json"
    assert data["reads"]["softcap"] == data["attribution"]["softcap"] > 1
    assert re.search(r"What L1H0 reads, in the logit of .* before the soft cap", invoke(*asked).stdout)
    source.write_text(json.dumps(data), encoding="utf-8")
    invoke("report", source)
    html = source.with_suffix(".html").read_text(encoding="utf-8")
    (found,) = re.findall(r'<section id="attribute-reads".*?</section>', html, re.DOTALL)
    assert "before its soft cap" in found
