"""The plan of a command, from its options, printed as tables or JSON. Torch is imported only to measure the machine."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ggjac.cli import together
from ggjac.cli.options import Many, ModelOptions, depths_of, part
from ggjac.sizes import HEADS_READ

if TYPE_CHECKING:
    import torch

    from ggjac.config import ModelConfig
    from ggjac.gguf import GGUFFile
    from ggjac.planner import LayerPlan, Network, Plan, Times, bench

PATIENCE = 600.0  # seconds; of what takes longer, a user is warned before it starts
PLACES = {
    "file": "in the file",
    "dense": "dense, ready to multiply",
    "device": "quantized, on the device",
    "pinned": "quantized, in RAM",
}
# Options of commands that are fields of `ggjac.planner.work.Request` by the same name.
_SAME = (
    *("rank", "by", "count", "contrast", "per_token", "input_position", "exclude", "search_dtype"),
    *("maps", "kinds", "transport"),
    *("method", "layer", "max_tokens", "control", "at", "random"),
    *("ablate", "head", "parts"),
)


class Shared(NamedTuple):
    """Processes that share a model, of which one is planned.

    Attributes:
        ranks: their number.
        rate: of the network between them, bytes per second; None leaves its time out.
        latency: of it, in seconds.
    """

    ranks: int
    rate: float | None = None
    latency: float = 0.0

    @property
    def network(self) -> "Network | None":
        """The network, if its rate is known."""
        from ggjac.planner import Network

        return Network(self.rate, self.latency) if self.rate else None


def dry_run(command: Callable) -> Callable:
    """Add `--dry-run`, which prints the command's plan instead of running it; apply below the options that it plans."""

    @wraps(command)
    def wrapped(what: ModelOptions, *, dry_run: bool, no_bench: bool, **rest: Any) -> Any:
        if not dry_run:
            return command(what, **rest)
        context = click.get_current_context()
        name = context.info_name or ""
        together.refuse(name, context.params | {"trace": what.trace})
        form = "json" if rest.get("output_format") == "json" else "table"
        return show_plan(what, name, rest, bench=not no_bench, output_format=form)

    words = "Print the memory, the sweeps and the time that the command needs, without running it."
    return click.option("--dry-run", is_flag=True, help=words)(without_bench(wrapped))


without_bench = click.option(
    "--no-bench", is_flag=True, help="Of a plan: do not measure this machine (about two seconds); leaves out the time."
)


def show_plan(
    what: ModelOptions,
    command: str,
    params: Mapping[str, Any],
    *,
    bench: bool = True,
    output_format: str = "table",
    shared: Shared | None = None,
) -> None:
    """Print the plan of a command with its own options; exit with code 4 if it does not fit into the budget.

    With `shared`, it is that of one of several processes; by default, of those that are running this.

    Raises:
        NoFitError: it does not fit, after the tables are printed.
    """
    from ggjac.cli import render
    from ggjac.planner import check

    if shared is None and (place := together.here()):
        shared = Shared(place.ranks)
    plans: list[Plan] = []
    content: dict[str, Any] = {}
    runs = {"": what}
    if "with_prompt" in params:
        kind, second = what.beside(params["other"], params["with_prompt"], params["with_tokens"])
        runs[kind] = second
    if what.both_rules:
        runs["other_rule"] = dataclasses.replace(what, mlp_path="gate")
    prompts = [runs[""], runs["other_prompt"]] if "other_prompt" in runs else []
    for name, one in runs.items():
        beside = next((other for other in prompts if other is not one), None)
        how: dict[str, Any] = {"bench": bench, "output_format": output_format, "shared": shared, "beside": beside}
        own = {**params, "ablate": None} if name == "other_rule" else params  # edits are of the first pass
        made, data = _show_one(one, command, own, **how)
        plans.append(made)
        content |= {name: data} if name else data
    if output_format == "json":
        render.emit_json(content)
        if not all(made.fits for made in plans):
            click.get_current_context().exit(4)
    for made in plans:
        check(made)


