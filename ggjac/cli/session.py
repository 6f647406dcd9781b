"""A command's prompt on its model: a `ggjac.session.Session` from the options, and its printed parts."""

import contextlib
import os
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ggjac import display, planner, runs
from ggjac.chat import ChatError
from ggjac.cli import texts, together
from ggjac.cli.options import ModelOptions, asked_name
from ggjac.cli.planning import requested, warn_if_long
from ggjac.cli.progress import Reporter
from ggjac.cli.render import line, table
from ggjac.model import DeviceError, Model, PromptError, open_model
from ggjac.planner import machine
from ggjac.session import Session

_SHARED = "ggjac.shared"  # in click's context: whether it was said that processes share the model
LIKELY = 10  # tokens among which another spelling of a target is looked for


def open_session(
    what: ModelOptions,
    *,
    position: int | str = -1,
    rank: int | None = None,
    output: Path | None = None,
    tapes: bool = True,
    fit: bool = True,
) -> Session:
    """Open the model and the prompt of a command, and refuse what cannot work before any work starts.

    Args:
        what: the model, the prompt, and how to compute.
        position, rank: of the options, to be checked; `rank` None where the command has none. Of several positions,
            the session's is the last.
        output: file or folder that the command writes.
        tapes: whether the command needs the detached Jacobian.
        fit: plan the command with its own options, and keep to the plan.

    Raises:
        click.UsageError: an option is out of range, or there is no such device.
        NoFitError: the work does not fit the budgets.
    """
    if output:
        runs.check_writable(output)
    machine.return_freed_memory()
    model = open_options(what)
    with usage_errors():
        prompt = what.given(model.chat)
    check_output(output, "--output", what, model)
    how = settings(what)
    # All else takes milliseconds. It is no stage of the work, and not counted.
    with how["stages"].reporting("waiting for llama.cpp's tokenizer", time.perf_counter()), usage_errors():
        session = Session(model, prompt, tapes=tapes, **how)
    n, d = len(session.ids), model.config.d
    with usage_errors():
        session.position = model.check_positions(str(position), n)[-1]
        _ = session.excluded
    if rank is not None and rank > d:
        raise click.UsageError(f"--rank {rank} is out of range; this model's Jacobian has {d} singular values")
    session.notes += what.remarks()
    this = weakref.proxy(session)  # or neither would go with its last reference, nor the model
    session.stages.work = lambda: this.work()
    if fit:
        fit_command(session)
    return session


def open_options(what: ModelOptions) -> Model:
    """Open the model that the options name.

    Raises:
        click.UsageError: there is no such device.
    """
    context, place = click.get_current_context(), together.here()
    together.refuse(context.info_name or "", context.params | {"trace": what.trace})
    try:
        how: dict[str, Any] = {"device": what.device, "dtype": what.dtype, "threads": what.threads}
        if place:
            if not what.quiet and not context.meta.get(_SHARED):
                click.echo(f"{place.ranks} processes share the model", err=True)
            context.meta[_SHARED] = True
            threads = what.threads or place.threads()
            how |= {"device": place.device(what.device), "threads": threads, "group": place.group}
        return open_model(what.model, asked=asked_name(what.model), context=what.context, **how)
    except DeviceError as error:
        raise click.UsageError(f"--device: {error}") from error


def settings(what: ModelOptions) -> dict[str, Any]:
    """Return the options of a `Session` as the command line gives them."""
    place, budget = together.here(), {"ram_budget": what.ram_budget, "vram_budget": what.vram_budget}
    if place:
        given = {name: size for name, size in budget.items() if size is not None}
        budget |= place.budget(what.device) | given
    return {
        **budget,
        "parse_special": what.parse_special,
        "mlp_path": what.mlp_path,
        "exclude": what.exclude,
        "trace": what.trace,
        "threads": what.threads,
        "said": what.said(),
        "stages": Reporter(what.quiet),
        "command": ["ggjac", *sys.argv[1:]],
    }


def check_output(output: Path | None, option: str, what: ModelOptions, model: Model) -> None:
    """Refuse an output that would overwrite what the command reads.

    Raises:
        click.UsageError: it is an input.
    """
    for source in (*model.gguf.paths, what.file):
        if output and source and output.exists() and source.exists() and output.samefile(source):
            raise click.UsageError(f"{option} {output} is an input of this command; choose another name")


def fit_command(session: Session, n: int | None = None, **request: Any) -> None:
    """Plan the running command with its own options, keep to the plan, and warn if it takes long.

    Arguments as `Session.fit` takes them.

    Raises:
        click.UsageError: an option is out of range.
        NoFitError: the work does not fit the budgets.
    """
    context = click.get_current_context()
    asked = requested(context.params, session.model.config.block_count)
    with usage_errors():
        asked["calibrate"] = [len(session.calibrating(prompt)) for prompt in context.params.get("calibrate") or ()]
        plan = session.fit(context.info_name or "", n, **asked | {"position": session.position} | request)
    if not context.params.get("resume"):  # what is left of it is not known
        warn_if_long(plan, session.model.gguf, session.threads, str(session.model.device))


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn the library's errors about a prompt or an option into usage errors."""
    try:
        yield
    except planner.NoFitError:  # an exit code of its own
        raise
    except (PromptError, ChatError, planner.PlanError) as error:
        raise click.UsageError(str(error)) from error


