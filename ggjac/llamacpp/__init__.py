"""llama.cpp, asked in a process of its own; and files for it."""

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
