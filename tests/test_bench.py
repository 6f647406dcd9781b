"""Measurements: that they count the right work, and how their rates are used. No time is tested."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import held, invoke

from ggjac import weights
from ggjac.gguf import GGUFFile, open_gguf
from ggjac.planner import bench, memory
from ggjac.sizes import SMALL_PIECES

TinyFile = Callable[..., Path]
RATES = bench.Measured(1e9, "made up", {"Q4_K": 4e9, "Q6_K": 1e9}, {8: 1e10, 32: 4e10}, 1e10)


def test_types_that_were_not_measured_count_as_the_slowest() -> None:
    assert [RATES.dequantize(name) for name in ("Q4_K", "Q6_K", "F32")] == [4e9, 1e9, 1e9]


def test_rates_of_products_between_and_beyond_those_measured() -> None:
    assert [RATES.gemm(columns) for columns in (8, 32, 1000)] == [1e10, 4e10, 4e10]
    assert RATES.gemm(16) == pytest.approx(2e10)  # halfway in logarithms of both
    assert RATES.gemm(2) == pytest.approx(0.25e10)  # as long as with 8: the tile must be read anyway
    assert all(RATES.gemm(i) <= RATES.gemm(i + 1) for i in range(1, 100))


def test_data_and_lines() -> None:
    data = RATES.data()
    assert data["bus_bytes_per_second"] is None
    assert data["touch_bytes_per_second"] is None
    assert data["flop_per_second"] == {"8": 1e10, "32": 4e10}
    assert data["disk_method"] == "made up"
    assert dataclasses.replace(RATES, bus=5e9).data()["bus_bytes_per_second"] == 5e9
    text = "\n".join(RATES.lines())
    for words in ("disk 1.00 GB/s (made up)", "Q4_K 4.00, Q6_K 1.00 Gweights/s", "40 with 32 columns"):
        assert words in text


def test_the_median_of_repeated_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, steps, calls = 0.0, iter([100.0, 3.0, 1.0, 2.0, 9.0]), 0

    def call() -> None:
        nonlocal clock, calls
        clock, calls = clock + next(steps), calls + 1

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock)
    assert bench.seconds_of(call, budget=0.5, least=3) == 2.0  # the first call is not counted
    assert calls == 4


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a second pass between any two looks at the clock."""
    clock = itertools.count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(clock)))


def test_turns_count_the_weights_of_a_tile_and_the_flop_of_both_directions(
    steps: None, monkeypatch: pytest.MonkeyPatch, tiny_file: TinyFile
) -> None:
    read: list[tuple[int, int]] = []
    dequantize = weights.WeightStore.dequantize

    def watched(store: weights.WeightStore, key: weights.Key, place: str) -> torch.Tensor:
        read.append((key.start, key.stop))
        return dequantize(store, key, place)

    monkeypatch.setattr(weights.WeightStore, "dequantize", watched)
    with open_gguf(tiny_file("q8_0")) as file:
        largest = bench.dominant(file, "Q8_0")
        assert largest.elements == max(t.elements for t in file.tensors.values() if t.type.name == "Q8_0")
        rows, columns = largest.rows, largest.shape[-1]
        found = bench.turn_rates(file, "Q8_0", 10, "float32", 1)
        assert found == (rows * columns, 2 * 10 * rows * columns)
        assert len(read) == 2 * bench.TURNS
        assert set(read) == {(0, rows)}
        read.clear()
        assert bench.turn_rates(file, "Q8_0", 5, "bfloat16", 1, tile=3 * columns + 1) == (
            3 * columns,
            2 * 5 * 3 * columns,
        )
        assert [start for start, _ in read[:3]] == [0, 3, 6]  # another tile each time, none of them in a cache
        assert all(0 <= start and stop <= rows for start, stop in read)
        assert bench.moved_bytes(file, "Q8_0", "float32") == pytest.approx(34 / 32 + 4)


def test_square_products_and_copies_count_what_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(call: Callable[[], object], *_: float) -> float:
        call()
        return 1.0

    monkeypatch.setattr(bench, "seconds_of", once)
    assert bench.square_rate("float32", sizes=[8]) == 2 * 8**3
    assert bench.copy_rate() == 2 * 4 * bench.COPY_ELEMENTS
    assert bench.touch_rate() == bench.TOUCH_BYTES


