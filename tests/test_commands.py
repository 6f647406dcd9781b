"""Every command is in the table of `commands.py`, and has its plan, its pages and its runs on a device."""

from collections.abc import Callable
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path

import pytest
from commands import COMMANDS
from helpers import lacking

import ggjac
from ggjac import cli
from ggjac.planner.work import JOBS
from ggjac.report.sections import ROOMS, SECTIONS

# Rooms of the report that belong to every page, not to a command, or to a part of one; and the command whose page has
# the parts of others.
FRAME, PARTS, ALL = {"frame"}, {"answer", "edges", "experts", "reads"}, {"analyze"}


def test_every_command_has_a_row() -> None:
    planned = set(cli.COMMANDS) - set(cli.WITHOUT_PROMPT)
    assert not lacking({"COMMANDS of ggjac/cli/__init__.py": planned, "tests/commands.py": set(COMMANDS)})


def test_every_command_has_a_plan() -> None:
    assert not lacking({"JOBS of ggjac/planner/work.py": set(JOBS), "tests/commands.py": set(COMMANDS)})


def test_every_command_has_a_room_in_the_report() -> None:
    rooms = {room.__name__.rpartition(".")[2] for room in ROOMS}
    with_a_room = COMMANDS.keys() - ALL | FRAME | PARTS
    assert not lacking({"ROOMS of ggjac/report/sections/__init__.py": rooms, "tests/commands.py": with_a_room})


@pytest.mark.parametrize("name", COMMANDS)
def test_a_row_is_whole(name: str) -> None:
    command = COMMANDS[name]
    assert command.parts
    assert command.words
    assert "" in command.counted
    assert bool(command.device) == (not command.not_on_devices)
    sections = {section.key for section in SECTIONS}
    for page in command.page.values():
        missing = sorted(page.keys() - sections)
        assert not missing, "SECTIONS of ggjac/report/sections/__init__.py lacks them"
        assert any(key == name or key.startswith(f"{name}-") or name in ALL for key in page)


# In Python -> the command of the same analysis.
SAME = {
    "spectrum": "svd",
    "per_token": "svd",
    "norms": "norms",
    "layers": "layers",
    "contrast": "contrast",
    "predict": "predict",
    "portray": "compare",
    "steer": "steer",
    "analyze": "analyze",
    "verify": "verify",
}
# Measuring the machine takes a session, which a function of a Jacobian does not have.
OTHER = {(name, "search_dtype") for name in ("spectrum", "per_token", "layers")}


@pytest.mark.parametrize("name", SAME)
def test_python_has_the_defaults_of_the_command(name: str, tiny_file: Callable[..., Path]) -> None:
    command = getattr(import_module(f"ggjac.cli.{SAME[name]}"), SAME[name])
    given = ["--with", str(tiny_file("gqa"))] if name == "portray" else []
    params = command.make_context(SAME[name], given).params
    own = {one.name: one.default for one in signature(getattr(ggjac, name)).parameters.values()}
    both = {option for option in own.keys() & params.keys() if own[option] is not Parameter.empty}
    both -= {option for function, option in OTHER if function == name}
    assert both

    def plain(value: object) -> object:
        return list(value) if isinstance(value, tuple) else value

    assert {option: plain(own[option]) for option in both} == {option: plain(params[option]) for option in both}
