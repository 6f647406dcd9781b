"""A transformer block at one prompt: what is frozen (a tape) and the linear operator it leaves.

Each sublayer kind is a tape, a recorder and an operator:

    attn  = Linear(attn_output) @ Mix(pattern) @ Linear(attn_v) @ Scale(norm)
    ffn   = Linear(ffn_down) @ Scale(gate) @ Linear(ffn_up) @ Scale(norm)
    block = (I + ffn) @ (I + attn)

Queries, keys and their rotation act through the frozen attention pattern only; the norm enters as a frozen diagonal.
The freezing rule is that of Golden, arXiv 2505.24293, section 2.3 (its code: norms by position, whole attention
probabilities, and for the MLP one of two conventions, see `record_ffn`). The ordinary forward pass is these operators
applied to their own input. Tensors keep GGUF's names, without the `blk.N.` prefix.
"""

from typing import Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac.config import ModelConfig
from ggjac.linop import Identity, Linear, LinearOperator, Mix, Scale, Select, TiledMatrix
from ggjac.rope import rotate

MlpPath = Literal["up", "gate"]


class BlockWeights(Protocol):
    """The tensors of one block by their short names, such as `attn_q.weight`."""

    def __contains__(self, name: str) -> bool:
        """Say whether the file has the tensor."""

    def matrix(self, name: str) -> TiledMatrix:
        """Return a matrix to be streamed."""

    def vector(self, name: str) -> Tensor:
        """Return a small tensor, dense."""


class AttentionTape(NamedTuple):
    """Frozen at the prompt: the norm's diagonal, and how positions attend to each other."""

    norm: Float[Tensor, "n d"]
    pattern: Float[Tensor, "h n n"]


class FFNTape(NamedTuple):
    """Frozen at the prompt: the norm's diagonal, and the factor on each hidden unit."""

    norm: Float[Tensor, "n d"]
    gate: Float[Tensor, "n f"]


class BlockTape(NamedTuple):
    """Everything frozen in one block."""

    attn: AttentionTape
    ffn: FFNTape


class Frame(NamedTuple):
    """What every block shares at one prompt: the model's sizes, the rotation of each position, the freezing rule."""

    config: ModelConfig
    cos: Float[Tensor, "n p"]
    sin: Float[Tensor, "n p"]
    mlp_path: MlpPath


def record_attention(w: BlockWeights, frame: Frame, layer: int, x: Float[Tensor, "n d"]) -> AttentionTape:
    """Compute what attention freezes at the residual stream `x`: the norm scale and the attention pattern."""
    config = frame.config
    norm = rms_diagonal(x, w.vector("attn_norm.weight"), config.norm_epsilon)
    q = _project(w, "attn_q", x * norm).unflatten(1, (config.head_count[layer], config.key_length))
    k = _project(w, "attn_k", x * norm).unflatten(1, (config.head_count_kv[layer], config.key_length))
    q, k = (rotate(part, config.rope, frame.cos, frame.sin) for part in (q, k))
    return AttentionTape(norm, attention_pattern(q, k, config.key_length**-0.5))


def attention(w: BlockWeights, config: ModelConfig, layer: int, tape: AttentionTape) -> LinearOperator:
    """Return the attention branch, `[n, d]` to `[m, d]` for a pattern with `m` query and `n` key positions."""
    _, m, n = tape.pattern.shape
    mix = Mix(tape.pattern, config.head_count_kv[layer], config.value_length)
    return _linear(w, "attn_output", m) @ mix @ _linear(w, "attn_v", n) @ Scale(tape.norm)


def record_ffn(w: BlockWeights, frame: Frame, x: Float[Tensor, "n d"]) -> FFNTape:
    """Compute what the gated feed-forward `down(silu(gate) * up)` freezes at the residual stream `x`.

    With `mlp_path="up"` the whole activated gate is frozen and `up` stays live (the paper's code for five families).
    With `"gate"`, `up` and the sigmoid inside silu are frozen and `gate` stays live (its Phi code). Both reproduce the
    output; their operators differ.
    """
    norm = rms_diagonal(x, w.vector("ffn_norm.weight"), frame.config.norm_epsilon)
    gate = _project(w, "ffn_gate", x * norm)
    if frame.mlp_path == "up":
        return FFNTape(norm, torch.nn.functional.silu(gate))
    return FFNTape(norm, gate.sigmoid() * _project(w, "ffn_up", x * norm))


def ffn(w: BlockWeights, mlp_path: MlpPath, tape: FFNTape) -> LinearOperator:
    """Return the feed-forward branch, `[n, d]` to `[n, d]`."""
    n = len(tape.gate)
    return _linear(w, "ffn_down", n) @ Scale(tape.gate) @ _linear(w, f"ffn_{mlp_path}", n) @ Scale(tape.norm)


def block(w: BlockWeights, frame: Frame, layer: int, tape: BlockTape, positions: range) -> LinearOperator:
    """Return a whole frozen block from the positions up to the last one of `positions` to `positions`.

    Positions after the last one are left out, since attention is causal; a narrower `positions` (the last block needs
    only one) restricts everything but keys and values to them.
    """
    n, d = positions.stop, frame.config.d
    queries = slice(positions.start, positions.stop)
    attn_tape = AttentionTape(tape.attn.norm[:n], tape.attn.pattern[:, queries, :n])
    ffn_tape = FFNTape(tape.ffn.norm[queries], tape.ffn.gate[queries])
    attn = attention(w, frame.config, layer, attn_tape)
    feed_forward = ffn(w, frame.mlp_path, ffn_tape)

    kept = Select(torch.tensor(positions), n, d, dtype=attn.dtype, device=attn.device)
    identity = Identity((len(positions), d), dtype=attn.dtype, device=attn.device)
    residual = identity if len(positions) == n else kept
    return (identity + feed_forward) @ (residual + attn)


def rms_diagonal(x: Float[Tensor, "n d"], weight: Float[Tensor, " d"], epsilon: float) -> Float[Tensor, "n d"]:
    """Return RMSNorm at `x` as a diagonal: `weight / sqrt(mean(x²) + epsilon)`, squares summed in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (scale * weight.to(wide)).to(x.dtype)


def attention_pattern(q: Float[Tensor, "n h s"], k: Float[Tensor, "n g s"], scale: float) -> Float[Tensor, "h n n"]:
    """Return causal attention probabilities; softmax in float32 at least. `h` query heads share `g` key heads."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("mghs,ngs->ghmn", grouped, k).to(wide).flatten(0, 1) * scale
    future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1).to(q.dtype)


def _linear(w: BlockWeights, name: str, n: int) -> Linear:
    """Return a projection with its bias, where the file has one."""
    bias = w.vector(f"{name}.bias") if f"{name}.bias" in w else None
    return Linear(w.matrix(f"{name}.weight"), n, bias)


def _project(w: BlockWeights, name: str, x: Float[Tensor, "n d"]) -> Float[Tensor, "n out"]:
    """Apply a projection, bias included, to one `[n, d]` tensor."""
    return _linear(w, name, len(x)).matmat(x[None], x.new_ones(1))[0]
