"""The kernels for GPUs against gguf-py and torch, bit for bit.

They run on a GPU, or in Triton's interpreter where there is none.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from quantized import NAMED, assert_same_bits, edge_blocks, random_blocks, reference
from torch import Tensor

from ggjac import quants
from ggjac.gguf.types import GGMLType

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

pytest.importorskip("triton", reason="Triton is not installed (pip install triton; Linux only)")
from ggjac import kernels  # noqa: E402

every_kernel = pytest.mark.parametrize("name", kernels.KERNELS)
# The interpreter computes in NumPy, which warns where numbers leave a dtype.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
    *([pytest.mark.cuda] if CUDA else []),
]


@pytest.fixture(autouse=True)
def nothing_known():
    quants._kernel.cache_clear()
    yield
    quants._kernel.cache_clear()


def decoded(raw: np.ndarray, type: GGMLType, dtype: torch.dtype = torch.float32) -> Tensor:
    kernel = quants._kernel(type, DEVICE)
    assert kernel is not None
    return kernel(torch.from_numpy(raw.copy()).to(DEVICE), dtype).cpu()


@every_kernel
@pytest.mark.parametrize("make", [lambda type: random_blocks(type, 67), edge_blocks], ids=["random", "edges"])
def test_every_bit_is_that_of_gguf_py(name: str, make) -> None:
    """Of a number of blocks that no program's share divides."""
    raw = make(NAMED[name])
    assert_same_bits(decoded(raw, NAMED[name]), reference(raw, NAMED[name]))


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_cast_as_torch_does(name: str, dtype: torch.dtype) -> None:
    raw = random_blocks(NAMED[name], 20)
    expected = quants.dequantize(torch.from_numpy(raw), NAMED[name], dtype)
    if dtype == torch.bfloat16 and not CUDA:  # the interpreter cuts bits off, where devices round
        wide = quants.dequantize(torch.from_numpy(raw), NAMED[name])
        expected = (wide.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(decoded(raw, NAMED[name], dtype), expected)


@every_kernel
def test_rows_may_be_parts_of_others(name: str) -> None:
    """Of columns, at odd addresses, and of stacks; also none at all."""
    type = NAMED[name]
    whole = torch.from_numpy(random_blocks(type, 2 * 3 * 5).reshape(2, 3, -1)).to(DEVICE)
    odd = torch.cat([torch.zeros(1, dtype=torch.uint8, device=DEVICE), whole.flatten()])[1:].view(whole.shape)
    kernel = quants._kernel(type, DEVICE)
    assert kernel is not None
    for part in (whole, odd, whole[:, 1:, type.block_bytes : 3 * type.block_bytes], whole[:0]):
        found = kernel(part, torch.float32)
        assert torch.equal(found.cpu(), quants.dequantize(part.cpu(), type))


@every_kernel
def test_blocks_are_as_large_as_the_types_say(name: str) -> None:
    type, kernel = NAMED[name], kernels.KERNELS[name]
    assert (kernel.block_bytes, kernel.block_size) == (type.block_bytes, type.block_size)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from ggjac import kernels, quants
for name, kernel in kernels.KERNELS.items():
    given = {"B": kernels.ELEMENTS // kernel.block_size} | ({} if name in quants.LEVELS else {"table": None})
    types = {"raw": "*u8", "table": "*fp32", "out": "*bf16", "n": "i32"} | dict.fromkeys(given, "constexpr")
    for capability in (80, 90):
        ptx = compile(ASTSource(kernel.decode, types, given), target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        print(name, "st.global" in ptx, ".ftz" in ptx)
"""


def test_every_kernel_compiles(tmp_path: Path) -> None:
    """For cards that need not be here: Triton brings the assembler. No code sets small numbers to zero."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{name} True False" for name in kernels.KERNELS for _ in range(2)]


def test_dequantize_uses_them_on_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, used = torch.from_numpy(random_blocks(NAMED["Q4_K"], 6)), []
    dequantize = kernels.dequantize
    monkeypatch.setattr(kernels, "dequantize", lambda *given: used.append(given[1]) or dequantize(*given))
    expected = quants.dequantize(raw, NAMED["Q4_K"])
    assert used == []
    if not CUDA:
        monkeypatch.setattr(Tensor, "is_cuda", True, raising=False)
    assert torch.equal(quants.dequantize(raw.to(DEVICE), NAMED["Q4_K"]).cpu(), expected)
    assert used == ["Q4_K"] * 2  # once to see whether it works
    quants.dequantize(torch.from_numpy(random_blocks(NAMED["Q2_K"], 6)).to(DEVICE), NAMED["Q2_K"])
    assert used == ["Q4_K"] * 2


def test_torch_takes_over_where_they_do_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    type = NAMED["Q6_K"]
    with monkeypatch.context() as patch:
        patch.setenv("GGJAC_NATIVE", "0")
        assert quants._kernel(type, DEVICE) is None
    quants._kernel.cache_clear()
    monkeypatch.setattr(kernels, "dequantize", lambda data, *_: torch.zeros(1, 256, device=DEVICE))
    assert quants._kernel(type, DEVICE) is None
    quants._kernel.cache_clear()

    def fails(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease set CC")

    monkeypatch.setattr(kernels, "dequantize", fails)
    with pytest.warns(UserWarning, match=r"cannot dequantize Q6_K on .* \(Failed to find C compiler.\): torch does"):
        assert quants._kernel(type, DEVICE) is None
