"""A command in several processes that share its model, as `torchrun` starts them: who speaks, who writes, and where.

All run the same command. The first one speaks and writes; what another one would write goes to a folder of its own that
is deleted in the end.
"""

import atexit
import contextlib
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

LOST = "another process of this run has ended: its own message says why, or it was killed"
SILENT = "another process of this run has not answered for a long time: its machine or the network may be down, or busy"
PATIENCE = 3.0  # seconds in which processes that all fail are expected to do so

# What several processes cannot do together: a command, or an option, perhaps with the value that asks for it.
REFUSED: dict[str, dict[str, str]] = {
    "verify": {"": "llama.cpp has the whole model to itself"},
    "jacobian": {"each_line": "--mean: several processes take prompts of their own, by --workers or --shard"},
    "contrast": {"": "autograd cannot differentiate a model that several processes share"},
    "reach": {"": "autograd cannot differentiate a model that several processes share"},
    "attribute": {
        "reads": "--reads runs in one process only: it looks at heads of a block one by one",
        "by=edge": "--by edge runs in one process only: it looks at all heads of a block one by one",
    },
    "attend": {"": "scores are split where all heads of a block are in one process"},
    "analyze": {
        "no_verify": "llama.cpp has the whole model to itself; give --no-verify, and run ggjac verify in one process",
        "contrast": "--contrast: autograd cannot differentiate a model that several processes share; leave it out",
    },
}
UNLESS = {"no_verify"}  # options that must be given
# Paths of this process's own for outputs -> what the user gave.
_given: dict[str, str] = {}


@dataclass(frozen=True)
class Together:
    """This process among those that share a model.

    Attributes:
        group: the processes.
        store: where they leave short messages for one another.
        rank, ranks: this one's number, and how many they are.
        local, locals: the same on this machine.
    """

    group: "ProcessGroup"
    store: "Store"
    rank: int
    ranks: int
    local: int
    locals: int

    def threads(self) -> int:
        """Return this process's share of the CPUs of its machine."""
        from ggjac.planner import machine

        return max(1, machine.cpus() // self.locals)

    def device(self, name: str) -> str:
        """Return the device of a name; without a number it is a GPU of its own for each process, if there are any."""
        import torch

        if name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        return f"cuda:{self.local % torch.cuda.device_count()}"

    def neighbours(self, name: str) -> int:
        """Return how many processes of this machine, with this one, use the device of a name."""
        import torch

        if name not in ("auto", "cuda") or not torch.cuda.is_available():
            return self.locals
        cards = torch.cuda.device_count()
        return len(range(self.local % cards, self.locals, cards))

    def budget(self, name: str) -> dict[str, int]:
        """Return the memory that each process may use: the least that one has free, so that all plan alike.

        What a machine or a device has free is for all processes there.
        """
        import torch
        import torch.distributed as dist

        from ggjac.planner import machine

        ram, vram = machine.default_budget() // self.locals, machine.default_vram(self.device(name))
        vram = None if vram is None else vram // self.neighbours(name)
        free = torch.tensor([ram, 2**62 if vram is None else vram])
        dist.all_reduce(free, dist.ReduceOp.MIN, group=self.group)
        return {"ram_budget": int(free[0])} | ({} if vram is None else {"vram_budget": int(free[1])})

    def same(self, path: Path | None) -> None:
        """Give the other processes the content of a file that the first one continues, if it exists."""
        from ggjac.parallel import of_first

        if path is not None:
            content = of_first(path.read_bytes() if self.rank == 0 and path.is_file() else b"", self.group)
            if self.rank and content:
                path.write_bytes(content)

    def agreed(self, found: bool) -> bool:
        """Return what the first process has found, where only it can look."""
        from ggjac.parallel import of_first

        return of_first(bytes([found]), self.group) == b"\x01"

    def say(self, message: str) -> None:
        """Print an error once, whichever process it is of: the first one's, or one that the first has not met.

        That others are lost is said by one of them, if no process has said why.
        """
        message = as_given(message)
        if message.removeprefix("Error: ") in (LOST, SILENT):
            if not self._told(PATIENCE, "first", "error") and self._is_first_to("lose"):
                self._print(message)
        elif self.rank == 0:
            self._tell("first", message)
            self._print(message)
        elif self._told(PATIENCE, "first") != message:
            self._tell("error", message)
            self._print(message)

    def _print(self, message: str) -> None:
        """Print an error, of another process than the first one with its number."""
        if self.rank == 0:
            click.echo(message, err=True)
        else:
            _stderr().write(f"Error: process {self.rank} of {self.ranks}: {message.removeprefix('Error: ')}\n")
            _stderr().flush()

    def _is_first_to(self, do: str) -> bool:
        """Return whether no other process has begun to do something, or none can be asked."""
        try:
            return self.store.add(do, 1) == 1
        except RuntimeError:  # whoever served the store has ended
            return True

    def _tell(self, key: str, message: str) -> None:
        """Leave a message for the others, if they can still read it."""
        with contextlib.suppress(RuntimeError):
            self.store.set(key, message)

    def failed(self) -> bool:
        """Return whether another process has failed and said so."""
        return bool(self._told(0.0, "error"))

    def _told(self, patience: float, *keys: str) -> str:
        """Return what another process has left under one of some keys, or nothing."""
        until = time.monotonic() + patience
        try:
            while not (found := [key for key in keys if self.store.check([key])]):
                if time.monotonic() >= until:
                    return ""
                time.sleep(0.05)
            return self.store.get(found[0]).decode()
        except RuntimeError:  # whoever served the store has ended
            return ""


@functools.cache
def here() -> Together | None:
    """Join the other processes, at the first call; None if this process is alone."""
    given = os.environ
    if int(given.get("WORLD_SIZE", "1")) < 2 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= given.keys():
        return None
    from ggjac.parallel import join

    group, store = join()
    store.set_timeout(timedelta(seconds=60))
    local, locals = int(given.get("LOCAL_RANK", "0")), int(given.get("LOCAL_WORLD_SIZE", "1"))
    found = Together(group, store, int(given["RANK"]), int(given["WORLD_SIZE"]), local, locals)
    if found.rank:
        _stderr()
        sys.stdout.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    return found


@functools.cache
def _stderr() -> Any:
    """Return stderr as it was when the process began."""
    return os.fdopen(os.dup(2), "w", errors="backslashreplace")


@functools.cache
def scratch() -> Path:
    """Return a folder for what only the first process is to write."""
    folder = Path(tempfile.mkdtemp(prefix="ggjac-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def own(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Return an output path: as given, or for another process than the first one of its own."""
    place = here()
    if value is None or not (place and place.rank):
        return value
    found = scratch() / str(len(_given)) / value.name
    found.parent.mkdir()
    _given[str(found)] = str(value)
    return found


def as_given(message: str) -> str:
    """Return a message in which outputs have the paths that the user gave them."""
    for path, given in _given.items():
        message = message.replace(path, given)
    return message


def refuse(command: str, params: Mapping[str, Any]) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        click.UsageError: with the reason.
    """
    if here() is None:
        return
    for option, reason in REFUSED.get(command, {}).items():
        if not option:
            raise click.UsageError(f"{command} runs in one process only: {reason}")
        name, _, value = option.partition("=")
        if params.get(name) == value if value else bool(params.get(name)) != (name in UNLESS):
            raise click.UsageError(reason)
    if params.get("trace"):
        raise click.UsageError("--trace keeps the forward pass of one process; leave it out, or use one process")
