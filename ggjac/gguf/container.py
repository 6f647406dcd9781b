"""The GGUF container: map a model file, check its header, give access to its bytes.

A file is `header | padding | tensor data`; the header holds the counts, the metadata (key, type, value) and one entry
per tensor (name, sizes, type, offset). The file is mapped read-only, and only the header is read on opening. A model
may be split over several such files, `-00001-of-0000N.gguf`; they are opened together and appear as one.

Files come from strangers. Numbers read from a file are Python integers, which do not wrap around; each is compared with
the bytes that remain before it is used as a size, so that memory use follows the file's real size, not its claims.
Layout and limits follow the format's specification (ggml/docs/gguf.md) and llama.cpp's reader (ggml/src/gguf.cpp).
"""

import bisect
import contextlib
import errno
import hashlib
import itertools
import math
import mmap
import os
import re
import shlex
import stat
import struct
import sys
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ggjac.gguf import types
from ggjac.guard import guard

MAX_HEADER_BYTES = 1 << 28  # real headers, vocabulary and merges included, stay below 30 MB
MAX_ENTRIES = 1 << 17  # keys, tensors or inner arrays of one file; each becomes a Python object
MAX_STRINGS = 1 << 22  # of one array; vocabularies stay below 1 million tokens, merges below 2 million
MAX_DEPTH = 4  # arrays within arrays
MAX_DIMENSIONS = 8  # ggml has 4; files of other programs have more, and their metadata say what they are
MAX_NAME_BYTES = 1024  # of a tensor; ggml has 64
MAX_KEY_BYTES = 65535
MAX_ALIGNMENT = 1 << 24

FINGERPRINT_BLOCKS = 64  # sampled from the tensor data of all shards together
FINGERPRINT_BLOCK_BYTES = 1 << 16
HASHED_AT_ONCE = 1 << 23

# Linux 5.14: reads pages as an access would, and reports an error where the access would raise SIGBUS.
_MADV_POPULATE_READ = 22

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {  # value type -> name, layout of one value
    0: ("UINT8", struct.Struct("<B")),
    1: ("INT8", struct.Struct("<b")),
    2: ("UINT16", struct.Struct("<H")),
    3: ("INT16", struct.Struct("<h")),
    4: ("UINT32", _U32),
    5: ("INT32", struct.Struct("<i")),
    6: ("FLOAT32", struct.Struct("<f")),
    _BOOL: ("BOOL", struct.Struct("<B")),  # any nonzero byte is true
    10: ("UINT64", _U64),
    11: ("INT64", struct.Struct("<q")),
    12: ("FLOAT64", struct.Struct("<d")),
}

# Smallest entries there can be: an empty name with its length, then type and value, or one size, type and offset.
_SMALLEST_KEY = 8 + 1 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8

_OLD_GGML = "it is a GGML file from before GGUF: convert the model again with a current llama.cpp"
_OTHER_FORMATS = {  # first four bytes -> what the file is and what to do
    b"vers": "it looks like a Git LFS pointer: run `git lfs pull` to get the model",
    b"lmgg": _OLD_GGML,
    b"fmgg": _OLD_GGML,
    b"tjgg": _OLD_GGML,
    b"PK\x03\x04": "it is a zip archive or PyTorch checkpoint: convert it with llama.cpp's convert_hf_to_gguf.py",
    b"<!DO": "it is a web page: download the file itself",
    b"\0\0\0\0": "an unfinished download looks like this: download it again",
}

_CHECK_PATH = "check the path"
_MAPS_NOTHING = "this file system cannot map files into memory: copy the model to a local disk"
_ADVICE = {  # why a file cannot be opened or mapped -> what to do
    errno.ENOTDIR: _CHECK_PATH,
    errno.ENAMETOOLONG: _CHECK_PATH,
    errno.ELOOP: _CHECK_PATH,
    errno.ENODEV: _MAPS_NOTHING,
    errno.EINVAL: _MAPS_NOTHING,
    errno.EOPNOTSUPP: _MAPS_NOTHING,
    errno.ENOMEM: "the address space is too small for the file: raise its limit (`ulimit -v`)",
    errno.EMFILE: "this process has too many open files: raise the limit (`ulimit -n`)",
}

