"""The container reader against the `gguf` package (writer and reader), and against files that are wrong on purpose."""

import errno
import gc
import hashlib
import itertools
import mmap
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import gguf_files as made
import numpy as np
import pytest
from gguf_files import ARRAY, BOOL, FLOAT32, INT32, STRING, UINT8, UINT16, UINT32, Tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggjac.gguf import ChangedError, GGUFError, GGUFFile, LazyArray, TensorInfo, container, open_gguf, types
from ggjac.gguf.hub import demo_path

ValueType = gguf.GGUFValueType
EIGHT = np.arange(8, dtype="<f4").tobytes()  # the data of a default Tensor


def plain(value: Any) -> Any:
    """Return a metadata value with every array as a list."""
    return [plain(element) for element in value] if isinstance(value, LazyArray) else value


def touch_everything(path: Path) -> None:
    """Open a file and read all there is to read."""
    with open_gguf(path) as file:
        for value in file.metadata.values():
            plain(value)
        for info in file.tensors.values():
            file.rows(info).sum()
            file.will_need(info)
        file.fingerprint()


def refusal(path: Path) -> str:
    """Return the message with which a file is refused."""
    with pytest.raises(GGUFError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert message.isprintable()
    assert path.parent.name in message or not path.name.isprintable()
    return message


# --- What is right is read as the gguf package reads it ---


def assert_reads_as_the_oracle(path: Path) -> None:
    oracle = gguf.GGUFReader(path)
    with open_gguf(path) as file:
        fields = {name: field.contents() for name, field in oracle.fields.items() if not name.startswith("GGUF.")}
        assert {key: plain(value) for key, value in file.metadata.items()} == fields
        assert list(file.metadata) == list(fields)
        assert (file.version, file.alignment) == (oracle.fields["GGUF.version"].contents(), oracle.alignment)
        assert (file.path, file.paths, file.nbytes) == (path, [path], path.stat().st_size)

        assert list(file.tensors) == [tensor.name for tensor in oracle.tensors]
        for tensor in oracle.tensors:
            info = file.tensors[tensor.name]
            assert info.name == tensor.name
            assert info.shape == tuple(int(size) for size in reversed(tensor.shape))
            assert (info.type.id, info.type.name) == (tensor.tensor_type, tensor.tensor_type.name)
            assert (info.offset, info.nbytes, info.elements) == (
                tensor.data_offset,
                tensor.n_bytes,
                tensor.n_elements,
            )
            rows = file.rows(info)
            assert rows.shape == (info.rows, info.row_bytes)
            assert rows.tobytes() == tensor.data.tobytes()


def write(path: Path, add: Any, **options: Any) -> Path:
    """Write with the gguf package; `add(writer)` fills it."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_value_type(tmp_path: Path) -> None:
    scalars: dict[Any, list[Any]] = {
        ValueType.UINT8: [0, 255],
        ValueType.INT8: [-128, 127],
        ValueType.UINT16: [0, 65535],
        ValueType.INT16: [-32768, 32767],
        ValueType.UINT32: [0, 2**32 - 1],
        ValueType.INT32: [-(2**31), 2**31 - 1],
        ValueType.FLOAT32: [-0.1, float("inf")],
        ValueType.BOOL: [True, False],
        ValueType.STRING: ["", "Ġ naïve 🦙\n\0"],
        ValueType.UINT64: [0, 2**64 - 1],
        ValueType.INT64: [-(2**63), 2**63 - 1],
        ValueType.FLOAT64: [-0.1, 5e-324],
    }

    def add(writer: gguf.GGUFWriter) -> None:
        for kind, values in scalars.items():
            for i, value in enumerate(values):
                writer.add_key_value(f"scalar.{kind.name}.{i}", value, kind)
            writer.add_key_value(f"array.{kind.name}", values, ValueType.ARRAY, sub_type=kind)

    path = write(tmp_path / "values.gguf", add)
    assert_reads_as_the_oracle(path)
    metadata = open_gguf(path).metadata
    for kind, values in scalars.items():
        single, several = metadata[f"scalar.{kind.name}.1"], metadata[f"array.{kind.name}"]
        assert type(single) is type(several[1]) is type(values[1])  # Python's own types, not NumPy's
        assert several.element_type == kind.name
        assert len(several) == 2
    with pytest.raises(TypeError, match="item assignment"):
        metadata["scalar.INT32.0"] = 1  # type: ignore[index]


def test_every_tensor_type_and_rank(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sizes = {types.TYPES[kind]: pair for kind, pair in gguf.GGML_QUANT_SIZES.items() if kind in types.TYPES}
    assert {kind.name for kind in types.TYPES.values()} - {kind.name for kind in sizes} <= {"Q1_0", "Q2_0"}

    def add(writer: gguf.GGUFWriter) -> None:
        for (kind, (_, block_bytes)), lead in zip(sizes.items(), itertools.cycle([(), (3,), (2, 3), (1, 2, 3)])):
            raw = random.integers(0, 256, (*lead, 2 * block_bytes), dtype=np.uint8)
            writer.add_tensor(f"blk.0.{kind.name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType(kind.id))

    path = write(tmp_path / "types.gguf", add)
    assert_reads_as_the_oracle(path)
    file = open_gguf(path)
    assert {info.type for info in file.tensors.values()} == set(sizes)
    assert {len(info.shape) for info in file.tensors.values()} == {1, 2, 3, 4}
    vector = file.tensors["blk.0.F32.weight"]
    assert (vector.shape, vector.rows, vector.row_bytes) == ((2,), 1, 8)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_custom_alignment(alignment)
        for name in "abc":
            writer.add_tensor(name, np.full(5, ord(name), np.float32))

    assert_reads_as_the_oracle(write(tmp_path / "aligned.gguf", add))


@pytest.mark.parametrize(
    "name",
    [f"models/stories260K-{kind}.gguf" for kind in ("f32", "q4_0", "q8_0")]
    + [f"reference/{family}-q4_k_m.gguf" for family in ("llama3", "mistral", "gemma3", "olmo2", "phi3", "qwen3")],
)
def test_real_files(shared: Path, name: str) -> None:
    if not (shared / name).exists():
        pytest.skip(f"../shared/{name} is absent")
    assert_reads_as_the_oracle(shared / name)


def test_what_the_writer_cannot_write(tmp_path: Path) -> None:
    nested = made.array(ARRAY, [made.array(INT32, [b"\1\0\0\0", b"\2\0\0\0"]), made.array(STRING, [made.text("é")])])
    path = tmp_path / "made.gguf"
    path.write_bytes(
        made.file(
            [
                made.key("none", ARRAY, made.array(STRING, [])),
                made.key("zero", ARRAY, made.array(INT32, [])),
                made.key("nested", ARRAY, nested),
                made.key("truths", ARRAY, made.array(BOOL, [b"\0\1\2\xff"], count=4)),
                made.key("truth", BOOL, b"\x80"),
                made.key("bytes", STRING, made.text(b"a\xffb")),
            ],
            [Tensor("q1", (256,), 41), Tensor("q2", (64,), 42, offset=64), Tensor("n" * 64, (8,), offset=96)],
            bytes(64) + bytes(32) + EIGHT,
            version=2,
        )
    )
    file = open_gguf(path)
    assert file.version == 2
    assert {key: plain(value) for key, value in file.metadata.items()} == {
        "none": [],
        "zero": [],
        "nested": [[1, 2], ["é"]],
        "truths": [False, True, True, True],
        "truth": True,
        "bytes": "a\ufffdb",
    }
    assert [info.nbytes for info in file.tensors.values()] == [36, 18, 32]
    assert file.rows("n" * 64).tobytes() == EIGHT


def test_array_is_a_sequence(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_array("words", ["a", "b", "c", "d"])
        writer.add_array("numbers", [1.5, 2.5, 3.5])

    metadata = open_gguf(write(tmp_path / "arrays.gguf", add)).metadata
    words, numbers = metadata["words"], metadata["numbers"]
    assert (words[0], words[-1], words[1:3], words[::-2]) == ("a", "d", ["b", "c"], ["d", "b"])
    assert "c" in words
    assert words.index("c") == 2
    assert list(reversed(numbers)) == [3.5, 2.5, 1.5]
    assert repr(words) == "<4 x STRING>"
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"element {index} of an array of 4"):
            words[index]


def test_nothing_is_decoded_at_opening(tmp_path: Path) -> None:
    tokens, merges = [f"token{i}" for i in range(128_000)], [f"to {i}" for i in range(280_000)]
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(
        made.file(
            [
                made.key("tokens", ARRAY, made.array(STRING, map(made.text, tokens))),
                made.key("merges", ARRAY, made.array(STRING, map(made.text, merges))),
                made.key("scores", ARRAY, made.array(FLOAT32, [np.arange(128_000, dtype="<f4").tobytes()], 128_000)),
                made.key("types", ARRAY, made.array(INT32, [np.ones(128_000, "<i4").tobytes()], 128_000)),
            ]
        )
    )
    tracemalloc.start()
    try:
        file = open_gguf(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 8 bytes for each of 408 000 strings, while growing; as Python strings they would take over 20 MB.
    assert peak < 8e6
    assert list(file.metadata["tokens"]) == tokens
    assert file.metadata["merges"][-1] == merges[-1]
    assert file.metadata["scores"][127_999] == 127_999.0
    assert len(file.metadata["types"]) == 128_000


def test_import_needs_neither_torch_nor_gguf() -> None:
    script = "import sys, ggjac.gguf; print({'torch', 'gguf', 'llama_cpp'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- Rows, closing ---


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    """Return a file with `m`, F32 [3, 4] counting from 0, and `v`, F32 [8]."""
    path = tmp_path / "matrix.gguf"
    data = made.padded(np.arange(12, dtype="<f4").tobytes()) + EIGHT
    keys = [made.key("words", ARRAY, made.array(STRING, [made.text("w")]))]
    keys.append(made.key("ints", ARRAY, made.array(INT32, [b"\7\0\0\0"])))
    path.write_bytes(made.file(keys, [Tensor("m", (4, 3)), Tensor("v", offset=64)], data))
    return path


def test_rows_are_views_of_the_file(matrix: Path) -> None:
    with open_gguf(matrix) as file:
        rows = file.rows("m", 1, 3)
        assert rows.dtype == np.uint8
        assert rows.view("<f4").tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
        assert np.shares_memory(rows, file.rows(file.tensors["m"]))
        assert not rows.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            rows[0, 0] = 1
        assert file.rows("m", 3).shape == file.rows("m", 1, 1).shape == (0, 16)
        assert file.rows("v").shape == (1, 32)


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (-1, 2), (2, 1), (4, None), (0, 2**64)])
def test_rows_out_of_range(matrix: Path, start: int, stop: int | None) -> None:
    file = open_gguf(matrix)
    for method in (file.rows, file.will_need):
        with pytest.raises(GGUFError, match=r"rows .* of m requested, but it has 3"):
            method("m", start, stop)


def test_rows_of_another_tensor(matrix: Path) -> None:
    file = open_gguf(matrix)
    with pytest.raises(GGUFError, match=r"has no tensor output\.weight; it has 2 others"):
        file.rows("output.weight")
    with pytest.raises(GGUFError, match=r"has no tensor '\\x1b\[2J'"):
        file.rows("\x1b[2J")
    stranger = TensorInfo("m", (3, 4), types.TYPES[0], 0, 1 << 40, 48)
    with pytest.raises(GGUFError, match="tensor m is different here"):
        file.rows(stranger)


def test_will_need_asks_for_the_pages_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pages.gguf"
    path.write_bytes(made.file([], [Tensor("a", (1024, 20))], bytes(4096 * 20)))
    file = open_gguf(path)
    file.will_need("a")
    file.will_need("a", 20)  # nothing
    if not hasattr(mmap, "MADV_WILLNEED"):
        return

    class Recorder(mmap.mmap):
        def madvise(self, *call: int) -> None:
            calls.append(call)

    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(file, "_buffers", [Recorder(-1, mmap.PAGESIZE)])
    file.will_need("a", 7, 9)
    ((option, start, length),) = calls
    info = file.tensors["a"]
    assert option == mmap.MADV_WILLNEED
    assert start % mmap.PAGESIZE == 0
    assert start <= info.offset + 7 * 4096 < start + mmap.PAGESIZE
    assert start + length == info.offset + 9 * 4096


def test_close_leaves_views_alive(matrix: Path) -> None:
    with open_gguf(matrix) as file:
        rows = file.rows("v")
    file.close()  # twice is harmless
    assert rows.tobytes() == EIGHT
    assert plain(file.metadata["words"]) == ["w"]
    assert plain(file.metadata["ints"]) == [7]
    for read in (lambda: file.rows("v"), lambda: file.will_need("v"), file.fingerprint):
        with pytest.raises(GGUFError, match="is closed; open it again"):
            read()


# --- Fingerprint ---


def test_fingerprint_sees_every_byte_of_a_small_file(matrix: Path) -> None:
    raw = matrix.read_bytes()
    known = open_gguf(matrix).fingerprint()
    assert known.startswith("sampled-sha256:")
    copy = matrix.with_name("copy.gguf")
    copy.write_bytes(raw)
    assert open_gguf(copy).fingerprint() == known  # whatever its name
    copy.write_bytes(raw + b"\0")
    assert open_gguf(copy).fingerprint() != known
    first, padding, last = raw.index(b"words"), len(raw) - 32 - 64 - 1, len(raw) - 1
    for position in (first, padding, last - 40, last):
        changed = bytearray(raw)
        changed[position] ^= 1
        copy.write_bytes(changed)
        assert open_gguf(copy).fingerprint() != known


def test_fingerprint_samples_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sparse.gguf"
    head = made.file([], [Tensor("a", (1 << 20, 1 << 11))])  # 8 GiB, of which the disk holds nothing
    path.write_bytes(head)
    os.truncate(path, len(head) + (8 << 30))

    hashed = []

    class Counting:
        def __init__(self, sha256: Any) -> None:
            self.digest = sha256()

        def update(self, data: Any) -> None:
            hashed.append(len(data))
            self.digest.update(data)

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    sha256 = container.hashlib.sha256
    monkeypatch.setattr(container.hashlib, "sha256", lambda: Counting(sha256))
    known = open_gguf(path).fingerprint()
    assert sum(hashed) == 16 + len(head) + 64 * 65536

    def poke(position: int) -> str:
        with open(path, "r+b") as file:
            file.seek(position)
            file.write(b"\1")
        return open_gguf(path).fingerprint()

    assert poke(len(head) + 100_000) == known  # between two samples: the documented blind spot
    first = poke(len(head))
    middle = poke(len(head) + ((8 << 30) - 65536) * 31 // 63)
    last = poke(len(head) + (8 << 30) - 1)
    assert len({known, first, middle, last}) == 4


def test_sha256_is_that_of_the_whole_file(split: list[Path]) -> None:
    done: list[int] = []
    with open_gguf(split[0]) as file:
        assert file.hashes is None
        expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in split]
        assert file.sha256(done.append) == file.hashes == expected
        assert sum(done) == file.nbytes
        assert file.sha256(done.append) == expected
        assert sum(done) == file.nbytes, "computed once"


def test_a_fingerprint_is_whole_if_no_byte_escapes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.gguf", lambda writer: writer.add_tensor("a", np.ones(2048, np.float32)))
    raw, start = path.read_bytes(), open_gguf(path)._data_starts[0]
    for block, whole in ((8192 // 65 + 1, True), (8192 // 65 - 1, False)):
        monkeypatch.setattr(container, "FINGERPRINT_BLOCK_BYTES", block)
        file = open_gguf(path)
        known, seen = file.fingerprint(), set()
        assert file.fingerprint_is_whole == whole
        for position in range(start, len(raw), 17):
            path.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
            seen.add(open_gguf(path).fingerprint() != known)
        path.write_bytes(raw)
        assert seen == ({True} if whole else {True, False})


def test_a_file_that_another_program_changes_is_noticed(split: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(path: Path) -> None:
        os.utime(path, ns=(1, 1))

    def replace(path: Path) -> None:
        shutil.copy2(path, path.with_name("new"))
        path.with_name("new").replace(path)

    def longer(path: Path) -> None:
        with open(path, "ab") as file:
            file.write(b"x")

    for change, words in ((touch, "has written to it"), (replace, "has taken its place"), (longer, r"\d+ bytes, and")):
        with open_gguf(split[0]) as file:
            file.check_unchanged()
            change(split[2])
            with pytest.raises(ChangedError, match=rf"^{split[2]}: changed while in use \(.*{words}"):
                file.check_unchanged()
            if change is not replace:
                with pytest.raises(ChangedError):
                    file.sha256()
    with open_gguf(split[0]) as file:
        split[1].rename(split[1].with_name("moved"))
        file.check_unchanged()
        split[2].unlink()
        file.check_unchanged()
        monkeypatch.setattr(os, "stat", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(GGUFError, match=r"cannot be read any more \(Input/output error\); check the disk"):
            file.check_unchanged()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can test pages before they are read")
def test_a_page_that_cannot_be_read_is_an_error_and_no_bus_error(tmp_path: Path) -> None:
    """In a process of its own, which reading the page would kill; its file is cut where the size was looked at."""
    path = write(tmp_path / "a.gguf", lambda writer: writer.add_tensor("a", np.ones((64, 4096), np.float32)))
    program = f"""
import mmap, os
from ggjac.gguf import container, open_gguf
file = open_gguf({str(path)!r})
class Late(mmap.mmap):
    def size(self):
        return 1 << 40
with open({str(path)!r}, "rb") as opened:
    file._buffers = [Late(opened.fileno(), 0, access=mmap.ACCESS_READ)]
os.truncate({str(path)!r}, 4096)
for read in (lambda: file.rows("a", 3, 5), file.sha256):
    try:
        read()
    except container.GGUFError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [re.sub(r"\d+", "N", line.removeprefix(f"{path}: ")) for line in done.stdout.splitlines()] == [
        "bytes N to N cannot be read (input/output error); check the disk or the network, or copy the file to a local "
        "disk"
    ] * 2


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64") or sys.platform != "linux", reason="Linux only")
def test_a_page_that_goes_while_it_is_read_is_zeros_and_the_file_is_lost(tmp_path: Path) -> None:
    """In a process of its own, which would be killed: two files are open, one is cut behind the back of its reader."""
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name, lambda writer: writer.add_tensor("a", np.ones((64, 4096), np.float32)))
    program = """
import os
from ggjac import guard
from ggjac.gguf import GGUFError, open_gguf
guard.install()
files = [open_gguf(name) for name in ("a.gguf", "b.gguf")]
rows = [file.rows("a") for file in files]
os.truncate("b.gguf", 8192)
print([int(part.view("<f4").sum()) == 64 * 4096 for part in rows], [file.lost for file in files])
files[0].check_unchanged()
try:
    files[1].check_unchanged()
except GGUFError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines() == [
        "[True, False] [False, True]",
        "b.gguf: a part of it could not be read while in use: it was truncated, or the disk or the network failed; "
        "restore the file, or copy it to a local disk, then start again",
    ]


# --- Split files ---


def add_five_tensors(writer: gguf.GGUFWriter) -> None:
    writer.add_array("words", ["x", "y"])
    for i in range(5):
        writer.add_tensor(f"blk.{i}.weight", np.full((i + 1, 4), i, np.float32))


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    """Return the three files of a split model of five tensors."""
    write(tmp_path / "model.gguf", add_five_tensors, split_max_tensors=2)
    return [tmp_path / f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


def test_split_file_reads_as_the_whole(split: list[Path]) -> None:
    whole = open_gguf(write(split[0].with_name("whole.gguf"), add_five_tensors))
    with open_gguf(split[0]) as file:
        assert file.path == split[0]
        assert file.paths == split
        assert file.nbytes == sum(path.stat().st_size for path in split)
        assert plain(file.metadata["words"]) == ["x", "y"]
        assert list(file.tensors) == list(whole.tensors)
        assert [info.shard for info in file.tensors.values()] == [0, 0, 1, 1, 2]
        for name in file.tensors:
            assert np.array_equal(file.rows(name), whole.rows(name))
            file.will_need(name)
        known = file.fingerprint()
    raw = bytearray(split[2].read_bytes())
    raw[-1] ^= 1
    split[2].write_bytes(raw)
    assert open_gguf(split[0]).fingerprint() != known


def test_split_files_are_found_in_their_own_case(split: list[Path]) -> None:
    renamed = [path.rename(path.with_name(path.name.upper())) for path in split]
    with open_gguf(renamed[0]) as file:
        assert [path.name for path in file.paths] == [f"MODEL-0000{i}-OF-00003.GGUF" for i in (1, 2, 3)]


def test_split_file_with_an_empty_first_shard(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", add_five_tensors, split_max_tensors=3, small_first_shard=True)
    file = open_gguf(tmp_path / "model-00001-of-00003.gguf")
    assert [info.shard for info in file.tensors.values()] == [1, 1, 1, 2, 2]
    assert file.rows("blk.4.weight").view("<f4").tolist() == [[4.0] * 4] * 5


def test_split_file_behind_links(split: list[Path], tmp_path: Path) -> None:
    # As in a download cache: the names are links to files that are named otherwise and lie elsewhere.
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for i, path in enumerate(split):
        path.rename(tmp_path / f"blob{i}")
        (folder / path.name).symlink_to(tmp_path / f"blob{i}")
    assert len(open_gguf(folder / split[0].name).tensors) == 5


def test_split_file_refusals(split: list[Path], tmp_path: Path) -> None:
    assert "is shard 2 of 3; open the first one, model-00001-of-00003.gguf" in refusal(split[1])
    renamed = tmp_path / "renamed.gguf"
    shutil.copy(split[2], renamed)
    assert refusal(renamed).endswith("is shard 3 of 3; open the first one")
    shutil.copy(split[0], renamed)
    assert "rename them to PREFIX-00001-of-00003.gguf" in refusal(renamed)
    shutil.copy(split[0], wrong_count := tmp_path / "model-00001-of-00002.gguf")
    assert "rename them to PREFIX-00001-of-00003.gguf" in refusal(wrong_count)

    shutil.copy(split[1], split[2])
    message = refusal(split[0])
    assert split[2].name in message
    assert "expected shard 3 of 3, but its metadata says 2 of 3" in message
    shutil.copy(write(tmp_path / "whole.gguf", add_five_tensors), split[2])
    assert "split.no must be an integer but is absent" in refusal(split[0])
    split[2].write_bytes(split[1].read_bytes()[:-5])
    assert f"{split[2].name}: the tensor data is cut short" in refusal(split[0])
    split[2].unlink()
    assert "1 of 3 shards missing, starting with model-00003-of-00003.gguf" in refusal(split[0])


def shard(number: int, tensor: str, total: int = 2, count: bytes | None = None) -> bytes:
    keys = [
        made.key("split.no", UINT16, struct.pack("<H", number)),
        count or made.key("split.count", UINT16, b"\2\0"),
        made.key("split.tensors.count", INT32, struct.pack("<i", total)),
    ]
    return made.file(keys, [Tensor(tensor)], EIGHT)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (shard(0, "a"), shard(1, "a"), "tensor a is also in m-00001-of-00002.gguf"),
        (shard(0, "a", total=3), shard(1, "b"), "split.tensors.count says 3 tensors, but the 2 shards hold 2"),
        (
            shard(0, "a", count=made.key("split.count", STRING, made.text("../\x1b"))),
            b"",
            r"split.count must be an integer but is '../\x1b'",
        ),
        (shard(0, "a", count=made.key("split.count", BOOL, b"\2")), b"", "split.count must be an integer but is True"),
        (shard(0, "a", count=made.key("split.count", 10, made.u64(2**60))), b"", "is the first of 1152921504606846976"),
    ],
    ids=["duplicate tensor", "wrong total", "text count", "bool count", "absurd count"],
)
def test_shards_that_disagree(tmp_path: Path, first: bytes, second: bytes, expected: str) -> None:
    paths = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    paths[0].write_bytes(first)
    paths[1].write_bytes(second)
    assert expected in refusal(paths[0])


# --- What is wrong is refused, by name and in one line ---

TWO64, DOWNLOAD = 2**64 - 1, "download it again"
ALIGNMENT = "general.alignment"

REFUSED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("the file is empty", DOWNLOAD)),
    "three bytes": (b"GGU", ("is not a GGUF file", "'GGU'")),
    "magic only": (b"GGUF", ("the version at byte 4 needs 4 bytes, but the file has 0 left", DOWNLOAD)),
    "other magic": (b"\x1b[2Jxxxxxxxxxxxxxxxxxxxx", (r"starts with '\x1b[2J'", "give a .gguf file")),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", ("Git LFS pointer", "git lfs pull")),
    "old ggml": (b"tjgg" + bytes(100), ("from before GGUF", "convert")),
    "zeros": (bytes(100), ("unfinished download",)),
    "version 0": (made.file(version=0), ("is GGUF version 0; versions 2 and 3 are supported",)),
    "version 1": (made.file(version=1), ("is GGUF version 1",)),
    "version 4": (made.file(version=4), ("is GGUF version 4; versions 2 and 3 are supported",)),
    "big endian": (made.file(version=3 << 24), ("is a big-endian GGUF (version 3)", "gguf-convert-endian")),
    "no counts": (made.file()[:12], ("the number of tensors at byte 8 needs 8 bytes, but the file has 4 left",)),
    "2**60 tensors": (made.file(tensor_count=2**60), ("declares 1152921504606846976 tensors", "room for at most")),
    "2**64-1 keys": (made.file(key_count=TWO64), ("declares 18446744073709551615 metadata keys", "room for")),
    "tensors after large metadata": (
        made.header([made.key("k", STRING, made.text(b"x" * 999))], tensor_count=20),
        ("declares 20 tensors, but has room for at most 0",),
    ),
    "key length": (
        made.file([made.u64(2**60) + bytes(32)]),
        ("the name of metadata key 0", "needs 1152921504606846976 bytes"),
    ),
    "long key": (made.file([made.key(b"k" * 70000, UINT8, b"\1")]), ("70000 bytes long; at most 65535",)),
    "empty key": (made.file([made.key("", UINT8, b"\1")]), ("metadata key 0 has an empty name",)),
    "key not utf-8": (made.file([made.key(b"a\xff\n", UINT8, b"\1")]), ("key 0 is not UTF-8", r"'a\xff\n'")),
    "key twice": (made.file([made.key("k\x1b", UINT8, b"\1")] * 2), (r"metadata key 'k\x1b' appears twice",)),
    "value type 13": (
        made.file([made.key("k", 13, bytes(8))]),
        ("metadata k has value type 13; GGUF defines 0 to 12",),
    ),
    "string length": (
        made.file([made.key("k", STRING, made.u64(TWO64) + bytes(8))]),
        ("the string k", "needs 18446744073709551615 bytes"),
    ),
    "array type 99": (made.file([made.key("k", ARRAY, made.array(99, []))]), ("metadata k has elements of type 99",)),
    "array count": (
        made.file([made.key("k", ARRAY, made.array(INT32, [], 2**60))]),
        ("declares 1152921504606846976 elements of k", "room for at most"),
    ),
    "array count wraps": (
        made.file([made.key("k", ARRAY, made.array(6, [], 2**62))]),  # times 4 bytes is 0 in 64 bits
        ("declares 4611686018427387904 elements of k",),
    ),
    "string array count": (
        made.file([made.key("k", ARRAY, made.array(STRING, [made.text("x")], 2**61))]),
        ("declares 2305843009213693952 elements of k",),
    ),
    "string in array": (
        made.file([made.key("k", ARRAY, made.array(STRING, [made.text("x"), made.u64(2**60), bytes(8)], 3))]),
        ("string 1 of 3 in k ends beyond the file's",),
    ),
    "string in array wraps": (
        made.file([made.key("k", ARRAY, made.array(STRING, [made.text("x"), made.u64(TWO64 - 7), bytes(8)], 3))]),
        ("string 1 of 3 in k ends beyond the file's",),
    ),
    "last string in array": (
        made.file([made.key("k", ARRAY, made.array(STRING, [made.text("x"), made.u64(99)]))]),
        ("string 1 of 2 in k ends beyond the file's",),
    ),
    "nested too deep": (
        made.file([made.key("k", ARRAY, (made.u32(ARRAY) + made.u64(1)) * 9 + made.array(INT32, []))]),
        ("metadata k nests arrays more than 4 deep",),
    ),
    "nested count": (
        made.file([made.key("k", ARRAY, made.array(ARRAY, [made.array(INT32, [])], 2**60))]),
        ("declares 1152921504606846976 elements of k",),
    ),
    "alignment 0": (made.file([made.key(ALIGNMENT, UINT32, made.u32(0))]), ("general.alignment is 0", "power of two")),
    "alignment 24": (made.file([made.key(ALIGNMENT, UINT32, made.u32(24))]), ("general.alignment is 24",)),
    "alignment 2**31": (made.file([made.key(ALIGNMENT, UINT32, made.u32(1 << 31))]), ("is 2147483648",)),
    "alignment text": (made.file([made.key(ALIGNMENT, STRING, made.text("32"))]), ("alignment has value type 8",)),
    "tensor name length": (
        made.header(tensor_count=1) + made.u64(2**60) + bytes(64),
        ("the name of tensor 0 at byte 32 needs 1152921504606846976 bytes",),
    ),
    "long tensor name": (made.file([], [Tensor("n" * 1025)], EIGHT), ("1025 bytes long; at most 1024 are allo",)),
    "tensor name not utf-8": (made.file([], [Tensor(b"a\xff")], EIGHT), ("the name of tensor 0 is not UTF-8",)),
    "tensor twice": (
        made.file([], [Tensor("a\n"), Tensor("a\n", offset=32)], EIGHT * 2),
        (r"tensor 'a\n' appears twice",),
    ),
    "0 dimensions": (made.file([], [Tensor(sizes=())], EIGHT), ("tensor a has 0 dimensions; 1 to 8",)),
    "9 dimensions": (made.file([], [Tensor(sizes=(1,) * 9)], EIGHT), ("tensor a has 9 dimensions",)),
    "2**32-1 dimensions": (made.file([], [Tensor(dimensions=2**32 - 1)], EIGHT), ("has 4294967295 dimensions",)),
    "size 0": (made.file([], [Tensor(sizes=(8, 0))], EIGHT), ("tensor a has the impossible shape [0, 8]",)),
    "size 2**60": (
        made.file([], [Tensor(sizes=(2**60,))], EIGHT),
        ("cut short", "4611686018427387968 bytes are needed"),
    ),
    "size wraps": (
        made.file([], [Tensor(sizes=(2**32, 2**32))], EIGHT),
        ("impossible shape [4294967296, 4294967296]",),
    ),
    "bytes wrap": (
        made.file([], [Tensor(sizes=(2**31, 2**31))], EIGHT),
        ("cut short", "18446744073709551712 bytes are needed"),
    ),
    "type 999": (made.file([], [Tensor("blk.0.x", type=999)], EIGHT), ("tensor blk.0.x has type id 999",)),
    "type removed": (
        made.file([], [Tensor(type=31)], EIGHT),
        ("tensor a has type id 31 (Q4_0_4_4, which llama.cpp no longer stores)", "quantize the model again"),
    ),
    "type for activations": (made.file([], [Tensor(type=15)], EIGHT), ("type id 15 (Q8_K",)),
    "type of ik_llama.cpp": (made.file([], [Tensor(type=139)], EIGHT), ("type id 139 (IQ4_K of ik_llama.cpp)",)),
    "its last type": (made.file([], [Tensor(type=399)], EIGHT), ("type id 399 (Q8_K_R8 of ik_llama.cpp)",)),
    "type of bitnet.cpp": (made.file([], [Tensor(type=36)], EIGHT), ("36 (I2_S of bitnet.cpp, or IQ4_NL_4_4 of an",)),
    "partial block": (
        made.file([], [Tensor(sizes=(33,), type=2)], EIGHT),
        ("tensor a of shape [33]", "Q4_0 blocks of 32"),
    ),
    "misaligned": (made.file([], [Tensor(offset=8)], EIGHT * 2), ("offset 8, not a multiple of the alignment 32",)),
    "offset 2**64-32": (made.file([], [Tensor(offset=2**64 - 32)], EIGHT), ("cut short",)),
    "overlap": (made.file([], [Tensor("a", (9,)), Tensor("b", offset=32)], EIGHT * 2), ("tensors a and b overlap",)),
    "same place": (made.file([], [Tensor("a"), Tensor("b")], EIGHT), ("tensors a and b overlap",)),
    "no data": (made.header([], [Tensor()]), ("cut short", "from a on", "probably incomplete")),
    "data one byte short": (
        made.file([], [Tensor("a"), Tensor("b", offset=32)], EIGHT * 2)[:-1],
        ("160 bytes are needed, the file has 159, 1 bytes are missing (from b on)", DOWNLOAD),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    raw, expected = REFUSED[case]
    path = tmp_path / "wrong.gguf"
    path.write_bytes(raw)
    message = refusal(path)
    for part in expected:
        assert part in message


def test_files_of_other_programs_can_be_looked_at(tmp_path: Path) -> None:
    """Video models have tensors of five dimensions, and longer names than ggml allows."""
    path = tmp_path / "video.gguf"
    tensors = [Tensor("patch_embedding.weight", (2, 2, 1, 1, 2)), Tensor("n" * 70, offset=32)]
    path.write_bytes(made.file([made.key("general.architecture", STRING, made.text("wan"))], tensors, EIGHT * 2))
    with open_gguf(path) as file:
        assert file.tensors["patch_embedding.weight"].shape == (2, 1, 1, 2, 2)
        assert file.tensors["n" * 70].rows == 1


PIECES = {
    "m.Q6_K.gguf.part1of2": "cat m.Q6_K.gguf.part{1..2}of2 > m.Q6_K.gguf",
    "m.Q6_K.gguf.part12of12": "cat m.Q6_K.gguf.part{1..12}of12 > m.Q6_K.gguf",
    "m.gguf.part01of12": "cat m.gguf.part*of12 > m.gguf",
    "m.gguf-split-a": "cat m.gguf-split-* > m.gguf",
    "m.gguf.partaa": "cat m.gguf.part* > m.gguf",
    "m.gguf.001": "cat m.gguf.* > m.gguf",
    "m.gguf.part-2-of-3": "cat m.gguf.part-{1..3}-of-3 > m.gguf",
    "$(touch x) m.gguf.partab": "cat '$(touch x) m.gguf.part'* > '$(touch x) m.gguf'",
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_are_to_be_joined(name: str, matrix: Path, tmp_path: Path) -> None:
    whole, path = matrix.read_bytes(), tmp_path / name
    for piece in (whole[:-50], whole[:20], whole[-50:]):
        path.write_bytes(piece)
        assert refusal(path).endswith(PIECES[name])
    path.write_bytes(whole)  # as a name of its own
    open_gguf(path)


@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00002.gguf", "m.gguf.bak", "m.part1of2", "m.gguf.download"])
def test_other_names_are_no_pieces(name: str, matrix: Path) -> None:
    path = matrix.with_name(name)
    path.write_bytes(matrix.read_bytes()[:-50])
    assert "cut short" in refusal(path)
    assert "cat " not in refusal(path)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENODEV, "this file system cannot map files into memory: copy the model to a local disk"),
        (errno.EINVAL, "this file system cannot map files into memory: copy the model to a local disk"),
        (errno.ENOMEM, "the address space is too small for the file: raise its limit (`ulimit -v`)"),
        (errno.EIO, "check the disk"),
    ],
)
def test_a_file_that_cannot_be_mapped(number: int, advice: str, matrix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(container.mmap, "mmap", fail)
    assert refusal(matrix).endswith(f"cannot be opened ({os.strerror(number)}); {advice}")


def test_memory_follows_the_size_of_the_file_and_not_its_claims(tmp_path: Path) -> None:
    path = tmp_path / "wrong.gguf"
    tracemalloc.start()
    try:
        for raw, _ in REFUSED.values():
            path.write_bytes(raw)
            refusal(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1e6


def test_entries_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_ENTRIES", 3)
    path = tmp_path / "many.gguf"
    keys = [made.key(f"k{i}", UINT8, b"\1") for i in range(4)]
    for raw in (made.file(keys), made.file([], [Tensor(f"t{i}", offset=32 * i) for i in range(4)], EIGHT * 4)):
        path.write_bytes(raw)
        assert refusal(path).endswith("; at most 3 are allowed")
    path.write_bytes(made.file([made.key(f"k{i}", ARRAY, made.array(ARRAY, [bytes(12)] * 2)) for i in range(2)]))
    assert "metadata k1 brings the file's inner arrays above the 3 allowed" in refusal(path)


def test_header_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "MAX_HEADER_BYTES", 1 << 20)
    path = tmp_path / "large.gguf"
    for value in (made.text(bytes(1 << 20)), made.array(STRING, [made.text(bytes(1 << 20))])):
        kind = STRING if len(value) == 8 + (1 << 20) else ARRAY
        path.write_bytes(made.file([made.key("k", kind, value)], [], bytes(100)))
        assert "beyond the 1 MiB allowed for a header" in refusal(path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.gguf").endswith("no such file; check the path")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "file").touch()
    assert "Not a directory" in refusal(tmp_path / "file" / "x.gguf")
    assert "embedded null byte" in refusal(tmp_path / "a\0b")
    assert r"\n" in refusal(tmp_path / "two\nlines")
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refusal(tmp_path / "pipe")


def test_a_file_without_permission(matrix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # who may read everything

        def deny(*args: Any, **kwargs: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", deny)
    else:
        matrix.chmod(0)
    assert "cannot be read; check its permissions" in refusal(matrix)


# --- Random and systematic damage ---

SCALAR_VALUES = {
    ValueType.UINT8: st.integers(0, 2**8 - 1),
    ValueType.INT16: st.integers(-(2**15), 2**15 - 1),
    ValueType.UINT32: st.integers(0, 2**32 - 1),
    ValueType.INT64: st.integers(-(2**63), 2**63 - 1),
    ValueType.UINT64: st.integers(0, 2**64 - 1),
    ValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    ValueType.FLOAT64: st.floats(allow_nan=False),
    ValueType.BOOL: st.booleans(),
    ValueType.STRING: st.text(max_size=20),
}
SINGLE = st.one_of([st.tuples(st.just(kind), values) for kind, values in SCALAR_VALUES.items()])
SEVERAL = st.one_of(
    [st.tuples(st.just(kind), st.lists(values, min_size=1, max_size=9)) for kind, values in SCALAR_VALUES.items()]
)
# Not the keys that mean something to the reader or the writer.
KEYS = st.text(min_size=1, max_size=20).filter(lambda key: not key.startswith(("general.", "split.")))


@given(entries=st.dictionaries(KEYS, st.one_of(SINGLE, SEVERAL), max_size=8))
@settings(max_examples=100, deadline=None)
def test_metadata_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, tuple[gguf.GGUFValueType, Any]]
) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        for key, (kind, value) in entries.items():
            if isinstance(value, list):
                writer.add_key_value(key, value, ValueType.ARRAY, sub_type=kind)
            else:
                writer.add_key_value(key, value, kind)

    file = open_gguf(write(tmp_path_factory.getbasetemp() / "metadata.gguf", add))
    expected = {"general.architecture": "llama"} | {key: value for key, (_, value) in entries.items()}
    assert {key: plain(value) for key, value in file.metadata.items()} == expected


def valid_header() -> bytes:
    keys = [
        made.key(ALIGNMENT, UINT32, made.u32(32)),
        made.key("name", STRING, made.text("naïve")),
        made.key("tokens", ARRAY, made.array(STRING, map(made.text, ["a", "", "ccc"]))),
        made.key("scores", ARRAY, made.array(FLOAT32, [bytes(4)] * 3)),
        made.key("inner", ARRAY, made.array(ARRAY, [made.array(INT32, [bytes(4)]), made.array(STRING, [])])),
        made.key("yes", BOOL, b"\1"),
        made.key("split.count", UINT16, b"\1\0"),
    ]
    return made.header(keys, [Tensor("a", (4, 3)), Tensor("q", (32, 1, 2), 8, 64)])


VALID = made.padded(valid_header()) + bytes(range(64)) + bytes(68)


def opens_or_refuses(path: Path, raw: bytes) -> bool:
    path.write_bytes(raw)
    try:
        touch_everything(path)
    except GGUFError:
        return False
    return True


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    assert opens_or_refuses(path, VALID)
    assert not any(opens_or_refuses(path, VALID[:length]) for length in range(len(VALID)))


@pytest.mark.parametrize("number", [0, 2**32 - 1, 2**60, 2**63, 2**64 - 8])
def test_an_absurd_number_anywhere_in_the_header(tmp_path: Path, number: int) -> None:
    path, absurd = tmp_path / "absurd.gguf", made.u64(number)
    for position in range(8, len(valid_header())):
        opens_or_refuses(path, VALID[:position] + absurd + VALID[position + 8 :])


@given(
    length=st.integers(0, len(VALID)) | st.just(len(VALID)),
    flips=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=6),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_damage(tmp_path_factory: pytest.TempPathFactory, length: int, flips: list[tuple[int, int]]) -> None:
    raw = bytearray(VALID)
    for position, value in flips:
        raw[position] = value
    opens_or_refuses(tmp_path_factory.getbasetemp() / "damaged.gguf", bytes(raw[:length]))


def test_file_type_is_public(matrix: Path) -> None:
    file = open_gguf(matrix)
    assert isinstance(file, GGUFFile)
    assert repr(file) == f"<GGUFFile {matrix}: 2 tensors, {matrix.stat().st_size} bytes>"


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a mapped file cannot be cut")
def test_a_file_that_is_cut_while_in_use_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(demo_path().read_bytes())
    with open_gguf(path) as file:
        first, *_, last = file.tensors
        before = file.rows(first).copy()
        os.truncate(path, file.tensors[last].offset + 100)
        with pytest.raises(GGUFError, match=r"model.gguf: was truncated to \d+ bytes while in use"):
            file.rows(last)
        assert np.array_equal(file.rows(first), before)


def test_places_of_maps_are_known_for_as_long_as_they_are_mapped(matrix: Path) -> None:
    """Later, something else may be mapped there."""
    with open_gguf(matrix) as file:
        rows = file.rows(next(iter(file.tensors)))
        assert [length for _, length in file.addresses] == [matrix.stat().st_size]
    assert len(file.addresses) == 1
    del rows
    file.metadata = {}  # whose arrays are read from the map
    gc.collect()
    assert file.addresses == []
