"""Write tiny random GGUF files for the tests: one table row, one variation.

`write(path, **CASES[name])` makes a complete file that llama.cpp loads. Weights are random but scaled like a trained
model's: residual stream and branches of order one, attention scores with a spread of about two (so attention is far
from uniform), gates with a spread of about one and a half (so silu is far from linear), norm weights around one. Every
tensor has its own generator, seeded by the option `seed` and its name: two files that differ in one option share all
other weights.

A new variation is a row of `CASES`; a new family is a function in `FAMILIES` that lists its metadata and tensors.
This module shares nothing with the package under test: it writes through the `gguf` package and quantizes through
`gguf` or llama.cpp.
"""

import contextlib
import ctypes
import dataclasses
import functools
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

ALL_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Options:
    """What a tiny file contains; sizes in elements."""

    architecture: str = "llama"
    layers: int = 2
    d: int = 64
    heads: int = 4
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: d / heads
    ff: int = 96
    vocab: int = 128
    eps: float = 1e-5
    context: int = 256
    rope_base: float = 10000.0
    rope_factors: bool = False  # write rope_freqs.weight, Llama-3 style
    scaling: Mapping[str, Any] = field(default_factory=dict)  # keys below `{arch}.rope.scaling.`
    extra: Mapping[str, Any] = field(default_factory=dict)  # more keys below `{arch}.`
    omit: tuple[str, ...] = ()  # keys below `{arch}.` to leave out, so that the reader's defaults count
    per_layer_arrays: bool = False  # write head counts and feed-forward length as arrays of equal numbers
    tied: bool = False  # no output.weight
    fused_qkv: bool = False
    fused_bias: bool = False  # write attn_qkv.bias in place of the biases of q, k and v
    biases: tuple[str, ...] = ()  # of ALL_BIASES
    tokenizer: str = "none"  # none | spm
    type: str = "F32"  # of the matrices whose rows are whole blocks; the others stay F32
    types: Mapping[str, str] = field(default_factory=dict)  # part of a tensor's name -> its type
    seed: int = 0

    @property
    def hd(self) -> int:
        return self.head_dim or self.d // self.heads

    @property
    def hk(self) -> int:
        return self.kv_heads or self.heads


