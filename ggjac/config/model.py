"""Sizes and constants of a model: data, as read and checked by `ggjac.config.read`."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from ggjac.architectures import Architecture
from ggjac.config.keys import ConfigError
from ggjac.sizes import KINDS, Kind


@dataclass(frozen=True)
class Rope:
    """One rotary position embedding; see `ggjac.rope`.

    Attributes:
        dimensions: number of leading dims of each head that rotate.
        base: of the geometric series of frequencies.
        pairs: as in `Architecture.rope_pairs`.
        factor: of context extension, F; positions are scaled by 1/F (everywhere, or where YaRN interpolates).
        yarn: interpolate only low frequencies.
        beta_fast, beta_slow: numbers of turns within the original context between which YaRN blends.
        original_context: context length in tokens before its extension.
        magnitude: multiplies cos and sin.
        still: pairs that do not rotate.
        factored: the file's `rope_freqs` apply.
        rounded: round angles as llama.cpp does; for parity.
    """

    dimensions: int
    base: float
    pairs: str
    factor: float = 1.0
    yarn: bool = False
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_context: int = 0
    magnitude: float = 1.0
    still: tuple[int, ...] = ()
    factored: bool = True
    rounded: bool = False


@dataclass(frozen=True)
class Latent:
    """Sizes of latent attention, where keys and values are expanded from one short vector; zeros without.

    Attributes:
        size: elements of the latent vector.
        queries: elements of the latent vector that queries are expanded from; 0 if they come from the stream.
        rotary: last elements of a query or key, which rotate; those of a key are the same for all heads.
        split: whether keys and values have tensors of their own (`attn_k_b`, `attn_v_b`), and not one for both
            (`attn_kv_b`).
    """

    size: int = 0
    queries: int = 0
    rotary: int = 0
    split: bool = False


@dataclass(frozen=True)
class Compressed:
    """Sizes of attention to single tokens within a window and to compressed groups of all; zeros for other attention.

    Attributes:
        ratio: number of tokens in a group; 0 without groups.
        windows: number of groups that each compressed key is made of: its own, and those before it.
        groups: of heads, each of which has an output projection of its own.
        rank: elements that this projection yields.
    """

    ratio: int = 0
    windows: int = 1
    groups: int = 0
    rank: int = 0


@dataclass(frozen=True)
class Alibi:
    """Linear biases on the scores of attention (ALiBi, arXiv 2108.12409): by head, a slope times minus the distance.

    Attributes:
        bias: the largest power of two that a slope is below one.
        total: number of heads of the block.
        heads: those whose scores are computed.
    """

    bias: float
    total: int
    heads: range

    @property
    def slopes(self) -> list[float]:
        """The slope of each head, as in ggml's softmax: two geometric series if the total is not a power of two."""
        power = 1 << (self.total.bit_length() - 1)
        exponents = (head + 1 if head < power else head - power + 0.5 for head in self.heads)
        return [2 ** (-self.bias * exponent / power) for exponent in exponents]


