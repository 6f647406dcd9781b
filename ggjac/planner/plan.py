"""Whether a command's work fits into a budget of memory, and where weights stay between its sweeps.

A plan comes from a file's header and a prompt's length; no torch is imported and nothing is computed. It puts together
the work (`ggjac.planner.work`), what passes over each block read and compute (`passes`) and the peak of memory
(`memory`); `times` adds seconds. Sizes are bytes, weights are elements, FLOP count a multiplication and an addition as
two.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from ggjac.config import ModelConfig
from ggjac.division import Division
from ggjac.planner import machine, memory, passes, work
from ggjac.planner.passes import LayerPlan, Pass
from ggjac.planner.work import JACOBIAN, Lookup, PlanError, Region, Sweeps, Work
from ggjac.results import Table
from ggjac.sizes import (
    ITEM_BYTES,
    LARGE_PIECES,
    PIECES_SHARE,
    PROMPTS_AT_ONCE,
    ROUGH_FROM,
    SMALL_PIECES,
    MlpPath,
    Pieces,
)
from ggjac.units import size
from ggjac.ways import DEQUANTIZED, PRODUCTS, WORTH

if TYPE_CHECKING:  # NumPy would be imported for types alone
    from ggjac.gguf import GGUFFile

# Commands whose dense rows come in one sweep if the memory allows it.
DENSE = ("jacobian", "norms")
# Commands that take one of several prompts after another: llama.cpp loads a model for each; dense maps are added up.
ALONE = ("verify", "jacobian")
# What reading weights may take beside products, as their share, before more prompts are side by side.
READING = 0.25


class NoFitError(PlanError):
    """The work needs more memory than its budget; the message names both, and what to lower."""

    will_not_fit = True


@dataclass(frozen=True)
class Budget:
    """Memory that may be used, in bytes; None if unspecified and not detectable."""

    ram: int | None = None
    vram: int | None = None

    @classmethod
    def of(cls, ram: int | None, vram: int | None, device: str) -> "Budget":
        """Return a budget, with defaults for None: half of the free RAM, and all free memory of the named device."""
        return cls(
            machine.default_budget() if ram is None else ram, machine.default_vram(device) if vram is None else vram
        )


@dataclass(frozen=True, repr=False)
class Plan:
    """What a command's work needs, for each layer and in total.

    Attributes:
        work: the command's work.
        d: embedding length.
        mlp_path, device: as the commands take them; device is `"cpu"` or `"cuda"`.
        layers: one row per block.
        embedding: reading the prompt's embeddings.
        head: the logits of one position.
        nearest: comparing one vector with all input embeddings.
        ram, vram: bytes by part (see `ggjac.planner.memory.PARTS`) at the peak, without weights kept between sweeps.
            `vram` is empty on the CPU.
        budget: memory that may be used.
        file_bytes: of all shards.
        tapes_on_disk: tapes are kept in a folder, one at a time in memory.
        pieces: sizes of tiles and of slabs: small ones on the CPU.
        ranks: processes that share the model; all else is one's part, the largest.
        whole: what every rank computes, as it cannot be divided, and in how many blocks.
    """

    work: Work
    d: int
    mlp_path: MlpPath
    device: str
    layers: tuple[LayerPlan, ...]
    embedding: Pass
    head: Pass
    nearest: Pass
    ram: Mapping[str, int]
    vram: Mapping[str, int]
    budget: Budget
    file_bytes: int
    tapes_on_disk: bool = False
    pieces: Pieces = SMALL_PIECES
    ranks: int = 1
    whole: Mapping[str, int] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """Return the plan as plain data, ready for JSON: bytes, weights, FLOP."""
        return {
            "command": self.work.command,
            "tokens": self.work.n,
            "prompts": self.work.prompts,
            "prompts_at_once": self.work.at_once,
            "dtype": self.work.dtype,
            "mlp_path": self.mlp_path,
            "device": self.device,
            "ranks": self.ranks,
            "whole": dict(self.whole),
            "sweeps": [
                {
                    "what": step.what,
                    "count": step.count,
                    "vectors": step.vectors,
                    "rough": step.rough,
                    "bytes": self.sweep_of(step.region).nbytes,
                    "flop": step.vectors * self.sweep_of(step.region).flop,
                    "sums": self.sweep_of(step.region).sums,
                    "summed_bytes": step.vectors * self.summed_bytes(self.sweep_of(step.region)),
                }
                for step in self.work.sweeps
            ],
            "decompositions": [asdict(step) for step in self.work.decompositions],
            "lookups": [asdict(step) | {"bytes": self.lookup(step).nbytes} for step in self.work.lookups],
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
                for layer in self.layers
            ],
            "trace": {
                "bytes": self.trace.nbytes,
                "flop": self.trace.flop,
                "sums": self.trace.sums,
                "summed_bytes": self.summed_bytes(self.trace),
            },
            "sweep": {"bytes": self.sweep.nbytes, "weights": self.sweep.weights, "flop_per_vector": self.sweep.flop},
            "ram": dict(self.ram),
            "ram_needed": self.ram_needed,
            "ram_peak": self.ram_peak,
            "ram_budget": self.budget.ram,
            "vram": dict(self.vram),
            "vram_needed": self.vram_needed,
            "vram_peak": self.vram_peak,
            "vram_budget": self.budget.vram,
            "tapes_on_disk": self.tapes_on_disk,
            "fits": self.fits,
            "misfit": self.misfit,
        }

    @property
    def trace(self) -> Pass:
        """The forward pass, FLOP for all positions."""
        return passes.total([self.embedding, *(layer.trace for layer in self.layers)])

    @property
    def sweep(self) -> Pass:
        """One sweep of the Jacobian, FLOP for one stacked vector."""
        return self.sweep_of(JACOBIAN)

    def sweep_of(self, region: Region) -> Pass:
        """Return a sweep over a region, FLOP for one stacked vector."""
        return passes.total(layer.sweep_of(region) for layer in self.layers)

    def summed_bytes(self, one: Pass) -> int:
        """Return the bytes that ranks add up in a pass, for one vector as its FLOP."""
        return one.summed * ITEM_BYTES[self.work.dtype]

    def lookup(self, step: Lookup) -> Pass:
        """Return a pass over the vocabulary, FLOP for all its vectors."""
        parts = (self.head, step.logits + step.head), (self.nearest, step.embedding)
        return passes.total(once.scaled(vectors) for once, vectors in parts if vectors)

    @property
    def reading(self) -> float:
        """Seconds of one core that dequantizes for all prompts, at the rate of `ggjac.ways`; not what is kept dense."""
        streamed = [layer for layer in self.layers if layer.place != "dense"]
        weights = self.trace.weights + sum(step.count * self.lookup(step).weights for step in self.work.lookups)
        for step in self.work.sweeps:
            weights += step.count * sum(layer.sweep_of(step.region).weights for layer in streamed)
        return self.work.rounds * weights / DEQUANTIZED

    @property
    def multiplying(self) -> float:
        """Seconds of one core in products for all prompts, at the rate of `ggjac.ways`."""
        flop = self.trace.flop + sum(step.count * self.lookup(step).flop for step in self.work.lookups)
        flop += sum(step.count * step.vectors * self.sweep_of(step.region).flop for step in self.work.sweeps)
        return self.work.prompts * (flop + sum(step.count * step.flop for step in self.work.decompositions)) / PRODUCTS

    @property
    def may_search(self) -> Sweeps | None:
        """The first sweeps that search, if the maps are so large that a search in bfloat16 may pay; see `bench`."""
        if self.work.dtype != "float32" or self.d < ROUGH_FROM:
            return None
        return next((step for step in self.work.sweeps if step.bases), None)

    @property
    def columns(self) -> list[int]:
        """Mean columns of the products of each pass; see `Pass.columns`."""
        found = {self.trace.columns(), *(self.lookup(step).columns() for step in self.work.lookups)}
        return sorted(found | {self.sweep_of(step.region).columns(step.vectors) for step in self.work.sweeps})

    @property
    def tape_bytes(self) -> int:
        """Bytes of all tapes."""
        return sum(layer.tape_bytes for layer in self.layers)

    def __repr__(self) -> str:
        """Return the work, the memory and whether it fits on one line."""
        fits = "fits" if self.fits else "does not fit"
        return f"Plan({self.work.command}, {self.work.n} tokens, {size(self.ram_peak)} of memory: {fits})"

    def table(self) -> Table:
        """Return the parts of the memory that is needed, the largest first, and whether it fits."""
        parts = [
            (where, part, size(needed[part]))
            for where, needed in (("memory", self.ram), ("device memory", self.vram))
            for part in memory.by_size(needed)
            if needed[part]
        ]
        work = self.work
        sweeps = sum(step.count for step in work.sweeps) * work.rounds
        budgets = {"memory": self.budget.ram, "device memory": self.budget.vram if self.vram else None}
        allowed = ", ".join(f"{size(most)} of {where}" for where, most in budgets.items() if most is not None)
        columns = {name: [row[i] for row in parts] for i, name in enumerate(("where", "part", "size"))}
        return Table(
            f"Plan: {work.command}, {work.n} tokens, {work.dtype}, {sweeps} sweeps",
            columns,
            (
                f"peak of memory {size(self.ram_peak)}, with weights that stay ready between sweeps",
                f"allowed: {allowed or 'not known'}",
                self.misfit or "it fits",
            ),
        )

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    @property
    def ram_needed(self) -> int:
        """Peak of this process's anonymous memory, in bytes, without weights kept between sweeps."""
        return sum(self.ram.values())

    @property
    def vram_needed(self) -> int:
        """Peak of device memory, in bytes, without weights kept between sweeps."""
        return sum(self.vram.values())

    @property
    def stored(self) -> list[LayerPlan]:
        """The file's blocks, from the last to the first: those of the first pass if all are applied several times."""
        return list({layer.stored: layer for layer in reversed(self.layers)}.values())

    def resident(self, place: str) -> int:
        """Return the bytes of weights kept in one place between sweeps."""
        return sum(
            layer.dense_bytes if place == "dense" else layer.kept.nbytes
            for layer in self.stored
            if layer.place == place
        )

    @property
    def places(self) -> list[str]:
        """Where each block's weights stay between sweeps, as `WeightStore.place` takes it."""
        return [layer.place for layer in self.layers]

    @property
    def room(self) -> dict[str, int]:
        """Bytes assigned to each place, as `WeightStore.place` takes it."""
        return {place: self.resident(place) for place in ("dense", "device", "pinned")}

    @property
    def ram_peak(self) -> int:
        """Peak of anonymous memory, in bytes, with weights kept between sweeps."""
        return self.ram_needed + self.resident("pinned") + (self.resident("dense") if self.device == "cpu" else 0)

    @property
    def vram_peak(self) -> int:
        """Peak of device memory, in bytes, with weights kept between sweeps."""
        on_device = 0 if self.device == "cpu" else self.resident("dense") + self.resident("device")
        return self.vram_needed + on_device

    @property
    def misfit(self) -> str | None:
        """One line on what does not fit and what to lower; None if everything fits."""
        for kind, option, parts, budget in (
            ("memory", "--ram-budget", self.ram, self.budget.ram),
            ("device memory", "--vram-budget", self.vram, self.budget.vram),
        ):
            needed = sum(parts.values())
            if budget is not None and needed > budget:
                sizes = (f"{part} {size(parts[part])}" for part in memory.by_size(parts)[:3])
                return (
                    f"{self.work.command} needs {size(needed)} of {kind} ({', '.join(sizes)}), "
                    f"but {option} allows {size(budget)}; "
                    f"{memory.advice(self.work, parts, option, tapes_on_disk=self.tapes_on_disk)}"
                )
        return None

    @property
    def fits(self) -> bool:
        """Whether the budgets suffice."""
        return self.misfit is None


