"""`ggjac plan`: will it fit, and how long will it take. The memory part imports no torch."""

import click

from ggjac.cli.options import ModelOptions, model_options, output_format, position
from ggjac.planner.work import JOBS


@click.command()
@model_options()
@position
@click.option("-k", "--rank", type=click.IntRange(min=1), default=8, show_default=True, help="Triplets.")
@click.option(
    "--for",
    "command",
    type=click.Choice(list(JOBS)),
    default="svd",
    show_default=True,
    help="The command to plan, with its usual options; its own --dry-run takes others.",
)
@click.option("--no-bench", is_flag=True, help="Memory only: do not measure this machine for some two seconds.")
@output_format
def plan(what: ModelOptions, position: int, rank: int, command: str, no_bench: bool, output_format: str) -> None:
    """Tell whether a job fits and how long it takes: bytes per layer, peak memory, FLOP, sweeps, time.

    Nothing is computed but two seconds of measurements: this machine's disk, dequantization and multiplication. Exit
    code 4 if the budget cannot work.

    \b
    ggjac plan -m model.gguf -p "The bridge out of Marin is the" --ram-budget 2GiB
    """
    from ggjac.cli.planning import show_plan

    options = {"rank": rank, "position": position}
    show_plan(what, command, options, bench=not no_bench, output_format=output_format)
