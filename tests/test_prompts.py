"""Prompts as people give them: from files and pipes, with what is invisible in them, and remarks on the result."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import torch
from helpers import invoke, invoke_json, reworded

from ggjac.cli import texts
from ggjac.config import ConfigError
from ggjac.gguf.hub import demo_path
from ggjac.model import PromptError, open_model
from ggjac.report.load import load
from ggjac.report.page import render as page

GGJAC = [sys.executable, "-m", "ggjac"]
DEFAULT = "The bridge out of Marin is the"


def ids(content: dict[str, Any]) -> list[int]:
    return [token["id"] for token in content["tokens"]]


# -- EOS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo, but its vocabulary ends every text."""
    return reworded(tmp_path_factory.mktemp("eos") / "eos.gguf", {"tokenizer.ggml.add_eos_token": True})


def test_a_prompt_is_not_ended(ends: Path) -> None:
    found = invoke_json("predict", "-m", ends, "-p", DEFAULT)
    assert ids(found) == open_model().tokenize(DEFAULT)
    (warning,) = found["warnings"]
    assert "EOS (<|end_of_text|>, id 1), which was left off" in warning
    assert invoke_json("verify", "-m", ends, "-p", DEFAULT)["parity"]["tokens_equal"]


def test_an_eos_that_was_written_is_analysed_and_named(ends: Path) -> None:
    for file in (ends, demo_path()):
        found = invoke_json("predict", "-m", file, "-p", "hot<|end_of_text|>")
        assert ids(found)[-1] == 1
        (warning,) = found["warnings"]
        last = len(ids(found)) - 1
        assert warning.startswith(f"position {last} is EOS (<|end_of_text|>)")
        assert "position -2 is the token before" in warning
        before = invoke_json("predict", "-m", file, "-p", "hot<|end_of_text|>", "--position", -2)
        assert not [text for text in before["warnings"] if text.startswith("position")]


# -- the vocabulary ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", [None, "default"])
def test_a_missing_pre_tokenizer_is_said_everywhere(pre: str | None, tmp_path: Path) -> None:
    file = reworded(tmp_path / "pre.gguf", {"tokenizer.ggml.pre": pre})
    out = tmp_path / "result.json"
    result = invoke("svd", "-k", 1, "-m", file, "-p", "It's 12345 o'clock", "--format", "json")
    out.write_text(result.stdout)
    (warning,) = json.loads(result.stdout)["warnings"]
    assert "tokenizer.ggml.pre" in warning
    assert f"Warning: {warning}" in invoke("predict", "-m", file, "-p", "x").stdout
    assert warning in page(load(out))
    assert invoke_json("predict", "-m", file, "--tokens", "0,465")["warnings"] == []
    assert invoke_json("predict", "-p", "x")["warnings"] == []


def test_repeated_tokens_are_named(tmp_path: Path) -> None:
    file = reworded(tmp_path / "twice.gguf", {}, {700: "foo", 701: "foo", 702: "bar", 711: "bar"})
    said = invoke("predict", "-m", file, "-p", "x", code=1).stderr
    assert "700 and 701 (foo), 702 and 711 (bar)" in said
    assert "--tokens 1,2,3" in said
    invoke("predict", "-m", file, "--tokens", "0,465")


def test_embeddings_without_tokens_are_what_llama_cpp_refuses(tmp_path: Path) -> None:
    fields = gguf.GGUFReader(demo_path()).fields
    names = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type")]
    file = reworded(tmp_path / "few.gguf", {name: fields[name].contents()[:2500] for name in names})
    said = invoke("verify", "-m", file, "-p", "The opposite of hot is", code=1).stderr
    assert "it has 2544 embeddings, for the 2500 tokens of its vocabulary; ggjac runs such a file" in said
    assert invoke_json("predict", "-m", file, "-p", "The opposite of hot is")["predictions"][0]["text"] == " cold"


def test_special_tokens_may_be_text() -> None:
    llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    oracle = llama.Llama(str(demo_path()), vocab_only=True, verbose=False)
    text = "The <|end_of_text|> tag"
    for special, options in ((True, []), (False, ["--no-parse-special"])):
        expected = oracle.tokenize(text.encode(), add_bos=True, special=special)
        assert ids(invoke_json("predict", "-p", text, *options)) == expected
    assert invoke_json("verify", "-p", text, "--no-parse-special")["parity"]["tokens_equal"]


