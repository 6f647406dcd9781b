"""Two prompts on one file, against SciPy and dense float64 arithmetic on the oracle's Jacobians."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from helpers import TOKENS, invoke, invoke_json
from safetensors.torch import load_file

from ggjac.analysis.compare import CompareError, Portrait, portray
from ggjac.analysis.compare_prompts import align, compare_prompts
from ggjac.cli.options import ModelOptions
from ggjac.model import open_model

linalg = pytest.importorskip("scipy.linalg", reason="SciPy is not installed")
stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")

TinyFile = Callable[..., Path]

A, B = [5, 17, 3, 99, 42], [5, 17, 8, 3, 7, 42]
ALIGNED = [(0, 0), (1, 1), (2, 3), (4, 5)]
RANK = 3


def portraits(
    case: str, tiny_file: TinyFile, prompts: tuple[list[int], ...] = (A, B), **options: Any
) -> list[Portrait]:
    found: list[Portrait] = []
    model = open_model(tiny_file(case), dtype="float64")
    for ids in prompts:
        given = {"tol": 1e-9, "max_sweeps": 200, "target": found[0].target if found else None} | options
        found.append(portray(model.trace(ids).jacobian(), RANK, **given))
    return found


@pytest.mark.parametrize("case", ["gqa", "biases", "gemma2", "gpt2", "qwen3moe", "mamba"])
def test_a_comparison_is_that_of_the_dense_matrices(case: str, tiny_file: TinyFile) -> None:
    a, b = portraits(case, tiny_file, versus=7)
    found = compare_prompts(a, b)
    assert found.aligned == ALIGNED
    assert found.pairs == [(0, 0), (1, 1), (None, 2), (2, 3), (3, None), (None, 4), (4, 5)]
    known = oracle.load(tiny_file(case))
    J = [oracle.jacobian(known, ids, mlp_path="up") for ids in (A, B)]
    logits = [oracle.forward(known, ids)["logits"] for ids in (A, B)]
    U, _, Vh = zip(*(torch.linalg.svd(part.J.flatten(1), full_matrices=False) for part in J), strict=True)
    left = linalg.subspace_angles(*(part[:, :RANK].numpy() for part in U))
    assert np.allclose(found.left.numpy(), left, rtol=0, atol=1e-7)
    d = len(J[0].y)
    parts = [v[:RANK].unflatten(1, (-1, d))[:, [pair[n] for pair in ALIGNED]].flatten(1) for n, v in enumerate(Vh)]
    right = linalg.subspace_angles(*(part.T.numpy() for part in parts))
    assert np.allclose(found.right.numpy(), right, rtol=0, atol=1e-6)
    assert found.weight == pytest.approx([float(part.square().sum()) / RANK for part in parts], abs=1e-7)
    p, q = (part.softmax(1).numpy() for part in logits)
    assert math.isclose(found.kl, stats.entropy(p[-1], q[-1]), rel_tol=1e-8)
    kl = [stats.entropy(p[i], q[j]) for i, j in ALIGNED]
    assert np.allclose(found.aligned_kl.numpy(), kl, rtol=1e-8, atol=1e-13)
    assert kl[:2] == pytest.approx([0, 0], abs=1e-13), "a common beginning has the same continuations"
    assert math.isclose(found.output_distance, float((J[1].y - J[0].y).norm() / J[0].y.norm()), rel_tol=1e-9)
    target = int(logits[0][-1].argmax())
    W = known.weights.get("output.weight", known.weights["token_embd.weight"])
    for portrait, jacobian in zip((a, b), J, strict=True):
        w = W[target] - W[7]
        assert torch.allclose(portrait.shares, torch.einsum("e,end,nd->n", w, jacobian.J, jacobian.x), atol=1e-9)
        branches = portrait.branches
        total = branches.embedding + branches.attn.sum(1) + branches.mlp.sum(1) + branches.bias
        assert math.isclose(float(total), portrait.logit, abs_tol=1e-9)
        assert math.isclose(float(portrait.shares.sum()) + portrait.offset, portrait.logit, abs_tol=1e-9)
    data = found.data()
    first = [(int(p[i].argmax()), int(q[j].argmax())) for i, j in ALIGNED]
    assert [(row["top1"]["a"]["id"], row["top1"]["b"]["id"]) for row in data["positions"]] == first
    assert [row["same_top1"] for row in data["positions"]] == [one == other for one, other in first]
    for side, own, other in (("a", p, q), ("b", q, p)):
        best = np.argsort(-own[-1], kind="stable")[:5]
        assert [token["id"] for token in data["next"][side]] == best.tolist()
        assert [token["probability"] for token in data["next"][side]] == pytest.approx(own[-1][best])
        assert [token["other"] for token in data["next"][side]] == pytest.approx(other[-1][best])


def subsequence(a: list[int], b: list[int]) -> int:
    """Return the length of the longest common subsequence, by trying all."""
    return max(
        len(part)
        for count in range(len(a) + 1)
        for part in itertools.combinations(a, count)
        if all(token in rest for rest in [iter(b)] for token in part)
    )


def test_alignment() -> None:
    drawn = random.Random(4)
    for _ in range(200):
        a, b = ([drawn.randrange(4) for _ in range(drawn.randrange(8))] for _ in "ab")
        pairs = align(a, b)
        places = [(i, j) for i, j in pairs if i is not None and j is not None]
        assert [i for i, _ in pairs if i is not None] == [*range(len(a))]
        assert [j for _, j in pairs if j is not None] == [*range(len(b))]
        assert all(a[i] == b[j] for i, j in places)
        assert len(places) <= subsequence(a, b)
        common = next((i for i in range(min(len(a), len(b))) if a[i] != b[i]), min(len(a), len(b)))
        assert places[:common] == [(i, i) for i in range(common)]
        if common < min(len(a), len(b)) and a[-1] == b[-1]:
            assert places[-1] == (len(a) - 1, len(b) - 1)
        assert places or not set(a) & set(b), "equal tokens are found"
    assert align([1, 2, 3], [1, 2, 3]) == [(0, 0), (1, 1), (2, 2)]
    assert align([1, 2], [3]) == [(0, None), (1, None), (None, 0)]
    assert align([1] * 300 + [2], [1] * 200 + [3]) == [
        *((i, i) for i in range(200)), *((i, None) for i in range(200, 301)), (None, 200),
    ]  # fmt: skip


def test_a_prompt_beside_itself(tiny_file: TinyFile) -> None:
    a, b = portraits("gqa", tiny_file, (A, A))
    found = compare_prompts(a, b)
    assert max(float(found.left.max()), float(found.right.max())) < 1e-7
    assert (found.kl, found.output_distance) == (0, 0)
    assert found.weight == pytest.approx((1, 1))
    assert found.pairs == [(i, i) for i in range(len(A))]


def test_without_common_tokens_right_vectors_are_not_compared(tiny_file: TinyFile) -> None:
    a, b = portraits("gqa", tiny_file, ([1, 2], [3, 4, 5]))
    found = compare_prompts(a, b)
    assert found.aligned == []
    assert (found.right.tolist(), found.weight, found.aligned_kl.tolist()) == ([], (0.0, 0.0), [])
    assert found.data()["angles"]["right"] == []
    assert str(found.table())
    # Nor where the vectors have next to nothing at the aligned positions: such parts are rounding.
    a, b = portraits("gqa", tiny_file)
    Vh = a.svd.Vh.clone()
    Vh[-1, [i for i, _ in ALIGNED]] *= 1e-12
    assert len(compare_prompts(replace(a, svd=replace(a.svd, Vh=Vh)), b).right) == 0
    assert len(compare_prompts(a, b).right) == RANK


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mlp_path": "gate"}, "freezing rule: the first has up, the second gate"),
        ({"target": -1}, "target"),
        ({"versus": 3}, "subtracted token: the first has None, the second 3"),
        ({"output": torch.ones(3).double()}, "embedding length: the first has 64, the second 3"),
    ],
)
def test_unlike_portraits_are_refused_by_name(changed: dict[str, object], words: str, tiny_file: TinyFile) -> None:
    a, b = portraits("gqa", tiny_file)
    with pytest.raises(CompareError, match=words):
        compare_prompts(a, replace(b, **changed))


# ---- the command


def ids(prompt: list[int]) -> str:
    return ",".join(map(str, prompt))


def test_the_command(tiny_file: TinyFile, tmp_path: Path) -> None:
    path, out = tiny_file("biases"), tmp_path / "two.safetensors"
    given = ["compare", "-m", path, "--tokens", ids(A), "--with-tokens", ids(B), "-k", RANK, "--dtype", "float64"]
    content = invoke_json(*given, "--versus", "id:7", "-o", out)
    data, saved = content["compare_prompts"], load_file(out)
    J = oracle.jacobian(path, B, mlp_path="up")
    logits = oracle.forward(oracle.load(path), B)["logits"][-1]
    shares = sum(row["b"]["share"] for row in data["shares"] if row["b"]) + data["offset"]["b"]
    assert abs(shares - float(logits[data["target"]["id"]] - logits[7])) < 1e-9
    assert data["logit"]["b"] == pytest.approx(shares, abs=1e-9)
    assert [data["versus"]["id"], data["rank"]] == [7, RANK]
    S = torch.linalg.svdvals(J.J.flatten(1))[:RANK]
    assert [value["b"] for value in data["singular_values"]] == pytest.approx(S.tolist(), rel=1e-4)
    assert [token["id"] for token in content["tokens"]] == A
    other = content["other_prompt"]
    assert ([token["id"] for token in other["tokens"]], other["position"]) == (B, len(B) - 1)
    assert {name[-2:] for name in content["seconds"]} == {" a", " b"}
    assert saved["a_ids"].tolist() == A
    assert saved["b_ids"].tolist() == B
    assert saved["aligned"].tolist() == [list(pair) for pair in ALIGNED]
    assert saved["kl"].tolist() == [row["kl"] for row in data["positions"]]
    out = " ".join(invoke(*given).stdout.split())
    for words in (
        "both say [106]",
        "4 positions are aligned; alone stand 1 of a and 2 of b",
        "Share of every block",
        "KL(a ‖ b)",
    ):
        assert words in out
    assert invoke(*given, "--format", "latex").stdout.count(r"\begin{tabular}") == 4


def test_the_second_prompt_may_be_the_shorter_one(tiny_file: TinyFile) -> None:
    data = invoke_json("compare", "-m", tiny_file("gqa"), "--tokens", ids(B), "--with-tokens", "5,3", "-k", 1)
    rows = data["compare_prompts"]["shares"]
    assert [row["b"]["position"] for row in rows if row["b"]] == [0, 1]
    assert [row["a"]["id"] for row in rows if row["a"]] == B


def test_the_output_is_at_the_same_place_from_either_end(tiny_file: TinyFile) -> None:
    given = ["compare", "-m", tiny_file("gqa"), "--tokens", ids(A), "--with-tokens", ids(B), "-k", 2]
    for position, places in ((-2, (3, 4)), (1, (1, 1))):
        content = invoke_json(*given, "--position", position)
        assert (content["position"], content["other_prompt"]["position"]) == places
        assert [len([row for row in content["compare_prompts"]["shares"] if row[side]]) for side in "ab"] == [
            place + 1 for place in places
        ]
    words = "position 5 is out of range"
    assert words in invoke(*given, "--position", 5, code=2).stderr


@pytest.mark.parametrize("plan", [[], ["--dry-run", "--no-bench"]])
def test_what_is_compared_is_given_once(plan: list[str], tiny_file: TinyFile) -> None:
    model, other = tiny_file("gqa"), ["--with-tokens", "1,2"]
    for given, words in (
        ([], "nothing to compare with; give another file (--with) or another prompt (--with-prompt)"),
        (["--with", model, *other], "--with and --with-tokens are two comparisons; give one of them at a time"),
        (["--with-prompt", "x", *other], "--with-prompt and --with-tokens are two comparisons"),
        (["--with-tokens", "1,9999"], "token id 9999 is out of range"),
        (["--with-prompt", ""], "the prompt is empty"),
    ):
        refusal = invoke("compare", "-m", model, *TOKENS, *given, *plan, code=2).stderr
        assert words in " ".join(refusal.split())


def test_the_other_question_has_the_template_and_the_system_of_the_first() -> None:
    given: dict[str, Any] = dict.fromkeys(field.name for field in fields(ModelOptions))
    given |= {"ram_budget": None, "vram_budget": None, "escape": False, "parse_special": True, "both_rules": False}
    what = ModelOptions(**given | {"device": "cpu", "dtype": "float32", "mlp_path": "up", "quiet": True})
    first = replace(what, chat="Why?", system="Be brief.")
    kind, second = first.beside(None, "How?", None)
    assert (kind, second.chat, second.system, second.prompt) == ("other_prompt", "How?", "Be brief.", None)
    kind, second = first.beside(None, None, [1, 2])
    assert (second.chat, second.system, second.tokens) == (None, None, [1, 2])
    kind, second = replace(what, file=Path("x")).beside(None, "How?", None)
    assert (second.prompt, second.file) == ("How?", None)


def test_two_texts() -> None:
    """On the demo: the capital is another one, and the country has the share."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    given = ["compare", "-q", "-t", 1, "-p", "The capital of France is", "--with-prompt", "The capital of Italy is"]
    content = invoke_json(*given, "--versus", " Rome")
    data = content["compare_prompts"]
    assert [data["next"][side][0]["text"] for side in "ab"] == [" Paris", " Rome"]
    assert content["other_prompt"]["prompt"] == "The capital of Italy is"
    assert data["logit"]["a"] > 0 > data["logit"]["b"]
    alone = [row[side]["text"] for row in data["shares"] for side in "ab" if None in row.values() and row[side]]
    assert alone == [" France", " Italy"]
    refused = invoke(*given, "--versus", " Paris", code=2).stderr
    assert "the difference is 0" in refused
