"""Torch tensors in safetensors files, read back with the same bits, dtype and memory layout; a digest verifies them."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ggjac import runs
from ggjac.runs.files import JournalError

# What torch's allocator aligns to, in bytes.
ALIGNMENT = 64

# The dtypes that can be saved, and safetensors' names for them.
NAMES: dict[torch.dtype, str] = {getattr(torch, dtype.torch): name for name, dtype in runs.DTYPES.items()}


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors of the dtypes in `NAMES`, bit by bit, to a safetensors file with a digest, flushed to the disk.

    Raises:
        RunError: as `runs.writing_tensors`.
        ValueError: a tensor of another dtype, or metadata with the reserved name `digest`.
    """
    unknown = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in NAMES]
    if unknown or "digest" in (metadata or {}):
        raise ValueError(f"{path}: cannot be saved: {', '.join(unknown) or 'metadata named digest'}")
    entries = {name: runs.Entry(NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    carried = dict(metadata or {})
    with runs.writing_tensors(path, entries, carried | {"digest": _digest(here, carried)}) as writer:
        for name, entry in entries.items():
            writer.write(name, _bytes(here[name]).view(runs.DTYPES[entry.dtype].array).reshape(entry.shape))


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors that `save_tensors` wrote, each in its own memory on the CPU, and the metadata.

    Verifying the digest takes about a second per GB.

    Raises:
        JournalError: the file is missing, damaged, or was not written by `save_tensors`.
    """
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                mapped = file.get_tensor(name)
                tensors[name] = torch.empty(mapped.shape, dtype=mapped.dtype)
                # As bytes: copying would turn a damaged bool into a valid one, and the digest would match.
                tensors[name].reshape(-1).view(torch.uint8).copy_(mapped.reshape(-1).view(torch.uint8))
    except (SafetensorError, OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "is damaged, or not a safetensors file"
        raise JournalError(f"{path}: {reason} ({runs.one_line(error)})") from error
    digest = metadata.pop("digest", None)
    if digest is None or not {tensor.dtype for tensor in tensors.values()} <= NAMES.keys():
        raise JournalError(f"{path}: was not written by ggjac (it has no digest)")
    if digest != _digest(tensors, metadata):
        raise JournalError(f"{path}: is damaged (its content does not match its digest)")
    return tensors, metadata


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor laid out as if read back from disk: itself where it is contiguous and aligned, else a copy."""
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= max(size, 1)
    if tensor.stride() == tuple(reversed(strides)) and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach())


def _bytes(tensor: Tensor) -> np.ndarray:
    """Return a tensor's bytes, in the order of its elements."""
    # `contiguous` is not enough: it accepts an empty tensor with any strides, which cannot be viewed as bytes.
    return plain(tensor.detach().cpu()).reshape(-1).view(torch.uint8).numpy()


def hash_tensor(hasher: "hashlib.blake2b", tensor: Tensor) -> None:
    """Add a tensor to a hash: dtype, shape and bytes."""
    hasher.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    hasher.update(_bytes(tensor).data)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return a hash of everything that a file holds."""
    hasher = hashlib.blake2b(canonical([sorted(metadata.items()), sorted(tensors)]), digest_size=16)
    for name in sorted(tensors):
        hash_tensor(hasher, tensors[name])
    return hasher.hexdigest()


def canonical(content: Any) -> bytes:
    """Return JSON in which equal contents are equal bytes."""
    return json.dumps(content, sort_keys=True).encode()
