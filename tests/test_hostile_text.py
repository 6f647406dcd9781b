"""The tool that puts hostile text everywhere: a model that it makes is hostile, it finds what it should, and a sample
of it finds nothing."""

import json
import sys
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

from ggjac.model import open_model

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "reliability"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(TOOLS), *sys.path])
        import hostile_text
    return hostile_text


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_model_has_the_very_bytes(tool: ModuleType, tmp_path: Path, seed: int) -> None:
    at = tool.Round(seed, tmp_path, Random(seed))
    tool.write_model(at)
    tokenizer = open_model(at.model).tokenizer
    assert any(not token.isascii() for token in at.tokens[tool.FIRST :])
    for id in range(tool.FIRST, len(at.tokens)):
        if at.tokens[id]:
            assert tokenizer.name(id) == at.tokens[id]
        else:
            assert tokenizer.name(id)


def test_a_command_that_lets_an_escape_through_is_found(tool: ModuleType, tmp_path: Path) -> None:
    from unittest import mock

    at = tool.Round(0, tmp_path, Random(0))
    tool.write_model(at)
    report = tool.Report()
    with mock.patch("ggjac.display._shown", lambda character: character):
        tool.run(report, at, ["predict", "-q", "--tokens", "300,301,302"], "here")
    assert any("a terminal gets" in finding for finding in report.findings)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("csv", 'a,b\n"x, y",-1.5e-07\n\'=1,inf\n', ""),
        ("csv", "a\n=1+1\n", "a formula in CSV"),
        ("csv", "a\n-x\n", "a formula in CSV"),
        ("csv", "a\n\x1b[31m\n", "a cell of CSV holds"),
        ("csv", "a,b\n1\n", "several lengths"),
        ("latex", "% \\input{x}\n\\begin{tabular}{l}\n\\toprule\n$\\sigma_{1}$ \\\\\n\\end{tabular}\n", ""),
        ("latex", "\\begin{tabular}{l}\n\\input{x} \\\\\n\\end{tabular}\n", "a command in LaTeX"),
        ("latex", "\\begin{tabular}{l}\n} \\\\\n\\end{tabular}\n", "braces"),
        ("latex", "\\begin{tabular}{l}\na%b \\\\\n\\end{tabular}\n", "LaTeX reads"),
        ("latex", "\\begin{tabular}{ll}\na & b \\\\\na \\\\\n\\end{tabular}\n", "rows of LaTeX"),
    ],
)
def test_tables_for_other_programs_are_looked_at(tool: ModuleType, name: str, text: str, found: str) -> None:
    report = tool.Report()
    (tool.check_csv if name == "csv" else tool.check_latex)(report, text, "here")
    assert len(report.findings) == bool(found)
    assert found in "".join(report.findings)


@pytest.mark.parametrize(
    ("file", "raw", "found"),
    [
        ("a.svg", b"<svg>\n</svg>", ""),
        ("a.svg", b"<svg>\xc2\x85</svg>", "holds"),
        ("a.pdf", b"%PDF-1.4\nstream\n\x00/URI \nendstream\n%%EOF", ""),
        ("a.pdf", b"%PDF-1.4\n/URI (x)\n%%EOF", "/URI"),
        ("a.pdf", b"%PDF-1.4\n(\x1b)\n%%EOF", "holds"),
        ("a.pdf", b"%PDF-1.4\n", "no PDF"),
    ],
)
def test_vector_files_are_looked_at(tool: ModuleType, tmp_path: Path, file: str, raw: bytes, found: str) -> None:
    (tmp_path / file).write_bytes(raw)
    report = tool.Report()
    tool.check_figures(report, tmp_path, "here")
    assert len(report.findings) == bool(found)
    assert found in "".join(report.findings)


def test_a_table_that_lets_a_formula_through_is_found(tool: ModuleType, tmp_path: Path) -> None:
    from unittest import mock

    at = tool.Round(0, tmp_path, Random(0))
    tool.write_model(at)
    id = next(i for i in range(tool.FIRST, len(at.tokens)) if at.tokens[i].startswith((b"=", b"+", b"@")))
    given, report = ["ranks", "-q", "--max-sweeps", "3", "--tokens", f"{id},5", "--format", "csv"], tool.Report()
    tool.check_csv(report, tool.run(report, at, given, "here"), "here")
    assert report.findings == []
    with mock.patch("ggjac.results._FORMULA", ("\0",)):
        tool.check_csv(report, tool.run(report, at, given, "here"), "here")
    assert any("a formula in CSV" in finding for finding in report.findings)


def test_json_of_other_bytes_is_found(tool: ModuleType, tmp_path: Path) -> None:
    at = tool.Round(0, tmp_path, Random(0))
    tool.write_model(at)
    id = next(i for i in range(tool.FIRST, len(at.tokens)) if at.kinds[i] == tool.NORMAL and at.tokens[i])
    report = tool.Report()
    tool.check_json(report, at, json.dumps([{"id": id, "text": "", "bytes": at.tokens[id].hex()}]), "here")
    assert report.findings == []
    tool.check_json(report, at, json.dumps([{"id": id, "text": "other"}]), "here")
    tool.check_json(report, at, "{", "here")
    assert len(report.findings) == 2


def test_a_round_finds_nothing(tool: ModuleType, tmp_path: Path) -> None:
    report = tool.campaign(1, 0, tmp_path, browser=False)
    assert report.findings == []
    assert report.looked["commands"] > 40
    assert report.looked["refused"] == 0
    assert report.looked["tokens"] > 1000
