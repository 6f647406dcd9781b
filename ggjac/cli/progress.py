"""Progress on stderr: a live line on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PLAIN_SECONDS = 5.0  # between lines without a terminal; also the patience before the first one


class Reporter:
    """Report one stage of the work after another, and remember how long each took."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str, int, int], None]]:
        """Yield a function to be called with a detail, the steps done and their total; time the block."""
        start = time.perf_counter()
        try:
            if self.quiet:
                yield lambda detail, done, total: None
            elif sys.stderr.isatty():
                with self._live(name) as update:
                    yield update
            else:
                yield self._plain(name, start)
        finally:
            self.seconds[name] = round(time.perf_counter() - start, 3)

    @contextmanager
    def _live(self, name: str) -> Iterator[Callable[[str, int, int], None]]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[detail]}"))
        with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as live:
            task: Any = live.add_task(name, total=None, detail="")

            def update(detail: str, done: int, total: int) -> None:
                live.update(task, completed=done, total=total, detail=f"{detail} {done}/{total}")

            yield update

    def _plain(self, name: str, start: float) -> Callable[[str, int, int], None]:
        last = start

        def update(detail: str, done: int, total: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if now - last >= PLAIN_SECONDS:
                last = now
                print(f"{name}: {detail} {done}/{total}, {now - start:.0f} s", file=sys.stderr, flush=True)

        return update
