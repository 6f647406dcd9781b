"""Text to token ids and back, through llama.cpp's own vocabulary: equal to llama.cpp's by construction.

`open_tokenizer` loads nothing; the vocabulary is read (llama.cpp's `vocab_only`) when it is first asked something.
Where llama.cpp cannot help (llama-cpp-python is not installed, or `tokenizer.ggml.model` is `none`) a `RawVocabulary`
still tells the bytes of a token from the strings in the file, and refuses text with a message that says what to do.

llama.cpp ends the whole process on input it does not expect (an id beyond the vocabulary, a character a SentencePiece
vocabulary can spell neither as a token nor as bytes), so everything is checked here before it is passed on.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any

# tokenizer.ggml.model values that name no tokenizer (llama-vocab.cpp, llama_vocab::impl::load).
NO_TOKENIZER = (None, "", "none", "no_vocab")

# tokenizer.ggml.token_type (llama.h, enum llama_token_type).
_NORMAL, _UNUSED, _BYTE = 1, 5, 6


class TokenizerError(ValueError):
    """Text that cannot be turned into token ids, or a vocabulary that cannot be read."""


class Tokenizer(ABC):
    """What the rest of the package asks of a vocabulary."""

    @property
    @abstractmethod
    def n_vocab(self) -> int:
        """Return the number of tokens that have a string; the model may have more rows."""

    @property
    @abstractmethod
    def bos_id(self) -> int | None:
        """Return the id of the begin-of-sequence token; None when there is none, or none can be known."""

    @property
    @abstractmethod
    def adds_bos(self) -> bool:
        """Tell whether the vocabulary wants every prompt to begin with BOS."""

    @abstractmethod
    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Turn text into ids as llama.cpp does; empty text gives BOS alone, or nothing where no BOS is added.

        `add_special` adds BOS/EOS where the vocabulary says so; `parse_special` reads `<s>` and the like in the text
        as the tokens they name.

        Raises:
            TokenizerError: the vocabulary cannot be read, the text is not valid Unicode, or has characters for
                which the vocabulary has neither a token nor bytes.
        """

    @abstractmethod
    def piece(self, id: int) -> bytes:
        """Return the bytes a token stands for; special tokens give their name, ids without a string `[id]`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Turn a prompt's ids into text, invalid UTF-8 replaced; ids beyond the vocabulary give `[id]`."""
        return b"".join(map(self.piece, ids)).decode("utf-8", errors="replace")


def open_tokenizer(
    path: str | os.PathLike[str],
    *,
    tokens: Sequence[str] | None,
    model: str | None,
    types: Sequence[int] | None = None,
) -> Tokenizer:
    """Return the vocabulary of a GGUF file; it is loaded when first used.

    `path` is the file, or the first shard of a split one; `tokens`, `model` and `types` are its metadata
    `tokenizer.ggml.tokens`, `.model` and `.token_type` (the last only makes the strings of odd tokens exact
    where llama.cpp is missing).
    """
    if model in NO_TOKENIZER:
        reason = f"{_name(path)} holds no tokenizer (tokenizer.ggml.model is {model or 'absent'})"
        return RawVocabulary(tokens, model, types, reason=f"{reason}; give token ids instead, as in --tokens 1,2,3")
    try:
        llama = import_llama_cpp()
    except ImportError as error:
        return RawVocabulary(tokens, model, types, reason=f"{error}, or give token ids, as in --tokens 1,2,3")
    return LlamaVocabulary(llama, path, RawVocabulary(tokens, model, types, reason=""))


class RawVocabulary(Tokenizer):
    """The strings of a file without llama.cpp's algorithms: bytes of a token, but no ids for a text."""

    def __init__(
        self, tokens: Sequence[str] | None, model: str | None, types: Sequence[int] | None = None, *, reason: str
    ):
        self.tokens: Sequence[str] = () if tokens is None else tokens
        self.types = types if types is not None and len(types) == len(self.tokens) else None
        self.model = model
        self.reason = reason

    @property
    def n_vocab(self) -> int:
        """Return the number of strings in the file; 0 when it has none."""
        return len(self.tokens)

    @property
    def bos_id(self) -> int | None:
        """Return None: which token opens a prompt is llama.cpp's rule."""
        return None

    @property
    def adds_bos(self) -> bool:
        """Return False, for the same reason."""
        return False

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Refuse: without the vocabulary's algorithm no text has ids.

        Raises:
            TokenizerError: always; the message says what to do instead.
        """
        raise TokenizerError(f"text cannot be tokenized: {self.reason}")

    def piece(self, id: int) -> bytes:
        """Return a token's bytes as `llama_token_to_piece` would, from the stored string."""
        if not 0 <= id < len(self.tokens):
            return b"[%d]" % id
        text = self.tokens[id]
        kind = None if self.types is None else self.types[id]
        if kind == _UNUSED:
            return b""
        if kind not in (None, _NORMAL, _BYTE):  # special and user-defined tokens are stored as they read
            return text.encode("utf-8", errors="surrogateescape")
        if self.model == "gpt2":
            return _undo_gpt2(text)
        if kind != _NORMAL and (byte := _byte_token(text)) is not None:
            return bytes([byte])
        return text.replace("\u2581", " ").encode("utf-8", errors="surrogateescape")


