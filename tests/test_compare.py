"""Two files of one model side by side, against NumPy, SciPy and dense float64 arithmetic on the oracle's Jacobians."""

import gc
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from helpers import IDS, TOKENS, edited, invoke, invoke_json
from safetensors import safe_open
from safetensors.torch import load_file

from ggjac.analysis.compare import (
    CompareError,
    Portrait,
    check_files,
    check_vocabularies,
    compare,
    portray,
    principal_angles,
)
from ggjac.blocks import NumericsError
from ggjac.cli import session
from ggjac.cli.compare import _change
from ggjac.model import open_model

linalg = pytest.importorskip("scipy.linalg", reason="SciPy is not installed")
stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")

TinyFile = Callable[..., Path]

CASES = ("gqa", "biases", "gemma2", "gpt2", "phi2", "gpt_oss")
RANK = 3


def portraits(case: str, position: int, tiny_file: TinyFile, **options: object) -> list[Portrait]:
    """Return those of a file and of its copy with rounded weights."""
    ids = tiny.prompt(case, 6)
    found: list[Portrait] = []
    for path in (tiny_file(case), tiny_file(case, type="Q8_0")):
        model = open_model(path, dtype="float64")
        target = found[0].target if found else None
        J = model.trace(ids).jacobian(position)
        found.append(portray(J, RANK, target=target, tol=1e-9, max_sweeps=200, **options))
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("position", [-1, 2])
def test_a_comparison_is_that_of_the_dense_matrices(case: str, position: int, tiny_file: TinyFile) -> None:
    ids = tiny.prompt(case, 6)
    a, b = portraits(case, position, tiny_file)
    found = compare(a, b)
    known = [oracle.load(path) for path in (tiny_file(case), tiny_file(case, type="Q8_0"))]
    J = [oracle.jacobian(model, ids, mlp_path="up", position=position) for model in known]
    logits = [oracle.forward(model, ids)["logits"] for model in known]
    U, S, Vh = zip(*(torch.linalg.svd(part.J.flatten(1), full_matrices=False) for part in J), strict=True)
    left = linalg.subspace_angles(*(part[:, :RANK].numpy() for part in U))
    right = linalg.subspace_angles(*(part[:RANK].T.numpy() for part in Vh))
    assert np.allclose(found.left.numpy(), left, rtol=0, atol=1e-7)
    assert np.allclose(found.right.numpy(), right, rtol=0, atol=1e-7)
    assert left.max() > 1e-4  # Q8_0 does change something
    for portrait, model, jacobian, z, spectrum in zip((a, b), known, J, logits, S, strict=True):
        assert torch.allclose(portrait.svd.S, spectrum[:RANK], rtol=1e-10)
        assert torch.allclose(portrait.logits, z, rtol=0, atol=1e-9)
        assert torch.allclose(portrait.output, jacobian.y, rtol=0, atol=1e-9)
        assert portrait.reconstruction.error < 1e-13
        assert portrait.target == int(logits[0][position].argmax())
        w = model.weights.get("output.weight", model.weights["token_embd.weight"])[portrait.target]
        bias = float(model.weights.get("output.bias", torch.zeros(1000))[portrait.target])
        assert torch.allclose(portrait.shares, torch.einsum("e,end,nd->n", w, jacobian.J, jacobian.x), atol=1e-9)
        assert math.isclose(portrait.offset, float(w @ jacobian.offset) + bias, abs_tol=1e-9)
        assert math.isclose(portrait.logit, float(w @ jacobian.y) + bias, abs_tol=1e-9)
        assert math.isclose(float(portrait.shares.sum()) + portrait.offset, portrait.logit, abs_tol=1e-9)
    assert torch.equal(found.shares, b.shares - a.shares)
    p, q = (part.softmax(1).numpy() for part in logits)
    assert np.allclose(found.kl.numpy(), stats.entropy(p, q, axis=1), rtol=1e-9, atol=1e-15)
    assert found.top1.tolist() == (p.argmax(1) == q.argmax(1)).tolist()
    distance = float((J[1].y - J[0].y).norm() / J[0].y.norm())
    assert math.isclose(found.output_distance, distance, rel_tol=1e-9)


