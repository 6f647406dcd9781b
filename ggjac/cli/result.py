"""How a command ends: its result as JSON with its provenance, or as tables; and the exit code of its checks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ggjac.checks import brief
from ggjac.cli.render import emit_json, emit_tables, line
from ggjac.cli.session import doubts, show_doubts, show_saved, show_tokens
from ggjac.results import Result, Table
from ggjac.session import Session


def show_reconstruction(data: dict[str, Any]) -> None:
    """Print the reconstruction error."""
    share = data["offset_norm"] / (data["output_norm"] or 1.0)
    offset = f"offset {share:.1%} of ‖y‖" if share else "offset 0: no bias adds to it"
    sign, remark = ("<=", "") if data["healthy"] else (">", ": NOT healthy")
    if data["cancellation"] and data["healthy"]:
        remark = f" after cancellation: the residual stream was {data['cancellation']:.0f} times as long before"
    line(f"Reconstruction ‖J x + offset - y‖/‖y‖ = {data['error']:.1e} ({sign} {data['limit']:.0e}{remark}); {offset}")
    line("")


def show_excluded(session: Session) -> None:
    """Print which positions are no input of the map, if any."""
    if excluded := session.excluded:
        named = session.model.words([session.ids[i] for i in excluded])
        many = "s" * (len(excluded) > 1)
        line(f"Without position{many} {brief(excluded)} ({named}): folded into the offset")
        line("")


def finish(
    session: Session,
    content: dict[str, Any],
    output_format: str,
    output: Path | None = None,
    *,
    results: Sequence[Result],
    cut: Callable[[Table], Table] = lambda table: table,
    **show: Callable[[Any], None],
) -> None:
    """Print a command's result, as JSON with its provenance or as tables, and exit with code 3 if a check failed.

    Args:
        session: of the result.
        content: the result's parts by name.
        output_format: `json`, `table`, `csv` or `latex`.
        output: where tensors were saved, if anywhere.
        results: for CSV the first one, for LaTeX all.
        cut: shortens the tables of CSV and LaTeX.
        show: functions that print the part of that name, in this order; a reconstruction comes first.
    """
    envelope = session.envelope(check=output is None)
    if output_format == "json":
        emit_json(envelope | content)
    elif output_format in ("csv", "latex"):
        emit_tables(results, session, output_format, [*session.warnings, *doubts(envelope["model"])], cut)
    else:
        show_tokens(session.tokens(), session.warnings)
        show_doubts(envelope["model"])
        if "reconstruction" in content:
            show_excluded(session)
            show_reconstruction(content["reconstruction"])
        for name, show_part in show.items():
            show_part(content[name])
        show_saved(output)
    if failed(content):
        click.get_current_context().exit(3)


def failed(content: dict[str, Any]) -> bool:
    """Return whether a check of a result fell outside its tolerance.

    An SVD that stopped at the precision of its dtype is not a failure: it is as good as the dtype allows.
    """
    svd = content.get("svd", {})
    rebuilt = (content, content.get("jacobian", {}))
    swept = (content, svd, svd.get("whole", {}), *svd.get("per_token", ()), content.get("layers", {}))
    return (
        content.get("parity", {}).get("verdict") is False
        or not all(part.get("reconstruction", {}).get("healthy", True) for part in rebuilt)
        or any(part.get("stopped_by") == "sweeps" for part in swept)
    )
