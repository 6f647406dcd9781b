"""`ggjac compare`: two files of one model, at the same prompt."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ggjac.cli.options import (
    ModelFile,
    ModelOptions,
    model_options,
    output,
    position,
    print_format,
    spectrum_options,
)
from ggjac.cli.planning import dry_run

if TYPE_CHECKING:
    from ggjac.session import Session

# Degrees beyond which an angle between spans says that a vector was exchanged for another.
SWAPPED = 45.0


@click.command()
@model_options(trace=False)
@dry_run
@click.option(
    "--with",
    "other",
    type=ModelFile(),
    required=True,
    metavar="FILE",
    help="The other file of the same model, named as for -m.",
)
@position
@spectrum_options
@click.option(
    "--target",
    help="Token whose logit is split: a text of one token, or its id, as id:4.  [default: top token of the first "
    "model]",
)
@output(
    "Save `kl` [n], `left_angles`, `right_angles` [k]; of each file, as a_S and b_S, `S`, `residual` [k], `U` [k, d], "
    "`Vh` [k, n, d], `shares` [n], `y` [d] and `logits` [n, v]; and `ids` [n], to this safetensors file."
)
@print_format
@click.pass_context
def compare(
    ctx: click.Context,
    what: ModelOptions,
    other: Path,
    position: int,
    rank: int,
    tol: float,
    max_sweeps: int,
    seed: int,
    target: str | None,
    output: Path | None,
    output_format: str,
) -> None:
    """Compare two files of one model, such as two quantizations, at one prompt.

    Shows both spectra, the principal angles between the spans of the leading singular vectors, the shares of a logit in
    both files, and for every position the most likely next tokens and the KL divergence. The files are measured one
    after the other. Exit code 3 if the sweeps ran out, or a reconstruction error is out of bounds.

    \b
    ggjac compare -m model-f16.gguf --with model-q4_k_m.gguf -p "The capital of France is"
    """
    from ggjac.analysis.compare import compare as set_side_by_side
    from ggjac.analysis.compare import portray
    from ggjac.cli.render import emit_json, emit_tables
    from ggjac.cli.session import (
        check_output,
        doubts,
        note_likelier,
        one_token,
        open_session,
        show_doubts,
        show_saved,
        show_tokens,
    )

    options: dict[str, Any] = {"rank": rank, "tol": tol, "seed": seed, "max_sweeps": max_sweeps}
    first = open_session(what, position=position, rank=rank, output=output)
    _check(first, what, other)
    token = one_token(first, target)
    a = first.run("measure", portray, target=token, **options)
    note_likelier(first, target, token)
    envelope = first.envelope()
    what = replace(what, model=other, prompt=None, file=None, chat=None, system=None, tokens=first.ids)
    del first  # two models at once may not fit
    second = open_session(what, position=position, rank=rank)
    check_output(output, "--output", what, second.model)
    b = second.run("measure", portray, target=a.target, **options)
    result = set_side_by_side(a, b)
    data = result.data(second.words)
    content = _both(envelope, second.envelope()) | {"compare": data}
    models = {"a": content["model"], "b": content["other_model"]}
    if output:
        second.save(output, result.tensors(), rank=rank, tol=tol, seed=seed, model=models["a"], other_model=models["b"])
    if output_format == "json":
        emit_json(content)
    elif output_format == "latex":
        of_weights = [f"{side}: {doubt}" for side, model in models.items() for doubt in doubts(model)]
        emit_tables([result], second, output_format, [*content["warnings"], *of_weights])
    else:
        show_tokens(content["tokens"], content["warnings"])
        for side, model in models.items():
            show_doubts(model, f"{side}: ")
        show(data, content)
        show_saved(output)
    unfinished = any(portrait.svd.reason == "sweeps" for portrait in (a, b))
    if unfinished or not all(side["healthy"] for side in data["reconstruction"].values()):
        ctx.exit(3)


def _check(session: "Session", what: ModelOptions, other: Path) -> None:
    """Refuse a file of another model before any work, and one that will not fit."""
    from ggjac import planner
    from ggjac.analysis.compare import CompareError, check_families, check_files, check_vocabularies
    from ggjac.cli.planning import make_plan, requested
    from ggjac.config import read_config
    from ggjac.gguf import open_gguf
    from ggjac.inventory import architecture
    from ggjac.model import title

    ours = session.model.gguf
    with open_gguf(other) as theirs:
        try:
            check_families(*map(architecture, (ours, theirs)))
            check_files(*({name: info.shape for name, info in file.tensors.items()} for file in (ours, theirs)))
        except CompareError as error:
            names = session.model.title, title(other, None, theirs.metadata.get("general.name"))
            raise CompareError(f"these are different models ({names[0]}, {names[1]}): {error}") from error
        check_vocabularies(*(file.metadata.get("tokenizer.ggml.tokens") for file in (ours, theirs)))
        shapes = {name: info.shape for name, info in theirs.tensors.items()}
        config = read_config(theirs.metadata, shapes).with_context(what.context)
        request = requested(click.get_current_context().params, config.block_count) | {"position": session.position}
        planner.check(make_plan(what, theirs, config, len(session.ids), "compare", request, session.model.device.type))


def _both(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Return the envelope of the first file with what differs in that of the second."""
    seconds = {
        f"{name} {side}": s for side, envelope in (("a", a), ("b", b)) for name, s in envelope["seconds"].items()
    }
    return a | {"other_model": b["model"], "seconds": seconds, "peak_memory_bytes": b["peak_memory_bytes"]}


