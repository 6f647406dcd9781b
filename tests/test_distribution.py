"""Entropy and Fisher information of the next token: against autograd, finite differences and dense eigenvectors."""

from pathlib import Path

import oracle
import pytest
import tiny
import torch
from helpers import distance

from ggjac.decode import Head
from ggjac.jacobian import distribution
from ggjac.jacobian.distribution import FisherInformation, entropy, fisher_directions
from ggjac.model import open_model

# A plain head, tied ones, soft caps, scales and biases of the logits.
CASES = ("gqa", "gemma2", "gemma3", "granite", "cohere2", "phi2", "gpt2", "gemma3n", "talkie")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_entropy_and_its_gradient_are_those_of_autograd(case: str, tiny_files: dict[str, Path]) -> None:
    model, known = open_model(tiny_files[case], dtype="float64"), oracle.load(tiny_files[case])
    y = oracle.forward(known, tiny.prompt(case, 6))["result_norm"].clone().requires_grad_()
    H = torch.distributions.Categorical(logits=oracle.head(known, y)).entropy()
    (gradient,) = torch.autograd.grad(H.sum(), y)
    found = entropy(model.head, y.detach())
    assert distance(found.value, H.detach()) < 1e-12
    assert distance(found.gradient, gradient) < 1e-10
    # And finite differences of our own logits, along any direction.
    step = 1e-5 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ahead, behind = (entropy(model.head, y.detach() + sign * step).value for sign in (1, -1))
    assert distance((ahead - behind) / 2, (found.gradient * step).sum(1)) < 1e-6


def test_fisher_directions_are_those_of_the_dense_matrix(case: str, tiny_files: dict[str, Path]) -> None:
    model, known = open_model(tiny_files[case], dtype="float64"), oracle.load(tiny_files[case])
    y = oracle.forward(known, tiny.prompt(case, 6))["result_norm"][-1]
    W = torch.func.jacrev(lambda y: oracle.head(known, y[None])[0])(y)  # [v, d]
    p = oracle.head(known, y[None])[0].softmax(0)
    F = (W - p @ W).T @ (p[:, None] * (W - p @ W))
    information = FisherInformation(model.head, y)
    assert distance(information.to_dense(), F) < 1e-11
    values, vectors = torch.linalg.eigh(F)
    found = fisher_directions(model.head, y, 3)
    assert distance(found.values, values.flip(0)[:3]) < 1e-8
    assert found.total == pytest.approx(float(F.trace()), rel=1e-10)
    assert found.residual <= 1e-5
    cosines = (found.vectors * vectors.T.flip(0)[:3]).sum(1).abs()
    assert bool((cosines > 1 - 1e-6).all())
    assert bool((found.vectors @ (W[p.argmax()] - p @ W) > 0).all())
    # The KL divergence of a small step, to second order.
    u, step = found.vectors[0], 1e-4 / float(found.values[0]) ** 0.5
    q = oracle.head(known, (y + step * u)[None])[0].log_softmax(0)
    assert float(p @ (p.log() - q)) == pytest.approx(step**2 * float(found.values[0]) / 2, rel=1e-2)


def test_an_almost_certain_token_loses_no_digits(tiny_files: dict[str, Path]) -> None:
    """In float32, where 1 - p is a thousandth of a rounding error of the rows' products."""
    wide = open_model(tiny_files["gqa"], dtype="float64").head
    narrow = open_model(tiny_files["gqa"]).head
    rows = wide.matrix.dense()
    y = 14 * rows[7] / rows[7].norm()
    p = wide.logits(y[None])[0].softmax(0)
    y = y * 12 / float(wide.logits(y[None])[0].topk(2).values.diff().abs())  # the next one at e^-12
    p = wide.logits(y[None])[0].softmax(0)
    assert 0 < 1 - float(p.max()) < 1e-4
    known, found = (entropy(head, y[None].to(head.matrix.dtype)) for head in (wide, narrow))
    assert distance(found.gradient, known.gradient) < 1e-4
    best, ours = (fisher_directions(head, y.to(head.matrix.dtype), 2) for head in (wide, narrow))
    assert distance(ours.values, best.values) < 1e-4
    assert distance(ours.vectors, best.vectors) < 1e-3


def test_sixteen_bit(tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files["gemma2"], dtype="bfloat16")
    y = model.trace([5, 17, 3]).outputs
    wide = Head(open_model(tiny_files["gemma2"], dtype="float64").head.matrix, softcap=model.head.softcap)
    assert entropy(model.head, y).gradient.dtype == torch.bfloat16
    found, known = fisher_directions(model.head, y[-1], 1), fisher_directions(wide, y[-1].double(), 1)
    assert abs(float(found.vectors[0].double() @ known.vectors[0])) > 0.99


def test_what_is_not_there_is_refused(tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    head = open_model(tiny_files["gqa"], dtype="float64").head
    y = head.matrix.dense()[7]
    for count in (0, 65):
        with pytest.raises(ValueError, match=f"Fisher direction {count} is out of range; there are 1 to 64"):
            fisher_directions(head, y, count)
    with pytest.raises(ValueError, match="changes nothing: the next token is all but certain"):
        fisher_directions(head, 1e6 * y, 1)
    for most, there in ((3, 3), (1000, 64)):
        monkeypatch.setattr(distribution, "MOST_DIRECTIONS", most)
        with pytest.raises(ValueError, match=f"is out of range; there are 1 to {there}$"):
            fisher_directions(head, y, 999)
