"""`ggjac svd`: singular values and vectors of the detached Jacobian, decoded."""

from pathlib import Path
from typing import Any

import click

from ggjac.cli.options import (
    ModelOptions,
    model_options,
    output,
    output_format,
    position,
    resume,
    spectrum_options,
    top,
)
from ggjac.cli.planning import dry_run
from ggjac.sizes import SHUFFLES


@click.command()
@model_options()
@dry_run
@position
@spectrum_options
@top("Tokens per vector.")
@click.option("--per-token", is_flag=True, help="Also decompose each position's own map.")
@click.option(
    "--shuffles",
    type=click.IntRange(min=0),
    default=SHUFFLES,
    show_default=True,
    help="Shuffled vectors to compare the decoded ones with; 0 for none.",
)
@output(
    "Save `U`, `S`, `Vh`, `residual` and `ids`, and with --per-token `token_U` [m, k, d], `token_S` [m, k], `token_Vh` "
    "[m, k, d], `token_residual` [m, k], to this safetensors file."
)
@resume
@output_format
def svd(
    what: ModelOptions,
    position: int,
    rank: int,
    tol: float,
    max_sweeps: int,
    seed: int,
    top: int,
    per_token: bool,
    shuffles: int,
    output: Path | None,
    resume: bool,
    output_format: str,
) -> None:
    """Decompose a prompt's detached Jacobian and decode its singular vectors.

    Left vectors decode through the LM head to the tokens they promote, right vectors to the nearest input embeddings at
    each position. Coherence (the mean cosine between the embeddings of a vector's top tokens) is compared with that of
    shuffled vectors, which mean nothing. Exit code 3 if the sweeps ran out before every triplet reached --tol, or the
    reconstruction error is out of bounds.

    \b
    ggjac svd -m model.gguf -p "The capital of France is" -k 4 -o svd.safetensors
    """
    from ggjac.cli import sections, vectors
    from ggjac.cli.session import Session, checkpoint, save

    if shuffles == 1:
        raise click.UsageError("--shuffles 1: chance and its spread take two; 0 leaves the comparison out")
    session = Session(what, position=position, rank=rank, output=output)
    settings: dict[str, Any] = {"rank": rank, "tol": tol, "seed": seed}
    marks = {"per_token": per_token} if per_token else {}
    with session.checkpointed(checkpoint(output, resume), resume=resume, output=output, **settings, **marks):
        result = sections.run_spectrum(session, top=top, max_sweeps=max_sweeps, **settings)
        content = {
            "reconstruction": sections.reconstruction(session),
            "svd": sections.spectrum_data(session, result, seed, tol),
        }
        tensors = sections.tensors(result)
        if shuffles:
            scores = vectors.run_readability(session, result, top=top, shuffles=shuffles, seed=seed)
            content["svd"]["readability"] = vectors.readability_data(scores)
        if per_token:
            found = vectors.run_per_token(session, top=top, max_sweeps=max_sweeps, **settings)
            content["svd"]["per_token"] = vectors.per_token_data(session, found)
            tensors |= vectors.tensors(found)
        if output:
            save(session, output, tensors, **settings)
    sections.finish(session, content, output_format, output, svd=_show)


def _show(data: dict[str, Any]) -> None:
    """Print the triplets, and what else was asked for."""
    from ggjac.cli import sections, vectors

    sections.show_spectrum(data)
    if "readability" in data:
        vectors.show_readability(data["readability"])
    if "per_token" in data:
        vectors.show_per_token(data["per_token"])
