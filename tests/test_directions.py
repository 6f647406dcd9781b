"""Directions from files: vectors as numpy, safetensors and gguf-py read them, and one line for all that is not one."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers import FIRST, TOKENS, invoke
from safetensors.torch import load_file, save_file

from ggjac.directions import Direction, DirectionError, read_direction
from ggjac.llamacpp.control_vector import save_control_vector

D = 64
SEED = np.random.default_rng(3)
ROWS = SEED.standard_normal((3, D))


def read(asked: object, **options: object) -> Direction:
    return read_direction(str(asked), (D,), **options)  # type: ignore[arg-type]


def control(path: Path, directions: dict[int, np.ndarray], count: int = 5) -> Path:
    """Write a control vector as llama.cpp's cvector-generator does: one direction for each block after the first."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_uint32("controlvector.layer_count", count)
    for i in range(1, count + 1):
        writer.add_tensor(f"direction.{i}", directions.get(i, np.zeros(D)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((D,), "probe"),
        ((1, D), "probe"),  # as scikit-learn's coef_
        ((D, 1), "probe"),
        ((3, D), "probe[1]"),
        ((3, D), "probe[-3,:]"),
        ((D, 3), "probe[:,1]"),
        ((2, 3, D), "probe[1,0]"),
        ((2, D, 3), "probe[1,:,2]"),
    ],
)
def test_a_vector_of_a_safetensors_file(dtype: torch.dtype, shape: tuple[int, ...], name: str, tmp_path: Path) -> None:
    tensor = torch.from_numpy(SEED.standard_normal(shape)).to(dtype)
    save_file({"probe": tensor, "ids": torch.arange(3)}, tmp_path / "f.safetensors")
    wanted = eval(name, {"probe": tensor}).flatten().double()
    found = read(f"{tmp_path / 'f.safetensors'}:{name}")
    assert found.vector.dtype == torch.float64
    assert found.vector.tolist() == wanted.tolist()
    assert (found.file, found.name, found.layer) == (str(tmp_path / "f.safetensors"), name, None)


