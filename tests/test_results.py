"""Results in a notebook: what their tables say, what strangers' tokens do there, and what is drawn."""

import builtins
import csv
import io
import math
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from commands import COMMANDS, with_file
from helpers import TOKENS, invoke

import ggjac
import ggjac.jacobian
from ggjac.analysis.attribute import both_rules
from ggjac.analysis.contrast import contrast
from ggjac.analysis.jacobian import dense
from ggjac.analysis.layers import layers
from ggjac.analysis.norms import norms
from ggjac.analysis.ranks import token_ranks
from ggjac.display import visible
from ggjac.model import PromptError
from ggjac.parity import LayerError, Parity
from ggjac.results import MAX_ROWS, Bars, Plotted, Points, Table, Words, _draw
from ggjac.session import Session
from ggjac.shares import largest
from ggjac.svd import SVD

# Commands that compute without a Jacobian of one prompt; their results are all in `EXPECTED`.
ELSEWHERE = {"predict", "ranks", "steer", "verify"}
HOSTILE = "<script>alert('x')</script>\"&\n\x1b[31m"
PROMPT = [0, 5, 3, 7, 2, 6]
L, HEADS = tiny.Options.layers, tiny.Options.heads


class Grid(HTMLParser):
    """A table read back: the cells of each row, and every tag with its attributes."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += data


def stranger(ids: list[int] | None = None) -> Any:
    """Return a prompt of a model all of whose tokens are hostile."""
    model = SimpleNamespace(word=lambda id: visible(f"{HOSTILE}{id}".encode()), text=lambda ids: HOSTILE * len(ids))
    return SimpleNamespace(ids=ids or PROMPT, model=model)


def parity() -> Parity:
    layers = [
        LayerError("l_out-0", 0, 1e-7, 1, 2e-7),
        LayerError("ffn_out-0", 0, 3e-7, 1, 4e-7),
        LayerError("l_out-1", 1, math.inf, 0, math.inf),
        LayerError("result_norm", None, 5e-7, 2, 6e-7),
    ]
    return Parity(
        "strict", True, "within 1e-05", True, True, 4, 4, 1, 0.0, 1e-9, 2e-9, 3e-7, layers, None, 1e-5, None
    )  # fmt: skip


def triplets(values: list[float]) -> SVD:
    k = len(values)
    return SVD(
        torch.eye(k),
        torch.tensor(values, dtype=torch.float64),
        torch.eye(k),
        1e-4 * torch.arange(1, k + 1, dtype=torch.float64),
        6,
        True,
        "tolerance",
    )


@pytest.fixture(scope="module")
def results(tiny_file: Callable) -> dict[str, Any]:
    """Return a result of every kind, for a model of a few blocks."""
    model = ggjac.open_model(tiny_file("gqa"), dtype="float64")
    trace = model.trace(PROMPT)
    J = trace.jacobian()
    other_rule = model.trace(PROMPT, mlp_path="gate").jacobian()
    other = ggjac.open_model(tiny_file("gqa"), dtype="float32")
    a, b = (ggjac.portray(m.trace(PROMPT).jacobian(), 2, target=3) for m in (model, other))
    second = ggjac.portray(model.trace(PROMPT[1:]).jacobian(), 2, target=3)
    depths = layers(J, 2, maps=["cumulative"], top=3)
    spectrum = ggjac.spectrum(J, rank=3, top=4)
    return {
        "svd": spectrum.svd,
        "spectrum": spectrum,
        "stable rank": ggjac.stable_rank(J, spectrum.svd),
        "contrast": contrast(J, top=3),
        "agreement": contrast(J, top=3).detached_agreement,
        "contributions": dense(J),
        "norms": norms(J, 2),
        "parity": parity(),
        "attribution": ggjac.attribute(J, 3, versus=4),
        "both rules": both_rules(ggjac.attribute(J, 3), ggjac.attribute(other_rule, 3)),
        "positions": ggjac.attribute_positions(J),
        "branches": ggjac.attribute_branches(J, positions=range(len(J.ids)), by_head=True),
        "portrait": a,
        "comparison": ggjac.compare(a, b),
        "two prompts": ggjac.compare_prompts(a, second),
        "layers": depths,
        "readout": depths.readout,
        "token ranks": token_ranks(J),
        "per token": ggjac.per_token(J, 2, top=3)[-1],
        "predictions": ggjac.predict(trace, 3),
        "steering": ggjac.steer(model, PROMPT, [1, 2, 3], strengths=[1.0, 0.5], max_tokens=2),
    }


MEASURES = ["relative_l2", "std_ratio", "std_ratio_output", "max_abs", "pearson", "spearman"]
MEASURES += ["top1", "top_k", "k", "kl"]
PARITY = ["name", "layer", "error", "position", "position_error"]
NORMS = ["column", "column length", "column tokens", "row", "row length", "row tokens"]
# Columns and the number of rows; `token` is a column only where the prompt is given.
EXPECTED: dict[str, tuple[list[str], int]] = {
    "svd": (["vector", "sigma", "residual"], 3),
    "spectrum": (["vector", "sigma", "residual", "left", "z", "position", "token", "weight", "right"], 3),
    "stable rank": (["value", "error", "frobenius"], 1),
    "contrast": (["jacobian", *MEASURES], 2),
    "agreement": (MEASURES, 1),
    "contributions": (["position", "token", "length", "frobenius"], len(PROMPT)),
    "norms": (["position", "token", *NORMS], 2 * len(PROMPT)),
    "parity": (PARITY, 4),
    "attribution": (["part", "position", "token", "share"], len(PROMPT) + 1),
    "both rules": (["part", "position", "token", "up", "gate"], len(PROMPT) + 1),
    "positions": (
        ["output", "target", "logit", "part", "position", "token", "share"],
        len(PROMPT) * (len(PROMPT) + 3) // 2,
    ),
    "branches": (["output", "target", "logit", "block", "part", "share"], len(PROMPT) * (1 + L * (HEADS + 1))),
    "portrait": (["position", "token", "share"], len(PROMPT)),
    "comparison": (["vector", "sigma a", "sigma b", "left angle", "right angle"], 2),
    "two prompts": (["part", "position a", "position b", "token", "share a", "share b"], len(PROMPT) + 1),
    "layers": (["map", "kind", "depth", "stable rank", "next sigma", "vector", "sigma", "residual", "left"], 3 * L * 2),
    "readout": (["depth", "probability", "tokens", "rank"], L + 1),
    "token ranks": (["position", "token", "value", "error", "frobenius"], len(PROMPT)),
    "per token": (["vector", "sigma", "residual", "left", "right"], 2),
    "predictions": (["next", "logit", "probability"], 3),
    "steering": (["strength", "control", "kl", "mass", "hits", "text", "generated"], 5),
}
TEXTS = {"jacobian", "left", "z", "right", "token", "name", "column tokens", "row tokens"}
TEXTS |= {"next", "target", "map", "kind", "tokens", "generated", "text", "part"}
WITH_TRACE = {"token", "text"}  # columns that there are only with the prompt
TRUTHS = {"top1", "control"}
# What the axes of figures are called.
AXES = {
    "svd": ("index", "σ"),
    "spectrum": ("index", "σ"),
    "contrast": ("y", "reconstruction"),
    "contributions": ("length ‖J_i x_i‖", ""),
    "parity": ("layer", "relative L2"),
    "attribution": ("share; all shares and the offset sum to {:.4f}", ""),
    "branches": ("block", "share"),
    "portrait": ("share", ""),
    "comparison": ("index", "σ"),
    "two prompts": ("index", "σ"),
    "layers": ("depth", "stable rank"),
    "readout": ("depth", "rank"),
    "token ranks": ("stable rank", ""),
    "per token": ("index", "σ"),
    "predictions": ("probability", ""),
    "steering": ("strength", "KL to the baseline, nats"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_data_frames_have_columns_of_numbers(results: dict[str, Any], name: str) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas (the extra `notebook`) is not installed")
    columns, rows = EXPECTED[name]
    with_texts, without = results[name].to_pandas(stranger()), results[name].to_pandas()
    assert isinstance(without, pandas.DataFrame)
    assert list(with_texts.columns) == columns
    assert list(without.columns) == [column for column in columns if column not in WITH_TRACE]
    assert len(with_texts) == len(without) == rows
    for column in set(columns) - TEXTS:
        assert with_texts[column].dtype.kind in ("b" if column in TRUTHS else "if"), column
    assert without.attrs["title"]


@pytest.mark.parametrize("name", EXPECTED)
def test_tables_on_the_page_have_the_same_cells(results: dict[str, Any], name: str) -> None:
    columns, rows = EXPECTED[name]
    page = Grid(results[name].table(stranger())._repr_html_())
    assert page.rows[0] == columns
    assert [len(row) for row in page.rows[1:]] == [len(columns)] * rows
    bare = Grid(results[name]._repr_html_())
    assert bare.rows[0] == [column for column in columns if column not in WITH_TRACE]


@pytest.mark.parametrize("name", EXPECTED)
def test_tokens_of_strangers_do_nothing(results: dict[str, Any], name: str) -> None:
    source = results[name].table(stranger())._repr_html_()
    page = Grid(source)
    assert {tag for tag, _ in page.tags} <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "div"}
    assert all(set(attributes) <= {"style"} for _, attributes in page.tags)
    assert not any(character in source for character in "\x1b\n")
    if {"token", "left", "tokens", "generated"} & set(EXPECTED[name][0]):
        assert any("<script>alert('x')</script>\"&\\n" in cell for row in page.rows for cell in row)


@pytest.mark.parametrize("command", COMMANDS)
def test_whatever_a_command_computes_can_be_shown(
    command: str, tiny_file: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result that has no row above, too."""
    shown: list[Any] = []
    run = Session.run

    def showing(self: Session, *given: Any, **options: Any) -> Any:
        found = run(self, *given, **options)
        for result in found if isinstance(found, list) else [found]:
            for trace in (None, self):
                rows = Grid(result.table(trace)._repr_html_()).rows
                assert {len(row) for row in rows} == {len(rows[0])}
                assert len(rows) > 1
            if isinstance(result, Plotted):
                assert result.figure(self)._repr_png_().startswith(b"\x89PNG")
            shown.append(result)
        return found

    monkeypatch.setattr(Session, "run", showing)
    monkeypatch.chdir(tmp_path)
    model = tiny_file("gqa")
    invoke(command, "-m", model, *TOKENS, *COMMANDS[command].options, *with_file(command, model))
    assert shown or command in ELSEWHERE


