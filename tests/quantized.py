"""Blocks of quantized weights, at random and at the edges, and what gguf-py makes of them."""

import itertools

import gguf
import numpy as np
import torch

from ggjac import quants
from ggjac.gguf.types import TYPES, GGMLType

NAMED = {type.name: type for type in TYPES.values()}


def reference(raw: np.ndarray, type: GGMLType) -> np.ndarray:
    """uint8 [rows, row_bytes] -> [rows, elements] by other hands than ours."""
    if type.name == "F64":
        return raw.view(np.float64).astype(np.float32)
    if type.name in ("Q1_0", "Q2_0"):
        blocks = raw.reshape(-1, type.block_bytes)
        d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        j = np.arange(type.block_size)
        if type.name == "Q1_0":
            values = np.where(blocks[:, 2 + j // 8] >> (j % 8).astype(np.uint8) & 1, d, -d)
        else:
            values = ((blocks[:, 2 + j // 4] >> (2 * (j % 4)).astype(np.uint8) & 3).astype(np.float32) - 1) * d
        return values.reshape(len(raw), -1)
    known = gguf.GGMLQuantizationType(type.id)
    assert known.name == type.name, f"number {type.id} is {known.name} in gguf-py"
    try:
        return gguf.quants.dequantize(raw, known)
    except NotImplementedError:
        raise AssertionError(f"gguf-py does not decode {type.name}: reference() needs a few lines for it") from None


def assert_same_bits(found: torch.Tensor, expected: np.ndarray) -> None:
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    # The bits say nothing of two NaNs; valid blocks have none.
    assert np.isfinite(expected).all(), "a scale is not where FORMATS says"
    assert torch.equal(found.view(torch.int32), torch.from_numpy(expected.copy()).view(torch.int32))


# ----------------------------------------------------------------------------------------------------------------------
# Blocks. Scales are written where quants.FORMATS says; a wrong place leaves NaNs, which assert_same_bits refuses.


def scales_of(type: GGMLType) -> tuple[quants.Exponent, ...]:
    """Return where a type's scales are; every type in FLOATS must have a row."""
    assert type.name in quants.FORMATS, f"{type.name} has no row in quants.FORMATS"
    return quants.FORMATS[type.name].scales


def set_scale(blocks: np.ndarray, type: GGMLType, index: int, bits: np.ndarray) -> None:
    """Write f16 bits as scale `index` of blocks [b, block_bytes]."""
    if type.name == "IQ1_M":
        words = blocks[:, 48:56].view(np.uint16)
        words &= 0x0FFF
        words |= (bits[:, None] << np.array([12, 8, 4, 0], np.uint16)) & 0xF000
    else:
        offset = scales_of(type)[index].offset
        blocks[:, offset : offset + 2].view(np.uint16)[:, 0] = bits


def is_f16(type: GGMLType) -> bool:
    """Whether the scales are f16."""
    return type.name == "IQ1_M" or any(row.mask == 0x7C00 for row in scales_of(type))


def stored(values: np.ndarray, type: GGMLType) -> np.ndarray:
    """Round numbers to an element type, uint8 [count, block_bytes]."""
    words = values.astype(np.float64 if type.name == "F64" else np.float32)
    if type.name == "BF16":
        words = words.view(np.uint16)[1::2].copy()  # the upper half
    return words.view(np.uint8).reshape(-1, type.block_bytes)


def random_blocks(type: GGMLType, count: int, seed: int = 0) -> np.ndarray:
    """Random bytes with finite scales, uint8 [count, block_bytes]."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, type.block_bytes), dtype=np.uint8)
    if is_f16(type):
        for index in range(len(scales_of(type))):
            bits = rng.integers(0, 1 << 16, count, dtype=np.uint16)
            set_scale(blocks, type, index, np.where(bits & 0x7C00 == 0x7C00, bits ^ 0x4000, bits))
    elif type.name == "MXFP4":
        blocks[:, 0] %= 253  # 12 x 2^(253 - 128) is beyond float32
    elif type.block_size == 1:
        blocks = stored(rng.standard_normal(count) * np.exp2(rng.integers(-40, 40, count)), type)
    return blocks


def edge_blocks(type: GGMLType) -> np.ndarray:
    """Every pair of edge scales, over quants of all zeros, all ones and random bytes; uint8 [count, block_bytes]."""
    if type.block_size == 1 and type.name != "F16":
        info = np.finfo(np.float32)
        edges = np.array([0, 1, 65504, 3e38, info.tiny, info.smallest_subnormal, info.smallest_subnormal * 2**16])
        return stored(np.concatenate([edges, -edges]), type)
    # Zero, one, the largest, the smallest and the largest subnormal, of both signs.
    scales = [0x0000, 0x3C00, 0x7BFF, 0x0001, 0x03FF, 0x8000, 0xBC00, 0xFBFF, 0x8001, 0x83FF]
    if type.name == "MXFP4":
        scales = [0, 1, 2, 127, 252]
    if type.name == "NVFP4":
        scales = [0x00, 0x01, 0x07, 0x08, 0x38, 0x7E, 0x7F]
    pairs = np.array(list(itertools.product(scales, repeat=2)), np.uint16)
    parts = []
    for seed, fill in enumerate((0, 255, None)):
        blocks = random_blocks(type, len(pairs), seed=seed)
        if fill is not None:
            blocks[:] = fill
        if type.name == "MXFP4":
            blocks[:, 0] = pairs[:, 0]
        elif type.name == "NVFP4":
            blocks[:, :2], blocks[:, 2:4] = pairs, pairs[:, ::-1]
        else:
            for index in range(len(scales_of(type))):
                set_scale(blocks, type, index, pairs[:, index].copy())
        parts.append(blocks)
    return np.concatenate(parts)
