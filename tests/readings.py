"""Shares of a logit by the independent float64 oracle: what it reads of the stream, of branches, heads and experts."""

import itertools
import math
from pathlib import Path

import oracle
import tiny
import torch
from torch import Tensor

N = 6

# The output projection of a mixer -> the key that states the number of its heads; a convolution is one part, and so is
# a recurrence with decays for each channel.
OUTPUTS = {"attn_output": "attention.head_count", "ssm_out": "ssm.time_step_rank", "shortconv.out_proj": ""}
OUTPUTS |= {"time_mix_output": "", "attn_output_a": "attention.head_count"}


class Expected:
    """The oracle's states, and its shares of the logit of `target` (minus that of `versus`) at one position."""

    def __init__(self, file: Path, case: str):
        self.known, self.ids = oracle.load(file), tiny.prompt(case, N)
        self.layers = self.known.metadata["block_count"]
        self.states = oracle.forward(self.known, self.ids)
        self.last = self.states[f"l_out-{self.layers - 1}"]

    def uncapped(self, y: Tensor) -> Tensor:
        """Apply the head to outputs of the final norm, without its soft cap."""
        return oracle.head(self.known, y, capped=False)

    def direction(self, position: int, target: int, versus: int | None) -> tuple[Tensor, float, float]:
        """Return what the logit reads from the stream, the logit, and what is left of it for a stream of zero."""
        h = self.last[position].clone().requires_grad_()
        z = self.uncapped(oracle.final_norm(self.known, h[None], frozen=True)[0])
        logit = z[target] - (0 if versus is None else z[versus])
        (c,) = torch.autograd.grad(logit, h)
        logit, h = logit.detach(), h.detach()
        return c, float(logit), float(logit - c @ h)

    def by_head(self, layer: int, x: Tensor, freeze: str = "up") -> tuple[list[Tensor], list[Tensor]]:
        """Return factors on the columns that each head has of its mixer's output projection, and what is added then.

        One pair for each mixer of the block.
        """
        names = {f"blk.{layer}.{stem}.weight": key for stem, key in OUTPUTS.items()}
        factors, added = list[Tensor](), list[Tensor]()
        for name, key in names.items():
            if name in self.known.weights:
                apart = name.endswith("ssm_out.weight") and self.known.weights[f"blk.{layer}.ssm_a"][0].numel() > 1
                count = 1 if apart else oracle.scalar(self.known.metadata.get(key, 1), layer)
                if "time_mix" in name:
                    count = self.known.metadata["embedding_length"] // self.known.metadata["wkv.head_size"]
                factor = torch.ones(count, dtype=torch.float64, requires_grad=True)
                W = self.known.weights[name]
                # Rows of a group of heads have columns of these only.
                groups = W.unflatten(0, (self.known.metadata.get("attention.output_group_count", 1), -1))
                columns = factor.reshape(len(groups), 1, -1)
                columns = columns.repeat_interleave(W.shape[1] // columns.shape[2], 2)
                scaled = self.known._replace(weights=self.known.weights | {name: (groups * columns).flatten(0, 1)})
                states = oracle.block(scaled, layer, x, freeze=freeze, states=self.states)
                factors.append(factor)
                added.append(states[f"attn_out-{layer}"])
        return factors, added

    def heads(self, layer: int, position: int, c: Tensor) -> Tensor:
        """Return each head's share: the derivative by a factor on its columns of the output projection."""
        shares = [torch.zeros(0, dtype=torch.float64)]
        x = self.states["x"] if layer == 0 else self.states[f"l_out-{layer - 1}"]
        for factor, added in zip(*self.by_head(layer, x), strict=True):
            shares.append(torch.autograd.grad(c @ added[position], factor)[0])
        if self.known.facts.laurel:  # one part: what is left where attention adds nothing
            names = [name for stem in OUTPUTS if (name := f"blk.{layer}.{stem}.weight") in self.known.weights]
            none = {name: torch.zeros_like(self.known.weights[name]) for name in names}
            alone = self.known._replace(weights=self.known.weights | none)
            added = oracle.block(alone, layer, x, freeze="up", states=self.states)[f"attn_out-{layer}"][position]
            shares.append((c @ added)[None])
        return torch.cat(shares)

    def networks(self, layer: int, position: int, c: Tensor) -> dict[str, Tensor]:
        """Return the share of each network by the end of its tensors' names, of a stack of experts that of each.

        It is the derivative by a factor on what the network adds. What a mixture makes of the sum of others is not
        theirs, and so is left out of the derivative by these.
        """
        shares, weights = {}, self.known.weights
        x = self.states["x"] if layer == 0 else self.states[f"l_out-{layer - 1}"]
        for kind in ("", "_shexp", "_exps", "_chexps"):
            name = f"blk.{layer}.ffn_down{kind}"
            if f"{name}.weight" not in weights:
                continue
            stack = weights[f"{name}.weight"]
            factor = torch.ones(len(stack) if stack.dim() > 2 else 1, dtype=torch.float64, requires_grad=True)
            changed = {f"{name}.weight": stack * factor.reshape(-1, *[1] * (stack.dim() - 1))}
            if f"{name}.bias" in weights:
                changed[f"{name}.bias"] = weights[f"{name}.bias"] * factor.reshape(-1, *[1] * (stack.dim() - 2))
            after = f"blk.{layer}.ffn_down_chexps.weight"
            if kind != "_chexps" and after in weights:
                changed[after] = 0 * weights[after]
            known = self.known._replace(weights=weights | changed)
            added = oracle.block(known, layer, x, freeze="up", states=self.states)[f"ffn_out-{layer}"][position]
            (shares[kind],) = torch.autograd.grad(c @ added, factor)
        return shares

    def reaching(self, c: Tensor, kind: str, layer: int, position: int) -> Tensor:
        """Return what `c` reads of what a branch adds, "attn" or "ffn", or of the embedding, "x", past all branches."""
        if not self.known.facts.streams:
            factor = self.later(layer, position, feeds=kind != "ffn")
            if kind == "x" and self.known.facts.normed_skip:  # past the first attention, too
                factor = factor * self.known.metadata["residual_scale"] * self.known.weights["blk.0.attn_norm.weight"]
                factor = factor / oracle.root_mean_square(self.known, self.states["x"][position])
            return c * factor
        wanted = "x" if kind == "x" else f"{kind}_out-{layer}"
        states = self.states | {wanted: self.states[wanted].detach().clone().requires_grad_()}
        return torch.autograd.grad(c @ direct(self.known, states)[position], states[wanted])[0][position]

    def held(self, c: Tensor, position: int) -> float:
        """Return the share of the stream that is held in the first pass, past all branches."""
        name = "hrm.z_l_init"
        if name not in self.known.weights:
            return 0.0
        vector = self.known.weights[name].clone().requires_grad_()
        end = direct(self.known._replace(weights=self.known.weights | {name: vector}), self.states)
        return float(torch.autograd.grad(c @ end[position], vector)[0] @ vector.detach())

    def later(self, layer: int, position: int, *, feeds: bool = True) -> Tensor:
        """Return the product of what multiplies the stream from this layer's feed-forward, or its end, on.

        It is a number after each layer; or frozen factors of norms, past branches or between passes over all layers.
        """
        names = (f"blk.{i}.layer_output_scale.weight" for i in range(layer, self.layers))
        factor = torch.ones_like(self.last[0])
        factor *= math.prod(float(self.known.weights[name]) for name in names if name in self.known.weights)
        every = self.known.metadata.get("rescale_every_n_layers", 0)
        factor /= 2 ** sum((i + 1) % every == 0 for i in range(layer, self.layers) if every)
        if self.known.facts.looped:
            once = self.known.metadata["blocks in a loop"]
            for i in range((layer // once + 1) * once, self.layers, once):
                size = oracle.root_mean_square(self.known, self.states[f"l_out-{i - 1}"][position])
                factor = factor * self.known.weights["output_norm.weight"] / size
        if self.known.facts.normed_skip:
            for i in range(layer, self.layers):
                before = self.states[f"l_out-{i - 1}"] if i else self.states["x"]
                norms = [(f"blk.{i}.attn_norm", before), (f"blk.{i}.ffn_norm", self.states[f"ffn_inp-{i}"])]
                for name, stream in norms[(1 if feeds else 2) if i == layer else 0 :]:
                    size = oracle.root_mean_square(self.known, stream[position])
                    weight = self.known.weights[f"{name}.weight"]
                    factor = factor * self.known.metadata["residual_scale"] * weight / size
        return factor


def direct(known: oracle.Oracle, states: dict[str, Tensor]) -> Tensor:
    """Return the stream after all blocks, frozen, as a function of what their branches add, past all of them."""
    x = states["x"]
    for i, branch in itertools.product(range(known.metadata["block_count"]), ("attn", "ffn")):
        if branch == "attn":
            x = oracle.entered(known, i, x, frozen=True)
        x = oracle.connected(known, f"blk.{i}", branch, x, frozen=True)[1](states[f"{branch}_out-{i}"])
        if branch == "ffn":
            x = x + states.get(f"per_layer_out-{i}", 0)
    return x


def stream(known: oracle.Oracle, states: dict[str, Tensor], depth: int) -> Tensor:
    """Return the stream after some blocks, frozen, as a function of what their branches add, past all of them."""
    x, facts, meta, weights = states["x"], known.facts, known.metadata, known.weights
    for i in range(depth):
        x, b = oracle.entered(known, i, x, frozen=True), f"blk.{i}"
        for branch, name in (("attn", facts.attn_norm), ("ffn", facts.ffn_norm)):
            added = states[f"{branch}_out-{i}"]
            if facts.normed_skip:
                x = added + meta["residual_scale"] * oracle.branch_norm(known, b, name, x, frozen=True)
            else:
                x = oracle.connected(known, b, branch, x, frozen=True)[1](added)
        x = x + states.get(f"per_layer_out-{i}", 0)
        x = x * (weights.get(f"{b}.layer_output_scale.weight", 1.0) if facts.streams != "input" else 1.0)
        every = meta.get("rescale_every_n_layers", 0)
        x = x / 2 if every and (i + 1) % every == 0 else x
    return x


def random(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(
    found: Tensor | float | list[float], expected: Tensor | float | list[float], tolerance: float = 1e-10
) -> None:
    found, expected = (torch.as_tensor(part, dtype=torch.float64) for part in (found, expected))
    assert found.shape == expected.shape
    largest = expected.abs().max() if expected.numel() else 0.0
    assert bool(((found - expected).abs() <= tolerance * (1 + largest)).all())
