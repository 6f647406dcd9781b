"""`ggjac layers`: the maps to, through and from every depth, and the logit lens."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from ggjac.cli.help import Command
from ggjac.cli.options import (
    Many,
    ModelOptions,
    depths_of,
    given,
    hide_special,
    layer_options,
    many_options,
    model_options,
    output,
    position,
    resume,
    scores,
    search_dtype,
    spectrum_options,
    tabular_format,
    top,
)
from ggjac.cli.planning import dry_run

# Of the tables: vectors of each map and tokens of each vector, where the command line does not say; tokens of the lens.
VECTORS, WORDS, LIKELY = 3, 3, 6


@click.command(cls=Command)
@model_options(exclude=True)
@many_options
@dry_run
@position
@layer_options
@spectrum_options
@search_dtype
@top("Tokens per vector and depth.")
@hide_special
@scores
@output("Save U, S, residual and stable rank of every map, and the ranks, to this safetensors file.")
@resume
@tabular_format
def layers(
    what: ModelOptions,
    many: Many,
    position: int,
    layers: str,
    search_dtype: str,
    output: Path | None,
    resume: bool,
    output_format: str,
    **options: Any,
) -> None:
    """Decompose the maps of every depth (singular values, stable rank, decoded left vectors), and show the logit lens.

    A map is cumulative (from the input to a depth), blockwise (of one block alone) or to_end (from a depth to the
    output). The first two end at the residual stream after a block (layer), or at what the block's attention (attn) or
    MLP (mlp) adds to it, read through the final norm frozen there, as in a logit lens. `analyze --layers all` shows the
    same in its report. Exit code 3 if the sweeps ran out before every vector reached --tol, or the reconstruction
    error is out of bounds.

    \b
    ggjac layers -m model.gguf -p "The capital of France is" --layers 0,4-8,-1
    """
    from ggjac.cli.result import finish
    from ggjac.cli.session import check_resume, open_session
    from ggjac.cli.studies import over_prompts
    from ggjac.session import checkpoint
    from ggjac.studies.measures import answer_layers

    options |= {key: list(options[key]) for key in ("maps", "kinds")}
    if many.each_line:
        options["search_dtype"] = "same" if search_dtype == "auto" else search_dtype  # the same bits on any worker
        return over_prompts(what, many, "layers", output, output_format, position=position, layers=layers, **options)
    check_resume(output, resume)
    session = open_session(what, position=position, rank=options["rank"], output=output)
    depths = depths_of(layers, session.model.config.block_count)
    settings = {key: options[key] for key in ("rank", "tol", "seed")}
    asked = {"layers": depths, **{key: options[key] for key in ("maps", "kinds")}, "search-dtype": search_dtype}
    with session.checkpointed(checkpoint(output), resume=resume, output=output, **settings, **asked):
        answer = answer_layers(session, layers=depths, search_dtype=search_dtype, **options)
        if output:
            session.save(output, answer.tensors, **settings)
    vectors = options["rank"] if given("rank") else VECTORS
    tokens = options["top"] if given("top") else WORDS
    shown = partial(show, vectors=vectors, tokens=tokens)
    finish(session, answer.content, output_format, output, results=answer.results, layers=shown)


def show(data: dict[str, Any], vectors: int = VECTORS, tokens: int = WORDS) -> None:
    """Print a table for each map and kind, the path, and the readout; and how many vectors and tokens it left out."""
    from ggjac import display
    from ggjac.cli.render import line, more, table
    from ggjac.report.sections.common import capital
    from ggjac.report.sections.layers import KINDS, MAPS

    for name, words in MAPS.items():
        for kind, label in KINDS.items():
            own = [tap for tap in data["taps"] if (tap["map"], tap["kind"]) == (name, kind)]
            if own:
                _show_maps(f"{capital(words)}: {label}", own, vectors, tokens)
    if data["taps"]:
        found = data["taps"][0]["triplets"]
        left, rest = len(found) - vectors, len(found[0]["left"]) - tokens
        more((left, "vectors", "-k N"), (rest, "tokens of each vector", "--top N"))
    if data["path"]:
        columns = [f"#{j + 1}" for j in range(min(6, len(data["path"][0]["values"])))]
        rows = [(p["index"], *(f"{value:+.3f}" for value in p["values"][: len(columns)])) for p in data["path"]]
        title = "Path to the output's directions: σ(l) ⟨u(l), u(L)⟩ / σ(L)"
        table(title, ["#depth", *(f"#{c}" for c in columns)], rows)
    places = [ranks["ranks"][0] for ranks in data["ranks"]["depths"]]
    final = display.token(data["ranks"]["tokens"][0])
    rows = [
        (
            row["index"],
            place,
            "  ".join(f"{display.token(t)} {t['probability']:.2f}" for t in row["top"][: max(LIKELY, tokens)]),
        )
        for row, place in zip(data["readout"], places, strict=True)
    ]
    table(
        "Logit lens: the residual stream read through the final norm and the LM head",
        ["#depth", f"#rank of {final}", "most likely tokens"],
        rows,
    )
    line("depth: number of blocks applied, so that depth 1 is after L0; blocks and heads are counted from 0")
    state = "all maps converged" if data["converged"] else f"NOT all maps converged to {data['tol']:.0e}"
    sweeps, rough = ([tap[key] for tap in data["taps"]] for key in ("sweeps", "rough_sweeps"))
    most = f", up to {max(rough)} of them rough" if any(rough) else ""
    line(f"{state}, in {min(sweeps)} to {max(sweeps)} sweeps{most}" if sweeps else "no map was requested")
    line("")


def _show_maps(title: str, taps: list[dict[str, Any]], vectors: int, tokens: int) -> None:
    """Print the vectors of a map side by side, or below each other where they are many."""
    from ggjac.cli.render import line, numbers, stable_rank, table, words
    from ggjac.report.sections.layers import place, remarks

    def remark() -> None:
        for text in (said := remarks(taps)):
            line(text)
        if said:
            line("")

    axis, carried = "block" if "block" in taps[0] else "depth", "arriving" in taps[0]["triplets"][0]
    if vectors > VECTORS:
        cells = [(tap, j, triplet) for tap in taps for j, triplet in enumerate(tap["triplets"][:vectors])]
        sigmas = numbers([triplet["singular_value"] for *_, triplet in cells])
        rows = []
        for (tap, j, triplet), sigma in zip(cells, sigmas, strict=True):
            rows.append(
                (
                    "" if j else place(tap),
                    "" if j else stable_rank(tap["stable_rank"]),
                    j + 1,
                    sigma,
                    words(triplet["left"][:tokens]),
                    *([words(triplet["arriving"][:tokens])] if carried else []),
                )
            )
            following = tap["next_singular_value"]
            if following and j + 1 == len(tap["triplets"]):
                more = "" if following["converged"] else "≥ "
                rows.append(("", "", "next", f"{more}{following['value']:.4g}", "", *[""] * carried))
        ends = ["left vector: tokens it promotes"] + ["the same at the output"] * carried
        table(title, [f"#{axis}", "#stable rank", "##", "#σ", *ends], rows)
        remark()
        return
    shown = min(vectors, len(taps[0]["triplets"]))
    rows = [
        (
            place(tap),
            sigma,
            spark([t["singular_value"] for t in tap["triplets"]]),
            stable_rank(tap["stable_rank"]),
            *(words(t["left"][:tokens]) for t in tap["triplets"][:shown]),
            *([words(tap["triplets"][0]["arriving"][:tokens])] if carried else []),
        )
        for tap, sigma in zip(taps, numbers([tap["triplets"][0]["singular_value"] for tap in taps]), strict=True)
    ]
    names = [f"left vector {j + 1}" for j in range(shown)] + ["vector 1 at the output"] * carried
    table(title, [f"#{axis}", "#σ", "spectrum", "#stable rank", *names], rows)
    remark()


def spark(values: list[float]) -> str:
    """Return values as bars, relative to the largest; zero is a blank."""
    largest = max(values, default=0.0) or 1.0
    return "".join(" ▁▂▃▄▅▆▇█"[max(1, round(8 * value / largest)) if value > 0 else 0] for value in values).rstrip()
