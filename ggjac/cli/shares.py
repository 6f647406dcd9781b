"""Shares of logits as plain data and as tables: of many positions, of branches and of heads."""

from typing import Any, Literal

import torch

from ggjac.analysis.attribute import Attribution, BranchShares, TokenShares, attribute_branches, attribute_positions
from ggjac.cli.render import bar, table
from ggjac.cli.sections import asked_logit
from ggjac.cli.session import Session

By = Literal["token", "layer", "head"]

# Parts in a table of heads; what is smaller is added up in one line.
SHOWN = 24


def run(
    session: Session,
    by: By,
    target: int | None,
    versus: int | None,
    *,
    everywhere: bool,
    stage: str = "attribution",
) -> TokenShares | BranchShares:
    """Split logits at all positions, or over branches."""
    J = session.jacobian
    with session.report.stage(stage) as update:
        if by == "token":
            return attribute_positions(J, target, versus, progress=update)
        positions = range(len(session.ids)) if everywhere else None
        return attribute_branches(J, target, versus, positions=positions, by_head=by == "head", progress=update)


def data(session: Session, by: By, result: TokenShares | BranchShares) -> list[dict[str, Any]]:
    """Return the shares at each position as plain data."""
    versus = None if result.versus is None else {"id": result.versus, "token": session.token(result.versus)}
    return [
        {
            "by": by,
            "position": position,
            "token": session.token(session.ids[position]),
            "target": {"id": int(result.targets[row]), "token": session.token(int(result.targets[row]))},
            "versus": versus,
            "logit": float(result.logits[row]),
            "softcap": session.model.head.softcap or None,
            **(_tokens(session, result, row) if isinstance(result, TokenShares) else _branches(result, row)),
            "unexplained": float(result.unexplained[row]),
        }
        for row, position in enumerate(result.positions)
    ]


def _tokens(session: Session, result: TokenShares, row: int) -> dict[str, Any]:
    return {
        "shares": [
            {"position": i, "token": session.token(session.ids[i]), "share": float(result.shares[row, i])}
            for i in range(result.positions[row] + 1)
        ],
        "offset": float(result.offsets[row]),
    }


def _branches(result: BranchShares, row: int) -> dict[str, Any]:
    blocks: list[dict[str, Any]] = []
    for i in range(result.attn.shape[1]):
        block: dict[str, Any] = {"block": i + 1, "attn": float(result.attn[row, i]), "mlp": float(result.mlp[row, i])}
        if result.heads is not None and result.attn_bias is not None:
            block |= {"heads": result.heads[row, i].tolist(), "attn_bias": float(result.attn_bias[row, i])}
        blocks.append(block)
    return {"embedding": float(result.embedding[row]), "blocks": blocks, "bias": float(result.bias[row])}


def of_one(result: Attribution, position: int) -> TokenShares:
    """Return the shares at one position as those of several are stated."""
    numbers = (torch.tensor([value], dtype=torch.float64) for value in (result.logit, result.offset))
    logits, offsets = numbers
    targets = torch.tensor([result.target])
    return TokenShares(range(position, position + 1), targets, result.versus, logits, result.shares[None], offsets)


def tensors(result: TokenShares | BranchShares) -> dict[str, torch.Tensor]:
    """Return the saved tensors: one row for each of `m` positions."""
    found = {"targets": result.targets, "logits": result.logits}
    if isinstance(result, TokenShares):
        return found | {"shares": result.shares, "offsets": result.offsets}
    found |= {name: getattr(result, name) for name in ("embedding", "attn", "mlp", "bias")}
    if result.heads is not None and result.attn_bias is not None:
        found |= {"heads": result.heads, "attn_bias": result.attn_bias}
    return found


def show(data: dict[str, Any]) -> None:
    """Print the shares at one position part by part, at several in a line each; and their sums."""
    entries = data.get("positions", [data])
    if len(entries) > 1:
        _show_positions(entries)
    elif entries[0]["by"] == "head":
        _show_heads(entries[0])
    else:
        _show_blocks(entries[0])


