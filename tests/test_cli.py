"""The command line as a newcomer, a script and a stranger's file meet it.

Most commands run in this process through click's runner; signals, pipes and what is imported need processes of their
own. `ggjac(...)` holds every call to the contract: never a traceback, errors on one line, nothing unfinished on disk.
"""

import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import commands
import gguf
import gguf_files
import numpy as np
import oracle
import pytest
import tiny
import torch
from click.testing import CliRunner
from helpers import IDS, TOKENS, check_streams, edited, invoke, invoke_json
from safetensors import safe_open
from safetensors.torch import load_file

import ggjac.parity
import ggjac.tokenizer
from ggjac import runs
from ggjac.cli import COMMANDS, main, progress, verify
from ggjac.cli import options as cli_options
from ggjac.cli.help import HEADINGS
from ggjac.model import open_model
from ggjac.results import Words
from ggjac.tokenizer import DEMO_PROMPTS

TinyFile = Callable[..., Path]


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a folder in which nothing temporary may remain."""
    monkeypatch.chdir(tmp_path)
    yield
    assert [path for path in tmp_path.rglob(".*") if path.name.endswith(".tmp")] == []


@pytest.fixture
def stories(shared: Path) -> Path:
    """Return a real trained model with a tokenizer."""
    return shared / "models" / "stories260K-q8_0.gguf"


# -- help --------------------------------------------------------------------------------------------------------------


def test_the_overview_lists_every_command() -> None:
    for arg in ("--help", "-h"):
        out = invoke(arg).stdout
        assert all(f"\n  {name} " in out for name in COMMANDS)
        assert "ggjac analyze -m llama-3.2-3b-q4_k_m.gguf -p" in out
    assert invoke("--version").stdout == f"ggjac, version {ggjac.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_with_an_example(command: str) -> None:
    out = CliRunner().invoke(main, [command, "--help"], terminal_width=60).stdout
    examples = [line for line in out.split("\n") if line.startswith(f"  ggjac {command} ")]
    assert len(examples) == 1, "one example, on a line of its own"
    context = click.Context(main)
    source = main.get_command(context, command)
    assert source is not None
    assert examples[0].strip() in [line.strip() for line in (source.help or "").split("\n")], "not broken"


def test_a_help_has_every_option_once_its_own_first() -> None:
    context, found = click.Context(main), set()
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        out = CliRunner().invoke(main, [name, "--help"], terminal_width=400).stdout
        out = out[out.index("\nOptions:\n") :]
        options = [param for param in command.get_params(context) if isinstance(param, click.Option)]
        for option in options:
            assert len(re.findall(rf"^  (?:-\w, )?{option.opts[-1]}(?: |$)", out, re.MULTILINE)) == 1, option.opts
        headings = re.findall(r"^([A-Z][\w ]+):$", out, re.MULTILINE)
        assert headings == [heading for heading in ("Options", *HEADINGS) if heading in headings]
        found |= {option.name for option in options}
    named = [name for names in HEADINGS.values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) <= found


# -- every command, as a table and as JSON -----------------------------------------------------------------------------

# Commands that a model and a prompt are enough for.
ALONE = [name for name in commands.COMMANDS if not commands.with_file(name, "")]
ENVELOPE = {
    "schema_version", "created", "versions", "platform", "command", "model", "prompt", "tokens", "warnings", "position",
    "device", "dtype", "mlp_path", "threads", "seconds", "peak_memory_bytes",
}  # fmt: skip


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_ids_on_a_file_without_a_tokenizer(command: str, tiny_file: TinyFile) -> None:
    model = tiny_file("gqa")
    parts, words = commands.COMMANDS[command].parts, commands.COMMANDS[command].words
    more = [*commands.with_file(command, model), "-q"]  # or a slow machine reports progress
    table = invoke(command, "-m", model, *TOKENS, *more)
    assert table.stderr == ""
    assert all(word in table.stdout for word in ["Tokens", "[17]", *words])

    result = invoke(command, "-m", model, *TOKENS, *more, "--format", "json")
    assert result.stderr == ""
    content = json.loads(result.stdout)
    assert content.keys() == ENVELOPE | parts
    assert content["schema_version"] == runs.SCHEMA_VERSION
    assert content["tokens"] == [{"position": i, "id": id, "text": f"[{id}]"} for i, id in enumerate(IDS)]
    assert (content["prompt"], content["position"], content["dtype"], content["mlp_path"]) == (None, 4, "float32", "up")
    assert content["model"]["fingerprint"].startswith("sampled-sha256:")
    assert content["seconds"]
    assert all(seconds >= 0 for seconds in content["seconds"].values())
    assert content["peak_memory_bytes"] > 1e7


@pytest.mark.parametrize("command", ALONE)
def test_text_on_a_real_model(command: str, stories: Path) -> None:
    prompt = "Once upon a time, there was a little girl named"
    out = invoke(command, "-m", stories, "-t", 1, "-p", prompt).stdout
    assert all(
        word in out
        for word in ["<s>", "␣Once", *[word for word in commands.COMMANDS[command].words if word != "l_out-1"]]
    )
    content = json.loads(invoke(command, "-m", stories, "-t", 1, "-p", prompt, "--format", "json").stdout)
    assert content["prompt"] == prompt
    assert [token["text"] for token in content["tokens"]][:3] == ["<s>", " Once", " upon"]
    if command == "predict":
        assert content["predictions"][0]["text"] == " Lily"


def test_info(tiny_file: TinyFile) -> None:
    model = tiny_file("q8_0")
    out = invoke("info", "-m", model, "--tensors").stdout
    assert all(word in out for word in ("Supported: yes", "Q8_0", "llama.block_count", "blk.1.ffn_down.weight"))
    content = json.loads(invoke("info", "-m", model, "--tensors", "--format", "json").stdout)
    reader = gguf.GGUFReader(model)
    assert content["schema_version"] == 1
    assert content["bytes"] == model.stat().st_size
    assert sum(kind["tensors"] for kind in content["types"].values()) == len(content["tensors"]) == len(reader.tensors)
    assert sum(kind["bytes"] for kind in content["types"].values()) == sum(int(t.n_bytes) for t in reader.tensors)
    assert content["metadata"]["llama.embedding_length"] == 64
    assert "tensors" not in json.loads(invoke("info", "-m", model, "--format", "json").stdout)


def test_info_shows_what_it_cannot_run() -> None:
    Path("other.gguf").write_bytes(unknown_architecture())
    assert "Supported: no: " in invoke("info", "-m", "other.gguf").stdout
    content = json.loads(invoke("info", "-m", "other.gguf", "--format", "json").stdout)
    assert content["supported"] is False
    assert "mamba" in content["unsupported_because"]


def test_info_shows_the_tokenizer_when_asked(tiny_file: TinyFile) -> None:
    model = tiny_file("tokenizer")
    assert "tokenizer.ggml.tokens" not in invoke("info", "-m", model).stdout
    assert "320 x STRING: [<unk>, <s>, </s>, <0x00>" in invoke("info", "-m", model, "--tokenizer").stdout


def test_info_says_what_a_prompt_gets_besides_its_text(tiny_file: TinyFile) -> None:
    found = {case: invoke_json("info", "-m", tiny_file(case))["tokenizer"] for case in ("tokenizer", "plain")}
    bos, eos = {"id": 1, "text": "<s>"}, {"id": 2, "text": "</s>"}
    assert found["tokenizer"] == {
        **{"model": "llama", "pre": "default", "tokens": 320, "adds_bos": True, "adds_eos": None},
        **{"bos": bos, "eos": eos, "chat_template": False},
    }
    assert found["plain"]["model"] == "none"
    out = invoke("info", "-m", tiny_file("tokenizer")).stdout
    assert "Tokenizer: llama, pre-tokenizer default; 320 tokens; adds BOS: yes (<s>, id 1); adds EOS: not stated" in out
    assert "Tokenizer: none; give token ids" in invoke("info", "-m", tiny_file("plain")).stdout


@pytest.mark.parametrize(
    "keys",
    [
        [gguf_files.key("tokenizer.ggml.model", gguf_files.INT32, gguf_files.u32(5))],
        [
            gguf_files.key("tokenizer.ggml.model", gguf_files.STRING, gguf_files.text("\x1b[2J")),
            gguf_files.key("tokenizer.ggml.pre", gguf_files.STRING, gguf_files.text("\x1b[2J")),
            gguf_files.key("tokenizer.ggml.tokens", gguf_files.INT32, gguf_files.u32(5)),
            gguf_files.key("tokenizer.ggml.bos_token_id", gguf_files.UINT32, gguf_files.u32(2**32 - 1)),
            gguf_files.key("tokenizer.ggml.add_bos_token", gguf_files.UINT32, gguf_files.u32(1)),
            gguf_files.key("general.architecture", gguf_files.UINT32, gguf_files.u32(1)),
        ],
    ],
)
def test_info_on_a_strange_tokenizer(keys: list[bytes]) -> None:
    Path("odd.gguf").write_bytes(gguf_files.file(keys))
    content = invoke_json("info", "-m", "odd.gguf", "--tokenizer")
    assert content["architecture"] is None
    assert content["tokenizer"]["tokens"] == 0
    assert content["tokenizer"]["bos"] is None
    assert "\x1b" not in invoke("info", "-m", "odd.gguf", "--tokenizer").stdout


def test_a_prompt_comes_from_a_file_but_for_the_newline_at_its_end(stories: Path) -> None:
    Path("prompt.txt").write_bytes("Once upon\r\n a time é\n\n".encode())
    content = json.loads(invoke("predict", "-m", stories, "-f", "prompt.txt", "-t", 1, "--format", "json").stdout)
    assert content["prompt"] == "Once upon\r\n a time é\n"


def test_bos_warnings_are_shown(stories: Path) -> None:
    assert "Warning: " in invoke("predict", "-m", stories, "--tokens", "403,407", "-t", 1).stdout
    assert "Warning: " not in invoke("predict", "-m", stories, "--tokens", "1,403,407", "-t", 1).stdout


def test_a_target_is_an_id_or_one_token(stories: Path) -> None:
    for target, id in ((" Lily", 317), ("␣Lily", 317), ("Lily", 317), ("id:410", 410)):
        result = invoke("attribute", "-m", stories, "-p", "Once", "-t", 1, "--target", target, "--format", "json")
        assert json.loads(result.stdout)["attribution"]["target"]["id"] == id
    assert "3 tokens (" in invoke("attribute", "-m", stories, "-p", "Once", "--target", "Lily was", code=2).stderr
    for target in ("", "410", "id:512", "9" * 30):
        invoke("attribute", "-m", stories, "-p", "Once", "--target", target, code=2)


@pytest.mark.parametrize(
    ("command", "dtype"),
    [("analyze", "bfloat16"), ("svd", "float16"), ("jacobian", "float64"), ("jacobian", "bfloat16")],
)
def test_other_dtypes(command: str, dtype: str, tiny_file: TinyFile) -> None:
    out = "x" if command == "analyze" else "x.safetensors"
    extra = [] if command == "jacobian" else ["-k", "3"]
    result = invoke(command, "-m", tiny_file("plain"), *TOKENS, "--dtype", dtype, "-o", out, *extra, "--format", "json")
    assert json.loads(result.stdout)["dtype"] == dtype
    tensors = load_file("x/tensors.safetensors" if command == "analyze" else out)
    wide = torch.float64 if dtype == "float64" else torch.float32
    assert {name: tensor.dtype for name, tensor in tensors.items() if name != "ids"}[
        "x" if "x" in tensors else "U"
    ] == wide


# -- numbers, judged by the oracle -------------------------------------------------------------------------------------


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert (ours.double() - theirs.double()).norm() <= tolerance * theirs.double().norm()


@pytest.mark.parametrize(
    ("dtype", "tolerance", "mlp_path", "position"),
    [
        ("float32", 1e-5, "up", -1),
        ("float64", 1e-11, "up", -1),
        ("float64", 1e-11, "gate", -1),
        ("float64", 1e-11, "up", 2),
    ],
)
def test_jacobian_file(dtype: str, tolerance: float, mlp_path: str, position: int, tiny_file: TinyFile) -> None:
    model = tiny_file("biases")
    options = ["--dtype", dtype, "--mlp-path", mlp_path, "--position", position, "-o", "j.safetensors"]
    out = invoke("jacobian", "-m", model, *TOKENS, *options).stdout
    assert "Saved j.safetensors" in out
    saved = load_file("j.safetensors")
    truth = oracle.jacobian(model, IDS, mlp_path=mlp_path, position=position)
    assert saved.keys() == {"jacobian", "x", "y", "offset", "ids"}
    close(saved["jacobian"], truth.J, tolerance)
    close(saved["x"], truth.x, tolerance)
    close(saved["y"], truth.y, tolerance)
    close(saved["offset"], truth.offset, 10 * tolerance)
    assert saved["ids"].tolist() == IDS
    assert saved["ids"].dtype == torch.int64
    with safe_open("j.safetensors", "pt") as file:
        provenance = json.loads(file.metadata()["ggjac"])
    assert (provenance["dtype"], provenance["mlp_path"], provenance["position"]) == (dtype, mlp_path, position % 5)


def test_svd_file(tiny_file: TinyFile) -> None:
    model = tiny_file("biases")
    invoke("svd", "-m", model, *TOKENS, "-k", 6, "--tol", "1e-9", "--dtype", "float64", "-o", "s.safetensors")
    saved = load_file("s.safetensors")
    J = oracle.jacobian(model, IDS, mlp_path="up").J
    assert saved.keys() == {"U", "S", "Vh", "residual", "ids"}
    assert [tuple(saved[name].shape) for name in ("U", "S", "Vh", "residual")] == [(6, 64), (6,), (6, 5, 64), (6,)]
    close(saved["S"], torch.linalg.svdvals(J.flatten(1))[:6], 1e-9)
    pushed = torch.einsum("dnm,knm->kd", J, saved["Vh"])
    close(pushed, saved["S"][:, None] * saved["U"], 1e-8)
    assert (saved["residual"] <= 1e-9).all()
    assert saved["ids"].tolist() == IDS


def test_the_same_seed_gives_the_same_digits(tiny_file: TinyFile) -> None:
    def bits(seed: int) -> bytes:
        invoke("svd", "-m", tiny_file("plain"), *TOKENS, "-k", 2, "-s", seed, "-o", "s.safetensors")
        return load_file("s.safetensors")["Vh"].numpy().tobytes()

    first = bits(3)
    assert first == bits(3)
    assert first != bits(4)


def test_predict_files(tiny_file: TinyFile) -> None:
    model = tiny_file("gqa")
    logits = oracle.forward(oracle.load(model), IDS)["logits"]
    invoke("predict", "-m", model, *TOKENS, "--all-positions", "-o", "p.safetensors")
    saved = load_file("p.safetensors")
    assert saved.keys() == {"logits", "ids"}
    close(saved["logits"], logits, 1e-5)
    result = invoke(
        "predict", "-m", model, *TOKENS, "--position", 1, "-k", 3, "-o", "p.safetensors", "--format", "json"
    )
    close(load_file("p.safetensors")["logits"], logits[1], 1e-5)
    best = logits[1].topk(3)
    rows = json.loads(result.stdout)["predictions"]
    assert [row["id"] for row in rows] == best.indices.tolist()
    close(torch.tensor([row["logit"] for row in rows]), best.values, 1e-5)
    close(torch.tensor([row["probability"] for row in rows]), logits[1].softmax(0)[best.indices], 1e-4)


def test_attribution_is_exact(tiny_file: TinyFile) -> None:
    model = tiny_file("biases")
    truth = oracle.jacobian(model, IDS, mlp_path="up")
    w = oracle.load(model).weights["output.weight"][7]
    result = invoke("attribute", "-m", model, *TOKENS, "--target", 7, "--dtype", "float64", "--format", "json")
    data = json.loads(result.stdout)["attribution"]
    close(
        torch.tensor([share["share"] for share in data["shares"]], dtype=torch.float64),
        torch.einsum("d,dnm,nm->n", w, truth.J, truth.x),
        1e-10,
    )
    assert data["offset"] == pytest.approx(float(w @ truth.offset), rel=1e-9)
    assert data["logit"] == pytest.approx(float(w @ truth.y), rel=1e-11)


def test_run_folder(tiny_file: TinyFile) -> None:
    model = tiny_file("biases")
    printed = invoke("analyze", "-m", model, *TOKENS, "-k", 4, "-o", "new/run", "--format", "json").stdout
    assert sorted(os.listdir("new/run")) == ["report.html", "run.json", "tensors.safetensors"]
    content = runs.load_run("new/run")
    assert content == {key: value for key, value in json.loads(printed).items() if key != "run_folder"}
    assert content["parity"]["verdict"] is True
    assert content["reconstruction"]["error"] <= 1e-5
    assert content["svd"]["converged"] is True
    attribution = content["attribution"]
    total = sum(share["share"] for share in attribution["shares"]) + attribution["offset"]
    assert total == pytest.approx(attribution["logit"], rel=1e-5)
    assert attribution["target"]["id"] == content["predictions"][0]["id"]
    assert attribution["logit"] == pytest.approx(content["predictions"][0]["logit"], rel=1e-6)

    saved = load_file("new/run/tensors.safetensors")
    assert saved.keys() == {
        *("U", "S", "Vh", "residual", "x", "y", "offset", "linear_output", "logits", "shares", "ids")
    }
    truth = oracle.jacobian(model, IDS, mlp_path="up")
    S = torch.linalg.svdvals(truth.J.flatten(1))
    close(saved["S"], S[:4], 1e-5)
    close(saved["y"], truth.y, 1e-5)
    close(saved["linear_output"], truth.y - truth.offset, 1e-5)
    close(saved["logits"], oracle.forward(oracle.load(model), IDS)["logits"][-1], 1e-5)
    assert saved["S"].tolist() == [triplet["singular_value"] for triplet in content["svd"]["triplets"]]
    assert content["stable_rank"]["value"] == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-4)


@pytest.mark.parametrize("command", ["contrast", "analyze"])
def test_the_ordinary_jacobian_is_saved_beside_the_detached_one(command: str, tiny_file: TinyFile) -> None:
    model, options = tiny_file("biases"), ["-m", tiny_file("biases"), *TOKENS, "-o", "saved", "--format", "json"]
    content = json.loads(invoke(command, *options, *(["--contrast"] if command == "analyze" else [])).stdout)
    saved = load_file("saved" if command == "contrast" else "saved/tensors.safetensors")
    assert saved.keys() >= {"y", "offset", "linear_output", "ordinary_output", "ids"}
    truth = oracle.jacobian(model, IDS, mlp_path=None)
    close(saved["ordinary_output"], torch.einsum("end,nd->e", truth.J, truth.x), 1e-4)
    close(saved["linear_output"] + saved["offset"], truth.y, 1e-5)
    detached, ordinary = content["contrast"]["detached"], content["contrast"]["ordinary"]
    assert detached.keys() == ordinary.keys()
    assert detached["error"] < 1e-5
    assert (detached["top1"], detached["top"], detached["top_agreement"]) == (True, 10, 1.0)
    error = float((saved["ordinary_output"] - truth.y).norm() / truth.y.norm())
    assert ordinary["error"] == pytest.approx(error, rel=1e-4)
    assert error > 0.1


def test_norms_file(tiny_file: TinyFile) -> None:
    model = tiny_file("gqa")
    out = invoke("norms", "-m", model, *TOKENS, "--position", 2, "--count", 2, "-o", "f", "--format", "json").stdout
    saved, truth = load_file("f"), oracle.jacobian(model, IDS, mlp_path="up", position=2)
    assert saved.keys() == {"columns", "rows", "ids"}
    close(saved["columns"], truth.J.norm(dim=0), 1e-5)
    close(saved["rows"], truth.J.norm(dim=2).T, 1e-5)
    positions = json.loads(out)["norms"]["positions"]
    assert [(p["position"], p["text"]) for p in positions] == [(i, f"[{id}]") for i, id in enumerate(IDS[:3])]
    for p in positions:
        for kind, words in (("columns", 8), ("rows", 4)):
            lengths = saved[kind][p["position"]]
            assert [entry["component"] for entry in p[kind]] == lengths.topk(2).indices.tolist()
            assert [entry["norm"] for entry in p[kind]] == lengths.topk(2).values.tolist()
            assert all(len(entry["tokens"]) == words for entry in p[kind])


def test_a_run_gets_a_name_of_its_own(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")  # two runs within one second
    for _ in range(2):
        invoke("analyze", "-m", tiny_file("one_layer"), *TOKENS, "-k", 1, "--no-verify")
    stem = tiny_file("one_layer").stem
    assert sorted(os.listdir("ggjac-runs")) == [f"{stem}-20260101-000000", f"{stem}-20260101-000000-1"]


# -- checks that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["verify", "analyze"])
def test_exit_code_3_when_llama_cpp_disagrees(
    command: str, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = ggjac.parity.run_llama_cpp, tiny_file("plain", seed=1)
    monkeypatch.setattr(ggjac.parity, "run_llama_cpp", lambda path, *args, **options: run(other, *args, **options))
    out = invoke(command, "-m", tiny_file("plain"), *TOKENS, code=3).stdout
    assert "llama.cpp (as is): DISAGREES" in out
    content = json.loads(invoke(command, "-m", tiny_file("plain"), *TOKENS, "--format", "json", code=3).stdout)
    assert content["parity"]["verdict"] is False


@pytest.mark.parametrize("command", ["svd", "analyze"])
def test_exit_code_3_when_the_sweeps_run_out(command: str, tiny_file: TinyFile) -> None:
    args = ["--max-sweeps", 2, "--tol", "1e-6", "-o", "saved"]
    out = invoke(command, "-m", tiny_file("plain"), *TOKENS, *args, code=3).stdout
    assert "NOT converged to 1e-06 after 2 sweeps" in out
    assert Path("saved").exists()


@pytest.mark.parametrize("command", ["svd", "attribute", "analyze", "jacobian", "contrast", "norms"])
def test_exit_code_3_when_the_reconstruction_fails(
    command: str, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ggjac import jacobian

    monkeypatch.setitem(jacobian.HEALTHY, torch.float32, 1e-20)
    assert "NOT healthy" in invoke(command, "-m", tiny_file("plain"), *TOKENS, code=3).stdout


@pytest.mark.parametrize("command", ["svd", "attribute", "layers", "jacobian", "contrast", "norms", "analyze"])
def test_an_output_of_zeros_is_not_healthy(command: str, tiny_file: TinyFile, tmp_path: Path) -> None:
    path = edited(Path(shutil.copy(tiny_file("plain"), tmp_path)), "output_norm.weight", 0.0)
    options = ["--no-verify", "-o", tmp_path / "run"] if command == "analyze" else []
    assert "= nan (> 1e-05: NOT healthy)" in invoke(command, "-m", path, *TOKENS, *options, code=3).stdout


@pytest.mark.parametrize("case", ["plain", "q8_0", "q4_0_tied", "q4_k_mixed", "tokenizer"])
def test_strict_parity(case: str, tiny_file: TinyFile) -> None:
    prompt = ["-p", "the rain", "-t", 1] if case == "tokenizer" else TOKENS
    result = invoke("verify", "-m", tiny_file(case), "--strict", *prompt, "--format", "json")
    data = json.loads(result.stdout)["parity"]
    assert data["verdict"] is True
    assert max(layer["error"] for layer in data["layers"]) <= 1e-5
    assert data["tokens_equal"] is (True if case == "tokenizer" else None)


# -- bad input ---------------------------------------------------------------------------------------------------------


class Bad(NamedTuple):
    """A command that must fail: its arguments (`MODEL` stands for a good file), exit code, and words of the line."""

    args: list[str]
    code: int
    words: str
    file: Callable[[bytes], bytes] | None = None  # makes `bad.gguf` from the bytes of a good file


def unknown_architecture() -> bytes:
    name = gguf_files.key("general.architecture", gguf_files.STRING, gguf_files.text("mamba\x1b[31m"))
    return gguf_files.file([name], [gguf_files.Tensor()], bytes(32))


def overlapping(_: bytes) -> bytes:
    return gguf_files.file([], [gguf_files.Tensor("a"), gguf_files.Tensor("b")], bytes(64))


def misaligned(_: bytes) -> bytes:
    return gguf_files.file([], [gguf_files.Tensor("a", offset=4)], bytes(64))


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        assert content.count(old) == 1
        assert len(old) == len(new)
        return content.replace(old, new)

    return change


def with_value(tensor: str, value: float) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        Path("good.gguf").write_bytes(content)
        entry = next(t for t in gguf.GGUFReader("good.gguf").tensors if t.name == tensor)
        start = int(entry.data_offset)
        return content[:start] + struct.pack("<e", value) + content[start + 2 :]

    return change


RUN = ["predict", "-m", "MODEL", *TOKENS]
BROKEN = ["predict", "-m", "bad.gguf", *TOKENS]
FF = b"llama.feed_forward_length" + gguf_files.u32(4)
BAD: dict[str, Bad] = {
    # the command line
    "no such command": Bad(["nonsense"], 2, "No such command 'nonsense'"),
    "nearly a command": Bad(["attribut"], 2, "no such command: attribut; did you mean attribute?"),
    "no such option": Bad(["--nonsense"], 2, "No such option"),
    "no such option of a command": Bad([*RUN, "--nonsense"], 2, "ggjac predict --help"),
    "no such choice": Bad([*RUN, "--dtype", "int8"], 2, "float32"),
    "rubbish as tokens": Bad(["predict", "-m", "MODEL", "--tokens", "1,x"], 2, "write them as 1,2,3"),
    "tokens without end": Bad(["predict", "-m", "MODEL", "--tokens", "9" * 5000], 2, "write them as 1,2,3"),
    "no tokens": Bad(["predict", "-m", "MODEL", "--tokens", ""], 2, "write them as 1,2,3"),
    "two prompts": Bad([*RUN, "-p", "x"], 2, "--prompt and --tokens both"),
    "three prompts": Bad([*RUN, "-p", "x", "-f", "latin1.txt"], 2, "both give a prompt"),
    "rank 0": Bad(["svd", "-m", "MODEL", *TOKENS, "-k", "0"], 2, "--rank"),
    "rank beyond the dimension": Bad(["svd", "-m", "MODEL", *TOKENS, "-k", "65"], 2, "has 64 singular values"),
    "top 0": Bad([*RUN, "-k", "0"], 2, "--top"),
    "tolerance NaN": Bad(["svd", "-m", "MODEL", *TOKENS, "--tol", "nan"], 2, "nan is not a finite number"),
    "tolerance without end": Bad(["svd", "-m", "MODEL", *TOKENS, "--tol", "inf"], 2, "inf is not a finite number"),
    "tolerance 0": Bad(["svd", "-m", "MODEL", *TOKENS, "--tol", "0"], 2, "--tol"),
    "position beyond": Bad([*RUN, "--position", "5"], 2, "positions 0 to 4"),
    "position of words": Bad([*RUN, "--position", "x"], 2, "one, counted from 0 or back from -1; see"),
    "positions of one": Bad([*RUN, "--position", "0,2"], 2, "back from -1 (only attribute takes several)"),
    "position before": Bad([*RUN, "--position", "-6"], 2, "positions 0 to 4"),
    "seed too large": Bad(["svd", "-m", "MODEL", *TOKENS, "-s", "9" * 30], 2, "--seed"),
    "threads 0": Bad([*RUN, "-t", "0"], 2, "--threads"),
    "threads without end": Bad([*RUN, "-t", "100000"], 2, "--threads"),
    "unknown device": Bad([*RUN, "--device", "abacus"], 2, "try auto, cpu or cuda"),
    "meta device": Bad([*RUN, "--device", "meta"], 2, "holds no numbers"),
    "device not in this torch": Bad([*RUN, "--device", "xla"], 1, "use cpu"),
    "all positions of nothing": Bad([*RUN, "--all-positions"], 2, "-o"),
    # the prompt
    "empty prompt": Bad(["predict", "-m", "MODEL", "-p", ""], 2, "prompt is empty"),
    "empty prompt file": Bad(["predict", "-m", "MODEL", "-f", "empty.txt"], 2, "prompt is empty"),
    "prompt file missing": Bad(["predict", "-m", "MODEL", "-f", "missing.txt"], 2, "'missing.txt' does not exist"),
    "prompt file not UTF-8": Bad(["predict", "-m", "MODEL", "-f", "latin1.txt"], 2, "is not UTF-8"),
    "text without a tokenizer": Bad(["predict", "-m", "MODEL", "-p", "x"], 1, "--tokens 1,2,3"),
    "default text without a tokenizer": Bad(["analyze", "-m", "MODEL"], 1, "--tokens 1,2,3"),
    "target text without a tokenizer": Bad(["attribute", "-m", "MODEL", *TOKENS, "--target", "x"], 2, "id:4"),
    "token too large": Bad(["predict", "-m", "MODEL", "--tokens", "1,128"], 2, "0 to 127"),
    "token negative": Bad(["predict", "-m", "MODEL", "--tokens", "1,-1"], 2, "0 to 127"),
    "token enormous": Bad(["predict", "-m", "MODEL", "--tokens", "9" * 40], 2, "0 to 127"),
    "prompt too long": Bad(["predict", "-m", "MODEL", "--tokens", ",".join(["1"] * 257)], 2, "(--context N)"),
    # the file
    "missing file": Bad(["predict", "-m", "missing.gguf", *TOKENS], 2, "'missing.gguf' does not exist"),
    "a folder as file": Bad(["predict", "-m", ".", *TOKENS], 2, "is a directory"),
    "empty file": Bad(["predict", "-m", "empty.txt", *TOKENS], 1, "file is empty"),
    "not a GGUF": Bad(BROKEN, 1, "bad.gguf", lambda _: b"PK\x03\x04" + bytes(1000)),
    "truncated header": Bad(BROKEN, 1, "download", lambda content: content[:300]),
    "truncated data": Bad(BROKEN, 1, "download", lambda content: content[:-1000]),
    "absurd number of keys": Bad(BROKEN, 1, "bad.gguf", lambda _: gguf_files.header([], [], key_count=2**62)),
    "absurd number of tensors": Bad(BROKEN, 1, "bad.gguf", lambda _: gguf_files.header([], [], tensor_count=2**62)),
    "overlapping tensors": Bad(BROKEN, 1, "overlap", overlapping),
    "misaligned tensors": Bad(BROKEN, 1, "align", misaligned),
    "unknown architecture": Bad(BROKEN, 1, "mamba", lambda _: unknown_architecture()),
    "missing tensor": Bad(BROKEN, 1, "blk.1.ffn_up.weight is missing", replaced(b"blk.1.ffn_up.w", b"blk.1.ffn_uX.w")),
    "wrong shape": Bad(
        BROKEN, 1, "calls for", replaced(FF + gguf_files.u32(96), FF + gguf_files.u32(97))
    ),
    "absurd size": Bad(BROKEN, 1, "4294967295", replaced(FF + gguf_files.u32(96), FF + gguf_files.u32(2**32 - 1))),
    "NaN scale": Bad(BROKEN, 1, "blk.0.ffn_up.weight holds NaN", with_value("blk.0.ffn_up.weight", float("nan"))),
    "infinite scale": Bad(BROKEN, 1, "blk.1.attn_v.weight holds NaN", with_value("blk.1.attn_v.weight", float("inf"))),
    # the result
    "output below a file": Bad([*RUN, "-o", "empty.txt/x"], 1, "its folder is a file"),
    "output in no folder": Bad([*RUN, "-o", "missing/x"], 1, "create it"),
    "output is a folder": Bad([*RUN, "-o", "."], 1, "is a folder"),
    "output is a device": Bad([*RUN, "-o", "/dev/null"], 1, "not a regular file"),
    "output is the model": Bad(["predict", "-m", "MODEL", *TOKENS, "-o", "MODEL"], 2, "is an input of this command"),
    "run folder exists": Bad(["analyze", "-m", "MODEL", *TOKENS, "-o", "full"], 1, "choose another name"),
    "run folder is a file": Bad(["analyze", "-m", "MODEL", *TOKENS, "-o", "empty.txt"], 1, "choose another name"),
    "run folder below a file": Bad(["analyze", "-m", "MODEL", *TOKENS, "-o", "empty.txt/x"], 1, "is a file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, tiny_file: TinyFile) -> None:
    bad, good = BAD[name], tiny_file("q8_0")
    Path("empty.txt").touch()
    Path("latin1.txt").write_bytes("é".encode("latin-1"))
    Path("full").mkdir()
    Path("full", "kept").touch()
    if bad.file:
        Path("bad.gguf").write_bytes(bad.file(good.read_bytes()))
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for arguments in [bad.args, [*bad.args, "--format", "json"]] if len(bad.args) > 1 else [bad.args]:
        result = invoke(*(str(good) if arg == "MODEL" else arg for arg in arguments), code=bad.code)
        assert bad.words in result.stderr
        assert result.stdout == ""
        assert len(result.stderr) < 500
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    assert not Path("ggjac-runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_cuda_where_there_is_none(device: str, tiny_file: TinyFile) -> None:
    err = invoke("predict", "-m", tiny_file("plain"), *TOKENS, "--device", device, code=1).stderr
    assert device in err
    assert "use cpu" in err


SAVING = {"analyze": "run"} | dict.fromkeys(["predict", "svd", "attribute", "jacobian", "contrast", "norms"], "f")


@pytest.mark.parametrize("command", SAVING)
def test_no_disk_space(command: str, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 900, 100))
    if command == "jacobian":  # whose result may be large: told before the work
        monkeypatch.delattr("ggjac.model.Model.trace")
    assert "make room" in invoke(command, "-m", tiny_file("plain"), *TOKENS, "-o", SAVING[command], code=4).stderr
    assert os.listdir() == []


@pytest.mark.parametrize("command", SAVING)
def test_a_disk_that_fills_up(command: str, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runs.TensorWriter, "write", full)
    assert "disk is full" in invoke(command, "-m", tiny_file("plain"), *TOKENS, "-o", "new", code=4).stderr
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError("3 GiB"), 4, "out of memory (3 GiB)"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            4,
            "out of memory",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 4, "out of memory"),
        (OSError(errno.EIO, "Input/output error", "disk"), 1, "disk: Input/output error"),
        (ValueError("two\nlines \x1b[31m\udcff"), 1, "two lines \\x1b[31m<0xFF>"),
    ],
)
def test_errors_of_any_kind(
    error: Exception, code: int, words: str, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("ggjac.model.Model.trace", fail)
    assert words in invoke("predict", "-m", tiny_file("plain"), *TOKENS, code=code).stderr


def test_a_bug_is_called_one(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggjac.model.Model.trace", lambda *args, **options: 1 / 0)
    result = CliRunner().invoke(main, ["predict", "-m", str(tiny_file("plain")), *TOKENS])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ZeroDivisionError: division by zero; this is a bug")
    assert result.stderr.count("\n") == 1
    result = CliRunner().invoke(main, ["predict", "-m", str(tiny_file("plain")), *TOKENS], env={"GGJAC_DEBUG": "1"})
    assert isinstance(result.exception, ZeroDivisionError)


# -- strangers' files --------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>",
    "\x1b[31mred",
    "[red]markup[/red]",
    "two\nlines",
    "\u202erevo",
    "\x9b31m",
    "a\rb",
    "\x07",
    "\u200b",
    "\U0001f600",
]


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a model whose vocabulary and metadata try to steer a terminal."""

    def add(writer: gguf.GGUFWriter, vocab: int) -> None:
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *HOSTILE]
        kinds = [2, 3, 3, *[6] * 256, *[1] * (1 + len(HOSTILE))]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(pieces)
        writer.add_token_scores([0.0] * len(pieces))
        writer.add_token_types(kinds)
        writer.add_string("general.name", "".join(HOSTILE))
        writer.add_string("evil\x1b[31m", "x")

    monkeypatch.setattr(tiny, "add_spm", add)
    return tiny.write(tmp_path / "hostile.gguf", tokenizer="spm", vocab=260 + len(HOSTILE))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("command", [*ALONE, "info"])
