"""A model's sizes and options: read from a file's metadata and tensors, and completed with its family's row."""

from ggjac.config.keys import ConfigError
from ggjac.config.model import (
    Adjugates,
    Alibi,
    Compressed,
    Experts,
    Indexer,
    Latent,
    Layer,
    ModelConfig,
    RecurrentSizes,
    Rope,
)
from ggjac.config.read import read_config
from ggjac.config.tensors import EXPERTS_OF_TOKENS, fused_parts, norm_places

__all__ = [
    "EXPERTS_OF_TOKENS",
    "Adjugates",
    "Alibi",
    "Compressed",
    "ConfigError",
    "Experts",
    "Indexer",
    "Latent",
    "Layer",
    "ModelConfig",
    "RecurrentSizes",
    "Rope",
    "fused_parts",
    "norm_places",
    "read_config",
]
