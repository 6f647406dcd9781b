"""One prompt on one model: traced once, with where its tapes are kept, its checkpoint, identity and provenance.

A session is what `ggjac.analyze` and the commands have in common. It computes nothing until something is asked of it:
the trace and the Jacobian are made when first needed, and shared by all analyses.
"""

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ggjac import __version__, parity, planner, runs
from ggjac.calibration import Calibration, calibrate
from ggjac.checks import whole
from ggjac.display import visible
from ggjac.generation import generate
from ggjac.gguf import ChangedError, shown
from ggjac.jacobian import DetachedJacobian, Progress
from ggjac.jacobian.reconstruction import Reconstruction, reconstruction
from ggjac.jacobian.tapes import TapeError, Tapes
from ggjac.model import Model, PromptError, Trace
from ggjac.planner import bench, machine
from ggjac.prompts import boundary_remark, position_remark, remarks
from ggjac.results import Words
from ggjac.runs.journal import Journal, JournalError
from ggjac.sizes import SEARCHES, MlpPath

# Between checkpoints, at least.
CHECKPOINT_SECONDS = 30.0

Found = TypeVar("Found")


class Stages:
    """The stages of the work, one after another, and how long each took; the command line shows them as they go.

    Attributes:
        seconds: of each stage.
        work: if set, returns the bytes read and the floating-point operations so far.
    """

    def __init__(self, progress: Progress | None = None):
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.work: Callable[[], tuple[int, int]] | None = None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Yield the function to report to inside this stage, and time it."""
        start = time.perf_counter()
        try:
            with self.reporting(name, start) as report:
                yield report
        finally:
            self.seconds[name] = round(time.perf_counter() - start, 3)

    @contextlib.contextmanager
    def reporting(self, name: str, start: float) -> Iterator[Progress]:
        """Yield the function to report to; `start` is the time at which the stage began."""
        yield self.progress or (lambda what, done, total, rounds=0: None)


class Session:
    """A model and a prompt, checked before any work starts.

    Args:
        model: from `ggjac.open_model`.
        prompt: text, or token ids.
        position: of the output; negative counts from the end.
        parse_special: `<s>` and the like in a text are the tokens that they name.
        mlp_path: freezing rule of gated feed-forwards, `"up"` or `"gate"`.
        exclude: input positions that are folded into the offset, as `Trace.jacobian` takes them.
        trace: folder in which the forward pass is kept, and used again if it is there.
        tapes: False keeps nothing of the forward pass but outputs and logits.
        ram_budget, vram_budget: bytes, or as `"2GiB"`; default half of the memory that is free, and all of the
            device's that is.
        threads: of plans and of llama.cpp; default all.
        said: of a prompt that a chat template rendered, what each role says, by its name.
        stages: where progress is reported to.
        command: the command line that is recorded with results.

    Attributes:
        ids: the `n` token ids; of the prompt, and after it of its answer, if it has one.
        answer_start: where the answer begins, from 0: the number of the prompt's own tokens.
        text: the prompt's text; None where token ids were given.
        position: of the output, from 0.
        notes: remarks on the prompt, to which a caller may add.
        journal: of the checkpoint, inside `checkpointed`.
        planned: the plan that `fit` made; None before.

    Raises:
        PromptError: the model cannot run the prompt, or has no such position; or no input is left.
        SizeError: a budget is not an amount of memory.
        TokenizerError: the file has no tokenizer, or llama-cpp-python is not installed.
    """

    def __init__(
        self,
        model: Model,
        prompt: str | Sequence[int],
        *,
        position: int = -1,
        parse_special: bool = True,
        mlp_path: MlpPath = "up",
        exclude: str | Sequence[int] | None = None,
        trace: str | os.PathLike[str] | None = None,
        tapes: bool = True,
        ram_budget: int | str | None = None,
        vram_budget: int | str | None = None,
        threads: int | None = None,
        said: Mapping[str, str] | None = None,
        stages: Stages | None = None,
        command: Sequence[str] = (),
    ):
        self.model, self.mlp_path, self.keeps_tapes = model, mlp_path, tapes
        self.text = prompt if isinstance(prompt, str) else None
        self.parse_special = parse_special
        self.ids = model.prompt_ids(prompt, parse_special=parse_special)
        self.answer_start, self.said = len(self.ids), said
        self.position = model.check_position(position, len(self.ids))
        self._exclude = exclude
        _ = self.excluded
        self.trace_folder = None if trace is None else Path(trace)
        self.ram_budget, self.vram_budget = ram_budget, vram_budget
        self.threads, self.stages, self.command = threads, stages or Stages(), list(command)
        self.notes = remarks(model, self.ids, self.text)
        self.journal: Journal | None = None
        self.planned: planner.Plan | None = None
        self._resident = True

    @property
    def warnings(self) -> list[str]:
        """Remarks of a line each on the prompt and the output position: what may not be as it was meant."""
        here = position_remark(self.model, self.ids, self.position)
        return self.notes + ([here] if here else [])

    @property
    def excluded(self) -> list[int]:
        """Input positions that are folded into the offset, ascending.

        Raises:
            PromptError: the output position depends on no others, or not on all of these.
        """
        return self.model.check_inputs(self.position + 1, self._exclude)[0]

    def answered(self, answer: Sequence[int] | None = None, max_tokens: int | None = None) -> None:
        """Append an answer to the prompt, before it is traced: the one given, or `max_tokens` that the model writes.

        The output position becomes that of the logit of the answer's last token. Positions to exclude are the prompt's.

        Raises:
            PromptError: the answer has no tokens, or ids outside the vocabulary, or outgrows the context.
            ValueError: the prompt has been traced without it.
        """
        if self._made("trace") is not None:
            raise ValueError("the prompt has been traced without its answer; make another session")
        if answer is None:
            with self.stages.stage("generate") as report:
                step = partial(report, "token")
                found = generate(self.model, self.ids, whole("max_tokens", max_tokens), progress=step)
        elif not answer:
            raise PromptError("the answer has no tokens; give a text or token ids")
        else:
            together, longest = len(self.ids) + len(answer), self.model.config.longest
            if together > longest:
                raise PromptError(
                    f"prompt and answer have {together} tokens, this model takes at most {longest}; shorten one of them"
                )
            found = self.model.check_prompt(answer)
            if self.text is not None:
                how = {"parse_special": self.parse_special}
                remark = boundary_remark(self.model, self.ids, self.text, found, **how)
                self.notes += [remark] if remark else []
        self._exclude = self.excluded or None  # negative ones counted from the end of the prompt
        self.ids = self.ids + found
        self.position = len(self.ids) - 2

    # -- plan ----------------------------------------------------------------------------------------------------------

    def fit(self, command: str, n: int | None = None, **request: Any) -> planner.Plan:
        """Refuse work that its budget cannot hold, before it starts, and keep ready what the budget has room for.

        Arguments and result as those of `plan`.

        Raises:
            NoFitError: with what is needed, and what to lower.
            PlanError: as `plan`.
        """
        plan = self.planned = self.plan(command, n, **request)
        self.model.fit(plan)
        self._resident = not plan.tapes_on_disk
        return plan

    def plan(self, command: str, n: int | None = None, **request: Any) -> planner.Plan:
        """Return the plan of a command on this prompt.

        Args:
            command: one of `ggjac.planner.work.JOBS`.
            n: number of tokens of the trace; default the prompt's.
            request: what else decides the work, as `ggjac.planner.work.Request` has it: `rank`, `layers` and so on.

        Raises:
            PlanError: no such command, or something is out of range.
            SizeError: a budget is not an amount of memory.
        """
        return self.model.plan(
            n or len(self.ids),
            command,
            mlp_path=self.mlp_path,
            ram_budget=self.ram_budget,
            vram_budget=self.vram_budget,
            tapes_on_disk=self.trace_folder is not None,
            threads=self.threads or machine.cpus(),  # as a plan without the model, which `ggjac plan` makes
            **{"position": self.position, "exclude": self._exclude} | request,
        )

    # -- what is computed ----------------------------------------------------------------------------------------------

    @property
    def words(self) -> Words:
        """Texts of tokens, as `Result.data` takes them."""
        return Words(self)

    @property
    def dtype(self) -> str:
        """Name of the dtype of all computation."""
        return str(self.model.dtype).removeprefix("torch.")

    @cached_property
    def trace(self) -> Trace:
        """The forward pass; run when first needed."""
        try:
            with self.stages.stage("trace") as report:
                return self.model.trace(
                    self.ids,
                    mlp_path=self.mlp_path,
                    tapes=self._tapes,
                    progress=lambda done, total: report("block", done, total),
                )
        except (KeyboardInterrupt, MemoryError) as error:
            self._note_tapes(error)
            raise

    @property
    def logits(self) -> Tensor:
        """The logits at the chosen position, `[v]`."""
        return self.trace.logits_at(self.position)

    @cached_property
    def jacobian(self) -> DetachedJacobian:
        """The detached Jacobian at the chosen position; its products are remembered in the journal, if there is one."""
        return self.trace.jacobian(self.position, exclude=self.excluded, journal=self.journal)

    def run(self, stage: str, analysis: Callable[..., Found], *given: Any, **options: Any) -> Found:
        """Return the result of an analysis of the Jacobian, reported as a stage; a trace that it needs comes before."""
        jacobian = self.jacobian
        with self.stages.stage(stage) as report:
            return analysis(jacobian, *given, progress=report, **options)

    def search_dtype(self, asked: str) -> torch.dtype | None:
        """Return the dtype in which decompositions are to search first; None for no such search.

        `"auto"` is bfloat16 where that is faster on this device, which takes half a second to measure, and only in
        float32, and where the maps are large; a resumed run does not measure again. The others: `SEARCHES`.
        """
        if asked not in SEARCHES:
            raise ValueError(f"search_dtype {asked!r} is unknown; known: {', '.join(SEARCHES)}")
        if asked == "auto":
            fast = self.planned and self.planned.may_search and self.remember("search dtype", self._is_faster)
            asked = "bfloat16" if fast else "same"
        return None if asked == "same" or self.model.dtype.itemsize < 4 else torch.bfloat16

    def _is_faster(self) -> bool:
        """Return whether the products of the planned searches are clearly faster in bfloat16 than in float32."""
        assert self.planned is not None
        how: dict[str, Any] = {"threads": torch.get_num_threads(), "device": str(self.model.device)}
        return bench.search_gain(self.planned, self.model.gguf, **how) >= bench.CLEARLY_FASTER

    def calibration(self, prompts: Sequence[str | Sequence[int]], rank: int, **options: Any) -> Calibration:
        """Return the leading left vectors of unrelated prompts, at their last positions, as this session's maps are.

        One prompt's trace is kept at a time. `options` are those of `ggjac.calibrate`. Before the session's own trace
        is made, this takes no more memory than that.

        Raises:
            PromptError: the model cannot run one of them, or it lacks the positions to exclude; the message quotes it.
            ValueError: there are fewer than two.
        """
        with self.stages.stage("calibration") as report:

            def maps() -> Iterator[DetachedJacobian]:
                for prompt in prompts:
                    ids = self.calibrating(prompt)
                    step = partial(report, "forward pass, block")
                    trace = self.model.trace(ids, mlp_path=self.mlp_path, progress=step)
                    yield trace.jacobian(exclude=self._exclude, journal=self.journal)
                    del trace

            return calibrate(maps(), rank, progress=report, **options)

    def calibrating(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the token ids of a prompt to calibrate with.

        Raises:
            PromptError: as of `calibration`.
        """
        try:
            ids = self.model.prompt_ids(prompt, parse_special=self.parse_special)
            self.model.check_inputs(len(ids), self._exclude)
        except PromptError as error:
            raise PromptError(f"prompt to calibrate with, {shown(str(prompt))}: {error}") from error
        return ids

    def reconstruction(self) -> Reconstruction:
        """Push the prompt's own embeddings through the frozen map and compare with the forward pass."""
        return self.run("reconstruction", reconstruction)

    def verify(self, *, strict: bool = False, layers: bool = True) -> parity.Parity:
        """Compare with llama.cpp on the same tokens; with `layers`, every layer of a trace of its own.

        Raises:
            ParityError: llama.cpp cannot be asked; the message says what to do.
        """
        # A trace chooses LongRoPE's factors by its prompt, llama.cpp by its context: `parity.verify` makes its own.
        trace = None if layers or "rope_factors_long.weight" in self.model.weights else self.trace
        with self.stages.stage("verify") as report:
            steps = iter(range(1, 10))
            found = parity.verify(
                self.model,
                self.ids,
                strict=strict,
                prompt=self.text,
                parse_special=self.parse_special,
                trace=trace,
                threads=self.threads,
                progress=lambda step: report(step, next(steps), 5),
            )
        self.model.gguf.check_unchanged()  # llama.cpp has opened it by its name
        return found

    def work(self) -> tuple[int, int]:
        """Return the bytes read and the floating-point operations of sweeps so far."""
        jacobian = self._made("jacobian")
        return self.model.weights.bytes_read, jacobian.flop if jacobian else 0

    def _made(self, name: str) -> Any:
        """Return a cached property if it has been computed; None otherwise."""
        return self.__dict__.get(name)

    # -- tapes and checkpoints -----------------------------------------------------------------------------------------

    @cached_property
    def _tapes(self) -> Tapes | bool:
        """Where tapes are kept: in the `trace` folder, in the checkpoint's folder, or in memory alone."""
        if not self.keeps_tapes:
            return False
        if self.trace_folder:
            kept: dict[str, Any] = {"resident": self._resident, "complete": True, "model": self.model.gguf}
            return Tapes(self.trace_folder, self._prompt_identity(), **kept)
        if self.journal and not self.model.crew:  # of several processes, all begin anew
            identity = self._prompt_identity() | self._machine_identity()
            return Tapes(self.journal.folder / "trace", identity, run=self.journal)
        return True

    def _note_tapes(self, error: BaseException) -> None:
        """Keep in the `trace` folder the part of an interrupted forward pass that is there, and add a note on it."""
        tapes = self._made("_tapes")
        if self.trace_folder is None or not isinstance(tapes, Tapes):
            return
        with contextlib.suppress(runs.RunError):  # a full disk keeps fewer
            tapes.save()
        if tapes.saved:
            folder, blocks = visible(os.fsencode(self.trace_folder)), self.model.config.block_count
            done = f"block {tapes.saved} of {blocks}"
            error.add_note(f"{folder} keeps the forward pass up to {done}: rerun the same command to continue")

    def _prompt_identity(self) -> dict[str, Any]:
        """Return what decides a trace."""
        return {
            "ggjac": __version__,
            "model": self.model.gguf.fingerprint(),
            "tokens": self.ids,
            "dtype": self.dtype,
            "mlp-path": self.mlp_path,
        } | ({} if self.model.context is None else {"context": self.model.context})

    def _machine_identity(self) -> dict[str, Any]:
        """Return what may change the last bits of a result."""
        ranks = {"ranks": self.model.crew.ranks} if self.model.crew else {}
        return {"code": runs.code_digest()} | self.machine | ranks

    @property
    def machine(self) -> dict[str, Any]:
        """What computes here, as plain data: results of the same code are equal to the last bit where it is equal."""
        return {"torch": torch.__version__, "device": str(self.model.device), "threads": torch.get_num_threads()}

    @contextlib.contextmanager
    def checkpointed(
        self, folder: Path | None, *, resume: bool, output: Path | None, **settings: Any
    ) -> Iterator[None]:
        """Remember in a folder what is computed in this block, and resume what an earlier attempt left there.

        The folder is removed when the block ends; after an interrupt or a kill it stays, if anything was computed.

        Args:
            folder: None remembers nothing.
            resume: there must be an earlier attempt, of the same prompt, model, settings and versions.
            output: where the result goes; not part of what identifies a run.
            settings: what else decides the results, named as the options are.

        Raises:
            JournalError: it cannot be resumed, or another process is at work.
        """
        if folder is None or (self.model.crew and self.model.crew.rank):  # the first rank keeps the record of all
            yield
            return
        assert output is not None
        missing = [parent for parent in folder.parents if not parent.exists()]
        if resume and output.is_file() and not folder.exists() and not self.model.crew:
            name = visible(os.fsencode(output))
            raise JournalError(
                f"{name} is there already, and no unfinished run of it: leave out --resume to compute it anew"
            )
        if self.model.crew and resume and not (folder / "journal.json").exists():
            resume = False  # as after a restart by torchrun, which repeats the command
            nothing = f"--resume finds nothing to resume at {visible(os.fsencode(output))}: this run begins anew"
            warnings.warn(nothing, stacklevel=2)
        settings |= {"exclude": self.excluded} if self.excluded else {}
        identity = self._prompt_identity() | {"position": self.position} | settings | self._machine_identity()
        identity["ram-budget for dense rows"] = self.model.chunk_bytes  # how many rows a sweep carries
        identity["vram-budget for tiles"] = list(self.model.weights.pieces)
        given: dict[str, Any] = {"resume": resume, "model": self.model.gguf, "every": CHECKPOINT_SECONDS}
        with Journal.open(folder, identity, **given) as self.journal:
            try:
                runs.remove_unfinished(output)
                yield
            except BaseException as error:
                if not self._saved(error):
                    self._discard(missing)
                elif not isinstance(error, JournalError | TapeError | ChangedError):  # which say what to do
                    again = f"the same command with --resume -o {visible(os.fsencode(output))}"
                    error.add_note(f"progress is saved; to continue, run {again}")
                raise
            self._discard([])

    def _saved(self, error: BaseException) -> bool:
        """Save what was computed before an error, if it can be used again; return whether there is anything."""
        assert self.journal is not None
        tapes = self._made("_tapes")
        if isinstance(error, KeyboardInterrupt | MemoryError):
            self.journal.flush()
            with contextlib.suppress(runs.RunError):  # a full disk: the journal has reported it
                if isinstance(tapes, Tapes):
                    tapes.save()
        return (self.journal.folder / "journal.json").exists()

    def _discard(self, missing: list[Path]) -> None:
        """Remove the checkpoint, and folders that were made for it and hold nothing else."""
        assert self.journal is not None
        tapes = self._made("_tapes")
        if isinstance(tapes, Tapes) and not self.trace_folder:
            tapes.remove()
        self.journal.remove()
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a result that is plain JSON, from an earlier attempt if it has it; the first of several processes'."""
        found = self.journal.remember(name, compute) if self.journal else compute()
        return self.model.crew.told(found) if self.model.crew else found

    # -- results -------------------------------------------------------------------------------------------------------

    def tokens(self) -> list[dict[str, Any]]:
        """Return the prompt's tokens as plain data."""
        return [self.words.here(i) for i in range(len(self.ids))]

    def envelope(self, *, check: bool = True) -> dict[str, Any]:
        """Return what every result carries: where it came from and how it was computed.

        Args:
            check: whether the model file is unchanged; not asked again about a result that is saved already.

        Raises:
            ChangedError: another program has changed the model file, so that the result may be of two models.
        """
        model, config = self.model, self.model.config
        if check:
            model.gguf.check_unchanged()
        metadata = model.gguf.metadata
        return runs.provenance() | {
            "command": self.command,
            "model": {
                "asked": model.asked,
                "path": str(model.path),
                "name": metadata.get("general.name"),
                "architecture": config.architecture,
                "bytes": model.gguf.nbytes,
                "fingerprint": model.gguf.fingerprint(),
                "sha256": model.gguf.hashes,
                "warning": model.weights.warning(),
            },
            "prompt": self.text,
            "tokens": self.tokens(),
            "warnings": self.warnings,
            "position": self.position,
            **({"exclude": self.excluded} if self.excluded else {}),
            "device": str(model.device),
            "dtype": self.dtype,
            "mlp_path": self.mlp_path,
            "threads": torch.get_num_threads(),
            **({"processes": model.crew.ranks} if model.crew else {}),
            "seconds": dict(self.stages.seconds),
            "peak_memory_bytes": runs.peak_memory(),
        }

    def save(self, output: Path, tensors: dict[str, Tensor], **settings: Any) -> None:
        """Write tensors and the prompt's `ids` to a safetensors file, provenance and `settings` in its metadata.

        Raises:
            RunError: it cannot be written.
        """
        arrays = {name: numpy(tensor) for name, tensor in tensors.items()}
        ids = np.array(self.ids, np.int64)
        runs.save_tensors(output, arrays | {"ids": ids}, {"ggjac": json.dumps(self.envelope() | settings)})


def checkpoint(output: Path | None) -> Path | None:
    """Return the folder beside an output file in which its run is remembered; a run without a file is not."""
    return output and output.with_name(f"{output.name}.checkpoint")


def numpy(tensor: Tensor) -> np.ndarray:
    """Return an array that NumPy and safetensors can hold: 16-bit floats become float32, exactly."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.detach().cpu().numpy()
