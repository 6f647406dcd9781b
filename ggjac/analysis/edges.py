"""Edges: how the parts of a logit travel from what each head and MLP wrote to what each later one reads.

At the prompt the frozen network is linear, and the residual stream is a sum. What a component `v` (the values of a
head, the live input of an MLP) reads of it is therefore a sum over all that was written there before:

    edge(u → v) = Σ_p  O_u[p] · g_v[p]

with `O_u` what `u` wrote at each position, and `g_v` the gradient of the logit with respect to the stream as `v` alone
reads it, through `v` and everything after it. On the way down, the cotangents of all readers travel past the branches
and not through them, and their sum is the cotangent of the stream itself, which the readers of the next block need:

    c = Σ_v g_v        g_v = (what v adds, as a frozen map of what it reads)ᵀ c

One pass makes all of them. The edges into `v` sum to what goes through `v`, without constants of its own; those out of
`u` sum to what of the logit goes through `u`; and the edges into the LM head are direct logit attribution.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.blocks import BlockTape, FrozenBlock, MixerTape, attention_halves
from ggjac.checks import whole
from ggjac.config.mixers import MIXERS
from ggjac.jacobian import DetachedJacobian, FrozenNetwork, Progress, Span
from ggjac.jacobian.targets import ask
from ggjac.linop import LinearOperator
from ggjac.results import NO_WORDS, Result, Table, Words
from ggjac.shares import common_columns, placed, split_name
from ggjac.sizes import EDGE_FLOATS, MlpPath

# Under every table of edges.
CAVEAT = "mlp-path {rule}: the sums are exact; an edge is a part of the logit, not the effect of cutting it"

KINDS = ("embedding", "entry", "head", "bias", "laurel", "mlp", "inputs", "logit")


class Node(NamedTuple):
    """A component that writes to the residual stream, reads it, or both.

    Attributes:
        block: its block, from 0; None for the embedding and the LM head.
        kind: `"embedding"`, `"head"`, `"bias"` (what attention adds for none of its heads), `"laurel"`, `"mlp"`,
            `"inputs"` (of the block's own), `"entry"` (a constant with which a pass begins), or `"logit"` (the head).
        head: its number in the block, through all its mixers, from 0; None for other kinds.
        mixer: kind of a head's mixer.
    """

    block: int | None
    kind: str
    head: int | None = None
    mixer: str = ""

    @property
    def name(self) -> str:
        """Return `L3H5`, `L3 MLP` and so on."""
        if self.block is None:
            return self.kind
        if self.head is None:
            return f"L{self.block} {NAMES[self.kind]}"
        return f"L{self.block}H{self.head}" if MIXERS[self.mixer].has_heads else f"L{self.block} {self.mixer}"


NAMES = {
    "bias": "bias of attention",
    "laurel": "laurel",
    "mlp": "MLP",
    "inputs": "inputs of its own",
    "entry": "constant at its entry",
}


class Edge(NamedTuple):
    """One of the largest edges.

    Attributes:
        source, reader: numbers of nodes.
        value: the part of the logit that takes this way.
        by_position: `[n]`, float64: its part at each position.
    """

    source: int
    reader: int
    value: float
    by_position: Float[Tensor, " n"]


@dataclass(frozen=True)
class Edges(Result):
    """The edges of the frozen network in one logit, or in the difference of two.

    Attributes:
        position: of the output.
        target: token id whose logit is split.
        versus: token id whose logit is subtracted, or None.
        logit: from the forward pass, before any soft cap.
        nodes: in the order in which they write; the LM head is the last.
        matrix: `[V, V]`, float64: of each node (row) into each later one.
        through: `[V]`, float64: what of the logit goes through what each node wrote, along all ways; of the LM head all
            of it.
        largest: the largest edges, the largest first.
        softcap: of the head's logits (not applied here); 0 for none.
        mlp_path: the freezing rule, which decides what the MLPs read.
    """

    position: int
    target: int
    versus: int | None
    logit: float
    nodes: list[Node]
    matrix: Float[Tensor, "V V"]
    through: Float[Tensor, " V"]
    largest: list[Edge]
    softcap: float
    mlp_path: MlpPath

    along = None  # a logit, not the projection on a direction

    @property
    def size(self) -> float:
        """The sum of the absolute values of all edges."""
        return float(self.matrix.abs().sum())

    @property
    def left_out(self) -> float:
        """The sum of the absolute values of all edges that are not among the largest: no sum of some is larger."""
        return max(0.0, self.size - sum(abs(edge.value) for edge in self.largest))

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the target, every node, and the largest edges with their part at each position up to the output."""
        into, constants = self.matrix.sum(0), self.constants
        return {
            **words.here(self.position),
            "target": words.token(self.target),
            "versus": None if self.versus is None else words.token(self.versus),
            "logit": self.logit,
            "softcap": self.softcap or None,
            "mlp_path": self.mlp_path,
            "nodes": [
                {
                    "name": node.name,
                    "kind": node.kind,
                    "block": node.block,
                    "head": node.head,
                    "through": float(self.through[i]),
                    "into": float(into[i]),
                    "constant": float(constants[i]),
                }
                for i, node in enumerate(self.nodes)
            ],
            "edges": [
                {"source": edge.source, "reader": edge.reader, "value": edge.value, "parts": edge.by_position.tolist()}
                for edge in self.largest
            ],
            "count": int((self.matrix != 0).sum()),
            "size": self.size,
            "left_out": self.left_out,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: `edges` `[V, V]`, `through` `[V]` and `nodes` `[V, 3]`.

        These are the place of a node's kind in `KINDS`, its block and its head, -1 for none.
        """
        numbers = [(KINDS.index(node.kind), node.block, node.head) for node in self.nodes]
        return placed([self.position], torch.tensor([self.target])) | {
            "logits": torch.tensor([self.logit], dtype=torch.float64),
            "edges": self.matrix,
            "through": self.through,
            "nodes": torch.tensor([[-1 if value is None else value for value in node] for node in numbers]),
        }

    def _table(self, words: Words) -> Table:
        edges = self.largest
        most = [int(edge.by_position.abs().argmax()) for edge in edges]
        return Table(
            f"Edges in {split_name(words, self.target, self.versus)}",
            {
                "part": [f"{self.nodes[edge.source].name} → {self.nodes[edge.reader].name}" for edge in edges],
                "share": [edge.value for edge in edges],
                **words.at(most),
            },
            (
                f"absolute values of all edges sum to {self.size:.4f}, of those left out to {self.left_out:.4f}",
                CAVEAT.format(rule=self.mlp_path),
            ),
            common_columns(words, self) | {"mlp path": self.mlp_path},
        )

    @property
    def constants(self) -> Float[Tensor, " V"]:
        """What the constants of each node itself, such as biases of an MLP, add to what goes through it."""
        return self.through - self.matrix.sum(0)


def attribute_edges(
    jacobian: DetachedJacobian,
    target: int | str | None = None,
    versus: int | str | None = None,
    *,
    count: int = 100,
    progress: Progress | None = None,
) -> Edges:
    """Split a logit over the edges from what each head and MLP wrote to what each later one reads.

    One pass up, which applies each branch to the stream that the trace recorded, and one down, in which the cotangents
    of all readers travel together. Where they need more than the Jacobian's `chunk_bytes` of working memory, those of
    the upper blocks travel first, and each further pass reads the output projections below them once more.

    Args:
        jacobian: of the prompt and the output position.
        target: id or text of the token whose logit is split; default the most likely one.
        versus: id or text of a token whose logit is subtracted.
        count: number of the largest edges that are kept by position.
        progress: called as `progress("block", done, total)` after each block.

    Raises:
        PromptError: `target` or `versus` is not in the vocabulary, or a text that is not one token.
        ValueError: one of them is neither a text nor a whole number, both are the same token, or `count` is negative;
            or the Jacobian is of a part of the network, or of a model that several processes share.
    """
    network, n = jacobian.network, jacobian.position + 1
    whole("count", count, least=0)
    if jacobian.span != Span(0, jacobian.end):
        raise ValueError(f"this Jacobian is of a part of the network, {jacobian.span}; edges are of the whole one")
    if network.frame.config != network.config:
        raise ValueError("this process has some heads of a block only; edges are found in one process")
    target, versus = jacobian.token_id(target), jacobian.token_id(versus)
    asked = ask(network.outputs[n - 1 : n], network.head, target, versus)
    steps = itertools.count(1)

    def report() -> None:
        if progress:
            progress("block", next(steps), 2 * len(network.tapes))

    passes = _Passes(network, n, report)
    passes.up()
    found = passes.down(asked.w, count, jacobian.chunk_bytes)
    found.through[-1] = asked.logits[0]
    return Edges(
        position=n - 1,
        target=int(asked.targets[0]),
        versus=versus,
        logit=float(asked.logits[0]),
        nodes=passes.nodes,
        matrix=found.matrix,
        through=found.through,
        largest=found.largest,
        softcap=network.head.softcap,
        mlp_path=jacobian.mlp_path,
    )


class _Written(NamedTuple):
    """What a component wrote at all positions, `[n, e]`; of heads, the values that they mixed, `[n, h v]`."""

    first: Node
    values: Float[Tensor, "n e"]
    heads: int = 1


class _Passes:
    """The passes over the first `n` positions in which edges are found.

    Attributes:
        nodes: those that write, in this order; then the LM head.
        written: by each block, by kind; each mixer's heads by its place.
    """

    def __init__(self, network: FrozenNetwork, n: int, report: Callable[[], None]):
        self.network, self.n, self.report = network, n, report
        self.nodes = [Node(None, "embedding")]
        self.written: list[dict[str | int, _Written]] = []

    def up(self) -> None:
        """Apply each branch to the stream that the trace recorded, and keep what its components write."""
        banks: dict[int, Tensor] = {}
        for i, tape, frozen in self.network.walk(range(self.n)):
            self.written.append({})
            self._write(i, tape, frozen, banks)
            self.report()
        self.nodes.append(Node(None, "logit"))

    def _write(self, i: int, tape: BlockTape, frozen: FrozenBlock, banks: dict[int, Tensor]) -> None:
        def keep(kind: str, values: Float[Tensor, "1 n e"]) -> None:
            self.written[i][kind] = _Written(Node(i, kind), values[0].clone())
            self.nodes.append(Node(i, kind))

        stream, one = tape.x[None, : self.n], self.network.x.new_ones(1)
        if frozen.entry is not None:
            constant = frozen.entry.matmat(torch.zeros_like(stream), one)
            if constant.any():
                keep("entry", constant)
            stream = frozen.entry.matmat(stream, one)
        values = frozen.mixed(stream, one, banks)
        added = constant = stream.new_zeros(1, self.n, self.network.config.d)
        for place, (mixer, reading, writing) in enumerate(self._halves(i, tape)):
            z = reading.matmat(values if mixer.shared else stream, one)
            own, own_constant = writing.matmat(torch.cat([z, torch.zeros_like(z)]), one.expand(2)).split(1)
            added, constant = added + own, constant + own_constant
            start = sum(before.heads for before in tape.attn.mixers[:place])
            first = Node(i, "head", start, mixer.kind)
            self.written[i][place] = _Written(first, z[0], mixer.heads)
            self.nodes += [first._replace(head=head) for head in range(start, start + mixer.heads)]
        if constant.any():
            keep("bias", constant)
        if frozen.laurel is not None:
            laurel = frozen.laurel.matmat(stream, one)
            keep("laurel", laurel)
            added = added + laurel
        middle, mlp = frozen.matmat_ffn(frozen.residual.matmat(stream), added, one)
        if not tape.ffn.empty:
            keep("mlp", mlp)
        if frozen.inputs is not None:
            keep("inputs", frozen.inputs.matmat(frozen.written(middle, mlp), one))

    def _halves(self, i: int, tape: BlockTape) -> list[tuple[MixerTape, LinearOperator, LinearOperator]]:
        """Return the mixers of a block, each in two at what its heads have mixed."""
        attn = tape.attn.at(slice(self.n))
        halves = attention_halves(self.network.weights(i), self.network.frame.config, attn, self.n, self.n)
        return [(mixer, *half) for mixer, half in zip(attn.mixers, halves, strict=True)]

    def down(self, w: Float[Tensor, "1 d"], count: int, chunk_bytes: int) -> "_Found":
        """Carry the cotangents of all readers down to the embedding, those of some blocks at a time."""
        found = _Found(self.nodes, count)
        cotangent = w.new_zeros(1, self.n, w.shape[1])
        cotangent[:, -1] = w
        read = self.network.norm.at(slice(self.n)).operator().rmatmat(cotangent)
        stack, top = _Stack(torch.zeros_like(read)), len(self.written)
        stack.join([found.number(self.nodes[-1])], read)
        while True:
            following = None
            for i, tape, frozen in self.network.walk(range(self.n), down=True, blocks=range(top)):
                self._pull(i, tape, frozen, stack, found)
                if stack.joins:
                    self.report()
                    if i and len(stack.readers) > 1 and stack.S.nbytes > chunk_bytes:
                        following = i, *stack.stop()
            found.add(_Written(self.nodes[0], self.network.x[: self.n]), stack.readers, stack.S)
            if following is None:
                return found
            top, whole, banks = following
            stack = _Stack(whole, banks)

    def _pull(self, i: int, tape: BlockTape, frozen: FrozenBlock, stack: "_Stack", found: "_Found") -> None:
        """Carry cotangents down past a block, and find the edges from its components; its own readers join."""
        written, joins = self.written[i], stack.joins

        def edges(kind: str, cotangents: Tensor) -> None:
            if kind in written:
                found.add(written[kind], stack.readers, cotangents)

        if frozen.scale is not None:
            stack.S = stack.S * frozen.scale
        edges("inputs", stack.S)
        if frozen.inputs is not None and joins:
            stack.join([found.number(Node(i, "inputs"))], frozen.inputs.rmatmat(stack.S[:1]))
        ends = stack.S if frozen.spread is None else frozen.spread[1].rmatmat(stack.S)
        edges("mlp", ends)
        # A copy: a view would keep all other cotangents as well.
        mlp, ends = [found.number(Node(i, "mlp"))] if "mlp" in written and joins else [], ends[:1].clone()
        stack.pull(frozen.skip)
        if mlp and not frozen.parallel:
            stack.join(mlp, frozen.ffn.rmatmat(ends))
        added = stack.S if frozen.spread is None else frozen.spread[0].rmatmat(stack.S)
        edges("bias", added)
        edges("laurel", added)
        readers = self._heads(i, tape, frozen, stack, found, added)
        del added  # before readers join
        if mlp and frozen.parallel:
            stack.join(mlp, frozen.ffn.rmatmat(ends))
        if mlp and frozen.beside is not None:
            stack.more(len(stack.S) - 1, frozen.beside.rmatmat(ends))
        stack.pull(frozen.residual)
        for nodes, cotangents, held in readers:
            nothing = stack.S.new_zeros(1, *stack.S.shape[1:]).expand(len(nodes), -1, -1)
            stack.join(nodes, nothing if cotangents is None else cotangents)
            if held is not None and frozen.bank is not None:
                stack.hold(frozen.bank, len(stack.S) - len(nodes), held)
        if frozen.values is not None and frozen.share is None and frozen.bank is not None:
            stack.release(frozen.bank, frozen.values)
        edges("entry", stack.S)
        stack.pull(frozen.entry)

    def _heads(
        self,
        i: int,
        tape: BlockTape,
        frozen: FrozenBlock,
        stack: "_Stack",
        found: "_Found",
        added: Float[Tensor, "r n d"],
    ) -> list[tuple[list[int], Tensor | None, Tensor | None]]:
        """Find the edges from the heads of a block; return those that join: their nodes, and the cotangents.

        They are of the block's input, and of the values of another block; each None where nothing is read of it.
        """
        readers: list[tuple[list[int], Tensor | None, Tensor | None]] = []
        for place, (mixer, reading, writing) in enumerate(self._halves(i, tape)):
            heads, seen = self.written[i][place], writing.rmatmat(added)
            found.add(heads, stack.readers, seen)
            if not stack.joins:
                continue
            first = found.number(heads.first)
            own = seen[0].unflatten(1, (mixer.heads, -1))  # [n, h, v]
            apart = own.new_zeros(mixer.heads, *own.shape)  # each head in a row of its own
            apart.diagonal(dim1=0, dim2=2).copy_(own.permute(0, 2, 1))
            cotangents: Tensor | None = reading.rmatmat(apart.flatten(2))
            held = None
            if mixer.shared and cotangents is not None:
                held = cotangents if frozen.share is None else frozen.share.rmatmat(cotangents)
                cotangents = None if frozen.values is None else frozen.values.rmatmat(cotangents)
            readers.append(([*range(first, first + mixer.heads)], cotangents, held))
        if stack.joins and frozen.laurel is not None:
            readers.append(([found.number(Node(i, "laurel"))], frozen.laurel.rmatmat(added[:1]), None))
        return readers


class _Found:
    """Edges as they are found: all, summed over positions, and the largest by position."""

    def __init__(self, nodes: Sequence[Node], count: int):
        self.numbers = {node: i for i, node in enumerate(nodes)}
        self.matrix = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
        self.through = torch.zeros(len(nodes), dtype=torch.float64)
        self.largest: list[Edge] = []
        self.count = count

    def number(self, node: Node) -> int:
        """Return the number of a node."""
        return self.numbers[node]

    def add(self, written: _Written, readers: Sequence[int], cotangents: Float[Tensor, "r n e"]) -> None:
        """Take the edges from a component, or from the heads of a mixer, to readers; those of -1 are all together."""
        wide, (n, width) = written.values.cpu().double(), written.values.shape
        some = max(1, EDGE_FLOATS // (n * width))
        products = ((part.cpu().double() * wide).unflatten(2, (written.heads, -1)) for part in cotangents.split(some))
        parts = torch.cat([product.sum(3) for product in products])  # [r, n, w]
        first = self.numbers[written.first]
        values, own = parts.sum(1), slice(first, first + written.heads)  # [r, w]
        if readers[0] == -1:
            self.through[own] = values[0]
            readers, values, parts = readers[1:], values[1:], parts[1:]
        self.matrix[own, list(readers)] = values.T
        for place in values.abs().flatten().topk(min(self.count, values.numel())).indices.tolist():
            row, column = divmod(place, written.heads)
            if value := float(values[row, column]):
                self.largest.append(Edge(first + column, readers[row], value, parts[row, :, column].clone()))
        self.largest.sort(key=lambda edge: -abs(edge.value))
        del self.largest[self.count :]


class _Stack:
    """Cotangents of the stream: of each reader, on their way down past all branches; first that of all together.

    Attributes:
        S: `[r, n, i]`.
        readers: the node of each row; -1 for all together, which is there while readers join.
        banks: by number of a block that makes values for others, cotangents of these: of all together, and of readers
            from a row on.
    """

    def __init__(self, whole: Float[Tensor, "1 n i"], banks: Mapping[int, Tensor] | None = None):
        self.S, self.readers = whole, [-1]
        self.banks = {bank: [(0, held)] for bank, held in (banks or {}).items()}

    @property
    def joins(self) -> bool:
        """Whether readers join."""
        return self.readers[:1] == [-1]

    def pull(self, operator: LinearOperator | None) -> None:
        """Go down past an operator; None for the identity."""
        if operator is not None:
            self.S = operator.rmatmat(self.S)

    def join(self, nodes: Sequence[int], cotangents: Float[Tensor, "j n i"]) -> None:
        """Append readers, which are part of all together."""
        self.readers += nodes
        self.S = torch.cat([self.S, cotangents])
        self.S[0] += cotangents.sum(0)

    def more(self, row: int, cotangents: Float[Tensor, "j n i"]) -> None:
        """Add what readers from a row on read at another place."""
        self.S[row : row + len(cotangents)] += cotangents
        self.S[0] += cotangents.sum(0)

    def hold(self, bank: int, row: int, cotangents: Float[Tensor, "j n gv"]) -> None:
        """Keep what readers from a row on read of values that an earlier block makes."""
        (_, whole), *others = self.banks.get(bank, [(0, torch.zeros_like(cotangents[:1]))])
        self.banks[bank] = [(0, whole + cotangents.sum(0)), *others, (row, cotangents)]

    def release(self, bank: int, values: LinearOperator) -> None:
        """Add what is kept of a bank to the cotangents of the stream from which its values are made."""
        held = self.banks.pop(bank, [])
        held = held if self.joins else [(row - 1, part) for row, part in held[1:]]
        if held:
            stream = values.rmatmat(torch.cat([part for _, part in held])).split([len(part) for _, part in held])
            for (row, _), cotangents in zip(held, stream, strict=True):
                self.S[row : row + len(cotangents)] += cotangents

    def stop(self) -> tuple[Float[Tensor, "1 n i"], dict[int, Tensor]]:
        """Let no more readers join; return the cotangents of all together, and of banks, for those of a new stack."""
        whole, self.S, self.readers = self.S[:1].clone(), self.S[1:], self.readers[1:]
        return whole, {bank: held[0][1] for bank, held in self.banks.items()}
