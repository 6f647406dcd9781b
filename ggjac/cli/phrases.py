"""Many prompts, one after another: their stable ranks, kept in a file of JSON lines that can be gone on with."""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from ggjac import __version__, runs
from ggjac.analysis.ranks import token_ranks
from ggjac.cli import sections
from ggjac.cli.depths import stable
from ggjac.cli.options import ModelOptions
from ggjac.cli.progress import Reporter
from ggjac.cli.render import bar, finite, line, table
from ggjac.cli.session import Session
from ggjac.gguf import shown
from ggjac.runs import lock
from ggjac.sizes import TOKENS_AT_ONCE, block_width

# How a record begins, as `json.dumps` writes it, and what else each has.
_BEGINNING = f'{{"schema_version": {runs.SCHEMA_VERSION}, "prompt": '.encode()
_FIELDS = {"joint", "next", "reconstruction", "residual", "sweeps", "stopped_by"}


class Lines:
    """A file of JSON lines: records of one kind, each written to the disk when it is there. None keeps nothing.

    Attributes:
        records: what the file holds, by prompt.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self.path, self.settings = path, settings
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
            self.records[_key(record)] = record
        if rest:
            self._check_beginning(rest[: len(_BEGINNING)], len(lines) + 1)
            os.truncate(path, len(content) - len(rest))

    def _check_beginning(self, found: bytes, number: int) -> None:
        """Refuse what does not begin as a record does, or as a part of one."""
        if found != _BEGINNING[: len(found)]:
            raise self._foreign(number)

    def _foreign(self, number: int) -> runs.RunError:
        return runs.RunError(f"{self.path}: line {number} is no result of this command; choose another -o")

    def _checked(self, part: bytes, number: int) -> dict[str, Any]:
        """Return a record, if it is one of ours and was made in the same way."""
        try:
            record = json.loads(part)
            settings = dict(record["settings"])
            _ = _key(record), [token["stable_rank"]["value"] for token in record["tokens"]]
            whole = record["schema_version"] == runs.SCHEMA_VERSION and record.keys() >= _FIELDS
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        if not whole:
            raise self._foreign(number)
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise runs.RunError(
                    f"{self.path}: --{name}: line {number} was made with {settings.get(name)}, now {value}; choose "
                    "another -o, or make it the same"
                )
        return record

    def add(self, record: dict[str, Any]) -> None:
        """Append a record and flush it to the disk."""
        self.records[_key(record)] = record
        if self.path is None:
            return
        with open(self.path, "ab") as file:
            file.write(json.dumps(record, allow_nan=False).encode("ascii") + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _key(record: dict[str, Any]) -> str:
    """Return what tells prompts apart: the text, or the token ids where there is none."""
    prompt = record["prompt"]
    return str([t["id"] for t in record["tokens"]]) if prompt is None else f"text: {prompt}"


def _settled(record: dict[str, Any] | None, max_sweeps: int) -> bool:
    """Say whether a prompt needs no more work; where sweeps ran out, more of them are another attempt."""
    return record is not None and not (record["stopped_by"] == "sweeps" and record["sweeps"] < max_sweeps)


def run_ranks(
    what: ModelOptions, output: Path | None, *, tol: float, seed: int, max_sweeps: int
) -> tuple[Session, list[dict[str, Any]], int]:
    """Compute what the file lacks; return the last session, all records in the order given, and how many were there."""
    given = what.prompts()
    if what.trace and len(given) > 1:
        raise click.UsageError("--trace keeps one prompt's forward pass, here are several; leave it out")
    report = Reporter(what.quiet)
    session: Session | None = None
    lines: Lines | None = None
    found: list[dict[str, Any]] = []
    ready = longest = 0  # records that were there; tokens of the longest prompt
    with _alone(output), report.stage("ranks") as update, _keeping(output):
        for number, one in enumerate(given, 1):
            try:
                model = None if session is None else session.model
                session = Session(replace(one, quiet=True), rank=1, model=model, fit=False)
            except click.UsageError as error:
                if len(given) == 1:
                    raise
                raise click.UsageError(f"{shown(one.prompt or '')}: {error.format_message()}") from error
            longest = longest or _longest(session, given)
            session.fit(longest, position=-1)  # the same for all: layers stay ready
            lines = lines or Lines(output, _settings(session, tol=tol, seed=seed))
            key = _key({"prompt": session.text, "tokens": session.tokens()})
            if _settled(lines.records.get(key), max_sweeps):
                ready += 1
            else:
                lines.add(finite(_record(session, lines.settings, max_sweeps)))
            found.append(lines.records[key])
            update("prompt", number, len(given))
    assert session is not None
    return session, found, ready


@contextlib.contextmanager
def _keeping(output: Path | None) -> Iterator[None]:
    """Let an interrupt say what is kept."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if output and output.exists():
            interrupt.add_note(f"finished prompts are in {shown(output)}: the same command goes on with the others")
        raise


