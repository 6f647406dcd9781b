"""Many prompts: the same file, bit for bit, whoever computes it, also where workers die; and shards as one file."""

import importlib.util
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import invoke, invoke_json

import ggjac
from ggjac import runs
from ggjac.model import PromptError
from ggjac.planner import plan
from ggjac.runs import lock
from ggjac.studies import Measure, shard_name, workers
from ggjac.studies.measures import KINDS
from ggjac.studies.study import RESTARTS

PROMPTS = [[1 + i % 7, 2 + i, 3][: 2 + i % 2] for i in range(16)]
LINES = ["The capital of France is", "The color of snow is", "The bridge out of Marin is the"]


@pytest.fixture
def asked(tiny_file: Any) -> Measure:
    return ggjac.measure(ggjac.open_model(tiny_file("gqa"), threads=1), "ranks", seed=3)


@pytest.fixture
def expected(asked: Measure, tmp_path: Path) -> bytes:
    """Return the file that a loop in this process writes."""
    path = tmp_path / "expected.jsonl"
    ggjac.study(PROMPTS, asked, lines=path)
    return path.read_bytes()


class Reversed(Executor):
    """Finishes tasks in the reverse order, in another thread."""

    def __init__(self) -> None:
        self.tasks: list[tuple[Future, Callable[[], Any]]] = []

    def submit(self, function: Callable, /, *args: Any, **options: Any) -> Future:
        future: Future = Future()
        self.tasks.append((future, lambda: function(*args, **options)))
        if len(self.tasks) == len(PROMPTS):
            threading.Thread(target=self.work).start()
        return future

    def work(self) -> None:
        for future, task in reversed(self.tasks):
            future.set_result(task())
            time.sleep(0.002)


def test_the_order_in_which_prompts_are_ready_leaves_no_trace(asked: Measure, expected: bytes, tmp_path: Path) -> None:
    path, orders = tmp_path / "ranks.jsonl", list[bytes]()

    def progress(what: str, done: int, total: int) -> None:
        orders.append(path.read_bytes().splitlines()[0])
        assert (what, done, total) == ("prompt", len(orders), 16)

    ggjac.study(PROMPTS, asked, Reversed(), path, progress=progress)
    assert orders[0] == expected.splitlines()[-1]
    assert path.read_bytes() == expected


def test_any_executor_will_do(asked: Measure, expected: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ranks.jsonl"
    with ThreadPoolExecutor(3) as pool:
        found = ggjac.study(PROMPTS, asked, pool, path)
    assert path.read_bytes() == expected
    assert found.records == [json.loads(line) for line in expected.splitlines()]
    assert len(found.table().columns["prompt"]) == len(PROMPTS)
    again = ggjac.study(PROMPTS[::-1], asked, lines=path)
    assert again.ready == len(PROMPTS)
    renewed = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [record.pop("study") for record in renewed] == [{"index": i, "prompts": 16} for i in range(16)]
    before = [json.loads(line) for line in reversed(expected.splitlines())]
    assert [record.pop("study")["index"] for record in before] == list(range(15, -1, -1))
    assert renewed == before


def test_killed_workers_and_interrupts_leave_no_trace(
    asked: Measure, expected: bytes, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """First Ctrl-C, which ends the workers at once; then a worker is killed, and the pool made again."""
    path, made = tmp_path / "ranks.jsonl", list[int]()

    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        ggjac.study(PROMPTS, asked, lambda: workers.processes(1), path, progress=interrupt)
    assert not multiprocessing.active_children()
    assert "the same command continues" in caught.value.__notes__[0]
    assert len(path.read_bytes().splitlines()) == 1

    @contextmanager
    def pool() -> Iterator[Executor]:
        made.append(1)
        with workers.processes(2) as executor:
            yield executor

    def kill(what: str, done: int, total: int) -> None:
        if len(made) == 1 and done >= 2:
            made.append(0)
            os.kill(int(multiprocessing.active_children()[0].pid or 0), signal.SIGKILL)

    ggjac.study(PROMPTS, asked, pool, path, progress=kill)
    assert made == [1, 0, 1]
    assert "Traceback" not in capfd.readouterr().err
    assert path.read_bytes() == expected
    assert not multiprocessing.active_children()


def cluster(package: str) -> Any:
    reason = f"pip install 'ggjac[{package}]' to test it"
    name = {"dask": "distributed"}.get(package, package)
    return [getattr(pytest.mark, package), pytest.mark.skipif(not importlib.util.find_spec(name), reason=reason)]


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("engine", [pytest.param(name, marks=cluster(name)) for name in ("dask", "ray")])
def test_clusters_write_the_same_file(engine: str, asked: Measure, expected: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ranks.jsonl"
    if engine == "ray":
        ggjac.study(PROMPTS, asked, lambda: workers.ray(None, 1), path)
    else:
        from distributed import LocalCluster

        with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as local:
            ggjac.study(PROMPTS, asked, lambda: workers.dask(local.scheduler_address), path)
    assert path.read_bytes() == expected


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("dask:tcp://localhost:1", "distributed")])
def test_a_missing_engine_is_named(engine: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    err = invoke("ranks", "-t", 1, "--tokens", "1,2", "--workers", engine, code=1).stderr
    assert f"needs the package {package}: pip install 'ggjac[{engine.partition(':')[0]}]'" in err


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("ray", "Ray does not start on this machine (timed out during startup); try again when it is less busy"),
        ("ray:10.0.0.1:6379", "no Ray cluster at 10.0.0.1:6379 (timed out during startup); ray start --head"),
    ],
)
def test_a_cluster_that_does_not_start_is_an_error_of_one_line(
    engine: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*args: Any, **options: Any) -> None:
        raise Exception("timed out during startup\nand more")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    assert message in invoke("ranks", "-t", 1, "--tokens", "1,2", "--workers", engine, code=1).stderr


