"""Whether the z of decoded tokens separates a model's own directions from meaningless ones, on real models.

    python tools/readouts.py smollm2.gguf gemma3.gguf

For each kind of vector: the z of its first token (see `ggjac.calibration`), against random directions and against the
leading vectors of the neutral prompts, as the median over vectors; and the probability that it is larger than that of a
random direction (the area under the ROC curve: 0.5 is chance). Vectors are as in `tools/coherence.py`: known meaning
(word groups with noise), the model's own (outputs; the leading left vectors of 12 prompts' maps, the first of each and
the first four), and none (shuffled, mixtures of the head's rows, random). The model's own are shown with and without
the first position, `--exclude 0`.
"""

import argparse
from collections.abc import Iterator, Sequence

import torch
from coherence import PROMPTS, area, meaningful, meaningless
from torch import Tensor
from torch.nn.functional import normalize

import ggjac
from ggjac.calibration import Calibration
from ggjac.decode import top_logits
from ggjac.jacobian import DetachedJacobian
from ggjac.model import Model

RANK, TOL = 4, 1e-2


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+", help="GGUF files")
    parser.add_argument("--seed", type=int, default=0, help="of noise, shuffles, mixtures and random directions")
    given = parser.parse_args()
    for path in given.model:
        torch.manual_seed(given.seed)
        model = ggjac.open_model(path)
        print(f"\n{path}\n{'vectors':30}{'number':>7}{'z':>7}{'area':>7}{'z prompts':>11}{'area':>7}", flush=True)
        others = {name: normalize(V, dim=1) for name, V in (meaningful(model) | meaningless(model)).items()}
        others["random"] = normalize(torch.randn(200, model.config.d), dim=1)
        for exclude in ([], [0]):
            base = ggjac.calibrate(maps(model, ggjac.NEUTRAL, exclude), RANK, tol=TOL)
            own = torch.stack([J.svd(RANK, tol=TOL).U for J in maps(model, PROMPTS, exclude)])
            rows = {"first vector": own[:, 0], f"first {RANK} vectors": own.flatten(0, 1)}
            rows |= {"the neutral prompts' own": base.vectors.flatten(0, 1)}
            rows = {f"{name}{', --exclude 0' * bool(exclude)}": V for name, V in rows.items()}
            if not exclude:
                rows = {name: V for name, V in others.items() if name != "leading"} | rows
            chance = first(model, base, others["random"])
            for name, vectors in rows.items():
                found = first(model, base, vectors)
                if name.startswith("the neutral"):  # each against the others
                    found = found[0], base.own.z.flatten()
                cells = [
                    f"{float(z.median()):{width}.1f}{area(z, null):7.2f}"
                    for z, null, width in zip(found, chance, (7, 11), strict=True)
                ]
                print(f"{name:30}{len(vectors):7}{''.join(cells)}", flush=True)


def maps(model: Model, prompts: Sequence[str], exclude: list[int]) -> Iterator[DetachedJacobian]:
    """Yield the Jacobians of prompts, one after another."""
    for prompt in prompts:
        yield model.trace(prompt).jacobian(exclude=exclude)


def first(model: Model, base: Calibration, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return both z of each vector's first token."""
    ranked = top_logits(model.head.matrix, vectors.to(model.head.matrix.dtype), 1)
    assert ranked.z is not None
    return ranked.z[:, 0], base.z(model.head.matrix, ranked)[:, 0]


if __name__ == "__main__":
    main()
