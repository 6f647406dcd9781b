"""ggml's tensor types: id, name, elements and bytes per block.

One table, used by the container (sizes) and the dequantizers (layouts). Source: ggml.h `enum ggml_type` and the
block structs of ggml-common.h. Types that ggml removed (ids 4, 5, 31-33, 36-38) and types that exist for activations
only (Q8_1, Q8_K) are absent: a file that uses one is refused by its id.
"""

from typing import NamedTuple


class GGMLType(NamedTuple):
    """One storage type: `block_size` elements are stored together in `block_bytes` bytes."""

    id: int
    name: str
    block_size: int
    block_bytes: int


TYPES: dict[int, GGMLType] = {
    row.id: row
    for row in (
        GGMLType(0, "F32", 1, 4),
        GGMLType(1, "F16", 1, 2),
        GGMLType(2, "Q4_0", 32, 18),
        GGMLType(3, "Q4_1", 32, 20),
        GGMLType(6, "Q5_0", 32, 22),
        GGMLType(7, "Q5_1", 32, 24),
        GGMLType(8, "Q8_0", 32, 34),
        GGMLType(10, "Q2_K", 256, 84),
        GGMLType(11, "Q3_K", 256, 110),
        GGMLType(12, "Q4_K", 256, 144),
        GGMLType(13, "Q5_K", 256, 176),
        GGMLType(14, "Q6_K", 256, 210),
        GGMLType(16, "IQ2_XXS", 256, 66),
        GGMLType(17, "IQ2_XS", 256, 74),
        GGMLType(18, "IQ3_XXS", 256, 98),
        GGMLType(19, "IQ1_S", 256, 50),
        GGMLType(20, "IQ4_NL", 32, 18),
        GGMLType(21, "IQ3_S", 256, 110),
        GGMLType(22, "IQ2_S", 256, 82),
        GGMLType(23, "IQ4_XS", 256, 136),
        GGMLType(24, "I8", 1, 1),
        GGMLType(25, "I16", 1, 2),
        GGMLType(26, "I32", 1, 4),
        GGMLType(27, "I64", 1, 8),
        GGMLType(28, "F64", 1, 8),
        GGMLType(29, "IQ1_M", 256, 56),
        GGMLType(30, "BF16", 1, 2),
        GGMLType(34, "TQ1_0", 256, 54),
        GGMLType(35, "TQ2_0", 256, 66),
        GGMLType(39, "MXFP4", 32, 17),
        GGMLType(40, "NVFP4", 64, 36),
        GGMLType(41, "Q1_0", 128, 18),
        GGMLType(42, "Q2_0", 64, 18),
    )
}


def holds_weights(type: GGMLType) -> bool:
    """Return whether a model's weights may have this type: integers are for tables, and llama.cpp aborts on F64."""
    return type.name not in ("I8", "I16", "I32", "I64", "F64")


def row_bytes(type: GGMLType, elements: int) -> int:
    """Return the bytes of a row of `elements` elements.

    Raises:
        ValueError: `elements` is not a whole number of blocks; ggml stores no partial block.
    """
    if elements % type.block_size:
        raise ValueError(
            f"a row of {elements} elements is not a whole number of {type.name} blocks of {type.block_size}"
        )
    return elements // type.block_size * type.block_bytes
