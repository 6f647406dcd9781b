"""Tables of shares for the terminal: of input tokens, of blocks and heads, and at several positions a line each."""

from typing import Any

from ggjac import display
from ggjac.cli.effects import show_effects

# Parts in a table of heads; the smaller ones are added up in one line.
SHOWN = 24
# Parts of each position, where there are several.
AT_ONE = 3
# What shares do not say, by token and by block; under every table of them.
CAVEAT = "The sum is exact; its division depends on the freezing rule (--mlp-path both). A share is not importance."
DIRECT = "Direct logit attribution, the same under both freezing rules: what a part adds, wherever it read that from."
ADDED = "What a part adds, wherever it read that from; the same under both freezing rules."
SPLIT = {"token": "every input token", "layer": "every block's attention and MLP", "head": "every head and MLP"}
ALL = 2**31  # more parts than any table has


def show(data: dict[str, Any], count: int | None = None) -> None:
    """Print the `count` largest shares at one position part by part, at several in a line each; and their sums."""
    entries = data.get("positions", [data])
    if len(entries) > 1:
        show_positions(entries, count or AT_ONE)
    elif entries[0].get("by", "token") == "token":
        show_tokens(entries[0], count or ALL)
    elif entries[0]["by"] == "head" or count:
        show_parts(entries[0], count or SHOWN)
    else:
        show_blocks(entries[0])


def show_tokens(data: dict[str, Any], count: int) -> None:
    """Print all shares in order, or the largest, with bars, and their sum; those of both rules side by side."""
    from ggjac.cli.render import bar, line, sink, table

    rules = [data] + ([data["other_rule"]] if "other_rule" in data else [])
    alone = len(rules) == 1  # bars of two rules are too wide for a terminal
    lines = _characters(rules)
    if rest := max(0, len(lines) - count):
        lines = sorted(lines, key=lambda line: -max(map(abs, line[1])))[:count]
    largest = max(abs(sums[0]) for _, sums in lines) or 1.0
    rows: list[tuple] = []
    for parts, sums in lines:
        place = display.span(parts[0]), display.together(parts[0])
        drawn = [bar(sums[0], largest)] if alone else []
        rows.append((*place, *(f"{value:+.4f}" for value in sums), *drawn))
        if len(parts[0]) > 1:  # the bytes of one character
            for each in zip(*parts, strict=True):
                values = (f"({s['share']:+.4f})" for s in each)
                rows.append((each[0]["position"], display.token(each[0]), *values, *([""] if alone else [])))
    if rest:
        left = [
            sum(s["share"] for s in rule["shares"]) - sum(sums[i] for _, sums in lines) for i, rule in enumerate(rules)
        ]
        rows.append(("", f"{rest} more: --all", *(f"{value:+.4f}" for value in left), *([""] if alone else [])))
    for each in zip(*(rule.get("excluded", ()) for rule in rules), strict=True):
        values = (f"({s['share']:+.4f})" for s in each)
        rows.append((each[0]["position"], display.token(each[0]), *values, *(["in the offset"] if alone else [])))
    end = [_whole(data)]
    offset = "offset (biases, excluded)" if "excluded" in data else "offset (biases)"
    rows.append(("", offset, *(f"{rule['offset']:+.4f}" for rule in rules), *([""] if alone else [])))
    rows.append(("", "sum", *map(_sum, rules), *(end if alone else [])))
    names = ["#share", ""] if alone else [f"#mlp-path {rule['mlp_path']}" for rule in rules]
    of = f" (mlp-path {data['mlp_path']})" if alone else ""
    table(f"Share of every input token in {asked_logit(data)}{of}", ["#position", "token", *names], rows)
    if not alone:
        found = data["agreement"]
        ranked = "of one token is not defined" if found["spearman"] is None else f"{found['spearman']:.2f}"
        line(
            f"Rank correlation of the rules {ranked}; their absolute differences sum to "
            f"{found['difference']:.4g}, their absolute shares to {found['size']:.4g} on average."
        )
    if alone:
        sink(data.get("sink"), asked_logit(data))
    say(data, CAVEAT)
    if "effects" in data:
        line("")
        show_effects(data["effects"], asked_logit(data), count)


def _characters(rules: list[dict[str, Any]]) -> list[tuple[list[list[dict[str, Any]]], list[float]]]:
    """Return the shares of each token, or of tokens that only together make up a character: by rule, and summed."""
    found, start = [], 0
    for group in display.characters(rules[0]["shares"]):
        parts = [rule["shares"][start : start + len(group)] for rule in rules]
        found.append((parts, [sum(s["share"] for s in part) for part in parts]))
        start += len(group)
    return found


def asked_logit(data: dict[str, Any]) -> str:
    """Return the name of the split quantity: a logit, the difference of two, or a projection."""
    if "projection" in data:
        return data["projection"]["words"]
    name = f"the logit of {display.token(data['target'])}"
    if data["versus"]:
        name += f" minus that of {display.token(data['versus'])}"
    return name + (" before the soft cap" if data["softcap"] else "")


