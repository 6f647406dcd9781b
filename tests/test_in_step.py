"""Computations that share each dequantized tile: the bits and the errors of each alone, and the bytes of one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch

from ggjac.generation import Continuation
from ggjac.model import Model, open_model

TinyFile = Callable[..., Path]


def outputs(model: Model, ids: list[int]) -> torch.Tensor:
    return model.trace(ids, tapes=False).outputs


@pytest.mark.parametrize("case", ["gqa", "mixtral", "gemma4_small", "deepseek4", "qwen3next_old", "rwkv7", "kimi_k3"])
def test_traces_of_many_lengths_have_their_own_bits(case: str, tiny_file: TinyFile) -> None:
    path = tiny_file(case)
    prompts = [tiny.prompt(case, 12)[:n] for n in (12, 3, 7)]
    alone = [outputs(open_model(path), ids) for ids in prompts]
    model = open_model(path)
    found = model.in_step([partial(outputs, model, ids) for ids in prompts])
    assert all(map(torch.equal, found, alone))


@pytest.mark.parametrize("case", ["gqa", "mixtral", "olmoe", "grovemoe"])
def test_each_matrix_is_read_once_for_all(case: str, tiny_file: TinyFile) -> None:
    """Of a mixture too: every expert that any of them uses, once, although they use different ones."""
    path, prompts = tiny_file(case), [tiny.prompt(case, 12)[a:b] for a, b in ((0, 4), (4, 12), (3, 5))]
    expected: dict[str, float] = {}
    for ids in prompts:
        model = open_model(path)
        model.trace(ids, tapes=False)
        for name, rows in model.weights.reads.items():
            expected[name] = max(rows, expected.get(name, 0))
    model = open_model(path)
    model.in_step([partial(outputs, model, ids) for ids in prompts])
    for name, rows in model.weights.reads.items():
        stored = model.gguf.tensors[name]
        if len(stored.shape) > 2:
            assert rows <= stored.rows, name
        elif len(stored.shape) == 2 and name != "token_embd.weight":  # of which each reads its own tokens' rows
            assert rows == expected[name], name


def test_products_and_continuations_run_beside_a_trace(tiny_file: TinyFile) -> None:
    model, ids = open_model(tiny_file("gqa")), tiny.prompt("gqa", 8)
    jacobian = model.trace(ids).jacobian()
    y = torch.eye(len(jacobian.output))[:3]
    alone = [jacobian.rmatmat(y), Continuation(model, 8).extend(ids), model.trace(ids[:5], tapes=False).outputs]
    found = model.in_step(
        [
            lambda: jacobian.rmatmat(y),
            lambda: Continuation(model, 8).extend(ids),
            lambda: model.trace(ids[:5], tapes=False).outputs,
        ]
    )
    assert all(map(torch.equal, found, alone))


def test_one_inside_another(tiny_file: TinyFile) -> None:
    model, ids = open_model(tiny_file("gqa")), tiny.prompt("gqa", 8)

    two, three, four = (partial(outputs, model, ids[:n]) for n in (2, 3, 4))
    found = model.in_step([four, lambda: torch.cat(model.in_step([two, three]))])
    assert torch.equal(found[0], four())
    assert torch.equal(found[1], torch.cat([two(), three()]))
    assert not model.weights.readers


def test_an_error_ends_all_and_leaves_the_model_usable(tiny_file: TinyFile) -> None:
    model, ids = open_model(tiny_file("gqa")), tiny.prompt("gqa", 8)
    ended = []

    def fails(layer: int, h: torch.Tensor) -> torch.Tensor:
        if layer == 1:
            raise RuntimeError("stop")
        return h

    def other() -> None:
        try:
            model.trace(ids, tapes=False)
        finally:
            ended.append(True)

    with pytest.raises(RuntimeError, match="stop"):
        model.in_step([other, lambda: Continuation(model, 8, change=fails).extend(ids)])
    assert ended
    assert not model.weights.readers
    assert model.in_step([]) == []
    model.trace(ids, tapes=False)
