"""Checked access to the metadata of a model file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Larger than any model's sizes, and small enough that no product of them surprises.
MAX_SIZE = 2**31 - 1
LARGEST = 3.4028234e38  # what llama.cpp can read: it has float32


class ConfigError(ValueError):
    """The file is valid GGUF, but not a model that can be run; the message names what is missing or unsupported."""


@dataclass(frozen=True)
class Keys:
    """Checked access to the metadata under an architecture's prefix."""

    metadata: Mapping[str, Any]
    prefix: str

    def __contains__(self, key: str) -> bool:
        """Return whether the file has a key."""
        return f"{self.prefix}.{key}" in self.metadata

    def number(self, key: str, default: int | float | None = None) -> int | float:
        """Return a finite, non-negative number."""
        name = f"{self.prefix}.{key}"
        value = self.metadata.get(name, default)
        if value is None:
            raise ConfigError(f"metadata key {name} is missing; the file is incomplete or was converted wrongly")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError(f"metadata key {name} is {shown(value)}; expected a finite, non-negative number")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """Return a finite, non-negative number as a float, whatever type the file stores."""
        value = self.number(key, default)
        if value > LARGEST:
            raise ConfigError(f"metadata key {self.prefix}.{key} is {shown(value)}; expected at most {LARGEST}")
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer from 1 to `MAX_SIZE`."""
        value = self.number(key, default)
        if not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
            raise ConfigError(
                f"metadata key {self.prefix}.{key} is {value}; expected a whole number from 1 to {MAX_SIZE}"
            )
        return value

    def count(self, key: str, default: int = 0) -> int:
        """Return an integer from 0 to `MAX_SIZE`, or the default if the key is absent."""
        return self.integer(key, default) if self.number(key, default) else 0

    def of_each_block(self, name: str, blocks: int) -> list[float]:
        """Return a finite number of either sign for each block, from a scalar or an array; `name` is the full key."""
        value = self.metadata.get(name)
        if value is None:
            raise ConfigError(f"metadata key {name} is missing; the file is incomplete or was converted wrongly")
        entries = value if isinstance(value, Sequence) and not isinstance(value, str) else [value] * blocks
        if len(entries) != blocks:
            raise ConfigError(f"metadata key {name} has {len(entries)} entries for {blocks} blocks")
        for entry in entries:
            if isinstance(entry, bool) or not isinstance(entry, int | float) or not abs(entry) <= LARGEST:
                raise ConfigError(f"metadata key {name} contains {shown(entry)}; expected finite numbers")
        return [float(entry) for entry in entries]

    def flag(self, key: str) -> bool:
        """Return true or false; the key is required."""
        name = f"{self.prefix}.{key}"
        value = self.metadata.get(name)
        if not isinstance(value, bool):
            found = "missing" if value is None else shown(value)
            raise ConfigError(f"metadata key {name} is {found}; expected true or false; convert the file again")
        return value

    def counts(self, key: str, blocks: int, default: int | Sequence[int] | None = None, *, least: int = 1) -> list[int]:
        """Return an integer for each block, from a scalar or an array; `least` is 0 or 1."""
        name = f"{self.prefix}.{key}"
        value = self.metadata.get(name)
        if value is None and default is not None:
            return [default] * blocks if isinstance(default, int) else list(default)
        if value is None or isinstance(value, str) or not isinstance(value, Sequence):
            return [self._one(key, value, least)] * blocks
        if len(value) != blocks:
            raise ConfigError(f"metadata key {name} has {len(value)} entries for {blocks} blocks")
        return [self._one(f"{key}[{i}]", entry, least) for i, entry in enumerate(value)]

    def _one(self, label: str, value: Any, least: int) -> int:
        """Return a value of this name in messages as an integer, if it is one of at least `least`."""
        one = Keys({} if value is None else {f"{self.prefix}.{label}": value}, self.prefix)
        return one.integer(label) if least or one.number(label) else 0

    def for_all_blocks(self, key: str, blocks: int) -> int:
        """Return a positive integer that is the same for every block, from a scalar or an array."""
        sizes = set(self.counts(key, blocks))
        if len(sizes) > 1:
            raise ConfigError(
                f"metadata key {self.prefix}.{key} differs between blocks ({min(sizes)} to {max(sizes)}): not supported"
            )
        return sizes.pop()

    def flags(self, key: str, blocks: int, least: int | None = None) -> list[bool] | None:
        """Return true or false for each block, from an array (some have 1 and 0); None if the key is absent.

        The array may end after the first `least` blocks, as converters' do before blocks that predict later tokens.
        """
        value = self.metadata.get(f"{self.prefix}.{key}")
        if value is None:
            return None
        least = blocks if least is None else least
        whole = isinstance(value, Sequence) and not isinstance(value, str) and least <= len(value) <= blocks
        if not whole or not all(isinstance(entry, int) and entry in (0, 1) for entry in value):
            raise ConfigError(
                f"metadata key {self.prefix}.{key} must have one true or false for each of {least} blocks; convert the "
                "model again"
            )
        return [bool(entry) for entry in value] + [False] * (blocks - len(value))


def shown(value: Any) -> str:
    """Return a value from a file for a message: shortened, and with control characters escaped."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
