"""How far the map of one prompt holds: its predictions for changed prompts against the model's own outputs.

Let `y` be the output at the prompt's embeddings `x`, and `y'` the model's own at changed ones, `x'`. The frozen map
predicts

    detached:  y + J (x' - x) = J x' + offset            ordinary:  y + ∂y/∂x (x' - x)

The error of a prediction `p` is `‖p - y'‖ / ‖y'‖`; that of no change at all, `‖y - y'‖ / ‖y'‖`, is the measure of what
a prediction is worth. For small steps the ordinary map, a derivative, is right to first order; the detached one is not
a derivative, and is wrong in proportion to the step.

Curves of these errors follow paths: one token to another, all embeddings to those of another prompt, steps along the
leading right singular vectors of `J`, along random directions as the null, and along a direction of the residual
stream, such as a control vector, with a null of its own at the same depth, from which both maps then begin. Leaving out
each token in turn measures its effect on a logit, to which shares, gradient x input, and attention rollout are
compared.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ggjac import checks
from ggjac.blocks import NumericsError
from ggjac.checks import whole
from ggjac.config.mixers import MIXERS
from ggjac.directions import Direction
from ggjac.edits import Edit, Editor, drawn_tokens
from ggjac.effects import Effects, mean_of_draws
from ggjac.jacobian import DetachedJacobian, FrozenNetwork, Progress, Span
from ggjac.jacobian.ordinary import OrdinaryJacobian
from ggjac.jacobian.targets import Asked, ask
from ggjac.linop import LinearOperator
from ggjac.model import Model, PromptError
from ggjac.planner import runs_at_once
from ggjac.results import NO_WORDS, Plotted, Points, Result, Table, Words
from ggjac.shares import split_name
from ggjac.sizes import ABLATIONS, DRAWS, STEPS, Ablation
from ggjac.units import edit_path

# Errors at which it is asked how far a map holds.
LEVELS = (0.1, 0.5)


@dataclass(frozen=True)
class Curve(Result):
    """Predictions along one path of edits; `s` steps.

    Attributes:
        kind: `"swap"`, `"toward"`, `"singular"`, `"random"` or `"direction"`.
        name: of the path: the other token's id, the number of the vector from 1, or the direction's name.
        position: of the input, of a swap; of a direction the number of blocks after which it is added, and of a random
            one beside it; else None.
        steps: `t`: of the way, or of the length of the embeddings (of a direction, the median length of the stream).
        sizes: `[s]`: `‖x' - x‖ / ‖x‖`, of the embeddings up to the output's position, or of the stream there.
        unchanged: `[s]`: the error of predicting no change, `‖y - y'‖ / ‖y'‖`.
        errors: by map, `"detached"` and `"ordinary"`, `[s]`; both begin where the path changes the stream.
        logit: `[s]`: the model's own, of the target, before any soft cap.
        logits: by map, `[s]`: predicted.
    """

    kind: str
    name: str
    position: int | None
    steps: list[float]
    sizes: list[float]
    unchanged: list[float]
    errors: Mapping[str, list[float]]
    logit: list[float]
    logits: Mapping[str, list[float]]

    def passes(self, errors: Sequence[float], level: float) -> float | None:
        """Return the step at which an error first passes a level, between steps on a line; None if it never does.

        The first step itself where it has passed the level there already: a bound, for nothing below is measured.
        """
        t, e = self.steps[0], errors[0]
        if e >= level:
            return t
        for step, error in zip(self.steps[1:], errors[1:], strict=True):
            if error >= level:
                return t + (step - t) * (level - e) / (error - e)
            t, e = step, error
        return None

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the path, its points, and where each error passes each level."""
        named: dict[str, Any] = {"kind": self.kind, "name": self.name}
        if self.kind == "swap":
            named |= {"token": words.here(self.position or 0), "other": words.token(self.name)}
        elif self.position is not None:
            named["layer"] = self.position
        every = {"unchanged": self.unchanged, **self.errors}
        points = [
            {"t": t, "size": size, "logit": logit}
            | {name: column[i] for name, column in every.items()}
            | {f"{name}_logit": column[i] for name, column in self.logits.items()}
            for i, (t, size, logit) in enumerate(zip(self.steps, self.sizes, self.logit, strict=True))
        ]
        passes = {
            name: {f"{level:g}": self.passes(column, level) for level in LEVELS} for name, column in every.items()
        }
        return named | {"points": points, "passes": passes}

    def title(self, words: Words) -> str:
        """Return the path in words."""
        if self.kind == "swap":
            tokens = words.labels([self.position or 0])[0], words.name(int(self.name))
            return edit_path(self.kind, self.name, tokens=tokens)
        return edit_path(self.kind, self.name, layer=self.position)


