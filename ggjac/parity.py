"""llama.cpp on the same file: token ids, logits and every layer, set beside ours. The evidence that the trace is right.

Two modes. *As is*: llama.cpp runs the file itself; on a quantized file it rounds activations to 8 bit before each
product, so only the prediction is judged (same top token, or a near tie). *Strict*: llama.cpp first rewrites the file
as F32 (it dequantizes exactly); then logits and every layer must agree to 1e-5, ours still computed from the original.

llama.cpp runs in a process of its own (`ggjac.llamacpp`): some files make it end the process it runs in.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ggjac import llamacpp
from ggjac.gguf import open_gguf, shown
from ggjac.results import NO_WORDS, Plotted, Points, Table, Words
from ggjac.tokenizer import visible

if TYPE_CHECKING:
    from ggjac.model import Model, Trace
else:  # at run time, whatever answers as they do
    Model = Trace = Any

# The margin rule: llama.cpp's top token must be ours, or our second within this many logits (design: promise 2).
MARGIN_RANK, MARGIN_LOGITS = 2, 0.25

# Strict tolerance on relative L2 of logits and layers, in float32 and float64. Lower dtypes: EPS_TOLERANCE times eps.
TOLERANCE = 1e-5
EPS_TOLERANCE = 16
# Where llama.cpp takes GELU from its half-precision table. The table is imitated, but an input next to a rounding
# boundary may fall on its other side, which moves one value by half a unit of half precision.
GELU_TOLERANCE = 1e-3

# llama.cpp's names of what is compared, as they are in the graph of every dense family.
NAMES = ("attn_out", "ffn_out", "l_out", "result_norm")
# In these graphs the branch's name is given, last or only, to its sum with the stream, which `l_out` tells as well.
SUMMED = {"olmo": "ffn_out", "nemotron": "ffn_out", "gptneox": "ffn_out"}


class ParityError(ValueError):
    """llama.cpp could not be asked; the message says what to do."""


class NoRoomError(ParityError):
    """Memory or disk is too small for the check."""

    will_not_fit = True  # the command line's exit code 4


@dataclass(frozen=True)
class Reference:
    """What llama.cpp computed: logits of every position, and named tensors in the order of its graph."""

    logits: Float[Tensor, "n v"]
    tensors: dict[str, Tensor] = field(default_factory=dict)  # name -> [n, width]
    prompt_ids: list[int] | None = None  # llama.cpp's tokens of the prompt, where one was given


@dataclass(frozen=True)
class LayerError:
    """How far one of our tensors is from llama.cpp's: ‖ours - theirs‖ / ‖theirs‖."""

    name: str  # llama.cpp's: l_out-3, attn_out-3, ffn_out-3, result_norm
    layer: int | None
    error: float  # over all positions
    position: int  # where it is worst
    position_error: float  # there


