"""Directions from files: one vector of a tensor in a safetensors, npy or GGUF file, such as a probe's weight.

A direction is written `FILE`, or `FILE:NAME` where the file has several tensors, or `FILE:NAME[INDEX]` where the tensor
has several vectors: `svd.safetensors:U[0]`, `sae.safetensors:W_enc[:,123]` (a column), `probe.npy:[3]`,
`model.gguf:blk.3.ffn_up.weight[17]` (what a neuron reads), `model.gguf:output.weight[412]` (a row of the head).
`NAME[412]-[97]` is the difference of two vectors of a tensor. In a control vector of llama.cpp, `direction.N` is added
to the output of block `N`, counted from 0; without a name, its only direction that is not zero is meant.

Files come from strangers: nothing is unpickled, and no more than the one vector is read.
"""

import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ggjac import quants, runs
from ggjac.checks import computed
from ggjac.gguf import GGUFError, GGUFFile, open_gguf, shown

# Names in a message.
LISTED = 6
# The tensors of a control vector, by the block to whose output they are added.
CONTROL = re.compile(r"direction\.([0-9]{1,9})")

_NAME = re.compile(r"(?P<tensor>.*?)(?:\[(?P<index>[^\[\]]*)\])?", re.DOTALL)
_DIFFERENCE = re.compile(r"(?P<tensor>.*?)(?P<first>\[[^\[\]]*\])-(?P<second>\[[^\[\]]*\])", re.DOTALL)
_INDEX = re.compile(r"\s*(?::|-?[0-9]{1,18})\s*", re.ASCII)
_OTHERS = {  # first bytes of other files -> what they are
    b"PK\x03\x04": "a zip archive, such as an npz file or a PyTorch checkpoint",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}
_SAVE = "save the vector as safetensors (safetensors.torch.save_file) or npy (numpy.save)"


class DirectionError(ValueError):
    """A direction that cannot be read from a file, or does not fit; the message is one line."""


class Direction(NamedTuple):
    """A vector that reads another one, and what it is.

    Attributes:
        vector: `[d]`, on the CPU; finite and not zero. From a file, in float64.
        kind: `"file"`; `"given"`, by a program; `"entropy"`, the gradient of the next token's; `"fisher"`, an
            eigenvector of its Fisher information.
        file: path as it was given, or empty.
        name: of the tensor, with the index of the vector in it; empty for the only one of an npy file.
        layer: of a control vector, the number of blocks after which llama.cpp adds it; else None.
        facts: numbers about it, by name.
    """

    vector: Float[Tensor, " d"]
    kind: Literal["file", "given", "entropy", "fisher"] = "given"
    file: str = ""
    name: str = ""
    layer: int | None = None
    facts: Mapping[str, float] = MappingProxyType({})

    @property
    def norm(self) -> float:
        """Its length."""
        return float(self.vector.double().norm())

    @property
    def source(self) -> str:
        """Where it is from, as `FILE:NAME`; empty if nothing is known of that."""
        return ":".join(part for part in (self.file, self.name) if part)

    def checked(self, sizes: Collection[int], dtype: torch.dtype = torch.float64) -> Float[Tensor, " d"]:
        """Return its vector in a dtype, on the CPU.

        Raises:
            DirectionError: it is not one vector of any of these numbers of elements; or it, or its length squared, is
                zero or not finite in the dtype (of squares, at least float32).
        """
        if self.vector.dim() != 1 or len(self.vector) not in sizes:
            raise DirectionError(
                f"the direction has shape {list(self.vector.shape)}; it must have "
                f"{' or '.join(map(str, sorted(sizes)))} elements, as the vectors there"
            )
        found = self.vector.detach().cpu().to(dtype)
        squared = float(found.to(torch.promote_types(dtype, torch.float32)).square().sum())
        if not (found.isfinite().all() and 0 < squared < math.inf):
            name = str(dtype).removeprefix("torch.")
            raise DirectionError(
                f"the direction, or its length squared, is zero or not finite in {name}; give another one, or a wider "
                "dtype"
            )
        return found

    def data(self) -> dict[str, Any]:
        """Return it as plain data, without its elements."""
        names = {key: getattr(self, key) for key in ("file", "name") if getattr(self, key)}
        return {"kind": self.kind, **names, "norm": self.norm, **self.facts}


