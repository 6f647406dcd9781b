"""How long ranks that share a model take to add up, on a network of a rate and a latency: arithmetic, not measured."""

import math
import re
from dataclasses import dataclass

_RATE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([KMGT])(b|B)(?:it)?(?:/s|ps)?\s*")
_POWERS = "KMGT"

# Seconds until a small message has arrived: between the machines of one switch.
LATENCY = 50e-6


class NetworkError(ValueError):
    """A text is not the rate of a network."""


def parse_rate(text: str) -> float:
    """Return the bytes per second that a text names: `10Gb` in bits, `300GB` in bytes, as both are sold.

    Raises:
        NetworkError: the text is not in one of these forms, or the rate is zero.
    """
    match = _RATE.fullmatch(text)
    if match is None or not 0 < (number := float(match[1])) < math.inf:
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise NetworkError(f"{shown!r} is not the rate of a network; write it as 10Gb (bits) or 300GB (bytes) a second")
    return number * 1000 ** (_POWERS.index(match[2]) + 1) / (8 if match[3] == "b" else 1)


@dataclass(frozen=True)
class Network:
    """What connects ranks.

    Attributes:
        rate: bytes per second that each of them sends, while it receives as many.
        latency: seconds until a small message has arrived.
    """

    rate: float
    latency: float = LATENCY

    def seconds(self, nbytes: int, sums: int, ranks: int) -> float:
        """Return how long so many sums of so many bytes in all take, each by a ring of all ranks.

        In a ring, each rank sends every byte but its own part twice, in `2 (ranks - 1)` messages for each sum.
        """
        return 2 * (ranks - 1) * (nbytes / ranks / self.rate + sums * self.latency)
