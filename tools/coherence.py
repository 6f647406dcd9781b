"""How well the scores of a vector's top tokens separate meaningful vectors from meaningless ones, on real models.

    python tools/coherence.py smollm2.gguf gemma3.gguf

Meaningful are directions of word groups made by hand (with noise of equal length), outputs of prompts, and the leading
left vectors of their maps; meaningless are leading vectors with shuffled components, and random mixtures of rows of the
head. Each is decoded by the head to its eight top tokens, and a score says how alike their embeddings are. A number is
the probability that a meaningful vector scores higher than a meaningless one (the area under the ROC curve): 1 is
perfect, 0.5 is chance. A score that shall accompany readings must be close to 1 in all columns for both models; none of
these is, which is why ggjac prints none.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

import ggjac
from ggjac.decode import top_logits
from ggjac.model import Model
from ggjac.weights import Weight

GROUPS = (
    "London Paris Berlin Rome Madrid Vienna Tokyo Chicago Boston Moscow",
    "dog cat horse cow lion tiger wolf bear sheep rabbit",
    "January February March April June July August September October November December",
    "one two three four five six seven eight nine ten",
    "red blue green yellow white black purple orange brown pink",
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "head arm leg hand foot eye ear nose mouth finger",
    "mother father sister brother son daughter uncle aunt wife husband",
    "bread cheese milk rice meat fish fruit sugar butter soup",
    "walk run jump swim climb ride drive fly crawl dance",
    "gold silver iron copper steel lead tin zinc bronze",
    "France Germany Italy Spain China Japan India Russia Canada Brazil",
)
PROMPTS = (
    "The bridge out of Marin is the",
    "My favourite animal is the",
    "The capital of France is",
    "She opened the door and saw a",
    "The largest city in Japan is",
    "Water boils at a temperature of",
    "In 1969 the first man walked on the",
    "He ate a slice of",
    "The opposite of hot is",
    "The doctor told the patient to take the",
    "Shakespeare wrote the play",
    "The colour of the sky is",
)
TOP, COUNT, SAMPLE, MIXED, NEIGHBOURS = 8, 200, 2048, 64, 10

Score = Callable[[Tensor], Tensor]


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+", help="GGUF files")
    parser.add_argument("--seed", type=int, default=0, help="of noise, shuffles and mixtures")
    given = parser.parse_args()
    for path in given.model:
        torch.manual_seed(given.seed)
        model = ggjac.open_model(path)
        good, bad = meaningful(model), meaningless(model)
        ids = {name: top(model, vectors) for name, vectors in (good | bad).items()}
        print(f"\n{path}\n{'score':20}" + "".join(f"{a + ' / ' + b:>20}" for a in good for b in bad))
        for name, score in scores(whole(model.embedding)).items():
            found = {of: score(tokens) for of, tokens in ids.items()}
            print(f"{name:20}" + "".join(f"{area(found[a], found[b]):20.2f}" for a in good for b in bad))


def whole(matrix: Weight) -> Tensor:
    """Return a matrix, dense."""
    return torch.cat([tile.clone() for *_, tile in matrix.tiles()])


def meaningful(model: Model) -> dict[str, Tensor]:
    """Return directions of word groups in the head, outputs of prompts, and leading left vectors."""
    maps = [model.trace(prompt).jacobian() for prompt in PROMPTS]
    head = whole(maps[0].network.head.matrix)
    groups = []
    for words in GROUPS:
        ids = [model.tokenizer.encode(f" {word}", add_special=False) for word in words.split()]
        rows = head[[id[0] for id in ids if len(id) == 1]]
        groups.append(normalize((rows - head.mean(0)).mean(0), dim=0))
    noise = normalize(torch.randn(len(groups), head.shape[1]), dim=1)
    leading = [J.svd(1, tol=1e-2).pointing_along(J.output).U[0] for J in maps]
    return {
        "groups": torch.stack(groups) + noise,
        "outputs": torch.stack([J.output for J in maps]),
        "leading": torch.stack(leading),
    }


def meaningless(model: Model) -> dict[str, Tensor]:
    """Return leading left vectors with shuffled components, and random mixtures of rows of the head."""
    J = model.trace(PROMPTS[0]).jacobian()
    U, head = J.svd(8, tol=1e-2).U, whole(J.network.head.matrix)
    shuffled = torch.stack([U[i % len(U), torch.randperm(U.shape[1])] for i in range(COUNT)])
    rows = head[torch.randint(len(head), (COUNT, MIXED))] - head.mean(0)
    return {"shuffled": shuffled, "mixed": (torch.randn(COUNT, MIXED, 1) * rows).sum(1)}


def top(model: Model, vectors: Tensor) -> Tensor:
    """Return the ids of each vector's top tokens, decoded by the head."""
    matrix = model.trace(PROMPTS[0]).network.head.matrix
    return top_logits(matrix, vectors, TOP).ids


def scores(embedding: Tensor) -> dict[str, Score]:
    """Return the scores by name; each maps token ids `[k, top]` to `[k]`."""
    centred = embedding - embedding.mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    largest = axes[:, -max(3, embedding.shape[1] // 100) :]
    plain, central, rest = (
        normalize(rows, dim=1) for rows in (embedding, centred, centred - centred @ largest @ largest.T)
    )
    sample = torch.randperm(len(plain))[:SAMPLE]
    by_norm = embedding.norm(dim=1).argsort()
    place = by_norm.argsort()

    def hubs(ids: Tensor) -> Tensor:
        near = plain[ids.flatten()] @ plain[sample].T
        near[near > 0.9999] = -1.0  # itself
        return cosines(plain, ids) - near.topk(NEIGHBOURS).values.mean(1).view(ids.shape).mean(1)

    def like_norm(ids: Tensor) -> Tensor:
        others = [
            cosines(plain, by_norm[(place[ids] + torch.randint(-500, 501, ids.shape)).clamp(0, len(plain) - 1)])
            for _ in range(COUNT // 2)
        ]
        null = torch.stack(others)
        return (cosines(plain, ids) - null.mean(0)) / null.std(0)

    return {
        "cosine": lambda ids: cosines(plain, ids),
        "centred": lambda ids: cosines(central, ids),
        "less principal axes": lambda ids: cosines(rest, ids),
        "hubs corrected": hubs,
        "against like norms": like_norm,
    }


def cosines(unit: Tensor, ids: Tensor) -> Tensor:
    """Return the mean cosine over all pairs of each row's tokens."""
    rows = unit[ids]
    return (rows.sum(1).square().sum(1) - rows.square().sum((1, 2))) / (ids.shape[1] * (ids.shape[1] - 1))


def area(good: Tensor, bad: Tensor) -> float:
    """Return the probability that a good score is above a bad one; ties count half."""
    return float(((good[:, None] > bad).double() + (good[:, None] == bad).double() / 2).mean())


if __name__ == "__main__":
    main()
