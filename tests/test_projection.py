"""Shares of projections on a direction, anywhere in the network, against autograd over the independent oracle."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny
import torch
from helpers import IDS, TOKENS, invoke, invoke_json
from readings import close, random, stream
from safetensors.torch import save_file
from torch import Tensor

from ggjac.analysis.attribute import attribute, both_rules
from ggjac.analysis.branches import attribute_branches
from ggjac.directions import Direction, DirectionError
from ggjac.gguf.hub import demo_path
from ggjac.jacobian import SharedSweep, Span, Tap
from ggjac.jacobian.targets import entropy_direction, fisher_direction
from ggjac.llamacpp.control_vector import save_control_vector
from ggjac.model import Trace, open_model
from ggjac.shares import Projection
from ggjac.studies import measure

# Sequential and parallel blocks, post-norms, scales of branches and of the stream, biases, mixtures, recurrences,
# shared values, latents, inputs of a block's own, norms past branches and between passes, several streams of all kinds.
CASES = (
    *("gqa", "biases", "gemma2", "granite", "gpt2", "falcon_7b", "cohere2", "gpt_oss", "nemotron_h", "falcon_h1"),
    *("rwkv6", "arwkv7_heads", "gemma4", "gemma4_small", "deepseek2", "nanbeige", "talkie", "minimax_01"),
    *("hy_v4", "glm5_next", "kimi_k3", "hrm_text", "gemma3n", "deepseek4_yarn"),
)
N = 6


def traced(path: Path, case: str, **options: str) -> tuple[Trace, oracle.Oracle]:
    return open_model(path, dtype="float64").trace(tiny.prompt(case, N), **options), oracle.load(path)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(("rule", "position"), [("up", -1), ("gate", 3)])
def test_tokens_have_the_shares_of_autograd(case: str, rule: str, position: int, tiny_files: dict[str, Path]) -> None:
    """At the stream, whatever its width, and at what either branch adds; the oracle's state is the value."""
    trace, known = traced(tiny_files[case], case, mlp_path=rule)
    x = trace.x.clone().requires_grad_()
    states = oracle.forward(known, trace.ids, freeze=rule, x=x)
    names = {"layer": "l_out", "attn": "attn_out", "mlp": "ffn_out"}
    blocks = oracle.blocks(known.metadata)
    for seed, (kind, depth) in enumerate([("layer", blocks), ("layer", 1), ("attn", blocks), ("mlp", blocks - 1)]):
        state = states[f"{names[kind]}-{depth - 1}"][position % N]
        w = random(len(state), seed)
        (gradient,) = torch.autograd.grad(w @ state, x, retain_graph=True)
        found = attribute(trace.jacobian(position, Span(0, Tap(kind, depth)), raw=True), direction=w)
        close(found.shares, (gradient * x).sum(1).detach())
        close(found.logit, (w @ state).detach())
        close(found.offset, (w @ state - (gradient * x).sum()).detach())
        assert abs(found.unexplained) <= 1e-10 * (1 + abs(found.logit))
        assert (found.target, found.along.at, found.along.layer) == (None, kind, depth)


