"""Scores split over pairs: against the recorded pattern, and autograd over an independent forward; and refusals."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import oracle
import oracle_delta
import oracle_rwkv
import oracle_state
import pytest
import tiny
import torch
from helpers import FIRST, distance, invoke
from torch import Tensor

from ggjac.analysis.attend import PatternFactors, ScoreShares, attend, loudest
from ggjac.analysis.branches import attribute_branches
from ggjac.config import Head, find_head, heads_of
from ggjac.config.mixers import MIXERS
from ggjac.model import Model, open_model
from ggjac.report import write_report

TinyFile = Callable[..., Path]
BY = ("block", "token")


def heads(model: Model) -> list[Head]:
    """Return one head of each kind of mixer, of the last block that has it: with keys of an earlier block too."""
    config = model.config
    every = [head for layer in range(config.block_count) for head in heads_of(config, layer, channels=True)]
    return list({head.kind: head for head in every}.values())


@pytest.mark.parametrize("case", [*FIRST.values(), "biases", "yarn", "fused_qkv", "llama4", "grok_betas"])
def test_pairs_and_constants_make_the_recorded_pattern(case: str, tiny_file: TinyFile) -> None:
    """Every family: the pairs sum to the score, and the softmax of scores and constants is what the trace recorded."""
    model = open_model(tiny_file(case), dtype="float64")
    trace = model.trace(tiny.prompt(case, 5))
    for head in heads(model):
        mixer = next(m for m in trace.tapes[head.layer].attn.mixers if m.kind == head.kind)
        # The last head, and the one before it, which has another place in its group.
        for by, position, own in (("block", -1, head.own), ("token", 2, max(0, head.own - 1))):
            keys, number = None if MIXERS[head.kind].recurrent else "all", head.number - head.own + own
            found = attend(trace.jacobian(position), head.layer, number, by=by, keys=keys)
            query = position % 5
            if isinstance(found, PatternFactors):
                if mixer.pattern is not None:
                    assert distance(found.entries, mixer.pattern[own, query, : query + 1]) < 1e-12
                if not any(name in head.kind for name in ("delta", "rwkv7")):  # these alone remove anything
                    assert found.removed.abs().max() < 1e-13
                continue
            assert found.unexplained.abs().max() < 1e-12 * found.pairs.abs().sum((1, 2)).max()
            weights = (found.scores + found.softcap + found.distance - found.normalizer).exp()
            seen = found.weights > 0
            assert distance(weights[seen], mixer.pattern[own, query, : query + 1][seen]) < 1e-12
            assert abs(found.weights.sum() + found.sink + found.groups - 1) < 1e-12


# The oracle's recurrences: gated, and with a decay for each channel of the key; state spaces; RWKV's.
RECURRENCES = {
    "qwen35": (oracle_delta, "delta_rule"),
    "kimi_linear": (oracle_delta, "delta_rule"),
    "mamba2": (oracle_state, "state_space"),
    "mamba": (oracle_state, "selective_scan"),
    "rwkv6": (oracle_rwkv, "wkv6"),
    "rwkv6qwen2": (oracle_rwkv, "wkv6"),
    "rwkv7": (oracle_rwkv, "wkv7"),
}


@pytest.mark.parametrize("case", RECURRENCES)
def test_factors_are_those_of_the_oracles_recurrence(
    case: str, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries from values that are one at one position alone, factors from what the oracle's recurrence is given."""
    model, known, p = open_model(tiny_file(case), dtype="float64"), oracle.load(tiny_file(case)), 4
    (last,) = [head for head in heads(model) if MIXERS[head.kind].recurrent]
    h, ids = max(0, last.own - 1), tiny.prompt(case, 6)  # the one before it, whose decay is not so fast
    found = attend(model.trace(ids).jacobian(p), last.layer, last.number - last.own + h)
    assert isinstance(found, PatternFactors)
    module, name = RECURRENCES[case]
    calls, run = list[tuple[Tensor, ...]](), getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: calls.append(given) or run(*given))
    oracle.forward(known, ids)
    given, each = calls[-1], torch.eye(6, dtype=torch.float64)  # of the last block that has it
    wide, own, before = each[:, None].expand(6, given[0].shape[1], 6), 0.0, False
    if name == "delta_rule":  # of one head
        q, k, _, decay, write = calls[h - last.own - 1]
        entries = run(q, k, each, decay, write)[p]
    elif name == "selective_scan":  # a channel has one value, no vector
        (_, dt, a, k, q), own = given, float(known.weights[f"blk.{last.layer}.ssm_d"][h])
        decay, write = (dt[:, h, None] * a[h]).exp(), dt[:, h]
        entries = torch.stack([run(v[:, None].expand_as(dt), *given[1:])[p, h] for v in each])
    elif name == "state_space":
        (_, dt, a, k, q), own = given, float(known.weights[f"blk.{last.layer}.ssm_d"].flatten()[h])
        q, k, decay, write = q[:, h], k[:, h], (dt[:, h] * a[h]).exp()[:, None], dt[:, h]
        entries = run(wide, *given[1:])[p, h]
    else:
        r, keys, _, fading, *rest = given
        q, k, decay, write = r[:, h], keys[:, h], fading[:, h], torch.ones(6, dtype=torch.float64)
        entries = run(r, keys, wide, fading, *rest)[p, h]
        before = name == "wkv6" and rest[0] is not None
        own = float((q[p] * rest[0][h] * k[p]).sum()) if before else 0.0
    if module is oracle_state:  # its recurrences leave out what passes by the state
        entries = entries + own * each[p]
    # Since it was written, a value has faded at each later position, up to the query or to the one before it.
    left = torch.stack([decay[s + 1 : p if before else p + 1].prod(0) for s in range(p + 1)])
    left[p] *= not before  # what is written there is read later
    product, kept = (q[p] * k[: p + 1]).sum(1), (q[p] * k[: p + 1] * left).sum(1)
    removed = (entries - own * each[p])[: p + 1] - write[: p + 1] * kept
    assert (name in ("delta_rule", "wkv7")) == bool(removed.abs().max() > 1e-3 * entries.abs().max())
    expected = {"entries": entries[: p + 1], "write": write[: p + 1], "product": product, "kept": kept}
    for part, value in expected.items():
        assert distance(getattr(found, part), value) < 1e-10, part
    assert float((found.removed - removed).abs().max()) < 1e-10 * float(entries.abs().max())
    assert found.own == pytest.approx(own, rel=1e-10)


