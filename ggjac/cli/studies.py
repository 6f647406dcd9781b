"""A command asked of many prompts: who computes them, and how the run ends. One path for all commands that have it."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click

from ggjac import display, planner, runs
from ggjac.cli import texts, together
from ggjac.cli.options import Many, ModelOptions, part
from ggjac.cli.planning import warn_if_long
from ggjac.cli.render import emit_json, emit_tables, line, numbers, table
from ggjac.cli.result import failed
from ggjac.cli.session import (
    check_output,
    one_token,
    open_options,
    settings,
    show_doubts,
    show_saved,
    show_warnings,
    usage_errors,
)
from ggjac.gguf import shown
from ggjac.model import Model
from ggjac.planner import machine
from ggjac.session import Session, Stages
from ggjac.studies import MeanMap, Measure, OnePromptError, Study, mean_map, measure, shard_name, study, workers
from ggjac.studies.measures import by_depth, by_index
from ggjac.units import counted

SHOWN = 16  # singular values in a table
TOKENS = ("target", "versus")  # options that name a token


def over_prompts(
    what: ModelOptions, many: Many, name: str, output: Path | None, output_format: str, **options: Any
) -> None:
    """Ask a command of each line of a file, and print how many prompts were done; exit code 3 if a check failed.

    Args:
        what: the model, the prompts, and how to compute.
        many: who computes.
        name: of the command.
        output: file of JSON lines.
        output_format: `json` prints the records, with what they have in common.
        options: of the command, as `ggjac.measure` takes them, but tokens as texts.

    Raises:
        click.UsageError: an option is not for many prompts.
    """
    _refuse(what, "--each-line")
    if output_format in ("csv", "latex"):
        raise click.UsageError(f"--format {output_format} is for one prompt; --each-line has json")
    if output is None and output_format != "json":
        raise click.UsageError("--each-line writes to a file of JSON lines; name it with -o, or take --format json")
    found, output = run(what, many, name, output, **options)
    if output_format == "json":
        emit_json(common(found.envelope, found.records) | found.data())
    else:
        show_warnings(found.envelope["warnings"])
        show_doubts(found.envelope["model"])
        show_spectrum(found.records)
        show_ready(found, output)
        line(checks(sum(map(failed, found.records)), len(found.records)))
        show_saved(output)
    if any(map(failed, found.records)):
        click.get_current_context().exit(3)


def show_spectrum(records: Sequence[Mapping[str, Any]]) -> None:
    """Print how each singular value is distributed over prompts, if the records have any; of `layers`, those of maps.

    A map of one block, or to its attention or MLP, has the block's name as its place, others their depth.
    """
    rows = [(row["index"] + 1, *spread(row)) for row in by_index(records)]
    if rows:
        table("Singular values over prompts", ["#", *SPREAD], rows)
    cells = [
        (
            *(row["map"], row["kind"], f"L{row['block']}" if "block" in row else row["index"]),
            *(cell for one in (row["stable_rank"], row["singular_values"][0]) for cell in spread(one)[:2]),
        )
        for row in by_depth(records)
    ]
    if cells:
        columns = ["map", "kind", "#place", "#stable rank", "#standard error", "#σ₁", "#standard error"]
        table("Maps of every depth, means over prompts", columns, cells)


SPREAD = ("#mean", "#standard error", "#median", "#lowest", "#highest")


def spread(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a distribution, under `SPREAD`."""
    error = "" if row["error"] is None else f"{row['error']:.2g}"
    return [f"{row['mean']:.4g}", error, *(f"{row[key]:.4g}" for key in ("median", "least", "most"))]


def checks(bad: int, total: int) -> str:
    """Return how many prompts failed a check."""
    return f"{bad} of {total} prompts FAILED a check" if bad else f"{counted(total, 'prompt')}, all checks passed"


def average(what: ModelOptions, many: Many, output: Path | None, output_format: str, **options: Any) -> None:
    """Average the output position's own map over the lines of a file, and print it; exit code 3 if a check failed.

    Args:
        what: the model, the prompts, and how to compute.
        many: who computes.
        output: safetensors file.
        output_format: `table`, `json`, `csv` or `latex`.
        options: of the command, as `ggjac.measure` takes them.

    Raises:
        click.UsageError: an option is not for many prompts.
    """
    _refuse(what, "--mean")
    if output is None:
        raise click.UsageError("--mean saves a map; name a safetensors file with -o")
    ready = _prepared(what, many, "jacobian", output, options | {"mean": True})
    with ready.stages.stage("jacobian") as report, usage_errors(), _naming_lines(what):
        found = mean_map(
            ready.prompts, ready.measure, output, ready.begin, shard=ready.shard, progress=report, begun=ready.begun
        )
    show_mean(found, output_format, ready.notes)
    if output_format == "table":
        if many.shard:
            line("Sums are saved beside -o; when all shards are done, ggjac merge makes the mean of them")
        else:
            show_saved(output)
    if found.failed:
        click.get_current_context().exit(3)


def show_mean(found: MeanMap, output_format: str, warnings: Sequence[str]) -> None:
    """Print a mean map: its leading singular values, beside the mean of those of each prompt, or all of its data."""
    if output_format == "json":
        return emit_json({"schema_version": runs.SCHEMA_VERSION, "mean": found.data(), "warnings": list(warnings)})
    if output_format != "table":
        return emit_tables([found], None, output_format, warnings)
    show_warnings(warnings)
    columns = {"#mean": found.S, "#standard error": found.error, "#of the mean map": found.S_of_mean}
    cells = [numbers(values[:SHOWN].tolist()) for values in columns.values()]
    table("Singular values of the own map", ["#", *columns], zip(range(1, len(cells[0]) + 1), *cells, strict=True))
    line(
        f"‖mean J‖² / mean ‖J‖² = {found.shared:.3g}; 1 if all maps were the same, {1 / found.prompts:.2g} if unrelated"
    )
    line(checks(found.failed, found.prompts))