class Broken(Executor):
    """Dies with every task from the second on."""

    def __init__(self) -> None:
        self.tasks = 0

    def submit(self, function: Callable, /, *args: Any, **options: Any) -> Future:
        future: Future = Future()
        self.tasks += 1
        if self.tasks > 1 and args[1] == PROMPTS[0]:
            future.set_exception(BrokenExecutor("a process died"))
        else:
            future.set_result(function(*args, **options))
        return future


def test_a_pool_is_made_again_a_few_times(asked: Measure, tmp_path: Path) -> None:
    """Where one prompt ends every worker, all others are done, and the message says how to go on."""
    path, made = tmp_path / "ranks.jsonl", list[Broken]()

    @contextmanager
    def pool() -> Iterator[Executor]:
        made.append(Broken())
        made[-1].tasks = 1
        yield made[-1]

    with pytest.raises(runs.RunError, match=r"a worker was ended .*finished prompts are kept; run it again"):
        ggjac.study(PROMPTS[:4], asked, pool, path)
    assert RESTARTS < len(made) <= RESTARTS + 4
    ended = Broken()
    ended.tasks = 1
    with pytest.raises(runs.RunError, match="run it again"):
        ggjac.study(PROMPTS[:4], asked, ended, path)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_prompt_that_cannot_run_is_quoted_and_others_kept(pooled: bool, asked: Measure, tmp_path: Path) -> None:
    path = tmp_path / "ranks.jsonl"
    with ThreadPoolExecutor(1) as pool, pytest.raises(PromptError, match=r"\[1, 99999\]: .*99999"):
        ggjac.study([[1, 2], [1, 99999], [3]], asked, pool if pooled else None, path)
    assert json.loads(path.read_bytes().splitlines()[0])["tokens"][1]["id"] == 2


@pytest.mark.parametrize("case", ["gqa", "olmoe", "qwen3next_old"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ranks", {"seed": 1}),
        ("svd", {"rank": 2, "per_token": True}),
        ("layers", {"rank": 1}),
        ("attribute", {"ablate": "mean"}),
        ("attribute", {"by": "head"}),
        ("answer", {"max_tokens": 2}),
        ("projection", {"along": "entropy"}),
        ("predict", {}),
    ],
)
def test_prompts_side_by_side_have_the_records_of_each_alone_for_less_reading(
    case: str, name: str, options: dict[str, Any], tiny_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "WORTH", 0.0)
    monkeypatch.setattr(plan, "READING", 0.0)

    def computed() -> tuple[list[dict[str, Any]], int]:
        model = ggjac.open_model(tiny_file(case), threads=1)
        found = ggjac.study(PROMPTS[:4], ggjac.measure(model, name, **options))
        return found.records, model.weights.bytes_read

    together, read = computed()
    monkeypatch.setattr(plan, "PROMPTS_AT_ONCE", 1)
    alone, more = computed()
    assert together == alone
    assert read < 0.75 * more


