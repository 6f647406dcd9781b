"""The process that calls llama.cpp for `ggjac.llamacpp.child`: it evaluates prompts, rewrites files and tokenizes.

llama.cpp runs with the settings that round least: CPU, F32 cache, no flash attention, one batch in which every token is
an output. Other parameters keep their defaults, which mean "from the file" (the high-level `llama_cpp.Llama` overrides
YaRN's). Every prompt has a context of its own, since the state of a recurrent block cannot be cut back.
"""

import ctypes
import errno
import importlib.util
import json
import math
import os
import queue
import re
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where arrays are made; llama_cpp needs it too
    import numpy as np

from ggjac.llamacpp.child import LOADED, LOADING, REINSTALL, LlamaCppError, missing

Log = list[tuple[int, str]]  # level, text


def main() -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent receives Ctrl-C too, and ends this process
    with suppress(ImportError, ValueError, OSError):  # absent on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # output to stdout goes to the log instead
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    server = Server()
    while True:
        call, arguments = json.loads(requests.get())
        try:
            reply = {"result": getattr(server, call)(**arguments)}
        except Exception as error:
            reply = _refusal(error)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _listen(requests: "queue.SimpleQueue[bytes]") -> None:
    """Queue the lines of stdin. When it is closed by the parent, or with it, end at once, even during a call."""
    while line := sys.stdin.buffer.readline():
        requests.put(line)
    os._exit(0)


def _refusal(error: Exception) -> dict[str, Any]:
    if isinstance(error, LlamaCppError):
        message, will_not_fit = str(error), error.will_not_fit
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        message, will_not_fit = f"{error.strerror} in {tempfile.gettempdir()}: make room, or set TMPDIR", True
    else:
        message = f"the process of llama.cpp failed ({type(error).__name__}: {error})"
        will_not_fit = isinstance(error, MemoryError)
    return {"error": message, "will_not_fit": will_not_fit}


class Server:
    """The calls that the child answers. Arguments and results are plain JSON."""

    def __init__(self) -> None:
        _skip_high_level()
        self.llama: Any = None
        self.log: Log = []
        self.vocab: Any = None

    def _ready(self) -> Any:
        if self.llama is None:
            os.write(2, f"{LOADING}\n".encode())
            self.llama = import_llama_cpp()
            os.write(2, f"{LOADED}\n".encode())
            self._stack = ExitStack()
            self.log = self._stack.enter_context(captured_log(self.llama, echo=True))
        self.log.clear()
        return self.llama

    def evaluate(
        self,
        path: str,
        ids: list[int],
        names: list[str],
        prompt: str | None,
        threads: int,
        folder: str,
        parse_special: bool = True,
        control: str | None = None,
    ) -> dict[str, Any]:
        """Evaluate token ids; save logits and tensors as `folder/{i}.npy`, where i is the index of the returned name.

        `control` is the path of a control vector, added at every position with scale 1.
        """
        import numpy as np

        files: dict[str, int] = {}

        def keep(name: str, values: "np.ndarray") -> None:
            np.save(Path(folder) / f"{files.setdefault(name, len(files))}.npy", values, allow_pickle=False)

        llama = self._ready()
        text: dict[str, Any] = {"prompt": prompt, "parse_special": parse_special}
        prompt_ids = evaluate(
            llama, path, ids, log=self.log, keep=keep, names=names, threads=threads, control=control, **text
        )
        return {"names": list(files), "prompt_ids": prompt_ids}

    def rewrite(self, source: str, target: str, threads: int) -> None:
        """Rewrite a file as F32."""
        rewrite(self._ready(), source, target, log=self.log, threads=threads)

    def vocabulary(self, path: str) -> dict[str, Any]:
        """Load the vocabulary of a file for later calls, and return its properties."""
        llama = self._ready()
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        _set(params, vocab_only=True, n_gpu_layers=0)
        model = llama.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise LlamaCppError(quoted_log(self.log))
        vocab = self.vocab = llama.llama_model_get_vocab(model)
        types = {llama.LLAMA_VOCAB_TYPE_SPM: "spm", llama.LLAMA_VOCAB_TYPE_BPE: "bpe"}
        return {
            "n_tokens": llama.llama_vocab_n_tokens(vocab),
            "type": types.get(llama.llama_vocab_type(vocab), "other"),
            "bos": llama.llama_vocab_bos(vocab),
            "eos": llama.llama_vocab_eos(vocab),
            "add_bos": bool(llama.llama_vocab_get_add_bos(vocab)),
            "add_eos": bool(llama.llama_vocab_get_add_eos(vocab)),
        }

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """Return the token ids of a text."""
        data = text.encode("utf-8")
        return tokenize(self._ready(), self.vocab, data, add_special=add_special, parse_special=parse_special)

    def first_piece(self, id: int) -> str:
        """Return the bytes of a token at the beginning of a text, as hexadecimal digits."""
        llama, first = self._ready(), (ctypes.c_int32 * 1)(id)
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = llama.llama_detokenize(self.vocab, first, 1, buffer, size, False, True)
            if count >= 0 or size > 64:
                return buffer.raw[: max(count, 0)].hex()
            size = -count