def test_special_tokens_are_marked(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    for options, marked in (([], True), (["--no-parse-special"], False)):
        shown = invoke("predict", "-p", "hot <|end_of_text|> cold", *options).stdout
        assert bool(re.search(r"<\|end_of_text\|> +control\n", shown)) == marked
        assert shown.count("control") == 2 * marked  # BOS too, and alone it is expected
        out.write_text(invoke("predict", "-p", "hot <|end_of_text|>", *options, "--format", "json").stdout)
        assert page(load(out)).count("<small>control</small>") == marked


# -- context -----------------------------------------------------------------------------------------------------------


def test_a_longer_context_is_asked_for(tmp_path: Path) -> None:
    short = reworded(tmp_path / "short.gguf", {"llama.context_length": 6})
    assert (
        "context 6; shorten it, or give a larger context (--context N)"
        in invoke("predict", "-m", short, "-p", DEFAULT, code=2).stderr
    )
    found = invoke_json("predict", "-m", short, "-p", DEFAULT, "--context", 8)
    assert found["predictions"] == invoke_json("predict", "-p", DEFAULT)["predictions"]
    assert found["warnings"] == ["the prompt has 8 tokens; the model was trained on 6 at most"]
    invoke("predict", "-m", short, "-p", DEFAULT, "--context", 7, code=2)
    invoke("plan", "-m", short, "-p", DEFAULT, "--no-bench", "--context", 8)
    invoke("plan", "-m", short, "-p", DEFAULT, "--no-bench", code=2)
    assert invoke_json("verify", "--strict", "-m", short, "-p", DEFAULT, "--context", 8)["parity"]["verdict"]


def test_learned_positions_end(tiny_files: dict[str, Path]) -> None:
    case = next(case for case in tiny.CASES if open_model(tiny_files[case]).config.row.positions)
    known = open_model(tiny_files[case]).config.context_length
    with pytest.raises(ConfigError, match="learned positions"):
        open_model(tiny_files[case], context=known + 1)
    with pytest.raises(PromptError, match="context 3"):
        open_model(tiny_files[case], context=3).trace([1, 2, 3, 4])


def test_the_context_decides_between_rope_factors(tiny_files: dict[str, Path]) -> None:
    case = next(case for case in tiny.CASES if "rope_factors_long.weight" in open_model(tiny_files[case]).weights)
    model = open_model(tiny_files[case])
    original, prompt = model.config.original_context, [5, 17, 3]
    wide = open_model(tiny_files[case], context=original + 1).trace(prompt).logits
    assert torch.equal(wide, model.trace(prompt, n_ctx=original + 1).logits)
    assert not torch.equal(wide, model.trace(prompt).logits)


# -- texts as they are given -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xef\xbb\xbfThe opposite", "The opposite"),
        (b"The opposite\r\n", "The opposite"),
        (b"\xef\xbb\xbf\xef\xbb\xbfx\n\n", "\ufeffx\n"),
    ],
)
def test_marks_of_editors_are_no_text(data: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(data)
    assert invoke_json("predict", "-f", tmp_path / "p.txt")["prompt"] == text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("The opposite", encoding=encoding)
    assert "is text in UTF-16; save it as UTF-8" in invoke("predict", "-f", tmp_path / "p.txt", code=2).stderr


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"a\nb\tc\rd", "a\nb\tc\rd"),
        (r"\\n \' \" \q \x41\x4 \xe2\x82\xac", "\\n ' \" \\q A\\x4 €"),
        ("é\\", "é\\"),
        ("", ""),
    ],
)
def test_escapes(typed: str, meant: str) -> None:
    assert texts.unescaped(typed) == meant


def test_escapes_are_read_when_asked_for() -> None:
    plain, read = (invoke_json("predict", "-p", r"is\nthe", *options) for options in ([], ["-e"]))
    assert (plain["prompt"], read["prompt"]) == (r"is\nthe", "is\nthe")
    assert "-e reads" in plain["warnings"][0]
    assert read["warnings"] == []


def test_a_lone_space_at_the_end_is_noticed() -> None:
    assert "ends with a space" in invoke_json("predict", "-p", "The bridge ")["warnings"][0]
    for text in ("The bridge", " The bridge", " "):
        assert invoke_json("predict", "-p", text)["warnings"] == []


def test_the_default_prompt_of_a_model_is_said(tmp_path: Path) -> None:
    assert "no prompt was given" in invoke_json("predict", "-m", demo_path())["warnings"][0]
    assert invoke_json("predict")["warnings"] == []
    assert invoke_json("predict", "-m", demo_path(), "-p", "x")["warnings"] == []


