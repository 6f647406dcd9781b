"""The main job: every analysis of one prompt in a run folder, with a report, certified and resumable."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from ggjac import checks, runs
from ggjac.analysis.attribute import attribute
from ggjac.analysis.branches import attribute_branches
from ggjac.analysis.contrast import contrast as contrasted
from ggjac.analysis.layers import layers as every_layer
from ggjac.analysis.per_token import per_token as each_token
from ggjac.analysis.per_token import tensors as token_tensors
from ggjac.analysis.predict import predict
from ggjac.analysis.svd import spectrum, stable_rank
from ggjac.gguf import shown
from ggjac.jacobian import Progress
from ggjac.model import Model, open_model
from ggjac.parity import ParityError
from ggjac.runs.journal import JournalError
from ggjac.session import Session, Stages
from ggjac.sizes import MlpPath

CHECKPOINT = "checkpoint"  # inside a run folder, while the run is not finished
LIKELY = 5  # next tokens in the result

# Called with the key of a part of the result and its data, as soon as the part is computed.
Show = Callable[[str, Any], None]


def analyze(
    model: Model | str | os.PathLike[str] | None,
    prompt: str | Sequence[int],
    output: str | os.PathLike[str] | None = None,
    *,
    position: int = -1,
    rank: int = 8,
    top: int = 8,
    hide_special: bool = False,
    tol: float = 1e-3,
    max_sweeps: int = 40,
    seed: int = 0,
    parse_special: bool = True,
    mlp_path: MlpPath = "up",
    exclude: str | Sequence[int] | None = None,
    verify: bool = True,
    layers: Sequence[int] | None = None,
    per_token: bool = False,
    input_position: str | Sequence[int] | None = None,
    contrast: bool = False,
    calibrate: Sequence[str | Sequence[int]] | None = None,
    search_dtype: str = "auto",
    resume: bool = False,
    trace: str | os.PathLike[str] | None = None,
    ram_budget: int | str | None = None,
    vram_budget: int | str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Analyse a prompt and write a run folder: prediction, parity, singular vectors, attribution, and a report.

    This is `ggjac analyze`. The folder holds report.html, run.json (all results, and how they were made) and
    tensors.safetensors; `ggjac.report.load.load` or `json` read it again. After an interrupt, the same call with
    `resume=True` continues, and ends with the same bits.

    Args:
        model: from `open_model`, or the path of a GGUF file; None is the demo model.
        prompt: text, or token ids.
        output: run folder to create; default ggjac-runs/MODEL-TIME.
        position: of the output; negative counts from the end.
        rank: number of singular triplets.
        top: tokens to decode each vector to.
        hide_special: leave control, unused and byte tokens out of the decoding.
        tol, max_sweeps, seed: of the iteration, as `ggjac.svd.svd` takes them.
        parse_special: `<s>` and the like in a text are the tokens that they name.
        mlp_path: freezing rule of gated feed-forwards, `"up"` or `"gate"`.
        exclude: input positions that are folded into the offset, as `Trace.jacobian` takes them.
        verify: compare with llama.cpp.
        layers: depths, in blocks applied, at which maps are decomposed too; None for none.
        per_token: decompose each position's own map too.
        input_position: only those of these positions, as `ggjac.per_token` takes them.
        contrast: rebuild the output by the ordinary Jacobian too.
        calibrate: unrelated prompts, with whose leading vectors the tokens of left vectors are compared; None for none.
        search_dtype: `"auto"`, `"same"` or `"bfloat16"`, as `Session.search_dtype` takes it.
        resume: continue the interrupted run in `output`.
        trace: folder in which the forward pass is kept, and used again if it is there.
        ram_budget, vram_budget: bytes, or as `"2GiB"`.
        progress: called as `progress(what, done, total)`.

    Returns:
        The run folder.

    Raises:
        PromptError: the model cannot run the prompt, or has no such position.
        PlanError: rank or layers are out of range.
        ValueError: top, tol, max_sweeps or seed is out of range, search_dtype is unknown, or there are too few prompts
            to calibrate with.
        NoFitError: the work does not fit the budgets, and how much would.
        RunError: the folder exists, or cannot be written.
        JournalError: there is nothing to resume, or it is another run, finished or not.
    """
    _check(top, tol, max_sweeps, seed)
    if calibrate is not None:
        checks.compared(len(calibrate), rank)
    layers = None if layers is None else [checks.whole("depth", depth, None) for depth in layers]
    input_position = checks.plain(input_position)
    model = model if isinstance(model, Model) else open_model(model)
    session = Session(
        model,
        prompt,
        position=position,
        parse_special=parse_special,
        mlp_path=mlp_path,
        exclude=checks.plain(exclude),
        trace=trace,
        ram_budget=ram_budget,
        vram_budget=vram_budget,
        stages=Stages(progress),
    )
    options: dict[str, Any] = {"rank": rank, "tol": tol, "seed": seed, "max_sweeps": max_sweeps, "top": top}
    options |= {"hide_special": hide_special, "verify": verify}
    planned: dict[str, Any] = {"layers": layers, "per_token": per_token, "input_position": input_position}
    planned |= {"contrast": contrast, "search_dtype": search_dtype}
    calibrate = None if calibrate is None else [checks.plain(prompt) for prompt in calibrate]
    if resume and output is not None and finished(Path(output)):
        check_same(session, Path(output), **options, **planned, calibrate=calibrate)
        return Path(output)
    lengths = [len(session.calibrating(prompt)) for prompt in calibrate or ()]
    session.fit("analyze", rank=rank, **planned, calibrate=lengths)
    with run_folder(output, model.title) as folder:
        run(session, folder, resume=resume, **options, **planned, calibrate=calibrate)
    return folder


