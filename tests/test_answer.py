"""Whole answers: every token's shares against autograd over the oracle, greedy tokens and logits against llama.cpp."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny
import torch
from helpers import TOKENS, invoke, invoke_json, reworded
from report_run import Page
from safetensors.torch import load_file

from ggjac import attribute_answer, chat, generate, token_groups
from ggjac.model import open_model
from ggjac.parity import run_llama_cpp
from ggjac.session import Session

TinyFile = Callable[..., Path]

# Biases of all kinds, soft caps, scaled logits, learned positions, mixtures, recurrences, latents, several streams.
CASES = (
    *("gqa", "biases", "gemma2", "gemma3", "gpt2", "phi2", "cohere2", "granite", "falcon_7b", "qwen3moe", "gpt_oss"),
    *("qwen35", "lfm2", "mamba2", "rwkv7", "jamba", "deepseek2", "kimi_linear", "gemma4", "gemma4_small", "gemma3n"),
    *("hy_v4", "deepseek4", "hrm_text", "talkie", "command_r"),
)
START, COUNT = 4, 5


def close(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    found, expected = (torch.as_tensor(part, dtype=torch.float64) for part in (found, expected))
    assert found.shape == expected.shape
    assert bool(((found - expected).abs() <= tolerance * (1 + expected.abs().max())).all())


def uncapped(known: oracle.Oracle) -> oracle.Oracle:
    return known._replace(facts=known.facts._replace(final_cap=None))


@pytest.mark.parametrize("rule", ["up", "gate"])
@pytest.mark.parametrize("case", CASES)
def test_every_tokens_shares_are_those_of_the_oracle(case: str, rule: Any, tiny_file: TinyFile) -> None:
    """The derivative of each token's own logit, by autograd along the live paths, times the embeddings."""
    path, ids = tiny_file(case), tiny.prompt(case, START)
    model, known = open_model(path, dtype="float64"), oracle.load(path)
    ids = [*ids, *generate(model, ids, COUNT)]
    found = attribute_answer(model.trace(ids, mlp_path=rule).jacobian(), START)
    states = oracle.forward(known, ids)
    x = states["x"].detach().requires_grad_()
    z = oracle.forward(uncapped(known), ids, freeze=rule, x=x)["logits"]
    for row, place in enumerate(range(START - 1, len(ids) - 1)):
        (slope,) = torch.autograd.grad(z[place, ids[place + 1]], x, retain_graph=True)
        shares = (slope * x.detach()).sum(1)
        close(found.split.shares[row], shares)
        close(found.split.logits[row], z[place, ids[place + 1]].detach())
        close(found.split.offsets[row], z[place, ids[place + 1]].detach() - shares.sum())
    assert found.split.positions == [*range(START - 1, len(ids) - 1)]
    assert found.split.unexplained.abs().max() < 1e-9
    chances = states["logits"][START - 1 : -1].softmax(1)
    close(found.chances, chances.max(1).values)
    assert found.likeliest.tolist() == ids[START:] == chances.argmax(1).tolist()


@pytest.mark.parametrize("case", ["biases", "hy_v4"])
def test_excluded_positions_are_in_the_offset(case: str, tiny_file: TinyFile) -> None:
    path, ids = tiny_file(case), tiny.prompt(case, START + COUNT)
    model, known = open_model(path, dtype="float64"), oracle.load(path)
    found = attribute_answer(model.trace(ids).jacobian(exclude=[0, 2]), START)
    x = oracle.forward(known, ids)["x"].detach().requires_grad_()
    z = oracle.forward(uncapped(known), ids, freeze="up", x=x)["logits"]
    data = found.data()["tokens"]
    for row, place in enumerate(range(START - 1, len(ids) - 1)):
        (slope,) = torch.autograd.grad(z[place, ids[place + 1]], x, retain_graph=True)
        shares = (slope * x.detach()).sum(1)[: START + row]
        rest = shares.index_fill(0, torch.tensor([0, 2]), 0.0)
        close(data[row]["shares"], rest)
        close(data[row]["offset"], z[place, ids[place + 1]].detach() - rest.sum())
        close([each["share"] for each in data[row]["excluded"]], shares[[0, 2]])
        assert "first" not in data[row]["groups"]


