"""Put GGUF files together byte by byte, right or wrong: what the `gguf` package's writer refuses to write."""

import struct
from collections.abc import Iterable
from typing import NamedTuple

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def text(content: str | bytes) -> bytes:
    raw = content.encode() if isinstance(content, str) else content
    return u64(len(raw)) + raw


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    """Return a metadata entry; `payload` is the value's bytes."""
    return text(name) + u32(kind) + payload


def array(kind: int, elements: Iterable[bytes], count: int | None = None) -> bytes:
    """Return an array's bytes; `count` overrides the true one."""
    elements = list(elements)
    return u32(kind) + u64(len(elements) if count is None else count) + b"".join(elements)


class Tensor(NamedTuple):
    """A tensor's entry; `sizes` are in the file's order, `offset` counts from the start of the data."""

    name: str | bytes = "a"
    sizes: tuple[int, ...] = (8,)
    type: int = 0
    offset: int = 0
    dimensions: int | None = None  # overrides len(sizes)

    def __bytes__(self) -> bytes:
        dimensions = len(self.sizes) if self.dimensions is None else self.dimensions
        sizes = b"".join(map(u64, self.sizes))
        return text(self.name) + u32(dimensions) + sizes + u32(self.type) + u64(self.offset)


def header(
    keys: Iterable[bytes] = (),
    tensors: Iterable[Tensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    key_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    keys, tensors = list(keys), list(tensors)
    counts = (len(tensors) if tensor_count is None else tensor_count, len(keys) if key_count is None else key_count)
    return magic + u32(version) + b"".join(map(u64, counts)) + b"".join(keys) + b"".join(map(bytes, tensors))


def padded(content: bytes, alignment: int = 32) -> bytes:
    return content + bytes(-len(content) % alignment)


def file(
    keys: Iterable[bytes] = (), tensors: Iterable[Tensor] = (), data: bytes = b"", **options: int | bytes
) -> bytes:
    """Return a whole file: header, padding to 32 bytes, data; options as in `header`."""
    return padded(header(keys, tensors, **options)) + data  # type: ignore[arg-type]