@dataclass(frozen=True)
class Parity(Plotted):
    """The verdict on one prompt, and all it rests on. Logits are judged at the last position."""

    mode: str  # "as is" | "strict"
    verdict: bool
    reason: str
    tokens_equal: bool | None  # None: no text was given, or the file has no tokenizer
    top1_equal: bool
    top1: int  # llama.cpp's top token at the last position
    rank: int  # of that token in our logits, from 1
    gap: float  # our top logit less our logit of that token
    kl: float  # KL(llama.cpp ‖ ours) in nats, mean over positions
    kl_last: float  # ... at the last position
    logits_error: float  # relative L2 over all positions
    layers: list[LayerError]
    first_departure: str | None  # the first tensor beyond the tolerance, in the order of the graph
    tolerance: float | None  # relative L2 that logits and layers were held to; None: the margin rule
    cause: str | None  # why the numbers may differ at all

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return the verdict and all it rests on."""
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "mode": self.mode,
            "tolerance": self.tolerance,
            "tokens_equal": self.tokens_equal,
            "top1_equal": self.top1_equal,
            "top1": words.token(self.top1) | {"rank_in_ours": self.rank, "gap": self.gap},
            "kl": self.kl,
            "kl_last": self.kl_last,
            "logits_error": self.logits_error,
            "first_departure": self.first_departure,
            "cause": self.cause,
            "layers": [
                {"name": e.name, "error": e.error, "worst_position": e.position, "worst_error": e.position_error}
                for e in self.layers
            ],
        }

    def _table(self, words: Words) -> Table:
        columns = {name: [getattr(layer, name) for layer in self.layers] for name in LayerError.__annotations__}
        title = f"llama.cpp ({self.mode}): {'agrees' if self.verdict else 'disagrees'}: {self.reason}"
        top = f"top token {words.name(self.top1)}, rank {self.rank} of ours; KL {self.kl:.1e} nats"
        return Table(title, columns, (f"{top}, logits relative L2 {self.logits_error:.1e}",))

    def _plot(self, words: Words) -> Points:
        found: dict[str, dict[int, float]] = {}
        for e in self.layers:
            if e.layer is not None and 0 < e.error < math.inf:
                found.setdefault(e.name.rsplit("-", 1)[0], {})[e.layer] = e.error
        series = {kind: (list(own), list(own.values()), ()) for kind, own in found.items()}
        return Points("Distance from llama.cpp, layer by layer", "layer", "relative L2", series, log=True)


def verify(
    model: Model,
    ids: Sequence[int],
    *,
    strict: bool = False,
    tolerance: float | None = None,
    prompt: str | None = None,
    trace: Trace | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Parity:
    """Compare a model's trace of `ids` with llama.cpp's run on the same file.

    Costs a pass of llama.cpp and one of ours over the file, and `strict` 4 bytes per weight in a temporary folder.
    A file that is all F32 is held to the strict tolerance in either mode.

    Args:
        model: a `ggjac.model.Model`.
        ids: token ids of the prompt.
        strict: let llama.cpp run a copy of the file rewritten as F32.
        tolerance: relative L2 that logits and layers must keep, in either mode, instead of the default.
        prompt: the text that gave the ids; llama.cpp then tokenizes it with the whole model loaded.
        trace: a trace of the same ids: its logits are compared, nothing is computed again, and no layer is compared.
        threads: of llama.cpp; default: the CPUs this process may use.
        progress: called with one line before each step.

    Raises:
        ParityError: llama.cpp is missing, cannot run the file, or there is no room for the copy.
        TokenizerError: `prompt` has no ids.
    """
    tell = progress or (lambda _: None)
    if prompt is not None:
        model.tokenizer.encode(prompt)  # refuses the text on which llama.cpp would end the process
    types = {info.type.name for info in model.gguf.tensors.values()}
    rewrite = strict and types != {"F32"}
    gelu = model.config.row.activation == "gelu"
    if tolerance is None and (strict or types == {"F32"}):
        tolerance = max(_dtype_tolerance(model.dtype), GELU_TOLERANCE if gelu else 0.0)
    path = model.gguf.paths[0]
    with ExitStack() as stack:
        if rewrite:
            tell("llama.cpp: rewriting the file as F32")
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ggjac-"))
            path = rewrite_as_f32(path, folder, threads=threads)
            types = _types(path)
        tell("llama.cpp: evaluating the prompt")
        names = [name for name in NAMES if name != SUMMED.get(model.config.architecture)]
        reference = run_llama_cpp(path, ids, layers=trace is None, prompt=prompt, threads=threads, names=names)

    layers: dict[str, LayerError] = {}

    def observe(name: str, ours: Tensor) -> None:
        # Compared as they come: no second copy of the whole network's states.
        if (theirs := reference.tensors.get(name)) is not None:
            layers[name] = layer_error(name, ours, theirs)

    if trace is None:
        tell("comparing every layer of the trace")
        n_ctx = -(-len(ids) // 256) * 256  # what llama.cpp allocates; it chooses LongRoPE's factors by it
        trace = model.trace(ids, observe=observe, imitate=tolerance is not None, n_ctx=n_ctx, tapes=False)
    return judge(
        reference,
        trace.all_logits(),
        layers,
        mode="strict" if strict else "as is",
        tolerance=tolerance,
        tokens_equal=None if reference.prompt_ids is None else reference.prompt_ids == list(ids),
        cause=_cause(types, model.dtype, gelu),
    )


def judge(
    reference: Reference,
    logits: Float[Tensor, "n v"],
    layers: dict[str, LayerError],
    *,
    mode: str,
    tolerance: float | None,
    tokens_equal: bool | None = None,
    cause: str | None = None,
) -> Parity:
    """Reach the verdict on logits and on layers already compared. Nothing that is not finite passes."""
    numbers = _compare_logits(logits, reference.logits)
    # Ordered by the graph, whatever order ours came in. What llama.cpp has and we did not observe is a fault of ours.
    compared = [layers[name] for name in reference.tensors if name in layers]
    unseen = [name for name in reference.tensors if name.startswith("l_out-") and name not in layers]
    limit = math.inf if tolerance is None else tolerance
    # `not (a <= b)`, for NaN; and an infinite error departs even without a tolerance.
    departed = [layer for layer in compared if not (layer.error <= limit and math.isfinite(layer.error))]

    faults = []
    if tokens_equal is False:
        faults.append("our token ids are not llama.cpp's")
    for whose, values in (("our", logits), ("llama.cpp's", reference.logits)):
        if not _finite(values):
            faults.append(f"{whose} logits are not all finite")
    if departed:
        first = departed[0]
        faults.append(f"{first.name} is off by {first.error:.1e} relative L2, first of {len(departed)} tensors")
    if unseen:
        faults.append(f"{unseen[0]} was not compared, nor were {len(unseen) - 1} more")
    if not numbers["logits_error"] <= limit:
        faults.append(f"the logits are off by {numbers['logits_error']:.1e} relative L2")
    if tolerance is None and not numbers["top1_equal"]:
        rank, gap = numbers["rank"], numbers["gap"]
        if not (rank <= MARGIN_RANK and gap <= MARGIN_LOGITS):
            faults.append(f"llama.cpp's top token is our number {rank}, {gap:.2f} logits below our first")

    if faults:
        reason = "; ".join(faults)
        if tolerance is not None:
            reason += f" (tolerance {tolerance:.1e})"
        elif mode != "strict":
            reason += "; a strict check (--strict) tells rounding from error, and at which layer"
    else:
        top = "same top token" if numbers["top1_equal"] else f"near tie for the top token ({numbers['gap']:.2f} logits)"
        reason = f"{top}, logits within {numbers['logits_error']:.1e} relative L2"
        if compared:
            worst = max(compared, key=lambda layer: layer.error)
            reason += f", {len(compared)} tensors within {worst.error:.1e} ({worst.name})"
    return Parity(
        mode=mode,
        verdict=not faults,
        reason=reason,
        tokens_equal=tokens_equal,
        **numbers,
        layers=compared,
        first_departure=departed[0].name if departed else None,
        tolerance=tolerance,
        cause=cause,
    )


def layer_error(name: str, ours: Tensor, theirs: Tensor) -> LayerError:
    """Compare two tensors [n, width] in float64; a wrong shape is an infinite error."""
    number = name.rpartition("-")[2]
    layer = int(number) if number.isdecimal() else None
    if ours.shape != theirs.shape:
        return LayerError(name, layer, math.inf, 0, math.inf)
    theirs = theirs.double()
    difference = (ours.detach().cpu().double() - theirs).norm(dim=-1)
    scale = theirs.norm(dim=-1)
    by_position = _ratio(difference, scale)
    worst = int(by_position.nan_to_num(nan=math.inf, posinf=math.inf).argmax())
    return LayerError(name, layer, float(_ratio(difference.norm(), scale.norm())), worst, float(by_position[worst]))


def _ratio(error: Tensor, scale: Tensor) -> Tensor:
    """Return error / scale, with 0 / 0 = 0: equal zeros agree."""
    return torch.where(error == 0, torch.zeros_like(error), error / scale)


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _compare_logits(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Return the fields of `Parity` that logits [n, v] decide, in float64; NaN where a row is not finite."""
    if ours.shape != theirs.shape:
        raise ParityError(f"our logits have shape {list(ours.shape)}, llama.cpp's {list(theirs.shape)}")
    squared = scale = 0.0
    divergence = []
    for mine, other in zip(ours, theirs, strict=True):  # row by row: float64 copies of [n, v] can be gigabytes
        p, q = (row.detach().cpu().double() for row in (mine, other))
        squared, scale = squared + float((p - q).square().sum()), scale + float(q.square().sum())
        log_p, log_q = p.log_softmax(0), q.log_softmax(0)
        divergence.append(float((log_q.exp() * (log_q - log_p)).sum()))
    # The last position, which is the prediction.
    top = int(q.argmax())
    finite = _finite(p) and _finite(q)
    rank = 1 + int((p > p[top]).sum()) if finite else len(p)
    return {
        "top1_equal": finite and rank == 1,
        "top1": top,
        "rank": rank,
        "gap": float(p.max() - p[top]) if finite else math.nan,
        "kl": sum(divergence) / len(divergence),
        "kl_last": divergence[-1],
        "logits_error": 0.0 if squared == 0 else math.sqrt(squared / scale) if scale else math.inf,
    }


