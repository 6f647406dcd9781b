"""Free and used memory, CPUs, and page-cache residency.

*Anonymous* memory is memory that a process cannot give back: its heap and its tensors, but not the pages of a mapped
model file, which the system reclaims when it needs them. Budgets bound anonymous memory.
"""

import ctypes
import importlib.util
import mmap
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

# Binary with an `i` and without a unit, as llama.cpp and the kernel read `24G`; decimal with only a `B`, as disks are
# sold.
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?:([KMGT])(iB|B)?|B)?\s*", re.IGNORECASE)
_POWERS = "KMGT"
_LARGEST = 1 << 62

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_MOUNTS = Path("/proc/self/mounts")
_STATUS = "/proc/self/status"
_RESIDENCY_STEP = 1 << 30  # bytes of a file that are mapped at a time to query their residency

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAPPED_BYTES, _TRIMMED_BYTES = 1 << 20, 8 << 20


class SizeError(ValueError):
    """A text is not an amount of memory."""


def parse_size(text: str) -> int:
    """Return the bytes that a text names: `2GiB`, `500MB`, `1.5G`, `123456`.

    `KiB`, `MiB`, `GiB`, `TiB` and a single letter are powers of 1024; `KB`, `MB`, `GB`, `TB` are powers of 1000; a
    number without a unit is bytes. Case does not matter.

    Raises:
        SizeError: the text is not in one of these forms, or the size is less than one byte or impossibly large.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise SizeError(f"{shown!r} is not an amount of memory; write it as 2GiB, 500MB, 1.5G, or in bytes")
    number, letter, unit = match.groups()
    base = 1000 if unit and unit.upper() == "B" else 1024
    value = float(number) * base ** (_POWERS.index(letter.upper()) + 1 if letter else 0)
    if not 1 <= value <= _LARGEST:
        raise SizeError(f"{text.strip()[:40]!r} is out of range; give from 1 byte to 4 million TiB")
    return int(value)


def total_memory() -> int:
    """Return the bytes of RAM that this process can use at most: the machine's, or its control group's if fewer."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())])


def free_memory() -> int:
    """Return the bytes that this process can still allocate without swapping, on the machine and in its control group.

    The page cache counts as free in both.
    """
    return max(0, min([psutil.virtual_memory().available, *(limit - used for limit, used in _limits())]))


def default_budget() -> int:
    """Return half of the free memory, in bytes; memory that this process has already allocated counts as free."""
    return (free_memory() + anonymous_memory()) // 2


def cpus() -> int:
    """Return how many CPUs this process may use: by its affinity, and by the quotas of its control groups."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *_quotas()]))


def torch_threads() -> int:
    """Return the threads of torch by default: its own number, which does not regard quotas, or fewer."""
    import torch

    return min(torch.get_num_threads(), cpus())


def _limits() -> Iterator[tuple[int, int]]:
    """Yield the limit and the use, in bytes, of every control group of this process that has a limit."""
    for version, folder in _groups("memory"):
        limit, used = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
        if (most := _number(folder / f"memory.{limit}")) is not None:
            yield most, max(0, (_number(folder / f"memory.{used}") or 0) - _cached(folder / "memory.stat"))


def _quotas() -> Iterator[int]:
    """Yield the whole CPUs that every control group of this process may use, where it has a quota."""
    for version, folder in _groups("cpu"):
        if version == 1:
            quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        else:
            quota, period = (*_numbers(folder / "cpu.max"), None, None)[:2]
        if quota and period:
            yield quota // period


def _groups(controller: str) -> Iterator[tuple[int, Path]]:
    """Yield the version and the folder of every control group of this process, and of those around it."""
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if line.startswith("0::"):
            version, root = 2, _CGROUPS
        elif controller in controllers.split(","):
            version, root = 1, _CGROUPS / controller
        else:
            continue
        # In a container the path may be the host's, and only the root exists. A parent's limit binds its children.
        inside = root / path.lstrip("/")
        for folder in (inside, *inside.parents):
            yield version, folder
            if folder == root:
                break


def _number(path: Path) -> int | None:
    """Return the number in a file; None if it contains something else, as the `max` of a group without a limit."""
    return (*_numbers(path), None)[0]


def _numbers(path: Path) -> list[int | None]:
    """Return the numbers in a file, None for each word that is something else; nothing if it cannot be read."""
    try:
        words = path.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []
    return [int(word) if word.isdigit() else None for word in words]


def _cached(path: Path) -> int:
    """Return the bytes of a control group's page cache."""
    try:
        entries = dict(line.split() for line in path.read_text(encoding="ascii").splitlines())
        return sum(int(entries.get(key, 0)) for key in ("inactive_file", "active_file"))
    except (OSError, ValueError):
        return 0


