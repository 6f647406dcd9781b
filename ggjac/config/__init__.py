"""A model's sizes and options: read from a file's metadata and tensors, and completed with its family's row."""

from ggjac.config.keys import ConfigError
from ggjac.config.model import Alibi, Indexer, Latent, Layer, ModelConfig, Recurrence, Rope
from ggjac.config.read import read_config
from ggjac.config.tensors import fused_parts, norm_places

__all__ = [
    "Alibi",
    "ConfigError",
    "Indexer",
    "Latent",
    "Layer",
    "ModelConfig",
    "Recurrence",
    "Rope",
    "fused_parts",
    "norm_places",
    "read_config",
]