class _Stored(NamedTuple):
    """A tensor in a file: its shape, the name of its type, and a function that reads one vector along an axis."""

    shape: tuple[int, ...]
    kind: str  # one of `ggjac.quants.FORMATS` if it is read
    read: Callable[[int, Sequence[int]], Tensor]  # (axis, index of all other axes) -> its elements


def read_direction(asked: str, sizes: Sequence[int] | None = None, *, layer: int | None = None) -> Direction:
    """Read a direction as `FILE`, `FILE:NAME`, `FILE:NAME[INDEX]` or `FILE:NAME[INDEX]-[INDEX]`; see the module.

    Args:
        asked: where it is.
        sizes: the numbers of elements that fit; default all.
        layer: of a control vector whose name is left open, the number of blocks after which it is added; default that
            of its only direction that is not zero.

    Raises:
        DirectionError: there is no such file, tensor or vector; it does not fit; or it is zero or not finite.
    """
    file, name = _apart(asked)
    with _opened(file) as tensors:
        controls = {name: int(found[1]) for name in tensors if (found := CONTROL.fullmatch(name))}
        if not name:
            name = _only(file, tensors, controls, sizes, layer)
        vector = _named(file, tensors, name, sizes)
    if not vector.isfinite().all():
        raise DirectionError(f"{_at(file, name)}: has elements that are not finite; give another vector")
    if not vector.any():
        raise DirectionError(f"{_at(file, name)}: is zero, which is no direction; give another vector")
    block = controls.get(name)
    return Direction(vector, "file", file, name, None if block is None else block + 1)


def own_depth(asked: str) -> int | None:
    """Return the number of blocks after which a control vector is added; None of any other direction.

    Raises:
        DirectionError: as of `read_direction`.
    """
    return None if computed(asked) is not None else read_direction(asked).layer


def located(asked: str) -> str:
    """Return how a direction is written from any folder: with the absolute path of its file.

    Raises:
        DirectionError: there is no file.
    """
    file, name = _apart(asked)
    return os.path.abspath(file) + (f":{name}" if name else "")


def _apart(asked: str) -> tuple[str, str]:
    """Split `FILE:NAME` at the last colon before which there is a file: paths have colons too.

    Raises:
        DirectionError: there is no file.
    """
    ends = [len(asked), *(i for i in range(len(asked) - 1, 0, -1) if asked[i] == ":")]
    for end in ends[:64]:
        if os.path.isfile(asked[:end]):
            return asked[:end], asked[end + 1 :]
    for end in ends[:64]:
        if os.path.isdir(asked[:end]):
            raise DirectionError(f"{shown(asked[:end])}: is a folder; name a file, as FILE or FILE:NAME")
    index = asked.find("[")
    if index > 0 and os.path.isfile(asked[:index]):
        raise DirectionError(f"{shown(asked)}: no such file; a vector of {shown(asked[:index])} is written "
                             f"{shown(f'{asked[:index]}:{asked[index:]}')}")  # fmt: skip
    if re.fullmatch(r"(left|right):[0-9]+", asked, re.ASCII):
        raise DirectionError(f"{asked}: no such file; singular vectors are directions of steer alone: save them "
                             "(svd -o FILE), and name one, as FILE:U[0]")  # fmt: skip
    if re.fullmatch("fisher(:.*)?", asked, re.DOTALL):
        raise DirectionError(f"{shown(asked)}: no such file; Fisher directions are counted from 1, as fisher:1")
    raise DirectionError(f"{shown(asked)}: no such file; name one, as FILE or FILE:NAME")


