"""The oracle's forward pass with its residual stream changed at a depth, as steering and interventions do."""

from collections.abc import Callable

import oracle
from torch import Tensor


def apart(known: oracle.Oracle, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return of several residual streams those that are pushed, and the others, of earlier blocks."""
    pushed = known.metadata["embedding_length"] if known.facts.streams in oracle.FIRST_RUNS else h.shape[1]
    return h[:, :pushed], h[:, pushed:]


def stream(known: oracle.Oracle, ids: list[int], depth: int, context: int) -> Tensor:
    """Return the stream `[n, i]` after so many blocks."""
    states = oracle.forward(known, ids, context=context)
    return states[f"l_out-{depth - 1}"] if depth else states["x"]


def pushed_forward(
    known: oracle.Oracle, ids: list[int], at: int, context: int, formula: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the logits `[v]` after a text whose stream is changed after `at` blocks, all of it computed anew."""
    found = oracle.forward(known, ids, context=context)
    states = {name: found[name] for name in ("x", "tokens", "per_layer_inputs") if name in found}
    h = states["x"]
    for i in range(oracle.blocks(known.metadata)):
        h = formula(h) if i == at else h
        if i == 0 and known.facts.first_values:  # later blocks read what this one read
            states["x"] = h
        states |= oracle.block(known, i, h, context=context, states=states)
        h = states[f"l_out-{i}"]
    h = formula(h) if at == oracle.blocks(known.metadata) else h
    return oracle.head(known, oracle.final_norm(known, h, frozen=False))[-1]