def _check(top: int, tol: float, max_sweeps: int, seed: int) -> None:
    """Refuse, before any work starts, options of the iteration that would fail in the middle of it.

    Raises:
        ValueError: one is out of range.
    """
    checks.whole("top", top)
    if not 0 < tol < math.inf:
        raise ValueError(f"tol {tol} is out of range: it must be positive and finite")
    checks.whole("max_sweeps", max_sweeps, 2)
    checks.seed(seed)


def check_same(session: Session, folder: Path, **options: Any) -> None:
    """Refuse a finished run of another model or prompt, or with other options of `run`.

    Raises:
        JournalError: it is not the run that was asked for.
        RunError: run.json cannot be read.
    """
    content = runs.load_run(folder)
    model, prompt, spectrum_of = (content.get(key) or {} for key in ("model", "tokens", "svd"))
    then = {key: content.get(key) for key in ("position", "dtype", "mlp_path")}
    then["exclude"] = content.get("exclude", [])
    file = session.model.gguf
    then |= {"model": model.get("fingerprint"), "tokens": [token["id"] for token in prompt]}
    # In files of before, only of the iteration.
    recorded = content.get("asked") or {key: spectrum_of.get(key) for key in ("rank", "tol", "seed")}
    then |= {key: recorded[key] for key in options if key in recorded}
    now = {"position": session.position, "dtype": session.dtype, "mlp_path": session.mlp_path}
    now["exclude"] = session.excluded
    now |= {"model": file.fingerprint(), "tokens": session.ids}
    now |= {key: value for key, value in options.items() if key in recorded}
    if then["model"] == now["model"] and not file.fingerprint_is_whole:  # which an edited tensor may escape
        then["model"], now["model"] = model.get("sha256"), file.sha256()
    for key, value in now.items():
        if then[key] != value:
            was, given = str(then[key])[:60], str(value)[:60]
            raise JournalError(
                f"{folder}: is finished, with {key} {was}, now {given}; give the same values, or choose another output"
            )


