"""Options that do not go together, as data: refused before anything is planned, opened or computed."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import click

# In place of a value of --position: several of them.
SEVERAL = "several"


class Apart(NamedTuple):
    """Options that each say what is asked, and those that cannot be asked at once.

    An option is written as in a command line: `--exclude`, or with a value, as `--by edge`; `--position several`.

    Attributes:
        options: any of these.
        about: what they do, after the name of one of them.
        others: those that do not go with any of them.
    """

    options: Sequence[str]
    about: str
    others: Sequence[str]


class Needs(NamedTuple):
    """Options that mean something only beside another one, of which any will do."""

    options: Sequence[str]
    others: Sequence[str]


def apart(*rules: Apart | Needs) -> Callable:
    """Return a decorator that refuses options by rules; apply it above `dry_run`, so that plans are refused too."""

    def decorate(command: Callable) -> Callable:
        @wraps(command)
        def wrapped(*args: Any, **params: Any) -> Any:
            for rule in rules:
                _check(rule)
            return command(*args, **params)

        return wrapped

    return decorate


def _check(rule: Apart | Needs) -> None:
    """Refuse options that break a rule.

    Raises:
        click.UsageError: the message names them.
    """
    for option in filter(_is_given, rule.options):
        if isinstance(rule, Needs):
            if not any(map(_is_given, rule.others)):
                raise click.UsageError(f"{option} goes with {' or '.join(rule.others)}; give that too, or leave it out")
            continue
        for other in filter(_is_given, rule.others):
            other = "several positions" if other.endswith(SEVERAL) else other
            raise click.UsageError(f"{option} {rule.about}: this does not go with {other}; leave one of them out")


def _is_given(option: str) -> bool:
    """Return whether the command line gives an option, or an option a value."""
    context = click.get_current_context()
    flag, _, value = option.partition(" ")
    name = next(param.name for param in context.command.params if flag in param.opts)
    assert name is not None
    source, found = context.get_parameter_source(name), context.params[name]
    if value == SEVERAL:
        return isinstance(found, str)
    return found == value if value else source is not click.core.ParameterSource.DEFAULT
