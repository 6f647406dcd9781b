"""Compare token ids, logits and every layer with llama.cpp on the same file: the evidence that the trace is right.

Two modes. *As is*: llama.cpp runs the file itself; on a quantized file it rounds activations to 8 bit before each
product, so only the prediction is judged (same top token, or a near tie). *Strict*: llama.cpp first rewrites the file
as F32 (it dequantizes exactly); then logits and every layer must agree to 1e-5, with ours computed from the original.

Under a tolerance there are two comparisons, and both must hold.

*Local*: each block of ours is given the stream that llama.cpp had before it, and its result is compared with
llama.cpp's. Nothing accumulates, so a mistake shows in its own block and in no other; see `LocalError`.

*Accumulated*: our own trace, compared tensor by tensor. Its distance grows from block to block with the rounding of
both programs, and in some models, random ones among them, the blocks amplify rounding: then two correct programs differ
by more than 1e-5. Where every block agrees locally, a tensor may therefore also be `ROUNDING_FACTOR` times as far from
llama.cpp's as it is from itself in float64 (our float32 from our float64, on the same prompt), if the prediction agrees
too.

llama.cpp runs in a child process (`ggjac.llamacpp`), because some files crash it.
"""

import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ggjac import blocks, exports, llamacpp
from ggjac.architectures import Graph
from ggjac.blocks import Past
from ggjac.display import visible
from ggjac.gguf import GGUFFile, open_gguf, shown
from ggjac.gguf.types import holds_weights
from ggjac.planner import machine
from ggjac.results import NO_WORDS, Plotted, Points, Table, Words
from ggjac.runs.lock import is_running
from ggjac.tokenizer import TokenizerError

if TYPE_CHECKING:
    from ggjac.model import Model, Trace

# The margin rule: llama.cpp's top token must be our first, or our second within this many logits.
MARGIN_RANK, MARGIN_LOGITS = 2, 0.25

# Strict tolerance on the relative L2 of logits and layers in float32 and float64; EPS_TOLERANCE * eps in lower dtypes.
TOLERANCE = 1e-5
EPS_TOLERANCE = 16
# For GELU, which llama.cpp takes from a half-precision table. The table is imitated, but an input next to a rounding
# boundary may be rounded the other way, which moves one value by half a unit of half precision.
GELU_TOLERANCE = 1e-3

# float32 rounds each sum in the residual stream by a part of its own size, however little a block adds. A block may
# differ by this many eps of the stream on top of the tolerance for what it adds (measured: up to 3).
STREAM_EPS = 4
# Two correct programs are each about as far from float64 as the other. Measured on 79 random models that amplify
# rounding beyond the tolerance: llama.cpp's distance from ours is 1.1 times that of ours from float64 in the median,
# and 3.8 times at most. Rounding explains no more than ROUNDING_MOST: beyond it too few digits are left.
ROUNDING_FACTOR, ROUNDING_MOST = 10, 1e-2

COMPARED = 1 << 22  # elements compared at once: float64 copies of all logits can take gigabytes

# Where copies of files go if the usual temporary folder is in memory.
DISKS = (Path("/var/tmp"),)

# What `Model.trace` observes of a block, in the order of `Graph`'s fields, and after the last block.
ATTENTION, FFN, STREAM, OUTPUT = "attn_out", "ffn_out", "l_out", "result_norm"
NAMES = (ATTENTION, FFN, STREAM, OUTPUT)


class ParityError(ValueError):
    """llama.cpp could not be run; the message says what to do."""


class NoRoomError(ParityError):
    """Memory or disk is too small for the check."""

    will_not_fit = True  # the command line's exit code 4


@dataclass(frozen=True)
class Reference:
    """llama.cpp's results: logits of every position, and named tensors in the order of its graph."""

    logits: Float[Tensor, "n v"]
    tensors: dict[str, Tensor] = field(default_factory=dict)  # name -> [n, width]
    prompt_ids: list[int] | None = None  # llama.cpp's tokens of the prompt, if one was given


@dataclass(frozen=True)
class LayerError:
    """The distance of one of our tensors from llama.cpp's: ‖ours - theirs‖ / ‖theirs‖."""

    name: str  # llama.cpp's: l_out-3, attn_out-3, ffn_out-3, result_norm
    layer: int | None
    error: float  # over all positions
    position: int  # with the largest error
    position_error: float  # at that position


