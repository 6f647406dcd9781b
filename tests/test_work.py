"""Commands compared with their own `--dry-run`: passes, vectors, FLOP, bytes and memory, counted while they run."""

import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from commands import COMMANDS, ROUGH, SHORT, SWEEPS, with_file
from families import NO_GROUPS
from helpers import held, invoke
from jaxtyping import config

from ggjac import session, ways
from ggjac.analysis.steer import steer
from ggjac.cli.planning import requested
from ggjac.config import ModelConfig, read_config
from ggjac.config.mixers import MIXERS
from ggjac.generation import Continuation
from ggjac.gguf import GGUFFile, open_gguf
from ggjac.jacobian import SharedSweep
from ggjac.jacobian.ordinary import OrdinaryJacobian
from ggjac.linop import Linear
from ggjac.model import open_model
from ggjac.planner import Plan, make, work
from ggjac.sizes import ITEM_BYTES
from ggjac.weights import WeightStore

TinyFile = Callable[..., Path]
OUTPUTS = {mixer.output for mixer in MIXERS.values()}
TOKENS = ["--tokens", "5,17,3,99,42,7"]
MIXED = ("convolution", "attention", "convolution")
# No biases but of norms, so all that is read is a matrix or a norm; every expert used, so the router has no effect.
CASES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "fused_qkv": {"layers": 3},
    "phi3": {},
    "gemma2": {"layers": 3},
    "mixtral": {"experts": 3, "experts_used": 3},
    "qwen3moe": {"experts": 3, "experts_used": 3},
    "qwen35_listed": {},
    "qwen3next_old": {"experts": 3, "experts_used": 3},
    "lfm2": {"layers": 3, "mixers": MIXED, "extra": {"attention.head_count_kv": [0, 2, 0]}},
    "nemotron_h": {},
    "falcon_h1": {},
    "jamba": {},
    "arwkv7": {},
    "rwkv6": {"layers": 3},
    "gemma4": {},
    "gemma4_small": {"layers": 4},  # as many as the sizes that it lists
    "deepseek2": {"experts": 3, "experts_used": 3, "omit": NO_GROUPS},
    "kimi_linear": {"experts": 3, "experts_used": 3},
    "grovemoe": {"experts": 3, "experts_used": 3, "chunk": 1},
    "talkie": {"scales": ()},
    "hy_v4": {"experts": 3, "experts_used": 3},
    "glm5_next": {"experts": 3, "experts_used": 3},
    "kimi_k3": {"experts": 3, "experts_used": 3},
    "deepseek4": {"experts": 3, "experts_used": 3},
    "hrm_text": {"layers": 4, "cycles": (1, 1)},
}
# State spaces, blocks of one branch and of two mixers, shared values and a block's own inputs, latents, streams,
# a compressed memory.
LATER = ("nemotron_h", "falcon_h1", "jamba", "arwkv7", "rwkv6", "gemma4", "gemma4_small", "deepseek2", "kimi_linear")
LATER += ("hy_v4", "glm5_next", "kimi_k3", "deepseek4", "grovemoe", "talkie", "hrm_text")
# Variants of every command, by `svd per token`.
COUNTED: dict[str, list[Any]] = {
    f"{name} {variant}".strip(): options
    for name, command in COMMANDS.items()
    for variant, options in command.counted.items()
}


class Counted:
    """Counts of what a command did.

    Attributes:
        plans: the plan printed for each model.
        stores: the weights of each model.
        products: vectors and FLOP of each shared sweep.
        stacks: by block, how many vectors its output projection was applied to, each time.
        tangents: of each product with the ordinary Jacobian.
    """

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.stores: list[WeightStore] = []
        self.products: list[tuple[int, int]] = []
        self.stacks: dict[int, list[int]] = defaultdict(list)
        self.tangents: list[int] = []

    @property
    def blocks(self) -> float:
        """Stored bytes read of blocks."""
        return sum(_bytes(store, "blk.") for store in self.stores)


def _bytes(store: WeightStore, name: str) -> float:
    infos = store.file.tensors
    return sum(rows * infos[tensor].row_bytes for tensor, rows in store.reads.items() if tensor.startswith(name))


