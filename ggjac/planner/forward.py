"""The floats that the forward pass takes, from a model's sizes: what decides how many run side by side."""

import math

from ggjac.config import Layer, ModelConfig
from ggjac.config.mixers import MIXERS
from ggjac.sizes import ITEM_BYTES, RUNS_AT_ONCE, scan_chunk


def runs_at_once(config: ModelConfig, n: int, dtype: str, nbytes: int) -> int:
    """Return how many forward passes of `n` tokens, without tapes, fit side by side into some bytes; at least 1."""
    each = trace_floats(config, n) * max(4, ITEM_BYTES[dtype])
    return max(1, min(RUNS_AT_ONCE, nbytes // each))


def trace_floats(config: ModelConfig, n: int, m: int | None = None) -> int:
    """Return the floats that `m` of `n` positions (default all) take at most in the forward pass, without tapes.

    They are streams, and a mixer's projections and scores in float32 (or what a recurrence takes, see
    `_recurrence_floats`), or hidden units beside four more streams and what the mixer has left for its tape.
    """
    m = n if m is None else m
    sparse = any(own.sparsity for own in config.layers)
    hidden = config.hidden_units * (sparse + {"xielu": 4, "situ": 5}.get(config.row.activation, 3))
    # The blocks' own inputs, and keys and values that later blocks read.
    held = m * config.inputs * config.block_count + 2 * n * bank(config)
    wide = config.widest - config.d  # of several residual streams
    predicted = 2 * (wide + config.d) if config.row.streams == "predicted" else 0  # predictions, and corrected ones
    feed_forward = m * (hidden + 4 * config.d + 3 * wide + predicted)
    most = feed_forward
    for own in config.layers:
        for mixer in own.mixers:
            mixing, left = _mixer_floats(config, own, mixer, n, m)
            most = max(most, mixing, left + feed_forward)
    return m * (4 * config.d + wide) + held + most


def bank(config: ModelConfig) -> int:
    """Return the widths of all values that several blocks read."""
    sizes = config.recurrence
    if sizes.shifted:
        return len(config.writers) * sizes.heads * sizes.value_size
    writers = [config.layers[i] for i in config.writers]
    return sum(own.kv_heads * own.value_size for own in writers)


def _mixer_floats(config: ModelConfig, own: Layer, mixer: str, n: int, m: int) -> tuple[int, int]:
    """Return the floats of a mixer in the forward pass, beside streams, and those that it leaves for its tape."""
    if MIXERS[mixer].recurrent:
        return _recurrence_floats(config, n, m, stepwise=MIXERS[mixer].channels)
    if MIXERS[mixer].convolution:
        return 6 * m * config.d, 2 * m * config.d  # projections; the convolution's input twice, and its output
    pattern = own.heads * m * (n + own.remembered(n))
    if MIXERS[mixer].expansion:  # queries and keys of every head are wider than values; with their latents, or scores
        wide = m * own.heads * max(own.key_size, own.value_size)
        latents = 2 * m * max(own.latent.size, own.latent.queries)
        return max(3 * wide + latents, 2 * wide + 3 * pattern), pattern
    q, kv = own.heads * own.value_size, own.kv_heads * own.value_size
    gated = config.row.gated_queries or own.gate > 0
    made = m * own.compressed.windows * own.value_size if own.remembered(n) else 0  # keys of groups, and their shares
    return m * 2 * ((1 + gated) * q + 2 * kv) + 3 * pattern + 3 * made, pattern + made


def _recurrence_floats(config: ModelConfig, n: int, m: int, *, stepwise: bool) -> tuple[int, int]:
    """Return the floats of a recurrence in the forward pass, and those that stay: the most of three moments.

        convolution   its input twice, and its output
        recurrence    the last two of these; queries and keys of every head (twice in chunks), values and their factor;
                      three states and the outputs, or one state and the outputs twice
        gate          instead of states and outputs, the pattern, and the values five times

    States and outputs are those of the identity, or of the values themselves where a prompt is continued, or where the
    recurrence is `stepwise`, in each channel. That one has steps for each value, in place of queries and keys.
    """
    own = config.recurrence
    values, keys = own.heads * own.value_size, own.heads * own.key_size
    state, outputs, again = keys * own.value_size, m * values, 0
    if stepwise:
        keys = again = values
    elif m == n:
        chunk = scan_chunk(n, own.key_size)
        chunks, width = (1, n) if chunk is None else (math.ceil(n / chunk), chunk + own.key_size)
        state, outputs = chunks * keys * width, own.heads * width * (n if chunk is None else chunks * chunk)
        again = 0 if chunk is None else keys
    kept = m * 2 * (own.convolved + keys + again + values)
    most = max(3 * m * own.convolved, kept + outputs + max(3 * state, outputs + state), kept + outputs + 5 * m * values)
    return most, outputs + (state if again else 0) + 2 * m * values
