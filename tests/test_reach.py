"""How far a map holds, against autograd and the edited prompts of an independent forward pass; and the command."""

import json
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from helpers import distance, invoke, invoke_json
from report_run import Page
from safetensors.torch import load_file

from ggjac.analysis.reach import ablate, reach, rollout
from ggjac.blocks import NumericsError
from ggjac.correlation import spearman
from ggjac.directions import Direction, DirectionError
from ggjac.edits import drawn_tokens
from ggjac.gguf.hub import demo_path
from ggjac.model import PromptError, open_model
from ggjac.studies import measure

TinyFile = Callable[..., Path]
stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
STEPS = (0.1, 0.5, 1.0)
# Biases, a soft cap, learned positions, inputs of their own by tokens and by embeddings, several streams, a recurrence.
CASES = ("gqa", "biases", "gemma2", "gpt2", "gemma4_inputs", "hy_v4", "rwkv7", "mixtral")


def row_of(known: oracle.Oracle, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the head's row of a token and its bias, from the oracle."""
    head = known.weights.get("output.weight", known.weights["token_embd.weight"])
    bias = known.weights.get("output.bias")
    scale = known.metadata.get("logit_scale", 0.0) or 1.0
    scale = {None: 1.0, "divide": 1 / scale}.get(known.facts.logits, scale)
    return head[i] * scale, torch.tensor(0.0) if bias is None else bias[i]


@pytest.mark.parametrize(("case", "rule"), [*((case, "up") for case in CASES), ("gqa", "gate"), ("gemma2", "gate")])
def test_curves_and_scores_are_those_of_autograd_and_of_edited_prompts(
    case: str, rule: str, tiny_file: TinyFile
) -> None:
    """Both maps by autograd, the outputs by the oracle on edited embeddings; and what a linear map must say."""
    ids, other, p = tiny.prompt(case, 6), tiny.prompt(case, 6, seed=4), 4
    path = tiny_file(case)
    known, model = oracle.load(path), open_model(path, dtype="float64")
    jacobian = model.trace(ids, mlp_path=rule).jacobian(p)
    target = 7
    found = reach(jacobian, model, target, rank=1, steps=STEPS, swaps=[(2, other[0])], toward=other, ablate="mean")
    assert [curve.kind for curve in found.curves] == ["swap", "toward", "singular", "random"]
    maps = {"detached": oracle.jacobian(known, ids, mlp_path=rule, position=p, context=6)}
    maps["ordinary"] = oracle.jacobian(known, ids, mlp_path=None, position=p, context=6)
    x, y = maps["ordinary"].x, maps["ordinary"].y
    swapped = [*ids[:2], other[0], *ids[3:]]
    ends = {"swap": (swapped, oracle.embed(known, swapped)), "toward": (other, oracle.embed(known, other))}
    w, bias = row_of(known, target)
    for curve in found.curves[:2]:
        tokens, end = ends[curve.kind]
        for i, t in enumerate(STEPS):
            changed = (1 - t) * x + t * end
            own = oracle.forward(known, tokens if t == 1 else ids, x=changed, context=6)["result_norm"][p]
            assert curve.unchanged[i] == pytest.approx(float((y - own).norm() / own.norm()), rel=1e-8)
            assert curve.logit[i] == pytest.approx(float(own @ w + bias), rel=1e-8)
            move = (changed - x)[: p + 1].norm() / x[: p + 1].norm()
            assert curve.sizes[i] == pytest.approx(float(move), rel=1e-9)
            for name, one in maps.items():
                predicted = y + torch.einsum("end,nd->e", one.J, changed - x)
                assert curve.errors[name][i] == pytest.approx(float((predicted - own).norm() / own.norm()), rel=1e-8)
                assert curve.logits[name][i] == pytest.approx(float(predicted @ w + bias), rel=1e-8)
    for curve in found.curves[2:]:
        assert curve.sizes == pytest.approx(STEPS)
    assert found.logit == pytest.approx(float(y @ w + bias), rel=1e-9)
    effects = found.effects
    assert effects is not None
    for name, prediction, one in (
        ("share", "detached", maps["detached"]),
        ("gradient_input", "ordinary", maps["ordinary"]),
    ):
        pulled = torch.einsum("end,e->nd", one.J, w)
        assert distance(effects.scores[name], (pulled * x).sum(1)[: p + 1]) < 1e-9
        moved = x[: p + 1] - torch.stack([mean_row(known, i) for i in range(p + 1)])
        assert distance(effects.scores[prediction], (pulled[: p + 1] * moved).sum(1)) < 1e-9


def mean_row(known: oracle.Oracle, i: int) -> torch.Tensor:
    """Return the mean embedding of the tokens that a vocabulary has, at a position."""
    tokens = known.weights["token_embd.weight"].any(1).nonzero()[:, 0].tolist()
    places = known.weights.get("position_embd.weight", torch.zeros(i + 1, 1))
    return torch.stack([oracle.embed(known, [j])[0] for j in tokens]).mean(0) - places[0] + places[i]


@pytest.mark.parametrize("case", ["gqa", "gpt2", "gemma4_inputs"])
def test_effects_are_the_logits_of_edited_prompts(case: str, tiny_file: TinyFile) -> None:
    ids, path = tiny.prompt(case, 5), tiny_file(case)
    known, model = oracle.load(path), open_model(path, dtype="float64")
    jacobian, x = model.trace(ids).jacobian(), oracle.embed(known, ids)
    (w, bias), (v, other) = row_of(known, 9), row_of(known, 3)

    def logit(tokens: list[int], changed: torch.Tensor) -> float:
        y = oracle.forward(known, tokens, x=changed)["result_norm"][-1]
        return float(y @ (w - v) + bias - other)

    def changed(i: int, row: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:i], row[None], x[i + 1 :]])

    zero = ablate(jacobian, model, "zero", 9, 3)
    mean = ablate(jacobian, model, "mean", 9, 3)
    assert zero.logit == pytest.approx(logit(ids, x))
    for i in range(5):
        assert float(zero.effects[i]) == pytest.approx(zero.logit - logit(ids, changed(i, torch.zeros_like(x[0]))))
        assert float(mean.effects[i]) == pytest.approx(zero.logit - logit(ids, changed(i, mean_row(known, i))))
    drawn = drawn_tokens(model, 4, seed=2)
    replaced = ablate(jacobian, model, "replace", 9, 3, draws=3, seed=2)
    for i in range(5):
        texts = [[*ids[:i], id, *ids[i + 1 :]] for id in [id for id in drawn if id != ids[i]][:3]]
        expected = [zero.logit - logit(text, oracle.embed(known, text)) for text in texts]
        assert float(replaced.effects[i]) == pytest.approx(sum(expected) / 3)


