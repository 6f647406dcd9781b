"""Run llama.cpp in a child process, so that a crash becomes an error message.

llama.cpp ends its process in many cases: assertions abort, exceptions escape from threads, and some damaged files make
it read invalid memory. So it is never called in this process. `Child` starts `python -m ggjac.llamacpp.server`, which
does not import torch, and talks to it with one JSON object per line: requests on its stdin, replies on its stdout,
arrays as .npy files in a folder that the request names. The output and log of llama.cpp and of the child go to a file
that is read if the child dies.

Messages may quote files and paths unescaped: callers must escape them before printing (`ggjac.display.visible`).
"""

import importlib.util
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from typing import Any, BinaryIO

# A child that works uses the processor, or waits for a disk. One that has done neither for so many seconds hangs.
PATIENCE = 120.0
LONGEST_REPLY = 1 << 28  # bytes; token ids of a long prompt are a few MiB

# What the child writes to its log before and after it loads llama.cpp's library: an end between is not a file's fault.
LOADING, LOADED = "ggjac: loading llama.cpp", "ggjac: loaded llama.cpp"
REINSTALL = "reinstall llama-cpp-python"
OTHER_PROCESSOR = (
    "this build of llama-cpp-python is for another processor: reinstall it from source, with pip install "
    "--force-reinstall --no-deps --no-binary llama-cpp-python llama-cpp-python"
)

# -P: do not import from the current folder, unless this process does.
COMMAND = (sys.executable, "-P", "-m", "ggjac.llamacpp.server")


class LlamaCppError(ValueError):
    """llama.cpp refused, failed, or cannot be started."""

    def __init__(self, message: str, *, will_not_fit: bool = False):
        super().__init__(message)
        self.will_not_fit = will_not_fit  # for lack of memory or disk


class LlamaCppDied(LlamaCppError):
    """llama.cpp ended the child process; the message names the signal and quotes the last line of its log.

    Attributes:
        likely: the most likely cause; None if it is not known.
    """

    def __init__(self, message: str, *, will_not_fit: bool = False, likely: str | None = None):
        super().__init__(message, will_not_fit=will_not_fit)
        self.likely = likely


def missing() -> str | None:
    """Return what to install if llama.cpp is missing, else None. (Whether it loads is found out by a child.)"""
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed: pip install llama-cpp-python"
    return None


class Child:
    """A running `python -m ggjac.llamacpp.server`. It ends at `close`, or when this process ends.

    Starting one takes 0.1 to 0.2 s. Only one thread at a time may call `ask`. One that does not work for `patience`
    seconds hangs, or for `PATIENCE`, if that is less.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = min(patience, PATIENCE)
        self.pid = os.getpid()  # the parent: after a fork the child must not be used
        self._log = _log_file()
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
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="ggjac-llama.cpp", daemon=True).start()

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
        try:
            try:
                self._process.stdin.write(json.dumps([call, arguments]).encode() + b"\n")
                self._process.stdin.flush()
                line = self._next_line()
            except BrokenPipeError:
                line = b""
            if not line.endswith(b"\n"):
                raise self._death()
            reply = _parsed(line)
        except BaseException:  # above all Ctrl-C: the child must stop working
            self.close(kill=True)
            raise
        self._log.seek(0)
        self._log.truncate()
        if "error" in reply:
            raise LlamaCppError(str(reply["error"]), will_not_fit=bool(reply.get("will_not_fit")))
        return reply["result"]

    def _listen(self) -> None:
        """Queue the lines of the child's stdout; an incomplete or empty one is the last."""
        assert self._process.stdout is not None
        with self._process.stdout as replies:
            while (line := replies.readline(LONGEST_REPLY)).endswith(b"\n"):
                self._lines.put(line)
            self._lines.put(line)

    def _next_line(self) -> bytes:
        """Return the next line of the child's stdout, as long as it works on it.

        Raises:
            LlamaCppError: it hangs.
        """
        waited, before = 0.0, self._work()
        while True:
            step = min(1.0, self.patience / 4)
            try:
                return self._lines.get(timeout=step)
            except queue.Empty:
                work = self._work()
                waited, before = (0.0 if work != before else waited + step), work
            if waited >= self.patience:
                raise LlamaCppError(f"llama.cpp hangs: its process did nothing for {self.patience:g} s, and was ended")

    def _work(self) -> object:
        """Return what changes while the child works: its processor time, and anything while it waits for a disk."""
        import psutil

        try:
            process = psutil.Process(self._process.pid)
            times = process.cpu_times()
            return object() if process.status() == psutil.STATUS_DISK_SLEEP else (times.user, times.system)
        except psutil.Error:  # it has ended, or the system does not say
            return None

    @property
    def closed(self) -> bool:
        """Return whether it has ended."""
        return self._log.closed

    def close(self, *, kill: bool = False) -> None:
        """End the child by closing its stdin; with `kill` at once. Can be called repeatedly."""
        assert self._process.stdin is not None
        if self.closed:
            return
        if kill and self.pid == os.getpid():
            self._process.kill()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _death(self) -> LlamaCppDied:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4096))
        lines = [line.strip() for line in self._log.read().decode("utf-8", errors="replace").splitlines()]
        loading = next((line == LOADING for line in reversed(lines) if line in (LOADING, LOADED)), False)
        words = next((line for line in reversed(lines) if line and line not in (LOADING, LOADED)), "it gave no reason")
        # An assertion contains the source file's path on the machine that compiled it.
        words = re.sub(r"^\S*[/\\](?=[\w.-]+:\d+: )", "", words)[:400]
        likely = f"its library cannot be loaded: {REINSTALL}" if loading else None
        if code is None:
            return LlamaCppDied(f"its process no longer answers: {words}", likely=likely)
        if code >= 0:
            return LlamaCppDied(f"exit code {code}: {words}", likely=likely)
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        if name == "SIGILL":
            likely = OTHER_PROCESSOR
        elif name == "SIGKILL":  # the kernel kills the process that takes the last memory
            likely = "there is too little memory"
        return LlamaCppDied(f"{name}: {words}", will_not_fit=name == "SIGKILL", likely=likely)


def _log_file() -> BinaryIO:
    """Return a file without a name for the child's log: an unread pipe would fill up.

    Raises:
        LlamaCppError: there is no folder for it.
    """
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        if hasattr(os, "memfd_create"):
            return open(os.memfd_create("ggjac-llama.cpp"), "w+b")
        raise LlamaCppError(f"no temporary folder ({error.strerror}): set TMPDIR to one that can be written") from None


def _parsed(line: bytes) -> dict[str, Any]:
    """Return a reply of the child.

    Raises:
        LlamaCppError: it is not one.
    """
    try:
        reply = json.loads(line)
    except ValueError:
        reply = None
    if not isinstance(reply, dict) or not reply.keys() & {"error", "result"}:
        raise LlamaCppError(f"llama.cpp's process answered {line[:40]!r}, which is not a reply: {REINSTALL}")
    return reply
