"""Copies of quantized bytes from RAM to a device, concurrent with its computation and never far ahead of it.

A device works asynchronously: the host enqueues work and continues. Copies use a stream of their own, so that they run
while the device computes. The host waits until the piece sent `sizes.ON_THE_WAY` pieces ago has been used: if
multiplying takes longer than copying, bytes would otherwise pile up in pinned memory and on the device.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ggjac.quants import as_tensor
from ggjac.sizes import ON_THE_WAY, PINNED_BYTES


class Bus:
    """The connection to one device.

    Streams and events come from the device's own torch module (`torch.cuda` for CUDA and ROCm). A device whose module
    has no streams (MPS) shares memory with the host, or copies in order.
    """

    def __init__(self, device: torch.device):
        self.device = device
        module = torch.get_device_module(device)
        self._module: Any = module if hasattr(module, "Stream") else None
        self._copies = module.Stream(device) if self._module else None
        self._slots = [_Slot() for _ in range(ON_THE_WAY)]
        self._turn = 0
        self._lock = threading.Lock()

    @contextmanager
    def sent(self, raw: np.ndarray | Tensor) -> Iterator[Tensor]:
        """Yield bytes on the device. Unless the block keeps them, they may be used only by work that it enqueues.

        Args:
            raw: uint8 `[rows, columns]`: an array in ordinary memory, which is copied through a pinned buffer, or a
                tensor from `Pinned`.
        """
        if self._module is None:
            yield (torch.from_numpy(np.array(raw)) if isinstance(raw, np.ndarray) else raw).to(self.device)
            return
        with self._lock:
            slot = self._slots[self._turn % len(self._slots)]
            self._turn += 1
            if slot.used:
                slot.used.synchronize()
            pinned = slot.filled(raw) if isinstance(raw, np.ndarray) else raw
            with self._module.stream(self._copies):
                moved = pinned.to(self.device, non_blocking=True)
            computing = self._module.current_stream(self.device)
            computing.wait_stream(self._copies)
            moved.record_stream(computing)
            yield moved
            slot.used = self._module.Event()
            slot.used.record(computing)


class _Slot:
    """A buffer in pinned memory, and the event after which it may be refilled."""

    def __init__(self) -> None:
        self.used: Any = None
        self._buffer: Tensor | None = None

    def filled(self, raw: np.ndarray) -> Tensor:
        """Copy bytes to the buffer, enlarged if need be, and return them there."""
        if self._buffer is None or self._buffer.numel() < raw.size:
            self._buffer = _pinned(raw.size)
        return _copied(raw, self._buffer)


class Pinned:
    """Bytes kept in pinned memory, many pieces per slab, because torch rounds allocations up to a power of two.

    Args:
        room: total bytes of all slabs.
    """

    def __init__(self, room: int):
        self._room = room
        self._free = torch.empty(0, dtype=torch.uint8)  # the unused rest of the newest slab

    def keep(self, raw: np.ndarray) -> Tensor | None:
        """Return a copy of uint8 `[rows, columns]`, or None if there is no room."""
        if self._free.numel() < raw.size:
            size = min(PINNED_BYTES, 1 << self._room.bit_length() >> 1)  # the largest power of two that fits
            if size < raw.size:
                return None
            self._room -= size
            self._free = _pinned(size)
        piece, self._free = self._free[: raw.size], self._free[raw.size :]
        return _copied(raw, piece)


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _copied(raw: np.ndarray, into: Tensor) -> Tensor:
    """Copy bytes `[rows, columns]` to the front of a buffer, on all of torch's threads; return them there."""
    return into[: raw.size].view(raw.shape).copy_(as_tensor(raw))
