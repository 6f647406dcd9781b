"""Weights that are kept between sweeps, at three places and within the bytes that each may take."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ggjac.weights.bus import Pinned


class Section(NamedTuple):
    """Rows of a stored tensor: from row `first` on, `size` of every `period`."""

    first: int
    size: int
    period: int


class Key(NamedTuple):
    """Rows `start:stop` and columns `left:right` of the stored tensor `name`, or of a section of its rows."""

    name: str
    start: int
    stop: int
    left: int
    right: int
    section: Section | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.stop - self.start, self.right - self.left

    @property
    def runs(self) -> Iterator[tuple[int, int]]:
        """The start and stop of each run of consecutive stored rows."""
        if self.section is None:
            yield self.start, self.stop
            return
        first, size, period = self.section
        for run in range(self.start // size, -(-self.stop // size)):
            moved = first + run * (period - size)
            yield max(self.start, run * size) + moved, min(self.stop, (run + 1) * size) + moved


class Kept(NamedTuple):
    """One entry: where it is kept, and a dense tile (at `"dense"`) or quantized bytes."""

    place: str
    tensor: Tensor


class Cache:
    """Dense tiles and quantized bytes, by key.

    The first entries to come are kept while there is room; a sweep that uses all of them in turn would gain nothing
    from keeping the latest instead. Only after `age`, when another prompt may use other experts, are entries evicted:
    those not used since, oldest first, as far as a new entry needs their room.

    Args:
        room: bytes that may be kept at each place: `"dense"` and `"device"`, both on the device, and `"pinned"` in RAM.
            Pinned memory is never returned, so that its entries are not evicted.
    """

    def __init__(self, room: Mapping[str, int]):
        self.room = dict(room)
        self._free = dict(room)
        self._kept: dict[Key, Kept] = {}
        self._unused: dict[Key, None] = {}  # since the last `age`, in order of arrival
        self._pinned = Pinned(room.get("pinned", 0))

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes in use at each place."""
        used = dict.fromkeys(self.room, 0)
        for place, tensor in self._kept.values():
            used[place] += tensor.nbytes
        return used

    def get(self, key: Key) -> Kept | None:
        """Return an entry, which then counts as used."""
        self._unused.pop(key, None)
        return self._kept.get(key)

    def age(self) -> None:
        """Count every entry as unused from now on, until it is used again."""
        self._unused = dict.fromkeys(key for key, kept in self._kept.items() if kept.place != "pinned")

    def reserve(self, place: str, nbytes: int) -> bool:
        """Take room for an entry that is going to be kept, evicting unused ones if need be; return whether it fits."""
        while self._free.get(place, 0) < nbytes:
            evicted = next((key for key in self._unused if self._kept[key].place == place), None)
            if evicted is None:
                return False
            del self._unused[evicted]
            self._free[place] += self._kept.pop(evicted).tensor.nbytes
        self._free[place] -= nbytes
        return True

    def keep(self, key: Key, place: str, tensor: Tensor) -> None:
        """Add an entry for which room was reserved."""
        self._kept[key] = Kept(place, tensor)

    def pin(self, key: Key, raw: np.ndarray) -> Tensor | None:
        """Add a copy of quantized bytes, uint8 `[rows, columns]`, in pinned memory; return it, or None when full."""
        pinned = self._pinned.keep(raw)
        if pinned is not None:
            self.keep(key, "pinned", pinned)
        return pinned
