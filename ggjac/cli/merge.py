"""`ggjac merge`: the files of shards as one."""

from pathlib import Path

import click

from ggjac.cli import texts
from ggjac.cli.help import Command


@click.command(cls=Command)
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-f",
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The file of all prompts, one on each line: what is missing is named, and the output has its order.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="File of JSON lines; or, if its name ends in .parquet, a Parquet file (needs pandas and pyarrow); or, if in "
    ".safetensors, the mean that jacobian --mean makes.",
)
def merge(files: tuple[Path, ...], file: Path | None, output: Path) -> None:
    """Put the files of JSON lines that --shard wrote together to one.

    It is the file that one run over all prompts writes, bit for bit on equal machines with equal threads. Files of
    another model, command or settings are refused by name, and so are missing shards; with -f, missing prompts.

    \b
    ggjac merge ranks-*-of-64.jsonl -f prompts.txt -o ranks.jsonl
    """
    from ggjac.cli.render import line
    from ggjac.cli.session import show_saved
    from ggjac.cli.studies import show_mean, show_spectrum
    from ggjac.studies import merge, merge_means
    from ggjac.units import counted

    if output.suffix == ".safetensors":
        if file is not None:
            raise click.UsageError("-f is for JSON lines: the files of a mean are numbered, and say what is missing")
        show_mean(merge_means(files, output), "table", ())
        return show_saved(output)
    records = merge(files, output, None if file is None else texts.prompts(texts.read(file), file))
    machines = {tuple(sorted(record.get("machine", {}).items())) for record in records}
    if len(machines) > 1:
        line(f"Warning: computed by {len(machines)} kinds of machines or threads: last digits may differ")
    show_spectrum(records)
    line(f"{counted(len(records), 'prompt')} of {counted(len(files), 'file')}")
    show_saved(output)
