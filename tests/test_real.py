"""Two real models against llama.cpp, gguf-py, and autograd over the oracle: tokens, blocks, maps, quantizations, runs.

The files are fetched with tools/fetch_real_models.py; without them these tests skip. Trained weights have what files
made for tests lack: a first token with nearly all of the attention, coordinates a thousand times as large as others,
vocabularies of 49,152 and 262,144 tokens, and predictions that can be judged.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import gguf
import llamacpp
import numpy as np
import oracle
import pytest
import real
import tiny
import torch
from helpers import distance, invoke, invoke_json
from safetensors.numpy import load_file
from torch import Tensor

import ggjac
from ggjac import cli
from ggjac.edits import drawn_tokens
from ggjac.gguf import open_gguf
from ggjac.parity import GELU_TOLERANCE
from ggjac.sizes import ABLATIONS
from ggjac.weights import WeightStore

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.real

PAGE = (Path(__file__).parent / "data" / "page.txt").read_text(encoding="utf-8")
PROMPT = "The capital of France is"
GIB = 1 << 30

# What llama.cpp makes of a file, by its name for the mix. The rows of these models are no multiple of 256 long, but
# for one matrix of each block: the others get the nearest type with blocks of 32.
MIXES = [
    *("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_M", "Q6_K", "Q8_0"),
    *("IQ4_XS", "TQ2_0", "F16", "BF16"),
]
OF_GEMMA3 = ["Q3_K_M", "Q5_K_M", "Q8_0"]  # a few: the file is larger


@pytest.fixture(params=list(real.FILES))
def file(request: pytest.FixtureRequest) -> Path:
    return real.find(request.param)


@pytest.fixture
def smollm2() -> Path:
    return real.find("smollm2")


@pytest.fixture
def quantized(tmp_path: Path) -> Iterator[Callable[[Path, str], Path]]:
    """Return a function that lets llama.cpp quantize a file anew; what it has made is deleted after the test."""
    made = []

    def make(source: Path, mix: str) -> Path:
        made.append(tiny.quantize(source, tmp_path / f"{source.stem}-{mix}.gguf", mix))
        return made[-1]

    yield make
    for path in made:
        path.unlink()


def tolerance(file: Path) -> float:
    """Return what `verify --strict` allows: llama.cpp reads GELU from a table of half precision."""
    return GELU_TOLERANCE if "gemma" in file.name else 1e-5


# --- llama.cpp ----------------------------------------------------------------------------------------------------


def check_strictly(file: Path) -> None:
    """Every tensor of every block is llama.cpp's, in the run and given llama.cpp's own input; and so are the tokens."""
    parity = invoke_json("verify", "--strict", "-m", file, "-p", PROMPT, "-t", 1)["parity"]
    assert parity["verdict"] is True, parity["reason"]
    assert parity["tokens_equal"] is True
    with open_gguf(file) as content:
        blocks = content.metadata[f"{content.metadata['general.architecture']}.block_count"]
    streams = {f"l_out-{i}" for i in range(blocks)}
    for errors in (parity["layers"], parity["local"]):
        assert streams <= {e["name"] for e in errors}
    assert all(e["error"] <= tolerance(file) for e in parity["local"])
    # Rounding accumulates over the blocks; most in weights as coarse as those of three values.
    assert max(e["error"] for e in parity["layers"]) <= 10 * tolerance(file)
    assert parity["logits_error"] <= 10 * tolerance(file)


def test_every_block_agrees_with_llama_cpp(file: Path) -> None:
    check_strictly(file)


@pytest.mark.parametrize(
    ("name", "mix"), [*(("smollm2", mix) for mix in MIXES), *(("gemma3", mix) for mix in OF_GEMMA3)]
)
def test_a_quantization_is_read_as_llama_cpp_reads_it(
    name: str, mix: str, quantized: Callable[[Path, str], Path]
) -> None:
    file = quantized(real.find(name), mix)
    check_strictly(file)
    check_bytes(file)


def check_bytes(file: Path) -> None:
    """One tensor of each type in the file is, in every bit, what gguf-py decodes."""
    found = {}
    for t in gguf.GGUFReader(file).tensors:
        if t.tensor_type not in found or t.n_elements < found[t.tensor_type].n_elements:
            found[t.tensor_type] = t
    assert len(found) >= 2
    with open_gguf(file) as content:
        store = WeightStore(content, device=torch.device("cpu"), dtype=torch.float32, threads=1)
        for kind, t in found.items():
            ours = store[t.name].dense().numpy()
            theirs = gguf.quants.dequantize(t.data, kind).astype(np.float32)
            assert ours.reshape(-1).tobytes() == theirs.reshape(-1).tobytes(), f"{t.name} ({kind.name})"


class Predictions(NamedTuple):
    """How two predictions of each token on a page differ."""

    same: float  # of the top token: share of positions
    gap: float  # largest distance between the two top tokens, in the first one's logits
    kl: Tensor  # nats [n]


def compared(theirs: Tensor, ours: Tensor) -> Predictions:
    p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    top = q.argmax(-1)
    gap = (p.max(-1).values - p.gather(1, top[:, None])[:, 0]).max()
    return Predictions(float((p.argmax(-1) == top).double().mean()), float(gap), (p.exp() * (p - q)).sum(-1))


def test_a_page_of_text_is_predicted_as_by_llama_cpp(file: Path, quantized: Callable[[Path, str], Path]) -> None:
    """At every position: to rounding on the same weights in F32, and within llama.cpp's 8-bit activations as it is.

    How likely the page is judges both: a wrong rotation or scale would agree with nothing, but a wrong reading of the
    file by both would still show here.
    """
    model = ggjac.open_model(file, threads=1)
    ids = model.tokenize(PAGE)
    assert len(ids) > 400
    ours = model.trace(ids, tapes=False).all_logits()
    theirs = llamacpp.run(quantized(file, "F32"), ids, context=len(ids), names=())["logits"]
    strict = compared(theirs, ours)
    gelu = "gemma" in file.name
    assert strict.kl.max() < (1e-5 if gelu else 1e-9)
    assert strict.same == 1 or strict.gap < (1e-2 if gelu else 1e-4)
    rounded = compared(llamacpp.run(file, ids, context=len(ids), names=())["logits"], ours)
    assert rounded.same > 0.9
    assert rounded.gap < 0.5
    assert rounded.kl.mean() < 0.01
    assert rounded.kl.max() < 0.1
    following = ours[:-1].double().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
    assert 10 < (-following.mean()).exp() < 40, "perplexity of ordinary English"


# --- the map ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> Iterator[Callable[[Path], oracle.Oracle]]:
    """Return a function that reads a file's weights in float64; some GB, which are given back afterwards."""
    yield oracle.load
    oracle._read.cache_clear()


