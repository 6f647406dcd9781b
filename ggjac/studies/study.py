"""The loop over prompts: what the file of JSON lines lacks is computed, here or by an executor, and appended."""

import contextlib
import os
import pickle
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, as_completed, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ggjac import planner, runs
from ggjac.analysis.ranks import Ranks
from ggjac.blocks import NumericsError
from ggjac.gguf import shown
from ggjac.jacobian import Progress
from ggjac.model import Model, PromptError
from ggjac.planner import Plan
from ggjac.results import NO_WORDS, Result, Table, Words
from ggjac.runs import lock
from ggjac.runs.lines import Lines, key, prompt_key
from ggjac.session import Session
from ggjac.studies.measures import KINDS, Measure, by_depth, by_index, check, measure, sweeps_of

# Times that a pool is made again after a worker's death, without a prompt finished in between.
RESTARTS = 3

Prompt = str | Sequence[int]
Pool = contextlib.AbstractContextManager[Executor]
Item = TypeVar("Item")


@dataclass(frozen=True, repr=False)
class Study(Result):
    """The records of many prompts.

    Attributes:
        records: one for each prompt, in the order given: plain data, as the lines of the file are.
        ready: how many of them were in the file already.
        envelope: of the session of the last prompt: where the results came from and how all were computed.
    """

    records: list[dict[str, Any]]
    ready: int
    envelope: dict[str, Any]

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return all records; of `svd` and `layers` also the distribution of each singular value over prompts."""
        over_prompts = {"by_index": list(by_index(self.records)), "by_depth": list(by_depth(self.records))}
        return {"prompts": self.records} | {name: rows for name, rows in over_prompts.items() if rows}

    def _table(self, words: Words) -> Table:
        prompts, tokens = [r["prompt"] or "" for r in self.records], [len(r["tokens"]) for r in self.records]
        return Table("Prompts", {"prompt": prompts, "tokens": tokens})


def study(
    prompts: Sequence[Prompt],
    measure: Measure,
    executor: Executor | Callable[[], Pool] | None = None,
    lines: str | os.PathLike[str] | None = None,
    *,
    shard: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    begun: Callable[[Plan], None] | None = None,
) -> Study:
    """Ask one question about every prompt, and keep each record in a file as soon as it is ready.

    The finished file has the same bits whatever computed it, on equal machines with equal threads: a line for each
    prompt, in the order given. A prompt is asked again only if its sweeps ran out and `max_sweeps` now allows more.

    Args:
        prompts: texts, or token ids; each is computed once.
        measure: from `ggjac.measure`.
        executor: of `concurrent.futures`, or one like it, whose workers can open the model's path; or a function that
            makes a context of one, which is made again when a worker dies; None computes in this process.
        lines: file of JSON lines that grows by a record for each prompt, and is continued if it is there.
        shard: `(i, n)` computes every n-th prompt, from number i of 0 to n-1; `ggjac.merge` puts the files together.
        progress: called as `progress("prompt", done, total)`.
        begun: called with the plan of the prompts that are to be computed, if there are any.

    Raises:
        PromptError: `prompts` is empty or no list, the shard has none of them, or the model cannot run one; where there
            are several, the message quotes it.
        RunError: the file holds something else, or records that were made otherwise; or workers died.
        JournalError: another process writes to the file.
        NoFitError: the longest prompt does not fit the budgets.
    """
    every = distinct(prompts)
    places = {name: {"index": i, "prompts": len(every)} for i, name in enumerate(every)}
    asked = dict(dealt(list(every.items()), shard, "prompt"))
    path, start = None if lines is None else Path(lines), time.perf_counter()
    with alone(path), keeping(path):
        measure = replace(measure, at_once=None if executor is None else 1)  # a worker takes one prompt at a time
        first, measure = opened(measure, list(asked.values()), list(every.values()), kept=path is not None)
        kept = Lines(path, measure.settings, fields=KINDS[measure.name].parts, whole=check)
        todo = {name: prompt for name, prompt in asked.items() if not _settled(kept.records.get(name), measure)}
        ready = done = len(asked) - len(todo)
        if todo:
            plan = check_plan(first, measure, len(todo), begun)
            measure = replace(measure, at_once=plan.work.at_once)
        del first
        if progress and ready:
            progress("prompt", ready, len(asked))
        single, left = len(every) == 1, list(todo.values())
        if executor is None:
            found = _in_step(left, measure, single=single)
        else:
            found = computed(left, measure, executor, single=single)
        with contextlib.closing(found):  # workers end if a record cannot be written
            for record in found:
                kept.add(record | {"study": places[key(record)]})
                done += 1
                if progress:
                    progress("prompt", done, len(asked))
        kept.arrange({name: {"study": places[name]} for name in asked})
    records = [kept.records[name] for name in asked]
    envelope = measure.opened(asked[next(reversed(asked))]).envelope()
    warnings = dict.fromkeys(warning for record in records for warning in record.get("warnings", ()))
    seconds = {measure.name: round(time.perf_counter() - start, 3)}
    return Study(records, ready, envelope | {"warnings": list(warnings), "seconds": seconds})


def ranks(
    model: Model,
    prompts: Sequence[Prompt],
    output: str | os.PathLike[str] | None = None,
    *,
    executor: Executor | Callable[[], Pool] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Ranks:
    """Measure the stable rank of every token's own map, and of the joint one, for each prompt at its last position.

    Args:
        model: from `open_model`.
        prompts: texts, or token ids.
        output: file of JSON lines that grows by a record for each prompt; see `study`, also for the errors.
        executor, progress: as `study` takes them.
        options: `tol`, `max_sweeps`, `seed` of the iterations for the largest singular values, as `ggjac.svd.svd` takes
            them; and those of `ggjac.Session`: `mlp_path`, budgets, `trace` (for a single prompt), ...
    """
    found = study(prompts, measure(model, "ranks", **options), executor, output, progress=progress)
    return Ranks(found.records, found.ready, found.envelope)


def shard_name(output: Path, shard: int, shards: int) -> Path:
    """Return the name of a shard's file, beside the file that all make up: `all-03-of-64.jsonl`, from 0."""
    width = max(2, len(str(shards - 1)))
    return output.with_name(f"{output.stem}-{shard:0{width}}-of-{shards}{output.suffix}")