def _alone(output: Path | None) -> contextlib.AbstractContextManager[None]:
    """Let no other process read and append to the same file meanwhile."""
    if output is None:
        return contextlib.nullcontext()
    runs.check_writable(output)
    return lock.alone(output)


def _longest(session: Session, given: list[ModelOptions]) -> int:
    """Return the tokens of the longest prompt, by which all are planned; what is no prompt is refused in its turn."""
    model = session.model
    lengths = [len(model.tokenize(text)) for one in given[1:] if (text := one.text())]
    return max([len(session.ids), *(n for n in lengths if n <= model.config.context_length)])


def _settings(session: Session, *, tol: float, seed: int) -> dict[str, Any]:
    """Return what decides a record beside its prompt, named as the options are."""
    return {
        "model": session.model.gguf.fingerprint(),
        "dtype": session.what.dtype,
        "mlp-path": session.what.mlp_path,
        "tol": tol,
        "seed": seed,
    }


def _record(session: Session, settings: dict[str, Any], max_sweeps: int) -> dict[str, Any]:
    start, n = time.perf_counter(), len(session.ids)
    found = token_ranks(
        session.jacobian,
        at_once=TOKENS_AT_ONCE * block_width(1, n * session.model.config.d),
        tol=settings["tol"],
        seed=settings["seed"],
        max_sweeps=max_sweeps,
    )
    return {
        "schema_version": runs.SCHEMA_VERSION,
        "prompt": session.text,
        "joint": asdict(found.joint),
        "tokens": [
            token | {"stable_rank": asdict(rank)} for token, rank in zip(session.tokens(), found.tokens, strict=True)
        ],
        "next": sections.predictions(session, 1)[0],
        "reconstruction": sections.reconstruction(session),
        "residual": found.residual,
        "sweeps": found.sweeps,
        "stopped_by": found.stopped_by,
        "settings": settings,
        "ggjac": __version__,
        "seconds": round(time.perf_counter() - start, 3),
    }


def by_position(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the distribution of stable ranks at each token index: count, mean, its standard error, extremes."""
    return list(_by_position(records))


def _by_position(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for i in range(max(len(record["tokens"]) for record in records)):
        values = [r["tokens"][i]["stable_rank"]["value"] for r in records if i < len(r["tokens"])]
        spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        yield {
            "position": i,
            "prompts": len(values),
            "mean": statistics.fmean(values),
            "error": spread,
            "median": statistics.median(values),
            "least": min(values),
            "most": max(values),
        }


def show_ranks(records: list[dict[str, Any]], positions: list[dict[str, Any]]) -> None:
    """Print a row for each prompt, and one for each token index, its mean drawn as a bar."""
    rows = [
        (
            "".join(t["text"] for t in r["tokens"]),
            r["next"]["token"],
            stable(r["joint"]),
            " ".join(f"{t['stable_rank']['value']:.3g}" for t in r["tokens"]),
        )
        for r in records
    ]
    table("Stable rank of each prompt", ["prompt", "next", "#joint", "of each token's own map"], rows)
    largest = max((p["mean"] for p in positions), default=0.0) or 1.0
    cells = [
        (
            p["position"],
            p["prompts"],
            f"{p['mean']:.4g}",
            "" if p["error"] is None else f"{p['error']:.2g}",
            *(f"{p[key]:.4g}" for key in ("median", "least", "most")),
            bar(p["mean"], largest),
        )
        for p in positions
    ]
    headings = ["#token index", "#prompts", "#mean", "#standard error", "#median", "#least", "#most", ""]
    table("Stable rank by token index", headings, cells)
    slow = sum(r["stopped_by"] == "sweeps" for r in records)
    line(f"NOT converged: {slow} of {len(records)} prompts" if slow else f"{len(records)} prompts, all converged")