def _skip_high_level() -> None:
    """Make `llama_cpp` a bare package: its own __init__ imports chat templates and more, most of the start-up time."""
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec("llama_cpp")
        if spec is not None and spec.submodule_search_locations is not None:
            package = types.ModuleType("llama_cpp")
            package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
            sys.modules["llama_cpp"] = package


def import_llama_cpp() -> Any:
    """Import llama.cpp's C interface.

    Raises:
        LlamaCppError: it is missing or cannot be loaded; the message is one line that says what to install.
    """
    try:
        from llama_cpp import llama_cpp
    except ModuleNotFoundError as error:
        if missing():
            raise LlamaCppError(str(missing())) from None
        raise LlamaCppError(f"llama-cpp-python cannot be loaded ({error}): {REINSTALL}") from None
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        detail = " ".join(str(error).split())
        raise LlamaCppError(f"llama-cpp-python cannot be loaded ({detail}): {REINSTALL}") from None
    return llama_cpp


# -- llama.cpp's C interface, used in the child and in tests -----------------------------------------------------------


def evaluate(
    llama: Any,
    path: str | os.PathLike[str],
    ids: Sequence[int],
    *,
    log: Log,
    keep: Callable[[str, "np.ndarray"], None],
    names: Sequence[str],
    prompt: str | None,
    parse_special: bool = True,
    threads: int,
    control: str | None = None,
) -> list[int] | None:
    """Evaluate token ids; `keep` is called with each named tensor [n, width], and last with "logits" [n, v].

    `names` are llama.cpp's, without the layer number; `keep` is called for every occurrence of a name in the graph.
    Arrays are float32 and valid only during the call of `keep`. Returns llama.cpp's tokens of the prompt.

    Raises:
        LlamaCppError: llama.cpp cannot load or evaluate the file, or a token id is not in its vocabulary.
    """
    n = len(ids)
    capture = _Capture(llama, names, keep) if names else None
    with ExitStack() as stack:
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        # No GPU: CUDA rounds products to TF32. No repacking: it copies the weights, for which a big file leaves no
        # memory, and some shapes crash it (0.3.36: Q8_0 with 96 rows).
        _set(params, n_gpu_layers=0, use_extra_bufts=False)
        model = llama.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise LlamaCppError(_load_failure(path, quoted_log(log)))
        stack.callback(llama.llama_model_free, model)

        vocab = llama.llama_model_get_vocab(model)
        v = llama.llama_vocab_n_tokens(vocab)
        if bad := [id for id in ids if not 0 <= id < v]:
            raise LlamaCppError(
                f"token id {bad[0]} is not in llama.cpp's vocabulary of {v}; give ids from 0 to {v - 1}"
            )
        prompt_ids = None
        if prompt is not None and llama.llama_vocab_type(vocab) != llama.LLAMA_VOCAB_TYPE_NONE:
            prompt_ids = tokenize(llama, vocab, prompt.encode("utf-8"), add_special=True, parse_special=parse_special)

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
            raise LlamaCppError(f"llama.cpp cannot prepare {n} tokens of {_name(path)}: {quoted_log(log)}")
        stack.callback(llama.llama_free, context)
        if control is not None:
            _set_control_vector(llama, model, context, control, log=log)

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
            raise LlamaCppError(f"llama.cpp cannot evaluate {n} tokens of {_name(path)} ({failed}): {quoted_log(log)}")
        pointer = llama.llama_get_logits(context)
        if not pointer:
            raise LlamaCppError(f"llama.cpp returned no logits for {_name(path)}: {quoted_log(log)}")
        import numpy as np

        keep("logits", np.ctypeslib.as_array(pointer, (n, v)))
    return prompt_ids


