"""A model file ready to run one prompt: embed, blocks, norm, head; and what a run leaves behind, a trace.

The forward pass is the frozen operators of `ggjac.blocks` applied to their own input, block by block: there is no
second model. It reads each tensor of the file once.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac import blocks, decode
from ggjac.blocks import BlockTape, Frame, MlpPath
from ggjac.config import ModelConfig
from ggjac.demo import demo_path
from ggjac.gguf import GGUFFile, open_gguf
from ggjac.jacobian import DetachedJacobian
from ggjac.rope import rotation
from ggjac.tokenizer import Tokenizer, open_tokenizer
from ggjac.weights import Weight, WeightStore

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

Observer = Callable[[str, Tensor], None]
Progress = Callable[[int, int], None]


class PromptError(ValueError):
    """A prompt that cannot be run: empty, too long, or with tokens outside the vocabulary."""


def open_model(
    path: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    threads: int | None = None,
) -> "Model":
    """Open a GGUF model for tracing; reads headers only.

    Args:
        path: the file, or the first shard of a split one; default the demo model that ships with the package.
        device: a torch device, or `"auto"`: CUDA where there is one, else the CPU.
        dtype: of all arithmetic: `"float32"`, `"float64"`, `"bfloat16"` or `"float16"`. Norms and softmax take place in
            float32 at least.
        threads: CPU threads of dequantization and torch; default as many as torch uses.

    Raises:
        GGUFError: the file cannot be opened or is damaged.
        ConfigError: the model is not supported, with the reason.
        WeightError: a tensor's storage type is not supported.
        ValueError: device or dtype unknown.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False  # TF32 keeps 10 bits of mantissa: not float32
    file = open_gguf(path or demo_path())
    return Model(file, device=device, dtype=dtype, threads=threads or torch.get_num_threads())


