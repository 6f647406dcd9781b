"""Put hostile text wherever a file or a user can put text, run every command, and look at all that comes out.

    python tools/reliability/hostile_text.py [--count 40] [--seed 0] [--keep FOLDER] [--no-browser]

Escape sequences, control and bidi characters, null bytes, halves of surrogate pairs, broken UTF-8, markup of HTML, of
rich and of templates, quotes, formulas of spreadsheets, marks that pile up, and very long words: as tokens of the
vocabulary (some of them control, unused or user-defined ones), as the model's name, in its chat template, in prompts,
and in the names of files. Each round makes a model of its own, and runs all commands that show a text of a file on it,
in every format that they have.

What must hold: a terminal gets printable characters and newlines; JSON parses back to the very bytes of the vocabulary;
CSV and LaTeX hold printable characters alone, no cell of CSV begins as a formula, and LaTeX has no command but those of
its tables; a page in a browser runs no script but its own, requests nothing, complains of nothing, and holds no element
that came from a text; figures are drawn without a warning, are valid, and hold no script, link or raw control
character; names in safetensors files can be printed.
Anything else is printed with its round, and exit code 1.
"""

import argparse
import csv
import io
import json
import re
import shutil
import sys
import tempfile
import warnings
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2] / "tests"), str(HERE.parent), str(HERE.parents[2])]

import mutations  # noqa: E402

TEXTS = [
    *(b"\x1b[31mred\x1b[0m", b"\x1b]0;title\x07", b"\x1b]8;;http://example.com\x1b\\x", b"\x9b31m", "\x9b2J".encode()),
    *(b"\r\x1b[2Kgone", b"\x08\x08\x08", b"\x7f", b"\0", b"a\0b", b"\x0b\x0c", b"\t", b"\n\n", "\u2028\u2029".encode()),
    *("\u202egnp.exe\u202c".encode(), "\u2066x\u2069".encode(), "\u200e\u200f\u061c".encode(), "\u200b".encode()),
    *("\u2060\ufeff".encode(), "\u00ad".encode(), "\U000e0041\U000e0042".encode(), "\u3164\u115f".encode()),
    *(b"\xed\xa0\x80", b"\xed\xb0\x80x", b"\xff\xfe", b"\xf0\x9f\x8c", b"\xc0\xaf", b"\x80", b"\xf8\x88\x80\x80\x80"),
    *(b"<script>window.hit=1</script>", b"</script><img src=x onerror=window.hit=1>", b'"><svg onload=window.hit=1>'),
    *(b"' autofocus onfocus=window.hit=1 '", b"</title></style><b>", b"-->", b"<!--", b"]]>", b"&lt;&amp;", b"&#0;"),
    *(b"<iframe src=//example.com>", b"<link rel=stylesheet href=//example.com>", b"javascript:window.hit=1"),
    *(b"{{ 7 * 7 }}{% raw %}", b"${7*7}", b"`id`", b"$(id)", b"%s%n", b"\\u003c", b"\\", b'"', b'\\"', b"'", b"''"),
    *(b"[red]x[/red]", b"[link=http://example.com]x[/link]", b"[/]", b"$x^2$", b"\\frac{1}", b"__proto__", b"../../x"),
    *(b"=cmd|' /C calc'!A0", b"+1", b"@SUM(1)", b";DROP", b",", b"a,b\nc", b"&", b"%", b"#", b"_", b"~", b"^"),
    *("\u0301".encode(), ("e" + "\u0301" * 60).encode(), "\u05b7".encode(), "\u05e9\u05dc\u05d5\u05dd".encode()),
    *("\U0001f469\u200d\U0001f469\u200d\U0001f467".encode(), "\u65e5\u672c\u8a9e".encode(), "\u2764\ufe0f".encode()),
    *(b"x" * 5000, ("\u202e" + "y" * 3000).encode(), b" " * 300, b"", b" ", "\u2423".encode(), "\ufffd".encode()),
]  # fmt: skip
FIRST, BYTES = 259, 3  # of a SentencePiece vocabulary: three special tokens, 256 bytes, then pieces
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5
ELEMENTS = {"img", "iframe", "object", "embed", "form", "video", "audio", "b64", "base", "frame"}  # none is ours


@dataclass
class Round:
    """A model and what is written about it."""

    seed: int
    folder: Path
    random: Random
    tokens: list[bytes] = field(default_factory=list)  # by id, as a reader must get them
    kinds: list[int] = field(default_factory=list)
    model: Path = Path()
    prompts: Path = Path()  # one on each line
    pages: list[Path] = field(default_factory=list)


