"""Wrong arguments of the library are refused in words, as a user meets them: without this test run's type checks."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from ggjac import checks

CHILD = """
import json, sys
import numpy, torch
import ggjac
m = ggjac.open_model()
ids = [0, 465, 637, 719, 462]
t = m.trace(ids)
J = t.jacobian()
nan = float("nan")
for call in json.load(sys.stdin):
    try:
        eval(call)
    except Exception as error:
        print(json.dumps([isinstance(error, ValueError), type(error).__name__, str(error)]))
    else:
        print(json.dumps([False, "nothing raised", ""]))
"""

REFUSED = {
    "ggjac.attribute(J, target=99999)": "token id 99999 is out of range; the vocabulary has ids 0 to",
    "ggjac.attribute(J, target=-1)": "token id -1 is out of range",
    "ggjac.attribute(J, target=True)": "token id True is not a whole number",
    "ggjac.attribute(J, versus=1.5)": "token id 1.5 is not a whole number",
    "ggjac.attribute(J, 5, 5)": "target and versus are both token id 5: the difference is 0; give two tokens",
    "ggjac.attribute_positions(J, 5, 5)": "target and versus are both token id 5",
    "ggjac.attribute_branches(J, 5, 5)": "target and versus are both token id 5",
    "ggjac.attribute_branches(J, positions=range(3, 99))": "position=range(3, 99): 5 is out of range; the prompt has",
    "ggjac.attribute_branches(J, positions=[1.5])": "position 1.5 is not a whole number",
    "ggjac.attribute_positions(J, positions=[True])": "position True is not a whole number",
    "ggjac.attribute_positions(J, positions='1;2')": "position=1;2: write numbers and ranges as 0,10-20,-1, or all",
    "ggjac.per_token(J, 1, positions=[5])": "input_position=[5]: 5 is out of range; the output depends on positions 0",
    "ggjac.per_token(t.jacobian(2), 1, positions='3')": "input_position=3 is out of range; the output depends on",
    "ggjac.portray(J, target=99999)": "token id 99999 is out of range",
    "m.trace(5)": "the prompt is of type int; give a text, or a list of token ids",
    "m.trace(b'abc')": "the prompt is of type bytes",
    "m.trace([1.5])": "token id 1.5 is not a whole number",
    "m.trace([True])": "token id True is not a whole number",
    "m.trace(torch.zeros(1, 3, dtype=int))": "token id tensor([0, 0, 0]) is not a whole number",
    "m.plan(True)": "the number of tokens True is not a whole number",
    "t.jacobian(1.5)": "position 1.5 is not a whole number",
    "t.jacobian(True)": "position True is not a whole number",
    "t.top(-1)": "count -1 is out of range: it must be at least 1",
    "J.svd(1.5)": "rank 1.5 is not a whole number",
    "J.svd(1, seed=-1)": "seed -1 is out of range",
    "J.svd(1, seed=2**63)": "seed 9223372036854775808 is out of range: it must be at most",
    "J.svd(1, max_sweeps=4.5)": "max_sweeps 4.5 is not a whole number",
    "ggjac.spectrum(J, 1, top=0)": "top 0 is out of range",
    "ggjac.per_token(J, 1, top=1.5)": "top 1.5 is not a whole number",
    "ggjac.predict(t, -1)": "top -1 is out of range",
    "ggjac.norms(J, 0)": "count 0 is out of range",
    "ggjac.norms(J, row_words=0)": "row_words 0 is out of range",
    "ggjac.contrast(J, top=-2)": "top -2 is out of range",
    "ggjac.stable_rank(J, None, probes=1)": "probes 1 is out of range: it must be at least 2",
    "ggjac.layers(J, 1, depths=[1.5])": "depth 1.5 is not a whole number",
    "ggjac.layers(J, 1, maps=['no'])": "maps ['no']: give some of cumulative, blockwise, to_end",
    "ggjac.layers(J, 1, maps='cumulative')": "maps 'cumulative': give some of",
    "ggjac.layers(J, 1, kinds=['no'])": "kinds ['no']: give some of layer, attn, mlp",
    "ggjac.layers(J, 1, top=0)": "top 0 is out of range",
    "ggjac.steer(m, 5, [1])": "the prompt is of type int",
    "ggjac.steer(m, ids, [1], strengths=0.5)": "strengths 0.5: give a list of finite numbers",
    "ggjac.steer(m, ids, [1], strengths=[nan])": "strengths [nan]: give a list of finite numbers",
    "ggjac.steer(m, ids, [1], top=0)": "top 0 is out of range",
    "ggjac.steer(m, ids, [1], max_tokens=1.5)": "max_tokens 1.5 is not a whole number",
    "ggjac.steer(m, ids, [1], layer=1.5)": "layer 1.5 is not a whole number",
    "ggjac.steer(m, ids, [1], control=False, control_concept=[2])": "control_concept is given, and control=False",
    "ggjac.ranks(m, 5)": "prompts is of type int; give a list of texts",
    "ggjac.ranks(m, 'a text')": "prompts is of type str; give a list of texts",
    "ggjac.analyze(m, ids, layers=[1.5])": "depth 1.5 is not a whole number",
    "ggjac.open_model(threads=1.5)": "threads 1.5 is not a whole number",
    "ggjac.open_model(context=0)": "context 0 is out of range",
}


def test_wrong_arguments_are_refused_by_a_value_error_in_words() -> None:
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(command, input=json.dumps([*REFUSED]), capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (call, words), (in_words, kind, message) in zip(REFUSED.items(), answers, strict=True):
        assert in_words, (call, kind, message)
        assert words in message.replace("\n", " / "), (call, kind, message)


def test_whole_numbers_of_other_types_count() -> None:
    assert [checks.whole("k", number, 0) for number in (0, np.int64(3), np.uint8(7))] == [0, 3, 7]
    assert type(checks.whole("k", np.int64(3))) is int
    with pytest.raises(ValueError, match=r"^k 3 is out of range: it must be at most 2$"):
        checks.whole("k", 3, 1, 2)
    with pytest.raises(ValueError, match=r"^k '9+… is not a whole number$"):
        checks.whole("k", "9" * 1000)


@pytest.mark.parametrize(
    ("same", "expected"),
    [
        (["-3,-1", "-1,-3", " -1 , -3,-1", [-1, -3]], "-3,-1"),
        (["0,1", "0,0,1", "0-1", "1,0", "0-0,1", (1, 0)], "0-1"),
        (["0,10-20,-1", "-1,15-20,10-16,0"], "0,10-20,-1"),
        (["-4--2", "-2,-4--3"], "-4--2"),
        (["1--1,0,2-3", "0,3,2,1--1"], "0,2-3,1--1"),
        (["-1-1", "-1-1,-1-1"], "-1-1"),
        (["all"], "all"),
        (["0--1"], "0--1"),
    ],
)
def test_one_choice_has_one_text(same: list[object], expected: str) -> None:
    assert [checks.canonical(given) for given in same] == [expected] * len(same)  # type: ignore[arg-type]


def test_the_one_text_chooses_the_same() -> None:
    """Of all that two ranges can be, among five: the same numbers, or an error as well."""

    def numbers(text: str) -> list[int] | None:
        try:
            return checks.chosen("x", text, 5, "")
        except ValueError:
            return None

    ends = range(-6, 7)
    for a, b, c in itertools.product(ends, ends, ends):
        text = f"{a}-{b},{c},{c + 1}"
        assert numbers(checks.canonical(text)) == numbers(text), text


def test_a_long_list_of_numbers_is_cut_for_people() -> None:
    assert checks.brief([3, 4, 0, 5]) == "0,3-5"
    cut = checks.brief(range(0, 1000, 2))
    assert cut.startswith("0,2,4,")
    assert cut.endswith(",124,...")
    assert len(cut) <= checks.BRIEF + len(",...")
