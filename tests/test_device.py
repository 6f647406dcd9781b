"""Devices with memory of their own, against the CPU: the card of `card.py`, and a GPU where there is one.

The card computes with the CPU's own arithmetic, so that every number must be equal to the last bit: what is tested is
the way of the data. A GPU rounds otherwise; its tests are marked `cuda`.
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import card
import numpy as np
import pytest
import tiny
import torch
from commands import COMMANDS, with_file
from helpers import FIRST, compute_in, invoke
from torch import Tensor
from torch.utils import backend_registration

from ggjac import planner, quants, sizes, svd
from ggjac.gguf.types import TYPES, GGMLType
from ggjac.jacobian.tapes import Tapes
from ggjac.model import find_device, open_model
from ggjac.planner import memory
from ggjac.planner import plan as plans
from ggjac.weights import bus
from ggjac.weights.bus import Bus, Pinned

TinyFile = Callable[..., Path]
IDS = [5, 17, 3, 99, 42, 8]
# Rounding in another order, in a network of a few layers.
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-5}
WITH_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# Torch pins memory for one kind of device only.
WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU stands in for the card")


@pytest.fixture
def one_card() -> Iterator[card.Card]:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch knows no devices that are written in Python")
    with card.installed() as installed:
        yield installed


@pytest.fixture(
    params=[pytest.param("card", marks=WITHOUT_CUDA), pytest.param("cuda", marks=[pytest.mark.cuda, WITH_CUDA])]
)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "card":
        request.getfixturevalue("one_card")
    return request.param


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.device.type != "cpu"
    there, found = found.device.type, found.cpu()
    if there == card.NAME:
        assert torch.equal(found, expected)
    else:
        assert float((found - expected).norm() / expected.norm()) < CLOSE[expected.dtype]


@contextlib.contextmanager
def waiting_for_nothing(device: str) -> Iterator[None]:
    """Fail if what happens in this block makes the host wait for the device."""
    if device == card.NAME:
        card.CARD.waits.clear()
        yield
        assert not card.CARD.waits
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- numbers


# The card gives the CPU's own bits in every dtype: one of them shows all that happens there.
@pytest.mark.parametrize("architecture", FIRST)
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("card", "float32", marks=WITHOUT_CUDA),
        *(pytest.param("cuda", dtype, marks=[pytest.mark.cuda, WITH_CUDA]) for dtype in ("float32", "float64")),
    ],
    indirect=["device"],
)
def test_every_architecture(architecture: str, dtype: str, device: str, tiny_file: TinyFile) -> None:
    case = FIRST[architecture]
    here, there = (open_model(tiny_file(case), dtype=dtype, device=d, threads=1) for d in ("cpu", device))
    ids = tiny.prompt(case, 6)
    expected, found = here.trace(ids), there.trace(ids)
    assert_same(found.all_logits(), expected.all_logits())
    J, K = expected.jacobian(), found.jacobian()
    assert_same(K.to_dense(), J.to_dense())
    assert_same(K.matmat(K.x[None], K.x.new_ones(1)), J.matmat(J.x[None], J.x.new_ones(1)))
    if J.offset.any():
        assert_same(K.offset, J.offset)
    Y, inner = K.output[None], found.jacobian(3)
    with waiting_for_nothing(device):
        K.rmatmat(Y)
        K.matmat(K.x[None])
        inner.rmatmat(Y)


@pytest.mark.parametrize("case", ["gqa", "gemma4"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_decomposition(case: str, dtype: str, device: str, tiny_file: TinyFile) -> None:
    """It knows products alone, whatever network they are of."""
    models = (open_model(tiny_file(case), dtype=dtype, device=d, threads=1) for d in ("cpu", device))
    expected, found = (model.trace(tiny.prompt(case, 6)).jacobian() for model in models)
    there, here = (J.svd(2, max_sweeps=4) for J in (found, expected))
    for name in ("U", "S", "Vh"):
        assert_same(getattr(there, name), getattr(here, name))


@pytest.mark.parametrize("experts", [6, 12])
def test_a_trace_waits_once_for_each_look(experts: int, one_card: card.Card, tiny_file: TinyFile) -> None:
    """At the stream after each block, at the outputs, and at each router's choice, however many experts there are."""
    model = open_model(tiny_file("qwen3moe", experts=experts, layers=3), device=card.NAME)
    model.embed(IDS)
    one_card.waits.clear()
    trace = model.trace(IDS)
    assert max(len(tape.ffn.networks) for tape in trace.tapes) > 3
    assert one_card.waits.pop("_local_scalar_dense") == 3 + 1
    assert one_card.waits.pop("_to_copy") == 3 + 2  # and cosines and sines
    assert not one_card.waits


