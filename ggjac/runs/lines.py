"""A file of JSON lines that grows by whole records: what a run over many prompts keeps, and continues from."""

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ggjac.runs.files import SCHEMA_VERSION, RunError

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
        records: by prompt, see `key`.

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
        if path is None or not path.exists():
            return
        with open(path, "rb") as file:  # a model, say, is refused before it is read
            self._check_beginning(file.read(len(_BEGINNING)), 1)
        content = path.read_bytes()
        lines = content.split(b"\n")
        rest = lines.pop()  # an interrupted write left less than a line
        for number, part in enumerate(lines, 1):
            record = self._checked(part, number)
            self.records[key(record)] = record
        if rest:
            self._check_beginning(rest[: len(_BEGINNING)], len(lines) + 1)
            os.truncate(path, len(content) - len(rest))

    def _check_beginning(self, found: bytes, number: int) -> None:
        """Refuse what does not begin as a record does, or as a part of one."""
        if found != _BEGINNING[: len(found)]:
            raise self._foreign(found, number)

    def _foreign(self, found: bytes, number: int) -> RunError:
        """Return the error about a line that begins as `found`."""
        version = re.match(rb'\{"schema_version": (\d{1,3}), "prompt"', found)
        if version and int(version[1]) != SCHEMA_VERSION:
            return RunError(
                f"{self.path}: line {number} was written by another version of ggjac (schema version "
                f"{int(version[1])}; this one writes {SCHEMA_VERSION}); choose another -o, and "
                "all prompts are computed again"
            )
        return RunError(f"{self.path}: line {number} is not a result of this command; choose another -o")

    def _checked(self, part: bytes, number: int) -> dict[str, Any]:
        """Return a record, if it is one of this kind and was made in the same way."""
        try:
            record = json.loads(part)
            settings = dict(record["settings"])
            _ = key(record), self.whole(record)
            complete = record["schema_version"] == SCHEMA_VERSION and record.keys() >= self.fields
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            complete = False
        if not complete:
            raise self._foreign(part, number)
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise RunError(
                    f"{self.path}: --{name}: line {number} was made with {settings.get(name)}, now {value}; choose "
                    "another -o, or make it the same"
                )
        return record

    def add(self, record: dict[str, Any]) -> None:
        """Append a record and flush it to the disk."""
        self.records[key(record)] = record
        if self.path is None:
            return
        with open(self.path, "ab") as file:
            file.write(json.dumps(record, allow_nan=False).encode("ascii") + b"\n")
            file.flush()
            os.fsync(file.fileno())


def key(record: Mapping[str, Any]) -> str:
    """Return what distinguishes prompts: the text, or the token ids where there is none."""
    prompt = record["prompt"]
    return str([token["id"] for token in record["tokens"]]) if prompt is None else f"text: {prompt}"
