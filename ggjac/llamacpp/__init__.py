"""llama.cpp in a child process, and control vector files for it."""

from ggjac.llamacpp.child import (
    Child,
    LlamaCppDied,
    LlamaCppError,
    missing,
)

__all__ = [
    "Child",
    "LlamaCppDied",
    "LlamaCppError",
    "missing",
]
