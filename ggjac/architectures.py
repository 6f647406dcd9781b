"""What a model file does not say about itself: one row per family, nothing else.

A family is what `general.architecture` names; rows state facts of llama.cpp's graphs (src/models/*.cpp).
`ggjac.config` reads sizes and options from a file and completes them with its row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Norms:
    """Names of the norms before and after a block's two branches; of several, the first present in the file is used.

    Where a block has both a dense network and a mixture, `ffn_in` and `dense_out` are around the dense network,
    `experts_in` and `experts_out` around the mixture, and `ffn_out` is after their sum. Without `experts_in`, both read
    what `ffn_in` yields.
    """

    attention_in: tuple[str, ...] = ("attn_norm",)
    attention_out: tuple[str, ...] = ()
    ffn_in: tuple[str, ...] = ("ffn_norm",)
    ffn_out: tuple[str, ...] = ()
    dense_out: tuple[str, ...] = ()
    experts_in: tuple[str, ...] = ()
    experts_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graph:
    """Names that llama.cpp's graph gives to what ggjac compares with it; of several, the first present in each block.

    A branch cannot be compared where the graph has none of its names. Names that the graph also gives to something else
    come last, or not at all.

    Attributes:
        attention: what attention, or what stands in its place, yields before any post-norm and scale.
        ffn: what the feed-forward yields before any post-norm and scale.
        stream: the residual stream after the block.
        next_input: the first of these names is of the stream before a block, the second of that after the last block.
        control_vector: the graph adds a control vector to the stream after a block.
    """

    attention: tuple[str, ...] = ("attn_out",)
    ffn: tuple[str, ...] = ("ffn_out",)
    stream: tuple[str, ...] = ("l_out",)
    next_input: bool = False
    control_vector: bool = True


@dataclass(frozen=True)
class Export:
    """How a family's files may differ from those that llama.cpp reads.

    Ollama's exports of Qwen 3.5 and 3.6 have the vision and prediction tensors of the model in the same file, and write
    some keys and names in another way (ggml-org/llama.cpp, pull requests 22954, 23700 and 25334).

    Attributes:
        dropped: prefixes of the names of tensors that are not part of the model.
        renamed: names in a block, after its number, and llama.cpp's for them.
        padded: arrays below the architecture's prefix that may be too short, and their length with zeros at the end.
        largest: arrays that have zeros for blocks without attention, where llama.cpp expects one number.
    """

    dropped: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    padded: Mapping[str, int] = field(default_factory=dict)
    largest: tuple[str, ...] = ()

    def name(self, stored: str) -> str:
        """Return llama.cpp's name of a tensor."""
        block, number, rest = [*stored.split(".", 2), "", ""][:3]
        return f"{block}.{number}.{self.renamed[rest]}" if block == "blk" and rest in self.renamed else stored