# Normed queries and keys (each head, all, after the rotation), biases, fused and gated projections, windows, soft cap,
# ALiBi, sinks, partial rotation.
INDEPENDENT = ("gqa", "biases", "qwen3", "gemma3", "gemma2", "olmo2", "bloom", "gpt_oss", "phi2", "cohere2", "mpt")


@pytest.mark.parametrize(
    ("case", "by"),
    [
        *((case, by) for case in INDEPENDENT for by in BY),
        ("gemma4_small", "token"),  # keys of an earlier block; its blocks have inputs of their own, and a factor
    ],
)
def test_pairs_equal_autograd_of_an_independent_forward(
    case: str, by: str, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and keys differentiated by the embeddings or by the stream, with every norm's scale held."""
    path, ids = tiny_file(case), tiny.prompt(case, 6)
    model = open_model(path, dtype="float64")
    layer = model.config.block_count - 1
    own = model.config.layers[layer]
    found = attend(model.trace(ids).jacobian(), layer, own.heads - 1, by=by, keys="all")
    assert isinstance(found, ScoreShares)
    theirs, size = oracle.load(path), oracle.root_mean_square
    states = oracle.forward(theirs, ids)
    monkeypatch.setattr(oracle, "root_mean_square", lambda *given: size(*given).detach())

    def made(x: Tensor, part: str, at: int) -> Tensor:
        read = oracle.branch_norm(theirs, f"blk.{at}", theirs.facts.attn_norm, x, frozen=True)
        return oracle.turned(theirs, at, part, read, len(ids))

    def parts(part: str, at: int, head: int) -> Tensor:
        """Return what the queries or keys of a head have of each part, `[n, parts, s]`, the rest as the last one."""
        start = states["x"] if by == "token" else states[f"l_out-{at - 1}"]
        x = start.detach().clone().requires_grad_()
        h, passed = x, dict(states)
        for i in range(at) if by == "token" else []:
            passed |= oracle.block(theirs, i, h, freeze="up", states=passed | {"x": x})
            h = passed[f"l_out-{i}"]
        y = made(h, part, at)[:, head]  # [n, s]
        rows = torch.eye(y.numel(), dtype=torch.float64).reshape(-1, *y.shape)
        (J,) = torch.autograd.grad(y, x, rows, is_grads_batched=True)
        J = J.reshape(*y.shape, *x.shape)  # [n, s, n, d]
        if by == "token":
            each = torch.einsum("nsjd,jd->njs", J, x.detach())
        else:
            added = [states["x"]]
            for i in range(at):
                added += [states[f"attn_out-{i}"], states[f"ffn_out-{i}"]]
            stream = torch.stack(added)
            assert distance(stream.sum(0), x.detach()) < 1e-12
            each = torch.einsum("nsnd,pnd->nps", J, stream)
        return torch.cat([each, (y.detach() - each.sum(1))[:, None]], 1)

    source = layer if own.source is None else own.source
    group = (own.heads - 1) // (own.heads // model.config.layers[source].kv_heads)
    q, k = parts("q", layer, own.heads - 1)[-1], parts("k", source, group)
    expected = own.attention_scale * torch.einsum("ps,krs->kpr", q, k)
    assert found.pairs.shape == expected.shape
    assert distance(found.pairs, expected) < 1e-10


def test_a_score_may_be_subtracted(tiny_file: TinyFile) -> None:
    """As for what sets two keys apart: all of the split is linear in it."""
    J = open_model(tiny_file("bloom"), dtype="float64").trace(tiny.prompt("bloom", 6)).jacobian()
    every, apart = (attend(J, 1, 2, keys="0,3,4", versus=versus) for versus in (None, 3))
    assert isinstance(every, ScoreShares)
    assert isinstance(apart, ScoreShares)
    assert (every.keys, apart.keys) == ([0, 3, 4], [0, 4])
    for name in ("pairs", "scores", "distance"):
        whole = getattr(every, name)
        assert distance(getattr(apart, name), whole[[0, 2]] - whole[1]) < 1e-13, name
    weights = every.weights[[0, 4]].log() - every.weights[3].log()
    assert distance(apart.scores + apart.softcap + apart.distance, weights) < 1e-12
    for k, key in enumerate(every.data()["keys"]):
        assert key["query_shares"] == pytest.approx([float(row.sum()) for row in every.pairs[k]])
        assert key["key_shares"] == pytest.approx([float(row.sum()) for row in every.pairs[k].T])
        assert key["score"] == pytest.approx(sum(pair["share"] for pair in key["pairs"]) + key["others"])
        largest = key["pairs"][0]
        assert abs(largest["share"]) == float(every.pairs[k].abs().max())
        assert largest["share"] == float(every.pairs[k, largest["query"], largest["key"]])


def test_tokens_go_up_as_memory_allows(tiny_file: TinyFile) -> None:
    """With values of an earlier block, which each vector has for itself."""
    J = open_model(tiny_file("gemma4_small"), dtype="float64").trace(tiny.prompt("gemma4_small", 5)).jacobian()
    layer = J.network.config.block_count - 1
    together = attend(J, layer, 0, by="token", keys="all")
    J.chunk_bytes = 1
    steps: list[tuple[int, int]] = []
    alone = attend(J, layer, 0, by="token", keys="all", progress=lambda _, *step: steps.append(step))
    assert isinstance(together, ScoreShares)
    assert isinstance(alone, ScoreShares)
    assert distance(alone.pairs, together.pairs) < 1e-12
    assert [done for done, _ in steps] == [*range(1, steps[-1][1] + 1)]


def test_the_largest_keys_are_split_if_none_are_named(tiny_file: TinyFile) -> None:
    J = open_model(tiny_file("gqa"), dtype="float64").trace(tiny.prompt("gqa", 9)).jacobian()
    found = attend(J, 1, 0)
    assert isinstance(found, ScoreShares)
    assert found.keys == found.weights.argsort(descending=True)[:5].tolist()
    assert [part.name for part in found.query_parts] == ["embedding", "attn", "mlp", "biases"]
    first = attend(J, 0, 0)
    assert isinstance(first, ScoreShares)
    assert [part.name for part in first.query_parts] == ["embedding", "biases"]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("n", [1, 2])
def test_short_prompts(n: int, by: str, tiny_file: TinyFile) -> None:
    J = open_model(tiny_file("biases"), dtype="float64").trace([5, 9][:n]).jacobian(0)
    found = attend(J, 1, 3, by=by)
    assert isinstance(found, ScoreShares)
    assert (found.keys, found.weights.tolist()) == ([0], [1.0])
    assert abs(float(found.unexplained)) < 1e-13


def test_a_memory_with_all_of_the_weight_leaves_finite_scores(tiny_file: TinyFile) -> None:
    """In 16 bit its rounded weights may sum to more than 1."""
    trace = open_model(tiny_file("deepseek4"), dtype="bfloat16").trace(tiny.prompt("deepseek4", 12))
    (memory,) = [mixer.memory for mixer in trace.network.tapes[1].attn.mixers]
    memory.pattern[:, -1] = 1
    found = attend(trace.jacobian(), 1, 0, keys="all")
    assert isinstance(found, ScoreShares)
    assert math.isfinite(found.normalizer)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 3e-6), ("bfloat16", 0.05), ("float16", 6e-3)])
