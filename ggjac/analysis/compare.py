"""Two files of one model at the same prompt, as before and after quantization.

One file at a time is measured into a `Portrait`, so that two large models need not be in memory together; `compare`
sets two of them side by side (two prompts on one file: `ggjac.analysis.compare_prompts`). Angles between subspaces do
not depend on signs, on rotations among close singular values, or on the order of the vectors.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ggjac.analysis.attribute import attribute
from ggjac.analysis.branches import BranchShares, attribute_branches
from ggjac.decode import divergence
from ggjac.jacobian import DetachedJacobian, Progress
from ggjac.jacobian.reconstruction import Reconstruction, reconstruction
from ggjac.model import finite_logits
from ggjac.results import NO_WORDS, Bars, Plotted, Points, Prompt, Table, Words
from ggjac.shares import split_name
from ggjac.svd import SVD


class CompareError(ValueError):
    """Two files that are not of one model, or two measurements that are not of one prompt."""


@dataclass(frozen=True)
class Portrait(Plotted):
    """One file's numbers at one prompt.

    Attributes:
        ids: the `n` token ids.
        position: of the output.
        mlp_path: the freezing rule.
        svd: leading triplets of the joint map.
        reconstruction: `‖J x + offset - y‖ / ‖y‖`, and its healthy limit.
        output: `[d]`, float64.
        target: token id whose logit is split.
        versus: token id whose logit is subtracted, or None.
        logit: the target's logit, minus that of `versus`, before any soft cap.
        shares: `[n]`, float64: the contribution of each input position to it.
        offset: the contribution of the biases to it.
        branches: the same logit by block (direct logit attribution).
        logits: `[n, v]`, on the CPU: at every position, as the model has them.
        tol: relative residual that was asked of every triplet.
        seed: of the random start.
        softcap: of the head's logits (not applied to `logit`); 0 for none.
    """

    ids: list[int]
    position: int
    mlp_path: str
    svd: SVD
    reconstruction: Reconstruction
    output: Float[Tensor, " d"]
    target: int
    versus: int | None
    logit: float
    shares: Float[Tensor, " n"]
    offset: float
    branches: BranchShares
    logits: Float[Tensor, "n v"]
    tol: float
    seed: int
    softcap: float

    def _table(self, words: Words) -> Table:
        note = f"offset {self.offset:.4f}, reconstruction error {self.reconstruction.error:.1e}"
        columns = words.at(range(len(self.ids))) | {"share": self.shares.tolist()}
        return Table(f"Shares in {self.asked(words)}, {self.logit:.4f}", columns, (note,))

    def asked(self, words: Words) -> str:
        """Return the name of the logit that is split, or of the difference of two."""
        return split_name(words, self.target, self.versus)

    def _plot(self, words: Words) -> Bars:
        title = f"Shares in {self.asked(words)}"
        return Bars(title, "share", words.labels(range(len(self.ids))), self.shares.tolist())


@dataclass(frozen=True)
class Comparison(Plotted):
    """Two portraits `a` and `b`, and how far they are apart.

    Attributes:
        a, b: the portraits.
        left: `[k]`, float64, radians: principal angles between the spans of the left singular vectors, largest first.
        right: `[k]`, likewise of the right ones, in the space of all input embeddings `[n d]`.
        output_distance: `‖y_b - y_a‖ / ‖y_a‖`.
        kl: `[n]`, float64: `KL(softmax(logits_a) ‖ softmax(logits_b))` of the next token at each position, in nats.
        top1: `[n]`: the most likely next token is the same.
    """

    a: Portrait
    b: Portrait
    left: Float[Tensor, " k"]
    right: Float[Tensor, " k"]
    output_distance: float
    kl: Float[Tensor, " n"]
    top1: Bool[Tensor, " n"]

    @property
    def shares(self) -> Float[Tensor, " n"]:
        """How each input position's share in the logit differs, `b - a`."""
        return self.b.shares - self.a.shares

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return both sides of everything; angles in degrees, the largest first."""
        a, b = self.a, self.b
        return in_common(a, b, words) | {
            "angles": {"left": self.left.rad2deg().tolist(), "right": self.right.rad2deg().tolist()},
            "output_distance": self.output_distance,
            "shares": [
                words.here(i) | {"a": float(a.shares[i]), "b": float(b.shares[i])} for i in range(a.position + 1)
            ],
            "positions": [
                words.here(i)
                | {
                    "kl": float(self.kl[i]),
                    "top1": {side: words.token(p.logits[i].argmax()) for side, p in (("a", a), ("b", b))},
                    "same_top1": bool(self.top1[i]),
                }
                for i in range(len(a.ids))
            ],
            "kl": float(self.kl[a.position]),
            "mean_kl": float(self.kl.mean()),
            "top1_agreement": float(self.top1.double().mean()),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: the angles in radians, `kl`, and of each file `a_S` and so on; see the attributes."""
        found = {"left_angles": self.left, "right_angles": self.right, "kl": self.kl}
        return found | {
            f"{side}_{name}": tensor for side, p in (("a", self.a), ("b", self.b)) for name, tensor in saved(p).items()
        }

    def exhibits(self, trace: Prompt | None = None) -> list[Table]:
        """Return four tables for print: spectra with angles, shares by token and by block, and the next tokens."""
        words, (a, b) = Words(trace), (self.a, self.b)
        places = range(a.position + 1)
        sides = {side: [*p.shares[: len(places)].tolist(), p.offset] for side, p in (("a", a), ("b", b))}
        shares = {"part": [*["token"] * len(places), "offset"], **words.at([*places, None]), **sides}
        tops = {side: p.logits.argmax(1).tolist() for side, p in (("next of a", a), ("next of b", b))}
        named = {name: words.each(ids) for name, ids in tops.items()}
        asked = a.asked(words)
        return [
            self._table(words),
            Table(f"Shares in {asked}", shares, (f"{asked}: a {a.logit:.4f}, b {b.logit:.4f}",)),
            by_block(a, b, words),
            Table(
                "Next token at every position",
                words.at(range(len(a.ids))) | named | {"KL": self.kl.tolist()},
                ("KL: of b from a, in nats",),
            ),
        ]

    def _table(self, words: Words) -> Table:
        columns = {
            "vector": [*range(1, len(self.a.svd.S) + 1)],
            "sigma a": self.a.svd.S.tolist(),
            "sigma b": self.b.svd.S.tolist(),
            "left angle": self.left.tolist(),
            "right angle": self.right.tolist(),
        }
        last = self.a.position
        notes = (
            "angles: between the spans of all left and of all right vectors, in radians, largest first",
            f"outputs are {self.output_distance:.1e} apart; next token: KL {float(self.kl[last]):.1e} nats, "
            f"most likely token {'the same' if self.top1[last] else 'another'}",
        )
        return Table("Two files of one model", columns, notes)

    def _plot(self, words: Words) -> Points:
        return spectra(self.a, self.b, "Singular values of two files of one model")