@dataclass(frozen=True)
class Architecture:
    """What the files of a family do not say about themselves.

    "The file's `key`" below is metadata under the prefix of `general.architecture`.

    Attributes:
        norm: `"rms"` (weight / root mean square) or `"layer"` (centred, with an optional bias).
        norm_weights: norms have weights; without, they have no tensors.
        norm_bias: RMSNorms may have biases too.
        norm_by_epsilon: files that state RMSNorm's epsilon have RMSNorms.
        epsilon_read: the norms' epsilon is the file's; otherwise it is 0 (llama.cpp does not read it).
        epsilon_optional: files may state LayerNorm's epsilon in place of RMSNorm's.
        output_norm: stem of the norm before the head.
        norms: their names, before and after each branch.
        bare_names: stems of norms whose tensors' names lack the suffix `.weight`, and of biases that lack `.bias`.
        mixer: kind of the softmax attention, of `ggjac.config.mixers.MIXERS`.
        recurrent: kind of the mixer in blocks without attention, of the same table, or `""` for none.
        recurrent_blocks: which blocks those are: `"all"`; `"no kv heads"` (0 in `attention.head_count_kv`);
            `"interval"` (`attention.recurrent_layers`, or all but the last of every `full_attention_interval`);
            `"beside"` (every block has both mixers, added); or `""` for none.
        recurrent_period: default of that interval.
        pruned: a block without heads has no mixer, and one without hidden units does nothing, whatever else it has.
        inner_norms: attention and feed-forward have a norm before their output projection.
        one_branch: a block with a feed-forward (`feed_forward_length` above 0) has no mixer.
        key_heads_tiled: of `h` value heads, head `i` uses key head `i % g` in place of `i // (h // g)`.
        head_norm: whether RWKV norms each head (LayerNorm): `"required"`, `"optional"`, or `""` for never.
        first_values: blocks after the first add a share of its values to their own.
        made_from_values: where steps ("dt"), keys ("b") and queries ("c") of a state space are made from its values, as
            Mamba-1 does, in which order; `()` where they come from the stream.
        normed_steps: those three have norms with weights.
        state_norm_optional: the outputs of a state space may lack their norm.
        sigmoid_gate: the gate on a recurrence's output is a sigmoid in place of a SiLU.
        low_rank_gates: what is projected in two steps in Kimi's delta rule: decays and the gate on the output
            (`"both"`), the `"decays"` alone (then the gate is `ssm_g`), or `""` for neither.
        bounded_decay: the logarithms of decays have a lower bound, the file's `kda.gate_lower_bound`: `"required"`
            (`ssm_a` is positive then), `"optional"` (it is negative with or without a bound), or `""` for never.
        key_epsilon: what the delta rule's queries and keys add inside the root of their length; 0 for the norms'
            epsilon.
        gated_queries: `attn_q` has a gate after each head's query: its sigmoid multiplies what the head reads.
        gated_heads: a gate from `attn_gate` multiplies what each head reads: a number for each of the `"heads"`, or
            for each of their `"elements"`; one of these, as the tensor's shape says (`"either"`); a number for each
            head in blocks that have the tensor (`"optional"`); or `""` for none.
        softplus_gate: that gate is a softplus in place of a sigmoid.
        latent_queries: whether queries of latent attention are expanded from a latent vector, as keys and values are:
            `"required"`, `"optional"` (if the file states its size, `attention.q_lora_rank`), or `""` for never.
        direct_queries: blocks and vocabulary of the variants whose queries are not, whatever the file states (llama.cpp
            identifies them so); a vocabulary of 0 stands for any.
        latent_split: whether keys and values are expanded by tensors of their own: `"required"`, `"optional"` (if the
            file states `attention.key_length_mla` and `attention.value_length_mla`), or `""` for never.
        mscale: the first of DeepSeek's two multipliers of YaRN (`ggjac.config.rotations.stretching`), which the file
            does not state: `"equal"` to the second, if that is not 0; `"one"`; or `"alone"` (it is 1 and the second 0,
            whatever the file states); `""` where there are none.
        indexer: prompts may be so long that attention selects keys: one by one (`"keys"`), likewise if the file states
            how many (`"optional keys"`), in blocks (`"blocks"`), in pools of consecutive keys beside those of the last
            pool, which is incomplete (`"pools"`), of a compressed memory (`"memory"`), or `""` for never. Such prompts
            are not supported.
        normed_rotary: the part of latent attention's keys that rotates is normed before (`attn_k_norm`).
        value_norm: the values of each head are normed (RMSNorm without weight).
        shared_keys: the file's last `attention.shared_kv_layers` blocks read keys and values of an earlier block.
        shared_from: the first block that does so, whatever the file states; 0 for none.
        inputs: blocks may have inputs of their own (`embedding_length_per_layer_input`), made from the tokens.
        inputs_width: their width, whatever the file states: all blocks have them; 0 where the file decides.
        laurel: rank of a matrix, with a norm of its own, that is added beside attention to what both read; 0 for none.
        keys_as_values: where a block lacks `attn_v`, its key projection gives the values too.
        parallel: both branches read the block's input, and are added to it together.
        parallel_key: the file's `use_parallel_residual`, which is then required, overrides `parallel`.
        parallel_unless_normed: parallel only in files without a tensor of the first name in `norms.ffn_in`.
        rope_pairs: which dims of a head rotate together: `"adjacent"` (2i and 2i+1; llama.cpp's NORM), `"halves"`
            (i and i + rotary/2; NEOX), or `""` for none.
        partial_rotary: the file's `rope.dimension_count` may be smaller than the head; llama.cpp cannot run other
            families so.
        rope_sections: an image's axes rotate in sections of each head (`rope.dimension_sections`), `"interleaved"` or
            `"consecutive"`; `"optional"` (in files that have them, consecutive, and of pairs of halves) or `""` for
            none. See `ggjac.config.Rope.still`.
        rope_alpha: the file's `rope.scaling.alpha`, if present, enlarges the base.
        rope_keys: what is read from the file: `"all"`; `"base"` alone (whole heads rotate, without scaling) or `""`
            (likewise, and the base is 10000).
        rope_optional: `rope.scaling.finetuned = false` turns rotation off.
        rope_layers: layers that rotate: `"all"`, `"windowed"` (only those with a sliding window, if the model has any),
            `"windowed or dense"` (those, and the first `leading_dense_block_count`), `"three of four"` (all but every
            fourth), `"not first of four"` (all but the first of every four, if the model has windows, and unless it
            has four layers) or `"listed"` (those in the file's `attention.rope_pattern`, if present).
        rope_factors: layers to which `rope_freqs` apply: `"all"`, `"full"` (those without a window), `"required"`
            (likewise, and files must have them) or `""` for none.
        halved_rotary: layers without a window rotate half of the file's `rope.dimension_count`.
        yarn_keys: YaRN's betas and log multiplier are read from the file (`"all"`), or the betas alone (`"betas"`);
            llama.cpp ignores them in other families (`""`).
        beta_fast: the first of the betas, if the file does not state it.
        windowed: whether some layers attend through a sliding window: `"optional"` (if the file states its size),
            `"required"`, `"all"` (required, and all layers do), or `""` for never.
        window_blocks: block count of the only variant with windows (llama.cpp identifies it so); 0 for all variants.
        window: default size in tokens.
        window_fixed: the size is the default, whatever the file states.
        window_period: default period; the last layer of each period attends to all earlier tokens.
        full_first: the first layer of each period does so in place of the last.
        chunked: a window is a chunk: positions attend to those of their own, and queries grow from chunk to chunk.
            Prompts that go beyond the first chunk are not supported.
        windowed_sizes: what windowed layers have sizes of their own for: `"heads"` and their rotations
            (`attention.key_length_swa`; of latent attention `attention.kv_lora_rank_swa` and the like), `"rotations"`
            (`rope.dimension_count_swa`) or `""`.
        window_rope: rotation of windowed layers: `"same"`; `"based"` (base from `rope.freq_base_swa`, if present);
            `"plain"` (same base, no scaling); `"own"` (base from `rope.freq_base_swa`, 10000 by default, no scaling
            but by `rope.scaling.attn_factor`); `"unscaled"` (likewise, but the same base by default) or `"bare"`
            (likewise, without that factor).
        qk_norm: `"head"` (each query and key head), `"heads"` (likewise, with separate weights per head), `"rotated"`
            (like `"head"`, but after rotation), `"bare"` (likewise, without weights, in layers that rotate), `"full"`
            (the whole projection), `"gained"` (each head after its rotation, and the only weights are a number for each
            query head), or `""` for none.
        unnormed_experts: number of experts of the variant without these norms (llama.cpp identifies it so).
        qk_norm_optional: files may lack these norms.
        clamp_key: queries, keys and values are clamped to ± the file's `attention.clamp_kqv`, if present.
        sinks: a learned logit per head joins the softmax without a value: `"required"`, `"optional"` in each layer, or
            `""` for never.
        value_scale: what attention adds is multiplied by the file's `attention.value_scale`, unless that is 0 or
            missing.
        attention_scale_key: the key of the file that has the scale of scores, if it has it and that is not 0.
        attention_scale: the scale of scores in other files; 0 for 1/√(head size).
        attention_power: that default is the head size to this power.
        alibi: scores have linear biases (ALiBi), of which this is the largest for slopes of `ggjac.config.Alibi`; 0 for
            none.
        alibi_key: the file's `attention.max_alibi_bias`, if present, overrides it.
        alibi_blocks, rope_blocks: block count of the only variant that has these biases, or that rotates (llama.cpp
            identifies them so); 0 for all variants.
        wide_scale_blocks: block count of the variant whose default is 1/√(d / heads) instead; 0 for none.
        attention_softcap, logit_softcap: default caps of scores and logits, 0 for none; None if there are none,
            whatever the file states.
        softcap_keys: the file's keys of these caps, if present, override the defaults.
        temperature: queries may grow with position (`attention.temperature_scale`), after each original context
            (`"context"`) or each `attention.temperature_length` (`"length"`); `""` for never.
        ffn: `"gated"`, `"fused"` (gate and up in one tensor, gate first), `"plain"` (no gate), or RWKV's channel
            mixing, `"shifted"`, or `"shifted gated"` where a gate multiplies what it adds.
        qkv_scales: the constant factors of the projections to queries, keys and values are applied.
        output_scales: that of attention's output projection is.
        ffn_scales: those of the feed-forward's matrices are applied.
        down_scales: where `ffn_scales` is not set, that of `ffn_down` is applied, outside of mixtures.
        recurrent_scales: those of a recurrent mixer's matrices are applied.
        hidden_divisors: activated hidden units may be divided by numbers (`ffn.act.scales`).
        units_doubled: the file's `feed_forward_length` is twice the number of hidden units.
        activation: `"silu"`, `"relu"`, `"gelu"` (tanh form), `"relu2"` (the square of the positive part), `"xielu"`
            (see `ggjac.config.Layer`), `"silu_oai"` (clamped, with up shifted by one) or `"situ"` (see
            `ggjac.config.ModelConfig`).
        sparse_blocks, sparsity: number of first blocks in which only gates that exceed the mean of all hidden units, by
            so many of their standard deviations, are activated, less that bound.
        hidden_clamps: hidden units may have limits in each block, and so has the gate, `"before"` its activation (in
            routed experts, `swiglu_clamp_exp`), `"before, shared too"` (likewise, and in other networks
            `swiglu_clamp_shexp`, by default the same) or `"after"` it (likewise, but none by default); `""` for never.
        router: how expert weights come from router logits: `"softmax"` over all experts, `"softmax_selected"` over
            the chosen ones, `"sigmoid"`, `"sigmoid_selected"` (likewise, but logits decide which are chosen), or
            `"sqrt_softplus"` (√log(1 + exp z)).
        weighted_inputs: these weights multiply what the experts read, and not what they add.
        sigmoid_routers: blocks and vocabulary of the variants where it is `"sigmoid"` (llama.cpp identifies them so).
        router_key: the file's `expert_gating_func` overrides `router`, which is the default, or `""` for none.
        selection_bias: a bias added for the choice of experts but not to their weights (`exp_probs_b`): `"optional"`,
            `"required"`, or `""` for none.
        token_experts: in the first `hash_layer_count` blocks a table chooses the experts of each token
            (`ffn_gate_tid2eid`), and not the router's scores.
        renormalize: divide the chosen experts' weights by their sum.
        renormalize_key: the file's `expert_weights_norm`, false by default, overrides `renormalize`.
        expert_scale_key: expert weights are multiplied by the file's `expert_weights_scale`, unless that is 0.
        router_reads: what the router reads: `"input"` (as the experts), `"stream"` (the stream before their norm, but
            normed without weight, divided by √d and times `ffn_gate_inp.scale`) or `"block"` (the block's input).
        dense_beside_experts: blocks with a mixture have a dense network too, and add both: `"required"`, `"optional"`
            (in blocks that have its tensors), `"square"` (required, with as many hidden units as the stream is wide)
            or `""` for never.
        experts_skip: a mixture beside a dense network reads the block's input.
        joint_scale: factor on the sum of routed experts and a network beside them, a shared expert or a dense one.
        leading_dense: the first `leading_dense_block_count` blocks are dense.
        router_optional: blocks without a router are dense.
        adjugates: what a mixture yields goes through a second one, and is added to its output times the file's
            `expert_group_scale`. That mixture has one expert for each `experts_per_group` of the first one's, and a
            token uses those of its own; their weights are the first one's router's, of the experts of these numbers.
        uneven_experts: the number of experts that a token uses may differ between blocks.
        expert_latent: the file's key, if present, that has the width of what routed experts read and write:
            `"moe_latent_size"`, `"expert_latent_length"` (other names of tensors, and a norm of the experts' sum, if
            present), or `""` for none.
        expert_widths: where the experts' hidden units are stated: `"tensors"` (their shapes; for the shared expert
            `expert_shared_feed_forward_length`, if present), `"count"` (`expert_feed_forward_length`, times
            `expert_shared_count` for the shared expert), `"shared count"` (likewise, but the shared expert has
            `expert_shared_feed_forward_length` times the count, if present) or `"shared"` (likewise, but that key
            counts alone).
        shared_optional: without `expert_shared_count` there is no shared expert.
        shared_fused: gate and up of the shared expert are in one tensor, gate first.
        looped: all blocks may be applied several times, one after the other (`num_loops`), with the norm before the
            head between these passes, unless the file has `skip_loop_final_norm`.
        streams: several residual streams: kept `"apart"` (as many as `hyper_connection.count` states; branches read and
            write all of them) or `"mixed"` at each branch by weights from Sinkhorn's iteration (likewise); `"held"`
            (two: the file's blocks are in two stacks, which run in cycles; each reads the sum of what both have made
            last, and one of these is held meanwhile); `"input"` (two: the second stays the input of block 0, and the
            first takes up a share of it after each block, `layer_output_scale`); or those of earlier blocks, which are
            read `"over depth"`, by attention, and put away before every `attn_res.block_size` blocks, if that is not
            0; or `"predicted"` (four: branches read and write the first, and after each block all are corrected by how
            far that was predicted wrongly); `""` for one.
        stream_mean: the norm before the head reads their mean, and not a sum by weights from a matrix.
        stream_scale: a block's output may be multiplied by a number (`layer_output_scale`).
        halving: the stream is halved after each of the file's `rescale_every_n_layers`, if that is not 0.
        post_norm_epsilon: what norms after branches add inside of their root; 0 for the same as others.
        positions: learned position embeddings are added to the input: `"required"`, `"optional"`, or `""` for never.
        embedding_norm: how embeddings are normed: `"bare"` (RMSNorm without weight), `"weighted"` (as others, by
            `token_embd_norm`) or `""` for not.
        embedding_scale: `"sqrt"` (of d), `"key"` (the file's `embedding_scale`), or `""` for none.
        residual_scale: branches are multiplied by the file's `residual_scale`.
        normed_skip: past a branch goes not the stream, but what the norm before the branch yields, times the file's
            `residual_scale`, which is then required.
        logit_scale: `"multiply"` or `"divide"` by the file's `logit_scale`, or `""` for neither.
        logit_scale_optional: files may lack that key.
        scale_defaults: for files without these keys: embedding scale; branch scale times √(blocks); logit scale times
            d; 0 for no default.
        logit_scale_default: logit scale of files without the key; 0 for none.
        scale_keys: files may have these keys; otherwise the defaults count.
        vision_experts: blocks have other matrices for the tokens of images (`vis_*`), which are not used.
        embedding_optional: files may lack the embeddings: then they are the head's matrix.
        head: whether the head has a matrix of its own (`output`): `"optional"`, `"required"`, or `"tied"` for never.
        head_scale: the constant factor of that matrix is applied.
        graph: names in llama.cpp's graph.
        export: how files of other converters may differ.
    """

    norm: str = "rms"
    norm_weights: bool = True
    norm_bias: bool = False
    norm_by_epsilon: bool = False
    epsilon_read: bool = True
    epsilon_optional: bool = False
    output_norm: str = "output_norm"
    norms: Norms = Norms()
    bare_names: tuple[str, ...] = ()
    mixer: str = "attention"
    recurrent: str = ""
    recurrent_blocks: str = ""
    recurrent_period: int = 4
    pruned: bool = False
    inner_norms: bool = False
    one_branch: bool = False
    key_heads_tiled: bool = False
    head_norm: str = ""
    first_values: bool = False
    made_from_values: tuple[str, ...] = ()
    normed_steps: bool = False
    state_norm_optional: bool = False
    sigmoid_gate: bool = False
    low_rank_gates: str = ""
    bounded_decay: str = ""
    key_epsilon: float = 0.0
    gated_queries: bool = False
    gated_heads: str = ""
    softplus_gate: bool = False
    latent_queries: str = ""
    direct_queries: tuple[tuple[int, int], ...] = ()
    latent_split: str = ""
    mscale: str = ""
    indexer: str = ""
    normed_rotary: bool = False
    value_norm: bool = False
    keys_as_values: bool = False
    shared_keys: bool = False
    shared_from: int = 0
    inputs: bool = False
    inputs_width: int = 0
    laurel: int = 0
    parallel: bool = False
    parallel_key: bool = False
    parallel_unless_normed: bool = False
    rope_pairs: str = "halves"
    partial_rotary: bool = False
    rope_sections: str = ""
    rope_alpha: bool = False
    rope_keys: str = "all"
    rope_optional: bool = False
    rope_layers: str = "all"
    rope_factors: str = "all"
    halved_rotary: bool = False
    yarn_keys: str = ""
    beta_fast: float = 32.0
    windowed: str = ""
    window_blocks: int = 0
    window: int = 0
    window_fixed: bool = False
    window_period: int = 0
    full_first: bool = False
    chunked: bool = False
    windowed_sizes: str = ""
    window_rope: str = "same"
    qk_norm: str = ""
    unnormed_experts: int = 0
    qk_norm_optional: bool = False
    clamp_key: bool = False
    sinks: str = ""
    value_scale: bool = False
    attention_scale_key: str = ""
    attention_scale: float = 0.0
    attention_power: float = -0.5
    alibi: float = 0.0
    alibi_key: bool = False
    alibi_blocks: int = 0
    rope_blocks: int = 0
    wide_scale_blocks: int = 0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    softcap_keys: bool = True
    temperature: str = ""
    ffn: str = "gated"
    qkv_scales: bool = True
    output_scales: bool = True
    ffn_scales: bool = False
    down_scales: bool = False
    recurrent_scales: bool = False
    hidden_divisors: bool = False
    units_doubled: bool = False
    activation: str = "silu"
    sparse_blocks: int = 0
    sparsity: float = 0.0
    hidden_clamps: str = ""
    router: str = "softmax"
    weighted_inputs: bool = False
    sigmoid_routers: tuple[tuple[int, int], ...] = ()
    router_key: bool = False
    selection_bias: str = ""
    token_experts: bool = False
    renormalize: bool = True
    renormalize_key: bool = False
    expert_scale_key: bool = False
    router_reads: str = "input"
    dense_beside_experts: str = ""
    experts_skip: bool = False
    joint_scale: float = 1.0
    leading_dense: bool = False
    router_optional: bool = False
    adjugates: bool = False
    uneven_experts: bool = False
    expert_latent: str = ""
    expert_widths: str = "tensors"
    shared_optional: bool = False
    shared_fused: bool = False
    looped: bool = False
    streams: str = ""
    stream_mean: bool = False
    stream_scale: bool = False
    halving: bool = False
    post_norm_epsilon: float = 0.0
    positions: str = ""
    embedding_norm: str = ""
    embedding_scale: str = ""
    residual_scale: bool = False
    normed_skip: bool = False
    logit_scale: str = ""
    logit_scale_optional: bool = False
    scale_defaults: tuple[float, float, float] = (0.0, 0.0, 0.0)
    logit_scale_default: float = 0.0
    scale_keys: bool = True
    vision_experts: bool = False
    embedding_optional: bool = False
    head: str = "optional"
    head_scale: bool = True
    graph: Graph = Graph()
    export: Export = Export()


