"""The mean over prompts of the output position's own map: that of the maps of an independent model, the same bits."""

import json
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from helpers import distance, invoke, invoke_json
from safetensors.numpy import load_file, save_file

import ggjac
from ggjac import runs
from ggjac.model import PromptError
from ggjac.studies import Measure, means, shard_name, workers

PROMPTS = [[1 + i % 7, 2 + i, 3][: 2 + i % 2] for i in range(7)]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(means, "CHUNK", 2)  # only the process that asks looks at it


@pytest.fixture
def asked(tiny_file: Any) -> Measure:
    return ggjac.measure(ggjac.open_model(tiny_file("gqa"), threads=1, dtype="float64"), "jacobian", mean=True)


@pytest.fixture
def expected(asked: Measure, tmp_path: Path) -> bytes:
    ggjac.mean_map(PROMPTS, asked, tmp_path / "expected.safetensors")
    return (tmp_path / "expected.safetensors").read_bytes()


def test_the_mean_is_that_of_an_independent_model(asked: Measure, tiny_file: Any, tmp_path: Path) -> None:
    """Maps by autograd over the oracle, averages and spectra by NumPy; one prompt has no standard error."""
    known = oracle.load(tiny_file("gqa"))
    maps = [oracle.jacobian(known, ids, mlp_path="up").J[:, -1].numpy() for ids in PROMPTS]
    spectra = np.stack([np.linalg.svd(one, compute_uv=False) for one in maps])
    out = tmp_path / "mean.safetensors"
    found = ggjac.mean_map(PROMPTS, asked, out)
    assert distance(found.map, torch.from_numpy(np.mean(maps, 0))) < 1e-12
    saved = load_file(out)
    for name, values in {
        "S": spectra.mean(0),
        "error": spectra.std(0, ddof=1) / len(maps) ** 0.5,
        "S_of_mean": np.linalg.svd(np.mean(maps, 0), compute_uv=False),
    }.items():
        assert np.abs(saved[name] - values).max() < 1e-9 * spectra.max(), name
    assert saved["map"].tobytes() == found.map.numpy().tobytes()
    assert (found.prompts, found.failed) == (7, 0)
    share = np.linalg.norm(np.mean(maps, 0)) ** 2 / np.mean([np.linalg.norm(one) ** 2 for one in maps])
    assert abs(found.shared / share - 1) < 1e-12
    one = ggjac.mean_map(PROMPTS[:1], asked, out)
    assert abs(one.shared - 1) < 1e-12
    assert one.data()["singular_values"][0]["error"] is None
    assert len(one.table().columns["mean"]) == len(maps[0])


class Backwards(Executor):
    """Finishes tasks in the reverse order."""

    def __init__(self) -> None:
        self.tasks: list[tuple[Future, Callable[[], Any]]] = []

    def submit(self, function: Callable, /, *args: Any, **options: Any) -> Future:
        future: Future = Future()
        self.tasks.append((future, lambda: function(*args, **options)))
        if len(self.tasks) == 4:
            for waiting, task in reversed(self.tasks):
                waiting.set_result(task())
        return future


def test_the_same_bits_on_any_workers_and_shards(asked: Measure, expected: bytes, tmp_path: Path) -> None:
    out, counts = tmp_path / "mean.safetensors", list[int]()
    ggjac.mean_map(
        [*PROMPTS, PROMPTS[3]], asked, out, Backwards(), progress=lambda what, done, total: counts.append(done)
    )
    assert out.read_bytes() == expected
    assert counts[-1] == 7
    assert len(counts) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"mean.safetensors", "expected.safetensors"}
    ggjac.mean_map(PROMPTS, asked, out, lambda: workers.processes(2))
    assert out.read_bytes() == expected
    for i in (2, 0, 1):
        ggjac.mean_map(PROMPTS, asked, tmp_path / "part.safetensors", shard=(i, 3))
    parts = sorted(tmp_path.glob("part-*-of-4.safetensors"))
    assert parts == [shard_name(tmp_path / "part.safetensors", i, 4) for i in range(4)]
    assert "7 prompts, all checks passed" in invoke("merge", *reversed(parts), "-o", out).stdout
    assert out.read_bytes() == expected


def test_another_measure_is_refused(asked: Measure, tmp_path: Path) -> None:
    for measure in (ggjac.measure(asked.model, "svd"), ggjac.measure(asked.model, "jacobian")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"give ggjac.measure\(model, 'jacobian', mean=True\)"):
            ggjac.mean_map(PROMPTS, measure, tmp_path / "mean.safetensors")