def test_a_given_answer_is_judged_by_the_model(tiny_file: TinyFile) -> None:
    """Tokens that the model would not have written: their probability, and the token that it would have.

    Of a model whose head has a bias.
    """
    path = tiny_file("phi2")
    model, ids = open_model(path, dtype="float64"), tiny.prompt("phi2", START + 20)
    found = attribute_answer(model.trace(ids).jacobian(), START, versus=17)
    logits = oracle.forward(oracle.load(path), ids)["logits"][START - 1 : -1]
    own = torch.tensor(ids[START:])
    close(found.split.logits, logits.gather(1, own[:, None])[:, 0] - logits[:, 17])
    close(found.chances, logits.softmax(1).gather(1, own[:, None])[:, 0])
    close(found.most, logits.softmax(1).max(1).values)
    assert found.likeliest.tolist() == logits.argmax(1).tolist() != own.tolist()
    data = found.data()
    assert [token["id"] for token in data["tokens"]] == ids[START:]
    for row, token in enumerate(data["tokens"]):
        assert len(token["shares"]) == START + row
        assert sum(token["shares"]) + token["offset"] == pytest.approx(token["logit"])
        assert sum(token["groups"].values()) == pytest.approx(sum(token["shares"]))
        assert token["groups"]["first"] == token["shares"][0]
        assert token["groups"]["answer"] == pytest.approx(sum(token["shares"][START:]))


@pytest.mark.parametrize("by", ["layer", "head"])
def test_by_branch_the_targets_are_the_answers_own(by: Any, tiny_file: TinyFile) -> None:
    path = tiny_file("gemma2")
    model, ids = open_model(path, dtype="float64"), tiny.prompt("gemma2", START + COUNT)
    found = attribute_answer(model.trace(ids).jacobian(), START, by=by)
    logits = oracle.forward(uncapped(oracle.load(path)), ids)["logits"][START - 1 : -1]
    close(found.split.logits, logits.gather(1, torch.tensor(ids[START:])[:, None])[:, 0])
    assert found.split.unexplained.abs().max() < 1e-9
    assert (found.split.heads is None) == (by == "layer")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes(dtype: str, tiny_file: TinyFile) -> None:
    ids = tiny.prompt("biases", START + COUNT)
    exact, found = (
        attribute_answer(open_model(tiny_file("biases"), dtype=name).trace(ids).jacobian(), START)
        for name in ("float64", dtype)
    )
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert found.split.shares.dtype == found.chances.dtype == torch.float64
    close(found.split.shares, exact.split.shares, 60 * eps)
    close(found.chances, exact.chances, 60 * eps)


@pytest.mark.parametrize("case", ["gqa", "gemma3", "gpt_oss", "phi3", "qwen35"])
def test_a_generated_answer_is_llamacpps_and_its_shares_sum_to_llamacpps_logits(case: str, tiny_file: TinyFile) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path, ids = tiny_file(case, ftype="F32"), tiny.prompt(case, 8)
    model = open_model(path)
    answer = generate(model, ids, 12)
    theirs = run_llama_cpp(path, ids + answer, layers=False, threads=1).logits[len(ids) - 1 : -1]
    assert theirs.argmax(1).tolist() == answer
    found = attribute_answer(model.trace(ids + answer).jacobian(), len(ids))
    sums = found.split.shares.sum(1) + found.split.offsets
    cap = model.head.softcap
    sums = cap * torch.tanh(sums / cap) if cap else sums
    close(sums, theirs.max(1).values.double(), 1e-3 if model.config.row.activation == "gelu" else 1e-5)


# ---- what tokens belong to


def test_words_of_roles_are_found_in_the_text() -> None:
    model = open_model()
    said = {"system": " Be brief. ", "user": "The opposite of hot?"}
    text = f"<|end_of_text|>system: {said['system'].strip()}<|end_of_text|>user: {said['user']}\nanswer:"
    ids = model.tokenize(text)
    found = token_groups(model, [*ids, 5, 1], len(ids), said)
    assert found[0] == "first"
    assert found[-2:] == ["answer", "answer"]
    texts = {group: model.text([id for id, own in zip(ids, found, strict=False) if own == group]) for group in found}
    assert texts["user"].strip() == said["user"]
    assert texts["system"].strip() == said["system"].strip()
    assert texts["special"] == "<|end_of_text|>" * (ids.count(1) - (ids[0] == 1))
    assert texts["template"].replace(" ", "") == "system:user:\nanswer:"
    assert "prompt" in token_groups(model, ids, len(ids))


