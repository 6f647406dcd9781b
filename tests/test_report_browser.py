"""The report as a reader meets it: in Debian's chromium, driven by Playwright.

Skipped where either is absent: `apt-get install chromium`, `pip install playwright`. Nothing is downloaded, and no
browser of Playwright's own is used.
"""

import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import report_run
from commands import PAGES, of_page
from helpers import invoke_json
from PIL import Image
from report_run import HOSTILE, SCRIPTS, TOKENS, run_json

from ggjac import display
from ggjac.report import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
TinyFile = Callable[..., Path]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of the run with everything."""
    return write_report(report_run.write(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture(scope="module")
def playwright() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        yield playwright


def launched(playwright: Any, folder: Path, **options: Any) -> Any:
    """Return a browser with a new profile."""
    context = playwright.chromium.launch_persistent_context(
        folder / "profile", executable_path=CHROMIUM, headless=True, args=FLAGS, **options
    )
    context.set_default_timeout(10_000)
    return context


@pytest.fixture(scope="module")
def context(playwright: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    context = launched(playwright, tmp_path_factory.mktemp("browser"))
    yield context
    context.close()


class Reader:
    """A page, and what went wrong on it."""

    def __init__(self, page: Any, file: Path, **media: Any):
        self.page, self.complaints, self.requests = page, [], []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))
        page.emulate_media(**({"color_scheme": "light", "media": "screen"} | media))
        page.goto(file.as_uri())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.page, name)

    def check(self) -> None:
        """Hold the page to: no error, no request but its own, nothing run that a token brought."""
        assert self.complaints == []
        assert {url for url in self.requests if not url.startswith("data:")} == {self.page.url.partition("#")[0]}
        assert self.page.evaluate("window.hit") is None


@pytest.fixture
def reader(context: Any, report: Path) -> Iterator[Reader]:
    page = context.new_page()
    page.set_viewport_size({"width": 1280, "height": 900})
    reader = Reader(page, report)
    yield reader
    reader.check()
    page.close()


# -- looks -------------------------------------------------------------------------------------------------------------

LOOKS = {
    "light": (1280, {"color_scheme": "light"}),
    "dark": (1280, {"color_scheme": "dark"}),
    "tablet": (820, {"color_scheme": "light"}),
    "phone": (390, {"color_scheme": "light"}),
    "small": (320, {"color_scheme": "dark"}),
    "print": (680, {"media": "print"}),
}


# What sticks out of the page, unless it lies in a box that scrolls by itself. At the ends of the title's lines a space
# may hang; a word there would widen the document.
STICKING_OUT = """[...document.querySelectorAll('main *, header *')]
  .filter((e) => !e.closest('.scroll, .unseen, [hidden], .vectors thead, h1 *'))
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
  .map((e) => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("look", LOOKS)
def test_it_fits_every_width(look: str, context: Any, report: Path, tmp_path: Path) -> None:
    width, media = LOOKS[look]
    page = context.new_page()
    page.set_viewport_size({"width": width, "height": 844})
    reader = Reader(page, report, **media)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(STICKING_OUT) == []
    boxes = "[...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth)"
    assert all(page.evaluate(f"{boxes}.map((e) => getComputedStyle(e).overflowX === 'auto')")) or look == "print"
    assert page.evaluate(f"{boxes}.length") > 0 or width > 600
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(part) for part in ground.strip("rgb()").split(",")) / 3
    assert (light < 60) == (media.get("color_scheme") == "dark")
    page.screenshot(path=tmp_path / f"{look}.png", full_page=True)
    assert (tmp_path / f"{look}.png").stat().st_size > 50_000
    reader.check()
    page.close()


def with_texts(content: Any) -> Any:
    """Return a result whose tokens have texts: of many scripts, long, and hostile."""
    if isinstance(content, dict):
        named = report_run.token(content["id"] % len(TOKENS)) if isinstance(content.get("id"), int) else {}
        return {key: with_texts(value) for key, value in content.items()} | named
    return [with_texts(each) for each in content] if isinstance(content, list) else content


