"""What commands say of one prompt, as functions of a session; and `Measure`, which any process can call."""

import hashlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ggjac import __version__, runs
from ggjac.analysis import attend as attending
from ggjac.analysis import attribute as attributing
from ggjac.analysis import branches, predict, svd
from ggjac.analysis import ranks as ranking
from ggjac.analysis import reads as reading
from ggjac.analysis.answer import attribute_answer
from ggjac.analysis.jacobian import dense
from ggjac.analysis.layers import layers as every_layer
from ggjac.analysis.per_token import per_token as each_token
from ggjac.analysis.per_token import tensors as token_tensors
from ggjac.analysis.reach import ablate as leave_out
from ggjac.checks import Place, canonical, computed, depths, place, plain
from ggjac.directions import Direction, located, own_depth, read_direction
from ggjac.gguf import shown
from ggjac.jacobian import Span, Tap
from ggjac.jacobian.targets import entropy_direction, fisher_direction
from ggjac.model import Model, open_model
from ggjac.prompts import token_groups
from ggjac.results import Result
from ggjac.session import Session
from ggjac.sizes import KINDS as TAPS
from ggjac.sizes import MAPS, TOKENS_AT_ONCE, Ablation, MapName, block_width
from ggjac.sizes import Kind as TapKind


class Answer(NamedTuple):
    """What a command says of one prompt: parts of its JSON by name, its results, and what `-o` saves."""

    content: dict[str, Any]
    results: list[Result]
    tensors: dict[str, Tensor]


# -- the questions -----------------------------------------------------------------------------------------------------


def answer_ranks(
    session: Session, *, tol: float = 1e-3, seed: int = 0, max_sweeps: int = 40, search_dtype: str = "same"
) -> Answer:
    """Measure the stable rank of every token's own map, and of the joint one; `search_dtype` as of `answer_svd`."""
    found = ranking.token_ranks(
        session.jacobian,
        at_once=TOKENS_AT_ONCE * block_width(1, len(session.ids) * session.model.config.d),
        tol=tol,
        seed=seed,
        max_sweeps=max_sweeps,
        search_dtype=session.search_dtype(search_dtype),
    )
    content = {
        "joint": found.joint.data(),
        "tokens": [
            token | {"stable_rank": rank.data()} for token, rank in zip(session.tokens(), found.tokens, strict=True)
        ],
        "next": predict.predict(session.trace, 1).data(session.words)[0],
        "reconstruction": session.reconstruction().data(),
        "residual": found.residual,
        "method": found.method,
        "sweeps": found.sweeps,
        "rough_sweeps": found.rough_sweeps,
        "stopped_by": found.stopped_by,
    }
    return Answer(content, [found], {})


def answer_svd(
    session: Session,
    *,
    rank: int = 8,
    top: int = 8,
    hide_special: bool = False,
    tol: float = 1e-3,
    seed: int = 0,
    max_sweeps: int = 40,
    per_token: bool = False,
    input_position: str | Sequence[int] | None = None,
    calibrate: Sequence[str] | None = None,
    search_dtype: str = "same",
) -> Answer:
    """Compute the leading singular vectors, and those of each position's own map, or of some positions'.

    Tokens of left vectors are compared with those of the prompts to `calibrate` with, if any. `search_dtype` is as
    `Session.search_dtype` takes it; `"auto"` depends on the machine.
    """
    options: dict[str, Any] = {"rank": rank, "top": top, "hide_special": hide_special}
    options |= {"tol": tol, "seed": seed, "max_sweeps": max_sweeps}
    options["search_dtype"] = session.search_dtype(search_dtype)
    # Before the session's own trace: one at a time.
    own = {name: value for name, value in options.items() if name != "top"}
    calibration = session.calibration(calibrate, **own) if calibrate else None
    # First, since the joint map takes the matrix that this may leave.
    each = session.run("svd per token", each_token, positions=input_position, **options) if per_token else None
    result = session.run("svd", svd.spectrum, calibration=calibration, **options)
    content = {"reconstruction": session.reconstruction().data(), "svd": result.data(session.words)}
    results: list[Result] = [result]
    tensors = result.tensors()
    if each is not None:
        results.append(each)
        content["svd"]["per_token"] = [one.data(session.words) for one in each]
        tensors |= token_tensors(each)
    return Answer(content, results, tensors)


