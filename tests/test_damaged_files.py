"""The tool that reads damaged files: its damage is real, it finds what it should, and a sample of it finds nothing."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

from ggjac.config import read
from ggjac.gguf import open_gguf

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "reliability"


@pytest.fixture(scope="module")
def tool(tiny_file: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Import the tool, on a few whole files."""
    bases = tmp_path_factory.mktemp("bases")
    for case in ("plain", "tokenizer", "q4_k_mixed", "gemma4", "mixtral", "lfm2", "deepseek2"):
        (bases / f"{case}.gguf").symlink_to(tiny_file(case))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(TOOLS), *sys.path])
        patch.setenv("GGJAC_BASES", str(bases))
        import damaged_files

        assert len(damaged_files.bases()) == 7
    return damaged_files


@pytest.mark.parametrize("case", ["plain", "tokenizer", "q4_k_mixed", "gemma4", "mamba2", "deepseek2"])
def test_a_file_taken_apart_is_put_together_again(case: str, tool: ModuleType, tiny_file: Callable[..., Path]) -> None:
    raw = tiny_file(case).read_bytes()
    assert bytes(tool.mutations.parse(raw)) == raw


def test_a_file_in_shards_is_the_same_model(tool: ModuleType, tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    whole = tiny_file("mixtral")
    for i, shard in enumerate(tool.mutations.split(tool.mutations.parse(whole.read_bytes()), 3), 1):
        (tmp_path / f"m-{i:05}-of-00003.gguf").write_bytes(bytes(shard))
    with open_gguf(whole) as one, open_gguf(tmp_path / "m-00001-of-00003.gguf") as several:
        assert set(one.tensors) == set(several.tensors)
        assert all((one.rows(name) == several.rows(name)).all() for name in one.tensors)


def test_every_change_is_one(tool: ModuleType, tiny_file: Callable[..., Path]) -> None:
    raw, made = tiny_file("tokenizer").read_bytes(), Counter[str]()
    for seed in range(300):
        changed, name = tool.mutations.mutated(raw, Random(seed))
        assert tool.mutations.mutated(raw, Random(seed)) == (changed, name)
        made[name] += changed != raw
    names = {"bytes", *(change.__name__ for change in tool.mutations.CHANGES if change)}
    assert set(made) == names
    assert sum(made.values()) > 250


def test_damaged_files_are_refused_by_one_line_or_run(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    seen = Counter[str]()
    home = tmp_path / "home"
    home.mkdir()
    for index in range(250):
        seen[tool.examine_files(tool.damage(7, index)[0], tmp_path / "in", home, run=index % 4 == 0)] += 1
    assert {"open: GGUFError", "configure: ConfigError", "opened", "ran"} <= set(seen)


def careless(metadata: Any, shapes: Any) -> Any:
    raise KeyError("general.architecture")


def untidy(metadata: Any, shapes: Any) -> Any:
    raise read.ConfigError("two\nlines of an error")


def writing(metadata: Any, shapes: Any) -> Any:
    Path("left behind").touch()
    raise read.ConfigError("this is an error of one line")


@pytest.mark.parametrize("fault", [careless, untidy, writing])
def test_the_tool_finds_faults(
    fault: Callable[..., Any], tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, home = tmp_path / "in", tmp_path / "home"
    inside.mkdir()
    home.mkdir()
    monkeypatch.chdir(home)
    for module in ("ggjac.model", "ggjac.inventory"):
        monkeypatch.setattr(f"{module}.read_config", fault)
    whole = {"m.gguf": tool.content(tool.bases()[0])}
    with pytest.raises((KeyError, AssertionError), match=r"architecture|one short printable line|files were written"):
        tool.examine_files(whole, inside, home, run=True)
