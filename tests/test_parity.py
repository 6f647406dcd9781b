"""What is captured from llama.cpp is what its name says (by arithmetic on gguf's weights), and verdicts judge rightly.

The verdicts are tested with a stand-in model whose trace is llama.cpp's own run, changed in known ways.
"""

import math
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import oracle
import pytest
import tiny
import torch
from helpers import edited

from ggjac import blocks, parity
from ggjac.architectures import ARCHITECTURES, Graph
from ggjac.gguf import GGUFError, open_gguf
from ggjac.model import open_model
from ggjac.parity import NoRoomError, ParityError, Reference, judge, layer_error, rewrite_as_f32, run_llama_cpp, verify
from ggjac.rope import rotation
from ggjac.tokenizer import TokenizerError

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

STORY = "Once upon a time, there was a little girl named"


def weights(path: Path) -> dict[str, np.ndarray]:
    """Return every tensor in float64, dequantized by the gguf package."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in gguf.GGUFReader(path).tensors
    }


def relative(a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


class StandIn:
    """A model whose trace is llama.cpp's own run on the file, after `change(name, tensor)`; its blocks are ours."""

    def __init__(self, path: Path, *, source: Path | None = None, change=lambda name, tensor: tensor):
        self.model = open_model(path, threads=1)
        self.dtype, self.change, self.source = torch.float32, change, source or path

    def __getattr__(self, name):
        return getattr(self.model, name)

    def trace(self, ids, *, observe=None, **_):
        run = run_llama_cpp(self.source, ids)
        for name, tensor in run.tensors.items():
            if (changed := self.change(name, tensor.clone())) is not None:
                observe(name, changed)
        logits = self.change("logits", run.logits.clone())
        return SimpleNamespace(all_logits=lambda: logits)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Files this small are slower on two threads, and much slower when the machine is busy: the threads spin."""
    monkeypatch.setattr(parity.machine, "cpus", lambda: 1)


@pytest.fixture(autouse=True)
def no_amplification(monkeypatch):
    """A stand-in cannot be run in another precision: its trace is as exact as llama.cpp's."""
    measure = parity.rounding_errors

    def stand_in(model, ids, ours, **options):
        return (
            dict.fromkeys((*ours.tensors, "logits"), 1e-7)
            if isinstance(model, StandIn)
            else measure(model, ids, ours, **options)
        )

    monkeypatch.setattr(parity, "rounding_errors", stand_in)


@pytest.fixture(scope="module")
def stories(shared) -> Path:
    return shared / "models"


# -- what is captured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["gqa", "tied", "biases", "yarn"])
def test_captures_are_what_their_names_say(tiny_file, case):
    path, ids = tiny_file(case), tiny.prompt(case)
    o, w, run = tiny.options(case), weights(tiny_file(case)), run_llama_cpp(path, tiny.prompt(case))
    states = {name: tensor.double().numpy() for name, tensor in run.tensors.items()}
    order = [f"{part}-{i}" for i in range(o.layers) for part in ("attn_out", "ffn_out", "l_out")] + ["result_norm"]
    assert list(states) == order
    assert all(value.shape == (len(ids), o.d) for value in states.values())
    assert run.logits.shape == (len(ids), o.vocab)
    assert run.logits.dtype == torch.float32
    # The residual stream is the sum of the embedding and of every branch.
    stream = w["token_embd.weight"][ids]
    for i in range(o.layers):
        stream = stream + states[f"attn_out-{i}"] + states[f"ffn_out-{i}"]
        assert relative(states[f"l_out-{i}"], stream) < 1e-6
    normed = stream / np.sqrt((stream**2).mean(-1, keepdims=True) + o.eps) * w["output_norm.weight"]
    assert relative(states["result_norm"], normed) < 1e-6
    head = w["token_embd.weight" if o.tied else "output.weight"]
    assert relative(run.logits, states["result_norm"] @ head.T) < 1e-6


@pytest.mark.parametrize(("case", "ftype"), [("gqa", None), ("yarn", None), ("q8_0", "F32")])
def test_nothing_rounds(tiny_file, case, ftype):
    """Against a forward written independently in float64: an F16 cache or flash attention would show as 1e-3."""
    path, ids = tiny_file(case, ftype=ftype), tiny.prompt(case)
    run, expected = run_llama_cpp(path, ids), oracle.forward(oracle.load(path), ids)
    assert relative(run.logits, expected["logits"]) < 2e-6
    for name in run.tensors.keys() & expected.keys():
        assert relative(run.tensors[name], expected[name]) < 2e-6


def test_logits_of_a_position_do_not_know_the_later_ones(tiny_file):
    ids = tiny.prompt("gqa")
    whole = run_llama_cpp(tiny_file("gqa"), ids)
    for n in (1, 2, len(ids) - 1):
        part = run_llama_cpp(tiny_file("gqa"), ids[:n])
        assert relative(part.logits, whole.logits[:n]) < 1e-5
        assert relative(part.tensors["l_out-1"], whole.tensors["l_out-1"][:n]) < 1e-5


def test_runs_repeat_to_the_bit(tiny_file):
    ids = tiny.prompt("q8_0")
    a, b = (run_llama_cpp(tiny_file("q8_0"), ids, threads=t) for t in (2, 2))
    assert torch.equal(a.logits, b.logits)
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    bare = run_llama_cpp(tiny_file("q8_0"), ids, layers=False, threads=2)
    assert torch.equal(bare.logits, a.logits)
    assert bare.tensors == {}


def test_other_names_can_be_asked_for(tiny_file):
    run = run_llama_cpp(tiny_file("gqa"), tiny.prompt("gqa"), names=("ffn_inp", "norm"))
    assert {name.rpartition("-")[0] for name in run.tensors} == {"ffn_inp", "norm", ""}  # "" for the last: "norm"


