"""Several processes that share a model: every architecture on two and three ranks against one process, in float64."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from helpers import FIRST

from ggjac.jacobian.ordinary import OrdinaryJacobian
from ggjac.linop import Identity
from ggjac.model import open_model
from ggjac.parallel import Crew, Joined, ParallelError

PROGRAM = Path(__file__).with_name("parallel_program.py")
RANKS = 3
# Every architecture, and what is divided in a way of its own: biases, fused tensors, storage types, groups of heads and
# experts, several mixers or networks in a block, and keys that several blocks read.
CASES = sorted({
    *FIRST.values(),
    "gqa", "mqa", "fused_biases", "fused_qkv", "qwen3_q8_0", "qwen2_fused_split", "olmo2_fused", "nemotron_biases",
    "gptneox_whole_heads", "falcon_40b", "mixtral_biases", "mixtral_one_expert", "gpt_oss_mxfp4", "granitemoe_shared",
    "bailingmoe2_groups", "deepseek2_lite_split", "deepseek2_unsplit", "deepseek2_yarn", "minimax_m3_fused",
    "lfm2_window", "granitehybrid_biases", "granitehybrid_shared", "nemotron_h_moe_latent", "falcon_h1_normed",
    "qwen35moe_fused", "gemma4_experts", "gemma4_small", "gemma4_shared", "gemma4_shared_keys", "kimi_linear_sizes",
})  # fmt: skip
# Of the architectures, those of whose mixers two ranks divide nothing (recurrences alone, or a norm over all heads) ...
MIXERS_WHOLE = {"mamba", "mamba2", "minimax-m2", "olmo2", "olmoe"}
# ... and those of whose networks they divide none: there are none.
NETWORKS_WHOLE = {"mamba", "mamba2"}


@pytest.fixture(scope="module")
def found(tiny_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of the processes reports; they are started once."""
    folder = tmp_path_factory.mktemp("parallel")
    cases = {case: (str(tiny_files[case]), tiny.prompt(case, 6), case in FIRST.values()) for case in CASES}
    (folder / "cases.json").write_text(json.dumps(cases))
    given = [folder / "store", folder / "cases.json", folder / "result"]
    started = [subprocess.Popen([sys.executable, PROGRAM, str(rank), *map(str, given)]) for rank in range(RANKS)]
    try:
        while any(process.poll() is None for process in started) and not any(process.poll() for process in started):
            time.sleep(0.1)
        assert [process.wait(10) for process in started] == [0] * RANKS
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """Return a group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_ranks_give_what_one_process_gives(case: str, found: list[dict[str, Any]]) -> None:
    for ranks in "23":
        for name, distance in found[-1][case][ranks].items():
            assert distance <= 1e-12, f"{name} on {ranks} ranks"


def test_all_are_told_the_same(found: list[dict[str, Any]]) -> None:
    assert all(report["gqa"]["told"] == {"rank": 0, "text": "ü"} for report in found)


def test_what_is_divided(found: list[dict[str, Any]]) -> None:
    """What falls back to whole is right too, so that only this test sees it."""
    mixers, networks = set(), set()
    for architecture, case in FIRST.items():
        stems = set(found[0][case]["divided"])
        if not stems & {"attn_output", "shortconv.out_proj"}:
            mixers.add(architecture)
        if not stems & {"ffn_down", "ffn_down_shexp"} and not tiny.options(case).experts:
            networks.add(architecture)
    assert mixers == MIXERS_WHOLE
    assert networks == NETWORKS_WHOLE


@pytest.mark.parametrize("case", ["gqa", "phi2", "gpt_oss", "deepseek2_yarn"])
def test_each_rank_reads_its_part(case: str, found: list[dict[str, Any]]) -> None:
    whole = found[-1][case]["read"]
    for rank in (0, 1):
        assert found[rank][case]["read"] < 0.75 * whole  # head and embeddings are read by both


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_heads_are_shared_out_once(
    ranks: int, alone: dist.ProcessGroup, tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More ranks than key/value heads: each of them serves several ranks, which have some of its query heads each."""
    model = open_model(tiny_files["gqa"])
    own = model.config.layers[0]
    monkeypatch.setattr(dist, "get_world_size", lambda group: ranks)
    queries, keys = [], []
    for rank in range(ranks):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        cuts = Crew.of(alone, model.config, [model.block(i) for i in range(len(model.config.layers))]).cuts[0]
        if ranks > own.heads:
            assert not any("attn" in stem for stem in cuts)
            return
        queries.append(range(cuts["attn_q"].start // own.key_size, cuts["attn_q"].stop // own.key_size))
        keys.append(range(cuts["attn_k"].start // own.key_size, cuts["attn_k"].stop // own.key_size))
    assert [head for heads in queries for head in heads] == list(range(own.heads))
    for i, heads in enumerate(queries):
        assert {head * own.kv_heads // own.heads for head in heads} == set(keys[i])


def test_the_ordinary_jacobian_is_refused(alone: dist.ProcessGroup, tiny_files: dict[str, Path]) -> None:
    """Autograd goes past an all-reduce: its derivative would be wrong by most of itself, with a mere warning."""
    model = open_model(tiny_files["gqa"], dtype="float64", group=alone)
    trace = model.trace(tiny.prompt("gqa", 4))
    J = OrdinaryJacobian(trace.network, 3)
    X, Y = (torch.ones(2, *shape, dtype=torch.float64) for shape in (J.in_shape, J.out_shape))
    with pytest.raises(ParallelError, match="run it in one process"):
        J.matmat(X)
    with pytest.raises(ParallelError, match="run it in one process"):
        J.rmatmat(Y)


def test_a_gradient_is_refused(alone: dist.ProcessGroup) -> None:
    joined = Joined(Identity((3,), dtype=torch.float32, device=torch.device("cpu")), alone)
    with pytest.raises(ParallelError, match="autograd"):
        joined.matmat(torch.ones(1, 3, requires_grad=True))
    with pytest.raises(ParallelError, match="autograd"):
        joined.rmatmat(torch.ones(1, 3, requires_grad=True))
    assert torch.equal(joined.matmat(torch.ones(1, 3)), torch.ones(1, 3))
