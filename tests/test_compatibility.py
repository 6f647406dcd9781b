"""Files that version 0.1.0 wrote before its code changed: finished ones are read, an unfinished run is refused by name.

data/0.1.0 is of a tiny file, `tiny.write("model.gguf", d=16, heads=2, kv_heads=1, ff=24, layers=2, vocab=320,
tokenizer="spm", type="F16")`, and of three commands there, each with the options of `SVD` below:
`analyze --no-verify --per-token --contrast --layers all -o run`, the page deleted; `svd --trace trace`; and
`svd -o unfinished.safetensors`, interrupted in an early sweep.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import COMMANDS
from helpers import distance, error, invoke
from report_run import Page
from safetensors.torch import load_file

from ggjac.cli import session
from ggjac.model import Model

DATA = Path(__file__).parent / "data" / "0.1.0"
SVD = ["svd", "-m", "model.gguf", "--tokens", "260,270,261,275", "-t", 1, "-k", 2]


@pytest.fixture(autouse=True)
def _with_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a copy of the folder."""
    shutil.copytree(DATA, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[Model]:
    """Return the models that commands open from here on."""
    opened: list[Model] = []
    true = session.open_model

    def opening(*args: Any, **options: Any) -> Model:
        opened.append(true(*args, **options))
        return opened[-1]

    monkeypatch.setattr(session, "open_model", opening)
    return opened


def test_a_finished_run_has_its_whole_page() -> None:
    invoke("report", "run")
    page = Page(Path("run/report.html").read_text(encoding="utf-8"))
    sections = {attributes["id"] for tag, attributes in page.elements if tag == "section"}
    expected = COMMANDS["analyze"].page[""]
    assert sections == {*expected, "certificate", "tokens"}
    text = page.text
    assert all(words in text for key, words in expected.items() if key != "svd-per-token")  # its words are of ids
    assert "None" not in text
    svd = json.loads(Path("run/run.json").read_text(encoding="utf-8"))["svd"]
    vector = svd["triplets"][0]
    assert " ".join(vector["left"]) in text  # the tokens of version 0.1.0 as they were shown
    assert all(" ".join(row["nearest"][:3]) in text for row in vector["right"][-1:])
    assert " ".join(svd["per_token"][0]["triplets"][0]["right"]) in text


def test_a_trace_is_read(models: list[Model]) -> None:
    for folder, out in (("trace", "a.safetensors"), ("fresh", "b.safetensors")):
        invoke(*SVD, "--trace", folder, "-o", out)
    old, fresh = (model.weights.reads for model in models)
    assert not old["blk.0.attn_q.weight"]  # a sweep reads no queries, and only the last block is run again
    assert fresh["blk.0.attn_q.weight"]
    found, expected = load_file("a.safetensors"), load_file("b.safetensors")
    assert found.keys() == expected.keys()
    assert all(distance(found[name], expected[name]) < 1e-4 for name in ("S", "U", "Vh"))
    tapes = [[load_file(file) for file in sorted(Path(at).glob("block-*"))] for at in ("trace", "fresh")]
    for a, b in zip(*tapes, strict=True):
        b[".attn.pattern"] = b.pop(".attn.mixers.0.pattern")
        assert a.keys() == b.keys()
    # Another machine may round the forward pass otherwise.
    if all(torch.equal(a[name], b[name]) for a, b in zip(*tapes, strict=True) for name in a):
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_an_unfinished_run_of_other_code_is_refused() -> None:
    before = sorted(Path("unfinished.safetensors.checkpoint").rglob("*"))
    assert ".checkpoint: code: this run was started with" in error(
        *SVD, "-o", "unfinished.safetensors", "--resume", code=1
    )
    assert "contains an unfinished run" in error(*SVD, "-o", "unfinished.safetensors", code=1)
    after = [path for path in sorted(Path("unfinished.safetensors.checkpoint").rglob("*")) if path.name != "lock"]
    assert after == before
