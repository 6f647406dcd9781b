"""Pages of a mapped model that cannot be read appear as zeros, where the system would end the process by SIGBUS.

A file may be truncated, and its disk or network may fail, between the moment at which pages are asked for and the one
at which they are read. The map then gets zeros in place of them, and the file is marked as lost: `check_unchanged`
refuses every result of it, so that the command ends with one line and keeps its checkpoint.

Only on Linux, of 64 bits, where the C structures are known; and only in a program that calls `install`.
"""

import ctypes
import mmap
import platform
import signal
import sys
import weakref
from typing import Any, Protocol

_SA_SIGINFO, _SA_NODEFER = 0x4, 0x40000000
_MAP_FIXED = 0x10
_CODE, _ADDRESS = 8, 16  # where siginfo_t has the cause and the address


class Mapped(Protocol):
    """A file whose maps are guarded: the address and length of each, and whether a page of one was lost."""

    lost: bool

    @property
    def addresses(self) -> list[tuple[int, int]]:
        """Where it is mapped now."""


class _Action(ctypes.Structure):
    """`struct sigaction` of glibc and musl."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_files: "weakref.WeakSet[Any]" = weakref.WeakSet()
_installed: list[Any] = []  # what the system calls must stay alive


def guard(file: Mapped) -> None:
    """Guard the maps of a file for as long as it lives."""
    _files.add(file)


def install() -> None:
    """Handle SIGBUS from now on, in this process; once. Errors elsewhere than in guarded maps end it as before."""
    if _installed or not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "aarch64"):
        return
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    before = _Action()
    bus = int(signal.SIGBUS)

    # The thread that reads holds the interpreter's lock itself, or has released it in a call to C.
    @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    def handle(number: int, information: int, context: int) -> None:
        address = ctypes.c_size_t.from_address(information + _ADDRESS).value
        for file in list(_files):
            for start, length in file.addresses:
                if start <= address < start + length:
                    file.lost = True
                    page = address - address % mmap.PAGESIZE
                    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
                    if libc.mmap(page, start + length - page, mmap.PROT_READ, flags, -1, 0) == page:
                        return
        libc.sigaction(bus, ctypes.byref(before), None)
        if ctypes.c_int.from_address(information + _CODE).value <= 0:  # sent by a process: it does not come again
            getattr(libc, "raise")(number)

    action = _Action(handler=ctypes.cast(handle, ctypes.c_void_p), flags=_SA_SIGINFO | _SA_NODEFER)
    if libc.sigaction(bus, ctypes.byref(action), ctypes.byref(before)) == 0:
        _installed.extend((handle, before))