# Names of a piece: m.gguf.part1of2, m.gguf-split-a, m.gguf.partaa, m.gguf.001.
_PIECE_NAME = re.compile(
    r"(?P<whole>.+\.gguf)(?P<mark>[._-]?(?:part|split)?[._-]?)(?P<number>[0-9]{1,5}|[a-z]{1,2})"
    r"(?P<of>-?of-?(?P<total>[0-9]{1,5}))?",
    re.DOTALL | re.IGNORECASE,
)
_SHARD_NAME = re.compile(r"(.*)-([0-9]{5})(-of-([0-9]{5})\.gguf)", re.DOTALL | re.IGNORECASE)
_DAMAGED = "the file is damaged or incomplete; download it again"


class GGUFError(ValueError):
    """A file that cannot be opened as GGUF, or a request that it cannot satisfy; the message is one line."""


class ChangedError(GGUFError):
    """Another program has changed the file while it was in use; the message is one line."""


def shown(text: str | bytes | os.PathLike[str]) -> str:
    """Return `text` for a one-line message: escaped and quoted if not printable, cut if beyond 300 characters."""
    text = text.decode("utf-8", "backslashreplace") if isinstance(text, bytes) else os.fspath(text)
    if len(text) > 300:
        text = text[:150] + "…" + text[-150:]
    if text and text.isprintable():
        return text
    return "'" + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) + "'"


class ShardName(NamedTuple):
    """The name of one file of a split model, `prefix-00002-of-00003.gguf`, with or without its folder."""

    prefix: str
    number: int  # from 1
    total: int
    ending: str  # "-of-00003.gguf", in its own case

    @staticmethod
    def parse(name: str) -> "ShardName | None":
        """Take a file name apart; None if it is not that of a shard."""
        match = _SHARD_NAME.fullmatch(name)
        return match and ShardName(match[1], int(match[2]), int(match[4]), match[3])

    def sibling(self, number: int) -> str:
        """Return the name of another shard of the same model."""
        return f"{self.prefix}-{number:05}{self.ending}"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is stored and how to read it.

    `shape` is in PyTorch's order (the file's sizes reversed; for a matrix out x in), so that the last axis is
    contiguous and the one divided into blocks. `offset` counts bytes from the start of shard `shard` (from 0).
    """

    name: str
    shape: tuple[int, ...]
    type: types.GGMLType
    shard: int
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Number of contiguous rows, all leading axes flattened; 1 for a vector."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return types.row_bytes(self.type, self.shape[-1])


class LazyArray(Sequence[Any]):
    """A metadata array whose elements are read from the file when they are accessed.

    Elements are Python numbers, `bool`, `str` (bytes that are not UTF-8 become U+FFFD) or, nested, `LazyArray`; a slice
    is a list of them. `element_type` is the format's name: `"INT32"`, `"STRING"`, `"ARRAY"`.
    """

    __slots__ = ("element_type",)

    def __init__(self, element_type: str) -> None:
        self.element_type = element_type

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._element(i) for i in range(*index.indices(len(self)))]
        try:
            return self._element(range(len(self))[index])
        except IndexError:
            raise IndexError(f"element {index} of an array of {len(self)}") from None

    def __iter__(self) -> Iterator[Any]:
        return map(self._element, range(len(self)))

    def __repr__(self) -> str:
        return f"<{len(self)} x {self.element_type}>"

    def _element(self, index: int) -> Any:
        raise NotImplementedError


class _Numbers(LazyArray):
    """Numbers of one type: a view of the map."""

    __slots__ = ("_values",)

    def __init__(self, element_type: str, values: np.ndarray) -> None:
        super().__init__(element_type)
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def _element(self, index: int) -> Any:
        value = self._values[index].item()
        return value != 0 if self.element_type == "BOOL" else value


class _Strings(LazyArray):
    """Strings: the map, and the position of each string's length field (8 bytes of memory per string)."""

    __slots__ = ("_buffer", "_offsets")

    def __init__(self, buffer: mmap.mmap, offsets: "array[int]") -> None:
        super().__init__("STRING")
        self._buffer = buffer
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def _element(self, index: int) -> str:
        start = self._offsets[index]
        (length,) = _U64.unpack_from(self._buffer, start)
        return self._buffer[start + 8 : start + 8 + length].decode("utf-8", "surrogateescape")


class _Arrays(LazyArray):
    """Arrays within an array."""

    __slots__ = ("_arrays",)

    def __init__(self, arrays: list[LazyArray]) -> None:
        super().__init__("ARRAY")
        self._arrays = arrays

    def __len__(self) -> int:
        return len(self._arrays)

    def _element(self, index: int) -> LazyArray:
        return self._arrays[index]