def test_a_file_beside_itself(tiny_file: TinyFile) -> None:
    a, _ = portraits("gqa", -1, tiny_file)
    other, _ = portraits("gqa", -1, tiny_file, seed=7)
    found = compare(a, other)
    assert found.left.max() < 1e-8
    assert found.right.max() < 1e-8
    assert not found.kl.any()
    assert found.top1.all()
    assert found.output_distance == 0
    assert found.shares.abs().max() == 0


def test_other_top_tokens_are_seen(tiny_file: TinyFile) -> None:
    a, _ = portraits("gqa", -1, tiny_file)
    logits = a.logits.clone()
    logits[2, int(logits[2].argmin())] = logits[2].max() + 1
    found = compare(a, replace(a, logits=logits))
    assert found.top1.tolist() == [True, True, False, True, True, True]
    assert (found.kl > 0).tolist() == [False, False, True, False, False, False]
    back = compare(replace(a, logits=logits), a)
    assert not math.isclose(float(found.kl[2]), float(back.kl[2]), rel_tol=0.01)  # it has a direction


@pytest.mark.parametrize("seed", range(4))
def test_angles_are_scipys(seed: int) -> None:
    generator = np.random.default_rng(seed)
    m, k = 30, 4
    A = generator.normal(size=(k, m))
    # Tiny, middling and large angles, and none: rows outside A's span, mixed in by so much; then any basis of them.
    outside = np.linalg.svd(A)[2][k:]
    basis = np.linalg.qr(A.T)[0].T
    for wanted in ([0.0, 1e-9, 1e-3, 0.7], [math.pi / 2, 1.5, 0.8, 1e-7], [math.pi / 2] * 4, [0.0] * 4):
        rows = [math.cos(t) * basis[i] + math.sin(t) * outside[i] for i, t in enumerate(wanted)]
        B = generator.normal(size=(k, k)) @ np.array(rows)
        found = principal_angles(torch.from_numpy(A), torch.from_numpy(B)).numpy()
        assert np.allclose(found, sorted(wanted, reverse=True), rtol=1e-5, atol=1e-12)
        # SciPy takes a cosine where small and large angles mix, and has half the digits there.
        assert np.allclose(found, linalg.subspace_angles(A.T, B.T), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"ids": [1, 2]}, "token ids"),
        ({"position": 3}, "position: the first has 5, the second 3"),
        ({"mlp_path": "gate"}, "freezing rule: the first has up, the second gate"),
        ({"target": -1}, "target"),
        ({"output": torch.ones(3).double()}, "embedding length: the first has 64, the second 3"),
        ({"logits": torch.ones(6, 9)}, "vocabulary: the first has 128, the second 9"),
    ],
)
def test_unlike_portraits_are_refused_by_name(changed: dict[str, object], words: str, tiny_file: TinyFile) -> None:
    a, _ = portraits("gqa", -1, tiny_file)
    with pytest.raises(CompareError, match=words):
        compare(a, replace(a, **changed))


def test_unlike_files_are_refused_by_name() -> None:
    a = {"x.weight": (2, 3), "y.weight": (4,)}
    check_files(a, dict(reversed(a.items())))
    for b, words in (
        (a | {"y.weight": (5,)}, r"y.weight: the first file has \[4\], the second \[5\]"),
        ({"x.weight": (2, 3)}, r"y.weight: the first file has \[4\], the second no such tensor"),
        (a | {"z": (1,)}, r"z: the first file has no such tensor, the second \[1\]"),
    ):
        with pytest.raises(CompareError, match=words):
            check_files(a, b)
    check_vocabularies(["a", "b"], ["a", "b"])
    check_vocabularies(None, None)
    with pytest.raises(CompareError, match="token 1: 'b' in the first file, 'c' in the second"):
        check_vocabularies(["a", "b"], ["a", "c"])
    with pytest.raises(CompareError, match="2 tokens in the first file, 3 in the second"):
        check_vocabularies(["a", "b"], ["a", "b", "c"])


def test_logits_that_overflow_are_refused(tmp_path: Path) -> None:
    path = edited(tiny.write(tmp_path / "m.gguf"), "output.weight", 60000.0)
    model = open_model(path, dtype="float16")
    with pytest.raises(NumericsError, match="logits overflow"):
        portray(model.trace([1, 2, 3]).jacobian(), RANK, target=1)


