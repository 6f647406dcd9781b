"""Sizes of tiles, chunks, batches and parts of tensors, and the names of options and of a tensor of integers.

Shared by the computation and the torch-free planner.
"""

from typing import Literal, NamedTuple

# Maps inside the network (see `ggjac.analysis.layers`), and the taps at which they end.
MapName = Literal["cumulative", "blockwise", "to_end"]
Kind = Literal["layer", "attn", "mlp"]
MAPS: tuple[MapName, ...] = ("cumulative", "blockwise", "to_end")
KINDS: tuple[Kind, ...] = ("layer", "attn", "mlp")

# Which factor of a gated feed-forward network stays live (is not frozen).
MlpPath = Literal["up", "gate"]

# End of the names of tables of the experts of each token, the only tensors of integers.
EXPERTS_OF_TOKENS = "ffn_gate_tid2eid.weight"


class Part(NamedTuple):
    """Some rows of a fused tensor, which stand for a tensor of its own; in a stack of experts, of each expert's rows.

    Attributes:
        stem: of the fused tensor.
        start, stop: the rows; with a period, of every `period` rows. (Where each head has rows for several uses, the
            rows of one use form a matrix.)
        period: number of rows after which the section repeats, a divisor of all rows; 0 for one section.
    """

    stem: str
    start: int
    stop: int
    period: int = 0

    def rows(self, whole: int) -> int:
        """Return the number of rows of the part, where the fused tensor has `whole` rows."""
        return (self.stop - self.start) * (whole // self.period if self.period else 1)


# Bytes of one element, by the name of a dtype that can be computed in; the default first.
ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}

# Elements of one dense tile on a CPU: 32 MiB in float32. Large enough for GEMM to run at speed, small enough to stay in
# the last level of cache, and a small part of any layer of the models that need streaming.
TILE_ELEMENTS = 1 << 23

# Tiles that are on their way to a device, or there and not yet dequantized: one travels while one is used, and the
# others make up for a late host.
ON_THE_WAY = 4

# Pinned memory is allocated in pieces of this many bytes: a power of two.
PINNED_BYTES = 256 << 20

# Hidden units of a feed-forward network that exist at a time on a CPU: for many stacked vectors its `[k, n, f]` middle
# would dwarf everything else. A multiple of every storage type's block, wide enough for GEMM to run at speed.
SLAB = 2048


class Pieces(NamedTuple):
    """How much of a matrix, and of a feed-forward network, exists at a time.

    Attributes:
        tile: elements of a matrix that are dense; or those of one row, if it has more.
        slab: hidden units of a network.
    """

    tile: int
    slab: int


SMALL_PIECES = Pieces(TILE_ELEMENTS, SLAB)
# For devices, where a piece costs up to fifty launches of kernels, and a product with few rows of a matrix leaves most
# processors without work: tiles of 64 M weights, and slabs as wide as any network.
LARGE_PIECES = Pieces(1 << 26, 1 << 20)
# Large pieces are used where the work then takes at most this part of a device's memory: the rest is for weights.
PIECES_SHARE = 0.5

# Working memory that a chunk of dense rows may take on its way down the blocks, in bytes; the default.
CHUNK_BYTES = 1 << 30

# Bytes up to which a dense matrix is kept, where it is the cheaper way to singular triplets.
MATRIX_BYTES = 1 << 30

# Dense rows widened to float64 at a time: a whole chunk of them could fill the memory.
SLICE = 64

# Numbers of stacked cotangents that are multiplied in float64 at a time, where edges are found.
EDGE_FLOATS = 1 << 20

# Up to this output size a Frobenius norm comes from all rows, in one sweep (or a few); beyond, it is estimated.
EXACT_ROWS = 512
# Random directions whose first tokens are beside those of calibrated vectors.
RANDOM_DIRECTIONS = 64
# Random vectors of an estimate.
PROBES = 16

