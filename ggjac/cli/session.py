"""One prompt on one model, as every command needs it: opened, tokenized, traced, with what a result must carry."""

import contextlib
import json
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from ggjac import __version__, planner, runs
from ggjac.cli.options import ModelOptions
from ggjac.cli.planning import make_plan, requested
from ggjac.cli.progress import Reporter
from ggjac.cli.render import line, table
from ggjac.config import ModelConfig
from ggjac.gguf import GGUFFile
from ggjac.jacobian import DetachedJacobian
from ggjac.jacobian.tapes import TapeError, Tapes
from ggjac.model import DeviceError, Model, PromptError, Trace, open_model
from ggjac.planner import machine
from ggjac.runs.journal import Journal, JournalError
from ggjac.tokenizer import bos_warning, visible

# Between checkpoints, at least.
CHECKPOINT_SECONDS = 30.0


class Session:
    """A model and a prompt, checked before any work starts."""

    def __init__(
        self,
        what: ModelOptions,
        *,
        position: int = -1,
        rank: int | None = None,
        output: Path | None = None,
        tapes: bool = True,
        model: Model | None = None,
        fit: bool = True,
    ):
        self.what, self.tapes = what, tapes
        self.journal: Journal | None = None
        if output:
            runs.check_writable(output)
        machine.return_freed_memory()
        self.report = Reporter(what.quiet)
        self.text = what.text()
        try:
            self.model: Model = model or open_model(
                what.model, device=what.device, dtype=what.dtype, threads=what.threads
            )
        except DeviceError as error:
            raise click.UsageError(f"--device: {error}") from error
        for source in (*self.model.gguf.paths, what.file):
            if output and source and output.exists() and output.samefile(source):
                raise click.UsageError(f"--output {output} is an input of this command; choose another name")
        try:
            ids = (what.tokens or []) if self.text is None else self.model.tokenize(self.text)
            self.ids = self.model.check_prompt(ids)
        except PromptError as error:
            raise click.UsageError(str(error)) from error
        n, d = len(self.ids), self.model.config.d
        if not -n <= position < n:
            raise click.UsageError(f"--position {position} is out of range; the prompt has positions 0 to {n - 1}")
        if rank is not None and rank > d:
            raise click.UsageError(f"--rank {rank} is out of range; this model's Jacobian has {d} singular values")
        self.position = position % n
        this = weakref.proxy(self)  # or neither would go with its last reference, nor the model
        self.report.work = lambda: this._work()
        if fit:
            self.fit()
        self.warning = bos_warning(self.model.tokenizer, self.ids)

    def fit(self, n: int | None = None, **asked: Any) -> None:
        """Refuse work that its budget cannot hold, before it starts, and keep ready what the budget has room for.

        Arguments as those of `plan`.

        Raises:
            NoFitError: with what is needed, and what to lower.
        """
        plan = self.plan(self.model.gguf, self.model.config, n, **asked)
        self.model.fit(plan)
        self._resident = not plan.tapes_on_disk

    def plan(self, file: GGUFFile, config: ModelConfig, n: int | None = None, **asked: Any) -> planner.Plan:
        """Return the plan of this command with its options on a file.

        Args:
            file, config: of the model, or of another one like it.
            n: tokens of the trace; default the prompt's.
            asked: what the options do not say, as `ggjac.planner.work.Request` has it.
        """
        context = click.get_current_context()
        wanted = requested(context.params, config.block_count) | {"position": self.position} | asked
        command = context.info_name or ""
        return make_plan(self.what, file, config, n or len(self.ids), command, wanted, self.model.device.type)

    @cached_property
    def trace(self) -> Trace:
        """The forward pass; run when first needed."""
        try:
            with self.report.stage("trace") as update:
                return self.model.trace(
                    self.ids,
                    mlp_path=self.what.mlp_path,
                    tapes=self._tapes,
                    progress=lambda done, total: update("block", done, total),
                )
        except (KeyboardInterrupt, MemoryError) as error:
            self._note_tapes(error)
            raise

    def _note_tapes(self, error: BaseException) -> None:
        """Keep in the `--trace` folder what there is of a forward pass that was ended, and say so."""
        tapes = self.__dict__.get("_tapes")
        if self.what.trace is None or not isinstance(tapes, Tapes):
            return
        with contextlib.suppress(runs.RunError):  # a full disk keeps fewer
            tapes.save()
        if tapes.saved:
            folder, blocks = visible(os.fsencode(self.what.trace)), self.model.config.block_count
            done = f"block {tapes.saved} of {blocks}"
            error.add_note(f"{folder} keeps the forward pass up to {done}: go on by the same command")

    @cached_property
    def _tapes(self) -> Tapes | bool:
        """Where tapes are kept: in the `--trace` folder, beside the checkpoint, or in memory alone."""
        if not self.tapes:
            return False
        if self.what.trace:
            return Tapes(self.what.trace, self._prompt_identity(), resident=self._resident, complete=True)
        if self.journal:
            identity = self._prompt_identity() | self._machine_identity()
            return Tapes(self.journal.folder / "trace", identity, run=self.journal)
        return True

    def _prompt_identity(self) -> dict[str, Any]:
        """Return what decides a trace."""
        return {
            "ggjac": __version__,
            "model": self.model.gguf.fingerprint(),
            "tokens": self.ids,
            "dtype": self.what.dtype,
            "mlp-path": self.what.mlp_path,
        }

    def _machine_identity(self) -> dict[str, Any]:
        """Return what may change the last bits of a result."""
        return {
            "code": runs.code_digest(),
            "torch": torch.__version__,
            "device": str(self.model.device),
            "threads": torch.get_num_threads(),
        }

    @contextlib.contextmanager
    def checkpointed(self, folder: Path | None, *, resume: bool, **settings: Any) -> Iterator[None]:
        """Remember in a folder what is computed in this block, and resume what an earlier attempt left there.

        The folder is removed when the block ends; after an interrupt or a kill it stays, if anything was computed.

        Args:
            folder: None remembers nothing.
            resume: there must be an earlier attempt, of the same prompt, model, settings and versions.
            settings: what else decides the results, named as the options are.

        Raises:
            JournalError: it cannot be resumed, or another process is at work.
        """
        if folder is None:
            yield
            return
        missing = [parent for parent in folder.parents if not parent.exists()]
        output = settings.pop("output")  # where to is not what
        identity = self._prompt_identity() | {"position": self.position} | settings | self._machine_identity()
        identity["ram-budget for dense rows"] = self.model.chunk_bytes  # how many rows a sweep carries
        with Journal.open(folder, identity, resume=resume, every=CHECKPOINT_SECONDS) as self.journal:
            try:
                runs.remove_unfinished(output)
                yield
            except BaseException as error:
                if not self._saved(error):
                    self._discard(missing)
                elif not isinstance(error, JournalError | TapeError):  # which say what to do
                    again = f"the same command with --resume -o {visible(os.fsencode(output))}"
                    error.add_note(f"what was computed is saved: go on by {again}")
                raise
            self._discard([])

    def _saved(self, error: BaseException) -> bool:
        """Save what was computed before an error, if it can be of use again; say whether there is anything."""
        assert self.journal is not None
        tapes = self.__dict__.get("_tapes")
        if isinstance(error, KeyboardInterrupt | MemoryError):
            self.journal.flush()
            with contextlib.suppress(runs.RunError):  # a full disk: the journal has said so
                if isinstance(tapes, Tapes):
                    tapes.save()
        return (self.journal.folder / "journal.json").exists()

    def _discard(self, missing: list[Path]) -> None:
        """Remove the checkpoint, and folders that were made for it and hold nothing else."""
        assert self.journal is not None
        tapes = self.__dict__.get("_tapes")
        if isinstance(tapes, Tapes) and not self.what.trace:
            tapes.remove()
        self.journal.remove()
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a result that is plain JSON, from an earlier attempt if it has it."""
        return self.journal.remember(name, compute) if self.journal else compute()

    @cached_property
    def logits(self) -> torch.Tensor:
        """The logits at the chosen position, `[v]`; one pass over the head, however many parts show them."""
        return self.trace.logits_at(self.position)

    @cached_property
    def jacobian(self) -> DetachedJacobian:
        """The Jacobian at the chosen position."""
        jacobian = self.trace.jacobian(self.position)
        jacobian.sweep.journal = self.journal
        return jacobian

    def _work(self) -> tuple[int, int]:
        """Return the bytes read and the floating-point operations of sweeps so far."""
        jacobian = self.__dict__.get("jacobian")  # not made for asking
        return self.model.weights.bytes_read, jacobian.sweep.flop if jacobian else 0

    def token(self, id: int) -> str:
        """Return a token's text, visible and harmless."""
        return visible(self.model.tokenizer.piece(id))

    def tokens(self) -> list[dict[str, Any]]:
        """Return the prompt's tokens as plain data."""
        return [{"position": i, "id": id, "text": self.token(id)} for i, id in enumerate(self.ids)]

    def show_tokens(self) -> None:
        """Print the token table, and a warning where BOS looks wrong."""
        table("Tokens", ["#position", "#id", "token"], [(i, id, self.token(id)) for i, id in enumerate(self.ids)])
        if self.warning:
            line(f"Warning: {self.warning}")
            line("")

    def one_token(self, target: str | None, option: str = "--target") -> int | None:
        """Return the id that an option names: a number, or a text that is one token, its spaces as they are or as `␣`.

        Raises:
            click.UsageError: the text is not one token, or the id is not in the vocabulary.
        """
        if target is None:
            return None
        if target.isascii() and target.isdigit():
            ids = [int(target)] if len(target) < 20 else [2**63]
        else:
            text = target.replace("␣", " ")
            ids = self.model.tokenizer.encode(text, add_special=False)
            if len(ids) != 1 and text.startswith(" "):
                # SentencePiece puts a space before every text: here it has brought its own.
                inner = self.model.tokenizer.encode(text[1:], add_special=False)
                if len(inner) == 1 and self.model.tokenizer.piece(inner[0]) == text.encode():
                    ids = inner
        if len(ids) != 1:
            parts = " + ".join(self.token(id) for id in ids) or "none"
            raise click.UsageError(f"{option} {target!r} is {len(ids)} tokens ({parts}); give one token, or its id")
        try:
            return self.model.check_prompt(ids)[0]
        except PromptError as error:
            raise click.UsageError(f"{option}: {error}") from error

    def show_saved(self, output: Path | None) -> None:
        """Say where a result was written."""
        if output:
            line(f"Saved {visible(os.fsencode(output))}")

    def envelope(self) -> dict[str, Any]:
        """Return what every result carries: where it came from and how it was computed."""
        model, config = self.model, self.model.config
        metadata = model.gguf.metadata
        return runs.provenance() | {
            "command": ["ggjac", *sys.argv[1:]],
            "model": {
                "path": str(model.path),
                "name": metadata.get("general.name"),
                "architecture": config.architecture,
                "bytes": model.gguf.nbytes,
                "fingerprint": model.gguf.fingerprint(),
            },
            "prompt": self.text,
            "tokens": self.tokens(),
            "warning": self.warning,
            "position": self.position,
            "device": str(model.device),
            "dtype": self.what.dtype,
            "mlp_path": self.what.mlp_path,
            "threads": torch.get_num_threads(),
            "seconds": dict(self.report.seconds),
            "peak_memory_bytes": runs.peak_memory(),
        }


def checkpoint(output: Path | None, resume: bool) -> Path | None:
    """Return the folder beside an output file where its run is remembered; a run without a file is not.

    Raises:
        click.UsageError: there is no file whose run could be resumed.
    """
    if output is None and resume:
        raise click.UsageError("--resume goes on with a run that saves to -o; give its -o")
    return output and output.with_name(f"{output.name}.checkpoint")


def numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return an array that NumPy and safetensors can hold: 16-bit floats become float32, exactly."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.detach().cpu().numpy()


def save(session: Session, output: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> None:
    """Write tensors and the prompt's `ids` to a safetensors file; its metadata hold the provenance and `settings`."""
    arrays = {name: numpy(tensor) for name, tensor in tensors.items()}
    ids = np.array(session.ids, np.int64)
    runs.save_tensors(output, arrays | {"ids": ids}, {"ggjac": json.dumps(session.envelope() | settings)})
