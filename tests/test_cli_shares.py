"""`attribute`, `svd --per-token` and `compare` as commands: what they print, save and refuse, judged by the oracle."""

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_cli import IDS, TOKENS, ggjac_

from ggjac.cli import session

TinyFile = Callable[..., Path]


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def content(*args: Any, code: int = 0) -> dict[str, Any]:
    return json.loads(ggjac_(*args, "--format", "json", code=code).stdout)


# -- attribute ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["layer", "head"])
@pytest.mark.parametrize("case", ["biases", "gemma2", "phi2", "gpt_oss"])
def test_parts_sum_to_the_logit(by: str, case: str, tiny_file: TinyFile) -> None:
    model, known = tiny_file(case), oracle.load(tiny_file(case))
    options = ["--dtype", "float64", "--by", by, "--target", 7, "--versus", 9, "-o", "f"]
    data = content("attribute", "-m", model, *TOKENS, *options)["attribution"]
    logits = oracle.forward(known._replace(facts=known.facts._replace(final_cap=None)), IDS)["logits"][-1]
    assert (data["by"], data["target"]["id"], data["versus"]["id"]) == (by, 7, 9)
    assert abs(data["logit"] - float(logits[7] - logits[9])) < 1e-10
    parts = [data["embedding"], data["bias"], *(block["mlp"] for block in data["blocks"])]
    for block in data["blocks"]:
        if by == "head":
            assert abs(sum(block["heads"]) + block["attn_bias"] - block["attn"]) < 1e-10
            parts += [*block["heads"], block["attn_bias"]]
        else:
            assert "heads" not in block
            parts.append(block["attn"])
    assert abs(sum(parts) - data["logit"]) < 1e-10
    assert abs(data["unexplained"]) < 1e-10
    saved = load_file("f")
    assert saved["mlp"].flatten().tolist() == [block["mlp"] for block in data["blocks"]]
    assert ("heads" in saved) == (by == "head")
    assert saved["ids"].tolist() == IDS

    out = ggjac_("attribute", "-m", model, *TOKENS, *options).stdout
    cap = " before the soft cap" if case == "gemma2" else ""
    assert f"in the logit of [7] minus that of [9]{cap}" in " ".join(out.split())
    line = next(line for line in out.split("\n") if line.startswith("sum "))
    assert line.split()[1:] == [f"{data['logit']:+.4f}", "logit", f"{data['logit']:.4f}"]


@pytest.mark.parametrize("by", ["token", "layer", "head"])
def test_every_position(by: str, tiny_file: TinyFile) -> None:
    model, known = tiny_file("biases"), oracle.load(tiny_file("biases"))
    options = ["--position", "all", "--by", by, "--dtype", "float64", "-o", "f"]
    result = content("attribute", "-m", model, *TOKENS, *options)
    logits = oracle.forward(known, IDS)["logits"]
    assert result["position"] == "all"
    entries = result["attribution"]["positions"]
    assert [entry["target"]["id"] for entry in entries] == logits.argmax(1).tolist()
    assert all(abs(e["logit"] - float(z.max())) < 1e-10 for e, z in zip(entries, logits, strict=True))
    assert load_file("f")["logits"].tolist() == [entry["logit"] for entry in entries]
    for position, entry in enumerate(entries):
        alone = content(*("attribute", "-m", model, *TOKENS, "--position", position, "--by", by, "--dtype", "float64"))[
            "attribution"
        ]
        assert alone["target"] == entry["target"]
        for key in ("embedding", "bias", "offset"):
            assert abs(alone.get(key, 0) - entry.get(key, 0)) < 1e-10
        if by == "token":
            found, expected = ([s["share"] for s in e["shares"]] for e in (entry, alone))
            assert len(found) == position + 1
            assert all(abs(a - b) < 1e-10 for a, b in zip(found, expected[: position + 1], strict=True))
    out = ggjac_("attribute", "-m", model, *TOKENS, *options).stdout
    assert "in a logit at every position" in out
    assert out.count(f"{entries[3]['logit']:.4f}") == 2  # itself, and the sum of the shares


def test_one_position_is_saved_too(tiny_file: TinyFile) -> None:
    data = content("attribute", "-m", tiny_file("gqa"), *TOKENS, "-o", "f")["attribution"]
    saved = load_file("f")
    assert saved["shares"].shape == (1, len(IDS))
    assert saved["shares"][0].tolist() == [share["share"] for share in data["shares"]]
    assert saved["targets"].tolist() == [data["target"]["id"]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--position", "every"], "'every' is neither a position nor all"),
        (["--position", "9"], "--position 9 is out of range"),
        (["--versus", "128"], "--versus: token id 128 is out of range"),
        (["--by", "neuron"], "neuron"),
    ],
)
def test_usage(options: list[str], words: str, tiny_file: TinyFile) -> None:
    assert words in ggjac_("attribute", "-m", tiny_file("gqa"), *TOKENS, *options, code=2).stderr


# -- svd ---------------------------------------------------------------------------------------------------------------


