"""The shape checks of the test run are in force: a silent hook would prove nothing."""

from typing import Protocol, Self

import jaxtyping
import pytest
import typechecking

from ggjac.ggml import TYPES, row_bytes


def test_shapes_of_the_package_are_checked() -> None:
    assert row_bytes(TYPES[0], 3) == 12
    with pytest.raises(jaxtyping.TypeCheckError):
        row_bytes("F32", 3)


def test_annotations_that_cannot_be_checked_leave_the_others_in_force() -> None:
    class Stored(Protocol):  # not runtime_checkable
        shape: tuple[int, ...]

    def rows(store: Stored | None, count: int) -> Self: ...

    rows.__qualname__ = "rows"  # as if at the top of a module
    rows = jaxtyping.jaxtyped(rows, typechecker=typechecking.check)

    assert rows("anything", 3) is None
    with pytest.raises(jaxtyping.TypeCheckError):
        rows(None, "three")
