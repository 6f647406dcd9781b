"""Let the disk become full at random moments; nothing must be half-written, and with more room every run ends the same.

    python tools/reliability/full_disk.py --runs 200

Each trial runs a command on a disk of its own, a small tmpfs (as root; elsewhere a limit on the size of files). Half of
the disks are too small from the start, by a random amount; the others are filled at a random moment. Then the disk is
enlarged and the command started again, with `--resume` where there is a run.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attempts import (
    Attempt,
    Ended,
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
from safetensors.numpy import load_file

ROOM = 1 << 27  # bytes: enough for any of the jobs on the demo model
PAGE = 4096
BALLAST = "ballast"


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Mount a file system in memory on a folder."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "ggjac-reliability", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


def resize(folder: Path, nbytes: int) -> None:
    """Change the size of a file system in memory."""
    subprocess.run(["mount", "-o", f"remount,size={nbytes}", folder], check=True)


def fill(folder: Path) -> None:
    """Leave no room on a file system, while others write there too."""
    with open(folder / BALLAST, "wb") as file:
        piece = ROOM
        while piece >= PAGE:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), piece)
            except OSError:
                piece //= 2


def used(folder: Path) -> int:
    """Return the bytes in use on a file system."""
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def most(job: Job, model: Path, place: Path) -> int:
    """Return the most bytes that a job ever has on its disk."""
    with disk(place):
        running, peak = Attempt(job.command(model, place / "run"), place / "run"), 0
        while running.running():
            peak = max(peak, used(place))
            time.sleep(0.001)
        running.wait()
    return peak


def on_small_disk(job: Job, model: Path, place: Path, whole: Whole, peak: int, chance: random.Random) -> Ended:
    """Run a job on a disk that is too small, or becomes full."""
    folder = place / "run"
    folder.mkdir()
    if chance.random() < 0.5:
        resize(place, max(PAGE, round(chance.uniform(0, 1) * peak / PAGE) * PAGE))
        return attempt(job.command(model, folder), folder)
    running, end = Attempt(job.command(model, folder), folder), time.monotonic() + chance.uniform(0, whole.seconds)
    while time.monotonic() < end and running.running():
        time.sleep(0.001)
    fill(place)
    return running.wait()


def with_small_files(job: Job, model: Path, place: Path, largest: int, chance: random.Random) -> Ended:
    """Run a job that may not write files beyond a size: what can be had without being root."""
    limit = round(chance.uniform(0, 1) * largest)
    # Also the messages go to a file.
    allowed = max(limit, PAGE)
    folder = place / "run"
    return attempt(
        job.command(model, folder), folder, prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (allowed,) * 2)
    )


def damaged(folder: Path) -> list[str]:
    """Return the files that are not whole."""
    found = []
    for path in (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".tmp", ".lock")):
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".html" and not path.read_text().rstrip().endswith("</html>"):
                raise ValueError
        except Exception as error:
            found.append(f"{path.relative_to(folder)} is half-written ({type(error).__name__})")
    return found


def trial(job: Job, ended: Ended, model: Path, whole: Whole, folder: Path) -> list[str]:
    """Judge how a job ended on a full disk, and let it go on with enough room; return what is wrong."""
    wrong = damaged(folder) + [f"{name} was left" for name in leftovers(folder)]
    if ended.code != 0 and not one_line(ended):
        wrong.append(f"ended with {ended.code or ended.signal}: {ended.stderr.strip()}")
    if ended.code == 0 or job.complete(folder):
        return wrong + [f"{name} differs" for name in differing(job.result(folder), whole.result)]
    if (folder / job.output / "tensors.safetensors").exists() != (folder / job.output / "run.json").exists():
        wrong.append("one of tensors.safetensors and run.json is there without the other")
    return wrong


def go_on(job: Job, model: Path, whole: Whole, folder: Path) -> list[str]:
    """Run a job again, with enough room; return what is wrong."""
    if job.arguments[0] == "analyze" and (folder / job.output / "run.json").exists():  # only the page was missing
        ended = attempt(["report", job.output], folder)
    else:
        ended = attempt(job.command(model, folder), folder)
    if ended.code != 0:
        return [f"could not go on ({ended.code or ended.signal}): {ended.stderr.strip()}"]
    differ = [f"{name} differs after going on" for name in differing(job.result(folder), whole.result)]
    return differ + [f"{name} was left" for name in leftovers(folder)]


def can_mount(place: Path) -> bool:
    """Return whether this process may mount a file system."""
    if os.geteuid() != 0:
        return False
    try:
        with disk(place / "try"):
            return True
    except (subprocess.CalledProcessError, OSError):
        return False


def main() -> None:
    """Run trials."""
    parser = arguments(__doc__)
    parser.add_argument("--runs", type=int, default=200, help="over all commands [200]")
    parser.add_argument("--limit", action="store_true", help="limit the size of files even where a disk can be mounted")
    options = parser.parse_args()
    chance, counts = random.Random(options.seed), {name: Counter[Job]() for name in ("runs", "failed", "wrong")}
    with workplace(options.folder) as place:
        model, jobs = copied_model(place, options.model), chosen(options.only)
        mounting = can_mount(place) and not options.limit
        wholes: dict[Job, Whole] = {}
        sizes: dict[Job, int] = {}
        for number in range(options.runs):
            job = jobs[number % len(jobs)]
            if job not in wholes:
                wholes[job] = undisturbed(job, model, place / "whole")
                sizes[job] = most(job, model, place / "size") if mounting else largest_file(wholes[job])
            at = place / "disk"
            if mounting:
                with disk(at):
                    shutil.copy(place / "prompts.txt", at)
                    ended = on_small_disk(job, model, at, wholes[job], sizes[job], chance)
                    faults = trial(job, ended, model, wholes[job], at / "run")
                    (at / BALLAST).unlink(missing_ok=True)
                    resize(at, ROOM)
                    faults += [] if ended.code == 0 else go_on(job, model, wholes[job], at / "run")
            else:
                at.mkdir()
                shutil.copy(place / "prompts.txt", at)
                ended = with_small_files(job, model, at, sizes[job], chance)
                faults = trial(job, ended, model, wholes[job], at / "run")
                faults += [] if ended.code == 0 else go_on(job, model, wholes[job], at / "run")
                shutil.rmtree(at)
            for name, count in (("runs", 1), ("failed", ended.code != 0), ("wrong", bool(faults))):
                counts[name][job] += int(count)
            for fault in faults:
                print(f"{job.name}, run {number} (seed {options.seed}): {fault}", file=sys.stderr)
    rows: list[tuple[Any, ...]] = [(job.name, *(count[job] for count in counts.values())) for job in wholes]
    rows.append(("all", *(count.total() for count in counts.values())))
    how = "a small disk" if mounting else "a limit on the size of files"
    columns = ("command", "runs", "ended by it", "half-written, left over, or different after going on")
    show(f"No room at random moments ({how})", columns, rows)
    sys.exit(1 if counts["wrong"].total() else 0)


def largest_file(whole: Whole) -> int:
    """Return about the size of the largest file that a job saves."""
    return sum(value.nbytes for value in whole.result.values() if hasattr(value, "nbytes")) or 1 << 14


if __name__ == "__main__":
    main()
