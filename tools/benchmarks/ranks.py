"""CPU seconds of a trace and of two sweeps, for each of the processes that share a model.

    python tools/benchmarks/ranks.py MODEL
    torchrun --standalone --nproc-per-node 2 tools/benchmarks/ranks.py MODEL

One thread each. On a busy machine only CPU seconds can be compared; the wall clock stands beside them.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from ggjac.model import Model, open_model
from ggjac.parallel import join

TOKENS = range(100, 108)
VECTORS = 32
Found = TypeVar("Found")


def timed(what: str, work: Callable[[], Found]) -> Found:
    """Do some work, and print how long it took."""
    used, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    found = work()
    now, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - began
    seconds = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    print(f"process {os.environ.get('RANK', '0')}: {what}: {seconds:.2f} s CPU, {wall:.2f} s", flush=True)
    return found


def main() -> None:
    """Trace a prompt, and sweep up and down."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    Model.keeps_ready = False
    model = open_model(sys.argv[1], threads=1, device="cpu", group=join()[0] if several else None)
    J = timed("trace", lambda: model.trace(list(TOKENS))).jacobian()
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(VECTORS, *shape, generator=generator) for shape in (J.in_shape, J.out_shape))
    timed("up", lambda: J.matmat(X))
    timed("down", lambda: J.rmatmat(Y))


if __name__ == "__main__":
    main()
