"""The files of a command, written atomically: JSON, and safetensors that may be larger than memory.

Every file is written under a temporary name next to its destination, flushed to the disk, and renamed; the folder is
flushed too, so that a loss of power leaves either the old file or the new one. Tensors are written piece by piece, so
that a dense Jacobian larger than memory can be saved. The format is safetensors (a length, a JSON header, raw bytes),
which is read without pickle.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ggjac.units import size

SCHEMA_VERSION = 2
READABLE = (1, SCHEMA_VERSION)  # by the report

# Folders of the package that present results and compute none: after a change there, runs can still be resumed.
PRESENTATION = ("cli", "drawing", "report")


class Dtype(NamedTuple):
    """One storage type of safetensors: the NumPy dtype of an array that holds it, and torch's name for it."""

    array: np.dtype[Any]
    torch: str


# By safetensors' name. NumPy has no bfloat16: its bits travel as 16-bit integers.
DTYPES: dict[str, Dtype] = {
    "F64": Dtype(np.dtype("<f8"), "float64"),
    "F32": Dtype(np.dtype("<f4"), "float32"),
    "F16": Dtype(np.dtype("<f2"), "float16"),
    "BF16": Dtype(np.dtype("<u2"), "bfloat16"),
    "I64": Dtype(np.dtype("<i8"), "int64"),
    "I32": Dtype(np.dtype("<i4"), "int32"),
    "U8": Dtype(np.dtype("u1"), "uint8"),
    "BOOL": Dtype(np.dtype("?"), "bool"),
}


class RunError(ValueError):
    """A result that cannot be written or read; the message says which and why."""


class SpaceError(RunError):
    """The disk has too little space for a result."""

    will_not_fit = True  # the command line's exit code 4


class JournalError(ValueError):
    """Saved progress that cannot be begun, resumed or read, or is locked; the message says where and why."""


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: a safetensors dtype (a key of `DTYPES`) and a shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype].array.itemsize


class TensorWriter:
    """Write the rows of declared tensors to an open safetensors file, in any order. Made by `writing_tensors`."""

    def __init__(self, file: Any, entries: Mapping[str, Entry], metadata: Mapping[str, str]):
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._file, self._entries, self._starts = file, entries, {}
        offset = 0
        # The widest types first keeps every tensor aligned to its element size.
        for name, entry in sorted(entries.items(), key=lambda item: (-DTYPES[item[1].dtype].array.itemsize, item[0])):
            self._starts[name] = offset
            header[name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.nbytes],
            }
            offset += entry.nbytes
        encoded = json.dumps(header, ensure_ascii=True).encode()
        encoded += b" " * (-len(encoded) % 8)
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._data = 8 + len(encoded)
        file.truncate(self._data + offset)

    def write(self, name: str, values: np.ndarray, start: int = 0) -> None:
        """Write `values` as rows `start:` (along the first axis) of a declared tensor."""
        entry = self._entries[name]
        dtype = DTYPES[entry.dtype].array
        shape = entry.shape or (1,)  # a scalar is one row
        values = values if entry.shape else values.reshape(1)
        if values.shape[1:] != shape[1:] or start + len(values) > shape[0]:
            raise ValueError(f"{name}: rows {start}: of shape {values.shape} do not fit into {entry.shape}")
        self._file.seek(self._data + self._starts[name] + start * math.prod(shape[1:]) * dtype.itemsize)
        self._file.write(np.ascontiguousarray(values, dtype).data)