# Sweeps until eight residuals are below 1e-3, up and down counted singly: 6 to 10 on spectra like those of models.
EXPECTED_SWEEPS = 8


# Finished products that may wait in memory for the next checkpoint, in bytes.
WAITING_BYTES = 64 << 20

# Tokens whose maps travel together when the stable rank of each is measured, or the shares in each one's logit.
TOKENS_AT_ONCE = 16

# Keys of a query whose scores are split, if none are named: those of the largest weights.
KEYS = 5
# Heads whose shares are split by what they read, if none are named: the largest.
HEADS_READ = 5

# Steps along a path of edits: parts of the way to another token or prompt, or lengths relative to the embeddings'.
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# What takes the place of the embedding of a token that is left out (see `ggjac.edits`), and how many drawn tokens do.
Ablation = Literal["replace", "mean", "zero"]
ABLATIONS: tuple[Ablation, ...] = ("replace", "mean", "zero")
DRAWS = 4

# Forward passes side by side, at most: by then the products outweigh the reading of the weights.
RUNS_AT_ONCE = 64
# Prompts of a study side by side, at most: a study that is ended loses those under way.
PROMPTS_AT_ONCE = 16

# Dtypes in which a decomposition may search first: that of the model, so that there is no such search, or a narrower.
SEARCHES = ("auto", "same", "bfloat16")

# Embedding length from which a decomposition may begin with products rounded to bfloat16: smaller maps take seconds.
ROUGH_FROM = 2048

# Sweeps of a rough search, and of the narrow iteration that starts from its left vectors (docs/benchmarks.md).
ROUGH_SWEEPS, FINAL_SWEEPS = 7, 3
# Further left vectors that a rough search hands on, so that close singular values at the end of the rank are not lost.
SPARE = 4

# A stacked vector with more elements than this counts as large: 128 tokens of a model with 8192 dimensions.
LARGE = 1 << 20


def block_width(rank: int, size: int) -> int:
    """Return how many vectors of `size` elements a sweep stacks to find `rank` triplets.

    More of them save sweeps, each of which reads a whole model: for 8 triplets 16 take 10, 24 take 9 and 32 take 8.
    Where a vector is large, they cost memory, and multiplying them costs more than reading.
    """
    return max(rank + 8, min(4 * rank, 32) if size <= LARGE else min(3 * rank, 24))


def chunk_floats(n: int, d: int, hidden_units: int) -> int:
    """Return the floats of working memory by which dense rows, `[n, d]` each, are divided into chunks."""
    return max(3 * n * d, 2 * n * min(SLAB, hidden_units))


def forms(vectors: int, out: int, d: int, hidden: int, slab: int) -> bool:
    """Return whether a feed-forward network makes its matrix of each position, `[out, d]`, for so many vectors.

    Through hidden units, a vector costs `2 hidden (out + d)` FLOP; the matrix costs `2 out d hidden` once, and
    `2 out d` for each vector. It may take no more floats than a slab's hidden units, before and after their factor.
    """
    through, made = vectors * hidden * (out + d), out * d * (hidden + vectors)
    return made < through and out * d <= 2 * vectors * slab


def default_layer(block_count: int) -> int:
    """Return the layer at which a concept's map steers by default: two thirds of the depth, as in the paper's code."""
    return max(1, 2 * block_count // 3)


def scan_chunk(n: int, key_size: int) -> int | None:
    """Return the chunk length of a recurrence over `n` positions, or None where its pattern is kept as a whole.

    A pattern takes `n` floats for each position and head, chunks of `c` positions `c + 2 s + s² / c` of them, which is
    least, `4 s`, for chunks as long as a key. A product takes two FLOP for each of them and each element of a value. It
    is as fast in such chunks from two or three keys on. At four, it takes 17 to 27 % less time for keys of 128, and 11
    to 13 % less for keys of 64. Shorter chunks are slower, and longer ones not faster (docs/benchmarks.md).
    """
    return key_size if n > 4 * key_size else None
