"""A small deterministic program under a journal, and a server that runs it in processes made to be killed.

`python journal_program.py` imports torch once and forks a child for each attempt that it is asked for (a line of JSON
on stdin, a line in answer). The child works in a real folder and is ended by a real SIGKILL: at a given event (a block,
and before and after each write, flush to the disk and rename), or by its parent after a given time.
"""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ggjac import runs
from ggjac.runs.journal import Journal, JournalError

IDENTITY = {"dtype": "float32", "tokens": [1, 2, 3], "model": {"fingerprint": "abc", "bytes": 7}}
PRODUCTS, BLOCKS = 4, 5


def program(journal: Journal, block_done: Callable[[], None] = lambda: None) -> list[Tensor]:
    """Apply stacks of matrices, up and down, each to what the last one gave; some in bfloat16, some oddly laid out."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(BLOCKS, 48, 48, generator=generator) / 7
    X = torch.randn(5, 48, generator=generator)
    found = []
    for number in range(PRODUCTS):
        kind = ("up", "down")[number % 2]
        dtype = torch.bfloat16 if number == 1 else torch.float32
        product = journal.product(kind, [X])
        if product.result is None:
            H, count = product.state or [X.to(dtype), torch.zeros((), dtype=torch.int64)]
            for i in range(product.done, BLOCKS):
                W = (weights[i] if kind == "up" else weights[-1 - i].T).to(dtype)
                H = torch.tanh(H @ W) + H
                if number == 2:  # neither contiguous nor aligned
                    H = torch.cat([torch.zeros(1, 5), H.T])[1:].T
                count = count + 1
                block_done()
                H, count = product.reached(i + 1, lambda kept=(H, count): list(kept))
            result = product.finish([H, count, H > 0])
        else:
            result = product.result
        found += result
        X = result[0].float() * 1.01
        if number == 1:
            share = journal.remember("share", lambda: {"share": float(X.sum()), "pair": (1, 2)})  # noqa: B023
            X = X + share["share"] + share["pair"][0]
    return found


def digest(tensors: list[Tensor]) -> str:
    """Return a hash of dtypes, shapes and bits, by other means than the journal's own."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parts = [(str(t.dtype), t.shape, t.view(integers[t.element_size()]).tolist()) for t in tensors]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def attempt(order: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """Run the program once as ordered, in this process, which may not survive it."""
    events = 0

    def event() -> None:
        nonlocal events
        events += 1
        if events == order.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            event()
            result = original(*args, **options)
            event()
            return result

        setattr(owner, name, watched)

    for owner, name in ((os, "replace"), (os, "fsync"), (runs.TensorWriter, "write")):
        around(owner, name)
    if "file_limit" in order:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"],) * 2)

    def block_done() -> None:
        tell({"block": 1})
        event()
        time.sleep(order.get("block_seconds", 0))

    warnings: list[str] = []
    try:
        with Journal.open(
            order["folder"],
            IDENTITY,
            resume=order.get("resume", (Path(order["folder"]) / "lock").exists()),
            every=order.get("every", 0.0),
            on_warning=warnings.append,
        ) as journal:
            tell({"digest": digest(program(journal, block_done))})
            if order.get("remove"):
                journal.remove()
    except JournalError as error:
        tell({"error": str(error)})
    tell({"events": events, "warnings": warnings})


def forked(order: dict[str, Any]) -> dict[str, Any]:
    """Run an attempt in a child; return all it told before its end, and whether it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            attempt(order, lambda told: os.write(writer, (json.dumps(told) + "\n").encode()) and None)
        finally:
            os._exit(0)
    os.close(writer)
    if "kill_after" in order:
        time.sleep(order["kill_after"])
        os.kill(child, signal.SIGKILL)
    with open(reader) as file:
        told = [json.loads(line) for line in file]
    _, status = os.waitpid(child, 0)
    answer = {"blocks": sum(part.pop("block", 0) for part in told), "killed": os.WIFSIGNALED(status)}
    for part in told:
        answer |= part
    return answer


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(forked(json.loads(line))), flush=True)
