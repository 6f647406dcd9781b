"""Decoding to tokens against a dense brute force: every tie, every zero row, any tiling."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import oracle
import pytest
import tiny
import torch
from helpers import compute_in
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ggjac import decode
from ggjac.linop import Matrix
from ggjac.model import open_model
from ggjac.sizes import SMALL_PIECES
from ggjac.weights import Weight


class Tiled(Matrix):
    """A dense matrix that comes in tiles of three rows, in one buffer that the next tile overwrites."""

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        buffer = self.values.new_empty(3, self.values.shape[1])
        for start in range(0, len(self.values), 3):
            stop = min(start + 3, len(self.values))
            buffer[: stop - start] = self.values[start:stop]
            yield start, stop, buffer[: stop - start]
        buffer.fill_(math.nan)


def brute(scores: list[list[float]], count: int) -> tuple[list[list[int]], list[list[float]]]:
    """Sort by descending score, then by id, in plain Python."""
    ids = [sorted(range(len(row)), key=lambda i: (-row[i], i))[:count] for row in scores]
    return ids, [[row[i] for i in best] for row, best in zip(scores, ids, strict=True)]


def cosines(V: Tensor, W: Tensor) -> list[list[float]]:
    """Return the cosine of every vector with every row; a zero row gives -inf, a zero vector 0."""
    table = []
    for v in V.tolist():
        row = []
        for w in W.tolist():
            product = math.hypot(*v) * math.hypot(*w)
            if not any(w):
                row.append(-math.inf)
            else:
                row.append(sum(a * b for a, b in zip(v, w, strict=True)) / product if product else 0.0)
        table.append(row)
    return table


# Small whole numbers: products are exact, and ties abound.
whole = st.integers(-2, 2)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    d, v, k = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 3))
    rows = st.lists(whole, min_size=d, max_size=d)
    W = draw(st.lists(rows, min_size=v, max_size=v))
    Y = draw(st.lists(rows, min_size=k, max_size=k))
    return torch.tensor(W).double(), torch.tensor(Y).double(), draw(st.integers(0, v + 3))


@settings(deadline=None, max_examples=150)
@given(matrices())
def test_top_logits_are_those_of_a_full_sort(case: tuple[Tensor, Tensor, int]) -> None:
    W, Y, count = case
    ids, scores = brute((Y @ W.T).tolist(), count)
    for head in (Matrix(W), Tiled(W)):
        best = decode.top_logits(head, Y, count)
        assert best.ids.tolist() == ids
        assert best.scores.tolist() == scores


@settings(deadline=None, max_examples=100)
@given(matrices(), st.sets(st.integers(0, 39)))
def test_hidden_tokens_leave_their_places_to_the_next_best(case: tuple[Tensor, Tensor, int], some: set[int]) -> None:
    W, Y, count = case
    hidden = [i for i in sorted(some) if i < len(W)]
    left = [i for i in range(len(W)) if i not in some]
    for find in (decode.top_logits, decode.nearest):
        every = find(Matrix(W), Y, len(W))
        wanted = [[i for i in row if i in left][:count] for row in every.ids.tolist()]
        for matrix in (Matrix(W), Tiled(W)):
            best = find(matrix, Y, count, hidden=hidden)
            assert best.ids.tolist() == wanted
            scores = [
                dict(zip(*row, strict=True)) for row in zip(every.ids.tolist(), every.scores.tolist(), strict=True)
            ]
            assert best.scores.tolist() == [[of[i] for i in ids] for of, ids in zip(scores, wanted, strict=True)]


def test_many_equal_scores_go_to_the_smaller_ids() -> None:
    """Enough rows that torch's own top-k would pick any of the equals."""
    W = (torch.arange(5000) % 3).double()[:, None]
    best = decode.top_logits(Matrix(W), torch.tensor([[1.0], [-1.0], [0.0]]).double(), 4)
    assert best.ids.tolist() == [[2, 5, 8, 11], [0, 3, 6, 9], [0, 1, 2, 3]]


@settings(deadline=None, max_examples=100)
@given(matrices())
def test_nearest_is_by_cosine(case: tuple[Tensor, Tensor, int]) -> None:
    W, V, count = case
    table = cosines(V, W)
    for embedding in (Matrix(W), Tiled(W)):
        best = decode.nearest(embedding, V, count)
        _, scores = brute(table, count)
        # Equal cosines may differ in the last bit, so ids are held to their own scores.
        assert torch.allclose(best.scores, torch.tensor(scores).double().reshape(best.scores.shape), atol=1e-12)
        for row, ids, found in zip(table, best.ids.tolist(), best.scores.tolist(), strict=True):
            assert [row[i] for i in ids] == pytest.approx(found, abs=1e-12)
            assert len(set(ids)) == len(ids) == min(count, len(W))


def test_lengths_do_not_matter_to_the_nearest() -> None:
    """The reference code ranks by dot product with rows of unlike lengths: the long row wins there."""
    W = torch.tensor([[100.0, 100.0], [1.0, 0.0], [1e-3, 1e-4], [0.0, 0.0], [-5.0, 0.0]])
    best = decode.nearest(Matrix(W), torch.tensor([[2.0, 0.0], [0.0, 1e-3]]), 9)
    assert best.ids.tolist() == [[1, 2, 0, 4, 3], [0, 2, 1, 4, 3]]
    assert best.scores[0].tolist() == pytest.approx([1.0, 0.99504, 0.70711, -1.0, -math.inf], abs=1e-5)


