"""`ggjac svd`: singular values and vectors of the detached Jacobian, decoded."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from ggjac.checks import compared
from ggjac.cli.help import Command
from ggjac.cli.options import (
    Many,
    ModelOptions,
    calibrate,
    hide_special,
    many_options,
    model_options,
    output,
    per_token,
    position,
    resume,
    scores,
    search_dtype,
    spectrum_options,
    tabular_format,
    top,
)
from ggjac.cli.planning import dry_run

COMPARED = 17  # of two more
NUMBERS = 32  # columns of the terminal that the numbers of singular vectors take, and the gaps
PLACES, WORDS = 3, 8  # of the tables: positions of each right vector, tokens of each left one


def compared_with(command: Callable) -> Callable:
    """Refuse vectors to compare with that are too few; apply it above `dry_run`, so that plans are refused too."""

    @wraps(command)
    def wrapped(*args: Any, calibrate: list[str] | None, rank: int, **params: Any) -> Any:
        if calibrate and params.get("many", Many()).each_line:
            raise click.UsageError("--calibrate is not for --each-line, whose prompts can be compared with each other")
        if calibrate:
            try:
                compared(len(calibrate), rank)
            except ValueError as error:
                raise click.UsageError(f"--calibrate: {error}") from error
        return command(*args, calibrate=calibrate, rank=rank, **params)

    return wrapped


@click.command(cls=Command)
@model_options(exclude=True)
@many_options
@compared_with
@dry_run
@position
@spectrum_options
@search_dtype
@top("Tokens per vector.")
@hide_special
@scores
@calibrate
@per_token("Also decompose each position's own map.")
@output(
    "Save `U`, `S`, `Vh`, `residual` and `ids`; with --exclude, of the map of all positions `whole_U` and so on; with "
    "--per-token `token_position` [m], `token_U` [m, k, d], "
    "`token_S` [m, k], `token_Vh` [m, k, d], `token_residual` [m, k], to this safetensors file."
)
@resume
@tabular_format
def svd(
    what: ModelOptions,
    many: Many,
    position: int,
    rank: int,
    tol: float,
    max_sweeps: int,
    seed: int,
    search_dtype: str,
    top: int,
    hide_special: bool,
    calibrate: list[str] | None,
    per_token: bool,
    input_position: str | None,
    output: Path | None,
    resume: bool,
    output_format: str,
) -> None:
    """Compute the leading singular vectors of a prompt's detached Jacobian, decoded to tokens.

    Left vectors decode through the LM head to the tokens they promote, right vectors to the nearest input embeddings at
    each position. With --exclude, those of the map of all positions stand beside them. Exit code 3 if the sweeps ran
    out before every vector reached --tol, or the reconstruction error is out of bounds.

    \b
    ggjac svd -m model.gguf -p "The capital of France is" -k 4 -o svd.safetensors
    """
    from ggjac.cli.result import finish
    from ggjac.cli.session import check_resume, open_session
    from ggjac.cli.studies import over_prompts
    from ggjac.session import checkpoint
    from ggjac.studies.measures import answer_svd

    settings: dict[str, Any] = {"rank": rank, "tol": tol, "seed": seed}
    options = settings | {"top": top, "max_sweeps": max_sweeps, "hide_special": hide_special, "per_token": per_token}
    options["input_position"] = input_position
    if many.each_line:
        options["search_dtype"] = "same" if search_dtype == "auto" else search_dtype  # the same bits on any worker
        return over_prompts(what, many, "svd", output, output_format, position=position, **options)
    check_resume(output, resume)
    session = open_session(what, position=position, rank=rank, output=output)
    if per_token and output_format == "csv":  # before the work, part of which may be for nothing
        words = "csv has the joint map alone; each position's own is in --format latex, json or table"
        click.echo(f"Warning: {words}", err=True)
    marks: dict[str, Any] = {"search-dtype": search_dtype} | ({"per_token": per_token} if per_token else {})
    marks |= {} if input_position is None else {"input-position": input_position}
    marks |= {} if calibrate is None else {"calibrate": calibrate}
    with session.checkpointed(checkpoint(output), resume=resume, output=output, **settings, **marks):
        answer = answer_svd(session, search_dtype=search_dtype, calibrate=calibrate, **options)
        if output:
            session.save(output, answer.tensors, **settings)
    finish(session, answer.content, output_format, output, results=answer.results, svd=show)


def show(data: dict[str, Any]) -> None:
    """Print the triplets, those of the map of all positions and of each position's, where they were computed."""
    show_spectrum(data)
    if "whole" in data:
        show_both(data)
    if "per_token" in data:
        show_per_token(data["per_token"])


