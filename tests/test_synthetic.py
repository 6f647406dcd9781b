"""tools/make_synthetic_gguf.py: files of the shape asked for, in llama.cpp's mix, that behave like a model."""

import importlib
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import tiny
import torch

from ggjac import open_model
from ggjac.gguf import open_gguf
from ggjac.parity import verify

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

TOOLS = Path(__file__).parents[1] / "tools"
IDS = [5, 301, 44, 9, 212, 77, 130, 18]


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        return importlib.import_module("make_synthetic_gguf")


@pytest.fixture(scope="module")
def shapes(tool):
    """The architectures of the presets, made small: all that a preset says but its sizes."""
    small = {"d": 256, "heads": 4, "kv_heads": 2, "head": 64, "feed_forward": 512, "vocabulary": 320, "layers": 3}
    experts = {"experts": 6, "experts_used": 2, "expert_feed_forward": 512}
    shared = {"shared_feed_forward": 512}
    delta = {"delta": tool.Delta(4, 2, 4, 64), "rope": 32, "period": 2}
    latent = {"latent": tool.Latent(256, 256, 32, 32, 64), "kv_heads": 1, "dense_lead": 1}

    def made(shape):
        parts = [small, experts if shape.experts else {}, shared if shape.shared_feed_forward else {}]
        parts += [delta if shape.delta else {}, latent if shape.latent else {}]
        more = dict(shape.more)
        if shape.delta:
            more["rope.dimension_sections"] = (6, 5, 5, 0)
        if more.get("expert_group_count", 1) > 1:
            more |= {"expert_group_count": 3, "expert_group_used_count": 2}
        return replace(shape, **{key: value for part in parts for key, value in part.items()}, more=tuple(more.items()))

    return {name: made(shape) for name, shape in tool.PRESETS.items()}


@pytest.fixture(scope="module")
def bench(tool, tmp_path_factory):
    """The preset for benchmarks, two layers of it."""
    path = tmp_path_factory.mktemp("synthetic") / "bench.gguf"
    tool.write(path, replace(tool.PRESETS["bench-1024"], layers=2, vocabulary=512), "Q8_0")
    return path


def stored(path):
    with open_gguf(path) as file:
        return {name: info.type.name for name, info in file.tensors.items()}


NAMES = ["llama-3.3-70b", "llama-3.1-8b", "llama-3.2-1b", "qwen3-32b", "qwen3-30b-a3b", "bench-1024"]
NAMES += ["qwen3.5-27b", "qwen3.5-35b-a3b", "deepseek-v3", "kimi-k2", "tiny-mixture"]


def test_the_list_here_is_the_tools(tool):
    assert set(tool.PRESETS) == set(NAMES)


@pytest.mark.parametrize(
    ("name", "layers", "quant"),
    [
        ("llama-3.1-8b", 8, "Q4_K_M"),
        ("llama-3.3-70b", 80, "Q4_K_M"),  # by the count of layers llama.cpp knows a 70B
        ("llama-3.2-1b", 3, "Q4_K_M"),
        ("llama-3.2-1b", 3, "Q8_0"),
        ("qwen3-30b-a3b", 3, "Q4_K_M"),
        ("qwen3-30b-a3b", 2, "Q8_0"),
        ("qwen3.5-27b", 9, "Q4_K_M"),
        ("qwen3.5-35b-a3b", 4, "Q4_K_M"),
        ("deepseek-v3", 3, "Q4_K_M"),
        ("kimi-k2", 3, "Q8_0"),
    ],
)
def test_the_mix_is_llamacpps(tool, shapes, tmp_path, name, layers, quant):
    """Its quantizer, given the same tensors, chooses the same types."""
    shape = replace(shapes[name], layers=layers, feed_forward=256)
    tool.write(tmp_path / "float.gguf", shape, "BF16")
    expected = stored(tiny.quantize(tmp_path / "float.gguf", tmp_path / "theirs.gguf", quant))
    tool.write(tmp_path / "ours.gguf", shape, quant)
    assert stored(tmp_path / "ours.gguf") == expected


