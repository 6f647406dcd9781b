"""A command's plan: made from its options, printed as a table or JSON. Imports no torch before it measures."""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ggjac.cli.options import MapCount, ModelOptions
from ggjac.planner import Budget, LayerPlan, Plan, Times

PLACES = {
    "file": "in the file",
    "dense": "dense, ready to multiply",
    "device": "quantized, on the device",
    "pinned": "quantized, in RAM",
}


def show_plan(
    what: ModelOptions,
    command: str,
    *,
    rank: int = 8,
    position: int = -1,
    maps: MapCount | None = None,
    bench: bool = True,
    output_format: str = "table",
) -> None:
    """Print the plan of a command; exit with code 4 if it does not fit."""
    from ggjac.cli import render
    from ggjac.config import ModelConfig
    from ggjac.demo import demo_path
    from ggjac.gguf import open_gguf

    with open_gguf(what.model or demo_path()) as file:
        config = ModelConfig.from_metadata(file.metadata, {name: t.shape for name, t in file.tensors.items()})
        n = _count_tokens(what, file, config)
        made = make_plan(what, file, config, n, command, rank=rank, position=position, maps=maps)
        if output_format == "table":
            _show_memory(made, file.path)
        times = rates = None
        if bench and made.fits:
            from ggjac import bench as measure
            from ggjac.machine import cached_bytes

            rates = measure.measure(
                file,
                made.columns,
                made.trace.types,
                dtype=made.dtype,
                threads=what.threads,
                device="cpu" if made.device == "cpu" else what.device.replace("auto", "cuda"),
            )
            cached = [cached_bytes(path) for path in file.paths]
            known = None if None in cached else sum(filter(None, cached))
            times = made.seconds(rates, cached=known)
        if output_format == "json":
            content = plan_data(made) | {"schema_version": 1, "path": str(file.path)}
            if times and rates:
                content |= {"rates": rates.data(), "times": times_data(times)}
            render.emit_json(content)
        elif times and rates:
            _show_times(made, times, rates.lines())
    if not made.fits:
        from ggjac.planner import check

        if output_format == "json":
            click.get_current_context().exit(4)
        check(made)


def make_plan(
    what: ModelOptions,
    file: Any,
    config: Any,
    n: int,
    command: str,
    *,
    rank: int = 8,
    position: int = -1,
    maps: MapCount | None = None,
) -> Plan:
    """Return the plan of a command with the options given.

    Dense rows come all at once if the memory allows it; tapes go to the `--trace` folder only if they must.

    `maps` tells for a number of blocks how many maps inside the network advance together.

    Raises:
        click.UsageError: the prompt is too long, or rank or position are out of range.
    """
    import os

    from ggjac import machine, planner

    device = _device(what.device)
    vram = what.vram_budget
    if device == "cuda" and vram is None:
        number = what.device.partition(":")[2]
        memory = machine.gpu_memory(int(number) if number.isdigit() else 0)
        vram = memory[0] if memory else None

    def made(*, tapes_on_disk: bool = False, chunk_bytes: int | None = None) -> Plan:
        return planner.make(
            file,
            config,
            n,
            planner.job(
                command,
                config,
                n,
                what.dtype,
                rank=rank,
                maps=maps and maps(config.block_count),
                chunk_bytes=chunk_bytes,
            ),
            dtype=what.dtype,
            mlp_path=what.mlp_path,
            device=device,
            position=position,
            threads=what.threads or os.cpu_count() or 1,
            budget=Budget(machine.default_budget() if what.ram_budget is None else what.ram_budget, vram),
            tapes_on_disk=tapes_on_disk,
        )

    try:
        whole = planner.all_rows(config, n, what.dtype)
        if command == "jacobian" and whole > planner.CHUNK_BYTES and (plan := made(chunk_bytes=whole)).fits:
            return plan
        plan = made()
        return plan if plan.fits or what.trace is None else made(tapes_on_disk=True)
    except planner.PlanError as error:
        raise click.UsageError(str(error)) from error


def _device(name: str) -> str:
    """Return `"cpu"` or `"cuda"`; `auto` means what torch would find, asked without importing it."""
    if name != "auto":
        return "cpu" if name.startswith("cpu") else "cuda"
    from ggjac.machine import gpu_memory

    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else None
    with_cuda = folder is not None and any((folder / f).exists() for f in ("libtorch_cuda.so", "torch_cuda.dll"))
    return "cuda" if with_cuda and gpu_memory() else "cpu"


def _count_tokens(what: ModelOptions, file: Any, config: Any) -> int:
    """Return the prompt's length; a text is tokenized by llama.cpp, token ids need nothing."""
    from ggjac.tokenizer import open_tokenizer

    text = what.text()
    if text is None:
        ids = what.tokens or []
    elif not text:
        raise click.UsageError("the prompt is empty; give a text with -p or token ids with --tokens")
    else:
        keys = {key: file.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "model")}
        types = file.metadata.get("tokenizer.ggml.token_type")
        ids = open_tokenizer(file.path, types=types, **keys).encode(text)
    for i in ids:
        if not 0 <= i < config.vocabulary:
            raise click.UsageError(f"token id {i} is out of range; the vocabulary has ids 0 to {config.vocabulary - 1}")
    return len(ids)


