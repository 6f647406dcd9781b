"""The journal under real kills, losses of power, full disks and damaged files: the same bits, or a clear refusal."""

import errno
import gc
import hashlib
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_program import BLOCKS, IDENTITY, PRODUCTS, digest, program
from safetensors.torch import load_file, save_file
from torch import Tensor

from ggjac import runs
from ggjac.runs import journal as module
from ggjac.runs.journal import Journal, JournalError
from ggjac.runs.tensors import NAMES, load_tensors, plain, save_tensors

ALL = PRODUCTS * BLOCKS
FINISHED = {"journal.json", "lock", "results.json", "state.safetensors"} | {
    f"product-{number:04d}.safetensors" for number in range(PRODUCTS)
}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are tested with fork and SIGKILL")
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Return a function that runs the program in a process of its own, as `journal_program.attempt` is ordered."""
    with subprocess.Popen(
        [sys.executable, Path(__file__).with_name("journal_program.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def ask(folder: Path, **order: Any) -> dict[str, Any]:
            assert server.stdin
            assert server.stdout
            server.stdin.write(json.dumps(order | {"folder": str(folder)}) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield ask
        server.kill()


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """Return a folder in memory where the system has such: there flushing, done thousands of times here, is free."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the digest of a run that was never interrupted and never wrote anything."""
    with Journal.open(tmp_path_factory.mktemp("expected"), IDENTITY, resume=False, every=1e9) as journal:
        found = digest(program(journal))
        journal.remove()
    return found


def attempt(folder: Path, *, resume: bool, **options: Any) -> tuple[str, int]:
    """Run the program here; return its digest and the number of blocks that it computed."""
    blocks: list[None] = []
    with Journal.open(folder, IDENTITY, resume=resume, **options) as journal:
        return digest(program(journal, lambda: blocks.append(None))), len(blocks)


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    """Return the folder of a run in which everything was saved."""
    attempt(tmp_path / "run", resume=False, every=0.0)
    return tmp_path / "run"


def begun(folder: Path, *, products: int = 0, blocks: int = 0, X: Tensor | None = None) -> Tensor:
    """Leave the journal of a run that stopped after some products and blocks; return what it had then."""
    X = torch.arange(6.0).reshape(2, 3) if X is None else X
    with Journal.open(folder, IDENTITY, resume=False, every=1e9) as journal:
        for _ in range(products):
            (X,) = journal.product("up", [X]).finish([X + 1])
        if blocks:
            journal.product("up", [X]).reached(blocks, lambda: [X * 2])
    return X


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# -- kills -------------------------------------------------------------------------------------------------------------


@needs_fork
def test_killed_at_random_events_and_resumed_it_ends_with_the_same_bits(
    run: Run, tmp_path: Path, expected: str
) -> None:
    events = run(tmp_path / "whole")["events"]
    assert events > 200  # blocks, and before and after each write, flush and rename
    choose = random.Random(0)
    kills = 0
    for chain in range(6):
        folder, blocks, attempts = tmp_path / str(chain), 0, 0
        while True:
            left = events * (ALL - blocks) // ALL
            answer = run(folder, kill_at=choose.randrange(1, max(2, left)), every=0.0)
            assert "error" not in answer, answer
            blocks += answer["blocks"]
            attempts += 1
            if not answer["killed"] or attempts == 6:
                break
            kills += 1
        if answer["killed"]:
            answer = run(folder)
            blocks += answer["blocks"]
        assert answer["digest"] == expected
        assert blocks <= ALL + attempts  # a kill costs the block whose state was not yet on the disk, no more
        assert set(os.listdir(folder)) <= FINISHED  # what a kill left half-written is gone
    assert kills >= 20


@needs_fork
def test_killed_at_every_event_of_a_write(run: Run, tmp_path: Path, expected: str) -> None:
    """The first checkpoints: journal.json, then states, in every half-done condition."""
    for kill_at in range(1, 25):
        folder = tmp_path / str(kill_at)
        assert run(folder, kill_at=kill_at)["killed"]
        answer = run(folder, every=1e9)
        assert answer["digest"] == expected


