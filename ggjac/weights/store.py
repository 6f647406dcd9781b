"""The tensors of one model file as matrices that are dequantized a few rows at a time, on any device and in any dtype.

Bytes stay quantized in the mapped file and on their way to the device; a dense tile lives until the next one is asked
for. `WeightStore.reads` counts the rows dequantized (a part of a row as its share), so that a test can hold a sweep to
one pass.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ggjac import quants
from ggjac.gguf import GGUFFile, TensorInfo
from ggjac.gguf.types import TYPES, holds_weights, row_bytes
from ggjac.sizes import TILE_ELEMENTS
from ggjac.weights.bus import Bus, Pinned

# A tile: tensor, first row and the one after the last, columns likewise.
Key = tuple[str, int, int, int, int]


class WeightError(ValueError):
    """A tensor's type is not supported, or its bytes hold values that no weight can have."""


class WeightStore:
    """All tensors of a GGUF file, dequantized on demand.

    Args:
        file: the open container.
        device: where tiles are wanted; elsewhere than on the CPU the quantized bytes travel and are dequantized there.
        dtype: of the tiles.
        threads: for dequantization on the CPU.

    Attributes:
        reads: rows dequantized, by tensor.
        bytes_read: quantized bytes dequantized.
        places: where each block's live weights wait between sweeps; see `place`.
    """

    def __init__(self, file: GGUFFile, *, device: torch.device, dtype: torch.dtype, threads: int):
        for info in file.tensors.values():
            if not (holds_weights(info.type) and quants.supported(info.type)):
                known = ", ".join(type.name for type in TYPES.values() if holds_weights(type))
                raise WeightError(f"tensor {info.name}: type {info.type.name} is not supported; supported: {known}")
        self.file, self.device, self.dtype, self.threads = file, device, dtype, threads
        self.reads: dict[str, float] = defaultdict(int)
        self.bytes_read = 0
        self.places: list[str] = []
        self._given: dict[str, int] = {}
        self._room: dict[str, int] = {}
        self._tiles: dict[Key, Tensor] = {}
        self._bytes: dict[Key, Tensor] = {}
        self._earlier: dict[Key, str] = {}  # kept since before the last `place`, and not used since: key and place
        self._bus = None if device.type == "cpu" else Bus(device)
        self._pinned = Pinned(0)
        self._checked: set[Key] = set()
        self._scratch = threading.local()  # a tile per thread on the CPU, reused so that its pages are touched once

    def __contains__(self, name: str) -> bool:
        """Say whether the file has the tensor."""
        return name in self.file.tensors

    def __getitem__(self, name: str) -> "Weight":
        """Return a tensor's handle; nothing is read yet."""
        info = self.file.tensors[name]
        return Weight(self, info, 0, info.rows, 0, info.shape[-1])

    def block(self, index: int, slices: Mapping[str, tuple[str, int, int]], *, live: bool = False) -> "Block":
        """Return the tensors of block `index`; for `slices` see `Block`.

        `live` ones are used in sweep after sweep, and wait where `places` says.
        """
        return Block(self, f"blk.{index}.", slices, self.places[index] if live and self.places else "file")

    def place(self, places: Sequence[str], room: Mapping[str, int]) -> None:
        """Choose where live weights wait between sweeps from now on; what is kept now is given back.

        Asked for the same again, as for another prompt, it stays; what that does not use (of a mixture, which has other
        experts for it) gives way where room is short.

        Args:
            places: of each block: `"dense"` (on the device, in `dtype`), `"device"` (there, quantized), `"pinned"` (in
                RAM beside a device, quantized) or `"file"` (on a CPU, the system's page cache). See `ggjac.planner`.
            room: bytes that may be kept at each place, at most; what does not fit comes from the file.
        """
        if (list(places), dict(room)) == (self.places, self._given):
            self._earlier = {key: self.places[int(key[0].split(".")[1])] for key in (*self._tiles, *self._bytes)}
            return
        for kept in (self._tiles, self._bytes, self._earlier):
            kept.clear()
        self.places, self._given, self._room = list(places), dict(room), dict(room)
        self._pinned = Pinned(room.get("pinned", 0))

    def dequantize(
        self, info: TensorInfo, start: int, stop: int, left: int, right: int, place: str = "file"
    ) -> Float[Tensor, "rows d"]:
        """Return rows `start:stop` of columns `left:right` (on block boundaries) dense.

        Valid until the same thread calls again: two tensors cannot be streamed side by side in one thread.

        Raises:
            WeightError: the rows hold NaN or infinite scales (checked the first time they are read).
        """
        key = (info.name, start, stop, left, right)
        self._earlier.pop(key, None)
        if key in self._tiles:
            return self._tiles[key]
        shape = stop - start, right - left
        keep = place == "dense" and self._takes(place, shape[0] * shape[1] * self.dtype.itemsize)
        self.reads[info.name] += shape[0] * (shape[1] / info.shape[-1])
        self.bytes_read += shape[0] * row_bytes(info.type, shape[1])
        if self._bus is None:
            out = torch.empty(shape, dtype=self.dtype) if keep else self._scratch_tile(*shape)
            tile = quants.dequantize_rows(self._stored(key, info), info.type, out, threads=self.threads)
        else:
            tile = self._dequantized_there(self._bus, key, info, place)
        if keep:
            self._tiles[key] = tile
        return tile

    def wide(self, info: TensorInfo) -> Tensor:
        """Return a small tensor dense, in its own shape, in float32 where `dtype` is narrower.

        Raises:
            WeightError: it holds NaN or infinite values.
        """
        rows, columns = info.rows, info.shape[-1]
        self.reads[info.name] += rows
        self.bytes_read += info.nbytes
        out = torch.empty((rows, columns), dtype=torch.promote_types(self.dtype, torch.float32))
        raw = self._stored((info.name, 0, rows, 0, columns), info)
        return quants.dequantize_rows(raw, info.type, out, threads=self.threads).view(info.shape).to(self.device)

    def _takes(self, place: str, nbytes: int) -> bool:
        """Say whether a place still has room, or gets it from what an earlier prompt left, and take it."""
        while self._room.get(place, 0) < nbytes:
            key = next((key for key, where in self._earlier.items() if where == place), None)
            if key is None:
                return False
            del self._earlier[key]
            self._room[place] += (self._tiles if place == "dense" else self._bytes).pop(key).nbytes
        self._room[place] -= nbytes
        return True

    def _scratch_tile(self, rows: int, columns: int) -> Tensor:
        """Return this thread's tile; it lives as long as the thread, and only grows."""
        tile = getattr(self._scratch, "tile", None)
        if tile is None or tile.numel() < rows * columns:
            tile = self._scratch.tile = torch.empty(rows * columns, dtype=self.dtype)
        return tile[: rows * columns].view(rows, columns)

    def _stored(self, key: Key, info: TensorInfo) -> np.ndarray:
        """Return the quantized bytes of a tile, a view of the file.

        Raises:
            WeightError: they hold NaN or infinite scales.
        """
        _, start, stop, left, right = key
        raw = self.file.rows(info, start, stop)[:, row_bytes(info.type, left) : row_bytes(info.type, right)]
        if key not in self._checked:
            if quants.has_invalid_scales(raw, info.type):
                raise WeightError(
                    f"tensor {info.name} holds NaN or infinite values; the file is damaged, download it again"
                )
            self._checked.add(key)
        return raw

    def _dequantized_there(self, bus: Bus, key: Key, info: TensorInfo, place: str) -> Tensor:
        """Dequantize a tile on the device, and keep its bytes where they belong."""
        raw: Tensor | np.ndarray | None = self._bytes.get(key)
        if isinstance(raw, Tensor) and raw.device.type != "cpu":
            return quants.dequantize(raw, info.type, self.dtype)
        if raw is None:
            raw = self._stored(key, info)
            waiting = self._pinned.keep(raw) if place == "pinned" else None
            if waiting is not None:
                raw = self._bytes[key] = waiting
        with bus.sent(raw) as moved:
            if place == "device" and self._takes(place, moved.nbytes):
                self._bytes[key] = moved
            return quants.dequantize(moved, info.type, self.dtype)


