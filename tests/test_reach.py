"""How far a map holds, against autograd and the edited prompts of an independent forward pass; and the command."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from helpers import distance, invoke, invoke_json
from report_run import Page
from safetensors.torch import load_file

from ggjac.analysis.reach import ablate, reach, rollout
from ggjac.blocks import NumericsError
from ggjac.cli.reach import show
from ggjac.correlation import spearman
from ggjac.directions import Direction, DirectionError
from ggjac.edits import drawn_tokens
from ggjac.gguf.hub import demo_path
from ggjac.model import PromptError, open_model
from ggjac.studies import measure

TinyFile = Callable[..., Path]
stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
STEPS = (0.1, 0.5, 1.0)
# Biases, also of the head, a soft cap, learned positions, inputs of their own by tokens and by embeddings, several
# streams, a recurrence.
CASES = ("gqa", "biases", "phi2", "gemma2", "gpt2", "gemma4_inputs", "hy_v4", "rwkv7", "mixtral")


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
    v = torch.linalg.svd(maps["detached"].J.flatten(1), full_matrices=False).Vh[0].unflatten(0, (len(ids), -1))
    either = []  # the sign of a singular vector is open, but edits and predictions have the same
    for moved in (x[: p + 1].norm() * v / 10, -x[: p + 1].norm() * v / 10):
        own = oracle.forward(known, ids, x=x + moved, context=6)["result_norm"][p]
        guesses = [y, *(y + torch.einsum("end,nd->e", one.J, moved) for one in maps.values())]
        either.append([float((guess - own).norm() / own.norm()) for guess in guesses])
    singular = found.curves[2]
    ours = [singular.unchanged[0], *(singular.errors[name][0] for name in maps)]
    assert pytest.approx(ours, rel=1e-2) in either
    assert found.logit == pytest.approx(float(y @ w + bias), rel=1e-9)
    effects = found.effects
    assert effects is not None
    without = torch.cat([x[:1], mean_row(known, 1)[None], x[2:]])
    own = oracle.forward(known, ids, x=without, context=6)["result_norm"][p]
    assert float(effects.effects[1]) == pytest.approx(float((y - own) @ w), rel=1e-8)
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


@pytest.mark.parametrize("case", ["phi2", "gpt2", "gemma4_inputs"])
def test_effects_are_the_logits_of_edited_prompts(case: str, tiny_file: TinyFile) -> None:
    ids, path = tiny.prompt(case, 5), tiny_file(case)
    known, model = oracle.load(path), open_model(path, dtype="float64")
    drawn = drawn_tokens(model, 4, seed=2)
    ids[2] = drawn[0]  # a token does not take its own place
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
    replaced = ablate(jacobian, model, "replace", 9, 3, draws=3, seed=2)
    for i in range(5):
        texts = [[*ids[:i], id, *ids[i + 1 :]] for id in [id for id in drawn if id != ids[i]][:3]]
        expected = [zero.logit - logit(text, oracle.embed(known, text)) for text in texts]
        assert float(replaced.effects[i]) == pytest.approx(sum(expected) / 3)


# Values of an earlier block, and inputs of its own, which stay as they are; several streams.
@pytest.mark.parametrize(
    ("case", "rule"), [("gqa", "gate"), *((case, "up") for case in ("gemma4_small", "gemma3n", "hy_v4", "falcon_h1"))]
)
def test_along_a_direction_both_maps_begin_at_its_depth(case: str, rule: str, tiny_file: TinyFile) -> None:
    """Both by autograd from there; the outputs by the oracle's blocks on the changed stream; random ones alike."""
    ids, path = tiny.prompt(case, 5), tiny_file(case)
    known, model = oracle.load(path), open_model(path, dtype="float64")
    trace = model.trace(ids, mlp_path=rule)
    vector = torch.linspace(-1, 2, trace.network.tapes[1].x.shape[1], dtype=torch.float64)
    one = Direction(vector, name="v", layer=1)
    found = reach(trace.jacobian(), model, rank=2, steps=STEPS, direction=one, ablate=None, seed=6)
    states = oracle.forward(known, ids)
    stream, y = states["l_out-0"], states["result_norm"][-1]
    size, blocks = float(stream.norm(dim=1).median()), oracle.blocks(known.metadata)
    rules = {"detached": rule, "ordinary": None}
    maps = {n: oracle.inner(known, states, 1, "layer", blocks, mlp_path=mlp_path).J for n, mlp_path in rules.items()}
    drawn = torch.randn(2, len(vector), generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    w, bias = row_of(known, found.target)
    own = found.curves[-3:]
    assert [(c.kind, c.name, c.position) for c in own] == [
        ("direction", "v", 1),
        ("random", "1", 1),
        ("random", "2", 1),
    ]
    for curve, along in zip(own, [vector, *drawn], strict=True):
        moved = size * along / along.norm()
        for i, t in enumerate(STEPS):
            h = stream + t * moved
            changed = states | {"l_out-0": h}
            assert curve.sizes[i] == pytest.approx(float((h - stream).norm() / stream.norm()), rel=1e-9)
            for layer in range(1, blocks):
                changed |= oracle.block(known, layer, h, states=changed)
                h = changed[f"l_out-{layer}"]
            truth = oracle.final_norm(known, h, frozen=False)[-1]
            assert curve.unchanged[i] == pytest.approx(float((y - truth).norm() / truth.norm()), rel=1e-8)
            assert curve.logit[i] == pytest.approx(float(truth @ w + bias), rel=1e-8)
            for name, J in maps.items():
                predicted = y + t * torch.einsum("end,d->e", J, moved)
                assert curve.errors[name][i] == pytest.approx(
                    float((predicted - truth).norm() / truth.norm()), rel=1e-8
                )
                assert curve.logits[name][i] == pytest.approx(float(predicted @ w + bias), rel=1e-8)


def test_a_direction_at_the_embeddings_and_what_is_none(tiny_file: TinyFile) -> None:
    model = open_model(tiny_file("gqa"), dtype="float64")
    trace = model.trace(tiny.prompt("gqa", 5))
    vector = torch.linspace(-1, 2, trace.x.shape[1], dtype=torch.float64)
    # Vectors that have not converged are used, and it is said how far off they are.
    rough = reach(trace.jacobian(), model, rank=1, steps=[1.0], ablate=None, tol=1e-12, max_sweeps=2, seed=1)
    fine = reach(trace.jacobian(), model, rank=1, steps=[1.0], ablate=None, tol=1e-8)
    assert rough.data()["residual"] > 1e-8 >= fine.data()["residual"]
    assert rough.curves[1].unchanged != fine.curves[1].unchanged  # other random directions
    # At the embeddings, the derivative is right to first order.
    flat = reach(trace.jacobian(), model, rank=1, steps=[1e-5], direction=Direction(vector), ablate=None)
    last = next(curve for curve in flat.curves if curve.kind == "direction")
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
    # A compressed memory is no position.
    assert rollout(open_model(tiny_file("deepseek4")).trace(tiny.prompt("deepseek4", 12)).network, 11) is None


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
    """Between measured steps on a line; below the first one nothing is measured, so that it is a bound."""
    model, ids = open_model(tiny_file("gqa")), tiny.prompt("gqa", 4)
    (curve, *_) = reach(model.trace(ids).jacobian(), model, rank=1, steps=STEPS, ablate=None).curves
    path = replace(curve, unchanged=[0.05, 0.3, 0.9], errors={"detached": [0.2, 0.6, 0.4], "ordinary": [0.0, 0.0, 0.1]})
    grid = np.linspace(STEPS[0], STEPS[-1], 90001)
    for name, column in (("unchanged", path.unchanged), *path.errors.items()):
        found = path.data()["passes"][name]
        assert [*found] == ["0.1", "0.5"]
        for level, t in found.items():
            above = grid[np.interp(grid, STEPS, column) >= float(level)]
            assert t == (pytest.approx(above[0], abs=1e-5) if len(above) else None)
    assert [point["detached"] for point in path.data()["points"]] == path.errors["detached"]
    assert curve.passes([0.05, 0.25, 0.4], 0.1) == pytest.approx(0.1 + 0.4 / 4)
    assert curve.passes([0.2, 0.1, 0.4], 0.1) == 0.1
    assert curve.passes([0.1, 0.05, 0.4], 0.1) == 0.1
    assert curve.passes([0.05, 0.1, 0.09], 0.1) == pytest.approx(0.5)
    assert curve.passes([0.2, 0.1, 0.4], 0.5) is None


def test_a_level_that_is_passed_before_the_first_step_is_shown_as_a_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["reach", "-p", "The cat sat", "-k", 1, "--steps", "0.5,1", "--ablate", "none"]
    content, source = invoke_json(*asked), tmp_path / "run.json"
    (curve, _) = content["reach"]["curves"]
    assert curve["points"][0]["detached"] > 0.1
    assert curve["passes"]["detached"]["0.1"] == 0.5
    assert "≤ 0.5" in invoke(*asked).output
    # Every cell in its place: a bound on either side, a step between, and the errors at both ends.
    curve["points"] = [
        {"t": 0.5, "unchanged": 0.01, "detached": 0.2, "ordinary": 0.03},
        {"t": 1.0, "unchanged": 0.04, "detached": 0.8, "ordinary": 0.3},
    ]
    curve["passes"] = {
        "unchanged": {"0.1": None, "0.5": None},
        "detached": {"0.1": 0.5, "0.5": 0.75},
        "ordinary": {"0.1": 0.63, "0.5": None},
    }
    capsys.readouterr()
    show(content["reach"])
    shown = [" ".join(row.split()) for row in capsys.readouterr().out.splitlines()]
    source.write_text(json.dumps(content), encoding="utf-8")
    invoke("report", source)
    page = Page(source.with_suffix(".html").read_text(encoding="utf-8")).find("tr")
    for row in (
        "no change > 1 > 1 1.0% 4.0%",
        "detached map ≤ 0.5 0.750 20.0% 80.0%",
        "ordinary map 0.630 > 1 3.0% 30.0%",
    ):
        assert any(line.endswith(row) for line in shown)
        assert any(line.replace(" %", "%").endswith(row) for line in page)
    assert "10 % at 50 % at error at 0.5 at 1" in " ".join(shown)
    assert "Path Prediction Passes 10 % at 50 % at Error at 0.5 at 1" in page


def test_paths_are_predicted_as_memory_allows(tiny_file: TinyFile) -> None:
    J = (model := open_model(tiny_file("gqa"), dtype="float64")).trace([5, 6, 7]).jacobian()
    given: dict[str, Any] = {"rank": 1, "steps": [0.5], "swaps": [(0, 9), (1, 9)], "ablate": None}
    together = reach(J, model, **given)
    J.chunk_bytes = 1
    for one, other in zip(reach(J, model, **given).curves[:2], together.curves[:2], strict=True):
        for name in ("detached", "ordinary"):
            assert one.errors[name] == pytest.approx(other.errors[name], rel=1e-9)


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
    asked += ["--direction", f"{demo_path()}:output_norm.weight", "--layer", 2]
    content = invoke_json(*asked, "--swap", "0=id:300", "-o", out)
    (first, second, *_) = content["reach"]["curves"]
    assert (first["token"]["text"], first["other"]["text"]) == (" cat", " dog")
    assert (second["token"]["position"], second["other"]["id"]) == (0, 300)
    assert [point["t"] for point in first["points"]] == [0.1, 1]
    assert [(c["kind"], c["layer"]) for c in content["reach"]["curves"][-2:]] == [("direction", 2), ("random", 2)]
    saved = load_file(out)
    assert saved["curves_ordinary"].tolist()[0] == pytest.approx([point["ordinary"] for point in first["points"]])
    assert saved["effects_share"].tolist() == [row["share"] for row in content["reach"]["effects"]["tokens"]]
    shown = invoke(*asked).output
    assert "Error of the predicted output" in shown
    assert "random direction 1, after 2 blocks" in shown
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


def test_another_prompt_by_its_ids(tmp_path: Path) -> None:
    """As files without a tokenizer need it; and each table of shares names the rule of the map."""
    asked = ["reach", "--tokens", "5,17,3", "-k", 1, "--steps", "1", "--mlp-path", "gate"]
    content = invoke_json(*asked, "--toward-tokens", "5,17,4")["reach"]
    model = open_model(demo_path())
    jacobian = model.trace([5, 17, 3], mlp_path="gate").jacobian()
    found = reach(jacobian, model, rank=1, steps=[1.0], toward=[5, 17, 4], ablate="mean")
    assert content["curves"][0]["kind"] == "toward"
    assert content["curves"][0]["points"][0]["detached"] == pytest.approx(found.curves[0].errors["detached"][0])
    assert content["effects"]["mlp_path"] == "gate"
    assert found.effects is not None
    assert "share: mlp-path gate" in str(found.effects.table())
    assert [table.common["mlp path"] for table in found.exhibits()] == ["gate", "gate"]
    shown = " ".join(invoke(*asked).stdout.split())
    assert "along paths of edits (mlp-path gate)" in shown
    assert "share: of mlp-path gate; " in shown
    assert shown.endswith("A share is not importance.")
    plans = [invoke_json(*asked, *more, "--dry-run", "--no-bench") for more in ([], ["--toward-tokens", "5,17,4"])]
    alone, beside = ([step["vectors"] for step in plan["sweeps"] if step["what"] == "images"] for plan in plans)
    assert (alone, beside) == ([2], [3])
    assert "the other prompt has 2 tokens" in invoke(*asked, "--toward-tokens", "5,17", code=2).output
    out = tmp_path / "run.json"
    out.write_text(json.dumps(invoke_json(*asked)), encoding="utf-8")
    invoke("report", out)
    text = Page(out.with_suffix(".html").read_text(encoding="utf-8")).text
    assert "Share: of mlp-path gate." in text
    assert "The detached map is that of mlp-path gate." in text
    assert "It is neither importance nor the effect of changing a token." in text


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