def test_hostile_tokens(command: str, native: bool, hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setitem(sys.modules, "llama_cpp", None)
    args: list[object] = ["--tokens", ",".join(str(260 + i) for i in range(len(HOSTILE))), "-t", 1]
    args = ["--tokenizer"] if command == "info" else args
    args += {"predict": ["-k", 300], "svd": ["-k", 1, "--top", 300], "analyze": ["-k", 1]}.get(command, [])
    for form in ("table", "json") if native else ("table",):
        # No raw control characters: `ggjac_` sees to it.
        result = invoke(command, "-m", hostile, *args, "--format", form, code=None if command == "verify" else 0)
        if result.exit_code == 1:
            assert not native
            continue
        assert "[red]markup[/red]" in result.stdout
        assert "\\x1b[31mred" in result.stdout or "\\u001b[31mred" in result.stdout
        if form == "json":
            json.loads(result.stdout)


@pytest.mark.parametrize("charset", ["cp1252", "latin-1", "ascii"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_in_encodings_without_our_symbols(command: str, charset: str) -> None:
    """As on Windows, where stdout is a file or a pipe."""
    result = CliRunner(charset=charset).invoke(main, [command, "--help"], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"ggjac {command}" in result.stdout


@pytest.mark.parametrize("charset", ["cp1252", "latin-1", "ascii"])
@pytest.mark.parametrize("command", [*commands.COMMANDS, "info", "plan"])
def test_results_in_encodings_without_our_symbols(command: str, charset: str, hostile: Path) -> None:
    """Tables are escaped, and JSON stays the JSON that it is in UTF-8."""
    ids = ["--tokens", str(260 + HOSTILE.index("\U0001f600")), "-t", "1"]
    more = ["--tokenizer"] if command == "info" else [*ids, *map(str, commands.with_file(command, hostile))]
    form = ["--format", "json"]
    for options in ([], form):
        args = [command, "-m", str(hostile), *more, *options]
        result = CliRunner(charset=charset).invoke(main, args, catch_exceptions=False)
        assert result.exit_code in (0, 3), result.stderr
        if options:
            json.loads(result.stdout)
    if command != "plan":
        assert "\\ud83d\\ude00" in result.stdout


def test_encodings_without_our_symbols(tiny_file: TinyFile) -> None:
    out = run("attribute", "-m", tiny_file("plain"), *TOKENS, env={"PYTHONIOENCODING": "cp1252"}).stdout
    assert "[17]" in out
    assert "\\u2016J x" in out


def test_the_verdict_comes_before_the_layers_that_differ_most(tiny_file: TinyFile) -> None:
    out = invoke("verify", "-m", tiny_file("q8_0"), *TOKENS, "--count", 2).stdout
    verdict, table = out.split("\nLayers against llama.cpp\n")
    assert "llama.cpp (as is): agrees" in verdict
    assert "nats at the last position (mean " in verdict
    data = json.loads(invoke("verify", "-m", tiny_file("q8_0"), *TOKENS, "--format", "json").stdout)["parity"]
    worst = sorted(data["layers"], key=lambda e: -e["error"])[:2]
    assert [line.split()[0] for line in table.split("\n")[2:4]] == [e["name"] for e in data["layers"] if e in worst]
    count = len(data["layers"])
    assert f"\n{count - 2} more, which differ less: --count {count} or --format json\n" in table
    assert "more, which" not in invoke("verify", "-m", tiny_file("q8_0"), *TOKENS, "--count", count).stdout


def test_both_tokens_of_a_near_tie_are_shown(tiny_file: TinyFile, capsys: pytest.CaptureFixture) -> None:
    ours, theirs = torch.tensor([[4.0, 4.2, 3]]), torch.tensor([[4.0, 3.9, 3]])
    found = ggjac.parity.judge(ggjac.parity.Reference(theirs), ours, {}, mode="as is", tolerance=None)
    verify.show(found.data(Words(open_model(tiny_file("plain")).trace(IDS))))
    out = capsys.readouterr().out
    assert "agrees: near tie: llama.cpp's top token is our second, 0.20 logits below our first, " in out
    assert "top token [0] (ours [1]), KL" in out


# -- without llama.cpp -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ALONE)
def test_without_llama_cpp(command: str, tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    for case in ("plain", "tokenizer"):
        result = invoke(command, "-m", tiny_file(case), *TOKENS, code=1 if command == "verify" else 0)
        if command == "verify":
            assert "pip install llama-cpp-python" in result.stderr
        if command == "analyze":
            assert "llama.cpp: not compared: " in result.stdout
            assert "pip install llama-cpp-python" in result.stdout
    err = invoke(command, "-m", tiny_file("tokenizer"), "-p", "the", code=1).stderr
    assert "pip install llama-cpp-python" in err
    assert "--tokens" in err


DEFAULTS = {"analyze": ["-k", 2, "-o", "run"], "predict": [], "svd": ["-k", 1], "steer": [], "verify": []}


@pytest.mark.parametrize("command", DEFAULTS)
def test_the_demo_needs_no_llama_cpp(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed by `pip install .`, or a library that does not load: the default prompts come with their ids."""
    broken = tmp_path / "path" / "llama_cpp"
    broken.mkdir(parents=True)
    for name in ("__init__.py", "llama_cpp.py"):
        (broken / name).write_text("raise ImportError('libllama.so: blocked')")
    monkeypatch.syspath_prepend(broken.parent)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    result = invoke(command, *DEFAULTS[command], "-q", "-t", 1, code=1 if command == "verify" else 0)
    if command == "verify":
        assert "llama-cpp-python cannot be loaded (libllama.so: blocked)" in result.stderr
        assert "--tokens" not in result.stderr
    if command in ("analyze", "predict"):
        assert "␣Golden     1206" in result.stdout

    planned = "" if command == "verify" else "Fits.\n"
    assert invoke(command, *DEFAULTS[command], "--dry-run", "--no-bench").stdout.endswith(planned)


def test_the_default_prompts_come_with_their_ids() -> None:
    defaults = {text for name, text in vars(cli_options).items() if re.fullmatch("DEFAULT_PROMPT|STEER_[A-Z]+", name)}
    assert defaults == DEMO_PROMPTS.keys()
    assert {text: tuple(open_model().tokenizer.encode(text)) for text in defaults} == DEMO_PROMPTS


def test_a_default_prompt_is_known_for_the_demo_alone(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert "pip install llama-cpp-python" in invoke("predict", "-m", tiny_file("tokenizer"), code=1).stderr


def test_analyze_records_that_it_did_not_compare(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    invoke("analyze", "-m", tiny_file("plain"), *TOKENS, "-k", 2, "-o", "run")
    assert runs.load_run("run")["parity"]["verdict"] is None
    invoke("analyze", "-m", tiny_file("plain"), *TOKENS, "-k", 2, "-o", "other", "--no-verify")
    assert "parity" not in runs.load_run("other")


# -- processes of their own --------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parents[1]
SCRIPT = [sys.executable, "-m", "ggjac"]


def environment(env: dict[str, str] | None = None) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(HERE), "PYTHONIOENCODING": "utf-8"} | (env or {})


def run(*args: object, code: int = 0, env: dict[str, str] | None = None, script: list[str] = SCRIPT) -> Any:
    result = subprocess.run(
        [*script, *map(str, args)], capture_output=True, text=True, env=environment(env), timeout=120
    )
    check_streams(result.returncode, result.stdout, result.stderr)
    assert result.returncode == code, result.stderr
    return result


def test_without_llama_cpp_at_all(tiny_file: TinyFile) -> None:
    blocked = "import sys; sys.modules['llama_cpp'] = None; from ggjac.cli import main; main(prog_name='ggjac')"
    script = [sys.executable, "-c", blocked]
    result = run("analyze", "-m", tiny_file("q4_k_mixed"), *TOKENS, "-k", 2, "-o", "run", script=script)
    assert "not compared" in result.stdout
    native = load_file("run/tensors.safetensors")
    # Dequantization in torch is bit-equal to libggml's, and so is everything that follows.
    invoke("analyze", "-m", tiny_file("q4_k_mixed"), *TOKENS, "-k", 2, "-o", "other")
    close(load_file("other/tensors.safetensors")["logits"], native["logits"], 1e-6)


def test_what_must_answer_at_once_imports_no_arithmetic(tiny_file: TinyFile) -> None:
    program = f"""
import sys
from ggjac.cli import main
def heavy():
    return {{"torch", "gguf", "llama_cpp", "scipy", "safetensors", "jaxtyping"}} & set(sys.modules)
for command in [], *{list(COMMANDS)!r}:
    main([*([command] if command else []), "--help"], standalone_mode=False)
assert not heavy() and not {{"numpy", "rich"}} & set(sys.modules), sys.modules.keys()
main(["info", "-m", {str(tiny_file("plain"))!r}], standalone_mode=False)
main(["info", "-m", {str(tiny_file("plain"))!r}, "--format", "json"], standalone_mode=False)
assert not heavy(), heavy()
"""
    run(script=[sys.executable, "-c", program])


def test_console_script(tiny_file: TinyFile) -> None:
    script = shutil.which("ggjac") or shutil.which("ggjac", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("the package is not installed, and so has no console script")
    for call in ([script], SCRIPT):
        assert run("--version", script=call).stdout.startswith("ggjac, version ")
    assert "q8_0" in run("info", "-m", tiny_file("q8_0"), script=[script]).stdout
    bare = subprocess.run([script], capture_output=True, text=True, env=environment(), timeout=60)
    assert bare.returncode == 2
    assert "Commands:" in bare.stderr


def test_a_reader_that_goes_away(tiny_file: TinyFile) -> None:
    for command, args in {"info": ["--tensors"], "analyze": [*TOKENS, "-k", "1", "--no-verify"]}.items():
        process = subprocess.Popen(
            [*SCRIPT, command, "-m", str(tiny_file("plain")), *args],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        with process.stdout, process.stderr:
            process.stdout.close()
            assert process.stderr.read() == ""
        assert process.wait(60) == 1
    assert os.listdir() == [], "the run folder of a broken run"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_stdout_that_cannot_be_written(tiny_file: TinyFile) -> None:
    for target in (">/dev/full", ">&-"):
        script = ["bash", "-c", f'exec "$@" {target}', "bash", *SCRIPT]
        assert "redirect it" in run("info", "-m", tiny_file("plain"), code=1, script=script).stderr


def test_a_file_size_limit_leaves_nothing(tiny_file: TinyFile) -> None:
    script = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *SCRIPT]
    err = run("jacobian", "-m", tiny_file("plain"), *TOKENS, "-o", "j", code=1, script=script).stderr
    assert "j: cannot be written (File too large)" in err
    assert os.listdir() == []


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose analyses take minutes: 8 M weights, to be run on 250 positions."""
    path = tmp_path_factory.mktemp("slow") / "slow.gguf"
    return tiny.write(path, layers=8, d=256, heads=4, ff=1024, type="Q8_0")


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize(("number", "command"), [(signal.SIGINT, "analyze"), (signal.SIGTERM, "jacobian")])
def test_signals_leave_nothing_but_what_can_be_resumed(number: signal.Signals, command: str, slow: Path) -> None:
    args = [command, "-m", str(slow), "-t", "1", "--tokens", ",".join(["1", "2"] * 125), "-o", "new"]
    args += ["--no-verify", "-k", "64", "--tol", "1e-12"] if command == "analyze" else []
    process = subprocess.Popen(
        [*SCRIPT, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    deadline = time.monotonic() + 60
    while not os.listdir():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)  # into the work
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    check_streams(130, out, err)
    if os.listdir():  # a block was behind it
        folder = {"analyze": "new/checkpoint", "jacobian": "new.checkpoint"}[command]
        assert os.listdir() == [folder.split("/")[0]]
        assert "journal.json" in os.listdir(folder)
        last = "Interrupted; progress is saved; to continue, run the same command with --resume -o new"
    else:
        last = "Interrupted; no partial files were left"
    assert err.endswith(f"\n{last}\n")


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX's")
@pytest.mark.parametrize(("command", "columns"), [("info", 60), ("analyze", 60), ("analyze", 100)])
def test_tables_fit_the_terminal(command: str, columns: int, tiny_file: TinyFile) -> None:
    import pty

    master, slave = pty.openpty()
    Path("model.gguf").symlink_to(tiny_file("plain"))
    args = [] if command == "info" else ["--tokens", ",".join(["100"] * 20), "-t", "1", "-o", "run"]
    process = subprocess.Popen(
        [*SCRIPT, command, "-m", "model.gguf", *args],
        stdout=slave, stderr=subprocess.PIPE, text=True, env=environment({"COLUMNS": str(columns), "TERM": "xterm"}),
    )  # fmt: skip
    os.close(slave)
    chunks = []
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(master)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0
    lines = b"".join(chunks).decode().replace("\x1b[1m", "").replace("\x1b[0m", "").split("\r\n")
    lines = [line for line in lines if not line.lstrip().startswith("sampled-sha256:")]  # one word, longer than 60
    assert max(map(len, lines)) <= columns
    assert all(line.isprintable() and "…" not in line for line in lines)
    words = {"info": {"llama.context_length", "F32"}, "analyze": {"[100]", "Stable"}}
    assert words[command] <= set(" ".join(lines).split())


# -- progress ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a clock that stands still until its one element is changed."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])  # of all modules
    return now


def test_plain_progress_every_five_seconds(clock: list[float], capfd: pytest.CaptureFixture) -> None:
    with progress.Reporter(quiet=False).stage("svd") as update:
        for second in range(13):
            clock[0] = second
            update("block", second, 13)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.split("\n") == [
        "svd: block 5/13, 5 s, about 7 s left",  # counted as six steps: the first was at second 0
        "svd: block 10/13, 10 s, about 3 s left",
        "",
    ]


def test_short_stages_say_nothing_but_are_timed(clock: list[float], capfd: pytest.CaptureFixture) -> None:
    reporter = progress.Reporter(quiet=False)
    for name in ("trace", "svd"):
        with reporter.stage(name) as update:
            clock[0] += 4.9
            update("block", 1, 1)
    assert capfd.readouterr() == ("", "")
    assert reporter.seconds == {"trace": 4.9, "svd": 4.9}


def test_quiet_progress(clock: list[float], capfd: pytest.CaptureFixture) -> None:
    with progress.Reporter(quiet=True).stage("svd") as update:
        clock[0] = 100
        update("block", 1, 2)
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_stderr_and_results_to_stdout(tiny_file: TinyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    args = ["analyze", "-m", tiny_file("plain"), *TOKENS, "-k", 2, "--format", "json"]
    loud, silent = invoke(*args, "-o", "a"), invoke(*args, "-o", "b", "-q")
    json.loads(loud.stdout)
    json.loads(silent.stdout)
    assert silent.stderr == ""
    lines = loud.stderr.split("\n")
    for start in ("trace: block 2/2", "svd: sweep 1, block", "svd: sweep 2, block", "attribution: block ", "verify: "):
        assert any(line.startswith(start) for line in lines), start
    line = next(line for line in lines if line.startswith("svd: sweep 5, "))
    assert np.isfinite(float(line.split("worst residual ")[1].split(",")[0]))


def test_alarming_rows_are_red_on_a_terminal_only(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ggjac.cli.render import table

    rows = [("l_out-0", "1e-7"), ("l_out-1", "1e-2"), ("l_out-2", "2e-2")]
    table("Layers", ["tensor", "#error"], rows, {1, 2})
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setattr("ggjac.cli.render.on_terminal", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    table("Layers", ["tensor", "#error"], rows, {1, 2})
    red = [text for text in capsys.readouterr().out.splitlines() if "\x1b[1;31m" in text]
    assert [text.count("l_out") for text in red] == [1, 1]
    assert not any("l_out-0" in text for text in red)


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="this system has no SIGBUS")
def test_a_crash_says_what_it_was_and_where() -> None:
    program = """
import signal
from ggjac.cli import main
from ggjac.gguf import GGUFFile
GGUFFile.rows = lambda *_: signal.raise_signal(signal.SIGBUS)
main(["predict", "--tokens", "1"])
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), timeout=60
    )
    assert ended.returncode == -signal.SIGBUS
    assert ended.stdout == ""
    assert ended.stderr.startswith("Fatal Python error: Bus error\n")
    assert "store.py" in ended.stderr


def test_a_bare_prompt_is_told_of_its_option() -> None:
    assert "(text): a prompt is given by -p; see ggjac predict --help" in invoke("predict", "text", code=2).stderr
    assert "-p" not in invoke("models", "text", code=2).stderr


def test_a_new_trace_folder_lies_in_one_that_exists(tmp_path: Path) -> None:
    where = tmp_path / "typo" / "trace"
    assert f"there is no folder {where.parent}; make it" in invoke("svd", "-k", 1, "--trace", where, code=2).stderr
    assert not where.parent.exists()
    assert "No such option" in invoke("predict", "--trace", tmp_path / "kept", code=2).stderr


def test_an_empty_question_is_refused() -> None:
    assert "--chat has no question" in invoke("predict", "--chat", " ", code=2).stderr


def test_info_says_what_it_did_not_read_and_what_was_asked(tmp_path: Path) -> None:
    assert "Only the header was read; --check also looks for damage" in invoke("info").stdout
    assert "Only the header" not in invoke("info", "--check").stdout


def test_an_interrupt_before_the_command_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggjac.guard.install", lambda: signal.raise_signal(signal.SIGINT))
    assert "Interrupted; no partial files were left" in invoke("info", "absent.gguf", code=130).stderr


@pytest.mark.parametrize("options", [["--target", " Paris"], ["--target", ""], ["--versus", "id:x"]])
def test_a_token_by_its_text_without_a_tokenizer(options: list[str], tiny_file: TinyFile) -> None:
    error = invoke("attribute", "-m", tiny_file("plain"), *TOKENS, *options, code=2).stderr
    assert f"{options[0]} {options[1]!r} is a text, and the file has no tokenizer; give an id, as id:4" in error
