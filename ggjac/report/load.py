"""Read a result: a run folder (run.json, and the few vectors of tensors.safetensors that are drawn), or one JSON file.

Everything that is read is checked first, by the forms that the sections state.
"""

import json
import os
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ggjac import runs
from ggjac.report.schema import LARGEST, Wrong, record, text
from ggjac.report.sections import PARTS, frame
from ggjac.report.sections.common import Run
from ggjac.runs import RunError
from ggjac.units import size

# Those that are drawn: vectors of the embedding's size.
VECTORS = ("y", "offset", "linear_output", "ordinary_output")
MAX_JSON = 64 * 2**20  # bytes
MAX_VECTOR = 2**22  # elements
# Of results of schema version 1: lists of tokens; maps of one block.
_DECODED = ("left", "right", "nearest", "tokens")
_OF_BLOCKS = (("cumulative", "attn"), ("cumulative", "mlp"), *product(["blockwise"], ["layer", "attn", "mlp"]))

#: A result, as in `run.json` and as printed by commands; and one about many prompts, which has no `tokens`.
_RESULT = record(frame.PROMPT, PARTS)
_OF_MANY = record({"model": frame.PROMPT["model"]}, PARTS)


def checked(content: Any, source: str = "run.json", again: str = "analyse the prompt again") -> dict[str, Any]:
    """Return the parts of a result that the report draws, each of the form that its room states; missing ones are None.

    Args:
        content: as it was read.
        source: the file's name.
        again: the advice for getting a valid result.

    Raises:
        RunError: a part is of another form; the message names it.
    """
    content = _since_2(content) if isinstance(content, dict) and content.get("schema_version") == 1 else content
    try:
        many = (
            isinstance(content, dict) and "ranks" in content and not {"tokens", "prompt", "position"} & content.keys()
        )
        found = _OF_MANY(content, "") | {"tokens": []} if many else _RESULT(content, "")
        frame.check_position(found)
    except Wrong as error:
        raise RunError(f"{source}: {error}; {again}") from error
    return found


def _since_2(value: Any, key: str = "") -> Any:
    """Return a part of a result of schema version 1 as of version 2.

    In version 1, tokens were as they are shown, under `token` or alone in the lists of `_DECODED`, and the blocks of a
    logit were counted from 1.
    """
    if isinstance(value, dict):
        if key == "top1" and value.keys() == {"a", "b"}:
            return {side: {"text": text} for side, text in value.items()}
        if isinstance(block := value.get("block"), int):
            value = value | {"block": block - 1}
        if isinstance(depth := value.get("index"), int) and (value.get("map"), value.get("kind")) in _OF_BLOCKS:
            value = value | {"block": depth - 1}
        return {("text" if name == "token" else name): _since_2(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        bare = key in _DECODED
        return [{"text": entry} if bare and isinstance(entry, str) else _since_2(entry, key) for entry in value]
    return value


def load(source: str | os.PathLike[str]) -> Run:
    """Read a run folder, or a file that a command printed as JSON.

    Raises:
        RunError: neither, or a damaged one; the message is one line.
    """
    source = Path(source)
    alone = source.exists() and not source.is_dir()
    path = source if alone else source / "run.json"
    if path.exists() and not path.is_file():  # a pipe would never end
        raise RunError(f"{path}: is not a regular file; pass a run folder, or a file of JSON")
    if path.is_file() and path.stat().st_size > MAX_JSON:
        raise RunError(f"{path}: is {size(path.stat().st_size)}, larger than any result; is this the right file?")
    try:
        if alone:
            return Run(_result(path), {}, text(path.name, "name"))
        return Run(checked(runs.load_run(source)), _vectors(source / "tensors.safetensors", VECTORS))
    except RecursionError as error:
        raise RunError(f"{path}: is nested too deeply for a result; analyse the prompt again") from error


_ONE = "a page shows one prompt, or the JSON of ranks: run the command with a prompt alone"


def _result(path: Path) -> dict[str, Any]:
    """Return the checked parts of a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        kind = type(error).__name__
        if _is_safetensors(path):
            told = f"{path}: holds tensors, as -o saves them; a page is made of what --format json prints"
            raise RunError(told) from error
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            raise RunError(f"{path}: holds several records, such as lines of --each-line; {_ONE}") from error
        raise RunError(
            f"{path}: is not a result ({kind}); pass a run folder, or a file that a command printed with --format json"
        ) from error
    if not isinstance(content, dict) or content.get("schema_version") not in runs.READABLE:
        versions = " or ".join(map(str, runs.READABLE))
        raise RunError(f"{path}: is not a result of schema version {versions}; run the command again")
    if "model" not in content:  # as of `info`, `plan` and `bench`
        raise RunError(f"{path}: holds no result about a prompt; pass the JSON of a prompt command, such as svd")
    if "prompts" in content:
        raise RunError(f"{path}: holds the records of --each-line; {_ONE}")
    return checked(content, str(path), "run the command again")


def _is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors do: with the length of their header, in JSON."""
    try:
        with open(path, "rb") as file:
            return file.read(10)[7:] == b'\0{"'
    except OSError:
        return False


def _vectors(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return those of some vectors that are in a safetensors file; nothing where there is no file."""
    if not path.is_file():
        return {}
    from safetensors import safe_open

    found: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, "numpy") as file:
            for name in set(names) & set(file.keys()):
                shape = file.get_slice(name).get_shape()
                if len(shape) != 1 or not 0 < shape[0] <= MAX_VECTOR:
                    raise RunError(f"{path}: {name} has shape {shape}, not that of a vector; analyse the prompt again")
                found[name] = np.asarray(file.get_tensor(name), np.float64)
    except RunError:
        raise
    except Exception as error:  # the package raises an exception of its own, and those of NumPy
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{path}: cannot be read ({reason}); analyse the prompt again") from error
    sizes = {len(vector) for vector in found.values()}
    if len(sizes) > 1:
        lengths = ", ".join(f"{name} {len(vector)}" for name, vector in sorted(found.items()))
        raise RunError(f"{path}: vectors of one space differ in length ({lengths}); analyse the prompt again")
    if not all((np.abs(vector) <= LARGEST).all() for vector in found.values()):
        return {}  # the rest of a run that overflows is still worth a page
    return found