class Report:
    """What was found, and how much was looked at."""

    def __init__(self) -> None:
        self.looked: Counter[str] = Counter()
        self.findings: list[str] = []

    def expect(self, held: object, where: str, what: str) -> None:
        """Count a thing that was looked at, and keep it where it does not hold."""
        if not held:
            self.findings.append(f"{where}: {what}")


def sample(random: Random, *, typed: bool = False) -> str:
    """Return hostile text of several pieces, as a user can type it or a file can state it."""
    text = b" ".join(random.choice(TEXTS)[:200] for _ in range(random.randint(1, 4))).decode("utf-8", "replace")
    return text.replace("\0", "") if typed else text


def write_model(at: Round) -> None:
    """Write a tiny model whose vocabulary, names and template are hostile."""
    import tiny

    base = at.folder / "base.gguf"
    tiny.write(base, **tiny.CASES["tokenizer"])
    parts = mutations.parse(base.read_bytes())
    base.unlink()
    given = {key.name: key for key in parts.keys}
    at.tokens = strings(given[b"tokenizer.ggml.tokens"].payload)
    at.kinds = [
        int.from_bytes(given[b"tokenizer.ggml.token_type"].payload[12 + 4 * i :][:4], "little")
        for i in range(len(at.tokens))
    ]
    # Each once: llama.cpp takes no vocabulary with a token twice.
    for i, text in enumerate(at.random.sample(sorted(set(TEXTS)), len(at.tokens) - FIRST), FIRST):
        at.tokens[i] = text
        at.kinds[i] = at.random.choice((NORMAL,) * 8 + (CONTROL, USER, UNUSED))
    name, template = (sample(at.random).encode("utf-8", "surrogatepass") for _ in range(2))
    if at.seed % 2:  # nearly all others are refused
        template = b"{{ messages[0]['content'] }}"
    new = {
        b"tokenizer.ggml.tokens": mutations.array(8, [mutations.text(token) for token in at.tokens]),
        b"tokenizer.ggml.token_type": mutations.array(5, [kind.to_bytes(4, "little") for kind in at.kinds]),
    }
    parts.keys = [
        mutations.Key(key.name, key.kind, new.get(key.name, key.payload))
        for key in parts.keys
        if key.name != b"general.name"
    ]
    parts.keys += [
        mutations.Key(b"general.name", 8, mutations.text(name)),
        mutations.Key(b"general.description", 8, mutations.text(template)),
        mutations.Key(b"tokenizer.chat_template", 8, mutations.text(template)),
    ]
    for i in range(BYTES, FIRST):  # a byte token is its byte
        at.tokens[i] = bytes([i - BYTES])
    at.model = at.folder / file_name(at.random, ".gguf")
    at.model.write_bytes(bytes(parts))
    at.prompts = at.folder / file_name(at.random, ".txt")
    at.prompts.write_text("\n".join(sample(at.random, typed=True)[:40] for _ in range(2)), encoding="utf-8")


def strings(payload: bytes) -> list[bytes]:
    """Return the elements of an array of strings."""
    found, at = [], 12
    while at < len(payload):
        size = int.from_bytes(payload[at : at + 8], "little")
        found.append(payload[at + 8 : at + 8 + size])
        at += 8 + size
    return found


def file_name(random: Random, suffix: str) -> str:
    """Return a hostile name of a file."""
    name = sample(random, typed=True).replace("/", "_").strip(". -")
    return name.encode("utf-8", "replace")[:80].decode("utf-8", "ignore") + "x" + suffix