def test_blocks_and_heads_have_the_shares_of_autograd(case: str, tiny_files: dict[str, Path]) -> None:
    trace, known = traced(tiny_files[case], case)
    states = oracle.forward(known, trace.ids, freeze="up")
    blocks = oracle.blocks(known.metadata)
    for position, depth in ((-1, blocks), (2, blocks - 1)):
        p = position % N
        floats = {name: state for name, state in states.items() if state.dtype.is_floating_point}
        made = {name: state.detach().clone().requires_grad_() for name, state in floats.items()}
        end = stream(known, states | made, depth)[p]
        close(end, states[f"l_out-{depth - 1}"][p].detach())
        w = random(len(end))
        jacobian = trace.jacobian(position, Span(0, Tap("layer", depth)), raw=True)
        found = attribute_branches(jacobian, direction=w, by_head=True)
        alone = attribute_branches(jacobian, direction=w)
        gradients = zip(made, torch.autograd.grad(w @ end, [*made.values()], allow_unused=True), strict=True)
        shares = {name: float((g[p] * floats[name][p]).sum()) for name, g in gradients if g is not None}
        close(found.logits[0], (w @ end).detach())
        close(found.embedding[0], shares.get("x", 0.0))
        close(found.attn[0], [shares.get(f"attn_out-{i}", 0.0) for i in range(depth)])
        close(
            found.mlp[0],
            [shares.get(f"ffn_out-{i}", 0.0) + shares.get(f"per_layer_out-{i}", 0.0) for i in range(depth)],
        )
        close(found.heads.sum(2) + found.attn_bias, found.attn, 1e-12)
        held = "hrm.z_l_init" in known.weights  # a constant that is added before the first block
        rest = (w @ end).detach() - found.embedding[0] - found.attn.sum() - found.mlp.sum()
        close(found.bias[0], rest if held else 0.0)
        for split in (found, alone):
            assert abs(float(split.unexplained[0])) <= 1e-10 * (1 + abs(float(split.logits[0])))
        for name in ("embedding", "attn", "mlp", "bias"):
            close(getattr(alone, name), getattr(found, name), 1e-13)


def test_heads_of_one_attention_branch(case: str, tiny_files: dict[str, Path]) -> None:
    """They are those of a logit's split of the block, which is compared with the oracle elsewhere, read otherwise."""
    trace, known = traced(tiny_files[case], case)
    states = oracle.forward(known, trace.ids)
    depth = oracle.blocks(known.metadata)
    added = states[f"attn_out-{depth - 1}"][-1]
    w = random(len(added))
    found = attribute_branches(trace.jacobian(span=Span(0, Tap("attn", depth)), raw=True), direction=w, by_head=True)
    close(found.logits[0], float(w @ added))
    close(found.heads[0, -1].sum() + found.attn_bias[0, -1], float(w @ added))
    nothing = torch.cat([found.embedding, found.attn[0, :-1], found.mlp[0], found.bias])
    assert not nothing.any()
    assert not found.heads[0, :-1].any()


@pytest.mark.parametrize("case", ["glm5_next", "kimi_k3", "hrm_text", "gemma3n", "deepseek4_yarn", "talkie"])
def test_a_direction_of_one_stream_reads_what_the_head_would_collect(case: str, tiny_files: dict[str, Path]) -> None:
    """Through the norm before the head, which only multiplies, shares of a logit-like quantity are in proportion."""
    trace, known = traced(tiny_files[case], case)
    x = trace.x.clone().requires_grad_()
    states, d = oracle.forward(known, trace.ids, freeze="up", x=x), trace.x.shape[1]
    u = random(d)
    weight = known.weights.get("output_norm.weight", torch.ones(d, dtype=torch.float64))
    for depth in (oracle.blocks(known.metadata), 1):
        state = states[f"l_out-{depth - 1}"][-1:]
        normed = u @ oracle.final_norm(known, state, frozen=True)[0]
        (gradient,) = torch.autograd.grad(normed, x, retain_graph=True)
        jacobian = trace.jacobian(span=Span(0, Tap("layer", depth)), raw=True)
        assert jacobian.out_shape[0] > d or depth == 1
        found = attribute(jacobian, direction=u * weight)
        expected = (gradient * x).sum(1).detach() / normed.detach()
        close(found.shares / found.logit, expected)
        if known.facts.streams in oracle.TWO:  # it collects the first alone
            close(found.logit, (u * weight) @ state[0, :d].detach())
        parts = attribute_branches(jacobian, direction=u * weight)
        close(parts.logits[0], found.logit)
        assert abs(float(parts.unexplained[0])) <= 1e-10 * (1 + abs(found.logit))


