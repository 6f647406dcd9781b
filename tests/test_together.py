"""Commands in two processes that share a model: one result, one message, and the same bits after a kill."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
import torch
from helpers import invoke
from safetensors.numpy import load_file

from ggjac.cli import together
from ggjac.gguf.hub import demo_path
from ggjac.planner import machine

SVD = "svd -k 3 -q --dtype float64 --tol 1e-6 --resume --format json -o two.safetensors"
# Runs a command of which a process may be told to die.
PROGRAM = Path(__file__).parents[1] / "tools" / "reliability" / "killed_ranks.py"


def together_run(folder: Path, *commands: str, die: str = "", attempt: int = 0) -> list[tuple[int, str, str]]:
    """Run a command in each of several processes, as torchrun starts them; return their exit codes, stdout, stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(len(commands)), "LOCAL_WORLD_SIZE": str(len(commands)), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": str(attempt)}
    started = [
        subprocess.Popen(
            [sys.executable, PROGRAM, "--child", die, *command.split()],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    try:
        if die.startswith("stop"):  # the first one ends by itself
            started[0].wait(120)
            started[1].kill()
        texts = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [(process.returncode, *text) for process, text in zip(started, texts, strict=True)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str, str]]]:
    """Return the folder of a run in two processes, and what it printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, together_run(folder, SVD, SVD)


def test_one_speaks_and_writes(undisturbed: tuple[Path, list[tuple[int, str, str]]], tmp_path: Path) -> None:
    folder, [(code, out, err), other] = undisturbed
    assert code == 0
    assert err == "Warning: --resume finds nothing to resume at two.safetensors: this run begins anew\n"
    assert other == (0, "", "")
    assert json.loads(out)["processes"] == 2
    assert [path.name for path in folder.iterdir()] == ["two.safetensors"]
    invoke(*SVD.replace("two.safetensors", str(tmp_path / "one.safetensors")).replace(" --resume", "").split())
    one, two = load_file(tmp_path / "one.safetensors"), load_file(folder / "two.safetensors")
    assert np.allclose(one["S"], two["S"], rtol=1e-12, atol=0)
    assert np.allclose(one["U"], two["U"], rtol=0, atol=1e-9)


def test_a_killed_process_ends_the_others(undisturbed: tuple[Path, list[tuple[int, str, str]]], tmp_path: Path) -> None:
    """What the first one has saved is all that a second attempt needs, and it ends with the same bits."""
    (code, _, err), (killed, *_) = together_run(tmp_path, SVD, SVD, die="1:25")
    assert (code, killed) == (1, -9)
    assert err.splitlines()[-1].startswith("Error: another process of this run has ended")
    assert (tmp_path / "two.safetensors.checkpoint" / "journal.json").exists()
    assert [code for code, *_ in together_run(tmp_path, SVD, SVD, attempt=1)] == [0, 0]
    expected, found = (load_file(folder / "two.safetensors") for folder in (undisturbed[0], tmp_path))
    assert all(found[name].tobytes() == values.tobytes() for name, values in expected.items())


def test_a_process_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    """As if its machine had lost its power: its connection stays open, and nothing comes."""
    (code, _, err), _ = together_run(tmp_path, SVD, SVD, die="stop:1:1")
    assert code == 1
    assert err.splitlines()[-1].startswith("Error: another process of this run has not answered for a long time")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("svd -q -k 2", "svd -q -k 3", "Error: the processes of this run are about to compute different things"),
        ("svd -q", "svd -q -m nowhere", "Error: process 1 of 2: Invalid value for '-m'"),
        ("verify", "verify", "Error: verify runs in one process only: llama.cpp has the whole model to itself"),
    ],
)
def test_an_error_is_one_line(first: str, second: str, message: str, tmp_path: Path) -> None:
    found = together_run(tmp_path, first, second)
    assert all(code for code, _, _ in found)
    lines = [line for _, _, err in found for line in err.splitlines()]
    assert len(lines) == 1, lines
    assert lines[0].startswith(message)


class Store:
    """What processes tell one another, while somebody serves it."""

    def __init__(self, *, served: bool = True):
        self.served, self.told, self.counts = served, dict[str, str](), dict[str, int]()

    def check(self, keys: list[str]) -> bool:
        self._ask()
        return all(key in self.told for key in keys)

    def get(self, key: str) -> bytes:
        return self.told[key].encode()

    def set(self, key: str, value: str) -> None:
        self._ask()
        self.told[key] = value

    def add(self, key: str, count: int) -> int:
        self._ask()
        self.counts[key] = self.counts.get(key, 0) + count
        return self.counts[key]

    def _ask(self) -> None:
        if not self.served:
            raise RuntimeError("connection reset by peer")


def said(
    store: Store, messages: dict[int, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> list[str]:
    """Return the lines that processes print, each of which has an error to say, in this order."""
    monkeypatch.setattr(together, "PATIENCE", 0.0)
    monkeypatch.setattr(together, "_stderr", lambda: sys.stderr)
    for rank, message in messages.items():
        together.Together(Any, store, rank, 3, rank, 3).say(f"Error: {message}")  # type: ignore[arg-type]
    return capsys.readouterr().err.splitlines()


LOST, ONE = together.LOST, "Error: process 1 of 3: "


@pytest.mark.parametrize(
    ("served", "messages", "lines"),
    [
        (True, {0: "full", 1: "full", 2: LOST}, ["Error: full"]),
        (True, {1: "full", 0: LOST, 2: LOST}, [f"{ONE}full"]),
        (True, {0: LOST, 1: LOST, 2: LOST}, [f"Error: {LOST}"]),
        (True, {1: LOST, 2: LOST}, [f"{ONE}{LOST}"]),  # the first was killed
        (False, {1: "full"}, [f"{ONE}full"]),  # and served the store
        (False, {1: LOST}, [f"{ONE}{LOST}"]),
    ],
)
def test_no_error_is_lost(
    served: bool,
    messages: dict[int, str],
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert said(Store(served=served), messages, monkeypatch, capsys) == lines


def test_it_is_said_once_that_processes_share_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many models a command opens; -q leaves it out."""
    fake = {"threads": lambda: 1, "device": str, "group": None, "budget": lambda device: {}}
    monkeypatch.setattr(together, "here", lambda: SimpleNamespace(rank=0, ranks=2, **fake))
    command = ["compare", "-m", demo_path(), "--with", demo_path(), "--tokens", "1,2", "-k", 1]
    assert invoke(*command).stderr == "2 processes share the model\n"
    assert invoke(*command, "-q").stderr == ""