def test_an_error_that_cannot_travel_arrives_as_text(asked: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int):
            super().__init__("odd words")

    def odd(*args: Any) -> Any:
        raise Odd(1, 2)

    monkeypatch.setattr(Measure, "opened", lambda self, prompt: odd() if prompt == [2] else original(self, prompt))
    with ThreadPoolExecutor(1) as pool, pytest.raises(runs.RunError, match="Odd: odd words"):
        ggjac.study([[1], [2]], asked, pool)


original = Measure.opened


def test_a_measure_travels_as_plain_data(asked: Measure, tiny_file: Any) -> None:
    """Without the model: the worker opens the file, once, and refuses another one at its place."""
    sent = pickle.dumps(replace(asked, session={"stages": object(), "mlp_path": "gate"}))
    assert len(sent) < 1000
    there, twice = pickle.loads(sent), pickle.loads(sent)
    assert dict(there.session) == {"mlp_path": "gate"}
    assert there.opened([1]).model is twice.opened([2]).model is not asked.model
    assert there([1, 2]) == replace(asked, session={"mlp_path": "gate"})([1, 2])
    assert there([1, 2])["settings"]["seed"] == 3
    assert ggjac.study([[1, 2]], there).records[0]["settings"]["mlp-path"] == "gate"
    other = replace(there, model=there.model._replace(path=str(tiny_file("plain"))))
    with pytest.raises(runs.RunError, match="on a worker this is another file"):
        other([1, 2])


@pytest.mark.parametrize("several", [(0, 1), range(2), np.arange(2), [np.int64(0), 1]], ids=str)
@pytest.mark.parametrize(
    ("name", "option", "more"),
    [
        ("attribute", "positions", {}),
        ("svd", "input_position", {"rank": 2, "per_token": True}),
        ("layers", "layers", {"rank": 2, "maps": ("to_end",), "kinds": ("layer",)}),
    ],
)
def test_sequences_of_any_type_make_one_file(
    name: str, option: str, more: dict[str, Any], several: Any, asked: Measure, tmp_path: Path
) -> None:
    path = tmp_path / "lines.jsonl"
    found = [
        ggjac.study([[1, 2]], ggjac.measure(asked.model, name, **{option: given}, **more), lines=path)  # type: ignore[arg-type]
        for given in ([0, 1], several, several)
    ]
    assert [one.ready for one in found] == [0, 1, 1]


@pytest.mark.parametrize(("name", "options", "error"), [("nonsense", {}, ValueError), ("svd", {"nope": 1}, TypeError)])
def test_a_question_that_there_is_not(name: str, options: dict[str, Any], error: type, asked: Measure) -> None:
    with pytest.raises(error, match=r"nonsense|nope"):
        ggjac.measure(asked.model, name, **options)  # type: ignore[arg-type]


# ---- the commands


ASKED = {
    "svd": ["-k", 2, "--top", 2, "--per-token"],
    "attribute": ["--target", " the", "--position", "all", "--by", "layer"],
    "attribute some": ["--position", "0,-2--1"],
    "svd some": ["-k", 2, "--top", 2, "--per-token", "--input-position", "1,-1", "--exclude", "0"],
    "layers": ["-k", 2, "--top", 1, "--layers", "0,2,-1", "--kinds", "layer,mlp"],
    "predict": ["--position", -2],
    "verify": [],
}


