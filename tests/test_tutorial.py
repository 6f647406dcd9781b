"""The pages for users do what they say: every command and every line of Python on them is run here.

A console block shows a command and, mostly, its output. Those of the tutorial are all run, in the page's order, and
elsewhere those that show output, which must be the output of the command. So are all Python blocks, each with the text
block below it. A command that names a real model is run where that file is (real.py). One that needs another file which
is not here is parsed by its own parser, so that at least its options exist. A line `...` on a page stands for any
number of lines, `(...)` for any word; nothing else may differ but the last digits of a number.
tools/update_documents.py rewrites output that has changed.
"""

import io
import math
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

import click
import pytest
import real
from click.testing import CliRunner
from torch.distributed.run import get_args_parser

from ggjac.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / name
    for name in ("README.md", *(f"docs/{page}.md" for page in ("tutorial", "library", "faq", "reproduce", "scale")))
]
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
TIME = re.compile(r"\d{8}-\d{6}")  # in the name of a run folder
NUMBER = re.compile(r"([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?%?)")
PIP = ("pip install", "--extra-index-url")  # options of another program
WRITING = "--export-control-vector"  # an option whose file later commands read
MAKING = ["python", "tools/make_synthetic_gguf.py"]  # in the tutorial: of a file that later commands read
FILE_OPTIONS = ("-m", "--model", "--with", "-f", "--file")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return a page's fenced blocks in order: language and content."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def commands(console: str) -> list[tuple[list[str], list[str]]]:
    """Split a console block into its commands' words and the lines shown below each."""
    found: list[tuple[list[str], list[str]]] = []
    for line in console.splitlines():
        if line.startswith("$ "):
            found.append((shlex.split(line[2:]), []))
        else:
            found[-1][1].append(line)
    return found


# --- what counts as the same --------------------------------------------------------------------------------------


def same_number(shown: str, printed: str) -> bool:
    """Allow two units in the last digit shown, and what float32 on another processor may change.

    A number with a negative exponent is a residual or a rounding error here: its order of magnitude must be the same.
    """
    a, b = (float(text.rstrip("%")) for text in (shown, printed))
    if shown.endswith("%") != printed.endswith("%") or math.isnan(b):
        return False
    if "e-" in shown:
        return 0 < b < 1 and abs(math.log10(b / a)) < 1
    if not re.search(r"[.e%]", shown):  # a position, an id, a rank, a count
        return shown == printed
    mantissa, _, exponent = shown.rstrip("%").partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(a - b) <= max(2 * unit, 2e-3 * abs(a))


def same_line(shown: str, printed: str) -> bool:
    """Compare word by word; how far apart they stand, and the length of a rule, follow from the widest cell."""
    pages, prints = ([re.sub("─+", "─", word) for word in line.split()] for line in (shown, printed))
    return len(pages) == len(prints) and all(map(same_word, pages, prints))


def same_word(shown: str, printed: str) -> bool:
    if shown == "(...)" or shown == printed:
        return True
    pages, prints = (
        NUMBER.split(TIME.sub("", word)) for word in (shown, printed)
    )  # text at even places, numbers at odd ones
    return len(pages) == len(prints) and all(
        same_number(a, b) if i % 2 else a == b for i, (a, b) in enumerate(zip(pages, prints, strict=True))
    )


def difference(shown: list[str], printed: list[str]) -> str | None:
    """Tell where what was printed is not what the page shows; None if it is."""
    at, anywhere = 0, False
    for line in shown:
        if line == "...":
            anywhere = True
            continue
        ahead = printed[at:] if anywhere else printed[at : at + 1]
        step = next((i for i, other in enumerate(ahead) if same_line(line, other)), None)
        if step is None:
            return f"the page shows {line!r}; printed: {ahead[:1]!r}"
        at, anywhere = at + step + 1, False
    return f"the page leaves out {printed[at]!r}" if at < len(printed) and not anywhere else None


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("0   51.02   3e-04   ␣cold", "0 51.03 4e-04 ␣cold"),
        ("position  ─────", "position ───────"),
        ("5 tensors within 2.7e-07 (...)", "5 tensors within 1.1e-07 (ffn_out-3)"),
        ("94%  4 ␣hot:", "94%  4 ␣hot:"),
        ("[51.0242, 46.6093])", "[51.0243, 46.6090])"),
        ("std 1.10e+02", "std 1.10e+02"),
        ("demo-20260101-120000/report.html", "demo-20260102-000000/report.html"),
    ],
)
def test_what_may_differ_does(shown: str, printed: str) -> None:
    assert same_line(shown, printed)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("0 51.02 ␣cold", "0 51.02 ␣warm"),
        ("0 51.02 ␣cold", "1 51.02 ␣cold"),
        ("0 51.02 ␣cold", "0 52.02 ␣cold"),
        ("0 51.02 ␣cold", "0 51.02 ␣cold ␣snowy"),
        ("share +0.2911", "share -0.2911"),
        ("rank 126", "rank 127"),
        ("error 3.1e-07", "error 3.1e-04"),
        ("error 3.1e-07", "error nan"),
        ("94% 4", "94 4"),
        ("█▇▆", "█▆▆"),
        ("demo-20260101-120000", "demo"),
    ],
)
def test_what_may_not_differ_is_noticed(shown: str, printed: str) -> None:
    assert not same_line(shown, printed)


