"""`ggjac analyze`: the main job, from a prompt to a run folder."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ggjac.cli import together
from ggjac.cli.help import Command
from ggjac.cli.options import (
    Listed,
    ModelOptions,
    calibrate,
    depths_of,
    hide_special,
    model_options,
    output,
    output_format,
    per_token,
    position,
    resume,
    scores,
    search_dtype,
    spectrum_options,
    top,
)
from ggjac.cli.planning import dry_run
from ggjac.cli.svd import compared_with

if TYPE_CHECKING:
    from ggjac.analysis.analyze import Show
    from ggjac.session import Session


@click.command(cls=Command)
@model_options(exclude=True)
@compared_with
@dry_run
@position
@spectrum_options
@search_dtype
@top("Tokens per vector.")
@hide_special
@scores
@calibrate
@click.option("--no-verify", is_flag=True, help="Do not compare with llama.cpp.")
@click.option("--layers", type=Listed("layers"), help="Also decompose the maps of these depths: all, or 0,10-20,-1.")
@per_token("Also decompose each position's own map.")
@click.option("--contrast", is_flag=True, help="Also reconstruct the output with the ordinary Jacobian.")
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
    search_dtype: str,
    top: int,
    hide_special: bool,
    calibrate: list[str] | None,
    no_verify: bool,
    layers: str | None,
    per_token: bool,
    input_position: str | None,
    contrast: bool,
    output: Path | None,
    resume: bool,
    output_format: str,
) -> None:
    """Analyse a prompt: prediction, parity with llama.cpp, singular vectors, attribution; write a run folder.

    The folder holds report.html (to look at), run.json (all results, with their provenance) and tensors.safetensors (U,
    S, Vh, residual, x, y, offset, linear_output, logits, shares, ids; with --contrast, ordinary_output; with
    --per-token, token_position, token_U, token_S, token_Vh, token_residual; with --layers, the tensors of `ggjac
    layers`). The report and run.json also have direct logit attribution to blocks and heads. Exit code 3 if a check
    fell outside its tolerance.

    \b
    ggjac analyze -m model.gguf -p "The bridge out of Marin is the"
    """
    from ggjac.analysis.analyze import check_same, finished, run, run_folder
    from ggjac.cli.render import emit_json, line
    from ggjac.cli.result import failed
    from ggjac.cli.session import check_resume, open_session, show_doubts, show_saved
    from ggjac.gguf import shown
    from ggjac.report.summary import plain, sentences
    from ggjac.runs import load_run

    check_resume(output, resume)
    session = open_session(what, position=position, rank=rank)
    depths = None if layers is None else depths_of(layers, session.model.config.block_count)
    place = together.here()
    there = bool(resume and output and finished(output))
    if place and place.agreed(there) and place.rank:  # the first one says so
        return
    options: dict[str, Any] = {"rank": rank, "tol": tol, "max_sweeps": max_sweeps, "seed": seed, "top": top}
    options["hide_special"] = hide_special
    parts: dict[str, Any] = {"verify": not no_verify, "layers": depths, "per_token": per_token, "contrast": contrast}
    parts |= {"input_position": input_position, "search_dtype": search_dtype, "calibrate": calibrate}
    if there and output:
        check_same(session, output, **options, **parts)
        content = load_run(output)
        if output_format == "json":
            emit_json(content | {"run_folder": str(output)})
        else:
            line(f"{shown(output)}: is finished; there is nothing to resume")
        ctx.exit(3 if failed(content) else 0)
    as_table = output_format == "table"
    show = _shower(session) if as_table else lambda key, data: None
    if place and place.rank:
        output = together.scratch() / "run"
        output.mkdir()
    with run_folder(output, session.model.title) as folder:
        content = run(session, folder, resume=resume, show=show, **options, **parts)
    if as_table:
        line("")
        for sentence in sentences(content):
            line(plain(sentence))
        line("")
        show_doubts(content["model"])
        show_saved(folder)
        show_saved(folder / "report.html")
    else:
        emit_json(content | {"run_folder": str(folder)})
    if failed(content):
        ctx.exit(3)


def _shower(session: "Session") -> "Show":
    """Return what prints each part of the result as it comes."""
    from ggjac.cli import attribute, contrast, layers, predict, result, svd, verify
    from ggjac.cli.session import show_tokens

    def show_prompt(tokens: Any) -> None:
        show_tokens(tokens, session.warnings)
        result.show_excluded(session)

    parts: dict[str, Callable[[Any], None]] = {
        "tokens": show_prompt,
        "predictions": predict.show,
        "parity": verify.show,
        "reconstruction": result.show_reconstruction,
        "svd": svd.show,
        "stable_rank": svd.show_stable_rank,
        "attribution": attribute.show,
        "contrast": contrast.show,
        "per_token": svd.show_per_token,
        "layers": layers.show,
    }
    return lambda key, data: parts[key](data)
