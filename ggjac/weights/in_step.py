"""Computations that read the same weights in step: each tile is dequantized once for all of them.

Each computation has a stack of its own (a greenlet) and runs until it asks for a tile. When all of them wait, one tile
is dequantized, and those that have asked for it go on, one after another. Nothing runs at the same time, and each
multiplies for itself, so that every bit is as if it had run alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from ggjac.weights.cache import Key

Found = TypeVar("Found")


class Wish(NamedTuple):
    """A tile that a computation asks for: the arguments of `WeightStore.dequantize`."""

    key: Key
    place: str
    forgiving: bool
    rounding: torch.dtype | None


# How each of the computations under way asks for a tile, and waits for it.
Readers = dict[greenlet, Callable[[Wish], Tensor]]


class _Waiting(NamedTuple):
    """A computation that waits for a tile; the smaller its first three numbers, the sooner it goes on.

    Attributes:
        kind: 0 for a single row, 1 for an expert's matrix, 2 for another one.
        passes: over the experts of the mixture that it is in, but for the one under way.
        expert: the last one, or -1.
        wish: the tile.
    """

    kind: int
    passes: int
    expert: int
    wish: Wish


def in_step(
    readers: Readers,
    runs: Sequence[Callable[[], Found]],
    dequantize: Callable[[Wish], Tensor],
    shape_of: Callable[[str], tuple[int, ...]],
) -> list[Found]:
    """Run computations side by side, and return their results in order.

    They may read different tensors: those that are behind go on first, until all ask for the same. Single rows, as of
    embeddings, come before matrices. In a mixture, those whose passes over its experts are fewer go on first, then
    those with the expert of the smallest number, so that each expert is read once, whoever uses it. (Twice, where all
    tokens of one computation use a single expert, of which nobody can say whether it is in the next pass.)

    An error in one of them is raised here, and ends all others.

    Args:
        readers: of the weights, which ask these when they are read.
        runs: the computations.
        dequantize: makes a tile, which is valid until it is called again.
        shape_of: returns the shape of a stored tensor.
    """
    found: dict[int, Found] = {}
    waiting = dict[int, _Waiting]()
    hub, own = getcurrent(), list[greenlet]()

    def go_on(i: int, tile: Tensor | None = None, passes: int = 0, last: int = -1) -> None:
        wish = own[i].switch() if tile is None else own[i].switch(tile)
        if wish is None:
            return
        (rows, _), shape = wish.key.shape, shape_of(wish.key.name)
        kind = 0 if rows == 1 else 1 if len(shape) > 2 else 2
        expert = wish.key.start // shape[-2] if kind == 1 else last if kind == 0 else -1
        waiting[i] = _Waiting(kind, 0 if kind == 2 else passes + (expert < last), expert, wish)

    def whole(i: int, run: Callable[[], Found]) -> None:
        found[i] = run()

    try:
        for i, run in enumerate(runs):
            own.append(greenlet(partial(whole, i, run)))
            readers[own[i]] = hub.switch
            go_on(i)
        while waiting:
            wish = min(waiting.values(), key=lambda one: one[:3]).wish
            tile = dequantize(wish)
            for i in [i for i, one in waiting.items() if one.wish == wish]:
                _, passes, expert, _ = waiting.pop(i)
                go_on(i, tile, passes, expert)
    finally:
        for each in own:
            each.throw()  # GreenletExit, where it has not ended
            del readers[each]
    return [found[i] for i in range(len(runs))]
