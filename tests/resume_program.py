"""`ggjac` in processes made to be killed: a server that imports torch once and forks a child for each attempt.

A line of JSON on stdin, `{"arguments": [...], "folder": "...", "end": N, "how": "kill"}`, is one attempt: the command
runs in a real process, writes a checkpoint at every block, and ends itself at its N-th event (a block, and before and
after each flush to the disk and each rename): by SIGKILL, by SIGINT as Ctrl-C does, or by a full disk from there on.
The answer is `{"code": ..., "signal": ..., "events": ..., "stderr": "..."}`.
"""

import errno
import json
import math
import os
import pkgutil
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import ggjac
import ggjac.jacobian
from ggjac import session, ways
from ggjac.cli import main
from ggjac.jacobian import tapes
from ggjac.report import page


class Events:
    """Counts events, and ends the process at one of them."""

    def __init__(self, end: int | None, how: str, log: int):
        self.end, self.how, self.log, self.count, self.full = end, how, log, 0, False

    def __call__(self, kind: str) -> None:
        self.count += 1
        os.pwrite(self.log, b"%08d" % self.count, 0)
        if self.count == self.end:
            if self.how == "full":
                self.full = True
            else:
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}[self.how])
        if self.full and kind == "flush":
            raise OSError(errno.ENOSPC, "No space left on device")


def around(function: Callable[..., Any], events: Events, kind: str) -> Callable[..., Any]:
    def wrapped(*args: Any, **options: Any) -> Any:
        events(kind)
        result = function(*args, **options)
        events("done")
        return result

    return wrapped


def attempt(request: dict[str, Any], log: int) -> NoReturn:
    events = Events(request.get("end"), request.get("how", "kill"), log)
    session.CHECKPOINT_SECONDS = tapes.EVERY = 0.0
    if request["arguments"][0] == "layers":  # from matrices; the others take sweeps
        ways.WORTH = -math.inf
    # Without the wait: what a killed process has written is there, and loss of power is for test_journal.py.
    os.fsync = around(os.fstat, events, "flush")
    os.replace = around(os.replace, events, "rename")
    walk = ggjac.jacobian.SharedSweep._walk

    def counted(*args: Any) -> Any:
        for step in walk(*args):
            yield step
            events("block")

    ggjac.jacobian.SharedSweep._walk = counted
    os.chdir(request["folder"])
    sys.argv = ["ggjac", *request["arguments"]]
    main()
    os._exit(0)


def serve() -> None:
    # Everything now: what a child imported later could be of another day than what its run began with.
    for module in pkgutil.walk_packages(ggjac.__path__, "ggjac."):
        if module.name not in ("ggjac.__main__", "ggjac.kernels"):  # Triton is not everywhere
            import_module(module.name)
    pages = page._environment()
    for name in pages.list_templates(extensions=["html"]):
        pages.get_template(name)  # compiled once, not by every child
    for text in sys.stdin:
        request = json.loads(text)
        folder = Path(request["folder"])
        log = os.open(folder / "events", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        child = os.fork()
        if child == 0:
            out = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                attempt(request, log)
            except SystemExit as leave:
                sys.stderr.flush()
                os._exit(leave.code if isinstance(leave.code, int) else 1)
        _, status = os.waitpid(child, 0)
        answer = {
            "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            "events": int(os.pread(log, 8, 0) or b"0"),
            "stderr": (folder / "stderr").read_text(errors="replace"),
        }
        os.close(log)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
