"""Read a result: a run folder (run.json, and the few vectors of tensors.safetensors that are drawn), or one JSON file.

Whatever is read is checked by `schema` first.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ggjac import runs
from ggjac.report import schema
from ggjac.runs import RunError

# What is drawn: vectors of the embedding's size.
VECTORS = ("y", "offset", "linear_output", "ordinary_output")
MAX_JSON = 64 * 2**20  # bytes
MAX_VECTOR = 2**22  # elements


@dataclass(frozen=True)
class Run:
    """What the report draws.

    Attributes:
        content: the checked parts of a result (see `schema.checked`); parts that are missing are None.
        vectors: those of `VECTORS` that were saved, `[d]` each, float64.
        source: the name of the file that has the numbers.
    """

    content: dict[str, Any]
    vectors: dict[str, np.ndarray]
    source: str = "run.json"


def load(source: str | os.PathLike[str]) -> Run:
    """Read a run folder, or a file with what a command printed as JSON.

    Raises:
        RunError: neither, or a damaged one; the message is one line.
    """
    source = Path(source)
    alone = source.exists() and not source.is_dir()
    path = source if alone else source / "run.json"
    if path.exists() and not path.is_file():  # a pipe would never end
        raise RunError(f"{path}: is not a regular file; give a run folder, or a file of JSON")
    if path.is_file() and path.stat().st_size > MAX_JSON:
        raise RunError(f"{path}: has {path.stat().st_size / 1e6:.0f} MB, too much for a result; is this one?")
    try:
        if alone:
            return Run(_result(path), {}, schema.text(path.name, "name"))
        return Run(schema.checked(runs.load_run(source)), _vectors(source / "tensors.safetensors", VECTORS))
    except RecursionError as error:
        raise RunError(f"{path}: is nested too deeply for a result; analyse the prompt again") from error


def _result(path: Path) -> dict[str, Any]:
    """Return the checked parts of a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        kind = type(error).__name__
        raise RunError(f"{path}: is no result ({kind}); give a run folder, or what --format json printed") from error
    if not isinstance(content, dict) or content.get("schema_version") != runs.SCHEMA_VERSION:
        raise RunError(f"{path}: is no result of schema version {runs.SCHEMA_VERSION}; run the command again")
    if "model" not in content:  # as of `info`, `plan` and `bench`
        raise RunError(f"{path}: is about no prompt, and has no page; give what a command that takes one printed")
    return schema.checked(content, str(path), "run the command again")


def _vectors(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return those of some vectors that a safetensors file has; nothing where there is no file."""
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
    except Exception as error:  # the package has its own exception, and passes on what NumPy raises
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{path}: cannot be read ({reason}); analyse the prompt again") from error
    sizes = {len(vector) for vector in found.values()}
    if len(sizes) > 1:
        lengths = ", ".join(f"{name} {len(vector)}" for name, vector in sorted(found.items()))
        raise RunError(f"{path}: vectors of one space differ in length ({lengths}); analyse the prompt again")
    if not all((np.abs(vector) <= schema.LARGEST).all() for vector in found.values()):
        return {}  # an overflowing run is worth a report, but its scatter cannot be drawn
    return found