def test_dots_stand_for_lines_and_nothing_else_is_left_out() -> None:
    printed = ["a", "b 1", "c", "d"]
    for shown in (printed, ["...", "b 1", "...", "d"], ["a", "..."], ["...", "a", "b 1", "c", "d", "..."]):
        assert difference(shown, printed) is None
    for shown in (
        ["a"],
        [],
        ["...", "b 1"],
        ["a", "c", "d"],
        ["...", "c", "b 1", "..."],
        ["...", "b 1", "d"],
        ["b 1", "..."],
    ):
        assert difference(shown, printed) is not None


# --- the pages ----------------------------------------------------------------------------------------------------


def real_model(words: list[str]) -> str | None:
    """Return the name of the real model that a command runs on."""
    return next((name for name, file in real.FILES.items() if file in words), None)


def check_command(words: list[str], shown: list[str]) -> None:
    result = CliRunner().invoke(main, words[1:], prog_name="ggjac")
    assert result.exit_code == 0, result.output
    found = difference(shown, result.stdout.rstrip().splitlines())
    assert found is None, f"{shlex.join(words)}: {found}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_show_what_is_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a page from top to bottom, in a folder of its own: later commands use what earlier ones have written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    ran, printed, names = 0, None, {"__name__": "page"}
    for language, content in blocks(page):
        if language == "python":
            with redirect_stdout(io.StringIO()) as printed:
                exec(compile(content, page.name, "exec"), names)
        elif language == "text":
            assert printed is not None, f"{page.name}: a text block shows what the Python block before it prints"
            assert (found := difference(content.splitlines(), printed.getvalue().rstrip().splitlines())) is None, found
        else:
            assert language == "console"
            for words, shown in commands(content):
                if words[:2] == MAKING:
                    subprocess.run([sys.executable, ROOT / words[1], *words[2:]], check=True, capture_output=True)
                if words[0] != "ggjac" or real_model(words) or not (shown or page.stem == "tutorial"):
                    continue
                check_command(words, shown)
                ran += 1
    assert ran or page.stem in ("library", "reproduce", "scale")  # no commands; files that are not here; no output


def all_commands(page: Path) -> list[tuple[list[str], list[str]]]:
    return [command for language, text in blocks(page) if language == "console" for command in commands(text)]


ON_REAL_MODELS = [
    (page, number, name)
    for page in PAGES
    for number, (words, _) in enumerate(all_commands(page))
    if (name := real_model(words))
]


@pytest.mark.real
@pytest.mark.parametrize(("page", "number", "name"), ON_REAL_MODELS, ids=lambda part: getattr(part, "stem", str(part)))
def test_pages_show_what_is_printed_of_real_models(
    page: Path, number: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command by itself, with the file where the page has it, and those that earlier commands have written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / real.FILES[name]).symlink_to(real.find(name))
    *before, (words, shown) = all_commands(page)[: number + 1]
    for earlier, printed in before:
        if WRITING in earlier and earlier[earlier.index(WRITING) + 1] in words:
            check_command(earlier, printed)
    check_command(words, shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist_with_their_options(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse every command as the program does; the files it names are stood in for by empty ones."""
    monkeypatch.chdir(tmp_path)
    given = [words for language, content in blocks(page) if language == "console" for words, _ in commands(content)]
    indented = re.findall(r"^    (ggjac .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    for words in [*given, *map(shlex.split, indented)]:
        if words[:2] == ["pip", "install"]:  # what CI runs from a fresh environment, see test_docs.py
            readme = (ROOT / "README.md").read_text(encoding="utf-8")
            assert words in map(shlex.split, re.findall(r"^    (pip .*?)(?: &&.*)?$", readme, re.MULTILINE))
            continue
        if words[0] == "python":
            assert (ROOT / words[1]).is_file()
            continue
        if words[0] == "torchrun":
            launched = get_args_parser().parse_args(words[1:])
            assert launched.module
            words = [launched.training_script, *launched.training_script_args]
        assert words[0] == "ggjac"
        for option, value in pairwise(words):
            if option in FILE_OPTIONS:
                Path(value).touch()
        if words[1] == "merge":
            for name in words[2:]:
                Path(name).touch()
        if words[1] == "report":
            Path(words[2]).mkdir(exist_ok=True)
        assert words[1] in COMMANDS
        with click.Context(main) as ctx:
            command = main.get_command(ctx, words[1])
            assert command is not None
            command.make_context(words[1], words[2:])


def test_inline_options_exist() -> None:
    """An option named in running text is one of some command, or of `torchrun`; other programs' lines are indented."""
    with click.Context(main) as ctx:
        known = {
            option
            for name in COMMANDS
            for parameter in main.get_command(ctx, name).params  # type: ignore[union-attr]
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
    known |= {option for action in get_args_parser()._actions for option in action.option_strings}
    for page in PAGES:
        prose = re.sub(r"^    .*$", "", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
        codes = [code for code in re.findall(r"`([^`]+)`", prose) if not code.startswith(PIP)]
        named = {option for code in codes for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", code)}
        assert named - known - {"--help"} == set(), page.name
