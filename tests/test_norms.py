"""Lengths and tokens of columns and rows against dense float64 arithmetic on the oracle's Jacobian."""

from pathlib import Path

import oracle
import pytest
import tiny
import torch
from helpers import error, invoke, invoke_json
from torch.nn.functional import cosine_similarity

from ggjac.analysis.norms import norms
from ggjac.model import open_model


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 200_000, 1])
@pytest.mark.parametrize("case", ["gqa", "biases", "tied"])
@pytest.mark.parametrize("position", [-1, 2])
def test_norms_decode_as_brute_force_does(
    case: str, position: int, chunk_bytes: int, tiny_files: dict[str, Path]
) -> None:
    ids, known = tiny.prompt(case, 6), oracle.load(tiny_files[case])
    J = oracle.jacobian(known, ids, mlp_path="up", position=position)
    model = open_model(tiny_files[case], dtype="float64")
    ours = model.trace(ids).jacobian(position)
    ours.chunk_bytes = chunk_bytes
    found = norms(ours, 3, column_words=5, row_words=2)

    dense = J.J.transpose(0, 1)  # [n, e, j]
    reached, along = ours.position + 1, J.y - J.offset
    assert torch.allclose(found.columns, dense.norm(dim=1), rtol=0, atol=1e-10)
    assert torch.allclose(found.rows, dense.norm(dim=2), rtol=0, atol=1e-10)
    assert not found.columns[reached:].any()
    embeddings = known.weights["token_embd.weight"]
    head = known.weights.get("output.weight", embeddings)
    for i in range(reached):
        columns = dense[i].norm(dim=0).argsort(descending=True)[:3]
        rows = dense[i].norm(dim=1).argsort(descending=True)[:3]
        assert found.longest_columns[i].tolist() == columns.tolist()
        assert found.longest_rows[i].tolist() == rows.tolist()
        for place in range(3):
            column, row = dense[i][:, columns[place]], dense[i][rows[place]]
            logits = head @ column * torch.sign(column @ along)
            cosine = cosine_similarity(embeddings, row[None]) * torch.sign(along[rows[place]])
            at = 3 * i + place
            assert found.column_tokens.ids[at].tolist() == logits.argsort(descending=True)[:5].tolist()
            assert torch.allclose(found.column_tokens.scores[at], logits.sort(descending=True).values[:5], atol=1e-8)
            assert found.row_tokens.ids[at].tolist() == cosine.argsort(descending=True)[:2].tolist()
            assert torch.allclose(found.row_tokens.scores[at], cosine.sort(descending=True).values[:2], atol=1e-8)


def test_one_pass_down_and_one_up(tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files["gqa"])
    J, reads = model.trace(tiny.prompt("gqa", 6)).jacobian(), model.weights.reads
    _ = J.linear_output
    reads.clear()
    norms(J)
    assert reads["blk.0.ffn_down.weight"] == 2 * 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_and_more_than_there_are(dtype: str, tiny_files: dict[str, Path]) -> None:
    ids = tiny.prompt("one_layer", 3)
    model = open_model(tiny_files["one_layer"], dtype=dtype)
    found = norms(model.trace(ids).jacobian(), 10_000)
    d = model.config.d
    expected = oracle.jacobian(tiny_files["one_layer"], ids, mlp_path="up").J.transpose(0, 1)
    assert found.longest_columns.shape == found.longest_rows.shape == (3, d)
    assert found.columns.dtype == found.rows.dtype == torch.float64
    tolerance = 60 * torch.finfo(getattr(torch, dtype)).eps
    assert torch.allclose(found.columns, expected.norm(dim=1), rtol=tolerance, atol=tolerance)
    assert torch.allclose(found.rows, expected.norm(dim=2), rtol=tolerance, atol=tolerance)
    # The two halves of one matrix: the same total.
    assert torch.allclose(found.columns.square().sum(1), found.rows.square().sum(1), rtol=1e-10)


def test_dense_rows_are_widened_a_few_at_a_time(tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of them may fill the memory; its copy in float64 would take twice as much again."""
    ids, widened = tiny.prompt("gqa", 3), []
    model = open_model(tiny_files["gqa"])
    J = model.trace(ids).jacobian()
    whole = norms(J, 3)
    true = torch.Tensor.double

    def double(tensor: torch.Tensor) -> torch.Tensor:
        widened.append(tensor.shape)
        return true(tensor)

    monkeypatch.setattr("ggjac.jacobian.detached.SLICE", 7, raising=False)
    monkeypatch.setattr(torch.Tensor, "double", double)
    found = norms(J, 3)
    assert max(shape[0] for shape in widened if len(shape) == 3) == 7
    assert torch.allclose(found.columns, whole.columns, rtol=1e-12)
    assert torch.equal(found.rows, whole.rows)
    assert torch.equal(found.longest_rows, whole.longest_rows)
    assert torch.equal(found.row_tokens.ids, whole.row_tokens.ids)


def test_the_command_takes_fewer_rows_at_once_before_it_is_refused(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "wide.gguf", layers=2, d=256, heads=4, ff=1024)
    what = ["-m", str(path), "-t", "1", "--tokens", ",".join(["1"] * 60)]

    def needed(command: str) -> int:
        return invoke_json("plan", *what, "--for", command, "--no-bench")["ram_needed"]

    few, many = needed("attribute"), needed("jacobian")
    assert many > few + (32 << 20)
    invoke("norms", *what, "--ram-budget", (few + many) // 2)
    text = error("norms", *what, "--ram-budget", 1 << 27)
    assert "norms needs" in text
    assert "give --ram-budget" in text