def _value(data: dict[str, Any]) -> float:
    return data["projection"]["value"] if "projection" in data else data["logit"]


def _whole(data: dict[str, Any]) -> str:
    """Return what the parts add up to, by its name."""
    return f"{'projection' if 'projection' in data else 'logit'} {_value(data):.4f}"


def _sum(data: dict[str, Any]) -> str:
    return f"{_value(data) - data['unexplained']:+.4f}"


def say(data: dict[str, Any], caveat: str) -> None:
    """Print what shares do not say; of a projection, also what that is not."""
    from ggjac.cli.render import line
    from ggjac.report.summary import remark

    line(caveat)
    if "projection" in data:
        line(remark(data["projection"]["direction"]))


def show_blocks(data: dict[str, Any]) -> None:
    """Print two columns: the shares of the attention, or what is in its place, and of the MLP of each block."""
    from ggjac.cli.render import bar, table

    blocks = data["blocks"]
    attends = not any("mixer" in block for block in blocks)  # everywhere
    largest = max(abs(block[kind]) for block in blocks for kind in ("attn", "mlp")) or 1.0
    rows: list[tuple] = [("embedding", f"{data['embedding']:+.4f}", "", "", "")]
    for block in blocks:
        attn, mlp = block["attn"], block["mlp"]
        name = f"L{block['block']}" + ("" if attends else f" ({block.get('mixer', 'attention')})")
        rows.append((name, f"{attn:+.4f}", bar(attn, largest), f"{mlp:+.4f}", bar(mlp, largest)))
    if data["bias"]:
        rows.append(("biases of norm and head", f"{data['bias']:+.4f}", "", "", ""))
    attn, mlp = (sum(block[kind] for block in blocks) for kind in ("attn", "mlp"))
    rows.append(("all blocks", f"{attn:+.4f}", "", f"{mlp:+.4f}", ""))
    rows.append(("sum", _sum(data), _whole(data), "", ""))
    columns = ["", "#attention" if attends else "#token mixers", "", "#MLP", ""]
    table(f"Share of every block's attention and MLP in {asked_logit(data)}", columns, rows)
    say(data, ADDED if "projection" in data else DIRECT)


def _parts(data: dict[str, Any]) -> list[tuple[str, float]]:
    """Return all that was added to the residual stream, by name."""
    parts = [("embedding", data["embedding"])]
    for block in data["blocks"]:
        name = f"L{block['block']}"
        if "heads" in block:
            heads = block.get("head_names")
            heads = [f" {head}" for head in heads] if heads else [f"H{i}" for i in range(len(block["heads"]))]
            parts += [(f"{name}{head}", share) for head, share in zip(heads, block["heads"], strict=True)]
            parts.append((f"{name} bias of {block.get('mixer', 'attention')}", block["attn_bias"]))
        else:
            parts.append((f"{name} {block.get('mixer', 'attention')}", block["attn"]))
        parts.append((f"{name} MLP", block["mlp"]))
    return [*parts, ("biases of norm and head", data["bias"])]


def show_parts(data: dict[str, Any], count: int) -> None:
    """Print the largest shares, and the sum of all others."""
    from ggjac.cli.render import bar, table

    parts = sorted(_parts(data), key=lambda part: -abs(part[1]))
    shown, rest = parts[:count], [share for _, share in parts[count:] if share]
    largest = max(abs(share) for _, share in shown) or 1.0
    rows = [(name, f"{share:+.4f}", bar(share, largest)) for name, share in shown if share]
    if rest:
        rows.append((f"{len(rest)} more: --count N or --all", f"{sum(rest):+.4f}", ""))
    rows.append(("sum", _sum(data), _whole(data)))
    table(f"Share of {SPLIT[data['by']]} in {asked_logit(data)}", ["", "#share", ""], rows)
    say(data, ADDED if "projection" in data else DIRECT)


def show_positions(entries: list[dict[str, Any]], count: int) -> None:
    """Print a line for each position: its target, the largest shares and the sum."""
    from ggjac.cli.render import line, table

    rows = []
    for data in entries:
        if data["by"] == "token":
            parts = [(display.token(s), s["share"]) for s in data["shares"]] + [("offset", data["offset"])]
        else:
            parts = _parts(data)
        top = sorted(parts, key=lambda part: -abs(part[1]))[:count]
        rows.append(
            (
                data["position"],
                display.token(data),
                display.token(data["target"]),
                f"{data['logit']:.4f}",
                ", ".join(f"{name} {share:+.2f}" for name, share in top if share),
                _sum(data),
            )
        )
    less = f", minus the logit of {display.token(entries[0]['versus'])}" if entries[0]["versus"] else ""
    columns = ["#position", "token", "target", "#logit", "largest shares", "#sum of all"]
    rule = f" (mlp-path {entries[0]['mlp_path']})" if entries[0]["by"] == "token" else ""
    table(f"Share of {SPLIT[entries[0]['by']]} in a logit at each position{less}{rule}", columns, rows)
    line(CAVEAT if rule else DIRECT)