def commands(at: Round) -> Iterator[list[str]]:
    """Return every command that prints something about a prompt or a file."""
    ids = [at.random.randrange(FIRST, len(at.tokens)) for _ in range(5)]
    prompt = ["--tokens", ",".join(map(str, ids))]
    typed = ["-p", sample(at.random, typed=True)[:60].lstrip("-") or "x"]
    few = ["-k", "2", "--max-sweeps", "4"]
    yield ["info"]
    yield ["info", "--tokenizer"]
    yield ["models"]
    yield ["predict", *typed]
    yield ["predict", *prompt]
    yield ["predict", "--chat", typed[1]]
    yield ["plan", "--no-bench", *prompt]
    yield ["ranks", "-f", str(at.prompts), *few[2:]]
    yield ["verify", *prompt]
    yield ["svd", "--per-token", *few, *prompt]
    yield ["svd", "--each-line", "-f", str(at.prompts), *few]
    yield ["layers", *few, *prompt]
    yield ["jacobian", *prompt]
    yield ["norms", *prompt]
    yield ["attribute", *typed]
    yield ["attribute", *prompt, "--target", f"id:{ids[0]}", "--versus", f"id:{ids[1]}"]
    yield ["attribute", "--position", "all", *prompt]
    yield ["attribute", "--by", "head", *prompt]
    yield ["attribute", "--mlp-path", "both", *prompt]
    yield ["attribute", "--by", "head", "--reads", "largest", *prompt]
    yield ["attribute", "--by", "edge", *prompt]
    yield ["attribute", "--ablate", "replace", *prompt]
    yield ["attribute", "--max-tokens", "2", *typed]
    yield ["attribute", "--answer", typed[1], *typed]
    yield ["attribute", "--direction", f"{at.model}:token_embd.weight[{ids[0]}]", "--layer", "1", *prompt]
    yield ["attend", *prompt]
    yield ["attend", "--by", "token", *prompt]
    yield ["reach", *prompt, "--swap", f"1=id:{ids[2]}", "--steps", "1", "-k", "1", *few[2:]]
    yield ["svd", *few, *prompt, "--calibrate", str(at.prompts)]
    yield ["contrast", *prompt]
    yield ["steer", *prompt, "--method", "add", "--direction", "left:1", "--max-tokens", "4", "--random", "2"]
    yield ["compare", "--with-tokens", ",".join(map(str, reversed(ids))), *prompt, *few]
    yield ["steer", *prompt, "--concept", sample(at.random, typed=True)[:40].lstrip("-") or "x", "--max-tokens", "4"]
    yield ["compare", "--with", str(at.model), *prompt, *few]


def run(report: Report, at: Round, words: list[str], where: str) -> str | None:
    """Run a command, check what a terminal gets, and return its stdout; None where it was refused."""
    from click.testing import CliRunner

    from ggjac.cli import main

    given = [words[0], *([] if words[0] in ("report", "models") else ["-m", str(at.model)]), *words[1:]]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = CliRunner().invoke(main, given, prog_name="ggjac", env={"LLAMA_CACHE": str(at.folder)})
    report.looked["commands"] += 1
    for warning in warned:
        if issubclass(warning.category, UserWarning) and "lyph" in str(warning.message):
            report.expect(False, where, f"{warning.message}")
    bad = sorted({c for c in result.stdout + result.stderr if not (c.isprintable() or c == "\n")})
    report.expect(not bad, where, f"a terminal gets {bad}")
    known = result.exception is None or isinstance(result.exception, SystemExit)
    report.expect(known and "bug" not in result.stderr, where, f"{result.exception!r} {result.stderr[:300]}")
    report.looked["refused"] += result.exit_code not in (0, 3)
    return result.stdout if result.exit_code in (0, 3) else None


def tokens_of(value: Any) -> Iterator[dict[str, Any]]:
    """Return every token of a result."""
    if isinstance(value, dict):
        if {"id", "text"} <= value.keys():
            yield value
        for inner in value.values():
            yield from tokens_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from tokens_of(inner)


def check_json(report: Report, at: Round, text: str, where: str) -> None:
    """Check that JSON holds the very bytes of the vocabulary."""
    try:
        content = json.loads(text)
    except ValueError as error:
        report.expect(False, where, f"no JSON: {error}")
        return
    report.looked["JSON"] += 1
    for token in tokens_of(content):
        report.looked["tokens"] += 1
        own = bytes.fromhex(token["bytes"]) if token.get("bytes") else token["text"].encode("utf-8", "surrogatepass")
        expected = at.tokens[token["id"]] if token["id"] >= BYTES else own
        named = at.kinds[token["id"]] in (CONTROL, UNUSED) or not expected
        report.expect(own == expected or (named and own), where, f"id {token['id']}: {own!r} for {expected!r}")


# What tables in LaTeX are made of; everything else that begins with a backslash would be a command of a text.
KNOWN = re.compile(
    r"\\(?:(?:text(?:backslash|ascii(?:tilde|circum|grave)|less|greater|bar|visiblespace))\{\}|[&%$#_{}]|\\"
    r"|(?:begin|end)\{tabular\}|(?:top|mid|bottom)rule|sigma(?=_))"
)