def run(
    session: Session,
    folder: Path,
    *,
    rank: int,
    top: int,
    hide_special: bool,
    tol: float,
    max_sweeps: int,
    seed: int,
    verify: bool,
    layers: Sequence[int] | None,
    per_token: bool,
    input_position: str | Sequence[int] | None,
    contrast: bool,
    calibrate: Sequence[str | Sequence[int]] | None,
    search_dtype: str,
    resume: bool,
    show: Show = lambda key, data: None,
) -> dict[str, Any]:
    """Write the run folder of a session that has been fitted; return the content of run.json.

    Arguments as those of `analyze`; `show(key, data)` gets each part of the result when it is computed.
    """
    runs.check_folder(folder, unfinished=CHECKPOINT)
    there = (folder / "run.json").exists()
    settings: dict[str, Any] = {"rank": rank, "tol": tol, "seed": seed}
    iteration = settings | {"top": top, "max_sweeps": max_sweeps, "hide_special": hide_special}
    marks: dict[str, Any] = {"search-dtype": search_dtype} | ({"per_token": per_token} if per_token else {})
    marks |= {} if input_position is None else {"input-position": input_position}
    marks |= {} if calibrate is None else {"calibrate": calibrate}
    words = session.words
    asked: dict[str, Any] = {"verify": verify, "layers": layers, "per_token": per_token, "contrast": contrast}
    asked |= {"input_position": input_position, "search_dtype": search_dtype, "calibrate": calibrate}
    content: dict[str, Any] = {"asked": iteration | asked}
    tensors: dict[str, Tensor] = {}

    def part(key: str, data: Any) -> None:
        content[key] = data
        show(key, data)

    with session.checkpointed(folder / CHECKPOINT, resume=resume, output=folder, layers=layers, **settings, **marks):
        if not there and (folder / "run.json").exists():
            raise runs.RunError(f"{folder}: another process has finished a run there; choose another name with -o")
        part("tokens", session.tokens())
        searched = session.search_dtype(search_dtype)
        # Before the session's own trace: one at a time.
        own = {key: value for key, value in iteration.items() if key != "top"} | {"search_dtype": searched}
        calibration = None if calibrate is None else session.calibration(calibrate, **own)
        part("predictions", predict(session.trace, LIKELY, position=session.position).data(words))
        if verify:
            part("parity", session.remember("parity", lambda: _parity(session)))
        part("reconstruction", session.reconstruction().data())

        iteration["search_dtype"] = searched
        # First, since the joint map takes the matrix that this may leave.
        chosen = {"positions": input_position}
        each = session.run("svd per token", each_token, **iteration, **chosen) if per_token else []
        found = session.run("svd", spectrum, calibration=calibration, **iteration)
        part("svd", found.data(words))
        part("stable_rank", session.run("stable rank", stable_rank, found.svd, seed=seed).data())
        split = session.run("attribution", attribute, content["predictions"][0]["id"])
        part("attribution", split.data(words))
        content["branches"] = session.run("branches", attribute_branches, split.target, by_head=True).data(words)[0]
        tensors |= found.tensors()

        J = session.jacobian
        tensors["linear_output"] = J.linear_output
        if contrast:
            both = session.run("contrast", contrasted)
            part("contrast", both.data())
            tensors["ordinary_output"] = both.ordinary.to(J.linear_output.dtype)
        if per_token:
            content["svd"]["per_token"] = [one.data(words) for one in each]
            show("per_token", content["svd"]["per_token"])
            tensors |= token_tensors(each)
        if layers is not None:
            maps = session.run("layers", every_layer, depths=layers, **iteration)
            part("layers", maps.data(words))
            tensors |= maps.tensors()

        tensors |= {"x": J.x, "y": J.output, "offset": J.offset, "logits": session.logits, "shares": split.shares}
        content = _save(session, folder, tensors, content)
    return content


def finished(folder: Path) -> bool:
    """Return whether a run folder is complete."""
    return (folder / "run.json").exists() and not (folder / CHECKPOINT).exists()


@contextlib.contextmanager
def run_folder(output: str | os.PathLike[str] | None, title: str) -> Iterator[Path]:
    """Yield a run's folder: the one that was asked for, or a new one, named by model and time.

    A new one belongs to this process alone: a number distinguishes runs of the same second. It is removed again if the
    run leaves nothing in it.

    Raises:
        RunError: it cannot be created.
    """
    if output is not None:
        yield Path(output)
        return
    name = f"{title}-{time.strftime('%Y%m%d-%H%M%S')}"
    parent = Path("ggjac-runs")
    first = not parent.exists()
    for i in count():
        folder = parent / (f"{name}-{i}" if i else name)
        try:
            parent.mkdir(exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            if not parent.is_dir():
                raise runs.RunError(
                    f"{parent}: is a file, but new run folders go there; choose a folder with -o"
                ) from None
        except OSError as error:
            raise runs.RunError(f"{folder}: cannot be created ({error.strerror}); choose a folder with -o") from error
        else:
            break
    try:
        yield folder
    except BaseException:
        for made in (folder, parent)[: 1 + first]:
            with contextlib.suppress(OSError):  # not empty
                made.rmdir()
        raise


def _save(session: Session, folder: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> dict[str, Any]:
    """Write the files of a run, or none of them, and its report; return the content of run.json."""
    from ggjac.report import write_report

    session.model.gguf.sha256()  # for the record: a run may be looked at long after the file is gone
    names = ("tensors.safetensors", "run.json")
    try:
        session.save(folder / names[0], tensors)
        content = session.envelope() | content
        runs.save_json(folder / names[1], runs.finite(content))
    except BaseException:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        raise
    try:
        write_report(folder)
    except runs.RunError as error:
        error.add_note(f"run.json and tensors.safetensors are saved; `ggjac report {shown(folder)}` writes the page")
        raise
    return content


def _parity(session: Session) -> dict[str, Any]:
    """Compare with llama.cpp as it runs the file; where it cannot run, return why: that is not a verdict on ours."""
    try:
        return session.verify(layers=False).data(session.words)
    except ParityError as error:
        return {"verdict": None, "reason": str(error)}
