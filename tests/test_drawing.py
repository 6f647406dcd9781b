"""Charts as data: axes and ticks; and what matplotlib draws of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggjac.drawing import charts, figures
from ggjac.report import schema

FLOATS = st.floats(-1e100, 1e100).map(lambda value: schema.number(value, ""))


@settings(deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=20), st.booleans(), st.sampled_from(["linear", "whole", "log", "flipped"]))
def test_axes_of_anything(values: list[float], zero: bool, kind: str) -> None:
    if kind in ("linear", "whole"):
        axis = charts.linear("x", values, zero=zero, whole=kind == "whole", pad=0.05)
    else:
        axis = charts.logarithmic("x", values, flipped=kind == "flipped")
    shown = values if kind in ("linear", "whole") else [value for value in values if value > 0]
    places = [axis.place(value) for value in sorted(shown)]
    assert all(0 <= place <= 1 for place in places)
    assert places == sorted(places, reverse=axis.flipped)
    ticks = [tick for tick, _ in axis.ticks]
    assert len(ticks) <= 20
    assert all(axis.low <= tick * (1 + 1e-9) and tick * (1 - 1e-9) <= axis.high for tick in ticks if tick > 0)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0, 43.6], ["0", "10", "20", "30", "40"]),
        ([0, 0.97], ["0.0", "0.2", "0.4", "0.6", "0.8"]),
        ([-4.1, 3.9], ["−4", "−2", "0", "2"]),
        ([7, 7], ["4", "6", "8", "10"]),
    ],
)
def test_ticks_are_round(values: list[float], labels: list[str]) -> None:
    assert [label for _, label in charts.linear("x", values).ticks] == labels


def test_log_ticks_are_round() -> None:
    assert [label for _, label in charts.logarithmic("x", [1, 30000]).ticks] == ["1", "10", "100", "1000", "10000"]
    assert [label for _, label in charts.logarithmic("x", [28, 44]).ticks] == ["30", "40", "50"]


def test_a_chart_without_points_is_none() -> None:
    assert charts.curves("key", "title", ("x", "y"), [charts.Series("empty", ())], "") == []


@pytest.mark.parametrize("log", [True, False])
def test_variants_have_their_scale_in_their_name(log: bool) -> None:
    series = [charts.Series("s", ((1.0, 2.0), (2.0, 3.0)), error=(1.0, 0.0)), charts.Series("empty", ())]
    drawn = charts.curves("key", "title", ("x", "y"), series, "", log=log)
    assert [chart.name for chart in drawn] == (["key-linear", "key-log"] if log else ["key"])
    assert all(chart.series == (series[0],) for chart in drawn)
    assert drawn[0].y.low <= 0
    assert drawn[0].y.high >= 3, "room for the error bar"


def test_characters_that_no_font_can_draw_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_drawable", lambda: frozenset(map(ord, "ab ")))
    assert figures._label("a桥 b") == "a⟨U+6865⟩ b"


def test_of_many_bars_the_largest_are_drawn_in_their_order() -> None:
    values = [float(i % 7) - i / 50 for i in range(100)]
    drawn = figures.draw(charts.Bars("key", "title", "label", [f"n{i}" for i in range(100)], values)).axes[0]
    kept = [patch.get_width() for patch in drawn.patches]
    assert len(kept) == figures.MAX_BARS
    assert sorted(map(abs, kept)) == sorted(map(abs, values))[-figures.MAX_BARS :]
    assert kept == [value for value in values if value in kept]
    assert drawn.get_title(loc="left") == "title, the 60 largest of 100"


def test_a_file_is_the_same_each_time() -> None:
    chart = charts.Bars("key", "title", "label", ["a", "b"], [1.0, -1.0])
    for kind in ("png", "svg", "pdf"):
        assert figures.encoded(figures.draw(chart), kind) == figures.encoded(figures.draw(chart), kind)
