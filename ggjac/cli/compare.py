"""`ggjac compare`: two files of one model at the same prompt, or two prompts on one file."""

from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ggjac.cli.help import Command
from ggjac.cli.options import (
    ModelFile,
    ModelOptions,
    TokenIds,
    model_options,
    output,
    position,
    print_format,
    spectrum_options,
)
from ggjac.cli.planning import dry_run

if TYPE_CHECKING:
    from ggjac.analysis.compare import Comparison, Portrait
    from ggjac.analysis.compare_prompts import PromptComparison
    from ggjac.session import Session

    Found = Comparison | PromptComparison

# Degrees beyond which an angle between spans says that a vector was exchanged for another.
SWAPPED = 45.0


@click.command(cls=Command)
@model_options(trace=False)
@dry_run
@click.option(
    "--with",
    "other",
    type=ModelFile(),
    metavar="FILE",
    help="Compare with another file of the same model, named as for -m.",
)
@click.option("--with-prompt", metavar="TEXT", help="Compare with another prompt; with --chat, another question.")
@click.option("--with-tokens", type=TokenIds(), help="Token ids, such as 1,2,3, instead of the other prompt's text.")
@position
@spectrum_options
@click.option(
    "--target",
    help="Token whose logit is split: a text of one token, or its id, as id:4.  [default: top token of the first "
    "model or prompt]",
)
@click.option("--versus", help="Token whose logit is subtracted, named like --target: split the difference.")
@output(
    "Save `kl` [n], `left_angles`, `right_angles` [k]; of each file, as a_S and b_S, `S`, `residual` [k], `U` [k, d], "
    "`Vh` [k, n, d], `shares` [n], `attn`, `mlp` [blocks], `y` [d] and `logits` [n, v]; and `ids` [n], to this "
    "safetensors file. Of two prompts, `a_ids` and `b_ids`, `aligned` [m, 2] and `kl` [m]."
)
@print_format
@click.pass_context
def compare(
    ctx: click.Context,
    what: ModelOptions,
    other: Path | None,
    with_prompt: str | None,
    with_tokens: list[int] | None,
    position: int,
    rank: int,
    tol: float,
    max_sweeps: int,
    seed: int,
    target: str | None,
    versus: str | None,
    output: Path | None,
    output_format: str,
) -> None:
    """Compare two files of one model, such as two quantizations, at one prompt; or two prompts on one file.

    Shows both spectra, the principal angles between the spans of the leading singular vectors, the shares of a logit on
    both sides by input token and by block, and the most likely next tokens with the KL divergence. Of two prompts,
    tokens that are the same and in the same order are aligned: only there are positions compared with each other.
    --position counts in each prompt. The two are measured one after the other. Exit code 3 if the sweeps ran out, or a
    reconstruction error is out of bounds. For two prompts write --with-prompt "The capital of Italy is" in place of
    --with.

    \b
    ggjac compare -m model-f16.gguf --with model-q4_k_m.gguf -p "The capital of France is"
    """
    kind, second = what.beside(other, with_prompt, with_tokens)
    asked = {"target": target, "versus": versus}
    options: dict[str, Any] = {"rank": rank, "tol": tol, "seed": seed, "max_sweeps": max_sweeps}
    measured = two_files if kind == "other_model" else two_prompts
    result, content, session = measured(what, second, asked, options, position, output)
    data = content["compare" if kind == "other_model" else "compare_prompts"]
    if output:
        first = {name: content[name] for name in ("model", "prompt", "tokens", "position", "warnings", kind)}
        session.save(output, result.tensors(), rank=rank, tol=tol, seed=seed, versus=result.a.versus, **first)
    _print(result, content, session, output_format, output)
    unfinished = any(portrait.svd.reason == "sweeps" for portrait in (result.a, result.b))
    if unfinished or not all(side["healthy"] for side in data["reconstruction"].values()):
        ctx.exit(3)


