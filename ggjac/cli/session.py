"""A command's prompt on its model: a `ggjac.session.Session` from the options, and its printed parts."""

import contextlib
import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ggjac import display, planner, runs
from ggjac.cli.options import ModelOptions, asked_name
from ggjac.cli.planning import requested
from ggjac.cli.progress import Reporter
from ggjac.cli.render import line, table
from ggjac.model import DeviceError, Model, PromptError, open_model
from ggjac.planner import machine
from ggjac.session import Session


def open_session(
    what: ModelOptions,
    *,
    position: int = -1,
    rank: int | None = None,
    output: Path | None = None,
    tapes: bool = True,
    fit: bool = True,
) -> Session:
    """Open the model and the prompt of a command, and refuse what cannot work before any work starts.

    Args:
        what: the model, the prompt, and how to compute.
        position, rank: of the options, to be checked; `rank` None where the command has none.
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
    prompt = what.given()
    model = open_options(what)
    check_output(output, "--output", what, model)
    with usage_errors():
        session = Session(model, prompt, tapes=tapes, **settings(what))
    n, d = len(session.ids), model.config.d
    if not -n <= position < n:
        raise click.UsageError(f"--position {position} is out of range; the prompt has positions 0 to {n - 1}")
    if rank is not None and rank > d:
        raise click.UsageError(f"--rank {rank} is out of range; this model's Jacobian has {d} singular values")
    session.position = position % n
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
    try:
        how: dict[str, Any] = {"device": what.device, "dtype": what.dtype, "threads": what.threads}
        return open_model(what.model, asked=asked_name(what.model), **how)
    except DeviceError as error:
        raise click.UsageError(f"--device: {error}") from error


def settings(what: ModelOptions) -> dict[str, Any]:
    """Return the options of a `Session` as the command line gives them."""
    return {
        "mlp_path": what.mlp_path,
        "trace": what.trace,
        "ram_budget": what.ram_budget,
        "vram_budget": what.vram_budget,
        "threads": what.threads,
        "stages": Reporter(what.quiet),
        "command": ["ggjac", *sys.argv[1:]],
    }


def check_output(output: Path | None, option: str, what: ModelOptions, model: Model) -> None:
    """Refuse an output that would overwrite what the command reads.

    Raises:
        click.UsageError: it is an input.
    """
    for source in (*model.gguf.paths, what.file):
        if output and source and output.exists() and output.samefile(source):
            raise click.UsageError(f"{option} {output} is an input of this command; choose another name")


def fit_command(session: Session, n: int | None = None, **request: Any) -> None:
    """Plan the running command with its own options and keep to the plan; arguments as `Session.fit` takes them.

    Raises:
        click.UsageError: an option is out of range.
        NoFitError: the work does not fit the budgets.
    """
    context = click.get_current_context()
    asked = requested(context.params, session.model.config.block_count)
    with usage_errors():
        session.fit(context.info_name or "", n, **asked | {"position": session.position} | request)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn the library's errors about a prompt or an option into usage errors."""
    try:
        yield
    except planner.NoFitError:  # an exit code of its own
        raise
    except (PromptError, planner.PlanError) as error:
        raise click.UsageError(str(error)) from error


def one_token(session: Session, target: str | None, option: str = "--target") -> int | None:
    """Return the id that an option names: a number, or a text that is one token, its spaces as they are or as `␣`.

    Raises:
        click.UsageError: the text is not one token, or the id is not in the vocabulary.
    """
    if target is None:
        return None
    tokenizer = session.model.tokenizer
    if target.isascii() and target.isdigit():
        ids = [int(target)] if len(target) < 20 else [2**63]
    else:
        text = target.replace("␣", " ")
        ids = tokenizer.encode(text, add_special=False)
        if len(ids) != 1 and text.startswith(" "):
            # SentencePiece puts a space before every text: here it has brought its own.
            inner = tokenizer.encode(text[1:], add_special=False)
            if len(inner) == 1 and tokenizer.piece(inner[0]) == text.encode():
                ids = inner
    if len(ids) != 1:
        parts = " + ".join(session.model.word(id) for id in ids) or "none"
        raise click.UsageError(f"{option} {target!r} is {len(ids)} tokens ({parts}); give one token, or its id")
    try:
        return session.model.check_prompt(ids)[0]
    except PromptError as error:
        raise click.UsageError(f"{option}: {error}") from error


def show_tokens(tokens: Sequence[Mapping[str, Any]], warning: str | None) -> None:
    """Print the table of a prompt's tokens, as `Session.tokens` returns them, and a warning where BOS looks wrong."""
    rows = [(token["position"], token["id"], display.token(token)) for token in tokens]
    table("Tokens", ["#position", "#id", "token"], rows)
    if warning:
        line(f"Warning: {warning}")
        line("")


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
