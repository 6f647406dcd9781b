"""A device that exists in this file only: its tensors hold CPU ones, so that every operation gives the CPU's own bits.

What real devices punish is punished here as well, or counted:

- an operand on the CPU beside one on the card, and NumPy on a tensor of the card, raise;
- a copy on another stream takes place when somebody waits for that stream, and until then its target holds 0xAB; what
  came of another stream and is used without `record_stream` raises;
- bytes that live on the card and in pinned memory are counted, pinned ones rounded up as torch's allocator does, and
  bytes that were copied beside the computing;
- how many such copies the host has asked for since the last one that it has waited for is `lead`;
- what makes the host wait for all that the card has to do is counted in `waits`, by operator;
- dtypes and operators that some devices lack can be refused.

It is no GPU: nothing runs at the same time, and of speed it says nothing.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "card"
aten = torch.ops.aten
# A device takes these from both sides, or takes CPU indices.
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
MIXING = {aten._to_copy.default, aten.copy_.default, *INDEXING}
# The host waits for these: it needs a number, or the size of the result.
WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "repeat_interleave"}


class Card:
    """What the card has seen since `reset`."""

    def __init__(self) -> None:
        self.default = self.current = Stream()
        self.reset()

    def reset(self) -> None:
        self.refused: set[Any] = set()
        self.memory = 1 << 30
        self.held = self.peak = self.pinned = self.pinned_peak = 0
        self.copied = self.copies = self.waited_for = self.lead = 0
        self.waits: Counter[str] = Counter()
        self.here: dict[int, list[int]] = {}  # storage -> tensors that hold it, bytes


class Stream:
    """Work that is put off until somebody waits for it; on the default stream nothing is."""

    def __init__(self, device: object = None):
        self.waiting: list[Callable[[], None]] = []

    def synchronize(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()

    def wait_stream(self, other: "Stream") -> None:
        other.synchronize()


class Event:
    """Remembers how many copies had been asked for when it was recorded."""

    def record(self, stream: Stream | None = None) -> None:
        self.copies = CARD.copies

    def synchronize(self) -> None:
        CARD.waited_for = max(CARD.waited_for, self.copies)


CARD = Card()


class Module:
    """What `torch.cuda` is to CUDA."""

    Stream, Event = Stream, Event

    @staticmethod
    def current_stream(device: object = None) -> Stream:
        return CARD.current

    @staticmethod
    @contextlib.contextmanager
    def stream(stream: Stream) -> Iterator[None]:
        before, CARD.current = CARD.current, stream
        try:
            yield
        finally:
            CARD.current = before

    @staticmethod
    def synchronize(device: object = None) -> None:
        CARD.waited_for = CARD.copies

    @staticmethod
    def mem_get_info(device: object = None) -> tuple[int, int]:
        return CARD.memory - CARD.held, CARD.memory

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass


class OnCard(Tensor):
    """A tensor of the card; `inner` has its values."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnCard":
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=torch.device(NAME, 0)
        )

    def __init__(self, inner: Tensor):
        self.inner = inner
        self.streams = {id(CARD.current)}
        storage = inner.untyped_storage()
        key, nbytes = storage.data_ptr(), storage.nbytes()
        count = CARD.here.setdefault(key, [0, nbytes])
        count[0] += 1
        if count[0] == 1:
            CARD.held += nbytes
            CARD.peak = max(CARD.peak, CARD.held)
        weakref.finalize(self, _left, CARD.here, key)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OnCard({self.inner!r})"

    def record_stream(self, stream: Stream) -> None:
        self.streams.add(id(stream))

    def new_tensor(self, data: Any, **options: Any) -> Tensor:  # which torch makes past the dispatcher
        return torch.tensor(data, dtype=options.get("dtype", self.dtype)).to(self.device)

    def tolist(self) -> list:
        CARD.waits["tolist"] += 1
        return self.inner.tolist()

    def __array__(self, dtype: object = None) -> None:
        raise TypeError("this tensor is on the card: NumPy cannot see it")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def _left(here: dict[int, list[int]], key: int) -> None:
    count = here[key]
    count[0] -= 1
    if count[0] == 0:
        del here[key]
        if here is CARD.here:
            CARD.held -= count[1]


