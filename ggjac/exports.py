"""Files that llama.cpp refuses although it runs their family: what is different in a copy that it accepts, as data.

Ollama's exports of Qwen3.5 and 3.6 carry the vision and prediction tensors of the model in the same file, and write
some keys and names in another way (ggml-org/llama.cpp, pull requests 22954, 23700 and 25334).
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ggjac.gguf import GGUFFile, TensorInfo


@dataclass(frozen=True)
class Export:
    """How a family's files may differ from those that llama.cpp reads.

    Attributes:
        dropped: prefixes of the names of tensors that are not part of the model.
        renamed: names in a block, after its number, and llama.cpp's for them.
        padded: arrays below the architecture's prefix that may be too short, and their length with zeros at the end.
        largest: arrays that have zeros for blocks without attention, where llama.cpp expects one number.
    """

    dropped: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    padded: Mapping[str, int] = field(default_factory=dict)
    largest: tuple[str, ...] = ()


_QWEN35 = Export(
    dropped=("v.", "mtp."),
    renamed={"ssm_dt": "ssm_dt.bias"},
    padded={"rope.dimension_sections": 4},
    largest=("attention.head_count_kv",),
)
EXPORTS = {"qwen35": _QWEN35, "qwen35moe": _QWEN35}


@dataclass(frozen=True)
class Copy:
    """What a copy has: tensors under llama.cpp's names, and the keys whose values are different."""

    tensors: Mapping[str, TensorInfo]
    keys: Mapping[str, Any]


def different(file: GGUFFile) -> Copy | None:
    """Return what a copy for llama.cpp has, or None if the file needs no copy."""
    architecture = file.metadata.get("general.architecture")
    export = EXPORTS.get(architecture) if isinstance(architecture, str) else None
    if export is None:
        return None
    tensors = {_name(name, export): info for name, info in file.tensors.items() if not name.startswith(export.dropped)}
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


def _name(name: str, export: Export) -> str:
    block, number, rest = [*name.split(".", 2), "", ""][:3]
    return f"{block}.{number}.{export.renamed[rest]}" if block == "blk" and rest in export.renamed else name


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