def in_common(a: Portrait, b: Portrait, words: Words) -> dict[str, Any]:
    """Return as plain data what two portraits are compared in, whatever they are of: both sides of everything."""

    def both(of: Callable[[Portrait], Any]) -> dict[str, Any]:
        return {"a": of(a), "b": of(b)}

    def health(p: Portrait) -> dict[str, Any]:
        return {key: p.reconstruction.data()[key] for key in ("error", "limit", "healthy")}

    blocks = [p.branches.data()[0]["blocks"] for p in (a, b)]
    return {
        "rank": len(a.svd.S),
        "tol": a.tol,
        "seed": a.seed,
        "singular_values": [
            {"a": float(s), "b": float(t), "residual": float(max(r, q))}
            for s, t, r, q in zip(a.svd.S, b.svd.S, a.svd.residual, b.svd.residual, strict=True)
        ],
        "next_singular_value": both(lambda p: p.svd.following and p.svd.following._asdict()),
        "converged": a.svd.converged and b.svd.converged,
        "target": words.token(a.target),
        "versus": None if a.versus is None else words.token(a.versus),
        "logit": both(lambda p: p.logit),
        "offset": both(lambda p: p.offset),
        "softcap": b.softcap or None,
        "embedding": both(lambda p: float(p.branches.embedding)),
        "blocks": [
            one | {kind: {"a": one[kind], "b": other[kind]} for kind in ("attn", "mlp")}
            for one, other in zip(*blocks, strict=True)
        ],
        "bias": both(lambda p: float(p.branches.bias)),
        "reconstruction": both(health),
    }


