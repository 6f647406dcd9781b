"""Control vector files: a direction that llama.cpp adds to the residual stream of every position.

A GGUF of architecture `controlvector` with float32 tensors `direction.N` `[d]`, N from 1 (llama.cpp:
common_control_vector_load in common/common.cpp). llama.cpp adds `direction.N` to the output of block `N`, counted from
0 (llama_adapter_cvec in src/llama-adapter.cpp): to the residual stream after `N + 1` blocks. Block 0 and the embeddings
have none.

    llama-cli -m model.gguf --control-vector file.gguf      (or --control-vector-scaled file.gguf:0.5)
"""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from ggjac import runs

ARCHITECTURE = "controlvector"


class ControlVectorError(ValueError):
    """A direction that llama.cpp cannot add."""


def save_control_vector(
    path: str | os.PathLike[str],
    direction: Float[Tensor, " d"],
    *,
    layer: int,
    block_count: int,
    architecture: str,
) -> None:
    """Write a control vector that adds a direction to the residual stream after `layer` blocks, and zeros elsewhere.

    Args:
        path: of the file, which is written atomically.
        direction: `[d]`, written in float32.
        layer: number of blocks applied, 2 to `block_count`.
        block_count: of the model.
        architecture: `general.architecture` of the model, stored as a hint for readers of the file.

    Raises:
        ControlVectorError: llama.cpp cannot add to that layer, or the direction is not finite in float32.
        RunError: the file cannot be written.
    """
    check_layer(layer, block_count)
    values = direction.detach().cpu().float().numpy()
    if not np.isfinite(values).all():
        raise ControlVectorError("the direction is not finite in float32; nothing was written")
    runs.check_writable(path)
    runs.save_bytes(path, _encoded(values, layer - 1, block_count - 1, architecture, Path(path).parent))


def check_layer(layer: int, block_count: int) -> None:
    """Refuse a layer to which llama.cpp cannot add a control vector.

    Raises:
        ControlVectorError: names the layers that are possible.
    """
    if block_count < 2:
        raise ControlVectorError("llama.cpp adds control vectors after 2 blocks or more, but this model has one")
    if not 2 <= layer <= block_count:
        raise ControlVectorError(
            f"llama.cpp adds control vectors to the residual stream after 2 to {block_count} blocks of this model, "
            f"not after {layer}; choose another layer"
        )


def check_stream(architecture: str, *, adds: bool, streams: int) -> None:
    """Refuse an architecture whose stream llama.cpp does not change as steering does.

    Args:
        architecture: for the message.
        adds: whether llama.cpp adds a control vector there.
        streams: number of residual streams that are steered.

    Raises:
        ControlVectorError: it adds none, or one direction is not enough.
    """
    if not adds:
        raise ControlVectorError(
            f"llama.cpp adds no control vector to the stream of {architecture} models; leave out "
            "--export-control-vector"
        )
    if streams > 1:
        raise ControlVectorError(
            f"a control vector has one direction after a block, but in this model {streams} residual streams are "
            "steered; leave out --export-control-vector"
        )


def _encoded(values: np.ndarray, block: int, count: int, architecture: str, beside: Path) -> bytes:
    """Return the file's bytes; gguf-py writes files only, so one is made in a folder `beside`."""
    import tempfile

    import gguf

    with tempfile.TemporaryDirectory(prefix=".ggjac-", dir=beside) as folder:
        path = Path(folder) / "control-vector.gguf"
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", architecture)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", count)
        for i in range(1, count + 1):
            writer.add_tensor(f"direction.{i}", values if i == block else np.zeros_like(values))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()
