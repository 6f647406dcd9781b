"""A forward pass or a checkpoint of other weights is never used again; a file that changes in use ends the run."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import IDS
from safetensors.torch import load_file

import ggjac
from ggjac import session as module
from ggjac.analysis.branches import attribute_branches
from ggjac.gguf import ChangedError, container, open_gguf
from ggjac.jacobian.tapes import TapeError
from ggjac.model import open_model
from ggjac.runs import origin
from ggjac.runs.journal import JournalError
from ggjac.session import Session

TinyFile = Callable[..., Path]


@pytest.fixture
def model(tiny_file: TinyFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of a model of which the fingerprint covers only samples, as of real ones."""
    monkeypatch.setattr(container, "FINGERPRINT_BLOCK_BYTES", 16)
    path = tmp_path / "model.gguf"
    shutil.copy(tiny_file("three_layers"), path)
    assert not open_gguf(path).fingerprint_is_whole
    return path


def edit(path: Path, tensor: str = "blk.1.attn_q.weight") -> None:
    """Set a tensor to zero in place; size, header and fingerprint stay the same."""
    with open_gguf(path) as file:
        info, before = file.tensors[tensor], file.fingerprint()
    with open(path, "r+b") as file:
        # Between the first sample in the tensor and the next: no sample changes.
        file.seek(info.offset + 64)
        file.write(bytes(64))
    with open_gguf(path) as file:
        assert file.fingerprint() == before


def traced(path: Path, folder: Path) -> torch.Tensor:
    session = Session(open_model(path), IDS, trace=folder)
    return session.jacobian.to_dense()


def test_a_trace_of_edited_weights_is_refused(model: Path, tmp_path: Path) -> None:
    before = traced(model, tmp_path / "trace")
    assert torch.equal(traced(model, tmp_path / "trace"), before)
    edit(model)
    with pytest.raises(TapeError, match="holds other weights now"):
        traced(model, tmp_path / "trace")
    assert not torch.equal(traced(model, tmp_path / "another"), before)


@pytest.mark.parametrize("change", ["copied", "renamed", "touched"])
def test_a_trace_of_the_same_content_is_used_wherever_the_file_is(change: str, model: Path, tmp_path: Path) -> None:
    before = traced(model, tmp_path / "trace")
    other = tmp_path / "elsewhere.gguf"
    if change == "copied":
        shutil.copyfile(model, other)
        model.unlink()
    elif change == "renamed":
        model.rename(other)
    else:
        os.utime(model)
        other = model
    session = Session(open_model(other), IDS, trace=tmp_path / "trace")
    assert torch.equal(session.jacobian.to_dense(), before)
    assert {name.split(".")[1] for name in session.model.weights.reads if name.endswith("attn_q.weight")} == {"2"}


def test_where_content_was_not_hashed_only_the_untouched_file_will_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "QUICKLY_HASHED", 0)
    monkeypatch.setattr(origin, "BYTES_PER_SECOND", 1e-9)
    before = traced(model, tmp_path / "trace")
    assert torch.equal(traced(model, tmp_path / "trace"), before)
    os.utime(model, ns=(1, 1))
    with pytest.raises(TapeError, match=r"written or replaced since \(mtime_ns \d+, now 1\), and its content was not"):
        traced(model, tmp_path / "trace")


def test_what_does_not_say_where_it_came_from_is_refused(model: Path, tmp_path: Path) -> None:
    traced(model, tmp_path / "trace")
    for old, new in (('"model": {', '"mode": {'), ('"inode"', '"node"'), ('"files": [', '"files": [1, ')):
        shutil.copytree(tmp_path / "trace", tmp_path / "changed")
        path = tmp_path / "changed" / "trace.json"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        if "inode" in old:  # hashes decide
            traced(model, tmp_path / "changed")
        else:
            with pytest.raises(TapeError, match="does not say from which model file"):
                traced(model, tmp_path / "changed")
        shutil.rmtree(tmp_path / "changed")


