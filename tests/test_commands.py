"""Every command is in the table of `commands.py`, and has its plan, its pages and its runs on a device."""

import pytest
from commands import COMMANDS

from ggjac import cli
from ggjac.planner.work import JOBS
from ggjac.report.sections import ROOMS, SECTIONS

# Rooms of the report that belong to every page, not to a command; and the command whose page has the parts of others.
FRAME, ALL = {"frame"}, {"analyze"}


def test_every_command_has_a_row() -> None:
    assert set(cli.COMMANDS) - set(cli.WITHOUT_PROMPT) == COMMANDS.keys()


def test_every_command_has_a_plan() -> None:
    assert COMMANDS.keys() == set(JOBS)


def test_every_command_has_a_room_in_the_report() -> None:
    rooms = {room.__name__.rpartition(".")[2] for room in ROOMS}
    assert rooms == COMMANDS.keys() - ALL | FRAME


@pytest.mark.parametrize("name", COMMANDS)
def test_a_row_is_whole(name: str) -> None:
    command = COMMANDS[name]
    assert command.parts
    assert command.words
    assert "" in command.counted
    assert bool(command.device) == (not command.not_on_devices)
    sections = {section.key for section in SECTIONS}
    for page in command.page.values():
        assert page.keys() <= sections
        assert any(key == name or key.startswith(f"{name}-") or name in ALL for key in page)