@pytest.mark.parametrize("case", ["gqa", "gemma2", "falcon_h1"])
def test_a_direction_is_added_to_the_stream_at_its_depth(case: str, tiny_file: TinyFile) -> None:
    ids, path = tiny.prompt(case, 5), tiny_file(case)
    known, model = oracle.load(path), open_model(path, dtype="float64")
    trace = model.trace(ids)
    vector = torch.linspace(-1, 2, trace.x.shape[1], dtype=torch.float64)
    one = Direction(vector, name="v", layer=1)
    found = reach(trace.jacobian(), model, rank=1, steps=STEPS, direction=one, ablate=None)
    states = oracle.forward(known, ids)
    stream = states["l_out-0"]
    size = float(stream.norm(dim=1).median())
    curve = found.curves[-1]
    assert (curve.kind, curve.name, curve.position, list(curve.errors)) == ("direction", "v", 1, ["detached"])
    for i, t in enumerate(STEPS):
        h = stream + t * size * vector / vector.norm()
        for layer in range(1, known.metadata["block_count"]):
            h = oracle.block(known, layer, h, states=states)[f"l_out-{layer}"]
        own = oracle.final_norm(known, h, frozen=False)[-1]
        y = states["result_norm"][-1]
        assert curve.unchanged[i] == pytest.approx(float((y - own).norm() / own.norm()), rel=1e-8)
        assert curve.errors["detached"][i] > 0
    # Vectors that have not converged are used, and it is said how far off they are.
    rough = reach(trace.jacobian(), model, rank=1, steps=[1.0], ablate=None, tol=1e-12, max_sweeps=2)
    fine = reach(trace.jacobian(), model, rank=1, steps=[1.0], ablate=None, tol=1e-8)
    assert rough.data()["residual"] > 1e-8 >= fine.data()["residual"]
    # At the embeddings, the derivative is right to first order.
    flat = reach(trace.jacobian(), model, rank=1, steps=[1e-5], direction=Direction(vector), ablate=None)
    last = flat.curves[-1]
    assert last.errors["ordinary"][0] < 1e-3 * last.unchanged[0] < last.errors["detached"][0]
    with pytest.raises(ValueError, match=r"the stream is changed after 0 to \d blocks"):
        reach(trace.jacobian(), model, rank=1, direction=Direction(vector, layer=9))
    for wrong, words in ((vector[:3], r"has shape \[3\]"), (vector[None], r"has shape \[1, "), (0 * vector, "is zero")):
        with pytest.raises(DirectionError, match=words):
            reach(trace.jacobian(), model, rank=1, direction=Direction(wrong, layer=1))


