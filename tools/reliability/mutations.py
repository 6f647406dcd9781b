"""Ways to damage a GGUF file that respect its structure: lengths, types, offsets, nested arrays, vocabularies, data.

`mutated(raw, random)` takes a file apart as far as it can, changes one thing, and puts it together again; a file that
is no longer GGUF is damaged byte by byte. It shares nothing with the package under test.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
FLOATS = {6: "<f", 12: "<d"}
STRING, ARRAY = 8, 9
INTEGERS = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 257, 512, 513, 1024, 65535, 65536),
    *(2**17, 2**24, 2**28, 2**31 - 2, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63),
    *(2**64 - 32, 2**64 - 1),
)
REALS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    2.0,
    1e-45,
    1e-6,
    1e4,
    1e30,
    3.4e38,
    1e300,
    float("inf"),
    float("-inf"),
    float("nan"),
)
TEXTS = (
    *(
        b"",
        b" ",
        b"llama",
        b"none",
        b"gpt2",
        b"yarn",
        b"longrope",
        b"linear",
        b"x" * 300,
        b"\x1b[2J",
        b"\0",
        b"\xff\xfe",
    ),
    *(b"a\nb", b"<script>", "\u202e\u200b".encode(), b"../../x", b"%s%n", b"[red]", "\U0001f600".encode(), b"1" * 5000),
)
PARTS = (
    *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "attn_norm", "attn_q_norm", "attn_sinks", "ffn_norm"),
    *("ffn_gate", "ffn_up", "ffn_down", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ssm_a"),
    *("ffn_up_shexp", "ssm_in", "ssm_out", "ssm_conv1d", "attn_kv_b", "nextn.eh_proj", "post_attention_norm"),
    *("indexer.proj", "exp_probs_b", "layer_output_scale"),
)
NAMES = (
    *("token_embd.weight", "output.weight", "output.bias", "output_norm.weight", "rope_freqs.weight"),
    *(
        "position_embd.weight",
        "per_layer_token_embd.weight",
        "rope_factors_long.weight",
        "blk.0.weight",
        "blk..x",
        "",
        "v.x",
    ),
)
SUFFIXES = ("weight", "bias", "scale", "input_scale", "weight.scale")
KEYS = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count"),
    *("rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.dimension_sections", "expert_count"),
    *("expert_used_count", "expert_gating_func", "expert_group_count", "leading_dense_block_count", "vocab_size"),
    *("nextn_predict_layers", "attention.sliding_window", "attention.sliding_window_pattern", "attention.causal"),
    *("attention.layer_norm_rms_epsilon", "ssm.inner_size", "ssm.group_count", "attention.shared_kv_layers"),
    *("attention.kv_lora_rank", "attention.q_lora_rank", "attention.indexer.top_k", "embedding_length_per_layer_input"),
    *("full_attention_interval", "attention.recurrent_layers", "logit_scale", "embedding_scale", "rope.freq_base_swa"),
)
BARE = (
    *("general.alignment", "general.type", "general.architecture", "general.file_type", "split.no", "split.count"),
    *("split.tensors.count", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.bos_token_id"),
    *("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores", "tokenizer.ggml.merges"),
    *("tokenizer.ggml.add_bos_token", "tokenizer.chat_template", "xielu.eps"),
)


@dataclass(frozen=True)
class Key:
    """A metadata entry; `payload` is the bytes of its value."""

    name: bytes
    kind: int
    payload: bytes


@dataclass(frozen=True)
class Tensor:
    """A tensor's entry, its sizes in the file's order; `dimensions` overrides their number."""

    name: bytes
    sizes: tuple[int, ...]
    kind: int
    offset: int
    dimensions: int | None = None


@dataclass
class Parts:
    """A file taken apart."""

    version: int
    keys: list[Key]
    tensors: list[Tensor]
    data: bytearray
    alignment: int = 32
    magic: bytes = b"GGUF"
    counts: list[int | None] = field(
        default_factory=lambda: [None, None]
    )  # of tensors and of keys, if not the true ones

    def __bytes__(self) -> bytes:
        """Put the file together."""
        true = len(self.tensors), len(self.keys)
        counts = [n if given is None else given for n, given in zip(true, self.counts, strict=True)]
        out = bytearray(self.magic + struct.pack("<IQQ", self.version & 0xFFFFFFFF, *counts))
        for key in self.keys:
            out += text(key.name) + struct.pack("<I", key.kind) + key.payload
        for tensor in self.tensors:
            dimensions = len(tensor.sizes) if tensor.dimensions is None else tensor.dimensions
            out += text(tensor.name) + struct.pack("<I", dimensions)
            out += b"".join(struct.pack("<Q", size & (1 << 64) - 1) for size in tensor.sizes)
            out += struct.pack("<IQ", tensor.kind, tensor.offset & (1 << 64) - 1)
        return bytes(out + bytes(-len(out) % self.alignment) + self.data)


def text(content: bytes) -> bytes:
    """Return a string as the format stores it."""
    return struct.pack("<Q", len(content)) + content


def array(kind: int, elements: Sequence[bytes], count: int | None = None) -> bytes:
    """Return an array's value; `count` overrides the true number of elements."""
    return struct.pack("<IQ", kind, len(elements) if count is None else count) + b"".join(elements)