class LlamaVocabulary(Tokenizer):
    """llama.cpp's own vocabulary of a file."""

    def __init__(self, llama: Any, path: str | os.PathLike[str], raw: RawVocabulary):
        self.path = os.fspath(path)
        self._llama = llama
        self._raw = raw
        self._pointer: Any = None
        self._failure: str | None = None
        self._lock = threading.Lock()

    @property
    def n_vocab(self) -> int:
        """Return the number of tokens that have a string."""
        return len(self._raw.tokens) or self._llama.llama_vocab_n_tokens(self._vocab())

    @property
    def bos_id(self) -> int | None:
        """Return the id of the begin-of-sequence token; None when there is none or the vocabulary cannot be read."""
        if not self._readable():
            return None
        id = int(self._llama.llama_vocab_bos(self._vocab()))
        return id if 0 <= id < self.n_vocab else None

    @property
    def adds_bos(self) -> bool:
        """Tell whether the vocabulary wants every prompt to begin with BOS."""
        return self._readable() and bool(self._llama.llama_vocab_get_add_bos(self._vocab()))

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Turn text into ids as llama.cpp does; see `Tokenizer.encode`."""
        vocab = self._vocab()
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text is not valid Unicode at character {error.start}; save it as UTF-8, or give token ids, "
                "as in --tokens 1,2,3"
            ) from None
        self._refuse_unspellable(vocab, text)
        ids = tokenize(self._llama, vocab, data, add_special=add_special, parse_special=parse_special)
        if bad := [id for id in ids if not 0 <= id < self.n_vocab]:
            raise TokenizerError(
                f"{_name(self.path)}: the vocabulary gives the text id {bad[0]}, beyond its {self.n_vocab}"
            )
        if self._missing_bytes and self._is_bpe(vocab):
            self._refuse_dropped(ids, data)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Turn a prompt's ids into text: an automatic BOS or EOS and the space before the text are dropped again.

        Other special tokens give their name, ids beyond the vocabulary `[id]`.
        """
        ids = list(ids)
        if not self._readable():
            return super().decode(ids)
        llama, vocab = self._llama, self._vocab()
        if self.adds_bos and ids[:1] == [self.bos_id]:
            del ids[0]
        if llama.llama_vocab_get_add_eos(vocab) and ids[-1:] == [llama.llama_vocab_eos(vocab)]:
            del ids[-1]
        pieces = [self.piece(id) for id in ids]
        # Whether a space was put first, only llama_detokenize knows; not used on the whole prompt, for it also
        # "cleans up" (" ." becomes "."), nor with its remove_special, for then it keeps that space.
        if ids and 0 <= ids[0] < self.n_vocab and llama.llama_vocab_type(vocab) == llama.LLAMA_VOCAB_TYPE_SPM:
            first = (ctypes.c_int32 * 1)(ids[0])
            pieces[0] = _filled(lambda buffer, size: llama.llama_detokenize(vocab, first, 1, buffer, size, False, True))
        return b"".join(pieces).decode("utf-8", errors="replace")

    def piece(self, id: int) -> bytes:
        """Return the bytes a token stands for; special tokens give their name, ids without a string `[id]`."""
        if not self._readable() or not 0 <= id < self.n_vocab:
            return self._raw.piece(id)
        vocab = self._vocab()
        return _filled(lambda buffer, size: self._llama.llama_token_to_piece(vocab, id, buffer, size, 0, True))

    def _readable(self) -> bool:
        try:
            self._vocab()
        except TokenizerError:
            return False
        return True

    def _vocab(self) -> Any:
        """Return llama.cpp's vocabulary, loading it the first time (0.5 s for 128 k tokens)."""
        with self._lock:
            if self._pointer is None and self._failure is None:
                try:
                    self._pointer = self._load()
                except TokenizerError as error:
                    self._failure = str(error)
        if self._failure is not None:
            raise TokenizerError(self._failure)
        return self._pointer

    def _load(self) -> Any:
        llama = self._llama
        with captured_log(llama) as log:
            llama.llama_backend_init()
            params = llama.llama_model_default_params()
            params.vocab_only = True
            params.n_gpu_layers = 0
            model = llama.llama_model_load_from_file(os.fsencode(self.path), params)
        if not model:
            raise TokenizerError(
                f"llama.cpp cannot read the vocabulary of {_name(self.path)}: {quoted_log(log)}; give token ids, "
                "as in --tokens 1,2,3"
            )
        weakref.finalize(self, _free_model, llama, model)
        vocab = llama.llama_model_get_vocab(model)
        if llama.llama_vocab_n_tokens(vocab) < len(self._raw.tokens):
            raise TokenizerError(f"llama.cpp reads fewer tokens from {_name(self.path)} than its metadata lists")
        return vocab

    @cached_property
    def _missing_bytes(self) -> frozenset[int]:
        return _missing_bytes(self._raw.tokens, self._raw.model)

    def _is_bpe(self, vocab: Any) -> bool:
        return self._llama.llama_vocab_type(vocab) == self._llama.LLAMA_VOCAB_TYPE_BPE

    def _refuse_unspellable(self, vocab: Any, text: str) -> None:
        """Refuse characters on which llama.cpp's SentencePiece tokenizer would end the process.

        It spells a character that is no token as `<0xNN>` tokens, and looks those up with `unordered_map::at`.
        """
        if self._llama.llama_vocab_type(vocab) != self._llama.LLAMA_VOCAB_TYPE_SPM or not self._missing_bytes:
            return
        known = frozenset(token for token in self._raw.tokens if len(token) == 1)
        # U+2581 stands for the space, and may be put before the text.
        characters = {"\u2581" if character == " " else character for character in f" {text}"}
        for character in sorted(characters - known):
            if not self._missing_bytes.isdisjoint(character.encode("utf-8")):
                raise TokenizerError(
                    f"{_name(self.path)}: the vocabulary has no token for {visible(character.encode())!r} "
                    f"(U+{ord(character):04X}) and cannot spell it in bytes; leave it out, or give token ids, "
                    "as in --tokens 1,2,3"
                )

    def _refuse_dropped(self, ids: list[int], data: bytes) -> None:
        """Refuse text of which llama.cpp's BPE silently dropped bytes that are in no token."""
        spelled = b"".join(map(self.piece, ids))
        if lost := sorted(set(data) - set(spelled)):
            raise TokenizerError(
                f"{_name(self.path)}: the vocabulary has no token for the byte 0x{lost[0]:02X} of the text; "
                "leave it out, or give token ids, as in --tokens 1,2,3"
            )


