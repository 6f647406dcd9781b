"""The most likely next tokens against the softmax of the oracle's logits in float64."""

import shutil
from pathlib import Path

import oracle
import pytest
import torch
from helpers import IDS, edited

import ggjac
from ggjac.model import PromptError


@pytest.mark.parametrize("case", ["biases", "gemma2"])
@pytest.mark.parametrize("position", [-1, 2])
def test_probabilities_are_those_of_the_oracle(case: str, position: int, tiny_files: dict[str, Path]) -> None:
    trace = ggjac.open_model(tiny_files[case], dtype="float64").trace(IDS)
    logits = oracle.forward(oracle.load(tiny_files[case]), IDS)["logits"][position]
    found, best = ggjac.predict(trace, 7, position=position), logits.argsort(descending=True)[:7]
    assert found.ids.tolist() == best.tolist()
    assert torch.allclose(found.logits, logits[best], rtol=0, atol=1e-10)
    assert torch.allclose(found.probabilities, logits.softmax(0)[best], rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_probabilities_are_float64_whatever_the_dtype(dtype: str, tiny_files: dict[str, Path]) -> None:
    trace = ggjac.open_model(tiny_files["gqa"], dtype=dtype).trace(IDS)
    found = ggjac.predict(trace, 1000)
    assert found.logits.dtype == found.probabilities.dtype == torch.float64
    assert sorted(found.ids.tolist()) == list(range(128)), "no more than the vocabulary has, each once"
    assert float(found.probabilities.sum()) == pytest.approx(1, abs=1e-12)


def test_ties_are_neighbours_each_named_once(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    """All rows of this head are equal, so that no token is more likely than another."""
    path = edited(Path(shutil.copy(tiny_files["gqa"], tmp_path / "tied.gguf")), "output.weight", 0.5)
    trace = ggjac.open_model(path).trace(IDS)
    found = ggjac.predict(trace, 9)
    assert len(set(found.ids.tolist())) == len(found.ids) == 9
    assert found.logits.tolist() == sorted(found.logits.tolist(), reverse=True)
    assert found.probabilities.tolist() == pytest.approx([1 / 128] * 9, rel=1e-5)
    assert ggjac.predict(trace, 9).ids.tolist() == found.ids.tolist(), "the same order each time"


@pytest.mark.parametrize("position", [5, -6])
def test_a_position_out_of_range_is_refused(position: int, tiny_files: dict[str, Path]) -> None:
    trace = ggjac.open_model(tiny_files["gqa"]).trace(IDS)
    with pytest.raises(PromptError, match=f"position {position} is out of range; the prompt has positions 0 to 4"):
        ggjac.predict(trace, position=position)
