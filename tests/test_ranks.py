"""Stable ranks of every token's map against dense arithmetic, and the file of JSON lines that remembers them."""

import json
import math
import os
import re
import weakref
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny
import torch
from helpers import invoke, invoke_json
from torch import Tensor

from ggjac import runs, ways
from ggjac.analysis import ranks as module
from ggjac.analysis.ranks import token_ranks
from ggjac.model import Model, PromptError, Trace, open_model
from ggjac.planner import Plan
from ggjac.runs import lock
from ggjac.session import Session
from ggjac.studies import ranks
from ggjac.weights import WeightStore


def exact(J: Tensor) -> float:
    S = torch.linalg.svdvals(J)
    return float((S / S[0]).square().sum())


# ---- the numbers


@pytest.mark.parametrize(("method", "at_once"), [("sweeps", None), ("sweeps", 7), ("matrix", None)])
@pytest.mark.parametrize("position", [-1, 2])
@pytest.mark.parametrize("case", ["three_layers", "biases", "gemma2"])
def test_every_tokens_map_is_that_of_autograd(
    case: str,
    position: int,
    method: str,
    at_once: int | None,
    tiny_files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if method == "matrix":
        monkeypatch.setattr(ways, "WORTH", -math.inf)
    ids = tiny.prompt(case, 5)
    J = open_model(tiny_files[case], dtype="float64").trace(ids).jacobian(position)
    expected = oracle.jacobian(tiny_files[case], ids, mlp_path="up", position=position).J
    found = token_ranks(J, tol=1e-8, max_sweeps=200, at_once=at_once)
    assert found.method == method
    assert len(found.tokens) == position % 5 + 1
    for i, rank in enumerate(found.tokens):
        assert rank.value == pytest.approx(exact(expected[:, i]), rel=1e-10)
        assert rank.frobenius == pytest.approx(float(expected[:, i].norm()), rel=1e-10)
        assert rank.error == 0
    assert found.joint.value == pytest.approx(exact(expected.flatten(1)), rel=1e-10)
    assert found.residual <= 1e-8
    assert found.stopped_by in ("tolerance", "complete")


def test_a_rough_search_leaves_no_trace(tiny_files: dict[str, Path]) -> None:
    ids = tiny.prompt("gqa", 5)
    expected = oracle.jacobian(tiny_files["gqa"], ids, mlp_path="up").J
    found = token_ranks(
        open_model(tiny_files["gqa"]).trace(ids).jacobian(), tol=1e-4, search_dtype=torch.bfloat16, at_once=20
    )
    assert 0 < found.rough_sweeps < found.sweeps
    assert found.residual <= 1e-4
    for i, rank in enumerate(found.tokens):
        assert rank.value == pytest.approx(exact(expected[:, i]), rel=1e-5)
    assert found.joint.value == pytest.approx(exact(expected.flatten(1)), rel=1e-5)


def test_estimates_are_near_and_seeded(tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_ROWS", 0)
    ids = tiny.prompt("gqa", 5)
    J = open_model(tiny_files["gqa"], dtype="float64").trace(ids).jacobian()
    expected = oracle.jacobian(tiny_files["gqa"], ids, mlp_path="up").J
    found, again, other = (token_ranks(J, probes=64, seed=seed, at_once=50) for seed in (1, 1, 2))
    assert found == again
    assert abs(found.joint.value - other.joint.value) > 1e-3  # other probes, not only other rounding
    for i, rank in enumerate(found.tokens):
        assert 0 < rank.error < 0.5 * rank.value
        assert abs(rank.value - exact(expected[:, i])) < 5 * rank.error
    assert abs(found.joint.value - exact(expected.flatten(1))) < 5 * found.joint.error


def test_all_tokens_share_their_sweeps(tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files["gqa"])
    J = model.trace(tiny.prompt("gqa", 6)).jacobian()
    model.weights.reads.clear()
    found = token_ranks(J)
    name = "blk.0.ffn_down.weight"
    assert model.weights.reads[name] == (found.sweeps + 1) * model.gguf.tensors[name].rows  # dense rows: one more


def test_sweeps_that_ran_out_are_told(tiny_files: dict[str, Path]) -> None:
    J = open_model(tiny_files["gqa"]).trace(tiny.prompt("gqa", 5)).jacobian()
    found = token_ranks(J, tol=1e-6, max_sweeps=2)
    assert (found.stopped_by, found.sweeps) == ("sweeps", 2)
    assert found.residual > 1e-6


# ---- the command


LINES = ["The bridge out of Marin is the", "The capital of France is", "The color of snow is"]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the lengths of the prompts that are analysed."""
    seen: list[int] = []
    true = module.token_ranks

    def count(jacobian: Any, **options: Any) -> Any:
        seen.append(len(jacobian.ids))
        return true(jacobian, **options)

    monkeypatch.setattr(module, "token_ranks", count)
    return seen


def test_a_file_of_prompts(tmp_path: Path, counted: list[int]) -> None:
    """Each line once, blank ones not at all; a second run adds what is new, and the numbers are the library's."""
    file, out = tmp_path / "prompts.txt", tmp_path / "ranks.jsonl"
    file.write_bytes("\r\n".join([LINES[0], "", LINES[1], "  ", LINES[0]]).encode())
    result = invoke("ranks", "-t", 1, "-f", file, "-o", out)
    assert counted == [8, 6]
    assert all(word in result.stdout for word in ("␣Golden", "␣Paris", "Stable rank by token index", "all converged"))
    assert "█" * 24 in result.stdout, "the largest mean"
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["prompt"] for record in records] == LINES[:2]
    before = {line.rpartition(b', "study"')[0] for line in out.read_bytes().splitlines()}

    file.write_text("\n".join(reversed(LINES)))
    result = invoke("ranks", "-t", 1, "-f", file, "-o", out, "--format", "json")
    assert counted == [8, 6, 6]
    after = [line.rpartition(b', "study"')[0] for line in out.read_bytes().splitlines()]
    assert before == set(after[1:])  # in the order of the file of prompts
    assert [json.loads(line)["prompt"] for line in out.read_bytes().splitlines()] == LINES[::-1]
    content = json.loads(result.stdout)
    assert "prompt" not in content
    given = content["ranks"]["prompts"]
    assert [record["prompt"] for record in given] == LINES[::-1]  # in the order of the file
    model: Model = open_model()
    for record in given:
        trace: Trace = model.trace(record["prompt"])
        found = token_ranks(trace.jacobian())
        assert [t["id"] for t in record["tokens"]] == trace.ids
        values = [t["stable_rank"]["value"] for t in record["tokens"]]
        assert values == pytest.approx([rank.value for rank in found.tokens], rel=1e-4)
        assert record["joint"]["value"] == pytest.approx(found.joint.value, rel=1e-4)
        assert record["next"]["id"] == int(trace.logits.argmax())
        assert record["reconstruction"]["healthy"]
    first = content["ranks"]["by_position"][0]
    values = [record["tokens"][0]["stable_rank"]["value"] for record in given]
    assert first["mean"] == pytest.approx(sum(values) / 3)
    assert (first["prompts"], first["least"], first["most"]) == (3, min(values), max(values))
    assert first["median"] == sorted(values)[1]
    assert [p["prompts"] for p in content["ranks"]["by_position"]] == [3] * 6 + [1] * 2
    assert content["ranks"]["by_position"][-1]["error"] is None


def test_what_an_interruption_left_is_gone_on_with(
    tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a line, or stopped between two: the file ends as one run would have left it."""
    file, whole, out = tmp_path / "prompts.txt", tmp_path / "whole.jsonl", tmp_path / "ranks.jsonl"
    file.write_text("\n".join(LINES[1:]))
    invoke("ranks", "-t", 1, "-f", file, "-o", whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    for left in (b"", lines[0][:40], lines[0], lines[0] + lines[1][:-1]):
        out.write_bytes(left)
        counted.clear()
        invoke("ranks", "-t", 1, "-f", file, "-o", out)
        assert len(counted) == 2 - left.count(b"\n")
        assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("kept", [True, False])
def test_an_interruption_says_what_is_kept(kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "ranks.jsonl"
    file.write_text("\n".join(LINES))
    original, seen = module.token_ranks, list[int]()

    def interrupted(jacobian: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) > 1:
            raise KeyboardInterrupt
        return original(jacobian, **options)

    monkeypatch.setattr(module, "token_ranks", interrupted)
    err = invoke("ranks", "-t", 1, "-f", file, *(("-o", out) if kept else ()), code=130).stderr
    assert ("ranks.jsonl: the same command continues with the others" in err) == kept
    assert ("no partial files were left" in err) == (not kept)
    assert not kept or len(out.read_bytes().splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value"), [("dtype", "float64"), ("mlp-path", "gate"), ("tol", "1e-4"), ("seed", "5")]
)
def test_results_of_another_kind_are_not_mixed(option: str, value: str, tmp_path: Path) -> None:
    out = tmp_path / "ranks.jsonl"
    invoke("ranks", "-t", 1, "--tokens", "0,465", "-o", out)
    before = out.read_bytes()
    err = invoke("ranks", "-t", 1, "--tokens", "0,465,637", "-o", out, f"--{option}", value, code=1).stderr
    assert f"--{option}: line 1 was made with" in err
    assert err.count("\n") == 1
    assert out.read_bytes() == before


BEGINNING = '{"schema_version": 2, "prompt": "x", '


@pytest.mark.parametrize("newline", ["\n", ""])
@pytest.mark.parametrize(
    "content",
    [
        *("The capital of France is", "{}", "[]", '{"prompt": 1}', "\xff", '{"schema_version": 1, "model": "x"}'),
        '{"schema_version": 2, "results": [',
        *(BEGINNING + rest + "\n" for rest in ('"settings": []}', '"settings": 1, "tokens": []}', '"tokens": [1]}')),
        BEGINNING + '"settings": {}, "tokens": []}\n',  # of an older version, say
        BEGINNING + "[" * 99999 + "\n",
    ],
    ids=range(12),
)
def test_a_file_of_something_else_is_left_alone(content: str, newline: str, tmp_path: Path) -> None:
    content += newline
    out = tmp_path / "mine.txt"
    out.write_bytes(content.encode("latin-1"))
    err = invoke("ranks", "-t", 1, "--tokens", "0,465", "-o", out, code=1).stderr
    assert "line 1 is not a result of this command; choose another -o" in err
    assert out.read_bytes() == content.encode("latin-1")


def test_results_of_another_version_are_named_as_such(tmp_path: Path) -> None:
    out = tmp_path / "ranks.jsonl"
    invoke("ranks", "-t", 1, "--tokens", "0,465", "-o", out)
    now = out.read_bytes()
    for then in (b'"schema_version": 1,', b'"schema_version": 7,'):
        old = now.replace(b'"schema_version": 2,', then, 1)
        for line, content in ((1, old), (1, old + now), (2, now + old)):
            out.write_bytes(content)
            err = invoke("ranks", "-t", 1, "--tokens", "0,465,637", "-o", out, code=1).stderr
            said = f"line {line} was written by another version of ggjac (schema version {then.decode()[-2]}; this one"
            assert said in err
            assert "choose another -o" in err
            assert out.read_bytes() == content


def test_what_follows_the_records_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "ranks.jsonl"
    invoke("ranks", "-t", 1, "--tokens", "0,465", "-o", out)
    whole = out.read_bytes()
    for rest in (b"my own notes", b"\n", b'{"prompt": 1}', b"x\n"):
        out.write_bytes(whole + rest)
        err = invoke("ranks", "-t", 1, "--tokens", "0,465,637", "-o", out, code=1).stderr
        assert "line 2 is not a result of this command; choose another -o" in err
        assert out.read_bytes() == whole + rest
    assert "is a folder" in invoke("ranks", "-t", 1, "--tokens", "0,465", "-o", tmp_path, code=1).stderr


def test_more_sweeps_are_another_attempt(tmp_path: Path, counted: list[int]) -> None:
    """A prompt whose sweeps ran out is done again where more are allowed, and only there; the newest result counts."""
    out = tmp_path / "ranks.jsonl"
    args = ["--tokens", "0,465", "--tol", "1e-6", "-o", out, "--format", "json"]
    for sweeps, code, times in ((2, 3, 1), (2, 3, 1), (3, 3, 2), (40, 0, 3), (40, 0, 3), (2, 0, 3)):
        (record,) = json.loads(invoke("ranks", "-t", 1, *args, "--max-sweeps", sweeps, code=code).stdout)["ranks"][
            "prompts"
        ]
        assert len(counted) == times
        assert (record["stopped_by"] == "sweeps") == (code == 3)
        assert len(out.read_bytes().splitlines()) == 1


def test_one_process_at_a_time_appends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From before the file is read until its last line is there, by whatever name; nothing is left of the lock."""
    out, link = tmp_path / "ranks.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(out)
    busy = f"another ggjac process (pid {os.getpid()}) is working in"
    with lock.alone(out):
        for path in (out, link):
            err = invoke("ranks", "-t", 1, "--tokens", "0,465", "-o", path, code=1).stderr
            assert f"{busy} {path}; wait for it or choose another -o" in err
            assert err.count("\n") == 1
    assert not out.exists()

    def measured(*args: Any, **options: Any) -> Any:
        with pytest.raises(runs.JournalError, match=re.escape(f"{busy} {link}")), lock.alone(link):
            pass
        return token_ranks(*args, **options)

    monkeypatch.setattr(module, "token_ranks", measured)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(LINES[1:]))
    invoke("ranks", "-t", 1, "-f", file, "-o", out)
    assert len(out.read_bytes().splitlines()) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"ranks.jsonl", "link.jsonl", "prompts.txt"}