def plan_data(made: Plan) -> dict[str, Any]:
    """Return a plan as plain data: bytes, weights, FLOP."""
    return {
        "command": made.job.name,
        "tokens": made.n,
        "dtype": made.dtype,
        "mlp_path": made.mlp_path,
        "device": made.device,
        "sweeps": [asdict(part) for part in made.job.sweeps],
        "layers": [
            {
                "index": layer.index,
                "stored_bytes": layer.stored_bytes,
                "sweep_bytes": layer.sweep.nbytes,
                "live_weights": layer.sweep.weights,
                "sweep_flop_per_vector": layer.sweep.flop,
                "trace_bytes": layer.trace.nbytes,
                "trace_flop": layer.trace.flop,
                "dense_bytes": layer.dense_bytes,
                "tape_bytes": layer.tape_bytes,
                "place": layer.place,
            }
            for layer in made.layers
        ],
        "trace": {"bytes": made.trace.nbytes, "flop": made.trace.flop},
        "sweep": {"bytes": made.sweep.nbytes, "weights": made.sweep.weights, "flop_per_vector": made.sweep.flop},
        "ram": dict(made.ram),
        "ram_needed": made.ram_needed,
        "ram_peak": made.ram_peak,
        "ram_budget": made.budget.ram,
        "vram": dict(made.vram),
        "vram_needed": made.vram_needed,
        "vram_peak": made.vram_peak,
        "vram_budget": made.budget.vram,
        "tapes_on_disk": made.tapes_on_disk,
        "fits": made.fits,
        "misfit": made.misfit,
    }


def times_data(times: Times) -> dict[str, Any]:
    """Return times as plain data, in seconds."""
    parts = [asdict(part) | {"each": part.each, "total": part.total} for part in times.parts]
    return {"total": times.total, "parts": parts}


def _alike(layers: Sequence[LayerPlan]) -> Iterator[tuple[str, LayerPlan]]:
    """Yield sorts of layers that differ in nothing but their number: `0-3, 7` and the first of them."""
    sorts: dict[tuple, list[LayerPlan]] = {}
    for layer in layers:
        passes = layer.sweep.nbytes, layer.sweep.flop, layer.trace.nbytes
        facts = layer.stored_bytes, *passes, layer.dense_bytes, layer.tape_bytes, layer.place
        sorts.setdefault(facts, []).append(layer)
    for alike in sorts.values():
        spans: list[list[int]] = []
        for layer in alike:
            if spans and layer.index == spans[-1][1] + 1:
                spans[-1][1] = layer.index
            else:
                spans.append([layer.index, layer.index])
        yield ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in spans), alike[0]


def _show_memory(made: Plan, path: Path) -> None:
    """Print layers, memory and the verdict."""
    from ggjac.cli import render
    from ggjac.gguf import shown

    size = render.size
    render.line(
        f"{shown(path)}: {size(made.file_bytes)}, {len(made.layers)} layers; ggjac {made.job.name}, {made.n} tokens, "
        f"{made.dtype}, on the {'CPU' if made.device == 'cpu' else 'GPU'}"
    )
    render.line("")
    rows = [
        (
            name,
            size(layer.stored_bytes),
            size(layer.sweep.nbytes),
            f"{layer.sweep.weights / 1e6:.1f} M",
            size(layer.dense_bytes),
            size(layer.tape_bytes),
            f"{layer.sweep.flop / 1e9:.3f}",
            PLACES[layer.place],
        )
        for name, layer in _alike(made.layers)
    ]
    columns = ["layer", "#stored", "#a sweep reads", "#live weights", "#dense", "#tape", "#GFLOP/vector", "waits"]
    render.table("Each layer", columns, rows)
    sweeps = [
        (part.what, part.count, part.vectors, f"{part.vectors * made.sweep.flop / 1e9:.3g}") for part in made.job.sweeps
    ]
    total = f"a sweep reads {size(made.sweep.nbytes)}, the trace {size(made.trace.nbytes)}"
    if sweeps:
        render.table(f"Sweeps ({total})", ["for", "#sweeps", "#stacked vectors", "#GFLOP each"], sweeps)
    for kind, parts, needed, peak, budget in (
        ("Memory", made.ram, made.ram_needed, made.ram_peak, made.budget.ram),
        ("Device memory", made.vram, made.vram_needed, made.vram_peak, made.budget.vram),
    ):
        if parts:
            sums = [*parts.items(), ("needed", needed), ("layers kept ready", peak - needed), ("peak", peak)]
            sums += [] if budget is None else [("budget", budget)]
            render.table(f"{kind} at the peak", ["part", "#size"], [(part, size(nbytes)) for part, nbytes in sums])
    if made.fits:
        render.line("Fits.")


def _show_times(made: Plan, times: Times, rates: Sequence[str]) -> None:
    """Print the time part."""
    from ggjac.cli import render

    render.line("")
    rows = [
        (
            part.what,
            part.count,
            *(_seconds(t) for t in (part.disk, part.dequantize, part.gemm, part.calls, part.each, part.total)),
        )
        for part in times.parts
    ]
    columns = ["part", "#times", "#disk", "#dequantize", "#multiply", "#calls", "#each", "#total"]
    render.table("Time in seconds: the slower of disk and of dequantizing, then multiplying", columns, rows)
    render.line(f"In all about {_duration(times.total)}, for the sweeps that are usual; tolerance and spectrum decide.")
    for text in rates:
        render.line(f"  {text}")


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _duration(seconds: float) -> str:
    """Return a time for people."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    if seconds < 1:  # then starting up is what takes time
        return "a second"
    return f"{seconds:.2g} seconds"
