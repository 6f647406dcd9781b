"""`ggjac plan`: whether a command fits into memory, and how long it takes. The memory part imports no torch."""

import click

from ggjac.cli import COMMANDS, WITHOUT_PROMPT
from ggjac.cli.options import ModelOptions, model_options, output_format, position


@click.command()
@model_options()
@position
@click.option(
    "-k", "--rank", type=click.IntRange(min=1), default=8, show_default=True, help="Number of singular triplets."
)
@click.option(
    "--for",
    "command",
    type=click.Choice([name for name in COMMANDS if name not in WITHOUT_PROMPT]),
    default="svd",
    show_default=True,
    help="Command to plan, with its default options; for others use its own --dry-run.",
)
@click.option("--no-bench", is_flag=True, help="Memory only: skip the measurement of this machine, about two seconds.")
@output_format
def plan(what: ModelOptions, position: int, rank: int, command: str, no_bench: bool, output_format: str) -> None:
    """Predict whether a command fits into memory, and how long it takes: bytes per layer, peak memory, sweeps, time.

    Nothing is computed except for two seconds of measurements of this machine: disk, dequantization and multiplication.
    Exit code 4 if it does not fit into the budget.

    \b
    ggjac plan -m model.gguf -p "The bridge out of Marin is the" --ram-budget 2GiB
    """
    from ggjac.cli.planning import show_plan

    options = {"rank": rank, "position": position}
    show_plan(what, command, options, bench=not no_bench, output_format=output_format)
