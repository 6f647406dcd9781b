"""`ggjac plan`, `ggjac bench`, `--dry-run`, and budgets that refuse."""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import error, invoke, invoke_json

from ggjac import planner
from ggjac.cli import COMMANDS, planning
from ggjac.cli.plan import SEARCHING
from ggjac.cli.plan import plan as plan_command
from ggjac.planner import bench, plan, work

TinyFile = Callable[..., Path]
TOKENS = ["--tokens", "5,17,3,99,42"]


class Rates:
    """Made-up rates in place of a measurement."""

    disk = touch = bus = copy = 1e9
    call = 0.0

    def dequantize(self, type: str) -> float:
        return 1e9

    def gemm(self, columns: int) -> float:
        return 1e11

    def data(self) -> dict[str, float]:
        return {"disk_bytes_per_second": self.disk}

    def lines(self) -> list[str]:
        return ["disk 1 GB/s"]


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Rates:
    found = Rates()
    monkeypatch.setattr(bench, "measure", lambda *_, **__: found)
    return found


def test_the_tables(rates: Rates, tiny_file: TinyFile) -> None:
    out = invoke("plan", "-m", tiny_file("gqa"), *TOKENS, "--ram-budget", "1GiB").stdout
    for words in ("2 layers; ggjac svd, 5 tokens, float32, on the CPU", "dense, ready to multiply", "Fits."):
        assert words in out
    for title in ("\nLayers\n", "Sweeps (the trace reads", "Peak memory", "Time in seconds", "disk 1 GB/s"):
        assert out.count(title) == 1
    assert out.index("Peak memory") < out.index("Fits.") < out.index("Time in seconds")


def test_alike_layers_share_a_row(tiny_file: TinyFile) -> None:
    out = invoke("plan", "-m", tiny_file("gqa", layers=5), *TOKENS, "--no-bench").stdout
    assert "\n0-3 " in out  # the last one works on one position
    assert "\n4 " in out


def test_json_says_what_the_library_says(rates: Rates, tiny_file: TinyFile) -> None:
    path = tiny_file("mixtral")
    data = json.loads(invoke("plan", "-m", path, *TOKENS, "-k", 3, "--ram-budget", "1GiB", "--format", "json").stdout)
    assert data["schema_version"] == 1
    assert (data["tokens"], data["command"], data["dtype"], data["ram_budget"]) == (5, "svd", "float32", 1 << 30)
    assert data["sweeps"][0]["vectors"] == 12
    assert sum(data["ram"].values()) == data["ram_needed"] <= data["ram_peak"] <= 1 << 30
    assert [layer["index"] for layer in data["layers"]] == [0, 1]
    assert data["sweep"]["bytes"] == sum(layer["sweep_bytes"] for layer in data["layers"])
    assert data["fits"] is True
    assert data["misfit"] is None
    assert data["rates"] == rates.data()
    assert data["times"]["total"] == pytest.approx(sum(part["total"] for part in data["times"]["parts"]))
    assert [part["what"] for part in data["times"]["parts"]] == [
        *("trace", "making layers ready", "svd", "decoding", "reconstruction")
    ]


def test_no_bench_measures_nothing(monkeypatch: pytest.MonkeyPatch, tiny_file: TinyFile) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_, **__: pytest.fail("measured"))
    data = json.loads(invoke("plan", "-m", tiny_file("gqa"), *TOKENS, "--no-bench", "--format", "json").stdout)
    assert "times" not in data


@pytest.mark.parametrize("command", work.JOBS)
def test_every_planned_command(command: str, tiny_file: TinyFile) -> None:
    out = invoke("plan", "-m", tiny_file("gqa"), *TOKENS, "--for", command, "--no-bench").stdout
    assert f"ggjac {command}, 5 tokens" in out


BLOCKED = """
import sys
for name in ("torch", "gguf", "llama_cpp", "safetensors"):
    sys.modules[name] = None  # importing it is an error
from ggjac.cli import main
from ggjac.cli import plan as plan_command
main()
"""