@dataclass(frozen=True)
class LocalError:
    """The distance of one of our tensors from llama.cpp's, where our block was given llama.cpp's own input.

    At one position it is `‖ours - theirs‖ / scale`, and every position counts alike: `error` is the root of the mean
    square, because a position with a very large stream, as the first often has, would hide all others from a norm over
    all positions.

    For branches, the final norm and the logits the scale is `‖theirs‖`. For the stream after a block it is what the
    block adds, `‖theirs - input‖` (where the block multiplies the stream by a number, so is the input): a stream may be
    a thousand times as large, and would hide the block. Rounding of the sums is relative to the stream, however, so
    `STREAM_EPS · eps / tolerance` of the stream is added to the scale. An error within the tolerance thus means: within
    the tolerance of what the block adds, plus `STREAM_EPS` eps of the stream.
    """

    name: str  # as in `LayerError`, or logits
    layer: int | None
    error: float  # root mean square over positions
    position: int  # with the largest error
    position_error: float  # at that position
    tolerance: float

    @property
    def passes(self) -> bool:
        """Whether the error is within the tolerance; NaN and infinity never are."""
        return self.error <= self.tolerance and math.isfinite(self.error)


@dataclass(frozen=True)
class Parity(Plotted):
    """The verdict on one prompt, with its evidence. The prediction is judged at the last position."""

    mode: str  # "as is" | "strict"
    verdict: bool
    reason: str
    tokens_equal: bool | None  # None: no text was given, or the file has no tokenizer
    top1_equal: bool
    top1: int  # llama.cpp's top token at the last position
    top1_ours: int  # our top token there
    rank: int  # of llama.cpp's top token in our logits, counted from 1
    gap: float  # our top logit minus our logit of that token
    kl: float  # KL(llama.cpp ‖ ours) in nats, mean over positions
    kl_last: float  # ... at the last position
    logits_error: float  # relative L2 over all positions
    layers: list[LayerError]
    first_departure: str | None  # the first tensor beyond the tolerance, and beyond what rounding explains
    tolerance: float | None  # relative L2 allowed for logits and layers; None: the margin rule
    cause: str | None  # why the numbers may differ at all
    local: Sequence[LocalError] = ()  # in the order of the graph; empty if blocks were not compared one by one
    # Of our own trace, by name, relative L2 of float32 from float64; measured only where it decides.
    rounding: Mapping[str, float] = field(default_factory=dict)
    amplification: float | None = None  # that of the last stream, in eps of the narrower dtype

    @property
    def first_local_departure(self) -> str | None:
        """The first tensor that is wrong although its block was given llama.cpp's input."""
        return next((e.name for e in self.local if not e.passes), None)

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the verdict with its evidence."""
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "mode": self.mode,
            "tolerance": self.tolerance,
            "tokens_equal": self.tokens_equal,
            "top1_equal": self.top1_equal,
            "top1_ours": words.token(self.top1_ours),
            "top1": words.token(self.top1) | {"rank_in_ours": self.rank, "gap": self.gap},
            "kl": self.kl,
            "kl_last": self.kl_last,
            "logits_error": self.logits_error,
            "first_departure": self.first_departure,
            "cause": self.cause,
            "layers": [_row(e) | {"rounding": self.rounding.get(e.name)} for e in self.layers],
            "first_local_departure": self.first_local_departure,
            "local": [_row(e) | {"tolerance": e.tolerance} for e in self.local],
            "amplification": self.amplification,
        }

    def _table(self, words: Words) -> Table:
        columns = {name: [getattr(layer, name) for layer in self.layers] for name in LayerError.__annotations__}
        if local := {e.name: e.error for e in self.local}:
            columns["local_error"] = [local.get(layer.name) for layer in self.layers]
        if self.rounding:
            columns["rounding"] = [self.rounding.get(layer.name) for layer in self.layers]
        title = f"llama.cpp ({self.mode}): {'agrees' if self.verdict else 'disagrees'}: {self.reason}"
        top = f"top token {words.name(self.top1)}, rank {self.rank} of ours"
        top += f"; KL divergence {self.kl_last:.2e} nats at the last position"
        return Table(title, columns, (f"{top}, logits relative L2 {self.logits_error:.1e}",))

    def _plot(self, words: Words) -> Points:
        found: dict[str, dict[int, float]] = {}
        for suffix, errors in (("", self.layers), (", given llama.cpp's input", self.local)):
            for e in errors:
                if e.layer is not None and 0 < e.error < math.inf:
                    found.setdefault(e.name.rsplit("-", 1)[0] + suffix, {})[e.layer] = e.error
        series = {kind: (list(own), list(own.values()), ()) for kind, own in found.items()}
        return Points("Distance from llama.cpp, layer by layer", "layer", "relative L2", series, log=True)


def _row(e: LayerError | LocalError) -> dict[str, Any]:
    return {"name": e.name, "error": e.error, "worst_position": e.position, "worst_error": e.position_error}


def verify(
    model: "Model",
    ids: Sequence[int],
    *,
    strict: bool = False,
    tolerance: float | None = None,
    prompt: str | None = None,
    parse_special: bool = True,
    trace: "Trace | None" = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Parity:
    """Compare a model's trace of `ids` with llama.cpp on the same file.

    Costs one pass over the file by llama.cpp and one by ggjac, or two if there is a tolerance; `strict` also 4 bytes
    per weight in a temporary folder. For a file that is all F32 the strict tolerance holds in both modes.

    Args:
        model: a `ggjac.model.Model`.
        ids: token ids of the prompt.
        strict: let llama.cpp run a copy of the file rewritten as F32.
        tolerance: relative L2 allowed for logits and layers in either mode, instead of the default.
        prompt: the text of the ids; llama.cpp tokenizes it too, and the token ids are compared.
        parse_special: as in `Model.tokenize`.
        trace: a trace of the same ids. Only its logits are compared, no layer, and nothing is computed again.
        threads: of llama.cpp; by default the CPUs that this process may use.
        progress: called with a line of text before each step.

    Raises:
        ParityError: llama.cpp is missing, cannot run the file or tokenize the prompt, or there is no room for the copy.
    """
    report = progress or (lambda _: None)
    if prompt is not None:
        try:
            model.tokenize(prompt, parse_special=parse_special)  # refuses text that would crash llama.cpp
        except TokenizerError as error:  # above all if llama.cpp has died since the session began
            raise _refused(str(error), error.will_not_fit) from None
    types = {info.type.name for info in model.gguf.tensors.values() if holds_weights(info.type)}
    row, given = model.config.row, tolerance
    if why := _unfit(model):
        raise ParityError(f"llama.cpp cannot run a {model.config.architecture} model {why}: it cannot be compared")
    if tolerance is None and (strict or types == {"F32"}):
        tolerance = max(_dtype_tolerance(model.dtype), GELU_TOLERANCE if row.activation == "gelu" else 0.0)
    with _temporary_folder(large=True) as folder:
        path = for_llama_cpp(model.gguf, folder)
        if strict and types != {"F32"}:
            report("llama.cpp: rewriting the file as F32")
            path = rewrite_as_f32(path, folder, threads=threads)
            types = _types(path)
        report("llama.cpp: evaluating the prompt")
        names = (*row.graph.attention, *row.graph.ffn, *row.graph.stream, OUTPUT)
        text: dict[str, Any] = {"prompt": prompt, "parse_special": parse_special}
        reference = run_llama_cpp(path, ids, layers=trace is None, threads=threads, names=names, **text)
        tensors = by_kind(reference.tensors, row.graph)
        if row.streams == "predicted":  # all positions of each, one after the other
            tensors = {name: t.unflatten(0, (-1, len(ids))).movedim(0, 1) for name, t in tensors.items()}
        if row.streams:  # of each position, one below the other
            tensors = {name: t.reshape(len(ids), -1) for name, t in tensors.items()}
        reference = replace(reference, tensors=tensors)
    theirs = reference.prompt_ids
    judged = partial(
        judge,
        reference,
        mode="strict" if strict else "as is",
        tolerance=tolerance,
        tokens_equal=None if theirs is None else model.tokenizer.unfinished(theirs) == list(ids),
        cause=_cause(types, model.dtype, row.activation == "gelu"),
    )
    if trace is not None:
        return judged(trace.all_logits(), {})

    exact = _dtype_tolerance(model.dtype) if given is None else given
    return _judge_layers(model, ids, reference, judged, tolerance=tolerance, exact=exact, report=report)


def _unfit(model: "Model") -> str | None:
    """Return what is about a model on which llama.cpp aborts, or from which it does not come back; or None."""
    row, layers = model.config.row, model.config.layers
    if row.recurrent_blocks in ("no kv heads", "interval") and not row.pruned:
        found = {kind for layer in layers for kind in layer.mixers}
        for kind, words in {row.mixer: "attention", row.recurrent: "a state"}.items():
            if kind not in found:
                return f"in which no block has {words}"
    if row.indexer == "memory" and not model.config.indexer.selected:
        return "in which no block compresses groups of 4 tokens"
    stated = model.gguf.metadata.get(f"{model.config.architecture}.attention.head_count")
    if isinstance(stated, Sequence) and stated and stated[0] == 0 and any(layer.rope for layer in layers):
        return "that rotates heads, but states 0 of them for its first block"  # it then rotates 0 dimensions, for ever
    return None


def _judge_layers(
    model: "Model",
    ids: Sequence[int],
    reference: Reference,
    judged: Callable[..., Parity],
    *,
    tolerance: float | None,
    exact: float,
    report: Callable[[str], None],
) -> Parity:
    """Return the verdict on every layer, from as few passes over the file as decide it; `exact` as in `local_errors`.

    `reference.tensors` is used up.
    """
    n_ctx = -(-len(ids) // 256) * 256  # the context that llama.cpp allocates, which decides LongRoPE's factors
    local: list[LocalError] = []
    if tolerance is not None:
        report("comparing every block, given llama.cpp's input")
        local = local_errors(model, ids, reference, tolerance=tolerance, exact=exact, n_ctx=n_ctx)

    layers: dict[str, LayerError] = {}

    def observe(name: str, ours: Tensor) -> None:
        if (theirs := reference.tensors.get(name)) is not None:
            ours = blocks.renewed(model.config, ours)
            layers[name] = layer_error(name, ours, theirs)
            # In its place, to keep no second copy of the whole network's states.
            reference.tensors[name] = ours.detach().to("cpu", torch.float32)

    report("comparing every layer of the trace")
    trace = model.trace(ids, observe=observe, imitate=tolerance is not None, n_ctx=n_ctx, tapes=False)
    logits = trace.all_logits()
    found = judged(logits, layers, local=local)
    working = sum(not layer.idle for layer in model.config.layers)
    if tolerance is None or found.verdict or not _blocks_agree(local, working):
        return found

    report("comparing every layer with itself in another precision")
    rounding = rounding_errors(model, ids, replace(reference, logits=logits), n_ctx=n_ctx)
    last = rounding[f"{STREAM}-{model.config.block_count - 1}"]
    eps = max(torch.finfo(_dtype(dtype)).eps for dtype in (model.dtype, torch.float32))
    return replace(judged(logits, layers, local=local, rounding=rounding), amplification=last / eps)


def by_kind(tensors: Mapping[str, Tensor], graph: Graph) -> dict[str, Tensor]:
    """Return llama.cpp's tensors by the names that `Model.trace` observes, in the order of llama.cpp's graph.

    Of several names for the same thing, the first that a block has counts.
    """
    wanted: dict[str, str] = {}  # llama.cpp's name -> ours
    for kind, names in ((ATTENTION, graph.attention), (FFN, graph.ffn), (STREAM, graph.stream)):
        taken: set[str] = set()
        for name in names:
            layers = {full.rpartition("-")[2] for full in tensors if full.rpartition("-")[0] == name} - taken
            wanted |= {f"{name}-{layer}": f"{kind}-{layer}" for layer in layers}
            taken |= layers
    if graph.next_input:
        name, last = graph.stream
        count = sum(full.rpartition("-")[0] == name for full in tensors)
        wanted |= {f"{name}-{i + 1}": f"{STREAM}-{i}" for i in range(count - 1)} | {last: f"{STREAM}-{count - 1}"}
        del wanted[f"{name}-0"]
    return {wanted.get(name, name): tensor for name, tensor in tensors.items() if name in wanted or name == OUTPUT}


def local_errors(
    model: "Model", ids: Sequence[int], reference: Reference, *, tolerance: float, exact: float, n_ctx: int
) -> list[LocalError]:
    """Compare every block, the final norm and the head with llama.cpp's, each given llama.cpp's own input to it.

    The first block is given our embeddings. Blocks are read one at a time, once more than for the trace.

    Args:
        model: a model.
        ids: token ids of the prompt.
        reference: llama.cpp's tensors, by the names that `Model.trace` observes.
        tolerance: allowed for a block and its feed-forward.
        exact: allowed where no activation function acts: for attention, the final norm and the logits.
        n_ctx: context size, as in `Model.trace`.
    """
    eps = max(torch.finfo(_dtype(dtype)).eps for dtype in (model.dtype, torch.float32))
    share = STREAM_EPS * eps / tolerance if tolerance else 0.0
    config = model.config
    embedded = model.embed(ids)
    x: Tensor | None = embedded
    rest = embedded[:, :0]  # streams without a name in llama.cpp's graph, made from those that have one
    frame = model.frame(len(ids), n_ctx=n_ctx, imitate=True)
    frame = frame._replace(inputs=model.block_inputs(ids), choices=model.choices(ids))
    pasts: dict[int, Past] = {}  # of blocks whose keys later ones read
    found: list[LocalError] = []

    def compare(name: str, ours: Tensor, allowed: float, before: Tensor | None = None) -> None:
        if (theirs := reference.tensors.get(name)) is not None:
            found.append(_local_error(name, ours, theirs, allowed, before, share))

    for i, layer in enumerate(model.config.layers):
        if layer.idle:  # llama.cpp leaves it out
            continue
        source = None if layer.source is None else pasts.get(layer.source)
        if x is not None and (layer.source is None or source is not None):
            w = model.block(i)
            attn, ffn, _, out, entry = blocks.record_block(w, frame, i, x, source)
            if i in model.config.writers:
                pasts[i] = attn.past[0]
            compare(f"{ATTENTION}-{i}", attn.raw, exact)
            compare(f"{FFN}-{i}", ffn.raw, tolerance)
            scale, before = blocks.stream_scale(w, config, x, layer.factor), x
            if entry is not None:
                before = blocks.affine(blocks.entering(w, config, entry), x)
            before = before if scale is None else before * scale
            if config.row.streams:
                for tape in (attn.tape, ffn.tape):
                    past = blocks.skip(model.config, tape)
                    before = before if past is None else blocks.affine(past, before)
            ours = blocks.renewed(config, out)
            compare(f"{STREAM}-{i}", ours, tolerance, before=blocks.renewed(config, before))
            rest = out[:, ours.shape[1] :]
            del attn, ffn, out, ours  # before the next block is recorded
        elif config.one_runs:
            continue  # the other streams are not known
        theirs = reference.tensors.get(f"{STREAM}-{i}")
        x = None
        if theirs is not None and _finite(theirs):
            x = torch.cat([theirs.to(model.device, _dtype(model.dtype)), rest], 1)
    if x is not None:
        outputs = model.freeze_final_norm(x).apply(x)
        compare(OUTPUT, outputs, exact)
        found.append(_local_error("logits", model.head.logits(outputs), reference.logits, exact))
    return found


def _local_error(
    name: str, ours: Tensor, theirs: Tensor, tolerance: float, before: Tensor | None = None, share: float = 0.0
) -> LocalError:
    """Compare two tensors [n, width] as `LocalError` says; different shapes are an infinite error."""
    layer = _layer(name)
    if ours.shape != theirs.shape:
        return LocalError(name, layer, math.inf, 0, math.inf, tolerance)
    rows = max(1, COMPARED // theirs.shape[1])
    squares = []
    for part in (slice(start, start + rows) for start in range(0, len(theirs), rows)):
        mine, other = ours[part].detach().cpu().double(), theirs[part].double()
        scale = other.norm(dim=-1)
        if before is not None:
            origin = before[part].detach().cpu().double()
            scale = (other - origin).norm(dim=-1) + share * torch.maximum(scale, origin.norm(dim=-1))
        squares.append(_ratio((mine - other).norm(dim=-1), scale).square())
    by_position = torch.cat(squares)
    worst = _worst(by_position)
    error, largest = float(by_position.mean().sqrt()), float(by_position[worst].sqrt())
    return LocalError(name, layer, error, worst, largest, tolerance)


def _blocks_agree(local: Sequence[LocalError], working: int) -> bool:
    """Return whether every block that does something, of so many, was compared locally, and nothing departs."""
    return all(e.passes for e in local) and sum(e.name.startswith(f"{STREAM}-") for e in local) == working


def rounding_errors(model: "Model", ids: Sequence[int], ours: Reference, *, n_ctx: int) -> dict[str, float]:
    """Return the relative L2 of our own tensors and logits from those of the same model in float64.

    A model that computes in float64 itself is compared with float32. Costs a pass over the file.
    """
    from ggjac.model import Model

    dtype = torch.float32 if _dtype(model.dtype) == torch.float64 else torch.float64
    twin = Model(model.gguf, device=model.device, dtype=dtype, threads=model.weights.threads)
    found: dict[str, float] = {}

    def observe(name: str, values: Tensor) -> None:
        if (own := ours.tensors.get(name)) is not None:
            found[name] = layer_error(name, own, blocks.renewed(model.config, values).detach().cpu()).error

    trace = twin.trace(ids, observe=observe, imitate=True, n_ctx=n_ctx, tapes=False)
    return found | {"logits": _compare_logits(ours.logits, trace.all_logits()).logits_error}


def judge(
    reference: Reference,
    logits: Float[Tensor, "n v"],
    layers: dict[str, LayerError],
    *,
    mode: str,
    tolerance: float | None,
    tokens_equal: bool | None = None,
    cause: str | None = None,
    local: Sequence[LocalError] = (),
    rounding: Mapping[str, float] | None = None,
) -> Parity:
    """Return the verdict on logits and on layers already compared; values that are not finite never pass.

    `rounding` has the errors of `rounding_errors`, to be given only where every block agrees locally.

    Raises:
        ParityError: as it is, llama.cpp overflows on the file, and ours does not: there is nothing to compare with.
    """
    if mode != "strict" and tolerance is None and not _finite(reference.logits) and _finite(logits):
        raise ParityError(
            "llama.cpp's own logits are not all finite on this file as it is, and ours are: it overflows where it "
            "rounds activations (with Q4_1 and Q5_1 it sums them in half precision, with F16 it rounds them to it); "
            "--strict compares on F32"
        )
    numbers = _compare_logits(logits, reference.logits)
    # In the order of the graph. A layer that llama.cpp has and we did not observe is a fault of ours.
    compared = [layers[name] for name in reference.tensors if name in layers]
    unseen = [name for name in reference.tensors if name.startswith(f"{STREAM}-") and name not in layers]
    rounding = rounding or {}

    def limit(name: str) -> float:
        explained = min(ROUNDING_FACTOR * rounding.get(name, 0.0), ROUNDING_MOST)
        return math.inf if tolerance is None else max(tolerance, explained)

    # `not (a <= b)` because of NaN; an infinite error departs even without a tolerance.
    departed = [layer for layer in compared if not (layer.error <= limit(layer.name) and math.isfinite(layer.error))]
    wrong = [e for e in local if not e.passes]

    faults = []
    if tokens_equal is False:
        faults.append("our token ids differ from llama.cpp's")
    for whose, values in (("our", logits), ("llama.cpp's", reference.logits)):
        if not _finite(values):
            faults.append(f"{whose} logits are not all finite")
    if wrong:
        faults.append(f"given llama.cpp's own input, {wrong[0].name} is off by {wrong[0].error:.1e}{_others(wrong)}")
    if departed:
        first = departed[0]
        faults.append(f"{first.name} is off by {first.error:.1e} relative L2, first of {len(departed)} tensors")
    if unseen:
        faults.append(f"{unseen[0]} was not compared, first of {len(unseen)} layers")
    if not numbers.logits_error <= limit("logits"):
        faults.append(f"the logits are off by {numbers.logits_error:.1e} relative L2")
    if (tolerance is None or rounding) and not numbers.top1_equal:
        rank, gap = numbers.rank, numbers.gap
        if math.isfinite(gap) and not (rank <= MARGIN_RANK and gap <= MARGIN_LOGITS):
            faults.append(f"llama.cpp's top token has rank {rank} in ours, {gap:.2f} logits below our first")

    if faults:
        reason = "; ".join(faults)
        if rounding:
            own = max(rounding.values())
            reason += f"; every block agrees given llama.cpp's own input, but our own rounding is only {own:.1e}"
        if tolerance is not None:
            reason += f" (tolerance {tolerance:.1e})"
        elif mode != "strict":
            reason += "; a strict check (--strict) distinguishes rounding from errors, and names the layer"
    else:
        reason = _agreement(numbers, compared, local, rounding)
    return Parity(
        mode=mode,
        verdict=not faults,
        reason=reason,
        tokens_equal=tokens_equal,
        **numbers._asdict(),
        layers=compared,
        first_departure=departed[0].name if departed else None,
        tolerance=tolerance,
        cause=cause,
        local=local,
        rounding=rounding,
    )


def _agreement(
    numbers: "_Logits", compared: Sequence[LayerError], local: Sequence[LocalError], rounding: Mapping[str, float]
) -> str:
    """Return what agrees, and how well."""
    tie = f"near tie: llama.cpp's top token is our second, {numbers.gap:.2f} logits below our first"
    top = "same top token" if numbers.top1_equal else tie
    reason = f"{top}, logits within {numbers.logits_error:.1e} relative L2"
    if compared:
        worst = max(compared, key=lambda layer: layer.error)
        reason += f", {len(compared)} tensors within {worst.error:.1e} ({worst.name})"
    if local:
        largest = max(local, key=lambda e: e.error)
        reason += f" and, given llama.cpp's own input, within {largest.error:.1e} ({largest.name})"
    if rounding:
        reason += f"; the model amplifies rounding, by which ours alone is off by {max(rounding.values()):.1e}"
    return reason


def _others(wrong: Sequence[LocalError]) -> str:
    """Name the other blocks that are wrong, if any: each of them has a mistake of its own."""
    places = list(dict.fromkeys(e.name if e.layer is None else f"block {e.layer}" for e in wrong))
    return "" if len(places) == 1 else f", wrong also: {', '.join(places[1:6])}{', ...' if len(places) > 6 else ''}"


def layer_error(name: str, ours: Tensor, theirs: Tensor) -> LayerError:
    """Compare two tensors [n, width] in float64; different shapes are an infinite error."""
    layer = _layer(name)
    if ours.shape != theirs.shape:
        return LayerError(name, layer, math.inf, 0, math.inf)
    theirs = theirs.double()
    difference = (ours.detach().cpu().double() - theirs).norm(dim=-1)
    scale = theirs.norm(dim=-1)
    by_position = _ratio(difference, scale)
    worst = _worst(by_position)
    return LayerError(name, layer, float(_ratio(difference.norm(), scale.norm())), worst, float(by_position[worst]))


def _layer(name: str) -> int | None:
    number = name.rpartition("-")[2]
    return int(number) if number.isdecimal() else None


def _worst(errors: Float[Tensor, " n"]) -> int:
    return int(errors.nan_to_num(nan=math.inf, posinf=math.inf).argmax())


def _ratio(error: Tensor, scale: Tensor) -> Tensor:
    """Return error / scale, with 0 / 0 = 0, because equal zeros agree."""
    return torch.where(error == 0, torch.zeros_like(error), error / scale)


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


class _Logits(NamedTuple):
    """The fields of `Parity` that follow from the logits."""

    top1_equal: bool
    top1: int
    top1_ours: int
    rank: int
    gap: float
    kl: float
    kl_last: float
    logits_error: float


def _compare_logits(ours: Tensor, theirs: Tensor) -> _Logits:
    """Compare logits [n, v] in float64; results are NaN for rows that are not finite."""
    if ours.shape != theirs.shape:
        raise ParityError(f"our logits have shape {list(ours.shape)}, llama.cpp's {list(theirs.shape)}")
    squared = scale = 0.0
    divergence = []
    for mine, other in zip(ours, theirs, strict=True):  # row by row: float64 copies of [n, v] can take gigabytes
        p, q = (row.detach().cpu().double() for row in (mine, other))
        squared, scale = squared + float((p - q).square().sum()), scale + float(q.square().sum())
        log_p, log_q = p.log_softmax(0), q.log_softmax(0)
        divergence.append(float((log_q.exp() * (log_q - log_p)).sum()))
    # The last position: the prediction.
    top = int(q.argmax())
    finite = _finite(p) and _finite(q)
    rank = 1 + int((p > p[top]).sum()) if finite else len(p)
    error = math.sqrt(squared / scale) if scale else math.inf
    return _Logits(
        top1_equal=finite and rank == 1,
        top1=top,
        top1_ours=top if rank == 1 else int(p.argmax()),
        rank=rank,
        gap=float(p.max() - p[top]) if finite else math.nan,
        kl=sum(divergence) / len(divergence),
        kl_last=divergence[-1],
        logits_error=error if squared else 0.0,
    )


def _dtype_tolerance(dtype: torch.dtype | str) -> float:
    eps = torch.finfo(_dtype(dtype)).eps
    return max(TOLERANCE, EPS_TOLERANCE * eps) if eps > torch.finfo(torch.float32).eps else TOLERANCE


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _types(path: Path) -> set[str]:
    with open_gguf(path) as file:
        return {info.type.name for info in file.tensors.values() if holds_weights(info.type)}


def _cause(types: Iterable[str], dtype: torch.dtype | str, gelu: bool) -> str | None:
    """Return the causes of rounding: llama.cpp's activation types (ggml-cpu.c, type_traits_cpu) and our dtype."""
    types, causes = set(types) - {"F32"}, []
    if types - {"F16", "BF16"}:
        causes.append("llama.cpp rounds activations to 8 bit before it multiplies them with quantized weights")
    elif types:
        causes.append("llama.cpp rounds activations to 16 bit before it multiplies them with 16-bit weights")
    if gelu:
        causes.append("llama.cpp takes GELU from a table of half-precision values")
    eps = torch.finfo(_dtype(dtype)).eps
    if eps > torch.finfo(torch.float32).eps:
        causes.append(f"ours is computed in {str(dtype).removeprefix('torch.')} (eps {eps:.1e})")
    return "; ".join(causes) or None


