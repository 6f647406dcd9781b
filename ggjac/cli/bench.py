"""`ggjac bench`: the throughput of this machine, and what limits it."""

from pathlib import Path
from typing import Any

import click

from ggjac.cli import options
from ggjac.cli.help import Command


@click.command(cls=Command)
@options.model_file
@options.threads
@options.device
@options.output_format
def bench(model: Path | None, threads: int | None, device: str, output_format: str) -> None:
    """Measure this machine: disk, dequantization of the file's own types, multiplication, each with its limit.

    The limit of dequantization is a plain copy of as many bytes in memory; that of multiplication is the rate of square
    matrices, which small tiles in the cache and noise can exceed. Takes a few seconds.

    \b
    ggjac bench -m model.gguf
    """
    from collections import Counter

    from ggjac.cli import render
    from ggjac.cli.planning import check_device
    from ggjac.gguf import open_gguf, shown
    from ggjac.gguf.hub import demo_path
    from ggjac.gguf.types import holds_weights
    from ggjac.planner import bench as measure
    from ggjac.planner.machine import default_budget, free_memory, total_memory
    from ggjac.sizes import LARGE_PIECES, SMALL_PIECES
    from ggjac.units import size

    device = str(check_device(device))
    with open_gguf(model or demo_path()) as file:
        types: Counter[str] = Counter()
        for info in file.tensors.values():
            if holds_weights(info.type) and len(info.shape) > 1:
                types[info.type.name] += info.elements
        tile = (SMALL_PIECES if device == "cpu" else LARGE_PIECES).tile
        results = [
            measure.measure(file, (8, 64, 256), types, dtype=dtype, threads=threads, device=device, tile=tile)
            for dtype in ("float32", "bfloat16")
        ]
        square = {found.dtype: measure.square_rate(found.dtype, device, found.threads) for found in results}
        first = results[0]
        rows: list[dict[str, Any]] = [
            _row(f"disk, sequential ({first.disk_method})", first.disk, "B/s", None, ""),
            _row("memory copy, read and written", first.copy, "B/s", None, ""),
        ]
        if device != "cpu":
            pinned = measure.pinned_rate(device)
            rows.append(_row("to the device, as tiles travel", first.bus, "B/s", pinned, "a copy from pinned memory"))
        for found in results:
            for name, rate in found.types.items():
                moved = measure.moved_bytes(file, name, found.dtype)
                limit = found.copy / moved if device == "cpu" else None
                rows.append(_row(f"dequantize {name} to {found.dtype}", rate, "weights/s", limit, "memory copy"))
        for found in results:
            limit = square[found.dtype]
            rows.append(_row(f"multiply square matrices, {found.dtype}", limit, "FLOP/s", None, ""))
            for columns, rate in found.multiply.items():
                what = f"multiply a tile with {columns} columns, {found.dtype}"
                rows.append(_row(what, rate, "FLOP/s", limit, "square matrices"))
        content: dict[str, Any] = {
            "schema_version": 1,
            "path": str(file.path),
            "threads": first.threads,
            "device": device,
            "memory": {"total": total_memory(), "free": free_memory(), "default_budget": default_budget()},
            "rates": rows,
        }
    if output_format == "json":
        render.emit_json(content)
        return
    memory = content["memory"]
    render.line(
        f"{shown(content['path'])}; {first.threads} threads, {device}; {size(memory['free'])} of "
        f"{size(memory['total'])} free, default --ram-budget {size(memory['default_budget'])}"
    )
    render.line("")
    cells = [
        (
            row["what"],
            f"{row['rate'] / 1e9:.3g} G{row['unit']}",
            "" if row["limit"] is None else f"{row['limit'] / 1e9:.3g}",
            "" if row["limit"] is None else f"{row['rate'] / row['limit']:.0%}" if not _above(row) else "above",
            "" if row["limit"] is None else row["limited_by"],
        )
        for row in rows
    ]
    render.table("Measured throughput", ["operation", "#rate", "#limit", "#% of limit", "limited by"], cells)
    if any(map(_above, rows)):
        render.line(
            "above: faster than what limits it, so that one of the two was measured while other programs ran: measure "
            "again"
        )


def _above(row: dict[str, Any]) -> bool:
    """Return whether a rate is beyond its limit by more than caches and noise explain."""
    return row["limit"] is not None and row["rate"] > 1.25 * row["limit"]


def _row(what: str, rate: float, unit: str, limit: float | None, limited_by: str) -> dict[str, Any]:
    """Return one measurement as plain data; rates are per second."""
    return {"what": what, "rate": rate, "unit": unit, "limit": limit, "limited_by": limited_by}