@pytest.mark.parametrize(
    ("name", "quant"), [*((name, "Q4_K_M") for name in NAMES), ("llama-3.3-70b", "BF16"), ("qwen3-30b-a3b", "Q8_0")]
)
def test_llamacpp_agrees(tool, shapes, tmp_path, name, quant):
    path = tmp_path / "model.gguf"
    assert tool.write(path, shapes[name], quant, name=name) == path.stat().st_size
    model = open_model(path)
    assert model.gguf.metadata["general.name"] == f"synthetic {name} (random weights)"
    result = verify(model, IDS, strict=True, threads=1)
    assert result.verdict, result.reason


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q8_0", "F16", "BF16", "F32"])
def test_the_types_asked_for(tool, shapes, tmp_path, quant):
    path = tmp_path / "model.gguf"
    tool.write(path, replace(shapes["qwen3-30b-a3b"], layers=1), quant)
    types = stored(path)
    expected = {"Q4_K", "Q6_K"} if quant == "Q4_K_M" else {quant}
    assert {type for name, type in types.items() if "norm" not in name and "gate_inp" not in name} == expected
    assert {type for name, type in types.items() if "norm" in name or "gate_inp" in name} == {"F32"}


def test_the_presets_shapes_are_the_models(tool):
    """Parameters of the models as published, and bytes of their Q4_K_M files."""
    weights, nbytes = {}, {}
    for name, shape in tool.PRESETS.items():
        listed = list(tool.tensors(shape, "Q4_K_M"))
        weights[name] = sum(tensor.rows * tensor.shape[-1] for tensor in listed) / 1e9
        nbytes[name] = sum(tensor.nbytes for tensor in listed) / 1e9
    assert weights == pytest.approx(
        {
            "llama-3.3-70b": 70.554,
            "llama-3.1-8b": 8.030,
            "llama-3.2-1b": 1.236,
            "qwen3-32b": 32.762,
            "qwen3-30b-a3b": 30.532,
            "qwen3.5-27b": 26.896,
            "qwen3.5-35b-a3b": 34.661,
            "deepseek-v3": 671.026,
            "kimi-k2": 1026.408,
            "bench-1024": 0.200,
            "tiny-mixture": 0.007,
        },
        abs=6e-4,
    )
    assert nbytes["llama-3.3-70b"] == pytest.approx(42.51, abs=0.02)
    assert nbytes["llama-3.1-8b"] == pytest.approx(4.91, abs=0.02)


def test_activations_are_of_order_one(bench):
    seen = {}
    trace = open_model(bench).trace(IDS, observe=lambda name, x: seen.update({name: x}))
    layers = {name: x for name, x in seen.items() if name.startswith(("l_out", "attn_out", "ffn_out"))}
    assert len(layers) == 6
    for name, x in layers.items():
        assert 0.1 < x.square().mean().sqrt() < 3, name
        assert x.abs().max() < 30, name
    assert 1 < trace.logits.std() < 4


def test_activations_do_not_grow_with_depth(tool, shapes, tmp_path):
    tool.write(tmp_path / "deep.gguf", replace(shapes["llama-3.3-70b"], layers=80, feed_forward=256), "Q4_K_M")
    seen = {}
    open_model(tmp_path / "deep.gguf").trace(IDS, observe=lambda name, x: seen.update({name: x}))
    assert all(0.2 < seen[f"l_out-{i}"].square().mean().sqrt() < 4 for i in range(80))


def test_the_spectrum_decays(bench):
    """Like a trained model's: large values that fall, then a slow tail; neither flat nor of low rank."""
    dense = open_model(bench).trace(IDS[:3]).jacobian().to_dense()
    s = torch.linalg.svdvals(dense.reshape(len(dense), -1))
    assert s[0] > 4 * s[19]
    assert s[1] > 0.3 * s[0]
    assert s[7] > 1.5 * s[19]
    assert 1 < s[19] / s[40] < 2.5
    assert s[500] > s[0] / 300


def test_layers_and_experts_and_tokens_differ(tool, shapes, tmp_path):
    tool.write(tmp_path / "model.gguf", shapes["qwen3-30b-a3b"], "Q8_0")
    with open_gguf(tmp_path / "model.gguf") as file:
        for name in file.tensors:
            if name.startswith("blk.0."):
                pairs = zip(file.rows(name), file.rows(name.replace("blk.0.", "blk.1.")), strict=True)
                assert sum(a.tobytes() == b.tobytes() for a, b in pairs) < file.tensors[name].rows / 20, name
        for name in ("gate", "up", "down"):
            experts = file.rows(f"blk.0.ffn_{name}_exps.weight").reshape(6, -1)
            assert len({expert.tobytes() for expert in experts}) == 6
    tool.write(tmp_path / "model.gguf", replace(tool.PRESETS["bench-1024"], layers=1), "Q8_0")
    with open_gguf(tmp_path / "model.gguf") as file:
        rows = file.rows("token_embd.weight")
        assert len({row.tobytes() for row in rows}) == len(rows) == 32000