# -- llama.cpp ---------------------------------------------------------------------------------------------------------


def run_llama_cpp(
    path: str | os.PathLike[str],
    ids: Sequence[int],
    *,
    layers: bool = True,
    prompt: str | None = None,
    parse_special: bool = True,
    threads: int | None = None,
    names: Sequence[str] = NAMES,
    control_vector: str | os.PathLike[str] | None = None,
) -> Reference:
    """Evaluate token ids with llama.cpp and return the logits of all positions and, with `layers`, named tensors.

    `path` is the file, or the first shard of a split one; weights stay mapped. `names` are llama.cpp's, without the
    layer number; of a name that occurs several times in the graph the last value is returned. `control_vector` is a
    file whose directions are added to the residual stream of every position (`ggjac.llamacpp.control_vector`).

    The results pass through a temporary folder: 4 bytes for each logit and each element of the tensors.

    Raises:
        ParityError: llama.cpp is missing, crashes, or cannot load or evaluate the file, or a token id is not in its
            vocabulary.
    """
    if not len(ids):
        raise ParityError("there are no token ids to evaluate; give at least one")
    with (
        _llama_cpp(f"while it loaded {_name(path)} and evaluated {len(ids)} tokens") as child,
        _temporary_folder() as folder,
    ):
        reply = child.ask(
            "evaluate",
            path=os.fsdecode(path),
            ids=[int(id) for id in ids],
            names=list(names) if layers else [],
            prompt=prompt,
            parse_special=parse_special,
            threads=threads or machine.cpus(),
            folder=folder,
            control=None if control_vector is None else os.fsdecode(control_vector),
        )
        tensors = {
            name: torch.from_numpy(np.load(Path(folder) / f"{i}.npy", allow_pickle=False))
            for i, name in enumerate(reply["names"])
        }
    return Reference(tensors.pop("logits"), tensors, reply["prompt_ids"])


