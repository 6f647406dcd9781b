"""A folder that remembers what a long run has computed, so that it survives kill -9, a loss of power and a full disk.

The program is deterministic. To resume it is to run it again: every product (one sweep over the weights) that an
earlier attempt finished is answered from the disk, the one in progress goes on after its last saved block, and what
follows is computed. The result has the same bits, because tensors come back with the bits, dtype and memory layout
that they had: BLAS may round otherwise at another stride or alignment.

    journal.json               schema version and the identity of the run, written first
    lock                       held by the process at work; the system frees it however that process ends
    product-0007.safetensors   a finished product
    state.safetensors          the product in progress, after its newest saved block
    results.json               small results, by name

Nothing is ever half there: each file is written under a temporary name, flushed and renamed. Every tensor file carries
a digest of its content, the identity's hash and a hash of the product's inputs. Nothing is written before it is due, so
that a short run writes nothing at all.
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
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ggjac import runs
from ggjac.sizes import WAITING_BYTES

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

SCHEMA_VERSION = 1

# What torch's allocator aligns to, in bytes.
ALIGNMENT = 64

# Writing may take a tenth of the time, but a checkpoint is never further than this, in seconds.
LONGEST_WAIT = 60.0

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_OWN_FILE = r"journal\.json|results\.json|state\.safetensors|product-\d{4,}\.safetensors"


class JournalError(ValueError):
    """A journal that cannot be begun, resumed or read; the message says where and why."""


# -- tensors on disk ---------------------------------------------------------------------------------------------------


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors of the `DTYPES`, bit by bit, to a safetensors file with a digest; durable when this returns.

    Raises:
        RunError: as `runs.writing_tensors`.
        ValueError: a tensor of another dtype, or metadata named `digest`, which is this function's own.
    """
    unknown = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in DTYPES]
    if unknown or "digest" in (metadata or {}):
        raise ValueError(f"{path}: cannot be saved: {', '.join(unknown) or 'metadata named digest'}")
    entries = {name: runs.Entry(DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    carried = dict(metadata or {})
    with runs.writing_tensors(path, entries, carried | {"digest": _digest(here, carried)}) as writer:
        for name, entry in entries.items():
            writer.write(name, _bytes(here[name]).view(runs.DTYPES[entry.dtype]).reshape(entry.shape))


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors that `save_tensors` wrote, each in memory of its own on the CPU, and the metadata.

    Comparing the digest takes a second for about 1 GB.

    Raises:
        JournalError: the file is missing, damaged, or not one of `save_tensors`.
    """
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                mapped = file.get_tensor(name)
                tensors[name] = torch.empty(mapped.shape, dtype=mapped.dtype)
                # As bytes: a damaged bool would be mended on the way, and its digest be right.
                tensors[name].reshape(-1).view(torch.uint8).copy_(mapped.reshape(-1).view(torch.uint8))
    except (SafetensorError, OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "is damaged, or no safetensors file"
        raise JournalError(f"{path}: {reason} ({_one_line(error)})") from error
    digest = metadata.pop("digest", None)
    if digest is None or not {tensor.dtype for tensor in tensors.values()} <= DTYPES.keys():
        raise JournalError(f"{path}: was not written by ggjac (it carries no digest)")
    if digest != _digest(tensors, metadata):
        raise JournalError(f"{path}: is damaged (its content does not match its digest)")
    return tensors, metadata


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor laid out as if read back from disk: itself where it is contiguous and aligned, else a copy."""
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= max(size, 1)
    if tensor.stride() == tuple(reversed(strides)) and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach())


def _bytes(tensor: Tensor) -> np.ndarray:
    """Return a tensor's bytes, in the order of its elements."""
    # `contiguous` is not enough: it calls an empty tensor with any strides so, which then cannot be viewed as bytes.
    return plain(tensor.detach().cpu()).reshape(-1).view(torch.uint8).numpy()


def _hashed(hasher: "hashlib.blake2b", tensor: Tensor) -> None:
    """Hash a tensor: dtype, shape and bytes."""
    hasher.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    hasher.update(_bytes(tensor).data)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return a hash of all that a file holds."""
    hasher = hashlib.blake2b(_canonical([sorted(metadata.items()), sorted(tensors)]), digest_size=16)
    for name in sorted(tensors):
        _hashed(hasher, tensors[name])
    return hasher.hexdigest()


# -- the journal -------------------------------------------------------------------------------------------------------


class Product:
    """One product of a run; made by `Journal.product`.

    Attributes:
        result: if an earlier attempt finished this product, its result: use it, do not compute.
        done: how many steps an earlier attempt had made; 0 to begin from nothing.
        state: where to go on from after step `done`; None to begin from nothing.
    """

    def __init__(self, journal: "Journal", number: int, kind: str, inputs: str):
        self.result: list[Tensor] | None = None
        self.done = 0
        self.state: list[Tensor] | None = None
        self._journal, self._number, self._kind, self._inputs = journal, number, kind, inputs

    def reached(self, done: int, state: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Remember that step `done` is behind, and all that the next steps need; write it if a write is due.

        `state` is called at once and should return existing tensors: they are kept without a copy, until the next
        boundary. Torch counts changes in place; tensors that were changed since are not saved. (Changes behind torch's
        back, or of tensors made in inference mode, are not seen.)

        Returns:
            the same tensors, where their layout was plain; copies of the others. Going on with what is returned makes
            the bits of a run that was never interrupted those of one that was.
        """
        tensors = [plain(tensor) for tensor in state()]
        self.state = None  # read, and of no more use
        self._journal._remember_state(self, done, tensors)
        return tensors

    def finish(self, result: list[Tensor]) -> list[Tensor]:
        """Remember the result (a copy of it, unless it is written at once); return it in plain layout, as `reached`."""
        tensors = [plain(tensor) for tensor in result]
        self.state = None
        self._journal._remember_result(self, tensors)
        return tensors

    def _header(self, done: int | None, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Say what a file about this product holds; `done` is None for the result."""
        devices = [str(tensor.device) for tensor in tensors]
        return {"number": self._number, "kind": self._kind, "inputs": self._inputs, "done": done, "devices": devices}


@dataclass(frozen=True)
class _Kept:
    """Tensors that wait to be written, and what their file says of them."""

    header: dict[str, Any]
    tensors: list[Tensor]
    versions: list[int | None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def unchanged(self) -> bool:
        return self.versions == _versions(self.tensors)


class Journal:
    """What a run has computed, kept in a folder; made by `Journal.open`.

    As a context manager it saves what is pending when the block ends, also by an error or Ctrl-C, and frees the lock.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        *,
        every: float,
        memory: int,
        on_warning: Callable[[str], None],
        lock: int,
        begun: bool,
        made: list[Path],
    ):
        self.folder, self.identity = folder, identity
        self._every, self._memory, self._on_warning = every, memory, on_warning
        self._lock: int | None = lock
        self._begun, self._made = begun, made
        self._run = hashlib.blake2b(_canonical(identity), digest_size=16).hexdigest()
        self._resumed = self._state_on_disk = begun
        self._results: dict[str, Any] = self._load_results() if begun else {}
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
        every: float = 30.0,
        memory: int = WAITING_BYTES,
        on_warning: Callable[[str], None] | None = None,
    ) -> "Journal":
        """Begin a run's journal in a folder, or go on with the one that is there.

        Args:
            folder: made if it is missing; at most one process works in it.
            identity: plain JSON, all that decides the bits of the results: file, tokens, dtype, seed, versions, ...
            resume: go on with an earlier attempt, which must have the same identity. Where that one was ended before it
                saved anything, the run begins anew.
            every: seconds from one write to the next, more (up to a minute) where writing is slow; 0 writes always.
            memory: bytes of finished products that may wait in memory.
            on_warning: told, once for each reason, when progress cannot be saved. The run goes on and tries again.

        Raises:
            JournalError: another process works there, the folder cannot be used, it holds an unfinished run (without
                `resume`), it holds none or another one (with `resume`).
        """
        folder = Path(folder)
        given: dict[str, Any] = json.loads(json.dumps(identity, allow_nan=False))  # as it will read back
        made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        if resume and not (folder / "journal.json").exists() and not (folder / "lock").exists():
            raise JournalError(f"{folder}: there is no run to resume; leave out --resume, or give the -o of that run")
        on_warning = on_warning or _print_warning
        with _explaining(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = _acquire(folder / "lock", folder, on_warning)
        try:
            begun = (folder / "journal.json").exists()
            if begun:
                stored = _stored_identity(folder)  # of a damaged journal, too, the first thing to hear is its damage
                if not resume:
                    raise JournalError(
                        f"{folder}: holds an unfinished run; go on with --resume, or start anew with another -o"
                    )
                _compare(folder, stored, given)
                given = stored
            with _explaining(folder):
                for path in folder.glob(".*.tmp"):  # left by a kill: nobody else writes here now
                    if re.fullmatch(rf"\.({_OWN_FILE})\.\d+\.tmp", path.name):
                        path.unlink()
            return cls(
                folder,
                given,
                every=every,
                memory=memory,
                on_warning=on_warning,
                lock=lock,
                begun=begun,
                made=made,
            )
        except BaseException:
            _release(lock)
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.flush()
        finally:
            self.close()

    def product(self, kind: str, inputs: Sequence[Tensor]) -> Product:
        """Return the next product of this run, with what earlier attempts know of it.

        Args:
            kind: what it does with its inputs ("up", "down"); it must be the same when the run is resumed.
            inputs: the vectors that it is applied to; they too must be the same, bit by bit.

        Raises:
            JournalError: a file is damaged, or the earlier attempt was doing something else here.
        """
        hasher = hashlib.blake2b(digest_size=16)
        for tensor in inputs:
            _hashed(hasher, tensor)
        product = Product(self, self._next, kind, hasher.hexdigest())
        self._next += 1
        if self._resumed and (path := self._path(product._number)).exists():
            header, product.result = self._load(path)
            self._check(path, product, header)
            if header["done"] is not None:
                raise self._foreign(path, "it is no finished product")
        elif self._state_on_disk and (path := self.folder / "state.safetensors").exists():
            header, state = self._load(path)
            self._state_on_disk = header["number"] > product._number  # else it is used now, or of no more use
            if header["number"] == product._number:
                self._check(path, product, header)
                if header["done"] is None:
                    raise self._foreign(path, "it is no state")
                product.done, product.state = header["done"], state
        return product

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the JSON value that an earlier attempt kept under this name, or compute and keep it.

        The value is returned as it reads back (tuples as lists), also the first time.
        """
        if name not in self._results:
            self._results[name] = json.loads(json.dumps(compute()))
            self._unsaved_results = True
            self._write_if_due()
        return json.loads(json.dumps(self._results[name]))  # the caller's own, to change

    def flush(self) -> bool:
        """Write everything pending now; return whether all that is remembered is on the disk."""
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
        """Write the run's identity, if it is not there: what lies in the folder from now on can be resumed.

        Raises:
            RunError: it cannot be written.
        """
        if self._begun:
            return
        content = {"schema_version": SCHEMA_VERSION, "identity": self.identity}
        runs.save_bytes(self.folder / "journal.json", _readable(content))
        for folder in self._made:
            with contextlib.suppress(OSError):
                runs.sync_folder(folder.parent)
        self._begun = True

    def failed(self, error: runs.RunError) -> None:
        """Tell once for each reason that progress could not be saved; what is computed goes on."""
        self._warn(f"{self.folder}: progress cannot be saved ({_reason(error)}); going on, and trying again")

    def close(self) -> None:
        """Free the folder for another process; nothing can be written from here on."""
        if self._lock is not None:
            lock, self._lock = self._lock, None
            _release(lock)

    def remove(self) -> None:
        """Delete the journal's files, and its folder if that is then empty: the run has succeeded."""
        if self._lock is None:
            return
        self._pending, self._state, self._unsaved_results = [], None, False
        try:
            paths = [path for path in self.folder.iterdir() if re.fullmatch(_OWN_FILE, path.name)]
            # What makes the rest a journal goes last.
            for path in sorted(paths, key=lambda path: (path.name == "journal.json", path.name)):
                path.unlink()
            if sys.platform == "win32":  # an open file cannot be deleted there
                self.close()
            (self.folder / "lock").unlink()
        except OSError as error:
            self._warn(f"{self.folder}: the journal of this finished run cannot be removed ({_one_line(error)})")
        self.close()
        with contextlib.suppress(OSError):  # not empty: something else lives there
            self.folder.rmdir()

    # What products call.

    def _remember_state(self, product: Product, done: int, tensors: list[Tensor]) -> None:
        self._state = _Kept(product._header(done, tensors), tensors, _versions(tensors))
        self._write_if_due()

    def _remember_result(self, product: Product, tensors: list[Tensor]) -> None:
        self._state = None
        kept = _Kept(product._header(None, tensors), tensors, _versions(tensors))
        self._pending.append(kept)
        self._write_if_due(now=self._waiting > self._memory)
        if self._pending and self._pending[-1] is kept:  # the caller may change the result before it is written
            if self._waiting > self._memory:
                del self._pending[-1]
                self._warn(f"{self.folder}: finished work that cannot be saved exceeds the memory kept for it")
            else:
                copies = [torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor) for tensor in tensors]
                self._pending[-1] = _Kept(kept.header, copies, _versions(copies))

    @property
    def _waiting(self) -> int:
        """Bytes of finished products that are in memory only."""
        return sum(kept.nbytes for kept in self._pending)

    # Writing.

    def _write_if_due(self, *, now: bool = False) -> None:
        if now or time.monotonic() >= self._due:
            self.flush()

    def _write(self) -> bool:
        """Write what is pending, oldest first; what was written is no longer pending, wherever an error strikes.

        Raises:
            RunError: the disk is full, say.
        """
        self.begin()
        while self._pending:
            kept = self._pending[0]
            if kept.unchanged:  # else an interrupt came before it could be copied
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
        """Return what a file says of itself, and its tensors on the devices where they were.

        Raises:
            JournalError: it is damaged, or of another run.
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
            raise JournalError(f"{path}: torch cannot use its device here ({_one_line(error)})") from error

    def _check(self, path: Path, product: Product, header: dict[str, Any]) -> None:
        """Compare a product with what a file holds.

        Raises:
            JournalError: they are not the same.
        """
        wanted = product._header(None, [])
        if header["number"] != wanted["number"]:
            raise self._foreign(path, f"holds product {header['number']}, not {wanted['number']}")
        differs = [name for name in ("kind", "inputs") if header.get(name) != wanted[name]]
        if differs:
            how = f'"{header.get("kind")}", now "{product._kind}"' if "kind" in differs else "other input vectors"
            raise JournalError(
                f"{path}: the earlier attempt computed something else as product {product._number} ({how}), so this "
                "machine, its threads or its libraries do not repeat it bit by bit; start anew with another -o"
            )

    def _foreign(self, path: Path, reason: str) -> JournalError:
        return JournalError(
            f"{path}: {reason}; remove this file to compute its part again, or start anew with another -o"
        )

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
            raise self._foreign(path, "is damaged, or no file of a journal") from error
        if content.get("run") != self._run:
            raise self._foreign(path, "belongs to another run")
        return results

    @staticmethod
    def _digest_of_results(results: Any) -> str:
        return hashlib.blake2b(_canonical(results), digest_size=16).hexdigest()


# -- identity ----------------------------------------------------------------------------------------------------------


def _stored_identity(folder: Path) -> dict[str, Any]:
    """Return the identity in `journal.json`.

    Raises:
        JournalError: the file is damaged, or of another schema version.
    """
    path = folder / "journal.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema, identity = content["schema_version"], content.get("identity")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise JournalError(f"{path}: is damaged, or no journal; start anew with another -o") from error
    if schema != SCHEMA_VERSION or not isinstance(identity, dict):
        raise JournalError(
            f"{path}: is of schema version {str(schema)[:20]!r}, this ggjac reads {SCHEMA_VERSION}; resume with the "
            "version that began it, or start anew with another -o"
        )
    return identity


def _compare(folder: Path, stored: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse to resume another run, and name what differs.

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
            f"{folder}: {'; '.join(differing[:3])}{more}. Give the same to resume, or start anew with another -o"
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
    """Return two differing values as short text: where they are long, the part in which they begin to differ."""
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


# -- the lock ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(path: str | os.PathLike[str], *, on_warning: Callable[[str], None] | None = None) -> Iterator[None]:
    """Keep other processes from a file in this block, by a lock beside it that is gone in the end.

    Args:
        path: of the file, which need not be there; by links to it, it is the same one.
        on_warning: told where the file system has no locks.

    Raises:
        JournalError: another process is working there, or the lock cannot be made.
    """
    file = Path(os.path.realpath(path))
    lock = file.with_name(f"{file.name}.lock")
    with _explaining(file):
        descriptor = _acquire(lock, Path(path), on_warning or _print_warning)
    try:
        yield
    finally:
        if sys.platform == "win32":  # an open file cannot be deleted there
            _release(descriptor)
        with contextlib.suppress(OSError):
            lock.unlink()
        if sys.platform != "win32":
            _release(descriptor)


def _acquire(path: Path, what: Path, on_warning: Callable[[str], None]) -> int:
    """Return the descriptor of a lock file, locked; messages name what it protects.

    Raises:
        JournalError: another process holds it.
        OSError: it cannot be created.
    """
    while True:
        # Not through a link: a folder from strangers must not have us write into a file elsewhere.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if sys.platform == "win32":
                os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # what is locked cannot be read, and the id below should be
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                os.lseek(descriptor, 0, os.SEEK_SET)
            else:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            os.lseek(descriptor, 0, os.SEEK_SET)
            holder = os.read(descriptor, 20).decode("ascii", "replace").strip()
            os.close(descriptor)
            who = f"another ggjac process (pid {holder})" if holder.isdigit() else "another ggjac process"
            raise JournalError(f"{who} is working in {what}; wait for it, or choose another -o") from error
        except OSError as error:  # a network file system without locks
            on_warning(f"{what}: cannot be locked ({_one_line(error)}); let no other process work there")
        # The former holder may have deleted the file between our opening and locking it: then it protects nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    with contextlib.suppress(OSError):  # only for the message above; the disk may be full
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def _release(descriptor: int) -> None:
    """Free the lock: closing the file does, unless a forked child has it open too."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


# -- small things ------------------------------------------------------------------------------------------------------


def _canonical(content: Any) -> bytes:
    """Return JSON by which equal contents are equal bytes."""
    return json.dumps(content, sort_keys=True).encode()


def _readable(content: Any) -> bytes:
    """Return JSON for a file; NaN is allowed, for only Python reads it back."""
    return (json.dumps(content, indent=1) + "\n").encode()


def _versions(tensors: Sequence[Tensor]) -> list[int | None]:
    """Return how often each tensor was changed in place, where torch counts that."""
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def _reason(error: runs.RunError) -> str:
    """Say in a few words, the same at every attempt, why something could not be written."""
    if isinstance(error, runs.SpaceError):
        return "the disk is full"
    return _one_line(error.__cause__ or error)


def _one_line(error: BaseException) -> str:
    """Return an error's message, shortened to one line without paths."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.splitlines() or [type(error).__name__])[0][:120]


def _print_warning(message: str) -> None:
    print(f"Warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def _explaining(folder: Path) -> Iterator[None]:
    """Turn the system's errors about the folder into one line that says what to do."""
    try:
        yield
    except OSError as error:
        raise JournalError(f"{folder}: cannot be written ({_one_line(error)}); choose another -o") from error