@pytest.mark.parametrize("tight", [False, True])
def test_layers_stay_ready_from_prompt_to_prompt(tight: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a shorter prompt would leave room for more of them."""
    stores: dict[int, WeightStore] = {}
    fit = Session.fit

    def fitted(self: Session, *given: Any, **options: Any) -> Plan:
        stores[id(self.model.weights)] = self.model.weights
        return fit(self, *given, **options)

    monkeypatch.setattr(Session, "fit", fitted)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(LINES))
    args = ["-f", file, "--format", "json"]
    plans = [json.loads(invoke("ranks", "-t", 1, *args, "--dry-run", "--no-bench").stdout)]
    size = plans[0]["layers"][-1]["dense_bytes"]
    if tight:
        args += ["--ram-budget", plans[0]["ram_needed"] + int(1.9 * size)]
        plans = [
            json.loads(invoke("ranks", "-t", 1, *args[2:], *prompt, "--dry-run", "--no-bench").stdout)
            for prompt in (args[:2], ["-p", LINES[1]])
        ]
        longest, short = (sum(layer["place"] == "dense" for layer in plan["layers"]) for plan in plans)
        assert 1 == longest < short
    invoke("ranks", "-t", 1, *args)
    (store,) = stores.values()
    name = f"blk.{len(plans[0]['layers']) - 1}.ffn_down.weight"
    # The first forward pass, and once for all sweeps and for the forward passes that follow.
    assert store.reads[name] == 2 * store.file.tensors[name].rows


def test_what_is_no_prompt_is_refused(tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "ranks.jsonl"
    file.write_text("\n \n")
    assert "has no prompt" in invoke("ranks", "-t", 1, "-f", file, "-o", out, code=2).stderr
    file.write_text("\n".join(LINES))
    assert (
        "--trace keeps the forward pass of one prompt"
        in invoke("ranks", "-t", 1, "-f", file, "--trace", tmp_path / "trace", code=2).stderr
    )
    file.write_text(f"{LINES[1]}\n{'the ' * 3000}\n{LINES[2]}")
    err = invoke("ranks", "-t", 1, "-f", file, "-o", out, code=2).stderr
    assert "context" in err
    assert len(err) < 600
    assert len(out.read_text().splitlines()) == 1  # what was done before is kept
    assert not (tmp_path / "trace").exists()


def test_sweeps_that_ran_out_are_exit_code_3() -> None:
    assert (
        "NOT converged: 1 of 1"
        in invoke("ranks", "-t", 1, "--tokens", "0,465", "--tol", 1e-7, "--max-sweeps", 2, code=3).stdout
    )


@pytest.mark.parametrize(("prompts", "message"), [([], "no prompt was given"), ("hi", "prompts is of type str")])
def test_prompts_are_a_list(tiny_file: Any, prompts: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        ranks(open_model(tiny_file("gqa")), prompts)


def test_a_result_keeps_no_model(tiny_file: Any) -> None:
    """Neither the weights nor the tapes of the last prompt: without a garbage collection they go with the model."""
    model = open_model(tiny_file("plain"), threads=1)
    gone = weakref.ref(model)
    found = ranks(model, [[1, 2], [3]], ram_budget="1GiB")
    del model
    assert gone() is None
    assert found.envelope["tokens"][0]["id"] == 3
    assert [len(record["tokens"]) for record in found.records] == [2, 1]


def test_a_prompt_that_may_be_meant_otherwise_is_said() -> None:
    found = invoke_json("ranks", "-q", "-p", "a\\n")
    assert [text for text in found["warnings"] if "-e reads" in text]
    assert "-e reads" in invoke("ranks", "-q", "-p", "a\\n").stdout
