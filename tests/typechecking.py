"""The type checker of the test run: beartype, except for annotations that it cannot check.

beartype refuses a whole function, and with it the module's import, when one annotation has no run-time meaning for it:
`typing.Self` on a function seen without its class (as jaxtyping's hook shows it), or a protocol that is not
`runtime_checkable`. Here such an annotation is dropped and the others still count.
"""

from collections.abc import Callable
from typing import Any

from beartype import beartype
from beartype.roar import BeartypeDecorHintException


def checkable(hint: Any) -> bool:
    """Tell whether beartype can make a check of this annotation."""

    def probe(x: Any) -> None: ...

    probe.__annotations__ = {"x": hint}
    try:
        beartype(probe)
    except BeartypeDecorHintException:
        return False
    return True


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate as `beartype` does. jaxtyping passes a stand-in made for the check: its annotations are ours to edit.

    Functions within functions are left alone: they would be decorated anew at every call of the outer one.
    """
    if "<locals>" in function.__qualname__:
        return function
    try:
        return beartype(function)
    except BeartypeDecorHintException:
        hints = function.__annotations__
        function.__annotations__ = {name: hint for name, hint in hints.items() if checkable(hint)}
        return beartype(function)