def test_at_the_output_a_row_of_the_head_is_the_logit(tiny_files: dict[str, Path]) -> None:
    for case in ("gqa", "gemma2", "phi2"):  # with a soft cap, and with a bias of the head
        trace, _ = traced(tiny_files[case], case)
        head, J = trace.model.head, trace.jacobian()
        logit, found = attribute(J, 7), attribute(J, direction=head.scale * head.matrix.take([7])[0])
        bias = 0.0 if head.bias is None else float(head.bias[7])
        close(found.shares, logit.shares, 1e-13)
        close(found.offset, logit.offset - bias, 1e-13)
        close(found.logit, logit.logit - bias, 1e-13)
        whole, split = (
            attribute_branches(J, 7, by_head=True),
            attribute_branches(J, direction=head.scale * head.matrix.take([7])[0], by_head=True),
        )
        close(split.heads, whole.heads, 1e-13)
        close(split.bias, whole.bias - bias, 1e-13)


@pytest.mark.parametrize("case", ["gqa", "gemma2", "gemma3n", "phi2"])
def test_the_entropy_is_followed_to_first_order(case: str, tiny_files: dict[str, Path]) -> None:
    """What is split is the gradient times the output; with the output moved by a little, the entropy moves by that."""
    trace, known = traced(tiny_files[case], case)
    y = oracle.forward(known, trace.ids)["result_norm"][-1].clone().requires_grad_()
    H = torch.distributions.Categorical(logits=oracle.head(known, y[None])[0]).entropy()
    (gradient,) = torch.autograd.grad(H, y)
    J = trace.jacobian()
    found = attribute(J, direction=entropy_direction(J))
    close(found.logit, (gradient @ y).detach())
    close(found.along.direction.facts["entropy"], H.detach(), 1e-12)
    close(found.shares.sum() + found.offset, found.logit, 1e-10)
    parts = attribute_branches(J, direction=entropy_direction(J))
    close(parts.logits[0], found.logit)
    assert abs(float(parts.unexplained[0])) < 1e-10


def test_a_fisher_direction_is_an_eigenvector(tiny_files: dict[str, Path]) -> None:
    trace, known = traced(tiny_files["gemma2"], "gemma2")
    y = oracle.forward(known, trace.ids)["result_norm"][-1]
    W = torch.func.jacrev(lambda y: oracle.head(known, y[None])[0])(y)
    p = oracle.head(known, y[None])[0].softmax(0)
    F = torch.einsum("v,vd,ve->de", p, W - p @ W, W - p @ W)
    J = trace.jacobian()
    for index in (1, 3):
        found = attribute(J, direction=fisher_direction(J, index))
        u, facts = found.along.direction.vector, found.along.direction.facts
        assert float((F @ u - facts["eigenvalue"] * u).norm()) < 1e-4 * facts["eigenvalue"]
        close(facts["eigenvalue"], float(torch.linalg.eigvalsh(F)[-index]), 1e-8)
        close(facts["all_eigenvalues"], float(F.trace()))
        assert float((F @ u - facts["eigenvalue"] * u).norm()) < 1.01 * facts["residual"] * facts["eigenvalue"] + 1e-12
        close(found.shares.sum() + found.offset, float(u @ y))


def test_both_rules_agree_in_the_sum(tiny_files: dict[str, Path]) -> None:
    w = random(64)
    span = Span(0, Tap("layer", 2))
    up, gate = (
        attribute(traced(tiny_files["gqa"], "gqa", mlp_path=rule)[0].jacobian(span=span, raw=True), direction=w)
        for rule in ("up", "gate")
    )
    found = both_rules(up, gate)
    close(float(up.shares.sum()), float(gate.shares.sum()))
    assert found.difference > 1e-3
    other = traced(tiny_files["gqa"], "gqa", mlp_path="gate")[0].jacobian(span=Span(0, Tap("layer", 1)), raw=True)
    with pytest.raises(ValueError, match="give those of one logit under up and gate"):
        both_rules(up, attribute(other, direction=w))


