"""The type checker of the test run: beartype with jaxtyping's shapes, at a fraction of what `jaxtyping.jaxtyped` costs.

A function is checked at its first calls in a test, and at some of those that follow. Half of all calls are those of a
few functions, once per tile of the weights, and to check each of them took a third of the time of a test.

That decorator makes two stand-ins of a function, binds its arguments to a signature at every call, and decorates a
function within a function anew whenever the outer one runs: three fifths of the time of a test. What it checks is what
`isinstance` says to an annotation within a context that remembers the axes, and both are jaxtyping's here too.

An annotation that beartype cannot check is dropped, and the others still count: it refuses a whole function, and with
it the module's import, for `typing.Self` on a function seen without its class, or a protocol that is not
`runtime_checkable`. Names that only a type checker imports are dropped, too.
"""

import dataclasses
import functools
import inspect
import typing
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jaxtyping
from beartype import beartype
from beartype.roar import BeartypeDecorHintException
from greenlet import getcurrent
from jaxtyping import _storage


class OfEachStack:
    """Where jaxtyping keeps the axes of the calls under way: by greenlet, since calls of several are under way."""

    def __init__(self) -> None:
        self._own: weakref.WeakKeyDictionary[Any, list[Any]] = weakref.WeakKeyDictionary()

    @property
    def memo_stack(self) -> list[Any]:
        """The axes of the current greenlet's calls, the innermost last."""
        return self._own.setdefault(getcurrent(), [])


_storage._shape_storage = OfEachStack()

FIRST_CALLS = 4  # of a function in a test: all are checked
LATER_CALLS = 64  # one in so many of those that follow is
calls: list[list[int]] = []  # of every function that is checked

context = jaxtyping.jaxtyped  # called with "context": the axes of one call


def checkable(hint: Any) -> bool:
    """Tell whether beartype can make a check of this annotation."""

    def probe(x: Any) -> None: ...

    probe.__annotations__ = {"x": hint}
    try:
        beartype(probe)
    except BeartypeDecorHintException:
        return False
    return True


def resolved(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function's annotations, those in quotes as what they name; without those that name nothing yet."""
    hints = {}
    for name, hint in function.__annotations__.items():
        alone = SimpleNamespace(__annotations__={name: hint})
        try:
            hints |= typing.get_type_hints(alone, function.__globals__, include_extras=True)
        except (NameError, TypeError):  # TypeError: `array[int]` is for type checkers only
            continue
    return hints


def has_shape(hint: Any) -> bool:
    """Tell whether an annotation says something of an array's axes."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(has_shape(part) for part in typing.get_args(hint))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function so that its arguments and what it returns are checked.

    Functions within functions are left alone: they would be decorated anew at every call of the outer one.
    """
    if "<locals>" in function.__qualname__:
        return function
    own, hints = function.__annotations__, resolved(function)
    try:
        function.__annotations__ = hints
        checked = beartype(function)
    except BeartypeDecorHintException:
        function.__annotations__ = {name: hint for name, hint in hints.items() if checkable(hint)}
        checked = beartype(function)
    finally:
        function.__annotations__ = own
    if checked is function or any(str(getattr(hint, "__module__", "")).startswith("triton") for hint in hints.values()):
        return function  # nothing to check; and Triton compiles a function from its own source, with its own globals
    has_shapes = any(map(has_shape, hints.values()))
    calls.append(counted := [0])

    @functools.wraps(function)
    def sampled(*args: Any, **options: Any) -> Any:
        counted[0] += 1
        if counted[0] > FIRST_CALLS and counted[0] % LATER_CALLS:
            return function(*args, **options)
        if not has_shapes:
            return checked(*args, **options)
        with context("context"):
            return checked(*args, **options)

    return sampled


def start_test() -> None:
    """Count the calls of every function from none."""
    for counted in calls:
        counted[0] = 0


def jaxtyped(thing: Any = None, *, typechecker: Any = check) -> Any:
    """Stand in for the decorator that jaxtyping's import hook puts on functions and classes."""
    if thing is None:
        return jaxtyped
    if inspect.isclass(thing):
        if dataclasses.is_dataclass(thing):
            thing.__init__ = check(thing.__init__)
        return thing
    return check(thing)