@dataclass(frozen=True)
class Reach(Plotted):
    """How far a map holds.

    Attributes:
        target: token id of the logit that is predicted.
        versus: token id whose logit is subtracted, or None.
        position: of the output.
        logit: of the prompt as it is, before any soft cap.
        softcap: of the head's logits (not applied here); 0 for none.
        mlp_path: the freezing rule of the detached map.
        seed: of random directions, and of drawn tokens.
        curves: of every path.
        effects: of each token left out, beside scores; None if not asked for.
        residual: the largest one of the singular vectors, relative to their singular values.
        tol: that was asked of it.
    """

    target: int
    versus: int | None
    position: int
    logit: float
    softcap: float
    mlp_path: str
    seed: int
    curves: list[Curve]
    effects: Effects | None
    residual: float
    tol: float

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the logit, the curves and the effects."""
        return {
            "target": words.token(self.target),
            "versus": None if self.versus is None else words.token(self.versus),
            "logit": self.logit,
            "softcap": self.softcap or None,
            "mlp_path": self.mlp_path,
            "seed": self.seed,
            "curves": [curve.data(words) for curve in self.curves],
            "residual": self.residual,
            "tol": self.tol,
            "effects": None if self.effects is None else self.effects.data(words),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return what is saved: of the curves `[c, s]` (with `steps` `[s]`), and of the effects `[m]`."""
        found = {} if self.effects is None else self.effects.tensors()
        if self.curves:
            names = ("steps", "sizes", "unchanged", "logit")
            columns = {name: [getattr(c, name) for c in self.curves] for name in names}
            columns |= {name: [c.errors[name] for c in self.curves] for name in MAPS}
            found |= {f"curves_{name}": torch.tensor(rows, dtype=torch.float64) for name, rows in columns.items()}
        return found

    def _table(self, words: Words) -> Table:
        rows = [
            (curve.title(words), t, size, unchanged, *(curve.errors[m][i] for m in MAPS))
            for curve in self.curves
            for i, (t, size, unchanged) in enumerate(zip(curve.steps, curve.sizes, curve.unchanged, strict=True))
        ]
        names = ("path", "t", "size", "no change", *MAPS)
        return Table(
            f"Errors of the predicted output, and of {split_name(words, self.target, self.versus)}",
            {name: [row[i] for row in rows] for i, name in enumerate(names)},
            (
                "relative to the output's length; no change: the error of predicting the prompt's own output",
                f"residual of the singular vectors: {self.residual:.0e}",
            ),
            {"mlp path": self.mlp_path},
        )

    def exhibits(self, trace: Any = None) -> list[Table]:
        """Return the tables for print: the curves, and the effects."""
        return [self.table(trace), *([self.effects.table(trace)] if self.effects else [])]

    def _plot(self, words: Words) -> Points:
        series: dict[str, Any] = {}
        for curve in self.curves[:1]:
            every = {"no change": curve.unchanged, **curve.errors}
            series |= {name: (curve.steps, column, ()) for name, column in every.items()}
        title = self.curves[0].title(words) if self.curves else "no path"
        return Points(f"Error of the predicted output: {title}", "step", "relative error", series)


MAPS = ("detached", "ordinary")


class _Path(NamedTuple):
    """A straight path of edits: `moved` `[m, d]` is added to the stream after `layer` blocks, `t` times."""

    kind: str
    name: str
    position: int | None
    edit: Callable[[float], Edit]
    moved: Tensor
    base: float  # length of what it is added to
    layer: int = 0


