"""A folder that records what a long run has computed, so that it survives kill -9, a loss of power and a full disk.

The program is deterministic; to resume it is to run it again. Every product (one sweep over the weights) that an
earlier attempt finished is read from the disk, the one in progress continues after its last saved block, and the rest
is computed. The result has the same bits, because tensors come back with their bits, dtype and memory layout: BLAS may
round differently at another stride or alignment.

    journal.json               schema version, the identity of the run and its model file, written first
    lock                       held by the running process; see `ggjac.runs.lock`
    product-0007.safetensors   a finished product
    state.safetensors          the product in progress, after its last saved block
    results.json               small results, by name

No file is ever incomplete: each is written under a temporary name, flushed and renamed. Every tensor file carries
a digest of its content, the identity's hash and a hash of the product's inputs. Nothing is written before it is due, so
that a short run writes nothing.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ggjac import runs
from ggjac.gguf import GGUFFile
from ggjac.runs import lock
from ggjac.runs.files import JournalError
from ggjac.runs.origin import Origin, OriginError
from ggjac.runs.tensors import canonical, hash_tensor, load_tensors, plain, save_tensors
from ggjac.sizes import WAITING_BYTES

SCHEMA_VERSION = 1

# Writing may take a tenth of the time, but the next checkpoint is at most this far away, in seconds.
LONGEST_WAIT = 60.0

_OWN_FILE = r"journal\.json|results\.json|state\.safetensors|product-\d{4,}\.safetensors"


class Product:
    """One product of a run; made by `Journal.product`.

    Attributes:
        number: its place in the run, from 0.
        kind: what it does with its inputs ("up", "down").
        inputs: a hash of its inputs.
        result: the result, if an earlier attempt finished this product: use it instead of computing.
        done: steps that an earlier attempt completed; 0 to start from the inputs.
        state: the tensors after step `done`; None to start from the inputs.
    """

    def __init__(self, journal: "Journal", number: int, kind: str, inputs: str):
        self.number, self.kind, self.inputs = number, kind, inputs
        self.result: list[Tensor] | None = None
        self.done = 0
        self.state: list[Tensor] | None = None
        self._journal = journal

    def reached(self, done: int, state: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Record that step `done` is complete, with all that the next steps need; write it if a write is due.

        `state` is called at once and should return existing tensors: they are kept without a copy until the next step.
        Torch counts changes in place; tensors that have changed since are not saved. (Changes behind torch's back, or
        to tensors made in inference mode, are not noticed.)

        Returns:
            the same tensors if their layout was plain, copies of the others. To continue with the returned tensors
            makes the bits of an uninterrupted run equal to those of a resumed one.
        """
        tensors = [plain(tensor) for tensor in state()]
        self.state = None  # used by now
        self._journal.keep_state(_Kept.of(self, done, tensors))
        return tensors

    def finish(self, result: list[Tensor]) -> list[Tensor]:
        """Record the result, copied unless it is written at once; return it in plain layout, as `reached` does."""
        tensors = [plain(tensor) for tensor in result]
        self.state = None
        self._journal.keep_result(_Kept.of(self, None, tensors))
        return tensors


@dataclass(frozen=True)
class _Kept:
    """Tensors that wait to be written, and the header of their file."""

    header: dict[str, Any]
    tensors: list[Tensor]
    versions: list[int | None]

    @classmethod
    def of(cls, product: Product, done: int | None, tensors: list[Tensor]) -> "_Kept":
        """Describe a product's tensors after step `done`, or its result where `done` is None."""
        header = {
            "number": product.number,
            "kind": product.kind,
            "inputs": product.inputs,
            "done": done,
            "devices": [str(tensor.device) for tensor in tensors],
        }
        return cls(header, tensors, _versions(tensors))

    def copied(self) -> "_Kept":
        """Return the same with copies in memory on the CPU."""
        copies = [torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor) for tensor in self.tensors]
        return _Kept(self.header, copies, _versions(copies))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def unchanged(self) -> bool:
        return self.versions == _versions(self.tensors)