@contextmanager
def _opened(file: str) -> Iterator[Mapping[str, _Stored]]:
    """Open a file by its first bytes and yield its tensors.

    Raises:
        DirectionError: it is none of the three formats, or damaged.
    """
    try:
        with open(file, "rb") as opened:
            start = opened.read(8)
        for magic, what in _OTHERS.items():
            if start.startswith(magic):
                raise DirectionError(f"{shown(file)}: is {what}, which is not read; {_SAVE}")
        if start.startswith(b"GGUF"):
            with open_gguf(file) as container:
                yield {name: _of_gguf(container, name) for name in container.tensors}
        elif start.startswith(b"\x93NUMPY"):
            yield {"": _of_array(_mapped(file))}
        else:
            with safe_open(file, "pt") as container:
                yield {name: _of_safetensors(container, name) for name in container.keys()}  # noqa: SIM118
    except DirectionError:
        raise
    except GGUFError as error:
        raise DirectionError(str(error)) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise DirectionError(
            f"{shown(file)}: cannot be read as safetensors, npy or GGUF ({runs.one_line(error)}); {_SAVE}"
        ) from error


def _mapped(file: str) -> np.ndarray:
    """Map the array of an npy file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or has objects.
    """
    try:
        with np.errstate(over="ignore"):  # of a shape that claims too much; the map is then too short for it
            return np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # NumPy parses the header as Python, which raises whatever it likes
        raise ValueError(runs.one_line(error)) from error


def _of_safetensors(container: Any, name: str) -> _Stored:
    part = container.get_slice(name)

    def read(axis: int, index: Sequence[int]) -> Tensor:
        where = [slice(i, i + 1) for i in index]
        where.insert(axis, slice(None))
        return part[tuple(where)].flatten().double()

    return _Stored(tuple(part.get_shape()), part.get_dtype(), read)


def _of_array(array: np.ndarray) -> _Stored:
    def read(axis: int, index: Sequence[int]) -> Tensor:
        where: list[Any] = list(index)
        where.insert(axis, slice(None))
        return torch.from_numpy(array[tuple(where)].astype(np.float64))

    kind = f"F{8 * array.dtype.itemsize}" if array.dtype.kind == "f" else str(array.dtype)
    return _Stored(array.shape, kind, read)


def _of_gguf(container: GGUFFile, name: str) -> _Stored:
    info = container.tensors[name]

    def read(axis: int, index: Sequence[int]) -> Tensor:
        strides = [math.prod(info.shape[i + 1 : -1]) for i in range(len(info.shape) - 1)]
        if axis == len(info.shape) - 1:
            rows = [sum(map(math.prod, zip(index, strides, strict=True)))]
        else:
            rest = strides[:axis] + strides[axis + 1 :]
            first = sum(map(math.prod, zip(index[:-1], rest, strict=True)))
            rows = [first + j * strides[axis] for j in range(info.shape[axis])]
        found = [quants.dequantize_rows(container.rows(info, row, row + 1), info.type)[0] for row in rows]
        return (found[0] if len(found) == 1 else torch.stack([row[index[-1]] for row in found])).double()

    return _Stored(info.shape, info.type.name, read)


def _only(
    file: str,
    tensors: Mapping[str, _Stored],
    controls: Mapping[str, int],
    sizes: Sequence[int] | None,
    layer: int | None,
) -> str:
    """Return the name of the tensor that is meant where none is given.

    Raises:
        DirectionError: there are several.
    """
    if len(tensors) == 1:
        return next(iter(tensors))
    if not tensors:
        raise DirectionError(f"{shown(file)}: has no tensors; {_SAVE}")
    if not controls:
        raise DirectionError(f"{shown(file)}: has {len(tensors)} tensors; name one, as FILE:NAME: {_some(tensors)}")
    full = [name for name in controls if bool(_vector(file, tensors, name, sizes).any())]
    meant = [name for name in full if controls[name] + 1 == layer] or full
    if len(meant) != 1:
        found = f"{len(full)} directions that are not zero" if full else "no direction that is not zero"
        raise DirectionError(f"{shown(file)}: has {found}; name one, as FILE:direction.N: {_some(tensors, full)}")
    return meant[0]