@pytest.mark.parametrize("name", ASKED)
def test_each_line_has_what_the_command_says_of_one_prompt(name: str, tmp_path: Path) -> None:
    command = name.split()[0]
    file, out = tmp_path / "prompts.txt", tmp_path / "all.jsonl"
    file.write_text("\n".join([*LINES[:2], "", LINES[0]]))
    shown = invoke(command, "-t", 1, *ASKED[name], "-f", file, "--each-line", "-o", out).stdout
    assert "2 prompts, all checks passed" in shown
    records = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert [record["prompt"] for record in records] == LINES[:2]
    alone = invoke_json(command, "-t", 1, *ASKED[name], "-p", LINES[0])
    for part in (*KINDS[command].parts, "tokens", "warnings"):
        assert records[0][part] == alone[part]
    shown = invoke(command, "-t", 1, *ASKED[name], "-f", file, "--each-line", "-o", out).stdout
    assert "2 of 2 prompts were already in" in shown
    found = json.loads(
        invoke(command, "-t", 1, *ASKED[name], "-f", file, "--each-line", "--format", "json", "-o", out).stdout
    )
    assert found["prompts"] == records
    if command == "svd":
        spectra = np.array([[t["singular_value"] for t in record["svd"]["triplets"]] for record in records])
        rows = found["by_index"]
        assert np.allclose([row["mean"] for row in rows], spectra.mean(0), rtol=1e-15)
        assert np.allclose([row["error"] for row in rows], spectra.std(0, ddof=1) / 2**0.5, rtol=1e-12)
        assert [(row["least"], row["most"]) for row in rows] == list(zip(spectra.min(0), spectra.max(0), strict=True))
        assert f" {spectra.mean(0)[0]:.4g} " in shown
    if command == "layers":
        rows, taps = found["by_depth"], [record["layers"]["taps"] for record in records]
        assert [(row["map"], row["kind"], row["index"]) for row in rows] == [
            (tap["map"], tap["kind"], tap["index"]) for tap in taps[0]
        ]
        for i, row in enumerate(rows):
            ranks = [each[i]["stable_rank"]["value"] for each in taps]
            assert np.isclose(row["stable_rank"]["mean"], np.mean(ranks), rtol=1e-15)
            spectra = np.array([[t["singular_value"] for t in each[i]["triplets"]] for each in taps])
            assert np.allclose([one["mean"] for one in row["singular_values"]], spectra.mean(0), rtol=1e-15)
            error = spectra.std(0, ddof=1) / 2**0.5
            assert np.allclose([one["error"] for one in row["singular_values"]], error, rtol=1e-12)
        assert f" {rows[-1]['singular_values'][0]['mean']:.4g} " in shown
        assert "by_index" not in found
    assert "tokens" not in found


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["attribute", "--position", "0,6"], "--position 0,6: 6 is out of range; the prompt has positions 0 to 5"),
        (["predict", "--position", "6"], "position 6 is out of range; the prompt has positions 0 to 5"),
        (
            ["svd", "-k", 1, "--per-token", "--input-position", "6"],
            "--input-position 6 is out of range; the output ",
        ),
        (["svd", "-k", 1, "--exclude", "6"], "--exclude 6 is out of range; the output depends on positions 0 to 5"),
        (["svd", "-k", 1, "--exclude", "0-5"], "--exclude 0-5 leaves the map no input: the output depends on"),
    ],
)
def test_a_prompt_that_lacks_a_position_is_named(args: list[Any], message: str, tmp_path: Path) -> None:
    """Before anything is computed. The first one has it, which is the longest, by which all are planned."""
    file, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    file.write_text(f"{LINES[0]} and again\n\n{LINES[0]}")
    assert (
        f"line 3 ({LINES[0]}): {message}" in invoke(*args, "-t", 1, "-f", file, "--each-line", "-o", out, code=2).stderr
    )
    file.write_text(f"{LINES[0]} and\\x20again\n{LINES[0]} and\\n{LINES[0]}")
    ended = invoke(*args, "-t", 1, "-e", "-f", file, "--each-line", "-o", out, code=2)
    assert ended.stderr.startswith("Error: line 2 (")
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "option", "first", "second", "other"),
    [
        ("attribute", "--position", "-3,-1", "-1,-3", "-3--1"),
        ("attribute", "--position", "0,0,1", "0-1", "0"),
        ("svd", "--input-position", "1,0", "0,1", "0-2"),
        ("layers", "--layers", "-1,1,0", "0-1,-1", "0-1"),
        ("svd", "--exclude", "1,0", "0-1", "0"),
    ],
)
def test_another_way_to_write_the_same_continues(
    command: str, option: str, first: str, second: str, other: str, tmp_path: Path
) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    more = {"svd": ["--per-token", "-k", 1], "layers": ["-k", 1, "--kinds", "layer"]}.get(command, [])
    args = [command, *more, "-t", 1, "-f", file, "--each-line", "-o", out]
    file.write_text(LINES[0])
    invoke(*args, option, first)
    done = out.read_bytes()
    assert "1 of 1 prompts were already in" in invoke(*args, option, second).stdout
    assert out.read_bytes() == done
    assert "was made with" in invoke(*args, option, other, code=1).stderr