class Stamp(NamedTuple):
    """What the file system says of a file at one moment; writing to it or replacing it changes this."""

    inode: int
    nbytes: int
    mtime_ns: int

    @staticmethod
    def of(status: os.stat_result) -> "Stamp":
        """Return that of a file's status."""
        return Stamp(status.st_ino, status.st_size, status.st_mtime_ns)


class _Header:
    """A cursor over one file's header; every step is checked against the bytes that remain."""

    def __init__(self, path: Path, buffer: mmap.mmap, stamp: Stamp) -> None:
        self.path = path
        self.buffer = buffer
        self.stamp = stamp
        self.size = len(buffer)
        self.limit = min(self.size, MAX_HEADER_BYTES)
        self.position = 0
        self.inner_arrays = 0

    def fail(self, message: str) -> NoReturn:
        raise GGUFError(f"{shown(self.path)}: {message}")

    def step(self, count: int, what: str) -> int:
        """Advance by `count` bytes; return where they start."""
        start = self.position
        if count > self.limit - start:
            if self.limit < self.size:
                self.fail(
                    f"{what} at byte {start} needs {count} bytes and would end beyond the {MAX_HEADER_BYTES >> 20} MiB "
                    f"allowed for a header; the file is damaged"
                )
            self.fail(
                f"{what} at byte {start} needs {count} bytes, but the file has {self.size - start} left; {_DAMAGED}"
            )
        self.position += count
        return start

    def number(self, layout: struct.Struct, what: str) -> Any:
        return layout.unpack_from(self.buffer, self.step(layout.size, what))[0]

    def string(self, what: str, longest: int = MAX_HEADER_BYTES) -> bytes:
        length = self.number(_U64, f"the length of {what}")
        start = self.step(length, what)
        if length > longest:
            self.fail(f"{what} at byte {start} is {length} bytes long; at most {longest} are allowed")
        return self.buffer[start : start + length]

    def name(self, what: str, longest: int) -> str:
        raw = self.string(what, longest)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8: {shown(raw)}; the file is damaged")

    def count(self, what: str, smallest: int, most: int) -> int:
        """Read how many entries follow, a u64; each takes at least `smallest` bytes."""
        count = self.number(_U64, f"the number of {what}")
        return self.fitting(count, what, smallest, most)

    def fitting(self, count: int, what: str, smallest: int, most: int) -> int:
        room = (self.limit - self.position) // smallest
        if count > room:
            self.fail(f"the file declares {count} {what}, but has room for at most {room}; {_DAMAGED}")
        if count > most:
            self.fail(f"the file declares {count} {what}; at most {most} are allowed")
        return count

    def value(self, kind: int, key: str) -> Any:
        """Read a metadata value of value type `kind`."""
        if kind == _STRING:
            return self.string(f"the string {shown(key)}").decode("utf-8", "replace")
        if kind == _ARRAY:
            return self.array(key, MAX_DEPTH)
        if kind not in _SCALARS:
            self.fail(
                f"metadata {shown(key)} has value type {kind}; GGUF defines 0 to 12; the file is damaged or too new"
            )
        value = self.number(_SCALARS[kind][1], f"the value of {shown(key)}")
        return value != 0 if kind == _BOOL else value

    def array(self, key: str, depth: int) -> LazyArray:
        """Find the end of an array; leave its elements where they are."""
        kind = self.number(_U32, f"the element type of {shown(key)}")
        what = f"elements of {shown(key)}"
        if kind in _SCALARS:
            type_name, layout = _SCALARS[kind]
            count = self.count(what, layout.size, MAX_HEADER_BYTES)
            start = self.step(count * layout.size, what)
            return _Numbers(type_name, np.frombuffer(self.buffer, layout.format, count, start))
        if kind == _STRING:
            return self.strings(key, self.count(what, _U64.size, MAX_STRINGS))
        if kind == _ARRAY:
            if depth == 1:
                self.fail(f"metadata {shown(key)} nests arrays more than {MAX_DEPTH} deep; the file is damaged")
            count = self.count(what, _U32.size + _U64.size, MAX_ENTRIES)
            self.inner_arrays += count
            if self.inner_arrays > MAX_ENTRIES:
                self.fail(f"metadata {shown(key)} brings the file's inner arrays above the {MAX_ENTRIES} allowed")
            return _Arrays([self.array(key, depth - 1) for _ in range(count)])
        self.fail(
            f"metadata {shown(key)} has elements of type {kind}; GGUF defines 0 to 12; the file is damaged or too new"
        )

    def strings(self, key: str, count: int) -> LazyArray:
        """Walk over `count` strings.

        Opening a file spends most of its time here (some 400 000 strings), so the loop checks nothing itself: positions
        only grow, and those beyond the buffer are noticed by `unpack_from` or by the single check at the end.
        """
        buffer, position, length_at = self.buffer, self.position, _U64.unpack_from
        offsets = array("Q")
        remember = offsets.append
        try:
            for _ in range(count):
                remember(position)
                position += 8 + length_at(buffer, position)[0]
        except (struct.error, OverflowError):
            position = self.size + 1  # beyond the file; the exact value does not matter
        if position > self.limit:
            where = f"string {bisect.bisect_right(offsets, self.size) - 1} of {count} in {shown(key)}"
            if self.limit < self.size:
                self.fail(
                    f"{where} ends beyond the {MAX_HEADER_BYTES >> 20} MiB allowed for a header; the file is damaged"
                )
            self.fail(f"{where} ends beyond the file's {self.size} bytes; {_DAMAGED}")
        self.position = position
        return _Strings(buffer, offsets)