def _refuse(what: ModelOptions, flag: str) -> None:
    """Refuse options that are for one prompt."""
    refused = {"resume": "the same command continues", "trace": "it keeps the forward pass of one prompt"}
    given = {"resume": click.get_current_context().params.get("resume"), "trace": what.trace}
    for option in (option for option in refused if given[option]):
        raise click.UsageError(f"--{option} is not for {flag}: {refused[option]}")


def run(what: ModelOptions, many: Many, name: str, output: Path | None, **options: Any) -> tuple[Study, Path | None]:
    """Compute the prompts of a command, or its shard of them; return the records, and the file that has them.

    Raises:
        click.UsageError: there is no prompt, or an option is out of range.
    """
    if many.shard:
        output = output and shard_name(output, *many.shard)
    ready = _prepared(what, many, name, output, options)
    with ready.stages.stage(name) as report, usage_errors(), _naming_lines(what):
        found = study(
            ready.prompts, ready.measure, ready.begin, output, shard=ready.shard, progress=report, begun=ready.begun
        )
    found.envelope["warnings"] += ready.notes
    return found, output


class Prepared(NamedTuple):
    """What the functions of `ggjac.studies` take, and remarks on it."""

    prompts: list[Any]
    measure: Measure
    begin: Callable[[], Any] | None
    shard: tuple[int, int]
    stages: Stages
    begun: Callable[[planner.Plan], None]
    notes: list[str]


def _prepared(what: ModelOptions, many: Many, name: str, output: Path | None, options: dict[str, Any]) -> Prepared:
    """Open the model and the prompts of a command, and refuse what cannot work before any work starts.

    Raises:
        click.UsageError: there is no prompt, or an option is out of range.
    """
    machine.return_freed_memory()
    place = together.here()
    if place and many.workers:
        raise click.UsageError("--workers starts processes of its own: leave it out where several share the model")
    what, begin = _spread(what, many)
    model = open_options(what)
    with usage_errors():
        prompts = what.prompts(model.chat)
    if what.trace and len(prompts) > 1:
        raise click.UsageError(
            "--trace keeps the forward pass of one prompt, but --file has several; leave out --trace"
        )
    shard = many.shard or (0, 1)
    check_output(output, "--output", what, model)
    if place:
        place.same(output)
    session = settings(what)
    stages = session.pop("stages")
    if options.get("answer") is not None:
        with usage_errors():
            options["answer"] = what.answer_ids(options["answer"], model.tokenizer)
    notes = [*_tokens(model, part(prompts, shard)[0], options), *what.remarks()]
    begun = partial(_warn, model=model, what=what, workers=many.workers.count if many.workers else None)
    with usage_errors():
        asked = measure(model, name, **options, **session)
    return Prepared(prompts, asked, begin, shard, stages, begun, notes)


def _spread(what: ModelOptions, many: Many) -> tuple[ModelOptions, Callable[[], Any] | None]:
    """Return the options of each worker, and what makes the executor; None without workers.

    Processes of this machine share its CPUs and the memory that the command may take.
    """
    if many.workers is None:
        return what, None
    engine, address, count = many.workers.engine, many.workers.address, many.workers.count
    if count is None:
        threads = what.threads or 1
        make = partial(workers.ray, address, threads) if engine == "ray" else partial(workers.dask, str(address))
        return dataclasses.replace(what, threads=threads), make
    budget = planner.Budget.of(what.ram_budget, what.vram_budget, what.device)
    shares: dict[str, Any] = {
        "threads": what.threads or max(1, machine.cpus() // count),
        "ram_budget": budget.ram and budget.ram // count,
        "vram_budget": budget.vram and budget.vram // count,
    }
    return dataclasses.replace(what, **shares), partial(workers.processes, count)


def _tokens(model: Model, prompt: Any, options: dict[str, Any]) -> list[str]:
    """Replace the texts of tokens in a command's options by their ids, and return remarks on them."""
    named = [name for name in TOKENS if options.get(name) is not None]
    if not named:
        return []
    with usage_errors():
        session = Session(model, prompt)
    before = len(session.notes)
    options |= {name: one_token(session, options[name], f"--{name}") for name in named}
    if len({options[name] for name in named}) < len(named):
        raise click.UsageError("--versus is the token of --target: the difference is 0; name another token")
    return session.notes[before:]


@contextlib.contextmanager
def _naming_lines(what: ModelOptions) -> Iterator[None]:
    """Let an error about one of many prompts say on which line of the file it is."""
    try:
        yield
    except OnePromptError as error:
        if what.file is None:
            raise
        number = texts.number(texts.read(what.file), error.prompt, what.read)
        raise click.UsageError(f"line {number} ({shown(error.prompt)}): {error.reason}") from error


def _warn(plan: planner.Plan, *, model: Model, what: ModelOptions, workers: int | None) -> None:
    warn_if_long(plan, model.gguf, what.threads, str(model.device), workers=workers or 1)


def common(envelope: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the part of a session's envelope that all of its prompts have."""
    if len(records) == 1:
        return envelope
    return {key: value for key, value in envelope.items() if key not in ("prompt", "tokens", "position")}


def show_ready(found: Study, output: Path | None) -> None:
    """Print how many prompts a file had already."""
    if found.ready and output:
        name = display.visible(os.fsencode(output))
        line(f"{found.ready} of {len(found.records)} prompts were already in {name}")