def _show_one(
    what: ModelOptions,
    command: str,
    params: Mapping[str, Any],
    *,
    bench: bool,
    output_format: str,
    shared: Shared | None,
    beside: ModelOptions | None,
) -> tuple["Plan", dict[str, Any]]:
    """Make the plan for one file and print it if the format is a table; return it, also as plain data.

    `beside` has another prompt on the same file, whose results are kept meanwhile.
    """
    from ggjac.cli import render
    from ggjac.config import read_config
    from ggjac.gguf import open_gguf
    from ggjac.gguf.hub import demo_path
    from ggjac.planner.machine import device_kind

    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", what.device):
        with contextlib.suppress(ValueError):  # of a device that is elsewhere there is a plan
            check_device(what.device)
    with open_gguf(what.model or demo_path()) as file:
        config = read_config(file.metadata, {name: t.shape for name, t in file.tensors.items()}).with_context(
            what.context
        )
        n, texts = _count_tokens(what, command, params, file, config, beside)
        request = requested({**params, "exclude": what.exclude}, config.block_count) | texts
        given = file, config, n, command, request, device_kind(what.device)
        ranks = shared.ranks if shared else 1
        made = make_plan(what, *given, ranks=ranks)
        device = "cpu" if made.device == "cpu" else what.device.replace("auto", "cuda")
        if bench and _is_searched_roughly(made, file, what.threads, device, request):
            request["search_dtype"] = "bfloat16"
            made = make_plan(what, *given, ranks=ranks)
        if output_format == "table":
            _show_memory(made, file.path)
        content = made.data() | {"schema_version": 1, "path": str(file.path)}
        if bench and made.fits:
            try:
                check_device(device)
            except ValueError as error:
                content["not_measured"] = str(error)
                if output_format == "table":
                    render.line(f"Time is not predicted: {error}")
                return made, content
            rates, times = predicted(made, file, what.threads, device, shared)
            content |= {"rates": rates.data(), "times": times.data()}
            alone = None
            if shared:
                alone = make_plan(what, *given)
                content["alone"] = {"misfit": alone.misfit, "ram_peak": alone.ram_peak, "vram_peak": alone.vram_peak}
                content["alone"] |= {"times": timed(alone, file, rates).data()}
            if output_format == "table":
                _show_times(made, times, rates.lines())
                if shared and alone:
                    _show_shared(made, times, alone, timed(alone, file, rates), shared)
    return made, content


def _is_searched_roughly(
    made: "Plan", file: "GGUFFile", threads: int | None, device: str, request: Mapping[str, Any]
) -> bool:
    """Return whether a command that fits, and leaves it to this machine, would search in bfloat16 first."""
    from ggjac.planner import bench
    from ggjac.planner.machine import torch_threads

    if not (made.fits and made.may_search and request.get("search_dtype") == "auto"):
        return False
    with contextlib.suppress(ValueError):  # of a device that is elsewhere nothing is measured
        check_device(device)
        gain = bench.search_gain(made, file, threads=threads or torch_threads(), device=device)
        return gain >= bench.CLEARLY_FASTER
    return False


def predicted(
    made: "Plan", file: "GGUFFile", threads: int | None, device: str, shared: Shared | None = None
) -> tuple["bench.Measured", "Times"]:
    """Measure this machine with a plan's products, for about two seconds; return its rates, and the plan's times."""
    from ggjac.planner import bench

    types, dtype = made.trace.types, made.work.dtype
    tile = made.pieces.tile
    rates = bench.measure(file, made.columns, types, dtype=dtype, threads=threads, device=device, tile=tile)
    if any(step.rough for step in made.work.sweeps):
        rates = dataclasses.replace(rates, rounding=bench.search_gain(made, file, threads=rates.threads, device=device))
    return rates, timed(made, file, rates, shared)


def timed(made: "Plan", file: "GGUFFile", rates: "bench.Measured", shared: Shared | None = None) -> "Times":
    """Return a plan's times at rates that are known, with the bytes of the file that are in the page cache now."""
    from ggjac.planner import seconds
    from ggjac.planner.machine import cached_bytes

    cached = [cached_bytes(path) for path in file.paths]
    present = None if None in cached else sum(filter(None, cached))
    return seconds(made, rates, cached=present, network=shared.network if shared else None)


