"""`ggjac layers`: the maps to, through and from every depth, and what the stream says there."""

from pathlib import Path
from typing import Any

import click

from ggjac.cli.options import (
    DepthRanges,
    ModelOptions,
    layer_options,
    model_options,
    output,
    output_format,
    position,
    resume,
    spectrum_options,
    top,
)
from ggjac.cli.planning import dry_run


@click.command()
@model_options()
@dry_run
@position
@layer_options
@spectrum_options
@top("Tokens per vector and depth.")
@output("Save U, S, residual and stable rank of every map, and the ranks, to this safetensors file.")
@resume
@output_format
def layers(
    what: ModelOptions,
    position: int,
    layers: DepthRanges,
    output: Path | None,
    resume: bool,
    output_format: str,
    **options: Any,
) -> None:
    """Decompose the maps of every depth: singular values, stable rank, decoded left vectors, and what the stream says.

    A map is cumulative (from the input to a tap), blockwise (one block alone) or to the end (from a depth to the
    output). Taps are the stream after a block (layer) and what its attention (attn) and its MLP (mlp) add to it, seen
    through the final norm frozen there. `analyze --layers all` shows the same in its report. Exit code 3 if the sweeps
    ran out before every triplet reached --tol, or the reconstruction error is out of bounds.

    \b
    ggjac layers -m model.gguf -p "The capital of France is" --layers 0,4-8,-1
    """
    from ggjac.cli import depths, sections
    from ggjac.cli.session import Session, checkpoint, save

    session = Session(what, position=position, rank=options["rank"], output=output)
    chosen = layers.of(session.model.config.block_count)
    settings = {key: options[key] for key in ("rank", "tol", "seed")}
    asked = {"layers": chosen, **{key: list(options[key]) for key in ("maps", "kinds")}}
    with session.checkpointed(checkpoint(output, resume), resume=resume, output=output, **settings, **asked):
        content: dict[str, Any] = {"reconstruction": sections.reconstruction(session)}
        result = depths.run_layers(session, chosen, **options)
        content["layers"] = depths.layers_data(session, result, seed=options["seed"], tol=options["tol"])
        if output:
            save(session, output, depths.layers_tensors(result), **settings)
    sections.finish(session, content, output_format, output, layers=depths.show_layers)