def _dtype_tolerance(dtype: torch.dtype | str) -> float:
    eps = torch.finfo(_dtype(dtype)).eps
    return max(TOLERANCE, EPS_TOLERANCE * eps) if eps > torch.finfo(torch.float32).eps else TOLERANCE


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _types(path: Path) -> set[str]:
    with open_gguf(path) as file:
        return {info.type.name for info in file.tensors.values()}


def _cause(types: Iterable[str], dtype: torch.dtype | str, gelu: bool) -> str | None:
    """Say what rounds: llama.cpp's partner types for each weight type (ggml-cpu.c, type_traits_cpu), and our dtype."""
    types, causes = set(types) - {"F32", "F64", "I8", "I16", "I32", "I64"}, []
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
    threads: int | None = None,
    names: Sequence[str] = NAMES,
    control_vector: str | os.PathLike[str] | None = None,
) -> Reference:
    """Evaluate token ids with llama.cpp and return the logits of all positions and, with `layers`, named tensors.

    `path` is the file, or the first shard of a split one; weights stay mapped. `names` are llama.cpp's, without the
    layer number; a name that occurs several times in the graph gives its last value. `control_vector` is a file whose
    directions are added to the stream of every position (`ggjac.llamacpp.control_vector`).

    The results pass through a temporary folder: 4 bytes for every logit, and for every element of the tensors.

    Raises:
        ParityError: llama.cpp is missing, cannot load or evaluate the file, ends while it tries to, or does not have a
            token id.
    """
    if not len(ids):
        raise ParityError("there are no token ids to evaluate; give at least one")
    with (
        _llama_cpp(f"while it loaded {_name(path)} and evaluated {len(ids)} tokens") as child,
        tempfile.TemporaryDirectory(prefix="ggjac-") as folder,
    ):
        reply = child.ask(
            "evaluate",
            path=os.fsdecode(path),
            ids=[int(id) for id in ids],
            names=list(names) if layers else [],
            prompt=prompt,
            threads=threads or _cpus(),
            folder=folder,
            control=None if control_vector is None else os.fsdecode(control_vector),
        )
        tensors = {
            name: torch.from_numpy(np.load(Path(folder) / f"{i}.npy", allow_pickle=False))
            for i, name in enumerate(reply["names"])
        }
    return Reference(tensors.pop("logits"), tensors, reply["prompt_ids"])