def two_files(
    what: ModelOptions,
    second: ModelOptions,
    asked: dict[str, str | None],
    options: dict[str, Any],
    position: int,
    output: Path | None,
) -> tuple["Found", dict[str, Any], "Session"]:
    """Measure two files one after the other, for both at once may not fit; return the result, its JSON, the session."""
    from ggjac.analysis.compare import compare
    from ggjac.cli.session import check_output, open_session

    rank = options["rank"]
    session = open_session(what, position=position, rank=rank, output=output)
    assert second.model is not None
    _check(session, what, second.model)
    a = _portrayed(session, asked, options)
    envelope = session.envelope()
    again = replace(second, prompt=None, file=None, chat=None, system=None, tokens=session.ids)
    del session
    session = open_session(again, position=position, rank=rank)
    check_output(output, "--output", again, session.model)
    result = compare(a, _portrayed(session, {}, options, a))
    own = session.envelope()
    content = _both(envelope, own) | {"other_model": own["model"], "compare": result.data(session.words)}
    return result, content, session


def two_prompts(
    what: ModelOptions,
    second: ModelOptions,
    asked: dict[str, str | None],
    options: dict[str, Any],
    position: int,
    output: Path | None,
) -> tuple["Found", dict[str, Any], "Session"]:
    """Measure two prompts on one file one after the other, with one forward pass in memory at a time."""
    from ggjac.analysis.compare_prompts import compare_prompts
    from ggjac.cli.session import fit_command, open_session, usage_errors

    rank = options["rank"]
    session = open_session(what, position=position, rank=rank, output=output, fit=False)
    with usage_errors():
        text = second.given(session.model.chat)
        ids = session.model.prompt_ids(text, parse_special=what.parse_special)
        place = session.model.check_position(position, len(ids))
    fit_command(session, other=len(ids))
    a = _portrayed(session, asked, options)
    envelope, first = session.envelope(), len(session.ids)
    del session
    given = {"tokens": ids, "prompt": None} if second.tokens is not None else {"tokens": None, "prompt": text}
    alone = replace(second, chat=None, system=None, escape=False, **given)
    session = open_session(alone, position=place, rank=rank, fit=False)
    fit_command(session, other=first)
    result = compare_prompts(a, _portrayed(session, {}, options, a))
    own = session.envelope()
    beside = {"other_prompt": {name: own[name] for name in ("prompt", "tokens", "warnings", "position")}}
    return result, _both(envelope, own) | beside | {"compare_prompts": result.data(session.words)}, session


def _portrayed(
    session: "Session", asked: dict[str, str | None], options: dict[str, Any], like: "Portrait | None" = None
) -> "Portrait":
    """Measure one side; the logit is that of the other one, or named by `asked`."""
    from ggjac.analysis.compare import portray
    from ggjac.cli.session import check_difference, note_likelier, one_token

    if like is not None:
        return session.run("measure", portray, target=like.target, versus=like.versus, **options)
    target, versus = (one_token(session, asked[name], f"--{name}") for name in ("target", "versus"))
    check_difference(session, target, versus)
    found = session.run("measure", portray, target=target, versus=versus, **options)
    note_likelier(session, asked["target"], target)
    note_likelier(session, asked["versus"], versus, "--versus")
    return found


