"""Heads by block and number: through all mixers of a block, attention and recurrences."""

from collections.abc import Iterator
from typing import NamedTuple

from ggjac.checks import whole
from ggjac.config.mixers import MIXERS
from ggjac.config.model import ModelConfig


class Head(NamedTuple):
    """A head: its block, its number among all heads of the block's mixers, its mixer's kind, and its number there."""

    layer: int
    number: int
    kind: str
    own: int

    @property
    def name(self) -> str:
        """Its short name, such as `L3H5`."""
        return f"L{self.layer}H{self.number}"


def heads_of(config: ModelConfig, layer: int, *, channels: bool = False) -> Iterator[Head]:
    """Yield the heads of a block. A recurrence in each channel counts as one, or with `channels` as so many.

    What has no heads, such as a convolution, counts as one in the numbers of the others, and is left out.
    """
    number = 0
    for kind in config.layers[layer].mixers:
        mixer = MIXERS[kind]
        count = config.recurrence.heads if mixer.recurrent else config.layers[layer].heads if mixer.has_heads else 0
        count = 1 if mixer.channels and not channels else count
        for own in range(count):
            yield Head(layer, number + own, kind, own)
        number += max(count, 1)


def find_head(config: ModelConfig, layer: int, number: int, *, channels: bool = False) -> Head:
    """Return a head by its block and number, as `heads_of` counts them.

    Raises:
        ValueError: there is no such block or head, or what mixes positions there has no heads.
    """
    layer, number = whole("layer", layer, 0, config.block_count - 1), whole("head", number, 0)
    heads, kinds = list(heads_of(config, layer, channels=channels)), " and ".join(config.layers[layer].mixers)
    if not kinds:
        raise ValueError(f"block {layer} mixes no positions; choose another layer")
    if not heads:
        raise ValueError(f"block {layer} has a {kinds}, and no heads; choose another layer")
    for head in heads:
        if head.number == number:
            return head
    raise ValueError(
        f"head {number} is out of range: block {layer} ({kinds}) has heads {heads[0].number} to {heads[-1].number}"
    )