def test_tokens_in_messages_are_short() -> None:
    with pytest.raises(CompareError, match="token 0: 'aaa") as error:
        check_vocabularies(["a" * 10**6], ["b" * 10**6])
    assert len(str(error.value)) < 250


# ---- the command


def test_the_command(tiny_file: TinyFile) -> None:
    a, b = tiny_file("biases"), tiny_file("biases", type="Q4_0")
    result = invoke_json("compare", "-m", a, "--with", b, *TOKENS, "-k", 3, "--dtype", "float64", "--position", 3)
    data = result["compare"]
    logits = [oracle.forward(oracle.load(path), IDS)["logits"] for path in (a, b)]
    J = [oracle.jacobian(path, IDS, mlp_path="up", position=3) for path in (a, b)]
    for i, side in enumerate("ab"):
        S = torch.linalg.svdvals(J[i].J.flatten(1))[:3]
        values = torch.tensor([value[side] for value in data["singular_values"]]).double()
        assert torch.allclose(values, S, rtol=1e-4)
        shares = sum(share[side] for share in data["shares"]) + data["offset"][side]
        assert abs(shares - float(logits[i][3, data["target"]["id"]])) < 1e-10
        assert data["reconstruction"][side]["healthy"]
    log = [z.log_softmax(1) for z in logits]
    kl = (log[0].exp() * (log[0] - log[1])).sum(1)
    assert abs(data["kl"] - float(kl[3])) < 1e-10
    assert abs(data["mean_kl"] - float(kl.mean())) < 1e-10
    same = logits[0].argmax(1) == logits[1].argmax(1)
    assert [p["same_top1"] for p in data["positions"]] == same.tolist()
    assert 0 < min(data["angles"]["left"]) <= max(data["angles"]["left"]) <= 90
    assert [result[key]["path"] for key in ("model", "other_model")] == [str(a), str(b)]
    assert {name[-2:] for name in result["seconds"]} == {" a", " b"}
    out = invoke("compare", "-m", a, "--with", b, *TOKENS, "-k", 3).stdout
    for word in ("Singular values", "Principal angles", "b - a", "KL(a ‖ b)", "same top token at"):
        assert word in out
    assert out.index("b against a, ") < out.index("singular values change by ") < out.index("Principal angles")


def test_the_verdict_is_of_the_numbers(tiny_file: TinyFile) -> None:
    a, b = tiny_file("biases"), tiny_file("biases", seed=3)
    data = invoke_json("compare", "-m", a, "--with", b, *TOKENS, "-k", 3)["compare"]
    out = invoke("compare", "-m", a, "--with", b, *TOKENS, "-k", 3).stdout
    changes = [100 * (value["b"] / value["a"] - 1) for value in data["singular_values"]]
    assert f"singular values change by {min(changes):+.3g}% to {max(changes):+.3g}%\n" in out
    for number in (data["kl"], data["mean_kl"]):
        assert out.count(f"KL divergence {number:.2g} nats") == 1
    assert out.count("KL divergence") == 2, "each is said once"
    assert f"‖y_b - y_a‖/‖y_a‖ = {data['output_distance']:.2g}\n" in out
    largest = max(data["angles"]["left"])
    assert largest > 45
    assert f"the largest angle is {largest:.0f}°" in out
    for side, following in data["next_singular_value"].items():
        last = data["singular_values"][-1][side]
        assert 0 < following["value"] <= last * (1 + 1e-6)
        assert (f"\n{side}: σ4 " in out) == (following["value"] > 0.95 * last), "a cut through a cluster"
    assert ("another top token" in out) == (not data["positions"][-1]["same_top1"])
    same = invoke("compare", "-m", a, "--with", a, *TOKENS, "-k", 3).stdout
    assert "the largest angle" not in same
    assert "the singular values are identical\n" in same
    assert "%" not in same.split("Singular values")[1].split("Principal")[0]


def test_small_changes_are_not_rounded_away() -> None:
    assert [_change(x) for x in (0.0, 3e-9, -0.0004, 0.1234)] == ["0", "+3e-07%", "-0.04%", "+12.3%"]


