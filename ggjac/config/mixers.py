"""The tensors of each kind of token mixer, by stem: data for the forward pass, for products and for the planner."""

from collections.abc import Sequence
from typing import NamedTuple


class Mixer(NamedTuple):
    """The tensors of a token mixer.

    Attributes:
        values: the live projection to the values, or to the latent that they are expanded from.
        output: the live output projection.
        frozen: projections that only decide how values are mixed: a product does not read them.
        convolution: the live convolution in time on the values, or none.
        expansion: the live projection from a latent to the values, or none.
        memory: the live projection to the values of a compressed memory, or none.
        grouped: the live projection of each group of heads alone, before the output projection, or none.
        recurrent: whether a state, and not scores, connects positions.
        channels: whether each channel has a state of its own, so that there are no heads.
        sourced: tensors of blocks that read an earlier block's values, frozen: where they do not, they are not read.
        mixes: whether positions are mixed at all.
        queries, keys: of softmax attention, the projections that make queries and keys of single tokens.
    """

    values: str
    output: str
    frozen: tuple[str, ...]
    convolution: str = ""
    expansion: str = ""
    memory: str = ""
    grouped: str = ""
    recurrent: bool = False
    channels: bool = False
    sourced: tuple[str, ...] = ()
    mixes: bool = True
    queries: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()

    @property
    def has_heads(self) -> bool:
        """Whether parts of the values are mixed each in a way of its own, as scores or a state do."""
        return self.mixes and ((self.recurrent and not self.channels) or not self.convolution)

    @property
    def softmax(self) -> bool:
        """Whether positions are mixed by attention: with weights of at least 0 that sum to one (less, with sinks)."""
        return self.has_heads and not self.recurrent


MIXERS = {
    "attention": Mixer(
        "attn_v", "attn_output", ("attn_q", "attn_k", "attn_gate"), queries=("attn_q",), keys=("attn_k",)
    ),
    # Multi-head latent attention, MLA (DeepSeek-V2, arXiv 2405.04434).
    "latent": Mixer(
        "attn_kv_latent",
        "attn_output",
        ("attn_q", "attn_q_a", "attn_q_b", "attn_k_nope", "attn_k_b", "attn_kv_rope", "attn_gate"),
        expansion="attn_v_b",
        queries=("attn_q", "attn_q_a", "attn_q_b"),
        keys=("attn_kv_latent", "attn_k_nope", "attn_k_b", "attn_kv_rope"),
    ),
    # Of DeepSeek-V4: one head of keys, which are the values too, of single tokens and of compressed groups of them.
    "compressed": Mixer(
        "attn_kv",
        "attn_output_b",
        ("attn_q_a", "attn_q_b", "attn_compressor_gate"),
        memory="attn_compressor_kv",
        grouped="attn_output_a",
        queries=("attn_q_a", "attn_q_b"),
        keys=("attn_kv",),
    ),
    # The values are another block's, which made them from its own input.
    "shared attention": Mixer("", "attn_output", ("attn_q",), queries=("attn_q",)),
    # In place of attention, where that was found to matter little (Puzzle, arXiv 2411.19146).
    "linear": Mixer("", "attn_output", (), mixes=False),
    # The gated delta rule (arXiv 2412.06464).
    "delta": Mixer(
        "attn_v",
        "ssm_out",
        ("attn_q", "attn_k", "attn_gate", "ssm_alpha", "ssm_beta"),
        convolution="ssm_conv1d_v",
        recurrent=True,
    ),
    # Kimi Delta Attention, KDA (arXiv 2510.26692): a decay for each key channel.
    "kimi delta": Mixer(
        "attn_v",
        "attn_output",
        ("attn_q", "attn_k", "ssm_beta", "ssm_f_a", "ssm_f_b", "ssm_g", "ssm_g_a", "ssm_g_b"),
        convolution="ssm_conv1d_v",
        recurrent=True,
    ),
    # Mamba-2 (arXiv 2405.21060); PLaMo 2 makes the last five from the values.
    "state space": Mixer(
        "ssm_in_x",
        "ssm_out",
        ("ssm_in_z", "ssm_in_b", "ssm_in_c", "ssm_in_dt", "ssm_x", "ssm_dt"),
        convolution="ssm_conv1d_x",
        recurrent=True,
    ),
    # Mamba (arXiv 2312.00752): a decay for each channel and row of its state.
    "channel state space": Mixer(
        "ssm_in_x",
        "ssm_out",
        ("ssm_in_z", "ssm_x", "ssm_dt"),
        convolution="ssm_conv1d_x",
        recurrent=True,
        channels=True,
    ),
    # RWKV-6 (arXiv 2404.05892), and gated linear attention as in QRWKV-6 (arXiv 2505.03005).
    "rwkv6": Mixer(
        "time_mix_value",
        "time_mix_output",
        (
            *("time_mix_w1", "time_mix_w2", "time_mix_decay_w1", "time_mix_decay_w2"),
            *("time_mix_key", "time_mix_receptance", "time_mix_gate"),
        ),
        recurrent=True,
    ),
    # RWKV-7 (arXiv 2503.14456).
    "rwkv7": Mixer(
        "time_mix_value",
        "time_mix_output",
        (*(f"time_mix_{name}{step}" for name in "wag" for step in (1, 2)), "time_mix_key", "time_mix_receptance"),
        recurrent=True,
        sourced=("time_mix_v0", "time_mix_v1", "time_mix_v2"),
    ),
    # Lightning attention (MiniMax-01, arXiv 2501.08313): linear attention with a fixed decay for each head.
    "lightning": Mixer("attn_v", "attn_output", ("attn_q", "attn_k", "attn_gate"), recurrent=True),
    # A low-rank matrix beside attention (LAuReL, arXiv 2411.07501).
    "laurel": Mixer("laurel_l", "laurel_r", (), mixes=False),
    # The gated short convolution of LFM2 (arXiv 2511.23404).
    "convolution": Mixer(
        "shortconv.in_proj_x",
        "shortconv.out_proj",
        ("shortconv.in_proj_b", "shortconv.in_proj_c"),
        convolution="shortconv.conv",
    ),
}


def name_of_mixers(kinds: Sequence[str]) -> str | None:
    """Return the name of what mixes positions in a block; None of attention alone."""
    attends = [MIXERS[kind].softmax for kind in kinds] == [True]
    return None if attends else " and ".join(kinds) or "none"