def warn_if_long(made: "Plan", file: "GGUFFile", threads: int | None, device: str, *, workers: int = 1) -> None:
    """Print a warning on stderr if a plan takes longer than `PATIENCE`; measured only where a slow machine would.

    Several workers share its prompts.
    """
    from ggjac.planner import bench, seconds
    from ggjac.units import duration

    if seconds(made, bench.SLOW).total <= PATIENCE * workers:
        return
    total = predicted(made, file, threads, device)[1].total / workers
    if total > PATIENCE:
        remedy = f"to shorten it, {made.work.fewer_vectors}; --dry-run shows its parts"
        click.echo(f"Warning: this will take about {duration(round(total))}; {remedy}", err=True)


def check_device(name: str) -> "torch.device":
    """Return a device that can be measured on this machine.

    Raises:
        click.UsageError: the name is not that of a device.
        ValueError: the device is not available here.
    """
    from ggjac.model import DeviceError, find_device

    try:
        return find_device(name)
    except DeviceError as error:
        raise click.UsageError(f"--device: {error}") from error


def requested(params: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """Return the fields of `ggjac.planner.work.Request` that a command's options set, for `blocks` blocks.

    Raises:
        click.UsageError: the file of a direction cannot be read, whose own depth is asked for.
    """
    found: dict[str, Any] = {"rank": 1} | {name: params[name] for name in _SAME if params.get(name) is not None}
    if "strengths" in params:
        found["strengths"] = len(params["strengths"])
        side, _, number = (params["direction"] or "").partition(":")
        if side in ("left", "right") and number.isdecimal():
            found |= {"singular": side, "rank": int(number)}
    if (position := params.get("position")) is not None:
        found["position" if isinstance(position, int) else "positions"] = position
    if "swaps" in params:
        found |= {"swaps": len(params["swaps"]), "steps": len(params["steps"])}
        others = [params["toward"], params["toward_tokens"]]
        found |= {"toward": others != [None, None], "direction": params["direction"] is not None}
    if (reads := params.get("reads")) is not None:
        found["reads"] = [blocks - 1] * HEADS_READ if isinstance(reads, str) else sorted({layer for layer, _ in reads})
    if (keys := params.get("keys")) is not None:
        found["keys"] = str(keys)
    if "resume" in params:
        found["saved"] = params.get("output") is not None
    found["everywhere"] = bool(params.get("all_positions"))
    if params.get("layers") is not None:
        found["layers"] = depths_of(params["layers"], blocks)
    if (direction := params.get("direction")) is not None:
        if "at" in params:
            found["along"] = direction
        if params["layer"] is params.get("at") is None and "singular" not in found:
            from ggjac.directions import DirectionError, own_depth

            try:
                found["layer"] = own_depth(direction)
            except DirectionError as error:
                raise click.UsageError(f"--direction: {error}") from error
    if found.get("search_dtype") == "auto" and params.get("many", Many()).each_line:
        found["search_dtype"] = "same"  # the same bits on any worker
    return found


def make_plan(
    what: ModelOptions,
    file: "GGUFFile",
    config: "ModelConfig",
    n: int,
    command: str,
    request: Mapping[str, Any],
    device: str,
    *,
    ranks: int = 1,
) -> "Plan":
    """Return the plan of a command, or of the largest part that one of several processes has of it.

    `request` is from `requested`.

    Dense rows are computed in one sweep if the memory allows it; tapes go to the `--trace` folder only if they must.

    Raises:
        click.UsageError: the prompt is too long, or an option is out of range.
    """
    from ggjac import planner
    from ggjac.division import largest
    from ggjac.planner import machine

    name = "cpu" if device == "cpu" else what.device
    try:
        return planner.fitting(
            file,
            config,
            command,
            n,
            what.dtype,
            request,
            mlp_path=what.mlp_path,
            device=device,
            threads=what.threads or machine.cpus(),
            budget=planner.Budget.of(what.ram_budget, what.vram_budget, name),
            tapes_on_disk=what.trace is not None,
            division=largest(config, file.tensors, ranks),
        )
    except planner.PlanError as error:
        raise click.UsageError(str(error)) from error


def _count_tokens(
    what: ModelOptions,
    command: str,
    params: Mapping[str, Any],
    file: "GGUFFile",
    config: "ModelConfig",
    beside: ModelOptions | None,
) -> tuple[int, dict[str, Any]]:
    """Return the number of tokens of a command's trace, and the fields of its request on other texts.

    A text is tokenized by llama.cpp; token ids are only counted.

    Raises:
        click.UsageError: a prompt is empty, or a token id is out of range.
    """
    from ggjac.chat import rendered
    from ggjac.tokenizer import Tokenizer, open_tokenizer

    @cache
    def tokenizer() -> Tokenizer:
        keys = {key: file.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "model")}
        return open_tokenizer(file.path, types=file.metadata.get("tokenizer.ggml.token_type"), **keys)

    def conversation(question: str, system: str | None) -> str:
        return rendered(file.metadata, tokenizer(), question, system)

    def count(prompt: str | list[int]) -> int:
        if not isinstance(prompt, str):
            ids = prompt
        elif not prompt:
            raise click.UsageError("the prompt is empty; give a text or token ids")
        else:
            ids = tokenizer().prompt(prompt, parse_special=what.parse_special)
        for i in ids:
            if not 0 <= i < config.vocabulary:
                raise click.UsageError(
                    f"token id {i} is out of range; the vocabulary has ids 0 to {config.vocabulary - 1}"
                )
        return len(ids)

    many: Many = params.get("many", Many())
    more: dict[str, Any] = {}
    answer = params.get("answer") if params.get("answer_tokens") is None else params["answer_tokens"]
    if answer is not None:
        more["answer"] = what.answer_ids(answer, tokenizer())
    if (calibrate := params.get("calibrate")) is not None:
        more["calibrate"] = [count(prompt) for prompt in calibrate]
    if many.each_line:
        prompts = what.prompts(conversation)
        counts = [count(prompt) for prompt in (part(prompts, many.shard) if many.shard else prompts)]
        more |= {"at_once": 1} if many.workers else {}
        return max(counts), {"prompts": len(counts), "mean": command == "jacobian"} | more
    if command == "steer" and params.get("direction"):
        return count(what.texts(None, None)[0].given(conversation)), {}
    if command == "steer":
        text, concept = what.texts(params.get("concept"), params.get("concept_tokens"))
        other = text.unrelated(params.get("control", True), params.get("control_concept"), params.get("concept_tokens"))
        n = max(count(concept), 0 if other is None else count(other))
        return n, {"text": count(text.given(conversation)), "other_map": other is not None}
    if beside is not None:
        more["other"] = count(beside.given(conversation))
    return count(what.given(conversation)), more