# -- targets -----------------------------------------------------------------------------------------------------------


def test_a_digit_is_text() -> None:
    options = ["attribute", "-p", "2 + 3 ="]
    model = open_model()
    (five,) = model.tokenizer.encode("5", add_special=False)
    found = invoke_json(*options, "--target", "5", "--versus", "id:5")
    assert found["attribution"]["target"]["id"] == five != 5
    assert found["attribution"]["versus"]["id"] == 5
    assert f"--target 5 is the text 5 (id {five}); for token {model.word(5)} write id:5" in found["warnings"]
    assert "one token, or id:410" in invoke(*options, "--target", "410", code=2).stderr
    for wrong in ("id:999999", "id:" + "9" * 30, "", "id:", "9" * 30):
        invoke(*options, "--target", wrong, code=2)


def test_the_likelier_spelling_of_the_space_is_offered() -> None:
    model = open_model()
    spelled = {model.tokenizer.piece(id): id for id in range(model.config.vocabulary)}
    best = [model.tokenizer.piece(id) for id in model.trace("A bee").logits.topk(10).indices.tolist()]
    rank, word = next((i, word) for i, word in enumerate(best) if word[1:] in spelled and word[:1] == b" ")
    for command in (["attribute"], ["compare", "-k", 1, "--with", demo_path()]):
        found = invoke_json(*command, "-p", "A bee", "--target", word[1:].decode())
        assert f"number {rank + 1} of the likeliest tokens: did you mean {word.decode()!r}?" in found["warnings"][-1]
        assert invoke_json(*command, "-p", "A bee", "--target", word.decode())["warnings"] == []
    assert "give one token, or ' Golden', with a space" in invoke("attribute", "--target", "Golden", code=2).stderr


def test_a_target_is_written_as_it_is_shown() -> None:
    found = invoke_json("attribute", "-p", DEFAULT, "--target", r"\n")["attribution"]["target"]
    assert open_model().tokenizer.piece(found["id"]) == b"\n"


# -- characters --------------------------------------------------------------------------------------------------------


def test_a_character_of_several_tokens_is_one_row_with_the_sum_of_its_shares() -> None:
    options = ["-p", "日 is"]
    data = invoke_json("attribute", *options)["attribution"]["shares"]
    assert [row.get("bytes") for row in data[1:4]] == ["e6", "97", "a5"]
    assert re.search(r"\n +1-3 +\d+ \d+ \d+ +日\n +4 ", invoke("predict", *options).stdout)
    shown = invoke("attribute", *options).stdout
    sum_of_parts = sum(row["share"] for row in data[1:4])
    assert re.search(rf"\n +1-3 +日 +{re.escape(f'{sum_of_parts:+.4f}')}", shown)
    for row in data[1:4]:
        part = f"<0x{row['bytes'].upper()}>"
        assert re.search(rf"\n +{row['position']} +{part} +\({re.escape(format(row['share'], '+.4f'))}\)", shown)
    few = invoke("attribute", *options, "--count", 1).stdout
    assert "more: --all" in few


# -- pipes -------------------------------------------------------------------------------------------------------------


def prompt_of(*options: str, stdin: Any, data: bytes | None = None) -> str | None:
    """Return the prompt that a process of its own takes."""
    command = [*GGJAC, "predict", "-k", "1", "--format", "json", *options]
    with subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE) as process:
        out, _ = process.communicate(data, timeout=120)
    return json.loads(out)["prompt"]


def test_a_pipe_is_read_where_no_option_gives_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("The opposite of hot is\n")
    with open(tmp_path / "p.txt", "rb") as file:
        assert prompt_of(stdin=file) == "The opposite of hot is"
    assert prompt_of(stdin=subprocess.PIPE, data=b"The opposite\n") == "The opposite"
    assert prompt_of("-p", "hot", stdin=subprocess.PIPE, data=b"The opposite\n") == "hot"
    assert prompt_of("-f", "-", stdin=subprocess.PIPE, data=b"The opposite\n") == "The opposite"


def test_a_silent_stdin_gives_no_prompt() -> None:
    end, silent = os.pipe()
    try:
        assert prompt_of(stdin=end) == DEFAULT
    finally:
        os.close(silent)
        os.close(end)
    assert prompt_of(stdin=subprocess.DEVNULL) == DEFAULT
    assert prompt_of(stdin=subprocess.PIPE, data=b"") == DEFAULT
