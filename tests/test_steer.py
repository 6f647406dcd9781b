"""Steering against the formulas in dense float64 arithmetic on the oracle; its control, its measures, its command."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import oracle
import pytest
import tiny
import torch
from helpers import distance, invoke, invoke_json
from pushing import apart, pushed_forward, stream
from torch import Tensor

from ggjac.analysis.steer import Images, Steering, additive, default_layer, random_rotation, steer
from ggjac.cli.options import STEER_CONTROL
from ggjac.gguf.hub import demo_path
from ggjac.jacobian import Span, Tap
from ggjac.model import PromptError, open_model

TinyFile = Callable[..., Path]


class Dense(NamedTuple):
    """A concept's map, dense: blocks `[T, d, d]`, and what biases contribute `[d]`."""

    J: Tensor
    offset: Tensor


def dense(known: oracle.Oracle, concept: list[int], layer: int, context: int, *, mlp_path: str, normed: bool) -> Dense:
    """Differentiate the frozen stream after `layer` blocks, through the final norm if `normed`, by autograd."""
    x = oracle.embed(known, concept).detach().requires_grad_()
    y = oracle.forward(known, concept, freeze=mlp_path, x=x, context=context)[f"l_out-{layer - 1}"]
    y = (oracle.final_norm(known, y, frozen=True) if normed else apart(known, y)[0])[-1]
    (J,) = torch.autograd.grad(y, x, torch.eye(len(y), dtype=torch.float64), is_grads_batched=True)
    return Dense(J.transpose(0, 1), (y - torch.einsum("end,nd->e", J, x)).detach())


def matrix(map: Callable[[Tensor], Tensor], d: int) -> Tensor:
    return map(torch.eye(d, dtype=torch.float64)).T


