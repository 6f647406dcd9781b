"""A direction added to the stream or projected out of it, against the oracle with the same change, and llama.cpp."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import oracle
import pytest
import tiny
import torch
from helpers import distance, invoke, invoke_json
from pushing import apart, pushed_forward, stream
from torch import Tensor

from ggjac.analysis.intervene import Nudge, intervene
from ggjac.directions import Direction, read_direction
from ggjac.edits import Editor
from ggjac.llamacpp.control_vector import save_control_vector
from ggjac.model import PromptError, open_model
from ggjac.parity import run_llama_cpp

TinyFile = Callable[..., Path]

CASES = ["gqa", "biases", "gemma3", "gpt2", "falcon_7b", "qwen3moe", "mamba", "rwkv7", "lfm2"]
STREAMS = ["hy_v4", "deepseek4", "hrm_text", "kimi_k3", "talkie", "gemma3n"]


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def changed(known: oracle.Oracle, h: Tensor, method: str, v: Tensor, strength: float, where: list[int]) -> Tensor:
    """Return the stream changed along `v` `[w]` in every part of its width, written out part by part."""
    pushed, earlier = apart(known, h)
    found = pushed.clone()
    for i in where:
        for start in range(0, pushed.shape[1], len(v)):
            part = pushed[i, start : start + len(v)]
            out = v * float(v @ part) / float(v @ v)
            found[i, start : start + len(v)] = part + (strength * v if method == "add" else -strength * out)
    return torch.cat([found, earlier], 1)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("method", ["add", "remove"])
@pytest.mark.parametrize("case", CASES + STREAMS)
def test_generation_by_the_formula(case: str, method: str, layer: int, tiny_file: TinyFile) -> None:
    """Every logit and token against recomputing the changed text from its start; the last logits by the frozen map."""
    path, ids, count, strength = tiny_file(case), tiny.prompt(case, 5), 3, 0.7
    known, model = oracle.load(path), open_model(path, dtype="float64")
    v, context = drawn(model.config.d), len(ids) + count
    found = intervene(model, ids, v, method=method, layer=layer, strengths=[strength], max_tokens=count, random=0)
    (ours,) = found.edited
    assert (found.layer, found.positions, found.generated) == (layer, [1, 2, 3, 4], True)
    text = list(ids)
    for step in range(count):
        where = [*range(1, len(text))]
        logits = pushed_forward(
            known, text, layer, context, lambda h, where=where: changed(known, h, method, v, strength, where)
        )
        if step == 0:
            assert distance(ours.logits, logits) < 1e-10
        text.append(int(logits.argmax()))
    assert text[len(ids) :] == ours.ids

    h = stream(known, ids, layer, context)
    change = changed(known, h, method, v, strength, [1, 2, 3, 4]) - h
    assert ours.length == pytest.approx(float(apart(known, change)[0].norm(dim=1).max()), rel=1e-10)
    width = apart(known, h)[0].shape[1] // len(v)
    component = (apart(known, h)[0].unflatten(1, (width, -1)) @ v / v.norm()).mean(1)[1:]
    assert distance(found.component, component) < 1e-10
    assert torch.allclose(found.length, apart(known, h)[0].norm(dim=1)[1:])


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("case", ["gqa", "biases", "gpt2", "qwen3moe", "mamba", "hy_v4", "hrm_text", "talkie"])
def test_the_prediction_is_that_of_the_frozen_map(case: str, layer: int, tiny_file: TinyFile) -> None:
    path, ids = tiny_file(case), tiny.prompt(case, 5)
    known, model = oracle.load(path), open_model(path, dtype="float64")
    v, blocks = drawn(model.config.d), known.metadata["block_count"]
    layer = blocks if layer == 2 else layer
    (found,) = intervene(model, ids, v, method="add", layer=layer, strengths=[0.3], max_tokens=1, random=0).edited
    states = oracle.forward(known, ids)
    h = states[f"l_out-{layer - 1}"] if layer else states["x"]
    change = changed(known, h, "add", v, 0.3, [1, 2, 3, 4]) - h
    if layer < blocks:
        J = oracle.inner(known, states, layer, "layer", blocks, mlp_path="up").J
    else:
        x = h.detach().requires_grad_()
        y = oracle.final_norm(known, x, frozen=True)[-1]
        (J,) = torch.autograd.grad(y, x, torch.eye(len(y), dtype=torch.float64), is_grads_batched=True)
    y = states["result_norm"][-1]
    moved = torch.einsum("eni,ni->e", J, change)
    assert distance(found.predicted, oracle.head(known, y + moved)) < 1e-9
    after = changed(known, h, "add", v, 0.3, [1, 2, 3, 4])
    for i in range(layer, blocks):
        states |= oracle.block(known, i, after, states=states)
        after = states[f"l_out-{i}"]
    measured = oracle.final_norm(known, after, frozen=False)[-1] - y
    assert found.error == pytest.approx(float((moved - measured).norm() / measured.norm()), rel=1e-6)


@pytest.mark.parametrize("case", ["gqa", "biases", "gpt2", "hy_v4", "talkie"])
def test_singular_vectors_of_the_prompts_own_map(case: str, tiny_file: TinyFile) -> None:
    """Projected out where they write, and where they read, as dense float64 arithmetic has them."""
    path, ids = tiny_file(case), tiny.prompt(case, 5)
    known, model = oracle.load(path), open_model(path, dtype="float64")
    states = oracle.forward(known, ids)
    left = oracle.inner(known, states, 0, "layer", 1, raw=True)
    U, _, _ = torch.linalg.svd(left.J.flatten(1), full_matrices=False)
    found = intervene(model, ids, "left:2", layer=1, max_tokens=1, random=0, tol=1e-10)
    u = apart(known, U[:, 1][None])[0][0]
    assert found.positions == [4]
    assert distance(found.edited[0].logits, truth(known, ids, 1, u, 4)) < 1e-8
    assert distance(found.baseline.logits, truth(known, ids, 1, u, 4)) > 1e-4

    for layer in (0, 1):
        J = oracle.inner(known, states, layer, "layer", known.metadata["block_count"]).J
        _, _, Vh = torch.linalg.svd(J.flatten(1), full_matrices=False)
        rows = apart(known, Vh[0].unflatten(0, (len(ids), -1)))[0]
        heaviest = int(rows.square().sum(1).argmax())
        found = intervene(model, ids, "right:1", layer=layer, max_tokens=1, random=0, tol=1e-10)
        assert (found.positions, found.layer, found.generated) == ([heaviest], layer, False)
        assert distance(found.edited[0].logits, truth(known, ids, layer, rows[heaviest], heaviest)) < 1e-8
        two = intervene(model, ids, "right:1", layer=layer, max_tokens=1, random=0, positions="0,3")
        assert two.positions == [0, 3]


def truth(known: oracle.Oracle, ids: list[int], layer: int, v: Tensor, position: int) -> Tensor:
    return pushed_forward(known, ids, layer, 6, lambda h: changed(known, h, "remove", v, 1.0, [position]))


def test_an_added_singular_vector_is_as_long_as_the_stream(tiny_file: TinyFile) -> None:
    path, ids = tiny_file("gqa"), tiny.prompt("gqa", 5)
    model, known = open_model(path, dtype="float64"), oracle.load(path)
    found = intervene(model, ids, "left:1", method="add", layer=1, strengths=[0.5], max_tokens=1, random=0)
    length = float(stream(known, ids, 1, 6)[-1].norm())
    assert found.edited[0].length == pytest.approx(0.5 * length)
    assert 0 < found.data()["residual"] <= 1e-3
    assert intervene(model, ids, drawn(64), max_tokens=1, random=0).data()["residual"] is None


@pytest.mark.parametrize("method", ["add", "remove"])
def test_the_null_is_a_push_of_equal_length_along_random_directions(method: str, tiny_file: TinyFile) -> None:
    path, ids = tiny_file("gqa"), tiny.prompt("gqa", 5)
    model, known = open_model(path, dtype="float64"), oracle.load(path)
    v = drawn(64)

    def run(seed: int) -> list[float]:
        found = intervene(model, ids, v, method=method, layer=1, strengths=[0.7], max_tokens=1, random=3, seed=seed)
        assert found.edited[0].at_least == sum(kl >= found.edited[0].kl for kl in found.edited[0].null.kl)
        return found.edited[0].null.logit

    target = intervene(model, ids, v, max_tokens=1, random=0).target
    wanted = []
    for seed in (5, 6, 7):
        r = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

        def formula(h: Tensor, r: Tensor = r) -> Tensor:
            lengths = v.norm() if method == "add" else -(h @ v / v.norm())[:, None]
            pushed = h + 0.7 * lengths * r / r.norm()
            return torch.cat([h[:1], pushed[1:]])

        wanted.append(float(pushed_forward(known, ids, 1, 6, formula)[target]))
    assert run(5) == pytest.approx(wanted, rel=1e-9)
    assert run(5) == run(5)
    assert run(6)[:2] == run(5)[1:]


def test_a_random_change_keeps_nothing_of_the_stream(tiny_file: TinyFile) -> None:
    """Hundreds wait until all have run; no plan counts a stream for each."""
    model, ids, v = open_model(tiny_file("gqa"), dtype="float64"), tiny.prompt("gqa", 5), drawn(64)
    change = Nudge(model, "add", 1, v, [1, 2, 3, 4], len(ids), later=True).at(0.7, 5)
    Editor(model, ids, len(ids) - 1).outputs([change.edit(Editor(model, ids, len(ids) - 1))])
    assert [name for name, kept in vars(change).items() if isinstance(kept, Tensor)] == ["vectors"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["add", "remove"])
def test_without_strength_nothing_changes(method: str, dtype: str, tiny_file: TinyFile) -> None:
    model, ids = open_model(tiny_file("biases"), dtype=dtype), tiny.prompt("biases", 4)
    found = intervene(model, ids, drawn(64), method=method, strengths=[0.0, 1.0], max_tokens=3, random=1)
    same, other = found.edited
    assert torch.equal(same.logits, found.baseline.logits)
    assert torch.equal(found.baseline.logits, model.trace(ids, tapes=False).logits)
    assert (same.ids, same.kl, same.length, same.error) == (found.baseline.ids, 0.0, 0.0, None)
    assert same.null.kl == [0.0]
    assert other.kl > 0


@pytest.mark.parametrize("case", ["gqa", "gemma2", "gpt2", "mixtral", "lfm2", "mamba2"])
def test_llamacpp_with_the_control_vector_says_the_same(case: str, tiny_file: TinyFile, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path, ids, v = tiny_file(case, ftype="F32"), tiny.prompt(case, 5), drawn(64).float().double()
    blocks = tiny.options(case).blocks
    vector = tmp_path / "v.gguf"
    save_control_vector(vector, 0.5 * v, layer=2, block_count=blocks, architecture="llama")
    pushed = run_llama_cpp(path, ids, layers=False, threads=1, control_vector=vector).logits[-1]
    found = intervene(
        open_model(path), ids, v, method="add", layer=2, strengths=[0.5], max_tokens=1, first=True, random=0
    )
    assert distance(found.edited[0].logits, pushed) < 1e-3
    assert distance(found.baseline.logits, pushed) > 0.05


def test_a_prompt_of_one_token_and_other_positions(tiny_file: TinyFile) -> None:
    model, known = open_model(tiny_file("gqa"), dtype="float64"), oracle.load(tiny_file("gqa"))
    v = drawn(64)
    found = intervene(model, [7], v, layer=1, max_tokens=1, random=1)
    assert found.positions == [0]
    assert distance(found.edited[0].logits, truth(known, [7], 1, v, 0)) < 1e-10
    found = intervene(model, [7, 8, 9], v, layer=1, max_tokens=2, random=0, positions=[-2])
    assert (found.positions, found.generated) == ([1], False)
    assert distance(found.edited[0].logits, truth(known, [7, 8, 9], 1, v, 1)) < 1e-10
    assert intervene(model, [7, 8], v, max_tokens=1, random=0, target=3).target == 3
    steps: list[tuple[int, int]] = []
    intervene(model, [7, 8], v, strengths=[1.0, 2.0], max_tokens=2, random=3, progress=lambda _, *s: steps.append(s))
    assert steps == sorted(steps)
    assert {total for _, total in steps} == {steps[-1][0]} == {3 * 2 + 2 * 3}


def test_a_direction_of_a_file_is_taken_at_its_own_depth(tiny_file: TinyFile, tmp_path: Path) -> None:
    model, vector = open_model(tiny_file("gqa", layers=4), dtype="float64"), tmp_path / "v.gguf"
    save_control_vector(vector, drawn(64), layer=3, block_count=4, architecture="llama")
    one = read_direction(str(vector))
    ours, theirs = (
        intervene(model, [5, 6, 7], v, layer=layer, max_tokens=1, random=0)
        for v, layer in ((one, None), (one.vector, 3))
    )
    assert (ours.layer, ours.name, theirs.name) == (3, f"{vector}:direction.2", "direction")
    assert torch.equal(ours.edited[0].logits, theirs.edited[0].logits)
    assert intervene(model, [5, 6, 7], one, layer=1, max_tokens=1, random=0).layer == 1


def test_refusals(tiny_file: TinyFile) -> None:
    model, v = open_model(tiny_file("gqa")), drawn(64)
    for wrong, words in (
        ({"layer": 3}, "layer 3 is out of range for the stream; this model has 0 to 2"),
        ({"direction": "left:1", "layer": 0}, "layer 0 is out of range for a left singular vector of the map"),
        ({"direction": "right:1", "layer": 2}, "layer 2 is out of range for a right singular vector of the map"),
        ({"direction": "left:65"}, "left:65 is out of range; the map has 64 singular vectors"),
        ({"direction": "up:1"}, "direction 'up:1' is not a singular vector; write left:1, right:2"),
        ({"direction": "left:0"}, "is not a singular vector"),
        ({"direction": drawn(65)}, r"the direction has shape \[65\]; it must have 64 elements"),
        ({"direction": 0 * v}, "the direction, or its length squared, is zero or not finite"),
        ({"direction": v / 0}, "the direction, or its length squared, is zero or not finite"),
        ({"direction": Direction(drawn(2, 64))}, r"the direction has shape \[2, 64\]; it must have 64 elements"),
        ({"strengths": [float("nan")]}, "give a list of finite numbers"),
        ({"positions": "3"}, "position=3 is out of range"),
        ({"random": -1}, "random=?-?.* is out of range"),
        ({"max_tokens": 0}, "max_tokens 0 is out of range"),
    ):
        given = {"direction": v} | wrong
        with pytest.raises(ValueError, match=words):
            intervene(model, [1, 2, 3], **given)
    with pytest.raises(ValueError, match="method 'push' is unknown; known: add, remove"):
        intervene.__wrapped__(model, [1], v, method="push")
    with pytest.raises(ValueError, match=r"strengths 0\.5: give a list of finite numbers"):
        intervene.__wrapped__(model, [1], v, strengths=0.5)
    with pytest.raises(PromptError, match="the text would grow"):
        intervene(model, [1], v, max_tokens=model.config.context_length)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(tiny_file: TinyFile, tmp_path: Path) -> None:
    path, out, file = tiny_file("gqa"), tmp_path / "out.json", tmp_path / "v.npy"
    np.save(file, drawn(64).numpy())
    args = ["steer", "-q", "-t", 1, "-m", path, "--tokens", "5,6,7,8", "--method", "add", "--direction", file]
    args += ["--layer", 1, "--strength", "0,0.5", "--max-tokens", 3, "--random", 2, "-s", 4, "--target", "id:9"]
    content = invoke_json(*args, "--positions", "1-2", "-o", out)
    assert json.loads(out.read_text()) == content
    found = intervene(
        open_model(path), [5, 6, 7, 8], drawn(64), method="add", layer=1, strengths=[0.0, 0.5], max_tokens=3, random=2,
        seed=4, target=9, positions=[1, 2],
    )  # fmt: skip
    data = content["intervention"]
    assert (data["layer"], data["direction"], data["target"]["id"], data["generated"]) == (1, str(file), 9, False)
    assert [place["position"] for place in data["positions"]] == [1, 2]
    for ours, theirs in zip(data["edited"], found.edited, strict=True):
        assert [token["id"] for token in ours["tokens"]] == theirs.ids
        assert ours["kl"] == pytest.approx(theirs.kl, rel=1e-6)
        assert ours["predicted"]["logit"] == pytest.approx(float(theirs.predicted[9]), rel=1e-5)
        assert ours["random"]["logit"] == pytest.approx(theirs.null.logit, rel=1e-5)
    shown = " ".join(invoke(*args).stdout.split())
    assert "the stream after 1 of 2 blocks is changed here and at generated tokens" in shown
    assert "of 2 random directions of equal length change the next token at least as much" in shown
    head, *rows = invoke(*args, "--format", "csv").stdout.splitlines()
    assert head.startswith("method,direction,layer,mlp path,strength,change,logit,predicted logit,error,kl,random kl,")
    assert len(rows) == 3
    assert invoke(*args, "--format", "latex").stdout.count("\\\\\n") == 4


def test_defaults_of_the_command(tiny_file: TinyFile, tmp_path: Path) -> None:
    """Strength 1; a control vector's own depth, two thirds of the blocks, or the embeddings."""
    path, vector = tiny_file("gqa", layers=4), tmp_path / "v.gguf"
    save_control_vector(vector, drawn(64), layer=3, block_count=4, architecture="llama")
    args = ["steer", "-q", "-t", 1, "-m", path, "--tokens", "5,6,7,8", "--max-tokens", 1, "--random", 0]
    for direction, depth, where in ((vector, 3, [1, 2, 3]), ("left:1", 2, [3]), ("right:1", 0, None)):
        data = invoke_json(*args, "--method", "remove", "--direction", direction)["intervention"]
        assert data["layer"] == depth
        assert where is None or [place["position"] for place in data["positions"]] == where
        assert [row["strength"] for row in data["edited"]] == [1.0]
    data = invoke_json(*args, "--method", "remove", "--direction", vector, "--layer", 4, "--first")["intervention"]
    assert (data["layer"], len(data["positions"])) == (4, 4)


