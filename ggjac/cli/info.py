"""`ggjac info`: what is in a GGUF file. Imports no torch."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ggjac.architectures import ARCHITECTURES
from ggjac.cli.help import Command
from ggjac.cli.options import asked_name, model_file, output_format

if TYPE_CHECKING:
    from ggjac.gguf import GGUFFile

FAULTS = 20  # of tensors, that a table shows
_SUPPORTED = textwrap.fill(f"Supported architectures: {', '.join(ARCHITECTURES)}.", 76, break_on_hyphens=False)


@click.command(cls=Command, epilog=f"\b\n{_SUPPORTED}")
@model_file
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--tokenizer", is_flag=True, help="Also list the tokenizer's keys.")
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
    from ggjac.cli import render
    from ggjac.gguf import open_gguf, shown
    from ggjac.gguf.hub import demo_path
    from ggjac.inventory import contents
    from ggjac.units import size

    with open_gguf(model or demo_path()) as file:
        asked = asked_name(model)
        content = {"asked": asked} | contents(file, tensors=tensors)
        keys = {key: value for key, value in file.metadata.items() if tokenizer or not key.startswith("tokenizer.")}
        content["metadata"] = {key: content["metadata"][key] for key in keys}
        found = _checked(file) if whole else None
        content |= {"check": found} if found else {}

    exit_code = 3 if found and not found["passed"] else 0
    if output_format == "json":
        render.emit_json(content)
        ctx.exit(exit_code)
    summary = f"GGUF version {file.version}, {size(file.nbytes)}, {content['weights']:,} weights"
    name = shown(file.path) if asked is None else f"{shown(asked)} ({shown(file.path)})"
    render.line(f"{name}: {summary}")
    reason = content["unsupported_because"]
    render.line(f"Supported: {'yes' if reason is None else f'no: {reason}'}")
    render.line(f"Tokenizer: {_tokenizer(content['tokenizer'])}")
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
    render.table("Metadata", ["key", "value"], [(shown(key), _brief(value)) for key, value in keys.items()])
    if tensors:
        rows = [
            (shown(t["name"]), t["type"], " x ".join(map(str, t["shape"])), size(t["bytes"]))
            for t in content["tensors"]
        ]
        render.table("Tensors", ["name", "type", "shape", "#size"], rows)
    if found:
        _show_check(found)
    else:
        render.line("Only the header was read; --check also looks for damage: NaN, infinity, stretches of zeros")
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


def _tokenizer(found: dict[str, Any]) -> str:
    """Return what a file says about its tokenizer, on one line."""
    from ggjac.gguf import shown
    from ggjac.tokenizer import NO_TOKENIZER

    if found["model"] in NO_TOKENIZER:
        return "none; give token ids, as in --tokens 1,2,3"
    answers = {True: "yes", False: "no", None: "not stated (llama.cpp decides by the kind)"}
    added = []
    for key in ("bos", "eos"):
        token = found[key]
        named = f" ({shown(token['text'])}, id {token['id']})" if token and found[f"adds_{key}"] is not False else ""
        added.append(f"adds {key.upper()}: {answers[found[f'adds_{key}']]}{named}")
    kind = shown(found["model"]) + (f", pre-tokenizer {shown(found['pre'])}" if found["pre"] is not None else "")
    template = "yes" if found["chat_template"] else "no"
    return f"{kind}; {found['tokens']:,} tokens; {'; '.join(added)}; chat template: {template}"


def _brief(value: Any) -> str:
    """Return a value on one line: text escaped and cut, arrays by their first elements."""
    from ggjac.gguf import LazyArray, shown

    if isinstance(value, LazyArray):
        more = ", …" if len(value) > 6 else ""
        return f"{len(value)} x {value.element_type}: [{', '.join(_brief(entry) for entry in value[:6])}{more}]"
    text = shown(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}…"