@contextlib.contextmanager
def writing_tensors(
    path: str | os.PathLike[str], entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None
) -> Iterator[TensorWriter]:
    """Open a safetensors file for writing; it appears under its name if the block ends without an error.

    Raises:
        SpaceError: the disk is too full.
        RunError: the folder is missing or not writable.
    """
    path = Path(path)
    needed = sum(entry.nbytes for entry in entries.values())
    with _replacing(path, needed) as temporary, open(temporary, "wb") as file:
        yield TensorWriter(file, entries, metadata or {})
        file.flush()
        os.fsync(file.fileno())


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write whole arrays to a safetensors file: floats as F32 or F64, integers as I64.

    Raises:
        RunError: as `writing_tensors`.
    """
    entries = {name: Entry(_stored(array.dtype), array.shape) for name, array in tensors.items()}
    with writing_tensors(path, entries, metadata) as writer:
        for name, array in tensors.items():
            writer.write(name, array)


def save_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a JSON file; NaN and infinity, which JSON lacks, are refused.

    Raises:
        ValueError: the content has such a number.
        RunError: as `writing_tensors`.
    """
    save_bytes(path, json_text(content).encode("utf-8"))


def save_new_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> bool:
    """Write a JSON file unless there is one; return whether it was written. Of two processes only one succeeds.

    Raises:
        ValueError: as `save_json`.
        RunError: as `writing_tensors`.
    """
    try:
        save_bytes(path, json_text(content).encode("utf-8"), new=True)
    except FileExistsError:
        return False
    return True


def save_bytes(path: str | os.PathLike[str], content: bytes, *, new: bool = False) -> None:
    """Write a file; with `new`, only where there is none.

    Raises:
        FileExistsError: there is one, and `new`.
        RunError: as `writing_tensors`.
    """
    with _replacing(Path(path), len(content), new=new) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def json_text(content: Mapping[str, Any]) -> str:
    """Return indented JSON with readable text, in which all invisible characters are escaped.

    Control and bidi characters from a stranger's file then cannot manipulate a terminal, and lone surrogates (path
    bytes that are not UTF-8) can be encoded.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    # Outside of strings JSON is printable ASCII, so every match is inside one, where the escape means the same.
    return re.sub(r"[^ -~\n]", lambda match: match[0] if match[0].isprintable() else _escaped(match[0]), text) + "\n"


def _escaped(character: str) -> str:
    """Return a character as a JSON escape, or two beyond U+FFFF."""
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else json.dumps(character)[1:-1]


def check_writable(path: str | os.PathLike[str], needed: int = 0) -> None:
    """Create and remove a file next to `path`, so that a long computation does not fail when it saves.

    Raises:
        SpaceError: fewer than `needed` bytes are free.
        RunError: the folder is missing or not writable, or `path` is a folder or a device.
    """
    path = Path(path)
    with explaining(path):
        if path.is_dir():
            raise IsADirectoryError
        if path.exists() and not path.is_file():  # for example /dev/null, which must not be replaced
            raise RunError(f"{path}: is not a regular file; give the name of a file")
        folder = Path(os.path.realpath(path)).parent
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise SpaceError(
                f"{path}: needs {size(needed)}, the disk has {size(free)} free; choose another -o, or make room"
            )
        probe = _temporary(path)
        probe.touch()
        probe.unlink()


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Flush a folder's entries to the disk if the system can: new files and renames then survive a loss of power.

    Raises:
        OSError: the disk failed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows cannot open folders, other systems cannot open write-only ones
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def check_folder(path: str | os.PathLike[str], *, unfinished: str) -> None:
    """Refuse a run folder that contains anything but an unfinished run, or cannot be created. Nothing is changed.

    Args:
        path: of the folder.
        unfinished: name of the folder inside it that an unfinished run has.

    Raises:
        RunError: it exists and contains something else, or its parent cannot be written.
    """
    path = Path(path)
    with explaining(path):
        begun = (path / unfinished).is_dir()
        if not begun and path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise RunError(f"{path}: exists; choose another name with -o, or remove it")
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        probe = existing / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()


def remove_unfinished(path: str | os.PathLike[str]) -> None:
    """Delete temporary files that killed processes left of a file, or in a folder; no process may be writing there.

    Raises:
        RunError: it cannot be deleted.
    """
    path = Path(os.path.realpath(path))
    folder, name = (path, r".+") if path.is_dir() else (path.parent, re.escape(path.name))
    with explaining(path):
        for leftover in folder.glob(".*.tmp"):
            if re.fullmatch(rf"\.{name}\.\d+\.tmp", leftover.name):
                leftover.unlink()


def provenance() -> dict[str, Any]:
    """Return the provenance of a result: package versions, Python, platform, and the time (UTC)."""
    versions = {}
    for package in ("ggjac", "torch", "numpy", "gguf", "llama-cpp-python"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "schema_version": SCHEMA_VERSION,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions | {"python": platform.python_version()},
        "platform": platform.platform(),
    }


def code_digest(package: str | os.PathLike[str] = Path(__file__).parents[1]) -> str:
    """Return a hash of all modules that compute: all but those in the folders `PRESENTATION`."""
    package = Path(package)
    hasher = hashlib.blake2b(digest_size=8)
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if path.is_file() and name.parts[0] not in PRESENTATION:
            content = path.read_bytes()
            hasher.update(f"{name.as_posix()} {len(content)}\n".encode() + content)
    return hasher.hexdigest()


def peak_memory() -> int | None:
    """Return the peak resident memory of this process in bytes; None if the system does not report it.

    It includes pages of the model's file, which the system keeps as long as nothing else needs the memory.
    """
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # Linux counts KiB


def load_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the contents of `run.json` in a run folder.

    Raises:
        RunError: it is not a run folder, or has another schema version.
    """
    file = Path(path) / "run.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: is not a run folder ({type(error).__name__} reading run.json)") from error
    if not isinstance(content, dict) or content.get("schema_version") not in READABLE:
        versions = " or ".join(map(str, READABLE))
        raise RunError(f"{path}: run.json does not have schema version {versions}; analyse the prompt again")
    return content


