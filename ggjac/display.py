"""Texts from strangers, one line each and safe to print; and tokens, as results have them, in that form."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def token(data: Mapping[str, Any]) -> str:
    """Return a token of a result, `{"id": 462, "text": " of"}`, as it is shown."""
    return visible(_spelled(data))


def joined(tokens: Iterable[Mapping[str, Any]]) -> str:
    """Return the text that tokens of a result make up; bytes that are not UTF-8 become U+FFFD."""
    return b"".join(map(_spelled, tokens)).decode("utf-8", errors="replace")


def together(tokens: Sequence[Mapping[str, Any]]) -> str:
    """Return the tokens of one group of `characters` as they are shown."""
    return visible(b"".join(map(_spelled, tokens)))


def span(tokens: Sequence[Mapping[str, Any]]) -> str:
    """Return the positions of one group of `characters`."""
    first, last = tokens[0]["position"], tokens[-1]["position"]
    return str(first) if first == last else f"{first}-{last}"


def characters(tokens: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return tokens of a text in groups: those that only together make up whole characters, and all others alone."""
    groups: list[list[Mapping[str, Any]]] = []
    decoder = codecs.getincrementaldecoder("utf-8")()
    open_ended = False
    for token in tokens:
        try:
            if open_ended:
                groups[-1].append(token)
            else:
                groups.append([token])
            decoder.decode(_spelled(token))
            open_ended = bool(decoder.getstate()[0])
        except UnicodeDecodeError:  # these are no characters
            groups[-1:] = [[part] for part in groups[-1]]
            decoder.reset()
            open_ended = False
    if open_ended:
        groups[-1:] = [[part] for part in groups[-1]]
    return groups


def _spelled(data: Mapping[str, Any]) -> bytes:
    """Return the bytes of a token: `bytes`, in hexadecimal, where its text cannot hold them."""
    return bytes.fromhex(data["bytes"]) if data.get("bytes") else data["text"].encode("utf-8", "surrogatepass")


def visible(piece: bytes | str) -> str:
    """Return a text, or a token's bytes, as one line that is safe to print: strangers must not manipulate a terminal.

    Spaces at either end become `␣`, newline and tab `\\n` and `\\t`, control, format (bidi, zero-width) and other
    invisible characters `\\x1b` or `\\u202e`, bytes that are not UTF-8 `<0xE2>`. Everything printable is unchanged.
    """
    piece = piece.encode("utf-8", errors="surrogateescape") if isinstance(piece, str) else piece
    text = piece.decode("utf-8", errors="surrogateescape")
    body = text.strip(" ")
    if not body:
        return "␣" * len(text)
    start = text.index(body)
    return "␣" * start + "".join(map(_shown, body)) + "␣" * (len(text) - start - len(body))


# Printable by category, yet drawn as nothing: Unicode's Default_Ignorable_Code_Point without FE0E/FE0F, which emoji
# need, and the blank Braille pattern.
_BLANK = frozenset(
    (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800, 0x3164, 0xFFA0)
) | frozenset((*range(0xFE00, 0xFE0E), *range(0xE0100, 0xE01F0)))


def _shown(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as surrogateescape decodes it
        return f"<0x{code - 0xDC00:02X}>"
    if character.isprintable() and code not in _BLANK:
        return character
    return character.encode("unicode_escape").decode("ascii")