def reach(
    jacobian: DetachedJacobian,
    model: Model,
    target: int | str | None = None,
    versus: int | str | None = None,
    *,
    rank: int = 3,
    steps: Sequence[float] = STEPS,
    swaps: Sequence[tuple[int, int]] = (),
    toward: str | Sequence[int] | None = None,
    direction: Direction | None = None,
    ablate: Ablation | None = "mean",
    draws: int = DRAWS,
    tol: float = 1e-3,
    max_sweeps: int = 40,
    seed: int = 0,
    progress: Progress | None = None,
) -> Reach:
    """Compare what the maps of a prompt predict for changed prompts with what the model does.

    Every edit costs a forward pass of the tokens up to the output's position, but the weights are read once for as many
    as `chunk_bytes` of the model has room for; and a vector in a sweep of either map.

    Args:
        jacobian: from the embeddings to the output.
        model: of the same prompt.
        target: id or text of the token whose logit is predicted; default the most likely one.
        versus: id or text of a token whose logit is subtracted.
        rank: number of leading right singular vectors, and of random directions; as many beside a direction.
        steps: `t`, above 0: of the way to another token or prompt, or of the length of the embeddings.
        swaps: positions, and the ids of the tokens that take their place.
        toward: another prompt, text or token ids, of as many tokens.
        direction: of the residual stream, added at all positions after its `layer` blocks; None for the embeddings.
            Random directions of the same length are added likewise.
        ablate: leave out each token: see `ggjac.units.PLACES`; None for no effects.
        draws: tokens drawn for each position, where `ablate` is `"replace"`.
        tol, max_sweeps: of the singular vectors.
        seed: of random directions, drawn tokens and start vectors.
        progress: called as `progress("block", done, total)` after each block.

    Raises:
        PromptError: a token or position is not there, or the other prompt is not as long as this one.
        NumericsError: an edit took the stream out of the range of the dtype.
        ValueError: an argument is out of range, or the map leaves positions out.
    """
    _check_steps(steps)
    if jacobian.exclude:
        raise ValueError("this map leaves positions out, which edits would change; ask for trace.jacobian(position)")
    rank, seed = whole("rank", rank), checks.seed(seed)
    target, versus = jacobian.token_id(target), jacobian.token_id(versus)
    asked = ask(jacobian.output[None], jacobian.network.head, target, versus)
    editor = Editor(model, jacobian.ids, jacobian.position)
    paths = [_swap(editor, i, id) for i, id in swaps]
    if toward is not None:
        paths.append(_toward(editor, model.prompt_ids(toward), len(jacobian.ids)))
    with jacobian.reporting(progress):
        found = jacobian.svd(rank, tol=tol, max_sweeps=max_sweeps, seed=seed)
    paths += [_along(editor, "singular", i, v) for i, v in enumerate(found.Vh, start=1)]
    paths += [_along(editor, "random", i, v) for i, v in enumerate(_random(found.Vh, seed), start=1)]
    if direction is not None:
        paths += _directions(editor, jacobian, direction, rank, seed)
    depths = sorted({path.layer for path in paths})
    ordinary = {layer: OrdinaryJacobian(jacobian.network, jacobian.position, layer) for layer in depths}
    for one in ordinary.values():
        one.progress = _told(progress, "ordinary")
    left = _left_out(editor, ablate, draws, seed) if ablate else []
    edits = [path.edit(t) for path in paths for t in steps] + [one.edit for one in left]
    with _explained(ablate):
        Y = editor.outputs(edits, mlp_path=jacobian.mlp_path, progress=_told(progress, "edits"))
    with jacobian.reporting(progress):
        images = _images(jacobian, ordinary, paths)
        effects = None
        if ablate:
            effects = _effects(jacobian, asked, Y[len(edits) - len(left) :], left, ablate, draws, seed, versus)
            effects = effects.beside(_scores(jacobian, ordinary[0], asked, editor, left))
    outputs = Y.split(len(steps))
    return Reach(
        target=int(asked.targets[0]),
        versus=versus,
        position=jacobian.position,
        logit=float(asked.logits[0]),
        softcap=jacobian.network.head.softcap,
        mlp_path=jacobian.mlp_path,
        seed=seed,
        curves=[
            _curve(path, steps, jacobian.output, own, outputs[i], asked)
            for i, (path, own) in enumerate(zip(paths, images, strict=True))
        ],
        effects=effects,
        residual=float(found.residual.max()),
        tol=tol,
    )


