"""Dequantization on a GPU, one kernel in Triton for each of the common types, bit for bit as `ggjac.quants` does it.

Torch's operators, some thirty for each type, write and read what is between them: six to fourteen times the bytes of a
kernel that reads the blocks once and writes the weights once. `ggjac.quants` uses these kernels where it finds that
they work, and needs none of them. Fields keep ggml's names; where they are in a block is in ggml-common.h.

A kernel's program decodes `B` blocks, `[B, s, r]` elements: `s` sub-blocks with a scale, `r` elements in each.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Shaped, UInt8
from torch import Tensor

# Elements that a program decodes: a power of two.
ELEMENTS = 2048


@triton.jit
def _places(raw, out, n, block_bytes: tl.constexpr, B: tl.constexpr, S: tl.constexpr, R: tl.constexpr):
    """Return where blocks and their elements are, which of the blocks exist, and the numbers of elements."""
    block = (tl.program_id(0) * B + tl.arange(0, B))[:, None, None]
    exists = block < n
    s = tl.arange(0, S)[None, :, None]
    r = tl.arange(0, R)[None, None, :]
    block = tl.where(exists, block, 0).to(tl.int64)  # those beyond the last one read the first one, and write nothing
    return raw + block * block_bytes, out + block * (S * R) + s * R + r, exists, s, r


@triton.jit
def _byte(at):
    """Return a byte as int32."""
    return tl.load(at).to(tl.int32)


@triton.jit
def _signed(at):
    """Return a signed byte as float32."""
    return tl.load(at).to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _half(at):
    """Return an f16 as float32; blocks of some types begin at odd addresses."""
    return (_byte(at) | _byte(at + 1) << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _store(to, values, exists):
    tl.store(to, values.to(to.dtype.element_ty), mask=exists)


@triton.jit
def _scale_min_k4(scales, s):
    """Return scale and minimum of sub-block `s`; see `ggjac.quants`."""
    sc, mn, low = _byte(scales + s % 4), _byte(scales + 4 + s % 4), _byte(scales + 8 + s % 4)
    scale = tl.where(s < 4, sc & 63, low & 15 | sc >> 2 & 48)
    minimum = tl.where(s < 4, mn & 63, low >> 4 | mn >> 2 & 48)
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def q4_0(raw, table, out, n, B: tl.constexpr):
    """Decode blocks of d, qs[16]."""
    block, to, exists, s, r = _places(raw, out, n, 18, B, 2, 16)
    q = _byte(block + 2 + r) >> 4 * s & 15
    _store(to, (q - 8).to(tl.float32) * _half(block), exists)


@triton.jit
def q8_0(raw, table, out, n, B: tl.constexpr):
    """Decode blocks of d, qs[32]."""
    block, to, exists, s, r = _places(raw, out, n, 34, B, 1, 32)
    _store(to, _signed(block + 2 + r + s) * _half(block), exists)


@triton.jit
def q4_k(raw, table, out, n, B: tl.constexpr):
    """Decode super-blocks of d, dmin, scales[12], qs[128]."""
    block, to, exists, s, r = _places(raw, out, n, 144, B, 8, 32)
    sc, mn = _scale_min_k4(block + 4, s)
    q = _byte(block + 16 + s // 2 * 32 + r) >> 4 * (s % 2) & 15
    _store(to, q.to(tl.float32) * (sc * _half(block)) - mn * _half(block + 2), exists)


@triton.jit
def q5_k(raw, table, out, n, B: tl.constexpr):
    """Decode super-blocks of d, dmin, scales[12], qh[32], qs[128]."""
    block, to, exists, s, r = _places(raw, out, n, 176, B, 8, 32)
    sc, mn = _scale_min_k4(block + 4, s)
    q = _byte(block + 48 + s // 2 * 32 + r) >> 4 * (s % 2) & 15 | (_byte(block + 16 + r) >> s & 1) << 4
    _store(to, q.to(tl.float32) * (sc * _half(block)) - mn * _half(block + 2), exists)


@triton.jit
def q6_k(raw, table, out, n, B: tl.constexpr):
    """Decode super-blocks of ql[128], qh[64], scales[16], d."""
    block, to, exists, s, r = _places(raw, out, n, 210, B, 16, 16)
    half, at = s // 8, s % 8 * 16 + r  # of the two halves of 128 elements, and the element in it
    low = _byte(block + half * 64 + at % 64) >> 4 * (at // 64) & 15
    high = _byte(block + 128 + half * 32 + at % 32) >> 2 * (at // 32) & 3
    _store(to, ((low | high << 4) - 32).to(tl.float32) * (_signed(block + 192 + s) * _half(block + 208)), exists)


@triton.jit
def iq4_xs(raw, table, out, n, B: tl.constexpr):
    """Decode super-blocks of d, scales_h[2], scales_l[4], qs[128]."""
    block, to, exists, s, r = _places(raw, out, n, 136, B, 8, 32)
    sc = _byte(block + 4 + s // 2) >> 4 * (s % 2) & 15 | (_byte(block + 2 + s // 4) >> 2 * (s % 4) & 3) << 4
    q = _byte(block + 8 + s * 16 + r % 16) >> 4 * (r // 16) & 15
    _store(to, tl.load(table + q) * ((sc - 32).to(tl.float32) * _half(block)), exists)


@triton.jit
def mxfp4(raw, table, out, n, B: tl.constexpr):
    """Decode blocks of e, qs[16]."""
    block, to, exists, s, r = _places(raw, out, n, 17, B, 2, 16)
    e = _byte(block)
    power = tl.where(e < 2, 0x00200000 << tl.minimum(e, 1), (e - 1) << 23).to(tl.float32, bitcast=True)
    q = _byte(block + 1 + r) >> 4 * s & 15
    _store(to, tl.load(table + q) * power, exists)


class Kernel(NamedTuple):
    """A kernel, and the sizes of its type's blocks."""

    decode: Any  # triton's own type of a function
    block_bytes: int
    block_size: int


# By the name of the type.
KERNELS: dict[str, Kernel] = {
    "Q4_0": Kernel(q4_0, 18, 32),
    "Q8_0": Kernel(q8_0, 34, 32),
    "Q4_K": Kernel(q4_k, 144, 256),
    "Q5_K": Kernel(q5_k, 176, 256),
    "Q6_K": Kernel(q6_k, 210, 256),
    "IQ4_XS": Kernel(iq4_xs, 136, 256),
    "MXFP4": Kernel(mxfp4, 17, 32),
}


def dequantize(
    data: UInt8[Tensor, "*rows row_bytes"], name: str, dtype: torch.dtype, table: Shaped[Tensor, "16"] | None = None
) -> Shaped[Tensor, "*rows elements"]:
    """Return the elements of rows of blocks, computed in float32, then cast, on the device of `data`.

    Args:
        data: whole blocks.
        name: of the type, one of `KERNELS`.
        dtype: of the result.
        table: the levels of the type, float32, if it has such.
    """
    decode, block_bytes, block_size = KERNELS[name]
    count, at_once = data.numel() // block_bytes, ELEMENTS // block_size
    shape = (*data.shape[:-1], data.shape[-1] // block_bytes * block_size)
    out = torch.empty(shape, dtype=dtype, device=data.device)
    if count:
        with torch.cuda.device_of(data):
            decode[(triton.cdiv(count, at_once),)](data.contiguous(), table, out, count, B=at_once)
    return out
