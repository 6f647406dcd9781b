"""The options that commands share."""

import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, get_args

import click

from ggjac.checks import NUMBER, depths, listed
from ggjac.cli import texts, together
from ggjac.neutral import NEUTRAL
from ggjac.sizes import ITEM_BYTES, KINDS, MAPS, SEARCHES, MlpPath

DEFAULT_PROMPT = "The bridge out of Marin is the"
STEER_PROMPT = "My favorite thing is the"
STEER_CONCEPT = "The bridge out of Marin is the Golden"
STEER_CONTROL = "She put the book on the table and then"
_ASKED = "ggjac.asked"  # in click's context: path -> the name for which it was found
_DOWNLOAD = "ggjac.download"  # in click's context: whether `-m` may use the network
_SCORES = "ggjac.scores"  # in click's context: whether tables show the scores of decoded tokens
MAX_WORKERS = 512
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


class Numbers(click.ParamType):
    """Finite numbers separated by commas; or, if `ascending`, such numbers above 0.

    Args:
        name: of the option's value.
        what: the numbers, for a message.
        example: of how they are written.
        ascending: whether they are above 0, each larger than the one before.
    """

    def __init__(self, name: str, what: str, example: str, *, ascending: bool = False):
        self.name, self.what, self.example, self.ascending = name, what, example, ascending

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        """Parse `0,0.2,0.5`."""
        if isinstance(value, list):
            return value
        try:
            numbers = [float(part) for part in value.split(",")]
        except ValueError:
            numbers = [math.nan]
        wrong = self.ascending and (min(numbers) <= 0 or numbers != sorted(set(numbers)))
        if wrong or not all(map(math.isfinite, numbers)):
            given = value if len(value) <= 60 else f"{value[:57]}..."
            self.fail(f"{given!r} is not a list of {self.what}; write them as {self.example}", param, ctx)
        return numbers


class Listed(click.ParamType):
    """Numbers of which there are as many as the model or the prompt has: single ones and ranges, or all of them."""

    def __init__(self, name: str):
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check that a text is such as `0,10-20,-1` or `all`; which numbers there are is not known yet."""
        try:
            listed(value)
        except ValueError as error:
            given = value if len(value) <= 60 else f"{value[:57]}..."
            self.fail(f"{given!r} is not a list of {self.name}; {error}", param, ctx)
        return value


class Position(Listed):
    """An output position; several of them, or all, where a command has a result for each."""

    def __init__(self, *, several: bool):
        super().__init__("positions")
        self.several = several

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Parse `-1` to a number; check a text such as `0,10-20,-1` or `all`."""
        text = str(value).strip()
        if re.fullmatch(NUMBER, text, re.ASCII):
            return int(text)
        if not self.several:
            wrong = f"{text[:60]!r} is not a position; give one, counted from 0 or back from -1"
            with suppress(ValueError):
                listed(text)
                wrong += " (only attribute takes several)"
            self.fail(wrong, param, ctx)
        return str(super().convert(text, param, ctx))


def depths_of(layers: str, blocks: int) -> list[int]:
    """Return the depths that `--layers` names, in blocks applied, of a model with `blocks` blocks, ascending.

    Raises:
        click.UsageError: the model has no such depth, or a range is empty.
    """
    try:
        return depths(layers, blocks)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


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


class Rate(click.ParamType):
    """A rate of a network, `10Gb` or `300GB`, in bytes per second."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse the text."""
        from ggjac.planner import NetworkError, parse_rate

        try:
            return value if isinstance(value, float) else parse_rate(value)
        except NetworkError as error:
            self.fail(str(error), param, ctx)


RATE = Rate()


class WorkersType(click.ParamType):
    """Who computes many prompts: a number of processes, or the address of a cluster."""

    name = "workers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "Workers":
        """Parse `8`, `ray`, `ray:ADDRESS` or `dask:ADDRESS`."""
        if isinstance(value, Workers):
            return value
        engine, _, address = value.partition(":")
        if re.fullmatch(r"[1-9]\d{0,2}", value, re.ASCII) and int(value) <= MAX_WORKERS:
            return Workers("processes", count=int(value))
        if engine == "ray" or (engine == "dask" and address):
            return Workers(engine, address or None)
        given = value if len(value) <= 60 else f"{value[:57]}..."
        expected = f"write a number up to {MAX_WORKERS}, ray, ray:ADDRESS or dask:tcp://HOST:PORT"
        self.fail(f"{given!r} is neither a number nor a cluster; {expected}", param, ctx)