def test_plans_have_the_depth_of_a_control_vector_and_no_null_without_control(
    tiny_file: TinyFile, tmp_path: Path
) -> None:
    path, vector = tiny_file("gqa", layers=4), tmp_path / "v.gguf"
    save_control_vector(vector, drawn(64), layer=3, block_count=4, architecture="llama")
    common = ["-m", path, "--tokens", "5,6,7,8", "--direction", vector, "--dry-run", "--no-bench"]
    for command in (["steer", "--method", "add"], ["reach", "-k", 1]):
        plan = invoke_json(*command, *common)
        assert plan["sweeps"] == invoke_json(*command, *common, "--layer", 3)["sweeps"]
        assert plan["sweeps"] != invoke_json(*command, *common, "--layer", 2)["sweeps"]
    steer = ["steer", "--method", "add", *common]
    assert invoke_json(*steer, "--no-control")["sweeps"] == invoke_json(*steer, "--random", 0)["sweeps"]
    assert invoke_json(*steer)["sweeps"] != invoke_json(*steer, "--random", 0)["sweeps"]


@pytest.mark.parametrize("plan", [[], ["--dry-run", "--no-bench"]])
def test_usage(plan: list[str], tiny_file: TinyFile, tmp_path: Path) -> None:
    model = ["steer", "-q", "-t", 1, "-m", tiny_file("gqa"), "--tokens", "1,2,3"]
    (tmp_path / "text").write_text("no direction")
    cases = [
        (["--method", "add", "--direction", "left:1", "--layer", 3], "layer"),
        (["--method", "remove", "--direction", "right:1", "--layer", 2], "layer"),
        (["--method", "remove", "--direction", "left:1", "--layer", 0], "layer"),
        (["--method", "remove", "--direction", "left:1", "--max-tokens", 100000], "at most"),
        (["--layer", 0], "--layer 0 is out of range; this model has layers 1 to 2"),
    ]
    if not plan:
        cases += [
            (["--method", "add"], "--method add goes with --direction; give that too"),
            (["--method", "add", "--direction", "left:65"], "left:65 is out of range"),
            (
                ["--method", "add", "--direction", "left:1", "--positions", "3"],
                "--positions 3: the prompt has positions 0 to 2",
            ),
            (["--method", "add", "--direction", "absent"], "--direction: absent: no such file"),
            (["--method", "add", "--direction", tmp_path / "text"], "--direction: "),
        ]
    for wrong, words in cases:
        assert words in " ".join(invoke(*model, *wrong, *plan, code=2).stderr.split()), wrong


def test_the_demos_first_direction_is_causal() -> None:
    """Taken out of the embedding of ␣hot, what the map reads there most: no random direction does that."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    given = ["-p", "The opposite of hot is", "--method", "remove", "--direction", "right:1", "--max-tokens", 1]
    data = invoke_json("steer", "-q", "-t", 1, *given)["intervention"]
    assert [place["text"] for place in data["positions"]] == [" hot"]
    (row,) = data["edited"]
    assert row["random"]["at_least"] == 0
    assert row["logit"] < min(row["random"]["logit"])


def test_a_singular_vector_that_has_not_converged_is_named(tiny_file: TinyFile) -> None:
    """Bfloat16 is too coarse for the tolerance; a direction of a file has none to reach."""
    args = ["steer", "-q", "-t", 1, "-m", tiny_file("gqa"), "--tokens", "5,6,7", "--method", "remove"]
    args += ["--direction", "left:2", "--max-tokens", 1, "--random", 0]
    words = "NOT converged to 1e-03: left:2, or a vector before it, has a residual of "
    assert words in " ".join(invoke(*args, "--dtype", "bfloat16").stdout.split())
    assert "NOT converged" not in invoke(*args).stdout