def _set_control_vector(llama: Any, model: Any, context: Any, path: str, *, log: Log) -> None:
    """Load a control vector as llama.cpp's programs do (`common_control_vector_load`, which its library lacks).

    `direction.N` is row `N - 1` of the argument of `llama_set_adapter_cvec`; missing ones are zero.

    Raises:
        LlamaCppError: the file is not a control vector, or its width is not the model's.
    """
    import gguf
    import numpy as np

    rows: dict[int, np.ndarray] = {}
    try:
        for tensor in gguf.GGUFReader(path).tensors:
            stem, _, number = tensor.name.partition(".")
            if stem == "direction" and number.isdecimal() and int(number) > 0:
                rows[int(number)] = np.array(tensor.data, np.float32)
    except (ValueError, OSError) as error:
        raise LlamaCppError(f"{_name(path)}: is not a control vector ({error})") from None
    width, count = llama.llama_model_n_embd(model), llama.llama_model_n_layer(model)
    data = np.zeros((count, width), np.float32)
    for layer, row in rows.items():
        if row.shape != (width,) or layer >= count:
            found = f"direction.{layer} {list(row.shape)}"
            raise LlamaCppError(f"{_name(path)}: {found} does not fit a model of {count} blocks, {width} wide")
        data[layer - 1] = row
    if not rows:
        raise LlamaCppError(f"{_name(path)}: is not a control vector (no tensor direction.N)")
    pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if llama.llama_set_adapter_cvec(context, pointer, data.size, width, 1, count):
        raise LlamaCppError(f"llama.cpp refuses the control vector {_name(path)}: {quoted_log(log)}")


def rewrite(
    llama: Any, source: str | os.PathLike[str], target: str | os.PathLike[str], *, log: Log, threads: int
) -> None:
    """Dequantize a GGUF file into another with llama.cpp: exactly, metadata kept.

    Raises:
        LlamaCppError: llama.cpp cannot read or write; the target is then removed.
    """
    params = llama.llama_model_quantize_default_params()
    _set(params, ftype=llama.LLAMA_FTYPE_ALL_F32, allow_requantize=True, nthread=threads)
    if hasattr(params, "max_buf_size"):
        params.max_buf_size = 256 << 20  # the default is 8 GiB
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)):
        Path(target).unlink(missing_ok=True)
        folder = _name(Path(target).parent)
        raise LlamaCppError(f"llama.cpp cannot rewrite {_name(source)} as F32 in {folder}: {quoted_log(log)}")


def tokenize(llama: Any, vocab: Any, data: bytes, *, add_special: bool, parse_special: bool) -> list[int]:
    """Call `llama_tokenize` on UTF-8 bytes, with a sufficiently large buffer."""
    size = len(data) + 8
    while True:
        buffer = (ctypes.c_int32 * size)()
        count = llama.llama_tokenize(vocab, data, len(data), buffer, size, add_special, parse_special)
        if count >= 0:
            return buffer[:count]
        if -count <= size:  # INT32_MIN: more tokens than an int32 counts
            raise LlamaCppError(f"the text is too long to tokenize ({len(data)} bytes)")
        size = -count


