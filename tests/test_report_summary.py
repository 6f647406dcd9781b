"""The sentences that a result begins with: each number in them is one of the result's own."""

import copy
import json
from pathlib import Path

import pytest
from helpers import invoke
from report_run import Page, rendered, run_json

from ggjac.report import summary
from ggjac.report.load import checked

RUN = {
    "tokens": [{"text": "The"}, {"text": " bridge"}, {"text": " is"}],
    "prompt": "The bridge is",
    "position": 2,
    "mlp_path": "gate",
    "predictions": [
        {"id": 7, "text": " Golden", "logit": 12.5, "probability": 0.972},
        {"id": 8, "text": " red", "logit": 8.5, "probability": 0.01},
    ],
    "attribution": {
        "target": {"id": 7, "text": " Golden"},
        "logit": 12.5,
        "shares": [
            {"position": 0, "text": "The", "share": 7.25},
            {"position": 1, "text": " bridge", "share": 6.0},
            {"position": 2, "text": " is", "share": -0.75},
        ],
    },
    "svd": {
        "triplets": [
            {
                "singular_value": 43.576,
                "left": [{"text": " gold"}, {"text": " Golden"}, {"text": "\n"}, {"text": " no"}],
                "right": [
                    {"position": 0, "text": "The", "weight": 0.2},
                    {"position": 1, "text": " bridge", "weight": 0.8},
                ],
            }
        ]
    },
}


def said(**changes: object) -> list[str]:
    return [summary.plain(sentence) for sentence in summary.sentences(copy.deepcopy(RUN) | changes)]


def test_a_run_in_three_sentences() -> None:
    assert said() == [
        "After “The bridge is” the model says ␣Golden (97.2 %).",
        "Of the logit of ␣Golden, 12.50, the largest share is that of the first token, The: +7.25; "
        "of the other tokens, that of ␣bridge at position 1: +6.00.",
        "The strongest direction of the map (σ₁ = 43.6) has 80 % of its input weight at ␣bridge at position 1 "
        "and promotes ␣gold, ␣Golden, \\n.",
    ]


def test_an_uncertain_prediction_has_its_rival() -> None:
    first, second = RUN["predictions"]
    found = said(predictions=[first | {"probability": 0.4}, second | {"probability": 0.3}])[0]
    assert found == "After “The bridge is” the most likely next token is ␣Golden (40.0 %), then ␣red (30.0 %)."


def test_the_prompt_is_named_as_far_as_the_map_reads_it() -> None:
    assert said(position=1)[0].startswith("After the first 2 tokens the model says")
    assert said(prompt="long " * 20)[0].startswith("After these 3 tokens the model says")
    assert said(prompt="a\x1b[31m\u202eb")[0].startswith("After “a\\x1b[31m\\u202eb” the model")


def test_a_share_of_another_token_comes_alone() -> None:
    given = copy.deepcopy(RUN["attribution"])
    given["shares"][0]["share"] = 0.5
    assert said(attribution=given)[1] == (
        "Of the logit of ␣Golden, 12.50, the largest share is that of ␣bridge at position 1: +6.00."
    )


def test_the_parts_of_an_answer_have_its_offset() -> None:
    tokens = [{"logit": 5.0, "groups": {"first": 2.0, "prompt": 4.5}, "offset": -1.5}]
    tokens += [{"logit": 4.0, "groups": {"first": 1.0, "prompt": 3.5}, "offset": -0.5}]
    assert said(answer={"tokens": tokens}, svd=None, attribution=None)[1] == (
        "A logit of the answer’s 2 tokens is on average 4.50, the sum of shares: the first position +1.50, "
        "the prompt +4.00, the offset −1.00."
    )
    exact = [token | {"offset": 0.0} for token in tokens]
    assert "offset" not in said(answer={"tokens": exact}, svd=None, attribution=None)[1]


def test_a_part_that_is_missing_has_no_sentence() -> None:
    assert said(svd=None, attribution=None) == said()[:1]
    assert said(predictions=None, svd={"triplets": []}, attribution=None) == []


@pytest.mark.parametrize(("path", "rule"), [("up", " under the freezing rule --mlp-path up"), (None, "")])
def test_what_a_share_does_not_say(path: str | None, rule: str) -> None:
    found = summary.caveat({"mlp_path": path})
    assert found.startswith(f"A share is one part of an exact sum along the live paths{rule}")
    assert found.endswith("It is neither importance nor the effect of changing a token.")
    assert ("another rule" in found) == (path is not None)


def test_the_page_begins_with_them_and_says_the_rule_at_each_table() -> None:
    content = checked(run_json())
    page = Page(rendered(run_json()))
    (lede,) = page.find("p", **{"class": "lede"})
    assert lede.split() == " ".join(map(summary.plain, summary.sentences(content))).split()
    assert len(summary.sentences(content)) == 3
    # At the top, and at the shares of tokens, of positions, of two files, of two prompts; blocks have another.
    assert page.text.count(summary.caveat(content)) == 5
    assert page.text.count(summary.caveat(content, "layer")) == 1


def test_the_page_shows_warnings_at_its_top() -> None:
    content = run_json()
    content["warnings"] = ["the file was <b>modified</b>", "two BOS"]
    content["model"]["warning"] = "NaN"
    content["other_prompt"]["warnings"] = []
    found = Page(rendered(content)).find("p", **{"class": "warning"})
    assert found == [f"Warning. {text}" for text in (*content["warnings"], "NaN")]


def test_analyze_ends_with_them(tmp_path: Path) -> None:

    folder = tmp_path / "run"
    out = invoke("analyze", "-q", "--no-verify", "-p", "The bridge", "-k", 2, "-o", folder).stdout
    content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    expected = [summary.plain(sentence) for sentence in summary.sentences(content)]
    assert len(expected) == 3
    assert "\n".join(expected) in out