def _print(
    result: "Found", content: dict[str, Any], session: "Session", output_format: str, output: Path | None
) -> None:
    """Print a comparison as JSON, LaTeX or tables."""
    from ggjac.cli.render import emit_json, emit_tables
    from ggjac.cli.session import doubts, show_doubts, show_saved, show_tokens

    other, files = content.get("other_prompt"), {"a": content["model"], "b": content.get("other_model")}
    warnings = content["warnings"] + (other["warnings"] if other else [])
    of_weights = [(side, doubt) for side, model in files.items() if model for doubt in doubts(model)]
    if output_format == "json":
        emit_json(content)
    elif output_format == "latex":
        said = [f"{side}: {doubt}" if files["b"] else doubt for side, doubt in of_weights]
        emit_tables([result], session, output_format, [*warnings, *said])
    elif other:
        show_doubts(content["model"])
        show_prompts(content)
        show_saved(output)
    else:
        show_tokens(content["tokens"], warnings)
        for side, model in files.items():
            if model:
                show_doubts(model, f"{side}: ")
        show(content["compare"], content)
        show_saved(output)


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
    """Return the envelope of the first side with the times of both and the memory of the second."""
    seconds = {
        f"{name} {side}": s for side, envelope in (("a", a), ("b", b)) for name, s in envelope["seconds"].items()
    }
    return a | {"seconds": seconds, "peak_memory_bytes": b["peak_memory_bytes"]}


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
    from ggjac.cli.render import line, table
    from ggjac.cli.shares import asked_logit

    for side, model in (("a", content["model"]), ("b", content["other_model"])):
        health = data["reconstruction"][side]
        remark = "" if health["healthy"] else ": NOT healthy"
        name = display.visible(model["asked"] or model["path"])
        line(f"{side}: {name}: reconstruction error {health['error']:.1e} (limit {health['limit']:.0e}{remark})")
    line("")
    for text in verdict(data, content["position"]):
        line(text)
    line("")
    show_spectra(data, f"Principal angles between the spans of the {data['rank']} leading vectors, smallest first")
    cells = [(s["position"], display.token(s), *_changed(s["a"], s["b"])) for s in data["shares"]]
    for name, title in (("offset", "offset (biases)"), ("logit", "logit")):
        cells.append(("", title, *_changed(**data[name])))
    title = f"Share of every input token in {asked_logit(data)}"
    table(title, ["#position", "token", "#a", "#b", "#b - a"], cells)
    show_blocks(data)
    cells = [
        (p["position"], *map(display.token, (p, p["top1"]["a"], p["top1"]["b"])), f"{p['kl']:.2e}")
        for p in data["positions"]
    ]
    differing = {i for i, p in enumerate(data["positions"]) if not p["same_top1"]}
    table("Next token at every position", ["#position", "token", "a", "b", "#KL(a ‖ b), nats"], cells, differing)
    if not data["converged"]:
        line(f"NOT converged to {data['tol']:.0e}: the angles are only as accurate as the singular vectors")


def show_spectra(data: dict[str, Any], title: str) -> None:
    """Print the singular values of both sides, and the angles between their vectors under a title."""
    from ggjac.cli.render import numbers, table

    values = data["singular_values"]
    a, b = (numbers([value[side] for value in values]) for side in ("a", "b"))
    rows = [
        (j + 1, a[j], b[j], _change(value["b"] / value["a"] - 1) if value["a"] else "", f"{value['residual']:.0e}")
        for j, value in enumerate(values)
    ]
    table("Singular values", ["##", "#σ of a", "#σ of b", "#difference", "#larger residual"], rows)
    sides = {name: angles[::-1] for name, angles in data["angles"].items() if angles}
    angles = [(j + 1, *(f"{side[j]:.3f}°" for side in sides.values())) for j in range(len(values))]
    table(title, ["##", *(f"#{name}" for name in sides)], angles)


def show_blocks(data: dict[str, Any]) -> None:
    """Print what each block adds to the logit of both sides (direct logit attribution), and the difference."""
    from ggjac.cli.render import line, table
    from ggjac.cli.shares import DIRECT, asked_logit

    attends = not any("mixer" in block for block in data["blocks"])
    rows = [("embedding", *_changed(**data["embedding"]), "", "", "")]
    for block in data["blocks"]:
        name = f"L{block['block']}" + ("" if attends else f" ({block.get('mixer', 'attention')})")
        rows.append((name, *_changed(**block["attn"]), *_changed(**block["mlp"])))
    if any(data["bias"].values()):
        rows.append(("biases of norm and head", *_changed(**data["bias"]), "", "", ""))
    mixers = "attention" if attends else "mixers"
    columns = ["", f"#{mixers}: a", "#b", "#b - a", "#MLP: a", "#b", "#b - a"]
    table(f"Share of every block in {asked_logit(data)}", columns, rows)
    line(DIRECT)
    line("")


def _changed(a: float, b: float) -> tuple[str, str, str]:
    """Return the cells of a number of both sides, and of its change."""
    return f"{a:+.4f}", f"{b:+.4f}", f"{b - a:+.4f}"


