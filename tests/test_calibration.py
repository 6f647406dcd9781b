"""The z of decoded tokens against sampled random directions, and against brute force over dense SVDs of the oracle."""

import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import oracle
import pytest
import scipy.integrate
import scipy.stats
import tiny
import torch
from helpers import IDS, head_of, invoke, invoke_json
from torch.nn.functional import normalize

from ggjac import session, ways
from ggjac.analysis.layers import layers
from ggjac.analysis.per_token import per_token
from ggjac.analysis.svd import spectrum
from ggjac.calibration import calibrate, expected_maximum
from ggjac.decode import top_logits
from ggjac.jacobian import SharedSweep
from ggjac.linop import Matrix
from ggjac.model import open_model
from ggjac.neutral import NEUTRAL
from ggjac.sizes import RANDOM_SUBSPACES

EXACT: dict[str, Any] = {"tol": 1e-9, "max_sweeps": 200}


def test_z_is_that_of_sampled_directions() -> None:
    """The standard deviation of a token's score over random unit vectors, which top_logits has in closed form."""
    generator = torch.Generator().manual_seed(0)
    d, sizes = 12, torch.tensor([0.1, 1.0, 7.0, 0.0])
    W = normalize(torch.randn(4, d, generator=generator, dtype=torch.float64), dim=1) * sizes[:, None]
    directions = normalize(torch.randn(200_000, d, generator=generator, dtype=torch.float64), dim=1)
    deviations = (directions @ W.T).std(0)
    Y = torch.randn(3, d, generator=generator, dtype=torch.float64)
    found = top_logits(Matrix(W), normalize(Y, dim=1), 4)
    assert found.z is not None
    for ids, scores, zs in zip(found.ids, found.scores, found.z, strict=True):
        for i, score, z in zip(ids.tolist(), scores.tolist(), zs.tolist(), strict=True):
            assert z == (pytest.approx(score / float(deviations[i]), rel=0.01) if sizes[i] else 0)
    longer = top_logits(Matrix(W), 5 * normalize(Y, dim=1), 4)
    assert longer.z is not None
    assert torch.allclose(longer.z, found.z)
    assert found.part(1).z is not None
    assert torch.equal(found.part(slice(1, 3)).ids, found.ids[1:3])


@pytest.mark.parametrize("count", [100, 49_152, 262_144])
def test_the_expected_maximum_is_that_of_independent_numbers(count: int) -> None:
    normal = scipy.stats.norm

    def above(x: float) -> float:
        return 1 - math.exp(count * normal.logcdf(x)) - math.exp(count * normal.logcdf(-x))

    integral, _ = scipy.integrate.quad(above, 0, 12, limit=200)  # E[max] = ∫ P(max > x) - P(max < -x)
    assert expected_maximum(count) == pytest.approx(integral, rel=0.02)
    assert expected_maximum(1) == 0


