"""The command line: parse, one library call, print. Everything it does, the library does.

Commands are imported when they are called, and torch when it is needed, so that `--help` and `info` answer at once.
"""

import faulthandler
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

from ggjac import __version__
from ggjac.cli import together

# OpenMP's threads would spin between torch's operations, on the cores that dequantization needs. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Command -> its line in the overview, which therefore imports no command.
COMMANDS = {
    "analyze": "Analyse a prompt: prediction, parity, singular vectors, attribution; write a run folder.",
    "models": "List the models that are on this disk already.",
    "info": "Show what is in a GGUF file.",
    "plan": "Show whether a command will fit in memory, and how long it will take.",
    "predict": "Show the most likely next tokens.",
    "verify": "Compare tokens, logits and every layer with llama.cpp.",
    "svd": "Leading singular vectors, decoded to tokens.",
    "jacobian": "The dense detached Jacobian, and the contribution of each position.",
    "layers": "Singular vectors and stable rank of every layer, and the logit lens.",
    "ranks": "Stable rank of every token's own map, over many prompts.",
    "norms": "Longest columns and rows of the dense detached Jacobian, decoded.",
    "attribute": "Shares of input tokens, layers, heads, experts or edges in a logit, or in a projection.",
    "attend": "Why a head attends: the scores of its keys, split over pairs of parts.",
    "reach": "How far the map holds for changed prompts; the effects of tokens that are left out.",
    "merge": "Put the files of a study's shards together.",
    "compare": "Two files of one model, or two prompts: spectra, subspaces, shares, logits.",
    "contrast": "Reconstruction with and without freezing: detached and ordinary Jacobian.",
    "steer": "Steer a prompt with the linear map of another, or along a direction.",
    "report": "Write the HTML report of a run folder or of JSON output, and its figures.",
    "bench": "Measure this machine: disk, dequantization and multiplication, each with its limit.",
}


# Those that take no prompt; all others can be planned, and have a row in `ggjac.planner.work.JOBS`.
WITHOUT_PROMPT = ("models", "info", "plan", "merge", "report", "bench")


# What the library asks for, and the options that give it.
OPTIONS = {
    "give a text or token ids": "-p, -f or --tokens",
    "give token ids": "--tokens 1,2,3",
    "give a larger context": "--context N",
    "a wider dtype": "--dtype",
    "a smaller strength": "--strength",
    "choose another layer": "--layer",
    "name the depth at which it is projected": "--layer",
    "ask for each position's own map": "--per-token",
}
ARGUMENT = re.compile(
    r"(?<![\w.])(at|dtype|exclude|layers?|key|versus|(?:input_)?position|rank)=(?=\S)"
)  # `rank=9`, as the library has it


def by_options(message: str, named: Mapping[str, str]) -> str:
    """Return a message of the library, `rank=9` as `--rank 9`; `named` has options that are not called so."""
    return ARGUMENT.sub(lambda found: f"{named.get(found[1], '--' + found[1].replace('_', '-'))} ", message)


def in_options(message: str) -> str:
    """Return a message of the library, its advice with the options of the command line."""
    message = by_options(message, {})
    for words, option in OPTIONS.items():
        message = message.replace(words, f"{words} ({option})", 1)
    return message


class Failure(click.ClickException):
    """An error message of one line, with the exit code of its kind."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # declared as a class variable, read from the instance

    def show(self, file: object = None) -> None:
        """Print the message to stderr on one line; quotations from files and paths are escaped."""
        from ggjac.display import visible

        message = " ".join(in_options(self.format_message()).split())
        message = f"Error: {visible(message)}"
        if place := together.here():
            place.say(message)
        else:
            click.echo(message, err=True)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: as an exception, so that unfinished files are removed."""

    def __init__(self, number: int):
        super().__init__()
        self.exit_code = 128 + number


