"""`ggjac contrast`: the output reconstructed with and without freezing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ggjac.cli.help import Command
from ggjac.cli.options import ModelOptions, model_options, output, position, tabular_format, top
from ggjac.cli.planning import dry_run


@click.command(cls=Command)
@model_options()
@dry_run
@position
@top("Number of most likely tokens to compare.", 10)
@output("Save `y`, `linear_output` (J x), `offset`, `ordinary_output` [d] and `ids` [n] to this safetensors file.")
@tabular_format
def contrast(what: ModelOptions, position: int, top: int, output: Path | None, output_format: str) -> None:
    """Reconstruct the output with the detached and with the ordinary Jacobian, and compare both with the output.

    The ordinary Jacobian is the derivative with nothing frozen, computed exactly by automatic differentiation of the
    same streamed blocks. The detached Jacobian reproduces the output; the ordinary one need not. Exit code 3 if the
    detached one does not.

    \b
    ggjac contrast -m model.gguf -p "The capital of France is"
    """
    from ggjac.analysis.contrast import contrast
    from ggjac.cli.result import finish
    from ggjac.cli.session import open_session

    session = open_session(what, position=position, output=output)
    content: dict[str, Any] = {"reconstruction": session.reconstruction().data()}
    result = session.run("contrast", contrast, top=top)
    content["contrast"] = result.data()
    if output:
        J = session.jacobian
        rebuilt = {"linear_output": J.linear_output, "ordinary_output": result.ordinary.to(J.linear_output.dtype)}
        session.save(output, {"y": J.output, "offset": J.offset} | rebuilt)
    finish(session, content, output_format, output, results=[result], contrast=show)


def show(data: dict[str, Any]) -> None:
    """Print every measure for both reconstructions."""
    from ggjac.cli.render import line, table

    measures: dict[str, Callable[[dict[str, Any]], str]] = {
        "‖r - y‖/‖y‖": lambda a: f"{a['error']:.2e}",
        "std(r - y)/std(r)": lambda a: f"{a['std_ratio']:.2e}",
        "std(r - y)/std(y)": lambda a: f"{a['std_ratio_output']:.2e}",
        "max |r - y|": lambda a: f"{a['max_abs']:.2e}",
        "Pearson correlation": lambda a: f"{a['pearson']:.6f}",
        "Spearman correlation": lambda a: f"{a['spearman']:.6f}",
        "after the head: same top token": lambda a: "yes" if a["top1"] else "no",
        f"after the head: shared among the top {data['detached']['top']}": lambda a: f"{a['top_agreement']:.0%}",
        "after the head: KL divergence, nats": lambda a: f"{a['kl']:.2e}",
    }
    rows = [(name, shown(data["detached"]), shown(data["ordinary"])) for name, shown in measures.items()]
    table(
        "Reconstruction r of the output y: detached r = J x + offset, ordinary r = (∂y/∂x) x",
        ["", "#detached", "#ordinary"],
        rows,
    )
    line("")
