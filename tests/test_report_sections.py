"""The page's section for every analysis: what it says, from whichever command's JSON, and what it refuses.

What the page says is read back by `html.parser` and compared with the numbers it was made from; the numbers themselves
are the commands' matter.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_run
from commands import PAGES, of_page
from helpers import invoke, invoke_json
from report_run import TOKENS, Page, at, rendered, run_json

from ggjac import display
from ggjac.analysis.per_token import TokenSpectrum
from ggjac.drawing.charts import Heat, Panel
from ggjac.report import figures, write_figures
from ggjac.report.load import checked, load
from ggjac.report.sections import ROOMS, attribute, common, compare, ranks, steer
from ggjac.report.sections.common import Run
from ggjac.report.sections.verify import departures
from ggjac.runs import RunError

TinyFile = Callable[..., Path]


def section(html: str, key: str) -> Page:
    """Return one section of a page."""
    found = re.findall(rf'<section id="{key}".*?</section>', html, re.DOTALL)
    assert len(found) == 1, key
    return Page(f"<body>{found[0]}</body>")


def minus(text: str) -> str:
    return text.replace("-", "−")


def signed(value: float) -> str:
    text = f"{value:+.4f}"
    return minus(text if float(text) else text[1:])


@pytest.fixture(scope="module")
def html() -> str:
    return rendered()


# -- shares by block and head ------------------------------------------------------------------------------------------


def test_every_share_is_in_the_table_and_they_sum_to_the_logit(html: str) -> None:
    entry, found = run_json()["branches"], section(html, "attribute-branches")
    rows = found.find("tr")
    for block in entry["blocks"]:
        values = [block["attn"], block["mlp"], *block["heads"]]
        assert f"L{block['block']} " + " ".join(signed(value) for value in values) in rows
    logit = minus(f"{entry['logit']:.4f}")
    (equation,) = found.find("p", **{"class": "equation"})
    assert equation.startswith(f"Sum of all parts {signed(entry['logit'])} = logit {logit} (remainder ")
    attention = sum(block["attn"] for block in entry["blocks"])
    assert any(row.startswith(f"Attention, all blocks {signed(attention)}") for row in rows)
    largest = max(
        ((share, f"L{b['block']}H{i}") for b in entry["blocks"] for i, share in enumerate(b["heads"])),
        key=lambda part: abs(part[0]),
    )
    assert any(row.startswith(f"{largest[1]} {signed(largest[0])}") for row in rows)


def test_parts_that_do_not_make_up_the_logit_are_said_to() -> None:
    content = run_json()
    content["branches"]["logit"] += 3
    (said,) = section(rendered(content), "attribute-branches").find("p", **{"class": "equation"})
    assert " ≠ logit " in said
    assert "(remainder 3.0)" in said


def cells(html: str, units: int, rows: int) -> np.ndarray:
    """Return the shade of every unit of a grid, read back from its paths."""
    shades = np.zeros((rows, units), int)
    for level, path in re.findall(r'<path class="l(-?\d+)" d="([^"]+)"', html):
        for x, y, across, back in re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", path):
            assert across == back
            row = shades[int(y), int(x) : int(x) + int(across)]
            assert (row == 0).all(), "no cell lies on another"
            row[:] = int(level)
    return shades


def test_a_long_prompt_begins_with_its_largest_shares() -> None:
    content, _ = report_run.full(prompt=1000)
    given = content["attribution"]
    html = rendered(content)
    found = section(html, "attribute")
    assert "The 20 largest of 1000 shares" in found.find("h3")
    largest = sorted(given["shares"], key=lambda share: -abs(share["share"]))
    rows = found.find("tr")[1:21]
    for row, share in zip(rows, largest, strict=False):
        assert row.startswith(f"{share['position']} ")
        assert signed(share["share"]) in row
    rest = sum(share["share"] for share in largest[20:])
    assert f"980 others {signed(rest)}" in found.find("tr")[21]
    part = html[html.index('id="attribute"') : html.index('id="attribute-branches"')]
    assert part.count("<details>") == 2, "the prompt and the whole table are folded"
    assert len(found.find("tr")) == 2 + 20 + 1 + 1000 + 2


def test_an_attention_sink_is_named_where_the_result_has_one() -> None:
    content = run_json()
    assert "as an attention sink does" not in rendered(content)
    for key, part, of in (
        ("attribute", "attribution", "the logit"),
        ("svd-vectors", "svd", "the weight of right vector 1"),
    ):
        content[part]["sink"] = {"position": 0, "id": 3, "text": "<|begin|>", "fraction": 0.8312}
        said = f"Position 0, <|begin|>, takes 83 % of {of}, as an attention sink does; --exclude 0 leaves it out."
        assert said in section(rendered(content), key).text


def test_the_next_singular_value_is_named() -> None:
    content = run_json()
    last = content["svd"]["triplets"][-1]["singular_value"]
    count = len(content["svd"]["triplets"])
    content["svd"]["next_singular_value"] = {"value": 0.75 * last, "residual": 1e-4, "converged": True}
    assert f"σ{count + 1} = {0.75 * last:.4g}, 25.0% below σ{count}." in section(rendered(content), "svd-vectors").text
    content["svd"]["next_singular_value"] = None
    assert f"σ{count + 1}" not in section(rendered(content), "svd-vectors").text


def test_a_short_prompt_is_not_folded() -> None:
    found = section(rendered(run_json()), "attribute")
    assert not any("largest of" in heading for heading in found.find("h3"))


def scale(values: np.ndarray) -> float:
    """Return the largest value that the colours cover: three times what nearly all values stay below."""
    sizes = np.abs(values)
    return float(sizes[sizes <= 3 * np.quantile(sizes, 0.95, method="lower")].max())


def test_one_large_value_does_not_leave_a_grid_without_colours() -> None:
    content = run_json()
    content["branches"] = report_run.branches(blocks=30, heads=9)
    for i, block in enumerate(content["branches"]["blocks"]):
        block |= {"attn": 0.5 + i / 60, "mlp": -0.5 - i / 60}
    content["branches"]["blocks"][29]["mlp"] = 14.1
    html = rendered(content)
    grid = re.findall(r'<figure class="map.*?</figure>', html, re.DOTALL)[0]
    shades = cells(grid, 12, 30)[:, :2]
    assert (np.abs(shades) >= 5).all()
    assert shades[29].tolist() == [10, 10]
    outer = content["branches"]["blocks"][29]["block"]
    assert f"Beyond the colours: block L{outer}, MLP: +14.10." in section(html, "attribute-branches").text
    (grid,) = attribute.branch_grid(Run(checked(content), {}))
    assert grid.panels[0].beyond == [(29, 1, 14.1)]


@pytest.mark.parametrize("heads", [1, 4, 64])
def test_a_grid_shows_each_value_at_its_place(heads: int) -> None:
    content = run_json()
    content["branches"] = report_run.branches(blocks=5, heads=heads)
    html = re.findall(r'<figure class="map.*?</figure>', rendered(content), re.DOTALL)[0]
    blocks = content["branches"]["blocks"]
    span = max(1, round(heads / 20))
    shades = cells(html, 2 * span + 1 + heads, 5)
    sides = np.array([[block["attn"], block["mlp"]] for block in blocks])
    inner = np.array([block["heads"] for block in blocks])
    expected = [np.round(10 * part / scale(part)).clip(-10, 10).astype(int) for part in (sides, inner)]
    assert (shades[:, :span] == expected[0][:, :1]).all()
    assert (shades[:, span : 2 * span] == expected[0][:, 1:]).all()
    assert (shades[:, 2 * span] == 0).all(), "a gap"
    assert (shades[:, 2 * span + 1 :] == expected[1]).all()
    # What the script needs to find a cell's value in the table.
    places = re.findall(r'data-places="([^"]+)"', html)[0].split(" ")
    assert places == [f"0,{span}", f"{span},{span}", *(f"{2 * span + 1 + i},1" for i in range(heads))]


def test_by_layer_there_is_a_chart_and_a_table() -> None:
    content = run_json()
    content["branches"] = report_run.branches(blocks=5, heads=0)
    found = section(rendered(content), "attribute-branches")
    assert "data-heat" not in rendered(content)[: rendered(content).index('id="attribute-positions"')]
    for block in content["branches"]["blocks"]:
        assert f"L{block['block']} {signed(block['attn'])} {signed(block['mlp'])}" in found.find("tr")
    assert "H0" not in found.text


def test_a_large_model_has_a_small_page() -> None:
    content = {key: run_json()[key] for key in ("model", "tokens")} | {
        "branches": report_run.branches(blocks=80, heads=64)
    }
    source = rendered(content, {})
    assert len(source.encode()) < 500_000
    assert len(re.findall("<td>[+−0-9]", source)) == 80 * 66
    assert max(map(len, re.findall(r'class="l-?\d+" d="([^"]+)"', source))) < 60_000


def test_grids_that_no_eye_could_read_are_left_out() -> None:
    content = run_json()
    content["branches"] = report_run.branches(blocks=200, heads=128)
    source = rendered(content)
    assert "attribute-branches-heads-values" not in source
    assert len(source.encode()) < 2_000_000


@pytest.mark.parametrize(("largest", "shown"), [(2.0, True), (0.0, False)])
def test_shades_are_relative_to_the_panel(largest: float, shown: bool) -> None:
    panel = Panel("x", ("a", "b"), ("a", "b"), ((largest, -largest / 2), (None, 0.0)))
    found = common.heat(Heat("key", "title", "row", ("0", "1"), (panel,)))
    assert [level for level, _ in found["paths"]] == [*(["-5", "10"] if shown else []), "none"]
    first = ["+2.0000", "−1.0000"] if shown else ["0.0000", "0.0000"]
    assert [row for _, row in found["body"]] == [first, ["", "0.0000"]]


# -- all positions, and the difference of two logits -------------------------------------------------------------------


def test_every_position_has_its_shares(html: str) -> None:
    found = section(html, "attribute-positions")
    for entry in run_json()["attribution"]["positions"]:
        cells = " ".join(signed(share["share"]) for share in entry["shares"])
        assert any(row.startswith(f"{entry['position']} ") and f" {cells}" in row for row in found.find("tr"))
        logit = minus(f"{entry['logit']:+.4f} {entry['logit']:.4f}")
        assert any(row.endswith(logit) for row in found.find("tr"))
    assert found.find("p", **{"class": "equation"}) == ["The shares sum to the logit at each position."]


@pytest.mark.parametrize("heads", [0, 3])
def test_every_position_by_block(heads: int) -> None:
    content = run_json()
    entries = [report_run.branches(blocks=4, heads=heads, seed=i, position=i, **report_run.token(i)) for i in range(3)]
    content["attribution"] = {"by": entries[0]["by"], "positions": entries}
    html = rendered(content)
    grid = re.findall(r'<figure class="map.*?</figure>', html[html.index('id="attribute-positions"') :], re.DOTALL)[0]
    shades = cells(grid, 9, 3)
    mlp = np.array([[block["mlp"] for block in entry["blocks"]] for entry in entries])
    assert (shades[:, 5:] == np.round(10 * mlp / np.abs(mlp).max())).all()
    assert 'id="attribute"' not in html


@pytest.mark.parametrize(
    ("mixer", "name"), [(None, "Attention"), ("state space", "Token mixers"), ("none", "Token mixers")]
)
def test_blocks_are_not_said_to_attend_where_some_do_not(mixer: str | None, name: str) -> None:
    content = run_json()
    content["branches"] = report_run.branches(blocks=4, heads=0)
    if mixer:
        content["branches"]["blocks"][1]["mixer"] = mixer
    found = section(rendered(content), "attribute-branches")
    assert sum(row.startswith(f"{name}, all blocks ") for row in found.find("tr")) == 1
    assert name in found.find("th", **{"class": "n"})


def test_positions_that_do_not_sum_are_said_to() -> None:
    content = run_json()
    content["attribution"]["positions"][2]["logit"] += 2
    (said,) = section(rendered(content), "attribute-positions").find("p", **{"class": "equation"})
    assert said == "The shares do not sum to the logit at each position: see the table."


def test_the_difference_of_two_logits_is_called_one() -> None:
    content = run_json()
    content["attribution"]["versus"] = report_run.token(3)
    content["branches"]["versus"] = report_run.token(4)
    html = rendered(content)
    assert f"the logit of {TOKENS[0]}, minus that of {TOKENS[3]}, before" in section(html, "attribute").text
    assert (
        f"the logit of {TOKENS[0]}, minus that of {TOKENS[4]}, by the parts" in section(html, "attribute-branches").text
    )
    for key in ("attribute", "attribute-branches"):
        assert "= difference of the logits " in section(html, key).text
        assert "Of logit" not in section(html, key).text, "no share of a difference"


# -- each position's own vectors ---------------------------------------------------------------------------------------


def shown(tokens: list[dict[str, Any]]) -> str:
    return " ".join(map(display.token, tokens))


def test_each_position_has_a_table_of_its_own(html: str) -> None:
    found = section(html, "svd-per-token")
    entries = run_json()["svd"]["per_token"]
    assert len(found.find("table")) == len(entries)
    for entry, summary in zip(entries, found.find("summary"), strict=True):
        sigma = f"σ {entry['triplets'][0]['singular_value']:.4f}"
        assert summary.startswith(" ".join(f"{entry['position']} {display.token(entry)} {sigma}".split()))
        assert " ".join(shown(entry["triplets"][0]["left"][:3]).split()) in summary
        assert ("not converged" in summary) == (entry["position"] == 2)
    rows = found.find("tr")
    for entry in entries:
        for triplet in entry["triplets"]:
            words = " ".join(shown([*triplet["left"], *triplet["right"]]).split())
            assert any(row.endswith(words) for row in rows)
    assert all("open" in a for tag, a in found.elements if tag == "details"), "few positions stand open"


def test_many_positions_are_folded_and_cut() -> None:
    content, _ = report_run.full(prompt=60)
    found = section(rendered(content), "svd-per-token")
    assert len(found.find("details")) == 60
    assert not [a for tag, a in found.elements if tag == "details" and "open" in a]
    assert len(found.find("tr")) == 60 * 3, "a head and two triplets each"
    assert "the file has all of them" in found.text


def test_norms_and_the_dense_map_by_position(html: str) -> None:
    found, rows = section(html, "norms"), run_json()["norms"]["positions"]
    texts = found.find("tr")
    for entry in rows:
        column, row = entry["columns"][0], entry["rows"][0]
        start = f"{entry['position']} {display.token(entry)} Columns 0 9.000 "
        assert " ".join(f"{start}{shown(column['tokens'])}".split()) in texts
        assert " ".join(f"Rows 0 9.000 {shown(row['tokens'])}".split()) in texts
    dense, found = run_json()["jacobian"], section(html, "jacobian")
    assert "64 × 8 × 64 entries; Frobenius norm 77.5" in found.text
    first = dense["positions"][0]
    assert any(
        f"{first['frobenius']:.3f}" in row and f"{first['contribution_norm']:.3f}" in row for row in found.find("tr")
    )


# -- several files, prompts, texts -------------------------------------------------------------------------------------


def test_two_files_side_by_side(html: str) -> None:
    found, data = section(html, "compare"), run_json()["compare"]
    assert "a is tiny.gguf, b is tiny-q4_k_m.gguf." in found.text
    rows = found.find("tr")
    # Angles run the other way: the smallest first.
    assert "1 40.000 41.000 2.5 % 7.000° 5.000°" in rows
    assert "5 8.000 8.200 2.5 % 9.000° 7.000°" in rows
    for share in data["shares"]:
        values = [share["a"], share["b"], share["b"] - share["a"]]
        numbers = " ".join(signed(value) for value in values)
        assert " ".join(f"{share['position']} {display.token(share)} {numbers}".split()) in rows
    assert "Logit +12.5000 +12.2500 −0.2500" in rows
    assert "Offset (biases) +0.5000 +0.2500 −0.2500" in rows
    assert "KL divergence at the output, nats 0.032" in found.text
    assert "Not converged to 10⁻³" in found.text
    differing = [a for tag, a in found.elements if tag == "tr" and a.get("class") == "fails"]
    assert len(differing) == 3, "positions 0, 3 and 6"
    assert "Reconstruction, file b failed 0.25 not at most 10⁻⁵" in section(html, "certificate").text
    assert "Compared with tiny-q4_k_m.gguf" in Page(html).text


def test_two_prompts_side_by_side(html: str) -> None:
    found, data = section(html, "compare-prompts"), run_json()["compare_prompts"]
    rows = found.find("tr")
    for row in data["shares"]:
        sides = [row["a"], row["b"]]
        places = " ".join(str(side["position"]) for side in sides if side)
        numbers = [signed(side["share"]) for side in sides if side]
        numbers += [signed(row["b"]["share"] - row["a"]["share"])] if all(sides) else []
        shown = display.token(next(filter(None, sides)))
        assert " ".join(f"{places} {shown} {' '.join(numbers)}".split()) in rows
    for block in data["blocks"]:
        sides = [block[kind] for kind in ("attn", "mlp")]
        cells = " ".join(signed(value) for both in sides for value in (both["a"], both["b"], both["b"] - both["a"]))
        assert any(row.startswith(f"L{block['block']} ") and row.endswith(cells) for row in rows)
    # Each token once, in a colour of a common scale; where the other prompt has none, its place is empty.
    alone = [a for tag, a in found.elements if a.get("class") == "share alone"]
    assert len(alone) == sum(None in row.values() for row in data["shares"]) > 0
    levels = [int(a["class"].split()[1][1:]) for tag, a in found.elements if a.get("class", "").startswith("share l")]
    shares = [row[side]["share"] for row in data["shares"] for side in "ab" if row[side]]
    assert levels == [round(10 * share / max(map(abs, shares))) for share in shares]
    assert "these have 60 % of the squared length in a, and 50 % in b" in found.text
    for side in "ab":
        (best, *_) = data["next"][side]
        assert any(row.startswith(display.token(best)) and "50.0 %" in row for row in rows)
    assert "Reconstruction, prompt b passed" in section(html, "certificate").text
    assert "Compared with Another <b>prompt</b>" in Page(html).text
    assert "another warning" in Page(html).text
    long = run_json()
    long["other_prompt"]["prompt"] = "word " * 1000
    assert "word " * 199 in (shown := Page(rendered(long)).text)
    assert "word " * 201 not in shown


def test_a_direction_beside_its_null(html: str) -> None:
    found, data = section(html, "steer-direction"), run_json()["intervention"]
    rows = found.find("tr")
    for row in data["edited"]:
        cells = f"{row['logit']:.3f} {row['predicted']['logit']:.3f} 75 % 11.00 to 13.00 {row['kl']:.3f} 0.125 to 4.000"
        assert any(cells in text and text.endswith("1 of 3") for text in rows)
        assert f"{row['strength']:g} {row['text']}" in rows
    for place in data["positions"]:
        assert any(text.endswith(f"+{place['component']:.3f} 20.000") for text in rows)
    assert "Positions of generated tokens are changed, too." in found.text
    (chart,) = steer.logits(Run(checked(run_json()), {}))
    assert [series.points for series in chart.series] == [
        ((0.0, 12.0), (0.5, 10.0), (1.0, 8.0)),
        ((0.0, 12.0), (0.5, 10.5), (1.0, 9.0)),
        ((0.0, 12.0), (0.5, 35.5 / 3), (1.0, 35.5 / 3)),
    ]


def test_both_spectra_are_in_one_chart() -> None:
    run = Run(checked(run_json()), {})
    chart = compare.spectra(run)[0]
    assert [[y for _, y in series.points] for series in chart.series] == [
        [value[side] for value in run_json()["compare"]["singular_values"]] for side in ("a", "b")
    ]
    assert [len(series.points) for series in compare.spectra(run, "compare_prompts")[0].series] == [5, 5]
    (angles, *_) = compare.angles(run)
    assert [y for _, y in angles.series[0].points] == run_json()["compare"]["angles"]["left"][::-1]


def test_ranks_over_prompts(html: str) -> None:
    found, data = section(html, "ranks"), run_json()["ranks"]
    for row in data["by_position"]:
        start = f"{row['position']} {row['prompts']} {row['mean']:.4g} "
        assert any(text.startswith(start) and f"{row['most']:.4g}" in text for text in found.find("tr"))
    for prompt in data["prompts"]:
        tokens = "".join(f"{display.token(t)}{t['stable_rank']['value']:.4g}" for t in prompt["tokens"])
        assert any("".join(text.split()).startswith("".join(tokens.split())) for text in found.find("tr"))
    assert "7 prompts, all converged." in found.text
    (chart, *_) = ranks.ranks_over_prompts(Run(checked(run_json()), {}))
    assert [y for _, y in chart.series[1].points] == [row["mean"] for row in data["by_position"]]
    every = [t["stable_rank"]["value"] for prompt in data["prompts"] for t in prompt["tokens"]]
    assert [y for _, y in chart.series[0].points] == every


def test_ranks_of_many_prompts_have_a_page_without_a_prompt() -> None:
    content = {key: run_json()[key] for key in ("schema_version", "model", "ranks", "versions", "command", "dtype")}
    content["ranks"]["prompts"][0]["stopped_by"] = "sweeps"
    found = Page(rendered(content, {}))
    assert found.find("h1") == ["7 prompts"]
    assert {a["id"] for tag, a in found.elements if tag == "section"} == {"ranks", "certificate"}
    assert "Not converged: 1 of 7 prompts." in found.text
    assert "None" not in found.text


def test_steered_texts_beside_the_baseline(html: str) -> None:
    found, data = section(html, "steer"), run_json()["steering"]
    rows = found.find("tr")[1:]
    assert [row.split()[0] for row in rows] == ["Baseline", "Concept", "Control", "Concept", "Control"]
    order = [data["baseline"], *(t for pair in zip(data["steered"], data["controls"], strict=True) for t in pair)]
    assert all(row.endswith(" ".join(t["text"].split())) for row, t in zip(rows, order, strict=True))
    assert rows[1].startswith("Concept 0.25 0.062 12.5 % 1 of 5 ")
    assert "The concept: The <i>bridge</i>, after which the most likely next tokens are" in found.text
    assert (
        "Its map spans 4 of 6 blocks; the residual stream is steered after 4 blocks (method equation16)." in found.text
    )
    kl, mass, hits = steer.effects(Run(checked(run_json()), {}))
    assert kl.series[0].points == ((0.0, 0.0), (0.25, 0.0625), (0.5, 0.25))
    assert kl.series[1].points == ((0.0, 0.0), (0.125, 0.015625), (0.375, 0.140625))
    assert [y for _, y in mass.series[0].points] == [0.0, 0.125, 0.25]
    assert [y for _, y in hits.series[0].points] == [0.0, 1.0, 2.0]


def test_one_strength_needs_no_chart() -> None:
    content = run_json()
    content["steering"] |= {"steered": content["steering"]["steered"][:1], "controls": []}
    found = section(rendered(content), "steer")
    assert found.find("figure") == []
    assert len(found.find("tr")) == 3
    assert "Control: steered by" not in found.text


def test_every_tensor_against_llama_cpp(html: str) -> None:
    found = section(html, "verify")
    assert "l_out-3 10⁻⁴ 3 10⁻³" in found.find("tr")
    failing = [a for tag, a in found.elements if tag == "tr" and a.get("class") == "fails"]
    assert len(failing) == 1, "10⁻² is beyond the tolerance of 0.002"


def test_every_tensor_given_llama_cpps_input() -> None:
    """An older run lacks these errors; a layer that fails alone is marked, whatever its distance in the trace."""
    content = run_json()
    assert "Given its input" not in section(rendered(content), "verify").text
    content["parity"] |= {
        "local": [
            {
                "name": f"l_out-{i}",
                "error": 3e-6 if i else 0.2,
                "tolerance": 1e-5,
                "worst_position": 0,
                "worst_error": 1.0,
            }
            for i in range(3)
        ],
        "verdict": False,
        "amplification": 120.4,
    }
    found = section(rendered(content), "verify")
    assert "Given its input" in found.text
    assert "l_out-1 10⁻⁶ 1 10⁻⁵ 3.0 × 10⁻⁶" in found.find("tr")
    assert "l_out-3 10⁻⁴ 3 10⁻³ –" in found.find("tr")
    assert "120 eps" in found.text
    failing = [a for tag, a in found.elements if tag == "tr" and a.get("class") == "fails"]
    assert len(failing) == 2, "10⁻² is beyond the tolerance of 0.002, and 0.2 beyond 10⁻⁵"
    content["parity"] |= {"verdict": True, "local": content["parity"]["local"][1:]}
    found = section(rendered(content), "verify")
    assert not [a for tag, a in found.elements if tag == "tr" and a.get("class") == "fails"]
    series = departures(Run(checked(content), {}))[0].series
    assert [s.name for s in series] == ["relative L2", "given llama.cpp's own input", "tolerance"]
    assert [x for x, _ in series[1].points] == [1, 2]


def test_grids_are_drawn_for_print_as_on_the_page() -> None:
    run = Run(checked(run_json()), {})
    drawn = figures.figures(run)
    sides, heads = (axes.collections[0].get_array() for axes in drawn["attribute-branches-heads"].axes[:2])
    blocks = run_json()["branches"]["blocks"]
    assert sides.tolist() == [[block["attn"], block["mlp"]] for block in blocks]
    assert heads.tolist() == [block["heads"] for block in blocks]
    grid = drawn["attribute-positions"].axes[0].collections[0].get_array()
    assert grid[3, :4].tolist() == [share["share"] for share in run_json()["attribution"]["positions"][3]["shares"]]
    assert np.ma.getmaskarray(grid)[3, 4:].all() or np.isnan(grid[3, 4:]).all(), "later tokens have no share"


# -- input from strangers ----------------------------------------------------------------------------------------------

SCRIPT = "<script>window.hit=1</script>"
# Section -> where its data can hold text.
TEXTS: dict[str, list[str]] = {
    "attribute-branches": ["branches.target.text", "branches.versus.text"],
    "attribute-positions": [
        "attribution.positions.1.text",
        "attribution.positions.1.target.text",
        "attribution.positions.7.shares.0.text",
        "attribution.positions.0.versus.text",
    ],
    "attribute": ["attribution.versus.text"],
    "svd-per-token": [
        "svd.per_token.0.text",
        "svd.per_token.1.triplets.0.left.0.text",
        "svd.per_token.1.triplets.0.right.1.text",
    ],
    "norms": [
        "norms.positions.0.text",
        "norms.positions.0.columns.0.tokens.0.text",
        "norms.positions.0.rows.1.tokens.0.text",
    ],
    "jacobian": ["jacobian.positions.0.text"],
    "compare-prompts": [
        "compare_prompts.target.text",
        "compare_prompts.versus.text",
        "compare_prompts.blocks.0.mixer",
        "compare_prompts.shares.0.a.text",
        "compare_prompts.positions.0.a.text",
        "compare_prompts.positions.0.top1.a.text",
        "compare_prompts.next.a.0.text",
    ],
    "compare": [
        "compare.target.text",
        "compare.shares.0.text",
        "compare.positions.0.text",
        "compare.positions.0.top1.a.text",
        "other_model.path",
    ],
    "ranks": ["ranks.prompts.0.tokens.0.text", "ranks.prompts.0.next.text"],
    "steer-direction": [
        "intervention.method",
        "intervention.direction",
        "intervention.target.text",
        "intervention.positions.0.text",
        "intervention.baseline.text",
        "intervention.edited.0.text",
    ],
    "steer": [
        "steering.method",
        "steering.concept.text",
        "steering.concept.top.0.text",
        "steering.baseline.text",
        "steering.steered.0.text",
        "steering.controls.1.text",
    ],
    "verify": ["parity.layers.0.name"],
}


@pytest.mark.parametrize(("key", "path"), [(key, path) for key, paths in TEXTS.items() for path in paths])
def test_a_script_in_any_text_is_text(key: str, path: str) -> None:
    def made(text: str) -> Page:
        content = run_json()
        if ".versus." in path:
            content = at(content, path.rpartition(".")[0], {"id": 1, "text": text})
        return section(rendered(at(content, path, text)), key)

    hostile, harmless = made(SCRIPT), made("harmless")
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in harmless.elements]
    shown = harmless.text.count("harmless")
    # The last part of a path is all that is shown of one, and words beside a grid are cut; others have scripts, too.
    words = "script>" if path in ("other_model.path", "intervention.direction") else "<script>"
    assert shown >= 1
    assert hostile.text.count(words) - harmless.text.count(words) == shown


def test_all_new_text_is_tried() -> None:
    """Hold TEXTS to the schema: every place that takes text in these parts is in it, or shows nothing of it."""
    silent = {"branches.by", "steering.concept.tokens.0.text", "ranks.prompts.0.prompt"}
    listed = {path for paths in TEXTS.values() for path in paths}
    keys = {"branches", "norms", "jacobian", "ranks", "compare", "compare_prompts", "intervention", "steering"}
    found = {f"{key}.{path}" for key in keys for path in _texts(run_json()[key]) if not path.endswith(".bytes")}
    generic = {re.sub(r"\.\d+", ".#", path) for path in listed | silent}
    shown = {re.sub(r"\.\d+", ".#", path) for path in found}
    unseen = {
        "intervention.edited.#.top.#.text", "intervention.edited.#.tokens.#.text",
        "compare_prompts.shares.#.b.text", "compare_prompts.positions.#.b.text", "compare_prompts.next.b.#.text",
        "compare_prompts.positions.#.top1.b.text", "branches.text", "ranks.prompts.#.stopped_by",
        "compare.positions.#.top1.b.text",
        "steering.baseline.tokens.#.text", "steering.steered.#.tokens.#.text", "steering.controls.#.tokens.#.text",
    }  # fmt: skip
    assert shown - generic <= unseen


def _texts(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [found for key, entry in value.items() for found in _texts(entry, f"{path}.{key}" if path else key)]
    if isinstance(value, list):
        return [found for i, entry in enumerate(value) for found in _texts(entry, f"{path}.{i}" if path else str(i))]
    return [path] if isinstance(value, str) else []


WRONG: dict[str, tuple[str, Any, str]] = {
    "an unknown way to split": ("attribution.by", "neuron", "attribution.by: expected token or layer or head"),
    "positions as an object": ("attribution.positions", {}, "attribution.positions: expected a list of 1 or more"),
    "a position without a place": ("attribution.positions.2.position", ..., "positions[2].position: is missing"),
    "a share of text": ("attribution.positions.2.shares.1.share", "x", "shares[1].share: expected a number, found 'x'"),
    "no blocks": ("branches.blocks", [], "branches.blocks: expected a list of 1 or more"),
    "heads of some blocks": ("branches.blocks.1.heads", None, "blocks differ in their number, or in that of"),
    "names of other heads": ("branches.blocks.1.head_names", ["x"], "branches: block 1 has names for other heads"),
    "a name that is none": ("branches.blocks.1.head_names", [1], "head_names[0]: expected text"),
    "a head of text": ("branches.blocks.1.heads.0", "x", "branches.blocks[1].heads[0]: expected a number"),
    "too many heads": ("branches.blocks.1.heads", [0.0] * 5000, "heads: expected a list of at most 4096, found 5000"),
    "too many blocks": ("branches.blocks", [{}] * 5000, "branches.blocks: expected a list of at most 4096"),
    "a missing MLP": ("branches.blocks.1.mlp", ..., "branches.blocks[1].mlp: is missing"),
    "a position's triplets": ("svd.per_token.1.triplets.0.left", "x", "per_token[1].triplets[0].left: expected a list"),
    "too many words": ("svd.per_token.1.triplets.0.left", ["x"] * 5000, "left: expected a list of at most 4096"),
    "norms of text": ("norms.positions.0.columns.0.norm", "x", "columns[0].norm: expected a number"),
    "a size of text": ("jacobian.positions.0.frobenius", "x", "positions[0].frobenius: expected a number"),
    "no prompts": ("ranks.prompts", [], "ranks.prompts: expected a list of 1 or more"),
    "a prompt of nothing": ("ranks.prompts.1.tokens", [], "ranks.prompts[1].tokens: expected a list of 1 or more"),
    "angles of text": ("compare.angles.left.0", "x", "compare.angles.left[0]: expected a number"),
    "one logit": ("compare.logit.b", ..., "compare.logit.b: is missing"),
    "no baseline": ("steering.baseline", ..., "steering.baseline: is missing"),
    "an infinite strength": ("steering.steered.0.strength", 1e200, "steered[0].strength: expected a number"),
    "texts as numbers": ("steering.controls.0.text", 7, "controls[0].text: expected text, found 7"),
    "a tensor without a name": ("parity.layers.0.name", ..., "parity.layers[0].name: is missing"),
    "a position of text": ("position", "last", "position: expected a whole number, found 'last'"),
}  # fmt: skip


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_other_forms_are_refused_by_name(case: str, alone: bool, tmp_path: Path) -> None:
    path, value, words = WRONG[case]
    source = report_run.write(tmp_path / "run", at(run_json(), path, value))
    if alone:
        source = (source / "run.json").rename(tmp_path / "result.json")
    before = sorted(os.listdir(tmp_path))
    result = invoke("report", source, code=1)
    assert words in result.stderr
    assert ("run the command again" if alone else "analyse the prompt again") in result.stderr
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 300 + len(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == before


# -- a file of JSON ----------------------------------------------------------------------------------------------------


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """Return a file with every part."""
    path = tmp_path / "some.result.json"
    path.write_text(json.dumps(run_json()), encoding="utf-8")
    return path


def test_the_page_is_beside_the_file(result: Path, tmp_path: Path) -> None:
    before = result.read_bytes()
    assert invoke("report", result).stdout == f"Saved {tmp_path}/some.result.html\n"
    assert invoke("report", result, "-o", tmp_path / "other.html").stdout == f"Saved {tmp_path}/other.html\n"
    made = (tmp_path / "some.result.html").read_text(encoding="utf-8")
    assert made == (tmp_path / "other.html").read_text(encoding="utf-8")
    assert "The numbers are in some.result.json." in Page(made).text
    assert result.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["other.html", "some.result.html", "some.result.json"]


def test_figures_are_beside_the_file(result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "FORMATS", ("svg",))
    content = {key: run_json()[key] for key in ("schema_version", "model", "tokens", "steering")}
    result.write_text(json.dumps(content))
    out = invoke("report", result, "--figures").stdout.splitlines()
    folder = tmp_path / "some.result-figures"
    assert out[1:] == [f"Saved {folder}/steering-{name}.svg" for name in ("kl", "mass", "hits")]
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="is a link"):
        write_figures(result)


def test_the_source_is_spared(result: Path, tmp_path: Path) -> None:
    before = result.read_bytes()
    (tmp_path / "link.html").symlink_to(result)
    for output in (result, tmp_path / "link.html"):
        assert "is the input of the report" in invoke("report", result, "-o", output, code=1).stderr
    page = result.rename(tmp_path / "result.html")
    assert "is the input of the report" in invoke("report", page, code=1).stderr
    assert page.read_bytes() == before


def test_a_link_beside_the_file_is_not_followed(result: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "some.result.html").symlink_to(tmp_path / "precious")
    assert "is a link" in invoke("report", result, code=1).stderr
    assert (tmp_path / "precious").read_text() == "mine"


NO_RESULT: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", "is not a result (JSONDecodeError)"),
    "nothing": (b"", "is not a result (JSONDecodeError)"),
    "no text": (b"\xff\xfe\x00", "is not a result (UnicodeDecodeError)"),
    "a list": (b"[]", "is not a result of schema version 1 or 2"),
    "a number": (b"7", "is not a result of schema version 1 or 2"),
    "another version": (b'{"schema_version": 3}', "is not a result of schema version 1 or 2"),
    "JSON lines": (b'{"a": 1}\n{"a": 2}\n', "such as lines of --each-line; a page shows one prompt"),
    "many prompts": (b'{"schema_version": 2, "model": {}, "prompts": []}', "holds the records of --each-line"),
    "nested": (b'{"a":' * 99999, "too deeply"),
    "a digit too many": (b'{"schema_version": ' + b"9" * 5000 + b"}", "is not a result"),
    "no model": (b'{"schema_version": 2, "tokens": 5}', "holds no result about a prompt"),
    "no tokens": (b'{"schema_version": 2, "model": {"path": "x"}}', "tokens: is missing; run the command again"),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_RESULT)
def test_what_is_no_result_is_refused(case: str, tmp_path: Path) -> None:
    data, words = NO_RESULT[case]
    (tmp_path / "x.json").write_bytes(data)
    err = invoke("report", tmp_path / "x.json", code=1).stderr
    assert words in err
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX's")
def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    assert "is not a regular file" in invoke("report", tmp_path / "pipe.json", code=1).stderr


def test_a_huge_file_is_refused(result: Path) -> None:
    os.truncate(result, 300 * 2**20)
    assert "is 300.0 MiB, larger than any result" in invoke("report", result, code=1).stderr


# -- every command -----------------------------------------------------------------------------------------------------

PROMPT = ["--tokens", "5,17,3,99,42", "-t", "1", "-q"]
FORMS = {room.__name__.rpartition(".")[2]: room.FORM for room in ROOMS}
ROOM_SECTIONS = {
    room.__name__.rpartition(".")[2]: {section.key for section in getattr(room, "SECTIONS", ())} for room in ROOMS
}


@pytest.mark.parametrize("name", PAGES)
def test_the_json_of_every_command_has_a_page(
    name: str, tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, expected = PAGES[name]
    printed = invoke_json(*of_page(name, tiny_file("gqa")))
    Path("it.json").write_text(json.dumps(printed), encoding="utf-8")
    content = {key: value for key, value in printed.items() if value is not None}
    for room, form in FORMS.items():
        own = {key: form[key](content[key], key) for key in form.keys() & content.keys()}
        assert own or not ROOM_SECTIONS[room] & expected.keys(), "a page has sections of rooms whose parts are printed"
    assert invoke("report", "it.json").stdout == "Saved it.html\n"
    html = Path("it.html").read_text(encoding="utf-8")
    sections = set(re.findall(r'<section id="([^"]+)"', html))
    assert sections - {"certificate", "tokens"} == expected.keys() - {"certificate"}
    for key, words in expected.items():
        assert words in section(html, key).text, key
    assert "None" not in Page(html).text
    assert "it.json" in Page(html).text


def test_many_prompts_on_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("The bridge\nThe opposite of hot is\n")
    printed = invoke("ranks", "-q", "-t", 1, "-f", "prompts.txt", "--format", "json")
    Path("ranks.json").write_text(printed.stdout, encoding="utf-8")
    invoke("report", "ranks.json")
    found = Page(Path("ranks.html").read_text(encoding="utf-8"))
    assert found.find("h1") == ["2 prompts"]
    assert "2 prompts, all converged." in found.text
    assert "␣opposite" in found.find("bdi")


def test_what_steer_saves_has_a_page(tiny_file: TinyFile, tmp_path: Path) -> None:
    saved = tmp_path / "steer.json"
    invoke("steer", "-m", tiny_file("gqa"), *PROMPT, "--max-tokens", 2, "-o", saved)
    invoke("report", saved)
    assert "Activation steering" in Page(saved.with_suffix(".html").read_text(encoding="utf-8")).find("h2")


@pytest.mark.parametrize("command", [["info"], ["plan", "--no-bench", "--tokens", "1,2"]])
def test_commands_without_a_prompt_have_no_page(command: list[str], tiny_file: TinyFile, tmp_path: Path) -> None:
    printed = invoke(*command, "-m", tiny_file("gqa"), "--format", "json")
    (tmp_path / "x.json").write_text(printed.stdout)
    assert "holds no result about a prompt" in invoke("report", tmp_path / "x.json", code=1).stderr


def test_analyze_has_what_the_commands_print(tiny_file: TinyFile, tmp_path: Path) -> None:
    given = ["-m", str(tiny_file("gqa")), *PROMPT]
    shown = invoke("analyze", *given, "-k", 2, "--per-token", "-o", tmp_path / "run")
    assert "Singular vectors of each position's own map" in shown.stdout

    def printed(*args: str) -> dict[str, Any]:
        return invoke_json(args[0], *given, *args[1:])

    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["branches"] == printed("attribute", "--by", "head")["attribution"]
    svd = printed("svd", "-k", "2", "--per-token")["svd"]
    assert content["svd"]["per_token"] == svd["per_token"]
    assert "branches" in content["seconds"]
    assert load(tmp_path / "run").content["svd"]["per_token"]
    invoke("analyze", *given, "-k", 2, "-o", tmp_path / "plain")
    assert "per_token" not in json.loads((tmp_path / "plain" / "run.json").read_text())["svd"]


def test_analyze_exits_with_3_where_a_position_has_not_converged(
    tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["analyze", "-m", str(tiny_file("gqa")), *PROMPT, "-k", "2", "--no-verify", "--per-token"]
    invoke(*given, "-o", tmp_path / "whole")
    data = TokenSpectrum.data

    def hasty(self: TokenSpectrum, *words: Any) -> dict[str, Any]:
        return data(self, *words) | ({"stopped_by": "sweeps", "converged": False} if self.position == 2 else {})

    monkeypatch.setattr(TokenSpectrum, "data", hasty)
    invoke(*given, "-o", tmp_path / "run", code=3)
    page = section((tmp_path / "run" / "report.html").read_text(encoding="utf-8"), "svd-per-token")
    assert ["not converged" in summary for summary in page.find("summary")] == [False, False, True, False, False]


def test_a_dry_run_takes_the_new_option(tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = invoke("analyze", "-m", tiny_file("gqa"), *PROMPT, "--per-token", "--dry-run", "--no-bench")
    assert "Fits." in out.stdout
    assert os.listdir(tmp_path) == []


def test_a_page_of_json_needs_neither_torch_nor_matplotlib(result: Path) -> None:
    code = f"""
import sys
from ggjac.report import write_report
write_report({str(result)!r})
print(*[name for name in ("torch", "matplotlib", "safetensors") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "\n"
