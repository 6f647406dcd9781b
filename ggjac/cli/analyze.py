"""`ggjac analyze`: the main job, from a prompt to a run folder."""

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import click

from ggjac.cli.options import (
    DepthRanges,
    Depths,
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

CHECKPOINT = "checkpoint"  # inside a run folder, while the run is not finished


@click.command()
@model_options()
@dry_run
@position
@spectrum_options
@top("Tokens per vector.")
@click.option("--no-verify", is_flag=True, help="Do not compare with llama.cpp.")
@click.option("--layers", type=Depths(), help="Decompose the maps of these depths, too: all, or 0,10-20,-1.")
@click.option("--per-token", is_flag=True, help="Also decompose each position's own map.")
@click.option("--contrast", is_flag=True, help="Rebuild the output by the ordinary Jacobian, too.")
@output("Run folder to create.  [default: ggjac-runs/MODEL-TIME]")
@resume
@output_format
@click.pass_context
def analyze(
    ctx: click.Context,
    what: ModelOptions,
    position: int,
    rank: int,
    tol: float,
    max_sweeps: int,
    seed: int,
    top: int,
    no_verify: bool,
    layers: DepthRanges | None,
    per_token: bool,
    contrast: bool,
    output: Path | None,
    resume: bool,
    output_format: str,
) -> None:
    """Analyse a prompt: prediction, parity with llama.cpp, singular vectors, attribution; write a run folder.

    The folder holds report.html (to look at), run.json (all results, and how they were made) and tensors.safetensors
    (U, S, Vh, residual, x, y, offset, linear_output, logits, shares, ids; with --contrast, ordinary_output; with
    --per-token, token_U, token_S, token_Vh, token_residual; with --layers, what `ggjac layers` saves). Page and
    run.json also have the shares of blocks and heads, and what decoded vectors are worth. Exit code 3 if a check fell
    outside its tolerance.

    \b
    ggjac analyze -m model.gguf -p "The bridge out of Marin is the"
    """
    from ggjac import gguf, runs
    from ggjac.cli import depths, render, sections, shares, vectors
    from ggjac.cli.session import Session, save
    from ggjac.report import write_report

    session = Session(what, position=position, rank=rank)
    chosen = None if layers is None else layers.of(session.model.config.block_count)
    if resume and output is None:
        raise click.UsageError("--resume goes on with a run folder that was begun; give its -o")
    folder = output or _new_folder(session.model.path.stem)
    if resume and (folder / "run.json").exists() and not (folder / CHECKPOINT).exists():
        render.line(f"{gguf.shown(folder)}: is finished; there is nothing to resume")
        return
    runs.check_folder(folder, unfinished=CHECKPOINT)
    settings: dict[str, Any] = {"rank": rank, "tol": tol, "seed": seed}
    marks = {"per_token": per_token} if per_token else {}
    content: dict[str, Any] = {}

    def part(key: str, data: Any, show: Callable[[Any], None]) -> None:
        content[key] = data
        if output_format == "table":
            show(data)

    with session.checkpointed(folder / CHECKPOINT, resume=resume, output=folder, layers=chosen, **settings, **marks):
        part("tokens", session.tokens(), lambda _: session.show_tokens())
        part("predictions", sections.predictions(session, 5), sections.show_predictions)
        if not no_verify:
            part("parity", sections.parity_or_reason(session), sections.show_parity)
        part("reconstruction", sections.reconstruction(session), sections.show_reconstruction)
        result = sections.run_spectrum(session, top=top, max_sweeps=max_sweeps, **settings)
        spectrum = sections.spectrum_data(session, result, seed, tol)
        scores = vectors.run_readability(session, result, top=top, shuffles=SHUFFLES, seed=seed)
        part("svd", spectrum | {"readability": vectors.readability_data(scores)}, sections.show_spectrum)
        part("stable_rank", sections.stable_rank_data(session, result, seed), sections.show_stable_rank)
        split = sections.run_attribution(session, content["predictions"][0]["id"])
        part("attribution", sections.attribution_data(session, split), sections.show_attribution)
        written = shares.run(session, "head", split.target, None, everywhere=False, stage="branches")
        content["branches"] = shares.data(session, "head", written)[0]
        J = session.jacobian
        rebuilt = {"linear_output": J.linear_output}
        if contrast:
            both = sections.run_contrast(session, top=10)
            part("contrast", sections.contrast_data(both), sections.show_contrast)
            rebuilt |= sections.contrast_tensors(session, both)
        inner: dict[str, Any] = {}
        if per_token:
            each = vectors.run_per_token(session, top=top, max_sweeps=max_sweeps, **settings)
            content["svd"]["per_token"] = vectors.per_token_data(session, each)
            if output_format == "table":
                vectors.show_per_token(content["svd"]["per_token"])
            inner |= vectors.tensors(each)
        if chosen is not None:
            found = depths.run_layers(session, chosen, top=top, max_sweeps=max_sweeps, **settings)
            part("layers", depths.layers_data(session, found, seed=seed, tol=tol), depths.show_layers)
            inner |= depths.layers_tensors(found)

        save(
            session,
            folder / "tensors.safetensors",
            sections.tensors(result)
            | rebuilt
            | inner
            | {"x": J.x, "y": J.output, "offset": J.offset, "logits": session.logits, "shares": split.shares},
        )
        content = session.envelope() | content
        runs.save_json(folder / "run.json", render.finite(content))
        page = write_report(folder)

    if output_format == "json":
        render.emit_json(content | {"run_folder": str(folder)})
    else:
        session.show_saved(folder)
        session.show_saved(page)
    if sections.failed(content):
        ctx.exit(3)


def _new_folder(stem: str) -> Path:
    """Name a run folder by model and time; a number tells apart two runs of the same second."""
    name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (Path("ggjac-runs") / (f"{name}-{i}" if i else name) for i in count())
    return next(folder for folder in names if not folder.exists())
