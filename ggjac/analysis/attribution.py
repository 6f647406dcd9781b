"""Which input tokens make up a logit: exact additive shares.

    logit = w · y = Σ_i w · J_i x_i + w · offset

with `w` the head's row of the target token. One cotangent, one downward sweep gives every `Jᵀ w` at once. The split is
an identity of the frozen network; it says what each position contributes along its live path, not what would happen if
a token were changed.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ggjac.decode import Head
from ggjac.jacobian import DetachedJacobian


@dataclass(frozen=True)
class Attribution:
    """How one logit is made up.

    Attributes:
        target: token id whose logit is split.
        logit: `w · y` (plus the head's bias), from the forward pass, before any soft cap.
        shares: `[n]`, float64: what each input position contributes.
        offset: what the biases contribute, the head's included; 0 for models without them.
    """

    target: int
    logit: float
    shares: Float[Tensor, " n"]
    offset: float

    @property
    def unexplained(self) -> float:
        """`logit - Σ shares - offset`: rounding, and so a measure of what the dtype costs."""
        return self.logit - float(self.shares.sum()) - self.offset


def attribute(jacobian: DetachedJacobian, head: Head, target: int | None = None) -> Attribution:
    """Split the logit of token `target` (default: the most likely next token) over the input positions."""
    if target is None:
        target = int(head.logits(jacobian.output[None])[0].argmax())
    w = head.scale * head.matrix.take([target])
    bias = 0.0 if head.bias is None else float(head.bias[target])
    pulled = jacobian.rmatmat(w)[0].double()
    return Attribution(
        target=target,
        logit=float(w[0].double() @ jacobian.output.double()) + bias,
        shares=(pulled * jacobian.x.double()).sum(1).cpu(),
        offset=float(w[0].double() @ jacobian.offset.double()) + bias,
    )
