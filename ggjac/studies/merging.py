"""The files of shards put together to one, which has the same bits as that of a study without shards."""

import io
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import islice
from operator import index
from pathlib import Path
from typing import Any

from ggjac import runs
from ggjac.gguf import shown
from ggjac.runs import lock
from ggjac.runs.lines import encoded, foreign, key, parsed, parts, prompt_key
from ggjac.studies.measures import KINDS, check

_SHARD = re.compile(r"-\d{1,6}-of-(\d{1,6})\.\w+$")
QUOTED, LISTED = 3, 10  # missing prompts and shards in a message

Records = dict[str, dict[str, Any]]


def merge(
    files: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    prompts: Sequence[str | Sequence[int]] | None = None,
) -> list[dict[str, Any]]:
    """Put the files of JSON lines of one study together; return all records.

    Args:
        files: of the shards; of several records about one prompt, the last one counts.
        output: a file of JSON lines, or a Parquet file if its name ends so.
        prompts: of the whole study, whose order the output has; default those that the records are numbered by, and
            their order.

    Raises:
        RunError: a file holds something else, or was made with other settings; prompts are missing, or not of the
            study; or the output cannot be written, as Parquet without pandas and pyarrow.
        JournalError: another process writes to a file.
    """
    paths, output = [Path(file) for file in files], Path(output)
    check_output(paths, output)
    found = _read(paths)
    records: Records = {name: record for one in found.values() for name, record in one.items()}
    if prompts is not None:
        order = list(dict.fromkeys(map(prompt_key, prompts)))
        _check_prompts(records, order)
    else:
        order = _ordered(found)
    merged = [records[name] | {"study": {"index": i, "prompts": len(order)}} for i, name in enumerate(order)]
    runs.save_bytes(output, _parquet(merged) if output.suffix == ".parquet" else b"".join(map(encoded, merged)))
    return merged


def check_output(paths: Sequence[Path], output: Path) -> None:
    """Refuse an output that is one of the files."""
    if any(output.exists() and path.exists() and output.samefile(path) for path in paths):
        raise runs.RunError(f"{output}: is one of the files; choose another -o")


def first_missing(found: Collection[int], count: int) -> str:
    """Return the first numbers below `count` that were not found, as text."""
    missing = list(islice((i for i in range(count) if i not in found), QUOTED + 1))
    return ", ".join(map(str, missing[:QUOTED])) + (", ..." if len(missing) > QUOTED else "")


def _read(paths: Sequence[Path]) -> dict[Path, Records]:
    """Return the records of each file, all of one kind and with the settings of the first."""
    found: dict[Path, Records] = {}
    first: tuple[Path, dict[str, Any], set[str]] | None = None
    for path in paths:
        if path in found:
            raise runs.RunError(f"{path}: was given twice")
        found[path] = {}
        lock.check_idle(path)
        for number, part in enumerate(parts(path), 1):
            record = parsed(path, part, number)
            kinds = {name for name, kind in KINDS.items() if record.keys() >= set(kind.parts)}
            try:
                check(record)
                _check_place(record)
            except (ValueError, KeyError, TypeError, AttributeError):
                kinds = set()
            first = first or (path, record["settings"], kinds)
            if not kinds & first[2]:
                raise foreign(path, part, number, "merge the files of one study")
            _compare(path, number, record["settings"], first[0], first[1])
            found[path][key(record)] = record
    if first is None:
        raise runs.RunError("the files have no records; give those of a study")
    return found


def _check_place(record: dict[str, Any]) -> None:
    """Read the place of a record in its study; ValueError and the like refuse it."""
    study = record["study"]
    if not 0 <= index(study["index"]) < index(study["prompts"]):
        raise ValueError("there is no such prompt")


def _compare(path: Path, number: int, settings: dict[str, Any], first: Path, expected: dict[str, Any]) -> None:
    """Refuse a record that was made otherwise than the first."""
    for name in dict.fromkeys((*expected, *settings)):
        if settings.get(name) != expected.get(name):
            raise runs.RunError(
                f"{path}: --{name}: line {number} was made with {settings.get(name)}, those of {first} with "
                f"{expected.get(name)}; merge the files of one study"
            )


def _check_prompts(records: Records, order: Sequence[str]) -> None:
    """Refuse records that lack a prompt of a study, or have another one."""
    for names, what, remedy in (
        ([name for name in order if name not in records], "missing", "run their shards again"),
        (sorted(records.keys() - set(order)), "not of this study", "give its -f"),
    ):
        if names:
            quoted = ", ".join(map(_shown, names[:QUOTED]))
            more = ", ..." if len(names) > QUOTED else ""
            raise runs.RunError(f"{len(names)} of {len(order)} prompts are {what} ({quoted}{more}); {remedy}")


def _ordered(found: dict[Path, Records]) -> list[str]:
    """Return the prompts of all files in the order of their study, which is complete.

    Raises:
        RunError: a prompt is missing, or two records have the same place, or are of studies of different size.
    """
    places: dict[int, tuple[Path, str]] = {}
    size, sized = 0, Path()
    for path, records in found.items():
        for name, record in records.items():
            place, count = record["study"]["index"], record["study"]["prompts"]
            size, sized = (size, sized) if places else (count, path)
            if count != size:
                raise runs.RunError(
                    f"{path}: is of a study of {count} prompts, {sized} of one of {size}; give all prompts with -f"
                )
            before, other = places.setdefault(place, (path, name))
            if other != name:
                raise runs.RunError(
                    f"{path}: prompt {place} is {_shown(name)}, that of {before} is {_shown(other)}; merge the files "
                    "of one study"
                )
    if len(places) < size:
        numbers, missing = first_missing(places, size), size - len(places)
        raise runs.RunError(
            f"{missing} of {size} prompts are missing (numbers {numbers}, from 0); run their shards again"
            + _shards(found, places, size)
        )
    return [places[i][1] for i in range(size)]


def _shards(found: Collection[Path], places: Collection[int], size: int) -> str:
    """Return which shards lack prompts, if the names of the files tell; else nothing."""
    counts = {int(match[1]) if (match := _SHARD.search(path.name)) else 0 for path in found}
    if len(counts) > 1 or not 0 < (count := counts.pop()) <= size:
        return ""
    there = Counter(i % count for i in places)
    lacking = [f"{i}/{count}" for i in range(count) if there[i] < len(range(i, size, count))]
    return f": --shard {', '.join(lacking[:LISTED])}{', ...' if len(lacking) > LISTED else ''}"


def _shown(name: str) -> str:
    """Return a prompt's key for a message."""
    return shown(name.removeprefix("text: "))


def _parquet(records: list[dict[str, Any]]) -> bytes:
    """Return a table with a row for each record, its parts as nested columns."""
    try:
        import pandas
        import pyarrow  # noqa: F401  # which pandas asks for
    except ModuleNotFoundError as error:
        raise runs.RunError(f"Parquet needs the package {error.name}: pip install 'ggjac[notebook]'") from error
    buffer = io.BytesIO()
    pandas.DataFrame(records).to_parquet(buffer, engine="pyarrow")
    return buffer.getvalue()
