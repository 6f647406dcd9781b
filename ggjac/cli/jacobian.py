"""`ggjac jacobian`: the dense map, streamed to its file."""

import contextlib
from pathlib import Path
from typing import Any

import click

from ggjac.cli.help import Command
from ggjac.cli.options import (
    MEAN,
    Many,
    ModelOptions,
    many_options,
    model_options,
    output,
    position,
    resume,
    tabular_format,
)
from ggjac.cli.planning import dry_run


@click.command(cls=Command)
@model_options()
@many_options(flag="--mean", words=MEAN)
@dry_run
@position
@output(
    "Save `jacobian` [d, n, d], `x` [n, d], `y` [d], `offset` [d] and `ids` [n], or with --mean `map` [d, d], `S`, "
    "`error` and `S_of_mean` [d], to this safetensors file."
)
@resume
@tabular_format
def jacobian(
    what: ModelOptions, many: Many, position: int, output: Path | None, resume: bool, output_format: str
) -> None:
    """Compute the dense detached Jacobian, and the contribution of each position to the output.

    The matrix is computed and written a chunk of rows at a time, and never exists whole in memory. Exit code 3 if it
    does not reproduce the output. With --mean: the mean over prompts of the part that reads the output position, and
    the mean of each of its singular values.

    \b
    ggjac jacobian -m model.gguf -p "The capital of France is" -o jacobian.safetensors
    """
    from ggjac.analysis.jacobian import dense, saved
    from ggjac.cli.result import finish
    from ggjac.cli.session import check_resume, open_session
    from ggjac.cli.studies import average
    from ggjac.session import checkpoint

    if many.each_line:
        return average(what, many, output, output_format, position=position)
    check_resume(output, resume)
    session = open_session(what, position=position, output=output)
    saving = saved(session, output) if output else contextlib.nullcontext()
    with session.checkpointed(checkpoint(output), resume=resume, output=output), saving as sink:
        result = session.run("jacobian", dense, sink)
    content = {"jacobian": result.data(session.words)}
    finish(session, content, output_format, output, results=[result], jacobian=show)


def show(data: dict[str, Any]) -> None:
    """Print what each position contributes, and the reconstruction error of the dense matrix."""
    from ggjac import display
    from ggjac.cli.render import line, numbers, table
    from ggjac.cli.result import show_reconstruction

    columns = ["#position", "token", "#‖J_i‖_F", "#‖J_i x_i‖"]
    positions = data["positions"]
    norms = (numbers([p[key] for p in positions]) for key in ("frobenius", "contribution_norm"))
    rows = zip((p["position"] for p in positions), map(display.token, positions), *norms, strict=True)
    table(f"Dense detached Jacobian {' x '.join(map(str, data['shape']))}", columns, rows)
    line(f"‖J‖_F = {data['frobenius']:.4g}")
    show_reconstruction(data["reconstruction"])