@pytest.mark.parametrize("dtype", ["<f8", "<f4", "<f2", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_vector_of_an_npy_file(dtype: str, order: str, tmp_path: Path) -> None:
    path = tmp_path / "f.npy"
    np.save(path, np.asarray(ROWS, dtype, order=order))  # type: ignore[call-overload]
    assert read(f"{path}:[2]").vector.tolist() == ROWS[2].astype(dtype).tolist()
    np.save(path, ROWS[1].astype(dtype))
    assert read(path).vector.tolist() == ROWS[1].astype(dtype).tolist()


def test_a_vector_of_a_gguf_model(tiny_files: dict[str, Path]) -> None:
    """Rows and columns as gguf-py dequantizes them, of experts too."""
    path = tiny_files["mixtral"]
    known = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    head, experts, norm = (
        known[name] for name in ("output.weight", "blk.1.ffn_down_exps.weight", "output_norm.weight")
    )
    for name, wanted in (
        ("output.weight[42]", head[42]),
        ("blk.1.ffn_down_exps.weight[2,:,5]", experts[2, :, 5]),
        ("blk.1.ffn_down_exps.weight[:,7,5]", experts[:, 7, 5]),
        ("blk.0.ffn_gate_exps.weight[1,7]", known["blk.0.ffn_gate_exps.weight"][1, 7]),
        ("output_norm.weight", norm),
        ("output.weight[42]-[7]", head[42].astype(np.float64) - head[7]),
        ("blk.1.ffn_down_exps.weight[2,:,5]-[0,:,-1]", experts[2, :, 5].astype(np.float64) - experts[0, :, -1]),
    ):
        assert read_direction(f"{path}:{name}").vector.tolist() == wanted.astype(np.float64).tolist()
    for name, words in (
        ("output.weight[42]-[42]", "is zero, which is no direction"),
        ("output.weight[42]-[:,1]", "has 64 and 128 elements"),
        ("output.weight[42]-[999]", "index 999 is out of range"),
        ("output.weight[42]-", "no such tensor"),
    ):
        with pytest.raises(DirectionError, match=words):
            read_direction(f"{path}:{name}")


def test_the_only_tensor_needs_no_name(tmp_path: Path) -> None:
    save_file({"probe.weight": torch.from_numpy(ROWS[:1].copy())}, tmp_path / "one.safetensors")
    found = read(tmp_path / "one.safetensors")
    assert (found.vector.tolist(), found.name) == (ROWS[0].tolist(), "probe.weight")


def test_a_control_vector_is_where_llamacpp_adds_it(tmp_path: Path) -> None:
    """`direction.N` is added to the output of block N, counted from 0: to the stream after N + 1 blocks."""
    save_control_vector(tmp_path / "v.gguf", torch.from_numpy(ROWS[0]), layer=3, block_count=5, architecture="llama")
    found = read(tmp_path / "v.gguf")
    assert (found.name, found.layer) == ("direction.2", 3)
    assert found.vector.tolist() == ROWS[0].astype(np.float32).tolist()
    # One direction is not zero: it is meant at every layer.
    assert read(tmp_path / "v.gguf", layer=5).name == "direction.2"

    path = control(tmp_path / "many.gguf", {2: ROWS[0], 3: ROWS[1], 5: ROWS[2]})
    assert read(path, layer=4)[3:5] == ("direction.3", 4)
    assert read(f"{path}:direction.5", layer=2)[3:5] == ("direction.5", 6)
    for layer in (None, 5):
        with pytest.raises(DirectionError, match=r"has 3 directions that are not zero; name one, .*direction.2 \[64\]"):
            read(path, layer=layer)
    with pytest.raises(DirectionError, match=r"direction.1: is zero, which is no direction"):
        read(f"{path}:direction.1")
    with pytest.raises(DirectionError, match="has no direction that is not zero"):
        read(control(tmp_path / "none.gguf", {}))


def test_colons_are_part_of_a_path(tmp_path: Path) -> None:
    for name in ("C:x.npy", "a:b:c.npy", "v.npy:[1]"):
        np.save(tmp_path / "saved.npy", ROWS)
        (tmp_path / "saved.npy").rename(tmp_path / name)
        np.save(tmp_path / f"{name[0]}.npy", ROWS[0])  # `v.npy` beside `v.npy:[1]`: the longest path is meant
        assert read(f"{tmp_path / name}:[2]")[2:4] == (str(tmp_path / name), "[2]")
    save_file({"a:b": torch.from_numpy(ROWS), "c": torch.ones(1)}, tmp_path / "s")
    assert read(f"{tmp_path / 's'}:a:b[1]").name == "a:b[1]"
    save_file({"a[1]": torch.from_numpy(ROWS), "c": torch.ones(1)}, tmp_path / "s")  # a name as it is stored is first
    assert read(f"{tmp_path / 's'}:a[1][2]").vector.tolist() == ROWS[2].tolist()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", r"has 5 tensors; name one, as FILE:NAME: "),
        (":absent", r"f.safetensors:absent: no such tensor; there are 5: "),
        (":a\x1b[2J", r"\\x1b\[2J': no such tensor"),
        (":rows", r"shape \[3, 64\] leaves 2 axes; choose one vector, as rows\[0\]"),
        (":rows[1,2]", "is a single number; a direction is a vector"),
        (":rows[1,2,3]", r"cannot be looked up in shape \[3, 64\]; write the vector as rows\[0\]"),
        (":rows[x]", r"cannot be looked up in shape \[3, 64\]"),
        (":rows[]", r"cannot be looked up in shape \[3, 64\]"),
        (":rows[0:2]", r"cannot be looked up in shape \[3, 64\]"),
        (":rows[3]", r"index 3 is out of range in shape \[3, 64\]"),
        (":rows[-4]", r"index -4 is out of range"),
        (":rows[:,3]", "has 3 elements, and the model's vectors there have 64"),
        (":cube", r"shape \[2, 3, 64\] leaves 3 axes; choose one vector, as cube\[0,0\]"),
        (":ids", "is of type I64; a direction has F64, F32, F16 or BF16"),
        (":nan", "has elements that are not finite; give another vector"),
        (":zero", "is zero, which is no direction"),
    ],
)
def test_what_is_no_vector_is_said_in_a_line(name: str, words: str, tmp_path: Path) -> None:
    tensors = {"rows": torch.from_numpy(ROWS), "cube": torch.ones(2, 3, D), "ids": torch.arange(D)}
    tensors |= {"nan": torch.full((D,), torch.nan), "zero": torch.zeros(D)}
    save_file(tensors, tmp_path / "f.safetensors")
    with pytest.raises(DirectionError, match=words) as found:
        read(f"{tmp_path / 'f.safetensors'}{name}")
    assert str(found.value).isprintable()


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"v": torch.ones(D)}, tmp_path / "checkpoint.pt")
    np.savez(tmp_path / "many.npz", v=ROWS)
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "whole.npy", ROWS)
    np.save(tmp_path / "complex.npy", ROWS + 1j)
    np.save(tmp_path / "number.npy", np.float64(3))
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("0.1 0.2")
    save_file({"v": torch.ones(D)}, tmp_path / "s")
    cut = {"cut.npy": (tmp_path / "whole.npy").read_bytes()[:-8], "cut.safetensors": (tmp_path / "s").read_bytes()[:-8]}
    header = json.dumps({"v": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}}).encode()
    cut["huge.safetensors"] = len(header).to_bytes(8, "little") + header
    cut["endless.safetensors"] = b"\xff" * 64
    start = np.lib.format.magic(1, 0) + (4096).to_bytes(2, "little")
    headers = {"huge": str({"descr": "<f8", "fortran_order": False, "shape": (1 << 62, 64)})}
    headers |= {"truth": headers["huge"].replace(str(1 << 62), "True"), "open": "(", "deep": "-" * 4000 + "1"}
    cut |= {f"{name}.npy": start + text.encode().ljust(4095) + b"\n" + bytes(512) for name, text in headers.items()}
    control(tmp_path / "none.gguf", {}, 0)
    for name, content in cut.items():
        (tmp_path / name).write_bytes(content)
    for name, words in (
        ("checkpoint.pt", "is a zip archive, such as an npz file or a PyTorch checkpoint, which is not read; save"),
        ("many.npz", "is a zip archive"),
        ("objects.npy", "cannot be read as safetensors, npy or GGUF .*Python objects"),
        ("complex.npy", "is of type complex128"),
        ("number.npy", "is a single number"),
        ("none.gguf", "none.gguf: has no tensors; save the vector"),
        ("whole.npy", r"shape \[3, 64\] leaves 2 axes; choose one vector, as '?\[0\]"),
        *((name, "cannot be read as safetensors, npy or GGUF") for name in ("empty", "text", *cut)),
        ("absent", "absent: no such file; name one, as FILE or FILE:NAME"),
        ("absent.npy:[3]", "no such file"),
        ("whole.npy[0]", r"no such file; a vector of .*whole\.npy'? is written .*whole\.npy:\[0\]"),
        ("", "is a folder; name a file"),
    ):
        with pytest.raises(DirectionError, match=words) as found:
            read(f"{tmp_path}/{name}" if name else tmp_path)
        assert "\n" not in str(found.value)
    with pytest.raises(DirectionError, match=r"singular vectors are directions of steer alone: save them \(svd -o"):
        read("left:1")
    with pytest.raises(DirectionError, match=r"fisher:0'?: no such file; Fisher directions are counted from 1"):
        read("fisher:0")
    for odd in ("", ":", "x\0y:z", "x" * 5000):
        with pytest.raises(DirectionError, match="no such file"):
            read(odd)
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + b"\0" * 20)
    with pytest.raises(DirectionError, match=r"damaged.gguf"):
        read(tmp_path / "damaged.gguf")


def test_a_model_whose_type_cannot_be_looked_up(tiny_files: dict[str, Path]) -> None:
    path = tiny_files[FIRST["llama"]]
    with pytest.raises(DirectionError, match=r"no such tensor; there are \d+: .* and \d+ more"):
        read(f"{path}:blk.0.absent")


def test_the_file_of_a_decomposition_is_read_back(tmp_path: Path, tiny_files: dict[str, Path]) -> None:

    path, out = tiny_files[FIRST["llama"]], tmp_path / "svd.safetensors"
    invoke("svd", "-m", path, *TOKENS, "-k", "2", "-q", "-o", out)
    saved = load_file(out)
    assert read(f"{out}:U[1]").vector.tolist() == saved["U"][1].double().tolist()
    assert read(f"{out}:Vh[1,3]").vector.tolist() == saved["Vh"][1, 3].double().tolist()