def verdict(data: dict[str, Any], position: int) -> list[str]:
    """Return what the two files have in common, in plain lines: the prediction, the gains, the directions."""
    from ggjac.units import cut_after, is_close

    (here,) = (p for p in data["positions"] if p["position"] == position)
    values = data["singular_values"]
    changes = [value["b"] / value["a"] - 1 for value in values if value["a"]]
    same = "the same top token" if here["same_top1"] else "another top token"
    lines = [
        f"b against a, at the output position: {same}, KL divergence {data['kl']:.2g} nats, "
        f"‖y_b - y_a‖/‖y_a‖ = {data['output_distance']:.2g}",
        f"at all positions: the same top token at {data['top1_agreement']:.0%}, "
        f"KL divergence {data['mean_kl']:.2g} nats on average",
    ]
    if any(changes):
        lines.append(f"singular values change by {_change(min(changes))} to {_change(max(changes))}")
    elif changes:
        lines.append("the singular values are identical")
    largest, count = max(data["angles"]["left"]), len(data["angles"]["left"])
    if largest > SWAPPED:
        lines.append(
            f"the largest angle is {largest:.0f}°: in the two files the {count} leading vectors span other directions"
        )
        lines += [
            f"{side}: {cut_after(values[-1][side], count, following)}"
            for side, following in data["next_singular_value"].items()
            if is_close(values[-1][side], following)
        ]
    return lines


def _change(change: float) -> str:
    """Return a relative change in percent, with three digits however small it is."""
    return f"{100 * change:+.3g}%" if change else "0"


def show(data: dict[str, Any], content: dict[str, Any]) -> None:
    """Print both files' spectra, angles, shares and predictions; `content` has the envelope."""
    from ggjac import display
    from ggjac.cli.render import line, numbers, table

    for side, model in (("a", content["model"]), ("b", content["other_model"])):
        health = data["reconstruction"][side]
        remark = "" if health["healthy"] else ": NOT healthy"
        name = display.visible((model["asked"] or model["path"]).encode("utf-8", "surrogateescape"))
        line(f"{side}: {name}: reconstruction error {health['error']:.1e} (limit {health['limit']:.0e}{remark})")
    line("")
    for text in verdict(data, content["position"]):
        line(text)
    line("")
    values = data["singular_values"]
    a, b = (numbers([value[side] for value in values]) for side in ("a", "b"))
    left, right = (data["angles"][side][::-1] for side in ("left", "right"))
    rows = [
        (j + 1, a[j], b[j], _change(value["b"] / value["a"] - 1) if value["a"] else "", f"{value['residual']:.0e}")
        for j, value in enumerate(values)
    ]
    table("Singular values", ["##", "#σ of a", "#σ of b", "#difference", "#larger residual"], rows)
    angles = [(j + 1, f"{left[j]:.3f}°", f"{right[j]:.3f}°") for j in range(len(left))]
    title = f"Principal angles between the spans of the {len(left)} leading vectors, smallest first"
    table(title, ["##", "#left", "#right"], angles)
    cells = [
        (s["position"], display.token(s), f"{s['a']:+.4f}", f"{s['b']:+.4f}", f"{s['b'] - s['a']:+.4f}")
        for s in data["shares"]
    ]
    for name in ("offset", "logit"):
        of = data[name]
        title = {"offset": "offset (biases)", "logit": "logit"}[name]
        cells.append(("", title, f"{of['a']:+.4f}", f"{of['b']:+.4f}", f"{of['b'] - of['a']:+.4f}"))
    cap = " before its soft cap" if data["softcap"] else ""
    title = f"Share of every input token in the logit of {display.token(data['target'])}{cap}"
    table(title, ["#position", "token", "#a", "#b", "#b - a"], cells)
    cells = [
        (p["position"], *map(display.token, (p, p["top1"]["a"], p["top1"]["b"])), f"{p['kl']:.2e}")
        for p in data["positions"]
    ]
    differing = {i for i, p in enumerate(data["positions"]) if not p["same_top1"]}
    table("Next token at every position", ["#position", "token", "a", "b", "#KL(a ‖ b), nats"], cells, differing)
    if not data["converged"]:
        line(f"NOT converged to {data['tol']:.0e}: the angles are only as accurate as the singular vectors")
