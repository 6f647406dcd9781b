"""Every command is in the table of `commands.py`, and has its plan, its pages and its runs on a device."""

import pytest
from commands import COMMANDS
from helpers import lacking

from ggjac import cli
from ggjac.planner.work import JOBS
from ggjac.report.sections import ROOMS, SECTIONS

# Rooms of the report that belong to every page, not to a command; and the command whose page has the parts of others.
FRAME, ALL = {"frame"}, {"analyze"}


def test_every_command_has_a_row() -> None:
    planned = set(cli.COMMANDS) - set(cli.WITHOUT_PROMPT)
    assert not lacking({"COMMANDS of ggjac/cli/__init__.py": planned, "tests/commands.py": set(COMMANDS)})


def test_every_command_has_a_plan() -> None:
    assert not lacking({"JOBS of ggjac/planner/work.py": set(JOBS), "tests/commands.py": set(COMMANDS)})


def test_every_command_has_a_room_in_the_report() -> None:
    rooms = {room.__name__.rpartition(".")[2] for room in ROOMS}
    with_a_room = COMMANDS.keys() - ALL | FRAME
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
