"""Train the demo model that comes with ggjac: corpus, vocabulary, transformer, GGUF, Q4_K_M.

The file in the package, ggjac/data/demo.gguf, is what this command wrote (seed 0; 13 minutes on 2 shared CPU cores with
bfloat16 instructions; other processors round differently and end at a slightly different file):

    python tools/train_demo.py --seed 0 -o ggjac/data/demo.gguf

The model is llama-shaped (RMSNorm, rotary positions on adjacent pairs, grouped key/value heads, SwiGLU, untied head, no
biases). Sentences come from tools/demo_corpus.py. In the last part of the training the weights that Q4_K_M stores in
4 bits are rounded in the forward pass, so that the quantized file predicts what the float one does.
"""

import ctypes
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import click
import gguf
import llama_cpp
import numpy as np
import torch
import torch.nn.functional as F
from demo_corpus import Corpus
from torch import Tensor, nn

DESCRIPTION = "Trained by tools/train_demo.py on generated sentences"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
IGNORE = -100  # a target that is not learned


@dataclass(frozen=True)
class Size:
    """Sizes of the model; `embedding` and `feed_forward` are multiples of the 256 elements of a K-quant block."""

    embedding: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 768
    context: int = 256
    rope_base: float = 10000.0
    epsilon: float = 1e-5

    @property
    def head(self) -> int:
        """Elements of one head."""
        return self.embedding // self.heads


# --- vocabulary ---------------------------------------------------------------------------------------------------


def byte_alphabet() -> dict[int, str]:
    """Map each byte to the printable character that stands for it in GPT-2's byte-level BPE."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in id order and the merges that build pieces of words the corpus does not have.

    Whole words of the corpus are tokens that no merge builds: `tokenizer.ggml.pre = llama-bpe` looks a word up before
    it merges anything, so a word needs none of the intermediate pieces that plain BPE would have to carry.
    """

    tokens: list[str]
    merges: list[tuple[str, str]]

    def pieces(self, word: str) -> list[int]:
        """Split a word by the merges alone, as if it were not a token."""
        rank = {pair: i for i, pair in enumerate(self.merges)}
        parts = list(word)
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: rank.get(pair, math.inf))
            if best not in rank:
                break
            parts = merge(parts, best)
        index = {token: i for i, token in enumerate(self.tokens)}
        return [index[part] for part in parts]


def merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of a pair, from the left."""
    joined: list[str] = []
    i = 0
    while i < len(parts):
        if tuple(parts[i : i + 2]) == pair:
            joined.append(parts[i] + parts[i + 1])
            i += 2
        else:
            joined.append(parts[i])
            i += 1
    return joined


def build_vocabulary(documents: Sequence[str], merges: int) -> Vocabulary:
    """Make a vocabulary of two special tokens, 256 bytes, `merges` pieces and every word of the documents."""
    alphabet = byte_alphabet()
    spell = {chr(byte): character for byte, character in alphabet.items()}  # the corpus is ASCII
    # The same cut as llama-bpe's for ASCII text without digits: a word takes the space before it.
    counts = Counter(word for text in documents for word in re.findall(r" ?[A-Za-z]+|[^A-Za-z ]+", text))
    words = {"".join(spell[c] for c in word): count for word, count in counts.most_common()}
    # Byte pair encoding on word types, not occurrences: pieces serve words that have not been seen.
    split = {word: list(word) for word in words if len(word) > 1}
    learned: list[tuple[str, str]] = []
    for _ in range(merges):
        pairs = Counter(pair for parts in split.values() for pair in pairwise(parts))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        learned.append(best)
        split = {word: merge(parts, best) for word, parts in split.items()}
    tokens = [BOS, EOS, *alphabet.values(), *(a + b for a, b in learned), *words]
    return Vocabulary(list(dict.fromkeys(tokens)), learned)


def write_metadata(writer: gguf.GGUFWriter, vocabulary: Vocabulary, size: Size) -> None:
    """Write everything but the tensors."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("ggjac demo")
    writer.add_description(DESCRIPTION)
    writer.add_license("Apache-2.0")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(size.layers)
    writer.add_context_length(size.context)
    writer.add_embedding_length(size.embedding)
    writer.add_feed_forward_length(size.feed_forward)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.kv_heads)
    writer.add_layer_norm_rms_eps(size.epsilon)
    writer.add_rope_dimension_count(size.head)
    writer.add_rope_freq_base(size.rope_base)
    writer.add_vocab_size(len(vocabulary.tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(vocabulary.tokens)
    special = {BOS, EOS}
    kinds = (gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in vocabulary.tokens)
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_token_merges([f"{a} {b}" for a, b in vocabulary.merges])
    writer.add_bos_token_id(vocabulary.tokens.index(BOS))
    writer.add_eos_token_id(vocabulary.tokens.index(EOS))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def write_gguf(path: Path, vocabulary: Vocabulary, size: Size, tensors: dict[str, Tensor]) -> None:
    """Write an F32 GGUF; without tensors, a vocabulary that llama.cpp opens with `vocab_only`."""
    writer = gguf.GGUFWriter(path, "llama")
    write_metadata(writer, vocabulary, size)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- model --------------------------------------------------------------------------------------------------------


def round_like_q4(weight: Tensor) -> Tensor:
    """Round to 16 evenly spaced values per 32 elements, near what Q4_K does; gradients pass unchanged."""
    blocks = weight.detach().view(-1, 32)
    low, high = blocks.amin(1, keepdim=True).clamp(max=0), blocks.amax(1, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-8)
    rounded = ((blocks - low) / step).round_().mul_(step).add_(low)
    return weight + (rounded.view_as(weight) - weight.detach())


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Scale each vector to unit root mean square: float32 in, bfloat16 (what the products read) out."""
    return F.rms_norm(x, weight.shape, weight, epsilon).to(torch.bfloat16)


class DemoModel(nn.Module):
    """A llama-shaped transformer whose parameters carry GGUF's names (a dot spelled `__`)."""

    def __init__(self, vocabulary: int, size: Size, generator: torch.Generator):
        super().__init__()
        self.size = size
        self.rounding = False
        d, f, kv = size.embedding, size.feed_forward, size.kv_heads * size.head
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, d)}
        for i in range(size.layers):
            shapes |= {
                f"blk.{i}.attn_norm.weight": (d,),
                f"blk.{i}.attn_q.weight": (d, d),
                f"blk.{i}.attn_k.weight": (kv, d),
                f"blk.{i}.attn_v.weight": (kv, d),
                f"blk.{i}.attn_output.weight": (d, d),
                f"blk.{i}.ffn_norm.weight": (d,),
                f"blk.{i}.ffn_gate.weight": (f, d),
                f"blk.{i}.ffn_up.weight": (f, d),
                f"blk.{i}.ffn_down.weight": (d, f),
            }
        shapes |= {"output_norm.weight": (d,), "output.weight": (vocabulary, d)}
        self.tensors = nn.ParameterDict()
        for name, shape in shapes.items():
            if len(shape) == 1:
                value = torch.ones(shape)
            else:
                std = 0.02 if "token_embd" in name or name == "output.weight" else shape[1] ** -0.5
                if "attn_output" in name or "ffn_down" in name:
                    std /= math.sqrt(2 * size.layers)  # keeps the residual stream's variance at the start
                value = torch.randn(shape, generator=generator) * std
            self.tensors[name.replace(".", "__")] = nn.Parameter(value)
        # Rotary positions: x cos + (x turn) sin, where `turn` maps each adjacent pair (a, b) to (-b, a).
        rates = size.rope_base ** (-torch.arange(0, size.head, 2).double() / size.head)
        angles = (torch.arange(size.context)[:, None] * rates).repeat_interleave(2, dim=1)  # [context, head]
        turn = torch.block_diag(*[torch.tensor([[0.0, 1.0], [-1.0, 0.0]])] * (size.head // 2))
        for name, value in (("cos", angles.cos()), ("sin", angles.sin()), ("turn", turn)):
            self.register_buffer(name, value.to(torch.bfloat16), persistent=False)

    def named(self) -> dict[str, Tensor]:
        """Return the parameters by their GGUF names."""
        return {name.replace("__", "."): value for name, value in self.tensors.items()}

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate adjacent pairs of [batch, n, heads, head] by their position (llama.cpp's NORM rope)."""
        n = x.shape[1]
        cos, sin = self.get_buffer("cos")[:n, None], self.get_buffer("sin")[:n, None]
        return x * cos + (x @ self.get_buffer("turn")) * sin

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids [batch, n] to final hidden states [batch, n, d], after the last norm."""
        size, weights = self.size, self.named()
        groups = size.heads // size.kv_heads

        def linear(x: Tensor, name: str) -> Tensor:
            weight = weights[name]
            # attn_v and half of ffn_down get 6 bits in Q4_K_M and need no help.
            rounded = self.rounding and "attn_v" not in name
            return F.linear(x, round_like_q4(weight) if rounded else weight)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, size.head))

        causal = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
        table = weights["token_embd.weight"]
        x = F.embedding(ids, round_like_q4(table) if self.rounding else table)
        for i in range(size.layers):
            h = rms_norm(x, weights[f"blk.{i}.attn_norm.weight"], size.epsilon)
            q = self.rotate(heads(linear(h, f"blk.{i}.attn_q.weight")))
            k = self.rotate(heads(linear(h, f"blk.{i}.attn_k.weight"))).repeat_interleave(groups, 2)
            v = heads(linear(h, f"blk.{i}.attn_v.weight")).repeat_interleave(groups, 2)
            # Written out: for sentences of 20 tokens torch's fused attention is several times slower on a CPU.
            scores = torch.einsum("bqhc,bkhc->bhqk", q, k) * size.head**-0.5 + causal
            mixed = torch.einsum("bhqk,bkhc->bqhc", scores.softmax(-1), v).flatten(-2)
            x = x + linear(mixed, f"blk.{i}.attn_output.weight")
            h = rms_norm(x, weights[f"blk.{i}.ffn_norm.weight"], size.epsilon)
            gated = F.silu(linear(h, f"blk.{i}.ffn_gate.weight")) * linear(h, f"blk.{i}.ffn_up.weight")
            x = x + linear(gated, f"blk.{i}.ffn_down.weight")
        return rms_norm(x, weights["output_norm.weight"], size.epsilon)


# --- training -----------------------------------------------------------------------------------------------------


def batches(
    documents: list[list[int]], pieces: dict[int, list[int]], tokens: int, eos: int, context: int, random: Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, targets) [batch, n] of about `tokens` tokens for ever, similar lengths together.

    One document in eight shows a word in pieces, so that the rows of byte and piece tokens mean something. The model
    reads those pieces and is not asked to predict them.
    """
    while True:
        samples = []
        for ids in random.sample(documents, len(documents)):
            inputs, targets = list(ids), [*ids[1:], eos]
            if random.random() < 0.125:
                at = random.randrange(1, len(ids))
                parts = pieces.get(ids[at], [ids[at]])
                inputs[at : at + 1] = parts
                targets[at - 1 : at + 1] = [IGNORE] * len(parts) + targets[at : at + 1]
            samples.append((inputs[:context], targets[:context]))
        # Sort within windows: little padding, yet no fixed order of lengths.
        window = 4096
        groups = []
        for start in range(0, len(samples), window):
            group: list[tuple[list[int], list[int]]] = []
            for sample in sorted(samples[start : start + window], key=lambda s: len(s[0])):
                if group and len(sample[0]) * (len(group) + 1) > tokens:
                    groups.append(group)
                    group = []
                group.append(sample)
            groups.append(group)
        random.shuffle(groups)
        for group in groups:
            n = max(len(inputs) for inputs, _ in group)
            yield (
                torch.tensor([inputs + [eos] * (n - len(inputs)) for inputs, _ in group]),
                torch.tensor([targets + [IGNORE] * (n - len(targets)) for _, targets in group]),
            )


@dataclass(frozen=True)
class Recipe:
    """How the model is trained."""

    steps: int = 1400
    tokens: int = 2048  # per step
    rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.1
    rounding_from: float = 0.85  # of the steps


def learning_rate(recipe: Recipe, step: int) -> float:
    """Rise linearly, then fall along a cosine to a hundredth."""
    if step < recipe.warmup:
        return recipe.rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def train(model: DemoModel, feed: Iterator[tuple[Tensor, Tensor]], recipe: Recipe) -> None:
    """Train in bfloat16 autocast with float32 weights and AdamW; print the loss to stderr as it goes."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    start, seen, recent = time.monotonic(), 0, []
    for step in range(recipe.steps):
        model.rounding = step >= recipe.rounding_from * recipe.steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        inputs, targets = next(feed)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(inputs)
            keep = targets != IGNORE  # the head is the largest matrix: spend it on real targets only
            logits = F.linear(hidden[keep], model.tensors["output__weight"])
        loss = F.cross_entropy(logits.float(), targets[keep])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += int(keep.sum())
        recent.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
            minutes = (time.monotonic() - start) / 60
            speed = seen / (60 * minutes)
            click.echo(
                f"step {step + 1}/{recipe.steps}  loss {np.mean(recent[-100:]):.3f}  {seen / 1e6:.1f} M tokens  "
                f"{speed:,.0f}/s  {minutes:.1f} min" + ("  rounding" if model.rounding else ""),
                err=True,
            )


# --- llama.cpp ----------------------------------------------------------------------------------------------------


@llama_cpp.llama_log_callback
def silence(level: int, text: bytes, _: object) -> None:
    """Pass on llama.cpp's errors only."""
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        click.echo(text.decode(errors="replace"), err=True, nl=False)


class LlamaCpp:
    """A GGUF file opened in llama.cpp, on one thread: prompts are so short that threads would wait for one another.

    The low-level interface, for `use_extra_bufts`: with it (the default of `llama_cpp.Llama`) a libggml-cpu that GCC
    compiled on a processor with AMX loads a tile configuration that GCC has optimized away and crashes on quantized
    weights (llama.cpp pull request 26954).
    """

    def __init__(self, path: Path, *, vocab_only: bool = False):
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = False
        params.vocab_only = vocab_only
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise click.ClickException(f"llama.cpp cannot load {path}; its messages above say why")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.context = None
        if not vocab_only:
            context_params = llama_cpp.llama_context_default_params()
            context_params.n_ctx = context_params.n_batch = 256
            context_params.n_threads = context_params.n_threads_batch = 1
            self.context = llama_cpp.llama_init_from_model(self.model, context_params)

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        if self.context:
            llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Tokenize text; what looks like a special token is ordinary text."""
        data = text.encode()
        room = (llama_cpp.llama_token * (len(data) + 2))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), room, len(room), bos, False)
        return list(room[:count])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        pieces = []
        for token in ids:
            room = ctypes.create_string_buffer(256)
            count = llama_cpp.llama_token_to_piece(self.vocab, token, room, len(room), 0, True)
            pieces.append(room.raw[:count])
        return b"".join(pieces).decode(errors="replace")

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Return the logits [v] after the last of `ids`, float64."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids))) != 0:
            raise click.ClickException(f"llama.cpp cannot evaluate {len(ids)} tokens")
        count = llama_cpp.llama_vocab_n_tokens(self.vocab)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (count,)).astype(np.float64)

    def predict(self, prompt: str) -> np.ndarray:
        """Return the probabilities [v] of the token after a prompt, float64."""
        logits = self.logits(self.encode(prompt))
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()


def quantize(source: Path, target: Path, threads: int) -> None:
    """Quantize an F32 file to Q4_K_M with llama.cpp."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    params.nthread = threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params) != 0:
        raise click.ClickException(f"llama.cpp did not quantize {source}; is {target.parent} writable?")


# --- evaluation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How well probes are completed: shares in [0, 1]."""

    top1: float  # the most probable token begins a right answer
    mass: float  # mean probability of all right first tokens
    misses: list[str]


def evaluate(path: Path, corpus: Corpus) -> Score:
    """Complete every held-out probe with llama.cpp."""
    right, mass, misses = 0, 0.0, []
    probes = corpus.probes()
    with LlamaCpp(path) as llama:
        for probe in probes:
            p = llama.predict(probe.prompt)
            firsts = {llama.encode(" " + answer, bos=False)[0] for answer in probe.answers}
            best = int(p.argmax())
            right += best in firsts
            mass += sum(p[token] for token in firsts)
            if best not in firsts:
                misses.append(f"{probe.prompt}{llama.decode([best])}  ({probe.answer})")
    return Score(right / len(probes), mass / len(probes), misses)


SHOWN = (
    "The capital of France is",
    "The bridge out of Marin is the",
    "The color of snow is",
    "My favorite season is",
    "A baby dog is called a",
    "People in Brazil speak",
)


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The GGUF file.")
@click.option("-s", "--seed", default=0, show_default=True, help="Of the corpus, the weights and the order.")
@click.option("--steps", default=Recipe.steps, show_default=True, help="Training steps of about 2048 tokens.")
@click.option("--documents", default=100_000, show_default=True, help="Documents to generate.")
@click.option("--threads", default=2, show_default=True)
@click.option("--keep-f32", type=click.Path(path_type=Path, dir_okay=False), help="Also keep the F32 file here.")
def main(output: Path, seed: int, steps: int, documents: int, threads: int, keep_f32: Path | None) -> None:
    """Train the demo model and write it as a Q4_K_M GGUF file.

    Example: python tools/train_demo.py -o ggjac/data/demo.gguf
    """
    torch.set_num_threads(threads)
    llama_cpp.llama_log_set(silence, None)
    started = time.monotonic()
    corpus, size, recipe = Corpus(seed), Size(), Recipe(steps=steps)
    texts = list(corpus.documents(documents))
    vocabulary = build_vocabulary(texts, merges=200)
    with tempfile.TemporaryDirectory() as folder:
        # llama.cpp itself tokenizes the corpus, so training and use agree by construction.
        write_gguf(Path(folder) / "vocabulary.gguf", vocabulary, size, {})
        with LlamaCpp(Path(folder) / "vocabulary.gguf", vocab_only=True) as tokenizer:
            encoded = [tokenizer.encode(text) for text in texts]
        click.echo(
            f"{len(corpus.facts)} facts, {len(corpus.held_out)} held-out phrasings, {len(texts)} documents, "
            f"{sum(map(len, encoded))} tokens, {len(vocabulary.tokens)} tokens in the vocabulary",
            err=True,
        )
        used = {token for ids in encoded for token in ids}
        pieces = {token: vocabulary.pieces(vocabulary.tokens[token]) for token in used if token > 1}
        generator = torch.Generator().manual_seed(seed)
        model = DemoModel(len(vocabulary.tokens), size, generator)
        click.echo(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", err=True)
        feed = batches(encoded, pieces, recipe.tokens, vocabulary.tokens.index(EOS), size.context, Random(seed))
        train(model, feed, recipe)
        f32 = keep_f32 or Path(folder) / "f32.gguf"
        write_gguf(f32, vocabulary, size, model.named())
        quantize(f32, output, threads)
        click.echo(f"{output}: {output.stat().st_size:,} bytes, {(time.monotonic() - started) / 60:.1f} min")
        for name, path in (("F32", f32), ("Q4_K_M", output)):
            score = evaluate(path, corpus)
            click.echo(
                f"{name}: held-out phrasings completed right {score.top1:.1%}, right answers' mass {score.mass:.1%}"
            )
    for miss in score.misses[:20]:
        click.echo(f"  wrong: {miss}")
    with LlamaCpp(output) as llama:
        for prompt in SHOWN:
            p = llama.predict(prompt)
            best = [f"{llama.decode([int(i)])} {p[i]:.2f}" for i in p.argsort()[::-1][:5]]
            click.echo(f"{prompt} ->{','.join(best)}")


if __name__ == "__main__":
    main()