def test_long_prompts_are_one_batch(tiny_file):
    ids = (tiny.prompt("gqa", 100) * 8)[:700]  # beyond llama.cpp's defaults for n_ctx and n_ubatch, 512
    run = run_llama_cpp(tiny_file("gqa"), ids)
    assert len(run.logits) == len(run.tensors["l_out-0"]) == len(ids)


def test_a_trained_model(stories):
    run = run_llama_cpp(stories / "stories260K-f32.gguf", [1], prompt=STORY)
    assert run.prompt_ids is not None
    run = run_llama_cpp(stories / "stories260K-f32.gguf", run.prompt_ids)
    assert StandIn(stories / "stories260K-f32.gguf").tokenizer.piece(int(run.logits[-1].argmax())) == b" Lily"
    output = weights(stories / "stories260K-f32.gguf")
    head = output.get("output.weight", output["token_embd.weight"])
    assert relative(run.logits, run.tensors["result_norm"].double().numpy() @ head.T) < 1e-6


def test_a_split_file(tmp_path, tiny_file):
    source = gguf.GGUFReader(tiny_file("gqa"))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=8)
    for key, field in source.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for t in source.tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file(tmp_path / "m.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first, *others = sorted(tmp_path.glob("m-*.gguf"))
    assert others
    ids = tiny.prompt("gqa")
    expected = run_llama_cpp(tiny_file("gqa"), ids)
    assert torch.equal(run_llama_cpp(first, ids).logits, expected.logits)
    whole = rewrite_as_f32(first, tmp_path)
    assert torch.equal(run_llama_cpp(whole, ids).logits, expected.logits)
    assert verify(StandIn(first), ids, strict=True).verdict


def test_nothing_is_printed(tiny_file, tmp_path, capfd):
    run_llama_cpp(tiny_file("q8_0"), tiny.prompt("q8_0"))
    rewrite_as_f32(tiny_file("q8_0"), tmp_path)
    with pytest.raises(ParityError):
        run_llama_cpp(tmp_path / "missing.gguf", [1])
    assert capfd.readouterr() == ("", "")


# -- the copy in float32 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["f16", "bf16", "q8_0", "q4_0_tied", "q4_k_mixed", "rope_factors"])
def test_rewriting_is_exact(tiny_file, tmp_path, case):
    path = rewrite_as_f32(tiny_file(case), tmp_path)
    before, after = weights(tiny_file(case)), weights(path)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    with open_gguf(path) as file:
        assert {info.type.name for info in file.tensors.values()} == {"F32"}


def test_a_full_disk_is_seen_before_anything_is_written(tiny_file, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12_000_000))
    with pytest.raises(ParityError, match=r"needs 0\.1 GB .* has 0\.0 GB free; .*TMPDIR.*--strict"):
        rewrite_as_f32(tiny_file("q8_0"), tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- a copy of a file that llama.cpp refuses ---------------------------------------------------------------------------


def exported(source: Path, path: Path, renamed: str, *, alignment: int = 32) -> Path:
    """Write a file as Ollama exports Qwen3.5: a name without its end, other keys, and tensors of other models."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    count, sections = f"{architecture}.attention.head_count_kv", f"{architecture}.rope.dimension_sections"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_custom_alignment(alignment)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", count, sections):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    heads, uint32 = reader.fields[count].contents(), gguf.GGUFValueType.UINT32
    names = {t.name for t in reader.tensors}
    blocks = range(reader.fields[f"{architecture}.block_count"].contents())
    each = [0 if f"blk.{i}.ssm_out.weight" in names else heads for i in blocks]
    writer.add_key_value(count, each if 0 in each else [0, heads, 0], gguf.GGUFValueType.ARRAY, uint32)
    writer.add_array(sections, reader.fields[sections].contents()[:3] if sections in reader.fields else [3, 2, 1])
    for t in reader.tensors:
        name = t.name.rpartition(".")[0] if t.name.endswith(renamed) else t.name
        writer.add_tensor(name, t.data, raw_dtype=t.tensor_type)
    writer.add_tensor("v.blk.0.weight", np.ones((3, 5), np.float32))
    writer.add_tensor("mtp.norm", np.ones(7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def llama_exports(monkeypatch) -> None:
    renamed = {"ffn_norm": "ffn_norm.weight"}
    export = replace(ARCHITECTURES["qwen35"].export, renamed=renamed)
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], export=export))


@pytest.mark.parametrize("case", ["qwen35", "qwen35moe", "qwen35_predictor"])
def test_ollamas_export_is_the_same_model(tiny_file, tmp_path, case):
    source, ids = tiny_file(case), tiny.prompt(case)
    model = open_model(exported(source, tmp_path / "export.gguf", "ssm_dt.bias"))
    assert torch.equal(model.trace(ids).all_logits(), open_model(source).trace(ids).all_logits())
    assert verify(model, ids, strict=True).verdict


@pytest.mark.parametrize("case", ["qwen35", "qwen35moe"])
def test_llama_cpp_runs_a_copy_of_ollamas_export(tiny_file, tmp_path, case):
    source, ids = tiny_file(case), tiny.prompt(case)
    path = exported(source, tmp_path / "export.gguf", "ssm_dt.bias")
    with pytest.raises(ParityError, match="cannot load"):
        run_llama_cpp(path, ids)
    with open_gguf(path) as file:
        target = parity.for_llama_cpp(file, tmp_path)
    assert torch.equal(run_llama_cpp(target, ids).logits, run_llama_cpp(source, ids).logits)
    whole = rewrite_as_f32(target, tmp_path)
    assert torch.equal(run_llama_cpp(whole, ids).logits, run_llama_cpp(source, ids).logits)


@pytest.mark.usefixtures("llama_exports")
@pytest.mark.parametrize(("case", "alignment"), [("gqa", 32), ("q4_k_mixed", 64), ("tokenizer", 32)])
def test_a_copy_has_what_llama_cpp_expects(tiny_file, tmp_path, case, alignment):
    source = tiny_file(case)
    path = exported(source, tmp_path / "export.gguf", "ffn_norm.weight", alignment=alignment)
    folder = tmp_path / "copy"
    folder.mkdir()
    with pytest.raises(ParityError, match="cannot load"):
        run_llama_cpp(path, [1, 2])
    before = path.read_bytes()
    with open_gguf(path) as file:
        target = parity.for_llama_cpp(file, folder)
    assert [target] == list(folder.iterdir())
    assert path.read_bytes() == before
    original, found = gguf.GGUFReader(source), gguf.GGUFReader(target)
    assert [t.name for t in found.tensors] == [t.name for t in original.tensors]
    for a, b in zip(found.tensors, original.tensors, strict=True):
        assert (a.tensor_type, a.shape.tolist()) == (b.tensor_type, b.shape.tolist())
        assert np.array_equal(a.data, b.data)
    heads = original.fields["llama.attention.head_count_kv"].contents()
    changed = {"llama.attention.head_count_kv": heads, "llama.rope.dimension_sections": [3, 2, 1, 0]}
    for key, field in gguf.GGUFReader(path).fields.items():
        if not key.startswith("GGUF."):
            expected = changed.get(key, field.contents())
            assert found.fields[key].contents() == expected
            if not key.endswith("head_count_kv"):
                assert found.fields[key].types == field.types
    assert target.stat().st_size % alignment == 0
    with open_gguf(target) as file:
        assert parity.for_llama_cpp(file, folder) == target, "it needs no further copy"
    if case != "gqa":
        return
    assert torch.equal(run_llama_cpp(target, [1, 2]).logits, run_llama_cpp(source, [1, 2]).logits)


@pytest.mark.usefixtures("llama_exports")
@pytest.mark.parametrize("strict", [False, True])
def test_a_file_that_llama_cpp_refuses_is_verified_on_a_copy(tiny_file, tmp_path, monkeypatch, strict):
    """Ours stands on the file that was exported; llama.cpp runs the copy."""
    path = exported(tiny_file("gqa"), tmp_path / "export.gguf", "ffn_norm.weight")
    model = open_model(tiny_file("gqa"))
    model.gguf = open_gguf(path)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert verify(model, tiny.prompt("gqa"), strict=strict).verdict
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("llama_exports")
def test_no_half_copy_stays(tiny_file, tmp_path, monkeypatch):
    path = exported(tiny_file("gqa"), tmp_path / "export.gguf", "ffn_norm.weight")
    folder = tmp_path / "copy"
    folder.mkdir()
    file = open_gguf(path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12_000_000))
        with pytest.raises(NoRoomError, match=r"a copy of .*export\.gguf for llama.cpp needs 0\.1 GB .*or do without"):
            parity.for_llama_cpp(file, folder)
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with monkeypatch.context() as patch:
            patch.setattr(type(file), "rows", lambda *_, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(ParityError if isinstance(error, OSError) else KeyboardInterrupt):
                parity.for_llama_cpp(file, folder)
        assert list(folder.iterdir()) == []


def test_other_files_need_no_copy(tiny_file, tmp_path):
    with open_gguf(tiny_file("gqa")) as file:
        assert parity.for_llama_cpp(file, tmp_path) == file.paths[0]
    assert list(tmp_path.iterdir()) == []


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_equal_is_equal(tiny_file):
    ids = tiny.prompt("gqa")
    told = []
    result = verify(StandIn(tiny_file("gqa")), ids, progress=told.append)
    assert result.verdict
    assert result.mode == "as is"
    assert result.tolerance == 1e-5  # all F32: held to the strict tolerance without being asked
    assert (result.rank, result.gap, result.top1_equal) == (1, 0.0, True)
    assert (result.kl, result.kl_last, result.logits_error) == (0.0, 0.0, 0.0)
    assert [layer.name for layer in result.layers][:3] == ["attn_out-0", "ffn_out-0", "l_out-0"]
    assert [layer.layer for layer in result.layers] == [0, 0, 0, 1, 1, 1, None]
    assert all(layer.error == 0 for layer in result.layers)
    assert result.first_departure is None
    assert result.cause is None
    assert result.tokens_equal is None
    steps = ["llama.cpp: evaluating the prompt", "comparing every block, given llama.cpp's input"]
    assert told == [*steps, "comparing every layer of the trace"]
    assert result.reason.startswith("same top token, logits within 0.0e+00 relative L2, 7 tensors within")


@pytest.mark.parametrize("case", ["q8_0", "q4_k_mixed", "bf16"])
def test_strict_runs_the_f32_copy(tiny_file, case):
    """Ours stands on the F32 copy; the file as it is rounds activations and is far beyond the tolerance."""
    ids = tiny.prompt(case)
    model = StandIn(tiny_file(case), source=tiny_file(case, ftype="F32"))
    strict = verify(model, ids, strict=True)
    assert strict.verdict
    assert (strict.mode, strict.logits_error, strict.cause) == ("strict", 0.0, None)
    as_is = verify(model, ids, tolerance=1e-5)
    assert not as_is.verdict
    assert as_is.logits_error > 1e-4
    assert as_is.cause is not None
    assert f"{16 if case == 'bf16' else 8} bit" in as_is.cause
    margin = verify(model, ids)
    assert margin.verdict
    assert margin.tolerance is None
    assert 0 < margin.kl < 0.1


def test_the_first_wrong_layer_is_named(tiny_file):
    def change(name, tensor):
        if name in ("ffn_out-1", "l_out-1", "result_norm"):
            tensor[4] *= 1 + 1e-3
        return tensor

    result = verify(StandIn(tiny_file("gqa"), change=change), tiny.prompt("gqa"))
    assert not result.verdict
    assert result.first_departure == "ffn_out-1"
    assert "ffn_out-1 is off by" in result.reason
    wrong = {layer.name: layer for layer in result.layers}["ffn_out-1"]
    assert (wrong.layer, wrong.position) == (1, 4)
    assert wrong.position_error == pytest.approx(1e-3, rel=1e-3)
    assert 1e-5 < wrong.error < 1e-3


def test_the_tolerance_is_a_bound_on_every_tensor(tiny_file):
    def change(name, tensor):
        return tensor * (1 + 3e-6) if name == "l_out-0" else tensor

    model = StandIn(tiny_file("gqa"), change=change)
    assert verify(model, tiny.prompt("gqa")).verdict
    assert verify(model, tiny.prompt("gqa"), tolerance=1e-6).first_departure == "l_out-0"
    rough = StandIn(tiny_file("gqa"), change=lambda name, tensor: tensor * 1.004)
    assert not verify(rough, tiny.prompt("gqa")).verdict
    rough.dtype = torch.bfloat16
    result = verify(rough, tiny.prompt("gqa"))
    assert result.verdict
    assert result.tolerance == 16 * 2**-7
    assert "bfloat16" in (result.cause or "")
    rough.dtype = torch.float16
    assert "float16" in (verify(rough, tiny.prompt("gqa")).cause or "")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["l_out-1", "result_norm", "logits"])
@pytest.mark.parametrize("case", ["gqa", "q8_0"])
def test_what_is_not_finite_never_passes(tiny_file, value, where, case):
    def change(name, tensor):
        if name == where:
            tensor[2, 3] = value
        return tensor

    model = StandIn(tiny_file(case), change=change)
    for tolerance in (None, math.inf):
        result = verify(model, tiny.prompt(case), tolerance=tolerance)
        assert not result.verdict
        assert result.first_departure == (None if where == "logits" else where)
        assert "not all finite" in result.reason if where == "logits" else where in result.reason
        if where != "logits":
            layer = {layer.name: layer for layer in result.layers}[where]
            assert layer.position == 2
            assert not math.isfinite(layer.error)


def test_nan_on_both_sides_does_not_pass():
    nan = torch.full((2, 5), math.nan)
    for tolerance in (None, 1e-5, math.inf):
        result = judge(Reference(nan), nan, {}, mode="as is", tolerance=tolerance)
        assert not result.verdict
        assert not result.top1_equal
    result = judge(Reference(torch.zeros(2, 5)), torch.zeros(2, 5), {}, mode="as is", tolerance=None)
    assert result.verdict


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_where_llama_cpp_overflows_there_is_no_verdict(value):
    """As it runs the file; where it must agree to rounding, as on F32, such a value is a difference."""
    ours, theirs = torch.zeros(2, 5), torch.zeros(2, 5)
    theirs[1, 3] = value
    with pytest.raises(ParityError, match=r"llama\.cpp's own logits are not all finite .* --strict compares on F32$"):
        judge(Reference(theirs), ours, {}, mode="as is", tolerance=None)
    for mode, tolerance in (("strict", 1e-5), ("as is", 1e-5)):
        result = judge(Reference(theirs), ours, {}, mode=mode, tolerance=tolerance)
        assert not result.verdict
        assert "nan logits" not in result.reason
    assert not judge(Reference(theirs), theirs, {}, mode="as is", tolerance=None).verdict  # ours overflow as well


def test_llama_cpp_overflows_on_q4_1(tmp_path):
    """Its products of Q4_1 sum blocks of activations in half precision; an F32 copy has no such limit."""
    path = tiny.write(tmp_path / "f32.gguf", **tiny.row("gqa"))
    small = tiny.quantize(path, tmp_path / "q4_1.gguf", "Q4_1")
    edited(small, "blk.1.ffn_norm.weight", 3e5)
    model = open_model(small)
    with pytest.raises(ParityError, match=r"llama\.cpp's own logits are not all finite"):
        verify(model, tiny.prompt("gqa"))
    assert verify(model, tiny.prompt("gqa"), strict=True).verdict


def logits(*last: float) -> torch.Tensor:
    return torch.tensor([[0.0, 1.0, 0.0, 0.0], last])


@pytest.mark.parametrize(
    ("ours", "verdict", "rank", "gap"),
    [
        (logits(0, 5, 4, 3), True, 1, 0.0),
        (logits(0, 9, 4, 3), True, 1, 0.0),  # as is, only the prediction is judged
        (logits(0, 4, 4.25, 3), True, 2, 0.25),
        (logits(0, 4, 4.26, 3), False, 2, 0.26),
        (logits(0, 4, 4.1, 4.1), False, 3, 0.1),
        (logits(9, 4, 4, 3), False, 2, 5.0),
        (logits(4, 4, 4, 4), True, 1, 0.0),  # a tie is not a difference
    ],
)
def test_the_margin_rule(ours, verdict, rank, gap):
    result = judge(Reference(logits(0, 5, 4, 3)), ours, {}, mode="as is", tolerance=None)
    assert (result.verdict, result.rank, result.top1, result.top1_equal) == (verdict, rank, 1, rank == 1)
    assert result.gap == pytest.approx(gap, abs=1e-6)
    if not verdict:
        assert "--strict" in result.reason


def test_kl_by_hand():
    """Uniform over 2 against (1/4, 3/4): log 2 - log 3 / 2 nats; against itself: 0."""
    theirs, ours = torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
    result = judge(Reference(theirs), ours, {}, mode="as is", tolerance=None)
    expected = math.log(2) - math.log(3) / 2
    assert result.kl_last == pytest.approx(expected, rel=1e-6)
    assert result.kl == pytest.approx(expected / 2, rel=1e-6)


def test_layers_that_were_not_compared_are_a_fault(tiny_file):
    ids = tiny.prompt("gqa")
    silent = StandIn(tiny_file("gqa"), change=lambda name, tensor: None if name == "l_out-1" else tensor)
    result = verify(silent, ids)
    assert not result.verdict
    assert "l_out-1 was not compared" in result.reason
    # Branches have other names in other families; the stream after each layer exists in all.
    partial = StandIn(tiny_file("gqa"), change=lambda name, tensor: None if name.startswith("attn_out") else tensor)
    assert verify(partial, ids).verdict
    wrong_shape = StandIn(tiny_file("gqa"), change=lambda name, t: t[-1:] if name == "l_out-0" else t)
    assert verify(wrong_shape, ids, tolerance=1e9).first_departure == "l_out-0"


def test_an_existing_trace_is_not_computed_again(tiny_file):
    ids = tiny.prompt("gqa")
    model = StandIn(tiny_file("gqa"))
    trace = model.trace(ids, observe=lambda *_: None)
    model.trace = None
    result = verify(model, ids, trace=trace)
    assert result.verdict
    assert result.layers == []


def test_tokens_are_compared_where_there_is_a_text(tiny_file):
    model = StandIn(tiny_file("tokenizer"))
    ids = model.tokenizer.encode("the sea")
    assert verify(model, ids, prompt="the sea").tokens_equal is True
    result = verify(model, [*ids[:-1], 5], prompt="the sea")
    assert (result.tokens_equal, result.verdict) == (False, False)
    assert "token ids" in result.reason
    assert verify(model, ids).tokens_equal is None


def test_layer_error_on_zeros():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert layer_error("l_out-12", zero, zero).error == 0
    assert layer_error("l_out-12", one, zero).error == math.inf
    assert layer_error("l_out-12", one, one).layer == 12
    assert layer_error("result_norm", one, one * 2).error == 0.5


# -- blocks, each given llama.cpp's own input --------------------------------------------------------------------------


class Without:
    """A block without some of its tensors."""

    def __init__(self, block, *names):
        self.block, self.names = block, names

    def __contains__(self, name):
        return name not in self.names and name in self.block

    def __getattr__(self, name):
        return getattr(self.block, name)


def another_epsilon(w, frame):
    return w, frame._replace(config=replace(frame.config, norm_epsilon=1e-3))


def another_base(w, frame):
    ropes = {
        rope: rotation(replace(rope, base=rope.base * 1.1), len(cos), None)
        for rope, (cos, _) in frame.rotations.items()
    }
    return w, frame._replace(rotations=ropes)


def without_a_bias(w, frame):
    return Without(w, "attn_v.bias"), frame


def another_scale(w, frame):
    config = frame.config
    layers = tuple(replace(layer, attention_scale=layer.attention_scale * 1.001) for layer in config.layers)
    return w, frame._replace(config=replace(config, layers=layers))


MISTAKES = [another_epsilon, another_base, without_a_bias, another_scale]


def mistaken(monkeypatch, mistake, *layers: int) -> None:
    """Let our program compute some blocks with a mistake, in a trace and alone."""
    record = blocks.record_block

    def record_block(w, frame, layer, x, source):
        return record(*(mistake(w, frame) if layer in layers else (w, frame)), layer, x, source)

    monkeypatch.setattr(blocks, "record_block", record_block)


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("graph", [Graph(), Graph((), ())], ids=["all names", "the stream alone"])
def test_a_mistake_shows_in_its_own_block_alone(tiny_file, monkeypatch, mistake, graph):
    model = open_model(tiny_file("biases", layers=5))
    model.config = replace(model.config, row=replace(model.config.row, graph=graph))
    assert verify(model, tiny.prompt("biases")).verdict
    mistaken(monkeypatch, mistake, 2)
    result = verify(model, tiny.prompt("biases"))
    assert not result.verdict
    assert {e.layer for e in result.local if not e.passes} == {2}
    first = "attn_out-2" if graph.attention else "l_out-2"
    assert result.first_local_departure == first == result.first_departure
    assert f"given llama.cpp's own input, {first} is off by" in result.reason
    assert "wrong also" not in result.reason
    # In the trace, every later block is wrong as well.
    assert all(e.error > result.tolerance for e in result.layers if e.layer is None or e.layer > 2)
    assert result.rounding == {}  # not measured: it could excuse nothing


@pytest.mark.parametrize("case", ["qwen35", "qwen3next", "lfm2", "gemma3", "olmo", "gpt_oss"])
def test_a_mistake_is_named_in_other_families_too(tiny_file, monkeypatch, case):
    """Where the graph has other names or none, where a recurrence mixes positions, and where GELU's table acts."""
    model = open_model(tiny_file(case))
    layer = model.config.block_count - 2
    mistaken(monkeypatch, lambda w, f: (w, f._replace(config=replace(f.config, norm_epsilon=0.1))), layer)
    result = verify(model, tiny.prompt(case))
    assert not result.verdict
    assert {e.layer for e in result.local if not e.passes} == {layer}


def test_rows_are_compared_in_parts(monkeypatch):
    torch.manual_seed(0)
    ours, before = torch.randn(7, 5), torch.randn(7, 5)
    theirs = ours + 1e-3 * torch.randn(7, 5)
    whole = parity._local_error("l_out-1", ours, theirs, 1e-5, before, 0.1)
    scale = (theirs - before).norm(dim=-1) + 0.1 * torch.maximum(theirs.norm(dim=-1), before.norm(dim=-1))
    errors = (ours - theirs).norm(dim=-1) / scale
    assert (whole.layer, whole.position) == (1, int(errors.argmax()))
    assert whole.error == pytest.approx(float(errors.square().mean().sqrt()), rel=1e-5)
    assert whole.position_error == pytest.approx(float(errors.max()), rel=1e-5)
    for size in (1, 10, 12):
        monkeypatch.setattr(parity, "COMPARED", size)
        assert parity._local_error("l_out-1", ours, theirs, 1e-5, before, 0.1) == whole
    assert parity._local_error("l_out-1", ours[:3], theirs, 1e-5).error == math.inf


def test_every_block_with_a_mistake_is_named(tiny_file, monkeypatch):
    model = open_model(tiny_file("biases", layers=5))
    mistaken(monkeypatch, without_a_bias, 1, 3)
    result = verify(model, tiny.prompt("biases"))
    assert {e.layer for e in result.local if not e.passes} == {1, 3}
    assert "attn_out-1 is off by" in result.reason
    assert "wrong also: block 3" in result.reason


@pytest.mark.parametrize("graph", [Graph(), Graph((), ())], ids=["all names", "the stream alone"])
def test_a_large_stream_hides_no_mistake(tiny_file, monkeypatch, graph):
    """What the blocks add is a thousandth of the stream, in whose norm a mistake of 0.1% would be 1e-6."""
    model = open_model(tiny_file("biases", layers=4, embed_std=1000.0))
    model.config = replace(model.config, row=replace(model.config.row, graph=graph))
    good = verify(model, tiny.prompt("biases"))
    assert good.verdict
    mistaken(monkeypatch, without_a_bias, 1)
    result = verify(model, tiny.prompt("biases"))
    assert max(e.error for e in result.layers if e.name == "l_out-1") < 1e-3
    assert {e.layer for e in result.local if not e.passes} == {1}


def test_a_large_position_hides_no_mistake(tiny_file, monkeypatch):
    """As in trained models, where the first position's stream may be a thousand times as large as the others'."""
    ids = tiny.prompt("biases")
    model = open_model(tiny_file("biases", layers=3))
    reference = run_llama_cpp(model.path, ids)
    for name, tensor in reference.tensors.items():
        if name.startswith("l_out"):
            tensor[0] *= 1e4
    record = blocks.record_block

    def record_block(w, frame, layer, x, source):
        recorded = record(w, frame, layer, x, source)
        out = reference.tensors[f"l_out-{layer}"].clone()  # right, but for 0.1% of what the block adds at one position
        out[5] += 1e-3 * (out[5] - x[5]) if layer == 1 else 0.0
        return recorded._replace(out=out)

    monkeypatch.setattr(blocks, "record_block", record_block)
    local = parity.local_errors(model, ids, reference, tolerance=1e-5, exact=1e-5, n_ctx=256)
    streams = [e for e in local if e.name.startswith("l_out")]
    assert [e.passes for e in streams] == [True, False, True]
    assert (streams[1].position, streams[1].error) == (5, pytest.approx(1e-3 / math.sqrt(len(ids)), rel=0.1))


@pytest.mark.parametrize("case", ["gpt_oss", "qwen2_yarn"])
def test_far_positions_are_rotated_as_llama_cpp_does(tiny_file, case):
    """YaRN's share of an angle, rounded in another place, would be off by 1e-5 at the last positions."""
    model = open_model(tiny_file(case, context=1024))
    ids = (tiny.prompt(case, 100) * 8)[:800]
    result = verify(model, ids)
    assert result.verdict
    assert all(e.error < 1e-6 for e in result.local)


def test_embeddings_are_judged_with_the_first_block(tiny_file):
    model = open_model(tiny_file("gqa"))
    model.config = replace(model.config, embedding_scale=1.0001)
    result = verify(model, tiny.prompt("gqa"))
    assert {e.layer for e in result.local if not e.passes} == {0}


def test_the_final_norm_and_the_head_are_judged_alone(tiny_file):
    model = open_model(tiny_file("gqa"))
    model.head = model.head._replace(scale=1.001)
    result = verify(model, tiny.prompt("gqa"))
    assert [e.name for e in result.local if not e.passes] == ["logits"]
    assert "given llama.cpp's own input, logits is off by 1.0e-03" in result.reason


SHARP = {"layers": 12, "score_gain": 4.0, "embed_std": 0.1}  # attention this sharp amplifies rounding


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding_that_the_model_amplifies_is_no_mistake(tiny_file, dtype):
    ids = tiny.prompt("plain", 24)
    result = verify(open_model(tiny_file("plain", **SHARP), dtype=dtype), ids)
    assert result.verdict
    assert result.first_departure is None
    assert max(e.error for e in result.layers) > 2e-5
    assert all(e.error < 1e-5 for e in result.local)
    assert len(result.local) == len(result.layers) + 1
    assert result.amplification > 50
    assert "the model amplifies rounding" in result.reason
    # Against a forward written independently in float64, llama.cpp itself is as far off.
    path = tiny_file("plain", **SHARP)
    truth, theirs = oracle.forward(oracle.load(path), ids)["l_out-11"], run_llama_cpp(path, ids).tensors["l_out-11"]
    assert relative(theirs, truth) == pytest.approx(result.rounding["l_out-11"], rel=0.9)


def test_amplification_excuses_no_more_than_it_explains(tiny_file, monkeypatch):
    model, ids = open_model(tiny_file("plain", **SHARP)), tiny.prompt("plain", 24)
    monkeypatch.setattr(parity, "ROUNDING_FACTOR", 0.1)
    result = verify(model, ids)
    assert not result.verdict
    assert result.first_departure is not None
    assert "every block agrees given llama.cpp's own input, but our own rounding is only" in result.reason
    monkeypatch.undo()
    monkeypatch.setattr(parity.machine, "cpus", lambda: 1)
    mistaken(monkeypatch, another_scale, 7)
    result = verify(model, ids)
    assert not result.verdict
    assert {e.layer for e in result.local if not e.passes} == {7}


def test_rounding_excuses_neither_another_prediction_nor_chaos():
    reference = Reference(logits(0, 5, 4, 3))
    shared = {"mode": "strict", "tolerance": 1e-5}
    assert judge(reference, logits(0, 5.01, 4, 3), {}, **shared, rounding={"logits": 1e-3}).verdict
    assert not judge(reference, logits(0, 5.01, 4, 3), {}, **shared, rounding={"logits": 1e-5}).verdict
    assert not judge(reference, logits(0, 5.5, 4, 3), {}, **shared, rounding={"logits": 1.0}).verdict
    close = Reference(logits(0, 5000, 4999, 3))
    result = judge(close, logits(0, 4999, 5000, 3), {}, **shared, rounding={"logits": 1e-3})
    assert not result.verdict
    assert "rank 2" in result.reason


def test_local_comparisons_need_no_names_but_the_streams(tiny_file):
    result = verify(open_model(tiny_file("olmo")), tiny.prompt("olmo"), strict=True)
    assert result.verdict
    assert not [e for e in result.local if e.name.startswith("ffn_out")]
    assert sum(e.name.startswith("l_out") for e in result.local) == len(open_model(tiny_file("olmo")).config.layers)


def test_only_the_activation_has_a_tolerance_of_its_own(tiny_file):
    result = verify(open_model(tiny_file("starcoder2")), tiny.prompt("starcoder2"), strict=True)
    assert result.verdict
    tolerances = {e.name.rpartition("-")[0] or e.name: e.tolerance for e in result.local}
    assert tolerances == {"ffn_out": 1e-3, "l_out": 1e-3, "result_norm": 1e-5, "logits": 1e-5}


def test_nothing_is_compared_locally_where_llama_cpp_rounds_activations(tiny_file):
    result = verify(open_model(tiny_file("q8_0")), tiny.prompt("q8_0"))
    assert (result.tolerance, result.local, result.first_local_departure) == (None, [], None)
    assert result.data()["local"] == []


def test_a_stream_that_is_not_finite_is_no_input(tiny_file, monkeypatch):
    run = run_llama_cpp

    def broken(*args, **options):
        reference = run(*args, **options)
        reference.tensors["l_out-0"][3, 3] = math.nan
        return reference

    monkeypatch.setattr(parity, "run_llama_cpp", broken)
    result = verify(open_model(tiny_file("three_layers")), tiny.prompt("gqa"))
    assert not result.verdict
    assert result.first_local_departure == "l_out-0"
    assert [e.name for e in result.local if e.name.startswith("l_out")] == ["l_out-0", "l_out-2"]


def test_names_in_the_graph_are_data():
    """As in qwen35: `attn_output` is the branch in some blocks, and something else in those with `linear_attn_out`."""
    graph = Graph(("linear_attn_out", "attn_output"), (), ("block_out", "l_out"))
    one = torch.zeros(1, 1)
    tensors = dict.fromkeys(
        ("attn_output-0", "linear_attn_out-0", "block_out-0", "attn_output-1", "ffn_out-1", "l_out-1", "result_norm"),
        one,
    )
    found = parity.by_kind(tensors, graph)
    assert list(found) == ["attn_out-0", "l_out-0", "attn_out-1", "l_out-1", "result_norm"]
    tensors["linear_attn_out-0"] = torch.ones(1, 1)
    assert parity.by_kind(tensors, graph)["attn_out-0"] is tensors["linear_attn_out-0"]


def test_a_graph_may_name_the_stream_before_a_block():
    """As in step35: `attn_norm_in-1` is what block 0 leaves, and the last block's stream has a name without number."""
    graph = Graph((), (), ("before", "last"), next_input=True)
    tensors = {name: torch.zeros(1, 1) for name in ("before-0", "before-1", "last", "result_norm")}
    found = parity.by_kind(tensors, graph)
    assert list(found) == ["l_out-0", "l_out-1", "result_norm"]
    assert found["l_out-0"] is tensors["before-1"]
    assert found["l_out-1"] is tensors["last"]


# -- refusals ----------------------------------------------------------------------------------------------------------


def write_unknown_architecture(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "nosuch\x1b[2J")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("call", ["run", "rewrite"])
def test_an_architecture_that_llama_cpp_does_not_know(tmp_path, call):
    path = write_unknown_architecture(tmp_path / "m.gguf")
    with pytest.raises(ParityError, match="nosuch") as error:
        run_llama_cpp(path, [1]) if call == "run" else rewrite_as_f32(path, tmp_path)
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


PLAMO2_HEADS = {"attention.head_count": 4}


@pytest.mark.parametrize(
    ("case", "mixers", "lacking"),
    [
        ("nemotron_h", ["mamba2"], "attention"),
        ("lfm2", ["convolution"], "attention"),
        ("lfm2", ["attention"], "a state"),
        ("qwen35", ["gated attention"], "a state"),
    ],
)
def test_hybrids_of_one_kind_of_block_are_refused(case, mixers, lacking, tiny_file):
    """llama.cpp aborts on them; a model of one kind of block by its architecture is no hybrid."""
    keys = {"extra": tiny.row(case)["extra"] | {"attention.recurrent_layers": [False] * 2}} if case == "qwen35" else {}
    model = open_model(tiny_file(case, mixers=tuple(mixers), layers=2, **keys))
    with pytest.raises(ParityError, match=f"a {case} model in which no block has {lacking}: it cannot be compared"):
        verify(model, [1, 2, 3])
    with pytest.raises(ParityError, match=r"llama\.cpp itself ended"):
        run_llama_cpp(model.path, [1, 2, 3])


def test_a_memory_without_groups_of_four_is_not_compared(tiny_file):
    model = open_model(tiny_file("deepseek4_yarn", mixers=("compressed 0", "compressed 128")))
    with pytest.raises(
        ParityError, match="a deepseek4 model in which no block compresses groups of 4 tokens: it cannot"
    ):
        verify(model, [1, 2, 3])
    with pytest.raises(ParityError, match=r"llama\.cpp itself ended"):
        run_llama_cpp(model.path, [1, 2, 3])


def test_a_first_block_that_states_no_heads_is_not_compared(tiny_file):
    """As the converter writes PLaMo 2: llama.cpp does not come back. Where heads are stated, it computes the same."""
    row = {"mixers": ("plamo2", "attention"), "layers": 2}
    model, stated = (open_model(tiny_file("plamo2", **row, **more)) for more in ({}, {"extra": PLAMO2_HEADS}))
    with pytest.raises(ParityError, match="a plamo2 model that rotates heads, but states 0 of them for its first"):
        verify(model, [1, 2, 3])
    assert verify(stated, [1, 2, 3]).verdict
    assert torch.equal(model.trace([1, 2, 3]).logits, stated.trace([1, 2, 3]).logits)


def test_files_that_cannot_be_loaded(tmp_path, tiny_file):
    with pytest.raises(ParityError, match=r"cannot load .*missing\.gguf: .*failed to open.*ggjac itself reads"):
        run_llama_cpp(tmp_path / "missing.gguf", [1])
    with pytest.raises(GGUFError):
        rewrite_as_f32(tmp_path / "missing.gguf", tmp_path)
    short = tmp_path / "short.gguf"
    short.write_bytes(tiny_file("gqa").read_bytes()[:-1000])
    with pytest.raises(ParityError, match=r"cannot load .*short\.gguf: .*not within the file bounds"):
        run_llama_cpp(short, [1])


def test_ids_are_checked(tiny_file):
    for ids in ([128], [-1], [1, 2**31]):
        with pytest.raises(ParityError, match=rf"token id {ids[-1]} is not in llama.cpp's vocabulary of 128"):
            run_llama_cpp(tiny_file("gqa"), ids)
    with pytest.raises(ParityError, match="no token ids"):
        run_llama_cpp(tiny_file("gqa"), [])


def test_without_llama_cpp(tiny_file, monkeypatch, tmp_path):
    model = StandIn(tiny_file("gqa"))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    for call in (lambda: verify(model, [1]), lambda: rewrite_as_f32(tiny_file("gqa"), tmp_path)):
        with pytest.raises(ParityError, match=r"the comparison needs llama.cpp: .*pip install llama-cpp-python$"):
            call()


# -- temporary folders -------------------------------------------------------------------------------------------------


def test_no_temporary_folder_is_no_verdict(tiny_file, monkeypatch):
    """A read-only container: token ids and text work, the comparison says what it lacks."""
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent/x")
    model = open_model(tiny_file("tokenizer"))
    assert model.tokenizer.adds_bos == open_model(tiny_file("tokenizer")).tokenizer.adds_bos
    assert model.tokenize("the")
    for call in (lambda: verify(model, [1, 2]), lambda: run_llama_cpp(model.path, [1])):
        with pytest.raises(ParityError, match=r"needs a temporary folder \(No such file.*\); set TMPDIR"):
            call()
    monkeypatch.delattr(os, "memfd_create", raising=False)
    with pytest.raises(TokenizerError, match=r"no temporary folder \(No such file.*\): set TMPDIR"):
        open_model(tiny_file("tokenizer")).tokenize("the")


def test_a_copy_prefers_a_disk(tiny_file, tmp_path, monkeypatch):
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    for folder in (memory, disk):
        folder.mkdir()
    seen = []
    monkeypatch.setattr(parity, "DISKS", (tmp_path / "absent", disk))
    monkeypatch.setattr(parity.machine, "in_memory", lambda folder: Path(folder).is_relative_to(memory))
    monkeypatch.setattr(tempfile, "tempdir", str(memory))
    monkeypatch.setattr(
        parity, "rewrite_as_f32", lambda path, folder, threads: seen.append(Path(folder).parent) or path
    )
    monkeypatch.delenv("TMPDIR", raising=False)
    model = open_model(tiny_file("q8_0"))
    verify(model, [1, 2], strict=True)
    monkeypatch.setenv("TMPDIR", str(memory))  # the user's decision
    verify(model, [1, 2], strict=True)
    assert seen == [disk, memory]
    assert [*memory.iterdir(), *disk.iterdir()] == []


def test_a_folder_in_memory_has_no_more_room_than_memory(tiny_file, tmp_path, monkeypatch):
    monkeypatch.setattr(parity.machine, "free_memory", lambda: 12_000_000)
    rewrite_as_f32(tiny_file("q8_0"), tmp_path)
    monkeypatch.setattr(parity.machine, "in_memory", lambda folder: True)
    with pytest.raises(
        NoRoomError, match=r"\(it is in memory, not on a disk\), which has 0\.0 GB free; make room, set"
    ):
        rewrite_as_f32(tiny_file("q8_0"), tmp_path)


def test_what_a_killed_process_left_is_told(tiny_file, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in (f"ggjac-{os.getpid()}-own", "ggjac-1-running", "ggjac-elsewhere", "ggjac-9999999-x"):
        (tmp_path / name).mkdir()
    with pytest.warns(UserWarning, match="ggjac-9999999-x: left by a process that was killed; remove it$") as told:
        verify(open_model(tiny_file("gqa")), [1, 2])
    assert len(told) == 1
    assert not any(name in str(told[0].message) for name in ("running", "elsewhere", "own"))
