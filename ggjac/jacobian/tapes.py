"""The tapes of a trace: in memory, in a folder, or both. A trace of the same prompt in the folder is reused.

The folder has one safetensors file per block, written atomically: an interrupted trace resumes where it stopped, and
the tapes need not fit into memory together.
"""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ggjac import runs
from ggjac.blocks import (
    AttentionTape,
    BlockTape,
    ChannelTape,
    Factor,
    FFNTape,
    HiddenTape,
    InputsTape,
    LaurelTape,
    MemoryTape,
    MixerTape,
    NormTape,
    OpeningTape,
    ScanTape,
    StreamsTape,
    TurnTape,
)
from ggjac.gguf import GGUFFile
from ggjac.runs import tensors as stored
from ggjac.runs.journal import Journal
from ggjac.runs.lock import is_running
from ggjac.runs.origin import Origin, OriginError

SCHEMA_VERSION = 2

# Seconds between writes of tapes that are kept in memory too.
EVERY = 30.0

# Seconds after which a file that a process left unfinished is deleted, if that process has ended.
ABANDONED = 60.0

_TAPES = (
    *(BlockTape, AttentionTape, MixerTape, Factor, ScanTape, ChannelTape, MemoryTape),
    *(FFNTape, HiddenTape, InputsTape, LaurelTape, NormTape, StreamsTape, TurnTape, OpeningTape),
)
_KINDS = {kind.__name__: kind for kind in _TAPES}


class TapeError(ValueError):
    """A folder of tapes cannot be used: it belongs to another prompt or model, or is damaged."""