def test_tapes_from_a_folder_are_where_they_were(device: str, tiny_file: TinyFile, tmp_path: Path) -> None:
    """Positions of experts on the host, and everything else on the device."""
    model = open_model(tiny_file("qwen3moe"), device=device)
    expected, found = model.trace(IDS), model.trace(IDS, tapes=Tapes(tmp_path, resident=False))
    (kept, read) = (trace.tapes[1].ffn.networks[0] for trace in (expected, found))
    for part in (kept, read):
        assert part.positions.device.type == "cpu"
        assert part.factor.device.type == device
    J = expected.jacobian(3)
    assert_same(found.jacobian(3).rmatmat(J.output[None]), J.rmatmat(J.output[None]).cpu())


def test_lengths_of_a_product_come_back_alone(one_card: card.Card) -> None:
    """And the whole product where the device has no float64."""
    rows = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    there, expected = rows.to(card.NAME), torch.linalg.vector_norm(rows.double(), dim=1)
    moved: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "cpu", lambda tensor: moved.append(tensor.numel()) or tensor.to("cpu"))
        assert torch.equal(svd._lengths(there), expected)
        one_card.refused = {torch.float64}
        assert torch.equal(svd._lengths(there), expected)
    assert moved == [3, 3000, 3]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype: str, device: str, tiny_file: TinyFile) -> None:
    path = tiny_file("gqa", type="Q8_0")
    K = open_model(path, dtype=dtype, device=device).trace(IDS).jacobian()
    assert K.reconstruction_error < K.reconstruction_limit
    if device == card.NAME:
        J = open_model(path, dtype=dtype, device="cpu").trace(IDS).jacobian()
        assert_same(K.to_dense(), J.to_dense())


# ---- where weights wait


PLACES = [
    ["file"] * 4,
    ["pinned"] * 4,
    ["device"] * 4,
    ["dense"] * 4,
    ["file", "pinned", "device", "dense"],
    ["dense", "device", "pinned", "file"],
]


@pytest.mark.parametrize("place", ["file", "pinned", "device", "dense"])
def test_parts_with_gaps_wait_there_too(place: str, device: str, tiny_file: TinyFile) -> None:
    path, part = tiny_file("plain", type="Q8_0"), {"part": sizes.Part("attn_q", 3, 7, 16)}
    there, here = (open_model(path, device=name).weights for name in (device, "cpu"))
    there.place([place] * 2, {"pinned": 1 << 22, "device": 1 << 22, "dense": 1 << 24})
    found, expected = (weights.block(0, part, live=True).matrix("part.weight") for weights in (there, here))
    for _ in range(3):
        assert_same(found.dense(), expected.dense())
    assert there.reads["blk.0.attn_q.weight"] == (16 if place == "dense" else 48)