def anonymous_memory() -> int:
    """Return the bytes of anonymous memory of this process; outside Linux, those that it does not share."""
    try:
        with open(_STATUS, encoding="ascii") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    process = psutil.Process()
    try:
        return process.memory_full_info().uss
    except (psutil.AccessDenied, AttributeError):
        return process.memory_info().rss


def return_freed_memory() -> None:
    """Make the C library return freed memory to the system at once, for the rest of this process.

    By default glibc raises its thresholds with the size of freed blocks, and then keeps up to 64 MiB and all holes
    below them: a sweep's stacks then took a third more memory than was in use at any time. No effect without `mallopt`.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIMMED_BYTES)


def trim_memory() -> None:
    """Return to the system what was freed between tensors that stay. No effect without `malloc_trim`.

    Tapes are kept, and what the forward pass frees between them stays with the process: a tenth of its memory.
    """
    if sys.platform.startswith("linux") and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def in_memory(folder: str | os.PathLike[str]) -> bool:
    """Return whether the files in a folder take memory: whether it is on a tmpfs. False if that is unknown."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    # A mount hides what lay there before: of the longest folder that contains this one, the last line counts.
    kind, longest = "", -1
    for words in map(str.split, lines):
        if len(words) > 2:
            point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), words[1]))
            if len(point.parts) >= longest and Path(folder).resolve().is_relative_to(point):
                kind, longest = words[2], len(point.parts)
    return kind in ("tmpfs", "ramfs")


class PeakMemory:
    """Watch this process's anonymous memory in a thread while a block of code runs.

        with PeakMemory() as peak:
            work()
        peak.nbytes

    Attributes:
        start: bytes at the beginning.
        nbytes: most bytes seen, at both ends and every `interval` seconds between; shorter peaks are missed.
    """

    def __init__(self, interval: float = 0.005):
        self.interval = interval
        self.start = self.nbytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ggjac-memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self.start = self.nbytes = anonymous_memory()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            done = self._done.wait(self.interval)
            self.nbytes = max(self.nbytes, anonymous_memory())
            if done:
                return


class _NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def gpu_memory(index: int = 0) -> tuple[int, int] | None:
    """Return the free and total bytes of an NVIDIA GPU, numbered as CUDA does; None without a driver.

    The driver's management library answers, so no CUDA context is created and torch is not needed.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = visible.split(",")
        if index >= len(names) or not names[index].strip().isdigit():
            return None
        index = int(names[index])
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            return None
    except (OSError, AttributeError):
        return None
    try:
        device, memory = ctypes.c_void_p(), _NvmlMemory()
        if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)):
            return None
        return None if nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) else (memory.free, memory.total)
    finally:
        nvml.nvmlShutdown()


def device_kind(name: str) -> str:
    """Return `"cpu"`, or `"cuda"` for any device with memory of its own; `auto` is the device that torch would find.

    Torch's files are inspected instead of importing it, which takes seconds.
    """
    if name != "auto":
        return "cpu" if name.startswith("cpu") else "cuda"
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else None
    with_cuda = folder is not None and any((folder / f).exists() for f in ("libtorch_cuda.so", "torch_cuda.dll"))
    return "cuda" if with_cuda and gpu_memory() else "cpu"


def default_vram(name: str) -> int | None:
    """Return the free bytes of a device, named as `cuda:1` or `auto`; None on the CPU and if they are not detectable.

    Without NVIDIA's library they come from torch, but only if it has already been imported.
    """
    if device_kind(name) == "cpu":
        return None
    kind, _, number = name.replace("auto", "cuda").partition(":")
    index = int(number) if number.isdigit() else 0
    memory = gpu_memory(index) if kind == "cuda" else None
    if memory is None:
        module: Any = getattr(sys.modules.get("torch"), kind, None)
        if hasattr(module, "mem_get_info") and module.is_available():
            memory = module.mem_get_info(index)
    return memory[0] if memory else None


def cached_bytes(path: str | os.PathLike[str]) -> int | None:
    """Return how many bytes of a file are in the page cache; None if the system does not report it.

    Linux reports it correctly only to users who may write the file. Costs about 20 ms per GB.
    """
    if not sys.platform.startswith("linux") or not os.access(path, os.W_OK):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    size, resident, page = os.path.getsize(path), 0, mmap.PAGESIZE
    # Mapped here and not through `mmap.mmap`, which does not give the address of a read-only map.
    with open(path, "rb") as file:
        for start in range(0, size, _RESIDENCY_STEP):
            length = min(_RESIDENCY_STEP, size - start)
            address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), start)
            if address in (None, ctypes.c_void_p(-1).value):
                return None
            pages = ctypes.create_string_buffer(-(-length // page))
            failed = libc.mincore(address, length, pages)
            libc.munmap(address, length)
            if failed:
                return None
            resident += pages.raw.translate(_LOWEST_BIT).count(1) * page
    return min(size, resident)


# Only the lowest bit of each of mincore's bytes is defined.
_LOWEST_BIT = bytes(i & 1 for i in range(256))
