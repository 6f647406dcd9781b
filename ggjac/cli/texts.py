"""Prompts as they come from files, pipes and shells."""

import os
import re
import select
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import click

STDIN = Path("-")
_BYTES = "ggjac.stdin"  # in click's context: what a pipe held
PATIENCE = 1.0  # seconds until a pipe that nobody asked for has begun

_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_MEANING = {"n": "\n", "r": "\r", "t": "\t", "'": "'", '"': '"', "\\": "\\"}


def unescaped(text: str) -> str:
    """Replace `\\n`, `\\t`, `\\x41` and the like, as llama.cpp's `-e` does; other backslashes stay.

    Bytes make up characters: `\\xe2\\x82\\xac` is one.
    """

    def meant(match: re.Match[str]) -> bytes:
        code, letter = match.groups()
        if code:
            return bytes([int(code, 16)])
        return _MEANING.get(letter, match[0]).encode("utf-8", "surrogateescape")

    parts, end = [], 0
    for match in _ESCAPE.finditer(text):
        parts += [text[end : match.start()].encode("utf-8", "surrogateescape"), meant(match)]
        end = match.end()
    return b"".join([*parts, text[end:].encode("utf-8", "surrogateescape")]).decode("utf-8", "surrogateescape")


def has_escapes(text: str) -> bool:
    """Return whether a text has what `unescaped` would read as a line break or a tab."""
    return any(match[2] in ("n", "r", "t") for match in _ESCAPE.finditer(text) if match[2])


def read(path: Path) -> str:
    """Return the text of a file, or of stdin for `-`, without the newline at its end and a byte order mark.

    Raises:
        click.UsageError: it is not text in UTF-8.
    """
    context = click.get_current_context().find_root()
    if path != STDIN:
        data = path.read_bytes()
    else:
        data = context.meta[_BYTES] if _BYTES in context.meta else sys.stdin.buffer.read()
        context.meta[_BYTES] = data  # for a second look: two files may be planned
    name = "stdin" if path == STDIN else str(path)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(data) > 1 and 2 * data.count(0) >= len(data) - 1):
        raise click.UsageError(f"--file {name} is text in UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"--file {name} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    # Editors end a file with a newline that is not part of the prompt: llama.cpp's -f drops it too.
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\r\n") else text.removesuffix("\n")


def prompts(text: str, path: Path, option: str = "--file") -> list[str]:
    """Return the lines of a file's text that are not empty, each once.

    Raises:
        click.UsageError: it has none.
    """
    lines = dict.fromkeys(line for line in _lines(text) if line.strip())
    if not lines:
        raise click.UsageError(f"{option} {path} has no prompt; write one on each line")
    return list(lines)


def number(text: str, prompt: str, meant: Callable[[str], str]) -> int:
    """Return the number, from 1, of the first line of a file's text that has a prompt; `meant` reads its escapes."""
    return next(i for i, line in enumerate(_lines(text), 1) if prompt in _lines(meant(line)))


def _lines(text: str) -> list[str]:
    return [part.removesuffix("\r") for part in text.split("\n")]


def piped() -> bool:
    """Return whether stdin holds a text that somebody passed, and keep it for `read`; a silent pipe holds none."""
    try:
        number = sys.stdin.fileno()
        mode = os.fstat(number).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or no file
        return False
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        if os.name == "nt" or not select.select([number], [], [], PATIENCE)[0]:
            return False
    elif not stat.S_ISREG(mode):
        return False
    data = sys.stdin.buffer.read()
    click.get_current_context().find_root().meta[_BYTES] = data
    return bool(data.strip())