def answer_layers(
    session: Session,
    *,
    rank: int = 8,
    layers: str | Sequence[int] = "all",
    maps: Sequence[MapName] = MAPS,
    kinds: Sequence[TapKind] = TAPS,
    transport: bool = False,
    top: int = 8,
    hide_special: bool = False,
    tol: float = 1e-3,
    seed: int = 0,
    max_sweeps: int = 40,
    search_dtype: str = "same",
) -> Answer:
    """Decompose the maps of depths, `layers`, which are given as `ggjac.checks.depths` takes them."""
    content: dict[str, Any] = {"reconstruction": session.reconstruction().data()}
    options: dict[str, Any] = {"maps": maps, "kinds": kinds, "transport": transport, "top": top, "tol": tol}
    options |= {"hide_special": hide_special, "seed": seed, "max_sweeps": max_sweeps}
    options["depths"] = depths(layers, session.model.config.block_count)
    options["search_dtype"] = session.search_dtype(search_dtype)
    result = session.run("layers", every_layer, rank, **options)
    return Answer(content | {"layers": result.data(session.words)}, [result], result.tensors())


def answer_attribute(
    session: Session,
    *,
    target: int | None = None,
    versus: int | None = None,
    by: Literal["token", "layer", "head"] = "token",
    positions: str | Sequence[int] | None = None,
    ablate: Ablation | None = None,
    reads: Sequence[tuple[int, int]] | Literal["largest"] | None = None,
) -> Answer:
    """Split a logit into shares; or those of several positions, named as `attribute_positions` takes them.

    With `reads`, heads by block and number or the largest, split these by what they read as well.

    With `ablate`, leave out each token as well, and measure what that does; see `measured`.
    """
    content: dict[str, Any] = {"reconstruction": session.reconstruction().data()}
    result: Any
    if by != "token":
        split = branches.attribute_branches
        result = session.run("attribution", split, target, versus, positions=positions, by_head=by == "head")
    elif positions is None:
        result = session.run("attribution", attributing.attribute, target, versus)
        result = measured(session, result, ablate) if ablate else result
    else:
        result = session.run("attribution", attributing.attribute_positions, target, versus, positions=positions)
    found = result.data(session.words)
    if positions is not None:
        content["position"] = "all" if positions == "all" else result.positions
        found = {"positions": found}
    elif by != "token":
        (found,) = found
    content["attribution"] = {"by": by} | found
    if reads is None:
        return Answer(content, [result], result.tensors())
    heads = reading.largest_heads(session.model.config, result.heads[0]) if reads == "largest" else reads
    read = session.run("what heads read", reading.attribute_reads, heads, int(result.targets[0]), versus)
    content["reads"] = read.data(session.words)
    return Answer(content, [result, read], result.tensors() | read.tensors())


def measured(session: Session, shares: attributing.Attribution, by: Ablation) -> attributing.Attribution:
    """Return the shares of tokens beside the measured effects of leaving each out."""
    effects = session.run("effects", leave_out, session.model, by, shares.target, shares.versus)
    return replace(shares, effects=effects.beside({"share": shares.shares}))


def answer_projection(
    session: Session,
    *,
    along: str,
    at: Place | None = None,
    layer: int | None = None,
    by: Literal["token", "layer", "head"] = "token",
) -> Answer:
    """Split the projection of a vector of the network on a direction; arguments and errors as of `projected`."""
    content: dict[str, Any] = {"reconstruction": session.reconstruction().data()}
    result = projected(session, along=along, at=at, layer=layer, by=by)
    found = result.data(session.words)
    content["attribution"] = {"by": by} | (found if by == "token" else found[0])
    return Answer(content, [result], result.tensors())


