"""Control vectors: read back by gguf-py, and obeyed by llama.cpp exactly where and as far as they say."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import oracle
import pytest
import tiny
import torch
from helpers import FIRST, invoke

from ggjac.analysis.intervene import intervene
from ggjac.architectures import ARCHITECTURES
from ggjac.generation import Continuation
from ggjac.gguf.hub import demo_path
from ggjac.llamacpp.control_vector import ControlVectorError, save_control_vector
from ggjac.model import open_model
from ggjac.parity import ParityError, by_kind, run_llama_cpp
from ggjac.runs import RunError

TinyFile = Callable[..., Path]


def direction(d: int = 64) -> torch.Tensor:
    return torch.randn(d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def save(path: Path, *, layer: int, block_count: int, values: torch.Tensor | None = None) -> Path:
    values = direction() if values is None else values
    save_control_vector(path, values, layer=layer, block_count=block_count, architecture="llama")
    return path


def test_the_file_is_what_llamacpps_programs_read(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(save(tmp_path / "v.gguf", layer=3, block_count=5))
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 4,
    }
    assert [(t.name, t.tensor_type.name, t.shape.tolist()) for t in reader.tensors] == [
        (f"direction.{i}", "F32", [64]) for i in (1, 2, 3, 4)
    ]
    for tensor in reader.tensors:
        wanted = direction().float() if tensor.name == "direction.2" else torch.zeros(64)
        assert tensor.data.tolist() == wanted.tolist()


# Architectures that this test leaves out, and why.
APART = {
    "plamo3": "the final norm has no name in the graph",
    "rwkv7": "blocks read the values of the first one, which the loop below does not hand on",
    "arwkv7": "blocks read the values of the first one, which the loop below does not hand on",
}
# And those to whose streams llama.cpp adds none.
IGNORED = [name for name, row in ARCHITECTURES.items() if not row.graph.control_vector]


@pytest.mark.parametrize(
    ("case", "layer"),
    [
        *((case, 2) for name, case in FIRST.items() if name not in (*APART, *IGNORED)),
        ("gqa", 3),
        ("gqa", 4),
        ("gemma2", 4),
        ("gpt_oss", 3),
        ("mixtral", 4),
    ],
)
def test_llamacpp_adds_it_to_the_stream_we_say(case: str, layer: int, tiny_file: TinyFile, tmp_path: Path) -> None:
    """Against the oracle with the direction added after so many blocks, at every position; untouched before."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    given = tiny.options(case)
    layers = given.layers if len(given.mixers) > 1 else 4  # blocks of several kinds are as they are
    path, ids = tiny_file(case, layers=layers, ftype="F32"), tiny.prompt(case, 6)
    known, blocks = oracle.load(path), dataclasses.replace(given, layers=layers).blocks
    push = direction(given.d).float().double()
    vector = save(tmp_path / "v.gguf", layer=layer, block_count=blocks, values=push)
    graph = ARCHITECTURES[known.architecture].graph
    names = (*graph.stream, "result_norm")
    plain = run_llama_cpp(path, ids, threads=1, names=names)
    pushed = run_llama_cpp(path, ids, threads=1, names=names, control_vector=vector)
    before, after = (by_kind(found.tensors, graph) for found in (plain, pushed))

    def pushed_stream(h: torch.Tensor) -> torch.Tensor:
        """Add to every stream, or to the one that runs where others are held or of earlier blocks."""
        alone = known.facts.streams in oracle.FIRST_RUNS
        rest = (0 if alone else 1) * push.repeat(h.shape[1] // len(push) - 1)
        return h + torch.cat([push, rest]).to(h)

    h, states = oracle.embed(known, ids), oracle.forward(known, ids)
    for i in range(blocks):
        h = oracle.block(known, i, h, context=256, states=states)[f"l_out-{i}"]
        h = pushed_stream(h) if i + 1 == layer else h
    truth = oracle.final_norm(known, h, frozen=False)
    tolerance = 1e-3 if known.facts.activation == "gelu" else 1e-5
    assert (after["result_norm"] - truth).norm() <= tolerance * truth.norm()
    for i in range(layer - 1):
        assert torch.equal(after[f"l_out-{i}"], before[f"l_out-{i}"])
    assert (pushed.logits - plain.logits).norm() > 0.05 * plain.logits.norm()

    model = open_model(path)
    capacity = min(256, model.config.longest)
    text = Continuation(model, capacity, change=lambda at, h: pushed_stream(h) if at == layer else h)
    ours = model.head.logits(text.extend(ids))
    assert (ours - pushed.logits).norm() <= tolerance * ours.norm()


@pytest.mark.parametrize("method", ["equation16", "additive"])
def test_the_export_moves_llamacpp_towards_the_concept(method: str, tmp_path: Path) -> None:
    """`ggjac steer` on the demo: llama.cpp with the exported file predicts what the concept does, without it not."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    vector, out = tmp_path / "bridge.gguf", tmp_path / "out.json"
    strength = {"equation16": "0.1,0.6", "additive": "0.1,2"}[method]
    args = ["steer", "--method", method, "--strength", strength, "--no-control", "--max-tokens", "2", "-q", "-t", "1"]
    result = invoke(*args, "-o", out, "--export-control-vector", vector)
    assert f"Saved {vector}" in "".join(result.stdout.split("\n"))
    content = json.loads(out.read_text())
    ids = [token["id"] for token in content["tokens"]]
    gate = content["steering"]["concept"]["top"][0]["id"]
    plain = run_llama_cpp(demo_path(), ids, layers=False, threads=1).logits[-1].softmax(0)
    pushed = run_llama_cpp(demo_path(), ids, layers=False, threads=1, control_vector=vector).logits[-1].softmax(0)
    assert plain[gate] < 0.01
    assert pushed[gate] > 0.1
    assert int(pushed.argmax()) == gate != int(plain.argmax())

    norms = [text["direction_norm"] for text in content["steering"]["steered"]]
    rows = {t.name: np.linalg.norm(t.data) for t in gguf.GGUFReader(vector).tensors}
    block = content["steering"]["changed_after_blocks"] - 1
    assert rows[f"direction.{block}"] == pytest.approx(norms[-1], rel=1e-5)
    assert sum(rows.values()) == pytest.approx(norms[-1], rel=1e-5)


@pytest.mark.parametrize("name", ["file", "left:1"])
def test_a_direction_is_exported_as_it_is_added(name: str, tiny_file: TinyFile, tmp_path: Path) -> None:
    """The bits of the last strength's vector, by gguf-py; and llama.cpp then computes the logits that steering had."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path, vector, file = tiny_file("gqa", layers=4, ftype="F32"), tmp_path / "v.gguf", tmp_path / "probe.npy"
    np.save(file, direction().float().numpy())
    ids, given = [5, 17, 3, 9], str(file) if name == "file" else name
    args = ["steer", "-q", "-t", 1, "-m", path, "--tokens", "5,17,3,9", "--method", "add", "--direction", given]
    args += ["--layer", 3, "--strength", "0.3,2", "--positions", "all", "--max-tokens", 1, "--random", 0]
    assert f"Saved {vector}" in "".join(invoke(*args, "--export-control-vector", vector).stdout.split("\n"))

    model = open_model(path)
    along = direction().float().double() if name == "file" else name
    how = {"layer": 3, "strengths": [0.3, 2.0], "positions": "all", "max_tokens": 1, "random": 0}
    found = intervene(model, ids, along, method="add", **how)
    assert found.added is not None
    if name == "file":
        assert torch.equal(found.added, 2 * along)
    assert float(found.added.norm()) == pytest.approx(found.edited[-1].length, rel=1e-5)
    rows = {t.name: torch.from_numpy(np.array(t.data)) for t in gguf.GGUFReader(vector).tensors}
    assert torch.equal(rows.pop("direction.2"), found.added.float())
    assert not any(row.any() for row in rows.values())
    pushed = run_llama_cpp(path, ids, layers=False, threads=1, control_vector=vector).logits[-1]
    assert (found.edited[-1].logits - pushed).norm() <= 1e-5 * pushed.norm()


def test_what_is_not_one_vector_is_not_exported(tiny_file: TinyFile, tmp_path: Path) -> None:
    path, vector = tiny_file("gqa", layers=4), tmp_path / "v.gguf"
    args = ["steer", "-q", "-m", path, "--tokens", "5,6", "--export-control-vector", vector, "--direction"]
    for wrong, code, words in (
        (["right:1", "--method", "add"], 2, "has a vector of its own for each position"),
        (["left:1", "--method", "remove"], 2, "this does not go with --method remove"),
        (["left:1", "--method", "add", "--layer", 1], 1, "after 2 to 4 blocks of this model, not after 1"),
        (["left:1", "--method", "add", "-o", vector], 2, "name the same file"),
    ):
        assert words in " ".join(invoke(*args, *wrong, code=code).stderr.split())
    assert not vector.exists()
    model = open_model(path)
    for method, named in (("remove", "left:1"), ("add", "right:1")):
        assert intervene(model, [5, 6], named, method=method, max_tokens=1, random=0).added is None


@pytest.mark.parametrize("layer", [0, 1, 6])
def test_where_llamacpp_adds_nothing_we_write_nothing(layer: int, tmp_path: Path) -> None:
    with pytest.raises(ControlVectorError, match=f"after 2 to 5 blocks of this model, not after {layer}"):
        save(tmp_path / "v.gguf", layer=layer, block_count=5)
    assert not list(tmp_path.iterdir())


def test_a_model_of_one_block_has_no_place(tmp_path: Path) -> None:
    with pytest.raises(ControlVectorError, match="after 2 blocks or more, but this model has one"):
        save(tmp_path / "v.gguf", layer=1, block_count=1)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for value in (float("nan"), 1e300):
        with pytest.raises(ControlVectorError, match="not finite in float32"):
            save(tmp_path / "v.gguf", layer=2, block_count=2, values=direction() * value)
    with pytest.raises(RunError):
        save(tmp_path / "absent" / "v.gguf", layer=2, block_count=2)


def test_llamacpp_is_given_no_other_file(tiny_file: TinyFile, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path = tiny_file("gqa")
    (tmp_path / "text").write_text("no vector")
    wide = save(tmp_path / "wide.gguf", layer=2, block_count=2, values=direction(65))
    deep = save(tmp_path / "deep.gguf", layer=4, block_count=4)
    for vector, words in (
        (tmp_path / "text", "is not a control vector"),
        (tmp_path / "absent", "is not a control vector"),
        (path, r"is not a control vector \(no tensor direction.N\)"),
        (wide, r"direction.1 \[65\] does not fit a model of 2 blocks, 64 wide"),
        (deep, r"direction.2 \[64\] does not fit a model of 2 blocks, 64 wide"),
    ):
        with pytest.raises(ParityError, match=words):
            run_llama_cpp(path, [1, 2], layers=False, threads=1, control_vector=vector)


@pytest.mark.parametrize("name", IGNORED)
def test_where_llamacpp_adds_none_none_is_written(name: str, tiny_file: TinyFile, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path, ids = tiny_file(FIRST[name]), tiny.prompt(FIRST[name], 3)
    vector = save(tmp_path / "v.gguf", layer=2, block_count=tiny.options(FIRST[name]).blocks, values=9 * direction())
    plain = run_llama_cpp(path, ids, layers=False, threads=1).logits
    assert torch.equal(run_llama_cpp(path, ids, layers=False, threads=1, control_vector=vector).logits, plain)
    given = ["--tokens", "5,17,3", "--concept-tokens", "9,8", "--export-control-vector", tmp_path / "w.gguf"]
    result = invoke("steer", "-m", path, *given, code=1)
    assert f"llama.cpp adds no control vector to the stream of {name} models; leave out" in result.stderr
    assert not (tmp_path / "w.gguf").exists()


def test_one_direction_is_not_enough_for_several_streams(tiny_file: TinyFile, tmp_path: Path) -> None:
    vector = tmp_path / "v.gguf"
    given = ["--tokens", "5,17,3", "--concept-tokens", "9,8", "--export-control-vector", vector]
    result = invoke("steer", "-m", tiny_file("glm5_next"), *given, code=1)
    assert (
        "has one direction after a block, but in this model 4 residual streams are steered; leave out" in result.stderr
    )
    assert not list(tmp_path.iterdir())
