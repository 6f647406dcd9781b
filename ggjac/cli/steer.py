"""`ggjac steer`: activation steering of one prompt with the linear map of another."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ggjac.cli import together
from ggjac.cli.apart import Apart, Needs, apart
from ggjac.cli.help import Command
from ggjac.cli.options import (
    STEER_CONCEPT,
    STEER_CONTROL,
    STEER_PROMPT,
    Listed,
    ModelOptions,
    Numbers,
    TokenIds,
    given,
    model_options,
    output,
    tabular_format,
    top,
)
from ggjac.cli.planning import dry_run

if TYPE_CHECKING:
    from ggjac.model import Model
    from ggjac.results import Result
    from ggjac.session import Session

BY_DIRECTION = ("--method add", "--method remove")
RULES = (
    Needs(["--direction", "--positions", "--target", "--random"], BY_DIRECTION),
    Apart(
        BY_DIRECTION,
        "changes the stream along a direction",
        ["--concept", "--concept-tokens", "--control-concept"],
    ),
    Apart(["--export-control-vector"], "saves a vector that is the same everywhere", ["--method remove"]),
    Needs(BY_DIRECTION, ["--direction"]),
    Apart(["--first"], "is about the positions that are changed by default", ["--positions"]),
)
# Divergence in nats beyond which the steered distribution has little to do with the model's own.
LARGE = 5.0


@click.command(cls=Command)
@model_options(prompt=f"Text to continue.  [default: {STEER_PROMPT!r}]", trace=False)
@apart(*RULES)
@dry_run
@click.option(
    "--concept",
    help=f"Prompt whose linear map steers.  [default: {STEER_CONCEPT!r}; with --tokens, the prompt itself]",
)
@click.option("--concept-tokens", type=TokenIds(), help="Token ids, such as 1,2,3, instead of the concept's text.")
@click.option(
    "--layer",
    type=click.IntRange(min=0),
    help="Number of blocks that the map spans, or after which a direction is added or removed.  [default: two thirds "
    "of all; of a right vector 0, the embeddings; of a control vector its own]",
)
@click.option(
    "--strength",
    "strengths",
    type=Numbers("strengths", "numbers", "0,0.2,0.5"),
    default="0.5",
    show_default=True,
    help="Steering strength: one number, or several, such as 0,0.2,0.5; 0 = off. Of add and remove the default is 1.",
)
@click.option(
    "--method",
    type=click.Choice(["equation16", "additive", "add", "remove"]),
    default="equation16",
    show_default=True,
    help="Steering formula, as above.",
)
@click.option(
    "--direction",
    metavar="FILE[:NAME]|left:K|right:K",
    help="Of add and remove: a vector from a file, such as a control vector, or a singular vector of the prompt's own "
    "map: the K-th left one to --layer blocks, or right one from there to the output.",
)
@click.option(
    "--positions",
    type=Listed("positions"),
    help="Of add and remove: positions of the prompt that are changed, as 0,2-4,-1 or all.  [default: all but the "
    "first, and those of generated tokens too; of a left vector the last, of a right one that with most of its weight]",
)
@click.option("--target", help="Of add and remove: token whose logit is shown, a text or id:4.  [default: likeliest]")
@click.option(
    "--random",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Of add and remove: random directions of equal length, for comparison.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=12, show_default=True, help="Tokens to generate.")
@top("Number of the concept's own next tokens that count as hits; of add and remove, of next tokens in the JSON.", 5)
@click.option("--control/--no-control", default=True, show_default=True, help="Also steer with a control.")
@click.option(
    "--control-concept",
    help=f"Unrelated prompt whose map is the control.  [default: {STEER_CONTROL!r}; with token ids, a random operator]",
)
@click.option("--first", is_flag=True, help="Steer position 0, an attention sink in most models, as well.")
@click.option(
    "-s",
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    help="Seed of the random operator or directions.  [default: 0]",
)
@click.option(
    "--export-control-vector",
    "control_vector",
    type=click.Path(path_type=Path),
    callback=together.own,
    metavar="FILE",
    help="Save what the last strength adds at the prompt's last position as a control vector for llama.cpp, which adds "
    "it at every position.",
)
@output("Save the JSON of `--format json` to this file.")
@tabular_format
def steer(
    what: ModelOptions,
    concept: str | None,
    concept_tokens: list[int] | None,
    layer: int | None,
    strengths: list[float],
    method: Literal["equation16", "additive", "add", "remove"],
    direction: str | None,
    positions: str | None,
    target: str | None,
    random: int,
    max_tokens: int,
    top: int,
    control: bool,
    control_concept: str | None,
    first: bool,
    seed: int,
    control_vector: Path | None,
    output: Path | None,
    output_format: str,
) -> None:
    """Continue a prompt while the linear map of another prompt, the concept, steers its residual stream.

    With s the strength, h the residual stream at a position, and c the image of the prompt's embeddings up to that
    position under the concept's detached Jacobian:

    \b
    equation16  h <- (1 - s) h + s c          the paper's equation 16, λ = 1 - s
    additive    h <- h + (s / 2) ‖h‖ c / ‖c‖  the paper's code: c seen through the final norm, h one block earlier
    add         h <- h + s v                  v is --direction, with its own length; a singular vector has the stream's
    remove      h <- h - s v̂ ⟨v̂, h⟩           v̂ = v / ‖v‖: s = 1 projects the direction out

    For comparison, the same prompt is also continued without steering (the baseline), and steered by the map of an
    unrelated prompt (the control). A random operator, the control where the prompt or the concept is token ids, is not
    like for like: it can destroy a stream that any text's map would spare. Position 0 is spared, unless --first is
    given. add and remove ask whether a direction is causal: beside the text they show the target's logit, what the
    frozen map predicts of it, and the same push along random directions.

    \b
    ggjac steer -m model.gguf -p "I am going to Arizona to see the" --concept "The bridge is the Golden" --strength 0.5
    """
    options: dict[str, Any] = {"method": method, "layer": layer, "max_tokens": max_tokens, "top": top}
    options |= {"first": first, "seed": seed}
    if method == "add" or method == "remove":
        options |= {"strengths": strengths if given("strengths") else [1.0], "random": random if control else 0}
        return directed(what, direction or "", target, positions, options, control_vector, output, output_format)
    options |= {"strengths": strengths, "control": control}
    of_concept: dict[str, Any] = {"concept": concept, "concept_tokens": concept_tokens}
    by_concept(what, of_concept, control_concept, options, control_vector, output, output_format)


def by_concept(
    what: ModelOptions,
    concept: dict[str, Any],
    control_concept: str | None,
    options: dict[str, Any],
    control_vector: Path | None,
    output: Path | None,
    output_format: str,
) -> None:
    """Steer by the map of a concept, beside a control, and show the texts; `options` are those of `analysis.steer`.

    Raises:
        click.UsageError: an option is out of range, or two results would have one file.
    """
    from ggjac.analysis.steer import changed_layer
    from ggjac.analysis.steer import steer as run
    from ggjac.cli.session import fit_command, open_session, show_saved
    from ggjac.llamacpp.control_vector import save_control_vector
    from ggjac.model import PromptError
    from ggjac.sizes import default_layer

    layer, max_tokens = options["layer"], options["max_tokens"]
    what, of_concept = what.texts(**concept)
    session = open_session(what, output=output, fit=False)
    model, blocks = session.model, session.model.config.block_count
    layer = default_layer(blocks) if layer is None else layer
    check_control_vector(control_vector, output, what, model, changed_layer(options["method"], layer))
    try:
        ids = model.prompt_ids(of_concept, parse_special=what.parse_special)
    except PromptError as error:
        raise click.UsageError(f"--concept: {error}") from error
    if len(session.ids) + max_tokens > model.config.longest:
        raise click.UsageError(
            f"--max-tokens {max_tokens}: with the prompt's {len(session.ids)} tokens that is more than the model's "
            f"context of {model.config.longest}"
        )
    other = what.unrelated(options["control"], control_concept, concept["concept_tokens"])
    try:
        unrelated = None if other is None else model.prompt_ids(other, parse_special=what.parse_special)
    except PromptError as error:
        raise click.UsageError(f"--control-concept: {error}") from error
    n = max(len(ids), len(unrelated or ()))
    fit_command(session, n, text=len(session.ids), position=-1, other_map=unrelated is not None)
    options |= {"layer": layer, "control_concept": other}
    options |= {"parse_special": what.parse_special, "mlp_path": what.mlp_path}
    with session.stages.stage("steer") as report:
        result = run(model, session.ids, of_concept, progress=report, **options)
    content = session.envelope() | {"steering": result.data(session.words)}
    if control_vector:
        save_control_vector(
            control_vector,
            result.steered[-1].direction,
            layer=result.changed,
            block_count=blocks,
            architecture=model.config.architecture,
        )
    _finish(session, content, result, partial(show, content["steering"]), output, output_format)
    if output_format == "table":
        show_saved(control_vector)


def _finish(
    session: "Session",
    content: dict[str, Any],
    result: "Result",
    show: Callable[[], None],
    output: Path | None,
    output_format: str,
) -> None:
    """Save a result, and print it in the format that was asked for."""
    from ggjac import runs
    from ggjac.cli.render import emit_json, emit_tables
    from ggjac.cli.session import doubts, show_doubts, show_saved, show_tokens

    if output:
        runs.save_json(output, runs.finite(content))
    if output_format == "json":
        emit_json(content)
    elif output_format != "table":
        emit_tables([result], session, output_format, [*session.warnings, *doubts(content["model"])])
    else:
        show_tokens(session.tokens(), session.warnings)
        show_doubts(content["model"])
        show()
        show_saved(output)


def check_control_vector(
    file: Path | None, output: Path | None, what: ModelOptions, model: "Model", layer: int
) -> None:
    """Refuse a control vector that cannot be written, or that llama.cpp would not add as steering does.

    Raises:
        click.UsageError: its file is that of another result, or an input.
        ControlVectorError: llama.cpp adds none after `layer` blocks of this model.
        RunError: the file cannot be written.
    """
    from ggjac import runs
    from ggjac.cli.session import check_output
    from ggjac.llamacpp.control_vector import check_layer, check_stream

    if file is None:
        return
    if output and file.resolve() == output.resolve():
        raise click.UsageError("--output and --export-control-vector name the same file; choose another name")
    runs.check_writable(file)
    check_output(file, "--export-control-vector", what, model)
    config = model.config
    check_layer(layer, config.block_count)
    streams = 1 if config.one_runs else config.streams.count
    check_stream(config.architecture, adds=config.row.graph.control_vector, streams=streams)


def directed(
    what: ModelOptions,
    direction: str,
    target: str | None,
    positions: str | None,
    options: dict[str, Any],
    control_vector: Path | None,
    output: Path | None,
    output_format: str,
) -> None:
    """Add a direction to the stream, or project it out, and show what the model says then."""
    from ggjac.analysis.intervene import intervene
    from ggjac.checks import output_positions
    from ggjac.cli.session import fit_command, one_token, open_session, show_saved, usage_errors
    from ggjac.llamacpp.control_vector import save_control_vector

    session = open_session(what.texts(None, None)[0], output=output, fit=False)
    model = session.model
    if options["first"] and isinstance(direction, str) and direction.startswith(("left:", "right:")):
        raise click.UsageError(
            f"--first is about all positions, and {direction} is added at one; leave one of them out"
        )
    if control_vector and direction.startswith("right:"):
        raise click.UsageError(
            f"--export-control-vector: {direction} has a vector of its own for each position, and llama.cpp adds one "
            "everywhere; export left:K, or a vector from a file"
        )
    vector, depth, name = _direction(session, direction, options["layer"])
    check_control_vector(control_vector, output, what, model, depth)
    fit_command(session, layer=depth, position=-1, strengths=len(options["strengths"]))
    if (at := positions) is not None:
        with contextlib.suppress(ValueError):
            output_positions(at, len(session.ids))
            at = None
        if at is not None:
            raise click.UsageError(
                f"--positions {at}: the prompt has positions 0 to {len(session.ids) - 1}; name some of these"
            )
    goal = one_token(session, target)
    options |= {"positions": positions, "layer": depth, "name": name, "target": goal, "mlp_path": what.mlp_path}
    with session.stages.stage("steer") as report, usage_errors():
        try:
            result = intervene(model, session.ids, vector, progress=report, **options)
        except ValueError as error:
            if type(error) is not ValueError:
                raise
            raise click.UsageError(str(error)) from error
    content = session.envelope() | {"intervention": result.data(session.words)}
    if control_vector:
        assert result.added is not None  # one direction is added
        save_control_vector(
            control_vector,
            result.added,
            layer=depth,
            block_count=model.config.block_count,
            architecture=model.config.architecture,
        )
    _finish(session, content, result, partial(show_intervention, content["intervention"]), output, output_format)
    if output_format == "table":
        show_saved(control_vector)


def _direction(session: "Session", asked: str, layer: int | None) -> tuple[Any, int, str]:
    """Return a direction, read from a file or left to be computed, its depth, and its name.

    Raises:
        click.UsageError: it cannot be read, or there is no such depth.
    """
    from ggjac.analysis.intervene import SINGULAR, check_depth, default_depth
    from ggjac.directions import DirectionError, read_direction

    config = session.model.config
    blocks, singular = config.block_count, SINGULAR.fullmatch(asked)
    side, found = (singular[1] if singular else None), None
    if singular and int(singular[2]) > config.d:
        raise click.UsageError(f"--direction: {asked} is out of range; the map has {config.d} singular vectors")
    try:
        if not singular:
            widths = {config.d} if config.one_runs else {config.d, *map(config.width, range(blocks + 1))}
            found = read_direction(asked, sorted(widths), layer=layer)
        own = found.layer if found and layer is None else layer
        depth = default_depth(side, blocks) if own is None else own
        check_depth(side, depth, blocks)
    except DirectionError as error:
        raise click.UsageError(f"--direction: {error}") from error
    except ValueError as error:
        raise click.UsageError(f"--layer: {error}") from error
    if found is None:
        return asked, depth, asked
    return found.vector, depth, found.source


def _prompt(data: dict[str, Any]) -> str:
    """Return a prompt as it was given: quoted text, or its tokens."""
    from ggjac import display
    from ggjac.cli.render import words

    text = data["text"]
    return words(data["tokens"]) if text is None else f"“{display.visible(text)}”"


def show(data: dict[str, Any]) -> None:
    """Print the concept, the baseline and every steered text."""
    from ggjac import display
    from ggjac.cli.render import line, table

    concept = data["concept"]
    cells = [(display.token(row), row["id"], f"{row['probability']:.4f}") for row in concept["top"]]
    line(f"Concept: {_prompt(concept)}")
    table("Next token after the concept", ["token", "#id", "#probability"], cells)
    rows = [("baseline", data["baseline"])]
    for i, text in enumerate(data["steered"]):
        rows.append(("concept", text))
        rows.extend(("control", control) for control in data["controls"][i : i + 1])
    table(
        f"Steered texts: {data['method']}; the concept's map spans {data['layer']} of {data['blocks']} blocks; "
        f"the residual stream is steered after {data['changed_after_blocks']} blocks",
        ["steered by", "#strength", "#KL", "#mass", "#hits", "text"],
        [
            (
                name,
                f"{text['strength']:g}",
                f"{text['kl_first']:.3f}",
                f"{text['concept_mass_first']:.4f}",
                f"{text['concept_hits']}/{len(text['tokens'])}",
                display.visible(text["text"].strip()),
            )
            for name, text in rows
        ],
    )
    line(
        "KL: divergence of the first token's distribution from the baseline's, in nats; mass: total probability of the "
        "concept's own next tokens as the first token; hits: number of generated tokens among them"
    )
    if data["controls"]:
        kind = data["control"]["kind"]
        unrelated = "a random operator" if kind == "random" else f"the map of {_prompt(data['control'])}"
        line(f"control: steered by {unrelated}; position 0 is {'steered, too' if data['first_position'] else 'spared'}")
    strong = [f"{text['strength']:g}" for text in data["steered"] if (text["kl_first"] or 0.0) > LARGE]
    if strong:
        line(
            f"Warning: at strength {', '.join(strong)} the first token's distribution is nearly another one (KL over "
            f"{LARGE:g} nats): what follows shows a broken model more than the concept; lower --strength"
        )


def show_intervention(data: dict[str, Any]) -> None:
    """Print where the stream is changed, and every strength beside the frozen map's prediction and the null."""
    from ggjac import display
    from ggjac.cli.render import line, table

    name = display.visible(data["direction"])
    cells = [
        (p["position"], display.token(p), f"{p['component']:+.3f}", f"{p['length']:.3f}") for p in data["positions"]
    ]
    later = " and at generated tokens" if data["generated"] else ""
    title = f"{name}: the stream after {data['layer']} of {data['blocks']} blocks is changed here{later}"
    table(title, ["#position", "token", "#component ⟨v̂, h⟩", "#‖h‖"], cells)
    if data["residual"] is not None and data["residual"] > data["tol"]:
        worst = f"{name}, or a vector before it, has a residual of {data['residual']:.0e}"
        line(f"NOT converged to {data['tol']:.0e}: {worst}")
        line("")
    base, target = data["baseline"], display.token(data["target"])
    rows = [("", "", f"{base['logit']:.3f}", "", "", "", "", "", _says(base))]
    for row in data["edited"]:
        null, predicted = row["random"], row["predicted"]
        count = len(null["kl"])
        logits, kls = sorted(null["logit"]), sorted(null["kl"])
        rows.append(
            (
                f"{row['strength']:g}",
                f"{row['change']:.3g}",
                f"{row['logit']:.3f}",
                f"{predicted['logit']:.3f}",
                "" if predicted["error"] is None else f"{predicted['error']:.0%}",
                f"{logits[0]:.2f} to {logits[-1]:.2f}" if count else "",
                f"{row['kl']:.3f}",
                f"{kls[0]:.3f} to {kls[-1]:.3f}" if count else "",
                _says(row),
            )
        )
    columns = [
        "#strength",
        "#‖Δh‖",
        f"#logit of {target}",
        "#by the map",
        "#its error",
        "#random",
        "#KL",
        "#random",
        "text",
    ]
    table(f"Method {data['method']}", columns, rows)
    line(
        f"by the map: the prediction of the frozen map (mlp-path {data['mlp_path']}); its error: of the output's "
        "change, ‖J Δh - Δy‖/‖Δy‖. KL: of the next token's distribution from the baseline's, in nats"
    )
    for row in data["edited"]:
        if count := len(row["random"]["kl"]):
            line(
                f"strength {row['strength']:g}: {row['random']['at_least']} of {count} random directions of equal "
                "length change the next token at least as much"
            )


def _says(row: dict[str, Any]) -> str:
    """Return the text that follows, on one line."""
    from ggjac import display

    return display.visible(row["text"].strip())