def test_a_zero_row_never_outranks_even_an_opposite() -> None:
    W = torch.tensor([[0.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    best = decode.nearest(Matrix(W), torch.tensor([[1.0, 0.0]]), 3)
    assert best.ids.tolist() == [[1, 0, 2]]
    assert best.scores.tolist() == [[-1.0, -math.inf, -math.inf]]


def test_a_row_too_small_to_have_a_length_is_nearest_to_nothing() -> None:
    """The squares of its numbers are 0, and it has no length; its product is not 0."""
    W = torch.tensor([[1e-30, 1e-30], [-1.0, 0.0], [0.0, 1e-12]])
    best = decode.nearest(Matrix(W), torch.tensor([[1.0, 0.0]]), 3)
    assert best.ids.tolist() == [[2, 1, 0]]
    assert best.scores.tolist() == [[0.0, -1.0, -math.inf]]


def test_nothing_is_nearest_to_nothing_in_particular() -> None:
    W = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    best = decode.nearest(Matrix(W), torch.zeros(1, 2), 3)
    assert best.ids.tolist() == [[0, 2, 1]]
    assert best.scores.tolist() == [[0.0, 0.0, -math.inf]]


def test_vectors_that_are_not_numbers_do_not_crash() -> None:
    best = decode.top_logits(Matrix(torch.eye(4)), torch.tensor([[math.nan] * 4, [0.0, 2.0, 1.0, 0.0]]), 2)
    assert best.ids[1].tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_rank_as_float64_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    W, V = (torch.randn(size, 16, generator=generator).to(dtype) for size in (50, 3))
    best = decode.nearest(Matrix(W), V, 1)
    expected = torch.nn.functional.cosine_similarity(V.double()[:, None], W.double()[None], dim=2)
    eps = torch.finfo(dtype).eps
    assert (expected.max(1).values - expected.gather(1, best.ids)[:, 0] <= 4 * eps).all()
    assert (best.scores.double()[:, 0] - expected.max(1).values).abs().max() <= 4 * eps


@pytest.mark.parametrize("tile", [1, 64 * 7, 1 << 24], ids=["a row", "7 rows", "whole"])
def test_a_files_head_and_embedding(tile: int, tiny_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """`tile` elements, with rows of 64: the last tile is ragged."""
    compute_in(monkeypatch, SMALL_PIECES._replace(tile=tile))
    model = open_model(tiny_file("plain"), dtype="float64")
    W = oracle.load(tiny_file("plain")).weights
    Y = torch.randn(3, tiny.options("plain").d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = Y @ W["output.weight"].T
    assert torch.allclose(model.head.logits(Y), scores, rtol=0, atol=1e-12)
    best = decode.top_logits(model.head.matrix, Y, 200)
    assert best.ids.tolist() == scores.argsort(descending=True).tolist()
    cosine = torch.nn.functional.cosine_similarity(Y[:, None], W["token_embd.weight"][None], dim=2)
    near = decode.nearest(model.embedding, Y, 10)
    assert near.ids.tolist() == cosine.argsort(descending=True)[:, :10].tolist()
    assert torch.allclose(near.scores, cosine.sort(descending=True).values[:, :10], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["bloom", "muse_glimmer"])
def test_a_token_is_nearest_to_its_normed_embedding(
    case: str, tiny_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As block 0 gets it; a row of zeros, which belongs to no token, has no norm's bias for an embedding."""
    model, ids = open_model(tiny_file(case), dtype="float64"), [3, 1, 4]
    trace = model.trace(ids)
    near = decode.nearest(trace.jacobian().network.embedding, trace.x, 2)
    assert near.ids[:, 0].tolist() == ids
    torch.testing.assert_close(near.scores[:, 0], torch.ones(3, dtype=torch.float64), rtol=1e-12, atol=0)
    some = torch.stack([torch.zeros(model.config.d), torch.arange(model.config.d)]).double()
    monkeypatch.setattr(Weight, "tiles", lambda weight: iter([(0, 2, some)]))
    ((_, _, rows),) = model.embeddings.tiles()
    assert rows.any(1).tolist() == [False, True]


@pytest.mark.parametrize("case", ["rwkv7", "muse_glimmer", "gqa"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_first_embedding_is_whole_where_a_norm_has_weights(
    case: str, dtype: str, tiny_file: Callable[..., Path]
) -> None:
    """They come through the same scratch memory as the embeddings."""
    model = open_model(tiny_file(case), dtype=dtype)
    known, tiles = oracle.load(model.path), torch.cat([tile.clone() for _, _, tile in model.embeddings.tiles()])
    expected = torch.stack([oracle.embed(known, [i])[0] for i in range(len(tiles))])
    used = tiles.any(1)
    assert used[0]
    assert torch.allclose((tiles.double() * model.config.embedding_scale)[used], expected[used], atol=1e-5)
