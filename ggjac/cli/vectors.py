"""Singular vectors of each position's own map, and what decoded vectors are worth, as plain data and as tables."""

from typing import Any

import torch

from ggjac.analysis.per_token import TokenSpectrum, per_token
from ggjac.analysis.readability import Readability, readability
from ggjac.analysis.svd import Spectrum
from ggjac.cli.render import line, numbers, table
from ggjac.cli.session import Session
from ggjac.decode import nearest, top_logits


def run_readability(
    session: Session, result: Spectrum, *, top: int, shuffles: int, seed: int
) -> tuple[Readability, Readability]:
    """Score the decoded left vectors, and of each right vector the position that weighs most."""
    model, svd = session.model, result.svd
    heaviest = result.weight.argmax(1)
    right = svd.Vh[torch.arange(len(svd.Vh)), heaviest]
    options: dict[str, Any] = {"top": max(2, min(top, model.embedding.shape[0])), "shuffles": shuffles, "seed": seed}
    with session.report.stage("coherence") as update:
        left = readability(
            svd.U.to(model.dtype), lambda V, n: top_logits(model.head.matrix, V, n), model.embedding, **options
        )
        update("side", 1, 2)
        return left, readability(
            right.to(model.dtype), lambda V, n: nearest(model.embedding, V, n), model.embedding, **options
        )


def readability_data(result: tuple[Readability, Readability]) -> dict[str, Any]:
    """Return both sides' scores and their baselines as plain data."""
    return {
        side: {
            "scores": found.scores.tolist(),
            "above": found.above.tolist(),
            "chance": found.chance.tolist(),
            "shuffled": {"mean": found.mean, "sd": found.sd, "count": len(found.shuffled)},
        }
        for side, found in zip(("left", "right"), result, strict=True)
    }


def show_readability(data: dict[str, Any]) -> None:
    """Print each vector's coherence beside chance."""
    rows: list[tuple] = []
    for j in range(len(data["left"]["scores"])):
        row: tuple = (j,)
        for side in ("left", "right"):
            found = data[side]
            row += (f"{found['scores'][j]:.3f}", f"{found['above'][j]:+.1f}", f"{found['chance'][j]:.3f}")
        rows.append(row)
    by_chance = (
        f"{data[side]['shuffled']['mean']:.3f} ± {data[side]['shuffled']['sd']:.3f}" for side in ("left", "right")
    )
    rows.append(("shuffled", next(by_chance), "", "", next(by_chance), "", ""))
    line("")
    columns = ["##", "#left", "#sd above", "#by chance", "#right", "#sd above", "#by chance"]
    table("Coherence: mean cosine between the embeddings of a vector's top tokens", columns, rows)
    line(
        f"right: at its heaviest position; by chance: share of {data['left']['shuffled']['count']} vectors with "
        "shuffled components that score as high"
    )
    line("")


def run_per_token(
    session: Session, *, rank: int, top: int, tol: float, seed: int, max_sweeps: int
) -> list[TokenSpectrum]:
    """Decompose each position's own map."""
    J, model = session.jacobian, session.model
    with session.report.stage("svd per token") as update:
        worst = ""

        def swept(sweeps: int, residual: float) -> None:
            nonlocal worst
            worst = f"sweep {sweeps + 1}, worst residual {residual:.1e}, "

        J.progress = lambda done, total: update(f"{worst}block", done, total)
        return per_token(
            J, model.head, model.embedding, rank, top=top, tol=tol, seed=seed, max_sweeps=max_sweeps, progress=swept
        )


def per_token_data(session: Session, found: list[TokenSpectrum]) -> list[dict[str, Any]]:
    """Return each position's triplets as plain data."""
    return [
        {
            "position": each.position,
            "token": session.token(session.ids[each.position]),
            "sweeps": each.svd.sweeps,
            "converged": each.svd.converged,
            "stopped_by": each.svd.reason,
            "triplets": [
                {
                    "singular_value": float(each.svd.S[j]),
                    "residual": float(each.svd.residual[j]),
                    "left": [session.token(int(i)) for i in each.left.ids[j]],
                    "right": [session.token(int(i)) for i in each.right.ids[j]],
                }
                for j in range(len(each.svd.S))
            ],
        }
        for each in found
    ]


def show_per_token(data: list[dict[str, Any]], words: int = 8) -> None:
    """Print each position's singular values and both decodings."""
    cells = [(entry, j, triplet) for entry in data for j, triplet in enumerate(entry["triplets"])]
    sigmas = numbers([triplet["singular_value"] for *_, triplet in cells])
    rows = [
        (
            "" if j else entry["position"],
            "" if j else entry["token"],
            sigma,
            f"{triplet['residual']:.0e}",
            " ".join(triplet["left"][:words]),
            " ".join(triplet["right"][: words // 2]),
        )
        for (entry, j, triplet), sigma in zip(cells, sigmas, strict=True)
    ]
    columns = [
        "#position",
        "token",
        "#σ",
        "#residual",
        "left vector: tokens it promotes",
        "right vector: nearest tokens",
    ]
    table("Singular vectors of each position's own map J_i", columns, rows)
    open_ends = [str(entry["position"]) for entry in data if not entry["converged"]]
    if open_ends:
        line(f"NOT converged at positions {', '.join(open_ends)}")


def tensors(found: list[TokenSpectrum]) -> dict[str, torch.Tensor]:
    """Return the saved tensors: token_U [m, k, d], token_S [m, k], token_Vh [m, k, d], token_residual [m, k]."""
    return {
        f"token_{name}": torch.stack([getattr(each.svd, name) for each in found])
        for name in ("U", "S", "Vh", "residual")
    }
