"""Tokenizer against llama-cpp-python's own high-level class; the raw strings against llama.cpp's pieces."""

import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ggjac.tokenizer import (
    LlamaVocabulary,
    RawVocabulary,
    TokenizerError,
    bos_warning,
    captured_log,
    import_llama_cpp,
    open_tokenizer,
    quoted_log,
    visible,
)

SHARED = Path(__file__).parents[2] / "shared"
STORIES = SHARED / "models" / "stories260K-q4_0.gguf"
TEXTS = (
    "Once upon a time",
    "",
    " ",
    "  two  spaces ",
    "é ☃ 漢字 🧑‍🚀",
    "<s>bos in text</s>",
    "tab\tnew\nline\0nul",
    "a" * 3000,
)

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


def shared(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.name} is not there: no ../shared beside this checkout")
    return path


def write_vocabulary(path: Path, model: str, tokens: list[str], types: list[int], **more) -> Path:
    """Write a GGUF file that holds a vocabulary and the sizes llama.cpp asks for, but no tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in {
        "block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32, "head_count": 2,
        "layer_norm_rms_eps": 1e-5, "vocab_size": len(tokens), "tokenizer_model": model, "token_list": tokens,
        "token_types": types, **more,
    }.items():  # fmt: skip
        getattr(writer, f"add_{add}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gpt2_alphabet() -> list[str]:
    """Return GPT-2's 256 characters, byte by byte, as printed in its encoder.py."""
    bs = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    cs = bs[:]
    n = 0
    for b in range(256):
        if b not in bs:
            bs.append(b)
            cs.append(256 + n)
            n += 1
    return [chr(c) for _, c in sorted(zip(bs, cs, strict=True))]


def write_spm(path: Path, *, with_bytes: bool) -> tuple[Path, list[str], list[int]]:
    tokens = ["<unk>", "<s>", "</s>", *([f"<0x{b:02X}>" for b in range(256)] if with_bytes else [])]
    types = [2, 3, 3, *[6] * (len(tokens) - 3)]
    tokens += ["▁", "a", "b", "▁a", "ab", "<|user|>", "unused"]
    types += [1, 1, 1, 1, 1, 4, 5]
    scores = [0.0] * (len(tokens) - 4) + [-1.0, -2.0, 0.0, 0.0]
    return write_vocabulary(path, "llama", tokens, types, token_scores=scores), tokens, types


def write_bpe(path: Path, alphabet: list[str], **more) -> tuple[Path, list[str], list[int]]:
    tokens = [*alphabet, "he", "Ġhe", "<|end|>", "two words"]
    types = [1] * (len(alphabet) + 2) + [3, 4]
    end = len(alphabet) + 2
    write_vocabulary(
        path, "gpt2", tokens, types, token_merges=["h e", "Ġ he"], tokenizer_pre="gpt-2",
        bos_token_id=end, eos_token_id=end, **more,
    )  # fmt: skip
    return path, tokens, types


@pytest.fixture(scope="module", params=["spm", "bpe", "stories", "gemma3", "llama3"])
def vocabulary(request, tmp_path_factory):
    """Path, model, tokens and token types of one vocabulary of each kind."""
    path = tmp_path_factory.mktemp("vocabulary") / f"{request.param}.gguf"
    if request.param == "spm":
        return (*write_spm(path, with_bytes=True), "llama")
    if request.param == "bpe":
        return (*write_bpe(path, gpt2_alphabet()), "gpt2")
    path = shared(STORIES if request.param == "stories" else SHARED / "reference" / f"{request.param}-q4_k_m.gguf")
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    return path, tokens, fields["tokenizer.ggml.token_type"].contents(), "llama"


def opened(vocabulary):
    path, tokens, types, model = vocabulary
    return open_tokenizer(path, tokens=tokens, model=model, types=types)


def test_ids_are_those_of_the_high_level_class(vocabulary):
    oracle = llama_cpp.Llama(str(vocabulary[0]), vocab_only=True, verbose=False)
    tokenizer = opened(vocabulary)
    assert tokenizer.n_vocab == oracle.n_vocab() == len(vocabulary[1])
    assert tokenizer.bos_id == oracle.token_bos()
    for text in TEXTS:
        for special in (True, False):
            ids = tokenizer.encode(text, parse_special=special)
            assert ids == oracle.tokenize(text.encode(), add_bos=True, special=special)
            assert tokenizer.encode(text, add_special=False, parse_special=special) == ids[tokenizer.adds_bos :]


def test_decode_undoes_encode(vocabulary):
    tokenizer = opened(vocabulary)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text
    assert "bos in text" in tokenizer.decode(tokenizer.encode("<s>bos in text</s>"))


