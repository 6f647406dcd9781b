"""Activation steering: the linear map of one prompt, the concept, steers the residual stream of another text.

Let `J_j` `[d, d]`, `j < T`, be the concept's detached Jacobian from its `T` embeddings to its last position after
`layer` blocks. It takes a new text's embeddings `e_0, e_1, ...` in turn, starting over after `T` of them:

    c_i = offset + Σ_{j <= i} J_{j mod T} e_j

- `"equation16"` (Golden, arXiv 2505.24293, eq. 16): the residual stream `h` after `layer` blocks becomes

      h_i <- λ h_i + (1 - λ) c_i

  `J` ends in the raw stream, which `c` replaces. λ = 1 changes nothing; strength is 1 - λ, so that 0 is the baseline.
  The equation does not define how a map of `T` tokens applies to a longer text: that part follows the paper's code.
  `offset` (the contribution of biases; zero in the paper's models) makes `c` the concept's own stream where text and
  concept agree.

- `"additive"` (the paper's code, `apply_steering_operator`): `J` ends after the final norm, as its code computes it,
  without offset; what changes is the stream one block earlier, after `layer - 1` blocks, in every position

      h_i <- h_i + (λ / 2) ‖h_i‖ c_i / ‖c_i‖

  λ = 0 changes nothing; strength is λ.

The rest of the network then runs as usual. Generation is greedy, and `c` grows with every token.

Position 0 is spared: it is an attention sink in most models, and a push there changes what all heads do with it. (The
paper's code pushes it, too: `first`. A text of one token is pushed there in any case.)

The control is the map of an unrelated prompt, used in the same way. Without such a prompt it is the concept's own map,
offset included, that writes elsewhere: `Q c` in place of `c`, with `Q` orthogonal, random and seeded. It has the same
singular values and reads the text in the same way, and `‖Q c‖ = ‖c‖` for every text. That is not like for like where
the stream's length lies in a few huge components, as in Gemma: a rotation destroys such a stream, and any text's map
beats it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac import checks, display
from ggjac.blocks import renewed
from ggjac.checks import whole
from ggjac.decode import divergence
from ggjac.generation import Continuation, greedy
from ggjac.jacobian import DetachedJacobian, Progress, Span, Tap
from ggjac.model import Model, Trace
from ggjac.results import NO_WORDS, Plotted, Points, Prompt, Result, Table, Words
from ggjac.sizes import MlpPath, default_layer

Method = Literal["equation16", "additive"]

# An orthogonal map of stacked vectors `[m, d]`.
Rotation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Generated(Result):
    """One text, and how its first step differs from the baseline's.

    Attributes:
        strength: of steering; 0 for the baseline.
        control: steered by the control instead of the concept.
        ids: generated token ids.
        logits: `[v]`, after the prompt: scores of the first generated token.
        kl: `KL(baseline ‖ this)` of the first step's distributions, in nats.
        mass: probability of the concept's top tokens at the first step, together.
        hits: how many of `ids` are among the concept's top tokens.
        direction: `[d]`, the addition to the residual stream at the prompt's last position; zero for the baseline.
    """

    strength: float
    control: bool
    ids: list[int]
    logits: Float[Tensor, " v"]
    kl: float
    mass: float
    hits: int
    direction: Float[Tensor, " d"]

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the text, token by token, and its measures."""
        return {
            "strength": self.strength,
            "text": words.text(self.ids),
            "tokens": [words.token(id) for id in self.ids],
            "kl_first": self.kl,
            "concept_mass_first": self.mass,
            "concept_hits": self.hits,
            "direction_norm": float(self.direction.cpu().double().norm()),
        }


