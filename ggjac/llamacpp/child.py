"""Run llama.cpp in a child process, so that a crash becomes an error message.

llama.cpp ends its process in many cases: assertions abort, exceptions escape from threads, and some damaged files make
it read invalid memory. So it is never called in this process. `Child` starts `python -m ggjac.llamacpp.server`, which
does not import torch, and talks to it with one JSON object per line: requests on its stdin, replies on its stdout,
arrays as .npy files in a folder that the request names. The output and log of llama.cpp and of the child go to a file
that is read if the child dies.

Messages may quote files and paths unescaped: callers must escape them before printing (`ggjac.tokenizer.visible`).
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import Any

# -P: do not import from the current folder, unless this process does.
COMMAND = (sys.executable, "-P", "-m", "ggjac.llamacpp.server")


class LlamaCppError(ValueError):
    """llama.cpp refused, failed, or cannot be started."""

    def __init__(self, message: str, *, will_not_fit: bool = False):
        super().__init__(message)
        self.will_not_fit = will_not_fit  # for lack of memory or disk


class LlamaCppDied(LlamaCppError):
    """llama.cpp ended the child process; the message names the signal and quotes the last line of its log."""


def missing() -> str | None:
    """Return what to install if llama.cpp is missing, else None. (Whether it loads is found out by a child.)"""
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed: pip install llama-cpp-python"
    return None


class Child:
    """A running `python -m ggjac.llamacpp.server`. It ends at `close`, or when this process ends.

    Starting one takes 0.1 to 0.2 s. Only one thread at a time may call `ask`.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()  # the parent: after a fork the child must not be used
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`; an unread pipe would fill up
        # It finds modules where this process does. GGML_NO_BACKTRACE keeps ggml from starting a debugger.
        path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
        env = os.environ | {"PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"}
        try:
            self._process = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=env
            )
        except OSError as error:
            self._log.close()
            raise LlamaCppError(f"a process for llama.cpp cannot be started ({error})") from None

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, call: str, **arguments: Any) -> Any:
        """Call one of `Server`'s methods in the child and return its result.

        Raises:
            LlamaCppDied: the child ended, most likely because of llama.cpp.
            LlamaCppError: the error of llama.cpp or of the child.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            try:
                self._process.stdin.write(json.dumps([call, arguments]).encode() + b"\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = b""
            if not line.endswith(b"\n"):
                raise self._death()
        except BaseException:  # above all Ctrl-C: the child must stop working
            self.close(kill=True)
            raise
        self._log.seek(0)
        self._log.truncate()
        reply = json.loads(line)
        if "error" in reply:
            raise LlamaCppError(reply["error"], will_not_fit=reply["will_not_fit"])
        return reply["result"]

    @property
    def closed(self) -> bool:
        """Return whether it has ended."""
        return self._log.closed

    def close(self, *, kill: bool = False) -> None:
        """End the child by closing its stdin; with `kill` at once. Can be called repeatedly."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if kill and self.pid == os.getpid():
            self._process.kill()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _death(self) -> LlamaCppDied:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return LlamaCppDied("its process no longer answers")
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4096))
        lines = [line.strip() for line in self._log.read().decode("utf-8", errors="replace").splitlines()]
        words = next(filter(None, reversed(lines)), "it gave no reason")
        # An assertion contains the source file's path on the machine that compiled it.
        words = re.sub(r"^\S*[/\\](?=[\w.-]+:\d+: )", "", words)[:400]
        if code >= 0:
            return LlamaCppDied(f"exit code {code}: {words}")
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        # The kernel kills the process that takes the last memory.
        return LlamaCppDied(f"{name}: {words}", will_not_fit=name == "SIGKILL")