def cumulative(known: oracle.Oracle, ids: list[int], J: Tensor, offset: Tensor) -> Tensor:
    """Return `c_i`, written out as a double loop."""
    x, period = oracle.embed(known, ids), len(J)
    return torch.stack([offset + sum(J[j % period] @ x[j] for j in range(i + 1)) for i in range(len(x))])


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("method", ["equation16", "additive"])
@pytest.mark.parametrize(
    "case",
    [
        *("gqa", "biases", "gemma3", "gpt2", "falcon_7b", "qwen3moe", "mixtral"),
        *("hy_v4", "deepseek4", "hrm_text", "kimi_k3", "talkie", "gemma3n"),
    ],
)
def test_generation_by_the_formula(case: str, method: str, control: bool, layer: int, tiny_file: TinyFile) -> None:
    """Every logit and token against recomputing the pushed text from its start, with dense blocks of the Jacobian.

    The text is longer than the concept, so that its map begins anew, and goes on for some tokens with the cache.
    """
    ids, concept, strength, seed = tiny.prompt(case, 6), tiny.prompt(case, 4, seed=9), 0.4, 5
    path, count, mlp_path = tiny_file(case), 4, "gate"
    known, context = oracle.load(path), len(ids) + count
    model = open_model(path, dtype="float64")
    found = steer(
        model, ids, concept, method=method, layer=layer, strengths=[strength], max_tokens=count, seed=seed,
        mlp_path=mlp_path, first=True,
    )  # fmt: skip

    J, offset = dense(known, concept, layer, context, mlp_path=mlp_path, normed=method == "additive")
    if method == "additive":
        offset = torch.zeros_like(offset)
    if control:
        Q = matrix(random_rotation(len(offset), seed), len(offset))
        J, offset = Q @ J, Q @ offset

    def formula(h: Tensor, c: Tensor) -> Tensor:
        h, earlier = apart(known, h)
        if method == "equation16":
            return torch.cat([0.6 * h + 0.4 * c, earlier], dim=1)
        c = torch.cat([c] * (h.shape[1] // c.shape[1]), dim=1)  # the same in every stream
        return torch.cat([h + 0.2 * h.norm(dim=1, keepdim=True) * c / c.norm(dim=1, keepdim=True), earlier], dim=1)

    at = layer if method == "equation16" else layer - 1
    text = list(ids)
    ours = (found.controls if control else found.steered)[0]
    assert (found.changed, ours.strength, ours.control) == (at, strength, control)
    for step in range(count):
        logits = pushed_forward(known, text, at, context, partial(formula, c=cumulative(known, text, J, offset)))
        if step == 0 and known.facts.logits is None and known.facts.final_cap is None:
            assert distance(ours.logits, logits) < 1e-10
        text.append(int(logits.argmax()))
    assert text[len(ids) :] == ours.ids

    h = stream(known, ids, at, context)
    change = formula(h, cumulative(known, ids, J, offset)) - h
    assert distance(ours.direction, apart(known, change)[0][-1]) < 1e-10


@pytest.mark.parametrize("method", ["equation16", "additive"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_strength_nothing_changes(method: str, dtype: str, tiny_file: TinyFile) -> None:
    model, ids = open_model(tiny_file("biases"), dtype=dtype), tiny.prompt("biases", 7)
    found = steer(model, ids, [3, 1, 4], method=method, strengths=[0.0, 0.7], max_tokens=6)
    for same in (found.steered[0], found.controls[0]):
        assert same.ids == found.baseline.ids
        assert torch.equal(same.logits, found.baseline.logits)
        assert (same.kl, same.mass, same.hits) == (0.0, found.baseline.mass, found.baseline.hits)
        assert not same.direction.any()
    for other in (found.steered[1], found.controls[1]):
        assert other.kl > 0
        assert other.direction.any()
    assert torch.equal(found.baseline.logits, model.trace(ids, tapes=False).logits)


@pytest.mark.parametrize("case", ["gqa", "biases", "gpt2", "mixtral", "hy_v4", "hrm_text", "kimi_k3", "talkie"])
def test_a_prompt_by_its_own_map_stays_where_it_is(case: str, tiny_file: TinyFile) -> None:
    """`J x + offset` is the stream itself at the last position; so says equation 16, for any strength."""
    model, ids = open_model(tiny_file(case), dtype="float64"), tiny.prompt(case, 6)
    stream = model.trace(ids).tapes[1].x[-1]
    (found,) = steer(model, ids, ids, layer=1, strengths=[0.9], max_tokens=1, control=False).steered
    assert float(found.direction.norm() / stream.norm()) < 1e-12


def test_the_control_is_the_map_of_an_unrelated_prompt(tiny_file: TinyFile) -> None:
    model, ids = open_model(tiny_file("biases"), dtype="float64"), tiny.prompt("biases", 6)
    found = steer(model, ids, [9, 8, 7], strengths=[0.2, 0.7], max_tokens=3, control_concept=[4, 3])
    alone = steer(model, ids, [4, 3], strengths=[0.2, 0.7], max_tokens=3, control=False)
    assert found.control_ids == [4, 3]
    for ours, theirs in zip(found.controls, alone.steered, strict=True):
        assert ours.control
        assert ours.ids == theirs.ids
        assert torch.equal(ours.logits, theirs.logits)
        assert torch.equal(ours.direction, theirs.direction)
        assert ours.kl == theirs.kl
    assert found.data()["control"]["kind"] == "concept"
    assert steer(model, ids, [9, 8, 7], max_tokens=1).data()["control"]["kind"] == "random"


@pytest.mark.parametrize("method", ["equation16", "additive"])
def test_position_0_is_spared(method: str, tiny_file: TinyFile) -> None:
    path, ids, concept = tiny_file("gqa"), tiny.prompt("gqa", 5), [9, 8, 7]
    known, model = oracle.load(path), open_model(path, dtype="float64")
    found = steer(model, ids, concept, method=method, layer=1, strengths=[0.4], max_tokens=1, control=False)
    J, offset = dense(known, concept, 1, 6, mlp_path="up", normed=method == "additive")

    def formula(h: Tensor, c: Tensor) -> Tensor:
        changed = 0.6 * h + 0.4 * c
        if method == "additive":
            changed = h + 0.2 * h.norm(dim=1, keepdim=True) * c / c.norm(dim=1, keepdim=True)
        return torch.cat([h[:1], changed[1:]])

    images = cumulative(known, ids, J, offset * (method == "equation16"))
    logits = pushed_forward(known, ids, found.changed, 6, partial(formula, c=images))
    assert distance(found.steered[0].logits, logits) < 1e-10
    (alone,) = steer(
        model, ids[:1], concept, method=method, layer=1, strengths=[0.4], max_tokens=1, control=False
    ).steered
    assert alone.direction.any(), "or a text of one token could not be steered"


def test_the_command_says_what_it_steered_and_where_it_is_too_much() -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    out = " ".join(invoke("steer", "-q", "-t", 1, "--strength", "0.1,3", "--max-tokens", 2).stdout.split())
    assert "Concept: “The bridge out of Marin is the Golden”" in out
    assert "control: steered by the map of “She put the book on the table and then”" in out
    assert "position 0 is spared" in out
    assert "Warning: at strength 3 the first token's distribution is nearly another one" in out
    mild = invoke("steer", "-q", "-t", 1, "--strength", "0.1", "--max-tokens", 2, "--first").stdout
    assert "position 0 is steered, too" in mild
    assert "Warning" not in mild


def test_texts_are_in_the_result_and_on_the_page(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    given = "steer", "-q", "-t", 1, "--concept", "A <b>", "--max-tokens", 2
    for more, control in (
        ([], {"kind": "concept", "text": STEER_CONTROL}),
        (["--control-concept", "x"], {"text": "x"}),
    ):
        out = tmp_path / "steer.json"
        data = invoke_json(*given, *more, "-o", out)["steering"]
        assert data["concept"]["text"] == "A <b>"
        assert control.items() <= data["control"].items()
        invoke("report", out)
        page = out.with_suffix(".html").read_text()
        assert '<q dir="auto">A &lt;b&gt;</q>' in page
        assert f'the map of an unrelated prompt, <q dir="auto">{control["text"]}</q>.' in page
    data = invoke_json("steer", "-q", "--tokens", "1,2", "--max-tokens", 1, "-o", out)["steering"]
    assert (data["concept"]["text"], data["control"]) == (None, {"kind": "random"})
    invoke("report", out)
    assert "Control: steered by an operator with the same singular values" in out.with_suffix(".html").read_text()


def test_the_tables_of_csv_and_latex(tiny_file: TinyFile) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    given = "steer", "-q", "--strength", "0.1,0.5", "--max-tokens", 2
    data = invoke_json(*given)["steering"]
    csv, latex = (invoke(*given, "--format", name) for name in ("csv", "latex"))
    head, *rows = csv.stdout.splitlines()
    assert head.startswith("method,layer,changed,strength,control,kl,mass,hits,text,generated id 1,generated id 2,")
    texts = [data["baseline"], *data["steered"], *data["controls"]]
    assert [row.split(",")[3:5] for row in rows] == [
        [str(text["strength"]), str(i > 2)] for i, text in enumerate(texts)
    ]
    assert latex.stdout.count("\\\\\n") == 1 + len(texts)
    assert "She put the book" in latex.stdout


def test_the_random_control_is_of_equal_spectrum_and_reads_the_same(tiny_file: TinyFile) -> None:
    known, concept = oracle.load(tiny_file("gqa")), tiny.prompt("gqa", 4)
    J = dense(known, concept, 1, 4, mlp_path="up", normed=False).J.transpose(0, 1).flatten(1)
    Q = matrix(random_rotation(64, 3), 64)
    assert distance(Q @ Q.T, torch.eye(64)) < 1e-14
    _, S, Vh = torch.linalg.svd(J, full_matrices=False)
    _, turned, other = torch.linalg.svd(Q @ J, full_matrices=False)
    assert distance(turned, S) < 1e-13
    assert distance((Vh[:8] @ other[:8].T).abs(), torch.eye(8)) < 1e-6
    assert torch.equal(Q, matrix(random_rotation(64, 3), 64))
    assert (Q - matrix(random_rotation(64, 4), 64)).norm() > 1
    # No direction is preferred: either determinant, all components alike in the mean of the seeds, and none large.
    many = torch.stack([matrix(random_rotation(7, seed), 7) for seed in range(400)])
    assert 150 < int((torch.linalg.det(many) > 0).sum()) < 250
    assert many.mean(0).abs().max() < 5 * (1 / 7 / 400) ** 0.5  # five standard errors
    assert torch.allclose(many.square().mean(0), torch.full((7, 7), 1 / 7, dtype=torch.float64), atol=0.03)
    assert Q.square().max() <= 2 / 64 + 1e-12
    # As wide as any stream may be, for little memory: a matrix would take 8 TB.
    wide = torch.linspace(-1, 2, 1 << 20)[None]
    assert float(random_rotation(1 << 20, 0)(wide).norm()) == pytest.approx(float(wide.norm()), rel=1e-5)


def test_the_control_pushes_as_hard(tiny_file: TinyFile) -> None:
    model, ids = open_model(tiny_file("gqa"), dtype="float64"), tiny.prompt("gqa", 5)
    found = steer(model, ids, [9, 8, 7], method="additive", strengths=[0.5], max_tokens=1)
    (ours,), (control,) = found.steered, found.controls
    assert float(control.direction.norm()) == pytest.approx(float(ours.direction.norm()), rel=1e-12)
    assert abs(float(torch.cosine_similarity(control.direction, ours.direction, dim=0))) < 0.5


def test_seeds_reproduce_bits(tiny_file: TinyFile) -> None:
    model, ids = open_model(tiny_file("gqa")), tiny.prompt("gqa", 5)

    def run(seed: int) -> Steering:
        return steer(model, ids, [9, 8, 7], strengths=[0.5], max_tokens=3, seed=seed)

    first, again, other = run(1), run(1), run(2)
    assert torch.equal(first.controls[0].logits, again.controls[0].logits)
    assert first.controls[0].ids == again.controls[0].ids
    assert not torch.equal(first.controls[0].logits, other.controls[0].logits)
    assert torch.equal(first.steered[0].logits, other.steered[0].logits)


def test_measures(tiny_file: TinyFile) -> None:
    path, ids, concept = tiny_file("gqa"), tiny.prompt("gqa", 5), [9, 8, 7]
    model = open_model(path, dtype="float64")
    found = steer(model, ids, concept, strengths=[0.3, 0.9], max_tokens=8, top=40)
    known = oracle.load(path)
    own = oracle.forward(known, concept, context=13)["logits"][-1].softmax(0).sort(descending=True)
    assert found.concept_tokens == own.indices[:40].tolist()
    assert found.concept_chances == pytest.approx(own.values[:40].tolist())
    p = oracle.forward(known, ids, context=13)["logits"][-1].softmax(0)
    texts = [found.baseline, *found.steered, *found.controls]
    for text in texts:
        q = text.logits.softmax(0)
        assert text.kl == pytest.approx(sum(float(a * math.log(a / b)) for a, b in zip(p, q, strict=True)), abs=1e-12)
        assert text.mass == pytest.approx(float(q[own.indices[:40]].sum()))
        assert text.hits == len([id for id in text.ids if id in found.concept_tokens])
    assert [text.strength for text in texts] == [0, 0.3, 0.9, 0.3, 0.9]
    assert {text.hits for text in texts} - {0, 8}, "or the count shows nothing"


@pytest.mark.parametrize("start", [0, 2])
def test_images_in_small_portions(start: int, tiny_file: TinyFile) -> None:
    model, concept, ids = open_model(tiny_file("biases"), dtype="float64"), [1, 2, 3], tiny.prompt("biases", 9)
    x = model.embed(ids)
    jacobian = model.trace(concept).jacobian(span=Span(0, Tap("layer", 1)), raw=True)
    images = Images(jacobian, affine=True)
    whole = images(x)
    jacobian.chunk_bytes = 1
    assert distance(images(x[start:], start, whole[start - 1] if start else None), whole[start:]) < 1e-13


def test_an_image_of_no_length_pushes_nowhere() -> None:
    h = torch.randn(2, 8)
    assert torch.equal(additive(h, torch.zeros(2, 8), 1.0), h)


def test_the_tokens_of_all_texts_are_counted(tiny_file: TinyFile) -> None:
    seen: list[tuple[str, int, int]] = []

    def record(what: str, done: int, total: int) -> None:
        seen.append((what, done, total))

    steer(open_model(tiny_file("plain")), [1, 2], [3], strengths=[0.1, 0.2], max_tokens=3, progress=record)
    assert seen == [("token", i, 15) for i in range(1, 16)]


def test_refusals(tiny_file: TinyFile) -> None:
    model = open_model(tiny_file("gqa"))
    assert [default_layer(blocks) for blocks in (1, 2, 6, 32)] == [1, 1, 4, 21]
    with pytest.raises(ValueError, match="method 'other' is unknown; known: equation16, additive"):
        steer.__wrapped__(model, [1], [2], method="other")  # past the type checks of the test run
    for layer in (0, 3, -1):
        with pytest.raises(ValueError, match=f"layer {layer} is out of range; this model has layers 1 to 2"):
            steer(model, [1], [2], layer=layer)
    with pytest.raises(ValueError, match="max_tokens 0 is out of range: it must be at least 1"):
        steer(model, [1], [2], max_tokens=0)
    with pytest.raises(PromptError, match="the text would grow"):
        steer(model, [1], [2], max_tokens=model.config.context_length)
    with pytest.raises(PromptError, match="out of range"):
        steer(model, [1], [200000])


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_demo_shows_it() -> None:
    """Pushed by a sentence about a bridge, the model speaks of it; unpushed, and pushed at random, it does not."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    data = json.loads(invoke("steer", "-q", "-t", 1, "--format", "json").stdout)["steering"]
    assert data["concept"]["top"][0]["text"] == " Gate"
    (steered,), (control,) = data["steered"], data["controls"]
    assert steered["text"].startswith(" Gate Bridge.")
    assert "Gate" not in data["baseline"]["text"] + control["text"]
    assert steered["concept_hits"] > 0 == control["concept_hits"] == data["baseline"]["concept_hits"]
    assert steered["concept_mass_first"] > 100 * control["concept_mass_first"]
    out = " ".join(invoke("steer", "-q", "-t", 1).stdout.split())
    assert "Gate Bridge." in out
    assert "equation16; the concept's map spans 4 of 6 blocks; the residual stream is steered after 4 blocks" in out


def test_options_reach_the_library(tiny_file: TinyFile, tmp_path: Path) -> None:
    path, out = tiny_file("gqa"), tmp_path / "out.json"
    args = ["-m", path, "--tokens", "5,6,7,8", "--concept-tokens", "9,10", "--method", "additive", "--layer", 2]
    args += ["--strength", "0,0.5,1e1", "--max-tokens", 3, "--top", 7, "-s", 4, "--mlp-path", "gate", "-o", out]
    printed = invoke("steer", "-q", "-t", 1, *args, "--format", "json").stdout
    content = json.loads(printed)
    assert json.loads(out.read_text()) == content
    found = steer(
        open_model(path), [5, 6, 7, 8], [9, 10], method="additive", layer=2, strengths=[0.0, 0.5, 10.0], max_tokens=3,
        top=7, seed=4, mlp_path="gate",
    )  # fmt: skip
    data = content["steering"]
    assert (data["method"], data["layer"], data["changed_after_blocks"], data["blocks"]) == ("additive", 2, 1, 2)
    assert (data["seed"], data["concept"]["text"]) == (4, None)
    assert [row["id"] for row in data["concept"]["top"]] == found.concept_tokens
    for ours, theirs in zip(
        [data["baseline"], *data["steered"], *data["controls"]],
        [found.baseline, *found.steered, *found.controls],
        strict=True,
    ):
        assert [token["id"] for token in ours["tokens"]] == theirs.ids
        assert ours["kl_first"] == pytest.approx(theirs.kl, abs=1e-7)
        assert ours["direction_norm"] == pytest.approx(float(theirs.direction.norm()), rel=1e-5)
    assert (
        json.loads(invoke("steer", "-q", "-t", 1, *args, "--no-control", "--format", "json").stdout)["steering"][
            "controls"
        ]
        == []
    )


def test_usage(tiny_file: TinyFile, tmp_path: Path) -> None:
    model = ["-m", tiny_file("gqa"), "--tokens", "1,2"]
    for wrong, words in (
        (["--strength", "0,a"], "not a list of numbers"),
        (["--strength", "inf"], "not a list of numbers"),
        (["--layer", 3], "this model has layers 1 to 2"),
        (["--concept", "x", "--concept-tokens", "1"], "use one of them"),
        (["--concept-tokens", "100000"], "--concept: token id 100000 is out of range"),
        (["--max-tokens", 100000], "more than the model's context"),
        (["--trace", tmp_path], "No such option '--trace'"),
        (["-o", tmp_path / "x", "--export-control-vector", tmp_path / "x"], "name the same file"),
    ):
        assert words in invoke("steer", "-q", "-t", 1, *model, *wrong, code=2).stderr
    assert (
        "control vectors to the residual stream after 2 to 2 blocks"
        in invoke(
            "steer", "-q", "-t", 1, *model, "--layer", 1, "--export-control-vector", tmp_path / "x", code=1
        ).stderr
    )
    assert not list(tmp_path.iterdir())


def test_a_model_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(demo_path().read_bytes())
    before = path.read_bytes()
    err = invoke("steer", "-q", "-t", 1, "-m", path, "--tokens", "1,2", "--export-control-vector", path, code=2).stderr
    assert "is an input of this command" in err
    assert path.read_bytes() == before


@pytest.mark.parametrize("plan", [[], ["--dry-run", "--no-bench"]])
def test_a_control_that_is_left_out_has_no_prompt(plan: list[str]) -> None:
    refusal = invoke("steer", "-q", "--no-control", "--control-concept", "X", *plan, code=2).stderr
    assert "--no-control leaves out what --control-concept asks for" in refusal
