"""Every dequantizer against gguf-py, bit for bit: the sign of a zero counts too.

One contract runs over every type, on every path that can compute it. Q1_0 and Q2_0, which gguf-py does not know, and
F64, which it leaves alone, have a reference here.
"""

import ctypes
import importlib.util
import itertools
from functools import cache

import gguf
import numpy as np
import pytest
import torch
from helpers import lacking
from quantized import NAMED, assert_same_bits, edge_blocks, random_blocks, reference

from ggjac import quants
from ggjac.gguf.types import TYPES, GGMLType

INTEGERS = {"I8", "I16", "I32", "I64"}
FLOATS = [type for type in TYPES.values() if type.name not in INTEGERS]
PATHS = ("torch", "native", "fallback")

every_type = pytest.mark.parametrize("type", FLOATS, ids=lambda type: type.name)


@pytest.fixture
def without_native(monkeypatch):
    """Leave libggml out, as on a machine without llama-cpp-python."""
    monkeypatch.setenv("GGJAC_NATIVE", "0")
    quants.native_library.cache_clear()
    quants._native.cache_clear()
    yield
    quants.native_library.cache_clear()
    quants._native.cache_clear()


@pytest.fixture(params=PATHS)
def compute(request):
    """Return a function of (raw, type) for one path."""
    if request.param == "torch":
        return lambda raw, type: quants.dequantize(torch.from_numpy(raw.copy()), type)
    if request.param == "fallback":
        request.getfixturevalue("without_native")
    elif quants.native_library() is None:
        pytest.skip("libggml is not installed (pip install llama-cpp-python)")
    return quants.dequantize_rows