def test_an_interrupted_mean_is_continued(asked: Measure, expected: bytes, tmp_path: Path) -> None:
    out, calls = tmp_path / "mean.safetensors", list[int]()

    def interrupt(what: str, done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        ggjac.mean_map(PROMPTS, asked, out, progress=interrupt)
    assert "the same command continues" in caught.value.__notes__[0]
    assert not out.exists()
    other = replace(asked, session={"mlp_path": "gate"})
    for prompts, measure in ((PROMPTS, other), (PROMPTS[::-1], asked)):
        with pytest.raises(runs.RunError, match=r"mean-00-of-4.safetensors: has other prompts or settings; choose"):
            ggjac.mean_map(prompts, measure, out)
    with ThreadPoolExecutor(2) as pool:
        ggjac.mean_map(PROMPTS, asked, out, pool, progress=interrupt)
    assert calls in ([2, 4, 6, 7], [2, 4, 5, 7])
    assert out.read_bytes() == expected


def test_a_prompt_that_cannot_run_is_quoted(asked: Measure, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"\[1, 99999\]: .*99999"):
        ggjac.mean_map([[1, 2], [1, 2, 3], [1, 99999]], asked, tmp_path / "mean.safetensors")
    assert (tmp_path / "mean-00-of-2.safetensors").exists()


def test_what_does_not_make_up_a_mean_is_named(asked: Measure, tmp_path: Path) -> None:
    whole, out = tmp_path / "mean.safetensors", tmp_path / "all.safetensors"
    for i in range(4):
        ggjac.mean_map(PROMPTS, asked, whole, shard=(i, 4))
    parts = [shard_name(whole, i, 4) for i in range(4)]

    def refusal(*files: Path) -> str:
        err = invoke("merge", *files, "-o", out, code=1).stderr
        assert not out.exists()
        return err

    assert "2 of 4 parts are missing (numbers 0, 2, from 0); run their shards again" in refusal(parts[1], parts[3])
    assert f"{parts[1]}: is the same part as {parts[1]}; give each once" in refusal(*parts, parts[1])
    ggjac.mean_map(PROMPTS[:6], asked, tmp_path / "other.safetensors", shard=(0, 2))
    other = tmp_path / "other-00-of-3.safetensors"
    assert f"{other}: has other prompts or settings than {parts[0]}" in refusal(*parts, other)
    with pytest.raises(PromptError, match="shard 4/4 has no chunk of 2 prompts: there are 4; take"):
        ggjac.mean_map(PROMPTS, asked, whole, shard=(4, 4))
    facts = {"settings": {}, "prompts": "", "chunks": 1, "chunk": 0, "d": 2}
    sums = {"map": np.zeros((2, 2)), "S": np.zeros(2), "squares": np.zeros(2), "counts": np.array([1, 0])}
    for change, tensors in (
        ({"chunk": 1}, sums),
        ({"chunk": "0"}, sums),
        ({"chunks": 1e9}, sums),
        ({"settings": 3}, sums),
        ({"d": 3}, sums),
        ({}, sums | {"map": np.zeros((2, 2), np.float32)}),
        ({}, sums | {"S": np.zeros((2, 1))}),
        ({}, sums | {"more": np.zeros(2)}),
    ):
        save_file(tensors, other, {"ggjac": json.dumps(facts | change)})
        assert f"{other}: does not have the sums of some prompts" in refusal(other)
    save_file(sums, other, {"ggjac": json.dumps(facts)})
    assert "has no digest" in refusal(other)
    other.write_text("not a file of tensors")
    assert "does not have the sums of some prompts" in refusal(other)
    assert "is one of the files" in invoke("merge", *parts, "-o", parts[0], code=1).stderr
    assert "-f is for JSON lines" in invoke("merge", *parts, "-o", out, "-f", other, code=2).stderr


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "mean.safetensors"
    file.write_text("The capital of France is\nThe color of snow is\n\nThe sky is\n")
    args = ["jacobian", "-t", 1, "-f", file, "--mean", "-o", out]
    shown = invoke(*args).stdout
    assert "3 prompts, all checks passed" in shown
    assert f"Saved {out}" in shown
    found = invoke_json(*args)["mean"]
    values = [value["mean"] for value in found["singular_values"]]
    assert values == load_file(out)["S"].tolist()
    assert found["settings"]["position"] == -1
    assert invoke(*args, "--format", "csv").stdout.startswith("mean,standard error,of the mean map\n")
    assert "3 prompts of up to 6 tokens" in invoke(*args, "--dry-run", "--no-bench").stdout
    shown = invoke(*args, "--shard", "1/2").stdout
    assert "1 prompt, all checks passed" in shown
    assert "ggjac merge makes the mean" in shown
    monkeypatch.setattr("ggjac.jacobian.detached.HEALTHY", {torch.float32: 0.0})
    assert "3 of 3 prompts FAILED a check" in invoke(*args[:-1], tmp_path / "bad.safetensors", code=3).stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--mean"], "--mean saves a map; name a safetensors file with -o"),
        (["--workers", 2], "--workers needs many prompts; add --mean"),
        (["--mean", "-o", "OUT", "--resume"], "--resume is not for --mean: the same command continues"),
        (["--mean", "-o", "OUT", "--trace", "T"], "--trace is not for --mean"),
    ],
)
def test_what_does_not_go_together_is_refused(args: list[Any], message: str, tmp_path: Path) -> None:
    args = [tmp_path / "out" if arg == "OUT" else arg for arg in args]
    assert message in invoke("jacobian", *args, "-t", 1, "--tokens", "1,2", code=2).stderr
    assert not list(tmp_path.iterdir())