def ablate(
    jacobian: DetachedJacobian,
    model: Model,
    by: Ablation,
    target: int | str | None = None,
    versus: int | str | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Effects:
    """Measure what leaving each token out does to a logit: a forward pass each, many of which read the weights once.

    Args:
        jacobian: of the prompt.
        model: likewise.
        by: what takes the token's place: see `ggjac.units.PLACES`.
        target: id or text of the token whose logit is meant; default the most likely one.
        versus: id or text of a token whose logit is subtracted.
        draws: tokens drawn for each position, by `"replace"`.
        seed: of these.
        progress: called as `progress("edits", done, total)` after each block.

    Raises:
        PromptError: `target` or `versus` is not in the vocabulary, or a text that is not one token.
        NumericsError: an edit took the stream out of the range of the dtype.
        ValueError: an argument is out of range.
    """
    target, versus = jacobian.token_id(target), jacobian.token_id(versus)
    asked = ask(jacobian.output[None], jacobian.network.head, target, versus)
    editor = Editor(model, jacobian.ids, jacobian.position)
    left = _left_out(editor, by, draws, seed)
    with _explained(by):
        edits = [one.edit for one in left]
        Y = editor.outputs(edits, mlp_path=jacobian.mlp_path, progress=_told(progress, "edits"))
    return _effects(jacobian, asked, Y, left, by, draws, seed, versus)


# -- paths -------------------------------------------------------------------------------------------------------------


def _check_steps(steps: Sequence[float]) -> None:
    if not steps or not all(math.isfinite(t) and t > 0 for t in steps) or list(steps) != sorted(set(steps)):
        raise ValueError(f"steps {list(steps)}: give finite numbers above 0, ascending")


def _swap(editor: Editor, i: int, id: int) -> _Path:
    """Return the path from a token to another one.

    Raises:
        PromptError: the position has no influence on the output, or the token is there already.
    """
    if not 0 <= i < len(editor.ids):
        raise PromptError(f"position {i} is out of range; the output depends on positions 0 to {len(editor.ids) - 1}")
    if editor.ids[i] == id:
        raise PromptError(f"the token at position {i} is {editor.model.word(id)} already; give another one")
    moved = torch.zeros_like(editor.x)
    moved[i] = editor.token_row(i, id) - editor.x[i]
    return _Path("swap", str(id), i, partial(editor.swapped, i, id), moved, _length(editor.x))


def _toward(editor: Editor, ids: Sequence[int], n: int) -> _Path:
    """Return the path to another prompt.

    Raises:
        PromptError: it is not as long, or the same.
    """
    if len(ids) != n:
        raise PromptError(f"the other prompt has {len(ids)} tokens, this one {n}; give one of {n}")
    if list(ids[: len(editor.ids)]) == editor.ids:
        raise PromptError("the other prompt is the same up to the output's position; give another one")
    moved = editor.model.embed(ids[: len(editor.ids)]) - editor.x
    return _Path("toward", "", None, partial(editor.toward, ids), moved, _length(editor.x))


def _along(editor: Editor, kind: str, i: int, v: Float[Tensor, "n d"]) -> _Path:
    """Return the path along a unit vector, whose step `t = 1` is as long as the embeddings."""
    base = _length(editor.x)
    moved = (base * v[: len(editor.ids)]).to(editor.x)
    return _Path(kind, str(i), None, partial(editor.stepped, moved), moved, base)


def _directions(editor: Editor, jacobian: DetachedJacobian, asked: Direction, rank: int, seed: int) -> Iterator[_Path]:
    """Yield the paths along a direction at all positions, and along random ones in its place.

    A step `t = 1` is as long as the stream's median.

    Raises:
        ValueError: there is no such depth.
        DirectionError: the vector is not as wide as the stream there, is zero or not finite.
    """
    network, layer = jacobian.network, asked.layer or 0
    if not 0 <= whole("layer", layer, 0) < len(network.tapes):
        raise ValueError(f"layer {layer} is out of range; the stream is changed after 0 to "
                         f"{len(network.tapes) - 1} blocks")  # fmt: skip
    stream = network.tapes[layer].x[: len(editor.ids)]
    vector = asked.checked({stream.shape[1]})
    length, base = float(stream.cpu().double().norm(dim=1).median()), _length(stream)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rank, len(vector), generator=generator, dtype=torch.float64).to(vector.device)
    named = [("direction", asked.source or "direction", vector)]
    named += [("random", str(i), one) for i, one in enumerate(drawn, start=1)]
    for kind, name, one in named:
        moved = (length * one / one.norm()).to(stream).expand_as(stream)
        yield _Path(kind, name, layer, partial(editor.pushed, layer, moved), moved, base, layer)