def projected(
    session: Session,
    *,
    along: str,
    at: Place | None = None,
    layer: int | None = None,
    by: Literal["token", "layer", "head"] = "token",
) -> Any:
    """Return the shares in a projection on a direction, which is computed or in a file.

    Args:
        session: one prompt on one model.
        along: `"entropy"`, `"fisher:K"`, or as `ggjac.read_direction` takes it.
        at, layer: what is projected, as `ggjac.checks.place` takes it; default where a control vector is added.
        by: parts.

    Raises:
        DirectionError: the direction cannot be read, or does not fit.
        ValueError: there is no such place, or it has no such parts.
    """
    index, config = computed(along), session.model.config
    if index is None:
        one = read_along(session.model, along, at, layer)
        layer = one.layer if layer is None and at is None else layer
    kind, depth = place(along, at, layer, config.block_count)
    jacobian = session.jacobian
    if kind != "output":
        jacobian = session.trace.jacobian(
            session.position, Span(0, Tap(kind, depth)), raw=True, exclude=session.excluded
        )
    if index is not None:
        with session.stages.stage("direction"):
            one = fisher_direction(jacobian, index) if index else entropy_direction(jacobian)
    with session.stages.stage("attribution") as report:
        if by == "token":
            return attributing.attribute(jacobian, direction=one, progress=report)
        return branches.attribute_branches(jacobian, direction=one, by_head=by == "head", progress=report)


def read_along(model: Model, along: str, at: Place | None = None, layer: int | None = None) -> Direction:
    """Read the direction of a projection from its file; arguments and errors as of `projected`."""
    config = model.config
    widths = {config.d} | ({config.width(i + 1) for i in range(config.block_count)} if at in (None, "layer") else set())
    return read_direction(along, sorted(widths), layer=layer)


def answer_answer(
    session: Session,
    *,
    max_tokens: int | None = None,
    answer: Sequence[int] | None = None,
    versus: int | None = None,
    by: Literal["token", "layer", "head"] = "token",
) -> Answer:
    """Split the logits of all tokens of an answer, which the model writes, or which is given in token ids."""
    session.answered(answer, max_tokens)
    content: dict[str, Any] = {"reconstruction": session.reconstruction().data()}
    groups = token_groups(session.model, session.ids, session.answer_start, session.said)
    found = session.run("attribution", attribute_answer, session.answer_start, versus, by=by, groups=groups)
    content |= {"position": found.split.positions, "answer": found.data(session.words)}
    if by != "token":
        content["attribution"] = {"by": by, "positions": found.split.data(session.words)}
    return Answer(content, [found], found.tensors())


def answer_attend(
    session: Session,
    *,
    layer: int | None = None,
    head: int | None = None,
    keys: str | Sequence[int] | None = None,
    versus: int | None = None,
    parts: attending.By = "block",
) -> Answer:
    """Split the scores of a head's keys; by default of the head with the largest share in the likeliest token's logit.

    Raises:
        ValueError: as of `attend`, or no head of the model, or of the block, has a pattern.
    """
    content: dict[str, Any] = {"reconstruction": session.reconstruction().data()}
    if layer is None or head is None:
        shares = session.run("attribution", branches.attribute_branches, by_head=True)
        layer, head = attending.loudest(session.model.config, shares, layer, head)
    result = session.run("scores", attending.attend, layer, head, keys=keys, versus=versus, by=parts)
    return Answer(content | {"attend": result.data(session.words)}, [result], result.tensors())


def answer_predict(session: Session, *, top: int = 5) -> Answer:
    """Find the most likely next tokens."""
    result = predict.predict(session.trace, top, position=session.position)
    return Answer({"predictions": result.data(session.words)}, [result], {})


def answer_jacobian(session: Session, *, mean: bool = False) -> Answer:
    """Compute the dense Jacobian, and the size of each position's part; for a `mean`, keep the output position's."""
    d = session.model.config.d
    own = torch.empty(d, d, dtype=torch.promote_types(session.model.dtype, torch.float32)) if mean else None

    def keep(start: int, rows: Tensor) -> None:
        if own is not None:
            own[start : start + len(rows)] = rows[:, session.position].cpu()

    result = session.run("jacobian", dense, keep)
    return Answer({"jacobian": result.data(session.words)}, [result], {} if own is None else {"own": own})