_LLAMA = Architecture(rope_pairs="adjacent")
_EXPERTS_ONLY = Graph(ffn=("ffn_moe_out",))
_SUMMED = Graph(ffn=())  # `ffn_out` is, or becomes, the branch's sum with the stream
_QWEN3 = Architecture(qk_norm="head")
_SANDWICH = Norms(attention_out=("post_attention_norm",), ffn_out=("post_ffw_norm",))
_DEEPSEEK = Architecture(renormalize_key=True, expert_scale_key=True, leading_dense=True, expert_widths="count")
_DOTS = replace(_DEEPSEEK, qk_norm="head", router="", router_key=True, selection_bias="optional")
_SHARED_NORM = Norms(ffn_in=("attn_norm",))
_POST_AS_FFN = Norms(ffn_in=("post_attention_norm",))
_GEMMA = Architecture(partial_rotary=True, activation="gelu", embedding_scale="sqrt")
_GRANITE = replace(
    _LLAMA,
    attention_scale_key="attention.scale",
    embedding_scale="key",
    residual_scale=True,
    logit_scale="divide",
)
_GPT = Architecture(norm="layer", ffn="plain", activation="gelu")
_COHERE = Architecture(
    norm="layer",
    norms=_SHARED_NORM,
    parallel=True,
    rope_pairs="adjacent",
    partial_rotary=True,
    logit_scale="multiply",
)

