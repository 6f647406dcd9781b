"""What is said while a command works: rates, and how long the rest takes, on a clock of our own."""

import threading
from collections.abc import Iterator

import pytest

from ggjac import session
from ggjac.analysis.svd import sweeps_left
from ggjac.cli import progress
from ggjac.cli.progress import Reporter


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(session, "time", clock)
    return clock


def test_plain_lines_come_every_few_seconds_with_rates(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    report = Reporter(quiet=False)
    done = {"bytes": 5e9, "flop": 0.0}  # what was read before this stage is not its own
    report.work = lambda: (done["bytes"], done["flop"])
    with report.stage("svd") as update:
        for block in range(1, 11):
            time.now += 2
            done["bytes"] += 3e9
            done["flop"] += 1e11
            update("sweep 1, block", block, 10, rounds=2)
    out = capsys.readouterr()
    assert not out.out
    assert out.err.splitlines() == [
        "svd: sweep 1, block 3/10, 6 s, 1.50 GB/s, 50 GFLOP/s, about 54 s left",
        "svd: sweep 1, block 6/10, 12 s, 1.50 GB/s, 50 GFLOP/s, about 48 s left",
        "svd: sweep 1, block 9/10, 18 s, 1.50 GB/s, 50 GFLOP/s, about 42 s left",
    ]
    assert report.seconds == {"svd": 20.0}


def test_what_was_resumed_counts_for_no_rate(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """A stage that begins at step 90 of 100 has done only what it did itself."""
    report = Reporter(quiet=False)
    with report.stage("svd") as update:
        for step in range(91, 93):
            time.now += 3
            update("block", step, 100)
    assert capsys.readouterr().err == "svd: block 92/100, 6 s, about 24 s left\n"


def test_a_stage_that_does_not_get_on_says_that_it_is_at_work(
    time: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As while llama.cpp rewrites a file; without a terminal nothing else would be seen for minutes."""
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.001)
    beats = threading.active_count()
    with Reporter(quiet=False).stage("verify") as update:
        assert _first_line(capsys) == "verify: 0 s"
        update("rewriting", 1, 3)
        time.now += 42
        while (line := _first_line(capsys)) == "verify: 0 s":  # said before the step
            pass
        assert line in ("verify: rewriting 1/3, 0 s", "verify: rewriting 1/3, 42 s")
    assert threading.active_count() == beats


def _first_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Wait for a line, and not for ever."""
    for _ in range(10_000):
        if err := capsys.readouterr().err:
            return err.splitlines()[0]
        threading.Event().wait(0.001)
    pytest.fail("nothing was said")


def test_quiet_says_nothing(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(quiet=True).stage("svd") as update:
        time.now += 60
        update("block", 1, 2, rounds=3)
    assert capsys.readouterr() == ("", "")


def test_sweeps_left_follow_the_residual() -> None:
    assert sweeps_left([], 1, 1e-3) == 7  # nothing known yet: eight in all
    assert sweeps_left([0.1], 2, 1e-3) == 6
    assert sweeps_left([1.0, 0.1], 3, 1e-3) == 1  # falls tenfold each sweep: two more, the one at work among them
    assert sweeps_left([1.0, 0.5, 0.25], 4, 1 / 64) == 3
    assert sweeps_left([0.1, 0.2], 30, 1e-3) == 0  # does not fall: no promise


def test_a_rate_that_would_read_zero_is_left_out(time: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    report, done = Reporter(quiet=False), [0, 0]
    report.work = lambda: (done[0], done[1])
    with report.stage("layers") as update:
        for amount in (4_000_000, 16_000_000):
            time.now += 10
            done[:] = [10 * amount, 10 * amount]
            update("block", 1, 2)
            time.now += 10
            done[:] = [20 * amount, 20 * amount]
            update("block", 1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert ["0.0" in line for line in lines] == [False, False, True, True]
    assert not any("FLOP" in line for line in lines)
