"""What is asked of a network's outputs: logits, or differences of two, as vectors that read the outputs."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ggjac.decode import Head


class Asked(NamedTuple):
    """The logits asked for, as vectors: `logits = w · y + bias`, in float64; `w` is of the network's dtype."""

    targets: Int[Tensor, " m"]
    w: Float[Tensor, "m d"]
    bias: Float[Tensor, " m"]
    logits: Float[Tensor, " m"]


def ask(outputs: Float[Tensor, "m d"], head: Head, target: int | list[int] | None, versus: int | None) -> Asked:
    """Choose a target for each output, the most likely one for None, and read the head's rows of it.

    Of a list, each output has its own target, which may be `versus`: that difference is 0.

    Raises:
        ValueError: the only target is `versus`, or a list is not as long as there are outputs.
    """
    if isinstance(target, list):
        if len(target) != len(outputs):
            raise ValueError(f"there are {len(target)} targets for {len(outputs)} outputs; give one for each")
        targets = torch.tensor(target)
    elif target is None:
        targets = head.logits(outputs).argmax(1).cpu()
    elif target == versus:
        raise ValueError(f"target and versus are both token id {target}: the difference is 0; give two tokens")
    else:
        targets = torch.full((len(outputs),), target)
    distinct, which = targets.unique(return_inverse=True)

    def row(ids: list[int]) -> tuple[Tensor, Tensor]:
        biases = torch.zeros(len(ids)) if head.bias is None else head.bias[ids]
        return head.scale * head.matrix.take(ids), biases.cpu().double()

    w, bias = row(distinct.tolist())
    if versus is not None:
        other, other_bias = row([versus])
        w, bias = w - other, bias - other_bias
    w, bias = w[which.to(w.device)], bias[which]
    return Asked(targets, w, bias, (w.cpu().double() * outputs.cpu().double()).sum(1) + bias)