class Mode(TorchDispatchMode):
    """Sends what has no tensor yet to the card as well: `torch.zeros(3, device="card")`."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the tensors inside."""
    tensors: list[Tensor] = []
    _mapped(Tensor, tensors.append, [args, [*kwargs.values()]])
    there = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
    on_card = bool(there)
    if "device" in kwargs and kwargs["device"] is not None:
        on_card = torch.device(kwargs["device"]).type == NAME
        kwargs = kwargs | {"device": torch.device("cpu")}
    if there and function not in MIXING:
        strange = [t for t in tensors if not isinstance(t, OnCard) and t.ndim]
        if strange:
            raise RuntimeError(f"{function}: expected all tensors to be on the same device, found card:0 and cpu")
    if there or on_card:
        _check(function, there, kwargs)
        if _waits(function, args, kwargs, to_card=on_card):
            CARD.waits[function.overloadpacket.__name__] += 1
    if kwargs.get("pin_memory"):
        return _pinned(function(*args, **kwargs | {"pin_memory": False}))
    if function is aten._to_copy.default and on_card and not there:
        return _sent(args[0], kwargs)
    names, inside = kwargs.keys(), _mapped(OnCard, attrgetter("inner"), [args, [*kwargs.values()]])
    result = function(*inside[0], **dict(zip(names, inside[1], strict=True)))
    return _mapped(Tensor, OnCard, result) if on_card else result


def _mapped(kind: type, change: Callable[[Any], Any], value: Any) -> Any:
    """Change what is of one kind in lists and tuples of them; operators take and return nothing deeper."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(kind, change, part) for part in value])
    return value


def _check(function: Any, there: list[OnCard], kwargs: dict[str, Any]) -> None:
    for what in (function, kwargs.get("dtype"), *(tensor.dtype for tensor in there)):
        if what in CARD.refused:
            raise TypeError(f"{function}: this card has no {what}")
    for tensor in there:
        if id(CARD.current) not in tensor.streams:
            raise RuntimeError(f"{function}: a tensor of another stream is used without record_stream")


def _waits(function: Any, args: Any, kwargs: dict[str, Any], *, to_card: bool) -> bool:
    """Say whether the host waits: for numbers and sizes, and for copies from or to ordinary memory."""
    name = function.overloadpacket.__name__
    if function in INDEXING:  # those of a mask must be counted, those on the CPU be copied
        return any(i is not None and (i.dtype == torch.bool or not isinstance(i, OnCard)) for i in args[1])
    if function is aten._to_copy.default:
        return isinstance(args[0], OnCard) != to_card and not (to_card and kwargs.get("non_blocking"))
    if function is aten.copy_.default:
        return isinstance(args[0], OnCard) != isinstance(args[1], OnCard)
    return name in WAITING or name.startswith(("_unique", "unique"))


def _sent(source: Tensor, kwargs: dict[str, Any]) -> OnCard:
    """Copy to the card: at once, or on another stream when somebody waits for it."""
    target = torch.empty_like(source, dtype=kwargs.get("dtype") or source.dtype)
    if CARD.current is CARD.default:  # from ordinary memory: the host waits
        target.copy_(source)
    else:
        CARD.copies += 1
        CARD.copied += source.nbytes
        CARD.lead = max(CARD.lead, CARD.copies - CARD.waited_for)
        if not (kwargs.get("non_blocking") and is_pinned(source)):
            raise RuntimeError("a copy beside what the card computes needs pinned memory and non_blocking")
        target.view(torch.uint8).fill_(0xAB)
        CARD.current.waiting.append(lambda: target.copy_(source))
    return OnCard(target)


_PINNED: set[int] = set()  # storages


def is_pinned(tensor: Tensor) -> bool:
    """Say whether a tensor is (part of) what was asked for with `pin_memory=True`."""
    return tensor.untyped_storage().data_ptr() in _PINNED


def _pinned(tensor: Tensor) -> Tensor:
    storage, nbytes = tensor.untyped_storage(), 1 << max(0, tensor.nbytes - 1).bit_length()
    if tensor.nbytes:
        _PINNED.add(storage.data_ptr())
        CARD.pinned += nbytes
        CARD.pinned_peak = max(CARD.pinned_peak, CARD.pinned)
        weakref.finalize(storage, _unpinned, storage.data_ptr(), nbytes)
    return tensor


def _unpinned(key: int, nbytes: int) -> None:
    _PINNED.discard(key)
    CARD.pinned -= nbytes


@contextlib.contextmanager
def installed() -> Iterator[Card]:
    """Make the device `card` known to torch; it stays known, but works inside this block only."""
    from torch.utils import backend_registration

    if not hasattr(torch, NAME):
        backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    CARD.reset()
    with Mode():
        yield CARD