def rewrite_as_f32(path: str | os.PathLike[str], folder: str | os.PathLike[str], *, threads: int | None = None) -> Path:
    """Let llama.cpp dequantize a GGUF file into `folder` (exactly, metadata kept) and return the new file's path.

    Takes 4 bytes per weight of disk. Call it with a temporary folder.

    Raises:
        ParityError: not enough free disk, or llama.cpp is missing, cannot read or write, or ends while it tries to.
    """
    with open_gguf(path) as file:
        source = file.paths[0]
        elements = sum(info.elements for info in file.tensors.values())
        header = file.nbytes - sum(info.nbytes for info in file.tensors.values())
    # Padding between tensors, and room for the rest of the system: a full disk hurts more than this process.
    needed = 4 * elements + header + max(64 << 20, elements // 25)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoRoomError(
            f"rewriting {_name(path)} as F32 needs {needed / 1e9:.1f} GB in {_name(folder)}, which has "
            f"{free / 1e9:.1f} GB free; make room, set TMPDIR to another disk, or check without --strict"
        )
    target = Path(folder) / "f32.gguf"
    try:
        with _llama_cpp(f"while it rewrote {_name(path)} as F32") as child:
            child.ask("rewrite", source=os.fsdecode(source), target=os.fsdecode(target), threads=threads or _cpus())
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return target


@contextmanager
def _llama_cpp(task: str) -> Iterator[llamacpp.Child]:
    """Start llama.cpp in a process of its own and turn what goes wrong there into a `ParityError`."""
    if why := llamacpp.missing():
        raise ParityError(f"parity needs llama.cpp: {why}, or skip the check with --no-verify")
    try:
        with llamacpp.Child() as child:
            yield child
    except llamacpp.LlamaCppError as error:
        message = visible(str(error).encode("utf-8", errors="surrogateescape"))
        if isinstance(error, llamacpp.LlamaCppDied):
            likely = "too little memory" if error.will_not_fit else "a tensor's type or size that it does not support"
            message = (
                f"llama.cpp itself ended {task}, most likely because of {likely} ({message}); "
                "skip the check with --no-verify"
            )
        raise (NoRoomError if error.will_not_fit else ParityError)(message) from None


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _name(path: str | os.PathLike[str]) -> str:
    return shown(os.fsencode(path))