def saved(p: Portrait) -> dict[str, Tensor]:
    """Return what is saved of a portrait: `U`, `S`, `Vh`, `residual`, `shares`, `y`, `logits`, and by block."""
    of_branches = {name: getattr(p.branches, name)[0] for name in ("attn", "mlp")}
    found = {name: getattr(p.svd, name) for name in ("U", "S", "Vh", "residual")}
    return found | of_branches | {"shares": p.shares, "y": p.output, "logits": p.logits}


def by_block(a: Portrait, b: Portrait, words: Words) -> Table:
    """Return a table of the logit of two portraits by block: attention, MLP, and how they differ."""
    columns: dict[str, list[Any]] = {"block": [*range(a.branches.attn.shape[1])]}
    for kind in ("attn", "mlp"):
        one, other = (getattr(p.branches, kind)[0] for p in (a, b))
        columns |= {f"{kind} a": one.tolist(), f"{kind} b": other.tolist(), f"{kind} b - a": (other - one).tolist()}
    rest = {name: [float(getattr(p.branches, name)) for p in (a, b)] for name in ("embedding", "bias")}
    notes = tuple(f"{name}: a {one:.4f}, b {other:.4f}" for name, (one, other) in rest.items())
    return Table(f"Shares in {a.asked(words)}, by block", columns, notes)


def spectra(a: Portrait, b: Portrait, title: str) -> Points:
    """Return the singular values of two portraits, to be drawn."""
    found = {name: p.svd.S.tolist() for name, p in (("a", a), ("b", b))}
    return Points(title, "index", "σ", {name: (range(1, len(S) + 1), S, ()) for name, S in found.items()})


def portray(
    jacobian: DetachedJacobian,
    rank: int = 8,
    *,
    target: int | str | None = None,
    versus: int | str | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    max_sweeps: int = 40,
    progress: Progress | None = None,
) -> Portrait:
    """Measure one file: its spectrum, the shares of a logit (default: of the most likely next token), its logits.

    The shares are those of the input tokens and of the blocks; with `versus`, in the difference of two logits.

    The singular vectors of two files agree no better than either is known: for small differences ask for a small `tol`.

    Raises:
        NumericsError: a logit is not finite.
        ValueError: rank, `tol` or `max_sweeps` are out of range, as `ggjac.svd.svd` has them.
        PromptError: `target` or `versus` is not in the vocabulary, or a text that is not one token.
    """
    logits = finite_logits(jacobian.network.head.logits(jacobian.network.outputs)).cpu()
    target = jacobian.token_id(target)
    if target is None:
        target = int(logits[jacobian.position].argmax())
    with jacobian.reporting(progress):
        split = attribute(jacobian, target, versus)
        return Portrait(
            ids=jacobian.ids,
            position=jacobian.position,
            mlp_path=jacobian.mlp_path,
            svd=jacobian.svd(rank, tol=tol, seed=seed, max_sweeps=max_sweeps),
            reconstruction=reconstruction(jacobian),
            output=jacobian.output.cpu().double(),
            target=target,
            versus=split.versus,
            logit=split.logit,
            shares=split.shares,
            offset=split.offset,
            branches=attribute_branches(jacobian, target, versus),
            logits=logits,
            tol=tol,
            seed=seed,
            softcap=split.softcap,
        )