@runtime_checkable
class Records(Protocol):
    """What gives the products of a run, in order: a journal, or the one that several processes share."""

    def product(self, kind: str, inputs: Sequence[Tensor]) -> Product:
        """Return the next product, with the result or state that an earlier attempt saved."""

    def agreed(self, found: Tensor) -> Tensor:
        """Return numbers that decide how the run goes on, as one process has found them."""


class Journal:
    """The record of a run in a folder; made by `Journal.open`.

    As a context manager it saves what is pending when the block ends, even by an error or Ctrl-C, and frees the lock.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        *,
        every: float,
        memory: int,
        on_warning: Callable[[str], None],
        locked: int,
        head: dict[str, Any],
        made: list[Path],
        origin: Origin | None,
    ):
        self.folder, self.identity, self._origin = folder, identity, origin
        self._every, self._memory, self._on_warning = every, memory, on_warning
        self._lock: int | None = locked
        self._head, self._made = head, made
        self._run = hashlib.blake2b(canonical(identity), digest_size=16).hexdigest()
        self._resumed = self._state_on_disk = bool(head)
        self._results: dict[str, Any] = self._load_results() if head else {}
        self._unsaved_results = False
        self._pending: list[_Kept] = []
        self._state: _Kept | None = None
        self._next = 0
        self._warned: set[str] = set()
        self._due = time.monotonic() + every

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        identity: Mapping[str, Any],
        *,
        resume: bool,
        model: GGUFFile | None = None,
        every: float = 30.0,
        memory: int = WAITING_BYTES,
        on_warning: Callable[[str], None] | None = None,
    ) -> "Journal":
        """Begin a run's journal in a folder, or continue the one that is there.

        Args:
            folder: created if missing; at most one process works in it.
            identity: plain JSON, everything that decides the bits of the results: file, tokens, dtype, seed, versions.
            resume: continue an earlier attempt, which must have the same identity. If it ended before it saved
                anything, the run starts from the beginning.
            model: the file that the run reads; its content, too, must be that of the earlier attempt. Nothing is
                written once it has changed.
            every: seconds between writes; more (up to a minute) if writing is slow; 0 to write always.
            memory: bytes of finished products that may wait in memory.
            on_warning: called once for each reason why progress cannot be saved. The run continues and tries again.

        Raises:
            JournalError: another process is working there, the folder cannot be used, it contains an unfinished run
                (without `resume`), or it contains none or a different one (with `resume`).
        """
        folder = Path(folder)
        given: dict[str, Any] = json.loads(json.dumps(identity, allow_nan=False))  # as it will read back
        if resume and not (folder / "journal.json").exists() and not (folder / "lock").exists():
            raise JournalError(f"{folder}: there is no run to resume; leave out --resume, or give the -o of that run")
        on_warning = on_warning or lock.print_warning
        made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        with lock.explaining(folder):
            folder.mkdir(parents=True, exist_ok=True)
            locked = lock.acquire(folder / "lock", folder, on_warning)
        try:
            origin = Origin(model) if model else None
            head = {}
            if (folder / "journal.json").exists():
                head = _resumable(folder, given, origin, resume)
                given = head["identity"]
            _remove_leftovers(folder)
            options: dict[str, Any] = {"every": every, "memory": memory, "on_warning": on_warning}
            return cls(folder, given, **options, locked=locked, head=head, made=made, origin=origin)
        except BaseException:
            lock.release(locked)
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            self.flush()
        except ValueError:  # the model file has changed
            if error is None:
                raise
        finally:
            self.close()

    def agreed(self, found: Tensor) -> Tensor:
        """Return numbers as they are: no other process finds them."""
        return found

    def product(self, kind: str, inputs: Sequence[Tensor]) -> Product:
        """Return the next product of this run, with the result or state that an earlier attempt saved.

        Args:
            kind: what it does with its inputs ("up", "down"); it must be the same when the run is resumed.
            inputs: the vectors that it is applied to; they too must be the same, bit by bit.

        Raises:
            JournalError: a file is damaged, or the earlier attempt computed something else here.
        """
        hasher = hashlib.blake2b(digest_size=16)
        for tensor in inputs:
            hash_tensor(hasher, tensor)
        product = Product(self, self._next, kind, hasher.hexdigest())
        self._next += 1
        if self._resumed and (path := self._path(product.number)).exists():
            header, product.result = self._load(path)
            self._check(path, product, header)
            if header["done"] is not None:
                raise self._foreign(path, "is not a finished product")
        elif self._state_on_disk and (path := self.folder / "state.safetensors").exists():
            header, state = self._load(path)
            self._state_on_disk = header["number"] > product.number  # else it is used now, or obsolete
            if header["number"] == product.number:
                self._check(path, product, header)
                if header["done"] is None:
                    raise self._foreign(path, "is not a state")
                product.done, product.state = header["done"], state
        return product

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the JSON value that an earlier attempt recorded under this name, or compute and record it.

        The value is always returned as it reads back, with tuples as lists.
        """
        if name not in self._results:
            self._results[name] = json.loads(json.dumps(compute()))
            self._unsaved_results = True
            self._write_if_due()
        return json.loads(json.dumps(self._results[name]))  # a copy, which the caller may change

    def flush(self) -> bool:
        """Write everything pending now; return whether all of it is on the disk.

        Raises:
            GGUFError: the model file has changed; nothing was written.
        """
        if self._lock is None:
            return False
        if not (self._pending or self._state or self._unsaved_results):
            return True
        started = time.monotonic()
        try:
            complete = self._write()
        except runs.RunError as error:
            self.failed(error)
            complete = False
        now = time.monotonic()
        self._due = now + (max(self._every, min(LONGEST_WAIT, 10 * (now - started))) if self._every else 0.0)
        return complete

    def begin(self) -> None:
        """Write the run's identity, unless it is there: from then on the folder can be resumed.

        Raises:
            RunError: it cannot be written.
            GGUFError: the model file has changed.
        """
        head = {"schema_version": SCHEMA_VERSION, "identity": self.identity}
        if self._origin:
            head["model"] = self._origin.record()
        if head == self._head:
            return
        runs.save_bytes(self.folder / "journal.json", _readable(head))
        for folder in [] if self._head else self._made:
            with contextlib.suppress(OSError):
                runs.sync_folder(folder.parent)
        self._head = head

    def failed(self, error: runs.RunError) -> None:
        """Warn, once for each reason, that progress could not be saved; the computation continues."""
        self._warn(f"{self.folder}: progress cannot be saved ({_reason(error)}); the run continues and will retry")

    def close(self) -> None:
        """Free the folder for another process; nothing can be written afterwards."""
        if self._lock is not None:
            locked, self._lock = self._lock, None
            lock.release(locked)

    def remove(self) -> None:
        """Delete the journal's files, and its folder if that is then empty, because the run has succeeded."""
        if self._lock is None:
            return
        self._pending, self._state, self._unsaved_results = [], None, False
        try:
            paths = [path for path in self.folder.iterdir() if re.fullmatch(_OWN_FILE, path.name)]
            # journal.json last: it makes the rest a journal.
            for path in sorted(paths, key=lambda path: (path.name == "journal.json", path.name)):
                path.unlink()
            if sys.platform == "win32":  # an open file cannot be deleted there
                self.close()
            (self.folder / "lock").unlink()
        except OSError as error:
            self._warn(f"{self.folder}: the journal of this finished run cannot be removed ({runs.one_line(error)})")
        self.close()
        with contextlib.suppress(OSError):  # not empty: something else lives there
            self.folder.rmdir()

    # Called by products.

    def keep_state(self, kept: _Kept) -> None:
        """Replace the state of the product in progress; write it if a write is due."""
        self._state = kept
        self._write_if_due()

    def keep_result(self, kept: _Kept) -> None:
        """Add a finished product; write it if a write is due or memory is full, else keep a copy."""
        self._state = None
        self._pending.append(kept)
        self._write_if_due(now=self._waiting > self._memory)
        if self._pending and self._pending[-1] is kept:  # not written, and the caller may change the tensors
            if self._waiting > self._memory:
                del self._pending[-1]
                self._warn(f"{self.folder}: finished work that cannot be saved exceeds the memory reserved for it")
            else:
                self._pending[-1] = kept.copied()

    @property
    def _waiting(self) -> int:
        """Bytes of finished products that are in memory only."""
        return sum(kept.nbytes for kept in self._pending)

    # Writing.

    def _write_if_due(self, *, now: bool = False) -> None:
        if now or time.monotonic() >= self._due:
            self.flush()

    def _write(self) -> bool:
        """Write what is pending, oldest first. Whatever was written before an error is no longer pending.

        Raises:
            RunError: it cannot be written, for example because the disk is full.
        """
        self.begin()
        while self._pending:
            kept = self._pending[0]
            if kept.unchanged:  # else an interrupt came before it was copied
                self._save(self._path(kept.header["number"]), kept)
            del self._pending[0]
        if self._unsaved_results:
            content = {"run": self._run, "digest": self._digest_of_results(self._results), "results": self._results}
            runs.save_bytes(self.folder / "results.json", _readable(content))
            self._unsaved_results = False
        if self._state is not None:
            if not self._state.unchanged:
                return False
            self._save(self.folder / "state.safetensors", self._state)
            self._state = None
        return True

    def _save(self, path: Path, kept: _Kept) -> None:
        tensors = {str(i): tensor for i, tensor in enumerate(kept.tensors)}
        save_tensors(path, tensors, {"journal": json.dumps(kept.header | {"run": self._run})})

    def _path(self, number: int) -> Path:
        return self.folder / f"product-{number:04d}.safetensors"

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            self._on_warning(message)

    # Reading.

    def _load(self, path: Path) -> tuple[dict[str, Any], list[Tensor]]:
        """Return a file's header, and its tensors on their original devices.

        Raises:
            JournalError: it is damaged, or belongs to another run.
        """
        try:
            loaded, metadata = load_tensors(path)
        except JournalError as error:
            raise self._foreign(path, str(error).removeprefix(f"{path}: ")) from error
        try:
            header = json.loads(metadata["journal"])
            number, done, devices = header["number"], header["done"], header["devices"]
            tensors = [loaded.pop(str(i)) for i in range(len(devices))]
            whole = not loaded and isinstance(number, int) and (done is None or isinstance(done, int))
        except (ValueError, LookupError, TypeError, RecursionError):
            whole = False
        if not whole or header.get("run") != self._run:
            raise self._foreign(path, "belongs to another run")
        try:
            return header, [tensor.to(device) for tensor, device in zip(tensors, devices, strict=True)]
        except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
            raise JournalError(
                f"{path}: torch cannot use the device of these tensors here ({runs.one_line(error)})"
            ) from error

    def _check(self, path: Path, product: Product, header: dict[str, Any]) -> None:
        """Compare a product with the header of its file.

        Raises:
            JournalError: they differ.
        """
        if header["number"] != product.number:
            raise self._foreign(path, f"holds product {header['number']}, not {product.number}")
        differs = [name for name in ("kind", "inputs") if header.get(name) != getattr(product, name)]
        if differs:
            how = f'"{header.get("kind")}", now "{product.kind}"' if "kind" in differs else "other input vectors"
            raise JournalError(
                f"{path}: the earlier attempt computed something else as product {product.number} ({how}), so this "
                "machine, its threads or its libraries do not repeat it bit by bit; choose another -o"
            )

    def _foreign(self, path: Path, reason: str) -> JournalError:
        return JournalError(f"{path}: {reason}; remove this file to compute its part again, or choose another -o")

    def _load_results(self) -> dict[str, Any]:
        path = self.folder / "results.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            results = content["results"]
            if content["digest"] != self._digest_of_results(results) or not isinstance(results, dict):
                raise ValueError("digest")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise self._foreign(path, "is damaged, or not a file of a journal") from error
        if content.get("run") != self._run:
            raise self._foreign(path, "belongs to another run")
        return results

    @staticmethod
    def _digest_of_results(results: Any) -> str:
        return hashlib.blake2b(canonical(results), digest_size=16).hexdigest()


