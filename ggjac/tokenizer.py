"""Text to token ids and back, by llama.cpp itself: equal to llama.cpp's by construction.

`open_tokenizer` loads nothing. The bytes of a token come from the strings in the file (`RawVocabulary`); everything
that needs the vocabulary's algorithm or rules, above all tokenizing, is done by llama.cpp (its `vocab_only`) in a child
process, which may crash, for example on repeated tokens, or on a character that a SentencePiece vocabulary can spell
neither as a token nor as bytes. Without llama.cpp (llama-cpp-python is not installed, or `tokenizer.ggml.model` is
`none`) text is refused with a message that says what to do.
"""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any

from ggjac import llamacpp
from ggjac.display import visible

# tokenizer.ggml.model values that name no tokenizer (llama-vocab.cpp, llama_vocab::impl::load).
NO_TOKENIZER = (None, "", "none", "no_vocab")

# Seconds for which llama.cpp may do nothing: it reads a vocabulary in less than one, and many commands go on without.
PATIENCE = 30.0

# More than any vocabulary has; llama.cpp uses some hundred bytes per token.
MAX_TOKENS = 1 << 22

# tokenizer.ggml.token_type (llama.h, enum llama_token_type).
_NORMAL, _UNUSED, _BYTE = 1, 5, 6
KINDS = {1: "normal", 2: "unknown", 3: "control", 4: "user_defined", 5: "unused", 6: "byte"}

# Token ids of the prompts that commands have by default, so that the demo runs where llama.cpp cannot tokenize.
DEMO_PROMPTS = {
    "The bridge out of Marin is the": (0, 465, 637, 719, 462, 1884, 458, 460),
    "The bridge out of Marin is the Golden": (0, 465, 637, 719, 462, 1884, 458, 460, 1206),
    "My favorite thing is the": (0, 603, 525, 416, 309, 458, 460),
    "She put the book on the table and then": (0, 52, 324, 1234, 460, 1417, 522, 460, 1351, 483, 416, 264),
}


class TokenizerError(ValueError):
    """Text that cannot be turned into token ids, or a vocabulary that cannot be read."""

    def __init__(self, message: str, *, will_not_fit: bool = False):
        super().__init__(message)
        self.will_not_fit = will_not_fit  # for lack of memory: the command line's exit code 4