@dataclass(frozen=True)
class Layer:
    """The properties that may differ from block to block.

    Attributes:
        mixers: kinds of the block's token mixers, which are added; none if the block has no such branch. See
            `ggjac.config.mixers.MIXERS`.
        heads: number of query heads; 0 without attention, as the next three.
        kv_heads: number of key/value heads; divides `heads`.
        key_size: elements of a query or key head.
        value_size: elements of a value head.
        hidden_units: of the dense feed-forward network; 0 if the block has none.
        routed: whether the block has a mixture of experts.
        clamps: largest gate, before its activation or after it, and largest magnitude of what it multiplies, in routed
            experts and in other networks; 0 for no limit.
        experts_used: number of routed experts that each token uses; 0 without a mixture, as the next one.
        expert_units: hidden units of a routed expert.
        gate: numbers for each head in a gate on what it reads (`attn_gate`): 1, or as many as a value has; 0 for none.
        keys_as_values: whether the key projection, before its norm and rotation, gives the values too.
        factor: constant factor of the stream after the block.
        sparsity: standard deviations by which gates exceed the mean of all hidden units where they are activated; 0
            where all are.
        source: number of the earlier block whose keys and values attention reads; None for its own.
        attention_scale: multiplies scores.
        latent: sizes of latent attention.
        compressed: sizes of attention to compressed groups of tokens.
        token_experts: whether a table chooses the experts of each token.
        by_key_head: whether all projections of a delta rule are in one tensor, `ssm_in`, key head by key head.
        window: number of tokens to which a position attends, itself included; None for all up to it.
        rope: rotation of queries and keys; None for none.
        alibi: linear biases on scores; None for none.
        xielu: αn, αp and β of the activation xIELU (arXiv 2411.13010), `β z + αp z²` for positive z and
            `β z + αn (exp(z) - 1 - z)` otherwise; None for other activations.
    """

    mixers: tuple[str, ...]
    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    hidden_units: int
    routed: bool
    window: int | None
    rope: Rope | None
    alibi: Alibi | None = None
    xielu: tuple[float, float, float] | None = None
    clamps: tuple[float, float] = (0.0, 0.0)
    experts_used: int = 0
    expert_units: int = 0
    gate: int = 0
    keys_as_values: bool = False
    source: int | None = None
    factor: float = 1.0
    sparsity: float = 0.0
    by_key_head: bool = False
    attention_scale: float = 1.0
    latent: Latent = Latent()
    compressed: Compressed = Compressed()
    token_experts: bool = False

    @property
    def taps(self) -> tuple[Kind, ...]:
        """The taps that the block has: the stream after it, and what each of its branches adds."""
        feeds = self.routed or self.hidden_units > 0
        present = {"layer": True, "attn": bool(self.mixers), "mlp": feeds}
        return tuple(kind for kind in KINDS if present[kind])

    @property
    def idle(self) -> bool:
        """Whether the block does nothing."""
        return self.taps == ("layer",)

    def remembered(self, n: int) -> int:
        """Return how many groups of `n` tokens a compressed memory has keys of."""
        return n // self.compressed.ratio if self.compressed.ratio else 0

    def clamp(self, kind: str) -> float:
        """Return the limit in networks of a kind, the suffix of their tensors' names."""
        return self.clamps[0 if kind == "_exps" else 1]


@dataclass(frozen=True)
class RecurrentSizes:
    """Sizes of the recurrent mixers of a model, or of its convolutions.

    Attributes:
        taps: positions that a convolution in time reads.
        heads: number of value heads, each with a state of its own; 0 for a convolution alone, as the next three.
        key_heads: number of key heads; divides `heads`.
        key_size: elements of a key, and rows of a state.
        value_size: elements of a value, and columns of a state.
        shifted: width of what a token shift reads of the position before, in place of a convolution; 0 without.
        rank: elements of the vector that steps are expanded from, where steps, keys and queries are made from the
            values; 0 where they come from the stream.
        normed: whether those three are normed without a weight.
        ranks: elements of the vectors that RWKV makes decays, gates and so on from, by name.
    """

    taps: int = 0
    heads: int = 0
    key_heads: int = 0
    key_size: int = 0
    value_size: int = 0
    rank: int = 0
    normed: bool = False
    shifted: int = 0
    ranks: tuple[tuple[str, int], ...] = ()

    @property
    def convolved(self) -> int:
        """Channels of which earlier positions are read: of values, keys and queries, or of a mixer's input."""
        return self.shifted or self.heads * self.value_size + (0 if self.rank else 2 * self.key_heads * self.key_size)


@dataclass(frozen=True)
class Streams:
    """Sizes and constants of several residual streams; `count` and `period` are 0 for one.

    Attributes:
        count: number of streams.
        epsilon: added to weights; 0 where they are 0 and 1.
        magnitude: largest weight by which a stream takes up what a branch adds, but for `epsilon`.
        rounds: of Sinkhorn's iteration on the weights by which streams are mixed; 0 if each stays as it is.
        period: of blocks before which the stream is put away and begins anew, in place of `count`; 0 for never.
    """

    count: int = 0
    epsilon: float = 0.0
    magnitude: float = 2.0
    rounds: int = 0
    period: int = 0

    @property
    def several(self) -> bool:
        """Whether there are several streams."""
        return self.count > 0 or self.period > 0

    def after(self, depth: int) -> int:
        """Return the number of streams after `depth` blocks; before the first block there is one."""
        if self.period:
            return 1 + math.ceil(depth / self.period)
        return self.count if depth and self.count else 1