def test_results_say_what_is_projected_on_what(tiny_files: dict[str, Path]) -> None:
    trace, _ = traced(tiny_files["gqa"], "gqa")
    J = trace.jacobian(span=Span(0, Tap("layer", 2)), raw=True)
    one = Direction(random(64), "file", "folder/probe.safetensors", "w\x1b[3]")
    found, parts = attribute(J, direction=one), attribute_branches(J, direction=one)
    words = "the projection of the stream after block 1 on probe.safetensors:w\\x1b[3]"
    projection = found.data()["projection"]
    assert {"target", "versus", "logit"}.isdisjoint(found.data())
    assert projection["words"] == words
    assert (projection["value"], projection["at"], projection["layer"]) == (found.logit, "layer", 2)
    assert projection["direction"]["file"] == "folder/probe.safetensors"
    assert projection["direction"]["norm"] == pytest.approx(float(random(64).norm()))
    assert parts.data()[0]["projection"] == projection | {"value": float(parts.logits[0])}
    for result in (found, parts):
        assert result.table().title.startswith(f"Shares in {words}")
        assert result.sheet().to_csv().split("\n")[0].count("projection") == 1
        assert "logits" not in result.tensors()
        assert result.tensors()["direction"].tolist() == random(64).tolist()
        assert result.tensors()["projections"].tolist() == pytest.approx([found.logit])
        result.figure()
    given = Direction(random(64))
    for one, name in (
        (Projection(given, "output", 2), "the output on a direction"),
        (Projection(given, "attn", 2), "what block 1's attention adds on a direction"),
        (Projection(given, "mlp", 1), "what the MLP of block 0 adds on a direction"),
        (Projection(given._replace(kind="fisher", facts={"index": 3}), "output", 2),
         "the output on Fisher direction 3 of the next token"),
    ):  # fmt: skip
        assert one.name == f"the projection of {name}"


def test_what_does_not_fit_is_refused(tiny_files: dict[str, Path]) -> None:
    trace, _ = traced(tiny_files["gqa"], "gqa")
    J, inner = trace.jacobian(), trace.jacobian(span=Span(0, Tap("layer", 1)), raw=True)
    for direction, words in (
        (random(63), "has shape \\[63\\]; it must have 64 elements"),
        (Direction(random(64)[None]), "has shape \\[1, 64\\]"),
        (0 * random(64), "is zero or not finite in float64"),
    ):
        with pytest.raises(DirectionError, match=words):
            attribute(J, direction=direction)
    narrow = open_model(tiny_files["gqa"], dtype="float16").trace(trace.ids).jacobian()
    with pytest.raises(DirectionError, match="is zero or not finite in float16; give another one, or a wider dtype"):
        attribute(narrow, direction=1e6 * random(64))
    with pytest.raises(ValueError, match="a direction is given, and a token too"):
        attribute(J, 3, direction=random(64))
    with pytest.raises(ValueError, match="take a Jacobian that ends there"):
        entropy_direction(inner)
    with pytest.raises(ValueError, match="a direction is split at the Jacobian's own position, 5"):
        attribute_branches(J, direction=random(64), positions="all")
    for kind, by_head in (("mlp", True), ("mlp", False), ("attn", False)):
        with pytest.raises(ValueError, match=f"what {kind} adds is one part by .*; split it by token"):
            attribute_branches(
                trace.jacobian(span=Span(0, Tap(kind, 1)), raw=True), direction=random(64), by_head=by_head
            )
    with pytest.raises(ValueError, match="this Jacobian starts at depth 1"):
        attribute_branches(trace.jacobian(span=Span(1, Tap("layer", 2)), raw=True), direction=random(64))


def test_one_token_and_the_first_position(tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files["gqa"], dtype="float64")
    for ids, position in (([5], -1), ([5, 17, 3], 0)):
        J = model.trace(ids).jacobian(position, Span(0, Tap("attn", 2)), raw=True)
        found = attribute(J, direction=random(64))
        assert not found.shares[1:].any()
        close(found.shares[0] + found.offset, found.logit)


# ---- the command


def probe(tmp_path: Path, **tensors: Tensor) -> Path:
    save_file(tensors or {"w": random(64), "v": random(64, 1)}, tmp_path / "probe.safetensors")
    return tmp_path / "probe.safetensors"