def answer_verify(session: Session, *, strict: bool = False) -> Answer:
    """Compare with llama.cpp."""
    result = session.verify(strict=strict)
    return Answer({"parity": result.data(session.words)}, [result], {})


class Kind(NamedTuple):
    """A command that can be asked of many prompts.

    Attributes:
        answer: its function, of a session and options.
        parts: keys of its records, in addition to those of every record.
        tapes: whether it needs the detached Jacobian.
        positions: whether it has an output position.
        command: that has its plan, where it has another name.
    """

    answer: Callable[..., Answer]
    parts: tuple[str, ...]
    tapes: bool = True
    positions: bool = True
    command: str = ""


KINDS = {
    "ranks": Kind(
        answer_ranks, ("joint", "next", "reconstruction", "residual", "sweeps", "stopped_by"), positions=False
    ),
    "svd": Kind(answer_svd, ("reconstruction", "svd")),
    "layers": Kind(answer_layers, ("reconstruction", "layers")),
    "attribute": Kind(answer_attribute, ("reconstruction", "attribution")),
    "projection": Kind(answer_projection, ("reconstruction", "attribution"), command="attribute"),
    "answer": Kind(answer_answer, ("reconstruction", "answer"), positions=False, command="attribute"),
    "jacobian": Kind(answer_jacobian, ("jacobian",)),
    "predict": Kind(answer_predict, ("predictions",), tapes=False),
    "verify": Kind(answer_verify, ("parity",), tapes=False, positions=False),
}

# Options of `Session`; a measure's others are those of its command.
_SESSION = (
    *("position", "parse_special", "mlp_path", "exclude", "trace", "ram_budget", "vram_budget", "threads", "said"),
    *("stages", "command"),
)
# Of these, what only the process has that made the measure.
_HERE = ("trace", "stages", "command")
# Options that are fields of `ggjac.planner.work.Request` by the same name.
_PLANNED = (
    *("rank", "per_token", "input_position", "by", "positions", "mean", "search_dtype", "max_tokens", "answer"),
    *("layers", "maps", "kinds", "transport", "along", "at", "layer", "ablate"),
)