def one_line(error: BaseException) -> str:
    """Return an error's message without paths, its first line cut to 120 characters."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.splitlines() or [type(error).__name__])[0][:120]


def finite(value: Any) -> Any:
    """Return plain data with NaN and infinity, which JSON lacks, replaced by None."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def _temporary(path: Path) -> Path:
    """Return a hidden file next to `path`, links resolved; the process id keeps two runs apart."""
    path = Path(os.path.realpath(path))
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _stored(dtype: np.dtype) -> str:
    """Return the safetensors dtype for values of a NumPy dtype."""
    return "I64" if dtype.kind in "iu" else "F64" if dtype.itemsize == 8 else "F32"


@contextlib.contextmanager
def _replacing(path: Path, needed: int, *, new: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path` at the end, or remove it after an error.

    Raises:
        FileExistsError: there is a file of that name, and `new`.
        RunError: as `writing_tensors`.
    """
    check_writable(path, needed)
    temporary = _temporary(path)
    with explaining(path):
        try:
            yield temporary
            target = os.path.realpath(path)
            if new:
                _link(temporary, target)
            else:
                temporary.replace(target)
            sync_folder(os.path.dirname(target))
        finally:
            temporary.unlink(missing_ok=True)


def _link(temporary: Path, target: str) -> None:
    """Give a file its name if no other has it, in one step where the file system has hard links.

    Raises:
        FileExistsError: another has it.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:
        if os.path.exists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
        temporary.replace(target)


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turn the system's errors about `path` into a `RunError` of one line that says what to do."""
    try:
        yield
    except (BrokenPipeError, FileExistsError):  # the first concerns stdout, not a file
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SpaceError(f"{path}: the disk is full; choose another -o, or make room") from error
        reasons: dict[type[OSError], str] = {
            FileNotFoundError: "its folder does not exist; create it, or choose another -o",
            NotADirectoryError: "its folder is a file; choose another -o",
            IsADirectoryError: "is a folder; give the name of a file",
            PermissionError: "cannot be written (permission denied); choose another -o",
        }
        reason = reasons.get(type(error), f"cannot be written ({error.strerror or error}); choose another -o")
        raise RunError(f"{path}: {reason}") from error