def test_an_answer_is_llama_cpps_and_its_shares_sum_to_llama_cpps_logits(
    file: Path, quantized: Callable[[Path, str], Path]
) -> None:
    """Greedily, token by token, on the same weights in F32; the logits before any soft cap, which neither model has."""
    model = ggjac.open_model(file, threads=1)
    ids = model.tokenize(model.chat("What is the capital of France?") if "SmolLM2" in file.name else PROMPT)
    answer = ggjac.generate(model, ids, 12)
    assert " France" in model.text(answer)
    given = {"context": len(ids + answer), "names": ()}
    theirs = llamacpp.run(quantized(file, "F32"), ids + answer, **given)["logits"][len(ids) - 1 : -1]
    assert theirs.argmax(1).tolist() == answer
    split = ggjac.attribute_answer(model.trace(ids + answer).jacobian(), len(ids)).split
    sums, logits = split.shares.sum(1) + split.offsets, theirs.max(1).values.double()
    assert distance(sums, logits) < 10 * tolerance(file)


def test_the_effects_of_tokens_left_out_are_llama_cpps(file: Path, quantized: Callable[[Path, str], Path]) -> None:
    """Each token is replaced by a drawn one; or the mean embedding or zero is given to llama.cpp in its place."""
    model, exact = ggjac.open_model(file, threads=1), quantized(file, "F32")
    ids = model.tokenize(PROMPT)
    jacobian, given = model.trace(ids).jacobian(), {"context": len(ids), "names": ()}
    whole = llamacpp.run(exact, ids, **given)["logits"][-1]
    target = int(whole.argmax())
    table = next(t for t in gguf.GGUFReader(exact).tensors if t.name == "token_embd.weight").data
    scale = table.shape[1] ** 0.5 if "gemma" in file.name else 1.0
    x = torch.tensor(table[ids]) * scale
    mean = torch.tensor(table.sum(0, dtype=np.float64) / np.any(table, axis=1).sum() * scale).float()
    drawn = drawn_tokens(model, 2, seed=0)

    def effect(i: int, by: str) -> float:
        if by == "replace":
            other = next(id for id in drawn if id != ids[i])
            return float((whole - llamacpp.run(exact, [*ids[:i], other, *ids[i + 1 :]], **given)["logits"][-1])[target])
        changed = x.clone()
        changed[i] = mean if by == "mean" else 0
        return float((whole - llamacpp.run(exact, ids, x=changed, **given)["logits"][-1])[target])

    for by in ABLATIONS:
        found = ggjac.ablate(jacobian, model, by, target, draws=1)
        theirs = torch.tensor([effect(i, by) for i in range(len(ids))])
        assert found.logit == pytest.approx(float(whole[target]), rel=10 * tolerance(file))
        assert float(theirs.abs().max()) > 1
        assert distance(found.effects, theirs) < 10 * tolerance(file)


