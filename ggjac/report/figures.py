"""The page's figures for print: PNG, SVG and PDF, drawn by matplotlib from the same charts."""

import os
from pathlib import Path
from typing import Any

from ggjac import runs
from ggjac.drawing.figures import draw, encoded, style
from ggjac.report.load import load
from ggjac.report.sections import SECTIONS
from ggjac.report.sections.common import Run
from ggjac.runs import RunError

FOLDER = "figures"
FORMATS = ("png", "svg", "pdf")


def write_figures(source: str | os.PathLike[str]) -> list[Path]:
    """Draw the figures of a run folder into its folder `figures`, those of NAME.json into NAME-figures next to it.

    Returns the files, those of one figure together.

    Raises:
        RunError: the source is not a result, or a damaged one, or the figures cannot be written; the message is one
            line.
        ValueError: matplotlib is missing.
    """
    run, source = load(source), Path(source)
    target = source / FOLDER if source.is_dir() else source.with_name(f"{source.stem}-{FOLDER}")
    if target.is_symlink():  # a folder from strangers must not redirect the output
        raise RunError(f"{target}: is a link that leads out of the run folder; remove it")
    written = []
    with style():
        try:
            target.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"{target}: cannot be created ({error.strerror}); copy the run folder elsewhere") from error
        for name, figure in figures(run).items():
            for kind in FORMATS:
                path = target / f"{name}.{kind}"
                if path.is_symlink():
                    raise RunError(f"{path}: is a link that leads out of the run folder; remove it")
                runs.save_bytes(path, encoded(figure, kind))
                written.append(path)
    return written


def figures(run: Run) -> dict[str, Any]:
    """Return a matplotlib `Figure` by name for every drawing of every section.

    Raises:
        ValueError: matplotlib is missing.
    """
    return {drawing.name: draw(drawing) for section in SECTIONS for drawing in section.drawings(run)}