def test_what_is_saved_and_printed_in_latex(tiny_file: TinyFile, tmp_path: Path) -> None:
    a, b, out = tiny_file("gqa"), tiny_file("gqa", seed=3), tmp_path / "compare.safetensors"
    given = "compare", "-m", a, "--with", b, *TOKENS, "-k", 2
    result = invoke_json(*given, "-o", out)
    data, saved = result["compare"], load_file(out)
    assert saved["ids"].tolist() == IDS
    assert saved["kl"].tolist() == [p["kl"] for p in data["positions"]]
    assert saved["left_angles"].rad2deg().tolist() == pytest.approx(data["angles"]["left"])
    for side in "ab":
        assert saved[f"{side}_S"].tolist() == pytest.approx([value[side] for value in data["singular_values"]])
        assert saved[f"{side}_shares"].tolist() == pytest.approx([share[side] for share in data["shares"]])
        assert saved[f"{side}_logits"].argmax(1).tolist() == [p["top1"][side]["id"] for p in data["positions"]]
    with safe_open(out, "numpy") as file:
        origin = json.loads(file.metadata()["ggjac"])
    assert [origin[key]["path"] for key in ("model", "other_model")] == [str(a), str(b)]
    latex = invoke(*given, "--format", "latex").stdout
    assert latex.count(r"\begin{tabular}") == 4
    refused = invoke(*given, "--format", "csv", code=2).stderr
    assert "'csv' is not one of 'table', 'json', 'latex'" in refused
    assert "is an input of this command" in invoke(*given, "-o", b, code=2).stderr


def test_the_command_on_a_file_and_itself(tiny_file: TinyFile) -> None:
    model = tiny_file("gqa")
    data = invoke_json("compare", "-m", model, "--with", model, *TOKENS)["compare"]
    assert max(data["angles"]["left"] + data["angles"]["right"]) < 1e-4
    assert (data["kl"], data["top1_agreement"], data["output_distance"]) == (0, 1, 0)


def test_the_command_refuses_other_models(tiny_file: TinyFile, tmp_path: Path) -> None:
    model = tiny_file("gqa")
    for other, words in (
        (tiny_file("plain"), r"blk.0.attn_k.weight: the first file has [32, 64], the second [64, 64]"),
        (tiny_file("tied"), "output.weight: the first file has [128, 64], the second no such tensor"),
    ):
        first = model if "attn_k" in words else tiny_file("plain")
        err = invoke("compare", "-m", first, "--with", other, *TOKENS, code=1).stderr
        assert words in err
        assert f"these are different models ({first.stem}, {other.stem}): " in err
    assert "--with" in invoke("compare", "-m", model, *TOKENS, code=2).stderr
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    invoke("compare", "-m", model, "--with", broken, *TOKENS, code=1)


def test_the_command_ends_with_3_when_the_sweeps_run_out(tiny_file: TinyFile) -> None:
    model = tiny_file("gqa")
    out = invoke("compare", "-m", model, "--with", model, *TOKENS, "--max-sweeps", 2, "--tol", "1e-7", code=3).stdout
    assert "NOT converged to 1e-07" in out
    assert tiny.options("gqa").layers == 2


def test_the_command_has_one_model_at_a_time(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the second is opened nothing of the first is left, and no garbage collection was needed: memory is tight."""
    opened: list[weakref.ref] = []
    true = session.open_model

    def opening(*args: Any, **options: Any) -> Any:
        assert [model() for model in opened] == [None] * len(opened)
        model = true(*args, **options)
        opened.append(weakref.ref(model))
        return model

    monkeypatch.setattr(session, "open_model", opening)
    gc.disable()
    try:
        invoke("compare", "-m", tiny_file("gqa"), "--with", tiny_file("gqa", type="Q8_0"), *TOKENS)
    finally:
        gc.enable()
    assert len(opened) == 2


def test_the_command_keeps_no_trace(tiny_file: TinyFile, tmp_path: Path) -> None:
    options = ["--with", tiny_file("gqa", type="Q8_0"), *TOKENS, "--trace", tmp_path / "trace"]
    assert "No such option '--trace'" in invoke("compare", "-m", tiny_file("gqa"), *options, code=2).stderr
    assert not (tmp_path / "trace").exists()


def test_the_kinds_of_two_models_come_before_their_tensors(tiny_files: dict[str, Path]) -> None:
    refusal = invoke(
        "compare", "-m", tiny_files["gqa"], "--with", tiny_files["mamba2"], "--tokens", "1,2", code=1
    ).stderr
    assert ": architecture: 'llama' in the first file, 'mamba2' in the second; give two files of one model" in refusal
