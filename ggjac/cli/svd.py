"""`ggjac svd`: singular values and vectors of the detached Jacobian, decoded."""

from pathlib import Path
from typing import Any

import click

from ggjac.cli.options import (
    ModelOptions,
    dry_run,
    model_options,
    output,
    output_format,
    position,
    resume,
    spectrum_options,
)


@click.command()
@model_options
@dry_run
@position
@spectrum_options
@click.option("--top", type=click.IntRange(min=1), default=8, show_default=True, help="Tokens per vector.")
@output("Save `U`, `S`, `Vh`, `residual` and `ids` to this safetensors file.")
@resume
@output_format
@click.pass_context
def svd(
    ctx: click.Context,
    what: ModelOptions,
    position: int,
    rank: int,
    tol: float,
    max_sweeps: int,
    seed: int,
    top: int,
    output: Path | None,
    resume: bool,
    output_format: str,
) -> None:
    """Decompose a prompt's detached Jacobian and decode its singular vectors.

    Left vectors decode through the LM head to the tokens they promote, right vectors to the nearest input embeddings at
    each position. Exit code 3 if the sweeps ran out before every triplet reached --tol, or the reconstruction error is
    out of bounds.

    \b
    ggjac svd -m model.gguf -p "The capital of France is" -k 4 -o svd.safetensors
    """
    from ggjac.cli import render, sections
    from ggjac.cli.session import Session, checkpoint, save

    session = Session(what, position=position, rank=rank, output=output)
    settings: dict[str, Any] = {"rank": rank, "tol": tol, "seed": seed}
    with session.checkpointed(checkpoint(output, resume), resume=resume, output=output, **settings):
        result = sections.run_spectrum(session, top=top, max_sweeps=max_sweeps, **settings)
        content = {
            "reconstruction": sections.reconstruction(session),
            "svd": sections.spectrum_data(session, result, seed, tol),
        }
        if output:
            save(session, output, sections.tensors(result), **settings)
    if output_format == "json":
        render.emit_json(session.envelope() | content)
    else:
        session.show_tokens()
        sections.show_reconstruction(content["reconstruction"])
        sections.show_spectrum(content["svd"])
        session.show_saved(output)
    if sections.failed_checks(content):
        ctx.exit(3)
