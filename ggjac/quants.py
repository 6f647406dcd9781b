"""Dequantize ggml blocks to float32, bit for bit as ggml and gguf-py do.

Three implementations of one contract. `dequantize` is a few vectorized torch operations per type and runs on any
device; on a GPU, `ggjac.kernels` has one kernel in Triton for each of the common types. `dequantize_rows` is the fast
path on the CPU: libggml's own C code, which llama-cpp-python installs, on tiles of rows and several threads.

The order of operations is ggml's: block scale times sub-block scale, times the quant, minus the minimum. Where a
minimum is subtracted, every product before it is exact in float32 (an 11-bit f16 significand, 6 bits of scale, 5 of
quant), so a compiler that fuses multiply and add, as on ARM or CUDA, changes no bit.

Set `GGJAC_NATIVE=0` in the environment, before the first call, to disable libggml and Triton.

Layouts: the block structs of ggml-common.h and `dequantize_row_*` of ggml-quants.c; fields keep their names.
"""

import ctypes
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ggjac.gguf.types import TYPES, GGMLType

# Elements that torch dequantizes at once on the CPU: few enough for temporaries to stay in cache, enough to amortize
# the call overhead of some twenty operations.
TILE = 1 << 18
# The same for libggml, per thread, where rows are strided or converted to 16 bit: 1 MiB of float32 is still in the
# core's own cache when it is converted.
NATIVE_TILE = 1 << 18

# ----------------------------------------------------------------------------------------------------------------------
# Blocks in torch. Element types return their own dtype, quantized types float32.

Blocks = UInt8[Tensor, "b block_bytes"]
Elements = Float[Tensor, "b block_size"]


def f32(blocks: Blocks) -> Elements:
    """Reinterpret as float32."""
    return _view(blocks, torch.float32)


def f64(blocks: Blocks) -> Elements:
    """Reinterpret as float64."""
    return _view(blocks, torch.float64)


def f16(blocks: Blocks) -> Elements:
    """Reinterpret as float16."""
    return _view(blocks, torch.float16)


def bf16(blocks: Blocks) -> Elements:
    """Reinterpret as bfloat16."""
    return _view(blocks, torch.bfloat16)


def q1_0(blocks: Blocks) -> Elements:
    """Return d or -d by one bit."""
    d, qs = blocks.split((2, 16), 1)
    q = _bits(qs.unsqueeze(2)).flatten(1)
    return q.float().mul_(2).sub_(1).mul_(_half(d))


def q2_0(blocks: Blocks) -> Elements:
    """Return d (q - 1); four consecutive elements share a byte."""
    d, qs = blocks.split((2, 16), 1)
    q = _shift(qs.unsqueeze(2), (0, 2, 4, 6), 3).flatten(1)
    return q.float().sub_(1).mul_(_half(d))


def q4_0(blocks: Blocks) -> Elements:
    """Return d (q - 8)."""
    d, qs = blocks.split((2, 16), 1)
    return _nibbles(qs).flatten(1).float().sub_(8).mul_(_half(d))


def q4_1(blocks: Blocks) -> Elements:
    """Return d q + m."""
    d, m, qs = blocks.split((2, 2, 16), 1)
    return _nibbles(qs).flatten(1).float().mul_(_half(d)).add_(_half(m))


def q5_0(blocks: Blocks) -> Elements:
    """Return d (q - 16); qh holds the fifth bits of elements 0..31 in order."""
    d, qh, qs = blocks.split((2, 4, 16), 1)
    q = _nibbles(qs).flatten(1) | _bits(qh.unsqueeze(2)).flatten(1) << 4
    return q.float().sub_(16).mul_(_half(d))


def q5_1(blocks: Blocks) -> Elements:
    """Return d q + m; qh as in Q5_0."""
    d, m, qh, qs = blocks.split((2, 2, 4, 16), 1)
    q = _nibbles(qs).flatten(1) | _bits(qh.unsqueeze(2)).flatten(1) << 4
    return q.float().mul_(_half(d)).add_(_half(m))


def q8_0(blocks: Blocks) -> Elements:
    """Return d q with signed bytes q."""
    d, qs = blocks.split((2, 32), 1)
    return _view(qs, torch.int8).float().mul_(_half(d))


