"""The mean over prompts of the output position's own map, and of its spectrum, from sums over chunks of prompts.

A sum of floats depends on the order of its terms. The prompts of a chunk are added in their order, and the chunks in
theirs, whoever computed them: the mean has the same bits on any number of workers and shards.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ggjac import runs
from ggjac.jacobian import Progress
from ggjac.planner import Plan
from ggjac.results import NO_WORDS, Plotted, Points, Table, Words
from ggjac.runs.lines import prompt_key
from ggjac.runs.tensors import load_tensors, save_tensors
from ggjac.studies.measures import Measure
from ggjac.studies.merging import check_output, first_missing
from ggjac.studies.study import (
    Pool,
    Prompt,
    alone,
    check_plan,
    computed,
    dealt,
    distinct,
    keeping,
    opened,
    quoting,
    shard_name,
)

# Prompts whose sum is computed by one worker, and kept.
CHUNK = 64

Sums = dict[str, Tensor]  # `map` [d, d], `S` [d], `squares` [d] of S, in float64; `counts` [2] of prompts and failures


@dataclass(frozen=True, repr=False)
class MeanMap(Plotted):
    """The mean over prompts of `J_p` `[d, d]`, the map from the embedding at the output position to the output there.

    Attributes:
        prompts: their number.
        failed: how many of them had a reconstruction error out of bounds.
        map: `[d, d]`, float64: the mean.
        S: `[d]`, float64: the mean of each singular value, the largest first.
        error: `[d]`, float64: their standard errors; NaN for one prompt.
        S_of_mean: `[d]`, float64: the singular values of the mean.
        frobenius: the root of the mean of `‖J_p‖²` (Frobenius).
        settings: that all prompts have, named as the options are.
    """

    prompts: int
    failed: int
    map: Float[Tensor, "d d"]
    S: Float[Tensor, " d"]
    error: Float[Tensor, " d"]
    S_of_mean: Float[Tensor, " d"]
    frobenius: float
    settings: dict[str, Any]

    @property
    def shared(self) -> float:
        """`‖mean J_p‖² / mean ‖J_p‖²`: 1 if all maps are the same, 1 / prompts if they have nothing in common."""
        return (float(self.map.norm()) / self.frobenius) ** 2 if self.frobenius else 0.0

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the spectra, the largest values first, and how much the maps have in common."""
        columns = {"mean": self.S, "error": self.error, "of_mean": self.S_of_mean}
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        found = {
            "prompts": self.prompts,
            "failed": self.failed,
            "shape": list(self.map.shape),
            "frobenius": self.frobenius,
            "shared": self.shared,
            "singular_values": [dict(zip(columns, row, strict=True)) for row in rows],
            "settings": self.settings,
        }
        return runs.finite(found)

    def facts(self) -> dict[str, Any]:
        """Return what is saved with the tensors: how they were computed."""
        return {"settings": self.settings, "prompts": self.prompts, "failed": self.failed}

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved, in float64: `map` `[d, d]`, `S`, `error` and `S_of_mean` `[d]`."""
        return {name: getattr(self, name) for name in ("map", "S", "error", "S_of_mean")}

    def _table(self, words: Words) -> Table:
        columns = {"mean": self.S, "standard error": self.error, "of the mean map": self.S_of_mean}
        note = f"{self.prompts} prompts; ‖mean J‖² / mean ‖J‖² = {self.shared:.3g}"
        return Table("Singular values of the own map", {name: each.tolist() for name, each in columns.items()}, (note,))

    def _plot(self, words: Words) -> Points:
        values = range(len(self.S)), self.S.tolist(), self.error.nan_to_num().tolist()
        return Points("Singular values of the own map", "index", "mean singular value", {"mean": values})


class Chunk(NamedTuple):
    """Some prompts: part `number` of the `whole` study, whose sums have a file of their own."""

    number: int
    whole: int
    prompts: list[Prompt]

    def path(self, output: Path) -> Path:
        """Return the name of the file, beside that of the mean."""
        return shard_name(output, self.number, self.whole)


def mean_map(
    prompts: Sequence[Prompt],
    measure: Measure,
    output: str | os.PathLike[str],
    executor: Executor | Callable[[], Pool] | None = None,
    *,
    shard: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    begun: Callable[[Plan], None] | None = None,
) -> MeanMap:
    """Average over prompts the map from the embedding at the output position to the output there, and its spectrum.

    The sum of each 64 prompts is kept in a file beside `output`, such as `mean-03-of-16.safetensors`; the same call
    continues with those that are missing. When all are there, they become `output`, which has the same bits whatever
    computed it, on equal machines with equal threads.

    Args:
        prompts: texts, or token ids; each counts once.
        measure: `ggjac.measure(model, "jacobian", mean=True)`.
        output: safetensors file of `MeanMap.tensors`.
        executor, begun: as `ggjac.study` takes them.
        shard: `(i, n)` adds up every n-th of these sums, from number i of 0 to n-1, leaves their files for
            `ggjac.merge_means`, and returns the mean of its own.
        progress: called as `progress("prompt", done, total)` after each sum.

    Raises:
        RunError: a file is of other prompts or settings, or cannot be written; or as `ggjac.study`.
        PromptError, JournalError, NoFitError: as `ggjac.study`.
        ValueError: the measure is another one.
    """
    if not measure.options.get("mean"):
        raise ValueError(f"measure is {measure.name!r}; give ggjac.measure(model, 'jacobian', mean=True)")
    output, every = Path(output), list(distinct(prompts).values())
    starts = range(0, len(every), CHUNK)
    chunks = [Chunk(i, len(starts), every[start : start + CHUNK]) for i, start in enumerate(starts)]
    own, whole = dealt(chunks, shard, f"chunk of {CHUNK} prompts"), shard == (0, 1)
    files, total = [chunk.path(output) for chunk in own], sum(len(chunk.prompts) for chunk in own)
    with alone(output if whole else shard_name(output, *shard)), keeping(files[0]):
        first, measure = opened(measure, own[0].prompts, every, kept=True)
        study = {"settings": dict(measure.settings), "prompts": _digest(every), "chunks": len(chunks)}
        study["d"] = first.model.config.d
        todo = [chunk for chunk in own if not _is_there(chunk.path(output), study | {"chunk": chunk.number})]
        left = sum(len(chunk.prompts) for chunk in todo)
        if todo:
            check_plan(first, measure, left, begun)
        del first
        with contextlib.closing(computed(todo, partial(_added, measure), executor, single=True)) as found:
            for number, arrays in found:
                sums = {name: torch.from_numpy(array) for name, array in arrays.items()}
                _save(chunks[number].path(output), sums, study | {"chunk": number})
                left -= len(chunks[number].prompts)
                if progress:
                    progress("prompt", total - left, total)
        mean = _mean(files, complete=whole)
        if whole:
            _save(output, mean.tensors(), mean.facts())
            for path in files:
                path.unlink()
    return mean


def merge_means(files: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> MeanMap:
    """Make the mean over all prompts from the sums that shards of `mean_map` left, and save it.

    Args:
        files: the sums of all shards, in any order.
        output: safetensors file of `MeanMap.tensors`.

    Raises:
        RunError: a file is of other prompts or settings, given twice or missing; or the output cannot be written.
        JournalError: a file is damaged, or something else.
    """
    paths, output = [Path(file) for file in files], Path(output)
    check_output(paths, output)
    mean = _mean(paths, complete=True)
    _save(output, mean.tensors(), mean.facts())
    return mean


def _added(measure: Measure, chunk: Chunk) -> tuple[int, dict[str, np.ndarray]]:
    """Return the number of a chunk, and the sums over its prompts, as arrays: torch would not send copies."""
    sums: Sums = {}
    for prompt in chunk.prompts:
        with quoting(prompt, single=False):
            record, tensors = measure.answer(prompt)
        J = tensors["own"].double()
        S = torch.linalg.svdvals(J)
        healthy = record["jacobian"]["reconstruction"]["healthy"]
        terms = {"map": J, "S": S, "squares": S.square(), "counts": torch.tensor([1, not healthy], dtype=torch.int64)}
        sums = {name: sums[name].add_(term) for name, term in terms.items()} if sums else terms
        del J, tensors, terms
    return chunk.number, {name: tensor.numpy() for name, tensor in sums.items()}


def _mean(files: Sequence[Path], *, complete: bool) -> MeanMap:
    """Return the mean from the files of chunks, which must be all of them if `complete`."""
    sums: Sums = {}
    for path, facts in _in_order(files, complete=complete):
        terms, _ = load_tensors(path)
        sums = {name: sums[name].add_(terms[name]) for name in sums} or terms
        settings = facts["settings"]
    prompts, failed = sums["counts"].tolist()
    mean, S = sums["map"] / prompts, sums["S"] / prompts
    variance = (sums["squares"] - prompts * S.square()).clamp(min=0) / (prompts - 1) if prompts > 1 else S * math.nan
    return MeanMap(
        prompts=prompts,
        failed=failed,
        map=mean,
        S=S,
        error=(variance / prompts).sqrt(),
        S_of_mean=torch.linalg.svdvals(mean),
        frobenius=math.sqrt(float(sums["squares"].sum()) / prompts),
        settings=settings,
    )


def _in_order(files: Sequence[Path], *, complete: bool) -> list[tuple[Path, dict[str, Any]]]:
    """Return files with their facts in the order of their chunks: parts of one study, each once.

    Raises:
        RunError: they are not, or lack some if they must be complete.
    """
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    for path in files:
        facts = _facts(path)
        first, expected = next(iter(found.values()), (path, facts))
        if facts | {"chunk": 0} != expected | {"chunk": 0}:
            raise runs.RunError(f"{path}: has other prompts or settings than {first}; merge the files of one study")
        if facts["chunk"] in found:
            raise runs.RunError(f"{path}: is the same part as {found[facts['chunk']][0]}; give each once")
        found[facts["chunk"]] = path, facts
    if complete and (missing := facts["chunks"] - len(found)):
        numbers = first_missing(found, facts["chunks"])
        raise runs.RunError(
            f"{missing} of {facts['chunks']} parts are missing (numbers {numbers}, from 0); run their shards again"
        )
    return [found[i] for i in sorted(found)]


def _is_there(path: Path, expected: dict[str, Any]) -> bool:
    """Return whether a file has the sums that are expected.

    Raises:
        RunError: it has others.
    """
    if not path.exists():
        return False
    if _facts(path) != expected:
        raise runs.RunError(f"{path}: has other prompts or settings; choose another -o, or remove it")
    return True


def _facts(path: Path) -> dict[str, Any]:
    """Return what the sums in a file are of.

    Raises:
        RunError: it has no sums.
    """
    try:
        with safe_open(path, "np") as file:
            facts = json.loads((file.metadata() or {})["ggjac"])
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            d = facts["d"]
            shapes = {"map": ("F64", [d, d]), "S": ("F64", [d]), "squares": ("F64", [d]), "counts": ("I64", [2])}
            known = shapes == {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
            known = (
                known and 0 <= index(facts["chunk"]) < index(facts["chunks"]) and isinstance(facts["settings"], dict)
            )
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError):
        known = False
    if not known:
        raise runs.RunError(f"{path}: does not have the sums of some prompts; give the files of shards of a mean")
    return facts


def _save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    save_tensors(path, tensors, {"ggjac": json.dumps(facts)})


def _digest(prompts: Sequence[Prompt]) -> str:
    """Return a hash of prompts and their order."""
    return sha256(json.dumps([prompt_key(prompt) for prompt in prompts]).encode()).hexdigest()
