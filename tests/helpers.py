"""What several test files use: a small prompt, commands run in this process, distances, edited files, held memory."""

import gc
import json
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import oracle
import pytest
import tiny
import torch
from click.testing import CliRunner, Result
from jaxtyping import config as checks

from ggjac.cli import main
from ggjac.gguf import open_gguf
from ggjac.gguf.hub import demo_path
from ggjac.jacobian import DetachedJacobian
from ggjac.model import DTYPES, Model, open_model
from ggjac.sizes import Pieces
from ggjac.weights import WeightStore

# A prompt, and the same as options of a command.
IDS = [5, 17, 3, 99, 42]
TOKENS = ["-t", "1", "--tokens", ",".join(map(str, IDS))]

# One row of `tiny.CASES` for each architecture.
FIRST = {tiny.options(case).architecture: case for case in reversed(tiny.CASES)}

EPS = {name: torch.finfo(dtype).eps for name, dtype in DTYPES.items()}


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative L2 distance, in float64."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def compute_in(monkeypatch: pytest.MonkeyPatch, pieces: Pieces) -> None:
    """Let every model compute with pieces of these sizes, whatever its plan says."""
    monkeypatch.setattr(WeightStore, "pieces", property(lambda _: pieces, lambda _, planned: None), raising=False)


def lacking(tables: dict[str, set[str]]) -> list[str]:
    """Return which table lacks a name that another one has, in words."""
    every = set().union(*tables.values())
    return [f"{where} lacks {', '.join(sorted(every - names))}" for where, names in tables.items() if every - names]


# ---- a Jacobian and the oracle's


def pair(
    tiny_files: dict[str, Path], case: str, position: int = -1, dtype: str = "float64"
) -> tuple[Model, DetachedJacobian, oracle.Jacobian, dict[str, torch.Tensor]]:
    """Return ggjac's model and Jacobian, and the oracle's Jacobian and weights."""
    ids, model = tiny.prompt(case, 6), open_model(tiny_files[case], dtype=dtype)
    known = oracle.load(tiny_files[case])
    expected = oracle.jacobian(known, ids, mlp_path="up", position=position)
    return model, model.trace(ids).jacobian(position), expected, known.weights


def head_of(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the matrix of the LM head, `[v, d]`."""
    return weights.get("output.weight", weights["token_embd.weight"])


# ---- commands


def invoke(*args: object, code: int | None = 0, env: dict[str, str] | None = None) -> Result:
    """Run a command in this process and hold it to the contract of all commands; `code` None allows any exit code."""
    result = CliRunner().invoke(main, [str(arg) for arg in args], prog_name="ggjac", env=env, catch_exceptions=False)
    check_streams(result.exit_code, result.stdout, result.stderr)
    assert code is None or result.exit_code == code, result.output
    return result


def invoke_json(*args: object, code: int = 0) -> dict[str, Any]:
    """Return the JSON that a command prints."""
    return json.loads(invoke(*args, "--format", "json", code=code).stdout)


def error(*args: object, code: int = 4) -> str:
    """Return the one line that a refusal prints; a plan may be shown before it, and nothing else."""
    result = invoke(*args, code=code)
    assert result.stdout == "" or code == 4 or args[0] == "plan"
    return result.stderr


def check_streams(code: int, out: str, err: str) -> None:
    """No traceback, an error is one line, and all of it is printable, without spaces at the ends of lines."""
    assert "Traceback" not in out + err
    assert "this is a bug" not in err, err
    if code in (1, 2) or (code == 4 and not out.startswith("{")):  # a plan as JSON contains the reason
        assert err.startswith("Error: "), err
        assert err.count("\n") == 1, err
    assert all(character.isprintable() or character == "\n" for character in out + err)
    assert not any(line.endswith(" ") for line in out.split("\n"))


# ---- files and memory


def edited(path: Path, name: str, values: float) -> Path:
    """Overwrite a stored F32 tensor of a file with one value, and return the file."""
    with open_gguf(path) as file:
        info = file.tensors[name]
    with open(path, "r+b") as file:
        file.seek(info.offset)
        file.write(np.full(info.elements, values, "<f4").tobytes())
    return path


def reworded(target: Path, keys: Mapping[str, Any], tokens: Mapping[int, str] | None = None) -> Path:
    """Write the demo model with other metadata: `keys` (None deletes one), and other strings of tokens."""
    reader = gguf.GGUFReader(demo_path())
    writer = gguf.GGUFWriter(target, "llama")
    changes = dict(keys)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = changes.pop(field.name, field.contents())
        if field.name == "tokenizer.ggml.tokens":
            value = [(tokens or {}).get(i, text) for i, text in enumerate(value)]
        if value is not None:
            kind = field.types[0]
            writer.add_key_value(field.name, value, kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for name, value in changes.items():
        kind = {bool: gguf.GGUFValueType.BOOL, str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32}[
            type(value)
        ]
        writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def held(work: Callable[[], object]) -> int:
    """Return the most bytes that torch's CPU allocator had handed out at once, by its own count.

    Without shape checks, which hold on to arguments that their function has done with.
    """
    gc.collect()  # objects freed during the work would count as well
    before = checks.jaxtyping_disable
    checks.update("jaxtyping_disable", True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    checks.update("jaxtyping_disable", before)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