def test_what_is_no_result_is_a_table_on_the_page_too(tiny_file: Callable) -> None:
    model = ggjac.open_model(tiny_file("tokenizer"))
    trace = model.trace([5, 6, 7])
    for thing, cells in (
        (model, {"llama", str(model.config.vocabulary), "float32", "cpu"}),
        (trace, {"7", model.word(7), "token id"}),
        (trace.jacobian(1), {"[3, 64]", "[64]", "1", "up", "depth 0", "layer 2"}),
        (model.plan(3), {"memory"}),
    ):
        page = Grid(thing._repr_html_())
        assert cells <= {cell for row in page.rows for cell in row}
        assert {tag for tag, _ in page.tags} <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "div"}


def test_titles_names_and_notes_are_escaped_too() -> None:
    source = Table(HOSTILE, {HOSTILE: [HOSTILE]}, (HOSTILE,))._repr_html_()
    assert "<script" not in source
    assert source.count("&lt;script&gt;") == 4


def test_numbers_and_texts_read_well() -> None:
    columns = {"x": [-1.23456, math.nan, 3e-9], "n": [None, 2, -3], "words": [["a", "b"], (), [7]]}
    page = Grid(Table("", columns)._repr_html_())
    assert page.rows[1:] == [["−1.235", "–", "a b"], ["nan", "2", ""], ["3e−09", "-3", "7"]]
    sides = [attributes["style"].split(";")[0] for tag, attributes in page.tags if tag == "th"]
    assert sides == ["text-align:right", "text-align:right", "text-align:left"]


def test_a_long_table_says_where_the_rest_is() -> None:
    table = Table("", {"x": list(range(MAX_ROWS + 7))})
    source = table._repr_html_()
    assert len(Grid(source).rows) == 1 + MAX_ROWS
    assert "7 more rows" in source
    assert "more rows" not in Table("", {"x": list(range(MAX_ROWS))})._repr_html_()


def test_a_table_takes_its_colours_from_the_notebook() -> None:
    source = Table("t", {"x": [1]})._repr_html_()
    styles = [attributes.get("style") or "" for _, attributes in Grid(source).tags]
    colours = {part for style in styles for part in style.split(";") if "olor" in part}
    assert colours == {"color:inherit", "border-bottom:1px solid currentColor"}


def test_words_are_the_traces(results: dict[str, Any]) -> None:
    trace = SimpleNamespace(ids=PROMPT, model=SimpleNamespace(word=lambda id: f"␣t{id}"))
    spectrum = results["spectrum"]
    columns = spectrum.table(trace).columns
    best = spectrum.weight.argmax(1).tolist()
    assert columns["left"] == [[f"␣t{id}" for id in ids] for ids in spectrum.left.ids.tolist()]
    assert columns["token"] == [f"␣t{PROMPT[i]}" for i in best]
    right = spectrum.right.ids.view(3, len(PROMPT), -1)
    assert columns["right"] == [[f"␣t{id}" for id in right[k, best[k]].tolist()] for k in range(3)]
    assert spectrum.table().columns["left"] == spectrum.left.ids.tolist()
    assert Words(trace).name(3) == "␣t3"
    assert Words().name(3) == "token 3"


def test_columns_are_the_results_own_numbers(results: dict[str, Any]) -> None:
    assert triplets([3.0, 2.0]).table().columns == {"vector": [1, 2], "sigma": [3.0, 2.0], "residual": [1e-4, 2e-4]}
    columns = results["contributions"].table().columns
    assert columns["frobenius"] == results["contributions"].frobenius.tolist()
    assert columns["length"] == pytest.approx([math.hypot(*term) for term in results["contributions"].terms.tolist()])
    columns = results["norms"].table().columns
    for row, position in enumerate(columns["position"]):
        length = results["norms"].columns[position, columns["column"][row]]
        assert columns["column length"][row] == length == results["norms"].columns[position].topk(2).values[row % 2]
    assert results["contrast"].table().columns["kl"][1] == results["contrast"].ordinary_agreement.kl


@pytest.mark.parametrize("name", AXES)
def test_figures_have_axes_and_labels(results: dict[str, Any], name: str) -> None:
    figure = results[name].figure(stranger())
    (axes,) = figure.axes
    x, y = AXES[name]
    if name == "attribution":
        x = x.format(results[name].logit).replace("-", "−")
    assert (axes.get_xlabel(), axes.get_ylabel()) == (x, y)
    assert axes.get_title(loc="left")
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_every_result_that_can_be_drawn_is(results: dict[str, Any]) -> None:
    assert {name for name, result in results.items() if isinstance(result, Plotted)} == AXES.keys()
    assert not hasattr(results["stable rank"], "figure")


def test_figures_draw_the_numbers(results: dict[str, Any]) -> None:
    line = triplets([3.0, 2.0, 0.5]).figure().axes[0].lines[0]
    assert line.get_xydata().tolist() == [[1, 3], [2, 2], [3, 0.5]]
    bars = results["contributions"].figure(stranger()).axes[0]
    assert [bar.get_width() for bar in bars.patches] == results["contributions"].terms.norm(dim=1).tolist()
    assert [label.get_text().startswith("<script>") for label in bars.get_yticklabels()] == [True] * len(PROMPT)
    bare = results["contributions"].figure().axes[0]
    assert [label.get_text() for label in bare.get_yticklabels()] == [str(i) for i in range(len(PROMPT))]
    scattered = results["contrast"].figure().axes[0]
    diagonal, detached, ordinary = scattered.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    assert detached.get_ydata() == pytest.approx(results["contrast"].detached)
    assert ordinary.get_ydata() == pytest.approx(results["contrast"].ordinary)
    assert {line.get_linestyle() for line in (detached, ordinary)} == {"None"}
    assert [text.get_text() for text in scattered.get_legend().get_texts()] == ["detached", "ordinary"]


def test_shares_in_tables_sum_to_the_logit(results: dict[str, Any]) -> None:
    one, many, branches = (results[name] for name in ("attribution", "positions", "branches"))
    assert sum(one.table().columns["share"]) == pytest.approx(one.logit)
    assert one.table().columns["share"][-1] == one.offset
    assert f"sum to {one.logit:.4f}; forward pass: {one.logit:.4f}" in one.table().notes[0]
    assert one.table().title == "Shares in the logit of token 3 minus that of token 4"
    assert one.table().common == {"output": 5, "target": 3, "versus": 4, "logit": one.logit, "mlp path": "up"}
    for rule in ("up", "gate"):
        column = results["both rules"].table().columns[rule]
        assert sum(column) == pytest.approx(results["both rules"].table().common["logit"])
    rows = many.table().columns
    for m, output in enumerate(many.positions):
        own = [i for i, position in enumerate(rows["output"]) if position == output]
        assert [rows["position"][i] for i in own] == [*range(output + 1), None]
        assert [rows["part"][i] for i in own] == ["token"] * (output + 1) + ["offset"]
        assert {rows["target"][i] for i in own} == {int(many.targets[m])}
        assert sum(rows["share"][i] for i in own) == pytest.approx(rows["logit"][own[0]])
    rows = branches.table().columns
    for m, output in enumerate(branches.positions):
        own = [i for i, position in enumerate(rows["output"]) if position == output]
        assert sum(rows["share"][i] for i in own) == pytest.approx(float(branches.logits[m]))
        assert rows["logit"][own[0]] == float(branches.logits[m])
    own = [i for i, position in enumerate(rows["output"]) if position == len(PROMPT) - 1]
    names = [(rows["block"][i], rows["part"][i]) for i in own]
    in_block = [*(f"head {h}" for h in range(HEADS)), "MLP"]
    assert names == [(None, "embedding"), *((i, part) for i in range(L) for part in in_block)]
    shares = dict(zip(names, (rows["share"][i] for i in own), strict=True))
    attn = [sum(shares[i, f"head {h}"] for h in range(HEADS)) for i in range(L)]
    assert attn == pytest.approx(branches.attn[-1].tolist())
    total = float(branches.logits[-1])
    assert f"sum to {total:.4f}; forward pass: {total:.4f}" in branches.table().notes[0]
    attention, mlp = branches.figure().axes[0].lines
    assert attention.get_xydata().tolist() == [[i, float(share)] for i, share in enumerate(branches.attn[-1])]
    assert mlp.get_ydata().tolist() == [shares[i, "MLP"] for i in range(L)]


@pytest.mark.parametrize("name", ["attribution", "both rules", "positions", "branches"])
def test_the_largest_parts_and_the_rest_still_add_up(results: dict[str, Any], name: str) -> None:
    table = results[name].table()
    columns = largest(table, 2).columns
    whose = "output" if "output" in columns else "part"
    for value in {"share", "up", "gate"} & columns.keys():
        for output in set(columns["output"]) if whose == "output" else {None}:
            own, whole = (
                [i for i in range(len(c["part"])) if output is None or c["output"][i] == output]
                for c in (columns, table.columns)
            )
            parts = [columns["part"][i] for i in own]
            assert sum(columns[value][i] for i in own) == pytest.approx(sum(table.columns[value][i] for i in whole))
            split = [table.columns["part"][i] for i in whole if table.columns["part"][i] != "offset"]
            assert parts.count("others") == (len(split) > 2)
            assert len([part for part in parts if part not in ("others", "offset")]) == min(2, len(split))
    assert largest(table, 10**6).columns == table.columns, "in the same order"
    kept = [abs(share) for share, part in zip(columns.get("share", columns.get("up")), columns["part"], strict=True)]
    if name == "attribution":
        assert kept[0] >= kept[1] >= max(sorted(map(abs, results[name].shares.tolist()))[:-2])


def test_depths_in_tables_and_figures(results: dict[str, Any]) -> None:
    found, readout = results["layers"], results["readout"]
    rows = found.table().columns
    assert rows["depth"] == [m.tap.index for m in found.maps for _ in range(2)]
    assert rows["sigma"] == [s for m in found.maps for s in m.S.tolist()]
    assert rows["left"][-1] == found.maps[-1].left.ids[-1].tolist()
    axes = found.figure().axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["layer", "attn", "mlp"]
    for line, kind in zip(axes.lines, ("layer", "attn", "mlp"), strict=True):
        own = [[m.tap.index, m.stable_rank.value] for m in found.maps if m.tap.kind == kind]
        assert line.get_xydata().tolist() == own
    axes = readout.figure().axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[i, rank] for i, rank in enumerate(readout.ranks[:, 0].tolist())]
    low, high = axes.get_ylim()
    assert low > high, "the first rank is on top"
    assert readout.table().columns["rank"][-1] == 1


def test_other_tables_hold_the_results_numbers(results: dict[str, Any]) -> None:
    compared, ranks, pushed = (results[name] for name in ("comparison", "token ranks", "steering"))
    rows = compared.table().columns
    assert rows["sigma a"] == compared.a.svd.S.tolist()
    assert rows["sigma b"] == compared.b.svd.S.tolist()
    assert rows["left angle"] == compared.left.tolist()
    a, b = compared.figure().axes[0].lines
    assert (a.get_ydata().tolist(), b.get_ydata().tolist()) == (rows["sigma a"], rows["sigma b"])
    assert results["portrait"].table().columns["share"] == compared.a.shares.tolist()
    assert ranks.table().columns["value"] == [rank.value for rank in ranks.tokens]
    rows = pushed.table().columns
    assert rows["strength"] == [0.0, 1.0, 0.5, 1.0, 0.5]
    assert rows["control"] == [False, False, False, True, True]
    assert rows["generated"][2] == pushed.steered[1].ids
    axes = pushed.figure().axes[0]
    assert list(axes.get_xticks()) == [0, 0.5, 1], "strengths are not whole numbers"
    concept, control = axes.lines
    assert concept.get_xydata().tolist() == [[0, 0], [0.5, rows["kl"][2]], [1, rows["kl"][1]]]
    assert control.get_ydata()[1] == rows["kl"][4]
    last = results["per token"]
    trace = SimpleNamespace(ids=PROMPT, model=SimpleNamespace(word=lambda id: f"t{id}"))
    assert last.table(trace).title == "Singular triplets of position t6"
    assert last.table().columns["right"] == last.right.ids.tolist()


def test_what_is_infinite_is_not_drawn() -> None:
    axes = parity().figure().axes[0]
    assert axes.get_yscale() == "log"
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[0, 1e-7]], [[0, 3e-7]]]


def test_a_token_with_dollars_is_no_formula() -> None:
    figure = _draw(Bars("$", "$\\bad$", ["$\\frac$"], [1.0]))
    assert figure._repr_png_().startswith(b"\x89PNG")  # a formula would not parse


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match="Way: there is nothing to draw"):
        _draw(Points("Way", "x", "y", {"a": ([], [], ())}))


def test_standard_errors_are_drawn() -> None:
    axes = _draw(Points("Way", "x", "y", {"a": ([1, 2], [3.0, 4.0], [0.5, 0.0])})).axes[0]
    (bars,) = axes.collections
    assert [segment.tolist() for segment in bars.get_segments()] == [[[1, 2.5], [1, 3.5]], [[2, 4], [2, 4]]]


def test_without_pandas_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name == "pandas":
            raise ModuleNotFoundError("No module named 'pandas'", name="pandas")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match="pip install pandas"):
        triplets([1.0]).to_pandas()
    assert "<table" in triplets([1.0])._repr_html_()


def test_libraries_are_loaded_when_asked_for_and_pyplot_never() -> None:
    code = (
        "import sys, torch, ggjac.svd as s, ggjac.analysis.contrast\n"
        "seen = lambda: [m for m in ('pandas', 'matplotlib', 'jinja2') if m in sys.modules]\n"
        "r = s.SVD(torch.eye(2), torch.ones(2), torch.eye(2), torch.ones(2), 1, True, 'complete')\n"
        "r._repr_html_(); print(seen()); r.figure(); print('matplotlib.pyplot' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.split("\n")[:2] == ["[]", "False"]


# -- text and one-line reprs -------------------------------------------------------------------------------------------


def test_a_table_is_printed_as_aligned_text() -> None:
    table = Table("Title", {"token": ["␣of", "漢字"], "share": [0.5, -12.25], "near": [["a", "b"], []]}, ("a note",))
    lines = [
        "Title",
        "token    share   near",
        "─────────────────────",
        "␣of        0.5   a b",
        "漢字    −12.25",
        "a note",
    ]
    assert str(table) == repr(table) == "\n".join(lines)
    long = Table("T", {"n": list(range(MAX_ROWS + 7))})
    assert str(long).splitlines()[-1] == "… 7 more rows: .to_pandas() has all"


def test_printed_tokens_do_not_steer_a_terminal(results: dict[str, Any]) -> None:
    for result in results.values():
        text = str(result.table(stranger()))
        assert all(c.isprintable() or c == "\n" for c in text)


def test_what_ends_a_cell_is_one_short_line(results: dict[str, Any], tiny_file: Callable) -> None:
    model = ggjac.open_model(tiny_file("gqa"))
    trace = model.trace(PROMPT)
    J = trace.jacobian(2)
    inner = trace.jacobian(span=ggjac.jacobian.Span(1, ggjac.jacobian.Tap("attn", 2)))
    each = ggjac.per_token(J, 1)
    assert repr(J) == "DetachedJacobian [6, 64] -> [64], position 2, up"
    assert repr(J.T) == "DetachedJacobian.T [64] -> [6, 64]"
    assert repr(inner).endswith("position 5, up, from depth 1 to attn 2")
    assert repr(model) == f"Model({model.path.name!r}, llama, {L} blocks, float32 on cpu)"
    assert repr(trace) == f"Trace('[0][5][3][7][2][6]', 6 tokens, llama, {L} blocks)"
    assert repr(each) == 'TokenSpectra("Singular vectors of each position\'s own map", 3 rows)'
    assert each.table(trace).columns["token"] == ["[0]", "[5]", "[3]"]
    plan = model.plan(PROMPT)
    for shown in (J.at_position(1), plan, *results.values()):
        assert len(repr(shown)) < 200, shown
        assert "\n" not in repr(shown)


# -- text where text is meant ------------------------------------------------------------------------------------------


def test_a_target_may_be_a_text(tiny_file: Callable) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = ggjac.open_model(None)
    trace = model.trace([0, 465, 637])
    J, cold = trace.jacobian(), model.token(" cold")
    assert model.word(cold) == "␣cold"
    assert ggjac.attribute(J, " cold", " hot").logit == ggjac.attribute(J, cold, model.token(" hot")).logit
    assert ggjac.attribute_positions(J, " cold").targets.tolist() == [cold] * 3
    assert ggjac.attribute_branches(J, " cold").targets.tolist() == [cold]
    assert ggjac.portray(J, 1, target=" cold").target == cold
    with pytest.raises(PromptError, match="' cold and hot' is 3 tokens"):
        ggjac.attribute(J, " cold and hot")
    (word, chance), _ = trace.top(2)
    assert word == model.word(int(trace.logits.argmax()))
    assert chance == pytest.approx(float(trace.logits.softmax(0).max()))


def test_a_vector_is_not_taken_for_a_stack(tiny_file: Callable) -> None:
    J = ggjac.open_model(tiny_file("gqa")).trace(PROMPT).jacobian()
    with pytest.raises(ValueError, match=r"takes stacked vectors \[k, 6, 64\], got \[6, 64\]"):
        J.check_shape(J.x, J.in_shape)
    with pytest.raises(ValueError, match=r"takes stacked vectors \[k, 64\], got \[64\]"):
        J.check_shape(J.output, J.out_shape)


# -- CSV and LaTeX -----------------------------------------------------------------------------------------------------


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_has_all_digits_and_ids_beside_texts(results: dict[str, Any]) -> None:
    trace = SimpleNamespace(ids=PROMPT, model=SimpleNamespace(word=lambda id: f'a,"{id}'))
    *rows, offset = read_csv(results["attribution"].sheet(trace).to_csv())
    assert [(int(row["token id"]), row["token"]) for row in rows] == [(id, f'a,"{id}') for id in PROMPT]
    assert [float(row["share"]) for row in rows] == results["attribution"].shares.tolist()
    assert (offset["part"], offset["token"], float(offset["share"])) == ("offset", "", results["attribution"].offset)
    found = {(row["target id"], row["target"], row["versus id"], row["logit"]) for row in (*rows, offset)}
    assert found == {("3", 'a,"3', "4", str(results["attribution"].logit))}
    spectrum = results["spectrum"]
    rows = read_csv(spectrum.sheet(trace).to_csv())
    n = len(PROMPT)
    assert [(int(row["vector"]), int(row["position"])) for row in rows] == [
        (j + 1, i) for j in range(3) for i in range(n)
    ]
    assert [float(row["weight"]) for row in rows] == spectrum.weight.flatten().tolist()
    for side, ids in (("left", spectrum.left.ids.repeat_interleave(n, 0)), ("right", spectrum.right.ids)):
        assert [[int(row[f"{side} id {i}"]) for i in range(1, 5)] for row in rows] == ids.tolist()
    assert {row["next sigma"] for row in rows} == {str(spectrum.svd.following.value)}
    next_ids = [int(row["next id"]) for row in read_csv(results["predictions"].sheet(trace).to_csv())]
    assert next_ids == results["predictions"].ids.tolist()


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "＝", "＋", "－", "＠"])
def test_no_text_in_csv_begins_as_a_formula(start: str) -> None:
    text = f"{start}1+1"
    (row,) = read_csv(Table("", {"x": [text], "y": [[text, " "]], "z": [-1.5]}, common={"c": text}).to_csv())
    assert row == {"c": f"'{text}", "x": f"'{text}", "y 1": f"'{text}", "y 2": " ", "z": "-1.5"}


def test_no_token_is_a_command_of_latex(results: dict[str, Any]) -> None:
    name = r"\input{/etc/passwd}%$&#_^~<|>`"
    trace = SimpleNamespace(ids=PROMPT, model=SimpleNamespace(word=lambda id: name))
    known = "textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|textasciigrave"
    lines = results["attribution"].table(trace).to_latex().splitlines()
    rows = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert len(rows) == len(PROMPT) + 1
    for row in rows[:-1]:
        cells = row.removesuffix(r" \\").split(" & ")
        assert len(cells) == 4
        rest = re.sub(rf"\\(?:{known})\{{\}}|\\[&%$#_{{}}]", "", cells[2])
        assert rest == "input/etc/passwd"
    assert all(line.startswith("%") for line in lines[: lines.index(r"\begin{tabular}{lrlr}")])


def test_what_begins_a_row_is_no_option_of_the_line_before() -> None:
    rows = Table("", {"token": ["[2cm]", "*", "[/]"]}).to_latex().splitlines()
    assert [row for row in rows if row.startswith("{")] == [r"{[}2cm] \\", r"{*} \\", r"{[}/] \\"]
    assert rows[rows.index(r"\toprule") + 1] == r"token \\"


def test_the_layer_grid_in_latex(results: dict[str, Any]) -> None:
    trace = SimpleNamespace(ids=PROMPT, model=SimpleNamespace(word=lambda id: f"␣t{id}"))
    layer, attn, mlp = results["layers"].exhibits(trace)
    assert [next(iter(table.columns)) for table in (layer, attn, mlp)] == ["depth", "block", "block"]
    assert layer.columns["depth"] == list(range(1, L + 1))
    assert attn.columns["block"] == [f"L{i}" for i in range(L)]
    first = next(m for m in results["layers"].maps if m.tap.kind == "layer")
    cells = r"\textvisiblespace{}t" + r" \textvisiblespace{}t".join(map(str, first.left.ids[1].tolist()))
    assert f"& {cells} \\\\\n" in layer.to_latex()
    assert r"depth & $\sigma_{1}$ & stable rank & $u_{1}$ & $u_{2}$ \\" in layer.to_latex().splitlines()
    assert [table.notes[0].split(":")[0] for table in (layer, attn, mlp)] == ["depth", "block", "block"]


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"analyze", "compare"}))  # of several tables
def test_what_is_a_table_is_printed_as_csv_and_latex(command: str, tiny_file: Callable) -> None:
    model = tiny_file("gqa")
    options = ["-m", model, *TOKENS, *COMMANDS[command].options, *with_file(command, model)]
    rows = read_csv(invoke(command, *options, "--format", "csv").stdout)
    text = invoke(command, *options, "--format", "latex").stdout
    assert rows
    assert all(None not in row and None not in row.values() for row in rows), "every row has as many cells as the head"
    for table in text.split(r"\begin{tabular}")[1:]:
        body = table[table.index(r"\toprule") : table.index(r"\bottomrule")].splitlines()
        counts = {len(re.findall(r"(?<!\\)&", line)) for line in body if line.endswith(r"\\")}
        assert len(counts) == 1
