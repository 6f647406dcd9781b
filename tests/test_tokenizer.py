"""Tokenizer against llama-cpp-python's own high-level class; the raw strings against llama.cpp's pieces."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ggjac.display import visible
from ggjac.tokenizer import (
    LlamaVocabulary,
    RawVocabulary,
    TokenizerError,
    bos_warning,
    open_tokenizer,
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
    tokens += ["▁", "a", "b", "▁a", "ab", "<|user|>", "unused", ""]
    types += [1, 1, 1, 1, 1, 4, 5, 1]
    scores = [0.0] * (len(tokens) - 5) + [-1.0, -2.0, 0.0, 0.0, 0.0]
    return write_vocabulary(path, "llama", tokens, types, token_scores=scores), tokens, types


def write_bpe(path: Path, alphabet: list[str], **more) -> tuple[Path, list[str], list[int]]:
    tokens = [*alphabet, "he", "Ġhe", "<|end|>", "two words", "Ġunused", ""]
    types = [1] * (len(alphabet) + 2) + [3, 4, 5, 1]
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


def test_a_continuation_has_the_bytes_of_its_text_and_no_others(vocabulary):
    """Which SentencePiece alone would begin with a space; and what llama.cpp makes of it, where that is so."""
    oracle = llama_cpp.Llama(str(vocabulary[0]), vocab_only=True, verbose=False)
    tokenizer = opened(vocabulary)
    for text in (*TEXTS, "ab", " ab", "  ab", "a b", "\nab", "Paris is"):
        ids = tokenizer.continuation(text, parse_special=False)
        assert b"".join(map(tokenizer.piece, ids)) == text.encode()
        assert oracle.detokenize(ids).removeprefix(b" ") == text.encode().removeprefix(b" ")
        plain = oracle.tokenize(text.encode(), add_bos=False, special=False)
        if b"".join(map(tokenizer.piece, plain)) == text.encode():
            assert ids == plain
    named = tokenizer.continuation(tokenizer.piece(tokenizer.bos_id).decode())
    assert named == [tokenizer.bos_id]


def test_decode_undoes_encode(vocabulary):
    tokenizer = opened(vocabulary)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text
    assert "bos in text" in tokenizer.decode(tokenizer.encode("<s>bos in text</s>"))


@pytest.fixture(scope="module")
def any_tokenizer(tmp_path_factory):
    path, tokens, _ = write_bpe(tmp_path_factory.mktemp("any") / "any.gguf", gpt2_alphabet())
    return open_tokenizer(path, tokens=tokens, model="gpt2")


@given(text=st.text())
@example(text=" .")  # llama_detokenize drops this space
@settings(max_examples=100, deadline=None)
def test_any_text_survives(text, any_tokenizer):
    assert any_tokenizer.decode(any_tokenizer.encode(text, parse_special=False)) == text


def native_piece(oracle, id: int) -> bytes:
    buffer = ctypes.create_string_buffer(1024)
    count = llama_cpp.llama_token_to_piece(oracle._model.vocab, id, buffer, 1024, 0, True)
    return buffer.raw[:count]


def test_raw_pieces_equal_llama_cpp(vocabulary):
    path, tokens, types, model = vocabulary
    oracle = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    tokenizer = opened(vocabulary)
    assert isinstance(tokenizer, LlamaVocabulary)
    raw = RawVocabulary(tokens, model, types, reason="")
    guess = RawVocabulary(tokens, model, reason="")
    for id, kind in enumerate(types):
        piece = native_piece(oracle, id)
        assert raw.piece(id) == tokenizer.piece(id) == piece
        if kind not in (4, 5):  # without the types, user-defined and unused tokens look like any other
            assert guess.piece(id) == piece
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


def test_every_token_has_a_name(vocabulary):
    tokenizer, tokens = opened(vocabulary), vocabulary[1]
    for id, (text, kind) in enumerate(zip(tokens, vocabulary[2], strict=True)):
        assert tokenizer.name(id)
        assert visible(tokenizer.name(id))
        assert tokenizer.kind(id) == {1: "normal", 2: "unknown", 3: "control", 4: "user_defined", 5: "unused",
                                      6: "byte"}[kind]  # fmt: skip
        if kind == 5:
            assert tokenizer.piece(id) == b""
            assert tokenizer.name(id) == text.replace("Ġ", " ").encode()
        else:
            assert tokenizer.name(id) == tokenizer.piece(id)
    assert tokenizer.name(len(tokens)) == b"[%d]" % len(tokens)
    assert tokenizer.kind(len(tokens)) == "unused"


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
    with pytest.raises(TokenizerError, match=r"no token for 'é' \(U\+00E9\).*give token ids"):
        tokenizer.encode("abé")
    with pytest.raises(TokenizerError, match=r"no token for '\\\\n'"):
        tokenizer.encode("a\nb")


def test_bpe_refuses_what_llama_cpp_drops(tmp_path):
    path, tokens, types = write_bpe(tmp_path / "b.gguf", [c for c in gpt2_alphabet() if c.isascii()])
    tokenizer = open_tokenizer(path, tokens=tokens, model="gpt2", types=types)
    assert tokenizer.encode("he") == [tokens.index("he")]
    with pytest.raises(TokenizerError, match=r"no token for the byte 0xA9 .*give token ids"):
        tokenizer.encode("hé")


def test_lone_surrogates_are_refused(vocabulary):
    with pytest.raises(TokenizerError, match="not valid Unicode at character 2"):
        opened(vocabulary).encode("ab\udce9")  # what Python makes of a Latin-1 argument on a UTF-8 system


def test_nothing_is_loaded_before_it_is_needed(tmp_path):
    tokenizer = open_tokenizer(tmp_path / "missing.gguf", tokens=["▁a", "b"], model="llama")
    assert tokenizer.n_vocab == 2
    for _ in range(2):
        with pytest.raises(TokenizerError, match=r"cannot read the vocabulary of .*missing\.gguf: .*give token ids"):
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
    with pytest.raises(TokenizerError, match=r"x\.gguf contains no tokenizer .*give token ids"):
        tokenizer.encode("a")


def test_without_llama_cpp_the_strings_remain(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    tokenizer = open_tokenizer("x.gguf", tokens=["<s>", "<0xE2>", "▁a"], model="llama")
    assert [tokenizer.piece(i) for i in range(4)] == [b"<s>", b"\xe2", b" a", b"[3]"]
    with pytest.raises(TokenizerError, match=r"pip install llama-cpp-python, or give token ids"):
        tokenizer.encode("a")


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


# -- strangers' vocabularies -------------------------------------------------------------------------------------------

BYTES = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b"]
BYTE_TYPES = [2, 3, 3, *[6] * 256, 1, 1, 1]
SCORES = [0.0] * len(BYTES)

# What is stored -> words of the refusal, or None where it works.
ODD: dict[str, tuple[str, list[str], list[int], dict, str | None]] = {
    "repeated tokens": ("llama", [*BYTES, "a"], [*BYTE_TYPES, 1], {"token_scores": [*SCORES, 0.0]}, "260 and 262 (a)"),
    "equal up to NUL": ("llama", [*BYTES, "a\0b"], [*BYTE_TYPES, 1], {"token_scores": [*SCORES, 0.0]}, "260 and 262"),
    "a token with NUL": ("llama", [*BYTES, "c\0b"], [*BYTE_TYPES, 1], {"token_scores": [*SCORES, 0.0]}, None),
    "no scores": ("llama", BYTES, BYTE_TYPES, {}, None),
    "few scores": ("llama", BYTES, BYTE_TYPES, {"token_scores": [0.0]}, "bounds for scores"),
    "scores are integers": ("llama", BYTES, BYTE_TYPES, {"token_scores": [0] * len(BYTES)}, None),
    "BOS beyond": ("llama", BYTES, BYTE_TYPES, {"token_scores": SCORES, "bos_token_id": 10**9}, None),
    "few types": ("llama", BYTES, [3], {"token_scores": SCORES}, "bounds for toktypes"),
    "no bytes": ("llama", ["<unk>", "<s>", "a"], [2, 3, 1], {"token_scores": [0.0] * 3}, "no token for 'b'"),
    "one token": ("llama", ["a"], [1], {"token_scores": [0.0]}, "no token for 'b'"),
    "empty strings": ("llama", [""] * 9999, [1] * 9999, {"token_scores": [0.0] * 9999}, "no token for 'a'"),
    "merges are rubbish": ("gpt2", gpt2_alphabet(), [1] * 256, {"token_merges": ["", " ", "a", "a b c", "\0"]}, None),
    "no merges": ("gpt2", gpt2_alphabet(), [1] * 256, {}, "merges"),
    "unknown pre": ("gpt2", ["a"], [1], {"token_merges": ["a b"], "tokenizer_pre": "x\x1b[2J"}, r"\x1b[2J"),
    "half an alphabet": ("gpt2", ["a", "b"], [1, 1], {"token_merges": ["a b"], "tokenizer_pre": "gpt-2"}, "0x20"),
    "t5": ("t5", BYTES, BYTE_TYPES, {"token_scores": SCORES}, None),
    "t5 with a bad table": (
        "t5", BYTES, BYTE_TYPES, {"token_scores": SCORES, "precompiled_charsmap": b"\xff\xff\xff\x7fxx"}, "charsmap",
    ),
    "rwkv": ("rwkv", ["a", "\\x", "\\"], [1] * 3, {}, "id -1, beyond"),
    "bert": ("bert", BYTES, BYTE_TYPES, {}, "SIGABRT"),
    "unknown": ("wat", BYTES, BYTE_TYPES, {}, "unknown tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_vocabularies_are_refused_in_one_line_or_work(name, tmp_path):
    model, tokens, types, more, words = ODD[name]
    path = write_vocabulary(tmp_path / "v.gguf", model, tokens, types, **more)
    tokenizer = open_tokenizer(path, tokens=tokens, model=model, types=types)
    assert isinstance(tokenizer, LlamaVocabulary)
    if words is None:
        assert tokenizer.encode("ab")
    else:
        with pytest.raises(TokenizerError) as error:
            tokenizer.encode("ab c")
        assert words in str(error.value)
        assert "\n" not in str(error.value)
        assert "\x1b" not in str(error.value)
        assert "token ids" in str(error.value) or "beyond" in str(error.value)
    bos_warning(tokenizer, [0])
    assert isinstance(tokenizer.decode([0, 1]), str)


@pytest.mark.parametrize("tokens", [7, "ab", b"ab", True, [1, 2], [], [["a"]], [1.5]])
def test_tokens_that_are_no_strings_are_no_vocabulary(tokens):
    tokenizer = open_tokenizer("x.gguf", tokens=tokens, model="llama", types=[1, 1])
    assert (tokenizer.n_vocab, tokenizer.piece(0)) == (0, b"[0]")
    with pytest.raises(TokenizerError, match=r"contains no tokenizer \(tokenizer.ggml.tokens is "):
        tokenizer.encode("a")


@pytest.mark.parametrize("types", [7, "ab", [True, True], [1.0, 1.0], ["1", "1"], [1], [[1], [1]]])
def test_types_that_are_no_integers_are_none(types):
    assert open_tokenizer("x.gguf", tokens=["▁a", "b"], model="llama", types=types).piece(0) == b" a"


@pytest.mark.parametrize("model", [7, ["llama"], 1.5])
def test_a_model_that_is_no_string(model):
    with pytest.raises(TokenizerError, match="contains no tokenizer"):
        open_tokenizer("x.gguf", tokens=["a"], model=model).encode("a")


def test_too_many_tokens():
    with pytest.raises(TokenizerError, match=r"4194305 entries, of 4194304 at most"):
        open_tokenizer("x.gguf", tokens=["a"] * (2**22 + 1), model="llama").encode("a")


# -- the process behind it ---------------------------------------------------------------------------------------------


def test_pieces_need_no_process(tmp_path):
    path, tokens, types = write_spm(tmp_path / "s.gguf", with_bytes=True)
    tokenizer = open_tokenizer(path, tokens=tokens, model="llama", types=types)
    assert [tokenizer.piece(i) for i in (1, 260)] == [b"<s>", b"a"]
    assert tokenizer._child is None


def test_a_process_that_died_is_started_again(tmp_path):
    path, tokens, types = write_spm(tmp_path / "s.gguf", with_bytes=True)
    tokenizer = open_tokenizer(path, tokens=tokens, model="llama", types=types)
    ids = tokenizer.encode("ab")
    process = tokenizer._child._process
    assert tokenizer.encode("ab") == ids
    assert tokenizer._child._process is process
    os.kill(process.pid, signal.SIGSEGV)
    with pytest.raises(TokenizerError, match=r"llama.cpp itself ended .SIGSEGV"):
        tokenizer.encode("ab")
    assert tokenizer.encode("ab") == ids
    process = tokenizer._child._process
    del tokenizer
    assert process.poll() is not None  # it does not outlive the object


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_asks_a_process_of_its_own(tmp_path):
    path, tokens, types = write_spm(tmp_path / "s.gguf", with_bytes=True)
    tokenizer = open_tokenizer(path, tokens=tokens, model="llama", types=types)
    ids, process = tokenizer.encode("ab"), tokenizer._child._process
    if not (pid := os.fork()):
        good = tokenizer.encode("ab") == ids and tokenizer._child._process.pid != process.pid
        tokenizer._child.close()
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert tokenizer.encode("ab") == ids
    assert tokenizer._child._process is process


def test_importing_the_module_is_cheap():
    code = (
        "import sys, ggjac.tokenizer; print([m for m in ('torch', 'numpy', 'gguf', 'llama_cpp') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
