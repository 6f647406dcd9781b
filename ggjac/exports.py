"""Files that llama.cpp refuses although it runs their family: what is different in a copy that it accepts.

What may be different is part of the family's row (`ggjac.architectures.Export`).
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ggjac.architectures import ARCHITECTURES
from ggjac.gguf import GGUFFile, TensorInfo


@dataclass(frozen=True)
class Copy:
    """What a copy has: tensors under llama.cpp's names, and the keys whose values are different."""

    tensors: Mapping[str, TensorInfo]
    keys: Mapping[str, Any]


def different(file: GGUFFile) -> Copy | None:
    """Return what a copy for llama.cpp has, or None if the file needs no copy."""
    architecture = file.metadata.get("general.architecture")
    row = ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
    if row is None:
        return None
    export = row.export
    tensors = {export.name(name): info for name, info in file.tensors.items() if not name.startswith(export.dropped)}
    keys: dict[str, Any] = {}
    for stem, length in export.padded.items():
        found = _numbers(file, key := f"{architecture}.{stem}")
        if 0 < len(found) < length:
            keys[key] = found + [0] * (length - len(found))
    for stem in export.largest:
        found = _numbers(file, key := f"{architecture}.{stem}")
        if found and not all(found):
            keys[key] = max(found)
    return None if not keys and tensors == dict(file.tensors) else Copy(tensors, keys)


def _numbers(file: GGUFFile, key: str) -> list[Any]:
    """Return an array of the metadata; empty where it is missing, or a single number."""
    value = file.metadata.get(key)
    return [] if value is None or isinstance(value, str | int | float | bool) else list(value)


def write(file: GGUFFile, copy: Copy, target: Path) -> None:
    """Write a copy of a file, whole even if the file is split; nothing but its header is held in memory."""
    import gguf

    reader = gguf.GGUFReader(file.paths[0])
    fields = {key: found for key, found in reader.fields.items() if not key.startswith(("GGUF.", "split."))}
    with target.open("xb") as out:
        out.write(struct.pack("<4sIQQ", b"GGUF", 3, len(copy.tensors), len(fields)))
        for key, found in fields.items():
            size = sum(part.nbytes for part in found.parts)
            same = reader.data[found.offset : found.offset + size].tobytes()
            out.write(_value(key, found, copy.keys[key]) if key in copy.keys else same)
        offset = 0
        for name, info in copy.tensors.items():
            shape = info.shape[::-1]
            out.write(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, info.type.id, offset))
            offset += info.nbytes + -info.nbytes % file.alignment
        for info in copy.tensors.values():
            out.write(bytes(-out.tell() % file.alignment))
            out.write(file.rows(info).data)
        out.write(bytes(-out.tell() % file.alignment))


def _value(key: str, found: Any, value: Any) -> bytes:
    """Return a key with another value: an array of the same type, or a count, which llama.cpp reads as uint32 only."""
    import gguf

    if isinstance(value, int):
        return _text(key) + struct.pack("<II", gguf.GGUFValueType.UINT32, value)
    kind = found.types[-1]
    numbers = np.array(value, gguf.GGUFReader.gguf_scalar_to_np[kind])
    return _text(key) + struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, kind, len(numbers)) + numbers.tobytes()


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
