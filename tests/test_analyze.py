"""The run of the library beside that of the command: the same folder, resumed to the same bits, refused alike."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import IDS, TOKENS, invoke, invoke_json
from safetensors.torch import load_file

import ggjac
from ggjac import planner, runs, session
from ggjac.analysis.analyze import CHECKPOINT, run_folder
from ggjac.model import PromptError
from ggjac.results import Words
from ggjac.runs.journal import JournalError

TinyFile = Callable[..., Path]
OPTIONS: dict[str, Any] = {"rank": 2, "verify": False, "per_token": True, "contrast": True, "layers": [0, 2]}
ARGUMENTS = ["-k", "2", "--no-verify", "--per-token", "--contrast", "--layers", "0,2"]
# What says when and how long, and not what.
APART = {"created", "command", "seconds", "peak_memory_bytes", "threads"}


def content(folder: Path) -> dict[str, Any]:
    return {key: value for key, value in json.loads((folder / "run.json").read_text()).items() if key not in APART}


def assert_same_run(a: Path, b: Path) -> None:
    assert content(a) == content(b)
    x, y = (load_file(folder / "tensors.safetensors") for folder in (a, b))
    assert x.keys() == y.keys()
    assert all(torch.equal(x[name], y[name]) for name in x)
    assert {path.name for path in a.iterdir()} == {path.name for path in b.iterdir()}


def test_the_library_writes_what_the_command_writes(tiny_file: TinyFile, tmp_path: Path) -> None:
    model, threads = tiny_file("gqa"), torch.get_num_threads()
    model_of_it = ggjac.open_model(model, threads=threads)
    folder = ggjac.analyze(model_of_it, IDS, tmp_path / "library", exclude=[0, 2], **OPTIONS)
    assert folder == tmp_path / "library"
    arguments = ["analyze", "-m", str(model), "--tokens", ",".join(map(str, IDS)), "-t", str(threads), "-q"]
    invoke(*arguments, *ARGUMENTS, "--exclude", "0,2", "-o", tmp_path / "command")
    assert_same_run(folder, tmp_path / "command")
    assert "Singular vectors" in (folder / "report.html").read_text(encoding="utf-8")
    found = json.loads((folder / "run.json").read_text())
    assert found["command"] == []
    assert found["exclude"] == [0, 2]
    assert [one["position"] for one in found["svd"]["per_token"]] == [1, 3, 4]
    assert [one["position"] for one in found["attribution"]["excluded"]] == [0, 2]


def test_an_interrupted_run_ends_with_the_same_bits(
    tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "CHECKPOINT_SECONDS", 0.0)
    path, folder = tiny_file("gqa"), tmp_path / "run"

    def interrupt(what: str, done: int, total: int, rounds: int = 0) -> None:
        if what.startswith("sweep 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        ggjac.analyze(path, IDS, folder, progress=interrupt, **OPTIONS)
    assert "progress is saved" in caught.value.__notes__[0]
    assert not (folder / "run.json").exists()
    with pytest.raises(JournalError, match=r"rank.*2.*3|2, now 3"):
        ggjac.analyze(path, IDS, folder, resume=True, **OPTIONS | {"rank": 3})
    steps: dict[str, list[str]] = {"resumed": [], "whole": []}
    ggjac.analyze(path, IDS, folder, resume=True, progress=lambda what, *_: steps["resumed"].append(what), **OPTIONS)
    assert not (folder / CHECKPOINT).exists()
    whole = ggjac.analyze(
        path, IDS, tmp_path / "whole", progress=lambda what, *_: steps["whole"].append(what), **OPTIONS
    )
    assert_same_run(folder, whole)
    # The trace, the reconstruction and three sweeps, of two blocks each, were not computed again.
    assert len(steps["resumed"]) <= len(steps["whole"]) - 2 * 5
    # A finished one is left as it is.
    before = (folder / "run.json").read_bytes()
    assert ggjac.analyze(path, IDS, folder, resume=True, **OPTIONS) == folder
    others: list[dict[str, Any]] = [{"rank": 3}, {"seed": 1}, {"position": 1}, {"layers": None}, {"layers": [0]}]
    others += [{"exclude": [0]}]
    others += [{"per_token": False}, {"input_position": [0]}, {"contrast": False}, {"search_dtype": "same"}]
    for other in (*others, {"verify": True}, {"top": 3}, {"hide_special": True}, {"max_sweeps": 50}):
        with pytest.raises(JournalError, match=f"is finished, with {next(iter(other))} .*, now"):
            ggjac.analyze(path, IDS, folder, resume=True, **OPTIONS | other)
    with pytest.raises(JournalError, match=r"is finished, with tokens \["):
        ggjac.analyze(path, IDS[::-1], folder, resume=True, **OPTIONS)
    assert (folder / "run.json").read_bytes() == before
    old = json.loads(before)  # of a version that did not record what was asked
    del old["asked"]
    (folder / "run.json").write_text(json.dumps(old))
    assert ggjac.analyze(path, IDS, folder, resume=True, **OPTIONS | {"layers": None}) == folder
    with pytest.raises(JournalError, match="is finished, with rank 2, now 3"):
        ggjac.analyze(path, IDS, folder, resume=True, **OPTIONS | {"rank": 3})


def test_refusals_come_before_any_work(tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_file("gqa")
    monkeypatch.setattr(ggjac.model.Model, "trace", lambda *_, **__: pytest.fail("traced"))
    with pytest.raises(planner.NoFitError, match=r"but --ram-budget allows 100\.0 MiB"):
        ggjac.analyze(path, IDS, tmp_path / "run", ram_budget="100MiB")
    with pytest.raises(PromptError, match="position 5 is out of range"):
        ggjac.analyze(path, IDS, tmp_path / "run", position=5)
    with pytest.raises(planner.PlanError, match="rank=65 is out of range"):
        ggjac.analyze(path, IDS, tmp_path / "run", rank=65)
    for wrong in ({"top": 0}, {"tol": torch.inf}, {"tol": torch.nan}, {"max_sweeps": 1}, {"seed": -1}, {"seed": 2**64}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} .* is out of range"):
            ggjac.analyze(path, IDS, tmp_path / "run", **wrong)  # type: ignore[arg-type]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(runs.RunError, match="exists; choose another name"):
        ggjac.analyze(path, IDS, tmp_path / "there")
    with pytest.raises(JournalError):
        ggjac.analyze(path, IDS, tmp_path / "run", resume=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"]


def test_layers_and_positions_may_be_ranges(tiny_file: TinyFile, tmp_path: Path) -> None:
    path = tiny_file("gqa")
    several = (range(2), [0, 1])
    first, second = (
        ggjac.analyze(path, IDS, tmp_path / str(i), **OPTIONS | {"layers": given, "input_position": given})
        for i, given in enumerate(several)
    )
    assert_same_run(first, second)


def test_folders_are_named_by_model_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with run_folder(None, "demo") as first:
        assert first.is_dir(), "no other process can choose it"
        assert first.parent == Path("ggjac-runs")
        assert first.name.startswith("demo-20")
        monkeypatch.setattr("ggjac.analysis.analyze.time.strftime", lambda _: first.name.removeprefix("demo-"))
        with run_folder(None, "demo") as second, run_folder(None, "demo") as third:
            assert [second.name, third.name] == [f"{first.name}-1", f"{first.name}-2"]
    with run_folder(Path("own"), "demo") as given:
        assert given == Path("own")
        assert not given.exists()


def test_a_new_folder_in_which_nothing_is_left_goes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt), run_folder(None, "demo"):
        raise KeyboardInterrupt
    assert not Path("ggjac-runs").exists()
    with contextlib.suppress(KeyboardInterrupt), run_folder(None, "demo") as folder:
        (folder / "checkpoint").mkdir()
        raise KeyboardInterrupt
    assert (folder / "checkpoint").exists()
    with pytest.raises(KeyboardInterrupt), run_folder(None, "demo") as other:
        raise KeyboardInterrupt
    assert folder.exists()
    assert not other.exists()
    for path in ("elsewhere/ggjac-runs", "file/ggjac-runs"):
        Path(path).parent.mkdir()
        monkeypatch.chdir(Path(path).parent)
        Path("ggjac-runs").touch()
        with pytest.raises(runs.RunError, match=r"ggjac-runs: is a file, but new run folders go there"):
            run_folder(None, "demo").__enter__()
        monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("full", ["tensors.safetensors", "run.json", "report.html"])
def test_a_disk_that_is_full_at_the_end_leaves_a_whole_run_or_none(
    full: str, tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = tiny_file("gqa"), tmp_path / "run"
    check = runs.files.check_writable

    def checked(name: Path, needed: int = 0) -> None:
        if Path(name).name == full:
            raise runs.SpaceError(f"{name}: the disk is full")
        check(name, needed)

    with monkeypatch.context() as patch:
        patch.setattr(runs.files, "check_writable", checked)
        with pytest.raises(runs.SpaceError, match="the disk is full") as caught:
            ggjac.analyze(path, IDS, folder, **OPTIONS)
    if full == "report.html":
        assert caught.value.__notes__ == [
            f"run.json and tensors.safetensors are saved; `ggjac report {folder}` writes the page"
        ]
        assert {entry.name for entry in folder.iterdir()} == {"run.json", "tensors.safetensors"}
        invoke("report", folder)
    else:
        assert not folder.exists()
        ggjac.analyze(path, IDS, folder, **OPTIONS)
    assert_same_run(folder, ggjac.analyze(path, IDS, tmp_path / "whole", **OPTIONS))


def test_another_process_may_have_finished_meanwhile(
    tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = tiny_file("gqa"), tmp_path / "run"
    true = session.Session.checkpointed

    def slow(*arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(session.Session, "checkpointed", true)
            ggjac.analyze(path, IDS, folder, **OPTIONS)
        monkeypatch.setattr(session.Session, "checkpointed", true)
        return true(*arguments, **options)

    monkeypatch.setattr(session.Session, "checkpointed", slow)
    with pytest.raises(runs.RunError, match="another process has finished a run there; choose another name with -o"):
        ggjac.analyze(path, IDS, folder, **OPTIONS)
    assert_same_run(folder, ggjac.analyze(path, IDS, tmp_path / "whole", **OPTIONS))


def test_data_without_words_has_ids(tiny_file: TinyFile) -> None:
    """What JSON prints, and the same where the texts are not known."""
    model = ggjac.open_model(tiny_file("gqa"))
    trace = model.trace(IDS)
    J = trace.jacobian()
    found = ggjac.attribute(J, 3, 4)
    named, bare = found.data(Words(trace)), found.data()
    assert named["target"] == {"id": 3, "text": "[3]"}
    assert bare["target"] == {"id": 3}
    assert [share["text"] for share in named["shares"]] == [f"[{id}]" for id in IDS]
    assert [share["share"] for share in bare["shares"]] == found.shares.tolist()
    assert json.loads(json.dumps(bare)) == bare
    assert bare["softcap"] is None, "no cap is null in JSON, as for every position and branch"
    assert ggjac.attribute_positions(J, 3).data()[0]["softcap"] is None
    capped = ggjac.open_model(tiny_file("gemma2"))
    assert ggjac.attribute(capped.trace(IDS).jacobian()).data()["softcap"] == capped.head.softcap > 0
    assert ggjac.predict(trace, 2).data()[0]["id"] == int(trace.logits.argmax())


def test_a_finished_run_is_shown_as_it_was_asked_for(tiny_file: TinyFile, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    given = "analyze", "-q", "-m", tiny_file("gqa"), *TOKENS, "-k", 2, "--no-verify", "--max-sweeps", 2, "-o", folder
    first = invoke_json(*given, code=3)
    assert first["svd"]["stopped_by"] == "sweeps"
    assert invoke_json(*given, "--resume", code=3) == first
    assert "is finished" in invoke(*given, "--resume", code=3).stdout
    refused = invoke(*given, "--per-token", "--input-position", "0", "--resume", code=1).stderr
    assert "is finished, with per_token False, now True; give the same values, or choose another output" in refused