# -- what is computed where --------------------------------------------------------------------------------------------


def computed(
    todo: list[Any], measure: Callable[[Any], Any], executor: Executor | Callable[[], Pool] | None, *, single: bool
) -> Generator[Any, None, None]:
    """Yield what is measured of each prompt as it is ready; a `single` one is not quoted in errors."""
    if executor is None:
        for prompt in todo:
            with quoting(prompt, single=single):
                record = measure(prompt)
            yield record
        return
    deaths, given = 0, isinstance(executor, Executor)
    while todo:
        with contextlib.nullcontext(executor) if isinstance(executor, Executor) else executor() as pool:
            left = dict(enumerate(todo))
            try:
                for number, record in _gathered(pool, left, measure, single=single, given=given):
                    del left[number]
                    deaths = 0
                    yield record
            except BrokenExecutor as error:
                deaths += 1
                if given or deaths > RESTARTS:
                    raise runs.RunError(f"a worker was ended ({_kind(error)}): {_AGAIN}") from error
        todo = list(left.values())


def _in_step(todo: list[Any], measure: Measure, *, single: bool) -> Generator[dict[str, Any], None, None]:
    """Yield the records of prompts, as many side by side as the measure says.

    Where one of them fails, they are computed one after another: the records before it are kept, and it is named.
    """
    at_once = measure.at_once or 1
    for start in range(0, len(todo), at_once):
        some, records = todo[start : start + at_once], list[dict[str, Any]]()
        if len(some) > 1:
            with contextlib.suppress(PromptError, NumericsError, MemoryError):
                records = [record for record, _ in measure.answers(some)]
        yield from records or computed(some, measure, None, single=single)


_AGAIN = "finished prompts are kept; run it again to continue, with fewer workers if memory was short"


def _gathered(
    pool: Executor, todo: Mapping[int, Any], measure: Callable[[Any], Any], *, single: bool, given: bool
) -> Iterator[tuple[int, Any]]:
    """Yield what an executor returns, each with the number of its prompt.

    After an error of a prompt nothing new is begun; what is being computed is still waited for, and yielded. After an
    interrupt the tasks of a pool that the caller has `given` are cancelled, as they would keep it busy.
    """
    futures: dict[Future, int] = {}
    try:
        for number, prompt in todo.items():
            futures[pool.submit(attempt, measure, prompt)] = number
        failed: Exception | None = None
        for future in as_completed(futures):
            failed = _failure(future, todo[futures[future]], single=single)
            if failed:
                break
            yield futures.pop(future), future.result()
        if failed is None:
            return
        busy = [future for future in futures if not future.cancel()]
        for future in wait(busy).done:
            if not _failure(future, "", single=True):
                yield futures[future], future.result()
        raise failed
    except BaseException:
        if given:  # to a pool of our own, cancelled tasks are a fault when its workers end
            for future in futures:
                future.cancel()
        raise


def attempt(measure: Callable[[Any], Any], prompt: Any) -> Any:
    """Return what is measured of a prompt, or the error, as a value: executors wrap what is raised, each in its way."""
    try:
        return measure(prompt)
    except Exception as error:
        if os.environ.get("GGJAC_DEBUG"):
            traceback.print_exc()
        try:
            return pickle.loads(pickle.dumps(error))  # of our own; some cannot be made again
        except Exception:
            return runs.RunError(f"{type(error).__name__}: {error}")


