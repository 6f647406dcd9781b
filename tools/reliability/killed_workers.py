"""Kill workers of a study, or the process that made them, at random moments; the file must have the same bytes.

    python tools/reliability/killed_workers.py --kills 20

Each trial is `ranks --workers 2` over 16 prompts. After a random part of the time that this takes, one of the workers
gets SIGKILL, or, with one chance in four, their parent; in half of the trials this happens again. A killed command is
started again, as a user would; one whose worker was killed must end well by itself. The result must have the bytes that
one process writes without any worker, no worker may live on, and nothing may be left beside the file.
"""

import random
import sys
import time
from pathlib import Path

import psutil
from attempts import Attempt, arguments, leftovers, one_line, workplace

from ggjac.gguf.hub import demo_path

PROMPTS = [f"{subject} number {i} is" for i in range(4) for subject in ("The city", "A color", "My tree", "This word")]
PATIENCE = 60.0  # seconds in which a worker must end after its parent: when it has imported torch, at the latest


def command(model: Path, *more: str) -> list[str]:
    """Return the command line of the study."""
    return ["ranks", "-m", str(model), "-f", "../many.txt", "-t", "1", "-q", "-o", "ranks.jsonl", *more]


def workers(parent: int) -> list[psutil.Process]:
    """Return the worker processes that live."""
    try:
        children = psutil.Process(parent).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:  # one that has just ended
        return []


def disturbed(line: list[str], folder: Path, chance: random.Random, seconds: float) -> tuple[list[str], list[str]]:
    """Run the study to its end through one or two kills; return whom they met, and what is wrong on the way."""
    planned, met, wrong = chance.choice((1, 2)), list[str](), list[str]()
    while True:
        running, seen = Attempt(line, folder), dict[int, psutil.Process]()
        moment = time.monotonic() + chance.uniform(0.1, 1.0) * seconds
        while running.running():
            here = workers(running.pid)
            seen |= {worker.pid: worker for worker in here}
            if len(met) < planned and here and time.monotonic() > moment:
                parent = chance.random() < 0.25
                met.append("parent" if parent else "worker")
                running.kill() if parent else chance.choice(here).kill()
                moment = time.monotonic() + chance.uniform(0.1, 1.0) * seconds
            time.sleep(0.005)
        ended = running.wait()
        _, alive = psutil.wait_procs(seen.values(), PATIENCE)
        wrong += [f"worker {worker.pid} lives on" for worker in alive]
        for worker in alive:
            worker.kill()
        if ended.signal != 9:
            break
    if ended.code != 0:
        said = ended.stderr.strip()
        wrong.append(f"ended with {ended.code or ended.signal}{'' if one_line(ended) else ', not in one line'}: {said}")
    elif ended.stderr.strip():
        wrong.append(f"said {ended.stderr.strip()}")
    return met, wrong


def main() -> None:
    """Run trials until there were enough kills."""
    parser = arguments(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="at least so many [20]")
    parser.add_argument("--workers", type=int, default=2, help="processes [2]")
    options = parser.parse_args()
    chance, kills, trials, bad = random.Random(options.seed), list[str](), 0, 0
    with workplace(options.folder) as place:
        (place / "many.txt").write_text("\n".join(PROMPTS))
        model = (options.model or demo_path()).absolute()
        seconds = 0.0
        for name, more in (("alone", []), ("together", ["--workers", str(options.workers)])):
            ended = Attempt(command(model, *more), place / name).wait()
            if ended.code != 0:
                sys.exit(f"ranks does not run here: {ended.stderr}")
            seconds = ended.seconds
        expected = (place / "alone" / "ranks.jsonl").read_bytes()
        while len(kills) < options.kills:
            folder = place / str(trials)
            met, wrong = disturbed(command(model, "--workers", str(options.workers)), folder, chance, seconds)
            file = folder / "ranks.jsonl"
            if not file.exists() or file.read_bytes() != expected:
                wrong.append("other bytes")
            wrong += [f"{path.name} was left" for path in folder.iterdir() if path != file]
            wrong += [f"{name} was left" for name in leftovers(folder)]
            kills, trials, bad = kills + met, trials + 1, bad + bool(wrong)
            print(f"{', '.join(met) or 'no kill'}: {'; '.join(wrong) or 'the same bytes'}", flush=True)
    print(
        f"{trials} runs of {options.workers} workers, {len(PROMPTS)} prompts, {seconds:.1f} s undisturbed: "
        f"{kills.count('worker')} workers and {kills.count('parent')} parents killed, {bad} runs with a fault"
    )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
