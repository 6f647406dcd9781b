"""Read a run folder: run.json, checked, and the few vectors of tensors.safetensors that are drawn."""

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
        content: the checked parts of run.json (see `schema.RUN`); parts that are missing are None.
        vectors: those of `VECTORS` that were saved, `[d]` each, float64.
    """

    content: dict[str, Any]
    vectors: dict[str, np.ndarray]


def load(folder: str | os.PathLike[str]) -> Run:
    """Read a run folder.

    Raises:
        RunError: not a run folder, or a damaged one; the message is one line.
    """
    folder = Path(folder)
    path = folder / "run.json"
    if path.exists() and not path.is_file():  # a pipe would never end
        raise RunError(f"{path}: is not a regular file; is this a run folder?")
    if path.is_file() and path.stat().st_size > MAX_JSON:
        raise RunError(f"{path}: has {path.stat().st_size / 1e6:.0f} MB, too much for a run; is this a run folder?")
    try:
        content = schema.checked(runs.load_run(folder))
    except RecursionError as error:
        raise RunError(f"{path}: is nested too deeply for a run; analyse the prompt again") from error
    return Run(content, _vectors(folder / "tensors.safetensors", VECTORS))


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