def test_square_matrices_grow_as_long_as_their_product_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    took = iter([0.001, 0.001, 0.1])
    monkeypatch.setattr(bench, "seconds_of", lambda *_: next(took))
    assert bench.square_rate("bfloat16", sizes=[2, 4, 8, 16]) == 2 * 4**3 / 0.001
    assert next(took, None) is None


def test_disk_reads_every_byte_of_a_small_file_once(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_file("plain")
    with open_gguf(path) as file:
        rate, method = bench.disk_rate(file)
        assert rate > 0
        read = float(method.split(" MB")[0]) * 1e6
        assert read <= path.stat().st_size * 1.01 + 1e6
        assert "dropped from the page cache first" in method
        monkeypatch.delattr(bench.os, "posix_fadvise")
        assert bench.disk_rate(file) == (
            bench.CACHED_RATE,
            "not measured: this system cannot drop a file from its cache",
        )


def test_measuring_takes_no_more_memory_than_a_tile_and_buffers(tiny_file: TinyFile) -> None:
    """It comes before the work, whose plan has the tile and the buffers of threads."""
    with open_gguf(tiny_file("q4_k_mixed")) as file:
        found = held(lambda: bench.measure(file, [5], {"Q4_K": 1}, threads=2))
    assert found <= 4 * SMALL_PIECES.tile + 2 * memory.THREAD_BYTES


def test_a_dtype_that_is_slow_on_a_small_tile_is_not_measured_on_a_whole_one(
    monkeypatch: pytest.MonkeyPatch, tiny_file: TinyFile
) -> None:
    tiles: list[int] = []

    def rates(file: GGUFFile, type: str, columns: int, dtype: str, *rest: Any) -> tuple[float, float]:
        tiles.append(rest[2])
        return speed[dtype], 1e9

    monkeypatch.setattr(bench, "turn_rates", rates)
    with open_gguf(tiny_file("q4_k_mixed")) as file:
        for rate, measured in ((1e4, [bench.ROUGH_TILE]), (1e6, [bench.ROUGH_TILE, SMALL_PIECES.tile])):
            speed = {"float32": 1e5, "bfloat16": rate}
            gain = bench.rounding_gain(file, {"Q4_K": 1}, 8, dtype="bfloat16", threads=1)
            assert gain == pytest.approx((1e-5 + 16e-9) / (1 / rate + 16e-9))
            assert tiles == [tile for tile in measured for _ in speed]
            tiles.clear()


def test_all_of_it(monkeypatch: pytest.MonkeyPatch, tiny_file: TinyFile) -> None:
    monkeypatch.setattr(bench, "COPY_ELEMENTS", 1 << 12)
    threads = torch.get_num_threads()
    with open_gguf(tiny_file("q4_k_mixed")) as file:
        types = {"Q4_K": 90, "Q6_K": 9, "Q5_0": 1}
        found = bench.measure(file, [5, 40, 10**6], types, dtype="bfloat16", threads=2)
    assert set(found.types) == {"Q4_K", "Q6_K"}  # one weight in fifty at least
    assert list(found.multiply) == [5, 40, bench.MOST_COLUMNS]
    assert (found.dtype, found.threads, found.device) == ("bfloat16", 2, "cpu")
    assert math.isinf(found.bus)
    assert min(*found.types.values(), *found.multiply.values(), found.disk, found.copy, found.touch, found.call) > 0
    assert torch.get_num_threads() == threads


def test_a_rate_above_its_limit_is_no_percentage(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a busy machine: "364 % of square matrices" beside a limit that cannot be exceeded."""
    monkeypatch.setattr(bench, "square_rate", lambda *_: 1.0)
    out = invoke("bench", "-t", 1).stdout
    rows = [line for line in out.split("\n") if line.startswith("multiply a tile")]
    assert rows
    assert all(line.split()[-3:] == ["above", "square", "matrices"] for line in rows)
    assert "measured while other programs ran: measure again" in out