def check_csv(report: Report, text: str, where: str) -> None:
    """Check that CSV has cells in rows of one length, printable, and that none begins as a formula."""
    head, *rows = csv.reader(io.StringIO(text, newline=""))
    report.looked["tables as CSV"] += 1
    report.expect({len(row) for row in rows} <= {len(head)}, where, "CSV with rows of several lengths")
    for cell in (cell for row in rows for cell in row):
        report.expect(cell.isprintable(), where, f"a cell of CSV holds {cell[:60]!r}")
        number = re.fullmatch(r"[+-]?(\d+(\.\d*)?(e[+-]?\d+)?|inf|nan)", cell)
        report.expect(number or not cell.startswith(tuple("=+-@＝＋－＠")), where, f"a formula in CSV: {cell[:60]!r}")


def check_latex(report: Report, text: str, where: str) -> None:
    """Check that LaTeX has no command but those of its tables, balanced braces, and rows of one length."""
    body = "\n".join(line for line in text.split("\n") if not line.startswith("%"))
    report.looked["tables as LaTeX"] += body.count(r"\begin{tabular}")
    rest = KNOWN.sub("", body)
    report.expect("\\" not in rest, where, f"a command in LaTeX: {rest[max(0, rest.find(chr(92))) :][:40]!r}")
    report.expect(not set(rest) & set("%#~^<>|`"), where, f"LaTeX reads {set(rest) & set('%#~^<>|`')}")
    report.expect(rest.count("{") == rest.count("}"), where, "braces in LaTeX")
    for part in body.split(r"\begin{tabular}")[1:]:
        rows = [KNOWN.sub("", line).count("&") for line in part.split("\n") if line.endswith(r"\\")]
        report.expect(len(set(rows)) == 1, where, f"rows of LaTeX with {set(rows)} cells")


def formats_of(command: str) -> list[str]:
    """Return the formats of a command that are neither tables for a terminal nor JSON."""
    from importlib import import_module

    params = getattr(import_module(f"ggjac.cli.{command}"), command).params
    (found,) = [param.type.choices for param in params if param.name == "output_format"]
    return [name for name in found if name not in ("table", "json")]


