"""Turn a result into one self-contained HTML file: no network, no fonts, no library.

Everything that comes from a run is escaped by the templates. The page's policy allows the one style sheet and the one
script that it contains, by their hashes, and no connection at all.
"""

import base64
import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from ggjac import runs
from ggjac.report.load import load
from ggjac.report.sections import SECTIONS, frame
from ggjac.report.sections.common import Run
from ggjac.runs import RunError

TEMPLATES = Path(__file__).parent / "templates"
NAME = "report.html"
OWN = ("run.json", "tensors.safetensors")


def write_report(source: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a run folder, or of a file that a command printed as JSON; return its path.

    Without an `output` it is report.html in the folder, or NAME.html next to NAME.json.

    Raises:
        RunError: the source is not a result, or a damaged one, or the page cannot be written; the message is one line.
    """
    html = render(load(source))
    source = Path(source)
    own = [source / name for name in OWN] if source.is_dir() else [source]
    default = source / NAME if source.is_dir() else source.with_suffix(".html")
    path = default if output is None else Path(output)
    if any(path.exists() and file.exists() and path.samefile(file) for file in own):
        raise RunError(f"{path}: is the input of the report; choose another -o")
    if output is None and path.is_symlink():  # a folder from strangers must not redirect the output
        raise RunError(f"{path}: is a link that leads out of the run folder; remove it, or choose a file with -o")
    runs.save_bytes(path, html.encode("utf-8"))
    return path


def render(run: Run) -> str:
    """Return the page as text."""
    parts: list[dict[str, Any]] = []
    for section in SECTIONS:
        data = section.build(run)
        if data:
            parts.append({"key": section.key, "title": section.title, "note": section.note, "data": data})
    style, script = _asset("report.css"), _asset("report.js")
    # The script itself draws the ranks of one section.
    data = next((part["data"]["data"] for part in parts if part["key"] == "layers"), None)
    return (
        _environment()
        .get_template("page.html")
        .render(
            header=frame.header(run),
            sections=parts,
            style=style,
            script=script,
            style_hash=_hash(style),
            script_hash=_hash(script),
            data=data,
            version=(run.content["versions"] or {}).get("ggjac"),
        )
    )


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["place"] = _place
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "sort_keys": False}
    return environment


def _place(share: float) -> str:
    """Return a fraction of an axis in thousandths, the units of a chart's inner drawing."""
    return f"{1000 * share:.1f}".rstrip("0").rstrip(".")


@cache
def _asset(name: str) -> Any:
    """Return one of the page's own assets, to be embedded unescaped."""
    from markupsafe import Markup

    text = (TEMPLATES / name).read_text(encoding="utf-8")
    assert "</" not in text, f"{name} would end its own element"
    return Markup(text)


def _hash(text: str) -> str:
    """Return the source expression of a Content-Security-Policy that allows exactly this text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