class Entry(NamedTuple):
    """A tensor to write: values are `mean + std * standard normal`, unless `values` is given."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    values: np.ndarray | None = None


def matrix(name: str, out: int, into: int, gain: float = 1.0) -> Entry:
    """Return a matrix that turns an input of order one into an output of order `gain`."""
    return Entry(f"{name}.weight", (out, into), gain / math.sqrt(into))


def norm(name: str, width: int) -> Entry:
    return Entry(f"{name}.weight", (width,), 0.3, 1.0)


def bias(name: str, width: int) -> Entry:
    return Entry(f"{name}.bias", (width,), 0.4)


def llama3_factors(n_rot: int, base: float, *, factor: float = 8.0, original: float = 64.0) -> np.ndarray:
    """Return Llama 3's frequency divisors [n_rot / 2] (low_freq_factor 1, high_freq_factor 4)."""
    wavelength = 2 * math.pi * base ** (np.arange(0, n_rot, 2) / n_rot)
    smooth = np.clip((original / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def llama_metadata(o: Options) -> dict[str, Any]:
    """Return the keys below `llama.`; Python floats are written as float32, integers as uint32."""
    repeat: Callable[[int], Any] = (lambda count: [count] * o.layers) if o.per_layer_arrays else (lambda count: count)
    return {
        "block_count": o.layers,
        "context_length": o.context,
        "embedding_length": o.d,
        "feed_forward_length": repeat(o.ff),
        "attention.head_count": repeat(o.heads),
        "attention.head_count_kv": repeat(o.hk),
        "attention.key_length": o.hd,
        "attention.value_length": o.hd,
        "attention.layer_norm_rms_epsilon": o.eps,
        "rope.dimension_count": o.hd,
        "rope.freq_base": o.rope_base,
        "vocab_size": o.vocab,
    }


def llama_tensors(o: Options) -> Iterator[Entry]:
    """List the tensors of a dense `llama` file in the converter's order."""
    q, kv = o.heads * o.hd, o.hk * o.hd
    yield Entry("token_embd.weight", (o.vocab, o.d), 1.0)
    yield norm("output_norm", o.d)
    if not o.tied:
        yield matrix("output", o.vocab, o.d, 2.0)
    if o.rope_factors:
        yield Entry("rope_freqs.weight", (o.hd // 2,), 0.0, values=llama3_factors(o.hd, o.rope_base))
    for layer in range(o.layers):
        b = f"blk.{layer}"
        yield norm(f"{b}.attn_norm", o.d)
        parts = [
            matrix(f"{b}.attn_q", q, o.d, 1.4),
            matrix(f"{b}.attn_k", kv, o.d, 1.4),
            matrix(f"{b}.attn_v", kv, o.d),
        ]
        if o.fused_qkv:
            # The same numbers as in a file that keeps the three apart: one oracle run serves both.
            stacked = np.concatenate([draw(part, o.seed) for part in parts])
            yield Entry(f"{b}.attn_qkv.weight", stacked.shape, 0.0, values=stacked)
        else:
            yield from parts
        yield matrix(f"{b}.attn_output", o.d, q)
        yield norm(f"{b}.ffn_norm", o.d)
        yield matrix(f"{b}.ffn_gate", o.ff, o.d, 1.5)
        yield matrix(f"{b}.ffn_up", o.ff, o.d)
        yield matrix(f"{b}.ffn_down", o.d, o.ff, 1.5)
        widths = {"attn_q": q, "attn_k": kv, "attn_v": kv, "ffn_gate": o.ff, "ffn_up": o.ff}
        entries = {name: bias(f"{b}.{name}", widths.get(name, o.d)) for name in o.biases}
        if o.fused_bias:
            qkv = np.concatenate([draw(bias(f"{b}.{name}", widths[name]), o.seed) for name in ALL_BIASES[:3]])
            entries = {name: entry for name, entry in entries.items() if name not in ALL_BIASES[:3]}
            yield Entry(f"{b}.attn_qkv.bias", qkv.shape, 0.0, values=qkv)
        yield from entries.values()


class Family(NamedTuple):
    """How one `general.architecture` is written."""

    metadata: Callable[[Options], dict[str, Any]]
    tensors: Callable[[Options], Iterator[Entry]]


FAMILIES: dict[str, Family] = {"llama": Family(llama_metadata, llama_tensors)}

YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 32}

# One row per variation. A row is what differs from `Options`.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_layer": {"layers": 1},
    "three_layers": {"layers": 3, "d": 32, "heads": 2, "ff": 64},
    "gqa": {"kv_heads": 2},
    "mqa": {"kv_heads": 1},
    "head_dim_wide": {"head_dim": 32, "kv_heads": 2},
    "head_dim_narrow": {"head_dim": 8},
    "odd_sizes": {"ff": 90, "vocab": 131, "d": 60, "heads": 3, "head_dim": 18},
    "ff_narrow": {"ff": 40},
    "rope_base": {"rope_base": 500000.0},
    "rope_factors": {"rope_factors": True, "rope_base": 500.0},
    "linear": {"scaling": {"type": "linear", "factor": 4.0}},
    "linear_untyped": {"scaling": {"factor": 4.0}},
    "linear_old_key": {"extra": {"rope.scale_linear": 4.0}},
    "scaling_none": {"scaling": {"type": "none", "factor": 4.0}},
    "yarn": {"scaling": YARN, "rope_base": 100.0},
    "yarn_ramp": {"scaling": YARN | {"original_context_length": 512}, "context": 2048, "head_dim": 32},
    "yarn_rope_factors": {"scaling": YARN, "rope_base": 100.0, "rope_factors": True},
    "attn_factor": {"scaling": {"type": "linear", "factor": 2.0, "attn_factor": 1.3}},
    "tied": {"tied": True},
    "fused_qkv": {"fused_qkv": True, "kv_heads": 2},
    "biases": {"biases": ALL_BIASES, "kv_heads": 2},
    "live_biases": {"biases": ("attn_v", "attn_output", "ffn_up", "ffn_down")},
    "frozen_biases": {"biases": ("attn_q", "attn_k")},
    "fused_biases": {"fused_qkv": True, "fused_bias": True, "kv_heads": 2, "biases": ALL_BIASES},
    "fused_split_biases": {"fused_qkv": True, "kv_heads": 2, "biases": ALL_BIASES},
    "defaults": {
        "omit": (
            "attention.head_count_kv",
            "attention.key_length",
            "attention.value_length",
            "rope.dimension_count",
            "rope.freq_base",
        )
    },
    "per_layer_arrays": {"per_layer_arrays": True, "kv_heads": 2},
    "eps": {"eps": 0.05},
    "tokenizer": {"tokenizer": "spm", "vocab": 320},
    "bf16": {"type": "BF16"},
    "f16": {"type": "F16"},
    "q8_0": {"type": "Q8_0"},
    "q4_0_tied": {"type": "Q4_0", "tied": True},
    "q4_k_mixed": {
        "type": "Q4_K",
        "types": {"ffn_down": "Q6_K", "attn_v": "Q5_0", "output.weight": "Q6_K"},
        "d": 256,
        "ff": 256,
        "kv_heads": 2,
        "layers": 1,
    },
}


def options(case: str | Mapping[str, Any]) -> Options:
    """Return the full options of a row of `CASES`, by name or as the row itself."""
    return Options(**(CASES[case] if isinstance(case, str) else case))


def prompt(case: str | Mapping[str, Any], length: int = 12, *, seed: int = 1) -> list[int]:
    """Return seeded token ids, all different from their neighbours' where the vocabulary allows."""
    return np.random.default_rng(seed).permutation(options(case).vocab)[:length].tolist()


def draw(entry: Entry, seed: int) -> np.ndarray:
    """Return the float32 values of a tensor."""
    if entry.values is not None:
        return entry.values.astype(np.float32)
    random = np.random.default_rng([seed, zlib.crc32(entry.name.encode())])
    return (entry.mean + entry.std * random.standard_normal(entry.shape)).astype(np.float32)


def write(path: str | os.PathLike[str], **row: Any) -> Path:
    """Write a tiny GGUF file of the `Options` given and return its path."""
    o = Options(**row)
    family = FAMILIES[o.architecture]
    writer = gguf.GGUFWriter(os.fspath(path), o.architecture)
    scaling = {f"rope.scaling.{key}": value for key, value in o.scaling.items()}
    for key, value in (family.metadata(o) | scaling | dict(o.extra)).items():
        if key in o.omit:
            continue
        add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](f"{o.architecture}.{key}", value)
    {"none": lambda *_: writer.add_tokenizer_model("none"), "spm": add_spm}[o.tokenizer](writer, o.vocab)
    for entry in family.tensors(o):
        values = draw(entry, o.seed)
        name = next((kind for part, kind in o.types.items() if part in entry.name), o.type)
        kind = gguf.GGMLQuantizationType[name]
        if values.ndim < 2 or values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.F32
        writer.add_tensor(entry.name, encode(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def add_spm(writer: gguf.GGUFWriter, vocab: int) -> None:
    """Add a SentencePiece-style vocabulary: 3 control tokens, 256 bytes, letters, and a few words."""
    words = ["▁", *"etaoinshrdlu", "th", "▁th", "▁the", "he", "in", "▁a", "re", "er", "ed", "▁s", "st", "on"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    pieces += [f"[extra{i}]" for i in range(vocab - len(pieces))]
    assert len(pieces) == vocab, f"a vocabulary of {vocab} cannot hold the {len(pieces)} basic pieces"
    kinds = gguf.TokenType
    control = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(vocab - 259)])
    writer.add_token_types(control + [kinds.BYTE] * 256 + [kinds.NORMAL] * (vocab - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


@functools.cache
def libggml() -> ctypes.CDLL:
    """Return llama.cpp's tensor library, for the quantizers that the `gguf` package does not have."""
    import llama_cpp

    library = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/*ggml-base.*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    )
    return library


def encode(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return float32 `values` [..., rows, columns] as stored bytes (float arrays for F32 and F16)."""
    if kind.name in ("F32", "F16"):
        return values.astype(np.float32 if kind.name == "F32" else np.float16)
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        columns = values.shape[-1]
        values = np.ascontiguousarray(values)
        out = np.zeros((*values.shape[:-1], columns // block * size), np.uint8)
        # Some formats insist on an importance per column; equal ones are neutral.
        weight = np.ones(columns, np.float32)
        rows = values.size // columns
        written = libggml().ggml_quantize_chunk(
            int(kind), values.ctypes.data, out.ctypes.data, 0, rows, columns, weight.ctypes.data
        )
        assert written == out.nbytes, f"{kind.name}: wrote {written} of {out.nbytes} bytes"
        return out


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence llama.cpp: its Python binding filters by this logger's level, and maps warnings to errors."""
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def quantize(source: str | os.PathLike[str], target: str | os.PathLike[str], ftype: str) -> Path:
    """Rewrite a GGUF file with llama.cpp's quantizer; `ftype` as in `LLAMA_FTYPE_MOSTLY_...`, or "F32".

    "F32" dequantizes exactly and keeps all metadata: what llama.cpp must be run on for tight agreement.
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    prefix = "ALL" if ftype == "F32" else "MOSTLY"
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{prefix}_{ftype}")
    params.allow_requantize = True
    params.nthread = 1
    with quiet():
        failed = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params)
    assert not failed, f"llama_model_quantize failed on {source} with {ftype}"
    return Path(target)


def resized(case: str | Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a row with some options changed, checked against the names of `Options`."""
    row = dict(CASES[case] if isinstance(case, str) else case) | changes
    unknown = row.keys() - {f.name for f in dataclasses.fields(Options)}
    assert not unknown, f"unknown options {unknown}"
    return row
