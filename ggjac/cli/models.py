"""`ggjac models`: the models that are on this disk already. Imports no torch."""

from typing import Any

import click

from ggjac.cli.help import Command
from ggjac.cli.options import output_format


@click.command(cls=Command)
@output_format
def models(output_format: str) -> None:
    """List the models on this disk, with the name to give to -m.

    Looks where Hugging Face's client, llama.cpp, LM Studio and Ollama keep their files. Only headers are read; nothing
    is downloaded.

    \b
    ggjac models --format json
    """
    from ggjac.cli import render
    from ggjac.gguf import hub, shown
    from ggjac.inventory import local_models
    from ggjac.units import size

    found = local_models()
    if output_format == "json":
        content: dict[str, Any] = {"schema_version": 1, "folders": hub.places()}
        render.emit_json(content | {"models": [model.data() for model in found]})
        return
    names = ["(bundled demo: no -m)" if model.name is None else shown(model.name) for model in found]
    rows = [
        (
            name,
            "" if model.bytes is None else size(model.bytes),
            model.quantization or "",
            shown(model.architecture) if model.architecture else "",
            "yes" if model.supported else "no",
        )
        for name, model in zip(names, found, strict=True)
    ]
    render.table("Models on this disk", ["-m", "#size", "quantization", "architecture", "supported"], rows)
    for name, model in zip(names, found, strict=True):
        if (reason := model.unsupported_because) is not None:
            for begun in (name, shown(model.path or "")):  # some reasons name the model, some its file
                reason = reason.removeprefix(f"{begun}: ")
            render.line(f"{name}: {reason}")
    render.line(f"Looked in {', '.join(hub.places())}")
