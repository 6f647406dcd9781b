"""The options that commands share."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import click

from ggjac.sizes import KINDS, MAPS, MlpPath

DEFAULT_PROMPT = "The bridge out of Marin is the"
STEER_PROMPT = "My favorite thing is the"
STEER_CONCEPT = "The bridge out of Marin is the Golden"
_DOWNLOAD = "ggjac.download"  # in click's context: whether `-m` may use the network
MAX_THREADS = 512  # llama.cpp's limit (GGML_MAX_N_THREADS); torch crashes on many more


class TokenIds(click.ParamType):
    """Token ids separated by commas."""

    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Parse `1,2,3`."""
        if isinstance(value, list):
            return value
        try:
            return [int(part) for part in value.split(",")]
        except ValueError:
            given = value if len(value) <= 60 else f"{value[:57]}..."
            self.fail(f"{given!r} is not a list of token ids; write them as 1,2,3", param, ctx)


class Depths(click.ParamType):
    """Depths of a network, in blocks applied: single ones and ranges, separated by commas."""

    name = "depths"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "DepthRanges":
        """Parse `0,10-20,-1` or `all`; both ends of a range belong to it."""
        if isinstance(value, DepthRanges):
            return value
        if value == "all":
            return DepthRanges(value, ((0, -1),))
        parts = [re.fullmatch(r"(-?\d{1,9})(?:-(-?\d{1,9}))?", part.strip(), re.ASCII) for part in value.split(",")]
        if None in parts:
            given = value if len(value) <= 60 else f"{value[:57]}..."
            self.fail(f"{given!r} is no list of layers; write them as 0,10-20,-1, or all", param, ctx)
        return DepthRanges(value, tuple((int(part[1]), int(part[2] or part[1])) for part in parts if part))


@dataclass(frozen=True)
class DepthRanges:
    """What `--layers` says, before the model is known; negative numbers count from the end."""

    given: str
    ranges: tuple[tuple[int, int], ...]

    def of(self, blocks: int) -> list[int]:
        """Return the depths of a model with so many blocks, ascending.

        Raises:
            click.UsageError: it has no such depth, or a range is empty.
        """
        found: set[int] = set()
        for ends in self.ranges:
            for depth in ends:
                if not -blocks - 1 <= depth <= blocks:
                    raise click.UsageError(
                        f"--layers {self.given}: {depth} is out of range; this model has depths 0 to {blocks}, "
                        "counted in blocks applied"
                    )
            first, last = (depth % (blocks + 1) for depth in ends)
            if first > last:
                raise click.UsageError(
                    f"--layers {self.given}: {first} comes after {last}; write the smaller one first"
                )
            found.update(range(first, last + 1))
        return sorted(found)


class MemorySize(click.ParamType):
    """An amount of memory, in bytes once parsed."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse `2GiB`."""
        from ggjac.planner.machine import SizeError, parse_size

        try:
            return value if isinstance(value, int) else parse_size(value)
        except SizeError as error:
            self.fail(str(error), param, ctx)


class ModelFile(click.Path):
    """A GGUF file, by its path or by the name under which another program keeps it."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Find the file that a name stands for, with `--download` on the network too."""
        from ggjac.gguf.hub import DownloadError, HubError, resolve

        try:
            value = resolve(value, download=bool(ctx and ctx.meta.get(_DOWNLOAD)))
        except DownloadError:
            raise
        except HubError as error:
            self.fail(str(error), param, ctx)
        return super().convert(value, param, ctx)