def _sum(data: dict[str, Any]) -> str:
    return f"{data['logit'] - data['unexplained']:+.4f}"


def _show_blocks(data: dict[str, Any]) -> None:
    """Print two columns: what attention and what the MLP of each block adds."""
    blocks = data["blocks"]
    largest = max(abs(block[kind]) for block in blocks for kind in ("attn", "mlp")) or 1.0
    rows: list[tuple] = [("embedding", f"{data['embedding']:+.4f}", "", "", "")]
    for block in blocks:
        attn, mlp = block["attn"], block["mlp"]
        rows.append((f"block {block['block']}", f"{attn:+.4f}", bar(attn, largest), f"{mlp:+.4f}", bar(mlp, largest)))
    if data["bias"]:
        rows.append(("biases of norm and head", f"{data['bias']:+.4f}", "", "", ""))
    attn, mlp = (sum(block[kind] for block in blocks) for kind in ("attn", "mlp"))
    rows.append(("all blocks", f"{attn:+.4f}", "", f"{mlp:+.4f}", ""))
    rows.append(("sum", _sum(data), f"logit {data['logit']:.4f}", "", ""))
    columns = ["", "#attention", "", "#MLP", ""]
    table(f"Exact share of every block's branches in {asked_logit(data)}", columns, rows)


def _parts(data: dict[str, Any]) -> list[tuple[str, float]]:
    """Return everything that was added to the stream, by name."""
    parts = [("embedding", data["embedding"])]
    for block in data["blocks"]:
        name = f"block {block['block']}"
        if "heads" in block:
            parts += [(f"{name} head {i}", share) for i, share in enumerate(block["heads"])]
            parts.append((f"{name} bias of attention", block["attn_bias"]))
        else:
            parts.append((f"{name} attention", block["attn"]))
        parts.append((f"{name} MLP", block["mlp"]))
    return [*parts, ("biases of norm and head", data["bias"])]


def _show_heads(data: dict[str, Any]) -> None:
    """Print the largest shares, and what all others come to."""
    parts = sorted(_parts(data), key=lambda part: -abs(part[1]))
    shown, rest = parts[:SHOWN], [share for _, share in parts[SHOWN:] if share]
    largest = max(abs(share) for _, share in shown) or 1.0
    rows = [(name, f"{share:+.4f}", bar(share, largest)) for name, share in shown if share]
    if rest:
        rows.append((f"{len(rest)} more", f"{sum(rest):+.4f}", ""))
    rows.append(("sum", _sum(data), f"logit {data['logit']:.4f}"))
    table(f"Exact share of every head and MLP in {asked_logit(data)}", ["", "#share", ""], rows)


def _show_positions(entries: list[dict[str, Any]], largest: int = 3) -> None:
    """Print a line for each position: its target, the largest shares and the sum."""
    rows = []
    for data in entries:
        if data["by"] == "token":
            parts = [(s["token"], s["share"]) for s in data["shares"]] + [("offset", data["offset"])]
        else:
            parts = _parts(data)
        top = sorted(parts, key=lambda part: -abs(part[1]))[:largest]
        rows.append(
            (
                data["position"],
                data["token"],
                data["target"]["token"],
                f"{data['logit']:.4f}",
                ", ".join(f"{name} {share:+.2f}" for name, share in top if share),
                _sum(data),
            )
        )
    of = {"token": "every input token", "layer": "every block's branches", "head": "every head and MLP"}
    less = f", less the logit of {entries[0]['versus']['token']}" if entries[0]["versus"] else ""
    columns = ["#position", "token", "target", "#logit", "largest shares", "#sum of all"]
    table(f"Exact share of {of[entries[0]['by']]} in a logit at every position{less}", columns, rows)