@pytest.mark.parametrize("exclude", [[], [0]])
@pytest.mark.parametrize("case", ["gqa", "biases", "gemma2"])
def test_scores_are_compared_as_brute_force_does(case: str, exclude: list[int], tiny_files: dict[str, Path]) -> None:
    model, known = open_model(tiny_files[case], dtype="float64"), oracle.load(tiny_files[case])
    prompts = [tiny.prompt(case, n)[::step] for n, step in ((5, 1), (5, -1), (4, 1))]
    maps = (model.trace(ids).jacobian(exclude=exclude) for ids in prompts)
    found = calibrate(maps, 2, **EXACT)
    vectors = []
    for ids in prompts:
        dense = oracle.jacobian(known, ids, mlp_path="up")
        rest = dense.J.index_fill(1, torch.tensor(exclude, dtype=torch.long), 0.0)
        U = torch.linalg.svd(rest.flatten(1), full_matrices=False)[0].T[:2]
        vectors.append(U * torch.sign(U @ torch.einsum("end,nd->e", rest, dense.x))[:, None])
    expected = torch.stack(vectors)
    assert torch.allclose(found.vectors, expected, rtol=0, atol=1e-6)
    scores = (head_of(known.weights) @ expected.flatten(0, 1).T).numpy()  # [v, p k]
    found_here = spectrum(model.trace(IDS).jacobian(exclude=exclude), 2, top=3, calibration=found, **EXACT)
    assert found_here.z_prompts is not None
    here = found_here.left
    z = (here.scores.numpy() - scores.mean(1)[here.ids]) / scores.std(1, ddof=1)[here.ids]
    assert np.allclose(found_here.z_prompts, z, rtol=1e-4, atol=1e-4)
    own = []
    for p, j in itertools.product(range(3), range(2)):
        others = np.delete(scores, [2 * p, 2 * p + 1], axis=1)
        best = scores[:, 2 * p + j].argmax()
        own.append((scores[best, 2 * p + j] - others[best].mean()) / others[best].std(ddof=1))
    assert np.allclose(found.own.z.flatten(), own, rtol=1e-4, atol=1e-4)
    best = np.reshape(own, (3, 2)).max(1)
    assert found.own.data() == {
        "vectors": 6,
        "median": pytest.approx(np.median(own), rel=1e-4),
        "p95": pytest.approx(np.quantile(own, 0.95), rel=1e-4),
        "largest": {
            "of": 2,
            "groups": 3,
            "median": pytest.approx(np.median(best), rel=1e-4),
            "p95": pytest.approx(np.quantile(best, 0.95), rel=1e-4),
        },
    }
    assert found.random.data()["vectors"] == 2 * RANDOM_SUBSPACES
    data = found_here.data()
    assert data["calibration"]["prompts"] == 3
    token = data["triplets"][1]["left"][2]
    assert token["z_prompts"] == pytest.approx(z[1, 2], rel=1e-4)
    assert token["z"] == pytest.approx(float(found_here.left.z[1, 2]))
    table = found_here.table()
    assert table.columns["z prompts"][1][2] == token["z_prompts"]
    assert "z 1" in found_here.sheet().to_csv().splitlines()[0]