_DELTA = replace(
    _QWEN3,
    norms=_POST_AS_FFN,
    recurrent="delta",
    recurrent_blocks="interval",
    gated_queries=True,
    partial_rotary=True,
    ffn_scales=True,
    graph=Graph(attention=("linear_attn_out", "attn_output")),  # the latter also names the recurrence's output
)
_OLLAMA = Export(
    dropped=("v.", "mtp."),
    renamed={"ssm_dt": "ssm_dt.bias"},
    padded={"rope.dimension_sections": 4},
    largest=("attention.head_count_kv",),
)
_QWEN35 = replace(_DELTA, key_heads_tiled=True, rope_sections="interleaved", recurrent_scales=True, export=_OLLAMA)
_LFM2 = replace(
    _QWEN3,
    output_norm="token_embd_norm",
    recurrent="convolution",
    recurrent_blocks="no kv heads",
    graph=Graph(("model.layers.{}.conv.out_proj", "model.layers.{}.self_attn.out_proj"), ffn=()),
)
_MAMBA2 = Architecture(
    recurrent="state space",
    recurrent_scales=True,
    recurrent_blocks="all",
    rope_pairs="",
    ffn_scales=True,
    graph=Graph(attention=("mamba_out",)),
)
_RWKV = Architecture(
    norm="layer",
    norms=Norms(ffn_in=("attn_norm_2",)),
    embedding_norm="weighted",
    recurrent="rwkv7",
    recurrent_blocks="all",
    head_norm="required",
    first_values=True,
    rope_pairs="",
    ffn="shifted",
    activation="relu2",
    head="required",
    graph=Graph(attention=(), ffn=()),
)
_NEMOTRON_H = replace(
    _MAMBA2,
    norms=_SHARED_NORM,
    recurrent_blocks="no kv heads",
    one_branch=True,
    partial_rotary=True,
    epsilon_optional=True,
    ffn="plain",
    activation="relu2",
    router="sigmoid",
    selection_bias="required",
    renormalize_key=True,
    expert_scale_key=True,
    uneven_experts=True,
    expert_latent="moe_latent_size",
    graph=Graph(("mamba_out", "attn_out"), ("l_out",), ("nemotron_h_block_out",)),
)
_GEMMA4_NORMS = replace(
    _SANDWICH, dense_out=("post_ffw_norm_1",), experts_in=("pre_ffw_norm_2",), experts_out=("post_ffw_norm_2",)
)