class ShardType(click.ParamType):
    """A part of many prompts."""

    name = "shard"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse `3/64`: shards count from 0."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value, re.ASCII)
        if not match or int(match[1]) >= int(match[2]):
            self.fail(f"{value[:40]!r} is not a shard; of 64, the first is 0/64 and the last 63/64", param, ctx)
        return int(match[1]), int(match[2])


@dataclass(frozen=True)
class Workers:
    """The value of `--workers`: `processes`, of this machine, `ray` or `dask`."""

    engine: str
    address: str | None = None
    count: int | None = None


@dataclass(frozen=True)
class Many:
    """The options of a command that takes many prompts: whether it does, who computes them, and which part of them."""

    each_line: bool = False
    workers: Workers | None = None
    shard: tuple[int, int] | None = None


class ModelFile(click.Path):
    """A GGUF file: its path, or the name under which another program stores it."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Find the file that a name stands for; with `--download`, on the network too."""
        from ggjac.gguf.hub import DownloadError, HubError, resolve

        asked = value
        try:
            value = resolve(value, download=bool(ctx and ctx.meta.get(_DOWNLOAD)))
        except DownloadError:
            raise
        except HubError as error:
            self.fail(str(error), param, ctx)
        if ctx and str(value) != str(asked):
            ctx.meta.setdefault(_ASKED, {})[value] = asked
        return super().convert(value, param, ctx)


def asked_name(model: Path | None) -> str | None:
    """Return the name in another program's store that the running command was given for a file, if it was."""
    name: str | None = click.get_current_context().meta.get(_ASKED, {}).get(model)
    return name


