"""Several processes that share a model: every architecture on two and three ranks against one process, in float64."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from families import NO_GROUPS
from helpers import FIRST, held

from ggjac import division, parallel, planner
from ggjac.config import read_config
from ggjac.config.mixers import MIXERS
from ggjac.generation import Continuation, greedy
from ggjac.gguf import GGUFFile, open_gguf
from ggjac.jacobian.ordinary import OrdinaryJacobian
from ggjac.linop import Identity
from ggjac.model import open_model
from ggjac.parallel import Crew, Joined, ParallelError, SharedJournal
from ggjac.planner.work import command_work

PROGRAM = Path(__file__).with_name("parallel_program.py")
RANKS = 3
# Every architecture, and what is divided in a way of its own: biases, fused tensors, storage types, groups of heads and
# experts, several mixers or networks in a block, and keys that several blocks read.
CASES = sorted({
    "deci_linear",
    *FIRST.values(),
    "gqa", "mqa", "fused_biases", "fused_qkv", "qwen3_q8_0", "qwen2_fused_split", "olmo2_fused", "nemotron_biases",
    "gptneox_whole_heads", "falcon_40b", "mixtral_biases", "mixtral_one_expert", "gpt_oss_mxfp4", "granitemoe_shared",
    "bailingmoe2_groups", "deepseek2_lite_split", "deepseek2_unsplit", "deepseek2_yarn", "minimax_m3_fused",
    "lfm2_window", "granitehybrid_biases", "granitehybrid_shared", "nemotron_h_moe_latent", "falcon_h1_normed",
    "qwen35moe_fused", "gemma4_experts", "gemma4_small", "gemma4_shared", "gemma4_shared_keys", "kimi_linear_sizes",
    "kimi_k3",
    "mpt_scaled",
})  # fmt: skip
# Of mixtures whose tokens use every expert, a plan knows all.
EVERY_EXPERT = {
    f"{case}, every expert": (case, {"experts": 3, "experts_used": 3} | changes)
    for case, changes in {
        "mixtral": {},
        "qwen2moe": {},
        "grovemoe": {"chunk": 1},
        "deepseek2": {"omit": NO_GROUPS},
    }.items()
}
# Why a mixer is computed whole by every rank, however many heads and channels it has.
KINDS_OF_WHOLE = {division.RECURRENCE, division.ALL_HEADS, division.SEVERAL, division.PROJECTION}


@pytest.fixture(scope="module")
def files(tiny_file: Callable[..., Path]) -> dict[str, tuple[Path, list[int]]]:
    """Return the file and the prompt of every case."""
    cases: dict[str, tuple[str, dict[str, Any]]] = {case: (case, {}) for case in CASES}
    rows = (cases | EVERY_EXPERT).items()
    return {name: (tiny_file(case, **changes), tiny.prompt(case, 6)) for name, (case, changes) in rows}


@pytest.fixture(scope="module")
def found(files: dict[str, tuple[Path, list[int]]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of the processes reports; they are started once."""
    folder = tmp_path_factory.mktemp("parallel")
    cases = {name: (str(path), prompt, name in FIRST.values()) for name, (path, prompt) in files.items()}
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


@pytest.mark.parametrize("case", [*CASES, *EVERY_EXPERT])
def test_ranks_give_what_one_process_gives(case: str, found: list[dict[str, Any]]) -> None:
    for ranks in "23":
        for name, distance in found[-1][case][ranks].items():
            assert distance <= 1e-12, f"{name} on {ranks} ranks"


def test_all_are_told_the_same(found: list[dict[str, Any]]) -> None:
    assert all(report["gqa"]["told"] == {"rank": 0, "text": "ü"} for report in found)


def test_what_is_divided(tiny_files: dict[str, Path]) -> None:
    """What falls back to whole is right too, so that only this test sees it; a mixer does so for one of few reasons."""
    seen = set()
    for case in CASES:
        with open_gguf(tiny_files[case]) as file:
            config = read_config(file.metadata, {name: info.shape for name, info in file.tensors.items()})
            found = division.divide(config, file.tensors, 0, 2)
        for i, (own, cuts, whole) in enumerate(zip(config.layers, found.cuts, found.whole, strict=True)):
            undivided = {mixer for mixer in own.mixers if MIXERS[mixer].output not in cuts}
            stems = {name.removeprefix(config.prefix(i)) for name in file.tensors}
            normed = own.sparsity > 0 or "ffn_sub_norm.weight" in stems  # by what all hidden units have in common
            assert (division.ALL_UNITS in whole) == normed, f"{case}, block {i}"
            assert set(whole) <= KINDS_OF_WHOLE | {division.ALL_UNITS}, f"{case}, block {i}"
            assert bool(set(whole) - {division.ALL_UNITS}) == bool(undivided), f"{case}, block {i}: {undivided}"
            divisible = own.hidden_units > 0 and not config.row.ffn.startswith("shifted")  # RWKV's are whole
            assert ("ffn_down" in cuts) == (divisible and not normed), f"{case}, block {i}"
            seen |= set(whole)
    assert seen == KINDS_OF_WHOLE | {division.ALL_UNITS}


@pytest.mark.parametrize("case", ["gqa", "phi2", "gpt_oss", "deepseek2_yarn"])
def test_each_rank_reads_its_part(case: str, found: list[dict[str, Any]]) -> None:
    whole = found[-1][case]["counts"]["1"]["down"][0]
    for rank in (0, 1):
        assert found[rank][case]["counts"]["2"]["down"][0] < 0.6 * whole