class _Reader:
    def __init__(self, raw: bytes):
        self.raw, self.at = raw, 0

    def take(self, size: int) -> bytes:
        if size > len(self.raw) - self.at:
            raise ValueError("beyond the file")
        self.at += size
        return self.raw[self.at - size : self.at]

    def number(self, layout: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def skip_value(self, kind: int, depth: int = 0) -> None:
        if kind == STRING:
            self.take(self.number("<Q"))
        elif kind == ARRAY:
            of, count = self.number("<I"), self.number("<Q")
            if of in SIZES:
                self.take(SIZES[of] * count)
            elif depth > 8 or count > len(self.raw):
                raise ValueError("no array")
            else:
                for _ in range(count):
                    self.skip_value(of, depth + 1)
        elif kind in SIZES:
            self.take(SIZES[kind])
        else:
            raise ValueError("no type")


def parse(raw: bytes) -> Parts:
    """Take a file apart.

    Raises:
        ValueError: it is not whole GGUF.
    """
    reader = _Reader(raw)
    magic, version = reader.take(4), reader.number("<I")
    tensor_count, key_count = reader.number("<Q"), reader.number("<Q")
    if magic != b"GGUF" or max(tensor_count, key_count) > 100_000:
        raise ValueError("no GGUF")
    keys, alignment = [], 32
    for _ in range(key_count):
        name, kind = reader.take(reader.number("<Q")), reader.number("<I")
        start = reader.at
        reader.skip_value(kind)
        keys.append(Key(name, kind, raw[start : reader.at]))
        if name == b"general.alignment" and kind == 4:
            alignment = int.from_bytes(keys[-1].payload, "little")
    tensors = []
    for _ in range(tensor_count):
        name, dimensions = reader.take(reader.number("<Q")), reader.number("<I")
        if dimensions > 16:
            raise ValueError("no tensor")
        sizes = tuple(reader.number("<Q") for _ in range(dimensions))
        tensors.append(Tensor(name, sizes, reader.number("<I"), reader.number("<Q")))
    if not 0 < alignment <= 1 << 20:
        raise ValueError("no alignment")
    reader.at += -reader.at % alignment
    return Parts(version, keys, tensors, bytearray(raw[reader.at :]), alignment)


def mutated(raw: bytes, random: Random) -> tuple[bytes, str]:
    """Return a file with one thing changed, and the name of the change."""
    try:
        parts = parse(raw)
    except (ValueError, OverflowError):
        return damaged_bytes(raw, random), "bytes"
    change = random.choices(CHANGES, WEIGHTS)[0]
    if change is None:
        return damaged_bytes(raw, random), "bytes"
    change(parts, random)
    return bytes(parts), change.__name__


def damaged_bytes(raw: bytes, random: Random) -> bytes:
    """Overwrite, insert, drop or cut bytes, most of them in the header."""
    out = bytearray(raw)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(min(len(out), random.choice((32, 4096, len(out)))) or 1)
        how = random.randrange(6)
        if how == 0:
            out[at : at + 1] = bytes([random.randrange(256)])
        elif how == 1:
            out[at : at + 8] = struct.pack("<Q", random.choice(INTEGERS))
        elif how == 2:
            out[at : at + 4] = struct.pack("<I", random.choice(INTEGERS) & 0xFFFFFFFF)
        elif how == 3:
            out[at:at] = random.randbytes(random.choice((1, 4, 8, 32)))
        elif how == 4:
            del out[at : at + random.choice((1, 4, 8, 32))]
        else:
            del out[at:]
    return bytes(out)


# ---- the header's counts


def counts(parts: Parts, random: Random) -> None:
    """Declare another number of tensors or keys."""
    which = random.randrange(2)
    true = (len(parts.tensors), len(parts.keys))[which]
    parts.counts[which] = random.choice((*INTEGERS, max(0, true - 1), true + 1))


def preamble(parts: Parts, random: Random) -> None:
    """Change the magic, the version, or the alignment."""
    how = random.randrange(3)
    if how == 0:
        parts.magic = random.choice((b"GGUf", b"FUGG", b"ggml", b"PK\3\4", b"\0\0\0\0"))
    elif how == 1:
        parts.version = random.choice((0, 1, 2, 4, 0x03000000, 2**32 - 1))
    else:
        parts.alignment = random.choice((1, 8, 16, 64, 4096))
        value = struct.pack("<I", random.choice((parts.alignment, *INTEGERS[:30])))
        parts.keys.insert(random.randrange(len(parts.keys) + 1), Key(b"general.alignment", 4, value))


# ---- metadata


def architecture(parts: Parts) -> bytes:
    """Return the architecture that the file states."""
    return next((key.payload[8:] for key in parts.keys if key.name == b"general.architecture"), b"llama")


def scalar(kind: int, random: Random) -> bytes:
    """Return an odd value of a type."""
    if kind in FLOATS:
        value = random.choice(REALS)
        return struct.pack(FLOATS[kind], value if kind == 12 or abs(value) < 3.5e38 or value != value else 3e38)
    return (random.choice(INTEGERS) & (1 << 8 * SIZES[kind]) - 1).to_bytes(SIZES[kind], "little")


def value_of(kind: int, random: Random, depth: int = 0) -> bytes:
    """Return an odd value of any type, arrays within arrays included."""
    if kind == STRING:
        return text(random.choice(TEXTS))
    if kind == ARRAY:
        of = random.choice((*SIZES, STRING, ARRAY)) if depth < 6 else 4
        elements = [value_of(of, random, depth + 1) for _ in range(random.choice((0, 1, 2, 3, 4, 5, 64)))]
        return array(of, elements if depth < 3 else elements[:2], random.choice((None, None, None, *INTEGERS)))
    return scalar(kind, random)


def pick(parts: Parts, random: Random) -> int:
    """Choose a key."""
    return random.randrange(len(parts.keys))


def key_value(parts: Parts, random: Random) -> None:
    """Give a key another value of the same type; of an array, change an element, its length or its elements' type."""
    if not parts.keys:
        return
    at = pick(parts, random)
    key = parts.keys[at]
    if key.kind == STRING:
        payload = text(random.choice(TEXTS))
    elif key.kind == ARRAY:
        payload = _other_array(key.payload, random)
    elif key.kind in SIZES:
        near = int.from_bytes(key.payload, "little") + random.choice((-1, 1))
        close = (near % (1 << 8 * SIZES[key.kind])).to_bytes(SIZES[key.kind], "little")
        payload = close if random.random() < 0.4 and key.kind not in FLOATS else scalar(key.kind, random)
    else:
        return
    parts.keys[at] = Key(key.name, key.kind, payload)


def _other_array(payload: bytes, random: Random) -> bytes:
    of, count = struct.unpack_from("<IQ", payload)
    body, how = bytearray(payload[12:]), random.randrange(4)
    if how == 0:
        count = random.choice((*INTEGERS, max(0, count - 1), count + 1))
    elif how == 1:
        of = random.choice((*SIZES, STRING, ARRAY, 13, 2**32 - 1))
    elif how == 2 and of in SIZES and count:
        at = random.randrange(count) * SIZES[of]
        body[at : at + SIZES[of]] = scalar(of, random)
    else:
        at = random.randrange(len(body) or 1)
        body[at : at + 8] = struct.pack("<Q", random.choice(INTEGERS))
    return struct.pack("<IQ", of, count) + bytes(body)


def key_type(parts: Parts, random: Random) -> None:
    """Give a key a value of another type, or only another type."""
    if not parts.keys:
        return
    at = pick(parts, random)
    kind = random.choice((*SIZES, STRING, ARRAY, ARRAY, 13, 2**32 - 1))
    whole = kind in SIZES or kind in (STRING, ARRAY)
    payload = value_of(kind, random) if whole and random.random() < 0.8 else parts.keys[at].payload
    parts.keys[at] = Key(parts.keys[at].name, kind, payload)


def key_name(parts: Parts, random: Random) -> None:
    """Drop, double or rename a key, or move it."""
    if not parts.keys:
        return
    key, how = parts.keys.pop(pick(parts, random)), random.randrange(4)
    if how == 1:
        parts.keys += [key, key]
    elif how == 2:
        parts.keys.append(Key(random.choice((b"", b"x" * 70000, b"\xff", key.name + b".x")), key.kind, key.payload))
    elif how == 3:
        parts.keys.insert(random.randrange(len(parts.keys) + 1), key)


def key_more(parts: Parts, random: Random) -> None:
    """Add a key that some family reads, or that all files may have, with an odd value of any type."""
    if random.random() < 0.7:
        name = architecture(parts) + b"." + random.choice(KEYS).encode()
    else:
        name = random.choice(BARE).encode()
    kind = random.choice((4, 4, 4, 5, 6, 7, 8, 9, 9, 10, 12))
    parts.keys = [key for key in parts.keys if key.name != name or random.random() < 0.05]
    parts.keys.append(Key(name, kind, value_of(kind, random)))


def by_block(parts: Parts, random: Random) -> None:
    """State a size block by block, in an array of the right length or nearly so."""
    numbers = [key for key in parts.keys if key.kind == 4 and key.name.startswith(architecture(parts))]
    blocks = next((int.from_bytes(key.payload, "little") for key in numbers if key.name.endswith(b"block_count")), 2)
    if not numbers or blocks > 200:
        return
    key = random.choice(numbers)
    elements = [key.payload] * (blocks + random.choice((0, 0, 0, -1, 1)))
    if elements and random.random() < 0.7:
        elements[random.randrange(len(elements))] = scalar(4, random)
    parts.keys[parts.keys.index(key)] = Key(key.name, ARRAY, array(4, elements))


def family(parts: Parts, random: Random) -> None:
    """Call the file one of another family, with or without its keys."""
    from ggjac.architectures import ARCHITECTURES

    old, new = architecture(parts), random.choice([*ARCHITECTURES]).encode()
    rename = random.random() < 0.8
    for i, key in enumerate(parts.keys):
        if key.name == b"general.architecture":
            parts.keys[i] = Key(key.name, STRING, text(new))
        elif rename and key.name.startswith(old + b"."):
            parts.keys[i] = Key(new + key.name[len(old) :], key.kind, key.payload)


def vocabulary(parts: Parts, random: Random) -> None:
    """Give the file a vocabulary, with odd tokens and types that do not fit."""
    tokens = [
        text(random.choice((*TEXTS, b"<0x41>", "\u2581the".encode(), b"<0xZZ>", b"[PAD1]")))
        for _ in range(random.choice((0, 1, 5, 128)))
    ]
    types = [struct.pack("<i", random.choice((0, 1, 2, 3, 4, 5, 6, 7, -1, 2**31 - 1))) for _ in tokens]
    parts.keys = [key for key in parts.keys if not key.name.startswith(b"tokenizer.")]
    parts.keys += [
        Key(
            b"tokenizer.ggml.model",
            STRING,
            text(random.choice((b"llama", b"gpt2", b"bert", b"t5", b"none", b"\x1b[2J"))),
        ),
        Key(b"tokenizer.ggml.tokens", ARRAY, array(STRING, tokens)),
        Key(b"tokenizer.ggml.token_type", ARRAY, array(5, types[: random.choice((None, None, 1))])),
        Key(b"tokenizer.ggml.bos_token_id", 4, scalar(4, random)),
        Key(b"tokenizer.ggml.add_bos_token", 7, b"\1"),
    ]


# ---- tensors


def some(parts: Parts, random: Random) -> int:
    """Choose a tensor."""
    return random.randrange(len(parts.tensors))


def tensor_sizes(parts: Parts, random: Random) -> None:
    """Change a tensor's sizes, their order, or their number."""
    if not parts.tensors:
        return
    at = some(parts, random)
    own, how = parts.tensors[at], random.randrange(5)
    sizes, dimensions = list(own.sizes) or [1], own.dimensions
    axis = random.randrange(len(sizes))
    if how == 0:
        sizes[axis] = max(0, sizes[axis] + random.choice((-32, -1, 1, 32, sizes[axis])))
    elif how == 1:
        sizes[axis] = random.choice(INTEGERS)
    elif how == 2:
        sizes.reverse()
    elif how == 3:
        sizes.insert(axis, random.choice((1, 1, 2)))
    else:
        dimensions = random.choice((0, 1, 2, 3, 4, 5, 8, 9, 2**32 - 1))
    parts.tensors[at] = Tensor(own.name, tuple(sizes), own.kind, own.offset, dimensions)


def tensor_type(parts: Parts, random: Random) -> None:
    """Give a tensor another type."""
    if parts.tensors:
        at = some(parts, random)
        own = parts.tensors[at]
        parts.tensors[at] = Tensor(own.name, own.sizes, random.choice((*range(44), 139, 999, 2**32 - 1)), own.offset)


def tensor_place(parts: Parts, random: Random) -> None:
    """Move a tensor onto another, off its alignment, or beyond the end."""
    if parts.tensors:
        at = some(parts, random)
        own, other = parts.tensors[at], random.choice(parts.tensors)
        moved = random.choice((other.offset, own.offset + 1, own.offset + parts.alignment, len(parts.data), *INTEGERS))
        parts.tensors[at] = Tensor(own.name, own.sizes, own.kind, moved % 2**64)


def tensor_name(parts: Parts, random: Random) -> None:
    """Drop, double or rename a tensor, to a name of another family too; or move it in the table."""
    if not parts.tensors:
        return
    own, how = parts.tensors.pop(some(parts, random)), random.randrange(4)
    block = random.choice((0, 0, 1, 2, 10**6))
    known = f"blk.{block}.{random.choice(PARTS)}.{random.choice(SUFFIXES)}"
    name = random.choice((known, known, random.choice(NAMES))).encode()
    if how == 1:
        parts.tensors += [own, own]
    elif how == 2:
        odd = random.choice((name, name, name, b"\xff", b"\x1b[2J", b"n" * 2000, own.name + b"\n"))
        parts.tensors.append(Tensor(odd, own.sizes, own.kind, own.offset))
    elif how == 3:
        parts.tensors.insert(random.randrange(len(parts.tensors) + 1), own)


def tensor_more(parts: Parts, random: Random) -> None:
    """Add a tensor that some family has, small and at the end of the data."""
    known = f"blk.{random.choice((0, 1))}.{random.choice(PARTS)}.{random.choice(SUFFIXES)}"
    name = random.choice((known, known, random.choice(NAMES))).encode()
    shape = (
        random.choice(parts.tensors).sizes if parts.tensors and random.random() < 0.5 else (random.choice((1, 4, 64)),)
    )
    parts.data += bytes(-len(parts.data) % parts.alignment)
    offset = len(parts.data)
    size = 4
    for axis in shape:
        size *= axis
    if size <= 1 << 22:
        parts.data += struct.pack("<f", random.choice(REALS[:6])) * (size // 4)
    parts.tensors.append(Tensor(name, shape, 0, offset))


# ---- data


def data(parts: Parts, random: Random) -> None:
    """Cut the data, or overwrite some of it with zeros, ones, noise, NaN or huge numbers."""
    how, length = random.randrange(4), len(parts.data)
    if not length:
        return
    if how == 0:
        del parts.data[random.randrange(length) :]
    elif how == 1:
        parts.data += bytes(random.choice((1, 31, 4096)))
    else:
        at = random.randrange(length) & ~3
        size = random.choice((4, 256, 4096, length - at))
        words = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\x7c\0\x7c", b"\0\0\x7f\x7f")
        fill = random.choice(words) * (size // 4 + 1) if random.random() < 0.7 else random.randbytes(size)
        parts.data[at : at + size] = fill[: len(parts.data[at : at + size])]


Change = Callable[[Parts, Random], None]
# Every kind of change, and how often it is made; None damages bytes.
OFTEN: dict[Change | None, int] = {
    counts: 2,
    preamble: 2,
    key_value: 12,
    key_type: 6,
    key_name: 4,
    key_more: 10,
    by_block: 5,
    family: 3,
    vocabulary: 4,
    tensor_sizes: 6,
    tensor_type: 6,
    tensor_place: 4,
    tensor_name: 8,
    tensor_more: 6,
    data: 8,
    None: 6,
}
CHANGES, WEIGHTS = list(OFTEN), list(OFTEN.values())


def split(parts: Parts, shards: int) -> list[Parts]:
    """Return a whole file as one of several files, each with some of the tensors."""
    starts = [*sorted(tensor.offset for tensor in parts.tensors), len(parts.data)]
    ends = dict(pairwise(starts))
    made = []
    for number in range(shards):
        keys = [Key(b"split.no", 2, struct.pack("<H", number)), Key(b"split.count", 2, struct.pack("<H", shards))]
        keys.append(Key(b"split.tensors.count", 5, struct.pack("<i", len(parts.tensors))))
        out = Parts(parts.version, (parts.keys if number == 0 else []) + keys, [], bytearray(), parts.alignment)
        for tensor in parts.tensors[number::shards]:
            out.tensors.append(Tensor(tensor.name, tensor.sizes, tensor.kind, len(out.data)))
            out.data += parts.data[tensor.offset : ends[tensor.offset]]
            out.data += bytes(-len(out.data) % parts.alignment)
        made.append(out)
    return made