class _Shard(NamedTuple):
    """One file whose header has been checked."""

    path: Path
    buffer: mmap.mmap
    stamp: Stamp
    version: int
    alignment: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data_start: int  # bytes; the header and its padding end here


def _map(path: Path) -> tuple[mmap.mmap, Stamp]:
    """Map a file read-only; return its stamp too."""
    try:
        # Opening a pipe would wait for its other end, so check first.
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise GGUFError(f"{shown(path)}: is a folder; name the .gguf file in it")
        if not stat.S_ISREG(mode):
            raise GGUFError(
                f"{shown(path)}: is not a regular file and cannot be mapped; copy the model to a file first"
            )
        with open(path, "rb") as file:
            stamp = Stamp.of(os.fstat(file.fileno()))
            if stamp.nbytes == 0:
                raise GGUFError(f"{shown(path)}: the file is empty; download it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), stamp
    except FileNotFoundError:
        raise GGUFError(f"{shown(path)}: no such file; check the path") from None
    except PermissionError:
        raise GGUFError(f"{shown(path)}: cannot be read; check its permissions") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        advice = _ADVICE.get(error.errno or 0, "check the disk")
        raise GGUFError(f"{shown(path)}: cannot be opened ({reason}); {advice}") from None
    except (ValueError, OverflowError) as error:
        if isinstance(error, GGUFError):
            raise
        raise GGUFError(f"{shown(path)}: cannot be opened ({error}); check the path") from None


def _address(buffer: mmap.mmap) -> tuple[int, int]:
    """Return where a file is mapped, and how many bytes."""
    return np.frombuffer(buffer, np.uint8).ctypes.data, len(buffer)


def _read_version(header: _Header) -> int:
    magic = header.buffer[:4]
    if magic != b"GGUF":
        advice = _OTHER_FORMATS.get(magic, "give a .gguf file")
        header.fail(f"is not a GGUF file: it starts with {ascii(magic)[1:]}; {advice}")
    header.step(4, "the magic")
    version: int = header.number(_U32, "the version")
    if version and version & 0xFFFF == 0:
        swapped = int.from_bytes(_U32.pack(version), "big")
        header.fail(f"is a big-endian GGUF (version {swapped}); convert it with `gguf-convert-endian FILE little`")
    if version == 1:
        header.fail("is GGUF version 1, which is obsolete; convert the model again (versions 2 and 3 are supported)")
    if version not in (2, 3):
        header.fail(
            f"is GGUF version {version}; versions 2 and 3 are supported; convert the model again or update this program"
        )
    return version


def _read_metadata(header: _Header, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        key = header.name(f"the name of metadata key {index}", MAX_KEY_BYTES)
        if not key:
            header.fail(f"metadata key {index} has an empty name; the file is damaged")
        if key in metadata:
            header.fail(f"metadata key {shown(key)} appears twice; the file is damaged")
        kind = header.number(_U32, f"the type of {shown(key)}")
        if key == "general.alignment" and kind != 4:
            header.fail(f"general.alignment has value type {kind}; it must be 4 (UINT32)")
        metadata[key] = header.value(kind, key)
    return metadata


def _read_tensor(header: _Header, index: int, shard: int) -> TensorInfo:
    """Read one tensor's entry; its offset is still relative to the start of the data."""
    name = header.name(f"the name of tensor {index}", MAX_NAME_BYTES)
    tensor = f"tensor {shown(name)}"
    dimensions = header.number(_U32, f"the number of dimensions of {tensor}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        header.fail(f"{tensor} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed; the file is damaged")
    shape = tuple(header.number(_U64, f"the sizes of {tensor}") for _ in range(dimensions))[::-1]
    if 0 in shape or math.prod(shape) >= 1 << 63:
        header.fail(f"{tensor} has the impossible shape {list(shape)}; the file is damaged")
    type_id = header.number(_U32, f"the type of {tensor}")
    offset = header.number(_U64, f"the offset of {tensor}")
    type = types.TYPES.get(type_id)
    if type is None:
        known = f" ({types.UNREADABLE[type_id]})" if type_id in types.UNREADABLE else ""
        header.fail(
            f"{tensor} has type id {type_id}{known}, which is not supported; take a file that llama.cpp can run, or "
            "quantize the model again to another type"
        )
    try:
        row_bytes = types.row_bytes(type, shape[-1])
    except ValueError as error:
        header.fail(f"{tensor} of shape {list(shape)}: {error}; the file is damaged")
    return TensorInfo(name, shape, type, shard, offset, math.prod(shape[:-1]) * row_bytes)


def _place_tensors(
    header: _Header, entries: dict[str, TensorInfo], alignment: int, start: int
) -> dict[str, TensorInfo]:
    """Check the tensors' positions, and make offsets relative to the file; the data begins at byte `start`."""
    placed = {}
    for entry in entries.values():
        if entry.offset % alignment:
            header.fail(
                f"tensor {shown(entry.name)} has offset {entry.offset}, not a multiple of the alignment {alignment}; "
                f"the file is damaged"
            )
        placed[entry.name] = replace(entry, offset=start + entry.offset)
    order = sorted(placed.values(), key=lambda info: info.offset)
    for before, after in itertools.pairwise(order):
        if before.offset + before.nbytes > after.offset:
            header.fail(f"tensors {shown(before.name)} and {shown(after.name)} overlap; the file is damaged")
    # Nothing overlaps, so the last tensor ends last.
    if order and (end := order[-1].offset + order[-1].nbytes) > header.size:
        cut = next(info for info in order if info.offset + info.nbytes > header.size)
        header.fail(
            f"the tensor data is cut short: {end} bytes are needed, the file has {header.size}, "
            f"{end - header.size} bytes are missing (from {shown(cut.name)} on); "
            f"the download is probably incomplete; download it again"
        )
    return placed


def _refuse_piece(path: Path) -> None:
    """Refuse a damaged file whose name says that it is a piece of one, with the command that joins the pieces.

    Raises:
        GGUFError: it is one.
    """
    match = _PIECE_NAME.fullmatch(path.name)
    if match is None:
        return
    first = match["whole"] + match["mark"]
    # The shell sorts 10 before 2; it counts in braces.
    counted = match["total"] and not match["number"].startswith("0")
    all_of_them = f"{{1..{int(match['total'])}}}" if counted else "*"
    pieces = shlex.quote(first) + all_of_them + (match["of"] or "")
    raise GGUFError(
        f"{shown(path)}: is one of the pieces that {shown(match['whole'])} was cut into; join them, in their folder: "
        f"cat {shown(pieces)} > {shown(shlex.quote(match['whole']))}"
    )


def _open_shard(path: Path, number: int) -> _Shard:
    """Map one file and check its whole header. Tensor data is not read."""
    header = _Header(path, *_map(path))
    try:
        return _read_shard(header, number)
    except GGUFError:
        _refuse_piece(path)
        raise


def _read_shard(header: _Header, number: int) -> _Shard:
    """Read and check a whole header."""
    version = _read_version(header)
    # Both counts come first; that of the tensors is checked again after the metadata, which may have used up the room.
    tensor_count = header.count("tensors", _SMALLEST_TENSOR, MAX_ENTRIES)
    metadata = _read_metadata(header, header.count("metadata keys", _SMALLEST_KEY, MAX_ENTRIES))
    alignment = metadata.get("general.alignment", 32)
    if alignment < 1 or alignment & (alignment - 1) or alignment > MAX_ALIGNMENT:
        header.fail(
            f"general.alignment is {alignment}; it must be a power of two up to {MAX_ALIGNMENT}; the file is damaged"
        )

    entries: dict[str, TensorInfo] = {}
    for index in range(header.fitting(tensor_count, "tensors", _SMALLEST_TENSOR, MAX_ENTRIES)):
        entry = _read_tensor(header, index, number)
        if entry.name in entries:
            header.fail(f"tensor {shown(entry.name)} appears twice; the file is damaged")
        entries[entry.name] = entry

    data_start = -(-header.position // alignment) * alignment
    placed, begin = _place_tensors(header, entries, alignment, data_start), min(data_start, header.size)
    return _Shard(header.path, header.buffer, header.stamp, version, alignment, metadata, placed, begin)


def _split_number(shard: _Shard, key: str, default: int | None = None) -> int:
    value = shard.metadata.get(key, default)
    if type(value) is not int:
        found = "absent" if value is None else f"{value!r:.80}"
        raise GGUFError(f"{shown(shard.path)}: {key} must be an integer but is {found}; download the shard again")
    return value


def _open_siblings(first: _Shard) -> list[_Shard]:
    """Open the other files of a split model, by names derived from the first one's and in its folder only."""
    name = shown(first.path)
    count, number = _split_number(first, "split.count", 1), _split_number(first, "split.no", 0)
    if count <= 1:
        return [first]
    named = ShardName.parse(first.path.name)
    if number != 0:
        which = f", {shown(named.sibling(1))}" if named else ""
        raise GGUFError(f"{name}: is shard {number + 1} of {count}; open the first one{which}")
    if named is None or (named.number, named.total) != (1, count):
        raise GGUFError(
            f"{name}: is the first of {count} shards, but its name does not say so; "
            f"rename them to PREFIX-00001-of-{count:05}.gguf and so on"
        )
    paths = [first.path.with_name(named.sibling(i)) for i in range(2, count + 1)]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise GGUFError(
            f"{name}: {len(missing)} of {count} shards missing, starting with {shown(missing[0].name)}; "
            f"put all shards in one folder"
        )
    shards = [first]
    for index, path in enumerate(paths, 1):
        shard = _open_shard(path, index)
        found = _split_number(shard, "split.no"), _split_number(shard, "split.count")
        if found != (index, count):
            raise GGUFError(
                f"{shown(path)}: expected shard {index + 1} of {count}, but its metadata says {found[0] + 1} of "
                f"{found[1]}; download the shards again"
            )
        shards.append(shard)
    return shards


def _join_tensors(shards: list[_Shard]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for info in shard.tensors.values():
            if info.name in tensors:
                other = shards[tensors[info.name].shard].path
                raise GGUFError(
                    f"{shown(shard.path)}: tensor {shown(info.name)} is also in {shown(other.name)}; "
                    f"download the shards again"
                )
            tensors[info.name] = info
    expected = _split_number(shards[0], "split.tensors.count", len(tensors)) if len(shards) > 1 else len(tensors)
    if expected != len(tensors):
        raise GGUFError(
            f"{shown(shards[0].path)}: split.tensors.count says {expected} tensors, but the {len(shards)} shards hold "
            f"{len(tensors)}; download the shards again"
        )
    return tensors


class GGUFFile:
    """An open GGUF model: its metadata, and its tensors with their types, positions and bytes. Made by `open_gguf`.

    Attributes:
        path: the file that was opened; `paths` lists every shard, this one first.
        version: of the format, 2 or 3. `alignment` is the first shard's, in bytes.
        metadata: the first shard's keys; values are Python numbers, `bool`, `str` or `LazyArray`.
        tensors: name -> TensorInfo, in file order, shard after shard.
        stamps: of each shard when it was opened.
        lost: whether a page could not be read and was replaced by zeros; see `ggjac.guard`.
        hashes: the SHA-256 of each shard, once `sha256` has been called.
    """

    def __init__(self, shards: list[_Shard]) -> None:
        self.path = shards[0].path
        self.paths = [shard.path for shard in shards]
        self.version = shards[0].version
        self.alignment = shards[0].alignment
        self.metadata: Mapping[str, Any] = MappingProxyType(shards[0].metadata)
        self.tensors = _join_tensors(shards)
        self.nbytes = sum(len(shard.buffer) for shard in shards)  # of all shards, on disk
        self.stamps = [shard.stamp for shard in shards]
        self._maps = [(weakref.ref(shard.buffer), _address(shard.buffer)) for shard in shards]
        self.lost = False
        guard(self)
        self._places = [os.path.abspath(path) for path in self.paths]  # wherever the process goes
        self._data_starts = [shard.data_start for shard in shards]
        self._buffers = [shard.buffer for shard in shards]
        self._fingerprint: str | None = None
        self.hashes: list[str] | None = None

    @property
    def addresses(self) -> list[tuple[int, int]]:
        """Where each shard is mapped, and how many bytes; of those that still are."""
        return [place for buffer, place in self._maps if buffer() is not None]

    def rows(self, tensor: str | TensorInfo, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return rows `start:stop` as a read-only view of the map, uint8 [rows, row_bytes]. Copies nothing.

        Raises:
            GGUFError: the tensor is not in this file, the rows are out of range, the file is closed, its disk fails, or
                another program has truncated it.
        """
        info, offset, nbytes = self._span(tensor, start, stop)
        self._present(info.shard, offset, nbytes)
        view = np.frombuffer(self._buffers[info.shard], np.uint8, nbytes, offset)
        return view.reshape(nbytes // info.row_bytes, info.row_bytes)

    def will_need(self, tensor: str | TensorInfo, start: int = 0, stop: int | None = None) -> None:
        """Ask the system to read rows `start:stop` ahead; a hint that some systems do not support."""
        info, offset, nbytes = self._span(tensor, start, stop)
        if hasattr(mmap, "MADV_WILLNEED") and nbytes:
            begin = offset - offset % mmap.PAGESIZE
            with contextlib.suppress(OSError):  # as on file systems without read-ahead
                self._buffers[info.shard].madvise(mmap.MADV_WILLNEED, begin, offset + nbytes - begin)

    def fingerprint(self) -> str:
        """Return `sampled-sha256:` and a hash that distinguishes model files; computed once, in milliseconds.

        It covers each shard's size and header (metadata, tensor names, types and positions) and 64 KiB blocks at fixed
        fractions of the tensor data. It is NOT a hash of the whole content: a change between two sampled blocks is not
        detected.
        """
        buffers = self._open_buffers()
        if self._fingerprint is None:
            self._fingerprint = self._sampled(buffers)
        return self._fingerprint

    @property
    def _samples(self) -> int:
        """Blocks of each shard that the fingerprint covers."""
        return max(2, FINGERPRINT_BLOCKS // len(self.paths))

    def _sampled(self, buffers: list[mmap.mmap]) -> str:
        digest = hashlib.sha256()
        samples = self._samples
        for shard, (buffer, start) in enumerate(zip(buffers, self._data_starts, strict=True)):
            digest.update(struct.pack("<QQ", len(buffer), start))
            last = len(buffer) - FINGERPRINT_BLOCK_BYTES
            if last - start <= samples * FINGERPRINT_BLOCK_BYTES:
                parts = [(0, start), (start, len(buffer))]
            else:
                blocks = [start + (last - start) * i // (samples - 1) for i in range(samples)]
                parts = [(0, start), *((block, block + FINGERPRINT_BLOCK_BYTES) for block in blocks)]
            for begin, end in parts:
                self._present(shard, begin, end - begin)
                digest.update(memoryview(buffer)[begin:end])
        return f"sampled-sha256:{digest.hexdigest()}"

    @property
    def fingerprint_is_whole(self) -> bool:
        """Whether the fingerprint covers every byte, as it does in files of a few megabytes."""
        return all(
            len(buffer) - start <= (self._samples + 1) * FINGERPRINT_BLOCK_BYTES
            for buffer, start in zip(self._open_buffers(), self._data_starts, strict=True)
        )

    def sha256(self, progress: Callable[[int], None] | None = None) -> list[str]:
        """Return the SHA-256 of each shard's whole content, in hexadecimal; computed once, about a second per GB.

        Args:
            progress: called with the number of bytes that were hashed since the last call.

        Raises:
            GGUFError: the disk failed, or the file has changed since it was opened.
        """
        if self.hashes is None:
            found = []
            for number, buffer in enumerate(self._open_buffers()):
                digest = hashlib.sha256()
                for start in range(0, len(buffer), HASHED_AT_ONCE):
                    part = memoryview(buffer)[start : start + HASHED_AT_ONCE]
                    self._present(number, start, len(part))
                    digest.update(part)
                    if progress:
                        progress(len(part))
                found.append(digest.hexdigest())
            self.check_unchanged()
            self.hashes = found
        return self.hashes

    def check_unchanged(self) -> None:
        """Refuse to go on if another program has written to the file or put another one in its place since it opened.

        A file that was moved away or deleted stays whole in the map, and is no error.

        Raises:
            ChangedError: it has changed.
            GGUFError: its disk fails.
        """
        if self.lost:
            raise ChangedError(
                f"{shown(self.path)}: a part of it could not be read while in use: it was truncated, or the disk or "
                "the network failed; restore the file, or copy it to a local disk, then start again"
            )
        for path, place, stamp in zip(self.paths, self._places, self.stamps, strict=True):
            try:
                now = Stamp.of(os.stat(place))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise GGUFError(f"{shown(path)}: cannot be read any more ({error.strerror}); check the disk") from None
            if now != stamp:
                how = (
                    "another file has taken its place"
                    if now.inode != stamp.inode
                    else f"it had {stamp.nbytes} bytes, and has {now.nbytes}"
                    if now.nbytes != stamp.nbytes
                    else "another program has written to it"
                )
                raise ChangedError(
                    f"{shown(path)}: changed while in use ({how}), so that a result would mix two models; start again "
                    "when it is complete"
                )

    def close(self) -> None:
        """Release the tensor data; `rows` raises from now on.

        Arrays returned earlier, and the metadata, stay valid: each keeps a reference to the map, which is unmapped with
        the last of them. (Unmapping it earlier would crash the process.)
        """
        self._buffers = []

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GGUFFile {shown(self.path)}: {len(self.tensors)} tensors, {self.nbytes} bytes>"

    def _open_buffers(self) -> list[mmap.mmap]:
        if not self._buffers:
            raise GGUFError(f"{shown(self.path)}: is closed; open it again to read from it")
        return self._buffers

    def _present(self, shard: int, offset: int, nbytes: int) -> None:
        """Bring bytes of a shard into memory: to touch a page that cannot be read would kill the process (SIGBUS).

        Where the system cannot do that, only the file's size is checked.

        Raises:
            GGUFError: they cannot be read.
        """
        buffer = self._buffers[shard]
        if (size := buffer.size()) < offset + nbytes:
            raise ChangedError(
                f"{shown(self.paths[shard])}: was truncated to {size} bytes while in use; restore the file, then "
                "start again"
            )
        if not nbytes or not sys.platform.startswith("linux"):
            return
        begin = offset - offset % mmap.PAGESIZE
        try:
            buffer.madvise(_MADV_POPULATE_READ, begin, offset + nbytes - begin)
        except OSError as error:
            if error.errno in (errno.EFAULT, errno.EIO, getattr(errno, "EHWPOISON", errno.EIO)):
                raise GGUFError(
                    f"{shown(self.paths[shard])}: bytes {offset} to {offset + nbytes} cannot be read (input/output "
                    "error); check the disk or the network, or copy the file to a local disk"
                ) from None

    def _span(self, tensor: str | TensorInfo, start: int, stop: int | None) -> tuple[TensorInfo, int, int]:
        """Return the tensor's entry and the offset and length in bytes of rows `start:stop`."""
        self._open_buffers()
        name = tensor if isinstance(tensor, str) else tensor.name
        info = self.tensors.get(name)
        if info is None:
            raise GGUFError(f"{shown(self.path)}: has no tensor {shown(name)}; it has {len(self.tensors)} others")
        if not isinstance(tensor, str) and tensor != info:
            raise GGUFError(
                f"{shown(self.path)}: tensor {shown(name)} is different here; its entry is from another file"
            )
        stop = info.rows if stop is None else stop
        if not 0 <= start <= stop <= info.rows:
            raise GGUFError(
                f"{shown(self.path)}: rows {start}:{stop} of {shown(name)} requested, but it has {info.rows}"
            )
        return info, info.offset + start * info.row_bytes, (stop - start) * info.row_bytes


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF model; of a split one give the first shard, and all are opened.

    Reads only the headers: 0.1 s with a vocabulary of 128 000 tokens, independent of the size of the tensors.

    Raises:
        GGUFError: the file is missing, unreadable, not GGUF, damaged or truncated, or not the first of its shards.
    """
    return GGUFFile(_open_siblings(_open_shard(Path(path), 0)))
