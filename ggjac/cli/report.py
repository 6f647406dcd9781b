"""`ggjac report`: the HTML report of a run folder or of a JSON file, and its figures for print."""

import os
from pathlib import Path

import click

from ggjac.cli.help import Command
from ggjac.cli.options import output


@click.command(cls=Command)
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@output("HTML file to write.  [default: report.html in the run folder, or NAME.html in the folder of NAME.json]")
@click.option(
    "--figures",
    is_flag=True,
    help="Also write the figures as PNG, SVG and PDF to RUN/figures, or to NAME-figures in the folder of NAME.json.",
)
def report(run: Path, output: Path | None, figures: bool) -> None:
    """Write the report of a run folder: one HTML file that needs no network.

    `ggjac analyze` writes it too, into the folder that it creates. RUN may also be a file: the JSON that a prompt
    command printed with `--format json`, or that `steer -o` saved. The report shows the results that are in it.

    \b
    ggjac report ggjac-runs/demo-20260101-120000 --figures
    """
    from ggjac.cli.render import line
    from ggjac.display import visible
    from ggjac.report import write_figures, write_report

    written = [write_report(run, output)]
    if figures:
        written += write_figures(run)
    for path in written:
        line(f"Saved {visible(os.fsencode(path))}")
