"""`ggjac plan`: whether a command fits into memory, and how long it takes. The memory part imports no torch."""

import click

from ggjac.cli import COMMANDS, WITHOUT_PROMPT
from ggjac.cli.options import ModelOptions, model_options, output_format, position


@click.command()
@model_options()
@position
@click.option(
    "-k",
    "--rank",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Number of singular vectors.",
)
@click.option(
    "--for",
    "command",
    type=click.Choice([name for name in COMMANDS if name not in WITHOUT_PROMPT]),
    default="svd",
    show_default=True,
    help="Command to plan, with its default options; for other options, use the command's own --dry-run.",
)
@click.option("--no-bench", is_flag=True, help="Do not measure this machine (about two seconds): plan without times.")
@output_format
def plan(what: ModelOptions, position: int, rank: int, command: str, no_bench: bool, output_format: str) -> None:
    """Predict whether a command fits in memory and how long it will take: bytes per layer, peak memory, sweeps, time.

    The command itself is not run; only this machine is measured, for two seconds: disk, dequantization and
    multiplication. Exit code 4 if the command does not fit in the budget.

    \b
    ggjac plan -m model.gguf -p "The bridge out of Marin is the" --ram-budget 2GiB
    """
    from ggjac.cli.planning import show_plan

    options = {"rank": rank, "position": position}
    show_plan(what, command, options, bench=not no_bench, output_format=output_format)