_LATENT = Architecture(mixer="latent", rope_pairs="adjacent", partial_rotary=True)
_DEEPSEEK2 = replace(
    _LATENT,
    latent_queries="required",
    direct_queries=((26, 0), (27, 0), (48, 128256)),
    latent_split="optional",
    mscale="equal",
    temperature="length",
    sigmoid_routers=((47, 154880), (48, 154880)),
    router_key=True,
    selection_bias="optional",
    renormalize_key=True,
    expert_scale_key=True,
    leading_dense=True,
    expert_widths="count",
    head_scale=False,
    graph=Graph(attention=()),
)

_KIMI = replace(
    _DEEPSEEK,
    mixer="latent",
    latent_split="required",
    recurrent="kimi delta",
    recurrent_blocks="no kv heads",
    sigmoid_gate=True,
    partial_rotary=True,
    router="",
    router_key=True,
    selection_bias="required",
    head_scale=False,
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": replace(_LLAMA, ffn_scales=True),
    "mistral3": replace(_LLAMA, yarn_keys="all", temperature="context", ffn_scales=True),
    "qwen2": Architecture(),
    "qwen2moe": Architecture(renormalize=False),
    "qwen3": replace(_QWEN3, ffn_scales=True),
    "qwen3moe": replace(_QWEN3, ffn_scales=True),
    "qwen3vl": replace(_QWEN3, rope_sections="interleaved"),
    "qwen3vlmoe": replace(_QWEN3, rope_sections="interleaved"),
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA,
        norms=_SANDWICH,
        windowed="required",
        window=4096,
        window_period=2,
        window_rope="based",
        wide_scale_blocks=46,
        attention_softcap=50.0,
        logit_softcap=30.0,
    ),
    "gemma3": replace(
        _GEMMA,
        norms=_SANDWICH,
        qk_norm="head",
        windowed="optional",
        window_period=6,
        window_rope="own",
        wide_scale_blocks=62,
        logit_softcap=0.0,
    ),
    "phi3": Architecture(ffn="fused", partial_rotary=True),
    "olmo2": Architecture(
        norms=replace(_SANDWICH, attention_in=(), ffn_in=()),
        qk_norm="full",
        windowed="optional",
        window_period=4,
        window_rope="plain",
    ),
    "olmoe": Architecture(qk_norm="full", renormalize=False),
    "granite": replace(_GRANITE, rope_optional=True),
    "granitemoe": _GRANITE,
    "smollm3": replace(_LLAMA, rope_layers="three of four"),
    "exaone4": Architecture(
        norms=replace(_SANDWICH, attention_in=(), ffn_in=()),
        rope_layers="windowed",
        windowed="required",
        window_blocks=64,
        window=4096,
        window_period=4,
        qk_norm="head",
    ),
    "seed_oss": Architecture(norms=_POST_AS_FFN),
    "hunyuan-dense": Architecture(qk_norm="rotated", rope_alpha=True),
    "internlm2": _LLAMA,
    "ernie4_5": _LLAMA,
    "exaone": Architecture(),
    "minicpm": replace(
        _LLAMA,
        embedding_scale="key",
        residual_scale=True,
        logit_scale="divide",
        scale_defaults=(12.0, 1.4, 256.0),
    ),
    "arcee": replace(_LLAMA, ffn="plain", activation="relu2"),
    "apertus": replace(_QWEN3, ffn="plain", activation="xielu"),
    "glm4": Architecture(norms=_SANDWICH, rope_pairs="adjacent", partial_rotary=True, ffn="fused"),
    "cohere2": replace(_COHERE, rope_layers="windowed", windowed="required", window_period=4, ffn_scales=True),
    "gpt2": replace(_GPT, rope_pairs="", positions="required"),
    "starcoder2": _GPT,
    "phi2": replace(_GPT, norms=_SHARED_NORM, parallel=True, partial_rotary=True),
    "olmo": Architecture(norm="layer", norm_weights=False, rope_pairs="adjacent", clamp_key=True, graph=_SUMMED),
    "command-r": replace(_COHERE, qk_norm="heads", qk_norm_optional=True),
    "nemotron": Architecture(norm="layer", partial_rotary=True, ffn="plain", activation="relu2", graph=_SUMMED),
    "stablelm": Architecture(
        norm="layer",
        norms=Norms(ffn_in=("ffn_norm", "attn_norm")),
        parallel_unless_normed=True,
        partial_rotary=True,
        qk_norm="heads",
        qk_norm_optional=True,
    ),
    "gptneox": replace(_GPT, parallel_key=True, partial_rotary=True, graph=_SUMMED),
    "falcon": replace(
        _GPT,
        norms=Norms(attention_in=("attn_norm_2", "attn_norm"), ffn_in=("attn_norm",)),
        parallel=True,
    ),
    "gpt-oss": Architecture(
        norms=_POST_AS_FFN,
        windowed="required",
        window_period=2,
        window_rope="based",
        sinks="required",
        activation="silu_oai",
        router="softmax_selected",
        renormalize=False,
    ),
    "glm4moe": replace(
        _DEEPSEEK,
        norms=_POST_AS_FFN,
        partial_rotary=True,
        qk_norm="head",
        qk_norm_optional=True,
        router="sigmoid",
        router_key=True,
        selection_bias="required",
    ),
    "deepseek": replace(_DEEPSEEK, rope_pairs="adjacent", renormalize=False, renormalize_key=False),
    "dots1": _DOTS,
    "ernie4_5-moe": replace(_LLAMA, selection_bias="optional", leading_dense=True),
    "hunyuan-moe": Architecture(qk_norm="rotated"),
    "bailingmoe": replace(_DEEPSEEK, rope_pairs="adjacent", leading_dense=False),
    "bailingmoe2": replace(_DOTS, partial_rotary=True, expert_widths="shared count"),
    "openelm": replace(_QWEN3, qkv_scales=False, head="tied", graph=Graph(attention=())),
    "deci": replace(
        _LLAMA,
        recurrent="linear",
        recurrent_blocks="no kv heads",
        pruned=True,
        graph=Graph(attention=("wo",), ffn=()),
    ),
    "bitnet": Architecture(inner_norms=True, ffn_scales=True, head="tied", graph=Graph(ffn=("ffn_down",))),
    "mellum": replace(
        _QWEN3,
        windowed="optional",
        window_period=4,
        window_rope="plain",
        ffn_scales=True,
        head="required",
        graph=_EXPERTS_ONLY,
    ),
    "maple": replace(
        _QWEN3,
        partial_rotary=True,
        rope_layers="windowed",
        windowed="required",
        window_rope="based",
        hidden_clamps="before",
        head="required",
        graph=_EXPERTS_ONLY,
    ),
    "granite_swa": replace(
        _GRANITE, rope_layers="listed", windowed="required", sinks="required", shared_fused=True, graph=_SUMMED
    ),
    "hy_v3": replace(
        _QWEN3,
        bare_names=("exp_probs_b",),
        ffn_scales=True,
        router="sigmoid",
        router_key=True,
        selection_bias="optional",
        renormalize_key=True,
        expert_scale_key=True,
        router_optional=True,
        graph=Graph(ffn=("ffn_dense_out", "ffn_out")),
    ),
    "cohere2moe": replace(
        _COHERE,
        norm_by_epsilon=True,
        partial_rotary=False,
        rope_layers="windowed or dense",
        windowed="required",
        window_period=4,
        full_first=True,
        ffn_scales=True,
        router="sigmoid",
        router_key=True,
        renormalize_key=True,
        expert_scale_key=True,
        joint_scale=0.5,
        leading_dense=True,
        expert_widths="shared",
        shared_optional=True,
        head_scale=False,
        graph=Graph(attention=(), ffn=("ffn_out", "ffn_moe_out")),
    ),
    "mimo2": Architecture(
        partial_rotary=True,
        windowed="required",
        window_rope="own",
        sinks="optional",
        value_scale=True,
        qkv_scales=False,
        router="sigmoid",
        selection_bias="optional",
        router_optional=True,
        head="required",
        graph=Graph(ffn=("ffn_out", "ffn_moe_out")),
    ),
    "smallthinker": Architecture(
        rope_layers="not first of four",
        windowed="optional",
        window=4096,
        window_fixed=True,
        window_period=4,
        full_first=True,
        window_rope="based",
        activation="relu",
        router="",
        router_key=True,
        router_reads="block",
        graph=Graph(attention=()),
    ),
    "dbrx": Architecture(
        norm="layer",
        norms=Norms(ffn_in=("attn_output_norm",)),
        clamp_key=True,
        head="required",
        graph=Graph(attention=(), ffn=("ffn_moe_out",)),
    ),
    "arctic": replace(
        _LLAMA,
        norms=Norms(experts_in=("ffn_norm_exps",)),
        dense_beside_experts="square",
        experts_skip=True,
        graph=Graph(attention=(), ffn=()),
    ),
    "grok": Architecture(
        norms=Norms(attention_out=("attn_output_norm",), ffn_out=("layer_output_norm", "post_ffw_norm")),
        yarn_keys="betas",
        beta_fast=8.0,
        attention_scale_key="attention.output_scale",
        attention_scale=0.08838834764831845,
        attention_softcap=30.0,
        logit_softcap=0.0,
        activation="gelu",
        dense_beside_experts="optional",
        joint_scale=2**-0.5,
        embedding_scale="key",
        logit_scale="multiply",
        scale_defaults=(78.38367176906169, 0.0, 0.0),
        logit_scale_default=0.5773502691896257,
        graph=Graph(attention=(), ffn=()),
    ),
    "exaone-moe": replace(
        _DOTS,
        rope_layers="windowed",
        windowed="required",
        window_period=4,
        expert_widths="tensors",
    ),
    "grovemoe": replace(_QWEN3, adjugates=True, graph=Graph(ffn=("ffn_final_moe_out",))),
    "minimax-m2": Architecture(
        partial_rotary=True, qk_norm="full", router="", router_key=True, selection_bias="required"
    ),
    "phimoe": Architecture(norm_bias=True),
    "xverse": replace(_LLAMA, head="required"),
    "qwen": Architecture(partial_rotary=True, units_doubled=True, head="required"),
    "qwen2vl": Architecture(epsilon_read=False, rope_sections="consecutive"),
    "paddleocr": Architecture(rope_sections="consecutive"),
    "hunyuan_vl": Architecture(qk_norm="rotated", rope_sections="consecutive", rope_alpha=True),
    "starcoder": replace(_GPT, rope_pairs="", positions="required"),
    "codeshell": replace(_GPT, embedding_optional=True, head="required"),
    "orion": Architecture(norm="layer", head="required"),
    "maincoder": replace(_LLAMA, qk_norm="rotated"),
    "chatglm": Architecture(rope_pairs="adjacent", partial_rotary=True, ffn="fused"),
    "pangu-embedded": Architecture(rope_factors="", graph=_SUMMED),
    "plamo": Architecture(norms=_SHARED_NORM, parallel=True, head="required"),
    "plamo3": Architecture(
        norms=_SANDWICH,
        bare_names=("post_attention_norm", "post_ffw_norm"),
        partial_rotary=True,
        windowed="optional",
        window_period=8,
        window_rope="own",
        qk_norm="head",
        ffn="fused",
    ),
    "cogvlm": Architecture(rope_keys="", rope_factors="", qkv_scales=False, vision_experts=True, graph=_SUMMED),
    "baichuan": replace(_LLAMA, rope_blocks=32, alibi=8.0, alibi_blocks=40, head="required"),
    "mpt": replace(
        _GPT,
        rope_pairs="",
        clamp_key=True,
        alibi_key=True,
        hidden_divisors=True,
        positions="optional",
    ),
    "bloom": replace(_GPT, rope_pairs="", alibi=8.0, embedding_norm="weighted"),
    "refact": Architecture(rope_pairs="", alibi=8.0),
    "jais": Architecture(norm="layer", rope_pairs="", attention_power=-1.0, alibi_key=True, head="required"),
    "jais2": Architecture(norm="layer", ffn="plain", activation="relu2"),
    "deepseek2-ocr": replace(
        _DEEPSEEK,
        rope_keys="base",
        mscale="alone",
        router_key=True,
        selection_bias="optional",
        head_scale=False,
    ),
    "qwen35": _QWEN35,
    "qwen35moe": _QWEN35,
    "qwen3next": _DELTA,
    "deepseek2": _DEEPSEEK2,
    "mistral4": replace(_DEEPSEEK2, mscale="one"),
    "minicpm3": replace(
        _LATENT,
        rope_pairs="halves",
        latent_queries="required",
        embedding_scale="key",
        residual_scale=True,
        logit_scale="multiply",
        scale_defaults=(12.0, 1.4, 256.0),
        scale_keys=False,
    ),
    "plm": replace(_LATENT, ffn="plain", activation="relu2", head="tied"),
    "deepseek32": replace(
        _DEEPSEEK2,
        direct_queries=(),
        latent_split="required",
        mscale="one",
        temperature="",
        router="",
        sigmoid_routers=(),
        indexer="keys",
        ffn_scales=True,
    ),
    "glm-dsa": replace(
        _DEEPSEEK2,
        direct_queries=(),
        latent_split="required",
        mscale="alone",
        temperature="",
        router="sigmoid",
        sigmoid_routers=(),
        indexer="keys",
        ffn_scales=True,
    ),
    "dots3note": replace(
        _DEEPSEEK2,
        direct_queries=(),
        latent_split="required",
        mscale="",
        temperature="",
        router="",
        sigmoid_routers=(),
        selection_bias="required",
        indexer="keys",
        gated_heads="heads",
        normed_rotary=True,
        windowed="required",
        windowed_sizes="heads",
        window_rope="based",
        ffn_scales=True,
        graph=Graph(attention=("attn_output",)),
    ),
    "hy_v4": replace(
        _LATENT,
        latent_queries="required",
        latent_split="required",
        indexer="optional keys",
        gated_heads="elements",
        sinks="required",
        streams="apart",
        output_scales=False,
        hidden_clamps="before",
        router="",
        router_key=True,
        selection_bias="optional",
        renormalize_key=True,
        expert_scale_key=True,
        leading_dense=True,
        expert_widths="count",
        head="required",
        head_scale=False,
        graph=Graph(control_vector=False),
    ),
    "deepseek4": Architecture(
        mixer="compressed",
        indexer="memory",
        rope_pairs="adjacent",
        partial_rotary=True,
        rope_factors="",
        windowed="all",
        window_rope="plain",
        sinks="required",
        streams="mixed",
        qkv_scales=False,
        output_scales=False,
        hidden_clamps="before, shared too",
        router="",
        router_key=True,
        selection_bias="required",
        token_experts=True,
        renormalize_key=True,
        expert_scale_key=True,
        expert_widths="count",
        head="required",
        head_scale=False,
        graph=Graph(stream=("l_last",)),
    ),
    "minimax-m3": replace(
        _DEEPSEEK,
        partial_rotary=True,
        qk_norm="head",
        indexer="blocks",
        activation="silu_oai",
        router="",
        router_key=True,
        selection_bias="required",
        head="required",
    ),
    "kimi-linear": replace(
        _KIMI,
        low_rank_gates="both",
        rope_pairs="",
        renormalize_key=False,
        head="required",
        graph=Graph(("kda_out", "mla_out")),
    ),
    "bailingmoe3": replace(
        _KIMI,
        latent_queries="optional",
        gated_heads="heads",
        bounded_decay="required",
        rope_pairs="adjacent",
        rope_sections="optional",
        output_scales=False,
        hidden_clamps="after",
        expert_widths="shared",
        graph=Graph(("kda_out", "mla_out"), ffn=()),
    ),
    "kimi-k3": replace(
        _KIMI,
        low_rank_gates="decays",
        bounded_decay="optional",
        latent_queries="optional",
        gated_heads="elements",
        rope_pairs="",
        streams="over depth",
        output_scales=False,
        activation="situ",
        expert_latent="expert_latent_length",
        head="required",
        graph=Graph(("kda_out", "mla_out", "prefix_sum_attn")),  # where the stream begins anew, it has the last name
    ),
    "glm5-next": replace(
        _KIMI,
        low_rank_gates="both",
        bounded_decay="optional",
        key_epsilon=1e-6,
        latent_queries="required",
        indexer="pools",
        rope_pairs="",
        streams="mixed",
        stream_mean=True,
        output_scales=False,
        hidden_clamps="before, shared too",
        router="sigmoid",
        head="required",
        graph=Graph(("kda_out", "attn_out")),
    ),
    "lfm2": replace(_LFM2, windowed="optional"),
    "lfm2moe": replace(_LFM2, router="", router_key=True, selection_bias="required", leading_dense=True),
    "mamba2": _MAMBA2,
    "rwkv6": replace(_RWKV, recurrent="rwkv6", first_values=False, ffn="shifted gated", halving=True),
    "rwkv7": _RWKV,
    "rwkv6qwen2": Architecture(
        recurrent="rwkv6", recurrent_blocks="all", rope_pairs="", head="required", graph=Graph(attention=())
    ),
    "arwkv7": Architecture(
        recurrent="rwkv7",
        recurrent_blocks="all",
        head_norm="optional",
        first_values=True,
        rope_pairs="",
        head="required",
        graph=Graph(attention=()),
    ),
    "mamba": replace(
        _MAMBA2, recurrent="channel state space", made_from_values=("dt", "b", "c"), graph=Graph(attention=())
    ),
    "plamo2": Architecture(
        norms=_SANDWICH,
        bare_names=("post_attention_norm", "post_ffw_norm", "ssm_dt_norm", "ssm_b_norm", "ssm_c_norm"),
        recurrent="state space",
        recurrent_blocks="no kv heads",
        made_from_values=("b", "c", "dt"),
        normed_steps=True,
        qk_norm="heads",
        rope_factors="",
        ffn="fused",
        qkv_scales=False,
        graph=Graph(("mamba_out", "attn_out"), stream=("ffn_residual",), control_vector=False),
    ),
    "jamba": Architecture(
        recurrent="channel state space",
        made_from_values=("dt", "b", "c"),
        recurrent_scales=True,
        recurrent_blocks="no kv heads",
        normed_steps=True,
        rope_pairs="",
        renormalize=False,
        router_optional=True,
        graph=Graph(attention=("ffn_inp",)),  # so named before the sum
    ),
    "granitehybrid": replace(
        _GRANITE,
        rope_optional=True,
        logit_scale_optional=True,
        recurrent="state space",
        recurrent_scales=True,
        recurrent_blocks="no kv heads",
        graph=Graph(("mamba_out", "attn_out"), ffn=()),
    ),
    "falcon-h1": Architecture(
        bare_names=("ffn_norm",),
        state_norm_optional=True,
        rope_factors="",
        recurrent="state space",
        recurrent_scales=True,
        recurrent_blocks="beside",
        graph=Graph(attention=("layer_out",)),
    ),
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_moe": _NEMOTRON_H,
    "gemma4": replace(
        _GEMMA,
        norms=_GEMMA4_NORMS,
        value_norm=True,
        keys_as_values=True,
        shared_keys=True,
        inputs=True,
        attention_scale=1.0,
        qk_norm="head",
        rope_factors="required",
        windowed="required",
        windowed_sizes="heads",
        window_rope="own",
        logit_softcap=30.0,
        ffn_scales=True,
        router_reads="stream",
        dense_beside_experts="required",
        router_optional=True,
        stream_scale=True,
        graph=Graph(attention=(), ffn=("ffn_moe_combined", "ffn_out")),
    ),
    "gemma3n": replace(
        _GEMMA,
        norms=_SANDWICH,
        value_norm=True,
        shared_from=20,
        inputs=True,
        inputs_width=256,
        laurel=64,
        streams="predicted",
        attention_scale=1.0,
        qk_norm="head",
        rope_factors="",
        windowed="required",
        window_period=5,
        window_rope="own",
        logit_softcap=30.0,
        softcap_keys=False,
        sparse_blocks=10,
        sparsity=1.6448533535003662,
        graph=Graph(attention=()),
    ),
    "afmoe": replace(
        _DEEPSEEK,
        norms=_SANDWICH,
        gated_heads="elements",
        rope_layers="three of four",
        windowed="required",
        window_period=4,
        window_rope="based",
        qk_norm="head",
        router="sigmoid",
        router_key=True,
        selection_bias="required",
        embedding_scale="sqrt",
        graph=Graph(("attn_o_proj",), ("ffn_out", "ffn_moe_out")),
    ),
    "laguna": replace(
        _DEEPSEEK,
        gated_heads="either",
        softplus_gate=True,
        partial_rotary=True,
        windowed="optional",
        window_period=4,
        full_first=True,
        windowed_sizes="rotations",
        window_rope="bare",
        qk_norm="head",
        router="sigmoid",
        router_key=True,
        selection_bias="required",
        expert_widths="tensors",
        head_scale=False,
        graph=Graph(attention=("attn_o_proj",)),
    ),
    "step35": Architecture(
        gated_heads="optional",
        partial_rotary=True,
        rope_factors="full",
        halved_rotary=True,
        windowed="required",
        windowed_sizes="rotations",
        window_rope="own",
        qk_norm="head",
        qk_norm_optional=True,
        hidden_clamps="after",
        router="sigmoid",
        router_key=True,
        router_optional=True,
        selection_bias="optional",
        renormalize_key=True,
        expert_scale_key=True,
        head="required",
        graph=Graph(attention=("attn_proj",), stream=("attn_norm_in", "h_nextn"), next_input=True),
    ),
    "spark2_5": Architecture(
        gated_heads="heads",
        partial_rotary=True,
        windowed="required",
        windowed_sizes="rotations",
        window_rope="based",
        activation="gelu",
        head_scale=False,
        graph=Graph(attention=("attn_out_proj",)),
    ),
    "muse-glimmer": replace(
        _LLAMA,
        norms=_SANDWICH,
        gated_heads="elements",
        rope_layers="windowed",
        windowed="required",
        window_period=4,
        window_rope="unscaled",
        qk_norm="head",
        logit_softcap=30.0,
        post_norm_epsilon=1e-8,
        embedding_norm="bare",
        logit_scale="multiply",
        head="required",
        graph=Graph(attention=("attn_o_proj",)),
    ),
    "llama4": replace(
        _LLAMA,
        rope_layers="three of four",
        windowed="required",
        window=8192,
        window_fixed=True,
        window_period=4,
        chunked=True,
        window_rope="based",
        qk_norm="bare",
        unnormed_experts=128,
        router="sigmoid_selected",
        weighted_inputs=True,
        renormalize=False,
        router_optional=True,
        graph=Graph(ffn=("ffn_moe_out_merged",)),  # `ffn_out` is the branch's sum with the stream
    ),
    "minimax-01": Architecture(
        recurrent="lightning",
        recurrent_blocks="interval",
        recurrent_period=8,
        partial_rotary=True,
        normed_skip=True,
        graph=Graph(ffn=("ffn_moe_out",)),
    ),
    "talkie": Architecture(
        norm_weights=False,
        rope_factors="",
        qk_norm="gained",
        down_scales=True,
        streams="input",
        embedding_norm="bare",
        logit_scale="multiply",
        head="required",
        head_scale=False,
    ),
    "nanbeige": replace(_LLAMA, partial_rotary=True, looped=True, graph=_SUMMED),
    "hrm_text": Architecture(
        norm_weights=False,
        gated_heads="elements",
        partial_rotary=True,
        rope_factors="",
        streams="held",
        embedding_scale="key",
    ),
}