def _failure(future: Future, prompt: Any, *, single: bool) -> Exception | None:
    """Return what went wrong, if anything: the error of a prompt, or of the executor itself."""
    error = future.exception()
    if isinstance(error, BrokenExecutor):
        return error
    if error is not None:
        return runs.RunError(f"a worker failed ({_kind(error)}): {_AGAIN}")
    found = future.result()
    if not isinstance(found, Exception):
        return None
    try:
        with quoting(prompt, single=single):
            raise found
    except Exception as quoted:
        return quoted


def _kind(error: BaseException) -> str:
    """Return an error of an executor in a few words."""
    return f"{type(error).__name__}: {runs.one_line(error)}"


# -- prompts and their file --------------------------------------------------------------------------------------------


def distinct(prompts: Sequence[Prompt]) -> dict[str, Prompt]:
    """Return prompts by name, each once.

    Raises:
        PromptError: there are none, or it is no list.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):  # a text is a sequence too, of characters
        raise PromptError(f"prompts is of type {type(prompts).__name__}; give a list of texts")
    if not prompts:
        raise PromptError("no prompt was given")
    return {prompt_key(prompt): prompt for prompt in prompts}


def dealt(every: list[Item], shard: tuple[int, int], what: str) -> list[Item]:
    """Return the part of a shard; `what` names an item in messages.

    Raises:
        PromptError: it has none.
    """
    number, count = shard
    if not 0 <= number < min(count, len(every)):
        most = f"there are {len(every)}; take at most as many shards"
        raise PromptError(f"shard {number}/{count} has no {what}: {most}, counted from 0")
    return every[number::count]


def opened(
    measure: Measure, asked: Sequence[Prompt], every: Sequence[Prompt], *, kept: bool
) -> tuple[Session, Measure]:
    """Return the session of the first prompt that is asked, and the measure as it is for all of a study's prompts.

    Raises:
        PromptError: the model cannot run the first prompt, or one lacks a position that is asked for.
    """
    with quoting(asked[0], single=len(every) == 1):
        first = measure.opened(asked[0])
    return first, replace(measure, longest=_longest(first, measure, every), prompts=len(asked)).settled(kept=kept)


def check_plan(first: Session, measure: Measure, prompts: int, begun: Callable[[Plan], None] | None) -> Plan:
    """Make the plan of a number of prompts, call `begun` with it, and return it.

    Raises:
        NoFitError: the longest prompt does not fit the budgets.
    """
    plan = first.plan(measure.command, measure.longest, **measure.request() | {"prompts": prompts})
    planner.check(plan)
    if begun:
        begun(plan)
    return plan


def _settled(record: dict[str, Any] | None, measure: Measure) -> bool:
    """Return whether a prompt is done; where its sweeps ran out, a larger `max_sweeps` is another attempt."""
    if record is None:
        return False
    most = measure.options.get("max_sweeps", 0)
    return not any(part["stopped_by"] == "sweeps" and part["sweeps"] < most for part in sweeps_of(record))


def _longest(session: Session, measure: Measure, prompts: Sequence[Prompt]) -> int:
    """Return the tokens of the longest prompt, by which all are planned, so that shards are planned alike.

    One that cannot run is refused in its turn.

    Raises:
        PromptError: a prompt lacks a position that is asked for.
    """
    model, special, longest = session.model, session.parse_special, len(session.ids)
    for prompt in filter(None, prompts):
        n = len(model.tokenize(prompt, parse_special=special) if isinstance(prompt, str) else prompt)
        if 0 < n <= model.config.longest:
            longest = max(longest, n)
            with quoting(prompt, single=len(prompts) == 1):
                measure.place(model, n)
    return longest


class OnePromptError(PromptError):
    """The `reason` why one of several prompts, `prompt`, cannot run."""

    def __init__(self, prompt: Any, reason: str):
        super().__init__(prompt, reason)  # as pickle makes it again
        self.prompt, self.reason = prompt, reason

    def __str__(self) -> str:
        return f"{shown(str(self.prompt))}: {self.reason}"


@contextlib.contextmanager
def quoting(prompt: Any, *, single: bool) -> Iterator[None]:
    """Quote the prompt in an error about one of several."""
    try:
        yield
    except PromptError as error:
        if single:
            raise
        raise OnePromptError(prompt, str(error)) from error


@contextlib.contextmanager
def keeping(output: Path | None) -> Iterator[None]:
    """Add to an interrupt a note on what is kept."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if output and output.exists():
            interrupt.add_note(f"finished prompts are in {shown(output)}: the same command continues with the others")
        raise


def alone(output: Path | None) -> contextlib.AbstractContextManager[None]:
    """Keep other processes from reading and appending to the same file."""
    if output is None:
        return contextlib.nullcontext()
    runs.check_writable(output)
    return lock.alone(output)