@pytest.mark.parametrize("mlp_path", ["up", "gate"])
def test_shares_are_those_of_autograd_and_sum_to_the_logit(
    file: Path, mlp_path: str, known: Callable[[Path], oracle.Oracle]
) -> None:
    """One backward pass over the oracle in float64, everything frozen that the method freezes, on half a page."""
    model = ggjac.open_model(file, threads=1)
    ids = model.tokenize(PAGE)[:200]
    J = model.trace(ids, mlp_path=mlp_path).jacobian()
    found = ggjac.attribute(J)
    weights = known(file)
    x = oracle.forward(weights, ids)["x"].requires_grad_()
    logits = oracle.forward(weights, ids, freeze=mlp_path, x=x)["logits"][-1]
    assert found.target == int(logits.argmax())
    (gradient,) = torch.autograd.grad(logits[found.target], x)
    expected = (gradient * x.detach()).sum(-1)
    scale = float(expected.abs().sum())
    assert float((found.shares - expected).abs().max()) < 1e-5 * scale
    assert abs(float(found.shares.sum()) + found.offset - float(logits[found.target].detach())) < 1e-5 * scale
    branches = ggjac.attribute_branches(J)
    assert branches.logits.item() == pytest.approx(found.logit, rel=1e-6)
    assert float(branches.unexplained.abs().max()) < 1e-5 * float(branches.attn.abs().sum() + branches.mlp.abs().sum())


def test_the_map_and_its_decompositions_are_those_of_autograd(
    file: Path, known: Callable[[Path], oracle.Oracle]
) -> None:
    """The dense map from 576 (640) backward passes, decomposed by LAPACK: every figure that is made of it."""
    model = ggjac.open_model(file, threads=1)
    ids = model.tokenize("The bridge is the")
    J = model.trace(ids).jacobian()
    expected = oracle.jacobian(known(file), ids, mlp_path="up")
    d, n, _ = expected.J.shape
    assert distance(J.to_dense(), expected.J) < 1e-5
    assert distance(J.output, expected.y) < 1e-5
    assert float(expected.offset.norm()) < 1e-9 * float(expected.y.norm())  # neither model has a bias

    U, S, Vh = torch.linalg.svd(expected.J.reshape(d, n * d), full_matrices=False)
    found = ggjac.spectrum(J, rank=4)
    assert distance(found.svd.S, S[:4]) < 1e-4
    assert abs(float(found.svd.U[0].double() @ U[:, 0])) > 1 - 1e-5
    assert abs(float(found.svd.Vh[0].double().reshape(-1) @ Vh[0])) > 1 - 1e-5

    ranks = ggjac.token_ranks(J)
    norms = expected.J.square().sum((0, 2))
    largest = torch.linalg.matrix_norm(expected.J.transpose(0, 1), 2)
    for rank, exact in zip(ranks.tokens, (norms / largest.square()).tolist(), strict=True):  # estimates, beyond d = 512
        assert abs(rank.value - exact) <= max(4 * rank.error, 1e-3 * exact)
    norms_of_columns = ggjac.norms(J)
    assert distance(norms_of_columns.columns, expected.J.norm(dim=0)) < 1e-5
    assert distance(norms_of_columns.rows, expected.J.norm(dim=2).T) < 1e-5


# --- two files ----------------------------------------------------------------------------------------------------