def _alike(layers: Sequence["LayerPlan"]) -> Iterator[tuple[str, "LayerPlan"]]:
    """Yield groups of layers that differ only in their index: a label such as `0-3, 7`, and the first of them."""
    groups: dict[tuple, list[LayerPlan]] = {}
    for layer in layers:
        passes = layer.sweep.nbytes, layer.sweep.flop, layer.trace.nbytes
        facts = layer.stored_bytes, *passes, layer.dense_bytes, layer.tape_bytes, layer.place
        groups.setdefault(facts, []).append(layer)
    for alike in groups.values():
        spans: list[list[int]] = []
        for layer in alike:
            if spans and layer.index == spans[-1][1] + 1:
                spans[-1][1] = layer.index
            else:
                spans.append([layer.index, layer.index])
        yield ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in spans), alike[0]


def _tokens(made: "Plan") -> str:
    """Return the number and length of the prompts as text."""
    n, prompts, at_once = made.work.n, made.work.prompts, made.work.at_once
    beside = f", {at_once} side by side" if at_once > 1 else ""
    return f"{n} tokens" if prompts == 1 else f"{prompts} prompts of up to {n} tokens{beside}"


def _show_memory(made: "Plan", path: Path) -> None:
    """Print the tables of layers, sweeps and memory, and whether the plan fits."""
    from ggjac.cli import render
    from ggjac.gguf import shown
    from ggjac.units import size

    render.line(
        f"{shown(path)}: {size(made.file_bytes)}, {len(made.layers)} layers; ggjac {made.work.command}, "
        f"{_tokens(made)}, {made.work.dtype}, on the {'CPU' if made.device == 'cpu' else 'GPU'}"
        + (f"; one of {made.ranks} processes" if made.ranks > 1 else "")
    )
    if made.whole:
        reasons = (f"{reason} (in {blocks} of {len(made.layers)} blocks)" for reason, blocks in made.whole.items())
        render.line(f"Computed whole by each process: {'; '.join(reasons)}")
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
    columns = ["layer", "#stored", "#read per sweep", "#live weights", "#dense", "#tape", "#GFLOP/vector", "kept"]
    render.table("Layers", columns, rows)
    sweeps = [
        (
            step.what,
            step.count * made.work.rounds,
            step.vectors,
            size(made.sweep_of(step.region).nbytes),
            f"{step.vectors * made.sweep_of(step.region).flop / 1e9:.3g}",
        )
        for step in made.work.sweeps
    ]
    if sweeps:
        columns = ["purpose", "#sweeps", "#stacked vectors", "#read per sweep", "#GFLOP per sweep"]
        render.table(f"Sweeps (the trace reads {size(made.trace.nbytes)})", columns, sweeps)
    for kind, parts, needed, peak, budget in (
        ("memory", made.ram, made.ram_needed, made.ram_peak, made.budget.ram),
        ("device memory", made.vram, made.vram_needed, made.vram_peak, made.budget.vram),
    ):
        if parts:
            sums = [*parts.items(), ("needed", needed), ("layers kept ready", peak - needed), ("peak", peak)]
            sums += [] if budget is None else [("budget", budget)]
            render.table(f"Peak {kind}", ["part", "#size"], [(part, size(nbytes)) for part, nbytes in sums])
    if made.fits:
        render.line("Fits.")


