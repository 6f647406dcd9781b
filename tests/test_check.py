"""`ggjac info --check`: the hash of a whole file beside what its store says, and every tensor; exit code 3 if wrong."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers import edited, invoke

from ggjac.gguf import open_gguf
from ggjac.gguf.hub import demo_path

TinyFile = Callable[..., Path]


def checked(path: Path, code: int = 0) -> tuple[dict[str, Any], str]:
    """Return the JSON and the table."""
    data = json.loads(invoke("info", "-m", path, "--check", "--format", "json", code=code).stdout)["check"]
    assert data["passed"] == (code == 0)
    return data, invoke("info", "-m", path, "--check", code=code).stdout


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_name(path: Path) -> str:
    """Return Git's name of a file's content, as gitformat-pack defines it."""
    raw = path.read_bytes()
    return hashlib.sha1(b"blob " + str(len(raw)).encode() + b"\0" + raw).hexdigest()


def test_a_file_of_no_store_has_a_hash(tiny_file: TinyFile) -> None:
    path = tiny_file("gqa")
    data, shown = checked(path)
    assert data == {
        "passed": True,
        "files": [{"path": str(path), "sha256": sha256(path), "expected": None, "same": None}],
        "faults": [],
    }
    assert f"SHA-256 of {path}: {sha256(path)}\n" in shown
    assert "no store on this disk says what it should be" in shown
    assert "Tensors: no NaN, no infinity, no stretches of zeros" in shown
    assert "check" not in json.loads(invoke("info", "-m", path, "--format", "json").stdout)


def in_ollama(folder: Path, path: Path) -> Path:
    """Return a file as Ollama keeps it."""
    target = folder / "blobs" / f"sha256-{sha256(path)}"
    target.parent.mkdir(parents=True)
    return Path(shutil.copy(path, target))


def in_cache(folder: Path, path: Path, name: Callable[[Path], str] = sha256) -> Path:
    """Return a link as Hugging Face's client makes it in its cache."""
    blob, link = folder / "blobs" / name(path), folder / "snapshots" / ("a" * 40) / "Q4" / "model.gguf"
    for part in (blob, link):
        part.parent.mkdir(parents=True)
    shutil.copy(path, blob)
    link.symlink_to(blob)
    return link


def in_folder(folder: Path, path: Path) -> Path:
    """Return a file as `hf download --local-dir` leaves it."""
    target, note = folder / "Q4" / "model.gguf", folder / ".cache/huggingface/download/Q4/model.gguf.metadata"
    for part in (target, note):
        part.parent.mkdir(parents=True)
    note.write_text(f"{'a' * 40}\n{sha256(path)}\n1700000000.0\n")
    return Path(shutil.copy(path, target))


@pytest.mark.parametrize("put", [in_ollama, in_cache, lambda folder, path: in_cache(folder, path, git_name), in_folder])
def test_a_store_says_what_a_file_should_be(
    put: Callable[[Path, Path], Path], tiny_file: TinyFile, tmp_path: Path
) -> None:
    path = put(tmp_path, tiny_file("gqa"))
    data, shown = checked(path)
    assert data["files"][0]["same"] is True
    assert "  as expected: " in shown
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    data, shown = checked(path, code=3)
    assert data["files"][0]["same"] is False
    assert data["files"][0]["expected"]["value"] in shown
    assert "NOT as expected" in shown
    assert "download it again" in shown


def test_every_tensor_is_looked_at(tiny_file: TinyFile, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny_file("gqa"), tmp_path / "model.gguf"))
    with open_gguf(path) as file:
        last = [info for info in file.tensors.values() if len(info.shape) == 2][-1]
    edited(path, last.name, np.inf)
    data, shown = checked(path, code=3)
    assert data["faults"] == [f"{last.name}: row 0 of {last.rows} holds NaN or infinite values"]
    assert data["faults"][0] in shown
    assert "Tensors: NOT as a trained model has them" in shown


def test_holes_are_named(tmp_path: Path) -> None:
    raw = bytearray(demo_path().read_bytes())
    raw[1_000_000:3_000_000] = bytes(2_000_000)
    (tmp_path / "hole.gguf").write_bytes(raw)
    data, shown = checked(tmp_path / "hole.gguf", code=3)
    assert len(data["faults"]) > 20
    assert "blk.0.attn_q.weight: rows 0:256 of 256 are all zero\n" in shown
    assert f"  and {len(data['faults']) - 20} more: --format json\n" in shown
    names = [fault.partition(":")[0] for fault in data["faults"]]
    with open_gguf(tmp_path / "hole.gguf") as file:
        inside = [
            name
            for name, info in file.tensors.items()
            if len(info.shape) == 2 and 1_000_000 <= info.offset and info.offset + info.nbytes <= 3_000_000
        ]
    assert set(inside) <= set(names)


def test_every_shard_has_a_hash(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"blk.{i}.weight", np.full((i + 1, 4), i + 1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted(tmp_path.glob("model-*"))
    data, _ = checked(paths[0])
    assert [(file["path"], file["sha256"]) for file in data["files"]] == [(str(p), sha256(p)) for p in paths]
