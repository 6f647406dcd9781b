"""`ggjac plan`: whether a command fits into memory, and how long it takes. The memory part imports no torch."""

import click

from ggjac.cli import COMMANDS, WITHOUT_PROMPT
from ggjac.cli.help import Command
from ggjac.cli.options import (
    RATE,
    ModelOptions,
    given,
    model_options,
    output_format,
    per_token,
    positions,
    rank,
    search_dtype,
)
from ggjac.cli.planning import Shared, show_plan, without_bench
from ggjac.planner.network import LATENCY

SEARCHING = ("analyze", "svd", "layers", "ranks")  # commands with `--search-dtype`


@click.command(cls=Command)
@model_options()
@positions
@rank
@search_dtype
@click.option(
    "--for",
    "command",
    type=click.Choice([name for name in COMMANDS if name not in WITHOUT_PROMPT]),
    default="svd",
    show_default=True,
    help="Command to plan, with its default options; for other options, use the command's own --dry-run.",
)
@per_token("Plan also each position's own map (of svd and analyze).")
@click.option(
    "--ranks",
    type=click.IntRange(1),
    help="Plan one of so many processes that share the model, as under torchrun, each on a machine like this one (or "
    "with -t, on so many of its CPUs), and show its time beside that of one process alone.",
)
@click.option(
    "--net", type=RATE, metavar="RATE", help="Network between them, as 10Gb (bits) or 300GB (bytes) a second."
)
@click.option(
    "--latency",
    type=click.FloatRange(0, 1e6),
    default=LATENCY * 1e6,
    show_default=True,
    metavar="MICROSECONDS",
    help="Until a small message has arrived there.",
)
@without_bench
@output_format
def plan(
    what: ModelOptions,
    position: int | str,
    rank: int,
    search_dtype: str,
    command: str,
    per_token: bool,
    input_position: str | None,
    ranks: int | None,
    net: float | None,
    latency: float,
    no_bench: bool,
    output_format: str,
) -> None:
    """Predict whether a command fits in memory and how long it will take: bytes per layer, peak memory, sweeps, time.

    The command itself is not run; only this machine is measured, for two seconds: disk, dequantization and
    multiplication. Exit code 4 if the command does not fit in the budget.

    \b
    ggjac plan -m model.gguf -p "The bridge out of Marin is the" --ram-budget 2GiB
    """
    if per_token and command not in ("analyze", "svd"):
        raise click.UsageError(f"--per-token is an option of analyze and svd; {command} has no such option")
    if given("search_dtype") and command not in SEARCHING:
        raise click.UsageError(f"--search-dtype is an option of {', '.join(SEARCHING)}; {command} has no such option")
    if isinstance(position, str) and command != "attribute":
        raise click.UsageError(f"--position {position} is for attribute; give a position of {command}")
    if ranks is None and net is not None:
        raise click.UsageError("--net is the network between --ranks processes; give their number, as --ranks 2")
    options = {"rank": rank, "position": position, "per_token": per_token, "input_position": input_position}
    if command in SEARCHING:
        many = command == "ranks"  # which leaves nothing to the machine
        options["search_dtype"] = "same" if many and search_dtype == "auto" else search_dtype
    shared = Shared(ranks, net, latency / 1e6) if ranks else None
    show_plan(what, command, options, bench=not no_bench, output_format=output_format, shared=shared)