def _random(vectors: Float[Tensor, "k n d"], seed: int) -> Float[Tensor, "k n d"]:
    """Return as many random unit vectors, with elements wherever these have some."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(vectors.shape, generator=generator, dtype=torch.float64).to(vectors.device)
    drawn = drawn * vectors.any(0).any(1)[:, None]
    return drawn / drawn.flatten(1).norm(dim=1)[:, None, None]


def _told(progress: Progress | None, what: str) -> Callable[[int, int], None]:
    """Return a report of steps done, under a name."""

    def report(done: int, total: int) -> None:
        if progress:
            progress(what, done, total)

    return report


def _length(x: Tensor) -> float:
    return float(x.cpu().double().norm())


def _images(
    jacobian: DetachedJacobian, ordinary: Mapping[int, OrdinaryJacobian], paths: Sequence[_Path]
) -> list[dict[str, Float[Tensor, " d"]]]:
    """Return what either map, from the depth of each path, makes of its `moved`, in chunks."""
    network, n = jacobian.network, len(jacobian.ids)
    found: list[dict[str, Tensor]] = [{} for _ in paths]
    dtype = str(jacobian.dtype).removeprefix("torch.")
    for layer, derivative in ordinary.items():
        own = [i for i, path in enumerate(paths) if path.layer == layer]
        detached = jacobian if layer == 0 else DetachedJacobian(network, jacobian.position, Span(layer, jacobian.end))
        maps: dict[str, LinearOperator] = {"detached": detached, "ordinary": derivative}
        at_once = runs_at_once(network.config, jacobian.position + 1, dtype, jacobian.chunk_bytes)
        for start in range(0, len(own), at_once):
            some = own[start : start + at_once]
            X = torch.stack([pad(paths[i].moved, (0, 0, 0, n - len(paths[i].moved))) for i in some])
            for name, each in maps.items():
                for i, image in zip(some, each.matmat(X), strict=True):
                    found[i][name] = image
    return found


def _curve(
    path: _Path,
    steps: Sequence[float],
    y: Float[Tensor, " d"],
    images: Mapping[str, Float[Tensor, " d"]],
    outputs: Float[Tensor, "s d"],
    asked: Asked,
) -> Curve:
    """Hold the predictions along a path to the model's own outputs, in float64."""
    t, own, w = torch.tensor(steps, dtype=torch.float64), outputs.cpu().double(), asked.w[0].cpu().double()
    start, lengths = y.cpu().double(), own.norm(dim=1)
    predicted = {name: start + t[:, None] * image.cpu().double() for name, image in images.items()}
    bias = float(asked.bias[0])
    return Curve(
        kind=path.kind,
        name=path.name,
        position=path.position,
        steps=list(steps),
        sizes=(t * _length(path.moved) / path.base).tolist(),
        unchanged=((start - own).norm(dim=1) / lengths).tolist(),
        errors={name: ((p - own).norm(dim=1) / lengths).tolist() for name, p in predicted.items()},
        logit=(own @ w + bias).tolist(),
        logits={name: (p @ w + bias).tolist() for name, p in predicted.items()},
    )


# -- tokens left out ---------------------------------------------------------------------------------------------------


class _Left(NamedTuple):
    """A token that is left out: its position, the edit, and the embedding in its place."""

    position: int
    edit: Edit
    row: Float[Tensor, " d"]


