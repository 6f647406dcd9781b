"""`ggjac attribute --reads`: the heads that are named, and the table of what they read."""

import re
from typing import TYPE_CHECKING, Any

import click

from ggjac import display
from ggjac.cli.shares import asked_logit
from ggjac.sizes import HEADS_READ

if TYPE_CHECKING:
    from ggjac.session import Session

LARGEST = "largest"
NOTE = (
    "A share is pattern x value x output: a head may look at a position (weight) and read nothing that counts for the "
    "logit (share)."
)
Heads = list[tuple[int, int]] | str


class HeadNames(click.ParamType):
    """Heads by block and number, `L5H3,L7H1`, or `largest`."""

    name = "heads"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Heads:
        """Parse `L5H3,L7H1` to pairs of numbers."""
        if isinstance(value, list) or value == LARGEST:
            return value
        found = [re.fullmatch(r"L(\d{1,6})H(\d{1,6})", part.strip(), re.ASCII) for part in str(value).split(",")]
        if None in found:
            self.fail(f"{str(value)[:60]!r} are not heads; give some as L5H3,L7H1, or {LARGEST}", param, ctx)
        return [(int(one[1]), int(one[2])) for one in found if one]


reads_option = click.option(
    "--reads",
    type=HeadNames(),
    metavar="HEADS",
    help="With --by head, split these heads' shares by the positions whose values they read: L5H3,L7H1, or largest "
    f"(the {HEADS_READ} largest).",
)


def check_heads(session: "Session", heads: Heads) -> None:
    """Refuse heads that the model does not have.

    Raises:
        click.UsageError: there is no such head.
    """
    from ggjac.config import find_head

    try:
        for layer, head in heads if isinstance(heads, list) else []:
            find_head(session.model.config, layer, head)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def show_reads(data: dict[str, Any]) -> None:
    """Print for each head its pattern's row and its shares by source position."""
    from ggjac.cli.render import bar, line, table

    line("")
    for head in data["heads"]:
        largest = max(abs(source["share"]) for source in head["sources"]) or 1.0
        rows: list[tuple] = [
            (
                source["position"], display.token(source),
                "" if source["weight"] is None else f"{source['weight']:.4f}",
                f"{source['share']:+.4f}", bar(source["share"], largest),
            )
            for source in head["sources"]
        ]  # fmt: skip
        if head["constant"]:
            rows.append(("", "constant (biases)", "", f"{head['constant']:+.4f}", ""))
        rows.append(("", "sum", "", f"{head['share'] - head['unexplained']:+.4f}", f"head {head['share']:+.4f}"))
        kind = "" if head["mixer"] == "attention" else f" ({head['mixer']})"
        name = f"What L{head['layer']}H{head['head']}{kind} reads, in {asked_logit(data)}"
        table(name, ["#position", "token", "#pattern", "#share", ""], rows)
    line(NOTE)
    line("")
