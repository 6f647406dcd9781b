"""Quantities as text."""

import math

import pytest

from ggjac import units


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3.1149e-7, "3.1 × 10⁻⁷"), (1e-5, "10⁻⁵"), (-2e-9, "−2.0 × 10⁻⁹"), (0.0, "0"), (1.0, "1.0"), (0.41, "0.41"),
        (123.4, "123"), (1234.5, "1.2 × 10³"), (None, "–"), (math.nan, "–"), (math.inf, "–"),
    ],
)  # fmt: skip
def test_numbers(value: float | None, shown: str) -> None:
    assert units.power(value) == shown


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [
        (0, "0 B"), (999, "999 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3740224, "3.6 MiB"),
        (1.5 * 2**30, "1.5 GiB"), (42 * 10**9, "39.1 GiB"), (5 * 2**40, "5.0 TiB"), (5000 * 2**40, "5000.0 TiB"),
    ],
)  # fmt: skip
def test_bytes_are_binary(nbytes: float, shown: str) -> None:
    assert units.size(nbytes) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"), (1e-7, "< 0.001 s"), (0.074, "0.074 s"), (0.42, "0.42 s"), (1.0, "1 s"), (2.5, "2.5 s"),
        (9.97, "10 s"), (42, "42 s"), (59.4, "59 s"), (59.7, "1 min 0 s"), (75.2, "1 min 15 s"), (187, "3 min 7 s"),
        (3599.6, "1 h 0 min"), (3720, "1 h 2 min"), (7300.0, "2 h 1 min"), (400_000, "111 h 6 min"), (math.inf, "–"),
    ],
)  # fmt: skip
def test_durations(seconds: float, shown: str) -> None:
    assert units.duration(seconds) == shown


def test_passing() -> None:
    """A bound on either side of the steps that are measured, a step between them."""
    assert [units.passing(t, 0.01, 1) for t in (None, 0.01, 0.0123)] == ["> 1", "≤ 0.01", "0.012"]