def bos_warning(tokenizer: Tokenizer, ids: Sequence[int]) -> str | None:
    """Return one line when BOS looks wrong in `ids`: expected and missing, or doubled; else None."""
    if not ids or not tokenizer.adds_bos or tokenizer.bos_id is None:
        return None
    bos = tokenizer.bos_id
    name = f"{visible(tokenizer.piece(bos))}, id {bos}"
    if ids[0] != bos:
        return f"this vocabulary begins every prompt with BOS ({name}), but the first id is {ids[0]}"
    if len(ids) > 1 and ids[1] == bos:
        return f"BOS ({name}) is there twice: the prompt brings one and the vocabulary adds one"
    return None


def visible(piece: bytes) -> str:
    """Show a token's bytes on one line, harmlessly: text from strangers must not steer a terminal.

    Spaces at either end become `␣`, newline and tab `\\n` and `\\t`, control, format (bidi, zero-width) and other
    invisible characters `\\x1b` or `\\u202e`, bytes that are not UTF-8 `<0xE2>`. Everything printable is unchanged.
    """
    text = piece.decode("utf-8", errors="surrogateescape")
    body = text.strip(" ")
    if not body:
        return "␣" * len(text)
    start = text.index(body)
    return "␣" * start + "".join(map(_shown, body)) + "␣" * (len(text) - start - len(body))


def _name(path: str | os.PathLike[str]) -> str:
    return visible(os.fsencode(path))


# Printable by category, yet drawn as nothing: Unicode's Default_Ignorable_Code_Point without FE0E/FE0F, which emoji
# need, and the blank Braille pattern.
_BLANK = frozenset(
    (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800, 0x3164, 0xFFA0)
) | frozenset((*range(0xFE00, 0xFE0E), *range(0xE0100, 0xE01F0)))