def _left_out(editor: Editor, by: Ablation, draws: int, seed: int) -> list[_Left]:
    """Return an edit for each position, or by `"replace"` as many as there are draws.

    Raises:
        ValueError: there is no such way, or the vocabulary has too few tokens.
    """
    if by not in ABLATIONS:
        raise ValueError(f"ablate {by!r} is unknown; known: {', '.join(ABLATIONS)}")
    if by != "replace":
        return [_Left(i, editor.without(i, by), editor.row(i, by)) for i in range(len(editor.ids))]
    drawn = drawn_tokens(editor.model, whole("draws", draws) + 1, seed)
    found = []
    for i, own in enumerate(editor.ids):
        others = [id for id in drawn if id != own][:draws]
        if not others:
            raise ValueError("the vocabulary has no ordinary tokens to draw; leave tokens out by mean or zero")
        found += [_Left(i, editor.swapped(i, id), editor.token_row(i, id)) for id in others]
    return found


def _effects(
    jacobian: DetachedJacobian,
    asked: Asked,
    Y: Float[Tensor, "k d"],
    left: Sequence[_Left],
    by: Ablation,
    draws: int,
    seed: int,
    versus: int | None,
) -> Effects:
    """Return what leaving the tokens out does to the logit, by the outputs without them."""
    logits = Y.cpu().double() @ asked.w[0].cpu().double() + float(asked.bias[0])
    changes, places = float(asked.logits[0]) - logits, [one.position for one in left]
    return Effects(
        by=by,
        target=int(asked.targets[0]),
        versus=versus,
        position=jacobian.position,
        logit=float(asked.logits[0]),
        effects=mean_of_draws(changes, places, jacobian.position + 1),
        draws=draws,
        seed=seed,
        mlp_path=jacobian.mlp_path,
    )


def _scores(
    jacobian: DetachedJacobian, ordinary: OrdinaryJacobian, asked: Asked, editor: Editor, left: Sequence[_Left]
) -> dict[str, Float[Tensor, " m"]]:
    """Return what is to predict the effects, of each position; a downward sweep of either map.

    `share` and `gradient_input` of the embeddings themselves; what either map predicts of the effect, which takes
    the embedding in the token's place into account; and the attention rollout, where the model has nothing but
    attention.
    """
    found, x, m = {}, editor.x.cpu().double(), len(editor.ids)
    places = [one.position for one in left]
    for name, prediction, gradient in (
        ("share", "detached", jacobian.rmatmat(asked.w)[0]),
        ("gradient_input", "ordinary", ordinary.rmatmat(asked.w)[0]),
    ):
        read = gradient[:m].cpu().double()
        found[name] = (read * x).sum(1)
        expected = [(read[one.position] * (x[one.position] - one.row.cpu().double())).sum() for one in left]
        found[prediction] = mean_of_draws(torch.stack(expected), places, m)
    rolled = rollout(jacobian.network, jacobian.position)
    return found if rolled is None else found | {"attention": rolled}


def rollout(network: FrozenNetwork, position: int) -> Float[Tensor, " m"] | None:
    """Return the attention rollout of an output, `[position + 1]`, in float64 (Abnar and Zuidema, arXiv 2005.00928).

    The mean pattern over the heads of each block, and the identity for the residual stream, half each, are multiplied
    over all blocks. None where a block has another mixer than attention. It sums to 1, and to less where attention has
    sinks, which take a part of each row.
    """
    row = torch.zeros(position + 1, dtype=torch.float64)
    row[position] = 1
    for i in reversed(range(len(network.tapes))):
        for mixer in network.tapes[i].attn.mixers:
            if not MIXERS[mixer.kind].softmax or mixer.pattern is None or mixer.memory is not None:
                return None
            heads = mixer.pattern[:, : position + 1, : position + 1]
            read = sum(
                (row @ head.cpu().double() for head in heads), start=torch.zeros_like(row)
            )  # one is wide at a time
            row = (row + read / len(heads)) / 2
    return row


@contextmanager
def _explained(by: Ablation | None) -> Iterator[None]:
    """Say what a model whose stream has no finite values may divide by."""
    try:
        yield
    except NumericsError as error:
        if by == "zero":
            raise NumericsError(f"{error}; or it divides by the length of an embedding of zero: use mean") from error
        raise
