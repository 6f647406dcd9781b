"""Run llama.cpp on a file and read its logits and intermediate states: the judge of the oracle.

The low-level API, because the high-level one passes YaRN parameters of its own and thereby overrides the file's.
Everything that rounds is off: CPU, F32 cache, no flash attention, all tokens as outputs in one batch.
"""

import ctypes
import functools
import os
from collections.abc import Sequence

import llama_cpp
import numpy as np
import tiny
import torch
from torch import Tensor


@functools.cache
def libggml() -> ctypes.CDLL:
    library = tiny.libggml()
    library.ggml_get_name.restype = ctypes.c_char_p
    library.ggml_nelements.restype = ctypes.c_int64
    library.ggml_get_data.restype = ctypes.c_void_p
    for function in (library.ggml_get_name, library.ggml_nelements, library.ggml_get_data):
        function.argtypes = [ctypes.c_void_p]
    return library


NAMES = (
    *("l_out-", "attn_out-", "ffn_out-", "ffn_inp-", "sa_out-", "result_norm"),
    *("attn_output-", "linear_attn_out-", "attn_residual-", "kda_out-", "mla_out-", "wo-"),
    *("ffn_moe_out-", "ffn_dense_out-", "ffn_down-", "attn_out_norm-", "attn_out_scaled-"),
    *("model.layers.{}.conv.out_proj-", "model.layers.{}.self_attn.out_proj-"),
    *("mamba_out-", "ssm_out-", "layer_out-", "nemotron_h_block_out-"),
    *("ffn_residual-", "l_last-"),
    *("attn_post_norm-", "ffn_post_norm-", "per_layer_embd_out-"),
    *("attn_o_proj-", "attn_proj-", "attn_out_proj-", "attn_norm_in-", "h_nextn", "ffn_moe_out"),
    "prefix_sum_attn-",
)


def run(
    path: str | os.PathLike[str],
    ids: Sequence[int],
    *,
    threads: int = 1,
    context: int = 256,
    names: tuple[str, ...] = NAMES,
    x: Tensor | None = None,
) -> dict[str, Tensor]:
    """Evaluate token `ids` and return, in float32, `logits` [n, v] and the states [n, d] whose names begin so.

    Which of them exist, and before or after which norm or scale, differs between the families. `context` is how many
    tokens the context is to hold at least; some models choose their rope factors by it.
    `path` should be an F32 file (`tiny.quantize(path, target, "F32")`): with any other type llama.cpp rounds the
    activations, too. With `x` [n, d] it takes these as the input of block 0, where no position is learned, and no more
    of the ids than their number. What was asked before of a file that has not changed is not computed again.
    """
    path, ids = os.fspath(path), tuple(map(int, ids))
    given = b"" if x is None else x.float().contiguous().numpy().tobytes()
    return dict(_run(path, os.stat(path).st_mtime_ns, ids, threads, context, names, given))


@functools.lru_cache(maxsize=256)
def _run(
    path: str, changed: int, ids: tuple[int, ...], threads: int, context: int, names: tuple[str, ...], x: bytes
) -> dict[str, Tensor]:
    n, states = len(ids), {}

    @llama_cpp.ggml_backend_sched_eval_callback
    def observe(tensor: int, ask: bool, _: int | None) -> bool:
        name = libggml().ggml_get_name(tensor).decode()
        if name.startswith(names) and " " not in name and not ask:
            count = libggml().ggml_nelements(tensor)
            source = ctypes.cast(libggml().ggml_get_data(tensor), ctypes.POINTER(ctypes.c_float))
            # Buffers are reused by later nodes, hence the copy; a name's last occurrence is its final value.
            states[name] = torch.from_numpy(np.ctypeslib.as_array(source, (count,)).copy()).reshape(n, -1)
        return name.startswith(names) if ask else True

    with tiny.quiet():
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params)
        assert model, f"llama.cpp could not load {path}"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(context, n)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cb_eval = observe
        context = llama_cpp.llama_init_from_model(model, params)
        width = llama_cpp.llama_model_n_embd_inp(model)
        assert len(x) in (0, n * width * 4), f"{path} takes {width} floats for each position"
        batch = llama_cpp.llama_batch_init(n, width if x else 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(ids):
                batch.pos[i], batch.n_seq_id[i], batch.logits[i] = i, 1, True
                batch.seq_id[i][0] = 0
                if not x:
                    batch.token[i] = token
            if x:
                ctypes.memmove(batch.embd, x, len(x))
            failed = llama_cpp.llama_decode(context, batch)
            assert not failed, f"llama_decode failed on {path}: {failed}"
            vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (n, vocab)).copy()
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)
            llama_cpp.llama_model_free(model)
    return states | {"logits": torch.from_numpy(logits)}
