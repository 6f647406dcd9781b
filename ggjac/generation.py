"""A prompt that goes on, token by token: keys and values of past positions are kept, so that each token costs one.

The blocks are those of the trace (`ggjac.blocks`), applied to the new positions only; no tapes are kept. The stream may
be changed on its way, which is what steering does.
"""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from ggjac.blocks import NumericsError, Past, extend_attention, record_ffn
from ggjac.model import Model, PromptError, finite_logits
from ggjac.sizes import MlpPath

# Called as `change(layer, h)` with the stream `[m, d]` at new positions after `layer` blocks (0: the embeddings, before
# any), and returns what goes on in its place.
Change = Callable[[int, Tensor], Tensor]


class Continuation:
    """A text under way in a model: what is past stays, what is new is computed.

    Args:
        model: what computes.
        capacity: positions there may be at most; also the context that decides between short and long rope factors
            where a model has both.
        mlp_path: as `Model.trace` takes it; it changes no value beyond rounding.
        change: see `Change`; None leaves the stream as it is.

    Raises:
        PromptError: the model's context is smaller than `capacity`.
    """

    def __init__(self, model: Model, capacity: int, *, mlp_path: MlpPath = "up", change: Change | None = None):
        if capacity > model.config.context_length:
            raise PromptError(
                f"the text would grow to {capacity} tokens, the model's context is {model.config.context_length}; "
                "ask for fewer tokens, or shorten the prompt"
            )
        self.model, self.capacity, self.length = model, capacity, 0
        self.change: Change = change or (lambda layer, h: h)
        self._frame = model.frame(capacity, mlp_path=mlp_path)
        self._past: list[Past | None] = [None] * model.config.block_count

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
        h = self.change(0, model.embed(ids, self.length))
        for i in range(config.block_count):
            w = model.block(i, live=True)
            if i + 1 < config.block_count:
                model.block(i + 1, live=True).read_ahead()
            attn, self._past[i] = extend_attention(w, self._frame, i, h, self._past[i])
            ffn = record_ffn(w, self._frame, i, h if config.row.parallel else h + attn)
            h = self.change(i + 1, h + attn + ffn.added)
            if not h.isfinite().all():
                raise NumericsError(f"block {i} overflows {model.dtype}; try a wider --dtype, or a smaller --strength")
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
    """Append a prompt, then `count` times the most likely token; of equals, the one of smaller id.

    Returns the generated ids (ending with the one that ends the text, if the model chooses it) and the logits after the
    prompt, `[v]`. Needs room for `len(ids) + count - 1` positions: the last token is not looked at again.
    """
    first = logits = text.logits(ids)
    found = [int(logits.argmax())]
    ends = end_tokens(text.model)
    while len(found) < count and found[-1] not in ends:
        if progress:
            progress(len(found), count)
        logits = text.logits(found[-1:])
        found.append(int(logits.argmax()))
    if progress:
        progress(count, count)
    return found, first


def end_tokens(model: Model) -> set[int]:
    """Return the ids with which the file says that a text, a turn or a message ends."""
    found = (model.gguf.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return {id for id in found if isinstance(id, int)}  # a damaged file may say anything
