"""A file of JSON lines that grows by whole records: what a run over many prompts keeps, and continues from."""

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ggjac.runs.files import SCHEMA_VERSION, RunError, save_bytes

# How a record begins, as `json.dumps` writes it.
_BEGINNING = f'{{"schema_version": {SCHEMA_VERSION}, "prompt": '.encode()


class Lines:
    """Records of one kind in a file of JSON lines; each is on the disk when `add` returns.

    Args:
        path: the file, which need not exist; None keeps the records in memory only.
        settings: what decided each record apart from its prompt, named as the options are; records in the file must
            have the same under `"settings"`.
        fields: keys that every record has.
        whole: reads what a record must have further; KeyError, TypeError and the like refuse it.

    Attributes:
        records: by prompt, see `key`; of several about one prompt, the last.

    Raises:
        RunError: the file holds something else, or records with other settings; it is left as it is.
    """

    def __init__(
        self,
        path: Path | None,
        settings: Mapping[str, Any],
        *,
        fields: Collection[str],
        whole: Callable[[dict[str, Any]], object],
    ):
        self.path, self.settings, self.fields, self.whole = path, settings, set(fields), whole
        self.records: dict[str, dict[str, Any]] = {}
        self._written: list[str] = []  # the prompt of each line of the file
        if path is None or not path.exists():
            return
        end = 0
        for number, part in enumerate(parts(path), 1):
            record = parsed(path, part, number)
            if not self._complete(record):
                raise foreign(path, part, number)
            self._check_settings(record, number)
            self._remember(record)
            end += len(part) + 1
        if end < path.stat().st_size:  # an interrupted write left less than a line
            os.truncate(path, end)

    def _complete(self, record: dict[str, Any]) -> bool:
        """Return whether a record is one of this kind."""
        try:
            self.whole(record)
            return record.keys() >= self.fields
        except (ValueError, KeyError, TypeError, AttributeError):
            return False

    def _check_settings(self, record: dict[str, Any], number: int) -> None:
        """Refuse a record that was made otherwise."""
        for name, value in self.settings.items():
            found = record["settings"].get(name)
            if found != value:
                raise RunError(
                    f"{self.path}: --{name}: line {number} was made with {found}, now {value}; choose another -o, or "
                    "make it the same"
                )

    def _remember(self, record: dict[str, Any]) -> None:
        self.records[key(record)] = record
        self._written.append(key(record))

    def add(self, record: dict[str, Any]) -> None:
        """Append a record and flush it to the disk."""
        self._remember(record)
        if self.path is None:
            return
        with open(self.path, "ab") as file:
            file.write(encoded(record))
            file.flush()
            os.fsync(file.fileno())

    def arrange(self, order: Mapping[str, Mapping[str, Any]]) -> None:
        """Give the lines of some prompts an order, one line for each, with fields; those of others stay as they are.

        The file is written anew, in one step, only where that changes it: records are added as they are ready.

        Args:
            order: fields that the record of each prompt is to have, by `key`.

        Raises:
            RunError: it cannot be written.
        """
        names = iter(order)
        wanted = [next(names) if name in order else name for name in dict.fromkeys(self._written)]
        renewed = {name: {**self.records[name], **fields} for name, fields in order.items()}
        changed = wanted != self._written or any(renewed[name] != self.records[name] for name in order)
        self.records |= renewed
        if self.path is not None and changed:
            save_bytes(self.path, b"".join(encoded(self.records[name]) for name in wanted))
        self._written = wanted


def key(record: Mapping[str, Any]) -> str:
    """Return what distinguishes prompts: the text, or the token ids before any answer where there is none."""
    prompt, answer = record["prompt"], record.get("answer", {}).get("start")
    return prompt_key([token["id"] for token in record["tokens"][:answer]] if prompt is None else prompt)


def prompt_key(prompt: str | Sequence[int]) -> str:
    """Return the `key` of the record of a prompt, a text or token ids."""
    return f"text: {prompt}" if isinstance(prompt, str) else str(list(prompt))


def encoded(record: Mapping[str, Any]) -> bytes:
    """Return a record as a line of the file."""
    return json.dumps(record, allow_nan=False).encode("ascii") + b"\n"


def parts(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, without what an interrupted write may have left at its end.

    Raises:
        RunError: its beginning, or that of its end, is not one of a record.
    """
    with open(path, "rb") as file:  # a model, say, is refused before it is read
        _check_beginning(path, file.read(len(_BEGINNING)), 1)
        file.seek(0)
        rest = b""
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield line[:-1]
            else:
                rest = line
                _check_beginning(path, rest[: len(_BEGINNING)], number)


def parsed(path: Path, part: bytes, number: int) -> dict[str, Any]:
    """Return the record of a line.

    Raises:
        RunError: it is none, or one of another version.
    """
    try:
        record = json.loads(part)
        record["settings"] = dict(record["settings"])
        _ = key(record)
        known = record["schema_version"] == SCHEMA_VERSION
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        known = False
    if not known:
        raise foreign(path, part, number)
    return record


def _check_beginning(path: Path, found: bytes, number: int) -> None:
    """Refuse what does not begin as a record does, or as a part of one."""
    if found != _BEGINNING[: len(found)]:
        raise foreign(path, found, number)


def foreign(path: Path, found: bytes, number: int, remedy: str = "choose another -o") -> RunError:
    """Return the error about a line that begins as `found`."""
    version = re.match(rb'\{"schema_version": (\d{1,3}), "prompt"', found)
    if version and int(version[1]) != SCHEMA_VERSION:
        return RunError(
            f"{path}: line {number} was written by another version of ggjac (schema version {int(version[1])}; this "
            f"one writes {SCHEMA_VERSION}); choose another -o, and all prompts are computed again"
        )
    return RunError(f"{path}: line {number} is not a result of this command; {remedy}")
