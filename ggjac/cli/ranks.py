"""`ggjac ranks`: the stable rank of every token's map, over many prompts."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ggjac import display
from ggjac.cli.options import ModelOptions, iteration_options, model_options, output, tabular_format
from ggjac.cli.planning import dry_run, warn_if_long

if TYPE_CHECKING:
    from ggjac.planner import Plan


@click.command()
@model_options(file="Read prompts from a file (UTF-8; - is stdin), one on each line; empty lines are skipped.")
@dry_run
@iteration_options
@output("Append a JSON line for each prompt to this file; prompts that it already holds are skipped.")
@tabular_format
@click.pass_context
def ranks(
    ctx: click.Context,
    what: ModelOptions,
    tol: float,
    max_sweeps: int,
    seed: int,
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
    from ggjac.analysis.ranks import ranks as measure
    from ggjac.cli.render import emit_json, emit_tables, line
    from ggjac.cli.session import (
        doubts,
        open_options,
        settings,
        show_doubts,
        show_saved,
        show_tokens,
        show_warnings,
        usage_errors,
    )

    model, options = open_options(what), settings(what)
    with usage_errors():
        prompts = what.prompts(model.chat)
    if what.trace and len(prompts) > 1:
        raise click.UsageError(
            "--trace keeps the forward pass of one prompt, but --file has several; leave out --trace"
        )
    stages, options["stages"] = options["stages"], None
    iteration: dict[str, Any] = {"tol": tol, "seed": seed, "max_sweeps": max_sweeps}

    def planned(plan: "Plan") -> None:
        warn_if_long(plan, model.gguf, options["threads"], str(model.device))

    with stages.stage("ranks") as report, usage_errors():
        result = measure(model, prompts, output, progress=report, planned=planned, **iteration, **options)
    records = result.records
    result.envelope["warnings"] += what.remarks()
    if output_format == "json":
        envelope = result.envelope
        if len(records) > 1:
            envelope = {k: v for k, v in envelope.items() if k not in ("prompt", "tokens", "position")}
        emit_json(envelope | {"ranks": result.data()})
    elif output_format != "table":
        emit_tables([result], None, output_format, [*result.envelope["warnings"], *doubts(result.envelope["model"])])
    else:
        if len(records) == 1:
            show_tokens(result.envelope["tokens"], ())
        show_warnings(result.envelope["warnings"])
        show_doubts(result.envelope["model"])
        show(result.data())
        if result.ready and output:
            line(f"{result.ready} of {len(records)} prompts were already in {display.visible(os.fsencode(output))}")
        show_saved(output)
    if any(r["stopped_by"] == "sweeps" or not r["reconstruction"]["healthy"] for r in records):
        ctx.exit(3)


def show(data: dict[str, Any]) -> None:
    """Print a row for each prompt, and one for each token index, its mean drawn as a bar."""
    from ggjac import display
    from ggjac.cli.render import bar, line, stable_rank, table
    from ggjac.units import counted

    records, positions = data["prompts"], data["by_position"]
    rows = [
        (
            display.visible((display.joined(r["tokens"]) if r["prompt"] is None else r["prompt"]).encode()),
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
            f"{p['mean']:.4g}",
            "" if p["error"] is None else f"{p['error']:.2g}",
            *(f"{p[key]:.4g}" for key in ("median", "least", "most")),
            bar(p["mean"], largest),
        )
        for p in positions
    ]
    headings = ["#token index", "#prompts", "#mean", "#standard error", "#median", "#lowest", "#highest", ""]
    table("Stable rank by token index", headings, cells)
    slow = sum(r["stopped_by"] == "sweeps" for r in records)
    line(
        f"NOT converged: {slow} of {len(records)} prompts"
        if slow
        else f"{counted(len(records), 'prompt')}, all converged"
    )
