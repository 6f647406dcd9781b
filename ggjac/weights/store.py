"""The tensors of one model file as matrices that are dequantized a few rows at a time, on any device and in any dtype.

Bytes stay quantized in the mapped file and on their way to the device; a dense tile lives until the next one is
requested. `WeightStore.reads` counts the rows dequantized (parts of rows as fractions), so that a test can hold a sweep
to one pass.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from greenlet import getcurrent
from jaxtyping import Float, Int
from torch import Tensor

from ggjac import quants
from ggjac.gguf import GGUFFile, TensorInfo
from ggjac.gguf.types import possible, row_bytes
from ggjac.sizes import EXPERTS_OF_TOKENS, SMALL_PIECES, Part, Pieces
from ggjac.weights.bus import Bus
from ggjac.weights.cache import Cache, Key, Section
from ggjac.weights.holes import VOCABULARY, Holes
from ggjac.weights.in_step import Found, Readers, Wish, in_step

Operator = TypeVar("Operator")


class WeightError(ValueError):
    """A tensor's type is not supported, or it contains NaN or infinite values."""


class WeightStore:
    """All tensors of a GGUF file, dequantized on demand.

    Args:
        file: the open container.
        device: of the tiles; other than the CPU it receives quantized bytes and dequantizes them itself.
        dtype: of the tiles.
        threads: for dequantization on the CPU.

    Attributes:
        reads: rows dequantized, by tensor.
        bytes_read: quantized bytes dequantized.
        places: where the weights of each block are kept between sweeps; see `place`.
        cache: the weights that are kept.
        pieces: sizes of tiles and of slabs.
        holes: rows of zeros among the weights that were read.
        invalid: rows of the vocabulary's matrices that hold NaN or infinite values, of those that were read, by tensor.
            A token that no text has must not stop everything.
        readers: of computations in step (`ggjac.weights.in_step`), how each asks for a tile and waits for it.
    """

    def __init__(self, file: GGUFFile, *, device: torch.device, dtype: torch.dtype, threads: int):
        for info in file.tensors.values():
            known = possible(info.name)
            table = info.name.endswith(EXPERTS_OF_TOKENS)
            if info.type.name not in known or not (table or quants.supported(info.type)):
                supported = ", ".join(known)
                raise WeightError(f"tensor {info.name}: type {info.type.name} is not supported; supported: {supported}")
        self.file, self.device, self.dtype, self.threads = file, device, dtype, threads
        self.reads: dict[str, float] = defaultdict(int)
        self.bytes_read = 0
        self.places: list[str] = []
        self.cache = Cache({})
        self.pieces = SMALL_PIECES
        self._bus = None if device.type == "cpu" else Bus(device)
        self.holes = Holes(file.metadata)
        self.invalid: dict[str, set[int]] = defaultdict(set)
        self.readers: Readers = {}
        self._checked: set[Key] = set()
        self._gains: dict[str, list[float]] = {}
        self._scratch = threading.local()  # one tile per thread on the CPU, reused so that its pages are touched once

    def __contains__(self, name: str) -> bool:
        """Return whether the file has the tensor."""
        return name in self.file.tensors

    def __getitem__(self, name: str) -> "Weight":
        """Return a tensor's handle; nothing is read yet."""
        info = self.file.tensors[name]
        return Weight(self, info, 0, info.rows, 0, info.shape[-1])

    def block(
        self,
        index: int,
        slices: Mapping[str, Part],
        *,
        prefix: str | None = None,
        live: bool = False,
        rounding: torch.dtype | None = None,
    ) -> "Block":
        """Return the tensors of block `index`; for `slices` and `rounding` see `Block`.

        Their names begin with `prefix`, by default with the block's number.

        With `live` they are used in every sweep, and kept where `places` says.
        """
        place = self.places[index] if live and self.places else "file"
        return Block(self, prefix or f"blk.{index}.", slices, place, rounding)

    def check_unchanged(self) -> None:
        """Refuse to go on if the file was changed by another program, as `GGUFFile.check_unchanged` says."""
        self.file.check_unchanged()

    def place(self, places: Sequence[str], room: Mapping[str, int], pieces: Pieces = SMALL_PIECES) -> None:
        """Choose where the weights of live blocks are kept between sweeps, and release those kept so far.

        Calling it again with equal arguments, as for another prompt, keeps what is cached; entries unused since then
        are evicted first.

        Args:
            places: of each block: `"dense"` (on the device, in `dtype`), `"device"` (there, quantized), `"pinned"` (in
                RAM, quantized, for a device) or `"file"` (not kept; the system's page cache). See `ggjac.planner`.
            room: bytes that may be kept at each place; weights that do not fit are read from the file.
            pieces: sizes of tiles and of slabs from now on, in all passes.
        """
        if (list(places), dict(room), pieces) == (self.places, self.cache.room, self.pieces):
            self.cache.age()
        else:
            self.places, self.cache, self.pieces = list(places), Cache(room), pieces

    def dequantize(
        self, key: Key, place: str = "file", *, forgiving: bool = False, rounding: torch.dtype | None = None
    ) -> Float[Tensor, "rows d"]:
        """Return a tile dense; its columns must lie on block boundaries. It is kept at `place` if there is room.

        `rounding` is the dtype of the tile, default the store's own, in which it is kept where it is kept dense.

        Valid until the same thread calls again: two tensors cannot be streamed side by side in one thread.

        Raises:
            WeightError: the rows hold NaN or infinite scales (checked the first time they are read), and the caller is
                not `forgiving`: then they are zeros, and `invalid` has them.
        """
        kept, dtype = self.cache.get(key), rounding or self.dtype
        if kept and kept.place == "dense":
            return self._rounded(kept.tensor, dtype)
        if (wait := self.readers.get(getcurrent())) is not None:
            return wait(Wish(key, place, forgiving, rounding))
        info, shape = self.file.tensors[key.name], key.shape
        keep = place == "dense" and self.cache.reserve(place, shape[0] * shape[1] * self.dtype.itemsize)
        self.reads[key.name] += shape[0] * (shape[1] / info.shape[-1])
        self.bytes_read += shape[0] * row_bytes(info.type, shape[1])
        dense = self.dtype if keep else dtype
        if self._bus is None:
            out = torch.empty(shape, dtype=dense) if keep else self._scratch_tile(*shape, dense)
            tile = quants.dequantize_rows(self._stored(key, info, forgiving), info.type, out, threads=self.threads)
        elif kept and kept.place == "device":
            tile = quants.dequantize(kept.tensor, info.type, dense)
        else:
            raw = kept.tensor if kept else self._stored(key, info, forgiving)
            tile = self._sent_and_dequantized(self._bus, key, info, raw, place, dense)
        if invalid := [row - key.start for row in self.invalid.get(key.name, ()) if key.start <= row < key.stop]:
            tile[invalid] = 0
        if keep:
            self.cache.keep(key, place, tile)
        return self._rounded(tile, dtype)

    def in_step(self, runs: Sequence[Callable[[], Found]]) -> list[Found]:
        """Run computations on these weights side by side; see `ggjac.weights.in_step`."""

        def dequantize(wish: Wish) -> Tensor:
            return self.dequantize(wish.key, wish.place, forgiving=wish.forgiving, rounding=wish.rounding)

        return in_step(self.readers, runs, dequantize, lambda name: self.file.tensors[name].shape)

    def warning(self) -> str | None:
        """Return one line about what a trained model does not have, among the weights that were read; or None."""
        if not self.invalid:
            return self.holes.warning()
        name, rows = next(iter(self.invalid.items()))
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        return (
            f"{name}: NaN or infinite values in row {min(rows)}{more} of {self.file.tensors[name].rows}, which count "
            "as zeros or as the least likely tokens: the quantization is broken, take another file of the model"
        )

    def wide(self, info: TensorInfo) -> Tensor:
        """Return a small tensor dense, in its own shape, in float32 where `dtype` is narrower.

        Raises:
            WeightError: it holds NaN or infinite values.
        """
        self.reads[info.name] += info.rows
        self.bytes_read += info.nbytes
        return self._wide(info).to(self.device)

    def gain(self, name: str, expert: int | None = None) -> float:
        """Return the constant factor of the matrix `name`, or of one in a stack of experts; 1 if the file has none.

        It is the tensor `STEM.scale`, or `STEM.weight.scale` as some converters write, with one element or, for a
        stack, with one for each expert. (Of another size it has a meaning of its own.) It is read once, and not counted
        in `reads`.
        """
        stem = name.removesuffix(".weight")
        stored = next((own for own in (f"{stem}.scale", f"{stem}.weight.scale") if own in self), None)
        if stored is None:
            return 1.0
        if stored not in self._gains:
            self._gains[stored] = self._wide(self.file.tensors[stored]).flatten().tolist()
        gains = self._gains[stored]
        if len(gains) == 1:
            return gains[0]
        return 1.0 if expert is None else gains[expert]

    def table(self, name: str, rows: Sequence[int]) -> Int[Tensor, "n e"]:
        """Return rows of a table of integers, on the host; they are not counted in `reads`."""
        raw = np.concatenate([self.file.rows(name, row, row + 1) for row in rows])
        return torch.from_numpy(raw.view("<i4").astype(np.int64))

    def _wide(self, info: TensorInfo) -> Tensor:
        """Return a small tensor on the CPU, in its own shape, in float32 where `dtype` is narrower."""
        rows, columns = info.rows, info.shape[-1]
        out = torch.empty((rows, columns), dtype=torch.promote_types(self.dtype, torch.float32))
        raw = self._stored(Key(info.name, 0, rows, 0, columns), info)
        return quants.dequantize_rows(raw, info.type, out, threads=self.threads).view(info.shape)

    def _rounded(self, tile: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tile in a dtype; on the CPU in this thread's scratch memory, if it is of another one."""
        if tile.dtype == dtype or self._bus is not None:
            return tile.to(dtype)
        rows, columns = tile.shape
        return self._scratch_tile(rows, columns, dtype).copy_(tile)

    def _scratch_tile(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return this thread's tile; its memory lives as long as the thread, and only grows."""
        nbytes = rows * columns * dtype.itemsize
        tile = getattr(self._scratch, "tile", None)
        if tile is None or len(tile) < nbytes:
            tile = self._scratch.tile = torch.empty(nbytes, dtype=torch.uint8)
        return tile[:nbytes].view(dtype).view(rows, columns)

    def _stored(self, key: Key, info: TensorInfo, forgiving: bool = False) -> np.ndarray:
        """Return the quantized bytes of a tile: a view of the file, or a copy if they are not consecutive.

        Raises:
            WeightError: they hold NaN or infinite scales, and the caller is not `forgiving`.
        """
        columns = slice(row_bytes(info.type, key.left), row_bytes(info.type, key.right))
        runs = [self.file.rows(info, start, stop)[:, columns] for start, stop in key.runs]
        raw = runs[0] if len(runs) == 1 else np.concatenate(runs)
        if key not in self._checked:
            invalid = _invalid_rows(key, info, raw)
            if invalid and not forgiving:
                raise WeightError(
                    f"tensor {info.name} holds NaN or infinite values{_where(info, invalid[0])}: it was quantized or "
                    "converted wrongly; downloading it again does not help, take another file of the model"
                )
            if invalid:
                self.invalid[info.name].update(invalid)
                return raw
            for (start, _), run in zip(key.runs, runs, strict=True):
                self.holes.look(info, run, start)
            self._checked.add(key)
        return raw

    def _sent_and_dequantized(
        self, bus: Bus, key: Key, info: TensorInfo, raw: Tensor | np.ndarray, place: str, dtype: torch.dtype
    ) -> Float[Tensor, "rows d"]:
        """Copy a tile's bytes to the device, from pinned memory or the file, and dequantize them there."""
        if isinstance(raw, np.ndarray) and place == "pinned" and (copy := self.cache.pin(key, raw)) is not None:
            raw = copy
        with bus.sent(raw) as moved:
            if place == "device" and self.cache.reserve(place, moved.nbytes):
                self.cache.keep(key, place, moved)
            return quants.dequantize(moved, info.type, dtype)


@dataclass(frozen=True)
class Weight:
    """Rows `first:last` and columns `left:right` of a stored tensor: a `TiledMatrix`, or a vector as one row.

    With a section, the rows are counted in that. `rounding` is the dtype of the tiles, default the store's own. `edge`
    is the first column of the matrix of which these may be a slab.
    """

    store: WeightStore
    info: TensorInfo
    first: int
    last: int
    left: int
    right: int
    place: str = "file"
    section: Section | None = None
    rounding: torch.dtype | None = None
    edge: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, `(out, in)`."""
        return self.last - self.first, self.right - self.left

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the tiles."""
        return self.rounding or self.store.dtype

    @property
    def device(self) -> torch.device:
        """Device of the tiles."""
        return self.store.device

    def rows(self, start: int, stop: int) -> "Weight":
        """Return a handle to rows `start:stop` of these."""
        return replace(self, first=self.first + start, last=self.first + stop)

    def columns(self, start: int, stop: int) -> "Weight":
        """Return a handle to columns `start:stop` of these; both on boundaries of stored blocks."""
        return replace(self, left=self.left + start, right=self.left + stop)

    def part(self, part: Part) -> "Weight":
        """Return a handle to a part of these rows."""
        if not part.period:
            return self.rows(part.start, part.stop)
        section = Section(self.first + part.start, part.stop - part.start, part.period)
        return replace(self, first=0, last=part.rows(self.shape[0]), section=section)

    @property
    def invalid(self) -> list[int]:
        """Those of these rows, among those read, that hold NaN or infinite values and were read as zeros."""
        return sorted(row for row in self.store.invalid.get(self.info.name, ()) if self.first <= row < self.last)

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield `(start, stop, rows start:stop)` in order; each tile is overwritten by the next.

        Rows of the vocabulary's matrices that hold NaN or infinite values are zeros; see `WeightStore.invalid`.
        """
        out, columns = self.shape
        step = max(1, self.store.pieces.tile // columns)
        for start in range(0, out, step):
            stop = min(start + step, out)
            yield start, stop, self._dequantized(start, stop, forgiving=self.info.name in VOCABULARY)

    def read_ahead(self) -> None:
        """Ask the system to read these rows from the disk in the background.

        Slabs of columns share their rows, so that the first one requests all of them.
        """
        if self.left == self.edge and self.place == "file":
            for start, stop in self._key(0, self.shape[0]).runs:
                self.store.file.will_need(self.info, start, stop)

    def take(self, rows: Sequence[int]) -> Float[Tensor, "n d"]:
        """Return single rows, for example the embeddings of tokens."""
        return torch.cat([self._dequantized(i, i + 1).clone() for i in rows])

    def dense(self) -> Tensor:
        """Return the whole tensor in its own shape; for vectors and small matrices."""
        whole = self._dequantized(0, self.last - self.first).clone()
        return whole[0] if len(self.info.shape) == 1 else whole

    def _dequantized(self, start: int, stop: int, *, forgiving: bool = False) -> Tensor:
        return self.store.dequantize(self._key(start, stop), self.place, forgiving=forgiving, rounding=self.rounding)

    def _key(self, start: int, stop: int) -> Key:
        return Key(self.info.name, self.first + start, self.first + stop, self.left, self.right, self.section)


@dataclass(frozen=True)
class Block:
    """The tensors of one block by their short names, such as `attn_q.weight`.

    Parts of fused tensors, `slices`, are available under their own names, so that callers never see the fused layout.
    `rounding` is the dtype of the tiles of matrices, default the store's own; vectors are not rounded.
    """

    store: WeightStore
    prefix: str
    slices: Mapping[str, Part]
    place: str = "file"
    rounding: torch.dtype | None = None

    @property
    def slab(self) -> int:
        """Hidden units of a feed-forward network that exist at a time."""
        return self.store.pieces.slab

    @property
    def outside(self) -> "Block":
        """The tensors that belong to no block, which are not kept between sweeps."""
        return Block(self.store, "", {}, rounding=self.rounding)

    def __contains__(self, name: str) -> bool:
        """Return whether the file has the tensor, alone or inside a fused one."""
        return self._stored(name)[0] in self.store

    def matrix(self, name: str, expert: int | None = None) -> Weight:
        """Return a matrix to be streamed, or one of a stack of experts `[e, out, in]`."""
        stored, part = self._stored(name)
        weight = replace(self.store[stored], place=self.place, rounding=self.rounding)
        if expert is not None:
            out = weight.info.shape[1]
            weight = weight.rows(expert * out, (expert + 1) * out)
        return weight if part is None else weight.part(part)

    def gain(self, name: str, expert: int | None = None) -> float:
        """Return the constant factor of a matrix; of a part of a fused one, that of the whole."""
        return self.store.gain(self._stored(name)[0], expert)

    def read_ahead(self) -> None:
        """Ask the system to read the whole block except stacks of experts, of which the router chooses only some."""
        for info in self.store.file.tensors.values():
            if info.name.startswith(self.prefix) and len(info.shape) < 3:
                self.store.file.will_need(info)

    def vector(self, name: str, expert: int | None = None) -> Tensor:
        """Return a vector, dense, or one row of a stack of experts `[e, out]`."""
        stored, part = self._stored(name)
        weight = self.store[stored]
        if part is not None and expert is None and len(weight.info.shape) > 1:
            return weight.part(part).dense()
        whole = weight.dense() if expert is None else weight.rows(expert, expert + 1).dense()[0]
        if part is None:
            return whole
        return whole.unflatten(0, (-1, part.period or len(whole)))[:, part.start : part.stop].flatten(0, 1)

    def wide_vector(self, name: str) -> Tensor:
        """Return a small tensor dense, in float32 or wider; it must not be part of a fused one."""
        return self.store.wide(self.store.file.tensors[self.prefix + name])

    def shares(self, stem: str) -> bool:
        """Return whether others have more terms of a sum: these are all of the weights."""
        return False

    def holds(self, expert: int) -> bool:
        """Return whether an expert is among these weights: all are."""
        return True

    def agreed(self, found: Tensor) -> Tensor:
        """Return a choice as it is: nobody else makes it."""
        return found

    def joined(self, part: Operator, *, inputs: bool = True, outputs: bool = True) -> Operator:
        """Return an operator as it is, since nobody has more of its terms."""
        return part

    def gathered(self, own: Tensor, stem: str) -> Tensor:
        """Return numbers of each head as they are: they are of all heads."""
        return own

    def _stored(self, name: str) -> tuple[str, Part | None]:
        """Return the full name of the stored tensor, and the part of it that is `name`, or None for the whole."""
        stem, dot, suffix = name.rpartition(".")
        part = self.slices.get(stem) if dot else None
        if part and (stored := f"{self.prefix}{part.stem}.{suffix}") in self.store:
            return stored, part
        return self.prefix + name, None


def _invalid_rows(key: Key, info: TensorInfo, raw: np.ndarray) -> list[int]:
    """Return the rows of a tensor, among those of a tile, that hold NaN or infinite scales."""
    if not quants.has_invalid_scales(raw, info.type):
        return []
    rows = (row for start, stop in key.runs for row in range(start, stop))
    return [row for row, one in zip(rows, raw, strict=True) if quants.has_invalid_scales(one[None], info.type)]


def _where(info: TensorInfo, row: int) -> str:
    """Return where in a tensor a row is, for a message; nothing for a vector."""
    if len(info.shape) == 1:
        return ""
    if len(info.shape) == 2:
        return f" in row {row}"
    expert, row = divmod(row, info.shape[-2])
    return f" in row {row} of expert {expert}"