def _remember_download(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[_DOWNLOAD] = value


@dataclass(frozen=True)
class ModelOptions:
    """The options of every command that runs a prompt: model, prompt, and how to compute."""

    model: Path | None
    prompt: str | None
    file: Path | None
    tokens: list[int] | None
    chat: str | None
    system: str | None
    escape: bool
    parse_special: bool
    context: int | None
    threads: int | None
    device: str
    dtype: str
    mlp_path: MlpPath
    both_rules: bool
    exclude: str | None
    ram_budget: int | None
    vram_budget: int | None
    trace: Path | None
    quiet: bool

    @property
    def ways(self) -> list[str]:
        """The options that give a prompt."""
        return [name for name in ("prompt", "file", "tokens", "chat") if getattr(self, name) is not None]

    def given(self, conversation: Callable[[str, str | None], str]) -> str | list[int]:
        """Return the prompt, from wherever it is given: its text, or its token ids.

        Args:
            conversation: renders a question, and what the system says before it, by the model's chat template.

        Raises:
            click.UsageError: it is given twice, or its file is not text.
        """
        if len(self.ways) > 1:
            raise click.UsageError(f"--{self.ways[0]} and --{self.ways[1]} both give a prompt; use one of them")
        if self.system is not None and self.chat is None:
            raise click.UsageError("--system is a part of a conversation; give the question with --chat")
        if self.tokens is not None:
            return self.tokens
        if self.chat is not None:
            if not self.chat.strip():
                raise click.UsageError("--chat has no question; write one, as in --chat 'Why is the sky blue?'")
            text = conversation(self.read(self.chat), None if self.system is None else self.read(self.system))
            if not self.quiet:
                click.echo(f"Prompt, by the chat template of the file: {text!r}"[:4000], err=True)
            return text
        if self.file is not None:
            return self.read(texts.read(self.file))
        return DEFAULT_PROMPT if self.prompt is None else self.read(self.prompt)

    def said(self) -> dict[str, str]:
        """Return what each role says in the conversation of `--chat`, by its name; nothing without one."""
        given = {"system": self.system, "user": self.chat}
        return {role: self.read(text) for role, text in given.items() if text is not None}

    def answer_ids(self, answer: str | list[int] | None, tokenizer: Any) -> list[int] | None:
        """Return the token ids of an answer to the prompt: a text is spelled as it is, without a BOS before it."""
        if not isinstance(answer, str):
            return answer
        ids: list[int] = tokenizer.continuation(self.read(answer), parse_special=self.parse_special)
        return ids

    def read(self, text: str) -> str:
        """Return a text as it is meant: with `--escape`, its escapes are read."""
        return texts.unescaped(text) if self.escape else text

    def remarks(self) -> list[str]:
        """Return what a reader of results should know about how the prompt was given."""
        typed = [text for text in (self.prompt, self.chat, self.system) if text is not None]
        found = []
        if not self.ways and self.model is not None:
            found.append("no prompt was given: this is the default one; -p gives another")
        if not self.escape and any(map(texts.has_escapes, typed)):
            found.append("a backslash and a letter in the prompt are two characters: -e reads \\n as a line break")
        return found

    def prompts(self, conversation: Callable[[str, str | None], str]) -> list[str | list[int]]:
        """Return the prompts: the lines of a file that are not empty, each once, or the one prompt given.

        Raises:
            click.UsageError: as `given`, or the file has no prompt.
        """
        prompt = self.given(conversation)
        if self.file is None or not isinstance(prompt, str):
            return [prompt]
        return list(texts.prompts(prompt, self.file))

    def texts(self, concept: str | None, concept_tokens: list[int] | None) -> tuple["ModelOptions", str | list[int]]:
        """Return the options with the text that `steer` continues, and the concept; with their defaults.

        Raises:
            click.UsageError: two concepts.
        """
        if concept is not None and concept_tokens is not None:
            raise click.UsageError("--concept and --concept-tokens both give a concept; use one of them")
        what = self if self.ways else replace(self, prompt=STEER_PROMPT)
        if concept is not None:
            return what, self.read(concept)
        if concept_tokens is None:
            # Where the text is token ids there may be no tokenizer: then it is its own concept.
            return what, STEER_CONCEPT if what.tokens is None else what.tokens
        return what, concept_tokens

    def beside(self, file: Path | None, prompt: str | None, tokens: list[int] | None) -> tuple[str, "ModelOptions"]:
        """Return what `compare` sets beside these options, and its name: another model, or another prompt.

        A text is meant as the first prompt is: of `--chat`, a question.

        Raises:
            click.UsageError: none of the three is given, or several.
        """
        given = {"--with": file, "--with-prompt": prompt, "--with-tokens": tokens}
        names = [name for name, value in given.items() if value is not None]
        if not names:
            raise click.UsageError(
                "nothing to compare with; give another file (--with) or another prompt (--with-prompt)"
            )
        if len(names) > 1:
            raise click.UsageError(f"{names[0]} and {names[1]} are two comparisons; give one of them at a time")
        if file is not None:
            return "other_model", replace(self, model=file)
        question = None if self.chat is None else prompt
        system = None if question is None else self.system
        text = prompt if question is None else None
        return "other_prompt", replace(self, prompt=text, file=None, tokens=tokens, chat=question, system=system)

    def unrelated(self, control: bool, given: str | None, concept_tokens: list[int] | None) -> str | None:
        """Return the prompt whose map is the control of `steer`; None for none, and by default where ids are given.

        Raises:
            click.UsageError: a prompt is given, but no control.
        """
        if not control:
            if given is not None:
                raise click.UsageError("--no-control leaves out what --control-concept asks for; use one of them")
            return None
        if given is not None:
            return self.read(given)
        return STEER_CONTROL if self.tokens is None and concept_tokens is None else None


_FILE = click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
_MODEL = [
    click.option(
        "-m",
        "--model",
        type=ModelFile(),
        metavar="FILE",
        help="GGUF file or first shard; or the name of an already downloaded model: hf:user/repo[:quant] or "
        "ollama:name[:tag].  [default: bundled demo]",
    ),
    click.option(
        "--download",
        is_flag=True,
        is_eager=True,  # before -m, which asks for it
        expose_value=False,
        callback=_remember_download,
        help="Download an hf: model that is not on this disk yet.",
    ),
]
# Help of the prompt options, with the default prompt and the contents of the file.
PROMPT_HELP = f"Text to analyse.  [default: {DEFAULT_PROMPT!r}]"
FILE_HELP = "Read the prompt from a file (UTF-8; a final newline is dropped), or from stdin: -f -."


def _prompt_options(prompt: str, file: str) -> list[Callable]:
    return [
        click.option("-p", "--prompt", help=prompt),
        click.option("-f", "--file", type=_FILE, help=file),
        click.option("--tokens", type=TokenIds(), help="Token ids, such as 1,2,3, instead of a text."),
        click.option("--chat", metavar="QUESTION", help="Ask a question by the file's own chat template."),
        click.option("--system", metavar="TEXT", help="What the system says before the question of --chat."),
        click.option(
            "-e", "--escape", is_flag=True, help=r"Read \n, \t, \x41 and the like in texts, as llama.cpp does."
        ),
        click.option(
            "--parse-special/--no-parse-special",
            default=True,
            help="Whether <s> and the like in a text are the tokens that they name.  [default: they are]",
        ),
        click.option(
            "--context",
            type=click.IntRange(min=1),
            metavar="N",
            help="Largest number of tokens, also beyond what the model was trained on.  [default: the model's own]",
        ),
    ]


threads = click.option("-t", "--threads", type=click.IntRange(1, MAX_THREADS), help="CPU threads.  [default: all]")
device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
_COMPUTE = [
    threads,
    device,
    click.option(
        "--dtype",
        type=click.Choice(list(ITEM_BYTES)),
        default="float32",
        show_default=True,
        help="Dtype of all computation.",
    ),
    click.option(
        "--ram-budget",
        type=MemorySize(),
        metavar="SIZE",
        help="Maximum memory, such as 2GiB, 500MB or 1.5G.  [default: half of the free memory]",
    ),
    click.option(
        "--vram-budget",
        type=MemorySize(),
        metavar="SIZE",
        help="Maximum GPU memory.  [default: all that is free]",
    ),
    click.option("-q", "--quiet", is_flag=True, help="Do not show progress."),
]


class OneRule(click.Choice):
    """One freezing rule; both, where a command has no place for them, with where that is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the rule."""
        if value == "both":
            self.fail("both sets the shares of attribute side by side; here run up, then gate", param, ctx)
        return super().convert(value, param, ctx)


_MLP_PATH = click.option(
    "--mlp-path",
    type=OneRule(get_args(MlpPath)),
    default="up",
    show_default=True,
    help="Factor of a gated MLP that stays live (not frozen).",
)
_BOTH_RULES = click.option(
    "--mlp-path",
    type=click.Choice([*get_args(MlpPath), "both"]),
    default="up",
    show_default=True,
    help="Factor of a gated MLP that stays live (not frozen); both shows the shares under either rule.",
)


_EXCLUDE = click.option(
    "--exclude",
    type=Listed("positions"),
    help="Input positions that are folded into the offset, as 0,10-20,-1; the map is that of the others.",
)


def _beside_others(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Refuse a new folder inside one that does not exist: its name may be mistyped, and gigabytes go there."""
    if value is not None and not value.parent.is_dir():
        raise click.BadParameter(f"there is no folder {value.parent}; make it, or choose another place", ctx, param)
    return value


_TRACE = click.option(
    "--trace",
    type=click.Path(file_okay=False, path_type=Path),
    callback=_beside_others,
    metavar="FOLDER",
    help="Save the recorded forward pass in FOLDER, or reuse the one there; it then need not fit in memory.",
)
position = click.option(
    "--position",
    type=Position(several=False),
    metavar="POSITION",
    default="-1",
    show_default=True,
    help="Output position; negative counts from the end.",
)
positions = click.option(
    "--position",
    type=Position(several=True),
    metavar="POSITION",
    default="-1",
    show_default=True,
    help="Output position (negative counts from the end); or several, as 0,10-20,-1, or all (of attribute).",
)


def _of_each(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Refuse input positions whose own maps are not asked for."""
    if value is not None and not ctx.params.get("per_token"):
        raise click.UsageError(f"--input-position {value} needs --per-token", ctx)
    return value


_INPUT_POSITION = click.option(
    "--input-position",
    type=Listed("positions"),
    callback=_of_each,
    help="Of --per-token, only these positions, as 0,10-20,-1; negative ones count from the output's.  [default: all]",
)
output_format = click.option(
    "--format", "output_format", type=click.Choice(["table", "json"]), default="table", show_default=True
)
tabular_format = click.option(  # of commands whose result is a table
    "--format",
    "output_format",
    type=click.Choice(["table", "json", "csv", "latex"]),
    default="table",
    show_default=True,
    help="csv has all digits, and ids beside the texts; latex needs the package booktabs.",
)
print_format = click.option(  # of commands whose result is several tables, which CSV cannot hold
    "--format",
    "output_format",
    type=click.Choice(["table", "json", "latex"]),
    default="table",
    show_default=True,
    help="latex needs the package booktabs.",
)


def per_token(help: str) -> Callable:
    """Return `--per-token`, with a command's own explanation, and `--input-position`."""
    flag = click.option("--per-token", is_flag=True, is_eager=True, help=help)  # before --input-position, which asks
    return lambda command: flag(_INPUT_POSITION(command))


def part(prompts: list[Any], shard: tuple[int, int]) -> list[Any]:
    """Return the prompts of a shard.

    Raises:
        click.UsageError: it has none.
    """
    number, count = shard
    if number >= len(prompts):
        raise click.UsageError(
            f"--shard {number}/{count} has no prompt: there are {len(prompts)}; take at most as many shards"
        )
    return prompts[number::count]


def given(name: str) -> bool:
    """Return whether the command line gives an option, by its parameter's name, instead of leaving the default."""
    return click.get_current_context().get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def model_file(command: Callable) -> Callable:
    """Add the options that choose a model, for a command that takes no prompt."""
    for option in reversed(_MODEL):
        command = option(command)
    return command


def top(help: str, default: int = 8) -> Callable:
    """Return the `--top` option, the number of tokens to show, with a command's own explanation."""
    return click.option("--top", type=click.IntRange(min=1), default=default, show_default=True, help=help)


hide_special = click.option(
    "--hide-special",
    is_flag=True,
    help="Leave control, unused and byte tokens, such as <s> and <0x0A>, out of the tokens of each vector.",
)


def _remember_scores(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[_SCORES] = value


scores = click.option(
    "--scores",
    is_flag=True,
    expose_value=False,
    callback=_remember_scores,
    help="Show in tables the score of each token of a vector: logit (promoted tokens) or cosine (nearest tokens).",
)


def shows_scores() -> bool:
    """Return whether the running command is to show the scores of decoded tokens."""
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get(_SCORES))


def output(help: str) -> Callable:
    """Return the `-o/--output` option with a command's own explanation."""
    return click.option("-o", "--output", type=click.Path(path_type=Path), callback=together.own, help=help)


MEAN = (
    "Take each line of -f as a prompt of its own, and save the mean over prompts of the output position's own map; a "
    "rerun continues."
)
EACH_LINE = "Take each line of -f as a prompt of its own; -o then is a file of JSON lines, which a rerun continues."


def many_options(
    command: Callable | None = None, *, flag: str | None = "--each-line", words: str = EACH_LINE
) -> Callable:
    """Add the options of `Many`, passed on as one argument; `flag` None: every line of a file is a prompt anyway."""
    if command is None:
        return lambda command: many_options(command, flag=flag, words=words)

    @wraps(command)
    def wrapped(*given: Any, workers: Workers | None, shard: tuple[int, int] | None, **params: Any) -> Any:
        each_line = params.pop("each_line", True)
        if (workers or shard) and not each_line:
            raise click.UsageError(f"--{'workers' if workers else 'shard'} needs many prompts; add {flag}")
        if shard and params.get("output") is None and not params.get("dry_run"):
            raise click.UsageError("--shard needs -o, the name of the file of all shards")
        return command(*given, many=Many(each_line, workers, shard), **params)

    for option in (
        click.option(
            "--shard",
            type=ShardType(),
            metavar="I/N",
            help="Only every N-th prompt, from number I of 0 to N-1; -o gets -I-of-N before its suffix (see merge).",
        ),
        click.option(
            "--workers",
            type=WorkersType(),
            metavar="N",
            help="Spread the prompts over N processes, or over a cluster: ray, ray:ADDRESS or dask:tcp://HOST:PORT. -t "
            "is then the threads of each.  [default for N: its share of the CPUs; in a cluster: 1]",
        ),
        *((click.option(flag, "each_line", is_flag=True, help=words),) if flag else ()),
    ):
        wrapped = option(wrapped)
    return wrapped


def _calibrating(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    """Return the prompts of a file, or the neutral ones."""
    if value is None or value == "neutral":
        return None if value is None else list(NEUTRAL)
    path = Path(value)
    if not path.is_file():
        nothing = f"there is no file {value[:200]}; give one with a prompt on each line, or neutral"
        raise click.BadParameter(nothing, ctx, param)
    found = texts.prompts(texts.read(path), path, "--calibrate")
    if len(found) < 2:
        raise click.BadParameter(f"{value[:200]} has one prompt; at least two are compared", ctx, param)
    return found


calibrate = click.option(
    "--calibrate",
    metavar="FILE",
    callback=_calibrating,
    help="Compare tokens of left vectors with the leading vectors of unrelated prompts, each a line of FILE; "
    f"neutral takes {len(NEUTRAL)} that come with ggjac.",
)
resume = click.option("--resume", is_flag=True, help="Resume the interrupted run that writes to this -o.")


def _names(*known: str) -> Callable[[click.Context, click.Parameter, str], tuple[str, ...]]:
    """Return a callback that turns `a,b` into a tuple of known names, in their own order."""

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
                type=Listed("layers"),
                default="all",
                show_default=True,
                help="Depths, as numbers of blocks applied: 0,10-20,-1. Negative ones count from the end.",
            ),
            click.option(
                "--maps",
                callback=_names(*MAPS),
                default=",".join(MAPS),
                show_default=True,
                help="Maps: from the input to a depth (cumulative), of one block (blockwise), from a depth to the "
                "output (to_end).",
            ),
            click.option(
                "--kinds",
                callback=_names(*KINDS),
                default=",".join(KINDS),
                show_default=True,
                help="Where the maps end: at the residual stream (layer), attention (attn) or MLP (mlp).",
            ),
            click.option(
                "--transport", is_flag=True, help="Also carry the left vectors of the layer maps on to the output."
            ),
        ]
    ):
        command = option(command)
    return command


