"""Commands in two processes that share a model: one result, one message, and the same bits after a kill."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

TIMEOUT = 120


def start(folder: Path, *commands: str, attempt: int = 0) -> list[subprocess.Popen[str]]:
    """Start a command in as many processes as are given, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(len(commands)), "LOCAL_WORLD_SIZE": str(len(commands)), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": str(attempt)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "ggjac", *command.split()],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            **pipes,
        )
        for rank, command in enumerate(commands)
    ]


def ended(started: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Return exit code, stdout and stderr of each."""
    try:
        texts = [process.communicate(timeout=TIMEOUT) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, texts, strict=True)]


def test_one_speaks_and_writes(tmp_path: Path) -> None:
    command = "svd -k 3 -q --dtype float64 --tol 1e-6 --format json -o"
    (code, out, err), other = ended(start(tmp_path, f"{command} two.safetensors", f"{command} two.safetensors"))
    assert (code, err) == (0, "")
    assert other == (0, "", "")
    assert json.loads(out)["processes"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["two.safetensors"]
    subprocess.run([sys.executable, "-m", "ggjac", *command.split(), "one.safetensors"], cwd=tmp_path, check=True)
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert np.allclose(one["S"], two["S"], rtol=1e-12, atol=0)
    assert np.allclose(one["U"], two["U"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("svd -q -k 2", "svd -q -k 3", "Error: the processes of this run are about to compute different things"),
        ("svd -q", "svd -q -m nowhere", "Error: process 1 of 2: Invalid value for '-m'"),
        ("svd -q -m nowhere", "svd -q -m nowhere", "Error: Invalid value for '-m'"),
        ("verify", "verify", "Error: verify runs in one process only: llama.cpp has the whole model to itself"),
        ("contrast", "contrast", "Error: contrast runs in one process only: autograd cannot"),
        ("svd --trace x", "svd --trace x", "Error: --trace keeps the forward pass of one process"),
    ],
)
def test_an_error_is_one_line(first: str, second: str, message: str, tmp_path: Path) -> None:
    found = ended(start(tmp_path, first, second))
    assert all(code for code, _, _ in found)
    lines = [line for _, _, err in found for line in err.splitlines()]
    assert len(lines) == 1, lines
    assert lines[0].startswith(message)


def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    command = "svd -k 3 --tol 1e-9 --max-sweeps 400 --dtype float64 -o two.safetensors"
    started = start(tmp_path, command, command)
    time.sleep(5)  # until both compute; earlier, the other one fails to meet it
    os.kill(started[1].pid, signal.SIGKILL)
    (code, _, err), _ = ended(started)
    assert code == 1
    assert err.splitlines()[-1].startswith("Error: another process of this run has ended")