def fitting(
    file: "GGUFFile", config: ModelConfig, command: str, n: int, dtype: str, request: Mapping[str, Any], **options: Any
) -> Plan:
    """Return the first plan that fits: dense rows in the largest chunks possible, tapes in memory or else in a folder.

    Several prompts are side by side, as many as fit, until reading weights takes little beside products. An interrupt
    loses the prompts under way, so that they are no more than that.

    Args:
        file, config: as `make` takes them.
        command, n, dtype: as `ggjac.planner.work.command_work` takes them.
        request: fields of `ggjac.planner.work.Request` but `chunk_bytes`.
        options: of `make`; here `tapes_on_disk` means that there is a folder for tapes, used if needed.

    Returns:
        A plan; if none fits, the one that needs least.

    Raises:
        PlanError: as `command_work`.
    """
    best = alone = _fitting(file, config, command, n, dtype, request, **options)
    prompts, divided = request.get("prompts", 1), options.get("division") is not None
    if request.get("at_once") or command in ALONE or divided or not alone.fits:
        return alone
    for count in sorted({min(prompts, 1 << i) for i in range(1, PROMPTS_AT_ONCE.bit_length())} - {1}):
        if best.reading <= max(2 * WORTH, READING * best.multiplying):
            break
        plan = _fitting(file, config, command, n, dtype, {**request, "at_once": count}, **options)
        same = (plan.work.chunk_bytes, plan.pieces) == (alone.work.chunk_bytes, alone.pieces)  # the bits of one alone
        if plan.fits and same and plan.reading < best.reading:
            best = plan
    return best


