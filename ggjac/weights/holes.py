"""Stretches of zeros in weights: what a download leaves that reserved its space and did not finish.

The size of such a file is right, zeros are finite numbers, and llama.cpp reads the same zeros. Rows of zeros at the end
of a matrix may be padding, and so may the embeddings of tokens that no text has.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ggjac.gguf import TensorInfo

# Of consecutive rows, in bytes; a whole matrix counts from fewer.
LEAST, LEAST_MATRIX = 1 << 16, 1 << 12
GLANCE = 8  # bytes of every row that are looked at first

# Tensors with a row for each token.
VOCABULARY = ("token_embd.weight", "output.weight", "per_layer_token_embd.weight")
NORMAL = 1  # the type of tokens that texts have

Rows = tuple[int, int]  # from, to


def zero_rows(raw: np.ndarray) -> list[Rows]:
    """Return the runs of rows of stored bytes, uint8 `[rows, row_bytes]`, that are all zero."""
    begin = np.zeros((len(raw), GLANCE), np.uint8)
    begin[:, : raw.shape[1]] = raw[:, :GLANCE]
    empty = np.flatnonzero(begin.view(np.uint64)[:, 0] == 0)
    if not len(empty):
        return []
    empty = empty[~raw[empty].any(axis=1)]
    breaks = np.flatnonzero(np.diff(empty) > 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(empty, breaks) if len(run)]


class Holes:
    """The rows of zeros that were met in a file's matrices.

    Args:
        metadata: of the file; tokens that no text has may have embeddings of zeros.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        types = metadata.get("tokenizer.ggml.token_type")
        self._types: Sequence[int] = types if isinstance(types, Sequence) and not isinstance(types, str) else ()
        self._rows: dict[str, set[Rows]] = defaultdict(set)
        self._infos: dict[str, TensorInfo] = {}

    def look(self, info: TensorInfo, raw: np.ndarray, start: int) -> None:
        """Look at stored rows of a tensor, from row `start` on; vectors, such as biases, may be zero."""
        if len(info.shape) < 2:
            return
        for first, last in zero_rows(raw):
            self._infos[info.name] = info
            self._rows[info.name].add((start + first, start + last))

    def found(self) -> dict[str, list[Rows]]:
        """Return by tensor the rows that a trained model does not have, in the order in which they were met."""
        found = {name: self._suspicious(self._infos[name], _merged(rows)) for name, rows in self._rows.items()}
        return {name: rows for name, rows in found.items() if rows}

    def warning(self) -> str | None:
        """Return one line about the first of them, or None."""
        found = self.found()
        if not found:
            return None
        name, rows = next(iter(found.items()))
        more = f", and rows of {len(found) - 1} more tensors" if len(found) > 1 else ""
        spans = ", ".join(f"{first}:{last}" for first, last in rows[:3]) + (", …" if len(rows) > 3 else "")
        return (
            f"{name}: rows {spans} of {self._infos[name].rows} are all zero{more}: is the download complete? "
            "ggjac info --check looks at the whole file"
        )

    def _suspicious(self, info: TensorInfo, runs: Iterable[Rows]) -> list[Rows]:
        """Return the runs that are neither short nor padding."""
        kept = []
        for first, last in runs:
            if info.name in VOCABULARY:
                rows = sum(kind == NORMAL for kind in self._types[first:last])
            elif (first, last) == (0, info.rows) and info.nbytes >= LEAST_MATRIX:
                rows = LEAST
            else:  # of each expert, where it is a stack
                rows = 0 if last % info.shape[-2] == 0 and last - first < info.shape[-2] else last - first
            if rows * info.row_bytes >= LEAST:
                kept.append((first, last))
        return kept


def _merged(runs: Iterable[Rows]) -> list[Rows]:
    """Return the same rows as few runs, in order."""
    merged: list[Rows] = []
    for first, last in sorted(runs):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged
