"""The report as a file: what it says, what it leaves out, and what it does with input from strangers.

The page is read back by `html.parser`, figures by an XML parser; what a browser makes of it is in
`test_report_browser.py`.
"""

import base64
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_run
from commands import COMMANDS
from helpers import error, invoke
from hypothesis import example, given, settings
from hypothesis import strategies as st
from report_run import HOSTILE, TOKENS, VECTORS, Page, at, rendered, run_json
from safetensors.numpy import save_file

import ggjac
from ggjac import display
from ggjac.drawing import charts
from ggjac.report import figures, numbers, page, schema, write_figures, write_report
from ggjac.report.load import load
from ggjac.report.sections import PARTS, ROOMS, SECTIONS, common, contrast, layers
from ggjac.report.sections.common import Run
from ggjac.runs import RunError

PACKAGE = Path(ggjac.__file__).parent
ROOT = Path(__file__).parents[1]
ALL_SECTIONS = {section.key for section in SECTIONS}
# The sections that the full run lacks: each is on the page of a command's own run.
APART = {"attend", "reach", *(f"attribute-{name}" for name in ("answer", "edges", "experts", "reads"))}


@pytest.fixture(scope="module")
def html() -> str:
    return rendered()


@pytest.fixture(scope="module")
def parsed(html: str) -> Page:
    return Page(html)


def test_a_lone_combining_mark_stands_on_a_circle() -> None:
    content = {key: run_json()[key] for key in ("model", "tokens")}
    content["tokens"][1]["text"] = "\u05b7"  # a Hebrew vowel sign
    content["tokens"][2]["text"] = "e\u0301"
    found = Page(rendered(content)).find("bdi")
    assert "◌\u05b7" in found
    assert "e\u0301" in found


# -- what it says ------------------------------------------------------------------------------------------------------


def test_every_section_is_there_and_linked(parsed: Page) -> None:
    """In their order; those that this run does not have are on the page of a command's own run."""
    ids = [attributes["id"] for tag, attributes in parsed.elements if tag == "section"]
    shown = [section for section in SECTIONS if section.key in ids]
    assert ids == [section.key for section in shown]
    pages = [page for command in COMMANDS.values() for page in command.page.values()]
    pages.append({"attribute-experts": ""})  # of a mixture: see test_experts.py
    assert ALL_SECTIONS - set(ids) <= {key for page in pages for key in page}
    links = [attributes["href"] for tag, attributes in parsed.elements if tag == "a"]
    assert list(dict.fromkeys(links)) == ["#main", "#certificate", *(f"#{id}" for id in ids[:-1])]
    assert links[-len(ids) :] == [f"#{id}" for id in ids]
    assert parsed.find("h2") == [section.title for section in shown]


def test_every_section_has_its_template_and_every_template_its_section() -> None:
    shared = {"page", "macros", "heat-table", "compare-macros"}
    templates = {path.stem for path in page.TEMPLATES.glob("*.html")}
    assert templates - shared == ALL_SECTIONS
    assert len(SECTIONS) == len(ALL_SECTIONS)


def test_every_section_and_part_is_of_one_room() -> None:
    for room in ROOMS:
        name = room.__name__.rpartition(".")[2]
        own = [section.key for section in getattr(room, "SECTIONS", ())]
        # A question that one option of a command asks has the command's name before its own.
        assert all(re.fullmatch(rf"(attribute-)?{name}(-[a-z-]+)?", key) for key in own)
        assert set(own) <= ALL_SECTIONS
    assert sum(len(room.FORM) for room in ROOMS) == len(PARTS), "no part has two forms"


def test_the_title_is_the_prompt_and_its_prediction(parsed: Page) -> None:
    assert parsed.find("h1") == ["The bridge's <b>end</b> & the Golden"]
    assert parsed.find("mark") == ["Golden"]


def test_the_certificate_has_all_it_takes_to_run_again(parsed: Page) -> None:
    start = parsed.text.index("Certificate The checks of this run")
    box = parsed.text[start:]
    for said in (
        "Reconstruction passed 3.1 × 10⁻⁷ at most 10⁻⁵",
        "llama.cpp passed agrees on the file as it is Same top token",
        "KL divergence 7.8 × 10⁻⁶ nats",
        "Singular vectors passed 3.6 × 10⁻⁶ tolerance 10⁻³",
        "float32", "Live factor of gated MLPs up", "Seed 4", "Threads 2",
        "Peak memory, with the cached pages of the file 283.3 MiB",
        "sampled-sha256:" + "ab" * 32, "torch 2.13.0", "trace 0.074 s", "total 1 min 15 s", "2026-01-02 03:04:05 UTC",
        """ggjac analyze -p 'The bridge'"'"'s <b>end</b>' -k 5""",
    ):  # fmt: skip
        assert said in box


def test_the_shares_and_their_sum(parsed: Page) -> None:
    attribution = run_json()["attribution"]
    for share in attribution["shares"]:
        value = f"{share['share']:+.4f}".replace("-", "−")
        assert parsed.text.count(value) >= 2, "beside the token and in the table"
    total = f"{attribution['logit']:.4f}".replace("-", "−")
    assert f"Sum of shares and offset {'+' * (attribution['logit'] > 0)}{total} = logit {total}" in parsed.text


def test_a_logit_that_the_shares_do_not_make_up_shows_the_difference() -> None:
    content = run_json()
    content["attribution"]["logit"] += 1
    said, *_ = Page(rendered(content)).find("p", **{"class": "equation"})
    assert re.search(r" ≠ logit [−0-9.]+ \(remainder 1\.00\)", said)


def test_levels_of_colour_follow_sign_and_size() -> None:
    content = run_json()
    del content["compare_prompts"]  # which shows shares, too
    shares = [3.0, -3.0, 1.5, 0.0, -0.3]
    content["attribution"]["shares"] = [{"position": i, "text": "x", "share": s} for i, s in enumerate(shares)]
    elements = Page(rendered(content)).elements
    levels = [(a["class"] or "").split()[-1] for _, a in elements if "share" in (a.get("class") or "").split()]
    assert levels == ["l10", "l-10", "l5", "l0", "l-1"]


def test_singular_values_are_drawn_where_they_are(html: str) -> None:
    sigmas = np.array([t["singular_value"] for t in run_json()["svd"]["triplets"]])
    for scale, axis in (("linear", lambda v: v), ("log", np.log)):
        section = html[html.index('<section id="svd"') :]
        chart = section[section.index(f'<div class="panel" data-scale="{scale}">') :]
        (path,) = re.findall(r'class="dots accent" d="([^"]+)"', chart[: chart.index("</div>")])
        points = np.array([[float(v) for v in re.split("[ M]", point) if v] for point in path.split("h0")[:-1]])
        assert np.allclose(np.diff(points[:, 0]), points[1, 0] - points[0, 0], atol=0.2)
        # Heights are an affine function of the value on this scale: larger is higher, and nothing is bent.
        slope, start = np.polyfit(axis(sigmas), points[:, 1], 1)
        assert slope < 0
        assert np.allclose(slope * axis(sigmas) + start, points[:, 1], atol=0.2)


def test_the_grid_has_a_row_for_each_depth_and_a_column_for_each_rank(parsed: Page) -> None:
    found = run_json()["layers"]
    # Nine grids of vectors and one readout, with one button for each token shown in them.
    tables = [a for tag, a in parsed.elements if tag == "table" and "cells" in (a.get("class") or "")]
    assert len(tables) == 10
    buttons = [
        (a["value"], text) for (tag, a), text in zip(parsed.elements, parsed.texts, strict=True) if tag == "button"
    ]
    shown = [t for tap in found["taps"] for v in tap["triplets"] for t in v["left"][:3]]
    shown += [t for row in found["readout"] for t in row["top"]]
    assert [(str(t["id"]), display.token(t)) for t in shown] == [(id, "".join(text)) for id, text in buttons]


def test_vectors_carried_to_the_output_have_a_grid_of_their_own() -> None:
    content = run_json()
    for tap in content["layers"]["taps"]:
        if (tap["map"], tap["kind"]) == ("cumulative", "attn"):
            for vector in tap["triplets"]:
                vector["arriving"] = vector["left"][3:]
    found = Page(rendered(content))
    names = [name for name in found.find("span") if name in ("Layer", "Attention", "Attention at the output", "MLP")]
    assert names[:4] == ["Layer", "Attention", "Attention at the output", "MLP"]
    grids = [
        Page(f"<table{table}</table>").find("button")
        for table in re.findall(r'<table class="cells"(.*?)</table>', rendered(content), re.DOTALL)
    ]
    shown = [
        display.token(t) for tap in content["layers"]["taps"][6:12] for v in tap["triplets"] for t in v["arriving"]
    ]
    assert grids[2] == [" ".join(token.split()) for token in shown]


def test_the_path_says_which_way_it_goes(parsed: Page, html: str) -> None:
    assert re.findall(r'class="mark-label"[^>]*>(\d+)<', html) == ["1", "2", "3", "4", "5", "6"]
    long = run_json()
    long["layers"]["path"] = [{"index": i, "values": [i / 80, i / 80, 0.5]} for i in range(1, 81)]
    labels = [int(label) for label in re.findall(r'class="mark-label"[^>]*>(\d+)<', rendered(long))]
    assert (labels[0], labels[-1]) == (1, 80)
    assert 5 <= len(labels) <= 8
    long["layers"]["path"] = [{"index": i, "values": [0.5 + i / 900, 0.5]} for i in range(1, 6)]
    long["layers"]["path"].append({"index": 6, "values": [1.0, 1.0]})
    labels = re.findall(r'class="mark-label"[^>]*>(\d+)<', rendered(long))
    assert labels == ["1", "6"], "none upon another"


def test_ranks_travel_with_the_page(parsed: Page) -> None:
    data = json.loads(parsed.raw("script")[0])
    ranks = run_json()["layers"]["ranks"]
    assert data["tokens"] == [[t["id"], display.token(t)] for t in ranks["tokens"]]
    assert data["ranks"] == [depth["ranks"] for depth in ranks["depths"]]
    assert data["depths"] == [0, 1, 2, 3, 4, 5, 6]
    assert data["pinned"] == 0


def test_long_vocabularies_of_ranks_are_cut_and_their_tokens_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MAX_RANKS", 7 * 5)
    found = Page(rendered())
    data = json.loads(found.raw("script")[0])
    assert [len(row) for row in data["ranks"]] == [5] * 7
    assert {a["value"] for tag, a in found.elements if tag == "button"} <= {"0", "1", "2", "3", "4"}


def test_scatter_samples_keep_the_extremes() -> None:
    random = np.random.default_rng(1)
    y = random.normal(size=9000)
    vectors = {"y": y, "offset": 0 * y, "linear_output": y + 1e-3 * random.normal(size=9000)}
    (chart,) = contrast.scatters(Run({}, vectors))
    assert len(chart.series[0].points) == common.MAX_POINTS
    assert {y.min(), y.max()} <= {x for x, _ in chart.series[0].points}
    assert chart.notes == ("2000 of 9000 components, including the extremes.",)


def test_scatters_are_drawn_on_the_scale_of_the_output() -> None:
    y = np.linspace(-3, 4, 50)
    vectors = {"y": y, "offset": 0 * y, "linear_output": y, "ordinary_output": 0.01 * y}
    for chart in contrast.scatters(Run({}, vectors)):
        assert (chart.y.low, chart.y.high) == (chart.x.low, chart.x.high)


def test_the_measures_of_a_contrast(parsed: Page) -> None:
    vectors = {name: vector.astype(np.float64) for name, vector in report_run.full()[1].items()}
    error = np.linalg.norm(vectors["ordinary_output"] - vectors["y"]) / np.linalg.norm(vectors["y"])
    largest = np.abs(vectors["ordinary_output"] - vectors["y"]).max()
    (row,) = [text for text in parsed.find("tr") if text.startswith("Ordinary")]
    assert row == f"Ordinary {error:.1f} {largest:.1f} 1.3 0.67500 0.56667 30 % of 10 1.3"


def test_failed_checks_are_said_in_words() -> None:
    content = run_json()
    content["reconstruction"] |= {"healthy": False, "error": 0.5}
    content["parity"] |= {"verdict": False, "reason": "another top token"}
    content["svd"] |= {"converged": False, "stopped_by": "sweeps"}
    text = Page(rendered(content)).text
    for said in (
        "Reconstruction failed 0.50 not at most 10⁻⁵",
        "llama.cpp failed disagrees",
        "Singular vectors failed",
    ):
        assert said in text


def test_how_the_triplets_were_found_is_said() -> None:
    content = run_json()
    content["svd"] |= {"method": "matrix", "sweeps": 1, "rough_sweeps": 0, "stopped_by": "exact"}
    assert "converged: from the whole matrix (1 sweep), exact to rounding." in Page(rendered(content)).text
    content["svd"] |= {"method": "sweeps", "sweeps": 10, "rough_sweeps": 7, "stopped_by": "tolerance"}
    assert "after 10 sweeps (7 of them rough). Stopped by: tolerance." in Page(rendered(content)).text


def test_a_run_without_llama_cpp_has_no_verdict() -> None:
    content = run_json() | {"parity": {"verdict": None, "reason": "llama-cpp-python is missing"}}
    assert "llama.cpp no verdict not compared llama-cpp-python is missing" in Page(rendered(content)).text


def test_another_position_shows_where_the_prompt_is_read() -> None:
    content = run_json() | {"position": 2}
    for token, text in zip(
        content["tokens"], ["The", " bridge", " out", " of", " Marin", " is", " the", "桥"], strict=True
    ):
        token["text"] = text
    found = Page(rendered(content))
    assert found.find("h1") == ["The bridge out Golden of Marin is the桥"]
    assert found.find("tr", **{"class": "best"})[-1] == f"2 {content['tokens'][2]['id']} ␣out output position"


# -- what it leaves out ------------------------------------------------------------------------------------------------

MISSING = {
    "predictions": {"predict"},
    "attribution": {"attribute", "attribute-positions"},
    "branches": {"attribute-branches"},
    "parity": {"verify"},
    "norms": {"norms"},
    "jacobian": {"jacobian"},
    "ranks": {"ranks"},
    "compare": {"compare"},
    "compare_prompts": {"compare-prompts"},
    "steering": {"steer"},
    "intervention": {"steer-direction"},
    "svd": {"svd", "svd-vectors", "svd-per-token"},
    "layers": {"layers", "layers-stable-rank"},
}


@pytest.mark.parametrize("key", [key for key in run_json() if key not in ("schema_version", "model", "tokens")])
@pytest.mark.parametrize("null", [False, True])
def test_a_part_that_is_missing_is_left_out(key: str, null: bool) -> None:
    content = run_json()
    content[key] = None
    if not null:
        del content[key]
    found = Page(rendered(content))
    there = {a["id"] for tag, a in found.elements if tag == "section"}
    assert ALL_SECTIONS - APART - there == MISSING.get(key, set())
    assert "None" not in found.text
    assert "nan" not in found.text.split()


@pytest.mark.parametrize("part", ["readout", "ranks", "path"])
def test_layers_in_part(part: str) -> None:
    content = run_json()
    del content["layers"][part]
    found = Page(rendered(content))
    assert ("Rank by depth" in found.find("h3")) == (part != "ranks")
    assert ("Logit lens" in found.find("legend")) == (part != "readout")
    assert ("Path along the output's two leading directions" in found.find("figcaption")) == (part != "path")


@pytest.mark.parametrize("name", VECTORS)
def test_a_scatter_needs_its_vectors(name: str) -> None:
    vectors = {key: vector for key, vector in report_run.full()[1].items() if key != name}
    captions = Page(rendered(vectors=vectors)).find("figcaption")
    assert ("Reconstruction" in captions) == (name == "ordinary_output")
    assert ("The ordinary Jacobian" in captions) == (name in ("offset", "linear_output"))


def test_the_least_that_is_a_run() -> None:
    content = {"model": {"path": "a.gguf"}, "tokens": [{"position": 0, "id": 3, "text": "Hi"}]}
    found = Page(rendered(content, {}))
    assert {a["id"] for tag, a in found.elements if tag == "section"} == {"certificate", "tokens"}
    assert found.find("h1") == ["Hi"]


# -- input from strangers ----------------------------------------------------------------------------------------------


def test_hostile_tokens_are_text_and_nothing_else(html: str, parsed: Page) -> None:
    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replace(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [replace(entry) for entry in value]
        return f"harmless{HOSTILE.index(value)}" if value in HOSTILE else value

    other = Page(rendered(replace(run_json())))
    assert [tag for tag, _ in parsed.elements] == [tag for tag, _ in other.elements], "the same elements"
    assert {tag for tag, _ in parsed.elements} & {"img", "iframe", "object", "embed", "form", "b"} <= {"b"}
    assert not any(name.startswith("on") or name == "style" for _, a in parsed.elements for name in a)
    texts = ["".join(texts) for texts in parsed.texts]
    for token in HOSTILE:
        assert token in texts
    assert len(re.findall("<script", html)) == 2


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(), min_size=1, max_size=20))
@example("\u0eb4")
def test_any_text_comes_out_as_it_is_or_as_escapes(text: str) -> None:
    content = {
        "model": {"path": text, "name": text},
        "tokens": [{"position": 0, "id": 3, "text": text}],
        "warning": text,
    }
    content |= {"layers": {"taps": [], "readout": [{"index": 0, "top": [{"id": 1, "text": text}]}]}}
    content["layers"] |= {"ranks": {"tokens": [{"id": 1, "text": text}], "depths": [{"index": 0, "ranks": [1]}]}}
    source = rendered(content, {}).encode("utf-8").decode("utf-8")
    found = Page(source)
    shown = display.visible(text.encode("utf-8", "surrogatepass"))
    # A combining mark at the start stands on a dotted circle, and not on what precedes the token.
    either = {shown, f"\N{DOTTED CIRCLE}{shown}"}
    assert either & set(found.raw("button"))
    ((number, token),) = json.loads(found.raw("script")[0])["tokens"]
    assert number == 1
    assert token in either
    assert all(c.isprintable() or c in "\n\u200c\u200d\ufe0f" for c in shown + schema.text(text, "here"))
    if text.isprintable():
        assert schema.text(text, "here") == text


@pytest.mark.parametrize(
    "text", ["\x00", "\x1b[31m", "\u202e", "\u2066", "\udcff", "\ufeff", "\r", "\t", "\x7f", "\ue000"]
)
def test_characters_that_steer_are_shown_as_escapes(text: str) -> None:
    shown = schema.text(f"a{text}b", "here")
    assert re.fullmatch(r"a(\\x[0-9a-f]{2}\[31m|\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\[rt])b", shown)


WRONG: dict[str, tuple[str, Any, str]] = {
    "no tokens": ("tokens", ..., "run.json: tokens: is missing"),
    "empty prompt": ("tokens", [], "tokens: expected a list of 1 or more"),
    "tokens as text": ("tokens", "abc", "tokens: expected a list of 1 or more, found 'abc'"),
    "a token without text": ("tokens.2.text", ..., "tokens[2].text: is missing"),
    "a negative id": ("tokens.0.id", -1, "tokens[0].id: expected a whole number, found -1"),
    "a huge id": ("tokens.0.id", 2**70, "tokens[0].id: expected a whole number"),
    "a model as text": ("model", "x", "model: expected an object"),
    "position beyond": ("position", 8, "position: 8 is beyond the 8 tokens"),
    "position true": ("position", True, "position: expected a whole number, found True"),
    "sigma as text": ("svd.triplets.1.singular_value", "x", "svd.triplets[1].singular_value: expected a number"),
    "sigma missing": ("svd.triplets.1.singular_value", ..., "svd.triplets[1].singular_value: is missing"),
    "sigma infinite": ("svd.triplets.0.singular_value", math.inf, "expected a number, found inf"),
    "sigma NaN": ("svd.triplets.0.singular_value", math.nan, "expected a number, found nan"),
    "sigma that overflows": ("svd.triplets.0.singular_value", 1e300, "expected a number"),
    "left as numbers": ("svd.triplets.0.left.0", 7, "svd.triplets[0].left[0]: expected an object, found 7"),
    "no shares": ("attribution.shares", [], "attribution.shares: expected a list of 1 or more"),
    "healthy as a number": ("reconstruction.healthy", 1, "reconstruction.healthy: expected true or false, found 1"),
    "an unknown tap": ("layers.taps.0.kind", "head", "taps[0].kind: expected layer or attn or mlp, found 'head'"),
    "a list as a tap": ("layers.taps.0.kind", [], "layers.taps[0].kind: expected layer or attn or mlp, found list"),
    "an unknown map": ("layers.taps.0.map", "x", "layers.taps[0].map: expected cumulative"),
    "ranks of other tokens": ("layers.ranks.depths.1.ranks", [1], "1 ranks at depth 1 for 37 tokens"),
    "a path of one": ("layers.path.0.values", [1.0], "layers.path[0].values: expected a list of 2 or more"),
    "seconds as a list": ("seconds", [], "seconds: expected an object, found list"),
    "a long text for a number": ("attribution.logit", "z" * 999, "attribution.logit: expected a number, found 'zzz"),
    "steering text": ("dtype", ["\x1b"], "dtype: expected text, found list"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_run_of_another_form_is_refused_by_name(case: str, tmp_path: Path) -> None:
    path, value, words = WRONG[case]
    folder = report_run.write(tmp_path / "run", at(run_json(), path, value))
    text = error("report", folder, code=1)
    assert words in text
    assert "analyse the prompt again" in text
    assert len(text) < 300
    assert not (folder / "report.html").exists()


def test_ranks_text_is_about_the_tokens_there_are() -> None:
    assert len(TOKENS) == 37, "the number in WRONG"


NO_RUN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no run.json": (lambda f: (f / "run.json").unlink(), "is not a run folder"),
    "no JSON": (lambda f: (f / "run.json").write_text("{"), "is not a run folder"),
    "a list": (lambda f: (f / "run.json").write_text("[]"), "schema version"),
    "another version": (lambda f: (f / "run.json").write_text('{"schema_version": 99}'), "schema version"),
    "a pipe": (lambda f: ((f / "run.json").unlink(), os.mkfifo(f / "run.json")), "is not a regular file"),
    "nested": (lambda f: (f / "run.json").write_text('{"a":' * 99999), "too deeply"),
    "huge": (lambda f: os.truncate(f / "run.json", 300 * 2**20), "is 300.0 MiB, larger than any result"),
    "no safetensors": (lambda f: (f / "tensors.safetensors").write_bytes(b"x" * 99), "cannot be read"),
    "truncated": (lambda f: os.truncate(f / "tensors.safetensors", 700), "tensors.safetensors: cannot be read"),
    "a matrix": (
        lambda f: save_file({"y": np.zeros((2, 2), np.float32)}, f / "tensors.safetensors"),
        "y has shape [2, 2], not that of a vector",
    ),
    "two lengths": (
        lambda f: save_file({"y": np.zeros(2), "offset": np.zeros(3)}, f / "tensors.safetensors"),
        "differ in length (offset 3, y 2)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_RUN)
def test_what_is_no_run_folder_is_refused(case: str, tmp_path: Path) -> None:
    folder = report_run.write(tmp_path / "run")
    spoil, words = NO_RUN[case]
    spoil(folder)
    assert words in error("report", folder, code=1)
    assert not (folder / "report.html").exists()


def test_vectors_that_overflow_are_not_drawn(tmp_path: Path) -> None:
    vectors = report_run.full()[1]
    vectors["y"][3] = math.inf
    assert load(report_run.write(tmp_path / "run", None, vectors)).vectors == {}


def test_a_run_folder_cannot_send_the_report_elsewhere(tmp_path: Path) -> None:
    folder = report_run.write(tmp_path / "run")
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (folder / "report.html").symlink_to(tmp_path / "precious")
    with pytest.raises(RunError, match="leads out of the run folder"):
        write_report(folder)
    (folder / "figures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="leads out of the run folder"):
        write_figures(folder)
    (folder / "figures").unlink()
    (folder / "figures").mkdir()
    (folder / "figures" / "attribute.png").symlink_to(tmp_path / "precious")
    with pytest.raises(RunError, match="leads out of the run folder"):
        write_figures(folder)
    assert (tmp_path / "precious").read_text() == "mine"
    assert list((tmp_path / "elsewhere").iterdir()) == []


# -- the file ----------------------------------------------------------------------------------------------------------


def test_it_asks_nobody_for_anything(parsed: Page) -> None:
    for tag, attributes in parsed.elements:
        assert not {"src", "srcset", "data", "action", "poster", "background"} & attributes.keys(), (tag, attributes)
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))
    assert "url(" not in parsed.raw("style")[0]
    assert "@import" not in parsed.raw("style")[0]


def test_its_policy_allows_its_own_style_and_script_only(parsed: Page) -> None:
    (policy,) = [a["content"] for tag, a in parsed.elements if tag == "meta" and a.get("http-equiv")]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in policy

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules["style-src"] == source(parsed.raw("style")[0])
    assert rules["script-src"] == source(parsed.raw("script")[-1])
    assert rules["img-src"] == "data:"
    assert rules.keys() == {"default-src", "style-src", "script-src", "img-src", "base-uri", "form-action"}


def test_names_and_references_match(parsed: Page) -> None:
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in parsed.elements:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert set((attributes.get(name) or "").split()) <= set(ids)
    for (tag, attributes), texts in zip(parsed.elements, parsed.texts, strict=True):
        if tag == "table":
            assert attributes.get("class"), "a class"
        if tag == "svg" and attributes.get("role") == "img":
            assert attributes.get("aria-label") or attributes.get("aria-labelledby")
        if tag == "th" and "aria-hidden" not in attributes:
            assert attributes.get("scope") in ("col", "colgroup", "row")
            assert "".join(texts).strip()
    assert len(parsed.find("caption")) == len(parsed.find("table"))
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def rgb(colour: str) -> list[int]:
    """Return the parts of `#rgb` or `#rrggbb`."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    return [int(digits[i : i + 2], 16) for i in (0, 2, 4)]


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour (WCAG 2)."""
    parts = [c / 255 for c in rgb(colour)]
    return float(
        np.dot([0.2126, 0.7152, 0.0722], [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts])
    )


@pytest.mark.parametrize("scheme", [0, 1, 2], ids=["light", "dark", "print"])
def test_colours_have_contrast(scheme: int) -> None:
    css = (PACKAGE / "report" / "templates" / "report.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--(\w+): (#\w+);", re.findall(r":root \{([^}]*)\}", css)[scheme]))

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for text in ("ink", "soft", "accent", "less", "good", "bad"):
        for ground in ("paper", "raised"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["soft"], colours["track"]) >= 4.5
    strongest = max(int(m) for m in re.findall(r"--m: (\d+)%", css)) / 100
    for tint in ("accent", "less"):
        pairs = zip(rgb(colours[tint]), rgb(colours["track"]), strict=True)
        mixed = "#" + "".join(f"{round(strongest * a + (1 - strongest) * b):02x}" for a, b in pairs)
        assert contrast(colours["ink"], mixed) >= 4.5, tint


def test_the_demo_has_a_small_report(tmp_path: Path) -> None:
    result = invoke("analyze", "-t", 1, "-k", 3, "-q", "-o", tmp_path / "run")
    assert result.stdout.endswith(f"Saved {tmp_path}/run\nSaved {tmp_path}/run/report.html\n")
    file = tmp_path / "run" / "report.html"
    assert file.stat().st_size < 200_000
    found = Page(file.read_text(encoding="utf-8"))
    assert found.find("h1") == ["The bridge out of Marin is the Golden"]
    missing = {
        "layers",
        "layers-stable-rank",
        "svd-per-token",
        "attribute-positions",
        "norms",
        "jacobian",
        "ranks",
        "reach",
        "compare",
        "compare-prompts",
        "steer",
        "steer-direction",
        "verify",
    }
    assert {a["id"] for tag, a in found.elements if tag == "section"} == ALL_SECTIONS - APART - missing


def test_the_example_page_is_made_by_its_tool(tmp_path: Path) -> None:
    tool = ROOT / "tools" / "make_example_report.py"
    made = tmp_path / "example" / "report.html"
    out = subprocess.run([sys.executable, tool, made], check=True, capture_output=True, text=True).stdout
    assert out == f"{made}\n"
    found = Page(made.read_text(encoding="utf-8"))
    assert ("The ordinary Jacobian" in found.find("figcaption")) == ("--contrast" in found.find("code")[0])
    assert found.find("code")[0].startswith("ggjac analyze")
    assert str(tmp_path) not in found.text
    committed = ROOT / "docs" / "example" / "report.html"
    if committed.exists():
        assert Page(committed.read_text(encoding="utf-8")).find("h2") == found.find("h2"), f"run {tool.name}"


def test_a_large_run_has_a_page_that_can_be_mailed(tmp_path: Path) -> None:
    content, vectors = report_run.full(blocks=40, rank=8, d=8192, prompt=300)
    for key in (
        "norms",
        "jacobian",
        "ranks",
        "compare",
        "compare_prompts",
        "steering",
    ):  # other commands', with pages of their own
        del content[key]
    folder = report_run.write(tmp_path / "run", content, vectors)
    assert write_report(folder).stat().st_size < 2_000_000


def test_templates_are_in_the_wheel() -> None:
    """Hold every file of the package that is no module to the patterns that put it into the wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["ggjac"]
    packed = {path for pattern in patterns for path in (ROOT / "ggjac").glob(pattern)}
    templates = {path for path in (ROOT / "ggjac" / "report").rglob("*.*") if path.suffix not in (".py", ".pyc")}
    assert templates <= packed
    assert {path.name for path in (PACKAGE / "report" / "templates").iterdir()} == {path.name for path in templates}


def test_a_page_needs_neither_torch_nor_matplotlib(tmp_path: Path) -> None:
    folder = report_run.write(tmp_path / "run")
    code = f"""
import sys
from ggjac.report import write_report
write_report({str(folder)!r})
print(*[name for name in ("torch", "matplotlib", "llama_cpp", "gguf") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_where_it_is_told(tmp_path: Path) -> None:
    folder = report_run.write(tmp_path / "run")
    before = sorted(os.listdir(folder))
    assert invoke("report", folder, "-o", tmp_path / "page.html").stdout == f"Saved {tmp_path}/page.html\n"
    assert sorted(os.listdir(folder)) == before
    assert invoke("report", folder).stdout == f"Saved {folder}/report.html\n"
    assert (folder / "report.html").read_bytes() == (tmp_path / "page.html").read_bytes()


@pytest.mark.parametrize("name", ["run.json", "tensors.safetensors"])
def test_the_command_spares_what_it_reads(name: str, tmp_path: Path) -> None:
    folder = report_run.write(tmp_path / "run")
    before = (folder / name).read_bytes()
    (tmp_path / "link").symlink_to(folder / name)
    for output in (folder / name, tmp_path / "link"):
        assert "is the input of the report" in error("report", folder, "-o", output, code=1)
    assert (folder / name).read_bytes() == before


@pytest.mark.parametrize(("args", "code"), [(["missing"], 2), ([], 2), (["run", "-o", "no/page.html"], 1)])
def test_the_command_refuses_in_one_line(
    args: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report_run.write(tmp_path / "run")
    error("report", *args, code=code)


# -- figures for print -------------------------------------------------------------------------------------------------


def test_figures_are_the_pages_charts(tmp_path: Path) -> None:
    run = load(report_run.write(tmp_path / "run"))
    drawn = figures.figures(run)
    kinds = [
        f"stable-rank-{name}-{scale}" for name in ("cumulative", "blockwise", "to-end") for scale in ("linear", "log")
    ]
    scaled = lambda *names: [f"{name}-{scale}" for name in names for scale in ("linear", "log")]  # noqa: E731
    assert list(drawn) == [
        "steer-direction-logit", "steering-kl", "steering-mass", "steering-hits",
        *scaled("compare-singular-values", "compare-angles", "compare-kl"), "compare-prompts-blocks",
        *scaled("compare-prompts-singular-values", "compare-prompts-angles", "ranks-by-position"),
        "attribute", "attribute-branches", "attribute-branches-heads", "attribute-positions",
        *scaled("singular-values", "svd-per-token", "norms", "dense-frobenius", "dense-contribution"), "rank-by-depth",
        *kinds, "path", "reconstruction-detached", "reconstruction-ordinary", "verify-log", "verify-linear",
    ]  # fmt: skip
    assert list(drawn) == [drawing.name for section in SECTIONS for drawing in section.drawings(run)]
    sigmas = [t["singular_value"] for t in run.content["svd"]["triplets"]]
    for scale in ("linear", "log"):
        axes = drawn[f"singular-values-{scale}"].axes[0]
        assert axes.lines[0].get_ydata().tolist() == sigmas
        assert axes.get_yscale() == scale
    bars = [patch.get_width() for patch in drawn["attribute"].axes[0].patches]
    assert bars == [share["share"] for share in run_json()["attribution"]["shares"]]
    ranks = [depth["ranks"][0] for depth in run.content["layers"]["ranks"]["depths"]]
    axes = drawn["rank-by-depth"].axes[0]
    assert axes.lines[0].get_ydata().tolist() == ranks
    assert axes.yaxis_inverted()
    y = drawn["reconstruction-ordinary"].axes[0].lines[-1]
    assert np.allclose(np.stack([y.get_xdata(), y.get_ydata()]), [run.vectors["y"], run.vectors["ordinary_output"]])


def test_figures_are_those_of_the_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = charts.Bars("mine", "title", "label", ["a"], [1.0])
    own = common.Section("mine", "Mine", lambda run: None, drawings=lambda run: [bars])
    monkeypatch.setattr(figures, "SECTIONS", (own,))
    assert list(figures.figures(Run({}, {}))) == ["mine"]


def test_figures_come_in_three_formats_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    content = {
        key: run_json()[key] for key in ("schema_version", "model", "tokens", "attribution", "branches", "position")
    }
    del content["attribution"]["positions"]
    folder = report_run.write(tmp_path / "run", content, {})
    result = invoke("report", folder, "--figures")
    names = ["attribute", "attribute-branches", "attribute-branches-heads"]
    files = [folder / "figures" / f"{name}.{kind}" for name in names for kind in ("png", "svg", "pdf")]
    assert result.stdout.split("\n") == [f"Saved {path}" for path in (folder / "report.html", *files)] + [""]
    first = [path.read_bytes() for path in files]
    for path, data in zip(files, first, strict=True):
        start = {"png": b"\x89PNG\r\n", "svg": b"<?xml", "pdf": b"%PDF-1."}[path.suffix[1:]]
        assert data.startswith(start)
        if path.suffix == ".svg":
            assert ET.fromstring(data).tag == "{http://www.w3.org/2000/svg}svg"
    write_figures(folder)
    assert [path.read_bytes() for path in files] == first
    assert sorted(os.listdir(folder / "figures")) == sorted(path.name for path in files)


def test_figures_leave_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    content = {key: run_json()[key] for key in ("schema_version", "model", "tokens", "attribution")}
    assert len(write_figures(report_run.write(tmp_path / "run", content, {}))) == 6  # at one position, and at all
    assert dict(matplotlib.rcParams) == before


# -- numbers -----------------------------------------------------------------------------------------------------------

NUMBERS = [
    (numbers.signed, 1.5, "+1.500"), (numbers.signed, -1.5, "−1.500"), (numbers.signed, -1e-9, "0.000"),
    (numbers.percent, 0.9719, "97.2\xa0%"), (numbers.percent, 1e-6, "<\xa00.1\xa0%"),
    (numbers.percent, -0.01, "−1.0\xa0%"), (numbers.percent, -4e-4, ">\xa0−0.1\xa0%"),
    (numbers.percent, 0.0, "0.0\xa0%"), (numbers.aligned, [43.576, 0.5], ["43.5760", "0.5000"]),
    (numbers.aligned, [43.576, 12.0], ["43.58", "12.00"]), (numbers.aligned, [3e7, 1.0], ["3.000 × 10⁷", "1.000"]),
]  # fmt: skip


@pytest.mark.parametrize(("function", "value", "shown"), NUMBERS)
def test_numbers_for_readers(function: Callable, value: Any, shown: Any) -> None:
    assert function(value) == shown
