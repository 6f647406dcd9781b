"""Executors for a study: processes of this machine, Ray, Dask. What they need is imported when they are made."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

from ggjac import guard, runs

MAX_WORKERS = 512


@contextlib.contextmanager
def processes(count: int) -> Iterator[Executor]:
    """Make an executor of `count` processes; after an error they end at once, and also if this process is killed."""
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    with theirs, ours, ProcessPoolExecutor(count, context, _begin, (theirs,)) as pool:
        try:
            yield pool
        except Exception:  # nothing is being computed any more
            pool.shutdown(cancel_futures=True)
            raise
        except BaseException:
            ours.close()
            raise


def _begin(lifeline: Connection) -> None:
    """Begin a worker: Ctrl-C is for the process that made it, and it ends when that one lets go of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    guard.install()

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv_bytes()  # nothing is ever sent
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def dask(address: str) -> Iterator[Executor]:
    """Connect to a Dask scheduler, as `tcp://host:8786`; tasks of workers that die are given to others.

    Raises:
        RunError: Dask is not installed, or there is no scheduler.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise _missing("distributed", "dask") from error
    try:
        client = Client(address, timeout=20, set_as_default=False)
    except (OSError, ValueError) as error:
        raise runs.RunError(f"no Dask scheduler at {address} ({runs.one_line(error)}); start dask scheduler") from error
    with client:
        yield client.get_executor(retries=3)


@contextlib.contextmanager
def ray(address: str | None, threads: int) -> Iterator[Executor]:
    """Connect to a Ray cluster, or start one on this machine; each task takes `threads` CPUs, and is tried again.

    Raises:
        RunError: Ray is not installed, or there is no cluster.
    """
    try:
        import ray as engine
    except ImportError as error:
        raise _missing("ray", "ray") from error
    try:
        engine.init(address, include_dashboard=None if address else False, log_to_driver=False, logging_level="error")
    except Exception as error:  # a node that is too slow to start is one without a class
        what = f"no Ray cluster at {address}" if address else "Ray does not start on this machine"
        remedy = "ray start --head" if address else "try again when it is less busy, or take --workers N"
        raise runs.RunError(f"{what} ({runs.one_line(error)}); {remedy}") from error

    @cache
    def remote(function: Callable) -> Any:
        return engine.remote(function).options(num_cpus=threads, max_retries=3)

    class Tasks(Executor):
        def submit(self, function: Callable, /, *args: Any, **options: Any) -> Future:
            return remote(function).remote(*args, **options).future()

    try:
        yield Tasks()
    finally:
        engine.shutdown()


def _missing(package: str, extra: str) -> runs.RunError:
    return runs.RunError(f"--workers {extra} needs the package {package}: pip install 'ggjac[{extra}]'")