@needs_fork
def test_killed_by_a_timer_it_ends_with_the_same_bits(run: Run, tmp_path: Path, expected: str) -> None:
    choose = random.Random(1)
    saved = 0
    for chain in range(5):
        folder = tmp_path / str(chain)
        for every in (0, 0.01, 0.05):
            run(folder, kill_after=choose.uniform(0.01, 0.12), every=every, block_seconds=0.003)
        answer = run(folder)
        assert answer["digest"] == expected
        saved += ALL - answer["blocks"]
    assert saved > 0


@needs_fork
def test_a_killed_process_frees_the_lock_and_a_living_one_holds_it(run: Run, tmp_path: Path) -> None:
    run(tmp_path / "run", kill_at=60)
    with Journal.open(tmp_path / "run", IDENTITY, resume=True):
        for resume in (True, False):
            error = run(tmp_path / "run", resume=resume)["error"]
            assert f"another ggjac process (pid {os.getpid()}) is working in {tmp_path / 'run'}; wait" in error
            assert "choose another -o" in error
    assert "digest" in run(tmp_path / "run")


# -- loss of power -----------------------------------------------------------------------------------------------------


class Disk:
    """What a loss of power would leave of a folder: names as last flushed, and of each file what was flushed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.contents, self.names, self.held = folder, {}, {}, []  # type: ignore[var-annotated]
        self.moments: list[tuple[dict[str, bytes], int]] = []
        self.blocks = 0
        self._fsync, self._replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "replace", self.replace)

    def fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            if os.path.samestat(status, os.stat(self.folder)):
                self.names = {entry.name: entry.inode() for entry in os.scandir(self.folder)}
        else:
            self.held.append(os.dup(descriptor))  # so that no other file takes this one's number
            self.contents[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()
        self.keep()

    def replace(self, source: Any, target: Any) -> None:
        self._replace(source, target)
        self.keep()

    def keep(self) -> None:
        self.moments.append(({name: self.contents.get(i, b"") for name, i in self.names.items()}, self.blocks))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks at open files through /proc")
def test_a_loss_of_power_at_any_moment_costs_one_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: str
) -> None:
    with monkeypatch.context() as patch, Journal.open(tmp_path / "run", IDENTITY, resume=False, every=0.0) as journal:
        disk = Disk(tmp_path / "run", patch)

        def block_done() -> None:
            disk.blocks += 1

        program(journal, block_done)
    for descriptor in disk.held:
        os.close(descriptor)
    assert len(disk.moments) > 3 * ALL
    for i, (files, blocks) in enumerate(disk.moments):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        found, computed = attempt(folder, resume=bool(files), every=1e9)
        assert found == expected
        assert computed <= ALL - (blocks - 1)


# -- full disks --------------------------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("limit", [0, 1000, 1500])
def test_files_that_may_not_grow_do_not_stop_the_run(run: Run, tmp_path: Path, expected: str, limit: int) -> None:
    answer = run(tmp_path / "run", file_limit=limit)
    assert answer["digest"] == expected
    assert len(answer["warnings"]) == 1
    assert "progress cannot be saved (File too large); the run continues and will retry" in answer["warnings"][0]
    assert set(os.listdir(tmp_path / "run")) <= FINISHED
    resumed = run(tmp_path / "run")
    assert (resumed["digest"], resumed["warnings"]) == (expected, [])


class Failing:
    """A disk that fails while `error` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str):
        self.error: OSError | None = None
        original = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            if self.error:
                raise self.error
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)


WAYS_TO_FAIL: dict[str, tuple[Any, str, int, str]] = {
    "full at the flush": (os, "fsync", errno.ENOSPC, "the disk is full"),
    "full at a write": (runs.TensorWriter, "write", errno.ENOSPC, "the disk is full"),
    "over quota": (os, "replace", errno.EDQUOT, "the disk is full"),
    "broken": (os, "fsync", errno.EIO, os.strerror(errno.EIO)),
    "no longer writable": (os, "replace", errno.EACCES, os.strerror(errno.EACCES)),
}


