"""Sizes as text, free and used memory, the page cache: compared with files and memory made for the test."""

import mmap
import os
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ggjac import planner
from ggjac.llamacpp import Child
from ggjac.model import open_model
from ggjac.parity import rewrite_as_f32, run_llama_cpp
from ggjac.planner import bench, machine
from ggjac.session import Session
from ggjac.units import size

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

SIZES = {
    "2GiB": 2 << 30,
    "500MB": 500_000_000,
    "1.5G": 3 << 29,
    "123456": 123456,
    "7B": 7,
    "1k": 1024,
    "1KB": 1000,
    "1KiB": 1024,
    ".5m": 1 << 19,
    "2. gib": 2 << 30,
    " 3 TB ": 3 * 10**12,
    "1T": 1 << 40,
}


@pytest.mark.parametrize("text", SIZES)
def test_sizes(text: str) -> None:
    assert machine.parse_size(text) == SIZES[text]


@pytest.mark.parametrize(
    "text", ["", "GiB", "1e9", "-1G", "1PB", "1 G i B", "nan", "inf", "0x10", "1,5G", "1GiBs", "١G"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(machine.SizeError, match="is not an amount of memory; write it as 2GiB"):
        machine.parse_size(text)


@pytest.mark.parametrize("text", ["0", "0.0GiB", "0.1B", "99999999999T", "9" * 400])
def test_impossible_sizes(text: str) -> None:
    with pytest.raises(machine.SizeError, match="is out of range; give from 1 byte"):
        machine.parse_size(text)


@given(st.integers(1, 1 << 50))
def test_bytes_are_exact(nbytes: int) -> None:
    assert machine.parse_size(str(nbytes)) == nbytes


@given(st.integers(1, 1 << 60))
def test_what_is_printed_is_read_again(nbytes: int) -> None:
    shown = size(nbytes)
    assert machine.parse_size(shown) == pytest.approx(nbytes, rel=0.06)  # a tenth of the smallest number shown, 1.0


def test_sizes_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1536, 5 << 20, 3 << 29, 1 << 52)] == [
        *("0 B", "1023 B", "1.5 KiB", "5.0 MiB", "1.5 GiB", "4096.0 TiB")
    ]


# ---- free memory


def test_free_memory_is_within_the_machine() -> None:
    assert 0 < machine.free_memory() <= machine.total_memory() <= psutil.virtual_memory().total
    assert 0 < machine.default_budget() <= machine.total_memory()


GIB = 1 << 30