def q2_k(blocks: Blocks) -> Elements:
    """Return (d sc) q - dmin mn: 16 sub-blocks of 16, scale and minimum in the nibbles of `scales`."""
    scales, qs, d, dmin = blocks.split((16, 64, 2, 2), 1)
    q = _shift(qs.unflatten(1, (2, 32)), (0, 2, 4, 6), 3).reshape(-1, 16, 16)
    scale = (scales & 15).float().mul_(_half(d))
    minimum = (scales >> 4).float().mul_(_half(dmin))
    return q.float().mul_(scale.unsqueeze(2)).sub_(minimum.unsqueeze(2)).flatten(1)


def q3_k(blocks: Blocks) -> Elements:
    """Return (d sc) q: 16 sub-blocks of 16, sc of six bits less 32, q of two bits and a high bit less 4."""
    hmask, qs, scales, d = blocks.split((32, 64, 12, 2), 1)
    low = _shift(qs.unflatten(1, (2, 32)), (0, 2, 4, 6), 3).flatten(1)
    high = _bits(hmask).flatten(1)
    q = (low | high << 2).float().sub_(4).unflatten(1, (16, 16))
    sc = _nibbles(scales[:, :8]).flatten(1) | _shift(scales[:, 8:], (0, 2, 4, 6), 3).flatten(1) << 4
    return q.mul_(sc.float().sub_(32).mul_(_half(d)).unsqueeze(2)).flatten(1)


def q4_k(blocks: Blocks) -> Elements:
    """Return (d sc) q - dmin mn: 8 sub-blocks of 32, two to each 32 bytes of qs."""
    d, dmin, scales, qs = blocks.split((2, 2, 12, 128), 1)
    q = _nibbles(qs.unflatten(1, (4, 32))).reshape(-1, 8, 32)
    sc, mn = _scale_min_k4(scales)
    return q.float().mul_(sc.mul_(_half(d)).unsqueeze(2)).sub_(mn.mul_(_half(dmin)).unsqueeze(2)).flatten(1)


def q5_k(blocks: Blocks) -> Elements:
    """Return (d sc) q - dmin mn: Q4_K with a fifth bit, bit g of `qh[r]` for element r of sub-block g."""
    d, dmin, scales, qh, qs = blocks.split((2, 2, 12, 32, 128), 1)
    q = _nibbles(qs.unflatten(1, (4, 32))).reshape(-1, 8, 32) | _bits(qh) << 4
    sc, mn = _scale_min_k4(scales)
    return q.float().mul_(sc.mul_(_half(d)).unsqueeze(2)).sub_(mn.mul_(_half(dmin)).unsqueeze(2)).flatten(1)


def q6_k(blocks: Blocks) -> Elements:
    """Return (d sc) (q - 32): 16 sub-blocks of 16 with signed bytes sc, q of four low and two high bits."""
    ql, qh, scales, d = blocks.split((128, 64, 16, 2), 1)
    low = _nibbles(ql.unflatten(1, (2, 64))).flatten(1)
    high = _shift(qh.unflatten(1, (2, 32)), (0, 2, 4, 6), 3).flatten(1)
    q = (low | high << 4).float().sub_(32).unflatten(1, (16, 16))
    return q.mul_(_view(scales, torch.int8).float().mul_(_half(d)).unsqueeze(2)).flatten(1)


def iq4_nl(blocks: Blocks) -> Elements:
    """Return d K[q]: Q4_0 with a table of uneven levels."""
    d, qs = blocks.split((2, 16), 1)
    return _lookup(KVALUES_IQ4NL, _nibbles(qs).flatten(1)).mul_(_half(d))


def iq4_xs(blocks: Blocks) -> Elements:
    """Return (d sc) K[q]: 8 sub-blocks of 32, sc of four low and two high bits less 32."""
    d, scales_h, scales_l, qs = blocks.split((2, 2, 4, 128), 1)
    high = _shift(scales_h.unsqueeze(2), (0, 2, 4, 6), 3).flatten(1)
    sc = _nibbles(scales_l.unsqueeze(2)).flatten(1) | high << 4
    q = _nibbles(qs.unflatten(1, (8, 16))).flatten(2)
    return _lookup(KVALUES_IQ4NL, q).mul_(sc.float().sub_(32).mul_(_half(d)).unsqueeze(2)).flatten(1)


def iq2_xxs(blocks: Blocks) -> Elements:
    """Return d (sc + 1/2) / 4 G[q], signed: 8 sub-blocks of four rows of the codebook; sc and signs in one word."""
    d, qs = blocks.split((2, 64), 1)
    q, word = qs.unflatten(1, (8, 8)).split((4, 4), 2)
    sc, signs = _scale_and_signs(_view(word, torch.int32))
    return _coded("IQ2_XXS", q, sc.add_(0.5).mul_(_half(d)).mul_(0.25), signs)


