"""Kill commands with SIGKILL at random moments and go on as a user would; every result must have the same bits.

    python tools/reliability/kills.py --kills 300

Each trial starts a command in a new folder and kills it after a random part of the time that it takes; then it is
started again, with `--resume` where there is a run, and half of the time killed again, until it ends by itself.
"""

import random
import shutil
import sys
from collections import Counter
from pathlib import Path

from attempts import (
    Job,
    Whole,
    arguments,
    attempt,
    chosen,
    copied_model,
    differing,
    leftovers,
    show,
    undisturbed,
    workplace,
)


def trial(job: Job, model: Path, whole: Whole, folder: Path, chance: random.Random) -> tuple[int, list[str]]:
    """Kill a job at least once, unless it is too fast; return how often, and what is wrong in the end."""
    kills = 0
    while not job.complete(folder):
        again = kills == 0 or chance.random() < 0.5
        ended = attempt(
            job.command(model, folder), folder, kill_after=chance.uniform(0, 1.05 * whole.seconds) if again else None
        )
        if ended.signal == 9:
            kills += 1
        elif ended.code != 0:
            return kills, [f"ended with {ended.code or ended.signal}: {ended.stderr.strip()}"]
        else:
            break
    wrong = [f"{name} differs" for name in differing(job.result(folder), whole.result)]
    return kills, wrong + [f"{name} was left" for name in leftovers(folder)]


def main() -> None:
    """Run trials until there were enough kills."""
    parser = arguments(__doc__)
    parser.add_argument("--kills", type=int, default=300, help="at least so many, over all commands [300]")
    options = parser.parse_args()
    chance, trials, kills, wrong = random.Random(options.seed), Counter[Job](), Counter[Job](), Counter[Job]()
    with workplace(options.folder) as place:
        model = copied_model(place, options.model)
        jobs = chosen(options.only)
        wholes = {job: undisturbed(job, model, place / "whole") for job in jobs}
        while kills.total() < options.kills:
            job = min(jobs, key=lambda job: kills[job])
            folder = place / f"{job.arguments[0]}-{trials.total()}"
            count, faults = trial(job, model, wholes[job], folder, chance)
            trials[job] += 1
            kills[job] += count
            wrong[job] += bool(faults)
            for fault in faults:
                print(f"{job.name}, trial {trials.total()} (seed {options.seed}): {fault}", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)
    rows = [(job.name, f"{wholes[job].seconds:.1f}", trials[job], kills[job], wrong[job]) for job in jobs]
    rows.append(("all", "", trials.total(), kills.total(), wrong.total()))
    show("Kills at random moments", ("command", "seconds undisturbed", "runs", "kills", "results that differ"), rows)
    sys.exit(1 if wrong.total() else 0)


if __name__ == "__main__":
    main()
