"""Charts as data: what the page draws as inline SVG and `figures` with matplotlib, so that both show the same.

A chart knows its axes and series and nothing of how it is drawn. Places on an axis are fractions from 0 to 1.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ggjac.report.load import Run
from ggjac.report.numbers import minus, power

MAX_POINTS = 2000  # of a scatter; beyond, a seeded sample that keeps the extremes
MAX_CELLS = 20_000  # of a heat grid; beyond, a page would be slow, and no eye sees them

KINDS = {"layer": "layer", "attn": "attention", "mlp": "MLP"}
MAPS = {
    "cumulative": "from the input to this depth",
    "blockwise": "each block alone",
    "to_end": "from this depth to the end",
}


@dataclass(frozen=True)
class Axis:
    """A scale: `low` to `high` in data units, with ticks."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False
    flipped: bool = False

    def place(self, value: float | int) -> float:
        """Return where a value lies, from 0 at the start of the axis to 1 at its end."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(at, self.low))
        share = min(1.0, max(0.0, (at - low) / (high - low)))
        return 1 - share if self.flipped else share


@dataclass(frozen=True)
class Series:
    """Points of one kind, in data units; `error` is one standard error of y, 0 where it is exact."""

    name: str
    points: tuple[tuple[float, float], ...]
    tone: str = "accent"  # accent, ink or faint
    line: bool = True
    error: tuple[float, ...] = ()
    labels: tuple[tuple[int, str], ...] = ()  # of some points, by their place in `points`


@dataclass(frozen=True)
class Chart:
    """One figure. `scale` names it among the variants of a switch; `summary` says it in words."""

    key: str
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    scale: str = "linear"
    diagonal: bool = False
    square: bool = False
    summary: str = ""
    notes: tuple[str, ...] = field(default=())


def linear(
    label: str, values: Iterable[float | int], *, zero: bool = False, whole: bool = False, pad: float = 0.0
) -> Axis:
    """Return a linear axis over some values, with round ticks; `zero` includes 0, `whole` ticks at integers only."""
    found = [float(value) for value in values]
    low, high = min(found), max(found)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    span = high - low or abs(high) or 1.0
    low, high = (low if zero and low == 0 else low - pad * span), high + pad * span
    if high == low:
        low, high = low - 0.5 * span, high + 0.5 * span
    step = _step(high - low, whole)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    places = [i * step for i in range(first, last + 1)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    tall = max(abs(low), abs(high)) >= 1e5 or digits > 5
    names = [power(p, 2) if tall else minus(f"{p:.{digits}f}") for p in places]
    return Axis(label, low, high, tuple(zip(places, names, strict=True)))


def _step(span: float, whole: bool) -> float:
    """Return a round distance that cuts a span into some five pieces."""
    rough = span / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    return max(1.0, step) if whole else step


def logarithmic(label: str, values: Iterable[float | int], *, flipped: bool = False) -> Axis:
    """Return a logarithmic axis over the positive ones among some values, ticked at 1, 2, 5 or at powers of ten."""
    found = [float(value) for value in values if value > 0] or [1.0]
    low, high = min(found), max(found)
    decades = math.log10(high / low)
    low, high = (low / 1.15, high * 1.15) if decades > 0.05 else (low / 2, high * 2)
    factors = (1, 2, 5) if decades < 2 else (1,)
    stride = max(1, round(decades / 6))
    places = [
        factor * 10.0**exponent
        for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factor in factors
        if exponent % stride == 0 and low <= factor * 10.0**exponent <= high
    ]
    if len(places) < 2:  # a short stretch between two such marks
        places = [tick for tick, _ in linear(label, (low, high)).ticks if tick > 0]
    names = [minus(f"{p:g}") if 1e-4 < p < 1e6 else power(p) for p in places]
    return Axis(label, low, high, tuple(zip(places, names, strict=True)), log=True, flipped=flipped)


def scales(chart: Chart, values: Sequence[float], zero: bool = True) -> list[Chart]:
    """Return a chart with a linear and with a logarithmic y axis; linear alone where nothing is positive."""
    both = [replace(chart, y=linear(chart.y.label, values, zero=zero, pad=0.05), scale="linear")]
    if sum(value > 0 for value in values) > 1:
        both.append(replace(chart, y=logarithmic(chart.y.label, values), scale="log"))
    return both


def singular_values(run: Run) -> list[Chart]:
    """Draw the singular values, in both scales; nothing where there are none."""
    triplets = (run.content["svd"] or {}).get("triplets", [])
    values = [triplet["singular_value"] for triplet in triplets]
    if not values:
        return []
    chart = Chart(
        key="singular-values",
        title="Singular values of the detached Jacobian",
        x=linear("index", range(len(values)), whole=True, pad=0.03),
        y=Axis("σ", 0.0, 1.0, ()),
        series=(Series("σ", tuple((float(j), value) for j, value in enumerate(values))),),
        summary=f"{len(values)} singular values, from {values[0]:.4g} down to {values[-1]:.4g}.",
    )
    return scales(chart, values)


def stable_ranks(run: Run) -> list[list[Chart]]:
    """Draw the stable rank by depth: for each map a chart in both scales, a series for layer, attention and MLP."""
    taps = [tap for tap in (run.content["layers"] or {}).get("taps", []) if _stable(tap) is not None]
    found = []
    tones = {"layer": "accent", "attn": "ink", "mlp": "faint"}
    for name, words in MAPS.items():
        series = []
        for kind, tone in tones.items():
            own = sorted((t for t in taps if t["map"] == name and t["kind"] == kind), key=lambda t: t["index"])
            if own:
                points = tuple((float(t["index"]), t["stable_rank"]["value"]) for t in own)
                error = tuple(t["stable_rank"]["error"] or 0.0 for t in own)
                series.append(Series(KINDS[kind], points, tone, error=error))
        if not series:
            continue
        values = [y for s in series for _, y in s.points]
        depths = [x for s in series for x, _ in s.points]
        ends = [f"{s.name} {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}" for s in series]
        chart = Chart(
            key=f"stable-rank-{name.replace('_', '-')}",
            title=f"Stable rank by depth, {words}",
            x=linear("blocks", depths, whole=True, pad=0.03),
            y=Axis("stable rank", 0.0, 1.0, ()),
            series=tuple(series),
            summary=f"Stable rank from the first depth to the last: {'; '.join(ends)}.",
        )
        found.append(scales(chart, values))
    return found


def _stable(tap: dict) -> float | None:
    return (tap["stable_rank"] or {}).get("value")


def paths(run: Run) -> list[Chart]:
    """Draw the path of the output's two leading directions through the depths (paper, analysis A14)."""
    rows = sorted((run.content["layers"] or {}).get("path") or [], key=lambda row: row["index"])
    if len(rows) < 2:
        return []
    points = tuple((row["values"][0], row["values"][1]) for row in rows)
    first, last = points[0], points[-1]
    x = linear("along direction 0", [x for x, _ in points], zero=True, pad=0.06)
    y = linear("along direction 1", [y for _, y in points], zero=True, pad=0.06)
    # Labels enough to see which way it goes, and none upon another: the ends first.
    every, labelled = max(1, len(rows) // 6), list[int]()
    for i in (len(rows) - 1, *range(0, len(rows) - 1, every)):
        places = [(x.place(points[k][0]), y.place(points[k][1])) for k in (i, *labelled)]
        if all(math.dist(places[0], other) > 0.06 for other in places[1:]):
            labelled.append(i)
    labels = tuple((i, str(rows[i]["index"])) for i in sorted(labelled))
    return [
        Chart(
            key="path",
            title="The way to the output's two leading directions",
            x=x,
            y=y,
            series=(Series("depth", points, labels=labels),),
            square=True,
            summary=f"{len(rows)} depths, from ({first[0]:.2g}, {first[1]:.2g}) to ({last[0]:.2g}, {last[1]:.2g}).",
        )
    ]


def rank_axes(run: Run) -> Chart | None:
    """Draw empty axes for the rank of a token by depth; the page's script and `ranks_by_depth` fill them."""
    ranks = (run.content["layers"] or {}).get("ranks")
    if not ranks or not ranks["tokens"] or not ranks["depths"]:
        return None
    depths = [depth["index"] for depth in ranks["depths"]]
    worst = max((rank for depth in ranks["depths"] for rank in depth["ranks"]), default=1)
    return Chart(
        key="rank-by-depth",
        title="Rank by depth",
        x=linear("blocks", depths, whole=True, pad=0.03),
        y=logarithmic("rank", [1, max(10, worst)], flipped=True),
        series=(),
        summary="The table below has the numbers.",
    )


def ranks_by_depth(run: Run) -> list[Chart]:
    """Draw the predicted token's rank by depth, as the page does when it opens."""
    axes, predictions = rank_axes(run), run.content["predictions"]
    if axes is None or not predictions:
        return []
    ranks = run.content["layers"]["ranks"]
    ids = [token["id"] for token in ranks["tokens"]]
    if predictions[0]["id"] not in ids:
        return []
    column = ids.index(predictions[0]["id"])
    rows = sorted(ranks["depths"], key=lambda depth: depth["index"])
    points = tuple((float(row["index"]), float(row["ranks"][column])) for row in rows if row["ranks"][column] > 0)
    if not points:
        return []
    name = ranks["tokens"][column]["token"]
    return [replace(axes, title=f"Rank of {name} by depth", series=(Series(name, points),))]


def scatters(run: Run) -> list[Chart]:
    """Draw the output against its reconstruction, and against the ordinary Jacobian's where that was computed."""
    y, found = run.vectors.get("y"), []
    if y is None:
        return []
    rebuilt = {
        "detached": ("J x + offset", _sum(run.vectors.get("linear_output"), run.vectors.get("offset"))),
        "ordinary": ("ordinary Jacobian × x", run.vectors.get("ordinary_output")),
    }
    for name, (label, values) in rebuilt.items():
        if values is None:
            continue
        shown = _sample(y, values)
        note = () if len(shown) == len(y) else (f"{len(shown)} of {len(y)} components, the extremes among them.",)
        error = float(np.linalg.norm(values - y) / (np.linalg.norm(y) or 1.0))
        pairs = tuple((float(y[i]), float(values[i])) for i in shown)
        found.append(
            Chart(
                key=f"reconstruction-{name}",
                title="Reconstruction" if name == "detached" else "The ordinary Jacobian",
                x=linear("y", y, pad=0.04),
                y=linear(label, [*y, *values], pad=0.04),  # y's own scale at least: what is flat looks flat
                series=(Series(label, pairs, "accent" if name == "detached" else "ink", line=False),),
                diagonal=True,
                square=True,
                summary=f"{label} against y, {len(y)} components: relative distance {power(error)}.",
                notes=note,
            )
        )
    return found


def _sum(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else first + second


def _sample(y: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the indices of at most `MAX_POINTS` components, with the extremes of both."""
    if len(y) <= MAX_POINTS:
        return np.arange(len(y))
    keep = np.concatenate([np.argsort(v)[[*range(20), *range(-20, 0)]] for v in (y, values, values - y)])
    rest = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(len(y)), keep))
    return np.sort(np.concatenate([np.unique(keep), rest[: MAX_POINTS - len(np.unique(keep))]]))


# -- many lines of one kind --------------------------------------------------------------------------------------------


def _curves(
    key: str, title: str, axes: tuple[str, str], series: Iterable[Series], summary: str, *, whole: bool = True
) -> list[Chart]:
    """Return a chart of some lines in both scales; nothing where they have no points."""
    shown = tuple(s for s in series if s.points)
    if not shown:
        return []
    xs, ys = ([point[axis] for s in shown for point in s.points] for axis in (0, 1))
    # A scale that shows error bars whole.
    ends = [y + sign * e for s in shown for (_, y), e in zip(s.points, s.error, strict=False) for sign in (-1, 1)]
    chart = Chart(
        key=key,
        title=title,
        x=linear(axes[0], xs, whole=whole, pad=0.03),
        y=Axis(axes[1], 0.0, 1.0, ()),
        series=shown,
        summary=summary,
    )
    variants = scales(chart, ys)
    wide = linear(axes[1], [*ys, *ends], zero=True, pad=0.05)
    return [v if v.y.log else replace(v, y=wide) for v in variants]


def _known(pairs: Iterable[tuple[float | int, float | None]]) -> tuple[tuple[float, float], ...]:
    """Return points without those that are not known."""
    return tuple((float(x), y) for x, y in pairs if y is not None)


def _from_to(name: str, points: Sequence[tuple[float, float]]) -> str:
    return f"{name} {points[0][1]:.3g} to {points[-1][1]:.3g}" if points else f"{name} none"


def per_token(run: Run) -> list[Chart]:
    """Draw the largest singular value of each position's own map, in both scales."""
    entries = (run.content["svd"] or {}).get("per_token") or []
    points = _known((e["position"], e["triplets"][0]["singular_value"]) for e in entries if e["triplets"])
    summary = f"{len(points)} positions: {_from_to('σ₀', points)}."
    title = "Largest singular value of each position's own map"
    return _curves("per-token", title, ("position", "σ₀"), [Series("σ₀", points)], summary)


def readability(run: Run) -> list[Chart]:
    """Draw the coherence of the decoded vectors beside that of shuffled ones: a chart for each side."""
    found, drawn = (run.content["svd"] or {}).get("readability") or {}, []
    for side, words in (("left", "Left vectors"), ("right", "Right vectors")):
        own = found.get(side) or {"scores": []}
        points = _known(enumerate(own["scores"]))
        if not points:
            continue
        last = float(max(1, len(own["scores"]) - 1))
        series = [Series("decoded", points)]
        mean, sd = own["shuffled"]["mean"], own["shuffled"]["sd"]
        if mean is not None:
            series.append(Series("shuffled ± sd", ((0.0, mean), (last, mean)), "faint", error=(sd or 0.0, sd or 0.0)))
        summary = f"Coherence: {_from_to('from', points)}; of shuffled vectors {0.0 if mean is None else mean:.3g}."
        drawn += _curves(f"coherence-{side}", words, ("index", "coherence"), series, summary)[:1]  # may be negative
    return drawn


def longest(run: Run) -> list[Chart]:
    """Draw the norms of the longest column and row of the map at each position, in both scales."""
    entries = (run.content["norms"] or {}).get("positions") or []
    series = [
        Series(words, _known((e["position"], e[side][0]["norm"]) for e in entries if e[side]), tone)
        for side, words, tone in (("columns", "longest column", "accent"), ("rows", "longest row", "ink"))
    ]
    summary = "; ".join(_from_to(s.name, s.points) for s in series) + "."
    return _curves("norms", "Longest column and row by position", ("position", "norm"), series, summary)


def dense(run: Run) -> list[list[Chart]]:
    """Draw the size of each position's part of the dense map, and of what it contributes."""
    entries = (run.content["jacobian"] or {}).get("positions") or []
    found = []
    for key, title, label in (
        ("frobenius", "Size of each position's map", "‖J_i‖ (Frobenius)"),
        ("contribution_norm", "What each position contributes", "‖J_i x_i‖"),
    ):
        points = _known((e["position"], e[key]) for e in entries)
        axes = "position", label
        found.append(
            _curves(f"dense-{key.split('_')[0]}", title, axes, [Series(label, points)], _from_to(label, points) + ".")
        )
    return [variants for variants in found if variants]


def ranks_over_prompts(run: Run) -> list[Chart]:
    """Draw the stable rank of each token's own map by its position: every prompt's, and the mean over prompts."""
    given = run.content["ranks"]
    if not given:
        return []
    every = [
        (float(i), token["stable_rank"]["value"])
        for prompt in given["prompts"]
        for i, token in enumerate(prompt["tokens"])
    ]
    points = _known(every)
    stride = -(-len(points) // MAX_POINTS) or 1
    rows = [row for row in given["by_position"] if row["mean"] is not None]
    mean = Series(
        "mean ± standard error",
        tuple((float(row["position"]), row["mean"]) for row in rows),
        error=tuple(row["error"] or 0.0 for row in rows),
    )
    cloud = Series("each prompt", points[::stride], "faint", line=False)
    summary = f"{len(given['prompts'])} prompts; {_from_to('mean', mean.points)}."
    series = [cloud, mean] if len(given["prompts"]) > 1 else [replace(mean, name="stable rank")]
    title = "Stable rank of each token's own map, by position"
    return _curves("ranks-by-position", title, ("position", "stable rank"), series, summary)


def spectra(run: Run) -> list[Chart]:
    """Draw the singular values of two files of one model, in both scales."""
    values = (run.content["compare"] or {}).get("singular_values") or []
    series = [
        Series(side, _known(enumerate(value[side] for value in values)), tone)
        for side, tone in (("a", "accent"), ("b", "ink"))
    ]
    summary = "; ".join(_from_to(s.name, s.points) for s in series) + "."
    return _curves("compare-singular-values", "Singular values of both files", ("index", "σ"), series, summary)


def angles(run: Run) -> list[Chart]:
    """Draw the principal angles between the spans of two files' singular vectors, the smallest first."""
    given = (run.content["compare"] or {}).get("angles") or {"left": [], "right": []}
    series = [
        Series(side, _known(enumerate(reversed(given[side]), 1)), tone)
        for side, tone in (("left", "accent"), ("right", "ink"))
    ]
    summary = "; ".join(_from_to(s.name, s.points) for s in series) + " degrees."
    title = "Principal angles between the spans, smallest first"
    return _curves("compare-angles", title, ("angle", "degrees"), series, summary)


def divergences(run: Run) -> list[Chart]:
    """Draw how far two files' predictions are apart at each position, in both scales."""
    rows = (run.content["compare"] or {}).get("positions") or []
    points = _known((row["position"], row["kl"]) for row in rows)
    title, axes = "KL divergence of the next token by position", ("position", "KL, nats")
    return _curves("compare-kl", title, axes, [Series("KL", points)], _from_to("KL", points) + " nats.")


STEERED = {
    "kl_first": ("kl", "How far the first token's distribution moves", "KL, nats"),
    "concept_mass_first": ("mass", "Probability of the concept's own tokens, first", "probability"),
    "concept_hits": ("hits", "The concept's own tokens in the text", "tokens"),
}


def steering(run: Run) -> list[Chart]:
    """Draw what a push does by its strength, beside the random control; nothing for a single strength."""
    given = run.content["steering"]
    if not given or len({text["strength"] for text in given["steered"]}) < 2:
        return []
    found = []
    for measure, (name, title, label) in STEERED.items():
        series = []
        for texts, words, tone in ((given["steered"], "concept", "accent"), (given["controls"], "random", "faint")):
            whole = [given["baseline"], *texts] if texts else []
            pushed = sorted((text["strength"], text[measure]) for text in whole if text[measure] is not None)
            series.append(Series(words, tuple((s, float(value)) for s, value in pushed), tone))
        summary = "; ".join(_from_to(s.name, s.points) for s in series) + "."
        drawn = _curves(f"steering-{name}", title, ("strength", label), series, summary, whole=False)[:1]
        counted = [y for s in series for _, y in s.points]
        if measure == "concept_hits" and drawn:
            drawn = [replace(drawn[0], y=linear(label, counted, zero=True, whole=True, pad=0.05))]
        found += drawn
    return found


def departures(run: Run) -> list[Chart]:
    """Draw how far every tensor is from llama.cpp's, in the order of computation."""
    parity = run.content["parity"] or {}
    points = _known(enumerate(row["error"] for row in parity.get("layers") or []))
    series = [Series("relative L2", points)]
    if parity.get("tolerance") is not None and points:
        series.append(Series("tolerance", tuple((x, parity["tolerance"]) for x in (0.0, points[-1][0])), "faint"))
    title, axes = "Distance from llama.cpp, tensor by tensor", ("tensor", "relative L2")
    return _curves("parity", title, axes, series, f"{_from_to('Relative L2', points)}.")[::-1]  # first the logarithm


# -- heat grids --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """Columns of a heat grid that share a scale of colour, from `-largest` to `largest`.

    Attributes:
        name: what they are.
        columns: the name of each, as short as it stands above it.
        names: the same in full.
        values: `[rows][columns]`; None where there is nothing.
        span: the width of a column, in units.
    """

    name: str
    columns: tuple[str, ...]
    names: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    span: int = 1

    @property
    def largest(self) -> float:
        """Return the largest size of a value."""
        return max((abs(value) for row in self.values for value in row if value is not None), default=0.0)


@dataclass(frozen=True)
class Heat:
    """A grid of values shown as colours. `rows` names them, `label` says what they are; `tilted` columns have words."""

    key: str
    title: str
    label: str
    rows: tuple[str, ...]
    panels: tuple[Panel, ...]
    summary: str = ""
    tilted: bool = False

    @property
    def cells(self) -> int:
        """Return how many values there are."""
        return len(self.rows) * sum(len(panel.columns) for panel in self.panels)


def branch_lines(run: Run) -> list[Chart]:
    """Draw the shares of each block's attention and MLP by depth."""
    given = run.content["branches"]
    blocks = given["blocks"] if given else []
    series = [
        Series(KINDS[kind], _known((block["block"], block[kind]) for block in blocks), tone)
        for kind, tone in (("attn", "ink"), ("mlp", "accent"))
    ]
    summary = "; ".join(_from_to(s.name, s.points) for s in series) + "."
    title = f"Shares in {asked(given)} by block" if given else ""
    return _curves("branches", title, ("block", "share"), series, summary)[:1]


def asked(entry: dict) -> str:
    """Name what was split: a logit, or the difference of two."""
    less = f", less that of {entry['versus']['token']}" if entry["versus"] else ""
    return f"the logit of {entry['target']['token']}{less}"


def branch_grid(run: Run) -> list[Heat]:
    """Draw the shares of every block's attention, MLP and heads; nothing where the heads are not known or too many."""
    given = run.content["branches"]
    if not given or not given["blocks"][0]["heads"]:
        return []
    blocks, count = given["blocks"], len(given["blocks"][0]["heads"])
    sides = Panel(
        "attention and MLP",
        ("attn", "MLP"),
        ("attention", "MLP"),
        tuple((block["attn"], block["mlp"]) for block in blocks),
        max(1, round(count / 20)),
    )
    heads = Panel(
        "heads",
        tuple(map(str, range(count))),
        tuple(f"head {i}" for i in range(count)),
        tuple(tuple(block["heads"]) for block in blocks),
    )
    largest = max(((abs(s), b["block"], i) for b in blocks for i, s in enumerate(b["heads"])), default=(0.0, 0, 0))
    grid = Heat(
        key="branches-heads",
        title=f"Shares in {asked(given)} by block and head",
        label="block",
        rows=tuple(str(block["block"]) for block in blocks),
        panels=(sides, heads),
        summary=f"{len(blocks)} blocks of {count} heads; the largest share of a head is that of head {largest[2]} of "
        f"block {largest[1]}.",
    )
    return [grid] if grid.cells <= MAX_CELLS else []


def position_grid(run: Run) -> list[Heat]:
    """Draw the shares in the logits of all positions: of every earlier token, or of the branches of every block."""
    given = run.content["everywhere"]
    if not given:
        return []
    entries = given["entries"]
    rows = tuple(f"{entry['position']} {entry['token']}" for entry in entries)
    if given["by"] == "token":
        places = {s["position"]: s["token"] for entry in entries for s in entry["shares"]}
        order = sorted(places)
        shares = [{s["position"]: s["share"] for s in entry["shares"]} for entry in entries]
        tokens = tuple(places[i] for i in order)
        values = tuple(tuple(share.get(i) for i in order) for share in shares)
        names = tuple(f"{i} {places[i]}" for i in order)
        panels: tuple[Panel, ...] = (Panel("input tokens", tokens, names, values),)
    else:
        blocks = [block["block"] for block in entries[0]["blocks"]]
        panels = tuple(
            Panel(
                KINDS[kind],
                tuple(map(str, blocks)),
                tuple(f"{KINDS[kind]} of block {i}" for i in blocks),
                tuple(tuple(block[kind] for block in entry["blocks"]) for entry in entries),
            )
            for kind in ("attn", "mlp")
        )
    grid = Heat(
        key="positions",
        title="Shares in the logit of every position",
        label="position",
        rows=rows,
        panels=panels,
        summary=f"{len(rows)} positions; each row is one prediction.",
        tilted=given["by"] == "token",
    )
    return [grid] if grid.cells <= MAX_CELLS else []
