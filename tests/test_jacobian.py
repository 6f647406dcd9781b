"""The detached Jacobian against autograd over an independent forward, and against the paper's own code."""

import math
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from safetensors.torch import load_file

from ggjac.model import open_model

MLP_PATHS = ("up", "gate")


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative L2 distance, in float64."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("mlp_path", MLP_PATHS)
@pytest.mark.parametrize("case", tiny.CASES)
def test_equals_autograd_of_an_independent_forward(tiny_files: dict[str, Path], case: str, mlp_path: str) -> None:
    ids = tiny.prompt(case, 6)
    expected = oracle.jacobian(tiny_files[case], ids, mlp_path=mlp_path)
    J = open_model(tiny_files[case], dtype="float64").trace(ids, mlp_path=mlp_path).jacobian()
    assert distance(J.to_dense(), expected.J) < 1e-10
    assert distance(J.output, expected.y) < 1e-10
    # Relative to y: the offset of a model without biases is zero.
    assert float((J.offset - expected.offset).norm() / expected.y.norm()) < 1e-10