@pytest.mark.parametrize("words", ["o", "", "  ", "not there", "a"])
def test_words_that_are_not_told_apart_are_the_templates(words: str) -> None:
    model = open_model()
    ids = model.tokenize("to go over the other road a lot")
    assert set(token_groups(model, ids, len(ids), {"user": words})) <= {"first", "special", "template"}


# ---- the command


def test_the_command_answers(tiny_file: TinyFile, tmp_path: Path) -> None:
    path = tiny_file("biases")
    options = ["--max-tokens", COUNT, "--dtype", "float64"]
    result = invoke_json("attribute", "-m", path, *TOKENS, *options, "-o", tmp_path / "f")
    model = open_model(path, dtype="float64")
    prompt = [token["id"] for token in result["tokens"]][:-COUNT]
    answer = generate(model, prompt, COUNT)
    data = result["answer"]
    assert [token["id"] for token in data["tokens"]] == answer
    assert (data["start"], len(data["sources"])) == (len(prompt), len(prompt) + COUNT)
    assert [source["id"] for source in data["sources"]] == prompt + answer
    assert result["position"] == [*range(len(prompt) - 1, len(prompt) + COUNT - 1)]
    assert "attribution" not in result
    expected = attribute_answer(model.trace(prompt + answer).jacobian(), len(prompt))
    close([token["logit"] for token in data["tokens"]], expected.split.logits)
    close(data["tokens"][-1]["shares"], expected.split.shares[-1, :-1])
    saved = load_file(tmp_path / "f")
    assert saved["ids"].tolist() == prompt + answer
    assert saved["shares"].shape == (COUNT, len(prompt) + COUNT)
    close(saved["probabilities"], expected.chances)
    assert saved["likeliest"].tolist() == answer

    shown = invoke("attribute", "-m", path, *TOKENS, *options).stdout
    for token in data["tokens"]:
        assert f"{token['logit']:.4f}" in shown
        assert all(f"{value:+.3f}" in shown for value in token["groups"].values())
    assert "Each row sums to its logit" in shown
    assert "most likely" not in shown  # all of them are
    table = invoke("attribute", "-m", path, *TOKENS, *options, "--format", "csv").stdout
    rows = list(csv.DictReader(io.StringIO(table)))
    assert len(rows) == sum(len(prompt) + row + 1 for row in range(COUNT))
    assert sum(float(row["share"]) for row in rows) == pytest.approx(sum(float(v) for v in expected.split.logits))
    few = invoke("attribute", "-m", path, *TOKENS, *options, "--format", "csv", "--count", 2).stdout
    assert len(few.splitlines()) == 1 + COUNT * 4  # two tokens, the others, the offset
    assert r"\begin{tabular}" in invoke("attribute", "-m", path, *TOKENS, *options, "--format", "latex").stdout


def test_the_command_by_branch_has_the_splits_of_positions(tiny_file: TinyFile) -> None:
    result = invoke_json("attribute", "-m", tiny_file("gqa"), *TOKENS, "--max-tokens", 3, "--by", "head")
    entries = result["attribution"]["positions"]
    assert [entry["target"]["id"] for entry in entries] == [token["id"] for token in result["answer"]["tokens"]]
    assert [entry["position"] for entry in entries] == result["position"]
    assert "shares" not in result["answer"]["tokens"][0]
    shown = invoke("attribute", "-m", tiny_file("gqa"), *TOKENS, "--max-tokens", 3, "--by", "head").stdout
    assert "Direct logit attribution" in shown


def test_a_text_as_answer_follows_the_prompt_as_it_is() -> None:
    """Never with BOS; and where both as one text would be other tokens, that is said."""
    model = open_model()
    prompt = ["attribute", "-p", "The bridge out of Marin is the", "--answer"]
    result = invoke_json(*prompt, " Golden Gate")
    ids = [token["id"] for token in result["answer"]["tokens"]]
    assert model.text(ids) == " Golden Gate" == result["answer"]["text"]
    assert result["prompt"] == prompt[2]
    assert result["warnings"] == []
    assert result["answer"]["tokens"][0]["id"] == result["answer"]["tokens"][0]["likeliest"]["id"]
    other = invoke_json(*prompt, "re")
    assert "tokenized each by itself" in other["warnings"][0]
    shown = invoke(*prompt, " Bay").stdout
    assert "most likely" in shown
    assert "␣Golden (" in shown