@dataclass(frozen=True)
class Weight:
    """Rows `first:last` and columns `left:right` of one stored tensor: a `TiledMatrix`, or a vector (one row)."""

    store: WeightStore
    info: TensorInfo
    first: int
    last: int
    left: int
    right: int
    place: str = "file"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, `(out, in)`."""
        return self.last - self.first, self.right - self.left

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the tiles."""
        return self.store.dtype

    @property
    def device(self) -> torch.device:
        """Where the tiles live."""
        return self.store.device

    def rows(self, start: int, stop: int) -> "Weight":
        """Return a handle to rows `start:stop` of these."""
        return replace(self, first=self.first + start, last=self.first + stop)

    def columns(self, start: int, stop: int) -> "Weight":
        """Return a handle to columns `start:stop` of these; both on the boundaries of stored blocks."""
        return replace(self, left=self.left + start, right=self.left + stop)

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield `(start, stop, rows start:stop)` in order; a tile is overwritten when the next one is asked for."""
        out, columns = self.shape
        step = max(1, TILE_ELEMENTS // columns)
        for start in range(0, out, step):
            stop = min(start + step, out)
            yield start, stop, self._dequantized(start, stop)

    def read_ahead(self) -> None:
        """Ask the system to read these rows from the disk while something else is computed.

        Slabs of columns share their rows, so the first one asks for all of them.
        """
        if self.left == 0 and self.place == "file":
            self.store.file.will_need(self.info, self.first, self.last)

    def take(self, rows: Sequence[int]) -> Float[Tensor, "n d"]:
        """Return single rows, such as the embeddings of tokens."""
        return torch.cat([self._dequantized(i, i + 1).clone() for i in rows])

    def dense(self) -> Tensor:
        """Return the whole tensor in its own shape; for vectors and small matrices."""
        whole = self._dequantized(0, self.last - self.first).clone()
        return whole[0] if len(self.info.shape) == 1 else whole

    def _dequantized(self, start: int, stop: int) -> Tensor:
        rows = self.first + start, self.first + stop
        return self.store.dequantize(self.info, *rows, self.left, self.right, self.place)


@dataclass(frozen=True)
class Block:
    """The tensors of one block by their short names, such as `attn_q.weight`.

    `slices` maps a stem to `(fused stem, start, stop)`: where the file fuses tensors, their parts still answer to their
    own names, so that nothing above this class sees the fused layout.
    """

    store: WeightStore
    prefix: str
    slices: Mapping[str, tuple[str, int, int]]
    place: str = "file"

    def __contains__(self, name: str) -> bool:
        """Say whether the file has the tensor, alone or inside a fused one."""
        return self._locate(name)[0] in self.store

    def matrix(self, name: str, expert: int | None = None) -> Weight:
        """Return a matrix to be streamed; of a stack of experts `[e, out, in]`, one."""
        stored, start, stop = self._locate(name)
        weight = replace(self.store[stored], place=self.place)
        if expert is not None:
            out = weight.info.shape[1]
            return weight.rows(expert * out, (expert + 1) * out)
        return weight.rows(start, stop) if stop else weight

    def read_ahead(self) -> None:
        """Ask the system to read the whole block, but not stacks of experts: only the router knows which."""
        for info in self.store.file.tensors.values():
            if info.name.startswith(self.prefix) and len(info.shape) < 3:
                self.store.file.will_need(info)

    def vector(self, name: str, expert: int | None = None) -> Tensor:
        """Return a vector, dense; of a stack of experts `[e, out]`, one row."""
        stored, start, stop = self._locate(name)
        weight = self.store[stored]
        if expert is not None:
            return weight.rows(expert, expert + 1).dense()[0]
        return weight.dense()[start : stop or None]

    def wide_vector(self, name: str) -> Tensor:
        """Return a small tensor in float32 at least, dense; none of the fused ones."""
        return self.store.wide(self.store.file.tensors[self.prefix + name])

    def _locate(self, name: str) -> tuple[str, int, int]:
        """Return the stored tensor and the rows (elements of a vector) of it; a stop of 0 means all."""
        stem, suffix = name.rsplit(".", 1)
        fused, start, stop = self.slices.get(stem, ("", 0, 0))
        if fused and f"{self.prefix}{fused}.{suffix}" in self.store:
            return f"{self.prefix}{fused}.{suffix}", start, stop
        return self.prefix + name, 0, 0
