"""A model file ready to run one prompt: embeddings, blocks, norm, head; and the trace that a run returns.

The forward pass is the frozen operators of `ggjac.blocks` applied to their own input, block by block: there is no
second model. It reads each tensor of the file once.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from ggjac import blocks, chat, decode, planner
from ggjac.blocks import BlockTape, BlockWeights, FinalNorm, Frame, Past
from ggjac.checks import excluded_positions, input_positions, output_positions, whole
from ggjac.config import ModelConfig, Rope, fused_parts, read_config
from ggjac.display import visible
from ggjac.division import largest
from ggjac.gguf import GGUFFile, open_gguf
from ggjac.gguf.hub import demo_path, resolve, title
from ggjac.jacobian import DetachedJacobian, FrozenNetwork, Span
from ggjac.jacobian.tapes import Tapes
from ggjac.parallel import Crew
from ggjac.planner import Plan, machine
from ggjac.results import Table, Words
from ggjac.rope import rotation
from ggjac.runs.journal import Journal
from ggjac.sizes import CHUNK_BYTES, EXPERTS_OF_TOKENS, ITEM_BYTES, MlpPath
from ggjac.tokenizer import Tokenizer, open_tokenizer
from ggjac.weights import Block, Weight, WeightError, WeightStore

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}

Observer = Callable[[str, Tensor], None]
Found = TypeVar("Found")


class PromptError(ValueError):
    """A prompt cannot be run: it is empty, too long, or has tokens outside the vocabulary."""


class DeviceError(ValueError):
    """There is no device of that name."""


def open_model(
    path: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    threads: int | None = None,
    asked: str | None = None,
    context: int | None = None,
    group: ProcessGroup | None = None,
) -> "Model":
    """Open a GGUF model for tracing; reads headers only.

    Args:
        path: the file, or the first shard of a split file, or a name as `ggjac.gguf.hub.resolve` takes it; default the
            demo model that ships with the package.
        device: a torch device, or `"auto"`: CUDA where there is one, else the CPU.
        dtype: dtype of all computation: `"float32"`, `"float64"`, `"bfloat16"` or `"float16"`. Norms and softmax are
            computed in float32 at least.
        threads: CPU threads for dequantization and torch; default torch's own number, or as many whole CPUs as the
            quota of this process's container allows.
        asked: the name for which `path` was found, if it was not found here.
        context: the largest number of tokens, and, as in llama.cpp, what decides between LongRoPE's short and long
            factors; default the model's own, and the length of each prompt.
        group: ranks of `torch.distributed` that share the model; each must make the same calls. Default none.

    Raises:
        GGUFError: the file cannot be opened or is damaged.
        ConfigError: the model is not supported, or has no positions for such a context; the message has the reason.
        WeightError: a tensor's storage type is not supported.
        DeviceError: there is no device of that name.
        ValueError: torch cannot use the device here, the dtype is unknown, or `threads` or `context` is out of range.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype {dtype} is not supported; supported: {', '.join(DTYPES)}")
    for name, number in (("threads", threads), ("context", context)):
        if number is not None:
            whole(name, number)
    device = find_device(device)
    threads = threads or machine.torch_threads()
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    _multiply_in_full()
    found = resolve(path or demo_path())
    asked = asked or (None if path is None or found == Path(path) else str(path))
    how: dict[str, Any] = {"device": device, "dtype": dtype, "threads": threads}
    return Model(open_gguf(found), **how, asked=asked, context=context, group=group)