def iq2_xs(blocks: Blocks) -> Elements:
    """Return d (sc + 1/2) / 4 G[q], signed: 16 sub-blocks of two rows; q of nine bits, its sign index of seven."""
    d, qs, scales = blocks.split((2, 64, 8), 1)
    words = _words(qs)
    sc = _nibbles(scales.unsqueeze(2)).flatten(1).float()
    return _coded("IQ2_XS", words & 511, sc.add_(0.5).mul_(_half(d)).mul_(0.25), _even(words >> 9))


def iq2_s(blocks: Blocks) -> Elements:
    """Return d (sc + 1/2) / 4 G[q], signed: 16 sub-blocks of two rows; q of ten bits, two of them in qh."""
    d, qs, signs, qh, scales = blocks.split((2, 32, 32, 8, 8), 1)
    q = qs.int() | _shift(qh.unsqueeze(2), (0, 2, 4, 6), 3).flatten(1).int() << 8
    sc = _nibbles(scales.unsqueeze(2)).flatten(1).float()
    return _coded("IQ2_S", q, sc.add_(0.5).mul_(_half(d)).mul_(0.25), signs)


def iq3_xxs(blocks: Blocks) -> Elements:
    """Return d (sc + 1/2) / 2 G[q], signed: 8 sub-blocks of eight rows of four; sc and signs in one word."""
    d, qs, words = blocks.split((2, 64, 32), 1)
    sc, signs = _scale_and_signs(_view(words, torch.int32).unsqueeze(2))
    return _coded("IQ3_XXS", qs, sc.add_(0.5).mul_(_half(d)).mul_(0.5), signs)


def iq3_s(blocks: Blocks) -> Elements:
    """Return d (2 sc + 1) G[q], signed: 8 sub-blocks of eight rows of four; q of nine bits, the ninth in qh."""
    d, qs, qh, signs, scales = blocks.split((2, 64, 8, 32, 4), 1)
    q = qs.int() | _bits(qh.unsqueeze(2)).flatten(1).int() << 8
    sc = _nibbles(scales.unsqueeze(2)).flatten(1).float()
    return _coded("IQ3_S", q, sc.mul_(2).add_(1).mul_(_half(d)), signs)


def iq1_s(blocks: Blocks) -> Elements:
    """Return d (2 sc + 1) (G[q] ± 1/8): 8 sub-blocks of four rows; sc, the sign and three bits of each q in a word."""
    d, qs, qh = blocks.split((2, 32, 16), 1)
    words = _words(qh)
    q = qs.int() | _shift(words.unsqueeze(2), (0, 3, 6, 9), 7).flatten(1) << 8
    sc = (words >> 12 & 7).float().mul_(2).add_(1).mul_(_half(d))
    return _shifted("IQ1_S", q, sc, words >> 15 & 1)


def iq1_m(blocks: Blocks) -> Elements:
    """Return d (2 sc + 1) (G[q] ± 1/8): 16 sub-blocks of two rows, each with a sign; d in the top bits of `scales`."""
    qs, qh, scales = blocks.split((32, 16, 8), 1)
    words = _words(scales)
    d = sum(((words[:, i] & 0xF000) >> (12 - 4 * i) for i in range(1, 4)), start=words[:, 0] >> 12)
    high = _nibbles(qh.unsqueeze(2)).flatten(1).int()
    sc = _shift(words.unsqueeze(2), (0, 3, 6, 9), 7).flatten(1).float().mul_(2).add_(1)
    sc.mul_(_view(d.to(torch.int16).unsqueeze(1), torch.float16).float())
    return _shifted("IQ1_M", qs.int() | (high & 7) << 8, sc, high >> 3)


def mxfp4(blocks: Blocks) -> Elements:
    """Return 2^(e - 128) F[q]: F holds doubled E2M1 values, hence 128 where E8M0 says 127."""
    e, qs = blocks.split((1, 16), 1)
    e = e.int()
    # Write the exponent field; below 2 the power is subnormal and lives in the mantissa.
    bits = torch.where(e < 2, 0x00200000 << e, (e - 1) << 23)
    return _lookup(KVALUES_FP4, _nibbles(qs).flatten(1)).mul_(bits.view(torch.float32))


