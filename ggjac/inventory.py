"""The models on this disk: what each file is, and whether ggjac can run it. Imports no torch."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ggjac.config import ConfigError, read_config
from ggjac.gguf import GGUFError, GGUFFile, LazyArray, hub, open_gguf, shown
from ggjac.gguf.types import FILE_TYPES, possible


@dataclass(frozen=True)
class LocalModel:
    """One model on this disk, as `local_models` returns it.

    Attributes:
        name: what `open_model` and `-m` take: a name such as `ollama:llama3.2:latest`, or the path; None for the demo,
            which they open without one.
        store: the program whose folder holds it: Hugging Face, llama.cpp, LM Studio, Ollama or ggjac.
        path: of the file, or of the first shard; None if it is not known.
        bytes: of all shards, on disk; None if they cannot be opened, as the next two.
        quantization: as the file states it, or the type of most weights.
        architecture: as the file states it.
        unsupported_because: why it cannot be run, or None.
    """

    name: str | None
    store: str
    path: str | None
    bytes: int | None
    quantization: str | None
    architecture: str | None
    unsupported_because: str | None

    @property
    def supported(self) -> bool:
        """Whether ggjac can run it."""
        return self.unsupported_because is None

    def data(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "supported": self.supported}


def local_models() -> list[LocalModel]:
    """Return the models in the folders of Hugging Face's client, llama.cpp, LM Studio and Ollama, and the bundled demo.

    Only headers are read, and nothing is downloaded. A file that cannot be read is listed with the reason.
    """
    return [_described(found) for found in hub.stored()]


def unsupported(file: GGUFFile) -> str | None:
    """Return why ggjac cannot run a file, or None if it can."""
    try:
        read_config(file.metadata, {name: tensor.shape for name, tensor in file.tensors.items()})
    except ConfigError as error:
        return str(error)
    for tensor in file.tensors.values():
        if tensor.type.name not in possible(tensor.name):
            return f"tensor {shown(tensor.name)}: type {tensor.type.name} is not supported"
    return None


def architecture(file: GGUFFile) -> str | None:
    """Return the architecture that a file states, if it is text."""
    stated = file.metadata.get("general.architecture")
    return stated if isinstance(stated, str) else None


def quantization(file: GGUFFile) -> str | None:
    """Return the name of a file's mixture of types, or the type of most of its weights; None if it has none."""
    stated = file.metadata.get("general.file_type")
    if isinstance(stated, int) and (name := FILE_TYPES.get(stated)):
        return name
    elements: dict[str, int] = defaultdict(int)
    for tensor in file.tensors.values():
        elements[tensor.type.name] += tensor.elements
    return max(elements, key=lambda name: elements[name], default=None)


def vocabulary(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says about its tokenizer: its kind, its tokens, and what a prompt gets besides its text.

    Whether a prompt gets BOS and EOS is None where the file does not say so: then llama.cpp decides by the kind.
    """

    def stated(key: str, kind: type) -> Any:
        value = metadata.get(f"tokenizer.{key}")
        return value if type(value) is kind else None

    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, LazyArray) and tokens.element_type == "STRING" else ()

    def token(key: str) -> dict[str, Any] | None:
        id = stated(f"ggml.{key}_token_id", int)
        return {"id": id, "text": tokens[id]} if id is not None and 0 <= id < len(tokens) else None

    return {
        "model": stated("ggml.model", str),
        "pre": stated("ggml.pre", str),
        "tokens": len(tokens),
        "adds_bos": stated("ggml.add_bos_token", bool),
        "adds_eos": stated("ggml.add_eos_token", bool),
        "bos": token("bos"),
        "eos": token("eos"),
        "chat_template": stated("chat_template", str) is not None,
    }


def contents(file: GGUFFile, *, tensors: bool = False) -> dict[str, Any]:
    """Return what is in a file as plain data, the JSON of `ggjac info`; arrays of the metadata by type and length.

    With `tensors` every tensor is listed.
    """
    kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for tensor in file.tensors.values():
        for i, amount in enumerate((1, tensor.elements, tensor.nbytes)):
            kinds[tensor.type.name][i] += amount
    reason = unsupported(file)
    content: dict[str, Any] = {
        "schema_version": 1,
        "path": str(file.path),
        "files": len(file.paths),
        "gguf_version": file.version,
        "bytes": file.nbytes,
        "fingerprint": file.fingerprint(),
        "supported": reason is None,
        "unsupported_because": reason,
        "architecture": architecture(file),
        "quantization": quantization(file),
        "tokenizer": vocabulary(file.metadata),
        "weights": sum(elements for _, elements, _ in kinds.values()),
        "types": {
            name: {"tensors": count, "weights": elements, "bytes": nbytes}
            for name, (count, elements, nbytes) in sorted(kinds.items(), key=lambda item: -item[1][2])
        },
        "metadata": {
            key: {"array_of": value.element_type, "length": len(value)} if isinstance(value, LazyArray) else value
            for key, value in file.metadata.items()
        },
    }
    if tensors:
        content["tensors"] = [
            {"name": t.name, "type": t.type.name, "shape": list(t.shape), "bytes": t.nbytes, "offset": t.offset}
            for t in file.tensors.values()
        ]
    return content


def _described(found: hub.Stored) -> LocalModel:
    path = None if found.path is None else str(found.path)
    if found.path is None or found.flaw:
        return LocalModel(found.name, found.store, path, None, None, None, found.flaw)
    try:
        with open_gguf(found.path) as file:
            kind, mixture = architecture(file), quantization(file)
            return LocalModel(found.name, found.store, path, file.nbytes, mixture, kind, unsupported(file))
    except GGUFError as error:
        return LocalModel(found.name, found.store, path, None, None, None, str(error))
