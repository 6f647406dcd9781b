"""Attempts at commands in real processes, for the other programs here, and their results to the last bit.

Torch is imported once; each attempt is a forked child that runs a command of ggjac in a folder, with its output in
files beside it, and writes a checkpoint whenever it can.
"""

import argparse
import json
import os
import pkgutil
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from safetensors.numpy import load_file

import ggjac
from ggjac import session
from ggjac.cli import main
from ggjac.gguf.hub import demo_path
from ggjac.jacobian import tapes

TOKENS = "0,465,637,719"
PROMPTS = "prompts.txt"  # beside the folders of attempts, with the lines below
LINES = ("The bridge", "The bridge out of Marin", "The opposite of hot is")
# Parts of a result that no two runs share.
APART = ("created", "command", "seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class Job:
    """A command and what it saves.

    Attributes:
        arguments: of the command line, without model and trace.
        output: name of the file or folder.
        resumed: whether `--resume` continues it; otherwise the same command does.
        traced: whether it keeps its forward pass in a folder `trace`.
    """

    arguments: tuple[str, ...]
    output: str
    resumed: bool = True
    traced: bool = False

    @property
    def name(self) -> str:
        """The command, and whether it has a trace."""
        return self.arguments[0] + (" --trace" if self.traced else "")

    def command(self, model: Path | str, folder: Path) -> list[str]:
        """Return the command line with which a user would go on in a folder: with `--resume` where there is a run."""
        words = [*self.arguments, "-m", str(model), "-t", "1", "-q", "-o", self.output]
        words += ["--trace", "trace"] if self.traced else []
        return [*words, "--resume"] if self.resumed and self.checkpoint(folder).exists() else words

    def checkpoint(self, folder: Path) -> Path:
        """Return the folder of its checkpoint."""
        inside = self.arguments[0] == "analyze"
        return folder / self.output / "checkpoint" if inside else folder / f"{self.output}.checkpoint"

    def complete(self, folder: Path) -> bool:
        """Return whether what is in a folder shows that it has ended well; a file that grows does not show it."""
        file = folder / self.output / "report.html" if self.arguments[0] == "analyze" else folder / self.output
        return self.resumed and file.exists() and not self.checkpoint(folder).exists()

    def result(self, folder: Path) -> dict[str, Any]:
        """Return all that it saved, without what no two runs share."""
        path = folder / self.output
        if path.suffix == ".jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            return {str(i): {k: v for k, v in record.items() if k not in APART} for i, record in enumerate(records)}
        if path.is_file():
            return dict(load_file(path))
        content = json.loads((path / "run.json").read_text())
        content = {key: value for key, value in content.items() if key not in APART}
        content["model"] = {key: value for key, value in content["model"].items() if key != "path"}
        return {**load_file(path / "tensors.safetensors"), "run.json": content}


_PROMPT = ("--tokens", TOKENS)
_BASES = (
    Job(("analyze", *_PROMPT, "-k", "2", "--no-verify"), "run"),
    Job(("svd", *_PROMPT, "-k", "2"), "svd.safetensors"),
    Job(("layers", *_PROMPT, "-k", "1", "--layers", "2", "--maps", "cumulative"), "layers.safetensors"),
    Job(("jacobian", *_PROMPT), "jacobian.safetensors"),
    Job(("ranks", *_PROMPT), "ranks.jsonl", resumed=False),
)
# Several prompts have no trace.
_MANY = Job(("ranks", "-f", f"../{PROMPTS}"), "ranks.jsonl", resumed=False)
JOBS = (*_BASES[:-1], _MANY, *(Job(job.arguments, job.output, job.resumed, traced=True) for job in _BASES))


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that the tools share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one command, such as svd [all]")
    parser.add_argument("--model", type=Path, help="[the demo model]")
    parser.add_argument("--folder", type=Path, help="where to make a temporary folder")
    return parser


def chosen(only: str | None) -> list[Job]:
    """Return the jobs of one command, or all."""
    return [job for job in JOBS if only in (None, job.arguments[0])]


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: its exit code, or the signal that killed it; its messages; and after how long."""

    code: int | None
    signal: int | None
    stderr: str
    seconds: float


class Attempt:
    """A command that runs in a process of its own."""

    def __init__(self, arguments: list[str], folder: Path, prepare: Callable[[], object] = lambda: None):
        self._log = TemporaryFile()  # noqa: SIM115 (closed in `wait`); not in the folder, whose disk may be full
        self._began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _run(arguments, folder, self._log.fileno(), prepare)

    def kill(self) -> None:
        """End it as nothing can prevent."""
        os.kill(self.pid, signal.SIGKILL)

    def running(self) -> bool:
        """Return whether it has not ended."""
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return ended is None

    def wait(self) -> Ended:
        """Wait until it has ended."""
        _, status = os.waitpid(self.pid, 0)
        seconds = time.monotonic() - self._began
        with self._log:
            self._log.seek(0)
            text = self._log.read().decode(errors="replace")
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        return Ended(code, os.WTERMSIG(status) if os.WIFSIGNALED(status) else None, text, seconds)


def _run(arguments: list[str], folder: Path, log: int, prepare: Callable[[], object]) -> None:
    """Be the child: run a command and exit."""
    code = 70
    try:
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        session.CHECKPOINT_SECONDS = tapes.EVERY = tapes.ABANDONED = 0.0
        prepare()
        sys.argv = ["ggjac", *arguments]
        main()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def attempt(arguments: list[str], folder: Path, *, kill_after: float | None = None, **options: Any) -> Ended:
    """Run a command to its end, or kill it after some seconds."""
    running = Attempt(arguments, folder, **options)
    if kill_after is not None:
        end = time.monotonic() + kill_after
        while time.monotonic() < end and running.running():
            time.sleep(0.001)
        running.kill()
    return running.wait()


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Name what differs between two results, in any bit; of JSON, the parts."""
    found = []
    for key in sorted(a.keys() | b.keys()):
        if isinstance(a.get(key), dict) and isinstance(b.get(key), dict):
            found += [f"{key}.{name}" for name in differing(a[key], b[key])]
        elif key not in a or key not in b or not _same(a[key], b[key]):
            found.append(key)
    return found


def _same(a: Any, b: Any) -> bool:
    if hasattr(a, "tobytes"):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    return bool(a == b)


def leftovers(folder: Path) -> list[str]:
    """Return the temporary files in a folder."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*.tmp")]


def one_line(ended: Ended) -> bool:
    """Return whether an attempt failed as it should: an exit code, and one line that says why."""
    errors = [line for line in ended.stderr.splitlines() if line and not line.startswith("Warning: ")]
    return ended.code in (1, 2, 4) and len(errors) == 1 and errors[0].startswith("Error: ") and "bug" not in errors[0]


@dataclass(frozen=True)
class Whole:
    """An attempt that nothing disturbed: its result, and how long it took."""

    result: dict[str, Any]
    seconds: float


def undisturbed(job: Job, model: Path | str, folder: Path) -> Whole:
    """Run a job in a new folder, which is removed."""
    ended = attempt(job.command(model, folder), folder)
    if ended.code != 0:
        raise SystemExit(f"{job.name} does not run here: {ended.stderr}")
    whole = Whole(job.result(folder), ended.seconds)
    shutil.rmtree(folder)
    return whole


@contextmanager
def workplace(given: Path | None) -> Iterator[Path]:
    """Yield a folder for attempts, with everything imported that they need; it is removed in the end."""
    for module in pkgutil.walk_packages(ggjac.__path__, "ggjac."):
        if module.name not in ("ggjac.__main__", "ggjac.kernels"):  # Triton is not everywhere
            import_module(module.name)
    with TemporaryDirectory(prefix="ggjac-reliability-", dir=given) as folder:
        (Path(folder) / PROMPTS).write_text("\n".join(LINES))
        yield Path(folder)


def copied_model(folder: Path, given: Path | None) -> Path:
    """Return a copy of a model, by default the demo's, in a folder of its own."""
    target = folder / "model" / "model.gguf"
    target.parent.mkdir(exist_ok=True)
    return Path(shutil.copy(given or demo_path(), target))


def show(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """Print figures as a table of Markdown."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