def _remember_download(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[_DOWNLOAD] = value


@dataclass(frozen=True)
class ModelOptions:
    """What to run: a model, a prompt, and how to compute."""

    model: Path | None
    prompt: str | None
    file: Path | None
    tokens: list[int] | None
    threads: int | None
    device: str
    dtype: str
    mlp_path: MlpPath
    ram_budget: int | None
    vram_budget: int | None
    trace: Path | None
    quiet: bool

    def text(self) -> str | None:
        """Return the prompt's text, from wherever it is given; None where it is given as token ids.

        Raises:
            click.UsageError: it is given twice, or its file is not text.
        """
        given = [name for name in ("prompt", "file", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise click.UsageError(f"--{given[0]} and --{given[1]} both give a prompt; use one of them")
        if self.tokens is not None:
            return None
        if self.file is not None:
            try:
                # Editors end a file with a newline that is no part of the prompt: llama.cpp's -f drops it, too.
                return self.file.read_bytes().decode("utf-8").removesuffix("\n")
            except UnicodeDecodeError as error:
                raise click.UsageError(f"--file {self.file} is not UTF-8 text ({error.reason})") from error
        return DEFAULT_PROMPT if self.prompt is None else self.prompt

    def prompts(self) -> list["ModelOptions"]:
        """Return the options of each prompt: lines of a file that are not empty, each once, or the one prompt given.

        Raises:
            click.UsageError: as `text`, or the file has no prompt.
        """
        text = self.text()
        if self.file is None or text is None:
            return [self]
        lines = dict.fromkeys(part.removesuffix("\r") for part in text.split("\n") if part.strip())
        if not lines:
            raise click.UsageError(f"--file {self.file} has no prompt; write one on each line")
        return [replace(self, file=None, prompt=part) for part in lines]

    def texts(self, concept: str | None, concept_tokens: list[int] | None) -> tuple["ModelOptions", "ModelOptions"]:
        """Return the options with the text that `steer` continues, and with the concept in its place; with defaults.

        Raises:
            click.UsageError: two concepts.
        """
        if concept is not None and concept_tokens is not None:
            raise click.UsageError("--concept and --concept-tokens both give a concept; use one of them")
        nothing = self.prompt is None and self.file is None and self.tokens is None
        what = replace(self, prompt=STEER_PROMPT) if nothing else self
        if concept is None and concept_tokens is None:
            # There may be no tokenizer.
            concept, concept_tokens = (STEER_CONCEPT, None) if what.tokens is None else (None, what.tokens)
        return what, replace(what, prompt=concept, file=None, tokens=concept_tokens)


_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_MODEL = [
    click.option(
        "-m",
        "--model",
        type=ModelFile(),
        metavar="FILE",
        help="GGUF file, or the first of its shards; or one that is on this disk by its name, hf:user/repo[:quant] or "
        "ollama:name[:tag].  [default: bundled demo]",
    ),
    click.option(
        "--download",
        is_flag=True,
        is_eager=True,  # before -m, which asks for it
        expose_value=False,
        callback=_remember_download,
        help="Fetch an hf: model that is not on this disk.",
    ),
]
# How a command names the prompt that it takes when none is given, and what its file holds.
PROMPT_HELP = f"Text to analyse.  [default: {DEFAULT_PROMPT!r}]"
FILE_HELP = "Read the prompt from a file (UTF-8; a last newline is dropped)."


def _prompt_options(prompt: str, file: str) -> list[Callable]:
    return [
        click.option("-p", "--prompt", help=prompt),
        click.option("-f", "--file", type=_FILE, help=file),
        click.option("--tokens", type=TokenIds(), help="Token ids 1,2,3 in place of a text."),
    ]


threads = click.option("-t", "--threads", type=click.IntRange(1, MAX_THREADS), help="CPU threads.  [default: all]")
device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
_COMPUTE = [
    threads,
    device,
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float64", "bfloat16", "float16"]),
        default="float32",
        show_default=True,
        help="Of all arithmetic.",
    ),
    click.option(
        "--mlp-path",
        type=click.Choice(["up", "gate"]),
        default="up",
        show_default=True,
        help="Which factor of a gated MLP stays live; the other is frozen.",
    ),
    click.option(
        "--ram-budget",
        type=MemorySize(),
        metavar="SIZE",
        help="Memory to use at most, as 2GiB, 500MB or 1.5G.  [default: half of what is free]",
    ),
    click.option(
        "--vram-budget", type=MemorySize(), metavar="SIZE", help="Of the device's memory.  [default: what is free]"
    ),
    click.option("-q", "--quiet", is_flag=True, help="No progress on stderr."),
]
_TRACE = click.option(
    "--trace",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Keep the forward pass here, and use it if it is there already; it then need not fit into memory.",
)
position = click.option(
    "--position", type=int, default=-1, show_default=True, help="Output position; negative counts from the end."
)
output_format = click.option(
    "--format", "output_format", type=click.Choice(["table", "json"]), default="table", show_default=True
)


def model_file(command: Callable) -> Callable:
    """Add the options that choose a model, for a command that takes no prompt."""
    for option in reversed(_MODEL):
        command = option(command)
    return command


def top(help: str, default: int = 8) -> Callable:
    """Return the `--top` option, how many tokens to show, with a command's own explanation."""
    return click.option("--top", type=click.IntRange(min=1), default=default, show_default=True, help=help)


def output(help: str) -> Callable:
    """Return the `-o/--output` option with a command's own explanation."""
    return click.option("-o", "--output", type=click.Path(path_type=Path), help=help)


resume = click.option("--resume", is_flag=True, help="Go on with the interrupted run of this -o.")


def _names(*known: str) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """Return what turns `a,b` into a tuple of known names, in their own order."""

    def parse(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
        given = [part.strip() for part in value.split(",")]
        for part in given:
            if part not in known:
                raise click.BadParameter(f"{part[:40]!r} is unknown; known: {', '.join(known)}", ctx, param)
        return tuple(name for name in known if name in given)

    return parse


def layer_options(command: Callable) -> Callable:
    """Add the options that choose maps inside the network."""
    for option in reversed(
        [
            click.option(
                "--layers",
                type=Depths(),
                default="all",
                show_default=True,
                help="Depths, in blocks applied: 0,10-20,-1. Negative ones count from the end.",
            ),
            click.option(
                "--maps", callback=_names(*MAPS), default=",".join(MAPS), show_default=True, help="Which maps."
            ),
            click.option("--kinds", callback=_names(*KINDS), default=",".join(KINDS), show_default=True, help="Taps."),
            click.option("--transport", is_flag=True, help="Carry left vectors of the stream to the output, too."),
        ]
    ):
        command = option(command)
    return command


def spectrum_options(command: Callable) -> Callable:
    """Add the options of a singular value decomposition."""
    rank = click.option("-k", "--rank", type=click.IntRange(min=1), default=8, show_default=True, help="Triplets.")
    return rank(iteration_options(command))


def _finite(ctx: click.Context, param: click.Parameter, value: float) -> float:
    """Refuse what click's ranges let pass: nan, and infinity where there is no upper bound."""
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number", ctx, param)
    return value


def iteration_options(command: Callable) -> Callable:
    """Add the options of an iteration for singular values."""
    for option in reversed(
        [
            click.option(
                "--tol",
                type=click.FloatRange(min=0, min_open=True),
                callback=_finite,
                default=1e-3,
                show_default=True,
                help="Relative residual asked of every triplet.",
            ),
            click.option(
                "--max-sweeps",
                type=click.IntRange(min=2),
                default=40,
                show_default=True,
                help="Passes over the weights, up and down counted singly.",
            ),
            click.option(
                "-s", "--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of the random start.  [default: 0]"
            ),
        ]
    ):
        command = option(command)
    return command


def model_options(*, prompt: str = PROMPT_HELP, file: str = FILE_HELP, trace: bool = True) -> Callable:
    """Return a decorator that adds the options of `ModelOptions` and passes them on as one argument, `what`.

    Args:
        prompt, file: help of `--prompt` and `--file`, where a command's own differ.
        trace: False for a command that runs several prompts or models, and so keeps no forward pass.
    """
    options = [*_MODEL, *_prompt_options(prompt, file), *_COMPUTE, *([_TRACE] if trace else [])]

    def decorate(command: Callable) -> Callable:
        def wrapped(**params: Any) -> Any:
            own = {field.name: params.pop(field.name, None) for field in fields(ModelOptions)}
            return command(ModelOptions(**own), **params)

        wrapped.__doc__, wrapped.__name__ = command.__doc__, command.__name__
        wrapped.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
        for option in reversed(options):
            wrapped = option(wrapped)
        return wrapped

    return decorate