def find_device(name: str | torch.device) -> torch.device:
    """Return the device of a name, if torch can use it here; `"auto"` is CUDA if there is one, else the CPU.

    Raises:
        DeviceError: there is no device of that name.
        ValueError: torch cannot use it here.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        try:
            return find_device("cuda")
        except ValueError as error:
            warnings.warn(f"{str(error).removesuffix('; use cpu')}: computing on the CPU", stacklevel=2)
            return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device {name!r} is unknown; try auto, cpu or cuda") from error
    if device.type == "meta":
        raise DeviceError("device meta holds no numbers; try auto, cpu or cuda")
    try:
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("it finds no CUDA device")
        (torch.zeros(1, device=device) + 1).cpu()  # a kernel, and waiting for it: some builds have none for this card
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")  # further sentences list all backends
        if "no kernel image" in reason:
            reason += f": this build of torch has no code for {_card(device)}; install a build of torch that has"
        raise ValueError(f"device {name} was asked for, but torch cannot use it here ({reason}); use cpu") from None
    return device


def _multiply_in_full() -> None:
    """Let torch multiply float32 as float32, and let CUDA add up products of 16 bit in float32: neither is sure."""
    torch.set_float32_matmul_precision("highest")  # under its later name too, `fp32_precision`, and for oneDNN
    # Parts of a sum that several blocks of threads share would be rounded to 16 bit.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _card(device: torch.device) -> str:
    """Return what a CUDA device is, for a message."""
    try:
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    except (RuntimeError, AssertionError):
        return "this device"


class Model:
    """A GGUF model bound to a device and a dtype. Made by `open_model`.

    Attributes:
        gguf: the open container; `path` is its file.
        asked: the name in another program's store for which the file was found; None for a path.
        config: sizes and constants.
        context: the context that was asked for, or None.
        trained_context: the number of tokens that the model was trained on.
        weights: every tensor, dequantized on demand.
        crew: what of every block is this process's, if several share the model; or None.
        tokenizer: text to token ids and back.
        embedding: `[v, d]` input embeddings, streamed.
        head: the LM head; in models with tied embeddings, its matrix is that of the embeddings.
        chunk_bytes: working memory that a chunk of dense rows may take; see `fit`.
        keeps_ready: whether weights stay ready between sweeps, as far as half of the free memory has room, where `fit`
            does not rule; on the CPU no bit of a result changes.
    """

    keeps_ready = True

    def __init__(
        self,
        file: GGUFFile,
        *,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
        asked: str | None = None,
        context: int | None = None,
        group: ProcessGroup | None = None,
    ):
        self.gguf, self.path, self.asked, self.context = file, file.path, asked, context
        config = read_config(file.metadata, {t.name: t.shape for t in file.tensors.values()})
        self.trained_context = config.context_length
        self.config: ModelConfig = config.with_context(context)
        self.weights = WeightStore(file, device=device, dtype=dtype, threads=threads)
        self.device, self.dtype, self.chunk_bytes = device, dtype, CHUNK_BYTES
        self._placed = False
        self.crew: Crew | None = None
        if group is not None:
            self.crew = Crew.of(group, self.config, file.tensors)
        self.embedding: Weight = self.weights[self.config.embedding]
        self.head = decode.Head(
            self.weights["output.weight" if "output.weight" in self.weights else self.config.embedding],
            bias=self.weights["output.bias"].dense() if "output.bias" in self.weights else None,
            scale=self.config.logit_scale * self.weights.gain("output.weight"),
            softcap=self.config.logit_softcap,
        )

    @cached_property
    def title(self) -> str:
        """A name for people, and for folders: that of the file, or of its model where the file's is only a hash."""
        return title(self.path, self.asked, self.gguf.metadata.get("general.name"))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's vocabulary; llama.cpp's own code tokenizes."""
        metadata = self.gguf.metadata
        return open_tokenizer(
            self.path,
            tokens=metadata.get("tokenizer.ggml.tokens"),
            model=metadata.get("tokenizer.ggml.model"),
            types=metadata.get("tokenizer.ggml.token_type"),
        )

    def tokenize(self, prompt: str, *, parse_special: bool = True) -> list[int]:
        """Return the token ids of a prompt, with BOS if the vocabulary requires it, and never with EOS after it.

        With `parse_special`, `<s>` and the like in the text are the tokens that they name.

        Raises:
            PromptError: the text is empty.
            TokenizerError: the file has no tokenizer, or llama-cpp-python is not installed.
        """
        if not prompt:
            raise PromptError("the prompt is empty; give a text or token ids")
        return self.tokenizer.prompt(prompt, parse_special=parse_special)

    def spelled(self, text: str) -> list[int]:
        """Return the token ids of a text inside another one: nothing is added at its ends.

        Raises:
            TokenizerError: the file has no tokenizer, or llama-cpp-python is not installed.
        """
        ids = self.tokenizer.encode(text, add_special=False)
        return ids if len(ids) == 1 else self.tokenizer.continuation(text)

    def token(self, token: int | str) -> int:
        """Return the id of a token, which is given as its id or as its text, with its spaces as they are or as `␣`.

        Raises:
            PromptError: the text is not one token, or the id not in the vocabulary.
            TokenizerError: a text, and the file has no tokenizer, or llama-cpp-python is not installed.
            ValueError: it is neither a text nor a whole number.
        """
        if not isinstance(token, str):
            return self.check_prompt([token])[0]
        ids = self.spelled(token)
        if len(ids) != 1 and "␣" in token:  # as it is shown
            ids = self.spelled(token.replace("␣", " "))
        if len(ids) != 1:
            raise PromptError(
                f"{token!r} is {len(ids)} tokens ({self.words(ids)}); give the text of one token, or its id"
            )
        return ids[0]

    def words(self, ids: Sequence[int]) -> str:
        """Return the first tokens of several for a message, as they are shown."""
        return " + ".join(map(self.word, ids[:8])) + " + ..." * (len(ids) > 8) or "none"

    def __repr__(self) -> str:
        """Return file, architecture, blocks and dtype on one line."""
        config, dtype = self.config, str(self.dtype).removeprefix("torch.")
        where = f"{dtype} on {self.device}"
        return f"Model({self.path.name!r}, {config.architecture}, {config.block_count} blocks, {where})"

    def _repr_html_(self) -> str:
        """Return what the model is as a table."""
        config, dtype = self.config, str(self.dtype).removeprefix("torch.")
        facts: dict[str, Any] = {"file": visible(os.fsencode(self.path.name)), "architecture": config.architecture}
        facts |= {"blocks": config.block_count, "embedding length": config.d, "vocabulary": config.vocabulary}
        return Table.of("Model", facts | {"dtype": dtype, "device": self.device})._repr_html_()

    def chat(self, question: str, system: str | None = None) -> str:
        """Return the prompt in which a user asks a question, by the file's own chat template.

        Raises:
            ChatError: the file has no template, or it cannot be used.
        """
        return chat.rendered(self.gguf.metadata, self.tokenizer, question, system)

    def special_ids(self) -> list[int]:
        """Return the ids of tokens that are not text: by the vocabulary's types, control, unused and byte tokens."""
        kind = self.tokenizer.kind
        return [id for id in range(self.config.vocabulary) if kind(id) in ("control", "unused", "byte")]

    def word(self, id: int) -> str:
        """Return a token's name on one line, never empty; control characters are visible and harmless to a terminal."""
        return visible(self.tokenizer.name(id))

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of several tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.tokenizer.spell(ids).decode("utf-8", errors="replace")

    def plan(
        self,
        prompt: str | Sequence[int] | int,
        command: str = "svd",
        *,
        mlp_path: MlpPath = "up",
        ram_budget: int | str | None = None,
        vram_budget: int | str | None = None,
        tapes_on_disk: bool = False,
        threads: int | None = None,
        ranks: int | None = None,
        **asked: Any,
    ) -> Plan:
        """Return the time and memory that a command needs on a prompt, and whether it fits; nothing is computed.

        Args:
            prompt: text, token ids, or the number of tokens.
            command: one of `ggjac.planner.work.JOBS`.
            mlp_path: as `trace` takes it.
            ram_budget, vram_budget: bytes, or text such as `"2GiB"`; default half of the free memory, and all of the
                device's free memory.
            tapes_on_disk: if memory is short, assume `trace(..., tapes=Tapes(folder, resident=False))`; the plan states
                whether it did.
            threads: CPU threads of dequantization; default the model's own.
            ranks: processes that share the model, of which the plan is one's part; default as many as now do.
            asked: as `ggjac.planner.work.Request` has it: `rank`, `position` and so on.

        Raises:
            PromptError: as `trace`.
            PlanError: no such command, or something is out of range.
        """
        n = whole("the number of tokens", prompt, None) if isinstance(prompt, int) else len(self.prompt_ids(prompt))
        ram, vram = (machine.parse_size(b) if isinstance(b, str) else b for b in (ram_budget, vram_budget))
        ranks = whole("ranks", ranks) if ranks is not None else self.crew.ranks if self.crew else 1
        return planner.fitting(
            self.gguf,
            self.config,
            command,
            n,
            str(self.dtype).removeprefix("torch."),
            asked,
            mlp_path=mlp_path,
            device=machine.device_kind(self.device.type),
            threads=threads or self.weights.threads,
            budget=planner.Budget.of(ram, vram, str(self.device)),
            tapes_on_disk=tapes_on_disk,
            # The largest part on all ranks, so that all take the same steps.
            division=largest(self.config, self.gguf.tensors, ranks),
        )

    def fit(self, plan: Plan) -> None:
        """Follow a plan from now on: as many live weights as it has room for are cached between sweeps.

        Jacobians of later traces compute dense rows in chunks of the plan's size. On the CPU no bit of a result
        changes; on a device, larger tiles may change the last ones.

        Raises:
            NoFitError: the plan's budget is too small; the message names a sufficient one.
        """
        planner.check(plan)
        self._placed = True
        machine.return_freed_memory()
        self.weights.place(plan.places, plan.room, plan.pieces)
        self.chunk_bytes = plan.work.chunk_bytes

    def _keep_ready(self, n: int) -> None:
        """Without a plan, cache as many live weights between sweeps as half of the free memory has room for.

        Once, at the first trace whose map may be swept: what is cached lessens what is free.
        """
        self._placed = True
        plan = self.plan(n)
        if plan.fits:
            self.weights.place(plan.places, plan.room, plan.pieces)

    def trace(
        self,
        prompt: str | Sequence[int],
        *,
        mlp_path: MlpPath = "up",
        n_ctx: int | None = None,
        imitate: bool = False,
        x: Float[Tensor, "n d"] | None = None,
        change: Callable[[int, Tensor], Tensor] | None = None,
        tapes: bool | Tapes = True,
        observe: Observer | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Trace":
        """Run a prompt once and record the quantities that the detached Jacobian freezes.

        Args:
            prompt: text, or token ids.
            mlp_path: freezing rule of gated feed-forwards; see `ggjac.blocks.networks.record_hidden`.
            n_ctx: context size that decides between short and long rope factors where a model has both; default that of
                `open_model`, or the prompt's length. (llama.cpp uses the context it allocates, a multiple of 256.)
            imitate: round where llama.cpp does on the CPU, for parity: GELU comes from a half-precision table, and
                rotary angles are float32 (see `ggjac.rope.rotation`).
            x: input of block 0 instead of the tokens' own, as `embed` gives it: of embeddings that no token has. What
                blocks read of the embeddings beside the stream follows it; what they read by the tokens' ids does not.
            change: called as `change(layer, h)` with the residual stream `[n, d]` after each block, `layer` of them; it
                returns the stream that replaces it.
            tapes: True keeps tapes in memory, for Jacobians; a `Tapes` keeps them where it says, and continues an
                interrupted trace. False keeps none: the trace then has outputs and logits only, and takes less memory
                (patterns alone are heads x n² floats per layer; a recurrence in chunks takes less).
            observe: called with llama.cpp's name and value of intermediate tensors, each `[n, d]`: `attn_out-i` and
                `ffn_out-i` (the branches before post-norm and scale), `l_out-i` (the residual stream after block `i`)
                and `result_norm`.
            progress: called as `progress(done, total)` after each block.

        Raises:
            PromptError: no tokens, more than the model's context, or ids outside the vocabulary.
            NumericsError: the residual stream left the range of the dtype.
            ChangedError: another program has changed the file.
        """
        if mlp_path not in ("up", "gate"):
            raise ValueError(f"mlp_path {mlp_path!r} is unknown; known: up, gate")
        ids = self.prompt_ids(prompt)
        if tapes is not False and self.keeps_ready and not self._placed:
            self._keep_ready(len(ids))
        config = self.config
        observe = observe or (lambda name, tensor: None)
        shared = self.frame(len(ids), mlp_path=mlp_path, n_ctx=n_ctx, imitate=imitate)
        shared = shared._replace(choices=self.choices(ids))
        x = self.embed(ids) if x is None else x.to(self.device, self.dtype)
        frame = shared._replace(inputs=self.block_inputs(ids, x))
        h, kept = x, Tapes() if isinstance(tapes, bool) else tapes
        kept.device = self.device
        begun = max(0, len(kept) - 1)  # the last block of an earlier attempt again: its output is on no tape
        if len(kept):
            h = kept[begun].x
        pasts: dict[int, Past] = {}  # of blocks whose keys later ones read
        for i in config.writers & set(range(begun)):
            pasts[i] = blocks.record_attention(self.block(i), frame, i, kept[i].x).past[0]
        for i in range(begun, config.block_count):
            w, source = self.block(i), config.layers[i].source
            past = None if source is None else pasts[source]
            if i + 1 < config.block_count:
                self.block(i + 1).read_ahead()
            x_in, (attn, ffn, inputs, h, entry) = h, blocks.record_block(w, frame, i, h, past)
            if i in config.writers:
                pasts[i] = attn.past[0]
            observe(f"attn_out-{i}", attn.raw)
            observe(f"ffn_out-{i}", ffn.raw)
            observe(f"l_out-{i}", h)
            h = h if change is None else change(i + 1, h)
            if not h.isfinite().all():
                raise blocks.overflow(f"block {i}", self.dtype)
            if tapes is not False and i == len(kept):
                kept.append(BlockTape(x_in, attn.tape, ffn.tape, inputs, entry, config.layers[i].factor))
            del x_in, attn, ffn, inputs, entry  # before the next block is recorded
            if progress:
                progress(i + 1, config.block_count)
        norm = self.freeze_final_norm(h)
        outputs = norm.apply(h)
        observe("result_norm", outputs)
        if not outputs.isfinite().all():
            raise blocks.overflow("the final norm", self.dtype)
        self.gguf.check_unchanged()
        if tapes is not False:
            machine.trim_memory()
        return Trace(model=self, ids=ids, x=x, outputs=outputs, norm=norm, frame=shared, tapes=kept)

    def in_step(self, runs: Sequence[Callable[[], Found]]) -> list[Found]:
        """Run computations on this model side by side, such as traces of many prompts; return their results in order.

        Each tile of the weights is dequantized once for all of them, and every bit is as if each had run alone. They
        take the memory of all. Processes that share the model run them one after another. An error in one is raised,
        and ends all others.
        """
        return [run() for run in runs] if self.crew else self.weights.in_step(runs)

    def frame(self, n: int, *, mlp_path: MlpPath = "up", n_ctx: int | None = None, imitate: bool = False) -> Frame:
        """Return the settings that all blocks share, for positions 0 to `n - 1`; arguments as `trace` takes them."""
        config = self.config
        factors = self._rope_factors(n_ctx or self.context or n)
        rotations: dict[Rope, tuple[Tensor, Tensor]] = {}
        for rope in {layer.rope for layer in config.layers if layer.rope}:
            cos, sin = rotation(replace(rope, rounded=imitate), n, factors if rope.factored else None)
            rotations[rope] = cos.to(self.device, self.dtype), sin.to(self.device, self.dtype)
        return Frame(
            self.crew.config if self.crew else config,
            rotations,
            mlp_path,
            [blocks.activation(config, i, table=imitate) for i in range(config.block_count)],
            between=self.weights[f"{config.row.output_norm}.weight"].dense() if config.loop_norm else None,
            held=self.weights["hrm.z_l_init"].dense() if "hrm.z_l_init" in self.weights else None,
        )

    @property
    def embeddings(self) -> decode.Embeddings:
        """The embeddings, normed where the model does so."""
        return decode.Embeddings(self.embedding, self._normed if self.config.row.embedding_norm else None)

    def _normed(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        norm = blocks.record_norm(self.outside, self.config, ("token_embd_norm",), rows)
        return (norm or blocks.frozen_norm(self.config, None, None, rows)).apply(rows)

    def embed(self, ids: Sequence[int], start: int = 0) -> Float[Tensor, "n d"]:
        """Return the input of block 0, `[n, d]`: embeddings, scaled or normed, plus learned positions from `start`."""
        return self.placed(self.embeddings.take(ids) * self.config.embedding_scale, start)

    def placed(self, x: Float[Tensor, "n d"], start: int = 0) -> Float[Tensor, "n d"]:
        """Return embeddings of tokens, `[n, d]`, with those of learned positions from `start` added, if any."""
        if "position_embd.weight" in self.weights:
            x = x + self.weights["position_embd.weight"].take(range(start, start + len(x)))
        return x

    def block_inputs(self, ids: Sequence[int], x: Float[Tensor, "n d"] | None = None) -> Float[Tensor, "n L w"] | None:
        """Return what each block reads of the tokens beside the stream: rows of a table, and of their embeddings.

        `x` is the input of block 0, if it is not the tokens' own.
        """
        table = self.block_table(ids)
        if table is None:
            return None
        return blocks.block_inputs(self.outside, self.config, table, self.embed(ids) if x is None else x)

    def choices(self, ids: Sequence[int]) -> list[Int[Tensor, "n used"]]:
        """Return the experts of each token in the first blocks, where a table has them, on the host.

        Raises:
            WeightError: there are no such experts.
        """
        found = []
        for i in (i for i, layer in enumerate(self.config.layers) if layer.token_experts):
            name = f"{self.config.prefix(i)}{EXPERTS_OF_TOKENS}"
            found.append(self.weights.table(name, ids))
            low, high = int(found[-1].min()), int(found[-1].max())
            if low < 0 or high >= self.config.expert_count:
                raise WeightError(
                    f"tensor {name} names expert {high if low >= 0 else low} for a token, but there are experts 0 to "
                    f"{self.config.expert_count - 1}; the file is damaged, download or convert it again"
                )
        return found

    def block_table(self, ids: Sequence[int]) -> Float[Tensor, "n Lw"] | None:
        """Return the rows of the table from which blocks read beside the stream, or None if there is none."""
        return self.weights["per_layer_token_embd.weight"].take(ids) if self.config.inputs else None

    @property
    def outside(self) -> Block:
        """The tensors that belong to no block."""
        return Block(self.weights, "", {})

    def freeze_final_norm(self, h: Float[Tensor, "n i"], outside: BlockWeights | None = None) -> FinalNorm:
        """Freeze the norm before the head at any stream, or at several that it collects.

        `outside` are the tensors outside the blocks; default this model's.
        """
        outside = outside or self.outside
        names = (f"{self.config.row.output_norm}.{part}" for part in ("weight", "bias"))
        weight, bias = (self.weights[name].dense() if name in self.weights else None for name in names)
        if "altup_unembd_proj.weight" in outside and h.shape[1] > self.config.d:
            factors, merged = blocks.record_closing(outside, self.config, h)
            return blocks.ClosingNorm(blocks.frozen_norm(self.config, weight, bias, merged), factors, outside)
        streams = blocks.final_streams(outside, self.config, h)
        collected = blocks.collected(streams, self.config, h)
        return blocks.frozen_norm(self.config, weight, bias, collected)._replace(streams=streams)

    def _rope_factors(self, n_ctx: int) -> Tensor | None:
        """Return the divisors of the rotary frequencies, if any: Llama 3's, or LongRoPE's for this context size."""
        long = "long" if n_ctx > self.config.original_context else "short"
        for name in ("rope_freqs.weight", f"rope_factors_{long}.weight"):
            if name in self.weights:
                return self.weights[name].dense()
        return None

    def block(self, index: int, rounding: torch.dtype | None = None, *, live: bool = False) -> Block:
        """Return the tensors of one block; those requested with `live` are used in every sweep, and may be cached.

        Its matrices come in the dtype `rounding`, default that of the model.
        """
        parts = fused_parts(self.config, index)
        block = self.weights.block(index, parts, prefix=self.config.prefix(index), live=live, rounding=rounding)
        return self.crew.part(block, index) if self.crew else block

    def prompt_ids(self, prompt: str | Sequence[int], *, parse_special: bool = True) -> list[int]:
        """Return the token ids of a prompt, which may be ids already, if this model can run them; see `tokenize`.

        Raises:
            PromptError: no tokens, more than the model's context, or ids outside the vocabulary.
            TokenizerError: a text, and the file has no tokenizer, or llama-cpp-python is not installed.
            ValueError: an id is not a whole number.
        """
        if isinstance(prompt, str):
            return self.check_prompt(self.tokenize(prompt, parse_special=parse_special))
        if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
            raise PromptError(f"the prompt is of type {type(prompt).__name__}; give a text, or a list of token ids")
        return self.check_prompt(list(prompt))

    def check_position(self, position: int, n: int) -> int:
        """Return a position of `n`, counted from the start; negative positions count from the end.

        Raises:
            PromptError: there is no such position.
            ValueError: it is not a whole number.
        """
        position = whole("position", position, None)
        if not -n <= position < n:
            raise PromptError(f"position {position} is out of range; the prompt has positions 0 to {n - 1}")
        return position % n

    def check_positions(self, positions: str | Sequence[int], n: int) -> list[int]:
        """Return some of `n` output positions, as `ggjac.checks` takes them.

        Raises:
            PromptError: there is no such position, or the text is not a list of positions.
        """
        try:
            return output_positions(positions, n)
        except ValueError as error:
            raise PromptError(str(error)) from error

    def check_inputs(
        self, n: int, exclude: str | Sequence[int] | None, chosen: str | Sequence[int] | None = None
    ) -> tuple[list[int], list[int]]:
        """Return those of `n` input positions that a map leaves out, and those chosen of the others: by default all.

        Raises:
            PromptError: there is no such position, a text is not a list of positions, none is left, or one chosen is
                left out.
        """
        try:
            excluded = excluded_positions(exclude, n)
            return excluded, input_positions(chosen, n, excluded)
        except ValueError as error:
            raise PromptError(str(error)) from error

    def check_prompt(self, ids: Sequence[int]) -> list[int]:
        """Return the token ids as a list, after checking that this model can run them.

        Raises:
            PromptError: no tokens, more than the model's context, or ids outside the vocabulary.
            ValueError: an id is not a whole number.
        """
        context, vocabulary = self.config.context_length, self.config.vocabulary
        if not ids:
            raise PromptError("the prompt has no tokens; give a text or token ids")
        if len(ids) > context:
            raise PromptError(
                f"the prompt has {len(ids)} tokens, the model's context {context}; shorten it, or give a larger context"
            )
        if len(ids) > self.config.longest:
            left = f"selects {self.config.longest}" if self.config.indexer.selected else "would leave some out"
            raise PromptError(
                f"the prompt has {len(ids)} tokens, of which this model's attention {left}: not supported beyond "
                f"{self.config.longest}; shorten it"
            )
        ids = [whole("token id", i, None) for i in ids]
        for i in ids:
            if not 0 <= i < vocabulary:
                raise PromptError(f"token id {i} is out of range; the vocabulary has ids 0 to {vocabulary - 1}")
        return ids


@dataclass(frozen=True, repr=False)
class Trace:
    """The run of one prompt: its outputs, and the tapes of the network frozen at it.

    Attributes:
        model: the model that ran it.
        ids: `n` token ids.
        x: `[n, d]`, input of block 0.
        outputs: `[n, d]`, after the final norm, before the head.
        norm: the final norm, frozen.
        frame: settings shared by all blocks, such as the freezing rule.
        tapes: the tape of each block; empty if they were not kept.
    """

    model: Model
    ids: list[int]
    x: Float[Tensor, "n d"]
    outputs: Float[Tensor, "n d"]
    norm: FinalNorm
    frame: Frame
    tapes: Tapes
    # By position, the last one asked for alone: those of all positions would outweigh the trace.
    _logits: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __repr__(self) -> str:
        """Return the prompt and the model on one line."""
        text, config = self.model.text(self.ids), self.model.config
        start = text if len(text) <= 40 else f"{text[:40]}…"
        return f"Trace({start!r}, {len(self.ids)} tokens, {config.architecture}, {config.block_count} blocks)"

    def _repr_html_(self) -> str:
        """Return the tokens of the prompt as a table, under the one line."""
        return Table(repr(self), Words(self, ids=True).at(range(len(self.ids))))._repr_html_()

    def top(self, count: int = 5, position: int = -1) -> list[tuple[str, float]]:
        """Return the most likely tokens after a position, as they are shown, with their probabilities."""
        count = min(whole("count", count), self.model.config.vocabulary)
        best = self.logits_at(position).cpu().double().softmax(0).topk(count)
        return [(self.model.word(id), chance) for chance, id in zip(*(part.tolist() for part in best), strict=True)]

    @property
    def output(self) -> Float[Tensor, " d"]:
        """The last position's output, `[d]`."""
        return self.outputs[-1]

    @property
    def logits(self) -> Float[Tensor, " v"]:
        """The last position's logits, `[v]`: scores of the next token."""
        return self.logits_at(-1)

    def logits_at(self, position: int) -> Float[Tensor, " v"]:
        """Return the logits at one position, `[v]`: a pass over the head, unless it is the position asked for last.

        Raises:
            PromptError: the prompt has no such position.
            NumericsError: a logit is not finite.
        """
        index = self.index(position)
        logits = self._logits.get(index)
        if logits is None:
            logits = finite_logits(self.model.head.logits(self.outputs[index][None]))[0]
            self._logits.clear()
            self._logits[index] = logits
        return logits

    def all_logits(self) -> Float[Tensor, "n v"]:
        """Return the logits at every position, `[n, v]`; errors as `logits_at`."""
        return finite_logits(self.model.head.logits(self.outputs))

    def index(self, position: int) -> int:
        """Return a position, counted from the start; negative positions count from the end.

        Raises:
            PromptError: the prompt has no such position.
        """
        return self.model.check_position(position, len(self.ids))

    def jacobian(
        self,
        position: int = -1,
        span: Span | None = None,
        *,
        raw: bool = False,
        exclude: str | Sequence[int] | None = None,
        journal: Journal | None = None,
    ) -> DetachedJacobian:
        """Return the detached Jacobian at `position` (negative: from the end).

        Args:
            position: the output position.
            span: start and end of the map; default from the embeddings to the final norm's output.
            raw: leave out the final norm, through which taps are read otherwise.
            exclude: input positions that are folded into the offset, as numbers or as a text such as `"0,10-20,-1"`;
                negative ones count from the output's.
            journal: records products, so that an interrupted run can be resumed.

        Raises:
            PromptError: the prompt has no such position.
            ValueError: the trace was made without tapes, the model has no such span, or `exclude` is out of range or
                leaves no input.
        """
        crew, at = self.model.crew, self.index(position)
        how: dict[str, Any] = {"raw": raw, "exclude": exclude, "chunk_bytes": self.model.chunk_bytes}
        return DetachedJacobian(self.network, at, span, journal=crew.recorded(journal) if crew else journal, **how)

    @property
    def network(self) -> FrozenNetwork:
        """The frozen network of this trace, for products.

        Raises:
            ValueError: the trace was made without tapes.
        """
        if not self.tapes:
            raise ValueError("this trace kept no tapes; trace the prompt again with tapes=True")
        model = self.model
        return FrozenNetwork(
            weights=partial(model.block, live=True),
            tapes=self.tapes,
            frame=self.frame,
            config=model.config,
            freeze_norm=model.freeze_final_norm,
            norm=self.norm,
            x=self.x,
            outputs=self.outputs,
            ids=self.ids,
            head=model.head,
            embedding=model.embeddings,
            outside=model.outside,
            table=partial(model.block_table, self.ids),
            token=model.token,
            special=model.special_ids,
        )


def finite_logits(logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """Return logits unchanged, after checking that all are finite.

    Raises:
        NumericsError: one is not finite.
    """
    if not logits.isfinite().all():
        raise blocks.overflow("logits", logits.dtype)
    return logits
