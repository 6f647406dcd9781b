"""Continuation of a prompt, token by token: with cached keys and values, a new token costs one position.

The blocks are those of the trace (`ggjac.blocks`), applied to the new positions only; no tapes are kept. The residual
stream can be changed after every block, as activation steering does.
"""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from ggjac.blocks import NumericsError, Past, extend_block
from ggjac.checks import whole
from ggjac.model import Model, PromptError, finite_logits
from ggjac.sizes import MlpPath

# Called as `change(layer, h)` with the residual stream `[m, d]` at new positions after `layer` blocks (0: the
# embeddings); returns the stream that replaces it.
Change = Callable[[int, Tensor], Tensor]


class Continuation:
    """A text that grows in a model: past positions are cached, only new ones are computed.

    Args:
        model: the model.
        capacity: the largest number of positions; also the context size that decides between short and long rope
            factors where a model has both.
        mlp_path: as `Model.trace` takes it; it changes values by rounding only.
        change: see `Change`; None leaves the stream unchanged.

    Raises:
        PromptError: the model's context is smaller than `capacity`.
    """

    def __init__(self, model: Model, capacity: int, *, mlp_path: MlpPath = "up", change: Change | None = None):
        if capacity > model.config.longest:
            raise PromptError(
                f"the text would grow to {capacity} tokens, this model takes at most {model.config.longest}; "
                "ask for fewer tokens or shorten the prompt"
            )
        self.model, self.capacity, self.length = model, capacity, 0
        self.change: Change = change or (lambda layer, h: h)
        self._frame = model.frame(capacity, mlp_path=mlp_path)
        self._past: list[tuple[Past, ...] | None] = [None] * model.config.block_count

    def extend(self, ids: Sequence[int]) -> Float[Tensor, "m d"]:
        """Append tokens and return their outputs `[m, d]`, after the final norm; one pass over the weights.

        Raises:
            PromptError: no tokens, ids outside the vocabulary, or more positions than `capacity`.
            NumericsError: the stream left the range of the dtype.
        """
        model, config = self.model, self.model.config
        ids = model.check_prompt(ids)
        if self.length + len(ids) > self.capacity:
            raise PromptError(f"there is room for {self.capacity} tokens, not for {self.length + len(ids)}")
        frame = self._frame._replace(inputs=model.block_inputs(ids), choices=model.choices(ids))
        h = self.change(0, model.embed(ids, self.length))
        for i in range(config.block_count):
            w = model.block(i, live=True)
            if i + 1 < config.block_count:
                model.block(i + 1, live=True).read_ahead()
            source = config.layers[i].source
            # One past for all blocks that read the same keys; blocks that read values beside their own have their own.
            kept = source if source is not None and config.layers[i].mixers == ("shared attention",) else i
            first = None if source is None else (self._past[source] or (None,))[0]
            h, self._past[kept] = extend_block(w, frame, i, h, self._past[kept], first)
            h = self.change(i + 1, h)
            if not h.isfinite().all():
                name = str(model.dtype).removeprefix("torch.")
                raise NumericsError(f"block {i} overflowed {name}; try a wider dtype or a smaller strength")
        self.length += len(ids)
        return model.freeze_final_norm(h).apply(h)

    def logits(self, ids: Sequence[int]) -> Float[Tensor, " v"]:
        """Append tokens and return the logits after the last of them, `[v]`; errors as `extend`."""
        return finite_logits(self.model.head.logits(self.extend(ids)[-1:]))[0]


def greedy(
    text: Continuation,
    ids: Sequence[int],
    count: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[int], Float[Tensor, " v"]]:
    """Append a prompt, then the most likely token `count` times; ties go to the smaller id.

    Returns the generated ids and the logits after the prompt, `[v]`. Generation stops early after an end token, which
    is the last of the ids. Needs room for `len(ids) + count - 1` positions: the last token is not fed back.
    """

    def likeliest(logits: Tensor) -> int:
        crew, found = text.model.crew, int(logits.argmax())
        return crew.told(found) if crew else found

    first = logits = text.logits(ids)
    found = [likeliest(logits)]
    ends = end_tokens(text.model)
    while len(found) < count and found[-1] not in ends:
        if progress:
            progress(len(found), count)
        logits = text.logits(found[-1:])
        found.append(likeliest(logits))
    if progress:
        progress(count, count)
    return found, first


def generate(
    model: Model,
    prompt: str | Sequence[int],
    max_tokens: int = 12,
    *,
    parse_special: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """Return the token ids with which a model continues a prompt, always by the most likely one.

    Args:
        model: from `ggjac.open_model`.
        prompt: text, or token ids.
        max_tokens: to generate; fewer where the model ends the text, and then the end token is the last.
        parse_special: `<s>` and the like in a text are the tokens that they name.
        progress: called as `progress(done, total)` after each token.

    Raises:
        PromptError: the model cannot run the prompt, or it would outgrow the context.
        NumericsError: the residual stream left the range of the dtype.
    """
    ids, max_tokens = model.prompt_ids(prompt, parse_special=parse_special), whole("max_tokens", max_tokens)
    return greedy(Continuation(model, len(ids) + max_tokens), ids, max_tokens, progress=progress)[0]


def end_tokens(model: Model) -> set[int]:
    """Return the ids of the file's tokens that end a text, a turn or a message."""
    found = (model.gguf.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return {id for id in found if isinstance(id, int)}  # in a damaged file it may be of any type
