"""Streamed weights against `gguf.quants.dequantize`, in tiles of any size, with every read counted."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from helpers import compute_in, invoke, invoke_json

import ggjac
from ggjac.config import fused_parts
from ggjac.gguf import GGUFError, open_gguf
from ggjac.gguf.hub import demo_path
from ggjac.gguf.types import TYPES, holds_weights
from ggjac.linop import TiledMatrix
from ggjac.model import open_model
from ggjac.sizes import SMALL_PIECES, Part
from ggjac.weights import WeightError, WeightStore, holes
from ggjac.weights import store as module
from ggjac.weights.holes import zero_rows

KINDS = ("F32", "F16", "BF16", "Q4_0", "Q5_1", "Q8_0", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4", "IQ3_S", "TQ2_0")
ROW = {"d": 256, "ff": 24, "layers": 1, "vocab": 40, "heads": 1, "head_dim": 16}
CPU = torch.device("cpu")


def dense(path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor as the gguf package decodes it."""
    return {
        t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type)))
        for t in gguf.GGUFReader(path).tensors
    }


def store(path: Path, dtype: torch.dtype = torch.float32, threads: int = 1) -> WeightStore:
    return WeightStore(open_gguf(path), device=CPU, dtype=dtype, threads=threads)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let a tile hold 7 rows of 256: no size here divides."""
    compute_in(monkeypatch, SMALL_PIECES._replace(tile=7 * 256))
    return 7


# ---- values


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_rows_and_dense_are_the_packages_own(
    kind: str, threads: int, small_tiles: int, tiny_file: Callable[..., Path]
) -> None:
    path = tiny_file("plain", type=kind, **ROW)
    expected, weight = dense(path)["blk.0.ffn_up.weight"], store(path, threads=threads)["blk.0.ffn_up.weight"]
    assert isinstance(weight, TiledMatrix)
    assert (weight.shape, weight.dtype, weight.device) == ((24, 256), torch.float32, CPU)
    tiles = [(start, stop, tile.clone()) for start, stop, tile in weight.tiles()]
    assert [(start, stop) for start, stop, _ in tiles] == [(0, 7), (7, 14), (14, 21), (21, 24)]
    assert torch.equal(torch.cat([tile for *_, tile in tiles]), expected)
    assert torch.equal(weight.dense(), expected)
    assert torch.equal(weight.take([5, 0, 23, 5]), expected[[5, 0, 23, 5]])
    part = weight.rows(3, 14).rows(2, 11)
    assert part.shape == (9, 256)
    assert torch.equal(part.dense(), expected[5:14])
    assert [(start, stop) for start, stop, _ in part.tiles()] == [(0, 7), (7, 9)]
    assert torch.equal(torch.cat([tile.clone() for *_, tile in part.tiles()]), expected[5:14])
    assert torch.equal(part.take([0, 8]), expected[[5, 13]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_round_once(dtype: torch.dtype, tiny_file: Callable[..., Path]) -> None:
    path = tiny_file("plain", type="Q4_K", **ROW)
    expected, weight = dense(path)["blk.0.ffn_up.weight"].to(dtype), store(path, dtype)["blk.0.ffn_up.weight"]
    assert torch.equal(weight.dense(), expected)
    assert torch.equal(next(weight.tiles())[2], expected)
    assert torch.equal(weight.take([3]), expected[[3]])


def test_a_kept_copy_survives_the_next_read(tiny_file: Callable[..., Path]) -> None:
    """Tiles share a buffer; what `dense` and `take` return must not."""
    path = tiny_file("plain")
    everything, expected = store(path), dense(path)
    a, b = everything["blk.0.ffn_up.weight"].dense(), everything["blk.0.attn_norm.weight"].dense()
    taken = everything["output.weight"].take([1, 2])
    everything["blk.1.ffn_up.weight"].dense()
    list(everything["blk.1.ffn_gate.weight"].tiles())
    assert torch.equal(a, expected["blk.0.ffn_up.weight"])
    assert torch.equal(b, expected["blk.0.attn_norm.weight"])
    assert torch.equal(taken, expected["output.weight"][[1, 2]])


def test_vectors_keep_their_shape(tiny_file: Callable[..., Path]) -> None:
    path = tiny_file("biases")
    everything, expected = store(path), dense(path)
    for name, tensor in expected.items():
        assert torch.equal(everything[name].dense(), tensor), name
    assert everything["blk.0.attn_q.bias"].shape == (1, 64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_wide_vectors_are_not_rounded(dtype: torch.dtype, tiny_file: Callable[..., Path]) -> None:
    path, name = tiny_file("glm4moe", selection_mean=200.0), "exp_probs_b.bias"
    opened, expected = store(path, dtype), dense(path)[f"blk.1.{name}"]
    found = opened.block(1, {}).wide_vector(name)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(found, expected.to(found.dtype))
    assert opened.reads == {f"blk.1.{name}": 1}
    assert opened.bytes_read == expected.nbytes
    assert not torch.equal(expected, expected.bfloat16().float())


def test_a_row_longer_than_a_tile_is_one_tile(monkeypatch: pytest.MonkeyPatch, tiny_file: Callable[..., Path]) -> None:
    compute_in(monkeypatch, SMALL_PIECES._replace(tile=3))
    path = tiny_file("one_layer")
    rows = [(start, stop) for start, stop, _ in store(path)["blk.0.ffn_up.weight"].tiles()]
    assert rows == [(i, i + 1) for i in range(96)]


# ---- blocks


def split(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of block 1 by short names, fused attention taken apart: 4 heads and 2 kv heads of 16."""
    tensors = {name.removeprefix("blk.1."): t for name, t in dense(path).items() if name.startswith("blk.1.")}
    for suffix in ("weight", "bias"):
        if f"attn_qkv.{suffix}" in tensors:
            for part, values in zip("qkv", tensors.pop(f"attn_qkv.{suffix}").split([64, 32, 32]), strict=True):
                tensors[f"attn_{part}.{suffix}"] = values
    return tensors


