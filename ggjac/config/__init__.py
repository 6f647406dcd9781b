"""A model's sizes and options: read from a file's metadata and tensors, and completed with its family's row."""

from ggjac.config.heads import Head, find_head, heads_of
from ggjac.config.keys import ConfigError
from ggjac.config.model import (
    Adjugates,
    Alibi,
    Compressed,
    Indexer,
    Latent,
    Layer,
    Mixture,
    ModelConfig,
    RecurrentSizes,
    Rope,
)
from ggjac.config.read import read_config
from ggjac.config.tensors import fused_parts, norm_places

__all__ = [
    "Adjugates",
    "Alibi",
    "Compressed",
    "ConfigError",
    "Head",
    "Indexer",
    "Latent",
    "Layer",
    "Mixture",
    "ModelConfig",
    "RecurrentSizes",
    "Rope",
    "find_head",
    "fused_parts",
    "heads_of",
    "norm_places",
    "read_config",
]
