"""`ggjac reach`: how far the map of one prompt holds for changed prompts, and what tokens do when they are left out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ggjac import display
from ggjac.cli.apart import Apart, Needs, apart
from ggjac.cli.effects import show_effects
from ggjac.cli.help import Command
from ggjac.cli.options import (
    ModelOptions,
    Numbers,
    TokenIds,
    iteration_options,
    model_options,
    output,
    position,
    tabular_format,
)
from ggjac.cli.planning import dry_run
from ggjac.cli.shares import ALL, asked_logit
from ggjac.cli.shares import CAVEAT as OF_SHARES
from ggjac.sizes import ABLATIONS, STEPS
from ggjac.units import edit_path

if TYPE_CHECKING:
    from ggjac.directions import Direction
    from ggjac.session import Session

RULES = (
    Needs(["--layer"], ["--direction"]),
    Apart(["--toward"], "names the other prompt by its text", ["--toward-tokens"]),
)
CAVEAT = (
    "no change: the error of predicting the prompt's own output. A map that is not below it says nothing about such a "
    "change."
)


@click.command(cls=Command)
@model_options()
@apart(*RULES)
@dry_run
@position
@click.option("--target", help="Token whose logit is predicted, a text or its id, as id:4.  [default: the likeliest]")
@click.option("--versus", help="Token whose logit is subtracted, named like --target.")
@click.option(
    "--swap",
    "swaps",
    multiple=True,
    metavar="A=B",
    help="Move the embedding of a token, named by its text or position, to that of another one; may be repeated.",
)
@click.option("--toward", metavar="TEXT", help="Move all embeddings to those of this prompt, of as many tokens.")
@click.option("--toward-tokens", type=TokenIds(), help="Token ids, such as 1,2,3, instead of the other prompt's text.")
@click.option(
    "--direction",
    metavar="FILE[:NAME]",
    help="Step along this direction of the residual stream, such as a control vector's, added at all positions; and "
    "along random ones in its place.",
)
@click.option(
    "--layer",
    type=click.IntRange(min=0),
    help="Blocks after which --direction is added.  [default: a control vector's own, else 0: the embeddings]",
)
@click.option(
    "-k",
    "--rank",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of right singular vectors along which to step, and of random directions.",
)
@click.option(
    "--steps",
    type=Numbers("steps", "ascending numbers above 0", "0.01,0.1,1", ascending=True),
    default=",".join(map("{:g}".format, STEPS)),
    show_default=True,
    help="Steps: parts of the way, or lengths relative to the embeddings'.",
)
@click.option(
    "--ablate",
    type=click.Choice([*ABLATIONS, "none"]),
    default="mean",
    show_default=True,
    help="Leave each token out: drawn tokens take its place, the mean embedding, or zero.",
)
@iteration_options
@output(
    "Save the curves, [paths, steps] each, and the effects and scores, [m], and `ids` [n] to this safetensors file."
)
@tabular_format
def reach(
    what: ModelOptions,
    position: int,
    target: str | None,
    versus: str | None,
    swaps: tuple[str, ...],
    toward: str | None,
    toward_tokens: list[int] | None,
    direction: str | None,
    layer: int | None,
    rank: int,
    steps: list[float],
    ablate: str,
    tol: float,
    max_sweeps: int,
    seed: int,
    output: Path | None,
    output_format: str,
) -> None:
    """Compare what the frozen map predicts for changed prompts with what the model itself then computes.

    The map is exact at its own prompt. For changed embeddings it is a prediction, as is that of the ordinary Jacobian;
    their errors are shown beside that of predicting no change at all. Then each token is left out in turn, and its
    effect on a logit stands beside its share, gradient x input, and attention rollout. Edited prompts run many at a
    time: the weights are read once for all of them. Exit code 3 if the reconstruction error is out of bounds.

    \b
    ggjac reach -m model.gguf -p "The capital of France is" --swap "France=Italy"
    """
    from ggjac.analysis.reach import reach as run
    from ggjac.cli.result import finish
    from ggjac.cli.session import check_difference, note_likelier, one_token, open_session, usage_errors

    session = open_session(what, position=position, rank=rank, output=output)
    ids = one_token(session, target), one_token(session, versus, "--versus")
    check_difference(session, *ids)
    options: dict[str, Any] = {"rank": rank, "steps": steps, "tol": tol, "max_sweeps": max_sweeps, "seed": seed}
    options["ablate"] = None if ablate == "none" else ablate
    with usage_errors():
        options["swaps"] = [swapped(session, given) for given in swaps]
        other = toward_tokens if toward is None else what.read(toward)
        if other is not None:
            options["toward"] = session.model.prompt_ids(other, parse_special=what.parse_special)
        options["direction"] = None if direction is None else read(session, direction, layer)
        content: dict[str, Any] = {"reconstruction": session.reconstruction().data()}
        found = session.run("reach", run, session.model, *ids, **options)
    note_likelier(session, target, ids[0])
    note_likelier(session, versus, ids[1], "--versus")
    if output:
        session.save(output, found.tensors(), versus=ids[1])
    content["reach"] = found.data(session.words)
    finish(session, content, output_format, output, results=[found], reach=show)


def swapped(session: "Session", given: str) -> tuple[int, int]:
    """Return a position and the id of the token that is to stand there, from `Marin=Sausalito` or `3=id:42`.

    Raises:
        click.UsageError: there is no such token, or it occurs several times.
    """
    from ggjac.cli.session import one_token

    old, equals, new = given.partition("=")
    if not equals or not old or not new:
        raise click.UsageError(f"--swap {given!r} names no two tokens; write them as Marin=Sausalito, or 3=id:42")
    model, ids = session.model, session.ids[: session.position + 1]
    if old.isascii() and old.isdigit():
        place = int(old) if len(old) < 20 else len(ids)
        if place >= len(ids):
            raise click.UsageError(f"--swap: the output depends on positions 0 to {len(ids) - 1}, not on {old}")
        return place, one_token(session, new, "--swap") or 0
    for space in ("", " "):
        spelled = model.spelled(space + old.replace("␣", " "))
        places = [i for i, id in enumerate(ids) if [id] == spelled]
        if len(places) > 1:
            raise click.UsageError(f"--swap: {old} stands at positions {', '.join(map(str, places))}; name one, as "
                                   f"{places[0]}={new}")  # fmt: skip
        if places:
            spaced = space + new.replace("␣", " ")
            return places[0], one_token(session, spaced if len(model.spelled(spaced)) == 1 else new, "--swap") or 0
    words = model.words(model.spelled(f" {old}"))
    raise click.UsageError(f"--swap: {old!r} is not a token of the prompt (it would be {words}); name a position, as "
                           f"3={new}")  # fmt: skip


def read(session: "Session", asked: str, layer: int | None) -> "Direction":
    """Return a direction from a file, and the depth at which it is added.

    Raises:
        click.UsageError: it cannot be read, or there is no such depth.
    """
    from ggjac.directions import DirectionError, read_direction

    config = session.model.config
    try:
        sizes = sorted({config.width(i) for i in range(config.block_count)})
        found = read_direction(asked, sizes, layer=layer)
    except DirectionError as error:
        raise click.UsageError(f"--direction: {error}") from error
    at = layer if layer is not None else found.layer or 0
    if at >= config.block_count:
        raise click.UsageError(f"--layer {at} is out of range; the stream is changed after 0 to "
                               f"{config.block_count - 1} blocks")  # fmt: skip
    return found._replace(layer=at)


def show(data: dict[str, Any]) -> None:
    """Print where the errors along each path pass 10 % and 50 %, the errors at its end, and the tokens' effects."""
    from ggjac.cli.render import line, table
    from ggjac.units import passing

    names, rows = ("unchanged", "detached", "ordinary"), []
    for curve in data["curves"]:
        first, last = curve["points"][0], curve["points"][-1]
        for name in (name for name in names if name in last):
            passes = [passing(curve["passes"][name][level], first["t"], last["t"]) for level in ("0.1", "0.5")]
            errors = [f"{point[name]:.1%}" for point in (first, last)]
            rows.append((_path(curve) if name == "unchanged" else "", PREDICTIONS[name], *passes, *errors))
    if rows:
        first, last = (data["curves"][0]["points"][i]["t"] for i in (0, -1))
        columns = ["path", "prediction", "#10 % at", "#50 % at", f"#error at {first:g}", f"#at {last:g}"]
        rule = f"mlp-path {data['mlp_path']}"
        table(f"Error of the predicted output, relative to its length, along paths of edits ({rule})", columns, rows)
        line(CAVEAT)
        if data["residual"] > data["tol"]:
            line(
                f"NOT converged to {data['tol']:.0e}: the right singular vectors have residuals of up to "
                f"{data['residual']:.0e}"
            )
        line("")
    if data["effects"]:
        show_effects(data["effects"], asked_logit(data), ALL)
        line(OF_SHARES)


PREDICTIONS = {"unchanged": "no change", "detached": "detached map", "ordinary": "ordinary map"}


def _path(curve: dict[str, Any]) -> str:
    """Return a path of edits in words, safe for a terminal."""
    kind, name = curve["kind"], display.visible(curve["name"])
    tokens = (display.token(curve["token"]), display.token(curve["other"])) if kind == "swap" else None
    return edit_path(kind, name, tokens=tokens, layer=curve.get("layer"))
