"""CPU seconds of a trace and of two sweeps, for each of the processes that share a model, or that share its vectors.

    python tools/benchmarks/ranks.py MODEL
    torchrun --standalone --nproc-per-node 2 tools/benchmarks/ranks.py MODEL --net 1Gb
    torchrun --standalone --nproc-per-node 2 tools/benchmarks/ranks.py MODEL --net 1Gb --by-vectors

One thread each. On a busy machine only CPU seconds can be compared; the wall clock stands beside them. With `--net`,
each process sleeps after what would go over a network of that rate, as long as `ggjac.planner.Network` says: those
seconds are shown on their own. With `--by-vectors`, each process has all weights and some of the stacked vectors,
whose products all get in the end: what ggjac does not do.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ggjac.model import Model, open_model
from ggjac.parallel import join
from ggjac.planner import Network, parse_rate

Found = TypeVar("Found")


class Wire:
    """A network that is only slept for: `slept` seconds so far."""

    def __init__(self, rate: str | None):
        self.network = Network(parse_rate(rate)) if rate else None
        self.slept, self.all_reduce = 0.0, dist.all_reduce
        dist.all_reduce = self.added_up  # as `ggjac.parallel` calls it

    def added_up(self, tensor: Tensor, *given: Any, **more: Any) -> None:
        """Add up, and sleep."""
        self.all_reduce(tensor, *given, **more)
        if self.network:
            self.sleep(self.network.seconds(tensor.nbytes, 1, dist.get_world_size()))

    def collect(self, nbytes: int) -> None:
        """Sleep for as long as each process takes to get the others' products, of so many bytes in all."""
        if self.network:
            self.sleep(nbytes / self.network.rate + self.network.latency)

    def sleep(self, seconds: float) -> None:
        """Sleep, and count it."""
        time.sleep(seconds)
        self.slept += seconds


def timed(what: str, wire: Wire, work: Callable[[], Found]) -> Found:
    """Do some work, and print how long it took."""
    used, began, slept = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter(), wire.slept
    found = work()
    now, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - began
    seconds = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    net = f", {wire.slept - slept:.2f} s on the network" if wire.network else ""
    print(f"process {os.environ.get('RANK', '0')}: {what}: {seconds:.2f} s CPU{net}, {wall:.2f} s", flush=True)
    return found


def main() -> None:
    """Trace a prompt, and sweep up and down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=8, help="of the prompt [8]")
    parser.add_argument("--vectors", type=int, default=32, help="stacked in a sweep [32]")
    parser.add_argument("--net", help="rate of a network, as 10Gb")
    parser.add_argument("--by-vectors", action="store_true", help="divide the vectors, not the model")
    options = parser.parse_args()
    group = join()[0] if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if group else (1, 0)
    wire, Model.keeps_ready = Wire(options.net), False
    how: dict[str, Any] = {"threads": 1, "device": "cpu", "group": None if options.by_vectors else group}
    model = open_model(options.model, **how)
    J = timed("trace", wire, lambda: model.trace(list(range(100, 100 + options.tokens)))).jacobian()
    generator = torch.Generator().manual_seed(0)
    for name, apply, shape in (("up", J.matmat, J.in_shape), ("down", J.rmatmat, J.out_shape)):
        X = torch.randn(options.vectors, *shape, generator=generator)
        own = X[rank::ranks] if options.by_vectors else X

        def sweep(apply: Callable[[Tensor], Tensor] = apply, own: Tensor = own) -> None:
            product = apply(own)
            if options.by_vectors:
                wire.collect(product.nbytes * (ranks - 1))

        timed(name, wire, sweep)


if __name__ == "__main__":
    main()
