"""Coherence of decoded tokens and its shuffled baseline, on embeddings made by hand and against brute force."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch.nn.functional import cosine_similarity

from ggjac.analysis.readability import Coherence, coherence, mean_cosine
from ggjac.decode import Ranked, nearest, top_logits
from ggjac.model import open_model


def test_coherence_is_the_mean_cosine_of_all_pairs(tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files["gqa"], dtype="float64")
    E = model.embedding.dense()
    ids = torch.tensor([[5, 9, 2, 40], [7, 7, 7, 7], [0, 1, 2, 3]])
    found = mean_cosine(ids, model.embedding)
    for row, score in zip(ids.tolist(), found, strict=True):
        pairs = [cosine_similarity(E[i], E[j], dim=0) for a, i in enumerate(row) for j in row[a + 1 :]]
        assert torch.allclose(score, torch.stack(pairs).mean(), atol=1e-14)
    assert abs(float(found[1]) - 1) < 1e-14


def file_of(E: torch.Tensor, folder: Path) -> Path:
    """Write a model whose embeddings are `E`, and its head too."""
    path = folder / "embeddings.gguf"
    draw = tiny.draw

    def drawn(entry: tiny.Entry, seed: int) -> np.ndarray:
        return E.numpy().astype(np.float32) if entry.name == "token_embd.weight" else draw(entry, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "draw", drawn)
        return tiny.write(path, layers=1, tied=True, vocab=512)


@pytest.mark.parametrize("decode", [top_logits, nearest])
def test_groups_of_alike_tokens_stand_out(decode: Callable[..., Ranked], tmp_path: Path) -> None:
    """Embeddings in 64 groups of eight: the direction of a group has one of them on top, a shuffled one has several."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    E = centres.repeat_interleave(8, 0) + 0.5 * torch.randn(512, 64, generator=generator, dtype=torch.float64)
    model = open_model(file_of(E, tmp_path), dtype="float64")

    def decoded(vectors: torch.Tensor, top: int) -> Ranked:
        return decode(model.embedding, vectors, top)

    found = coherence(centres, decoded, model.embedding)
    assert found.shuffled.shape == (200,)
    assert (found.above > 1.5).all()
    assert (found.chance < 0.1).all()
    noise = torch.randn(60, 64, generator=generator, dtype=torch.float64)
    random = coherence(noise, decoded, model.embedding)
    assert abs(float(random.above.mean())) < 0.5  # sixty draws of spread 1: four standard errors
    assert 0.3 < float(random.chance.mean()) < 0.7


def test_the_baseline_is_the_same_vectors_with_other_components(tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files["gqa"], dtype="float64")
    vectors = torch.arange(1.0, 129.0, dtype=torch.float64).reshape(2, 64)
    seen = []

    def decoded(V: torch.Tensor, top: int) -> Ranked:
        seen.append(V)
        return top_logits(model.head.matrix, V, top)

    a, again, b = (coherence(vectors, decoded, model.embedding, top=3, shuffles=5, seed=seed) for seed in (1, 1, 2))
    V = seen[0]
    assert torch.equal(V[:2], vectors)
    assert torch.equal(V[2:].sort(1).values, vectors[[0, 1, 0, 1, 0]])
    assert not any(torch.equal(V[2], other) for other in (V[0], V[4], V[6]))
    assert torch.equal(V, seen[1])
    assert not torch.equal(V[2:], seen[2][2:])
    ids = (V @ model.head.matrix.dense().T).topk(3).indices
    scores = mean_cosine(ids, model.embedding)
    assert torch.allclose(a.scores, scores[:2])
    assert torch.allclose(a.shuffled, scores[2:])
    assert torch.equal(a.shuffled, again.shuffled)
    assert torch.equal(a.scores, b.scores)
    assert not torch.equal(a.shuffled, b.shuffled)


def test_standing_among_the_shuffled() -> None:
    found = Coherence(torch.tensor([3.0, 0.0, 9.0]).double(), torch.tensor([1.0, 2.0, 3.0]).double())
    assert (found.mean, found.sd) == (2.0, 1.0)
    assert found.above.tolist() == [1.0, -2.0, 7.0]
    assert found.chance.tolist() == [0.5, 1.0, 0.25]


@pytest.mark.parametrize(("top", "shuffles"), [(1, 200), (8, 1)])
def test_nothing_to_compare_is_refused(top: int, shuffles: int, tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files["gqa"])
    with pytest.raises(ValueError, match=f"top={top}, shuffles={shuffles}"):
        coherence(
            torch.ones(1, 64),
            lambda V, count: top_logits(model.head.matrix, V, count),
            model.embedding,
            top=top,
            shuffles=shuffles,
        )
