"""The files of shards put together to one, which has the same bits as that of a study without shards."""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ggjac import runs
from ggjac.gguf import shown
from ggjac.runs.lines import encoded, foreign, key, parsed, parts, prompt_key
from ggjac.studies.measures import KINDS, check

_SHARD = re.compile(r"-(\d{1,6})-of-(\d{1,6})\.\w+$")
QUOTED = 3  # missing prompts in a message

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
        prompts: of the whole study, whose order the output has; default the order in which shards deal them out, or
            that of the files if their names are not those of shards.

    Raises:
        RunError: a file holds something else, or was made with other settings; shards or prompts are missing, or not of
            the study; or the output cannot be written, as Parquet without pandas and pyarrow.
    """
    paths, output = [Path(file) for file in files], Path(output)
    if any(output.exists() and path.exists() and output.samefile(path) for path in paths):
        raise runs.RunError(f"{output}: is one of the files; choose another -o")
    found = _read(paths)
    records: Records = {name: record for one in found.values() for name, record in one.items()}
    if prompts is not None:
        order = list(dict.fromkeys(map(prompt_key, prompts)))
        _check_prompts(records, order)
    elif all(_SHARD.search(path.name) for path in paths):
        order = _dealt({path: list(one) for path, one in found.items()})
    else:
        order = list(records)
    merged = [records[name] for name in order]
    runs.save_bytes(output, _parquet(merged) if output.suffix == ".parquet" else b"".join(map(encoded, merged)))
    return merged


def _read(paths: Sequence[Path]) -> dict[Path, Records]:
    """Return the records of each file, all of one kind and with the settings of the first."""
    found: dict[Path, Records] = {}
    first: tuple[Path, dict[str, Any], set[str]] | None = None
    for path in paths:
        if path in found:
            raise runs.RunError(f"{path}: was given twice")
        found[path] = {}
        for number, part in enumerate(parts(path), 1):
            record = parsed(path, part, number)
            kinds = {name for name, kind in KINDS.items() if record.keys() >= set(kind.parts)}
            try:
                check(record)
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
            quoted = ", ".join(shown(name.removeprefix("text: ")) for name in names[:QUOTED])
            more = ", ..." if len(names) > QUOTED else ""
            raise runs.RunError(f"{len(names)} of {len(order)} prompts are {what} ({quoted}{more}); {remedy}")


def _dealt(shards: dict[Path, list[str]]) -> list[str]:
    """Return the prompts of all shards in the order from which prompt `i` went to shard `i % N`."""
    numbers: dict[int, Path] = {}
    counts: set[int] = set()
    for path in shards:
        match = _SHARD.search(path.name)
        assert match
        number, count = int(match[1]), int(match[2])
        counts.add(count)
        if number in numbers or number >= count or len(counts) > 1:
            raise runs.RunError(f"{path}: is not another shard of the same study; give each of its shards once")
        numbers[number] = path
    (count,) = counts
    missing = [f"{i} of {count}" for i in range(count) if not shards.get(numbers.get(i, Path()))]
    if missing:
        raise runs.RunError(f"shards are missing or empty: {', '.join(missing[:10])}; run them (they count from 0)")
    total = sum(map(len, shards.values()))
    for i, path in sorted(numbers.items()):
        expected = len(range(i, total, count))
        if len(shards[path]) != expected:
            raise runs.RunError(
                f"{path}: has {len(shards[path])} prompts where {expected} of {total} were expected; run the shards "
                "that were interrupted again, or give all prompts with -f"
            )
    return [shards[numbers[i % count]][i // count] for i in range(total)]


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