def test_rollout_is_the_product_of_the_mean_patterns(tiny_file: TinyFile) -> None:
    model, ids = open_model(tiny_file("gqa"), dtype="float64"), tiny.prompt("gqa", 5)
    network = model.trace(ids).network
    product = torch.eye(5, dtype=torch.float64)
    for tape in network.tapes:
        product = (torch.eye(5) + tape.attn.mixers[0].pattern.mean(0)) / 2 @ product
    for p in (0, 3, 4):
        found = rollout(network, p)
        assert found is not None
        assert torch.allclose(found, product[p, : p + 1])
        assert float(found.sum()) == pytest.approx(1)
    sinks = rollout(open_model(tiny_file("gpt_oss")).trace(tiny.prompt("gpt_oss", 4)).network, 3)
    assert sinks is not None
    assert 0 < float(sinks.sum()) < 0.99
    assert rollout(open_model(tiny_file("rwkv7")).trace(tiny.prompt("rwkv7", 4)).network, 3) is None


def test_rank_correlations_are_scipys() -> None:
    model = open_model(demo_path(), dtype="float64")
    found = reach(model.trace("The cat sat on the mat").jacobian(), model, rank=1, steps=[0.1])
    assert found.effects is not None
    for first in (0, 1):
        own = found.effects.effects[first:]
        for name, (signed, sizes) in found.effects.agreement(first).items():
            score = found.effects.scores[name][first:]
            assert signed == pytest.approx(stats.spearmanr(score, own).statistic)
            assert sizes == pytest.approx(stats.spearmanr(score.abs(), own.abs()).statistic)
    ties = torch.tensor([1.0, 1.0, 2.0, 0.5])
    assert spearman(ties, own[:4]) == pytest.approx(stats.spearmanr(ties, own[:4]).statistic)


def test_where_a_curve_passes_a_level(tiny_file: TinyFile) -> None:
    model, ids = open_model(tiny_file("gqa")), tiny.prompt("gqa", 4)
    (curve, *_) = reach(model.trace(ids).jacobian(), model, rank=1, steps=STEPS, ablate=None).curves
    assert curve.passes([0.05, 0.25, 0.4], 0.1) == pytest.approx(0.1 + 0.4 / 4)
    assert curve.passes([0.2, 0.1, 0.4], 0.1) == pytest.approx(0.05)
    assert curve.passes([0.2, 0.1, 0.4], 0.5) is None


def test_one_token_and_the_first_position(tiny_file: TinyFile) -> None:
    """One token has ranks of its own only, so that no correlation is defined."""
    model = open_model(tiny_file("gqa"))
    for ids, p in (([5], 0), ([5, 6, 7], 0)):
        found = reach(model.trace(ids).jacobian(p), model, rank=1, steps=[0.5], swaps=[(0, 9)])
        assert found.effects is not None
        assert len(found.effects.effects) == 1
        assert found.effects.data()["agreement"]["share"] == {"signed": None, "sizes": None}
        assert "is not defined" in str(found.effects.table())