@pytest.mark.parametrize("case", [*CASES, *EVERY_EXPERT])
def test_a_plan_counts_what_a_rank_does(
    case: str, found: list[dict[str, Any]], files: dict[str, tuple[Path, list[int]]]
) -> None:
    """Bytes, FLOP, and sums with other ranks; those of a few experts of many are up to the router."""
    path, prompt = files[case]
    with open_gguf(path) as file:
        config = read_config(file.metadata, {name: info.shape for name, info in file.tensors.items()})
        needed = command_work("svd", config, len(prompt), "float64")

        def compared(rank: int, ranks: int) -> tuple[list[float], list[float]]:
            """Return what was counted and what was planned of a trace, and of products up and down."""
            part = division.divide(config, file.tensors, rank, ranks) if ranks > 1 else None
            plan, counts = planner.make(file, config, needed, division=part), found[rank][case]["counts"][str(ranks)]
            (read, _, *sums), up, down = (counts[name] for name in ("trace", "up", "down"))
            assert sums == [plan.trace.sums, plan.summed_bytes(plan.trace)]
            assert down[2:] == [plan.sweep.sums, 2 * plan.summed_bytes(plan.sweep)]
            assert up[2] == plan.sweep.sums
            planned = plan.sweep.nbytes, 2 * plan.sweep.flop
            return [read, *up[:2], *down[:2]], [sum(layer.trace.nbytes for layer in plan.layers), *planned, *planned]

        # Vectors of norms, of which each rank reads all, are not always counted as often as they are read.
        (counted, *others), (planned, *others_planned) = compared(RANKS - 1, 1)
        vectors = counted - planned
        known = case in EVERY_EXPERT or not config.expert_count
        assert not known or (abs(vectors) < 0.02 * counted and others == others_planned)
        for rank, ranks in ((0, 2), (1, 2), (0, 3), (1, 3), (2, 3)):
            (counted, *others), (planned, *others_planned) = compared(rank, ranks)
            assert not known or (counted - planned == vectors and others == others_planned)


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
        cuts = Crew.of(alone, model.config, model.gguf.tensors).cuts[0]
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


def test_all_decide_as_the_first(
    alone: dist.ProcessGroup, tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When an iteration stops, which experts a token uses, and which token comes next: a last bit may decide these."""
    model = open_model(tiny_files["mixtral"], dtype="float64", group=alone)
    ids = tiny.prompt("mixtral", 4)

    def first(tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        """Another process has zeros; its JSON, which is sent as bytes, is this one's."""
        if tensor.dim() == 2:
            tensor.zero_()

    J = model.trace(ids).jacobian()
    assert J.svd(2, block=4, tol=1e-9).sweeps > 2
    with monkeypatch.context() as patch:
        patch.setattr(SharedJournal, "_receive", lambda *_: None)
        patch.setattr(dist, "broadcast", first)
        found = J.svd(2, block=4, tol=1e-9)
        assert (found.reason, found.sweeps) == ("tolerance", 2)
        chosen = model.block(0).agreed(torch.tensor([[1, 2]]))
        assert chosen.tolist() == [[0, 0]]
        patch.setattr(parallel, "of_first", lambda own, group: b"3")
        assert greedy(Continuation(model, 6), ids, 2)[0] == [3, 3]


def test_what_a_rank_reads_ahead(
    alone: dist.ProcessGroup, tiny_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own rows, and all rows of which it has some columns, also if these are not the first."""
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    model = open_model(tiny_files["gqa"], group=alone)
    asked: dict[str, tuple[int, int | None]] = {}

    def will_need(self: GGUFFile, tensor: Any, start: int = 0, stop: int | None = None) -> None:
        asked[tensor.name.removeprefix("blk.0.").removesuffix(".weight")] = start, stop

    monkeypatch.setattr(GGUFFile, "will_need", will_need)
    model.block(0).read_ahead()
    d, units = model.config.d, model.config.layers[0].hidden_units
    assert asked["ffn_up"] == (units // 2, units)
    assert asked["ffn_down"] == (0, d)
    assert asked["attn_norm"] == (0, None)
    asked.clear()
    columns = model.block(0).matrix("ffn_down.weight")
    columns.columns(64, 96).read_ahead()
    assert not asked  # the first slab has asked for all
    columns.columns(0, 64).read_ahead()
    assert asked["ffn_down"] == (0, d)


@pytest.mark.parametrize("case", ["gqa", "gemma2", "lfm2"])
def test_a_rank_holds_what_its_plan_says(
    case: str, alone: dist.ProcessGroup, tiny_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak of memory, as of one of two; the other one's terms are missing, but they take no memory here."""
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(SharedJournal, "_compare", lambda *_: None)
    # Gloo's thread lets go of a tensor some time after it has arrived: on a busy machine 0.2 MB more were held.
    for collective in ("all_reduce", "broadcast"):
        monkeypatch.setattr(dist, collective, lambda *_, **__: None)
    model = open_model(tiny_file(case, layers=3) if case == "gqa" else tiny_file(case), threads=1, group=alone)
    plan = model.plan(24, "svd", rank=16, sweeps=4)
    asked = {"tol": 1e-9, "max_sweeps": 4, "block": plan.work.width}
    measured = held(lambda: model.trace(tiny.prompt(case, 24)).jacobian().svd(16, **asked))
    needed = plan.ram_needed - plan.ram["process"]
    whole = model.plan(24, "svd", rank=16, sweeps=4, ranks=1)
    assert 0.75 < measured / needed < 1.12, (plan.ram, whole.ram)
    assert needed < whole.ram_needed - whole.ram["process"]