def test_the_end_is_a_token_of_the_answer() -> None:
    """It is the last one, however it came about; what is generated has no more tokens than that."""
    model, text = open_model(), "She put the book on the table and then"
    answer = generate(model, text, 40)
    assert (answer[-1], answer.count(1)) == (1, 1)
    assert len(answer) < 40
    spelled = model.tokenizer.continuation(model.text(answer))
    assert spelled == answer
    session = Session(model, text)
    session.answered(max_tokens=40)
    assert session.ids == model.tokenize(text) + answer
    assert session.position == len(session.ids) - 2


def test_a_conversation_is_split_by_role(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end_of_text|>{% endfor %}answer:"
    file = reworded(tmp_path / "chat.gguf", {chat.KEY: template})
    asked = ["attribute", "-m", file, "--chat", "The opposite of hot?", "--system", "Be brief", "--max-tokens", 3]
    result = invoke(*asked, "--format", "json")
    assert (
        "Prompt, by the chat template of the file: 'system: Be brief<|end_of_text|>user: The opposite" in result.stderr
    )
    data = json.loads(result.stdout)["answer"]
    assert [*data["tokens"][0]["groups"]] == ["first", "special", "template", "system", "user", "answer"]
    of_user = [source for source in data["sources"] if source["group"] == "user"]
    assert "".join(source["text"] for source in of_user).strip() == "The opposite of hot?"
    for token in data["tokens"]:
        share = sum(s for s, source in zip(token["shares"], data["sources"], strict=False) if source["group"] == "user")
        assert token["groups"]["user"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-tokens", "0"], "0 is not in the range"),
        (["--answer-tokens", "128"], "token id 128 is out of range"),
        (["--answer-tokens", "x"], "'x' is not a list of token ids"),
        (["--max-tokens", "2", "--versus", "128"], "--versus: token id 128 is out of range"),
        (["--max-tokens", "99999"], "prompt and answer have 100004 tokens, this model takes at most"),
        (["--max-tokens", "99999", "--dry-run"], "prompt and answer have 100004 tokens, this model takes at most"),
    ],
)
def test_the_command_refuses(options: list[str], words: str, tiny_file: TinyFile) -> None:
    assert words in invoke("attribute", "-m", tiny_file("gqa"), *TOKENS, *options, code=2).stderr


@pytest.mark.parametrize("more", [[], ["--dry-run", "--no-bench"]])
def test_an_empty_answer_is_refused(more: list[str]) -> None:
    assert "the answer has no tokens" in invoke("attribute", "-p", "The", "--answer", "", *more, code=2).stderr


def test_wrong_arguments_are_named(tiny_file: TinyFile) -> None:
    model = open_model(tiny_file("gqa"))
    jacobian = model.trace([5, 6, 7]).jacobian()
    for start, words in ((0, "start 0 is out of range"), (3, "start 3: prompt and answer have 3 tokens")):
        with pytest.raises(ValueError, match=words):
            attribute_answer(jacobian, start)
    with pytest.raises(ValueError, match="by='heads' is unknown; known: token, layer, head"):
        attribute_answer.__wrapped__(jacobian, 1, by="heads")  # past the type checks of the test run
    with pytest.raises(ValueError, match="2 groups for 3 tokens"):
        attribute_answer(jacobian, 1, groups=["a", "b"])
    session = Session(model, [5, 6])
    for answer, words in (([], "no tokens"), ([999], "token id 999"), ([1] * 9999, "prompt and answer have 10001")):
        with pytest.raises(ValueError, match=words):
            session.answered(answer)
    _ = session.trace
    with pytest.raises(ValueError, match="traced without its answer"):
        session.answered([1])


def test_an_answer_in_token_ids_needs_no_tokenizer(tiny_file: TinyFile) -> None:
    asked = ["attribute", "-m", tiny_file("gqa"), "--tokens", "5,6", "--answer-tokens", "7,8,9"]
    result = invoke_json(*asked)
    assert [token["id"] for token in result["answer"]["tokens"]] == [7, 8, 9]
    assert invoke_json(*asked, "--dry-run", "--no-bench")["tokens"] == 5


def test_one_token_may_be_the_whole_prompt(tiny_file: TinyFile) -> None:
    result = invoke_json("attribute", "-m", tiny_file("gqa"), "--tokens", "5", "--max-tokens", 2)["answer"]
    assert [*result["tokens"][0]["groups"]] == ["first", "answer"]
    assert len(result["tokens"][0]["shares"]) == 1