class Model:
    """A GGUF model bound to a device and a dtype. Made by `open_model`.

    Attributes:
        gguf: the open container; `path` is its file.
        config: sizes and constants.
        weights: every tensor, dequantized on demand.
        tokenizer: text to token ids and back.
        embedding: `[v, d]` input embeddings, `head`: `[v, d]` LM head; handles that stream, the same if tied.
    """

    def __init__(self, file: GGUFFile, *, device: torch.device, dtype: torch.dtype, threads: int):
        self.gguf, self.path = file, file.path
        self.config = ModelConfig.from_metadata(file.metadata, {t.name: t.shape for t in file.tensors.values()})
        self.weights = WeightStore(file, device=device, dtype=dtype, threads=threads)
        self.device, self.dtype = device, dtype
        self.embedding: Weight = self.weights["token_embd.weight"]
        self.head: Weight = self.weights["output.weight" if "output.weight" in self.weights else "token_embd.weight"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's vocabulary; llama.cpp's own code does the tokenizing."""
        metadata = self.gguf.metadata
        return open_tokenizer(
            self.path,
            tokens=metadata.get("tokenizer.ggml.tokens"),
            model=metadata.get("tokenizer.ggml.model"),
            types=metadata.get("tokenizer.ggml.token_type"),
        )

    def tokenize(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt, BOS added where the vocabulary asks for it, special tokens parsed.

        Raises:
            PromptError: the text is empty.
            TokenizerError: the file has no tokenizer, or llama-cpp-python is not installed.
        """
        if not prompt:
            raise PromptError("the prompt is empty; give a text with -p or token ids with --tokens")
        return self.tokenizer.encode(prompt)

    def trace(
        self,
        prompt: str | Sequence[int],
        *,
        mlp_path: MlpPath = "up",
        observe: Observer | None = None,
        progress: Progress | None = None,
    ) -> "Trace":
        """Run a prompt once and record what the detached Jacobian freezes.

        Args:
            prompt: text, or token ids.
            mlp_path: freezing rule of gated feed-forwards; see `ggjac.blocks.record_ffn`.
            observe: called with llama.cpp's name and value of intermediate tensors, each `[n, d]`: `attn_out-i`,
                `ffn_out-i` (what block `i` adds), `l_out-i` (the stream after it) and `result_norm`.
            progress: called as `progress(done, total)` after each block.

        Raises:
            PromptError: no tokens, more than the model's context, or ids outside the vocabulary.
        """
        if mlp_path not in ("up", "gate"):
            raise ValueError(f"mlp_path {mlp_path!r} is unknown; known: up, gate")
        ids = self.check_prompt(self.tokenize(prompt) if isinstance(prompt, str) else [int(i) for i in prompt])
        config, weights = self.config, self.weights
        factors = weights["rope_freqs.weight"].dense() if "rope_freqs.weight" in weights else None
        cos, sin = rotation(config.rope, len(ids), factors)
        frame = Frame(config, cos.to(self.device), sin.to(self.device), mlp_path)
        observe = observe or (lambda name, tensor: None)

        x = h = self.embedding.take(ids)
        one = x.new_ones(1)  # the homogeneous coordinate: biases count
        tapes = []
        for i in range(config.block_count):
            w = self.block(i)
            attn_tape = blocks.record_attention(w, frame, i, h)
            branch = blocks.attention(w, config, i, attn_tape).matmat(h[None], one)[0]
            observe(f"attn_out-{i}", branch)
            h = h + branch
            ffn_tape = blocks.record_ffn(w, frame, h)
            branch = blocks.ffn(w, mlp_path, ffn_tape).matmat(h[None], one)[0]
            observe(f"ffn_out-{i}", branch)
            h = h + branch
            observe(f"l_out-{i}", h)
            tapes.append(BlockTape(attn_tape, ffn_tape))
            if progress:
                progress(i + 1, config.block_count)
        norm = blocks.rms_diagonal(h, weights["output_norm.weight"].dense(), config.norm_epsilon)
        outputs = norm * h
        observe("result_norm", outputs)
        return Trace(model=self, ids=ids, x=x, outputs=outputs, norm=norm, frame=frame, tapes=tapes)

    def block(self, index: int) -> "blocks.BlockWeights":
        """Return the tensors of one block."""
        return self.weights.block(index, self.config.slices(index))

    def check_prompt(self, ids: Sequence[int]) -> list[int]:
        """Return the token ids, if this model can run them.

        Raises:
            PromptError: no tokens, more than the model's context, or ids outside the vocabulary.
        """
        context, vocabulary = self.config.context_length, self.config.vocabulary
        if not ids:
            raise PromptError("the prompt has no tokens; give a text with -p or token ids with --tokens")
        if len(ids) > context:
            raise PromptError(f"the prompt has {len(ids)} tokens, the model's context {context}; shorten it")
        for i in ids:
            if not 0 <= i < vocabulary:
                raise PromptError(f"token id {i} is out of range; the vocabulary has ids 0 to {vocabulary - 1}")
        return list(ids)


@dataclass(frozen=True)
class Trace:
    """One prompt's run: its outputs, and the tapes that freeze the network at it.

    Attributes:
        model: where it ran.
        ids: `n` token ids.
        x: `[n, d]`, input of block 0.
        outputs: `[n, d]`, after the final norm, before the head.
        norm: `[n, d]`, the final norm's diagonal.
        frame: what all blocks share, the freezing rule among it.
        tapes: of each block.
    """

    model: Model
    ids: list[int]
    x: Float[Tensor, "n d"]
    outputs: Float[Tensor, "n d"]
    norm: Float[Tensor, "n d"]
    frame: Frame
    tapes: list[BlockTape]

    @property
    def output(self) -> Float[Tensor, " d"]:
        """The last position's output, `[d]`."""
        return self.outputs[-1]

    @cached_property
    def logits(self) -> Float[Tensor, " v"]:
        """The last position's logits, `[v]`: scores of the next token."""
        return self.logits_at(-1)

    def logits_at(self, position: int) -> Float[Tensor, " v"]:
        """Return the logits at one position, `[v]`."""
        return decode.logits(self.model.head, self.outputs[position][None])[0]

    def all_logits(self) -> Float[Tensor, "n v"]:
        """Return the logits at every position, `[n, v]`."""
        return decode.logits(self.model.head, self.outputs)

    def jacobian(self, position: int = -1) -> DetachedJacobian:
        """Return the detached Jacobian of the output at `position` (negative: from the end).

        Raises:
            PromptError: the prompt has no such position.
        """
        n = len(self.ids)
        if not -n <= position < n:
            raise PromptError(f"position {position} is out of range; the prompt has positions 0 to {n - 1}")
        return DetachedJacobian(
            [self.model.block(i) for i in range(len(self.tapes))],
            self.tapes,
            self.norm,
            self.frame,
            x=self.x,
            output=self.outputs[position % n],
            ids=self.ids,
            position=position % n,
        )