@cache
def rows_of(type: GGMLType, rows: int, blocks: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Random rows and their elements, computed once."""
    raw = random_blocks(type, rows * blocks, seed=rows).reshape(rows, -1)
    return raw, reference(raw, type)


# ----------------------------------------------------------------------------------------------------------------------
# The contract


def test_every_floating_point_type_is_supported():
    floats = {type.name for type in FLOATS}
    assert not lacking({"TYPES of ggjac/gguf/types.py": floats, "FORMATS of ggjac/quants.py": set(quants.FORMATS)})
    assert {type.name for type in TYPES.values() if quants.supported(type)} == floats


def test_every_type_that_gguf_knows_is_here():
    known = {"F32", "F16"} | {qtype.name for qtype in gguf.quants._type_traits}
    assert not known - set(NAMED), "TYPES of ggjac/gguf/types.py lacks them"


@every_type
def test_random_blocks(type, compute):
    raw, expected = rows_of(type, 67)
    assert_same_bits(compute(raw, type), expected)


@every_type
def test_edge_blocks(type, compute):
    raw = edge_blocks(type)
    assert_same_bits(compute(raw, type), reference(raw, type))


@every_type
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rows_split_over_threads(type, rows, threads):
    raw, expected = rows_of(type, 7)
    assert_same_bits(quants.dequantize_rows(raw[:rows], type, threads=threads), expected[:rows])


@every_type
def test_tiles(type, compute, monkeypatch):
    for name in ("TILE", "NATIVE_TILE"):
        monkeypatch.setattr(quants, name, 2 * 3 * type.block_size)  # two rows, so that seven end in half a tile
    raw, expected = rows_of(type, 7)
    assert_same_bits(compute(raw, type), expected)


@every_type
@pytest.mark.parametrize(
    "view",
    [np.s_[::2], np.s_[::-1], np.s_[1:6, :], np.s_[5:6], np.s_[:0]],
    ids=["step", "reverse", "range", "one", "none"],
)
def test_strided_rows(type, view, compute, monkeypatch):
    for name in ("TILE", "NATIVE_TILE"):
        monkeypatch.setattr(quants, name, 2 * 3 * type.block_size)
    raw, expected = rows_of(type, 7)
    assert_same_bits(compute(raw[view], type), expected[view])


@every_type
def test_columns_of_rows(type, compute):
    """A range of blocks of every row: strided rows, and an odd first byte for odd blocks."""
    raw, expected = rows_of(type, 7)
    a, b = type.block_bytes, type.block_size
    assert_same_bits(compute(raw[:, a : 2 * a], type), expected[:, b : 2 * b])


@every_type
def test_mapped_file(type, compute, tmp_path):
    """A read-only view is taken without a warning."""
    raw, expected = rows_of(type, 7)
    path = tmp_path / "raw"
    path.write_bytes(raw.tobytes())
    mapped = np.memmap(path, np.uint8, "r", shape=raw.shape)
    assert_same_bits(compute(mapped[2:], type), expected[2:])


@every_type
def test_out_is_overwritten_and_returned(type, request):
    raw, expected = rows_of(type, 7)
    out = torch.full(expected.shape, torch.nan)
    assert quants.dequantize_rows(raw, type, out, threads=2) is out
    assert_same_bits(out, expected)
    request.getfixturevalue("without_native")
    out.fill_(torch.nan)
    assert quants.dequantize_rows(raw, type, out) is out
    assert_same_bits(out, expected)


@every_type
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
def test_other_dtypes_are_converted_tile_by_tile(type, dtype, threads, monkeypatch):
    for name in ("TILE", "NATIVE_TILE"):
        monkeypatch.setattr(quants, name, 2 * 3 * type.block_size)
    raw, expected = rows_of(type, 7)
    out = torch.full(expected.shape, torch.nan, dtype=dtype)
    assert quants.dequantize_rows(raw, type, out, threads=threads) is out
    assert torch.equal(out, torch.as_tensor(expected).to(dtype))


def test_threads_do_not_start_threads_of_their_own():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        quants._pool.cache_clear()
        # Asked after an operation that torch would share among its threads.
        found = quants._pool().map(lambda _: (torch.zeros(1 << 20).bfloat16(), torch.get_num_threads())[1], range(8))
        assert set(found) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@every_type
def test_leading_and_strided_dimensions(type):
    raw, expected = rows_of(type, 6)
    data = torch.from_numpy(raw)
    assert_same_bits(quants.dequantize(data[0], type), expected[0])
    assert_same_bits(quants.dequantize(data.reshape(1, 2, 3, -1), type), expected.reshape(1, 2, 3, -1))
    assert_same_bits(quants.dequantize(data[::2], type), expected[::2])
    a, b = type.block_bytes, type.block_size
    assert_same_bits(quants.dequantize(data[:, a : 2 * a], type), expected[:, b : 2 * b])
    empty = torch.zeros(2, 0, raw.shape[1], dtype=torch.uint8)
    assert quants.dequantize(empty, type).shape == (2, 0, expected.shape[1])


@every_type
def test_odd_address(type):
    """Rows that begin at an odd byte of a tensor, which torch cannot view as wider words."""
    raw, expected = rows_of(type, 6)
    data = torch.from_numpy(np.concatenate([[0], raw.ravel()]).astype(np.uint8))[1:].reshape(raw.shape)
    assert_same_bits(quants.dequantize(data, type), expected)
    assert_same_bits(quants.dequantize(data[:1], type), expected[:1])


@every_type
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_cast(type, dtype):
    raw, _ = rows_of(type, 6)
    data = torch.from_numpy(raw)
    found = quants.dequantize(data, type, dtype)
    expected = data.view(torch.float64).to(dtype) if type.name == "F64" else quants.dequantize(data, type).to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_type
def test_device(type):
    for raw in (rows_of(type, 67)[0], edge_blocks(type)):
        found = quants.dequantize(torch.from_numpy(raw).cuda(), type)
        assert found.is_cuda
        assert_same_bits(found.cpu(), reference(raw, type))


# ----------------------------------------------------------------------------------------------------------------------
# Scales that are not finite


@every_type
def test_invalid_scales_are_found(type):
    """Words of ones at every byte of a block of zeros: what turns an element infinite or NaN is an invalid scale."""
    blocks = [np.zeros(type.block_bytes, np.uint8), random_blocks(type, 1)[0]]
    for width, byte in itertools.product((1, 2, 4, 8), range(type.block_bytes)):
        block = np.zeros(type.block_bytes, np.uint8)
        block[byte : byte + width] = 255
        blocks.append(block)
    with np.errstate(all="ignore"):
        expected = ~np.isfinite(reference(np.stack(blocks), type)).all(1)
    if type.name == "MXFP4":  # NaN by the standard, 2^127 to ggml's arithmetic
        expected = np.array([block[0] == 255 for block in blocks])
    if type.name == "F64":  # finite, but not as a float32
        expected = np.array([not np.isfinite(block.view(np.float64)[0]) for block in blocks])
    found = [quants.has_invalid_scales(block[None], type) for block in blocks]
    assert found == expected.tolist()
    assert not found[0]
    assert any(found) == (type.name != "NVFP4")


@every_type
def test_one_invalid_scale_among_many(type, monkeypatch):
    for name in ("TILE", "NATIVE_TILE"):
        monkeypatch.setattr(quants, name, 2 * 3 * type.block_size)
    raw = rows_of(type, 7)[0].copy()
    assert not quants.has_invalid_scales(raw, type)
    assert not quants.has_invalid_scales(raw[:0], type)
    raw[6, -type.block_bytes :] = 255
    assert quants.has_invalid_scales(raw, type) == (type.name != "NVFP4")
    assert not quants.has_invalid_scales(raw[:6], type)
    assert quants.has_invalid_scales(raw[::-2], type) == (type.name != "NVFP4")


@every_type
def test_invalid_scales_agree_with_ggml(type):
    if quants.native_library() is None:
        pytest.skip("libggml is not installed (pip install llama-cpp-python)")
    validate = quants.native_library().ggml_validate_row_data
    validate.argtypes, validate.restype = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_bool
    if type.name == "F64":
        pytest.skip("ggml judges a float64 by its float32")
    for seed in range(20):
        # Plain random bytes: a scale in 32 is not finite.
        raw = np.random.default_rng(seed).integers(0, 256, (1, 2 * type.block_bytes), dtype=np.uint8)
        assert quants.has_invalid_scales(raw, type) == (not validate(type.id, raw.ctypes.data, raw.size))


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("name", sorted(INTEGERS))
def test_unsupported_type_is_named(name):
    type = NAMED[name]
    assert not quants.supported(type)
    for call in (quants.dequantize_rows, quants.has_invalid_scales):
        with pytest.raises(ValueError, match=rf"type {name} cannot be dequantized; supported: F32, F16, Q4_0.*Q4_K"):
            call(np.zeros((1, 8), np.uint8), type)
    with pytest.raises(ValueError, match=rf"type {name} cannot be dequantized"):
        quants.dequantize(torch.zeros(1, 8, dtype=torch.uint8), type)


@every_type
def test_partial_block(type):
    if type.block_bytes == 1:
        return
    size = 3 * type.block_bytes - 1
    for call, data in (
        (quants.dequantize, torch.zeros(2, size, dtype=torch.uint8)),
        (quants.dequantize_rows, np.zeros((2, size), np.uint8)),
        (quants.has_invalid_scales, np.zeros((2, size), np.uint8)),
    ):
        with pytest.raises(ValueError, match=rf"{type.name}: a row of {size} bytes is not a whole number of blocks"):
            call(data, type)


def test_wrong_data():
    q8_0 = NAMED["Q8_0"]
    with pytest.raises(ValueError, match=r"Q8_0: expected uint8 \[..., row_bytes\], found float32 \[2, 34\]"):
        quants.dequantize(torch.zeros(2, 34), q8_0)
    with pytest.raises(ValueError, match=r"expected raw as uint8 \[rows, row_bytes\], found uint8 \[34\]"):
        quants.dequantize_rows(np.zeros(34, np.uint8), q8_0)
    with pytest.raises(ValueError, match=r"expected raw as uint8 \[rows, row_bytes\], found int8 \[1, 34\]"):
        quants.dequantize_rows(np.zeros((1, 34), np.int8), q8_0)
    with pytest.raises(ValueError, match="threads=0"):
        quants.dequantize_rows(np.zeros((1, 34), np.uint8), q8_0, threads=0)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.zeros(2, 31), r"out must be floats \[2, 32\] on the CPU, found float32 \[2, 31\] on cpu"),
        (torch.zeros(3, 32), r"found float32 \[3, 32\]"),
        (torch.zeros(2, 32, dtype=torch.int32), r"found int32 \[2, 32\]"),
        (torch.zeros(32, 2).T, r"out must be contiguous, found strides \[1, 2\]"),
    ],
)
def test_wrong_out(out, message):
    """A buffer that C would overrun is refused."""
    with pytest.raises(ValueError, match=message):
        quants.dequantize_rows(np.zeros((2, 34), np.uint8), NAMED["Q8_0"], out)


# ----------------------------------------------------------------------------------------------------------------------
# libggml


def test_environment_leaves_libggml_out(without_native):
    assert quants.native_library() is None
    assert quants._native(NAMED["Q4_0"]) is None


def test_libggml_is_found_and_knows_every_quantized_type():
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    quantized = {type.name for type in FLOATS if type.block_size > 1}
    assert {name for name in quantized if quants._native(NAMED[name])} == quantized


def test_library_that_gets_the_known_block_wrong_is_refused(without_native, monkeypatch):
    class Library(ctypes.CDLL):
        def __init__(self, path):
            opened.append(path)

        @staticmethod
        def dequantize_row_q8_0(raw, out, elements):
            pass

    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    opened = []
    monkeypatch.delenv("GGJAC_NATIVE")
    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert quants.native_library() is None
    assert opened


def test_type_that_libggml_lays_out_otherwise_is_left_to_torch(without_native, monkeypatch):
    monkeypatch.delenv("GGJAC_NATIVE")
    if quants.native_library() is None:
        pytest.skip("libggml is not installed (pip install llama-cpp-python)")
    monkeypatch.setitem(quants.FORMATS, "Q4_0", quants.FORMATS["IQ4_NL"])
    assert quants._native(NAMED["Q4_0"]) is None
    assert quants._native(NAMED["Q4_1"]) is not None