def _fitting(
    file: "GGUFFile", config: ModelConfig, command: str, n: int, dtype: str, request: Mapping[str, Any], **options: Any
) -> Plan:
    """Return the plan of `fitting` for a number of prompts side by side; by default, one after another."""
    largest, usual = work.all_rows(config, n, dtype), work.CHUNK_BYTES
    chunks = [largest] if command in DENSE and largest > usual else []
    folders = (False, True) if options.pop("tapes_on_disk", False) else (False,)
    tried: list[Plan] = []
    for chunk in [*chunks, *(max(1, usual >> by) for by in (0, 2, 4, 6))]:
        needed = work.command_work(command, config, n, dtype, **request, chunk_bytes=chunk)
        if tried and needed.steps == tried[-1].work.steps:
            continue
        for folder in folders:
            tried.append(make(file, config, needed, tapes_on_disk=folder, **options))
            if tried[-1].fits:
                return tried[-1]
    return min(tried, key=lambda plan: plan.ram_needed + plan.vram_needed)


def make(
    file: "GGUFFile",
    config: ModelConfig,
    work: Work,
    *,
    mlp_path: MlpPath = "up",
    device: str = "cpu",
    threads: int = 1,
    budget: Budget | None = None,
    tapes_on_disk: bool = False,
    division: Division | None = None,
) -> Plan:
    """Return the plan of a command's work.

    Args:
        file: the open model; only its header is read.
        config: its sizes.
        work: from `ggjac.planner.work.command_work`.
        mlp_path: which factor of a gated feed-forward network stays live.
        device: `"cpu"`, or `"cuda"` for any device with memory of its own.
        threads: of the CPU; each has buffers.
        budget: memory that may be used; default half of the free RAM.
        tapes_on_disk: keep tapes in a folder and one at a time in memory.
        division: one rank's part, where several share the model; then the plan is of that.
    """
    layers = tuple(passes.layer_plan(file, config, i, work, mlp_path, division) for i in range(config.block_count))
    sizes = division.sizes if division else config
    budget = budget or Budget(ram=machine.default_budget())
    for pieces in [SMALL_PIECES] if device == "cpu" else [LARGE_PIECES, SMALL_PIECES]:
        ram, vram = memory.peak(
            file, sizes, work, layers, threads=threads, device=device, tapes_on_disk=tapes_on_disk, pieces=pieces
        )
        if _has_room(ram, vram, budget):
            break
    tokens = file.tensors[config.embedding]
    plan = Plan(
        work=work,
        d=config.d,
        mlp_path=mlp_path,
        device="cpu" if device == "cpu" else "cuda",
        layers=layers,
        embedding=passes.embedding(file, config, work.n),
        head=passes.matrix(file.tensors.get("output.weight", tokens)),
        nearest=passes.matrix(tokens),
        ram=ram,
        vram=vram,
        budget=budget,
        file_bytes=file.nbytes,
        tapes_on_disk=tapes_on_disk,
        pieces=pieces,
        ranks=division.ranks if division else 1,
        whole=Counter(chain.from_iterable(division.whole)) if division else {},
    )
    return replace(plan, layers=_placed(plan))