@pytest.mark.parametrize(
    "args",
    [["plan", "--no-bench"], *([command, "--dry-run", "--no-bench"] for command in work.JOBS if command != "compare")],
)
def test_the_memory_part_needs_no_torch(args: list[str], tiny_file: TinyFile) -> None:
    command = [sys.executable, "-c", BLOCKED, *args, "--no-bench", "-m", str(tiny_file("gqa")), *TOKENS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Peak memory" in done.stdout


MEASURED = """
import sys
from ggjac.cli import main
from ggjac.planner import machine
main(sys.argv[1:], standalone_mode=False)
print(machine.anonymous_memory(), file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("args", [["contrast"], ["reach", "-k", "1", "--steps", "1", "--max-sweeps", "3"]])
def test_what_more_of_torch_is_loaded_is_counted(args: list[str], tiny_file: TinyFile) -> None:
    given = [*args, "-q", "-m", str(tiny_file("gqa")), *TOKENS, "-t", "1"]
    done = subprocess.run([sys.executable, "-c", MEASURED, *given], capture_output=True, text=True, check=True)
    assert (
        int(done.stderr) <= json.loads(invoke(*given, "--dry-run", "--no-bench", "--format", "json").stdout)["ram_peak"]
    )


def test_a_text_is_counted_in_tokens(tiny_file: TinyFile) -> None:
    path = tiny_file("tokenizer")
    out = invoke("plan", "-m", path, "-p", "the rest", "--no-bench", "--format", "json").stdout
    said = json.loads(invoke("predict", "-m", path, "-p", "the rest", "--format", "json").stdout)
    assert json.loads(out)["tokens"] == len(said["tokens"])


# ---- refusals


def test_a_dry_run_tells_the_time(rates: Rates, tiny_file: TinyFile) -> None:
    model = "-m", tiny_file("gqa"), *TOKENS, "--ram-budget", "1GiB"
    given = "svd", *model, "--per-token", "--dry-run"
    assert "Total: about " in invoke(*given).stdout
    assert "Total: about " not in invoke(*given, "--no-bench").stdout
    made = json.loads(invoke(*given, "--format", "json").stdout)
    planned = "plan", *model, "--format", "json"
    assert json.loads(invoke(*planned, "--per-token").stdout) == made
    everywhere = "attribute", *model, "--position", "all", "--dry-run", "--format", "json"
    found = json.loads(invoke(*planned, "--for", "attribute", "--position", "all").stdout)
    assert found == json.loads(invoke(*everywhere).stdout)
    assert found["sweeps"][-1]["vectors"] > 1
    some = "--position", "0,2"
    fewer = json.loads(invoke(*planned, "--for", "attribute", *some).stdout)
    assert fewer == json.loads(invoke("attribute", *model, *some, "--dry-run", "--format", "json").stdout)
    assert (fewer["sweeps"][-1]["vectors"], fewer["sweeps"][-1]["count"]) == (2, 1)
    assert fewer["times"]["total"] < found["times"]["total"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--for", "layers", "--per-token"], "--per-token is an option of analyze and svd; layers has no such option"),
        (["--position", "all"], "--position all is for attribute; give a position of svd"),
        (["--position", "0,2"], "--position 0,2 is for attribute; give a position of svd"),
        (["--input-position", "0,2"], "--input-position 0,2 needs --per-token"),
        (
            ["--for", "predict", "--search-dtype", "same"],
            "--search-dtype is an option of analyze, svd, layers, ranks; predict has no such option",
        ),
        (["--per-token", "--input-position", "0,7"], "--input-position 0,7: 7 is out of range; the output depends on"),
    ],
)
def test_options_that_the_planned_command_does_not_have(options: list[str], words: str, tiny_file: TinyFile) -> None:
    assert words in error("plan", "-m", tiny_file("gqa"), *TOKENS, "--no-bench", *options, code=2)


def test_the_latency_of_a_network_is_that_of_the_library() -> None:
    assert plan_command.make_context("plan", []).params["latency"] / 1e6 == planner.Network(1.0).latency


def test_long_work_warns_before_it_starts(
    rates: Rates, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = "svd", "-m", tiny_file("gqa"), *TOKENS, "-k", 2, "-q", "-o", tmp_path / "svd.safetensors"
    assert invoke(*given).stderr == ""
    monkeypatch.setattr(planning, "PATIENCE", 1e-9)
    warning = invoke(*given).stderr
    assert warning.startswith("Warning: this will take about ")
    assert warning.endswith("; to shorten it, lower --rank, or use fewer tokens; --dry-run shows its parts\n")
    many = "ranks", "-m", tiny_file("gqa"), *TOKENS, "-q", "-o", tmp_path / "ranks.jsonl"
    assert invoke(*many).stderr.startswith("Warning: this will take about ")
    assert invoke(*many).stderr == "", "all is there already"


def test_short_work_is_not_measured(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_, **__: pytest.fail("measured"))
    assert invoke("svd", "-m", tiny_file("gqa"), *TOKENS, "-k", 2, "-q").stderr == ""


@pytest.mark.parametrize("command", ["plan", *work.JOBS])
def test_a_budget_that_cannot_work_is_refused_before_any_work(
    command: str, tiny_file: TinyFile, tmp_path: Path
) -> None:
    output = [] if command in ("plan", "verify", "compare") else ["-o", tmp_path / "out"]
    output += ["--with", tiny_file("gqa", seed=1)] if command == "compare" else []
    text = error(command, "-m", tiny_file("gqa"), *TOKENS, "--ram-budget", "100MiB", *output)
    assert "of memory (process " in text
    assert "but --ram-budget allows 100.0 MiB" in text
    assert "; give --ram-budget " in text
    assert not (tmp_path / "out").exists()
    # The size that it names is enough.
    enough = text.split("; give --ram-budget ")[1].split()[0]
    asked = ["--for", command] if command in work.JOBS else []
    invoke("plan", "-m", tiny_file("gqa"), *TOKENS, "--ram-budget", enough, "--no-bench", *asked)


@pytest.mark.parametrize("command", work.JOBS)
def test_a_dry_run_refuses_likewise_and_computes_nothing(
    command: str, monkeypatch: pytest.MonkeyPatch, tiny_file: TinyFile, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    other = ["--with", tiny_file("gqa", seed=1)] if command == "compare" else []
    arguments = command, "-m", tiny_file("gqa"), *TOKENS, *other, "--dry-run", "--no-bench"
    assert "Fits." in invoke(*arguments).stdout
    assert f"{command} needs" in error(*arguments, "--ram-budget", "1MiB")
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_in_json_is_data(tiny_file: TinyFile) -> None:
    result = invoke("plan", "-m", tiny_file("gqa"), *TOKENS, "--ram-budget", "1M", "--format", "json", code=4)
    data = json.loads(result.stdout)
    assert data["fits"] is False
    assert "--ram-budget allows 1.0 MiB" in data["misfit"]
    assert "times" not in data


@pytest.mark.parametrize("command", ["plan", "svd"])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--ram-budget", "lots"], "'lots' is not an amount of memory; write it as 2GiB"),
        (["--vram-budget", "0"], "'0' is out of range"),
        (["--position", "5"], "--position 5 is out of range; the prompt has positions 0 to 4"),
        (["--rank", "65"], "--rank 65 is out of range; this model's Jacobian has 64 singular values"),
        (["--tokens", "128"], "token id 128 is out of range; the vocabulary has ids 0 to 127"),
        (["-p", "text"], "both give a prompt"),
        (["--device", "abacus"], "--device: device 'abacus' is unknown"),
    ],
)
def test_usage_errors(command: str, option: list[str], words: str, tiny_file: TinyFile) -> None:
    tokens = [] if option[0] == "--tokens" else TOKENS
    assert words in error(command, "-m", tiny_file("gqa"), *tokens, *option, code=2)
    if command == "plan":
        assert words in error(command, "-m", tiny_file("gqa"), *tokens, *option, "--no-bench", code=2)


def test_a_prompt_longer_than_the_context(tiny_file: TinyFile) -> None:
    ids = ",".join(["1"] * 257)
    text = error("plan", "-m", tiny_file("gqa"), "--tokens", ids, code=2)
    assert "a prompt of 257 tokens cannot run; this model takes from 1 to 256" in text


# ---- budgets at work


def test_what_the_budget_has_room_for_is_read_once(monkeypatch: pytest.MonkeyPatch, tiny_file: TinyFile) -> None:
    """The same digits, and the live weights dequantized in the trace, in one sweep, and then no more."""
    from ggjac import session

    seen = []
    make = session.Session.fit

    def remember(self: session.Session, *given: object, **options: object) -> planner.Plan:
        seen.append(self.model.weights)
        return make(self, *given, **options)

    monkeypatch.setattr(session.Session, "fit", remember)
    arguments = "svd", "-m", tiny_file("gqa", layers=3), *TOKENS, "-k", 2, "--format", "json"
    ample = json.loads(invoke(*arguments, "--ram-budget", "8GiB").stdout)["svd"]
    plan = json.loads(invoke("plan", *arguments[1:], "--no-bench", "--ram-budget", "8GiB").stdout)
    tight = json.loads(invoke(*arguments, "--ram-budget", f"{plan['ram_needed']}").stdout)["svd"]
    assert ample == tight
    reads = [weights.reads["blk.0.ffn_down.weight"] / 64 for weights in seen]
    assert reads[0] == 2
    assert reads[1] >= 1 + ample["sweeps"]


# ---- bench


def test_bench_shows_each_rate_beside_its_limit(monkeypatch: pytest.MonkeyPatch, tiny_file: TinyFile) -> None:
    monkeypatch.setattr(bench, "COPY_ELEMENTS", 1 << 12)
    path = tiny_file("q8_0")
    out = invoke("bench", "-m", path, "-t", 1).stdout
    for words in ("disk, sequential", "memory copy", "dequantize Q8_0 to float32", "dequantize Q8_0 to bfloat16"):
        assert words in out
    data = json.loads(invoke("bench", "-m", path, "-t", 1, "--format", "json").stdout)
    assert {row["unit"] for row in data["rates"]} == {"B/s", "weights/s", "FLOP/s"}
    assert all(row["rate"] > 0 for row in data["rates"])
    limits = {row["limited_by"] for row in data["rates"] if row["limit"] is not None}
    assert limits == {"memory copy", "square matrices"}
    assert 0 < data["memory"]["default_budget"] <= data["memory"]["total"]


def test_what_is_not_planned_does_not_run(monkeypatch: pytest.MonkeyPatch, tiny_file: TinyFile) -> None:
    monkeypatch.delitem(work.JOBS, "norms")
    assert "'norms' is not planned" in error("norms", "-m", tiny_file("gqa"), *TOKENS, code=2)


def test_a_help_states_its_own_defaults() -> None:
    for command in work.JOBS:
        text = " ".join(invoke(command, "--help").stdout.split())
        assert ("My favorite thing is the" in text) == (command == "steer")
        assert ("The bridge out of Marin is the'" in text) == (command != "steer"), command
        assert ("one on each line" in text) == (command == "ranks")
        assert ("--trace" in text) == (command not in ("compare", "predict", "steer"))


def test_dense_rows_come_in_one_sweep_where_memory_allows(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "CHUNK_BYTES", 20_000)
    path = tiny_file("gqa")

    def rows(budget: int) -> tuple[int, int]:
        args = ["plan", "-m", path, *TOKENS, "--for", "jacobian", "--no-bench", "--format", "json"]
        content = json.loads(invoke(*args, "--ram-budget", budget).stdout)
        part = next(part for part in content["sweeps"] if part["what"] == "rows")
        assert content["fits"]
        return part["count"], part["vectors"]

    assert rows(1 << 30) == (1, 64)
    needed = json.loads(
        invoke("plan", "-m", path, *TOKENS, "--for", "attribute", "--no-bench", "--format", "json").stdout
    )["ram_needed"]
    count, vectors = rows(needed + 200_000)
    assert count > 1
    assert vectors < 64


def needed(*args: object) -> int:
    return json.loads(invoke(*args, "--dry-run", "--no-bench", "--format", "json").stdout)["ram_needed"]


def test_of_many_prompts_the_longest_is_refused_before_any_work(
    tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, path = tmp_path / "prompts.txt", tiny_file("tokenizer")
    file.write_text("the\n")
    short = needed("ranks", "-m", path, "-f", file)
    file.write_text(f"the\n{'the ' * 60}\n")
    assert needed("ranks", "-m", path, "-f", file) > short
    shown = invoke("ranks", "-m", path, "-f", file, "--dry-run", "--no-bench").stdout
    assert "ggjac ranks, 2 prompts of up to " in shown
    monkeypatch.delattr("ggjac.model.Model.trace")
    text = error("ranks", "-m", path, "-f", file, "--ram-budget", short, "-o", tmp_path / "out")
    assert text.startswith("Error: ranks needs ")
    assert not (tmp_path / "out").exists()


def test_of_two_files_the_second_is_refused_before_any_work(
    tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It uses another number of experts, and so freezes more."""
    files = tiny_file("mixtral", experts_used=1), tiny_file("mixtral", experts_used=6)
    arguments = "compare", "-m", files[0], "--with", files[1], *TOKENS
    shown = invoke(*arguments, "--dry-run", "--no-bench", "--ram-budget", "1GiB").stdout
    assert shown.count("Fits.") == 2
    first, second = needed(*arguments), needed("compare", "-m", files[1], "--with", files[0], *TOKENS)
    assert first < second
    dry = *arguments, "--dry-run", "--no-bench"
    assert "compare needs" in error(*dry, "--ram-budget", first)
    data = json.loads(invoke(*dry, "--format", "json", "--ram-budget", first, code=4).stdout)
    assert (data["fits"], data["other_model"]["fits"]) == (True, False)
    monkeypatch.delattr("ggjac.model.Model.trace")
    assert "compare needs" in error(*arguments, "--ram-budget", first)


def test_two_files_are_not_in_memory_together(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    from ggjac import session

    models: list[weakref.ref] = []
    fit = session.Session.fit

    def remember(self: session.Session, *given: object, **options: object) -> planner.Plan:
        assert [model() for model in models] == [None] * len(models)
        models.append(weakref.ref(self.model))
        return fit(self, *given, **options)

    monkeypatch.setattr(session.Session, "fit", remember)
    invoke("compare", "-m", tiny_file("gqa"), "--with", tiny_file("gqa", type="Q8_0"), *TOKENS, "-k", 2)
    assert len(models) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layer", "3"], "--layer 3 is out of range; this model has layers 1 to 2"),
        (["--max-tokens", "252"], "a text of 257 tokens cannot run; this model takes at most 256"),
        (["--concept", "a", "--concept-tokens", "1"], "both give a concept"),
    ],
)
def test_steering_that_cannot_be_planned(options: list[str], words: str, tiny_file: TinyFile) -> None:
    assert words in error("steer", "-m", tiny_file("gqa"), *TOKENS, *options, "--dry-run", "--no-bench", code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_here_is_planned_and_not_measured(tiny_file: TinyFile) -> None:
    arguments = ["-m", tiny_file("plain"), *TOKENS, "--device", "cuda"]
    shown = invoke("plan", *arguments).stdout
    assert "Peak device memory" in shown
    assert shown.splitlines()[-1].startswith(
        "Time is not predicted: device cuda was asked for, but torch cannot use it"
    )
    found = json.loads(invoke("plan", *arguments, "--format", "json").stdout)
    assert "it finds no CUDA device" in found["not_measured"]
    assert "times" not in found
    assert "it finds no CUDA device" in error("bench", "-m", tiny_file("plain"), "--device", "cuda", code=1)


@pytest.mark.parametrize("command", ["plan", "bench"])
def test_a_device_that_does_not_exist(command: str, tiny_file: TinyFile) -> None:
    tokens = TOKENS if command == "plan" else []
    assert "try auto, cpu or cuda" in error(command, "-m", tiny_file("plain"), *tokens, "--device", "abacus", code=2)


# ---- several processes that share the model


def test_one_of_several_processes(rates: Rates, tiny_file: TinyFile) -> None:
    """Its part of the work and of the memory, its sums on the network, and the time of one process beside it."""
    asked = ["plan", "-m", tiny_file("gqa"), *TOKENS, "--format", "json"]
    one, two = (json.loads(invoke(*asked, *more).stdout) for more in ([], ["--ranks", 2, "--net", "8Kb"]))
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert two["sweep"]["flop_per_vector"] * 2 == one["sweep"]["flop_per_vector"]
    assert two["ram"]["tapes"] < one["ram"]["tapes"]
    assert one["sweeps"][0]["sums"] == 0
    sweep = two["sweeps"][0]
    assert sweep["sums"] == 2 * 2  # both branches of both blocks
    assert sweep["summed_bytes"] == sweep["vectors"] * (5 + 5 + 5 + 1) * 64 * 4  # of the last network: one position
    svd = next(part for part in two["times"]["parts"] if part["what"] == "svd")
    assert svd["net"] == pytest.approx(sweep["summed_bytes"] / 1000 + 4 * 2 * 50e-6)  # 8 Kb: 1000 bytes a second
    assert svd["each"] > svd["net"]
    assert two["alone"]["times"] == one["times"]
    assert two["alone"]["ram_peak"] == one["ram_peak"]


def test_the_table_of_several_processes(rates: Rates, tiny_file: TinyFile) -> None:
    asked = ["plan", "-m", tiny_file("falcon_h1"), *TOKENS, "--ranks", 2]
    out = invoke(*asked, "--net", "10Gb").stdout
    for words in ("one of 2 processes", "whole by each process: recurrence (in 3 of 3 blocks)", "Beside one process"):
        assert words in out
    assert "add up 6 times, 6.5 KiB for each vector." in out
    assert "the time of that is left out: give the network" in invoke(*asked).stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--net", "10Gb"], "give their number, as --ranks 2"),
        (["--ranks", 2, "--net", "10"], "'10' is not the rate of a network; write it as 10Gb"),
        (["--ranks", 2, "--net", "0Gb"], "is not the rate of a network"),
        (["--ranks", 0], "0 is not in the range"),
    ],
)
def test_wrong_numbers_of_processes(options: list, message: str) -> None:
    assert message in error("plan", *TOKENS, *options, code=2)


