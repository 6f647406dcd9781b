"""How a token mixer's outputs depend on its values, once everything else is frozen: one function for each mechanism.

Attention has a pattern by itself. A linear recurrence has one too, because its outputs are linear in the values that
are written into its state: the pattern of a head is the recurrence itself, run with the identity in place of the
values. Rows of such a pattern do not sum to one, and entries may be negative: what one position writes, a later one may
remove.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.config import Alibi
from ggjac.linop import ChannelScan


def attention_pattern(
    q: Float[Tensor, "m h s"],
    k: Float[Tensor, "n g s"],
    scale: float,
    *,
    softcap: float = 0.0,
    window: int | None = None,
    alibi: Alibi | None = None,
    sinks: Float[Tensor, " h"] | None = None,
    memory: Float[Tensor, "c g s"] | None = None,
    ratio: int = 0,
) -> Float[Tensor, "h m nc"]:
    """Return causal attention probabilities of the last `m` of `n` positions; softmax in float32 at least.

    `h` query heads share `g` key heads. A window includes the position itself. A sink is a logit that takes part in the
    softmax but has no value, so that the probabilities of positions sum to less than one. Probabilities of a memory,
    with a key for each `ratio` positions, follow those of the `n` positions: all those that are complete are seen.
    """
    # Widened before the product: 16-bit scores would be rounded again, and can overflow float16.
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = attention_logits(
        attention_scores(q.to(wide), k.to(wide), scale), softcap=softcap, window=window, alibi=alibi
    )
    if memory is not None and len(memory):
        ends = ratio * torch.arange(1, len(memory) + 1, device=q.device)
        later = ends > torch.arange(len(k) - len(q) + 1, len(k) + 1, device=q.device)[:, None]  # [m, c]
        of_groups = attention_scores(q.to(wide), memory.to(wide), scale)
        scores = torch.cat((scores, of_groups.masked_fill(later, -torch.inf)), -1)  # [h, m, n + c]
    seen = scores.shape[-1]
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(wide)[:, None, None].expand(-1, len(q), 1)), -1)  # and one more
    return scores.softmax(-1)[..., :seen].to(q.dtype)


def attention_scores(q: Float[Tensor, "m h s"], k: Float[Tensor, "n g s"], scale: float) -> Float[Tensor, "h m n"]:
    """Return the scaled products of queries and keys; `h` query heads share `g` key heads."""
    grouped = q.unflatten(1, (k.shape[1], -1))  # [m, g, h / g, s]
    return torch.einsum("mghs,ngs->ghmn", grouped * scale, k).flatten(0, 1)


def attention_logits(
    scores: Float[Tensor, "h m n"], *, softcap: float = 0.0, window: int | None = None, alibi: Alibi | None = None
) -> Float[Tensor, "h m n"]:
    """Return what the softmax reads of scores of the last `m` of `n` positions, -inf where a query sees no key."""
    m, n = scores.shape[1:]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi is not None:
        distance = torch.arange(n - m, n, device=scores.device)[:, None] - torch.arange(n, device=scores.device)
        slopes = torch.tensor(alibi.slopes, dtype=scores.dtype).to(scores.device)
        scores = torch.addcmul(scores, slopes[:, None, None], distance.to(scores), value=-1)
    hidden = torch.ones(m, n, dtype=torch.bool, device=scores.device).triu(n - m + 1)
    if window is not None:
        hidden = hidden | torch.ones_like(hidden).tril(n - m - window)
    return scores.masked_fill(hidden, -torch.inf)


class Recurrence(NamedTuple):
    """The frozen quantities of a linear recurrence over `n` positions, in float32 at least.

    The state of a head is a matrix `[s, c]`, keys by values. At each position it decays; the delta rule removes what
    the state holds under the position's key; the value is written under the key; the query reads the output:

        S ← exp(log_decay) S        S ← S + k write (v - kᵀ S)  or  S + k write v        o = qᵀ S + skip v

    RWKV-6 (arXiv 2404.05892) reads before all that, `o = qᵀ S + skip v`. RWKV-7 (arXiv 2503.14456) removes under keys
    of its own, `S ← exp(log_decay) S - put (takeᵀ S) + k v`, from the state before it decays.

    The delta rule is Yang et al., arXiv 2412.06464 (one decay a head) and arXiv 2510.26692 (one a key channel); without
    removal it is the state space of Mamba-2, Dao and Gu, arXiv 2405.21060, with `q`, `k`, `write` its C, B and Δ.

    Attributes:
        q, k: queries and keys of each value head.
        log_decay: `[n, h, s]`, or `[n, h, 1]`, at most 0.
        write: write strengths.
        removes: whether writing follows the delta rule.
        skip: factor of the position's own value in its output, or None.
        before: whether queries read the state before the position changes it.
        take, put: keys under which is read what is removed, and under which it is; or None.
    """

    q: Float[Tensor, "n h s"]
    k: Float[Tensor, "n h s"]
    log_decay: Float[Tensor, "n h _"]
    write: Float[Tensor, "n h"]
    removes: bool
    skip: Float[Tensor, "n h"] | None = None
    before: bool = False
    take: Float[Tensor, "n h s"] | None = None
    put: Float[Tensor, "n h s"] | None = None

    def run(
        self, v: Float[Tensor, "n h c"], state: Float[Tensor, "h s c"]
    ) -> tuple[Float[Tensor, "n h c"], Float[Tensor, "h s c"]]:
        """Return the outputs for values `v` after a state, and the state after them."""
        decay, outputs = self.log_decay.exp()[..., None], []
        for t, value in enumerate(v):
            if self.before:
                outputs.append((self.q[t][:, None] @ state)[:, 0])
            decayed = decay[t] * state
            if self.take is not None and self.put is not None:
                decayed = decayed - self.put[t][:, :, None] * (self.take[t][:, None] @ state)
            state = decayed
            if self.removes:
                value = value - (self.k[t][:, None] @ state)[:, 0]  # [h, c]
            state = state + self.k[t][:, :, None] * (self.write[t][:, None] * value)[:, None]
            if not self.before:
                outputs.append((self.q[t][:, None] @ state)[:, 0])
        o = torch.stack(outputs)
        return o if self.skip is None else o + self.skip[..., None] * v, state


def recurrent_pattern(recurrence: Recurrence) -> Float[Tensor, "h n n"]:
    """Return the pattern of a recurrence: its outputs for the identity in place of the values."""
    n, h, s = recurrence.k.shape
    k = recurrence.k
    basis = torch.eye(n, dtype=k.dtype, device=k.device)[:, None].expand(n, h, n)
    return recurrence.run(basis, k.new_zeros(h, s, n))[0].permute(1, 0, 2)


class ScanTape(NamedTuple):
    """A recurrence over long prompts in chunks of `c` positions: patterns inside of each, and a state between them.

    It takes the place of a pattern `[h, n, n]` that would be larger. The positions after the last one, up to a whole
    chunk, are zeros.

    Attributes:
        within: outputs of a chunk from its own values.
        reading: outputs from the state before the chunk.
        writing: the state after the chunk from its values.
        moving: the state after the chunk from the state before it.
    """

    within: Float[Tensor, "h b c c"]
    reading: Float[Tensor, "h b c s"]
    writing: Float[Tensor, "h b s c"]
    moving: Float[Tensor, "h b s s"]

    def at(self, positions: int) -> "ScanTape":
        """Return the tape of the chunks up to some number of positions."""
        chunks = -(-positions // self.within.shape[2])
        return ScanTape(*(part[:, :chunks] for part in self))


class ChannelTape(NamedTuple):
    """A recurrence in each channel of the values, in float32 at least: the arguments of `ggjac.linop.ChannelScan`."""

    step: Float[Tensor, "n c"]
    rate: Float[Tensor, "c s"]
    key: Float[Tensor, "n s"]
    query: Float[Tensor, "n s"]
    skip: Float[Tensor, " c"]

    def at(self, positions: int) -> "ChannelTape":
        """Return the tape of the first positions."""
        return self._replace(step=self.step[:positions], key=self.key[:positions], query=self.query[:positions])

    def operator(self, m: int) -> ChannelScan:
        """Return the recurrence as an operator that writes the last `m` positions."""
        return ChannelScan(*self, m)


def recurrent_scan(recurrence: Recurrence, chunk: int) -> ScanTape:
    """Return a recurrence in chunks: all of them at once, with the identity in place of the values and of the state."""
    n, h, s = recurrence.k.shape
    chunks = -(-n // chunk)

    def cut(part: Float[Tensor, "n h *rest"]) -> Float[Tensor, "c hb *rest"]:
        padded = torch.cat([part, part.new_zeros(chunks * chunk - n, *part.shape[1:])])
        return padded.unflatten(0, (chunks, chunk)).movedim(0, 2).flatten(1, 2)  # [c, h b, ...]

    cuts = {name: cut(part) for name, part in recurrence._asdict().items() if isinstance(part, Tensor)}
    k = recurrence.k
    both = torch.eye(chunk + s, dtype=k.dtype, device=k.device)  # columns: the chunk's values, then the state
    values = both[:chunk, None].expand(chunk, h * chunks, chunk + s)
    state = both[chunk:].expand(h * chunks, s, chunk + s)
    o, state = recurrence._replace(**cuts).run(values, state)  # type: ignore[arg-type]
    o, state = o.movedim(0, 1).unflatten(0, (h, chunks)), state.unflatten(0, (h, chunks))
    return ScanTape(o[..., :chunk], o[..., chunk:], state[..., :chunk], state[..., chunk:])
