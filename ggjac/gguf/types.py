"""ggml's tensor types: id, name, elements and bytes per block.

One table, used by the container (sizes) and the dequantizers (layouts). Source: ggml.h `enum ggml_type` and the
block structs of ggml-common.h. Types that ggml removed, types that exist for activations only, and those of programs
derived from llama.cpp are absent: a file that uses one is refused by its id, with the name in `UNREADABLE`.
"""

from typing import NamedTuple

from ggjac.sizes import EXPERTS_OF_TOKENS


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


def _of_ik_llama_cpp() -> dict[int, str]:
    """Return the types that ik_llama.cpp stores and llama.cpp does not (ggml.h there); rows of _R4 are interleaved."""
    names = {
        133: "Q6_0 IQ1_BN IQ2_BN",
        137: "IQ2_K IQ3_K IQ4_K IQ5_K IQ6_K IQ2_TN IQ1_TN IQ4_KS IQ2_KS IQ4_KSS",
        151: "Q8_KV IQ5_KS IQ2_KT IQ3_KT IQ4_KT IQ3_KS IQ2_KL IQ1_KT",
        202: "Q4_0_R8",
        206: "Q5_0_R4",
        208: "Q8_0_R8",
        210: "Q2_K_R4 Q3_K_R4 Q4_K_R4 Q5_K_R4 Q6_K_R4",
        216: "IQ2_XXS_R4 IQ2_XS_R4 IQ3_XXS_R4 IQ1_S_R4 IQ4_NL_R4 IQ3_S_R4 IQ2_S_R4 IQ4_XS_R8",
        229: "IQ1_M_R4 BF16_R16",
        233: "Q6_0_R4",
        335: "IQ2_BN_R4",
        337: "IQ2_K_R4 IQ3_K_R4 IQ4_K_R4 IQ5_K_R4",
        344: "IQ4_KS_R4",
        352: "IQ5_KS_R4",
        398: "Q8_KV_R8 Q8_K_R8",
    }
    listed = {first + i: name for first, row in names.items() for i, name in enumerate(row.split())}
    return {id: f"{name} of ik_llama.cpp" for id, name in listed.items()}


_REMOVED = "which llama.cpp no longer stores"
_ACTIVATIONS = "a type of activations"
# Ids that files have although llama.cpp does not read them, for a message: what each is.
UNREADABLE = {
    4: f"Q4_2, {_REMOVED}",
    5: f"Q4_3, {_REMOVED}",
    9: f"Q8_1, {_ACTIVATIONS}",
    15: f"Q8_K, {_ACTIVATIONS}",
    31: f"Q4_0_4_4, {_REMOVED}",
    32: f"Q4_0_4_8, {_REMOVED}",
    33: f"Q4_0_8_8, {_REMOVED}",
    # One id, two programs.
    36: "I2_S of bitnet.cpp, or IQ4_NL_4_4 of an old llama.cpp",
    37: "I8_S of bitnet.cpp, or IQ4_NL_4_8 of an old llama.cpp",
    38: "TL1 of bitnet.cpp, or IQ4_NL_8_8 of an old llama.cpp",
    **_of_ik_llama_cpp(),
}


def _file_types() -> dict[int, str]:
    """Return the mixtures of types that llama.cpp's quantizer makes (llama.h, enum llama_ftype)."""
    names = {
        0: "F32 F16 Q4_0 Q4_1",
        7: "Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K",
        19: "IQ2_XXS IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16",
        36: "TQ1_0 TQ2_0 MXFP4_MOE NVFP4 Q1_0",
    }
    return {first + i: name for first, row in names.items() for i, name in enumerate(row.split())}


# `general.file_type` -> the name by which people know the file.
FILE_TYPES = _file_types()


def possible(name: str) -> list[str]:
    """Return the names of the types that a model's tensor of some name may have."""
    if name.endswith(EXPERTS_OF_TOKENS):
        return ["I32"]
    return [type.name for type in TYPES.values() if holds_weights(type)]


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