def _named(file: str, tensors: Mapping[str, _Stored], name: str, sizes: Sequence[int] | None) -> Tensor:
    """Read the vector of a name, or the difference of two of a tensor.

    Raises:
        DirectionError: as of `_vector`; or the two are of different axes.
    """
    match = None if name in tensors else _DIFFERENCE.fullmatch(name)
    if match is None:
        return _vector(file, tensors, name, sizes)
    first, second = (_vector(file, tensors, match["tensor"] + match[part], sizes) for part in ("first", "second"))
    if len(first) != len(second):
        raise DirectionError(
            f"{_at(file, name)}: has {len(first)} and {len(second)} elements; give vectors of one axis"
        )
    return first - second


def _vector(file: str, tensors: Mapping[str, _Stored], name: str, sizes: Sequence[int] | None) -> Tensor:
    """Read the vector of a name, or refuse it before anything is read.

    Raises:
        DirectionError: there is no such tensor or vector, it is not of floating-point numbers, or it does not fit.
    """
    match = None if name in tensors else _NAME.fullmatch(name)
    tensor, text = (match["tensor"], match["index"]) if match else (name, None)
    stored = tensors.get(tensor)

    def refuse(problem: str) -> NoReturn:
        raise DirectionError(f"{_at(file, name)}: {problem}")

    if stored is None:
        refuse(f"no such tensor; there are {len(tensors)}: {_some(tensors)}")
    if stored.kind not in quants.FORMATS:
        refuse(f"is of type {stored.kind}; a direction has F64, F32, F16 or BF16")
    shape, index = stored.shape, _indices(text)
    if index is None or len(index) > len(shape):
        refuse(f"cannot be looked up in shape {list(shape)}; write the vector as {_example(tensor, shape)}")
    index += [None] * (len(shape) - len(index))
    for i, size in zip(index, shape, strict=True):
        if i is not None and not -size <= i < size:
            refuse(f"index {i} is out of range in shape {list(shape)}")
    # Axes of one element need no index.
    index = [0 if i is None and size == 1 else i for i, size in zip(index, shape, strict=True)]
    if index.count(None) != 1:
        many = index.count(None)
        if not many:
            refuse("is a single number; a direction is a vector")
        refuse(f"shape {list(shape)} leaves {many} axes; choose one vector, as {_example(tensor, shape)}")
    axis = index.index(None)
    if sizes is not None and shape[axis] not in sizes:
        refuse(f"has {shape[axis]} elements, and the model's vectors there have {' or '.join(map(str, sizes))}")
    return stored.read(axis, [i % size for i, size in zip(index, shape, strict=True) if i is not None])


def _indices(text: str | None) -> list[int | None] | None:
    """Return an index for each of the first axes, or None where the vector lies; None if the text is not such."""
    if text is None:
        return []
    parts = text.split(",")
    if not all(map(_INDEX.fullmatch, parts)):
        return None
    return [None if ":" in part else int(part) for part in parts]


def _example(name: str, shape: Sequence[int]) -> str:
    """Return how the first vector of a tensor is written."""
    return shown(f"{name}[{','.join(['0'] * max(1, len(shape) - 1))}]")


def _at(file: str, name: str) -> str:
    return shown(f"{file}:{name}" if name else file)


def _some(tensors: Mapping[str, _Stored], names: Sequence[str] | None = None) -> str:
    """Return the first names of several, with their shapes, for a message."""
    names = list(tensors if names is None else names)
    first = [f"{shown(name)} {list(tensors[name].shape)}" for name in names[:LISTED]]
    return ", ".join(first) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