rank = click.option(
    "-k", "--rank", type=click.IntRange(min=1), default=8, show_default=True, help="Number of singular vectors."
)


def spectrum_options(command: Callable) -> Callable:
    """Add the options of a singular value decomposition."""
    return rank(iteration_options(command))


search_dtype = click.option(
    "--search-dtype",
    type=click.Choice(SEARCHES),
    default="auto",
    show_default=True,
    help="Search the subspace in this dtype first, and finish in --dtype, whose values and residuals are given. auto: "
    "bfloat16 where that is faster, but for many prompts same. Where --dtype has 16 bits there is no such search.",
)


def _finite(ctx: click.Context, param: click.Parameter, value: float) -> float:
    """Refuse nan, and infinity where there is no upper bound: click's ranges accept them."""
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
                help="Relative residual that every singular vector must reach.",
            ),
            click.option(
                "--max-sweeps",
                type=click.IntRange(min=2),
                default=40,
                show_default=True,
                help="Maximum number of passes over the weights; up and down count as one each.",
            ),
            click.option(
                "-s",
                "--seed",
                type=click.IntRange(0, 2**63 - 1),
                default=0,
                help="Seed of the random start vectors.  [default: 0]",
            ),
        ]
    ):
        command = option(command)
    return command


def model_options(
    *,
    prompt: str = PROMPT_HELP,
    file: str = FILE_HELP,
    trace: bool = True,
    both: bool = False,
    exclude: bool = False,
) -> Callable:
    """Return a decorator that adds the options of `ModelOptions` and passes them on as one argument, `what`.

    Args:
        prompt, file: help of `--prompt` and `--file`, where a command's own differ.
        trace: False for a command that runs several prompts or models, and so keeps no forward pass.
        both: whether `--mlp-path` may be `both`: `both_rules` then is set, and `mlp_path` is `up`.
        exclude: whether there is `--exclude`.
    """
    rule = _BOTH_RULES if both else _MLP_PATH
    options = [*_MODEL, *_prompt_options(prompt, file), *_COMPUTE, rule]
    options += [_EXCLUDE] * exclude + [_TRACE] * trace

    def decorate(command: Callable) -> Callable:
        @wraps(command)
        def wrapped(**params: Any) -> Any:
            own = {field.name: params.pop(field.name, None) for field in fields(ModelOptions)}
            own["both_rules"] = own["mlp_path"] == "both"
            own["mlp_path"] = "up" if own["both_rules"] else own["mlp_path"]
            what = ModelOptions(**own)
            if not what.ways and texts.piped():
                what = replace(what, file=texts.STDIN)
            return command(what, **params)

        for option in reversed(options):
            wrapped = option(wrapped)
        return wrapped

    return decorate