@pytest.mark.parametrize("case", ["gqa", "fused_qkv", "fused_biases", "fused_split_biases", "biases"])
def test_blocks_answer_to_the_parts_of_fused_tensors(
    case: str, monkeypatch: pytest.MonkeyPatch, tiny_file: Callable[..., Path]
) -> None:
    compute_in(monkeypatch, SMALL_PIECES._replace(tile=5 * 64))
    model, expected = open_model(tiny_file(case)), split(tiny_file(case))
    block = model.weights.block(1, fused_parts(model.config, 1))
    for name, tensor in expected.items():
        assert name in block
        if tensor.ndim == 1:
            assert torch.equal(block.vector(name), tensor), name
        else:
            matrix = block.matrix(name)
            assert matrix.shape == tuple(tensor.shape)
            assert torch.equal(torch.cat([tile.clone() for *_, tile in matrix.tiles()]), tensor), name
    missing = {f"{stem}.bias" for stem in tiny.ALL_BIASES} - expected.keys()
    assert not [name for name in missing if name in block]


def tiles_of(matrix: module.Weight) -> torch.Tensor:
    return torch.cat([tile.clone() for *_, tile in matrix.tiles()])


@pytest.mark.parametrize("place", ["file", "dense"])
@pytest.mark.parametrize("kind", ["F32", "Q4_K", "Q8_0"])
def test_a_part_may_be_some_rows_of_every_few(
    kind: str, place: str, small_tiles: int, tiny_file: Callable[..., Path]
) -> None:
    """As of every head's rows those of its values: 3 of every 8 of 24 rows, read in tiles of 7, and of 2."""
    path, name = tiny_file("plain", type=kind, **ROW), "blk.0.ffn_up.weight"
    everything, expected = store(path), dense(path)[name]
    everything.place([place], {"dense": 1 << 20})
    chosen = [2, 3, 4, 10, 11, 12, 18, 19, 20]
    matrix = everything.block(0, {"values": Part("ffn_up", 2, 5, 8)}, live=True).matrix("values.weight")
    assert isinstance(matrix, TiledMatrix)
    assert matrix.shape == (9, 256)
    for _ in range(2):
        assert torch.equal(tiles_of(matrix), expected[chosen])
    assert everything.reads == {name: 9 if place == "dense" else 18}
    assert [(start, stop) for start, stop, _ in matrix.tiles()] == [(0, 7), (7, 9)]
    for start, stop in ((1, 8), (3, 6), (4, 5), (5, 9)):
        assert torch.equal(tiles_of(matrix.rows(start, stop)), expected[chosen[start:stop]])
    assert torch.equal(tiles_of(matrix.rows(2, 9).rows(1, 4).columns(0, 256)), expected[[10, 11, 12]])
    assert torch.equal(matrix.take([8, 0]), expected[[20, 2]])
    if kind != "Q4_K":
        columns = matrix.rows(1, 7).columns(64, 224)
        assert columns.shape == (6, 160)
        assert torch.equal(tiles_of(columns), expected[chosen[1:7], 64:224])