def test_narrower_dtypes_come_as_close_as_they_can(dtype: str, limit: float, tiny_file: TinyFile) -> None:
    ids = tiny.prompt("qwen3", 6)
    wide, narrow = (
        attend(open_model(tiny_file("qwen3"), dtype=one).trace(ids).jacobian(), 1, 1, keys="all", by="token")
        for one in ("float64", dtype)
    )
    assert isinstance(wide, ScoreShares)
    assert isinstance(narrow, ScoreShares)
    assert distance(narrow.pairs, wide.pairs) < limit
    assert float(narrow.unexplained.norm() / narrow.pairs.norm()) < limit


@pytest.mark.parametrize(
    ("case", "layer", "head", "message"),
    [
        ("gqa", 2, 0, r"layer 2 is out of range: it must be at most 1"),
        ("gqa", 0, 4, r"head 4 is out of range: block 0 \(attention\) has heads 0 to 3"),
        ("gqa", 0, -1, r"head -1 is out of range"),
        ("lfm2", 0, 0, r"block 0 has a convolution, and no heads; choose another layer"),
    ],
)
def test_heads_that_there_are_not_are_refused(
    case: str, layer: int, head: int, message: str, tiny_file: TinyFile
) -> None:
    with pytest.raises(ValueError, match=message):
        find_head(open_model(tiny_file(case)).config, layer, head)