# -- identity ----------------------------------------------------------------------------------------------------------


def _resumable(folder: Path, given: dict[str, Any], origin: Origin | None, resume: bool) -> dict[str, Any]:
    """Return what journal.json holds, if its run may be continued as `given`.

    Raises:
        JournalError: it is damaged, is not to be resumed, or belongs to a different run.
    """
    head = _stored_head(folder)  # first: without `resume`, damage is reported too
    if not resume:
        raise JournalError(
            f"{folder}: contains an unfinished run; continue it with --resume, choose another -o, or delete it"
        )
    _compare(folder, head["identity"], given)
    try:
        if origin:
            origin.compare(head.get("model"))
    except OriginError as error:
        raise JournalError(f"{folder}: cannot be resumed: {error}; choose another -o") from error
    return head


def _remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a kill left; the lock is held, so no other process is writing them.

    Raises:
        JournalError: one cannot be deleted.
    """
    with lock.explaining(folder):
        for path in folder.glob(".*.tmp"):
            if re.fullmatch(rf"\.({_OWN_FILE})\.\d+\.tmp", path.name):
                path.unlink()


def _stored_head(folder: Path) -> dict[str, Any]:
    """Return the content of `journal.json`.

    Raises:
        JournalError: the file is damaged, or has another schema version.
    """
    path = folder / "journal.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema, identity = content["schema_version"], content.get("identity")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise JournalError(f"{path}: is damaged, or not a journal; choose another -o") from error
    if schema != SCHEMA_VERSION or not isinstance(identity, dict):
        raise JournalError(
            f"{path}: has schema version {str(schema)[:20]!r}, but this ggjac reads {SCHEMA_VERSION}; resume with "
            "the version that began it, or choose another -o"
        )
    return content


def _compare(folder: Path, stored: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse to resume a different run, and name the differences.

    Raises:
        JournalError: the identities differ.
    """
    was, now = dict(_flat(stored)), dict(_flat(given))
    differing = [
        f"{key}: this run was started with {first}, now {second}"
        for key in (*was, *(key for key in now if key not in was))
        if (key in was) != (key in now) or was[key] != now[key]
        for first, second in [_shown(was.get(key, _ABSENT), now.get(key, _ABSENT))]
    ]
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise JournalError(
            f"{folder}: {'; '.join(differing[:3])}{more}. Give the same values to resume, or choose another -o"
        )


_ABSENT = object()


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested values under dotted names."""
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(first: Any, second: Any, width: int = 60) -> tuple[str, str]:
    """Return two different values as short text: of long ones, the part in which they begin to differ."""
    texts = ["nothing" if value is _ABSENT else repr(value) for value in (first, second)]
    if max(map(len, texts)) <= width:
        return texts[0], texts[1]
    same = next((i for i, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1]), min(map(len, texts)))
    start = max(0, same - width // 3)
    shown = [
        ("…" if start else "") + text[start : start + width] + ("…" if start + width < len(text) else "")
        for text in texts
    ]
    return shown[0], shown[1]


# -- small things ------------------------------------------------------------------------------------------------------


def _readable(content: Any) -> bytes:
    """Return JSON for a file; NaN is allowed, because only Python reads it back."""
    return (json.dumps(content, indent=1) + "\n").encode()


def _versions(tensors: Sequence[Tensor]) -> list[int | None]:
    """Return how often each tensor was changed in place; None for those of which torch keeps no count."""
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def _reason(error: runs.RunError) -> str:
    """Return why something could not be written, in a few words that are the same at every attempt."""
    if isinstance(error, runs.SpaceError):
        return "the disk is full"
    return runs.one_line(error.__cause__ or error)