@pytest.mark.parametrize("way", WAYS_TO_FAIL)
def test_a_failing_disk_is_told_once_and_what_is_pending_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    owner, name, number, words = WAYS_TO_FAIL[way]
    disk, warnings = Failing(monkeypatch, owner, name), list[str]()
    X = torch.arange(6.0).reshape(2, 3)
    with Journal.open(tmp_path / "run", IDENTITY, resume=False, every=0.0, on_warning=warnings.append) as journal:
        journal.product("up", [X]).finish([X])
        before = {path.name: path.read_bytes() for path in journal.folder.iterdir()}
        disk.error = OSError(number, os.strerror(number))
        for k in range(1, 4):
            journal.product("up", [X + k]).finish([X + k])
        journal.remember("a", lambda: 1)
        product = journal.product("up", [X])
        product.reached(1, lambda: [X])
        product.reached(2, lambda: [X + 9])
        assert not journal.flush()
        assert {path.name: path.read_bytes() for path in journal.folder.iterdir()} == before
        assert len(warnings) == 1
        assert warnings[0].startswith(f"{tmp_path / 'run'}: progress cannot be saved ({words})")
        disk.error = None
        assert journal.flush()
    with Journal.open(tmp_path / "run", IDENTITY, resume=True) as journal:
        for k in range(4):
            result = journal.product("up", [X + k]).result
            assert result is not None
            torch.testing.assert_close(result[0], X + k, rtol=0, atol=0)
        assert journal.remember("a", lambda: 2) == 1
        product = journal.product("up", [X])
        assert product.done == 2
        assert product.state is not None
        assert product.state[0].equal(X + 9)


def test_warnings_go_to_stderr_where_nobody_asks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = Failing(monkeypatch, os, "fsync")
    with Journal.open(tmp_path / "run", IDENTITY, resume=False, every=0.0) as journal:
        for disk.error in (OSError(errno.ENOSPC, "x"), OSError(errno.ENOSPC, "x"), OSError(errno.EIO, "y")):
            journal.product("up", []).finish([torch.ones(1)])
        disk.error = None
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split("(")[1].split(")")[0] for line in err.splitlines()] == ["the disk is full", "y"]


def test_memory_that_waits_for_a_broken_disk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, warnings = Failing(monkeypatch, os, "fsync"), list[str]()
    options: dict[str, Any] = {"every": 1e9, "memory": 100, "on_warning": warnings.append}
    with Journal.open(tmp_path / "run", IDENTITY, resume=False, **options) as journal:
        disk.error = OSError(errno.ENOSPC, "full")
        for size in (10, 10, 20):  # 40, 40, 80 bytes
            journal.product("up", []).finish([torch.ones(size)])
        assert ["exceeds the memory" in text for text in warnings] == [False, True]
        disk.error = None
    with Journal.open(tmp_path / "run", IDENTITY, resume=True) as journal:
        assert [journal.product("up", []).result is None for _ in range(3)] == [False, False, True]


# -- when it writes ----------------------------------------------------------------------------------------------------


