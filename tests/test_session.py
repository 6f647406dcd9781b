"""A session of one prompt: planned as the model plans, traced once, resumed to the same bits, and freed when let go."""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import IDS
from torch import Tensor

from ggjac import display, parity
from ggjac import session as module
from ggjac.analysis.svd import spectrum
from ggjac.jacobian import DetachedJacobian, Progress
from ggjac.model import Model, PromptError, open_model
from ggjac.parity import ParityError
from ggjac.planner import plan
from ggjac.runs.journal import JournalError
from ggjac.session import Session, Stages, checkpoint

TinyFile = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tiny_file: TinyFile) -> Model:
    return open_model(tiny_file("three_layers"), threads=1)


@pytest.mark.parametrize(
    ("command", "asked"), [("svd", {"rank": 3}), ("layers", {"rank": 2, "layers": [0, 2]}), ("attribute", {})]
)
@pytest.mark.parametrize("position", [-1, 1])
def test_its_plan_is_the_models(command: str, asked: dict[str, Any], position: int, model: Model) -> None:
    read = model.weights.bytes_read
    session = Session(model, IDS, position=position, mlp_path="gate", ram_budget="1GiB", threads=1)
    expected = model.plan(IDS, command, mlp_path="gate", ram_budget="1GiB", position=session.position, **asked)
    assert session.plan(command, **asked) == expected
    assert expected.fits
    assert model.weights.bytes_read == read, "nothing is computed before it is asked for"
    assert session.work() == (read, 0)


def test_its_words_are_the_models(model: Model, tiny_file: TinyFile) -> None:
    for opened in (model, open_model(tiny_file("tokenizer"))):
        session = Session(opened, IDS)
        assert [session.words(id) for id in IDS] == [opened.word(id) for id in IDS]
        assert session.tokens() == [session.words.here(i) for i in range(len(IDS))]
        assert [display.token(token) for token in session.tokens()] == [opened.word(id) for id in IDS]
        assert session.text is None


@pytest.mark.parametrize(
    ("prompt", "position", "words"),
    [
        (IDS, 5, "position 5 is out of range; the prompt has positions 0 to 4"),
        (IDS, -6, "position -6 is out of range"),
        ([], -1, "the prompt has no tokens"),
        ("", -1, "the prompt is empty"),
        ([1000], -1, "token id 1000 is out of range"),
    ],
)
def test_prompts_that_cannot_be_run_are_refused(prompt: Any, position: int, words: str, model: Model) -> None:
    with pytest.raises(PromptError, match=words):
        Session(model, prompt, position=position)


def test_a_trace_folder_is_used_again(tiny_file: TinyFile, tmp_path: Path) -> None:
    fresh, again = (Session(open_model(tiny_file("three_layers")), IDS, trace=tmp_path / "trace") for _ in range(2))
    expected = fresh.trace.outputs
    assert fresh.model.weights.reads["blk.0.attn_q.weight"]
    assert torch.equal(again.trace.outputs, expected)
    assert torch.equal(again.jacobian.to_dense(), fresh.jacobian.to_dense())
    # No forward pass: of these only the last block is run, whose output is not kept.
    read = {name.split(".")[1] for name in again.model.weights.reads if name.endswith("attn_q.weight")}
    assert read == {"2"}