class Commands(click.Group):
    """A group that imports its commands on demand and turns errors into one line and an exit code.

    0 done; 1 failed; 2 usage; 3 a check fell outside its tolerance; 4 will not fit; 130 interrupted.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line; characters that the encoding of a stream lacks are escaped, in help as in results."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # None where the shell has closed it
                stream.reconfigure(errors="backslashreplace")
        warnings.showwarning = _show_warning
        place = together.here()
        if place and place.rank and sys.argv[1:2] and sys.argv[1] in WITHOUT_PROMPT:
            return None
        return super().main(*args, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the overview."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        return getattr(import_module(f"ggjac.cli.{cmd_name}"), cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of the arguments; of an unknown one name the most similar."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            alike = get_close_matches(args[0], COMMANDS, 1)
            if not alike or args[0].startswith("-"):
                raise
            raise click.UsageError(f"no such command: {args[0]}; did you mean {alike[0]}?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the overview without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Parse the options before the command."""
        with _plain_errors():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        with _plain_errors(), _catching_signals():
            _name_crashes()
            return super().invoke(ctx)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Print a warning to stderr, on one line."""
    from ggjac.display import visible

    text = " ".join(str(message).split())
    click.echo(f"Warning: {visible(text)}", err=True)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn every error into one line and an exit code; no traceback, unless GGJAC_DEBUG=1 asks for it."""
    try:
        yield
    except (Failure, click.exceptions.NoArgsIsHelpError, click.exceptions.Exit):
        raise
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "ggjac"
        message = error.format_message().rstrip(".")
        named = {param.name or "": max(param.opts, key=len) for param in error.ctx.command.params} if error.ctx else {}
        if message.startswith("Got unexpected extra argument") and "prompt" in named:
            message += ": a prompt is given by -p"
        message = by_options(message, named)
        raise Failure(f"{message}; see {where} --help", 2) from error
    except KeyboardInterrupt as interrupt:
        raise _interrupted(interrupt) from None
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(1) from None
    except Exception as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Python wraps one that comes while a class is being made
            raise _interrupted(error.__cause__) from None
        if os.environ.get("GGJAC_DEBUG"):
            raise
        raise _failure(error) from error


def _interrupted(interrupt: KeyboardInterrupt) -> click.exceptions.Exit:
    """Say that a command was interrupted, and return the exit of its kind."""
    notes = getattr(interrupt, "__notes__", ["no partial files were left"])
    if not ((place := together.here()) and place.failed()):
        click.echo(f"\nInterrupted; {'; '.join(notes)}", err=True)
    return click.exceptions.Exit(getattr(interrupt, "exit_code", 130))


def _failure(error: Exception) -> Failure:
    """Choose message and exit code of an error that a command did not handle itself."""
    message = "; ".join([str(error), *getattr(error, "__notes__", [])])
    if getattr(error, "will_not_fit", False):
        return Failure(message, 4)
    # torch raises RuntimeError where its allocators fail, on the CPU ("can't allocate memory") and on CUDA.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate" in message):
        return Failure(f"out of memory ({message}); use a shorter prompt, a smaller rank or another device", 4)
    if isinstance(error, RuntimeError) and ("gloo" in message or type(error).__name__.startswith("Dist")):
        late = "timed out" in message.lower() or "timeout" in message.lower()
        return Failure(together.SILENT if late else together.LOST, 1)
    if isinstance(error, OSError) and error.strerror:
        return Failure(f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror, 1)
    if isinstance(error, ValueError | OSError):
        return Failure(message, 1)
    name = type(error).__name__
    return Failure(f"{name}: {message}; this is a bug: please report it with what GGJAC_DEBUG=1 shows", 1)


def _name_crashes() -> None:
    """Let pages that cannot be read end a command by an error; and a process that crashes say why, and where."""
    if not faulthandler.is_enabled():
        with suppress(OSError, ValueError, AttributeError):  # stderr is closed, or not a file
            faulthandler.enable(all_threads=False)
    from ggjac.guard import install

    install()


@contextmanager
def _catching_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, cleaning up; leave alone what a caller has set (nohup)."""
    caught = []
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _terminate)
                caught.append(number)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, frame: object) -> None:
    raise Terminated(number)


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ggjac")
def main() -> None:
    """Show the exact linear map that a GGUF language model applies to one prompt.

    Without -m, commands run on a small demo model that comes with ggjac:

    \b
        ggjac analyze
        ggjac analyze -m llama-3.2-3b-q4_k_m.gguf -p "The bridge out of Marin is the"
    """
