"""Change the model at random moments of a run, and start two commands on the same output in the same moment.

    python tools/reliability/changed_model.py --runs 200 --pairs 100

A run whose model is truncated, overwritten or replaced must end with one line and save nothing, unless it had read all
that it needs; with the model as it was, it goes on to the same bits, and with the other one it is refused. Of two
processes at least one must end well, with the same bits, and the other with one line.
"""

import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attempts import (
    TOKENS,
    Attempt,
    Job,
    Whole,
    arguments,
    attempt,
    chosen,
    copied_model,
    differing,
    leftovers,
    one_line,
    show,
    undisturbed,
    workplace,
)

from ggjac.gguf import open_gguf


def edited(model: Path, target: Path) -> Path:
    """Write a model of the same size and header, with other weights in every block."""
    shutil.copy(model, target)
    with open_gguf(model) as file, open(target, "r+b") as copy:
        for name, info in file.tensors.items():
            if name.endswith(("attn_q.weight", "ffn_up.weight")):
                copy.seek(info.offset)
                copy.write(bytes(info.nbytes // 2))
    return target


def truncate(model: Path, other: Path, chance: random.Random) -> None:
    """Cut the file anywhere."""
    os.truncate(model, chance.randrange(model.stat().st_size))


def overwrite(model: Path, other: Path, chance: random.Random) -> None:
    """Write another model over it, in place."""
    with open(other, "rb") as new, open(model, "r+b") as file:
        shutil.copyfileobj(new, file)


def touch_up(model: Path, other: Path, chance: random.Random) -> None:
    """Write some bytes anywhere in it."""
    with open(model, "r+b") as file:
        file.seek(chance.randrange(model.stat().st_size))
        file.write(b"\1\2\3\4")


def copy_again(model: Path, other: Path, chance: random.Random) -> None:
    """Copy another model to its name, which empties the file first."""
    shutil.copyfile(other, model)


def replace(model: Path, other: Path, chance: random.Random) -> None:
    """Put another model in its place by renaming it."""
    shutil.copy(other, model.with_name("new"))
    model.with_name("new").replace(model)


CHANGES: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "truncated": truncate,
    "overwritten": overwrite,
    "some bytes written": touch_up,
    "copied over": copy_again,
    "replaced by renaming": replace,
}


def opened(running: Attempt, model: Path) -> bool:
    """Return whether a process has mapped a file, where the system says so."""
    maps = Path(f"/proc/{running.pid}/maps")
    return not maps.exists() or str(model) in maps.read_text()


def trial(
    job: Job, change: str, original: Path, other: Path, whole: Whole, folder: Path, chance: random.Random
) -> tuple[bool, list[str]]:
    """Change the model of a running job; return whether it was stopped by that, and what is wrong."""
    model = Path(shutil.copy(original, folder.with_name("in-use.gguf")))
    folder.mkdir()
    running = Attempt(job.command(model, folder), folder)
    while running.running() and not opened(running, model):
        time.sleep(0.001)
    end = time.monotonic() + chance.uniform(0, whole.seconds)
    while time.monotonic() < end and running.running():
        time.sleep(0.001)
    CHANGES[change](model, other, chance)
    ended = running.wait()
    if ended.code == 0:  # it had read everything
        return False, [f"{name} differs" for name in differing(job.result(folder), whole.result)]
    if not one_line(ended):
        return True, [f"ended with {ended.code or ended.signal}: {ended.stderr.strip()}"]
    wrong = [f"{name} was left" for name in leftovers(folder)]
    if job.complete(folder):
        wrong.append(f"saved a result: {ended.stderr.strip()}")
    if (folder / "trace" / "trace.json").exists() or job.checkpoint(folder).exists():
        replace(model, other, chance)
        refused = attempt(job.command(model, folder), folder)
        if refused.code == 0:
            wrong.append("went on with another model")
        elif not one_line(refused):
            wrong.append(f"went on with another model, and ended with {refused.code}: {refused.stderr.strip()}")
    replace(model, original, chance)  # as a copy: of the same content, and nothing else
    again = attempt(job.command(model, folder), folder)
    if again.code != 0:
        return True, [*wrong, f"could not go on ({again.code or again.signal}): {again.stderr.strip()}"]
    return True, wrong + [f"{name} differs after going on" for name in differing(job.result(folder), whole.result)]


def pair(job: Job, model: Path, whole: Whole, folder: Path, apart: float) -> tuple[int, list[str]]:
    """Start a job twice in one folder; return how many ended well, and what is wrong."""
    folder.mkdir()
    words = job.command(model, folder)
    first = Attempt(words, folder)
    time.sleep(apart)
    second = Attempt(words, folder)
    both = [first.wait(), second.wait()]
    well = sum(ended.code == 0 for ended in both)
    wrong = [
        f"ended with {ended.code or ended.signal}: {ended.stderr.strip()}"
        for ended in both
        if ended.code != 0 and not one_line(ended)
    ]
    if well == 0:
        wrong.append(f"neither ended well: {' | '.join(ended.stderr.strip() for ended in both)}")
    else:
        wrong += [f"{name} differs" for name in differing(job.result(folder), whole.result)]
    return well, wrong + [f"{name} was left" for name in leftovers(folder)]


def one_trace(model: Path, folder: Path, same: bool) -> tuple[int, list[str]]:
    """Start two commands of one prompt, or of two, that keep their forward pass in one folder."""
    folder.mkdir()
    prompts = (TOKENS, TOKENS if same else TOKENS[::-1])
    words = [
        [
            "jacobian",
            "-m",
            str(model),
            "--tokens",
            prompt,
            "-t",
            "1",
            "-q",
            "--trace",
            "trace",
            "-o",
            f"{i}.safetensors",
        ]
        for i, prompt in enumerate(prompts)
    ]
    running = [Attempt(command, folder) for command in words]
    both = [one.wait() for one in running]
    wrong = [f"ended with {e.code or e.signal}: {e.stderr.strip()}" for e in both if e.code != 0 and not one_line(e)]
    well = sum(ended.code == 0 for ended in both)
    if well < 1 + same:
        wrong.append(f"only {well} ended well: {' | '.join(ended.stderr.strip() for ended in both)}")
    for i, ended in enumerate(both):
        if ended.code == 0:
            alone = Job(("jacobian", "--tokens", prompts[i]), "alone.safetensors", traced=True)
            if attempt(alone.command(model, folder), folder).code != 0:
                wrong.append("the trace cannot be used again")
            else:
                fresh = Job(("jacobian", "--tokens", prompts[i]), f"{i}.safetensors")
                wrong += [f"{name} differs" for name in differing(alone.result(folder), fresh.result(folder))]
    return well, wrong + [f"{name} was left" for name in leftovers(folder)]


def one_second(model: Path, folder: Path) -> tuple[int, list[str]]:
    """Start two `analyze` that choose their own folders."""
    folder.mkdir()
    words = ["analyze", "-m", str(model), "--tokens", "0,465", "-t", "1", "-q", "-k", "1", "--no-verify"]
    running = [Attempt(words, folder) for _ in range(2)]
    both = [one.wait() for one in running]
    well = sum(ended.code == 0 for ended in both)
    made = [path for path in (folder / "ggjac-runs").iterdir() if (path / "report.html").exists()]
    wrong = [ended.stderr.strip() for ended in both if ended.code != 0]
    return well, wrong if len(made) == 2 else [*wrong, f"{len(made)} run folders of two runs"]


def main() -> None:
    """Run trials of both kinds."""
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=int, default=200, help="with a model that changes [200]")
    parser.add_argument("--pairs", type=int, default=100, help="of processes [100]")
    options = parser.parse_args()
    chance, wrong = random.Random(options.seed), 0
    rows: dict[str, Counter[str]] = {}

    def note(name: str, faults: list[str], **counts: int) -> None:
        nonlocal wrong
        wrong += bool(faults)
        row = rows.setdefault(name, Counter())
        row.update(runs=1, wrong=int(bool(faults)), **counts)
        for fault in faults:
            print(f"{name}, run {row['runs']} (seed {options.seed}): {fault}", file=sys.stderr)

    with workplace(options.folder) as place:
        model, jobs = copied_model(place, options.model), chosen(options.only)
        other, wholes = edited(model, place / "other.gguf"), dict[Job, Whole]()
        at = place / "run"

        def whole(job: Job) -> Whole:
            if job not in wholes:
                wholes[job] = undisturbed(job, model, place / "whole")
            return wholes[job]

        for number in range(options.runs):
            change, job = list(CHANGES)[number % len(CHANGES)], jobs[(number // len(CHANGES) + number) % len(jobs)]
            stopped, faults = trial(job, change, model, other, whole(job), at, chance)
            note(f"model {change}", [f"{job.name}: {fault}" for fault in faults], stopped=stopped)
            shutil.rmtree(at)
        for number in range(options.pairs):
            job = jobs[number % len(jobs)]
            kind = number % 5
            if kind < 2:
                name = "two on the same -o"
                well, faults = pair(job, model, whole(job), at, chance.choice((0, chance.uniform(0, 1))))
            elif kind < 4:
                name = f"two on the same --trace, {'one prompt' if kind == 2 else 'two prompts'}"
                well, faults = one_trace(model, at, same=kind == 2)
            else:
                name = "two analyze in the same second"
                well, faults = one_second(model, at)
            note(name, faults, well=well)
            shutil.rmtree(at)
    table: list[tuple[Any, ...]] = [
        (
            name,
            row["runs"],
            row.get("stopped", ""),
            row.get("well", ""),
            row["wrong"],
        )
        for name, row in rows.items()
    ]
    columns = ("what happened", "runs", "ended by it", "processes that ended well", "wrong")
    show("Models that change, and two processes at once", columns, table)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