def test_a_part_with_gaps_is_read_ahead_without_them(
    tiny_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything, asked = store(tiny_file("plain", **ROW)), []
    monkeypatch.setattr(everything.file, "will_need", lambda info, start, stop: asked.append((start, stop)))
    matrix = everything.block(0, {"values": Part("ffn_up", 2, 5, 8)}).matrix("values.weight")
    matrix.read_ahead()
    matrix.rows(1, 4).read_ahead()
    assert asked == [(2, 5), (10, 13), (18, 21), (3, 5), (10, 11)]


def test_a_part_of_a_vector_may_be_some_elements_of_every_few(tiny_file: Callable[..., Path]) -> None:
    path = tiny_file("biases")
    parts = {"head": Part("attn_q", 4, 6, 16), "second": Part("attn_q", 16, 32)}
    block, expected = store(path).block(0, parts), dense(path)["blk.0.attn_q.bias"]
    assert torch.equal(block.vector("head.bias"), expected[[4, 5, 20, 21, 36, 37, 52, 53]])
    assert torch.equal(block.vector("second.bias"), expected[16:32])
    assert "head.bias" in block
    assert "attn_q.bias" in block


@pytest.mark.parametrize(("part", "rows"), [(Part("ffn_up_exps", 8, 24), range(8, 24)),
                                            (Part("ffn_up_exps", 1, 3, 8), [1, 2, 9, 10, 17, 18, 25, 26])])  # fmt: skip
def test_of_each_expert_only_the_part_is_read(
    part: Part, rows: range | list[int], tiny_file: Callable[..., Path]
) -> None:
    """As where the gates of all experts are stored above their other projections."""
    path = tiny_file("gpt_oss", experts=4, experts_used=2, expert_ff=32)
    everything, expected = store(path), dense(path)
    block, rows = everything.block(1, {"fused": part}), list(rows)
    for expert in (2, 0, 3):
        everything.reads.clear()
        matrix = block.matrix("fused.weight", expert)
        assert matrix.shape == (len(rows), 64)
        assert torch.equal(tiles_of(matrix), expected["blk.1.ffn_up_exps.weight"][expert][rows])
        assert everything.reads == {"blk.1.ffn_up_exps.weight": len(rows)}
        assert torch.equal(block.vector("fused.bias", expert), expected["blk.1.ffn_up_exps.bias"][expert][rows])


def with_scales(path: Path, target: Path, scales: dict[str, list[float]]) -> Path:
    """Copy an F32 file with further tensors."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, "llama")
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    for name, values in scales.items():
        writer.add_tensor(name, np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_the_gain_of_a_matrix_is_the_files(tmp_path: Path, tiny_file: Callable[..., Path]) -> None:
    scales = {
        "blk.0.attn_output.scale": [0.5], "blk.0.attn_output.input_scale": [7.0], "blk.0.attn_qkv.scale": [0.125],
        "blk.0.ffn_down_exps.scale": [2.0, 3.0, 4.0, 5.0], "blk.0.ffn_up_exps.scale": [6.0],
        "blk.0.ffn_gate_exps.weight.scale": [7.0, 8.0, 9.0, 10.0], "blk.0.ffn_gate_inp.scale": [0.5] * 64,
        "output.scale": [-0.1], "blk.1.attn_output.scale": [math.inf],
    }  # fmt: skip
    path = tiny_file("mixtral", experts=4, experts_used=2, fused_qkv=True)
    everything = store(with_scales(path, tmp_path / "m.gguf", scales), torch.bfloat16)
    block = everything.block(0, {"attn_v": Part("attn_qkv", 8, 16), "attn_output": Part("absent", 0, 8)})
    assert block.gain("attn_output.weight") == 0.5
    assert block.gain("attn_qkv.weight") == block.gain("attn_v.weight") == 0.125
    assert [block.gain("ffn_down_exps.weight", expert) for expert in range(4)] == [2, 3, 4, 5]
    assert [block.gain("ffn_up_exps.weight", expert) for expert in range(4)] == [6] * 4
    assert [block.gain("ffn_gate_exps.weight", expert) for expert in (3, 0)] == [10, 7]
    assert block.gain("ffn_gate_inp.weight") == 1  # one for each column is no factor of the matrix
    assert block.gain("attn_norm.weight") == 1
    assert everything.gain("output.weight") == float(np.float32(-0.1))  # not rounded to the tiles' dtype
    assert everything.gain("token_embd.weight") == 1
    assert not everything.reads
    with pytest.raises(WeightError, match=r"tensor blk.1.attn_output.scale holds NaN or infinite values"):
        everything.block(1, {}).gain("attn_output.weight")


# ---- what is counted


def test_reads_count_rows(small_tiles: int, tiny_file: Callable[..., Path]) -> None:
    everything = store(tiny_file("plain", type="Q8_0", **ROW))
    weight = everything["blk.0.ffn_up.weight"]
    assert not everything.reads  # a handle reads nothing
    list(weight.tiles())
    assert everything.reads == {"blk.0.ffn_up.weight": 24}
    list(weight.rows(3, 14).tiles())
    weight.take([0, 0])
    assert everything.reads == {"blk.0.ffn_up.weight": 24 + 11 + 2}
    everything["output_norm.weight"].dense()
    assert everything.reads["output_norm.weight"] == 1


# ---- what stays between sweeps


def kept(path: Path) -> tuple[WeightStore, list[module.Weight]]:
    """Return a store with room for two dense experts of a layer, and the four of a matrix."""
    everything = store(path)
    row = everything["blk.0.ffn_up_exps.weight"].info.shape
    everything.place(["dense", "file"], {"dense": 2 * row[1] * row[2] * 4})
    block = everything.block(0, {}, live=True)
    return everything, [block.matrix("ffn_up_exps.weight", expert) for expert in range(4)]


def made(everything: WeightStore, *used: module.Weight) -> float:
    """Return how many experts are dequantized when some are used, once each; the values are those of the file."""
    everything.reads.clear()
    for weight in used:
        plain = replace(weight, place="file", store=store(everything.file.path))
        assert torch.equal(torch.cat([tile.clone() for *_, tile in weight.tiles()]), plain.dense())
    return sum(everything.reads.values()) / weight.shape[0]


def test_what_is_asked_for_again_stays(tiny_file: Callable[..., Path]) -> None:
    everything, (a, b, c, d) = kept(tiny_file("mixtral", experts=4, experts_used=2))
    assert (made(everything, a, b), made(everything, a, b)) == (2, 0)
    assert made(everything, c, c) == 2  # no room
    places, room = everything.places, dict(everything.cache.room)
    everything.place(places, room)
    assert made(everything, a, b) == 0
    # Another prompt's: what it does not use gives way, and no more than that is ever kept.
    everything.place(places, room)
    assert (made(everything, b, c), made(everything, b, c)) == (1, 0)
    assert made(everything, a, d) == 2
    assert everything.cache.nbytes == room
    everything.place(places, room)
    assert (made(everything, a, d), made(everything, a, d)) == (2, 0)
    assert everything.cache.nbytes == room
    # Other places: all is given back.
    everything.place(places, {"dense": room["dense"] - 1})
    assert everything.cache.nbytes == {"dense": 0}
    assert (made(everything, a, d), made(everything, a, d)) == (2, 1)


# ---- refusals


def spoiled(path: Path, target: Path, name: str, at: int, value: bytes) -> Path:
    """Copy a file with some bytes of a tensor overwritten."""
    data = bytearray(path.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    data[tensor.data_offset + at : tensor.data_offset + at + len(value)] = value
    target.write_bytes(data)
    return target


NAN16, INF16, NAN32 = np.float16(np.nan).tobytes(), np.float16(np.inf).tobytes(), np.float32(np.nan).tobytes()

# type, byte of the tensor (a row of Q8_0 is 8 blocks of 34 bytes, one of Q4_K a block of 144), value
SPOILS = {
    "NaN scale": ("Q8_0", 20 * 8 * 34 + 34, NAN16),
    "infinite scale": ("Q8_0", 20 * 8 * 34 + 34, INF16),
    "NaN minimum": ("Q4_K", 20 * 144 + 2, NAN16),
    "NaN weight": ("F32", 20 * 1024 + 8, NAN32),
    "infinite weight": ("F16", 20 * 512 + 8, INF16),
}


@pytest.mark.parametrize("kind", SPOILS)
def test_scales_that_are_no_numbers_are_refused_where_they_are_read(
    kind: str, small_tiles: int, tmp_path: Path, tiny_file: Callable[..., Path]
) -> None:
    type_name, at, value = SPOILS[kind]
    name = "blk.0.ffn_up.weight"
    path = spoiled(tiny_file("plain", type=type_name, **ROW), tmp_path / "bad.gguf", name, at, value)
    weight = store(path)[name]
    message = rf"tensor {name} holds NaN or infinite values in row 20: it was quantized or converted wrongly; down"
    for read in (lambda: list(weight.tiles()), weight.dense, lambda: weight.take([0, 20])):
        for _ in range(2):  # the second time as well as the first
            with pytest.raises(WeightError, match=message):
                read()
    assert weight.rows(0, 20).dense().isfinite().all()
    with pytest.raises(WeightError, match=message):
        open_model(path).trace([1, 2, 3])


def test_a_stack_of_experts_is_refused_by_expert_and_row(tmp_path: Path, tiny_file: Callable[..., Path]) -> None:
    """Where a prompt's tokens do not use the expert, nothing is refused."""
    name = "blk.0.ffn_down_exps.weight"
    source = tiny_file("mixtral", experts=4, experts_used=2)
    path = spoiled(source, tmp_path / "bad.gguf", name, (2 * 64 + 7) * 96 * 4, NAN32)
    weight = store(path)[name]
    with pytest.raises(WeightError, match=rf"tensor {name} holds NaN or infinite values in row 7 of expert 2: it was"):
        weight.rows(128, 192).dense()
    assert weight.rows(0, 128).dense().isfinite().all()
    refused = []
    for token in range(20):
        try:
            open_model(path).trace([token])
        except WeightError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 20
    assert all("in row 7 of expert 2: it was" in message for message in refused)
    name = "blk.0.attn_norm.weight"
    vector = store(spoiled(source, tmp_path / "norm.gguf", name, 8, NAN32))[name]
    with pytest.raises(WeightError, match=rf"tensor {name} holds NaN or infinite values: it was"):
        vector.dense()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_token_that_no_text_has_does_not_stop_everything(
    tied: bool, dtype: str, tmp_path: Path, tiny_file: Callable[..., Path]
) -> None:
    """One row of NaN in the vocabulary's matrices: that token is the least likely, all others are as before."""
    whole = path = tiny_file("plain", tied=tied)
    names = ["token_embd.weight", *([] if tied else ["output.weight"])]
    for name in names:
        path = spoiled(path, tmp_path / f"{name}.gguf", name, 77 * 64 * 4 + 8, NAN32)
    model, good = open_model(path, dtype=dtype), open_model(whole, dtype=dtype)
    assert model.weights.warning() is None  # nothing was read
    trace, expected = model.trace([1, 2, 3]), good.trace([1, 2, 3])
    others = [id for id in range(128) if id != 77]
    assert torch.equal(trace.all_logits()[:, others], expected.all_logits()[:, others])
    assert trace.logits.argmin() == 77
    warning = f"{names[-1]}: NaN or infinite values in row 77 of 128, which count as zeros or as the least likely"
    assert (model.weights.warning() or "").startswith(warning)
    J, same = trace.jacobian(), expected.jacobian()
    found, right = (ggjac.spectrum(each, rank=3).data()["triplets"] for each in (J, same))
    assert [one["singular_value"] for one in found] == [one["singular_value"] for one in right]
    assert not any(token["id"] == 77 for one in found for near in one["right"] for token in near["nearest"])
    with pytest.raises(WeightError, match=rf"tensor {names[0]} holds NaN or infinite values in row 77: it was"):
        model.trace([1, 77])
    with pytest.raises(WeightError, match=rf"tensor {names[-1]} holds NaN or infinite values in row 77: it was"):
        ggjac.attribute(J, target=77)
    content = invoke_json("predict", "-m", path, "--tokens", "1,2,3")
    assert content["model"]["warning"] == model.weights.warning()


def test_types_without_a_decoder_are_refused_when_the_file_is_opened(
    monkeypatch: pytest.MonkeyPatch, tiny_file: Callable[..., Path]
) -> None:
    path = tiny_file("plain", type="Q6_K", **ROW)
    monkeypatch.setattr(module.quants, "supported", lambda type: type.name != "Q6_K")
    with pytest.raises(WeightError, match=r"tensor token_embd.weight: type Q6_K is not supported"):
        store(path)


def test_rows_beyond_the_tensor_are_refused(tiny_file: Callable[..., Path]) -> None:
    weight = store(tiny_file("plain"))["output.weight"]
    for rows in ([128], [-1]):
        with pytest.raises(GGUFError, match=r"rows -?\d+:\d+ of output.weight requested, but it has 128"):
            weight.take(rows)


def test_a_sweep_never_holds_a_whole_matrix(monkeypatch: pytest.MonkeyPatch, tiny_file: Callable[..., Path]) -> None:
    """The scratch buffer grows to the largest tile, not to the largest tensor."""
    compute_in(monkeypatch, SMALL_PIECES._replace(tile=256))
    model = open_model(tiny_file("gqa"))
    J = model.trace([1, 2, 3]).jacobian()
    J.rmatmat(torch.eye(64))
    assert model.weights._scratch.tile.nbytes <= 256 * model.dtype.itemsize
    assert math.isclose(J.reconstruction_error, 0, abs_tol=1e-5)


def retyped(file: Path, name: str, before: int, after: int) -> bytes:
    """Return a file in which a matrix has another number of a storage type."""
    data = bytearray(file.read_bytes())
    where = data.index(name.encode()) + len(name) + 4 + 2 * 8  # after the number of dimensions and two sizes
    assert data[where] == before
    data[where] = after
    return bytes(data)


def test_types_that_hold_no_weights_are_refused(tmp_path: Path, tiny_file: Callable[..., Path]) -> None:
    assert [type.name for type in TYPES.values() if not holds_weights(type)] == ["I8", "I16", "I32", "I64", "F64"]
    path = tmp_path / "m.gguf"
    path.write_bytes(retyped(tiny_file("plain"), "blk.0.ffn_up.weight", 0, 24))  # F32, I8
    with pytest.raises(WeightError, match=r"tensor blk.0.ffn_up.weight: type I8 is not supported; supported: F32, "):
        open_model(path)


def test_a_table_holds_integers(tmp_path: Path, tiny_file: Callable[..., Path]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(retyped(tiny_file("deepseek4"), "blk.0.ffn_gate_tid2eid.weight", 26, 0))  # I32, F32
    with pytest.raises(WeightError, match=r"tensor blk.0.ffn_gate_tid2eid.weight: type F32 is not .*; supported: I32$"):
        open_model(path)


# ---- rows of zeros


@pytest.mark.parametrize("width", [1, 4, 8, 9, 64])
def test_runs_of_zero_rows_are_found(width: int) -> None:
    random = np.random.default_rng(0)
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        raw = random.integers(1, 256, (200, width), dtype=np.uint8)
        raw[random.random(200) < share] = 0
        raw[random.random(200) < share, : width - 1] = 0  # all but the last byte
        empty = [not row.any() for row in raw]
        assert [row for first, last in zero_rows(raw) for row in range(first, last)] == list(np.flatnonzero(empty))
        assert all(first < last for first, last in zero_rows(raw))
        assert all(empty[last : last + 1] != [True] for _, last in zero_rows(raw))
    assert zero_rows(np.zeros((0, width), np.uint8)) == []


def zeroed(path: Path, target: Path, spans: dict[str, list[tuple[int, int]]]) -> Path:
    """Write a copy of a file with some rows of its tensors set to zero."""
    raw = bytearray(path.read_bytes())
    with open_gguf(path) as file:
        for name, rows in spans.items():
            info = file.tensors[name]
            for first, last in rows:
                start = info.offset + first * info.row_bytes
                raw[start : start + (last - first) * info.row_bytes] = bytes((last - first) * info.row_bytes)
    target.write_bytes(raw)
    return target


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([(8, 16)], [(8, 16)]),
        ([(3, 4), (6, 11), (13, 20)], [(13, 20)]),  # the others are short
        ([(0, 7)], [(0, 7)]),
        ([(10, 24)], []),  # at the end: padding
        ([(0, 24)], [(0, 24)]),  # the whole matrix
    ],
)
def test_a_hole_in_a_matrix_is_named_by_its_rows(
    rows: list[tuple[int, int]],
    found: list[tuple[int, int]],
    small_tiles: int,
    tiny_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(holes, "LEAST", 7 * 144)  # 7 rows of Q4_K
    monkeypatch.setattr(holes, "LEAST_MATRIX", 24 * 144)
    path = zeroed(tiny_file("plain", type="Q4_K", **ROW), tmp_path / "hole.gguf", {"blk.0.ffn_up.weight": rows})
    weights = store(path)
    weight = weights["blk.0.ffn_up.weight"]
    for _ in range(2):
        list(weight.tiles())
    list(weights["blk.0.ffn_gate.weight"].tiles())
    assert weights.holes.found() == ({"blk.0.ffn_up.weight": found} if found else {})
    warning = weights.holes.warning()
    if found:
        ((first, last),) = found
        assert warning == (
            f"blk.0.ffn_up.weight: rows {first}:{last} of 24 are all zero: is the download complete? "
            "ggjac info --check looks at the whole file"
        )
    else:
        assert warning is None


def test_embeddings_of_tokens_without_text_may_be_zero(
    tiny_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holes, "LEAST", 1)
    path = zeroed(tiny_file("tokenizer"), tmp_path / "zeros.gguf", {"token_embd.weight": [(0, 320)]})
    weights = store(path)
    types = list(weights.file.metadata["tokenizer.ggml.token_type"])
    normal = types.index(1)
    assert types[normal - 1] != 1
    for first, last, expected in ((0, normal, []), (normal - 1, normal + 1, [(normal - 1, normal + 1)])):
        weights = store(path)
        weights["token_embd.weight"].take(range(first, last))
        assert weights.holes.found().get("token_embd.weight", []) == expected
    assert len(types) <= 320


def test_biases_experts_and_parts_of_matrices(
    tiny_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holes, "LEAST", 1)
    path = tiny_file("qwen2moe")
    with open_gguf(path) as file:
        info = file.tensors["blk.0.ffn_up_exps.weight"]
        vectors = [name for name, tensor in file.tensors.items() if len(tensor.shape) == 1]
    experts, out = info.shape[:2]
    assert experts > 2
    spans = {info.name: [(out - 2, out), (out + 1, out + 3), (2 * out, 3 * out)]} | {n: [(0, 1)] for n in vectors}
    weights = store(zeroed(path, tmp_path / "zeros.gguf", spans))
    for name in weights.file.tensors:
        list(weights[name].tiles())
    # The end of an expert may be padding; the middle of one, and a whole one, are not.
    assert weights.holes.found() == {info.name: [(out + 1, out + 3), (2 * out, 3 * out)]}


def test_every_command_says_it(tmp_path: Path) -> None:
    raw = bytearray(demo_path().read_bytes())
    raw[1_000_000:3_000_000] = bytes(2_000_000)
    path = tmp_path / "hole.gguf"
    path.write_bytes(raw)
    words = (
        r"blk\.\d\.\w+\.weight: rows 0:\d+ of \d+ are all zero, and rows of \d+ more tensors: is the download complete"
    )
    prompt = ["-m", path, "--tokens", "0,465,637"]
    for command in (
        ["predict"],
        ["svd", "-k", 1],
        ["analyze", "-k", 1, "--no-verify", "-o", tmp_path / "a"],
    ):
        shown = invoke(*command, *prompt, code=None).stdout
        assert re.search(f"^Warning: {words}", shown, re.MULTILINE), command
    assert re.search(words, json.loads((tmp_path / "a" / "run.json").read_text())["model"]["warning"])
    assert re.search(words, (tmp_path / "a" / "report.html").read_text(encoding="utf-8"))
    found = json.loads(invoke("compare", *prompt, "--with", demo_path(), "-k", 1, "--format", "json", code=None).stdout)
    assert re.search(words, found["model"]["warning"])
    assert found["other_model"]["warning"] is None
    shown = invoke("compare", *prompt, "--with", demo_path(), "-k", 1, code=None).stdout
    assert re.search(f"^Warning: a: {words}", shown, re.MULTILINE)