def group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a folder in the place of /sys/fs/cgroup, and let /proc/self/cgroup be `tmp_path / "self"`."""
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "self")
    return tmp_path


def test_a_control_group_with_less(cgroups: Path) -> None:
    (cgroups / "self").write_text("0::/outer/inner\n")
    group(cgroups / "cgroup", {})
    group(cgroups / "cgroup/outer", {"memory.max": f"{GIB}\n", "memory.current": f"{GIB // 2}\n"})
    group(cgroups / "cgroup/outer/inner", {"memory.max": "max\n", "memory.current": "5\n"})
    assert machine.total_memory() == GIB
    assert machine.free_memory() == GIB // 2
    # The page cache of a group is free for the taking.
    stat = f"anon 7\nactive_file {GIB // 8}\ninactive_file {GIB // 8}\n"
    group(cgroups / "cgroup/outer", {"memory.stat": stat})
    assert machine.free_memory() == 3 * GIB // 4
    group(cgroups / "cgroup/outer/inner", {"memory.max": "4096"})
    assert machine.total_memory() == 4096
    assert machine.free_memory() == 4091


def test_a_container_sees_its_own_group_as_the_root(cgroups: Path) -> None:
    (cgroups / "self").write_text("0::/the/hosts/path\n")
    group(cgroups / "cgroup", {"memory.max": f"{GIB}\n", "memory.current": "0\n"})
    assert machine.free_memory() == GIB


def test_control_groups_of_version_1(cgroups: Path) -> None:
    (cgroups / "self").write_text("5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n")
    group(cgroups / "cgroup/memory/a", {"memory.limit_in_bytes": f"{GIB}", "memory.usage_in_bytes": f"{GIB // 4}"})
    assert (machine.total_memory(), machine.free_memory()) == (GIB, 3 * GIB // 4)


@pytest.mark.parametrize("text", ["", "nonsense\n", "0::/../../etc\n"])
def test_odd_or_absent_control_groups_limit_nothing(text: str, cgroups: Path) -> None:
    (cgroups / "self").write_text(text)
    assert machine.total_memory() == psutil.virtual_memory().total


# ---- CPUs


@pytest.fixture
def many_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


@pytest.mark.parametrize(
    ("quota", "count"),
    [("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1), ("max 100000", 64), ("9900000 100000", 64),
     ("", 64), ("200000", 64), ("2 0", 64), ("-1 100000", 64), ("200000 100000 7", 2)],
)  # fmt: skip
def test_quotas_of_control_groups(quota: str, count: int, cgroups: Path, many_cpus: None) -> None:
    """`docker --cpus`: the affinity still has all CPUs of the machine."""
    (cgroups / "self").write_text("0::/outer/inner\n")
    group(cgroups / "cgroup/outer", {"cpu.max": f"{quota}\n"})
    group(cgroups / "cgroup/outer/inner", {"cpu.max": "max 100000\n"})
    assert machine.cpus() == count


@pytest.mark.parametrize(("quota", "count"), [("400000", 4), ("-1", 64), ("1000", 1)])
def test_quotas_of_control_groups_of_version_1(quota: str, count: int, cgroups: Path, many_cpus: None) -> None:
    (cgroups / "self").write_text("5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n")
    group(cgroups / "cgroup/cpu/a", {"cpu.cfs_quota_us": f"{quota}\n", "cpu.cfs_period_us": "100000\n"})
    assert machine.cpus() == count


def test_all_that_compute_keep_to_the_quota(cgroups: Path, many_cpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch, the dequantizers, llama.cpp, plans and measurements; `-t` is the user's own decision."""
    (cgroups / "self").write_text("0::/\n")
    group(cgroups / "cgroup", {"cpu.max": "300000 100000\n"})
    number, asked = [8], []
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: number.__setitem__(0, count))
    model = open_model()
    session = Session(model, [0, 465])
    assert (number, model.weights.threads) == ([3], 3)
    monkeypatch.setattr(planner, "fitting", lambda *args, threads, **options: asked.append(threads) or 1 / 0)
    monkeypatch.setattr(Child, "ask", lambda self, call, *, threads, **options: asked.append(threads) or 1 / 0)
    for call in (
        lambda: session.plan("svd"),
        lambda: run_llama_cpp(model.path, [0]),
        lambda: rewrite_as_f32(model.path, cgroups),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
    assert asked == [3, 3, 3]
    number[0] = 8
    assert bench.measure(model.gguf, [8], {"Q4_K": 1}).threads == 3
    assert number == [8]  # as it was
    assert open_model(threads=5).weights.threads == 5


# ---- this process


def written(size: int) -> mmap.mmap:
    """Return memory that is fresh from the system; an allocator may have some left that was counted before."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for _ in range(size // mmap.PAGESIZE):  # a copy of the whole could stay with the allocator, and be counted as well
        memory.write(b"x" * mmap.PAGESIZE)
    return memory


@LINUX
def test_anonymous_memory_is_what_was_written() -> None:
    size = 48 << 20
    before = machine.anonymous_memory()
    with written(size) as held:
        grown = machine.anonymous_memory() - before
        assert size * 0.95 < grown < size * 1.3
        assert len(held) == size


@LINUX
def test_a_mapped_file_is_not_anonymous(tmp_path: Path) -> None:
    size, path = 48 << 20, tmp_path / "file"
    path.write_bytes(bytes(size))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = machine.anonymous_memory()
        total = sum(mapped[i] for i in range(0, size, mmap.PAGESIZE))
        assert total == 0
        assert machine.anonymous_memory() - before < 4 << 20


def test_without_proc_the_process_is_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_STATUS", "/nonexistent")
    assert 1 << 20 < machine.anonymous_memory() <= psutil.Process().memory_info().rss


@LINUX
def test_the_peak_is_seen_though_it_has_passed() -> None:
    size = 64 << 20
    with machine.PeakMemory(interval=0.001) as peak, written(size):
        time.sleep(0.05)
    assert size * 0.95 < peak.nbytes - peak.start < size * 1.3
    assert machine.anonymous_memory() < peak.nbytes - size // 2
    assert not peak._thread.is_alive()


def test_the_peak_survives_an_error() -> None:
    with pytest.raises(ZeroDivisionError), machine.PeakMemory() as peak:
        _ = 1 / 0
    assert peak.nbytes >= peak.start > 0
    assert not peak._thread.is_alive()


# ---- the page cache


@LINUX
@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is of the GNU C library")
def test_what_was_freed_between_tensors_that_stay_is_given_back() -> None:
    machine.return_freed_memory()
    tensors = [torch.ones(100_000) for _ in range(400)]
    kept = tensors[::2]
    del tensors
    before = machine.anonymous_memory()
    machine.trim_memory()
    assert before - machine.anonymous_memory() > 0.9 * sum(tensor.nbytes for tensor in kept)


def test_what_was_just_written_is_cached(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * mmap.PAGESIZE + 5))
    assert machine.cached_bytes(path) == 3 * mmap.PAGESIZE + 5
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = machine.cached_bytes(path)
    if left:
        pytest.skip("this file system keeps its pages")
    assert left == 0


@LINUX
def test_large_files_are_asked_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_RESIDENCY_STEP", 2 * mmap.PAGESIZE)
    path = tmp_path / "file"
    path.write_bytes(bytes(5 * mmap.PAGESIZE))
    assert machine.cached_bytes(path) == 5 * mmap.PAGESIZE


def test_elsewhere_the_cache_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert machine.cached_bytes(tmp_path) is None


def test_no_gpu_is_invented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpu_memory() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f6c")
    assert machine.gpu_memory() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    found = machine.gpu_memory(10**6)
    assert found is None


# ---- folders in memory


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("/tmp/x", True), ("/tmp/disk/x", False), ("/tmpx", False), ("/a b/c", True), ("/over/x", False), ("/", False)],
)
def test_folders_in_memory(folder: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounts").write_text(
        "/dev/sda / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/sdb /tmp/disk ext4 rw 0 0\nramfs /a\\040b ramfs rw 0 0\n"
        "tmpfs /over tmpfs rw 0 0\n/dev/sdc /over xfs rw 0 0\nodd\n"
    )
    monkeypatch.setattr(machine, "_MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr(Path, "resolve", lambda self: self)
    assert machine.in_memory(folder) == expected
    monkeypatch.setattr(machine, "_MOUNTS", tmp_path / "absent")
    assert not machine.in_memory(folder)


@LINUX
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_shared_memory_is_in_memory() -> None:
    assert machine.in_memory("/dev/shm")
    assert not machine.in_memory("/proc")
