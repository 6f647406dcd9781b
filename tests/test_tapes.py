"""Tapes on disk: the same bits as in memory, interrupted or not; what is not theirs is refused by name."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from ggjac.blocks import BlockTape
from ggjac.jacobian import tapes as tapes_module
from ggjac.jacobian.tapes import TapeError, Tapes
from ggjac.model import Trace, open_model
from ggjac.runs import RunError

IDENTITY = {"file": "abc", "ids": [1, 2, 3]}
STRUCTURES = ["three_layers", "biases", "gemma2", "gpt2", "mixtral_biases", "gpt_oss", "qwen2moe", "glm4moe"]
STRUCTURES += ["falcon_h1", "nemotron_h_moe_latent", "gemma4_experts", "gemma4_small", "deepseek4_yarn"]


def tensors(tape: object) -> list[Tensor]:
    """Return every tensor of a tape, in order."""
    if isinstance(tape, Tensor):
        return [tape]
    return [tensor for part in tape for tensor in tensors(part)] if isinstance(tape, tuple) else []


def assert_same(a: BlockTape, b: BlockTape) -> None:
    left, right = tensors(a), tensors(b)
    assert len(left) == len(right) > 3
    for x, y in zip(left, right, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
        assert x.stride() == y.stride()


def traced(path: Path, tapes: Tapes | bool = True, dtype: str = "float32") -> Trace:
    return open_model(path, dtype=dtype).trace([5, 3, 7, 9, 2], tapes=tapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("case", STRUCTURES)
def test_a_tape_from_the_disk_is_the_tape(case: str, dtype: str, tiny_files: dict[str, Path], tmp_path: Path) -> None:
    expected = traced(tiny_files[case], dtype=dtype)
    found = traced(tiny_files[case], Tapes(tmp_path, IDENTITY, resident=False), dtype)
    assert len(found.tapes) == len(expected.tapes) == tiny.options(case).layers
    for ours, theirs in zip(found.tapes, expected.tapes, strict=True):
        assert_same(ours, theirs)
    ours, theirs = ([type(part) for tape in run.tapes for part in tape.ffn.networks] for run in (found, expected))
    assert ours == theirs
    Y = torch.randn(3, len(expected.output), generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.jacobian().rmatmat(Y), expected.jacobian().rmatmat(Y))


def test_a_saved_trace_needs_no_forward(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    expected = traced(tiny_files["three_layers"], Tapes(tmp_path, IDENTITY, resident=False))
    model = open_model(tiny_files["three_layers"])
    again = model.trace([5, 3, 7, 9, 2], tapes=Tapes(tmp_path, IDENTITY))
    assert torch.equal(again.outputs, expected.outputs)
    read = {name.split(".")[1] for name in model.weights.reads if name.startswith("blk.")}
    assert read == {"2"}  # the last block: what it put out was not kept
    assert torch.equal(again.jacobian().to_dense(), expected.jacobian().to_dense())


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("stop", [0, 1, 2])
def test_an_interrupted_trace_goes_on(stop: int, resident: bool, tiny_files: dict[str, Path], tmp_path: Path) -> None:
    expected = traced(tiny_files["three_layers"])
    kept = Tapes(tmp_path, IDENTITY, resident=resident)

    def interrupt(done: int, total: int) -> None:
        if done == stop + 1:
            raise KeyboardInterrupt

    model = open_model(tiny_files["three_layers"])
    with pytest.raises(KeyboardInterrupt):
        model.trace([5, 3, 7, 9, 2], tapes=kept, progress=interrupt)
    kept.save()
    found = traced(tiny_files["three_layers"], Tapes(tmp_path, IDENTITY, resident=resident))
    assert torch.equal(found.outputs, expected.outputs)
    for ours, theirs in zip(found.tapes, expected.tapes, strict=True):
        assert_same(ours, theirs)


def test_resident_tapes_are_written_now_and_then(
    tiny_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Tapes(tmp_path / "a", IDENTITY)
    traced(tiny_files["three_layers"], kept)
    assert not kept.saved  # a quick trace costs nothing
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(tapes_module, "EVERY", 0.0)
    kept = Tapes(tmp_path / "a", IDENTITY)
    traced(tiny_files["three_layers"], kept)
    assert kept.saved
    assert len(list((tmp_path / "a").glob("block-*.safetensors"))) == 3


def test_tapes_are_a_sequence(tiny_files: dict[str, Path]) -> None:
    kept = traced(tiny_files["three_layers"]).tapes
    assert_same(kept[-1], kept[2])
    assert len(list(kept)) == 3
    with pytest.raises(IndexError):
        kept[3]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "another prompt": (lambda folder: change(folder, ids=[1, 2]), r"ids was \[1, 2\], is \[1, 2, 3\]"),
    "another schema": (
        lambda folder: (folder / "trace.json").write_text('{"schema_version": 99, "identity": {}}'),
        "schema version '?99",
    ),
    "no JSON": (lambda folder: (folder / "trace.json").write_text("{"), "trace.json is damaged"),
    "a block cut short": (lambda folder: cut(folder / "block-001.safetensors"), "block-001.safetensors.*damaged"),
    "a block of noise": (lambda folder: (folder / "block-001.safetensors").write_bytes(b"x" * 999), "damaged"),
    "a flipped bit": (lambda folder: flip(folder / "block-001.safetensors"), "damaged"),
}


def change(folder: Path, **identity: object) -> None:
    content = json.loads((folder / "trace.json").read_text())
    content["identity"] |= identity
    (folder / "trace.json").write_text(json.dumps(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_not_this_trace_is_refused(name: str, tiny_files: dict[str, Path], tmp_path: Path) -> None:
    traced(tiny_files["three_layers"], Tapes(tmp_path, IDENTITY, resident=False))
    damage, message = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(TapeError, match=message):
        list(traced(tiny_files["three_layers"], Tapes(tmp_path, IDENTITY, resident=False)).tapes)


def test_tapes_of_an_older_trace_are_not_adopted(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    """Left in a folder whose trace.json is gone, they follow the new ones of a trace that was interrupted there."""
    traced(tiny_files["three_layers"], Tapes(tmp_path, IDENTITY, resident=False))
    (tmp_path / "trace.json").unlink()
    other, model = IDENTITY | {"ids": [5, 3, 7, 9, 4]}, open_model(tiny_files["three_layers"])

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.trace([5, 3, 7, 9, 4], tapes=Tapes(tmp_path, other, resident=False), progress=interrupt)
    with pytest.raises(TapeError, match=r"block-002\.safetensors: belongs to another trace; remove the folder"):
        model.trace([5, 3, 7, 9, 4], tapes=Tapes(tmp_path, other, resident=False))


def test_a_folder_that_cannot_be_made(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be created"):
        traced(tiny_files["three_layers"], Tapes(tmp_path / "file" / "trace", IDENTITY, resident=False))


def test_tapes_need_a_place() -> None:
    with pytest.raises(ValueError, match="kept nowhere"):
        Tapes(resident=False)


def test_what_killed_processes_left_is_deleted(
    tiny_files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {
        "gone": f".block-002.safetensors.{ended.pid}.tmp",
        "gone too": f".trace.json.{ended.pid}.tmp",
        "of a process that runs": f".block-001.safetensors.{os.getppid()}.tmp",
        "of another program": f".notes.{ended.pid}.tmp",
        "not a process": ".block-001.safetensors.99999999999999999999.tmp",
    }
    for name in names.values():
        (tmp_path / name).touch()
    traced(tiny_files["three_layers"], Tapes(tmp_path, IDENTITY, resident=False))
    assert all((tmp_path / name).exists() for name in names.values()), "they may belong to a process elsewhere"
    monkeypatch.setattr(tapes_module, "ABANDONED", -1.0)
    (tmp_path / "block-002.safetensors").unlink()
    traced(tiny_files["three_layers"], Tapes(tmp_path, IDENTITY, resident=False))
    assert {what for what, name in names.items() if not (tmp_path / name).exists()} == {"gone", "gone too"}