def test_shards_and_means_are_refused_as_the_whole_is(tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text(f"{LINES[0]} and again\n{LINES[0]}\n{LINES[1]} and again")
    for args in (
        ["predict", "--each-line", "--shard", "0/2"],
        ["jacobian", "--mean"],
        ["predict", "--each-line", "--workers", 2],
    ):
        ended = invoke(*args, "--position", 6, "-t", 1, "-f", file, "-o", out, code=2)
        assert ended.stderr.startswith(f"Error: line 2 ({LINES[0]}): position 6 is out of range")
    assert list(tmp_path.iterdir()) == [file]


def test_sweeps_that_ran_out_end_a_command_with_3_and_more_are_another_attempt(tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "svd.jsonl"
    file.write_text("\n".join(LINES[:2]))
    args = ["svd", "-t", 1, "-k", 1, "--top", 1, "--tol", "1e-6", "-f", file, "--each-line", "-o", out]
    assert "2 of 2 prompts FAILED a check" in invoke(*args, "--max-sweeps", 2, code=3).stdout
    assert "already" not in invoke(*args, "--max-sweeps", 60).stdout
    assert len(out.read_bytes().splitlines()) == 2


def test_a_plan_is_one_of_all_prompts_or_of_a_shard(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(LINES))
    plan = ["svd", "-f", file, "--each-line", "--dry-run", "--no-bench"]
    assert "ggjac svd, 3 prompts of up to 8 tokens" in invoke(*plan).stdout
    assert "ggjac svd, 2 prompts of up to 8 tokens" in invoke(*plan, "--shard", "0/2").stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["svd", "--workers", 2], "--workers needs many prompts; add --each-line"),
        (["svd", "--shard", "0/2"], "--shard needs many prompts; add --each-line"),
        (["ranks", "--shard", "0/2"], "--shard needs -o"),
        (["ranks", "--shard", "2/2"], "of 64, the first is 0/64 and the last 63/64"),
        (["ranks", "--shard", "1/2", "-o", "OUT"], "--shard 1/2 has no prompt: there are 1"),
        (["ranks", "--workers", "0"], "is neither a number nor a cluster"),
        (["ranks", "--workers", "dask"], "is neither a number nor a cluster"),
        (["svd", "--each-line"], "name it with -o, or take --format json"),
        (["svd", "--each-line", "-o", "OUT", "--resume"], "--resume is not for --each-line"),
        (["svd", "--each-line", "-o", "OUT", "--trace", "T"], "--trace is not for --each-line"),
        (["svd", "--each-line", "-o", "OUT", "--format", "csv"], "--format csv is for one prompt"),
        (["predict", "--each-line", "-o", "OUT", "--all-positions"], "--all-positions is not for --each-line"),
        (
            ["attribute", "--each-line", "-o", "OUT", "--mlp-path", "both"],
            "--mlp-path both takes two forward passes of one prompt: this does not go with --each-line",
        ),
        (["verify", "-o", "OUT"], "-o is for --each-line"),
    ],
)
def test_what_does_not_go_together_is_refused(args: list[Any], message: str, tmp_path: Path) -> None:
    args = [tmp_path / "out" if arg == "OUT" else arg for arg in args]
    assert message in invoke(*args, "-t", 1, "--tokens", "1,2", code=2).stderr
    assert not list(tmp_path.iterdir())


