"""llama.cpp on the same file: token ids, logits and every layer, set beside ours. The evidence that the trace is right.

Two modes. *As is*: llama.cpp runs the file itself; on a quantized file it rounds activations to 8 bit before each
product, so only the prediction is judged (same top token, or a near tie). *Strict*: llama.cpp first rewrites the file
as F32 (it dequantizes exactly); then logits and every layer must agree to 1e-5, ours still computed from the original.

llama.cpp is set to what rounds least: CPU, F32 cache, no flash attention, one batch with every token an output, and
its parameter defaults otherwise: they mean "from the file" (the high-level `llama_cpp.Llama` overrides YaRN's).
"""

import ctypes
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .gguf import open_gguf, shown
from .tokenizer import captured_log, import_llama_cpp, quoted_log, tokenize

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


class ParityError(ValueError):
    """llama.cpp could not be asked; the message says what to do."""


class NoRoomError(ParityError):
    """The copy for a strict check does not fit on the disk."""

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
class Parity:
    """The verdict on one prompt, and all it rests on. Logits are judged at the last position."""

    mode: str  # "as is" | "strict"
    verdict: bool
    reason: str
    tokens_equal: bool | None  # None: no text was given, or the file has no tokenizer
    top1_equal: bool
    top1: int  # llama.cpp's top token at the last position
    rank: int  # of that token in our logits, from 1
    gap: float  # our top logit less our logit of that token
    top1_share: float  # of the positions at which both have the same top token
    kl: float  # KL(llama.cpp ‖ ours) in nats, mean over positions
    kl_last: float  # ... at the last position
    logits_error: float  # relative L2 over all positions
    layers: list[LayerError]
    first_departure: str | None  # the first tensor beyond the tolerance, in the order of the graph
    tolerance: float | None  # relative L2 that logits and layers were held to; None: the margin rule
    cause: str | None  # why the numbers may differ at all


