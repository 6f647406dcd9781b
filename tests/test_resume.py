"""Commands that are killed, interrupted or run out of disk, and go on with `--resume` to the same bits."""

import functools
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import invoke
from safetensors.numpy import load_file

from ggjac import runs, session
from ggjac.jacobian import SharedSweep
from ggjac.planner import work

if sys.platform == "win32":
    pytest.skip("needs os.fork", allow_module_level=True)

Run = Callable[..., dict[str, Any]]
SOME = ("--per-token", "--input-position", "0,-1", "--exclude", "1")


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Return a function that makes one attempt at a command in a folder; see resume_program.py."""
    command = [sys.executable, str(Path(__file__).with_name("resume_program.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin
        assert server.stdout

        def attempt(folder: Path, *arguments: str, **how: Any) -> dict[str, Any]:
            folder.mkdir(exist_ok=True)
            assert server.stdin
            assert server.stdout
            server.stdin.write(json.dumps({"arguments": arguments, "folder": str(folder), **how}) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield attempt
        server.stdin.close()


@pytest.fixture(scope="module")
def commands(tiny_files: dict[str, Path]) -> dict[str, list[str]]:
    """Return the commands that can be resumed, on a small file, and where each saves."""
    what = ["-m", str(tiny_files["three_layers"]), "--tokens", "5,3,7,9", "-t", "1"]
    return {
        "run": ["analyze", *what, "-k", "2", "--no-verify", "--per-token", "-o", "run"],
        "svd.safetensors": ["svd", *what, "-k", "2", "-o", "svd.safetensors"],
        "some.safetensors": ["svd", *what, "-k", "2", *SOME, "-o", "some.safetensors"],
        "jacobian.safetensors": ["jacobian", *what, "-o", "jacobian.safetensors"],
        "layers.safetensors": ["layers", *what, "-k", "2", "-o", "layers.safetensors"],
    }


def results(folder: Path, output: str) -> dict[str, Any]:
    """Return what a command saved, without what no two runs share; all of its folder must be accounted for."""
    assert {path.name for path in folder.iterdir()} - {"events", "stderr"} == {output}
    if output != "run":
        return load_file(folder / output)
    assert {path.name for path in (folder / output).iterdir()} == {"run.json", "tensors.safetensors", "report.html"}
    content = json.loads((folder / output / "run.json").read_text())
    for key in ("created", "command", "seconds", "peak_memory_bytes"):
        del content[key]
    return {"content": content} | load_file(folder / output / "tensors.safetensors")


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Name what differs between two results, in any bit."""
    parts = [
        key
        for key in a.keys() | b.keys()
        if key != "content" and (key not in a or key not in b or a[key].tobytes() != b[key].tobytes())
    ]
    contents = a.get("content", {}), b.get("content", {})
    return parts + [
        f"content.{key}" for key in contents[0] | contents[1] if contents[0].get(key) != contents[1].get(key)
    ]


class Whole(NamedTuple):
    """An attempt that nothing stopped: its answer and what it saved."""

    answer: dict[str, Any]
    results: dict[str, Any]