def interrupted(model: Path, output: Path, **options: Any) -> None:
    def interrupt(what: str, done: int, total: int, rounds: int = 0) -> None:
        if what.startswith("sweep 4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ggjac.analyze(model, IDS, output, rank=2, verify=False, progress=interrupt, **options)


def test_a_checkpoint_of_edited_weights_is_refused(model: Path, tmp_path: Path) -> None:
    interrupted(model, tmp_path / "run")
    edit(model)
    with pytest.raises(JournalError, match=r"cannot be resumed: the model file holds other weights now \(its SHA-256"):
        ggjac.analyze(model, IDS, tmp_path / "run", rank=2, verify=False, resume=True)


def test_a_run_is_resumed_after_its_model_was_moved(model: Path, tmp_path: Path) -> None:
    interrupted(model, tmp_path / "run")
    whole = ggjac.analyze(model, IDS, tmp_path / "whole", rank=2, verify=False)
    (tmp_path / "disk").mkdir()
    other = tmp_path / "disk" / "other.gguf"
    shutil.copyfile(model, other)
    model.unlink()
    resumed = ggjac.analyze(other, IDS, tmp_path / "run", rank=2, verify=False, resume=True)
    a, b = (load_file(folder / "tensors.safetensors") for folder in (whole, resumed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    # A finished run is one of a content, too.
    assert ggjac.analyze(other, IDS, tmp_path / "run", rank=2, verify=False, resume=True) == resumed
    edit(other)
    with pytest.raises(JournalError, match="is finished, with model "):
        ggjac.analyze(other, IDS, tmp_path / "run", rank=2, verify=False, resume=True)


# -- while a run goes on -----------------------------------------------------------------------------------------------


def overwrite(path: Path) -> None:
    content = path.read_bytes()
    with open(path, "r+b") as file:
        file.write(content)


def replace(path: Path) -> None:
    new = path.with_name("new.gguf")
    shutil.copyfile(path, new)
    new.replace(path)


def truncate(path: Path) -> None:
    os.truncate(path, os.path.getsize(path) - 100)


CHANGES = {
    "overwrite": (overwrite, "another program has written to it"),
    "replace": (replace, "another file has taken its place"),
    "truncate": (truncate, r"it had \d+ bytes, and has \d+|truncated to"),
    "edit": (edit, "another program has written to it"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["block", "sweep 3", "at the end"])
def test_a_file_that_changes_ends_the_run_before_anything_is_saved(
    change: str, when: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    act, words = CHANGES[change]
    output = tmp_path / "run"
    saved: list[set[Path]] = []

    def at(what: str, done: int, total: int, rounds: int = 0) -> None:
        if what.startswith(when) and not saved:
            saved.append(set(output.rglob("product-*")))
            act(model)

    def branches(*arguments: Any, **options: Any) -> Any:
        found = attribute_branches(*arguments, **options)
        at("at the end", 1, 1)
        return found

    monkeypatch.setattr("ggjac.analysis.analyze.attribute_branches", branches)
    with pytest.raises(ChangedError, match=rf"^{model}: .*({words})"):
        ggjac.analyze(model, IDS, output, rank=2, verify=False, progress=at)
    (then,) = saved
    assert set(output.rglob("product-*")) == then, "nothing was added"
    assert not (output / "run.json").exists()
    assert not (output / "tensors.safetensors").exists()


def test_the_library_notices_it_too(model: Path) -> None:
    opened = open_model(model)
    J = opened.trace(IDS).jacobian()
    J.svd(rank=1)
    overwrite(model)
    for compute in (lambda: J.svd(rank=1), lambda: opened.trace(IDS)):
        with pytest.raises(ChangedError, match="changed while in use"):
            compute()


def test_a_file_that_is_moved_or_deleted_is_whole_in_the_map(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    opened = open_model(model.name)
    before = opened.trace(IDS).logits
    monkeypatch.chdir("/")
    assert torch.equal(opened.trace(IDS).logits, before)
    model.unlink()
    assert torch.equal(opened.trace(IDS).logits, before)


def test_another_process_may_begin_another_trace_at_the_same_time(model: Path, tmp_path: Path) -> None:
    a, b, c = (Session(open_model(model), ids, trace=tmp_path / "trace") for ids in (IDS, IDS[::-1], IDS))
    tapes = [session._tapes for session in (a, b, c)]  # which have all looked into the folder
    assert not any(len(each) for each in tapes if not isinstance(each, bool))
    before = a.trace.outputs
    with pytest.raises(TapeError, match=r"contains another trace \(tokens was"):
        _ = b.trace
    assert torch.equal(c.trace.outputs, before), "the same trace twice is one trace"
    assert torch.equal(traced(model, tmp_path / "trace"), a.jacobian.to_dense())