def test_a_short_run_writes_nothing_until_it_is_asked(tmp_path: Path, expected: str) -> None:
    with Journal.open(tmp_path / "run", IDENTITY, resume=False) as journal:
        assert digest(program(journal)) == expected
        assert os.listdir(tmp_path / "run") == ["lock"]
        assert journal.flush()
        assert set(os.listdir(tmp_path / "run")) == FINISHED - {"state.safetensors"}
    assert attempt(tmp_path / "run", resume=True) == (expected, 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_run_is_saved(tmp_path: Path, error: type[BaseException], expected: str) -> None:
    blocks = []

    def block_done() -> None:
        blocks.append(None)
        if len(blocks) == 2 * BLOCKS + 3:
            raise error

    with (
        pytest.raises(error),
        Journal.open(tmp_path / "run", IDENTITY, resume=False) as journal,
    ):
        program(journal, block_done)
    assert attempt(tmp_path / "run", resume=True) == (expected, ALL - (2 * BLOCKS + 2))


def test_it_writes_when_time_has_passed_or_memory_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    X = torch.ones(10)
    with Journal.open(tmp_path / "run", IDENTITY, resume=False, every=30.0, memory=100) as journal:
        product = journal.product("up", [])
        state = tmp_path / "run" / "state.safetensors"
        written = []
        for moment in (101.0, 129.0, 130.0, 131.0, 159.0, 160.0):
            now = moment
            product.reached(1, lambda: [X])
            written.append(state.exists())
            state.unlink(missing_ok=True)
        assert written == [False, False, True, False, False, True]
        product.finish([X])
        journal.product("up", []).finish([X])
        assert not list(journal.folder.glob("product-*"))
        journal.product("up", []).finish([X])  # 120 bytes
        assert len(list(journal.folder.glob("product-*"))) == 3


def test_slow_writes_are_spaced_out_but_at_most_by_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, cost = 0.0, 4.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    original = module.save_tensors

    def slow(*args: Any) -> None:
        nonlocal now
        now += cost
        original(*args)

    monkeypatch.setattr(module, "save_tensors", slow)
    with Journal.open(tmp_path / "run", IDENTITY, resume=False, every=30.0) as journal:
        product, times = journal.product("up", []), []
        for step in range(200):
            before = now = now + 1
            cost = 4.0 if len(times) < 2 else 9.0
            product.reached(step, lambda: [torch.ones(1)])
            if now > before:
                times.append(before)
        assert times == [30.0, 74.0, 118.0, 187.0]


def test_boundaries_keep_references_and_pending_results_are_copies(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "run", IDENTITY, resume=False) as journal:
        H, R = torch.ones(4), torch.ones(5)
        product = journal.product("up", [])
        assert product.reached(1, lambda: [H])[0] is H
        assert product.finish([R])[0] is R
        R.zero_()  # the caller's own again
        product = journal.product("up", [])
        product.reached(1, lambda: [H])
        product.reached(2, lambda: [H + 1])
        journal.flush()
        product.reached(3, lambda: [H])
        H.zero_()  # no longer what it was at the boundary
        assert not journal.flush()
    with Journal.open(tmp_path / "run", IDENTITY, resume=True) as journal:
        result = journal.product("up", []).result
        assert result is not None
        assert result[0].equal(torch.ones(5))
        product = journal.product("up", [])
        assert product.done == 2
        assert product.state is not None
        assert product.state[0].equal(torch.full((4,), 2.0))


def test_a_run_goes_on_with_the_layout_that_it_would_resume_with(tmp_path: Path) -> None:
    odd = torch.arange(41.0)[1:].reshape(8, 5).T
    with Journal.open(tmp_path / "run", IDENTITY, resume=False) as journal:
        product = journal.product("up", [])
        for (H,) in (product.reached(1, lambda: [odd]), product.finish([odd])):
            assert H.equal(odd)
            assert (H.stride(), H.data_ptr() % 64) == ((8, 1), 0)


def test_small_results_are_the_same_the_first_time(tmp_path: Path) -> None:
    value = {"pair": (1, 2.5), "nan": float("nan"), "text": "é\udcff\x1b"}
    seen = []
    for resume in (False, True):
        with Journal.open(tmp_path / "run", IDENTITY, resume=resume) as journal:
            seen.append(journal.remember("a", lambda: pytest.fail("computed again") if seen else value))
            seen[-1]["pair"].append(3)  # the caller's own
            assert journal.remember("a", lambda: None)["pair"] == [1, 2.5]
    assert repr(seen[0]) == repr(seen[1])


def test_a_small_result_is_kept_as_it_was_given(tmp_path: Path) -> None:
    value = [1]
    with Journal.open(tmp_path, IDENTITY, resume=False) as journal:
        journal.remember("a", lambda: value)
        value.append(2)
    with Journal.open(tmp_path, IDENTITY, resume=True) as journal:
        assert journal.remember("a", lambda: None) == [1]


def test_what_lies_about_is_no_part_of_a_new_run(complete: Path, expected: str) -> None:
    (complete / "journal.json").unlink()
    assert attempt(complete, resume=False) == (expected, ALL)


def test_success_removes_what_is_the_journals_own(complete: Path) -> None:
    (complete / "other").touch()
    (complete / "product-x.safetensors").touch()
    with Journal.open(complete, IDENTITY, resume=True) as journal:
        journal.remove()
        journal.remove()
    assert set(os.listdir(complete)) == {"other", "product-x.safetensors"}
    shutil.rmtree(complete)
    with Journal.open(complete / "deep", IDENTITY, resume=False, every=0.0) as journal:
        program(journal)
        journal.remove()
    assert os.listdir(complete) == []


# -- what is refused ---------------------------------------------------------------------------------------------------

LONG = list(range(1000))
CHANGES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"dtype": "bfloat16"}, {"dtype": "float32"}, r"dtype: .* started with 'bfloat16', now 'float32'\. Give the same"),
    ({"model": {"a": {"b": 1}}}, {"model": {"a": {"b": 2}}}, r": model\.a\.b: .* with 1, now 2\."),
    ({"seed": 0}, {}, r"seed: .* with 0, now nothing\."),
    ({}, {"seed": None}, r"seed: .* with nothing, now None\."),
    ({"a": {}}, {"a": {"b": 1}}, r"a: .* with \{\}, now nothing; a\.b: .* with nothing, now 1"),
    ({"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}, {"a": 2, "b": 2, "c": 2, "d": 2, "e": 2}, r"c: .*, now 2; and 2 more\."),
    ({"tokens": LONG}, {"tokens": [*LONG[:500], 7, *LONG[501:]]}, r"with ….*, 500, 501.*…, now ….*, 7, 501.*…\."),
    ({"prompt": "\x1b[31m\u202e"}, {"prompt": "a\nb"}, r"with '\\x1b\[31m\\u202e', now 'a\\nb'"),
]


@pytest.mark.parametrize(("was", "now", "words"), CHANGES)
def test_another_run_is_not_resumed(tmp_path: Path, was: dict[str, Any], now: dict[str, Any], words: str) -> None:
    with Journal.open(tmp_path, was, resume=False, every=0.0) as journal:
        journal.remember("a", lambda: 1)
    with pytest.raises(JournalError, match=words) as error:
        Journal.open(tmp_path, now, resume=True)
    assert "choose another -o" in one_line(error)
    assert len(one_line(error)) < 500
    Journal.open(tmp_path, was, resume=True).close()  # the refusal has freed the lock


def test_equal_identities_are_equal_as_json(tmp_path: Path) -> None:
    with Journal.open(tmp_path, {"a": (1, 2), "b": {"x": 0.1, "y": None}}, resume=False) as journal:
        journal.remember("a", lambda: 1)
    with Journal.open(tmp_path, {"b": {"y": None, "x": 0.1}, "a": [1, 2]}, resume=True) as journal:
        assert journal.remember("a", lambda: 2) == 1


def test_beginning_and_resuming_are_not_confused(tmp_path: Path, expected: str) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(JournalError, match="no run to resume"):
            Journal.open(folder, IDENTITY, resume=True)
    assert os.listdir(tmp_path) == []
    Journal.open(tmp_path, IDENTITY, resume=False).close()
    assert attempt(tmp_path, resume=True) == (expected, ALL)  # ended before it saved anything
    with pytest.raises(JournalError, match="continue it with --resume, choose another -o, or delete it"):
        Journal.open(tmp_path, IDENTITY, resume=False)


def test_a_folder_that_cannot_be_used_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(JournalError, match=r"cannot be written .*choose another -o") as error:
            Journal.open(folder, IDENTITY, resume=False)
        one_line(error)


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system follows every link")
def test_a_lock_that_leads_elsewhere_is_left_alone(tmp_path: Path) -> None:
    other, folder = tmp_path / "other", tmp_path / "run"
    other.write_text("of somebody else")
    folder.mkdir()
    (folder / "lock").symlink_to(other)
    for resume in (False, True):
        with pytest.raises(JournalError, match=r"cannot be written .*choose another -o"):
            Journal.open(folder, IDENTITY, resume=resume)
    assert other.read_text() == "of somebody else"


def test_a_file_system_without_locks_is_told_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    Failing(monkeypatch, fcntl, "flock").error = OSError(errno.ENOLCK, "No locks available")
    warnings: list[str] = []
    with Journal.open(tmp_path, IDENTITY, resume=False, on_warning=warnings.append) as journal:
        program(journal)
    assert len(warnings) == 1
    assert "cannot be locked (No locks available)" in warnings[0]
    assert (tmp_path / "journal.json").exists()


def test_a_lock_file_that_was_deleted_meanwhile_protects_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    original, calls = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:  # the former holder finishes between our opening and locking
            (tmp_path / "lock").unlink()
        original(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Journal.open(tmp_path, IDENTITY, resume=False), pytest.raises(JournalError, match="another ggjac process"):
        Journal.open(tmp_path, IDENTITY, resume=False)


OTHER_INPUTS: dict[str, tuple[str, Callable[[Tensor], list[Tensor]]]] = {
    "another kind": ("down", lambda X: [X]),
    "one bit": ("up", lambda X: [torch.cat([X[:1], torch.nextafter(X[1:], X[1:] + 1)])]),
    "the sign of zero": ("up", lambda X: [torch.where(X == 0, -X, X)]),
    "another dtype": ("up", lambda X: [X.view(torch.int32)]),
    "another shape": ("up", lambda X: [X.reshape(3, 2)]),
    "one more": ("up", lambda X: [X, X]),
    "none": ("up", lambda X: []),
}


@pytest.mark.parametrize("case", OTHER_INPUTS)
@pytest.mark.parametrize("blocks", [0, 2])
def test_a_program_that_does_something_else_is_not_answered(tmp_path: Path, case: str, blocks: int) -> None:
    X = torch.arange(6.0).reshape(2, 3)
    begun(tmp_path, products=0 if blocks else 1, blocks=blocks, X=X)
    kind, change = OTHER_INPUTS[case]
    with Journal.open(tmp_path, IDENTITY, resume=True) as journal:
        with pytest.raises(JournalError, match="computed something else as product 0") as error:
            journal.product(kind, change(X))
        assert "choose another -o" in one_line(error)
    with Journal.open(tmp_path, IDENTITY, resume=True) as journal:
        product = journal.product("up", [X])
        assert (product.result is None, product.done) == (bool(blocks), blocks)


def test_a_stale_state_is_not_used(tmp_path: Path) -> None:
    X = begun(tmp_path, products=1, blocks=2)
    (tmp_path / "product-0000.safetensors").unlink()
    with Journal.open(tmp_path, IDENTITY, resume=True, every=1e9) as journal:
        product = journal.product("up", [X - 1])  # the state is of the next one
        assert (product.result, product.done, product.state) == (None, 0, None)
        product.finish([X])
        assert journal.product("up", [X]).done == 2
        assert journal.product("up", [X]).done == 0


@pytest.mark.parametrize("name", sorted(FINISHED - {"lock"}))
def test_damage_is_told_or_does_no_harm(complete: Path, tmp_path: Path, name: str, expected: str) -> None:
    if name == "state.safetensors":  # one that is used
        (complete / f"product-{PRODUCTS - 1:04d}.safetensors").unlink()
    path = complete / name
    whole = path.read_bytes()
    choose = random.Random(name)
    damages = [b"", b"\0" * len(whole), whole + b"\0", b"[" * 100_000]
    damages += [whole[: choose.randrange(len(whole))] for _ in range(10)]
    for _ in range(40):
        place = choose.randrange(len(whole))
        damages.append(whole[:place] + bytes([whole[place] ^ 1 << choose.randrange(8)]) + whole[place + 1 :])
    told = 0
    for damaged in damages:
        path.write_bytes(damaged)
        try:
            assert attempt(complete, resume=True, every=1e9)[0] == expected
        except JournalError as error:
            text = str(error)
            assert text.startswith(str(path if name != "journal.json" else complete))
            assert "\n" not in text
            assert "another -o" in text
            told += 1
    assert told >= len(damages) - 12  # blanks of JSON may change


def test_every_flipped_bit_of_the_numbers_is_seen(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", {"x": torch.arange(4.0), "y": torch.tensor([True])}, {"key": "value"})
    whole = (tmp_path / "a").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    assert len(whole) - start == 17
    for bit in range(8 * start, 8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a").write_bytes(damaged)
        with pytest.raises(JournalError, match="does not match its digest"):
            load_tensors(tmp_path / "a")


def test_files_of_others_are_refused(complete: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with Journal.open(other, IDENTITY | {"dtype": "float64"}, resume=False, every=0.0) as journal:
        program(journal)
    first, second = (complete / f"product-000{i}.safetensors" for i in range(2))
    whole = first.read_bytes()
    plainly: Callable[[], Any] = lambda: save_file({"0": torch.ones(1)}, first, {"journal": "{}"})  # noqa: E731
    cases: dict[str, Callable[[], Any]] = {
        "belongs to another run": lambda: shutil.copy(other / first.name, first),
        "has no digest": plainly,
        "holds product 1, not 0": lambda: shutil.copy(second, first),
        "not a finished product": lambda: shutil.copy(tmp_path / "state", first),
        "is damaged": lambda: first.write_bytes(b"x"),
        "to another run": lambda: save_tensors(first, {"0": torch.ones(1)}),
        "belongs to another": lambda: save_tensors(first, {"0": torch.ones(1)}, {"journal": '{"number": []}'}),
    }
    begun(tmp_path / "begun", blocks=1)
    state = tmp_path / "begun" / "state.safetensors"
    X = torch.arange(6.0).reshape(2, 3)
    shutil.copy(state, tmp_path / "state")
    for words, spoil in cases.items():
        spoil()
        inputs = [X] if words == "not a finished product" else None
        with (
            Journal.open(complete, IDENTITY, resume=True, every=1e9) as journal,
            pytest.raises(JournalError, match=words) as error,
        ):
            program(journal) if inputs is None else journal.product("up", inputs)
        assert f"{first}: " in one_line(error)
        assert "remove this file" in one_line(error)
    first.write_bytes(whole)
    attempt(complete, resume=True)
    shutil.copy(other / "results.json", complete)
    with pytest.raises(JournalError, match="belongs to another run; remove this file"):
        Journal.open(complete, IDENTITY, resume=True)


@pytest.mark.parametrize("schema", [2, "1", None, [1]])
def test_another_schema_is_refused(tmp_path: Path, schema: Any) -> None:
    (tmp_path / "journal.json").write_text(json.dumps({"schema_version": schema, "identity": IDENTITY}))
    with pytest.raises(JournalError, match="schema version") as error:
        Journal.open(tmp_path, IDENTITY, resume=True)
    one_line(error)


# SHA-256 of what the first release wrote for the run below.
SCHEMA_1 = {
    "journal.json": "3e67ae8b6a18558fef4f34cb0cff5dd7199ec601176353ee34b5678870383bed",
    "product-0000.safetensors": "31ba171b01dc26dca66892c964a77c0c916c65e48710750798a2b86dcd41c1e1",
    "results.json": "10fd1dc6ddd0bcb3cccf9f066e4327025ad1b5c944d669279355ee06c652c83d",
    "state.safetensors": "30b56d4d3ff3ca531f9c4bcde64626001f312d9315fc7bc584c8e14906672eb5",
}


def test_files_of_this_schema_version_keep_their_bytes(tmp_path: Path) -> None:
    """Folders of earlier versions can then be resumed, and so can traces, whose tensors are written in the same way."""
    X = torch.arange(6.0).reshape(2, 3)
    with Journal.open(tmp_path, {"dtype": "float32", "tokens": [1, 2, 3]}, resume=False) as journal:
        (Y,) = journal.product("up", [X]).finish([X.T + 1])
        journal.remember("share", lambda: {"share": 0.5, "pair": (1, 2)})
        journal.product("down", [Y]).reached(2, lambda: [Y.bfloat16(), torch.tensor(3), Y > 2])
    assert module.SCHEMA_VERSION == 1
    assert {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in SCHEMA_1} == SCHEMA_1


# -- tensors on disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_floats_come_back_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    save_tensors(tmp_path / "a", {"x": bits.view(dtype)})
    for back in (load_tensors(tmp_path / "a")[0]["x"], load_file(tmp_path / "a")["x"]):
        assert back.dtype == dtype
        assert back.view(torch.int16).equal(bits)  # NaNs too, with their payloads


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Draw bits of any dtype in any layout: contiguous, transposed, sliced, expanded, shifted."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from(list(NAMES)))
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (4096,), dtype=torch.uint8, generator=torch.Generator())
    base = raw.view(dtype)[draw(st.integers(0, 9)) :]
    strides = [draw(st.integers(0, 20)) for _ in shape]
    return base.as_strided(shape, strides, base.storage_offset())


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text(max_size=5).filter(lambda name: name != "__metadata__"), tensors(), max_size=4), st.data()
)
def test_tensors_come_back_bit_by_bit_in_memory_of_their_own(
    tmp_path_factory: pytest.TempPathFactory, saved: dict[str, Tensor], data: st.DataObject
) -> None:
    metadata = data.draw(st.dictionaries(st.text(max_size=5).filter(lambda key: key != "digest"), st.text(max_size=5)))
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    save_tensors(path, saved, metadata)
    found, read = load_tensors(path)
    judge = load_file(path)
    assert read == metadata
    assert found.keys() == saved.keys() == judge.keys()
    for name, tensor in saved.items():
        assert digest([found[name]]) == digest([judge[name]]) == digest([tensor]) == digest([plain(tensor)])
        for fresh in (found[name], plain(tensor)):
            assert fresh.stride() == torch.empty(tensor.shape).stride()
            assert fresh.data_ptr() % 64 == 0
        assert found[name].untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x \(torch.complex64\)"):
        save_tensors(tmp_path / "a", {"x": torch.ones(1, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="digest"):
        save_tensors(tmp_path / "a", {}, {"digest": ""})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_files_that_others_wrote_are_no_traces_of_ours(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"x": torch.ones(3, dtype=dtype)}, tmp_path / "a")
    with pytest.raises(JournalError, match="not written by ggjac"):
        load_tensors(tmp_path / "a")
    for name, words in (("missing", "is missing"), (".", "damaged, or not a safetensors")):
        with pytest.raises(JournalError, match=words) as error:
            load_tensors(tmp_path / name)
        one_line(error)


def test_a_digest_tells_a_damaged_number(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", {"x": torch.zeros(4)})
    content = bytearray((tmp_path / "a").read_bytes())
    content[-1] ^= 0x40
    (tmp_path / "a").write_bytes(content)
    assert load_file(tmp_path / "a")["x"].tolist() == [0, 0, 0, 2]  # a whole file of another content
    with pytest.raises(JournalError, match="digest"):
        load_tensors(tmp_path / "a")


def test_nothing_stays_mapped_or_open(complete: Path) -> None:
    with Journal.open(complete, IDENTITY, resume=True) as journal:
        found = program(journal)
    gc.collect()
    for path in complete.iterdir():
        path.write_bytes(b"")
    assert len(digest(found)) == 64  # a mapping would be a bus error here
    assert not any("safetensors" in os.path.realpath(entry) for entry in Path("/proc/self/fd").glob("*"))