@pytest.fixture(autouse=True, scope="module")
def swift() -> Iterator[None]:
    """Switch off shape checks, which other tests do: they take time."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counted:
    """Return the counts from now on; no weights are kept between sweeps, and the current folder is empty."""
    monkeypatch.chdir(tmp_path)
    for expected in ("EXPECTED_SWEEPS", "NARROW_SWEEPS"):
        monkeypatch.setattr(ways, expected, SWEEPS[-1])
    for expected in ("ROUGH_SWEEPS", "FINAL_SWEEPS"):
        monkeypatch.setattr(work, expected, ROUGH[-3] // 2)
    found = Counted()
    fit = session.Session.fit

    def keeping_nothing(self: session.Session, *given: Any, **options: Any) -> Plan:
        made = fit(self, *given, **options)
        self.model.weights.place([], {})
        found.stores.append(self.model.weights)
        return made

    monkeypatch.setattr(session.Session, "fit", keeping_nothing)
    data = Plan.data

    def printed(made: Plan) -> dict[str, Any]:
        found.plans.append(made)
        return data(made)

    monkeypatch.setattr(Plan, "data", printed)
    for side in ("matmat", "rmatmat"):
        apply = getattr(Linear, side)

        def applied(self: Linear, X: Any, *rest: Any, apply: Any = apply) -> Any:
            weight: Any = getattr(self.weight, "_matrix", self.weight)  # which a graph that keeps no tiles borrows
            parts = weight.info.name.split(".")  # of a file's own matrices
            if len(parts) > 2 and ".".join(parts[2:-1]) in OUTPUTS:
                found.stacks[int(parts[1])].append(len(X))
            return apply(self, X, *rest)

        monkeypatch.setattr(Linear, side, applied)
    pushed = OrdinaryJacobian.matmat

    def push(self: OrdinaryJacobian, X: Any, *rest: Any) -> Any:
        found.tangents.append(len(X))
        return pushed(self, X, *rest)

    monkeypatch.setattr(OrdinaryJacobian, "matmat", push)
    for side in ("up", "down"):
        true = getattr(SharedSweep, side)

        def product(self: SharedSweep, stacks: list, *rest: Any, true: Any = true) -> Any:
            before = self.flop
            result = true(self, stacks, *rest)
            found.products.append((sum(map(len, stacks)), self.flop - before))
            return result

        monkeypatch.setattr(SharedSweep, side, product)
    of_matrices = SharedSweep.of_matrices

    def every(self: SharedSweep, compute: Any) -> Any:
        before, (n, d) = self.flop, (self.position + 1, self.d)
        made = of_matrices(self, compute)
        rows = len({span.tap for span in self.spans}) == 1
        found.products.append((d if rows else n * d, self.flop - before))
        return made

    monkeypatch.setattr(SharedSweep, "of_matrices", every)
    return found


def run(*args: object) -> dict[str, Any]:
    """Return the JSON that a command prints; it may have run out of sweeps, and a plan may not fit."""
    result = invoke(*args, "--format", "json", "-t", 1, code=None)
    assert result.exit_code in (0, 3, 4), result.output
    return json.loads(result.stdout)


def arguments(name: str, case: str, tiny_file: TinyFile, tokens: list[str] = TOKENS, **changes: Any) -> list[Any]:
    command, options = name.split(" ")[0], COUNTED[name]
    changes = ({"layers": 3} if "layers" in name else {}) | CASES[case] | changes
    path = tiny_file(case, **changes)
    options = [*options, *with_file(command, tiny_file(case, **changes, seed=1), options)]
    options = [f"{path}:output_norm.weight" if option == "DIRECTION" else option for option in options]
    return [command, "-m", path, *tokens, *options]


# Every command on a dense model and on a mixture, which alone has experts; on the others, commands that read other
# tensors or positions.
DENSE = [name for name in COUNTED if "expert" not in name]
FEW = ("svd", "norms", "attribute by head", "contrast early", "steer additive", "layers some")
EACH = [
    *((name, "gqa", size) for name in DENSE for size in (1 << 30, 500_000 if "layers" in name else 50_000)),
    *((name, "mixtral", 1 << 30) for name in COUNTED),
    *((name, case, 1 << 30) for name in FEW for case in CASES if case not in ("gqa", "mixtral", *LATER)),
    *((name, case, 1 << 30) for name in FEW if name not in ("norms", "layers some") for case in LATER),
]
# Readers of every kind: two mixers, parallel branches, values of other blocks, inputs of a block's own, streams.
EACH += [
    ("attribute by edge", case, 1 << 30) for case in ("falcon_h1", "gemma4_small", "arwkv7", "deepseek4", "talkie")
]
# The ordinary Jacobian makes values that several blocks read once more: few blocks, which no plan counts.
EACH = [one for one in EACH if one[:2] not in (("contrast early", "gemma4_small"), ("contrast early", "arwkv7"))]


@pytest.mark.parametrize(("name", "case", "chunk_bytes"), EACH)
def test_a_command_does_what_its_plan_says(
    name: str, case: str, chunk_bytes: int, counted: Counted, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass with its vectors and FLOP, and all bytes; in small chunks too."""
    monkeypatch.setattr(work, "CHUNK_BYTES", chunk_bytes)
    check([*arguments(name, case, tiny_file), "--dtype", "float64"], counted)