def shares_of(*args: object) -> dict[str, Any]:
    return invoke_json("attribute", *TOKENS, *args)["attribution"]


def test_the_command_is_the_library(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    path, file = tiny_files["gqa"], probe(tmp_path)
    trace = open_model(path, dtype="float64").trace(IDS)
    found = shares_of("-m", path, "--dtype", "float64", "--direction", f"{file}:v", "--layer", "1", "--at", "mlp")
    known = attribute(trace.jacobian(span=Span(0, Tap("mlp", 1)), raw=True), direction=random(64, 1))
    close([one["share"] for one in found["shares"]], known.shares, 1e-12)
    assert found["projection"]["value"] == pytest.approx(known.logit)
    assert found["projection"]["direction"] == {
        "kind": "file",
        "file": str(file),
        "name": "v",
        "norm": pytest.approx(float(random(64, 1).norm())),
    }
    for by in ("layer", "head"):
        last = shares_of("-m", path, "--direction", f"{file}:v", "--layer", "-1", "--by", by)
        assert last["projection"]["layer"] == len(last["blocks"]) == trace.model.config.block_count
    both = shares_of("-m", path, "--direction", f"{file}:v", "--layer", "2", "--mlp-path", "both")
    assert both["other_rule"]["projection"]["value"] == pytest.approx(both["projection"]["value"], rel=1e-4)
    output = shares_of("-m", path, "--direction", f"{path}:output.weight[7]", "--at", "output")
    assert output["projection"]["value"] == pytest.approx(shares_of("-m", path, "--target", "id:7")["logit"], rel=1e-5)
    vector = tmp_path / "control.gguf"
    save_control_vector(vector, random(64), layer=2, block_count=2, architecture="llama")
    assert shares_of("-m", path, "--direction", vector)["projection"]["words"] == (
        "the projection of the stream after block 1 on control.gguf:direction.1"
    )


def test_excluded_positions_are_in_the_offset(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    given = ("-m", tiny_files["gqa"], "--dtype", "float64", "--direction", f"{probe(tmp_path)}:w", "--layer", "2")
    whole, folded = shares_of(*given), shares_of(*given, "--exclude", "0")
    assert folded["offset"] == pytest.approx(whole["offset"] + whole["shares"][0]["share"])
    assert [one["share"] for one in folded["shares"]] == pytest.approx([one["share"] for one in whole["shares"][1:]])


@pytest.mark.parametrize(("by", "at"), [("token", "layer"), ("token", "attn"), ("head", "layer"), ("layer", "layer")])
def test_the_plan_has_the_work(
    by: str, at: str, tiny_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file of three blocks, with a direction after the second: none of the third is read."""
    path = tiny_file("gqa", layers=3)
    given = ("-m", path, "--direction", f"{probe(tmp_path)}:w", "--layer", "2", "--at", at, "--by", by)
    plan = invoke_json("attribute", *TOKENS, *given, "--dry-run", "--no-bench")
    steps = [step for step in plan["sweeps"] if step["what"] != "reconstruction"]
    products: list[int] = []
    for side in ("up", "down"):
        true = getattr(SharedSweep, side)

        def product(self: SharedSweep, stacks: list, *rest: Any, true: Any = true) -> Any:
            if self.spans[0].tap.index == 2:
                products.append(sum(map(len, stacks)))
            return true(self, stacks, *rest)

        monkeypatch.setattr(SharedSweep, side, product)
    shares_of(*given)
    planned = [step["vectors"] for step in steps for _ in range(step["count"])]
    if by != "token":  # the pass that splits is no product
        planned.remove(1)
    assert sorted(products) == sorted(planned)


def test_a_study_projects_every_prompt(tiny_files: dict[str, Path]) -> None:
    ask = measure(open_model(tiny_files["gqa"]), "projection", along="entropy", by="layer")
    for ids in ([5, 17, 3], [7, 8]):
        record = ask(ids)["attribution"]
        assert record["projection"]["direction"]["kind"] == "entropy"
        assert abs(record["unexplained"]) < 1e-4 * (1 + abs(record["projection"]["value"]))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--direction", "PROBE:w"],
            "name the depth at which it is projected (--layer), in blocks applied; or --at output",
        ),
        (["--direction", "PROBE:w", "--layer", "3"], "--layer 3 is out of range; this model has layers 1 to 2"),
        (["--direction", "PROBE:w", "--layer", "0"], "--layer 0 is out of range"),
        (["--direction", "PROBE:w", "--layer", "1", "--at", "output"], "the output comes after all blocks"),
        (
            ["--direction", "PROBE:w", "--layer", "1", "--at", "mlp", "--by", "head"],
            "what mlp adds is one part by head",
        ),
        (["--direction", "entropy", "--layer", "1"], "entropy is a direction of the output, after all blocks"),
        (["--direction", "fisher:2", "--at", "attn"], "fisher:2 is a direction of the output"),
    ],
)
def test_usage(args: list[str], words: str, tiny_files: dict[str, Path], tmp_path: Path) -> None:
    file = str(probe(tmp_path))
    args = [arg.replace("PROBE", file) for arg in args]
    assert words in invoke("attribute", "-m", tiny_files["gqa"], *TOKENS, *args, code=2).stderr


def test_files_that_do_not_fit(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    file = probe(tmp_path, narrow=random(63), w=1e300 * random(64), long=1e30 * random(64))
    for name, words in (
        ("narrow", "has 63 elements, and the model's vectors there have 64"),
        ("absent", "no such tensor; there are 3: long [64], narrow [63], w [64]"),
        (
            "w",
            "its length squared, is zero or not finite in float32; give another one, or a wider dtype",
        ),
        ("long", "the direction, or its length squared, is zero or not finite in float32"),
    ):
        given = ("-m", tiny_files["gqa"], *TOKENS, "--direction", f"{file}:{name}", "--layer", 1)
        assert words in invoke("attribute", *given, code=2).stderr.replace(" (--dtype)", "")
    given = ("-m", tiny_files["gqa"], *TOKENS, "--direction", f"{tmp_path}/absent.npy")
    for more in (["--layer", 1], ["--layer", 1, "--mlp-path", "both"], [], ["--dry-run", "--no-bench"]):
        assert "--direction: " in (error := invoke("attribute", *given, *more, code=2).stderr)
        assert "no such file; name one" in error
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(20))
    for command in (["attribute", "--layer", 1], ["reach"], ["steer", "--method", "add"]):
        given = (*command, "-m", tiny_files["gqa"], *TOKENS, "--direction", tmp_path / "cut.gguf")
        assert invoke(*given, code=2).stderr.startswith(f"Error: --direction: {tmp_path}/cut.gguf: ")
    given = ("-m", tiny_files["gqa"], *TOKENS, "--direction", "fisher:65")
    assert "there are 1 to 64" in invoke("attribute", *given, code=2).stderr


def test_each_line_along_a_control_vector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the depth of the vector; another vector in the same file is another study."""
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("The cat\nA dog ran\n")
    model = open_model(demo_path())
    d, asked = model.config.d, ["attribute", "-t", 1, "-f", "p.txt", "--each-line", "-o", "all.jsonl"]
    for seed in (0, 1):
        vector = random(d, seed)
        save_control_vector(Path("v.gguf"), vector, layer=2, block_count=4, architecture="llama")
        ask = measure(model, "projection", along="v.gguf")
        assert ask.request()["layer"] == 2
        assert ask.options["along"] == str(tmp_path / "v.gguf")
        digest = hashlib.sha256(vector.float().double().numpy().tobytes()).hexdigest()
        assert ask.settings["along"] == f"sha256:{digest}"
        invoke(*asked, "--direction", "v.gguf", code=seed)
    first = json.loads(Path("all.jsonl").read_text().splitlines()[0])
    assert first["attribution"]["projection"]["layer"] == 2
    assert "no such file" in invoke(*asked, "--direction", "absent.npy", "--layer", 1, code=2).stderr
    with pytest.raises(DirectionError, match="no such file"):
        measure(model, "projection", along="absent.npy")
