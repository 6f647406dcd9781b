"""Is a direction causal? The residual stream is changed along it, and the model computes anew.

With `h` the stream after `layer` blocks at a changed position, `v` the direction there, and s the strength:

    add      h <- h + s v
    remove   h <- h - s v̂ ⟨v̂, h⟩,    v̂ = v / ‖v‖        (s = 1 projects it out)

`v` comes from outside, or is a singular vector of the prompt's own map: the left vector of the map from the embeddings
to the stream after `layer` blocks, where it writes; or the right vector of the map from there to the output, where it
reads: after 0 blocks, of the embeddings. A right vector has a slice for each position, so each is changed along its
own; the others have one direction for all positions. Singular vectors have no length of their own: added, they are as
long as the stream at the prompt's last position.

The null is a push of equal length at each position along a random direction, drawn evenly from the sphere. Beside each
measured change stands what the frozen map from `layer` to the output says of it: `J Δh`, exact if attention, gates and
norms stayed as they are at the prompt. How far that is off is how far the map does not hold there.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac import checks, display
from ggjac.blocks import renewed
from ggjac.checks import whole
from ggjac.decode import divergence
from ggjac.directions import Direction
from ggjac.edits import Edit, Editor
from ggjac.generation import Continuation, greedy
from ggjac.jacobian import DetachedJacobian, Progress, Span, Tap
from ggjac.model import Model, Trace
from ggjac.results import NO_WORDS, Plotted, Points, Table, Words
from ggjac.sizes import MlpPath, default_layer

Method = Literal["add", "remove"]
SINGULAR = re.compile(r"(left|right):([1-9][0-9]{0,8})", re.ASCII)


class Null(NamedTuple):
    """The same change along random directions, `m` of them.

    Attributes:
        kl: `KL(baseline ‖ this)` of the next token, in nats.
        logit: of the target.
    """

    kl: list[float]
    logit: list[float]


@dataclass(frozen=True)
class Edited:
    """The prompt, continued with the stream changed at one strength.

    Attributes:
        strength: 0 for the baseline.
        ids: generated token ids.
        logits: `[v]`, after the prompt.
        kl: `KL(baseline ‖ this)` of the next token, in nats.
        length: `‖Δh‖` at the changed position where it is largest.
        predicted: `[v]`: the logits of `y + J Δh`, by the frozen map.
        error: `‖J Δh - Δy‖ / ‖Δy‖`; None where nothing changes.
        null: the same along random directions.
    """

    strength: float
    ids: list[int]
    logits: Float[Tensor, " v"]
    kl: float
    length: float
    predicted: Float[Tensor, " v"]
    error: float | None
    null: Null

    @property
    def at_least(self) -> int:
        """How many random directions change the next token at least as much."""
        return sum(kl >= self.kl for kl in self.null.kl)


@dataclass(frozen=True)
class Intervention(Plotted):
    """A prompt continued with the residual stream as it is, and changed along a direction.

    Attributes:
        method: `"add"` or `"remove"`.
        name: of the direction.
        layer: where the stream is changed: number of blocks applied.
        blocks: of the model.
        positions: of the prompt, that are changed.
        generated: whether the positions of generated tokens are changed, too.
        ids: of the prompt.
        target: token id whose logit is shown.
        component: float64, `⟨v̂, h⟩` at each of `positions`; the mean over several residual streams.
        length: float64, `‖h‖` at each of `positions`.
        baseline: without a change.
        edited: by strength, in the order asked for.
        seed: of the random directions.
        top: number of next tokens shown.
        mlp_path: the freezing rule of the map that predicts, and of that of a singular vector.
        residual: of the singular vector, and of those before it the largest, relative to their singular values; None
            for a direction that is given.
        tol: that was asked of it.
        added: `[w]`, float64: what the last strength adds at each changed position; None where that differs, as of
            `"remove"` and of right singular vectors.
    """

    method: Method
    name: str
    layer: int
    blocks: int
    positions: list[int]
    generated: bool
    ids: list[int]
    target: int
    component: Float[Tensor, " m"]
    length: Float[Tensor, " m"]
    baseline: Edited
    edited: list[Edited]
    seed: int
    top: int
    mlp_path: MlpPath
    residual: float | None
    tol: float
    added: Float[Tensor, " w"] | None

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the direction, the baseline, and every strength with its null and the map's own prediction."""
        return {
            "method": self.method,
            "direction": self.name,
            "layer": self.layer,
            "blocks": self.blocks,
            "seed": self.seed,
            "mlp_path": self.mlp_path,
            "residual": self.residual,
            "tol": self.tol,
            "generated": self.generated,
            "positions": [
                words.here(i) | {"component": component, "length": length}
                for i, component, length in zip(
                    self.positions, self.component.tolist(), self.length.tolist(), strict=True
                )
            ],
            "target": words.token(self.target),
            "baseline": self._read(self.baseline, words),
            "edited": [
                self._read(edited, words)
                | {
                    "strength": edited.strength,
                    "kl": edited.kl,
                    "change": edited.length,
                    "predicted": {
                        "logit": float(edited.predicted[self.target]),
                        "kl": divergence(self.baseline.logits, edited.predicted),
                        "error": edited.error,
                    },
                    "random": edited.null._asdict() | {"at_least": edited.at_least},
                }
                for edited in self.edited
            ],
        }

    def _read(self, edited: Edited, words: Words) -> dict[str, Any]:
        """Return the target's logit, the likeliest next tokens and the text."""
        chances = edited.logits.cpu().double().softmax(0)
        best = chances.topk(min(self.top, len(chances)))
        return {
            "logit": float(edited.logits[self.target]),
            "probability": float(chances[self.target]),
            "top": [
                words.token(id) | {"probability": chance}
                for id, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ],
            "text": words.text(edited.ids),
            "tokens": [words.token(id) for id in edited.ids],
        }

    def _table(self, words: Words) -> Table:
        rows = [self.baseline, *self.edited]
        nulls = [(sorted(row.null.kl), [*row.null.logit]) for row in rows]
        columns: dict[str, list[Any]] = {
            "strength": [row.strength for row in rows],
            "change": [row.length for row in rows],
            "logit": [float(row.logits[self.target]) for row in rows],
            "predicted logit": [float(row.predicted[self.target]) for row in rows],
            "error": [row.error for row in rows],
            "kl": [row.kl for row in rows],
            "random kl": [kl[len(kl) // 2] if kl else None for kl, _ in nulls],
            "random logit": [sum(logit) / len(logit) if logit else None for _, logit in nulls],
        }
        columns |= words.column("next", [int(row.logits.argmax()) for row in rows])
        if words.trace:
            columns["text"] = [display.visible(words.text(row.ids)) for row in rows]
        named = words.name(self.target)
        notes: tuple[str, ...] = (
            f"logit: of {named}; predicted: by the frozen map, error: of its change of the output",
            f"random kl, random logit: median and mean of {len(self.edited[0].null.kl) if self.edited else 0} random "
            "directions of equal length",
        )
        if self.residual is not None:
            notes += (f"residual of the singular vector: {self.residual:.0e}",)
        common = {"method": self.method, "direction": self.name, "layer": self.layer, "mlp path": self.mlp_path}
        return Table(f"{self.name}: {self.method} after {self.layer} blocks", columns, notes, common)

    def _plot(self, words: Words) -> Points:
        rows = sorted([self.baseline, *self.edited], key=lambda row: row.strength)
        x = [row.strength for row in rows]
        measured = [float(row.logits[self.target]) for row in rows]
        series = {
            "measured": (x, measured, ()),
            "frozen map": (x, [float(row.predicted[self.target]) for row in rows], ()),
        }
        if all(row.null.logit for row in self.edited):
            random = [
                sum(row.null.logit) / len(row.null.logit) if row.null.logit else m
                for row, m in zip(rows, measured, strict=True)
            ]
            series["random"] = (x, random, ())
        return Points(f"Logit of {words.name(self.target)}", "strength", "logit", series)


def intervene(
    model: Model,
    prompt: str | Sequence[int],
    direction: Direction | Float[Tensor, " w"] | str,
    *,
    method: Method = "remove",
    layer: int | None = None,
    positions: str | Sequence[int] | None = None,
    strengths: Sequence[float] = (1.0,),
    target: int | str | None = None,
    max_tokens: int = 12,
    top: int = 5,
    random: int = 16,
    first: bool = False,
    seed: int = 0,
    tol: float = 1e-3,
    name: str | None = None,
    parse_special: bool = True,
    mlp_path: MlpPath = "up",
    progress: Progress | None = None,
) -> Intervention:
    """Continue a prompt greedily, as it is and with its residual stream changed along a direction; see the module.

    Costs a trace, for each strength a text and `random` passes over the prompt, a sweep from `layer` to the output; and
    for a singular vector its decomposition.

    Args:
        model: from `ggjac.open_model`.
        prompt: text, or token ids.
        direction: `[d]`, for each residual stream, or as wide as all of them, alone or as `ggjac.read_direction`
            returns it; or `"left:K"` or `"right:K"`, the K-th singular vector of the prompt's own map, from 1.
        method: `"add"` or `"remove"`.
        layer: number of blocks applied; default that of a control vector's direction, of right vectors 0, of others
            two thirds of the blocks.
        positions: of the prompt, that are changed, as `attribute_positions` takes them. Default all but the first one,
            an attention sink in most models, and those of the generated tokens; of a left singular vector, the last
            one, and of a right one, the position with most of its weight.
        strengths: of the change; 0 changes nothing.
        target: id or text of the token whose logit is shown; default the most likely one of the baseline.
        max_tokens: to generate; fewer where the model ends the text.
        top: number of likeliest next tokens.
        random: number of random directions, for each strength.
        first: change position 0 by default, too.
        seed: of the random directions, and of a decomposition's start.
        tol: relative residual of a singular vector.
        name: of the direction, for tables.
        parse_special: `<s>` and the like in a text are the tokens that they name.
        mlp_path: freezing rule of the maps.
        progress: called as `progress("pass", done, total)` after each pass over the prompt, and each token.

    Raises:
        PromptError: a prompt that the model cannot run, or that would outgrow its context; or no such target.
        ValueError: an argument is out of range, or the direction does not fit the stream, is zero or not finite.
        NumericsError: the residual stream left the range of the dtype.
    """
    if method not in get_args(Method):
        raise ValueError(f"method {method!r} is unknown; known: {', '.join(get_args(Method))}")
    numbers = strengths if isinstance(strengths, Sequence) else [None]
    if not all(isinstance(s, int | float) and math.isfinite(s) for s in numbers):
        raise ValueError(f"strengths {strengths!r}: give a list of finite numbers")
    max_tokens, top, random = whole("max_tokens", max_tokens), whole("top", top), whole("random", random, 0)
    seed, blocks = checks.seed(seed), model.config.block_count
    singular = singular_vector(direction) if isinstance(direction, str) else None
    known = Direction(direction) if isinstance(direction, Tensor) else direction
    if layer is None and isinstance(known, Direction):
        layer = known.layer
    layer = default_depth(singular and singular[0], blocks) if layer is None else layer
    check_depth(singular and singular[0], layer, blocks)
    ids = model.prompt_ids(prompt, parse_special=parse_special)
    given = None if positions is None else checks.output_positions(positions, len(ids))
    total = (1 + len(strengths)) * max_tokens + len(strengths) * random
    text = _Text(model, ids, max_tokens, mlp_path, total, progress)
    plain = text.continuation(None)  # refuses what outgrows the context
    trace = model.trace(ids, mlp_path=mlp_path, n_ctx=plain.capacity)
    if singular:
        vectors, heaviest, residual = _singular(trace, *singular, layer, seed, tol, progress)
        given = [heaviest] if given is None else given
    else:
        assert isinstance(known, Direction)
        vectors, residual = known.checked({model.config.d, _width(model, layer)}), None
    where = [*range(0 if first or len(ids) == 1 else 1, len(ids))] if given is None else given
    edit = Nudge(model, method, layer, vectors, where, len(ids), later=given is None)

    base = edit.at(0.0)
    plain_ids, plain_logits = text.generated(base, 0)
    if singular:
        edit.scale(base.stream_length)
    goal = int(plain_logits.argmax()) if target is None else model.token(target)
    runs = [edit.at(s) for s in strengths]
    found = [text.generated(run, k * max_tokens) for k, run in enumerate(runs, 1)]
    moved = _moved(trace, layer, torch.stack([run.change for run in runs])) if runs else base.output[None][:0]
    predicted = model.head.logits(base.output + moved) if runs else moved
    edited = []
    for k, (run, (own_ids, logits)) in enumerate(zip(runs, found, strict=True)):
        change = (run.output - base.output).cpu().double()
        after = text.random(run, random, seed, (1 + len(runs)) * max_tokens + k * random)
        edited.append(
            Edited(
                strength=run.strength,
                ids=own_ids,
                logits=logits,
                kl=divergence(plain_logits, logits),
                length=float(run.change.cpu().double().norm(dim=1).max()),
                predicted=predicted[k],
                error=float((moved[k].cpu().double() - change).norm() / change.norm()) if change.any() else None,
                null=Null([divergence(plain_logits, z) for z in after], after[:, goal].tolist()),
            )
        )
    return Intervention(
        method=method,
        name=name or (known if isinstance(known, str) else known.source) or "direction",
        layer=layer,
        blocks=blocks,
        positions=where,
        generated=given is None,
        ids=ids,
        target=goal,
        component=base.component[where],
        length=base.lengths[where],
        baseline=Edited(0.0, plain_ids, plain_logits, 0.0, 0.0, plain_logits, None, Null([], [])),
        edited=edited,
        seed=seed,
        top=top,
        mlp_path=mlp_path,
        residual=residual,
        tol=tol,
        added=runs[-1].added if runs else None,
    )


class _Text(NamedTuple):
    """A prompt that is run again and again: with its stream changed, and continued."""

    model: Model
    ids: list[int]
    max_tokens: int
    mlp_path: MlpPath
    total: int
    progress: Progress | None

    def continuation(self, change: "Nudge | None") -> Continuation:
        return Continuation(self.model, len(self.ids) + self.max_tokens, mlp_path=self.mlp_path, change=change)

    def report(self, done: int) -> None:
        if self.progress:
            self.progress("pass", done, self.total)

    def generated(self, change: "Nudge", before: int) -> tuple[list[int], Tensor]:
        """Return the generated ids, and the logits after the prompt; `before` passes are done."""
        text = self.continuation(change)
        return greedy(text, self.ids, self.max_tokens, progress=lambda done, _: self.report(before + done))

    def random(self, change: "Nudge", count: int, seed: int, before: int) -> Float[Tensor, "k v"]:
        """Return the logits after the prompt where the change goes along random directions, many side by side."""
        editor = Editor(self.model, self.ids, len(self.ids) - 1, len(self.ids) + self.max_tokens)
        edits = [change.at(change.strength, seed + j).edit(editor) for j in range(count)]
        outputs = editor.outputs(
            edits, mlp_path=self.mlp_path, progress=lambda done, total: self.report(before + count * done // total)
        )
        return self.model.head.logits(outputs).cpu()


def singular_vector(text: str) -> tuple[str, int]:
    """Return the side and the number, from 1, of a singular vector that is named as `left:K` or `right:K`.

    Raises:
        ValueError: the text is not such a name.
    """
    match = SINGULAR.fullmatch(text)
    if not match:
        raise ValueError(f"direction {text[:60]!r} is not a singular vector; write left:1, right:2 and so on")
    return match[1], int(match[2])


def default_depth(side: str | None, blocks: int) -> int:
    """Return the depth of a direction that names none: the embeddings for right vectors, else two thirds of all."""
    return 0 if side == "right" else default_layer(blocks)


def check_depth(side: str | None, layer: int, blocks: int) -> None:
    """Check that there is a stream after so many blocks, and a map of which a singular vector is one.

    Raises:
        ValueError: there is none.
    """
    least, most = int(side == "left"), blocks - (side == "right")
    if not least <= whole("layer", layer, None) <= most:
        of = f"a {side} singular vector of the map" if side else "the stream"
        raise ValueError(f"layer {layer} is out of range for {of}; this model has {least} to {most}")


def _width(model: Model, layer: int) -> int:
    """Return the elements of the streams that are changed after `layer` blocks."""
    return model.config.d if model.config.one_runs else model.config.width(layer)


def _singular(
    trace: Trace, side: str, number: int, layer: int, seed: int, tol: float, progress: Progress | None
) -> tuple[Tensor, int, float]:
    """Return a singular vector of the prompt's map, in float64, its position, and the largest residual.

    The position of left ones, `[w]`, is the output's; of right ones, `[n, w]`, the one with most of the weight.
    """
    blocks, config = trace.model.config.block_count, trace.model.config
    left = side == "left"
    span = Span(0, Tap("layer", layer)) if left else Span(layer, Tap("layer", blocks))
    J: DetachedJacobian = trace.jacobian(span=span, raw=left)
    if number > config.d:
        raise ValueError(f"{side}:{number} is out of range; the map has {config.d} singular vectors")
    with J.reporting(progress):
        found = J.svd(number, block=J.block(number, math.prod(J.in_shape)), seed=seed, tol=tol)
    residual = float(found.residual.max())
    if left:
        return renewed(config, found.U[-1:])[0].cpu().double(), J.position, residual
    vectors = renewed(config, found.Vh[-1]).cpu().double()
    return vectors, int(vectors.square().sum(1).argmax()), residual


def _moved(trace: Trace, layer: int, changes: Float[Tensor, "k n i"]) -> Float[Tensor, "k d"]:
    """Return `J Δh`: how the frozen map from the stream after `layer` blocks moves the output at the last position."""
    blocks = trace.model.config.block_count
    if layer < blocks:
        return trace.jacobian(span=Span(layer, Tap("layer", blocks))).matmat(changes)
    last = slice(len(trace.ids) - 1, len(trace.ids))
    return trace.norm.at(last).operator().matmat(changes[:, last])[:, 0]


class Nudge:
    """A `ggjac.generation.Change`: one method at one strength, over one text.

    Args:
        model: the model.
        method: which formula.
        layer: where the stream is changed, in blocks applied.
        vectors: `[w]`, the direction at all changed positions, or `[n, w]`, one for each position of the prompt.
        where: positions of the prompt that are changed.
        n: length of the prompt.
        later: change the positions after the prompt, too.

    Attributes, of the prompt, known after it has run along the direction itself:
        change: `[n, i]`, Δh of all streams.
        component: `[n]`, float64, `⟨v̂, h⟩`, the mean over several streams.
        lengths: `[n]`, float64, `‖h‖`.
        output: `[d]`, after the final norm, at the last position.
    """

    change: Tensor
    component: Tensor
    lengths: Tensor
    output: Tensor
    seed: int | None

    def __init__(
        self, model: Model, method: Method, layer: int, vectors: Tensor, where: Iterable[int], n: int, *, later: bool
    ):
        self.model, self.method, self.layer, self.n, self.later = model, method, layer, n, later
        self.vectors, self.where = vectors, frozenset(where)
        self.strength, self.seed = 0.0, None
        self._done, self._start = 0, 0

    def at(self, strength: float, seed: int | None = None) -> "Nudge":
        """Return the same change at another strength; `seed` draws random directions in which it goes instead."""
        other = Nudge(self.model, self.method, self.layer, self.vectors, self.where, self.n, later=self.later)
        other.strength, other.seed = strength, seed
        return other

    @property
    def _measured(self) -> bool:
        """Whether the prompt is under way, along the direction itself: many random ones would keep a stream each."""
        return not self._start and self.seed is None

    def _along(self) -> Tensor:
        """Return where the change goes, as `vectors`: these, or random ones, which are drawn anew when they are used.

        Many edits wait at a time, and each would hold as much as the stream.
        """
        if self.seed is None:
            return self.vectors
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.vectors.shape, generator=generator, dtype=torch.float64)

    @property
    def stream_length(self) -> float:
        """The length at the prompt's last position of what is changed: of all streams, as wide as singular vectors."""
        return float(self.lengths[-1])

    @property
    def added(self) -> Tensor | None:
        """What is added at every changed position; None where positions differ."""
        return self.strength * self.vectors if self.method == "add" and self.vectors.dim() == 1 else None

    def scale(self, length: float) -> None:
        """Give the vectors a length, at each position."""
        self.vectors = length * _unit(self.vectors)

    def __call__(self, layer: int, h: Float[Tensor, "m i"]) -> Float[Tensor, "m i"]:
        """Return the stream after `layer` blocks, changed if this is the depth."""
        if layer == 0:
            self._start, self._done = self._done, self._done + len(h)
        if layer == self.layer:
            h = self._changed(h)
        if layer == self.model.config.block_count and self._measured:
            self.output = self.model.freeze_final_norm(h).apply(h)[-1]
        return h

    def edit(self, editor: Editor) -> Edit:
        """Return the change as an edit of the prompt."""
        if self.layer == 0:
            return Edit(editor.ids, lambda: self._changed(editor.x))
        return Edit(editor.ids, lambda: editor.x, self)

    def _at(self, vectors: Tensor, m: int) -> Tensor:
        """Return the vectors at the `m` positions under way, `[m, w]`; zero where nothing changes."""
        places = range(self._start, self._start + m)
        changed = torch.tensor([self.later if i >= self.n else i in self.where for i in places])
        if vectors.dim() == 1:
            return changed[:, None] * vectors
        rows = vectors[self._start : self._start + m]
        return changed[:, None] * torch.cat([rows, rows.new_zeros(m - len(rows), rows.shape[1])])

    def _changed(self, h: Float[Tensor, "m i"]) -> Float[Tensor, "m i"]:
        stream = renewed(self.model.config, h)
        wide = torch.promote_types(h.dtype, torch.float32)
        own, along = (self._at(v, len(h)).to(h.device, wide)[:, None] for v in (self.vectors, self._along()))
        parts = stream.to(wide).unflatten(1, (-1, own.shape[-1]))  # [m, s, w]
        component = (parts * _unit(own)).sum(-1, keepdim=True)
        factor = own.norm(dim=-1, keepdim=True) if self.method == "add" else -component
        added = (self.strength * factor * _unit(along)).expand_as(parts).flatten(1)
        changed = torch.cat([(stream + added.to(h)), h[:, stream.shape[1] :]], 1)
        if self._measured:
            self.change = changed - h
            self.component = component.mean(1)[:, 0].cpu().double()
            self.lengths = stream.cpu().double().norm(dim=1)
        return changed


def _unit(vectors: Tensor) -> Tensor:
    """Return vectors of length 1, and zero ones as they are."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    return vectors / torch.where(lengths > 0, lengths, 1)