@pytest.mark.parametrize("name", ["analyze with layers", "layers", "ranks"])
def test_estimates_are_planned_too(
    name: str, counted: Counted, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("planner.work", "analysis.svd", "analysis.ranks", "analysis.layers"):
        monkeypatch.setattr(f"ggjac.{module}.EXACT_ROWS", 0)
    check(arguments(name, "gqa", tiny_file), counted)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((name, "gqa") for name in ("svd", "svd per token", "analyze", "compare", "ranks")),
        *(("analyze with layers", case) for case in ("gqa", "mixtral", "gemma2")),
        *((f"layers {variant}".strip(), "gqa") for variant in ("", "some", "transported")),
    ],
)
def test_the_way_by_the_matrix_is_planned_too(
    name: str, case: str, counted: Counted, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows once, whatever is decomposed; the stable rank takes none, and each position's signs none."""
    monkeypatch.setattr(ways, "WORTH", -math.inf)
    check([*arguments(name, case, tiny_file), "--dtype", "float64"], counted)
    kinds = {step.what for plan in counted.plans for step in plan.work.sweeps}
    assert kinds & {"all rows", "layers: to_end, matrices", "layers: cumulative, matrices"}
    assert not kinds & {"svd", "svd per token", "svd per token: signs", "stable rank", "layers: to_end, svd"}


def check(asked: list[Any], counted: Counted) -> None:
    """Compare what a command does with what its plan says."""
    planned = run(*asked, "--dry-run", "--no-bench")
    counted.stacks.clear()  # of the measurement
    assert counted.products == counted.stores == []
    run(*asked)
    models = [planned, *(planned[key] for key in ("other_model", "other_prompt", "other_rule") if key in planned)]
    assert len(counted.stores) == len(counted.plans) == len(models)

    products = [one for plan in counted.plans for one in shared(plan)]
    found = sorted(counted.products)
    assert [k for k, _ in found] == [k for k, _ in sorted(products)]
    # Of maps that advance together, the plan rounds to whole FLOP of a vector in a block.
    assert [flop for _, flop in found] == pytest.approx([flop for _, flop in sorted(products)], rel=1e-4)
    ordinary = [s for p in counted.plans for s in p.work.sweeps if s.what == "ordinary"]
    assert counted.tangents == [s.vectors - 1 for s in ordinary for _ in range(s.count)]
    with open_gguf(asked[asked.index("-m") + 1]) as file:
        config = sizes_of(file)
    for block, own in enumerate(config.layers):
        expected = [k for plan in counted.plans for k in stacks(plan, config, block)]
        assert sorted(counted.stacks[block]) == sorted(expected * len(own.mixers))

    read = sum(layer["trace_bytes"] for plan in models for layer in plan["layers"])
    read += sum(step["count"] * step["bytes"] for plan in models for step in plan["sweeps"])
    if any(step["what"] == "gradient" for plan in models for step in plan["sweeps"]):
        # Vectors of norms, which a graph keeps, are not read again.
        norms = sum(i.nbytes for i in counted.stores[0].file.tensors.values() if len(i.shape) == 1)
        assert read - norms <= counted.blocks <= read
    else:
        assert counted.blocks == pytest.approx(read, rel=1e-12)
    for plan, store in zip(models, counted.stores, strict=True):
        if plan is planned.get("other_rule"):
            continue  # its target is known by then: no logits
        tensors = {"output.weight": ("logits", "head"), "token_embd.weight": ("embedding",)}
        if "output.weight" not in store:
            tensors = {"token_embd.weight": ("logits", "head", "embedding")}
        for tensor, uses in tensors.items():
            passes = sum(step["count"] * _passes(step, uses) for step in plan["lookups"])
            rows, every = store.reads[tensor], store.file.tensors[tensor].rows
            assert passes * every <= rows, tensor
            assert rows < (passes + 1) * every, tensor


def sizes_of(file: GGUFFile) -> ModelConfig:
    """Return a file's sizes."""
    return read_config(file.metadata, {t.name: t.shape for t in file.tensors.values()})


def shared(plan: Plan) -> Iterator[tuple[int, int]]:
    """Yield vectors and FLOP of every pass that is a shared sweep."""
    for step in plan.work.sweeps:
        if step.region.tensors == "live" and step.region.written is None:
            flop = [step.vectors * layer.sweep_of(step.region).flop for layer in plan.layers]
            for once in filter(None, flop) if step.region.sequential else [sum(flop)]:
                yield from [(step.vectors, once)] * step.count


def stacks(plan: Plan, config: ModelConfig, block: int) -> Iterator[int]:
    """Yield how many vectors a block's output projection is applied to: by the trace, and by every pass."""
    yield 1
    for step in plan.work.sweeps:
        spans = step.region.spans or ((0, len(plan.layers)),)
        aboard = sum(first <= block < last for first, last in spans)
        if not aboard:
            continue
        once = [step.vectors if step.region.sequential else step.vectors * aboard // len(spans)]
        if step.region.tensors == "heads":  # its output and its bias; and down, the inputs of the head
            once = [2, 1]
        elif step.region.tensors == "written":
            once = [2]
        elif step.region.tensors == "edges":
            once = [ways.edge_rows(config, block, spans[0][1])]
        elif step.region.tensors == "scores":
            once = []
        elif step.what.startswith(("ordinary", "gradient")):  # tangents ride along, and cotangents go by themselves
            once = [1]
        elif step.what == "edits":  # each by itself, with the same tile
            once = [1] * step.vectors
        # Of the gradient's two passes, the first computes the values, and the second reads the same tiles by itself.
        yield from once * (1 if step.what == "gradient" else step.count)


def _passes(step: dict[str, Any], uses: tuple[str, ...]) -> int:
    """Return how often a look-up goes over a tensor: for logits and tokens of vectors once, for nearest ones again."""
    return any(step[use] for use in uses if use != "embedding") + bool("embedding" in uses and step["embedding"])


# ---- memory


LONG = ["--tokens", ",".join(str(i % 100 + 3) for i in range(24))]
# Enough vectors to outweigh everything that is negligible in a real model.
HEAVY = {
    "svd": ["-k", 16, *SWEEPS],
    "svd per token": ["-k", 4, *SWEEPS, "--per-token"],
    "analyze with contrast": ["-k", 16, *SWEEPS, *SHORT, "--no-verify", "-o", "run", "--contrast"],
    "svd without some": ["-k", 16, *SWEEPS, "--exclude", "0,3"],
    "svd saved": ["-k", 16, *SWEEPS, "-o", "f"],
    "layers": ["-k", 4, *SWEEPS, *SHORT],
    "jacobian": [],
    "norms": ["--count", 4],
    "attribute everywhere": ["--position", "all"],
    "attribute by edge": ["--by", "edge"],
    "attend": ["--layer", 1, "--head", 0],
    "contrast": [],
    "reach": ["-k", 4, *SWEEPS],
    "attribute ablated": ["--ablate", "mean"],
    "ranks": SWEEPS,
    "compare": ["-k", 16, *SWEEPS],
    "compare prompts": ["-k", 16, *SWEEPS, "--with-tokens", ",".join(["7"] * 24)],
    "steer": ["--max-tokens", 8],
    "attribute answer": ["--max-tokens", 24],
}
SINGLE = ["-k", 16, *SWEEPS, *SHORT, "--maps", "blockwise", "--kinds", "layer"]
LIGHT = {"layers of single blocks": SINGLE, "layers without one": ["-k", 4, *SWEEPS, *SHORT, "--exclude", "0"]}
LIGHT["attend by token"] = ["--layer", 1, "--head", 0, "--by", "token", "--key", "all"]
# Kinds of several residual streams.
STREAMS = ("hy_v4", "glm5_next", "kimi_k3", "hrm_text", "talkie")

HELD = [
    *((name, case) for name in HEAVY for case in ("gqa", "gemma2", "mixtral", "qwen3moe", "qwen35_listed", "lfm2")),
    *((name, case) for name in ("svd", "svd per token", "norms") for case in LATER),
    *(("layers of single blocks", case) for case in STREAMS),
    *(("attend by token", case) for case in ("gqa", "gemma2", "lfm2")),
    *(("layers without one", case) for case in ("gqa", "hy_v4")),
]


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((name, "gqa") for name in ("svd", "svd per token", "ranks", "layers")),
        ("layers", "gemma2"),
        ("layers", "hy_v4"),
        ("svd", "mixtral"),
    ],
)
def test_a_command_holds_what_its_plan_says_of_matrices(
    name: str, case: str, counted: Counted, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch does not count LAPACK's own work, four of seven or more square matrices: see docs/benchmarks.md."""
    monkeypatch.setattr(ways, "WORTH", -math.inf)
    test_a_command_holds_what_its_plan_says(name, case, counted, tiny_file, monkeypatch)
    assert counted.plans[0].work.decompositions


@pytest.mark.parametrize(("name", "case"), HELD)
def test_a_command_holds_what_its_plan_says(
    name: str, case: str, counted: Counted, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COUNTED, name, (HEAVY | LIGHT)[name])
    experts = {"experts": 6, "experts_used": 2} if "experts" in CASES[case] else {}  # as usual: few positions for each
    asked = arguments(name, case, tiny_file, LONG, **({"layers": 3} | CASES[case] | experts))
    planned = run(*asked, "--dry-run", "--no-bench")["ram"]
    needed = sum(planned.values()) - planned["process"]
    # Products wait for a checkpoint until the end; the choices of a router are estimated.
    least = 0.7 if "checkpoint" in planned or "experts" in CASES[case] else 0.75
    # Edited prompts run in step, and the plan has all of them at their peak: a recurrence's is high, and one is at it.
    least = 0.65 if name in ("reach", "attribute ablated") and case == "qwen35_listed" else least
    share = held(lambda: run(*asked)) / needed
    assert least < share < 1.12, planned


@pytest.mark.parametrize(
    ("case", "changes", "position"),
    [
        ("nanbeige", {}, -1),
        ("minimax_01_period", {"layers": 32}, "all"),
        ("hy_v4", {"layers": 24}, "all"),
        ("glm5_next", {"layers": 24}, "all"),
    ],
)
def test_shares_by_block_hold_what_their_plan_says(
    case: str, changes: dict[str, Any], position: object, counted: Counted, tiny_file: TinyFile
) -> None:
    """The prompt's own input, three times, while it is pushed through; and what the head reads of every branch."""
    asked = ["attribute", "-m", tiny_file(case, **changes), *LONG, "--by", "layer", "--position", position]
    planned = run(*asked, "--dry-run", "--no-bench")["ram"]
    share = held(lambda: run(*asked)) / (sum(planned.values()) - planned["process"])
    assert 0.9 < share < 1.15, planned


# ---- options


def test_defaults_are_those_of_the_commands(tiny_file: TinyFile) -> None:
    """An option that is not given has the same default in a plan as in the command."""
    own = {field.name: field.default for field in fields(work.Request)} | {"layers": [0, 1, 2, 3, 4]}  # all of 4 blocks
    own |= {"max_tokens": 12}  # of steer; attribute generates none
    seen = set()
    for name in work.JOBS:
        command = getattr(import_module(f"ggjac.cli.{name}"), name)
        given = ["--with", str(tiny_file("gqa"))] if name == "compare" else []
        params = command.make_context(name, given).params
        asked = requested(params, 4)
        if "rank" not in params:
            assert asked.pop("rank") == 1
        expected = own | work.DEFAULTS.get(name, {})
        assert asked == {option: expected[option] for option in asked}, name
        seen |= asked.keys()
    not_given = {"sweeps", "chunk_bytes", "singular", "text", "other", "layer", "head", "other_map", "prompts", "mean"}
    not_given |= {"positions", "input_position", "exclude", "keys", "answer", "reads"}  # as lists, which no default is
    not_given |= {"at_once"}  # which the plan finds
    not_given |= {"along", "at", "calibrate"}  # nothing of the kind is done unless it is asked for
    assert seen == own.keys() - not_given


def test_the_example_of_a_row_is_one(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row in the docstring makes a plan: a decomposition, a look-up, one sweep over half of the blocks."""
    text = work.__doc__ or ""
    names: dict[str, Any] = dict(vars(work))
    exec(textwrap.dedent(text[text.index("    def example") : text.index("\nRead it as follows")]), names)
    monkeypatch.setitem(work.JOBS, "example", names["example"])
    with open_gguf(tiny_file("plain", layers=4)) as file:
        sizes = sizes_of(file)
        plan = make(file, sizes, work.command_work("example", sizes, 5, "float32"))
    counts = [(step.what, step.count, getattr(step, "vectors", None)) for step in plan.work.steps]
    assert counts == [("svd", 8, 32), ("decoding", 1, None), ("first half", 1, 1)]
    half = plan.sweep_of(plan.work.sweeps[1].region)
    assert half.nbytes == sum(layer.sweep.nbytes for layer in plan.layers[:2])
    assert plan.ram["norms"] == 8 * 8 * 64
    assert plan.ram["bases"] > 0


def test_budgets_hold_by_smaller_chunks(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that needs too much memory at once is divided into chunks before it is refused.

    Rows of a matrix that LAPACK decomposes, as in `ranks`, are not: their bits would depend on the budget.
    """
    monkeypatch.setattr(work, "CHUNK_BYTES", 1 << 22)
    for name in ("jacobian", "norms", "attribute everywhere"):
        asked = [*arguments(name, "gqa", tiny_file, ["--tokens", ",".join(["5"] * 200)]), "--dry-run", "--no-bench"]
        ample, least = (run(*asked, "--ram-budget", size) for size in ("100GiB", "1"))
        assert least["fits"] is False
        assert ample["ram_needed"] > least["ram_needed"], name
        tight = run(*asked, "--ram-budget", least["ram_needed"])
        assert tight["fits"] is True
        count = [sum(step["count"] for step in plan["sweeps"]) for plan in (ample, tight)]
        assert count[0] < count[1]


def test_in_bfloat16_sweeps_go_on_until_its_rounding_shows(tiny_file: TinyFile) -> None:
    with open_gguf(tiny_file("plain")) as file:
        sizes = sizes_of(file)
    counts = {dtype: work.command_work("svd", sizes, 5, dtype).sweeps[0].count for dtype in ITEM_BYTES}
    assert counts == {"float64": 8, "float32": 8, "float16": 8, "bfloat16": 11}
    assert work.command_work("svd", sizes, 5, "bfloat16", sweeps=4).sweeps[0].count == 4


@pytest.mark.parametrize("case", ["gqa", "head_dim_wide", "qwen35_listed", "lfm2", "mamba", "rwkv6", "rwkv7"])
def test_keys_and_values_of_texts_are_counted(case: str, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or states and rows: those of every block, and of the one that is being extended twice."""
    seen: list[list[int]] = []
    extend = Continuation.extend

    def counted(self: Continuation, ids: Any) -> Any:
        outputs = extend(self, ids)
        kept = [[part for past in pasts for part in past if part is not None] for pasts in filter(None, self._past)]
        seen.append([sum(part.nbytes for part in parts) for parts in kept])
        return outputs

    monkeypatch.setattr(Continuation, "extend", counted)
    model = open_model(tiny_file(case))
    steer(model, [5, 6, 7], [8, 9], max_tokens=6)
    largest = max(seen, key=sum)
    # The last token is not looked at: as many positions are kept as a plan for one token fewer has.
    needed = work.command_work("steer", model.config, 2, "float32", text=3, max_tokens=5)
    cache = next(step.buffers["cache"] for step in needed.sweeps if step.what == "tokens")
    assert cache == sum(largest) + max(largest)
