"""One model over the ranks of a `torch.distributed` group: each has some terms of every branch, and all add up.

A branch is a sum: over the hidden units of its networks, over its experts, over the heads of its attention, over the
channels of its convolutions. Each rank reads, dequantizes and multiplies its own terms; then all add up, once in either
direction:

    A = Σ_r A_r        Aᵀ = Σ_r A_rᵀ

Between branches every rank has the whole residual stream, so that all else in this package computes as it does alone.
Only `blocks` asks the weights whether others have more terms of a sum. `ggjac.division` decides whose terms are whose;
what cannot be divided among so many ranks is computed by each of them, and not added up.
"""

import hashlib
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from ggjac.config import ModelConfig
from ggjac.config.mixers import MIXERS
from ggjac.division import Cut, Division, divide, holds
from ggjac.gguf import TensorInfo
from ggjac.linop import Homogeneous, LinearOperator
from ggjac.runs.journal import Journal, Product
from ggjac.runs.tensors import plain
from ggjac.weights import Block, Weight

# How long a rank waits for the others in a sum: for the slowest disk's part of a branch, with much to spare.
TIMEOUT = timedelta(minutes=10)


class ParallelError(ValueError):
    """Something that several ranks cannot compute together."""


def join() -> tuple[dist.ProcessGroup, dist.Store]:
    """Join the processes that `torchrun`, or what sets the same variables, started; return their group and its store.

    On one machine they listen on its loopback interface only. Over a network nothing is encrypted and nobody is asked
    for a password: it must be one that is trusted.

    Raises:
        KeyError: a variable is not set.
    """
    given = os.environ
    rank, ranks = int(given["RANK"]), int(given["WORLD_SIZE"])
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if given.get("LOCAL_WORLD_SIZE") == given["WORLD_SIZE"] and loopback:
        given.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    master = rank == 0 and given.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    served = dist.TCPStore(given["MASTER_ADDR"], int(given["MASTER_PORT"]), is_master=master)
    # After a restart the agent's store still has the addresses of the attempt before.
    store = dist.PrefixStore(f"attempt-{given.get('TORCHELASTIC_RESTART_COUNT', '0')}", served)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(given.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    assert dist.group.WORLD is not None
    return dist.group.WORLD, store


def of_first(own: bytes, group: dist.ProcessGroup) -> bytes:
    """Return the bytes of the first rank."""
    size = torch.tensor([len(own)])
    dist.broadcast(size, 0, group=group)
    if not int(size):
        return b""
    raw = torch.empty(int(size), dtype=torch.uint8)
    if dist.get_rank(group) == 0:
        raw.copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
    dist.broadcast(raw, 0, group=group)
    return raw.numpy().tobytes()


def received(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the first rank's tensor, in place of one of the same shape and dtype."""
    first = own.detach().clone(memory_format=torch.contiguous_format)
    if first.numel():
        dist.broadcast(first, 0, group=group)
    return first


class Joined(LinearOperator):
    """An operator of which each rank has a part: it applies its own, and all are added up.

    Args:
        part: this rank's.
        group: the ranks, each of which applies its part at the same time.
        inputs: whether the parts read the same input, so that their cotangents are added up.
        outputs: whether their outputs are.
    """

    def __init__(self, part: LinearOperator, group: dist.ProcessGroup, *, inputs: bool = True, outputs: bool = True):
        self.part, self.parts, self.group = part, (part,), group
        self.inputs, self.outputs = inputs, outputs
        self.in_shape, self.out_shape = part.in_shape, part.out_shape
        self.dtype, self.device = part.dtype, part.device

    def matmat(self, X: Tensor, t: Homogeneous = None) -> Tensor:
        """Apply the part; add up the outputs.

        Raises:
            ParallelError: a derivative is asked for.
        """
        own = self.part.matmat(X, t)
        return self._added_up(own) if self.outputs else own

    def rmatmat(self, Y: Tensor) -> Tensor:
        """Apply the transposed part; add up the cotangents of the inputs."""
        own = self.part.rmatmat(Y)
        return self._added_up(own) if self.inputs else own

    def _added_up(self, own: Tensor) -> Tensor:
        if own.requires_grad or forward_ad.unpack_dual(own).tangent is not None:
            raise ParallelError(
                "autograd cannot differentiate a model that several ranks share, which the ordinary Jacobian needs; "
                "run it in one process"
            )
        own = own.contiguous()
        if own.numel():
            dist.all_reduce(own, group=self.group)
        return own


@dataclass(frozen=True)
class Crew(Division):
    """The ranks that share a model, and what of it is this one's.

    Attributes:
        group: the process group.
    """

    group: dist.ProcessGroup = field(kw_only=True)

    @classmethod
    def of(cls, group: dist.ProcessGroup, config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> "Crew":
        """Share out the terms of every block."""
        own = divide(config, tensors, dist.get_rank(group), dist.get_world_size(group))
        return cls(**vars(own), group=group)

    def part(self, block: Block, index: int) -> "Part":
        """Return this rank's view of a block."""
        return Part(
            block.store, block.prefix, block.slices, block.place, block.rounding, crew=self, cuts=self.cuts[index]
        )

    def recorded(self, journal: Journal | None) -> "SharedJournal":
        """Return what records products of all ranks: the first one's journal, if it has one."""
        return SharedJournal(self, journal)

    def told(self, content: Any) -> Any:
        """Return the first rank's plain JSON, which is small."""
        return json.loads(of_first(json.dumps(content).encode(), self.group))


@dataclass(frozen=True)
class Part(Block):
    """One rank's part of a block's tensors; constants that all have are the first rank's.

    Attributes:
        crew: of the rank.
        cuts: of the tensors that are divided, by stem.
    """

    crew: Crew = field(kw_only=True)
    cuts: Mapping[str, Cut] = field(kw_only=True)

    def __contains__(self, name: str) -> bool:
        stem, _, suffix = name.rpartition(".")
        cut = self.cuts.get(stem) if suffix == "bias" else None
        if cut and cut.axis == "columns" and self.crew.rank:
            return False
        return super().__contains__(name)

    def matrix(self, name: str, expert: int | None = None) -> Weight:
        """Return this rank's part of a matrix, or of a stack the matrix of one of its own heads."""
        cut = self.cuts.get(name.rpartition(".")[0])
        if cut and cut.axis == "stack" and expert is not None:
            expert += cut.start
        weight = super().matrix(name, expert)
        if cut is None or cut.axis == "stack":
            return weight
        if cut.axis == "rows":
            return weight.rows(cut.start, cut.stop)
        return replace(weight.columns(cut.start, cut.stop), edge=cut.start)

    def read_ahead(self) -> None:
        """Ask the system to read this rank's part of the block except stacks of experts."""
        for info in self.store.file.tensors.values():
            if info.name.startswith(self.prefix) and len(info.shape) < 3:
                stem, _, suffix = info.name.removeprefix(self.prefix).rpartition(".")
                parts = [own for own, part in self.slices.items() if part.stem == stem] or [stem]
                if len(info.shape) > 1 and not self.cuts.keys().isdisjoint(parts):
                    for part in parts:
                        self.matrix(f"{part}.{suffix}").read_ahead()
                else:
                    self.store.file.will_need(info)

    def vector(self, name: str, expert: int | None = None) -> Tensor:
        """Return this rank's part of a vector that goes with rows, and all of any other."""
        vector, cut = super().vector(name, expert), self.cuts.get(name.rpartition(".")[0])
        return vector[cut.start : cut.stop] if cut and cut.axis == "rows" else vector

    def shares(self, stem: str) -> bool:
        """Return whether other ranks have more terms of the sum that ends with a projection."""
        return stem in self.cuts or stem == "ffn_down_exps"

    def holds(self, expert: int) -> bool:
        """Return whether a routed expert is this rank's."""
        return holds(expert, self.crew.rank, self.crew.ranks)

    def agreed(self, found: Tensor) -> Tensor:
        """Return a choice as the first rank has made it."""
        return received(found, self.crew.group)

    def joined(self, part: LinearOperator, *, inputs: bool = True, outputs: bool = True) -> LinearOperator:  # type: ignore[override]
        """Return an operator of which this rank has a part, completed by the others."""
        return Joined(part, self.crew.group, inputs=inputs, outputs=outputs)

    def gathered(self, own: Tensor, stem: str) -> Tensor:
        """Return numbers `[m, h]` of each head from this rank's; without heads, their sum over the ranks."""
        cut, found = self.cuts.get(stem), own.clone()
        if not self.shares(stem):
            return own
        if cut is not None and any(mixer.output == stem and mixer.has_heads for mixer in MIXERS.values()):
            width = (cut.stop - cut.start) // own.shape[1]
            found = own.new_zeros(len(own), super().matrix(f"{stem}.weight").shape[1] // width)
            found[:, cut.start // width : cut.stop // width] = own
        dist.all_reduce(found, group=self.crew.group)
        return found


class SharedJournal:
    """The journal of the first rank, for all: what it has of a product, all have, so that all skip the same work.

    Before each product the ranks compare what they are about to do, and take the first one's vectors: processors of
    different makes may differ in a last bit. What goes from rank to rank is tensors and JSON, and nothing is unpickled.
    """

    def __init__(self, crew: Crew, journal: Journal | None):
        self._crew, self._journal = crew, journal

    def product(self, kind: str, inputs: Sequence[Tensor]) -> Product:
        """Return the next product of this run, as `Journal.product` does, with the result or state of the first rank.

        Raises:
            ParallelError: another rank is about to compute something else.
        """
        self._compare([kind, *(_described(tensor) for tensor in inputs)])
        for tensor in inputs:
            self._receive(tensor)
        own = self._journal.product(kind, inputs) if self._journal else None
        kept = [None if part is None else [_described(one) for one in part] for part in _parts(own)]
        done, *shapes = self._crew.told([own.done if own else 0, *kept])
        parts = _parts(own) if own else [None if part is None else [_empty(one) for one in part] for part in shapes]
        for tensor in (tensor for part in parts if part is not None for tensor in part):
            self._receive(tensor)
        return own or Told(kind, done, *parts)

    def _compare(self, content: Any) -> None:
        digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=7).digest()
        own = torch.tensor([int.from_bytes(digest, "big")])
        others = [torch.empty_like(own) for _ in range(self._crew.ranks)]
        dist.all_gather(others, own, group=self._crew.group)
        if any(not torch.equal(own, other) for other in others):
            raise ParallelError(
                "the processes of this run are about to compute different things: start all with the same command, "
                "file, prompt and ggjac, on machines of one kind"
            )

    def agreed(self, found: Tensor) -> Tensor:
        """Return numbers as the first rank has found them."""
        return received(found, self._crew.group)

    def _receive(self, tensor: Tensor) -> None:
        """Replace a tensor's content by the first rank's, where it differs."""
        first = received(tensor, self._crew.group)
        if not torch.equal(first, tensor):
            tensor.copy_(first)


class Told(Product):
    """A product of which another rank keeps the record, if any does."""

    def __init__(self, kind: str, done: int, result: list[Tensor] | None, state: list[Tensor] | None):
        self.kind, self.done, self.result, self.state = kind, done, result, state

    def reached(self, done: int, state: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return the tensors in plain layout, as they are where they are recorded."""
        return [plain(tensor) for tensor in state()]

    def finish(self, result: list[Tensor]) -> list[Tensor]:
        """Return the result in plain layout."""
        return [plain(tensor) for tensor in result]


def _parts(product: Product | None) -> list[list[Tensor] | None]:
    return [None, None] if product is None else [product.result, product.state]


def _described(tensor: Tensor) -> list[Any]:
    """Return shape, dtype and kind of device, as plain JSON."""
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.device.type]


def _empty(described: list[Any]) -> Tensor:
    """Return a tensor as it was described, to be filled."""
    shape, dtype, device = described
    return torch.empty(shape, dtype=getattr(torch, dtype), device=device)
