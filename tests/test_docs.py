"""The documents say what the code does: families, commands, and the README's own example."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from commands import COMMANDS as ANSWERS
from helpers import lacking

import ggjac
from ggjac.architectures import ARCHITECTURES, Architecture
from ggjac.cli import COMMANDS
from ggjac.cli.together import REFUSED
from ggjac.config import others

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
FENCED = re.compile(r"```.*?```", re.DOTALL)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_architecture_is_documented_and_no_other() -> None:
    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    families = text.split("## Families")[1].split("## Evidence")[0]
    documented = re.findall(r"^\| `([a-z0-9_-]+)` \|", families, re.MULTILINE)
    assert not lacking({"docs/architectures.md": set(documented), "ARCHITECTURES": set(ARCHITECTURES)})
    assert len(documented) == len(ARCHITECTURES), "docs/architectures.md has an architecture twice"


def test_every_language_model_that_is_left_out_is_documented_with_its_reason() -> None:
    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8").split("## Not supported")[1]
    assert [name for name, why in others.LEFT_OUT.items() if f"- `{name}`: {why}." not in text] == []


def test_the_worked_example_of_a_new_family_has_the_lines_of_the_files() -> None:
    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8").split("## How to add one")[1]
    lines = [line.split(maxsplit=1) for line in FENCED.findall(text)[0].splitlines()[1:-1]]
    assert len(lines) == 6
    assert [line for file, line in lines if line not in (ROOT / file).read_text(encoding="utf-8")] == []


def test_the_page_says_where_constant_factors_are_applied() -> None:
    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8").split("\n| factors of |")[1]
    rows = text.split("\n\n")[0].splitlines()[2:]
    attention, head, networks, recurrent = (set(re.findall("`(.*?)`", row)) for row in rows)

    def names(condition: Callable[[Architecture], object]) -> set[str]:
        return {name for name, row in ARCHITECTURES.items() if condition(row)}

    none = names(lambda row: not row.output_scales or row.looped or row.streams == "held")
    assert attention == none | names(lambda row: row.mixer != "latent" and not row.qkv_scales)
    assert head == names(lambda row: not row.head_scale)
    assert networks == names(lambda row: row.ffn_scales or row.down_scales)
    assert recurrent == names(lambda row: row.recurrent_scales)


def test_the_counts_of_families_and_files_are_todays() -> None:
    """Those of the README's table, of which test_families.py compares every file with llama.cpp."""
    files = [(str(len(ARCHITECTURES)), str(len(tiny.CASES)))]
    assert re.findall(r"(\d+) architectures in (\d+) tiny files", README) == files, "the counts in README.md"
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"Models: (\d+) architectures", changes) == [str(len(ARCHITECTURES))], "the count in CHANGELOG.md"


def test_every_command_is_in_the_readme_and_no_other() -> None:
    documented = re.findall(r"^\| `ggjac ([a-z]+)` \|", README, re.MULTILINE)
    assert not lacking({"README.md": set(documented), "COMMANDS of ggjac/cli/__init__.py": set(COMMANDS)})
    assert documented == list(COMMANDS), "in README.md's table of commands and in COMMANDS the order differs"


def test_the_library_example_runs(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert re.fullmatch(r"\[('[+-]\d+\.\d\d'(, )?)+\] \d+\.\d+\n", capsys.readouterr().out)


def test_every_public_name_is_documented() -> None:
    """In the README's table of commands, or on the library page, whose code is run by test_tutorial.py."""
    text = README + (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    missing = set(ggjac.__all__) - {"__version__"} - set(re.findall(r"\bggjac\.(\w+)", text))
    assert not missing, "neither README.md nor docs/library.md has `ggjac.NAME`"


def test_what_does_not_run_on_devices_or_in_several_processes_is_documented() -> None:
    out = " and ".join(f"`{name}`" for name, command in sorted(ANSWERS.items()) if command.not_on_devices)
    assert f"every command but {out}, on an emulated device" in README
    faq, scale = (re.sub(r"\s+", " ", (ROOT / f"docs/{name}.md").read_text("utf-8")) for name in ("faq", "scale"))
    assert f"every command except {out} on an emulated device" in faq
    _, _, table = scale.partition("Every command that sweeps can be run in this way, except:")
    for command, options in REFUSED.items():
        for option in options:
            flag = f"--{option.replace('each_line', 'mean').replace('_', '-').replace('=', ' ')}" if option else ""
            assert f"`{command}" in table
            assert flag in table, (command, flag)


def test_every_command_is_in_the_changelog() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    missing = [name for name in COMMANDS if not re.search(rf"\b{name}\b", changes)]
    assert not missing, "CHANGELOG.md does not name them"


def test_the_install_commands_are_what_ci_runs() -> None:
    commands = re.findall(r"^    (pip install .*)$", README, re.MULTILINE)
    tests = 'pip install -c constraints.txt ".[test]" && pytest -n auto'
    assert commands == ['pip install -c constraints.txt ".[llama]"', tests]
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'pip install --quiet --disable-pip-version-check -c constraints.txt ".[test]" && pytest -n auto' in run


def test_llama_cpp_is_an_extra_which_the_tests_need() -> None:
    """It has to be compiled: `pip install .` must work without a compiler."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert not any("llama" in name for name in project["dependencies"])
    assert any(name.startswith("llama-cpp-python") for name in extras["llama"])
    assert "ggjac[llama]" in extras["test"]


def anchors(document: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_relative_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", document.read_text(encoding="utf-8")):
            page = document.parent / target if target else document
            assert page.exists(), f"{document.name} links to {target}"
            assert not anchor or anchor in anchors(page), f"{document.name} links to {target}#{anchor}"


def test_the_checklists_name_files_that_exist() -> None:
    """NAME stands for a question; what exists for one of them exists for all."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:ggjac|tests|docs|tools)/[\w./]*)`", text)
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path.replace("NAME", "norms")).exists(), path
    sources = [path.read_text(encoding="utf-8") for part in ("ggjac", "tests") for path in (ROOT / part).rglob("*.py")]
    for name in set(re.findall(r"`([A-Z_]+)`", text)):
        assert any(re.search(rf"^{name}\b", source, re.MULTILINE) for source in sources), name