def test_what_does_not_make_sense_is_refused(tiny_file: TinyFile) -> None:
    J = open_model(tiny_file("gqa")).trace(tiny.prompt("gqa", 5)).jacobian(3)
    for options, message in (
        ({"keys": "4"}, "key=4 is out of range; the query sees positions 0 to 3"),
        ({"keys": [1], "versus": 1}, "no key is left beside position 1"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(J, 0, 0, **options)


def test_the_head_with_the_largest_share_is_chosen(tiny_file: TinyFile) -> None:
    path = tiny_file("falcon_h1")
    model = open_model(path, dtype="float64")
    ids = tiny.prompt("falcon_h1", 6)
    heads = attribute_branches(model.trace(ids).jacobian(), by_head=True).heads
    assert heads is not None
    layer, head = divmod(int(heads[0].abs().argmax()), heads.shape[2])
    shares = attribute_branches(model.trace(ids).jacobian(), by_head=True)
    assert loudest(model.config, shares) == (layer, head)
    assert loudest(model.config, shares, layer=1 - layer)[0] == 1 - layer
    assert loudest(model.config, shares, head=1)[1] == 1
    with pytest.raises(ValueError, match="block 0 has no head 99 to choose"):
        loudest(model.config, shares, 0, 99)
    tokens = ",".join(map(str, ids))
    data = json.loads(invoke("attend", "-m", path, "--tokens", tokens, "--dtype", "float64", "--format", "json").stdout)
    assert (data["attend"]["layer"], data["attend"]["head"]) == (layer, head)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", 5], "--layer 5 is out of range; this model has blocks 0 to 1"),
        (["--layer", 1, "--head", 9], "head 9 is out of range"),
        (["--query", 7], "--query 7 is out of range"),
        (["--layer", 0, "--head", 0, "--key", 5], "--key 5 is out of range; the query sees positions 0 to 3"),
        (["--layer", 0, "--head", 0, "--query", 2, "--versus", 3], "--versus 3 is out of range"),
        (["--key", "1-"], "'1-' is not"),
    ],
)
def test_options_out_of_range_are_usage_errors(options: list, message: str, tiny_file: TinyFile) -> None:
    result = invoke("attend", "-m", tiny_file("gqa"), "--tokens", "3,4,5,6", *options, code=2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_recurrence_shows_its_factors(tiny_file: TinyFile, tmp_path: Path) -> None:
    asked = ["attend", "-m", tiny_file("mamba2"), "--tokens", "3,4,5,6", "--layer", 1, "--head", 2]
    (tmp_path / "it.json").write_text(invoke(*asked, "--format", "json").stdout, encoding="utf-8")
    assert "The pattern of L1H2 (state space)" in write_report(tmp_path / "it.json").read_text(encoding="utf-8")
    result = invoke(*asked)
    assert "entry = write x decay x (key · query)" in result.stdout
    assert "Pattern of L1H2 (state space) at position 3" in result.stdout


def test_parts_have_the_names_of_what_mixes_positions(tiny_file: TinyFile, tmp_path: Path) -> None:
    asked = ["attend", "-m", tiny_file("lfm2"), "--tokens", "3,4,5,6"]
    last = max(head.layer for head in heads(open_model(tiny_file("lfm2"))))
    result = invoke(*asked, "--layer", last, "--head", 0, "--format", "json").stdout
    parts = json.loads(result)["attend"]["key_parts"]
    first = next(part for part in parts if part["part"] == "attn")
    assert first == {"part": "attn", "block": 0, "mixer": "convolution"}
    shown = invoke(*asked, "--layer", last, "--head", 0, "--count", 10).stdout
    assert "L0 convolution" in shown
    assert "L0 attention" not in shown
    (tmp_path / "it.json").write_text(result, encoding="utf-8")
    assert "L0 convolution" in write_report(tmp_path / "it.json").read_text(encoding="utf-8")


def test_a_head_by_its_name_is_refused_with_the_two_options() -> None:
    found = invoke("attend", "--head", "L3H1", code=2).stderr
    assert "L3H1 is written --layer 3 --head 1" in " ".join(found.split())
