"""`ggjac verify`: the same tokens, logits and layers as llama.cpp?"""

import math
from pathlib import Path
from typing import Any

import click

from ggjac.cli.help import Command
from ggjac.cli.options import Many, ModelOptions, many_options, model_options, output, tabular_format
from ggjac.cli.planning import dry_run


@click.command(cls=Command)
@model_options()
@many_options
@dry_run
@click.option(
    "--strict",
    is_flag=True,
    help="Let llama.cpp run a temporary copy of the file rewritten as F32 (4 bytes per weight); everything must then "
    "agree to rounding.",
)
@click.option(
    "--count",
    "shown",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Tensors in the table, those that differ most.",
)
@output("With --each-line: the file of JSON lines.")
@tabular_format
def verify(what: ModelOptions, many: Many, strict: bool, shown: int, output: Path | None, output_format: str) -> None:
    """Compare tokens, logits and every layer with llama.cpp on the same file; exit code 3 if they disagree.

    On a quantized file llama.cpp rounds activations to 8 bits, so that only the top token must agree; --strict removes
    this difference. Then every layer is also compared alone, given llama.cpp's own input, where rounding does not
    accumulate and a mistake shows in no other layer.

    \b
    ggjac verify -m model.gguf --strict
    """
    from ggjac.cli.result import finish
    from ggjac.cli.session import open_session
    from ggjac.cli.studies import over_prompts
    from ggjac.studies.measures import answer_verify

    if many.each_line:
        return over_prompts(what, many, "verify", output, output_format, strict=strict)
    if output:
        raise click.UsageError("-o is for --each-line: save the JSON of one prompt with --format json > FILE")
    session = open_session(what, tapes=False)
    answer = answer_verify(session, strict=strict)

    def show_all(data: dict[str, Any]) -> None:
        show(data)
        show_layers(data, shown)

    finish(session, answer.content, output_format, results=answer.results, parity=show_all)


def show(data: dict[str, Any]) -> None:
    """Print the verdict."""
    from ggjac import display
    from ggjac.cli.render import line

    if data["verdict"] is None:
        line(f"llama.cpp: not compared: {data['reason']}")
        return
    line(f"llama.cpp ({data['mode']}): {'agrees' if data['verdict'] else 'DISAGREES'}: {data['reason']}")
    ours = "the same" if data["top1_equal"] else f"ours {display.token(data['top1_ours'])}"
    if data["kl_last"] is not None and math.isfinite(data["kl_last"]):  # not where logits are NaN
        line(
            f"  top token {display.token(data['top1'])} ({ours}), KL divergence {data['kl_last']:.2e} nats at the last "
            f"position (mean {data['kl']:.2e}), logits relative L2 {data['logits_error']:.2e}"
        )
    if data["amplification"]:
        line(f"  rounding of our own reaches {data['amplification']:.0f} eps in the last layer: the model amplifies it")
    if data["cause"]:
        line(f"  expected: {data['cause']}")


def show_layers(data: dict[str, Any], count: int) -> None:
    """Print the distances of the tensors that differ most, those beyond a tolerance before all others."""
    from ggjac.cli.render import line, table

    local = {e["name"]: e for e in data["local"]}
    limit = math.inf if data["tolerance"] is None or data["verdict"] else data["tolerance"]

    def departed(e: dict[str, Any]) -> bool:
        own = local.get(e["name"])
        return not e["error"] <= limit or (own is not None and not own["error"] <= own["tolerance"])

    def badness(e: dict[str, Any]) -> tuple[bool, float]:
        return departed(e), math.inf if math.isnan(e["error"]) else e["error"]

    worst = sorted(data["layers"], key=badness, reverse=True)[:count]
    shown = [e for e in data["layers"] if e in worst]  # in the order of the network
    if not shown:
        return
    rows = [[e["name"], f"{e['error']:.1e}", e["worst_position"], f"{e['worst_error']:.1e}"] for e in shown]
    columns = ["tensor", "#relative L2", "#worst position", "#error there"]
    if local:
        columns.append("#given its input")
        for row in rows:
            row.append(f"{local[row[0]]['error']:.1e}" if row[0] in local else "")
    line("")
    table("Layers against llama.cpp", columns, rows, {i for i, e in enumerate(shown) if departed(e)})
    if more := len(data["layers"]) - len(shown):
        line(f"{more} more, which differ less: --count {len(data['layers'])} or --format json")