def verify(
    model: Any,
    ids: Sequence[int],
    *,
    strict: bool = False,
    tolerance: float | None = None,
    prompt: str | None = None,
    trace: Any = None,
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
        reference = run_llama_cpp(path, ids, layers=trace is None, prompt=prompt, threads=threads)

    layers: dict[str, LayerError] = {}

    def observe(name: str, ours: Tensor) -> None:
        # Compared as they come: no second copy of the whole network's states.
        if (theirs := reference.tensors.get(name)) is not None:
            layers[name] = layer_error(name, ours, theirs)

    if trace is None:
        tell("comparing every layer of the trace")
        n_ctx = -(-len(ids) // 256) * 256  # what llama.cpp allocates; it chooses LongRoPE's factors by it
        trace = model.trace(ids, observe=observe, gelu_table=strict, n_ctx=n_ctx)
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
    difference = (ours.detach().to("cpu", torch.float64) - theirs).norm(dim=-1)
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
    divergence, same = [], []
    for mine, other in zip(ours, theirs, strict=True):  # row by row: float64 copies of [n, v] can be gigabytes
        p, q = (row.detach().to("cpu", torch.float64) for row in (mine, other))
        squared, scale = squared + float((p - q).square().sum()), scale + float(q.square().sum())
        log_p, log_q = p.log_softmax(0), q.log_softmax(0)
        divergence.append(float((log_q.exp() * (log_q - log_p)).sum()))
        same.append(bool(p[q.argmax()] == p.max()))
    # The last position, which is the prediction.
    top = int(q.argmax())
    finite = _finite(p) and _finite(q)
    rank = 1 + int((p > p[top]).sum()) if finite else len(p)
    return {
        "top1_equal": finite and rank == 1,
        "top1": top,
        "rank": rank,
        "gap": float(p.max() - p[top]) if finite else math.nan,
        "top1_share": sum(same) / len(same),
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
) -> Reference:
    """Evaluate token ids with llama.cpp and return the logits of all positions and, with `layers`, named tensors.

    `path` is the file, or the first shard of a split one; weights stay mapped. `names` are llama.cpp's, without the
    layer number; a name that occurs several times in the graph gives its last value.

    Raises:
        ParityError: llama.cpp is missing, cannot load or evaluate the file, or does not have a token id.
    """
    llama = _llama()
    n = len(ids)
    if not n:
        raise ParityError("there are no token ids to evaluate; give at least one")
    threads = threads or _cpus()
    capture = _Capture(llama, names) if layers else None
    with ExitStack() as stack:
        log = stack.enter_context(captured_log(llama))
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        # No GPU: CUDA rounds products to TF32. No repacking: it copies the weights, which then no longer fit beside a
        # big file, and some shapes crash it (0.3.36: Q8_0 with 96 rows).
        _set(params, n_gpu_layers=0, use_extra_bufts=False)
        model = llama.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise ParityError(_load_failure(path, quoted_log(log)))
        stack.callback(llama.llama_model_free, model)

        vocab = llama.llama_model_get_vocab(model)
        v = llama.llama_vocab_n_tokens(vocab)
        if bad := [id for id in ids if not 0 <= id < v]:
            raise ParityError(f"token id {bad[0]} is not in llama.cpp's vocabulary of {v}; give ids from 0 to {v - 1}")
        prompt_ids = None
        if prompt is not None and llama.llama_vocab_type(vocab) != llama.LLAMA_VOCAB_TYPE_NONE:
            prompt_ids = tokenize(llama, vocab, prompt.encode("utf-8"), add_special=True, parse_special=True)

        params = llama.llama_context_default_params()
        _set(
            params, n_ctx=n, n_batch=n, n_ubatch=n, n_seq_max=1, n_threads=threads, n_threads_batch=threads,
            type_k=llama.GGML_TYPE_F32, type_v=llama.GGML_TYPE_F32,
            flash_attn_type=llama.LLAMA_FLASH_ATTN_TYPE_DISABLED,  # it computes in F16
            offload_kqv=False, op_offload=False, embeddings=False,
        )  # fmt: skip
        if capture is not None:
            params.cb_eval = capture.callback
        context = llama.llama_init_from_model(model, params)
        if not context:
            raise ParityError(f"llama.cpp cannot prepare {n} tokens of {_name(path)}: {quoted_log(log)}")
        stack.callback(llama.llama_free, context)

        batch = llama.llama_batch_init(n, 0, 1)
        stack.callback(llama.llama_batch_free, batch)
        batch.n_tokens = n
        for i, id in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(id), i, 1, 1
            batch.seq_id[i][0] = 0
        failed = llama.llama_decode(context, batch)
        if capture is not None and capture.error is not None:
            raise capture.error
        if failed:
            raise ParityError(f"llama.cpp cannot evaluate {n} tokens of {_name(path)} ({failed}): {quoted_log(log)}")
        pointer = llama.llama_get_logits(context)
        if not pointer:
            raise ParityError(f"llama.cpp returned no logits for {_name(path)}: {quoted_log(log)}")
        logits = torch.from_numpy(np.ctypeslib.as_array(pointer, (n, v)).copy())
    return Reference(logits, {} if capture is None else capture.tensors, prompt_ids)


def rewrite_as_f32(path: str | os.PathLike[str], folder: str | os.PathLike[str], *, threads: int | None = None) -> Path:
    """Let llama.cpp dequantize a GGUF file into `folder` (exactly, metadata kept) and return the new file's path.

    Takes 4 bytes per weight of disk. Call it with a temporary folder.

    Raises:
        ParityError: not enough free disk, or llama.cpp cannot read or write.
    """
    llama = _llama()
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
    params = llama.llama_model_quantize_default_params()
    _set(params, ftype=llama.LLAMA_FTYPE_ALL_F32, allow_requantize=True, nthread=threads or _cpus())
    if hasattr(params, "max_buf_size"):
        params.max_buf_size = 256 << 20  # the default is 8 GiB
    with captured_log(llama) as log:
        failed = llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    if failed:
        target.unlink(missing_ok=True)
        raise ParityError(f"llama.cpp cannot rewrite {_name(path)} as F32 in {_name(folder)}: {quoted_log(log)}")
    return target


class _TensorHead(ctypes.Structure):
    """The head of `struct ggml_tensor` (ggml.h); `_Capture` checks it against ggml's own functions."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),  # elements per axis, the contiguous one first
        ("nb", ctypes.c_size_t * 4),  # bytes per step on each axis
    )


class _Capture:
    """Copy named tensors while llama.cpp computes: its buffers are reused by later nodes of the graph."""

    def __init__(self, llama: Any, names: Sequence[str]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.error: BaseException | None = None  # ctypes would swallow it
        self.callback = llama.ggml_backend_sched_eval_callback(self._call)
        self._wanted = re.compile(rf"(?:{'|'.join(map(re.escape, names))})(?:-\d+)?")
        self._float32 = llama.GGML_TYPE_F32
        self._ggml = _libggml(llama)

    def _call(self, tensor: int, ask: bool, _: int | None) -> bool:
        """Say which nodes are wanted (`ask`), then take them; False after `ask` ends the computation."""
        if self.error is not None:
            return ask
        try:
            name = self._ggml.ggml_get_name(tensor).decode("utf-8", errors="replace")
            if not self._wanted.fullmatch(name):
                return not ask
            if not ask:
                self.tensors[name] = self._copy(tensor, name)  # a name's last occurrence is its final value
        except BaseException as error:  # KeyboardInterrupt too: raised again after llama_decode
            self.error = error
            return ask
        return True

    def _copy(self, tensor: int, name: str) -> Tensor:
        head = _TensorHead.from_address(tensor)
        shape, strides = tuple(head.ne)[::-1], tuple(head.nb)[::-1]
        nbytes = self._ggml.ggml_nbytes(tensor)
        # For single-element blocks ggml_nbytes is the distance from the first byte to the last.
        extent = 4 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if math.prod(shape) != self._ggml.ggml_nelements(tensor) or nbytes != extent or head.type != self._float32:
            raise ParityError(
                f"{name}: llama.cpp's tensors are not laid out as ggjac expects (type {head.type}, sizes {shape}, "
                f"{nbytes} bytes); install a llama-cpp-python that ggjac was tested with"
            )
        data = np.empty(nbytes, np.uint8)
        self._ggml.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, nbytes)
        view = np.ndarray(shape, np.float32, buffer=data, strides=strides)
        return torch.from_numpy(np.ascontiguousarray(view).reshape(-1, shape[-1]))


def _libggml(llama: Any) -> Any:
    """Return the tensor library that this llama.cpp uses, with the functions a capture needs declared."""
    try:
        # Through libllama's own handle, which also finds its dependencies: another copy of libggml would do harm.
        library = ctypes.CDLL(llama._lib._name, handle=llama._lib._handle)
        for name, result, arguments in (
            ("ggml_get_name", ctypes.c_char_p, [ctypes.c_void_p]),
            ("ggml_nelements", ctypes.c_int64, [ctypes.c_void_p]),
            ("ggml_nbytes", ctypes.c_size_t, [ctypes.c_void_p]),
            ("ggml_backend_tensor_get", None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise ParityError(f"llama-cpp-python lacks what the layer check needs ({error}); update it") from None
    return library


def _llama() -> Any:
    try:
        return import_llama_cpp()
    except ImportError as error:
        raise ParityError(f"parity needs llama.cpp: {error}, or skip the check with --no-verify") from None


def _set(params: Any, **values: Any) -> None:
    """Set fields of a parameter struct; ctypes alone would accept a name that the struct does not have."""
    for name, value in values.items():
        if not hasattr(params, name):
            raise ParityError(f"this llama-cpp-python has no parameter {name}; update it, or skip with --no-verify")
        setattr(params, name, value)


def _load_failure(path: str | os.PathLike[str], log: str) -> str:
    if "unknown model architecture" in log:
        return (
            f"this llama.cpp does not know the architecture of {_name(path)} ({log}); update llama-cpp-python, or skip "
            "the check with --no-verify"
        )
    return f"llama.cpp cannot load {_name(path)}: {log}; skip the check with --no-verify"


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _name(path: str | os.PathLike[str]) -> str:
    return shown(os.fsencode(path))