def _shown(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # what surrogateescape makes of a byte that is not UTF-8
        return f"<0x{code - 0xDC00:02X}>"
    if character.isprintable() and code not in _BLANK:
        return character
    return character.encode("unicode_escape").decode("ascii")


@cache
def _gpt2_bytes() -> dict[str, int]:
    """Return GPT-2's map from characters to bytes, inverted (openai/gpt-2 encoder.py, bytes_to_unicode).

    Printable Latin-1 stands for itself, the other 68 bytes, in order, for the characters from U+0100.
    """
    printable = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _undo_gpt2(text: str) -> bytes:
    # Characters outside the map (an added token's, say) are kept as they are, as a reader would expect.
    table = _gpt2_bytes()
    return b"".join(bytes([table[c]]) if c in table else c.encode("utf-8", errors="surrogateescape") for c in text)


def _byte_token(text: str) -> int | None:
    """Return NN of a SentencePiece byte token `<0xNN>`, else None."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return int(text[3:5], 16)
        except ValueError:
            return None
    return None


def _missing_bytes(tokens: Iterable[str], model: str | None) -> frozenset[int]:
    """Return the bytes that no single token spells; stops reading once all are found (early, in real vocabularies)."""
    missing = set(range(256))
    table = _gpt2_bytes() if model == "gpt2" else {chr(byte): byte for byte in range(128)}
    for token in tokens:
        byte = table.get(token) if len(token) == 1 else None if model == "gpt2" else _byte_token(token)
        if byte is not None:
            missing.discard(byte)
            if not missing:
                break
    return frozenset(missing)


# -- llama.cpp's C interface -------------------------------------------------------------------------------------------


def import_llama_cpp() -> Any:
    """Import llama.cpp's C interface.

    Raises:
        ImportError: it is missing or cannot be loaded; the message is one line and says what to install.
    """
    try:
        from llama_cpp import llama_cpp
    except ModuleNotFoundError:
        raise ImportError("llama-cpp-python is not installed: pip install llama-cpp-python") from None
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        detail = " ".join(str(error).split())
        raise ImportError(f"llama-cpp-python cannot be loaded ({detail}): reinstall llama-cpp-python") from None
    return llama_cpp


def tokenize(llama: Any, vocab: Any, data: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
    """Call `llama_tokenize` on UTF-8 bytes, with a buffer that is large enough."""
    size = len(data) + 8
    with captured_log(llama):  # it warns about a doubled BOS; so does `bos_warning`
        while True:
            buffer = (ctypes.c_int32 * size)()
            count = llama.llama_tokenize(vocab, data, len(data), buffer, size, add_special, parse_special)
            if count >= 0:
                return buffer[:count]
            if -count <= size:  # INT32_MIN: more tokens than an int32 counts
                raise TokenizerError(f"the text is too long to tokenize ({len(data)} bytes)")
            size = -count


def _filled(write: Callable[[Any, int], int]) -> bytes:
    """Call a llama.cpp function that fills a buffer, again with the size it asks for when the first is too small."""
    size = 64
    buffer = ctypes.create_string_buffer(size)
    count = write(buffer, size)
    if count < 0:
        size = -count
        buffer = ctypes.create_string_buffer(size)
        count = write(buffer, size)
    return buffer.raw[: max(count, 0)]


def _free_model(llama: Any, model: Any) -> None:
    with captured_log(llama):
        llama.llama_model_free(model)


# Log text of the running captures. llama.cpp has one log callback per process, so this is global too.
_CAPTURES: list[list[tuple[int, str]]] = []
_CAPTURES_LOCK = threading.RLock()
_CALLBACK: Any = None  # kept alive: llama.cpp stores only the pointer
_PREVIOUS: Any = None


@contextmanager
def captured_log(llama: Any) -> Iterator[list[tuple[int, str]]]:
    """Collect what llama.cpp logs, as (level, text), instead of letting it print; then put its log callback back."""
    global _CALLBACK, _PREVIOUS
    lines: list[tuple[int, str]] = []
    with _CAPTURES_LOCK:
        if not _CAPTURES:
            if _CALLBACK is None:
                _CALLBACK = llama.llama_log_callback(_collect)
            function, data = llama.llama_log_callback(), ctypes.c_void_p()
            llama.llama_log_get(ctypes.byref(function), ctypes.byref(data))
            _PREVIOUS = function, data
            llama.llama_log_set(_CALLBACK, ctypes.c_void_p())
        _CAPTURES.append(lines)
    try:
        yield lines
    finally:
        with _CAPTURES_LOCK:
            # By identity: two captures may hold equal text.
            _CAPTURES[:] = [capture for capture in _CAPTURES if capture is not lines]
            if not _CAPTURES:
                llama.llama_log_set(*_PREVIOUS)


def _collect(level: int, text: bytes | None, _: Any) -> None:
    line = (text or b"").decode("utf-8", errors="replace")
    for lines in _CAPTURES:
        lines.append((level, line))
        del lines[:-1000]  # a log has no bound


def quoted_log(log: Sequence[tuple[int, str]]) -> str:
    """Return llama.cpp's error lines as one harmless line; its last words when it reported no error."""
    lines = [line.strip() for level, line in log if level == _ERROR and line.strip()]
    lines = lines or [line.strip() for _, line in log if line.strip(" .\n")]
    quoted = visible("; ".join(dict.fromkeys(lines[-3:])).encode("utf-8", errors="replace"))
    return quoted[:400] or "it gave no reason"


_ERROR = 4  # ggml.h, enum ggml_log_level: GGML_LOG_LEVEL_ERROR
