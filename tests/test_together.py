"""Commands in two processes that share a model: one result, one message, and the same bits after a kill."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from helpers import invoke
from safetensors.numpy import load_file

from ggjac.cli import together

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
        texts = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, texts, strict=True)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str, str]]]:
    """Return the folder of a run in two processes, and what it printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, together_run(folder, SVD, SVD)


def test_one_speaks_and_writes(undisturbed: tuple[Path, list[tuple[int, str, str]]], tmp_path: Path) -> None:
    folder, [(code, out, err), other] = undisturbed
    assert (code, err) == (0, "")
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
    assert err.startswith("Error: another process of this run has ended")
    assert (tmp_path / "two.safetensors.checkpoint" / "journal.json").exists()
    assert [code for code, *_ in together_run(tmp_path, SVD, SVD, attempt=1)] == [0, 0]
    expected, found = (load_file(folder / "two.safetensors") for folder in (undisturbed[0], tmp_path))
    assert all(found[name].tobytes() == values.tobytes() for name, values in expected.items())


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


@pytest.mark.parametrize(
    ("command", "given", "reason"),
    [
        ("contrast", {}, "autograd cannot"),
        ("analyze", {}, "--no-verify"),
        ("analyze", {"no_verify": True, "contrast": True}, "--contrast"),
        ("svd", {"trace": Path("x")}, "--trace"),
    ],
)
def test_what_is_refused(command: str, given: dict, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together.refuse(command, given)  # in one process nothing is
    monkeypatch.setattr(together, "here", SimpleNamespace)
    with pytest.raises(click.UsageError, match=reason):
        together.refuse(command, given)
    together.refuse("svd", {})