# ---- shards


@pytest.fixture
def shards(asked: Measure, tmp_path: Path) -> list[Path]:
    """Return the files of three shards of the first eight prompts."""
    paths = [shard_name(tmp_path / "ranks.jsonl", i, 3) for i in range(3)]
    for i, path in enumerate(paths):
        ggjac.study(PROMPTS[:8], asked, lines=path, shard=(i, 3))
    return paths


def test_shards_make_up_the_same_file(shards: list[Path], asked: Measure, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "all.jsonl"
    ggjac.study(PROMPTS[:8], asked, lines=whole)
    assert [path.name for path in shards] == [f"ranks-0{i}-of-3.jsonl" for i in range(3)]
    assert "8 prompts of 3 files" in invoke("merge", *reversed(shards), "-o", out).stdout
    assert out.read_bytes() == whole.read_bytes()
    assert len(ggjac.merge([*shards, out], tmp_path / "again.jsonl", PROMPTS[:8])) == 8
    assert (tmp_path / "again.jsonl").read_bytes() == whole.read_bytes()
    ggjac.merge(shards, out, PROMPTS[7::-1])  # of another order
    ggjac.study(PROMPTS[7::-1], asked, lines=whole)
    assert out.read_bytes() == whole.read_bytes()


def test_more_prompts_number_the_lines_anew(asked: Measure, expected: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ranks.jsonl"
    ggjac.study(PROMPTS[:15], asked, lines=path)
    assert json.loads(path.read_bytes().splitlines()[3])["study"] == {"index": 3, "prompts": 15}
    assert ggjac.study(PROMPTS, asked, lines=path).ready == 15
    assert path.read_bytes() == expected


def test_the_commands_shards_are_those_of_the_whole(tmp_path: Path) -> None:
    file, whole, out = tmp_path / "prompts.txt", tmp_path / "whole.jsonl", tmp_path / "predict.jsonl"
    file.write_text("\n".join([*LINES, LINES[0]]))
    args = ["predict", "-t", 1, "-f", file, "--each-line", "-o"]
    invoke(*args, whole)
    for i in range(2):
        assert f"predict-0{i}-of-2.jsonl" in invoke(*args, out, "--shard", f"{i}/2").stdout
    first, second = tmp_path / "predict-00-of-2.jsonl", tmp_path / "predict-01-of-2.jsonl"
    invoke("merge", first, second, "-o", out, "-f", file)
    assert out.read_bytes() == whole.read_bytes()
    err = invoke("merge", first, "-o", out, "-f", file, code=1).stderr
    assert f"1 of 3 prompts are missing ({LINES[1]}); run their shards again" in err


def test_what_is_missing_or_foreign_is_named(shards: list[Path], asked: Measure, tmp_path: Path) -> None:
    out = tmp_path / "all.jsonl"

    def refusal(*files: Path) -> str:
        before = [path.read_bytes() for path in files]
        err = invoke("merge", *files, "-o", out, code=1).stderr
        assert not out.exists()
        assert [path.read_bytes() for path in files] == before
        return err

    assert (
        "5 of 8 prompts are missing (numbers 0, 2, 3, ..., from 0); run their shards again: --shard 0/3, 2/3\n"
        in refusal(shards[1])
    )
    assert "was given twice" in refusal(*shards, shards[0])
    with pytest.raises(runs.RunError, match=r"1 of 7 prompts are not of this study \(.*; give its -f"):
        ggjac.merge(shards, out, PROMPTS[:7])
    whole, last = shards[0].read_bytes(), shards[2].read_bytes()
    cut = b"".join(whole.splitlines(keepends=True)[:-1]) + whole[:50]  # killed in a line
    shards[0].write_bytes(cut)
    assert "1 of 8 prompts are missing (numbers 6, from 0); run their shards again: --shard 0/3\n" in refusal(*shards)
    shards[2].write_bytes(last.splitlines(keepends=True)[0])  # two that were interrupted alike
    assert "2 of 8 prompts are missing (numbers 5, 6, from 0); run their shards again: --shard 0/3, 2/3" in refusal(
        *shards
    )
    other = shards[2].rename(tmp_path / "other.jsonl")
    assert "run their shards again\n" in refusal(*shards[:2], other)
    shards[2].write_bytes(last)
    shards[0].write_bytes(whole + b"my notes\n")
    assert "ranks-00-of-3.jsonl: line 4 is not a result of this command" in refusal(*shards)
    shards[0].write_bytes(b"")
    assert "3 of 8 prompts are missing (numbers 0, 3, 6, from 0); run their shards again: --shard 0/3" in refusal(
        *shards
    )
    assert "the files have no records" in refusal(shards[0])
    ggjac.study(PROMPTS[:8:3], replace(asked, options={**asked.options, "seed": 4}), lines=shards[0])
    assert "ranks-01-of-3.jsonl: --seed: line 1 was made with 3, those of" in refusal(*shards)
    shards[0].unlink()
    ggjac.study(PROMPTS[:8:3], ggjac.measure(asked.model, "predict"), lines=shards[0])  # type: ignore[arg-type]
    err = refusal(*shards)
    assert "ranks-01-of-3.jsonl: line 1 is not a result of this command; merge the files of one study" in err
    assert "is one of the files" in invoke("merge", shards[1], "-o", shards[1], code=1).stderr


def test_records_of_two_studies_are_told_apart(shards: list[Path], asked: Measure, tmp_path: Path) -> None:
    """By the size of their study, and by the prompt that has a number in it; a record needs a number."""
    out, other = tmp_path / "all.jsonl", tmp_path / "other.jsonl"
    ggjac.study(PROMPTS[:9], asked, lines=other, shard=(0, 3))
    err = invoke("merge", *shards[1:], other, "-o", out, code=1).stderr
    assert "other.jsonl: is of a study of 9 prompts, " in err
    assert "ranks-01-of-3.jsonl of one of 8; give all prompts with -f" in err
    other.unlink()
    ggjac.study([PROMPTS[9], *PROMPTS[1:8]], asked, lines=other, shard=(0, 3))
    err = invoke("merge", *shards, other, "-o", out, code=1).stderr
    assert "other.jsonl: prompt 0 is [3, 11, 3], that of " in err
    line = shards[0].read_text()
    for study in ('{"index": 8, "prompts": 8}', '{"index": "0", "prompts": 8}', '{"index": -1, "prompts": 8}', "0"):
        shards[0].write_text(line.replace('{"index": 0, "prompts": 8}', study))
        err = invoke("merge", *shards, "-o", out, code=1).stderr
        assert "ranks-00-of-3.jsonl: line 1 is not a result of this command" in err
    assert not out.exists()


def test_a_file_that_is_being_written_is_not_merged(shards: list[Path], tmp_path: Path) -> None:
    with lock.alone(shards[1]):
        err = invoke("merge", *shards, "-o", tmp_path / "all.jsonl", code=1).stderr
    assert f"another ggjac process (pid {os.getpid()}) is working in {shards[1]}; wait for it" in err
    shards[1].with_name(f"{shards[1].name}.lock").touch()  # of a process that was killed
    assert len(ggjac.merge(shards, tmp_path / "all.jsonl")) == 8


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0), (3, 4)])
def test_a_shard_without_prompts_is_refused(shard: tuple[int, int], asked: Measure) -> None:
    with pytest.raises(PromptError, match="has no prompt: there are 3; take"):
        ggjac.study(PROMPTS[:3], asked, shard=shard)


def test_parquet_has_a_row_for_each_prompt(shards: list[Path], tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow", reason="pip install 'ggjac[notebook]' to test it")
    records = ggjac.merge(shards, tmp_path / "all.parquet")
    frame = pandas.read_parquet(tmp_path / "all.parquet")
    assert [joint["value"] for joint in frame["joint"]] == [record["joint"]["value"] for record in records]


def test_parquet_says_what_it_needs(shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    err = invoke("merge", *shards, "-o", tmp_path / "all.parquet", code=1).stderr
    assert "Parquet needs the package pyarrow: pip install 'ggjac[notebook]'" in err
    assert not (tmp_path / "all.parquet").exists()