@pytest.fixture(scope="module")
def whole(run: Run, commands: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """Return a function that gives the whole run of a command, computed once."""

    @functools.cache
    def get(output: str) -> Whole:
        folder = tmp_path_factory.mktemp("whole")
        answer = run(folder, *commands[output])
        assert answer["code"] == 0, answer["stderr"]
        return Whole(answer, results(folder, output))

    return get


@pytest.mark.parametrize(
    ("output", "kills"),
    [
        ("run", 20),
        ("svd.safetensors", 8),
        ("some.safetensors", 4),
        ("jacobian.safetensors", 6),
        ("layers.safetensors", 8),
    ],
)
def test_kills_cost_nothing_but_time(
    output: str,
    kills: int,
    run: Run,
    commands: dict[str, list[str]],
    whole: Callable[[str], Whole],
    tmp_path: Path,
) -> None:
    command, expected = commands[output], whole(output).results
    events = whole(output).answer["events"]
    assert events > 50
    for end in random.Random(0).sample(range(1, events), kills):
        folder = tmp_path / f"killed-{end}"
        killed = run(folder, *command, end=end)
        assert killed["signal"] == signal.SIGKILL
        resumed = run(folder, *command, "--resume")
        assert resumed["code"] == 0, resumed["stderr"]
        assert not differing(results(folder, output), expected), f"killed at event {end} of {events}"
        shutil.rmtree(folder)


def test_a_run_that_is_killed_again_and_again_comes_to_its_end(
    run: Run, commands: dict[str, list[str]], whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    kills, resume = 0, []
    while (attempt := run(tmp_path / "killed", *commands["run"], *resume, end=30 + kills % 5))["signal"]:
        assert attempt["signal"] == signal.SIGKILL
        kills, resume = kills + 1, ["--resume"]
        assert kills < 100
    assert attempt["code"] == 0, attempt["stderr"]
    assert kills >= 5
    assert not differing(results(tmp_path / "killed", "run"), whole("run").results)


@pytest.mark.parametrize("how", ["interrupt", "full"])
@pytest.mark.parametrize("output", ["run", "svd.safetensors"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_what_was_computed_is_saved(
    share: float,
    output: str,
    how: str,
    run: Run,
    commands: dict[str, list[str]],
    whole: Callable[[str], Whole],
    tmp_path: Path,
) -> None:
    """Ctrl-C exits with 130 and says how to go on; on a full disk the work goes on, and only saving the end fails."""
    events = whole(output).answer["events"]
    stopped = run(tmp_path / "stopped", *commands[output], end=int(share * events), how=how)
    if how == "interrupt":
        assert stopped["code"] == 130
        assert f"--resume -o {output}" in stopped["stderr"]
    else:
        assert stopped["code"] == 4
        assert "the disk is full" in stopped["stderr"]
    assert "Traceback" not in stopped["stderr"]
    assert not (tmp_path / "stopped" / "run" / "run.json").exists()
    resumed = run(tmp_path / "stopped", *commands[output], "--resume")
    assert resumed["code"] == 0, resumed["stderr"]
    assert not differing(results(tmp_path / "stopped", output), whole(output).results)
    assert resumed["events"] < events


@pytest.mark.parametrize("how", ["interrupt", "kill"])
@pytest.mark.parametrize("output", ["run", "svd.safetensors"])
def test_an_interrupted_forward_pass_is_saved(
    output: str,
    how: str,
    run: Run,
    commands: dict[str, list[str]],
    whole: Callable[[str], Whole],
    tmp_path: Path,
) -> None:
    """Its tapes are there, the run is known by name, and it goes on."""
    folder = tmp_path / "stopped"
    stopped = run(folder, *commands[output], end=24, how=how)
    assert len(list(folder.rglob("block-*.safetensors"))) in (1, 2)
    if how == "interrupt":
        assert stopped["code"] == 130
        assert f"--resume -o {output}" in stopped["stderr"]
    anew = run(folder, *commands[output], "--tokens", "5,3,7")
    assert (anew["code"], "contains an unfinished run; continue it with --resume" in anew["stderr"]) == (1, True)
    other = run(folder, *commands[output], "--tokens", "5,3,7", "--resume")
    assert (other["code"], "tokens: this run was started with [5, 3, 7, 9]" in other["stderr"]) == (1, True)
    resumed = run(folder, *commands[output], "--resume")
    assert resumed["code"] == 0, resumed["stderr"]
    assert not differing(results(folder, output), whole(output).results)
    assert resumed["events"] < whole(output).answer["events"]


@pytest.mark.parametrize("output", [[], ["-o", "svd.safetensors"]])
def test_what_an_interrupted_forward_pass_leaves_in_its_folder_is_told(
    output: list[str], run: Run, tiny_files: dict[str, Path], tmp_path: Path
) -> None:
    """With --trace, whether or not there is a file: the same command, without --resume, goes on after those blocks."""
    what = ["-m", str(tiny_files["three_layers"]), "--tokens", "5,3,7,9", "-t", "1", "--trace", "kept"]
    command = ["svd", *what, "-k", "2", *output]
    whole = run(tmp_path / "whole", *command)
    seen = set()
    for end in range(1, 22):  # trace.json and three tapes: each is flushed, a tape renamed, and its folder flushed
        folder = tmp_path / str(end)
        stopped = run(folder, *command, end=end, how="interrupt")
        assert stopped["code"] == 130
        blocks = len(list(folder.glob("kept/block-*.safetensors")))
        seen.add(blocks)
        kept = f"kept keeps the forward pass up to block {blocks} of 3: rerun the same command to continue"
        assert stopped["stderr"].splitlines()[-1] == f"Interrupted; {kept}"
        assert {path.name for path in folder.iterdir()} == {"events", "stderr", "kept"}
        resumed = run(folder, *command)
        assert resumed["code"] == 0, resumed["stderr"]
        # trace.json takes two flushes, for it is linked, not renamed, where there must be none; a tape also a rename.
        assert resumed["events"] == whole["events"] - 4 - 6 * blocks
        if output:
            a, b = (load_file(tmp_path / name / output[1]) for name in ("whole", str(end)))
            assert not differing(a, b)
    assert seen == {1, 2, 3}


def test_a_full_disk_does_not_end_the_forward_pass(
    run: Run, commands: dict[str, list[str]], whole: Callable[[str], Whole], tmp_path: Path
) -> None:
    full = run(tmp_path / "full", *commands["run"], end=24, how="full")
    assert "progress cannot be saved (the disk is full); the run continues and will retry" in full["stderr"]
    assert full["code"] == 4  # at the end, where the results have no place
    assert not list((tmp_path / "full").rglob("block-002.safetensors"))
    resumed = run(tmp_path / "full", *commands["run"], "--resume")
    assert resumed["code"] == 0, resumed["stderr"]
    assert not differing(results(tmp_path / "full", "run"), whole("run").results)


def test_nothing_is_left_of_a_run_that_computed_nothing(
    run: Run, commands: dict[str, list[str]], tmp_path: Path
) -> None:
    for output, command in commands.items():
        failed = run(tmp_path / "failed", *[part.replace("5,3,7,9", "5,3,7,99999") for part in command])
        assert failed["code"] == 2
        assert {path.name for path in (tmp_path / "failed").iterdir()} == {"events", "stderr"}, output


OTHERS: dict[str, tuple[list[str], str]] = {
    "dtype": (["--dtype", "bfloat16"], "dtype: this run was started with 'float32', now 'bfloat16'"),
    "mlp path": (["--mlp-path", "gate"], "mlp-path: this run was started with 'up', now 'gate'"),
    "prompt": (["--tokens", "5,3,7"], "tokens: this run was started with [5, 3, 7, 9], now [5, 3, 7]"),
    "position": (["--position", "1"], "position: this run was started with 3, now 1"),
    "exclude": (["--exclude", "1,-1"], "exclude: this run was started with nothing, now [1, 3]"),
    "rank": (["-k", "3"], "rank: this run was started with 2, now 3"),
    "seed": (["-s", "1"], "seed: this run was started with 0, now 1"),
    "threads": (["-t", "2"], "threads: this run was started with 1, now 2"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_not_resumed(name: str, run: Run, commands: dict[str, list[str]], tmp_path: Path) -> None:
    assert run(tmp_path, *commands["run"], end=60)["signal"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert before
    options, message = OTHERS[name]
    refused = run(tmp_path, *commands["run"], *options, "--resume")
    assert refused["code"] == 1
    assert message in refused["stderr"]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert run(tmp_path, *commands["run"], "--resume")["code"] == 0  # still there


def test_other_code_of_the_same_version_is_not_resumed(
    run: Run, commands: dict[str, list[str]], tmp_path: Path
) -> None:
    assert run(tmp_path, *commands["run"], end=60)["signal"]
    path = tmp_path / "run" / "checkpoint" / "journal.json"
    content = json.loads(path.read_text())
    assert content["identity"]["code"] == runs.code_digest()
    content["identity"]["code"] = "0123456789abcdef"
    path.write_text(json.dumps(content))
    refused = run(tmp_path, *commands["run"], "--resume")
    assert refused["code"] == 1
    assert "code: this run was started with '0123456789abcdef', now" in refused["stderr"]


def test_rows_at_once_are_those_that_the_run_began_with(
    commands: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They follow the memory that is free, which may be another when the run is resumed: that has a name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(work, "CHUNK_BYTES", 20_000)
    whole = SharedSweep._walk

    def interrupted(*args: Any) -> Any:
        yield from itertools.islice(whole(*args), 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SharedSweep, "_walk", interrupted)
        invoke(*commands["jacobian.safetensors"], code=130)
    with monkeypatch.context() as patch:
        patch.setattr(work, "all_rows", lambda *args: 0)  # as if all rows did not fit any more
        err = invoke(*commands["jacobian.safetensors"], "--resume", code=1).stderr
        assert "ram-budget for dense rows: this run was started with" in err
    invoke(*commands["jacobian.safetensors"], "--resume")


def test_a_run_is_not_resumed_with_more_to_compute(run: Run, commands: dict[str, list[str]], tmp_path: Path) -> None:
    without = [part for part in commands["run"] if part != "--per-token"]
    assert run(tmp_path, *without, end=60)["signal"]
    refused = run(tmp_path, *commands["run"], "--resume")
    assert refused["code"] == 1
    assert "per_token: this run was started with nothing, now True" in refused["stderr"]
    assert run(tmp_path, *without, "--resume")["code"] == 0


def test_maps_of_other_positions_are_not_resumed(run: Run, commands: dict[str, list[str]], tmp_path: Path) -> None:
    assert run(tmp_path, *commands["some.safetensors"], end=60)["signal"]
    refused = run(tmp_path, *commands["some.safetensors"], "--input-position", "0", "--resume")
    assert refused["code"] == 1
    assert "input-position: this run was started with '0,-1', now '0'" in refused["stderr"]


def test_a_file_that_was_replaced_is_not_resumed(
    run: Run, commands: dict[str, list[str]], tiny_files: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    shutil.copy(tiny_files["three_layers"], file)
    command = [str(file) if part == str(tiny_files["three_layers"]) else part for part in commands["run"]]
    assert run(tmp_path, *command, end=60)["signal"]
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    replaced = run(tmp_path, *command, "--resume")
    assert replaced["code"] == 1
    assert "model: this run was started with" in replaced["stderr"]
    file.write_bytes(content[:-5000])
    cut = run(tmp_path, *command, "--resume")
    assert cut["code"] == 1
    assert len(cut["stderr"].strip().splitlines()) == 1


def test_what_is_damaged_is_not_to_be_resumed(run: Run, commands: dict[str, list[str]], tmp_path: Path) -> None:
    assert run(tmp_path, *commands["run"], end=60)["signal"]
    found = list(tmp_path.rglob("*.safetensors"))
    for path in found:
        path.write_bytes(b"x")
    refused = run(tmp_path, *commands["run"], "--resume")
    assert (refused["code"], "is damaged" in refused["stderr"]) == (1, True)
    assert "--resume" not in refused["stderr"]  # it would fail again
    assert all(path.exists() for path in found)  # nor is anything taken away


def test_what_cannot_be_resumed_says_so(run: Run, commands: dict[str, list[str]], tmp_path: Path) -> None:
    nothing = run(tmp_path, *commands["run"], "--resume")
    assert nothing["code"] == 1
    assert "there is no run to resume" in nothing["stderr"]
    assert {path.name for path in tmp_path.iterdir()} == {"events", "stderr"}
    nowhere = run(tmp_path, *commands["run"][:-2], "--resume")
    assert nowhere["code"] == 2
    assert "needs the -o of the interrupted run" in nowhere["stderr"]
    assert run(tmp_path, *commands["run"], end=60)["signal"]
    again = run(tmp_path, *commands["run"])
    assert again["code"] == 1
    assert "--resume" in again["stderr"]
    assert run(tmp_path, *commands["run"], "--resume")["code"] == 0
    finished = run(tmp_path, *commands["run"], "--resume")
    assert finished["code"] == 0
    assert finished["events"] == 0
    assert run(tmp_path, *commands["run"])["code"] == 1


def test_a_kept_trace_serves_other_commands(run: Run, commands: dict[str, list[str]], tmp_path: Path) -> None:
    kept = ["--trace", "kept"]
    first = run(tmp_path, *commands["svd.safetensors"], *kept)
    assert first["code"] == 0, first["stderr"]
    before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert set(before) == {"trace.json", *(f"block-00{i}.safetensors" for i in range(3))}
    second = run(tmp_path, *commands["jacobian.safetensors"], *kept)
    assert second["code"] == 0, second["stderr"]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    run(tmp_path / "without", *commands["jacobian.safetensors"])
    found = [load_file(folder / "jacobian.safetensors") for folder in (tmp_path, tmp_path / "without")]
    assert not differing(*found)
    other = run(tmp_path, *commands["svd.safetensors"], *kept, "--tokens", "5,3,7", "-o", "other")
    assert other["code"] == 1
    assert "tokens was [5, 3, 7, 9], is [5, 3, 7]" in other["stderr"]
    assert not list(tmp_path.glob("other*"))


def test_resuming_a_finished_file_gives_the_message_that_it_is_there(tiny_file: Any, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    command = ["svd", "-m", tiny_file("gqa"), "--tokens", "1,2,3", "-k", 1, "-o", out]
    assert "there is no run to resume" in invoke(*command, "--resume", code=1).stderr
    invoke(*command)
    saved = out.read_bytes()
    expected = f"Error: {out} is there already, and no unfinished run of it: leave out --resume to compute it anew"
    assert invoke(*command, "--resume", code=1).stderr.startswith(expected)
    assert out.read_bytes() == saved
