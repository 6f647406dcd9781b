"""Options that do not go together: every pair that a command's rules name is refused, of plans too."""

import itertools

import pytest
from helpers import TOKENS, invoke

from ggjac.cli.apart import Apart, Needs
from ggjac.cli.attribute import RULES
from ggjac.cli.reach import RULES as OF_REACH
from ggjac.cli.steer import RULES as OF_STEER

VALUES = {
    "--max-tokens": ["2"],
    "--answer": ["x"],
    "--answer-tokens": ["1"],
    "--target": ["id:3"],
    "--versus": ["id:4"],
    "--position": ["0"],
    "--exclude": ["0"],
    "--ablate": ["mean"],
    "--reads": ["largest"],
    "--direction": ["entropy"],
    "--layer": ["1"],
    "--at": ["mlp"],
    "--trace": ["folder"],
    "--positions": ["0"],
    "--random": ["2"],
    "--concept": ["x"],
    "--concept-tokens": ["1"],
    "--control-concept": ["x"],
    "--export-control-vector": ["file"],
    "--toward": ["x"],
    "--toward-tokens": ["1"],
}


def written(option: str) -> list[str]:
    """Return an option of a rule as a command line has it."""
    flag, _, value = option.partition(" ")
    return [flag, "0,1" if value == "several" else value] if value else [flag, *VALUES.get(flag, [])]


TABLES = {"attribute": RULES, "reach": OF_REACH, "steer": OF_STEER}
PAIRS = [
    (command, option, other)
    for command, rules in TABLES.items()
    for rule in rules
    if isinstance(rule, Apart)
    for option, other in itertools.product(rule.options, rule.others)
]


@pytest.mark.parametrize(("command", "option", "other"), PAIRS)
def test_both_at_once_are_refused(command: str, option: str, other: str) -> None:
    """Another rule may be the first that they break, as what one of them needs is not given."""
    for plan in ([], ["--dry-run", "--no-bench"]):
        found = invoke(command, *TOKENS, *written(option), *written(other), *plan, code=2).stderr
        assert "leave one of them out" in found or "goes with" in found


@pytest.mark.parametrize(
    ("command", "rule"),
    [(command, rule) for command, rules in TABLES.items() for rule in rules if isinstance(rule, Needs)],
)
def test_alone_they_are_refused(command: str, rule: Needs) -> None:
    for option in rule.options:
        found = invoke(command, *TOKENS, *written(option), code=2).stderr
        assert f"{option} goes with {' or '.join(rule.others)}; give that too, or leave it out" in found


@pytest.mark.parametrize(
    "options",
    [
        ["--ablate", "mean", "--by", "token", "--position", "1"],  # one position, and a value that no rule names
        ["--by", "head", "--reads", "largest"],
    ],
)
def test_what_goes_together_is_not_refused(options: list[str]) -> None:
    invoke("attribute", *TOKENS, *options, "--dry-run", "--no-bench")


def test_the_message_names_both() -> None:
    found = invoke("attribute", *TOKENS, "--ablate", "mean", "--by", "head", code=2).stderr
    assert (
        "--ablate measures the effects of all tokens on one logit: this does not go with --by head; leave one of them"
        in " ".join(found.split())
    )
