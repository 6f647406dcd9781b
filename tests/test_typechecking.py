"""The shape checks of the test run are in force: a silent hook would prove nothing."""

from typing import Protocol, Self

import pytest
import torch
import typechecking
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from torch import Tensor

from ggjac.decode import top_logits
from ggjac.gguf.types import TYPES, row_bytes
from ggjac.linop import Matrix


def test_types_and_shapes_of_the_package_are_checked() -> None:
    assert row_bytes(TYPES[0], 3) == 12
    with pytest.raises(BeartypeCallHintViolation):
        row_bytes("F32", 3)
    assert top_logits(Matrix(torch.eye(3)), torch.ones(2, 3), 1).ids.shape == (2, 1)
    with pytest.raises(BeartypeCallHintViolation):
        top_logits(Matrix(torch.eye(3)), torch.ones(3), 1)


def at_the_top(function):
    """Return a function as it would be checked at the top of a module."""
    function.__qualname__ = function.__name__
    return typechecking.check(function)


def test_axes_of_one_name_are_equal_within_a_call() -> None:
    def cut(x: Float[Tensor, "n d"], y: Float[Tensor, " n"], count: int) -> Float[Tensor, "n d"]:
        return x[:count]

    cut = at_the_top(cut)
    for n in (2, 3):  # each call has its own
        assert cut(torch.ones(n, 4), torch.ones(n), n).shape == (n, 4)
    with pytest.raises(BeartypeCallHintViolation, match="parameter y"):
        cut(torch.ones(2, 4), torch.ones(3), 2)
    with pytest.raises(BeartypeCallHintViolation, match="return"):
        cut(torch.ones(2, 4), torch.ones(2), 1)


def test_of_many_calls_in_a_test_some_are_checked() -> None:
    def count(x: int) -> int:
        return len([x])

    def refused() -> bool:
        try:
            return count("x") != 1
        except BeartypeCallHintViolation:
            return True

    count = at_the_top(count)
    first, later = typechecking.FIRST_CALLS, typechecking.LATER_CALLS
    found = [refused() for _ in range(2 * later)]
    assert all(found[:first])
    assert sum(found) == first + 2
    typechecking.start_test()
    assert refused()


def test_axes_are_not_those_of_the_caller() -> None:
    def inner(x: Float[Tensor, " n"]) -> int:
        return len(x)

    def outer(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        assert inner(torch.ones(7)) == 7
        return x

    inner, outer = at_the_top(inner), at_the_top(outer)
    assert len(outer(torch.ones(3))) == 3


def test_annotations_that_cannot_be_checked_leave_the_others_in_force() -> None:
    class Stored(Protocol):  # not runtime_checkable
        shape: tuple[int, ...]

    def rows(store: Stored | None, path: "Missing", count: int) -> Self: ...

    rows = at_the_top(rows)
    assert rows("anything", "anything", 3) is None
    with pytest.raises(BeartypeCallHintViolation):
        rows(None, None, "three")