class _TensorHead(ctypes.Structure):
    """The head of `struct ggml_tensor` (ggml.h); `_Capture` checks it against ggml's own functions."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),  # elements per axis, the contiguous one first
        ("nb", ctypes.c_size_t * 4),  # bytes per step on each axis
    )


class _Capture:
    """Copy named tensors while llama.cpp computes, because later nodes of the graph reuse their buffers."""

    def __init__(self, llama: Any, names: Sequence[str], keep: Callable[[str, "np.ndarray"], None]) -> None:
        self.error: BaseException | None = None  # ctypes would discard it
        self.callback = llama.ggml_backend_sched_eval_callback(self._call)
        self._keep = keep
        self._wanted = re.compile(rf"(?:{'|'.join(map(re.escape, names))})(?:-\d+)?")
        self._float32 = llama.GGML_TYPE_F32
        self._ggml = _libggml(llama)

    def _call(self, tensor: int, ask: bool, _: int | None) -> bool:
        """With `ask`, say whether a node is wanted; else copy it. Returning False then ends the computation."""
        if self.error is not None:
            return ask
        try:
            name = self._ggml.ggml_get_name(tensor).decode("utf-8", errors="replace")
            if not self._wanted.fullmatch(name):
                return not ask
            if not ask:
                self._keep(name, self._copy(tensor, name))  # a name's last occurrence is its final value
        except BaseException as error:  # re-raised after llama_decode
            self.error = error
            return ask
        return True

    def _copy(self, tensor: int, name: str) -> "np.ndarray":
        import numpy as np

        head = _TensorHead.from_address(tensor)
        shape, strides = tuple(head.ne)[::-1], tuple(head.nb)[::-1]
        nbytes = self._ggml.ggml_nbytes(tensor)
        # For single-element blocks ggml_nbytes is the distance from the first byte to the last.
        extent = 4 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if math.prod(shape) != self._ggml.ggml_nelements(tensor) or nbytes != extent or head.type != self._float32:
            raise LlamaCppError(
                f"{name}: llama.cpp's tensors are not laid out as ggjac expects (type {head.type}, sizes {shape}, "
                f"{nbytes} bytes); install a llama-cpp-python that ggjac was tested with"
            )
        data = np.empty(nbytes, np.uint8)
        self._ggml.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, nbytes)
        view: np.ndarray = np.ndarray(shape, np.float32, buffer=data, strides=strides)
        return np.ascontiguousarray(view).reshape(-1, shape[-1])


def _libggml(llama: Any) -> Any:
    """Return the tensor library that this llama.cpp uses, with the functions a capture needs declared."""
    try:
        # Through libllama's own handle, which also finds its dependencies: a second copy of libggml would do harm.
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
        raise LlamaCppError(f"llama-cpp-python lacks a function for the layer check ({error}); update it") from None
    return library


def _set(params: Any, **values: Any) -> None:
    """Set fields of a parameter struct; refuse unknown names, which ctypes alone would accept."""
    for name, value in values.items():
        if not hasattr(params, name):
            raise LlamaCppError(f"this llama-cpp-python has no parameter {name}; update it")
        setattr(params, name, value)


def _load_failure(path: str | os.PathLike[str], log: str) -> str:
    if "unknown model architecture" in log:
        return (
            f"this llama.cpp does not support the architecture of {_name(path)} ({log}); update llama-cpp-python, or "
            "do without the comparison"
        )
    if rows := re.search(r"'token_embd.weight' has wrong shape; expected +\d+, +(\d+), got +\d+, +(\d+)", log):
        return (
            f"llama.cpp cannot load {_name(path)}: it has {rows[2]} embeddings, for the {rows[1]} tokens of its "
            "vocabulary; ggjac runs such a file, but it cannot be compared"
        )
    return f"llama.cpp cannot load {_name(path)}: {log}; ggjac itself reads the file, but it cannot be compared"


def _name(path: str | os.PathLike[str]) -> str:
    return os.fsdecode(path)


@contextmanager
def captured_log(llama: Any, *, echo: bool = False) -> Iterator[Log]:
    """Collect the log of llama.cpp until the end; nothing is printed, or with `echo` warnings and errors only."""
    lines: Log = []

    def collect(level: int, text: bytes | None, _: Any) -> None:
        lines.append((level, (text or b"").decode("utf-8", errors="replace")))
        del lines[:-1000]  # the log is unbounded
        if echo and level in (_WARNING, _ERROR):  # others would be quoted as the reason of a crash
            os.write(2, text or b"")

    callback = llama.llama_log_callback(collect)
    previous, data = llama.llama_log_callback(), ctypes.c_void_p()
    llama.llama_log_get(ctypes.byref(previous), ctypes.byref(data))
    llama.llama_log_set(callback, ctypes.c_void_p())
    try:
        yield lines
    finally:
        llama.llama_log_set(previous, data)


def quoted_log(log: Sequence[tuple[int, str]]) -> str:
    """Return llama.cpp's error lines as one line, or its last lines if it reported no error."""
    lines = [line.strip() for level, line in log if level == _ERROR and line.strip()]
    lines = lines or [line.strip() for _, line in log if line.strip(" .\n")]
    return "; ".join(dict.fromkeys(lines[-3:]))[:400] or "it gave no reason"


_WARNING, _ERROR = 3, 4  # ggml.h, enum ggml_log_level: GGML_LOG_LEVEL_WARN, GGML_LOG_LEVEL_ERROR

if __name__ == "__main__":
    main()