def test_compare_measures_what_llama_cpp_measures(smollm2: Path, quantized: Callable[[Path, str], Path]) -> None:
    """The divergence of a coarser quantization is that of llama.cpp's logits; a copy in F16 hardly differs."""
    coarse, same = quantized(smollm2, "TQ2_0"), quantized(smollm2, "F16")
    options = ["-p", PROMPT, "-k", 2, "-t", 1]
    found = invoke_json("compare", "-m", smollm2, "--with", coarse, *options)["compare"]
    ids = ggjac.open_model(smollm2, threads=1).tokenize(PROMPT)
    a, b = (
        llamacpp.run(quantized(path, "F32"), ids, names=())["logits"].double().log_softmax(-1)
        for path in (smollm2, coarse)
    )
    kl = (a.exp() * (a - b)).sum(-1)
    assert found["mean_kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found["kl"] == pytest.approx(float(kl[-1]), rel=1e-3)
    assert found["kl"] > 0.1
    copy = invoke_json("compare", "-m", smollm2, "--with", same, *options)["compare"]
    assert copy["kl"] < 1e-5
    assert copy["angles"]["left"][0] < 1, "degrees"
    assert copy["top1_agreement"] == 1


# --- runs ---------------------------------------------------------------------------------------------------------


def test_a_thousand_tokens_stay_within_the_budget(smollm2: Path, tmp_path: Path) -> None:
    """Anonymous memory, sampled from outside; the tapes alone would be 1.6 GiB."""
    ids = ggjac.open_model(smollm2, threads=1).tokenize("\n".join([PAGE] * 3))[:1000]
    assert len(ids) == 1000
    command = ["attribute", "-m", str(smollm2), "--tokens", ",".join(map(str, ids)), "-q", "-t", "1"]
    command += ["--ram-budget", "1GiB", "--format", "json"]
    refusal = invoke(*command, code=4).stderr
    assert "--trace FOLDER" in refusal
    peak = 0
    with open(tmp_path / "out", "w+b") as out:
        whole = [sys.executable, "-m", "ggjac", *command, "--trace", str(tmp_path / "trace")]
        process = subprocess.Popen(whole, stdout=out)
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.005)
        assert process.returncode == 0
        out.seek(0)
        content = json.load(out)
    assert GIB / 8 < peak <= GIB
    found = content["attribution"]
    assert len(found["shares"]) == 1000
    assert sum(e["share"] for e in found["shares"]) == pytest.approx(found["logit"], rel=1e-4)


def anonymous(pid: int) -> int:
    """Return the bytes of anonymous memory of a process; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs os.fork")
def test_a_killed_run_goes_on_to_the_same_bits(smollm2: Path, tmp_path: Path) -> None:
    command = ["svd", "-m", str(smollm2), "-p", PROMPT, "-t", "1", "-k", "2", "-o", "svd.safetensors"]
    program = [sys.executable, str(Path(__file__).with_name("resume_program.py"))]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def attempt(folder: str, *more: str, **how: Any) -> dict[str, Any]:
            assert server.stdin
            assert server.stdout
            (tmp_path / folder).mkdir(exist_ok=True)
            request = {"arguments": [*command, *more], "folder": str(tmp_path / folder), **how}
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        whole = attempt("whole")
        assert whole["code"] == 0, whole["stderr"]
        events = whole["events"]
        assert attempt("killed", end=events // 2)["signal"] == signal.SIGKILL
        assert attempt("killed", "--resume", end=events // 4)["signal"] == signal.SIGKILL
        resumed = attempt("killed", "--resume")
        assert server.stdin
        server.stdin.close()
    assert resumed["code"] == 0, resumed["stderr"]
    assert resumed["events"] < events / 2, "what was done before is not done again"
    expected, found = (load_file(tmp_path / folder / "svd.safetensors") for folder in ("whole", "killed"))
    assert {name: value.tobytes() for name, value in found.items()} == {
        name: value.tobytes() for name, value in expected.items()
    }


# Options that make a command short; a command without a row runs with its defaults.
BRIEF: dict[str, list[object]] = {
    "analyze": ["-k", 1, "--layers", "1,-1", "--contrast", "-o", "run"],
    "svd": ["-k", 1, "--per-token"],
    "layers": ["-k", 1, "--layers", "1,15,-1"],
    "attribute": ["--by", "head"],
    "steer": ["--max-tokens", 3],
}


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name not in ("report", "merge")])
def test_every_command_runs(name: str, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each, with valid JSON; and what runs a prompt has its page of the report."""
    monkeypatch.chdir(tmp_path)
    with click.Context(cli.main) as context:
        command = cli.main.get_command(context, name)
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts}
    given = {"-m": smollm2, "--with": smollm2, "-p": PROMPT, "-t": 1}
    if name == "ranks":
        (tmp_path / "prompts.txt").write_text(f"{PROMPT}\nTwo plus two is\n")
        given = given | {"-p": None, "-f": "prompts.txt"}
    options = [part for option, value in given.items() if option in known and value for part in (option, value)]
    content = invoke_json(name, *options, *BRIEF.get(name, []))
    assert content
    if name in cli.WITHOUT_PROMPT:
        return
    if name == "analyze":
        assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    (tmp_path / "result.json").write_text(json.dumps(content))
    invoke("report", "result.json")
    page = (tmp_path / "result.html").read_text(encoding="utf-8")
    assert os.path.basename(smollm2) in page
    assert "capital" in page