@dataclass(frozen=True)
class Adjugates:
    """Sizes of a second mixture, through which goes what the first one yields; zeros without.

    Attributes:
        group: number of the first one's experts for each of its own.
        units: hidden units of an expert.
        scale: multiplies what it adds.
    """

    group: int = 0
    units: int = 0
    scale: float = 0.0


class Mixture(NamedTuple):
    """The routed experts of a block, of one kind.

    Attributes:
        kind: suffix of their tensors' names.
        total: number of experts.
        used: number of experts that each token uses.
        units: hidden units of an expert.
        times: of those that a token uses, how many may be the same.
    """

    kind: str
    total: int
    used: int
    units: int
    times: int = 1


@dataclass(frozen=True)
class Indexer:
    """Sizes of what selects the keys that a query attends to; zeros if it attends to all.

    Attributes:
        heads: number of heads.
        key_size: elements of a query or key.
        selected: number of keys that are selected; of keys of groups, the most tokens of which none is left out.
        pool: number of consecutive keys that are selected together; 0 if each is selected alone.
    """

    heads: int = 0
    key_size: int = 0
    selected: int = 0
    pool: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a model, validated against its tensors.

    Attributes:
        architecture: `general.architecture`.
        embedding: name of the tensor with the embeddings.
        row: its entry in `ARCHITECTURES`, with file-dependent options resolved.
        block_count: number of blocks, L, without those that predict later tokens; those that are applied several times
            count as often.
        order: number of each block in the file.
        turn: number of blocks in a pass: those of a stack, or all of the file's blocks.
        layers: properties of each block.
        d: embedding length.
        vocabulary: rows of the embedding matrix.
        context_length: largest number of tokens that the model supports.
        original_context: number of tokens beyond which long rope factors apply.
        recurrence: sizes of mixers other than attention; zeros if there are none.
        norm_epsilon: added to the mean square or the variance inside a norm's root.
        attention_clamp: largest magnitude of queries, keys and values; 0 for no limit.
        attention_softcap, logit_softcap: `c tanh(z / c)` on scores, on logits; 0 for none.
        temperature_scale: growth of queries with position; 0 for none.
        temperature_length: number of positions after which they first grow.
        embedding_scale, residual_scale, logit_scale: multiply embeddings, branches and logits.
        skip_scale: multiplies what goes past a branch, if that is not the stream; see `Architecture.normed_skip`.
        value_scale: multiplies what attention adds.
        expert_count: number of routed experts in a mixture; 0 for a dense model.
        expert_groups, expert_groups_used: number of groups of experts, and of those that a token's experts come from;
            1 and 1 without groups.
        expert_weights_scale: multiplies the weights of routed experts.
        expert_shared_feed_forward_length: hidden units of the shared expert.
        expert_latent: width of what routed experts read and write; 0 if it is that of the stream.
        adjugates: of a second mixture after each.
        inputs: width of the inputs that each block has of its own; 0 for none.
        decay_bound: lower bound of the logarithm of decays; 0 for none.
        indexer: of attention to selected keys.
        loop_norm: whether the norm before the head is applied between the passes over all blocks.
        streams: of several residual streams.
        situ: β and λ of the activation SiTU, `β tanh(gate / β) sigmoid(gate) * λ tanh(up / λ)`; λ is 0 where the second
            factor is `up` itself. Zeros for other activations.
    """

    architecture: str
    embedding: str
    row: Architecture
    block_count: int
    order: tuple[int, ...]
    turn: int
    layers: tuple[Layer, ...]
    d: int
    vocabulary: int
    context_length: int
    original_context: int
    recurrence: RecurrentSizes
    norm_epsilon: float
    attention_clamp: float
    attention_softcap: float
    logit_softcap: float
    temperature_scale: float
    temperature_length: int
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    expert_count: int
    expert_groups: int
    expert_groups_used: int
    expert_weights_scale: float
    expert_shared_feed_forward_length: int
    expert_latent: int = 0
    adjugates: Adjugates = Adjugates()
    inputs: int = 0
    decay_bound: float = 0.0
    indexer: Indexer = Indexer()
    streams: Streams = Streams()
    situ: tuple[float, float] = (0.0, 0.0)
    value_scale: float = 1.0
    skip_scale: float = 1.0
    loop_norm: bool = False

    def prefix(self, layer: int) -> str:
        """Return the prefix of the names of a block's tensors."""
        return f"blk.{self.order[layer]}."

    def normed_entry(self, layer: int) -> bool:
        """Return whether the norm before the head is applied to the input of a block."""
        return self.loop_norm and layer > 0 and layer % self.turn == 0

    def turns(self, layer: int) -> bool:
        """Return whether a pass begins with a block, in which one of two streams is held."""
        return self.row.streams == "held" and layer % self.turn == 0

    @property
    def one_runs(self) -> bool:
        """Whether branches write the first of several residual streams alone, the only one that llama.cpp names."""
        return self.row.streams in ("over depth", "held", "input")

    def opens(self, layer: int) -> bool:
        """Return whether further streams are made by matrices before a block."""
        return self.row.streams == "predicted" and layer == 0

    def width(self, depth: int) -> int:
        """Return the elements of all residual streams after `depth` blocks; before the first block there is one."""
        return self.d * self.streams.after(depth)

    @property
    def widest(self) -> int:
        """Elements of all residual streams where there are most."""
        return self.width(self.block_count)

    @property
    def reads(self) -> int:
        """Number of vectors with which the head reads the embedding and what branches add, past all later branches.

        They differ only where not all of the stream goes past a branch, or goes past it in several streams, and where
        the final norm is applied between passes.
        """
        if self.row.normed_skip or self.row.streams:
            return 2 * self.block_count + 1
        return 1 + sum(map(self.normed_entry, range(self.block_count)))

    @property
    def attention_factor(self) -> float:
        """Constant factor of what attention, or what stands in its place, adds to the stream."""
        return self.residual_scale * self.value_scale

    @property
    def longest(self) -> int:
        """Largest number of tokens that can be run: an indexer, or chunks, would leave some out in longer prompts."""
        first_chunk = self.row.window - 1 if self.row.chunked else self.context_length
        return min(self.context_length, self.indexer.selected or self.context_length, first_chunk)

    def with_context(self, context: int | None) -> "ModelConfig":
        """Return this model with another context, as llama.cpp allocates one; None leaves its own.

        Raises:
            ConfigError: the model has no positions for it.
        """
        if context is None:
            return self
        if self.row.positions and context > self.context_length:
            raise ConfigError(
                f"a context of {context} is not possible: this model has learned positions, for {self.context_length} "
                "tokens; shorten the prompt"
            )
        return replace(self, context_length=context)

    def mixtures(self, own: Layer) -> list[Mixture]:
        """Return the routed experts of each mixture that a block has, in turn."""
        more = self.adjugates
        if not own.routed:
            return []
        found = [Mixture("_exps", self.expert_count, own.experts_used, own.expert_units)]
        if more.group:
            total, used = self.expert_count // more.group, own.experts_used
            found.append(Mixture("_chexps", total, used, more.units, times=min(more.group, used)))
        return found

    @property
    def writers(self) -> set[int]:
        """Blocks whose keys and values later blocks read."""
        return {layer.source for layer in self.layers if layer.source is not None}

    def bank(self, layer: int) -> int | None:
        """Return the block whose values the attention of a block reads, if several blocks read them; or None."""
        return layer if layer in self.writers else self.layers[layer].source

    @property
    def hidden_units(self) -> int:
        """Hidden units of the widest feed-forward network, or expert of a mixture."""
        own = (max(layer.hidden_units, layer.expert_units) for layer in self.layers)
        return max(self.expert_shared_feed_forward_length, self.adjugates.units, *own)
