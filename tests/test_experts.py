"""Shares of experts against autograd over the independent float64 oracle, by a factor on what each expert adds."""

from pathlib import Path

import pytest
import tiny
import torch
from readings import Expected, N, close

from ggjac.analysis.branches import attribute_branches
from ggjac.analysis.experts import attribute_experts
from ggjac.model import open_model

# Shared experts with a gate and without, dense networks beside mixtures and before them, experts chosen by token ids,
# in groups, of a latent width, with biases, weighted before and after, and those that read the sum of others; norms
# after the mixture, after its parts and centred ones; several residual streams, parallel blocks.
CASES = (
    *("mixtral_top3", "qwen3moe", "qwen2moe", "olmoe", "granitemoe_shared", "gpt_oss", "glm4moe", "glm4moe_groups"),
    *("llama4", "llama4_several", "grovemoe", "grovemoe_threes", "arctic", "gemma4_experts", "cohere2moe", "phimoe"),
    *("deepseek4", "hy_v4", "glm5_next", "kimi_k3", "nemotron_h_moe", "minimax_01", "afmoe", "grok", "dbrx"),
    *("deepseek2", "bailingmoe2", "smallthinker", "lfm2moe"),
)


@pytest.mark.parametrize("case", CASES)
def test_experts_are_those_of_the_oracle(case: str, tiny_files: dict[str, Path]) -> None:
    model, expected = open_model(tiny_files[case], dtype="float64"), Expected(tiny_files[case], case)
    jacobian = model.trace(expected.ids).jacobian()
    found, alone = attribute_experts(jacobian, positions=range(N)), attribute_experts(jacobian, 5, 17, positions=[2])
    assert (found.positions, alone.positions, found.mlp.shape) == ([*range(N)], [2], (N, expected.layers))
    assert {mixture.block for mixture in found.mixtures} == {
        i for i in range(expected.layers) if f"blk.{i}.ffn_gate_inp.weight" in expected.known.weights
    }
    for shares, row, position in [(found, p, p) for p in range(N)] + [(alone, 0, 2)]:
        c, logit, _ = expected.direction(position, int(shares.targets[row]), shares.versus)
        close(shares.logits[row], logit)
        for layer in range(expected.layers):
            read = expected.reaching(c, "ffn", layer, position)
            networks = expected.networks(layer, position, read)
            of_kind = {"": shares.dense, "_shexp": shares.shared}
            for kind, own in of_kind.items():
                close(own[row, layer], float(networks.get(kind, torch.zeros(1)).sum()))
            for mixture in (mixture for mixture in shares.mixtures if mixture.block == layer):
                kind = {"expert": "_exps", "adjugate expert": "_chexps"}[mixture.kind]
                every = torch.zeros_like(networks[kind]).index_copy_(0, mixture.experts, mixture.shares[row])
                close(every, networks[kind])
                used = mixture.shares[row] != 0
                assert not (used & ~mixture.chosen[position]).any()
    for shares in (found, alone):
        assert shares.unexplained.abs().max() < 1e-10


@pytest.mark.parametrize("case", CASES)
def test_experts_sum_to_the_branch(case: str, tiny_files: dict[str, Path]) -> None:
    model = open_model(tiny_files[case], dtype="float64")
    jacobian = model.trace(tiny.prompt(case, N)).jacobian()
    experts, branches = (split(jacobian, positions=[1, 3]) for split in (attribute_experts, attribute_branches))
    for name in ("targets", "logits", "embedding", "attn", "mlp", "bias"):
        close(getattr(experts, name), getattr(branches, name), 1e-12)
