"""Transformer blocks at one prompt: what is frozen, and the linear operators that remain."""

from ggjac.blocks.activations import activation
from ggjac.blocks.block import (
    AttentionTape,
    BlockTape,
    FrozenBlock,
    InputsTape,
    Recorded,
    RecordedBlock,
    attention_halves,
    block,
    block_inputs,
    entered,
    extend_block,
    record_attention,
    record_block,
    record_ffn,
    record_rest,
    skip,
    stream_scale,
    taken_up,
)
from ggjac.blocks.frame import BlockWeights, Frame, NumericsError, WeightMatrix, affine, overflow
from ggjac.blocks.memory import MemoryTape
from ggjac.blocks.mixers import Factor, MixerTape, Past
from ggjac.blocks.networks import FFNTape, HiddenTape
from ggjac.blocks.norms import NormTape, frozen_norm, record_norm
from ggjac.blocks.patterns import ChannelTape, ScanTape, attention_pattern
from ggjac.blocks.streams import StreamsTape, TurnTape, collected, final_streams, renewed

__all__ = [
    "AttentionTape",
    "BlockTape",
    "BlockWeights",
    "ChannelTape",
    "FFNTape",
    "Factor",
    "Frame",
    "FrozenBlock",
    "HiddenTape",
    "InputsTape",
    "MemoryTape",
    "MixerTape",
    "NormTape",
    "NumericsError",
    "Past",
    "Recorded",
    "RecordedBlock",
    "ScanTape",
    "StreamsTape",
    "TurnTape",
    "WeightMatrix",
    "activation",
    "affine",
    "attention_halves",
    "attention_pattern",
    "block",
    "block_inputs",
    "collected",
    "entered",
    "extend_block",
    "final_streams",
    "frozen_norm",
    "overflow",
    "record_attention",
    "record_block",
    "record_ffn",
    "record_norm",
    "record_rest",
    "renewed",
    "skip",
    "stream_scale",
    "taken_up",
]