def rewrite_as_f32(path: str | os.PathLike[str], folder: str | os.PathLike[str], *, threads: int | None = None) -> Path:
    """Dequantize a GGUF file into `folder` with llama.cpp (exactly, metadata kept) and return the new file's path.

    Takes 4 bytes of disk per weight. Call it with a temporary folder.

    Raises:
        ParityError: not enough free disk, or llama.cpp is missing, crashes, or cannot read or write.
    """
    with open_gguf(path) as file:
        source = file.paths[0]
        elements = sum(info.elements for info in file.tensors.values())
        header = file.nbytes - sum(info.nbytes for info in file.tensors.values())
    _check_room(folder, 4 * elements + header, f"rewriting {_name(path)} as F32", "or check without --strict")
    target = Path(folder) / "f32.gguf"
    try:
        with _llama_cpp(f"while it rewrote {_name(path)} as F32") as child:
            child.ask(
                "rewrite", source=os.fsdecode(source), target=os.fsdecode(target), threads=threads or machine.cpus()
            )
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return target


def for_llama_cpp(file: GGUFFile, folder: str | os.PathLike[str]) -> Path:
    """Return the path of a file that llama.cpp accepts: the same one, or a copy in `folder` as its row says.

    A copy takes as much disk as the file. Call it with a temporary folder.

    Raises:
        ParityError: not enough free disk, or the copy cannot be written.
    """
    copy = exports.different(file)
    if copy is None:
        return file.paths[0]
    _check_room(folder, file.nbytes, f"a copy of {_name(file.path)} for llama.cpp", "or do without the comparison")
    target = Path(folder) / "copy.gguf"
    try:
        exports.write(file, copy, target)
    except (OSError, ValueError, LookupError) as error:
        target.unlink(missing_ok=True)
        raise ParityError(f"{_name(file.path)}: cannot be copied for llama.cpp ({error})") from error
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return target


