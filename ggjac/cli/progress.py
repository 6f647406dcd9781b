"""Progress on stderr: a live line on a terminal, a plain line every few seconds elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ggjac.jacobian import Progress
from ggjac.session import Stages
from ggjac.units import duration

PLAIN_SECONDS = 5.0  # between lines without a terminal; also the patience before the first one
SILENT_SECONDS = 10.0  # there, before the first line of a stage that reports nothing; then twice as long, and so on


class Reporter(Stages):
    """Stages that are shown on stderr as they go; rates are shown once `work` is set."""

    def __init__(self, quiet: bool):
        super().__init__()
        self.quiet = quiet

    @contextmanager
    def reporting(self, name: str, start: float) -> Iterator[Progress]:
        """Yield the function that shows how far this stage is."""
        if self.quiet:
            yield lambda what, done, total, rounds=0: None
        elif sys.stderr.isatty():
            with self._live(name, start) as update:
                yield update
        else:
            with self._plain(name, start) as update:
                yield update

    @contextmanager
    def _live(self, name: str, start: float) -> Iterator[Progress]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[detail]}"))
        with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as live:
            task: Any = live.add_task(name, total=None, detail="")
            rates = self._rates(start)

            def update(what: str, done: int, total: int, rounds: int = 0) -> None:
                text = f"{what} {done}/{total}{rates(done, total, rounds)}"
                live.update(task, completed=done, total=total, detail=text)

            yield update

    @contextmanager
    def _plain(self, name: str, start: float) -> Iterator[Progress]:
        last, step = start, ""
        rates = self._rates(start)
        heard, ended = threading.Event(), threading.Event()

        def update(what: str, done: int, total: int, rounds: int = 0) -> None:
            nonlocal last, step
            heard.set()
            step = f"{what} {done}/{total}, "
            text = rates(done, total, rounds)
            now = time.perf_counter()
            if now - last >= PLAIN_SECONDS:
                last = now
                print(f"{name}: {step}{duration(round(now - start))}{text}", file=sys.stderr, flush=True)

        def wait() -> None:
            """Print a line now and then for a stage that reports nothing for long, as the steps of llama.cpp do."""
            patience = SILENT_SECONDS
            while not ended.wait(patience):
                if heard.is_set():
                    heard.clear()
                    patience = SILENT_SECONDS
                    continue
                with suppress(OSError, ValueError):  # stderr has been closed
                    print(f"{name}: {step}{duration(round(time.perf_counter() - start))}", file=sys.stderr, flush=True)
                patience *= 2

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        try:
            yield update
        finally:
            ended.set()
            waiting.join()

    def _rates(self, start: float) -> Callable[[int, int, int], str]:
        """Return a function that formats the rates of this stage so far, and the time that is left at this speed."""
        steps = 0
        before = self.work() if self.work else (0, 0)

        def rates(done: int, total: int, rounds: int) -> str:
            nonlocal steps
            steps += 1
            elapsed = time.perf_counter() - start
            left = elapsed / steps * (total - done + rounds * total)
            shown = ""
            if self.work:  # rates that would read 0 say nothing
                nbytes, flop = (now - then for now, then in zip(self.work(), before, strict=True))
                shown = f", {nbytes / elapsed / 1e9:.2f} GB/s" if nbytes >= 5e6 * elapsed else ""
                shown += f", {flop / elapsed / 1e9:.0f} GFLOP/s" if flop >= 5e8 * elapsed else ""
            # The first seconds measure only the start.
            return shown + (f", about {duration(round(left))} left" if elapsed > 2 and left >= 1 else "")

        return rates