def compare(a: Portrait, b: Portrait) -> Comparison:
    """Set two portraits side by side.

    Raises:
        CompareError: they are not of the same prompt, position, freezing rule, target, rank or sizes.
    """
    check_alike(a, b, {"token ids": lambda p: p.ids, "position": lambda p: p.position} | SAME)
    return Comparison(
        a=a,
        b=b,
        left=principal_angles(a.svd.U, b.svd.U),
        right=principal_angles(a.svd.Vh.flatten(1), b.svd.Vh.flatten(1)),
        output_distance=float((b.output - a.output).norm() / a.output.norm()),
        kl=divergences(a, b, zip(*2 * [range(len(a.ids))], strict=True)),
        top1=a.logits.argmax(1) == b.logits.argmax(1),
    )


def check_alike(a: Portrait, b: Portrait, same: Mapping[str, Callable[[Portrait], object]]) -> None:
    """Check that two portraits have some things in common.

    Raises:
        CompareError: they do not; names the first of these things.
    """
    for what, of in same.items():
        found = of(a), of(b)
        if found[0] != found[1]:
            raise CompareError(f"{what}: the first has {found[0]}, the second {found[1]}; measure both alike")


def divergences(a: Portrait, b: Portrait, pairs: Iterable[tuple[int, int]]) -> Float[Tensor, " m"]:
    """Return the KL divergence of the next token at some positions of `b` from that at those of `a`, float64, nats."""
    return torch.tensor([divergence(a.logits[i], b.logits[j]) for i, j in pairs], dtype=torch.float64)


# What any two portraits must have in common.
SAME: dict[str, Callable[[Portrait], object]] = {
    "freezing rule": lambda p: p.mlp_path,
    "target": lambda p: p.target,
    "subtracted token": lambda p: p.versus,
    "rank": lambda p: len(p.svd.S),
    "embedding length": lambda p: len(p.output),
    "vocabulary": lambda p: p.logits.shape[1],
}


def principal_angles(A: Float[Tensor, "k m"], B: Float[Tensor, "k m"]) -> Float[Tensor, " k"]:
    """Return the principal angles between the spans of two sets of independent rows, float64, radians, largest first.

    Small angles come from their sines and large ones from their cosines, as either alone loses half the digits
    (Björck and Golub, Math. Comp. 27, 1973).
    """
    P, Q = (torch.linalg.qr(rows.cpu().double().T).Q for rows in (A, B))
    inside = P.T @ Q
    cosines = torch.linalg.svdvals(inside).flip(0).clamp(max=1)  # of angles in descending order, as the sines are
    sines = torch.linalg.svdvals(Q - P @ inside).clamp(max=1)
    return torch.where(cosines.square() < 0.5, torch.acos(cosines), torch.asin(sines))


def check_families(a: str | None, b: str | None) -> None:
    """Check that two files state the same architecture.

    Raises:
        CompareError: they do not.
    """
    if a != b:
        kinds = [_short(kind or "none") for kind in (a, b)]
        raise CompareError(
            f"architecture: {kinds[0]} in the first file, {kinds[1]} in the second; give two files of one model"
        )


def check_files(a: Mapping[str, Sequence[int]], b: Mapping[str, Sequence[int]]) -> None:
    """Check that two files hold tensors of the same names and shapes.

    Raises:
        CompareError: they do not; names the first tensor that differs.
    """
    for name in [*a, *(name for name in b if name not in a)]:
        found = [list(file[name]) if name in file else "no such tensor" for file in (a, b)]
        if found[0] != found[1]:
            raise CompareError(
                f"{name}: the first file has {found[0]}, the second {found[1]}; give two files of one model"
            )


def check_vocabularies(a: Sequence[str] | None, b: Sequence[str] | None) -> None:
    """Check that two files have the same tokens.

    Raises:
        CompareError: they do not; names the first that differs.
    """
    for id, (first, second) in enumerate(zip(a or [], b or [], strict=False)):
        if first != second:
            raise CompareError(
                f"token {id}: {_short(first)} in the first file, {_short(second)} in the second; give two files of one "
                "model"
            )
    if len(a or []) != len(b or []):
        raise CompareError(
            f"vocabulary: {len(a or [])} tokens in the first file, {len(b or [])} in the second; "
            "give two files of one model"
        )


def _short(token: str) -> str:
    """Quote a token of a file from strangers for a message."""
    text = repr(token)
    return text if len(text) <= 60 else f"{text[:59]}…"