def _check_room(folder: str | os.PathLike[str], nbytes: int, task: str, otherwise: str) -> None:
    # Padding between tensors, and a reserve: a full disk would affect other processes.
    needed = nbytes + max(64 << 20, nbytes // 100)
    free, where = shutil.disk_usage(folder).free, ""
    if machine.in_memory(folder):  # a tmpfs has the size that it may grow to, whatever memory is left
        free, where = min(free, machine.free_memory()), " (it is in memory, not on a disk)"
    if free < needed:
        raise NoRoomError(
            f"{task} needs {needed / 1e9:.1f} GB in {_name(folder)}{where}, which has {free / 1e9:.1f} GB free; make "
            f"room, set TMPDIR to another disk, {otherwise}"
        )


@contextmanager
def _temporary_folder(*, large: bool = False) -> Iterator[str]:
    """Make a temporary folder; a large one preferably on a disk. Warn of what killed processes have left.

    Raises:
        ParityError: there is no folder that can be written.
    """
    try:
        usual, parent = Path(tempfile.gettempdir()), None
        if large and not os.environ.get("TMPDIR") and machine.in_memory(usual):
            parent = next((disk for disk in DISKS if os.access(disk, os.W_OK) and not machine.in_memory(disk)), None)
        made = tempfile.TemporaryDirectory(prefix=f"ggjac-{os.getpid()}-", dir=parent)
    except OSError as error:
        raise ParityError(
            f"the comparison with llama.cpp needs a temporary folder ({error.strerror}); set TMPDIR to one that can be "
            "written"
        ) from None
    with made as folder:
        if left := _left_behind({usual, Path(folder).parent}) if large else []:
            names = ", ".join(map(_name, left[:3])) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            warnings.warn(f"{names}: left by a process that was killed; remove it", stacklevel=2)
        yield folder


def _left_behind(parents: Iterable[Path]) -> list[Path]:
    """Return this user's temporary folders whose processes are gone."""
    found = []
    for folder in (folder for parent in parents for folder in parent.glob("ggjac-[0-9]*-*")):
        with suppress(OSError, ValueError):
            own = not hasattr(os, "getuid") or folder.lstat().st_uid == os.getuid()
            if own and not is_running(int(folder.name.split("-")[1])):
                found.append(folder)
    return sorted(found)


@contextmanager
def _llama_cpp(task: str) -> Iterator[llamacpp.Child]:
    """Start llama.cpp in a child process and turn its errors into `ParityError`."""
    if why := llamacpp.missing():
        raise ParityError(f"the comparison needs llama.cpp: {why}")
    try:
        with llamacpp.Child() as child:
            yield child
    except llamacpp.LlamaCppError as error:
        message = visible(str(error))
        if isinstance(error, llamacpp.LlamaCppDied):
            likely = error.likely or "it does not support a tensor's type or size"
            message = f"llama.cpp itself ended {task} ({message}), most likely because {likely}"
        raise _refused(message, error.will_not_fit) from None


def _refused(message: str, will_not_fit: bool) -> ParityError:
    return NoRoomError(message) if will_not_fit else ParityError(message)


def _name(path: str | os.PathLike[str]) -> str:
    return shown(os.fsencode(path))
