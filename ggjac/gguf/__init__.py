"""GGUF files: the container, its storage types, and models on this disk by name."""

from ggjac.gguf.container import (
    ChangedError,
    GGUFError,
    GGUFFile,
    LazyArray,
    TensorInfo,
    open_gguf,
    shown,
)

__all__ = [
    "ChangedError",
    "GGUFError",
    "GGUFFile",
    "LazyArray",
    "TensorInfo",
    "open_gguf",
    "shown",
]