@pytest.mark.parametrize("name", PAGES)
def test_the_page_of_every_command_fits_every_width(
    name: str, context: Any, tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = with_texts(invoke_json(*of_page(name, tiny_file("gqa"))))
    (tmp_path / "it.json").write_text(json.dumps(content), encoding="utf-8")
    page = context.new_page()
    reader = Reader(page, write_report(tmp_path / "it.json"))
    for look in ("small", "tablet", "light", "print"):
        width, media = LOOKS[look]
        page.set_viewport_size({"width": width, "height": 844})
        page.emulate_media(**({"media": "screen"} | media))
        assert page.evaluate("document.documentElement.scrollWidth") <= width, look
        assert page.evaluate(STICKING_OUT) == [], look
    reader.check()
    page.close()


def test_it_prints(reader: Reader, tmp_path: Path) -> None:
    reader.emulate_media(media="print")
    for selector in ("nav", ".choice", ".choices", "summary"):
        assert not reader.locator(selector).first.is_visible()
    reader.evaluate(
        "for (const d of document.querySelectorAll('details')) d.open = false; dispatchEvent(new Event('beforeprint'))"
    )
    assert reader.evaluate("[...document.querySelectorAll('details')].every((d) => d.open)")
    reader.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_every_token_has_size_and_direction(reader: Reader) -> None:
    reader.evaluate("for (const panel of document.querySelectorAll('.panel')) panel.hidden = false")
    sizes = """[...document.querySelectorAll('bdi, .cells button')].filter((e) => e.checkVisibility())
      .map((e) => [e.firstChild.textContent, e.getBoundingClientRect().width])"""
    found = reader.evaluate(sizes)
    assert {text for text, _ in found} >= set(SCRIPTS)
    assert all(width > 3 for _, width in found)
    directions = """(text) => [...document.querySelectorAll('bdi, .cells button')].filter((e) => e.textContent === text)
      .map((e) => getComputedStyle(e).direction)"""
    for text, direction in (("جسر", "rtl"), ("גשר", "rtl"), ("桥", "ltr"), ("мост", "ltr")):
        assert set(reader.evaluate(directions, text)) == {direction}


# -- enemies -----------------------------------------------------------------------------------------------------------


def test_hostile_tokens_do_nothing(reader: Reader) -> None:
    assert reader.evaluate("[document.images.length, document.scripts.length, document.forms.length]") == [0, 2, 0]
    texts = reader.evaluate("[...document.querySelectorAll('bdi, .cells button')].map((e) => e.textContent)")
    assert set(HOSTILE) <= set(texts)
    # Pinned, they go through the script: into labels, a table and a live region.
    for id in range(TOKENS.index(HOSTILE[0]), len(TOKENS)):
        reader.evaluate("(id) => document.querySelector(`button[value='${id}']`).click()", str(id))
    pins = reader.locator(".pins bdi").all_text_contents()
    assert pins == [TOKENS[0], *HOSTILE]
    assert reader.locator("table.ranks thead bdi").all_text_contents() == pins
    assert reader.evaluate("[document.images.length, document.scripts.length]") == [0, 2]


def test_the_policy_stops_what_would_slip_in(reader: Reader) -> None:
    stopped = reader.evaluate(
        """async () => {
          const found = [];
          document.addEventListener('securitypolicyviolation', (event) => found.push(event.effectiveDirective));
          const script = document.createElement('script');
          script.textContent = 'window.hit = 1';
          document.body.append(script);
          const box = document.createElement('div');
          box.innerHTML = '<img src="https://example.com/x.png" onerror="window.hit = 1"><p style="color: red">';
          document.body.append(box);
          await fetch('https://example.com/').catch(() => 0);
          await new Promise((done) => setTimeout(done, 100));
          return found;
        }"""
    )
    assert set(stopped) == {"script-src-elem", "script-src-attr", "img-src", "style-src-attr", "connect-src"}
    assert reader.evaluate("window.hit") is None
    reader.complaints.clear()  # the browser's own report of these five
    reader.requests[:] = reader.requests[:1]


# -- clicks and keys ---------------------------------------------------------------------------------------------------


def ranks(id: int) -> list[int]:
    """Return a token's rank at each depth, from the run itself."""
    found = run_json()["layers"]["ranks"]
    column = [token["id"] for token in found["tokens"]].index(id)
    return [depth["ranks"][column] for depth in found["depths"]]


def column(reader: Reader, at: int) -> list[str]:
    """Return the name and the ranks of a pinned token, as its column of the table has them."""
    cells = "(all, at) => all.map((row) => row.cells[at + 1].textContent)"
    return reader.locator("table.ranks").first.locator("tr").evaluate_all(cells, at)


def test_the_predicted_token_is_pinned_at_first(reader: Reader) -> None:
    assert column(reader, 0) == [TOKENS[0], *map(str, ranks(0))]
    assert reader.locator(".pins li").count() == 1
    pressed = reader.locator("button[aria-pressed=true]")
    assert {int(value) for value in pressed.evaluate_all("(all) => all.map((e) => e.value)")} == {0}


def test_a_click_pins_a_token_and_shows_its_rank_by_depth(reader: Reader) -> None:
    button = reader.locator(".cells button:visible:not([aria-pressed=true])").first
    id = int(button.get_attribute("value"))
    button = reader.locator(f".cells button[value='{id}']:visible").first
    button.click()
    assert column(reader, 1) == [TOKENS[id], *map(str, ranks(id))]
    assert button.get_attribute("aria-pressed") == "true"
    said = reader.locator("#said").text_content()
    assert said.startswith(f"{TOKENS[id]} pinned: rank by depth {ranks(id)[0]} at 0, ")

    # The line drawn: depths from left to right, height the logarithm of the rank, better ranks higher.
    line = reader.locator(".chart.ranks .line.accent").get_attribute("d")
    points = [tuple(map(float, point.split())) for point in line[1:].split("L")]
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert len(points) == 7
    top, bottom = reader.evaluate("JSON.parse(document.getElementById('data').textContent).span")
    for (_, y), rank in zip(points, ranks(id), strict=True):
        assert y == pytest.approx(1000 * (math.log(rank) - top) / (bottom - top), abs=0.1)

    button.click()
    assert reader.locator("table.ranks thead bdi").all_text_contents() == [TOKENS[0]]
    assert button.get_attribute("aria-pressed") == "false"
    assert reader.locator("#said").text_content() == f"{TOKENS[id]} unpinned"


def test_the_last_pin_may_be_taken_off(reader: Reader) -> None:
    reader.locator(".pins button").first.click()
    assert not reader.locator("#pinned").is_visible()
    reader.locator(".cells button:visible").first.click()
    assert reader.locator("#pinned").is_visible()


def test_a_pin_in_hand_stands_out(reader: Reader) -> None:
    reader.locator(".cells button:visible:not([aria-pressed=true])").first.click()
    last = reader.locator(".chart.ranks .line.accent").get_attribute("d")
    reader.locator(".pins button").first.focus()
    assert reader.locator(".chart.ranks .line").count() == 2
    assert reader.locator(".chart.ranks .line.faint").get_attribute("d") == last


@pytest.fixture
def deep(context: Any, tmp_path: Path) -> Iterator[Reader]:
    """Return the page of a model of 80 blocks, with twelve tokens pinned."""
    content, vectors = report_run.full(blocks=80)
    page = context.new_page()
    page.set_viewport_size({"width": 1280, "height": 900})
    reader = Reader(page, write_report(report_run.write(tmp_path / "run", content, vectors)))
    for id in range(1, 12):
        reader.evaluate("(id) => document.querySelector(`.cells button[value='${id}']`).click()", str(id))
    yield reader
    reader.check()
    page.close()


def test_ranks_of_a_deep_model_are_all_there_on_screen_and_on_paper(deep: Reader) -> None:
    for media, width in (("screen", 1280), ("screen", 820), ("print", 680)):
        deep.emulate_media(media=media)
        deep.set_viewport_size({"width": width, "height": 900})
        tables = deep.locator("table.ranks")
        assert [table.locator("tbody tr").count() for table in tables.all()] == [81, 81]
        assert deep.locator("table.ranks thead bdi").all_text_contents() == TOKENS[:12]
        place = deep.locator("#pinned").bounding_box()
        boxes = [table.bounding_box() for table in tables.all()]
        assert all(box["x"] + box["width"] <= place["x"] + place["width"] + 1 for box in boxes), "cut at the right"
        # No name breaks inside itself.
        lines = "(all) => all.map((e) => e.getClientRects().length)"
        assert set(deep.locator("table.ranks thead bdi").evaluate_all(lines)) == {1}


def test_pinned_lines_differ_and_are_named(deep: Reader) -> None:
    lines = deep.locator(".chart.ranks .line")
    assert lines.count() == 12
    dashes = lines.evaluate_all("(all) => all.map((e) => getComputedStyle(e).strokeDasharray)")
    assert len(set(dashes)) == 6
    keys = deep.locator(".pins .line").evaluate_all("(all) => all.map((e) => e.getAttribute('stroke-dasharray'))")
    order = lines.evaluate_all("(all) => all.map((e) => e.getAttribute('stroke-dasharray'))")
    assert sorted(keys) == sorted(order)
    labels = deep.locator(".chart.ranks .end")
    assert set(labels.all_text_contents()) == set(TOKENS[:12])
    tops = sorted(box["y"] for box in (label.bounding_box() for label in labels.all()))
    assert all(b - a >= 12 for a, b in pairwise(tops)), "names lie on one another"
    chart = deep.locator(".chart.ranks").bounding_box()
    assert min(tops) >= chart["y"] - 12
    assert max(tops) <= chart["y"] + chart["height"]


def test_a_box_that_scrolls_shows_where(context: Any, report: Path, tmp_path: Path) -> None:
    page = context.new_page()
    page.set_viewport_size({"width": 390, "height": 844})
    reader = Reader(page, report)
    box = reader.locator("#layers .panel .scroll:visible").first
    box.scroll_into_view_if_needed()
    assert box.evaluate("(e) => e.scrollWidth > e.clientWidth")

    def edge() -> int:
        """Return how light the right edge of the box is, mostly."""
        image = Image.open(io.BytesIO(box.screenshot())).convert("L")
        column = [image.getpixel((image.width - 2, y)) for y in range(image.height)]
        return sorted(column)[len(column) // 2]

    shaded = edge()
    box.evaluate("(e) => { e.scrollLeft = e.scrollWidth; }")
    assert edge() > shaded + 20
    reader.check()
    page.close()


def test_a_cell_shows_all_its_tokens_when_asked_and_on_paper(reader: Reader) -> None:
    cell = reader.locator("#layers .panel:visible td").first
    tokens = [TOKENS[token["id"]] for token in run_json()["layers"]["taps"][0]["triplets"][0]["left"]]
    shown = "(e) => [...e.querySelectorAll('button, bdi')].filter((t) => t.checkVisibility()).map((t) => t.textContent)"
    assert cell.evaluate(shown) == tokens[:3]
    reader.locator("#layers .panel:visible .more input").check()
    assert cell.evaluate(shown) == tokens
    assert len(tokens) == 6
    reader.locator("#layers .panel:visible .more input").uncheck()
    reader.emulate_media(media="print")
    assert cell.evaluate(shown) == tokens


@pytest.mark.parametrize("section", ["svd", "layers-stable-rank"])
def test_the_scale_switch(section: str, reader: Reader) -> None:
    switch = reader.locator(f"#{section} .switched").first
    panels = switch.locator(".panel")
    assert [panels.nth(i).is_visible() for i in range(2)] == [True, False]
    switch.get_by_label("log", exact=True).check()
    assert [panels.nth(i).is_visible() for i in range(2)] == [False, True]
    switch.locator("input").nth(1).press("ArrowLeft")
    assert [panels.nth(i).is_visible() for i in range(2)] == [True, False]


def test_the_grids_are_chosen_one_at_a_time(reader: Reader) -> None:
    labels = reader.locator("#layers .choice label")
    assert labels.count() == 10
    for i in range(10):
        labels.nth(i).click()
        shown = [panel.is_visible() for panel in reader.locator("#layers .panel").all()]
        assert shown == [j == i for j in range(10)]


def test_values_show_on_hover_and_focus_and_stay_on_the_page(context: Any, report: Path) -> None:
    page = context.new_page()
    page.set_viewport_size({"width": 390, "height": 844})
    reader = Reader(page, report)
    shares = run_json()["attribution"]["shares"]
    tokens = page.locator("#attribute .share")
    for i, share in enumerate(shares):
        tip = tokens.nth(i).locator(".tip")
        assert not tip.is_visible()
        tokens.nth(i).hover()
        assert tip.is_visible()
        assert tip.text_content().startswith(f"{share['share']:+.4f}".replace("-", "−"))
        box = tip.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    page.mouse.move(0, 0)
    tokens.nth(3).focus()
    assert tokens.nth(3).locator(".tip").is_visible()
    reader.check()
    page.close()


def test_a_cell_says_its_value(reader: Reader) -> None:
    blocks = run_json()["branches"]["blocks"]
    grid = reader.locator("#attribute-branches .heat")
    grid.scroll_into_view_if_needed()
    box = grid.bounding_box()
    says = reader.locator("#attribute-branches output")
    # Two columns, a gap, four heads: the middle of L2H2.
    reader.mouse.move(box["x"] + box["width"] * 5.5 / 7, box["y"] + box["height"] * 2.5 / 6)
    expected = f"{blocks[2]['heads'][2]:+.4f}".replace("-", "−")
    assert says.text_content() == f"block L2, head 2: {expected}"
    reader.mouse.move(box["x"] + box["width"] * 2.5 / 7, box["y"] + box["height"] * 2.5 / 6)
    assert says.text_content() == f"block L2, head 2: {expected}", "the gap says nothing"

    reader.locator("#attribute-branches .map").press("ArrowLeft")
    reader.locator("#attribute-branches .map").press("ArrowUp")
    expected = f"{blocks[1]['heads'][1]:+.4f}".replace("-", "−")
    assert says.text_content() == f"block L1, head 1: {expected}"
    reader.keyboard.press("Home")
    expected = f"{blocks[1]['attn']:+.4f}".replace("-", "−")
    assert says.text_content() == f"block L1, attention: {expected}"
    cursor = reader.locator("#attribute-branches .cursor")
    assert [cursor.get_attribute(name) for name in ("x", "y", "width")] == ["0", "1", "1"]
    for _ in range(20):  # not beyond the edge
        reader.keyboard.press("ArrowDown")
    assert says.text_content().startswith("block L5, attention: ")


def test_a_cell_without_a_share_says_so(reader: Reader) -> None:
    reader.locator("#attribute-positions .map").focus()
    reader.keyboard.press("End")
    assert reader.locator("#attribute-positions output").text_content().endswith(": –")


def test_a_grid_of_many_heads_fits_a_phone(context: Any, tmp_path: Path) -> None:
    content, vectors = report_run.full()
    content["branches"] = report_run.branches(blocks=80, heads=64)
    file = write_report(report_run.write(tmp_path / "run", content, vectors))
    page = context.new_page()
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        reader = Reader(page, file)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator("#attribute-branches .map").scroll_into_view_if_needed()
        box = page.locator("#attribute-branches .heat").bounding_box()
        assert box["x"] + box["width"] <= width
        assert box["height"] >= 400
        # Labels above the grid do not lie on one another.
        boxes = page.evaluate(
            """[...document.querySelectorAll('#attribute-branches .heat text.tick')].filter((e) => e.checkVisibility())
              .map((e) => e.getBoundingClientRect()).map((box) => [box.left, box.right])"""
        )
        assert len(boxes) >= 8
        assert all(a[1] + 4 <= b[0] for a, b in pairwise(sorted(boxes)))
        page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2)
        assert page.locator("#attribute-branches output").text_content().startswith("block L79, head 63: ")
        reader.check()
    page.close()


def test_keys_reach_everything_in_few_steps(reader: Reader) -> None:
    seen: list[str] = []
    where = "(document.activeElement.closest('section') || {}).id || document.activeElement.tagName"
    while len(seen) < 90:
        reader.keyboard.press("Tab")
        seen.append(reader.evaluate(where))
        if seen[-1] == "BODY":  # past the end
            break
        ring = "(e) => getComputedStyle(e.matches('input') ? e.nextElementSibling : e).outlineStyle"
        assert reader.evaluate(f"({ring})(document.activeElement)") == "solid"
    assert seen[0] == "A"
    assert {
        "attribute",
        "attribute-branches",
        "attribute-positions",
        "svd",
        "layers",
        "layers-stable-rank",
        "tokens",
        "BODY",
    } <= set(seen)
    assert "contrast" not in seen, "its table fits: nothing to scroll"
    assert seen.count("attribute") == 2, "the row of tokens is one step, its table another"


def test_arrows_move_among_tokens(reader: Reader) -> None:
    focused = "document.activeElement.firstChild.textContent"
    tokens = [display.token(share) for share in run_json()["attribution"]["shares"]]
    reader.locator("#attribute .share").first.focus()
    reader.keyboard.press("ArrowRight")
    assert reader.evaluate(focused) == tokens[1]
    reader.keyboard.press("End")
    assert reader.evaluate(focused) == tokens[-1]
    reader.keyboard.press("ArrowLeft")
    assert reader.evaluate(focused) == tokens[-2]

    cells = run_json()["layers"]["taps"]
    reader.locator(".cells button").first.focus()
    for _ in range(3):  # three tokens in a cell, then the first of the cell below
        reader.keyboard.press("ArrowDown")
    assert reader.evaluate(focused) == display.token(cells[1]["triplets"][0]["left"][0])
    reader.keyboard.press("ArrowUp")
    assert reader.evaluate(focused) == display.token(cells[0]["triplets"][0]["left"][2])
    reader.keyboard.press("Enter")
    assert reader.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"


def test_links_lead_to_their_sections(reader: Reader) -> None:
    reader.emulate_media(reduced_motion="reduce")  # smooth scrolling takes its time
    for link in reader.locator("nav a").all():
        link.click()
        assert reader.evaluate("document.querySelector(':target h2').textContent") == link.text_content()


def test_reduced_motion(context: Any, report: Path) -> None:
    page = context.new_page()
    for wish, behaviour in (("reduce", "auto"), ("no-preference", "smooth")):
        reader = Reader(page, report, reduced_motion=wish)
        assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == behaviour
        reader.check()
    page.close()


def test_without_javascript_everything_is_there(playwright: Any, report: Path, tmp_path: Path) -> None:
    context = launched(playwright, tmp_path, java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert all(panel.is_visible() for panel in page.locator(".panel").all())
    assert not page.locator("fieldset").first.is_visible()
    assert page.locator("#attribute .share").count() == 8
    context.close()