def sweeps_of(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the parts of a record that iterations made: each with the number of its sweeps, and what stopped them."""
    svd, layers = record.get("svd", {}), record.get("layers", {})
    parts = (record, svd, *svd.get("per_token", ()), *layers.get("taps", ()))
    return [part for part in parts if "stopped_by" in part]


def singular_values(record: Mapping[str, Any]) -> list[float]:
    """Return the singular values of a record of `svd`, the largest first; of others none."""
    return [triplet["singular_value"] for triplet in record.get("svd", {}).get("triplets", ())]


def by_index(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the distribution over prompts of each singular value, as `ggjac.ranks` has it of stable ranks."""
    for j, values in enumerate(zip(*map(singular_values, records), strict=False)):
        yield {"index": j} | ranking.distribution(values)


def by_depth(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield for each map of `layers` the distributions over prompts of its stable rank and of its singular values."""
    for taps in zip(*(record.get("layers", {}).get("taps", ()) for record in records), strict=False):
        values = zip(*([triplet["singular_value"] for triplet in tap["triplets"]] for tap in taps), strict=False)
        yield {name: taps[0][name] for name in ("map", "kind", "index", "block") if name in taps[0]} | {
            "stable_rank": ranking.distribution([tap["stable_rank"]["value"] for tap in taps]),
            "singular_values": [ranking.distribution(each) for each in values],
        }


def check(record: dict[str, Any]) -> None:
    """Read what is needed of a record; KeyError, TypeError and the like refuse it."""
    for part in sweeps_of(record):
        _ = part["stopped_by"], int(part["sweeps"])
    _ = bool(record.get("reconstruction", {"healthy": True})["healthy"])
    _ = sum(singular_values(record)), list(by_depth([record]))
    if "joint" in record:
        ranking.token_values(record)


# -- a question that travels -------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """How another process opens the model."""

    path: str
    fingerprint: str
    asked: str | None
    device: str
    dtype: str
    threads: int
    context: int | None


_ALONE = threading.Lock()  # threads of a process share its model, one prompt at a time


@lru_cache(maxsize=1)
def _opened(source: Source) -> Model:
    """Open a model for all prompts that come to this process."""
    how: dict[str, Any] = {"device": source.device, "dtype": source.dtype, "threads": source.threads}
    model = open_model(source.path, asked=source.asked, context=source.context, **how)
    if model.gguf.fingerprint() != source.fingerprint:
        raise runs.RunError(f"{source.path}: on a worker this is another file; copy the same one to all machines")
    return model


@dataclass(frozen=True)
class Measure:
    """A command's question, to be called with a prompt; made by `measure`.

    It is pickled as plain data: another process opens the file by its path, once for all prompts.

    Attributes:
        model: an open one, or how to open it.
        name: of the command.
        options: all of the command's own.
        session: options of `ggjac.Session`.
        settings: what decides a record apart from its prompt, named as the options are.
        longest: tokens of the longest prompt of a study, by which all are planned; 0 plans each by its own.
        prompts: number of prompts of the study.
        at_once: how many of them are computed side by side, by which memory is planned; None leaves it to the plan.
    """

    model: Model | Source
    name: str
    options: Mapping[str, Any]
    session: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)  # of `settled`
    longest: int = 0
    prompts: int = 1
    at_once: int | None = None

    def __call__(self, prompt: str | Sequence[int]) -> dict[str, Any]:
        """Return the record of a prompt, a text or token ids, as plain data; errors as of `answer`."""
        return self.answer(prompt)[0]

    def answer(self, prompt: str | Sequence[int]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the record of a prompt, and the tensors that a command saves.

        Raises:
            PromptError: the model cannot run it.
            NoFitError: it does not fit the budgets.
            ChangedError: another program has changed the model file.
        """
        return self.answers([prompt])[0]

    def answers(self, prompts: Sequence[str | Sequence[int]]) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
        """Return what `answer` does of each of some prompts, with the same bits, in step: see `Model.in_step`."""
        with _ALONE:
            sessions = [self.opened(prompt) for prompt in prompts]
            model, longest = sessions[0].model, self.longest or max(len(session.ids) for session in sessions)
            sessions[0].fit(self.command, longest, **self.request())
            asked = [partial(KINDS[self.name].answer, session, **self.options) for session in sessions]
            answers = model.in_step(asked) if len(asked) > 1 else [asked[0]()]
            model.gguf.check_unchanged()
        return [self._recorded(session, answer) for session, answer in zip(sessions, answers, strict=True)]

    def _recorded(self, session: Session, answer: Answer) -> tuple[dict[str, Any], dict[str, Tensor]]:
        record = runs.finite(
            {"schema_version": runs.SCHEMA_VERSION, "prompt": session.text, "tokens": session.tokens()}
            | answer.content
            | {
                "warnings": session.warnings,
                "settings": dict(self.settings),
                "ggjac": __version__,
                "machine": session.machine | {"cpu": torch.backends.cpu.get_cpu_capability()},
            }
        )
        return record, answer.tensors

    def __getstate__(self) -> dict[str, Any]:
        session = {name: value for name, value in self.session.items() if name not in _HERE}
        return self.__dict__ | {"model": self._source(), "session": session}

    @property
    def command(self) -> str:
        """The command that has the plan."""
        return KINDS[self.name].command or self.name

    def _open(self) -> Model:
        return _opened(self.model) if isinstance(self.model, Source) else self.model

    def _source(self) -> Source:
        model = self.model
        if isinstance(model, Source):
            return model
        dtype = str(model.dtype).removeprefix("torch.")
        how = model.asked, str(model.device), dtype, model.weights.threads, model.context
        return Source(str(Path(model.path).absolute()), model.gguf.fingerprint(), *how)

    def opened(self, prompt: str | Sequence[int]) -> Session:
        """Return the session of a prompt; the model is open already, or opened now. Of several outputs, at the last."""
        session = Session(self._open(), prompt, tapes=KINDS[self.name].tapes, **self.session)
        session.position = self.place(session.model, len(session.ids))
        return session

    def place(self, model: Model, n: int) -> int:
        """Return the output position in a prompt of `n` tokens, from 0; of several, the last.

        Raises:
            PromptError: the prompt lacks a position that is asked for.
        """
        if (positions := self.options.get("positions")) is None:
            place = model.check_position(self.session.get("position", -1), n)
        else:
            place = model.check_positions(positions, n)[-1]
        model.check_inputs(place + 1, self.session.get("exclude"), self.options.get("input_position"))
        return place

    def request(self) -> dict[str, Any]:
        """Return what decides the plan, the same for all prompts, so that layers stay ready."""
        own = {"rank": 1} | {name: self.options[name] for name in _PLANNED if name in self.options}
        own |= {"exclude": self.session.get("exclude")}
        if own.get("along") is not None and own["layer"] is own["at"] is None:
            own["layer"] = own_depth(own["along"])
        own |= {"position": self.session.get("position", -1)}
        return own | {"prompts": self.prompts, "at_once": self.at_once}

    def settled(self, *, kept: bool) -> "Measure":
        """Return the measure with its settings; for records that are `kept`, a hash of the whole model."""
        model = self._open()
        file = model.gguf
        sampled = file.fingerprint_is_whole or not kept
        several = self.options.get("positions")
        place = {"position": self.session.get("position", -1) if several is None else canonical(several)}
        own = {name: value for name, value in self.options.items() if name not in ("max_sweeps", "positions")}
        own |= {"exclude": self.session.get("exclude")}
        listed = ("input_position", "exclude", "layers")
        own |= {name: canonical(own[name]) for name in listed if own.get(name) is not None}
        if computed(own.get("along") or "entropy") is None:  # the vector decides, not its file's name
            vector = read_along(model, own["along"], own["at"], own["layer"]).vector
            own["along"] = f"sha256:{hashlib.sha256(vector.numpy().tobytes()).hexdigest()}"
        if own.get("search_dtype") == "same":
            own["search_dtype"] = None  # as in files of before
        settings = {
            "model": file.fingerprint() if sampled else f"sha256:{'+'.join(file.sha256())}",
            "dtype": str(model.dtype).removeprefix("torch."),
            "mlp_path": self.session.get("mlp_path", "up"),
            "no_parse_special": not self.session.get("parse_special", True) or None,  # None as in files of before
            "context": model.context,
            **(place if KINDS[self.name].positions else {}),
            **own,
        }
        return replace(self, settings={name.replace("_", "-"): value for name, value in settings.items()})


def measure(model: Model, name: str, **options: Any) -> Measure:
    """Return a command's question, to be called with a prompt, in this process or in another one.

    Args:
        model: from `open_model`; other processes open the same path, with the same threads, dtype and device.
        name: `"ranks"`, `"svd"`, `"layers"`, `"attribute"`, `"answer"` (`attribute` of a whole one: `max_tokens`, or
            `answer` in token ids), `"projection"` (`attribute`, `along` a direction), `"jacobian"`, `"predict"` or
            `"verify"`.
        options: of the command, as `rank`, `tol` or `target` (a token id); and of `ggjac.Session`: `position`,
            `mlp_path`, budgets.

    Raises:
        ValueError: there is no such question.
        TypeError: it has no such option.
        DirectionError: the file of a direction cannot be read, or its vector does not fit.
    """
    if name not in KINDS:
        raise ValueError(f"name={shown(name)!r} is unknown; known: {', '.join(KINDS)}")
    session = {key: options.pop(key) for key in _SESSION if key in options}
    session |= {"exclude": plain(session["exclude"])} if "exclude" in session else {}
    bound = inspect.signature(KINDS[name].answer).bind(None, **options)
    bound.apply_defaults()
    own = {key: plain(value) for key, value in bound.arguments.items() if key != "session"}
    if computed(own.get("along") or "entropy") is None:
        own["along"] = located(own["along"])  # workers may run in another folder
    return Measure(model, name, own, session).settled(kept=False)