def _has_room(ram: Mapping[str, int], vram: Mapping[str, int], budget: Budget) -> bool:
    """Return whether there is room for the work's parts and for weights: RAM suffices, and a part of the device's."""
    most = math.inf if budget.vram is None else PIECES_SHARE * budget.vram
    return sum(ram.values()) <= (math.inf if budget.ram is None else budget.ram) and sum(vram.values()) <= most


def check(plan: Plan) -> None:
    """Raise an error if a plan exceeds its budget.

    Raises:
        NoFitError: one line: the memory needed, the memory allowed, and what to lower.
    """
    if plan.misfit:
        raise NoFitError(plan.misfit)


def _placed(plan: Plan) -> tuple[LayerPlan, ...]:
    """Return the layers with their places: from the output down, each in the best place that still has room.

    Blocks that are applied several times are kept once. On a device as many quantized layers as possible come first,
    and the remaining room makes some of them dense: copying bytes to the device costs more than dequantizing them
    there.
    """
    layers = {layer.stored: layer for layer in plan.stored}
    ram = max(0, (plan.budget.ram or 0) - plan.ram_needed)
    vram = max(0, (plan.budget.vram or 0) - plan.vram_needed)
    if sum(step.count for step in plan.work.sweeps) < 2:  # nothing would be used again
        return plan.layers

    def put(place: str, room: int, size: Mapping[int, int]) -> int:
        for i, nbytes in size.items():
            if nbytes > room:
                break
            room -= nbytes
            layers[i] = replace(layers[i], place=place)
        return room

    if plan.device == "cpu":
        put("dense", ram, {i: layer.dense_bytes for i, layer in layers.items()})
    else:
        vram = put("device", vram, {i: layer.kept.nbytes for i, layer in layers.items()})
        put("pinned", ram, {i: layer.kept.nbytes for i, layer in layers.items() if layer.place == "file"})
        more = {i: e.dense_bytes - e.kept.nbytes for i, e in layers.items() if e.place == "device"}
        put("dense", vram, more)
    return tuple(replace(layer, place=layers[layer.stored].place) for layer in plan.layers)