def nvfp4(blocks: Blocks) -> Elements:
    """Return d F[q]: 4 sub-blocks of 16, each with an unsigned E4M3 scale; the tensor's `.scale` is not applied."""
    scales, qs = blocks.split((4, 32), 1)
    exponent, mantissa = (scales >> 3 & 15).int(), (scales & 7).float()
    # Halved, as F is doubled: exponent - 8 for bias 7, 2^-10 for the subnormals. 0x7F is NaN and read as 0.
    power = ((exponent - 8 + 127) << 23).view(torch.float32)
    d = torch.where(exponent == 0, mantissa * 2**-10, (mantissa / 8 + 1) * power).masked_fill_(scales == 0x7F, 0)
    q = _nibbles(qs.unflatten(1, (4, 8))).flatten(2)
    return _lookup(KVALUES_FP4, q).mul_(d.unsqueeze(2)).flatten(1)


def tq1_0(blocks: Blocks) -> Elements:
    """Return d (q - 1): five base-3 digits to a byte, most significant first, as a fraction of 256."""
    qs, qh, d = blocks.split((48, 4, 2), 1)
    digits = [_digits(field, count) for field, count in ((qs[:, :32], 5), (qs[:, 32:], 5), (qh, 4))]
    return torch.cat(digits, 1).float().sub_(1).mul_(_half(d))


def tq2_0(blocks: Blocks) -> Elements:
    """Return d (q - 1) with q of two bits."""
    qs, d = blocks.split((64, 2), 1)
    return _shift(qs.unflatten(1, (2, 32)), (0, 2, 4, 6), 3).flatten(1).float().sub_(1).mul_(_half(d))


class Exponent(NamedTuple):
    """The exponent of a scale: `mask` of the little-endian word at byte `offset`; all ones mean infinite or NaN."""

    offset: int
    word: str
    mask: int


def _f16_at(*offsets: int) -> tuple[Exponent, ...]:
    return tuple(Exponent(offset, "<u2", 0x7C00) for offset in offsets)


class Format(NamedTuple):
    """How a storage type is read.

    Attributes:
        decode: returns the elements of blocks, uint8 `[b, block_bytes]` -> `[b, block_size]`.
        scales: the exponents of a block's scales, for `has_invalid_scales`; an element is its own scale.
    """

    decode: Callable[[Blocks], Elements]
    scales: tuple[Exponent, ...]


# By the name of the type. A new type is one row here and one in `ggjac.gguf.types`, and enters the tests by them.
FORMATS: dict[str, Format] = {
    "F32": Format(f32, (Exponent(0, "<u4", 0x7F80_0000),)),
    "F16": Format(f16, _f16_at(0)),
    "BF16": Format(bf16, (Exponent(0, "<u2", 0x7F80),)),
    "F64": Format(f64, (Exponent(0, "<u8", 0x7FF0_0000_0000_0000),)),
    "Q1_0": Format(q1_0, _f16_at(0)),
    "Q2_0": Format(q2_0, _f16_at(0)),
    "Q4_0": Format(q4_0, _f16_at(0)),
    "Q4_1": Format(q4_1, _f16_at(0, 2)),
    "Q5_0": Format(q5_0, _f16_at(0)),
    "Q5_1": Format(q5_1, _f16_at(0, 2)),
    "Q8_0": Format(q8_0, _f16_at(0)),
    "Q2_K": Format(q2_k, _f16_at(80, 82)),
    "Q3_K": Format(q3_k, _f16_at(108)),
    "Q4_K": Format(q4_k, _f16_at(0, 2)),
    "Q5_K": Format(q5_k, _f16_at(0, 2)),
    "Q6_K": Format(q6_k, _f16_at(208)),
    "IQ1_S": Format(iq1_s, _f16_at(0)),
    "IQ1_M": Format(iq1_m, (Exponent(52, "<u4", 0x7000_C000),)),  # an f16 spread over the top nibbles of four uint16
    "IQ2_XXS": Format(iq2_xxs, _f16_at(0)),
    "IQ2_XS": Format(iq2_xs, _f16_at(0)),
    "IQ2_S": Format(iq2_s, _f16_at(0)),
    "IQ3_XXS": Format(iq3_xxs, _f16_at(0)),
    "IQ3_S": Format(iq3_s, _f16_at(0)),
    "IQ4_NL": Format(iq4_nl, _f16_at(0)),
    "IQ4_XS": Format(iq4_xs, _f16_at(0)),
    "MXFP4": Format(mxfp4, (Exponent(0, "u1", 0xFF),)),
    "NVFP4": Format(nvfp4, ()),  # its only NaN is read as 0
    "TQ1_0": Format(tq1_0, _f16_at(52)),
    "TQ2_0": Format(tq2_0, _f16_at(64)),
}