def show_prompts(content: dict[str, Any]) -> None:
    """Print both prompts' spectra, shares and predictions."""
    from ggjac import display
    from ggjac.cli.render import line, table, words
    from ggjac.cli.shares import CAVEAT, asked_logit

    data, prompts = content["compare_prompts"], {"a": content, "b": content["other_prompt"]}
    for side, prompt in prompts.items():
        health = data["reconstruction"][side]
        remark = "" if health["healthy"] else ": NOT healthy"
        tokens = words([*prompt["tokens"]][: prompt["position"] + 1])
        line(f"{side}: {tokens}: reconstruction error {health['error']:.1e} (limit {health['limit']:.0e}{remark})")
        for warning in prompt["warnings"]:
            line(f"Warning: {side}: {warning}")
    line("")
    for text in prompts_verdict(data):
        line(text)
    line("")
    rows = []
    for a, b in zip_longest(data["next"]["a"], data["next"]["b"]):
        sides = ((display.token(t), *(f"{t[name]:.4f}" for name in ("probability", "other"))) for t in (a, b))
        rows.append(tuple(cell for side in sides for cell in side))
    columns = ["next after a", "#probability", "#after b", "next after b", "#probability", "#after a"]
    table("Most likely next tokens", columns, rows)
    rows = []
    for row in data["shares"]:
        one = {side: row[side] for side in "ab" if row[side]}
        places = (row[side]["position"] if row[side] else "" for side in "ab")
        both = _changed(**{side: s["share"] for side, s in one.items()}) if len(one) == 2 else None
        alone = tuple(f"{row[side]['share']:+.4f}" if row[side] else "" for side in "ab")
        rows.append((*places, display.token(next(iter(one.values()))), *(both or (*alone, ""))))
    for name, title in (("offset", "offset (biases)"), ("logit", "logit")):
        rows.append(("", "", title, *_changed(**data[name])))
    columns = ["#position: a", "#b", "token", "#share: a", "#b", "#b - a"]
    table(f"Share of every input token in {asked_logit(data)} (mlp-path {content['mlp_path']})", columns, rows)
    line(CAVEAT)
    line("")
    show_blocks(data)
    parts = " and ".join(f"{weight:.0%} of {side}'s" for side, weight in data["weight"].items())
    right = (
        f"right ones only at the aligned positions, which have {parts}"
        if data["angles"]["right"]
        else (f"right ones are not compared: at the aligned positions, which have {parts}, they are not independent")
    )
    show_spectra(data, f"Principal angles between the spans of the {data['rank']} leading vectors ({right})")
    rows = [
        (
            p["a"]["position"],
            p["b"]["position"],
            *map(display.token, (p["a"], p["top1"]["a"], p["top1"]["b"])),
            f"{p['kl']:.2e}",
        )
        for p in data["positions"]
    ]
    differing = {i for i, p in enumerate(data["positions"]) if not p["same_top1"]}
    columns = ["#position: a", "#b", "token", "next by a", "next by b", "#KL(a ‖ b), nats"]
    table("Next token at every aligned position", columns, rows, differing)
    if not data["converged"]:
        line(f"NOT converged to {data['tol']:.0e}: the angles are only as accurate as the singular vectors")


def prompts_verdict(data: dict[str, Any]) -> list[str]:
    """Return how two prompts differ, in plain lines: the prediction, the logit, the tokens that are others."""
    from ggjac import display
    from ggjac.cli.shares import asked_logit

    best = [data["next"][side][0] for side in "ab"]
    same = "both say" if best[0]["id"] == best[1]["id"] else "a says"
    says = f"{same} {display.token(best[0])} ({best[0]['probability']:.1%}"
    says += ")" if same == "a says" else f" and {best[1]['probability']:.1%})"
    if same == "a says":
        says += f", b says {display.token(best[1])} ({best[1]['probability']:.1%})"
    logit = data["logit"]
    name = asked_logit(data)
    alone = [(side, sum(1 for row in data["shares"] if row[side] and not row[other])) for side, other in ("ab", "ba")]
    aligned = len(data["positions"])
    return [
        f"{says}; KL divergence of b from a {data['kl']:.2g} nats, ‖y_b - y_a‖/‖y_a‖ = {data['output_distance']:.2g}",
        f"{name}: a {logit['a']:.4f}, b {logit['b']:.4f}, b - a {logit['b'] - logit['a']:+.4f}",
        f"{aligned} positions are aligned; alone stand {alone[0][1]} of a and {alone[1][1]} of b",
    ]