def test_svd_per_token(tiny_file: TinyFile) -> None:
    model = tiny_file("biases")
    options = ["--per-token", "-k", 2, "--dtype", "float64", "--tol", "1e-8", "--max-sweeps", 300]
    data = content("svd", "-m", model, *TOKENS, *options, "-o", "f")["svd"]["per_token"]
    saved, J = load_file("f"), oracle.jacobian(model, IDS, mlp_path="up").J
    for i, entry in enumerate(data):
        S = torch.linalg.svdvals(J[:, i])[:2]
        assert torch.allclose(torch.tensor([t["singular_value"] for t in entry["triplets"]]).double(), S, rtol=1e-6)
        assert torch.allclose(saved["token_S"][i], S, rtol=1e-9)
        rebuilt = torch.einsum("ke,ef,kf->k", saved["token_U"][i], J[:, i], saved["token_Vh"][i])
        assert torch.allclose(rebuilt, S, rtol=1e-9)
    assert [entry["token"] for entry in data] == [f"[{id}]" for id in IDS]
    assert "each position's own map" in ggjac_("svd", "-m", model, *TOKENS, *options).stdout
    ggjac_("svd", "-m", model, *TOKENS, "--per-token", "--max-sweeps", 2, "--tol", "1e-6", code=3)
    assert "per_token" not in content("svd", "-m", model, *TOKENS)["svd"]


def test_svd_beside_shuffled_vectors(tiny_file: TinyFile) -> None:
    model = tiny_file("gqa")
    a, again, other = (
        content("svd", "-m", model, *TOKENS, "-k", 3, "--shuffles", 20, "-s", seed)["svd"]["readability"]
        for seed in (1, 1, 2)
    )
    assert a == again != other
    for side in ("left", "right"):
        assert a[side]["shuffled"]["count"] == 20
        assert len(a[side]["scores"]) == len(a[side]["above"]) == len(a[side]["chance"]) == 3
    assert "Coherence" in ggjac_("svd", "-m", model, *TOKENS, "-k", 3).stdout
    without = ggjac_("svd", "-m", model, *TOKENS, "--shuffles", 0).stdout
    assert "Coherence" not in without
    assert "readability" not in content("svd", "-m", model, *TOKENS, "--shuffles", 0)["svd"]
    assert "--shuffles 1: " in ggjac_("svd", "-m", model, *TOKENS, "--shuffles", 1, code=2).stderr


# -- compare -----------------------------------------------------------------------------------------------------------


def test_compare(tiny_file: TinyFile) -> None:
    a, b = tiny_file("biases"), tiny_file("biases", type="Q4_0")
    result = content("compare", "-m", a, "--with", b, *TOKENS, "-k", 3, "--dtype", "float64", "--position", 3)
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
    out = ggjac_("compare", "-m", a, "--with", b, *TOKENS, "-k", 3).stdout
    for word in ("Singular values", "Principal angles", "b - a", "KL(a ‖ b)", "same top token at"):
        assert word in out


def test_compare_with_itself(tiny_file: TinyFile) -> None:
    model = tiny_file("gqa")
    data = content("compare", "-m", model, "--with", model, *TOKENS)["compare"]
    assert max(data["angles"]["left"] + data["angles"]["right"]) < 1e-4
    assert (data["kl"], data["top1_agreement"], data["output_distance"]) == (0, 1, 0)


def test_compare_refuses_other_models(tiny_file: TinyFile, tmp_path: Path) -> None:
    model = tiny_file("gqa")
    for other, words in (
        (tiny_file("plain"), r"blk.0.attn_k.weight: the first file has [32, 64], the second [64, 64]"),
        (tiny_file("tied"), "output.weight: the first file has [128, 64], the second no such tensor"),
    ):
        first = model if "attn_k" in words else tiny_file("plain")
        assert words in ggjac_("compare", "-m", first, "--with", other, *TOKENS, code=1).stderr
    assert "--with" in ggjac_("compare", "-m", model, *TOKENS, code=2).stderr
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    ggjac_("compare", "-m", model, "--with", broken, *TOKENS, code=1)


def test_compare_ends_with_3_when_the_sweeps_run_out(tiny_file: TinyFile) -> None:
    model = tiny_file("gqa")
    out = ggjac_("compare", "-m", model, "--with", model, *TOKENS, "--max-sweeps", 2, "--tol", "1e-7", code=3).stdout
    assert "NOT converged to 1e-07" in out
    assert tiny.options("gqa").layers == 2


def test_compare_has_one_model_at_a_time(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ggjac_("compare", "-m", tiny_file("gqa"), "--with", tiny_file("gqa", type="Q8_0"), *TOKENS)
    finally:
        gc.enable()
    assert len(opened) == 2


def test_compare_keeps_no_trace(tiny_file: TinyFile, tmp_path: Path) -> None:
    options = ["--with", tiny_file("gqa", type="Q8_0"), *TOKENS, "--trace", tmp_path / "trace"]
    assert "No such option '--trace'" in ggjac_("compare", "-m", tiny_file("gqa"), *options, code=2).stderr
    assert not (tmp_path / "trace").exists()