def test_what_cannot_be_asked(tiny_file: TinyFile) -> None:
    model = open_model(tiny_file("gqa"))
    jacobian = model.trace([5, 6, 7]).jacobian(1)
    for asked, words in (
        ({"steps": []}, "give finite numbers above 0, ascending"),
        ({"steps": [0.5, 0.1]}, "ascending"),
        ({"steps": [0.0, 0.1]}, "above 0"),
        ({"swaps": [(2, 9)]}, "the output depends on positions 0 to 1"),
        ({"swaps": [(1, 6)]}, "already; give another one"),
        ({"toward": [1, 2]}, "the other prompt has 2 tokens, this one 3"),
        ({"toward": [5, 6, 9]}, "the same up to the output's position"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            reach(jacobian, model, rank=1, **asked)
        assert isinstance(caught.value, PromptError) or "steps" in asked
    model = open_model(tiny_file("gemma3n"))
    with pytest.raises(NumericsError, match="divides by the length of an embedding of zero: use mean"):
        ablate(model.trace([5, 6, 7]).jacobian(), model, "zero")


def test_the_command(tmp_path: Path) -> None:
    """Texts of tokens, positions and ids name what is swapped; a control vector is read from its file."""
    out = tmp_path / "reach.safetensors"
    asked = ["reach", "-p", "The cat sat on the mat", "-k", 1, "--steps", "0.1,1", "--swap", "cat=dog"]
    content = invoke_json(*asked, "--swap", "0=id:300", "-o", out)
    (first, second, *_) = content["reach"]["curves"]
    assert (first["token"]["text"], first["other"]["text"]) == (" cat", " dog")
    assert (second["token"]["position"], second["other"]["id"]) == (0, 300)
    assert [point["t"] for point in first["points"]] == [0.1, 1]
    saved = load_file(out)
    assert saved["curves_ordinary"].tolist()[0] == pytest.approx([point["ordinary"] for point in first["points"]])
    assert saved["effects_share"].tolist() == [row["share"] for row in content["reach"]["effects"]["tokens"]]
    shown = invoke(*asked).output
    assert "Error of the predicted output" in shown
    assert "Effect of leaving each token out" in shown
    for given, words in (
        ("cat", "write them as Marin=Sausalito"),
        ("horse=dog", "'horse' is not a token of the prompt"),
        ("99=dog", "the output depends on positions 0 to"),
        ("cat=cat", "already; give another one"),
    ):
        assert words in invoke("reach", "-p", "The cat sat on the mat", "--swap", given, code=2).output
    again = invoke("reach", "-p", "The cat saw the cat", "--swap", "cat=dog", code=2).output
    assert "stands at positions" in again
    assert "0.01,0.1,1" in invoke("reach", "--steps", "1,x", code=2).output
    assert "no such file" in invoke("reach", "--direction", "nowhere.gguf", code=2).output


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["reach", "-p", "The cat sat", "-k", 2, "--steps", "0.1,1", "--seed", 5, "--ablate", "none"]
    content, source = invoke_json(*asked), tmp_path / "run.json"
    source.write_text(json.dumps(content), encoding="utf-8")
    invoke("report", source)
    html = source.with_suffix(".html").read_text(encoding="utf-8")
    named = [(curve["kind"], curve["name"]) for curve in content["reach"]["curves"]]
    assert named == [(kind, number) for kind in ("singular", "random") for number in ("1", "2")]
    found = Page(html)
    text = found.text
    assert "Seed 5" in text
    assert "Right singular vector 2" in text
    assert "singular vector 0" not in text
    assert len(found.find("figure")) == 4
    assert "more paths" not in text
    monkeypatch.setattr("ggjac.report.sections.reach.DRAWN", 2)  # of many paths only the first have charts
    invoke("report", source)
    cut = Page(source.with_suffix(".html").read_text(encoding="utf-8"))
    assert len(cut.find("figure")) == 2
    assert "2 more paths are in the table" in cut.text
    assert "Random direction 2" in cut.text


def test_attribute_puts_the_effects_beside_the_shares(tmp_path: Path) -> None:
    asked = ["attribute", "-p", "The cat sat on the mat", "--ablate", "mean"]
    content = invoke_json(*asked)["attribution"]
    effects = content["effects"]
    assert [row["share"] for row in effects["tokens"]] == [row["share"] for row in content["shares"]]
    model = open_model(demo_path())
    found = ablate(model.trace("The cat sat on the mat").jacobian(), model, "mean")
    assert [row["effect"] for row in effects["tokens"]] == pytest.approx(found.effects.tolist())
    assert "Effect of leaving each token out" in invoke(*asked).output
    header, first, *_ = invoke(*asked, "--format", "csv").output.splitlines()
    assert dict(zip(header.split(","), first.split(","), strict=True))["effect"] == repr(effects["tokens"][0]["effect"])
    both = invoke_json(*asked, "--mlp-path", "both")["attribution"]
    assert set(both["effects"]["agreement"]) == {"share", "other_share"}
    lines = tmp_path / "p.txt"
    lines.write_text("The cat\nA dog ran\n")
    many = json.loads(invoke("attribute", "-f", lines, "--each-line", "--ablate", "zero", "--format", "json").stdout)
    assert many
    ask = measure(model, "attribute", ablate="zero")
    assert ask.request()["ablate"] == "zero"  # the study's plan has the edits
    for options, words in (
        (["--by", "layer"], "one logit"),
        (["--direction", "entropy"], "a projection, not logits"),
        (["--max-tokens", 2], "the logit of every token of an answer"),
        (["--position", "all"], "effects at one position"),
    ):
        assert words in invoke(*asked, *options, code=2).output


def test_vectors_that_have_not_converged_are_named(tmp_path: Path) -> None:
    args = ["reach", "-q", "-t", 1, "--tokens", "0,465,506", "-k", 1, "--steps", "1", "--ablate", "none"]
    words = "NOT converged to 1e-07: the right singular vectors have residuals of up to "
    rough = [*args, "--max-sweeps", 2, "--tol", "1e-7"]
    assert words in " ".join(invoke(*rough).stdout.split())
    assert "NOT converged" not in invoke(*args, "--tol", "0.5").stdout
    source = tmp_path / "run.json"
    source.write_text(json.dumps(invoke_json(*rough)), encoding="utf-8")
    invoke("report", source)
    page = Page(source.with_suffix(".html").read_text(encoding="utf-8"))
    assert "The right singular vectors have not converged to 10⁻⁷." in page.text


def test_both_rules_are_refused_with_where_they_are() -> None:
    found = invoke("reach", "--mlp-path", "both", code=2).stderr
    assert "both sets the shares of attribute side by side; here run up, then gate" in " ".join(found.split())
