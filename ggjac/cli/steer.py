"""`ggjac steer`: activation steering of one prompt with the linear map of another."""

import math
from pathlib import Path
from typing import Any, Literal

import click

from ggjac.cli import together
from ggjac.cli.options import (
    STEER_CONCEPT,
    STEER_CONTROL,
    STEER_PROMPT,
    ModelOptions,
    TokenIds,
    model_options,
    output,
    tabular_format,
    top,
)
from ggjac.cli.planning import dry_run

# Divergence in nats beyond which the steered distribution has little to do with the model's own.
LARGE = 5.0


class Strengths(click.ParamType):
    """Numbers separated by commas."""

    name = "strengths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        """Parse `0,0.2,0.5`."""
        if isinstance(value, list):
            return value
        try:
            numbers = [float(part) for part in value.split(",")]
        except ValueError:
            numbers = [math.nan]
        if not all(map(math.isfinite, numbers)):
            given = value if len(value) <= 60 else f"{value[:57]}..."
            self.fail(f"{given!r} is not a list of numbers; write them as 0,0.2,0.5", param, ctx)
        return numbers


@click.command()
@model_options(prompt=f"Text to continue.  [default: {STEER_PROMPT!r}]", trace=False)
@dry_run
@click.option(
    "--concept",
    help=f"Prompt whose linear map steers.  [default: {STEER_CONCEPT!r}; with --tokens, the prompt itself]",
)
@click.option("--concept-tokens", type=TokenIds(), help="Token ids, such as 1,2,3, instead of the concept's text.")
@click.option(
    "--layer", type=click.IntRange(min=1), help="Number of blocks that the map spans.  [default: two thirds of all]"
)
@click.option(
    "--strength",
    "strengths",
    type=Strengths(),
    default="0.5",
    show_default=True,
    help="Steering strength: one number, or several, such as 0,0.2,0.5; 0 = off.",
)
@click.option(
    "--method",
    type=click.Choice(["equation16", "additive"]),
    default="equation16",
    show_default=True,
    help="Steering formula, as above.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=12, show_default=True, help="Tokens to generate.")
@top("Number of the concept's own next tokens that count as hits.", 5)
@click.option("--control/--no-control", default=True, show_default=True, help="Also steer with a control.")
@click.option(
    "--control-concept",
    help=f"Unrelated prompt whose map is the control.  [default: {STEER_CONTROL!r}; with token ids, a random operator]",
)
@click.option("--first", is_flag=True, help="Steer position 0, an attention sink in most models, as well.")
@click.option(
    "-s", "--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Seed of the random operator.  [default: 0]"
)
@click.option(
    "--export-control-vector",
    "control_vector",
    type=click.Path(path_type=Path),
    callback=together.own,
    metavar="FILE",
    help="Save what the last strength adds at the prompt's last position as a control vector for llama.cpp.",
)
@output("Save the JSON of `--format json` to this file.")
@tabular_format
def steer(
    what: ModelOptions,
    concept: str | None,
    concept_tokens: list[int] | None,
    layer: int | None,
    strengths: list[float],
    method: Literal["equation16", "additive"],
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

    For comparison, the same prompt is also continued without steering (the baseline), and steered by the map of an
    unrelated prompt (the control). A random operator, the control where the prompt or the concept is token ids, is not
    like for like: it can destroy a stream that any text's map would spare. Position 0 is spared, unless --first is
    given.

    \b
    ggjac steer -m model.gguf -p "I am going to Arizona to see the" --concept "The bridge is the Golden" --strength 0.5
    """
    from ggjac import runs
    from ggjac.analysis.steer import changed_layer
    from ggjac.analysis.steer import steer as run
    from ggjac.cli.render import emit_json, emit_tables
    from ggjac.cli.session import check_output, doubts, fit_command, open_session, show_doubts, show_saved, show_tokens
    from ggjac.llamacpp.control_vector import check_layer, check_stream, save_control_vector
    from ggjac.model import PromptError
    from ggjac.sizes import default_layer

    what, of_concept = what.texts(concept, concept_tokens)
    if control_vector and output and control_vector.resolve() == output.resolve():
        raise click.UsageError("--output and --export-control-vector name the same file; choose another name")
    if control_vector:
        runs.check_writable(control_vector)
    session = open_session(what, output=output, fit=False)
    model, blocks = session.model, session.model.config.block_count
    layer = layer or default_layer(blocks)
    if layer > blocks:
        raise click.UsageError(f"--layer {layer} is out of range; this model has layers 1 to {blocks}")
    if control_vector:
        check_output(control_vector, "--export-control-vector", what, model)
        check_layer(changed_layer(method, layer), blocks)
        config, row = model.config, model.config.row
        streams = 1 if config.one_runs else config.streams.count
        check_stream(config.architecture, adds=row.graph.control_vector, streams=streams)
    try:
        ids = model.prompt_ids(of_concept, parse_special=what.parse_special)
    except PromptError as error:
        raise click.UsageError(f"--concept: {error}") from error
    if len(session.ids) + max_tokens > model.config.longest:
        raise click.UsageError(
            f"--max-tokens {max_tokens}: with the prompt's {len(session.ids)} tokens that is more than the model's "
            f"context of {model.config.longest}"
        )
    other = what.unrelated(control, control_concept, concept_tokens)
    try:
        unrelated = None if other is None else model.prompt_ids(other, parse_special=what.parse_special)
    except PromptError as error:
        raise click.UsageError(f"--control-concept: {error}") from error
    n = max(len(ids), len(unrelated or ()))
    fit_command(session, n, text=len(session.ids), position=-1, other_map=unrelated is not None)
    options: dict[str, Any] = {"method": method, "layer": layer, "strengths": strengths, "max_tokens": max_tokens}
    options |= {
        "top": top,
        "control": control,
        "control_concept": other,
        "first": first,
        "seed": seed,
        "parse_special": what.parse_special,
        "mlp_path": what.mlp_path,
    }
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
    if output:
        runs.save_json(output, runs.finite(content))
    if output_format == "json":
        emit_json(content)
        return
    if output_format != "table":
        emit_tables([result], session, output_format, [*session.warnings, *doubts(content["model"])])
        return
    show_tokens(session.tokens(), session.warnings)
    show_doubts(content["model"])
    show(content["steering"])
    show_saved(output)
    show_saved(control_vector)


def _prompt(data: dict[str, Any]) -> str:
    """Return a prompt as it was given: quoted text, or its tokens."""
    from ggjac import display
    from ggjac.cli.render import words

    text = data["text"]
    return words(data["tokens"]) if text is None else f"“{display.visible(text.encode('utf-8', 'surrogateescape'))}”"


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
                display.visible(text["text"].strip().encode()),
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
