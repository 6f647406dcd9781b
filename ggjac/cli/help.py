"""How `--help` is arranged: what a command alone asks, and then what many share, under headings."""

import click

# Heading -> the options under it, by the names of their parameters; all others come first.
HEADINGS: dict[str, tuple[str, ...]] = {
    "Model and prompt": (
        *("model", "download", "prompt", "file", "tokens", "chat", "system", "escape", "parse_special", "context"),
    ),
    "Several prompts": ("each_line", "workers", "shard"),
    "Decomposition": ("rank", "tol", "max_sweeps", "seed", "search_dtype"),
    "Computation": ("threads", "device", "dtype", "ram_budget", "vram_budget", "trace", "resume", "quiet"),
    "Plan": ("dry_run", "no_bench"),
    "Output": ("output", "output_format", "hide_special", "scores"),
}


class Command(click.Command):
    """A command whose help has headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings, each in the order of the command line."""
        place = {name: heading for heading, names in HEADINGS.items() for name in names}
        rows: dict[str, list[tuple[str, str]]] = {heading: [] for heading in ("Options", *HEADINGS)}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                rows[place.get(param.name or "", "Options")].append(record)
        for heading, listed in rows.items():
            if listed:
                with formatter.section(heading):
                    formatter.write_dl(listed)