@pytest.mark.parametrize("first", ["reconstruction", "verify"])
def test_stages_come_one_after_another(first: str, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace is not part of the analysis that needs it first: neither in the seconds nor on the terminal."""

    class Recorded(Stages):
        @contextlib.contextmanager
        def reporting(self, name: str, start: float) -> Iterator[Progress]:
            seen.append(f"{name} begins")
            try:
                with super().reporting(name, start) as report:
                    yield report
            finally:
                seen.append(f"{name} ends")

    def refuse(*given: Any, **options: Any) -> None:
        raise ParityError("llama.cpp is not needed here")

    seen: list[str] = []
    monkeypatch.setattr(parity, "verify", refuse)
    session = Session(open_model(tiny_file("three_layers")), IDS, stages=Recorded())
    with contextlib.suppress(ParityError):
        {"reconstruction": session.reconstruction, "verify": lambda: session.verify(layers=False)}[first]()
    assert seen == ["trace begins", "trace ends", f"{first} begins", f"{first} ends"]
    assert list(session.stages.seconds) == ["trace", first]


def test_it_and_its_model_go_with_the_last_reference(tiny_file: TinyFile, tmp_path: Path) -> None:
    """Without a garbage collection: two models at once may not fit."""
    gc.collect()
    gc.disable()
    try:
        session = Session(open_model(tiny_file("three_layers")), IDS)
        with session.checkpointed(tmp_path / "run.checkpoint", resume=False, output=tmp_path / "run"):
            session.reconstruction()
        assert session.words(session.ids[0])
        gone = [weakref.ref(session), weakref.ref(session.model), weakref.ref(session.jacobian)]
        del session
        assert [this() for this in gone] == [None] * 3
    finally:
        gc.enable()


# ---- an analysis of one's own, interrupted


def powers(jacobian: DetachedJacobian, *, progress: Any, stop: int | None = None) -> Tensor:
    """Return the output after some steps of a power iteration, `[d]`; interrupted before step `stop`."""
    y = torch.ones(jacobian.out_shape, dtype=jacobian.dtype)[None]
    for step in range(4):
        if step == stop:
            raise KeyboardInterrupt
        progress("step", step + 1, 4)
        y = jacobian.matmat(jacobian.rmatmat(y))
        y = y / y.norm()
    return y[0]


def test_an_analysis_of_ones_own_resumes_to_the_same_bits(
    tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    path, output, computed = tiny_file("three_layers"), tmp_path / "powers", list[str]()
    folder = checkpoint(output)

    def attempt(*, resume: bool, own: int = 1, stop: int | None = None) -> tuple[Tensor, int]:
        session = Session(open_model(path), IDS)
        with session.checkpointed(folder, resume=resume, output=output, own=own):
            assert session.remember("settled", lambda: computed.append("once") or {"a": 1}) == {"a": 1}
            return session.run("powers", powers, stop=stop), session.model.weights.bytes_read

    whole, read_by_whole = attempt(resume=False)
    assert not folder.exists()
    computed.clear()
    with pytest.raises(KeyboardInterrupt) as caught:
        attempt(resume=False, stop=3)
    assert caught.value.__notes__ == [f"progress is saved; to continue, run the same command with --resume -o {output}"]
    with pytest.raises(JournalError, match="own: this run was started with 1, now 2"):
        attempt(resume=True, own=2)
    resumed, read = attempt(resume=True)
    assert torch.equal(resumed, whole)
    assert computed == ["once"]
    assert read < read_by_whole / 2, "the trace and three of four steps were computed before"
    assert not folder.exists()
    with pytest.raises(JournalError):
        attempt(resume=True)


def test_a_rough_search_is_chosen_by_measurement_and_once(
    tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains = [2.0, 1.2]
    monkeypatch.setattr(module.bench, "rounding_gain", lambda *_, **__: gains.pop(0))
    path = tiny_file("three_layers")
    session = Session(open_model(path), IDS)
    session.fit("svd", rank=2)
    assert session.search_dtype("auto") is None
    assert len(gains) == 2, "so small a model is not measured"
    monkeypatch.setattr(plan, "ROUGH_FROM", 1)
    assert [session.search_dtype("auto") for _ in range(2)] == [torch.bfloat16, None]
    assert [session.search_dtype(asked) for asked in ("bfloat16", "same")] == [torch.bfloat16, None]
    with pytest.raises(ValueError, match="search_dtype 'half' is unknown; known: auto, same, bfloat16"):
        session.search_dtype("half")
    narrow = Session(open_model(path, dtype="bfloat16"), IDS)
    narrow.fit("svd", rank=2)
    assert [narrow.search_dtype(asked) for asked in ("auto", "bfloat16")] == [None, None]
    # A resumed run goes on as it began, whatever the clock says now.
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    gains = [2.0]
    for resume in (False, True):
        session = Session(open_model(path), IDS)
        session.fit("svd", rank=2)
        with (
            contextlib.nullcontext() if resume else pytest.raises(KeyboardInterrupt),
            session.checkpointed(tmp_path / "run.checkpoint", resume=resume, output=tmp_path / "run", rank=2),
        ):
            assert session.search_dtype("auto") == torch.bfloat16
            if not resume:
                raise KeyboardInterrupt


def test_a_resumed_run_counts_the_sweeps_of_its_first_attempt(tmp_path: Path) -> None:
    seen: list[str] = []

    def watch(what: str, done: int, total: int, rounds: int = 0) -> None:
        seen.append(what.partition(",")[0])
        if stopping and what.startswith("sweep 3"):
            raise KeyboardInterrupt

    for stopping in (True, False):
        seen.clear()
        session = Session(open_model(), IDS, stages=Stages(watch))
        asked = {"resume": not stopping, "output": tmp_path / "run", "rank": 4}
        with (
            pytest.raises(KeyboardInterrupt) if stopping else contextlib.nullcontext(),
            session.checkpointed(tmp_path / "run.checkpoint", **asked),
        ):
            found = session.run("svd", spectrum, rank=4)
    sweeps = list(dict.fromkeys(what for what in seen if what.startswith("sweep ")))
    assert sweeps == [f"sweep {number}" for number in range(3, found.svd.sweeps + 1)]
