"""The whole of a model file: its hash against the name under which a store keeps it, and every tensor as it is read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ggjac import quants
from ggjac.gguf import GGUFFile, TensorInfo
from ggjac.gguf.hub import Digest, expected_digest, git_digest
from ggjac.weights.holes import Holes

BYTES_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class ShardCheck:
    """One file of a model.

    Attributes:
        path: of the file.
        sha256: of its whole content, in hexadecimal.
        expected: the digest that its store gives for it; None where there is none.
        same: whether the content has that digest; None where there is none.
    """

    path: Path
    sha256: str
    expected: Digest | None
    same: bool | None


@dataclass(frozen=True)
class Check:
    """A whole model.

    Attributes:
        shards: every file.
        faults: a line about each tensor that a good file does not have.
    """

    shards: list[ShardCheck]
    faults: list[str]

    @property
    def passed(self) -> bool:
        """Whether no check failed; a file whose digest is not known passes."""
        return not self.faults and all(shard.same is not False for shard in self.shards)


def check(file: GGUFFile, progress: Callable[[str, int, int], object] = lambda what, done, total: None) -> Check:
    """Read all of a model: hash every file, and look at every tensor.

    Args:
        file: the open model.
        progress: called as `progress("MB", done, total)`; every byte counts twice.

    Raises:
        GGUFError: the disk fails, or the file changes meanwhile.
    """
    total, done = (file.nbytes + sum(info.nbytes for info in file.tensors.values())) // 1_000_000, 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("MB", done // 1_000_000, total)

    shards = []
    for path, sha256 in zip(file.paths, file.sha256(advance), strict=True):
        expected = expected_digest(path)
        found = git_digest(path) if expected and expected.algorithm == "git" else sha256
        shards.append(ShardCheck(path, sha256, expected, expected and expected.value == found))
    holes, faults = Holes(file.metadata), []
    for info in file.tensors.values():
        if quants.supported(info.type):
            faults += _invalid(file, info, holes, advance)
    file.check_unchanged()
    for name, rows in holes.found().items():
        spans = ", ".join(f"{first}:{last}" for first, last in rows[:3]) + (", …" if len(rows) > 3 else "")
        faults.append(f"{name}: rows {spans} of {file.tensors[name].rows} are all zero")
    return Check(shards, faults)


def _invalid(file: GGUFFile, info: TensorInfo, holes: Holes, advance: Callable[[int], None]) -> list[str]:
    """Look at all of a tensor; return a line on its first rows with NaN or infinity, if it has any."""
    step = max(1, BYTES_AT_ONCE // info.row_bytes)
    found: list[str] = []
    for start in range(0, info.rows, step):
        stop = min(start + step, info.rows)
        raw = file.rows(info, start, stop)
        holes.look(info, raw, start)
        if not found and quants.has_invalid_scales(raw, info.type):
            row = next(i for i in range(len(raw)) if quants.has_invalid_scales(raw[i : i + 1], info.type))
            found.append(f"{info.name}: row {start + row} of {info.rows} holds NaN or infinite values")
        advance(raw.nbytes)
    return found
