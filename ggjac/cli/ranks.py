"""`ggjac ranks`: the stable rank of every token's map, over many prompts."""

from pathlib import Path
from typing import Any

import click

from ggjac.cli.help import Command
from ggjac.cli.options import (
    Many,
    ModelOptions,
    iteration_options,
    many_options,
    model_options,
    output,
    search_dtype,
    tabular_format,
)
from ggjac.cli.planning import dry_run


@click.command(cls=Command)
@model_options(file="Read prompts from a file (UTF-8; - is stdin), one on each line; empty lines are skipped.")
@many_options(flag=None)
@dry_run
@iteration_options
@search_dtype
@output("Append a JSON line for each prompt to this file; prompts that it already holds are skipped.")
@tabular_format
@click.pass_context
def ranks(
    ctx: click.Context,
    what: ModelOptions,
    many: Many,
    tol: float,
    max_sweeps: int,
    seed: int,
    search_dtype: str,
    output: Path | None,
    output_format: str,
) -> None:
    """Measure the stable rank of every token's own map, and of the joint one, for each line of a file (-f) of prompts.

    A token's map leads from its embedding to the output at the last position. With -o, the same command continues an
    interrupted run: each finished prompt is a line of the file. Prompts that ran out of sweeps are computed again if
    --max-sweeps is now larger. Exit code 3 if the sweeps ran out before a largest singular value reached --tol, or a
    reconstruction error is out of bounds.

    \b
    ggjac ranks -m model.gguf -f prompts.txt -o ranks.jsonl
    """
    from ggjac.analysis.ranks import Ranks
    from ggjac.cli.render import emit_json, emit_tables
    from ggjac.cli.result import failed
    from ggjac.cli.session import doubts, show_doubts, show_saved, show_tokens, show_warnings
    from ggjac.cli.studies import common, run, show_ready

    search = "same" if search_dtype == "auto" else search_dtype  # the same bits on any worker
    found, output = run(what, many, "ranks", output, tol=tol, seed=seed, max_sweeps=max_sweeps, search_dtype=search)
    records, envelope = found.records, found.envelope
    result = Ranks(records, found.ready, envelope)
    if output_format == "json":
        emit_json(common(envelope, records) | {"ranks": result.data()})
    elif output_format != "table":
        emit_tables([result], None, output_format, [*envelope["warnings"], *doubts(envelope["model"])])
    else:
        if len(records) == 1:
            show_tokens(envelope["tokens"], ())
        show_warnings(envelope["warnings"])
        show_doubts(envelope["model"])
        show(result.data())
        show_ready(found, output)
        show_saved(output)
    if any(map(failed, records)):
        ctx.exit(3)


def show(data: dict[str, Any]) -> None:
    """Print a row for each prompt, and one for each token index, its mean drawn as a bar."""
    from ggjac import display
    from ggjac.cli.render import bar, line, stable_rank, table
    from ggjac.cli.studies import SPREAD, spread
    from ggjac.units import counted

    records, positions = data["prompts"], data["by_position"]
    rows = [
        (
            display.visible(display.joined(r["tokens"]) if r["prompt"] is None else r["prompt"]),
            display.token(r["next"]),
            stable_rank(r["joint"]),
            " ".join(f"{t['stable_rank']['value']:.3g}" for t in r["tokens"]),
        )
        for r in records
    ]
    table("Stable rank of each prompt", ["prompt", "next token", "#joint map", "each token's own map"], rows)
    largest = max((p["mean"] for p in positions), default=0.0) or 1.0
    cells = [
        (
            p["position"],
            p["prompts"],
            *spread(p),
            bar(p["mean"], largest),
        )
        for p in positions
    ]
    table("Stable rank by token index", ["#token index", "#prompts", *SPREAD, ""], cells)
    slow = sum(r["stopped_by"] == "sweeps" for r in records)
    line(
        f"NOT converged: {slow} of {len(records)} prompts"
        if slow
        else f"{counted(len(records), 'prompt')}, all converged"
    )
