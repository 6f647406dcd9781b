"""`ggjac info`: what is in a GGUF file. Imports no torch."""

import textwrap
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ggjac.architectures import ARCHITECTURES
from ggjac.cli.options import model_file, output_format

if TYPE_CHECKING:
    from ggjac.gguf import GGUFFile

FAULTS = 20  # of tensors, that a table shows
_SUPPORTED = textwrap.fill(f"Supported architectures: {', '.join(ARCHITECTURES)}.", 76, break_on_hyphens=False)


@click.command(epilog=f"\b\n{_SUPPORTED}")
@model_file
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--tokenizer", is_flag=True, help="Also show the tokenizer's keys.")
@click.option(
    "--check",
    "whole",
    is_flag=True,
    help="Read the whole file: hash it, compare with the hash that Hugging Face or Ollama gave, look at every tensor.",
)
@output_format
@click.pass_context
def info(
    ctx: click.Context, model: Path | None, tensors: bool, tokenizer: bool, whole: bool, output_format: str
) -> None:
    """Show what is in a GGUF file: metadata, tensor types and their sizes, and whether ggjac can run it.

    --check reads all of it: some seconds per GB. Exit code 3 if the file is not what its name in a store promises, or a
    tensor holds NaN, infinity or stretches of zeros.

    \b
    ggjac info -m model.gguf
    """
    from ggjac.config import ConfigError, read_config
    from ggjac.gguf import LazyArray, open_gguf, shown
    from ggjac.gguf.hub import demo_path
    from ggjac.gguf.types import holds_weights

    with open_gguf(model or demo_path()) as file:
        reason = None
        try:
            read_config(file.metadata, {name: t.shape for name, t in file.tensors.items()})
        except ConfigError as error:
            reason = str(error)
        for tensor in file.tensors.values():
            if reason is None and not holds_weights(tensor.type):
                reason = f"tensor {shown(tensor.name)}: type {tensor.type.name} is not supported"
        kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for tensor in file.tensors.values():
            for i, amount in enumerate((1, tensor.elements, tensor.nbytes)):
                kinds[tensor.type.name][i] += amount
        shown_keys = {k: v for k, v in file.metadata.items() if tokenizer or not k.startswith("tokenizer.")}
        weights = sum(amount[1] for amount in kinds.values())
        content: dict[str, Any] = {
            "schema_version": 1,
            "path": str(file.path),
            "files": len(file.paths),
            "gguf_version": file.version,
            "bytes": file.nbytes,
            "fingerprint": file.fingerprint(),
            "supported": reason is None,
            "unsupported_because": reason,
            "weights": weights,
            "types": {
                name: {"tensors": count, "weights": elements, "bytes": nbytes}
                for name, (count, elements, nbytes) in sorted(kinds.items(), key=lambda item: -item[1][2])
            },
            "metadata": {
                key: {"array_of": value.element_type, "length": len(value)} if isinstance(value, LazyArray) else value
                for key, value in shown_keys.items()
            },
        }
        if tensors:
            content["tensors"] = [
                {"name": t.name, "type": t.type.name, "shape": list(t.shape), "bytes": t.nbytes, "offset": t.offset}
                for t in file.tensors.values()
            ]

        found = _checked(file) if whole else None
        content |= {"check": found} if found else {}

    from ggjac.cli import render
    from ggjac.units import size

    exit_code = 3 if found and not found["passed"] else 0
    if output_format == "json":
        render.emit_json(content)
        ctx.exit(exit_code)
    render.line(f"{shown(file.path)}: GGUF version {file.version}, {size(file.nbytes)}, {weights:,} weights")
    render.line(f"Supported: {'yes' if reason is None else f'no: {reason}'}")
    render.line(f"Fingerprint: {content['fingerprint']}")
    render.line("")
    render.table(
        "Tensor types",
        ["type", "#tensors", "#weights", "#size", "#bits/weight"],
        [
            (
                k,
                t["tensors"],
                f"{t['weights']:,}",
                size(t["bytes"]),
                f"{8 * t['bytes'] / max(1, t['weights']):.2f}",
            )
            for k, t in content["types"].items()
        ],
    )
    render.table("Metadata", ["key", "value"], [(shown(key), _brief(value)) for key, value in shown_keys.items()])
    if tensors:
        rows = [
            (shown(t["name"]), t["type"], " x ".join(map(str, t["shape"])), size(t["bytes"]))
            for t in content["tensors"]
        ]
        render.table("Tensors", ["name", "type", "shape", "#size"], rows)
    if found:
        _show_check(found)
    ctx.exit(exit_code)


def _checked(file: "GGUFFile") -> dict[str, Any]:
    """Read the whole file, with progress; return what was found as plain data."""
    from ggjac.cli.progress import Reporter
    from ggjac.weights.check import check

    with Reporter(quiet=False).stage("check") as report:
        found = check(file, report)
    shards = [
        {"path": str(s.path), "sha256": s.sha256, "expected": s.expected and s.expected._asdict(), "same": s.same}
        for s in found.shards
    ]
    return {"passed": found.passed, "files": shards, "faults": found.faults}


def _show_check(found: dict[str, Any]) -> None:
    """Print the hash of every file, whether it is the expected one, and what is wrong with tensors."""
    from ggjac.cli.render import line
    from ggjac.gguf import shown

    for shard in found["files"]:
        line(f"SHA-256 of {shown(shard['path'])}: {shard['sha256']}")
        if not (expected := shard["expected"]):
            line("  no store on this disk says what it should be; compare it with the page of the download")
            continue
        stated = f"{expected['algorithm']} {expected['value']} ({shown(expected['source'])})"
        line(f"  as expected: {stated}" if shard["same"] else f"  NOT as expected: {stated}; download it again")
    for fault in found["faults"][:FAULTS]:
        line(f"  {shown(fault)}")
    if (more := len(found["faults"]) - FAULTS) > 0:
        line(f"  and {more} more: --format json")
    if found["faults"]:
        line("Tensors: NOT as a trained model has them")
    else:
        line("Tensors: no NaN, no infinity, no stretches of zeros")


def _brief(value: Any) -> str:
    """Return a value on one line: text escaped and cut, arrays by their first elements."""
    from ggjac.gguf import LazyArray, shown

    if isinstance(value, LazyArray):
        more = ", …" if len(value) > 6 else ""
        return f"{len(value)} x {value.element_type}: [{', '.join(_brief(entry) for entry in value[:6])}{more}]"
    text = shown(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}…"