def _show_times(made: "Plan", times: "Times", rates: Sequence[str]) -> None:
    """Print the predicted times, and the rates that they follow from."""
    from ggjac.cli import render
    from ggjac.units import duration

    render.line("")
    bus = made.device != "cpu"
    net = any(part.net for part in times.parts)
    shares = ["disk", *["bus"] * bus, "dequantize", "gemm", "writes", "calls", *["net"] * net, "each", "total"]
    rows = [(part.what, part.count, *(_seconds(getattr(part, name)) for name in shares)) for part in times.parts]
    names = {"gemm": "multiply", "net": "network", "each": "per pass"}
    columns = ["part", "#passes", *(f"#{names.get(name, name)}" for name in shares)]
    overlap = "disk and bus overlap" if bus else "disk overlaps"
    render.table(f"Time in seconds; {overlap} with the sum of dequantize, multiply and writes", columns, rows)
    render.line(
        f"Total: about {duration(times.total)} for a typical number of sweeps; the actual number depends on tolerance "
        "and spectrum."
    )
    for text in rates:
        render.line(f"  {text}")


def _show_shared(made: "Plan", times: "Times", alone: "Plan", alone_times: "Times", shared: Shared) -> None:
    """Print what one of several processes takes beside one that has the model to itself."""
    from ggjac.cli import render
    from ggjac.units import duration, size

    net = sum(part.count * part.net for part in times.parts)
    one, rows = made.sweep, []
    for name, plan, total, spent in (("1", alone, alone_times.total, 0.0), (str(made.ranks), made, times.total, net)):
        peak = plan.ram_peak if plan.device == "cpu" else plan.vram_peak
        fits = "" if plan.fits else " (does not fit)"
        faster = f"{alone_times.total / total:.1f}x"
        rows.append((name, f"{size(peak)}{fits}", duration(total), faster, duration(spent) if shared.rate else "?"))
    render.line("")
    kind = "memory" if made.device == "cpu" else "device memory"
    columns = ["#processes", f"#{kind} of each", "#time", "#speed-up", "#of it network"]
    render.table("Beside one process, each on a machine like this one", columns, rows)
    known = "" if shared.rate else "; the time of that is left out: give the network, as --net 10Gb"
    render.line(
        f"In a sweep, the processes add up {one.sums} times, {size(made.summed_bytes(one))} for each vector{known}."
    )


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