def test_a_seed_gives_the_bytes(tool, shapes, tmp_path):
    def write(seed):
        tool.write(tmp_path / "a.gguf", shapes["llama-3.2-1b"], "Q4_K_M", seed=seed)
        return (tmp_path / "a.gguf").read_bytes()

    assert write(1) == write(1) != write(2)


def test_a_full_disk_is_seen_before_anything_is_written(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=30_000_000_000))
    with pytest.raises(tool.SyntheticError, match=r"needs 42\.\d+ GB, .* has 30\.00 GB free; .*--layers"):
        tool.write(tmp_path / "model.gguf", tool.PRESETS["llama-3.3-70b"], "Q4_K_M")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_nothing(tool, shapes, tmp_path, monkeypatch):
    def fail(values, type):
        raise OSError("no")

    monkeypatch.setattr(tool, "encode", fail)
    (tmp_path / "model.gguf").write_bytes(b"kept")
    with pytest.raises(OSError, match="no"):
        tool.write(tmp_path / "model.gguf", shapes["bench-1024"], "Q4_K_M")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"kept"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"d": 300}, "d is 300; give a multiple of 256"), ({"layers": 0}, "layers is 0; give at least 1")],
)
def test_impossible_shapes(tool, shapes, tmp_path, change, message):
    with pytest.raises(tool.SyntheticError, match=message):
        tool.write(tmp_path / "model.gguf", replace(shapes["bench-1024"], **change), "F32")


def test_the_command(tmp_path):
    path = tmp_path / "model.gguf"
    script = [sys.executable, str(TOOLS / "make_synthetic_gguf.py"), "--preset", "bench-1024", "-o", str(path)]
    options = ["--quant", "Q8_0", "--layers", "1", "--vocabulary", "300", "--seed", "3"]
    done = subprocess.run([*script, *options], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "GB/s" in done.stderr
    with open_gguf(path) as file:
        assert file.metadata["llama.block_count"] == 1
        assert file.tensors["token_embd.weight"].shape == (300, 1024)
        assert file.tensors["token_embd.weight"].type.name == "Q8_0"
    script[-1] = str(tmp_path / "absent" / "model.gguf")
    failed = subprocess.run(script, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("make_synthetic_gguf: ")
    assert failed.stderr.count("\n") == 1


def test_a_tokenizer_of_another_file(tmp_path):
    path, demo = tmp_path / "model.gguf", TOOLS.parent / "ggjac" / "data" / "demo.gguf"
    script = [sys.executable, str(TOOLS / "make_synthetic_gguf.py"), "--preset", "bench-1024", "-o", str(path)]
    options = ["--quant", "Q8_0", "--layers", "1", "--tokenizer", str(demo)]
    subprocess.run([*script, *options], capture_output=True, text=True, check=True)
    read = {name: gguf.GGUFReader(file).fields for name, file in (("ours", path), ("theirs", demo))}
    keys = [key for key in read["theirs"] if key.startswith("tokenizer.")]
    assert "tokenizer.ggml.tokens" in keys
    assert [key for key in read["ours"] if key.startswith("tokenizer.")] == keys
    for key in keys:
        ours, theirs = (read[name][key] for name in ("ours", "theirs"))
        assert (ours.types, ours.contents()) == (theirs.types, theirs.contents())
    assert len(read["ours"]["tokenizer.ggml.tokens"].data) == read["ours"]["llama.vocab_size"].contents()
    both = subprocess.run([*script, *options, "--vocabulary", "9"], capture_output=True, text=True)
    assert both.returncode == 2
    assert "leave one of them out" in both.stderr
    path.write_bytes(b"no model")
    failed = subprocess.run([*script, "--tokenizer", str(path)], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("make_synthetic_gguf: ")
    assert failed.stderr.count("\n") == 1