class Tokenizer(ABC):
    """The interface of a vocabulary.

    Attributes:
        known: ids of texts that need no llama.cpp.
    """

    known: Mapping[str, Sequence[int]] = MappingProxyType({})

    @property
    @abstractmethod
    def n_vocab(self) -> int:
        """Return the number of tokens that have a string; the model may have more rows."""

    @property
    @abstractmethod
    def bos_id(self) -> int | None:
        """Return the id of the begin-of-sequence token; None if there is none or it cannot be determined."""

    @property
    @abstractmethod
    def adds_bos(self) -> bool:
        """Return whether every prompt begins with BOS by the vocabulary's rules."""

    @property
    @abstractmethod
    def eos_id(self) -> int | None:
        """Return the id of the end-of-sequence token; None if there is none or it cannot be determined."""

    @property
    @abstractmethod
    def adds_eos(self) -> bool:
        """Return whether every text ends with EOS by the vocabulary's rules."""

    @abstractmethod
    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of a text as llama.cpp does; of an empty one BOS alone, or nothing if no BOS is added.

        `add_special` adds BOS/EOS by the vocabulary's rules; `parse_special` reads `<s>` and the like in the text as
        the tokens they name.

        Raises:
            TokenizerError: the vocabulary cannot be read, the text is not valid Unicode, or has characters for
                which the vocabulary has neither a token nor bytes.
        """

    def prompt(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Return the ids of a text that a model is to continue: `encode` without the EOS that it appends; errors too.

        After EOS a model predicts how another text begins.
        """
        try:
            return self.unfinished(self.encode(text, parse_special=parse_special))
        except TokenizerError:
            if text in self.known:
                return list(self.known[text])
            raise

    def continuation(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Return the ids of a text that follows another one: nothing is added at its ends; errors as of `encode`.

        SentencePiece puts a space before every text. There the text is spelled after a line break, which is left out.
        """
        whole = self.encode(text, add_special=False, parse_special=parse_special)
        if self.spell(whole) != f" {text}".encode():
            return whole
        ids = self.encode(f"\n{text}", add_special=False, parse_special=parse_special)
        tails = (ids[i:] for i in (1, 2, 3))  # after the added space and the line break, a token each or both together
        return next((tail for tail in tails if self.spell(tail) == text.encode()), whole)

    def unfinished(self, ids: Sequence[int]) -> list[int]:
        """Return the ids of a text without the EOS that the vocabulary's rules appended, if they do."""
        return list(ids[:-1] if self.adds_eos and ids and ids[-1] == self.eos_id else ids)

    @abstractmethod
    def piece(self, id: int) -> bytes:
        """Return the bytes of a token as llama.cpp prints it: nothing for an unused one, `[id]` if it has no string."""

    @abstractmethod
    def name(self, id: int) -> bytes:
        """Return what a reader needs to recognise a token, never empty: its piece, or the string of an unused one."""

    @abstractmethod
    def kind(self, id: int) -> str:
        """Return what the vocabulary says of a token: one of `KINDS`. Ids without a string are unused."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a prompt's ids, invalid UTF-8 replaced; ids beyond the vocabulary give `[id]`."""
        return self.spell(ids).decode("utf-8", errors="replace")

    def spell(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of several tokens."""
        return b"".join(map(self.piece, ids))


def open_tokenizer(path: str | os.PathLike[str], *, tokens: Any, model: Any, types: Any = None) -> Tokenizer:
    """Return the vocabulary of a GGUF file; it is loaded on first use.

    `path` is the file, or the first shard of a split one; `tokens`, `model` and `types` are its metadata
    `tokenizer.ggml.tokens`, `.model` and `.token_type`, unchecked: they may be anything. The types make the bytes of
    special and unused tokens exact.
    """
    from ggjac.gguf.hub import demo_path  # numpy comes with it

    instead = "give token ids instead"
    flaw = None
    if model in NO_TOKENIZER or not isinstance(model, str):
        flaw = f"tokenizer.ggml.model is {model if isinstance(model, str) else _kind(model)}"
    elif not _is_array(tokens, str):
        flaw = f"tokenizer.ggml.tokens is {_kind(tokens)}"
    elif len(tokens) > MAX_TOKENS:
        flaw = f"tokenizer.ggml.tokens has {len(tokens)} entries, of {MAX_TOKENS} at most"
    tokens = tokens if _is_array(tokens, str) else ()
    types = types if _is_array(types, int) and len(types) == len(tokens) else None
    model = model if isinstance(model, str) else None
    if flaw is not None:
        return RawVocabulary(tokens, model, types, reason=f"{_name(path)} contains no tokenizer ({flaw}); {instead}")
    why = llamacpp.missing()
    raw = RawVocabulary(tokens, model, types, reason=f"{why}, or give token ids" if why else "")
    found = raw if why else LlamaVocabulary(path, raw)
    if os.fspath(path) == os.fspath(demo_path()):
        found.known = DEMO_PROMPTS
    return found


def _is_array(value: Any, kind: type) -> bool:
    """Return whether a metadata value is a non-empty array of strings (`str`) or integers (`int`)."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not len(value):
        return False
    return isinstance(value[0], kind) and not isinstance(value[0], bool)  # the arrays of a file have one type each


def _kind(value: Any) -> str:
    if value is None:
        return "absent"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return f"an array of {type(value[0]).__name__}" if len(value) else "empty"
    return f"of type {type(value).__name__}"


class RawVocabulary(Tokenizer):
    """The strings of a file without llama.cpp's algorithms: the bytes of tokens, but no ids for a text."""

    def __init__(
        self, tokens: Sequence[str] | None, model: str | None, types: Sequence[int] | None = None, *, reason: str
    ):
        self.tokens: Sequence[str] = () if tokens is None else tokens
        self.types = types if types is not None and len(types) == len(self.tokens) else None
        self.model = model
        self.reason = reason

    @property
    def n_vocab(self) -> int:
        """Return the number of strings in the file, which may be 0."""
        return len(self.tokens)

    @property
    def bos_id(self) -> int | None:
        """Return None: which token begins a prompt is decided by llama.cpp's rules."""
        return None

    @property
    def adds_bos(self) -> bool:
        """Return False, for the same reason."""
        return False

    @property
    def eos_id(self) -> int | None:
        """Return None, for the same reason."""
        return None

    @property
    def adds_eos(self) -> bool:
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
        return b"" if self.kind(id) == "unused" and 0 <= id < len(self.tokens) else self.name(id)

    def name(self, id: int) -> bytes:
        """Return a token's bytes, from the stored string; an empty string is `[EMPTY_id]`, as in llama.cpp."""
        if not 0 <= id < len(self.tokens):
            return b"[%d]" % id
        text = self.tokens[id] or f"[EMPTY_{id}]"
        kind = None if self.types is None else self.types[id]
        if kind not in (None, _NORMAL, _UNUSED, _BYTE):  # special and user-defined tokens are stored as they read
            return text.encode("utf-8", errors="surrogateescape")
        if self.model == "gpt2":
            return _undo_gpt2(text)
        if kind != _NORMAL and (byte := _byte_token(text)) is not None:
            return bytes([byte])
        return text.replace("\u2581", " ").encode("utf-8", errors="surrogateescape")

    def kind(self, id: int) -> str:
        """Return the stored type's name; without types, or without any strings, all tokens are normal."""
        if not 0 <= id < len(self.tokens):
            return "unused" if self.tokens else "normal"
        return "normal" if self.types is None else KINDS.get(self.types[id], "normal")


class LlamaVocabulary(Tokenizer):
    """llama.cpp's own vocabulary of a file, in a child process that starts on first use and ends with this object."""

    def __init__(self, path: str | os.PathLike[str], raw: RawVocabulary):
        self.path = os.fspath(path)
        self._raw = raw
        self._child: llamacpp.Child | None = None
        self._rules: dict[str, Any] = {}  # the vocabulary's properties, from the child
        self._failure: TokenizerError | None = None
        self._lock = threading.RLock()

    @property
    def n_vocab(self) -> int:
        """Return the number of tokens that have a string."""
        return self._raw.n_vocab

    @property
    def bos_id(self) -> int | None:
        """Return the id of the begin-of-sequence token; None if there is none or the vocabulary cannot be read."""
        return self._special("bos")

    @property
    def adds_bos(self) -> bool:
        """Return whether every prompt begins with BOS by the vocabulary's rules."""
        return self._readable() and self._rules["add_bos"]

    @property
    def eos_id(self) -> int | None:
        """Return the id of the end-of-sequence token; None if there is none or the vocabulary cannot be read."""
        return self._special("eos")

    @property
    def adds_eos(self) -> bool:
        """Return whether every text ends with EOS by the vocabulary's rules."""
        return self._readable() and self._rules["add_eos"]

    def _special(self, name: str) -> int | None:
        id = self._rules[name] if self._readable() else -1
        return id if 0 <= id < self.n_vocab else None

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Return the ids of a text as llama.cpp does; see `Tokenizer.encode`."""
        self._load()
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text is not valid Unicode at character {error.start}; save it as UTF-8, or give token ids"
            ) from None
        self._refuse_unspellable(text)
        ids = self._ask("tokenize", text=text, add_special=add_special, parse_special=parse_special)
        if bad := [id for id in ids if not 0 <= id < self.n_vocab]:
            raise TokenizerError(
                f"{_name(self.path)}: the text was given id {bad[0]}, beyond the vocabulary's {self.n_vocab} tokens"
            )
        if self._rules["type"] == "bpe" and self._missing_bytes:
            self._refuse_dropped(ids, data)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a prompt's ids, without an automatic BOS or EOS and the space added before the text.

        Other special tokens give their name, ids beyond the vocabulary `[id]`.
        """
        ids = list(ids)
        if not self._readable():
            return super().decode(ids)
        if self._rules["add_bos"] and ids[:1] == [self._rules["bos"]]:
            del ids[0]
        if self._rules["add_eos"] and ids[-1:] == [self._rules["eos"]]:
            del ids[-1]
        pieces = [self.piece(id) for id in ids]
        # Only llama_detokenize can remove a space that was added; not used on the whole prompt, because it also "cleans
        # up" (" ." becomes "."), nor with its remove_special, because it then keeps that space.
        if pieces and pieces[0].startswith(b" ") and self._rules["type"] == "spm":
            pieces[0] = bytes.fromhex(self._ask("first_piece", id=ids[0]))
        return b"".join(pieces).decode("utf-8", errors="replace")

    def piece(self, id: int) -> bytes:
        """Return the bytes of a token; see `Tokenizer.piece`."""
        return self._raw.piece(id)

    def name(self, id: int) -> bytes:
        """Return what a reader needs to recognise a token; see `Tokenizer.name`."""
        return self._raw.name(id)

    def kind(self, id: int) -> str:
        """Return what the vocabulary says of a token; see `Tokenizer.kind`."""
        return self._raw.kind(id)

    def _readable(self) -> bool:
        try:
            self._load()
        except TokenizerError:
            return False
        return True

    def _load(self) -> None:
        """Start llama.cpp and read the vocabulary, unless done (0.1 s, or 0.5 s for 128 k tokens)."""
        with self._lock:
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            if self._child is not None and self._child.pid == os.getpid() and not self._child.closed:
                return
            try:
                child = llamacpp.Child(PATIENCE)
                weakref.finalize(self, child.close)
                self._rules = child.ask("vocabulary", path=os.fsdecode(self.path))
            except llamacpp.LlamaCppError as error:
                message = self._repeated() or self._message("cannot read the vocabulary of", error)
                self._failure = TokenizerError(message, will_not_fit=error.will_not_fit)
                raise self._failure from None
            if self._rules["n_tokens"] < self.n_vocab:
                message = f"llama.cpp reads fewer tokens from {_name(self.path)} than its metadata lists"
                self._failure = TokenizerError(message)
                raise self._failure
            self._child = child

    def _ask(self, call: str, **arguments: Any) -> Any:
        """Call the child that has loaded the vocabulary; if it dies, the next call starts another."""
        with self._lock:
            self._load()
            assert self._child is not None
            try:
                return self._child.ask(call, **arguments)
            except llamacpp.LlamaCppError as error:
                message = self._message("cannot use the vocabulary of", error)
                raise TokenizerError(message, will_not_fit=error.will_not_fit) from None

    def _repeated(self) -> str | None:
        """Return which tokens have the same string: llama.cpp ends its process on such a vocabulary."""
        first: dict[str, int] = {}
        texts = [text.partition("\0")[0] for text in self._raw.tokens]  # as C reads them
        pairs = [(first[text], id) for id, text in enumerate(texts) if text and first.setdefault(text, id) != id]
        if not pairs:
            return None
        shown = ", ".join(f"{a} and {b} ({visible(self._raw.name(a))})" for a, b in pairs[:3])
        more = f" and {len(pairs) - 3} more" if len(pairs) > 3 else ""
        return (
            f"llama.cpp cannot read the vocabulary of {_name(self.path)}: tokens are in it twice: {shown}{more}; take "
            "another conversion of the model, or give token ids"
        )

    def _message(self, cannot: str, error: llamacpp.LlamaCppError) -> str:
        reason = visible(str(error))
        if isinstance(error, llamacpp.LlamaCppDied):
            reason = f"llama.cpp itself ended ({reason})" + (f", because {error.likely}" if error.likely else "")
        return f"llama.cpp {cannot} {_name(self.path)}: {reason}; give token ids"

    @cached_property
    def _missing_bytes(self) -> frozenset[int]:
        return _missing_bytes(self._raw.tokens, self._raw.model)

    def _refuse_unspellable(self, text: str) -> None:
        """Refuse characters on which llama.cpp's SentencePiece tokenizer would end its process.

        It spells a character that is not a token as `<0xNN>` tokens, and looks those up with `unordered_map::at`.
        """
        if self._rules["type"] != "spm" or not self._missing_bytes:
            return
        known = frozenset(token for token in self._raw.tokens if len(token) == 1)
        # U+2581 represents the space, and may be added before the text.
        characters = {"\u2581" if character == " " else character for character in f" {text}"}
        for character in sorted(characters - known):
            if not self._missing_bytes.isdisjoint(character.encode("utf-8")):
                raise TokenizerError(
                    f"{_name(self.path)}: the vocabulary has no token for {visible(character)!r} "
                    f"(U+{ord(character):04X}) and cannot spell it in bytes; leave it out, or give token ids"
                )

    def _refuse_dropped(self, ids: list[int], data: bytes) -> None:
        """Refuse text from which llama.cpp's BPE silently dropped bytes that no token has."""
        spelled = self.spell(ids)
        if lost := sorted(set(data) - set(spelled)):
            raise TokenizerError(
                f"{_name(self.path)}: the vocabulary has no token for the byte 0x{lost[0]:02X} of the text; "
                "leave it out, or give token ids"
            )


def bos_warning(tokenizer: Tokenizer, ids: Sequence[int]) -> str | None:
    """Return a warning of one line if BOS is missing in `ids` or doubled; else None."""
    if not ids or not tokenizer.adds_bos or tokenizer.bos_id is None:
        return None
    bos = tokenizer.bos_id
    name = f"{visible(tokenizer.piece(bos))}, id {bos}"
    if ids[0] != bos:
        return f"this vocabulary begins every prompt with BOS ({name}), but the first id is {ids[0]}"
    if len(ids) > 1 and ids[1] == bos:
        return f"BOS ({name}) occurs twice: once in the prompt, once added by the vocabulary"
    return None


def _name(path: str | os.PathLike[str]) -> str:
    return visible(os.fsencode(path))


@cache
def _gpt2_bytes() -> dict[str, int]:
    """Return GPT-2's map from characters to bytes, inverted (openai/gpt-2 encoder.py, bytes_to_unicode).

    Printable Latin-1 maps to itself, the characters from U+0100 to the other 68 bytes, in order.
    """
    printable = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _undo_gpt2(text: str) -> bytes:
    # Characters outside the map, for example of an added token, are kept.
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