def show_spectrum(data: dict[str, Any]) -> None:
    """Print singular values with both decodings; right vectors at the positions with most of their weight."""
    from ggjac import display
    from ggjac.cli.render import line, numbers, sink, table, width, words, wrapped
    from ggjac.units import cut_after, ending

    rows = []
    sigmas = numbers([t["singular_value"] for t in data["triplets"]])
    compared = {"z": "z", "z_prompts": "z prompts"} if "prompts" in data["calibration"] else {}
    for j, t in enumerate(data["triplets"]):
        heaviest = sorted(t["right"], key=lambda r: -r["weight"])[:PLACES]
        places = max(len(str(r["position"])) for r in t["right"])
        right = "\n".join(
            wrapped(
                f"{r['weight']:>4.0%}  {r['position']:>{places}} {display.token(r)}: {words(r['nearest'][:3])}",
                (width() - NUMBERS - COMPARED * bool(compared)) // 2,
                7 + places,
            )
            for r in heaviest
        )
        first = [f"{t['left'][0][name]:.1f}" if t["left"] else "" for name in compared]
        rows.append((j + 1, sigmas[j], f"{t['residual']:.0e}", *first, words(t["left"][:WORDS]), right))
    columns = [
        *("##", "#σ", "#residual", *(f"#{name}" for name in compared.values())),
        "left vector: tokens it promotes",
        "right vector: weight, position, nearest tokens",
    ]
    table("Singular vectors of the detached Jacobian", columns, rows)
    if data["method"] == "matrix":
        line(ending(data))
    else:
        state = "converged" if data["converged"] else f"NOT converged to {data['tol']:.0e}"
        rough = f", {data['rough_sweeps']} of them rough" if data["rough_sweeps"] else ""
        line(f"{state} after {data['sweeps']} sweeps{rough} (stopped by: {data['stopped_by']})")
    cut = data["triplets"] and cut_after(
        data["triplets"][-1]["singular_value"], len(data["triplets"]), data["next_singular_value"]
    )
    if cut:
        line(cut)
    sink(data.get("sink"), "the weight of right vector 1")
    if compared:
        show_calibration(data["calibration"])


def show_calibration(data: dict[str, Any]) -> None:
    """Print what the z of first tokens are compared with."""
    from ggjac.cli.render import line

    said = "median {median:.1f}, 95% below {p95:.1f}"
    own, random = (said.format(**data[key]) for key in ("own", "random"))
    best = {key: said.format(**data[key]["largest"]) for key in ("own", "random")}
    rank = data["rank"]
    line("")
    line("z: score of the first token in standard deviations of random directions' scores")
    most = f"largest of {data['tokens']} tokens by chance up to {data['expected_maximum']:.1f}"
    line(f"  {data['random']['vectors']} random directions: {random}; {most}")
    if rank > 1:
        groups = data["random"]["largest"]["groups"]
        line(f"  the largest of {rank} in each of {groups} random subspaces of rank {rank}: {best['random']}")
    line(
        f"z prompts: in those of {data['own']['vectors']} leading vectors of {data['prompts']} unrelated prompts, from "
        "their mean"
    )
    line(f"  these themselves, each against the other prompts: {own}")
    if rank > 1:
        line(f"  the largest of {rank} of each prompt: {best['own']}")
    line("A large z says that few directions, or few prompts, promote the token as much; not that the vector means it.")


def show_both(data: dict[str, Any]) -> None:
    """Print the triplets of the map of all positions beside those without some."""
    from ggjac.checks import brief
    from ggjac.cli.render import line, numbers, table, words

    whole, rest = data["whole"]["triplets"], data["triplets"]
    read = {right["position"] for right in rest[0]["right"]}
    excluded = brief([right["position"] for right in whole[0]["right"] if right["position"] not in read])
    sigmas = [numbers([t["singular_value"] for t in each]) for each in (whole, rest)]
    left = [[words(t["left"][:WORDS]) for t in each] for each in (whole, rest)]
    weights = [f"{t['excluded_weight']:.0%}" for t in whole]
    rows = zip(range(1, len(whole) + 1), sigmas[0], weights, left[0], sigmas[1], left[1], strict=True)
    promotes = "left vector: tokens it promotes"
    columns = ["##", "#σ of all", f"#weight at {excluded}", promotes, f"#σ without {excluded}", promotes]
    line("")
    table(f"Both views: the map of all positions, and that without {excluded}", columns, [*rows])
    if not data["whole"]["converged"]:
        line(f"NOT converged: the map of all positions (stopped by: {data['whole']['stopped_by']})")


def show_stable_rank(data: dict[str, Any]) -> None:
    """Print the stable rank with its error bar."""
    from ggjac.cli.render import line

    bar = f" ± {data['error']:.1g}" if data["error"] else " (exact)"
    line(f"Stable rank ‖J‖²_F/σ₁² = {data['value']:.3f}{bar}; ‖J‖_F = {data['frobenius']:.4g}")
    line("")


def show_per_token(data: list[dict[str, Any]]) -> None:
    """Print each position's singular values and both decodings."""
    from ggjac import display
    from ggjac.cli.render import line, numbers, table, words

    cells = [(entry, j, triplet) for entry in data for j, triplet in enumerate(entry["triplets"])]
    sigmas = numbers([triplet["singular_value"] for *_, triplet in cells])
    rows = [
        (
            "" if j else entry["position"],
            "" if j else display.token(entry),
            sigma,
            f"{triplet['residual']:.0e}",
            words(triplet["left"][:WORDS]),
            words(triplet["right"][: WORDS // 2]),
        )
        for (entry, j, triplet), sigma in zip(cells, sigmas, strict=True)
    ]
    columns = [
        "#position",
        "token",
        "#σ",
        "#residual",
        "left vector: tokens it promotes",
        "right vector: nearest tokens",
    ]
    table("Singular vectors of each position's own map J_i", columns, rows)
    open_ends = [str(entry["position"]) for entry in data if not entry["converged"]]
    if open_ends:
        line(f"NOT converged at positions {', '.join(open_ends)}")
