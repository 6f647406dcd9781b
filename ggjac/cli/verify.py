"""`ggjac verify`: the same tokens, logits and layers as llama.cpp?"""

from typing import Any

import click

from ggjac.cli.options import ModelOptions, model_options, tabular_format
from ggjac.cli.planning import dry_run


@click.command()
@model_options()
@dry_run
@click.option(
    "--strict",
    is_flag=True,
    help="Let llama.cpp run a temporary copy of the file rewritten as F32 (4 bytes per weight); everything must then "
    "agree to rounding.",
)
@tabular_format
def verify(what: ModelOptions, strict: bool, output_format: str) -> None:
    """Compare tokens, logits and every layer with llama.cpp on the same file; exit code 3 if they disagree.

    On a quantized file llama.cpp rounds activations to 8 bits, so that only the top token must agree; --strict removes
    this difference. Then every layer is also compared alone, given llama.cpp's own input, where rounding does not
    accumulate and a mistake shows in no other layer.

    \b
    ggjac verify -m model.gguf --strict
    """
    from ggjac.cli.result import finish
    from ggjac.cli.session import open_session

    session = open_session(what, tapes=False)
    result = session.verify(strict=strict)
    content = {"parity": result.data(session.words)}
    finish(session, content, output_format, result=result, parity=show)


def show(data: dict[str, Any]) -> None:
    """Print the verdict, and the per-layer table where there is one."""
    from ggjac import display
    from ggjac.cli.render import line, table

    if data["verdict"] is None:
        line(f"llama.cpp: not compared: {data['reason']}")
        return
    if data["layers"]:
        local = {e["name"]: e for e in data["local"]}
        rows = [
            [e["name"], f"{e['error']:.1e}", e["worst_position"], f"{e['worst_error']:.1e}"] for e in data["layers"]
        ]
        columns = ["tensor", "#relative L2", "#worst position", "#error there"]
        if local:
            columns.append("#given its input")
            for row in rows:
                row.append(f"{local[row[0]]['error']:.1e}" if row[0] in local else "")
        limit = float("inf") if data["tolerance"] is None or data["verdict"] else data["tolerance"]
        departed = {
            i
            for i, e in enumerate(data["layers"])
            if not e["error"] <= limit
            or (e["name"] in local and not local[e["name"]]["error"] <= local[e["name"]]["tolerance"])
        }
        table("Every layer against llama.cpp", columns, rows, departed)
    line(f"llama.cpp ({data['mode']}): {'agrees' if data['verdict'] else 'DISAGREES'}: {data['reason']}")
    line(
        f"  top token {display.token(data['top1'])} ({'the same' if data['top1_equal'] else 'ours differs'}), "
        f"KL divergence {data['kl_last']:.2e} nats (mean over positions {data['kl']:.2e}), "
        f"logits relative L2 {data['logits_error']:.2e}"
    )
    if data["amplification"]:
        line(f"  rounding of our own reaches {data['amplification']:.0f} eps in the last layer: the model amplifies it")
    if data["cause"]:
        line(f"  expected: {data['cause']}")
