"""The most likely next tokens."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from ggjac.checks import whole
from ggjac.model import Trace
from ggjac.results import NO_WORDS, Bars, Plotted, Table, Words


@dataclass(frozen=True)
class Predictions(Plotted):
    """The most likely next tokens at one position, the first one the most likely.

    Attributes:
        ids: `[k]`, token ids.
        logits: `[k]`, float64.
        probabilities: `[k]`, float64: of the softmax over the whole vocabulary.
    """

    ids: Int[Tensor, " k"]
    logits: Float[Tensor, " k"]
    probabilities: Float[Tensor, " k"]

    def data(self, words: Words = NO_WORDS) -> list[dict[str, Any]]:
        """Return a record for each token."""
        return [
            words.token(id) | {"logit": float(logit), "probability": float(probability)}
            for id, logit, probability in zip(self.ids, self.logits, self.probabilities, strict=True)
        ]

    def _table(self, words: Words) -> Table:
        columns = {"logit": self.logits.tolist(), "probability": self.probabilities.tolist()}
        return Table("Next token", words.column("next", self.ids.tolist()) | columns)

    def _plot(self, words: Words) -> Bars:
        names = [words.name(id) for id in self.ids.tolist()]
        return Bars("Next token", "probability", names, self.probabilities.tolist())


def predict(trace: Trace, top: int = 5, *, position: int = -1) -> Predictions:
    """Return the `top` most likely tokens after `position` (negative: from the end); one pass over the LM head.

    Raises:
        PromptError: the prompt has no such position.
        NumericsError: a logit is not finite.
        ValueError: `top` is out of range.
    """
    top = whole("top", top)
    logits = trace.logits_at(position).cpu().double()
    best = logits.topk(min(top, len(logits)))
    return Predictions(best.indices, best.values, logits.softmax(0)[best.indices])