@dataclass(frozen=True)
class Steering(Plotted):
    """A prompt continued without steering, and with several strengths of it.

    Attributes:
        method: `"equation16"` or `"additive"`.
        layer: where the concept's map ends: number of blocks applied.
        changed: where the residual stream is changed: number of blocks applied.
        ids: of the prompt.
        concept_ids: of the concept.
        concept_tokens: ids that the concept itself predicts next, most likely first.
        concept_chances: their probabilities there.
        baseline: without steering.
        steered: by strength, in the order asked for.
        controls: the same, steered by the control, if asked for.
        seed: of the random operator.
        blocks: of the model.
        concept: the text that was given for the concept; None where it was token ids.
        control_ids: of the unrelated prompt; None where the control is the random operator.
        control_concept: the text that was given for the unrelated prompt; None where there is none.
        first: whether position 0 was pushed, too.
    """

    method: Method
    layer: int
    changed: int
    ids: list[int]
    concept_ids: list[int]
    concept_tokens: list[int]
    concept_chances: list[float]
    baseline: Generated
    steered: list[Generated]
    controls: list[Generated]
    seed: int
    blocks: int
    concept: str | None
    control_ids: list[int] | None
    control_concept: str | None
    first: bool

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the concept and all texts."""
        return {
            "method": self.method,
            "layer": self.layer,
            "changed_after_blocks": self.changed,
            "blocks": self.blocks,
            "seed": self.seed,
            "concept": {
                "text": self.concept,
                "tokens": [words.token(id) for id in self.concept_ids],
                "top": [
                    words.token(id) | {"probability": chance}
                    for id, chance in zip(self.concept_tokens, self.concept_chances, strict=True)
                ],
            },
            "control": {"kind": "random"}
            if self.control_ids is None
            else {
                "kind": "concept",
                "text": self.control_concept,
                "tokens": [words.token(id) for id in self.control_ids],
            },
            "first_position": self.first,
            "baseline": self.baseline.data(words),
            "steered": [text.data(words) for text in self.steered],
            "controls": [text.data(words) for text in self.controls],
        }

    @property
    def controlled_by(self) -> str:
        """What steered the controls, in words."""
        if self.control_ids is None:
            return "a random operator"
        return "the map of " + (repr(self.control_concept) if self.control_concept else "an unrelated prompt")

    def _table(self, words: Words) -> Table:
        rows = [self.baseline, *self.steered, *self.controls]
        names = ("strength", "control", "kl", "mass", "hits")
        columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in names}
        if words.trace:
            columns["text"] = [display.visible(words.text(row.ids)) for row in rows]
        notes = (
            "mass: of the concept's top tokens at the first step; hits: how many of them were generated",
            f"control: steered by {self.controlled_by}; position 0 is {'steered, too' if self.first else 'spared'}",
        )
        columns |= words.column("generated", [row.ids for row in rows])
        common = {"method": self.method, "layer": self.layer, "changed": self.changed}
        return Table(f"Steering ({self.method}) after {self.changed} blocks", columns, notes, common)

    def exhibits(self, trace: Prompt | None = None) -> list[Table]:
        """Return the table for print, with whole texts instead of their tokens where these are known."""
        found = self.table(trace)
        columns = {name: column for name, column in found.columns.items() if name != "generated" or trace is None}
        return [replace(found, columns=columns)]

    def _plot(self, words: Words) -> Points:
        series = {}
        for name, rows in (("concept", self.steered), ("control", self.controls)):
            points = sorted((row.strength, row.kl) for row in (self.baseline, *rows)) if rows else []
            series[name] = [x for x, _ in points], [y for _, y in points], ()
        return Points("Effect of steering on the first token", "strength", "KL to the baseline, nats", series)


def steer(
    model: Model,
    prompt: str | Sequence[int],
    concept: str | Sequence[int],
    *,
    method: Method = "equation16",
    layer: int | None = None,
    strengths: Sequence[float] = (0.5,),
    max_tokens: int = 12,
    top: int = 5,
    control: bool = True,
    control_concept: str | Sequence[int] | None = None,
    first: bool = False,
    seed: int = 0,
    parse_special: bool = True,
    mlp_path: MlpPath = "up",
    progress: Progress | None = None,
) -> Steering:
    """Continue a prompt greedily, alone and steered by the concept's linear map; see the module for the formulas.

    Costs a trace and a sweep for the prompt with either map, then for each text and token a pass over the weights and
    a sweep of `layer` blocks.

    Args:
        model: from `ggjac.open_model`.
        prompt: text, or token ids.
        concept: text, or token ids.
        method: which formula.
        layer: where the concept's map ends, 1 to the number of blocks; default two thirds of them.
        strengths: of steering; 0 is the baseline in either method.
        max_tokens: to generate; fewer where the model ends the text.
        top: how many of the concept's next tokens count as its own.
        control: generate with a control too.
        control_concept: text, or token ids, of an unrelated prompt whose map is the control; default a random operator.
        first: push position 0 as well.
        seed: of the random operator.
        parse_special: `<s>` and the like in a text are the tokens that they name.
        mlp_path: freezing rule of the concept's map.
        progress: called as `progress("token", done, total)` after each token of all texts.

    Raises:
        PromptError: a prompt that the model cannot run, or that would outgrow its context.
        ValueError: the method is unknown, an argument is out of range, or a control's prompt is given but no control.
        NumericsError: the residual stream left the range of the dtype.
    """
    blocks = model.config.block_count
    layer = default_layer(blocks) if layer is None else layer
    if method not in get_args(Method):
        raise ValueError(f"method {method!r} is unknown; known: {', '.join(get_args(Method))}")
    if not 1 <= whole("layer", layer, None) <= blocks:
        raise ValueError(f"layer {layer} is out of range; this model has layers 1 to {blocks}")
    max_tokens, top, seed = whole("max_tokens", max_tokens), whole("top", top), checks.seed(seed)
    numbers = strengths if isinstance(strengths, Sequence) else [None]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise ValueError(f"strengths {strengths!r}: give a list of finite numbers")
    if control_concept is not None and not control:
        raise ValueError("control_concept is given, and control=False leaves the control out; give one of the two")
    ids = model.prompt_ids(prompt, parse_special=parse_special)
    concept_ids = model.prompt_ids(concept, parse_special=parse_special)
    control_ids = None
    if control_concept is not None:
        control_ids = model.prompt_ids(control_concept, parse_special=parse_special)
    capacity = len(ids) + max_tokens
    baseline_text = Continuation(model, capacity, mlp_path=mlp_path)  # refuses what outgrows the context

    def mapped(of: Sequence[int]) -> tuple[Trace, Images]:
        trace = model.trace(of, mlp_path=mlp_path, n_ctx=capacity)
        raw = method == "equation16"
        return trace, Images(trace.jacobian(span=Span(0, Tap("layer", layer)), raw=raw), affine=raw)

    trace, images = mapped(concept_ids)
    chances = trace.logits.cpu().double().softmax(0)
    del trace
    best = chances.topk(min(top, len(chances)))
    prompt_images = images(model.embed(ids))
    turned = random_rotation(prompt_images.shape[1], seed) if control and control_ids is None else None

    count = len(strengths)
    runs = 1 + count * (1 + control)
    baseline_direction = torch.zeros_like(prompt_images[-1])

    def steps(run: int) -> Callable[[int, int], None] | None:
        if progress is None:
            return None
        return lambda done, total: progress("token", run * total + done, runs * total)

    plain, plain_logits = greedy(baseline_text, ids, max_tokens, progress=steps(0))
    del baseline_text  # with its keys and values

    def generated(run: int, strength: float, control: bool = False) -> Generated:
        rotation = turned if control else None
        push = Push(method, layer, strength, images, prompt_images, rotation, first=first or len(ids) == 1)
        text = Continuation(model, capacity, mlp_path=mlp_path, change=push)
        found, logits = greedy(text, ids, max_tokens, progress=steps(run))
        return _measured(strength, control, found, logits, plain_logits, best.indices, push.direction)

    steered = [generated(run, strength) for run, strength in enumerate(strengths, 1)]
    if control_ids is not None:
        images = mapped(control_ids)[1]  # in place of the concept's: two traces at once may not fit
        prompt_images = images(model.embed(ids))
    return Steering(
        method=method,
        layer=layer,
        changed=changed_layer(method, layer),
        ids=ids,
        concept_ids=concept_ids,
        concept_tokens=best.indices.tolist(),
        concept_chances=best.values.tolist(),
        baseline=_measured(0.0, False, plain, plain_logits, plain_logits, best.indices, baseline_direction),
        steered=steered,
        controls=[generated(run, strength, True) for run, strength in enumerate(strengths, 1 + count) if control],
        seed=seed,
        blocks=blocks,
        concept=concept if isinstance(concept, str) else None,
        control_ids=control_ids,
        control_concept=control_concept if control_ids and isinstance(control_concept, str) else None,
        first=first,
    )


def changed_layer(method: Method, layer: int) -> int:
    """Return where a method changes the residual stream, for a map that ends after `layer` blocks: blocks applied."""
    return layer if method == "equation16" else layer - 1


class Images:
    """The images of a text's embeddings under the concept's map: `c_i`, cumulative, `[m, d]` to `[m, d]`.

    Of several residual streams, they have those that branches write.

    Args:
        jacobian: the concept's, `[T, d]` to `[d]`.
        affine: count its offset.
    """

    def __init__(self, jacobian: DetachedJacobian, *, affine: bool):
        self.jacobian, self.config = jacobian, jacobian.network.config
        offset = jacobian.offset if affine else jacobian.x.new_zeros(jacobian.out_shape)
        self.offset = renewed(self.config, offset[None])[0]

    def __call__(
        self, x: Float[Tensor, "m d"], start: int = 0, before: Float[Tensor, " c"] | None = None
    ) -> Float[Tensor, "m c"]:
        """Return `c` at positions `start` and on, whose embeddings are `x`; `before` is `c` at the position before."""
        period, d = self.jacobian.in_shape
        at_once = self.jacobian.rows_at_once()
        parts = []
        for first in range(0, len(x), at_once):
            some = x[first : first + at_once]
            stacked = some.new_zeros(len(some), period, d)
            rows = torch.arange(len(some), device=x.device)
            stacked[rows, (start + first + rows) % period] = some
            parts.append(renewed(self.config, self.jacobian.matmat(stacked)))
        return (self.offset if before is None else before) + torch.cat(parts).cumsum(0)


class Push:
    """A `ggjac.generation.Change`: one method at one strength, over one text.

    Args:
        method: which formula.
        layer: where the concept's map ends.
        strength: 0 changes nothing.
        images: of the concept.
        prompt_images: those of the text's beginning, which all texts share, `[n, d]`.
        rotation: turns every image (the random control), or None.
        first: push position 0 of the text as well.

    Attributes:
        direction: `[d]`, the addition at the last position of the text's beginning.
    """

    def __init__(
        self,
        method: Method,
        layer: int,
        strength: float,
        images: Images,
        prompt_images: Float[Tensor, "n c"],
        rotation: Rotation | None = None,
        *,
        first: bool = True,
    ):
        self.formula = equation16 if method == "equation16" else additive
        self.at, self.strength, self.images, self.rotation = changed_layer(method, layer), strength, images, rotation
        self.direction = torch.zeros_like(prompt_images[-1])
        self._c, self._done, self._first = prompt_images, 0, first

    def __call__(self, layer: int, h: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        """Return the residual stream after `layer` blocks, changed if this is the method's depth."""
        if layer == 0 and self._done:  # the beginning's images are known
            self._c = self.images(h, self._done, self._c[-1])
        if layer != self.at:
            return h
        stream = renewed(self.images.config, h)
        changed = self.formula(stream, self._c if self.rotation is None else self.rotation(self._c), self.strength)
        if not self._done:
            if not self._first:
                changed = torch.cat([stream[:1], changed[1:]])
            self.direction = (changed - stream)[-1]
        self._done += len(h)
        return torch.cat([changed, h[:, stream.shape[1] :]], 1)