def check_safetensors(report: Report, path: Path, where: str) -> None:
    """Check the names and the metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        names = [*file.keys(), *(file.metadata() or {})]
        report.expect(all(name.isascii() and name.isprintable() for name in names), where, f"names {names}")
        for value in (file.metadata() or {}).values():
            json.loads(value)
    report.looked["safetensors files"] += 1


def check_figures(report: Report, folder: Path, where: str) -> None:
    """Check that figures are whole, and that a vector file holds no script, link or raw control character.

    Of PDF all but the streams, which are compressed, and in which texts are numbers of glyphs, and the colours of
    images, which are strings of bytes.
    """
    from PIL import Image

    for path in sorted(folder.iterdir()):
        report.looked["figures"] += 1
        raw = path.read_bytes()
        if path.suffix == ".png":
            Image.open(io.BytesIO(raw)).verify()
        elif path.suffix == ".svg":
            tags = {element.tag.rpartition("}")[2] for element in ET.fromstring(raw).iter()}
            report.expect(not tags & {"script", "foreignObject", "a"}, where, f"{path.name}: {tags}")
            bad = {c for c in raw.decode("utf-8") if not (c.isprintable() or c in "\n\t")}
            report.expect(not bad, where, f"{path.name}: holds {bad}")
        else:
            report.expect(raw.startswith(b"%PDF") and raw.rstrip().endswith(b"%%EOF"), where, f"{path.name}: no PDF")
            outside = re.sub(rb"stream\r?\n.*?endstream", b"", raw, flags=re.DOTALL)
            outside = re.sub(rb"/Indexed\s*/DeviceRGB\s*\d+\s*\((?:\\.|[^\\)])*\)", b"", outside, flags=re.DOTALL)
            acts = re.findall(rb"/(?:JavaScript|JS|Launch|URI|OpenAction|EmbeddedFile)\b", outside)
            report.expect(not acts, where, f"{path.name}: {acts}")
            bad_bytes = set(outside) & {*range(32), 127} - set(b"\n\r\t")
            report.expect(not bad_bytes, where, f"{path.name}: holds {bad_bytes}")


LOOK = """(elements) => ({
  hit: window.hit ?? null,
  scripts: document.scripts.length,
  foreign: [...document.querySelectorAll('*')].map((e) => e.localName).filter((name) => elements.includes(name)),
  handlers: [...document.querySelectorAll('*')].flatMap((e) => e.getAttributeNames()).filter((a) => a.startsWith('on')),
  links: [...document.querySelectorAll('[href], [src]')].map((e) => e.getAttribute('href') || e.getAttribute('src')),
  text: document.body.textContent + document.title,
})"""


def check_page(report: Report, browser: Any, path: Path, where: str) -> None:
    """Open a page and look for anything that a text brought in."""
    complaints: list[str] = []
    requests: list[str] = []

    def closed(dialog: Any) -> None:
        complaints.append("dialog")
        dialog.dismiss()

    page = browser.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", closed)
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.evaluate("for (const b of [...document.querySelectorAll('button[value]')].slice(0, 20)) b.click()")
    found = page.evaluate(LOOK, sorted(ELEMENTS))
    page.close()
    report.looked["pages"] += 1
    report.expect(not complaints, where, f"the browser says {complaints[:3]}")
    asked = [url for url in requests if not url.startswith("data:")]
    report.expect(len(asked) == 1, where, f"requests {asked[1:4]}")
    report.expect(found["hit"] is None and found["scripts"] <= 2, where, "a script of a text ran, or is there")
    report.expect(not found["foreign"] and not found["handlers"], where, f"elements {found['foreign']}")
    strange = [link for link in found["links"] if not link.startswith(("#", "data:,"))]
    report.expect(not strange, where, f"links {strange[:3]}")
    bad = sorted({c for c in found["text"] if not (c.isprintable() or c in "\n\u200c\u200d\xa0")})
    report.expect(not bad, where, f"the page holds {bad}")


def a_round(report: Report, at: Round) -> None:
    """Make a model, run all commands on it, and check what they wrote; pages are kept for the browser."""
    write_model(at)
    for number, words in enumerate(commands(at)):
        where = f"round {at.seed}, {' '.join(words[:2])} ({number})"
        quiet = [] if words[0] in ("info", "models") else ["-q"]
        many = "--each-line" in words  # has JSON alone, and no page
        if not many:
            run(report, at, [*words, *quiet], where)
        printed = run(report, at, [*words, "--format", "json", *quiet], where)
        if printed is None:
            continue
        check_json(report, at, printed, where)
        for name in () if many else formats_of(words[0]):
            text = run(report, at, [*words, "--format", name, "-q"], where)
            if text is not None:
                (check_csv if name == "csv" else check_latex)(report, text, f"{where}, {name}")
        if words[0] not in ("info", "models", "plan") and not many:
            result = at.folder / f"{number}{file_name(at.random, '.json')}"
            result.write_text(printed, encoding="utf-8")
            if (
                run(report, at, ["report", str(result), *(["--figures"] if number % 4 == at.seed % 4 else [])], where)
                is not None
            ):
                at.pages.append(result.with_suffix(".html"))
            drawn = result.with_name(f"{result.stem}-figures")
            if drawn.is_dir():
                check_figures(report, drawn, where)
    folder = at.folder / file_name(at.random, "")
    prompt = ["--tokens", ",".join(str(at.random.randrange(FIRST, len(at.tokens))) for _ in range(5))]
    where = f"round {at.seed}, analyze"
    more = ["--layers", "all", "--per-token", "--contrast", "-k", "2", "--max-sweeps", "4", "-q", "-o", str(folder)]
    if run(report, at, ["analyze", *prompt, *more], where) is not None:
        check_json(report, at, (folder / "run.json").read_text(encoding="utf-8"), where)
        check_safetensors(report, folder / "tensors.safetensors", where)
        at.pages.append(folder / "report.html")


def look(report: Report, pages: list[tuple[Path, str]]) -> None:
    """Look at all pages in one browser."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=flags)
        for page, where in pages:
            check_page(report, browser, page, where)
        browser.close()


def campaign(count: int, seed: int, keep: Path, browser: bool = True) -> Report:
    """Run rounds and return what was found."""
    report, pages = Report(), list[tuple[Path, str]]()
    for number in range(seed, seed + count):
        folder = keep / str(number)
        folder.mkdir(parents=True)
        at = Round(number, folder, Random(number))
        a_round(report, at)
        report.looked["rounds"] += 1
        pages += [(page, f"round {number}, {page.name[:20]!r}") for page in at.pages]
    if browser:
        look(report, pages)
    return report


def main() -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="rounds")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--keep", type=Path, help="folder for all files; without it they are deleted")
    parser.add_argument("--no-browser", action="store_true", help="do not open the pages")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = campaign(given.count, given.seed, given.keep or Path(scratch), not given.no_browser)
    for what, number in sorted(report.looked.items()):
        print(f"{what:20} {number:>8}")
    print(f"{'findings':20} {len(report.findings):>8}")
    for finding in report.findings[:50]:
        print(ascii(finding)[1:-1])
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
