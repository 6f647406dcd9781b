"""What is left on disk: read back by the `safetensors` package and `json`, whole or not there at all."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from ggjac import runs
from ggjac.runs.lines import Lines

RANDOM = np.random.default_rng(0)


def left_in(folder: Path) -> set[str]:
    """Return the names in a folder, hidden ones too."""
    return set(os.listdir(folder))


# -- tensors -----------------------------------------------------------------------------------------------------------


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {
        "f32": RANDOM.standard_normal((3, 4)).astype(np.float32),
        "f64": RANDOM.standard_normal((2, 3, 4)),
        "i64": np.arange(5),
        "i32": np.arange(4, dtype=np.int32),
        "one": np.full(1, 7, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "transposed": RANDOM.standard_normal((4, 3)).T,
        "big_endian": np.arange(3, dtype=">f8"),
    }
    runs.save_tensors(tmp_path / "a.safetensors", arrays)
    back = load_file(tmp_path / "a.safetensors")
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
    assert [back[name].dtype for name in ("f32", "f64", "i64", "i32")] == [np.float32, np.float64, np.int64, np.int64]
    assert left_in(tmp_path) == {"a.safetensors"}


def test_rows_may_come_in_any_order_and_size(tmp_path: Path) -> None:
    whole = RANDOM.standard_normal((10, 3, 2)).astype(np.float32)
    entries = {"other": runs.Entry("I64", (2,)), "rows": runs.Entry("F32", whole.shape)}
    with runs.writing_tensors(tmp_path / "a", entries) as writer:
        for start, stop in ((7, 10), (0, 1), (1, 7)):
            writer.write("rows", whole[start:stop], start)
        writer.write("other", np.array([1, 2]))
    np.testing.assert_array_equal(load_file(tmp_path / "a")["rows"], whole)


@pytest.mark.parametrize(("shape", "start"), [((3, 2), 8), ((3, 3), 0), ((11, 2), 0)])
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, shape: tuple[int, ...], start: int) -> None:
    with (
        pytest.raises(ValueError, match="do not fit"),
        runs.writing_tensors(tmp_path / "a", {"rows": runs.Entry("F32", (10, 2))}) as writer,
    ):
        writer.write("rows", np.zeros(shape, np.float32), start)
    assert left_in(tmp_path) == set()


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    entries = {"a": runs.Entry("F32", (3,)), "b": runs.Entry("F64", (1,)), "c": runs.Entry("I64", (5,))}
    for metadata in ({}, {"x": "é"}, {"xy": ""}):
        with runs.writing_tensors(tmp_path / "a", entries, metadata):
            pass
        content = (tmp_path / "a").read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        assert (8 + length) % 8 == 0
        for name, entry in entries.items():
            start, stop = header[name]["data_offsets"]
            assert start % (4 if entry.dtype == "F32" else 8) == 0
            assert stop - start == entry.nbytes
        assert len(content) == 8 + length + sum(entry.nbytes for entry in entries.values())
        assert {name: array.tolist() for name, array in load_file(tmp_path / "a").items()}["a"] == [0, 0, 0]


def test_metadata_comes_back(tmp_path: Path) -> None:
    metadata = {"ggjac": json.dumps({"prompt": 'é\n"\x1b \udcff'}), "empty": ""}
    runs.save_tensors(tmp_path / "a", {"x": np.zeros(1, np.float32)}, metadata)
    with safe_open(tmp_path / "a", "numpy") as file:
        assert file.metadata() == metadata


# -- whole or not at all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.safetensors"
    runs.save_tensors(path, {"x": np.ones(2, np.float32)})
    before = path.read_bytes()

    def interrupted() -> None:
        with runs.writing_tensors(path, {"x": runs.Entry("F32", (2,))}) as writer:
            writer.write("x", np.zeros(2, np.float32))
            assert path.read_bytes() == before
            raise error

    with pytest.raises((error, runs.RunError)):
        interrupted()
    assert path.read_bytes() == before
    assert left_in(tmp_path) == {"a.safetensors"}


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "target")
    for _ in range(2):  # the target is missing, then there
        runs.save_json(tmp_path / "link", {"a": 1})
        assert (tmp_path / "link").is_symlink()
        assert json.loads((tmp_path / "folder" / "target").read_text()) == {"a": 1}
    assert left_in(tmp_path) | left_in(tmp_path / "folder") == {"folder", "link", "target"}


UNWRITABLE: dict[str, tuple[str, str]] = {
    "missing folder": ("missing/a", "folder does not exist"),
    "below a file": ("file/a", "folder is a file"),
    "a folder": ("folder", "is a folder"),
    "a long name": ("x" * 300, "cannot be written"),
    "a device": ("/dev/null", "not a regular file"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_unwritable_places_are_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    name, words = UNWRITABLE[case]
    attempts = (
        lambda: runs.check_writable(tmp_path / name),
        lambda: runs.save_json(tmp_path / name, {}),
        lambda: runs.save_tensors(tmp_path / name, {}),
    )
    for attempt in attempts:
        with pytest.raises(runs.RunError, match=words) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == {"file", "folder"}
    assert Path("/dev/null").is_char_device()


def test_no_space_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    with (
        pytest.raises(runs.SpaceError, match=r"needs .* B, the disk has .* B free; .* make room"),
        runs.writing_tensors(tmp_path / "a", {"x": runs.Entry("F32", (26,))}),
    ):
        pytest.fail("entered the block")
    with runs.writing_tensors(tmp_path / "a", {"x": runs.Entry("F32", (25,))}):
        pass
    assert left_in(tmp_path) == {"a"}


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for attempt in (lambda: runs.save_json(tmp_path / "a", {}), lambda: runs.save_tensors(tmp_path / "a", {})):
        with pytest.raises(runs.SpaceError, match="the disk is full"):
            attempt()
    assert left_in(tmp_path) == set()


# -- JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_lacks_are_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        runs.save_json(tmp_path / "a.json", {"x": [value]})
    assert left_in(tmp_path) == set()


def test_json_is_readable_and_harmless(tmp_path: Path) -> None:
    readable = "␣Lily ‖J‖ é 😀"
    strings = [readable, "\x1b[31m", "\x9b31m", "\u202e", "\x7f", "\udcff", "\U000e0041", "\u2028", "\\", '"', "\n"]
    runs.save_json(tmp_path / "a.json", {string: string for string in strings})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {string: string for string in strings}
    assert all(character.isprintable() or character == "\n" for character in text)
    assert readable in text


# -- run folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["new", "new/parents/run", "empty", "begun"])
def test_a_run_folder_may_be_new_empty_or_unfinished(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / "checkpoint").mkdir(parents=True)
    runs.check_folder(tmp_path / name, unfinished="checkpoint")
    assert left_in(tmp_path) == {"empty", "begun"}


def test_what_exists_is_no_place_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name, words in {"full": "exists", "file": "exists", "file/run": "is a file"}.items():
        with pytest.raises(runs.RunError, match=words):
            runs.check_folder(tmp_path / name, unfinished="checkpoint")
    assert (tmp_path / "full" / "a").read_text() == (tmp_path / "file").read_text() == "kept"
    assert left_in(tmp_path) == {"full", "file"}


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    kept = {"a.json", ".a.json.tmp", ".b.json.12.tmp", ".hidden", "a.json.12.tmp"}
    for name in {*kept, ".a.json.12.tmp", ".a.json.999.tmp"}:
        (tmp_path / name).touch()
    runs.remove_unfinished(tmp_path / "a.json")
    assert left_in(tmp_path) == kept
    runs.remove_unfinished(tmp_path)
    assert left_in(tmp_path) == kept - {".b.json.12.tmp"}


def test_a_run_loads(tmp_path: Path) -> None:
    content = runs.provenance() | {"x": 1}
    (tmp_path / "run").mkdir()
    runs.save_json(tmp_path / "run" / "run.json", content)
    assert runs.load_run(tmp_path / "run") == content
    assert content["schema_version"] == runs.SCHEMA_VERSION
    assert content["versions"]["ggjac"]
    assert content["created"].endswith("Z")


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "1", "{}", '{"schema_version": 0}', '{"schema_version": "1"}', b"\xff\xfe"]
)
def test_what_is_no_run_is_refused(tmp_path: Path, text: str | bytes | None) -> None:
    if text is not None:
        (tmp_path / "run.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(runs.RunError, match=r"not a run folder|schema version"):
        runs.load_run(tmp_path)


def test_peak_memory_is_in_bytes() -> None:
    peak = runs.peak_memory()
    assert peak is None or 20e6 < peak < 1e12  # Python alone takes some 10 MB


def test_the_digest_of_code_is_that_of_what_computes(tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(Path(runs.__file__).parents[1], package, ignore=shutil.ignore_patterns("*.gguf", "__pycache__"))
    whole = runs.code_digest()
    assert runs.code_digest(package) == whole
    names = {"cli/svd.py": True, "report/sections/new.py": True, "drawing/charts.py": True, "data/x": True}
    names |= {"svd.py": False, "analysis/norms.py": False, "folder/module.py": False, "folder/below/module.py": False}
    for name, same in names.items():
        before = runs.code_digest(package)
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        with open(package / name, "a") as file:
            file.write("#")
        assert (runs.code_digest(package) == before) == same, name
    (package / ".#svd.py").symlink_to("nowhere")  # an editor's lock
    before = runs.code_digest(package)
    (package / "new.py").touch()
    assert runs.code_digest(package) != before


def test_a_disk_that_fills_up_under_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines(tmp_path / "all.jsonl", {}, fields=(), whole=lambda record: None)
    lines.add({"prompt": "a"})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(runs.SpaceError, match=r"all.jsonl: the disk is full; choose another -o, or make room"):
        lines.add({"prompt": "b"})