class Tapes:
    """The tapes of blocks 0, 1, ... of one trace.

    Args:
        folder: the folder of the tapes, created when first needed; None for memory only.
        identity: plain JSON, everything that decides the bits of the tapes; tapes in the folder must have an equal one.
        resident: keep the tapes in memory. The folder is then a checkpoint, written from time to time, or after every
            block if `complete`. Otherwise every tape is written at once, and read again at each use.
        complete: whether the folder must contain the whole trace in the end.
        model: the file that the trace is of; the one of tapes in the folder must have the same content.
        run: the journal that the folder belongs to. It is started before the first write; write errors of a checkpoint
            are reported to it instead of raised.

    Raises:
        TapeError: the folder contains another trace, or is damaged.
    """

    def __init__(
        self,
        folder: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        *,
        resident: bool = True,
        complete: bool = False,
        model: GGUFFile | None = None,
        run: Journal | None = None,
    ):
        if folder is None and not resident:
            raise ValueError("these tapes are kept nowhere; give a folder, or resident=True")
        self.folder, self.identity, self.resident = folder, dict(identity or {}), resident
        self.complete = complete or not resident
        self._run = run
        self._origin = Origin(model) if model else None
        self._head: dict[str, Any] = {}  # content of trace.json
        self._begun = False
        self._mark = hashlib.blake2b(json.dumps(self.identity, sort_keys=True).encode(), digest_size=16).hexdigest()
        self.device = torch.device("cpu")
        self._kept: dict[int, BlockTape] = {}
        self._count = self._saved = 0
        self._due = time.monotonic() + EVERY
        if folder is not None and (folder / "trace.json").exists():
            self._compare(folder)
            while self._path(self._saved).exists():
                self._saved += 1
            self._count = self._saved

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> BlockTape:
        """Return a block's tape, read from the folder unless it is in memory; negative counts from the end."""
        if not -self._count <= index < self._count:
            raise IndexError(f"block {index} of {self._count}")
        index %= self._count
        tape = self._kept.get(index)
        if tape is None:
            tape = self._load(index)
            if self.resident:
                self._kept[index] = tape
        return tape

    def append(self, tape: BlockTape) -> None:
        """Add the next block's tape, with every tensor laid out as if it had been read back."""
        tensors: dict[str, Tensor] = {}
        description = _described(tape, "", tensors)
        tensors = {name: stored.plain(tensor) for name, tensor in tensors.items()}
        self._kept[self._count] = _restored(description, tensors)
        self._count += 1
        if self.complete:
            self.save()
        elif self.folder is not None and time.monotonic() >= self._due:
            self._checkpoint()
        if not self.resident:
            self._kept.clear()

    def save(self) -> None:
        """Write the tapes that are in memory only; do nothing without a folder.

        Raises:
            RunError: the folder cannot be written, or its disk is full.
        """
        if self.folder is None or self._saved == self._count:
            return
        if self._run:
            self._run.begin()
        if not self._saved:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise runs.RunError(
                    f"{self.folder}: cannot be created ({error.strerror}); choose another one"
                ) from error
        self._begin(self.folder)
        for i in range(self._saved, self._count):
            tensors: dict[str, Tensor] = {}
            description = _described(self._kept[i], "", tensors)
            stored.save_tensors(self._path(i), tensors, {"tape": json.dumps(description), "trace": self._mark})
            self._saved = i + 1
        self._due = time.monotonic() + EVERY

    def _begin(self, folder: Path) -> None:
        """Write whose tapes the folder has; another process may have done so since this one looked.

        Raises:
            TapeError: it has begun another trace there.
        """
        head: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "identity": self.identity}
        if self._origin:
            head["model"] = self._origin.record()
        if not self._begun:
            _remove_abandoned(folder)
            self._begun = True
        if not self._head and not runs.save_new_json(folder / "trace.json", head):
            self._compare(folder)
        if self._head and self._head != head:
            runs.save_json(folder / "trace.json", head)
        self._head = head

    def _checkpoint(self) -> None:
        """Save the tapes; a failure is reported to the run, if there is one, and the next checkpoint tries again."""
        try:
            self.save()
        except runs.RunError as error:
            if self._run is None:
                raise
            self._run.failed(error)
            self._due = time.monotonic() + EVERY

    def remove(self) -> None:
        """Delete the files of the tapes, also those of a killed attempt, and the folder if it is then empty."""
        if self.folder is None or not self.folder.is_dir():
            return
        for pattern in ("block-*.safetensors", ".block-*.tmp", ".trace.json.*.tmp", "trace.json"):
            for path in self.folder.glob(pattern):
                path.unlink()
        self._saved = 0
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    @property
    def saved(self) -> int:
        """Number of blocks whose tapes are in the folder."""
        return self._saved

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"block-{index:03d}.safetensors"

    def _load(self, index: int) -> BlockTape:
        path = self._path(index)
        try:
            tensors, metadata = stored.load_tensors(path)
            there = {name: t.to(self.device) if t.is_floating_point() else t for name, t in tensors.items()}
            tape = _restored(json.loads(metadata["tape"]), there)  # indices stay on the host
        except runs.JournalError as error:
            raise TapeError(f"{error}; remove the folder to trace the prompt again") from error
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise TapeError(f"{path}: is not a tape; remove the folder to trace the prompt again") from error
        if metadata.get("trace") != self._mark:
            raise TapeError(f"{path}: belongs to another trace; remove the folder to trace the prompt again")
        if not isinstance(tape, BlockTape):
            raise TapeError(f"{path}: is not the tape of a block; remove the folder to trace the prompt again")
        return tape

    def _compare(self, folder: Path) -> None:
        """Check that the tapes in the folder are of this trace.

        Raises:
            TapeError: they are of another trace; the message names the differences.
        """
        try:
            content = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
            schema, identity = content["schema_version"], dict(content["identity"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise TapeError(f"{folder}: trace.json is damaged; remove the folder or choose another one") from error
        if schema != SCHEMA_VERSION:
            version = str(schema)[:20]
            raise TapeError(f"{folder}: has schema version {version!r}, this ggjac reads {SCHEMA_VERSION}; remove it")
        differing = [key for key in {**identity, **self.identity} if identity.get(key) != self.identity.get(key)]
        if differing:
            what = "; ".join(
                f"{key} was {_short(identity.get(key))}, is {_short(self.identity.get(key))}" for key in differing
            )
            raise TapeError(f"{folder}: contains another trace ({what}); choose another --trace folder")
        try:
            if self._origin:
                self._origin.compare(content.get("model"))
        except OriginError as error:
            raise TapeError(
                f"{folder}: its forward pass cannot be used again: {error}; choose another --trace folder, or remove it"
            ) from error
        self._head = content


def _remove_abandoned(folder: Path) -> None:
    """Delete what killed processes have left unfinished; another one may be writing to the same trace."""
    for path in folder.glob(".*.tmp"):
        match = re.fullmatch(r"\.(block-\d+\.safetensors|trace\.json)\.(\d+)\.tmp", path.name)
        with contextlib.suppress(OSError):
            if match and time.time() - path.stat().st_mtime > ABANDONED and not is_running(int(match[2])):
                path.unlink()


def _described(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a tape as plain JSON, its tensors collected under the paths of their fields."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, _TAPES):
        fields = {field: _described(getattr(value, field), f"{name}.{field}", tensors) for field in value._fields}
        return {"kind": type(value).__name__, "fields": fields}
    if isinstance(value, tuple):
        return [_described(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the tape of a description; the inverse of `_described`."""
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        fields = {field: _restored(part, tensors) for field, part in value["fields"].items()}
        if "pattern" in fields and value["kind"] == "AttentionTape":  # of version 0.1.0: a mixer was all of the branch
            passed = fields.pop("passed")
            written = None if passed is None else Factor(passed, fields["limits"])
            fields["mixers"] = (MixerTape("attention", fields.pop("pattern"), written=written),)
            del fields["limits"]
        return _KINDS[value["kind"]](**fields)
    if isinstance(value, list):
        return tuple(_restored(item, tensors) for item in value)
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
