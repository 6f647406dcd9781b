"""The command line: parse, one library call, print. Everything it does, the library does.

Commands are imported when they are called, and arithmetic when it is needed, so that `--help` and `info` answer at
once.
"""

import os
import sys
from importlib import import_module

import click

from ggjac import __version__

# Command -> the first sentence of its help, so that the overview imports no command.
COMMANDS = {
    "analyze": "Analyse a prompt: prediction, parity, singular vectors, attribution; write a run folder.",
    "info": "Show what is in a GGUF file.",
    "predict": "Show the most likely next tokens.",
    "verify": "Compare tokens, logits and every layer with llama.cpp.",
    "svd": "Decompose a prompt's detached Jacobian and decode its singular vectors.",
    "jacobian": "Compute the dense detached Jacobian and what each position contributes.",
    "attribute": "Split a token's logit exactly over the input tokens.",
}


class Failure(click.ClickException):
    """An error message of one line, with the exit code of its kind."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # declared as a class variable, read from the instance

    def show(self, file: object = None) -> None:
        """Print the message to stderr."""
        click.echo(f"Error: {self.format_message()}", err=True)


class Commands(click.Group):
    """A group that imports its commands on demand and turns errors into one line and an exit code.

    0 done; 1 failed; 2 usage; 3 a check fell outside its tolerance; 4 will not fit; 130 interrupted.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the overview."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        return getattr(import_module(f"ggjac.cli.{cmd_name}"), cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the overview without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; no traceback for a user's mistake (set GGJAC_DEBUG=1 to see it)."""
        try:
            return super().invoke(ctx)
        except Failure:
            raise
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "ggjac"
            raise Failure(f"{error.format_message().rstrip('.')}; see {where} --help", 2) from error
        except KeyboardInterrupt:
            click.echo("\nInterrupted; nothing was written", err=True)
            ctx.exit(130)
        except BrokenPipeError:  # the reader of our output has gone, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except MemoryError as error:
            raise Failure(f"out of memory ({error}); use a shorter prompt or a smaller rank", 4) from error
        except (ValueError, OSError) as error:
            if os.environ.get("GGJAC_DEBUG"):
                raise
            raise Failure(" ".join(str(error).split()), 1) from error


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Show the exact linear map that a GGUF language model applies to one prompt.

    Every command works without arguments, on a small demo model that comes with ggjac:

        ggjac analyze

        ggjac analyze -m llama-3.2-3b-q4_k_m.gguf -p "The bridge out of Marin is the"
    """
