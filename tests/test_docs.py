"""The documents say what the code does: families, commands, and the README's own example."""

import re
from pathlib import Path

import tiny

from ggjac.cli import COMMANDS
from ggjac.config import ARCHITECTURES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_architecture_is_documented_and_no_other() -> None:
    text = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    families = text.split("## Families")[1].split("## Evidence")[0]
    documented = re.findall(r"^\| `([a-z0-9_-]+)` \|", families, re.MULTILINE)
    assert documented == list(ARCHITECTURES)


def test_the_counts_of_families_and_files_are_todays() -> None:
    """Those of the README's table, of which test_families.py compares every file with llama.cpp."""
    assert re.findall(r"(\d+) architectures in (\d+) tiny files", README) == [
        (str(len(ARCHITECTURES)), str(len(tiny.CASES)))
    ]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"Models: (\d+) architectures", changes) == [str(len(ARCHITECTURES))]


def test_every_command_is_in_the_readme_and_no_other() -> None:
    documented = re.findall(r"^\| `ggjac ([a-z]+)` \|", README, re.MULTILINE)
    assert documented == list(COMMANDS)


def test_the_library_example_runs(capsys) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert re.fullmatch(r"\[('[+-]\d+\.\d\d'(, )?)+\] \d+\.\d+\n", capsys.readouterr().out)


def test_the_install_commands_are_what_ci_runs() -> None:
    commands = re.findall(r"^    (pip install .*)$", README, re.MULTILINE)
    assert commands == ["pip install -c constraints.txt .", 'pip install -c constraints.txt ".[test]" && pytest']
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'pip install --quiet --disable-pip-version-check -c constraints.txt ".[test]" && pytest' in run


def test_relative_links_lead_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