@given(text=st.text())
@example(text=" .")  # llama_detokenize drops this space
@settings(max_examples=100, deadline=None)
def test_any_text_survives(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    if not path.exists():
        write_bpe(path, gpt2_alphabet())
    tokenizer = open_tokenizer(path, tokens=gguf_tokens(path), model="gpt2")
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


def gguf_tokens(path: Path) -> list[str]:
    return gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()


def test_raw_pieces_equal_llama_cpp(vocabulary):
    _, tokens, types, model = vocabulary
    tokenizer = opened(vocabulary)
    assert isinstance(tokenizer, LlamaVocabulary)
    raw = RawVocabulary(tokens, model, types, reason="")
    guess = RawVocabulary(tokens, model, reason="")
    for id, kind in enumerate(types):
        assert raw.piece(id) == tokenizer.piece(id)
        if kind not in (4, 5):  # without the types, user-defined and unused tokens look like any other
            assert guess.piece(id) == tokenizer.piece(id)
    assert raw.piece(len(tokens)) == tokenizer.piece(len(tokens)) == b"[%d]" % len(tokens)
    assert raw.piece(-1) == tokenizer.piece(-1) == b"[-1]"


def test_pieces_known_by_hand(tmp_path):
    path, tokens, types = write_bpe(tmp_path / "v.gguf", gpt2_alphabet())
    tokenizer = open_tokenizer(path, tokens=tokens, model="gpt2", types=types)
    assert [tokenizer.piece(i) for i in (0, 32, 0x80, 255)] == [b"\0", b" ", b"\x80", b"\xff"]
    assert tokenizer.piece(tokens.index("Ġhe")) == b" he"
    assert tokenizer.piece(tokens.index("<|end|>")) == b"<|end|>"
    path, tokens, types = write_spm(tmp_path / "s.gguf", with_bytes=True)
    tokenizer = open_tokenizer(path, tokens=tokens, model="llama", types=types)
    assert [tokenizer.piece(i) for i in (0, 1, 3 + 0xE2)] == [b"<unk>", b"<s>", b"\xe2"]
    assert tokenizer.piece(tokens.index("▁a")) == b" a"
    assert tokenizer.encode("a") == [1, tokens.index("▁a")]


def test_ids_beyond_the_vocabulary_are_named(vocabulary):
    tokenizer = opened(vocabulary)
    assert tokenizer.decode([tokenizer.n_vocab, -7]) == f"[{tokenizer.n_vocab}][-7]"  # llama.cpp ends the process


def test_empty_text(tmp_path):
    path, tokens, types = write_spm(tmp_path / "s.gguf", with_bytes=True)
    tokenizer = open_tokenizer(path, tokens=tokens, model="llama", types=types)
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("", add_special=False) == []
    assert tokenizer.decode([]) == ""
    path, tokens, types = write_bpe(tmp_path / "b.gguf", gpt2_alphabet())
    assert open_tokenizer(path, tokens=tokens, model="gpt2").encode("") == []


def test_spm_without_bytes_refuses_what_would_end_the_process(tmp_path):
    path, tokens, types = write_spm(tmp_path / "s.gguf", with_bytes=False)
    tokenizer = open_tokenizer(path, tokens=tokens, model="llama", types=types)
    assert tokenizer.encode("ab a") == [1, *(tokens.index(t) for t in ("▁a", "b", "▁a"))]
    with pytest.raises(TokenizerError, match=r"no token for 'é' \(U\+00E9\).*--tokens"):
        tokenizer.encode("abé")
    with pytest.raises(TokenizerError, match=r"no token for '\\\\n'"):
        tokenizer.encode("a\nb")


def test_bpe_refuses_what_llama_cpp_drops(tmp_path):
    path, tokens, types = write_bpe(tmp_path / "b.gguf", [c for c in gpt2_alphabet() if c.isascii()])
    tokenizer = open_tokenizer(path, tokens=tokens, model="gpt2", types=types)
    assert tokenizer.encode("he") == [tokens.index("he")]
    with pytest.raises(TokenizerError, match=r"no token for the byte 0xA9 .*--tokens"):
        tokenizer.encode("hé")


def test_lone_surrogates_are_refused(vocabulary):
    with pytest.raises(TokenizerError, match="not valid Unicode at character 2"):
        opened(vocabulary).encode("ab\udce9")  # what Python makes of a Latin-1 argument on a UTF-8 system


def test_nothing_is_loaded_before_it_is_needed(tmp_path):
    tokenizer = open_tokenizer(tmp_path / "missing.gguf", tokens=["▁a", "b"], model="llama")
    assert tokenizer.n_vocab == 2
    for _ in range(2):
        with pytest.raises(TokenizerError, match=r"cannot read the vocabulary of .*missing\.gguf: .*--tokens"):
            tokenizer.encode("a")
    # What needs no algorithm still works.
    assert tokenizer.piece(0) == b" a"
    assert tokenizer.decode([0, 1]) == " ab"
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (None, False)


@pytest.mark.parametrize("model", [None, "none", "no_vocab"])
def test_no_tokenizer_in_the_file(model):
    tokenizer = open_tokenizer("x.gguf", tokens=None, model=model)
    assert (tokenizer.n_vocab, tokenizer.bos_id, tokenizer.adds_bos) == (0, None, False)
    assert tokenizer.piece(3) == b"[3]"
    assert tokenizer.decode([3, 4]) == "[3][4]"
    with pytest.raises(TokenizerError, match=r"x\.gguf holds no tokenizer .*--tokens 1,2,3"):
        tokenizer.encode("a")


def test_without_llama_cpp_the_strings_remain(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    tokenizer = open_tokenizer("x.gguf", tokens=["<s>", "<0xE2>", "▁a"], model="llama")
    assert [tokenizer.piece(i) for i in range(4)] == [b"<s>", b"\xe2", b" a", b"[3]"]
    with pytest.raises(TokenizerError, match=r"pip install llama-cpp-python, or give token ids, as in --tokens 1,2,3"):
        tokenizer.encode("a")


def test_a_broken_llama_cpp_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", None)
    monkeypatch.delattr(sys.modules["llama_cpp"], "llama_cpp")
    with pytest.raises(ImportError, match="llama-cpp-python") as error:
        import_llama_cpp()
    assert "\n" not in str(error.value)


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
    assert visible(piece) == shown


@given(st.binary(max_size=12))
def test_visible_is_always_harmless(piece):
    assert all(c.isprintable() or c == "\ufe0f" for c in visible(piece))


def test_bos_warning(tmp_path):
    path, tokens, types = write_spm(tmp_path / "s.gguf", with_bytes=True)
    spm = open_tokenizer(path, tokens=tokens, model="llama", types=types)
    assert bos_warning(spm, spm.encode("ab")) is None
    assert bos_warning(spm, []) is None
    assert "first id is 5" in (bos_warning(spm, [5, 1]) or "")
    assert "twice" in (bos_warning(spm, spm.encode("<s>ab")) or "")
    path, tokens, types = write_bpe(tmp_path / "b.gguf", gpt2_alphabet())
    assert bos_warning(open_tokenizer(path, tokens=tokens, model="gpt2"), [5, 6]) is None
    assert bos_warning(RawVocabulary(tokens, "gpt2", reason=""), [5]) is None
    path, tokens, types = write_bpe(tmp_path / "c.gguf", gpt2_alphabet(), add_bos_token=True)
    adds = open_tokenizer(path, tokens=tokens, model="gpt2")
    assert adds.encode("he") == [tokens.index("<|end|>"), tokens.index("he")]
    assert "<|end|>" in (bos_warning(adds, [5]) or "")


def test_llama_cpp_prints_nothing_and_keeps_its_log_callback(tmp_path, capfd):
    heard = []
    callback = llama_cpp.llama_log_callback(lambda level, text, _: heard.append(text))
    llama = import_llama_cpp()
    before, data = llama.llama_log_callback(), llama_cpp.llama_cpp.ctypes.c_void_p()
    llama.llama_log_get(llama_cpp.llama_cpp.ctypes.byref(before), llama_cpp.llama_cpp.ctypes.byref(data))
    llama.llama_log_set(callback, data)
    try:
        path, tokens, _ = write_spm(tmp_path / "s.gguf", with_bytes=True)
        tokenizer = open_tokenizer(path, tokens=tokens, model="llama")
        tokenizer.encode("<s>ab")
        del tokenizer
        with pytest.raises(TokenizerError):
            open_tokenizer(tmp_path, tokens=tokens, model="llama").encode("a")
        assert heard == []
        llama.llama_model_load_from_file(b"nowhere", llama.llama_model_default_params())
        assert heard != []  # the caller's own callback is back
    finally:
        llama.llama_log_set(before, data)
    assert capfd.readouterr() == ("", "")


def test_the_quoted_log_is_the_error_on_one_harmless_line():
    llama = import_llama_cpp()
    with captured_log(llama) as outer, captured_log(llama) as log:
        assert not llama.llama_model_load_from_file(b"/nowhere\x1b[2J/x.gguf", llama.llama_model_default_params())
    assert log == outer
    assert "failed to open GGUF file" in quoted_log(log)
    assert "\x1b" not in quoted_log(log)
    assert "\n" not in quoted_log(log)
    assert quoted_log([]) == "it gave no reason"
    assert quoted_log([(2, "last words\n"), (2, "...")]) == "last words"


def test_importing_the_module_is_cheap():
    code = (
        "import sys, ggjac.tokenizer; print([m for m in ('torch', 'numpy', 'gguf', 'llama_cpp') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
