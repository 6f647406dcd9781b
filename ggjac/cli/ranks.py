"""`ggjac ranks`: the stable rank of every token's map, over many prompts."""

from pathlib import Path

import click

from ggjac.cli.options import ModelOptions, iteration_options, model_options, output, output_format
from ggjac.cli.planning import dry_run


@click.command()
@model_options(file="Read prompts from a file (UTF-8), one on each line; empty lines are skipped.")
@dry_run
@iteration_options
@output("Append a JSON line for each prompt to this file; prompts that it holds already are not computed again.")
@output_format
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

    The map of a token is what the network makes of its embedding at the last position. An interrupted run goes on where
    it was when the same command is given again: -o grows by whole lines. Prompts whose sweeps ran out are done again
    where --max-sweeps allows more. Exit code 3 if the sweeps ran out before a largest singular value reached --tol, or
    a reconstruction error is out of bounds.

    \b
    ggjac ranks -m model.gguf -f prompts.txt -o ranks.jsonl
    """
    from ggjac.cli import phrases, render

    session, records, ready = phrases.run_ranks(what, output, tol=tol, seed=seed, max_sweeps=max_sweeps)
    positions = phrases.by_position(records)
    if output_format == "json":
        envelope = session.envelope()
        if len(records) > 1:
            envelope = {k: v for k, v in envelope.items() if k not in ("prompt", "tokens", "warning", "position")}
        render.emit_json(envelope | {"ranks": {"prompts": records, "by_position": positions}})
    else:
        if len(records) == 1:
            session.show_tokens()
        phrases.show_ranks(records, positions)
        if ready:
            render.line(f"{ready} of {len(records)} prompts were in {output} already")
        session.show_saved(output)
    if any(r["stopped_by"] == "sweeps" or not r["reconstruction"]["healthy"] for r in records):
        ctx.exit(3)
