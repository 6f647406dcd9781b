"""Rewrite the output shown on the pages for users from real runs, where it has changed.

    python tools/update_documents.py                            # all pages, commands on the demo
    python tools/update_documents.py --models FOLDER            # those on real models, too: see fetch_real_models.py
    python tools/update_documents.py README.md docs/faq.md      # some pages

The commands and the Python code of a page run in order, in an empty folder. Output that the page's own test
(tests/test_tutorial.py) accepts is left as it is; other output is replaced. A line `...` still stands for what it left
out before: the lines shown next to it are found again by their text without numbers. Where they are gone, the command
is named, the page keeps its old output there, and the exit code is 1. Read the prose again afterwards.
"""

import argparse
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from contextlib import chdir, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
pages: Any = importlib.import_module("test_tutorial")  # how a page is read and what counts as the same


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, default=pages.PAGES, metavar="PAGE")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="where the real models are")
    options = parser.parse_args()
    lost = []
    for page in (path.resolve() for path in options.pages):
        text = page.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            for file in options.models.resolve().glob("*.gguf") if options.models else ():
                Path(file.name).symlink_to(file)
            new, faults = updated(text)
        if new != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page.name}: updated")
        lost += [f"{page.name}: {fault}" for fault in faults]
    print(*lost, sep="\n", end="\n" if lost else "", file=sys.stderr)
    return bool(lost)


def updated(text: str) -> tuple[str, list[str]]:
    """Return a page's text with today's output, and what could not be updated."""
    faults: list[str] = []
    names: dict[str, Any] = {"__name__": "page"}
    printed = io.StringIO()

    def replaced(block: re.Match[str]) -> str:
        nonlocal printed
        language, content = block[1], block[2]
        if language == "python":
            with redirect_stdout(io.StringIO()) as printed:
                exec(compile(content, "page", "exec"), names)
        elif language == "text":
            content = "\n".join(refreshed(content.splitlines(), printed.getvalue(), "Python code", faults)) + "\n"
        else:
            content = "".join(rerun(*command, faults) for command in with_lines(content))
        return f"```{language}\n{content}```"

    return pages.FENCE.sub(replaced, text), faults


def with_lines(console: str) -> list[tuple[str, list[str]]]:
    """Split a console block into command lines as they are, and the lines shown below each."""
    shown = [lines for _, lines in pages.commands(console)]
    return list(zip((line for line in console.splitlines() if line.startswith("$ ")), shown, strict=True))


def rerun(line: str, shown: list[str], faults: list[str]) -> str:
    """Run a command if it can be run here, and return its part of the block."""
    words = shlex.split(line[2:])
    name = pages.real_model(words)
    if words[:2] == pages.MAKING:
        subprocess.run([sys.executable, ROOT / words[1], *words[2:]], check=True, capture_output=True)
    if words[0] == "ggjac" and not (name and not Path(pages.real.FILES[name]).exists()) and runs_here(words):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "ggjac", *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            faults.append(f"{line[2:]} ended with code {done.returncode}: {done.stderr.strip()[-200:]}")
        elif shown:
            shown = refreshed(shown, done.stdout, line[2:], faults)
    return "\n".join([line, *shown]) + "\n"


def runs_here(words: list[str]) -> bool:
    """Whether the files that a command reads are here."""
    return all(Path(b).exists() for a, b in pairwise(words) if a in pages.FILE_OPTIONS)


def refreshed(shown: list[str], output: str, what: str, faults: list[str]) -> list[str]:
    """Return the lines to show of an output, with the same gaps as before."""
    printed = output.rstrip().splitlines()
    if pages.difference(shown, printed) is None:
        return shown
    found: list[str] = []
    at = 0
    for gap, part, more in parts(shown):
        start = find(part[0], printed, at) if gap else at
        end = len(printed) if not more else None if start is None else find(part[-1], printed, start)
        if start is None or end is None:
            faults.append(f"{what}: {part[0 if start is None else -1]!r} is not printed any more")
            return shown
        at = end if not more else end + 1
        found += ["..."] * gap + printed[start:at]
    return found + ["..."] * (shown[-1] == "...")


def parts(shown: list[str]) -> list[tuple[bool, list[str], bool]]:
    """Split shown lines at `...`: whether a gap comes before, the lines, and whether a gap follows."""
    found: list[tuple[bool, list[str], bool]] = []
    gap, part = False, list[str]()
    for line in [*shown, None]:
        if line is None or line == "...":
            if part:
                found.append((gap, part, line is not None))
            gap, part = line is not None, []
        else:
            part.append(line)
    return found


def find(line: str, printed: list[str], start: int) -> int | None:
    """Return where a line stands from `start` on: as it was if it is there, else with other numbers."""
    wanted = anchor(line)
    places = range(start, len(printed))
    alike = (i for i in places if anchor(printed[i]) == wanted)
    return next((i for i in places if pages.same_line(line, printed[i])), next(alike, None))


def anchor(line: str) -> list[str]:
    return re.sub("─+", "─", pages.NUMBER.sub("#", line)).split()


if __name__ == "__main__":
    sys.exit(main())