@pytest.mark.parametrize(
    ("text", "rate"), [("10Gb", 1.25e9), ("2.5 Gbit/s", 3.125e8), ("100Mbps", 1.25e7), ("900GB/s", 9e11)]
)
def test_rates_of_networks(text: str, rate: float) -> None:
    assert planner.parse_rate(text) == rate


@pytest.mark.parametrize(("gain", "sweeps"), [(4.0, [("svd, rough", 7), ("svd", 3)]), (1.2, [("svd", 8)])])
def test_a_plan_foresees_whether_a_search_is_rough(
    gain: float, sweeps: list[tuple[str, int]], tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command decides by itself, and with the gain in its time; of many prompts it is not."""
    monkeypatch.setattr(plan, "ROUGH_FROM", 1)
    monkeypatch.setattr(bench, "rounding_gain", lambda *_, **__: gain)
    asked = ["-m", tiny_file("plain"), "--tokens", "1,2,3"]
    for command in (["plan", *asked], ["svd", *asked, "--dry-run"]):
        found = invoke_json(*command)
        assert [(step["what"], step["count"]) for step in found["sweeps"]] == [*sweeps, ("reconstruction", 1)]
        assert found["rates"]["rounding"] == (gain if len(sweeps) > 1 else 1.0)
    for command in (["ranks", *asked, "--dry-run"], ["svd", *asked, "--dry-run", "--no-bench"]):
        assert not any(step["rough"] for step in invoke_json(*command)["sweeps"])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_search_is_planned_as_the_command_does_it(command: str, dtype: str, tiny_file: TinyFile) -> None:
    names = {param.name for param in getattr(import_module(f"ggjac.cli.{command}"), command).params}
    assert (command in SEARCHING) == ("search_dtype" in names and command != "plan")
    if command in SEARCHING:
        more = ["-m", tiny_file("gqa"), *TOKENS, "--no-bench", "--ram-budget", "1GiB", "--format", "json"]
        more += ["--search-dtype", dtype]
        layers = ["--layers", "all"] if command == "layers" else []
        planned = json.loads(invoke("plan", "--for", command, *more, "-k", 1).stdout)
        rank = [] if command == "ranks" else ["-k", 1]
        assert planned == json.loads(invoke(command, *more, *layers, *rank, "--dry-run").stdout)


@pytest.mark.parametrize("command", ["svd", "analyze", "plan"])
def test_options_that_do_not_go_together_open_no_model(
    command: str, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ggjac.cli.session.open_model", lambda *_, **__: pytest.fail("it was opened"))
    given = "-m", tiny_file("gqa"), *TOKENS, "--input-position", 0
    assert "Error: --input-position 0 needs --per-token;" in invoke(command, *given, code=2).stderr
