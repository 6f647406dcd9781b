"""llama.cpp in a child process: whatever a file makes it do, this process goes on and can say what happened.

llama.cpp ends its process on much that it does not expect: assertions abort, exceptions leave threads, and some
damaged files make it read where nothing is. So nobody here calls it in their own process. `Child` starts
`python -m ggjac.llamacpp.server`, which imports no torch, and asks it: one JSON object per line, requests on its stdin,
replies on its stdout, arrays as .npy files in a folder that the request names. What llama.cpp and the child print or
log goes to a file that is read when the child has died.

Messages may quote files and paths as they are: callers must escape them before printing (`ggjac.tokenizer.visible`).
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the parent needs it only when arrays come back, and the child gets it with llama.cpp
    pass

# -P: no module is taken from the current folder, unless this process takes modules from there too.
COMMAND = (sys.executable, "-P", "-m", "ggjac.llamacpp.server")


class LlamaCppError(ValueError):
    """llama.cpp refused, failed, or cannot be asked at all."""

    def __init__(self, message: str, *, will_not_fit: bool = False):
        super().__init__(message)
        self.will_not_fit = will_not_fit  # memory or disk is too small


class LlamaCppDied(LlamaCppError):
    """llama.cpp ended its own process; the message names the signal and quotes its last line."""


def missing() -> str | None:
    """Say what to install where llama.cpp is not there; None where it is (whether it loads, a child will tell)."""
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed: pip install llama-cpp-python"
    return None


class Child:
    """A running `python -m ggjac.llamacpp.server`. It ends with `close`, and by itself when this process is gone.

    Starting one takes 0.1 to 0.2 s. One thread at a time may ask.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()  # whose child it is: after a fork it is not ours to ask
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`; an unread pipe would fill up
        # It shall find modules where this process finds them. GGML_NO_BACKTRACE: ggml would start a debugger.
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
        """Return the child's answer to a call of one of `Server`'s methods.

        Raises:
            LlamaCppDied: the child ended, most likely because llama.cpp ended it.
            LlamaCppError: what llama.cpp or the child said.
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
        except BaseException:  # Ctrl-C above all: it must not go on working
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
        """Tell whether it has ended."""
        return self._log.closed

    def close(self, *, kill: bool = False) -> None:
        """End the child: it goes when its stdin is closed. More than once does no harm."""
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
        # An assertion names its file by the path on the machine that compiled it.
        words = re.sub(r"^\S*[/\\](?=[\w.-]+:\d+: )", "", words)[:400]
        if code >= 0:
            return LlamaCppDied(f"exit code {code}: {words}")
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        # The kernel's way to end who takes the last memory.
        return LlamaCppDied(f"{name}: {words}", will_not_fit=name == "SIGKILL")