def test_random_subspaces_are_those_of_equal_rank(tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One of their vectors is a random direction; the best of all of them is more, as of bases that numpy draws."""
    monkeypatch.setattr("ggjac.calibration.RANDOM_SUBSPACES", 1000)
    model, known, rank = open_model(tiny_files["gqa"], dtype="float64"), oracle.load(tiny_files["gqa"]), 6
    maps = (model.trace(ids).jacobian() for ids in (IDS, IDS[::-1]))
    found = calibrate(maps, rank, tol=0.5).random.z.numpy()
    assert found.shape == (1000, rank)
    head = head_of(known.weights).numpy()
    rows = head / np.linalg.norm(head, axis=1, keepdims=True)
    draw = np.random.default_rng(1)

    def first(vectors: np.ndarray) -> np.ndarray:
        best = (vectors @ head.T).argmax(-1)
        return (vectors * rows[best]).sum(-1) * head.shape[1] ** 0.5

    directions = draw.standard_normal((2000, head.shape[1]))
    single = first(directions / np.linalg.norm(directions, axis=1, keepdims=True))
    bases = np.linalg.qr(draw.standard_normal((1000, head.shape[1], rank)))[0].swapaxes(1, 2)
    assert scipy.stats.ks_2samp(found[:, 0], single).pvalue > 0.01
    assert scipy.stats.ks_2samp(found.max(1), first(bases).max(1)).pvalue > 0.01
    assert scipy.stats.ks_2samp(found.max(1), single).pvalue < 1e-9


def test_special_tokens_are_no_first_tokens(tiny_files: dict[str, Path]) -> None:
    path = tiny_files["tokenizer"]
    model, known = open_model(path, dtype="float64"), oracle.load(path)
    kinds = gguf.GGUFReader(path).fields["tokenizer.ggml.token_type"].contents()
    special = [i for i, kind in enumerate(kinds) if kind in (3, 5, 6)]  # control, unused, byte
    hidden, every = (
        calibrate((model.trace(ids).jacobian() for ids in ([5, 9, 7], [11, 6, 8], [9, 5])), 2, hide_special=hide)
        for hide in (True, False)
    )
    scores = head_of(known.weights) @ hidden.vectors.double().flatten(0, 1).T
    best = scores.index_fill(0, torch.tensor(special), -torch.inf).argmax(0).tolist()
    assert best != scores.argmax(0).tolist()
    for j, (id, z) in enumerate(zip(best, hidden.own.z.flatten().tolist(), strict=True)):
        others = scores[id, [i for i in range(6) if i // 2 != j // 2]]
        assert z == pytest.approx(float((scores[id, j] - others.mean()) / others.std()), rel=1e-4)
    assert not torch.equal(hidden.own.z, every.own.z)


def test_other_maps_have_the_z_of_random_directions(tiny_files: dict[str, Path]) -> None:
    """Nothing else is compared: they are of another kind than the joint maps of whole prompts."""
    model = open_model(tiny_files["gqa"])
    J = model.trace(IDS).jacobian()
    head = torch.cat([tile.clone() for *_, tile in model.head.matrix.tiles()])
    for row, U in (
        *((one.data()["triplets"][0]["left"][0], one.svd.U[0]) for one in per_token(J, 1)),
        *((one.data()["triplets"][0]["left"][0], one.U[0]) for one in layers(J, 1, kinds=["layer"]).maps),
    ):
        w = head[row["id"]]
        assert row["z"] == pytest.approx(float(w @ U / w.norm()) * len(w) ** 0.5, rel=1e-5)
        assert "z_prompts" not in row


def test_one_prompt_is_none_to_compare(tiny_files: dict[str, Path]) -> None:
    trace = open_model(tiny_files["gqa"]).trace(IDS)
    with pytest.raises(ValueError, match="at least two prompts, not 1"):
        calibrate([trace.jacobian()], 1)
    with pytest.raises(ValueError, match="two prompts with one vector each are too few"):
        calibrate([trace.jacobian(), trace.jacobian(1)], 1)


# ---- the command


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([NEUTRAL[0], "", NEUTRAL[3], NEUTRAL[13]]))
    return path


def test_the_command_says_what_it_compares_with(prompts: Path) -> None:
    given = (
        "svd",
        "-q",
        "-t",
        1,
        "-k",
        2,
        "--tol",
        0.1,
        "--top",
        3,
        "-p",
        "The capital of France is",
        "--calibrate",
        prompts,
    )
    result = invoke_json(*given)
    found = result["svd"]
    about = found["calibration"]
    assert about["prompts"] == 3
    assert about["own"]["vectors"] == 6
    assert about["tokens"] == 2544
    shown = invoke(*given).stdout
    first = found["triplets"][0]["left"][0]
    assert f"{first['z']:.1f}" in shown
    assert f"{first['z_prompts']:.1f}" in shown
    assert "6 leading vectors of 3 unrelated prompts" in shown
    assert f"median {about['own']['median']:.1f}, 95% below {about['own']['p95']:.1f}" in shown
    largest = about["random"]["largest"]
    assert f"of rank 2: median {largest['median']:.1f}, 95% below {largest['p95']:.1f}" in shown
    assert about["random"]["median"] < largest["median"]
    page = prompts.with_suffix(".json")
    page.write_text(json.dumps(result), encoding="utf-8")
    invoke("report", page)
    source = page.with_suffix(".html").read_text(encoding="utf-8")
    assert f'<td role="cell" class="n z">{first["z_prompts"]:.1f}</td>' in source
    assert "of 6 leading vectors of 3 unrelated prompts, from their mean. Of these themselves, the first" in source
    assert f"of the largest of 2 in each of 32 random subspaces the median is {largest['median']:.1f}, and" in source
    alone = invoke_json(*given[:-2])["svd"]
    assert alone["calibration"] == {key: about[key] for key in ("tokens", "expected_maximum")}
    stripped = [{key: each[key] for key in each if key != "z_prompts"} for each in found["triplets"][0]["left"]]
    assert alone["triplets"][0]["left"] == stripped
    folder = prompts.with_suffix(".run")
    assert invoke_json("analyze", *given[1:], "--no-verify", "-o", folder)["svd"] == found
    assert invoke_json("analyze", *given[1:], "--no-verify", "-o", folder, "--resume")["svd"] == found
    other = invoke("analyze", *given[1:-1], "neutral", "--no-verify", "-o", folder, "--resume", code=1).stderr
    assert "is finished, with calibrate ['" in other
    plan = invoke_json("svd", "-k", 1, "--calibrate", "neutral", "--dry-run", "--no-bench")
    passes = next(step for step in plan["sweeps"] if step["what"] == "calibration: forward passes")
    assert passes["count"] == len(NEUTRAL)


@pytest.mark.parametrize(
    ("options", "text", "words"),
    [
        (["--calibrate", "nothing.txt"], None, "there is no file nothing.txt; give one with a prompt on each line"),
        (["--calibrate", "FILE"], "one", "has one prompt; at least two are compared"),
        (["--calibrate", "FILE"], "\n \n", "has no prompt; write one on each line"),
        (["--calibrate", "FILE", "-k", "1"], "A\nB", "give three, or a larger rank"),
        (["--calibrate", "FILE", "--exclude", "6"], "The old house\nThe end", "calibrate with, The old house"),
        (["--calibrate", "neutral", "--each-line", "-o", "OUT"], None, "--calibrate is not for --each-line"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    options: list[str], text: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("FILE").write_text(text)
    prompt = ["svd", "-p", "The capital of France is not in the"]
    assert words in invoke(*prompt, *options, code=2).stderr
    if "--exclude" not in options:  # its plan refuses it in other words
        assert words in invoke(*prompt, *options, "--dry-run", "--no-bench", code=2).stderr


@pytest.mark.parametrize("command", [["svd"], ["analyze", "--no-verify", "-o", "run"]], ids=["svd", "analyze"])
def test_the_work_is_what_the_plan_counts(
    command: list[str], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("EXPECTED_SWEEPS", "NARROW_SWEEPS"):
        monkeypatch.setattr(ways, expected, 3)
    prompts.write_text(f"{NEUTRAL[0]}\n{NEUTRAL[0][::-1][::-1]} of")
    given = [*command, "-t", 1, "-k", 2, "--tol", "1e-30", "--max-sweeps", 3]
    seen: Counter[int] = Counter()
    for side in ("up", "down"):
        whole = getattr(SharedSweep, side)

        def product(self: SharedSweep, stacks: list, *rest: Any, true: Any = whole) -> Any:
            seen[sum(map(len, stacks))] += 1
            return true(self, stacks, *rest)

        monkeypatch.setattr(SharedSweep, side, product)
    invoke(*given, code=3)
    alone = seen.copy()
    shutil.rmtree("run", ignore_errors=True)
    seen.clear()
    given += ["--calibrate", prompts]
    invoke(*given, code=3)
    planned = invoke_json(*given, "--dry-run", "--no-bench")
    counted: Counter[int] = Counter()
    for step in planned["sweeps"]:
        if step["what"].startswith("calibration: ") and "forward" not in step["what"]:
            counted[step["vectors"]] += step["count"]
    assert seen - alone == counted
    assert {step["what"] for step in planned["sweeps"]} >= {"calibration: forward passes", "calibration: signs"}


def test_a_resumed_run_has_the_same_vectors(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CHECKPOINT_SECONDS", 0.0)
    out = tmp_path / "svd.safetensors"
    given = ["svd", "-q", "-t", 1, "-k", 1, "--tol", 0.3, "--calibrate", prompts, "-o", out, "--format", "json"]
    whole, calls = SharedSweep._walk, itertools.count()

    def interrupted(self: SharedSweep, *rest: Any) -> Any:
        if next(calls) == 7:  # a sweep of the second prompt
            raise KeyboardInterrupt
        yield from whole(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(SharedSweep, "_walk", interrupted)
        invoke(*given, code=130)
    before = prompts.read_text()
    prompts.write_text(before.replace("The", "A"))
    assert "calibrate: this run was started with" in invoke(*given, "--resume", code=1).stderr
    prompts.write_text(before)
    resumed = json.loads(invoke(*given, "--resume").stdout)
    assert resumed["svd"] == json.loads(invoke(*given).stdout)["svd"]
