"""A direction in `ggjac attribute`: its options, and the command's way with it."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ggjac.checks import Place
from ggjac.cli.options import Many, ModelOptions

if TYPE_CHECKING:
    from ggjac.session import Session

_OPTIONS = (
    click.option(
        "--direction",
        metavar="FILE[:NAME]",
        help="Split, in place of a logit, the projection on a vector of a safetensors, npy or GGUF file, such as "
        "svd.safetensors:U[0], a control vector, or model.gguf:output.weight[412]-[97]; or on entropy or fisher:K of "
        "the next token.",
    ),
    click.option(
        "--layer",
        type=int,
        metavar="N",
        help="Of --direction: where, in blocks applied.  [default: where a control vector is added]",
    ),
    click.option(
        "--at",
        type=click.Choice(["layer", "attn", "mlp", "output"]),
        help="Of --direction: what is projected, the stream, what that branch adds, or the output.  [default: layer; "
        "output for entropy and fisher]",
    ),
)


class Along(NamedTuple):
    """What is projected on which direction, as the options give it."""

    direction: str | None
    layer: int | None
    at: Place | None


def direction_options(command: Callable) -> Callable:
    """Add the options of a projection, passed on as one argument, `along`."""

    @wraps(command)
    def wrapped(*args: Any, direction: str | None, layer: int | None, at: Place | None, **rest: Any) -> Any:
        return command(*args, along=Along(direction, layer, at), **rest)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


@contextlib.contextmanager
def directed() -> Iterator[None]:
    """Turn errors of a direction into usage errors."""
    from ggjac.directions import DirectionError

    try:
        yield
    except DirectionError as error:
        raise click.UsageError(f"--direction: {error}") from error


def check_direction(session: "Session", along: Along) -> None:
    """Refuse a direction that cannot be read, or does not fit, before any work starts.

    Raises:
        click.UsageError: it is such a one.
    """
    from ggjac.checks import computed
    from ggjac.studies.measures import read_along

    if along.direction is not None and computed(along.direction) is None:
        with directed():
            read_along(session.model, along.direction, along.at, along.layer)


def projection(
    what: ModelOptions,
    many: Many,
    along: Along,
    output: Path | None,
    output_format: str,
    *,
    position: int,
    by: str,
    count: int | None,
) -> None:
    """Split the projection on a direction, and print the shares; `count` parts in the tables.

    Raises:
        click.UsageError: an option is out of range.
    """
    from ggjac.cli.result import finish
    from ggjac.cli.session import open_session
    from ggjac.cli.shares import ALL, show
    from ggjac.cli.studies import over_prompts
    from ggjac.shares import largest
    from ggjac.studies.measures import answer_projection

    options: dict[str, Any] = {"along": along.direction, "layer": along.layer, "at": along.at, "by": by}
    if many.each_line:
        with directed():
            return over_prompts(what, many, "projection", output, output_format, position=position, **options)
    session = open_session(what, position=position, output=output)
    check_direction(session, along)
    with directed():
        found = answer_projection(session, **options)
    if output:
        session.save(output, found.tensors, **options)
    shown, cut = partial(show, count=count), partial(largest, count=count or ALL)
    finish(session, found.content, output_format, output, results=found.results, cut=cut, attribution=shown)
