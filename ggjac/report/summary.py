"""A result in plain sentences, made of its own numbers: the page and the terminal begin with them.

A sentence is a sequence of pieces: text, or a token of the result, which each shows in its own way. A share is a part
of a sum, along the live paths and under one freezing rule; no sentence may say more of it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ggjac import display
from ggjac.checks import brief
from ggjac.report.numbers import fixed, percent, signed

Piece = str | Mapping[str, Any]
Sentence = tuple[Piece, ...]

QUOTED = 60  # characters of a prompt that is repeated in a sentence
NAMED = 3  # tokens that a vector promotes
# What the tokens of groups are, where they are not the words of a role.
_NAMES = {
    "first": "the first position",
    "special": "special tokens",
    "template": "the template",
    "prompt": "the prompt",
    "answer": "the answer so far",
}


def sentences(content: Mapping[str, Any]) -> list[Sentence]:
    """Return up to three sentences about a prompt's result, as JSON has it: prediction, shares, leading vector."""
    found = (_prediction(content), _shares(content), _answer(content), _direction(content))
    return [sentence for sentence in found if sentence]


def caveat(content: Mapping[str, Any], by: str = "token") -> str:
    """Return what a share does not say, and the freezing rule under which it was computed, if it depends on one."""
    if by != "token":
        part = "A share is what a part adds to the residual stream, the same under both freezing rules"
        return f"{part}, wherever it read that from. It is neither importance nor the effect of removing the part."
    path = content.get("mlp_path")
    of = f" under the freezing rule --mlp-path {path}" if path and path != "both" else ""
    other = "; another rule splits the same sum into other shares" if of else ""
    part = f"A share is one part of an exact sum along the live paths{of}{other}."
    return f"{part} It is neither importance nor the effect of changing a token."


def remark(direction: Mapping[str, Any]) -> str:
    """Return what the projection on a direction is not, or how long the direction is."""
    entropy, eigenvalue = direction.get("entropy"), direction.get("eigenvalue")
    if entropy is not None:
        return (
            f"The next token's entropy is {fixed(entropy, 4)} nats. What is split is the output times its gradient, "
            "which the entropy follows to first order; not the entropy itself."
        )
    if eigenvalue is not None:
        return (
            f"The direction is an eigenvector of the next token's Fisher information, with {eigenvalue:.4g} of all "
            f"eigenvalues' {direction.get('all_eigenvalues') or 0:.4g}: the output moved by ε along it changes the "
            f"distribution by KL = {eigenvalue / 2:.4g} ε², to second order."
        )
    return f"The direction has length {direction['norm']:.4g}; the projection is the product with it as it is."


def plain(sentence: Iterable[Piece]) -> str:
    """Return a sentence as text that is safe to print."""
    pieces = (piece if isinstance(piece, str) else display.token(piece) for piece in sentence)
    return "".join(pieces).replace("\N{NO-BREAK SPACE}", " ")


def _prediction(content: Mapping[str, Any]) -> Sentence:
    best, *others = content.get("predictions") or [None]
    if not best or best.get("probability") is None:
        return ()
    prompt, chance = content.get("prompt"), best["probability"]
    last, position = len(content["tokens"]) - 1, content.get("position")
    read = position if isinstance(position, int) else last
    whole = read == last
    if whole and prompt and len(prompt) <= QUOTED:
        start = f"After “{display.visible(prompt.encode('utf-8', 'surrogatepass'))}”"
    else:
        start = f"After {'these' if whole else 'the first'} {read + 1} tokens"
    if chance >= 0.5 or not others:
        return (f"{start} the model says ", best, f" ({percent(chance)}).")
    second = others[0]
    return (
        f"{start} the most likely next token is ", best, f" ({percent(chance)}), then ", second,
        f" ({percent(second['probability'])}).",
    )  # fmt: skip


def _shares(content: Mapping[str, Any]) -> Sentence:
    given = content.get("attribution")
    if not given or given.get("by", "token") != "token":
        return ()
    given = given.get("one", given)  # as the page's reader has it
    if not given or not given.get("shares"):
        return ()
    versus, along, rows = given.get("versus"), given.get("projection"), given["shares"]
    rule = f", under --mlp-path {given['mlp_path']}" if given.get("other_rule") else ""  # of two
    folded = brief([row["position"] for row in given.get("excluded") or ()])
    rule += f", without position {folded}" if folded else ""
    if along:
        whole: Sentence = (f"Of {along['words']}, {fixed(along['value'], 2)}{rule}, ",)
    else:
        target = [given["target"], *([" over ", versus] if versus else [])]
        whole = ("Of the logit of ", *target, f", {fixed(given['logit'], 2)}{rule}, ")
    largest = max(rows, key=lambda row: row["share"])
    if largest["position"] != 0 or len(rows) == 1:
        return (*whole, "the largest share is that of ", *_at(largest), f": {signed(largest['share'], 2)}.")
    other = max(rows[1:], key=lambda row: row["share"])
    return (
        *whole, "the largest share is that of the first token, ", largest, f": {signed(largest['share'], 2)}; "
        "of the other tokens, that of ", *_at(other), f": {signed(other['share'], 2)}.",
    )  # fmt: skip


def _answer(content: Mapping[str, Any]) -> Sentence:
    given = content.get("answer")
    if not given or not given["tokens"][0].get("groups"):
        return ()
    tokens = given["tokens"]
    sums = {group: sum(token["groups"][group] for token in tokens) for group in tokens[0]["groups"]}
    count, mean = len(tokens), fixed(sum(token["logit"] for token in tokens) / len(tokens), 2)
    names = {group: _NAMES.get(group, f"the words of the {group}") for group in sums}
    parts = [f"{names[group]} {signed(total / count, 2)}" for group, total in sums.items()]
    if offset := sum(token.get("offset") or 0.0 for token in tokens):
        parts.append(f"the offset {signed(offset / count, 2)}")
    start = "The logit of the answer is" if count == 1 else f"A logit of the answer’s {count} tokens is on average"
    return (f"{start} {mean}, the sum of shares: {', '.join(parts)}.",)


def _at(row: Mapping[str, Any]) -> Sentence:
    return (row, f" at position {row['position']}")


def _direction(content: Mapping[str, Any]) -> Sentence:
    svd = content.get("svd") or {}
    if not svd.get("triplets"):
        return ()
    first = svd["triplets"][0]
    weights = [row for row in first["right"] if row.get("weight") is not None]
    if not weights or not first["left"]:
        return ()
    heaviest = max(weights, key=lambda row: row["weight"])
    words: list[Piece] = []
    for word in first["left"][:NAMED]:
        words += [", ", word]
    sigma, weight = fixed(first["singular_value"], 1), percent(heaviest["weight"], 0)
    excluded = content.get("exclude") or []
    without = f" without position{'s' * (len(excluded) > 1)} {brief(excluded)}" if excluded else ""
    return (
        f"The strongest direction of the map{without} (σ₁ = {sigma}) has {weight} of its input weight at ",
        *_at(heaviest),
        " and promotes ", *words[1:], ".",
    )  # fmt: skip