KVALUES_IQ4NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
KVALUES_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
# Of the types whose kernel on a GPU looks them up.
LEVELS = {"IQ4_XS": KVALUES_IQ4NL, "MXFP4": KVALUES_FP4}


def _view(field: Tensor, dtype: torch.dtype) -> Tensor:
    """Reinterpret the bytes of the last axis, in place where torch can."""
    field = field.contiguous()
    # A contiguous view may still start at an odd byte of its storage, or, of one block, have any stride.
    odd = any(at % dtype.itemsize for at in (field.storage_offset(), *field.stride()[:-1]))
    return (field.clone(memory_format=torch.contiguous_format) if odd else field).view(dtype)


def _half(field: Tensor) -> Tensor:
    """Return f16 scales [b, 2 bytes] as float32 [b, 1]."""
    return _view(field, torch.float16).float()


def _shift(field: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Return `field >> shift & mask` for every shift, uint8 [..., r] -> [..., s, r]."""
    # Shifts by a scalar are vectorized; a shift by a broadcast tensor runs element by element, eight times slower.
    return torch.stack([field >> shift & mask for shift in shifts], -2)


def _nibbles(field: Tensor) -> Tensor:
    """Return low, then high nibbles, uint8 [..., r] -> [..., 2, r]."""
    return _shift(field, (0, 4), 15)


def _bits(field: Tensor) -> Tensor:
    """Return bits 0 to 7, uint8 [..., r] -> [..., 8, r]."""
    return _shift(field, (0, 1, 2, 3, 4, 5, 6, 7), 1)


def _digits(field: Tensor, count: int) -> Tensor:
    """Return the leading `count` base-3 digits of bytes read as fractions, uint8 [b, r] -> int16 [b, count * r]."""
    # The product wraps at 256 on purpose: it drops the digits before this one.
    fractions = torch.stack([field * 3**i for i in range(count)], 1)
    return (fractions.short() * 3 >> 8).flatten(1)


def _scale_min_k4(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack Q4_K's and Q5_K's 12 bytes into 8 six-bit scales and 8 minima, float32 [b, 8] each.

    Source: `get_scale_min_k4` of ggml-quants.c. Bytes 0-3 and 4-7 hold scales and minima 0-3 in six bits, and in their
    two top bits those of 4-7, whose low nibbles are in bytes 8-11.
    """
    sc, mn, low = scales.unflatten(1, (3, 4)).unbind(1)
    sc = torch.cat((sc & 63, low & 15 | sc >> 2 & 48), 1)
    mn = torch.cat((mn & 63, low >> 4 | mn >> 2 & 48), 1)
    return sc.float(), mn.float()


def _lookup(values: tuple[int, ...], indices: Tensor) -> Tensor:
    """Return `values[indices]` as float32."""
    return _table(values, indices.device).take(indices.long())


def _words(field: Tensor) -> Tensor:
    """Return unsigned 16-bit words, uint8 [b, 2 r] -> int32 [b, r]."""
    return _view(field, torch.int16).int() & 0xFFFF


def _scale_and_signs(words: Tensor) -> tuple[Tensor, Tensor]:
    """Return the top four bits, float32 [b, s], and the four bytes of signs encoded in the other 28."""
    # A right shift of a negative word brings in ones from above; the masks drop them.
    return (words >> 28 & 15).flatten(1).float(), _even(_shift(words, (0, 7, 14, 21), 127).flatten(1))


def _even(index: Tensor) -> Tensor:
    """Return bytes of seven given bits and an eighth that makes the number of ones even (ksigns_iq2xs)."""
    parity = index
    for shift in (4, 2, 1):
        parity = parity ^ (parity >> shift)
    return index | (parity & 1) << 7


def _coded(name: str, q: Tensor, scale: Tensor, signs: Tensor) -> Tensor:
    """Return signed rows of a codebook times the scale of their sub-block; a byte of `signs` covers eight elements."""
    minus = _bits(signs.unsqueeze(2)).flatten(1)
    values = _codebook(name, q.device)[q.flatten(1).long()].flatten(1)
    values.mul_(minus.float().mul_(-2).add_(1))
    return values.unflatten(1, (scale.shape[1], -1)).mul_(scale.unsqueeze(2)).flatten(1)


def _shifted(name: str, q: Tensor, scale: Tensor, minus: Tensor) -> Tensor:
    """Return rows of a codebook, plus or minus 1/8, times the scale of their sub-block."""
    values = _codebook(name, q.device)[q.long()]
    delta = minus.float().mul_(-0.25).add_(0.125)
    values = values.unflatten(1, (delta.shape[1], -1)).add_(delta[..., None, None])
    return values.flatten(1).unflatten(1, (scale.shape[1], -1)).mul_(scale.unsqueeze(2)).flatten(1)


@cache
def _codebook(name: str, device: torch.device) -> Tensor:
    """Return a type's codebook, float32 [rows, 4 or 8], from gguf-py rather than a copy."""
    from gguf import quants as reference

    kind = getattr(reference, name)
    kind.init_grid()
    return torch.from_numpy(kind.grid).reshape(kind.grid_shape).to(device)


@cache
def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    # Cached, because the copy to a device waits for all work queued there.
    return torch.tensor(values, dtype=torch.float32).to(device)


# ----------------------------------------------------------------------------------------------------------------------
# Tensors of rows, any device


def supported(type: GGMLType) -> bool:
    """Return whether tensors of this type can be dequantized."""
    return type.name in FORMATS


def dequantize(data: Tensor, type: GGMLType, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the elements of rows of blocks, uint8 [..., row_bytes] -> [..., elements], on the device of `data`.

    Computed in float32, then cast. Temporaries take several times the result: pass a tile, not a model.

    Raises:
        ValueError: the type is not supported, or the rows are not whole blocks of uint8.
    """
    if data.dtype != torch.uint8 or data.ndim == 0:
        raise ValueError(f"{type.name}: expected uint8 [..., row_bytes], found {_spell(data.dtype)} {list(data.shape)}")
    elements = _elements(type, data.shape[-1])
    kernel = _kernel(type, data.device) if data.is_cuda else None
    if kernel:
        return kernel(data, dtype)
    values = FORMATS[type.name].decode(data.reshape(-1, type.block_bytes))
    return values.reshape(*data.shape[:-1], elements).to(dtype)


@cache
def _kernel(type: GGMLType, device: torch.device) -> Callable[[Tensor, torch.dtype], Tensor] | None:
    """Return Triton's kernel for one type on a GPU, or None if there is none, or it fails or differs from torch there.

    Triton comes with torch for CUDA on Linux; it compiles at the first use, for which it needs a C compiler.
    """
    if os.environ.get("GGJAC_NATIVE") == "0" or importlib.util.find_spec("triton") is None:
        return None
    try:
        from ggjac import kernels

        if type.name not in kernels.KERNELS:
            return None
        table = _table(LEVELS[type.name], device) if type.name in LEVELS else None

        def decode(data: Tensor, dtype: torch.dtype) -> Tensor:
            return kernels.dequantize(data, type.name, dtype, table)

        block = torch.from_numpy(_arbitrary(type)).to(device)
        ours, theirs = FORMATS[type.name].decode(block), decode(block, torch.float32)
        return decode if torch.equal(ours.view(torch.int32), theirs.view(torch.int32)) else None
    except Exception as error:  # whatever Triton and the compilers that it starts raise
        reason = (str(error).splitlines() or [repr(error)])[0]
        warnings.warn(f"Triton cannot dequantize {type.name} on {device} ({reason}): torch does, slower", stacklevel=2)
        return None


def _arbitrary(type: GGMLType) -> np.ndarray:
    """Return one block of arbitrary bytes with a small d: decoding it shows whether others agree with this module."""
    return np.arange(type.block_bytes, dtype=np.uint8)[None] * 37 % 64


def _elements(type: GGMLType, row_bytes: int) -> int:
    """Return the number of elements in a row of bytes; refuse unsupported types and partial blocks."""
    if not supported(type):
        names = ", ".join(row.name for row in TYPES.values() if supported(row))
        raise ValueError(f"type {type.name} cannot be dequantized; supported: {names}")
    if row_bytes % type.block_bytes:
        raise ValueError(
            f"{type.name}: a row of {row_bytes} bytes is not a whole number of blocks of {type.block_bytes} bytes; "
            f"pass whole rows as the file stores them"
        )
    return row_bytes // type.block_bytes * type.block_size


def _spell(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


# ----------------------------------------------------------------------------------------------------------------------
# Rows on the CPU


def dequantize_rows(raw: np.ndarray, type: GGMLType, out: Tensor | None = None, *, threads: int = 1) -> Tensor:
    """Return rows of blocks as floats, uint8 [rows, row_bytes] -> [rows, elements].

    Quantized types run in libggml on `threads` threads. Element types (F32, F16, BF16, F64), and without libggml all
    types, run in torch on torch's own threads. Pass the previous `out` again when you can: the page faults of a
    new one cost as much as the arithmetic.

    Args:
        raw: may be a read-only view of a mapped file, and its rows may be strided.
        type: how the rows are stored.
        out: [rows, elements], contiguous, on the CPU; overwritten and returned. The default is a new float32 tensor.
            Other dtypes are converted from float32 one tile at a time, while the tile is in cache.
        threads: number of threads that share the rows.

    Raises:
        ValueError: the type is not supported, or `raw`, `out` or `threads` is not as described.
    """
    if raw.dtype != np.uint8 or raw.ndim != 2:
        raise ValueError(f"{type.name}: expected raw as uint8 [rows, row_bytes], found {raw.dtype} {list(raw.shape)}")
    if threads < 1:
        raise ValueError(f"threads={threads}: at least one thread is needed")
    rows, elements = len(raw), _elements(type, raw.shape[1])
    if out is None:
        out = torch.empty(rows, elements, dtype=torch.float32, device="cpu")
    elif not out.dtype.is_floating_point or out.shape != (rows, elements) or out.device.type != "cpu":
        raise ValueError(
            f"{type.name}: out must be floats {[rows, elements]} on the CPU, "
            f"found {_spell(out.dtype)} {list(out.shape)} on {out.device}"
        )
    elif not out.is_contiguous():
        raise ValueError(f"{type.name}: out must be contiguous, found strides {list(out.stride())}")
    if out.numel() == 0:
        return out

    native = _native(type)
    decode = native or _torch(type)
    # Torch has threads of its own.
    threads = min(threads, rows) if native else 1
    contiguous, direct = raw.flags.c_contiguous, out.dtype == torch.float32
    whole = contiguous and (direct if native else type.block_size == 1)
    step = rows if whole else max(1, (NATIVE_TILE if native else TILE) // elements)

    def work(start: int, stop: int) -> None:
        # Keep the Python between two calls short: all threads share the interpreter.
        scratch = None if direct else _scratch(min(step, stop - start) * elements).view(-1, elements)
        for a, piece in zip(range(start, stop, step), out[start:stop].split(step), strict=True):
            blocks = raw[a : min(a + step, stop)]
            if not contiguous:
                blocks = np.ascontiguousarray(blocks)
            if scratch is None:
                decode(blocks, piece)
            else:
                part = scratch if len(blocks) == len(scratch) else scratch[: len(blocks)]
                decode(blocks, part)
                piece.copy_(part)

    if threads == 1:
        work(0, rows)
    else:
        list(_pool().map(work, *zip(*pairwise(rows * i // threads for i in range(threads + 1)), strict=True)))
    return out


_kept = threading.local()


def _scratch(elements: int) -> Tensor:
    """Return this thread's float32 scratch; reused, because page faults of a new one cost as much as the arithmetic."""
    scratch = getattr(_kept, "scratch", None)
    if scratch is None or scratch.numel() < elements:
        scratch = _kept.scratch = torch.empty(elements, dtype=torch.float32, device="cpu")
    return scratch[:elements]


@cache
def _pool() -> ThreadPoolExecutor:
    """Return threads in which torch does not start threads of its own."""
    count = os.cpu_count() or 1

    def alone() -> None:
        torch.get_num_threads()  # the first call in a thread copies the global setting, which the next line replaces
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, "ggjac-dequantize", initializer=alone)
    started = threading.Barrier(count)
    before = torch.get_num_threads()
    list(pool.map(lambda _: started.wait(), range(count)))
    torch.set_num_threads(before)  # torch gives threads started later the last number set anywhere
    return pool


# A decoder writes contiguous rows [r, row_bytes] to a contiguous float32 [r, elements].
Decoder = Callable[[np.ndarray, Tensor], None]


def _torch(type: GGMLType) -> Decoder:
    def decode(raw: np.ndarray, out: Tensor) -> None:
        blocks = as_tensor(raw).view(-1, type.block_bytes)
        out.copy_(FORMATS[type.name].decode(blocks).view(out.shape))

    return decode


def as_tensor(raw: np.ndarray) -> Tensor:
    """Return a tensor that shares the memory of a uint8 array [rows, columns], which must outlive it; do not write."""
    # Torch warns about every read-only array; a ctypes buffer does not carry that flag.
    apart = raw.strides[0] if len(raw) > 1 else raw.shape[1]
    buffer = (ctypes.c_uint8 * ((len(raw) - 1) * apart + raw.shape[1])).from_address(_address(raw))
    return torch.frombuffer(buffer, dtype=torch.uint8).as_strided(raw.shape, (apart, 1))


def _address(array: np.ndarray) -> int:
    # As array.ctypes.data, without building the object.
    return array.__array_interface__["data"][0]


# ----------------------------------------------------------------------------------------------------------------------
# Scales that are not finite


def has_invalid_scales(raw: np.ndarray, type: GGMLType) -> bool:
    """Return whether a block of uint8 [rows, row_bytes] has an infinite or NaN scale (of element types: element).

    The test of `ggml_validate_row_data`, which prints to stderr. It reads only the bytes of scales: about ten times
    faster than dequantizing, twice for element types.

    Raises:
        ValueError: the type is not supported, or the rows are not whole blocks.
    """
    elements = _elements(type, raw.shape[1])
    blocks = raw.reshape(len(raw), elements // type.block_size, type.block_bytes)
    step = max(1, TILE // max(1, elements))
    for start in range(0, len(raw), step):
        for offset, word, mask in FORMATS[type.name].scales:
            field = blocks[start : start + step, :, offset : offset + np.dtype(word).itemsize].view(word)
            # A masked word never exceeds the mask; the largest equals it if all exponent bits of a word are set.
            if (field & mask).max(initial=0) == mask:
                return True
    return False


# ----------------------------------------------------------------------------------------------------------------------
# libggml. The exported `dequantize_row_*` are called rather than `ggml_get_type_traits(type)->to_float`: their
# signature is stable, the layout of the traits struct is not, and an unsupported type is simply a missing symbol.


@cache
def native_library() -> ctypes.CDLL | None:
    """Return libggml-base of the installed llama-cpp-python, or None.

    None if it is absent, disabled by `GGJAC_NATIVE=0`, or decodes a known block wrongly.
    """
    if os.environ.get("GGJAC_NATIVE") == "0":
        return None
    # Found, not imported: llama_cpp would load all of llama.cpp.
    spec = importlib.util.find_spec("llama_cpp")
    for folder in (spec and spec.submodule_search_locations) or ():
        for name in ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml-base.dll"):
            path = Path(folder, "lib", name)
            if not path.is_file():
                continue
            try:
                library = ctypes.CDLL(str(path))
            except OSError:
                continue
            if _knows_q8_0(library):
                return library
    return None


def _knows_q8_0(library: ctypes.CDLL) -> bool:
    """Check one known block, d = 1.5, q = -16 .. 15: an old libggml reads f16 from a table that is not filled yet."""
    function = _function(library, "Q8_0")
    if function is None:
        return False
    raw = np.frombuffer(np.float16(1.5).tobytes() + np.arange(-16, 16, dtype=np.int8).tobytes(), np.uint8)
    out = np.zeros(32, np.float32)
    function(_address(raw), _address(out), 32)
    return np.array_equal(out, 1.5 * np.arange(-16, 16))


def _function(library: ctypes.CDLL, name: str) -> Callable[[int, int, int], None] | None:
    """Return `void dequantize_row_x(const block_x *, float *, int64_t elements)`."""
    # ggml writes iq4_xs, q4_0 and q4_K.
    symbol = "dequantize_row_" + (name[:-1].lower() + "K" if name.endswith("_K") else name.lower())
    function = getattr(library, symbol, None)
    if function is not None:
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), None
    return function


@cache
def _native(type: GGMLType) -> Decoder | None:
    """Return libggml's decoder for one type, or None if it has none or disagrees with this module."""
    library = native_library()
    if library is None or type.block_size == 1 or type.name not in FORMATS:
        return None
    function = _function(library, type.name)
    if function is None or not _same_block(library, type):
        return None

    def decode(raw: np.ndarray, out: Tensor) -> None:
        function(_address(raw), out.data_ptr(), out.numel())

    raw = _arbitrary(type)  # the layout behind a type's name has changed before
    ours, theirs = torch.zeros(2, 1, type.block_size, dtype=torch.float32, device="cpu")
    _torch(type)(raw, ours)
    decode(raw, theirs)
    if not torch.equal(ours.view(torch.int32), theirs.view(torch.int32)):
        return None
    return decode


def _same_block(library: ctypes.CDLL, type: GGMLType) -> bool:
    """Return whether libggml agrees on the sizes of a block, which its C code assumes of our buffers."""
    try:
        size, elements = library.ggml_type_size, library.ggml_blck_size
    except AttributeError:
        return False
    size.argtypes, size.restype = (ctypes.c_int,), ctypes.c_size_t
    elements.argtypes, elements.restype = (ctypes.c_int,), ctypes.c_int64
    return (size(type.id), elements(type.id)) == (type.block_bytes, type.block_size)