@pytest.mark.parametrize("places", PLACES, ids="-".join)
def test_weights_wait_where_they_should(
    places: list[str], device: str, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_in(monkeypatch, sizes.SMALL_PIECES._replace(tile=9 * 96))  # several tiles a matrix, of uneven sizes
    path = tiny_file("plain", layers=4, type="Q8_0")
    model = open_model(path, device=device)
    expected = open_model(path, device="cpu").trace(IDS).jacobian()
    nbytes = [layer.sweep.nbytes for layer in model.plan(IDS, "svd", rank=1).layers]
    model.weights.place(places, {"pinned": 1 << 22, "device": 1 << 22, "dense": 1 << 24})
    K = model.trace(IDS).jacobian()
    for sweep in range(3):
        before, read = card.CARD.copied, model.weights.bytes_read
        assert_same(K.rmatmat(K.output[None]), expected.rmatmat(expected.output[None]))
        if device != card.NAME:
            continue
        moved = range(4) if sweep == 0 else [i for i, place in enumerate(places) if place in ("file", "pinned")]
        ready = [] if sweep == 0 else [i for i, place in enumerate(places) if place == "dense"]
        assert card.CARD.copied - before == sum(nbytes[i] for i in moved)
        assert model.weights.bytes_read - read == sum(nbytes[i] for i in range(4) if i not in ready)


def test_the_file_is_not_read_again_for_what_waits(
    one_card: card.Card, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the file holds by then: pinned and device bytes are copies."""
    model = open_model(tiny_file("plain", layers=3, type="Q8_0"), device=card.NAME)
    model.weights.place(["pinned", "device", "dense"], {"pinned": 1 << 22, "device": 1 << 22, "dense": 1 << 24})
    K = model.trace(IDS).jacobian()
    first = K.rmatmat(K.output[None]).cpu()

    def gone(*_: object) -> None:
        raise AssertionError("the file was read")

    monkeypatch.setattr(type(model.gguf), "rows", gone)
    assert torch.equal(K.rmatmat(K.output[None]).cpu(), first)


# ---- memory


def test_the_host_is_never_far_ahead(one_card: card.Card, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the device takes, few tiles are on their way: no more pinned memory, no more bytes on the device."""
    rows = 5
    compute_in(monkeypatch, sizes.SMALL_PIECES._replace(tile=rows * 96))
    model = open_model(tiny_file("plain", layers=3, type="Q8_0"), device=card.NAME)
    model.weights.place(["pinned", "file", "file"], {"pinned": 1 << 22})
    K = model.trace(IDS).jacobian()
    K.to_dense()
    assert one_card.copies > 200
    assert one_card.lead == sizes.ON_THE_WAY
    largest = max(
        info.row_bytes * min(info.rows, max(1, rows * 96 // info.shape[-1])) for info in model.gguf.tensors.values()
    )
    slots = sizes.ON_THE_WAY * (1 << (largest - 1).bit_length())
    assert one_card.pinned_peak <= slots + (1 << 22)


def test_a_buffer_is_not_filled_again_before_it_has_been_copied(one_card: card.Card) -> None:
    """The emulated copy takes place as late as it may."""
    way = Bus(torch.device(card.NAME, 0))
    pieces = [np.full((2, 3), i, np.uint8) for i in range(3 * sizes.ON_THE_WAY)]
    arrived = []
    for piece in pieces:
        with way.sent(piece) as there:
            arrived.append(there + 0)
    assert [torch.unique(there.cpu()).tolist() for there in arrived] == [[i] for i in range(len(pieces))]


def test_rows_with_gaps_arrive_whole(one_card: card.Card) -> None:
    whole = np.arange(60, dtype=np.uint8).reshape(6, 10)
    whole.setflags(write=False)
    way, slab = Bus(torch.device(card.NAME, 0)), Pinned(64)
    for part in (whole, whole[2:5, 3:7], whole[:1, :1]):
        with way.sent(part) as there:
            assert np.array_equal(there.cpu().numpy(), part)
    kept = slab.keep(whole[2:5, 3:7])
    assert kept is not None
    assert np.array_equal(kept.numpy(), whole[2:5, 3:7])


@pytest.mark.parametrize("room", [0, 5, 64, 100, 1000, 4096])
def test_pinned_memory_stays_within_its_room(room: int, one_card: card.Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch rounds up what it pins, so that only powers of two are asked for."""
    monkeypatch.setattr(bus, "PINNED_BYTES", 256)
    slab = Pinned(room)
    pieces = [np.full((3, 13), i, np.uint8) for i in range(200)]
    kept = [slab.keep(piece) for piece in pieces]
    held = [tensor for tensor in kept if tensor is not None]
    assert one_card.pinned_peak <= room
    assert all(tensor is None for tensor in kept[len(held) :])
    assert len(held) * 39 >= 0.6 * room - 64  # the rest is what no power of two or piece filled
    assert all(np.array_equal(tensor.numpy(), piece) for tensor, piece in zip(held, pieces, strict=False))


@pytest.mark.parametrize("case", ["gqa", "gemma3", "olmo2", "gpt2", "qwen2moe"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_device_memory_is_what_the_plan_says(case: str, dtype: str, one_card: card.Card, tiny_file: TinyFile) -> None:
    model = open_model(tiny_file(case, layers=6), dtype=dtype, device=card.NAME)
    ids = tiny.prompt(case, 30)
    plan = model.plan(ids, "svd", rank=3, ram_budget="1GiB", vram_budget="4GiB")
    model.fit(plan)
    assert plan.places == ["dense"] * 6
    model.trace(ids).jacobian().svd(3, tol=1e-30, max_sweeps=plan.work.sweeps[0].count)
    expected = plan.vram_peak - planner.CONTEXT_BYTES - plan.vram["on the way"]  # nothing is, when all is there
    assert 0.8 < one_card.peak / expected < 1.03


@pytest.mark.parametrize("large", [False, True], ids=["small pieces", "large pieces"])
def test_pieces_are_large_where_there_is_room(
    large: bool, one_card: card.Card, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the device's memory must be left for weights; either way it takes what the plan says."""
    monkeypatch.setattr(plans, "SMALL_PIECES", sizes.Pieces(8 * 96, 32))
    monkeypatch.setattr(memory, "CONTEXT_BYTES", 0)
    model = open_model(tiny_file("plain", layers=2, ff=512, type="Q8_0"), device=card.NAME)
    ids = tiny.prompt("plain", 30)
    ample = model.plan(ids, "svd", rank=3, ram_budget="1GiB", vram_budget="64GiB")
    exact = 2 * ample.vram_needed
    plan = model.plan(ids, "svd", rank=3, ram_budget="1GiB", vram_budget=exact if large else exact - 1)
    assert ample.pieces == sizes.LARGE_PIECES
    assert plan.pieces == (sizes.LARGE_PIECES if large else plans.SMALL_PIECES)
    assert plan.fits
    model.fit(plan)
    model.trace(ids).jacobian().svd(3, tol=1e-30, max_sweeps=plan.work.sweeps[0].count)
    expected = plan.vram_peak - plan.vram["on the way"]
    assert 0.8 < one_card.peak / expected < 1.03


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_tile_takes_what_the_plan_says(kind: str, dtype: str, one_card: card.Card, tiny_file: TinyFile) -> None:
    """Dequantizing takes temporaries: those of the hungriest type are planned for all."""
    model = open_model(
        tiny_file("plain", type=kind, d=256, head_dim=128, heads=2, ff=2048), dtype=dtype, device=card.NAME
    )
    plan = model.plan(IDS, "attribute", ram_budget="1GiB", vram_budget="4GiB")
    one_card.peak = before = one_card.held
    for _ in model.weights["blk.0.ffn_up.weight"].tiles():
        pass
    taken = (one_card.peak - before) / plan.vram["tile"]
    assert taken < 1.0
    assert taken > 0.6 or kind != "MXFP4"


QUANTIZED = [type for type in TYPES.values() if quants.supported(type) and type.block_size > 1]


@pytest.mark.parametrize("type", QUANTIZED, ids=lambda type: type.name)
def test_every_type_is_dequantized_there(type: GGMLType, one_card: card.Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within what is planned for it, and without a way back to the host."""
    generator = torch.Generator().manual_seed(1)
    raw = torch.randint(0, 60, (1 << 16, type.block_bytes), generator=generator, dtype=torch.uint8)  # finite scales
    raw = raw[: (1 << 16) // type.block_size]
    expected, there = quants.dequantize(raw, type), raw.to(card.NAME)
    quants.dequantize(there, type)  # tables are there from now on
    one_card.peak = before = one_card.held
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "cpu", lambda *_: pytest.fail("came back"))
        found = quants.dequantize(there, type)
    assert (one_card.peak - before) / found.numel() <= planner.DEQUANTIZING_BYTES
    assert_same(found, expected)


# ---- commands

TOKENS = ["--tokens", ",".join(map(str, IDS))]
# Runs of every command, by the command and a number.
RUNS: dict[str, list[str]] = {
    f"{name} {number}": options for name, command in COMMANDS.items() for number, options in enumerate(command.device)
}
# What says where and when something was computed, and not what.
APART = {"device", "seconds", "peak_memory_bytes", "command", "created", "threads"}


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if key not in APART}
    return [plain(part) for part in value] if isinstance(value, list) else value


def run(name: str, device: str, folder: Path, model: Path) -> Any:
    folder.mkdir(exist_ok=True)
    command = name.split()[0]
    options = [option.replace("RUN", str(folder / "RUN")).replace("J.", f"{folder}/J.") for option in RUNS[name]]
    where = ["-m", model, *TOKENS, "-t", "1", "-q", "--format", "json", "--device", device]
    arguments = [command, *where, *with_file(command, model), *options]
    return json.loads(invoke(*arguments).stdout.replace(str(folder), "FOLDER"))


@pytest.fixture
def small(tiny_file: TinyFile) -> Path:
    return tiny_file("gqa", type="Q8_0", d=32, ff=64, layers=3)


@pytest.mark.parametrize("name", RUNS)
def test_commands(name: str, device: str, small: Path, tmp_path: Path) -> None:
    if name.startswith("verify"):
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    found = plain(run(name, device, tmp_path / "there", small))
    expected = plain(run(name, "cpu", tmp_path / "here", small))
    if device == card.NAME:
        assert found == expected
    else:
        assert found.keys() == expected.keys()


@pytest.mark.parametrize("name", RUNS)
def test_a_device_without_float64(name: str, one_card: card.Card, small: Path, tmp_path: Path) -> None:
    """As Apple's, which has no SVD either."""
    if name.startswith("verify"):
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    one_card.refused = {torch.float64, torch.ops.aten._linalg_svd.default}
    run(name, card.NAME, tmp_path, small)


def test_a_command_uses_the_device_memory_that_is_free(one_card: card.Card, small: Path, tmp_path: Path) -> None:
    """Where everything fits, only the trace copies; where nothing does, every sweep."""
    run("svd 0", card.NAME, tmp_path, small)
    ample = one_card.copied
    dry = ["svd", "-m", str(small), *TOKENS, "-k", "2", "--per-token", "--device", card.NAME, "--dry-run", "--no-bench"]
    planned = invoke(*dry, "--vram-budget", 1, "--format", "json", code=4)
    needed = json.loads(planned.stdout)["vram_needed"]
    one_card.reset()
    one_card.memory = needed
    run("svd 0", card.NAME, tmp_path, small)
    assert one_card.copied > 2 * ample


def test_rates_of_a_device(device: str, small: Path) -> None:
    arguments = ["bench", "-m", str(small), "-t", "1", "--device", device, "--format", "json"]
    rows = {row["what"]: row for row in json.loads(invoke(*arguments).stdout)["rates"]}
    assert all(row["rate"] > 0 for row in rows.values())
    assert rows["to the device, as tiles travel"]["limited_by"] == "a copy from pinned memory"


# ---- arithmetic


@pytest.mark.parametrize("name", ["highest", "high", "medium", "allow_tf32", "fp32_precision"])
def test_products_are_not_rounded(name: str, tiny_file: TinyFile) -> None:
    """Whatever torch was told before. It has three names for TF32, of which some may not be mixed."""
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = True
    if name == "allow_tf32":
        matmul.allow_tf32 = True
    elif name != "fp32_precision":
        torch.set_float32_matmul_precision(name)
    elif hasattr(matmul, name):  # from torch 2.9 on
        matmul.fp32_precision = "tf32"
    open_model(tiny_file("plain"))
    assert not matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
    assert getattr(matmul, "fp32_precision", "ieee") == "ieee"
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction


# ---- a device without code


def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be a CUDA device for which this build of torch has no code."""

    def zeros(*size: int, device: object = None) -> None:
        raise torch.AcceleratorError(
            "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be ..."
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla K80")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (3, 7))
    monkeypatch.setattr(torch, "zeros", zeros)


def test_a_gpu_without_code_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    no_kernels(monkeypatch)
    with pytest.raises(ValueError, match=r"no code for Tesla K80, compute capability 3\.7; install .*; use cpu$"):
        find_device("cuda")
    with pytest.warns(UserWarning, match="no kernel image .*Tesla K80.*: computing on the CPU$"):
        assert find_device("auto") == torch.device("cpu")


def test_the_command_line_goes_on_with_the_cpu(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    no_kernels(monkeypatch)
    err = invoke("predict", "-m", tiny_file("plain"), *TOKENS, "--device", "cuda", code=1).stderr
    assert "install a build of torch that has" in err
    assert "this is a bug" not in err
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = invoke("predict", "-m", tiny_file("plain"), *TOKENS)
    assert result.stderr.startswith("Warning: device cuda was asked for, but")
    assert result.stderr.count("\n") == 1
