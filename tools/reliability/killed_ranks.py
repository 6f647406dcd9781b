"""Kill one of several processes that share a model, under torchrun; what it gives in the end must have the same bits.

    python tools/reliability/killed_ranks.py --kills 20

Each trial is `torchrun --max-restarts 3 ... svd --resume`, in which a process ends itself with SIGKILL when it has
computed a random number of blocks; in half of the trials another one does so after the restart.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.numpy import load_file

COMMAND = ["svd", "-k", "3", "--dtype", "float64", "--tol", "1e-6", "-q", "--resume", "-o"]
BLOCKS = 60  # fewer than a run computes on the demo


def run(ranks: int, folder: Path, kills: list[tuple[int, int]]) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder; of attempt `i`, process `kills[i][0]` dies after `kills[i][1]` blocks."""
    folder.mkdir(exist_ok=True)
    when = ",".join(f"{rank}:{blocks}" for rank, blocks in kills)
    start = ["--standalone", f"--nproc-per-node={ranks}", "--max-restarts=3", str(Path(__file__).resolve())]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *start, "--child", when, *COMMAND, "two.safetensors"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def child(when: str, command: list[str]) -> None:
    """Run the command in this process, which may be one that is to die in this attempt, or to stop for good."""
    from ggjac import parallel, session
    from ggjac.cli import main
    from ggjac.jacobian.sweep import SharedSweep

    session.CHECKPOINT_SECONDS = 0.0
    ended = signal.SIGSTOP if when.startswith("stop:") else signal.SIGKILL
    if ended == signal.SIGSTOP and os.environ["RANK"] == "0":
        parallel.TIMEOUT = timedelta(seconds=3)
    kills = [tuple(map(int, pair.split(":"))) for pair in when.removeprefix("stop:").split(",") if pair]
    attempt, steps, done = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), SharedSweep._steps, 0

    def counted(self: SharedSweep, *arguments: Any) -> Iterator[Any]:
        nonlocal done
        for step in steps(self, *arguments):
            yield step
            done += 1
            if attempt < len(kills) and kills[attempt] == (int(os.environ["RANK"]), done):
                os.kill(os.getpid(), ended)

    SharedSweep._steps = counted  # type: ignore[assignment, method-assign]
    main(command, prog_name="ggjac")


def main() -> None:
    """Run trials until there were enough kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="at least so many [20]")
    parser.add_argument("--ranks", type=int, default=2, help="processes [2]")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments [0]")
    options = parser.parse_args()
    chance, kills, trials, wrong = random.Random(options.seed), 0, 0, 0
    with TemporaryDirectory() as place:
        whole = run(options.ranks, Path(place) / "whole", [])
        if whole.returncode:
            sys.exit(whole.stderr)
        expected = load_file(Path(place) / "whole" / "two.safetensors")
        while kills < options.kills:
            folder = Path(place) / str(trials)
            planned = [
                (chance.randrange(options.ranks), chance.randint(1, BLOCKS)) for _ in range(chance.choice((1, 2)))
            ]
            ended = run(options.ranks, folder, planned)
            happened = ended.stderr.count("exitcode: -9")
            kills, trials = kills + happened, trials + 1
            found = load_file(folder / "two.safetensors") if ended.returncode == 0 else {}
            same = found.keys() == expected.keys() and all(
                found[name].tobytes() == expected[name].tobytes() for name in expected
            )
            left = [path.name for path in folder.iterdir() if path.name != "two.safetensors"]
            wrong += not same or bool(left)
            print(
                f"kills {planned}: {'the same bits' if same else 'other bits'}; left: {left or 'nothing'}", flush=True
            )
            if ended.returncode:
                print(ended.stderr, file=sys.stderr)
    print(f"{trials} runs of {options.ranks} processes, {kills} kills, {wrong} results that differ")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
