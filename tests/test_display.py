"""Texts of strangers are shown on one line, and harmless; tokens of results likewise."""

from types import SimpleNamespace

import pytest
from helpers import invoke
from hypothesis import given
from hypothesis import strategies as st

from ggjac import display
from ggjac.display import visible
from ggjac.results import Words


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        (b"", ""),
        (b" Lily", "␣Lily"),
        (b"a b ", "a b␣"),
        (b"   ", "␣␣␣"),
        (b" \n", "␣\\n"),
        (b"\t\r\0", "\\t\\r\\x00"),
        (b"\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        (b"\xc2\x9b2J", "\\x9b2J"),  # the one-character form of ESC [
        (b"\xe2\x96", "<0xE2><0x96>"),
        (b"ok\xff", "ok<0xFF>"),
        (b"\xed\xa0\x80", "<0xED><0xA0><0x80>"),  # a surrogate is not UTF-8
        ("\u202egnp.exe".encode(), "\\u202egnp.exe"),
        ("a\u200bb\ufeff".encode(), "a\\u200bb\\ufeff"),
        ("\u2028\u00a0\u3000".encode(), "\\u2028\\xa0\\u3000"),
        ("\U000e0041\ufe00\u3164".encode(), "\\U000e0041\\ufe00\\u3164"),
        ("é漢字ไทยहिन्दी🙂❤\ufe0f".encode(), "é漢字ไทยहिन्दी🙂❤\ufe0f"),
        (b"\\n [x]", "\\n [x]"),
    ],
)
def test_visible(piece, shown):
    assert visible(piece) == visible(piece.decode("utf-8", "surrogateescape")) == shown


def as_tokens(pieces: list[bytes]) -> list[dict]:
    return [{"position": i, "text": "", "bytes": piece.hex()} for i, piece in enumerate(pieces)]


@pytest.mark.parametrize(
    ("pieces", "groups"),
    [
        ([b"a", b" b"], ["a", "␣b"]),
        ([b"\xf0", b"\x9f\x99", b"\x82", b"!"], ["🙂", "!"]),
        ([b" \xe6\x97", b"\xa5\xe6", b"\x9c\xac", b"\xe8\xaa\x9e"], ["␣日本", "語"]),
        ([b"\xf0\x9f", b"x", b"y"], ["<0xF0><0x9F>", "x", "y"]),
        ([b"\x99", b"\xe6\x97"], ["<0x99>", "<0xE6><0x97>"]),
        ([b"\xe6", b"\xe6", b"\x97", b"\xa5"], ["<0xE6>", "<0xE6>", "<0x97>", "<0xA5>"]),
        ([], []),
    ],
)
def test_tokens_that_make_up_a_character_are_one_group(pieces, groups):
    assert [display.together(group) for group in display.characters(as_tokens(pieces))] == groups


@given(st.lists(st.binary(min_size=1, max_size=3), max_size=8))
def test_groups_have_every_token_in_order(pieces):
    tokens = as_tokens(pieces)
    groups = display.characters(tokens)
    assert [token for group in groups for token in group] == tokens
    for group in groups:
        whole = b"".join(bytes.fromhex(token["bytes"]) for token in group)
        assert len(group) == 1 or whole.decode()


@given(st.text(max_size=6), st.randoms())
def test_no_text_has_a_half_character(text, random):
    data = text.encode("utf-8", "replace")
    cuts = sorted(random.sample(range(len(data) + 1), min(3, len(data) + 1)))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if b > a]
    shown = "".join(display.together(group) for group in display.characters(as_tokens(pieces)))
    assert "<0x" not in shown or "<0x" in text


@given(st.binary(max_size=12))
def test_visible_is_always_harmless(piece):
    assert all(c.isprintable() or c == "\ufe0f" for c in visible(piece))


def words(*names: bytes) -> Words:
    """Return the words of a vocabulary with these names."""
    tokenizer = SimpleNamespace(name=lambda id: names[id], kind=lambda id: "normal")
    return Words(SimpleNamespace(ids=list(range(len(names))), model=SimpleNamespace(tokenizer=tokenizer)))


@given(st.lists(st.binary(min_size=1, max_size=6), min_size=1, max_size=4))
def test_a_token_in_json_keeps_every_byte(names):
    """The page and the terminal show the same of a result as of the vocabulary itself, and a program gets the text."""
    here = words(*names)
    found = [here.token(id) for id in range(len(names))]
    assert [display.token(data) for data in found] == [visible(name) for name in names]
    assert [data["text"] for data in found] == [name.decode("utf-8", "replace") for name in names]
    assert display.joined(found) == b"".join(names).decode("utf-8", "replace")
    for data, name in zip(found, names, strict=True):
        whole = name.decode("utf-8", "replace").encode() == name
        assert data.keys() == {"id", "text"} if whole else bytes.fromhex(data["bytes"]) == name


def test_a_token_in_json_is_not_escaped():
    found = words(b" of", "␣".encode(), b"\n", b"\xf0\x9f")
    assert found.here(0) == {"position": 0, "id": 0, "text": " of"}
    assert found.token(1, 0.5) == {"id": 1, "text": "␣", "score": 0.5}
    assert found.token(2) == {"id": 2, "text": "\n"}
    assert found.token(3) == {"id": 3, "text": "\ufffd", "bytes": "f09f"}


@pytest.mark.parametrize("env", [{"FORCE_COLOR": "1"}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_pipe_gets_no_escape_codes(env: dict[str, str]) -> None:
    out = invoke("predict", "-q", "-p", "\U0001f469\u200d\U0001f467 \u05e9\u05dc\u05d5\u05dd", env=env).stdout
    assert "Next token" in out
    assert "\x1b" not in out
