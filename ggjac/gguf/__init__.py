"""GGUF files: the container, its storage types, and models on this disk by name."""

from ggjac.gguf.container import (
    FINGERPRINT_BLOCK_BYTES,
    FINGERPRINT_BLOCKS,
    MAX_ALIGNMENT,
    MAX_DEPTH,
    MAX_DIMENSIONS,
    MAX_ENTRIES,
    MAX_HEADER_BYTES,
    MAX_KEY_BYTES,
    MAX_NAME_BYTES,
    MAX_STRINGS,
    GGUFError,
    GGUFFile,
    LazyArray,
    TensorInfo,
    open_gguf,
    shown,
)

__all__ = [
    "FINGERPRINT_BLOCKS",
    "FINGERPRINT_BLOCK_BYTES",
    "MAX_ALIGNMENT",
    "MAX_DEPTH",
    "MAX_DIMENSIONS",
    "MAX_ENTRIES",
    "MAX_HEADER_BYTES",
    "MAX_KEY_BYTES",
    "MAX_NAME_BYTES",
    "MAX_STRINGS",
    "GGUFError",
    "GGUFFile",
    "LazyArray",
    "TensorInfo",
    "open_gguf",
    "shown",
]
