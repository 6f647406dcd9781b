"""A lock file: at most one process works in a folder or on a file. The system frees it however that process ends.

What has no lock, files that a process has left, is known by the number of that process.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from ggjac import runs
from ggjac.runs.files import JournalError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


@contextlib.contextmanager
def alone(path: str | os.PathLike[str], *, on_warning: Callable[[str], None] | None = None) -> Iterator[None]:
    """Keep other processes from working on a file while the block runs, by a lock file next to it.

    Args:
        path: of the file, which need not exist; links are followed, so that one file has one lock.
        on_warning: called with a message if the file system does not support locks.

    Raises:
        JournalError: another process holds the lock, or it cannot be created.
    """
    lock = _beside(path)
    with explaining(lock.with_suffix("")):
        descriptor = acquire(lock, Path(path), on_warning or print_warning)
    try:
        yield
    finally:
        if sys.platform == "win32":  # an open file cannot be deleted there
            release(descriptor)
        with contextlib.suppress(OSError):
            lock.unlink()
        if sys.platform != "win32":
            release(descriptor)


def check_idle(path: str | os.PathLike[str]) -> None:
    """Refuse a file on which another process works; there is a lock file only if one does, or was killed.

    Raises:
        JournalError: one does.
    """
    if _beside(path).exists():
        with alone(path):
            pass


def _beside(path: str | os.PathLike[str]) -> Path:
    """Return the path of a file's lock file."""
    file = Path(os.path.realpath(path))
    return file.with_name(f"{file.name}.lock")


def acquire(path: Path, what: Path, on_warning: Callable[[str], None]) -> int:
    """Create and lock a lock file, and return its descriptor; messages name `what`, the path that it protects.

    Raises:
        JournalError: another process holds it.
        OSError: it cannot be created.
    """
    while True:
        # Do not follow a link: a folder from strangers must not make us write to a file elsewhere.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if sys.platform == "win32":
                os.lseek(
                    descriptor, 1 << 30, os.SEEK_SET
                )  # locked bytes cannot be read, and the process id below should be
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                os.lseek(descriptor, 0, os.SEEK_SET)
            else:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            os.lseek(descriptor, 0, os.SEEK_SET)
            holder = os.read(descriptor, 20).decode("ascii", "replace").strip()
            os.close(descriptor)
            who = f"another ggjac process (pid {holder})" if holder.isdigit() else "another ggjac process"
            raise JournalError(f"{who} is working in {what}; wait for it or choose another -o") from error
        except OSError as error:  # a network file system without locks
            on_warning(f"{what}: cannot be locked ({runs.one_line(error)}); do not let another process work there")
        # The previous holder may have deleted the file between our opening and locking it; then the lock is void.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    with contextlib.suppress(OSError):  # used only in the message above; the disk may be full
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def release(descriptor: int) -> None:
    """Free the lock explicitly: closing the file is not enough while a forked child has it open too."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turn the system's errors about a path into a `JournalError` of one line that says what to do."""
    try:
        yield
    except OSError as error:
        raise JournalError(f"{path}: cannot be written ({runs.one_line(error)}); choose another -o") from error


def print_warning(message: str) -> None:
    """Print a warning to stderr; the default of every `on_warning`."""
    print(f"Warning: {message}", file=sys.stderr)


def is_running(process: int) -> bool:
    """Return whether a process of this number runs on this machine; True where that cannot be known."""
    try:
        return psutil.pid_exists(process)
    except (OSError, OverflowError):
        return True