def equation16(h: Float[Tensor, "m d"], c: Float[Tensor, "m d"], strength: float) -> Float[Tensor, "m d"]:
    """Return `λ h + (1 - λ) c` with λ = 1 - strength (eq. 16 of the paper)."""
    return (1 - strength) * h + strength * c


def additive(h: Float[Tensor, "m i"], c: Float[Tensor, "m d"], strength: float) -> Float[Tensor, "m i"]:
    """Return `h + (strength / 2) ‖h‖ c / ‖c‖`, at each position (the paper's code); a zero `c` has no direction.

    Of several residual streams, each gets the same. Lengths are measured in float32 at least.
    """
    c = c.repeat(1, h.shape[1] // c.shape[1])
    wide = torch.promote_types(h.dtype, torch.float32)
    lengths = c.to(wide).norm(dim=-1, keepdim=True)
    scale = strength / 2 * h.to(wide).norm(dim=-1, keepdim=True) / torch.where(lengths > 0, lengths, 1)
    return h + (scale * c).to(h)


def random_rotation(d: int, seed: int) -> Rotation:
    """Return a random orthogonal map of vectors `[m, d]`: signs, a permutation, Hartley's transform, signs again.

    As in the fast Johnson-Lindenstrauss transform (Ailon and Chazelle, SIAM J. Comput. 39, 2009): every component of a
    vector is spread evenly over its image. A uniformly drawn matrix `[d, d]` would take gigabytes for wide models.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(d, generator=generator)
    signs = 2.0 * torch.randint(2, (2, d), generator=generator) - 1

    def turned(c: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        wide = c.to(torch.promote_types(c.dtype, torch.float32))
        before, after = signs.to(wide)
        spread = torch.fft.fft(wide[:, order.to(c.device)] * before)
        return ((spread.real - spread.imag) * (after / d**0.5)).to(c)

    return turned


def _measured(
    strength: float,
    control: bool,
    ids: list[int],
    logits: Float[Tensor, " v"],
    baseline: Float[Tensor, " v"],
    tokens: Tensor,
    direction: Float[Tensor, " d"],
) -> Generated:
    own = set(tokens.tolist())
    return Generated(
        strength=strength,
        control=control,
        ids=ids,
        logits=logits,
        kl=divergence(baseline, logits),
        mass=float(logits.cpu().double().softmax(0)[tokens].sum()),
        hits=sum(id in own for id in ids),
        direction=direction,
    )