def test_paths_are_those_that_were_given(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """What another process would write goes elsewhere; a message about it is the same on all."""
    monkeypatch.setattr(together, "here", lambda: SimpleNamespace(rank=1))
    context, param = click.Context(click.Command("svd")), click.Option(["-o"])
    paths = [together.own(context, param, Path(name)) for name in ("a/out", "b/out")]
    assert len({*paths}) == 2
    messages = {0: "b/out: No space left on device", 1: f"{paths[1]}: No space left on device"}
    assert said(Store(), messages, monkeypatch, capsys) == ["Error: b/out: No space left on device"]


@pytest.mark.parametrize(
    ("name", "locals", "cards", "share"), [("auto", 4, 4, 1), ("auto", 5, 2, 3), ("cuda", 5, 2, 3), ("cuda:0", 4, 4, 4)]
)
def test_processes_on_one_gpu_share_its_memory(
    name: str, locals: int, cards: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(machine, "default_vram", lambda device: 1200)
    monkeypatch.setattr(machine, "default_budget", lambda: 1000)
    place = together.Together(Any, Any, 0, locals, 0, locals)  # type: ignore[arg-type]
    assert place.budget(name) == {"ram_budget": 1000 // locals, "vram_budget": 1200 // share}


@pytest.mark.parametrize(
    ("command", "given", "reason"),
    [
        ("contrast", {}, "autograd cannot"),
        ("jacobian", {"each_line": True}, "--mean: several processes take prompts of their own"),
        ("analyze", {}, "--no-verify"),
        ("analyze", {"no_verify": True, "contrast": True}, "--contrast"),
        ("svd", {"trace": Path("x")}, "--trace"),
        ("attribute", {"reads": "largest", "by": "head"}, "--reads runs in one process only"),
        ("attribute", {"by": "edge"}, "--by edge runs in one process only"),
    ],
)
def test_what_is_refused(command: str, given: dict, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together.refuse(command, given)  # in one process nothing is
    monkeypatch.setattr(together, "here", SimpleNamespace)
    with pytest.raises(click.UsageError, match=reason):
        together.refuse(command, given)
    together.refuse("svd", {})
    together.refuse("attribute", {"by": "head", "reads": None})


def test_a_plan_is_refused_as_the_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["attribute", "--by", "edge", "--dry-run", "--no-bench"]
    invoke(*asked)
    place = SimpleNamespace(ranks=2, rank=0, say=lambda message: click.echo(message, err=True))
    monkeypatch.setattr(together, "here", lambda: place)
    assert "--by edge runs in one process only" in invoke(*asked, code=2).stderr