def test_every_line_is_answered(tiny_file: TinyFile, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("The bridge out of Marin is the\nThe opposite of hot is\n")
    options = ["attribute", "-f", lines, "--each-line", "-o", tmp_path / "out.jsonl"]
    invoke(*options, "--max-tokens", 2)
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    alone = invoke_json("attribute", "-p", "The opposite of hot is", "--max-tokens", 2)
    assert records[1]["answer"]["text"] == alone["answer"]["text"]
    close(records[1]["answer"]["tokens"][1]["shares"], alone["answer"]["tokens"][1]["shares"], 1e-5)
    assert "2 of 2 prompts were already" in invoke(*options, "--max-tokens", 2).stdout
    assert invoke(*options, "--max-tokens", 3, code=None).exit_code


# ---- the page


def page_of(content: dict[str, Any], folder: Path) -> tuple[str, Page]:
    """Return the page of a result, and its section about the answer."""
    source = folder / "run.json"
    source.write_text(json.dumps(content), encoding="utf-8")
    invoke("report", source)
    html = source.with_suffix(".html").read_text(encoding="utf-8")
    (found,) = re.findall(r'<section id="attribute-answer".*?</section>', html, re.DOTALL)
    return html, Page(f"<body>{found}</body>")


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return invoke_json("attribute", "-p", "The opposite of hot is", "--answer", " hot. The")


def test_the_page_shows_every_share_and_sum(content: dict[str, Any], tmp_path: Path) -> None:
    html, found = page_of(content, tmp_path)
    data = content["answer"]
    rows = found.find("tr")
    for token in data["tokens"]:
        sums = " ".join(f"{value:+.2f}" for value in token["groups"].values()).replace("+0.00", "0.00")
        shares = " ".join(f"{share:+.4f}" for share in token["shares"])
        for shown in (sums, shares):  # of groups, and in the table behind the heat map
            own = [row for row in rows if shown.replace("-", "−") in row]
            assert [row.split()[0] for row in own] == [str(token["position"])]
    assert any("␣cold" in row for row in rows)  # what the model would have said
    assert "The shares sum to the logit of each token." in found.text
    assert "position 0 and special tokens" in found.text
    assert "is on average" in html
    assert html.count("A share is one part of an exact sum") == 2  # under the sentences in the title, and the table
    (mean,) = [row.split() for row in rows if row.startswith("Mean")]
    assert mean[1] == f"{sum(token['logit'] for token in data['tokens']) / len(data['tokens']):.2f}"
    assert '<span class="prompt">The opposite of hot is</span><mark> hot. The</mark>' in html


def test_the_page_says_where_shares_do_not_sum(content: dict[str, Any], tmp_path: Path) -> None:
    wrong = json.loads(json.dumps(content))
    wrong["answer"]["tokens"][1]["logit"] += 5
    assert "The shares do not sum to the logit of each token" in page_of(wrong, tmp_path)[1].text


def test_a_long_answer_has_no_map(content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggjac.report.sections.answer.MAX_CELLS", 10)
    assert "All values" not in page_of(content, tmp_path)[1].text


def test_tensors_make_no_page(tiny_file: TinyFile, tmp_path: Path) -> None:
    """A file that is named as JSON would be, but has what `-o` saves."""
    invoke("attribute", "-m", tiny_file("gqa"), *TOKENS, "--max-tokens", 1, "-o", tmp_path / "run.json")
    assert "holds tensors, as -o saves them" in invoke("report", tmp_path / "run.json", code=1).stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda answer: answer.update(start=0), "0 tokens and 3 of an answer are not the 9 sources"),
        (lambda answer: answer["sources"].pop(), "6 tokens and 3 of an answer are not the 8 sources"),
        (lambda answer: answer["tokens"][1]["shares"].pop(), "6 shares of the 7 tokens before it"),
        (lambda answer: answer["tokens"][1].pop("shares"), "of shares and groups one is missing"),
        (lambda answer: answer["tokens"][1]["groups"].update(other=1.0), "groups are others than those of the first"),
        (lambda answer: answer.update(tokens=[]), "a list of 1 or more"),
    ],
)
def test_wrong_forms_are_refused(change: Any, words: str, content: dict[str, Any], tmp_path: Path) -> None:
    wrong = json.loads(json.dumps(content))
    change(wrong["answer"])
    (tmp_path / "run.json").write_text(json.dumps(wrong), encoding="utf-8")
    assert words in invoke("report", tmp_path / "run.json", code=1).stderr
