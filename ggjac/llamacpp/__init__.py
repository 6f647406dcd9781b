"""llama.cpp in a child process, and control vector files for it."""

from ggjac.llamacpp.child import (
    COMMAND,
    Child,
    LlamaCppDied,
    LlamaCppError,
    missing,
)

__all__ = [
    "COMMAND",
    "Child",
    "LlamaCppDied",
    "LlamaCppError",
    "missing",
]