def one_token(session: Session, target: str | None, option: str = "--target") -> int | None:
    """Return the id that an option names: a text that is one token, its spaces as they are or as `␣`, or `id:4`.

    Raises:
        click.UsageError: the text is not one token, or the id is not in the vocabulary.
    """
    if target is None:
        return None
    model, text = session.model, target.replace("␣", " ")
    number = target.removeprefix("id:")
    is_id = number.isascii() and number.isdigit()
    if is_id and (number != target or not model.tokenizer.n_vocab):
        ids = [int(number)] if len(number) < 20 else [2**63]
    else:
        ids = model.spelled(text)
        if len(ids) != 1 and "\\" in text:  # as the tables show a line break
            ids = model.spelled(texts.unescaped(text))
        if len(ids) == 1 and is_id and int(number) < model.config.vocabulary:
            other = model.word(int(number))
            session.notes.append(
                f"{option} {target} is the text {target} (id {ids[0]}); for token {other} write id:{target}"
            )
    if len(ids) != 1:
        ask = f"id:{target}" if is_id else "an id, as in id:4"
        if not text.startswith(" ") and len(model.spelled(f" {text}")) == 1:
            ask = f"{f' {target}'!r}, with a space before it, which is one"
        raise click.UsageError(
            f"{option} {target!r} is {len(ids)} tokens ({model.words(ids)}); give one token, or {ask}"
        )
    try:
        return model.check_prompt(ids)[0]
    except PromptError as error:
        raise click.UsageError(f"{option}: {error}") from error


def note_likelier(session: Session, target: str | None, id: int | None, option: str = "--target") -> None:
    """Add a remark where the same word with or without a space before it is among the likely tokens, and likelier."""
    if target is None or id is None or target.startswith("id:"):
        return
    model, piece = session.model, session.model.tokenizer.piece(id)
    other = piece[1:] if piece.startswith(b" ") else b" " + piece
    found = session.logits.topk(min(LIKELY, len(session.logits))).indices.tolist()
    if id in found:
        found = found[: found.index(id)]
    for rank, i in enumerate(found, 1):
        if model.tokenizer.piece(i) == other:
            likelier = model.word(i)
            session.notes.append(
                f"{option} {target!r} is {model.word(id)}; {likelier} is number {rank} of the likeliest tokens: "
                f"did you mean {other.decode('utf-8', 'replace')!r}?"
            )


def show_tokens(tokens: Sequence[Mapping[str, Any]], warnings: Sequence[str]) -> None:
    """Print the table of a prompt's tokens, as `Session.tokens` returns them, and remarks on the prompt."""
    # A special token looks like its text; the bytes of a byte token are seen.
    kinds = ["" if token.get("type") == "byte" else token.get("type", "") for token in tokens]
    marked = any(kinds[1:])  # BOS alone is expected
    rows: list[tuple] = []
    for group in display.characters(tokens):
        kind = kinds[group[0]["position"]].replace("_", "-")
        number = " ".join(str(token["id"]) for token in group)
        rows.append((display.span(group), number, display.together(group), *([kind] if marked else [])))
    table("Tokens", ["#position", "#id", "token", *(["type"] if marked else [])], rows)
    show_warnings(warnings)


def show_warnings(warnings: Sequence[str]) -> None:
    """Print remarks on a prompt."""
    for warning in warnings:
        line(f"Warning: {warning}")
    if warnings:
        line("")


def show_doubts(model: Mapping[str, Any], which: str = "") -> None:
    """Print the warning about a model's weights, if there is one; `model` is that of an envelope."""
    for doubt in doubts(model):
        line(f"Warning: {which}{doubt}")
        line("")


def doubts(model: Mapping[str, Any]) -> list[str]:
    """Return the warning about a model's weights, if there is one; `model` is that of an envelope."""
    return [display.visible(model["warning"])] if model["warning"] else []


def show_saved(output: Path | None) -> None:
    """Print where a result was written."""
    if output:
        line(f"Saved {display.visible(os.fsencode(output))}")


def check_resume(output: Path | None, resume: bool) -> None:
    """Refuse to resume a run that has no file.

    Raises:
        click.UsageError: there is no file whose run could be resumed.
    """
    if output is None and resume:
        raise click.UsageError("--resume needs the -o of the interrupted run")


def check_difference(session: Session, target: int | None, versus: int | None, *, several: bool = False) -> None:
    """Refuse the difference of a logit and itself; where each position has a target of its own, some may be.

    Raises:
        click.UsageError: `versus` is the target.
    """
    if versus is None or (several and target is None):
        return
    if versus == (int(session.logits.argmax()) if target is None else target):
        name = "the most likely token, whose logit is split" if target is None else "the token of --target"
        word = session.model.word(versus)
        raise click.UsageError(f"--versus: {word} is {name}: the difference is 0; name another token")
