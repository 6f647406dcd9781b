"""A model's sizes and options: read from a file's metadata and tensors, and completed with its family's row."""

from ggjac.config.keys import ConfigError
from ggjac.config.model import Indexer, Latent, Layer, ModelConfig, Recurrence, Rope
from ggjac.config.read import read_config
from ggjac.config.tensors import fused_parts

__all__ = [
    "ConfigError",
    "Indexer",
    "Latent",
    "Layer",
    "ModelConfig",
    "Recurrence",
    "Rope",
    "fused_parts",
    "read_config",
]
