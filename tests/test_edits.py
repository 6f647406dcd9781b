"""Edited prompts against the oracle on the same inputs of block 0, and against llama.cpp on replaced tokens."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import gguf
import llamacpp
import oracle
import pytest
import tiny
import torch
from helpers import distance

from ggjac.analysis.reach import ablate
from ggjac.blocks import NumericsError
from ggjac.edits import Editor, drawn_tokens
from ggjac.gguf.hub import demo_path
from ggjac.model import open_model
from ggjac.parity import run_llama_cpp

TinyFile = Callable[..., Path]

# Learned positions; embeddings that are scaled, or normed; inputs of their own, by tokens and by embeddings; experts by
# tokens; several streams; recurrences; factors chosen by the length of the whole prompt.
CASES = ["gqa", "gpt2", "gemma2", "rwkv7", "gemma4_small", "gemma4_inputs", "gemma3n", "deepseek4", "hy_v4", "mixtral"]
CASES += ["phi3_long", "qwen35", "falcon_h1", "talkie"]


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_oracle_on_the_same_embeddings(case: str, tiny_file: TinyFile) -> None:
    n, p = (34, 30) if case == "phi3_long" else (9, 6)  # its factors change after 32 tokens
    path, ids, other = tiny_file(case), tiny.prompt(case, n), tiny.prompt(case, n, seed=5)
    known, model = oracle.load(path), open_model(path, dtype="float64")
    editor, x, to = Editor(model, ids, p), oracle.embed(known, ids), oracle.embed(known, other)
    places = known.weights.get("position_embd.weight", torch.zeros(n, 1))
    tokens = known.weights["token_embd.weight"].any(1).nonzero()[:, 0].tolist()
    mean = torch.stack([oracle.embed(known, [j])[0] for j in tokens]).mean(0)
    direction = torch.linspace(-1, 1, x.shape[1], dtype=torch.float64).expand(p + 1, -1)

    def row(i: int, value: torch.Tensor) -> torch.Tensor:
        changed = x.clone()
        changed[i] = value
        return changed

    swapped = [*ids[:3], other[0], *ids[4:]]
    expected = [
        (editor.without(2, "mean"), ids, row(2, mean - places[0] + places[2])),
        *([(editor.without(0, "zero"), ids, row(0, torch.zeros_like(mean)))] if case != "gemma3n" else []),
        (editor.swapped(3, other[0]), swapped, oracle.embed(known, swapped)),
        (editor.swapped(3, other[0], 0.25), ids, 0.75 * x + 0.25 * oracle.embed(known, swapped)),
        (editor.toward(other, 0.5), ids, (x + to) / 2),
        (editor.toward(other, 1.0), other, to),
        (editor.stepped(direction, 0.3), ids, torch.cat([x[: p + 1] + 0.3 * direction, x[p + 1 :]])),
    ]
    edits, steps = [edit for edit, _, _ in expected], []
    found = editor.outputs(edits, progress=lambda *step: steps.append(step))
    for y, (_, tokens, changed) in zip(found, expected, strict=True):
        truth = oracle.forward(known, tokens, x=changed, context=len(ids))["result_norm"][p]
        assert distance(y, truth) < 1e-10
    assert steps[-1] == (model.config.block_count, model.config.block_count)
    model.chunk_bytes = 1  # one by one
    assert torch.equal(editor.outputs(edits, progress=lambda *step: steps.append(step)), found)
    assert steps[-1] == (model.config.block_count * len(edits),) * 2


@pytest.mark.parametrize("case", ["gqa", "gemma4_inputs", "deepseek4"])
def test_a_replaced_token_gives_what_llama_cpp_gives(case: str, tiny_file: TinyFile) -> None:
    """The logits of llama.cpp itself on the text with the other token; what blocks read by its id follows it."""
    model, ids = open_model(tiny_file(case)), tiny.prompt(case, 5)
    editor = Editor(model, ids, len(ids) - 1)
    found = model.head.logits(editor.outputs([editor.swapped(i, 7 + i) for i in range(len(ids))]))
    for i, logits in enumerate(found):
        swapped = [*ids[:i], 7 + i, *ids[i + 1 :]]
        theirs = run_llama_cpp(model.path, swapped, layers=False, threads=1).logits[-1]
        assert distance(logits, theirs) < 1e-3  # its GELU comes from a table in half precision


@pytest.mark.parametrize("case", ["gqa", "gemma3"])
@pytest.mark.parametrize("by", ["mean", "zero"])
def test_a_token_left_out_has_the_effect_that_llama_cpp_finds(
    case: str, by: Literal["mean", "zero"], tiny_file: TinyFile
) -> None:
    """Its input of block 0 is given to llama.cpp, which reads no token then."""
    path, ids, target = tiny_file(case), tiny.prompt(case, 5), 9
    model, known = open_model(path), oracle.load(path)
    found, x = ablate(model.trace(ids).jacobian(), model, by, target), oracle.embed(known, ids)
    tokens = known.weights["token_embd.weight"].any(1).nonzero()[:, 0].tolist()
    row = oracle.embed(known, tokens).mean(0) * (by == "mean")

    def logit(changed: torch.Tensor) -> float:
        return float(llamacpp.run(path, ids, x=changed)["logits"][-1, target])

    assert logit(x) == pytest.approx(float(llamacpp.run(path, ids)["logits"][-1, target]), rel=1e-5)
    theirs = torch.tensor([logit(x) - logit(torch.cat([x[:i], row[None], x[i + 1 :]])) for i in range(len(ids))])
    assert distance(found.effects, theirs) < 1e-3  # its GELU comes from a table in half precision


def test_zero_has_no_output_where_the_model_divides_by_the_length_of_an_embedding(tiny_file: TinyFile) -> None:
    model, ids = open_model(tiny_file("gemma3n"), dtype="float64"), tiny.prompt("gemma3n", 4)
    editor, known = Editor(model, ids, 3), oracle.load(model.path)
    edit = editor.without(1, "zero")
    with pytest.raises(NumericsError):
        editor.outputs([edit])
    assert oracle.forward(known, ids, x=edit.x())["result_norm"][-1].isnan().all()


def test_rows_of_zeros_are_no_tokens(tiny_file: TinyFile, tmp_path: Path) -> None:
    path = shutil.copy(tiny_file("gqa"), tmp_path / "padded.gguf")
    reader = gguf.GGUFReader(path, "r+")
    (rows,) = (tensor.data for tensor in reader.tensors if tensor.name == "token_embd.weight")
    rows[-3:] = 0
    rows.flush()
    known = oracle.load(path).weights["token_embd.weight"]
    assert not known[-3:].any()
    editor = Editor(open_model(path, dtype="float64"), [5, 6], 1)
    assert distance(editor.mean, known[:-3].mean(0)) < 1e-12


def test_drawn_tokens_are_ordinary_and_differ() -> None:
    model = open_model(demo_path())
    found = drawn_tokens(model, 50, seed=3)
    assert len(set(found)) == 50
    assert {model.tokenizer.kind(id) for id in found} == {"normal"}
    assert found == drawn_tokens(model, 50, seed=3) != drawn_tokens(model, 50, seed=4)
